//! House rules that a machine can check.
//!
//! Who imports whom, what the root process is made of, that every module says what it is for, that `unsafe` stays
//! behind its doors, and that nothing names the machine it was written on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Every crate and the crates of ours it may use. The tests may use all of them.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    (
        "epagent",
        &["epagent-conf", "epagent-core", "epagent-log", "epagent-store", "epagent-syslog", "epagent-wire"],
    ),
    ("epagent-conf", &[]),
    ("epagent-log", &["epagent-wire"]),
    ("epagent-syslog", &[]),
    ("epagent-core", &[]),
    ("epagent-wire", &["epagent-core"]),
    ("epagent-store", &["epagent-core"]),
    ("epagent-lease", &["epagent-core", "epagent-log", "epagent-wire"]),
    (
        "epagent-runner",
        &[
            "epagent-conf",
            "epagent-core",
            "epagent-log",
            "epagent-wire",
            "epagent-isolation",
            "epagent-storage",
        ],
    ),
    ("epagent-isolation", &[]),
    ("epagent-storage", &[]),
    ("epagent-balancer", &[]),
];

/// What the process that is root, and all it links, must not contain: async runtimes, SQL, network servers.
const NOT_AS_ROOT: &[&str] = &[
    "tokio",
    "async-std",
    "smol",
    "sqlx",
    "rusqlite",
    "zmq",
    "zeromq",
    "axum",
    "hyper",
    "reqwest",
    "rustls",
];

/// What a pure crate must not contain, beside those: input, output, clocks, random numbers.
const NOT_IN_CORE: &[&str] = &["nix", "rustix", "libc", "rand", "getrandom", "tempfile"];

/// Folders and files in which `unsafe` may be written; tests may be as unsafe as what they attack with.
const DOORS: &[&str] = &["sys", "ring", "sys.rs", "ring.rs", "rights.rs", "tests"];

/// Longest source file, in lines. One file, one idea.
const LINES_MAX: usize = 800;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn metadata() -> Value {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    // Without this, cargo would fetch what only other platforms need.
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let out = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", &platform])
        .arg("--manifest-path")
        .arg(root().join("Cargo.toml"))
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Crates by name, each with the names of what it depends on in a build (not for its tests).
fn dependencies(metadata: &Value) -> BTreeMap<String, BTreeSet<String>> {
    let names: BTreeMap<&str, &str> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| (package["id"].as_str().unwrap(), package["name"].as_str().unwrap()))
        .collect();
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for node in metadata["resolve"]["nodes"].as_array().unwrap() {
        let name = names[node["id"].as_str().unwrap()];
        let used = node["deps"].as_array().unwrap().iter().filter(|dependency| {
            dependency["dep_kinds"].as_array().unwrap().iter().any(|kind| kind["kind"].is_null())
        });
        let entry = found.entry(name.to_owned()).or_default();
        entry.extend(used.map(|dependency| names[dependency["pkg"].as_str().unwrap()].to_owned()));
    }
    found
}

fn all_below(dependencies: &BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![from.to_owned()];
    while let Some(name) = open.pop() {
        for next in dependencies.get(&name).into_iter().flatten() {
            if found.insert(next.clone()) {
                open.push(next.clone());
            }
        }
    }
    found
}

#[test]
fn imports_point_only_where_the_design_says() {
    let dependencies = dependencies(&metadata());
    let ours: BTreeSet<&String> = dependencies.keys().filter(|name| name.starts_with("epagent")).collect();
    let known: BTreeSet<String> = MAY_IMPORT.iter().map(|(name, _)| (*name).to_owned()).collect();
    for name in &ours {
        assert!(known.contains(*name) || *name == "epagent-tests", "{name} has no rule here");
    }
    for (name, allowed) in MAY_IMPORT {
        let used = dependencies[*name].iter().filter(|used| ours.contains(used));
        for used in used {
            assert!(allowed.contains(&used.as_str()), "{name} may not import {used}");
        }
    }
}

#[test]
fn the_root_processes_have_no_runtime_no_sql_and_no_server() {
    let dependencies = dependencies(&metadata());
    for name in ["epagent-runner", "epagent-isolation", "epagent-storage"] {
        let below = all_below(&dependencies, name);
        for banned in NOT_AS_ROOT {
            assert!(!below.contains(*banned), "{name} links {banned}");
        }
    }
}

#[test]
fn the_core_is_pure() {
    let below = all_below(&dependencies(&metadata()), "epagent-core");
    for banned in NOT_AS_ROOT.iter().chain(NOT_IN_CORE) {
        assert!(!below.contains(*banned), "epagent-core links {banned}");
    }
    for path in sources().into_iter().filter(|path| path.starts_with(root().join("agent/core"))) {
        let text = fs::read_to_string(&path).unwrap();
        let code = without_comments_and_strings(text.split("#[cfg(test)]").next().unwrap());
        for banned in
            ["std::fs", "std::net", "std::time::SystemTime", "Instant::now", "std::process", "std::thread"]
        {
            assert!(!code.contains(banned), "{} uses {banned}", path.display());
        }
    }
}

#[test]
fn every_module_says_what_it_is_for() {
    for path in sources() {
        let text = fs::read_to_string(&path).unwrap();
        let first =
            text.lines().find(|line| !line.trim().is_empty() && !line.starts_with("#!")).unwrap_or("");
        assert!(first.starts_with("//!"), "{} has no header", path.display());
    }
}

#[test]
fn unsafe_stays_behind_its_doors() {
    for path in sources() {
        let inside = path.strip_prefix(root()).unwrap();
        if inside.components().any(|part| DOORS.contains(&part.as_os_str().to_str().unwrap())) {
            continue;
        }
        let code = without_comments_and_strings(&fs::read_to_string(&path).unwrap());
        let found = words(&code).find(|word| *word == "unsafe");
        assert!(found.is_none(), "{} has unsafe code and is no door", inside.display());
    }
}

#[test]
fn nothing_is_left_to_do_and_no_file_is_a_book() {
    for path in sources() {
        let text = fs::read_to_string(&path).unwrap();
        let code = without_comments_and_strings(&text);
        for banned in ["todo!", "unimplemented!", "dbg!"] {
            assert!(!code.contains(banned), "{} has {banned}", path.display());
        }
        let lines = text.lines().count();
        assert!(lines <= LINES_MAX, "{} has {lines} lines; at most {LINES_MAX}", path.display());
    }
}

#[test]
fn nothing_names_the_machine_it_was_written_on() {
    // Put together here, so that this file does not name them either.
    let banned = [["/wo", "rk/"], ["/tmp/", "tgt"], ["/tmp/help", "ers"]].map(|p| p.concat());
    for path in texts() {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for word in &banned {
            let line = text.lines().find(|line| line.contains(word.as_str()));
            assert!(line.is_none(), "{} names {word}: {}", path.display(), line.unwrap_or_default());
        }
    }
}

#[test]
fn the_architecture_page_maps_every_crate() {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("there is an ARCHITECTURE.md");
    for package in metadata()["packages"].as_array().unwrap() {
        let manifest = Path::new(package["manifest_path"].as_str().unwrap());
        if let Ok(inside) = manifest.parent().unwrap().strip_prefix(root()) {
            let folder = inside.to_str().unwrap();
            assert!(page.contains(folder), "ARCHITECTURE.md does not mention {folder}");
        }
    }
    for (name, _) in MAY_IMPORT {
        assert!(page.contains(name), "ARCHITECTURE.md does not mention {name}");
    }
}

#[test]
fn the_read_me_names_the_two_commands() {
    let page = fs::read_to_string(root().join("README.md")).expect("there is a README.md");
    for command in ["make demo", "make test", "ARCHITECTURE.md"] {
        assert!(page.contains(command), "README.md does not mention {command}");
    }
}

#[test]
fn the_reader_of_code_here_is_not_fooled() {
    let code = without_comments_and_strings(
        "a /* unsafe */ b // unsafe\n\"unsafe \\\" unsafe\" 'x' r#\"unsafe \" unsafe\"# '\"' fn f<'a>() { unsafe }",
    );
    assert_eq!(words(&code).filter(|word| *word == "unsafe").count(), 1, "{code}");
}

/// All Rust files of the workspace.
fn sources() -> Vec<PathBuf> {
    texts().into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

/// All files of the source tree, without what was built or belongs to a running agent.
fn texts() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).unwrap().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() && !["target", "state", ".git", "node_modules"].contains(&name.as_str()) {
                open.push(entry.path());
            } else if kind.is_file() && name != "Cargo.lock" {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_')
}

/// The code with comments and the content of strings and characters left out. Reads well enough for rustfmt-ed
/// code: it knows line and nested block comments, strings, raw strings, characters and lifetimes.
fn without_comments_and_strings(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = |index: usize| chars.get(index).copied().unwrap_or('\0');
    let mut code = String::new();
    let mut index = 0;
    while index < chars.len() {
        let raw_hashes = raw_string_hashes(&chars, index);
        match (at(index), at(index + 1)) {
            ('/', '/') => index += chars[index..].iter().take_while(|c| **c != '\n').count(),
            ('/', '*') => index = end_of_block_comment(&chars, index),
            _ if raw_hashes.is_some() => {
                let hashes = raw_hashes.unwrap_or(0);
                let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
                let start = index + 2 + hashes;
                let found = chars[start..].windows(end.len()).position(|window| window == end);
                index = found.map_or(chars.len(), |offset| start + offset + end.len());
                code.push(' ');
            }
            ('"', _) => {
                index += 1;
                while index < chars.len() && at(index) != '"' {
                    index += if at(index) == '\\' { 2 } else { 1 };
                }
                index += 1;
                code.push(' ');
            }
            ('\'', '\\') => {
                index += 3;
                while index < chars.len() && at(index) != '\'' {
                    index += 1;
                }
                index += 1;
            }
            ('\'', _) if at(index + 2) == '\'' => index += 3,
            (other, _) => {
                code.push(other);
                index += 1;
            }
        }
    }
    code
}

/// `r"`, `r#"`, `r##"`, …: how many hashes; none when no raw string begins here.
fn raw_string_hashes(chars: &[char], index: usize) -> Option<usize> {
    let before = index.checked_sub(1).map(|index| chars[index]);
    if chars[index] != 'r' || before.is_some_and(|c| c.is_alphanumeric() && c != 'b' || c == '_') {
        return None;
    }
    let hashes = chars[index + 1..].iter().take_while(|c| **c == '#').count();
    (chars.get(index + 1 + hashes) == Some(&'"')).then_some(hashes)
}

fn end_of_block_comment(chars: &[char], mut index: usize) -> usize {
    let mut depth = 0;
    while index < chars.len() {
        match (chars[index], chars.get(index + 1)) {
            ('/', Some('*')) => (depth, index) = (depth + 1, index + 2),
            ('*', Some('/')) => (depth, index) = (depth - 1, index + 2),
            _ => index += 1,
        }
        if depth == 0 {
            break;
        }
    }
    index
}

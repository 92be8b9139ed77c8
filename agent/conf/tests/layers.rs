//! What a node's daemons make of the files they find.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use epagent_conf::{Daemon, Loaded, Private, load};
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    node: u16,
    #[serde(default)]
    build: Build,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Build {
    memory: String,
    resolvers: Vec<String>,
    env: BTreeMap<String, Private>,
}

impl Default for Build {
    fn default() -> Build {
        Build { memory: "2G".to_owned(), resolvers: Vec::new(), env: BTreeMap::new() }
    }
}

struct Etc(tempfile::TempDir);

impl Etc {
    fn new(main: &str) -> Etc {
        let etc = Etc(tempfile::tempdir().unwrap());
        fs::create_dir(etc.path("conf.d")).unwrap();
        etc.write("runner.toml", main);
        etc
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o644)).unwrap();
    }

    fn load(&self) -> Result<Loaded<Config>, String> {
        load(Daemon::Runner, &self.path("runner.toml")).map_err(|error| error.to_string())
    }

    #[track_caller]
    fn refused(&self, begin: &str, reason: &str) {
        let error = self.load().expect_err(reason);
        let begin = self.path(begin).display().to_string();
        assert!(error.starts_with(&begin) && error.contains(reason), "{error}");
    }
}

const MAIN: &str =
    "node = 3\n[build]\nmemory = \"1G\"\nresolvers = [\"a\", \"b\"]\nenv = { TOKEN = \"hunter2\" }\n";

#[test]
fn later_files_take_the_place_of_earlier_ones_key_by_key() {
    let etc = Etc::new(MAIN);
    etc.write("conf.d/20-b.toml", "# site\n[runner.build]\nmemory = \"8G\"\n");
    etc.write(
        "conf.d/10-a.toml",
        "[runner.build]\nmemory = \"4G\"\nresolvers = [\"c\"]\n[epagentd]\nnode = 9\n",
    );
    let loaded = etc.load().unwrap();
    assert_eq!((loaded.config.node, loaded.config.build.memory.as_str()), (3, "8G"));
    assert_eq!(loaded.config.build.resolvers, ["c"]);
    assert_eq!(loaded.config.build.env["TOKEN"].reveal(), "hunter2");
    let origin = |key: &str| loaded.origins.of(key).unwrap().to_string();
    assert_eq!(origin("build.memory"), format!("{}:3", etc.path("conf.d/20-b.toml").display()));
    assert_eq!(origin("build.resolvers"), format!("{}:3", etc.path("conf.d/10-a.toml").display()));
    assert_eq!(origin("node"), format!("{}:1", etc.path("runner.toml").display()));
}

#[test]
fn what_is_in_force_is_shown_with_its_origin_and_without_what_is_private() {
    let etc = Etc::new("node = 3\n[build]\nenv = { TOKEN = \"hunter2\" }\n");
    let settings = etc.load().unwrap().settings().unwrap();
    let shown: Vec<(&str, &str, bool)> = settings
        .iter()
        .map(|setting| (setting.key.as_str(), setting.value.as_str(), setting.origin == "default"))
        .collect();
    let expected = [
        ("build.env.TOKEN", "\"(not shown)\"", false),
        ("build.memory", "\"2G\"", true),
        ("build.resolvers", "[]", true),
        ("node", "3", false),
    ];
    assert_eq!(shown, expected);
    assert!(!format!("{:?}", etc.load().unwrap().config).contains("hunter2"));
}

#[test]
fn a_mistake_is_refused_with_its_file_and_line() {
    for (text, line, reason) in [
        ("[runner.build]\n\nmemry = \"4G\"", 3, "unknown field `memry`"),
        ("[runner]\nnode = 3\nnodes = 4", 3, "unknown field `nodes`"),
        ("[runner]\nnode = \"three\"", 2, "expected u16"),
        ("\n[runer]\nnode = 4", 2, "unknown key `runer`"),
        ("runner = 3", 1, "`runner` is not a table"),
        ("[runner]\nnode = 4\nnode = 5", 3, "duplicate key"),
        ("[runner]\nnode = ", 2, ""),
    ] {
        let etc = Etc::new(MAIN);
        etc.write("conf.d/50-site.toml", text);
        etc.refused(&format!("conf.d/50-site.toml:{line}: "), reason);
    }
    Etc::new("node = 3\n[built]\n").refused("runner.toml:2: ", "unknown field `built`");
    Etc::new("").refused("runner.toml: ", "missing field `node`");
}

#[test]
fn a_mistake_is_told_without_the_value() {
    let etc = Etc::new("node = 1\n[build]\nenv = \"INDEX=https://user:canary@host\"\n");
    etc.refused("runner.toml", "invalid type: string, expected a map");
    assert!(!etc.load().unwrap_err().contains("canary"));
}

#[test]
fn what_others_can_write_is_refused() {
    let etc = Etc::new(MAIN);
    etc.write("conf.d/50-site.toml", "[runner]\nnode = 4\n");
    for name in ["runner.toml", "conf.d/50-site.toml", "conf.d"] {
        let before = fs::metadata(etc.path(name)).unwrap().permissions();
        fs::set_permissions(etc.path(name), fs::Permissions::from_mode(before.mode() | 0o020)).unwrap();
        etc.refused(name, "writable by root alone");
        fs::set_permissions(etc.path(name), before).unwrap();
    }
    assert_eq!(etc.load().unwrap().config.node, 4);
}

#[test]
fn other_files_of_the_folder_are_left_alone() {
    let etc = Etc::new(MAIN);
    for name in
        ["conf.d/README", "conf.d/50-site.toml.dpkg-old", "conf.d/.50-site.toml", "conf.d/50-site.toml~"]
    {
        etc.write(name, "not = [ toml");
    }
    assert_eq!(etc.load().unwrap().config.node, 3);
    fs::remove_dir_all(etc.path("conf.d")).unwrap();
    assert_eq!(etc.load().unwrap().config.node, 3);
}

#[test]
fn there_is_a_bound_on_what_is_read() {
    let etc = Etc::new(MAIN);
    etc.write("conf.d/50-large.toml", &"#".repeat(epagent_conf::FILE_BYTES_MAX as usize + 1));
    etc.refused("conf.d/50-large.toml", "larger than");
    let etc = Etc::new(MAIN);
    for number in 0..=epagent_conf::FILES_MAX {
        etc.write(&format!("conf.d/{number}.toml"), "");
    }
    etc.refused("conf.d", "more than");
}

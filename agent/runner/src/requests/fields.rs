//! Whether the fields of a request are what they claim to be, and bounded.

use std::collections::{BTreeMap, BTreeSet};

use epagent_wire::name::VolumeName;
use epagent_wire::runner::{Command, Refusal, RefusalCode, TerminalSize};
use epagent_wire::spec::Limits;

use crate::config::{IO_BYTES_PER_S_MIN, Maxima};

/// One argument, one value, one command.
const TEXT_BYTES_MAX: usize = 32 << 10;
const ENV_MAX: usize = 512;
const ENV_NAME_BYTES_MAX: usize = 128;
/// All of an environment or an argument list together; the rest of a packet is overhead.
const TOTAL_BYTES_MAX: usize = 96 << 10;
const ARGUMENTS_MAX: usize = 512;
/// Mounts of one jail, less those the runner adds.
const VOLUMES_PER_JAIL_MAX: usize = 16;
const PATH_BYTES_MAX: usize = 255;
const PACKAGES_MAX: usize = 256;
const PACKAGE_BYTES_MAX: usize = 100;
/// A grace longer than this is no grace.
pub const GRACE_MS_MAX: u64 = 10 * 60 * 1000;
/// The longest a job started by `Start` may run.
pub const DEADLINE_MS_MAX: u64 = 24 * 60 * 60 * 1000;
/// The smallest limits with which our init and a shell start at all.
const MEMORY_BYTES_MIN: u64 = 4 << 20;
const PIDS_MIN: u32 = 4;
const NOFILE_MIN: u32 = 64;
const DISK_BYTES_MIN: u64 = 1 << 20;

/// Nothing of the app's may be mounted here or below: the kernel's, the jail's own, the image's system.
const SYSTEM: [&str; 14] = [
    "/proc", "/dev", "/sys", "/run", "/tmp", "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32",
    "/etc", "/boot",
];
/// Nor exactly here, though below is fine.
const SYSTEM_ITSELF: [&str; 5] = ["/", "/app", "/root", "/home", "/var"];

type Checked<T = ()> = Result<T, Refusal>;

pub fn refuse<T>(code: RefusalCode, message: impl Into<String>) -> Checked<T> {
    Err(Refusal { code, message: message.into() })
}

fn bad<T>(message: impl Into<String>) -> Checked<T> {
    refuse(RefusalCode::BadRequest, message)
}

/// Names as the shell takes them, values without NUL, all of it bounded.
pub fn env(env: &BTreeMap<String, String>) -> Checked {
    if env.len() > ENV_MAX {
        return bad(format!("{} environment variables; {ENV_MAX} are allowed", env.len()));
    }
    let name_is_good = |name: &str| {
        let mut bytes = name.bytes();
        bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
            && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
            && name.len() <= ENV_NAME_BYTES_MAX
    };
    if let Some(name) = env.keys().find(|name| !name_is_good(name)) {
        return bad(format!("environment variable name {:?} is not valid", shortened(name)));
    }
    if let Some((name, _)) =
        env.iter().find(|(_, value)| value.len() > TEXT_BYTES_MAX || value.contains('\0'))
    {
        return bad(format!(
            "environment variable {name}: its value has a NUL or more than {TEXT_BYTES_MAX} bytes"
        ));
    }
    let bytes: usize = env.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    if bytes > TOTAL_BYTES_MAX {
        return bad(format!("{bytes} bytes of environment; {TOTAL_BYTES_MAX} are allowed"));
    }
    Ok(())
}

pub fn command(command: &Command) -> Checked {
    match command {
        Command::Shell(text) => shell(text),
        Command::Argv(arguments) => argv(arguments),
    }
}

pub fn shell(text: &str) -> Checked {
    if text.trim().is_empty() || text.contains('\0') || text.len() > TEXT_BYTES_MAX {
        return bad(format!("the command is empty, has a NUL or more than {TEXT_BYTES_MAX} bytes"));
    }
    Ok(())
}

pub fn argv(arguments: &[String]) -> Checked {
    if arguments.first().is_none_or(|program| program.is_empty()) {
        return bad("the command names no program");
    }
    let bytes: usize = arguments.iter().map(|argument| argument.len() + 1).sum();
    if arguments.len() > ARGUMENTS_MAX || bytes > TOTAL_BYTES_MAX {
        return bad(format!(
            "{} arguments with {bytes} bytes; {ARGUMENTS_MAX} with {TOTAL_BYTES_MAX} are allowed",
            arguments.len()
        ));
    }
    if arguments.iter().any(|argument| argument.contains('\0')) {
        return bad("an argument has a NUL");
    }
    Ok(())
}

/// Where volumes may appear in a jail: absolute, normalised, apart from the system and from each other.
pub fn mount_paths(volumes: &BTreeMap<VolumeName, String>) -> Checked {
    if volumes.len() > VOLUMES_PER_JAIL_MAX {
        return bad(format!("{} volumes in one jail; {VOLUMES_PER_JAIL_MAX} are allowed", volumes.len()));
    }
    for (volume, path) in volumes {
        if let Err(reason) = mount_path(path) {
            return bad(format!("volume {volume} can't be mounted on {:?}: {reason}", shortened(path)));
        }
    }
    let paths: Vec<&str> = volumes.values().map(String::as_str).collect();
    for (at, path) in paths.iter().enumerate() {
        if paths.iter().enumerate().any(|(other, dir)| other != at && is_in(path, dir)) {
            return bad(format!("two volumes are mounted on {path:?} or one within the other"));
        }
    }
    Ok(())
}

fn mount_path(path: &str) -> Result<(), &'static str> {
    let Some(relative) = path.strip_prefix('/') else { return Err("it is not absolute") };
    if path.len() > PATH_BYTES_MAX {
        return Err("it is too long");
    }
    if path.chars().any(char::is_control) {
        return Err("it has a control character");
    }
    if SYSTEM_ITSELF.contains(&path) || SYSTEM.iter().any(|dir| is_in(path, dir)) {
        return Err("that folder is the system's or the release's");
    }
    if relative.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err("it is not normalised");
    }
    Ok(())
}

/// Whether `path` is `dir` or below it.
fn is_in(path: &str, dir: &str) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// What was asked for, between what works at all and what the operator allows.
pub fn clamp(limits: &Limits, maxima: &Maxima) -> Limits {
    Limits {
        memory_bytes: limits.memory_bytes.clamp(MEMORY_BYTES_MIN, maxima.memory.0.max(MEMORY_BYTES_MIN)),
        cpu_percent: limits.cpu_percent.clamp(1, maxima.cpu.0.max(1)),
        pids: limits.pids.clamp(PIDS_MIN, maxima.pids.max(PIDS_MIN)),
        nofile: limits.nofile.clamp(NOFILE_MIN, maxima.nofile.max(NOFILE_MIN)),
        disk_bytes: limits.disk_bytes.clamp(DISK_BYTES_MIN, maxima.disk.0.max(DISK_BYTES_MIN)),
        io_bytes_per_s: match (limits.io_bytes_per_s, maxima.io.bytes_per_s) {
            (Some(asked), most) => Some(asked.min(most.unwrap_or(asked)).max(IO_BYTES_PER_S_MIN)),
            (None, most) => most,
        },
    }
}

/// The number of a signal that an app may be sent.
pub fn signal(name: &str) -> Checked<i32> {
    use nix::sys::signal::Signal::*;
    let signals = [
        ("TERM", SIGTERM),
        ("INT", SIGINT),
        ("QUIT", SIGQUIT),
        ("HUP", SIGHUP),
        ("USR1", SIGUSR1),
        ("USR2", SIGUSR2),
        ("WINCH", SIGWINCH),
        ("KILL", SIGKILL),
    ];
    match signals.iter().find(|(known, _)| *known == name) {
        Some((_, signal)) => Ok(*signal as i32),
        None => bad(format!(
            "signal {:?} is none of {}",
            shortened(name),
            signals.map(|(name, _)| name).join(", ")
        )),
    }
}

/// A size that a terminal can have.
pub fn terminal(size: TerminalSize) -> Checked {
    if !(1..=4096).contains(&size.rows) || !(1..=4096).contains(&size.columns) {
        return bad(format!("a terminal of {} rows and {} columns", size.rows, size.columns));
    }
    Ok(())
}

/// The words of a bootstrap job: they become arguments of mmdebstrap.
pub fn packages(suite: &str, include: &BTreeSet<String>) -> Checked {
    let word = |text: &str, others: &str| {
        text.len() <= PACKAGE_BYTES_MAX
            && text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || others.contains(c))
    };
    if !word(suite, "-") {
        return bad(format!("suite {:?} is not a name like bookworm", shortened(suite)));
    }
    if include.len() > PACKAGES_MAX {
        return bad(format!("{} packages; {PACKAGES_MAX} are allowed", include.len()));
    }
    match include.iter().find(|package| !word(package, "+-.")) {
        Some(package) => bad(format!("{:?} is not a package name (a-z, 0-9, +, -, .)", shortened(package))),
        None => Ok(()),
    }
}

/// At most 64 characters of what somebody else wrote.
pub fn shortened(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Bytes, Rate};

    #[test]
    fn hostile_environments_are_refused() {
        let check = |name: &str, value: &str| env(&BTreeMap::from([(name.to_owned(), value.to_owned())]));
        assert!(check("PORT", "8000").is_ok());
        assert!(check("_x9", "multi\nline").is_ok());
        for name in ["", "9A", "A=B", "A B", "A\nB", "A\0", "ä", &"A".repeat(ENV_NAME_BYTES_MAX + 1)] {
            assert!(check(name, "x").is_err(), "{name:?} was accepted");
        }
        assert!(check("A", "\0").is_err());
        assert!(check("A", &"x".repeat(TEXT_BYTES_MAX + 1)).is_err());
        let many = (0..4).map(|at| (format!("A{at}"), "x".repeat(TEXT_BYTES_MAX))).collect();
        assert!(env(&many).is_err());
    }

    #[test]
    fn volumes_stay_away_from_the_system_and_each_other() {
        let check = |paths: &[&str]| {
            let volume = |at: usize| format!("v{at}").parse::<VolumeName>().unwrap();
            mount_paths(
                &paths.iter().enumerate().map(|(at, path)| (volume(at), (*path).to_owned())).collect(),
            )
        };
        for path in ["/data", "/app/media", "/var/lib/data", "/srv/a.b", "/home/x", "/processes"] {
            assert!(check(&[path]).is_ok(), "{path:?} was refused");
        }
        for path in [
            "",
            "/",
            "data",
            "/app",
            "/proc",
            "/proc/sys",
            "/dev/shm",
            "/sys",
            "/run/epagent",
            "/etc/ssl",
            "/usr/lib",
            "/tmp",
            "/data/",
            "//data",
            "/data/../etc",
            "/./data",
            "/da\nta",
            "/da\0ta",
            "/lib64",
            &format!("/{}", "x".repeat(PATH_BYTES_MAX)),
        ] {
            assert!(check(&[path]).is_err(), "{path:?} was accepted");
        }
        assert!(check(&["/a", "/a"]).is_err());
        assert!(check(&["/a", "/a/b"]).is_err());
        assert!(check(&["/a", "/ab"]).is_ok());
    }

    #[test]
    fn commands_without_a_program_are_refused() {
        for text in ["", "  ", "a\0b", &"x".repeat(TEXT_BYTES_MAX + 1)] {
            assert!(shell(text).is_err());
        }
        assert!(argv(&[]).is_err());
        assert!(argv(&[String::new()]).is_err());
        assert!(argv(&["a".to_owned(), "b\0".to_owned()]).is_err());
        assert!(argv(&vec!["a".to_owned(); ARGUMENTS_MAX + 1]).is_err());
        assert!(argv(&["sh".to_owned(), String::new()]).is_ok());
    }

    #[test]
    fn limits_are_brought_between_what_works_and_what_is_allowed() {
        let maxima = Maxima { memory: Bytes(1 << 30), ..Maxima::default() };
        let all = Limits {
            memory_bytes: u64::MAX,
            cpu_percent: u32::MAX,
            pids: u32::MAX,
            nofile: u32::MAX,
            disk_bytes: u64::MAX,
            io_bytes_per_s: None,
        };
        let none = Limits {
            memory_bytes: 0,
            cpu_percent: 0,
            pids: 0,
            nofile: 0,
            disk_bytes: 0,
            io_bytes_per_s: Some(0),
        };
        assert_eq!(clamp(&all, &maxima).memory_bytes, 1 << 30);
        assert_eq!(clamp(&all, &maxima).pids, maxima.pids);
        assert_eq!(clamp(&none, &maxima).memory_bytes, MEMORY_BYTES_MIN);
        assert_eq!(clamp(&none, &maxima).cpu_percent, 1);
        assert_eq!(clamp(&none, &maxima).io_bytes_per_s, Some(1 << 20));
        assert_eq!(clamp(&all, &maxima).io_bytes_per_s, None, "nor does the operator limit it");
        let most = Rate { bytes_per_s: Some(30 << 20) };
        let slow = Maxima { io: most, ..Maxima::default() };
        for asked in [None, Some(100 << 20), Some(30 << 20)] {
            let limits = Limits { io_bytes_per_s: asked, ..Limits::default() };
            assert_eq!(clamp(&limits, &slow).io_bytes_per_s, most.bytes_per_s, "{asked:?}");
        }
        assert_eq!(clamp(&Limits::default(), &Maxima::default()), Limits::default());
    }

    #[test]
    fn only_listed_signals_are_sent() {
        assert_eq!(signal("TERM").ok(), Some(15));
        for name in ["", "SIGTERM", "STOP", "term", "15", "TERM\n"] {
            assert!(signal(name).is_err(), "{name:?} was accepted");
        }
    }

    #[test]
    fn packages_are_words_and_not_options() {
        let check = |suite: &str, package: &str| packages(suite, &BTreeSet::from([package.to_owned()]));
        assert!(check("bookworm", "python3").is_ok());
        assert!(check("bookworm-backports", "libstdc++6").is_ok());
        for (suite, package) in [
            ("bookworm", "-o"),
            ("bookworm", ""),
            ("bookworm", "a,b"),
            ("bookworm", "a b"),
            ("bookworm", "./x.deb"),
            ("bookworm", "?all"),
            ("--help", "a"),
            ("", "a"),
            ("a/b", "a"),
            ("..", "a"),
            ("bookworm", "a=1"),
        ] {
            assert!(check(suite, package).is_err(), "{suite:?} {package:?} was accepted");
        }
    }
}

//! What an instance is like: from [`Start`] to an [`Order`]. Pure.

use epagent_isolation::spec::{Limits as JailLimits, Profile};
use epagent_wire::name::AppName;
use epagent_wire::runner::{Command, Start};
use epagent_wire::spec::Limits;

use crate::app_sockets::IN_JAIL;
use crate::jobs::HOST_IMAGE;
use crate::order::{Mount, Order, Program, Root, Source, default_env, host_mounts};
use crate::tables::{JailRecord, ReleaseRecord};

/// The order for a checked request; `limits` are clamped, `jail` has its slot.
pub fn order(
    start: &Start,
    limits: &Limits,
    jail: JailRecord,
    release: &ReleaseRecord,
    id_base: u32,
) -> Order {
    let mut env = default_env();
    env.insert("HOME".to_owned(), crate::order::APP_DIR.to_owned());
    env.extend(start.env.clone());
    let mut mounts = if release.image.name.as_str() == HOST_IMAGE { host_mounts() } else { Vec::new() };
    mounts.extend(start.volumes.iter().map(|(volume, path)| volume_mount(&start.app, volume, path)));
    if start.socket {
        mounts.push(Mount::writable(IN_JAIL, Source::AppSocket));
    }
    Order {
        jail,
        id_base,
        profile: Profile::App,
        root: Root::Instance,
        mounts,
        program: Program::Command(argv(&start.command)),
        env,
        limits: jail_limits(limits),
        deadline_ms: start.deadline_ms.map(|ms| ms.clamp(1, crate::requests::fields::DEADLINE_MS_MAX)),
        takes_ca_bundle: false,
    }
}

fn volume_mount(app: &AppName, volume: &epagent_wire::name::VolumeName, path: &str) -> Mount {
    Mount::writable(path, Source::Volume(app.clone(), volume.clone()))
}

/// The isolation crate's limits. tmpfs counts as memory; a quarter of it keeps /tmp from starving the app.
pub fn jail_limits(limits: &Limits) -> JailLimits {
    JailLimits {
        memory_bytes: limits.memory_bytes,
        cpu_percent: limits.cpu_percent,
        pids: limits.pids,
        io_bytes_per_s: limits.io_bytes_per_s,
        open_files: u64::from(limits.nofile),
        tmpfs_bytes: limits.memory_bytes / 4,
        ..JailLimits::default()
    }
}

pub fn argv(command: &Command) -> Vec<String> {
    match command {
        Command::Argv(argv) => argv.clone(),
        Command::Shell(text) => shell(text),
    }
}

/// With `exec` in front where the shell has nothing else to do, so that signals reach the app itself and not a
/// shell that waits for it.
pub fn shell(text: &str) -> Vec<String> {
    let text = text.trim();
    let text = if is_simple_command(text) { format!("exec {text}") } else { text.to_owned() };
    vec!["/bin/sh".to_owned(), "-c".to_owned(), text]
}

/// Whether the text is one command and its arguments. Errs on the side of no: then it runs under a shell.
fn is_simple_command(text: &str) -> bool {
    /// What `exec` can't run, because it is the shell's own (POSIX.1-2017, 2.4, 2.14 and the usual built-ins).
    const SHELL_WORDS: [&str; 42] = [
        "!", "{", "}", "[", "[[", ".", ":", "alias", "bg", "break", "case", "cd", "command", "continue",
        "do", "done", "echo", "elif", "else", "eval", "exec", "exit", "export", "fi", "for", "function",
        "if", "local", "printf", "read", "readonly", "return", "set", "shift", "source", "test", "then",
        "trap", "ulimit", "umask", "until", "while",
    ];
    let first = text.split_whitespace().next().unwrap_or_default();
    let operators =
        |c: char| matches!(c, ';' | '&' | '|' | '<' | '>' | '(' | ')' | '`' | '\n' | '\r' | '#' | '\\');
    let plain = first.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+".contains(c));
    plain && !first.is_empty() && !SHELL_WORDS.contains(&first) && !text.contains(operators)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simple_commands_become_the_main_process() {
        for text in [
            "gunicorn -b 0.0.0.0:$PORT shop.wsgi",
            "venv/bin/python manage.py 'a b'",
            "./server --port=${PORT:-8000}",
            "/usr/bin/node index.js",
        ] {
            assert_eq!(shell(text)[2], format!("exec {text}"), "{text:?}");
        }
    }

    #[test]
    fn everything_else_is_left_to_the_shell() {
        for text in [
            "cd src && node index.js",
            "A=1 node index.js",
            "node a.js; node b.js",
            "node a.js | tee log",
            "$SERVER",
            "while true; do sleep 1; done",
            "exec node a.js",
            "echo $(date)",
            "node a.js &",
            "test -f x",
            "'a b' c",
            "{ a }",
            "! true",
            ". ./env",
            "node a.js > log",
            "node \"a;b\"",
            "a\nb",
            "node # comment",
        ] {
            assert_eq!(shell(text)[2], text, "{text:?}");
        }
    }
}

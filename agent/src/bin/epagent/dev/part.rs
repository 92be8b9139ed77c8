//! The parts of a node: which programs run, as whom, with which sockets and arguments.

use std::ffi::CString;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use super::layout::{APPS, Layout, Users, VIEW};
use super::sockets::Sockets;

/// The processes that are kept alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Runner,
    Balancer,
    Lease,
    Agent,
}

impl Part {
    /// In the order they are started. Each tolerates the absence of the others.
    pub const ALL: [Part; 4] = [Part::Runner, Part::Balancer, Part::Lease, Part::Agent];

    /// The name of its program, its log and its argv[0].
    pub fn name(self) -> &'static str {
        match self {
            Part::Runner => "epagent-runner",
            Part::Balancer => "epagent-balancer",
            Part::Lease => "epagent-lease",
            Part::Agent => "epagentd",
        }
    }

    /// None: root, in the host's own mount namespace.
    fn user(self, users: Users) -> Option<u32> {
        match self {
            Part::Runner => None,
            Part::Balancer => Some(users.balancer),
            Part::Lease => Some(users.lease),
            Part::Agent => Some(users.brain),
        }
    }

    fn arguments(self, layout: &Layout, users: Users) -> Vec<String> {
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let view = |below| text(Path::new(VIEW).join(below));
        match self {
            Part::Runner => vec!["run".into(), "--config".into(), text(layout.path("etc/runner.toml"))],
            Part::Balancer => {
                let control_uid = users.brain.to_string();
                let words =
                    ["--state", &view("balancer"), "--unix-root", &view(APPS), "--control-uid", &control_uid];
                words.map(str::to_owned).to_vec()
            }
            Part::Lease => vec!["--state".into(), view("lease")],
            Part::Agent => vec!["--config".into(), view("etc/epagentd.toml")],
        }
    }

    fn sockets(self, sockets: &Sockets) -> Vec<(&'static str, BorrowedFd<'_>)> {
        match self {
            Part::Runner => sockets.for_runner(),
            Part::Balancer => sockets.for_balancer(),
            Part::Lease => sockets.for_lease(),
            Part::Agent => sockets.for_agent(),
        }
    }

    /// Everything that starting it takes.
    pub fn program<'a>(
        self,
        layout: &Layout,
        users: Users,
        binaries: &Path,
        sockets: &'a Sockets,
    ) -> Program<'a> {
        Program {
            name: self.name(),
            file: binaries.join(self.name()),
            arguments: self.arguments(layout, users),
            user: self.user(users),
            sockets: self.sockets(sockets),
            notify: None,
        }
    }
}

/// The orderly end of everything on the node, once no part runs.
pub fn teardown<'a>(layout: &Layout, binaries: &Path) -> Program<'a> {
    let config = layout.path("etc/runner.toml").to_string_lossy().into_owned();
    Program {
        name: Part::Runner.name(),
        file: binaries.join(Part::Runner.name()),
        arguments: vec!["teardown".into(), "--config".into(), config],
        user: None,
        sockets: Vec::new(),
        notify: None,
    }
}

/// A program about to be started.
#[derive(Debug)]
pub struct Program<'a> {
    pub name: &'static str,
    pub file: PathBuf,
    pub arguments: Vec<String>,
    /// None: root. Else this user and the group of the same number, with [`VIEW`] as its view of the state folder.
    pub user: Option<u32>,
    /// Handed over by the protocol of [`epagent::activation`].
    pub sockets: Vec<(&'a str, BorrowedFd<'a>)>,
    /// `NOTIFY_SOCKET`: where it says how it goes.
    pub notify: Option<PathBuf>,
}

impl Program<'_> {
    pub fn argv(&self) -> Vec<CString> {
        let words = std::iter::once(self.name).chain(self.arguments.iter().map(String::as_str));
        words.map(c_string).collect()
    }

    /// The whole environment: nothing of the caller's but how much to log.
    pub fn environment(&self, pid: u32, caller: impl Fn(&str) -> Option<String>) -> Vec<CString> {
        let mut variables = vec![format!("PATH={}", super::checks::PATH), "LANG=C.UTF-8".to_owned()];
        for name in ["EPAGENT_LOG", "RUST_BACKTRACE"] {
            variables.extend(caller(name).map(|value| format!("{name}={value}")));
        }
        variables.extend(self.notify.iter().map(|path| format!("NOTIFY_SOCKET={}", path.display())));
        if !self.sockets.is_empty() {
            let names: Vec<&str> = self.sockets.iter().map(|(name, _)| *name).collect();
            variables.push(format!("LISTEN_PID={pid}"));
            variables.push(format!("LISTEN_FDS={}", names.len()));
            variables.push(format!("LISTEN_FDNAMES={}", names.join(":")));
        }
        variables.iter().map(|variable| c_string(variable)).collect()
    }
}

/// Arguments are ours and a path that exists, and neither holds a NUL; an environment variable can't.
fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn sockets_are_announced_by_name() {
        let stdin = std::io::stdin();
        let program = Program {
            name: "x",
            file: "/x".into(),
            arguments: vec!["--a".into()],
            user: None,
            sockets: vec![("http", stdin.as_fd()), ("control", stdin.as_fd())],
            notify: Some("/mnt/x".into()),
        };
        let caller = |name: &str| (name == "EPAGENT_LOG").then(|| "debug".to_owned());
        let environment: Vec<String> =
            program.environment(7, caller).into_iter().map(|text| text.into_string().unwrap()).collect();
        for expected in [
            "LISTEN_PID=7",
            "LISTEN_FDS=2",
            "LISTEN_FDNAMES=http:control",
            "EPAGENT_LOG=debug",
            "NOTIFY_SOCKET=/mnt/x",
        ] {
            assert!(environment.iter().any(|variable| variable == expected), "{expected}");
        }
        assert_eq!(program.argv().len(), 2);
    }
}

//! Programs run to their end, with a deadline and all they printed.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest time a command of a test may take unless it says otherwise: a deploy with a build from a registry.
pub const DEADLINE: Duration = Duration::from_secs(240);

/// A command that ended.
#[derive(Debug, Clone)]
pub struct Ran {
    pub line: String,
    /// None when a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

/// A command that runs, its output being collected.
pub struct Running {
    line: String,
    child: Child,
    stdout: JoinHandle<String>,
    stderr: JoinHandle<String>,
    since: Instant,
}

/// Starts `command` with its output collected. Its standard input is empty unless it was set to be piped.
pub fn start(command: &mut Command) -> Running {
    let line = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ");
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("starting {line}: {error}"));
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    Running { line, child, stdout, stderr, since: Instant::now() }
}

/// Runs `command` to its end.
#[track_caller]
pub fn run(command: &mut Command) -> Ran {
    command.stdin(Stdio::null());
    start(command).wait(DEADLINE)
}

/// Runs `command` with `input` on its standard input.
#[track_caller]
pub fn run_with_input(command: &mut Command, input: &[u8]) -> Ran {
    command.stdin(Stdio::piped());
    let mut running = start(command);
    if let Some(mut stdin) = running.child.stdin.take() {
        // A command that refuses its input closes the pipe; what it says about that is what the test looks at.
        let _ = std::io::Write::write_all(&mut stdin, input);
    }
    running.wait(DEADLINE)
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

impl Running {
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits for the end; past `deadline` the command is killed and the test fails with what it had printed.
    #[track_caller]
    pub fn wait(mut self, deadline: Duration) -> Ran {
        let left = deadline.saturating_sub(self.since.elapsed());
        let ended = crate::poll::until(left, || self.child.try_wait().ok().flatten());
        let status = match ended {
            Some(status) => status,
            None => {
                let _ = self.child.kill();
                let _ = self.child.wait();
                let (line, stderr) = (self.line, self.stderr.join().unwrap_or_default());
                panic!("{line}: still running after {deadline:?}; it printed:\n{stderr}");
            }
        };
        Ran {
            line: self.line,
            code: status.code(),
            stdout: self.stdout.join().unwrap_or_default(),
            stderr: self.stderr.join().unwrap_or_default(),
            took: self.since.elapsed(),
        }
    }
}

impl Ran {
    /// What it printed on standard output; the test fails if it did not end with 0.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.code == Some(0), "{self}");
        self.stdout
    }

    /// The test fails unless it ended with `code` and said each of `words`, in any case, on standard error.
    #[track_caller]
    pub fn fails(self, code: i32, words: &[&str]) -> String {
        assert!(self.code == Some(code), "expected exit code {code}\n{self}");
        self.says(words)
    }

    #[track_caller]
    pub fn says(self, words: &[&str]) -> String {
        let said = self.stderr.to_lowercase();
        for word in words {
            assert!(said.contains(&word.to_lowercase()), "{word:?} is not said\n{self}");
        }
        assert!(!said.contains("panicked at"), "a panic is no error message\n{self}");
        self.stderr
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { line, code, stdout, stderr, took } = self;
        write!(f, "$ {line}\nended with {code:?} after {took:?}\n--- stdout\n{stdout}\n--- stderr\n{stderr}")
    }
}

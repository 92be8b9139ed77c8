//! The harness's half of the conversation with a guest: requests over the virtio-serial port, several at a time.
//!
//! The other half, and the messages, are in `tests/vm/agent.py`. The agent greets once per boot, which is how a
//! reboot or a power cut is seen to be over; a saved machine that goes on elsewhere does not greet again.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::poll::until;

/// A guest that can be asked to do something.
pub struct Guest {
    port: Mutex<UnixStream>,
    shared: Arc<Shared>,
    next: AtomicU64,
    /// What the guest's kernel says.
    console: PathBuf,
}

/// How often it is looked at whether the guest's kernel still lives.
const LOOK: Duration = Duration::from_secs(5);
/// Its last words. Emulated kernels die now and then while they patch themselves (qemu 7.2).
const LAST_WORDS: &str = "Kernel panic - not syncing";

/// What the reading thread and the askers share.
#[derive(Default)]
struct Shared {
    waiting: Mutex<HashMap<u64, Sender<Value>>>,
    /// One per boot that was seen, the newest last.
    greetings: Mutex<Vec<String>>,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Silence {
    /// Within this time.
    Late(Duration),
    /// The machine is gone, or was reset in the meantime.
    Gone,
    /// Its kernel is dead.
    Dead,
    /// The agent could not do it, and says why.
    Refused(String),
}

impl std::fmt::Display for Silence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Late(time) => write!(f, "the guest did not answer within {time:?}"),
            Self::Gone => write!(f, "the guest is gone"),
            Self::Dead => write!(f, "the guest's kernel has panicked"),
            Self::Refused(why) => write!(f, "the guest's agent could not: {why}"),
        }
    }
}

impl Guest {
    /// Connects to the port's socket, which qemu has bound by the time its control socket answers.
    pub fn connect(socket: &Path, console: PathBuf) -> std::io::Result<Self> {
        let port = UnixStream::connect(socket)?;
        let reading = BufReader::new(port.try_clone()?);
        let shared = Arc::new(Shared::default());
        let known = shared.clone();
        // Ends with the connection, so with the machine.
        std::thread::spawn(move || known.read(reading));
        Ok(Self { port: Mutex::new(port), shared, next: AtomicU64::new(1), console })
    }

    /// Asks and waits for the answer.
    pub fn ask(&self, mut request: Value, deadline: Duration) -> Result<Value, Silence> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        request["id"] = id.into();
        let (sender, answer) = channel();
        lock(&self.shared.waiting).insert(id, sender);
        let sent = self.send(&request);
        let got = if sent { self.wait(&answer, deadline) } else { Err(Silence::Gone) };
        lock(&self.shared.waiting).remove(&id);
        got
    }

    fn wait(&self, answer: &Receiver<Value>, deadline: Duration) -> Result<Value, Silence> {
        let end = Instant::now() + deadline;
        loop {
            match answer.recv_timeout(LOOK.min(end.saturating_duration_since(Instant::now()))) {
                Ok(message) => {
                    return match message["error"].as_str() {
                        Some(why) => Err(Silence::Refused(why.to_owned())),
                        None => Ok(message),
                    };
                }
                Err(RecvTimeoutError::Disconnected) => return Err(Silence::Gone),
                Err(RecvTimeoutError::Timeout) if self.is_dead() => return Err(Silence::Dead),
                Err(RecvTimeoutError::Timeout) if Instant::now() >= end => {
                    return Err(Silence::Late(deadline));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn is_dead(&self) -> bool {
        std::fs::read(&self.console).is_ok_and(|said| String::from_utf8_lossy(&said).contains(LAST_WORDS))
    }

    /// Sends a request whose answer nobody waits for: the machine goes down over it.
    pub fn tell(&self, mut request: Value) {
        request["id"] = 0.into();
        self.send(&request);
    }

    fn send(&self, request: &Value) -> bool {
        let mut line = request.to_string().into_bytes();
        line.push(b'\n');
        lock(&self.port).write_all(&line).is_ok()
    }

    /// How many boots have greeted.
    pub fn boots(&self) -> usize {
        lock(&self.shared.greetings).len()
    }

    /// Waits until more than `seen` boots have greeted. What was asked of an earlier boot has no answer any more.
    pub fn wait_boot(&self, seen: usize, deadline: Duration) -> bool {
        until(deadline, || (self.boots() > seen).then_some(())).is_some()
    }

    /// Forgets every question: the boot that they were put to is over.
    pub fn forget(&self) {
        lock(&self.shared.waiting).clear();
    }
}

impl Shared {
    fn read(&self, port: BufReader<UnixStream>) {
        for line in port.split(b'\n') {
            let Ok(line) = line else { break };
            // The end of a line whose beginning was cut by a reset is not JSON, and nobody waits for it.
            let Ok(message) = serde_json::from_slice::<Value>(&line) else { continue };
            if let Some(boot) = message["hello"].as_str() {
                lock(&self.greetings).push(boot.to_owned());
            } else if let Some(asker) = message["id"].as_u64().and_then(|id| lock(&self.waiting).remove(&id))
            {
                let _ = asker.send(message);
            }
        }
        lock(&self.waiting).clear();
    }
}

/// A panic of one test thread leaves these maps whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! Health checks of running instances, one task each.
//!
//! A task knows its instance's address and check and nothing else. It probes quickly until the instance has proven
//! itself, so that a deploy waits for the app and not for us, and at the manifest's interval afterwards.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use epagent_core::health::{Health, Tracker};
use epagent_core::name::{AppName, JailId};
use epagent_core::spec::{Check, HealthSpec};
use epagent_wire::runner::{Event, Reply, Request};
use epagent_wire::table::SOCKET_PREFIX;
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{broadcast, mpsc};
use tokio::task::AbortHandle;

use crate::runner::Runner;

/// The pace until an instance is first healthy: a quick one at first, since somebody may be waiting for its start.
const PROVING_QUICK: Duration = Duration::from_millis(5);
const PROVING_QUICK_FOR: Duration = Duration::from_secs(2);
const PROVING_INTERVAL: Duration = Duration::from_millis(100);
/// How long an instance without a check must run to count as healthy.
const RUNNING_PROVES_AFTER: Duration = Duration::from_secs(1);

/// What a check has found out.
#[derive(Debug, Clone)]
pub struct Finding {
    pub health: Health,
    pub last_error: Option<String>,
}

/// All checks that run.
#[derive(Clone)]
pub struct Checks {
    runner: Runner,
    probes: Arc<Mutex<HashMap<JailId, Probe>>>,
    /// Told of each app of which an instance's health changed.
    changed: mpsc::Sender<AppName>,
}

struct Probe {
    finding: Arc<Mutex<Finding>>,
    task: AbortHandle,
}

/// A stream to an app, TCP or unix.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}
type Connection = Box<dyn Stream>;

/// One instance to be checked.
pub struct Subject {
    pub id: JailId,
    /// As the balancer's table says it: `100.96.0.1:8000`, `unix:JAIL/app.sock`.
    pub address: String,
    /// The name a request of a user would have; apps refuse names they don't know.
    pub host: String,
    pub spec: HealthSpec,
    /// It was healthy when the agent last knew.
    pub proven: bool,
}

impl Checks {
    pub fn new(runner: Runner, changed: mpsc::Sender<AppName>) -> Self {
        Self { runner, probes: Arc::default(), changed }
    }

    /// Checks exactly these instances of the app from now on.
    pub fn keep(&self, app: &AppName, subjects: Vec<Subject>) {
        let mut probes = self.probes.lock().unwrap_or_else(PoisonError::into_inner);
        let stays = |id: &JailId| subjects.iter().any(|subject| subject.id == *id);
        probes.retain(|id, probe| {
            let keep = stays(id) || id.app().as_ref() != Some(app);
            if !keep {
                probe.task.abort();
            }
            keep
        });
        for subject in subjects {
            if !probes.contains_key(&subject.id) {
                probes.insert(subject.id.clone(), self.start(app.clone(), subject));
            }
        }
    }

    pub fn finding(&self, id: &JailId) -> Option<Finding> {
        let probes = self.probes.lock().unwrap_or_else(PoisonError::into_inner);
        let finding = &probes.get(id)?.finding;
        Some(finding.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    fn start(&self, app: AppName, subject: Subject) -> Probe {
        let mut tracker = if subject.proven { Tracker::proven() } else { Tracker::default() };
        let finding = Arc::new(Mutex::new(Finding { health: tracker.health(), last_error: None }));
        let (checks, shared) = (self.clone(), finding.clone());
        let task = tokio::spawn(async move {
            let spec = &subject.spec;
            let begun = Instant::now();
            loop {
                let result = checks.check(&subject).await;
                let before = tracker.health();
                let health = tracker.record(result.is_ok(), spec.rise, spec.fall);
                *shared.lock().unwrap_or_else(PoisonError::into_inner) =
                    Finding { health, last_error: result.err() };
                if health != before && checks.changed.send(app.clone()).await.is_err() {
                    return;
                }
                let pace = match health {
                    // A command in the instance costs it something each time.
                    Health::Unproven if begun.elapsed() < PROVING_QUICK_FOR && !spec.check.is_command() => {
                        PROVING_QUICK
                    }
                    Health::Unproven => PROVING_INTERVAL,
                    _ => Duration::from_millis(spec.interval_ms),
                };
                tokio::time::sleep(pace).await;
            }
        });
        Probe { finding, task: task.abort_handle() }
    }

    async fn check(&self, subject: &Subject) -> Result<(), String> {
        let timeout = Duration::from_millis(subject.spec.timeout_ms);
        let result = match &subject.spec.check {
            Check::Running => {
                tokio::time::sleep(RUNNING_PROVES_AFTER).await;
                return Ok(());
            }
            Check::Tcp => tokio::time::timeout(timeout, self.connect(subject)).await.map(|r| r.map(drop)),
            Check::Http(path) => {
                let asked = async { get(self.connect(subject).await?, subject, path).await };
                tokio::time::timeout(timeout, asked).await
            }
            Check::Exec(command) => return self.exec(&subject.id, command, timeout).await,
        };
        result.unwrap_or_else(|_| Err(format!("no answer in {} ms", timeout.as_millis())))
    }

    /// A connection to where the app takes requests. To a unix socket it is the runner who connects: what lies in that
    /// folder is the tenant's, and this process has no business there.
    async fn connect(&self, subject: &Subject) -> Result<Connection, String> {
        let address = &subject.address;
        if !address.starts_with(SOCKET_PREFIX) {
            let stream = TcpStream::connect(address).await;
            let stream = stream.map_err(|error| format!("connecting to {address}: {error}"))?;
            return Ok(Box::new(stream));
        }
        let answer =
            self.runner.call_with(Request::SocketOpen { jail: subject.id.clone() }, Vec::new()).await;
        let answer = answer.map_err(|error| error.to_string())?;
        let (Reply::Socket, Some(socket)) = (answer.reply, answer.fds.into_iter().next()) else {
            return Err("the runner gave no connection".to_owned());
        };
        let stream = UnixStream::from_std(socket.into()).map_err(|error| error.to_string())?;
        Ok(Box::new(stream))
    }

    /// Runs the command in the instance and waits for its end; one that takes too long is ended.
    async fn exec(&self, id: &JailId, command: &str, timeout: Duration) -> Result<(), String> {
        let mut events = self.runner.events();
        let null = || -> Result<OwnedFd, String> {
            let opened = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null");
            Ok(opened.map_err(|error| error.to_string())?.into())
        };
        let request = Request::Exec {
            jail: id.clone(),
            argv: vec!["/bin/sh".to_owned(), "-c".to_owned(), command.to_owned()],
            env: BTreeMap::new(),
            terminal: None,
        };
        let answer = self.runner.call_with(request, vec![null()?, null()?, null()?]).await;
        let Reply::Exec { exec: number } = answer.map_err(|error| error.to_string())?.reply else {
            return Err("the runner did not start it".to_owned());
        };
        let running = Running { runner: self.runner.clone(), jail: id.clone(), exec: number, ended: false };
        tokio::time::timeout(timeout, running.wait(&mut events))
            .await
            .unwrap_or_else(|_| Err(format!("`{command}` did not end in {} ms", timeout.as_millis())))
    }
}

/// A check's command in an instance. Dropped before its end, by a deadline or because the instance is not checked any
/// more, it is killed: what is left running would use up the instance.
struct Running {
    runner: Runner,
    jail: JailId,
    exec: u32,
    ended: bool,
}

impl Running {
    async fn wait(mut self, events: &mut broadcast::Receiver<Event>) -> Result<(), String> {
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Ok(Event::ExecExited { jail, exec, exit }) if jail == self.jail && exec == self.exec => {
                        self.ended = true;
                        return if exit.success() { Ok(()) } else { Err(exit.to_string()) };
                    }
                    Ok(_) => {}
                    Err(error) => return Err(error.to_string()),
                },
                () = self.runner.lost() => return Err("the runner was restarted meanwhile".to_owned()),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let (runner, jail, exec) = (self.runner.clone(), self.jail.clone(), self.exec);
        tokio::spawn(async move {
            let _ = runner.call(Request::ExecKill { jail, exec }).await;
        });
    }
}

/// `GET path`; any answer of 200 to 399 will do. The body is not read.
async fn get(stream: Connection, subject: &Subject, path: &str) -> Result<(), String> {
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| error.to_string())?;
    let driver = tokio::spawn(connection);
    let request = hyper::Request::get(path)
        .header("host", &subject.host)
        .header("user-agent", "epagent-health")
        .header("connection", "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let answer = sender.send_request(request).await;
    driver.abort();
    let status = answer.map_err(|error| format!("GET {path}: {error}"))?.status();
    if status.is_success() || status.is_redirection() {
        Ok(())
    } else {
        Err(format!("GET {path} answered {}", status.as_u16()))
    }
}

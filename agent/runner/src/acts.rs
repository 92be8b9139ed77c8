//! Carrying plans out: what follows from a [`Plan`], and what follows when a child has done its part.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use epagent_isolation::id::JailPath;
use epagent_isolation::inspect;
use epagent_isolation::monitor::client::START_TIMEOUT;
use epagent_isolation::monitor::protocol::{ExecCall, TtySize};
use epagent_wire::name::JailId;
use epagent_wire::runner::{Exit, Inspection, PROTOCOL, Refusal, RefusalCode, Reply, TerminalSize};
use nix::libc::{SIGHUP, SIGKILL};

use crate::effects;
use crate::launch::launch_order;
use crate::order::{APP_DIR, Order, add_ca_bundle};
use crate::peers::To;
use crate::requests::Plan;
use crate::requests::keys::Keys;
use crate::server::{Server, Then};
use crate::tables::{Jail, Phase, address};
use crate::work::{Discard, Outcome, Work, chain, instance_id, isolation_id};

/// How long a command that was hung up has to end by itself.
const HANG_UP_GRACE: Duration = Duration::from_secs(2);
/// Commands that are being ended.
const HUNG_UP_MAX: usize = 256;

fn system(message: String) -> Refusal {
    Refusal { code: RefusalCode::System, message }
}

impl Server {
    pub fn carry_out(&mut self, plan: Plan, to: To, descriptors: Vec<OwnedFd>, keys: Keys) {
        let reply = match plan {
            Plan::Hello => Ok(self.hello(to)),
            Plan::Observe => return self.observe(to),
            Plan::Nothing => Ok(Reply::Done),
            Plan::AlreadyStarted(jail) => Ok(self.started(jail)),
            Plan::Work(work) => return self.begin_work(work, to, keys),
            Plan::Launch { work, order } => return self.begin_launch(work, order, to, descriptors, keys),
            Plan::Stop { jail, signal, grace_ms } => self.stop(&jail, signal, grace_ms),
            Plan::Exec { jail, argv, env, terminal } => {
                let call = ExecCall { argv, cwd: app_dir(), env, user: None, tty: terminal.map(tty_size) };
                return self.exec(to, &jail, call, &descriptors);
            }
            Plan::ExecResize { jail, exec, size } => self.exec_resize(&jail, exec, size),
            Plan::ExecKill { jail, exec } => self.exec_kill(jail, exec),
            Plan::Inspect { jail, pid } => self.inspect(&jail, pid),
            Plan::Said { run, after } => Ok(Reply::Said(self.recent.after(run, after))),
            Plan::LogOpen(jail) => return self.log_open(to, &jail),
            Plan::SocketOpen(jail) => return self.socket_open(to, &jail),
        };
        self.answer(to, reply);
    }

    fn hello(&mut self, to: To) -> Reply {
        if let Some(peer) = self.peers.get(to.peer) {
            peer.greeted = true;
        }
        Reply::Hello {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.config.node,
        }
    }

    fn started(&self, jail: JailId) -> Reply {
        let address = self.tables.jails.get(&jail).and_then(|known| address(&self.config, &known.record));
        Reply::Started { jail, address }
    }

    fn begin_work(&mut self, work: Work, to: To, keys: Keys) {
        let leaving: Vec<JailId> = match &work {
            Work::Discard(what) => vec![what.jail.clone()],
            Work::AppRemove(removal) => removal.jails.clone(),
            _ => Vec::new(),
        };
        for jail in leaving {
            self.release_monitor(&jail);
        }
        self.work(work, keys, Then::Answer(to));
    }

    fn begin_launch(&mut self, work: Work, order: Box<Order>, to: To, descriptors: Vec<OwnedFd>, keys: Keys) {
        effects::begun(&mut self.tables, &work, &order);
        self.work(work, keys, Then::Launch { to, order, descriptors });
    }

    /// A child is done with its part.
    pub fn worked(&mut self, work: Work, then: Then, keys: Keys, result: Result<Outcome, Refusal>) {
        match &result {
            Ok(outcome) => effects::done(&mut self.tables, &work, outcome),
            Err(refusal) => effects::failed(&mut self.tables, &work, refusal, crate::now_ms()),
        }
        if let Work::Reap(record) = &work {
            self.reaping.remove(&record.jail);
        }
        self.tell_ends(&work);
        if let Work::Survey = work {
            return self.surveyed(result);
        }
        if let Work::KeepNetwork(_) = work {
            return self.kept_network(result);
        }
        match (then, result) {
            (Then::Answer(to), result) => self.answer(to, result.map(|_| Reply::Done)),
            (Then::Refuse { to, refusal }, _) => self.answer(to, Err(refusal)),
            (Then::Launch { to, order, descriptors }, Ok(outcome)) => {
                self.launch(to, order, &descriptors, outcome, &work, keys);
            }
            (Then::Launch { to, order, .. }, Err(refusal)) => self.undo(to, &order, &work, refusal, keys),
            (Then::Nothing, Ok(_)) => {}
            (Then::Nothing, Err(refusal)) => tracing::warn!("{}", refusal.message),
        }
    }

    /// It is tried every few seconds: what fails is told when it begins to.
    fn kept_network(&mut self, result: Result<Outcome, Refusal>) {
        let mended = match result {
            Ok(Outcome::Network(mended)) => mended,
            Ok(_) => return,
            Err(refusal) => {
                if self.network_fault.as_ref() != Some(&refusal.message) {
                    tracing::warn!("look after the network: {}", refusal.message);
                }
                self.network_fault = Some(refusal.message);
                return;
            }
        };
        if self.network_fault.take().is_some() {
            tracing::info!("the network can be looked after again");
        }
        if mended.filter {
            tracing::warn!(
                "the packet filter, table inet epagent_{}, was gone and is back; meanwhile no instance was fenced off. \
                 `nft flush ruleset`, and nftables.service at its restart, take it away",
                self.config.node
            );
        }
        for name in &mended.settings {
            tracing::info!("set /proc/sys/net/{name}, for the instances' way out");
        }
    }

    /// The disk is ready: starts the monitor.
    fn launch(
        &mut self,
        to: To,
        mut order: Box<Order>,
        given: &[OwnedFd],
        outcome: Outcome,
        work: &Work,
        keys: Keys,
    ) {
        let id = order.jail.jail.clone();
        if order.takes_ca_bundle {
            let over = matches!(outcome, Outcome::Tree { has_ca_bundle: true });
            add_ca_bundle(&mut order, &self.config, over);
        }
        let launched = launch_order(&order, given, &self.ground()).map_err(|error| chain(&error));
        let connected = launched.and_then(|launched| {
            self.adopt(launched);
            self.connect(&id, START_TIMEOUT).map_err(|error| chain(&error))
        });
        match connected {
            Ok(()) => self.answer(to, Ok(self.started(id))),
            Err(why) => self.undo(to, &order, work, system(format!("start jail {id}: {why}")), keys),
        }
    }

    /// Removes what was made for a jail that then could not be started; the refusal goes out after that.
    fn undo(&mut self, to: To, order: &Order, work: &Work, refusal: Refusal, keys: Keys) {
        let release = match work {
            Work::ReleaseStage { release, .. } => Some(release.clone()),
            _ => None,
        };
        self.release_monitor(&order.jail.jail);
        let undo = Work::Discard(Discard { release, ..Discard::of(&order.jail) });
        self.work(undo, keys, Then::Refuse { to, refusal });
    }

    // What a monitor answers.

    fn stop(&mut self, jail: &JailId, signal: i32, grace_ms: u64) -> Result<Reply, Refusal> {
        let stopped = self.with_monitor(jail, |client| client.stop(signal, grace_ms));
        self.take_events(jail);
        stopped.map(|()| Reply::Done)
    }

    fn exec(&mut self, to: To, jail: &JailId, call: ExecCall, given: &[OwnedFd]) {
        let stdio: Vec<_> = given.iter().map(|descriptor| descriptor.as_fd()).collect();
        match self.with_monitor(jail, |client| client.exec(call, &stdio)) {
            Err(refusal) => self.answer(to, Err(refusal)),
            Ok(session) => {
                if let Some(known) = self.tables.jails.get_mut(jail) {
                    known.execs.insert(session.session);
                }
                self.answer_with(to, Ok(Reply::Exec { exec: session.session }), session.master);
            }
        }
        // What arrived while the answer was awaited is not announced by the socket any more.
        self.take_events(jail);
    }

    fn exec_resize(&mut self, jail: &JailId, exec: u32, size: TerminalSize) -> Result<Reply, Refusal> {
        let resized = self.with_monitor(jail, |client| client.exec_resize(exec, tty_size(size)));
        self.take_events(jail);
        resized.map(|()| Reply::Done)
    }

    /// As a terminal's closing would; and for good when that was not enough.
    fn exec_kill(&mut self, jail: JailId, exec: u32) -> Result<Reply, Refusal> {
        let hung_up = self.with_monitor(&jail, |client| client.exec_signal(exec, SIGHUP));
        self.take_events(&jail);
        hung_up?;
        if self.hung_up.len() < HUNG_UP_MAX {
            self.hung_up.push_back((Instant::now() + HANG_UP_GRACE, jail, exec));
        }
        Ok(Reply::Done)
    }

    pub fn kill_hung_up(&mut self, now: Instant) {
        while let Some((_, jail, exec)) = self.hung_up.pop_front_if(|(at, ..)| *at <= now) {
            let alive = self.tables.jails.get(&jail).is_some_and(|known| known.execs.contains(&exec));
            if alive {
                // It may have ended this moment; then the monitor knows no such command.
                let _ = self.with_monitor(&jail, |client| client.exec_signal(exec, SIGKILL));
                self.take_events(&jail);
            }
        }
    }

    // What is looked up.

    fn inspect(&mut self, jail: &JailId, pid: i32) -> Result<Reply, Refusal> {
        let failed = |error: String| system(format!("inspect jail {jail}: {error}"));
        let listening = inspect::listening(pid).map_err(|error| failed(error.chain()))?;
        let id = isolation_id(jail).map_err(|error| failed(chain(&error)))?;
        let usage = self.cgroups.usage(&id).map_err(|error| failed(error.chain()))?;
        Ok(Reply::Inspect(Inspection {
            listening: listening.iter().map(|address| address.to_string()).collect(),
            memory_bytes: usage.memory_bytes.unwrap_or(0),
            cpu_usec: usage.cpu_us.unwrap_or(0),
            pids: usage.pids.unwrap_or(0),
        }))
    }

    fn log_open(&mut self, to: To, jail: &JailId) {
        let folder = instance_id(jail).and_then(|id| self.pool.log_dir_open(&id));
        match folder {
            Ok(folder) => self.answer_with(to, Ok(Reply::Log), Some(folder)),
            Err(error) => {
                self.answer(to, Err(system(format!("open the log of jail {jail}: {}", chain(&error)))))
            }
        }
    }

    /// Neither the name nor what it leads to is the caller's to choose.
    fn socket_open(&mut self, to: To, jail: &JailId) {
        match self.app_sockets.connect(jail) {
            Ok(socket) => self.answer_with(to, Ok(Reply::Socket), Some(socket)),
            Err(error) => {
                let message = format!("connect to the socket of jail {jail}: {}", chain(&error));
                self.answer(to, Err(Refusal { code: RefusalCode::Conflict, message }));
            }
        }
    }

    /// Tells those ends that were only known once a child had done its part.
    fn tell_ends(&mut self, work: &Work) {
        let jail = match work {
            Work::Reap(record) => &record.jail,
            Work::ImageConclude { job, .. } => &job.jail,
            _ => return,
        };
        if let Some(Jail { phase: Phase::Exited { exit, .. }, .. }) = self.tables.jails.get(jail) {
            let (jail, exit): (JailId, Exit) = (jail.clone(), exit.clone());
            self.tell(&epagent_wire::runner::Event::Exited { jail, exit });
        }
    }
}

fn tty_size(size: TerminalSize) -> TtySize {
    TtySize { rows: size.rows, columns: size.columns }
}

fn app_dir() -> JailPath {
    #[expect(clippy::expect_used, reason = "a literal")]
    JailPath::new(APP_DIR).expect("an absolute path")
}

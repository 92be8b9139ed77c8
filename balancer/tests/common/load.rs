//! Clients that ask without pause, in threads of their own, until told to stop; each failure is kept.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::client::{Client, Response};
use super::until;

/// Running clients.
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    over: AtomicBool,
    answered: AtomicU64,
    failures: Mutex<Vec<String>>,
}

impl Load {
    /// `keeping` clients that keep their connection for as long as they are let, and `fresh` ones with a new
    /// connection for each request. An answer is right when `judge` says so.
    pub fn start(
        http: SocketAddr,
        (keeping, fresh): (usize, usize),
        judge: impl Fn(&Response) -> bool + Clone + Send + 'static,
    ) -> Self {
        let shared = Arc::<Shared>::default();
        let thread = |keeps: bool| {
            let (shared, judge) = (shared.clone(), judge.clone());
            std::thread::spawn(move || shared.ask_on(http, keeps, judge))
        };
        let threads = (0..keeping + fresh).map(|n| thread(n < keeping)).collect();
        Self { shared, threads }
    }

    pub fn answered(&self) -> u64 {
        self.shared.answered.load(Ordering::Relaxed)
    }

    /// Waits for so many more answers.
    pub fn wait_for(&self, more: u64) {
        let goal = self.answered() + more;
        until("clients are answered", || self.answered() >= goal || self.has_failures());
    }

    pub fn has_failures(&self) -> bool {
        !self.shared.failures.lock().expect("no client panicked").is_empty()
    }

    /// Stops it; what failed, and how many were answered.
    pub fn finish(self) -> (Vec<String>, u64) {
        self.shared.over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("no client panicked");
        }
        let failures = std::mem::take(&mut *self.shared.failures.lock().expect("no client panicked"));
        (failures, self.shared.answered.load(Ordering::Relaxed))
    }
}

impl Shared {
    fn ask_on(&self, http: SocketAddr, keeps: bool, judge: impl Fn(&Response) -> bool) {
        let mut kept: Option<Client> = None;
        while !self.over.load(Ordering::Relaxed) {
            match Self::ask(http, kept.take()) {
                Ok((response, client)) if judge(&response) => {
                    self.answered.fetch_add(1, Ordering::Relaxed);
                    let closes = response.field("connection") == Some("close");
                    kept = client.filter(|_| keeps && !closes);
                }
                Ok((response, _)) => self.fail(format!("{} {:?}", response.status, response.text())),
                Err(error) => self.fail(error.to_string()),
            }
        }
    }

    fn ask(http: SocketAddr, kept: Option<Client>) -> std::io::Result<(Response, Option<Client>)> {
        let mut client = match kept {
            Some(client) => client,
            None => Client::try_connect(http)?,
        };
        let response = client.try_get("shop.example", "/")?;
        Ok((response, Some(client)))
    }

    fn fail(&self, what: String) {
        let mut failures = self.failures.lock().expect("no client panicked");
        if failures.len() < 100 {
            failures.push(what);
        }
    }
}

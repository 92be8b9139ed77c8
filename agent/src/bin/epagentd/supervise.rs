//! The named loops of the agent, and what happens when one fails.
//!
//! ```text
//!  running ── error or panic ──▶ recorded in the error table ── backoff ──▶ running
//!                                        └── an essential loop, FAILURES_MAX times in FAILURES_WINDOW ──▶ the process ends
//! ```
//!
//! The process that ends is started again by its own supervisor and finds everything as it was, since nothing
//! that runs or serves depends on it.

use std::backtrace::Backtrace;
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::panic::PanicHookInfo;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use epagent_store::Store;

use crate::clock;
use crate::world::Worlds;

const FAILURES_MAX: usize = 10;
const FAILURES_WINDOW: Duration = Duration::from_secs(60);
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// What each loop is doing, for the status page: `ok` or its last failure.
#[derive(Clone, Default)]
pub struct Board(Arc<Mutex<BTreeMap<String, String>>>);

impl Board {
    pub fn set(&self, name: &str, state: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), state);
    }

    pub fn snapshot(&self) -> BTreeMap<String, String> {
        let board = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        board.clone()
    }
}

/// The backtrace of the last panic, kept by the hook for the supervisor of the loop that panicked.
static LAST_PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Keeps the backtrace of every panic; the message goes to the log as well.
pub fn keep_backtraces() {
    std::panic::set_hook(Box::new(|info: &PanicHookInfo<'_>| {
        let text = format!("{info}\n{}", Backtrace::force_capture());
        tracing::error!("{text}");
        *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
    }));
}

/// The backtrace of the panic that was last caught, once.
pub fn last_panic() -> Option<String> {
    LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Runs `body` for ever: when it fails or panics, the failure is recorded and it is run again.
pub async fn keep_running<F, E>(name: &str, store: Store, board: Board, mut body: impl FnMut() -> F)
where
    F: Future<Output = Result<(), E>> + Send + 'static,
    E: std::error::Error + 'static,
{
    let mut failures: VecDeque<Instant> = VecDeque::new();
    let mut backoff = BACKOFF_FIRST;
    loop {
        board.set(name, "ok".to_owned());
        let started = Instant::now();
        let ended = tokio::spawn({
            let running = body();
            async move { running.await.map_err(|error| chain(&error)) }
        })
        .await;
        let (message, backtrace) = match ended {
            Ok(Ok(())) => ("ended without being asked to".to_owned(), None),
            Ok(Err(message)) => (message, None),
            Err(error) if error.is_cancelled() => return,
            Err(_) => ("panicked".to_owned(), last_panic()),
        };
        tracing::error!(task = name, reason = message, "a loop failed and is started again");
        board.set(name, message.clone());
        let recorded =
            store.error_record("loop_failed", name, &message, backtrace.as_deref(), clock::now_ms());
        if let Err(error) = recorded.await {
            tracing::error!(error = chain(&error), "the failure could not be recorded");
        }
        failures.push_back(Instant::now());
        failures.retain(|at| at.elapsed() < FAILURES_WINDOW);
        if failures.len() >= FAILURES_MAX {
            tracing::error!(task = name, "failed {FAILURES_MAX} times in {FAILURES_WINDOW:?}: giving up");
            std::process::exit(1);
        }
        backoff =
            if started.elapsed() > FAILURES_WINDOW { BACKOFF_FIRST } else { (backoff * 2).min(BACKOFF_MAX) };
        tokio::time::sleep(backoff).await;
    }
}

/// Tells the service manager that the agent works, for as long as it does: only after the loop that looks at the
/// world has turned and the store has answered. What they say does not matter here; that they hang does.
pub async fn show_alive(store: Store, worlds: Worlds, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        let _ = worlds.fresh().await;
        let _ = store.apps().await;
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
    }
}

/// An error with all its sources on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

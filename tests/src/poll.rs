//! Waiting with a deadline.

use std::time::{Duration, Instant};

/// How often a condition is looked at. Short, so that a test measures the agent and not its own sleep.
const PAUSE: Duration = Duration::from_millis(5);

/// How many times longer everything takes than on the machines the deadlines are meant for: what an emulated one sets.
fn slowness() -> u32 {
    u32::try_from(setting("EPAGENT_TEST_SLOWNESS", 1)).unwrap_or(1)
}

/// Waits until `look` finds something and returns it; none when `deadline` passes first.
pub fn until<T>(deadline: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline * slowness();
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(PAUSE);
    }
}

/// Waits until `look` finds something; panics, naming `what`, when `deadline` passes first.
#[track_caller]
pub fn eventually<T>(what: &str, deadline: Duration, look: impl FnMut() -> Option<T>) -> T {
    match until(deadline, look) {
        Some(found) => found,
        None => panic!("{what}: not within {deadline:?}"),
    }
}

/// A number from the environment, for suites whose length is a setting: `EPAGENT_TEST_LOAD_SECONDS=60`.
pub fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

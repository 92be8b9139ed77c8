//! What the process asks of the system for itself: signals as a descriptor, and how many descriptors it may have.

use std::hash::{BuildHasher, Hasher, RandomState};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Descriptors kept for everything that is not a client or upstream connection.
const SPARE_DESCRIPTORS: u64 = 128;

/// SIGTERM, SIGINT, SIGHUP and SIGUSR2, blocked in the calling thread and in those it starts.
pub fn watch_signals() -> nix::Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGHUP);
    signals.add(Signal::SIGUSR2);
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// Where choices that only have to look random start from: what the system gives a process for its hash maps.
pub fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// A proxied connection needs two descriptors. The soft limit is raised to the hard one.
pub fn connections_by_descriptors() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1_000 };
    let limit = match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    };
    (limit.saturating_sub(SPARE_DESCRIPTORS) / 2).clamp(16, 500_000)
}

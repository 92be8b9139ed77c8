//! Images, releases, instance roots, volumes and log folders as trees with quotas, in one pool on btrfs.
//!
//! Everything starts at [`Pool::open_or_create`]. Calls are synchronous, idempotent and may be made from several
//! processes at once: a caller that must not wait forks a child, lets it call, and opens the result by name. Objects are
//! addressed by checked names, never by paths; opening stays below the pool's root.
//!
//! ```text
//!  ops/     what callers ask for, by kind of object          ┐ decide
//!  plan     operation or leftover record → steps (pure)      ┘
//!  engine   performs steps; record/ says what is under way   ┐
//!  btrfs/   the backend: subvolumes, snapshots, quota groups │ act
//!  sys/     the unsafe door: ioctls                          ┘
//!  pool/    opening and closing;  sweep  after a crash
//!  unpack/  archives and image layers, for `epagent-unpack` inside a jail (feature `unpack`)
//! ```
//!
//! What always holds, at each step and after each cut: an object is in its place whole or not at all; whatever is being
//! built or deleted has a record; nothing a tenant can write to is without a limit.

#![deny(unsafe_code)]

mod backend;
mod btrfs;
mod dirs;
mod engine;
mod error;
mod name;
mod ops;
mod place;
mod plan;
mod pool;
mod record;
mod sweep;
#[allow(unsafe_code)]
mod sys;
mod types;
#[cfg(feature = "unpack")]
pub mod unpack;

pub use engine::StepObserver;
pub use error::{Error, Result};
pub use name::{
    AppName, ImageId, ImageName, InstanceId, NAME_LEN_MAX, NameError, ReleaseId, StagingId, VolumeName,
};
pub use pool::Pool;
pub use types::*;

/// Bytes from the kernel's generator.
fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0u8; N];
    let mut filled = 0;
    while filled < N {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
            .map_err(|e| Error::io("read random bytes from", "the kernel", e))?;
    }
    Ok(bytes)
}

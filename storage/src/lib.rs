//! Images, releases, instance roots, volumes and log folders as btrfs subvolumes with quotas, in one pool.
//!
//! Everything starts at [`Pool::open_or_create`]. Calls are synchronous, idempotent and may be made from several
//! processes at once (a caller that must not wait forks a child, lets it call, and opens the result by name).

#![deny(unsafe_code)]

pub mod error;
pub mod name;
pub mod pool;
pub mod types;

pub use error::{Error, Result};
pub use name::{AppName, ImageId, ImageName, InstanceId, NameError, ReleaseId, StagingId, VolumeName};
pub use pool::Pool;
pub use types::*;

//! The unsafe door: the ioctls and calls for which no safe wrapper exists.
//!
//! Each function takes descriptors and plain values, makes one system call (or one bounded loop of the same call) and
//! returns `io::Result`. No policy lives here, and nothing outside this folder may say `unsafe`.

mod btrfs;
mod handle;
mod loopdev;

pub(crate) use btrfs::*;
pub(crate) use handle::open_by_id;
pub(crate) use loopdev::*;

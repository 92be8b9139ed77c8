//! An io_uring TCP and HTTP balancer that can hold a request while the app behind it changes.

#![deny(unsafe_code)]

pub mod control;
pub mod table;

//! The harness of the end-to-end suites: whole agents on this machine, load against them, and what they leave.
//!
//! | module | what it is |
//! |---|---|
//! | [`host`] | one `epagent dev` with a state folder of its own; ends it and shows that nothing was left |
//! | [`command`] | programs run to their end with a deadline, with what they printed |
//! | [`api`] | the agent's HTTP API over its unix socket, without the `epagent` command |
//! | [`http`] | a small HTTP/1.1 client |
//! | [`front`] | clients and a backend for what the balancer is measured with |
//! | [`load`] | requests from many threads, each counted, each failure with its reason |
//! | [`app`] | app folders to deploy |
//! | [`archive`] | tar archives no packer would make |
//! | [`leftovers`] | what of a node exists in the kernel |
//! | [`process`] | who runs, found by executable and parent |
//! | [`poll`] | waiting with a deadline, never for luck |
//!
//! Every agent takes a node number of its own, so suites run side by side. Drop cleans up after a panic too.

#![forbid(unsafe_code)]

pub mod api;
pub mod app;
pub mod archive;
pub mod command;
pub mod front;
pub mod host;
pub mod http;
pub mod leftovers;
pub mod load;
pub mod poll;
pub mod process;
pub mod vm;

pub use app::AppDir;
pub use command::Ran;
pub use host::DevHost;
pub use load::{Load, Shape};
pub use poll::{eventually, until};

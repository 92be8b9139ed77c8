//! An io_uring TCP and HTTP balancer that can hold a request while the app behind it changes.
//!
//! ```text
//!  control socket ─▶ server ── table, listeners ──▶ worker (one per thread)
//!  (JSON lines)      │   ▲                            │ completions        ▲ operations
//!                    │   └── status, acks             ▼                    │
//!                    ▼                               core  (pure: decides everything)
//!                  saved table                        │                    ▲
//!                                                     └──▶ door: the ring ─┘  (does as told)
//! ```
//!
//! [`core`] has no I/O, no clock and no randomness; [`ring`] has no opinions and all the unsafe code; [`epoll`]
//! takes its place where io_uring is denied. The balancer imports nothing else of this workspace, so it builds, runs and is tested alone.

#![deny(unsafe_code)]

pub mod access_log;
pub mod config_file;
pub mod control;
pub mod core;
pub mod door;
pub mod doors;
pub mod epoll;
pub mod handover;
pub mod journal;
pub mod listeners;
pub mod metrics;
pub mod notify;
pub mod remark;
pub mod ring;
pub mod saved;
pub mod server;
pub mod sockets;
pub mod table;
pub mod tls;
pub mod unix;
pub mod watchdog;
pub mod worker;

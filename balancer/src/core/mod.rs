//! The data path without its I/O: completions in, operations out; the time is an argument.
//!
//! | module | idea |
//! |---|---|
//! | [`engine`] | the loop and the calling contract; sockets come, move bytes and go |
//! | [`io`] | the closed vocabulary between core and door |
//! | [`listen`] | what a listener makes of the connections it accepts |
//! | [`preface`] | PROXY headers and the names in TLS hellos |
//! | `session` | what is known of each socket; the state machines, drawn |
//! | `client`, `upstream_side` | the two sides of an HTTP exchange |
//! | `tunnel` | plain TCP and upgraded connections |
//! | `dispatch`, `hold`, `pool` | finding an upstream, retrying; waiting for one; connections kept |
//! | `choose` | which upstream is next: turns, load, two of many, consistent hash |
//! | `settle` | operations and deadlines as functions of state |
//! | `accept`, `limits` | when to accept, whom to turn away |
//! | `checks` | health checks: when, how, and what they come to |
//! | `routes`, `upstreams` | the table as it runs: hold queues, load, reachability |
//! | `activity` | how many each route serves, since when nobody, and who starves |
//! | `actions` | routes that answer by themselves |
//! | [`refusal`] | why a tenant's unix socket is not connected to |
//! | `remarks` | what an operator should see in the log |
//! | [`acme`] | challenges, whose files others read |
//! | [`secure`] | TLS, of which the core sees only when it begins, what it proved, and its end |
//! | `flow`, [`access`] | one request from its beginning to its end, and what the log is told of it |
//! | [`histogram`] | how long things took |
//! | `connections` | what is open, a page at a time |
//! | [`http`] | strict heads, body framing, the balancer's own answers |
//! | [`chunk`], [`outbox`], [`memory`] | bytes without copying, and what a slow peer may cost |
//! | [`bound`] | how much memory all of it may take |
//! | `random` | numbers that replay |
//! | `slab`, `timers`, [`config`] | keys that go stale safely, lazy deadlines, every bound |
//!
//! What is absent: descriptors, system calls, clocks, threads, randomness. The same core runs behind the
//! ring and behind the simulator of the tests.

mod accept;
pub mod access;
pub mod acme;
mod actions;
mod activity;
pub mod bound;
mod checks;
mod choose;
pub mod chunk;
mod client;
pub mod config;
mod connections;
mod dispatch;
pub mod engine;
mod flow;
pub mod histogram;
mod hold;
pub mod http;
pub mod io;
mod limits;
pub mod listen;
pub mod memory;
pub mod outbox;
mod pool;
pub mod preface;
mod random;
pub mod refusal;
mod remarks;
mod routes;
pub mod secure;
mod session;
mod settle;
mod slab;
mod timers;
mod tunnel;
mod upstream_side;
mod upstreams;

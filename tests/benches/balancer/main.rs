//! `make bench-balancer`: what the balancer costs beside HAProxy, nginx, two naive proxies, and a ring that does
//! nothing else.
//!
//! ```text
//!   load (this process) ──▶ one of the fronts ──▶ backend      all on loopback
//!        processor 0           processor 1        processor 0
//! ```
//!
//! Fronts of one scenario run side by side and are measured in turns, so that what else the machine does falls on
//! all of them; each figure is the median of the rounds. Processor time is user and system time of the front and
//! its children, io-wq threads included. Load and backend saturate their processor long before a front does, so
//! requests per second say little and the time per request says much.
//!
//! `EPAGENT_BENCH_SECONDS` and `EPAGENT_BENCH_ROUNDS` set length and number of the rounds, `EPAGENT_BENCH_ONLY` a
//! part of the names of the scenarios wanted, `EPAGENT_BENCH_IDLE` how many idle connections there are. Every round
//! is printed, the losing ones too.

mod fronts;
mod naive;
mod report;
mod ring;
mod scenarios;

use std::process::ExitCode;

/// The processor of the load and the backend, and that of the fronts.
const LOAD_CPU: usize = 0;
const FRONT_CPU: usize = 1;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        // Parts of the bench that are processes of their own.
        ["naive-tokio", listen, upstream] => naive::tokio_proxy(listen, upstream),
        ["naive-tokio-uring", listen, upstream] => naive::tokio_uring_proxy(listen, upstream),
        ["bare-ring", listen, upstream] => ring::proxy(listen, upstream),
        // cargo says --bench.
        _ => return scenarios::run_all(),
    }
    ExitCode::SUCCESS
}

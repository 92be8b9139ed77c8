//! Both sides of a front that is measured: `backend` answers, `crowd` asks.

#![forbid(unsafe_code)]

use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use epagent_tests::front::{backend, load};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const USAGE: &str = "usage: epagent-load backend HTTP-ADDR UNIX-PATH BULK-ADDR
       epagent-load crowd ADDR IDLE BUSY SECONDS";

fn main() -> ExitCode {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["backend", http, unix, bulk] => backend::run(http, unix, bulk),
        ["crowd", address, idle, busy, seconds] => {
            let numbers = (address.parse(), idle.parse(), busy.parse(), seconds.parse());
            let (Ok(address), Ok(idle), Ok(busy), Ok(seconds)) = numbers else { return usage() };
            return crowd(address, idle, busy, Duration::from_secs(seconds));
        }
        _ => return usage(),
    }
    ExitCode::SUCCESS
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::FAILURE
}

/// Many connections that do nothing, and beside them some that are busy. The idle ones must all still be served at
/// the end.
fn crowd(address: SocketAddr, idle: u64, busy: usize, time: Duration) -> ExitCode {
    let mut idlers = load::idle(address, idle);
    println!("idle\t{}", idlers.len());
    let _ = std::io::stdout().flush();
    let seen = load::requests(address, busy, false, time);
    println!(
        "busy\t{}\tfailed\t{}\tp50_us\t{}\tp99_us\t{}",
        seen.done, seen.failed, seen.p50_us, seen.p99_us
    );
    let served = idlers.iter_mut().filter_map(|client| load::ask(client).ok()).count() as u64;
    println!("served\t{served}");
    if served == idle && seen.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

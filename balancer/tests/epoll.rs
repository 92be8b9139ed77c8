//! Every test of behaviour again, by epoll. `common::IO` goes by the name of this binary.

#![allow(
    clippy::duplicate_mod,
    reason = "each file brings along what the tests share, as in a binary of its own"
)]

#[path = "access_log.rs"]
mod access_log;
#[path = "actions.rs"]
mod actions;
#[path = "bytes.rs"]
mod bytes;
#[path = "certificates.rs"]
mod certificates;
#[path = "churn.rs"]
mod churn;
#[path = "config_file.rs"]
mod config_file;
#[path = "conformance.rs"]
mod conformance;
#[path = "deploy.rs"]
mod deploy;
#[path = "faults.rs"]
mod faults;
#[path = "forwarded.rs"]
mod forwarded;
#[path = "handover.rs"]
mod handover;
#[path = "health.rs"]
mod health;
#[path = "hold.rs"]
mod hold;
#[path = "http.rs"]
mod http;
#[path = "limits.rs"]
mod limits;
#[path = "memory.rs"]
mod memory;
#[path = "metrics.rs"]
mod metrics;
#[path = "preface.rs"]
mod preface;
#[path = "process.rs"]
mod process;
#[path = "reconcile.rs"]
mod reconcile;
#[path = "seeing.rs"]
mod seeing;
#[path = "service.rs"]
mod service;
#[path = "slow_readers.rs"]
mod slow_readers;
#[path = "smuggling.rs"]
mod smuggling;
#[path = "tcp.rs"]
mod tcp;
#[path = "tls.rs"]
mod tls;
#[path = "unix.rs"]
mod unix;
#[path = "wake.rs"]
mod wake;

#[test]
fn every_test_of_behaviour_is_run_by_epoll_too() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");
    let ours = std::fs::read_to_string(format!("{folder}/epoll.rs")).expect("this file");
    for entry in std::fs::read_dir(folder).expect("the tests") {
        let name = entry.expect("a file").file_name().into_string().expect("a name");
        // Two try both doors by themselves, and two go through none.
        let others = ["epoll.rs", "doors.rs", "promises.rs", "fuzz.rs", "journal.rs"];
        if name.ends_with(".rs") && !others.contains(&name.as_str()) {
            assert!(ours.contains(&format!("#[path = \"{name}\"]")), "{name} is not run by epoll");
        }
    }
}

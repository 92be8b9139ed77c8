//! `TlsDoor` under a seeded simulator: above it a stand-in for the core, below it a fake door that delivers
//! late, short and byte by byte, and at the far end a real TLS client (rustls). Every seed replays exactly,
//! but for the random numbers of TLS itself.
//!
//! What is checked: the door's contract, on both sides of the decorator; no byte is lost, doubled or
//! changed either way; ends are told from cuts; whatever the client does wrong is a fault and never a
//! hang; lent buffers are given up at once; nothing is said of a socket that is closed.
//!
//! `TLS_SIMULATION_SEEDS=N` runs more seeds, `TLS_SIMULATION_SEED=S` replays one.

mod fake;
#[path = "../common/lent.rs"]
mod lent;
mod peer;
mod run;

use std::panic::AssertUnwindSafe;

use peer::Manner;
use run::Run;

/// Seeds of one test; some seconds in a debug build.
const SEEDS: u64 = 500;

fn check(manners: &[Manner]) {
    let setting = run::Setting::new();
    let seeds = match std::env::var("TLS_SIMULATION_SEED") {
        Ok(seed) => vec![seed.parse().expect("TLS_SIMULATION_SEED is a number")],
        Err(_) => {
            let count = std::env::var("TLS_SIMULATION_SEEDS");
            (0..count.map_or(SEEDS, |text| text.parse().expect("a number"))).collect()
        }
    };
    for seed in seeds {
        let manner = manners[seed as usize % manners.len()];
        // What they share is only looked at again to say which seed it was.
        let run = AssertUnwindSafe(|| Run::new(&setting, seed, manner).run());
        let outcome = std::panic::catch_unwind(run);
        if let Err(panic) = outcome {
            eprintln!("replay with TLS_SIMULATION_SEED={seed} ({manner:?})");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn streams_come_through_unchanged_and_end_as_they_ended() {
    check(&[Manner::Orderly, Manner::HalfCloses, Manner::Orderly]);
}

#[test]
fn an_end_without_a_goodbye_is_a_cut() {
    check(&[Manner::Cuts]);
}

#[test]
fn what_is_not_tls_or_not_whole_is_a_fault_and_never_a_hang() {
    check(&[Manner::Resets, Manner::Garbles, Manner::SpeaksHttp, Manner::Leaves]);
}

#[test]
fn nothing_is_said_of_a_socket_that_was_closed() {
    check(&[Manner::IsClosedOn]);
}

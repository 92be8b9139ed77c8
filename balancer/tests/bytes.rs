//! Correct to the byte: streams of mixed sizes both ways at once, half-closed by either side first, aborted
//! by either side anywhere, through a balancer with few buffers, so that one that leaked would soon show.
//!
//! `EPAGENT_TEST_GIB` says how much passes in all (a fraction will do).

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Balancer, free_address, noise, port_route, until};
use nix::sys::socket::{setsockopt, sockopt};

const GIB: f64 = 0.1;
/// Streams under way at a time.
const LANES: u64 = 12;
/// Every stream's bytes are this many, over and over, from a place of its own.
const PERIOD: usize = 1 << 20;

/// The number of the stream that shows at the end that nothing is lacking.
const LAST: u64 = u64::MAX;

/// What one stream is to do; both ends know it by its number.
#[derive(Debug, Clone, Copy)]
struct Plan {
    number: u64,
    up: usize,
    down: usize,
    /// After so many bytes of its own, the client or the app resets the connection.
    client_aborts: Option<usize>,
    app_aborts: Option<usize>,
    /// Reads in small pieces, and rests now and then: the other side has to wait.
    client_dawdles: bool,
    app_dawdles: bool,
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound.max(1)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn size(&mut self) -> usize {
        let most = [1, 200, 20_000, 200_000, 3_000_000, 12_000_000][self.below(6) as usize];
        self.below(most) as usize
    }
}

impl Plan {
    fn new(number: u64) -> Self {
        if number == LAST {
            let (up, down) = (9_000_000, 9_000_000);
            let (client_aborts, app_aborts) = (None, None);
            return Self {
                number,
                up,
                down,
                client_aborts,
                app_aborts,
                client_dawdles: true,
                app_dawdles: true,
            };
        }
        let mut random = Random(number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let (up, down) = (random.size(), random.size());
        let abort = |random: &mut Random, size: usize| {
            random.one_in(8).then(|| random.below(size as u64 + 1) as usize)
        };
        Self {
            number,
            up,
            down,
            client_aborts: abort(&mut random, up),
            app_aborts: abort(&mut random, down),
            client_dawdles: random.one_in(4),
            app_dawdles: random.one_in(4),
        }
    }

    fn is_whole(&self) -> bool {
        self.client_aborts.is_none() && self.app_aborts.is_none()
    }
}

/// Why a stream came out wrong.
type Fault = String;

/// Says `size` bytes of the period from `start` on, in pieces of mixed sizes.
fn say(
    mut stream: &TcpStream,
    period: &[u8],
    start: usize,
    size: usize,
    random: &mut Random,
) -> std::io::Result<()> {
    let mut said = 0;
    while said < size {
        let from = (start + said) % PERIOD;
        let most = [100, 5_000, 300_000][random.below(3) as usize];
        let piece = (1 + random.below(most) as usize).min(size - said).min(PERIOD - from);
        stream.write_all(&period[from..from + piece])?;
        said += piece;
    }
    Ok(())
}

/// Hears the period from `start` on until the end; how much it was, and whether the end was one.
fn hear(mut stream: &TcpStream, period: &[u8], start: usize, dawdles: bool) -> Result<(usize, bool), Fault> {
    let mut buffer = vec![0; if dawdles { 7_000 } else { 200_000 }];
    let mut heard = 0;
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok((heard, true)),
            Ok(count) => {
                let mut got = &buffer[..count];
                while !got.is_empty() {
                    let from = (start + heard) % PERIOD;
                    let same = got.len().min(PERIOD - from);
                    if got[..same] != period[from..from + same] {
                        return Err(format!("other bytes than were sent, around {heard}"));
                    }
                    heard += same;
                    got = &got[same..];
                }
                if dawdles && heard % 11 == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                return Ok((heard, false));
            }
            Err(error) => return Err(format!("after {heard} bytes: {error}")),
        }
    }
}

/// One end of a stream: says its part while it hears the other's.
fn take_part(stream: &TcpStream, period: &[u8], (plan, is_client): (Plan, bool)) -> Result<(), Fault> {
    let (mine, theirs, aborts, dawdles) = match is_client {
        true => (plan.up, plan.down, plan.client_aborts, plan.client_dawdles),
        false => (plan.down, plan.up, plan.app_aborts, plan.app_dawdles),
    };
    let place = |client: bool| (plan.number % 1_000_003) as usize * 7_919 + usize::from(client) * 104_729;
    let mut random = Random(plan.number ^ u64::from(is_client));
    std::thread::scope(|scope| {
        let hearing = scope.spawn(|| hear(stream, period, place(!is_client), dawdles));
        let said = say(stream, period, place(is_client), aborts.unwrap_or(mine), &mut random);
        if aborts.is_some() {
            let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
            let _ = setsockopt(stream, sockopt::Linger, &linger);
            // Wakes the one that hears; the reset follows when the stream is dropped.
            let _ = stream.shutdown(Shutdown::Read);
        } else {
            let _ = stream.shutdown(Shutdown::Write);
        }
        let (heard, ended) = hearing.join().map_err(|_| "a panic".to_owned())??;
        let said_all = said.is_ok();
        if plan.is_whole() {
            said.map_err(|error| format!("saying it: {error}"))?;
        }
        // A stream that was cut never passes for a whole one; whoever was told of a reset when saying
        // something hears a mere end afterwards.
        let sure = aborts.is_none() && said_all && (ended || plan.is_whole());
        if sure && (heard, ended) != (theirs, true) {
            return Err(format!("{heard} bytes of {theirs}, and an end: {ended}"));
        }
        Ok(())
    })
    .map_err(|fault: Fault| format!("{} of {plan:?}: {fault}", if is_client { "client" } else { "app" }))
}

/// An app that takes its part in every stream.
fn app(period: Arc<Vec<u8>>, faults: Arc<Mutex<Vec<Fault>>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("an address");
    let address = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (period, faults) = (period.clone(), faults.clone());
            std::thread::spawn(move || {
                let mut number = [0; 8];
                if stream.read_exact(&mut number).is_err() {
                    // Aborted before it began.
                    return;
                }
                let plan = Plan::new(u64::from_le_bytes(number));
                if let Err(fault) = take_part(&stream, &period, (plan, false)) {
                    faults.lock().expect("no panics").push(fault);
                }
            });
        }
    });
    address
}

fn client(port: u16, period: &[u8], plan: Plan) -> Result<(), Fault> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).map_err(|error| error.to_string())?;
    stream.set_read_timeout(Some(common::PATIENCE)).map_err(|error| error.to_string())?;
    stream.write_all(&plan.number.to_le_bytes()).map_err(|error| error.to_string())?;
    take_part(&stream, period, (plan, true))
}

#[test]
fn streams_arrive_as_they_were_sent_or_not_at_all() {
    let gib = std::env::var("EPAGENT_TEST_GIB").map_or(GIB, |text| text.parse().expect("a number"));
    let bytes_left = AtomicU64::new((gib * f64::from(1 << 30)) as u64);
    let period = Arc::new(noise(11, PERIOD));
    let faults = Arc::<Mutex<Vec<Fault>>>::default();
    let upstream = app(period.clone(), faults.clone());
    let balancer = Balancer::start(&["--buffers", "64"]);
    let port = free_address().port();
    assert_eq!(balancer.routes(&port_route(port, &[("db", upstream, "up")])).problems, []);
    let before = balancer.descriptors();
    let lane = |lane: u64| {
        for turn in 0.. {
            let plan = Plan::new(turn * LANES + lane);
            let size = (plan.up + plan.down) as u64;
            let enough =
                bytes_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(size));
            if enough.is_err() || !faults.lock().expect("no panics").is_empty() {
                return;
            }
            if let Err(fault) = client(port, &period, plan) {
                faults.lock().expect("no panics").push(fault);
            }
        }
    };
    std::thread::scope(|scope| {
        for number in 0..LANES {
            scope.spawn(move || lane(number));
        }
    });
    assert_eq!(*faults.lock().expect("no panics"), Vec::<Fault>::new());
    until("nothing is left of them", || balancer.upstream("db").active_connections == 0);
    until("no descriptor is left open", || balancer.descriptors() <= before);
    // One stream can use every buffer there is, so it would stall if enough of them had leaked.
    assert_eq!(client(port, &period, Plan::new(LAST)), Ok(()));
    // Its app may still have some to read.
    until("nothing is lent any more", || {
        let memory = balancer.status().memory;
        (memory.lent_buffers, memory.waiting_bytes) == (0, 0)
    });
}

//! Machines on one network cable, which can be cut between any two of them or at a machine's own end.
//!
//! ```text
//!  vm 1 ─ dgram socket ─┐
//!  vm 2 ─ dgram socket ─┼─ a thread that gives each frame to all others, but for the pairs that are cut
//!  vm 3 ─ dgram socket ─┘
//! ```
//!
//! Unix sockets in a folder: no port, no interface of the host, any number of cables at a time. A machine that does
//! not take its frames loses them, as on a real wire. [`super::Vm::set_link`] is the other way to cut: there the
//! guest sees its carrier go, here it does not.

use std::collections::BTreeSet;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// The largest Ethernet frame that qemu hands over, with room for segments that a guest leaves to its card.
const FRAME_BYTES_MAX: usize = 68 << 10;
/// How often a port's thread looks whether the cable is taken away.
const LOOK: Duration = Duration::from_millis(200);

/// One cable with a fixed number of ends.
pub struct Cable {
    folder: tempfile::TempDir,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    /// The cable's own sockets, one per end; the machine's socket is the file beside it.
    ports: Vec<UnixDatagram>,
    machines: Vec<PathBuf>,
    cut: Mutex<BTreeSet<(usize, usize)>>,
    ended: AtomicBool,
}

/// One end, given to a machine when it starts.
#[derive(Debug, Clone)]
pub struct Plug {
    pub own: PathBuf,
    pub other: PathBuf,
    /// From 0.
    pub index: usize,
}

impl Plug {
    /// Its address on the cable. 192.0.2.0/24 is for examples (RFC 5737): nothing real is there.
    pub fn address(&self) -> String {
        format!("192.0.2.{}", self.index + 1)
    }

    /// All forks were saved with one hardware address; each end has its own. After a boot the guest's agent may be
    /// there before the card's driver is, so it is waited for, up to a minute.
    pub fn setup(&self) -> String {
        format!(
            "for try in $(seq 600); do test -e /sys/class/net/eth0 && break; sleep 0.1; done; \
             ip link set eth0 down; ip link set eth0 address 52:54:00:00:02:{:02x}; \
             ip address add {}/24 dev eth0; ip link set eth0 up",
            self.index + 1,
            self.address()
        )
    }
}

impl Cable {
    #[track_caller]
    pub fn with_ends(count: usize) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("epagent-cable-")
            .tempdir()
            .unwrap_or_else(|error| panic!("making a folder for a cable: {error}"));
        let path = |kind: &str, index: usize| folder.path().join(format!("{kind}{index}"));
        let ports = (0..count).map(|index| {
            let port = UnixDatagram::bind(path("port", index))?;
            port.set_read_timeout(Some(LOOK))?;
            // A frame for a machine that is full is lost; the others get theirs.
            port.set_write_timeout(Some(Duration::from_millis(20)))?;
            Ok(port)
        });
        let ports: std::io::Result<Vec<_>> = ports.collect();
        let shared = Arc::new(Shared {
            ports: ports.unwrap_or_else(|error| panic!("binding the ends of a cable: {error}")),
            machines: (0..count).map(|index| path("machine", index)).collect(),
            cut: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let threads = (0..count)
            .map(|index| {
                let shared = shared.clone();
                std::thread::spawn(move || shared.carry(index))
            })
            .collect();
        Self { folder, shared, threads }
    }

    pub fn plug(&self, index: usize) -> Plug {
        Plug {
            own: self.shared.machines[index].clone(),
            other: self.folder.path().join(format!("port{index}")),
            index,
        }
    }

    /// No frame goes between these two any more, in either direction.
    pub fn cut(&self, one: usize, other: usize) {
        self.shared.cut().insert((one.min(other), one.max(other)));
    }

    pub fn heal(&self, one: usize, other: usize) {
        self.shared.cut().remove(&(one.min(other), one.max(other)));
    }
}

impl Shared {
    /// Takes what machine `from` sends and gives it to the others, until the cable is taken away.
    fn carry(&self, from: usize) {
        let mut frame = vec![0; FRAME_BYTES_MAX];
        while !self.ended.load(Ordering::Relaxed) {
            let Ok(length) = self.ports[from].recv(&mut frame) else { continue };
            for to in (0..self.ports.len()).filter(|to| *to != from) {
                if !self.cut().contains(&(from.min(to), from.max(to))) {
                    // Not there (yet), or full: lost, as on a wire.
                    let _ = self.ports[to].send_to(&frame[..length], &self.machines[to]);
                }
            }
        }
    }

    fn cut(&self) -> std::sync::MutexGuard<'_, BTreeSet<(usize, usize)>> {
        self.cut.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

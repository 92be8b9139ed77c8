//! What is said of memory on the control socket.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What waits in memory, what may, and how much the process may come to use at all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStatus {
    /// All receive buffers of all threads; only what was used of them takes memory.
    pub buffers_bytes: u64,
    /// Receive buffers lent to sends that wait for a peer, and most that may be.
    pub lent_buffers: u64,
    pub lent_buffers_max: u64,
    /// Bytes of our own that wait for peers that do not keep up, and most that may.
    pub waiting_bytes: u64,
    pub waiting_bytes_max: u64,
    /// Bytes kept of heads that are not complete and of bodies that have nowhere to go yet, and from how many on
    /// who keeps much is turned away.
    #[serde(default)]
    pub kept_bytes: u64,
    #[serde(default)]
    pub kept_bytes_max: u64,
    /// The most that the process may come to use.
    #[serde(default)]
    pub bound: MemoryBound,
}

/// The most memory that the process may come to use, in bytes, by what for. Each part is taken at its worst,
/// all at the same time, on as many connections as there may be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBound {
    /// The sum of all parts but the kernel's.
    pub total_bytes: u64,
    pub receive_buffers_bytes: u64,
    /// What waits for peers that do not keep up.
    pub waiting_bytes: u64,
    /// Records of client connections, and of one to an upstream for each.
    pub connections_bytes: u64,
    /// What connections may keep of heads that are not complete and of bodies that have nowhere to go yet: a budget
    /// of all, and a fair share of each.
    pub kept_bytes: u64,
    /// If every client speaks TLS; 0 without a folder of certificates.
    pub tls_bytes: u64,
    /// Who has how much of each limit.
    pub sources_bytes: u64,
    /// Routes and upstreams of the table in force, and what hashing routes look up.
    pub table_bytes: u64,
    /// Requests on the control socket, and the tables in them.
    pub control_bytes: u64,
    /// The program itself, its threads and their queues.
    pub process_bytes: u64,
    /// What the kernel may use for the sockets' own buffers. Not part of the total: it is the kernel's memory,
    /// though a cgroup that the balancer runs in is charged for it.
    pub kernel_sockets_bytes: u64,
}

impl MemoryBound {
    /// The parts of the total.
    pub fn parts(&self) -> [(&'static str, u64); 9] {
        [
            ("receive buffers", self.receive_buffers_bytes),
            ("waiting", self.waiting_bytes),
            ("connections", self.connections_bytes),
            ("heads and bodies kept", self.kept_bytes),
            ("tls", self.tls_bytes),
            ("sources", self.sources_bytes),
            ("table", self.table_bytes),
            ("control", self.control_bytes),
            ("process", self.process_bytes),
        ]
    }
}

/// In MiB, for the log.
impl fmt::Display for MemoryBound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        write!(f, "{} MiB (", mib(self.total_bytes))?;
        for (place, (name, bytes)) in self.parts().into_iter().filter(|(_, bytes)| *bytes > 0).enumerate() {
            let comma = if place == 0 { "" } else { ", " };
            write!(f, "{comma}{name} {}", mib(bytes))?;
        }
        write!(f, "), and {} MiB of the kernel's for sockets", mib(self.kernel_sockets_bytes))
    }
}

impl MemoryStatus {
    /// Adds what another thread has.
    pub fn add(&mut self, other: &Self) {
        self.buffers_bytes += other.buffers_bytes;
        self.lent_buffers += other.lent_buffers;
        self.lent_buffers_max += other.lent_buffers_max;
        self.waiting_bytes += other.waiting_bytes;
        self.waiting_bytes_max += other.waiting_bytes_max;
        self.kept_bytes += other.kept_bytes;
        self.kept_bytes_max += other.kept_bytes_max;
    }
}

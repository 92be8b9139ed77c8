//! How much memory the process may come to use, from how it is set up.
//!
//! It is a sum of worst cases, all at the same time: every connection there may be, each keeping what is its fair
//! share, and all budgets used up. Who is told to live with less says `--max-connections`. Not counted
//! are what malloc loses between pieces, the lines of the access log that wait (which are bounded in number),
//! and processes that drain after a handover, which have a bound of the same kind each.

use std::fs;

use super::Server;
use crate::control::memory::MemoryBound;
use crate::control::protocol::{LINE_BYTES_MAX, METRICS_LINE_BYTES_MAX};
use crate::control::server::PEERS_MAX;
use crate::core::bound;
use crate::core::config::Config;
use crate::core::memory::Limits;
use crate::doors::{BufferSizes, SOCKET_BYTES_MAX};
use crate::table::Table;
use crate::tls;

/// The program, its libraries and its control thread, with what malloc keeps.
const PROGRAM_BYTES: usize = 12 << 20;
/// A data-path thread: what of its stack is used, the queues of its ring, its lists of a batch.
const THREAD_BYTES: usize = 6 << 20;
/// How much larger a table is than the text it came as.
const TABLE_GROWTH: usize = 4;

/// What the bound follows from, besides the table.
#[derive(Debug)]
pub struct Setup {
    pub threads: u32,
    /// Of one thread.
    pub config: Config,
    pub ends_tls: bool,
    kernel: KernelLimits,
}

/// What the system lets sockets have, in bytes (tcp(7)).
#[derive(Debug, Clone, Copy)]
struct KernelLimits {
    /// The largest send and receive buffers of a socket, together.
    per_socket: u64,
    /// Of all TCP sockets of the system.
    of_system: u64,
}

impl Setup {
    pub fn new(threads: u32, config: &Config, buffers: BufferSizes, ends_tls: bool) -> Self {
        let memory = Limits::of_thread(buffers.count, buffers.size_bytes, threads);
        let config = Config { memory, ..config.clone() };
        Self { threads, config, ends_tls, kernel: KernelLimits::read() }
    }

    /// With this table in force.
    pub fn bound(&self, table: &Table) -> MemoryBound {
        let (threads, limits) = (self.threads as usize, &self.config.memory);
        let connections = (self.config.connections_max + Config::SLACK) as usize * threads;
        let bytes = |count: usize| count as u64;
        let tls_bytes = if self.ends_tls { tls::connection_bytes_max() } else { 0 };
        let texts = PEERS_MAX * LINE_BYTES_MAX + METRICS_LINE_BYTES_MAX;
        let tables = 2 * TABLE_GROWTH * LINE_BYTES_MAX;
        let sockets = bytes(2 * connections);
        let mut bound = MemoryBound {
            total_bytes: 0,
            receive_buffers_bytes: bytes(threads * limits.buffers * limits.buffer_bytes as usize),
            waiting_bytes: bytes(threads * limits.spill_bytes_max),
            connections_bytes: bytes(connections * (bound::records_bytes() + 2 * SOCKET_BYTES_MAX)),
            kept_bytes: bytes(threads * bound::kept_bytes(&self.config, connections / threads)),
            tls_bytes: bytes(connections * tls_bytes),
            sources_bytes: bytes(threads * bound::sources_bytes()),
            table_bytes: bytes(threads * bound::table_bytes(table)),
            control_bytes: bytes(texts + tables),
            process_bytes: bytes(PROGRAM_BYTES + threads * THREAD_BYTES),
            kernel_sockets_bytes: sockets.saturating_mul(self.kernel.per_socket).min(self.kernel.of_system),
        };
        bound.total_bytes = bound.parts().iter().map(|(_, bytes)| bytes).sum();
        bound
    }
}

impl KernelLimits {
    /// Where they cannot be read, what Linux has by default.
    fn read() -> Self {
        let largest = |name: &str| {
            let text = fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).ok()?;
            text.split_whitespace().nth(2)?.parse::<u64>().ok()
        };
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(4096);
        let per_socket = largest("tcp_rmem").unwrap_or(6 << 20) + largest("tcp_wmem").unwrap_or(4 << 20);
        let of_system = largest("tcp_mem").unwrap_or(u64::MAX).saturating_mul(page.unsigned_abs());
        Self { per_socket, of_system }
    }
}

impl Server {
    /// The most memory the process may come to use, as it is now.
    pub(super) fn memory_bound(&self) -> MemoryBound {
        self.setup.bound(&self.table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::memory::KEPT_FAIR_BYTES;

    fn setup(connections_max: u64, threads: u32, ends_tls: bool) -> Setup {
        let config = Config { connections_max, ..Config::default() };
        Setup::new(threads, &config, BufferSizes { count: 64, size_bytes: 4096 }, ends_tls)
    }

    #[test]
    fn the_parts_add_up_and_grow_with_what_they_follow_from() {
        let table = Table::empty();
        let small = setup(1_000, 1, false).bound(&table);
        assert_eq!(small.total_bytes, small.parts().iter().map(|(_, bytes)| bytes).sum::<u64>());
        assert_eq!((small.receive_buffers_bytes, small.tls_bytes), (64 * 4096, 0));
        let more = setup(2 * 1_000 + Config::SLACK, 1, false).bound(&table);
        assert_eq!(more.connections_bytes, 2 * small.connections_bytes);
        assert_eq!(more.kept_bytes - small.kept_bytes, 2 * (1_000 + Config::SLACK) * KEPT_FAIR_BYTES as u64);
        assert!(setup(1_000, 1, true).bound(&table).tls_bytes > 0);
        assert_eq!(setup(1_000, 4, false).bound(&table).sources_bytes, 4 * small.sources_bytes);
        // A record is a few KiB: should a type grow out of proportion, this says so.
        assert!(bound::records_bytes() < 8 * 1024, "{} bytes", bound::records_bytes());
    }
}

//! Looking at a running instance from the host. (Memory, CPU, pids: [`crate::cgroup::CgroupRoot::usage`].)

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use crate::error::Error;

/// TCP_LISTEN of net/tcp_states.h, as the table prints it.
const LISTEN: &str = "0A";
/// A tenant may open many sockets; no more of the table is read than this.
const TABLE_BYTES_MAX: usize = 4 << 20;

/// TCP sockets in state LISTEN in the network namespace of `init_pid`, sorted. `init_pid` must come from a living
/// monitor's status: its process is then the instance's and no other's.
pub fn listening(init_pid: i32) -> Result<Vec<SocketAddr>, Error> {
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        let file = PathBuf::from(format!("/proc/{init_pid}/net/{table}"));
        match fs::read(&file) {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&bytes[..bytes.len().min(TABLE_BYTES_MAX)]);
                found.extend(text.lines().skip(1).filter_map(parse_line));
            }
            // A kernel without IPv6 has no tcp6.
            Err(e) if e.kind() == io::ErrorKind::NotFound && table == "tcp6" => {}
            Err(e) => return Err(Error::path("read", file)(e)),
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// `  0: 0100007F:1F90 00000000:0000 0A …` (proc_net_tcp(5) of the kernel's documentation).
fn parse_line(line: &str) -> Option<SocketAddr> {
    let mut fields = line.split_whitespace().skip(1);
    let local = fields.next()?;
    let state = fields.nth(1)?;
    let (address, port) = local.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let address = parse_address(address)?;
    (state == LISTEN).then_some(SocketAddr::new(address, port))
}

/// Words of 32 bits, each printed as the host's number, while it holds network order.
fn parse_address(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| Some(u32::from_str_radix(hex.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    match hex.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let words: Option<Vec<[u8; 4]>> = (0..4).map(|index| word(index * 8)).collect();
            let bytes: [u8; 16] = words?.concat().try_into().ok()?;
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_told_from_connections() {
        let lines = [
            "   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000  0 1 1 0 100 0 0 10 0",
            "   1: 0100007F:0050 0200007F:D431 01 00000000:00000000 00:00000000 00000000     0  0 2 1 0 20 4 0 10 -1",
            "   2: 00000000000000000000000001000000:1770 00000000000000000000000000000000:0000 0A 0 0 0 0 0",
            "nonsense",
        ];
        let found: Vec<String> =
            lines.iter().filter_map(|line| parse_line(line)).map(|s| s.to_string()).collect();
        assert_eq!(found, ["0.0.0.0:8080", "[::1]:6000"]);
    }
}

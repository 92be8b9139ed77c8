//! The host's name servers, as far as an instance's questions can be redirected to them.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use crate::error::Error;

/// Where systemd-resolved keeps the real servers behind its stub on 127.0.0.53.
const FILES: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
/// As many as a C library asks (MAXNS of resolv.h).
const RESOLVERS_MAX: usize = 3;

/// The host's name servers that an instance can be redirected to: a packet from outside never reaches a loopback
/// address. Empty when the host has none other.
pub fn resolvers() -> Result<Vec<IpAddr>, Error> {
    for file in FILES.map(Path::new) {
        let found = match fs::read_to_string(file) {
            Ok(text) => parse(&text),
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(Error::path("read", file)(e)),
        };
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Ok(Vec::new())
}

fn parse(text: &str) -> Vec<IpAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let server = words.next().filter(|word| *word == "nameserver").and_then(|_| words.next())?;
        server.parse::<IpAddr>().ok()
    });
    servers.filter(|server| !server.is_loopback() && !server.is_unspecified()).take(RESOLVERS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_stubs_and_noise_are_passed_over() {
        let text = "# x\nnameserver 127.0.0.53\nsearch a.example\nnameserver 10.0.0.1\nnameserver fe80::1%eth0\nnameserver 2001:db8::1\n";
        assert_eq!(parse(text), ["10.0.0.1", "2001:db8::1"].map(|ip| ip.parse::<IpAddr>().unwrap()));
    }
}

//! The PROXY protocol, both ways: the header by which a proxy in front tells whose connection this is
//! (haproxy.org, `doc/proxy-protocol.txt`, sections 2.1 and 2.2).
//!
//! ```text
//! version 1   PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n                        at most 107 bytes
//! version 2   signature (12) | 2, command (1) | family, protocol (1) | length (2) | addresses | TLVs
//! ```
//!
//! Read strictly: what is not exactly a header is none, since the bytes after it are believed to be the
//! client's. TLVs are skipped, but must fill the header; a checksum among them must be right.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Longest header of version 1, CRLF included (§2.1).
const V1_BYTES_MAX: usize = 107;
/// Longest header of version 2. The protocol asks for at least 536 (§2.2); 4 KiB leave room for the names
/// and certificates that senders put into TLVs.
pub const V2_BYTES_MAX: usize = 4 * 1024;
/// The most that is ever waited for.
pub const HEADER_BYTES_MAX: usize = V2_BYTES_MAX;

const V1_START: &[u8] = b"PROXY ";
const V2_SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family and protocol, length.
const V2_FIXED_BYTES: usize = 16;

/// The TLV that carries a checksum of the whole header, and how long its value is.
const TLV_CRC32C: u8 = 0x03;
const CRC32C_BYTES: usize = 4;

/// What looking for a header found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scan {
    /// A whole header of this many bytes.
    Complete {
        bytes: usize,
        said: Said,
    },
    /// It may become one.
    Partial,
    Malformed(HeaderError),
}

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    /// Whose connection it is, and where it was made to.
    Ends(Ends),
    /// Nothing: the proxy speaks for itself (LOCAL, a health check), or cannot tell (UNKNOWN, a unix
    /// socket). The connection is whose it seems to be.
    Nothing,
}

/// The two ends of a connection as the proxy in front saw them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

/// Why bytes are no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("the connection does not begin with a PROXY protocol header")]
    Missing,
    #[error("the PROXY protocol header of version 1 is malformed")]
    Line,
    #[error("the PROXY protocol header has a version, command or address family that does not exist")]
    Kind,
    #[error("the PROXY protocol header is longer than {V2_BYTES_MAX} bytes")]
    TooLong,
    #[error("the PROXY protocol header is too short for its addresses, or has malformed TLVs")]
    Length,
    #[error("the PROXY protocol header is for datagrams")]
    Datagram,
    #[error("the checksum of the PROXY protocol header is wrong")]
    Checksum,
}

/// Looks for a header at the start of `bytes`.
pub fn scan(bytes: &[u8]) -> Scan {
    let scanned = match bytes {
        _ if begins_like(bytes, V2_SIGNATURE) => scan_v2(bytes),
        _ if begins_like(bytes, V1_START) => scan_v1(bytes),
        _ => Err(HeaderError::Missing),
    };
    match scanned {
        Ok(Some((bytes, said))) => Scan::Complete { bytes, said },
        Ok(None) => Scan::Partial,
        Err(error) => Scan::Malformed(error),
    }
}

/// A header of version 2 for an upstream; without the ends it says that they are not known.
pub fn write_v2(ends: Option<Ends>) -> Vec<u8> {
    let mut out = Vec::with_capacity(52);
    out.extend_from_slice(V2_SIGNATURE);
    // Version 2, command PROXY.
    out.push(0x21);
    match ends.map(|ends| (ends.source.ip().to_canonical(), ends.destination.ip().to_canonical(), ends)) {
        Some((IpAddr::V4(source), IpAddr::V4(destination), ends)) => {
            out.extend_from_slice(&[0x11, 0, 12]);
            out.extend_from_slice(&source.octets());
            out.extend_from_slice(&destination.octets());
            push_ports(&mut out, ends);
        }
        // Of two families, each has a form in the larger one.
        Some((source, destination, ends)) => {
            out.extend_from_slice(&[0x21, 0, 36]);
            out.extend_from_slice(&as_v6(source).octets());
            out.extend_from_slice(&as_v6(destination).octets());
            push_ports(&mut out, ends);
        }
        None => out.extend_from_slice(&[0, 0, 0]),
    }
    out
}

/// Whether it is the start of what is `expected`, or begins with all of it.
fn begins_like(bytes: &[u8], expected: &[u8]) -> bool {
    let known = bytes.len().min(expected.len());
    bytes[..known] == expected[..known]
}

/// A header's length and contents; none while it is not complete.
type Scanned = Result<Option<(usize, Said)>, HeaderError>;

fn scan_v1(bytes: &[u8]) -> Scanned {
    let window = &bytes[..bytes.len().min(V1_BYTES_MAX)];
    let Some(newline) = window.iter().position(|b| *b == b'\n') else {
        return if window.len() < V1_BYTES_MAX { Ok(None) } else { Err(HeaderError::Line) };
    };
    let line = window[..newline].strip_suffix(b"\r").ok_or(HeaderError::Line)?;
    let line = std::str::from_utf8(line).map_err(|_| HeaderError::Line)?;
    let said = read_v1(line).ok_or(HeaderError::Line)?;
    Ok(Some((newline + 1, said)))
}

/// One line, without its CRLF.
fn read_v1(line: &str) -> Option<Said> {
    let mut words = line.split(' ');
    words.next()?;
    let family = words.next()?;
    if family == "UNKNOWN" {
        // Whatever follows is to be ignored.
        return Some(Said::Nothing);
    }
    let (source, destination): (IpAddr, IpAddr) = match family {
        "TCP4" => {
            (words.next()?.parse::<Ipv4Addr>().ok()?.into(), words.next()?.parse::<Ipv4Addr>().ok()?.into())
        }
        "TCP6" => {
            (words.next()?.parse::<Ipv6Addr>().ok()?.into(), words.next()?.parse::<Ipv6Addr>().ok()?.into())
        }
        _ => return None,
    };
    let (source_port, destination_port) = (read_port(words.next()?)?, read_port(words.next()?)?);
    let ends = Ends {
        source: SocketAddr::new(source, source_port),
        destination: SocketAddr::new(destination, destination_port),
    };
    words.next().is_none().then_some(Said::Ends(ends))
}

/// Digits without leading zeros.
fn read_port(text: &str) -> Option<u16> {
    let canonical = text == "0" || !text.starts_with('0');
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if canonical && digits { text.parse().ok() } else { None }
}

fn scan_v2(bytes: &[u8]) -> Scanned {
    let Some(fixed) = bytes.first_chunk::<V2_FIXED_BYTES>() else { return Ok(None) };
    let [.., command, family, high, low] = *fixed;
    let local = match command {
        0x20 => true,
        0x21 => false,
        _ => return Err(HeaderError::Kind),
    };
    let end = V2_FIXED_BYTES + usize::from(u16::from_be_bytes([high, low]));
    if end > V2_BYTES_MAX {
        return Err(HeaderError::TooLong);
    }
    let Some(header) = bytes.get(..end) else { return Ok(None) };
    let said = if local { Said::Nothing } else { read_v2(header, family)? };
    Ok(Some((end, said)))
}

/// A whole header with the command PROXY.
fn read_v2(header: &[u8], family: u8) -> Result<Said, HeaderError> {
    let after = &header[V2_FIXED_BYTES..];
    let (said, addresses_bytes) = match family {
        // Unspecified: whatever follows is to be ignored.
        0x00 => return Ok(Said::Nothing),
        0x11 => (Said::Ends(read_ends::<4>(after)?), 12),
        0x21 => (Said::Ends(read_ends::<16>(after)?), 36),
        0x31 => (Said::Nothing, 216),
        0x12 | 0x22 | 0x32 => return Err(HeaderError::Datagram),
        _ => return Err(HeaderError::Kind),
    };
    let mut tlvs = after.get(addresses_bytes..).ok_or(HeaderError::Length)?;
    while !tlvs.is_empty() {
        let [kind, high, low, rest @ ..] = tlvs else { return Err(HeaderError::Length) };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let (value, next) = rest.split_at_checked(length).ok_or(HeaderError::Length)?;
        if *kind == TLV_CRC32C {
            let at = header.len() - rest.len();
            check_sum(header, value, at)?;
        }
        tlvs = next;
    }
    Ok(said)
}

/// Two addresses of `N` bytes, and two ports.
fn read_ends<const N: usize>(bytes: &[u8]) -> Result<Ends, HeaderError>
where
    IpAddr: From<[u8; N]>,
{
    let short = HeaderError::Length;
    let (source, rest) = bytes.split_first_chunk::<N>().ok_or(short)?;
    let (destination, rest) = rest.split_first_chunk::<N>().ok_or(short)?;
    let [source_high, source_low, high, low, ..] = *rest else { return Err(short) };
    Ok(Ends {
        source: SocketAddr::new(IpAddr::from(*source), u16::from_be_bytes([source_high, source_low])),
        destination: SocketAddr::new(IpAddr::from(*destination), u16::from_be_bytes([high, low])),
    })
}

/// §2.2.4: over the whole header, with the checksum's own bytes taken as zeros. `at` is where they are.
fn check_sum(header: &[u8], value: &[u8], at: usize) -> Result<(), HeaderError> {
    let said: [u8; CRC32C_BYTES] = value.try_into().map_err(|_| HeaderError::Length)?;
    let mut sum = Crc32c::new();
    sum.add(&header[..at]);
    sum.add(&[0; CRC32C_BYTES]);
    sum.add(&header[at + CRC32C_BYTES..]);
    if sum.value() == u32::from_be_bytes(said) { Ok(()) } else { Err(HeaderError::Checksum) }
}

/// CRC-32C (RFC 9260, appendix A), bit by bit: at most 4 KiB once per connection, and hardly ever sent.
struct Crc32c(u32);

impl Crc32c {
    fn new() -> Self {
        Self(!0)
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 ^= u32::from(*byte);
            for _ in 0..8 {
                let low = self.0 & 1;
                self.0 = (self.0 >> 1) ^ (0x82F6_3B78 * low);
            }
        }
    }

    fn value(&self) -> u32 {
        !self.0
    }
}

fn push_ports(out: &mut Vec<u8>, ends: Ends) {
    out.extend_from_slice(&ends.source.port().to_be_bytes());
    out.extend_from_slice(&ends.destination.port().to_be_bytes());
}

fn as_v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(source: &str, destination: &str) -> Said {
        Said::Ends(Ends { source: source.parse().unwrap(), destination: destination.parse().unwrap() })
    }

    /// A header is found whole, with or without what follows, and every shorter start waits for more.
    fn check(header: &[u8], said: Said) {
        let complete = Scan::Complete { bytes: header.len(), said };
        assert_eq!(scan(header), complete, "{header:?}");
        assert_eq!(scan(&[header, b"GET / HTTP/1.1\r\n"].concat()), complete, "{header:?}");
        for end in 0..header.len() {
            assert_eq!(scan(&header[..end]), Scan::Partial, "{:?}", &header[..end]);
        }
    }

    fn refused(header: &[u8], error: HeaderError) {
        assert_eq!(scan(header), Scan::Malformed(error), "{:?}", String::from_utf8_lossy(header));
    }

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [&V2_SIGNATURE[..], &[command, family], &length, body].concat()
    }

    const V4_BODY: [u8; 12] = [192, 0, 2, 1, 198, 51, 100, 1, 0xdc, 0x04, 0x01, 0xbb];

    #[test]
    fn version_1_headers_are_read() {
        let v4 = ends("192.0.2.1:56324", "198.51.100.1:443");
        check(b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n", v4);
        check(b"PROXY TCP6 2001:db8::1 ::1 1 0\r\n", ends("[2001:db8::1]:1", "[::1]:0"));
        check(b"PROXY UNKNOWN\r\n", Said::Nothing);
        check(b"PROXY UNKNOWN ffff::1 whatever\r\n", Said::Nothing);
        let long = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
        let longest = format!("PROXY UNKNOWN {long} {long} 65535 65535\r\n");
        assert_eq!(longest.len(), V1_BYTES_MAX);
        check(longest.as_bytes(), Said::Nothing);
    }

    #[test]
    fn what_is_not_exactly_version_1_is_refused() {
        for line in [
            "PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\n",
            "PROXY TCP4  192.0.2.1 198.51.100.1 56324 443\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.1 56324 443 \r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.1 56324\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.1 65536 443\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.1 056324 443\r\n",
            "PROXY TCP4 192.0.2.1 198.51.100.1 +1 443\r\n",
            "PROXY TCP4 192.0.2.01 198.51.100.1 1 443\r\n",
            "PROXY TCP4 ::1 ::1 1 443\r\n",
            "PROXY TCP6 192.0.2.1 198.51.100.1 1 443\r\n",
            "PROXY TCP5 192.0.2.1 198.51.100.1 1 443\r\n",
            "PROXY UNKNOWNX\r\n",
            "PROXY \r\n",
            "PROXY \u{e9}\r\n",
        ] {
            refused(line.as_bytes(), HeaderError::Line);
        }
        refused(format!("PROXY UNKNOWN {}\r\n", "x".repeat(100)).as_bytes(), HeaderError::Line);
    }

    #[test]
    fn version_2_headers_are_read() {
        check(&v2(0x21, 0x11, &V4_BODY), ends("192.0.2.1:56324", "198.51.100.1:443"));
        let v6 = [&Ipv6Addr::LOCALHOST.octets()[..], &[0xfd; 16], &[0, 80, 1, 187]].concat();
        check(&v2(0x21, 0x21, &v6), ends("[::1]:80", "[fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd]:443"));
        check(&v2(0x21, 0x31, &[0; 216]), Said::Nothing);
        check(&v2(0x21, 0x00, b"whatever"), Said::Nothing);
        // What a LOCAL header carries is ignored, whatever it is.
        check(&v2(0x20, 0x11, &[1, 2, 3]), Said::Nothing);
        let tlvs = [&V4_BODY[..], &[0x02, 0, 4], b"name", &[0xE0, 0, 0]].concat();
        check(&v2(0x21, 0x11, &tlvs), ends("192.0.2.1:56324", "198.51.100.1:443"));
    }

    #[test]
    fn what_is_not_exactly_version_2_is_refused() {
        refused(&v2(0x11, 0x11, &V4_BODY), HeaderError::Kind);
        refused(&v2(0x22, 0x11, &V4_BODY), HeaderError::Kind);
        refused(&v2(0x21, 0x41, &V4_BODY), HeaderError::Kind);
        refused(&v2(0x21, 0x13, &V4_BODY), HeaderError::Kind);
        refused(&v2(0x21, 0x12, &V4_BODY), HeaderError::Datagram);
        refused(&v2(0x21, 0x11, &V4_BODY[..11]), HeaderError::Length);
        refused(&v2(0x21, 0x21, &[0; 35]), HeaderError::Length);
        refused(&v2(0x21, 0x31, &[0; 215]), HeaderError::Length);
        refused(&v2(0x21, 0x11, &[&V4_BODY[..], &[1, 0]].concat()), HeaderError::Length);
        refused(&v2(0x21, 0x11, &[&V4_BODY[..], &[1, 0, 2, 9]].concat()), HeaderError::Length);
        let mut long = v2(0x21, 0x11, &V4_BODY);
        long[14..16].copy_from_slice(&4081_u16.to_be_bytes());
        refused(&long, HeaderError::TooLong);
    }

    #[test]
    fn anything_else_is_no_header_from_its_first_wrong_byte() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"\x16\x03\x01",
            b"proxy TCP4",
            b"PROXZ",
            b"\r\n\r\n\r\n",
            b"PROXYTCP4",
        ] {
            refused(bytes, HeaderError::Missing);
        }
    }

    #[test]
    fn a_checksum_must_be_right() {
        let mut sum = Crc32c::new();
        sum.add(b"123456789");
        assert_eq!(sum.value(), 0xE306_9283, "the check value of CRC-32C");
        let mut header =
            v2(0x21, 0x11, &[&V4_BODY[..], &[TLV_CRC32C, 0, 4, 0, 0, 0, 0], &[4, 0, 1, 0]].concat());
        refused(&header, HeaderError::Checksum);
        let mut sum = Crc32c::new();
        sum.add(&header);
        let at = V2_FIXED_BYTES + 12 + 3;
        header[at..at + 4].copy_from_slice(&sum.value().to_be_bytes());
        check(&header, ends("192.0.2.1:56324", "198.51.100.1:443"));
        header[V2_FIXED_BYTES] ^= 1;
        refused(&header, HeaderError::Checksum);
        refused(&v2(0x21, 0x11, &[&V4_BODY[..], &[TLV_CRC32C, 0, 2, 0, 0]].concat()), HeaderError::Length);
    }

    #[test]
    fn a_header_of_ours_says_what_it_was_given() {
        for (source, destination, seen) in [
            ("192.0.2.1:1", "198.51.100.1:2", ("192.0.2.1:1", "198.51.100.1:2")),
            ("[2001:db8::1]:1", "[::1]:2", ("[2001:db8::1]:1", "[::1]:2")),
            ("[::ffff:192.0.2.1]:1", "198.51.100.1:2", ("192.0.2.1:1", "198.51.100.1:2")),
            ("192.0.2.1:1", "[::1]:2", ("[::ffff:192.0.2.1]:1", "[::1]:2")),
        ] {
            let given = Ends { source: source.parse().unwrap(), destination: destination.parse().unwrap() };
            check(&write_v2(Some(given)), ends(seen.0, seen.1));
        }
        check(&write_v2(None), Said::Nothing);
    }
}

//! The first message of a TLS client, as far as needed to find the name it asks for (RFC 8446 §4.1.2 and
//! §5.1, RFC 6066 §3). Nothing is decrypted, and nothing is changed: the bytes go on as they came.
//!
//! ```text
//! record     22 | 3, minor | length (2) | fragment         one message may lie in several records
//! message    1 | length (3) | version | random (32) | session id | suites | compressions | extensions
//! extension  0 | length (2) | list length (2) | 0 | name length (2) | name
//! ```

use std::cmp::Ordering;

/// Longest hello that is waited for, record headers included. What browsers send, with a post-quantum key
/// share, is below 2 KiB; a resumption ticket may add some.
pub const HELLO_BYTES_MAX: usize = 16 * 1024;
/// Most records it may come in. Some clients cut it in a few, to get past meddlers; many small ones would
/// only make us look at it again and again.
const RECORDS_MAX: usize = 64;

const RECORD_HEADER_BYTES: usize = 5;
const MESSAGE_HEADER_BYTES: usize = 4;
/// RFC 8446 §5.1.
const FRAGMENT_BYTES_MAX: usize = 1 << 14;
const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const HOST_NAME: u8 = 0;

/// What looking for a hello found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scan {
    /// A whole hello; the name it asks for, in lower case.
    Complete {
        server_name: Option<String>,
    },
    /// It may become one, but not before there are this many bytes.
    Partial {
        wants_bytes: usize,
    },
    Malformed(HelloError),
}

/// Why bytes are no hello. Each has the alert it is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    #[error("the connection does not begin with a TLS handshake")]
    NotTls,
    #[error("the TLS handshake does not begin with a ClientHello")]
    NotHello,
    #[error("the ClientHello is longer than {HELLO_BYTES_MAX} bytes, or in more than {RECORDS_MAX} records")]
    TooLong,
    #[error("the ClientHello is malformed")]
    Malformed,
    #[error("the server name in the ClientHello is no host name")]
    BadName,
}

impl HelloError {
    /// The alert that says so (RFC 8446 §6.2).
    pub fn alert(self) -> Alert {
        match self {
            HelloError::NotTls | HelloError::NotHello => Alert::UnexpectedMessage,
            HelloError::TooLong | HelloError::Malformed => Alert::DecodeError,
            HelloError::BadName => Alert::IllegalParameter,
        }
    }
}

/// The alerts with which a client is turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alert {
    UnexpectedMessage,
    IllegalParameter,
    DecodeError,
    UnrecognizedName,
}

impl Alert {
    /// The alert in a record of its own, in plain text as before any handshake.
    pub fn write(self) -> Vec<u8> {
        let description = match self {
            Alert::UnexpectedMessage => 10,
            Alert::IllegalParameter => 47,
            Alert::DecodeError => 50,
            Alert::UnrecognizedName => 112,
        };
        // An alert of TLS 1.2's record version, two bytes long, fatal.
        vec![21, 3, 3, 0, 2, 2, description]
    }
}

/// Looks for a ClientHello at the start of `bytes`.
pub fn scan(bytes: &[u8]) -> Scan {
    let message = match gather(bytes) {
        Ok(Gathered::Whole(message)) => message,
        Ok(Gathered::Partial { wants_bytes }) => return Scan::Partial { wants_bytes },
        Err(error) => return Scan::Malformed(error),
    };
    match read_hello(&message) {
        Ok(server_name) => Scan::Complete { server_name },
        Err(error) => Scan::Malformed(error),
    }
}

/// The first handshake message, as far as it has come.
enum Gathered {
    /// The body of the ClientHello.
    Whole(Vec<u8>),
    Partial {
        wants_bytes: usize,
    },
}

/// Joins the fragments of the first handshake message.
fn gather(bytes: &[u8]) -> Result<Gathered, HelloError> {
    let (mut at, mut message) = (0, Vec::new());
    for _ in 0..RECORDS_MAX {
        let end = at + record_bytes(&bytes[at..])?;
        if end > HELLO_BYTES_MAX {
            return Err(HelloError::TooLong);
        }
        let Some(record) = bytes.get(at..end).filter(|record| record.len() > RECORD_HEADER_BYTES) else {
            return Ok(Gathered::Partial { wants_bytes: end });
        };
        message.extend_from_slice(&record[RECORD_HEADER_BYTES..]);
        at = end;
        if is_whole(&message)? {
            return Ok(Gathered::Whole(message.split_off(MESSAGE_HEADER_BYTES)));
        }
    }
    Err(HelloError::TooLong)
}

/// How long the record is that begins here, as far as can be told: at least its header. What is not TLS
/// is known by its first byte.
fn record_bytes(bytes: &[u8]) -> Result<usize, HelloError> {
    if !matches!(bytes, [] | [HANDSHAKE] | [HANDSHAKE, 3, ..]) {
        return Err(HelloError::NotTls);
    }
    let [_, _, _, high, low, ..] = *bytes else { return Ok(RECORD_HEADER_BYTES) };
    match usize::from(u16::from_be_bytes([high, low])) {
        // RFC 8446 §5.1: handshake messages have no empty fragments.
        0 => Err(HelloError::Malformed),
        length if length > FRAGMENT_BYTES_MAX => Err(HelloError::Malformed),
        length => Ok(RECORD_HEADER_BYTES + length),
    }
}

/// Whether the message is a ClientHello that is all there. Nothing may follow it in its record: the client
/// has nothing else to say before it is answered, but for early data, which has records of its own.
fn is_whole(message: &[u8]) -> Result<bool, HelloError> {
    if message.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
        return Err(HelloError::NotHello);
    }
    let [_, high, middle, low, body @ ..] = message else { return Ok(false) };
    let length = usize::from(*high) << 16 | usize::from(*middle) << 8 | usize::from(*low);
    match body.len().cmp(&length) {
        _ if length > HELLO_BYTES_MAX => Err(HelloError::TooLong),
        Ordering::Less => Ok(false),
        Ordering::Equal => Ok(true),
        Ordering::Greater => Err(HelloError::Malformed),
    }
}

/// The name in the body of a ClientHello; none when it has no such extension.
fn read_hello(body: &[u8]) -> Result<Option<String>, HelloError> {
    let mut body = Reader(body);
    let version = body.take(2)?;
    if version[0] != 3 {
        return Err(HelloError::Malformed);
    }
    body.take(32)?;
    let session_id = body.vector::<1>()?;
    let suites = body.vector::<2>()?;
    let compressions = body.vector::<1>()?;
    let odd = !suites.0.len().is_multiple_of(2);
    if session_id.0.len() > 32 || suites.0.is_empty() || odd || compressions.0.is_empty() {
        return Err(HelloError::Malformed);
    }
    // RFC 5246 §7.4.1.2: a hello may end here.
    if body.0.is_empty() {
        return Ok(None);
    }
    let mut extensions = body.vector::<2>()?;
    body.ends()?;
    let (mut kinds, mut name) = (Vec::new(), None);
    while !extensions.0.is_empty() {
        let kind = extensions.number::<2>()?;
        let content = extensions.vector::<2>()?;
        kinds.push(kind);
        if kind == usize::from(SERVER_NAME) {
            name = Some(read_name(content)?);
        }
    }
    // RFC 8446 §4.2: none twice.
    kinds.sort_unstable();
    match kinds.windows(2).any(|pair| pair[0] == pair[1]) {
        true => Err(HelloError::Malformed),
        false => Ok(name),
    }
}

/// The one host name of a server name list. Other kinds of names were never defined, and more than one of
/// a kind is not allowed (RFC 6066 §3).
fn read_name(mut content: Reader<'_>) -> Result<String, HelloError> {
    let mut list = content.vector::<2>()?;
    content.ends()?;
    if list.number::<1>()? != usize::from(HOST_NAME) {
        return Err(HelloError::Malformed);
    }
    let name = list.vector::<2>()?;
    list.ends()?;
    normal_name(name.0).ok_or(HelloError::BadName)
}

/// The form in which server names are compared. RFC 6066 §3: a DNS host name in ASCII, without a trailing
/// dot, and no IP address; underscores are let through, since names in use have them.
pub fn normal_name(name: &[u8]) -> Option<String> {
    let is_label = |label: &[u8]| {
        let allowed = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        (1..=63).contains(&label.len()) && label.iter().all(allowed)
    };
    let last = name.rsplit(|b| *b == b'.').next()?;
    let is_address = last.iter().all(u8::is_ascii_digit);
    if name.len() > 253 || is_address || !name.split(|b| *b == b'.').all(is_label) {
        return None;
    }
    Some(name.iter().map(|b| b.to_ascii_lowercase() as char).collect())
}

/// What is left of a structure.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], HelloError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(HelloError::Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    /// A number of `N` bytes.
    fn number<const N: usize>(&mut self) -> Result<usize, HelloError> {
        Ok(self.take(N)?.iter().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    }

    /// What follows a length of `N` bytes, as long as that says.
    fn vector<const N: usize>(&mut self) -> Result<Reader<'a>, HelloError> {
        let length = self.number::<N>()?;
        self.take(length).map(Reader)
    }

    /// That nothing is left.
    fn ends(&self) -> Result<(), HelloError> {
        if self.0.is_empty() { Ok(()) } else { Err(HelloError::Malformed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A vector with its length in `N` bytes before it.
    fn vector<const N: usize>(content: &[u8]) -> Vec<u8> {
        let length = content.len().to_be_bytes();
        [&length[length.len() - N..], content].concat()
    }

    fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &vector::<2>(content)].concat()
    }

    fn server_name(name: &[u8]) -> Vec<u8> {
        extension(SERVER_NAME, &vector::<2>(&[&[HOST_NAME][..], &vector::<2>(name)].concat()))
    }

    fn body(extensions: &[u8]) -> Vec<u8> {
        let ids = [vector::<1>(&[7; 32]), vector::<2>(&[0x13, 1, 0x13, 2]), vector::<1>(&[0])].concat();
        [&[3, 3][..], &[9; 32], &ids, &vector::<2>(extensions)].concat()
    }

    fn message(body: &[u8]) -> Vec<u8> {
        [&[CLIENT_HELLO][..], &vector::<3>(body)].concat()
    }

    fn records(message: &[u8], size: usize) -> Vec<u8> {
        message.chunks(size).flat_map(|part| [&[HANDSHAKE, 3, 1][..], &vector::<2>(part)].concat()).collect()
    }

    fn hello(extensions: &[u8]) -> Vec<u8> {
        records(&message(&body(extensions)), FRAGMENT_BYTES_MAX)
    }

    fn named(name: &str) -> Scan {
        Scan::Complete { server_name: Some(name.to_owned()) }
    }

    fn refused(bytes: &[u8], error: HelloError) {
        assert_eq!(scan(bytes), Scan::Malformed(error), "{bytes:?}");
    }

    #[test]
    fn the_name_is_found_wherever_it_stands_and_however_it_is_cut() {
        let others =
            [extension(43, &[2, 3, 4]), server_name(b"Db.Example"), extension(51, &[1; 1200])].concat();
        for size in [31, 100, 517, FRAGMENT_BYTES_MAX] {
            let bytes = records(&message(&body(&others)), size);
            assert_eq!(scan(&bytes), named("db.example"));
            // Early data, in a record of its own.
            assert_eq!(scan(&[&bytes[..], &[23, 3, 3, 0, 1, 0]].concat()), named("db.example"));
            let mut wants = 0;
            for end in 0..bytes.len() {
                let Scan::Partial { wants_bytes } = scan(&bytes[..end]) else { panic!("{end} of {size}") };
                assert!(wants_bytes > end && wants_bytes >= wants && wants_bytes <= bytes.len());
                wants = wants_bytes;
            }
        }
    }

    #[test]
    fn a_hello_may_have_no_name() {
        assert_eq!(scan(&hello(&extension(43, &[2, 3, 4]))), Scan::Complete { server_name: None });
        let mut old = body(&[]);
        old.truncate(old.len() - 2);
        assert_eq!(scan(&records(&message(&old), 9_999)), Scan::Complete { server_name: None });
    }

    #[test]
    fn what_is_not_tls_is_known_by_its_first_bytes() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"\x80\x2e\x01\x00\x02",
            &[HANDSHAKE, 2],
            &[21, 3, 3, 0, 2, 1, 0],
            &[0],
        ] {
            refused(bytes, HelloError::NotTls);
        }
        refused(&records(&[2, 0, 0, 0], 4), HelloError::NotHello);
        refused(&[HANDSHAKE, 3, 1, 0, 0], HelloError::Malformed);
        refused(&[HANDSHAKE, 3, 1, 0x40, 1], HelloError::Malformed);
        let whole = hello(&server_name(b"a.b"));
        let cut = [&whole[..20], &[0]].concat();
        assert!(matches!(scan(&cut), Scan::Partial { .. }));
        let first = records(&message(&body(&[]))[..20], 20);
        refused(&[&first[..], b"x"].concat(), HelloError::NotTls);
    }

    #[test]
    fn one_that_is_too_long_is_refused_before_it_has_come() {
        let long = message(&body(&extension(21, &[0; 17_000])));
        refused(&records(&long, FRAGMENT_BYTES_MAX)[..5], HelloError::TooLong);
        refused(&records(&long, 1_000)[..1_005], HelloError::TooLong);
        refused(&records(&message(&body(&extension(21, &[0; 200]))), 2), HelloError::TooLong);
    }

    #[test]
    fn names_that_are_none_are_refused() {
        let ok = "a".repeat(63);
        for name in ["a", "a.b-c.D_e", "xn--bcher-kva.example", &ok] {
            assert_eq!(scan(&hello(&server_name(name.as_bytes()))), named(&name.to_ascii_lowercase()));
        }
        let long = [ok.as_str(); 4].join(".");
        for name in [
            "",
            ".",
            "a.",
            ".a",
            "a..b",
            "a b",
            "a:443",
            "a/b",
            "*.a",
            "a\0b",
            "192.0.2.1",
            "[::1]",
            "::1",
            "b\u{fc}cher",
            &long,
        ] {
            refused(&hello(&server_name(name.as_bytes())), HelloError::BadName);
        }
    }

    #[test]
    fn structures_that_do_not_add_up_are_refused() {
        let one = server_name(b"a.b");
        let two_names = [&[HOST_NAME][..], &vector::<2>(b"a"), &[HOST_NAME], &vector::<2>(b"b")].concat();
        for extensions in [
            [one.clone(), one.clone()].concat(),
            [extension(43, &[]), one.clone(), extension(43, &[])].concat(),
            extension(SERVER_NAME, &[]),
            extension(SERVER_NAME, &vector::<2>(&[])),
            extension(SERVER_NAME, &vector::<2>(&two_names)),
            extension(SERVER_NAME, &vector::<2>(&[&[1][..], &vector::<2>(b"a")].concat())),
            extension(
                SERVER_NAME,
                &[&vector::<2>(&[&[HOST_NAME][..], &vector::<2>(b"a")].concat())[..], &[0]].concat(),
            ),
            one[..one.len() - 1].to_vec(),
            vec![0],
        ] {
            refused(&hello(&extensions), HelloError::Malformed);
        }
        let whole = body(&one);
        for end in [0, 1, 33, 34, 40, 66, 71, 73, 74, whole.len() - 1] {
            refused(&records(&message(&whole[..end]), 9_999), HelloError::Malformed);
        }
        refused(&records(&message(&[&whole[..], &[0]].concat()), 9_999), HelloError::Malformed);
        refused(&records(&[&message(&whole)[..], &[0]].concat(), 9_999), HelloError::Malformed);
        let mut version_2 = whole.clone();
        version_2[0] = 2;
        refused(&records(&message(&version_2), 9_999), HelloError::Malformed);
    }

    #[test]
    fn each_error_has_its_alert() {
        assert_eq!(Alert::UnrecognizedName.write(), [21, 3, 3, 0, 2, 2, 112]);
        assert_eq!(HelloError::TooLong.alert().write().last(), Some(&50));
    }
}

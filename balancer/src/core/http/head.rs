//! Finding and cutting up a message head: start line and fields (RFC 9112 §2 to §5).
//!
//! Strict where leniency has caused request smuggling: a line ends in CRLF and nothing else, no control
//! byte is let through, no blank before a colon, no folded line. Lenient only where the RFC asks for it: up
//! to two empty lines before a request line (§2.2).

use std::ops::Range;

/// Most fields a head may have.
pub const FIELDS_MAX: usize = 128;
/// Empty lines skipped before a request line.
const EMPTY_LINES_MAX: usize = 2;

/// HTTP/1.0 or HTTP/1.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    Http10,
    Http11,
}

/// What looking for the end of a head found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scan {
    /// The head is complete; its bytes are these.
    Complete { start: usize, end: usize },
    /// More is needed; go on looking from here.
    Partial { from: usize },
    /// It can never become a head.
    Malformed(HeadError),
}

/// Why a head is refused. Each has one meaning and one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    #[error("a line does not end in CRLF")]
    BareLineEnd,
    #[error("this is not HTTP")]
    NotHttp,
    #[error("the request line is malformed")]
    RequestLine,
    #[error("the request target is malformed")]
    Target,
    #[error("the status line is malformed")]
    StatusLine,
    #[error("the HTTP version is not supported")]
    Version,
    #[error("a header field is malformed")]
    Field,
    #[error("there are too many header fields")]
    TooManyFields,
    #[error("the Host header is missing, repeated or malformed")]
    Host,
    #[error("the length of the body is ambiguous")]
    BodyLength,
    #[error("the transfer coding is not supported")]
    TransferCoding,
    #[error("the method is not supported")]
    Method,
}

/// One field line: `name: value`, the value without surrounding blanks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field<'a> {
    pub name: &'a [u8],
    pub value: &'a [u8],
}

impl Field<'_> {
    /// Names are compared without regard to case (RFC 9110 §5.1).
    pub fn is(&self, name: &str) -> bool {
        self.name.eq_ignore_ascii_case(name.as_bytes())
    }

    /// The elements of a comma-separated list value (RFC 9110 §5.6.1), empty ones left out.
    pub fn list(&self) -> impl Iterator<Item = &[u8]> {
        self.value.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|element| !element.is_empty())
    }
}

/// Looks for the empty line that ends a head, from where an earlier scan of the same bytes stopped.
pub fn find_end(bytes: &[u8], from: usize) -> Scan {
    let mut start = 0;
    for _ in 0..EMPTY_LINES_MAX {
        if bytes[start..].starts_with(b"\r\n") {
            start += 2;
        }
    }
    match bytes.get(start) {
        Some(b'\r') if bytes.len() == start + 1 => {}
        Some(first) if !is_token_byte(*first) => return Scan::Malformed(HeadError::NotHttp),
        _ => {}
    }
    let mut from = from.max(start);
    while let Some(offset) = bytes[from..].iter().position(|b| *b == b'\n') {
        let newline = from + offset;
        if newline == 0 || bytes[newline - 1] != b'\r' {
            return Scan::Malformed(HeadError::BareLineEnd);
        }
        if newline >= start + 3 && bytes[newline - 2] == b'\n' {
            return Scan::Complete { start, end: newline + 1 };
        }
        from = newline + 1;
    }
    Scan::Partial { from: bytes.len() }
}

/// The start line of a request, and its fields.
#[derive(Debug)]
pub struct RequestHead<'a> {
    pub method: &'a [u8],
    pub target: &'a [u8],
    pub version: Version,
    pub fields: Vec<Field<'a>>,
}

/// The start line of a response, and its fields.
#[derive(Debug)]
pub struct ResponseHead<'a> {
    pub version: Version,
    pub status: u16,
    pub reason: &'a [u8],
    pub fields: Vec<Field<'a>>,
}

/// Cuts up a complete request head.
pub fn parse_request(head: &[u8]) -> Result<RequestHead<'_>, HeadError> {
    let (line, rest) = cut_line(head).ok_or(HeadError::RequestLine)?;
    let mut parts = line.split(|b| *b == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(HeadError::RequestLine);
    };
    if method.is_empty() || !method.iter().all(|b| is_token_byte(*b)) {
        return Err(HeadError::RequestLine);
    }
    if target.is_empty() || !target.iter().all(|b| b.is_ascii_graphic() && *b != b'#') {
        return Err(HeadError::Target);
    }
    Ok(RequestHead { method, target, version: parse_version(version)?, fields: parse_fields(rest)? })
}

/// Cuts up a complete response head.
pub fn parse_response(head: &[u8]) -> Result<ResponseHead<'_>, HeadError> {
    let (line, rest) = cut_line(head).ok_or(HeadError::StatusLine)?;
    if line.len() < 12 || line[8] != b' ' || !line[9..12].iter().all(u8::is_ascii_digit) {
        return Err(HeadError::StatusLine);
    }
    let version = parse_version(&line[..8])?;
    let status = line[9..12].iter().fold(0, |status, digit| status * 10 + u16::from(digit - b'0'));
    let reason = match &line[12..] {
        [] => &[][..],
        [b' ', reason @ ..] if reason.iter().all(|b| is_text_byte(*b)) => reason,
        _ => return Err(HeadError::StatusLine),
    };
    if !(100..=599).contains(&status) {
        return Err(HeadError::StatusLine);
    }
    Ok(ResponseHead { version, status, reason, fields: parse_fields(rest)? })
}

fn parse_version(bytes: &[u8]) -> Result<Version, HeadError> {
    match bytes {
        b"HTTP/1.1" => Ok(Version::Http11),
        b"HTTP/1.0" => Ok(Version::Http10),
        // RFC 9112 §2.3: a higher minor version of the same major one is understood as our own.
        [b'H', b'T', b'T', b'P', b'/', b'1', b'.', minor] if minor.is_ascii_digit() => Ok(Version::Http11),
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor]
            if major.is_ascii_digit() && minor.is_ascii_digit() =>
        {
            Err(HeadError::Version)
        }
        _ => Err(HeadError::RequestLine),
    }
}

/// Field lines up to and including the empty line.
fn parse_fields(mut rest: &[u8]) -> Result<Vec<Field<'_>>, HeadError> {
    let mut fields = Vec::with_capacity(16);
    loop {
        let (line, after) = cut_line(rest).ok_or(HeadError::Field)?;
        if line.is_empty() {
            return if after.is_empty() { Ok(fields) } else { Err(HeadError::Field) };
        }
        if fields.len() == FIELDS_MAX {
            return Err(HeadError::TooManyFields);
        }
        fields.push(parse_field(line)?);
        rest = after;
    }
}

/// One field line. The name must be a token right up to the colon, which also refuses folded lines and
/// blanks before the colon (RFC 9112 §5.1, §5.2).
pub fn parse_field(line: &[u8]) -> Result<Field<'_>, HeadError> {
    let colon = line.iter().position(|b| *b == b':').ok_or(HeadError::Field)?;
    let name = &line[..colon];
    let value = trim_blanks(&line[colon + 1..]);
    if name.is_empty() || !name.iter().all(|b| is_token_byte(*b)) || !value.iter().all(|b| is_text_byte(*b)) {
        return Err(HeadError::Field);
    }
    Ok(Field { name, value })
}

fn cut_line(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let newline = bytes.iter().position(|b| *b == b'\n')?;
    let line = bytes[..newline].strip_suffix(b"\r")?;
    Some((line, &bytes[newline + 1..]))
}

fn trim_blanks(bytes: &[u8]) -> &[u8] {
    let is_text = |b: &u8| !matches!(b, b' ' | b'\t');
    let range: Range<usize> = match (bytes.iter().position(is_text), bytes.iter().rposition(is_text)) {
        (Some(first), Some(last)) => first..last + 1,
        _ => 0..0,
    };
    &bytes[range]
}

/// RFC 9110 §5.6.2.
pub fn is_token_byte(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

/// What a field value or a reason phrase may hold (RFC 9110 §5.5): blanks, visible bytes and obs-text; no
/// CR, LF, NUL or other control.
pub fn is_text_byte(b: u8) -> bool {
    matches!(b, b'\t' | b' '..=b'~' | 0x80..)
}

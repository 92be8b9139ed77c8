//! The request of an HTTP check, and whether its answer is good.

use crate::core::http::body::Body;
use crate::core::http::head::{self, HeadError, Scan, Version};
use crate::core::http::response::{self, Asked, ResponsePlan};
use crate::table::HttpCheck;

/// How much of a response's head, and of its body, is looked at.
const BYTES_MAX: usize = 64 * 1024;

/// The answer of an upstream, as far as it has come.
#[derive(Debug, Default)]
pub struct Reading {
    /// Bytes not yet understood.
    unread: Vec<u8>,
    scanned: usize,
    /// Of the response proper: what is left of its body, and the text so far.
    body: Option<(Body, Vec<u8>)>,
}

/// What is known of the answer.
pub type Judgement = Option<Result<(), String>>;

/// The request, its connection to be closed after it.
pub fn request(check: &HttpCheck) -> Vec<u8> {
    let HttpCheck { path, host, .. } = check;
    format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: epagent-balancer\r\nAccept: */*\r\n\
         Connection: close\r\n\r\n"
    )
    .into_bytes()
}

impl Reading {
    /// Takes in what came; a judgement as soon as there can be one.
    pub fn take(&mut self, bytes: &[u8], check: &HttpCheck) -> Judgement {
        self.unread.extend_from_slice(bytes);
        while self.body.is_none() {
            match head::find_end(&self.unread, self.scanned) {
                Scan::Complete { start: 0, end } if end <= BYTES_MAX => {
                    let judged = self.read_head(end, check);
                    self.unread.drain(..end);
                    self.scanned = 0;
                    match judged {
                        Ok(true) => return Some(Ok(())),
                        Ok(false) => {}
                        Err(why) => return Some(Err(why)),
                    }
                }
                Scan::Partial { from } if self.unread.len() <= BYTES_MAX => {
                    self.scanned = from;
                    return None;
                }
                _ => return Some(Err(format!("{} answered no HTTP/1.1", shown(check)))),
            }
        }
        self.read_body(check)
    }

    /// Nothing more will come.
    pub fn end(&self, check: &HttpCheck) -> Result<(), String> {
        match self.body {
            Some(_) => Err(lacks_text(check)),
            None => Err(format!("{} was closed without an answer", shown(check))),
        }
    }

    /// True when the head alone decides; false when there is more to read.
    fn read_head(&mut self, end: usize, check: &HttpCheck) -> Result<bool, String> {
        let asked = Asked { is_head: false, upgrade: false, version: Version::Http11, keep_alive: false };
        let plan = head::parse_response(&self.unread[..end]).and_then(|head| response::plan(&head, asked));
        let plan = match plan {
            Ok(ResponsePlan::Interim { .. }) => return Ok(false),
            Ok(ResponsePlan::Final(plan)) => plan,
            Ok(ResponsePlan::Switch { .. }) | Err(_) => {
                let error = plan.err().unwrap_or(HeadError::StatusLine);
                return Err(format!("{} answered what is refused: {error}", shown(check)));
            }
        };
        let (first, last) = check.status;
        if !(first..=last).contains(&plan.status) {
            return Err(format!("{} answered {}, expected {first}-{last}", shown(check), plan.status));
        }
        self.body = Some((plan.body, Vec::new()));
        Ok(check.body.is_none())
    }

    fn read_body(&mut self, check: &HttpCheck) -> Judgement {
        let (body, text) = self.body.as_mut()?;
        let wanted = check.body.as_deref()?.as_bytes();
        let bytes = std::mem::take(&mut self.unread);
        let mut plain = Vec::new();
        if body.feed(&bytes, Some(&mut plain)).is_err() {
            return Some(Err(format!("{} answered a malformed body", shown(check))));
        }
        // What was looked through before can only be the beginning of a match.
        let from = text.len().saturating_sub(wanted.len() - 1);
        for range in plain {
            text.extend_from_slice(&bytes[range]);
        }
        text.truncate(BYTES_MAX);
        if text[from..].windows(wanted.len()).any(|window| window == wanted) {
            return Some(Ok(()));
        }
        (body.is_done() || text.len() == BYTES_MAX).then(|| Err(lacks_text(check)))
    }
}

fn shown(check: &HttpCheck) -> String {
    format!("GET {}", check.path)
}

fn lacks_text(check: &HttpCheck) -> String {
    format!("{} answered without {:?}", shown(check), check.body.as_deref().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: Option<&str>) -> HttpCheck {
        let body = body.map(str::to_owned);
        HttpCheck { path: "/healthz".to_owned(), host: "a".to_owned(), status: (200, 399), body }
    }

    /// Takes an answer in pieces of every size.
    fn judge(answer: &[u8], check: &HttpCheck) -> Result<(), String> {
        let judge = |size: usize| {
            let mut reading = Reading::default();
            let mut pieces = answer.chunks(size);
            pieces.find_map(|piece| reading.take(piece, check)).unwrap_or_else(|| reading.end(check))
        };
        let whole = judge(answer.len().max(1));
        assert!([1, 2, 3, 7].into_iter().all(|size| judge(size) == whole), "pieces decide");
        whole
    }

    #[test]
    fn a_status_in_range_passes_and_any_other_is_named() {
        let check = check(None);
        assert_eq!(judge(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", &check), Ok(()));
        assert_eq!(judge(b"HTTP/1.0 302 Found\r\nLocation: /\r\n\r\n", &check), Ok(()));
        assert_eq!(judge(b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 204 Done\r\n\r\n", &check), Ok(()));
        for (answer, why) in [
            (
                &b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"[..],
                "GET /healthz answered 503, expected 200-399",
            ),
            (b"", "GET /healthz was closed without an answer"),
            (b"HTTP/1.1 200 OK\r\nContent-", "GET /healthz was closed without an answer"),
            (b"SSH-2.0-x\r\n\r\n", "GET /healthz answered what is refused: the status line is malformed"),
        ] {
            assert_eq!(judge(answer, &check), Err(why.to_owned()));
        }
    }

    #[test]
    fn the_text_is_found_wherever_the_pieces_end() {
        let check = check(Some("all is well"));
        for answer in [
            &b"HTTP/1.1 200 OK\r\nContent-Length: 19\r\n\r\nsay: all is well ok"[..],
            b"HTTP/1.1 200 OK\r\n\r\nall is well",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nall i\r\n6\r\ns well\r\n0\r\n\r\n",
        ] {
            assert_eq!(judge(answer, &check), Ok(()));
        }
        for answer in [
            &b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nall is wellall is well"[..10],
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nall i",
            b"HTTP/1.1 200 OK\r\n\r\nall is lost",
        ] {
            assert!(judge(answer, &check).is_err());
        }
        let late =
            [b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), vec![b'x'; BYTES_MAX], b"all is well".to_vec()].concat();
        assert_eq!(judge(&late, &check), Err("GET /healthz answered without \"all is well\"".to_owned()));
    }
}

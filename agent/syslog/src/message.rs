//! A message of RFC 5424, and its frame.
//!
//! ```text
//! 139 <134>1 2026-11-22T03:15:00.123456Z node1 shop web.0 stdout [epagent@32473 app="shop" instance="shop-web-1"] hello
//! └ octets of what follows
//! ```
//!
//! Every field of the header is cut and cleaned to what the grammar allows, whatever it was made of: a tenant's bytes
//! are in the text, and only there.

use std::fmt::Write;

/// The id of our structured data. The number is the one that RFC 5612 reserves for documentation: epagent has none.
pub const SD_ID: &str = "epagent@32473";

/// Longest HOSTNAME, APP-NAME, PROCID and MSGID (RFC 5424, 6).
const HOSTNAME_MAX: usize = 255;
const APP_NAME_MAX: usize = 48;
const PROC_ID_MAX: usize = 128;
const MSG_ID_MAX: usize = 32;
/// Longest name of a parameter.
const PARAM_NAME_MAX: usize = 32;

/// Of RFC 5424, table 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Facility {
    /// What the agent's own processes say.
    Daemon,
    /// What apps print.
    Local0,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub facility: Facility,
    /// 0 to 7, table 2.
    pub severity: u8,
    /// As RFC 3339 writes it; empty when it is not known.
    pub timestamp: String,
    pub app_name: String,
    pub proc_id: String,
    pub msg_id: String,
    /// Parameters of the one element of structured data.
    pub data: Vec<(String, String)>,
    pub text: Vec<u8>,
}

impl Message {
    /// RFC 3339 of microseconds since 1970.
    pub fn timestamp_of(at_us: u64) -> String {
        let at = i64::try_from(at_us).ok().and_then(|us| jiff::Timestamp::from_microsecond(us).ok());
        at.map(|at| format!("{at:.6}")).unwrap_or_default()
    }

    /// Appends the message in its frame.
    pub fn frame(&self, hostname: &str, out: &mut Vec<u8>) {
        let head = self.head(hostname);
        let length = head.len() + self.text.len();
        out.extend_from_slice(format!("{length} {head}").as_bytes());
        out.extend_from_slice(&self.text);
    }

    fn head(&self, hostname: &str) -> String {
        let facility = match self.facility {
            Facility::Daemon => 3,
            Facility::Local0 => 16,
        };
        let priority = facility * 8 + u32::from(self.severity.min(7));
        let mut head = format!(
            "<{priority}>1 {} {} {} {} {} ",
            token(&self.timestamp, 32),
            token(hostname, HOSTNAME_MAX),
            token(&self.app_name, APP_NAME_MAX),
            token(&self.proc_id, PROC_ID_MAX),
            token(&self.msg_id, MSG_ID_MAX),
        );
        match self.data.is_empty() {
            true => head.push('-'),
            false => self.put_data(&mut head),
        }
        if !self.text.is_empty() {
            head.push(' ');
        }
        head
    }

    fn put_data(&self, head: &mut String) {
        head.push('[');
        head.push_str(SD_ID);
        for (name, value) in &self.data {
            let name = token(name, PARAM_NAME_MAX).replace(['=', ']', '"'], "_");
            // Writing to a string cannot fail.
            let _ = write!(head, " {name}=\"");
            for c in value.chars() {
                if matches!(c, '"' | '\\' | ']') {
                    head.push('\\');
                }
                head.push(c);
            }
            head.push('"');
        }
        head.push(']');
    }
}

/// PRINTUSASCII of at most `max` characters; `-` for nothing.
fn token(text: &str, max: usize) -> String {
    let clean = text.chars().take(max).map(|c| if c.is_ascii_graphic() { c } else { '_' });
    let clean: String = clean.collect();
    if clean.is_empty() { "-".to_owned() } else { clean }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> Message {
        Message {
            facility: Facility::Local0,
            severity: 6,
            timestamp: Message::timestamp_of(1_700_000_000_123_456),
            app_name: "shop".to_owned(),
            proc_id: "web.0".to_owned(),
            msg_id: "stdout".to_owned(),
            data: vec![("app".to_owned(), "shop".to_owned())],
            text: b"hello\nworld \xff".to_vec(),
        }
    }

    fn framed(message: &Message) -> Vec<u8> {
        let mut out = Vec::new();
        message.frame("node1", &mut out);
        out
    }

    #[test]
    fn a_message_reads_as_the_standard_says() {
        let mut expected =
            b"99 <134>1 2023-11-14T22:13:20.123456Z node1 shop web.0 stdout [epagent@32473 app=\"shop\"] "
                .to_vec();
        expected.extend_from_slice(b"hello\nworld \xff");
        assert_eq!(framed(&message()), expected, "{}", String::from_utf8_lossy(&framed(&message())));
        let empty = Message { data: Vec::new(), text: Vec::new(), timestamp: String::new(), ..message() };
        assert_eq!(framed(&empty), b"34 <134>1 - node1 shop web.0 stdout -");
    }

    #[test]
    fn nothing_of_a_field_gets_out_of_it() {
        let hostile = Message {
            app_name: "a b\n<0>1".to_owned(),
            proc_id: "ü".repeat(200),
            data: vec![("a=\"]".to_owned(), "x\"] y\\".to_owned())],
            ..message()
        };
        let text = String::from_utf8_lossy(&framed(&hostile)).into_owned();
        assert!(text.contains(&format!(" a_b_<0>1 {} stdout ", "_".repeat(128))), "{text}");
        assert!(text.contains(r#"[epagent@32473 a___="x\"\] y\\"] hello"#), "{text}");
    }
}

//! The actions that need no upstream, and the pages that may stand in for the balancer's own answers.
//!
//! Each says all of its response in the table, so that it goes on when every app, the agent and the disk
//! are gone. What a request brings into a response (the path of a redirect) has passed the strict head
//! parser before; what the table brings is checked here, so that no line of it can become a header of its
//! own.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::{Action, Match, Route, normal_host, normal_pattern};

/// Largest body of a static page or a replaced answer, in bytes.
pub const BODY_BYTES_MAX: usize = 64 * 1024;
/// Longest content type, in bytes.
pub const CONTENT_TYPE_BYTES_MAX: usize = 200;
/// Longest address a redirect may lead to, in bytes, without the kept path.
pub const REDIRECT_BYTES_MAX: usize = 2 * 1024;
/// Most aliases between a host and the route that serves it.
pub const ALIAS_DEPTH_MAX: usize = 8;

/// A page of the operator's: a notice, a robots.txt for staging, a whole parked site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaticPage {
    /// 200 to 599, except those that have no body (204, 205, 304).
    #[serde(default = "ok")]
    pub status: u16,
    #[serde(default = "html")]
    pub content_type: String,
    /// At most [`BODY_BYTES_MAX`].
    pub body: String,
}

/// Sends the client elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redirect {
    /// An absolute http or https address without user information and fragment. With `keep_path` it has no
    /// query either: the request's path and query are put behind it.
    pub to: String,
    /// 301, 302, 303, 307 or 308.
    #[serde(default = "found")]
    pub status: u16,
    #[serde(default = "yes")]
    pub keep_path: bool,
}

/// A response that is nothing but its status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Empty {
    /// 200 to 599.
    pub status: u16,
}

/// Another name for the route that serves `host`: its action, its limits and its counters. The app sees the
/// name that the client used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alias {
    pub host: String,
}

/// An action that has no settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoSettings {}

/// What is said in place of the text of one of the balancer's own answers. Status and headers stay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Page {
    #[serde(default = "html")]
    pub content_type: String,
    /// At most [`BODY_BYTES_MAX`].
    pub body: String,
}

fn ok() -> u16 {
    200
}

fn found() -> u16 {
    302
}

fn yes() -> bool {
    true
}

fn html() -> String {
    "text/html; charset=utf-8".to_owned()
}

/// Why an action or a page was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ActionFault {
    #[error("the action needs HTTP, and the route matches {what}")]
    NeedsHttp { what: String },
    #[error("the status {status} is not one of {allowed}")]
    Status { status: u16, allowed: &'static str },
    #[error(
        "the content type {content_type:?} is empty, longer than {CONTENT_TYPE_BYTES_MAX} bytes, or has characters that do not print"
    )]
    ContentType { content_type: String },
    #[error("the body has {bytes} bytes, more than the limit of {BODY_BYTES_MAX}")]
    Body { bytes: usize },
    #[error("{to:?} is no address to redirect to: {why}")]
    Redirect { to: String, why: &'static str },
    #[error("the alias names {host:?}, which is no host name")]
    AliasHost { host: String },
    #[error("the alias names {host:?}, which no route of this table takes")]
    AliasDangles { host: String },
    #[error("the alias of {host:?} leads back to itself, or through more than {ALIAS_DEPTH_MAX} others")]
    AliasLoop { host: String },
}

impl Action {
    /// Whether only an HTTP request can be answered this way.
    pub fn needs_http(&self) -> bool {
        !matches!(self, Action::Proxy(_) | Action::Hold(_))
    }

    /// Checks what one action says, by itself.
    pub(super) fn check(&self, matches: &Match) -> Result<(), ActionFault> {
        if self.needs_http() && !matches!(matches, Match::Host(_)) {
            return Err(ActionFault::NeedsHttp { what: matches.to_string() });
        }
        match self {
            Action::Static(page) => {
                if !(200..=599).contains(&page.status) || is_bodiless(page.status) || page.status == 205 {
                    let allowed = "200 to 599 without 204, 205 and 304";
                    return Err(ActionFault::Status { status: page.status, allowed });
                }
                check_text(&page.content_type, &page.body)
            }
            Action::Empty(empty) if !(200..=599).contains(&empty.status) => {
                Err(ActionFault::Status { status: empty.status, allowed: "200 to 599" })
            }
            Action::Redirect(redirect) => redirect.check(),
            Action::Alias(alias) => match normal_host(alias.host.as_bytes()) {
                Some(_) => Ok(()),
                None => Err(ActionFault::AliasHost { host: alias.host.clone() }),
            },
            _ => Ok(()),
        }
    }
}

impl Page {
    pub(super) fn check(&self) -> Result<(), ActionFault> {
        check_text(&self.content_type, &self.body)
    }
}

impl Redirect {
    fn check(&self) -> Result<(), ActionFault> {
        if !matches!(self.status, 301 | 302 | 303 | 307 | 308) {
            let allowed = "301, 302, 303, 307 and 308";
            return Err(ActionFault::Status { status: self.status, allowed });
        }
        let no = |why| Err(ActionFault::Redirect { to: self.to.clone(), why });
        if self.to.len() > REDIRECT_BYTES_MAX {
            return no("it is too long");
        }
        let Some((scheme, rest)) = self.to.split_once("://") else { return no("it has no scheme") };
        if !matches!(scheme, "http" | "https") {
            return no("its scheme is neither http nor https");
        }
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        if normal_host(authority.as_bytes()).is_none() {
            return no("its host is malformed");
        }
        if !self.to.bytes().all(is_uri_byte) {
            return no("it has characters that an address has not");
        }
        if self.to.contains('#') {
            return no("it has a fragment");
        }
        if self.keep_path && self.to.contains('?') {
            return no("it has a query, and the path is to be kept");
        }
        Ok(())
    }
}

/// A response with this status never has a body, whatever its header says (RFC 9110 §6.4.1).
pub fn is_bodiless(status: u16) -> bool {
    matches!(status, 100..=199 | 204 | 304)
}

/// What a URI may consist of (RFC 3986 §2), `%` included.
pub fn is_uri_byte(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"-._~:/?#[]@!$&'()*+,;=%".contains(&b)
}

fn check_text(content_type: &str, body: &str) -> Result<(), ActionFault> {
    let prints = content_type.bytes().all(|b| matches!(b, b' '..=b'~'));
    if content_type.trim().is_empty() || content_type.len() > CONTENT_TYPE_BYTES_MAX || !prints {
        return Err(ActionFault::ContentType { content_type: content_type.to_owned() });
    }
    if body.len() > BODY_BYTES_MAX {
        return Err(ActionFault::Body { bytes: body.len() });
    }
    Ok(())
}

/// Checks that each alias leads to a route that is none, and returns the id of the first that does not.
pub(super) fn check_aliases(routes: &[Route]) -> Result<(), (String, ActionFault)> {
    let hosts: HashMap<String, &Route> = routes.iter().filter_map(|route| route.host_entry()).collect();
    for route in routes {
        let Action::Alias(first) = &route.action else { continue };
        let failed = |fault| Err((route.id.clone(), fault));
        let mut host = first.host.as_str();
        let mut depth = 0;
        loop {
            let Some(next) = serves(&hosts, host) else {
                return failed(ActionFault::AliasDangles { host: host.to_owned() });
            };
            let Action::Alias(alias) = &next.action else { break };
            depth += 1;
            if depth > ALIAS_DEPTH_MAX {
                return failed(ActionFault::AliasLoop { host: first.host.clone() });
            }
            host = &alias.host;
        }
    }
    Ok(())
}

impl Route {
    /// What an HTTP route is found by, in its normal form.
    fn host_entry(&self) -> Option<(String, &Route)> {
        match &self.matches {
            Match::Host(host) => Some((normal_pattern(host)?, self)),
            _ => None,
        }
    }
}

/// The route that serves a host: the exact one, else the longest parent's, else the catch-all.
fn serves<'a>(hosts: &HashMap<String, &'a Route>, host: &str) -> Option<&'a Route> {
    let host = normal_host(host.as_bytes())?;
    if let Some(route) = hosts.get(&host) {
        return Some(route);
    }
    let mut rest = host.as_str();
    while let Some((_, parent)) = rest.split_once('.') {
        if let Some(route) = hosts.get(&format!("*.{parent}")) {
            return Some(route);
        }
        rest = parent;
    }
    hosts.get("*").copied()
}

/// Replaced answers, by the code of the answer (`X-Epagent-Error`).
pub type Pages = BTreeMap<String, Page>;

#[cfg(test)]
mod tests {
    use super::super::{Table, TableError};
    use super::*;

    fn fault(matches: &str, action: &str) -> Option<ActionFault> {
        let text = format!(
            r#"{{"version":1,"routes":[
              {{"id":"a","match":{matches},"action":{action}}},
              {{"id":"shop","match":{{"host":"shop.example"}},"action":{{"hold":{{}}}}}}]}}"#
        );
        let table: Table = serde_json::from_str(&text).unwrap();
        match table.validate() {
            Ok(()) => None,
            Err(TableError::Action { fault, .. }) => Some(fault),
            Err(other) => panic!("{other}"),
        }
    }

    fn http(action: &str) -> Option<ActionFault> {
        fault(r#"{"host":"a.example"}"#, action)
    }

    #[test]
    fn each_action_of_the_documentation_is_taken() {
        for action in [
            r#"{"static":{"status":200,"content_type":"text/plain","body":"hello"}}"#,
            r#"{"static":{"body":""}}"#,
            r#"{"redirect":{"to":"https://shop.example","status":308,"keep_path":true}}"#,
            r#"{"redirect":{"to":"http://[::1]:8080/x?y=z","keep_path":false}}"#,
            r#"{"empty":{"status":204}}"#,
            r#"{"alias":{"host":"Shop.example."}}"#,
            r#"{"unknown_host":{}}"#,
            r#"{"no_hosts":{}}"#,
        ] {
            assert_eq!(http(action), None, "{action}");
        }
    }

    #[test]
    fn a_redirect_cannot_smuggle_a_header_or_leave_its_host() {
        for to in [
            "https://shop.example\\r\\nSet-Cookie: a=b",
            "https://shop.example/a b",
            "https://user:password@shop.example",
            "https://shop.example#part",
            "https://shop.example/?q",
            "https://",
            "https:///path",
            "javascript:alert(1)",
            "ftp://shop.example",
            "/path",
            "https://shop.example/ü",
            "https://shop.example/<script>",
        ] {
            let action = format!(r#"{{"redirect":{{"to":"{to}"}}}}"#);
            assert!(matches!(http(&action), Some(ActionFault::Redirect { .. })), "{to}");
        }
    }

    #[test]
    fn statuses_and_texts_that_make_no_response_are_refused() {
        for (action, why) in [
            (r#"{"static":{"status":204,"body":"x"}}"#.to_owned(), "status"),
            (r#"{"static":{"status":101,"body":"x"}}"#.to_owned(), "status"),
            (r#"{"static":{"status":600,"body":"x"}}"#.to_owned(), "status"),
            (r#"{"empty":{"status":100}}"#.to_owned(), "status"),
            (r#"{"redirect":{"to":"https://a.example","status":304}}"#.to_owned(), "status"),
            (r#"{"static":{"content_type":"a\r\nb: c","body":"x"}}"#.to_owned(), "content type"),
            (r#"{"static":{"content_type":" ","body":"x"}}"#.to_owned(), "content type"),
            (format!(r#"{{"static":{{"body":"{}"}}}}"#, "x".repeat(BODY_BYTES_MAX + 1)), "body"),
        ] {
            let fault = http(&action).expect(why).to_string();
            assert!(fault.contains(why), "{fault}");
        }
    }

    #[test]
    fn an_http_action_on_a_port_is_refused() {
        let port = r#"{"port":5432}"#;
        assert_eq!(fault(port, r#"{"hold":{}}"#), None);
        for action in
            [r#"{"static":{"body":""}}"#, r#"{"unknown_host":{}}"#, r#"{"alias":{"host":"shop.example"}}"#]
        {
            assert!(matches!(fault(port, action), Some(ActionFault::NeedsHttp { .. })), "{action}");
        }
    }

    #[test]
    fn an_alias_must_lead_to_a_route_that_is_none() {
        let alias = |host: &str| format!(r#"{{"alias":{{"host":"{host}"}}}}"#);
        assert!(matches!(http(&alias("nobody.example")), Some(ActionFault::AliasDangles { .. })));
        assert!(matches!(http(&alias("a.example")), Some(ActionFault::AliasLoop { .. })));
        assert!(matches!(http(&alias("*.example")), Some(ActionFault::AliasHost { .. })));
        // A catch-all that is an alias serves whatever nothing else does, itself included.
        assert!(matches!(fault(r#"{"host":"*"}"#, &alias("x.example")), Some(ActionFault::AliasLoop { .. })));
        assert_eq!(fault(r#"{"host":"*"}"#, &alias("shop.example")), None);
    }
}

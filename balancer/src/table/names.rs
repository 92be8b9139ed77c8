//! The forms in which names are compared: hosts of requests and routes, server names of TLS hellos.

use crate::core::preface::client_hello::normal_name;

/// The form in which hosts are compared: lower case, without a port and without a trailing dot. `None` when
/// it is not a host at all (RFC 3986 §3.2.2 as far as HTTP uses it): empty, user information, blanks, a
/// malformed port, an unclosed bracket.
pub fn normal_host(host: &[u8]) -> Option<String> {
    let (name, port) = match host.first()? {
        b'[' => {
            let end = host.iter().position(|b| *b == b']')?;
            let inside = &host[1..end];
            if inside.is_empty() || !inside.iter().all(|b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.'))
            {
                return None;
            }
            (&host[..=end], &host[end + 1..])
        }
        _ => match host.iter().position(|b| *b == b':') {
            Some(colon) => (&host[..colon], &host[colon..]),
            None => (host, &host[host.len()..]),
        },
    };
    match port {
        [] => {}
        [b':', digits @ ..] if digits.len() <= 5 && digits.iter().all(u8::is_ascii_digit) => {}
        _ => return None,
    }
    let name = name.strip_suffix(b".").unwrap_or(name);
    let bracketed = host.starts_with(b"[");
    let allowed = |b: &u8| bracketed || b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~');
    if name.is_empty() || name.len() > 255 || !name.iter().all(allowed) {
        return None;
    }
    Some(name.iter().map(|b| b.to_ascii_lowercase() as char).collect())
}

/// The form in which a route's host is kept: a normal host, `*.` before one, or `*`. A request's Host never
/// has a star, so that nobody can ask for a wildcard itself.
pub fn normal_pattern(host: &str) -> Option<String> {
    if host == "*" {
        return Some(host.to_owned());
    }
    let (star, name) = host.strip_prefix("*.").map_or(("", host), |name| ("*.", name));
    let name = normal_host(name.as_bytes())?;
    if name.starts_with('.') || name.contains("..") {
        return None;
    }
    Some(format!("{star}{name}"))
}

/// The form in which a route's server name is kept: a name as a ClientHello may have it, `*.` before one, or
/// `*`.
pub fn normal_sni(name: &str) -> Option<String> {
    if name == "*" {
        return Some(name.to_owned());
    }
    let (star, name) = name.strip_prefix("*.").map_or(("", name), |name| ("*.", name));
    let name = normal_name(name.as_bytes())?;
    Some(format!("{star}{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_forms_are_folded_to_one() {
        for (given, normal) in [
            ("Shop.Example", Some("shop.example")),
            ("shop.example:8080", Some("shop.example")),
            ("shop.example.:80", Some("shop.example")),
            ("shop.example:", Some("shop.example")),
            ("[::1]:80", Some("[::1]")),
            ("[::1]x", None),
            ("shop.example:80x", None),
            ("shop.example:123456", None),
            ("u:p@shop.example", None),
            ("shop example", None),
            ("", None),
            ("*.shop.example", None),
            ("a[b", None),
            (".", None),
        ] {
            assert_eq!(normal_host(given.as_bytes()).as_deref(), normal, "{given:?}");
        }
    }

    #[test]
    fn a_server_name_has_no_port_and_no_trailing_dot() {
        for (given, normal) in [
            ("Db.Example", Some("db.example")),
            ("*.Db.Example", Some("*.db.example")),
            ("*", Some("*")),
            ("db.example:443", None),
            ("db.example.", None),
            ("192.0.2.1", None),
            ("*.*.example", None),
            ("*db.example", None),
            ("", None),
        ] {
            assert_eq!(normal_sni(given).as_deref(), normal, "{given:?}");
        }
    }
}

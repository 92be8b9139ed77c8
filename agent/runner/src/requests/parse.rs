//! From bytes to a [`Call`], strictly: a field nobody knows is a refusal, wherever it stands.
//!
//! serde's `deny_unknown_fields` has to be remembered on every type and can't be on some. So what was parsed is
//! written out again and compared: each key of the packet has to come back. A request can therefore not carry a
//! path, a range or an address along in the hope that somebody once reads it.

use epagent_wire::runner::{Call, Refusal, RefusalCode};
use serde_json::Value;

/// A call, or the refusal and the number of the call it answers (0 when not even that could be read).
pub fn parse(bytes: &[u8]) -> Result<Call, (u64, Refusal)> {
    let refuse = |id, message| (id, Refusal { code: RefusalCode::BadRequest, message });
    let given: Value = serde_json::from_slice(bytes)
        .map_err(|error| refuse(0, format!("the packet is not JSON: {error}")))?;
    let id = given.get("id").and_then(Value::as_u64).unwrap_or(0);
    let call: Call = serde_json::from_slice(bytes)
        .map_err(|error| refuse(id, format!("the packet is not a call of the closed list: {error}")))?;
    let known = serde_json::to_value(&call)
        .map_err(|error| refuse(id, format!("the call can't be read: {error}")))?;
    match unknown_field(&given, &known) {
        None => Ok(call),
        Some(field) => Err(refuse(id, format!("unknown field {:?}", super::fields::shortened(field)))),
    }
}

/// A key of `given` that `known` does not have at the same place.
fn unknown_field<'a>(given: &'a Value, known: &Value) -> Option<&'a str> {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            given.iter().find_map(|(key, value)| match known.get(key) {
                Some(known) => unknown_field(value, known),
                None => Some(key.as_str()),
            })
        }
        (Value::Array(given), Value::Array(known)) => {
            given.iter().zip(known).find_map(|(given, known)| unknown_field(given, known))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> (u64, String) {
        let (id, refusal) = parse(text.as_bytes()).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::BadRequest);
        (id, refusal.message)
    }

    #[test]
    fn a_request_of_the_list_is_read() {
        let call = parse(br#"{"id":4,"request":{"app_ensure":{"app":"shop"}}}"#).unwrap();
        assert_eq!(call.id, 4);
        assert!(parse(br#"{"id":4,"request":"observe"}"#).is_ok());
    }

    #[test]
    fn a_start_with_a_limit_of_traffic_and_one_without_are_read() {
        let start = |more: &str| {
            let limits =
                format!(r#"{{"memory_bytes":1,"cpu_percent":1,"pids":1,"nofile":1,"disk_bytes":1{more}}}"#);
            let text = format!(
                r#"{{"id":4,"request":{{"start":{{"jail":"shop-aaaaaaaa","start":{{"app":"shop","release":1,"command":{{"argv":["a"]}},"env":{{}},"limits":{limits},"volumes":{{}},"with_secrets":false,"deadline_ms":null}}}}}}}}"#
            );
            match parse(text.as_bytes()).unwrap().request {
                epagent_wire::runner::Request::Start { start, .. } => start.limits.io_bytes_per_s,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(start(""), Some(100 << 20));
        assert_eq!(start(r#","io_bytes_per_s":5000000"#), Some(5_000_000));
        assert_eq!(start(r#","io_bytes_per_s":null"#), None);
    }

    #[test]
    fn fields_that_carry_something_along_are_refused() {
        for (text, field) in [
            (r#"{"id":4,"request":{"app_ensure":{"app":"shop","range":3}}}"#, "range"),
            (r#"{"id":4,"request":"observe","path":"/etc"}"#, "path"),
            (
                r#"{"id":4,"request":{"exec_resize":{"jail":"shop-aaaaaaaa","exec":1,"size":{"rows":1,"columns":1,"fd":9}}}}"#,
                "fd",
            ),
            (
                r#"{"id":4,"request":{"start":{"jail":"shop-aaaaaaaa","start":{"app":"shop","release":1,"command":{"argv":["a"]},"env":{},"limits":{"memory_bytes":1,"cpu_percent":1,"pids":1,"nofile":1,"disk_bytes":1,"io_device":"/dev/vda"},"volumes":{},"with_secrets":false,"deadline_ms":null}}}}"#,
                "io_device",
            ),
        ] {
            let (id, message) = refusal(text);
            assert_eq!(id, 4);
            assert!(message.contains(field), "{message}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_never_become_a_value() {
        for name in ["..", "a/b", "/etc", "a\\nb", "", "A", "a.b"] {
            let (id, message) =
                refusal(&format!(r#"{{"id":9,"request":{{"app_remove":{{"app":"{name}"}}}}}}"#));
            assert_eq!(id, 9, "{message}");
        }
    }

    #[test]
    fn what_is_not_on_the_list_is_refused() {
        for text in [
            "",
            "{",
            "[]",
            "7",
            r#"{"id":1}"#,
            r#"{"id":1,"request":"reboot"}"#,
            r#"{"id":-1,"request":"observe"}"#,
        ] {
            refusal(text);
        }
    }
}

//! TLS in plain bytes: hellos as a client sends them, alerts as they come back.

/// A vector with its length in `N` bytes before it.
fn vector<const N: usize>(content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    [&length[length.len() - N..], content].concat()
}

fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &vector::<2>(content)].concat()
}

/// A ClientHello that asks for `name`, in records of `size` bytes (RFC 8446 §4.1.2, RFC 6066 §3).
pub fn client_hello(name: Option<&str>, size: usize) -> Vec<u8> {
    let name = name.map(|name| {
        let entry = [&[0][..], &vector::<2>(name.as_bytes())].concat();
        extension(0, &vector::<2>(&entry))
    });
    let extensions = [extension(43, &[2, 3, 4]), name.unwrap_or_default(), extension(51, &[7; 300])].concat();
    let ids = [vector::<1>(&[7; 32]), vector::<2>(&[0x13, 1]), vector::<1>(&[0])].concat();
    let body = [&[3, 3][..], &[9; 32], &ids, &vector::<2>(&extensions)].concat();
    let message = [&[1][..], &vector::<3>(&body)].concat();
    message.chunks(size).flat_map(|part| [&[22, 3, 1][..], &vector::<2>(part)].concat()).collect()
}

/// The record of a fatal alert.
pub fn fatal_alert(description: u8) -> Vec<u8> {
    vec![21, 3, 3, 0, 2, 2, description]
}

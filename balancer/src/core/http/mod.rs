//! HTTP/1.1 (RFC 9110, RFC 9112) as a proxy needs it: heads are parsed strictly ([`head`]), requests are
//! judged ([`request`]) and responses understood ([`response`]), bodies are framed but not read ([`body`]),
//! the app is told who asks ([`forwarded`], [`request_id`]), and the
//! balancer's own answers are a closed list ([`answer`]).
//!
//! The rule everywhere: what two parsers could read in two ways is refused, never forwarded.

pub mod answer;
pub mod body;
pub mod forwarded;
pub mod head;
pub mod request;
pub mod request_id;
pub mod response;

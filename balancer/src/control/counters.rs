//! What the whole process counts: one number for each thing that may happen, with its help text for the metrics.
//!
//! A new counter is one line with one line of documentation; status, sums and metrics follow by themselves.

use serde::{Deserialize, Serialize};

macro_rules! counters {
    ($( $(#[doc = $doc:literal])* $name:ident ),+ $(,)?) => {
        /// Counts since the process started; each distinct answer of the balancer's own has one.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct Counters { $( $(#[doc = $doc])* #[serde(default)] pub $name: u64 ),+ }

        impl Counters {
            /// Those that say what is now, rather than what has been.
            pub const GAUGES: [&str; 2] = ["connections_open", "upstream_connections_open"];

            /// Adds another thread's counts.
            pub fn add(&mut self, other: &Counters) { $( self.$name += other.$name; )+ }

            /// Each with its name and what it counts.
            pub fn each(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
                [$( (stringify!($name), concat!($($doc),*).trim_ascii(), self.$name) ),+].into_iter()
            }

            /// What stays of a process that has ended: what it has counted, and nothing it has open.
            pub fn without_gauges(&self) -> Counters {
                Counters { connections_open: 0, upstream_connections_open: 0, ..self.clone() }
            }
        }
    };
}

counters! {
    /// Client connections open now.
    connections_open,
    /// Upstream connections open now, idle ones included.
    upstream_connections_open,
    /// Client connections accepted.
    connections_accepted,
    /// Connections cut because the memory for slow peers was used up.
    shed_memory,
    /// Connections reset as they came: our pool, or the listener, was full.
    shed_connections,
    /// Connections reset as they came: their source has as many at the listener, or makes as many per second, as
    /// it may.
    shed_sources,
    /// Times accepting paused because `max_connections` was reached.
    accept_paused_full,
    /// Times accepting backed off because the process ran out of descriptors or memory.
    accept_backoff,
    /// HTTP requests whose head was read and understood.
    requests,
    /// Responses passed on in full.
    responses,
    /// Requests answered by a static page, a redirect or a bare status of their route.
    answered_by_action,
    /// 400: refused, malformed or ambiguous.
    refused_bad_request,
    /// 405: CONNECT or TRACE.
    refused_method,
    /// 408: the head did not arrive in time.
    refused_slow_head,
    /// 408: the body stalled.
    refused_slow_body,
    /// 431: the head was too large.
    refused_large_head,
    /// 505: an HTTP version other than 1.0 and 1.1.
    refused_version,
    /// 404: no route for the host.
    unknown_host,
    /// 421: the host is not one the TLS connection was made for.
    misdirected,
    /// ACME challenges answered from their folder.
    acme_challenges,
    /// TLS handshakes done.
    tls_handshakes,
    /// Those of them that continued an earlier session.
    tls_resumed,
    /// Those of them in which no certificate was for the name asked for, and the default was shown.
    tls_by_default,
    /// Clients that spoke plain HTTP to a TLS port (400).
    tls_plain_http,
    /// Clients that spoke neither TLS nor HTTP to a TLS port.
    tls_not_tls,
    /// Handshakes refused because the client offers no version that is served.
    tls_no_shared_version,
    /// Handshakes refused because the client offers no cipher, group, signature or protocol that is served.
    tls_nothing_shared,
    /// Handshakes refused because no certificate is for the name asked for.
    tls_unknown_name,
    /// Handshakes refused because there is no certificate at all.
    tls_no_certificate,
    /// Handshakes in which the client did not accept what it was shown.
    tls_rejected,
    /// Handshakes in which the client went away.
    tls_handshake_gone,
    /// Handshakes in which the client broke the protocol or its bounds.
    tls_handshake_broken,
    /// Handshakes that took too long.
    tls_handshake_timeout,
    /// TLS connections broken off because the client sent what cannot be decrypted or does not belong.
    tls_broken,
    /// Streams over TLS that ended without a goodbye, passed on as broken off.
    tls_cut,
    /// 503: the table has no HTTP route at all.
    no_routes,
    /// 503: shed from a full hold queue.
    hold_shed,
    /// 503: held for too long.
    hold_expired,
    /// 503: the route names no upstream, and its policy is to answer.
    no_upstreams,
    /// 503: none of the upstreams could be given anything, and the policy is to answer.
    all_down,
    /// Times something was held because as many connects to the upstreams were under way as may be.
    upstream_full,
    /// 503: the route has as many requests as it takes.
    route_full,
    /// 429: the source has as many requests at the route as it may.
    source_full,
    /// 429: too many requests per second, of all or of one source.
    rate_limited,
    /// 502: the upstream closed or reset before it answered.
    upstream_died,
    /// 502: the upstream's answer was not valid HTTP/1.1.
    upstream_bad_response,
    /// 504: the upstream did not answer in time.
    upstream_timeout,
    /// Responses cut short because the upstream went away in the middle; the client saw a reset.
    upstream_died_midway,
    /// Requests sent again because a reused connection had been closed by the upstream.
    retried_stale,
    /// Connects tried elsewhere after a failure.
    retried_connect,
    /// Client connections that went away before their response was complete.
    client_aborted,
    /// Client connections reset because they took nothing of their response for too long.
    client_stalled,
    /// TCP connections reset because no route takes their port.
    tcp_unrouted,
    /// Connections reset because their PROXY header was missing or malformed.
    proxy_header_refused,
    /// Connections reset because their PROXY header did not arrive in time.
    proxy_header_slow,
    /// TLS connections turned away because their ClientHello was malformed, or none.
    hello_refused,
    /// TLS connections reset because their ClientHello did not arrive in time.
    hello_slow,
    /// TLS connections turned away because no route takes their server name.
    sni_unrouted,
    /// Connects put off because the queue of an upstream's unix socket was full.
    unix_queue_full,
    /// Connects refused because a symlink stood in the path of a tenant's socket.
    unix_symlink,
    /// Connects refused because what stood in the place of a tenant's socket was none.
    unix_no_socket,
    /// Connects refused because a tenant's socket had several names.
    unix_several_names,
    /// Connects to tenants' sockets refused because there is no folder of theirs, or the kernel lacks what
    /// makes them safe.
    unix_unavailable,
    /// Upgraded connections.
    upgrades,
    /// Times a receive found no shared buffer free.
    no_buffers,
    /// Health checks that passed.
    checks_passed,
    /// Health checks that failed.
    checks_failed,
    /// Times an upstream was ejected from a route because its traffic failed.
    ejections,
    /// Times one was not, because so many are already.
    ejections_capped,
    /// Access log lines dropped because they could not be written, or not in time.
    access_log_dropped,
    /// What went well and was not logged, because only a sample is.
    access_log_sampled_out,
    /// Bytes received from clients.
    bytes_from_clients,
    /// Bytes received from upstreams.
    bytes_from_upstreams,
}

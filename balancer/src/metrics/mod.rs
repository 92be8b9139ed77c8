//! The balancer's counters for Prometheus: what is said ([`families`]), how it is written ([`text`]), and the
//! small server that says it ([`server`]).
//!
//! Everything comes from the status of the control socket, so that both always agree. There are three kinds of
//! names: counts of the whole process, `…{route=…}`, and `…_upstream_…{upstream=…,address=…}`. How many series
//! there are is bounded by [`families::ROUTES_MAX`] and [`families::UPSTREAMS_MAX`]: what is beyond is summed
//! under the name `(others)`, so that sums stay right. What has left the table has no series any more.

pub mod families;
pub mod server;
pub mod text;

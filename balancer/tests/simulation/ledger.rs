//! A second set of books, kept from the lines of the access log alone: at the end it must say what the
//! counters and histograms say.

use std::collections::BTreeMap;

use epagent_balancer::control::traffic::{Ends, Responses};
use epagent_balancer::core::access::Access;
use epagent_balancer::core::engine::Snapshot;

#[derive(Default)]
pub struct Ledger {
    requests: u64,
    routes: BTreeMap<String, Page>,
}

/// What a route has carried, as its lines say.
#[derive(Default)]
struct Page {
    ends: Ends,
    responses: Responses,
    bytes: (u64, u64),
    held: u64,
    first_bytes: u64,
}

impl Ledger {
    pub fn note(&mut self, lines: &[Access]) {
        for line in lines {
            self.requests += u64::from(!line.method.is_empty());
            let Some(route) = &line.route else { continue };
            let page = self.routes.entry(route.clone()).or_default();
            *match line.outcome {
                "answered" | "upgraded" | "closed" => &mut page.ends.passed,
                "aborted" => &mut page.ends.aborted,
                "cut" => &mut page.ends.cut,
                "static" | "redirect" | "empty" => &mut page.ends.page,
                _ => &mut page.ends.refused,
            } += 1;
            page.responses.count(line.status);
            page.bytes = (page.bytes.0 + line.bytes_in, page.bytes.1 + line.bytes_out);
            page.held += u64::from(line.held_us.is_some());
            page.first_bytes += u64::from(line.ttfb_us.is_some());
        }
    }

    /// Compares with what the core counted.
    pub fn check(&self, snapshot: &Snapshot) {
        assert_eq!(self.requests, snapshot.counters.requests, "the access log does not reconcile");
        let none = Page::default();
        for route in &snapshot.routes {
            let page = self.routes.get(&route.id).unwrap_or(&none);
            let latency = route.latency.as_ref().expect("histograms");
            assert_eq!(route.requests_total, page.ends.total(), "route {} began and ended", route.id);
            assert_eq!((route.ends, route.responses), (page.ends, page.responses), "route {}", route.id);
            assert_eq!((route.bytes_in_total, route.bytes_out_total), page.bytes, "route {}", route.id);
            assert_eq!(latency.duration.count(), page.ends.total(), "route {}", route.id);
            assert_eq!(latency.first_byte.count(), page.first_bytes, "route {}", route.id);
            assert_eq!(
                (latency.held.count(), route.held_total),
                (page.held, page.held),
                "route {}",
                route.id
            );
        }
    }
}

//! What routes and upstreams have carried since the process started, as status shows it.
//!
//! Whatever is counted here is counted when a request or connection ends, once, together with its line in
//! the access log: counts, histograms and lines cannot disagree. Only bytes are shown as they pass.

use serde::{Deserialize, Serialize};

use crate::core::histogram::Histogram;

macro_rules! tally {
    ($(#[$about:meta])* $name:ident { $( $(#[doc = $doc:literal])* $field:ident = $label:literal ),+ $(,)? }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct $name { $( $(#[doc = $doc])* #[serde(rename = $label)] pub $field: u64 ),+ }

        impl $name {
            /// Adds another thread's counts.
            pub fn add(&mut self, other: &Self) { $( self.$field += other.$field; )+ }

            /// Each count with its name.
            pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$( ($label, self.$field) ),+].into_iter()
            }

            pub fn total(&self) -> u64 { self.each().map(|(_, count)| count).sum() }
        }
    };
}

tally! {
    /// How requests and connections ended.
    Ends {
        /// The app's response was passed on in full; a connection ended from both sides.
        passed = "passed",
        /// The client went away before.
        aborted = "aborted",
        /// The app went away in the middle, and the client saw a reset.
        cut = "cut",
        /// The route answered by itself: a static page, a redirect, a bare status.
        page = "page",
        /// The balancer answered in its own name, or ended the connection: shed, expired, idle, app dead.
        refused = "refused",
    }
}

tally! {
    /// What clients were answered, by the first digit of the status.
    Responses {
        /// None at all: plain connections, and clients that went away before.
        none = "none",
        informational = "1xx",
        success = "2xx",
        redirection = "3xx",
        client_error = "4xx",
        server_error = "5xx",
    }
}

impl Responses {
    /// Counts one response.
    pub fn count(&mut self, status: Option<u16>) {
        let counter = match status.map(|status| status / 100) {
            None => &mut self.none,
            Some(..=1) => &mut self.informational,
            Some(2) => &mut self.success,
            Some(3) => &mut self.redirection,
            Some(4) => &mut self.client_error,
            Some(5..) => &mut self.server_error,
        };
        *counter += 1;
    }
}

/// How long a route's requests and connections took. In status only when it is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Latency {
    /// From the head being complete (a connection: from accepting) to the end; of an upgraded one, to the
    /// switch of protocols.
    pub duration: Histogram,
    /// From an upstream being given it to the first byte it answered; of those that came so far.
    pub first_byte: Histogram,
    /// In the hold queue; of those that were held.
    pub held: Histogram,
}

impl Latency {
    /// Adds another thread's values.
    pub fn add(&mut self, other: &Self) {
        self.duration.add(&other.duration);
        self.first_byte.add(&other.first_byte);
        self.held.add(&other.held);
    }
}

/// Adds what is there of another thread's.
pub fn add_some<T: Clone>(known: &mut Option<T>, other: &Option<T>, add: impl FnOnce(&mut T, &T)) {
    match (known.as_mut(), other) {
        (Some(known), Some(other)) => add(known, other),
        (None, Some(other)) => *known = Some(other.clone()),
        (_, None) => {}
    }
}

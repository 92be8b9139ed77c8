//! What goes on at each route: how many it is serving, since when it serves nobody, and whether somebody waits
//! there for an upstream that does not exist.
//!
//! ```text
//!               enter                    leave: answered, passed on, or gone
//!   (no route) ──────▶ on a route ──────────────────────────────────────────▶ (no route)
//! ```
//!
//! An app that is stopped while nobody uses it needs both ends of this: `idle_ms` says when it may be
//! stopped, and a route that *starves* (it holds something and has nobody to give it to) says when it is
//! wanted again. Starving is told at once, as an event; what starves is then read from the state, so an
//! event that comes twice, or late, does no harm.

use super::choose::Reported;
use super::engine::Core;
use super::io::SockId;
use super::slab::UpstreamKey;
use crate::remark::Remark;

impl Core {
    /// A client's request or connection belongs to its route from now on.
    pub(super) fn enter_route(&mut self, client: SockId) {
        self.leave_route(client);
        let Some(sock) = self.socks.get_mut(client) else { return };
        let Some(key) = sock.wait().map(|wait| wait.route) else { return };
        let Some(route) = self.routes.get_mut(key) else { return };
        route.active += 1;
        sock.on_route = Some(key);
        if let Some(flow) = sock.flow_mut() {
            flow.route = key;
        }
    }

    /// What the client wanted of its route is over.
    pub(super) fn leave_route(&mut self, client: SockId) {
        let now = self.now;
        let Some(sock) = self.socks.get_mut(client) else { return };
        let (key, source) = (sock.on_route.take(), sock.on_route_as.take());
        self.give_back(source);
        if let Some(route) = key.and_then(|key| self.routes.get_mut(key)) {
            route.active -= 1;
            route.left_at = now;
        }
    }

    /// Tells a client's route what became of its traffic at an upstream, which may cost the upstream its place
    /// for a while.
    pub(super) fn report(&mut self, client: SockId, key: UpstreamKey, good: bool) {
        let now = self.now;
        let route = self.socks.get(client).and_then(|sock| sock.on_route);
        let Some(route) = route.and_then(|route| self.routes.get_mut(route)) else { return };
        match route.chooser.report(key, good, now, &self.upstreams) {
            None => {}
            Some(Reported::Capped) => self.counters.ejections_capped += 1,
            Some(Reported::Ejected { for_ms }) => {
                self.counters.ejections += 1;
                let upstream = self.upstreams.get(key).map_or("?", |upstream| &upstream.id);
                let route = &route.id;
                self.remarks.add(now, || {
                    Remark::warning(format!(
                        "route {route}: upstream {upstream} gets nothing for {for_ms} ms: its traffic failed"
                    ))
                    .with("route", route)
                    .with("upstream", upstream)
                });
            }
        }
    }

    /// The routes that hold something and have no upstream that is up.
    pub fn starving(&self) -> Vec<String> {
        self.routes.iter().filter(|route| route.is_starving()).map(|route| route.id.clone()).collect()
    }

    /// Whether a route has begun to starve since this was last asked.
    pub fn take_starved(&mut self) -> bool {
        std::mem::take(&mut self.starved)
    }
}

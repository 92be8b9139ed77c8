//! The hold queues: who waits for an upstream, for how long, and how they are let go.
//!
//! ```text
//!              nobody can take it              somebody can
//!  dispatch ───────────────────────▶ held ───────────────────▶ given to it
//!                                     │ ▲  the connect fails │
//!                                     │ └────────────────────┘
//!                                     ├── too old ─────────────▶ 503 hold_expired
//!                                     ├── too many after it ───▶ 503 hold_shed
//!                                     └── it leaves ───────────▶ gone
//! ```
//!
//! Queues are looked at when something has become possible (a table, a connect that worked) and every 50 ms
//! while anybody waits. The oldest goes first, and one whose connect failed goes back to the front.

use super::choose::Choice;
use super::config::Config;
use super::dispatch::no_upstream;
use super::engine::Core;
use super::http::answer::Answer;
use super::io::SockId;
use super::routes::Route;
use super::session::{Sock, Wait};
use super::slab::RouteKey;

impl Core {
    /// Lets held clients go, as far as upstreams can take them.
    pub(super) fn release_all(&mut self) {
        for route in self.routes.holding() {
            while let Some((client, reply)) = self.routes.get_mut(route).and_then(Route::pop_answered) {
                if let Some(wait) = self.wait_mut(client) {
                    wait.queued = false;
                    self.act(client, reply);
                }
            }
            while let Some(client) = self.routes.get(route).and_then(Route::oldest_held) {
                match self.choose(route, client) {
                    Choice::Give(upstream) => {
                        self.pop_oldest(route);
                        self.give(client, upstream);
                    }
                    Choice::Busy => break,
                    none if self.answers_at_once(route) => {
                        self.pop_oldest(route);
                        self.give_up(client, no_upstream(none));
                    }
                    _ => break,
                }
            }
        }
    }

    /// Every 50 ms while something is held: age out, and try again what could not be reached.
    pub(super) fn hold_tick(&mut self) {
        if self.hold_tick_at.is_none_or(|at| at > self.now) {
            return;
        }
        let holding = self.routes.holding();
        for key in &holding {
            while let Some(client) = self.pop_expired(*key) {
                self.is_held_no_more(client);
                self.give_up(client, Answer::HoldExpired);
            }
        }
        self.release_wanted = true;
        self.hold_tick_at = if holding.is_empty() { None } else { Some(self.now + Config::HOLD_TICK_MS) };
    }

    /// Puts a client into its route's queue; a full queue sheds its oldest.
    pub(super) fn hold(&mut self, client: SockId, key: RouteKey) {
        let now = self.now;
        let now_us = self.now_us();
        if let Some(flow) = self.socks.get_mut(client).and_then(Sock::flow_mut) {
            flow.held(now_us);
        }
        let Some(wait) = self.wait_mut(client) else { return };
        let since = wait.since;
        *wait = Wait { queued: true, since: Some(since.unwrap_or(now)), tries: 0, ..*wait };
        let Some(route) = self.routes.get_mut(key) else { return };
        match since {
            // It has waited before, so it is older than whoever came meanwhile.
            Some(since) => route.held.push_front((client, since)),
            None => {
                route.held_total += 1;
                route.held.push_back((client, now));
            }
        }
        // The first of them is an event; those that follow find it told already.
        self.starved |= route.is_starving() && route.held.len() == 1;
        let over = route.held.len() > route.limits.max_requests as usize;
        let shed = if over { route.held.pop_front() } else { None };
        if let Some((oldest, _)) = shed {
            route.shed_total += 1;
            self.is_held_no_more(oldest);
            self.give_up(oldest, Answer::HoldShed);
        }
        self.hold_tick_at.get_or_insert(now + Config::HOLD_TICK_MS);
        self.touch(client);
    }

    fn pop_expired(&mut self, key: RouteKey) -> Option<SockId> {
        let now = self.now;
        let route = self.routes.get_mut(key)?;
        let max_age_ms = route.limits.max_age_ms;
        // The clock tells whole milliseconds: only the next one is surely as late as promised.
        let (client, _) = route.held.pop_front_if(|(_, since)| now > *since + max_age_ms)?;
        route.expired_total += 1;
        Some(client)
    }

    fn pop_oldest(&mut self, key: RouteKey) {
        let oldest = self.routes.get_mut(key).and_then(|route| route.held.pop_front());
        if let Some((client, _)) = oldest {
            self.is_held_no_more(client);
        }
    }

    fn is_held_no_more(&mut self, client: SockId) {
        if let Some(wait) = self.wait_mut(client) {
            wait.queued = false;
        }
    }

    /// Takes a client out of its hold queue, if it is in one.
    pub(super) fn unhold(&mut self, client: SockId) {
        let Some(wait) = self.wait_mut(client).filter(|wait| wait.queued) else { return };
        wait.queued = false;
        let key = wait.route;
        if let Some(route) = self.routes.get_mut(key) {
            route.held.retain(|(held, _)| *held != client);
        }
    }
}

//! Keeping who changed what; see [`crate::control::audit`].

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{SystemTime, UNIX_EPOCH};

use super::Server;
use super::say::log;
use crate::control::audit::{Actor, Audit, Changes, ENTRIES_MAX, Entry, UPSTREAMS_NAMED_MAX};
use crate::control::protocol::Response;
use crate::remark::Remark;
use crate::table::{Address, Route, Table, Upstream, UpstreamState};

/// The last changes.
#[derive(Debug, Default)]
pub(super) struct Trail {
    entries: VecDeque<Entry>,
}

impl Trail {
    pub fn show(&self) -> Audit {
        Audit { entries: self.entries.iter().cloned().collect() }
    }

    /// Keeps a change and says it in the log.
    pub fn add(&mut self, entry: Entry) {
        let line = entry.to_string();
        let remark = if entry.refused.is_some() { Remark::warning(line) } else { Remark::info(line) };
        let remark = remark.with("request", &entry.request).with("by", entry.by);
        log(entry.version.iter().fold(remark, |remark, version| remark.with("table", version)));
        if self.entries.len() == ENTRIES_MAX {
            self.entries.pop_front();
        }
        self.entries.push_back(entry);
    }

    /// Keeps that something was asked for that has no table.
    pub fn add_request(&mut self, by: Actor, request: &str) {
        let (request, changes) = (request.to_owned(), Changes::default());
        self.add(Entry { time_ms: unix_ms(), by, request, version: None, refused: None, changes });
    }
}

impl Server {
    /// Replaces the table, and keeps who did. Saying again what is in force is no change.
    pub(super) fn change_table(&mut self, by: Actor, table: Table) -> Response {
        let (before, version) = (self.table.clone(), table.version);
        let response = self.set_table(table);
        let (refused, problems) = match &response {
            Response::Error(error) => (Some(error.code), 0),
            Response::Ack(ack) => (None, ack.problems.len()),
            _ => (None, 0),
        };
        if refused.is_some() || *before != *self.table {
            let changes = Changes { problems, ..changes_between(&before, &self.table) };
            let request = "set_table".to_owned();
            self.trail.add(Entry {
                time_ms: unix_ms(),
                by,
                request,
                version: Some(version),
                refused,
                changes,
            });
        }
        response
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// What a table changes of the one before it.
fn changes_between(before: &Table, after: &Table) -> Changes {
    let mut known: HashMap<&str, &Route> =
        before.routes.iter().map(|route| (route.id.as_str(), route)).collect();
    let mut changes = Changes::default();
    let (mut old, mut new) = (BTreeMap::new(), BTreeMap::new());
    for route in &after.routes {
        match known.remove(route.id.as_str()) {
            Some(same) if same == route => continue,
            Some(other) => {
                changes.routes_changed += 1;
                old.extend(other.upstreams().iter().map(place));
            }
            None => changes.routes_added += 1,
        }
        new.extend(route.upstreams().iter().map(place));
    }
    changes.routes_removed = known.len();
    old.extend(known.values().flat_map(|route| route.upstreams()).map(place));
    let mut moved = upstreams_between(&old, &new);
    changes.upstreams_more = moved.len().saturating_sub(UPSTREAMS_NAMED_MAX);
    moved.truncate(UPSTREAMS_NAMED_MAX);
    changes.upstreams = moved;
    changes
}

type Places<'a> = BTreeMap<&'a str, (&'a Address, UpstreamState)>;

fn place(upstream: &Upstream) -> (&str, (&Address, UpstreamState)) {
    (&upstream.id, (&upstream.address, upstream.state))
}

fn upstreams_between(old: &Places<'_>, new: &Places<'_>) -> Vec<String> {
    let mut moved = Vec::new();
    for (id, (address, state)) in new {
        match old.get(id) {
            None => moved.push(format!("{id}: new, {}", state_name(*state))),
            Some((_, was)) if was != state => {
                moved.push(format!("{id}: {} → {}", state_name(*was), state_name(*state)));
            }
            Some((was, _)) if was != address => moved.push(format!("{id}: {was} → {address}")),
            Some(_) => {}
        }
    }
    let gone = old.keys().filter(|id| !new.contains_key(*id));
    moved.extend(gone.map(|id| format!("{id}: gone")));
    moved
}

fn state_name(state: UpstreamState) -> &'static str {
    match state {
        UpstreamState::Up => "up",
        UpstreamState::Draining => "draining",
        UpstreamState::Down => "down",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(routes: &[(&str, &str)]) -> Table {
        let route = |(id, upstreams): &(&str, &str)| {
            let upstreams: Vec<String> = upstreams
                .split_whitespace()
                .map(|upstream| {
                    let (id, state) = upstream.split_once('=').unwrap();
                    format!(r#"{{"id":"{id}","address":"127.0.0.1:1","state":"{state}"}}"#)
                })
                .collect();
            let proxy = format!(r#"{{"proxy":{{"upstreams":[{}]}}}}"#, upstreams.join(","));
            format!(r#"{{"id":"{id}","match":{{"host":"{id}.example"}},"action":{proxy}}}"#)
        };
        let routes: Vec<String> = routes.iter().map(route).collect();
        serde_json::from_str(&format!(r#"{{"version":1,"routes":[{}]}}"#, routes.join(","))).unwrap()
    }

    #[test]
    fn a_deploy_reads_as_what_it_did() {
        let before = table(&[("shop", "s1=up s2=up"), ("blog", "b=up"), ("old", "o=up")]);
        let after = table(&[("shop", "s1=draining s3=up"), ("blog", "b=up"), ("new", "")]);
        let changes = changes_between(&before, &after);
        assert_eq!((changes.routes_added, changes.routes_removed, changes.routes_changed), (1, 1, 1));
        assert_eq!(changes.upstreams, ["s1: up → draining", "s3: new, up", "o: gone", "s2: gone"]);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut trail = Trail::default();
        let many: Vec<String> = (0..50).map(|n| format!("u{n}=up")).collect();
        let changes = changes_between(&table(&[]), &table(&[("shop", &many.join(" "))]));
        assert_eq!((changes.upstreams.len(), changes.upstreams_more), (UPSTREAMS_NAMED_MAX, 30));
        let request = "set_table".to_owned();
        let entry =
            Entry { time_ms: 1, by: Actor::Process, request, version: Some(1), refused: None, changes };
        (0..ENTRIES_MAX + 5).for_each(|_| trail.add(entry.clone()));
        assert_eq!(trail.show().entries.len(), ENTRIES_MAX);
        assert!(entry.to_string().contains("u0: new, up"), "{entry}");
    }
}

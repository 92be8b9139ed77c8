//! What the agent's own processes say. Each is asked for what came after the last record that was sent.

use epagent_log::Recent;
use epagent_syslog::{Facility, Message};
use epagent_wire::runner::{Reply, Request};
use epagent_wire::said::{Record, Said, Severity};

use super::Batch;
use super::positions::Seen;
use crate::apps::Parts;

/// The agent itself, the runner, the balancer. Who can't be asked now is asked the next time.
pub async fn gather(batch: &mut Batch, recent: &Recent, parts: &Parts) {
    let seen = batch.positions.agent;
    batch.positions.agent = put(batch, "epagentd", seen, &recent.after(seen.run, seen.last));
    let Seen { run, last: after } = batch.positions.runner;
    if let Ok(Reply::Said(said)) = parts.runner.call(Request::Said { run, after }).await {
        batch.positions.runner = put(batch, "epagent-runner", batch.positions.runner, &said);
    }
    let Seen { run, last: after } = batch.positions.balancer;
    if let Ok(said) = parts.routing.balancer().said(run, after).await {
        batch.positions.balancer = put(batch, "epagent-balancer", batch.positions.balancer, &said);
    }
}

fn put(batch: &mut Batch, daemon: &str, seen: Seen, said: &Said) -> Seen {
    // Whoever was never asked has lost nothing: what is gone is history.
    if said.lost > 0 && seen.run != 0 {
        batch.put(&message(daemon, &missing(said)));
    }
    for record in &said.records {
        batch.put(&message(daemon, record));
    }
    match said.records.is_empty() && seen.run == said.run {
        true => seen,
        false => Seen { run: said.run, last: said.last },
    }
}

fn missing(said: &Said) -> Record {
    let message = format!("{} records are missing here: they could not be sent in time", said.lost);
    let at_us = said.records.first().map_or(0, |first| first.at_us);
    let fields = vec![("dropped".to_owned(), said.lost.to_string())];
    Record { at_us, severity: Severity::Warning, message, fields }
}

fn message(daemon: &str, record: &Record) -> Message {
    Message {
        facility: Facility::Daemon,
        severity: record.severity.number(),
        timestamp: Message::timestamp_of(record.at_us),
        app_name: daemon.to_owned(),
        proc_id: String::new(),
        msg_id: String::new(),
        data: record.fields.clone(),
        text: record.message.clone().into_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::positions::Positions;
    use super::*;

    #[test]
    fn what_is_missing_is_told_before_what_comes_after_it() {
        let mut batch =
            Batch { frames: Vec::new(), hostname: "node1".to_owned(), positions: Positions::default() };
        let record = Record {
            at_us: 1_700_000_000_000_000,
            severity: Severity::Error,
            message: "down".to_owned(),
            fields: vec![("app".to_owned(), "shop".to_owned())],
        };
        let said = Said { run: 7, last: 12, lost: 3, records: vec![record] };
        let seen = put(&mut batch, "epagentd", Seen { run: 7, last: 8 }, &said);
        assert_eq!((seen.run, seen.last), (7, 12));
        let text = String::from_utf8(batch.frames).unwrap();
        let (missing, down) = text.split_once("in time").unwrap();
        assert!(
            missing.contains("<28>1 ") && missing.contains("[epagent@32473 dropped=\"3\"] 3 records"),
            "{text}"
        );
        assert!(down.contains(
            "<27>1 2023-11-14T22:13:20.000000Z node1 epagentd - - [epagent@32473 app=\"shop\"] down"
        ));
    }
}

//! An instance starts, runs its app, and its end is told exactly.

mod support;

use epagent_isolation::monitor::record::ExitReason;
use support::Node;

#[test]
fn an_app_runs_and_its_exit_code_is_told() {
    let node = Node::new();
    let (record, output) = node.outcome(&node.shell("hello", "echo hello; echo oops >&2; exit 7"));
    assert_eq!(record.reason, ExitReason::Exited { code: 7 }, "{record:?} {output}");
    assert!(output.contains("hello") && output.contains("oops"), "{output}");
}

//! What an operator changes under a node that is set up: its configuration, its disk.

mod common;

use std::fs;

use common::{Node, jail_of, start};
use epagent_wire::runner::Request;

#[test]
fn a_mistake_made_since_the_start_does_not_disturb_the_orderly_end() {
    let mut node = Node::start();
    let mut client = node.connect();
    client.release("shop", 1, &[("serve", "#!/bin/sh\nexec sleep 1000\n")]);
    let jail = jail_of("shop", 1);
    client.call(Request::Start { jail: jail.clone(), start: start("shop", "./serve") }).unwrap();
    client.runs(&jail);
    let before = fs::read(&node.config).unwrap();
    fs::write(&node.config, "nod = 1").unwrap();
    let ran = node.teardown();
    assert!(!ran.status.success(), "the mistake is none");
    let run = node.dir.path().join("run");
    let ran = node.teardown_with("--in-force", run.to_str().unwrap());
    fs::write(&node.config, before).unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

/// A disk that is not mounted, say. What is on record would count as gone.
#[test]
fn another_pool_than_that_of_the_records_is_refused() {
    let mut node = Node::start();
    let mut client = node.connect();
    client.release("shop", 1, &[("a", "b")]);
    assert!(node.teardown().status.success());
    let (file, aside) = (node.dir.path().join("pool.img"), node.dir.path().join("aside.img"));
    let refused = |node: &Node, why: &str| {
        let ran = node.run_to_end();
        let said = String::from_utf8_lossy(&ran.stderr);
        assert!(!ran.status.success() && said.contains(why), "{said}");
    };
    fs::rename(&file, &aside).unwrap();
    refused(&node, "pool.img is gone");
    assert!(!file.exists(), "made anew");
    // A teardown finds nothing to close, and nothing to make.
    let mut other = Node::start();
    other.connect().world();
    assert!(other.teardown().status.success());
    fs::rename(other.dir.path().join("pool.img"), &file).unwrap();
    refused(&node, "is another pool");
    assert!(node.teardown().status.success());
    fs::rename(&aside, &file).unwrap();
    node.run();
    assert_eq!(node.connect().world().releases.len(), 1, "forgotten");
}

//! What a syslog server gets of a node, with a real server, that reads strictly, at the other end of TLS.

#[path = "../../agent/syslog/tests/common/mod.rs"]
mod listener;

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use epagent_tests::host::DevHost;
use epagent_tests::{AppDir, eventually};
use listener::{Authority, Listener};

/// Long enough for a restart of the agent, its backoff and a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);
const LOCAL: &str = "127.0.0.1:0";

/// An app whose one process counts aloud, from 0.
fn counting() -> AppDir {
    let manifest =
        "app = \"count\"\nimage = \"host\"\n\n[process.worker]\ncommand = \"python3 -u count.py\"\n";
    let text = "import itertools, time\nfor n in itertools.count():\n    print(f'number {n}.')\n    time.sleep(0.005)\n";
    AppDir::manifest(manifest).with("count.py", text)
}

/// Has the agent send to the server from its next start on, and restarts it.
fn configure(host: &DevHost, port: u16, authority: &Authority) {
    let folder = host.state.join("etc/conf.d");
    fs::create_dir_all(&folder).unwrap();
    fs::copy(&authority.ca, host.state.join("etc/ca.pem")).unwrap();
    // The agent sees the state folder there.
    let text = format!("[epagentd.log]\nsyslog = \"tls://localhost:{port}\"\nca = \"/mnt/etc/ca.pem\"\n");
    fs::write(folder.join("50-log.toml"), text).unwrap();
    let old = host.kill("epagentd");
    host.wait_restarted("epagentd", old);
    host.wait_answering();
}

/// The numbers the app has counted, as they came.
fn numbers(got: &[String]) -> Vec<u64> {
    let counted = got.iter().filter_map(|message| message.rsplit_once("number ")?.1.strip_suffix('.'));
    counted.filter_map(|number| number.parse().ok()).collect()
}

fn highest(got: &[String]) -> u64 {
    numbers(got).into_iter().max().unwrap_or(0)
}

/// What came before and after where a number ought to be.
fn around(got: &[String], number: u64) -> &[String] {
    let after = got.iter().position(|message| message.ends_with(&format!("number {}.", number - 1)));
    after.map_or(&[], |at| &got[at..(at + 6).min(got.len())])
}

#[track_caller]
fn assert_whole(got: &[String]) {
    let faults: Vec<&String> = got.iter().filter(|message| message.starts_with("FAULT")).collect();
    assert!(faults.is_empty(), "{faults:?}");
    let counted: BTreeSet<u64> = numbers(got).into_iter().collect();
    let missing: Vec<u64> = (0..highest(got)).filter(|number| !counted.contains(number)).collect();
    assert!(missing.is_empty(), "{missing:?} are missing: {:?}", around(got, missing[0]));
    assert!(
        !got.iter().any(|message| message.contains("are missing here")),
        "the agent says that it lost some"
    );
}

#[test]
fn a_server_gets_what_apps_print_and_daemons_say_and_whose_it_is() {
    let host = DevHost::start();
    let authority = Authority::new("localhost");
    let server = Listener::start(LOCAL.parse().unwrap(), Some(authority.config.clone()));
    configure(&host, server.address.port(), &authority);
    host.deploy(&counting()).ok();
    eventually("the server has a thousand lines", PATIENCE, || {
        (highest(&server.got()) > 1_000).then_some(())
    });
    server.wait_for("number 7.");
    let got = eventually("every daemon was heard", PATIENCE, || {
        let got = server.got();
        let all = [" epagentd - - ", " epagent-runner - - ", " epagent-balancer - - "];
        all.iter().all(|daemon| got.iter().any(|message| message.contains(daemon))).then_some(got)
    });
    assert_whole(&got);
    let instance = host.ps()[0].id.clone();
    let line = got.iter().find(|message| message.ends_with("number 7.")).unwrap();
    assert!(line.starts_with("<134>1 ") && line.contains(" count worker.0 stdout [epagent@32473 "), "{line}");
    for fact in ["app=\"count\"", "process=\"worker\"", &format!("instance=\"{instance}\""), "deploy=\"d1\""]
    {
        assert!(line.contains(fact), "{fact} is not in {line}");
    }
    let deploy = got.iter().find(|message| message.contains("a deploy goes on")).unwrap();
    assert!(deploy.starts_with("<30>1 ") && deploy.contains("app=\"count\""), "{deploy}");
    assert!(deploy.contains("deploy=\"d1\""), "{deploy}");
    host.stop();
}

#[test]
fn a_server_that_was_away_and_an_agent_that_was_killed_lose_no_line() {
    let host = DevHost::start();
    let authority = Authority::new("localhost");
    let server = Listener::start(LOCAL.parse().unwrap(), Some(authority.config.clone()));
    let address = server.address;
    configure(&host, address.port(), &authority);
    host.deploy(&counting()).ok();
    eventually("the first lines came", PATIENCE, || (highest(&server.got()) > 100).then_some(()));
    let mut got = server.stop();
    let before = highest(&got);
    eventually("the doctor says that logs are not sent", PATIENCE, || {
        let checks = host.cli(&["doctor", "--json"]).stdout;
        (checks.contains("loop: syslog")
            && checks.contains(&format!("connect to tls://localhost:{}", address.port())))
        .then_some(())
    });
    let old = host.kill("epagentd");
    host.wait_restarted("epagentd", old);
    host.wait_answering();
    assert_eq!(host.healthy("count").len(), 1, "the app does not care");

    let server = Listener::start(address, Some(authority.config.clone()));
    eventually("later lines came", PATIENCE, || (highest(&server.got()) > before + 1_000).then_some(()));
    got.extend(server.stop());
    assert_whole(&got);
    host.stop();
}

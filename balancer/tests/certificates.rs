//! Certificates: which one a client is shown, how they are exchanged, and what is said of them.

mod common;

use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use common::app::App;
use common::prometheus::Scrape;
use common::secure::{Secure, telling};
use common::tls::{Authority, connect, get, try_get};
use common::{Balancer, PATIENCE, until};
use epagent_balancer::control::certificates::CertificateState;
use rustls::version::{TLS12, TLS13};

#[test]
fn certificates_are_chosen_by_the_name_asked_for() {
    let app = telling();
    let pairs: &[(&str, &[&str])] =
        &[("exact", &["shop.example"]), ("wild", &["*.shops.example"]), ("default", &["fallback.example"])];
    let secure = Secure::start("https", pairs, &[]);
    secure.balancer.route("*", &[("app", app.address, "up")]);
    let client = secure.authority.client(&[&TLS13]);
    for name in ["shop.example", "other.shops.example", "fallback.example"] {
        assert_eq!(
            get(&mut connect(&client, secure.address, name), name, "/").1,
            format!("https {name}").into_bytes()
        );
    }
    let refused = try_get(&mut connect(&client, secure.address, "a.b.example"), "a.b.example", "/");
    assert!(refused.expect_err("not for this name").to_string().contains("not valid for name"));
    until("it is counted", || secure.counter(|counters| counters.tls_rejected) == 1);

    // Without a default, the name is refused by the balancer.
    std::fs::remove_file(secure.certificates.join("default.crt")).expect("removed");
    std::fs::remove_file(secure.certificates.join("default.key")).expect("removed");
    let left = secure.balancer.control().reload_certificates().expect("read again");
    assert_eq!(left.in_force.iter().map(|pair| pair.id.as_str()).collect::<Vec<_>>(), ["exact", "wild"]);
    let refused = try_get(&mut connect(&client, secure.address, "a.b.example"), "a.b.example", "/");
    assert!(refused.expect_err("no certificate").to_string().contains("UnrecognisedName"));
    assert_eq!(secure.counter(|counters| counters.tls_unknown_name), 1);
}

#[test]
fn without_any_certificate_a_handshake_is_refused_with_a_reason() {
    let secure = Secure::start("https", &[], &[]);
    let client = secure.authority.client(&[&TLS12, &TLS13]);
    let refused = try_get(&mut connect(&client, secure.address, "a.example"), "a.example", "/");
    assert!(refused.expect_err("no certificate").to_string().contains("UnrecognisedName"));
    assert_eq!(secure.counter(|counters| counters.tls_no_certificate), 1);
}

#[test]
fn certificates_are_exchanged_under_load_without_a_failed_request() {
    let app = telling();
    let secure = Secure::http(&app);
    let (stopping, requests) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                // A client that remembers nothing checks a certificate each time.
                while !stopping.load(Ordering::Relaxed) {
                    let client = secure.authority.client(&[&TLS12, &TLS13]);
                    let mut stream = connect(&client, secure.address, "a.example");
                    for _ in 0..3 {
                        get(&mut stream, "a.example", "/");
                        requests.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        for round in 0..20 {
            let before = requests.load(Ordering::Relaxed);
            match round % 4 {
                // Half of a pair: the key does not belong to the certificate.
                1 => {
                    let (_, key) = secure.authority.issue(&["a.example"], 2090);
                    std::fs::write(secure.certificates.join("a.key"), key).expect("written");
                }
                2 => std::fs::write(secure.certificates.join("a.crt"), "no certificate").expect("written"),
                _ => secure.authority.write(&secure.certificates, "a", &["a.example"]),
            }
            let read = secure.balancer.control().reload_certificates().expect("read again");
            assert_eq!(
                (read.in_force.len(), read.refused.len()),
                (1, usize::from(matches!(round % 4, 1 | 2)))
            );
            assert!(
                read.refused.iter().all(|refused| refused.kept && refused.id == "a"),
                "{:?}",
                read.refused
            );
            until("requests go on", || requests.load(Ordering::Relaxed) >= before + 6);
        }
        stopping.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_broken_pair_is_refused_with_its_reason_and_the_others_serve() {
    let app = telling();
    let secure = Secure::http(&app);
    let (certificate, _) = secure.authority.issue(&["b.example"], 2090);
    let (_, other_key) = secure.authority.issue(&["b.example"], 2090);
    std::fs::write(secure.certificates.join("b.crt"), certificate).expect("written");
    std::fs::write(secure.certificates.join("b.key"), &other_key).expect("written");
    std::fs::write(secure.certificates.join("lonely.key"), &other_key).expect("written");
    std::fs::create_dir(secure.certificates.join("nested")).expect("a folder");
    let (certificate, key) = secure.authority.issue(&["nested.example"], 2021);
    std::fs::write(secure.certificates.join("nested/fullchain.pem"), certificate).expect("written");
    std::fs::write(secure.certificates.join("nested/privkey.pem"), key).expect("written");
    let output = Command::new(env!("CARGO_BIN_EXE_epagent-balancer"))
        .args(["reload-certificates", "--control"])
        .arg(secure.balancer.control_path())
        .output()
        .expect("it runs");
    let wrong = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "a deploy hook would not notice");
    assert!(
        wrong.contains("b is refused: the key") && wrong.contains("lonely is refused: there is no"),
        "{wrong}"
    );
    assert!(!wrong.contains("BEGIN") && !wrong.contains(&other_key[40..80]), "a key is shown: {wrong}");
    let shown = secure.balancer.status().certificates;
    let states: Vec<_> = shown.in_force.iter().map(|pair| (pair.id.as_str(), pair.state)).collect();
    assert_eq!(states, [("a", CertificateState::Valid), ("nested", CertificateState::Expired)]);
    assert_eq!(shown.in_force[1].not_after, "2021-01-01T00:00:00Z");
    assert!(shown.refused.iter().all(|refused| !refused.kept));

    // An expired one is shown all the same; a client that looks refuses it.
    let client = secure.authority.client(&[&TLS13]);
    let refused = try_get(&mut connect(&client, secure.address, "nested.example"), "nested.example", "/");
    assert!(refused.expect_err("expired").to_string().contains("expired"));
    get(&mut connect(&client, secure.address, "a.example"), "a.example", "/");
}

#[test]
fn a_hangup_signal_reads_certificates_again() {
    let secure = Secure::start("https", &[("a", &["a.example"])], &[]);
    secure.authority.write(&secure.certificates, "b", &["b.example"]);
    secure.balancer.signal(nix::sys::signal::Signal::SIGHUP);
    until("it is in force", || secure.balancer.status().certificates.in_force.len() == 2);
}

#[test]
fn challenges_of_acme_are_answered_from_their_folder_and_others_by_the_app() {
    let app = App::named("the app");
    let dir = tempfile::tempdir().expect("a folder");
    let below = dir.path().join(".well-known/acme-challenge");
    let secure = Secure::start(
        "https",
        &[("a", &["a.example"])],
        &["--acme-dir", dir.path().to_str().expect("a path"), "--threads", "2"],
    );
    let ask = |path: &str| {
        let mut client = TcpStream::connect(secure.balancer.http).expect("a connection");
        client.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        get(&mut client, "new.example", &format!("/.well-known/acme-challenge/{path}"))
    };
    // An ACME client makes the folder when it needs it, and no app has to be there.
    std::fs::create_dir_all(&below).expect("made");
    std::fs::write(below.join("Tok-en_1"), "Tok-en_1.thumb").expect("written");
    assert_eq!(ask("Tok-en_1").1, b"Tok-en_1.thumb");
    assert!(ask("absent").0.starts_with("HTTP/1.1 503"), "no app is deployed");
    secure.balancer.route("*", &[("app", app.address, "up")]);
    for path in ["absent", "", "a/b", "..%2f", "Tok-en_1?query", &"x".repeat(200)] {
        assert_eq!(ask(path).1, b"the app", "{path}");
    }
    assert_eq!(ask("Tok-en_1").1, b"Tok-en_1.thumb");
    // A challenge is for plain HTTP alone.
    let mut client = connect(&secure.authority.client(&[&TLS13]), secure.address, "a.example");
    assert_eq!(get(&mut client, "a.example", "/.well-known/acme-challenge/Tok-en_1").1, b"the app");
    assert_eq!(secure.counter(|counters| counters.acme_challenges), 2);
}

#[test]
fn what_time_makes_of_a_certificate_is_said_once_each_while_it_serves() {
    let dir = tempfile::tempdir().expect("a folder");
    let authority = Authority::new();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    let (ends, nears) = (now + 4, now + 21 * 86_400 + 4);
    for (id, until) in [("ends", ends), ("nears", nears)] {
        let pair = authority.issue_until(&[&format!("{id}.example")], until);
        authority.write_pair(dir.path(), id, pair);
    }
    let path = dir.path().to_str().expect("a path");
    let (balancer, heard) =
        Balancer::start_heard(&["--tls-dir", path, "--listen", "https=127.0.0.1:0", "--threads", "2"]);
    let address = balancer.listener("https");
    // Handshakes say nothing, before and after.
    let shake_hands_with_both = || {
        for name in ["ends.example", "nears.example"] {
            let client = authority.client(&[&TLS13]);
            let _ = try_get(&mut connect(&client, address, name), name, "/");
        }
    };
    shake_hands_with_both();
    until("it has expired", || heard.count("CERTIFICATE ends (ends.example) EXPIRED") == 1);
    until("the other nears its end", || heard.count("certificate nears (nears.example) expires soon") == 1);
    (0..5).for_each(|_| shake_hands_with_both());
    let shown = balancer.status().certificates.in_force;
    let states: Vec<_> = shown.iter().map(|pair| (pair.id.as_str(), pair.state)).collect();
    assert_eq!(states, [("ends", CertificateState::Expired), ("nears", CertificateState::ExpiresSoon)]);
    let metrics = Scrape::read(&balancer.control().metrics().expect("metrics"));
    for (id, until) in [("ends", ends), ("nears", nears)] {
        let label = [("certificate", id)];
        assert_eq!(metrics.value("certificate_not_after_timestamp_seconds", &label), until as f64);
    }
    assert_eq!(metrics.value("certificates", &[("state", "in_force")]), 2.0);
    assert_eq!((heard.count("EXPIRED"), heard.count("nears.example) expires soon")), (1, 1));

    // Renewed, it is well again, and a refused one is counted.
    authority.write(dir.path(), "ends", &["ends.example"]);
    std::fs::write(dir.path().join("half.crt"), "").expect("written");
    let read = balancer.control().reload_certificates().expect("read again");
    assert_eq!((read.in_force[0].state, read.refused.len()), (CertificateState::Valid, 1));
    let metrics = Scrape::read(&balancer.control().metrics().expect("metrics"));
    assert!(
        metrics.value("certificate_not_after_timestamp_seconds", &[("certificate", "ends")]) > ends as f64
    );
    assert_eq!(metrics.value("certificates", &[("state", "refused")]), 1.0);
    let client = authority.client(&[&TLS13]);
    try_get(&mut connect(&client, address, "ends.example"), "ends.example", "/")
        .expect("it is trusted again");
}

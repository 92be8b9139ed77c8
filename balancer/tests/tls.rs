//! TLS ends at the balancer: with real clients (rustls, curl, openssl), and what each fault leads to.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::app::{App, respond};
use common::tls::{Authority, connect, get, read_response, shake_hands, try_connect, try_get};
use common::{Balancer, PATIENCE, checksum, host_route, noise, port_route, read_all, until};
use epagent_balancer::control::certificates::CertificateState;
use epagent_balancer::control::protocol::Counters;
use rustls::version::{TLS12, TLS13};
use rustls::{HandshakeKind, ProtocolVersion};

/// A balancer with a TLS listener, and the folder of its certificates.
struct Secure {
    balancer: Balancer,
    authority: Authority,
    certificates: PathBuf,
    address: SocketAddr,
    _dir: tempfile::TempDir,
}

impl Secure {
    /// With the pairs given by name and host names, and a listener of this kind.
    fn start(listener: &str, pairs: &[(&str, &[&str])], arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let (authority, certificates) = (Authority::new(), dir.path().to_owned());
        for (id, names) in pairs {
            authority.write(&certificates, id, names);
        }
        let listen = format!("{listener}=127.0.0.1:0");
        let tls = ["--tls-dir", certificates.to_str().expect("a path"), "--listen", &listen];
        let balancer = Balancer::start(&[&tls, arguments].concat());
        let status = balancer.status();
        let listener = status.listeners.iter().find(|known| known.name == listener).expect("a listener");
        let address = listener.address.parse().expect("an address");
        Self { balancer, authority, certificates, address, _dir: dir }
    }

    /// For HTTP, with one certificate and one app.
    fn http(app: &App) -> Self {
        let secure = Self::start("https", &[("a", &["a.example", "*.a.example"])], &[]);
        secure.balancer.routes(&host_route("*", &[("app", app.address, "up")]));
        secure
    }

    /// For bytes, with one certificate; the port is that of the route.
    fn tcp(upstream: SocketAddr) -> Self {
        let secure = Self::start("tls-4443", &[("a", &["a.example"])], &[]);
        secure.balancer.routes(&port_route(4443, &[("db", upstream, "up")]));
        secure
    }

    fn counter(&self, count: impl Fn(&Counters) -> u64) -> u64 {
        count(&self.balancer.status().counters)
    }
}

/// Answers with how the balancer says it was reached.
fn telling() -> App {
    App::start(|request, stream| {
        let proto = request.field("x-forwarded-proto").unwrap_or_default().to_owned();
        respond(stream, format!("{proto} {}", request.field("x-forwarded-host").unwrap_or("-")).as_bytes())
    })
}

/// An app that handles each connection with `serve`, on a thread of its own.
fn accepting(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("an address");
    let address = listener.local_addr().expect("its address");
    let serve = std::sync::Arc::new(serve);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = serve.clone();
            std::thread::spawn(move || serve(stream));
        }
    });
    address
}

#[test]
fn curl_speaks_both_versions_and_is_told_http_1_1() {
    let app = telling();
    let secure = Secure::http(&app);
    let authority = secure.certificates.join("authority.pem");
    std::fs::write(&authority, secure.authority.pem()).expect("written");
    for version in [&["--tlsv1.2", "--tls-max", "1.2"][..], &["--tlsv1.3"]] {
        let port = secure.address.port();
        let output = Command::new("curl")
            .args(["--silent", "--show-error", "--http2", "--max-time", "20", "--cacert"])
            .arg(&authority)
            .args(version)
            .args(["--write-out", " over HTTP/%{http_version}", "--resolve"])
            .arg(format!("a.example:{port}:127.0.0.1"))
            .arg(format!("https://a.example:{port}/"))
            .output()
            .expect("curl runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let wrong = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(said, format!("https a.example:{port} over HTTP/1.1"), "{wrong}");
    }
    assert_eq!(secure.counter(|counters| counters.tls_handshakes), 2);
}

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
fn sessions_are_resumed_by_every_thread() {
    let app = telling();
    for version in [&TLS12, &TLS13] {
        let secure = Secure::start("https", &[("a", &["a.example"])], &["--threads", "2"]);
        secure.balancer.route("*", &[("app", app.address, "up")]);
        let client = secure.authority.client(&[version]);
        for round in 0..8 {
            let mut stream = connect(&client, secure.address, "a.example");
            get(&mut stream, "a.example", "/");
            let kind = stream.conn.handshake_kind().expect("done");
            assert_eq!(kind == HandshakeKind::Resumed, round > 0, "{kind:?} in round {round} of {version:?}");
        }
        assert_eq!(secure.counter(|counters| counters.tls_resumed), 7);
    }
}

#[test]
fn openssl_resumes_what_it_remembers() {
    let app = telling();
    let secure = Secure::http(&app);
    let mut child = Command::new("openssl")
        .args(["s_client", "-tls1_2", "-reconnect", "-servername", "a.example", "-connect"])
        .arg(secure.address.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("openssl runs");
    let (said, _) = read_all(child.stdout.take().expect("its output"));
    child.wait().expect("it ends");
    assert_eq!(String::from_utf8_lossy(&said).matches("Reused, TLSv1.2").count(), 5);
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
fn a_host_that_the_connection_is_not_for_is_misdirected() {
    let app = telling();
    let secure = Secure::http(&app);
    let client = secure.authority.client(&[&TLS13]);
    let mut stream = connect(&client, secure.address, "a.example");
    assert!(get(&mut stream, "b.a.example", "/").0.starts_with("HTTP/1.1 200"));
    let (head, _) = get(&mut stream, "elsewhere.example", "/");
    assert!(head.starts_with("HTTP/1.1 421") && head.contains("X-Epagent-Error: misdirected"), "{head}");
    assert!(get(&mut stream, "a.example", "/").0.starts_with("HTTP/1.1 200"), "the connection goes on");
    assert_eq!((app.request_count(), secure.counter(|counters| counters.misdirected)), (2, 1));
}

#[test]
fn plain_http_on_a_tls_port_is_told_so_in_plain_http() {
    let app = telling();
    let secure = Secure::http(&app);
    let mut stream = TcpStream::connect(secure.address).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let (head, body) = get(&mut stream, "a.example", "/");
    assert!(head.starts_with("HTTP/1.1 400") && head.contains("X-Epagent-Error: plain_http"), "{head}");
    assert!(String::from_utf8_lossy(&body).contains("HTTPS"));
    assert_eq!((stream.read(&mut [0; 1]).ok(), app.request_count()), (Some(0), 0));
    assert_eq!(secure.counter(|counters| counters.tls_plain_http), 1);

    let mut stream = TcpStream::connect(secure.address).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.write_all(b"\x00\x00\x00\x2f neither").expect("taken");
    assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
    until("it is counted", || secure.counter(|counters| counters.tls_not_tls) == 1);
}

#[test]
fn an_old_version_is_refused_and_counted() {
    let app = telling();
    let secure = Secure::http(&app);
    let output = Command::new("openssl")
        .args(["s_client", "-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0", "-connect"])
        .arg(secure.address.to_string())
        .stdin(Stdio::null())
        .output()
        .expect("openssl runs");
    let wrong = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(wrong.contains("alert protocol version"), "{wrong}");
    assert_eq!(secure.counter(|counters| counters.tls_no_shared_version), 1);
}

#[test]
fn a_handshake_that_takes_too_long_is_ended_and_counted() {
    let secure = Secure::start("https", &[("a", &["a.example"])], &["--header-timeout-ms", "200"]);
    let mut silent = TcpStream::connect(secure.address).expect("a connection");
    silent.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    silent.write_all(&[22, 3, 1]).expect("taken");
    assert!(matches!(silent.read(&mut [0; 1]), Ok(0) | Err(_)), "it is closed");
    assert_eq!(secure.counter(|counters| counters.tls_handshake_timeout), 1);
    let leaving = TcpStream::connect(secure.address).expect("a connection");
    drop(leaving);
    until("it is counted", || secure.counter(|counters| counters.tls_handshake_gone) == 1);
    assert_eq!(secure.counter(|counters| counters.connections_open), 0);
}

#[test]
fn plain_and_tls_listeners_serve_side_by_side() {
    let app = telling();
    let secure = Secure::http(&app);
    let client = secure.authority.client(&[&TLS13]);
    let mut over_tls = connect(&client, secure.address, "a.example");
    let mut plain = TcpStream::connect(secure.balancer.http).expect("a connection");
    for _ in 0..20 {
        assert_eq!(get(&mut over_tls, "a.example", "/").1, b"https a.example");
        assert_eq!(get(&mut plain, "a.example", "/").1, b"http a.example");
    }
    let status = secure.balancer.status();
    assert_eq!((status.counters.requests, status.counters.tls_handshakes), (40, 1));
}

#[test]
fn what_a_client_says_behind_a_proxy_header_is_tls() {
    let app = telling();
    let secure = Secure::start("https.proxy", &[("a", &["a.example"])], &[]);
    secure.balancer.route("*", &[("app", app.address, "up")]);
    let mut stream = connect(&secure.authority.client(&[&TLS13]), secure.address, "a.example");
    // The header and the hello in one segment.
    let mut first = b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 443\r\n".to_vec();
    stream.conn.write_tls(&mut first).expect("a hello");
    stream.sock.write_all(&first).expect("taken");
    assert_eq!(get(&mut stream, "a.example", "/").1, b"https a.example");
}

#[test]
fn streams_half_close_with_a_goodbye_both_ways() {
    // It answers only once the client has said all: a goodbye that is lost would hang here.
    let secure = Secure::tcp(accepting(|mut stream| {
        let (said, _) = read_all(&stream);
        let _ = stream.write_all(&said);
    }));
    for version in [&TLS12, &TLS13] {
        let mut client = connect(&secure.authority.client(&[version]), secure.address, "a.example");
        let body = noise(3, 300_000);
        client.write_all(&body).expect("taken");
        client.conn.send_close_notify();
        client.flush().expect("taken");
        let (got, end) = read_all(&mut client);
        // Without the balancer's own goodbye, rustls would call the end unexpected.
        assert_eq!((got.len(), checksum(&got), end), (body.len(), checksum(&body), None), "{version:?}");
    }
    until("nothing is left of it", || secure.balancer.upstream("db").active_connections == 0);
}

#[test]
fn a_stream_that_ends_without_a_goodbye_is_broken_off_and_not_ended() {
    let (told, heard) = std::sync::mpsc::channel();
    let secure = Secure::tcp(accepting(move |stream| {
        let _ = told.send(read_all(stream));
    }));
    let mut client = connect(&secure.authority.client(&[&TLS13]), secure.address, "a.example");
    client.write_all(b"half of it").expect("taken");
    client.flush().expect("taken");
    client.sock.shutdown(Shutdown::Write).expect("ended");
    let (_, end) = heard.recv_timeout(PATIENCE).expect("its end");
    assert_eq!(end, Some(ErrorKind::ConnectionReset));
    assert_eq!(secure.counter(|counters| counters.tls_cut), 1);
}

#[test]
fn a_hundred_megabytes_pass_both_ways_to_a_slow_reader_in_bounded_memory() {
    const SIZE: usize = 100 << 20;
    let body = noise(9, 1 << 20);
    let sum = checksum(&body);
    let sent = body.clone();
    // It sends all it has while it takes in what comes, and only then looks at it.
    let secure = Secure::tcp(accepting(move |stream| {
        let (sent, mut writer) = (sent.clone(), stream.try_clone().expect("a clone"));
        let sender = std::thread::spawn(move || {
            (0..SIZE >> 20).try_for_each(|_| writer.write_all(&sent)).expect("taken");
            writer.shutdown(Shutdown::Write).expect("ended");
        });
        let mut piece = vec![0; 1 << 20];
        let mut reader = stream;
        for _ in 0..SIZE >> 20 {
            reader.read_exact(&mut piece).expect("all of it");
            assert_eq!(checksum(&piece), sum, "it came out changed");
        }
        assert_eq!(reader.read(&mut piece).ok(), Some(0));
        sender.join().expect("all sent");
    }));
    let mut client = connect(&secure.authority.client(&[&TLS13]), secure.address, "a.example");
    shake_hands(&mut client).expect("a handshake");
    client.conn.set_buffer_limit(None);
    let before = secure.balancer.resident_kib();
    // Up first, with nothing read meanwhile: what comes down has to wait.
    for _ in 0..SIZE >> 20 {
        client.conn.writer().write_all(&body).expect("encrypted");
        while client.conn.wants_write() {
            client.conn.write_tls(&mut client.sock).expect("taken");
        }
    }
    let grown = secure.balancer.resident_kib().saturating_sub(before);
    // The receive buffers (8 MiB) are touched for the first time; the rest is what may wait.
    assert!(grown < 24 * 1024, "it has grown by {grown} KiB");
    client.conn.send_close_notify();
    client.flush().expect("taken");
    let mut piece = vec![0; 1 << 20];
    for _ in 0..SIZE >> 20 {
        client.read_exact(&mut piece).expect("all of it");
        assert_eq!(checksum(&piece), sum, "it came out changed");
    }
    assert_eq!(client.read(&mut piece).ok(), Some(0), "the balancer's goodbye");
    until("nothing is left of it", || secure.balancer.upstream("db").active_connections == 0);
}

#[test]
fn websockets_are_carried() {
    let app = App::start(|request, stream| {
        assert_eq!(request.field("upgrade"), Some("websocket"));
        stream
            .write_all(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
            )
            .expect("taken");
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            stream.write_all(&bytes[..count]).expect("taken");
        }
        false
    });
    let secure = Secure::http(&app);
    let mut client = connect(&secure.authority.client(&[&TLS13]), secure.address, "a.example");
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        .expect("taken");
    assert!(read_response(&mut client).expect("a head").0.starts_with("HTTP/1.1 101"));
    for round in 0..50_u8 {
        let said = [round; 700];
        client.write_all(&said).expect("taken");
        let mut got = [0; 700];
        client.read_exact(&mut got).expect("the echo");
        assert_eq!(got, said);
    }
}

#[test]
fn changed_ciphertext_breaks_the_connection_off_and_is_counted() {
    let app = telling();
    let secure = Secure::http(&app);
    let mut client = connect(&secure.authority.client(&[&TLS13]), secure.address, "a.example");
    get(&mut client, "a.example", "/");
    assert_eq!(client.conn.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    let mut record = Vec::new();
    client.conn.writer().write_all(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n").expect("encrypted");
    client.conn.write_tls(&mut record).expect("a record");
    *record.last_mut().expect("a byte") ^= 1;
    client.sock.write_all(&record).expect("taken");
    assert!(client.read(&mut [0; 1]).is_err(), "it goes on as if nothing were");
    assert_eq!((app.request_count(), secure.counter(|counters| counters.tls_broken)), (1, 1));
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
fn an_idle_connection_is_closed_with_a_goodbye() {
    let app = telling();
    let secure = Secure::start("https", &[("a", &["a.example"])], &["--idle-timeout-ms", "200"]);
    secure.balancer.route("*", &[("app", app.address, "up")]);
    let mut client =
        try_connect(&secure.authority.client(&[&TLS12]), secure.address, "a.example").expect("one");
    get(&mut client, "a.example", "/");
    assert_eq!(client.read(&mut [0; 1]).ok(), Some(0), "an end without a goodbye is an error");
}

//! TLS ends at the balancer: with real clients (rustls, curl, openssl), and what each fault leads to.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};

use common::app::App;
use common::secure::{Secure, telling};
use common::tls::{connect, get, read_response, shake_hands, try_connect};
use common::{PATIENCE, checksum, noise, read_all, until};
use rustls::version::{TLS12, TLS13};
use rustls::{HandshakeKind, ProtocolVersion};

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

/// What a program prints, for telling why a test failed.
fn said_by(program: &str, arguments: &[&str]) -> String {
    let ran = Command::new(program).args(arguments).output();
    ran.map_or_else(
        |error| format!("{program}: {error}"),
        |ran| String::from_utf8_lossy(&ran.stdout).into_owned(),
    )
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
            if let Err(error) = client.conn.write_tls(&mut client.sock) {
                // Kernels without the receiver's part of RFC 7323 §2.4 ignore every acknowledgement of a peer whose
                // last segment, shorter than a unit of the window, they had no room for, until what they have is read:
                // then this client has `rb` exceeded and `backoff`, and of the balancer's socket nothing to receive.
                let (sockets, counts) = (said_by("ss", &["-tinmpeo"]), said_by("nstat", &["-az"]));
                panic!("{error}; {:?}\n{sockets}\n{counts}", secure.balancer.status());
            }
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
fn an_idle_connection_is_closed_with_a_goodbye() {
    let app = telling();
    let secure = Secure::start("https", &[("a", &["a.example"])], &["--idle-timeout-ms", "200"]);
    secure.balancer.route("*", &[("app", app.address, "up")]);
    let mut client =
        try_connect(&secure.authority.client(&[&TLS12]), secure.address, "a.example").expect("one");
    get(&mut client, "a.example", "/");
    assert_eq!(client.read(&mut [0; 1]).ok(), Some(0), "an end without a goodbye is an error");
}

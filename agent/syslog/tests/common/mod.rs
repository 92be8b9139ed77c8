//! A syslog server that believes nothing: it reads frames as RFC 6587 and RFC 5424 write them, and notes every fault.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

pub struct Listener {
    pub address: SocketAddr,
    got: Arc<Mutex<Vec<String>>>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A certificate for `localhost` and the authority that signed it, as a file.
pub struct Authority {
    pub ca: PathBuf,
    pub config: Arc<ServerConfig>,
    _folder: tempfile::TempDir,
}

impl Authority {
    pub fn new(name: &str) -> Authority {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let ca = folder.path().join("ca.pem");
        std::fs::write(&ca, made.cert.pem()).unwrap();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        Authority { ca, config: Arc::new(config), _folder: folder }
    }
}

impl Listener {
    /// In the network namespace of the calling thread. One connection after the other.
    pub fn start(address: SocketAddr, tls: Option<Arc<ServerConfig>>) -> Listener {
        let listener = TcpListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (got, is_over): (Arc<Mutex<Vec<String>>>, Arc<AtomicBool>) = Default::default();
        let (kept, over) = (got.clone(), is_over.clone());
        let thread = std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => serve(stream, tls.clone(), &kept, &over),
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Listener { address, got, is_over, thread: Some(thread) }
    }

    pub fn got(&self) -> Vec<String> {
        self.got.lock().unwrap().clone()
    }

    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.got().iter().any(|message| message.ends_with(text)) {
            assert!(Instant::now() < deadline, "{text:?} did not come: {:?}", self.got());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it and its connection, and frees the port.
    pub fn stop(mut self) -> Vec<String> {
        self.end();
        self.got()
    }

    fn end(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.end();
    }
}

fn serve(stream: TcpStream, tls: Option<Arc<ServerConfig>>, got: &Mutex<Vec<String>>, over: &AtomicBool) {
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let mut stream: Box<dyn Read> = match tls {
        Some(config) => Box::new(StreamOwned::new(ServerConnection::new(config).unwrap(), stream)),
        None => Box::new(stream),
    };
    let (mut pending, mut chunk) = (Vec::new(), [0; 16 << 10]);
    while !over.load(Ordering::Relaxed) {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(length) => pending.extend_from_slice(&chunk[..length]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
        loop {
            match frame(&pending) {
                Ok(Some((message, used))) => {
                    got.lock().unwrap().push(message);
                    pending.drain(..used);
                }
                Ok(None) => break,
                Err(fault) => {
                    got.lock().unwrap().push(format!("FAULT: {fault}"));
                    return;
                }
            }
        }
    }
}

/// The first frame, and its size; none when it is not whole.
fn frame(bytes: &[u8]) -> Result<Option<(String, usize)>, String> {
    let Some(end) = bytes.iter().position(|byte| *byte == b' ') else {
        return match bytes.len() > 10 {
            true => Err(format!("no length: {:?}", String::from_utf8_lossy(&bytes[..10]))),
            false => Ok(None),
        };
    };
    let digits = std::str::from_utf8(&bytes[..end]).map_err(|error| error.to_string())?;
    if digits.starts_with('0') || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("{digits:?} is no length"));
    }
    let length: usize = digits.parse().map_err(|_| format!("{digits:?} is no length"))?;
    let Some(message) = bytes.get(end + 1..end + 1 + length) else { return Ok(None) };
    let message = String::from_utf8(message.to_vec()).map_err(|error| error.to_string())?;
    check(&message)?;
    Ok(Some((message, end + 1 + length)))
}

/// `<PRI>1 TIMESTAMP HOSTNAME APP-NAME PROCID MSGID SD [MSG]`
fn check(message: &str) -> Result<(), String> {
    let fault = |what: &str| Err(format!("{what} in {message:?}"));
    let parts: Vec<&str> = message.splitn(7, ' ').collect();
    let [head, timestamp, hostname, app, process, id, rest] = parts[..] else {
        return fault("too few parts");
    };
    let priority = head.strip_prefix('<').and_then(|head| head.strip_suffix(">1"));
    let priority = priority.and_then(|text| text.parse::<u8>().ok());
    if priority.is_none_or(|number| number > 191) {
        return fault("a wrong priority");
    }
    let is_time = timestamp.len() >= 20 && timestamp.ends_with('Z') && timestamp.contains('T');
    if timestamp != "-" && !is_time {
        return fault("a wrong time");
    }
    for (token, max) in [(hostname, 255), (app, 48), (process, 128), (id, 32)] {
        if token.is_empty() || token.len() > max || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return fault("a wrong token");
        }
    }
    match rest == "-" || rest.starts_with("- ") || rest.starts_with("[epagent@32473 ") {
        true => Ok(()),
        false => fault("wrong structured data"),
    }
}

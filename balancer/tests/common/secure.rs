//! A balancer that ends TLS, with certificates made for a test.

use std::net::SocketAddr;
use std::path::PathBuf;

use epagent_balancer::control::protocol::Counters;

use super::app::{App, respond};
use super::tls::Authority;
use super::{Balancer, host_route, port_route};

/// A balancer with a TLS listener, and the folder of its certificates.
pub struct Secure {
    pub balancer: Balancer,
    pub authority: Authority,
    pub certificates: PathBuf,
    pub address: SocketAddr,
    _dir: tempfile::TempDir,
}

impl Secure {
    /// With the pairs given by name and host names, and a listener of this kind.
    pub fn start(listener: &str, pairs: &[(&str, &[&str])], arguments: &[&str]) -> Self {
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
    pub fn http(app: &App) -> Self {
        let secure = Self::start("https", &[("a", &["a.example", "*.a.example"])], &[]);
        secure.balancer.routes(&host_route("*", &[("app", app.address, "up")]));
        secure
    }

    /// For bytes, with one certificate; the port is that of the route.
    pub fn tcp(upstream: SocketAddr) -> Self {
        let secure = Self::start("tls-4443", &[("a", &["a.example"])], &[]);
        secure.balancer.routes(&port_route(4443, &[("db", upstream, "up")]));
        secure
    }

    pub fn counter(&self, count: impl Fn(&Counters) -> u64) -> u64 {
        count(&self.balancer.status().counters)
    }
}

/// Answers with how the balancer says it was reached.
pub fn telling() -> App {
    App::start(|request, stream| {
        let proto = request.field("x-forwarded-proto").unwrap_or_default().to_owned();
        respond(stream, format!("{proto} {}", request.field("x-forwarded-host").unwrap_or("-")).as_bytes())
    })
}

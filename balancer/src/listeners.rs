//! The listening sockets: handed over by whoever started us, bound at start, or bound for a route by port.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, sockopt};

use crate::control::protocol::{ListenerStatus, Problem};
use crate::core::io::ListenerId;
use crate::core::listen::{Listen, Mode};
use crate::ring::inherit::Inherited;
use crate::table::{Match, Table};

/// One listening socket.
pub struct Listener {
    pub listen: Listen,
    pub socket: Arc<OwnedFd>,
    origin: Origin,
}

/// Where a listening socket came from, and so how long it stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// Handed over: stays.
    Inherited,
    /// Asked for on the command line: stays.
    Fixed,
    /// Bound for a route: goes with it.
    Route,
}

/// All listening sockets.
pub struct Listeners {
    all: BTreeMap<ListenerId, Listener>,
    next_id: u32,
    /// Where sockets for routes by port are bound.
    port_address: IpAddr,
}

/// Why a socket does not listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("cannot listen on {address}: {source}")]
    Bind { address: SocketAddr, source: io::Error },
    #[error("the inherited descriptor {name:?} is no listening TCP socket")]
    NotListening { name: String },
    #[error(
        "the inherited descriptor {name:?} has a name that means nothing here: use http, control or tcp-PORT"
    )]
    UnknownName { name: String },
}

impl Listeners {
    pub fn new(port_address: IpAddr) -> Self {
        Self { all: BTreeMap::new(), next_id: 0, port_address }
    }

    pub fn iter(&self) -> impl Iterator<Item = (ListenerId, &Listener)> {
        self.all.iter().map(|(id, listener)| (*id, listener))
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Takes over an inherited socket named `http` or `tcp-PORT`.
    pub fn inherit(&mut self, inherited: Inherited) -> Result<(), ListenError> {
        let Inherited { name, socket } = inherited;
        let mode = match name.strip_prefix("tcp-").map(str::parse) {
            Some(Ok(port)) => Mode::Tcp { port },
            _ if name == "http" => Mode::Http,
            _ => return Err(ListenError::UnknownName { name }),
        };
        let listens = socket::getsockopt(&socket, sockopt::AcceptConn).unwrap_or(false);
        if !listens || local_address(&socket).is_none() {
            return Err(ListenError::NotListening { name });
        }
        prepare(&socket);
        self.add(Listen::plain(mode), socket, Origin::Inherited);
        Ok(())
    }

    /// Binds a socket that stays.
    pub fn bind(&mut self, listen: Listen, address: SocketAddr) -> Result<(), ListenError> {
        let socket = bound(address).map_err(|source| ListenError::Bind { address, source })?;
        self.add(listen, socket, Origin::Fixed);
        Ok(())
    }

    /// Binds what the table's routes by port need and nothing provides yet. What cannot be bound is said,
    /// and does not hinder the rest. Returns the new ones.
    pub fn bind_for(&mut self, table: &Table) -> (Vec<ListenerId>, Vec<Problem>) {
        let (mut added, mut problems) = (Vec::new(), Vec::new());
        for route in &table.routes {
            let Match::Port(port) = route.matches else { continue };
            if self.all.values().any(|listener| listener.listen.mode == (Mode::Tcp { port })) {
                continue;
            }
            let address = SocketAddr::new(self.port_address, port);
            match bound(address) {
                Ok(socket) => added.push(self.add(Listen::plain(Mode::Tcp { port }), socket, Origin::Route)),
                Err(source) => {
                    let message = ListenError::Bind { address, source }.to_string();
                    problems.push(Problem { route: Some(route.id.clone()), message });
                }
            }
        }
        (added, problems)
    }

    /// Lets go of sockets that were bound for routes the table no longer has; returns their ids.
    pub fn unbind_for(&mut self, table: &Table) -> Vec<ListenerId> {
        let wanted = |mode: Mode| match mode {
            Mode::Http | Mode::Sni => true,
            Mode::Tcp { port } => table.routes.iter().any(|route| route.matches == Match::Port(port)),
        };
        let stale = |listener: &Listener| listener.origin == Origin::Route && !wanted(listener.listen.mode);
        let gone: Vec<ListenerId> =
            self.all.iter().filter(|(_, listener)| stale(listener)).map(|(id, _)| *id).collect();
        for id in &gone {
            self.all.remove(id);
        }
        gone
    }

    pub fn status(&self) -> Vec<ListenerStatus> {
        let status = |listener: &Listener| ListenerStatus {
            name: listener.listen.to_string(),
            address: local_address(&listener.socket).unwrap_or_default(),
            inherited: listener.origin == Origin::Inherited,
        };
        self.all.values().map(status).collect()
    }

    fn add(&mut self, listen: Listen, socket: OwnedFd, origin: Origin) -> ListenerId {
        let id = ListenerId(self.next_id);
        self.next_id += 1;
        self.all.insert(id, Listener { listen, socket: Arc::new(socket), origin });
        id
    }
}

fn bound(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    socket::setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    socket::listen(&socket, Backlog::MAXCONN)?;
    prepare(&socket);
    Ok(socket)
}

/// Options that accepted sockets inherit from their listener, which saves two system calls for each.
fn prepare(socket: &OwnedFd) {
    // A socket without them works too.
    let _ = socket::setsockopt(socket, sockopt::TcpNoDelay, &true);
    let _ = socket::setsockopt(socket, sockopt::KeepAlive, &true);
}

fn local_address(socket: &OwnedFd) -> Option<String> {
    let address: SockaddrStorage = socket::getsockname(socket.as_raw_fd()).ok()?;
    let v4 = address.as_sockaddr_in().map(ToString::to_string);
    v4.or_else(|| address.as_sockaddr_in6().map(ToString::to_string))
}

//! The listening sockets: handed over by whoever started us, bound at start, or bound for a route by port.
//!
//! A socket on `[::]` takes IPv4 clients too, whatever `net.ipv6.bindv6only` says; their addresses are shown as
//! IPv4 ones. Clients of a unix socket have no address. What cannot be bound says which of the usual reasons it
//! is, and what to do about it.

pub mod unix;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::str::FromStr;
use std::sync::Arc;

use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, sockopt};

use self::unix::UnixListenError;
use crate::control::protocol::{ListenerStatus, Problem};
use crate::core::io::ListenerId;
use crate::core::listen::{BadName, Listen, Mode};
use crate::ring::inherit::Inherited;
use crate::sockets;
use crate::table::{Address, AddressError, ListenerLimits, Match, Table};

/// One listening socket.
pub struct Listener {
    pub listen: Listen,
    pub socket: Arc<OwnedFd>,
    /// Its own, where it does not go by those that all listeners have.
    pub limits: Option<ListenerLimits>,
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

impl Origin {
    /// What is behind its name when it is handed over or stored, so that it stays what it is.
    fn suffix(self) -> &'static str {
        match self {
            Self::Inherited => "",
            Self::Fixed => FIXED,
            Self::Route => ROUTE,
        }
    }
}

const FIXED: &str = ".bound";
const ROUTE: &str = ".route";

/// A socket to bind: what it is for, and where. Written `NAME=ADDRESS`, as in `http.trusted=[::]:8080` or
/// `http=unix:/run/front.sock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    pub listen: Listen,
    pub address: Address,
    /// Its own, where it does not go by those that all listeners have.
    pub limits: Option<ListenerLimits>,
}

/// Why `NAME=ADDRESS` is none.
#[derive(Debug, thiserror::Error)]
pub enum BadBind {
    #[error("{text:?} is not of the form NAME=ADDRESS")]
    Form { text: String },
    #[error(transparent)]
    Name(#[from] BadName),
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error("a listener's unix socket has an absolute path, which {path:?} is not")]
    Relative { path: String },
}

impl Bind {
    /// A listener there; only tenants have paths that are not absolute.
    pub fn new(listen: Listen, address: Address) -> Result<Self, BadBind> {
        match address {
            Address::Unix(path) if path.is_tenants() => {
                Err(BadBind::Relative { path: path.as_str().to_owned() })
            }
            address => Ok(Self { listen, address, limits: None }),
        }
    }

    /// Plain HTTP.
    pub fn http(address: SocketAddr) -> Self {
        Self { listen: Listen::plain(Mode::Http), address: Address::Tcp(address), limits: None }
    }
}

impl FromStr for Bind {
    type Err = BadBind;

    fn from_str(text: &str) -> Result<Self, BadBind> {
        let (name, address) = text.split_once('=').ok_or_else(|| BadBind::Form { text: text.to_owned() })?;
        Self::new(name.parse()?, address.parse()?)
    }
}

/// All listening sockets.
pub struct Listeners {
    all: BTreeMap<ListenerId, Listener>,
    next_id: u32,
    /// Where sockets for routes by port are bound.
    port_address: IpAddr,
    /// Handed over by a process that had bound them as it was told to: for whoever asks for the same.
    kept: Vec<(Listen, OwnedFd)>,
}

/// Why a socket does not listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error(
        "cannot listen on {address}: the port is in use; `ss -ltnp 'sport = :{port}'` shows by whom (a listener \
         on [::] takes IPv4 too)",
        port = address.port()
    )]
    InUse { address: SocketAddr },
    #[error(
        "cannot listen on {address}: ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE, \
         or a socket handed over by systemd"
    )]
    Privileged { address: SocketAddr },
    #[error("cannot listen on {address}: no interface here has this address")]
    NotHere { address: SocketAddr },
    #[error("cannot listen on {address}: {source}")]
    Bind { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Unix(#[from] UnixListenError),
    #[error("the inherited descriptor {name:?} is no listening stream socket")]
    NotListening { name: String },
    #[error(
        "the inherited descriptor {name:?} is not known here; besides listeners, it may be `control` or \
             `metrics`"
    )]
    UnknownName {
        name: String,
        #[source]
        source: BadName,
    },
}

impl ListenError {
    fn of(address: SocketAddr, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EADDRINUSE) => Self::InUse { address },
            Some(libc::EACCES) => Self::Privileged { address },
            Some(libc::EADDRNOTAVAIL) => Self::NotHere { address },
            _ => Self::Bind { address, source },
        }
    }
}

impl Listener {
    /// Its IP address, where it has one.
    pub fn local(&self) -> Option<SocketAddr> {
        local_address(&self.socket)
    }

    fn place(&self) -> String {
        let unix = || unix::path_of(&self.socket).map(|path| format!("unix:{path}"));
        self.local().map(|local| local.to_string()).or_else(unix).unwrap_or_default()
    }

    /// The name it is handed over or stored under.
    pub fn name(&self) -> String {
        format!("{}{}", self.listen, self.origin.suffix())
    }
}

impl Listeners {
    pub fn new(port_address: IpAddr) -> Self {
        Self { all: BTreeMap::new(), next_id: 0, port_address, kept: Vec::new() }
    }

    pub fn iter(&self) -> impl Iterator<Item = (ListenerId, &Listener)> {
        self.all.iter().map(|(id, listener)| (*id, listener))
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Takes over an inherited socket, whose name is that of a [`Listen`]; several may have the same. One that a
    /// balancer had bound itself has a suffix that says what for.
    pub fn inherit(&mut self, inherited: Inherited) -> Result<(), ListenError> {
        let Inherited { mut name, socket } = inherited;
        let origin =
            [Origin::Fixed, Origin::Route].into_iter().find(|origin| name.ends_with(origin.suffix()));
        let origin = origin.unwrap_or(Origin::Inherited);
        name.truncate(name.len() - origin.suffix().len());
        let listen: Listen = match name.parse() {
            Ok(listen) => listen,
            Err(source) => return Err(ListenError::UnknownName { name, source }),
        };
        let listens = socket::getsockopt(&socket, sockopt::AcceptConn).unwrap_or(false);
        let streams = socket::getsockopt(&socket, sockopt::SockType) == Ok(SockType::Stream);
        if !listens || !streams {
            return Err(ListenError::NotListening { name });
        }
        prepare(&socket);
        match origin {
            Origin::Fixed => self.kept.push((listen, socket)),
            _ => _ = self.add(listen, socket, origin),
        }
        Ok(())
    }

    /// Binds a socket that stays, unless one that was handed over is just that.
    pub fn bind(&mut self, Bind { listen, address, limits }: Bind) -> Result<(), ListenError> {
        let socket = match (self.take_kept(listen, &address), address) {
            (Some(socket), _) => socket,
            (None, Address::Tcp(address)) => {
                bound(address).map_err(|source| ListenError::of(address, source))?
            }
            (None, Address::Unix(path)) => {
                let socket = unix::bound(&path)?;
                prepare(&socket);
                socket
            }
        };
        let id = self.add(listen, socket, Origin::Fixed);
        if let Some(listener) = self.all.get_mut(&id) {
            listener.limits = limits;
        }
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
                    let message = ListenError::of(address, source).to_string();
                    problems.push(Problem { route: Some(route.id.clone()), message });
                }
            }
        }
        (added, problems)
    }

    /// Lets go of sockets that were bound for routes the table no longer has; returns their ids
    /// and names.
    pub fn unbind_for(&mut self, table: &Table) -> Vec<(ListenerId, String)> {
        let wanted = |mode: Mode| match mode {
            Mode::Http | Mode::Sni => true,
            Mode::Tcp { port } => table.routes.iter().any(|route| route.matches == Match::Port(port)),
        };
        let stale = |listener: &Listener| listener.origin == Origin::Route && !wanted(listener.listen.mode);
        let gone = self.all.extract_if(.., |_, listener| stale(listener));
        gone.map(|(id, listener)| (id, listener.name())).collect()
    }

    /// Closes what was handed over and nobody has asked for.
    pub fn forget_kept(&mut self) {
        self.kept.clear();
    }

    fn take_kept(&mut self, listen: Listen, address: &Address) -> Option<OwnedFd> {
        let is_there = |socket: &OwnedFd| match address {
            Address::Tcp(address) => local_address(socket).is_some_and(|bound| {
                bound.ip() == address.ip() && (address.port() == 0 || bound.port() == address.port())
            }),
            Address::Unix(path) => unix::path_of(socket).is_some_and(|bound| bound == path.as_str()),
        };
        let same = |(known, socket): &(Listen, OwnedFd)| *known == listen && is_there(socket);
        let at = self.kept.iter().position(same)?;
        Some(self.kept.remove(at).1)
    }

    /// Every socket, by the name it is handed over under.
    pub fn named(&self) -> Vec<(String, BorrowedFd<'_>)> {
        self.all.values().map(|listener| (listener.name(), listener.socket.as_fd())).collect()
    }

    /// Those that were bound by a balancer, and so are nobody else's to keep.
    pub fn own(&self) -> impl Iterator<Item = (ListenerId, &Listener)> {
        self.iter().filter(|(_, listener)| listener.origin != Origin::Inherited)
    }

    /// Lets go of all of them.
    pub fn clear(&mut self) {
        self.all.clear();
    }

    pub fn status(&self) -> Vec<ListenerStatus> {
        let status = |listener: &Listener| ListenerStatus {
            name: listener.listen.to_string(),
            address: listener.place(),
            inherited: listener.origin == Origin::Inherited,
        };
        self.all.values().map(status).collect()
    }

    fn add(&mut self, listen: Listen, socket: OwnedFd, origin: Origin) -> ListenerId {
        let id = ListenerId(self.next_id);
        self.next_id += 1;
        self.all.insert(id, Listener { listen, socket: Arc::new(socket), limits: None, origin });
        id
    }
}

/// A listening socket of our own, for other purposes than the data path's.
pub fn listening(address: &Address) -> Result<OwnedFd, ListenError> {
    match address {
        Address::Tcp(address) => bound(*address).map_err(|source| ListenError::of(*address, source)),
        Address::Unix(path) => Ok(unix::bound(path)?),
    }
}

fn bound(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    socket::setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        socket::setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
    }
    socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    socket::listen(&socket, Backlog::MAXCONN)?;
    prepare(&socket);
    Ok(socket)
}

/// Makes an accept that finds nothing return at once, for epoll (the ring waits all the same).
fn prepare(socket: &OwnedFd) {
    let _ = rustix::io::ioctl_fionbio(socket, true);
    sockets::prepare(socket);
}

fn local_address(socket: &OwnedFd) -> Option<SocketAddr> {
    let address: SockaddrStorage = socket::getsockname(socket.as_raw_fd()).ok()?;
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::from(SocketAddrV4::from(*v4)));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::from(SocketAddrV6::from(*v6))))
}

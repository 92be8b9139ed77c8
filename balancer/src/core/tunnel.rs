//! Bytes both ways, with nothing understood: plain TCP, and HTTP after a protocol switch.
//!
//! Each end is carried through as what it was: FIN as FIN once everything before it is delivered, so that
//! either side may go on talking, and a reset as a reset.

use super::chunk::Chunk;
use super::engine::Core;
use super::io::SockId;
use super::preface::proxy;
use super::session::{Finish, Role, Sock};
use super::slab::UpstreamKey;

impl Core {
    /// A plain TCP client's upstream stands.
    pub(super) fn start_tunnel(&mut self, id: SockId, key: UpstreamKey) {
        let Some(client) = self.socks.get(id).and_then(|sock| sock.peer) else { return };
        let Some(sock) = self.socks.get_mut(client) else { return };
        let Role::Tcp(tcp) = std::mem::replace(&mut sock.role, Role::Tunnel { upstream: None }) else {
            return;
        };
        let Some(upstream) = self.upstreams.get_mut(key) else { return };
        upstream.requests_total += 1;
        if upstream.proxy_protocol {
            let header = proxy::write_v2(tcp.origin.ends());
            self.push_to(id, Chunk::owned(header));
        }
        self.join_tunnel(id, client, key, tcp.inbuf);
    }

    /// An HTTP exchange becomes a tunnel. `fresh` is what the upstream said after its 101.
    pub(super) fn switch_to_tunnel(&mut self, id: SockId, client: SockId, fresh: Chunk) {
        let Some(Role::Upstream(conn)) = self.socks.get(id).map(|sock| &sock.role) else { return };
        let key = conn.upstream;
        let Some(sock) = self.socks.get_mut(client) else { return };
        let Role::Http(http) = std::mem::replace(&mut sock.role, Role::Tunnel { upstream: None }) else {
            return;
        };
        self.note(http.address, http.request.as_ref(), "upgraded", Some(101), Some(key));
        if let Some(upstream) = self.upstreams.get_mut(key) {
            upstream.active_requests -= 1;
        }
        self.counters.upgrades += 1;
        self.push_to(client, fresh);
        self.join_tunnel(id, client, key, http.inbuf);
    }

    fn join_tunnel(&mut self, id: SockId, client: SockId, key: UpstreamKey, said: Vec<u8>) {
        if let Some(upstream) = self.upstreams.get_mut(key) {
            upstream.active_connections += 1;
        }
        if let Some(sock) = self.socks.get_mut(id) {
            sock.role = Role::Tunnel { upstream: Some(key) };
            sock.moved_at = self.now;
        }
        self.push_to(id, Chunk::owned(said));
        for side in [id, client] {
            self.touch(side);
            if self.socks.get_mut(side).is_some_and(|sock| sock.read_closed) {
                self.tunnel_closed(side);
            }
        }
    }

    pub(super) fn tunnel_input(&mut self, id: SockId, chunk: Chunk) {
        if let Some(peer) = self.socks.get(id).and_then(|sock| sock.peer) {
            self.push_to(peer, chunk);
        }
    }

    /// One side has said all it will.
    pub(super) fn tunnel_closed(&mut self, id: SockId) {
        let Some(peer) = self.socks.get(id).and_then(|sock| sock.peer) else { return };
        if let Some(sock) = self.socks.get_mut(peer) {
            sock.finish = Finish::Fin;
        }
        self.touch(peer);
    }

    /// One side is gone: so is the other, with a reset.
    pub(super) fn tunnel_broken(&mut self, id: SockId) {
        self.close_tunnel(id, true);
    }

    /// Closes both sides.
    pub(super) fn close_tunnel(&mut self, id: SockId, reset: bool) {
        let Some(sock) = self.socks.get(id) else { return };
        let (client, upstream) = match sock.is_client() {
            true => (Some(id), sock.peer),
            false => (sock.peer, Some(id)),
        };
        if let Some(upstream) = upstream {
            self.discard_upstream(upstream, reset);
        }
        if let Some(client) = client {
            if let Some(sock) = self.socks.get_mut(client) {
                sock.peer = None;
            }
            self.close_client(client, reset);
        }
    }

    /// Whether both directions have ended and everything is delivered.
    pub(super) fn tunnel_is_over(&self, sock: &Sock) -> bool {
        let peer_fin = sock.peer.and_then(|peer| self.socks.get(peer)).is_none_or(|peer| peer.fin_sent);
        sock.fin_sent && peer_fin
    }
}

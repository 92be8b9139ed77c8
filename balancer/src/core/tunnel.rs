//! Bytes both ways, with nothing understood: plain TCP, and HTTP after a protocol switch.
//!
//! Each end is carried through as what it was: FIN as FIN once everything before it is delivered, so that
//! either side may go on talking, and a reset as a reset.

use super::chunk::Chunk;
use super::engine::Core;
use super::flow::{Flow, Outcome};
use super::io::SockId;
use super::preface::proxy;
use super::session::{Finish, HttpClient, Role, Sock};
use super::slab::UpstreamKey;

impl Core {
    /// A plain TCP client's upstream stands.
    pub(super) fn start_tunnel(&mut self, id: SockId, key: UpstreamKey) {
        let now_us = self.now_us();
        let Some(client) = self.socks.get(id).and_then(|sock| sock.peer) else { return };
        let Some(sock) = self.socks.get_mut(client) else { return };
        let role = std::mem::replace(&mut sock.role, Role::Tunnel { upstream: None, flow: None });
        let Role::Tcp(tcp) = role else { return };
        let Some(upstream) = self.upstreams.get_mut(key) else { return };
        upstream.requests_total += 1;
        if upstream.proxy_protocol {
            let header = proxy::write_v2(tcp.origin.ends());
            self.push_to(id, Chunk::owned(header));
        }
        let mut flow = Flow { host: tcp.server_name, ..tcp.flow };
        flow.given(now_us, key);
        self.join_tunnel(id, client, key, tcp.inbuf, flow);
    }

    /// An HTTP exchange becomes a tunnel. `fresh` is what the upstream said after its 101.
    pub(super) fn switch_to_tunnel(&mut self, id: SockId, client: SockId, fresh: Chunk) {
        let Some(Role::Upstream(conn)) = self.socks.get(id).map(|sock| &sock.role) else { return };
        let key = conn.upstream;
        let Some(sock) = self.socks.get_mut(client) else { return };
        let role = std::mem::replace(&mut sock.role, Role::Tunnel { upstream: None, flow: None });
        let Role::Http(http) = role else { return };
        let HttpClient { request: Some(request), inbuf: said, .. } = *http else { return };
        let mut flow = request.flow.clone();
        self.upgrade_flow(&mut flow, &request);
        flow.bytes_in += said.len() as u64;
        flow.bytes_out += fresh.len() as u64;
        if let Some(upstream) = self.upstreams.get_mut(key) {
            upstream.active_requests -= 1;
        }
        self.counters.upgrades += 1;
        self.push_to(client, fresh);
        self.join_tunnel(id, client, key, said, flow);
    }

    fn join_tunnel(&mut self, id: SockId, client: SockId, key: UpstreamKey, said: Vec<u8>, flow: Flow) {
        if let Some(Role::Tunnel { flow: place, .. }) = self.socks.get_mut(client).map(|sock| &mut sock.role)
        {
            *place = Some(Box::new(flow));
        }
        if let Some(upstream) = self.upstreams.get_mut(key) {
            upstream.active_connections += 1;
        }
        if let Some(sock) = self.socks.get_mut(id) {
            sock.role = Role::Tunnel { upstream: Some(key), flow: None };
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
        let Some(sock) = self.socks.get_mut(id) else { return };
        if let Some(flow) = sock.flow_mut() {
            flow.bytes_in += chunk.len() as u64;
        }
        if let Some(peer) = sock.peer {
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
        let by_client = self.socks.get(id).is_some_and(Sock::is_client);
        self.close_tunnel(id, true, if by_client { Outcome::Aborted } else { Outcome::Cut });
    }

    /// Closes both sides.
    pub(super) fn close_tunnel(&mut self, id: SockId, reset: bool, outcome: Outcome) {
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
            self.end_client(client, reset, outcome);
        }
    }

    /// Whether both directions have ended and everything is delivered.
    pub(super) fn tunnel_is_over(&self, sock: &Sock) -> bool {
        let peer_fin = sock.peer.and_then(|peer| self.socks.get(peer)).is_none_or(|peer| peer.fin_sent);
        sock.fin_sent && peer_fin
    }
}

//! The far sides of connections: what clients and apps do when it is their turn.

use std::collections::HashMap;

use crate::actors::{AppConn, Rng, pattern, take_front};
use crate::world::{Mode, World};

/// One TCP connection, seen from the far side.
#[derive(Default)]
pub struct Conn {
    pub to_core: Vec<u8>,
    pub to_core_fin: bool,
    pub to_far: Vec<u8>,
    pub to_far_fin: bool,
    /// How much `to_far` may hold.
    pub window: usize,
    pub reset: bool,
    pub core_closed: bool,
    /// The far side does nothing more.
    pub hung_up: bool,
}

/// Who is at the far end.
pub enum Far {
    Client(usize),
    App { app: usize, conn: AppConn },
    StreamClient(StreamEnd),
    StreamApp { app: usize, end: StreamEnd },
}

/// One end of a plain TCP stream: it sends its pattern, and checks the other's. A client's begins with
/// eight bytes that say which stream it is.
#[derive(Default)]
pub struct StreamEnd {
    id: Option<u64>,
    /// What comes before the stream itself has come.
    begun: bool,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
}

impl Far {
    pub fn is_of(&self, app: usize) -> bool {
        matches!(self, Far::App { app: owner, .. } | Far::StreamApp { app: owner, .. } if *owner == app)
    }
}

impl StreamEnd {
    pub fn client(rng: &mut Rng, id: u64, sizes: &mut HashMap<u64, (usize, usize)>) -> Self {
        let mut size = || [rng.below(500), rng.below(300_000)][rng.below(2) as usize] as usize;
        let (there, back) = (size(), size());
        sizes.insert(id, (there, back));
        let mut outgoing = id.to_le_bytes().to_vec();
        outgoing.extend_from_slice(&pattern(id, there));
        Self { id: Some(id), begun: true, outgoing, incoming: Vec::new() }
    }

    /// An app learns which stream it is, and begins its own.
    fn learn(&mut self, sizes: &HashMap<u64, (usize, usize)>) {
        if self.begun
            && self.id.is_none()
            && let Some((first, _)) = self.incoming.split_first_chunk::<8>()
        {
            let id = u64::from_le_bytes(*first);
            self.outgoing = pattern(id + 5_000, sizes[&id].1);
            self.id = Some(id);
        }
    }

    /// What must have come when the stream ends without a reset.
    fn expected(&self, is_app: bool, sizes: &HashMap<u64, (usize, usize)>) -> Vec<u8> {
        let Some(id) = self.id else { return Vec::new() };
        let (there, back) = sizes[&id];
        match is_app {
            true => [id.to_le_bytes().to_vec(), pattern(id, there)].concat(),
            false => pattern(id + 5_000, back),
        }
    }
}

impl World {
    /// Everybody may do something.
    pub fn all_act(&mut self) {
        for at in 0..self.conns.len() {
            let conn = &mut self.conns[at].0;
            if conn.hung_up || !self.rng.one_in(2) {
                continue;
            }
            let count = [self.rng.below(50), self.rng.below(200_000), self.rng.below(200_000)];
            let taken = take_front(&mut conn.to_far, count[self.rng.below(3) as usize] as usize);
            let over = conn.reset || (conn.to_far_fin && conn.to_far.is_empty());
            match self.conns[at].1 {
                Far::Client(n) => self.client_acts(at, n, &taken, over),
                Far::App { .. } => self.app_acts(at, &taken, over),
                Far::StreamClient(_) | Far::StreamApp { .. } => self.stream_acts(at, &taken, over),
            }
        }
    }

    /// A new connection, in the queue of a listener.
    pub fn dial(&mut self, listener: usize, far: Far) {
        let window = 64 + self.rng.below(100_000) as usize;
        let faulty = self.mode == Mode::Crashes;
        let to_core = self.prefaces.first_words(&mut self.rng, listener, faulty);
        self.conns.push((Conn { window, to_core, ..Conn::default() }, far));
        self.listeners[listener].queue.push_back(self.conns.len() - 1);
    }

    fn client_acts(&mut self, at: usize, n: usize, taken: &[u8], over: bool) {
        let crashes = self.mode == Mode::Crashes;
        let (rng, conn, client) = (&mut self.rng, &mut self.conns[at].0, &mut self.clients[n]);
        client.incoming.extend_from_slice(taken);
        client.read(over && !conn.reset);
        if crashes && rng.one_in(300) {
            (client.vanished, conn.reset) = (true, true);
        }
        if client.told_to_close || over || conn.reset {
            let left = !client.is_done() && !client.vanished;
            assert!(crashes || !left || client.told_to_close, "client {n} was cut off");
            // A request that may have been carried out is not for a client to repeat.
            client.vanished |= left && !client.told_to_close;
            (conn.to_core_fin, conn.hung_up) = (true, true);
            if left && client.told_to_close {
                client.reconnect();
                self.dial(0, Far::Client(n));
            }
            return;
        }
        client.go_on();
        let said = take_front(&mut client.outgoing, rng.below(100_000) as usize);
        conn.to_core.extend_from_slice(&said);
        let said_all = client.todo.is_empty() && client.outgoing.is_empty();
        conn.to_core_fin |= client.is_done() || (client.half_closes && said_all);
    }

    fn app_acts(&mut self, at: usize, taken: &[u8], over: bool) {
        let (conn, Far::App { app: owner, conn: app }) = &mut self.conns[at] else { return };
        if conn.reset {
            conn.hung_up = true;
            return;
        }
        app.incoming.extend_from_slice(taken);
        let (owner, ups, sick) = (*owner, app.ups, self.judging.sick[*owner]);
        for (id, repeatable) in app.serve(&mut self.rng, sick) {
            let Some(id) = id else {
                self.judging.checked(owner);
                continue;
            };
            self.judging.check_request(owner, ups);
            if !repeatable {
                *self.served.entry(id).or_default() += 1;
            }
        }
        let said = take_front(&mut app.outgoing, self.rng.below(100_000) as usize);
        conn.to_core.extend_from_slice(&said);
        if over || (app.closes_after_this && app.outgoing.is_empty()) {
            (conn.to_core_fin, conn.hung_up) = (true, over);
        }
    }

    fn stream_acts(&mut self, at: usize, taken: &[u8], over: bool) {
        let crashes = self.mode == Mode::Crashes;
        let (conn, far) = &mut self.conns[at];
        let (is_app, end) = match far {
            Far::StreamClient(end) => (false, end),
            Far::StreamApp { end, .. } => (true, end),
            _ => return,
        };
        if crashes && !is_app && self.rng.one_in(300) {
            conn.reset = true;
        }
        if conn.reset {
            // One without an id is a connect that failed.
            assert!(crashes || end.id.is_none(), "stream {:?} was reset", end.id);
            conn.hung_up = true;
            return;
        }
        end.incoming.extend_from_slice(taken);
        if is_app {
            end.begun = end.begun || self.prefaces.take_off(&mut end.incoming);
            end.learn(&self.stream_sizes);
        }
        if over {
            let expected = end.expected(is_app, &self.stream_sizes);
            assert!(end.incoming == expected, "stream {:?} ended early or came out changed", end.id);
        }
        let said = take_front(&mut end.outgoing, self.rng.below(100_000) as usize);
        conn.to_core.extend_from_slice(&said);
        conn.to_core_fin |= end.id.is_some() && end.outgoing.is_empty();
        conn.hung_up = over && conn.to_core_fin;
    }
}

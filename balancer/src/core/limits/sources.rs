//! Who has what of each route and listener: a bounded table of sources, the least recently seen out first.
//!
//! An entry that leaves takes its counts with it, so a source may start afresh after 65,536 others have come;
//! what it still had open is then not counted against it. That is the price of the bound, and at worst what a
//! source could have by using another address.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};

use super::super::io::ListenerId;
use super::super::slab::{RouteKey, Slab, SourceKey};
use super::bucket::Bucket;

/// Most sources known at a time, per thread; an entry takes about 150 bytes.
pub const SOURCES_MAX: usize = 65_536;
/// How many busy ones are passed over when the oldest is to go.
const PASSED_OVER_MAX: usize = 16;

/// Of what a source has something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    Listener(ListenerId),
    Route(RouteKey),
}

/// What one source has.
#[derive(Debug)]
pub struct Source {
    name: (Scope, IpAddr),
    /// Connections or requests at a time.
    pub open: u32,
    pub bucket: Bucket,
    older: Option<SourceKey>,
    newer: Option<SourceKey>,
}

/// All that are known.
#[derive(Debug, Default)]
pub struct Sources {
    slab: Slab<SourceKey, Source>,
    by_name: HashMap<(Scope, IpAddr), SourceKey>,
    oldest: Option<SourceKey>,
    newest: Option<SourceKey>,
}

impl Sources {
    /// What the largest table takes. A map of so many entries has twice as many places, and half as many again
    /// while it grows.
    pub fn bytes_max() -> usize {
        let place = size_of::<((Scope, IpAddr), SourceKey)>() + 1;
        SOURCES_MAX * (Slab::<SourceKey, Source>::SLOT_BYTES + 3 * place)
    }

    pub fn get_mut(&mut self, key: SourceKey) -> Option<&mut Source> {
        self.slab.get_mut(key)
    }

    pub fn len(&self) -> usize {
        self.slab.len()
    }

    /// How many are counted as open, of all.
    pub fn open(&self) -> u64 {
        self.slab.iter().map(|(_, source)| u64::from(source.open)).sum()
    }

    /// The entry of a client, which is now the most recently seen.
    pub fn find(&mut self, scope: Scope, address: IpAddr) -> SourceKey {
        let name = (scope, source_of(address));
        let key = match self.by_name.get(&name).copied() {
            Some(key) => {
                self.unlink(key);
                key
            }
            None => {
                if self.slab.len() >= SOURCES_MAX {
                    self.forget_oldest();
                }
                let source = Source { name, open: 0, bucket: Bucket::default(), older: None, newer: None };
                let key = self.slab.insert(source);
                self.by_name.insert(name, key);
                key
            }
        };
        self.link_newest(key);
        key
    }

    fn forget_oldest(&mut self) {
        for _ in 0..PASSED_OVER_MAX {
            let Some(oldest) = self.oldest else { return };
            if self.slab.get(oldest).is_none_or(|source| source.open == 0) {
                break;
            }
            self.unlink(oldest);
            self.link_newest(oldest);
        }
        let Some(oldest) = self.oldest else { return };
        self.unlink(oldest);
        if let Some(source) = self.slab.remove(oldest) {
            self.by_name.remove(&source.name);
        }
    }

    fn unlink(&mut self, key: SourceKey) {
        let Some(source) = self.slab.get_mut(key) else { return };
        let (older, newer) = (source.older.take(), source.newer.take());
        match older.and_then(|older| self.slab.get_mut(older)) {
            Some(older) => older.newer = newer,
            None => self.oldest = newer,
        }
        match newer.and_then(|newer| self.slab.get_mut(newer)) {
            Some(newer) => newer.older = older,
            None => self.newest = older,
        }
    }

    fn link_newest(&mut self, key: SourceKey) {
        let before = self.newest.replace(key);
        if let Some(source) = self.slab.get_mut(key) {
            source.older = before;
        }
        match before.and_then(|before| self.slab.get_mut(before)) {
            Some(before) => before.newer = Some(key),
            None => self.oldest = Some(key),
        }
    }
}

/// What an address counts as.
fn source_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(ip) => IpAddr::V4(ip),
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCOPE: Scope = Scope::Listener(ListenerId(1));

    fn v4(n: u32) -> IpAddr {
        IpAddr::V4(n.into())
    }

    #[test]
    fn a_network_of_version_6_is_one_source_and_so_is_a_mapped_address() {
        let mut sources = Sources::default();
        let mut find = |text: &str| sources.find(SCOPE, text.parse().unwrap());
        assert_eq!(find("2001:db8:1:2::1"), find("2001:db8:1:2:ffff::9"));
        assert_ne!(find("2001:db8:1:2::1"), find("2001:db8:1:3::1"));
        assert_eq!(find("192.0.2.1"), find("::ffff:192.0.2.1"));
        assert_ne!(find("192.0.2.1"), find("192.0.2.2"));
        let elsewhere = sources.find(Scope::Listener(ListenerId(2)), v4(1));
        assert_ne!(elsewhere, sources.find(SCOPE, v4(1)));
    }

    #[test]
    fn the_table_is_bounded_and_the_oldest_idle_one_goes() {
        let mut sources = Sources::default();
        let (busy, idle) = (sources.find(SCOPE, v4(1)), sources.find(SCOPE, v4(2)));
        sources.get_mut(busy).unwrap().open = 1;
        let kept = sources.find(SCOPE, v4(3));
        for n in 4..=SOURCES_MAX as u32 {
            sources.find(SCOPE, v4(n));
        }
        assert_eq!(sources.find(SCOPE, v4(3)), kept, "seen again: no longer the oldest");
        for n in 1..=100_000 {
            sources.find(SCOPE, v4(0x0100_0000 + n));
            assert_eq!(sources.len(), SOURCES_MAX);
            assert_eq!(sources.by_name.len(), SOURCES_MAX);
            if n == 1 {
                assert!(sources.get_mut(busy).is_some() && sources.get_mut(idle).is_none());
            }
        }
        assert!(sources.get_mut(busy).is_some(), "it was in use all the time");
        assert!(sources.get_mut(kept).is_none());
    }
}

//! Consistent hashing by a lookup table (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load
//! Balancer", NSDI 2016, section 3.4).
//!
//! Each upstream has its own order of all table entries, made from its name alone; in turn, each takes the
//! next entry of its order that is still free, a heavy one as many in a round as its weight says. Since the
//! orders do not depend on who else is there, one upstream more or less moves few entries of the others.
//!
//! Bounds, held by the tests below, for up to 255 hashing routes: with up to 200 upstreams, shares are within
//! 1 % of the weights and two entries; of those keys that need not move when one comes or leaves, less than 3 % do. A
//! lookup is a division and a load however many there are.
//!
//! The table follows from names and weights alone: every thread, every process and every machine that has the
//! same table of routes has the same mapping.

use std::iter;

use crate::core::random::mix;

/// Sizes to choose from, the best first. Primes, so that every stride visits every entry.
const SIZES: [u32; 5] = [65_537, 16_381, 4_093, 1_021, 251];
/// Most entries of all tables of a thread together, two bytes each: 32 MiB.
const ENTRIES_MAX: u64 = 16 * 1024 * 1024;
/// How often a key of one that is away is hashed anew before its neighbours in the table are asked.
const HASHES_MAX: u64 = 32;

/// The size of each table when so many routes hash: the largest with which all of them stay within
/// [`ENTRIES_MAX`], 65,537 for up to 255 routes. It must not depend on the upstreams, since with another size
/// every key moves.
pub fn size_for(hashing_routes: usize) -> u32 {
    let most = ENTRIES_MAX / hashing_routes.max(1) as u64;
    SIZES.into_iter().find(|size| u64::from(*size) <= most).unwrap_or(SIZES[SIZES.len() - 1])
}

/// A lookup table from hashes to upstreams.
#[derive(Debug)]
pub struct Maglev {
    /// Which upstream each entry belongs to, by its place in the list the table was made from.
    entries: Vec<u16>,
}

/// An upstream's order of the entries, as far as it has been used.
struct Order {
    name: u64,
    /// Its place in the list; a route has at most a thousand upstreams.
    index: u16,
    at: u64,
    stride: u64,
    weight: u32,
}

impl Maglev {
    /// Makes the table for upstreams given as (name, weight).
    pub fn new(upstreams: &[(u64, u32)], size: u32) -> Self {
        const FREE: u16 = u16::MAX;
        let size = u64::from(size);
        let mut entries = vec![FREE; size as usize];
        let mut orders: Vec<Order> =
            upstreams.iter().enumerate().map(|(index, of)| Order::new(index as u16, *of, size)).collect();
        // Whoever lists the upstreams in another order means the same.
        orders.sort_by_key(|order| order.name);
        let mut left = if orders.is_empty() { 0 } else { size };
        while left > 0 {
            for order in &mut orders {
                for _ in 0..order.weight {
                    if left == 0 {
                        break;
                    }
                    while entries[order.at as usize] != FREE {
                        order.at = (order.at + order.stride) % size;
                    }
                    entries[order.at as usize] = order.index;
                    left -= 1;
                }
            }
        }
        if orders.is_empty() {
            entries.clear();
        }
        Self { entries }
    }

    /// Whose this hash is.
    pub fn owner(&self, hash: u64) -> Option<usize> {
        let at = self.place(hash)?;
        Some(usize::from(self.entries[at]))
    }

    /// Whose it is when only these take part: its owner, or that of its next hash, and so on. So the keys of
    /// one that is away spread over the others by their weights.
    pub fn next_owner(&self, hash: u64, takes_part: impl Fn(usize) -> bool) -> Option<usize> {
        let rehashed = (1..HASHES_MAX).map(|round| mix(hash.wrapping_add(round)));
        let by_hash = iter::once(hash).chain(rehashed).filter_map(|hash| self.owner(hash));
        // Few of them take part: then any of them is as good.
        let by_place = self.entries.iter().map(|entry| usize::from(*entry));
        by_hash.chain(by_place).find(|index| takes_part(*index))
    }

    fn place(&self, hash: u64) -> Option<usize> {
        (!self.entries.is_empty()).then(|| (hash % self.entries.len() as u64) as usize)
    }
}

impl Order {
    fn new(index: u16, (name, weight): (u64, u32), size: u64) -> Self {
        let (first, second) = (mix(name), mix(name ^ 0x9E37_79B9_7F4A_7C15));
        Self { name, index, at: first % size, stride: second % (size - 1) + 1, weight: weight.max(1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::random::{Random, hash};

    fn fleet(count: usize, weight: impl Fn(usize) -> u32) -> Vec<(u64, u32)> {
        (0..count).map(|n| (hash(format!("shop.web.{n}").as_bytes()), weight(n))).collect()
    }

    fn table(fleet: &[(u64, u32)]) -> Maglev {
        Maglev::new(fleet, size_for(1))
    }

    /// For each of many keys the name of its owner.
    fn owners(fleet: &[(u64, u32)], away: Option<u64>) -> Vec<u64> {
        let table = table(fleet);
        let takes_part = |index: usize| Some(fleet[index].0) != away;
        let mut random = Random::new(7);
        let owner = |key: u64| fleet[table.next_owner(key, takes_part).unwrap()].0;
        (0..200_000).map(|_| owner(random.draw())).collect()
    }

    #[test]
    fn shares_follow_the_weights() {
        for (count, weights) in
            [(2, [1, 1, 1]), (3, [1, 2, 5]), (10, [1, 1, 1]), (10, [1, 16, 4]), (200, [1, 3, 2])]
        {
            let fleet = fleet(count, |n| weights[n % 3]);
            let table = table(&fleet);
            let total: u32 = fleet.iter().map(|(_, weight)| weight).sum();
            for (index, (_, weight)) in fleet.iter().enumerate() {
                let has = table.entries.iter().filter(|entry| usize::from(**entry) == index).count() as f64;
                let due = table.entries.len() as f64 * f64::from(*weight) / f64::from(total);
                // A share is whole entries, and the last round may end in the middle.
                let off = (has - due).abs();
                assert!(off <= 0.01 * due + 2.0, "{count}: {has} entries where {due} are due");
            }
        }
    }

    #[test]
    fn neighbouring_addresses_spread_by_weight() {
        let fleet = fleet(5, |n| n as u32 + 1);
        let table = table(&fleet);
        let mut counts = [0_u32; 5];
        for n in 0..30_000_u32 {
            counts[table.owner(hash(&n.to_be_bytes())).unwrap()] += 1;
        }
        for (count, (_, weight)) in counts.iter().zip(&fleet) {
            assert!(count.abs_diff(weight * 2_000) < 100 * weight, "{counts:?}");
        }
    }

    #[test]
    fn an_upstream_that_comes_or_goes_moves_hardly_any_other_key() {
        for count in [2, 3, 10, 50, 200] {
            let all = fleet(count, |n| [1, 2][n % 2]);
            for gone in [0, count / 2, count - 1] {
                let mut fewer = all.clone();
                let (name, _) = fewer.remove(gone);
                let (before, after) = (owners(&all, None), owners(&fewer, None));
                let others = before.iter().filter(|owner| **owner != name).count();
                let moved = before.iter().zip(&after).filter(|(a, b)| **a != name && a != b).count();
                assert!(moved * 100 < others * 3, "{count} less one: {moved} of {others} keys moved");
            }
        }
    }

    #[test]
    fn the_keys_of_one_that_is_away_spread_by_weight_and_no_others_move() {
        let fleet = fleet(6, |n| [1, 3][n % 2]);
        let away = fleet[1].0;
        let (before, after) = (owners(&fleet, None), owners(&fleet, Some(away)));
        assert!(before.iter().zip(&after).all(|(a, b)| *a == away || a == b), "a key moved for nothing");
        let moved: Vec<u64> = before.iter().zip(after).filter(|(a, _)| **a == away).map(|(_, b)| b).collect();
        let total: u32 = fleet.iter().filter(|(name, _)| *name != away).map(|(_, weight)| weight).sum();
        for (name, weight) in fleet.iter().filter(|(name, _)| *name != away) {
            let got = moved.iter().filter(|owner| *owner == name).count() as f64 / moved.len() as f64;
            let due = f64::from(*weight) / f64::from(total);
            assert!((got - due).abs() < 0.1 * due, "{got} of the keys where {due} are due");
        }
    }

    #[test]
    fn the_mapping_is_the_same_in_every_process() {
        // Figures of one run: whoever changes them moves every user's sessions.
        let fleet = fleet(5, |n| n as u32 + 1);
        let of_list = table(&fleet);
        let owners: Vec<usize> = (0..12).map(|n| of_list.owner(hash(&[n])).unwrap()).collect();
        assert_eq!((of_list.entries.len(), owners), (65_537, vec![4, 3, 3, 3, 3, 2, 3, 3, 3, 3, 0, 4]));
        let mut turned = fleet.clone();
        turned.reverse();
        let again = table(&turned);
        assert!(
            of_list.entries.iter().zip(&again.entries).all(|(a, b)| *a == 4 - *b),
            "the order of the list matters"
        );
    }

    #[test]
    fn tables_stay_within_their_memory() {
        assert_eq!((size_for(1), size_for(255), size_for(256)), (65_537, 65_537, 16_381));
        for routes in [1, 100, 1_000, 20_000] {
            assert!(u64::from(size_for(routes)) * routes as u64 <= ENTRIES_MAX);
        }
        assert_eq!(Maglev::new(&[], 251).owner(1), None);
    }
}

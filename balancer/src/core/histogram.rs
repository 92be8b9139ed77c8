//! How long things took, in buckets: cheap to add to, exact to merge, good to an eighth.
//!
//! Log-linear, as HdrHistogram's: each doubling is cut into four buckets of equal width, so the middle of a
//! bucket is within 12.5 % of whatever fell into it, from microseconds to most of a day. Adding is an index
//! from the leading zeros and one increment; the buckets (about a kilobyte) are made when the first value
//! comes, so what never sees traffic costs nothing.
//!
//! Bounds of buckets are sums of powers of two, so coarser ladders cut at powers of two (as the metrics do)
//! are exact. On the wire only the buckets with something in them appear: `[[index, count], ...]`.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Microseconds on a clock that never goes back, and spans of it.
pub type Micros = u64;

/// Values from here on share the last bucket: 2^36 µs, 19 hours.
const OCTAVES: u32 = 36;
/// Buckets per doubling, as a power of two.
const SUB_BITS: u32 = 2;
const SUBS: usize = 1 << SUB_BITS;
/// How many buckets there are.
pub const BUCKETS: usize = (OCTAVES as usize - 1) * SUBS + 1;

/// Counts of values by size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Histogram {
    counts: Option<Box<[u64; BUCKETS]>>,
    sum_us: u64,
    max_us: Micros,
}

/// Which bucket a value falls into.
fn bucket_of(value: Micros) -> usize {
    if value < SUBS as u64 {
        return value as usize;
    }
    let octave = value.ilog2();
    if octave >= OCTAVES {
        return BUCKETS - 1;
    }
    let sub = (value >> (octave - SUB_BITS)) as usize & (SUBS - 1);
    (octave - SUB_BITS + 1) as usize * SUBS + sub
}

/// The smallest value that is too large for a bucket; the last one has no end.
fn end_of(bucket: usize) -> Micros {
    if bucket < SUBS {
        return bucket as u64 + 1;
    }
    if bucket == BUCKETS - 1 {
        return Micros::MAX;
    }
    let (octave, sub) = (bucket / SUBS - 1, bucket % SUBS);
    ((SUBS + sub + 1) as u64) << octave
}

impl Histogram {
    /// Counts one value.
    pub fn record(&mut self, value: Micros) {
        let counts = self.counts.get_or_insert_with(|| Box::new([0; BUCKETS]));
        counts[bucket_of(value)] += 1;
        self.sum_us = self.sum_us.saturating_add(value);
        self.max_us = self.max_us.max(value);
    }

    /// How many values there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().flat_map(|counts| counts.iter()).sum()
    }

    pub fn sum_us(&self) -> u64 {
        self.sum_us
    }

    pub fn max_us(&self) -> Micros {
        self.max_us
    }

    /// How many values are below 2^`power` µs; exact, since buckets end there.
    pub fn count_below_power(&self, power: u32) -> u64 {
        let Some(counts) = &self.counts else { return 0 };
        counts[..bucket_of(1 << power.min(OCTAVES))].iter().sum()
    }

    /// A value that this share of all (0 to 1) does not exceed, to an eighth; 0 when there is none.
    pub fn quantile_us(&self, share: f64) -> Micros {
        let rank = (self.count() as f64 * share.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, count) in self.filled() {
            seen += count;
            if seen >= rank {
                let start = if bucket == 0 { 0 } else { end_of(bucket - 1) };
                let middle = start + (end_of(bucket) - 1).saturating_sub(start) / 2;
                return middle.min(self.max_us);
            }
        }
        0
    }

    /// Adds another's values.
    pub fn add(&mut self, other: &Histogram) {
        self.sum_us = self.sum_us.saturating_add(other.sum_us);
        self.max_us = self.max_us.max(other.max_us);
        let Some(more) = &other.counts else { return };
        let counts = self.counts.get_or_insert_with(|| Box::new([0; BUCKETS]));
        counts.iter_mut().zip(more.iter()).for_each(|(count, more)| *count += more);
    }

    fn filled(&self) -> impl Iterator<Item = (usize, u64)> {
        let counts = self.counts.iter().flat_map(|counts| counts.iter().copied().enumerate());
        counts.filter(|(_, count)| *count > 0)
    }
}

/// What a histogram is on the wire.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    sum_us: u64,
    max_us: Micros,
    buckets: Vec<(usize, u64)>,
}

impl Serialize for Histogram {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let buckets = self.filled().collect();
        Wire { sum_us: self.sum_us, max_us: self.max_us, buckets }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Histogram {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wire = Wire::deserialize(deserializer)?;
        let mut histogram = Self { counts: None, sum_us: wire.sum_us, max_us: wire.max_us };
        for (bucket, count) in wire.buckets {
            let counts = histogram.counts.get_or_insert_with(|| Box::new([0; BUCKETS]));
            let known = counts.get_mut(bucket);
            *known.ok_or_else(|| D::Error::custom(format!("there is no bucket {bucket}")))? += count;
        }
        Ok(histogram)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_without_gaps_and_an_eighth_wide() {
        for bucket in 0..BUCKETS - 1 {
            let end = end_of(bucket);
            assert_eq!((bucket_of(end - 1), bucket_of(end)), (bucket, bucket + 1), "around {end}");
            let start = if bucket == 0 { 0 } else { end_of(bucket - 1) };
            assert!(bucket < SUBS || (end - start) * SUBS as u64 <= start, "bucket {bucket} is too wide");
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert_eq!(bucket_of(1 << OCTAVES), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_right_to_an_eighth() {
        let mut histogram = Histogram::default();
        assert_eq!((histogram.quantile_us(0.5), histogram.count()), (0, 0));
        (1..=10_000).for_each(|value| histogram.record(value));
        for (share, exact) in [(0.01, 100.0), (0.5, 5_000.0), (0.9, 9_000.0), (0.99, 9_900.0)] {
            let found = histogram.quantile_us(share) as f64;
            assert!((found / exact - 1.0).abs() <= 0.126, "{share}: {found} for {exact}");
        }
        assert_eq!((histogram.max_us(), histogram.sum_us()), (10_000, 50_005_000));
        assert_eq!(histogram.count_below_power(10), 1_023);
        assert_eq!(histogram.count_below_power(36), 10_000);
    }

    #[test]
    fn merged_and_sent_it_stays_the_same() {
        let (mut all, mut odd, mut even) = (Histogram::default(), Histogram::default(), Histogram::default());
        for value in (0..60).map(|shift| 3_u64 << shift) {
            all.record(value);
            if value.ilog2() % 2 == 0 { even.record(value) } else { odd.record(value) }
        }
        odd.add(&even);
        assert_eq!(odd, all);
        let text = serde_json::to_string(&all).unwrap();
        assert_eq!(serde_json::from_str::<Histogram>(&text).unwrap(), all);
        assert!(serde_json::from_str::<Histogram>(&text.replace("[[3,", "[[9999,")).is_err());
    }
}

//! Latencies of reads: a histogram of nanoseconds whose buckets are at most 1/256 wide, so that percentiles of any
//! number of reads cost a fixed amount of memory.

use serde::Serialize;

/// Buckets for each power of two.
const SUB: usize = 256;
const SUB_BITS: u32 = 8;
/// Powers of two from 256 on, and the values below.
const GROUPS: usize = 64 - SUB_BITS as usize + 1;

/// Counts of latencies by length.
#[derive(Clone, Debug)]
pub struct Latencies {
    counts: Vec<u64>,
    reads: u64,
    sum_ns: u128,
    max_ns: u64,
}

/// What a histogram comes to, in nanoseconds. A percentile that so few reads do not have is null.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Mean.
    pub mean_ns: Option<u64>,
    /// Half of the reads take no longer.
    pub p50_ns: Option<u64>,
    /// 99 of 100 take no longer.
    pub p99_ns: Option<u64>,
    /// 999 of 1000 take no longer.
    #[serde(rename = "p99_9_ns")]
    pub p999_ns: Option<u64>,
    /// The longest.
    pub max_ns: Option<u64>,
}

impl Default for Latencies {
    fn default() -> Latencies {
        Latencies { counts: vec![0; GROUPS * SUB], reads: 0, sum_ns: 0, max_ns: 0 }
    }
}

impl Latencies {
    /// Adds a read that took so long.
    pub fn add(&mut self, ns: u64) {
        self.counts[bucket(ns)] += 1;
        self.reads += 1;
        self.sum_ns += u128::from(ns);
        self.max_ns = self.max_ns.max(ns);
    }

    /// Reads that were added.
    pub fn reads(&self) -> u64 {
        self.reads
    }

    /// The figures of all reads.
    pub fn summary(&self) -> Latency {
        let some = |v: u64| (self.reads > 0).then_some(v);
        Latency {
            mean_ns: some((self.sum_ns / u128::from(self.reads.max(1))) as u64),
            p50_ns: self.at(500),
            p99_ns: self.at(990),
            p999_ns: self.at(999),
            max_ns: some(self.max_ns),
        }
    }

    /// The latency that so many of 1000 reads do not exceed; `None` if no whole read is beyond.
    fn at(&self, per_mille: u64) -> Option<u64> {
        if self.reads * (1000 - per_mille) < 1000 {
            return None;
        }
        let rank = (self.reads * per_mille).div_ceil(1000);
        let mut below = 0;
        let reached = self.counts.iter().position(|n| {
            below += n;
            below >= rank
        });
        reached.map(|i| middle(i).min(self.max_ns))
    }
}

/// Values below 256 have a bucket each; beyond, the first nine binary digits choose it.
fn bucket(ns: u64) -> usize {
    let shift = (64 - ns.leading_zeros()).saturating_sub(SUB_BITS + 1);
    (ns >> shift) as usize + shift as usize * SUB
}

/// The middle of a bucket.
fn middle(bucket: usize) -> u64 {
    let shift = (bucket / SUB).saturating_sub(1);
    let first = (bucket - shift * SUB) as u64;
    (first << shift) + (1 << shift) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_as_wide_as_it_says() {
        let powers = (12..64).flat_map(|e| [(1 << e) - 1, 1 << e, (1 << e) + 1]);
        let mut last = 0;
        for ns in (0..4095).chain(powers).chain([u64::MAX]) {
            let b = bucket(ns);
            assert!(b >= last, "{ns}");
            last = b;
            assert!(middle(b).abs_diff(ns) <= ns / 256, "{ns} is told as {}", middle(b));
        }
    }

    #[test]
    fn percentiles_are_those_of_the_sorted_reads() {
        let mut l = Latencies::default();
        (1..=10_000).for_each(|i| l.add(i * 1000));
        let s = l.summary();
        for (told, right) in [(s.p50_ns, 5_000_000), (s.p99_ns, 9_900_000), (s.p999_ns, 9_990_000)] {
            assert!(told.unwrap().abs_diff(right) <= right / 256, "{told:?} for {right}");
        }
        assert_eq!((s.mean_ns, s.max_ns, l.reads()), (Some(5_000_500), Some(10_000_000), 10_000));
    }

    #[test]
    fn what_few_reads_cannot_tell_is_null() {
        let mut l = Latencies::default();
        assert_eq!(l.summary(), Latency::default());
        (0..100).for_each(|_| l.add(7));
        let s = l.summary();
        assert_eq!((s.p50_ns, s.p99_ns, s.p999_ns), (Some(7), Some(7), None));
    }
}

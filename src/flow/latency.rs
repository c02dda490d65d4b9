//! How long moves wait for their start: counts by length, from which quantiles are read.

use std::time::Duration;

/// Steps of each doubling.
const STEPS: u32 = 4;
/// Doublings from 1 ns on: the last is 17 s.
const DOUBLINGS: u32 = 35;

/// Counts of durations, each length within a fifth.
#[derive(Clone, Copy, Debug)]
pub struct Latencies {
    counts: [u32; (STEPS * DOUBLINGS) as usize],
}

impl Default for Latencies {
    fn default() -> Latencies {
        Latencies { counts: [0; (STEPS * DOUBLINGS) as usize] }
    }
}

impl Latencies {
    /// Counts one.
    pub fn add(&mut self, duration: Duration) {
        let ns = (duration.as_nanos() as u64).max(1);
        let doubling = ns.ilog2();
        // The two bits behind the first.
        let step = if doubling >= 2 { (ns >> (doubling - 2)) as u32 % STEPS } else { 0 };
        let at = (doubling * STEPS + step).min(STEPS * DOUBLINGS - 1);
        self.counts[at as usize] = self.counts[at as usize].saturating_add(1);
    }

    /// Adds what another has counted.
    pub fn merge(&mut self, other: &Latencies) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(n, o)| *n = n.saturating_add(*o));
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().map(|n| u64::from(*n)).sum()
    }

    /// The duration that a share of all does not exceed, rounded up to its step; `None` where there are none.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let all = self.count();
        let wanted = ((all as f64 * share).ceil() as u64).clamp(1, all.max(1));
        let mut seen = 0;
        let at = self.counts.iter().position(|n| {
            seen += u64::from(*n);
            seen >= wanted
        })?;
        let (doubling, step) = (at as u32 / STEPS, at as u32 % STEPS);
        let ns = (1u64 << doubling) as f64 * f64::from(STEPS + step + 1) / f64::from(STEPS);
        Some(Duration::from_nanos(ns as u64))
    }

    /// What was counted since `before`, an earlier state of this.
    pub fn since(&self, before: &Latencies) -> Latencies {
        let mut counts = self.counts;
        counts.iter_mut().zip(&before.counts).for_each(|(n, b)| *n = n.saturating_sub(*b));
        Latencies { counts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_what_was_counted() {
        let mut all = Latencies::default();
        assert_eq!((all.count(), all.quantile(0.5)), (0, None));
        for us in 1..=1000 {
            all.add(Duration::from_micros(us));
        }
        for (share, us) in [(0.5, 500.0), (0.99, 990.0), (0.001, 1.0), (1.0, 1000.0)] {
            let found = all.quantile(share).unwrap().as_secs_f64() * 1e6;
            assert!((us..us * 1.26).contains(&found), "{share}: {found} us");
        }
        let before = all;
        all.add(Duration::from_secs(40));
        all.add(Duration::ZERO);
        assert_eq!((all.since(&before).count(), all.count()), (2, 1002));
    }
}

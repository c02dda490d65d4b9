//! Which experts generated tokens used, and what caches and slots had of them.

use crate::flow::CacheStats;

/// Counts of uses by passes of generated tokens, over a stretch of a session.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExpertUses {
    /// Experts that were used, of those at home in VRAM, in RAM and on storage.
    pub homes: [u64; 3],
    /// What caches in RAM had of the last.
    pub caches: CacheStats,
    /// Choices of experts in RAM for a device that keeps some in slots.
    pub slot_uses: u64,
    /// Those of them that had a slot.
    pub slot_hits: u64,
}

impl ExpertUses {
    /// Adds what was counted at another time.
    pub fn add(&mut self, more: &ExpertUses) {
        self.homes.iter_mut().zip(more.homes).for_each(|(n, more)| *n += more);
        self.caches.add(&more.caches);
        self.slot_uses += more.slot_uses;
        self.slot_hits += more.slot_hits;
    }

    /// What was counted since `before`, an earlier state of this.
    pub fn since(&self, before: &ExpertUses) -> ExpertUses {
        ExpertUses {
            homes: std::array::from_fn(|home| self.homes[home] - before.homes[home]),
            caches: self.caches.since(&before.caches),
            slot_uses: self.slot_uses - before.slot_uses,
            slot_hits: self.slot_hits - before.slot_hits,
        }
    }

    /// Shares of the uses whose experts lay in VRAM, in RAM to stay, in RAM's caches, and on storage; `None` before any.
    pub fn shares(&self) -> Option<[f64; 4]> {
        let [vram, ram, storage] = self.homes;
        let cached = self.caches.counts.hits.min(storage);
        let all = (vram + ram + storage) as f64;
        (all > 0.0).then(|| [vram, ram, cached, storage - cached].map(|n| n as f64 / all))
    }

    /// Of the uses of experts on storage, the share that caches had; `None` without such.
    pub fn cache_hit_rate(&self) -> Option<f64> {
        let c = self.caches.counts;
        share(c.hits, c.hits + c.misses)
    }

    /// Of the device's choices of experts in RAM, the share that had a slot; `None` without slots or such choices.
    pub fn slot_hit_rate(&self) -> Option<f64> {
        share(self.slot_hits, self.slot_uses)
    }
}

fn share(part: u64, all: u64) -> Option<f64> {
    (all > 0).then(|| part as f64 / all as f64)
}

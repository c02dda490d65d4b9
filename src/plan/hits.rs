//! How often caches of experts hit: tokens of a routing through the machine that a run has.

use super::Cache;
use crate::flow::{Frames, Hold, Place, Policy, PoolSpec, Spec, Step, links};
use crate::model::ForcedRouting;

/// Tokens of a replay, and those before it that fill the caches.
pub const REPLAYED: u64 = 256;
/// See [`REPLAYED`].
pub const WARMING: u64 = 256;

/// What a cache did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replay {
    /// Chosen experts that it is for.
    pub uses: u64,
    /// Those that were there.
    pub hits: u64,
}

impl Replay {
    /// Share of the uses that were hits; 1 of none.
    pub fn rate(&self) -> f64 {
        if self.uses == 0 { 1.0 } else { self.hits as f64 / self.uses as f64 }
    }
}

/// Tokens of a layer, the `layer`th of those with experts, through a cache of so many slots; counted are those behind the
/// first `warm`. `cached`: whether an expert is one that the cache is for.
pub fn replay(
    routing: &ForcedRouting,
    layer: usize,
    slots: usize,
    (warm, tokens): (u64, u64),
    cached: &dyn Fn(usize) -> bool,
) -> Replay {
    let n = routing.mixture().experts;
    let pool = |frames, policy| PoolSpec { place: Place::Host, frames, policy, members: vec![true; n] };
    let mut frames: Frames<()> = Frames::new(Spec {
        homes: vec![Place::Storage; n],
        routed: vec![true; n],
        site: Place::Host,
        in_ram: Vec::new(),
        steps: vec![Step::Hole],
        demand_max: n,
        pools: vec![pool(2, Policy::Ring), pool(slots.max(1), Policy::Cache)],
        links: links(),
    });
    let mut ids = vec![0; routing.mixture().used];
    let mut before = frames.cache_counts(false);
    for token in 0..warm + tokens {
        if token == warm {
            before = frames.cache_counts(false);
        }
        routing.choose(layer, token, &mut ids);
        let mut units: Vec<usize> = ids.iter().map(|&e| e as usize).filter(|&e| cached(e)).collect();
        frames.demand(&mut units, false);
        for unit in units {
            while let Some(m) = frames.next_move(0) {
                frames.moved(0, m, Ok(()));
            }
            if let Hold::Ready(_, rank) = frames.hold(unit) {
                frames.reached(rank);
            }
        }
    }
    let after = frames.cache_counts(false);
    let (hits, misses) = (after.hits - before.hits, after.misses - before.misses);
    Replay { uses: hits + misses, hits }
}

/// The same by a list of what the cache holds, the last used first, which takes a fraction of the time: a token's choices that are
/// there are used before those that are brought.
fn replay_list(
    routing: &ForcedRouting,
    layer: usize,
    slots: usize,
    (warm, tokens): (u64, u64),
    cached: &dyn Fn(usize) -> bool,
) -> Replay {
    let mut ids = vec![0; routing.mixture().used];
    let mut list: Vec<u32> = Vec::with_capacity(slots + 1);
    let mut all = Replay::default();
    for token in 0..warm + tokens {
        routing.choose(layer, token, &mut ids);
        ids.retain(|e| cached(*e as usize));
        let there = ids.iter().filter(|e| list.contains(e)).count();
        ids.sort_by_key(|e| !list.contains(e));
        for &e in &ids {
            let at = list.iter().position(|held| *held == e);
            at.map(|at| list.remove(at));
            list.insert(0, e);
        }
        list.truncate(slots);
        if token >= warm {
            all = Replay { uses: all.uses + ids.len() as u64, hits: all.hits + there as u64 };
        }
        ids.resize(routing.mixture().used, 0);
    }
    all
}

/// The share of uses that each of `caches` will have there: `routing`'s, or that of experts which are all as likely.
/// `numbers` has, of each cache, which of the layers with experts it belongs to; `cached` says of an expert of a block whether
/// the block's cache is for it.
pub fn hit_rates(
    caches: &[Cache],
    numbers: &[usize],
    routing: Option<&ForcedRouting>,
    cached: &dyn Fn(usize, usize) -> bool,
) -> Vec<f64> {
    let of = |(c, &number): (&Cache, &usize)| match routing {
        None => c.uniform_hits(),
        Some(r) => replay_list(r, number, c.slots, (WARMING, REPLAYED), &|e| cached(c.block, e)).rate(),
    };
    caches.iter().zip(numbers).map(of).collect()
}

/// What a cache holds after `tokens` tokens, the oldest first: the last that were chosen of those that it is for.
pub fn held(
    routing: &ForcedRouting,
    layer: usize,
    slots: usize,
    tokens: u64,
    cached: &dyn Fn(usize) -> bool,
) -> Vec<usize> {
    let mut ids = vec![0; routing.mixture().used];
    let mut held = Vec::with_capacity(slots);
    for token in (0..tokens).rev() {
        if held.len() == slots {
            break;
        }
        routing.choose(layer, token, &mut ids);
        for &e in ids.iter().rev() {
            let e = e as usize;
            if held.len() < slots && cached(e) && !held.contains(&e) {
                held.push(e);
            }
        }
    }
    held.reverse();
    held
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Mixture, Routes};

    /// 256 tokens of four layers, and how often a list of the last used hits, one choice after the other, cold at first.
    const TRACE: &str = include_str!("../../tests/data/routing/trace.jsonl");
    const RATES: &str = include_str!("../../tests/data/routing/lru.txt");

    /// The machine's caches hit as an LRU list that sees one choice after the other: a token's choices are wanted together
    /// here, so that none evicts another, which is worth less than a percent.
    #[test]
    fn a_trace_hits_as_often_as_a_list_of_the_last_used() {
        let mixture = Mixture { layers: 4, experts: 64, used: 6 };
        let routing = ForcedRouting::trace(mixture, TRACE).unwrap();
        for line in RATES.lines().filter(|l| !l.starts_with('#')) {
            let [slots, warm, want] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line:?}") };
            let (slots, warm, want): (usize, u64, f64) =
                (slots.parse().unwrap(), warm.parse().unwrap(), want.parse().unwrap());
            let all = (0..4).map(|layer| replay(&routing, layer, slots, (warm, 256 - warm), &|_| true));
            let (hits, uses) = all.fold((0, 0), |(h, u), r| (h + r.hits, u + r.uses));
            let rate = hits as f64 / uses as f64;
            assert_eq!(uses, (256 - warm) * 24);
            assert!((want - 1e-4..want + 0.01).contains(&rate), "{slots} slots after {warm}: {rate}, {want} expected");
        }
    }

    #[test]
    fn experts_that_are_all_as_likely_are_there_as_often_as_slots_say() {
        let mixture = Mixture { layers: 1, experts: 64, used: 4 };
        let routing = ForcedRouting::new(mixture, Routes::Uniform, 1).unwrap();
        for slots in [16, 32, 48] {
            let r = replay(&routing, 0, slots, (64, 1000), &|_| true);
            assert!((r.rate() - slots as f64 / 64.0).abs() < 0.03, "{slots}: {r:?}");
        }
        // Of those that it is for.
        let r = replay(&routing, 0, 16, (64, 1000), &|e| e % 2 == 0);
        assert!((r.rate() - 0.5).abs() < 0.04 && r.uses < 2200, "{r:?}");
    }

    /// What plans are made with is what runs do.
    #[test]
    fn the_list_does_what_the_machine_does() {
        let mixture = Mixture { layers: 4, experts: 64, used: 6 };
        let of = |routes| ForcedRouting::new(mixture, routes, 1).unwrap();
        let trace = ForcedRouting::trace(mixture, TRACE).unwrap();
        for routing in [of(Routes::Uniform), of(Routes::Zipf(1.1)), trace] {
            for (layer, slots) in [(0, 18), (1, 24), (3, 40)] {
                for cached in [&|_| true, &|e| e % 3 > 0] as [&dyn Fn(usize) -> bool; 2] {
                    let machine = replay(&routing, layer, slots, (40, 200), cached);
                    let list = replay_list(&routing, layer, slots, (40, 200), cached);
                    assert_eq!(machine, list, "{} {layer} {slots}", routing.describe());
                }
            }
        }
    }

    #[test]
    fn what_is_held_is_what_was_chosen_last() {
        let mixture = Mixture { layers: 1, experts: 8, used: 2 };
        let routing = ForcedRouting::trace(mixture, "[[1,2]]\n[[3,1]]\n[[4,5]]").unwrap();
        assert_eq!(held(&routing, 0, 4, 3, &|_| true), [3, 1, 4, 5]);
        assert_eq!(held(&routing, 0, 4, 3, &|e| e != 1), [2, 3, 4, 5]);
        assert_eq!(held(&routing, 0, 9, 3, &|_| true), [2, 3, 1, 4, 5]);
    }
}

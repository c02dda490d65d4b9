//! The ring of slots as a pure state machine: no clock, no thread, no device.
//!
//! The schedule is cyclic: a pass consumes its streamed units in one fixed order, and the first
//! units of the next pass follow the last ones of this. Where a mixture of experts routes, the
//! schedule has a hole that [`Ring::demand`] fills. A slot goes
//! Free → Reading → Ready → Computing → Free; slots are given out in the order of consumption, so
//! that what is needed first is read first.

use std::collections::VecDeque;

/// One step of the cyclic schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A streamed unit.
    Unit(usize),
    /// Units that are known only when the router has run.
    Hole,
}

/// What a consumer may do with the unit it wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acquire {
    /// Compute from this slot.
    Ready(usize),
    /// Its read has not ended.
    Wait,
    /// Its read failed.
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    Reading,
    /// Reading for a pass that was given up.
    Stale,
    Ready,
    Failed,
    Computing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Item {
    Flight { unit: usize, slot: Option<usize>, demanded: bool },
    Hole,
}

/// The state machine.
#[derive(Clone, Debug)]
pub struct Ring {
    schedule: Vec<Step>,
    cursor: usize,
    slots: Vec<Slot>,
    /// What is to be consumed next, in order.
    queue: VecDeque<Item>,
    /// Whether units beyond a hole may be brought before it is filled.
    past_holes: bool,
    kept: Kept,
    /// The slot that was given out last, of those that are kept and of the others: slots are given out in turn, so that
    /// what is brought waits for the oldest use of a slot. On a device a slot is free when computing from it was called.
    last: [usize; 2],
}

/// Slots that are kept for some units: the last ones of a ring.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    /// How many slots.
    pub slots: usize,
    /// By unit, whether it goes to those slots, and to no others; units beyond the list do not.
    pub units: Vec<bool>,
}

impl Ring {
    /// A ring of `n_slots` over the steps of a pass. `demand_max`: most units that fill a hole.
    pub fn new(n_slots: usize, schedule: Vec<Step>, demand_max: usize) -> Ring {
        Ring {
            schedule,
            cursor: 0,
            slots: vec![Slot::Free; n_slots],
            queue: VecDeque::with_capacity(2 * n_slots + demand_max + 2),
            past_holes: true,
            kept: Kept::default(),
            last: [usize::MAX; 2],
        }
    }

    /// Keeps to the order of consumption even where what fills a hole is not known yet: for a ring
    /// that is fed by another one.
    pub fn in_strict_order(self) -> Ring {
        Ring { past_holes: false, ..self }
    }

    /// With some slots kept for some units. Units are still brought strictly in turn: one that has no free slot is waited
    /// for.
    pub fn keeping(self, kept: Kept) -> Ring {
        Ring { kept, ..self }
    }

    /// Gives out a free slot for `unit`.
    fn slot_for(&mut self, unit: usize) -> Option<usize> {
        let first_kept = self.slots.len() - self.kept.slots;
        let is_kept = self.kept.units.get(unit).is_some_and(|k| *k);
        let of = if is_kept { first_kept..self.slots.len() } else { 0..first_kept };
        let last = &mut self.last[usize::from(is_kept)];
        let next = if of.contains(last) { *last + 1 } else { of.start };
        let slot = (next..of.end).chain(of.start..next).find(|&s| self.slots[s] == Slot::Free)?;
        *last = slot;
        Some(slot)
    }

    fn free(&self) -> usize {
        self.slots.iter().filter(|s| **s == Slot::Free).count()
    }

    /// The next read to start, as (unit, slot), if a slot is free for one.
    pub fn next_read(&mut self) -> Option<(usize, usize)> {
        self.slots.iter().position(|s| *s == Slot::Free)?;
        let at = self.next_flight()?;
        let Item::Flight { unit, demanded, .. } = self.queue[at] else { return None };
        let slot = self.slot_for(unit)?;
        self.queue[at] = Item::Flight { unit, slot: Some(slot), demanded };
        self.slots[slot] = Slot::Reading;
        Some((unit, slot))
    }

    /// Whether the unit that is read into `slot` was demanded: the pass waits for it, and prefetched ones may wait.
    pub fn is_demanded(&self, slot: usize) -> bool {
        self.queue.iter().any(|i| matches!(i, Item::Flight { slot: Some(s), demanded: true, .. } if *s == slot))
    }

    /// Index of the first flight without a slot that may take one; extends the queue if needed.
    fn next_flight(&mut self) -> Option<usize> {
        // Past a hole, one slot is left for what will fill it.
        let past_hole = self.past_holes && self.slots.len() >= 3 && self.free() >= 2;
        let mut i = 0;
        loop {
            if i == self.queue.len() && !self.extend() {
                return None;
            }
            match self.queue[i] {
                Item::Hole if !past_hole => return None,
                Item::Flight { slot: None, .. } => return Some(i),
                _ => i += 1,
            }
        }
    }

    /// Appends the next step of the schedule; `false` if looking further makes no sense.
    fn extend(&mut self) -> bool {
        // Each step beyond one flight a slot cannot be read yet; holes alone lead nowhere.
        let holes = self.queue.iter().filter(|i| **i == Item::Hole).count();
        if self.schedule.is_empty() || self.queue.len() - holes > self.slots.len() || holes > 1 {
            return false;
        }
        let item = match self.schedule[self.cursor] {
            Step::Unit(unit) => Item::Flight { unit, slot: None, demanded: false },
            Step::Hole => Item::Hole,
        };
        self.queue.push_back(item);
        self.cursor = (self.cursor + 1) % self.schedule.len();
        true
    }

    /// The read into `slot` has ended.
    pub fn read_done(&mut self, slot: usize, ok: bool) {
        self.slots[slot] = match self.slots[slot] {
            Slot::Reading if ok => Slot::Ready,
            Slot::Reading => Slot::Failed,
            Slot::Stale => Slot::Free,
            other => unreachable!("a read ended in slot {slot}, which is {other:?}"),
        };
    }

    /// The consumer wants `unit`, which must be the next of the schedule.
    pub fn acquire(&mut self, unit: usize) -> Acquire {
        if self.queue.is_empty() {
            self.extend();
        }
        match self.queue.front() {
            Some(Item::Flight { unit: u, slot, .. }) if *u == unit => match slot.map(|s| (s, self.slots[s])) {
                Some((s, Slot::Ready)) => {
                    self.slots[s] = Slot::Computing;
                    self.queue.pop_front();
                    Acquire::Ready(s)
                }
                Some((_, Slot::Failed)) => Acquire::Failed,
                _ => Acquire::Wait,
            },
            other => unreachable!("unit {unit} was acquired, but {other:?} is next"),
        }
    }

    /// The consumer is done with a slot that it acquired.
    pub fn release(&mut self, slot: usize) {
        match self.slots[slot] {
            Slot::Computing => self.slots[slot] = Slot::Free,
            other => unreachable!("slot {slot} was released, but is {other:?}"),
        }
    }

    /// Fills the hole that is next with streamed units, in the order in which they will be acquired.
    pub fn demand(&mut self, units: &[usize]) {
        if self.queue.is_empty() {
            self.extend();
        }
        match self.queue.pop_front() {
            Some(Item::Hole) => {}
            other => unreachable!("units were demanded, but {other:?} is next"),
        }
        for &unit in units.iter().rev() {
            self.queue.push_front(Item::Flight { unit, slot: None, demanded: true });
        }
    }

    /// Gives the pass up: the next one begins at the schedule's start. Reads in flight end into
    /// slots that nobody waits for.
    pub fn restart(&mut self) {
        for s in &mut self.slots {
            *s = match *s {
                Slot::Reading | Slot::Stale => Slot::Stale,
                _ => Slot::Free,
            };
        }
        self.queue.clear();
        self.cursor = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Runs passes with reads that end in any order after any delay, and checks that each unit is
    /// delivered once, in order, from a slot that holds it.
    fn simulate(seed: u64, n_slots: usize, schedule: &[Step], experts: usize, passes: usize) {
        let ring = Ring::new(n_slots, schedule.to_vec(), experts);
        simulate_ring(seed, ring, schedule, experts, passes);
    }

    fn simulate_ring(seed: u64, mut ring: Ring, schedule: &[Step], experts: usize, passes: usize) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let n_slots = ring.slots.len();
        let mut reading: Vec<(usize, usize)> = Vec::new();
        let mut holds = vec![None; n_slots];
        for _ in 0..passes {
            for step in schedule {
                let wanted = match step {
                    Step::Unit(u) => vec![*u],
                    Step::Hole => {
                        let n = rng.random_range(0..=experts);
                        let units: Vec<usize> = (0..n).map(|_| 1000 + rng.random_range(0..50)).collect();
                        ring.demand(&units);
                        units
                    }
                };
                for unit in wanted {
                    let slot = deliver(&mut ring, &mut rng, &mut reading, &mut holds, unit);
                    assert_eq!(holds[slot], Some(unit), "seed {seed}");
                    let kept = ring.kept.units.get(unit).is_some_and(|k| *k);
                    assert_eq!(slot >= n_slots - ring.kept.slots, kept, "seed {seed}: unit {unit} in slot {slot}");
                    progress(&mut ring, &mut rng, &mut reading, &mut holds, Some(slot));
                    ring.release(slot);
                }
            }
            if rng.random_range(0..4) == 0 {
                ring.restart();
            }
        }
    }

    fn progress(
        ring: &mut Ring,
        rng: &mut impl Rng,
        reading: &mut Vec<(usize, usize)>,
        holds: &mut [Option<usize>],
        computing: Option<usize>,
    ) {
        while rng.random_range(0..5) != 0 {
            if let Some((unit, slot)) = ring.next_read() {
                assert!(reading.iter().all(|r| r.1 != slot), "two reads in slot {slot}");
                assert_ne!(computing, Some(slot), "a read into the slot that is computed from");
                holds[slot] = None;
                reading.push((unit, slot));
            }
        }
        while !reading.is_empty() && rng.random_range(0..3) == 0 {
            let (unit, slot) = reading.swap_remove(rng.random_range(0..reading.len()));
            holds[slot] = Some(unit);
            ring.read_done(slot, true);
        }
    }

    fn deliver(
        ring: &mut Ring,
        rng: &mut impl Rng,
        reading: &mut Vec<(usize, usize)>,
        holds: &mut [Option<usize>],
        unit: usize,
    ) -> usize {
        for _ in 0..100_000 {
            if let Acquire::Ready(slot) = ring.acquire(unit) {
                return slot;
            }
            progress(ring, rng, reading, holds, None);
        }
        panic!("no progress: {ring:?}");
    }

    #[test]
    fn dense_schedules_are_delivered_in_order() {
        let schedule: Vec<Step> = (0..7).map(Step::Unit).collect();
        for seed in 0..200 {
            simulate(seed, 2 + seed as usize % 5, &schedule, 0, 20);
        }
    }

    #[test]
    fn slots_that_are_kept_for_some_units_hold_those_alone() {
        let schedule: Vec<Step> = (0..9).map(Step::Unit).collect();
        for seed in 0..200 {
            let n = 2 + seed as usize % 3;
            // Alternating as parts of blocks do, or anyhow.
            let units = (0..9).map(|u| if seed % 2 == 0 { u % 2 == 0 } else { u % 4 == 0 || u == 5 }).collect();
            let ring = Ring::new(2 * n, schedule.clone(), 0).keeping(Kept { slots: n, units });
            simulate_ring(seed, if seed % 3 == 0 { ring.in_strict_order() } else { ring }, &schedule, 0, 20);
        }
    }

    #[test]
    fn schedules_with_holes_never_lock_up() {
        let mixed = [Step::Unit(0), Step::Hole, Step::Unit(1), Step::Hole, Step::Hole, Step::Unit(2)];
        let holes = [Step::Hole, Step::Hole];
        for seed in 0..200 {
            simulate(seed, 2 + seed as usize % 5, &mixed, 8, 20);
            simulate(seed, 2 + seed as usize % 5, &holes, 3, 20);
        }
    }

    #[test]
    fn the_next_pass_is_read_while_this_one_ends() {
        let mut ring = Ring::new(3, vec![Step::Unit(0), Step::Unit(1)], 0);
        let reads: Vec<_> = std::iter::from_fn(|| ring.next_read()).collect();
        assert_eq!(reads, [(0, 0), (1, 1), (0, 2)]);
    }

    /// Guards against copies that go to the slot used last, and so wait for the newest compute in place of the oldest.
    #[test]
    fn slots_are_given_out_in_turn() {
        let mut ring = Ring::new(3, vec![Step::Unit(0), Step::Unit(1)], 0);
        let mut next = |unit| {
            let (read, slot) = ring.next_read().unwrap();
            ring.read_done(slot, true);
            assert_eq!((read, ring.acquire(unit)), (unit, Acquire::Ready(slot)));
            ring.release(slot);
            slot
        };
        assert_eq!([0, 1, 0, 1, 0].map(&mut next), [0, 1, 2, 0, 1]);
    }

    #[test]
    fn past_a_hole_a_slot_stays_free() {
        let mut ring = Ring::new(3, vec![Step::Unit(0), Step::Hole, Step::Unit(1), Step::Hole], 4);
        let reads: Vec<_> = std::iter::from_fn(|| ring.next_read()).collect();
        assert_eq!(reads, [(0, 0), (1, 1)]);
        assert!(!ring.is_demanded(0) && !ring.is_demanded(1));
        ring.read_done(0, true);
        assert_eq!(ring.acquire(0), Acquire::Ready(0));
        ring.release(0);
        ring.demand(&[7, 8, 9]);
        assert_eq!(ring.next_read(), Some((7, 2)));
        assert_eq!(ring.next_read(), Some((8, 0)));
        assert_eq!(ring.next_read(), None);
    }

    #[test]
    fn a_failed_read_reaches_its_consumer_and_a_restart_clears_it() {
        let mut ring = Ring::new(2, vec![Step::Unit(0), Step::Unit(1), Step::Unit(2)], 0);
        assert_eq!(ring.next_read(), Some((0, 0)));
        assert_eq!(ring.next_read(), Some((1, 1)));
        ring.read_done(0, false);
        assert_eq!(ring.acquire(0), Acquire::Failed);
        ring.restart();
        assert_eq!(ring.next_read(), Some((0, 0)));
        assert_eq!(ring.next_read(), None, "slot 1 is still being written by the old read");
        ring.read_done(1, true);
        assert_eq!(ring.next_read(), Some((1, 1)));
    }
}

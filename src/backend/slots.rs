//! Which experts of a block that rests in RAM a device has in its slots, by their last use. Pure: the host decides, and tells the
//! device before it needs to know.
//!
//! Slots move bytes and no work: what a processor computes follows from homes alone, so that bits are the same whatever is there.

/// No expert, or no slot.
const NONE: u16 = u16::MAX;

/// Memory of a device for experts of a block whose home is RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotsAt {
    pub(super) addr: u64,
    pub(super) slots: usize,
    pub(super) bytes: u64,
}

impl SlotsAt {
    /// `slots` slots of `bytes` bytes each, a multiple of 256, back to back from `addr` on.
    ///
    /// # Safety
    /// They are memory of the device that they are for, which nothing else uses as long as its backend is open.
    pub unsafe fn new(addr: u64, slots: usize, bytes: u64) -> SlotsAt {
        SlotsAt { addr, slots, bytes }
    }

    /// Address of the first.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// How many; as many as a row chooses, or more.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Bytes of each.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// A slot that is given to an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given {
    /// Which.
    pub slot: u32,
    /// The expert whose it was.
    pub before: Option<u32>,
}

/// What each slot holds.
#[derive(Clone, Debug)]
pub struct Slots {
    /// By slot, its expert, and the row in which it was used last.
    held: Vec<(u16, u64)>,
    /// By expert, its slot.
    slot_of: Vec<u16>,
    rows: u64,
}

impl Slots {
    /// Empty slots for some of `experts`.
    pub fn new(slots: usize, experts: usize) -> Slots {
        assert!(slots < usize::from(NONE) && experts < usize::from(NONE), "{slots} slots, {experts} experts");
        Slots { held: vec![(NONE, 0); slots], slot_of: vec![NONE; experts], rows: 0 }
    }

    /// Takes all slots back.
    pub fn clear(&mut self) {
        self.held.fill((NONE, 0));
        self.slot_of.fill(NONE);
        self.rows = 0;
    }

    /// A row has chosen these: those that are there are used, and stay while it is computed. Returns how many are there.
    pub fn chosen(&mut self, ids: impl Iterator<Item = u32>) -> usize {
        self.rows += 1;
        let mut there = 0;
        for id in ids {
            if let Some(held) = self.held.get_mut(usize::from(self.slot_of[id as usize])) {
                held.1 = self.rows;
                there += 1;
            }
        }
        there
    }

    /// The slot of an expert that is there.
    pub fn slot(&self, id: u32) -> Option<u32> {
        Some(self.slot_of[id as usize]).filter(|slot| *slot != NONE).map(u32::from)
    }

    /// Whether an expert is there.
    pub fn has(&self, id: u32) -> bool {
        self.slot_of[id as usize] != NONE
    }

    /// Gives an expert that is not there the slot whose expert was used longest ago, and not by the row at hand; `None` if there is
    /// no such slot.
    pub fn give(&mut self, id: u32) -> Option<Given> {
        let (slot, held) = self.held.iter_mut().enumerate().min_by_key(|(_, held)| held.1)?;
        if held.1 == self.rows && held.0 != NONE {
            return None;
        }
        let before = (held.0 != NONE).then_some(u32::from(held.0));
        *held = (id as u16, self.rows);
        if let Some(before) = before {
            self.slot_of[before as usize] = NONE;
        }
        self.slot_of[id as usize] = slot as u16;
        Some(Given { slot: slot as u32, before })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against a list of the last used: the same experts are there, each in a slot of its own.
    #[test]
    fn slots_hold_what_was_used_last() {
        let (slots, experts, used) = (6, 16, 4);
        let mut s = Slots::new(slots, experts);
        let mut list: Vec<u32> = Vec::new();
        let mut seed = 1u64;
        let mut random = move |n: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % n
        };
        for _ in 0..2000 {
            let mut row: Vec<u32> = Vec::new();
            while row.len() < used {
                // Low ones more often.
                let id = (random(experts as u64) * random(4) / 3) as u32;
                if !row.contains(&id) {
                    row.push(id);
                }
            }
            let there = row.iter().filter(|id| list.contains(id)).count();
            assert_eq!(s.chosen(row.iter().copied()), there);
            for &id in &row {
                assert_eq!(s.has(id), list.contains(&id));
                if !s.has(id) {
                    let given = s.give(id).expect("more slots than choices");
                    assert!(given.before.is_none_or(|before| !row.contains(&before) && list.contains(&before)));
                    list.retain(|held| Some(*held) != given.before);
                    list.push(id);
                }
            }
            // What this row used is the newest of the list.
            list.retain(|id| !row.contains(id));
            list.extend(&row);
            assert!(list.len() <= slots);
            let held: Vec<u32> = (0..experts as u32).filter(|id| s.has(*id)).collect();
            let mut sorted = list.clone();
            sorted.sort_unstable();
            assert_eq!(held, sorted);
            let mut of: Vec<u16> = held.iter().map(|id| s.slot_of[*id as usize]).collect();
            of.sort_unstable();
            of.dedup();
            assert_eq!(of.len(), held.len());
        }
    }

    #[test]
    fn a_row_evicts_none_of_its_own() {
        let mut s = Slots::new(2, 8);
        s.chosen([1, 2].into_iter());
        assert_eq!(s.give(1), Some(Given { slot: 0, before: None }));
        assert_eq!(s.give(2), Some(Given { slot: 1, before: None }));
        assert_eq!(s.chosen([1, 2, 3].into_iter()), 2);
        assert_eq!(s.give(3), None);
        assert_eq!(s.chosen([3].into_iter()), 0);
        assert_eq!(s.give(3), Some(Given { slot: 0, before: Some(1) }));
        assert!(s.has(2) && s.has(3) && !s.has(1));
        s.clear();
        assert!((0..8).all(|id| !s.has(id)));
        assert_eq!((s.chosen([2].into_iter()), s.give(2)), (0, Some(Given { slot: 0, before: None })));
    }
}

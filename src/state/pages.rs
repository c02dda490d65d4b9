//! Which pages of the cache hold which positions of which sequence.
//!
//! A page holds [`PAGE`] positions of all layers. Sequences that were forked share the pages of what they have in common,
//! until one of them goes on in a page that another one reads too: then it gets a copy of its own. A page is counted
//! once for each sequence that has it, and is free when none has.
//!
//! Layers with windows may keep the last positions of each sequence alone ([`Recent`]): in pages of the sequence's own, in
//! turn. What lies in them of a sequence that goes back far enough is gone.

/// Positions of a page: a multiple of the keys that any kernel takes at once.
pub const PAGE: usize = 64;

/// A page of the cache.
pub type PageId = u32;

/// A sequence. Numbers of sequences that have ended are not given again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(u64);

/// What a backend must do before the next pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateOp {
    /// Copies the first `positions` positions of a page, of all layers.
    Copy {
        /// The page that is shared.
        from: PageId,
        /// A page that nobody reads yet.
        to: PageId,
        /// How many of its positions.
        positions: usize,
    },
    /// Copies a recurrent state, and the pages of recent positions that go with its number.
    CopyState {
        /// The state of another sequence.
        from: u32,
        /// One that nobody reads yet.
        to: u32,
    },
}

/// Why a sequence cannot have what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// More pages than are free. Nothing was changed.
    #[error(
        "{needed} more pages of {PAGE} positions are needed for {positions} positions, and {free} are free; give a larger --ctx"
    )]
    Full {
        /// Positions that were asked for.
        positions: usize,
        /// Pages that they need.
        needed: usize,
        /// Pages there are.
        free: usize,
    },
    /// The sequence has ended, or is another cache's.
    #[error("sequence {0} has ended")]
    NoSuchSequence(u64),
    /// More sequences than there are states.
    #[error("there are states for {0} sequences, and each has one already")]
    States(usize),
    /// A sequence with a recurrent state cannot go back, nor can one far whose layers keep recent positions alone.
    #[error(
        "the sequence has a recurrent state, or has overwritten what windows show there, so of its {len} positions it does not keep {position}"
    )]
    Recurrent {
        /// Positions that were to be kept.
        position: usize,
        /// Positions of the sequence.
        len: usize,
    },
    /// A position that the sequence has not reached.
    #[error("position {position} lies beyond the {len} of the sequence")]
    Beyond {
        /// The position.
        position: usize,
        /// Positions of the sequence.
        len: usize,
    },
}

/// How many positions layers with windows keep of each sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recent {
    /// Positions that the longest window shows, the row's own among them.
    pub window: usize,
    /// Pages of a sequence: page `i` of its positions lies in number `i % pages` of them.
    pub pages: usize,
}

impl Recent {
    /// Room for such a window in front of passes of up to `rows` positions, wherever in a page they begin.
    pub fn new(window: usize, rows: usize) -> Recent {
        Recent { window, pages: Pages::of(window.saturating_add(rows)) + 1 }
    }

    /// Whether position `next` may come next to a sequence that has written the positions below `written`: what its window
    /// shows lies in its pages still.
    pub fn holds(self, next: usize, written: usize) -> bool {
        let first = (next + 1).saturating_sub(self.window) / PAGE;
        written <= next || first + self.pages > (written - 1) / PAGE
    }

    /// The page of its own in which a sequence with state `state` has page `i` of its positions.
    pub fn page(self, state: u32, i: usize) -> PageId {
        ((state >> 1) as usize * self.pages + i % self.pages) as PageId
    }
}

/// Pages and who has them.
#[derive(Debug)]
pub struct Pages {
    /// Sequences that have each page.
    users: Vec<u32>,
    /// Pages that nobody has; the next one is the last.
    free: Vec<PageId>,
    seqs: Vec<Sequence>,
    next_id: u64,
    /// States, if sequences have such: recurrent ones, or pages of recent positions; and those that no sequence has.
    states: usize,
    free_states: Vec<u32>,
    /// Whether states are recurrent ones.
    recurrent: bool,
    recent: Option<Recent>,
}

#[derive(Debug)]
struct Sequence {
    id: SeqId,
    /// Page `i` holds positions `PAGE * i..`.
    table: Vec<PageId>,
    /// Positions that are computed.
    len: usize,
    /// Its state: the lowest bit says which of two copies of a recurrent one is behind those positions.
    state: Option<u32>,
    /// Positions below which passes have written, those that were given up among them.
    written: usize,
}

impl Pages {
    /// `pages` pages, all free; each of up to `sequences` sequences may have all of them, without an allocation.
    pub fn new(pages: usize, sequences: usize) -> Pages {
        Pages {
            users: vec![0; pages],
            // So that one sequence alone has pages 0, 1, 2, …
            free: (0..pages as PageId).rev().collect(),
            seqs: Vec::with_capacity(sequences),
            next_id: 0,
            states: 0,
            free_states: Vec::new(),
            recurrent: false,
            recent: None,
        }
    }

    /// The same, for sequences with a state each, of which there are `states`: a recurrent one, pages of recent positions, or
    /// both.
    #[must_use]
    pub fn with_states(self, states: usize, recurrent: bool, recent: Option<Recent>) -> Pages {
        let free_states = (0..states as u32).rev().map(|s| 2 * s).collect();
        Pages { states, free_states, recurrent, recent, ..self }
    }

    /// Pages that `positions` positions take.
    pub fn of(positions: usize) -> usize {
        positions.div_ceil(PAGE)
    }

    /// A sequence without positions.
    pub fn open(&mut self) -> SeqId {
        let id = SeqId(self.next_id);
        self.next_id += 1;
        let state = self.free_states.pop();
        self.seqs.push(Sequence { id, table: Vec::with_capacity(self.users.len()), len: 0, state, written: 0 });
        id
    }

    /// Makes room for `n` positions behind those of the sequence, in pages that it alone has. What a backend must do
    /// before they are written is appended to `ops`.
    ///
    /// # Errors
    /// [`StateError::Full`], and nothing has changed; [`StateError::NoSuchSequence`].
    pub fn reserve(&mut self, seq: SeqId, n: usize, ops: &mut Vec<StateOp>) -> Result<(), StateError> {
        let at = self.find(seq)?;
        let Sequence { table, len, state, .. } = &self.seqs[at];
        if self.states > 0 && state.is_none() {
            return Err(StateError::States(self.states));
        }
        let (has, used) = (table.len(), Pages::of(*len));
        let last = Pages::of(len.saturating_add(n)).max(used);
        // The page that the next position lies in, if it holds positions already.
        let shared = (n > 0 && len % PAGE != 0).then(|| (used - 1, table[used - 1])).filter(|s| self.users(s.1) > 1);
        let needed = last.saturating_sub(has) + usize::from(shared.is_some());
        if needed > self.free.len() {
            return Err(StateError::Full { positions: n, needed, free: self.free.len() });
        }
        let positions = len % PAGE;
        if let Some((i, from)) = shared {
            let to = self.take();
            self.seqs[at].table[i] = to;
            self.give(from);
            ops.push(StateOp::Copy { from, to, positions });
        }
        for _ in has..last {
            let page = self.take();
            self.seqs[at].table.push(page);
        }
        Ok(())
    }

    /// A pass is about to write the next `n` positions, which room was made for.
    ///
    /// # Errors
    /// [`StateError::NoSuchSequence`].
    pub fn writes(&mut self, seq: SeqId, n: usize) -> Result<(), StateError> {
        let at = self.find(seq)?;
        let s = &mut self.seqs[at];
        s.written = s.written.max(s.len + n);
        Ok(())
    }

    /// Positions below which passes have written into a sequence, those that were given up or forgotten among them.
    ///
    /// # Errors
    /// [`StateError::NoSuchSequence`].
    pub fn written(&self, seq: SeqId) -> Result<usize, StateError> {
        Ok(self.seqs[self.find(seq)?].written)
    }

    /// Undoes what [`Pages::reserve`] did to a page of the sequence, where a backend could not follow it.
    ///
    /// # Errors
    /// [`StateError::NoSuchSequence`].
    pub fn undo(&mut self, seq: SeqId, op: &StateOp) -> Result<(), StateError> {
        let at = self.find(seq)?;
        let StateOp::Copy { from, to, .. } = *op else { return Ok(()) };
        if let Some(page) = self.seqs[at].table.iter_mut().find(|page| **page == to) {
            *page = from;
            self.users[from as usize] += 1;
            self.give(to);
        }
        Ok(())
    }

    /// The next `n` positions, which room was made for, have been computed.
    ///
    /// # Errors
    /// [`StateError::Beyond`] if there is no room for as many; [`StateError::NoSuchSequence`].
    pub fn commit(&mut self, seq: SeqId, n: usize) -> Result<(), StateError> {
        let at = self.find(seq)?;
        let s = &mut self.seqs[at];
        let room = s.table.len() * PAGE;
        if n > room - s.len {
            return Err(StateError::Beyond { position: s.len.saturating_add(n), len: room });
        }
        s.len += n;
        s.written = s.written.max(s.len);
        if n > 0 {
            s.state = s.state.map(|state| state ^ 1);
        }
        Ok(())
    }

    /// Forgets all but the first `n` positions of a sequence, and room that was made behind them.
    ///
    /// # Errors
    /// [`StateError::Beyond`] if it has fewer; [`StateError::NoSuchSequence`].
    pub fn keep(&mut self, seq: SeqId, n: usize) -> Result<(), StateError> {
        let at = self.find(seq)?;
        let len = self.seqs[at].len;
        if n > len {
            return Err(StateError::Beyond { position: n, len });
        }
        if n != self.reach(seq, n)? {
            return Err(StateError::Recurrent { position: n, len });
        }
        let s = &mut self.seqs[at];
        s.len = n;
        if n == 0 {
            s.written = 0;
        }
        self.shrink(at, Pages::of(n));
        Ok(())
    }

    /// How many of the first `n` positions a sequence can go back to: with a recurrent state all that it has, or none;
    /// none, too, where what windows show before them has been overwritten.
    ///
    /// # Errors
    /// [`StateError::NoSuchSequence`].
    pub fn reach(&self, seq: SeqId, n: usize) -> Result<usize, StateError> {
        let Sequence { len, written, .. } = self.seqs[self.find(seq)?];
        let n = n.min(len);
        let gone = self.recurrent && n < len || self.recent.is_some_and(|r| !r.holds(n, written));
        Ok(if gone { 0 } else { n })
    }

    /// A sequence that begins with the first `n` positions of another one. No page is copied yet; a state must be
    /// at once, as the second result says.
    ///
    /// # Errors
    /// [`StateError::Beyond`] if the other one has fewer; [`StateError::Recurrent`] if it cannot go back to them;
    /// [`StateError::States`] if there is no state for one more; [`StateError::NoSuchSequence`].
    pub fn fork_at(&mut self, seq: SeqId, n: usize) -> Result<(SeqId, Option<StateOp>), StateError> {
        let at = self.find(seq)?;
        let Sequence { len, state, written, .. } = self.seqs[at];
        if n > len {
            return Err(StateError::Beyond { position: n, len });
        }
        if n != self.reach(seq, n)? {
            return Err(StateError::Recurrent { position: n, len });
        }
        if self.states > 0 && self.free_states.is_empty() {
            return Err(StateError::States(self.states));
        }
        let fork = self.open();
        let to = self.seqs.len() - 1;
        for i in 0..Pages::of(n) {
            let page = self.seqs[at].table[i];
            self.users[page as usize] += 1;
            self.seqs[to].table.push(page);
        }
        self.seqs[to].len = n;
        self.seqs[to].written = if n > 0 { written } else { 0 };
        let copy = state.zip(self.seqs[to].state).filter(|_| n > 0).map(|(from, to)| StateOp::CopyState { from, to });
        Ok((fork, copy))
    }

    /// Ends a sequence.
    ///
    /// # Errors
    /// [`StateError::NoSuchSequence`] if it has ended already.
    pub fn close(&mut self, seq: SeqId) -> Result<(), StateError> {
        let at = self.find(seq)?;
        self.shrink(at, 0);
        let gone = self.seqs.swap_remove(at);
        self.free_states.extend(gone.state.map(|state| state & !1));
        Ok(())
    }

    /// Pages of a sequence in order: those of its positions, and of the room behind them.
    ///
    /// # Errors
    /// [`StateError::NoSuchSequence`].
    pub fn table(&self, seq: SeqId) -> Result<&[PageId], StateError> {
        Ok(&self.seqs[self.find(seq)?].table)
    }

    /// The state of a sequence; 0 where it has none.
    ///
    /// # Errors
    /// [`StateError::NoSuchSequence`].
    pub fn state(&self, seq: SeqId) -> Result<u32, StateError> {
        Ok(self.seqs[self.find(seq)?].state.unwrap_or(0))
    }

    /// Whether sequences have recurrent states.
    pub fn recurrent(&self) -> bool {
        self.recurrent
    }

    /// What layers with windows keep, where they keep recent positions alone.
    pub fn recent(&self) -> Option<Recent> {
        self.recent
    }

    /// Positions of a sequence.
    ///
    /// # Errors
    /// [`StateError::NoSuchSequence`].
    pub fn len(&self, seq: SeqId) -> Result<usize, StateError> {
        Ok(self.seqs[self.find(seq)?].len)
    }

    /// Pages that a sequence takes of those that are free until it has `positions` positions: new ones, and a copy of its
    /// last one if that holds positions of another sequence too.
    ///
    /// # Errors
    /// [`StateError::NoSuchSequence`].
    pub fn needed(&self, seq: SeqId, positions: usize) -> Result<usize, StateError> {
        let s = &self.seqs[self.find(seq)?];
        let shared = !s.len.is_multiple_of(PAGE) && positions > s.len && self.users(s.table[s.len / PAGE]) > 1;
        Ok(Pages::of(positions).saturating_sub(s.table.len()) + usize::from(shared))
    }

    /// Pages that nobody has.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Pages that nobody has once these sequences have ended.
    pub fn free_without(&self, seqs: &[SeqId]) -> usize {
        let mut users = self.users.clone();
        for s in self.seqs.iter().filter(|s| seqs.contains(&s.id)) {
            s.table.iter().for_each(|&page| users[page as usize] -= 1);
        }
        users.iter().filter(|n| **n == 0).count()
    }

    fn find(&self, seq: SeqId) -> Result<usize, StateError> {
        self.seqs.iter().position(|s| s.id == seq).ok_or(StateError::NoSuchSequence(seq.0))
    }

    fn users(&self, page: PageId) -> u32 {
        self.users[page as usize]
    }

    /// A free page, of which there is one.
    fn take(&mut self) -> PageId {
        let page = self.free.pop().expect("free pages were counted");
        self.users[page as usize] = 1;
        page
    }

    fn give(&mut self, page: PageId) {
        let users = &mut self.users[page as usize];
        *users -= 1;
        if *users == 0 {
            self.free.push(page);
        }
    }

    /// Gives back all but the first `n` pages of sequence number `at`.
    fn shrink(&mut self, at: usize, n: usize) {
        // The first comes to lie on top, so that a sequence alone gets the same pages again.
        while self.seqs[at].table.len() > n {
            if let Some(page) = self.seqs[at].table.pop() {
                self.give(page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use std::collections::HashMap;

    /// A plain model of a cache: what each page holds, written as a backend would.
    struct Cache {
        pages: Pages,
        /// Of each page and position, the token that was written there.
        memory: Vec<[u64; PAGE]>,
        /// Tokens of each sequence.
        sequences: HashMap<SeqId, Vec<u64>>,
        order: Vec<SeqId>,
        ops: Vec<StateOp>,
        written: u64,
    }

    impl Cache {
        fn new(pages: usize) -> Cache {
            Cache {
                pages: Pages::new(pages, 8),
                memory: vec![[0; PAGE]; pages],
                sequences: HashMap::new(),
                order: Vec::new(),
                ops: Vec::new(),
                written: 0,
            }
        }

        fn open(&mut self) {
            let seq = self.pages.open();
            self.sequences.insert(seq, Vec::new());
            self.order.push(seq);
        }

        /// A pass of `n` tokens, of which the last `lost` are given up.
        fn pass(&mut self, seq: SeqId, n: usize, lost: usize, fails: bool) {
            let tokens = self.sequences.get_mut(&seq).unwrap();
            let free = self.pages.free_pages();
            let table = self.pages.table(seq).unwrap().to_vec();
            let needs = self.pages.needed(seq, tokens.len() + n).unwrap();
            match self.pages.reserve(seq, n, &mut self.ops) {
                Ok(()) => assert_eq!(free - self.pages.free_pages(), needs),
                Err(StateError::Full { needed, free: said, .. }) => {
                    assert!(needed == needs && needed > free && said == free);
                    assert!(
                        self.ops.is_empty() && self.pages.table(seq).unwrap() == table,
                        "a refusal changes nothing"
                    );
                    return;
                }
                Err(e) => panic!("{e}"),
            }
            // A backend that cannot: nothing has happened.
            if fails {
                let last = self.pages.len(seq).unwrap();
                for op in self.ops.drain(..).rev() {
                    self.pages.undo(seq, &op).unwrap();
                }
                self.pages.keep(seq, last).unwrap();
                return;
            }
            for op in self.ops.drain(..) {
                let StateOp::Copy { from, to, positions } = op else { unreachable!("no recurrent states here") };
                let source = self.memory[from as usize];
                self.memory[to as usize][..positions].copy_from_slice(&source[..positions]);
            }
            let table = self.pages.table(seq).unwrap();
            let first = tokens.len();
            for i in 0..n {
                let at = first + i;
                self.written += 1;
                self.memory[table[at / PAGE] as usize][at % PAGE] = self.written;
                if i < n - lost {
                    tokens.push(self.written);
                }
            }
            let kept = n - lost;
            self.pages.commit(seq, kept).unwrap();
            if lost > 0 {
                self.pages.keep(seq, tokens.len()).unwrap();
            }
        }

        fn check(&self) {
            let mut users = vec![0; self.memory.len()];
            for (seq, tokens) in &self.sequences {
                let table = self.pages.table(*seq).unwrap();
                assert_eq!(self.pages.len(*seq).unwrap(), tokens.len());
                for (at, token) in tokens.iter().enumerate() {
                    assert_eq!(self.memory[table[at / PAGE] as usize][at % PAGE], *token, "position {at} of {seq:?}");
                }
                table.iter().for_each(|p| users[*p as usize] += 1);
            }
            assert_eq!(users, self.pages.users, "pages are counted");
            assert_eq!(users.iter().filter(|n| **n == 0).count(), self.pages.free_pages(), "no page is lost");
        }
    }

    /// Passes, aborted passes, forks, cuts and ends in any order, against the plain model.
    #[test]
    fn sequences_read_what_they_wrote_and_no_page_is_lost() {
        let runs = std::env::var("NT_PAGES_RUNS").ok().and_then(|n| n.parse().ok()).unwrap_or(1000u64);
        for seed in 0..runs {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut below = |n: usize| rng.random_range(0..n);
            let mut cache = Cache::new(1 + below(24));
            cache.open();
            for _ in 0..60 {
                let seq = cache.order[below(cache.order.len())];
                let len = cache.sequences[&seq].len();
                match below(8) {
                    0..4 => {
                        let n = if below(3) == 0 { below(200) } else { below(4) };
                        let lost = if below(4) == 0 { below(n + 1) } else { 0 };
                        cache.pass(seq, n, lost, below(8) == 0);
                    }
                    4 => {
                        let n = below(len + 1);
                        cache.pages.keep(seq, n).unwrap();
                        cache.sequences.get_mut(&seq).unwrap().truncate(n);
                    }
                    5 | 6 if cache.order.len() < 6 => {
                        let n = below(len + 1);
                        let fork = cache.pages.fork_at(seq, n).unwrap().0;
                        let tokens = cache.sequences[&seq][..n].to_vec();
                        cache.sequences.insert(fork, tokens);
                        cache.order.push(fork);
                    }
                    _ if cache.order.len() > 1 => {
                        cache.pages.close(seq).unwrap();
                        cache.sequences.remove(&seq);
                        cache.order.retain(|s| *s != seq);
                        assert_eq!(cache.pages.len(seq), Err(StateError::NoSuchSequence(seq.0)));
                    }
                    _ => cache.open(),
                }
                cache.check();
            }
            for seq in std::mem::take(&mut cache.order) {
                cache.pages.close(seq).unwrap();
            }
            assert_eq!(cache.pages.free_pages(), cache.memory.len());
        }
    }

    #[test]
    fn what_a_sequence_has_not_is_refused() {
        let mut pages = Pages::new(2, 1);
        let seq = pages.open();
        let mut ops = Vec::new();
        assert_eq!(pages.keep(seq, 1), Err(StateError::Beyond { position: 1, len: 0 }));
        assert_eq!(pages.commit(seq, 1), Err(StateError::Beyond { position: 1, len: 0 }));
        assert_eq!(pages.fork_at(seq, 1), Err(StateError::Beyond { position: 1, len: 0 }));
        let full = StateError::Full { positions: 129, needed: 3, free: 2 };
        assert_eq!(pages.reserve(seq, 129, &mut ops), Err(full));
        assert!(pages.reserve(seq, usize::MAX, &mut ops).is_err());
        pages.reserve(seq, 128, &mut ops).unwrap();
        assert_eq!(pages.table(seq).unwrap(), [0, 1]);
        pages.keep(seq, 0).unwrap();
        assert_eq!(pages.free_pages(), 2);
    }

    /// Guards against a sequence that goes back to a state that is gone, and against two that have one state.
    #[test]
    fn recurrent_states_belong_to_one_sequence_and_do_not_go_back() {
        let mut pages = Pages::new(8, 4).with_states(2, true, None);
        let mut ops = Vec::new();
        let a = pages.open();
        pages.reserve(a, 70, &mut ops).unwrap();
        let before = pages.state(a).unwrap();
        pages.commit(a, 70).unwrap();
        assert_eq!(pages.state(a), Ok(before ^ 1), "a pass writes the other copy");
        assert_eq!((pages.reach(a, 69), pages.reach(a, 70), pages.reach(a, 99)), (Ok(0), Ok(70), Ok(70)));
        assert_eq!(pages.keep(a, 69), Err(StateError::Recurrent { position: 69, len: 70 }));
        assert_eq!(pages.fork_at(a, 64), Err(StateError::Recurrent { position: 64, len: 70 }));
        let (b, copy) = pages.fork_at(a, 70).unwrap();
        assert_eq!(copy, Some(StateOp::CopyState { from: before ^ 1, to: pages.state(b).unwrap() }));
        assert!(pages.state(a).unwrap() / 2 != pages.state(b).unwrap() / 2);
        assert_eq!(pages.fork_at(a, 0), Err(StateError::States(2)));
        let c = pages.open();
        assert_eq!(pages.reserve(c, 1, &mut ops), Err(StateError::States(2)));
        pages.close(b).unwrap();
        assert!(
            pages.fork_at(a, 0).is_ok_and(|(_, copy)| copy.is_none()),
            "nothing is read of a state without positions"
        );
        assert_eq!(pages.keep(a, 0), Ok(()));
    }
}

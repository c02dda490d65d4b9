//! Many texts looked for at once: the automaton of Aho and Corasick (Communications of the ACM 18, 1975).
//!
//! Going through a text takes one step per byte, however many texts are looked for. Where several end at one place,
//! each leads to the next shorter one; the lists are not written out per state, so that memory grows with the bytes of
//! the texts alone, whatever they are.

/// A state that is none.
const NONE: u32 = u32::MAX;
const ROOT: u32 = 0;

/// A state: the bytes from the root to it, which are the beginning of a text.
#[derive(Clone, Copy, Debug)]
struct State {
    /// The first state that is one byte longer, and the next one beside this with the same beginning.
    child: u32,
    sibling: u32,
    /// The state of the longest end of these bytes that begins a text too.
    fall_back: u32,
    /// The longest text that these bytes end with and that is shorter than they are, as its state.
    shorter: u32,
    /// A text some way down the chain of shorter ones, so that going down takes logarithmic time (Myers, Information
    /// Processing Letters 17, 1983); and how many there are down to the end. Set where these bytes are a text.
    jump: u32,
    below: u32,
    /// The text that these bytes are, by its number.
    text: u32,
    /// Bytes from the root.
    len: u32,
    byte: u8,
}

const EMPTY: State = State {
    child: NONE,
    sibling: NONE,
    fall_back: ROOT,
    shorter: NONE,
    jump: NONE,
    below: 0,
    text: NONE,
    len: 0,
    byte: 0,
};

/// Finds the texts it was made of.
#[derive(Debug)]
pub(super) struct Automaton {
    states: Vec<State>,
    /// The states of one byte.
    first: Box<[u32; 256]>,
}

/// A text that ends where the automaton is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Found(u32);

impl Automaton {
    /// An automaton for `texts`, none of which is empty; they are numbered in order, and of equal ones the first counts.
    pub fn new<'a>(texts: impl Iterator<Item = &'a [u8]>) -> Automaton {
        let mut automaton = Automaton { states: vec![EMPTY], first: Box::new([ROOT; 256]) };
        for (number, text) in (0..).zip(texts) {
            let mut at = ROOT;
            for &byte in text {
                at = automaton.child(at, byte).unwrap_or_else(|| automaton.grow(at, byte));
            }
            let state = &mut automaton.states[at as usize];
            if state.text == NONE {
                state.text = number;
            }
        }
        automaton.link();
        automaton
    }

    fn state(&self, at: u32) -> &State {
        &self.states[at as usize]
    }

    fn child(&self, at: u32, byte: u8) -> Option<u32> {
        let mut child = self.state(at).child;
        while child != NONE && self.state(child).byte != byte {
            child = self.state(child).sibling;
        }
        (child != NONE).then_some(child)
    }

    fn grow(&mut self, at: u32, byte: u8) -> u32 {
        let new = self.states.len() as u32;
        let State { child: sibling, len, .. } = *self.state(at);
        self.states.push(State { sibling, len: len + 1, byte, ..EMPTY });
        self.states[at as usize].child = new;
        new
    }

    /// Sets where to go on from states that have no child for a byte, the shorter ones first.
    fn link(&mut self) {
        let mut order = vec![ROOT];
        let mut done = 0;
        while done < order.len() {
            let at = order[done];
            done += 1;
            let mut child = self.state(at).child;
            while child != NONE {
                order.push(child);
                let State { byte, sibling, .. } = *self.state(child);
                if at == ROOT {
                    self.first[usize::from(byte)] = child;
                } else {
                    let fall_back = self.step(self.state(at).fall_back, byte);
                    let shorter = self.longest(fall_back).map_or(NONE, |f| f.0);
                    let state = &mut self.states[child as usize];
                    (state.fall_back, state.shorter) = (fall_back, shorter);
                }
                self.set_jump(child);
                child = sibling;
            }
        }
    }

    /// Sets how to go down from a text whose shorter ones have it set.
    fn set_jump(&mut self, at: u32) {
        let State { text, shorter, .. } = *self.state(at);
        if text == NONE {
            return;
        }
        let below = |at: u32| if at == NONE { 0 } else { self.state(at).below };
        let jump = |at: u32| if at == NONE { NONE } else { self.state(at).jump };
        let once = jump(shorter);
        let twice = jump(once);
        let same = shorter != NONE && below(shorter) - below(once) == below(once) - below(twice);
        let (jump, below) = (if same { twice } else { shorter }, below(shorter) + 1);
        let state = &mut self.states[at as usize];
        (state.jump, state.below) = (jump, below);
    }

    /// The state before the first byte.
    pub fn start(&self) -> u32 {
        ROOT
    }

    /// The state after one more byte.
    pub fn step(&self, mut at: u32, byte: u8) -> u32 {
        loop {
            if at == ROOT {
                return self.first[usize::from(byte)];
            }
            match self.child(at, byte) {
                Some(child) => return child,
                None => at = self.state(at).fall_back,
            }
        }
    }

    /// The longest text that ends in a state.
    pub fn longest(&self, at: u32) -> Option<Found> {
        let state = self.state(at);
        let at = if state.text != NONE { at } else { state.shorter };
        (at != NONE).then_some(Found(at))
    }

    /// The longest text that ends where `found` does and has no more than `len` bytes.
    pub fn within(&self, found: Found, len: usize) -> Option<Found> {
        let mut at = found.0;
        let too_long = |at: u32| at != NONE && self.state(at).len as usize > len;
        while too_long(at) {
            let State { jump, shorter, .. } = *self.state(at);
            at = if too_long(jump) { jump } else { shorter };
        }
        (at != NONE).then_some(Found(at))
    }

    /// The number of a text that was found.
    pub fn number(&self, found: Found) -> u32 {
        self.state(found.0).text
    }

    /// The bytes of a text that was found.
    pub fn len(&self, found: Found) -> usize {
        self.state(found.0).len as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_is_found_where_it_ends_the_longest_first() {
        let texts: [&[u8]; 7] = [b"she", b"he", b"hers", b"e", b"rs", b"he", b"xshex"];
        let automaton = Automaton::new(texts.into_iter());
        let text = b"xushers, xshexhe";
        let mut at = automaton.start();
        for (i, &byte) in text.iter().enumerate() {
            at = automaton.step(at, byte);
            let mut found = Vec::new();
            let mut next = automaton.longest(at);
            while let Some(f) = next {
                found.push(texts[automaton.number(f) as usize]);
                next = automaton.within(f, automaton.len(f) - 1);
            }
            let mut expected: Vec<&[u8]> = texts.into_iter().filter(|t| text[..=i].ends_with(t)).collect();
            expected.sort_by_key(|t| std::cmp::Reverse(t.len()));
            expected.dedup();
            assert_eq!(found, expected, "{i}");
        }
    }

    #[test]
    fn the_longest_that_is_no_longer_is_found_however_many_there_are() {
        let letters = "a".repeat(500);
        let lens: Vec<usize> = (1..=500).filter(|n| n % 7 != 3).collect();
        let automaton = Automaton::new(lens.iter().map(|&n| &letters.as_bytes()[..n]));
        let at = letters.bytes().fold(automaton.start(), |at, byte| automaton.step(at, byte));
        let found = automaton.longest(at).unwrap();
        for len in 0..=500 {
            let expected = lens.iter().copied().filter(|n| *n <= len).max();
            assert_eq!(automaton.within(found, len).map(|f| automaton.len(f)), expected, "{len}");
        }
    }
}

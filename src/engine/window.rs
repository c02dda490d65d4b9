//! The last tokens of a text, with how often each occurs among them.

use std::collections::VecDeque;

/// Set in a count while [`Window::each`] has passed on its token.
const PASSED: u32 = 1 << 31;
/// Tokens for which room is made at first where the window has no end.
const ROOM: usize = 1 << 16;

/// A window over the last `n` tokens; it holds nothing where `n` is 0.
#[derive(Debug)]
pub(super) struct Window {
    n: usize,
    last: VecDeque<u32>,
    /// Occurrences within the window, by token.
    counts: Vec<u32>,
}

impl Window {
    /// A window over the last `n` tokens of a vocabulary of `n_vocab`.
    pub fn new(n: usize, n_vocab: usize) -> Window {
        let n_vocab = if n == 0 { 0 } else { n_vocab };
        Window { n, last: VecDeque::with_capacity(n.min(ROOM)), counts: vec![0; n_vocab] }
    }

    /// Adds a token; the oldest leaves a full window. Tokens outside the vocabulary are not counted.
    pub fn push(&mut self, token: u32) {
        if self.n == 0 {
            return;
        }
        if self.last.len() == self.n
            && let Some(old) = self.last.pop_front()
            && let Some(count) = self.counts.get_mut(old as usize)
        {
            *count -= 1;
        }
        self.last.push_back(token);
        if let Some(count) = self.counts.get_mut(token as usize) {
            *count += 1;
        }
    }

    pub fn clear(&mut self) {
        while let Some(token) = self.last.pop_front() {
            if let Some(count) = self.counts.get_mut(token as usize) {
                *count = 0;
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.last.is_empty()
    }

    /// Passes on each token of the window once, with its occurrences.
    pub fn each(&mut self, mut use_it: impl FnMut(u32, u32)) {
        for &token in &self.last {
            match self.counts.get_mut(token as usize) {
                Some(count) if *count & PASSED == 0 => {
                    use_it(token, *count);
                    *count |= PASSED;
                }
                _ => {}
            }
        }
        for &token in &self.last {
            if let Some(count) = self.counts.get_mut(token as usize) {
                *count &= !PASSED;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_those_of_the_last_tokens() {
        let mut w = Window::new(4, 10);
        for t in [1, 1, 2, 3, 3, 3, 99] {
            w.push(t);
        }
        for _ in 0..2 {
            let mut seen = Vec::new();
            w.each(|t, n| seen.push((t, n)));
            assert_eq!(seen, [(3, 3)]);
        }
        w.clear();
        w.push(5);
        let mut seen = Vec::new();
        w.each(|t, n| seen.push((t, n)));
        assert_eq!(seen, [(5, 1)]);
    }
}

//! Prompts that were computed and are still in the cache, so that another one that begins alike need not be computed
//! from its first token. Pure: what a prompt is kept in is the caller's.
//!
//! Only tokens of prompts are kept. An answer's tokens were computed in the class of generated tokens, whose bits
//! differ; where they come back as a part of the next prompt, `nt run` computes them as a prompt, and so must this.

/// Prompts that are kept at most.
pub const KEPT_MAX: usize = 16;

/// A prompt that is kept in `S`.
#[derive(Debug)]
struct Entry<S> {
    seq: S,
    tokens: Vec<u32>,
    used: u64,
}

/// The prompts that are kept.
#[derive(Debug)]
pub struct Kept<S> {
    entries: Vec<Entry<S>>,
    clock: u64,
}

impl<S: Copy + PartialEq> Kept<S> {
    /// None yet.
    pub fn new() -> Kept<S> {
        Kept { entries: Vec::new(), clock: 0 }
    }

    /// Where the most of `prompt` lies, and how many tokens that is; it counts as used.
    pub fn longest(&mut self, prompt: &[u32]) -> Option<(S, usize)> {
        self.clock += 1;
        let clock = self.clock;
        let best = self.entries.iter_mut().max_by_key(|e| common(&e.tokens, prompt))?;
        let n = common(&best.tokens, prompt);
        (n > 0).then(|| {
            best.used = clock;
            (best.seq, n)
        })
    }

    /// Keeps a prompt; returns what is no longer kept: those that it begins with, and the longest unused.
    pub fn add(&mut self, seq: S, tokens: Vec<u32>) -> Vec<S> {
        self.clock += 1;
        let mut gone = Vec::new();
        if tokens.is_empty() || self.entries.iter().any(|e| e.tokens.starts_with(&tokens)) {
            return vec![seq];
        }
        self.entries.retain(|e| {
            let within = tokens.starts_with(&e.tokens);
            if within {
                gone.push(e.seq);
            }
            !within
        });
        self.entries.push(Entry { seq, tokens, used: self.clock });
        while self.entries.len() > KEPT_MAX {
            gone.extend(self.forget());
        }
        gone
    }

    /// All that prompts are kept in.
    pub fn all(&self) -> Vec<S> {
        self.entries.iter().map(|e| e.seq).collect()
    }

    /// Prompts and what they are kept in, the one that was used last first.
    pub fn by_use(&self) -> impl Iterator<Item = (S, &[u32])> {
        let mut entries: Vec<&Entry<S>> = self.entries.iter().collect();
        entries.sort_by_key(|e| std::cmp::Reverse(e.used));
        entries.into_iter().map(|e| (e.seq, &e.tokens[..]))
    }

    /// Gives the longest unused up, to make room.
    pub fn forget(&mut self) -> Option<S> {
        let at = (0..self.entries.len()).min_by_key(|&i| self.entries[i].used)?;
        Some(self.entries.swap_remove(at).seq)
    }
}

/// How many tokens two texts begin with alike.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_beginning_is_found() {
        let mut k = Kept::new();
        assert_eq!(k.longest(&[1, 2]), None);
        assert_eq!(k.add('a', vec![1, 2, 3]), []);
        assert_eq!(k.add('b', vec![1, 2, 9, 9]), []);
        assert_eq!(k.longest(&[1, 2, 9, 8]), Some(('b', 3)));
        assert_eq!(k.longest(&[1, 2, 3, 4]), Some(('a', 3)));
        assert_eq!(k.longest(&[2]), None);
    }

    #[test]
    fn what_is_within_another_is_not_kept_twice() {
        let mut k = Kept::new();
        k.add('a', vec![1, 2]);
        assert_eq!(k.add('b', vec![1, 2, 3]), ['a']);
        assert_eq!(k.add('c', vec![1, 2]), ['c']);
        assert_eq!(k.add('d', vec![]), ['d']);
    }

    #[test]
    fn the_longest_unused_goes_first() {
        let mut k = Kept::new();
        for i in 0..KEPT_MAX as u32 {
            assert!(k.add(i, vec![i]).is_empty());
        }
        k.longest(&[0]);
        assert_eq!(k.add(99, vec![99]), [1]);
        assert_eq!(k.forget(), Some(2));
    }
}

//! Byte-level BPE: the pair with the lowest rank merges first, the leftmost of equals.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::pretokenize::PreTokenizer;
use super::stop::Stop;
use super::vocab::{Index, Vocab};

/// Merges over symbols. A symbol below the vocabulary's size is a token; the others are texts that
/// occur in merges only.
#[derive(Debug)]
pub(super) struct Bpe {
    pre: PreTokenizer,
    ignore_merges: bool,
    /// (left, right) to (rank, merged).
    merges: HashMap<u64, (u32, u32)>,
    byte_symbols: Vec<u32>,
    n_tokens: u32,
}

/// Builds the merge table; texts that are no token get symbols of their own.
pub(super) struct BpeBuilder<'a> {
    vocab: &'a Vocab,
    extra: Vec<Vec<u8>>,
    index: Index,
    merges: HashMap<u64, (u32, u32)>,
}

impl<'a> BpeBuilder<'a> {
    pub fn new(vocab: &'a Vocab, n_merges: usize) -> BpeBuilder<'a> {
        // At most three texts a merge are no tokens, and the 256 bytes.
        BpeBuilder {
            vocab,
            extra: Vec::new(),
            index: Index::with_capacity(3 * n_merges + 256),
            merges: HashMap::with_capacity(n_merges),
        }
    }

    fn symbol(&mut self, text: &[u8]) -> u32 {
        if let Some(id) = self.vocab.find(text) {
            return id;
        }
        let base = self.vocab.len() as u32;
        if let Some(i) = self.index.find(text, |i| &self.extra[i as usize]) {
            return base + i;
        }
        let i = self.extra.len() as u32;
        self.extra.push(text.to_vec());
        self.index.insert(text, i, |i| &self.extra[i as usize]);
        base + i
    }

    /// Adds a merge; of equal pairs the first rank counts, as in llama.cpp.
    pub fn merge(&mut self, left: &[u8], right: &[u8], rank: u32) {
        let merged = self.symbol(&[left, right].concat());
        let (l, r) = (self.symbol(left), self.symbol(right));
        self.merges.entry(pair(l, r)).or_insert((rank, merged));
    }

    pub fn build(mut self, pre: PreTokenizer, ignore_merges: bool) -> Bpe {
        let byte_symbols = (0..=255u8).map(|b| self.symbol(&[b])).collect();
        self.merges.shrink_to_fit();
        Bpe { pre, ignore_merges, merges: self.merges, byte_symbols, n_tokens: self.vocab.len() as u32 }
    }
}

fn pair(l: u32, r: u32) -> u64 {
    u64::from(l) << 32 | u64::from(r)
}

/// A symbol in a doubly linked list; `id` is `GONE` once it was merged into its left neighbour.
#[derive(Clone, Copy)]
struct Node {
    id: u32,
    prev: u32,
    next: u32,
    /// Bytes it covers.
    len: u32,
}

const NONE: u32 = u32::MAX;
const GONE: u32 = u32::MAX;

impl Bpe {
    /// Appends the ids of `text`; `None` if `stop` says so.
    pub fn encode(&self, vocab: &Vocab, text: &str, stop: &Stop, ids: &mut Vec<u32>) -> Option<()> {
        let mut work = Work::default();
        for word in self.pre.split(text, stop)? {
            stop.check()?;
            if self.ignore_merges
                && let Some(id) = vocab.find(word.as_bytes())
            {
                ids.push(id);
                continue;
            }
            self.word(vocab, word.as_bytes(), &mut work, stop, ids)?;
        }
        Some(())
    }

    fn word(&self, vocab: &Vocab, bytes: &[u8], work: &mut Work, stop: &Stop, ids: &mut Vec<u32>) -> Option<()> {
        work.nodes.clear();
        work.heap.clear();
        for (i, &b) in bytes.iter().enumerate() {
            let i = i as u32;
            let next = if i as usize + 1 == bytes.len() { NONE } else { i + 1 };
            work.nodes.push(Node { id: self.byte_symbols[usize::from(b)], prev: i.wrapping_sub(1), next, len: 1 });
        }
        for i in 0..bytes.len() as u32 {
            stop.check()?;
            self.propose(work, i);
        }
        while let Some(Reverse((_, left, l, r))) = work.heap.pop() {
            stop.check()?;
            let node = work.nodes[left as usize];
            // Either side may have changed since this pair was proposed.
            if node.id != l || node.next == NONE || work.nodes[node.next as usize].id != r {
                continue;
            }
            let Some(&(_, merged)) = self.merges.get(&pair(l, r)) else { continue };
            let right = work.nodes[node.next as usize];
            work.nodes[node.next as usize].id = GONE;
            work.nodes[left as usize] = Node { id: merged, next: right.next, len: node.len + right.len, ..node };
            if right.next != NONE {
                work.nodes[right.next as usize].prev = left;
                self.propose(work, left);
            }
            if node.prev != NONE {
                self.propose(work, node.prev);
            }
        }
        let mut at = 0;
        for (i, node) in work.nodes.iter().enumerate().filter(|(_, n)| n.id != GONE) {
            debug_assert_eq!(at, i);
            stop.check()?;
            if node.id < self.n_tokens {
                ids.push(node.id);
            } else {
                ids.extend(bytes[i..i + node.len as usize].iter().filter_map(|&b| vocab.find(&[b])));
            }
            at = i + node.len as usize;
        }
        Some(())
    }

    fn propose(&self, work: &mut Work, left: u32) {
        let l = work.nodes[left as usize];
        if l.next == NONE {
            return;
        }
        let r = work.nodes[l.next as usize].id;
        if let Some(&(rank, _)) = self.merges.get(&pair(l.id, r)) {
            work.heap.push(Reverse((rank, left, l.id, r)));
        }
    }
}

/// Buffers that are used for one word after the other.
#[derive(Default)]
struct Work {
    nodes: Vec<Node>,
    heap: BinaryHeap<Reverse<(u32, u32, u32, u32)>>,
}

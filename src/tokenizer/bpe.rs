//! BPE: the pair with the lowest rank merges first, the leftmost of equals. It begins with bytes; or, where the vocabulary is
//! written in characters, with these, and a character that it lacks is written in tokens of bytes.

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
    /// Characters that occur in merges, where it begins with characters.
    chars: Option<HashMap<char, u32>>,
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
        Bpe { pre, ignore_merges, chars: None, merges: self.merges, byte_symbols, n_tokens: self.vocab.len() as u32 }
    }

    /// As [`BpeBuilder::build`], of a vocabulary that is written in characters.
    pub fn build_of_chars(self, pre: PreTokenizer) -> Bpe {
        let n_tokens = self.vocab.len() as u32;
        let one = |text: &[u8]| {
            let mut chars = std::str::from_utf8(text).ok()?.chars();
            chars.next().filter(|_| chars.as_str().is_empty())
        };
        let tokens = (0..n_tokens).filter_map(|id| one(self.vocab.bytes(id)));
        let mut known: HashMap<char, u32> =
            tokens.filter_map(|c| Some((c, self.vocab.find(c.encode_utf8(&mut [0; 4]).as_bytes())?))).collect();
        known.extend((n_tokens..).zip(&self.extra).filter_map(|(id, text)| Some((one(text)?, id))));
        let byte_symbols = Vec::new();
        Bpe { pre, ignore_merges: false, chars: Some(known), merges: self.merges, byte_symbols, n_tokens }
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
/// A character that is in no token and no merge.
const UNKNOWN: u32 = u32::MAX - 1;

impl Bpe {
    /// Appends the ids of `text`; `None` if `stop` says so.
    pub fn encode(&self, vocab: &Vocab, text: &str, stop: &Stop, ids: &mut Vec<u32>) -> Option<()> {
        let mut work = Work::default();
        for word in self.pre.split(text, stop)? {
            stop.check()?;
            // A run of line feeds that is a token is one, where a text is cut at them alone.
            let whole = self.ignore_merges || self.chars.is_some() && word.bytes().all(|b| b == b'\n');
            if whole && let Some(id) = vocab.find(word.as_bytes()) {
                ids.push(id);
                continue;
            }
            self.word(vocab, word, &mut work, stop, ids)?;
        }
        Some(())
    }

    fn word(&self, vocab: &Vocab, word: &str, work: &mut Work, stop: &Stop, ids: &mut Vec<u32>) -> Option<()> {
        work.nodes.clear();
        work.heap.clear();
        let bytes = word.as_bytes();
        let mut push = |id: u32, len: usize| {
            let i = work.nodes.len() as u32;
            work.nodes.push(Node { id, prev: i.wrapping_sub(1), next: i + 1, len: len as u32 });
        };
        match &self.chars {
            None => bytes.iter().for_each(|b| push(self.byte_symbols[usize::from(*b)], 1)),
            Some(known) => {
                word.chars().for_each(|c| push(known.get(&c).copied().unwrap_or(UNKNOWN), c.len_utf8()));
            }
        }
        if let Some(last) = work.nodes.last_mut() {
            last.next = NONE;
        }
        for i in 0..work.nodes.len() as u32 {
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
        for node in work.nodes.iter().filter(|n| n.id != GONE) {
            stop.check()?;
            let end = at + node.len as usize;
            if node.id < self.n_tokens {
                ids.push(node.id);
            } else if self.chars.is_some() {
                ids.extend(bytes[at..end].iter().filter_map(|&b| vocab.byte_tokens[usize::from(b)]));
            } else {
                ids.extend(bytes[at..end].iter().filter_map(|&b| vocab.find(&[b])));
            }
            at = end;
        }
        debug_assert_eq!(at, bytes.len());
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

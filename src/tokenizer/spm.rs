//! SentencePiece-style merging: the pair whose text is the token with the best score merges first.
//!
//! This is what llama.cpp does for `tokenizer.ggml.model = llama`; it is not a Unigram search.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::stop::Stop;
use super::vocab::Vocab;

/// Stands for a space in the vocabulary.
pub(super) const SPACE: &str = "\u{2581}";

#[derive(Clone, Copy)]
struct Node {
    start: usize,
    len: usize,
    prev: usize,
    next: usize,
}

const NONE: usize = usize::MAX;

#[derive(PartialEq)]
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Appends the ids of `text`, with a space before it if `prefix`; `None` if `stop` says so.
pub(super) fn encode(vocab: &Vocab, text: &str, prefix: bool, stop: &Stop, ids: &mut Vec<u32>) -> Option<()> {
    let text = if prefix { format!(" {text}") } else { text.to_owned() }.replace(' ', SPACE);
    let mut nodes: Vec<Node> = Vec::with_capacity(text.chars().count());
    for (start, c) in text.char_indices() {
        let i = nodes.len();
        nodes.push(Node { start, len: c.len_utf8(), prev: i.wrapping_sub(1), next: i + 1 });
    }
    if let Some(last) = nodes.last_mut() {
        last.next = NONE;
    }
    let mut heap = BinaryHeap::new();
    for i in 1..nodes.len() {
        stop.check()?;
        propose(vocab, &text, &nodes, i - 1, &mut heap);
    }
    while let Some(c) = heap.pop() {
        stop.check()?;
        let (l, r) = (nodes[c.left], nodes[c.right]);
        // Merged away or grown since it was proposed.
        if l.len == 0 || r.len == 0 || l.len + r.len != c.len || l.next != c.right {
            continue;
        }
        nodes[c.left] = Node { len: c.len, next: r.next, ..l };
        nodes[c.right].len = 0;
        if r.next != NONE {
            nodes[r.next].prev = c.left;
            propose(vocab, &text, &nodes, c.left, &mut heap);
        }
        if l.prev != NONE {
            propose(vocab, &text, &nodes, l.prev, &mut heap);
        }
    }
    for n in nodes.iter().filter(|n| n.len > 0) {
        stop.check()?;
        let piece = &text[n.start..n.start + n.len];
        match vocab.find(piece.as_bytes()) {
            Some(id) => ids.push(id),
            None => ids.extend(piece.bytes().filter_map(|b| vocab.byte_tokens[usize::from(b)])),
        }
    }
    Some(())
}

fn propose(vocab: &Vocab, text: &str, nodes: &[Node], left: usize, heap: &mut BinaryHeap<Candidate>) {
    let l = nodes[left];
    if l.next == NONE {
        return;
    }
    let len = l.len + nodes[l.next].len;
    if let Some(id) = vocab.find(&text.as_bytes()[l.start..l.start + len]) {
        // The sum makes the negative zero equal to the other one.
        let score = vocab.scores.get(id as usize).copied().unwrap_or(0.0) + 0.0;
        heap.push(Candidate { score, left, right: l.next, len });
    }
}

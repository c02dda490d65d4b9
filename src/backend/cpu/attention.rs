//! Attention over the KV cache with an online softmax: nothing grows with the context.
//!
//! A task is one key/value head and a tile of tokens. Keys and values are brought to single
//! precision a block of positions at a time and used by all query heads of the group and all
//! tokens of the tile.

use super::kernel::{Body, Dot, exp};
use super::unpack::f16;
use crate::backend::{Mask, Scores};
use crate::state::{PAGE, PageId};

/// Positions of a block.
pub(super) const BLOCK: usize = 32;
/// Tokens of a tile.
pub(super) const TILE: usize = 8;

/// The cache of one layer, and how it is laid out: `[kv head][place][head_dim]`. A position's place follows from its page.
#[derive(Clone, Copy)]
pub(super) struct Cache {
    pub k: *mut u8,
    pub v: *mut u8,
    /// Whether elements are half precision.
    pub half: bool,
    /// Places of a head.
    pub places: usize,
    /// The page of each [`PAGE`] positions.
    pub table: *const PageId,
    pub head_dim: usize,
}

// SAFETY: addresses only; see `Attend`.
unsafe impl Send for Cache {}
// SAFETY: as above.
unsafe impl Sync for Cache {}

/// Blocks of positions lie in one page.
const _: () = assert!(PAGE.is_multiple_of(BLOCK));

impl Cache {
    /// The cache of a sequence whose pages begin `table` further on.
    ///
    /// # Safety
    /// The table is that long.
    #[inline(always)]
    pub unsafe fn of(self, table: usize) -> Cache {
        // SAFETY: the caller's promise.
        Cache { table: unsafe { self.table.add(table) }, ..self }
    }

    /// Where a head has a position, in elements.
    ///
    /// # Safety
    /// The position has a page in the table.
    #[inline(always)]
    pub unsafe fn at(&self, head: usize, position: usize) -> usize {
        // SAFETY: the caller vouches for the page.
        let page = unsafe { *self.table.add(position / PAGE) } as usize;
        (head * self.places + page * PAGE + position % PAGE) * self.head_dim
    }

    /// Positions `from..from + n` of a head, which lie in one page, in single precision.
    #[inline(always)]
    unsafe fn load(&self, base: *const u8, head: usize, from: usize, n: usize, out: &mut [f32]) {
        let n = n * self.head_dim;
        // SAFETY: the caller asks for positions that the cache holds.
        unsafe {
            let at = self.at(head, from);
            if self.half {
                let x = std::slice::from_raw_parts(base.cast::<u16>().add(at), n);
                out[..n].iter_mut().zip(x).for_each(|(o, h)| *o = f16(*h));
            } else {
                out[..n].copy_from_slice(std::slice::from_raw_parts(base.cast::<f32>().add(at), n));
            }
        }
    }
}

/// One task.
pub(super) struct Attend<'a> {
    pub cache: Cache,
    /// Queries and outputs: `[token][head][head_dim]`.
    pub q: *const f32,
    pub out: *mut f32,
    pub n_heads: usize,
    pub group: usize,
    pub kv_head: usize,
    /// Tokens of the tile.
    pub tokens: std::ops::Range<usize>,
    /// Position of the tile's first token; the others follow it.
    pub first_pos: usize,
    pub scores: Scores,
    /// A score of each head without a value, or null.
    pub sinks: *const f32,
    pub scratch: &'a mut [f32],
}

/// The first position that a token at `position` attends to.
fn first_seen(mask: Mask, position: usize) -> usize {
    match mask {
        Mask::Full => 0,
        Mask::Window(n) => (position + 1).saturating_sub(n),
        Mask::Chunk(n) => position / n.max(1) * n.max(1),
    }
}

/// Floats of scratch that a task needs.
pub(super) fn scratch_len(head_dim: usize, group: usize) -> usize {
    2 * BLOCK * head_dim + TILE * group * (head_dim + 2) + BLOCK
}

impl Body for Attend<'_> {
    #[inline(always)]
    fn run<D: Dot>(self) {
        let (hd, group) = (self.cache.head_dim, self.group);
        let n = self.tokens.len() * group;
        let (keys, rest) = self.scratch.split_at_mut(BLOCK * hd);
        let (values, rest) = rest.split_at_mut(BLOCK * hd);
        let (acc, rest) = rest.split_at_mut(n * hd);
        let (max, rest) = rest.split_at_mut(n);
        let (sum, rest) = rest.split_at_mut(n);
        let scores = &mut rest[..BLOCK];
        acc.fill(0.0);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        let scale = self.scores.scale.unwrap_or(1.0 / (hd as f32).sqrt());
        let end = self.first_pos + self.tokens.len();
        // Blocks begin at multiples of their size, also where the first ones are hidden from all.
        for from in (first_seen(self.scores.mask, self.first_pos) / BLOCK * BLOCK..end).step_by(BLOCK) {
            let len = (end - from).min(BLOCK);
            // SAFETY: positions below `end` have been stored.
            unsafe {
                self.cache.load(self.cache.k, self.kv_head, from, len, keys);
                self.cache.load(self.cache.v, self.kv_head, from, len, values);
            }
            for i in 0..n {
                let token = self.tokens.start + i / group;
                let position = self.first_pos + i / group;
                let visible = (position + 1).saturating_sub(from).min(len);
                let hidden = first_seen(self.scores.mask, position).saturating_sub(from);
                if visible <= hidden {
                    continue;
                }
                let head = self.kv_head * group + i % group;
                // SAFETY: queries of every token and head of the pass are there.
                let q = unsafe { std::slice::from_raw_parts(self.q.add((token * self.n_heads + head) * hd), hd) };
                let mut block_max = max[i];
                for (s, k) in scores[hidden..visible].iter_mut().zip(keys[hidden * hd..].chunks_exact(hd)) {
                    *s = super::kernel::dot_f32::<D>(q, k) * scale;
                    if self.scores.cap != 0.0 {
                        *s = self.scores.cap * (*s / self.scores.cap).tanh();
                    }
                    block_max = block_max.max(*s);
                }
                let acc = &mut acc[i * hd..(i + 1) * hd];
                if block_max > max[i] {
                    let shrink = exp::<D>(max[i] - block_max);
                    let shrink = if max[i] == f32::NEG_INFINITY { 0.0 } else { shrink };
                    sum[i] *= shrink;
                    acc.iter_mut().for_each(|a| *a *= shrink);
                    max[i] = block_max;
                }
                for s in &mut scores[hidden..visible] {
                    *s = exp::<D>(*s - block_max);
                }
                for (s, v) in scores[hidden..visible].iter().zip(values[hidden * hd..].chunks_exact(hd)) {
                    sum[i] += s;
                    for (a, v) in acc.iter_mut().zip(v) {
                        *a = D::fma(*s, *v, *a);
                    }
                }
            }
        }
        for i in 0..n {
            let (token, head) = (self.tokens.start + i / group, self.kv_head * group + i % group);
            // SAFETY: as for the queries; each output belongs to one task.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.add((token * self.n_heads + head) * hd), hd) };
            if !self.sinks.is_null() {
                // SAFETY: there is a sink for each query head, at any alignment.
                let sink = unsafe { self.sinks.add(head).read_unaligned() };
                let most = max[i].max(sink);
                let shrink = (max[i] - most).exp();
                acc[i * hd..(i + 1) * hd].iter_mut().for_each(|a| *a *= shrink);
                sum[i] = sum[i] * shrink + (sink - most).exp();
            }
            let inverse = 1.0 / sum[i];
            out.iter_mut().zip(&acc[i * hd..]).for_each(|(o, a)| *o = a * inverse);
        }
    }
}

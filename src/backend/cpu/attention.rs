//! Attention over the KV cache with an online softmax: nothing grows with the context.
//!
//! A task is one key/value head and a tile of tokens. Keys and values are brought to single
//! precision a block of positions at a time and used by all query heads of the group and all
//! tokens of the tile.

use half::slice::HalfFloatSliceExt;

use super::isa::Isa;
use super::kernel::{Body, Dot, LANES, exp, exp_lanes};
use super::unpack::f16;
use crate::backend::{Class, Mask, Scores};
use crate::gguf::TensorType;
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
    /// F16, F32 or Q8_0.
    pub ty: TensorType,
    /// Bytes of a head at a position.
    pub each: usize,
    /// Places of a head.
    pub places: usize,
    /// The page of each [`PAGE`] positions.
    pub table: *const PageId,
    /// Whether the layer keeps recent positions alone, in pages of their own.
    pub recent: bool,
    pub head_dim: usize,
    /// Elements at the beginning of keys that are the values; 0 where these are of their own.
    pub of_keys: usize,
}

// SAFETY: addresses only; see `Attend`.
unsafe impl Send for Cache {}
// SAFETY: as above.
unsafe impl Sync for Cache {}

/// Blocks of positions lie in one page.
const _: () = assert!(PAGE.is_multiple_of(BLOCK));

impl Cache {
    /// The cache of a sequence whose pages begin `table` further on, and its pages of recent positions `recent` further on.
    ///
    /// # Safety
    /// The tables are that long.
    #[inline(always)]
    pub unsafe fn of(self, table: usize, recent: usize) -> Cache {
        // SAFETY: the caller's promise.
        Cache { table: unsafe { self.table.add(if self.recent { recent } else { table }) }, ..self }
    }

    /// Where a head has a position, in bytes.
    ///
    /// # Safety
    /// The position has a page in the table.
    #[inline(always)]
    pub unsafe fn at(&self, head: usize, position: usize) -> usize {
        // SAFETY: the caller vouches for the page.
        let page = unsafe { *self.table.add(position / PAGE) } as usize;
        (head * self.places + page * PAGE + position % PAGE) * self.each
    }

    /// Positions `from..from + n` of a head, which lie in one page, in single precision.
    #[inline(always)]
    unsafe fn load<D: Dot>(&self, base: *const u8, head: usize, from: usize, n: usize, out: &mut [f32]) {
        let out = &mut out[..n * self.head_dim];
        // SAFETY: the caller asks for positions that the cache holds.
        unsafe {
            let from = base.add(self.at(head, from));
            match self.ty {
                TensorType::F16 => {
                    D::widen(std::slice::from_raw_parts(from.cast::<u16>(), out.len()), out);
                }
                TensorType::Q8_0 => {
                    let (blocks, _) = std::slice::from_raw_parts(from, n * self.each).as_chunks::<Q8_BYTES>();
                    let (out, _) = out.as_chunks_mut::<Q8_ELEMS>();
                    out.iter_mut().zip(blocks).for_each(|(out, block)| load_q8(block, out));
                }
                _ => out.copy_from_slice(std::slice::from_raw_parts(from.cast::<f32>(), out.len())),
            }
        }
    }

    /// Stores the key or value `x` of a head where [`Cache::at`] says; whether it is too large for the cache.
    ///
    /// # Safety
    /// The place is the caller's alone.
    #[inline(always)]
    pub unsafe fn store(&self, base: *mut u8, at: usize, x: &[f32]) -> bool {
        // SAFETY: a place has `each` bytes.
        unsafe {
            let to = base.add(at);
            match self.ty {
                TensorType::F16 => {
                    let out = std::slice::from_raw_parts_mut(to.cast::<half::f16>(), x.len());
                    out.convert_from_f32_slice(x);
                    out.iter().zip(x).any(|(o, x)| o.is_infinite() && x.is_finite())
                }
                TensorType::Q8_0 => {
                    let (out, _) = std::slice::from_raw_parts_mut(to, self.each).as_chunks_mut::<Q8_BYTES>();
                    let (x, _) = x.as_chunks::<Q8_ELEMS>();
                    x.iter().zip(out).fold(false, |over, (x, out)| store_q8(x, out) | over)
                }
                _ => {
                    std::slice::from_raw_parts_mut(to.cast::<f32>(), x.len()).copy_from_slice(x);
                    false
                }
            }
        }
    }
}

/// Elements and bytes of a block of Q8_0: a scale in half precision, and signed bytes.
const Q8_ELEMS: usize = TensorType::Q8_0.block_elems();
const Q8_BYTES: usize = TensorType::Q8_0.block_bytes();

#[inline(always)]
fn load_q8(block: &[u8; Q8_BYTES], out: &mut [f32; Q8_ELEMS]) {
    let d = f16(u16::from_le_bytes([block[0], block[1]]));
    out.iter_mut().zip(&block[2..]).for_each(|(o, q)| *o = d * f32::from(*q as i8));
}

/// Rounds as ggml's `quantize_row_q8_0_ref` does; whether the values are too large. Where one is not finite, neither is
/// the scale.
#[inline(always)]
fn store_q8(x: &[f32; Q8_ELEMS], out: &mut [u8; Q8_BYTES]) -> bool {
    // Magnitudes are compared as bits, in whose order what is not finite comes last.
    let max = f32::from_bits(x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff)));
    let d = if max.is_finite() { max / 127.0 } else { f32::NAN };
    let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
    let scale = half::f16::from_f32(d);
    out[..2].copy_from_slice(&scale.to_le_bytes());
    out[2..].iter_mut().zip(x).for_each(|(q, v)| *q = (v * inverse).round() as i8 as u8);
    scale.is_infinite()
}

/// One task.
pub(super) struct Attend<'a> {
    /// Class of the tokens: it decides how scores are summed.
    pub class: Class,
    pub cache: Cache,
    /// Queries and outputs: `[token][head][head_dim]`.
    pub q: *const f32,
    pub out: *mut f32,
    pub n_heads: usize,
    /// Query heads of the task, from the first on, which share a head of keys.
    pub first_head: usize,
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

/// Query heads of a task, of so many that share a head of keys: few where these are many, so that there is work for all
/// threads.
pub(super) fn heads_of_task(group: usize) -> usize {
    /// Most of them.
    const MAX: usize = 16;
    group.clamp(1, MAX)
}

/// Floats of scratch that a task needs, where so many query heads share a head of keys.
pub(super) fn scratch_len(head_dim: usize, group: usize) -> usize {
    let group = heads_of_task(group);
    3 * BLOCK * head_dim + TILE * group * (head_dim + 2 + BLOCK)
}

impl Attend<'_> {
    /// Query `i` of the tile: `[token][head of the group]`.
    #[inline(always)]
    fn query(&self, i: usize) -> &[f32] {
        let (token, head) = (self.tokens.start + i / self.group, self.first_head + i % self.group);
        let hd = self.cache.head_dim;
        // SAFETY: queries of every token and head of the pass are there.
        unsafe { std::slice::from_raw_parts(self.q.add((token * self.n_heads + head) * hd), hd) }
    }

    /// Scores of `n` queries with a block of keys: `[dimension][position]`.
    #[inline(always)]
    fn scores_of_all<D: Dot>(&self, keys: &[f32], n: usize, scale: f32, scores: &mut [[f32; BLOCK]]) {
        let mut i = 0;
        while D::ISA != Isa::Avx2 && i + SEVERAL <= n {
            let q: [_; SEVERAL] = std::array::from_fn(|j| self.query(i + j));
            scores_of::<D, SEVERAL>(q, keys, scale, &mut scores[i..]);
            i += SEVERAL;
        }
        // Sixteen registers hold the sums of two.
        while i + 2 <= n {
            scores_of::<D, 2>([self.query(i), self.query(i + 1)], keys, scale, &mut scores[i..]);
            i += 2;
        }
        for i in i..n {
            scores_of::<D, 1>([self.query(i)], keys, scale, &mut scores[i..]);
        }
    }
}

/// Queries that meet a key or a value while it is in registers.
const SEVERAL: usize = 4;

/// Scores of some queries with a block of keys; a score is summed over the dimensions in order.
#[inline(always)]
fn scores_of<D: Dot, const N: usize>(q: [&[f32]; N], keys: &[f32], scale: f32, scores: &mut [[f32; BLOCK]]) {
    let (keys, scores) = (keys.as_chunks::<BLOCK>().0, &mut scores[..N]);
    // SAFETY: `D` is an instruction set that the machine has; a block is two times 16 floats.
    unsafe {
        let mut sums = [[D::splat(0.0); 2]; N];
        for (d, keys) in keys.iter().enumerate() {
            let k = [D::load(keys.as_ptr()), D::load(keys.as_ptr().add(LANES))];
            for (q, sums) in q.iter().zip(&mut sums) {
                let q = D::splat(q[d]);
                *sums = [D::mul_add(q, k[0], sums[0]), D::mul_add(q, k[1], sums[1])];
            }
        }
        let scale = D::splat(scale);
        for (sums, scores) in sums.into_iter().zip(scores) {
            D::store(D::mul(sums[0], scale), scores.as_mut_ptr());
            D::store(D::mul(sums[1], scale), scores.as_mut_ptr().add(LANES));
        }
    }
}

/// Adds the values of some positions, each times its weight, to the results of `N` queries, `acc.len() / N` elements each;
/// an element is summed over the positions in order.
#[inline(always)]
fn mix<D: Dot, const N: usize>(weights: [&[f32]; N], values: &[f32], hd: usize, acc: &mut [f32]) {
    let (len, positions) = (acc.len() / N, weights.iter().fold(values.len() / hd, |n, w| n.min(w.len())));
    let mut at = 0;
    while at + LANES <= len {
        // Sixteen registers hold 16 elements of four sums.
        let two = at + 2 * LANES <= len && !(N > 2 && D::ISA == Isa::Avx2);
        // SAFETY: `D` is an instruction set that the machine has; each of the `N` results has 16 elements from `at` on, or
        // 32, and so has the value at each position.
        unsafe {
            let acc = acc.as_mut_ptr().add(at);
            let values = values.as_ptr().add(at);
            if two {
                in_registers::<D, N, 2>(&weights, positions, values, hd, acc, len);
            } else {
                in_registers::<D, N, 1>(&weights, positions, values, hd, acc, len);
            }
        }
        at += if two { 2 * LANES } else { LANES };
    }
    for at in at..len {
        for (weights, acc) in weights.iter().zip(acc.chunks_exact_mut(len)) {
            for (w, v) in weights.iter().zip(values.chunks_exact(hd)) {
                acc[at] = D::fma(*w, v[at], acc[at]);
            }
        }
    }
}

/// 16 times `V` elements of [`mix`].
///
/// # Safety
/// The instruction set must be there, and these elements of results `len` apart and of values `hd` apart.
#[inline(always)]
unsafe fn in_registers<D: Dot, const N: usize, const V: usize>(
    weights: &[&[f32]; N],
    positions: usize,
    values: *const f32,
    hd: usize,
    acc: *mut f32,
    len: usize,
) {
    // SAFETY: the caller's promise; weights are there for all positions.
    unsafe {
        let mut sums = [[D::splat(0.0); V]; N];
        for (n, sums) in sums.iter_mut().enumerate() {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = D::load(acc.add(n * len + LANES * i));
            }
        }
        for p in 0..positions {
            let mut v = [D::splat(0.0); V];
            for (i, v) in v.iter_mut().enumerate() {
                *v = D::load(values.add(p * hd + LANES * i));
            }
            for (weights, sums) in weights.iter().zip(&mut sums) {
                let w = D::splat(*weights.get_unchecked(p));
                for (v, sum) in v.iter().zip(sums) {
                    *sum = D::mul_add(w, *v, *sum);
                }
            }
        }
        for (n, sums) in sums.iter().enumerate() {
            for (i, sum) in sums.iter().enumerate() {
                D::store(*sum, acc.add(n * len + LANES * i));
            }
        }
    }
}

/// The largest of a block's scores and of `than`; what is no number counts as nothing.
#[inline(always)]
fn largest<D: Dot>(scores: &[f32; BLOCK], than: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    // SAFETY: `D` is an instruction set that the machine has; a block is two times 16 floats.
    unsafe {
        let most = D::larger(D::load(scores.as_ptr()), D::splat(than));
        let most = D::larger(D::load(scores.as_ptr().add(LANES)), most);
        D::store(most, lanes.as_mut_ptr());
    }
    lanes.iter().fold(than, |most, l| if *l > most { *l } else { most })
}

/// Scores to weights: their exponentials, less the largest one.
#[inline(always)]
fn weigh<D: Dot>(scores: &mut [f32; BLOCK], largest: f32) {
    for half in scores.as_chunks_mut::<LANES>().0 {
        // SAFETY: `D` is an instruction set that the machine has; these are 16 floats.
        unsafe {
            let x = D::add(D::load(half.as_ptr()), D::splat(-largest));
            D::store(exp_lanes::<D>(x), half.as_mut_ptr());
        }
    }
}

/// The sum of a block's weights, in one order whatever is hidden.
#[inline(always)]
fn total<D: Dot>(weights: &[f32; BLOCK]) -> f32 {
    let mut sums = [0.0; LANES];
    // SAFETY: as in `largest`.
    unsafe { D::store(D::add(D::load(weights.as_ptr()), D::load(weights.as_ptr().add(LANES))), sums.as_mut_ptr()) };
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            sums[l] += sums[l + width];
        }
        width /= 2;
    }
    sums[0]
}

impl Body for Attend<'_> {
    #[inline(always)]
    fn run<D: Dot>(mut self) {
        let scratch = std::mem::take(&mut self.scratch);
        let (hd, group, of_keys) = (self.cache.head_dim, self.group, self.cache.of_keys);
        let vd = if of_keys > 0 { of_keys } else { hd };
        let n = self.tokens.len() * group;
        let (keys, rest) = scratch.split_at_mut(BLOCK * hd);
        let (values, rest) = rest.split_at_mut(BLOCK * hd);
        let (acc, rest) = rest.split_at_mut(n * vd);
        let (max, rest) = rest.split_at_mut(n);
        let (sum, rest) = rest.split_at_mut(n);
        let (turned, rest) = rest.split_at_mut(BLOCK * hd);
        let (scores, _) = rest.as_chunks_mut::<BLOCK>();
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
                self.cache.load::<D>(self.cache.k, self.kv_head, from, len, keys);
                if of_keys == 0 {
                    self.cache.load::<D>(self.cache.v, self.kv_head, from, len, values);
                }
            }
            let values = if of_keys > 0 { &*keys } else { &*values };
            if self.class == Class::Bulk {
                D::turn(keys, hd, turned);
                self.scores_of_all::<D>(turned, n, scale, scores);
            }
            let seen = |i: usize| {
                let position = self.first_pos + i / group;
                let visible = (position + 1).saturating_sub(from).min(len);
                first_seen(self.scores.mask, position).saturating_sub(from).min(visible)..visible
            };
            for (i, scores) in scores[..n].iter_mut().enumerate() {
                let seen = seen(i);
                if seen.is_empty() {
                    continue;
                }
                if self.class == Class::Exact {
                    let q = self.query(i);
                    for (s, k) in scores[seen.clone()].iter_mut().zip(keys[seen.start * hd..].chunks_exact(hd)) {
                        *s = super::kernel::dot_f32::<D>(q, k) * scale;
                    }
                }
                if self.scores.cap != 0.0 {
                    for s in &mut scores[seen.clone()] {
                        *s = self.scores.cap * (*s / self.scores.cap).tanh();
                    }
                }
                scores[..seen.start].fill(f32::NEG_INFINITY);
                scores[seen.end..].fill(f32::NEG_INFINITY);
                let block_max = largest::<D>(scores, max[i]);
                let acc = &mut acc[i * vd..(i + 1) * vd];
                if block_max > max[i] {
                    let shrink = exp::<D>(max[i] - block_max);
                    let shrink = if max[i] == f32::NEG_INFINITY { 0.0 } else { shrink };
                    sum[i] *= shrink;
                    acc.iter_mut().for_each(|a| *a *= shrink);
                    max[i] = block_max;
                }
                weigh::<D>(scores, block_max);
                scores[..seen.start].fill(0.0);
                scores[seen.end..].fill(0.0);
                sum[i] += total::<D>(scores);
            }
            let mut i = 0;
            while i < n {
                let acc = &mut acc[i * vd..];
                if i + SEVERAL <= n && (i..i + SEVERAL).all(|i| seen(i) == (0..BLOCK)) {
                    let weights: [&[f32]; SEVERAL] = std::array::from_fn(|j| &scores[i + j][..]);
                    mix::<D, SEVERAL>(weights, values, hd, &mut acc[..SEVERAL * vd]);
                    i += SEVERAL;
                } else {
                    let seen = seen(i);
                    mix::<D, 1>([&scores[i][seen.clone()]], &values[seen.start * hd..], hd, &mut acc[..vd]);
                    i += 1;
                }
            }
        }
        for i in 0..n {
            let (token, head) = (self.tokens.start + i / group, self.first_head + i % group);
            // SAFETY: as for the queries; each output belongs to one task.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.add((token * self.n_heads + head) * vd), vd) };
            if !self.sinks.is_null() {
                // SAFETY: there is a sink for each query head, at any alignment.
                let sink = unsafe { self.sinks.add(head).read_unaligned() };
                let most = max[i].max(sink);
                let shrink = (max[i] - most).exp();
                acc[i * vd..(i + 1) * vd].iter_mut().for_each(|a| *a *= shrink);
                sum[i] = sum[i] * shrink + (sink - most).exp();
            }
            let inverse = 1.0 / sum[i];
            out.iter_mut().zip(&acc[i * vd..]).for_each(|(o, a)| *o = a * inverse);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards against a cache of Q8_0 that rounds in its own way, or hides values that are not finite or too large.
    #[test]
    fn blocks_of_bytes_are_those_of_ggml() {
        let mut x = [0.0f32; Q8_ELEMS];
        for (i, x) in x.iter_mut().enumerate() {
            *x = (i as f32 - 11.5) * 0.5;
        }
        let mut block = [0u8; Q8_BYTES];
        assert!(!store_q8(&x, &mut block));
        // The largest is 9.75: a scale of 9.75 / 127, whose inverse makes halves of 0.5 / 9.75 * 127 = 6.51.
        assert_eq!(half::f16::from_le_bytes([block[0], block[1]]), half::f16::from_f32(9.75 / 127.0));
        let want = x.map(|v| (v * (1.0 / (9.75f32 / 127.0))).round() as i8);
        assert!(block[2..].iter().zip(want).all(|(q, w)| *q as i8 == w), "{block:?}");
        let mut back = [0.0; Q8_ELEMS];
        load_q8(&block, &mut back);
        assert!(back.iter().zip(&x).all(|(b, x)| (b - x).abs() < 0.04), "{back:?}");
        assert!(!store_q8(&[0.0; Q8_ELEMS], &mut block) && block == [0; Q8_BYTES]);
        assert!(store_q8(&[1e8; Q8_ELEMS], &mut block));
        for bad in [f32::NAN, f32::INFINITY] {
            x[3] = bad;
            store_q8(&x, &mut block);
            load_q8(&block, &mut back);
            assert!(back.iter().all(|b| !b.is_finite()), "{bad}: {back:?}");
        }
    }
}

//! Products of quantised rows with quantised activations, compiled once for each instruction set.
//!
//! The generic bodies are always inlined into functions that enable an instruction set; what
//! differs between sets is the trait [`Dot`]. An output is computed by one thread in an order that
//! follows from the shapes alone.

use super::attention::BLOCK;
use super::isa::Isa;
use super::panel::{self, Panel, ROWS};
use super::unpack::{self, PACKET, Packet, SUB, SUBS};
use crate::backend::{Class, EXACT_ROWS};
use crate::gguf::TensorType;

/// Activations quantised to 8 bits, 16 to a scale, in packets like the weights.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct Activation {
    pub q: [i8; PACKET],
    /// What rounding left, in 1/254 of the scale; used where a router makes small errors large.
    pub rest: [i8; PACKET],
    /// Scale of each 16.
    pub scale: [f32; SUBS],
    /// Scale times sum of each 16.
    pub sum: [f32; SUBS],
}

// SAFETY: arrays of plain numbers without padding; all zeroes is a value.
unsafe impl bytemuck::Zeroable for Activation {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Activation {}

/// An [`Activation`] as blocks of 32 with nibbles take it, four at once: the first halves of blocks 0 to 3, their second
/// halves, and the same of blocks 4 to 7.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct Quads {
    pub q: [[i8; 64]; 4],
    pub rest: [[i8; 64]; 4],
    /// The scale of each four of them.
    pub scale: [[f32; 16]; 4],
    /// Of each block zero and scale times sum, of the first half and of the second one.
    pub sum: [[f32; 16]; 2],
}

// SAFETY: arrays of plain numbers without padding; all zeroes is a value.
unsafe impl bytemuck::Zeroable for Quads {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Quads {}

impl Quads {
    /// Writes group `g` of 16.
    ///
    /// # Safety
    /// `to` may be written, and nobody else writes or reads this group.
    #[inline(always)]
    unsafe fn put(to: *mut Quads, g: usize, q: [i8; SUB], rest: Option<[i8; SUB]>, scale: f32, sum: f32) {
        let (block, second) = (g / 2, g % 2);
        let (part, lane) = (2 * (block / 4) + second, block % 4);
        // SAFETY: the caller's contract; `g` is below 16, so that all indices lie within the arrays.
        unsafe {
            (&raw mut (*to).q[part][SUB * lane]).cast::<[i8; SUB]>().write_unaligned(q);
            if let Some(rest) = rest {
                (&raw mut (*to).rest[part][SUB * lane]).cast::<[i8; SUB]>().write_unaligned(rest);
            }
            (&raw mut (*to).scale[part][4 * lane]).cast::<[f32; 4]>().write_unaligned([scale; 4]);
            (&raw mut (*to).sum[second][2 * block + 1]).write(sum);
        }
    }
}

/// The quants of an [`Activation`] in the order in which the nibbles of 64 bytes of a k-quant come: of each half, 32
/// elements from 0, from 64, from 32 and from 96.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct Paired {
    pub q: [i8; PACKET],
    pub rest: [i8; PACKET],
    pub quads: Quads,
}

// SAFETY: arrays of plain numbers without padding; all zeroes is a value.
unsafe impl bytemuck::Zeroable for Paired {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Paired {}

/// Where group `g` of 16 begins in a [`Paired`].
#[inline(always)]
fn paired_at(g: usize) -> usize {
    let (half, block, odd) = (g / 8, g % 8 / 2, g % 2);
    128 * half + 64 * (block % 2) + 32 * (block / 2) + SUB * odd
}

/// A unit of [`Activation::rest`] in units of the scale.
pub(super) const REST: f32 = 1.0 / 254.0;

/// The operations that instruction sets do in their own way.
pub(super) trait Dot: Sized {
    /// The set.
    const ISA: Isa;
    /// Whether `mul_add` is one instruction.
    const FMA: bool;
    /// Sums side by side.
    type Acc: Copy;
    /// No sum yet.
    ///
    /// # Safety
    /// The instruction set must be there.
    unsafe fn zero() -> Self::Acc;
    /// Adds the dot product of the first `parts` quarters of a packet. `WIDE`: see [`unpack::is_wide`];
    /// `FINE`: with what rounding left.
    ///
    /// # Safety
    /// The instruction set must be there.
    unsafe fn packet<const WIDE: bool, const FINE: bool>(
        w: &Packet,
        a: &Activation,
        parts: usize,
        acc: Self::Acc,
    ) -> Self::Acc;
    /// The sum.
    ///
    /// # Safety
    /// The instruction set must be there.
    unsafe fn sum(acc: Self::Acc) -> f32;

    /// One row of activations with one of weights without unpacking it to memory; `None` where there is no such kernel.
    ///
    /// # Safety
    /// The instruction set must be there; `row` is a whole row, `x` and `pairs` the packets that it spans.
    #[inline(always)]
    unsafe fn row<const FINE: bool>(
        _ty: TensorType,
        _row: *const u8,
        _x: *const Activation,
        _pairs: *const Paired,
        _cols: usize,
    ) -> Option<f32> {
        None
    }

    /// The same for four rows of weights, `stride` bytes apart, whose results are those that [`Dot::row`] gives.
    ///
    /// # Safety
    /// As there, for each row.
    #[inline(always)]
    unsafe fn four_rows<const FINE: bool>(
        _ty: TensorType,
        _rows: *const u8,
        _stride: usize,
        _pairs: *const Paired,
        _cols: usize,
    ) -> Option<[f32; 4]> {
        None
    }

    /// Asks for bytes that will be needed soon.
    #[inline(always)]
    fn ask(_at: *const u8, _bytes: usize) {}

    /// Products of a block of rows with `T` tokens, `groups` groups of 16 elements each. `PAIR`: two
    /// groups share a scale and a min.
    ///
    /// # Safety
    /// The instruction set must be there; each address of `x` has as many packets as `w`.
    #[inline(always)]
    unsafe fn panel<const T: usize, const WIDE: bool, const FINE: bool, const PAIR: bool>(
        w: &[Panel],
        x: [*const Activation; T],
        groups: usize,
    ) -> [[f32; ROWS]; T] {
        // SAFETY: passed on to the caller.
        unsafe { panel::multiply::<Self, T, WIDE, FINE>(w, x, groups) }
    }

    /// Brings the packets of [`ROWS`] rows into the order that `panel` takes.
    ///
    /// # Safety
    /// The instruction set must be there.
    #[inline(always)]
    unsafe fn interleave(rows: &[Packet; ROWS], to: &mut Panel) {
        bytemuck::cast_slice_mut(std::slice::from_mut(to)).copy_from_slice(rows);
    }

    /// Sixteen floats.
    type Lanes: Copy;
    /// The same in all.
    ///
    /// # Safety
    /// The instruction set must be there; so for all operations on lanes.
    unsafe fn splat(x: f32) -> Self::Lanes;
    /// Sixteen of memory, at any alignment.
    ///
    /// # Safety
    /// They can be read.
    unsafe fn load(from: *const f32) -> Self::Lanes;
    /// To memory, at any alignment.
    ///
    /// # Safety
    /// They can be written.
    unsafe fn store(x: Self::Lanes, to: *mut f32);
    /// `a + b`.
    ///
    /// # Safety
    /// See [`Dot::splat`].
    unsafe fn add(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// `a * b`.
    ///
    /// # Safety
    /// See [`Dot::splat`].
    unsafe fn mul(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// `a * b + c`, rounded as [`Dot::fma`] does.
    ///
    /// # Safety
    /// See [`Dot::splat`].
    unsafe fn mul_add(a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes;
    /// `a` where it is larger than `b`, else `b`.
    ///
    /// # Safety
    /// See [`Dot::splat`].
    unsafe fn larger(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// Two to the power of the integers in the last bits of `x`, sums with [`ROUND`].
    ///
    /// # Safety
    /// See [`Dot::splat`].
    unsafe fn power(x: Self::Lanes) -> Self::Lanes;

    /// Halves in single precision.
    #[inline(always)]
    fn widen(from: &[u16], to: &mut [f32]) {
        to.iter_mut().zip(from).for_each(|(o, h)| *o = unpack::f16(*h));
    }

    /// Brings a block of keys, `hd` floats each, to the order `[dimension][position]`.
    #[inline(always)]
    fn turn(keys: &[f32], hd: usize, to: &mut [f32]) {
        for (d, to) in to.chunks_exact_mut(BLOCK).enumerate() {
            to.iter_mut().zip(keys.chunks_exact(hd)).for_each(|(to, key)| *to = key[d]);
        }
    }

    #[inline(always)]
    fn fma(a: f32, b: f32, c: f32) -> f32 {
        if Self::FMA { a.mul_add(b, c) } else { a * b + c }
    }
}

/// Portable code.
pub(super) struct Scalar;

impl Dot for Scalar {
    const ISA: Isa = Isa::Scalar;
    const FMA: bool = false;

    type Acc = f32;

    #[inline(always)]
    unsafe fn zero() -> f32 {
        0.0
    }

    #[inline(always)]
    unsafe fn packet<const WIDE: bool, const FINE: bool>(
        w: &Packet,
        a: &Activation,
        parts: usize,
        mut acc: f32,
    ) -> f32 {
        for s in 0..parts * SUBS / 4 {
            let (mut sum, mut rest) = (0i32, 0i32);
            for i in SUB * s..SUB * (s + 1) {
                sum += i32::from(w.q[i]) * i32::from(a.q[i]);
                if FINE {
                    rest += i32::from(w.q[i]) * i32::from(a.rest[i]);
                }
            }
            acc += (sum as f32 + rest as f32 * REST) * (w.scale[s] * a.scale[s]) - w.min[s] * a.sum[s];
        }
        acc
    }

    #[inline(always)]
    unsafe fn sum(acc: f32) -> f32 {
        acc
    }

    type Lanes = [f32; LANES];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::Lanes {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Lanes {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[f32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(x: Self::Lanes, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(x) }
    }

    #[inline(always)]
    unsafe fn add(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn mul(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    unsafe fn larger(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    unsafe fn power(x: Self::Lanes) -> Self::Lanes {
        x.map(power)
    }
}

/// Floats of [`Dot::Lanes`].
pub(super) const LANES: usize = 16;

#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};

/// What becomes of an output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Then {
    /// It is stored.
    Store,
    /// It is added to what is there.
    Add,
    /// `silu` of it is stored.
    Silu,
    /// What is there is multiplied by it.
    Mul,
}

/// One product: rows of a matrix with `tokens` columns of activations.
#[derive(Clone, Copy)]
pub(super) struct Job {
    /// First byte of the matrix.
    pub weights: *const u8,
    pub ty: TensorType,
    pub cols: usize,
    /// Bias of each row, or null.
    pub bias: *const f32,
    /// Activations: `tokens` rows of `packets` packets.
    pub x: *const Activation,
    /// The same in another order for exact rows; else null.
    pub pairs: *const Paired,
    /// The same activations in single precision, `cols` a token, `f32_stride` apart.
    pub xf: *const f32,
    pub tokens: usize,
    /// Class of all tokens: it decides which products are taken, whatever their number.
    pub class: Class,
    /// Whether what rounding left of the activations counts.
    pub fine: bool,
    /// Whether `x` is in tiles (`x86::amx`).
    pub tiled: bool,
    /// Output of row r, token t: `out[t * stride + r]`.
    pub out: *mut f32,
    pub stride: usize,
    pub then: Then,
}

impl Job {
    /// Address of row `r` of the matrix.
    #[inline(always)]
    pub(super) fn row(&self, r: usize) -> *const u8 {
        let row_bytes = self.cols / self.ty.block_elems() * self.ty.block_bytes();
        self.weights.wrapping_add(r * row_bytes)
    }
}

// SAFETY: a job is a description; who runs it upholds the contract of `rows`.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

/// `x / (1 + exp(-x))`.
#[inline(always)]
pub(super) fn silu<D: Dot>(x: f32) -> f32 {
    x / (1.0 + exp::<D>(-x))
}

/// 1.5 * 2^23: in the last bits of the sum with a value below 2^22 is the nearest integer.
pub(super) const ROUND: f32 = 12_582_912.0;

/// The coefficients of `exp` between the powers of two.
const EXP: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5];
/// What `exp` may be taken of.
const EXP_FROM: f32 = -87.3;
const EXP_TO: f32 = 88.3;

/// exp with a relative error of about 2e-7; 1e-38 below -87.3, saturated above 88.3.
#[inline(always)]
pub(super) fn exp<D: Dot>(x: f32) -> f32 {
    let x = x.clamp(EXP_FROM, EXP_TO);
    let rounded = D::fma(x, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = D::fma(n, -0.693_359_4, x);
    let r = D::fma(n, 2.121_944_4e-4, r);
    let p = EXP[1..].iter().fold(EXP[0], |p, c| D::fma(p, r, *c));
    D::fma(p, r * r, r + 1.0) * power(rounded)
}

/// Two to the power of the integer in the last bits of a sum with [`ROUND`].
#[inline(always)]
fn power(rounded: f32) -> f32 {
    f32::from_bits(rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23)
}

/// [`exp`] of sixteen.
///
/// # Safety
/// The instruction set must be there.
#[inline(always)]
pub(super) unsafe fn exp_lanes<D: Dot>(x: D::Lanes) -> D::Lanes {
    // SAFETY: the caller's promise.
    unsafe {
        // What is no number stays so: it is not larger than anything, nor is anything larger.
        let minus = D::mul(D::larger(D::splat(EXP_FROM), x), D::splat(-1.0));
        let x = D::mul(D::larger(D::splat(-EXP_TO), minus), D::splat(-1.0));
        let rounded = D::mul_add(x, D::splat(std::f32::consts::LOG2_E), D::splat(ROUND));
        let n = D::add(rounded, D::splat(-ROUND));
        let r = D::mul_add(n, D::splat(-0.693_359_4), x);
        let r = D::mul_add(n, D::splat(2.121_944_4e-4), r);
        let mut p = D::splat(EXP[0]);
        for c in &EXP[1..] {
            p = D::mul_add(p, r, D::splat(*c));
        }
        D::mul(D::mul_add(p, D::mul(r, r), D::add(r, D::splat(1.0))), D::power(rounded))
    }
}

/// Writes an output.
#[inline(always)]
pub(super) unsafe fn put<D: Dot>(j: &Job, row: usize, t: usize, mut v: f32) {
    // SAFETY: `rows`' contract: bias has an entry a row, `out` one a row and token.
    unsafe {
        if !j.bias.is_null() {
            v += j.bias.add(row).read_unaligned();
        }
        let out = j.out.add(t * j.stride + row);
        *out = match j.then {
            Then::Store => v,
            Then::Add => *out + v,
            Then::Silu => silu::<D>(v),
            Then::Mul => *out * v,
        };
    }
}

/// Writes the first `n` of 16 outputs of rows side by side.
///
/// # Safety
/// The contract of [`Rows`].
#[inline(always)]
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn put_row<D: Dot>(j: &Job, row: usize, n: usize, t: usize, mut v: [f32; ROWS]) {
    // SAFETY: as in `put`.
    unsafe {
        if !j.bias.is_null() {
            for (r, v) in v[..n].iter_mut().enumerate() {
                *v += j.bias.add(row + r).read_unaligned();
            }
        }
        let out = std::slice::from_raw_parts_mut(j.out.add(t * j.stride + row), n);
        let mut old = [0.0; ROWS];
        if matches!(j.then, Then::Add | Then::Mul) {
            old[..n].copy_from_slice(out);
        }
        match j.then {
            Then::Store => {}
            Then::Add => v.iter_mut().zip(old).for_each(|(v, old)| *v += old),
            Then::Silu => v.iter_mut().for_each(|v| *v = silu::<D>(*v)),
            Then::Mul => v.iter_mut().zip(old).for_each(|(v, old)| *v *= old),
        }
        out.copy_from_slice(&v[..n]);
    }
}

/// Packets of a row that are unpacked before they are multiplied: a load that comes
/// too soon after the narrower stores it spans waits for them to reach the cache.
const AHEAD: usize = 8;

/// Panels of scratch that products of `cols` columns need: a block of rows, and one for the rows
/// that are being unpacked.
pub(super) fn panel_scratch(cols: usize) -> usize {
    cols.div_ceil(PACKET) + 1
}

#[inline(always)]
unsafe fn quantised<D: Dot>(j: &Job, from: usize, to: usize, scratch: &mut [Panel]) {
    // SAFETY: passed on to the caller.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if j.tiled {
            return super::x86::amx::all_rows::<D>(j, from, to, scratch);
        }
        match (j.class, j.fine, unpack::is_wide(j.ty)) {
            (Class::Bulk, _, _) => panel::all_rows::<D>(j, from, to, scratch),
            (Class::Exact, false, false) => exact::<D, false, false>(j, from, to, scratch),
            (Class::Exact, false, true) => exact::<D, true, false>(j, from, to, scratch),
            (Class::Exact, true, false) => exact::<D, false, true>(j, from, to, scratch),
            (Class::Exact, true, true) => exact::<D, true, true>(j, from, to, scratch),
        }
    }
}

/// Quarters of packet `i` that hold elements.
#[inline(always)]
fn parts(cols: usize, i: usize) -> usize {
    (cols - i * PACKET).min(PACKET).div_ceil(64)
}

/// Exact rows: a row of weights meets each row of activations by itself, in the order that it has alone, and stays in
/// the nearest cache meanwhile.
#[inline(always)]
unsafe fn exact<D: Dot, const WIDE: bool, const FINE: bool>(j: &Job, from: usize, to: usize, scratch: &mut [Panel]) {
    debug_assert!(j.tokens <= EXACT_ROWS, "an exact job of {} rows", j.tokens);
    let packets = j.cols.div_ceil(PACKET);
    let unpacked = &mut bytemuck::cast_slice_mut::<Panel, Packet>(scratch)[..AHEAD];
    // Weights set out before the activations are looked at, which other threads have just written.
    D::ask(j.row(from), j.row(to) as usize - j.row(from) as usize);
    let stride = j.row(1) as usize - j.row(0) as usize;
    let mut from = from;
    'fours: while from + 4 <= to {
        for t in 0..j.tokens {
            // SAFETY: as below, for four rows.
            unsafe {
                let pairs = j.pairs.add(t * packets);
                let Some(v) = D::four_rows::<FINE>(j.ty, j.row(from), stride, pairs, j.cols) else { break 'fours };
                for (i, v) in v.into_iter().enumerate() {
                    put::<D>(j, from + i, t, v);
                }
            }
        }
        from += 4;
    }
    for r in from..to {
        for t in 0..j.tokens {
            // SAFETY: `rows`' contract; the caller enabled the instruction set; each token has `packets` packets in
            // both orders.
            unsafe {
                let (x, pairs) = (j.x.add(t * packets), j.pairs.add(t * packets));
                match D::row::<FINE>(j.ty, j.row(r), x, pairs, j.cols) {
                    Some(v) => put::<D>(j, r, t, v),
                    None => {
                        staged::<D, WIDE, FINE>(j, r, unpacked);
                        break;
                    }
                }
            }
        }
    }
}

/// A row of weights of a type that is unpacked first, with each row of activations.
#[inline(always)]
unsafe fn staged<D: Dot, const WIDE: bool, const FINE: bool>(j: &Job, row: usize, unpacked: &mut [Packet]) {
    let packets = j.cols.div_ceil(PACKET);
    // SAFETY: as in `exact`.
    unsafe {
        let mut sums = [D::zero(); EXACT_ROWS];
        for start in (0..packets).step_by(AHEAD) {
            let ahead = (packets - start).min(AHEAD);
            let unpacked = &mut unpacked[..ahead];
            dispatch(D::ISA, Unpack { job: j, rows: row..row + 1, start, out: unpacked });
            for (t, sum) in sums.iter_mut().take(j.tokens).enumerate() {
                let x = j.x.add(t * packets + start);
                let mut acc = *sum;
                for (i, p) in unpacked.iter().enumerate() {
                    acc = D::packet::<WIDE, FINE>(p, &*x.add(i), parts(j.cols, start + i), acc);
                }
                *sum = acc;
            }
        }
        for (t, sum) in sums.into_iter().take(j.tokens).enumerate() {
            put::<D>(j, row, t, D::sum(sum));
        }
    }
}

/// Unpacks the packets from `start` of some rows: as many of each row as `out` has room for.
pub(super) struct Unpack<'a> {
    pub job: &'a Job,
    pub rows: std::ops::Range<usize>,
    pub start: usize,
    pub out: &'a mut [Packet],
}

impl Unpack<'_> {
    #[inline(always)]
    fn unpack<Q: unpack::Quant>(self) {
        let bytes = self.job.cols / Q::BLOCK * Q::BYTES;
        let each = self.out.len() / self.rows.len();
        for (r, out) in self.rows.zip(self.out.chunks_exact_mut(each)) {
            // SAFETY: `rows`' contract: the matrix has more than `r` rows of this many bytes.
            let row = unsafe { std::slice::from_raw_parts(self.job.row(r), bytes) };
            for (i, p) in out.iter_mut().enumerate() {
                unpack::packet::<Q>(row, self.start + i, self.job.cols, p);
            }
        }
    }
}

impl Body for Unpack<'_> {
    #[inline(always)]
    fn run<D: Dot>(self) {
        use unpack::{IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, IQ4_NL, IQ4_XS, MXFP4Block};
        use unpack::{Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};
        match self.job.ty {
            TensorType::Q4_0 => self.unpack::<Q4_0>(),
            TensorType::Q4_1 => self.unpack::<Q4_1>(),
            TensorType::Q5_0 => self.unpack::<Q5_0>(),
            TensorType::Q5_1 => self.unpack::<Q5_1>(),
            TensorType::Q8_0 => self.unpack::<Q8_0>(),
            TensorType::Q2_K => self.unpack::<Q2_K>(),
            TensorType::Q3_K => self.unpack::<Q3_K>(),
            TensorType::Q4_K => self.unpack::<Q4_K>(),
            TensorType::Q5_K => self.unpack::<Q5_K>(),
            TensorType::Q6_K => self.unpack::<Q6_K>(),
            TensorType::IQ4_NL => self.unpack::<IQ4_NL>(),
            TensorType::IQ4_XS => self.unpack::<IQ4_XS>(),
            TensorType::MXFP4 => self.unpack::<MXFP4Block>(),
            TensorType::IQ1_S => self.unpack::<IQ1_S>(),
            TensorType::IQ1_M => self.unpack::<IQ1_M>(),
            TensorType::IQ2_XXS => self.unpack::<IQ2_XXS>(),
            TensorType::IQ2_XS => self.unpack::<IQ2_XS>(),
            TensorType::IQ2_S => self.unpack::<IQ2_S>(),
            TensorType::IQ3_XXS => self.unpack::<IQ3_XXS>(),
            TensorType::IQ3_S => self.unpack::<IQ3_S>(),
            _ => unreachable!("types are checked when the model is opened"),
        }
    }
}

/// A plain floating-point type.
trait Float {
    const BYTES: usize;
    fn load(b: &[u8]) -> f32;
}
struct F32;
impl Float for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn load(b: &[u8]) -> f32 {
        f32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }
}
struct F16;
impl Float for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn load(b: &[u8]) -> f32 {
        unpack::f16(u16::from_le_bytes([b[0], b[1]]))
    }
}
struct Bf16;
impl Float for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn load(b: &[u8]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)
    }
}

/// Sums side by side, so that additions do not wait for each other.
const SUMS: usize = 32;

#[inline(always)]
pub(super) fn dot_f32<D: Dot>(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0.0f32; SUMS];
    let (a8, b8) = (a.chunks_exact(SUMS), b.chunks_exact(SUMS));
    let tail: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a8.zip(b8) {
        for l in 0..SUMS {
            acc[l] = D::fma(x[l], y[l], acc[l]);
        }
    }
    let mut width = SUMS / 2;
    while width > 0 {
        for l in 0..width {
            acc[l] += acc[l + width];
        }
        width /= 2;
    }
    acc[0] + tail
}

#[inline(always)]
unsafe fn float<D: Dot, T: Float>(j: &Job, from: usize, to: usize, scratch: &mut [f32]) {
    for r in from..to {
        // SAFETY: `rows`' contract.
        let row = unsafe { std::slice::from_raw_parts(j.weights.add(r * j.cols * T::BYTES), j.cols * T::BYTES) };
        let w = &mut scratch[..j.cols];
        for (w, b) in w.iter_mut().zip(row.chunks_exact(T::BYTES)) {
            *w = T::load(b);
        }
        for t in 0..j.tokens {
            // SAFETY: each token has `cols` activations.
            let x = unsafe { std::slice::from_raw_parts(j.xf.add(t * j.cols), j.cols) };
            // SAFETY: as for the row.
            unsafe { put::<D>(j, r, t, dot_f32::<D>(w, x)) };
        }
    }
}

#[inline(always)]
unsafe fn any<D: Dot>(j: &Job, from: usize, to: usize, scratch: &mut [f32], panels: &mut [Panel]) {
    // SAFETY: passed on to the caller.
    unsafe {
        match j.ty {
            TensorType::F32 => float::<D, F32>(j, from, to, scratch),
            TensorType::F16 => float::<D, F16>(j, from, to, scratch),
            TensorType::BF16 => float::<D, Bf16>(j, from, to, scratch),
            _ => quantised::<D>(j, from, to, panels),
        }
    }
}

/// A body that is compiled for each instruction set.
pub(super) trait Body {
    /// Runs it.
    fn run<D: Dot>(self);
}

/// Runs a body in the given instruction set, which the machine must have.
#[inline(always)]
pub(super) fn dispatch<B: Body>(isa: Isa, body: B) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2")]
        fn avx512<B: Body>(body: B) {
            body.run::<Avx512>();
        }
        #[target_feature(enable = "avx2,fma,f16c,bmi2")]
        fn avx2<B: Body>(body: B) {
            body.run::<Avx2>();
        }
        match isa {
            // SAFETY: `Isa` values other than Scalar come from detection on this machine.
            Isa::Amx | Isa::Avx512 => return unsafe { avx512(body) },
            // SAFETY: as above.
            Isa::Avx2 => return unsafe { avx2(body) },
            Isa::Scalar => {}
        }
    }
    let _ = isa;
    body.run::<Scalar>();
}

/// Rows `from..to` of a job.
pub(super) struct Rows<'a> {
    pub job: &'a Job,
    pub from: usize,
    pub to: usize,
    /// `cols` floats.
    pub scratch: &'a mut [f32],
    /// As many as [`panel_scratch`] says.
    pub panels: &'a mut [Panel],
}

impl Body for Rows<'_> {
    #[inline(always)]
    fn run<D: Dot>(self) {
        // SAFETY: who makes the job vouches for its addresses (see `matmul`).
        unsafe { any::<D>(self.job, self.from, self.to, self.scratch, self.panels) }
    }
}

/// Quantises groups `from..to` of 16 of the `cols` values at `x`; values beyond count as zero.
pub(super) struct Quantise {
    pub x: *const f32,
    pub cols: usize,
    pub from: usize,
    pub to: usize,
    /// Packets of the whole row, of which only these groups are written.
    pub out: *mut Activation,
    /// The same for a row that is alone, or null.
    pub pairs: *mut Paired,
    pub fine: bool,
}

impl Body for Quantise {
    #[inline(always)]
    fn run<D: Dot>(self) {
        for g in self.from..self.to {
            let n = self.cols.saturating_sub(SUB * g).min(SUB);
            let (mut q, mut rest) = ([0i8; SUB], [0i8; SUB]);
            // SAFETY: who makes the body vouches for `cols` floats and for packets that span `to` groups, of
            // which these groups are written by nobody else; the arrays hold 16 each.
            unsafe {
                let at = self.x.add((SUB * g).min(self.cols));
                let x = if n == SUB {
                    at.cast::<[f32; SUB]>().read_unaligned()
                } else {
                    let mut x = [0.0f32; SUB];
                    std::ptr::copy_nonoverlapping(at, x.as_mut_ptr(), n);
                    x
                };
                let (scale, sum) = quantise_group(&x, &mut q, &mut rest, self.fine);
                let (out, at) = (self.out.add(g / SUBS), g % SUBS);
                (&raw mut (*out).scale[at]).write(scale);
                (&raw mut (*out).sum[at]).write(sum);
                (&raw mut (*out).q[SUB * at]).cast::<[i8; SUB]>().write_unaligned(q);
                if self.fine {
                    (&raw mut (*out).rest[SUB * at]).cast::<[i8; SUB]>().write_unaligned(rest);
                }
                if !self.pairs.is_null() {
                    let pairs = self.pairs.add(g / SUBS);
                    (&raw mut (*pairs).q[paired_at(at)]).cast::<[i8; SUB]>().write_unaligned(q);
                    if self.fine {
                        (&raw mut (*pairs).rest[paired_at(at)]).cast::<[i8; SUB]>().write_unaligned(rest);
                    }
                    Quads::put(&raw mut (*pairs).quads, at, q, self.fine.then_some(rest), scale, sum);
                }
            }
        }
    }
}

/// Quantises 16 values; returns their scale and scaled sum. Values that are not finite have no place among integers:
/// the scale is then no number, so that no product of the group is one.
#[inline(always)]
fn quantise_group(x: &[f32; SUB], q: &mut [i8; SUB], rest: &mut [i8; SUB], fine: bool) -> (f32, f32) {
    // Magnitudes are compared as bits, in whose order what is not finite comes last.
    let max = x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    let d = if max < f32::INFINITY.to_bits() { f32::from_bits(max) / 127.0 } else { f32::NAN };
    // The inverse of a smaller one may be infinite; such values count as zeros.
    let inverse = if d >= f32::MIN_POSITIVE { 1.0 / d } else { 0.0 };
    let mut total = 0i32;
    for (q, v) in q.iter_mut().zip(x) {
        let n = nearest(v * inverse);
        *q = n as i8;
        total = total.wrapping_add(n);
    }
    let mut total_rest = 0i32;
    if fine {
        for ((rest, q), v) in rest.iter_mut().zip(q).zip(x) {
            let n = nearest((v * inverse - f32::from(*q)) / REST);
            *rest = n as i8;
            total_rest = total_rest.wrapping_add(n);
        }
    }
    (d, d * (total as f32 + total_rest as f32 * REST))
}

/// The nearest integer of a value below 2^22; any integer for others.
#[inline(always)]
fn nearest(v: f32) -> i32 {
    ((v + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards against values that are not finite and become integers, so that nobody sees them again.
    #[test]
    fn values_that_are_not_finite_spoil_their_group() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (mut q, mut rest) = ([0; SUB], [0; SUB]);
            let mut x = [1.0; SUB];
            assert!(quantise_group(&x, &mut q, &mut rest, true).0.is_finite());
            x[7] = bad;
            let (scale, sum) = quantise_group(&x, &mut q, &mut rest, true);
            assert!(!scale.is_finite() && sum.is_nan(), "{bad}: {scale}, {sum}");
        }
    }
}

//! One row of activations with one of weights, straight from the blocks: what exact rows take with the common types where
//! AVX-512 VNNI is there. Nothing is staged in memory, and the scales of a packet are decoded together.

use std::arch::x86_64::*;

use super::super::kernel::{Activation, Paired, REST};
use super::super::unpack::PACKET;
use super::{ask_ahead, avx512_nibbles as nibbles, supers};
use crate::gguf::TensorType;

/// Dot product of a row of `cols` weights with `x`; `None` for types that have no such kernel. `FINE`: with what
/// rounding of the activations left.
///
/// # Safety
/// The machine has AVX-512 F, BW, DQ, VL and VNNI; `row` points to a whole row, `x` and `pairs` to as many
/// packets as it spans.
#[inline(always)]
pub(super) unsafe fn row<const FINE: bool>(
    ty: TensorType,
    row: *const u8,
    x: *const Activation,
    pairs: *const Paired,
    cols: usize,
) -> Option<f32> {
    // SAFETY: passed on to the caller.
    unsafe {
        Some(match ty {
            TensorType::Q4_0 => nibbles::rows::<18, 1, FINE>(row, 0, pairs, cols)[0],
            TensorType::Q4_1 => nibbles::rows::<20, 1, FINE>(row, 0, pairs, cols)[0],
            TensorType::Q8_0 => q8_0::<FINE>(row, x, cols),
            TensorType::Q4_K => k4::<144, false, FINE>(row, x, pairs, cols),
            TensorType::Q5_K => k4::<176, true, FINE>(row, x, pairs, cols),
            TensorType::Q6_K => q6_k::<FINE>(row, x, cols),
            _ => return supers::row_avx512::<FINE>(ty, row, x, cols),
        })
    }
}

/// Sums of products of 64 quants with 64 activations, four to a lane.
#[inline(always)]
pub(super) unsafe fn products<const FINE: bool>(q: __m512i, x: *const i8, rest: *const i8) -> __m512 {
    // SAFETY: the caller vouches for AVX-512 VNNI and for 64 readable bytes behind each address.
    unsafe {
        let zero = _mm512_setzero_si512();
        let sums = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(zero, q, _mm512_loadu_si512(x.cast())));
        if !FINE {
            return sums;
        }
        let rest = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(zero, q, _mm512_loadu_si512(rest.cast())));
        _mm512_fmadd_ps(rest, _mm512_set1_ps(REST), sums)
    }
}

/// The same of magnitudes with quarter `i` of a packet, of which those whose bits are set in `negative` change their signs.
#[inline(always)]
pub(super) unsafe fn signed_products<const FINE: bool>(q: __m512i, negative: u64, a: &Activation, i: usize) -> __m512 {
    // SAFETY: i is below 4; the caller vouches for AVX-512 BW and VNNI.
    unsafe {
        let zero = _mm512_setzero_si512();
        let x = _mm512_load_si512(a.q.as_ptr().add(64 * i).cast());
        let x = _mm512_mask_sub_epi8(x, negative, zero, x);
        let sums = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(zero, q, x));
        if !FINE {
            return sums;
        }
        let x = _mm512_load_si512(a.rest.as_ptr().add(64 * i).cast());
        let x = _mm512_mask_sub_epi8(x, negative, zero, x);
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(zero, q, x)), _mm512_set1_ps(REST), sums)
    }
}

/// Which of 16 scales each lane takes: four lanes each of `first`, `first + 1`, `first + 2 + skip` and the next.
#[inline(always)]
pub(super) unsafe fn lanes(first: i32, skip: i32) -> __m512i {
    let (b, c, d) = (first + 1, first + 2 + skip, first + 3 + skip);
    // SAFETY: the caller vouches for AVX-512.
    unsafe { _mm512_set_epi32(d, d, d, d, c, c, c, c, b, b, b, b, first, first, first, first) }
}

/// Bytes of a block of Q8_0: a scale and 32 quants.
const Q8_0: usize = 34;

/// Quants of a block of Q8_0 plus 128, as bytes without a sign.
#[inline(always)]
unsafe fn quants8(block: *const u8) -> __m256i {
    // SAFETY: the caller's contract: a whole block is readable.
    unsafe { _mm256_xor_si256(_mm256_loadu_si256(block.add(2).cast()), _mm256_set1_epi8(-128)) }
}

/// A row of Q8_0.
#[inline(always)]
unsafe fn q8_0<const FINE: bool>(row: *const u8, x: *const Activation, cols: usize) -> f32 {
    let mut acc = Sums8 { even: zero(), odd: zero(), offset: zero() };
    let (whole, left) = (cols / PACKET, cols % PACKET / 32);
    for p in 0..whole {
        // SAFETY: the caller's contract: eight more blocks of the row, and their activations, are there.
        unsafe { acc.packet::<FINE, 8>(row.add(8 * p * Q8_0), &*x.add(p), 8) };
    }
    if left > 0 {
        // SAFETY: as above, with `left` blocks.
        unsafe { acc.packet::<FINE, 0>(row.add(8 * whole * Q8_0), &*x.add(whole), left) };
    }
    // SAFETY: the caller vouches for AVX-512.
    unsafe {
        let sum = _mm512_add_ps(acc.even, acc.odd);
        _mm512_reduce_add_ps(_mm512_fnmadd_ps(acc.offset, _mm512_set1_ps(128.0), sum))
    }
}

/// The scale of each of `n` blocks of Q8_0, twice: for the two halves that have scales of their own. Zero for blocks that
/// are not there. (No closure: one that is called twice is compiled by itself, without the instruction set.)
#[inline(always)]
unsafe fn scales8(first: *const u8, n: usize) -> __m512 {
    // SAFETY: the caller vouches for AVX-512 and for `n` blocks.
    unsafe {
        let mut h = [0i16; 8];
        for (b, h) in h.iter_mut().enumerate() {
            if b < n {
                *h = first.add(b * Q8_0).cast::<i16>().read_unaligned();
            }
        }
        let h = _mm_set_epi16(h[7], h[6], h[5], h[4], h[3], h[2], h[1], h[0]);
        let twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
        _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_cvtph_ps(h)))
    }
}

#[inline(always)]
fn zero() -> __m512 {
    // SAFETY: all zero bits are sixteen zeros.
    unsafe { std::mem::zeroed() }
}

/// Sums of a row of Q8_0. Two accumulators, so that additions wait less for each other.
struct Sums8 {
    even: __m512,
    odd: __m512,
    /// Scales, which the bias multiplies, times sums of activations.
    offset: __m512,
}

impl Sums8 {
    /// `n` blocks of a packet; `ALL` is 8 where that many are known to be there.
    #[inline(always)]
    unsafe fn packet<const FINE: bool, const ALL: usize>(&mut self, first: *const u8, a: &Activation, n: usize) {
        let n = if ALL == 8 { 8 } else { n };
        if ALL == 8 {
            ask_ahead::<{ 8 * Q8_0 }>(first);
        }
        // SAFETY: `row`'s contract: `n` blocks are readable.
        unsafe {
            let d = scales8(first, n);
            let scale = _mm512_mul_ps(d, _mm512_loadu_ps(a.scale.as_ptr()));
            self.offset = _mm512_fmadd_ps(d, _mm512_loadu_ps(a.sum.as_ptr()), self.offset);
            for i in 0..4 {
                if 2 * i >= n {
                    break;
                }
                // The last quarter's second half may be missing: its scale is zero then.
                let second = if 2 * i + 1 < n { 2 * i + 1 } else { 2 * i };
                let q = _mm512_inserti64x4::<1>(
                    _mm512_castsi256_si512(quants8(first.add(2 * i * Q8_0))),
                    quants8(first.add(second * Q8_0)),
                );
                let sums = products::<FINE>(q, a.q.as_ptr().add(64 * i), a.rest.as_ptr().add(64 * i));
                let scale = _mm512_permutexvar_ps(lanes(4 * i as i32, 0), scale);
                let acc = if i % 2 == 0 { &mut self.even } else { &mut self.odd };
                *acc = _mm512_fmadd_ps(sums, scale, *acc);
            }
        }
    }
}

/// Eight 6-bit scales and mins from the 12 bytes behind a header of 4, as floats of 16 lanes (each twice).
#[inline(always)]
unsafe fn scales_k4(block: *const u8) -> (__m512, __m512) {
    // SAFETY: the caller gives 16 readable bytes and vouches for AVX-512.
    unsafe {
        let bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(block.cast()));
        // The lower lane becomes scales, the upper one mins. Scale j < 4 is in byte 4 + j, min j in byte 8 + j; from
        // j = 4 on the low nibble of byte 8 + j is a scale's and the high one a min's, and their upper two bits
        // are those of byte j and byte 4 + j.
        let low = _mm256_setr_epi8(
            4, 4, 5, 5, 6, 6, 7, 7, 12, 12, 13, 13, 14, 14, 15, 15, //
            8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15,
        );
        let high = _mm256_setr_epi8(
            -1, -1, -1, -1, -1, -1, -1, -1, 4, 4, 5, 5, 6, 6, 7, 7, //
            -1, -1, -1, -1, -1, -1, -1, -1, 8, 8, 9, 9, 10, 10, 11, 11,
        );
        let low = _mm256_shuffle_epi8(bytes, low);
        let low = _mm256_mask_blend_epi8(0xff00_0000, low, _mm256_srli_epi16::<4>(low));
        let keep = _mm256_set_epi64x(
            0x0f0f_0f0f_0f0f_0f0f,
            0x3f3f_3f3f_3f3f_3f3f,
            0x0f0f_0f0f_0f0f_0f0f,
            0x3f3f_3f3f_3f3f_3f3f,
        );
        let high = _mm256_srli_epi16::<2>(_mm256_shuffle_epi8(bytes, high));
        let all = _mm256_or_si256(_mm256_and_si256(low, keep), _mm256_and_si256(high, _mm256_set1_epi8(0x30)));
        let float = |bytes| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
        (float(_mm256_castsi256_si128(all)), float(_mm256_extracti128_si256::<1>(all)))
    }
}

/// Blocks of Q4_K, or of Q5_K with a fifth bit: `BYTES` each. Quants are taken 64 bytes at a time, so that the
/// nibbles of one register belong to groups 0, 1, 4 and 5 of a half, or to 2, 3, 6 and 7: the order of [`Paired`].
#[inline(always)]
unsafe fn k4<const BYTES: usize, const FIFTH: bool, const FINE: bool>(
    row: *const u8,
    x: *const Activation,
    pairs: *const Paired,
    cols: usize,
) -> f32 {
    // SAFETY: the caller's contract; every load lies within a block or the activations.
    unsafe {
        let nibble = _mm512_set1_epi8(15);
        let (mut even, mut odd) = (zero(), zero());
        for b in 0..cols / PACKET {
            let (block, a, pairs) = (row.add(b * BYTES), &*x.add(b), &*pairs.add(b));
            ask_ahead::<BYTES>(block);
            let (scales, mins) = scales_k4(block);
            let header = _mm512_cvtph_ps(_mm256_set1_epi32(block.cast::<i32>().read_unaligned()));
            let (d, dmin) = (_mm512_moveldup_ps(header), _mm512_movehdup_ps(header));
            let scale = _mm512_mul_ps(_mm512_mul_ps(scales, d), _mm512_loadu_ps(a.scale.as_ptr()));
            even = _mm512_fnmadd_ps(_mm512_mul_ps(mins, dmin), _mm512_loadu_ps(a.sum.as_ptr()), even);
            let fifth = match FIFTH {
                true => _mm512_broadcast_i64x4(_mm256_loadu_si256(block.add(16).cast())),
                false => _mm512_setzero_si512(),
            };
            for half in 0..2 {
                let q = _mm512_loadu_si512(block.add(BYTES - 128 + 64 * half).cast());
                let mut lo = _mm512_and_si512(q, nibble);
                let mut hi = _mm512_and_si512(_mm512_srli_epi16::<4>(q), nibble);
                if FIFTH {
                    // Bit 2j of a byte belongs to the low nibbles of 32 bytes j, bit 2j + 1 to the high ones: a half has
                    // j = 2 half in the lower 32 bytes, the next one in the upper.
                    lo = _mm512_mask_add_epi8(lo, fifth_mask(fifth, half, 0), lo, _mm512_set1_epi8(16));
                    hi = _mm512_mask_add_epi8(hi, fifth_mask(fifth, half, 1), hi, _mm512_set1_epi8(16));
                }
                for (i, q) in [lo, hi].into_iter().enumerate() {
                    let at = 128 * half + 64 * i;
                    let sums = products::<FINE>(q, pairs.q.as_ptr().add(at), pairs.rest.as_ptr().add(at));
                    let scale = _mm512_permutexvar_ps(lanes((8 * half + 2 * i) as i32, 2), scale);
                    let acc = if i == 0 { &mut even } else { &mut odd };
                    *acc = _mm512_fmadd_ps(sums, scale, *acc);
                }
            }
        }
        _mm512_reduce_add_ps(_mm512_add_ps(even, odd))
    }
}

/// Which quants of `half` have their fifth bit set: those of the low nibbles (`plane` 0) or of the high ones.
#[inline(always)]
unsafe fn fifth_mask(fifth: __m512i, half: usize, plane: usize) -> __mmask64 {
    let (lower, upper) = (1i8 << (4 * half + plane), (1u8 << (4 * half + 2 + plane)) as i8);
    // SAFETY: the caller vouches for AVX-512 BW.
    unsafe {
        let bits = _mm512_inserti64x4::<1>(_mm512_set1_epi8(lower), _mm256_set1_epi8(upper));
        _mm512_test_epi8_mask(fifth, bits)
    }
}

#[inline(always)]
unsafe fn q6_k<const FINE: bool>(row: *const u8, x: *const Activation, cols: usize) -> f32 {
    // SAFETY: the caller's contract; blocks have 210 bytes.
    unsafe {
        let low = _mm512_set1_epi8(15);
        let two = _mm512_set1_epi8(0x30);
        let (mut even, mut odd) = (zero(), zero());
        for b in 0..cols / PACKET {
            let (block, a) = (row.add(b * 210), &*x.add(b));
            ask_ahead::<210>(block);
            let d = _mm512_cvtph_ps(_mm256_set1_epi16(block.add(208).cast::<i16>().read_unaligned()));
            let scales = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(block.add(192).cast())));
            let scales = _mm512_mul_ps(scales, d);
            let scale = _mm512_mul_ps(scales, _mm512_loadu_ps(a.scale.as_ptr()));
            let mins = _mm512_mul_ps(scales, _mm512_set1_ps(32.0));
            even = _mm512_fnmadd_ps(mins, _mm512_loadu_ps(a.sum.as_ptr()), even);
            for n in 0..2 {
                let ql = _mm512_loadu_si512(block.add(64 * n).cast());
                let qh = _mm256_loadu_si256(block.add(128 + 32 * n).cast());
                let qh = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(qh), _mm256_srli_epi16::<2>(qh));
                // Bits of the first where the mask has ones, of the second elsewhere, cut to six.
                let first =
                    _mm512_ternarylogic_epi32::<0xca>(low, ql, _mm512_and_si512(_mm512_slli_epi16::<4>(qh), two));
                let second =
                    _mm512_ternarylogic_epi32::<0xca>(low, _mm512_srli_epi16::<4>(ql), _mm512_and_si512(qh, two));
                for (i, q) in [first, second].into_iter().enumerate() {
                    let part = 2 * n + i;
                    let sums = products::<FINE>(q, a.q.as_ptr().add(64 * part), a.rest.as_ptr().add(64 * part));
                    let scale = _mm512_permutexvar_ps(lanes(4 * part as i32, 0), scale);
                    let acc = if i == 0 { &mut even } else { &mut odd };
                    *acc = _mm512_fmadd_ps(sums, scale, *acc);
                }
            }
        }
        _mm512_reduce_add_ps(_mm512_add_ps(even, odd))
    }
}

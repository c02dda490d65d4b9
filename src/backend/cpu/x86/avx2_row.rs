//! One row of activations with one of weights, straight from the blocks: what exact rows take with the common types where
//! AVX2 is the largest set. Nothing is staged in memory.

use std::arch::x86_64::*;

use super::super::kernel::{Activation, Dot, REST};
use super::super::unpack::PACKET;
use super::{Avx2, ask_ahead, supers};
use crate::gguf::TensorType;

/// Dot product of a row of `cols` weights with `x`; `None` for types that have no such kernel. `FINE`: with what
/// rounding of the activations left.
///
/// # Safety
/// The machine has AVX2, FMA and F16C; `row` points to a whole row, `x` to as many packets as it
/// spans.
#[inline(always)]
pub(super) unsafe fn row<const FINE: bool>(
    ty: TensorType,
    row: *const u8,
    x: *const Activation,
    cols: usize,
) -> Option<f32> {
    // SAFETY: passed on to the caller.
    unsafe {
        let sums = match ty {
            TensorType::Q4_0 => blocks32::<18, 2, 8, false, FINE>(row, x, cols),
            TensorType::Q4_1 => blocks32::<20, 4, 0, true, FINE>(row, x, cols),
            TensorType::Q8_0 => q8_0::<FINE>(row, x, cols),
            TensorType::Q4_K => k4::<144, false, FINE>(row, x, cols),
            TensorType::Q5_K => k4::<176, true, FINE>(row, x, cols),
            TensorType::Q6_K => q6_k::<FINE>(row, x, cols),
            _ => return supers::row_avx2::<FINE>(ty, row, x, cols),
        };
        Some(Avx2::sum(sums))
    }
}

/// Sums of four products of 8 bits each: lanes 0 to 3 belong to the first 16 elements. Weights are
/// below 128.
#[inline(always)]
unsafe fn dot(q: __m256i, x: __m256i) -> __m256 {
    // SAFETY: the caller vouches for AVX2.
    unsafe { _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_maddubs_epi16(q, x), _mm256_set1_epi16(1))) }
}

/// Sums of products of 32 weights with elements `32j..32j + 32` of an activation.
#[inline(always)]
pub(super) unsafe fn products<const FINE: bool>(q: __m256i, a: &Activation, j: usize) -> __m256 {
    // SAFETY: j is below 8; the caller vouches for AVX2 and FMA.
    unsafe {
        let sums = dot(q, quants(&a.q, j));
        if FINE { _mm256_fmadd_ps(dot(q, quants(&a.rest, j)), _mm256_set1_ps(REST), sums) } else { sums }
    }
}

/// The same of magnitudes and a -1 or 1 for each: the activations take the signs.
#[inline(always)]
pub(super) unsafe fn signed_products<const FINE: bool>(q: __m256i, signs: __m256i, a: &Activation, j: usize) -> __m256 {
    // SAFETY: j is below 8; the caller vouches for AVX2 and FMA.
    unsafe {
        let sums = dot(q, _mm256_sign_epi8(quants(&a.q, j), signs));
        if FINE {
            let rest = dot(q, _mm256_sign_epi8(quants(&a.rest, j), signs));
            _mm256_fmadd_ps(rest, _mm256_set1_ps(REST), sums)
        } else {
            sums
        }
    }
}

/// Elements `32j..32j + 32` of a packet.
#[inline(always)]
unsafe fn quants(of: &[i8; PACKET], j: usize) -> __m256i {
    // SAFETY: j is below 8; packets are aligned; the caller vouches for AVX.
    unsafe { _mm256_load_si256(of.as_ptr().add(32 * j).cast()) }
}

/// Entries 2j and 2j + 1 of 16 in the lanes of their elements.
#[inline(always)]
pub(super) unsafe fn pair(of: &[f32; 16], j: usize) -> __m256 {
    // SAFETY: j is below 8; the caller vouches for AVX2.
    unsafe {
        let two = _mm_castsi128_ps(_mm_loadl_epi64(of.as_ptr().add(2 * j).cast()));
        _mm256_permutevar8x32_ps(_mm256_castps128_ps256(two), _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0))
    }
}

/// A half-precision field, broadcast.
#[inline(always)]
unsafe fn half(at: *const u8) -> __m256 {
    // SAFETY: the caller gives 2 readable bytes and vouches for F16C.
    unsafe { _mm256_cvtph_ps(_mm_set1_epi16(at.cast::<i16>().read_unaligned())) }
}

/// Blocks of 32 with 4 bits: `BYTES` each, quants from `QS`, offset by `BIAS` or with a min.
#[inline(always)]
unsafe fn blocks32<const BYTES: usize, const QS: usize, const BIAS: i8, const MIN: bool, const FINE: bool>(
    row: *const u8,
    x: *const Activation,
    cols: usize,
) -> __m256 {
    // SAFETY: the caller's contract; every load lies within a block or an activation.
    unsafe {
        let low = _mm_set1_epi8(15);
        let mut acc = _mm256_setzero_ps();
        let mut offset = _mm_setzero_ps();
        for b in 0..cols / 32 {
            let (block, a, j) = (row.add(b * BYTES), &*x.add(b / 8), b % 8);
            ask_ahead::<1>(block);
            let q = _mm_loadu_si128(block.add(QS).cast());
            let q = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16::<4>(q), low), _mm_and_si128(q, low));
            acc = _mm256_fmadd_ps(products::<FINE>(q, a, j), _mm256_mul_ps(pair(&a.scale, j), half(block)), acc);
            let of = _mm256_castps256_ps128(half(block.add(if MIN { 2 } else { 0 })));
            // Two sums; the lanes above them are zero.
            let totals = _mm_castsi128_ps(_mm_loadl_epi64(a.sum.as_ptr().add(2 * j).cast()));
            offset = _mm_fmadd_ps(of, totals, offset);
        }
        if !MIN {
            offset = _mm_mul_ps(offset, _mm_set1_ps(-f32::from(BIAS)));
        }
        _mm256_add_ps(acc, _mm256_zextps128_ps256(offset))
    }
}

#[inline(always)]
unsafe fn q8_0<const FINE: bool>(row: *const u8, x: *const Activation, cols: usize) -> __m256 {
    // SAFETY: the caller's contract; blocks have 34 bytes.
    unsafe {
        let mut acc = _mm256_setzero_ps();
        for b in 0..cols / 32 {
            let (block, a, j) = (row.add(b * 34), &*x.add(b / 8), b % 8);
            ask_ahead::<1>(block);
            let q = _mm256_loadu_si256(block.add(2).cast());
            let signed = |of| dot(_mm256_abs_epi8(q), _mm256_sign_epi8(quants(of, j), q));
            let mut sums = signed(&a.q);
            if FINE {
                sums = _mm256_fmadd_ps(signed(&a.rest), _mm256_set1_ps(REST), sums);
            }
            acc = _mm256_fmadd_ps(sums, _mm256_mul_ps(pair(&a.scale, j), half(block)), acc);
        }
        acc
    }
}

/// `acc` less mins times sums.
#[inline(always)]
pub(super) unsafe fn less_mins(mins: [__m256; 2], a: &Activation, acc: __m256) -> __m256 {
    // SAFETY: the caller vouches for AVX and FMA.
    unsafe {
        let acc = _mm256_fnmadd_ps(mins[0], _mm256_load_ps(a.sum.as_ptr()), acc);
        _mm256_fnmadd_ps(mins[1], _mm256_load_ps(a.sum.as_ptr().add(8)), acc)
    }
}

/// Scale of each 16: the weights' times the activation's.
#[inline(always)]
pub(super) unsafe fn scaled(scales: [__m256; 2], a: &Activation) -> Scales {
    let mut out = Scales([0.0; 16]);
    for (h, scales) in scales.into_iter().enumerate() {
        // SAFETY: both sides have 16 floats; the caller vouches for AVX.
        unsafe {
            let product = _mm256_mul_ps(scales, _mm256_load_ps(a.scale.as_ptr().add(8 * h)));
            _mm256_storeu_ps(out.0.as_mut_ptr().add(8 * h), product);
        }
    }
    out
}

/// Scales of a packet.
pub(super) struct Scales(pub(super) [f32; 16]);

/// Eight bytes as 16 floats, each twice, times `d`.
#[inline(always)]
unsafe fn twice(bytes: u64, d: __m256) -> [__m256; 2] {
    // SAFETY: the caller vouches for AVX2.
    unsafe {
        let bytes = _mm_cvtsi64_si128(bytes as i64);
        let bytes = _mm_unpacklo_epi8(bytes, bytes);
        let float = |bytes| _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), d);
        [float(bytes), float(_mm_unpackhi_epi64(bytes, bytes))]
    }
}

/// Q4_K, and Q5_K with a `FIFTH` bit: blocks of `BYTES`.
#[inline(always)]
unsafe fn k4<const BYTES: usize, const FIFTH: bool, const FINE: bool>(
    row: *const u8,
    x: *const Activation,
    cols: usize,
) -> __m256 {
    // SAFETY: the caller's contract; every load lies within a block or an activation.
    unsafe {
        let low = _mm256_set1_epi8(15);
        let mut acc = _mm256_setzero_ps();
        for b in 0..cols / PACKET {
            let (block, a) = (row.add(b * BYTES), &*x.add(b));
            ask_ahead::<BYTES>(block);
            let word = |at: usize| u64::from(block.add(at).cast::<u32>().read_unaligned());
            let (s, m, h) = (word(4), word(8), word(12));
            let scales = (s & 0x3f3f_3f3f) | ((h & 0x0f0f_0f0f) | (s >> 6 & 0x0303_0303) << 4) << 32;
            let mins = (m & 0x3f3f_3f3f) | ((h >> 4 & 0x0f0f_0f0f) | (m >> 6 & 0x0303_0303) << 4) << 32;
            let scale = scaled(twice(scales, half(block)), a);
            acc = less_mins(twice(mins, half(block.add(2))), a, acc);
            let fifths = _mm256_loadu_si256(block.add(16).cast());
            // Bit j of a byte belongs to the 32 elements j.
            let mut bit = _mm256_set1_epi8(1);
            for i in 0..4 {
                let q = _mm256_loadu_si256(block.add(BYTES - 128 + 32 * i).cast());
                let both = [_mm256_and_si256(q, low), _mm256_and_si256(_mm256_srli_epi16::<4>(q), low)];
                for (h, mut q) in both.into_iter().enumerate() {
                    if FIFTH {
                        let set = _mm256_cmpeq_epi8(_mm256_and_si256(fifths, bit), bit);
                        q = _mm256_or_si256(q, _mm256_and_si256(set, _mm256_set1_epi8(16)));
                        bit = _mm256_add_epi8(bit, bit);
                    }
                    let j = 2 * i + h;
                    acc = _mm256_fmadd_ps(products::<FINE>(q, a, j), pair(&scale.0, j), acc);
                }
            }
        }
        acc
    }
}

#[inline(always)]
unsafe fn q6_k<const FINE: bool>(row: *const u8, x: *const Activation, cols: usize) -> __m256 {
    // SAFETY: the caller's contract; blocks have 210 bytes.
    unsafe {
        let low = _mm256_set1_epi8(15);
        let two = _mm256_set1_epi8(0x30);
        let mut acc = _mm256_setzero_ps();
        for b in 0..cols / PACKET {
            let (block, a) = (row.add(b * 210), &*x.add(b));
            ask_ahead::<210>(block);
            let d = half(block.add(208));
            let eight = |h: usize| {
                let bytes = _mm_loadl_epi64(block.add(192 + 8 * h).cast());
                _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), d)
            };
            let scales = [eight(0), eight(1)];
            let bias = _mm256_set1_ps(32.0);
            acc = less_mins([_mm256_mul_ps(scales[0], bias), _mm256_mul_ps(scales[1], bias)], a, acc);
            let scale = scaled(scales, a);
            for n in 0..2 {
                let qh = _mm256_loadu_si256(block.add(128 + 32 * n).cast());
                let high = [_mm256_slli_epi16::<4>(qh), _mm256_slli_epi16::<2>(qh), qh, _mm256_srli_epi16::<2>(qh)];
                for (i, high) in high.into_iter().enumerate() {
                    let ql = _mm256_loadu_si256(block.add(64 * n + 32 * (i % 2)).cast());
                    let ql = if i < 2 { ql } else { _mm256_srli_epi16::<4>(ql) };
                    let q = _mm256_or_si256(_mm256_and_si256(ql, low), _mm256_and_si256(high, two));
                    let j = 4 * n + i;
                    acc = _mm256_fmadd_ps(products::<FINE>(q, a, j), pair(&scale.0, j), acc);
                }
            }
        }
        acc
    }
}

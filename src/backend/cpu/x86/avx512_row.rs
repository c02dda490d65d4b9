//! One token with one row, straight from the blocks: what decode does with the common types where
//! AVX-512 VNNI is there. Nothing is staged in memory.

use std::arch::x86_64::*;

use super::super::kernel::Activation;
use super::super::unpack::PACKET;
use crate::gguf::TensorType;

/// Dot product of a row of `cols` weights with `x`; `None` for types that have no such kernel.
///
/// # Safety
/// The machine has AVX-512 F, BW, DQ, VL and VNNI; `row` points to a whole row, `x` to as many
/// packets as it spans.
#[inline(always)]
pub(super) unsafe fn row(ty: TensorType, row: *const u8, x: *const Activation, cols: usize) -> Option<f32> {
    // SAFETY: passed on to the caller.
    unsafe {
        Some(match ty {
            TensorType::Q4_0 => blocks32::<18, 2, 8, false>(row, x, cols),
            TensorType::Q4_1 => blocks32::<20, 4, 0, true>(row, x, cols),
            TensorType::Q8_0 => blocks32::<34, 2, 128, false>(row, x, cols),
            TensorType::Q4_K => q4_k(row, x, cols),
            TensorType::Q5_K => q5_k(row, x, cols),
            TensorType::Q6_K => q6_k(row, x, cols),
            _ => return None,
        })
    }
}

/// Blocks of 32: `BYTES` each, quants (4 or 8 bits) from `QS`, offset by `BIAS` or with a min.
#[inline(always)]
unsafe fn blocks32<const BYTES: usize, const QS: usize, const BIAS: i32, const MIN: bool>(
    row: *const u8,
    x: *const Activation,
    cols: usize,
) -> f32 {
    // SAFETY: the caller's contract; every load lies within a block or an activation.
    unsafe {
        let pair = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
        let low = _mm_set1_epi8(15);
        let flip = _mm256_set1_epi8(-128);
        let mut acc = _mm256_setzero_ps();
        let mut offset = _mm_setzero_ps();
        for b in 0..cols / 32 {
            let block = row.add(b * BYTES);
            let a = &*x.add(b / 8);
            let j = b % 8;
            let q = if BIAS == 128 {
                _mm256_xor_si256(_mm256_loadu_si256(block.add(QS).cast()), flip)
            } else {
                let q = _mm_loadu_si128(block.add(QS).cast());
                _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16::<4>(q), low), _mm_and_si128(q, low))
            };
            let xq = _mm256_loadu_si256(a.q.as_ptr().add(32 * j).cast());
            let sums = _mm256_cvtepi32_ps(_mm256_dpbusd_epi32(_mm256_setzero_si256(), q, xq));
            let scales = _mm_castsi128_ps(_mm_loadl_epi64(a.scale.as_ptr().add(2 * j).cast()));
            let totals = _mm_castsi128_ps(_mm_loadl_epi64(a.sum.as_ptr().add(2 * j).cast()));
            let header = if MIN {
                block.cast::<i32>().read_unaligned()
            } else {
                i32::from(block.cast::<u16>().read_unaligned())
            };
            let d = _mm_cvtph_ps(_mm_cvtsi32_si128(header));
            let scale = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(scales), pair);
            acc = _mm256_fmadd_ps(sums, _mm256_mul_ps(scale, _mm256_broadcastss_ps(d)), acc);
            let of = if MIN { _mm_broadcastss_ps(_mm_movehdup_ps(d)) } else { _mm_broadcastss_ps(d) };
            offset = _mm_fmadd_ps(of, totals, offset);
        }
        if !MIN {
            offset = _mm_mul_ps(offset, _mm_set1_ps(-BIAS as f32));
        }
        let half = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps::<1>(acc));
        let all = _mm_add_ps(half, offset);
        let two = _mm_add_ps(all, _mm_movehl_ps(all, all));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

/// Which of 16 scales each lane of the quarter `i` of a packet takes.
#[inline(always)]
unsafe fn lanes(i: i32) -> __m512i {
    // SAFETY: the caller vouches for AVX-512.
    unsafe {
        _mm512_add_epi32(_mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0), _mm512_set1_epi32(4 * i))
    }
}

/// Adds the products of quarter `i` with its scales.
#[inline(always)]
unsafe fn quarter(q: __m512i, a: &Activation, i: usize, scale: __m512, acc: __m512) -> __m512 {
    // SAFETY: the caller vouches for AVX-512 VNNI; the load lies within `a.q`.
    unsafe {
        let x = _mm512_loadu_si512(a.q.as_ptr().add(64 * i).cast());
        let sums = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), q, x));
        _mm512_fmadd_ps(sums, _mm512_permutexvar_ps(lanes(i as i32), scale), acc)
    }
}

/// Eight 6-bit scales and mins from 12 bytes, as floats of 16 lanes (each twice).
#[inline(always)]
unsafe fn scales_k4(s: *const u8) -> (__m512, __m512) {
    // SAFETY: the caller gives 12 readable bytes and vouches for AVX-512.
    unsafe {
        let word = |i: usize| u64::from(s.cast::<u32>().add(i).read_unaligned());
        let (a, b, c) = (word(0), word(1), word(2));
        let scales = (a & 0x3f3f_3f3f) | ((c & 0x0f0f_0f0f) | (a >> 6 & 0x0303_0303) << 4) << 32;
        let mins = (b & 0x3f3f_3f3f) | ((c >> 4 & 0x0f0f_0f0f) | (b >> 6 & 0x0303_0303) << 4) << 32;
        let twice = _mm_set_epi8(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
        let float = |bytes: u64| {
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(_mm_cvtsi64_si128(bytes as i64), twice)))
        };
        (float(scales), float(mins))
    }
}

/// The two half-precision fields at the head of a block, broadcast.
#[inline(always)]
unsafe fn header(block: *const u8) -> (__m512, __m512) {
    // SAFETY: the caller gives 4 readable bytes and vouches for AVX-512.
    unsafe {
        let h = _mm_cvtph_ps(_mm_cvtsi32_si128(block.cast::<i32>().read_unaligned()));
        (_mm512_broadcastss_ps(h), _mm512_broadcastss_ps(_mm_movehdup_ps(h)))
    }
}

/// Scale of each 16 (weights' times activations'), and the accumulator less the mins.
#[inline(always)]
unsafe fn begin_k4(block: *const u8, a: &Activation, acc: __m512) -> (__m512, __m512) {
    // SAFETY: as for the parts.
    unsafe {
        let (d, dmin) = header(block);
        let (scales, mins) = scales_k4(block.add(4));
        let scale = _mm512_mul_ps(_mm512_mul_ps(scales, d), _mm512_loadu_ps(a.scale.as_ptr()));
        let acc = _mm512_fnmadd_ps(_mm512_mul_ps(mins, dmin), _mm512_loadu_ps(a.sum.as_ptr()), acc);
        (scale, acc)
    }
}

#[inline(always)]
unsafe fn q4_k(row: *const u8, x: *const Activation, cols: usize) -> f32 {
    // SAFETY: the caller's contract; blocks have 144 bytes.
    unsafe {
        let low = _mm256_set1_epi8(15);
        let mut acc = _mm512_setzero_ps();
        for b in 0..cols / PACKET {
            let (block, a) = (row.add(b * 144), &*x.add(b));
            let (scale, begun) = begin_k4(block, a, acc);
            acc = begun;
            for i in 0..4 {
                let q = _mm256_loadu_si256(block.add(16 + 32 * i).cast());
                let both = _mm512_inserti64x4::<1>(
                    _mm512_castsi256_si512(_mm256_and_si256(q, low)),
                    _mm256_and_si256(_mm256_srli_epi16::<4>(q), low),
                );
                acc = quarter(both, a, i, scale, acc);
            }
        }
        _mm512_reduce_add_ps(acc)
    }
}

#[inline(always)]
unsafe fn q5_k(row: *const u8, x: *const Activation, cols: usize) -> f32 {
    // SAFETY: the caller's contract; blocks have 176 bytes.
    unsafe {
        let low = _mm256_set1_epi8(15);
        let fifth = _mm512_set1_epi8(16);
        let mut acc = _mm512_setzero_ps();
        for b in 0..cols / PACKET {
            let (block, a) = (row.add(b * 176), &*x.add(b));
            let (scale, begun) = begin_k4(block, a, acc);
            acc = begun;
            let high = _mm256_loadu_si256(block.add(16).cast());
            // Bit 2i of a byte belongs to the low nibble of quarter i, bit 2i + 1 to the high one.
            let mut bits = _mm512_inserti64x4::<1>(
                _mm512_castsi256_si512(_mm256_slli_epi16::<4>(high)),
                _mm256_slli_epi16::<3>(high),
            );
            let mut shifted = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(high), _mm256_srli_epi16::<1>(high));
            for i in 0..4 {
                let q = _mm256_loadu_si256(block.add(48 + 32 * i).cast());
                let both = _mm512_inserti64x4::<1>(
                    _mm512_castsi256_si512(_mm256_and_si256(q, low)),
                    _mm256_and_si256(_mm256_srli_epi16::<4>(q), low),
                );
                acc = quarter(_mm512_or_si512(both, _mm512_and_si512(bits, fifth)), a, i, scale, acc);
                shifted = _mm512_srli_epi16::<2>(shifted);
                bits = _mm512_slli_epi16::<4>(shifted);
            }
        }
        _mm512_reduce_add_ps(acc)
    }
}

#[inline(always)]
unsafe fn q6_k(row: *const u8, x: *const Activation, cols: usize) -> f32 {
    // SAFETY: the caller's contract; blocks have 210 bytes.
    unsafe {
        let low = _mm512_set1_epi8(15);
        let two = _mm512_set1_epi8(0x30);
        let mut acc = _mm512_setzero_ps();
        for b in 0..cols / PACKET {
            let (block, a) = (row.add(b * 210), &*x.add(b));
            let d = _mm512_cvtph_ps(_mm256_set1_epi16(block.add(208).cast::<i16>().read_unaligned()));
            let scales = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(block.add(192).cast())));
            let scales = _mm512_mul_ps(scales, d);
            let scale = _mm512_mul_ps(scales, _mm512_loadu_ps(a.scale.as_ptr()));
            let mins = _mm512_mul_ps(scales, _mm512_set1_ps(32.0));
            acc = _mm512_fnmadd_ps(mins, _mm512_loadu_ps(a.sum.as_ptr()), acc);
            for n in 0..2 {
                let ql = _mm512_loadu_si512(block.add(64 * n).cast());
                let qh = _mm256_loadu_si256(block.add(128 + 32 * n).cast());
                let qh = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(qh), _mm256_srli_epi16::<2>(qh));
                let first =
                    _mm512_or_si512(_mm512_and_si512(ql, low), _mm512_and_si512(_mm512_slli_epi16::<4>(qh), two));
                let second =
                    _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16::<4>(ql), low), _mm512_and_si512(qh, two));
                acc = quarter(first, a, 2 * n, scale, acc);
                acc = quarter(second, a, 2 * n + 1, scale, acc);
            }
        }
        _mm512_reduce_add_ps(acc)
    }
}

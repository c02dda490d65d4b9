//! What AVX-512 VNNI does in its own way: one token with one row straight from the blocks, for the
//! common types (decode; nothing is staged in memory), and panels with several tokens (prefill).

use std::arch::x86_64::*;

use super::kernel::{Activation, REST};
use super::panel::{Panel, ROWS};
use super::unpack::{PACKET, Packet, SUB, SUBS};
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

/// Products of a panel with `T` tokens; see [`Dot::panel`](super::kernel::Dot::panel). A lane is a
/// row: four bytes of each of 16 rows meet four bytes of a token.
///
/// # Safety
/// The machine has AVX-512 VNNI; each address of `x` has as many packets as `w`.
#[inline(always)]
pub(super) unsafe fn panel<const T: usize, const FINE: bool, const PAIR: bool>(
    w: &[Panel],
    x: [*const Activation; T],
    groups: usize,
) -> [[f32; ROWS]; T] {
    // SAFETY: the caller's contract; every load lies within a panel or an activation.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); T];
        for (i, w) in w.iter().enumerate() {
            let groups = (groups - i * SUBS).min(SUBS);
            let step = if PAIR { 2 } else { 1 };
            for g in (0..groups).step_by(step) {
                let (scale, min) = (_mm512_load_ps(w.scale[g].as_ptr()), _mm512_load_ps(w.min[g].as_ptr()));
                let first = group::<T, FINE>(w, &x, i, g);
                if PAIR {
                    let second = group::<T, FINE>(w, &x, i, g + 1);
                    for t in 0..T {
                        let a = &*x[t].add(i);
                        let sum = _mm512_mul_ps(first[t], _mm512_set1_ps(a.scale[g]));
                        let sum = _mm512_fmadd_ps(second[t], _mm512_set1_ps(a.scale[g + 1]), sum);
                        acc[t] = _mm512_fmadd_ps(sum, scale, acc[t]);
                        acc[t] = _mm512_fnmadd_ps(min, _mm512_set1_ps(a.sum[g] + a.sum[g + 1]), acc[t]);
                    }
                } else {
                    for t in 0..T {
                        let a = &*x[t].add(i);
                        let scale = _mm512_mul_ps(scale, _mm512_set1_ps(a.scale[g]));
                        acc[t] = _mm512_fmadd_ps(first[t], scale, acc[t]);
                        acc[t] = _mm512_fnmadd_ps(min, _mm512_set1_ps(a.sum[g]), acc[t]);
                    }
                }
            }
        }
        acc.map(|acc| std::mem::transmute::<__m512, [f32; ROWS]>(acc))
    }
}

/// Sums of 16 products of each row with packet `i` of each token, before scales.
#[inline(always)]
unsafe fn group<const T: usize, const FINE: bool>(
    w: &Panel,
    x: &[*const Activation; T],
    i: usize,
    g: usize,
) -> [__m512; T] {
    // SAFETY: as for `panel`.
    unsafe {
        let (mut sums, mut rests) = ([_mm512_setzero_si512(); T], [_mm512_setzero_si512(); T]);
        for k in 0..SUB / 4 {
            let q = _mm512_load_si512(w.q.as_ptr().add((SUB * g + 4 * k) * ROWS).cast());
            for t in 0..T {
                let a = &*x[t].add(i);
                let four = |q: &[i8; PACKET]| _mm512_set1_epi32(q.as_ptr().add(SUB * g + 4 * k).cast::<i32>().read());
                sums[t] = _mm512_dpbusd_epi32(sums[t], q, four(&a.q));
                if FINE {
                    rests[t] = _mm512_dpbusd_epi32(rests[t], q, four(&a.rest));
                }
            }
        }
        let mut out = [_mm512_setzero_ps(); T];
        for t in 0..T {
            out[t] = _mm512_cvtepi32_ps(sums[t]);
            if FINE {
                out[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(rests[t]), _mm512_set1_ps(REST), out[t]);
            }
        }
        out
    }
}

/// Brings the packets of 16 rows into the order of a panel: both are six squares of 16 words.
///
/// # Safety
/// The machine has AVX-512 F.
#[inline(always)]
pub(super) unsafe fn interleave(rows: &[Packet; ROWS], to: &mut Panel) {
    const WORDS: usize = size_of::<Packet>() / 4;
    let (from, to): (*const i32, *mut i32) = (rows.as_ptr().cast(), std::ptr::from_mut(to).cast());
    for square in 0..WORDS / 16 {
        // SAFETY: six squares of 16 words by 16 rows make up either side.
        unsafe { transpose(from.add(16 * square), WORDS, to.add(256 * square)) };
    }
}

/// Transposes 16 by 16 words; rows are `stride` apart at `from` and back to back at `to`.
#[inline(always)]
unsafe fn transpose(from: *const i32, stride: usize, to: *mut i32) {
    // SAFETY: the caller gives 16 readable rows and 256 writable words, 64-byte aligned.
    unsafe {
        let mut a = [_mm512_setzero_si512(); 16];
        let mut b = a;
        for (r, a) in a.iter_mut().enumerate() {
            *a = _mm512_load_si512(from.add(stride * r).cast());
        }
        for r in 0..8 {
            b[2 * r] = _mm512_unpacklo_epi32(a[2 * r], a[2 * r + 1]);
            b[2 * r + 1] = _mm512_unpackhi_epi32(a[2 * r], a[2 * r + 1]);
        }
        // Now a[4 * r + c] holds word c of every four words of rows 4r to 4r + 3.
        for r in 0..4 {
            for h in 0..2 {
                a[4 * r + 2 * h] = _mm512_unpacklo_epi64(b[4 * r + h], b[4 * r + 2 + h]);
                a[4 * r + 2 * h + 1] = _mm512_unpackhi_epi64(b[4 * r + h], b[4 * r + 2 + h]);
            }
        }
        for c in 0..4 {
            let even = |a, b| _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
            let odd = |a, b| _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
            let (first, second) = ((a[c], a[4 + c]), (a[8 + c], a[12 + c]));
            let (e, f) = (even(first.0, first.1), even(second.0, second.1));
            let (g, h) = (odd(first.0, first.1), odd(second.0, second.1));
            for (column, v) in [(c, even(e, f)), (8 + c, odd(e, f)), (4 + c, even(g, h)), (12 + c, odd(g, h))] {
                _mm512_store_si512(to.add(16 * column).cast(), v);
            }
        }
    }
}

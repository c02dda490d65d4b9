//! Panels with several tokens on AVX2: a panel's 16 rows as two halves of 8.

use std::arch::x86_64::*;

use super::super::kernel::{Activation, REST};
use super::super::panel::{Panel, ROWS};
use super::super::unpack::{PACKET, Packet, SUB, SUBS};

/// Steps of four elements in a group.
const STEPS: usize = SUB / 4;

/// Products of a panel with `T` tokens; see [`Dot::panel`](super::Dot::panel).
///
/// # Safety
/// The machine has AVX2 and FMA; each address of `x` has as many packets as `w`.
#[inline(always)]
pub(super) unsafe fn panel<const T: usize, const WIDE: bool, const FINE: bool, const PAIR: bool>(
    w: &[Panel],
    x: [*const Activation; T],
    groups: usize,
) -> [[f32; ROWS]; T] {
    let mut out = [[0.0; ROWS]; T];
    for half in 0..2 {
        // SAFETY: the caller's contract; a half of an output is 8 floats.
        unsafe {
            let sums = half_panel::<T, WIDE, FINE, PAIR>(w, &x, groups, half);
            for (out, sums) in out.iter_mut().zip(sums) {
                _mm256_storeu_ps(out.as_mut_ptr().add(8 * half), sums);
            }
        }
    }
    out
}

#[inline(always)]
unsafe fn half_panel<const T: usize, const WIDE: bool, const FINE: bool, const PAIR: bool>(
    w: &[Panel],
    x: &[*const Activation; T],
    groups: usize,
    half: usize,
) -> [__m256; T] {
    // SAFETY: the caller's contract; every load lies within a panel or an activation.
    unsafe {
        let mut acc = [_mm256_setzero_ps(); T];
        for (i, w) in w.iter().enumerate() {
            for g in 0..(groups - i * SUBS).min(SUBS) {
                let q = quants(w, g, half);
                let scale = _mm256_load_ps(w.scale[g].as_ptr().add(8 * half));
                let min = _mm256_load_ps(w.min[g].as_ptr().add(8 * half));
                for t in 0..T {
                    let a = &*x[t].add(i);
                    let mut sums = dot::<WIDE, PAIR>(&q, &a.q, g);
                    if FINE {
                        sums = _mm256_fmadd_ps(dot::<WIDE, PAIR>(&q, &a.rest, g), _mm256_set1_ps(REST), sums);
                    }
                    acc[t] = _mm256_fmadd_ps(sums, _mm256_mul_ps(scale, _mm256_set1_ps(a.scale[g])), acc[t]);
                    // Signed weights have no min; that of a pair counts once.
                    if !WIDE && PAIR && g % 2 == 0 {
                        acc[t] = _mm256_fnmadd_ps(min, _mm256_set1_ps(a.sum[g] + a.sum[g + 1]), acc[t]);
                    } else if !WIDE && !PAIR {
                        acc[t] = _mm256_fnmadd_ps(min, _mm256_set1_ps(a.sum[g]), acc[t]);
                    }
                }
            }
        }
        acc
    }
}

/// Group `g` of the rows of a half.
#[inline(always)]
unsafe fn quants(w: &Panel, g: usize, half: usize) -> [__m256i; STEPS] {
    // SAFETY: the loads lie within `w.q`; the caller vouches for AVX2.
    unsafe {
        let first = w.q.as_ptr().add(SUB * g * ROWS + 32 * half);
        let mut q = [_mm256_setzero_si256(); STEPS];
        for (k, q) in q.iter_mut().enumerate() {
            *q = _mm256_load_si256(first.add(4 * ROWS * k).cast());
        }
        q
    }
}

/// Sums of 16 products for each row. Without `WIDE` weights are below 64, and below 32 if `PAIR`:
/// so many products of 8 bits fit a sum of 16 bits.
#[inline(always)]
unsafe fn dot<const WIDE: bool, const PAIR: bool>(q: &[__m256i; STEPS], x: &[i8; PACKET], g: usize) -> __m256 {
    // SAFETY: the loads lie within `x`; the caller vouches for AVX2.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        let pairs = |k: usize| {
            let four = _mm256_set1_epi32(x.as_ptr().add(SUB * g + 4 * k).cast::<i32>().read());
            if WIDE {
                let s = _mm256_xor_si256(q[k], _mm256_set1_epi8(-128));
                _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(four, s))
            } else {
                _mm256_maddubs_epi16(q[k], four)
            }
        };
        let wide = |pairs| _mm256_madd_epi16(pairs, ones);
        let sums = if WIDE {
            let (a, b) =
                (_mm256_add_epi32(wide(pairs(0)), wide(pairs(1))), _mm256_add_epi32(wide(pairs(2)), wide(pairs(3))));
            _mm256_add_epi32(a, b)
        } else {
            let (a, b) = (_mm256_add_epi16(pairs(0), pairs(1)), _mm256_add_epi16(pairs(2), pairs(3)));
            if PAIR { wide(_mm256_add_epi16(a, b)) } else { _mm256_add_epi32(wide(a), wide(b)) }
        };
        _mm256_cvtepi32_ps(sums)
    }
}

/// Brings the packets of 16 rows into the order of a panel: both are six squares of 16 words.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
pub(super) unsafe fn interleave(rows: &[Packet; ROWS], to: &mut Panel) {
    const WORDS: usize = size_of::<Packet>() / 4;
    let (from, to): (*const f32, *mut f32) = (rows.as_ptr().cast(), std::ptr::from_mut(to).cast());
    for square in 0..WORDS / 16 {
        for (r, c) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
            // SAFETY: six squares of 16 words by 16 rows make up either side.
            unsafe { transpose(from.add(16 * square + WORDS * r + c), WORDS, to.add(256 * square + ROWS * c + r)) };
        }
    }
}

/// Transposes 8 by 8 words; rows are `stride` words apart at `from` and [`ROWS`] at `to`.
#[inline(always)]
unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32) {
    // SAFETY: the caller gives 8 readable and 8 writable rows of 8 words and vouches for AVX2.
    unsafe {
        let mut a = [_mm256_setzero_ps(); 8];
        let mut b = a;
        for (r, a) in a.iter_mut().enumerate() {
            *a = _mm256_loadu_ps(from.add(stride * r));
        }
        for r in 0..4 {
            b[2 * r] = _mm256_unpacklo_ps(a[2 * r], a[2 * r + 1]);
            b[2 * r + 1] = _mm256_unpackhi_ps(a[2 * r], a[2 * r + 1]);
        }
        // Now a[4 * r + c] holds words c and 4 + c of rows 4r to 4r + 3.
        for r in 0..2 {
            for h in 0..2 {
                let (x, y) = (b[4 * r + h], b[4 * r + 2 + h]);
                a[4 * r + 2 * h] = _mm256_shuffle_ps::<0b01_00_01_00>(x, y);
                a[4 * r + 2 * h + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(x, y);
            }
        }
        for c in 0..4 {
            _mm256_storeu_ps(to.add(ROWS * c), _mm256_permute2f128_ps::<0x20>(a[c], a[4 + c]));
            _mm256_storeu_ps(to.add(ROWS * (4 + c)), _mm256_permute2f128_ps::<0x31>(a[c], a[4 + c]));
        }
    }
}

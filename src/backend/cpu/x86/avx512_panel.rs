//! Panels with several tokens on AVX-512 VNNI: what prefill does with all quantised types.

use std::arch::x86_64::*;

use super::super::attention::BLOCK;
use super::super::kernel::{Activation, REST};
use super::super::panel::{Panel, ROWS};
use super::super::unpack::{PACKET, Packet, SUB, SUBS};

/// Products of a panel with `T` tokens; see [`Dot::panel`](super::Dot::panel). A lane is a
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

/// Brings a block of keys to the order `[dimension][position]`; see [`Dot::turn`](super::Dot::turn).
///
/// # Safety
/// The machine has AVX-512 F.
#[inline(always)]
pub(super) unsafe fn turn(keys: &[f32], hd: usize, to: &mut [f32]) {
    let whole = hd / 16 * 16;
    assert!(keys.len() >= BLOCK * hd && to.len() >= BLOCK * hd, "a block of heads of {hd}");
    let mut square = Square([0; 256]);
    for first in (0..BLOCK).step_by(16) {
        for d in (0..whole).step_by(16) {
            // SAFETY: 16 rows of 16 words each lie in the keys.
            unsafe { transpose(keys.as_ptr().add(first * hd + d).cast(), hd, square.0.as_mut_ptr()) };
            for (i, row) in bytemuck::cast_slice::<i32, f32>(&square.0).as_chunks::<16>().0.iter().enumerate() {
                to[(d + i) * BLOCK + first..][..16].copy_from_slice(row);
            }
        }
    }
    for d in whole..hd {
        to[d * BLOCK..][..BLOCK].iter_mut().zip(keys.chunks_exact(hd)).for_each(|(to, key)| *to = key[d]);
    }
}

#[repr(C, align(64))]
struct Square([i32; 256]);

/// Transposes 16 by 16 words; rows are `stride` apart at `from` and back to back at `to`.
///
/// # Safety
/// The machine has AVX-512 F; 16 rows can be read, and 256 words written, aligned to 64 bytes.
#[inline(always)]
pub(super) unsafe fn transpose(from: *const i32, stride: usize, to: *mut i32) {
    // SAFETY: the caller gives 16 readable rows and 256 writable words, 64-byte aligned.
    unsafe {
        let mut a = [_mm512_setzero_si512(); 16];
        let mut b = a;
        for (r, a) in a.iter_mut().enumerate() {
            *a = _mm512_loadu_si512(from.add(stride * r).cast());
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

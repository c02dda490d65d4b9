//! What the instruction sets of x86-64 do in their own way: products of packets here, products of
//! rows (decode) and of panels (prefill) in a file each.

pub(super) mod amx;
mod avx2_panel;
mod avx2_row;
mod avx512_nibbles;
mod avx512_panel;
mod avx512_row;
mod supers;

use std::arch::x86_64::*;

use super::isa::Isa;
use super::kernel::{Activation, Dot, Paired, REST, ROUND};
use super::panel::{Panel, ROWS};
use super::unpack::{Packet, f16};
use crate::gguf::TensorType;

/// How far ahead of the block at hand weights are asked for, in bytes. Rows lie back to back, so this reaches the next
/// ones. Processors' own prefetchers stop at a page: with this, 16 threads read 127 GB/s where they read 89. Asking
/// the second-level cache alone wins nothing in whole models, and loses 5 % where the model is small.
const AHEAD: usize = 4096;

/// Asks for the `BYTES` bytes that will be needed when those at `at` are done.
#[inline(always)]
fn ask_ahead<const BYTES: usize>(at: *const u8) {
    for line in (0..BYTES).step_by(64) {
        // SAFETY: a hint, which may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD + line).cast()) };
    }
}

/// Asks for the first bytes of a task, of `bytes`: nothing has asked for them where the task before was another thread's.
/// A small part, since most often something has.
#[inline(always)]
fn ask_first(at: *const u8, bytes: usize) {
    for line in (0..bytes.min(8 * AHEAD) / 8).step_by(64) {
        // SAFETY: a hint, which may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line).cast()) };
    }
}

/// AVX2 with FMA.
pub(super) struct Avx2;

impl Dot for Avx2 {
    const ISA: Isa = Isa::Avx2;
    const FMA: bool = true;
    type Acc = __m256;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: the caller vouches for AVX.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn packet<const WIDE: bool, const FINE: bool>(
        w: &Packet,
        a: &Activation,
        parts: usize,
        mut acc: __m256,
    ) -> __m256 {
        // SAFETY: the caller vouches for AVX2 and FMA; all loads lie within the two structs.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let flip = _mm256_set1_epi8(-128);
            let dot = |q: __m256i, x: __m256i| {
                let pairs = if WIDE {
                    // Products of 8 by 7 bits overflow pairs of 16; signed ones do not.
                    let s = _mm256_xor_si256(q, flip);
                    _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(x, s))
                } else {
                    _mm256_maddubs_epi16(q, x)
                };
                _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones))
            };
            for g in 0..2 * parts {
                let q = _mm256_loadu_si256(w.q.as_ptr().add(32 * g).cast());
                let mut sums = dot(q, _mm256_loadu_si256(a.q.as_ptr().add(32 * g).cast()));
                if FINE {
                    let rest = dot(q, _mm256_loadu_si256(a.rest.as_ptr().add(32 * g).cast()));
                    sums = _mm256_fmadd_ps(rest, _mm256_set1_ps(REST), sums);
                }
                let lo = _mm_set1_ps(w.scale[2 * g] * a.scale[2 * g]);
                let hi = _mm_set1_ps(w.scale[2 * g + 1] * a.scale[2 * g + 1]);
                acc = _mm256_fmadd_ps(sums, _mm256_set_m128(hi, lo), acc);
            }
            if !WIDE {
                for h in 0..2 {
                    let m = _mm256_loadu_ps(w.min.as_ptr().add(8 * h));
                    acc = _mm256_fnmadd_ps(m, _mm256_loadu_ps(a.sum.as_ptr().add(8 * h)), acc);
                }
            }
            acc
        }
    }

    #[inline(always)]
    unsafe fn panel<const T: usize, const WIDE: bool, const FINE: bool, const PAIR: bool>(
        w: &[Panel],
        x: [*const Activation; T],
        groups: usize,
    ) -> [[f32; ROWS]; T] {
        // SAFETY: passed on to the caller.
        unsafe { avx2_panel::panel::<T, WIDE, FINE, PAIR>(w, x, groups) }
    }

    #[inline(always)]
    unsafe fn interleave(rows: &[Packet; ROWS], to: &mut Panel) {
        // SAFETY: passed on to the caller.
        unsafe { avx2_panel::interleave(rows, to) }
    }

    #[inline(always)]
    fn ask(at: *const u8, bytes: usize) {
        ask_first(at, bytes);
    }

    type Lanes = [__m256; 2];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::Lanes {
        // SAFETY: the caller vouches for AVX.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Lanes {
        // SAFETY: the caller vouches for AVX and sixteen floats.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }

    #[inline(always)]
    unsafe fn store(x: Self::Lanes, to: *mut f32) {
        // SAFETY: as for `load`.
        unsafe {
            _mm256_storeu_ps(to, x[0]);
            _mm256_storeu_ps(to.add(8), x[1]);
        }
    }

    #[inline(always)]
    unsafe fn add(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        // SAFETY: the caller vouches for AVX.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        // SAFETY: the caller vouches for AVX.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes {
        // SAFETY: the caller vouches for FMA.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    unsafe fn larger(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        // SAFETY: the caller vouches for AVX.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn power(x: Self::Lanes) -> Self::Lanes {
        // SAFETY: the caller vouches for AVX2.
        unsafe {
            let less = _mm256_set1_epi32(127 - ROUND.to_bits() as i32);
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_castps_si256(x[0]), less))),
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_castps_si256(x[1]), less))),
            ]
        }
    }

    #[inline(always)]
    fn widen(from: &[u16], to: &mut [f32]) {
        let (halves, last) = from.as_chunks::<8>();
        let (floats, rest) = to.as_chunks_mut::<8>();
        for (h, f) in halves.iter().zip(floats) {
            // SAFETY: this set is chosen where the machine has F16C; both have eight elements.
            unsafe { _mm256_storeu_ps(f.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(h.as_ptr().cast()))) };
        }
        rest.iter_mut().zip(last).for_each(|(o, h)| *o = f16(*h));
    }

    #[inline(always)]
    unsafe fn row<const FINE: bool>(
        ty: TensorType,
        row: *const u8,
        x: *const Activation,
        _pairs: *const Paired,
        cols: usize,
    ) -> Option<f32> {
        // SAFETY: passed on to the caller.
        unsafe { avx2_row::row::<FINE>(ty, row, x, cols) }
    }

    #[inline(always)]
    unsafe fn sum(acc: __m256) -> f32 {
        // SAFETY: the caller vouches for AVX2.
        unsafe {
            let half = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps::<1>(acc));
            let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)))
        }
    }
}

/// AVX-512 with VNNI.
pub(super) struct Avx512;

impl Dot for Avx512 {
    const ISA: Isa = Isa::Avx512;
    const FMA: bool = true;
    type Acc = __m512;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller vouches for AVX-512.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn packet<const WIDE: bool, const FINE: bool>(
        w: &Packet,
        a: &Activation,
        parts: usize,
        mut acc: __m512,
    ) -> __m512 {
        // SAFETY: the caller vouches for AVX-512 F and VNNI; all loads lie within the structs.
        unsafe {
            let scale = _mm512_mul_ps(_mm512_loadu_ps(w.scale.as_ptr()), _mm512_loadu_ps(a.scale.as_ptr()));
            acc = _mm512_fnmadd_ps(_mm512_loadu_ps(w.min.as_ptr()), _mm512_loadu_ps(a.sum.as_ptr()), acc);
            let mut at = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
            for i in 0..parts {
                let q = _mm512_loadu_si512(w.q.as_ptr().add(64 * i).cast());
                let x = _mm512_loadu_si512(a.q.as_ptr().add(64 * i).cast());
                let mut sums = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), q, x));
                if FINE {
                    let x = _mm512_loadu_si512(a.rest.as_ptr().add(64 * i).cast());
                    let rest = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), q, x));
                    sums = _mm512_fmadd_ps(rest, _mm512_set1_ps(REST), sums);
                }
                acc = _mm512_fmadd_ps(sums, _mm512_permutexvar_ps(at, scale), acc);
                at = _mm512_add_epi32(at, _mm512_set1_epi32(4));
            }
            acc
        }
    }

    type Lanes = __m512;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: the caller vouches for AVX-512.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: the caller vouches for AVX-512 and sixteen floats.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(x: __m512, to: *mut f32) {
        // SAFETY: as for `load`.
        unsafe { _mm512_storeu_ps(to, x) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller vouches for AVX-512.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller vouches for AVX-512.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the caller vouches for AVX-512.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn larger(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller vouches for AVX-512.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn power(x: __m512) -> __m512 {
        // SAFETY: the caller vouches for AVX-512.
        unsafe {
            let n = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(127 - ROUND.to_bits() as i32));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
        }
    }

    #[inline(always)]
    fn widen(from: &[u16], to: &mut [f32]) {
        let (halves, last) = from.as_chunks::<16>();
        let (floats, rest) = to.as_chunks_mut::<16>();
        for (h, f) in halves.iter().zip(floats) {
            // SAFETY: this set is chosen where the machine has AVX-512; both have sixteen elements.
            unsafe { _mm512_storeu_ps(f.as_mut_ptr(), _mm512_cvtph_ps(_mm256_loadu_si256(h.as_ptr().cast()))) };
        }
        rest.iter_mut().zip(last).for_each(|(o, h)| *o = f16(*h));
    }

    #[inline(always)]
    fn turn(keys: &[f32], hd: usize, to: &mut [f32]) {
        // SAFETY: this set is chosen where the machine has AVX-512.
        unsafe { avx512_panel::turn(keys, hd, to) }
    }

    #[inline(always)]
    unsafe fn panel<const T: usize, const WIDE: bool, const FINE: bool, const PAIR: bool>(
        w: &[Panel],
        x: [*const Activation; T],
        groups: usize,
    ) -> [[f32; ROWS]; T] {
        // SAFETY: passed on to the caller.
        unsafe { avx512_panel::panel::<T, FINE, PAIR>(w, x, groups) }
    }

    #[inline(always)]
    unsafe fn interleave(rows: &[Packet; ROWS], to: &mut Panel) {
        // SAFETY: passed on to the caller.
        unsafe { avx512_panel::interleave(rows, to) }
    }

    #[inline(always)]
    fn ask(at: *const u8, bytes: usize) {
        ask_first(at, bytes);
    }

    #[inline(always)]
    unsafe fn row<const FINE: bool>(
        ty: TensorType,
        row: *const u8,
        x: *const Activation,
        pairs: *const Paired,
        cols: usize,
    ) -> Option<f32> {
        // SAFETY: passed on to the caller.
        unsafe { avx512_row::row::<FINE>(ty, row, x, pairs, cols) }
    }

    #[inline(always)]
    unsafe fn four_rows<const FINE: bool>(
        ty: TensorType,
        rows: *const u8,
        stride: usize,
        pairs: *const Paired,
        cols: usize,
    ) -> Option<[f32; 4]> {
        // SAFETY: passed on to the caller.
        unsafe {
            match ty {
                TensorType::Q4_0 => Some(avx512_nibbles::rows::<18, 4, FINE>(rows, stride, pairs, cols)),
                TensorType::Q4_1 => Some(avx512_nibbles::rows::<20, 4, FINE>(rows, stride, pairs, cols)),
                _ => None,
            }
        }
    }

    #[inline(always)]
    unsafe fn sum(acc: __m512) -> f32 {
        // SAFETY: the caller vouches for AVX-512 F.
        unsafe { _mm512_reduce_add_ps(acc) }
    }
}

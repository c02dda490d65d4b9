//! Rows of Q4_0 and Q4_1 with one row of activations, where AVX-512 VNNI is there: four rows of weights at a time, which
//! share what is loaded of the activations. A row's result does not depend on those beside it. (No closures here: one that is
//! called twice is compiled by itself, without the instruction set.)
//!
//! A packet's blocks are loaded as they lie in the file. One permutation gathers the quants of four blocks, whose low
//! nibbles are then the first halves of these blocks, and another all scales: see [`Quads`](super::super::kernel::Quads).

use std::arch::x86_64::*;

use super::super::kernel::{Paired, REST};
use super::super::unpack::PACKET;
use super::ask_ahead;

/// Where quants and scales of eight blocks of `BYTES` bytes lie, in units of `UNIT` bytes that a permutation moves.
struct Places<const BYTES: usize, const UNIT: usize>;

impl<const BYTES: usize, const UNIT: usize> Places<BYTES, UNIT> {
    /// Units of a register.
    const ALL: usize = 64 / UNIT;

    /// The quants of four blocks from `first`, whose last 16 bytes they are: units from register `register` on.
    const fn quants<const N: usize>(first: usize, register: usize) -> [u8; N] {
        let mut at = [0; N];
        let mut i = 0;
        while i < N {
            let (block, unit) = (first + i / (16 / UNIT), i % (16 / UNIT));
            at[i] = ((block * BYTES + BYTES - 16) / UNIT + unit - register * Self::ALL) as u8;
            i += 1;
        }
        at
    }
}

const Q4_1_QUANTS: [[u8; 16]; 2] = [Places::<20, 4>::quants(0, 0), Places::<20, 4>::quants(4, 1)];
const Q4_0_QUANTS: [[u8; 32]; 2] = [Places::<18, 2>::quants(0, 0), Places::<18, 2>::quants(4, 1)];

#[inline(always)]
fn zero() -> __m512 {
    // SAFETY: all zero bits are sixteen zeros.
    unsafe { std::mem::zeroed() }
}

/// The indices that the permutations of a type take, in registers.
struct Indices {
    quants: [__m512i; 2],
    fields: __m512i,
    /// Of each 16 lanes, which field is the scale of four blocks.
    scales: [__m512i; 2],
}

impl Indices {
    #[inline(always)]
    unsafe fn new<const BYTES: usize>() -> Indices {
        // SAFETY: the caller vouches for AVX-512; each address has as many bytes as are loaded.
        unsafe {
            let (quants, fields) = if BYTES == 20 {
                let [a, b] = &Q4_1_QUANTS;
                let a = _mm512_cvtepu8_epi32(_mm_loadu_si128(a.as_ptr().cast()));
                let b = _mm512_cvtepu8_epi32(_mm_loadu_si128(b.as_ptr().cast()));
                // Block 7's lies in the third register.
                ([a, b], _mm512_setr_epi32(0, 5, 10, 15, 20, 25, 30, 3, 0, 0, 0, 0, 0, 0, 0, 0))
            } else {
                let [a, b] = &Q4_0_QUANTS;
                let a = _mm512_cvtepu8_epi16(_mm256_loadu_si256(a.as_ptr().cast()));
                let b = _mm512_cvtepu8_epi16(_mm256_loadu_si256(b.as_ptr().cast()));
                // Each twice.
                let fields = _mm_setr_epi8(0, 0, 9, 9, 18, 18, 27, 27, 36, 36, 45, 45, 54, 54, 63, 63);
                ([a, b], _mm512_castsi256_si512(_mm256_cvtepu8_epi16(fields)))
            };
            let first = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
            Indices { quants, fields, scales: [first, _mm512_add_epi32(first, _mm512_set1_epi32(8))] }
        }
    }
}

/// Eight blocks of a row, as they lie.
struct Raw {
    a: __m512i,
    b: __m512i,
    c: __m512i,
}

impl Raw {
    #[inline(always)]
    unsafe fn whole<const BYTES: usize>(at: *const u8) -> Raw {
        // SAFETY: the caller vouches for AVX-512 and eight blocks: 160 or 144 bytes.
        unsafe {
            let c = match BYTES {
                20 => _mm512_castsi256_si512(_mm256_loadu_si256(at.add(128).cast())),
                _ => _mm512_castsi128_si512(_mm_loadu_si128(at.add(128).cast())),
            };
            Raw { a: _mm512_loadu_si512(at.cast()), b: _mm512_loadu_si512(at.add(64).cast()), c }
        }
    }

    /// `n` blocks, and zeros.
    #[inline(always)]
    unsafe fn some<const BYTES: usize>(at: *const u8, n: usize) -> Raw {
        let words = (1u128 << (n * BYTES / 2)) - 1;
        // SAFETY: the caller vouches for AVX-512 and `n` blocks; what is masked is not read.
        unsafe {
            Raw {
                a: _mm512_maskz_loadu_epi16(words as u32, at.cast()),
                b: _mm512_maskz_loadu_epi16((words >> 32) as u32, at.wrapping_add(64).cast()),
                c: _mm512_maskz_loadu_epi16((words >> 64) as u32, at.wrapping_add(128).cast()),
            }
        }
    }

    /// The quants of four blocks: low nibbles, high nibbles.
    #[inline(always)]
    unsafe fn quants<const BYTES: usize>(&self, at: &Indices, half: usize) -> (__m512i, __m512i) {
        let (from, to) = if half == 0 { (self.a, self.b) } else { (self.b, self.c) };
        // SAFETY: the caller vouches for AVX-512.
        unsafe {
            let bytes = match BYTES {
                20 => _mm512_permutex2var_epi32(from, at.quants[half], to),
                _ => _mm512_permutex2var_epi16(from, at.quants[half], to),
            };
            let low = _mm512_set1_epi8(15);
            (_mm512_and_si512(bytes, low), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low))
        }
    }

    /// Two fields of each block side by side: scale and min, or the scale twice.
    #[inline(always)]
    unsafe fn fields<const BYTES: usize>(&self, at: &Indices) -> __m512 {
        // SAFETY: the caller vouches for AVX-512.
        unsafe {
            let halves = match BYTES {
                20 => {
                    let h = _mm512_permutex2var_epi32(self.a, at.fields, self.b);
                    _mm512_mask_permutexvar_epi32(h, 1 << 7, at.fields, self.c)
                }
                _ => _mm512_permutex2var_epi16(self.a, at.fields, self.b),
            };
            _mm512_cvtph_ps(_mm512_castsi512_si256(halves))
        }
    }
}

/// Activations of a packet, loaded once for all rows.
struct Loaded<'a> {
    a: &'a Paired,
    sums: __m512,
}

impl Loaded<'_> {
    /// Adds 64 quants times their activations to `to`, four to a lane.
    #[inline(always)]
    unsafe fn product<const FINE: bool>(&self, q: __m512i, part: usize, to: __m512) -> __m512 {
        let x = &self.a.quads;
        // SAFETY: the caller vouches for AVX-512 VNNI; all loads lie within the activations.
        unsafe {
            let zero = _mm512_setzero_si512();
            let sums = _mm512_dpbusd_epi32(zero, q, _mm512_load_si512(x.q[part].as_ptr().cast()));
            let mut sums = _mm512_cvtepi32_ps(sums);
            if FINE {
                let rest = _mm512_dpbusd_epi32(zero, q, _mm512_load_si512(x.rest[part].as_ptr().cast()));
                sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(rest), _mm512_set1_ps(REST), sums);
            }
            _mm512_fmadd_ps(sums, _mm512_load_ps(x.scale[part].as_ptr()), to)
        }
    }
}

/// Sums of one row.
#[derive(Clone, Copy)]
struct Row {
    parts: [__m512; 2],
    /// Mins, or scales that the bias multiplies, times sums of activations.
    offset: __m512,
}

impl Row {
    /// Blocks `4 * half` to `4 * half + 3` of a packet.
    #[inline(always)]
    unsafe fn add<const BYTES: usize, const FINE: bool>(
        &mut self,
        raw: &Raw,
        fields: __m512,
        x: &Loaded<'_>,
        at: &Indices,
        half: usize,
    ) {
        // SAFETY: the caller vouches for AVX-512 VNNI; all loads lie within the activations.
        unsafe {
            let (low, high) = raw.quants::<BYTES>(at, half);
            let sum = x.product::<FINE>(low, 2 * half, zero());
            let sum = x.product::<FINE>(high, 2 * half + 1, sum);
            let of_weights = _mm512_permutexvar_ps(at.scales[half], fields);
            self.parts[half] = _mm512_fmadd_ps(sum, of_weights, self.parts[half]);
        }
    }
}

/// Dot products of `R` rows of `cols` weights, `stride` bytes apart, with one row of activations. `BYTES`: 18 for Q4_0, 20
/// for Q4_1. `FINE`: with what rounding of the activations left.
///
/// # Safety
/// The machine has AVX-512 F, BW, DQ, VL and VNNI; `rows` points to as many whole rows, `x` to the packets that one spans.
#[inline(always)]
pub(super) unsafe fn rows<const BYTES: usize, const R: usize, const FINE: bool>(
    rows: *const u8,
    stride: usize,
    x: *const Paired,
    cols: usize,
) -> [f32; R] {
    const { assert!(BYTES == 18 || BYTES == 20) };
    let (whole, left) = (cols / PACKET, cols % PACKET / 32);
    let mut all = [Row { parts: [zero(); 2], offset: zero() }; R];
    // SAFETY: the caller's contract; blocks lie within their rows.
    unsafe {
        let at = Indices::new::<BYTES>();
        for p in 0..whole + usize::from(left > 0) {
            let a = &*x.add(p);
            let [first, second] = &a.quads.sum;
            let x = Loaded { a, sums: _mm512_add_ps(_mm512_load_ps(first.as_ptr()), _mm512_load_ps(second.as_ptr())) };
            for (r, row) in all.iter_mut().enumerate() {
                let first = rows.add(r * stride + 8 * p * BYTES);
                let raw = if p < whole {
                    ask_ahead::<160>(first);
                    Raw::whole::<BYTES>(first)
                } else {
                    Raw::some::<BYTES>(first, left)
                };
                let fields = raw.fields::<BYTES>(&at);
                row.offset = _mm512_fmadd_ps(fields, x.sums, row.offset);
                row.add::<BYTES, FINE>(&raw, fields, &x, &at, 0);
                if p < whole || left > 4 {
                    row.add::<BYTES, FINE>(&raw, fields, &x, &at, 1);
                }
            }
        }
        let mut sums = [0.0; R];
        for (to, row) in sums.iter_mut().zip(&all) {
            let sum = _mm512_add_ps(row.parts[0], row.parts[1]);
            *to = _mm512_reduce_add_ps(match BYTES {
                20 => _mm512_add_ps(sum, row.offset),
                _ => _mm512_fnmadd_ps(row.offset, _mm512_set1_ps(8.0), sum),
            });
        }
        sums
    }
}

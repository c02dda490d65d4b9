//! One row of activations with one of weights of a type that looks its weights up in a grid: what exact rows take, straight
//! from the blocks.
//!
//! Magnitudes come from the grid eight or four at a time, and the activations take the weights' signs: no offset is left.
//! Scales and signs of a block of 256 are decoded together.

use std::arch::x86_64::*;

use super::super::kernel::{Activation, Dot};
use super::super::unpack::PACKET;
use super::{Avx2, ask_ahead, avx2_row, avx512_row};
use crate::gguf::{TensorType, grids};

/// What the 256 weights of a block have in common.
struct Head {
    /// Scale of each 16.
    scales: [__m256; 2],
    /// Min of each 16, where the type has them.
    mins: [__m256; 2],
    /// Bit i of word j: weight `32j + i` is negative. Unused by types with mins.
    signs: Signs,
}

#[repr(align(32))]
struct Signs([u32; 8]);

/// A type with a grid.
trait Grid {
    /// Bytes of a block.
    const BYTES: usize;
    /// Whether it has mins in the place of signs.
    const MINS: bool;

    /// Decodes scales, and signs or mins.
    ///
    /// # Safety
    /// The machine has AVX2, FMA and F16C; a whole block is readable.
    unsafe fn head(block: *const u8) -> Head;

    /// Magnitudes of weights `32j..32j + 32`.
    ///
    /// # Safety
    /// As for `head`; `j` is below 8.
    unsafe fn values(block: *const u8, j: usize) -> __m256i;
}

/// Which kernel a row takes.
macro_rules! by_type {
    ($ty:expr, $kernel:ident, $fine:ident, $($arg:expr),*) => {
        match $ty {
            TensorType::IQ1_S => $kernel::<Iq1S, $fine>($($arg),*),
            TensorType::IQ1_M => $kernel::<Iq1M, $fine>($($arg),*),
            TensorType::IQ2_XXS => $kernel::<Iq2Xxs, $fine>($($arg),*),
            TensorType::IQ2_XS => $kernel::<Iq2Xs, $fine>($($arg),*),
            TensorType::IQ2_S => $kernel::<Iq2S, $fine>($($arg),*),
            TensorType::IQ3_XXS => $kernel::<Iq3Xxs, $fine>($($arg),*),
            TensorType::IQ3_S => $kernel::<Iq3S, $fine>($($arg),*),
            _ => return None,
        }
    };
}

/// As [`Dot::row`] with AVX2; `None` for types without a grid.
///
/// # Safety
/// As [`avx2_row::row`].
#[inline(always)]
pub(super) unsafe fn row_avx2<const FINE: bool>(
    ty: TensorType,
    row: *const u8,
    x: *const Activation,
    cols: usize,
) -> Option<f32> {
    // SAFETY: passed on to the caller.
    unsafe { Some(Avx2::sum(by_type!(ty, blocks_avx2, FINE, row, x, cols))) }
}

/// As [`Dot::row`] with AVX-512; `None` for types without a grid.
///
/// # Safety
/// As [`avx512_row::row`].
#[inline(always)]
pub(super) unsafe fn row_avx512<const FINE: bool>(
    ty: TensorType,
    row: *const u8,
    x: *const Activation,
    cols: usize,
) -> Option<f32> {
    // SAFETY: passed on to the caller.
    unsafe { Some(by_type!(ty, blocks_avx512, FINE, row, x, cols)) }
}

#[inline(always)]
unsafe fn blocks_avx2<G: Grid, const FINE: bool>(row: *const u8, x: *const Activation, cols: usize) -> __m256 {
    // SAFETY: the caller's contract; every load lies within a block or an activation.
    unsafe {
        let mut acc = _mm256_setzero_ps();
        for b in 0..cols / PACKET {
            let (block, a) = (row.add(b * G::BYTES), &*x.add(b));
            ask_ahead::<128>(block);
            let head = G::head(block);
            let scale = avx2_row::scaled(head.scales, a);
            if G::MINS {
                acc = avx2_row::less_mins(head.mins, a, acc);
            }
            for j in 0..8 {
                let v = G::values(block, j);
                let sums = if G::MINS {
                    avx2_row::products::<FINE>(v, a, j)
                } else {
                    avx2_row::signed_products::<FINE>(v, signs_of_bytes(head.signs.0[j]), a, j)
                };
                acc = _mm256_fmadd_ps(sums, avx2_row::pair(&scale.0, j), acc);
            }
        }
        acc
    }
}

#[inline(always)]
unsafe fn blocks_avx512<G: Grid, const FINE: bool>(row: *const u8, x: *const Activation, cols: usize) -> f32 {
    // SAFETY: the caller's contract; every load lies within a block or an activation.
    unsafe {
        let (mut even, mut odd) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for b in 0..cols / PACKET {
            let (block, a) = (row.add(b * G::BYTES), &*x.add(b));
            ask_ahead::<128>(block);
            let head = G::head(block);
            let scale = _mm512_mul_ps(both(head.scales), _mm512_load_ps(a.scale.as_ptr()));
            if G::MINS {
                even = _mm512_fnmadd_ps(both(head.mins), _mm512_load_ps(a.sum.as_ptr()), even);
            }
            for i in 0..4 {
                let v = _mm512_inserti64x4::<1>(
                    _mm512_castsi256_si512(G::values(block, 2 * i)),
                    G::values(block, 2 * i + 1),
                );
                let negative = if G::MINS { 0 } else { head.signs.0.as_ptr().cast::<u64>().add(i).read() };
                let sums = avx512_row::signed_products::<FINE>(v, negative, a, i);
                let scale = _mm512_permutexvar_ps(avx512_row::lanes(4 * i as i32, 0), scale);
                let acc = if i % 2 == 0 { &mut even } else { &mut odd };
                *acc = _mm512_fmadd_ps(sums, scale, *acc);
            }
        }
        _mm512_reduce_add_ps(_mm512_add_ps(even, odd))
    }
}

#[inline(always)]
unsafe fn both(halves: [__m256; 2]) -> __m512 {
    // SAFETY: the caller vouches for AVX-512.
    unsafe { _mm512_insertf32x8::<1>(_mm512_castps256_ps512(halves[0]), halves[1]) }
}

/// -1 in the bytes whose bits are set, 1 in the others.
#[inline(always)]
unsafe fn signs_of_bytes(word: u32) -> __m256i {
    // SAFETY: the caller vouches for AVX2.
    unsafe {
        let spread = _mm256_set_epi64x(0x0303_0303_0303_0303, 0x0202_0202_0202_0202, 0x0101_0101_0101_0101, 0);
        let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word as i32), spread);
        let negative = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
        _mm256_or_si256(negative, _mm256_set1_epi8(1))
    }
}

/// Bytes of seven signs to eight: see [`grids::even_signs`].
#[inline(always)]
unsafe fn even_signs(seven: __m256i) -> __m256i {
    // SAFETY: the caller vouches for AVX2.
    unsafe {
        // The highest bit of each entry is the parity of its index.
        let odd = _mm256_set1_epi64x(0x8000_0080_0080_8000_u64 as i64);
        let odd = _mm256_blend_epi32::<0b1100_1100>(odd, _mm256_xor_si256(odd, _mm256_set1_epi8(-128)));
        let nibble = _mm256_set1_epi8(15);
        let low = _mm256_shuffle_epi8(odd, _mm256_and_si256(seven, nibble));
        let high = _mm256_shuffle_epi8(odd, _mm256_and_si256(_mm256_srli_epi16::<4>(seven), nibble));
        _mm256_or_si256(seven, _mm256_xor_si256(low, high))
    }
}

/// Four fields of seven bits from the lowest bit of each word, to bytes of eight signs.
#[inline(always)]
unsafe fn even_signs_of(words: __m256i) -> Signs {
    // SAFETY: the caller vouches for AVX2; both sides have 32 bytes.
    unsafe {
        let mut seven = _mm256_and_si256(words, _mm256_set1_epi32(0x7f));
        seven = _mm256_or_si256(seven, _mm256_and_si256(_mm256_slli_epi32::<1>(words), _mm256_set1_epi32(0x7f00)));
        seven = _mm256_or_si256(seven, _mm256_and_si256(_mm256_slli_epi32::<2>(words), _mm256_set1_epi32(0x7f_0000)));
        seven = _mm256_or_si256(seven, _mm256_and_si256(_mm256_slli_epi32::<3>(words), _mm256_set1_epi32(0x7f00_0000)));
        stored(even_signs(seven))
    }
}

#[inline(always)]
unsafe fn stored(signs: __m256i) -> Signs {
    let mut out = Signs([0; 8]);
    // SAFETY: the caller vouches for AVX2; both sides have 32 bytes, aligned to them.
    unsafe { _mm256_store_si256(out.0.as_mut_ptr().cast(), signs) };
    out
}

/// The half-precision scale of a block as its bits.
#[inline(always)]
unsafe fn half(bits: i16) -> __m256 {
    // SAFETY: the caller vouches for F16C.
    unsafe { _mm256_cvtph_ps(_mm_set1_epi16(bits)) }
}

/// Eight factors, each twice.
#[inline(always)]
unsafe fn twice(of: __m256) -> [__m256; 2] {
    // SAFETY: the caller vouches for AVX2.
    unsafe {
        [
            _mm256_permutevar8x32_ps(of, _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0)),
            _mm256_permutevar8x32_ps(of, _mm256_set_epi32(7, 7, 6, 6, 5, 5, 4, 4)),
        ]
    }
}

/// `d * (n + 0.5)` of the highest four bits of each word, each twice.
#[inline(always)]
unsafe fn top_scales(words: __m256i, d: __m256) -> [__m256; 2] {
    // SAFETY: the caller vouches for AVX2 and FMA.
    unsafe {
        let n = _mm256_cvtepi32_ps(_mm256_srli_epi32::<28>(words));
        twice(_mm256_mul_ps(d, _mm256_add_ps(n, _mm256_set1_ps(0.5))))
    }
}

/// `d * (n + 0.5)` of the sixteen nibbles of eight bytes, the lower of each byte first.
#[inline(always)]
unsafe fn nibble_scales(at: *const u8, d: __m256) -> [__m256; 2] {
    // SAFETY: the caller gives 8 readable bytes and vouches for AVX2.
    unsafe {
        let bytes = _mm_loadl_epi64(at.cast());
        let nibble = _mm_set1_epi8(15);
        let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble);
        let all = _mm_unpacklo_epi8(_mm_and_si128(bytes, nibble), high);
        let n = [_mm256_cvtepu8_epi32(all), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(all, all))];
        let half = _mm256_set1_ps(0.5);
        [
            _mm256_mul_ps(d, _mm256_add_ps(_mm256_cvtepi32_ps(n[0]), half)),
            _mm256_mul_ps(d, _mm256_add_ps(_mm256_cvtepi32_ps(n[1]), half)),
        ]
    }
}

/// `d * (2n + 1)` of the eight numbers of 3 bits in two words of 16.
#[inline(always)]
unsafe fn odd_scales(two: u32, d: __m256) -> __m256 {
    // SAFETY: the caller vouches for AVX2.
    unsafe {
        let n = _mm256_srlv_epi32(_mm256_set1_epi32(two as i32), _mm256_setr_epi32(0, 3, 6, 9, 16, 19, 22, 25));
        let n = _mm256_and_si256(n, _mm256_set1_epi32(7));
        _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_or_si256(_mm256_add_epi32(n, n), _mm256_set1_epi32(1))))
    }
}

/// Four entries of eight bytes.
#[inline(always)]
unsafe fn four<const N: usize>(grid: &[u64; N], at: [usize; 4]) -> __m256i {
    // Indices have as many bits as the grid: a power of two.
    let entry = at.map(|at| grid[at & (N - 1)] as i64);
    // SAFETY: the caller vouches for AVX2.
    unsafe { _mm256_set_epi64x(entry[3], entry[2], entry[1], entry[0]) }
}

/// Eight entries of four bytes.
#[inline(always)]
unsafe fn eight<const N: usize>(grid: &[u32; N], at: [usize; 8]) -> __m256i {
    let e = at.map(|at| grid[at & (N - 1)] as i32);
    // SAFETY: the caller vouches for AVX2.
    unsafe { _mm256_setr_epi32(e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7]) }
}

/// The word at byte `at` of a block.
#[inline(always)]
unsafe fn word<T: Copy>(block: *const u8, at: usize) -> T {
    // SAFETY: the caller's: it lies within the block, and any bits are a number.
    unsafe { block.add(at).cast::<T>().read_unaligned() }
}

const NONE: Signs = Signs([0; 8]);

struct Iq2Xxs;
impl Grid for Iq2Xxs {
    const BYTES: usize = 66;
    const MINS: bool = false;

    #[inline(always)]
    unsafe fn head(block: *const u8) -> Head {
        // SAFETY: the caller's contract; the loads lie within 66 bytes.
        unsafe {
            let d = _mm256_mul_ps(half(word(block, 0)), _mm256_set1_ps(0.25));
            let (a, b) = (_mm256_loadu_ps(block.add(2).cast()), _mm256_loadu_ps(block.add(34).cast()));
            // The odd words of both, in order.
            let odd = _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(a, b));
            let codes = _mm256_permute4x64_epi64::<0b11_01_10_00>(odd);
            Head { scales: top_scales(codes, d), mins: [d; 2], signs: even_signs_of(codes) }
        }
    }

    #[inline(always)]
    unsafe fn values(block: *const u8, j: usize) -> __m256i {
        // SAFETY: as above.
        unsafe {
            let at: u32 = word(block, 2 + 8 * j);
            four(&grids::IQ2_XXS, [0, 8, 16, 24].map(|shift| (at >> shift & 255) as usize))
        }
    }
}

struct Iq2Xs;
impl Grid for Iq2Xs {
    const BYTES: usize = 74;
    const MINS: bool = false;

    #[inline(always)]
    unsafe fn head(block: *const u8) -> Head {
        // SAFETY: the caller's contract; the loads lie within 74 bytes.
        unsafe {
            let d = _mm256_mul_ps(half(word(block, 0)), _mm256_set1_ps(0.25));
            let (a, b) = (_mm256_loadu_si256(block.add(2).cast()), _mm256_loadu_si256(block.add(34).cast()));
            let seven = _mm256_packus_epi16(_mm256_srli_epi16::<9>(a), _mm256_srli_epi16::<9>(b));
            let signs = stored(even_signs(_mm256_permute4x64_epi64::<0b11_01_10_00>(seven)));
            Head { scales: nibble_scales(block.add(66), d), mins: [d; 2], signs }
        }
    }

    #[inline(always)]
    unsafe fn values(block: *const u8, j: usize) -> __m256i {
        // SAFETY: as above.
        unsafe {
            let at: u64 = word(block, 2 + 8 * j);
            four(&grids::IQ2_XS, [0, 16, 32, 48].map(|shift| (at >> shift & 511) as usize))
        }
    }
}

struct Iq2S;
impl Grid for Iq2S {
    const BYTES: usize = 82;
    const MINS: bool = false;

    #[inline(always)]
    unsafe fn head(block: *const u8) -> Head {
        // SAFETY: the caller's contract; the loads lie within 82 bytes.
        unsafe {
            let d = _mm256_mul_ps(half(word(block, 0)), _mm256_set1_ps(0.25));
            let signs = stored(_mm256_loadu_si256(block.add(34).cast()));
            Head { scales: nibble_scales(block.add(74), d), mins: [d; 2], signs }
        }
    }

    #[inline(always)]
    unsafe fn values(block: *const u8, j: usize) -> __m256i {
        // SAFETY: as above.
        unsafe {
            let (low, high) = (word::<u32>(block, 2 + 4 * j), u32::from(word::<u8>(block, 66 + j)));
            let index = |l: u32| (low >> (8 * l) & 255 | (high << (8 - 2 * l) & 0x300)) as usize;
            four(&grids::IQ2_S, [index(0), index(1), index(2), index(3)])
        }
    }
}

struct Iq3Xxs;
impl Grid for Iq3Xxs {
    const BYTES: usize = 98;
    const MINS: bool = false;

    #[inline(always)]
    unsafe fn head(block: *const u8) -> Head {
        // SAFETY: the caller's contract; the loads lie within 98 bytes.
        unsafe {
            let d = _mm256_mul_ps(half(word(block, 0)), _mm256_set1_ps(0.5));
            let codes = _mm256_loadu_si256(block.add(66).cast());
            Head { scales: top_scales(codes, d), mins: [d; 2], signs: even_signs_of(codes) }
        }
    }

    #[inline(always)]
    unsafe fn values(block: *const u8, j: usize) -> __m256i {
        // SAFETY: as above.
        unsafe {
            let at: u64 = word(block, 2 + 8 * j);
            eight(&grids::IQ3_XXS, [0, 8, 16, 24, 32, 40, 48, 56].map(|shift| (at >> shift & 255) as usize))
        }
    }
}

struct Iq3S;
impl Grid for Iq3S {
    const BYTES: usize = 110;
    const MINS: bool = false;

    #[inline(always)]
    unsafe fn head(block: *const u8) -> Head {
        // SAFETY: the caller's contract; the loads lie within 110 bytes.
        unsafe {
            let d = half(word(block, 0));
            let s: u32 = word(block, 106);
            let n = _mm256_srlv_epi32(_mm256_set1_epi32(s as i32), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
            let n = _mm256_cvtepi32_ps(_mm256_and_si256(n, _mm256_set1_epi32(15)));
            let scale = _mm256_mul_ps(d, _mm256_add_ps(_mm256_add_ps(n, n), _mm256_set1_ps(1.0)));
            let signs = stored(_mm256_loadu_si256(block.add(74).cast()));
            Head { scales: twice(scale), mins: [d; 2], signs }
        }
    }

    #[inline(always)]
    unsafe fn values(block: *const u8, j: usize) -> __m256i {
        // SAFETY: as above.
        unsafe {
            let (low, high) = (word::<u64>(block, 2 + 8 * j), u32::from(word::<u8>(block, 66 + j)));
            let index = |i: u32| (low >> (8 * i) & 255) as usize | (high << (8 - i) & 0x100) as usize;
            eight(&grids::IQ3_S, [0, 1, 2, 3, 4, 5, 6, 7].map(index))
        }
    }
}

struct Iq1S;
impl Grid for Iq1S {
    const BYTES: usize = 50;
    const MINS: bool = true;

    #[inline(always)]
    unsafe fn head(block: *const u8) -> Head {
        // SAFETY: the caller's contract; the loads lie within 50 bytes.
        unsafe {
            let d = half(word(block, 0));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(block.add(34).cast()));
            let n = _mm256_and_si256(_mm256_srli_epi32::<11>(high), _mm256_set1_epi32(14));
            let scale = _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_or_si256(n, _mm256_set1_epi32(1))));
            // 7 or 9 eighths: bit 15 says which.
            let down = _mm256_srli_epi32::<15>(high);
            let eighths = _mm256_add_epi32(_mm256_set1_epi32(7), _mm256_add_epi32(down, down));
            let min = _mm256_mul_ps(_mm256_mul_ps(scale, _mm256_set1_ps(0.125)), _mm256_cvtepi32_ps(eighths));
            Head { scales: twice(scale), mins: twice(min), signs: NONE }
        }
    }

    #[inline(always)]
    unsafe fn values(block: *const u8, j: usize) -> __m256i {
        // SAFETY: as above.
        unsafe {
            let (low, high) = (word::<u32>(block, 2 + 4 * j), u32::from(word::<u16>(block, 34 + 2 * j)));
            let index = |l: u32| (low >> (8 * l) & 255 | (high >> (3 * l) & 7) << 8) as usize;
            four(&grids::IQ1, [index(0), index(1), index(2), index(3)])
        }
    }
}

struct Iq1M;
impl Grid for Iq1M {
    const BYTES: usize = 56;
    const MINS: bool = true;

    #[inline(always)]
    unsafe fn head(block: *const u8) -> Head {
        // SAFETY: the caller's contract; the loads lie within 56 bytes.
        unsafe {
            let s: u64 = word(block, 48);
            let words = [s as u16, (s >> 16) as u16, (s >> 32) as u16, (s >> 48) as u16];
            // Eighths: see `unpack`.
            let d = _mm256_mul_ps(half(grids::iq1m_scale(words) as i16), _mm256_set1_ps(0.125));
            let scales = [odd_scales(s as u32, d), odd_scales((s >> 32) as u32, d)];
            let nine = _mm256_set1_ps(9.0);
            let mins = [_mm256_mul_ps(scales[0], nine), _mm256_mul_ps(scales[1], nine)];
            Head { scales, mins, signs: NONE }
        }
    }

    #[inline(always)]
    unsafe fn values(block: *const u8, j: usize) -> __m256i {
        // SAFETY: as above.
        unsafe {
            let (low, high) = (word::<u32>(block, 4 * j), u32::from(word::<u16>(block, 32 + 2 * j)));
            let index = |l: u32| (low >> (8 * l) & 255 | (high >> (4 * l) & 7) << 8) as usize;
            let codes = four(&grids::IQ1, [index(0), index(1), index(2), index(3)]);
            let bit = _mm256_setr_epi64x(8, 0x80, 0x800, 0x8000);
            let down = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(i64::from(high)), bit), bit);
            let up = _mm256_andnot_si256(down, _mm256_set1_epi8(2));
            _mm256_add_epi8(_mm256_slli_epi16::<3>(codes), up)
        }
    }
}

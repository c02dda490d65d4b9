//! One row of activations with one of weights of the types whose super-blocks of 256 are eight registers of 32 weights: what
//! exact rows take, straight from the blocks.
//!
//! Scales of a block are decoded together. Types with grids look magnitudes up eight or four at a time, and the activations
//! take the weights' signs: no offset is left.

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
    /// Bit i of word j: weight `32j + i` is negative, where the type keeps signs by themselves.
    signs: Signs,
}

#[repr(align(32))]
struct Signs([u32; 8]);

/// What a type's values are.
#[derive(Clone, Copy, PartialEq)]
enum Values {
    /// Magnitudes, with signs by themselves.
    Magnitudes,
    /// Numbers from 0, which a min takes down.
    Unsigned,
    /// Signed numbers.
    Signed,
}

/// A type of super-blocks, or of blocks of 32 taken eight at a time.
trait Super {
    /// Bytes of a block, or of eight.
    const BYTES: usize;
    const VALUES: Values;
    /// Whether rows may end within eight blocks of 32.
    const EIGHT_BLOCKS: bool = false;

    /// Decodes scales, and signs or mins.
    ///
    /// # Safety
    /// The machine has AVX2, FMA and F16C; a whole block is readable.
    unsafe fn head(block: *const u8) -> Head;

    /// Values of weights `32j..32j + 32`.
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
            TensorType::IQ4_XS => $kernel::<Iq4Xs, $fine>($($arg),*),
            TensorType::IQ4_NL => $kernel::<Iq4Nl, $fine>($($arg),*),
            TensorType::MXFP4 => $kernel::<Mxfp4, $fine>($($arg),*),
            TensorType::Q2_K => $kernel::<Q2K, $fine>($($arg),*),
            TensorType::Q3_K => $kernel::<Q3K, $fine>($($arg),*),
            _ => return None,
        }
    };
}

/// As [`Dot::row`] with AVX2; `None` for types that have no such kernel.
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

/// As [`Dot::row`] with AVX-512; `None` for types that have no such kernel.
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

/// Most bytes of eight blocks of 32 weights.
const EIGHT: usize = 144;

/// The blocks of 32 that a row of `cols` weights has behind its last whole 256, with zeros behind them; `None` if it has none.
#[inline(always)]
unsafe fn tail<G: Super>(row: *const u8, cols: usize) -> Option<[u8; EIGHT]> {
    let bytes = cols % PACKET / 32 * (G::BYTES / 8);
    if !G::EIGHT_BLOCKS || bytes == 0 {
        return None;
    }
    let mut out = [0; EIGHT];
    // SAFETY: the caller's contract: so many bytes of the row are left, fewer than eight blocks.
    unsafe { std::ptr::copy_nonoverlapping(row.add(cols / PACKET * G::BYTES), out.as_mut_ptr(), bytes) };
    Some(out)
}

#[inline(always)]
unsafe fn blocks_avx2<G: Super, const FINE: bool>(row: *const u8, x: *const Activation, cols: usize) -> __m256 {
    // SAFETY: the caller's contract; every load lies within a block or an activation.
    unsafe {
        let mut acc = _mm256_setzero_ps();
        for b in 0..cols / PACKET {
            ask_ahead::<128>(row.add(b * G::BYTES));
            acc = block_avx2::<G, FINE>(row.add(b * G::BYTES), &*x.add(b), acc);
        }
        if let Some(last) = tail::<G>(row, cols) {
            acc = block_avx2::<G, FINE>(last.as_ptr(), &*x.add(cols / PACKET), acc);
        }
        acc
    }
}

#[inline(always)]
unsafe fn block_avx2<G: Super, const FINE: bool>(block: *const u8, a: &Activation, mut acc: __m256) -> __m256 {
    // SAFETY: the caller's contract; every load lies within the block or the activation.
    unsafe {
        let head = G::head(block);
        let scale = avx2_row::scaled(head.scales, a);
        if G::VALUES == Values::Unsigned {
            acc = avx2_row::less_mins(head.mins, a, acc);
        }
        for j in 0..8 {
            let v = G::values(block, j);
            let sums = match G::VALUES {
                Values::Unsigned => avx2_row::products::<FINE>(v, a, j),
                Values::Signed => avx2_row::signed_products::<FINE>(_mm256_abs_epi8(v), v, a, j),
                Values::Magnitudes => avx2_row::signed_products::<FINE>(v, signs_of_bytes(head.signs.0[j]), a, j),
            };
            acc = _mm256_fmadd_ps(sums, avx2_row::pair(&scale.0, j), acc);
        }
        acc
    }
}

#[inline(always)]
unsafe fn blocks_avx512<G: Super, const FINE: bool>(row: *const u8, x: *const Activation, cols: usize) -> f32 {
    // SAFETY: the caller's contract; every load lies within a block or an activation.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); 2];
        for b in 0..cols / PACKET {
            ask_ahead::<128>(row.add(b * G::BYTES));
            block_avx512::<G, FINE>(row.add(b * G::BYTES), &*x.add(b), &mut acc);
        }
        if let Some(last) = tail::<G>(row, cols) {
            block_avx512::<G, FINE>(last.as_ptr(), &*x.add(cols / PACKET), &mut acc);
        }
        _mm512_reduce_add_ps(_mm512_add_ps(acc[0], acc[1]))
    }
}

#[inline(always)]
unsafe fn block_avx512<G: Super, const FINE: bool>(block: *const u8, a: &Activation, acc: &mut [__m512; 2]) {
    // SAFETY: the caller's contract; every load lies within the block or the activation.
    unsafe {
        let head = G::head(block);
        let scale = _mm512_mul_ps(both(head.scales), _mm512_load_ps(a.scale.as_ptr()));
        let mins = match G::VALUES {
            Values::Unsigned => both(head.mins),
            // Those of signed numbers with 128 added.
            _ => _mm512_mul_ps(both(head.scales), _mm512_set1_ps(128.0)),
        };
        if G::VALUES != Values::Magnitudes {
            acc[0] = _mm512_fnmadd_ps(mins, _mm512_load_ps(a.sum.as_ptr()), acc[0]);
        }
        for i in 0..4 {
            let low = _mm512_castsi256_si512(G::values(block, 2 * i));
            let v = _mm512_inserti64x4::<1>(low, G::values(block, 2 * i + 1));
            let (q, rest) = (a.q.as_ptr().add(64 * i), a.rest.as_ptr().add(64 * i));
            let sums = match G::VALUES {
                Values::Unsigned => avx512_row::products::<FINE>(v, q, rest),
                Values::Signed => avx512_row::products::<FINE>(_mm512_xor_si512(v, _mm512_set1_epi8(-128)), q, rest),
                Values::Magnitudes => {
                    let negative = head.signs.0.as_ptr().cast::<u64>().add(i).read();
                    avx512_row::signed_products::<FINE>(v, negative, a, i)
                }
            };
            let scale = _mm512_permutexvar_ps(avx512_row::lanes(4 * i as i32, 0), scale);
            acc[i % 2] = _mm512_fmadd_ps(sums, scale, acc[i % 2]);
        }
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

/// Four entries of eight bytes. Indices have as many bits as the grid: a power of two.
#[inline(always)]
unsafe fn four<const N: usize>(grid: &[u64; N], a: usize, b: usize, c: usize, d: usize) -> __m256i {
    // SAFETY: the caller vouches for AVX2; what is cut to the bits of N is within the grid.
    unsafe {
        let entry = |at: usize| grid.as_ptr().add(at & (N - 1)).cast::<i64>().read();
        _mm256_set_epi64x(entry(d), entry(c), entry(b), entry(a))
    }
}

/// Four entries of four bytes.
#[inline(always)]
unsafe fn four_words<const N: usize>(grid: &[u32; N], a: usize, b: usize, c: usize, d: usize) -> __m128i {
    // SAFETY: as above.
    unsafe {
        let entry = |at: usize| grid.as_ptr().add(at & (N - 1)).cast::<i32>().read();
        _mm_set_epi32(entry(d), entry(c), entry(b), entry(a))
    }
}

/// The word at byte `at` of a block.
#[inline(always)]
unsafe fn word<T: Copy>(block: *const u8, at: usize) -> T {
    // SAFETY: the caller's: it lies within the block, and any bits are a number.
    unsafe { block.add(at).cast::<T>().read_unaligned() }
}

/// The byte at `at` of a block.
#[inline(always)]
unsafe fn byte(block: *const u8, at: usize) -> usize {
    // SAFETY: the caller's: it lies within the block.
    unsafe { usize::from(block.add(at).read()) }
}

const NONE: Signs = Signs([0; 8]);

struct Iq2Xxs;
impl Super for Iq2Xxs {
    const BYTES: usize = 66;
    const VALUES: Values = Values::Magnitudes;

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
            let at = 2 + 8 * j;
            let [a, b, c, d] = [byte(block, at), byte(block, at + 1), byte(block, at + 2), byte(block, at + 3)];
            four(&grids::IQ2_XXS, a, b, c, d)
        }
    }
}

struct Iq2Xs;
impl Super for Iq2Xs {
    const BYTES: usize = 74;
    const VALUES: Values = Values::Magnitudes;

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
            let at = 2 + 8 * j;
            // One load of all four: faster here than one of each.
            let all = word::<u64>(block, at) as usize;
            four(&grids::IQ2_XS, all, all >> 16, all >> 32, all >> 48)
        }
    }
}

struct Iq2S;
impl Super for Iq2S {
    const BYTES: usize = 82;
    const VALUES: Values = Values::Magnitudes;

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
            let (at, high) = (2 + 4 * j, byte(block, 66 + j));
            four(
                &grids::IQ2_S,
                byte(block, at) | (high << 8 & 0x300),
                byte(block, at + 1) | (high << 6 & 0x300),
                byte(block, at + 2) | (high << 4 & 0x300),
                byte(block, at + 3) | (high << 2 & 0x300),
            )
        }
    }
}

struct Iq3Xxs;
impl Super for Iq3Xxs {
    const BYTES: usize = 98;
    const VALUES: Values = Values::Magnitudes;

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
            let (a, b) = (2 + 8 * j, 6 + 8 * j);
            let of = &grids::IQ3_XXS;
            let low = four_words(of, byte(block, a), byte(block, a + 1), byte(block, a + 2), byte(block, a + 3));
            let high = four_words(of, byte(block, b), byte(block, b + 1), byte(block, b + 2), byte(block, b + 3));
            _mm256_set_m128i(high, low)
        }
    }
}

struct Iq3S;
impl Super for Iq3S {
    const BYTES: usize = 110;
    const VALUES: Values = Values::Magnitudes;

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
            let (at, high) = (2 + 8 * j, byte(block, 66 + j));
            let low = four_words(
                &grids::IQ3_S,
                byte(block, at) | (high << 8 & 0x100),
                byte(block, at + 1) | (high << 7 & 0x100),
                byte(block, at + 2) | (high << 6 & 0x100),
                byte(block, at + 3) | (high << 5 & 0x100),
            );
            let high = four_words(
                &grids::IQ3_S,
                byte(block, at + 4) | (high << 4 & 0x100),
                byte(block, at + 5) | (high << 3 & 0x100),
                byte(block, at + 6) | (high << 2 & 0x100),
                byte(block, at + 7) | (high << 1 & 0x100),
            );
            _mm256_set_m128i(high, low)
        }
    }
}

struct Iq1S;
impl Super for Iq1S {
    const BYTES: usize = 50;
    const VALUES: Values = Values::Unsigned;

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
            let (at, high) = (2 + 4 * j, usize::from(word::<u16>(block, 34 + 2 * j)));
            four(
                &grids::IQ1,
                byte(block, at) | (high << 8 & 0x700),
                byte(block, at + 1) | (high << 5 & 0x700),
                byte(block, at + 2) | (high << 2 & 0x700),
                byte(block, at + 3) | (high >> 1 & 0x700),
            )
        }
    }
}

struct Iq1M;
impl Super for Iq1M {
    const BYTES: usize = 56;
    const VALUES: Values = Values::Unsigned;

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
            let (at, high) = (4 * j, usize::from(word::<u16>(block, 32 + 2 * j)));
            let codes = four(
                &grids::IQ1,
                byte(block, at) | (high << 8 & 0x700),
                byte(block, at + 1) | (high << 4 & 0x700),
                byte(block, at + 2) | (high & 0x700),
                byte(block, at + 3) | (high >> 4 & 0x700),
            );
            let bit = _mm256_setr_epi64x(8, 0x80, 0x800, 0x8000);
            let down = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(high as i64), bit), bit);
            let up = _mm256_andnot_si256(down, _mm256_set1_epi8(2));
            _mm256_add_epi8(_mm256_slli_epi16::<3>(codes), up)
        }
    }
}

/// The values of IQ4_NL and IQ4_XS. Source: ggml-common.h, `kvalues_iq4nl`.
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

struct Iq4Xs;
impl Super for Iq4Xs {
    const BYTES: usize = 136;
    const VALUES: Values = Values::Signed;

    #[inline(always)]
    unsafe fn head(block: *const u8) -> Head {
        // SAFETY: the caller's contract; the loads lie within 136 bytes.
        unsafe {
            let d = half(word(block, 0));
            let (high, low) = (i32::from(word::<u16>(block, 2)), word::<i32>(block, 4));
            let low = _mm256_srlv_epi32(_mm256_set1_epi32(low), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
            let high = _mm256_srlv_epi32(_mm256_set1_epi32(high), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
            let low = _mm256_and_si256(low, _mm256_set1_epi32(15));
            let high = _mm256_slli_epi32::<4>(_mm256_and_si256(high, _mm256_set1_epi32(3)));
            let n = _mm256_sub_epi32(_mm256_or_si256(low, high), _mm256_set1_epi32(32));
            Head { scales: twice(_mm256_mul_ps(d, _mm256_cvtepi32_ps(n))), mins: [d; 2], signs: NONE }
        }
    }

    #[inline(always)]
    unsafe fn values(block: *const u8, j: usize) -> __m256i {
        // SAFETY: as above.
        unsafe { coded(&IQ4, block.add(8 + 16 * j)) }
    }
}

/// Values of 16 bytes of codes, of which the low nibbles come first.
#[inline(always)]
unsafe fn coded(table: &[i8; 16], at: *const u8) -> __m256i {
    // SAFETY: the caller gives 16 readable bytes and vouches for AVX2.
    unsafe {
        let q = _mm_loadu_si128(at.cast());
        let codes = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16::<4>(q), q), _mm256_set1_epi8(15));
        _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())), codes)
    }
}

struct Iq4Nl;
impl Super for Iq4Nl {
    const BYTES: usize = 8 * 18;
    const VALUES: Values = Values::Signed;
    const EIGHT_BLOCKS: bool = true;

    #[inline(always)]
    unsafe fn head(block: *const u8) -> Head {
        // SAFETY: the caller's contract; the loads lie within eight blocks.
        unsafe {
            let h: [i16; 8] = [
                word(block, 0),
                word(block, 18),
                word(block, 36),
                word(block, 54),
                word(block, 72),
                word(block, 90),
                word(block, 108),
                word(block, 126),
            ];
            let d = _mm256_cvtph_ps(_mm_setr_epi16(h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]));
            Head { scales: twice(d), mins: [d; 2], signs: NONE }
        }
    }

    #[inline(always)]
    unsafe fn values(block: *const u8, j: usize) -> __m256i {
        // SAFETY: as above.
        unsafe { coded(&IQ4, block.add(18 * j + 2)) }
    }
}

/// The values of MXFP4, doubled. Source: OCP Microscaling v1.0, E2M1.
const FP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

struct Mxfp4;
impl Super for Mxfp4 {
    const BYTES: usize = 8 * 17;
    const VALUES: Values = Values::Signed;
    const EIGHT_BLOCKS: bool = true;

    #[inline(always)]
    unsafe fn head(block: *const u8) -> Head {
        // SAFETY: the caller's contract; the loads lie within eight blocks.
        unsafe {
            let e = _mm256_setr_epi32(
                byte(block, 0) as i32,
                byte(block, 17) as i32,
                byte(block, 34) as i32,
                byte(block, 51) as i32,
                byte(block, 68) as i32,
                byte(block, 85) as i32,
                byte(block, 102) as i32,
                byte(block, 119) as i32,
            );
            // 2^(e - 128), since the table holds twice the values; the two smallest are no normal numbers.
            let normal = _mm256_slli_epi32::<23>(_mm256_sub_epi32(e, _mm256_set1_epi32(1)));
            let small = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), e);
            let is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e);
            let d = _mm256_castsi256_ps(_mm256_blendv_epi8(normal, small, is_small));
            Head { scales: twice(d), mins: [d; 2], signs: NONE }
        }
    }

    #[inline(always)]
    unsafe fn values(block: *const u8, j: usize) -> __m256i {
        // SAFETY: as above.
        unsafe { coded(&FP4, block.add(17 * j + 1)) }
    }
}

/// Numbers of 16 bytes as floats, times `d`.
#[inline(always)]
unsafe fn sixteen(bytes: __m128i, d: __m256) -> [__m256; 2] {
    // SAFETY: the caller vouches for AVX2.
    unsafe {
        let (low, high) = (_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)));
        [_mm256_mul_ps(d, _mm256_cvtepi32_ps(low)), _mm256_mul_ps(d, _mm256_cvtepi32_ps(high))]
    }
}

/// Bits `2(j % 4)` and the next of 32 bytes.
#[inline(always)]
unsafe fn two_bits(at: *const u8, j: usize) -> __m256i {
    // SAFETY: the caller gives 32 readable bytes and vouches for AVX2.
    unsafe {
        let q = _mm256_srl_epi16(_mm256_loadu_si256(at.cast()), _mm_cvtsi32_si128(2 * (j % 4) as i32));
        _mm256_and_si256(q, _mm256_set1_epi8(3))
    }
}

struct Q2K;
impl Super for Q2K {
    const BYTES: usize = 84;
    const VALUES: Values = Values::Unsigned;

    #[inline(always)]
    unsafe fn head(block: *const u8) -> Head {
        // SAFETY: the caller's contract; the loads lie within 84 bytes.
        unsafe {
            let both = _mm_loadu_si128(block.cast());
            let nibble = _mm_set1_epi8(15);
            let scales = sixteen(_mm_and_si128(both, nibble), half(word(block, 80)));
            let mins = sixteen(_mm_and_si128(_mm_srli_epi16::<4>(both), nibble), half(word(block, 82)));
            Head { scales, mins, signs: NONE }
        }
    }

    #[inline(always)]
    unsafe fn values(block: *const u8, j: usize) -> __m256i {
        // SAFETY: as above.
        unsafe { two_bits(block.add(16 + 32 * (j / 4)), j) }
    }
}

struct Q3K;
impl Super for Q3K {
    const BYTES: usize = 110;
    const VALUES: Values = Values::Unsigned;

    #[inline(always)]
    unsafe fn head(block: *const u8) -> Head {
        // SAFETY: the caller's contract; the loads lie within 110 bytes.
        unsafe {
            let bytes = _mm_loadl_epi64(block.add(96).cast());
            let low = _mm_unpacklo_epi64(bytes, _mm_srli_epi16::<4>(bytes));
            let high = _mm_srlv_epi32(_mm_set1_epi32(word(block, 104)), _mm_setr_epi32(0, 2, 4, 6));
            let high = _mm_slli_epi16::<4>(_mm_and_si128(high, _mm_set1_epi8(3)));
            let n = _mm_or_si128(_mm_and_si128(low, _mm_set1_epi8(15)), high);
            let scales = sixteen(_mm_sub_epi8(n, _mm_set1_epi8(32)), half(word(block, 108)));
            let four = _mm256_set1_ps(4.0);
            Head { scales, mins: [_mm256_mul_ps(scales[0], four), _mm256_mul_ps(scales[1], four)], signs: NONE }
        }
    }

    #[inline(always)]
    unsafe fn values(block: *const u8, j: usize) -> __m256i {
        // SAFETY: as above.
        unsafe {
            let bit = _mm256_set1_epi8((1u8 << j) as i8);
            let high = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_loadu_si256(block.cast()), bit), bit);
            let high = _mm256_and_si256(high, _mm256_set1_epi8(4));
            _mm256_or_si256(two_bits(block.add(32 + 32 * (j / 4)), j), high)
        }
    }
}

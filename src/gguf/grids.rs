//! What the indices and sign codes of the IQ types stand for.
//!
//! `build.rs` makes the tables of `kernels/grids.cuh`, which the GPU's kernels include: eight values of a byte each in a word of
//! IQ2, four in one of IQ3, the first in the lowest byte. Of IQ1 the bytes are the values plus 1.

include!(concat!(env!("OUT_DIR"), "/grids.rs"));

/// The signs of eight values, bit i set where value i is negative, from the 7 bits that IQ2_XXS, IQ2_XS and IQ3_XXS keep: an
/// even number of them is negative. Source: ggml-common.h, `ksigns_iq2xs`.
#[inline(always)]
pub const fn even_signs(seven: u32) -> u8 {
    let seven = seven & 127;
    (seven | (seven.count_ones() & 1) << 7) as u8
}

/// The half-precision scale of a block of IQ1_M, whose four nibbles are the highest of its four words of scales.
#[inline(always)]
pub fn iq1m_scale(scales: [u16; 4]) -> u16 {
    scales[0] >> 12 | (scales[1] >> 8 & 0xf0) | (scales[2] >> 4 & 0xf00) | (scales[3] & 0xf000)
}

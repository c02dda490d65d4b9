//! Rows of floats as blocks of a quantised type, as llama.cpp's reference quantisers make them (`ggml-quants.c`).
//!
//! Types of 32 elements have one scale and codes by it; the K types search, for each group of a super-block, the scale
//! (and the minimum) with the least weighted square error, and then give scales a few bits. Nothing here depends on the
//! processor: the same floats become the same bytes everywhere.
//!
//! Where a block's scale is so small that a half holds only some of its bits (below 2⁻¹⁴), it is rounded up and everything that
//! is stored by it is computed with the scale as stored; llama.cpp loses what was rounded off.

mod legacy;
mod supers;

use half::f16;

use crate::gguf::TensorType;

/// The types that rows can be quantised to.
pub const TYPES: &[TensorType] = &[
    TensorType::Q8_0,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q4_K,
    TensorType::Q5_K,
    TensorType::Q6_K,
    TensorType::IQ4_NL,
    TensorType::MXFP4,
];

/// Why floats cannot be quantised; positions count elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// An element is infinite or no number.
    #[error("element {0} is not finite")]
    NotFinite(usize),
    /// A block's scale is larger than a half.
    #[error("elements from {0} on are larger than {1} holds")]
    TooLarge(usize, TensorType),
    /// The lengths do not belong together, or the type has no quantiser.
    #[error("{0} elements are no whole number of blocks of {1}")]
    Blocks(usize, TensorType),
}

/// Quantises rows, back to back: `x.len()` elements to as many blocks of `ty` in `out`.
///
/// # Errors
/// Which element keeps it from being done; `out` then holds nothing of use.
pub fn quantise(ty: TensorType, x: &[f32], out: &mut [u8]) -> Result<(), Unfit> {
    if !TYPES.contains(&ty) || ty.row_bytes(x.len()) != Some(out.len()) {
        return Err(Unfit::Blocks(x.len(), ty));
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { with_avx2(ty, x, out) };
    }
    blocks(ty, x, out)
}

/// The same code as everywhere, compiled for wider registers; without fused operations, so that no bit changes.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2(ty: TensorType, x: &[f32], out: &mut [u8]) -> Result<(), Unfit> {
    blocks(ty, x, out)
}

#[inline(always)]
fn blocks(ty: TensorType, x: &[f32], out: &mut [u8]) -> Result<(), Unfit> {
    let n = ty.block_elems();
    for (i, (x, b)) in x.chunks_exact(n).zip(out.chunks_exact_mut(ty.block_bytes())).enumerate() {
        if x.iter().fold(false, |bad, v| bad | !v.is_finite()) {
            let at = x.iter().position(|v| !v.is_finite()).unwrap_or(0);
            return Err(Unfit::NotFinite(i * n + at));
        }
        let fits = match ty {
            TensorType::Q4_K | TensorType::Q5_K => supers::with_minimum(ty, x, b),
            TensorType::Q6_K => supers::q6_k(x, b),
            _ => legacy::block(ty, x, b),
        };
        if !fits {
            return Err(Unfit::TooLarge(i * n, ty));
        }
    }
    Ok(())
}

/// The least normal half.
const NORMAL: f32 = 1.0 / 16384.0;
/// Steps of halves below it.
const STEP: f32 = 1.0 / 16_777_216.0;

/// A scale in a block.
#[derive(Clone, Copy)]
struct Scale {
    /// As stored.
    half: f16,
    /// What codes are computed with.
    by: f32,
    /// Whether that is the half itself, since it has fewer bits than others.
    coarse: bool,
}

impl Scale {
    /// Of a scale; none if it is larger than halves. A coarse one is never nearer to zero than `d`, so that no code runs out.
    #[inline(always)]
    fn new(d: f32) -> Option<Scale> {
        if d == 0.0 || d.abs() >= NORMAL {
            let half = f16::from_f32(d);
            return half.is_finite().then_some(Scale { half, by: d, coarse: false });
        }
        let steps = (d.abs() / STEP).ceil() as u16;
        Some(Scale::coarse(f16::from_bits(steps | if d < 0.0 { 0x8000 } else { 0 })))
    }

    /// As near as can be, where `d` is a compromise already.
    #[inline(always)]
    fn fitted(d: f32) -> Option<Scale> {
        if d.abs() < NORMAL { Some(Scale::coarse(f16::from_f32(d))) } else { Scale::new(d) }
    }

    fn coarse(half: f16) -> Scale {
        Scale { half, by: half.to_f32(), coarse: true }
    }

    /// `1 / by`, 0 for no scale.
    #[inline(always)]
    fn inverse(self) -> f32 {
        if self.by == 0.0 { 0.0 } else { 1.0 / self.by }
    }

    fn put(self, b: &mut [u8]) {
        b[..2].copy_from_slice(&self.half.to_le_bytes());
    }
}

/// The nearest whole number, ties to even, of values up to 2²².
#[inline(always)]
fn nearest(v: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    (v + MAGIC) - MAGIC
}

/// The sum of a group, a multiple of 8, in a fixed order that suits registers: every eighth, then halves upon each other.
#[inline(always)]
fn sum<const N: usize>(v: [f32; N]) -> f32 {
    let mut a = [0.0f32; 8];
    for c in v.chunks_exact(8) {
        for i in 0..8 {
            a[i] += c[i];
        }
    }
    ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
}

/// The element of the largest magnitude, with its sign; the first of several.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0.0f32, |max, v| if v.abs() > max.abs() { *v } else { max })
}

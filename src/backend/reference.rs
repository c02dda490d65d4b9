//! Plain scalar versions of every kernel: slow, obvious, and what the fast ones are checked against.

use half::{bf16, f16};

use crate::gguf::{TensorType, grids};

/// The quantised types, in the order of the kernels' tables.
pub const QUANTS: [TensorType; 20] = [
    TensorType::Q8_0,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q2_K,
    TensorType::Q3_K,
    TensorType::Q4_K,
    TensorType::Q5_K,
    TensorType::Q6_K,
    TensorType::IQ4_NL,
    TensorType::IQ4_XS,
    TensorType::MXFP4,
    TensorType::IQ1_S,
    TensorType::IQ1_M,
    TensorType::IQ2_XXS,
    TensorType::IQ2_XS,
    TensorType::IQ2_S,
    TensorType::IQ3_XXS,
    TensorType::IQ3_S,
];

/// The types whose rows can be dequantised: floats, and all of [`QUANTS`].
pub const TYPES: [TensorType; 23] = {
    let mut all = [TensorType::F32; 23];
    (all[1], all[2]) = (TensorType::F16, TensorType::BF16);
    let (_, quants) = all.split_at_mut(3);
    quants.copy_from_slice(&QUANTS);
    all
};

/// The sixteen values of IQ4_NL and IQ4_XS.
pub const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The sixteen values of MXFP4, doubled.
pub const FP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The f16 at byte `i`.
pub fn half_at(b: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([b[i], b[i + 1]]).to_f32()
}

/// Half of the power of two that an E8M0 byte stands for (FP4 values are stored doubled).
pub fn e8m0_half(e: u8) -> f32 {
    let bits = if e < 2 { 0x0020_0000 << e } else { u32::from(e - 1) << 23 };
    f32::from_bits(bits)
}

/// Scale and minimum `j` of 0..8 from the 12 packed bytes of Q4_K and Q5_K.
pub fn scale_min(s: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4), (s[j + 4] >> 4) | ((s[j] >> 6) << 4))
    }
}

/// Scale `j` of 0..16 from the 12 packed bytes of Q3_K, its offset of 32 taken off.
pub fn scale_q3(s: &[u8], j: usize) -> i32 {
    let low = if j < 8 { s[j] & 15 } else { s[j - 8] >> 4 };
    let high = (s[8 + j % 4] >> (2 * (j / 4))) & 3;
    i32::from(low | (high << 4)) - 32
}

/// Scale `j` of 0..8 of an IQ4_XS block, its offset of 32 taken off.
pub fn scale_iq4xs(block: &[u8], j: usize) -> i32 {
    let low = (block[4 + j / 2] >> (4 * (j % 2))) & 15;
    let high = (u16::from_le_bytes([block[2], block[3]]) >> (2 * j)) & 3;
    i32::from(low) + 16 * i32::from(high) - 32
}

/// Dequantises one row (or several, back to back). `false` if the type has no decoder or the
/// lengths do not agree.
pub fn dequantize(ty: TensorType, bytes: &[u8], out: &mut [f32]) -> bool {
    if !TYPES.contains(&ty) || ty.row_bytes(out.len()) != Some(bytes.len()) {
        return false;
    }
    let blocks = bytes.chunks_exact(ty.block_bytes());
    for (b, y) in blocks.zip(out.chunks_exact_mut(ty.block_elems())) {
        block(ty, b, y);
    }
    true
}

fn block(ty: TensorType, b: &[u8], y: &mut [f32]) {
    match ty {
        TensorType::F32 => y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        TensorType::F16 => y[0] = half_at(b, 0),
        TensorType::BF16 => y[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        TensorType::Q8_0 => (0..32).for_each(|i| y[i] = half_at(b, 0) * f32::from(b[2 + i] as i8)),
        TensorType::Q4_0 => nibbles(&b[2..], y, |q, _| half_at(b, 0) * (f32::from(q) - 8.0)),
        TensorType::Q4_1 => nibbles(&b[4..], y, |q, _| half_at(b, 0) * f32::from(q) + half_at(b, 2)),
        TensorType::Q5_0 => {
            let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
            nibbles(&b[6..], y, |q, i| half_at(b, 0) * (f32::from(q) + 16.0 * bit(high, i) - 16.0));
        }
        TensorType::Q5_1 => {
            let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
            nibbles(&b[8..], y, |q, i| half_at(b, 0) * (f32::from(q) + 16.0 * bit(high, i)) + half_at(b, 2));
        }
        TensorType::Q2_K => {
            for (i, y) in y.iter_mut().enumerate() {
                let (scales, d, min) = (b[i / 16], half_at(b, 80), half_at(b, 82));
                let q = (b[16 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
                *y = d * f32::from(scales & 15) * f32::from(q) - min * f32::from(scales >> 4);
            }
        }
        TensorType::Q3_K => {
            for (i, y) in y.iter_mut().enumerate() {
                let low = (b[32 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
                let high = (b[i % 32] >> (i / 32)) & 1;
                let q = i32::from(low) + 4 * i32::from(high) - 4;
                *y = half_at(b, 108) * scale_q3(&b[96..108], i / 16) as f32 * q as f32;
            }
        }
        TensorType::Q4_K | TensorType::Q5_K => {
            let five = ty == TensorType::Q5_K;
            let codes = if five { &b[48..] } else { &b[16..] };
            for (i, y) in y.iter_mut().enumerate() {
                let (scale, min) = scale_min(&b[4..16], i / 32);
                let low = (codes[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4)) & 15;
                let high = if five { (b[16 + i % 32] >> (i / 32)) & 1 } else { 0 };
                let q = f32::from(low) + 16.0 * f32::from(high);
                *y = half_at(b, 0) * f32::from(scale) * q - half_at(b, 2) * f32::from(min);
            }
        }
        TensorType::Q6_K => {
            for (i, y) in y.iter_mut().enumerate() {
                let (n, l) = (i / 128, i % 128);
                let low = (b[n * 64 + l % 64] >> (l / 64 * 4)) & 15;
                let high = (b[128 + n * 32 + l % 32] >> (l / 32 * 2)) & 3;
                let q = f32::from(low | (high << 4)) - 32.0;
                *y = half_at(b, 208) * f32::from(b[192 + i / 16] as i8) * q;
            }
        }
        TensorType::IQ4_NL => nibbles(&b[2..], y, |q, _| half_at(b, 0) * f32::from(IQ4_VALUES[usize::from(q)])),
        TensorType::IQ4_XS => {
            for (j, y) in y.chunks_exact_mut(32).enumerate() {
                let d = half_at(b, 0) * scale_iq4xs(b, j) as f32;
                nibbles(&b[8 + 16 * j..], y, |q, _| d * f32::from(IQ4_VALUES[usize::from(q)]));
            }
        }
        TensorType::MXFP4 => nibbles(&b[1..], y, |q, _| e8m0_half(b[0]) * f32::from(FP4_VALUES[usize::from(q)])),
        _ => grid_block(ty, b, y),
    }
}

/// A block of one of the types with grids: 32 elements at a time, which share their scales' bits.
fn grid_block(ty: TensorType, b: &[u8], y: &mut [f32]) {
    for (j, y) in y.chunks_exact_mut(32).enumerate() {
        match ty {
            TensorType::IQ1_S | TensorType::IQ1_M => iq1(ty, b, j, y),
            TensorType::IQ2_XXS | TensorType::IQ2_XS | TensorType::IQ2_S => iq2(ty, b, j, y),
            TensorType::IQ3_XXS | TensorType::IQ3_S => iq3(ty, b, j, y),
            _ => unreachable!("checked by the caller"),
        }
    }
}

fn word16(b: &[u8], at: usize) -> u32 {
    u32::from(u16::from_le_bytes([b[at], b[at + 1]]))
}

fn word32(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// Elements `32j..32j + 32` of a block of IQ1: eight to an index of 11 bits, with an offset of an eighth up or down.
fn iq1(ty: TensorType, b: &[u8], j: usize, y: &mut [f32]) {
    for (l, y) in y.chunks_exact_mut(8).enumerate() {
        let (scale, low, high, down) = if ty == TensorType::IQ1_S {
            let qh = word16(b, 34 + 2 * j);
            let scale = half_at(b, 0) * (2 * (qh >> 12 & 7) + 1) as f32;
            (scale, b[2 + 4 * j + l], qh >> (3 * l) & 7, qh >> 15)
        } else {
            let words = [48, 50, 52, 54].map(|at| word16(b, at) as u16);
            let scale = u32::from(words[j / 2]) >> (6 * (j % 2) + 3 * (l / 2)) & 7;
            let scale = f16::from_bits(grids::iq1m_scale(words)).to_f32() * (2 * scale + 1) as f32;
            let qh = u32::from(b[32 + 2 * j + l / 2]) >> (4 * (l % 2));
            (scale, b[4 * j + l], qh & 7, qh >> 3 & 1)
        };
        let delta = if down == 1 { -0.125 } else { 0.125 };
        let grid = grids::IQ1[(u32::from(low) | high << 8) as usize].to_le_bytes();
        y.iter_mut().zip(grid).for_each(|(y, g)| *y = scale * (f32::from(g) - 1.0 + delta));
    }
}

/// Elements `32j..32j + 32` of a block of IQ2: eight to an index of 8, 9 or 10 bits.
fn iq2(ty: TensorType, b: &[u8], j: usize, y: &mut [f32]) {
    for (l, y) in y.chunks_exact_mut(8).enumerate() {
        let nibble = |at: usize| u32::from(b[at + j]) >> (4 * (l / 2)) & 15;
        let (scale, grid, signs) = match ty {
            TensorType::IQ2_XXS => {
                let signs = word32(b, 2 + 8 * j + 4);
                (signs >> 28, grids::IQ2_XXS[usize::from(b[2 + 8 * j + l])], grids::even_signs(signs >> (7 * l)))
            }
            TensorType::IQ2_XS => {
                let q = word16(b, 2 + 8 * j + 2 * l);
                (nibble(66), grids::IQ2_XS[(q & 511) as usize], grids::even_signs(q >> 9))
            }
            _ => {
                let high = usize::from(b[66 + j]) >> (2 * l) & 3;
                (nibble(74), grids::IQ2_S[usize::from(b[2 + 4 * j + l]) | high << 8], b[34 + 4 * j + l])
            }
        };
        signed(half_at(b, 0) * (0.5 + scale as f32) * 0.25, &grid.to_le_bytes(), signs, y);
    }
}

/// Elements `32j..32j + 32` of a block of IQ3: four to an index of 8 or 9 bits.
fn iq3(ty: TensorType, b: &[u8], j: usize, y: &mut [f32]) {
    for (l, y) in y.chunks_exact_mut(4).enumerate() {
        let low = usize::from(b[2 + 8 * j + l]);
        let (scale, grid, signs) = if ty == TensorType::IQ3_XXS {
            let signs = word32(b, 66 + 4 * j);
            let scale = (0.5 + (signs >> 28) as f32) * 0.5;
            (scale, grids::IQ3_XXS[low], grids::even_signs(signs >> (7 * (l / 2))))
        } else {
            let scale = 1.0 + 2.0 * f32::from(b[106 + j / 2] >> (4 * (j % 2)) & 15);
            (scale, grids::IQ3_S[low | (usize::from(b[66 + j]) >> l & 1) << 8], b[74 + 4 * j + l / 2])
        };
        signed(half_at(b, 0) * scale, &grid.to_le_bytes(), signs >> (4 * (l % 2)), y);
    }
}

/// Magnitudes with their signs, bit i set where value i is negative, times `scale`.
fn signed(scale: f32, magnitudes: &[u8], signs: u8, y: &mut [f32]) {
    for (i, (y, &m)) in y.iter_mut().zip(magnitudes).enumerate() {
        let sign = if signs >> i & 1 == 1 { -1.0 } else { 1.0 };
        *y = scale * f32::from(m) * sign;
    }
}

/// Sixteen bytes of which the low nibbles are the first sixteen elements.
fn nibbles(q: &[u8], y: &mut [f32], value: impl Fn(u8, usize) -> f32) {
    for i in 0..16 {
        y[i] = value(q[i] & 15, i);
        y[i + 16] = value(q[i] >> 4, i + 16);
    }
}

fn bit(word: u32, i: usize) -> f32 {
    ((word >> i) & 1) as f32
}

/// `y[r] = Σ w[r][c] * x[c]` in double precision; `w` dequantised, `y.len()` rows.
pub fn matvec(w: &[f32], x: &[f32], y: &mut [f64]) {
    for (y, row) in y.iter_mut().zip(w.chunks_exact(x.len())) {
        *y = row.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
    }
}

/// RMS norm in double precision.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(&x, &w)| (f64::from(x) * scale * f64::from(w)) as f32).collect()
}

/// Attention of one query over `n` keys and values (rows of `q.len()`), in double precision.
pub fn attend(q: &[f32], keys: &[f32], values: &[f32], n: usize) -> Vec<f32> {
    let dim = q.len();
    let scale = 1.0 / (dim as f64).sqrt();
    let dot = |k: &[f32]| q.iter().zip(k).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() * scale;
    let scores: Vec<f64> = keys.chunks_exact(dim).take(n).map(dot).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    let mut out = vec![0f64; dim];
    for (s, v) in scores.iter().zip(values.chunks_exact(dim)) {
        let p = (s - max).exp() / sum;
        out.iter_mut().zip(v).for_each(|(o, &v)| *o += p * f64::from(v));
    }
    out.into_iter().map(|o| o as f32).collect()
}

//! Random weights of every type, and their values by the plainest reading of the formats.

use half::{bf16, f16};

use crate::backend::cuda::modules::grid_bytes;
use crate::backend::reference;
use crate::gguf::TensorType;

/// A small generator with a fixed seed (xorshift64*).
pub(super) struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn word(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// In -1..1.
    pub fn unit(&mut self) -> f32 {
        (self.word() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.unit() * scale).collect()
    }
}

/// Offsets of the halves that scale a block.
fn scale_offsets(ty: TensorType) -> &'static [usize] {
    match ty {
        TensorType::Q4_1 | TensorType::Q5_1 | TensorType::Q4_K | TensorType::Q5_K => &[0, 2],
        TensorType::Q2_K => &[80, 82],
        TensorType::Q3_K => &[108],
        TensorType::Q6_K => &[208],
        _ => &[0],
    }
}

/// Random blocks whose values are about `scale` large at most.
pub fn random_rows(ty: TensorType, elems: usize, scale: f32, seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    if ty == TensorType::F32 {
        return rng.floats(elems, scale).iter().flat_map(|v| v.to_le_bytes()).collect();
    }
    if ty == TensorType::F16 {
        let v = rng.floats(elems, scale);
        return v.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
    }
    if ty == TensorType::BF16 {
        let v = rng.floats(elems, scale);
        return v.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
    }
    let size = ty.block_bytes();
    let mut out = vec![0u8; elems / ty.block_elems() * size];
    for chunk in out.chunks_mut(8) {
        chunk.copy_from_slice(&rng.word().to_le_bytes()[..chunk.len()]);
    }
    // The largest multiple of the block's scale that a value can have.
    let reach = match ty {
        TensorType::Q8_0 | TensorType::IQ4_NL => 127.0,
        TensorType::Q4_K | TensorType::Q5_K => 63.0 * 31.0,
        TensorType::Q2_K => 45.0,
        TensorType::Q3_K => 128.0,
        TensorType::Q6_K | TensorType::IQ4_XS => 32.0 * 127.0,
        TensorType::IQ1_S | TensorType::IQ1_M => 15.0 * 1.125,
        TensorType::IQ2_XXS | TensorType::IQ2_XS | TensorType::IQ2_S => 15.5 * 0.25 * 43.0,
        TensorType::IQ3_XXS => 15.5 * 0.5 * 62.0,
        TensorType::IQ3_S => 31.0 * 15.0,
        _ => 16.0,
    };
    for block in out.chunks_mut(size) {
        if ty == TensorType::MXFP4 {
            block[0] = (126.0 + (scale / 12.0).log2()) as u8;
            continue;
        }
        if ty == TensorType::IQ1_M {
            let d = f16::from_f32(scale / reach * (1.0 + 0.5 * rng.unit()));
            for (k, at) in [49, 51, 53, 55].into_iter().enumerate() {
                block[at] = block[at] & 15 | ((d.to_bits() >> (4 * k) & 15) << 4) as u8;
            }
            continue;
        }
        for at in scale_offsets(ty) {
            let d = f16::from_f32(scale / reach * (1.0 + 0.5 * rng.unit()));
            block[*at..at + 2].copy_from_slice(&d.to_le_bytes());
        }
    }
    out
}

const IQ4: [i32; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
const FP4: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

fn half_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

fn nibble(qs: &[u8], i: usize) -> i32 {
    i32::from(if i < 16 { qs[i] & 15 } else { qs[i - 16] >> 4 })
}

/// Scale and minimum of part `j` of Q4_K and Q5_K.
fn scale_min(s: &[u8], j: usize) -> (f32, f32) {
    let (sc, m) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4), (s[j + 4] >> 4) | ((s[j] >> 6) << 4))
    };
    (f32::from(sc), f32::from(m))
}

/// Element `i` of one block.
fn value(ty: TensorType, b: &[u8], i: usize) -> f32 {
    let (j, l) = (i / 32, i % 32);
    let fifth = |qh: &[u8]| i32::from(qh[i / 8] >> (i % 8) & 1) << 4;
    match ty {
        TensorType::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        TensorType::F16 => half_at(b, 0),
        TensorType::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        TensorType::Q8_0 => half_at(b, 0) * f32::from(b[2 + i] as i8),
        TensorType::Q4_0 => half_at(b, 0) * (nibble(&b[2..], i) - 8) as f32,
        TensorType::Q4_1 => half_at(b, 0) * nibble(&b[4..], i) as f32 + half_at(b, 2),
        TensorType::Q5_0 => half_at(b, 0) * ((nibble(&b[6..], i) | fifth(&b[2..])) - 16) as f32,
        TensorType::Q5_1 => half_at(b, 0) * (nibble(&b[8..], i) | fifth(&b[4..])) as f32 + half_at(b, 2),
        TensorType::IQ4_NL => half_at(b, 0) * IQ4[nibble(&b[2..], i) as usize] as f32,
        TensorType::MXFP4 => FP4[nibble(&b[1..], i) as usize] * (f32::from(b[0]) - 127.0).exp2(),
        TensorType::Q2_K => {
            let q = b[16 + 32 * (j / 4) + l] >> (2 * (j % 4)) & 3;
            let s = b[i / 16];
            half_at(b, 80) * f32::from(s & 15) * f32::from(q) - half_at(b, 82) * f32::from(s >> 4)
        }
        TensorType::Q3_K => {
            let q = i32::from(b[32 + 32 * (j / 4) + l] >> (2 * (j % 4)) & 3);
            let q = q - if b[l] >> j & 1 == 1 { 0 } else { 4 };
            let (s, k) = (&b[96..108], i / 16);
            let low = if k < 8 { s[k] & 15 } else { s[k - 8] >> 4 };
            let scale = low | (s[8 + k % 4] >> (2 * (k / 4)) & 3) << 4;
            half_at(b, 108) * (f32::from(scale) - 32.0) * q as f32
        }
        TensorType::Q4_K | TensorType::Q5_K => {
            let five = ty == TensorType::Q5_K;
            let qs = if five { &b[48..] } else { &b[16..] };
            let q = qs[32 * (j / 2) + l] >> (4 * (j % 2)) & 15;
            let q = if five { q | (b[16 + l] >> j & 1) << 4 } else { q };
            let (sc, m) = scale_min(&b[4..16], j);
            half_at(b, 0) * sc * f32::from(q) - half_at(b, 2) * m
        }
        TensorType::Q6_K => {
            let (n, part) = (j / 4, j % 4);
            let low = b[64 * n + 32 * (part % 2) + l] >> (4 * (part / 2)) & 15;
            let high = b[128 + 32 * n + l] >> (2 * part) & 3;
            let scale = f32::from(b[192 + i / 16] as i8);
            half_at(b, 208) * scale * (f32::from(low | high << 4) - 32.0)
        }
        TensorType::IQ4_XS => {
            let low = b[4 + j / 2] >> (4 * (j % 2)) & 15;
            let high = u16::from_le_bytes([b[2], b[3]]) >> (2 * j) & 3;
            let scale = i32::from(low) | i32::from(high) << 4;
            half_at(b, 0) * (scale - 32) as f32 * IQ4[nibble(&b[8 + 16 * j..], l) as usize] as f32
        }
        _ => f32::NAN,
    }
}

/// The values of whole blocks. Types with grids have one plain reading, which is checked against gguf-py's.
pub fn values(ty: TensorType, bytes: &[u8]) -> Vec<f32> {
    if grid_bytes(ty) > 0 {
        let mut out = vec![f32::NAN; bytes.len() / ty.block_bytes() * ty.block_elems()];
        reference::dequantize(ty, bytes, &mut out);
        return out;
    }
    let n = ty.block_elems();
    bytes.chunks(ty.block_bytes()).flat_map(|b| (0..n).map(move |i| value(ty, b, i))).collect()
}

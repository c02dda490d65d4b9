//! Every quantised type brought to one form, 256 elements at a time.
//!
//! `weight = scale * q - min` with unsigned 8-bit `q` and one scale and one min for 16 elements:
//! all block types of the list are of this form, so one dot product and one matrix product serve
//! them all. The functions are plain loops that are compiled for each instruction set.

#![allow(clippy::needless_range_loop, reason = "indices are the layouts' own")]

use crate::gguf::{TensorType, grids};

/// Elements of a packet.
pub(super) const PACKET: usize = 256;
/// Elements that share a scale.
pub(super) const SUB: usize = 16;
/// Scales of a packet.
pub(super) const SUBS: usize = PACKET / SUB;

/// 256 elements of a row.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct Packet {
    pub q: [u8; PACKET],
    pub scale: [f32; SUBS],
    pub min: [f32; SUBS],
}

// SAFETY: arrays of plain numbers without padding; all zeroes is a value.
unsafe impl bytemuck::Zeroable for Packet {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Packet {}
const _: () = assert!(size_of::<Packet>() == PACKET + 8 * SUBS);

/// IEEE half to single precision, subnormals included.
#[inline(always)]
pub(super) fn f16(bits: u16) -> f32 {
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (u32::from(bits & 0x8000) << 16))
}

#[inline(always)]
fn half_at(b: &[u8], at: usize) -> f32 {
    f16(u16::from_le_bytes([b[at], b[at + 1]]))
}

/// A scale of MXFP4: 2^(e - 128), since its table holds twice the values.
#[inline(always)]
pub(super) fn e8m0_half(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

/// The 4-bit codes of IQ4_NL and IQ4_XS, each plus 128. Source: ggml-common.h, `kvalues_iq4nl`.
pub(super) const IQ4: [u8; 16] = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];
/// The codes of MXFP4, doubled, each plus 128. Source: OCP Microscaling v1.0, E2M1.
pub(super) const MXFP4: [u8; 16] = [128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116];

/// Whether `q` uses all 8 bits (with a bias of 128), which 16-bit sums of products cannot hold.
pub(super) fn is_wide(ty: TensorType) -> bool {
    matches!(
        ty,
        TensorType::Q8_0
            | TensorType::IQ4_NL
            | TensorType::IQ4_XS
            | TensorType::MXFP4
            | TensorType::IQ2_XXS
            | TensorType::IQ2_XS
            | TensorType::IQ2_S
            | TensorType::IQ3_XXS
    )
}

/// Whether 32 elements share a scale and a min: two groups of a packet.
pub(super) fn is_paired(ty: TensorType) -> bool {
    !matches!(
        ty,
        TensorType::Q2_K
            | TensorType::Q3_K
            | TensorType::Q6_K
            | TensorType::IQ1_M
            | TensorType::IQ2_XS
            | TensorType::IQ2_S
    )
}

/// A quantised type, known when the code is compiled.
pub(super) trait Quant {
    /// Elements of a block.
    const BLOCK: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// Unpacks the block `b` to sub-groups from `at` (in elements) of a packet.
    fn unpack(b: &[u8], p: &mut Packet, at: usize);
}

#[inline(always)]
fn set32(p: &mut Packet, at: usize, scale: f32, min: f32) {
    let s = at / SUB;
    p.scale[s] = scale;
    p.scale[s + 1] = scale;
    p.min[s] = min;
    p.min[s + 1] = min;
}

#[inline(always)]
fn nibbles(qs: &[u8], q: &mut [u8]) {
    let (lo, hi) = q.split_at_mut(16);
    for i in 0..16 {
        lo[i] = qs[i] & 15;
        hi[i] = qs[i] >> 4;
    }
}

#[inline(always)]
fn fifth_bits(qh: &[u8], q: &mut [u8]) {
    let bits = u32::from_le_bytes([qh[0], qh[1], qh[2], qh[3]]);
    for (i, q) in q.iter_mut().enumerate() {
        *q |= ((bits >> i & 1) as u8) << 4;
    }
}

#[inline(always)]
fn codes(qs: &[u8], table: &[u8; 16], q: &mut [u8]) {
    let (lo, hi) = q.split_at_mut(16);
    for i in 0..16 {
        lo[i] = table[usize::from(qs[i] & 15)];
        hi[i] = table[usize::from(qs[i] >> 4)];
    }
}

macro_rules! quant {
    ($name:ident, $($rest:tt)*) => { quant!($name = $name, $($rest)*); };
    ($name:ident = $ty:ident, $elems:literal, $bytes:literal, |$b:ident, $p:ident, $at:ident| $body:block) => {
        pub(super) struct $name;
        const _: () = assert!(TensorType::$ty.block_bytes() == $bytes && TensorType::$ty.block_elems() == $elems);
        impl Quant for $name {
            const BLOCK: usize = $elems;
            const BYTES: usize = $bytes;
            #[inline(always)]
            fn unpack(b: &[u8], $p: &mut Packet, $at: usize) {
                let $b: &[u8; $bytes] = match b.first_chunk() {
                    Some(b) => b,
                    None => return,
                };
                $body
            }
        }
    };
}

quant!(Q4_0, 32, 18, |b, p, at| {
    let d = half_at(b, 0);
    nibbles(&b[2..18], &mut p.q[at..at + 32]);
    set32(p, at, d, 8.0 * d);
});
quant!(Q4_1, 32, 20, |b, p, at| {
    nibbles(&b[4..20], &mut p.q[at..at + 32]);
    set32(p, at, half_at(b, 0), -half_at(b, 2));
});
quant!(Q5_0, 32, 22, |b, p, at| {
    let d = half_at(b, 0);
    nibbles(&b[6..22], &mut p.q[at..at + 32]);
    fifth_bits(&b[2..6], &mut p.q[at..at + 32]);
    set32(p, at, d, 16.0 * d);
});
quant!(Q5_1, 32, 24, |b, p, at| {
    nibbles(&b[8..24], &mut p.q[at..at + 32]);
    fifth_bits(&b[4..8], &mut p.q[at..at + 32]);
    set32(p, at, half_at(b, 0), -half_at(b, 2));
});
quant!(Q8_0, 32, 34, |b, p, at| {
    let d = half_at(b, 0);
    for i in 0..32 {
        p.q[at + i] = b[2 + i] ^ 0x80;
    }
    set32(p, at, d, 128.0 * d);
});
quant!(IQ4_NL, 32, 18, |b, p, at| {
    let d = half_at(b, 0);
    codes(&b[2..18], &IQ4, &mut p.q[at..at + 32]);
    set32(p, at, d, 128.0 * d);
});
quant!(MXFP4Block = MXFP4, 32, 17, |b, p, at| {
    let d = e8m0_half(b[0]);
    codes(&b[1..17], &MXFP4, &mut p.q[at..at + 32]);
    set32(p, at, d, 128.0 * d);
});
quant!(Q2_K, 256, 84, |b, p, _at| {
    let (d, dmin) = (half_at(b, 80), half_at(b, 82));
    for i in 0..16 {
        p.scale[i] = d * f32::from(b[i] & 15);
        p.min[i] = dmin * f32::from(b[i] >> 4);
    }
    for n in 0..2 {
        for j in 0..4 {
            for l in 0..32 {
                p.q[128 * n + 32 * j + l] = b[16 + 32 * n + l] >> (2 * j) & 3;
            }
        }
    }
});
quant!(Q3_K, 256, 110, |b, p, _at| {
    let d = half_at(b, 108);
    let s = &b[96..108];
    for i in 0..16 {
        let low = if i < 8 { s[i] & 15 } else { s[i - 8] >> 4 };
        let high = s[8 + i % 4] >> (2 * (i / 4)) & 3;
        let scale = d * (f32::from(low | high << 4) - 32.0);
        p.scale[i] = scale;
        p.min[i] = 4.0 * scale;
    }
    for n in 0..2 {
        for j in 0..4 {
            for l in 0..32 {
                p.q[128 * n + 32 * j + l] = b[32 + 32 * n + l] >> (2 * j) & 3 | (b[l] >> (4 * n + j) & 1) << 2;
            }
        }
    }
});
quant!(Q4_K, 256, 144, |b, p, _at| {
    scales_k4(b, p);
    for j in 0..4 {
        for l in 0..32 {
            p.q[64 * j + l] = b[16 + 32 * j + l] & 15;
            p.q[64 * j + 32 + l] = b[16 + 32 * j + l] >> 4;
        }
    }
});
quant!(Q5_K, 256, 176, |b, p, _at| {
    scales_k4(b, p);
    for j in 0..4 {
        for l in 0..32 {
            p.q[64 * j + l] = b[48 + 32 * j + l] & 15 | (b[16 + l] >> (2 * j) & 1) << 4;
            p.q[64 * j + 32 + l] = b[48 + 32 * j + l] >> 4 | (b[16 + l] >> (2 * j + 1) & 1) << 4;
        }
    }
});
quant!(Q6_K, 256, 210, |b, p, _at| {
    let d = half_at(b, 208);
    for i in 0..16 {
        let scale = d * f32::from(b[192 + i] as i8);
        p.scale[i] = scale;
        p.min[i] = 32.0 * scale;
    }
    for n in 0..2 {
        let (ql, qh) = (64 * n, 128 + 32 * n);
        for l in 0..32 {
            p.q[128 * n + l] = b[ql + l] & 15 | (b[qh + l] & 3) << 4;
            p.q[128 * n + 32 + l] = b[ql + 32 + l] & 15 | (b[qh + l] >> 2 & 3) << 4;
            p.q[128 * n + 64 + l] = b[ql + l] >> 4 | (b[qh + l] >> 4 & 3) << 4;
            p.q[128 * n + 96 + l] = b[ql + 32 + l] >> 4 | (b[qh + l] >> 6) << 4;
        }
    }
});
quant!(IQ4_XS, 256, 136, |b, p, _at| {
    let d = half_at(b, 0);
    let high = u16::from_le_bytes([b[2], b[3]]);
    for i in 0..8 {
        let low = b[4 + i / 2] >> (4 * (i % 2)) & 15;
        let scale = d * (f32::from(low | ((high >> (2 * i) & 3) as u8) << 4) - 32.0);
        codes(&b[8 + 16 * i..24 + 16 * i], &IQ4, &mut p.q[32 * i..32 * i + 32]);
        set32(p, 32 * i, scale, 128.0 * scale);
    }
});

quant!(IQ1_S, 256, 50, |b, p, _at| {
    let d = half_at(b, 0);
    for j in 0..8 {
        let qh = word16(b, 34 + 2 * j);
        let scale = d * (2 * (qh >> 12 & 7) + 1) as f32;
        set32(p, 32 * j, scale, scale * if qh >> 15 == 1 { 1.125 } else { 0.875 });
        for l in 0..4 {
            let grid = grids::IQ1[usize::from(b[2 + 4 * j + l]) | (qh >> (3 * l) & 7) << 8];
            eight(p, 32 * j + 8 * l, grid);
        }
    }
});
quant!(IQ1_M, 256, 56, |b, p, _at| {
    let words = std::array::from_fn(|i| word16(b, 48 + 2 * i) as u16);
    // Eighths: a value and its offset of an eighth up or down, plus 9, are at most 18.
    let d = 0.125 * f16(grids::iq1m_scale(words));
    for i in 0..SUBS {
        let scale = d * (2 * (words[i / 4] >> (3 * (i % 4)) & 7) + 1) as f32;
        p.scale[i] = scale;
        p.min[i] = 9.0 * scale;
        for l in 0..2 {
            let qh = usize::from(b[32 + i]) >> (4 * l);
            let up = if qh & 8 == 0 { 0x0202_0202_0202_0202 } else { 0 };
            eight(p, SUB * i + 8 * l, 8 * grids::IQ1[usize::from(b[2 * i + l]) | (qh & 7) << 8] + up);
        }
    }
});
quant!(IQ2_XXS, 256, 66, |b, p, _at| {
    let d = 0.25 * half_at(b, 0);
    for j in 0..8 {
        let codes = word32(b, 6 + 8 * j);
        let scale = d * (0.5 + (codes >> 28) as f32);
        set32(p, 32 * j, scale, 128.0 * scale);
        for l in 0..4 {
            let grid = grids::IQ2_XXS[usize::from(b[2 + 8 * j + l])];
            eight(p, 32 * j + 8 * l, signed(grid, grids::even_signs(codes >> (7 * l))));
        }
    }
});
quant!(IQ2_XS, 256, 74, |b, p, _at| {
    scales_iq2(&b[66..74], half_at(b, 0), p);
    for i in 0..PACKET / 8 {
        let q = word16(b, 2 + 2 * i);
        eight(p, 8 * i, signed(grids::IQ2_XS[q & 511], grids::even_signs((q >> 9) as u32)));
    }
});
quant!(IQ2_S, 256, 82, |b, p, _at| {
    scales_iq2(&b[74..82], half_at(b, 0), p);
    for i in 0..PACKET / 8 {
        let high = usize::from(b[66 + i / 4]) >> (2 * (i % 4)) & 3;
        eight(p, 8 * i, signed(grids::IQ2_S[usize::from(b[2 + i]) | high << 8], b[34 + i]));
    }
});
quant!(IQ3_XXS, 256, 98, |b, p, _at| {
    let d = 0.5 * half_at(b, 0);
    for j in 0..8 {
        let codes = word32(b, 66 + 4 * j);
        let scale = d * (0.5 + (codes >> 28) as f32);
        set32(p, 32 * j, scale, 128.0 * scale);
        for l in 0..4 {
            let at = 2 + 8 * j + 2 * l;
            let grid = two(grids::IQ3_XXS[usize::from(b[at])], grids::IQ3_XXS[usize::from(b[at + 1])]);
            eight(p, 32 * j + 8 * l, signed(grid, grids::even_signs(codes >> (7 * l))));
        }
    }
});
quant!(IQ3_S, 256, 110, |b, p, _at| {
    let d = half_at(b, 0);
    for j in 0..8 {
        let scale = d * f32::from(2 * (b[106 + j / 2] >> (4 * (j % 2)) & 15) + 1);
        set32(p, 32 * j, scale, 15.0 * scale);
        for l in 0..4 {
            let entry = |i: usize| grids::IQ3_S[usize::from(b[2 + 8 * j + i]) | (usize::from(b[66 + j]) >> i & 1) << 8];
            let grid = signed(two(entry(2 * l), entry(2 * l + 1)), b[74 + 4 * j + l]);
            // From 128 down to 15, as what is left: bytes between 113 and 143.
            eight(p, 32 * j + 8 * l, grid - 113 * ONES);
        }
    }
});

/// 1 in each byte.
const ONES: u64 = 0x0101_0101_0101_0101;

#[inline(always)]
fn word16(b: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes([b[at], b[at + 1]]))
}

#[inline(always)]
fn word32(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

#[inline(always)]
fn two(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

#[inline(always)]
fn eight(p: &mut Packet, at: usize, values: u64) {
    p.q[at..at + 8].copy_from_slice(&values.to_le_bytes());
}

/// Eight magnitudes from 1 to 127 with their signs, bit i set where value i is negative, each plus 128.
#[inline(always)]
fn signed(magnitudes: u64, signs: u8) -> u64 {
    let bits = (u64::from(signs) * ONES) & 0x8040_2010_0804_0201;
    let negative = (bits + 0x7f * ONES) >> 7 & ONES;
    // The complement of a magnitude is below 255: adding 1 carries to no other byte.
    ((magnitudes ^ (negative * 0xff)) + negative) ^ (0x80 * ONES)
}

/// The packed 4-bit scales of IQ2_XS and IQ2_S.
#[inline(always)]
fn scales_iq2(scales: &[u8], d: f32, p: &mut Packet) {
    for i in 0..SUBS {
        p.scale[i] = 0.25 * d * (0.5 + f32::from(scales[i / 2] >> (4 * (i % 2)) & 15));
        p.min[i] = 128.0 * p.scale[i];
    }
}

/// The packed 6-bit scales and mins of Q4_K and Q5_K, eight at a time.
#[inline(always)]
fn scales_k4(b: &[u8], p: &mut Packet) {
    let (d, dmin) = (half_at(b, 0), half_at(b, 2));
    let word = |i: usize| u64::from(u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]));
    let (low, mid, high) = (word(4), word(8), word(12));
    let scales = (low & 0x3f3f_3f3f) | ((high & 0x0f0f_0f0f) | (low >> 6 & 0x0303_0303) << 4) << 32;
    let mins = (mid & 0x3f3f_3f3f) | ((high >> 4 & 0x0f0f_0f0f) | (mid >> 6 & 0x0303_0303) << 4) << 32;
    let (scales, mins) = (scales.to_le_bytes(), mins.to_le_bytes());
    let (scales, mins): ([u8; SUBS], [u8; SUBS]) =
        (std::array::from_fn(|i| scales[i / 2]), std::array::from_fn(|i| mins[i / 2]));
    for i in 0..SUBS {
        p.scale[i] = d * f32::from(scales[i]);
        p.min[i] = dmin * f32::from(mins[i]);
    }
}

/// Unpacks the next packet of a row of `cols` elements; elements beyond the row count as nothing.
#[inline(always)]
pub(super) fn packet<Q: Quant>(row: &[u8], index: usize, cols: usize, p: &mut Packet) {
    let n = (cols - index * PACKET).min(PACKET);
    let per_packet = PACKET / Q::BLOCK;
    let blocks = &row[index * per_packet * Q::BYTES..];
    if n == PACKET {
        for i in 0..per_packet {
            Q::unpack(&blocks[i * Q::BYTES..], p, i * Q::BLOCK);
        }
        return;
    }
    for i in 0..n / Q::BLOCK {
        Q::unpack(&blocks[i * Q::BYTES..], p, i * Q::BLOCK);
    }
    p.q[n..].fill(0);
    p.scale[n / SUB..].fill(0.0);
    p.min[n / SUB..].fill(0.0);
}

//! Blocks of 32 elements with one scale.

use super::{Scale, largest};
use crate::backend::reference::{FP4_VALUES, IQ4_VALUES, e8m0_half};
use crate::gguf::TensorType;

/// Quantises 32 elements; `false` if their scale is larger than a half.
#[inline(always)]
pub(super) fn block(ty: TensorType, x: &[f32], b: &mut [u8]) -> bool {
    let Ok(x) = <&[f32; 32]>::try_from(x) else { return false };
    match ty {
        TensorType::Q8_0 => q8_0(x, b),
        TensorType::Q4_0 => symmetric(x, b, 8.0),
        TensorType::Q5_0 => symmetric(x, b, 16.0),
        TensorType::Q4_1 => with_minimum(x, b, 15.0),
        TensorType::Q5_1 => with_minimum(x, b, 31.0),
        TensorType::IQ4_NL => iq4_nl(x, b),
        _ => {
            mxfp4(x, b);
            Some(())
        }
    }
    .is_some()
}

#[inline(always)]
fn q8_0(x: &[f32; 32], b: &mut [u8]) -> Option<()> {
    let d = Scale::new(largest(x).abs() / 127.0)?;
    let id = d.inverse();
    d.put(b);
    x.iter().zip(&mut b[2..]).for_each(|(x, q)| *q = (x * id).round() as i8 as u8);
    Some(())
}

/// Two codes of 4 bits a byte, the first sixteen elements in the low halves.
#[inline(always)]
fn put_nibbles(codes: &[u8; 32], b: &mut [u8]) {
    for i in 0..16 {
        b[i] = codes[i] & 15 | (codes[i + 16] & 15) << 4;
    }
}

/// The fifth bits of all codes, and their nibbles.
#[inline(always)]
fn put_codes(codes: &[u8; 32], b: &mut [u8], five: bool) {
    let Some(rest) = five.then_some(4) else { return put_nibbles(codes, b) };
    let high = codes.iter().enumerate().fold(0u32, |h, (i, c)| h | u32::from(c >> 4) << i);
    b[..rest].copy_from_slice(&high.to_le_bytes());
    put_nibbles(codes, &mut b[rest..]);
}

/// Q4_0 and Q5_0: the largest element is `-half` steps, whatever its sign.
#[inline(always)]
fn symmetric(x: &[f32; 32], b: &mut [u8], half: f32) -> Option<()> {
    let d = Scale::new(largest(x) / -half)?;
    let id = d.inverse();
    d.put(b);
    let codes = x.map(|x| (x * id + (half + 0.5)).clamp(0.0, 2.0 * half - 1.0) as u8);
    put_codes(&codes, &mut b[2..], half == 16.0);
    Some(())
}

/// Q4_1 and Q5_1: steps from the least element to the largest.
#[inline(always)]
fn with_minimum(x: &[f32; 32], b: &mut [u8], steps: f32) -> Option<()> {
    let min = x.iter().fold(f32::MAX, |m, v| m.min(*v));
    let max = x.iter().fold(f32::MIN, |m, v| m.max(*v));
    // The difference of two finite numbers may be infinite.
    let d = Scale::new(max / steps - min / steps).filter(|_| (max - min).is_finite())?;
    let d = if d.coarse { d } else { Scale::new((max - min) / steps)? };
    let least = half::f16::from_f32(min);
    if !least.is_finite() {
        return None;
    }
    let from = if d.coarse { least.to_f32() } else { min };
    let id = d.inverse();
    d.put(b);
    b[2..4].copy_from_slice(&least.to_le_bytes());
    let codes = x.map(|x| ((x - from) * id + 0.5).clamp(0.0, steps) as u8);
    put_codes(&codes, &mut b[4..], steps == 31.0);
    Some(())
}

/// The index of the nearest of the values of IQ4, of two as near the higher.
#[inline(always)]
fn nearest_iq4(x: f32) -> u8 {
    // Between neighbours, where the nearer one changes.
    (1..16).fold(0, |n, i| n + u8::from(x * 2.0 >= f32::from(i16::from(IQ4_VALUES[i]) + i16::from(IQ4_VALUES[i - 1]))))
}

/// Scales near the one that the largest element asks for, and of those the one with the least square error, elements weighed by
/// their squares.
#[inline(always)]
fn iq4_nl(x: &[f32; 32], b: &mut [u8]) -> Option<()> {
    let max = largest(x);
    // Squares of squares have the range of floats for themselves.
    let by = super::supers::to_one(max.abs());
    let y = x.map(|v| v * by);
    let max = max * by;
    let sums = |id: f32| {
        y.iter().fold((0.0, 0.0), |(xq, qq), v| {
            let q = f32::from(IQ4_VALUES[usize::from(nearest_iq4(id * v))]);
            (xq + v * v * q * v, qq + v * v * q * q)
        })
    };
    let first = f32::from(IQ4_VALUES[0]);
    let (xq, qq) = sums(if max == 0.0 { 0.0 } else { -first / max });
    let mut d = if qq > 0.0 { xq / qq } else { 0.0 };
    let mut best = d * xq;
    for step in -7i8..=7 {
        let (xq, qq) = if max == 0.0 { (0.0, 0.0) } else { sums((f32::from(step) + first) / max) };
        if qq > 0.0 && xq * xq > best * qq {
            d = xq / qq;
            best = d * xq;
        }
    }
    let d = Scale::fitted(d / by)?;
    let id = d.inverse();
    d.put(b);
    put_nibbles(&x.map(|x| nearest_iq4(id * x)), &mut b[2..]);
    Some(())
}

/// The exponent of the largest element less that of the largest value, 6.
#[inline(always)]
fn mxfp4(x: &[f32; 32], b: &mut [u8]) {
    let max = largest(x).abs();
    let e = if max == 0.0 { 0 } else { (exponent(max) - 2 + 127).clamp(0, 254) as u8 };
    let d = e8m0_half(e);
    let code = |x: f32| {
        let mut best = (x.abs(), 0u8);
        for (i, v) in FP4_VALUES.iter().enumerate().skip(1) {
            let error = (f32::from(*v) * d - x).abs();
            if error < best.0 {
                best = (error, i as u8);
            }
        }
        best.1
    };
    b[0] = e;
    put_nibbles(&x.map(code), &mut b[1..]);
}

/// `floor(log2(x))` of a positive number.
fn exponent(x: f32) -> i32 {
    let bits = x.to_bits() >> 23;
    // Of a subnormal, as many below the least normal as its highest bit says.
    if bits == 0 { -118 - x.to_bits().leading_zeros() as i32 } else { bits as i32 - 127 }
}

//! Super-blocks of 256 elements: groups with scales of a few bits, by one scale in half precision.

use super::{Scale, largest, nearest, sum};
use crate::gguf::TensorType;

/// A power of two that brings a positive magnitude to 1..2, so that squares neither vanish nor overflow.
#[inline(always)]
pub(super) fn to_one(magnitude: f32) -> f32 {
    let exponent = (magnitude.to_bits() >> 23) as i32;
    // From 2^-126 to 2^126: both it and its inverse are normal.
    f32::from_bits(((254 - exponent).clamp(1, 253) as u32) << 23)
}

/// How a group's scale and minimum are searched.
struct Search {
    /// Largest code.
    codes: f32,
    /// Steps of a tenth by which the number of codes over the range varies, and from where on.
    from: f32,
    tries: u8,
}

/// Whole numbers of steps from `min`, up to so many.
#[inline(always)]
fn codes(x: &[f32; 32], min: f32, inverse: f32, most: f32) -> [f32; 32] {
    of(|i| nearest(inverse * (x[i] - min)).max(0.0).min(most))
}

/// The weighted square error of codes.
#[inline(always)]
fn error(x: &[f32; 32], w: &[f32; 32], codes: &[f32; 32], scale: f32, min: f32) -> f32 {
    sum(of::<32>(|i| {
        let e = scale * codes[i] + min - x[i];
        w[i] * (e * e)
    }))
}

/// Scale and minimum (negated) of a group with the least square error, elements weighed by the group's size and their own:
/// least squares for the codes that each try gives.
#[inline(always)]
fn search(x: &[f32; 32], s: &Search) -> (f32, f32) {
    let size = (sum(of::<32>(|i| x[i] * x[i])) / 32.0).sqrt();
    let w: [f32; 32] = of(|i| size + x[i].abs());
    let mut min = x.iter().fold(0.0f32, |m, v| m.min(*v));
    let max = x.iter().fold(f32::MIN, |m, v| m.max(*v));
    if max == min {
        return (0.0, -min);
    }
    let (sum_w, sum_x) = (sum(w), sum(of::<32>(|i| w[i] * x[i])));
    let mut scale = (max - min) / s.codes;
    let mut least = error(x, &w, &codes(x, min, s.codes / (max - min), s.codes), scale, min);
    for i in 0..=s.tries {
        // From the best minimum so far.
        let l = codes(x, min, (s.from + 0.1 * f32::from(i) + s.codes) / (max - min), s.codes);
        let wl: [f32; 32] = of(|i| w[i] * l[i]);
        let (sum_l, sum_ll, sum_xl) = (sum(wl), sum(of::<32>(|i| wl[i] * l[i])), sum(of::<32>(|i| wl[i] * x[i])));
        let det = sum_w * sum_ll - sum_l * sum_l;
        if det <= 0.0 {
            continue;
        }
        let mut fit = ((sum_w * sum_xl - sum_x * sum_l) / det, (sum_ll * sum_x - sum_l * sum_xl) / det);
        if fit.1 > 0.0 {
            fit = (sum_xl / sum_ll, 0.0);
        }
        let e = error(x, &w, &l, fit.0, fit.1);
        if e < least {
            ((scale, min), least) = (fit, e);
        }
    }
    (scale, -min)
}

#[inline(always)]
fn of<const N: usize>(f: impl Fn(usize) -> f32) -> [f32; N] {
    let mut out = [0.0; N];
    for (i, v) in out.iter_mut().enumerate() {
        *v = f(i);
    }
    out
}

/// Scales of groups as numbers of 6 bits by one scale: that, and the numbers, `least` or more for scales above 0. `by` is what
/// the groups were multiplied with.
#[inline(always)]
fn by_one_scale(scales: &[f32; 8], by: f32, least: f32) -> Option<(Scale, [u8; 8])> {
    let max = scales.iter().fold(0.0f32, |m, s| m.max(*s));
    let d = Scale::new(max / by / 63.0)?;
    let inverse = match d.coarse {
        false if max > 0.0 => 63.0 / max,
        false => 0.0,
        true => 1.0 / (d.by * by),
    };
    Some((d, scales.map(|s| nearest(inverse * s).clamp(if s > 0.0 { least } else { 0.0 }, 63.0) as u8)))
}

/// Q4_K and Q5_K: `x ≈ d * scale * code - dmin * minimum`, scale and minimum of each 32. `false` if a scale is larger than a half.
#[inline(always)]
pub(super) fn with_minimum(ty: TensorType, x: &[f32], b: &mut [u8]) -> bool {
    let s = match ty {
        TensorType::Q4_K => Search { codes: 15.0, from: -1.0, tries: 20 },
        _ => Search { codes: 31.0, from: -0.5, tries: 15 },
    };
    let by = to_one(largest(x).abs());
    let (mut scales, mut mins) = ([0.0; 8], [0.0; 8]);
    for (j, x) in x.chunks_exact(32).enumerate() {
        (scales[j], mins[j]) = search(&of(|i| x[i] * by), &s);
    }
    // A group whose scale were none would be its minimum throughout.
    let (Some((d, scales)), Some((dmin, mins))) = (by_one_scale(&scales, by, 1.0), by_one_scale(&mins, by, 0.0)) else {
        return false;
    };
    d.put(b);
    dmin.put(&mut b[2..]);
    for j in 0..4 {
        b[4 + j] = scales[j] | scales[j + 4] >> 4 << 6;
        b[8 + j] = mins[j] | mins[j + 4] >> 4 << 6;
        b[12 + j] = scales[j + 4] & 15 | (mins[j + 4] & 15) << 4;
    }
    let mut codes = [0u8; 256];
    for (j, (x, codes)) in x.chunks_exact(32).zip(codes.chunks_exact_mut(32)).enumerate() {
        let scale = d.half.to_f32() * f32::from(scales[j]);
        let min = dmin.half.to_f32() * f32::from(mins[j]);
        if scale != 0.0 {
            x.iter().zip(codes).for_each(|(x, c)| *c = nearest((x + min) / scale).max(0.0).min(s.codes) as u8);
        }
    }
    let five = ty == TensorType::Q5_K;
    let (high, low) = b[16..].split_at_mut(if five { 32 } else { 0 });
    high.fill(0);
    for (j, (codes, low)) in codes.chunks_exact(64).zip(low.chunks_exact_mut(32)).enumerate() {
        for i in 0..32 {
            low[i] = codes[i] & 15 | (codes[i + 32] & 15) << 4;
        }
        for (i, high) in high.iter_mut().enumerate() {
            *high |= (codes[i] >> 4) << (2 * j) | (codes[i + 32] >> 4) << (2 * j + 1);
        }
    }
    true
}

/// Codes of Q6_K to each side of zero.
const SIX: f32 = 32.0;

/// The sums of least squares for a scale of sixteen elements, weighed: element by code, and code by code.
#[inline(always)]
fn sums(x: &[f32; 16], w: &[f32; 16], inverse: f32) -> (f32, f32) {
    let l: [f32; 16] = of(|i| nearest(inverse * x[i]).clamp(-SIX, SIX - 1.0));
    let wl: [f32; 16] = of(|i| w[i] * l[i]);
    (sum(of::<16>(|i| wl[i] * x[i])), sum(of::<16>(|i| wl[i] * l[i])))
}

/// The scale of sixteen elements, codes from -32 to 31, with the least square error, elements weighed by their squares.
#[inline(always)]
fn search_symmetric(x: &[f32; 16]) -> f32 {
    let max = largest(x);
    // Beside the largest of the super-block, which is at least 1.
    if max.abs() < 1e-15 {
        return 0.0;
    }
    let w: [f32; 16] = of(|i| x[i] * x[i]);
    let (xl, ll) = sums(x, &w, -SIX / max);
    let mut scale = if ll > 0.0 { xl / ll } else { 0.0 };
    let mut best = scale * xl;
    for i in -9i8..=9 {
        if i == 0 {
            continue;
        }
        let (xl, ll) = sums(x, &w, -(SIX + 0.1 * f32::from(i)) / max);
        if ll > 0.0 && xl * xl > best * ll {
            scale = xl / ll;
            best = scale * xl;
        }
    }
    scale
}

/// Q6_K: `x ≈ d * scale * code`, a scale of 8 bits for each 16. `false` if the scale is larger than a half.
#[inline(always)]
pub(super) fn q6_k(x: &[f32], b: &mut [u8]) -> bool {
    let by = to_one(largest(x).abs());
    let mut scales = [0.0; 16];
    for (s, x) in scales.iter_mut().zip(x.chunks_exact(16)) {
        *s = search_symmetric(&of(|i| x[i] * by));
    }
    b.fill(0);
    let max = largest(&scales);
    if max == 0.0 {
        return true;
    }
    let Some(d) = Scale::new(max / by / -128.0) else { return false };
    let inverse = if d.coarse { 1.0 / (d.by * by) } else { -128.0 / max };
    d.put(&mut b[208..]);
    let mut codes = [0u8; 256];
    for (j, (x, codes)) in x.chunks_exact(16).zip(codes.chunks_exact_mut(16)).enumerate() {
        let scale = nearest(inverse * scales[j]).clamp(-128.0, 127.0);
        b[192 + j] = scale as i8 as u8;
        let scale = d.half.to_f32() * scale;
        if scale != 0.0 {
            let code = |x: f32| (nearest(x / scale).clamp(-SIX, SIX - 1.0) + SIX) as u8;
            x.iter().zip(codes).for_each(|(x, c)| *c = code(*x));
        }
    }
    for (n, codes) in codes.chunks_exact(128).enumerate() {
        for i in 0..64 {
            b[64 * n + i] = codes[i] & 15 | (codes[i + 64] & 15) << 4;
        }
        for i in 0..32 {
            let bits = |k: usize| codes[i + 32 * k] >> 4 << (2 * k);
            b[128 + 32 * n + i] = bits(0) | bits(1) | bits(2) | bits(3);
        }
    }
    true
}

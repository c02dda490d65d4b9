//! Rotary frequencies: every scaling comes down to one frequency a pair and one magnitude.
//!
//! Linear scaling divides positions. YaRN (arXiv 2309.00071) mixes the scaled and the unscaled
//! angle by a ramp over the pairs; both angles are linear in the position, so the mix is too.
//! `rope_freqs.weight` (Llama 3.1) divides each pair's frequency.

use super::ModelError;
use crate::backend::{Rope, RopeKind};

/// Scaling of rotary frequencies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// Context is this many times longer than trained.
        factor: f32,
    },
    /// YaRN.
    Yarn {
        /// Context is this many times longer than trained.
        factor: f32,
        /// Positions the model was trained on before scaling.
        original_ctx: usize,
        /// Multiplies the magnitude.
        attn_factor: f32,
        /// Share of extrapolation (1: full YaRN, 0: linear).
        ext_factor: f32,
        /// Rotations within the original context above which a pair is not scaled.
        beta_fast: f32,
        /// Rotations below which it is fully scaled.
        beta_slow: f32,
    },
}

/// Refuses numbers that frequencies cannot be divided by.
///
/// # Errors
/// With the first of them.
pub fn check_divisors(name: &str, divisors: &[f32]) -> Result<(), ModelError> {
    match divisors.iter().position(|d| !d.is_finite() || *d <= 0.0) {
        None => Ok(()),
        Some(i) => Err(ModelError::Values {
            name: name.into(),
            what: format!(
                "number {i} is {}, but rotary frequencies are divided by it, so one above 0 was expected",
                divisors[i]
            ),
        }),
    }
}

/// One of a model's rotary embeddings, whose divisors are not read yet.
#[derive(Clone, Copy, Debug)]
pub struct RopeSpec {
    /// Elements of a head that rotate.
    pub n_rot: usize,
    /// Base of the frequencies.
    pub base: f32,
    /// Their scaling.
    pub scaling: RopeScaling,
    /// Number of their divisors in [`super::Model::divisors`].
    pub divisors: Option<usize>,
    /// Contexts longer than the first take these divisors in place of those.
    pub long: Option<(usize, usize)>,
    /// Multiplies sine and cosine, beside what scaling does.
    pub magnitude: f32,
}

impl RopeSpec {
    /// The embedding for contexts of `n_ctx` tokens, with the divisors that were read; none of them stand for ones.
    pub fn rope(&self, kind: RopeKind, n_ctx: usize, divisors: &[Vec<f32>]) -> Rope {
        let which = match self.long {
            Some((most, long)) if n_ctx > most => Some(long),
            _ => self.divisors,
        };
        let divisors = which.and_then(|i| divisors.get(i)).map(Vec::as_slice);
        let rope = rope(kind, self.n_rot, self.base, self.scaling, divisors);
        Rope { magnitude: rope.magnitude * self.magnitude, ..rope }
    }
}

/// The rotary embedding of a model. `divisors` is `rope_freqs.weight`: one a pair, if present.
fn rope(kind: RopeKind, n_rot: usize, base: f32, scaling: RopeScaling, divisors: Option<&[f32]>) -> Rope {
    let plain = |i: usize| {
        let f = f64::from(base).powf(-2.0 * i as f64 / n_rot as f64);
        f / divisors.and_then(|d| d.get(i)).map_or(1.0, |&d| f64::from(d))
    };
    let mut magnitude = 1.0;
    let scale: Box<dyn Fn(usize) -> f64> = match scaling {
        RopeScaling::None => Box::new(|_| 1.0),
        RopeScaling::Linear { factor } => Box::new(move |_| 1.0 / f64::from(factor)),
        RopeScaling::Yarn { factor, original_ctx, attn_factor, ext_factor, beta_fast, beta_slow } => {
            magnitude = attn_factor;
            if ext_factor != 0.0 && factor > 1.0 {
                magnitude *= 1.0 + 0.1 * factor.ln();
            }
            let pair = |beta: f32| {
                let rotations = original_ctx as f64 / (f64::from(beta) * 2.0 * std::f64::consts::PI);
                n_rot as f64 * rotations.ln() / (2.0 * f64::from(base).ln())
            };
            let low = pair(beta_fast).floor().max(0.0);
            let high = pair(beta_slow).ceil().min(n_rot as f64 - 1.0);
            Box::new(move |i| {
                let ramp = (i as f64 - low) / (high - low).max(0.001);
                let mix = (1.0 - ramp.clamp(0.0, 1.0)) * f64::from(ext_factor);
                (1.0 - mix) / f64::from(factor) + mix
            })
        }
    };
    let freqs = (0..n_rot / 2).map(|i| (plain(i) * scale(i)) as f32).collect();
    Rope { kind, freqs, magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let plain = rope(RopeKind::Norm, 8, 1e4, RopeScaling::None, None);
        let half = rope(RopeKind::Norm, 8, 1e4, RopeScaling::Linear { factor: 2.0 }, None);
        assert_eq!(plain.freqs[0], 1.0);
        for (p, h) in plain.freqs.iter().zip(&half.freqs) {
            assert_eq!(p / 2.0, *h);
        }
    }

    #[test]
    fn yarn_keeps_fast_pairs_and_scales_slow_ones() {
        let yarn = RopeScaling::Yarn {
            factor: 4.0,
            original_ctx: 2048,
            attn_factor: 1.0,
            ext_factor: 1.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
        };
        let plain = rope(RopeKind::Neox, 128, 1e4, RopeScaling::None, None);
        let r = rope(RopeKind::Neox, 128, 1e4, yarn, None);
        assert_eq!(r.freqs[0], plain.freqs[0]);
        assert!((r.freqs[63] / plain.freqs[63] - 0.25).abs() < 1e-6);
        assert!((r.magnitude - (1.0 + 0.1 * 4f32.ln())).abs() < 1e-6);
    }

    #[test]
    fn divisors_divide() {
        let d = [1.0, 2.0, 4.0, 8.0];
        let plain = rope(RopeKind::Norm, 8, 1e4, RopeScaling::None, None);
        let r = rope(RopeKind::Norm, 8, 1e4, RopeScaling::None, Some(&d));
        for (i, d) in d.iter().enumerate() {
            assert!((r.freqs[i] * d / plain.freqs[i] - 1.0).abs() < 1e-6);
        }
    }
}

//! How soon a model's tokens choose experts again, kept by model from run to run beside the plans: what decides whether a device keeps
//! experts in slots.

use serde::{Deserialize, Serialize};

use super::structure::shape;
use crate::backend::{Reuse, Share};
use crate::machine::probe;
use crate::model::Model;
use crate::plan::{Home, Plan, SiteRates};
use crate::storage::safe;

/// Parts of a layer's experts by which a curve is kept.
const PARTS: usize = 16;
/// Fewest rows of which a curve is kept, and most that the ones before count for.
const ROWS_MIN: u64 = 32;
const ROWS_MAX: u64 = 4096;
/// Models that are kept, the newest; and most bytes of the file.
const KEPT: usize = 64;
const BYTES_MAX: u64 = 1 << 20;
/// Seconds that a layer takes processors beside what they read.
const BEGIN_S: f64 = 24e-6;

/// How often a model's choices are among those of a part of its experts that were chosen last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HitCurve {
    /// The model's structure.
    model: String,
    /// Tokens of which it tells.
    tokens: u64,
    /// For each sixteenth of the experts, the share of the choices.
    hits: Vec<f64>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    #[serde(default)]
    experts: Vec<HitCurve>,
}

fn file() -> Option<std::path::PathBuf> {
    Some(probe::cache_file()?.with_file_name("experts.toml"))
}

/// Those that were kept; none if they cannot be read.
fn kept() -> Kept {
    let text = file().and_then(|f| String::from_utf8(safe::read(&f, BYTES_MAX).ok()?.bytes).ok());
    text.and_then(|t| toml::from_str(&t).ok()).unwrap_or_default()
}

impl HitCurve {
    /// The curve that was kept of a model.
    pub fn known(model: &Model) -> Option<HitCurve> {
        let shape = shape(model);
        kept().experts.into_iter().find(|c| c.model == shape && c.is_one())
    }

    fn is_one(&self) -> bool {
        self.hits.len() == PARTS && self.hits.iter().all(|h| (0.0..=1.0).contains(h)) && self.hits.is_sorted()
    }

    /// What a run has counted; `None` of too few tokens.
    fn of(model: &Model, reuse: &Reuse) -> Option<HitCurve> {
        let layers = model.stages.iter().filter(|s| s.experts.is_some()).count() as u64;
        let tokens = reuse.rows() / layers.max(1);
        let experts = model.hparams.n_experts;
        let hits = (1..=PARTS).map(|part| reuse.hits(experts * part / PARTS)).collect();
        (tokens >= ROWS_MIN).then(|| HitCurve { model: shape(model), tokens, hits })
    }

    /// This one and what was known before, each by its tokens.
    fn with(mut self, before: Option<HitCurve>) -> HitCurve {
        let Some(before) = before.filter(HitCurve::is_one) else { return self };
        let (mine, theirs) = (self.tokens as f64, before.tokens.min(ROWS_MAX) as f64);
        for (hit, old) in self.hits.iter_mut().zip(&before.hits) {
            *hit = (*hit * mine + old * theirs) / (mine + theirs);
        }
        self.tokens += before.tokens.min(ROWS_MAX);
        self
    }

    /// The share of the choices that `slots` of `experts` have.
    pub fn hits(&self, slots: usize, experts: usize) -> f64 {
        let at = slots as f64 / experts.max(1) as f64 * PARTS as f64;
        let of = |part: usize| if part == 0 { 0.0 } else { self.hits[part.min(PARTS) - 1] };
        let low = at.floor() as usize;
        of(low) + (of(low + 1) - of(low)) * (at - low as f64)
    }
}

/// Keeps what a run has counted of a model's experts.
///
/// # Errors
/// If it cannot be written.
pub(super) fn keep(model: &Model, reuse: &Reuse) -> std::io::Result<()> {
    let Some(curve) = HitCurve::of(model, reuse) else { return Ok(()) };
    let path = file().ok_or_else(|| std::io::Error::other("neither XDG_CACHE_HOME nor HOME is set"))?;
    let mut all = kept().experts;
    let before = all.iter().position(|c| c.model == curve.model).map(|at| all.remove(at));
    all.push(curve.with(before));
    all.drain(..all.len().saturating_sub(KEPT));
    let text = toml::to_string(&Kept { experts: all }).map_err(std::io::Error::other)?;
    let folder = safe::cache_folder(path.parent().unwrap_or(std::path::Path::new(".")))?;
    safe::replace(&folder.at("experts.toml"), text.as_bytes(), 0o644, ".nt-")
}

/// Seconds of the experts of a layer for a row, and how many of its choices are the processors', where the device finds `hits` of its
/// own in slots.
fn in_slots(model: &Model, rates: &SiteRates, hits: f64) -> (f64, usize) {
    let (used, bytes) = (model.hparams.n_experts_used, model.largest_expert() as f64);
    let seconds = |of_host: usize| {
        let brought = (used - of_host) as f64 * (1.0 - hits) * bytes / rates.link;
        let computed = of_host as f64 * bytes / rates.ram + if of_host > 0 { BEGIN_S } else { 0.0 };
        brought.max(computed)
    };
    let all = (0..=used).map(|of_host| (seconds(of_host), of_host));
    all.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or_default()
}

/// The share of a row's choices that are the processors' where the device finds `hits` of its own in slots: as makes a layer shortest.
pub(super) fn share_beside_slots(model: &Model, rates: &SiteRates, hits: f64) -> Share {
    let (_, of_host) = in_slots(model, rates, hits);
    Share((of_host * 256 / model.hparams.n_experts_used.max(1)) as u32)
}

/// Whether a row's experts take less where the device keeps them in slots, of which it finds `hits`, than where as many as fit live in
/// its memory, by the plan `fixed`.
pub(super) fn faster_in_slots(model: &Model, fixed: &Plan, rates: &SiteRates, hits: f64) -> bool {
    let routed = model.units.iter().zip(&fixed.homes).filter(|(u, _)| u.is_expert());
    let (mut n, mut in_ram) = (0usize, 0usize);
    for (_, home) in routed {
        n += 1;
        in_ram += usize::from(*home != Home::A);
    }
    let chosen = model.hparams.n_experts_used as f64 * in_ram as f64 / n.max(1) as f64;
    let divided = chosen * model.largest_expert() as f64 / (rates.ram + rates.link);
    in_slots(model, rates, hits).0 < divided
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(tokens: u64, hits: impl Fn(usize) -> f64) -> HitCurve {
        HitCurve { model: "m".into(), tokens, hits: (1..=PARTS).map(hits).collect() }
    }

    #[test]
    fn a_curve_is_read_between_its_points_and_grows_with_tokens() {
        let c = curve(100, |part| part as f64 / 32.0 + 0.5);
        assert_eq!((c.hits(0, 128), c.hits(64, 128), c.hits(128, 128)), (0.0, 0.75, 1.0));
        assert!((c.hits(68, 128) - 0.765625).abs() < 1e-12);
        let both = curve(300, |_| 0.4).with(Some(curve(100, |_| 0.8)));
        assert!((both.hits[3] - 0.5).abs() < 1e-12 && both.tokens == 400);
        // What cannot be one counts for nothing.
        let bad = HitCurve { hits: vec![2.0; PARTS], ..curve(9, |_| 0.0) };
        assert_eq!(curve(300, |_| 0.4).with(Some(bad)), curve(300, |_| 0.4));
    }
}

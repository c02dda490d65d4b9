//! What a plan followed from and what came of it, under an id, so that it can be made again.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::{RecipeError, RecipeFault, RepeatError};
use super::structure::digest;
use super::{EngineError, Sites, batch};
use crate::backend::Share;
use crate::gguf::TensorType;
use crate::machine::probe;
use crate::model::SLICE_PARTS;
use crate::plan::{BUFFERS_MAX, BUFFERS_MIN, SiteRates, Tiers};
use crate::storage::safe;

/// Recipes that are kept, the newest; and most bytes of a file with some.
const KEPT: usize = 64;
const BYTES_MAX: u64 = 1 << 20;
/// Types that a cache's elements may have.
const KV_TYPES: [TensorType; 3] = [TensorType::F16, TensorType::F32, TensorType::Q8_0];

/// What a plan followed from, and the sites that came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The model's structure.
    pub(super) model: String,
    /// Whether a GPU computes.
    pub(super) gpu: bool,
    /// `auto`, `one` or `both`.
    pub(super) sites: String,
    /// Bytes of VRAM for weights, where not all units lie there.
    pub(super) vram: Option<u64>,
    /// Bytes of RAM for weights, where some units lie on storage.
    pub(super) ram: Option<u64>,
    /// Counts of blocks that were given, `A:B:C`.
    pub(super) tiers: Option<String>,
    /// Those one after the other.
    pub(super) stacked: bool,
    /// Whether units may lie on storage, and experts there have caches.
    pub(super) storage: bool,
    pub(super) caches: bool,
    /// Whether a GPU keeps experts in slots, and then how many 256ths of a row's choices are for processors.
    #[serde(default)]
    pub(super) expert_slots: bool,
    pub(super) slot_share: Option<u32>,
    /// Buffers, where they were given or chosen.
    pub(super) n_buffers: Option<usize>,
    /// Whether experts may have more.
    pub(super) more_frames: bool,
    /// Bytes per second of processors, the link and the GPU by which work was divided, in steps of a twentieth.
    pub(super) rates: Option<[u64; 3]>,
    /// Which units processors next to the GPU compute; of none, empty.
    pub(super) divided: String,
    /// Most tokens of a pass, where those are not the usual number and their workspace takes memory from weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) batch: Option<usize>,
    /// Parts of each feed-forward part's hidden state that processors next to a GPU have, where those are cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) slices: Option<u32>,
    /// The type that larger matrices got, by its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) requant: Option<String>,
    /// The type of the cache's elements, by its name, where it is not F16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) kv: Option<String>,
}

/// Recipes in a file.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    #[serde(default)]
    plan: Vec<Recipe>,
}

/// The name of a choice of sites.
pub(super) fn name(sites: Sites) -> &'static str {
    match sites {
        Sites::Auto => "auto",
        Sites::One => "one",
        Sites::Both => "both",
    }
}

impl Recipe {
    /// Twelve hexadecimal digits that follow from all of it.
    pub fn id(&self) -> String {
        digest([self.text()])
    }

    /// As a file has it.
    pub fn text(&self) -> String {
        // Strings, numbers and none else.
        toml::to_string(&Kept { plan: vec![self.clone()] }).unwrap_or_default()
    }

    /// Reads one from a file's text.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Recipe, RecipeFault> {
        let kept: Kept = toml::from_str(text)?;
        match <[Recipe; 1]>::try_from(kept.plan) {
            Ok([recipe]) if recipe.known() => Ok(recipe),
            Ok(_) => Err(RecipeFault::Names),
            Err(plans) => Err(RecipeFault::Count(plans.len())),
        }
    }

    fn known(&self) -> bool {
        let requant = self.requant.is_none() || self.requant().is_some();
        let kv = self.kv.is_none() || KV_TYPES.contains(&self.kv_type()) && self.kv_type() != TensorType::F16;
        let batch = self.batch.is_none_or(|b| (1..=batch::MOST).contains(&b));
        let buffers = self.n_buffers.is_none_or(|n| (BUFFERS_MIN..=BUFFERS_MAX).contains(&n));
        let tiers = self.tiers.as_ref().is_none_or(|t| t.parse::<Tiers>().is_ok());
        let slices = self.slices.is_none_or(|part| (1..SLICE_PARTS).contains(&part));
        tiers && self.by_name().is_some() && requant && kv && batch && buffers && slices
    }

    pub(super) fn requant(&self) -> Option<TensorType> {
        TensorType::ALL.iter().copied().find(|ty| self.requant.as_deref() == Some(ty.name()))
    }

    /// The type of the cache's elements.
    pub fn kv_type(&self) -> TensorType {
        let named = TensorType::ALL.iter().copied().find(|ty| self.kv.as_deref() == Some(ty.name()));
        named.unwrap_or(TensorType::F16)
    }

    pub(super) fn by_name(&self) -> Option<Sites> {
        [Sites::Auto, Sites::One, Sites::Both].into_iter().find(|s| name(*s) == self.sites)
    }

    /// The recipe that a file holds, or that was kept under this id.
    ///
    /// # Errors
    /// A sentence, if there is none or it cannot be read.
    pub fn find(given: &str) -> Result<Recipe, RecipeError> {
        let (path, named) = (Path::new(given), || given.to_owned());
        if path.exists() {
            let read = safe::read(path, BYTES_MAX).map_err(|source| RecipeError::Io { given: named(), source })?;
            let text = String::from_utf8(read.bytes).map_err(|_| RecipeError::NoText(named()))?;
            return Recipe::parse(&text).map_err(|source| RecipeError::Malformed { given: named(), source });
        }
        let of_id = kept().plan.into_iter().find(|r| r.id() == given);
        of_id.ok_or_else(|| RecipeError::Unknown { given: named(), kept: KEPT })
    }

    /// Keeps it where [`Recipe::find`] looks, as the newest.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn keep(&self) -> std::io::Result<()> {
        let path = file().ok_or_else(|| std::io::Error::other("neither XDG_CACHE_HOME nor HOME is set"))?;
        let mut all = kept();
        if all.plan.last() == Some(self) {
            return Ok(());
        }
        all.plan.retain(|r| r != self);
        all.plan.push(self.clone());
        all.plan.drain(..all.plan.len().saturating_sub(KEPT));
        let text = toml::to_string(&all).map_err(std::io::Error::other)?;
        let folder = safe::cache_folder(path.parent().unwrap_or(Path::new(".")))?;
        safe::replace(&folder.at("plans.toml"), text.as_bytes(), 0o644, ".nt-")
    }

    /// The share of processors where a GPU keeps experts in slots.
    pub(super) fn slot_share(&self) -> Option<Share> {
        self.slot_share.map(Share)
    }

    /// The rates by which work is divided.
    pub(super) fn rates(&self) -> Option<SiteRates> {
        self.rates.map(|[ram, link, device]| SiteRates { ram: ram as f64, link: link as f64, device: device as f64 })
    }

    /// Bytes of VRAM for weights, where there are `room`; `None` where no GPU computes.
    ///
    /// # Errors
    /// If there are too few, or a GPU is there for a plan without one, or none for one with.
    pub(super) fn room(&self, room: Option<u64>) -> Result<Option<u64>, EngineError> {
        match (self.gpu, room, self.vram) {
            (true, None, _) => Err(self.refused(RepeatError::NoGpu)),
            (false, Some(_), _) => Err(self.refused(RepeatError::Gpu)),
            (true, Some(room), Some(wanted)) if wanted > room => Err(self.refused(RepeatError::Room { wanted, room })),
            (_, room, wanted) => Ok(wanted.or(room)),
        }
    }

    /// The error of this plan.
    pub(super) fn refused(&self, source: RepeatError) -> EngineError {
        EngineError::Repeat { id: self.id(), source }
    }
}

fn file() -> Option<PathBuf> {
    Some(probe::cache_file()?.with_file_name("plans.toml"))
}

/// Those that were kept; none if they cannot be read.
fn kept() -> Kept {
    let text = file().and_then(|f| String::from_utf8(safe::read(&f, BYTES_MAX).ok()?.bytes).ok());
    text.and_then(|t| toml::from_str(&t).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::structure::DIGITS;
    use super::*;

    #[test]
    fn an_id_follows_from_every_part_and_a_file_gives_it_back() {
        let r = Recipe { sites: "auto".into(), vram: Some(9 << 30), rates: Some([1, 2, 3]), ..Recipe::default() };
        assert_eq!(Recipe::parse(&r.text()).unwrap(), r);
        assert_eq!(r.id().len(), DIGITS);
        for other in [
            Recipe { gpu: true, ..r.clone() },
            Recipe { vram: Some(8 << 30), ..r.clone() },
            Recipe { rates: Some([1, 2, 4]), ..r.clone() },
            Recipe { divided: "x".into(), ..r.clone() },
            Recipe { kv: Some("Q8_0".into()), ..r.clone() },
        ] {
            assert_ne!(other.id(), r.id());
        }
    }

    #[test]
    fn what_is_no_plan_is_refused() {
        let good = Recipe { sites: "auto".into(), tiers: Some("1:2:3".into()), ..Recipe::default() }.text();
        assert!(Recipe::parse(&good).is_ok());
        for (from, to) in [
            ("auto", "many"),
            ("1:2:3", "1:2"),
            ("gpu = false", "gpu = 3"),
            ("gpu", "gqu"),
            ("[[plan]]", ""),
            ("divided", "batch = 0\ndivided"),
            ("divided", "n_buffers = 0\ndivided"),
            ("divided", "slices = 256\ndivided"),
            ("divided", "kv = \"Q4_K\"\ndivided"),
            ("divided", "kv = \"\"\ndivided"),
            ("divided", "n_buffers = 4611686018427387904\ndivided"),
        ] {
            assert!(Recipe::parse(&good.replace(from, to)).is_err(), "{from} {to}");
        }
        assert!(Recipe::parse("").is_err() && Recipe::parse(&(good.clone() + &good)).is_err());
    }
}

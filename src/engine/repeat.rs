//! Plans that are made again. Bits follow from the model, its tokens and the sites that compute them; sites follow from the plan, and
//! a plan from limits and rates that differ from day to day. A [`Recipe`] is what one followed from and what came of it, under an id.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::beside::Division;
use super::structure::{digest, structure};
use super::{EngineError, ExpertSlots, Options, Sites};
use crate::backend::Share;
use crate::gguf::TensorType;
use crate::machine::probe;
use crate::model::Model;
use crate::plan::{Home, Plan, SiteRates, Tiers, format_bytes};
use crate::storage::safe;

/// What free memory is rounded down to, so that a plan does not change with each MiB, and from which size on.
const STEP: u64 = 256 << 20;
const STEPPED_FROM: u64 = 4 << 30;
/// Recipes that are kept, the newest; and most bytes of a file with some.
const KEPT: usize = 64;
const BYTES_MAX: u64 = 1 << 20;

/// What a plan followed from, and the sites that came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The model's structure.
    model: String,
    /// Whether a GPU computes.
    gpu: bool,
    /// `auto`, `one` or `both`.
    sites: String,
    /// Bytes of VRAM for weights, where not all units lie there.
    vram: Option<u64>,
    /// Bytes of RAM for weights, where some units lie on storage.
    ram: Option<u64>,
    /// Counts of blocks that were given, `A:B:C`.
    tiers: Option<String>,
    /// Those one after the other.
    stacked: bool,
    /// Whether units may lie on storage, and experts there have caches.
    storage: bool,
    caches: bool,
    /// Whether a GPU keeps experts in slots, and then how many 256ths of a row's choices are for processors.
    #[serde(default)]
    expert_slots: bool,
    slot_share: Option<u32>,
    /// Buffers, where they were given or chosen.
    n_buffers: Option<usize>,
    /// Whether experts may have more.
    more_frames: bool,
    /// Bytes per second of processors, the link and the GPU by which work was divided, in steps of a twentieth.
    rates: Option<[u64; 3]>,
    /// Which units processors next to the GPU compute; of none, empty.
    divided: String,
    /// The type that larger matrices got, by its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    requant: Option<String>,
}

/// Recipes in a file.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    #[serde(default)]
    plan: Vec<Recipe>,
}

fn divided(division: Option<&Division>) -> String {
    division.map_or(String::new(), |d| {
        let flags = |of: &[bool]| of.iter().map(|b| if *b { '1' } else { '0' }).collect::<String>();
        digest([flags(&d.units), flags(&d.divided), format!("{:?}", d.share)])
    })
}

fn name(sites: Sites) -> &'static str {
    match sites {
        Sites::Auto => "auto",
        Sites::One => "one",
        Sites::Both => "both",
    }
}

/// Free memory of which a plan takes its part; of `all` bytes of weights, those that fit are left as they are.
pub(super) fn steady(room: u64, all: u64) -> u64 {
    if room >= all || room < STEPPED_FROM { room } else { room / STEP * STEP }
}

impl Recipe {
    /// Of a plan that was made. `room` is what there was for weights in VRAM and in RAM, `rates` what the division was made by.
    pub(super) fn new(
        model: &Model,
        plan: &Plan,
        options: &Options,
        (vram, ram): (Option<u64>, Option<u64>),
        rates: Option<SiteRates>,
        division: Option<&Division>,
    ) -> Recipe {
        let has = |wanted: &dyn Fn(Home) -> bool| plan.homes.iter().any(|h| wanted(*h));
        Recipe {
            model: structure(model),
            gpu: vram.is_some(),
            sites: name(options.sites).into(),
            vram: vram.filter(|_| has(&|h| h != Home::A)),
            ram: ram.filter(|_| has(&|h| h == Home::C)),
            tiers: options.tiers.map(|t| format!("{}:{}:{}", t.a, t.b, t.c)),
            stacked: options.stacked,
            storage: options.storage,
            caches: options.caches,
            expert_slots: !plan.device_caches.is_empty(),
            slot_share: division.and_then(|d| d.share).filter(|_| !plan.device_caches.is_empty()).map(|s| s.0),
            n_buffers: options.n_buffers,
            more_frames: options.more_frames,
            rates: rates.map(|r| [r.ram, r.link, r.device].map(|rate| rate as u64)),
            divided: divided(division),
            requant: options.requant.map(|ty| ty.name().into()),
        }
    }

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
    pub fn parse(text: &str) -> Result<Recipe, String> {
        let kept: Kept = toml::from_str(text).map_err(|e| e.message().replace('\n', ", "))?;
        match <[Recipe; 1]>::try_from(kept.plan) {
            Ok([recipe]) if recipe.known() => Ok(recipe),
            Ok(_) => Err("tiers or sites are no such".into()),
            Err(plans) => Err(format!("it holds {} plans in place of one", plans.len())),
        }
    }

    fn known(&self) -> bool {
        let requant = self.requant.is_none() || self.requant().is_some();
        self.tiers.as_ref().is_none_or(|t| t.parse::<Tiers>().is_ok()) && self.by_name().is_some() && requant
    }

    fn requant(&self) -> Option<TensorType> {
        TensorType::ALL.iter().copied().find(|ty| self.requant.as_deref() == Some(ty.name()))
    }

    fn by_name(&self) -> Option<Sites> {
        [Sites::Auto, Sites::One, Sites::Both].into_iter().find(|s| name(*s) == self.sites)
    }

    /// The recipe that a file holds, or that was kept under this id.
    ///
    /// # Errors
    /// A sentence, if there is none or it cannot be read.
    pub fn find(given: &str) -> Result<Recipe, String> {
        let path = Path::new(given);
        if path.exists() {
            let bytes = safe::read(path, BYTES_MAX).map_err(|e| format!("--plan {given}: {e}"))?.bytes;
            let text = String::from_utf8(bytes).map_err(|_| format!("--plan {given}: no text"))?;
            return Recipe::parse(&text)
                .map_err(|e| format!("--plan {given}: {e}; `nt plan --save FILE` writes such files"));
        }
        let of_id = kept().plan.into_iter().find(|r| r.id() == given);
        of_id.ok_or_else(|| {
            format!("--plan {given}: neither a file nor the id of a plan of the last {KEPT} that ran here; `nt plan --save FILE` writes one")
        })
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

    /// The options with which the plan is made again.
    ///
    /// # Errors
    /// If it is another model's.
    pub(super) fn applied(&self, model: &Model, options: &Options) -> Result<Options, EngineError> {
        if self.model != structure(model) {
            return Err(self.refused("it was made for a model of another shape"));
        }
        if let (Some(ty), of) = (options.requant, self.requant())
            && of != Some(ty)
        {
            return Err(self.refused(&match of {
                Some(of) => format!("it requantises to {of}, not to {ty}"),
                None => "it requantises nothing; leave --requant away".into(),
            }));
        }
        Ok(Options {
            sites: self.by_name().unwrap_or(options.sites),
            ram: self.ram.or(options.ram),
            tiers: self.tiers.as_ref().and_then(|t| t.parse().ok()),
            stacked: self.stacked,
            storage: self.storage && options.storage,
            caches: self.caches,
            expert_slots: if self.expert_slots { ExpertSlots::On } else { ExpertSlots::Off },
            n_buffers: self.n_buffers,
            more_frames: self.more_frames,
            requant: self.requant(),
            ..options.clone()
        })
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
            (true, None, _) => Err(self.refused("it is one for a GPU, and processors compute here")),
            (false, Some(_), _) => {
                Err(self.refused("it is one for processors, and a GPU computes here (--backend cpu)"))
            }
            (true, Some(room), Some(wanted)) if wanted > room => {
                let (wanted, room) = (format_bytes(wanted), format_bytes(room));
                Err(self.refused(&format!("it takes {wanted} of VRAM for weights, and there are {room}")))
            }
            (_, room, wanted) => Ok(wanted.or(room)),
        }
    }

    /// Compares what came of it.
    ///
    /// # Errors
    /// If sites are others, so that bits would be.
    pub(super) fn check(&self, division: Option<&Division>) -> Result<(), EngineError> {
        match self.divided == divided(division) {
            true => Ok(()),
            false => Err(self.refused(
                "other units would be computed by processors than were (a timeline or forced routing, another GPU or drive, or a file that was changed)",
            )),
        }
    }

    fn refused(&self, why: &str) -> EngineError {
        EngineError::Repeat { id: self.id(), why: why.into() }
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
        ] {
            assert_ne!(other.id(), r.id());
        }
    }

    #[test]
    fn what_is_no_plan_is_refused() {
        let good = Recipe { sites: "auto".into(), tiers: Some("1:2:3".into()), ..Recipe::default() }.text();
        assert!(Recipe::parse(&good).is_ok());
        for (from, to) in
            [("auto", "many"), ("1:2:3", "1:2"), ("gpu = false", "gpu = 3"), ("gpu", "gqu"), ("[[plan]]", "")]
        {
            assert!(Recipe::parse(&good.replace(from, to)).is_err(), "{from} {to}");
        }
        assert!(Recipe::parse("").is_err() && Recipe::parse(&(good.clone() + &good)).is_err());
    }

    #[test]
    fn free_memory_is_rounded_where_it_binds() {
        assert_eq!(steady((9 << 30) + 5, 8 << 30), (9 << 30) + 5);
        assert_eq!(steady((9 << 30) + (300 << 20), 80 << 30), (9 << 30) + (256 << 20));
        assert_eq!(steady(700 << 10, 80 << 30), 700 << 10);
    }
}

//! Plans that are made again. Bits follow from the model, its tokens and the sites that compute them; sites follow from the plan, and
//! a plan from limits and rates that differ from day to day. A [`Recipe`] is what one followed from and what came of it, under an id.

use super::beside::Division;
use super::error::RepeatError;
use super::recipe::name;
use super::structure::{digest, structure};
use super::{EngineError, ExpertSlots, Options, Recipe, Slices};
use crate::gguf::TensorType;
use crate::model::Model;
use crate::plan::{Home, Plan, SiteRates};

/// What free memory is rounded down to, so that a plan does not change with each MiB, and from which size on.
const STEP: u64 = 256 << 20;
const STEPPED_FROM: u64 = 4 << 30;

fn divided(division: Option<&Division>) -> String {
    division.map_or(String::new(), |d| {
        let flags = |of: &[bool]| of.iter().map(|b| if *b { '1' } else { '0' }).collect::<String>();
        digest([flags(&d.units), flags(&d.divided), format!("{:?}", d.share)])
    })
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
        slices: Option<u32>,
    ) -> Recipe {
        let has = |wanted: &dyn Fn(Home) -> bool| plan.homes.iter().any(|h| wanted(*h));
        let gpu = vram.is_some();
        let vram = vram.filter(|_| has(&|h| h != Home::A));
        let ram = ram.filter(|_| has(&|h| h == Home::C));
        let (bound, unusual) = (vram.is_some() || ram.is_some(), options.max_batch != Options::BATCH);
        Recipe {
            model: structure(model),
            gpu,
            sites: name(options.sites).into(),
            vram,
            ram,
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
            batch: (bound && unusual).then_some(options.max_batch),
            slices,
            requant: options.requant.map(|ty| ty.name().into()),
            kv: (options.kv_type != TensorType::F16).then(|| options.kv_type.name().into()),
        }
    }

    /// Tokens of a pass and the longest prompt for which they may be chosen, of options that leave them to the plan.
    fn batch_of(&self, options: &Options) -> (usize, Option<usize>) {
        match options.longest_prompt {
            Some(_) if self.vram.is_some() || self.ram.is_some() => (self.batch.unwrap_or(Options::BATCH), None),
            longest => (options.max_batch, longest),
        }
    }

    /// The options with which the plan is made again.
    ///
    /// # Errors
    /// If it is another model's.
    pub(super) fn applied(&self, model: &Model, options: &Options) -> Result<Options, EngineError> {
        if self.model != structure(model) {
            return Err(self.refused(RepeatError::OtherModel));
        }
        if let (Some(ty), of) = (options.requant, self.requant())
            && of != Some(ty)
        {
            return Err(self.refused(match of {
                Some(of) => RepeatError::OtherType { of, wanted: ty },
                None => RepeatError::NoType,
            }));
        }
        let (of, wanted) = (self.kv_type(), options.kv_type);
        if of != wanted {
            return Err(self.refused(RepeatError::OtherCache { of, wanted }));
        }
        let (max_batch, longest_prompt) = self.batch_of(options);
        Ok(Options {
            max_batch,
            longest_prompt,
            sites: self.by_name().unwrap_or(options.sites),
            ram: self.ram.or(options.ram),
            tiers: self.tiers.as_ref().and_then(|t| t.parse().ok()),
            stacked: self.stacked,
            storage: self.storage && options.storage,
            caches: self.caches,
            expert_slots: if self.expert_slots { ExpertSlots::On } else { ExpertSlots::Off },
            n_buffers: self.n_buffers,
            more_frames: self.more_frames,
            slices: self.slices.map_or(Slices::Off, Slices::Of),
            requant: self.requant(),
            ..options.clone()
        })
    }

    /// Compares it with that of the plan that was made by it: ids are equal where they are.
    ///
    /// # Errors
    /// If sites are others, so that bits would be, or anything else is.
    pub(super) fn check(&self, made: &Recipe) -> Result<(), EngineError> {
        if self.slices.is_some() && made.slices.is_none() {
            return Err(self.refused(RepeatError::Whole));
        }
        if self.divided != made.divided || self.slices != made.slices {
            return Err(self.refused(RepeatError::OtherSites));
        }
        let differs = [
            (self.vram != made.vram, "the room for weights in VRAM (not all that lay there fits)"),
            (self.ram != made.ram, "the room for weights in RAM (not all that lay in memory fits)"),
            (self.storage != made.storage, "whether weights may lie on storage (--tier-c)"),
            (self.expert_slots != made.expert_slots, "the experts that have slots in VRAM"),
            (self.rates != made.rates, "the rates by which work is divided"),
            (self.batch != made.batch, "the tokens of a pass"),
            (self != made, "its limits"),
        ];
        match differs.into_iter().find(|(differs, _)| *differs) {
            Some((_, what)) => Err(self.refused(RepeatError::Other { what })),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_rounded_where_it_binds() {
        assert_eq!(steady((9 << 30) + 5, 8 << 30), (9 << 30) + 5);
        assert_eq!(steady((9 << 30) + (300 << 20), 80 << 30), (9 << 30) + (256 << 20));
        assert_eq!(steady(700 << 10, 80 << 30), 700 << 10);
    }
}

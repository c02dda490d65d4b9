//! The flow before it runs: the machine of [`crate::flow`], driven by a clock that only counts.
//!
//! Reads end after each other at storage's rate, copies one at a time in order, computing goes unit by
//! unit; what runs at once shares RAM and processors. No thread, no device, no chance but a seed (which
//! experts are chosen). Frames on a device are given back when computing is called, and copies into them wait for its
//! end. Processors beside a device compute what is handed to them, while the device goes on with what does not need it.

mod share;
mod world;

use std::sync::Arc;

use super::{Beside, Home, LinkName, Rates, UnitSize};
use crate::model::ForcedRouting;
use crate::pipeline::Event;
use world::World;

/// A unit as the simulator sees it.
#[derive(Clone, Copy, Debug)]
pub struct SimUnit {
    /// Size and place in the model.
    pub size: UnitSize,
    /// Where it lives.
    pub home: Home,
}

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The units, in pass order; experts follow the shared part of their block.
    pub units: Vec<SimUnit>,
    /// Whether a GPU computes from its own memory.
    pub on_device: bool,
    /// Buffers in RAM.
    pub staging_slots: usize,
    /// Whether each of them has a slot for attention parts next to the one for all others.
    pub staging_attention: bool,
    /// Buffers in VRAM.
    pub device_slots: usize,
    /// The same for those.
    pub device_attention: bool,
    /// Rates. A link without one takes no time.
    pub rates: Rates,
    /// Seconds that the link rests between two copies; of experts, at most a few microseconds.
    pub copy_gap_s: f64,
    /// Whether the next pass is brought while this one ends. A predecessor's did not.
    pub wrap: bool,
    /// Decides which experts are chosen where no routing does.
    pub seed: u64,
    /// Caches of experts in RAM.
    pub caching: Caching,
    /// Processors beside a device; those of their units that rest in RAM have no way to go: their home is A.
    pub beside: Beside,
}

/// Frames of a layer's experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimCache {
    /// How many.
    pub slots: usize,
    /// Which of the layers with experts it belongs to.
    pub number: usize,
}

/// Caches of experts in RAM, warm from the beginning.
#[derive(Clone, Debug, Default)]
pub struct Caching {
    /// The caches.
    pub caches: Vec<SimCache>,
    /// By unit, the cache that it goes through; empty for none.
    pub of: Vec<Option<usize>>,
    /// What tokens choose.
    pub routing: Option<Arc<ForcedRouting>>,
}

/// Seconds of computing in one pass.
#[derive(Clone, Debug, PartialEq)]
pub struct PassWork {
    /// Of each unit, when it is used and not computed by processors beside a device.
    pub unit_s: Vec<f64>,
    /// Of the pass beside its units; nothing else is computed meanwhile.
    pub beside_s: f64,
    /// Experts that are used of each block.
    pub experts: usize,
    /// Whether it is of a prompt, which chooses by chance and evicts nothing from caches.
    pub prompt: bool,
    /// Whether it takes nearly all experts of a block, so that those in RAM are brought before the router has chosen.
    pub ahead: bool,
}

/// Where a pass's time went, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shares {
    /// The pass.
    pub seconds: f64,
    /// Reads in flight.
    pub nvme_busy: f64,
    /// A copy running.
    pub gpu_busy: f64,
    /// Computing, on the device if there is one.
    pub compute_busy: f64,
    /// Computing by processors beside it.
    pub beside_busy: f64,
    /// Bytes through RAM.
    pub ram_bytes: f64,
    /// Of those, computed by processors beside a device.
    pub beside_bytes: f64,
    /// Bytes over the link to the device.
    pub gpu_bytes: f64,
    /// Computing waited for a unit that was being read.
    pub wait_nvme: f64,
    /// Computing waited for a unit that was being copied.
    pub wait_gpu: f64,
    /// The device waited for processors beside it, hand-overs included.
    pub wait_beside: f64,
    /// Nothing of the pass was left to compute: logits, and the next token's begin.
    pub wait_pass: f64,
}

/// The outcome.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Each pass.
    pub passes: Vec<Shares>,
    /// What happened, in the timeline's form.
    pub events: Vec<Event>,
}

/// How long the link rests between two copies: events and the look for the end of a copy (H100: it is
/// busy 0.984 to 0.989 of passes that it binds, with 32 to 45 copies each; docs/benchmarks.md).
pub const COPY_GAP_S: f64 = 65e-6;

/// The same for an expert, whose copy is queued behind others of its layer (H100: copies of 1 MiB reach 47.4 GB/s and of 8 MiB
/// 53.7; docs/benchmarks.md).
pub const EXPERT_GAP_S: f64 = 2.7e-6;

/// Passes before the ring is taken for settled, and passes that count.
const SETTLING: usize = 4;
const COUNTED: usize = 4;
/// Of a mixture of experts as many more count that so many are chosen: by few choices, a pass takes up to a tenth more or less than the mean.
const CHOICES: usize = 1536;
const COUNTED_MAX: usize = 16;

impl Setup {
    /// Runs passes one after the other from an empty ring.
    pub fn run(&self, passes: &[&PassWork]) -> Outcome {
        World::new(self).run(passes)
    }

    /// A pass of a settled ring: the mean of some.
    pub fn settled(&self, pass: &PassWork) -> Shares {
        let counted = self.counted(pass);
        let all = self.run(&vec![pass; SETTLING + counted]);
        let mut sum = Shares::default();
        for p in &all.passes[SETTLING..] {
            sum.add(p);
        }
        sum.scaled(1.0 / counted as f64)
    }

    /// Passes that count.
    fn counted(&self, pass: &PassWork) -> usize {
        let layers = self.units.chunk_by(|a, b| a.size.block == b.size.block && a.size.routed() == b.size.routed());
        let choices = layers.filter(|layer| layer[0].size.routed()).count() * pass.experts;
        match choices {
            0 => COUNTED,
            n => CHOICES.div_ceil(n).clamp(COUNTED, COUNTED_MAX),
        }
    }
}

impl Shares {
    /// The same where a pass takes `seconds` at least, which a few whose choices are cheaper than the mean may not.
    pub fn at_least(self, seconds: f64) -> Shares {
        Shares { seconds: self.seconds.max(seconds), ..self }
    }

    fn add(&mut self, o: &Shares) {
        for (a, b) in self.fields().into_iter().zip({ *o }.fields()) {
            *a += *b;
        }
    }

    fn scaled(mut self, by: f64) -> Shares {
        self.fields().into_iter().for_each(|f| *f *= by);
        self
    }

    fn fields(&mut self) -> [&mut f64; 12] {
        let Shares {
            seconds, nvme_busy, gpu_busy, compute_busy, beside_busy, ram_bytes, beside_bytes, gpu_bytes, ..
        } = self;
        let Shares { wait_nvme, wait_gpu, wait_beside, wait_pass, .. } = self;
        let busy = [seconds, nvme_busy, gpu_busy, compute_busy, beside_busy, ram_bytes, beside_bytes, gpu_bytes];
        let waits = [wait_nvme, wait_gpu, wait_beside, wait_pass];
        let [a, b, c, d, e, f, g, h] = busy;
        let [i, j, k, l] = waits;
        [a, b, c, d, e, f, g, h, i, j, k, l]
    }

    /// Share of the pass in which a link was busy; of RAM, its bytes of what it could carry.
    pub fn busy(&self, link: LinkName, rates: &Rates) -> Option<f64> {
        let share = |s: f64| (s / self.seconds).min(1.0);
        match link {
            LinkName::Nvme => rates.nvme.map(|_| share(self.nvme_busy)),
            LinkName::Gpu => rates.gpu.map(|_| share(self.gpu_busy)),
            LinkName::Flops => Some(share(self.compute_busy)),
            LinkName::Chain => (self.beside_bytes > 0.0).then(|| share(self.compute_busy + self.wait_beside)),
            LinkName::Ram => {
                let both = rates.ram_and_link.filter(|_| self.beside_bytes > 0.0 && self.gpu_bytes > 0.0);
                both.or(rates.ram).map(|r| (self.ram_bytes / r / self.seconds).min(1.0))
            }
            LinkName::Vram => None,
        }
    }

    /// Share of the pass in which processors beside a device computed; `None` if they had nothing to.
    pub fn beside(&self) -> Option<f64> {
        (self.beside_bytes > 0.0).then(|| (self.beside_busy / self.seconds).min(1.0))
    }

    /// What is busy longest.
    pub fn bound_by(&self, rates: &Rates) -> LinkName {
        let links = [LinkName::Nvme, LinkName::Gpu, LinkName::Ram, LinkName::Flops, LinkName::Chain];
        let busy = |l: &LinkName| self.busy(*l, rates).unwrap_or(0.0);
        links.into_iter().max_by(|a, b| busy(a).total_cmp(&busy(b))).unwrap_or(LinkName::Flops)
    }
}

#[cfg(test)]
mod tests;

//! What the simulator says of a session: its own plan, with rates that were measured.

use std::time::Instant;

use super::beside::{Division, as_exact, as_living};
use super::forecast::{PASSES_SHOWN, decode_seconds, gpu_seconds, setup, with_passes};
use super::hits::{caching, slot_hits};
use super::start::{apart, device_slots};
use super::works::works;
use super::{EngineError, Recipe, Session, here};
use crate::backend::Class;
use crate::flow::{Feed, Place};
use crate::machine;
use crate::model::Outputs;
use crate::pipeline::{Event, StreamError};
use crate::plan::{self, Costs, Home, Machine, PassWork, Plan, Rates, Setup, Shares, Site, SiteRates, pass_s};

/// How long computing alone is measured, and most passes of it.
const COMPUTE_S: f64 = 0.5;
const COMPUTE_PASSES: usize = 64;

/// One-token passes as simulated, and the rates that this counts with.
#[derive(Clone, Copy, Debug)]
pub struct Predicted {
    /// A pass of a settled ring.
    pub pass: Shares,
    /// The rates.
    pub rates: Rates,
}

impl Session {
    /// The prediction from the ceilings that [`Session::measure_ceilings`] measured; `None` where one that
    /// it needs is missing.
    pub fn predicted(&self) -> Option<Predicted> {
        let rates = self.links.rates();
        Some(Predicted { pass: self.measured_simulator()?.settled(&self.measured_work()?), rates })
    }

    /// Some one-token passes as simulated with those ceilings, for a picture; empty without them.
    pub fn simulated_events(&self) -> Vec<Event> {
        let Some((setup, work)) = self.measured_simulator().zip(self.measured_work()) else {
            return Vec::new();
        };
        with_passes(setup.run(&[&work; PASSES_SHOWN]), std::iter::repeat(1))
    }

    /// The simulator with the ceilings that were measured.
    fn measured_simulator(&self) -> Option<Setup> {
        let units = works(&self.model, &self.weights.layouts);
        self.simulator(&self.links.rates(), self.beside_at(&units, self.slower()))
    }

    /// A one-token pass whose units take shares of the measured time by their bytes; of two sites whose time was not measured, what the
    /// VRAM's ceiling and the costs of kernels say.
    fn measured_work(&self) -> Option<PassWork> {
        let units = works(&self.model, &self.weights.layouts);
        let beside = self.beside_at(&units, self.slower());
        let experts = self.model.hparams.n_experts_used;
        // Where sites compute a part at once, what each takes of the time does not show in the whole.
        let Some(compute_s) = self.links.compute_s.filter(|_| self.slices().is_none()) else {
            let (vram, beside) = (self.links.vram_ceiling?, beside?);
            let unit_s = self.on_device_s(&units, &beside, vram);
            return Some(PassWork { unit_s, beside_s: pass_s(self.site()), experts, prompt: false, ahead: false });
        };
        // What processors next to a device take is the simulator's to count; of experts a pass uses as many as a token chooses.
        let parts = beside.as_ref().map(|b| b.parts(&units));
        let of_host: f64 = beside.as_ref().map_or(0.0, |b| b.chain_s(&units, &vec![0.0; units.len()]));
        let part = |u: usize| 1.0 - parts.as_ref().map_or(0.0, |p| p[u]);
        let all: f64 = units.iter().enumerate().map(|(i, u)| u.bytes as f64 * u.share * part(i)).sum();
        let beside_s = pass_s(self.site()).min(compute_s);
        let left = (compute_s - beside_s - of_host).max(0.0);
        let unit_s = units.iter().map(|u| left * u.bytes as f64 / all.max(1.0)).collect();
        Some(PassWork { unit_s, beside_s, experts, prompt: false, ahead: false })
    }

    /// Bytes per second of weights that processors next to the device compute, by the ceilings that were measured, or where fewer threads
    /// than all but one compute, as measured of such; a guess without.
    fn slower(&self) -> f64 {
        let (l, threads) = (&self.links, self.threads_beside());
        let of_both = l.ram_and_link_ceiling.zip(l.gpu_ceiling).map(|(both, link)| both - link);
        let of_all = of_both.or(l.ram_ceiling).filter(|_| threads == 0 || threads + 1 >= machine::n_cpus());
        of_all.unwrap_or_else(|| here::site_rates(threads).ram)
    }

    /// What processors next to the device do, at this rate; `None` if there are none.
    fn beside_at(&self, units: &[plan::UnitWork], ram: f64) -> Option<plan::Beside> {
        let rates = SiteRates { ram, link: 1.0, device: 1.0 };
        Some(self.living().1?.timed(units, &rates, &Costs::default()))
    }

    /// Of the choices that fall on experts in RAM, the part that processors next to the device compute, where the link brings the others;
    /// the mean over layers that are divided, `None` if none is.
    pub fn part_of_choices(&self) -> Option<f64> {
        let of = self.weights.beside.as_ref()?;
        let divided = (0..of.parts.len()).filter(|u| of.divided[*u] && of.units[*u].is_some());
        let (n, sum) = divided.fold((0, 0.0), |(n, sum), u| (n + 1, sum + of.parts[u]));
        (n > 0).then(|| sum / f64::from(n))
    }

    /// Least seconds of a one-token pass in which processors next to the device compute in turn with it, by the ceilings of RAM and VRAM;
    /// `None` without those processors or ceilings.
    pub(super) fn chain_seconds(&self) -> Option<f64> {
        let (vram, _) = (self.links.vram_ceiling?, self.links.ram_ceiling?);
        let units = works(&self.model, &self.weights.layouts);
        let beside = self.beside_at(&units, self.slower())?;
        let unit_s = self.on_device_s(&units, &beside, vram);
        Some(beside.chain_s(&units, &unit_s) + pass_s(self.site()))
    }

    /// By unit, seconds on the device, whose memory has this rate.
    fn on_device_s(&self, units: &[plan::UnitWork], beside: &plan::Beside, vram: f64) -> Vec<f64> {
        let device = (vram, self.links.multiprocessors);
        gpu_seconds(units, &self.living().0.homes, Some(beside), device, &Costs::default())
    }

    /// Parts of each feed-forward part that processors next to the device have, of [`crate::model::SLICE_PARTS`], where those are cut.
    pub fn slices(&self) -> Option<u32> {
        self.recipe.slices
    }

    /// What the session's plan followed from, by which it can be made again.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The plan and the division as the simulator sees them.
    fn living(&self) -> (Plan, Option<Division>) {
        let hits = slot_hits(&self.model, &self.plan, &self.options);
        as_living(&self.model, &self.plan, self.division(), hits)
    }

    fn division(&self) -> Option<Division> {
        let of = self.weights.beside.as_ref()?;
        Some(Division { units: self.beside()?, divided: of.divided.clone(), share: of.share })
    }

    /// The prediction from a machine's rates; `None` where one that it needs is a guess.
    pub fn predicted_on(&self, machine: &Machine) -> Option<Predicted> {
        let site = self.site();
        let measured = |r: &crate::plan::Rate| r.measured.then(|| r.bytes_per_s());
        let gpu = machine.gpu.as_ref();
        let computed = match site {
            Site::Gpu => measured(&gpu?.memory),
            Site::Cpu => machine.cpu.decode.as_ref().and_then(measured),
        };
        computed?;
        let storage = machine.storage.as_ref();
        // Beside processors that read the same memory the link is slower.
        let both = self.weights.beside.as_ref().and_then(|_| machine.site_rates(self.threads_beside()));
        let rates = Rates {
            vram: gpu.and_then(|g| measured(&g.memory)),
            gpu: gpu.and_then(|g| measured(&g.link)).map(|link| both.map_or(link, |b| b.link)),
            ram: measured(&machine.ram.read),
            ram_and_link: self.links.ram_and_link_ceiling,
            nvme: storage.and_then(|s| Some(measured(&s.read)? * s.drives as f64)),
            copies: self.links.storage_copies,
        };
        let units = works(&self.model, &self.weights.layouts);
        let costs = gpu.map_or_else(Costs::default, |g| g.costs.clone());
        let beside = self.living().1.zip(both).map(|(d, rates)| d.timed(&units, &rates, &costs));
        let unit_s = decode_seconds(&units, &self.living().0.homes, beside.as_ref(), machine, site);
        let experts = self.model.hparams.n_experts_used;
        let work = PassWork { unit_s, beside_s: pass_s(site), experts, prompt: false, ahead: false };
        Some(Predicted { pass: self.simulator(&rates, beside)?.settled(&work), rates })
    }

    /// The session's own plan for the simulator; `None` where a rate that it needs is missing.
    fn simulator(&self, rates: &Rates, beside: Option<plan::Beside>) -> Option<Setup> {
        let (living, division) = self.living();
        let plan = as_exact(&living, division.as_ref().map(|d| &d.units[..]));
        let streams = |home| plan.homes.contains(&home);
        let needs_link = self.device.is_some() && (streams(Home::B) || streams(Home::C));
        if streams(Home::C) && rates.nvme.is_none() || needs_link && rates.gpu.is_none() {
            return None;
        }
        let units = works(&self.model, &self.weights.layouts);
        let caching = caching(&self.model, &plan, self.options.routing.as_ref());
        let beside = beside.unwrap_or_default();
        Some(Setup { beside, ..setup(&units, &plan, rates, self.device.is_some(), caching) })
    }

    fn site(&self) -> Site {
        if self.device.is_some() { Site::Gpu } else { Site::Cpu }
    }

    /// Times a decode pass with transfers disabled, in seconds. The slots hold stale bytes, so the logits are garbage but
    /// the timing is right. `None` for a mixture of experts that streams, whose router would choose by nonsense.
    /// The session is good for nothing else after this.
    pub(super) fn compute_seconds(&mut self, stop: &dyn Fn() -> bool) -> Result<Option<f64>, EngineError> {
        let streams = self.plan.homes.iter().any(|h| *h == Home::C || *h == Home::B && self.device.is_some());
        if streams {
            if self.model.hparams.n_experts > 0 {
                return Ok(None);
            }
            // What is computed from is not written any more.
            self.weights.flow.reschedule(Place::Host, Vec::new(), Vec::new());
            let p = &self.plan;
            let (slots, n, attention) = match &self.device {
                Some(d) => (device_slots(p, d.slots.addr), p.device_slots, p.device_attention_slot_bytes),
                None => (self.weights.flow.addresses().collect(), p.n_slots, p.attention_slot_bytes),
            };
            let apart = apart(&self.model, attention);
            self.weights.feed = Box::new(Still { slots, n, apart, next: 0 });
        }
        if let Some(beside) = &mut self.weights.beside {
            // Nothing is to be brought.
            beside.class = Class::Exact;
        }
        let links = self.links;
        let mut pass = || -> Result<(), EngineError> {
            self.truncate(0);
            self.eval(&[0], Class::Exact, Outputs::Last, stop)?;
            self.any_logits().map(|_| ())
        };
        pass()?;
        let began = Instant::now();
        let mut passes = 0;
        while passes < COMPUTE_PASSES && began.elapsed().as_secs_f64() < COMPUTE_S {
            pass()?;
            passes += 1;
        }
        let seconds = began.elapsed().as_secs_f64() / passes as f64;
        self.links = links;
        Ok(Some(seconds))
    }
}

/// A feed with transfers disabled: slots in turn, as the flow would hand them over.
struct Still {
    slots: Vec<u64>,
    /// How many of them are for units that are not apart; all, if none is.
    n: usize,
    apart: Option<Vec<bool>>,
    next: usize,
}

impl Feed for Still {
    fn acquire(&mut self, unit: usize) -> Result<u64, StreamError> {
        let (others, attention) = self.slots.split_at(self.n);
        let of = if self.apart.as_ref().is_some_and(|apart| apart[unit]) { attention } else { others };
        self.next = (self.next + 1) % of.len();
        Ok(of[self.next])
    }

    fn release(&mut self) -> Result<(), StreamError> {
        Ok(())
    }

    fn demand(&mut self, _: &mut [usize], _: bool) {}

    fn restart(&mut self) {}
}

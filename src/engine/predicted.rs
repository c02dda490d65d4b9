//! What the simulator says of a session: its own plan, with rates that were measured.

use std::time::Instant;

use super::beside::as_exact;
use super::forecast::{PASSES_SHOWN, decode_seconds, setup, with_passes, works};
use super::hits::caching;
use super::start::{apart, device_slots};
use super::{EngineError, Session};
use crate::backend::Class;
use crate::flow::{Feed, Place};
use crate::model::Outputs;
use crate::pipeline::{Event, StreamError};
use crate::plan::{Home, Machine, PassWork, Rates, Setup, Shares, Site, pass_s};

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
        Some(Predicted { pass: self.simulator(&rates)?.settled(&self.measured_work()?), rates })
    }

    /// Some one-token passes as simulated with those ceilings, for a picture; empty without them.
    pub fn simulated_events(&self) -> Vec<Event> {
        let Some((setup, work)) = self.simulator(&self.links.rates()).zip(self.measured_work()) else {
            return Vec::new();
        };
        with_passes(setup.run(&[&work; PASSES_SHOWN]), std::iter::repeat(1))
    }

    /// A one-token pass whose units take shares of the measured time by their bytes.
    fn measured_work(&self) -> Option<PassWork> {
        let compute_s = self.links.compute_s?;
        // Processors beside a device take longer for a byte than it does.
        let slower = match (self.links.vram_ceiling, self.links.ram_ceiling) {
            (Some(vram), Some(ram)) => vram / ram,
            _ => 1.0,
        };
        let beside = self.beside().unwrap_or_default();
        let factor = |u: usize| if beside.get(u) == Some(&true) { slower } else { 1.0 };
        let weights: Vec<f64> = self.units_bytes().enumerate().map(|(u, b)| b * factor(u)).collect();
        // Of experts a pass uses as many as a token chooses.
        let units = works(&self.model, &self.weights.layouts);
        let all: f64 = weights.iter().zip(&units).map(|(w, u)| w * u.share).sum();
        let beside_s = pass_s(self.site()).min(compute_s);
        let unit_s = weights.iter().map(|w| (compute_s - beside_s) * w / all).collect();
        Some(PassWork { unit_s, beside_s, experts: self.model.hparams.n_experts_used, prompt: false })
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
        let beside = self.beside();
        let unit_s = decode_seconds(&units, beside.as_deref(), machine, site, self.threads_beside());
        let experts = self.model.hparams.n_experts_used;
        let work = PassWork { unit_s, beside_s: pass_s(site), experts, prompt: false };
        Some(Predicted { pass: self.simulator(&rates)?.settled(&work), rates })
    }

    /// The session's own plan for the simulator; `None` where a rate that it needs is missing.
    fn simulator(&self, rates: &Rates) -> Option<Setup> {
        let plan = as_exact(&self.plan, self.beside().as_deref());
        let streams = |home| plan.homes.contains(&home);
        let needs_link = self.device.is_some() && (streams(Home::B) || streams(Home::C));
        if streams(Home::C) && rates.nvme.is_none() || needs_link && rates.gpu.is_none() {
            return None;
        }
        let units = works(&self.model, &self.weights.layouts);
        let caching = caching(&self.model, &plan, self.options.routing.as_ref(), self.beside().as_deref());
        Some(setup(&units, &plan, rates, self.device.is_some(), caching))
    }

    fn site(&self) -> Site {
        if self.device.is_some() { Site::Gpu } else { Site::Cpu }
    }

    fn units_bytes(&self) -> impl Iterator<Item = f64> {
        self.model.units.iter().map(|u| u.bytes() as f64)
    }

    /// Times a decode pass with transfers disabled, in seconds. The slots hold stale bytes, so the logits are garbage but
    /// the timing is right. `None` for a mixture of experts that streams, whose router would choose by nonsense.
    /// The session is good for nothing else after this.
    pub(super) fn compute_seconds(&mut self) -> Result<Option<f64>, EngineError> {
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
            self.eval(&[0], Class::Exact, Outputs::Last, &|| false)?;
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

/// A feed that brings nothing: slots in turn, as the flow would hand them over.
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

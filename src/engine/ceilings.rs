//! What the links of this machine can carry, measured at the end of a benchmark.

use std::path::Path;
use std::time::{Duration, Instant};

use super::session::stream_error;
use super::steps::schedule;
use super::{EngineError, Session};
use crate::backend::CopyEngine;
use crate::backend::cuda::Device;
use crate::flow::{Place, Step};
use crate::machine;
use crate::machine::probe::link::{LINK_BESIDE, MEMORY_BESIDE};
use crate::memory::Region;
use crate::model::ForwardError;
use crate::plan::Home;

/// Bytes that the storage probe reads at least.
const STORAGE_PROBE_BYTES: u64 = 1 << 30;
/// Bytes that the link's probe copies, and most of one copy.
const LINK_PROBE_BYTES: u64 = 4 << 30;
const LINK_COPY_BYTES: u64 = 256 << 20;
/// How long it lasts at most.
const LINK_PROBE_TIME: Duration = Duration::from_secs(2);

impl Session {
    /// Measures what storage, memory and the link to a device can carry: laps over the streamed units
    /// without computing, copies, reads of memory by all threads, and one-token passes that bring nothing. The session is to compute
    /// no more.
    ///
    /// # Errors
    /// What failed, or [`ForwardError::Interrupted`] where `stop` says so; no ceiling is known then.
    pub fn measure_ceilings(&mut self, stop: &dyn Fn() -> bool) -> Result<(), EngineError> {
        let before = self.links;
        let measured = self.measure_each(stop);
        if measured.is_err() {
            self.links = before;
        }
        measured
    }

    fn measure_each(&mut self, stop: &dyn Fn() -> bool) -> Result<(), EngineError> {
        let free = machine::memory(Path::new("/")).free();
        self.links.ram_ceiling = machine::probe::memory::rate_of(self.options.threads, free).ok();
        self.links.ceilings_from = Some("measured after the run");
        if self.device.is_some()
            && let Ok(device) = Device::open(0)
        {
            self.links.multiprocessors = device.info.multiprocessors as usize;
            self.links.ram_and_link_ceiling = ram_and_link(&device, self.links.ram_ceiling);
        }
        go_on(stop)?;
        // Nothing else is carried while a link is measured.
        self.weights.flow.reschedule(Place::Host, Vec::new(), Vec::new());
        if let Some(d) = &self.device {
            self.links.vram_ceiling = d.memory.memory_rate()?;
            if self.plan.device_slots > 0 {
                let engine = d.memory.copy_engine(1)?;
                // What was read or loaded is not needed any more.
                let from = self.arena.whole();
                self.links.gpu_ceiling = link_rate(engine.as_ref(), from, d.slots.addr, self.plan.device_slot_bytes)?;
            }
        }
        go_on(stop)?;
        if self.plan.homes.contains(&Home::C) {
            self.links.nvme_ceiling = self.storage_rate(stop)?;
        }
        self.links.chain_s = self.chain_seconds();
        self.links.compute_s = self.compute_seconds(stop)?;
        Ok(())
    }

    /// Takes the ceilings that `nt probe` has measured on this machine, where there are any, so that a run
    /// need not measure. `model` is a file on the drive that is read.
    pub fn recall_ceilings(&mut self, model: &Path) {
        let recall = |kind: &str, identity: &str| Some(machine::probe::measured(kind, identity)?.bytes_per_s);
        let l = &mut self.links;
        l.ram_ceiling = recall("memory", &machine::memory_identity(Path::new("/")));
        if self.options.copies.is_empty() {
            let drive = machine::probe::Target::open(model).ok();
            l.nvme_ceiling = drive.and_then(|d| recall("storage", &d.identity));
        }
        if self.device.is_some()
            && let Ok(device) = Device::open(0)
        {
            l.multiprocessors = device.info.multiprocessors as usize;
            l.gpu_ceiling = recall("h2d", &machine::probe::link::identity(&device));
            l.vram_ceiling = recall("vram", &machine::probe::link::identity(&device));
            l.ram_and_link_ceiling = ram_and_link(&device, l.ram_ceiling);
        }
        let any = l.ram_ceiling.or(l.nvme_ceiling).or(l.gpu_ceiling);
        l.ceilings_from = any.map(|_| "rates that nt probe measured before");
        self.links.chain_s = self.chain_seconds();
    }

    /// Bytes per second; `None` where nothing but experts streams, whose order is not known.
    fn storage_rate(&self, stop: &dyn Fn() -> bool) -> Result<Option<f64>, EngineError> {
        let steps = schedule(&self.model, &|u| self.plan.homes[u] == Home::C);
        let flow = &self.weights.flow;
        let lap = || -> Result<u64, EngineError> {
            let before = flow.storage().bytes;
            for step in &steps {
                match step {
                    Step::Hole => flow.demand(&mut [], false),
                    Step::Unit(u) => {
                        go_on(stop)?;
                        let taken = flow.acquire(*u).map_err(stream_error)?;
                        flow.release(taken);
                    }
                }
            }
            Ok(flow.storage().bytes - before)
        };
        if steps.iter().all(|s| *s == Step::Hole) {
            return Ok(None);
        }
        flow.reschedule(Place::Host, steps.clone(), Vec::new());
        lap()?;
        let began = Instant::now();
        let mut bytes = 0;
        while bytes < STORAGE_PROBE_BYTES && began.elapsed().as_secs() < 5 {
            bytes += lap()?;
        }
        let rate = bytes as f64 / began.elapsed().as_secs_f64();
        flow.reschedule(Place::Host, Vec::new(), Vec::new());
        Ok(Some(rate))
    }
}

fn go_on(stop: &dyn Fn() -> bool) -> Result<(), EngineError> {
    if stop() { Err(ForwardError::Interrupted.into()) } else { Ok(()) }
}

/// What processors and the link read of RAM at once, as `nt probe` has measured it; no less than processors read alone.
fn ram_and_link(device: &Device, alone: Option<f64>) -> Option<f64> {
    let rate = |kind, identity: &str| Some(machine::probe::measured(kind, identity)?.bytes_per_s);
    let memory = rate(MEMORY_BESIDE, &machine::memory_identity(Path::new("/")))?;
    let link = rate(LINK_BESIDE, &machine::probe::link::identity(device))?;
    Some((memory + link).max(alone.unwrap_or(0.0)))
}

/// Bytes per second of copies from pinned memory to a slot; `None` where they cannot be timed.
fn link_rate(engine: &dyn CopyEngine, from: Region, to: u64, slot_bytes: u64) -> Result<Option<f64>, EngineError> {
    let bytes = LINK_COPY_BYTES.min(slot_bytes).min(from.len() as u64);
    let (mut copied, mut seconds) = (0, 0.0);
    let began = Instant::now();
    while copied < LINK_PROBE_BYTES && began.elapsed() < LINK_PROBE_TIME {
        // All of the arena in turn: not all memory is equally near.
        let at = copied % (from.len() as u64 - bytes + 1);
        // SAFETY: the source is part of the arena, which nothing frees meanwhile; the slot is no
        // longer computed from.
        unsafe { engine.upload(0, from.addr().add(at as usize), to, bytes as usize)? };
        match engine.wait_copied(0)? {
            Some(s) => seconds += s,
            None => return Ok(None),
        }
        copied += bytes;
    }
    Ok(Some(copied as f64 / seconds))
}

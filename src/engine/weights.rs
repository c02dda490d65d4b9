//! The forward pass's view of the weights: resident units at once, streamed ones when they are there.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Class, Share, SlotsAt};
use crate::flow::{Feed, Flow, Place, Step};
use crate::model::{HELD, WeightError, WeightSource};
use crate::pipeline::{EventKind, UnitLayout};
use crate::plan::Home;

/// Resident and streamed units of a session.
pub(super) struct Weights {
    pub layouts: Arc<[UnitLayout]>,
    /// Addresses, in the backend's memory, of resident units.
    pub resident: Vec<Option<u64>>,
    /// Whether any expert is streamed: then every block has a hole in the schedule.
    any_streamed_expert: bool,
    /// Bytes of the units that every pass uses: all but the routed experts.
    shared_bytes: u64,
    pub feed: Box<dyn Feed>,
    pub flow: Arc<Flow>,
    /// The unit that is held and its address.
    held: Option<(usize, u64)>,
    since: Instant,
    /// Class of the pass at hand.
    class: Class,
    /// The last pass was given up.
    given_up: bool,
    /// Home of each unit.
    homes: Vec<Home>,
    /// Uses of experts by single tokens, of those at home in VRAM, RAM and on storage.
    pub uses: [u64; 3],
    /// Bytes of weights handed to compute, also of experts that were brought ahead and that nobody chose.
    pub bytes: u64,
    /// Keep computing in the timeline.
    traced: bool,
    unit_bytes: Vec<u64>,
    /// Addresses, in the backend's memory, of vectors that are held apart from the units.
    pub apart: Vec<u64>,
    /// Addresses of experts that the device has in slots, for passes of other rows than exact ones; empty before any.
    lent: Vec<Option<u64>>,
    /// What processors next to a device compute, and bytes of weights that they were handed.
    pub beside: Option<Beside>,
    pub beside_bytes: u64,
    /// Bytes of experts that were brought to a device once they were chosen, past the flow.
    pub fetched_bytes: u64,
}

/// Units that processors next to a device compute from RAM in passes of exact rows, while prompts have them brought.
pub(super) struct Beside {
    /// Addresses in RAM of those that rest there; none of other units.
    pub units: Vec<Option<u64>>,
    /// By unit, whether it is one whose home is storage, which passes through a cache in RAM.
    pub cached: Vec<bool>,
    /// Addresses in RAM of vectors that are held apart.
    pub apart: Vec<u64>,
    /// What streams in a pass of exact rows, and in one of a prompt.
    pub steps: [Vec<Step>; 2],
    /// Whether those have holes for experts.
    pub holes: [bool; 2],
    /// What the flow brings now.
    pub class: Class,
    /// How many of a row's experts in RAM processors compute, where the others are brought to the device; none where processors
    /// compute all of them.
    pub share: Option<Share>,
    /// By unit, whether it is of a layer where that is so.
    pub divided: Vec<bool>,
    /// By unit, the part of its uses that processors compute, where each expert is as likely.
    pub parts: Vec<f64>,
    /// By block, where the device keeps some of its experts in RAM.
    pub slots: Vec<Option<SlotsAt>>,
    /// Bytes of the units that they compute in every pass: all but experts.
    pub each_pass_bytes: u64,
}

impl Weights {
    pub fn new(
        layouts: Arc<[UnitLayout]>,
        resident: Vec<Option<u64>>,
        (homes, routed): (Vec<Home>, &[bool]),
        unit_bytes: Vec<u64>,
        feed: Box<dyn Feed>,
        flow: Arc<Flow>,
        traced: bool,
    ) -> Weights {
        let any_streamed_expert = routed.iter().zip(&resident).any(|(r, home)| *r && home.is_none());
        let shared = routed.iter().zip(&unit_bytes).filter(|(r, _)| !**r);
        let shared_bytes = shared.map(|(_, bytes)| bytes).sum();
        Weights {
            layouts,
            resident,
            any_streamed_expert,
            shared_bytes,
            feed,
            flow,
            held: None,
            since: Instant::now(),
            class: Class::Bulk,
            given_up: false,
            homes,
            uses: [0; 3],
            bytes: 0,
            traced,
            unit_bytes,
            apart: Vec::new(),
            lent: Vec::new(),
            beside: None,
            beside_bytes: 0,
            fetched_bytes: 0,
        }
    }

    /// What processors next to a device compute, in the pass at hand.
    fn of_host(&self) -> Option<&Beside> {
        self.beside.as_ref().filter(|b| b.class == Class::Exact)
    }

    /// Where a unit is computed that is not brought in the pass at hand.
    fn here(&self, unit: usize) -> Option<u64> {
        let lent = || *self.lent.get(unit).filter(|_| self.class == Class::Bulk)?;
        self.resident[unit].or_else(|| self.of_host()?.units[unit]).or_else(lent)
    }

    /// Whether passes like this one have holes for experts.
    fn streams_experts(&self) -> bool {
        match &self.beside {
            Some(b) => b.holes[b.class as usize],
            None => self.any_streamed_expert,
        }
    }

    /// Gives a pass up after an error.
    pub fn restart(&mut self) {
        self.held = None;
        self.given_up = true;
        self.feed.restart();
    }
}

impl WeightSource for Weights {
    fn begin(&mut self, class: Class) -> Result<(), WeightError> {
        self.class = class;
        if std::mem::take(&mut self.given_up) {
            // What was read ahead while nobody computed may have failed for the same cause, which may be gone: it is brought once more.
            self.feed.restart();
        }
        // What slots hold may have changed.
        self.lent.clear();
        if let Some(beside) = &mut self.beside
            && beside.class != class
        {
            beside.class = class;
            let in_ram = if class == Class::Exact { beside.cached.clone() } else { Vec::new() };
            self.flow.reschedule(Place::Device, beside.steps[class as usize].clone(), in_ram);
        }
        Ok(())
    }

    fn in_ram(&self, unit: usize) -> bool {
        self.of_host().is_some_and(|b| b.units[unit].is_some() || b.cached[unit])
    }

    fn acquire(&mut self, unit: usize) -> Result<(), WeightError> {
        let base = match self.here(unit) {
            Some(addr) => addr,
            None if self.in_ram(unit) => self.feed.acquire_in_ram(unit)?,
            None => self.feed.acquire(unit)?,
        };
        self.bytes += self.unit_bytes[unit];
        if self.in_ram(unit) {
            self.beside_bytes += self.unit_bytes[unit];
        }
        if self.traced {
            self.since = Instant::now();
        }
        self.held = Some((unit, base));
        Ok(())
    }

    fn span(&self, unit: usize, span: usize) -> u64 {
        if unit == HELD {
            let of_host = self.held.is_some_and(|(unit, _)| self.in_ram(unit));
            let beside = self.beside.as_ref().filter(|_| of_host);
            return beside.map_or(&self.apart, |b| &b.apart)[span];
        }
        let (held, base) = self.held.unwrap_or((usize::MAX, 0));
        assert_eq!(held, unit, "a span of a unit that is not held");
        base + self.layouts[unit].span_offsets[span]
    }

    fn release(&mut self, unit: usize) -> Result<(), WeightError> {
        self.held = None;
        if self.traced {
            self.flow.trace(EventKind::Compute, unit, 0, self.since, Instant::now());
        }
        match self.here(unit) {
            Some(_) => Ok(()),
            None => self.feed.release().map_err(WeightError::from),
        }
    }

    fn demand(&mut self, units: &mut [usize]) -> Result<(), WeightError> {
        // Resident experts first: they compute while the others are brought.
        units.sort_unstable_by_key(|&u| (self.here(u).is_none(), u));
        if self.class == Class::Exact {
            units.iter().for_each(|&u| self.uses[self.homes[u] as usize] += 1);
        }
        if self.streams_experts() {
            let here = units.partition_point(|&u| self.here(u).is_some());
            self.feed.demand(&mut units[here..], self.class == Class::Bulk);
        }
        Ok(())
    }

    fn is_ready(&self, unit: usize) -> bool {
        !self.traced && self.here(unit).is_none() && self.feed.is_ready(unit)
    }

    fn is_near(&self, unit: usize) -> bool {
        self.here(unit).is_none() && self.homes[unit] == Home::B
    }

    /// The timeline shows each unit's computing: with it, none is put off.
    fn rests(&self, unit: usize) -> bool {
        !self.traced && self.here(unit).is_some()
    }

    /// The timeline shows the units of each pass: with it, each is acquired.
    fn stays(&self) -> bool {
        !self.traced && (0..self.resident.len()).all(|unit| self.here(unit).is_some())
    }

    fn repeated(&mut self) {
        self.bytes += self.shared_bytes;
        self.beside_bytes += self.of_host().map_or(0, |b| b.each_pass_bytes);
    }

    fn at_rest(&self, unit: usize, span: usize) -> Option<u64> {
        let base = self.resident[unit].filter(|_| !self.traced)?;
        Some(base + self.layouts[unit].span_offsets[span])
    }

    fn at_rest_in_ram(&self, unit: usize, span: usize) -> Option<u64> {
        let beside = self.beside.as_ref().filter(|_| !self.traced)?;
        if unit == HELD {
            return beside.apart.get(span).copied();
        }
        Some(beside.units[unit]? + self.layouts[unit].span_offsets[span])
    }

    fn share(&self) -> Option<Share> {
        self.beside.as_ref()?.share
    }

    fn lend(&mut self, first: usize, lent: &[Option<(u64, u64)>]) {
        let Some(beside) = &self.beside else { return };
        self.lent.resize(self.resident.len(), None);
        for (unit, at) in (first..).zip(lent) {
            // The unit begins before what was copied of it.
            let begin = |(slot, ram): (u64, u64)| Some(slot.wrapping_add(beside.units[unit]?.wrapping_sub(ram)));
            self.lent[unit] = at.and_then(begin);
        }
    }

    fn slots(&self, block: usize) -> Option<SlotsAt> {
        self.beside.as_ref()?.slots.get(block).copied().flatten()
    }

    fn used(&mut self, units: Range<usize>, chosen: usize) {
        let n = units.len().max(1) as u64;
        if self.class == Class::Exact {
            // Those of a layer that all rest are used in proportion.
            let at = |home: Home| self.homes[units.clone()].iter().filter(|h| **h == home).count() as u64;
            let in_vram = chosen as u64 * at(Home::A) / n;
            self.uses[Home::A as usize] += in_vram;
            self.uses[Home::B as usize] += chosen as u64 - in_vram;
        }
        let (all, chosen) = (self.unit_bytes[units.clone()].iter().sum::<u64>(), chosen as u64);
        self.bytes += all / n * chosen;
        if let Some(beside) = self.beside.as_ref().filter(|b| b.class == Class::Exact)
            && beside.share.is_some()
        {
            // As many of each as there are, on average.
            let (mut theirs, mut others) = (0.0, 0.0);
            for u in units.filter(|u| beside.units[*u].is_some()) {
                theirs += self.unit_bytes[u] as f64 * beside.parts[u];
                others += self.unit_bytes[u] as f64 * (1.0 - beside.parts[u]);
            }
            let uses = chosen as f64 / n as f64;
            self.beside_bytes += (theirs * uses) as u64;
            self.fetched_bytes += (others * uses) as u64;
        }
    }
}

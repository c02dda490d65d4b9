//! The forward pass's view of the weights: resident units at once, streamed ones when they are there.

use std::sync::Arc;
use std::time::Instant;

use crate::flow::{Feed, Flow};
use crate::model::{HELD, WeightError, WeightSource};
use crate::pipeline::{EventKind, UnitLayout};

/// Resident and streamed units of a session.
pub(super) struct Weights {
    pub layouts: Arc<[UnitLayout]>,
    /// Addresses, in the backend's memory, of resident units.
    pub resident: Vec<Option<u64>>,
    /// Whether any expert is streamed: then every block has a hole in the schedule.
    any_streamed_expert: bool,
    pub feed: Box<dyn Feed>,
    pub flow: Arc<Flow>,
    /// The unit that is held and its address.
    held: Option<(usize, u64)>,
    since: Instant,
    streamed: Vec<usize>,
    /// Bytes of weights handed to compute.
    pub bytes: u64,
    /// Keep computing in the timeline.
    traced: bool,
    unit_bytes: Vec<u64>,
    /// Addresses, in the backend's memory, of vectors that are held apart from the units.
    pub apart: Vec<u64>,
}

impl Weights {
    pub fn new(
        layouts: Arc<[UnitLayout]>,
        resident: Vec<Option<u64>>,
        routed: &[bool],
        unit_bytes: Vec<u64>,
        feed: Box<dyn Feed>,
        flow: Arc<Flow>,
        traced: bool,
    ) -> Weights {
        let any_streamed_expert = routed.iter().zip(&resident).any(|(r, home)| *r && home.is_none());
        let n_routed = routed.iter().filter(|r| **r).count();
        Weights {
            layouts,
            resident,
            any_streamed_expert,
            feed,
            flow,
            held: None,
            since: Instant::now(),
            streamed: Vec::with_capacity(n_routed),
            bytes: 0,
            traced,
            unit_bytes,
            apart: Vec::new(),
        }
    }

    /// Gives a pass up after an error.
    pub fn restart(&mut self) {
        self.held = None;
        self.feed.restart();
    }
}

impl WeightSource for Weights {
    fn acquire(&mut self, unit: usize) -> Result<(), WeightError> {
        let base = match self.resident[unit] {
            Some(addr) => addr,
            None => self.feed.acquire(unit)?,
        };
        self.bytes += self.unit_bytes[unit];
        if self.traced {
            self.since = Instant::now();
        }
        self.held = Some((unit, base));
        Ok(())
    }

    fn span(&self, unit: usize, span: usize) -> u64 {
        if unit == HELD {
            return self.apart[span];
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
        match self.resident[unit] {
            Some(_) => Ok(()),
            None => self.feed.release().map_err(WeightError::from),
        }
    }

    fn demand(&mut self, units: &mut [usize]) -> Result<(), WeightError> {
        // Resident experts first: they compute while the others are brought.
        units.sort_unstable_by_key(|&u| (self.resident[u].is_none(), u));
        if self.any_streamed_expert {
            self.streamed.clear();
            self.streamed.extend(units.iter().copied().filter(|&u| self.resident[u].is_none()));
            self.feed.demand(&self.streamed);
        }
        Ok(())
    }

    /// The timeline shows each unit's computing: with it, none is put off.
    fn rests(&self, unit: usize) -> bool {
        !self.traced && self.resident[unit].is_some()
    }

    /// The timeline shows the units of each pass: with it, each is acquired.
    fn stays(&self) -> bool {
        !self.traced && self.resident.iter().all(Option::is_some)
    }

    fn repeated(&mut self) {
        self.bytes += self.unit_bytes.iter().sum::<u64>();
    }
}

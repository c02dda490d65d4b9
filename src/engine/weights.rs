//! The forward pass's view of the ring: resident units at once, streamed ones when they are read.

use std::sync::Arc;
use std::time::Instant;

use crate::memory::Region;
use crate::model::WeightSource;
use crate::pipeline::{Streamer, UnitLayout};

/// Resident and streamed units of a session.
pub(super) struct Weights {
    pub layouts: Arc<[UnitLayout]>,
    /// Where resident units lie.
    pub resident: Vec<Option<Region>>,
    /// Whether any expert lives on storage: then every block has a hole in the schedule.
    pub any_streamed_expert: bool,
    pub streamer: Streamer,
    /// Address of the unit that is held, by unit.
    held: Option<(usize, u64)>,
    since: Instant,
    streamed: Vec<usize>,
    /// Bytes of weights handed to compute.
    pub bytes: u64,
    pub traced: bool,
    pub unit_bytes: Vec<u64>,
}

impl Weights {
    pub fn new(
        layouts: Arc<[UnitLayout]>,
        resident: Vec<Option<Region>>,
        routed: &[bool],
        unit_bytes: Vec<u64>,
        streamer: Streamer,
        traced: bool,
    ) -> Weights {
        let any_streamed_expert = routed.iter().zip(&resident).any(|(r, home)| *r && home.is_none());
        let n_routed = routed.iter().filter(|r| **r).count();
        Weights {
            layouts,
            resident,
            any_streamed_expert,
            streamer,
            held: None,
            since: Instant::now(),
            streamed: Vec::with_capacity(n_routed),
            bytes: 0,
            traced,
            unit_bytes,
        }
    }

    /// Gives a pass up after an error.
    pub fn restart(&mut self) {
        self.held = None;
        self.streamer.restart();
    }
}

impl WeightSource for Weights {
    fn acquire(&mut self, unit: usize) -> Result<(), String> {
        let base = match self.resident[unit] {
            Some(region) => region.addr as u64,
            None => self.streamer.acquire(unit).map_err(|e| e.to_string())? as u64,
        };
        self.bytes += self.unit_bytes[unit];
        if self.traced {
            self.since = Instant::now();
        }
        self.held = Some((unit, base));
        Ok(())
    }

    fn span(&self, unit: usize, span: usize) -> u64 {
        let (held, base) = self.held.unwrap_or((usize::MAX, 0));
        assert_eq!(held, unit, "a span of a unit that is not held");
        base + self.layouts[unit].span_offsets[span]
    }

    fn release(&mut self, unit: usize) -> Result<(), String> {
        self.held = None;
        match self.resident[unit] {
            Some(_) if self.traced => self.streamer.trace_resident(unit, self.since),
            Some(_) => {}
            None => self.streamer.release(unit),
        }
        Ok(())
    }

    fn demand(&mut self, units: &mut [usize]) -> Result<(), String> {
        // Resident experts first: they compute while the others are read.
        units.sort_unstable_by_key(|&u| (self.resident[u].is_none(), u));
        if self.any_streamed_expert {
            self.streamed.clear();
            self.streamed.extend(units.iter().copied().filter(|&u| self.resident[u].is_none()));
            self.streamer.demand(&self.streamed);
        }
        Ok(())
    }
}

//! The consumer side of the ring: hands streamed units to the forward pass.

use std::sync::Arc;
use std::time::Duration;

use super::streamer::{StreamError, Streamer};

/// What the link to a device carried.
#[derive(Clone, Copy, Debug)]
pub struct FeedStats {
    /// Bytes copied.
    pub bytes: u64,
    /// Time in which the link was busy.
    pub busy: Duration,
    /// Time the caller waited for copies to start.
    pub stall: Duration,
    /// Whether `busy` was measured for all copies.
    pub timed: bool,
}

impl Default for FeedStats {
    fn default() -> FeedStats {
        FeedStats { bytes: 0, busy: Duration::ZERO, stall: Duration::ZERO, timed: true }
    }
}

/// Streamed units, in pass order, where the backend computes.
pub trait Feed {
    /// Waits for `unit`, the next streamed one, and returns its address in the backend's memory.
    fn acquire(&mut self, unit: usize) -> Result<u64, StreamError>;

    /// Gives the unit acquired last back; operations called so far may still use it.
    fn release(&mut self) -> Result<(), StreamError>;

    /// Announces the streamed units that will be acquired next, where the schedule has a hole.
    fn demand(&mut self, units: &[usize]);

    /// Gives a pass up; the next one begins with the schedule's first unit.
    fn restart(&mut self);

    /// What the link to a device carried.
    fn stats(&self) -> FeedStats;
}

/// Units are computed from the staging slots themselves.
pub struct Direct {
    streamer: Arc<Streamer>,
    held: Option<usize>,
}

impl Direct {
    /// Straight from `streamer`.
    pub fn new(streamer: Arc<Streamer>) -> Direct {
        Direct { streamer, held: None }
    }
}

impl Feed for Direct {
    fn acquire(&mut self, unit: usize) -> Result<u64, StreamError> {
        let staged = self.streamer.acquire(unit)?;
        self.held = Some(staged.slot);
        Ok(staged.addr as u64)
    }

    fn release(&mut self) -> Result<(), StreamError> {
        if let Some(slot) = self.held.take() {
            self.streamer.release(slot);
        }
        Ok(())
    }

    fn demand(&mut self, units: &[usize]) {
        self.streamer.demand(units);
    }

    fn restart(&mut self) {
        self.held = None;
        self.streamer.restart();
    }

    fn stats(&self) -> FeedStats {
        FeedStats::default()
    }
}

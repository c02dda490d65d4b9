//! The consumer side: hands streamed units to the forward pass, where the backend computes.

use std::sync::Arc;

use super::threads::{Flow, Taken};
use crate::backend::{BackendError, CopyEngine};
use crate::pipeline::StreamError;

/// Streamed units, in pass order.
pub trait Feed {
    /// Waits for `unit`, the next streamed one, and returns its address in the backend's memory.
    ///
    /// # Errors
    /// Why it will not come; the pass is then to be given up.
    fn acquire(&mut self, unit: usize) -> Result<u64, StreamError>;

    /// The same for a unit that processors next to a device use: returns its address in RAM.
    ///
    /// # Errors
    /// As [`Feed::acquire`].
    fn acquire_in_ram(&mut self, unit: usize) -> Result<u64, StreamError> {
        self.acquire(unit)
    }

    /// Whether `unit`, which is demanded and comes next, may be acquired at once, while others are held still: all are
    /// given back by the next release.
    fn is_ready(&self, _unit: usize) -> bool {
        false
    }

    /// Gives the unit acquired last back, and those before it; on a device, operations called so far may still use it.
    ///
    /// # Errors
    /// If the device is gone.
    fn release(&mut self) -> Result<(), StreamError>;

    /// Announces the streamed units that will be acquired next, where the schedule has a hole, and puts them into the
    /// order in which they are to be acquired. `passing`: they are a prompt's.
    fn demand(&mut self, units: &mut [usize], passing: bool);

    /// Gives a pass up; the next one begins with the schedule's first unit.
    fn restart(&mut self);
}

/// Units of a flow: computed from its frames in RAM, or from those of a device, whose engine orders copies and work.
pub struct Units {
    flow: Arc<Flow>,
    frames: Vec<u64>,
    engine: Option<Arc<dyn CopyEngine>>,
    /// What was acquired last.
    held: Option<Taken>,
    /// Frames of the device that are held.
    on_device: Vec<usize>,
}

impl Units {
    /// Computed from frames in RAM.
    pub fn in_ram(flow: Arc<Flow>) -> Units {
        let frames = flow.addresses().collect();
        Units { flow, frames, engine: None, held: None, on_device: Vec::new() }
    }

    /// Computed from a device's frames at these addresses.
    pub fn on_device(flow: Arc<Flow>, engine: Arc<dyn CopyEngine>, frames: Vec<u64>) -> Units {
        let on_device = Vec::with_capacity(frames.len());
        Units { flow, frames, engine: Some(engine), held: None, on_device }
    }
}

fn device(e: BackendError) -> StreamError {
    StreamError::Device(Arc::new(e))
}

impl Feed for Units {
    fn acquire(&mut self, unit: usize) -> Result<u64, StreamError> {
        let taken = self.flow.acquire(unit)?;
        if let Some(engine) = &self.engine {
            engine.acquire(taken.frame).map_err(device)?;
            self.on_device.push(taken.frame);
        }
        self.held = Some(taken);
        Ok(self.frames[taken.frame])
    }

    fn acquire_in_ram(&mut self, unit: usize) -> Result<u64, StreamError> {
        let taken = self.flow.acquire(unit)?;
        self.held = Some(taken);
        Ok(self.flow.address(taken.frame))
    }

    fn is_ready(&self, unit: usize) -> bool {
        // Half of a device's frames are left to what comes next.
        let left = self.on_device.is_empty() || self.on_device.len() < self.frames.len() / 2;
        left && self.flow.is_ready(unit)
    }

    fn release(&mut self) -> Result<(), StreamError> {
        let Some(taken) = self.held.take() else { return Ok(()) };
        if let Some(engine) = &self.engine {
            for frame in self.on_device.drain(..) {
                engine.release(frame).map_err(device)?;
            }
        }
        self.flow.release(taken);
        Ok(())
    }

    fn demand(&mut self, units: &mut [usize], passing: bool) {
        self.flow.demand(units, passing);
    }

    fn restart(&mut self) {
        self.held = None;
        self.on_device.clear();
        if let Some(engine) = &self.engine {
            // What the device has been given must end before its frames are filled anew; if the device is gone, so is
            // what it would have done.
            let _ = engine.settle();
        }
        self.flow.give_up();
    }
}

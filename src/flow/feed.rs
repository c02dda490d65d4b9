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

    /// Gives the unit acquired last back; operations called so far may still use it.
    ///
    /// # Errors
    /// If the device is gone.
    fn release(&mut self) -> Result<(), StreamError>;

    /// Announces the streamed units that will be acquired next, where the schedule has a hole.
    fn demand(&mut self, units: &[usize]);

    /// Gives a pass up; the next one begins with the schedule's first unit.
    fn restart(&mut self);
}

/// Units of a flow: computed from its frames in RAM, or from those of a device, whose engine orders copies and work.
pub struct Units {
    flow: Arc<Flow>,
    frames: Vec<u64>,
    engine: Option<Arc<dyn CopyEngine>>,
    held: Option<Taken>,
}

impl Units {
    /// Computed from frames in RAM.
    pub fn in_ram(flow: Arc<Flow>) -> Units {
        let frames = flow.addresses().collect();
        Units { flow, frames, engine: None, held: None }
    }

    /// Computed from a device's frames at these addresses.
    pub fn on_device(flow: Arc<Flow>, engine: Arc<dyn CopyEngine>, frames: Vec<u64>) -> Units {
        Units { flow, frames, engine: Some(engine), held: None }
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
        }
        self.held = Some(taken);
        Ok(self.frames[taken.frame])
    }

    fn release(&mut self) -> Result<(), StreamError> {
        if let Some(taken) = self.held.take() {
            if let Some(engine) = &self.engine {
                engine.release(taken.frame).map_err(device)?;
            }
            self.flow.release(taken);
        }
        Ok(())
    }

    fn demand(&mut self, units: &[usize]) {
        self.flow.demand(units);
    }

    fn restart(&mut self) {
        self.held = None;
        if let Some(engine) = &self.engine {
            // What the device has been given must end before its frames are filled anew; if the device is gone, so is
            // what it would have done.
            let _ = engine.settle();
        }
        self.flow.give_up();
    }
}

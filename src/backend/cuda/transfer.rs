//! The copy engine's side of the ring: uploads into device slots on a stream of their own, and the
//! events that keep copies and computation off each other's slots. Nothing here waits on the host
//! unless asked to.
//!
//! For one slot the order is: `upload` (waits, on the device, for the last `release`) → `acquire`
//! (computation waits, on the device, for the upload) → operations of the backend → `release`.
//! `copied` tells when the staging memory of an upload may be reused.

use std::sync::Arc;

use super::driver::{Device, Event, Stream};
use crate::backend::BackendError;

struct Slot {
    copied: Event,
    computed: Event,
}

/// Uploads into a fixed number of device slots.
pub struct Transfer {
    copy: Stream,
    compute: Arc<Stream>,
    slots: Vec<Slot>,
}

impl Transfer {
    /// For `slots` slots, beside the backend whose stream is `compute`
    /// ([`super::CudaBackend::stream`]).
    pub fn new(device: &Arc<Device>, compute: Arc<Stream>, slots: usize) -> Result<Self, BackendError> {
        let slot = || -> Result<Slot, BackendError> {
            Ok(Slot { copied: device.event(false)?, computed: device.event(false)? })
        };
        Ok(Transfer { copy: device.stream()?, compute, slots: (0..slots).map(|_| slot()).collect::<Result<_, _>>()? })
    }

    /// Starts the copies `(source, device address, bytes)` into `slot`, after the computation that
    /// last used it.
    ///
    /// # Safety
    /// Each source stays valid and unchanged until [`Transfer::copied`] says true; the device
    /// ranges belong to `slot` alone.
    pub unsafe fn upload(&self, slot: usize, copies: &[(*const u8, u64, usize)]) -> Result<(), BackendError> {
        self.copy.device().bind()?;
        let s = &self.slots[slot];
        self.copy.wait(&s.computed)?;
        for &(src, dst, bytes) in copies {
            // SAFETY: the caller vouches for the ranges; the wait above keeps the device range
            // from computation.
            unsafe { self.copy.upload(src, dst, bytes)? };
        }
        s.copied.record(&self.copy)
    }

    /// Whether the last upload into `slot` is done, so that its staging memory is free.
    pub fn copied(&self, slot: usize) -> Result<bool, BackendError> {
        self.slots[slot].copied.query()
    }

    /// Waits on the host for the last upload into `slot`.
    pub fn wait_copied(&self, slot: usize) -> Result<(), BackendError> {
        self.slots[slot].copied.synchronize()
    }

    /// Operations called from now on run after the last upload into `slot`.
    pub fn acquire(&self, slot: usize) -> Result<(), BackendError> {
        self.compute.wait(&self.slots[slot].copied)
    }

    /// The operations called so far were the last to use `slot`.
    pub fn release(&self, slot: usize) -> Result<(), BackendError> {
        self.slots[slot].computed.record(&self.compute)
    }

    /// Whether the computation that last used `slot` is done.
    pub fn computed(&self, slot: usize) -> Result<bool, BackendError> {
        self.slots[slot].computed.query()
    }

    /// The stream of the copies.
    pub fn stream(&self) -> &Stream {
        &self.copy
    }
}

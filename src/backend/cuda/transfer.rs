//! The copy engine's side of the ring: uploads into device slots on a stream of their own, and the
//! events that keep copies and computation off each other's slots.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::driver::{Device, Event, Stream, device_error};
use crate::backend::{BackendError, CopyEngine};

/// How often the end of a copy is looked for.
const POLL: Duration = Duration::from_micros(50);
/// Longest wait for a copy, and for what still computes from its slot: no pass takes nearly as long.
const COPY_MAX: Duration = Duration::from_secs(120);

struct Slot {
    began: Event,
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
        let slot = |_| -> Result<Slot, BackendError> {
            Ok(Slot { began: device.event(true)?, copied: device.event(true)?, computed: device.event(false)? })
        };
        Ok(Transfer { copy: device.stream()?, compute, slots: (0..slots).map(slot).collect::<Result<_, _>>()? })
    }
}

impl CopyEngine for Transfer {
    unsafe fn upload(&self, slot: usize, src: *const u8, dst: u64, bytes: usize) -> Result<(), BackendError> {
        self.copy.device().bind()?;
        let s = &self.slots[slot];
        // Most often that is over, and then the copy engine has nothing to wait for.
        if !s.computed.query()? {
            self.copy.wait(&s.computed)?;
        }
        s.began.record(&self.copy)?;
        // SAFETY: the caller vouches for the ranges; the wait above keeps the device range from
        // computation.
        unsafe { self.copy.upload(src, dst, bytes)? };
        s.copied.record(&self.copy)
    }

    fn wait_copied(&self, slot: usize) -> Result<Option<f64>, BackendError> {
        let s = &self.slots[slot];
        self.copy.device().bind()?;
        // Events that wake a sleeping thread cost the link 150 µs each (measured); waiting for others
        // would keep a processor busy. Copies are queued ahead, so that a late look costs nothing.
        let began = Instant::now();
        while !s.copied.query()? {
            if began.elapsed() > COPY_MAX {
                return Err(device_error(format!(
                    "a copy to slot {slot} has not ended after {} s; the GPU or its link hangs (`dmesg` has lines with Xid then)",
                    COPY_MAX.as_secs()
                )));
            }
            std::thread::sleep(POLL);
        }
        // Older drivers cannot subtract events.
        Ok(s.copied.ms_since(&s.began).ok().map(|ms| f64::from(ms) / 1e3))
    }

    fn try_copied(&self, slot: usize) -> Result<Option<Option<f64>>, BackendError> {
        let s = &self.slots[slot];
        self.copy.device().bind()?;
        Ok(s.copied.query()?.then(|| s.copied.ms_since(&s.began).ok().map(|ms| f64::from(ms) / 1e3)))
    }

    fn acquire(&self, slot: usize) -> Result<(), BackendError> {
        self.compute.wait(&self.slots[slot].copied)
    }

    fn release(&self, slot: usize) -> Result<(), BackendError> {
        self.slots[slot].computed.record(&self.compute)
    }

    fn settle(&self) -> Result<(), BackendError> {
        self.copy.device().bind()?;
        self.compute.synchronize()?;
        self.copy.synchronize()
    }
}

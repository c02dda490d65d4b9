//! The engine's view of the GPU's memory.

use std::sync::Arc;

use super::driver::{Device, Stream};
use super::transfer::Transfer;
use crate::backend::{BackendError, CopyEngine, DeviceAlloc, DeviceMemory, MemoryUse, Pinned};
use crate::memory::Region;

/// Bytes that are copied to measure the memory: several times what caches hold.
const PROBE_BYTES: u64 = 256 << 20;
const PROBE_ROUNDS: usize = 8;

/// Memory of the GPU whose operations run on `compute`.
pub(super) struct CudaMemory {
    device: Arc<Device>,
    compute: Arc<Stream>,
}

impl CudaMemory {
    pub fn new(device: &Arc<Device>, compute: &Arc<Stream>) -> CudaMemory {
        CudaMemory { device: Arc::clone(device), compute: Arc::clone(compute) }
    }
}

impl DeviceMemory for CudaMemory {
    fn describe(&self) -> String {
        let i = &self.device.info;
        let link = i.pcie.map_or(String::new(), |(generation, width)| format!(", PCIe Gen {generation} x{width}"));
        format!(
            "{} ({}.{}){link}, driver for CUDA {}.{}",
            i.name, i.capability.0, i.capability.1, i.driver_version.0, i.driver_version.1
        )
    }

    fn memory(&self) -> Result<MemoryUse, BackendError> {
        self.device.memory_use()
    }

    fn alloc(&self, bytes: u64, what: &'static str) -> Result<DeviceAlloc, BackendError> {
        let buffer = self.device.alloc(bytes, what)?;
        Ok(DeviceAlloc::new(buffer.addr(), bytes, buffer))
    }

    fn pin(&self, memory: &Region) -> Result<Pinned, BackendError> {
        // SAFETY: what is given back holds the region longer than its registration.
        Ok(Pinned::new(memory, unsafe { self.device.register_host(memory.addr(), memory.len())? }))
    }

    fn copy_engine(&self, slots: usize) -> Result<Arc<dyn CopyEngine>, BackendError> {
        Ok(Arc::new(Transfer::new(&self.device, Arc::clone(&self.compute), slots)?))
    }

    fn memory_rate(&self) -> Result<Option<f64>, BackendError> {
        let buffers =
            self.device.alloc(PROBE_BYTES, "probe").and_then(|a| Ok((a, self.device.alloc(PROBE_BYTES, "probe")?)));
        let (a, b) = match buffers {
            Ok(buffers) => buffers,
            Err(BackendError::OutOfMemory { .. }) => return Ok(None),
            Err(e) => return Err(e),
        };
        let (began, ended) = (self.device.event(true)?, self.device.event(true)?);
        for round in 0..=PROBE_ROUNDS {
            // The first round only wakes the memory.
            if round == 1 {
                began.record(&self.compute)?;
            }
            // SAFETY: both buffers hold the bytes and are nobody else's.
            unsafe { self.compute.copy(a.addr(), b.addr(), PROBE_BYTES as usize)? };
        }
        ended.record(&self.compute)?;
        ended.synchronize()?;
        // Each byte is read and written.
        let bytes = 2.0 * PROBE_ROUNDS as f64 * PROBE_BYTES as f64;
        Ok(ended.ms_since(&began).ok().map(|ms| bytes / f64::from(ms) * 1e3))
    }
}

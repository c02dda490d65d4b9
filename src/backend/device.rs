//! The seam to a device with memory of its own: what the engine needs to bring weights there.

use std::sync::Arc;

use super::BackendError;
use crate::memory::Region;

/// Device memory, given back on drop.
pub struct DeviceAlloc {
    /// Address of the first byte, on the device.
    pub addr: u64,
    /// Bytes.
    pub bytes: u64,
    _owner: Box<dyn Send + Sync>,
}

impl DeviceAlloc {
    /// Memory that `owner` holds.
    pub fn new(addr: u64, bytes: u64, owner: impl Send + Sync + 'static) -> DeviceAlloc {
        DeviceAlloc { addr, bytes, _owner: Box::new(owner) }
    }
}

/// Host memory that copies run from at the link's speed, as long as this lives.
pub struct Pinned {
    _owner: Box<dyn Send + Sync>,
    /// Dropped behind the registration.
    _memory: Region,
}

impl Pinned {
    /// Memory that `owner` has pinned.
    pub fn new(memory: &Region, owner: impl Send + Sync + 'static) -> Pinned {
        Pinned { _owner: Box::new(owner), _memory: memory.clone() }
    }
}

/// Device memory in bytes, as the driver counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes in use by this process, the driver's own included.
    pub used: u64,
    /// Bytes free.
    pub free: u64,
}

/// A device that computes from memory of its own.
pub trait DeviceMemory: Send + Sync {
    /// Name, driver and link, for reports.
    fn describe(&self) -> String;

    /// What is in use and what is free now.
    fn memory(&self) -> Result<MemoryUse, BackendError>;

    /// Allocates memory for `what`.
    fn alloc(&self, bytes: u64, what: &'static str) -> Result<DeviceAlloc, BackendError>;

    /// Pins host memory, which stays mapped until the result is dropped.
    fn pin(&self, memory: &Region) -> Result<Pinned, BackendError>;

    /// Copies into `slots` slots, ordered with the backend's operations.
    fn copy_engine(&self, slots: usize) -> Result<Arc<dyn CopyEngine>, BackendError>;

    /// Bytes per second that the device reads from its own memory; `None` where it was not measured.
    fn memory_rate(&self) -> Result<Option<f64>, BackendError>;
}

/// Copies into device slots. For one slot the order is `upload` → `acquire` → operations of the
/// backend → `release` → `upload` …; nothing waits on the host but `wait_copied` and `settle`.
pub trait CopyEngine: Send + Sync {
    /// Starts the copy of `bytes` bytes to `dst` in `slot`, after the operations that last used it.
    ///
    /// # Safety
    /// The source stays valid and unchanged until `wait_copied` has returned; the device range
    /// belongs to `slot` alone.
    unsafe fn upload(&self, slot: usize, src: *const u8, dst: u64, bytes: usize) -> Result<(), BackendError>;

    /// Waits for the last upload into `slot`; returns the seconds that it took on the link, where
    /// they can be told.
    fn wait_copied(&self, slot: usize) -> Result<Option<f64>, BackendError>;

    /// As [`CopyEngine::wait_copied`], but `None` if the upload has not ended. Engines that cannot ask wait for it.
    fn try_copied(&self, slot: usize) -> Result<Option<Option<f64>>, BackendError> {
        self.wait_copied(slot).map(Some)
    }

    /// Operations called from now on run after the last upload into `slot`.
    fn acquire(&self, slot: usize) -> Result<(), BackendError>;

    /// The operations called so far were the last to use `slot`.
    fn release(&self, slot: usize) -> Result<(), BackendError>;

    /// Waits for all copies and operations.
    fn settle(&self) -> Result<(), BackendError>;
}

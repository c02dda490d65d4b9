//! Controller registers. NVMe Base Specification 2.0 §3.1.3.

use std::time::Duration;

/// Capabilities, §3.1.3.1.
pub const CAP: u32 = 0x00;
/// Version, §3.1.3.2.
pub const VS: u32 = 0x08;
/// Configuration, §3.1.3.5.
pub const CC: u32 = 0x14;
/// Status, §3.1.3.6.
pub const CSTS: u32 = 0x1c;
/// Admin queue attributes, §3.1.3.8.
pub const AQA: u32 = 0x24;
/// Admin submission queue base, §3.1.3.9.
pub const ASQ: u32 = 0x28;
/// Admin completion queue base, §3.1.3.10.
pub const ACQ: u32 = 0x30;
/// First doorbell; NVMe over PCIe Transport 1.0 §3.1.2.
pub const DOORBELLS: u32 = 0x1000;
/// Bytes of registers that are mapped: those of the controller and the doorbells of two pairs of queues, clear of
/// MSI-X tables. Doorbells that lie beyond cannot be rung.
pub const MAPPED: u32 = 0x2000;

/// Enable, bit 0 of CC.
pub const CC_EN: u32 = 1;
/// Normal shutdown notification, bits 15:14 of CC.
pub const CC_SHN_NORMAL: u32 = 1 << 14;
/// Both bits of the shutdown notification.
pub const CC_SHN_MASK: u32 = 3 << 14;
/// Ready, bit 0 of CSTS.
pub const CSTS_RDY: u32 = 1;
/// Fatal status, bit 1 of CSTS.
pub const CSTS_CFS: u32 = 1 << 1;
/// What a register of a device that is gone reads as.
pub const GONE: u32 = u32::MAX;

/// Access to one controller's registers, and the clock that its deadlines are measured with.
pub trait Registers {
    /// Reads 4 bytes at `offset`.
    fn read32(&self, offset: u32) -> u32;
    /// Writes 4 bytes at `offset`.
    fn write32(&self, offset: u32, value: u32);
    /// Time since some fixed moment.
    fn now(&self) -> Duration;
    /// A short pause between two polls.
    fn pause(&self);

    /// True once if the system has asked to have the drive back.
    fn wanted_back(&self) -> bool {
        false
    }

    /// Reads 8 bytes, low half first.
    fn read64(&self, offset: u32) -> u64 {
        let low = self.read32(offset);
        u64::from(low) | u64::from(self.read32(offset + 4)) << 32
    }

    /// Writes 8 bytes, low half first: some controllers take no 8-byte access.
    fn write64(&self, offset: u32, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }
}

/// CAP, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// Most entries a queue may have (MQES is zero-based).
    pub fn max_entries(self) -> u32 {
        (self.0 & 0xffff) as u32 + 1
    }
    /// Worst time to become ready or not ready; at least 3 s, since some controllers say 0.
    pub fn ready_timeout(self) -> Duration {
        let units = (self.0 >> 24) & 0xff;
        Duration::from_millis((units + 1) * 500).max(Duration::from_secs(3))
    }
    /// Bytes between two doorbells.
    pub fn doorbell_stride(self) -> u32 {
        4 << ((self.0 >> 32) & 0xf)
    }
    /// True if the NVM command set is there.
    pub fn has_nvm(self) -> bool {
        self.0 >> 37 & 1 == 1
    }
    /// Smallest memory page, as a power of two.
    pub fn min_page_shift(self) -> u32 {
        12 + ((self.0 >> 48) & 0xf) as u32
    }
}

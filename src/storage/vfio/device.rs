//! The hardware side: a drive bound to vfio-pci, its registers mapped, memory mapped for its DMA.

use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::sys::uio::{pread, pwrite};
use nix::time::ClockId;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioOps};

use super::bringup::{Controller, Fault, memory_needed};
use super::interrupt::{Interrupt, Wanted};
use super::queue::Dma;
use super::quirks::Quirks;
use super::regs::Registers;
use super::removal::{self, Covered};
use crate::storage::guard::Host;
use crate::storage::{Bell, bind};

const HUGE: u64 = 2 << 20;

/// `linux/vfio.h`.
mod ioctl {
    nix::ioctl_none_bad!(device_reset, 0x3b6f);
    // A `vfio_iommu_type1_info` and its capabilities; the first word is the length of all.
    nix::ioctl_readwrite_bad!(iommu_get_info, 0x3b70, u64);
}

/// Why a bound drive could not be opened or used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// VFIO would not give the device.
    #[error(
        "{bdf}: VFIO cannot open the drive: {why}; is it bound (`nt device bind`), is no other process using it, is this user in the group `nt`, is interrupt remapping on?"
    )]
    Vfio {
        /// PCI address.
        bdf: String,
        /// The system's words.
        why: String,
    },
    /// Memory could not be mapped for DMA.
    #[error(
        "{bdf}: {len} bytes cannot be mapped for DMA: {why}; the limit of locked memory is {limit} bytes (`ulimit -l`)"
    )]
    Map {
        /// PCI address.
        bdf: String,
        /// Bytes.
        len: usize,
        /// The system's words.
        why: String,
        /// RLIMIT_MEMLOCK.
        limit: u64,
    },
    /// Another drive answers than was bound.
    #[error("{bdf}: {expected} was bound, {found} answers; it is not read")]
    WrongDrive {
        /// PCI address.
        bdf: String,
        /// Model, serial and bytes of the drive that was bound.
        expected: String,
        /// Those of the drive that answers.
        found: String,
    },
    /// The controller failed.
    #[error("{bdf}: {fault}")]
    Fault {
        /// PCI address.
        bdf: String,
        /// What happened.
        #[source]
        fault: Fault,
    },
}

/// BAR 0 of a drive.
#[derive(Debug)]
pub struct Bar {
    base: NonNull<u8>,
    len: usize,
    /// Dropped before the mapping goes.
    covered: Option<Covered>,
    /// None where the kernel does not tell.
    wanted: Option<Wanted>,
}

// SAFETY: the mapping belongs to this value alone and has no thread affinity.
unsafe impl Send for Bar {}

impl Registers for Bar {
    fn read32(&self, offset: u32) -> u32 {
        let at = offset as usize;
        // None is asked for: bring-up refuses controllers whose doorbells lie beyond.
        debug_assert!(at + 4 <= self.len, "register {offset:#x} is not mapped");
        if at + 4 > self.len {
            return super::regs::GONE;
        }
        // SAFETY: in bounds of the mapping that lives as long as self; registers are 4-byte aligned.
        unsafe { self.base.add(at).cast::<u32>().as_ptr().read_volatile() }
    }

    fn write32(&self, offset: u32, value: u32) {
        let at = offset as usize;
        debug_assert!(at + 4 <= self.len, "register {offset:#x} is not mapped");
        if at + 4 <= self.len {
            // SAFETY: as in `read32`.
            unsafe { self.base.add(at).cast::<u32>().as_ptr().write_volatile(value) }
        }
    }

    /// The kernel's clock as of its last tick. Deadlines are long, and this avoids reading a hardware timer, which
    /// can cost as much as a disk read in a virtual machine.
    fn now(&self) -> Duration {
        ClockId::CLOCK_MONOTONIC_COARSE.now().map(Duration::from).unwrap_or_default()
    }

    fn pause(&self) {
        std::hint::spin_loop();
    }

    fn wanted_back(&self) -> bool {
        self.wanted.as_ref().is_some_and(Wanted::asked)
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.covered = None;
        // SAFETY: base and len are what mmap returned, and nothing else refers to them.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}

/// An open drive with its queues up.
pub struct VfioNvme {
    /// PCI address.
    pub bdf: String,
    /// The controller.
    pub controller: Controller<Bar>,
    // The kernel maps stay until the controller has stopped; see Drop.
    vfio: ManuallyDrop<Vfio>,
}

/// What came of silencing a drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Silence {
    /// The function was reset.
    pub reset: bool,
    /// The device can write to no memory from here on.
    pub bus_master_off: bool,
}

struct Vfio {
    device: VfioDevice,
    container: Arc<VfioContainer>,
    windows: Vec<(u64, u64)>,
    next: u64,
    queues: Anonymous,
    quirks: Quirks,
    interrupt: Option<Interrupt>,
}

/// Anonymous, page-aligned memory.
struct Anonymous {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory owned by this value.
unsafe impl Send for Anonymous {}

impl Anonymous {
    fn new(len: NonZeroUsize) -> nix::Result<Self> {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE;
        // SAFETY: a fresh anonymous mapping touches no memory of ours.
        let ptr = unsafe { mmap_anonymous(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags)? };
        // SAFETY: the range was mapped just now; a copy-on-write after fork would leave the
        // device writing to the other process's page.
        let _ = unsafe { madvise(ptr, len.get(), MmapAdvise::MADV_DONTFORK) };
        Ok(Self { ptr: ptr.cast(), len: len.get() })
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: what mmap returned; the owner unmaps it from the device first.
        let _ = unsafe { munmap(self.ptr.cast(), self.len) };
    }
}

impl VfioNvme {
    /// Opens the drive at `bdf`, which is bound to vfio-pci, and brings it up.
    ///
    /// # Errors
    /// If VFIO, the memory limit or the controller say no; the controller is off then.
    pub fn open(bdf: &str, nsid: u32, entries: u16) -> Result<Self, OpenError> {
        let mut vfio = Vfio::open(bdf, memory_needed(entries))?;
        let (ptr, len) = (vfio.queues.ptr.as_ptr(), vfio.queues.len);
        // SAFETY: the queue memory is owned by `vfio`, page aligned, and unmapped in its Drop.
        let iova = unsafe { vfio.map(bdf, ptr, len)? };
        // SAFETY: as above; only the driver touches it from here on.
        let memory = unsafe { Dma::new(ptr, iova, len) };
        let bar = vfio.bar(bdf)?;
        match Controller::start(bar, memory, nsid, entries, vfio.quirks, vfio.interrupt.is_some()) {
            Ok(controller) => Ok(Self { bdf: bdf.into(), controller, vfio: ManuallyDrop::new(vfio) }),
            Err((fault, bar)) => {
                let running = bar.read32(super::regs::CSTS) & super::regs::CSTS_RDY != 0 && fault != Fault::Gone;
                if running && !vfio.silence().bus_master_off {
                    // It may still write to the queues: keep them until the process ends.
                    std::mem::forget(vfio);
                }
                Err(OpenError::Fault { bdf: bdf.into(), fault })
            }
        }
    }

    /// Sleeps until the drive raises its interrupt or `most` has passed; true if it was raised. None, at
    /// once, if it raises none for the reads that it has.
    pub(super) fn wait_interrupt(&mut self, most: Duration) -> Option<bool> {
        let raises = self.controller.will_interrupt();
        self.vfio.interrupt.as_mut().filter(|_| raises)?.wait(most).ok()
    }

    /// What ends waits for the interrupt.
    pub(super) fn bell(&self) -> Option<&Arc<Bell>> {
        self.vfio.interrupt.as_ref().map(Interrupt::bell)
    }

    /// Notes whether the interrupt was raised for a completion that was waited for. One that never is, is not
    /// waited for any more.
    pub(super) fn heard(&mut self, raised: bool) {
        if self.vfio.interrupt.as_mut().is_some_and(|interrupt| interrupt.broken(raised)) {
            tracing::warn!("{}: the drive's interrupt does not arrive, so all waits poll", self.bdf);
            self.vfio.interrupt = None;
        }
    }

    /// The last means against a controller that will not stop: a reset of the function, and no bus master
    /// any more. What it owes is lost. Dropping the drive takes this step by itself where it is needed.
    pub fn silence(&mut self) -> Silence {
        self.vfio.silence()
    }

    /// Lets the drive write to `ptr .. + len`; returns the address on its side.
    ///
    /// # Safety
    /// The memory must be page aligned, stay mapped until this value is dropped, and not be
    /// referenced while reads to it are outstanding.
    pub unsafe fn map(&mut self, ptr: *mut u8, len: usize) -> Result<u64, OpenError> {
        // SAFETY: the caller's promise.
        unsafe { self.vfio.map(&self.bdf, ptr, len) }
    }
}

impl Drop for VfioNvme {
    fn drop(&mut self) {
        if self.controller.stop().is_ok() || self.vfio.silence().bus_master_off {
            // SAFETY: dropped once, here; the controller is off, so nothing reaches the memory.
            unsafe { ManuallyDrop::drop(&mut self.vfio) };
        }
        // Otherwise the mappings stay until the process ends, when the kernel resets the function.
    }
}

impl Vfio {
    fn open(bdf: &str, queue_bytes: usize) -> Result<Self, OpenError> {
        let fail = |why: String| OpenError::Vfio { bdf: bdf.into(), why };
        bind::group_node_is_right(&Host::default(), bdf).map_err(|e| fail(e.to_string()))?;
        let container = Arc::new(VfioContainer::new(None).map_err(|e| fail(e.to_string()))?);
        let path = format!("/sys/bus/pci/devices/{bdf}");
        let ops: Arc<dyn VfioOps> = container.clone();
        let device = VfioDevice::new(Path::new(&path), ops, false).map_err(|e| fail(format!("{e} ({e:?})")))?;
        if let Err(e) = reset(&device) {
            tracing::debug!("{bdf}: no function reset: {e}");
        }
        let windows = windows(&container).map_err(|e| fail(format!("the IOMMU's windows cannot be read: {e}")))?;
        let queue_bytes = NonZeroUsize::new(queue_bytes.next_multiple_of(4096)).unwrap_or(NonZeroUsize::MIN);
        let queues = Anonymous::new(queue_bytes).map_err(|e| fail(e.to_string()))?;
        let mut vfio =
            Self { device, container, windows, next: HUGE, queues, quirks: Quirks::default(), interrupt: None };
        let ids = vfio.pci_ids().map_err(|e| fail(format!("its configuration space cannot be read: {e}")))?;
        vfio.quirks = Quirks::of(ids.0, ids.1);
        std::thread::sleep(vfio.quirks.rest_after_reset);
        vfio.bus_master().map_err(|e| fail(format!("its configuration space cannot be written: {e}")))?;
        vfio.interrupt = Interrupt::on(&vfio.device)
            .inspect_err(|e| tracing::debug!("{bdf}: no interrupt, so all waits poll: {e}"))
            .ok();
        Ok(vfio)
    }

    /// Memory space and bus master on, legacy interrupt off. PCI Local Bus 3.0 §6.2.2.
    fn bus_master(&self) -> std::io::Result<()> {
        self.pci_command(|word| word | 0x406).map(|_| ())
    }

    fn silence(&self) -> Silence {
        let reset = reset(&self.device).is_ok();
        let bus_master_off = self.pci_command(|word| word & !4).is_ok_and(|word| word & 4 == 0);
        tracing::warn!("the drive was silenced; function reset: {reset}, bus master off: {bus_master_off}");
        Silence { reset, bus_master_off }
    }

    /// Vendor and device.
    fn pci_ids(&self) -> std::io::Result<(u16, u16)> {
        let at = self.device.get_region_offset(VFIO_PCI_CONFIG_REGION_INDEX);
        let mut ids = [0u8; 4];
        whole(pread(open(&self.device), &mut ids, at as libc::off_t), ids.len())?;
        Ok((u16::from_le_bytes([ids[0], ids[1]]), u16::from_le_bytes([ids[2], ids[3]])))
    }

    /// Changes the PCI command register; returns what it reads as afterwards.
    fn pci_command(&self, change: impl Fn(u16) -> u16) -> std::io::Result<u16> {
        let at = (self.device.get_region_offset(VFIO_PCI_CONFIG_REGION_INDEX) + 4) as libc::off_t;
        let mut word = [0u8; 2];
        let device = open(&self.device);
        whole(pread(device, &mut word, at), word.len())?;
        let changed = change(u16::from_le_bytes(word)).to_le_bytes();
        whole(pwrite(device, &changed, at), changed.len())?;
        whole(pread(device, &mut word, at), word.len())?;
        Ok(u16::from_le_bytes(word))
    }

    fn bar(&self, bdf: &str) -> Result<Bar, OpenError> {
        let fail = |why: String| OpenError::Vfio { bdf: bdf.into(), why };
        let len = self.device.get_region_size(VFIO_PCI_BAR0_REGION_INDEX) as usize;
        let flags = self.device.get_region_flags(VFIO_PCI_BAR0_REGION_INDEX);
        if flags & VFIO_REGION_INFO_FLAG_MMAP == 0 || len < super::regs::MAPPED as usize {
            return Err(fail(format!("its registers cannot be mapped (flags {flags:#x}, {len} bytes)")));
        }
        let offset = self.device.get_region_offset(VFIO_PCI_BAR0_REGION_INDEX) as libc::off_t;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        const LEN: NonZeroUsize = NonZeroUsize::new(super::regs::MAPPED as usize).unwrap();
        // SAFETY: a new mapping of the device's region; it is released by Bar.
        let base = unsafe { mmap(None, LEN, protection, MapFlags::MAP_SHARED, open(&self.device), offset) };
        let base = base.map_err(|e| fail(format!("its registers cannot be mapped: {e}")))?;
        let wanted = Wanted::watch(&self.device);
        let wanted = wanted.inspect_err(|e| tracing::debug!("{bdf}: a removal will not be announced: {e}")).ok();
        let mut bar = Bar { base: base.cast(), len: LEN.get(), covered: None, wanted };
        // SAFETY: the registers that were mapped just now; `bar` uncovers them before it unmaps them.
        let covered = unsafe { removal::cover(bar.base.as_ptr(), bar.len) };
        bar.covered = Some(covered.map_err(|e| fail(format!("its removal could not be survived: {e}")))?);
        Ok(bar)
    }

    /// # Safety
    /// As [`VfioNvme::map`].
    unsafe fn map(&mut self, bdf: &str, ptr: *mut u8, len: usize) -> Result<u64, OpenError> {
        let fail = |why: String| OpenError::Map { bdf: bdf.into(), len, why, limit: memlock() };
        let iova = place(&self.windows, self.next, len as u64)
            .ok_or_else(|| fail("no window of the IOMMU is large enough".into()))?;
        // SAFETY: the caller's promise: mapped, and kept until we unmap by closing the container.
        unsafe { self.container.vfio_dma_map(iova, len, ptr) }.map_err(|e| fail(e.to_string()))?;
        self.next = iova + len as u64;
        Ok(iova)
    }
}

/// The first 2 MiB-aligned address from `from` on where `len` bytes fit into a window.
fn place(windows: &[(u64, u64)], from: u64, len: u64) -> Option<u64> {
    windows.iter().find_map(|&(start, last)| {
        let at = from.max(start).checked_next_multiple_of(HUGE)?;
        (at.checked_add(len)?.checked_sub(1)? <= last.min((1 << 48) - 1)).then_some(at)
    })
}

/// The descriptor of an open device, for nix.
fn open(device: &VfioDevice) -> BorrowedFd<'_> {
    // SAFETY: the device closes its descriptor when it is dropped, and is borrowed until then.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }
}

/// Resets the function.
fn reset(device: &VfioDevice) -> nix::Result<()> {
    // SAFETY: an ioctl without argument on an open device.
    unsafe { ioctl::device_reset(device.as_raw_fd()) }.map(|_| ())
}

/// Checks that a transfer moved all of its `len` bytes.
fn whole(moved: nix::Result<usize>, len: usize) -> std::io::Result<()> {
    match moved? {
        n if n == len => Ok(()),
        n => Err(std::io::Error::other(format!("{n} of {len} bytes were moved"))),
    }
}

/// Usable I/O address windows, first and last byte. `linux/vfio.h`, `vfio_iommu_type1_info`.
fn windows(container: &VfioContainer) -> nix::Result<Vec<(u64, u64)>> {
    let mut buffer = vec![0u64; 512];
    let bytes = (buffer.len() * 8) as u32;
    buffer[0] = u64::from(bytes);
    // SAFETY: the buffer is as long as its first word (argsz) says.
    unsafe { ioctl::iommu_get_info(container.as_raw_fd(), buffer.as_mut_ptr())? };
    let info: Vec<u8> = buffer.iter().flat_map(|w| w.to_ne_bytes()).collect();
    Ok(parse_windows(&info))
}

fn parse_windows(info: &[u8]) -> Vec<(u64, u64)> {
    let u32_at = |at: usize| info.get(at..at + 4).map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    let mut found = Vec::new();
    let mut at = if u32_at(4) & 2 != 0 { u32_at(16) as usize } else { 0 };
    let mut steps = 0;
    while at != 0 && steps < 16 {
        // Header: id and version (u16 each), offset of the next (u32); id 1 is the IOVA range list.
        if u32_at(at) & 0xffff == 1 {
            let count = u32_at(at + 8).min(64) as usize;
            found = (0..count).map(|i| (u64_at(at + 16 + i * 16), u64_at(at + 24 + i * 16))).collect();
        }
        at = u32_at(at + 4) as usize;
        steps += 1;
    }
    if found.is_empty() {
        // Kernels before 5.4 tell no ranges: 32 bits below the MSI window are common to all.
        found.push((0, 0xfedf_ffff));
    }
    found
}

fn memlock() -> u64 {
    nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft)
}

#[cfg(test)]
mod tests {
    use super::place;

    #[test]
    fn mappings_avoid_the_hole() {
        let windows = [(0, 0xfedf_ffff), (0xfef0_0000, 0x7f_ffff_ffff)];
        assert_eq!(place(&windows, 2 << 20, 4096), Some(2 << 20));
        assert_eq!(place(&windows, 2 << 20, 0x1_0000_0000), Some(0xff00_0000));
        assert_eq!(place(&windows, 0x7f_ffff_f000, 8192), None);
    }
}

//! The part of the CUDA driver API that the backend uses, made safe: device, memory, streams,
//! events, host memory registration. The driver is loaded at run time, so that one binary serves
//! machines with and without it; a missing driver is an error, never a panic.

use std::ffi::{CStr, c_void};
use std::sync::Arc;

use cudarc::driver::sys;
use sys::CUdevice_attribute_enum as Attr;

use crate::backend::{BackendError, MemoryUse};

/// Bytes behind every device buffer that kernels may read though nobody asked for them: copies to
/// shared memory go in whole 16-byte lines.
pub const PAD_BYTES: u64 = 256;

/// Most bytes that a context is thought to take.
const CONTEXT_BYTES_MAX: u64 = 1 << 30;

pub(super) fn device_error(what: impl Into<String>) -> BackendError {
    BackendError::Device { backend: "cuda", what: what.into() }
}

/// Turns a driver result into an error that says what was tried.
pub(super) fn check(r: sys::CUresult, what: &str) -> Result<(), BackendError> {
    if r == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text: *const std::ffi::c_char = std::ptr::null();
    // SAFETY: the driver is loaded (it returned r); text receives a static string or null.
    let known = unsafe { sys::cuGetErrorString(r, &mut text) } == sys::CUresult::CUDA_SUCCESS;
    let words = if known && !text.is_null() {
        // SAFETY: the driver gave a pointer to a static, null-terminated string.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    } else {
        format!("{r:?}")
    };
    let what = format!("{what}: {words}");
    Err(if ends_process(r) { BackendError::Lost { backend: "cuda", what } } else { device_error(what) })
}

/// Whether the driver answers this process with the same error from now on, as its documentation says of these.
fn ends_process(r: sys::CUresult) -> bool {
    use sys::CUresult::*;
    matches!(
        r,
        CUDA_ERROR_DEINITIALIZED
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_EXTERNAL_DEVICE
    )
}

/// What is known of a GPU.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// The driver's name of it.
    pub name: String,
    /// Compute capability, for example (9, 0).
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory a block may ask for, in bytes.
    pub shared_bytes: u32,
    /// L2 cache, in bytes.
    pub l2_bytes: u64,
    /// Memory of the device, in bytes.
    pub total_bytes: u64,
    /// The CUDA version that the driver supports, for example (13, 0).
    pub driver_version: (u32, u32),
    /// PCI address, for example `0000:02:00.0`.
    pub pci_address: String,
    /// Maximum PCIe generation and width of device and slot, where the system says so.
    pub pcie: Option<(u32, u32)>,
}

/// An opened GPU and its primary context.
#[derive(Debug)]
pub struct Device {
    dev: sys::CUdevice,
    ctx: sys::CUcontext,
    /// Free bytes when nothing but the context was there.
    free_at_first: u64,
    /// Facts about it.
    pub info: DeviceInfo,
}

// SAFETY: the driver API may be called from any thread; the context handle is only a token that
// each thread makes current (`bind`) before use.
unsafe impl Send for Device {}
// SAFETY: as above; no field changes after `open`.
unsafe impl Sync for Device {}

impl Device {
    /// Opens GPU number `ordinal`. Errors if there is no driver, no such GPU, or it is too old.
    ///
    /// The first makes the context, which takes some 100 ms and VRAM; as long as any is held, others share it
    /// and cost next to nothing.
    pub fn open(ordinal: i32) -> Result<Arc<Device>, BackendError> {
        Device::open_as(ordinal, u32::MAX)
    }

    /// As [`Device::open`], but says that it has no more multiprocessors than `most`: grids are cut for as many, so that
    /// blocks come to their second tile, and to the end of their rings, in small products.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn open_as(ordinal: i32, most: u32) -> Result<Arc<Device>, BackendError> {
        // SAFETY: only tries to load the driver's library.
        if !unsafe { sys::is_culib_present() } {
            return Err(device_error("no NVIDIA driver is there (libcuda.so.1 does not load)"));
        }
        // SAFETY: the library is there; cuInit may be called any number of times.
        check(unsafe { sys::cuInit(0) }, "the driver does not start")?;
        let mut dev = 0;
        check(
            // SAFETY: dev receives the handle.
            unsafe { sys::cuDeviceGet(&mut dev, ordinal) },
            "no such GPU",
        )?;
        let mut info = device_info(dev)?;
        info.multiprocessors = info.multiprocessors.min(most);
        if info.capability < (8, 0) {
            return Err(device_error(format!(
                "{} has compute capability {}.{}; 8.0 or newer is needed",
                info.name, info.capability.0, info.capability.1
            )));
        }
        let mut ctx = std::ptr::null_mut();
        check(
            // SAFETY: dev is a valid handle; ctx receives the retained context.
            unsafe { sys::cuDevicePrimaryCtxRetain(&mut ctx, dev) },
            "the GPU's context could not be made",
        )?;
        let mut device = Device { dev, ctx, free_at_first: 0, info };
        device.free_at_first = device.mem_info()?.0;
        Ok(Arc::new(device))
    }

    /// One of the driver's numbers about it.
    pub(super) fn attribute(&self, a: sys::CUdevice_attribute) -> Result<u32, BackendError> {
        attribute(self.dev, a)
    }

    /// Makes the device current in this thread; to be called in each thread that uses it.
    pub fn bind(&self) -> Result<(), BackendError> {
        // SAFETY: ctx is retained until drop.
        check(unsafe { sys::cuCtxSetCurrent(self.ctx) }, "GPU context lost")
    }

    /// Free and total bytes of device memory, as the driver counts them.
    pub fn mem_info(&self) -> Result<(u64, u64), BackendError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        check(
            // SAFETY: both receive a number.
            unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) },
            "device memory cannot be read",
        )?;
        Ok((free as u64, total as u64))
    }

    /// Bytes of device memory that this process holds, and bytes free. What the driver itself takes
    /// cannot be told from what other processes take, so it is counted up to 1 GiB.
    pub fn memory_use(&self) -> Result<MemoryUse, BackendError> {
        let (free, total) = self.mem_info()?;
        let context = total.saturating_sub(self.free_at_first).min(CONTEXT_BYTES_MAX);
        Ok(MemoryUse { used: context + self.free_at_first.saturating_sub(free), free })
    }

    /// Allocates `bytes` of device memory (and [`PAD_BYTES`] behind them) for `what`, zeroed: kernels read whole lines
    /// and tiles, of which the last may be partly nobody's.
    pub fn alloc(self: &Arc<Self>, bytes: u64, what: &'static str) -> Result<DeviceBuffer, BackendError> {
        self.bind()?;
        let mut addr = 0;
        // SAFETY: addr receives the address.
        let r = unsafe { sys::cuMemAlloc_v2(&mut addr, (bytes + PAD_BYTES) as usize) };
        if r == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(BackendError::OutOfMemory { backend: "cuda", what, bytes });
        }
        check(r, what)?;
        let buffer = DeviceBuffer { addr, bytes, device: Arc::clone(self) };
        // SAFETY: the range was allocated above, and nobody uses it yet.
        check(unsafe { sys::cuMemsetD8_v2(addr, 0, (bytes + PAD_BYTES) as usize) }, what)?;
        // SAFETY: the null stream is always there. Other streams do not wait for it by themselves.
        check(unsafe { sys::cuStreamSynchronize(std::ptr::null_mut()) }, what)?;
        Ok(buffer)
    }

    /// Allocates `len` elements of pinned host memory, zeroed.
    pub fn alloc_pinned<T: bytemuck::Pod>(
        self: &Arc<Self>,
        len: usize,
        what: &'static str,
    ) -> Result<PinnedBuffer<T>, BackendError> {
        self.bind()?;
        let bytes = len.max(1) * size_of::<T>();
        let mut ptr = std::ptr::null_mut();
        // SAFETY: ptr receives the address.
        check(unsafe { sys::cuMemAllocHost_v2(&mut ptr, bytes) }, what)?;
        // SAFETY: the driver gave `bytes` writable bytes.
        unsafe { std::ptr::write_bytes(ptr.cast::<u8>(), 0, bytes) };
        Ok(PinnedBuffer { ptr: ptr.cast(), len, device: Arc::clone(self) })
    }

    /// Registers host memory so that copies from it run at the link's speed and asynchronously.
    ///
    /// # Safety
    /// `len` bytes at `ptr` stay mapped until the result is dropped.
    pub unsafe fn register_host(self: &Arc<Self>, ptr: *mut u8, len: usize) -> Result<Registered, BackendError> {
        self.bind()?;
        check(
            // SAFETY: the caller vouches for the memory; the default flags leave it cached.
            unsafe { sys::cuMemHostRegister_v2(ptr.cast(), len, 0) },
            &format!("{len} bytes of host memory could not be pinned"),
        )?;
        Ok(Registered { ptr, device: Arc::clone(self) })
    }

    /// A new stream that does not wait for the default one.
    pub fn stream(self: &Arc<Self>) -> Result<Stream, BackendError> {
        self.bind()?;
        let mut raw = std::ptr::null_mut();
        check(
            // SAFETY: raw receives the handle; 1 is CU_STREAM_NON_BLOCKING.
            unsafe { sys::cuStreamCreate(&mut raw, 1) },
            "a stream could not be made",
        )?;
        Ok(Stream { raw, device: Arc::clone(self) })
    }

    /// A new event; `timed` ones can be subtracted.
    pub fn event(self: &Arc<Self>, timed: bool) -> Result<Event, BackendError> {
        self.bind()?;
        let mut raw = std::ptr::null_mut();
        // CU_EVENT_DISABLE_TIMING is 2.
        let flags = if timed { 0 } else { 2 };
        check(
            // SAFETY: raw receives the handle.
            unsafe { sys::cuEventCreate(&mut raw, flags) },
            "an event could not be made",
        )?;
        Ok(Event { raw, device: Arc::clone(self) })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`; every buffer, stream and event holds an Arc of self, so
        // none outlives it.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.dev) };
    }
}

fn attribute(dev: sys::CUdevice, a: sys::CUdevice_attribute) -> Result<u32, BackendError> {
    let mut v = 0;
    check(
        // SAFETY: v receives the number.
        unsafe { sys::cuDeviceGetAttribute(&mut v, a, dev) },
        "a GPU attribute cannot be read",
    )?;
    Ok(v as u32)
}

fn device_info(dev: sys::CUdevice) -> Result<DeviceInfo, BackendError> {
    let mut name = [0 as std::ffi::c_char; 256];
    let mut pci = [0 as std::ffi::c_char; 32];
    let (mut total, mut version) = (0usize, 0);
    // SAFETY: each call writes at most the length given into a live array or number; both texts
    // are null-terminated within it.
    unsafe {
        check(sys::cuDeviceGetName(name.as_mut_ptr(), 256, dev), "GPU name")?;
        check(sys::cuDeviceGetPCIBusId(pci.as_mut_ptr(), 32, dev), "GPU address")?;
        check(sys::cuDeviceTotalMem_v2(&mut total, dev), "GPU memory")?;
        check(sys::cuDriverGetVersion(&mut version), "driver version")?;
    }
    let text = |p: &[std::ffi::c_char]| {
        // SAFETY: the driver terminated both texts.
        unsafe { CStr::from_ptr(p.as_ptr()) }.to_string_lossy().into_owned()
    };
    let pci_address = text(&pci).to_lowercase();
    Ok(DeviceInfo {
        name: text(&name),
        capability: (
            attribute(dev, Attr::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(dev, Attr::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(dev, Attr::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes: attribute(dev, Attr::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        l2_bytes: u64::from(attribute(dev, Attr::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
        total_bytes: total as u64,
        driver_version: (version as u32 / 1000, version as u32 % 1000 / 10),
        pcie: pcie_link(&pci_address),
        pci_address,
    })
}

/// The link's maximum from sysfs; the current speed drops when idle, so it is not asked.
fn pcie_link(address: &str) -> Option<(u32, u32)> {
    let read = |what: &str| std::fs::read_to_string(format!("/sys/bus/pci/devices/{address}/{what}")).ok();
    let speed: f32 = read("max_link_speed")?.split_whitespace().next()?.parse().ok()?;
    let width = read("max_link_width")?.trim().parse().ok()?;
    let generation = match speed {
        s if s >= 64.0 => 6,
        s if s >= 32.0 => 5,
        s if s >= 16.0 => 4,
        s if s >= 8.0 => 3,
        s if s >= 5.0 => 2,
        _ => 1,
    };
    Some((generation, width))
}

/// Device memory, freed on drop.
#[derive(Debug)]
pub struct DeviceBuffer {
    addr: u64,
    bytes: u64,
    device: Arc<Device>,
}

impl DeviceBuffer {
    /// Address of the first byte: a multiple of 256.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Size as asked for.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Copies `src` to `offset` and waits.
    pub fn write<T: bytemuck::Pod>(&self, offset: u64, src: &[T]) -> Result<(), BackendError> {
        let len = size_of_val(src) as u64;
        assert!(offset + len <= self.bytes, "write beyond a device buffer");
        self.device.bind()?;
        // SAFETY: the range lies in this buffer and src is live during the calls. The copy of
        // pageable memory may return before the last bytes have arrived, and other streams do not
        // wait for it: so this does.
        unsafe {
            check(sys::cuMemcpyHtoD_v2(self.addr + offset, src.as_ptr().cast(), len as usize), "copy to the GPU")?;
            check(sys::cuStreamSynchronize(std::ptr::null_mut()), "copy to the GPU")
        }
    }

    /// Copies from `offset` to `dst`, after everything already submitted, and waits.
    pub fn read<T: bytemuck::Pod>(&self, offset: u64, dst: &mut [T]) -> Result<(), BackendError> {
        let len = size_of_val(dst) as u64;
        assert!(offset + len <= self.bytes, "read beyond a device buffer");
        self.device.bind()?;
        // SAFETY: the range lies in this buffer and dst is live during the calls.
        unsafe {
            check(sys::cuCtxSynchronize(), "GPU work failed")?;
            check(sys::cuMemcpyDtoH_v2(dst.as_mut_ptr().cast(), self.addr + offset, len as usize), "copy from the GPU")
        }
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in `alloc`, freed once; the driver waits for work that uses it.
            unsafe { sys::cuMemFree_v2(self.addr) };
        }
    }
}

/// Pinned host memory, freed on drop.
#[derive(Debug)]
pub struct PinnedBuffer<T> {
    ptr: *mut T,
    len: usize,
    device: Arc<Device>,
}

// SAFETY: plain memory owned by the buffer.
unsafe impl<T: Send> Send for PinnedBuffer<T> {}

impl<T: bytemuck::Pod> PinnedBuffer<T> {
    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: `len` initialised elements, any bit pattern valid.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }

    /// Address of the first element, in this process and on the device.
    pub fn ptr(&self) -> *mut T {
        self.ptr
    }

    /// The elements, to be written while no copy uses them.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and self is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

impl<T> Drop for PinnedBuffer<T> {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in `alloc_pinned`, freed once.
            unsafe { sys::cuMemFreeHost(self.ptr.cast()) };
        }
    }
}

/// Host memory registered with the driver, released on drop.
#[derive(Debug)]
pub struct Registered {
    ptr: *mut u8,
    device: Arc<Device>,
}

// SAFETY: the pointer is only a key for the driver.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

impl Drop for Registered {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: registered in `register_host`, released once.
            unsafe { sys::cuMemHostUnregister(self.ptr.cast()) };
        }
    }
}

/// An ordered queue of device work.
#[derive(Debug)]
pub struct Stream {
    raw: sys::CUstream,
    device: Arc<Device>,
}

// SAFETY: streams may be used from any thread with the context bound.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver serialises calls on one stream.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// The device it belongs to.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Waits until all its work is done.
    pub fn synchronize(&self) -> Result<(), BackendError> {
        // SAFETY: raw is live.
        check(unsafe { sys::cuStreamSynchronize(self.raw) }, "GPU work failed")
    }

    /// Work submitted later waits for `event` (as last recorded).
    pub fn wait(&self, event: &Event) -> Result<(), BackendError> {
        check(
            // SAFETY: both handles are live.
            unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) },
            "a stream cannot wait",
        )
    }

    /// Writes one 32-bit word in order.
    ///
    /// # Safety
    /// `dst..dst + 4` is device memory, aligned to 4, that nothing else uses meanwhile.
    pub unsafe fn set(&self, dst: u64, value: u32) -> Result<(), BackendError> {
        check(
            // SAFETY: the caller vouches for the word.
            unsafe { sys::cuMemsetD32Async(dst, value, 1, self.raw) },
            "a word in the GPU's memory could not be set",
        )
    }

    /// Copies rows within the device in order.
    ///
    /// # Safety
    /// Both are device memory, disjoint, of as many rows of as many bytes, and nothing else writes them meanwhile.
    pub unsafe fn copy_rows(&self, from: RowsOf, to: RowsOf) -> Result<(), BackendError> {
        // SAFETY: the caller vouches for both.
        unsafe { self.move_rows(from.device(), to.device(), from, "copy within the GPU") }
    }

    /// Copies rows from the device, back to back, in order.
    ///
    /// # Safety
    /// `from` is device memory; `to` has room for its bytes, stays valid until the copy is done and is not touched before.
    pub unsafe fn download_rows(&self, from: RowsOf, to: *mut u8) -> Result<(), BackendError> {
        // SAFETY: the caller vouches for both.
        unsafe { self.move_rows(from.device(), End::Host(to), from, "copy from the GPU") }
    }

    /// Copies rows to the device that lie back to back, in order.
    ///
    /// # Safety
    /// `to` is device memory that nothing else uses meanwhile; `from` holds its bytes, unchanged until the copy is done.
    pub unsafe fn upload_rows(&self, from: *const u8, to: RowsOf) -> Result<(), BackendError> {
        // SAFETY: the caller vouches for both.
        unsafe { self.move_rows(End::Host(from.cast_mut()), to.device(), to, "copy to the GPU") }
    }

    unsafe fn move_rows(&self, from: End, to: End, of: RowsOf, what: &'static str) -> Result<(), BackendError> {
        use sys::CUmemorytype::{CU_MEMORYTYPE_DEVICE as DEVICE, CU_MEMORYTYPE_HOST as HOST};
        let ends = |end: End| match end {
            End::Device(addr, pitch) => (DEVICE, addr, std::ptr::null_mut(), pitch),
            End::Host(at) => (HOST, 0, at, of.width),
        };
        let ((from_type, from_addr, from_host, from_pitch), (to_type, to_addr, to_host, to_pitch)) =
            (ends(from), ends(to));
        let c = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: from_type,
            srcHost: from_host.cast::<c_void>().cast_const(),
            srcDevice: from_addr,
            srcArray: std::ptr::null_mut(),
            srcPitch: from_pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: to_type,
            dstHost: to_host.cast(),
            dstDevice: to_addr,
            dstArray: std::ptr::null_mut(),
            dstPitch: to_pitch,
            WidthInBytes: of.width,
            Height: of.rows,
        };
        if of.width == 0 || of.rows == 0 {
            return Ok(());
        }
        // SAFETY: the caller vouches for both ends.
        check(unsafe { sys::cuMemcpy2DAsync_v2(&raw const c, self.raw) }, what)
    }

    /// Copies `bytes` from host to device in order.
    ///
    /// # Safety
    /// The source stays valid and unchanged until the copy is done; `dst..dst + bytes` is device
    /// memory that nothing else uses meanwhile.
    pub unsafe fn upload(&self, src: *const u8, dst: u64, bytes: usize) -> Result<(), BackendError> {
        check(
            // SAFETY: the caller vouches for both ranges.
            unsafe { sys::cuMemcpyHtoDAsync_v2(dst, src.cast::<c_void>(), bytes, self.raw) },
            "copy to the GPU",
        )
    }

    /// Copies `bytes` within the device in order.
    ///
    /// # Safety
    /// Both ranges are device memory, disjoint, and nothing else writes them meanwhile.
    pub unsafe fn copy(&self, src: u64, dst: u64, bytes: usize) -> Result<(), BackendError> {
        check(
            // SAFETY: the caller vouches for both ranges.
            unsafe { sys::cuMemcpyDtoDAsync_v2(dst, src, bytes, self.raw) },
            "copy within the GPU",
        )
    }

    /// Copies `bytes` from device to host in order.
    ///
    /// # Safety
    /// `src..src + bytes` is device memory; the destination stays valid until the copy is done
    /// and is not touched before.
    pub unsafe fn download(&self, src: u64, dst: *mut u8, bytes: usize) -> Result<(), BackendError> {
        check(
            // SAFETY: the caller vouches for both ranges.
            unsafe { sys::cuMemcpyDtoHAsync_v2(dst.cast::<c_void>(), src, bytes, self.raw) },
            "copy from the GPU",
        )
    }
}

/// Rows of device memory at equal distances.
#[derive(Clone, Copy, Debug)]
pub struct RowsOf {
    /// The first row.
    pub addr: u64,
    /// Bytes of a row.
    pub width: usize,
    /// Bytes from row to row.
    pub pitch: usize,
    /// How many.
    pub rows: usize,
}

impl RowsOf {
    /// Bytes of all rows.
    pub fn bytes(&self) -> usize {
        self.width * self.rows
    }

    fn device(&self) -> End {
        End::Device(self.addr, self.pitch)
    }
}

/// Where rows come from or go.
enum End {
    /// An address on the device, and the distance of rows.
    Device(u64, usize),
    /// Back to back in host memory.
    Host(*mut u8),
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made in `stream`, destroyed once; the driver lets its work finish.
            unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    raw: sys::CUevent,
    device: Arc<Device>,
}

// SAFETY: events may be used from any thread with the context bound.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Marks the present end of `stream`.
    pub fn record(&self, stream: &Stream) -> Result<(), BackendError> {
        check(
            // SAFETY: both handles are live.
            unsafe { sys::cuEventRecord(self.raw, stream.raw) },
            "an event cannot be recorded",
        )
    }

    /// Whether the marked point is reached (true if never recorded). Errors if the work failed.
    pub fn query(&self) -> Result<bool, BackendError> {
        // SAFETY: raw is live.
        match unsafe { sys::cuEventQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            r => check(r, "GPU work failed").map(|()| true),
        }
    }

    /// Waits until the marked point is reached.
    pub fn synchronize(&self) -> Result<(), BackendError> {
        // SAFETY: raw is live.
        check(unsafe { sys::cuEventSynchronize(self.raw) }, "GPU work failed")
    }

    /// Milliseconds from `start` to this event; both timed and reached.
    pub fn ms_since(&self, start: &Event) -> Result<f32, BackendError> {
        if self.device.info.driver_version < (12, 8) {
            return Err(device_error("event times need a driver for CUDA 12.8 or newer"));
        }
        let mut ms = 0.0;
        check(
            // SAFETY: both handles are live; ms receives the number.
            unsafe { sys::cuEventElapsedTime_v2(&mut ms, start.raw, self.raw) },
            "events cannot be subtracted",
        )?;
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made in `event`, destroyed once.
            unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}

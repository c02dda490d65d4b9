//! Zeroed buffers whose untouched pages cost nothing.

use std::alloc::Layout;
use std::ptr::NonNull;

use crate::backend::BackendError;
use crate::memory::bounded::may_fail;

/// A fixed array of plain numbers, zero at first, aligned to 64 bytes.
///
/// The memory comes from `calloc`, so large buffers are zero pages until they are written.
pub struct Buf<T> {
    base: NonNull<u8>,
    layout: Layout,
    data: *mut T,
    len: usize,
}

// SAFETY: the buffer owns its memory and holds plain numbers.
unsafe impl<T: bytemuck::Pod> Send for Buf<T> {}
// SAFETY: shared access reads only.
unsafe impl<T: bytemuck::Pod> Sync for Buf<T> {}

impl<T: bytemuck::Pod> Buf<T> {
    /// `len` zeros; `what` names them in the error.
    pub fn new(len: usize, what: &'static str) -> Result<Buf<T>, BackendError> {
        let bytes = len.checked_mul(size_of::<T>());
        let fail = || BackendError::OutOfMemory { backend: "cpu", what, bytes: bytes.unwrap_or(usize::MAX) as u64 };
        let total = bytes.and_then(|b| b.checked_add(128)).ok_or_else(fail)?;
        let layout = Layout::from_size_align(total, 8).map_err(|_| fail())?;
        // SAFETY: the size is not zero.
        let base = NonNull::new(may_fail(|| unsafe { std::alloc::alloc_zeroed(layout) })).ok_or_else(fail)?;
        let skip = base.as_ptr().align_offset(64);
        // SAFETY: `skip` is below 64 and 128 bytes were added to the size.
        let data = unsafe { base.as_ptr().add(skip) }.cast::<T>();
        Ok(Buf { base, layout, data, len })
    }

    /// Address of the first element, for writes from several threads.
    pub fn ptr(&mut self) -> *mut T {
        self.data
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        (self.len * size_of::<T>()) as u64
    }
}

impl<T> Drop for Buf<T> {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), self.layout) }
    }
}

impl<T> std::ops::Deref for Buf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised (zeroed) elements lie at `data`.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

impl<T> std::ops::DerefMut for Buf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `deref`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

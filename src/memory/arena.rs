//! One anonymous mapping, allocated once, cut into disjoint regions.
//!
//! Memory in flight is never behind a Rust reference: regions are addresses, and who reads or
//! writes them is the ring's business.

use std::ptr::NonNull;

/// Regions begin at multiples of this, which satisfies direct I/O on every device.
pub const REGION_ALIGN: u64 = 4096;
/// The mapping begins at a multiple of this, so that huge pages can back it.
const HUGE_PAGE: usize = 2 << 20;

/// Why there is no arena.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The system refused the mapping.
    #[error("{bytes} bytes of memory for weights could not be mapped: {source}")]
    Map {
        /// Size asked for.
        bytes: u64,
        /// The system's words.
        source: std::io::Error,
    },
    /// More regions were asked for than planned.
    #[error("the arena of {size} bytes has no room for {bytes} more after {used}; the plan is wrong")]
    Full {
        /// Size of the arena.
        size: u64,
        /// Bytes taken.
        used: u64,
        /// Bytes asked for.
        bytes: u64,
    },
}

/// A part of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Address of the first byte.
    pub addr: *mut u8,
    /// Bytes.
    pub len: usize,
}

// SAFETY: a region is an address; dereferencing it is unsafe and argued where it happens.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// The mapping.
#[derive(Debug)]
pub struct Arena {
    map: NonNull<u8>,
    map_len: usize,
    base: *mut u8,
    len: u64,
    used: u64,
}

// SAFETY: the arena owns its mapping; its methods only compute addresses.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps `len` bytes. Pages take memory when first touched.
    pub fn new(len: u64) -> Result<Arena, ArenaError> {
        let fail = |source| ArenaError::Map { bytes: len, source };
        let too_large = || fail(std::io::Error::from(std::io::ErrorKind::OutOfMemory));
        let want = usize::try_from(len.next_multiple_of(REGION_ALIGN).max(REGION_ALIGN)).map_err(|_| too_large())?;
        let map_len = want.checked_add(HUGE_PAGE).ok_or_else(too_large)?;
        // SAFETY: a fresh anonymous private mapping at an address of the kernel's choice touches no
        // existing memory.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(fail(std::io::Error::last_os_error()));
        }
        let Some(map) = NonNull::new(map.cast::<u8>()) else { return Err(too_large()) };
        let skip = map.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
        // SAFETY: `skip` is at most HUGE_PAGE, and the mapping is that much longer than `want`.
        let base = unsafe { map.as_ptr().add(skip) };
        // A whole huge page would be resident for its first byte: only large arenas take them.
        let huge = if want >= 16 * HUGE_PAGE { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        for advice in [huge, libc::MADV_DONTFORK] {
            // SAFETY: the range is part of the mapping made above. Advice that is refused changes
            // nothing that correctness needs.
            unsafe { libc::madvise(base.cast(), want, advice) };
        }
        Ok(Arena { map, map_len, base, len: want as u64, used: 0 })
    }

    /// Takes the next `bytes`.
    pub fn take(&mut self, bytes: u64) -> Result<Region, ArenaError> {
        let full = ArenaError::Full { size: self.len, used: self.used, bytes };
        let padded = bytes.checked_next_multiple_of(REGION_ALIGN);
        let Some(end) = padded.and_then(|b| self.used.checked_add(b)).filter(|&e| e <= self.len) else {
            return Err(full);
        };
        // SAFETY: `used..end` lies within the mapping.
        let addr = unsafe { self.base.add(self.used as usize) };
        self.used = end;
        Ok(Region { addr, len: bytes as usize })
    }

    /// Brings every page into memory now, by `threads` threads. Where the kernel cannot (before Linux
    /// 5.14), pages come when they are first touched.
    pub fn populate(&self, threads: usize) {
        let base = self.base.expose_provenance();
        let len = self.len as usize;
        let part = len.div_ceil(threads.max(1)).next_multiple_of(HUGE_PAGE);
        std::thread::scope(|s| {
            for at in (0..len).step_by(part) {
                let bytes = part.min(len - at);
                s.spawn(move || {
                    let start = std::ptr::with_exposed_provenance_mut::<libc::c_void>(base + at);
                    // SAFETY: the range is part of the mapping, which outlives this scope; populating
                    // changes no byte. A refusal changes nothing that correctness needs.
                    unsafe { libc::madvise(start, bytes, libc::MADV_POPULATE_WRITE) };
                });
            }
        });
    }

    /// First byte.
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// Bytes from [`Arena::base`] on.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and is unmapped once. The streamer drops its reader,
        // which waits for reads in flight, before the arena.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.map_len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_aligned_and_disjoint() {
        let mut a = Arena::new(3 * 4096).unwrap();
        let (x, y) = (a.take(5000).unwrap(), a.take(4096).unwrap());
        assert_eq!(x.addr as usize % 4096, 0);
        assert_eq!(y.addr as usize - x.addr as usize, 8192);
        assert!(matches!(a.take(1), Err(ArenaError::Full { used: 12288, bytes: 1, .. })));
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        assert!(matches!(Arena::new(u64::MAX / 2), Err(ArenaError::Map { .. })));
    }
}

//! One anonymous mapping, allocated once, cut into disjoint regions.
//!
//! Memory in flight is never behind a Rust reference: regions are addresses, and the ring decides who
//! reads or writes them.

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

/// Regions begin at multiples of this, which satisfies direct I/O on every device.
pub const REGION_ALIGN: u64 = 4096;
/// The mapping begins at a multiple of this, so that huge pages can back it.
const HUGE_PAGE: usize = 2 << 20;
/// Bytes that a thread populates between two looks at whether to stop.
const POPULATE_STEP: usize = 8 * HUGE_PAGE;
/// How often the caller of [`Arena::populate`] asks whether to stop.
const POPULATE_POLL: Duration = Duration::from_millis(2);

/// Why there is no arena.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The system refused the mapping.
    #[error(
        "{bytes} bytes of memory for weights could not be mapped: {source}; give a smaller --ram, or raise the limit on this process's memory (ulimit -v, ulimit -d)"
    )]
    Map {
        /// Bytes asked for.
        bytes: u64,
        /// The system's words.
        source: std::io::Error,
    },
    /// More regions were asked for than planned.
    #[error("the arena of {size} bytes has no room for {bytes} more after {used}; the plan is wrong")]
    Full {
        /// Bytes of the arena.
        size: u64,
        /// Bytes taken.
        used: u64,
        /// Bytes asked for.
        bytes: u64,
    },
}

/// The mapping itself, unmapped when the last region is gone.
#[derive(Debug)]
struct Mapping {
    map: NonNull<u8>,
    map_len: usize,
    /// Where regions begin, from the start on.
    skip: usize,
}

// SAFETY: a mapping is an address and a length; it is only ever unmapped, once.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn base(&self) -> *mut u8 {
        self.map.as_ptr().wrapping_add(self.skip)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `Arena::new` and is unmapped once, behind all regions and the readers that
        // were told of one.
        let _ = unsafe { munmap(self.map.cast(), self.map_len) };
    }
}

/// A part of an arena: an address and a length. It stays mapped as long as the region or a copy of it lives; whose turn
/// it is to read or write it is said by whoever handed it out.
#[derive(Clone, Debug)]
pub struct Region {
    mapping: Arc<Mapping>,
    /// From the mapping's base on.
    at: usize,
    len: usize,
}

impl Region {
    /// Address of the first byte.
    pub fn addr(&self) -> *mut u8 {
        self.mapping.base().wrapping_add(self.at)
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// The mapping, and how much of it is taken.
#[derive(Debug)]
pub struct Arena {
    mapping: Arc<Mapping>,
    len: u64,
    used: u64,
}

impl Arena {
    /// Maps `len` bytes. Pages take memory when first touched.
    ///
    /// # Errors
    /// [`ArenaError::Map`] if the system refuses.
    pub fn new(len: u64) -> Result<Arena, ArenaError> {
        // What is asked for, also where there are no weights to hold.
        let fail = |source| ArenaError::Map { bytes: len.saturating_add(HUGE_PAGE as u64), source };
        let too_large = || fail(std::io::Error::from(std::io::ErrorKind::OutOfMemory));
        let want = len.max(1).checked_next_multiple_of(REGION_ALIGN).and_then(|n| usize::try_from(n).ok());
        let want = want.ok_or_else(too_large)?;
        let map_len = want.checked_add(HUGE_PAGE).and_then(NonZeroUsize::new).ok_or_else(too_large)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a fresh anonymous private mapping at an address of the kernel's choice touches no
        // existing memory.
        let map = unsafe { mmap_anonymous(None, map_len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) };
        let map = map.map_err(|e| fail(e.into()))?.cast::<u8>();
        let skip = map.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
        let mapping = Mapping { map, map_len: map_len.get(), skip };
        let base = NonNull::new(mapping.base()).ok_or_else(too_large)?;
        // A whole huge page would be resident for its first byte: only large arenas take them.
        let huge = if want >= 16 * HUGE_PAGE { MmapAdvise::MADV_HUGEPAGE } else { MmapAdvise::MADV_NOHUGEPAGE };
        for advice in [huge, MmapAdvise::MADV_DONTFORK] {
            // SAFETY: the range is part of the mapping made above. Advice that is refused changes
            // nothing that correctness needs.
            let _ = unsafe { madvise(base.cast(), want, advice) };
        }
        Ok(Arena { mapping: Arc::new(mapping), len: want as u64, used: 0 })
    }

    /// Takes the next `bytes`.
    ///
    /// # Errors
    /// [`ArenaError::Full`] if there is no room for them.
    pub fn take(&mut self, bytes: u64) -> Result<Region, ArenaError> {
        let full = ArenaError::Full { size: self.len, used: self.used, bytes };
        let padded = bytes.checked_next_multiple_of(REGION_ALIGN);
        let Some(end) = padded.and_then(|b| self.used.checked_add(b)).filter(|&e| e <= self.len) else {
            return Err(full);
        };
        let at = std::mem::replace(&mut self.used, end) as usize;
        Ok(Region { mapping: Arc::clone(&self.mapping), at, len: bytes as usize })
    }

    /// All of it, whatever was taken.
    pub fn whole(&self) -> Region {
        Region { mapping: Arc::clone(&self.mapping), at: 0, len: self.len as usize }
    }

    /// Brings every page into memory now, by `threads` threads; `false` if `stop` said so before the end.
    /// Where the kernel cannot (before Linux 5.14), pages come when they are first touched.
    pub fn populate(&self, threads: usize, stop: &dyn Fn() -> bool) -> bool {
        let base = self.mapping.base().expose_provenance();
        let len = self.len as usize;
        let (next, stopped, running) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicUsize::new(0));
        let step = || {
            let at = next.fetch_add(POPULATE_STEP, Ordering::Relaxed);
            if at >= len || stopped.load(Ordering::Relaxed) {
                return false;
            }
            let Some(start) = NonNull::new(std::ptr::with_exposed_provenance_mut(base + at)) else { return false };
            // SAFETY: the range is part of the mapping, which outlives this call; populating changes no
            // byte. A refusal changes nothing that correctness needs.
            let _ = unsafe { madvise(start, POPULATE_STEP.min(len - at), MmapAdvise::MADV_POPULATE_WRITE) };
            true
        };
        std::thread::scope(|s| {
            for i in 0..threads.max(1) {
                running.fetch_add(1, Ordering::Relaxed);
                let work = || {
                    while step() {}
                    running.fetch_sub(1, Ordering::Release);
                };
                let name = format!("nt-populate-{i}");
                if std::thread::Builder::new().name(name).spawn_scoped(s, work).is_err() {
                    running.fetch_sub(1, Ordering::Relaxed);
                    break;
                }
            }
            while running.load(Ordering::Acquire) > 0 {
                if stop() {
                    stopped.store(true, Ordering::Relaxed);
                }
                std::thread::sleep(POPULATE_POLL);
            }
            // What no thread could be had for is done here.
            while !stop() && step() {}
        });
        !stopped.load(Ordering::Relaxed) && next.load(Ordering::Relaxed) >= len
    }

    /// Bytes of all regions together.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_aligned_and_disjoint() {
        let mut a = Arena::new(3 * 4096).unwrap();
        let (x, y) = (a.take(5000).unwrap(), a.take(4096).unwrap());
        assert_eq!(x.addr() as usize % 4096, 0);
        assert_eq!(y.addr() as usize - x.addr() as usize, 8192);
        assert!(matches!(a.take(1), Err(ArenaError::Full { used: 12288, bytes: 1, .. })));
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        for bytes in [u64::MAX / 2, u64::MAX] {
            assert!(matches!(Arena::new(bytes), Err(ArenaError::Map { .. })));
        }
    }

    #[test]
    fn a_region_outlives_its_arena() {
        let mut a = Arena::new(4096).unwrap();
        let region = a.take(8).unwrap();
        drop(a);
        // SAFETY: the region is this test's alone.
        let bytes = unsafe {
            region.addr().write_bytes(7, region.len());
            std::slice::from_raw_parts(region.addr(), region.len())
        };
        assert_eq!(bytes, [7; 8]);
    }

    /// Guards against a population that only ends with the last page: it is the stretch in which memory runs out.
    #[test]
    fn population_ends_within_a_step_of_each_thread() {
        let a = Arena::new(64 << 20).unwrap();
        assert!(!a.populate(2, &|| true));
        assert!(a.populate(2, &|| false));
    }
}

//! Resident units: read once, before streaming starts.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use super::error::StreamError;
use super::unit::UnitLayout;
use crate::backend::{BackendError, CopyEngine};
use crate::memory::Region;
use crate::storage::{Completion, ReadRequest, Reader};

/// How long a wait for reads may last before it is asked whether to go on.
pub(super) const POLL: Duration = Duration::from_millis(2);
/// Units that are read at once.
const LANES: usize = 4;

/// Gets the bytes loaded so far, after every completion and every look for one (2 ms apart at most), and says
/// whether to go on. After a break nothing more is read.
pub type Progress<'a> = &'a mut dyn FnMut(u64) -> ControlFlow<()>;

/// Reads whole units into regions, four at a time, before streaming starts.
///
/// # Safety
/// Each region lies in memory that the reader was told of, and belongs to its unit alone until the reader is dropped: after
/// an error or an interruption, reads may still be in flight.
///
/// # Errors
/// The first read that failed, by the name of its unit; [`StreamError::Interrupted`] if `progress` broke off.
pub unsafe fn load(
    reader: &mut dyn Reader,
    units: &[(&UnitLayout, Region, &str)],
    progress: Progress<'_>,
) -> Result<(), StreamError> {
    let (mut next, mut bytes) = (0, 0);
    let mut done: Vec<Completion> = Vec::new();
    while next < units.len() || reader.outstanding() > 0 {
        go_on(progress(bytes))?;
        while next < units.len() && reader.outstanding() < LANES {
            let (layout, region, name) = &units[next];
            let request = ReadRequest {
                tag: next as u64,
                extents: &layout.extents,
                dst: region.addr(),
                urgent: false,
                dst_len: region.len(),
            };
            // SAFETY: the caller's promise; nobody looks at the region before `load` has returned.
            unsafe { reader.submit(&request) }.map_err(|source| named(name, source))?;
            next += 1;
        }
        reader.poll(&mut done, Some(POLL)).map_err(|source| named("loading", source))?;
        for c in done.drain(..) {
            bytes += c.result.map_err(|source| named(units[c.tag as usize].2, source))?;
            go_on(progress(bytes))?;
        }
    }
    Ok(())
}

pub(super) fn named(unit: &str, source: crate::storage::ReadError) -> StreamError {
    StreamError::Unit { unit: unit.to_owned(), source }
}

pub(super) fn go_on(answer: ControlFlow<()>) -> Result<(), StreamError> {
    if answer.is_break() { Err(StreamError::Interrupted) } else { Ok(()) }
}

/// A unit that is to lie in device memory.
#[derive(Clone, Copy, Debug)]
pub struct DeviceUnit<'a> {
    /// Its reads.
    pub layout: &'a UnitLayout,
    /// Its address on the device.
    pub addr: u64,
    /// Its name, for errors.
    pub name: &'a str,
}

/// Reads units into staging regions, one after the other through each, and copies them to the
/// device. Slot `i` of `engine` goes with `staging[i]`.
///
/// # Safety
/// The staging regions lie in memory that the reader was told of, and are used by nothing else until it is dropped. Each
/// unit has `slot_bytes` bytes of its own at its address on the device.
///
/// # Errors
/// As [`load`], and those of the device.
pub unsafe fn load_to_device(
    reader: &mut dyn Reader,
    units: &[DeviceUnit],
    staging: &[Region],
    engine: &dyn CopyEngine,
    progress: Progress<'_>,
) -> Result<(), StreamError> {
    let device = |e: BackendError| StreamError::Device(Arc::new(e));
    let mut waiting = units.iter();
    let mut in_slot: Vec<Option<DeviceUnit>> = vec![None; staging.len()];
    let mut free: Vec<usize> = (0..staging.len()).rev().collect();
    let mut done: Vec<Completion> = Vec::new();
    let mut bytes = 0;
    loop {
        go_on(progress(bytes))?;
        while let Some(&slot) = free.last()
            && let Some(unit) = waiting.next()
        {
            free.pop();
            in_slot[slot] = Some(*unit);
            let (dst, dst_len) = (staging[slot].addr(), staging[slot].len());
            let extents = &unit.layout.extents;
            let request = ReadRequest { tag: slot as u64, extents, dst, urgent: false, dst_len };
            // SAFETY: the region is in `free` only when neither a read nor a copy uses it; the rest is the
            // caller's promise.
            unsafe { reader.submit(&request) }.map_err(|source| named(unit.name, source))?;
        }
        if free.len() == staging.len() {
            return Ok(());
        }
        reader.poll(&mut done, Some(POLL)).map_err(|source| named("loading", source))?;
        for c in done.drain(..) {
            let slot = c.tag as usize;
            let Some(unit) = in_slot[slot].take() else { continue };
            bytes += c.result.map_err(|source| named(unit.name, source))?;
            // SAFETY: the read has ended, and the wait below keeps the region as it is; the unit's
            // place on the device is its own.
            unsafe { engine.upload(slot, staging[slot].addr(), unit.addr, unit.layout.slot_bytes as usize) }
                .map_err(device)?;
            engine.wait_copied(slot).map_err(device)?;
            free.push(slot);
            go_on(progress(bytes))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Arena;
    use crate::pipeline::SpanIn;
    use crate::storage::{Alignment, FileId, ReadError, Script, ScriptedReader};
    use std::cell::Cell;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    const UNIT: u64 = 5000;

    /// What happened on the way, and the signal.
    #[derive(Default)]
    struct Watched {
        signal: AtomicBool,
        completed: AtomicUsize,
        /// Completions handed out, and requests taken, once the signal had come.
        late: AtomicUsize,
        submitted_late: AtomicUsize,
    }

    /// A reader during whose `poll` number `at` the signal comes, before or after what that poll brings.
    struct Signalled {
        inner: ScriptedReader,
        at: usize,
        before: bool,
        polls: usize,
        seen: Arc<Watched>,
    }

    impl Reader for Signalled {
        fn name(&self) -> &'static str {
            "signalled"
        }

        fn alignment(&self, file: FileId) -> Alignment {
            self.inner.alignment(file)
        }

        fn attach(&mut self, memory: &crate::memory::Region) -> Result<(), crate::storage::StorageError> {
            self.inner.attach(memory)
        }

        unsafe fn submit(&mut self, request: &ReadRequest<'_>) -> Result<(), ReadError> {
            let late = usize::from(self.seen.signal.load(Ordering::Relaxed));
            self.seen.submitted_late.fetch_add(late, Ordering::Relaxed);
            // SAFETY: the caller's promise.
            unsafe { self.inner.submit(request) }
        }

        fn poll(&mut self, out: &mut Vec<Completion>, wait: Option<Duration>) -> Result<(), ReadError> {
            self.polls += 1;
            let now = self.polls == self.at;
            if now && self.before {
                self.seen.signal.store(true, Ordering::Relaxed);
            }
            let before = out.len();
            self.inner.poll(out, wait)?;
            let n = out.len() - before;
            self.seen.completed.fetch_add(n, Ordering::Relaxed);
            let late = if self.seen.signal.load(Ordering::Relaxed) { n } else { 0 };
            self.seen.late.fetch_add(late, Ordering::Relaxed);
            if now {
                self.seen.signal.store(true, Ordering::Relaxed);
            }
            Ok(())
        }

        fn outstanding(&self) -> usize {
            self.inner.outstanding()
        }
    }

    /// Copies at once.
    struct AtOnce;

    impl CopyEngine for AtOnce {
        unsafe fn upload(&self, _: usize, src: *const u8, dst: u64, bytes: usize) -> Result<(), BackendError> {
            // SAFETY: the test's units and regions have room.
            unsafe { std::ptr::copy_nonoverlapping(src, dst as *mut u8, bytes) };
            Ok(())
        }

        fn wait_copied(&self, _: usize) -> Result<Option<f64>, BackendError> {
            Ok(None)
        }

        fn acquire(&self, _: usize) -> Result<(), BackendError> {
            Ok(())
        }

        fn release(&self, _: usize) -> Result<(), BackendError> {
            Ok(())
        }

        fn settle(&self) -> Result<(), BackendError> {
            Ok(())
        }
    }

    /// Loads 30 units, to RAM or through `lanes` staging regions, with a signal at poll `at`.
    fn signalled(seed: u64, at: usize, before: bool, lanes: Option<usize>) -> (Result<(), StreamError>, Arc<Watched>) {
        let data: Vec<u8> = (0..30 * UNIT).map(|i| (i.wrapping_mul(0x9E37_79B9) >> 11) as u8).collect();
        let script = Script { seed, delay_max: 3, ..Script::default() };
        let seen = Arc::new(Watched::default());
        let inner = ScriptedReader::new(vec![data], script);
        let layouts: Vec<UnitLayout> = (0..30)
            .map(|i| {
                UnitLayout::new(&[SpanIn { file: FileId(0), offset: i * UNIT, bytes: UNIT }], |f| inner.alignment(f))
            })
            .collect();
        let mut reader = Signalled { inner, at, before, polls: 0, seen: Arc::clone(&seen) };
        let mut arena = Arena::new(2 << 20).unwrap();
        let mut take = || arena.take(layouts[0].slot_bytes).unwrap();
        let asked = Cell::new(0u64);
        let mut progress = |bytes| {
            assert!(bytes >= asked.replace(bytes), "progress goes back");
            if seen.signal.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let result = match lanes {
            None => {
                let units: Vec<_> = layouts.iter().map(|l| (l, take(), "a unit")).collect();
                // SAFETY: the regions are the units' own; the reader is dropped before the arena.
                unsafe { load(&mut reader, &units, &mut progress) }
            }
            Some(lanes) => {
                let staging: Vec<Region> = (0..lanes).map(|_| take()).collect();
                let units: Vec<_> = layouts
                    .iter()
                    .map(|layout| DeviceUnit { layout, addr: take().addr() as u64, name: "a unit" })
                    .collect();
                // SAFETY: as above, and each unit's place is its own.
                unsafe { load_to_device(&mut reader, &units, &staging, &AtOnce, &mut progress) }
            }
        };
        drop(reader);
        (result, seen)
    }

    /// Guards against a loading that goes on after Ctrl-C, SIGTERM or the watch of memory: between the signal
    /// and the end each lane hands out at most the read that it had in flight, and no other is begun.
    #[test]
    fn after_a_signal_each_lane_completes_at_most_one_read() {
        for seed in 0..60 {
            for (lanes, most) in [(None, LANES), (Some(1), 1), (Some(3), 3)] {
                for before in [false, true] {
                    let (result, seen) = signalled(seed, 1 + seed as usize % 9, before, lanes);
                    let counts = (seen.late.load(Ordering::Relaxed), seen.submitted_late.load(Ordering::Relaxed));
                    assert!(matches!(result, Err(StreamError::Interrupted)), "seed {seed}: {result:?}");
                    assert!(counts.0 <= most && counts.1 == 0, "seed {seed}: {counts:?} after the signal");
                }
                let (result, seen) = signalled(seed, usize::MAX, false, lanes);
                assert!(result.is_ok() && seen.completed.load(Ordering::Relaxed) == 30, "{result:?}");
            }
        }
    }
}

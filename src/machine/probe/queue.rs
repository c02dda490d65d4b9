//! A plain io_uring loop: so many reads of one size in flight, each made as the reader of weights makes it.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use io_uring::IoUring;
use nix::sys::mman::{MmapAdvise, madvise};
use serde::Serialize;

use super::latency::Latencies;
use super::walk::Walk;
use super::{ProbeError, Target, rate};
use crate::memory::{Arena, Region};
use crate::storage::{allow_workers, drain, read_entry};

/// Reads in flight at most.
pub const DEPTH_MAX: usize = 256;

/// An arena this large takes huge pages. In 4 KiB pages a read of 1 MiB is 256 pieces of memory, more
/// than some drives take at once, and reads at half its rate; weights lie in huge pages too.
const ARENA_MIN: u64 = 64 << 20;

/// What pages the buffers of a probe lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pages {
    /// Huge pages where the kernel has them, as for weights.
    Huge,
    /// 4 KiB, as other programs' buffers.
    Small,
}

/// A ring with buffers for `depth` reads of `block` bytes.
pub struct Queue<'t> {
    ring: IoUring,
    target: &'t Target,
    block: u64,
    buffers: Vec<Region>,
    /// Where in the file each buffer's read begins, and when it was begun.
    offsets: Vec<u64>,
    begun: Vec<Instant>,
    n_flying: usize,
    /// Goes on between runs, so that no run finds in a drive's cache what the last one read.
    walk: Walk,
}

/// Bytes and seconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Span {
    /// Bytes read.
    pub bytes: u64,
    /// Wall time.
    pub seconds: f64,
}

impl Span {
    /// Bytes per second.
    pub fn rate(&self) -> f64 {
        rate(self.bytes, self.seconds)
    }
}

/// How long reads are begun, and after how long each a part of them is told.
pub(super) struct Clock {
    pub start: Instant,
    pub time: Duration,
    pub slice: Duration,
}

impl Clock {
    /// Calls `step` while reads are in flight (`flying` at first); it is told whether to begin others in
    /// place of those that end, and gives the bytes that were read and whether any are in flight still. Calls
    /// `each` with the bytes and seconds since the last call.
    ///
    /// # Errors
    /// What `step` gives, or that `stop` said so.
    pub(super) fn run(
        &self,
        stop: &dyn Fn() -> bool,
        each: &mut dyn FnMut(Span),
        mut flying: bool,
        step: &mut dyn FnMut(bool) -> Result<(u64, bool), ProbeError>,
    ) -> Result<Span, ProbeError> {
        let (mut total, mut part, mut part_start) = (0, 0, self.start);
        while flying {
            let bytes;
            (bytes, flying) = step(self.start.elapsed() < self.time && !stop())?;
            total += bytes;
            part += bytes;
            if part_start.elapsed() >= self.slice && flying {
                each(Span { bytes: part, seconds: part_start.elapsed().as_secs_f64() });
                (part, part_start) = (0, Instant::now());
            }
        }
        if stop() {
            Err(ProbeError::Interrupted)
        } else {
            Ok(Span { bytes: total, seconds: self.start.elapsed().as_secs_f64() })
        }
    }
}

impl<'t> Queue<'t> {
    /// Sets it up; `block` is at most the target's length, and a multiple of 4096. The order of reads goes on after
    /// `read` of them.
    ///
    /// # Errors
    /// If io_uring is refused or memory is missing.
    pub fn new(target: &'t Target, block: u64, depth: usize, read: u64, pages: Pages) -> Result<Queue<'t>, ProbeError> {
        let depth = depth.clamp(1, DEPTH_MAX);
        let bytes = block * depth as u64;
        let mut arena = Arena::new(if pages == Pages::Huge { bytes.max(ARENA_MIN) } else { bytes })?;
        if pages == Pages::Small {
            let base = NonNull::new(arena.whole().addr().cast());
            // SAFETY: advice on the arena's own mapping, none of which was touched; a refusal changes
            // nothing that correctness needs.
            base.map(|base| unsafe { madvise(base, arena.len() as usize, MmapAdvise::MADV_NOHUGEPAGE) });
        }
        let buffers = (0..depth).map(|_| arena.take(block)).collect::<Result<Vec<_>, _>>()?;
        for b in &buffers {
            // The pages must exist before the clock starts.
            // SAFETY: a region of the arena made above, which nobody else knows yet.
            unsafe { b.addr().write_bytes(1, b.len()) };
        }
        let ring = new_ring(depth as u32).map_err(ProbeError::Uring)?;
        ring.submitter().register_files(&[target.file.file.as_raw_fd()]).map_err(ProbeError::Uring)?;
        allow_workers(&ring, &target.file, depth);
        Ok(Queue {
            ring,
            target,
            block,
            offsets: vec![0; depth],
            begun: vec![Instant::now(); depth],
            buffers,
            n_flying: 0,
            walk: Walk::new(target.len, block, target.file.is_direct(), read),
        })
    }

    /// Reads so far, those of earlier queues among them.
    pub fn read(&self) -> u64 {
        self.walk.reads()
    }

    /// Reads until `time` is over, keeping every buffer in flight; calls `each` about every `slice`
    /// with the bytes and seconds since the last call, and adds how long each read took to `latencies`.
    ///
    /// # Errors
    /// A failed read, or `stop` said so.
    pub fn run(
        &mut self,
        time: Duration,
        slice: Duration,
        stop: &dyn Fn() -> bool,
        each: &mut dyn FnMut(Span),
        latencies: &mut Latencies,
    ) -> Result<Span, ProbeError> {
        let clock = Clock { start: Instant::now(), time, slice };
        for slot in 0..self.buffers.len() {
            self.push(slot, Instant::now())?;
        }
        clock.run(stop, each, self.n_flying > 0, &mut |more| {
            let bytes = self.step(more, latencies)?;
            Ok((bytes, self.n_flying > 0))
        })
    }

    /// Waits for at least one read; begins others in their place if `more`. Gives the bytes read.
    fn step(&mut self, more: bool, latencies: &mut Latencies) -> Result<u64, ProbeError> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(e) if is_passing(&e) => {}
            Err(e) => return Err(ProbeError::Uring(e)),
        }
        let mut bytes = 0;
        while let Some(done) = self.next_done() {
            let now = Instant::now();
            let slot = done.user_data() as usize;
            self.n_flying -= 1;
            match done.result() {
                n if n > 0 => {
                    bytes += n as u64;
                    latencies.add(now.duration_since(self.begun[slot]).as_nanos() as u64);
                }
                0 => return Err(self.failed(slot, "the file ended early; was it truncated?".into())),
                e if matches!(-e, libc::EAGAIN | libc::EINTR) => {}
                e => return Err(self.failed(slot, io::Error::from_raw_os_error(-e).to_string())),
            }
            self.target.file.forget(self.offsets[slot], self.block);
            if more {
                self.push(slot, now)?;
            }
        }
        Ok(bytes)
    }

    fn next_done(&mut self) -> Option<io_uring::cqueue::Entry> {
        self.ring.completion().next()
    }

    fn failed(&self, slot: usize, why: String) -> ProbeError {
        ProbeError::Read {
            path: self.target.path.display().to_string(),
            offset: self.offsets[slot],
            len: self.block,
            why,
        }
    }

    /// Begins a read, at once: the kernel holds reads that are submitted together back until it has the last.
    fn push(&mut self, slot: usize, now: Instant) -> Result<(), ProbeError> {
        self.offsets[slot] = self.walk.next();
        self.begun[slot] = now;
        let span = (self.offsets[slot], self.block as u32);
        let entry = read_entry(&self.target.file, 0, span, self.buffers[slot].addr(), slot as u64);
        // SAFETY: the buffer belongs to this slot, whose last read has completed; the arena is
        // dropped after `drop` has waited for what is in flight.
        unsafe { self.ring.submission().push(&entry) }
            .map_err(|_| self.failed(slot, "the submission queue is full".into()))?;
        self.n_flying += 1;
        match self.ring.submit() {
            Ok(_) => Ok(()),
            // It is submitted with the next wait.
            Err(e) if is_passing(&e) => Ok(()),
            Err(e) => Err(ProbeError::Uring(e)),
        }
    }
}

fn is_passing(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

/// A ring for one thread, with the flags that save interrupts where the kernel knows them.
fn new_ring(depth: u32) -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(depth)
        .or_else(|e| if e.raw_os_error() == Some(libc::EINVAL) { IoUring::new(depth) } else { Err(e) })
}

impl Drop for Queue<'_> {
    fn drop(&mut self) {
        drain(&mut self.ring, self.n_flying);
    }
}

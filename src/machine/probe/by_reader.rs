//! The storage probe over the seam that weights are read through, for drives that have no file (those
//! bound to vfio-pci) and where io_uring is refused.

use std::time::{Duration, Instant};

use super::ProbeError;
use super::latency::Latencies;
use super::queue::{Clock, Span};
use super::storage::Reads;
use super::walk::Walk;
use crate::memory::{Arena, Region};
use crate::storage::bind::{self, DeviceError};
use crate::storage::guard::Host;
use crate::storage::manifest::Span as Place;
use crate::storage::vfio::VfioReader;
use crate::storage::{Completion, Extent, FileId, ReadRequest, Reader};

/// Bytes in flight at most: all of them are pinned, and charged against the locked-memory limit.
const FLYING_MAX: u64 = 256 << 20;
const POLL: Duration = Duration::from_millis(2);

/// Reads one file of a reader, all of it and again.
pub struct ByReader {
    reader: Box<dyn Reader>,
    file: FileId,
    len: u64,
    name: String,
    scatter: bool,
    /// Reads so far.
    read: u64,
    buffers: Region,
    threads: usize,
}

impl ByReader {
    /// Over `file` of `reader`, which has `len` bytes and reads with `threads` threads; no read may have
    /// been submitted.
    ///
    /// # Errors
    /// If memory is missing or may not be pinned.
    pub fn new(
        mut reader: Box<dyn Reader>,
        file: FileId,
        len: u64,
        name: String,
        flying: u64,
        threads: usize,
    ) -> Result<ByReader, ProbeError> {
        let mut arena = Arena::new(flying.min(FLYING_MAX))?;
        let buffers = arena.take(flying.min(FLYING_MAX))?;
        // SAFETY: a region of the arena made above, which nobody else knows yet.
        unsafe { buffers.addr().write_bytes(1, buffers.len()) };
        reader.attach(&arena.whole()).map_err(|e| ProbeError::Target { path: name.clone(), why: e.to_string() })?;
        Ok(ByReader { reader, file, len, name, scatter: true, read: 0, buffers, threads })
    }

    /// The same with small blocks in the file's order too, for files that come through the page cache.
    pub fn in_order(self) -> ByReader {
        ByReader { scatter: false, ..self }
    }

    fn submit(&mut self, slot: usize, block: u64, walk: &mut Walk) -> Result<(), ProbeError> {
        let extent = Extent { file: self.file, offset: walk.next(), len: block, dst_offset: 0 };
        self.read = walk.reads();
        // SAFETY: the caller's slots lie within the buffers.
        let dst = unsafe { self.buffers.addr().add(slot * block as usize) };
        let request = ReadRequest { tag: slot as u64, extents: &[extent], dst, urgent: false, dst_len: block as usize };
        // SAFETY: the slot's last read has completed; the memory is dropped after the reader.
        unsafe { self.reader.submit(&request) }.map_err(|e| self.failed(extent, e.to_string()))
    }

    fn failed(&self, e: Extent, why: String) -> ProbeError {
        ProbeError::Read { path: self.name.clone(), offset: e.offset, len: e.len, why }
    }
}

impl Reads for ByReader {
    fn fits(&self, block: u64, depth: usize) -> bool {
        block <= self.len && block * depth as u64 <= self.buffers.len() as u64
    }

    fn threads(&self, depth: usize) -> usize {
        depth.min(self.threads)
    }

    fn run(
        &mut self,
        (block, depth): (u64, usize),
        time: Duration,
        slice: Duration,
        stop: &dyn Fn() -> bool,
        each: &mut dyn FnMut(Span),
        latencies: &mut Latencies,
    ) -> Result<Span, ProbeError> {
        let clock = Clock { start: Instant::now(), time, slice };
        let mut begun = vec![clock.start; depth];
        let mut walk = Walk::new(self.len, block, self.scatter, self.read);
        let mut done: Vec<Completion> = Vec::with_capacity(depth);
        for slot in 0..depth {
            self.submit(slot, block, &mut walk)?;
        }
        clock.run(stop, each, depth > 0, &mut |more| {
            let whole = Extent { file: self.file, offset: 0, len: self.len, dst_offset: 0 };
            self.reader.poll(&mut done, Some(POLL)).map_err(|e| self.failed(whole, e.to_string()))?;
            let (now, mut bytes) = (Instant::now(), 0);
            for c in done.drain(..) {
                bytes += c.result.map_err(|e| self.failed(whole, e.to_string()))?;
                let begun = &mut begun[c.tag as usize];
                latencies.add(now.duration_since(*begun).as_nanos() as u64);
                *begun = now;
                if more {
                    self.submit(c.tag as usize, block, &mut walk)?;
                }
            }
            Ok((bytes, self.reader.outstanding() > 0))
        })
    }
}

/// A bound drive, opened by its former name or its PCI address: its reads, bytes, and how it is known.
pub struct BoundDrive {
    /// Its reads.
    pub reads: ByReader,
    /// Bytes of the namespace.
    pub len: u64,
    /// Former name, model and serial.
    pub identity: String,
}

/// Opens the bound drive called `name`, for at most `flying` bytes in flight; `None` if no drive of that
/// name is bound.
///
/// # Errors
/// If it cannot be opened, or is another drive than was bound.
pub fn open_bound(host: &Host, name: &str, flying: u64) -> Result<Option<BoundDrive>, ProbeError> {
    let fail = |why: String| ProbeError::Target { path: name.into(), why };
    let (drive, namespace) = match bind::find_bound(host, name) {
        Ok(found) => found,
        Err(DeviceError::NotBound(_)) => return Ok(None),
        Err(e) => return Err(fail(e.to_string())),
    };
    let mut reader = VfioReader::open_bound(&drive, &namespace).map_err(|e| fail(e.to_string()))?;
    let len = namespace.size;
    let file = reader.add_file(name, vec![Place { file_offset: 0, device_offset: 0, len }]);
    let reads = ByReader::new(Box::new(reader), file, len, name.into(), flying, 1)?;
    Ok(Some(BoundDrive { reads, len, identity: format!("{} {} {}", namespace.name, drive.model, drive.serial) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::PreadReader;

    #[test]
    fn a_file_is_read_round_and_round() {
        let d = tempfile::tempdir().unwrap();
        let path = d.path().join("f");
        std::fs::write(&path, vec![7u8; 3 << 20]).unwrap();
        let file = crate::storage::DirectFile::open(&path).unwrap();
        let reader = PreadReader::new(vec![file], 1).unwrap();
        let mut reads = ByReader::new(Box::new(reader), FileId(0), 3 << 20, "f".into(), 4 << 20, 8).unwrap();
        assert!(reads.fits(1 << 20, 4) && !reads.fits(1 << 20, 5) && !reads.fits(4 << 20, 1));
        let (time, mut slices, mut latencies) = (Duration::from_millis(50), 0, Latencies::default());
        let span = reads
            .run((1 << 20, 3), time, Duration::from_millis(1), &|| false, &mut |_| slices += 1, &mut latencies)
            .unwrap();
        assert_eq!(latencies.reads(), span.bytes >> 20);
        assert!(span.bytes > 3 << 20 && span.bytes.is_multiple_of(1 << 20) && slices > 0);
        let stopped = reads.run((1 << 20, 3), time, time, &|| true, &mut |_| {}, &mut latencies);
        assert!(matches!(stopped, Err(ProbeError::Interrupted)));
    }

    #[test]
    fn a_drive_that_is_not_bound_is_left_to_the_kernel() {
        let d = tempfile::tempdir().unwrap();
        assert!(open_bound(&Host::at(d.path()), "nvme9n1", 1 << 20).unwrap().is_none());
    }
}

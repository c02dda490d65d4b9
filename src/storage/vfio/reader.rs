//! The VFIO drive behind [`crate::storage::Reader`]: cuts requests into commands, joins completions.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::deadline::Limits;
use super::device::{OpenError, Silence, VfioNvme};
use super::io::{Raises, Read, ReadDone};
use super::pace::Pace;
use crate::memory::Region;
use crate::storage::bind::{Bound, BoundNamespace};
use crate::storage::manifest::Span;
use crate::storage::{Alignment, Bell, Completion, FileId, ReadError, ReadRequest, Reader, StorageError};

struct File {
    name: String,
    spans: Vec<Span>,
}

struct Request {
    file: FileId,
    offset: u64,
    bytes: u64,
    left: usize,
    error: Option<ReadError>,
}

/// Reads by logical block from one drive bound to vfio-pci.
pub struct VfioReader {
    drive: VfioNvme,
    files: Vec<File>,
    // Start here, length, address on the drive's side.
    mapped: Vec<(usize, usize, u64)>,
    // Dropped behind the drive, which reads to it.
    memory: Vec<Region>,
    waiting: VecDeque<Read>,
    // The first of `waiting` that go before the others, as they came.
    urgent: usize,
    // Ends waits; next to the drive's interrupt where there is one.
    bell: Arc<Bell>,
    requests: HashMap<u64, Request>,
    finished: Vec<Completion>,
    // Emptied after each use, so that the reading thread allocates nothing.
    cutting: Vec<Read>,
    done: Vec<ReadDone>,
    pace: Pace,
    precise: bool,
}

/// Room for commands that wait, at the start.
const WAITING: usize = 1024;
/// Bytes of a request from which on an interrupt for all of it costs less than looking for its end.
const LARGE: u64 = 128 << 10;
/// Between two looks at a drive that raises no interrupt: it may be gone.
const LONGEST_SLEEP: Duration = Duration::from_millis(100);

impl VfioReader {
    /// Opens a drive. Reads go to memory that [`Reader::attach`] has announced.
    pub fn open(bdf: &str, nsid: u32) -> Result<Self, OpenError> {
        let drive = VfioNvme::open(bdf, nsid, 128)?;
        Ok(Self {
            bell: drive.bell().map_or_else(|| Bell::new(|| ()), Arc::clone),
            drive,
            files: Vec::new(),
            mapped: Vec::new(),
            memory: Vec::new(),
            waiting: VecDeque::with_capacity(WAITING),
            urgent: 0,
            requests: HashMap::with_capacity(WAITING),
            finished: Vec::with_capacity(WAITING),
            cutting: Vec::with_capacity(WAITING),
            done: Vec::with_capacity(WAITING),
            pace: Pace::default(),
            precise: false,
        })
    }

    /// Opens a drive that [`crate::storage::bind::find_bound`] found, and makes sure that it is the
    /// one that was bound.
    pub fn open_bound(drive: &Bound, namespace: &BoundNamespace) -> Result<Self, OpenError> {
        let reader = Self::open(&drive.pci, namespace.nsid)?;
        let controller = &reader.drive.controller;
        let size = controller.namespace.blocks << controller.namespace.block_shift;
        let expected = format!("{} {} {}", drive.model, drive.serial, namespace.size);
        let found = format!("{} {} {size}", controller.info.model, controller.info.serial);
        if expected == found {
            return Ok(reader);
        }
        Err(OpenError::WrongDrive { bdf: drive.pci.clone(), expected, found })
    }

    /// The drive.
    pub fn drive(&self) -> &VfioNvme {
        &self.drive
    }

    /// Takes the last step against a drive that will not stop; see [`VfioNvme::silence`].
    pub fn silence(&mut self) -> Silence {
        self.drive.silence()
    }

    /// Changes how long things may take, for reads from here on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.drive.controller.limits = limits;
    }

    /// Adds a file by its spans on the drive, sorted by file offset. One span over everything makes
    /// the whole namespace a file.
    pub fn add_file(&mut self, name: &str, spans: Vec<Span>) -> FileId {
        self.files.push(File { name: name.into(), spans });
        FileId((self.files.len() - 1) as u16)
    }

    fn iova(&self, ptr: usize, len: usize) -> Option<u64> {
        let inside = |&&(start, size, _): &&(usize, usize, u64)| {
            ptr >= start && ptr.checked_add(len).is_some_and(|end| end <= start + size)
        };
        self.mapped.iter().find(inside).map(|(start, _, iova)| iova + (ptr - start) as u64)
    }

    /// Cuts all extents of a request; returns their bytes.
    fn cut_all(&self, request: &ReadRequest<'_>, reads: &mut Vec<Read>) -> Result<u64, ReadError> {
        let block = u64::from(self.drive.controller.namespace.block_size());
        let mut bytes = 0;
        for extent in request.extents {
            let fail = |what: String| ReadError::Failed {
                name: self.name(extent.file),
                offset: extent.offset,
                len: extent.len,
                what,
            };
            let file = self.files.get(usize::from(extent.file.0));
            let file = file.ok_or_else(|| fail("it was never added".into()))?;
            let end = extent.dst_offset.saturating_add(extent.len.next_multiple_of(block));
            if end > request.dst_len as u64 {
                return Err(fail(format!("the destination has {} bytes, {end} are needed", request.dst_len)));
            }
            let at = request.dst as usize + extent.dst_offset as usize;
            let to = self
                .iova(at, (end - extent.dst_offset) as usize)
                .ok_or_else(|| fail("the destination is not mapped for the drive".into()))?;
            bytes += self.cut(request.tag, file, extent.offset, extent.len, to, reads).map_err(fail)?;
        }
        Ok(bytes)
    }

    /// Cuts one extent into commands.
    fn cut(
        &self,
        tag: u64,
        file: &File,
        mut offset: u64,
        mut len: u64,
        mut to: u64,
        out: &mut Vec<Read>,
    ) -> Result<u64, String> {
        let shift = self.drive.controller.namespace.block_shift;
        let block = 1u64 << shift;
        let mut done = 0;
        while len > 0 {
            let i = file.spans.partition_point(|s| s.file_offset <= offset);
            let span = i.checked_sub(1).map(|i| file.spans[i]).filter(|s| offset < s.file_offset + s.len);
            let Some(span) = span else {
                // Beyond the end by less than a block is allowed by the seam; a hole is not.
                return if done > 0 && len < 4096 { Ok(done) } else { Err(format!("byte {offset} lies in no extent")) };
            };
            let skip = offset - span.file_offset;
            let device = span.device_offset + skip;
            let bytes = len.min(span.len - skip).min(self.drive.controller.max_transfer_at(device));
            let bytes = if bytes.is_multiple_of(block) { bytes } else { bytes.next_multiple_of(block) };
            if !device.is_multiple_of(block) || skip + bytes > span.len.next_multiple_of(block) {
                return Err(format!("byte {device} of the drive is not at a block of {block} bytes"));
            }
            out.push(Read { tag, lba: device >> shift, blocks: (bytes >> shift) as u32, to, raises: Raises::Few });
            let step = bytes.min(len);
            (offset, to, len, done) = (offset + step, to + step, len - step, done + step);
        }
        Ok(done)
    }

    fn nap(&mut self, nap: Duration) {
        if !self.precise {
            // Else the kernel may add 50 µs to every nap of this thread, the only one that reads.
            let _ = nix::sys::prctl::set_timerslack(1);
            self.precise = true;
        }
        std::thread::sleep(nap);
    }

    fn name(&self, file: FileId) -> String {
        self.files.get(usize::from(file.0)).map_or("an unknown file", |f| &f.name).to_owned()
    }

    /// Takes what is done and sends what waits; true if a poll has something to return, or nothing to wait for.
    fn step(&mut self) -> bool {
        self.collect();
        self.feed();
        !self.finished.is_empty() || self.requests.is_empty()
    }

    fn fail(&mut self, words: &str) {
        self.waiting.clear();
        self.urgent = 0;
        for (tag, request) in std::mem::take(&mut self.requests) {
            let result = Err(ReadError::Failed {
                name: self.name(request.file),
                offset: request.offset,
                len: request.bytes,
                what: words.into(),
            });
            self.finished.push(Completion { tag, result });
        }
    }

    fn feed(&mut self) {
        let mut pushed = false;
        while let Some(read) = self.waiting.front().copied() {
            match self.drive.controller.push(read) {
                Ok(true) => {
                    self.waiting.pop_front();
                    self.urgent = self.urgent.saturating_sub(1);
                    pushed = true;
                }
                Ok(false) => break,
                Err(fault) => return self.fail(&fault.to_string()),
            }
        }
        if pushed {
            self.drive.controller.ring();
        }
    }

    fn collect(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        let fault = self.drive.controller.poll(&mut done).err();
        for ReadDone { read, result } in done.drain(..) {
            let Some(request) = self.requests.get_mut(&read.tag) else {
                continue;
            };
            request.left -= 1;
            if let Err(status) = result {
                let shift = self.drive.controller.namespace.block_shift;
                let what = format!("{status}, at block {} and the {} after it", read.lba, read.blocks - 1);
                let name = self.files.get(usize::from(request.file.0)).map_or("", |f| &f.name);
                request.error.get_or_insert_with(|| ReadError::Failed {
                    name: name.to_owned(),
                    offset: read.lba << shift,
                    len: u64::from(read.blocks) << shift,
                    what,
                });
            }
            if request.left == 0
                && let Some(request) = self.requests.remove(&read.tag)
            {
                let result = request.error.map_or(Ok(request.bytes), Err);
                self.finished.push(Completion { tag: read.tag, result });
            }
        }
        self.done = done;
        if let Some(fault) = fault
            && !self.requests.is_empty()
        {
            self.fail(&fault.to_string());
        }
    }
}

impl Reader for VfioReader {
    fn name(&self) -> &'static str {
        "vfio"
    }

    fn alignment(&self, _file: FileId) -> Alignment {
        Alignment { memory: 4, offset: self.drive.controller.namespace.block_size() }
    }

    fn attach(&mut self, memory: &Region) -> Result<(), StorageError> {
        // SAFETY: the region is held as long as the drive is open: it is a field behind it.
        let iova = unsafe { self.drive.map(memory.addr(), memory.len())? };
        self.mapped.push((memory.addr() as usize, memory.len(), iova));
        self.memory.push(memory.clone());
        Ok(())
    }

    fn bells(&self, to: &mut Vec<Arc<Bell>>) {
        to.push(Arc::clone(&self.bell));
    }

    unsafe fn submit(&mut self, request: &ReadRequest<'_>) -> Result<(), ReadError> {
        let mut reads = std::mem::take(&mut self.cutting);
        reads.clear();
        let bytes = self.cut_all(request, &mut reads);
        self.cutting = reads;
        let bytes = bytes?;
        let Some(first) = request.extents.first().filter(|_| !self.cutting.is_empty()) else {
            self.finished.push(Completion { tag: request.tag, result: Ok(0) });
            return Ok(());
        };
        if bytes >= LARGE {
            self.cutting.iter_mut().for_each(|read| read.raises = Raises::Never);
            self.cutting.last_mut().into_iter().for_each(|read| read.raises = Raises::Many);
        }
        let (file, offset, n) = (first.file, first.offset, self.cutting.len());
        if self.requests.contains_key(&request.tag) {
            let what = format!("tag {} is in use", request.tag);
            return Err(ReadError::Failed { name: self.name(file), offset, len: bytes, what });
        }
        self.requests.insert(request.tag, Request { file, offset, bytes, left: n, error: None });
        self.waiting.extend(self.cutting.drain(..));
        if request.urgent {
            // In front of what waits, in its own order, behind what was urgent before.
            self.waiting.make_contiguous()[self.urgent..].rotate_right(n);
            self.urgent += n;
        }
        // The drive hears of it with the next poll, and of all that were submitted before that by one doorbell.
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>, wait: Option<Duration>) -> Result<(), ReadError> {
        let Some(wait) = wait else {
            self.step();
            out.append(&mut self.finished);
            return Ok(());
        };
        // The precise clock is looked at only for naps: in a virtual machine it may cost as much as a read.
        let (start, mut began, mut raised) = (self.drive.controller.now(), None, None);
        while !self.step() {
            if self.bell.heard() {
                return Ok(());
            }
            let spent = self.drive.controller.now().saturating_sub(start);
            if spent >= wait {
                return Ok(());
            }
            raised = self.drive.wait_interrupt(LONGEST_SLEEP.min(wait));
            if self.bell.heard() {
                // What has ended meanwhile says nothing about the interrupt.
                self.step();
                out.append(&mut self.finished);
                return Ok(());
            }
            if raised.is_some() {
                continue;
            }
            let Some(began) = began else {
                began = Some(Instant::now());
                self.pace.begin();
                continue;
            };
            let waited = began.elapsed();
            if waited >= wait {
                return Ok(());
            }
            match self.pace.next(waited) {
                Some(nap) => self.nap(nap.min(wait - waited)),
                None => self.drive.controller.pause(),
            }
        }
        if let Some(raised) = raised {
            self.drive.heard(raised);
        }
        if let Some(began) = began.filter(|_| !self.finished.is_empty()) {
            self.pace.end(began.elapsed());
        }
        out.append(&mut self.finished);
        Ok(())
    }

    fn outstanding(&self) -> usize {
        self.requests.len() + self.finished.len()
    }
}

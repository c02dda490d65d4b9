//! The VFIO drive behind [`crate::storage::Reader`]: cuts requests into commands, joins completions.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::device::{OpenError, VfioNvme};
use super::io::{Read, ReadDone};
use crate::storage::bind::{Bound, BoundNamespace};
use crate::storage::{Alignment, Completion, FileId, ReadError, ReadRequest, Reader, StorageError};

/// Where bytes of a file lie on the drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte in the file.
    pub file_offset: u64,
    /// First byte on the namespace.
    pub device_offset: u64,
    /// Bytes.
    pub len: u64,
}

struct File {
    name: String,
    spans: Vec<Span>,
}

struct Request {
    name: String,
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
    waiting: VecDeque<Read>,
    requests: HashMap<u64, Request>,
    finished: Vec<Completion>,
}

impl VfioReader {
    /// Opens a drive. Reads go to memory that [`Reader::attach`] has announced.
    pub fn open(bdf: &str, nsid: u32) -> Result<Self, OpenError> {
        Ok(Self {
            drive: VfioNvme::open(bdf, nsid, 128)?,
            files: Vec::new(),
            mapped: Vec::new(),
            waiting: VecDeque::new(),
            requests: HashMap::new(),
            finished: Vec::new(),
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
        let most = self.drive.controller.max_transfer();
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
            let bytes = len.min(span.len - skip).min(most);
            let bytes = if bytes.is_multiple_of(block) { bytes } else { bytes.next_multiple_of(block) };
            if !device.is_multiple_of(block) || skip + bytes > span.len.next_multiple_of(block) {
                return Err(format!("byte {device} of the drive is not at a block of {block} bytes"));
            }
            out.push(Read { tag, lba: device >> shift, blocks: (bytes >> shift) as u32, to });
            let step = bytes.min(len);
            (offset, to, len, done) = (offset + step, to + step, len - step, done + step);
        }
        Ok(done)
    }

    fn fail(&mut self, words: &str) {
        self.waiting.clear();
        for (tag, request) in self.requests.drain() {
            let result = Err(ReadError::Failed {
                name: request.name,
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
        let mut done = Vec::new();
        let fault = self.drive.controller.poll(&mut done).err();
        for ReadDone { read, result } in done {
            let Some(request) = self.requests.get_mut(&read.tag) else {
                continue;
            };
            request.left -= 1;
            if let Err(status) = result {
                let shift = self.drive.controller.namespace.block_shift;
                let what = format!("{status}, at block {} and the {} after it", read.lba, read.blocks - 1);
                request.error.get_or_insert(ReadError::Failed {
                    name: request.name.clone(),
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

    unsafe fn attach(&mut self, memory: *mut u8, len: usize) -> Result<(), StorageError> {
        // SAFETY: the caller's promise.
        let iova = unsafe { self.drive.map(memory, len)? };
        self.mapped.push((memory as usize, len, iova));
        Ok(())
    }

    unsafe fn submit(&mut self, request: &ReadRequest<'_>) -> Result<(), ReadError> {
        let mut reads = Vec::new();
        let mut first: Option<(String, u64)> = None;
        let mut bytes = 0;
        for extent in request.extents {
            let file = self.files.get(usize::from(extent.file.0));
            let name = file.map_or("an unknown file", |f| &f.name).to_owned();
            first.get_or_insert((name.clone(), extent.offset));
            let fail =
                |what: String| ReadError::Failed { name: name.clone(), offset: extent.offset, len: extent.len, what };
            let file = file.ok_or_else(|| fail("it was never added".into()))?;
            let end = extent
                .dst_offset
                .saturating_add(extent.len.next_multiple_of(u64::from(self.alignment(extent.file).offset)));
            if end > request.dst_len as u64 {
                return Err(fail(format!("the destination has {} bytes, {end} are needed", request.dst_len)));
            }
            let at = request.dst as usize + extent.dst_offset as usize;
            let to = self
                .iova(at, (end - extent.dst_offset) as usize)
                .ok_or_else(|| fail("the destination is not mapped for the drive".into()))?;
            bytes += self.cut(request.tag, file, extent.offset, extent.len, to, &mut reads).map_err(fail)?;
        }
        let (name, offset) = first.unwrap_or_default();
        if reads.is_empty() {
            self.finished.push(Completion { tag: request.tag, result: Ok(0) });
            return Ok(());
        }
        if self.requests.contains_key(&request.tag) {
            return Err(ReadError::Failed { name, offset, len: bytes, what: format!("tag {} is in use", request.tag) });
        }
        self.requests.insert(request.tag, Request { name, offset, bytes, left: reads.len(), error: None });
        let n = reads.len();
        self.waiting.extend(reads);
        if request.urgent {
            // In front of what waits, in its own order.
            self.waiting.rotate_right(n);
        }
        self.feed();
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>, wait: Option<Duration>) -> Result<(), ReadError> {
        let end = wait.map(|w| Instant::now() + w);
        loop {
            self.collect();
            self.feed();
            if !self.finished.is_empty() || self.requests.is_empty() || end.is_none_or(|e| Instant::now() >= e) {
                out.append(&mut self.finished);
                return Ok(());
            }
            self.drive.controller.pause();
        }
    }

    fn outstanding(&self) -> usize {
        self.requests.len() + self.finished.len()
    }
}

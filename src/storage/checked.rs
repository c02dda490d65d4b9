//! Compares what a reader brings with recorded checksums: each chunk at its first read, or at every
//! read. Reads are widened to whole chunks, which the alignment asks of callers.

use std::sync::Arc;
use std::time::Duration;

use super::checksum::{CHUNK, crc32c};
use super::manifest::Manifest;
use super::{Alignment, Bell, Completion, Extent, FileId, ReadError, ReadRequest, Reader, StorageError, Watched};
use crate::memory::Region;

/// What is known of one file: its manifest, and which tensor lies where.
#[derive(Clone, Debug)]
pub struct Record {
    /// Checksums and places.
    pub manifest: Manifest,
    /// First byte, bytes and name of each tensor.
    pub tensors: Vec<(u64, u64, String)>,
}

impl Record {
    /// Chunk number `chunk`, which is `data`, compared with what was recorded. `block` is the bytes of a
    /// logical block, for the error.
    ///
    /// # Errors
    /// If it differs, or there is no such chunk.
    pub fn compare(&self, chunk: usize, data: &[u8], block: u64) -> Result<(), Corruption> {
        let (found, expected) = (crc32c(data), self.manifest.crc32c.get(chunk).copied());
        if Some(found) == expected {
            return Ok(());
        }
        let (offset, len) = ((chunk * CHUNK) as u64, data.len() as u64);
        Err(Corruption {
            tensor: self.tensor(offset, len),
            file: self.manifest.file.clone(),
            offset,
            len,
            block: self.manifest.place(offset).unwrap_or(offset) / block.max(1),
            drive: self.manifest.serial.clone(),
            found,
            expected: expected.unwrap_or(0),
        })
    }

    /// The tensor with a byte in `offset .. + len`, for errors.
    fn tensor(&self, offset: u64, len: u64) -> String {
        let inside = |t: &&(u64, u64, String)| t.0 < offset + len && offset < t.0 + t.1;
        self.tensors.iter().find(inside).map_or_else(|| "the header".to_owned(), |t| t.2.clone())
    }
}

/// Bytes that are not those that were recorded.
#[derive(Clone, Debug, thiserror::Error)]
#[error(
    "{tensor}: the {len} bytes at {offset} of {file} (block {block} of drive {drive}) have CRC-32C {found:08x}, but {expected:08x} was recorded; the file was changed after `nt device extents`, or the drive is failing"
)]
pub struct Corruption {
    /// The tensor that holds the bytes.
    pub tensor: String,
    /// The file.
    pub file: String,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// First logical block on the drive.
    pub block: u64,
    /// Serial of the drive.
    pub drive: String,
    /// Checksum of what was read.
    pub found: u32,
    /// Checksum that was recorded.
    pub expected: u32,
}

struct File {
    record: Record,
    /// Chunks that were right once.
    known: Vec<bool>,
}

/// A request in progress.
#[derive(Default)]
struct Asked {
    tag: u64,
    /// Whether its completion is awaited; the entry is free otherwise.
    open: bool,
    /// Whether some of its chunks are to be compared.
    unchecked: bool,
    dst: usize,
    /// What is read, kept for its memory.
    extents: Vec<Extent>,
}

/// A reader whose bytes are compared with what was recorded.
pub struct Checked {
    inner: Box<dyn Reader>,
    files: Vec<File>,
    always: bool,
    /// Grows to the most requests that were ever in progress, so that reading allocates nothing later.
    asked: Vec<Asked>,
    done: Vec<Completion>,
}

impl Checked {
    /// Wraps `inner`, whose files are `records` in their order. With `always` each read is compared,
    /// not only the first of each chunk.
    pub fn new(inner: Box<dyn Reader>, records: Vec<Record>, always: bool) -> Checked {
        let files = records
            .into_iter()
            .map(|record| File { known: vec![false; record.manifest.crc32c.len()], record })
            .collect();
        Checked { inner, files, always, asked: Vec::new(), done: Vec::new() }
    }

    /// Extents without what lies beyond the last block of their files: the last chunk is short.
    fn clamp(&self, extents: &[Extent], to: &mut Vec<Extent>) {
        to.clear();
        to.extend(extents.iter().map(|e| {
            let block = u64::from(self.inner.alignment(e.file).offset);
            let size = self.files.get(usize::from(e.file.0)).map_or(u64::MAX, |f| f.record.manifest.size);
            let end = size.checked_next_multiple_of(block).unwrap_or(u64::MAX);
            Extent { len: e.len.min(end.saturating_sub(e.offset)), ..*e }
        }));
    }

    /// Chunks of an extent: number, first byte in the file and bytes.
    fn chunks(file: &File, e: &Extent) -> impl Iterator<Item = (usize, u64, u64)> + use<> {
        let (size, chunk, end) = (file.record.manifest.size, CHUNK as u64, e.offset + e.len);
        (e.offset.div_ceil(chunk)..end.min(size).div_ceil(chunk)).filter_map(move |i| {
            let (from, to) = (i * chunk, ((i + 1) * chunk).min(size));
            (to <= end).then_some((i as usize, from, to - from))
        })
    }

    fn is_known(&self, extents: &[Extent]) -> bool {
        !self.always
            && extents.iter().all(|e| {
                let file = self.files.get(usize::from(e.file.0));
                file.is_none_or(|f| Self::chunks(f, e).all(|(i, ..)| f.known.get(i) == Some(&true)))
            })
    }

    fn check(&mut self, read: &Asked) -> Result<(), ReadError> {
        for e in &read.extents {
            let block = u64::from(self.inner.alignment(e.file).offset);
            let Some(file) = self.files.get_mut(usize::from(e.file.0)) else { continue };
            for (i, offset, len) in Self::chunks(file, e) {
                if file.known[i] && !self.always {
                    continue;
                }
                let at = read.dst + (e.dst_offset + (offset - e.offset)) as usize;
                // SAFETY: the chunk lies within an extent of a request that the inner reader has
                // checked against its buffer and completed; nobody else touches the buffer before
                // its completion is handed on.
                let data = unsafe { std::slice::from_raw_parts(at as *const u8, len as usize) };
                file.record.compare(i, data, block).map_err(|e| ReadError::Corrupt(Box::new(e)))?;
                file.known[i] = true;
            }
        }
        Ok(())
    }
}

impl Reader for Checked {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn alignment(&self, file: FileId) -> Alignment {
        let inner = self.inner.alignment(file);
        Alignment { offset: inner.offset.max(CHUNK as u32), ..inner }
    }

    fn copies(&self) -> bool {
        self.inner.copies()
    }

    fn watched(&self, to: &mut Vec<Watched>) {
        self.inner.watched(to);
    }

    fn bells(&self, to: &mut Vec<Arc<Bell>>) {
        self.inner.bells(to);
    }

    fn attach(&mut self, memory: &Region) -> Result<(), StorageError> {
        self.inner.attach(memory)
    }

    unsafe fn submit(&mut self, request: &ReadRequest<'_>) -> Result<(), ReadError> {
        let at = self.asked.iter().position(|a| !a.open).unwrap_or(self.asked.len());
        if at == self.asked.len() {
            self.asked.push(Asked::default());
        }
        let mut extents = std::mem::take(&mut self.asked[at].extents);
        self.clamp(request.extents, &mut extents);
        let unchecked = !self.is_known(&extents);
        // SAFETY: the caller's promise; the extents are at most as long as the caller's.
        let taken = unsafe { self.inner.submit(&ReadRequest { extents: &extents, ..*request }) };
        let open = taken.is_ok();
        self.asked[at] = Asked { tag: request.tag, open, unchecked, dst: request.dst as usize, extents };
        taken
    }

    fn poll(&mut self, out: &mut Vec<Completion>, wait: Option<Duration>) -> Result<(), ReadError> {
        let mut done = std::mem::take(&mut self.done);
        let polled = self.inner.poll(&mut done, wait);
        for mut completion in done.drain(..) {
            if let Some(at) = self.asked.iter().position(|a| a.open && a.tag == completion.tag) {
                let mut read = std::mem::take(&mut self.asked[at]);
                if read.unchecked
                    && completion.result.is_ok()
                    && let Err(e) = self.check(&read)
                {
                    completion.result = Err(e);
                }
                read.open = false;
                self.asked[at] = read;
            }
            out.push(completion);
        }
        self.done = done;
        polled
    }

    fn outstanding(&self) -> usize {
        self.inner.outstanding()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Arena;
    use crate::storage::{Script, ScriptedReader, checksum};

    const SIZE: usize = 5 * CHUNK + 777;

    fn data() -> Vec<u8> {
        (0..SIZE as u64).map(|i| (i.wrapping_mul(0x9E37_79B9) >> 9) as u8).collect()
    }

    fn checked(held: Vec<u8>, always: bool) -> Checked {
        let manifest = Manifest {
            file: "m.gguf".into(),
            path: "/mnt/m.gguf".into(),
            size: SIZE as u64,
            serial: "S1".into(),
            model: "M".into(),
            namespace: 1,
            extents: vec![(0, 1 << 20, (2 * CHUNK) as u64), ((2 * CHUNK) as u64, 8 << 20, (4 * CHUNK) as u64)],
            crc32c: checksum::sums(&data()[..]).unwrap(),
            requant: None,
        };
        let half = 3 * CHUNK as u64;
        let tensors = vec![(100, half - 100, "a".into()), (half, SIZE as u64 - half, "b".into())];
        let inner = ScriptedReader::new(vec![held], Script::default());
        Checked::new(Box::new(inner), vec![Record { manifest, tensors }], always)
    }

    fn read(reader: &mut Checked, offset: u64, len: u64) -> Result<Vec<u8>, ReadError> {
        let mut arena = Arena::new(1 << 20).unwrap();
        let region = arena.take(len).unwrap();
        let extents = [Extent { file: FileId(0), offset, len, dst_offset: 0 }];
        let request = ReadRequest::to(&region, 5, &extents);
        // SAFETY: the arena outlives the read, which is waited for below.
        unsafe { reader.submit(&request) }.unwrap();
        let mut done = Vec::new();
        while done.is_empty() {
            reader.poll(&mut done, None).unwrap();
        }
        done.remove(0).result?;
        // SAFETY: the read has ended.
        Ok(unsafe { std::slice::from_raw_parts(region.addr(), len as usize) }.to_vec())
    }

    #[test]
    fn right_bytes_pass_and_the_last_chunk_is_short() {
        let mut reader = checked(data(), true);
        assert_eq!(reader.alignment(FileId(0)).offset, CHUNK as u32);
        for _ in 0..2 {
            assert_eq!(read(&mut reader, CHUNK as u64, 2 * CHUNK as u64).unwrap(), data()[CHUNK..3 * CHUNK]);
            let last = read(&mut reader, 5 * CHUNK as u64, CHUNK as u64).unwrap();
            assert_eq!(last[..777], data()[5 * CHUNK..]);
        }
    }

    #[test]
    fn a_wrong_byte_is_named_by_tensor_and_block() {
        for at in [3 * CHUNK + 9, SIZE - 1] {
            let mut held = data();
            held[at] ^= 4;
            let mut reader = checked(held, false);
            read(&mut reader, 0, 2 * CHUNK as u64).unwrap();
            let e = read(&mut reader, (at / CHUNK * CHUNK) as u64, CHUNK as u64).unwrap_err();
            let block = ((8 << 20) + (at / CHUNK - 2) * CHUNK) / reader.inner.alignment(FileId(0)).offset as usize;
            let text = e.to_string();
            assert!(text.starts_with("b: ") && text.contains(&format!("block {block} of drive S1")), "{text}");
        }
    }

    #[test]
    fn a_chunk_is_compared_once_or_always() {
        for always in [false, true] {
            let mut reader = checked(data(), always);
            read(&mut reader, 0, CHUNK as u64).unwrap();
            let mut held = data();
            held[7] ^= 1;
            reader.inner = Box::new(ScriptedReader::new(vec![held], Script::default()));
            assert_eq!(read(&mut reader, 0, CHUNK as u64).is_err(), always);
        }
    }
}

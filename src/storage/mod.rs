//! Reading weights: one seam, several ways (io_uring with O_DIRECT, a pread pool, VFIO NVMe, and a
//! scripted reader for tests).
//!
//! A reader is asked for spans of files (or devices) into memory of the arena and answers with
//! completions in any order. It splits, aligns, keeps its own queue depth, and re-issues short
//! reads; it knows nothing of layers.

pub mod admin;
mod bell;
pub mod bind;
mod checked;
pub mod checksum;
pub mod extents;
mod file;
pub mod gpt;
pub mod guard;
pub mod health;
pub mod image;
pub mod library;
mod locks;
pub mod manifest;
mod pread;
pub mod safe;
#[cfg(test)]
mod scripted;
pub mod smart;
pub mod source;
mod split;
mod striped;
mod uring;
mod verify;
pub mod vfio;
mod watched;

pub use bell::Bell;
pub use checked::{Checked, Corruption, Record};
pub use file::{DirectFile, Part};
pub use pread::PreadReader;
pub(crate) use pread::THREADS as PREAD_THREADS;
#[cfg(test)]
pub use scripted::{Script, ScriptedReader};
pub use striped::Striped;
pub use uring::UringReader;
#[cfg(test)]
pub(crate) use uring::tests::refuse_io_uring;
pub(crate) use uring::{allow_workers, drain, read_entry, reading_threads};
pub use verify::{VerifyError, verify};
pub use watched::Watched;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::memory::Region;

/// A file or device that a reader has opened, by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u16);

/// A span of one file and where it goes in the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Which file.
    pub file: FileId,
    /// First byte; a multiple of the file's alignment.
    pub offset: u64,
    /// Bytes; a multiple of the file's alignment, except that the end may lie beyond the end of the
    /// file by less than one alignment unit (those bytes stay undefined).
    pub len: u64,
    /// Where the first byte goes, relative to the request's destination; aligned likewise.
    pub dst_offset: u64,
}

/// One read of one unit. `dst` must stay valid and unread until its completion is reported.
#[derive(Clone, Copy, Debug)]
pub struct ReadRequest<'a> {
    /// Handed back in the completion.
    pub tag: u64,
    /// What to read.
    pub extents: &'a [Extent],
    /// Where to: inside the arena, aligned to [`Alignment::memory`].
    pub dst: *mut u8,
    /// Goes before requests that wait already.
    pub urgent: bool,
    /// Bytes available behind `dst`.
    pub dst_len: usize,
}

impl<'a> ReadRequest<'a> {
    /// A read into a region, after those that wait.
    pub fn to(region: &Region, tag: u64, extents: &'a [Extent]) -> ReadRequest<'a> {
        ReadRequest { tag, extents, dst: region.addr(), urgent: false, dst_len: region.len() }
    }
}

/// The outcome of one request, all of its extents together.
#[derive(Debug)]
pub struct Completion {
    /// The request's tag.
    pub tag: u64,
    /// Bytes read, or the first error.
    pub result: Result<u64, ReadError>,
}

/// What direct reads of a file must be aligned to, in bytes (1 where reads are buffered).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of the memory address.
    pub memory: u32,
    /// Of file offset and length.
    pub offset: u32,
}

/// Why a read failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// The system or device reported an error.
    #[error("{name}: reading {len} bytes at {offset} failed: {what}")]
    Failed {
        /// File or device.
        name: String,
        /// First byte.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// The system's or the device's words.
        what: String,
    },
    /// The file ended early: it shrank, or never was as long as its header says.
    #[error(
        "{name}: the file ends at {end}, but {len} bytes at {offset} were expected; was it truncated while in use?"
    )]
    Truncated {
        /// File or device.
        name: String,
        /// First byte.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Where the data ended.
        end: u64,
    },
    /// The file was written to: what was read of it before and after is of two files.
    #[error(
        "{name}: the file has been written to since nt opened it, so that its weights are no longer those of one model; start again when it is whole"
    )]
    Changed {
        /// The file.
        name: String,
    },
    /// The bytes are not those that were recorded.
    #[error(transparent)]
    Corrupt(Box<Corruption>),
}

/// Reads spans of files into memory. Used from one thread.
pub trait Reader: Send {
    /// `io_uring`, `pread`, `vfio`, `scripted`.
    fn name(&self) -> &'static str;

    /// Alignment of direct reads of `file`.
    fn alignment(&self, file: FileId) -> Alignment;

    /// Whether reads are copies by processors, as from a memory file system: each byte then goes
    /// through RAM twice more, to be read from there and for the line that is overwritten.
    fn copies(&self) -> bool {
        false
    }

    /// Announces memory that reads will go to, before the first of them. The reader keeps it mapped until it is dropped.
    ///
    /// # Errors
    /// If the drive cannot be given access to it.
    fn attach(&mut self, memory: &Region) -> Result<(), StorageError>;

    /// Adds the bells that end a wait in [`Reader::poll`] early, with nothing: all are rung where there is something
    /// else to submit. A reader without bells is not to be waited for longer than a new request may wait.
    fn bells(&self, _to: &mut Vec<Arc<Bell>>) {}

    /// Adds the files that it reads from whose writers show (see [`Watched`]).
    fn watched(&self, _to: &mut Vec<Watched>) {}

    /// Takes a request. Never blocks on the device; requests beyond the queue depth wait inside. It may begin with the next
    /// [`Reader::poll`], together with those that are submitted until then.
    ///
    /// An error means that the request was not taken: nothing of it is in flight, and no completion will come.
    /// Whatever goes wrong later is the completion's error, or [`Reader::poll`]'s.
    ///
    /// # Safety
    /// `request.dst .. + dst_len` must lie in memory that was announced ([`Reader::attach`]), or stay mapped otherwise, and
    /// must not be read or written by anyone else, until the request's completion has been returned by [`Reader::poll`] or
    /// the reader dropped.
    unsafe fn submit(&mut self, request: &ReadRequest<'_>) -> Result<(), ReadError>;

    /// Appends completions to `out`; waits up to `wait` for the first one if there is none yet.
    /// Returns at once if nothing is outstanding. After an error the reader is of no more use, and what was
    /// outstanding may be in flight until it is dropped.
    fn poll(&mut self, out: &mut Vec<Completion>, wait: Option<Duration>) -> Result<(), ReadError>;

    /// Requests taken and not yet completed.
    fn outstanding(&self) -> usize;
}

/// Which reader to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReaderKind {
    /// io_uring, or a pread pool where it is refused.
    Auto,
    /// io_uring or an error.
    IoUring,
    /// The pread pool.
    Pread,
    /// A drive bound to vfio-pci or an error.
    Vfio,
}

/// Why no reader could be opened.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A file cannot be opened.
    #[error("{path}: {source}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// io_uring is refused and was asked for.
    #[error("io_uring is not available here: {0}; --reader auto falls back to pread")]
    IoUring(std::io::Error),
    /// A thread could not be started.
    #[error(
        "no thread could be started to read with: {0}; raise the limits on processes and memory (ulimit -u, ulimit -v)"
    )]
    Threads(std::io::Error),
    /// VFIO was asked for where no bound drive holds the weights.
    #[error("{0} is read through the kernel; --reader vfio needs a drive bound to vfio-pci, named by --tier-c")]
    NotBound(String),
    /// A drive bound to vfio-pci.
    #[error(transparent)]
    Drive(#[from] vfio::device::OpenError),
    /// A read while loading failed.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Bytes of one read; long reads are split into these.
pub const CHUNK_BYTES: u64 = 1 << 20;
/// Bytes that are read from one copy before the next one's turn comes, where a model is striped.
pub const STRIPE_BYTES: u64 = 1 << 20;
/// Reads in flight, for each copy.
pub const QUEUE_DEPTH: usize = 16;

/// Opens `files` and a reader over them. Also returns a one-line note on each fallback.
pub fn open_reader(files: &[&Path], kind: ReaderKind) -> Result<(Box<dyn Reader>, Vec<String>), StorageError> {
    open_copies(&[files.iter().map(|p| Part::whole(*p)).collect()], kind)
}

/// As [`open_reader`], over copies of the same files: reads are dealt over them, [`STRIPE_BYTES`] of the
/// file's offset at a time. There is at least one copy, and all have the same number of files.
pub fn open_copies(copies: &[Vec<Part>], kind: ReaderKind) -> Result<(Box<dyn Reader>, Vec<String>), StorageError> {
    if let (ReaderKind::Vfio, Some(first)) = (kind, copies.iter().flatten().next()) {
        return Err(StorageError::NotBound(first.path.display().to_string()));
    }
    let n = copies.len().max(1);
    let files = copies.iter().flatten().map(DirectFile::open_part).collect::<Result<Vec<_>, _>>()?;
    let mut notes: Vec<String> = files.iter().filter_map(DirectFile::note).collect();
    if kind != ReaderKind::Pread {
        match UringReader::new(&files, n) {
            Ok(ring) => return Ok((Box::new(ring), notes)),
            Err(e) if kind == ReaderKind::IoUring => return Err(StorageError::IoUring(e)),
            Err(e) => notes.push(format!("io_uring is not available here ({e}); reading with a pool of pread threads")),
        }
    }
    Ok((Box::new(PreadReader::new(files, n).map_err(StorageError::Threads)?), notes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Arena;
    use std::io::Write;

    fn file(bytes: usize) -> (tempfile::NamedTempFile, Vec<u8>) {
        let data: Vec<u8> = (0..bytes).map(|i| ((i * 2_654_435_761) >> 7) as u8).collect();
        let mut f = tempfile::NamedTempFile::new().unwrap();
        f.write_all(&data).unwrap();
        f.as_file().sync_all().unwrap();
        (f, data)
    }

    fn wait(reader: &mut dyn Reader, n: usize) -> Vec<Completion> {
        let mut done = Vec::new();
        while done.len() < n {
            reader.poll(&mut done, Some(Duration::from_millis(100))).unwrap();
        }
        done
    }

    fn kinds() -> [ReaderKind; 2] {
        [ReaderKind::Auto, ReaderKind::Pread]
    }

    #[test]
    fn many_extents_arrive_where_they_belong() {
        let (f, data) = file(9_000_001);
        for kind in kinds() {
            let (mut reader, _) = open_reader(&[f.path()], kind).unwrap();
            let align = u64::from(reader.alignment(FileId(0)).offset);
            let mut arena = Arena::new(16 << 20).unwrap();
            let region = arena.take(12 << 20).unwrap();
            let end = (data.len() as u64).next_multiple_of(align);
            let extents = [
                Extent { file: FileId(0), offset: 4096, len: 3 << 20, dst_offset: 0 },
                Extent { file: FileId(0), offset: 8 << 20, len: end - (8 << 20), dst_offset: 4 << 20 },
            ];
            for tag in 0..3 {
                let r =
                    ReadRequest { tag, extents: &extents, dst: region.addr(), urgent: tag == 2, dst_len: region.len() };
                // SAFETY: the region outlives the reads, and is looked at after they have ended. The
                // requests write the same bytes.
                unsafe { reader.submit(&r) }.unwrap();
            }
            let done = wait(reader.as_mut(), 3);
            assert_eq!(reader.outstanding(), 0);
            let bytes = (3 << 20) + data.len() as u64 - (8 << 20);
            assert!(done.iter().all(|c| *c.result.as_ref().unwrap() == bytes), "{done:?}");
            // SAFETY: all reads have ended.
            let got = unsafe { std::slice::from_raw_parts(region.addr(), region.len()) };
            assert_eq!(got[..3 << 20], data[4096..4096 + (3 << 20)]);
            assert_eq!(got[4 << 20..][..data.len() - (8 << 20)], data[8 << 20..]);
        }
    }

    #[test]
    fn copies_and_parts_bring_the_same_bytes() {
        let (whole, data) = file(9_000_001);
        let (copy, _) = file(9_000_001);
        let mut image = tempfile::NamedTempFile::new().unwrap();
        image.write_all(&vec![0xee; 1 << 20]).unwrap();
        image.write_all(&data).unwrap();
        image.write_all(&vec![0xee; 1 << 20]).unwrap();
        let within = Part { within: Some((1 << 20, data.len() as u64)), ..Part::whole(image.path()) };
        for kind in kinds() {
            let copies = [vec![Part::whole(whole.path())], vec![within.clone()], vec![Part::whole(copy.path())]];
            let (mut reader, _) = open_copies(&copies, kind).unwrap();
            let align = u64::from(reader.alignment(FileId(0)).offset);
            let mut arena = Arena::new(16 << 20).unwrap();
            let region = arena.take(12 << 20).unwrap();
            let len = (data.len() as u64 - 8192).next_multiple_of(align);
            let extents = [Extent { file: FileId(0), offset: 8192, len, dst_offset: 0 }];
            let r = ReadRequest::to(&region, 1, &extents);
            // SAFETY: the region outlives the read, and is looked at after it has ended.
            unsafe { reader.submit(&r) }.unwrap();
            let done = wait(reader.as_mut(), 1);
            assert_eq!(*done[0].result.as_ref().unwrap(), data.len() as u64 - 8192);
            // SAFETY: all reads have ended.
            let got = unsafe { std::slice::from_raw_parts(region.addr(), data.len() - 8192) };
            assert!(got == &data[8192..]);
        }
        let beyond = Part { within: Some((1 << 20, 11 << 20)), ..Part::whole(image.path()) };
        assert!(open_copies(&[vec![beyond]], ReaderKind::Auto).is_err());
    }

    #[test]
    fn a_file_that_shrinks_is_reported_with_its_end() {
        for kind in kinds() {
            let (f, _) = file(4 << 20);
            let (mut reader, _) = open_reader(&[f.path()], kind).unwrap();
            f.as_file().set_len(1 << 20).unwrap();
            let mut arena = Arena::new(8 << 20).unwrap();
            let region = arena.take(4 << 20).unwrap();
            let extents = [Extent { file: FileId(0), offset: 0, len: 4 << 20, dst_offset: 0 }];
            // SAFETY: the region outlives the reader's use of it.
            unsafe { reader.submit(&ReadRequest::to(&region, 9, &extents)) }.unwrap();
            let done = wait(reader.as_mut(), 1);
            assert!(matches!(done[0].result, Err(ReadError::Truncated { end: 1_048_576, .. })), "{done:?}");
        }
    }

    #[test]
    fn an_extent_beyond_its_buffer_is_refused() {
        let (f, _) = file(8192);
        let (mut reader, _) = open_reader(&[f.path()], ReaderKind::Pread).unwrap();
        let mut arena = Arena::new(4096).unwrap();
        let region = arena.take(4096).unwrap();
        let extents = [Extent { file: FileId(0), offset: 0, len: 8192, dst_offset: 0 }];
        // SAFETY: nothing is read, since the request is refused.
        let r = unsafe { reader.submit(&ReadRequest::to(&region, 0, &extents)) };
        assert!(r.is_err());
    }

    #[test]
    fn readers_end_with_reads_in_flight() {
        let (f, _) = file(8 << 20);
        for kind in kinds() {
            let mut arena = Arena::new(8 << 20).unwrap();
            let region = arena.take(8 << 20).unwrap();
            let (mut reader, _) = open_reader(&[f.path()], kind).unwrap();
            let extents = [Extent { file: FileId(0), offset: 0, len: 8 << 20, dst_offset: 0 }];
            // SAFETY: the reader is dropped before the arena.
            unsafe { reader.submit(&ReadRequest::to(&region, 0, &extents)) }.unwrap();
            drop(reader);
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let e = open_reader(&[Path::new("/nonexistent/model.gguf")], ReaderKind::Auto).err().unwrap();
        assert!(e.to_string().contains("/nonexistent/model.gguf"), "{e}");
    }
}

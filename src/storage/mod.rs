//! Reading weights: one seam, several ways (io_uring with O_DIRECT, a pread pool, VFIO NVMe, and a
//! scripted reader for tests).
//!
//! A reader is asked for spans of files (or devices) into memory of the arena and answers with
//! completions in any order. It splits, aligns, keeps its own queue depth, and re-issues short
//! reads; it knows nothing of layers.

pub mod bind;
pub mod extents;
pub mod guard;
pub mod vfio;

use std::time::Duration;

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
    /// Bytes available behind `dst`.
    pub dst_len: usize,
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
}

/// Reads spans of files into memory. Used from one thread.
pub trait Reader: Send {
    /// `io_uring`, `pread`, `vfio`, `scripted`.
    fn name(&self) -> &'static str;

    /// Alignment of direct reads of `file`.
    fn alignment(&self, file: FileId) -> Alignment;

    /// Takes a request. Never blocks on the device; requests beyond the queue depth wait inside.
    ///
    /// # Safety
    /// `request.dst .. + dst_len` must stay mapped, and must not be read or written by anyone else,
    /// until the request's completion has been returned by [`Reader::poll`] or the reader dropped.
    unsafe fn submit(&mut self, request: &ReadRequest<'_>) -> Result<(), ReadError>;

    /// Appends completions to `out`; waits up to `wait` for the first one if there is none yet.
    /// Returns at once if nothing is outstanding.
    fn poll(&mut self, out: &mut Vec<Completion>, wait: Option<Duration>) -> Result<(), ReadError>;

    /// Requests taken and not yet completed.
    fn outstanding(&self) -> usize;
}

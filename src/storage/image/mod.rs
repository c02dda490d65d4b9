//! Models staged on a drive of their own: one GPT partition with a superblock, a table of manifests
//! and the files, each from a multiple of 1 MiB on without gaps.
//!
//! A mark in the first block says that the drive is being staged. It is replaced by the table of
//! partitions in the last write, after everything was read back and compared: a drive with that table and a superblock
//! holds what its table of manifests says.

mod content;
mod drive;
pub mod mark;
mod old;
pub mod partitions;
#[cfg(test)]
mod tests;
mod wipe;
mod write;

use std::cell::RefCell;
use std::io::{Cursor, Read};
use std::path::Path;
use std::rc::Rc;

use super::checksum::{CHUNK, crc32c};
use super::gpt;
use super::manifest::Manifest;

pub use super::source::Source;
pub use content::Content;
pub use drive::{Drive, Medium, Node, Target};
pub use write::{Identity, Staging, Steps};

/// First bytes of a superblock.
pub const MAGIC: &[u8; 8] = b"NTIMAGE1";
const SUPERBLOCK: u64 = 4096;
const ALIGN: u64 = 1 << 20;
/// A table larger than this is not believed.
const TABLE_MAX: u64 = 1 << 30;

/// Why a model was not staged, or a staged one cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file or the drive cannot be read or written.
    #[error("{what}: {source}")]
    Io {
        /// What was done.
        what: String,
        /// The system's words.
        source: std::io::Error,
    },
    /// The model is larger than the drive. Nothing was written.
    #[error(
        "the model needs {needed} bytes on the drive, which has {size}; nothing was written; take a larger drive, or a smaller quantization of the model"
    )]
    TooLarge {
        /// Bytes with table and alignment.
        needed: u64,
        /// Bytes of the drive.
        size: u64,
    },
    /// A file that no table of a drive can hold. Nothing was written.
    #[error("{file}: {why}; nothing was written")]
    Unfit {
        /// The file, as far as it can be shown.
        file: String,
        /// What is wrong with it, and the cure.
        why: String,
    },
    /// A file was written to while it was copied.
    #[error("{file}: it was changed while it was staged, so the copy may be of neither state")]
    Changed {
        /// The file.
        file: String,
    },
    /// What was written does not come back.
    #[error("{file}: the {CHUNK} bytes at {offset} of the drive were written and do not read back the same")]
    ReadBack {
        /// The file staged.
        file: String,
        /// Byte of the drive.
        offset: u64,
    },
    /// What was wiped does not read as zeros.
    #[error("zeros were written at byte {offset} of the drive and do not read back the same")]
    NotWiped {
        /// Byte of the drive.
        offset: u64,
    },
    /// A signal asked to stop.
    #[error("it was interrupted")]
    Stopped,
    /// Staging ended after what was on the drive had been given up.
    #[error("{0}; the drive now holds neither a model nor what was on it before")]
    Erased(Box<ImageError>),
    /// There is no whole image.
    #[error("the drive holds no staged model: {0}")]
    None(String),
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> ImageError {
    let what = what.into();
    move |source| ImageError::Io { what, source }
}

/// Magic, version, CRC-32C of the table, its first byte on the drive, its bytes; CRC-32C of all that
/// in the last four bytes.
pub(super) fn superblock(table: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(SUPERBLOCK as usize);
    out.extend(MAGIC);
    out.extend(1u32.to_le_bytes());
    out.extend(crc32c(table).to_le_bytes());
    out.extend((gpt::START + SUPERBLOCK).to_le_bytes());
    out.extend((table.len() as u64).to_le_bytes());
    out.resize(SUPERBLOCK as usize - 4, 0);
    out.extend(crc32c(&out).to_le_bytes());
    out
}

/// Whether a partition that begins with these bytes begins with a whole superblock of this version, as `superblock`
/// makes it.
pub fn is_superblock(head: &[u8]) -> bool {
    let Some(sb) = head.get(..SUPERBLOCK as usize) else { return false };
    let number = |at: usize, n: usize| sb[at..at + n].iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b));
    let end = SUPERBLOCK as usize - 4;
    sb.starts_with(MAGIC)
        && number(8, 4) == 1
        && number(end, 4) == u64::from(crc32c(&sb[..end]))
        && number(16, 8) == gpt::START + SUPERBLOCK
        && number(24, 8) <= TABLE_MAX
        && sb[32..end].iter().all(|b| *b == 0)
}

/// The manifests of the models on a medium, which is found by its partition table and superblock.
///
/// # Errors
/// [`ImageError::None`] says what is missing or damaged.
pub fn read(drive: &mut dyn Medium) -> Result<Vec<Manifest>, ImageError> {
    let none = |what: &str| ImageError::None(what.into());
    if drive.size() < gpt::START + SUPERBLOCK {
        return Err(none("it is too small"));
    }
    let head = drive.get(0, gpt::HEAD)?;
    if mark::ranges(&head).is_some() {
        return Err(none("staging it was interrupted; stage it again"));
    }
    let partition = gpt::BLOCKS.iter().find_map(|block| gpt::find(&head, *block));
    let partition = partition.ok_or_else(|| none("no partition of nt's type"))?;
    let start = partition.start;
    if partition.end > drive.size() || start.checked_add(SUPERBLOCK).is_none_or(|end| end > partition.end) {
        return Err(none("its partition lies outside the drive"));
    }
    let sb = drive.get(start, SUPERBLOCK)?;
    let number = |at: usize, n: usize| sb[at..at + n].iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b));
    if !sb.starts_with(MAGIC) || number(8, 4) != 1 {
        return Err(none("no superblock (was staging interrupted?)"));
    }
    let end = SUPERBLOCK as usize - 4;
    if number(end, 4) != u64::from(crc32c(&sb[..end])) {
        return Err(none("its superblock is damaged"));
    }
    let (at, len) = (number(16, 8), number(24, 8));
    if len > TABLE_MAX || at < start || at.checked_add(len).is_none_or(|e| e > partition.end) {
        return Err(none("its table lies outside its partition"));
    }
    let table = drive.get(at, len)?;
    if u64::from(crc32c(&table)) != number(12, 4) {
        return Err(none("its table is damaged"));
    }
    let found: Vec<Manifest> =
        serde_json::from_slice(&table).map_err(|e| none(&format!("its table cannot be read: {e}")))?;
    for m in &found {
        let beyond = |e: &(u64, u64, u64)| e.1 < start || e.1.checked_add(e.2).is_none_or(|end| end > partition.end);
        let beyond = m.extents.iter().any(beyond);
        let fault = m.fault().or_else(|| beyond.then(|| "an extent lies outside the partition".to_owned()));
        if let Some(fault) = fault {
            return Err(none(&format!("{}: {fault}", m.file)));
        }
    }
    Ok(found)
}

/// The manifest of the file that `name` means, by its file name, with or without `.gguf`.
pub fn named<'a>(manifests: &'a [Manifest], name: &Path) -> Option<&'a Manifest> {
    let name = name.file_name()?.to_string_lossy();
    manifests.iter().find(|m| m.file == name || m.file.strip_suffix(".gguf") == Some(&name))
}

/// A staged file from its first byte on.
pub struct Staged {
    medium: Rc<RefCell<dyn Medium>>,
    manifest: Manifest,
    next: u64,
    buffer: Cursor<Vec<u8>>,
}

impl Staged {
    /// The file of `manifest` on `medium`.
    pub fn new(medium: Rc<RefCell<dyn Medium>>, manifest: &Manifest) -> Staged {
        Staged { medium, manifest: manifest.clone(), next: 0, buffer: Cursor::default() }
    }
}

impl Read for Staged {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        let n = self.buffer.read(to)?;
        if n > 0 || to.is_empty() || self.next >= self.manifest.size {
            return Ok(n);
        }
        let at = self.next;
        let Some(&(first, place, len)) = self.manifest.extents.iter().rfind(|e| e.0 <= at) else { return Ok(0) };
        let len = ALIGN.min(self.manifest.size - at).min(first + len - at);
        let bytes = self.medium.borrow_mut().get(place + (at - first), len).map_err(std::io::Error::other)?;
        self.next += len;
        self.buffer = Cursor::new(bytes);
        self.buffer.read(to)
    }
}

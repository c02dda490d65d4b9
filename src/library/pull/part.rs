//! A file on its way: under another name until it is whole, next to it a record of what it is a part of and how much of
//! it surely lies on the drive.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::PullError;
use crate::storage::safe;

/// Bytes after which what was written is made durable and recorded.
const SYNC_EVERY: u64 = 32 << 20;
/// Bytes of a read.
const READ: usize = 1 << 20;
/// Most bytes of a record.
const RECORD_MAX: u64 = 64 << 10;

/// What a file is: two that are alike here have the same bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// Where it comes from, without the query.
    pub from: String,
    /// Bytes.
    pub total: u64,
    /// Checksum, if it is known.
    pub sha256: Option<String>,
    /// Entity tag, if the server has one.
    pub tag: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    file: Identity,
    /// Bytes that surely lie on the drive.
    kept: u64,
}

/// A file that is being fetched; nobody else fetches it meanwhile.
pub(super) struct Part {
    to: PathBuf,
    path: PathBuf,
    file: File,
    identity: Identity,
    len: u64,
    recorded: u64,
    sum: Sha256,
}

impl Identity {
    /// Whether what was fetched as `other` is a part of this.
    fn goes_on(&self, other: &Identity) -> bool {
        let same = match (&self.sha256, &other.sha256) {
            (Some(a), Some(b)) => a == b,
            _ => self.tag.is_some() && self.tag == other.tag && self.from == other.from,
        };
        same && self.total == other.total
    }
}

/// The name of a part, and that of its record.
fn names(to: &Path) -> (PathBuf, PathBuf) {
    let with = |end: &str| {
        let mut name = to.file_name().unwrap_or_default().to_owned();
        name.push(end);
        to.with_file_name(name)
    };
    (with(".part"), with(".part.json"))
}

/// Bytes of a part that will not have to be fetched again, as its record has it.
pub(super) fn kept(to: &Path, identity: &Identity) -> u64 {
    let (path, record) = names(to);
    let there = fs::symlink_metadata(&path).map_or(0, |m| if m.is_file() { m.len() } else { 0 });
    read_record(&record).filter(|r| identity.goes_on(&r.file)).map_or(0, |r| r.kept.min(there).min(identity.total))
}

fn read_record(path: &Path) -> Option<Record> {
    let meta = fs::symlink_metadata(path).ok()?;
    if !meta.is_file() || meta.len() > RECORD_MAX {
        return None;
    }
    let record: Record = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    (record.version == 1).then_some(record)
}

impl Part {
    /// Opens the part of the file that is to lie at `to`, with what is there of it; `seen` is told how much of that has
    /// been read. `None` if `stop` said so.
    ///
    /// # Errors
    /// If another process has it, or it cannot be written.
    pub fn open(
        to: &Path,
        identity: &Identity,
        seen: &mut dyn FnMut(u64),
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<Part>, PullError> {
        let (path, _) = names(to);
        let file = opened(&path)?;
        let kept = kept(to, identity);
        let mut part =
            Part { to: to.into(), path, file, identity: identity.clone(), len: 0, recorded: 0, sum: Sha256::new() };
        part.file.set_len(kept).map_err(|e| part.failed("cutting", &e))?;
        part.file.seek(SeekFrom::Start(0)).map_err(|e| part.failed("reading", &e))?;
        let mut bytes = vec![0; READ];
        while part.len < kept {
            if stop() {
                return Ok(None);
            }
            let n = part.file.read(&mut bytes).map_err(|e| part.failed("reading", &e))?;
            if n == 0 {
                break;
            }
            part.sum.update(&bytes[..n]);
            part.len += n as u64;
            seen(part.len);
        }
        part.record()?;
        Ok(Some(part))
    }

    /// Bytes that are there.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// What it is to become.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Adds the next bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), PullError> {
        self.file.write_all(bytes).map_err(|e| self.failed("writing", &e))?;
        self.sum.update(bytes);
        self.len += bytes.len() as u64;
        if self.len - self.recorded >= SYNC_EVERY { self.record() } else { Ok(()) }
    }

    /// Begins again, as a part of `identity`.
    pub fn restart(&mut self, identity: &Identity) -> Result<(), PullError> {
        let cut = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        cut.map_err(|e| self.failed("cutting", &e))?;
        (self.len, self.recorded, self.sum) = (0, 0, Sha256::new());
        self.identity = identity.clone();
        self.record()
    }

    /// Makes what is there durable, and says so.
    pub fn record(&mut self) -> Result<(), PullError> {
        self.file.sync_all().map_err(|e| self.failed("writing", &e))?;
        let record = Record { version: 1, file: self.identity.clone(), kept: self.len };
        let text = serde_json::to_vec(&record).map_err(|e| self.failed("describing", &e.into()))?;
        let (_, path) = names(&self.to);
        safe::replace(&path, &text, 0o600, ".nt-").map_err(|e| self.failed("describing", &e))?;
        self.recorded = self.len;
        Ok(())
    }

    /// The checksum of what is there.
    pub fn sha256(&self) -> String {
        hex(self.sum.clone())
    }

    /// Opens what is there for reading, with its length.
    pub fn reader(&self) -> Result<(File, u64), PullError> {
        let file = File::open(&self.path).map_err(|e| self.failed("reading", &e))?;
        Ok((file, self.len))
    }

    /// Takes its name. It must be whole and recorded.
    pub fn publish(self) -> Result<(), PullError> {
        let (_, record) = names(&self.to);
        if fs::symlink_metadata(&self.to).is_ok() {
            return Err(PullError::Failed(format!(
                "{}: it has come meanwhile; it is left as it is",
                self.to.display()
            )));
        }
        fs::rename(&self.path, &self.to).map_err(|e| self.failed("renaming", &e))?;
        let _ = fs::remove_file(record);
        let folder = self.to.parent().unwrap_or(Path::new("."));
        safe::sync_folder(folder).map_err(|e| self.failed("renaming", &e))
    }

    /// Removes what is of no use.
    pub fn discard(self) {
        let (path, record) = names(&self.to);
        let _ = fs::remove_file(path);
        let _ = fs::remove_file(record);
    }

    fn failed(&self, doing: &str, e: &io::Error) -> PullError {
        failed(doing, &self.path, e)
    }
}

fn failed(doing: &str, path: &Path, e: &io::Error) -> PullError {
    let text = format!("{doing} {} failed: {e}", path.display());
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            PullError::Room(format!("{text}; what is there stays, and the same command goes on from it"))
        }
        _ => PullError::Failed(text),
    }
}

/// Opens a part for reading and writing, and takes it for this process.
fn opened(path: &Path) -> Result<File, PullError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    // Whoever had it may have given it its name just now.
    for _ in 0..3 {
        let file = options.open(path).map_err(|e| failed("opening", path, &e))?;
        let here = file.metadata().map_err(|e| failed("opening", path, &e))?;
        if !here.is_file() {
            return Err(PullError::Failed(format!("{}: it is no regular file", path.display())));
        }
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(PullError::Failed(format!("{}: another process fetches this file", path.display())));
            }
            Err(TryLockError::Error(e)) => return Err(failed("locking", path, &e)),
        }
        if fs::symlink_metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (here.dev(), here.ino())) {
            return Ok(file);
        }
    }
    Err(PullError::Failed(format!("{}: it is replaced by others again and again", path.display())))
}

/// The checksum of a file; `None` if `stop` said so.
pub(super) fn sha256_of(path: &Path, stop: &dyn Fn() -> bool) -> io::Result<Option<String>> {
    let (mut file, _) = super::super::open_regular(path)?;
    let (mut sum, mut bytes) = (Sha256::new(), vec![0; READ]);
    loop {
        if stop() {
            return Ok(None);
        }
        match file.read(&mut bytes)? {
            0 => return Ok(Some(hex(sum))),
            n => sum.update(&bytes[..n]),
        }
    }
}

fn hex(sum: Sha256) -> String {
    sum.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

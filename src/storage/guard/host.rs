//! The host as the guard sees it: files below one root, so that tests can show it any machine.
//!
//! Nothing here writes. An answer that cannot be read is an error, never an empty answer: the guard
//! turns it into a refusal.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// A file that could not be read, and why.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{path} cannot be read: {why}")]
pub struct Unreadable {
    /// Which file.
    pub path: PathBuf,
    /// The system's words.
    pub why: String,
}

/// Read access to `/sys`, `/proc`, `/dev` and `/etc` of a machine.
#[derive(Debug, Clone)]
pub struct Host {
    root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self::at("/")
    }
}

impl Host {
    /// The machine whose `/` lies at `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where `path` (absolute) really lies.
    pub fn real(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn fail(path: &str, why: &std::io::Error) -> Unreadable {
        Unreadable { path: path.into(), why: why.to_string() }
    }

    /// True if `path` exists (a dangling link counts).
    pub fn exists(&self, path: &str) -> bool {
        self.real(path).symlink_metadata().is_ok()
    }

    /// The whole file as text, lossily, without trailing white space.
    pub fn read(&self, path: &str) -> Result<String, Unreadable> {
        let bytes = std::fs::read(self.real(path)).map_err(|e| Self::fail(path, &e))?;
        Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
    }

    /// Like [`Host::read`], `None` where the file does not exist.
    pub fn read_if_there(&self, path: &str) -> Result<Option<String>, Unreadable> {
        if self.exists(path) { self.read(path).map(Some) } else { Ok(None) }
    }

    /// Names in a directory, sorted; empty where the directory does not exist.
    pub fn list(&self, path: &str) -> Result<Vec<String>, Unreadable> {
        if !self.exists(path) {
            return Ok(Vec::new());
        }
        let entries = std::fs::read_dir(self.real(path)).map_err(|e| Self::fail(path, &e))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| Self::fail(path, &e))?;
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    /// Target of a symbolic link as written there.
    pub fn link(&self, path: &str) -> Result<PathBuf, Unreadable> {
        std::fs::read_link(self.real(path)).map_err(|e| Self::fail(path, &e))
    }

    /// Last component of a link's target, `None` where there is no such link.
    pub fn link_name(&self, path: &str) -> Option<String> {
        let target = self.link(path).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    /// `path` with every link followed, as components below the root.
    pub fn resolve(&self, path: &str) -> Result<PathBuf, Unreadable> {
        let full = self.real(path).canonicalize().map_err(|e| Self::fail(path, &e))?;
        let root = self.root.canonicalize().map_err(|e| Self::fail("/", &e))?;
        let below = full
            .strip_prefix(&root)
            .map_err(|_| Unreadable { path: path.into(), why: "it leads outside the root".into() })?;
        Ok(Path::new("/").join(below))
    }

    /// `len` bytes at `offset` of a file or device; fewer at its end. A negative offset counts from
    /// the end.
    pub fn read_at(&self, path: &str, offset: i64, len: usize) -> Result<Vec<u8>, Unreadable> {
        let fail = |e: std::io::Error| Self::fail(path, &e);
        let mut file = File::open(self.real(path)).map_err(fail)?;
        let size = file.seek(SeekFrom::End(0)).map_err(fail)?;
        let start = match offset {
            0.. => offset.unsigned_abs().min(size),
            _ => size.saturating_sub(offset.unsigned_abs()),
        };
        file.seek(SeekFrom::Start(start)).map_err(fail)?;
        let mut bytes = Vec::with_capacity(len);
        file.take(len as u64).read_to_end(&mut bytes).map_err(fail)?;
        Ok(bytes)
    }
}

//! The host as the guard sees it: files below one root, so that tests can show it any machine.
//!
//! Nothing here writes. An answer that cannot be read is an error, never an empty answer: the guard
//! turns it into a refusal.

use std::fs::OpenOptions;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The longest file that is read whole. Tables of a machine are far shorter.
const TEXT_MAX: u64 = 16 << 20;

/// A file that could not be read, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path} cannot be read: {why}")]
pub struct Unreadable {
    /// Which file.
    pub path: PathBuf,
    /// The system's words.
    pub why: String,
    /// The kind of the system's error; `Other` where there was none.
    pub kind: io::ErrorKind,
    /// Its number, if there was one.
    pub errno: Option<i32>,
}

impl Unreadable {
    /// A fact that cannot be had, for a reason of our own.
    pub fn new(path: &str, why: impl Into<String>) -> Self {
        Self { path: path.into(), why: why.into(), kind: io::ErrorKind::Other, errno: None }
    }

    /// True if the file is gone, as those of a process that has ended are.
    pub fn is_gone(&self) -> bool {
        self.kind == io::ErrorKind::NotFound || self.errno == Some(libc::ESRCH)
    }
}

/// Read access to `/sys`, `/proc`, `/dev` and `/etc` of a machine.
#[derive(Debug, Clone)]
pub struct Host {
    pub(super) root: PathBuf,
    stopped: fn() -> bool,
}

impl Default for Host {
    fn default() -> Self {
        Self::at("/")
    }
}

impl Host {
    /// The machine whose `/` lies at `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), stopped: || false }
    }

    /// The same machine, for a command that a signal may ask to stop: long searches end with an error then.
    #[must_use]
    pub fn until(self, stopped: fn() -> bool) -> Self {
        Self { stopped, ..self }
    }

    /// Whether a signal has asked to stop.
    pub fn is_stopped(&self) -> bool {
        (self.stopped)()
    }

    /// Where `path` (absolute) really lies.
    pub fn real(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// True for the machine that this program runs on, false for a picture of one in a folder.
    pub fn is_real(&self) -> bool {
        self.root == Path::new("/")
    }

    pub(super) fn fail(path: &str, why: &io::Error) -> Unreadable {
        Unreadable { path: path.into(), why: why.to_string(), kind: why.kind(), errno: why.raw_os_error() }
    }

    /// True if `path` exists (a dangling link counts), or may exist where that cannot be told.
    pub fn exists(&self, path: &str) -> bool {
        let absent = [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory];
        self.real(path).symlink_metadata().map_or_else(|e| !absent.contains(&e.kind()), |_| true)
    }

    /// The whole file as text, lossily, without trailing white space.
    pub fn read(&self, path: &str) -> Result<String, Unreadable> {
        Ok(String::from_utf8_lossy(&self.bytes(path)?).trim_end().to_owned())
    }

    /// The whole file: a regular one of at most 16 MiB, or the null device, which is empty. Nothing
    /// else is read, since a FIFO would make us wait.
    pub fn bytes(&self, path: &str) -> Result<Vec<u8>, Unreadable> {
        let fail = |e: io::Error| Self::fail(path, &e);
        let open = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(self.real(path));
        let file = open.map_err(fail)?;
        let meta = file.metadata().map_err(fail)?;
        let null = meta.file_type().is_char_device() && meta.rdev() == libc::makedev(1, 3);
        if !(meta.is_file() || null) {
            return Err(Unreadable::new(path, "it is no regular file"));
        }
        let mut bytes = Vec::new();
        file.take(TEXT_MAX + 1).read_to_end(&mut bytes).map_err(fail)?;
        if bytes.len() as u64 > TEXT_MAX {
            return Err(Unreadable::new(path, "it is longer than 16 MiB"));
        }
        Ok(bytes)
    }

    /// Like [`Host::read`], `None` where the file does not exist.
    pub fn read_if_there(&self, path: &str) -> Result<Option<String>, Unreadable> {
        if self.exists(path) { self.read(path).map(Some) } else { Ok(None) }
    }

    /// Names in a directory, sorted; empty where the directory does not exist.
    pub fn list(&self, path: &str) -> Result<Vec<String>, Unreadable> {
        if self.exists(path) { self.must_list(path) } else { Ok(Vec::new()) }
    }

    /// Names in a directory that must be there, sorted.
    pub fn must_list(&self, path: &str) -> Result<Vec<String>, Unreadable> {
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
        let below = full.strip_prefix(&root).map_err(|_| Unreadable::new(path, "it leads outside the root"))?;
        Ok(Path::new("/").join(below))
    }

    /// `len` bytes at `offset` of the block device `/dev/NAME`; fewer at its end. A negative offset counts from
    /// the end. The node must have the number that sysfs tells.
    pub fn read_at(&self, path: &str, offset: i64, len: usize) -> Result<Vec<u8>, Unreadable> {
        let fail = |e: std::io::Error| Self::fail(path, &e);
        let name = path.strip_prefix("/dev/").unwrap_or(path);
        let number = self.read(&format!("/sys/class/block/{name}/dev"))?;
        let mut file = self.open_block(name, &number, OpenOptions::new().read(true)).map_err(fail)?;
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

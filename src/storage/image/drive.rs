//! What an image is written to and read from: block devices, files, drives bound to vfio-pci.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::super::safe;
use super::{ImageError, io};

/// `linux/fs.h`.
mod ioctl {
    // First byte and bytes.
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
}

/// What an image is read from.
pub trait Medium {
    /// Bytes.
    fn size(&self) -> u64;

    /// `len` bytes at `at`.
    ///
    /// # Errors
    /// If not all of them can be read.
    fn get(&mut self, at: u64, len: u64) -> Result<Vec<u8>, ImageError>;
}

/// What an image is written to. The writes between two flushes may reach the drive in any order or not at all; one
/// of a single block reaches it whole or not at all.
pub trait Target: Medium {
    /// Bytes per logical block.
    fn block(&self) -> u64;

    /// Writes `bytes` at `at`.
    ///
    /// # Errors
    /// If not all of them can be written.
    fn put(&mut self, at: u64, bytes: &[u8]) -> Result<(), ImageError>;

    /// Tells the drive that these bytes are not needed; false where it cannot be told, or does not do it. What is read
    /// there afterwards is the drive's choice.
    ///
    /// # Errors
    /// If the drive can be used no longer.
    fn discard(&mut self, bytes: Range<u64>) -> Result<bool, ImageError>;

    /// Makes all of it durable, and has what follows read from the drive instead of the page cache.
    ///
    /// # Errors
    /// If the drive does not confirm it.
    fn sync(&mut self) -> Result<(), ImageError>;
}

/// A drive, or a file of its size in tests.
#[derive(Clone, Debug)]
pub struct Drive<'a> {
    /// Open for reading and writing.
    pub file: &'a File,
    /// Bytes.
    pub size: u64,
    /// Bytes per logical block.
    pub block: u64,
}

impl Medium for Drive<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn get(&mut self, at: u64, len: u64) -> Result<Vec<u8>, ImageError> {
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, at).map_err(io(format!("reading {len} bytes at {at} of the drive")))?;
        Ok(bytes)
    }
}

impl Target for Drive<'_> {
    fn block(&self) -> u64 {
        self.block
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> Result<(), ImageError> {
        about_to_change();
        self.file.write_all_at(bytes, at).map_err(io(format!("writing {} bytes at {at} of the drive", bytes.len())))
    }

    fn discard(&mut self, bytes: Range<u64>) -> Result<bool, ImageError> {
        about_to_change();
        let range = [bytes.start, bytes.end - bytes.start];
        // SAFETY: the ioctl reads two 64-bit numbers at the pointer, which `range` holds, and the descriptor is open.
        let Err(e) = (unsafe { ioctl::blkdiscard(self.file.as_raw_fd(), &range) }) else { return Ok(true) };
        // It was only a hint: every place is read again, and written with zeros if need be.
        if !matches!(e, Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::EINVAL) {
            tracing::warn!("the drive does not discard {} bytes at {}: {e}", range[1], range[0]);
        }
        Ok(false)
    }

    fn sync(&mut self) -> Result<(), ImageError> {
        about_to_change();
        self.file.sync_all().map_err(io("flushing the drive"))?;
        // A refusal leaves pages in the cache.
        let _ = posix_fadvise(self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        Ok(())
    }
}

/// A file or block device, whatever machine wrote its image.
#[derive(Debug)]
pub struct Node {
    file: File,
    size: u64,
}

impl Node {
    /// Opens a file or block device for reading.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(path: &Path) -> Result<Node, ImageError> {
        Node::of(safe::open(path).map_err(io("opening it"))?)
    }

    /// A file or block device that is open for reading.
    ///
    /// # Errors
    /// If its end cannot be found.
    pub fn of(mut file: File) -> Result<Node, ImageError> {
        // Seeking answers for block devices too.
        let size = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).map_err(io("finding its end"))?;
        Ok(Node { file, size })
    }
}

impl Medium for Node {
    fn size(&self) -> u64 {
        self.size
    }

    fn get(&mut self, at: u64, len: u64) -> Result<Vec<u8>, ImageError> {
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, at).map_err(io(format!("reading {len} bytes at {at}")))?;
        Ok(bytes)
    }
}

/// Sends this process a signal before its change number n, for the tests in a virtual machine:
/// `NT_TEST_KILL_AT=n:SIGKILL`. Does nothing in release builds.
pub(super) fn about_to_change() {
    #[cfg(debug_assertions)]
    {
        use std::sync::atomic::{AtomicU32, Ordering};
        static CHANGES: AtomicU32 = AtomicU32::new(0);
        let change = 1 + CHANGES.fetch_add(1, Ordering::Relaxed);
        let Ok(wanted) = std::env::var("NT_TEST_KILL_AT") else { return };
        let Some((n, signal)) = wanted.split_once(':') else { return };
        if n.parse() == Ok(change)
            && let Ok(signal) = signal.parse::<nix::sys::signal::Signal>()
        {
            eprintln!("test: {signal} before change {change}");
            let _ = nix::sys::signal::raise(signal);
        }
    }
}

//! What is written to a drive: files as they are, or as they become on the way.

use std::fmt;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::super::source::Source;

/// A file to be staged.
pub trait Content: fmt::Debug {
    /// The path that messages name.
    fn path(&self) -> &Path;

    /// The name and the path under which it is recorded.
    ///
    /// # Errors
    /// If they cannot be recorded: a sentence.
    fn names(&self) -> Result<(String, PathBuf), String>;

    /// Bytes.
    fn size(&self) -> u64;

    /// The type that its larger matrices were requantised to; `None` for a file as it is.
    fn requant(&self) -> Option<String>;

    /// Its bytes from `at` on; they are asked for from the first on, in order.
    ///
    /// # Errors
    /// If they cannot be read or made.
    fn read_at(&self, to: &mut [u8], at: u64) -> io::Result<()>;

    /// Whether nobody wrote to what it comes from since it was opened.
    ///
    /// # Errors
    /// If the system does not tell.
    fn is_unchanged(&self) -> io::Result<bool>;
}

impl Content for Source {
    fn path(&self) -> &Path {
        self.path()
    }

    fn names(&self) -> Result<(String, PathBuf), String> {
        self.names()
    }

    fn size(&self) -> u64 {
        self.size()
    }

    fn requant(&self) -> Option<String> {
        None
    }

    fn read_at(&self, to: &mut [u8], at: u64) -> io::Result<()> {
        self.file().read_exact_at(to, at)
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        self.is_unchanged()
    }
}

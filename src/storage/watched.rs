//! Whether a file that weights are read from has been written to since it was opened. In a file that is overwritten in
//! place each read succeeds, and what is computed belongs to neither model.
//!
//! What tells is the length and the time of the last write, which the kernel sets before the first new byte can be read. The
//! time of the last change of the inode says nothing: a chmod, a link, a rename and an attribute set it too. So
//! whoever puts the time of the last write back (`touch -r`) is not found out; `--verify` compares bytes. Block devices
//! have no such time, and of an image that holds several models it says nothing of one: neither is looked at.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::ReadError;

/// A regular file, and what it was when it was opened.
#[derive(Clone, Debug)]
pub struct Watched {
    path: PathBuf,
    file: Arc<File>,
    len: u64,
    modified: SystemTime,
}

impl Watched {
    /// Of a file that has just been opened; `None` if it is no regular file, or the file system keeps no such time.
    pub(super) fn new(path: &Path, file: &Arc<File>) -> Option<Watched> {
        let meta = file.metadata().ok().filter(|m| m.is_file())?;
        let modified = meta.modified().ok()?;
        Some(Watched { path: path.into(), file: Arc::clone(file), len: meta.len(), modified })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes sure that it is what it was when it was opened: one call of the system.
    ///
    /// # Errors
    /// [`ReadError::Changed`].
    pub fn check(&self) -> Result<(), ReadError> {
        // Where the system does not tell, reads will fail too.
        let Ok(meta) = self.file.metadata() else { return Ok(()) };
        match meta.len() == self.len && meta.modified().is_ok_and(|m| m == self.modified) {
            true => Ok(()),
            false => Err(self.changed()),
        }
    }

    /// Makes sure that it was opened as it was when its header was read: that long, and last written to then.
    ///
    /// # Errors
    /// [`ReadError::Changed`].
    pub fn check_header(&self, len: u64, modified: Option<SystemTime>) -> Result<(), ReadError> {
        match self.len == len && modified.is_none_or(|m| m == self.modified) {
            true => Ok(()),
            false => Err(self.changed()),
        }
    }

    fn changed(&self) -> ReadError {
        ReadError::Changed { name: self.path.display().to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, PermissionsExt};
    use std::time::Duration;

    fn opened(path: &Path) -> Watched {
        Watched::new(path, &Arc::new(File::open(path).unwrap())).unwrap()
    }

    #[test]
    fn what_is_written_is_seen_and_what_is_not_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        std::fs::write(&path, [7; 8192]).unwrap();
        let writer = File::options().write(true).open(&path).unwrap();
        let long_ago = SystemTime::now() - Duration::from_secs(3600);
        writer.set_modified(long_ago).unwrap();
        let w = opened(&path);
        // Read, linked, renamed, others' right to read it taken: its bytes are the same.
        let _ = std::fs::read(&path).unwrap();
        std::fs::hard_link(&path, folder.path().join("link")).unwrap();
        std::fs::rename(&path, folder.path().join("renamed")).unwrap();
        std::fs::set_permissions(folder.path().join("renamed"), std::fs::Permissions::from_mode(0o600)).unwrap();
        // Another file under its name is not the one that is read.
        std::fs::write(&path, [9; 8192]).unwrap();
        w.check().unwrap();
        w.check_header(8192, Some(w.modified)).unwrap();
        assert!(opened(&path).check_header(8192, Some(w.modified)).is_err());
        writer.write_at(&[8], 4096).unwrap();
        let said = w.check().unwrap_err().to_string();
        assert!(said.contains("m.gguf") && said.contains("written to"), "{said}");
        writer.set_modified(long_ago).unwrap();
        w.check().unwrap();
        writer.set_len(4096).unwrap();
        assert!(w.check().is_err());
    }
}

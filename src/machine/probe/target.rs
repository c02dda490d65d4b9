//! What a storage probe reads: a file, the largest file of a directory, or a block device.

use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::ProbeError;
use crate::storage::DirectFile;

/// Smaller targets say nothing about a drive.
const LEN_MIN: u64 = 4 << 20;

/// An opened file or device, and the drive below it.
#[derive(Debug)]
pub struct Target {
    /// Where it is.
    pub path: PathBuf,
    /// Opened past the page cache if that is possible.
    pub file: DirectFile,
    /// Bytes.
    pub len: u64,
    /// The drive: kernel name, model and serial where the system tells them, else the kind of
    /// file system.
    pub identity: String,
}

impl Target {
    /// Opens `path`, for reading only.
    ///
    /// # Errors
    /// If it cannot be read, or is too small to say anything.
    pub fn open(path: &Path) -> Result<Target, ProbeError> {
        let fail = |why: String| ProbeError::Target { path: path.display().to_string(), why };
        let named =
            if !path.exists() && path.components().count() == 1 { Path::new("/dev").join(path) } else { path.into() };
        let meta = std::fs::metadata(&named).map_err(|e| fail(e.to_string()))?;
        let path = if meta.is_dir() {
            largest_file(&named).ok_or_else(|| {
                fail(format!("no file of at least {} MiB lies there; name a large file of this drive", LEN_MIN >> 20))
            })?
        } else {
            named
        };
        // Its own words name the file too.
        let file = DirectFile::open(&path).map_err(|e| {
            let (why, name) = (e.to_string(), format!("{}: ", path.display()));
            fail(why.strip_prefix(&name).unwrap_or(&why).to_owned())
        })?;
        let meta = file.file.metadata().map_err(|e| fail(e.to_string()))?;
        let is_block = meta.file_type().is_block_device();
        if !is_block && !meta.is_file() {
            return Err(fail("a file, directory or block device was expected".into()));
        }
        let len = if is_block { end_of(&file).map_err(|e| fail(e.to_string()))? } else { meta.len() };
        if len < LEN_MIN {
            return Err(fail(format!("it has {len} bytes; at least {LEN_MIN} are needed for a measurement")));
        }
        let device = if is_block { meta.rdev() } else { meta.dev() };
        Ok(Target { identity: identity(Path::new("/"), device), path, file, len })
    }
}

fn end_of(file: &DirectFile) -> std::io::Result<u64> {
    // Reads at offsets do not use the position that this moves.
    (&*file.file).seek(SeekFrom::End(0))
}

/// The largest regular file directly in `folder`, by name where two are equal.
fn largest_file(folder: &Path) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?.filter_map(|e| {
        let e = e.ok()?;
        let meta = std::fs::metadata(e.path()).ok()?;
        (meta.is_file() && meta.len() >= LEN_MIN).then(|| (meta.len(), e.path()))
    });
    files.max().map(|(_, path)| path)
}

/// The drive that carries device number `device`, named so that it is known again.
fn identity(root: &Path, device: u64) -> String {
    let (major, minor) = (libc::major(device), libc::minor(device));
    let link = root.join(format!("sys/dev/block/{major}:{minor}"));
    let Ok(mut folder) = link.canonicalize() else {
        return format!("no drive ({major}:{minor})");
    };
    if folder.join("partition").exists() {
        folder.pop();
    }
    let name = folder.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let mut parts = vec![name];
    for file in ["device/model", "device/serial", "serial"] {
        let text = std::fs::read_to_string(folder.join(file)).unwrap_or_default();
        let text = text.trim();
        if !text.is_empty() && !parts.iter().any(|p| p == text) {
            parts.push(text.to_owned());
        }
    }
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_stands_for_its_largest_file() {
        let d = tempfile::tempdir().unwrap();
        for (name, len) in [("a", 5u64 << 20), ("b", 6 << 20), ("c", 100)] {
            std::fs::File::create(d.path().join(name)).unwrap().set_len(len).unwrap();
        }
        let t = Target::open(d.path()).unwrap();
        assert_eq!((t.path, t.len), (d.path().join("b"), 6 << 20));
    }

    #[test]
    fn a_small_or_missing_file_is_refused_by_name() {
        let d = tempfile::tempdir().unwrap();
        std::fs::write(d.path().join("x"), b"x").unwrap();
        for (path, words) in [("x", "at least"), ("y", "No such file")] {
            let e = Target::open(&d.path().join(path)).unwrap_err().to_string();
            assert!(e.contains(words) && e.contains(path), "{e}");
        }
        assert!(Target::open(d.path()).is_err());
    }

    #[test]
    fn a_partition_is_known_by_its_drive() {
        let d = tempfile::tempdir().unwrap();
        let drive = d.path().join("sys/devices/pci/nvme0n1");
        std::fs::create_dir_all(drive.join("nvme0n1p2")).unwrap();
        std::fs::create_dir_all(drive.join("device")).unwrap();
        std::fs::create_dir_all(d.path().join("sys/dev/block")).unwrap();
        std::fs::write(drive.join("nvme0n1p2/partition"), "2\n").unwrap();
        std::fs::write(drive.join("device/model"), "Fast Drive  \n").unwrap();
        std::fs::write(drive.join("device/serial"), "S1\n").unwrap();
        std::os::unix::fs::symlink(drive.join("nvme0n1p2"), d.path().join("sys/dev/block/259:2")).unwrap();
        assert_eq!(identity(d.path(), libc::makedev(259, 2)), "nvme0n1 Fast Drive S1");
        assert_eq!(identity(d.path(), libc::makedev(0, 9)), "no drive (0:9)");
    }
}

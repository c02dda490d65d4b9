//! Files opened past the page cache where the file system allows it.

use std::fs::{File, Metadata};
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use super::{Alignment, StorageError, Watched, guard, safe};

/// What is assumed where the kernel tells nothing but takes O_DIRECT.
const DIRECT_DEFAULT: Alignment = Alignment { memory: 4096, offset: 4096 };
const BUFFERED: Alignment = Alignment { memory: 1, offset: 1 };
/// Alignments beyond this are not believed.
const ALIGNMENT_MAX: u32 = 4096;

/// Where a file lies: by its own name, or within a drive or an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The file or block device.
    pub path: PathBuf,
    /// First byte and bytes within it; `None` for all of it.
    pub within: Option<(u64, u64)>,
    /// The device whose node the path must be, where a drive was named; `None` for whatever lies there.
    pub node: Option<guard::node::Node>,
}

impl Part {
    /// All of a file.
    pub fn whole(path: impl Into<PathBuf>) -> Part {
        Part { path: path.into(), within: None, node: None }
    }
}

/// A file that is open for reading.
#[derive(Clone, Debug)]
pub struct DirectFile {
    /// Where it is.
    pub path: PathBuf,
    /// The open file.
    pub file: Arc<File>,
    /// What reads must be aligned to.
    pub alignment: Alignment,
    /// First byte of what is read, within `file`: not 0 where a drive holds the file among others.
    pub start: u64,
    /// Length when it was opened; it may shrink since.
    pub len: u64,
    /// Whether a read is a copy by a processor (memory file systems, the page cache), so that reads
    /// want several threads; a drive's reads are transfers that only want depth.
    pub copies: bool,
    /// What tells whether it is written to; `None` of what is no file of its own.
    pub watched: Option<Watched>,
}

impl DirectFile {
    /// Opens with O_DIRECT if the file system takes it, else through the page cache.
    pub fn open(path: &Path) -> Result<DirectFile, StorageError> {
        DirectFile::open_if(path, &|_| Ok(()))
    }

    /// As [`DirectFile::open`], of what `right` has no objection to, before and after it is opened.
    fn open_if(path: &Path, right: &dyn Fn(&Metadata) -> std::io::Result<()>) -> Result<DirectFile, StorageError> {
        let direct = safe::open_if(path, libc::O_DIRECT, right);
        if let Ok(file) = direct {
            let alignment = dio_alignment(&file).unwrap_or(Some(DIRECT_DEFAULT));
            if let Some(alignment) = alignment.filter(|a| a.memory <= ALIGNMENT_MAX && a.offset <= ALIGNMENT_MAX)
                && probe(&file, alignment)
            {
                return DirectFile::of(path, file, alignment);
            }
        }
        let file =
            safe::open_if(path, 0, right).map_err(|source| StorageError::Open { path: path.to_path_buf(), source })?;
        DirectFile::of(path, file, BUFFERED)
    }

    /// As [`DirectFile::open`], of a part. A name below /dev is what somebody made of it, and may be another drive's since
    /// the image was found: what is no node of the number that the part names is not opened.
    pub fn open_part(part: &Part) -> Result<DirectFile, StorageError> {
        let mut file = DirectFile::open_if(&part.path, &|meta| match part.node {
            Some(node) => node.must_be(&part.path.display().to_string(), guard::node::Node::of(meta)),
            None => Ok(()),
        })?;
        let Some((start, len)) = part.within else { return Ok(file) };
        let fits = start.checked_add(len).is_some_and(|end| end <= file.len);
        if !fits || !start.is_multiple_of(u64::from(file.alignment.offset)) {
            let why = format!("{len} bytes at {start} were expected within its {}", file.len);
            let source = std::io::Error::new(std::io::ErrorKind::InvalidData, why);
            return Err(StorageError::Open { path: part.path.clone(), source });
        }
        (file.start, file.len, file.watched) = (start, len, None);
        Ok(file)
    }

    fn of(path: &Path, file: File, alignment: Alignment) -> Result<DirectFile, StorageError> {
        let len = end_of(&file).map_err(|source| StorageError::Open { path: path.to_path_buf(), source })?;
        let copies = alignment == BUFFERED || in_memory(&file);
        let file = Arc::new(file);
        let watched = Watched::new(path, &file);
        Ok(DirectFile { path: path.to_path_buf(), file, alignment, start: 0, len, copies, watched })
    }

    /// Length now; 0 if it cannot be told.
    pub fn current_len(&self) -> u64 {
        end_of(&self.file).unwrap_or(0).saturating_sub(self.start)
    }

    /// Whether reads bypass the page cache.
    pub fn is_direct(&self) -> bool {
        self.alignment != BUFFERED
    }

    /// What the system refused, for the user.
    pub fn note(&self) -> Option<String> {
        let path = self.path.display();
        (!self.is_direct())
            .then(|| format!("{path}: the file system takes no O_DIRECT; reading through the page cache"))
    }

    /// Drops read bytes from the page cache, where reads go through it: each pass reads a model once, and would push
    /// everything else out. Pages go that other programs use of the same file, too; they read them again.
    pub fn forget(&self, offset: u64, len: u64) {
        if !self.is_direct() {
            let (offset, len) = ((self.start + offset) as libc::off_t, len as libc::off_t);
            // A refusal changes nothing.
            let _ = posix_fadvise(&*self.file, offset, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
    }
}

/// Where a file ends. Seeking answers for block devices too, whose metadata say 0; the position it
/// moves is used by nobody.
fn end_of(mut file: &File) -> std::io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Whether it is a file on tmpfs. A drive's node lies on one too, its bytes do not.
fn in_memory(file: &File) -> bool {
    file.metadata().is_ok_and(|m| m.is_file()) && fstatfs(file).is_ok_and(|st| st.filesystem_type() == TMPFS_MAGIC)
}

/// `STATX_DIOALIGN`: `None` where the kernel does not tell, `Some(None)` where direct I/O is refused.
fn dio_alignment(file: &File) -> Option<Option<Alignment>> {
    // SAFETY: statx is plain data, for which zeroes are valid.
    let mut st: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, the path is an empty C string, and `st` outlives the call.
    let rc = unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &mut st) };
    if rc != 0 || st.stx_mask & libc::STATX_DIOALIGN == 0 {
        return None;
    }
    let (memory, offset) = (st.stx_dio_mem_align, st.stx_dio_offset_align);
    Some((memory > 0 && offset > 0).then_some(Alignment { memory, offset }))
}

/// One small direct read, since some file systems take the flag and refuse the read.
fn probe(file: &File, alignment: Alignment) -> bool {
    let len = alignment.offset as usize;
    let mut buffer = vec![0u8; len + ALIGNMENT_MAX as usize];
    let skip = buffer.as_ptr().align_offset(ALIGNMENT_MAX as usize);
    let target = &mut buffer[skip..skip + len];
    file.read_at(target, 0).is_ok()
}

#[cfg(test)]
mod tests {
    use super::super::guard::node::{Node, Number};
    use super::*;

    /// A drive was named, and by the time its image is read, something else lies under the name of its node.
    #[test]
    fn another_node_under_the_name_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nvme1n1");
        std::fs::write(&path, vec![7; 8192]).unwrap();
        let part = Part { path: path.clone(), within: Some((4096, 4096)), node: None };
        assert_eq!(DirectFile::open_part(&part).unwrap().len, 4096);
        let node = Some(Node::Block(Number { major: 259, minor: 10 }));
        let e = DirectFile::open_part(&Part { node, ..part }).unwrap_err();
        let StorageError::Open { source, .. } = &e else { panic!("{e:?}") };
        assert!(source.to_string().contains("block device 259:10"), "{source}");
    }
}

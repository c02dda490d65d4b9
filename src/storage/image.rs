//! Models staged on a drive of their own: one GPT partition with a superblock, a table of manifests
//! and the files, each from a multiple of 1 MiB on without gaps.
//!
//! The superblock is wiped first and written last, after everything was read back and compared: a
//! drive with a superblock holds what its table says.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Cursor, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::extents::{CHUNK, Manifest, crc32c};
use super::gpt;
use super::safe;

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
    #[error("the model needs {needed} bytes on the drive, which has {size}")]
    TooLarge {
        /// Bytes with table and alignment.
        needed: u64,
        /// Bytes of the drive.
        size: u64,
    },
    /// What was written does not come back.
    #[error("{file}: the {CHUNK} bytes at {offset} of the drive were written and do not read back the same")]
    ReadBack {
        /// The file staged.
        file: String,
        /// Byte of the drive.
        offset: u64,
    },
    /// There is no whole image.
    #[error("the drive holds no staged model: {0}")]
    None(String),
}

/// A drive, or a file of its size in tests.
#[derive(Clone, Debug)]
pub struct Drive<'a> {
    /// Open for reading and writing.
    pub file: &'a File,
    /// Bytes.
    pub size: u64,
    /// Bytes a logical block.
    pub block: u64,
    /// Serial number, for the manifests.
    pub serial: String,
    /// Model, for the manifests.
    pub model: String,
    /// Namespace, for the manifests.
    pub namespace: u32,
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> ImageError {
    let what = what.into();
    move |source| ImageError::Io { what, source }
}

/// Where each file of `sizes` will begin, and the bytes needed in all.
fn plan(sizes: &[u64]) -> (Vec<u64>, u64) {
    // A checksum takes up to eleven characters, the rest of a manifest well below 16 KiB.
    let table: u64 = sizes.iter().map(|s| s.div_ceil(CHUNK as u64) * 11 + (16 << 10)).sum();
    let mut next = (gpt::START + SUPERBLOCK + table).next_multiple_of(ALIGN);
    let mut starts = Vec::new();
    for size in sizes {
        starts.push(next);
        next = (next + size).next_multiple_of(ALIGN);
    }
    (starts, next + gpt::START)
}

/// Writes `files` to the drive, whatever it held; gives their manifests. `progress` gets bytes done
/// and bytes to do, reading back included.
///
/// # Errors
/// [`ImageError::TooLarge`] before anything is written. After any other error the drive holds no
/// image.
pub fn write(
    drive: &Drive<'_>,
    files: &[PathBuf],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<Manifest>, ImageError> {
    let size = |p: &PathBuf| std::fs::metadata(p).map(|m| m.len()).map_err(io(p.display().to_string()));
    let sizes = files.iter().map(size).collect::<Result<Vec<_>, _>>()?;
    let (starts, needed) = plan(&sizes);
    if needed > drive.size {
        return Err(ImageError::TooLarge { needed, size: drive.size });
    }
    let total = 2 * sizes.iter().sum::<u64>();
    let mut done = 0;
    put(drive, gpt::START, &[0; SUPERBLOCK as usize])?;
    sync(drive)?;
    for (at, bytes) in gpt::table(drive.size, drive.block) {
        put(drive, at, &bytes)?;
    }
    let mut manifests = Vec::new();
    for ((path, &size), &start) in files.iter().zip(&sizes).zip(&starts) {
        manifests.push(copy(drive, path, size, start, &mut |n| {
            done += n;
            progress(done, total);
        })?);
    }
    let table = serde_json::to_vec(&manifests).map_err(|e| ImageError::None(e.to_string()))?;
    put(drive, gpt::START + SUPERBLOCK, &table)?;
    sync(drive)?;
    for m in &manifests {
        compare(drive, m, &mut |n| {
            done += n;
            progress(done, total);
        })?;
    }
    put(drive, gpt::START, &superblock(&table))?;
    sync(drive)?;
    let back = read(&mut drive.clone())?;
    if back == manifests { Ok(back) } else { Err(ImageError::None("the table does not read back the same".into())) }
}

/// Magic, version, CRC-32C of the table, its first byte on the drive, its bytes; CRC-32C of all that
/// in the last four bytes.
fn superblock(table: &[u8]) -> Vec<u8> {
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

/// What an image is read from: a block device or file, or a drive bound to vfio-pci.
pub trait Medium {
    /// Bytes.
    fn size(&self) -> u64;

    /// `len` bytes at `at`.
    ///
    /// # Errors
    /// If not all of them can be read.
    fn get(&mut self, at: u64, len: u64) -> Result<Vec<u8>, ImageError>;
}

impl Medium for Drive<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn get(&mut self, at: u64, len: u64) -> Result<Vec<u8>, ImageError> {
        get(self, at, len)
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
        let mut file = safe::open(path).map_err(io("opening it"))?;
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

/// The manifests of the models on a medium, which is found by its partition table and superblock.
///
/// # Errors
/// [`ImageError::None`] says what is missing or damaged.
pub fn read(drive: &mut dyn Medium) -> Result<Vec<Manifest>, ImageError> {
    let none = |what: &str| ImageError::None(what.into());
    if drive.size() < gpt::START + SUPERBLOCK {
        return Err(none("it is too small"));
    }
    let head = drive.get(0, gpt::START)?;
    let start = gpt::BLOCKS.iter().find_map(|block| gpt::find(&head, *block));
    let start = start.ok_or_else(|| none("no partition of nt's type"))?;
    if start.checked_add(SUPERBLOCK).is_none_or(|end| end > drive.size()) {
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
    if len > TABLE_MAX || at.checked_add(len).is_none_or(|e| e > drive.size()) {
        return Err(none("its table lies outside the drive"));
    }
    let table = drive.get(at, len)?;
    if u64::from(crc32c(&table)) != number(12, 4) {
        return Err(none("its table is damaged"));
    }
    let found: Vec<Manifest> =
        serde_json::from_slice(&table).map_err(|e| none(&format!("its table cannot be read: {e}")))?;
    for m in &found {
        let beyond = m.extents.iter().any(|e| e.1.checked_add(e.2).is_none_or(|end| end > drive.size()));
        let fault = m.fault().or_else(|| beyond.then(|| "an extent lies outside the drive".to_owned()));
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

fn copy(
    drive: &Drive<'_>,
    path: &Path,
    size: u64,
    start: u64,
    progress: &mut dyn FnMut(u64),
) -> Result<Manifest, ImageError> {
    let shown = path.display().to_string();
    let source = safe::open(path).map_err(io(&shown))?;
    let mut sums = Vec::new();
    let mut buffer = vec![0u8; ALIGN as usize];
    let mut at = 0;
    while at < size {
        let n = (size - at).min(ALIGN) as usize;
        source.read_exact_at(&mut buffer[..n], at).map_err(io(&shown))?;
        sums.extend(buffer[..n].chunks(CHUNK).map(crc32c));
        buffer[n..].fill(0);
        // Whole MiB, so that no other data lies between the end of a file and the next multiple.
        put(drive, start + at, &buffer)?;
        at += n as u64;
        progress(n as u64);
    }
    Ok(Manifest {
        file: path.file_name().map_or(shown, |n| n.to_string_lossy().into_owned()),
        path: std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()),
        size,
        serial: drive.serial.clone(),
        model: drive.model.clone(),
        namespace: drive.namespace,
        extents: vec![(0, start, size.next_multiple_of(ALIGN))],
        crc32c: sums,
    })
}

fn compare(drive: &Drive<'_>, m: &Manifest, progress: &mut dyn FnMut(u64)) -> Result<(), ImageError> {
    for i in 0..m.crc32c.len() {
        let at = (i * CHUNK) as u64;
        let n = (m.size - at).min(CHUNK as u64);
        let device = m.place(at).unwrap_or(drive.size);
        if !m.holds(i, &get(drive, device, n)?) {
            return Err(ImageError::ReadBack { file: m.file.clone(), offset: device });
        }
        progress(n);
    }
    Ok(())
}

fn put(drive: &Drive<'_>, at: u64, bytes: &[u8]) -> Result<(), ImageError> {
    drive.file.write_all_at(bytes, at).map_err(io(format!("writing {} bytes at {at} of the drive", bytes.len())))
}

fn get(drive: &Drive<'_>, at: u64, len: u64) -> Result<Vec<u8>, ImageError> {
    let mut bytes = vec![0; len as usize];
    drive.file.read_exact_at(&mut bytes, at).map_err(io(format!("reading {len} bytes at {at} of the drive")))?;
    Ok(bytes)
}

/// Makes it durable, and has what follows read from the drive instead of the page cache.
fn sync(drive: &Drive<'_>) -> Result<(), ImageError> {
    drive.file.sync_all().map_err(io("flushing the drive"))?;
    // SAFETY: advice on an open descriptor touches no memory; a refusal leaves pages in the cache.
    unsafe { libc::posix_fadvise(drive.file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 32 << 20;

    fn files(folder: &Path) -> Vec<PathBuf> {
        let data: Vec<u8> = (0..9_000_001u64).map(|i| (i.wrapping_mul(0x9E37_79B9) >> 13) as u8).collect();
        let paths = [folder.join("a.gguf"), folder.join("b.gguf")];
        std::fs::write(&paths[0], &data).unwrap();
        std::fs::write(&paths[1], &data[..70_000]).unwrap();
        paths.to_vec()
    }

    fn drive(file: &File, block: u64) -> Drive<'_> {
        Drive { file, size: SIZE, block, serial: "S".into(), model: "M".into(), namespace: 1 }
    }

    #[test]
    fn files_come_back_and_an_interrupted_image_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path());
        for block in [512, 4096] {
            let target = tempfile::tempfile().unwrap();
            target.set_len(SIZE).unwrap();
            let drive = drive(&target, block);
            assert!(read(&mut drive.clone()).unwrap_err().to_string().contains("no partition"));
            let mut last = (0, 0);
            let manifests = write(&drive, &files, &mut |done, total| last = (done, total)).unwrap();
            assert_eq!(last.0, last.1);
            assert_eq!(read(&mut drive.clone()).unwrap(), manifests);
            for (m, path) in manifests.iter().zip(&files) {
                assert_eq!(m.fault(), None);
                assert_eq!(m.extents[0].1 % ALIGN, 0);
                assert_eq!(get(&drive, m.extents[0].1, m.size).unwrap(), std::fs::read(path).unwrap());
            }
            // Staging again fails half way: the old table must not stand for the new bytes.
            let missing = [files[0].clone(), folder.path().into()];
            assert!(write(&drive, &missing, &mut |_, _| ()).is_err());
            assert!(read(&mut drive.clone()).unwrap_err().to_string().contains("no superblock"));
        }
    }

    #[test]
    fn another_machines_image_is_found_by_its_superblock() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path());
        let path = folder.path().join("drive.img");
        let target = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        target.set_len(SIZE).unwrap();
        assert!(read(&mut Node::open(&files[1]).unwrap()).unwrap_err().to_string().contains("too small"));
        let manifests = write(&drive(&target, 4096), &files, &mut |_, _| ()).unwrap();
        let mut node = Node::open(&path).unwrap();
        assert_eq!(read(&mut node).unwrap(), manifests);
        assert_eq!(named(&manifests, Path::new("b")), Some(&manifests[1]));
        assert_eq!(named(&manifests, Path::new("/gone/b.gguf")), Some(&manifests[1]));
        assert_eq!(named(&manifests, Path::new("c")), None);
        let medium: Rc<RefCell<dyn Medium>> = Rc::new(RefCell::new(node));
        for (m, path) in manifests.iter().zip(&files) {
            let mut bytes = Vec::new();
            Staged::new(Rc::clone(&medium), m).read_to_end(&mut bytes).unwrap();
            assert!(bytes == std::fs::read(path).unwrap());
        }
        // A table that points elsewhere is not followed, nor a damaged one.
        let table_at = gpt::START + SUPERBLOCK;
        let original = get(&drive(&target, 4096), table_at, 1).unwrap();
        target.write_all_at(b"x", table_at).unwrap();
        assert!(read(&mut *medium.borrow_mut()).unwrap_err().to_string().contains("table is damaged"));
        target.write_all_at(&original, table_at).unwrap();
        let mut wrong = manifests.clone();
        wrong[1].extents[0].1 = SIZE;
        let table = serde_json::to_vec(&wrong).unwrap();
        target.write_all_at(&table, table_at).unwrap();
        target.write_all_at(&superblock(&table), gpt::START).unwrap();
        let e = read(&mut *medium.borrow_mut()).unwrap_err().to_string();
        assert!(e.contains("b.gguf") && e.contains("outside the drive"), "{e}");
        target.write_all_at(&[0; 16], gpt::START).unwrap();
        assert!(read(&mut *medium.borrow_mut()).unwrap_err().to_string().contains("no superblock"));
    }

    #[test]
    fn too_large_a_model_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path());
        let target = tempfile::tempfile().unwrap();
        let small = Drive { size: 8 << 20, ..drive(&target, 512) };
        assert!(matches!(write(&small, &files, &mut |_, _| ()), Err(ImageError::TooLarge { size: 8_388_608, .. })));
        assert_eq!(target.metadata().unwrap().len(), 0);
    }
}

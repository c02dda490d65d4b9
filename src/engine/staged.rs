//! Models staged on a drive, found by what the drive itself says: its partition table, superblock and
//! table, whichever machine wrote them.

use std::cell::RefCell;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use super::EngineError;
use crate::gguf::{Gguf, GgufError};
use crate::memory::{Arena, Region};
use crate::storage::bind::{self, Bound, BoundNamespace, DeviceError};
use crate::storage::extents::Manifest;
use crate::storage::guard::{Host, sysfs};
use crate::storage::image::{self, ImageError, Medium, Node, Staged};
use crate::storage::library::Recorded;
use crate::storage::vfio::VfioReader;
use crate::storage::vfio::reader::Span;
use crate::storage::{Extent, FileId, ReadRequest, Reader, StorageError};

/// Bytes that a bound drive is asked for at once.
const READ_BYTES: u64 = 1 << 20;

fn fail(what: impl ToString) -> EngineError {
    EngineError::Copy(what.to_string())
}

/// The staged models of one drive.
pub(super) struct Image {
    medium: Rc<RefCell<dyn Medium>>,
    manifests: Vec<Manifest>,
}

/// The image at a place that `--tier-c` names: a drive, bound or not, a block device, or a file.
pub(super) fn open(host: &Host, target: &Path) -> Result<Image, EngineError> {
    let name = target.to_string_lossy();
    match bind::find_bound(host, &name) {
        Ok((drive, namespace)) => return Image::on_bound(&drive, &namespace),
        Err(DeviceError::NotBound(_)) => {}
        Err(e) => return Err(fail(e)),
    }
    let all = sysfs::controllers(host).map_err(fail)?;
    match sysfs::find(host, &all, &name).and_then(|c| c.namespaces.first()) {
        Some(namespace) => Image::on_node(Path::new(&format!("/dev/{}", namespace.whole.name))),
        None => Image::on_node(target),
    }
}

impl Image {
    fn new(mut medium: impl Medium + 'static) -> Result<Image, EngineError> {
        let manifests = image::read(&mut medium).map_err(fail)?;
        Ok(Image { medium: Rc::new(RefCell::new(medium)), manifests })
    }

    /// On a block device or in a file.
    pub(super) fn on_node(path: &Path) -> Result<Image, EngineError> {
        Image::new(Node::open(path).map_err(fail)?)
    }

    /// On a drive bound to vfio-pci. The manifests say that drive's name, should the image be a copy of
    /// another drive's.
    pub(super) fn on_bound(drive: &Bound, namespace: &BoundNamespace) -> Result<Image, EngineError> {
        let mut image = Image::new(Blocks::open(drive, namespace)?)?;
        for m in &mut image.manifests {
            (m.serial, m.model, m.namespace) = (drive.serial.clone(), drive.model.clone(), namespace.nsid);
        }
        Ok(image)
    }

    fn named(&self, path: &Path) -> Result<&Manifest, EngineError> {
        image::named(&self.manifests, path).ok_or_else(|| {
            let held = self.manifests.iter().map(|m| m.file.as_str()).collect::<Vec<_>>().join(", ");
            let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
            fail(format!("no {name} is staged there; the drive holds {held}"))
        })
    }

    fn stream(&self, manifest: &Manifest) -> Staged {
        Staged::new(Rc::clone(&self.medium), manifest)
    }

    /// The header of the model that `path` names.
    pub(super) fn header(&self, path: &Path) -> Result<Gguf, EngineError> {
        let first = self.named(path)?;
        Ok(Gguf::open_with(&first.path, &mut |path| {
            let found = self.named(path);
            let m = found.map_err(|e| GgufError::Malformed { path: path.to_path_buf(), what: e.to_string() })?;
            Ok((Box::new(self.stream(m)) as Box<dyn Read>, m.size))
        })?)
    }

    /// The record of a file, with its first `header` bytes.
    pub(super) fn recorded(&self, path: &Path, header: u64) -> Result<Recorded, EngineError> {
        let manifest = self.named(path)?.clone();
        let mut bytes = Vec::new();
        self.stream(&manifest).take(header).read_to_end(&mut bytes).map_err(fail)?;
        Ok(Recorded { manifest, header: bytes })
    }
}

/// A drive that the kernel holds and that holds an image.
pub struct StagedDrive {
    /// The namespace's node.
    pub node: PathBuf,
    /// The drive's serial.
    pub serial: String,
    /// Each model's first file, with its header.
    pub models: Vec<(String, Result<Gguf, EngineError>)>,
}

/// What is staged on drives that the kernel holds and this user may read.
pub fn staged_drives(host: &Host) -> Vec<StagedDrive> {
    let mut found = Vec::new();
    for controller in sysfs::controllers(host).unwrap_or_default() {
        for namespace in &controller.namespaces {
            let node = PathBuf::from(format!("/dev/{}", namespace.whole.name));
            let Ok(image) = Image::on_node(&node) else { continue };
            let files = image.manifests.iter().map(|m| m.file.clone());
            let first = files.filter(|f| !f.contains("-of-") || f.contains("-00001-of-"));
            let models = first.map(|f| (f.clone(), image.header(Path::new(&f)))).collect();
            found.push(StagedDrive { node, serial: controller.serial.clone(), models });
        }
    }
    found
}

/// The logical blocks of a bound drive. The reader is dropped before the memory it reads to.
struct Blocks {
    reader: VfioReader,
    file: FileId,
    size: u64,
    buffer: Region,
    _arena: Arena,
}

impl Blocks {
    fn open(drive: &Bound, namespace: &BoundNamespace) -> Result<Blocks, EngineError> {
        let mut arena = Arena::new(READ_BYTES).map_err(|e| EngineError::Memory(e.to_string()))?;
        let buffer = arena.take(READ_BYTES).map_err(|e| EngineError::Memory(e.to_string()))?;
        let mut reader = VfioReader::open_bound(drive, namespace).map_err(StorageError::from)?;
        let span = Span { file_offset: 0, device_offset: 0, len: namespace.size };
        let file = reader.add_file(&namespace.name, vec![span]);
        // SAFETY: the arena begins at a page, and the reader is dropped before it, here or with `self`.
        unsafe { reader.attach(arena.base(), arena.len() as usize) }?;
        Ok(Blocks { reader, file, size: namespace.size, buffer, _arena: arena })
    }

    /// Reads whole blocks to the buffer.
    fn fill(&mut self, offset: u64, len: u64) -> Result<(), String> {
        let extents = [Extent { file: self.file, offset, len, dst_offset: 0 }];
        let (dst, dst_len) = (self.buffer.addr(), self.buffer.len());
        let request = ReadRequest { tag: 0, extents: &extents, dst, urgent: false, dst_len };
        // SAFETY: the buffer is this reader's alone and outlives it; it is looked at when the read,
        // which is waited for, has ended.
        unsafe { self.reader.submit(&request) }.map_err(|e| e.to_string())?;
        let mut done = Vec::new();
        while done.is_empty() {
            self.reader.poll(&mut done, Some(Duration::from_millis(100))).map_err(|e| e.to_string())?;
        }
        done.into_iter().try_for_each(|c| c.result.map(|_| ()).map_err(|e| e.to_string()))
    }
}

impl Medium for Blocks {
    fn size(&self) -> u64 {
        self.size
    }

    fn get(&mut self, at: u64, len: u64) -> Result<Vec<u8>, ImageError> {
        let end = at.checked_add(len).filter(|end| *end <= self.size);
        let end = end.ok_or_else(|| ImageError::None(format!("{len} bytes at {at} lie outside the drive")))?;
        let block = u64::from(self.reader.alignment(self.file).offset);
        let mut bytes = Vec::with_capacity(len as usize);
        let mut next = at;
        while next < end {
            let from = next / block * block;
            let to = (from + READ_BYTES).min(end.next_multiple_of(block));
            self.fill(from, to - from).map_err(|why| ImageError::Io {
                what: format!("reading {len} bytes at {at}"),
                source: std::io::Error::other(why),
            })?;
            // SAFETY: the read has ended, and its length fits the buffer.
            let read = unsafe { std::slice::from_raw_parts(self.buffer.addr(), (to - from) as usize) };
            let upto = to.min(end);
            bytes.extend_from_slice(&read[(next - from) as usize..(upto - from) as usize]);
            next = upto;
        }
        Ok(bytes)
    }
}

//! Models staged on a drive, found by what the drive itself says: its partition table, superblock and
//! table, whichever machine wrote them.

use std::cell::RefCell;
use std::fs::OpenOptions;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use super::error::{CopyError, EngineError};
use crate::gguf::{Gguf, GgufError};
use crate::memory::{Arena, Region};
use crate::storage::bind::{self, Bound, BoundNamespace, DeviceError};
use crate::storage::guard::{Host, Namespace, sysfs};
use crate::storage::image::{self, ImageError, Medium, Node, Staged};
use crate::storage::library::Recorded;
use crate::storage::manifest::{Manifest, Span};
use crate::storage::vfio::VfioReader;
use crate::storage::{Extent, FileId, ReadError, ReadRequest, Reader, StorageError};

/// Bytes that a bound drive is asked for at once.
const READ_BYTES: u64 = 1 << 20;

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
        Err(e) => return Err(e.into()),
    }
    let all = sysfs::controllers(host).map_err(CopyError::from)?;
    let Some(drive) = sysfs::find(host, &all, &name) else { return Image::on_node(target) };
    match sysfs::namespaces(host, drive, &name).first() {
        Some(namespace) => Image::on_namespace(host, namespace),
        None => Image::on_node(target),
    }
}

impl Image {
    fn new(mut medium: impl Medium + 'static) -> Result<Image, EngineError> {
        let manifests = image::read(&mut medium)?;
        Ok(Image { medium: Rc::new(RefCell::new(medium)), manifests })
    }

    /// On a namespace that the kernel holds: its node is opened by the number that sysfs tells, since a name below `/dev` may
    /// be another drive's node or a file.
    pub(super) fn on_namespace(host: &Host, namespace: &Namespace) -> Result<Image, EngineError> {
        let whole = &namespace.whole;
        let file =
            host.open_block(&whole.name, &whole.number, OpenOptions::new().read(true)).map_err(CopyError::Node)?;
        Image::new(Node::of(file)?)
    }

    /// On a block device or in a file that the user named by its path.
    pub(super) fn on_node(path: &Path) -> Result<Image, EngineError> {
        Image::new(Node::open(path)?)
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
            let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
            CopyError::NotStaged { name, held }.into()
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
        self.stream(&manifest).take(header).read_to_end(&mut bytes).map_err(CopyError::Node)?;
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
            let Ok(image) = Image::on_namespace(host, namespace) else { continue };
            let files = image.manifests.iter().map(|m| m.file.clone());
            let first = files.filter(|f| !f.contains("-of-") || f.contains("-00001-of-"));
            let models = first.map(|f| (f.clone(), image.header(Path::new(&f)))).collect();
            found.push(StagedDrive { node, serial: controller.serial.clone(), models });
        }
    }
    found
}

/// The logical blocks of a bound drive.
struct Blocks {
    reader: VfioReader,
    file: FileId,
    size: u64,
    buffer: Region,
}

impl Blocks {
    fn open(drive: &Bound, namespace: &BoundNamespace) -> Result<Blocks, EngineError> {
        let mut arena = Arena::new(READ_BYTES)?;
        let buffer = arena.take(READ_BYTES)?;
        let mut reader = VfioReader::open_bound(drive, namespace).map_err(StorageError::from)?;
        let span = Span { file_offset: 0, device_offset: 0, len: namespace.size };
        let file = reader.add_file(&namespace.name, vec![span]);
        reader.attach(&arena.whole())?;
        Ok(Blocks { reader, file, size: namespace.size, buffer })
    }

    /// Reads whole blocks to the buffer.
    fn fill(&mut self, offset: u64, len: u64) -> Result<(), ReadError> {
        let extents = [Extent { file: self.file, offset, len, dst_offset: 0 }];
        let (dst, dst_len) = (self.buffer.addr(), self.buffer.len());
        let request = ReadRequest { tag: 0, extents: &extents, dst, urgent: false, dst_len };
        // SAFETY: the buffer is this reader's alone and outlives it; it is looked at when the read,
        // which is waited for, has ended.
        unsafe { self.reader.submit(&request) }?;
        let mut done = Vec::new();
        while done.is_empty() {
            self.reader.poll(&mut done, Some(Duration::from_millis(100)))?;
        }
        done.into_iter().try_for_each(|c| c.result.map(|_| ()))
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
            self.fill(from, to - from).map_err(|e| ImageError::Io {
                what: format!("reading {len} bytes at {at}"),
                source: std::io::Error::other(e),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::image::{Drive, Identity, Source, Staging, Steps};

    const SIZE: u64 = 8 << 20;

    /// A machine of files with two drives that hold an image each, of `a.gguf` and of `b.gguf`.
    fn machine(folder: &Path) -> Host {
        for (n, name) in ["a.gguf", "b.gguf"].iter().enumerate() {
            let class = folder.join(format!("sys/class/block/nvme{n}n1"));
            std::fs::create_dir_all(&class).unwrap();
            std::fs::write(class.join("dev"), format!("259:{n}\n")).unwrap();
            std::fs::create_dir_all(folder.join("dev")).unwrap();
            let path = folder.join(name);
            std::fs::write(&path, [n as u8; 5000]).unwrap();
            let sources = [Source::open(&path).unwrap()];
            let node =
                OpenOptions::new().read(true).write(true).create_new(true).open(folder.join(format!("dev/nvme{n}n1")));
            let node = node.unwrap();
            node.set_len(SIZE).unwrap();
            let mut drive = Drive { file: &node, size: SIZE, block: 512 };
            let identity = Identity { serial: "S".into(), model: "M".into(), namespace: 1 };
            let staging = Staging::plan(&mut drive, &sources, &identity, &[]).unwrap();
            staging.write(&mut drive, &mut Steps::new(&mut |_, _| (), &|| false)).unwrap();
        }
        Host::at(folder)
    }

    fn namespace(n: u32) -> Namespace {
        let name = format!("nvme{n}n1");
        let whole = sysfs::BlockDevice { name, number: format!("259:{n}"), start: 0, size: SIZE };
        Namespace { whole, nsid: 1, block_size: 512, partitions: Vec::new(), ids: Vec::new() }
    }

    /// The name of a drive's node was given to another drive, or to a file: nt read that one as the model, in silence.
    #[test]
    fn a_swapped_node_is_not_read_as_the_drive() {
        let folder = tempfile::tempdir().unwrap();
        let host = machine(folder.path());
        for (n, file) in [(0, "a.gguf"), (1, "b.gguf")] {
            assert_eq!(Image::on_namespace(&host, &namespace(n)).unwrap().manifests[0].file, file);
        }
        let node = folder.path().join("dev/nvme0n1");
        std::fs::rename(&node, folder.path().join("kept")).unwrap();
        for target in ["nvme1n1", "../a.gguf", "../kept"] {
            std::os::unix::fs::symlink(target, &node).unwrap();
            let e = Image::on_namespace(&host, &namespace(0)).err().unwrap().to_string();
            assert!(e.contains("block device 259:0"), "{target}: {e}");
            std::fs::remove_file(&node).unwrap();
        }
        assert!(Image::on_namespace(&host, &namespace(0)).is_err());
    }

    /// Whoever names the second namespace of a drive does not mean the first.
    #[test]
    fn the_namespace_that_is_named_is_meant() {
        let mut second = namespace(0);
        second.whole.name = "nvme0n2".into();
        let drive = sysfs::Controller {
            bdf: "0000:01:00.0".into(),
            driver: None,
            name: Some("nvme0".into()),
            serial: "S".into(),
            model: "M".into(),
            firmware: String::new(),
            namespaces: vec![namespace(0), second],
            hidden: Vec::new(),
        };
        let folder = tempfile::tempdir().unwrap();
        let host = Host::at(folder.path());
        for (name, meant) in [
            ("nvme0n2", &["nvme0n2"][..]),
            ("/dev/nvme0n2", &["nvme0n2"]),
            ("nvme0n1", &["nvme0n1"]),
            ("nvme0", &["nvme0n1", "nvme0n2"]),
            ("01:00.0", &["nvme0n1", "nvme0n2"]),
        ] {
            let found: Vec<_> = sysfs::namespaces(&host, &drive, name).iter().map(|n| n.whole.name.as_str()).collect();
            assert_eq!(found, meant, "{name}");
        }
    }
}

//! One copy of a model and the reader of it: of a drive bound to vfio-pci by the places recorded for the model's files, of
//! files through the kernel.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::error::{CopyError, Differs, EngineError};
use super::places::Located;
use super::staged::Image;
use crate::gguf::Gguf;
use crate::storage::bind::{self, Bound, BoundNamespace, DeviceError};
use crate::storage::guard::Host;
use crate::storage::library::{Library, Recorded};
use crate::storage::vfio::VfioReader;
use crate::storage::{Part, Reader, ReaderKind, Record, open_copies, safe};

/// Between the name of a file and the copies that it is read from together.
pub(super) const STRIPED: &str = ", striped over ";

/// What is asked of the place that a model is read from.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Drives, or copies of the model; none for where it lies.
    pub copies: &'a [PathBuf],
    /// How it is read.
    pub reader: ReaderKind,
    /// Whether records are needed.
    pub verify: bool,
}

/// A reader over all shards of a model.
pub(super) struct Copy {
    /// Not compared with anything.
    pub reader: Box<dyn Reader>,
    /// What is recorded of each shard; empty if it is read through the kernel and was not asked for.
    pub records: Vec<Record>,
}

/// Where a model is read from.
pub(super) struct Source {
    /// One reader, or several over which reads are dealt, each with the whole model.
    pub copies: Vec<Copy>,
    /// For the user.
    pub notes: Vec<String>,
}

pub(super) type Opened = Result<Source, EngineError>;

/// The one record of a file.
pub(super) fn recorded(library: &Library, path: &Path, serial: Option<&str>) -> Result<Recorded, EngineError> {
    let found = library.find(path, serial).map_err(CopyError::from)?;
    let none = || CopyError::Unrecorded { path: path.into(), serial: serial.map(str::to_owned) };
    found.into_iter().next().ok_or_else(|| none().into())
}

/// The bound drive of that name, if it is one.
pub(super) fn bound(host: &Host, name: &str) -> Result<Option<(Bound, BoundNamespace)>, EngineError> {
    match bind::find_bound(host, name) {
        Ok(found) => Ok(Some(found)),
        Err(DeviceError::NotBound(_)) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Reads through the kernel from one place, or striped over several, with the records where they are
/// needed.
pub(super) fn kernel(places: &[&Located], gguf: &Gguf, options: &Place<'_>) -> Opened {
    let copies: Vec<Vec<Part>> = places.iter().map(|l| l.parts.clone()).collect();
    let (reader, notes) = open_copies(&copies, options.reader)?;
    let mut records = Vec::new();
    if options.verify {
        for i in 0..gguf.shards.len() {
            records.push(record(gguf, i, recorded_of(places, i)?));
        }
    }
    Ok(Source { copies: vec![Copy { reader, records }], notes })
}

/// The record of a shard: of any of its copies, since all hold the same bytes.
fn recorded_of(places: &[&Located], shard: usize) -> Result<Recorded, EngineError> {
    let library = Library::default();
    let mut first = None;
    for place in places {
        let staged = place.manifests.get(shard).map(|m| Recorded { manifest: m.clone(), header: Vec::new() });
        match staged.map_or_else(|| recorded(&library, &place.parts[shard].path, None), Ok) {
            Ok(mut found) => {
                if places.len() > 1 {
                    // Which copy held a wrong byte is not told by the record of another one.
                    let all = places.iter().map(|l| l.shown()).collect::<Vec<_>>().join(" and ");
                    found.manifest.file = format!("{}{STRIPED}{all}", found.manifest.file);
                }
                return Ok(found);
            }
            Err(e) => first = first.or(Some(e)),
        }
    }
    Err(first.unwrap_or_else(|| CopyError::NoPlace.into()))
}

/// Reads from a bound drive by what is recorded for it.
pub(super) fn vfio(gguf: &Gguf, options: &Place<'_>, drive: &Bound, namespace: &BoundNamespace, why: &str) -> Opened {
    if let ReaderKind::IoUring | ReaderKind::Pread = options.reader {
        return Err(CopyError::Bound { why: why.to_owned(), pci: drive.pci.clone() }.into());
    }
    let library = Library::default();
    let mut records = Vec::new();
    let mut image = None;
    for (i, shard) in gguf.shards.iter().enumerate() {
        let r = match recorded(&library, &shard.path, Some(&drive.serial)) {
            Ok(r) => r,
            Err(e) => on_image(&mut image, drive, namespace, gguf, i)
                .map_err(|why| CopyError::Neither { recorded: Box::new(e), source: Box::new(why) })?,
        };
        same_file(&library, gguf, i, &r)?;
        let m = &r.manifest;
        if (&m.model, m.namespace) != (&drive.model, namespace.nsid) {
            let recorded = format!("{} of {} {}", m.namespace, m.model, m.serial);
            let named = format!("{} of {} {}", namespace.nsid, drive.model, drive.serial);
            return Err(CopyError::OtherDrive { file: m.file.clone(), recorded, named }.into());
        }
        records.push(record(gguf, i, r));
    }
    // A drive is open once at a time.
    drop(image);
    let mut reader = VfioReader::open_bound(drive, namespace).map_err(crate::storage::StorageError::from)?;
    for r in &records {
        reader.add_file(&format!("{} on drive {}", r.manifest.file, drive.serial), r.manifest.spans());
    }
    let note = format!("tier C is read through vfio from {} {} at {}: {why}", drive.model, drive.serial, drive.pci);
    Ok(Source { copies: vec![Copy { reader: Box::new(reader), records }], notes: vec![note] })
}

/// A shard as staged on a bound drive, whose image is read once.
fn on_image(
    image: &mut Option<Image>,
    drive: &Bound,
    namespace: &BoundNamespace,
    gguf: &Gguf,
    shard: usize,
) -> Result<Recorded, EngineError> {
    let image = match image {
        Some(image) => image,
        None => image.insert(Image::on_bound(drive, namespace)?),
    };
    image.recorded(&gguf.shards[shard].path, gguf.data_start(shard))
}

fn record(gguf: &Gguf, shard: usize, recorded: Recorded) -> Record {
    let tensors = gguf.tensors.iter().filter(|t| t.shard == shard);
    Record { manifest: recorded.manifest, tensors: tensors.map(|t| (t.offset, t.bytes, t.name.clone())).collect() }
}

/// Makes sure that a record is of the same file as the model's: of its length, and with its header.
fn same_file(library: &Library, gguf: &Gguf, shard: usize, r: &Recorded) -> Result<(), EngineError> {
    let own = &gguf.shards[shard];
    let other = |what| {
        let (file, serial) = (r.manifest.file.clone(), r.manifest.serial.clone());
        EngineError::from(CopyError::OtherRecord { file, serial, what, own: own.path.clone() })
    };
    if r.manifest.size != own.len {
        return Err(other(Differs::Length));
    }
    if r.header.len() as u64 != gguf.data_start(shard) {
        return Err(other(Differs::Header));
    }
    let header = match safe::open(&own.path) {
        Ok(mut file) => {
            let mut header = vec![0; r.header.len()];
            let failed = |source| CopyError::Io { path: own.path.clone(), source };
            file.read_exact(&mut header).map_err(failed)?;
            header
        }
        // Without any record, the header is the staged one itself.
        Err(_) => library
            .find(&own.path, None)
            .map_err(CopyError::from)?
            .into_iter()
            .next()
            .map_or(r.header.clone(), |o| o.header),
    };
    if header == r.header { Ok(()) } else { Err(other(Differs::Header)) }
}

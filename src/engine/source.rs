//! Where weights are read from and through what: a drive bound to vfio-pci by the places recorded
//! for the model's files, or files through the kernel. Several places at once are `stripes`.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::places::{Located, locate};
use super::staged::{self, Image};
use super::stripes::striped;
use super::{EngineError, Options};
use crate::gguf::{Gguf, GgufError};
use crate::storage::bind::{self, Bound, BoundNamespace, DeviceError};
use crate::storage::guard::Host;
use crate::storage::library::{Library, Recorded};
use crate::storage::safe;
use crate::storage::vfio::VfioReader;
use crate::storage::{Checked, Part, Reader, ReaderKind, Record, Striped, open_copies};

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

pub(super) fn fail(what: impl Into<String>) -> EngineError {
    EngineError::Copy(what.into())
}

/// Opens the header of `path`; or, if there is no such file now, the one recorded for it, or the one
/// on a drive of `copies` where a model of that name was staged, by whatever machine.
pub fn open_header(path: &Path, copies: &[PathBuf]) -> Result<Gguf, EngineError> {
    let library = Library::default();
    if path.exists() {
        return Ok(Gguf::open(path)?);
    }
    if library.find(path, None).map_err(fail)?.is_empty() {
        let mut why = Vec::new();
        for target in copies {
            match staged::open(&Host::default(), target).and_then(|image| image.header(path)) {
                Ok(gguf) => return Ok(gguf),
                Err(e) => why.push(format!("{}: {e}", target.display())),
            }
        }
        return match why.first() {
            None => Ok(Gguf::open(path)?),
            Some(why) => Err(fail(format!("{} is neither a file nor recorded, and on {why}", path.display()))),
        };
    }
    let first = recorded(&library, path, None)?;
    Ok(Gguf::open_with(&first.manifest.path, &mut |path| {
        let found = recorded(&library, path, Some(&first.manifest.serial));
        let r = found.map_err(|e| GgufError::Malformed { path: path.to_path_buf(), what: e.to_string() })?;
        Ok((Box::new(std::io::Cursor::new(r.header)) as Box<dyn Read>, r.manifest.size))
    })?)
}

/// The one record of a file.
fn recorded(library: &Library, path: &Path, serial: Option<&str>) -> Result<Recorded, EngineError> {
    let found = library.find(path, serial).map_err(fail)?;
    let on = serial.map_or(String::new(), |s| format!(" on drive {s}"));
    found.into_iter().next().ok_or_else(|| {
        fail(format!(
            "{}: its place{on} is not recorded; run `nt device extents {0}` while its file system is mounted",
            path.display()
        ))
    })
}

/// Opens the reader that `options` ask for, and what compares its bytes with what is recorded. One of
/// the notes says which it is and why, if a device was named.
pub(super) fn open(gguf: &Gguf, options: &Options) -> Result<(Box<dyn Reader>, Vec<String>), EngineError> {
    let place = Place { copies: &options.copies, reader: options.reader, verify: options.verify };
    let Source { copies, notes } = open_raw(gguf, &place)?;
    let checked = |copy: Copy| match copy.records.is_empty() {
        true => copy.reader,
        false => Box::new(Checked::new(copy.reader, copy.records, options.verify)),
    };
    let mut readers: Vec<_> = copies.into_iter().map(checked).collect();
    if readers.len() == 1 {
        return Ok((readers.remove(0), notes));
    }
    let lens = gguf.shards.iter().map(|s| s.len).collect();
    Ok((Box::new(Striped::new(readers, lens)), notes))
}

/// As [`open`], with the readers and their records side by side.
pub(super) fn open_raw(gguf: &Gguf, options: &Place<'_>) -> Opened {
    let host = Host::default();
    match options.copies {
        [] => automatic(&host, gguf, options),
        [target] => one(&host, gguf, options, target),
        targets => striped(&host, gguf, options, targets),
    }
}

/// Reads from the one place that was named.
fn one(host: &Host, gguf: &Gguf, options: &Place<'_>, target: &Path) -> Opened {
    let name = target.to_string_lossy();
    if let Some((drive, namespace)) = bound(host, &name)? {
        return vfio(gguf, options, &drive, &namespace, &format!("{name} is bound to vfio-pci"));
    }
    let found = locate(host, gguf, target)?;
    if let (true, ReaderKind::Vfio) = (found.on_drive, options.reader) {
        return Err(fail(format!("--reader vfio: {}", not_bound(&name))));
    }
    let mut source = kernel(&[&found], gguf, options)?;
    if found.on_drive {
        let (reader, from) = (source.copies[0].reader.name(), found.shown());
        source.notes.push(format!("tier C is read through {reader} from {from}: {}", not_bound(&name)));
    }
    Ok(source)
}

/// The bound drive of that name, if it is one.
pub(super) fn bound(host: &Host, name: &str) -> Result<Option<(Bound, BoundNamespace)>, EngineError> {
    match bind::find_bound(host, name) {
        Ok(found) => Ok(Some(found)),
        Err(DeviceError::NotBound(_)) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

pub(super) fn not_bound(name: &str) -> String {
    format!("{name} is not bound to vfio-pci; bind it with `sudo nt device bind {name}`")
}

/// Reads from wherever the model lies.
fn automatic(host: &Host, gguf: &Gguf, options: &Place<'_>) -> Opened {
    let own: Vec<PathBuf> = gguf.shards.iter().map(|s| s.path.clone()).collect();
    let Some(gone) = own.iter().find(|p| !p.exists()) else {
        let parts = own.into_iter().map(Part::whole).collect();
        return kernel(&[&Located { parts, manifests: Vec::new(), on_drive: false }], gguf, options);
    };
    let found = Library::default().find(gone, None).map_err(fail)?;
    for drive in bind::bound(host) {
        for namespace in &drive.namespace {
            let here = |r: &Recorded| r.manifest.serial == drive.serial && r.manifest.namespace == namespace.nsid;
            if found.iter().any(here) {
                let why = format!("{} is not mounted and its drive is bound to vfio-pci", gone.display());
                return vfio(gguf, options, &drive, namespace, &why);
            }
        }
    }
    let drives = found.iter().map(|r| format!("{} {}", r.manifest.model, r.manifest.serial)).collect::<Vec<_>>();
    Err(fail(format!(
        "{} is not there; it is recorded on {}, which is not bound: mount its file system, or bind the drive with `sudo nt device bind`",
        gone.display(),
        drives.join(" and ")
    )))
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
    Err(first.unwrap_or_else(|| fail("no place was named")))
}

/// Reads from a bound drive by what is recorded for it.
pub(super) fn vfio(gguf: &Gguf, options: &Place<'_>, drive: &Bound, namespace: &BoundNamespace, why: &str) -> Opened {
    if let ReaderKind::IoUring | ReaderKind::Pread = options.reader {
        return Err(fail(format!(
            "{why}, which the kernel cannot read; leave --reader away, or give the drive back with `sudo nt device release {}`",
            drive.pci
        )));
    }
    let library = Library::default();
    let mut records = Vec::new();
    let mut image = None;
    for (i, shard) in gguf.shards.iter().enumerate() {
        let r = match recorded(&library, &shard.path, Some(&drive.serial)) {
            Ok(r) => r,
            Err(e) => on_image(&mut image, drive, namespace, gguf, i).map_err(|why| fail(format!("{e}; {why}")))?,
        };
        same_file(&library, gguf, i, &r)?;
        let m = &r.manifest;
        if (&m.model, m.namespace) != (&drive.model, namespace.nsid) {
            return Err(fail(format!(
                "{} is recorded on namespace {} of {} {}, but namespace {} of {} {} was named",
                m.file, m.namespace, m.model, m.serial, namespace.nsid, drive.model, drive.serial
            )));
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
    let other = |what: &str| {
        fail(format!(
            "{} as recorded on drive {} has another {what} than {}; run `nt device extents` on it again",
            r.manifest.file,
            r.manifest.serial,
            own.path.display()
        ))
    };
    if r.manifest.size != own.len {
        return Err(other("length"));
    }
    if r.header.len() as u64 != gguf.data_start(shard) {
        return Err(other("header"));
    }
    let header = match safe::open(&own.path) {
        Ok(mut file) => {
            let mut header = vec![0; r.header.len()];
            file.read_exact(&mut header).map_err(|e| fail(format!("{}: {e}", own.path.display())))?;
            header
        }
        // Without any record, the header is the staged one itself.
        Err(_) => {
            library.find(&own.path, None).map_err(fail)?.into_iter().next().map_or(r.header.clone(), |o| o.header)
        }
    };
    if header == r.header { Ok(()) } else { Err(other("header")) }
}

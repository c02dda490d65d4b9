//! Where weights are read from: the place that was named, or where the model lies. What opens one is `copies`; several
//! at once are `stripes`.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::Options;
use super::copies::{Copy, Opened, Place, Source, bound, kernel, recorded, vfio};
use super::error::{CopyError, EngineError, not_bound};
use super::places::{Located, locate};
use super::staged;
use super::stripes::striped;
use crate::gguf::{Gguf, GgufError};
use crate::storage::bind;
use crate::storage::guard::Host;
use crate::storage::library::{Library, Recorded};
use crate::storage::{Checked, Part, Reader, ReaderKind, StorageError, Striped};

/// Opens the header of `path`; or, if there is no such file now, the one recorded for it, or the one
/// on a drive of `copies` where a model of that name was staged, by whatever machine.
pub fn open_header(path: &Path, copies: &[PathBuf]) -> Result<Gguf, EngineError> {
    let library = Library::default();
    if path.exists() {
        return Ok(Gguf::open(path)?);
    }
    if library.find(path, None).map_err(CopyError::from)?.is_empty() {
        let mut first = None;
        for target in copies {
            match staged::open(&Host::default(), target).and_then(|image| image.header(path)) {
                Ok(gguf) => return Ok(gguf),
                Err(e) => first = first.or(Some((target.clone(), Box::new(e)))),
            }
        }
        return match first {
            None => Ok(Gguf::open(path)?),
            Some((place, source)) => Err(CopyError::Nowhere { path: path.into(), place, source }.into()),
        };
    }
    let first = recorded(&library, path, None)?;
    Ok(Gguf::open_with(&first.manifest.path, &mut |path| {
        let found = recorded(&library, path, Some(&first.manifest.serial));
        let r = found.map_err(|e| GgufError::Malformed { path: path.to_path_buf(), what: e.to_string() })?;
        Ok((Box::new(std::io::Cursor::new(r.header)) as Box<dyn Read>, r.manifest.size))
    })?)
}

/// Opens the reader that `options` ask for, and what compares its bytes with what is recorded. One of
/// the notes says which it is and why, if a device was named.
pub(super) fn open(gguf: &Gguf, options: &Options) -> Result<(Box<dyn Reader>, Vec<String>), EngineError> {
    let place = Place { copies: &options.copies, reader: options.reader, verify: options.verify };
    let Source { copies, notes } = open_raw(gguf, &place)?;
    copies.iter().try_for_each(|copy| same_as_header(gguf, copy.reader.as_ref()))?;
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

/// Makes sure that the files whose headers were read are still the same.
fn same_as_header(gguf: &Gguf, reader: &dyn Reader) -> Result<(), EngineError> {
    let mut opened = Vec::new();
    reader.watched(&mut opened);
    for file in opened {
        if let Some(own) = gguf.shards.iter().find(|s| s.path == file.path()) {
            file.check_header(own.len, own.modified).map_err(StorageError::from)?;
        }
    }
    Ok(())
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
        return Err(CopyError::NotBound(name.into_owned()).into());
    }
    let mut source = kernel(&[&found], gguf, options)?;
    if found.on_drive {
        let (reader, from) = (source.copies[0].reader.name(), found.shown());
        source.notes.push(format!("tier C is read through {reader} from {from}: {}", not_bound(&name)));
    }
    Ok(source)
}

/// Reads from wherever the model lies.
fn automatic(host: &Host, gguf: &Gguf, options: &Place<'_>) -> Opened {
    let own: Vec<PathBuf> = gguf.shards.iter().map(|s| s.path.clone()).collect();
    let Some(gone) = own.iter().find(|p| !p.exists()) else {
        let parts = own.into_iter().map(Part::whole).collect();
        return kernel(&[&Located { parts, manifests: Vec::new(), on_drive: false }], gguf, options);
    };
    let found = Library::default().find(gone, None).map_err(CopyError::from)?;
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
    Err(CopyError::Unmounted { path: gone.clone(), drives: drives.join(" and ") }.into())
}

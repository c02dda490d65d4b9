//! A model read from several places at once, each of which holds all of it: through one reader where
//! the kernel reads all of them, else through a reader for each.

use std::path::{Path, PathBuf};

use super::copies::{Copy, Opened, Place, Source, bound, kernel, vfio};
use super::error::{CopyError, EngineError};
use super::places::{Located, locate};
use crate::gguf::Gguf;
use crate::storage::ReaderKind;
use crate::storage::bind::{Bound, BoundNamespace};
use crate::storage::guard::Host;

/// One of the places.
enum Target {
    Bound(Bound, BoundNamespace),
    Kernel(Located),
}

impl Target {
    fn find(host: &Host, gguf: &Gguf, target: &Path) -> Result<Target, EngineError> {
        match bound(host, &target.to_string_lossy())? {
            Some((drive, namespace)) => Ok(Target::Bound(drive, namespace)),
            None => Ok(Target::Kernel(locate(host, gguf, target)?)),
        }
    }

    /// What both are, if they are the same.
    fn same(&self, other: &Target) -> Option<&'static str> {
        match (self, other) {
            (Target::Bound(a, n), Target::Bound(b, m)) => {
                (a.pci == b.pci && n.nsid == m.nsid).then_some("the same drive")
            }
            (Target::Kernel(a), Target::Kernel(b)) => a.same(b).then_some("the same file"),
            _ => None,
        }
    }

    /// For the user.
    fn shown(&self) -> String {
        match self {
            Target::Bound(drive, _) => format!("{} {} at {}", drive.model, drive.serial, drive.pci),
            Target::Kernel(located) => located.shown(),
        }
    }

    fn open(&self, gguf: &Gguf, options: &Place<'_>) -> Opened {
        match self {
            Target::Bound(drive, namespace) => {
                vfio(gguf, options, drive, namespace, &format!("{} is bound to vfio-pci", namespace.name))
            }
            Target::Kernel(located) => kernel(&[located], gguf, options),
        }
    }
}

/// Deals reads over several places, each of which holds the whole model.
pub(super) fn striped(host: &Host, gguf: &Gguf, options: &Place<'_>, targets: &[PathBuf]) -> Opened {
    let all = targets.iter().map(|t| t.to_string_lossy()).collect::<Vec<_>>().join(",");
    let wrong = |e| EngineError::from(CopyError::At { places: all.clone(), source: Box::new(e) });
    let mut found: Vec<Target> = Vec::new();
    for target in targets {
        let next = Target::find(host, gguf, target).map_err(wrong)?;
        if let Some((first, same)) = found.iter().find_map(|f| Some((f, f.same(&next)?))) {
            return Err(CopyError::Same { places: all, a: first.shown(), b: next.shown(), same }.into());
        }
        found.push(next);
    }
    let files: Vec<&Located> =
        found.iter().filter_map(|t| if let Target::Kernel(l) = t { Some(l) } else { None }).collect();
    if let (ReaderKind::Vfio, Some(file)) = (options.reader, files.first()) {
        return Err(CopyError::ThroughKernel { file: file.shown(), places: all }.into());
    }
    if files.len() == found.len() {
        let mut source = kernel(&files, gguf, options)?;
        let places = found.iter().map(Target::shown).collect::<Vec<_>>().join(" and ");
        let reader = source.copies[0].reader.name();
        source.notes.push(format!("tier C is striped over {places}, read through {reader}"));
        return Ok(source);
    }
    let (mut copies, mut notes, mut places) = (Vec::<Copy>::new(), Vec::new(), Vec::new());
    for target in &found {
        let source = target.open(gguf, options).map_err(wrong)?;
        for copy in source.copies {
            places.push(format!("{} (through {})", target.shown(), copy.reader.name()));
            if let Some(i) = copies.iter().position(|c| differs(c, &copy)) {
                return Err(CopyError::OtherBytes { places: all, a: target.shown(), b: found[i].shown() }.into());
            }
            copies.push(copy);
        }
        if let Target::Kernel(_) = target {
            notes.extend(source.notes);
        }
    }
    notes.push(format!("tier C is striped over {}", places.join(" and ")));
    Ok(Source { copies, notes })
}

/// Whether the records of two copies say that they hold other bytes. A copy without records says nothing.
fn differs(a: &Copy, b: &Copy) -> bool {
    a.records.iter().zip(&b.records).any(|(a, b)| a.manifest.crc32c != b.manifest.crc32c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_that_do_not_go_together_are_named() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        for n in ["1", "2"] {
            put(
                &format!("run/nt/0000:0{n}:00.0.toml"),
                &format!(
                    "pci = '0000:0{n}:00.0'\nstate = 'bound'\ncontroller = 'nvme{n}'\nserial = 'S{n}'\nmodel = 'M'\ngroup = '1{n}'\n\
                     [[namespace]]\nname = 'nvme{n}n1'\nnsid = 1\nsize = 4096\n"
                ),
            );
            put(&format!("sys/bus/pci/devices/0000:0{n}:00.0/class"), "0x010802");
            let driver = root.path().join(format!("sys/bus/pci/devices/0000:0{n}:00.0/driver"));
            std::os::unix::fs::symlink("../../drivers/vfio-pci", driver).unwrap();
        }
        let folder = root.path().to_str().unwrap();
        for (targets, reader, words) in [
            (["nvme1n1", "0000:01:00.0"], ReaderKind::Auto, ["M S1 at 0000:01:00.0", "are the same drive"]),
            (["nvme1n1", folder], ReaderKind::Vfio, ["read through the kernel", "must be a drive bound to vfio-pci"]),
            (["nvme1n1", "nvme2n1"], ReaderKind::IoUring, ["nvme1n1 is bound to vfio-pci", "kernel cannot read"]),
        ] {
            let targets = targets.map(PathBuf::from);
            let place = Place { copies: &targets, reader, verify: false };
            let refused = striped(&Host::at(root.path()), &Gguf::default(), &place, &targets);
            let text = refused.err().unwrap().to_string();
            assert!(words.iter().all(|w| text.contains(w)), "{text}");
        }
    }
}

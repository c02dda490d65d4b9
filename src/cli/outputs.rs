//! Files that a command writes: none of them may be the model, a drive, or the file of another option, and each can be
//! written before hours of work are spent on it.

use std::ffi::OsString;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::unistd::{AccessFlags, eaccess};

use super::{Failure, Placement, options};
use crate::engine::Opened;
use crate::storage::safe;

/// What a path leads to, whatever its spelling: device and inode, and for a file that is yet to be made those of its
/// folder, with its name.
type Identity = (u64, u64, Option<OsString>);

/// Checks the files that `--timeline` and other options name, before any of them is opened for writing.
///
/// # Errors
/// With exit code 2 if one is a file of the model or a copy of it, a block device, or the file of another option, or
/// cannot be written.
pub(super) fn check(opened: &Opened, placement: &Placement, others: &[(&str, Option<&Path>)]) -> Result<(), Failure> {
    let copies = options::named_places(placement)?;
    let model = opened.gguf.shards.iter().map(|s| &s.path).chain(&copies);
    let model: Vec<Identity> = model.filter_map(|path| identity(path)).collect();
    let outputs = [("--timeline", placement.timeline.as_deref())];
    let mut seen: Vec<(&str, Identity)> = Vec::new();
    for (option, path) in outputs.iter().chain(others).filter_map(|(option, path)| Some((*option, (*path)?))) {
        let refused = |why: &str| Err(Failure::usage(format!("{option} {}: {why}", path.display())));
        if is_block_device(path) {
            return refused(BLOCK_DEVICE);
        }
        writable(option, path)?;
        // Pipes and terminals take several.
        let Some(id) = identity(path) else { continue };
        if model.contains(&id) {
            return refused("it is a file of the model, which would be lost; name another file");
        }
        if let Some((other, _)) = seen.iter().find(|(_, there)| *there == id) {
            return refused(&format!("{other} names the same file; name another for one of them"));
        }
        seen.push((option, id));
    }
    Ok(())
}

/// The same for a command that has no model: `option` names the file, and `read` are the paths that it reads.
///
/// # Errors
/// With exit code 2 if it is a block device, or one of the files that are read.
pub(super) fn check_one(option: &str, path: &Path, read: &[&Path]) -> Result<(), Failure> {
    let refused = |why: &str| Err(Failure::usage(format!("{option} {}: {why}", path.display())));
    if is_block_device(path) {
        return refused(BLOCK_DEVICE);
    }
    writable(option, path)?;
    let id = identity(path);
    match id.is_some() && read.iter().any(|other| identity(other) == id) {
        true => refused("it is the file that is read, which would be lost; name another file"),
        false => Ok(()),
    }
}

const BLOCK_DEVICE: &str = "it is a block device, whose contents would be lost; name a file";

fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device())
}

/// Checks that the file of an option can be written or made, without touching it.
///
/// # Errors
/// With exit code 2, and why it cannot.
pub(super) fn writable(option: &str, path: &Path) -> Result<(), Failure> {
    let refused = |why: String| Err(Failure::usage(format!("{option} {}: {why}", path.display())));
    // What else is wrong with it is said below, or where it is opened.
    if let Err(e) = safe::may_create(path)
        && e.kind() == std::io::ErrorKind::InvalidInput
    {
        return refused(e.to_string());
    }
    match std::fs::metadata(path) {
        Ok(m) if m.is_dir() => refused("it is a folder; name a file in it".into()),
        Ok(_) => eaccess(path, AccessFlags::W_OK)
            .or_else(|e| refused(format!("it cannot be written ({}); name another file", e.desc()))),
        // What else is wrong with it is said where it is opened.
        Err(_) => {
            let folder = folder_of(path);
            if !folder.is_dir() {
                return refused(format!("there is no folder {}; make it first, or name another", folder.display()));
            }
            eaccess(folder, AccessFlags::W_OK | AccessFlags::X_OK).or_else(|e| {
                let why = e.desc();
                refused(format!("no file can be made in the folder {} ({why}); name another", folder.display()))
            })
        }
    }
}

/// The failure of writing a file. What there is of it is of no use, and takes the room that was missing: it is removed.
pub(super) fn failed(path: &Path, e: &std::io::Error) -> Failure {
    if matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::EIO)) {
        forget(path);
    }
    Failure::output(&path.display().to_string(), e)
}

/// Removes a file that was begun and not finished. A link stays, and leads to an empty file.
pub(super) fn forget(path: &Path) {
    if !std::fs::metadata(path).is_ok_and(|m| m.is_file()) {
        return;
    }
    let _ = safe::create(path);
    if std::fs::symlink_metadata(path).is_ok_and(|m| m.is_file()) {
        let _ = std::fs::remove_file(path);
    }
}

/// Writes a whole file.
///
/// # Errors
/// If it cannot be written; nothing is left of it then.
pub(super) fn write(path: &Path, contents: &str) -> Result<(), Failure> {
    let written = safe::create(path).and_then(|mut file| std::io::Write::write_all(&mut file, contents.as_bytes()));
    written.map_err(|e| failed(path, &e))
}

/// The folder that a file lies in or would be made in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The identity of a file that is there or can be made; `None` for what is no file.
fn identity(path: &Path) -> Option<Identity> {
    match std::fs::metadata(path) {
        Ok(m) => m.is_file().then(|| (m.dev(), m.ino(), None)),
        Err(_) => {
            let m = std::fs::metadata(folder_of(path)).ok()?;
            Some((m.dev(), m.ino(), Some(path.file_name()?.to_owned())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `nt probe storage A --plot B` drew over B, whatever it was.
    #[test]
    fn what_is_read_is_not_written_over() {
        let d = tempfile::tempdir().unwrap();
        let at = |name: &str| d.path().join(name);
        std::fs::write(at("model"), "x").unwrap();
        std::os::unix::fs::symlink("model", at("link")).unwrap();
        assert!(check_one("--plot", &at("plot.svg"), &[&at("model")]).is_ok());
        for same in ["model", "link"] {
            assert!(check_one("--plot", &at(same), &[&at("model")]).is_err(), "{same}");
        }
        let blocks = std::fs::read_dir("/dev").into_iter().flatten().flatten().map(|e| e.path());
        for block in blocks.filter(|p| std::fs::metadata(p).is_ok_and(|m| m.file_type().is_block_device())) {
            assert!(check_one("--plot", &block, &[&at("model")]).is_err(), "{}", block.display());
        }
    }
}

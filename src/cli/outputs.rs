//! Files that a command writes: none of them may be the model, a drive, or the file of another option.

use std::ffi::OsString;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::{Failure, Placement, run};
use crate::engine::Opened;

/// What a path leads to, whatever its spelling: device and inode, and for a file that is yet to be made those of its
/// folder, with its name.
type Identity = (u64, u64, Option<OsString>);

/// Checks the files that `--timeline` and other options name, before any of them is opened for writing.
///
/// # Errors
/// With exit code 2 if one is a file of the model or a copy of it, a block device, or the file of another option.
pub(super) fn check(opened: &Opened, placement: &Placement, others: &[(&str, Option<&Path>)]) -> Result<(), Failure> {
    let copies = run::named_places(placement)?;
    let model = opened.gguf.shards.iter().map(|s| &s.path).chain(&copies);
    let model: Vec<Identity> = model.filter_map(|path| identity(path)).collect();
    let outputs = [("--timeline", placement.timeline.as_deref())];
    let mut seen: Vec<(&str, Identity)> = Vec::new();
    for (option, path) in outputs.iter().chain(others).filter_map(|(option, path)| Some((*option, (*path)?))) {
        let refused = |why: &str| Err(Failure::usage(format!("{option} {}: {why}", path.display())));
        if is_block_device(path) {
            return refused(BLOCK_DEVICE);
        }
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

/// The identity of a file that is there or can be made; `None` for what is no file.
fn identity(path: &Path) -> Option<Identity> {
    match std::fs::metadata(path) {
        Ok(m) => m.is_file().then(|| (m.dev(), m.ino(), None)),
        Err(_) => {
            let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let m = std::fs::metadata(folder).ok()?;
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

//! The model library: which models lie on this machine, under which names.
//!
//! A library is a list of places: folders of GGUF files, Ollama's stores (through their manifests), and what was
//! recorded of drives or staged on them. Folders are listed and small manifests read, no header and no weights:
//! [`Entry::open`] reads one model's header. Nothing but a regular file is opened, and a file that cannot be used is an
//! entry with its reason. Only [`pull`] writes: it fetches a model into the first folder.

mod drives;
mod folder;
mod lookup;
mod ollama;
mod pull;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

pub use lookup::{LookupError, find, is_bare};
pub use pull::{Progress, PullError, Pulled, PulledFile, Request as PullRequest, pull};

use crate::engine::{self, CopyError, EngineError};
use crate::gguf::{Gguf, GgufError};

/// Directory entries of one place that are looked at.
const ENTRIES_MAX: usize = 20_000;

/// What a place is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A folder of GGUF files, with its subfolders.
    Folder,
    /// A store of Ollama's: `manifests` and `blobs`.
    Ollama,
}

/// Where models are looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The folder.
    pub path: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// Whether the user named it: one that is missing is worth a line then.
    pub named: bool,
}

/// Where an entry's header comes from.
#[derive(Clone, Debug)]
enum Header {
    /// The file.
    File,
    /// The record that `nt device extents` or `nt stage` made.
    Record,
    /// It was read with the drive's table.
    Known(Box<Gguf>),
}

/// A model, or a file that cannot be one.
#[derive(Clone, Debug)]
pub struct Entry {
    /// What a user calls it, with control characters escaped.
    pub name: String,
    /// The place it was found in, for people.
    pub place: String,
    /// Its first file.
    pub path: PathBuf,
    /// Bytes of all its files, if known.
    pub bytes: Option<u64>,
    /// Why it cannot be used, if that is known without its header.
    pub fault: Option<String>,
    /// Names by which it is found besides `name`.
    aliases: Vec<String>,
    header: Header,
}

/// What a library holds.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    /// All entries, place by place.
    pub entries: Vec<Entry>,
    /// Places that could not be looked at, as sentences.
    pub notes: Vec<String>,
}

impl Entry {
    /// Reads the model's header.
    ///
    /// # Errors
    /// The entry's fault, or what is wrong with the header.
    pub fn open(&self) -> Result<Gguf, EngineError> {
        if let Some(fault) = &self.fault {
            return Err(CopyError::Entry { path: self.path.clone(), fault: fault.clone() }.into());
        }
        match &self.header {
            Header::File => Ok(Gguf::open_with(&self.path, &mut source)?),
            Header::Record if self.path.exists() => Ok(Gguf::open_with(&self.path, &mut source)?),
            Header::Record => engine::open_header(&self.path, &[]),
            Header::Known(gguf) => Ok((**gguf).clone()),
        }
    }
}

impl Place {
    /// The place at `path`: an Ollama store if it looks like one.
    pub fn at(path: &Path, named: bool) -> Place {
        let store = path.join("manifests").is_dir() && path.join("blobs").is_dir();
        Place { path: path.into(), kind: if store { Kind::Ollama } else { Kind::Folder }, named }
    }

    /// How it is shown.
    fn shown(&self) -> String {
        let path = printable(&self.path.to_string_lossy());
        if self.kind == Kind::Ollama { format!("Ollama, {path}") } else { path }
    }
}

/// What a folder has, as long as `left` is above 0, which counts it; nothing and a note where it cannot be read.
fn entries(folder: &Path, left: &mut usize, catalog: &mut Catalog) -> Vec<std::fs::DirEntry> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) => {
            catalog.notes.push(format!("{}: {e}", printable(&folder.to_string_lossy())));
            return Vec::new();
        }
    };
    let entries: Vec<_> = entries.flatten().take(*left).collect();
    *left -= entries.len();
    entries
}

/// The places of this machine: `nt/models` in the user's cache, `$NT_MODELS`, and Ollama's stores.
pub fn places() -> Vec<Place> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = var("HOME");
    // A relative one is to be ignored, as the specification of these folders has it.
    let cache = var("XDG_CACHE_HOME").filter(|c| c.is_absolute()).or_else(|| Some(home.as_ref()?.join(".cache")));
    let mut all: Vec<Place> = cache.into_iter().map(|c| Place::at(&c.join("nt/models"), false)).collect();
    if let Some(list) = std::env::var_os("NT_MODELS") {
        let named = std::env::split_paths(&list).filter(|p| !p.as_os_str().is_empty());
        all.extend(named.map(|p| Place::at(&p, true)));
    }
    let store = |path: PathBuf, named| Place { path, kind: Kind::Ollama, named };
    match var("OLLAMA_MODELS") {
        Some(path) => all.push(store(path, true)),
        None => all.extend(home.map(|h| store(h.join(".ollama/models"), false))),
    }
    all.push(store("/usr/share/ollama/.ollama/models".into(), false));
    let mut seen = BTreeSet::new();
    all.retain(|p| seen.insert(p.path.canonicalize().unwrap_or_else(|_| p.path.clone())));
    all
}

/// The folder that models are fetched into: the first of `$NT_MODELS` that is no store of Ollama's, else `nt/models` in
/// the user's cache; `None` where there is neither.
pub fn home() -> Option<PathBuf> {
    let all = places();
    let folder = |named| all.iter().find(|p| p.named == named && p.kind == Kind::Folder).map(|p| p.path.clone());
    folder(true).or_else(|| folder(false))
}

/// Lists what lies in `places`. Reads folders and manifests alone.
pub fn scan(places: &[Place]) -> Catalog {
    let mut catalog = Catalog::default();
    for place in places {
        match std::fs::read_dir(&place.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && !place.named => {}
            Err(e) => catalog.notes.push(unreadable(place, &e)),
            Ok(_) if place.kind == Kind::Ollama => ollama::scan(place, &mut catalog),
            Ok(_) => folder::scan(place, &mut catalog),
        }
    }
    catalog
}

/// Adds what is recorded of drives on this machine, and what is staged on drives that the kernel holds.
pub fn scan_drives(catalog: &mut Catalog) {
    drives::scan(catalog);
}

fn unreadable(place: &Place, e: &io::Error) -> String {
    let cure = match (e.kind(), place.kind) {
        (io::ErrorKind::PermissionDenied, Kind::Ollama) => {
            "; its models are readable for the group of Ollama's service: sudo usermod -aG ollama $USER"
        }
        _ => "",
    };
    format!("{}: {e}{cure}", place.shown())
}

/// Text of a file or its name with control characters escaped, so that it cannot steer a terminal.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// Opens a regular file for reading, and nothing else: a FIFO or a device is neither waited for nor touched.
fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    let not = || io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file");
    if !std::fs::metadata(path)?.is_file() {
        return Err(not());
    }
    // Should it have been replaced since: opening does not wait, and what was opened is looked at again.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let meta = file.metadata()?;
    if meta.is_file() { Ok((file, meta.len())) } else { Err(not()) }
}

fn source(path: &Path) -> Result<(Box<dyn Read>, u64), GgufError> {
    let (file, len) = open_regular(path).map_err(|source| GgufError::Io { path: path.into(), source })?;
    Ok((Box::new(BufReader::with_capacity(1 << 16, file)), len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_opened() {
        let d = tempfile::tempdir().unwrap();
        let fifo = d.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [fifo.as_path(), d.path(), Path::new("/dev/zero")] {
            assert!(open_regular(path).unwrap_err().to_string().contains("no regular file"), "{}", path.display());
        }
    }

    #[test]
    fn control_characters_do_not_reach_a_terminal() {
        assert_eq!(printable("a\x1b[31mb\u{9b}é"), "a\\u{1b}[31mb\\u{9b}é");
    }
}

//! A name given as a model: which file it means.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use super::{Catalog, Entry, ollama, printable};
use crate::storage::library::Library;

/// Why a name means no file.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// It could mean several.
    #[error("{name} could be any of these; give the path of one: {candidates}")]
    Ambiguous {
        /// The name.
        name: String,
        /// Where each lies.
        candidates: String,
    },
    /// What it means cannot be used.
    #[error("{name} ({place}): {why}")]
    Unusable {
        /// The name.
        name: String,
        /// The library's place.
        place: String,
        /// What is wrong.
        why: String,
    },
}

/// Whether `path` can be a library's name: relative, of plain parts alone (no `.`, `..` or empty ones), and UTF-8.
pub fn is_bare(path: &Path) -> bool {
    let Some(text) = path.to_str() else { return false };
    let plain = path.components().all(|c| matches!(c, Component::Normal(_)));
    !text.is_empty() && plain && text.split('/').all(|part| !part.is_empty() && part != ".")
}

/// The file that `name` means in the catalog; `None` if no entry is called so, or only the records of drives know
/// the name, which are looked up when the model is opened.
///
/// # Errors
/// If several files or none that can be used are called so.
pub fn find(name: &str, catalog: &Catalog) -> Result<Option<PathBuf>, LookupError> {
    let full = ollama::full_name(name);
    let called: Vec<&Entry> = catalog.entries.iter().filter(|e| is_called(e, name, full.as_deref())).collect();
    // One file may be found in several places: through links, or as the blob of several tags.
    let usable: BTreeMap<PathBuf, &Entry> = called
        .iter()
        .filter(|e| e.fault.is_none())
        .map(|e| (e.path.canonicalize().unwrap_or_else(|_| e.path.clone()), *e))
        .collect();
    let shown = |e: &Entry| format!("{} ({})", printable(&e.path.to_string_lossy()), e.place);
    let mut files = usable.values();
    match (files.next(), called.first()) {
        (None, None) => Ok(None),
        (None, Some(broken)) => Err(LookupError::Unusable {
            name: printable(name),
            place: broken.place.clone(),
            why: broken.fault.clone().unwrap_or_default(),
        }),
        (Some(one), _) => {
            let mut all: Vec<String> = usable.values().map(|e| shown(e)).collect();
            all.extend(recorded_elsewhere(name, one));
            if all.len() == 1 {
                return Ok(Some(one.path.clone()));
            }
            Err(LookupError::Ambiguous { name: printable(name), candidates: all.join(", ") })
        }
    }
}

fn is_called(e: &Entry, name: &str, full: Option<&str>) -> bool {
    let is = |alias: &String| alias == name || full.is_some_and(|f| alias.eq_ignore_ascii_case(f));
    e.aliases.iter().any(is)
}

/// Other models that records of drives know by this name: neither that file nor as long as it.
fn recorded_elsewhere(name: &str, found: &Entry) -> Vec<String> {
    let records = Library::default().find(Path::new(name), None).unwrap_or_default();
    let other = records.iter().map(|r| &r.manifest).filter(|m| m.path != found.path && Some(m.size) != found.bytes);
    other.map(|m| format!("{} (recorded on drive {} {})", m.path.display(), m.model, m.serial)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Place, scan};
    use super::*;
    use std::fs;

    #[test]
    fn names_with_tricks_are_paths() {
        for bare in ["m", "m.gguf", "a/b", "qwen2.5:14b", "hf.co/a/b:c"] {
            assert!(is_bare(Path::new(bare)), "{bare}");
        }
        for path in ["", "/m", "../m", "a/../m", "./m", "a//m", "a/", "a/./m", ".."] {
            assert!(!is_bare(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn a_name_means_one_file_or_is_refused() {
        let d = tempfile::tempdir().unwrap();
        let (a, b) = (d.path().join("a"), d.path().join("b"));
        fs::create_dir_all(a.join("sub")).unwrap();
        fs::create_dir_all(&b).unwrap();
        for (path, text) in [(a.join("m.gguf"), "1"), (b.join("m.gguf"), "22"), (a.join("sub/n.gguf"), "3")] {
            fs::write(path, text).unwrap();
        }
        std::os::unix::fs::symlink(a.join("sub/n.gguf"), b.join("n.gguf")).unwrap();
        std::os::unix::fs::symlink("/nonexistent", b.join("gone.gguf")).unwrap();
        let catalog = scan(&[Place::at(&a, true), Place::at(&b, true)]);
        for name in ["sub/n", "n", "n.gguf", "sub/n.gguf", "sub"] {
            let found = find(name, &catalog).unwrap().unwrap();
            assert_eq!(found.canonicalize().unwrap(), a.join("sub/n.gguf").canonicalize().unwrap(), "{name}");
        }
        let e = find("m", &catalog).unwrap_err().to_string();
        assert!(e.contains("a/m.gguf") && e.contains("b/m.gguf"), "{e}");
        let e = find("gone", &catalog).unwrap_err().to_string();
        assert!(e.contains("No such file"), "{e}");
        assert!(find("other", &catalog).unwrap().is_none());
    }
}

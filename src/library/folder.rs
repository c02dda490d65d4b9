//! A folder of GGUF files with its subfolders. The shards of one model are one entry.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Catalog, ENTRIES_MAX, Entry, Header, Place, entries, printable};

/// Folders below a place that are looked into.
const DEPTH_MAX: usize = 6;

/// Files of one model: shard number and path, in order.
type Files = BTreeMap<u32, PathBuf>;

/// Adds the models below the place. Links to files are followed, links to folders are not.
pub(super) fn scan(place: &Place, catalog: &mut Catalog) {
    let mut found = BTreeMap::new();
    let mut left = ENTRIES_MAX;
    walk(&place.path, 0, &mut left, &mut found, catalog);
    if left == 0 {
        let why = format!("{}: more than {ENTRIES_MAX} files lie there; the rest is not listed", place.shown());
        catalog.notes.push(why);
    }
    let mut models = BTreeMap::<PathBuf, usize>::new();
    found.keys().for_each(|(folder, ..)| *models.entry(folder.clone()).or_default() += 1);
    for ((folder, stem, count), files) in found {
        let mut entry = entry(place, &folder, &stem, count, &files);
        // A folder with one model stands for it.
        let within = folder.strip_prefix(&place.path).ok().filter(|w| *w != Path::new(""));
        entry.aliases.extend(within.filter(|_| models[&folder] == 1).map(|w| w.to_string_lossy().into_owned()));
        catalog.entries.push(entry);
    }
}

fn walk(
    folder: &Path,
    depth: usize,
    left: &mut usize,
    found: &mut BTreeMap<(PathBuf, String, u32), Files>,
    catalog: &mut Catalog,
) {
    for entry in entries(folder, left, catalog) {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        match entry.file_type() {
            Ok(t) if t.is_dir() && !name.starts_with('.') && depth < DEPTH_MAX => {
                walk(&path, depth + 1, left, found, catalog);
            }
            Ok(t) if !t.is_dir() => {
                let Some(stem) = strip_gguf(&name) else { continue };
                let (stem, no, count) = shard(stem).unwrap_or((stem, 1, 1));
                found.entry((folder.to_path_buf(), stem.to_owned(), count)).or_default().insert(no, path);
            }
            _ => {}
        }
    }
}

fn strip_gguf(name: &str) -> Option<&str> {
    let at = name.len().checked_sub(5)?;
    let (stem, end) = (name.get(..at)?, name.get(at..)?);
    (end.eq_ignore_ascii_case(".gguf") && !stem.is_empty()).then_some(stem)
}

/// The model's name, the shard's number and their count, of `NAME-00002-of-00005`.
fn shard(stem: &str) -> Option<(&str, u32, u32)> {
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (name, no) = rest.rsplit_once('-')?;
    let number = |s: &str| (s.len() == 5).then(|| s.parse().ok()).flatten();
    Some((name, number(no)?, number(count)?))
}

fn entry(place: &Place, folder: &Path, stem: &str, count: u32, files: &Files) -> Entry {
    let within = folder.strip_prefix(&place.path).unwrap_or(Path::new(""));
    let first = files.get(&1).or_else(|| files.values().next()).cloned().unwrap_or_default();
    let file = first.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let relative = |name: &str| within.join(name).to_string_lossy().into_owned();
    let mut bytes = Some(0);
    let mut fault = (!files.contains_key(&1)).then(|| {
        let there: Vec<String> = files.keys().map(u32::to_string).collect();
        format!("shard 1 of {count} is missing; of the others there is {}", there.join(", "))
    });
    for path in files.values() {
        match fs::metadata(path) {
            Ok(meta) if meta.is_file() => bytes = bytes.map(|b| b + meta.len()),
            Ok(_) => fault = Some("it is no regular file".into()),
            Err(e) => (bytes, fault) = (None, Some(e.to_string())),
        }
    }
    Entry {
        name: printable(&relative(stem)),
        place: place.shown(),
        bytes,
        fault,
        aliases: vec![relative(stem), relative(&file), stem.to_owned(), file],
        path: first,
        header: Header::File,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(root: &Path) -> Vec<(String, Option<String>)> {
        let mut catalog = Catalog::default();
        scan(&Place::at(root, true), &mut catalog);
        catalog.entries.into_iter().map(|e| (e.name, e.fault)).collect()
    }

    #[test]
    fn shards_are_one_entry_and_other_files_none() {
        let d = tempfile::tempdir().unwrap();
        for name in ["b-00002-of-00002.gguf", "b-00001-of-00002.gguf", "a.GGUF", "a.gguf.part", ".gguf", "readme"] {
            fs::write(d.path().join(name), b"xy").unwrap();
        }
        fs::create_dir_all(d.path().join("sub/.hidden")).unwrap();
        fs::write(d.path().join("sub/c.gguf"), b"").unwrap();
        fs::write(d.path().join("sub/.hidden/d.gguf"), b"").unwrap();
        std::os::unix::fs::symlink(d.path(), d.path().join("sub/loop")).unwrap();
        assert_eq!(names(d.path()), [("a".into(), None), ("b".into(), None), ("sub/c".into(), None)]);
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said() {
        let d = tempfile::tempdir().unwrap();
        fs::write(d.path().join("x-00002-of-00003.gguf"), b"").unwrap();
        std::os::unix::fs::symlink("/nonexistent", d.path().join("gone.gguf")).unwrap();
        nix::unistd::mkfifo(&d.path().join("pipe.gguf"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let faults: Vec<_> = names(d.path()).into_iter().map(|(n, f)| (n, f.unwrap_or_default())).collect();
        for ((name, fault), (wanted, words)) in
            faults.iter().zip([("gone", "No such file"), ("pipe", "no regular file"), ("x", "shard 1 of 3 is missing")])
        {
            assert!(name == wanted && fault.contains(words), "{name}: {fault}");
        }
        assert_eq!(faults.len(), 3);
    }

    #[test]
    fn a_shard_is_known_by_its_name() {
        assert_eq!(shard("a-b-00002-of-00005"), Some(("a-b", 2, 5)));
        for none in ["a-2-of-5", "a-00002-of-5x", "-of-", "a-00001_of_00002"] {
            assert_eq!(shard(none), None, "{none}");
        }
    }
}

//! Manifests recorded on this machine, so that a model can be named and its header read while its
//! file system is not mounted: `SERIAL/FILE.json`, and next to it the file's header.
//!
//! Root records below a folder that root alone may write, everybody else in a folder of their own. What others
//! could have written is read with care and never by root, and never goes before what root recorded.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use super::checksum::{CHUNK, crc32c};
use super::manifest::Manifest;
use super::safe;

/// Where root records for all users: folders of root's alone, each with the one before as its parent.
const SYSTEM: [&str; 2] = ["/var/lib/nt", "/var/lib/nt/system"];
/// Most bytes of a manifest: one of a file of 1 TB has 200 MB.
const MANIFEST_MAX: u64 = 1 << 30;
/// Most bytes of a header.
const HEADER_MAX: u64 = 1 << 30;

/// Stands between a kept header and its checksum.
const SEAL: &[u8; 8] = b"NTHEAD01";

/// A folder with a folder per drive in it.
#[derive(Clone, Debug)]
struct Shelf {
    path: PathBuf,
    /// Whether records are put there.
    writable: bool,
    /// Whether only what root (or this user) wrote there counts.
    owned: bool,
}

/// Folders of manifests, the preferred one first.
#[derive(Clone, Debug)]
pub struct Library {
    shelves: Vec<Shelf>,
}

/// A manifest and the header of its file.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The manifest.
    pub manifest: Manifest,
    /// The file's first bytes, up to the tensors' data.
    pub header: Vec<u8>,
}

impl Default for Library {
    /// Root's folder; the user's own; and the one of older versions, in which members of the group `nt` could
    /// write, for reading only.
    fn default() -> Library {
        let root = geteuid().is_root();
        let var = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let own = var("XDG_DATA_HOME").or_else(|| var("HOME").map(|h| h.join(".local/share"))).map(|d| d.join("nt"));
        let mut shelves = vec![Shelf { path: SYSTEM[1].into(), writable: root, owned: true }];
        // With sudo, HOME may be another user's.
        if let Some(path) = own.filter(|p| !root || existing(p).is_some_and(safe::is_ours_alone)) {
            shelves.push(Shelf { path, writable: !root, owned: root });
        }
        shelves.push(Shelf { path: SYSTEM[0].into(), writable: false, owned: root });
        Library { shelves }
    }
}

/// The path itself, or the lowest folder above it that exists.
fn existing(path: &Path) -> Option<&Path> {
    path.ancestors().find(|p| p.exists())
}

/// A record that is there and cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct Unusable {
    /// Its path.
    pub path: PathBuf,
    /// What is wrong with it.
    pub source: RecordError,
}

/// What is wrong with a record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be read.
    #[error("{name}: {source}")]
    Io {
        /// The file's name.
        name: String,
        /// The system's words.
        source: std::io::Error,
    },
    /// Neither root nor this user alone could have written it.
    #[error("{0}: others could have written it, so it is not used; record the model again")]
    Untrusted(String),
    /// It is no JSON of the form that is expected.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// Places or checksums that contradict each other: a sentence.
    #[error("{0}")]
    Manifest(String),
    /// The header that is kept with it.
    #[error("its copy of the header is damaged; record the model again")]
    Header,
}

impl Library {
    /// A library in these folders.
    pub fn at(folders: Vec<PathBuf>) -> Library {
        Library { shelves: folders.into_iter().map(|path| Shelf { path, writable: true, owned: false }).collect() }
    }

    /// Records a manifest in the first folder that can be written; gives its path.
    ///
    /// # Errors
    /// If no folder can be written: the first one's reason.
    pub fn save(&self, recorded: &Recorded) -> Result<PathBuf, String> {
        let mut why = None;
        for shelf in self.shelves.iter().filter(|s| s.writable) {
            match save(&shelf.path, recorded) {
                Ok(path) => return Ok(path),
                Err(e) => why = why.or(Some(format!("{}: {e}", shelf.path.display()))),
            }
        }
        Err(why.unwrap_or_else(|| "there is no folder for manifests; set HOME".to_owned()))
    }

    /// Every manifest, folder by folder; one that cannot be read is an error with its path.
    pub fn all(&self) -> Vec<Result<Manifest, Unusable>> {
        let mut found: Vec<Result<Manifest, Unusable>> = Vec::new();
        for (folder, owned) in self.folders() {
            let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
            let mut paths: Vec<PathBuf> = entries.map(|e| e.path()).collect();
            paths.retain(|p| p.extension().is_some_and(|e| e == "json"));
            paths.sort();
            for path in paths {
                let next = load(&path, owned).map(|r| r.manifest).map_err(|source| Unusable { path, source });
                let known = next.as_ref().is_ok_and(|n| found.iter().flatten().any(|f| same(f, n)));
                if !known {
                    found.push(next);
                }
            }
        }
        found
    }

    /// Every drive's folder, the preferred first, and whether only what is ours alone counts there.
    fn folders(&self) -> impl Iterator<Item = (PathBuf, bool)> {
        self.shelves.iter().flat_map(|s| list(&s.path).into_iter().map(|f| (f, s.owned)))
    }

    /// Manifests of the file that `model` names: by the path it had, by its file name, or by its
    /// name without `.gguf`; with `serial`, only those on that drive. Of several records of one file on one
    /// drive, the one of the preferred folder.
    ///
    /// # Errors
    /// If none is found, but one that matches by its own name cannot be used.
    pub fn find(&self, model: &Path, serial: Option<&str>) -> Result<Vec<Recorded>, Unusable> {
        let Some(wanted) = model.file_name().map(|n| n.to_string_lossy().into_owned()) else { return Ok(Vec::new()) };
        let named_only = model.components().count() == 1;
        let full = std::path::absolute(model).unwrap_or_else(|_| model.to_path_buf());
        let mut found: Vec<Recorded> = Vec::new();
        let mut fault = None;
        for (folder, owned) in self.folders() {
            for name in [wanted.clone(), format!("{wanted}.gguf")] {
                let path = folder.join(format!("{name}.json"));
                if path.symlink_metadata().is_err() {
                    continue;
                }
                let recorded = match load(&path, owned) {
                    Ok(recorded) => recorded,
                    Err(source) => {
                        let others = strangers(&path);
                        let e = Unusable { path, source };
                        match others {
                            true => tracing::debug!("{e}"),
                            false => fault = fault.or(Some(e)),
                        }
                        continue;
                    }
                };
                let m = &recorded.manifest;
                let known = found.iter().any(|f| same(&f.manifest, m));
                let wanted = serial.is_none_or(|s| s == m.serial) && (named_only || serial.is_some() || m.path == full);
                if wanted && !known {
                    found.push(recorded);
                }
            }
        }
        match fault {
            Some(fault) if found.is_empty() => Err(fault),
            _ => Ok(found),
        }
    }
}

/// Whether neither root nor this user put it there: what cannot be used of it is then no fault to tell of, or
/// any member of a group could spoil a name for all.
fn strangers(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|m| m.uid() != 0 && m.uid() != geteuid().as_raw())
}

/// Whether both are of one file on one drive.
fn same(a: &Manifest, b: &Manifest) -> bool {
    (&a.serial, a.namespace, &a.path) == (&b.serial, b.namespace, &b.path)
}

/// Folders of drives, not through links.
fn list(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> =
        entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect();
    found.sort();
    found
}

/// A serial as a folder's name; two serials never have the same one.
fn folder_name(serial: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    let name: String =
        serial.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02x}") }).collect();
    if name.is_empty() { "%".into() } else { name }
}

fn save(shelf: &Path, recorded: &Recorded) -> std::io::Result<PathBuf> {
    let m = &recorded.manifest;
    let plain = Path::new(&m.file).components().count() == 1 && Path::new(&m.file).file_name().is_some();
    if !plain || m.file.contains('/') {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, format!("{:?} is no file name", m.file)));
    }
    let shared = shelf == Path::new(SYSTEM[1]);
    let shelf = if shared {
        safe::own_folder(Path::new(SYSTEM[0]), true)?;
        shelf.to_path_buf()
    } else {
        // A user's own folder may be a link of his.
        fs::create_dir_all(shelf)?;
        shelf.canonicalize()?
    };
    let drive = folder_name(&m.serial);
    // By descriptors from here on: what is checked is what is written to.
    let folder = safe::own_folder(&safe::own_folder(&shelf, shared)?.at(&drive), shared)?;
    // The manifest last, and each file whole or not at all.
    safe::replace(&folder.at(&format!("{}.header", m.file)), &sealed(&recorded.header), 0o644, ".nt-")?;
    safe::replace(&folder.at(&format!("{}.json", m.file)), &serde_json::to_vec(m)?, 0o644, ".nt-")?;
    let path = shelf.join(drive).join(format!("{}.json", m.file));
    Ok(path)
}

/// Reads a record. `owned`: root (or this user) must have written it, in a folder that others cannot write.
fn load(path: &Path, owned: bool) -> Result<Recorded, RecordError> {
    let read = |path: &Path, limit: u64| -> Result<Vec<u8>, RecordError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let found = match safe::read(path, limit) {
            Ok(found) => found,
            Err(source) => return Err(RecordError::Io { name, source }),
        };
        let trusted = |uid: u32| uid == 0 || uid == geteuid().as_raw();
        let folder = path.parent().and_then(|f| f.symlink_metadata().ok());
        let closed = folder.is_some_and(|m| m.is_dir() && trusted(m.uid()) && m.mode() & 0o022 == 0);
        if owned && !(trusted(found.uid) && !found.others_write && closed) {
            return Err(RecordError::Untrusted(name));
        }
        Ok(found.bytes)
    };
    let manifest: Manifest = serde_json::from_slice(&read(path, MANIFEST_MAX)?)?;
    if let Some(fault) = manifest.fault() {
        return Err(RecordError::Manifest(fault));
    }
    let header = opened(read(&path.with_extension("header"), HEADER_MAX)?, &manifest);
    let header = header.ok_or(RecordError::Header)?;
    Ok(Recorded { manifest, header })
}

/// A header as it is kept: with its checksum behind it, which the chunks of a manifest cannot replace, since the last one
/// reaches beyond the header.
fn sealed(header: &[u8]) -> Vec<u8> {
    let mut out = header.to_vec();
    out.extend(SEAL);
    out.extend(crc32c(header).to_le_bytes());
    out
}

/// The header of what [`sealed`] made, if it is whole. Older versions kept it alone; it is compared with the manifest's
/// whole chunks then.
fn opened(mut kept: Vec<u8>, manifest: &Manifest) -> Option<Vec<u8>> {
    let end = kept.len().saturating_sub(SEAL.len() + 4);
    if kept[end..].starts_with(SEAL) {
        let sum = u32::from_le_bytes(*kept.last_chunk()?);
        kept.truncate(end);
        return (crc32c(&kept) == sum).then_some(kept);
    }
    let whole = kept.chunks_exact(CHUNK).enumerate().all(|(i, chunk)| manifest.holds(i, chunk));
    whole.then_some(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(serial: &str, path: &str) -> Recorded {
        let path = PathBuf::from(path);
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        let manifest = Manifest {
            file,
            path,
            size: 5,
            serial: serial.into(),
            model: "M".into(),
            namespace: 1,
            extents: vec![(0, 4096, 4096)],
            crc32c: vec![7],
            requant: None,
        };
        Recorded { manifest, header: b"head".to_vec() }
    }

    #[test]
    fn a_model_is_found_by_name_path_and_drive() {
        let folder = tempfile::tempdir().unwrap();
        let library = Library::at(vec!["/proc/no/such".into(), folder.path().into()]);
        library.save(&recorded("S 1/x", "/mnt/a/m.gguf")).unwrap();
        library.save(&recorded("S2", "/mnt/b/m.gguf")).unwrap();
        let find = |model: &str, serial| -> Vec<String> {
            let all = library.find(Path::new(model), serial).unwrap();
            all.into_iter().map(|r| r.manifest.serial).collect()
        };
        assert_eq!(find("m.gguf", None), ["S 1/x", "S2"]);
        assert_eq!(find("m", Some("S2")), ["S2"]);
        assert_eq!(find("/mnt/b/m.gguf", None), ["S2"]);
        assert_eq!(find("/elsewhere/m.gguf", None), [""; 0], "another file of the same name");
        assert_eq!(find("/elsewhere/m.gguf", Some("S2")), ["S2"], "its copy on a named drive");
        assert_eq!(find("n.gguf", None), [""; 0]);
    }

    #[test]
    fn a_damaged_manifest_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let library = Library::at(vec![folder.path().into()]);
        let mut bad = recorded("S", "/mnt/m.gguf");
        bad.manifest.extents[0].2 = 3;
        let path = library.save(&bad).unwrap();
        let e = library.find(Path::new("m.gguf"), None).unwrap_err().to_string();
        assert!(e.contains("extents end at byte 3") && e.contains(path.to_str().unwrap()), "{e}");
    }

    /// What a member of the group could lie in the folders of older versions, or anybody in a home that root
    /// was given by sudo. Root uses none of it, and nobody hangs.
    #[test]
    fn what_others_wrote_is_never_roots() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        type Spoil = fn(&Path, &Path);
        fn fifo(path: &Path) {
            let _ = fs::remove_file(path);
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
        }
        fn link(path: &Path, to: &str) {
            let _ = fs::remove_file(path);
            symlink(to, path).unwrap();
        }
        fn open_to_all(path: &Path, mode: u32) {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
        // Each with whether a plain user, who trusts the group, may still use it.
        let cases: [(&str, bool, Spoil); 17] = [
            ("a FIFO as manifest", false, |j, _| fifo(j)),
            ("a FIFO as header", false, |_, h| fifo(h)),
            ("zeros as manifest", false, |j, _| link(j, "/dev/zero")),
            ("zeros as header", false, |_, h| link(h, "/dev/zero")),
            ("a terminal as header", false, |_, h| link(h, "/dev/tty")),
            ("a link to a secret as header", false, |_, h| link(h, "/etc/passwd")),
            ("a dangling link", false, |j, _| link(j, "/nowhere")),
            ("a link to itself", false, |j, _| link(j, "m.gguf.json")),
            ("a folder as manifest", false, |j, _| {
                fs::remove_file(j).unwrap();
                fs::create_dir(j).unwrap();
            }),
            ("a sparse file of a TB as manifest", false, |j, _| fs::File::create(j).unwrap().set_len(1 << 40).unwrap()),
            ("a sparse file of a TB as header", false, |_, h| fs::File::create(h).unwrap().set_len(1 << 40).unwrap()),
            ("no JSON", false, |j, _| fs::write(j, b"[[[[").unwrap()),
            ("deep JSON", false, |j, _| fs::write(j, "[".repeat(1 << 20)).unwrap()),
            ("no header", false, |_, h| fs::remove_file(h).unwrap()),
            ("a manifest that everybody may write", true, |j, _| open_to_all(j, 0o666)),
            ("a header that the group may write", true, |_, h| open_to_all(h, 0o664)),
            ("a folder that the group may write", true, |j, _| open_to_all(j.parent().unwrap(), 0o775)),
        ];
        for (what, plain, spoil) in cases {
            let folder = safe::tests::scratch();
            let path = Library::at(vec![folder.path().into()]).save(&recorded("S", "/mnt/m.gguf")).unwrap();
            let library =
                |owned| Library { shelves: vec![Shelf { path: folder.path().into(), writable: false, owned }] };
            assert_eq!(library(true).find(Path::new("m"), None).unwrap().len(), 1, "{what}");
            spoil(&path, &path.with_extension("header"));
            assert!(library(true).find(Path::new("m"), None).is_err(), "{what}");
            assert_eq!(library(false).find(Path::new("m"), None).is_ok(), plain, "{what}");
            // And what root recorded is found all the same.
            let good = safe::tests::scratch();
            Library::at(vec![good.path().into()]).save(&recorded("S", "/mnt/m.gguf")).unwrap();
            let roots = Shelf { path: good.path().into(), writable: true, owned: true };
            let both = Library { shelves: vec![roots, library(false).shelves.remove(0)] };
            assert_eq!(both.find(Path::new("m.gguf"), Some("S")).unwrap().len(), 1, "{what}");
        }
    }

    #[test]
    fn records_are_not_written_through_what_lies_in_their_place() {
        use std::os::unix::fs::symlink;
        let (folder, target) = (safe::tests::scratch(), safe::tests::scratch());
        let at = |name: &str| folder.path().join(name);
        let library = Library::at(vec![folder.path().into()]);
        let victim = target.path().join("victim");
        fs::write(&victim, b"theirs").unwrap();
        // A link in place of the drive's folder; older versions wrote two files through it.
        symlink(target.path(), at("S")).unwrap();
        assert!(library.save(&recorded("S", "/mnt/m.gguf")).unwrap_err().contains("a link lies in place"));
        fs::remove_file(at("S")).unwrap();
        fs::create_dir(at("S")).unwrap();
        for name in ["m.gguf.part", "m.gguf.json", "m.gguf.header", "m.gguf.json.part", "m.part"] {
            symlink(&victim, at("S").join(name)).unwrap();
        }
        library.save(&recorded("S", "/mnt/m.gguf")).unwrap();
        assert_eq!(fs::read(&victim).unwrap(), b"theirs");
        assert_eq!(library.find(Path::new("m"), Some("S")).unwrap().len(), 1);
        // Names that leave the folder.
        for (serial, file) in [("..", "m"), ("../../S", "m"), (".", "m"), ("", "m"), ("/etc", "m")] {
            let path = library.save(&recorded(serial, &format!("/mnt/{file}"))).unwrap();
            assert_eq!(path.parent().unwrap().parent().unwrap(), folder.path().canonicalize().unwrap(), "{serial}");
        }
        for file in ["..", ".", "", "a/b", "/etc/passwd", "../x", "a/"] {
            let mut odd = recorded("S", "/mnt/m");
            odd.manifest.file = file.into();
            assert!(library.save(&odd).is_err(), "{file:?}");
        }
        assert_eq!(fs::read_dir(target.path()).unwrap().count(), 1);
    }

    /// A member's record of the same file on the same drive does not go before root's; drives of different
    /// serials never share a folder; older folders are still found.
    #[test]
    fn roots_records_go_first_and_old_ones_are_found() {
        let (root, own, old) = (safe::tests::scratch(), safe::tests::scratch(), safe::tests::scratch());
        let shelf = |d: &tempfile::TempDir, writable| Shelf { path: d.path().into(), writable, owned: false };
        let library = Library { shelves: vec![shelf(&root, false), shelf(&own, true), shelf(&old, false)] };
        let put = |d: &tempfile::TempDir, serial: &str, header: &[u8]| {
            let mut r = recorded(serial, "/mnt/m.gguf");
            r.header = header.into();
            Library::at(vec![d.path().into()]).save(&r).unwrap()
        };
        put(&old, "S", b"old");
        put(&own, "S", b"own");
        put(&root, "S", b"root");
        let path = put(&old, "T", b"old");
        fs::rename(path.parent().unwrap(), old.path().join("T_of_an_older_version")).unwrap();
        let found =
            |serial| library.find(Path::new("m"), serial).unwrap().into_iter().map(|r| r.header).collect::<Vec<_>>();
        assert_eq!(found(Some("S")), [b"root".to_vec()]);
        assert_eq!(found(Some("T")), [b"old".to_vec()]);
        assert_eq!(found(None).len(), 2);
        assert!(library.save(&recorded("U", "/mnt/u.gguf")).unwrap().starts_with(own.path().canonicalize().unwrap()));
        let names: std::collections::HashSet<String> =
            ["S 1", "S_1", "S%201", "Sé", "S\u{1}", "S", "s", ""].iter().map(|s| folder_name(s)).collect();
        assert_eq!(names.len(), 8);
        assert!(names.iter().all(|n| n.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_%".contains(&b))));
    }

    /// Two recordings of one model at once shared a `.part`: one failed.
    #[test]
    fn race_of_two_recordings() {
        let folder = safe::tests::scratch();
        let library = Library::at(vec![folder.path().into()]);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..500).for_each(|_| drop(library.save(&recorded("S", "/mnt/m.gguf")).unwrap())));
            }
        });
        assert_eq!(library.find(Path::new("m"), None).unwrap().len(), 1);
        assert_eq!(fs::read_dir(folder.path().join("S")).unwrap().count(), 2);
    }

    /// Ten thousand changes from a seed of a manifest and of the header next to it: none panics, a changed header is
    /// not used, and a changed manifest is used only if it covers its file.
    #[test]
    fn a_changed_record_is_refused_or_consistent() {
        use rand::{RngExt, SeedableRng};
        let folder = safe::tests::scratch();
        let mut record = recorded("S", "/mnt/m.gguf");
        record.manifest.size = 3 * CHUNK as u64;
        record.manifest.extents = vec![(0, 4096, CHUNK as u64), (CHUNK as u64, 1 << 20, 2 * CHUNK as u64)];
        record.manifest.crc32c = vec![7, 8, 9];
        record.header = (0..700u32).map(|i| (i * 7) as u8).collect();
        let manifest = Library::at(vec![folder.path().into()]).save(&record).unwrap();
        assert_eq!(load(&manifest, false).unwrap().header, record.header);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(11);
        for path in [manifest.clone(), manifest.with_extension("header")] {
            let original = fs::read(&path).unwrap();
            for round in 0..10_000 {
                let mut bytes = original.clone();
                let at = rng.random_range(0..bytes.len());
                match rng.random_range(0..4) {
                    0 => bytes[at] ^= 1 << rng.random_range(0..8),
                    1 => bytes[at] = b"0123456789-,[]{}\"e.\\"[rng.random_range(0..20)],
                    2 => bytes.truncate(at + 1),
                    _ => bytes.insert(at, rng.random()),
                }
                fs::write(&path, &bytes).unwrap();
                if let Ok(found) = load(&manifest, false) {
                    assert_eq!(found.manifest.fault(), None, "round {round}");
                    // Without its seal it is that of an older version, which is compared with the file's length.
                    let same = found.header == record.header;
                    assert!(same || found.header.len() != record.header.len(), "round {round}");
                }
            }
            fs::write(&path, &original).unwrap();
        }
    }
}

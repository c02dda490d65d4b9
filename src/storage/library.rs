//! Manifests recorded on this machine, so that a model can be named and its header read while its
//! file system is not mounted: `SERIAL/FILE.json`, and beside it the file's header.

use std::fs;
use std::path::{Path, PathBuf};

use super::extents::Manifest;

/// Where manifests are kept for all users.
pub const SYSTEM: &str = "/var/lib/nt";

/// Folders of manifests, the preferred one first.
#[derive(Clone, Debug)]
pub struct Library {
    folders: Vec<PathBuf>,
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
    /// The machine's folder, then the user's.
    fn default() -> Library {
        let var = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let own = var("XDG_DATA_HOME").or_else(|| var("HOME").map(|h| h.join(".local/share")));
        Library::at([PathBuf::from(SYSTEM)].into_iter().chain(own.map(|d| d.join("nt"))).collect())
    }
}

impl Library {
    /// A library in these folders.
    pub fn at(folders: Vec<PathBuf>) -> Library {
        Library { folders }
    }

    /// Records a manifest in the first folder that can be written; gives its path.
    ///
    /// # Errors
    /// If no folder can be written: the last one's reason.
    pub fn save(&self, recorded: &Recorded) -> Result<PathBuf, String> {
        let mut why = "there is no folder for manifests".to_owned();
        for folder in &self.folders {
            match save(folder, recorded) {
                Ok(path) => return Ok(path),
                Err(e) => why = format!("{}: {e}", folder.display()),
            }
        }
        Err(why)
    }

    /// Every manifest, folder by folder; one that cannot be read is an error with its path.
    pub fn all(&self) -> Vec<Result<Manifest, String>> {
        let mut found = Vec::new();
        for folder in self.folders.iter().flat_map(|f| list(f)) {
            let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
            let mut paths: Vec<PathBuf> = entries.map(|e| e.path()).collect();
            // Members of a group may write here: nothing but a regular file is opened.
            paths.retain(|p| p.extension().is_some_and(|e| e == "json") && p.is_file());
            paths.sort();
            found
                .extend(paths.iter().map(|p| load(p).map(|r| r.manifest).map_err(|e| format!("{}: {e}", p.display()))));
        }
        found
    }

    /// Manifests of the file that `model` names: by the path it had, by its file name, or by its
    /// name without `.gguf`; with `serial`, only those on that drive.
    ///
    /// # Errors
    /// If one that matches by its own name cannot be used.
    pub fn find(&self, model: &Path, serial: Option<&str>) -> Result<Vec<Recorded>, String> {
        let Some(wanted) = model.file_name().map(|n| n.to_string_lossy().into_owned()) else { return Ok(Vec::new()) };
        let named_only = model.components().count() == 1;
        let full = std::path::absolute(model).unwrap_or_else(|_| model.to_path_buf());
        let mut found = Vec::new();
        for folder in self.folders.iter().flat_map(|f| list(f)) {
            for name in [wanted.clone(), format!("{wanted}.gguf")] {
                let path = folder.join(format!("{name}.json"));
                if !path.exists() {
                    continue;
                }
                let recorded = load(&path).map_err(|e| format!("{}: {e}", path.display()))?;
                let m = &recorded.manifest;
                if serial.is_none_or(|s| s == m.serial) && (named_only || serial.is_some() || m.path == full) {
                    found.push(recorded);
                }
            }
        }
        Ok(found)
    }
}

fn list(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries.map(|e| e.path()).filter(|p| p.is_dir()).collect();
    found.sort();
    found
}

/// A serial as a folder's name.
fn folder_name(serial: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '_' };
    serial.chars().map(plain).collect()
}

fn save(folder: &Path, recorded: &Recorded) -> std::io::Result<PathBuf> {
    let m = &recorded.manifest;
    let folder = folder.join(folder_name(&m.serial));
    fs::create_dir_all(&folder)?;
    let path = folder.join(format!("{}.json", m.file));
    // The manifest last, and each file whole or not at all.
    for (path, bytes) in
        [(folder.join(format!("{}.header", m.file)), recorded.header.clone()), (path.clone(), serde_json::to_vec(m)?)]
    {
        let part = path.with_extension("part");
        fs::write(&part, bytes)?;
        fs::File::open(&part)?.sync_all()?;
        fs::rename(&part, &path)?;
    }
    Ok(path)
}

fn load(path: &Path) -> Result<Recorded, String> {
    let text = fs::read(path).map_err(|e| e.to_string())?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    if let Some(fault) = manifest.fault() {
        return Err(fault);
    }
    let header = path.with_extension("header");
    let header = fs::read(&header).map_err(|e| format!("{}: {e}", header.display()))?;
    Ok(Recorded { manifest, header })
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
        assert_eq!(find("m.gguf", None), ["S2", "S 1/x"]);
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
        let e = library.find(Path::new("m.gguf"), None).unwrap_err();
        assert!(e.contains("extents end at byte 3") && e.contains(path.to_str().unwrap()), "{e}");
    }
}

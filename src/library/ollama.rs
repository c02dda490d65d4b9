//! Ollama's store: `manifests/HOST/NAMESPACE/MODEL/TAG` are small JSON files that name blobs by digest, and
//! `blobs/sha256-HEX` hold the models as GGUF files. The store may be another user's: nothing in it is trusted
//! beyond what is checked here, and no link out of it is followed.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Catalog, ENTRIES_MAX, Entry, Header, Place, entries, open_regular, printable};

/// Manifests are about a kilobyte.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;
const MODEL: &str = "application/vnd.ollama.image.model";
const ADAPTER: &str = "application/vnd.ollama.image.adapter";
/// What Ollama leaves out of names.
const HOST: &str = "registry.ollama.ai";
const NAMESPACE: &str = "library";
const TAG: &str = "latest";

#[derive(Deserialize)]
struct Manifest {
    #[serde(default)]
    layers: Vec<Layer>,
}

#[derive(Deserialize)]
struct Layer {
    #[serde(rename = "mediaType", default)]
    media_type: String,
    #[serde(default)]
    digest: String,
    #[serde(default)]
    size: u64,
}

/// Adds the models that the store's manifests name.
pub(super) fn scan(place: &Place, catalog: &mut Catalog) {
    let mut found = Vec::new();
    let mut left = ENTRIES_MAX;
    walk(&place.path.join("manifests"), &mut Vec::new(), &mut left, &mut found, catalog);
    if left == 0 {
        catalog.notes.push(format!("{}: more than {ENTRIES_MAX} manifests; the rest is not listed", place.shown()));
    }
    found.sort();
    for words in found {
        catalog.entries.push(entry(place, &words));
    }
}

/// The four words of each manifest's path. What Ollama could not have named is passed over.
fn walk(folder: &Path, words: &mut Vec<String>, left: &mut usize, found: &mut Vec<[String; 4]>, catalog: &mut Catalog) {
    for entry in entries(folder, left, catalog) {
        let Some(name) = entry.file_name().to_str().filter(|n| is_word(n)).map(str::to_owned) else { continue };
        words.push(name);
        match (entry.file_type(), <[String; 4]>::try_from(words.clone())) {
            (_, Ok(four)) => found.push(four),
            (Ok(t), Err(_)) if t.is_dir() => walk(&entry.path(), words, left, found, catalog),
            _ => {}
        }
        words.pop();
    }
}

/// Whether Ollama could have this as a part of a name; `..` and separators are none.
fn is_word(word: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    (1..=350).contains(&word.len()) && word.starts_with(|c: char| c.is_ascii_alphanumeric()) && word.chars().all(plain)
}

fn entry(place: &Place, words: &[String; 4]) -> Entry {
    let [host, namespace, model, tag] = words.each_ref().map(String::as_str);
    let path = place.path.join("manifests").join(host).join(namespace).join(model).join(tag);
    let name = match (host, namespace) {
        (HOST, NAMESPACE) => format!("{model}:{tag}"),
        (HOST, _) => format!("{namespace}/{model}:{tag}"),
        _ => format!("{host}/{namespace}/{model}:{tag}"),
    };
    let aliases = vec![format!("{host}/{namespace}/{model}:{tag}")];
    let (path, bytes, fault) = match blob(&place.path, &path) {
        Ok((blob, bytes)) => (blob, Some(bytes), None),
        Err(why) => (path, None, Some(why)),
    };
    Entry { name, place: place.shown(), path, bytes, fault, aliases, header: Header::File }
}

/// `HOST/NAMESPACE/MODEL:TAG` of a name as users of Ollama write it; `None` if it is none.
pub(super) fn full_name(name: &str) -> Option<String> {
    let (model, tag) = match name.rsplit_once(':') {
        Some((model, tag)) if !tag.contains('/') => (model, tag),
        _ => (name, TAG),
    };
    let words: Vec<&str> = model.split('/').collect();
    let full = match words[..] {
        [model] => [HOST, NAMESPACE, model],
        [namespace, model] => [HOST, namespace, model],
        [host, namespace, model] => [host, namespace, model],
        _ => return None,
    };
    (full.iter().all(|w| is_word(w)) && is_word(tag)).then(|| format!("{}:{tag}", full.join("/")))
}

/// The file of a manifest's model, and its bytes; or what is wrong.
fn blob(store: &Path, manifest: &Path) -> Result<(PathBuf, u64), String> {
    let manifest = within(store, manifest)?;
    let (file, len) = open_regular(&manifest).map_err(|e| format!("its manifest: {e}"))?;
    if len > MANIFEST_BYTES_MAX {
        return Err(format!("its manifest has {len} bytes; at most {MANIFEST_BYTES_MAX} were expected"));
    }
    let mut text = Vec::new();
    file.take(MANIFEST_BYTES_MAX).read_to_end(&mut text).map_err(|e| format!("its manifest: {e}"))?;
    let parsed: Manifest = serde_json::from_slice(&text).map_err(|e| format!("its manifest is no manifest: {e}"))?;
    if parsed.layers.iter().any(|l| l.media_type == ADAPTER) {
        return Err("it has an adapter (LoRA), which nt does not apply".into());
    }
    let models: Vec<&Layer> = parsed.layers.iter().filter(|l| l.media_type == MODEL).collect();
    let [layer] = models[..] else {
        return Err(format!("its manifest names {} GGUF files; one was expected", models.len()));
    };
    let hex =
        layer.digest.strip_prefix("sha256:").filter(|h| h.len() == 64 && h.chars().all(|c| c.is_ascii_hexdigit()));
    let hex =
        hex.ok_or_else(|| format!("its manifest names the blob {:?}, which is no sha256", shorten(&layer.digest)))?;
    let path = within(store, &store.join("blobs").join(format!("sha256-{hex}")))?;
    let (_, len) = open_regular(&path).map_err(|e| format!("its blob sha256-{hex}: {e}"))?;
    if len != layer.size {
        let pull = "`ollama pull` fetches it again";
        return Err(format!("its blob has {len} bytes, but its manifest says {}; {pull}", layer.size));
    }
    Ok((path, len))
}

/// `path` with its links followed, which must not lead out of the store.
fn within(store: &Path, path: &Path) -> Result<PathBuf, String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let follow = |path: &Path| path.canonicalize().map_err(|e| format!("{name}: {e}"));
    let (root, real) = (follow(store)?, follow(path)?);
    if real.starts_with(&root) {
        return Ok(real);
    }
    Err(format!("{name} is a link out of the store, to {}", printable(&real.to_string_lossy())))
}

fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn names_are_completed_as_ollama_does() {
        for (name, full) in [
            ("qwen2.5", "registry.ollama.ai/library/qwen2.5:latest"),
            ("qwen2.5:14b-instruct-q4_K_M", "registry.ollama.ai/library/qwen2.5:14b-instruct-q4_K_M"),
            ("me/m:x", "registry.ollama.ai/me/m:x"),
            ("hf.co/bartowski/M-GGUF:Q4_K_M", "hf.co/bartowski/M-GGUF:Q4_K_M"),
            ("localhost:5000/a/m", "localhost:5000/a/m:latest"),
        ] {
            assert_eq!(full_name(name).as_deref(), Some(full));
        }
        for bad in ["", "..", "a/../b", "a//b", "/a", "a:", ":x", "a/b/c/d", "a b", "a:..", "../m:x", ".hidden"] {
            assert_eq!(full_name(bad), None, "{bad}");
        }
    }

    /// A store with one model of 4 bytes called `m:latest`, whose manifest is then bent.
    fn fault(bend: impl FnOnce(&Path, &Path)) -> String {
        let d = tempfile::tempdir().unwrap();
        let folder = d.path().join("manifests/registry.ollama.ai/library/m");
        fs::create_dir_all(&folder).unwrap();
        fs::create_dir_all(d.path().join("blobs")).unwrap();
        let digest = "a".repeat(64);
        fs::write(d.path().join(format!("blobs/sha256-{digest}")), b"GGUF").unwrap();
        let manifest = format!(r#"{{"layers":[{{"mediaType":"{MODEL}","digest":"sha256:{digest}","size":4}}]}}"#);
        fs::write(folder.join("latest"), manifest).unwrap();
        bend(&folder.join("latest"), &d.path().join(format!("blobs/sha256-{digest}")));
        let mut catalog = Catalog::default();
        scan(&Place::at(d.path(), true), &mut catalog);
        assert_eq!(catalog.entries.len(), 1);
        assert_eq!(catalog.entries[0].name, "m:latest");
        catalog.entries[0].fault.clone().unwrap_or_default()
    }

    #[test]
    fn a_manifest_that_cannot_be_used_is_an_entry_with_its_reason() {
        assert_eq!(fault(|_, _| {}), "");
        let rewrite = |text: &'static str| fault(move |m, _| fs::write(m, text).unwrap());
        for (text, words) in [
            ("garbage", "no manifest"),
            ("{}", "names 0 GGUF files"),
            (r#"{"layers":[{"mediaType":"application/vnd.ollama.image.adapter"}]}"#, "adapter"),
            (
                r#"{"layers":[{"mediaType":"application/vnd.ollama.image.model","digest":"sha256:../../../etc/passwd"}]}"#,
                "no sha256",
            ),
        ] {
            assert!(rewrite(text).contains(words), "{words}");
        }
        let huge = fault(|m, _| fs::File::options().write(true).open(m).unwrap().set_len(2 << 20).unwrap());
        assert!(huge.contains("bytes; at most"), "{huge}");
        let fifo = fault(|m, _| {
            fs::remove_file(m).unwrap();
            nix::unistd::mkfifo(m, nix::sys::stat::Mode::S_IRWXU).unwrap();
        });
        assert!(fifo.contains("no regular file"), "{fifo}");
        let short = fault(|_, b| fs::write(b, b"GG").unwrap());
        assert!(short.contains("2 bytes") && short.contains("says 4"), "{short}");
        let gone = fault(|_, b| fs::remove_file(b).unwrap());
        assert!(gone.contains("No such file"), "{gone}");
        for which in [true, false] {
            let link = fault(|m, b| {
                let path = if which { m } else { b };
                fs::remove_file(path).unwrap();
                std::os::unix::fs::symlink("/proc/version", path).unwrap();
            });
            assert!(link.contains("out of the store"), "{link}");
        }
    }
}

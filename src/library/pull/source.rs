//! What `nt pull` was asked for: addresses of files, and where each goes below the library's folder.

use std::path::PathBuf;

use super::PullError;
use super::url::{self, Url};

/// Shards of a model at most.
const SHARDS_MAX: u32 = 4096;
/// Bytes of a name at most; file systems take 255, and a suffix is added.
const NAME_MAX: usize = 200;

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Remote {
    /// Where it is.
    pub url: Url,
    /// Where it goes, below the library's folder.
    pub to: PathBuf,
    /// Number of the shard, from 0, and their count.
    pub shard: Option<(u32, u32)>,
}

/// A repository of Hugging Face's, or a bare address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// `hf:OWNER/NAME`.
    Hub {
        /// `OWNER/NAME`.
        repo: String,
    },
    /// An address.
    Address,
}

/// The files of a reference, the first shard first.
///
/// # Errors
/// If it is none, or its name is none that a file may have.
pub(super) fn files(reference: &str, endpoint: &Url, revision: &str) -> Result<(Place, Vec<Remote>), PullError> {
    match reference.strip_prefix("hf:") {
        Some(rest) => hub(rest, endpoint, revision),
        None => Ok((Place::Address, address(reference)?)),
    }
}

fn hub(rest: &str, endpoint: &Url, revision: &str) -> Result<(Place, Vec<Remote>), PullError> {
    let wrong =
        || PullError::Usage(format!("hf:{rest} is no file of Hugging Face's; hf:OWNER/NAME:FILE.gguf was expected"));
    let (repo, file) = rest.split_once(':').ok_or_else(wrong)?;
    let (owner, name) = repo.split_once('/').ok_or_else(wrong)?;
    let plain = |s: &str| s.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if [owner, name].iter().any(|s| s.is_empty() || s.starts_with('.') || s.len() > NAME_MAX || !plain(s)) {
        return Err(wrong());
    }
    let parts: Vec<&str> = file.split('/').collect();
    for part in &parts {
        check_name(part)?;
    }
    let (last, folders) = parts.split_last().ok_or_else(wrong)?;
    let files = shards(last)?.into_iter().map(|(file, shard)| {
        let within: Vec<&str> = folders.iter().copied().chain([file.as_str()]).collect();
        let within = within.join("/");
        let path = format!("/{owner}/{name}/resolve/{}/{}", url::encoded(revision, false), url::encoded(&within, true));
        Ok(Remote { url: endpoint.below(&path)?, to: PathBuf::from(owner).join(name).join(within), shard })
    });
    Ok((Place::Hub { repo: repo.to_owned() }, files.collect::<Result<_, PullError>>()?))
}

fn address(text: &str) -> Result<Vec<Remote>, PullError> {
    let url = Url::parse(text).map_err(|why| {
        PullError::Usage(format!("{}: {why}; https://… or hf:OWNER/NAME:FILE.gguf was expected", url::shown(text)))
    })?;
    let (folder, last) = url.path().rsplit_once('/').unwrap_or(("", ""));
    if folder.contains("/blob/") && url.host().ends_with("huggingface.co") {
        return Err(PullError::Usage(format!(
            "{} is the page of a file; the file itself is at the address with /resolve/ in place of /blob/",
            url.shown()
        )));
    }
    let name = url::decoded(last);
    check_name(&name)?;
    let files = shards(&name)?.into_iter().map(|(file, shard)| {
        let url = url.with_path(&format!("{folder}/{}", url::encoded(&file, false)))?;
        Ok(Remote { url, to: PathBuf::from(file), shard })
    });
    files.collect()
}

/// Refuses what is no plain name of a file or folder.
fn check_name(name: &str) -> Result<(), PullError> {
    let plain = !name.is_empty() && !name.starts_with('.') && name.len() <= NAME_MAX;
    if plain && !name.chars().any(|c| c.is_control() || matches!(c, '/' | '\\')) {
        return Ok(());
    }
    Err(PullError::Usage(format!(
        "{name:?} is no name that a file of the library may have; one of up to {NAME_MAX} bytes without / that does not begin with a dot was expected"
    )))
}

type Shards = Vec<(String, Option<(u32, u32)>)>;

/// All shards of the model that the file belongs to, or the file.
fn shards(name: &str) -> Result<Shards, PullError> {
    let ends = name.len().checked_sub(5).and_then(|at| name.get(at..));
    if !ends.is_some_and(|e| e.eq_ignore_ascii_case(".gguf")) {
        return Err(PullError::Usage(format!(
            "{name:?} is no GGUF file by its name; one that ends in .gguf was expected"
        )));
    }
    let (stem, end) = name.split_at(name.len() - 5);
    let number = |s: &str| (s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse::<u32>().ok())?;
    let parsed = stem.rsplit_once("-of-").and_then(|(rest, count)| {
        let (model, no) = rest.rsplit_once('-')?;
        Some((model, number(no)?, number(count)?))
    });
    let Some((model, no, count)) = parsed else { return Ok(vec![(name.to_owned(), None)]) };
    if !(1..=count).contains(&no) || count > SHARDS_MAX {
        return Err(PullError::Usage(format!("{name:?} is shard {no} of {count}; at most {SHARDS_MAX} are possible")));
    }
    Ok((0..count).map(|i| (format!("{model}-{:05}-of-{count:05}{end}", i + 1), Some((i, count)))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(reference: &str) -> Result<Vec<(String, String)>, String> {
        let hub = Url::parse("https://huggingface.co").unwrap();
        let (_, files) = files(reference, &hub, "main").map_err(|e| e.to_string())?;
        Ok(files.into_iter().map(|f| (f.url.to_string(), f.to.display().to_string())).collect())
    }

    #[test]
    fn references_are_files_and_places() {
        assert_eq!(
            all("hf:a-b/c.d:Q4/m é.gguf").unwrap(),
            [("https://huggingface.co/a-b/c.d/resolve/main/Q4/m%20%C3%A9.gguf".into(), "a-b/c.d/Q4/m é.gguf".into())]
        );
        assert_eq!(
            all("http://h:81/x/m%20n.GGUF?download=true#f").unwrap(),
            [("http://h:81/x/m%20n.GGUF?download=true".into(), "m n.GGUF".into())]
        );
    }

    #[test]
    fn any_shard_stands_for_all() {
        let files = all("https://h/d/m-00002-of-00003.gguf?k=1").unwrap();
        let urls: Vec<&str> = files.iter().map(|f| f.0.as_str()).collect();
        assert_eq!(
            urls,
            [1, 2, 3].map(|i| format!("https://h/d/m-0000{i}-of-00003.gguf?k=1")).iter().collect::<Vec<_>>()
        );
        assert_eq!(files[2].1, "m-00003-of-00003.gguf");
        for wrong in
            ["https://h/m-00004-of-00003.gguf", "https://h/m-00000-of-00003.gguf", "https://h/m-00001-of-99999.gguf"]
        {
            assert!(all(wrong).unwrap_err().contains("is shard"), "{wrong}");
        }
    }

    #[test]
    fn what_is_no_reference_is_refused_in_a_sentence() {
        for wrong in [
            "",
            "m.gguf",
            "hf:",
            "hf:a/b",
            "hf:a:m.gguf",
            "hf:/b:m.gguf",
            "hf:../b:m.gguf",
            "hf:a/..:m.gguf",
            "hf:a/b/c:m.gguf",
            "hf:a/b:../m.gguf",
            "hf:a/b:/etc/m.gguf",
            "hf:a/b:x//m.gguf",
            "hf:a/b:.m.gguf",
            "hf:a/b:m.bin",
            "hf:a/b:m\u{1b}.gguf",
            "ftp://h/m.gguf",
            "file:///m.gguf",
            "https://h/",
            "https://h/m",
            "https://u:p@h/m.gguf",
            "https:///m.gguf",
            "https://h/..%2f..%2fm.gguf",
            "https://h/%00.gguf",
            "https://h/.gguf",
            "https://h/%2e%2e%2fm.gguf",
            "https://huggingface.co/a/b/blob/main/m.gguf",
        ] {
            let why = all(wrong).unwrap_err();
            assert!(why.contains("expected") || why.contains("/resolve/"), "{wrong}: {why}");
        }
        assert!(!all("https://u:secret@h/m.gguf").unwrap_err().contains("secret"));
    }
}

//! Model files as they are read to be staged or recorded: opened once, so that the header that is parsed, the bytes that
//! are copied or mapped and the sums that are kept are all of one file, whatever its path may lead to meanwhile.

use std::fs::{File, Metadata};
use std::io::{BufReader, Error, Read, Result, Seek};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::safe;
use crate::gguf::{Gguf, GgufError};

/// An open file.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    file: File,
    size: u64,
    /// When it was last written to, as seconds and nanoseconds.
    written: (i64, i64),
}

/// Opens a model (a folder stands for the one in it), and each of its files in the order of its shards.
///
/// # Errors
/// As [`Gguf::open`].
pub fn model(path: &Path) -> std::result::Result<(Gguf, Vec<Source>), GgufError> {
    let path = Gguf::file_of(path)?;
    let mut opened = Vec::new();
    let gguf = Gguf::open_with(&path, &mut |path| {
        let io = |source| GgufError::Io { path: path.to_path_buf(), source };
        let source = Source::open(path).map_err(io)?;
        let input = source.input().map_err(io)?;
        opened.push(source);
        Ok(input)
    })?;
    let mut sources = Vec::new();
    for shard in &gguf.shards {
        // One that was asked for its number alone was opened before as well; the last is the one that counts.
        let at = opened.iter().rposition(|s| s.path == shard.path);
        sources.extend(at.map(|at| opened.remove(at)));
    }
    Ok((gguf, sources))
}

impl Source {
    /// Opens a regular file for reading; anything else, which could keep its reader waiting, is an error.
    ///
    /// # Errors
    /// If it cannot be opened or is no regular file.
    pub fn open(path: &Path) -> Result<Source> {
        let file = safe::open(path)?;
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(Error::other("it is no regular file"));
        }
        Ok(Source { path: path.to_path_buf(), file, size: found.len(), written: written(&found) })
    }

    /// Its path when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file from its first byte on, and its length.
    ///
    /// # Errors
    /// If the system gives no further descriptor.
    pub fn input(&self) -> Result<(Box<dyn Read>, u64)> {
        let mut file = self.file.try_clone()?;
        file.rewind()?;
        Ok((Box::new(BufReader::with_capacity(1 << 16, file)), self.size))
    }

    /// Its first `len` bytes, or all of them.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn head(&self, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len.min(self.size) as usize];
        self.file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// Whether nobody wrote to it since it was opened.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn is_unchanged(&self) -> Result<bool> {
        let now = self.file.metadata()?;
        Ok((now.len(), written(&now)) == (self.size, self.written))
    }

    /// Its file name and its whole path, for records and tables, which are written in UTF-8.
    ///
    /// # Errors
    /// If it is not UTF-8: a sentence.
    pub fn names(&self) -> std::result::Result<(String, PathBuf), String> {
        let path = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        let name = path.file_name().and_then(|n| n.to_str()).map(str::to_owned);
        match (name, path.to_str()) {
            (Some(name), Some(_)) => Ok((name, path)),
            _ => {
                Err("its path is not UTF-8, which records and tables of drives are written in; rename what is not"
                    .into())
            }
        }
    }
}

fn written(meta: &Metadata) -> (i64, i64) {
    (meta.mtime(), meta.mtime_nsec())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An open file of 5000 sevens at whose path another one, of 4000 eights, lies by now; and where it lies itself.
    pub(in super::super) fn swapped(folder: &Path) -> (Source, PathBuf) {
        let (path, moved) = (folder.join("a.gguf"), folder.join("b"));
        std::fs::write(&path, [7; 5000]).unwrap();
        let source = Source::open(&path).unwrap();
        std::fs::rename(&path, &moved).unwrap();
        std::fs::write(&path, [8; 4000]).unwrap();
        (source, moved)
    }

    /// A file swapped after it was opened, and before each further look at it: all looks are at the first.
    #[test]
    fn every_look_is_at_the_file_that_was_opened() {
        let folder = tempfile::tempdir().unwrap();
        let (source, moved) = swapped(folder.path());
        for _ in 0..2 {
            let (mut input, len) = source.input().unwrap();
            let mut bytes = Vec::new();
            input.read_to_end(&mut bytes).unwrap();
            assert_eq!((bytes, len), (vec![7; 5000], 5000));
            assert_eq!(source.head(9000).unwrap(), [7; 5000]);
        }
        assert!(source.is_unchanged().unwrap());
        File::options().write(true).open(moved).unwrap().set_len(6000).unwrap();
        assert!(!source.is_unchanged().unwrap());
    }

    /// What is given first may be any shard; each file is there once, and is the one that its header was read from.
    #[test]
    fn a_models_files_are_those_that_were_parsed() {
        let folder = Path::new("tests/fixtures/cases");
        let (gguf, sources) = model(&folder.join("chat-plain.gguf")).unwrap();
        assert_eq!((gguf.shards.len(), sources.len()), (1, 1));
        assert_eq!(sources[0].path(), gguf.shards[0].path);
        assert_eq!(sources[0].size(), gguf.shards[0].len);
        assert!(model(Path::new("/no/such.gguf")).unwrap_err().to_string().contains("/no/such.gguf"));
        let pipe = tempfile::tempdir().unwrap();
        let pipe = pipe.path().join("m.gguf");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(model(&pipe).unwrap_err().to_string().contains("neither a regular file"));
    }

    /// Somebody swaps the model all the time: the header that was parsed is that of the file that will be copied.
    #[test]
    fn race_of_a_swap_between_header_and_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["chat-plain", "add-eos"] {
            std::fs::copy(format!("tests/fixtures/cases/{name}.gguf"), at(name)).unwrap();
        }
        let path = at("m.gguf");
        std::fs::hard_link(at("add-eos"), &path).unwrap();
        let over = std::sync::atomic::AtomicBool::new(false);
        let mut seen = std::collections::BTreeSet::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    for name in ["chat-plain", "add-eos"] {
                        std::fs::hard_link(at(name), at("next")).unwrap();
                        std::fs::rename(at("next"), &path).unwrap();
                    }
                }
            });
            for _ in 0..1000 {
                let (gguf, sources) = model(&path).unwrap();
                let (input, len) = sources[0].input().unwrap();
                let again = Gguf::parse(&path, input, len).unwrap();
                assert_eq!((gguf.shards[0].len, gguf.data_start(0)), (len, again.data_start(0)));
                seen.insert(len);
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert!(!seen.is_empty());
    }
}

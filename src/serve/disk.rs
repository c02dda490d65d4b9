//! Prompts that are kept on disk while their model is not loaded (`--cache-dir`): written when the server ends or loads
//! another model, taken over when it is loaded next.
//!
//! A file is one of `nt chat`'s saved conversations (`engine/saved`) without messages, for its owner alone. Its name
//! says which model it is of; that its bytes are what this session would compute is shown by computing the first
//! positions anew. What is damaged or of another model is never used.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use super::prefix::{KEPT_MAX, Kept};
use crate::engine::{EngineError, Opened, Saved, SavedError, Session};
use crate::gguf::TensorType;
use crate::state::SeqId;
use crate::units::format_bytes;

/// What such a file's name ends with.
const END: &str = ".nt-prompt";
/// Tensors of which some bytes tell one model from another.
const SAMPLES: usize = 16;
/// Bytes of each.
const SAMPLE_BYTES: usize = 4096;

/// A folder of prompts.
#[derive(Clone, Debug)]
pub struct Shelf {
    folder: PathBuf,
    /// Bytes of all its files at most.
    most: u64,
    /// Begins the names of this model's files.
    model: String,
}

/// A file of the folder.
struct Shelved {
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

impl Shelf {
    /// A folder for the prompts of a model whose cache has elements of `kv`; it is made if it is not there.
    ///
    /// # Errors
    /// If it cannot be made or written to.
    pub fn new(folder: &Path, most: u64, opened: &Opened, kv: TensorType) -> std::io::Result<Shelf> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        // Whether it can be written is known before hours of work.
        drop(tempfile::NamedTempFile::new_in(folder)?);
        let mut sum = Sha256::new();
        opened.gguf.shards.iter().for_each(|s| sum.update(s.len.to_le_bytes()));
        for t in &opened.gguf.tensors {
            sum.update(t.name.as_bytes());
            sum.update(format!(" {:?} {:?} {}\n", t.ty, t.shape, t.offset));
        }
        sample(opened, &mut sum);
        sum.update(kv.to_string());
        Ok(Shelf { folder: folder.into(), most, model: hex(sum) })
    }

    /// What the names of files begin with whose bits this session computes.
    fn prefix(&self, session: &Session) -> String {
        let backend: String = session.backend_name().chars().filter(char::is_ascii_alphanumeric).collect();
        format!("{}-{backend}-", self.model)
    }

    /// The folder's files whose names begin so, the one that was used last first.
    fn files(&self, prefix: &str) -> Vec<Shelved> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut files: Vec<Shelved> = entries
            .filter(|e| e.file_name().to_str().is_some_and(|n| n.ends_with(END) && n.starts_with(prefix)))
            .filter_map(|e| {
                let meta = e.metadata().ok().filter(fs::Metadata::is_file)?;
                let used = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                Some(Shelved { path: e.path(), bytes: meta.len(), used })
            })
            .collect();
        files.sort_by_key(|f| std::cmp::Reverse(f.used));
        files
    }

    /// Takes prompts over into sequences next to `root`, those used last first, as long as half of the cache stays free.
    pub fn load(&self, session: &mut Session, root: SeqId, kept: &mut Kept<SeqId>, stop: &dyn Fn() -> bool) {
        // A state behind all tokens is in no page.
        if session.recurrent() {
            return;
        }
        let free = session.free_pages();
        let mut found = Vec::new();
        for file in self.files(&self.prefix(session)) {
            if stop() || session.free_pages() < free / 2 || found.len() == KEPT_MAX {
                break;
            }
            match self.load_one(&file.path, session, root, free / 2, stop) {
                Ok(Some(one)) => found.push(one),
                Ok(None) => {}
                Err(why) => {
                    tracing::warn!("{}: {why}; the prompt in it is not taken over", file.path.display());
                    // It is one of this folder's own, by its name.
                    let _ = fs::remove_file(&file.path);
                }
            }
        }
        // What is added last counts as used last.
        for (seq, tokens) in found.into_iter().rev() {
            for gone in kept.add(seq, tokens) {
                let _ = session.close(gone);
            }
        }
    }

    fn load_one(
        &self,
        path: &Path,
        session: &mut Session,
        root: SeqId,
        spare: usize,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<(SeqId, Vec<u32>)>, String> {
        let saved = match Saved::open(path) {
            Err(SavedError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|e| e.to_string())?,
        };
        let (tokens, prompt) = saved.tokens();
        let tokens = tokens.to_vec();
        if tokens.len() > session.n_ctx() {
            return Ok(None);
        }
        let needed = session.pages_needed(root, tokens.len()).map_err(|e| e.to_string())?;
        if needed + spare > session.free_pages() {
            return Ok(None);
        }
        if prompt != tokens.len() {
            return Err("not all of its tokens are a prompt's".into());
        }
        let own = |e: EngineError| e.to_string();
        session.switch(root).map_err(own)?;
        let seq = session.fork_at(0).map_err(own)?;
        session.switch(seq).map_err(own)?;
        let loaded = session.load(saved, stop);
        session.switch(root).map_err(own)?;
        let why = match loaded {
            Ok(true) => return Ok(Some((seq, tokens))),
            Ok(false) => "it is damaged, or not what this model computes here".to_owned(),
            Err(_) if stop() => String::new(),
            Err(e) => e.to_string(),
        };
        session.close(seq).map_err(own)?;
        if why.is_empty() { Ok(None) } else { Err(why) }
    }

    /// Writes the prompts that are kept, those used last first, and removes the files used longest ago beyond the bound.
    pub fn save(&self, session: &mut Session, root: SeqId, kept: &Kept<SeqId>) {
        let mut left = self.most;
        let mut used = SystemTime::now();
        for (seq, tokens) in kept.by_use() {
            let mut sum = Sha256::new();
            tokens.iter().for_each(|t| sum.update(t.to_le_bytes()));
            let path = self.folder.join(format!("{}{}{END}", self.prefix(session), hex(sum)));
            let written = self.save_one(&path, session, seq, tokens);
            let _ = session.switch(root);
            // The order of the files' times is that of use, not that of writing.
            let _ = fs::File::options().append(true).open(&path).and_then(|f| f.set_modified(used));
            used -= Duration::from_millis(1);
            match written {
                Ok(bytes) if bytes <= left => left -= bytes,
                // The sizes of others are no smaller than that of a page.
                Ok(_) => break,
                Err(e) => {
                    tracing::warn!("a prompt is not kept on disk: {e}");
                    break;
                }
            }
        }
        self.prune();
    }

    fn save_one(&self, path: &Path, session: &mut Session, seq: SeqId, tokens: &[u32]) -> Result<u64, EngineError> {
        // It was taken from there, or another one with the same tokens was written.
        if let Ok(meta) = fs::metadata(path)
            && Saved::open(path).is_ok()
        {
            return Ok(meta.len());
        }
        session.switch(seq)?;
        session.save(path, &[], tokens, tokens.len())
    }

    /// Removes files, those used longest ago first, until the rest is within the bound.
    fn prune(&self) {
        let mut sum = 0u64;
        for file in self.files("") {
            sum = sum.saturating_add(file.bytes);
            if sum > self.most {
                tracing::info!(
                    "{} is removed: prompts take more than {}",
                    file.path.display(),
                    format_bytes(self.most)
                );
                let _ = fs::remove_file(&file.path);
            }
        }
    }
}

/// Adds a few bytes of tensors all over the model, so that one that was trained further has other files. Where it cannot
/// be read so, its layout has to do.
fn sample(opened: &Opened, sum: &mut Sha256) {
    let gguf = &opened.gguf;
    for t in gguf.tensors.iter().step_by(gguf.tensors.len().div_ceil(SAMPLES).max(1)) {
        let mut bytes = [0; SAMPLE_BYTES];
        let n = t.bytes.min(SAMPLE_BYTES as u64) as usize;
        let file = gguf.shards.get(t.shard).and_then(|s| fs::File::open(&s.path).ok());
        if file.is_some_and(|f| f.read_exact_at(&mut bytes[..n], t.offset).is_ok()) {
            sum.update(&bytes[..n]);
        }
    }
}

/// The first 8 bytes of a checksum.
fn hex(sum: Sha256) -> String {
    sum.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect()
}

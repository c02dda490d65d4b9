//! A model's files: the header of each shard, one tensor directory over all of them.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::header::{self, Header};
use super::{GgufError, Metadata, TensorType};

/// More shards than this are refused.
const SHARDS_MAX: u64 = 4096;

/// Gives a file's first bytes, its header at least, and its length.
pub type Source<'a> = dyn FnMut(&Path) -> Result<(Box<dyn Read>, u64), GgufError> + 'a;

/// One file of a model.
#[derive(Debug, Clone)]
pub struct Shard {
    /// Where it is.
    pub path: PathBuf,
    /// Its length in bytes.
    pub len: u64,
    /// When it had last been written to when its header was read; `None` where that is not of the file itself.
    pub modified: Option<SystemTime>,
}

/// One tensor and where its bytes are.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Name, for example `blk.0.attn_q.weight`.
    pub name: String,
    /// Element type.
    pub ty: TensorType,
    /// Extents, fastest first as the file stores them: `[cols, rows, …]`.
    pub shape: Vec<u64>,
    /// Index into [`Gguf::shards`].
    pub shard: usize,
    /// First byte in that file.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A model: metadata of the first shard, tensors of all.
#[derive(Debug, Clone, Default)]
pub struct Gguf {
    /// Format version of the first shard.
    pub version: u32,
    /// Metadata of the first shard.
    pub metadata: Metadata,
    /// All tensors in file order, shard by shard.
    pub tensors: Vec<TensorInfo>,
    /// The files.
    pub shards: Vec<Shard>,
    /// Alignment of tensor data in the first shard.
    pub alignment: u64,
    /// What of the header is read otherwise than it is written, a line each: files of Ollama's own converter.
    pub translated: Vec<String>,
    pub(super) by_name: HashMap<String, usize>,
}

impl Gguf {
    /// Reads the header of `path` and, where it is one shard of several, of the others. A folder stands for
    /// the one model in it.
    ///
    /// # Errors
    /// If a file cannot be read or used, or a folder holds no model or several.
    pub fn open(path: &Path) -> Result<Gguf, GgufError> {
        let mut times = HashMap::new();
        let mut model = Gguf::open_with(&Gguf::file_of(path)?, &mut |path| {
            let (file, meta) = header::file(path)?;
            times.insert(path.to_path_buf(), meta.modified().ok());
            Ok((file, meta.len()))
        })?;
        for shard in &mut model.shards {
            shard.modified = times.get(&shard.path).copied().flatten();
        }
        Ok(model)
    }

    /// The file to open for `path`: of a folder, the one model in it.
    ///
    /// # Errors
    /// If a folder holds no model or several.
    pub fn file_of(path: &Path) -> Result<PathBuf, GgufError> {
        if path.is_dir() { only_model(path) } else { Ok(path.to_path_buf()) }
    }

    /// As [`Gguf::open`], with headers from wherever `source` has them: for each file's path, bytes
    /// that hold its header at least, and the length of the whole file.
    pub fn open_with(path: &Path, source: &mut Source<'_>) -> Result<Gguf, GgufError> {
        let mut read = |path: &Path| source(path).and_then(|(input, len)| header::parse(path, input, len));
        let bad = |what: String| GgufError::Malformed { path: path.to_path_buf(), what };
        let mut first = read(path)?;
        let count = first.metadata.uint("split.count").unwrap_or(1);
        let no = first.metadata.uint("split.no").unwrap_or(0);
        if count > SHARDS_MAX {
            return Err(bad(format!("split.count is {count}, more than the limit of {SHARDS_MAX}")));
        }
        let mut model = Gguf { version: first.version, alignment: first.alignment, ..Gguf::default() };
        if count <= 1 {
            model.metadata = model.add_shard(path, first)?;
            model.translate();
            return Ok(model);
        }
        let stem = shard_stem(path, no, count).ok_or_else(|| {
            bad(format!(
                "is shard {} of {count}, but its name does not end in -{:05}-of-{count:05}.gguf",
                no.saturating_add(1),
                no.saturating_add(1)
            ))
        })?;
        let shard = |i: u64| {
            let mut name = stem.clone();
            name.push(format!("-{:05}-of-{count:05}.gguf", i + 1));
            path.with_file_name(name)
        };
        let check = |h: &Header, path: &Path, i: u64| {
            let found = (h.metadata.uint("split.no"), h.metadata.uint("split.count"));
            if found == (Some(i), Some(count)) {
                return Ok(());
            }
            let or_none = |v: Option<u64>| v.map_or("none".to_owned(), |v| v.to_string());
            let what = format!(
                "split.no {} of split.count {} found; {i} of {count} was expected",
                or_none(found.0),
                or_none(found.1)
            );
            Err(GgufError::Malformed { path: path.to_path_buf(), what })
        };
        let first_path = if no == 0 { path.to_path_buf() } else { shard(0) };
        if no != 0 {
            first = read(&first_path)?;
            check(&first, &first_path, 0)?;
        }
        let total = first.metadata.uint("split.tensors.count");
        model.metadata = model.add_shard(&first_path, first)?;
        for i in 1..count {
            let next = shard(i);
            let h = read(&next)?;
            check(&h, &next, i)?;
            model.add_shard(&next, h)?;
        }
        if let Some(total) = total.filter(|&t| t != model.tensors.len() as u64) {
            return Err(bad(format!(
                "split.tensors.count is {total}, but the {count} shards hold {} tensors",
                model.tensors.len()
            )));
        }
        model.translate();
        Ok(model)
    }

    /// Parses a single file's header from any source of `file_len` bytes; for tests and fuzzing.
    pub fn parse(path: &Path, input: impl Read, file_len: u64) -> Result<Gguf, GgufError> {
        let first = header::parse(path, input, file_len)?;
        let mut model = Gguf { version: first.version, alignment: first.alignment, ..Gguf::default() };
        model.metadata = model.add_shard(path, first)?;
        model.translate();
        Ok(model)
    }

    /// First byte of the tensors' data in a shard: where its header has ended.
    pub fn data_start(&self, shard: usize) -> u64 {
        let offsets = self.tensors.iter().filter(|t| t.shard == shard).map(|t| t.offset);
        offsets.min().unwrap_or_else(|| self.shards.get(shard).map_or(0, |s| s.len))
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// Bytes of all tensors.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes).sum()
    }

    /// Adds a shard's tensors after checking that each lies within the file and over no other.
    fn add_shard(&mut self, path: &Path, h: Header) -> Result<Metadata, GgufError> {
        let bad = |what: String| GgufError::Malformed { path: path.to_path_buf(), what };
        let shard = self.shards.len();
        let mut spans = Vec::with_capacity(h.tensors.len());
        for t in h.tensors {
            let offset = h.data_start.checked_add(t.data_offset);
            let end = offset.and_then(|o| o.checked_add(t.bytes));
            let (Some(offset), Some(end)) = (offset, end.filter(|&e| e <= h.file_len)) else {
                return Err(bad(format!(
                    "is truncated: tensor {} of {} bytes at data offset {} (data begins at byte {}) lies beyond the end of the file at {}",
                    t.name, t.bytes, t.data_offset, h.data_start, h.file_len
                )));
            };
            spans.push((offset, end, self.tensors.len()));
            if self.by_name.insert(t.name.clone(), self.tensors.len()).is_some() {
                return Err(bad(format!("tensor {} occurs twice", t.name)));
            }
            self.tensors.push(TensorInfo { name: t.name, ty: t.ty, shape: t.shape, shard, offset, bytes: t.bytes });
        }
        spans.sort_unstable();
        if let Some(w) = spans.windows(2).find(|w| w[0].1 > w[1].0) {
            return Err(bad(format!(
                "tensors {} (bytes {} to {}) and {} (from byte {}) overlap",
                self.tensors[w[0].2].name, w[0].0, w[0].1, self.tensors[w[1].2].name, w[1].0
            )));
        }
        self.shards.push(Shard { path: path.to_path_buf(), len: h.file_len, modified: None });
        Ok(h.metadata)
    }
}

/// The part of a shard's file name before `-00001-of-00003.gguf`. Names need not be UTF-8.
fn shard_stem(path: &Path, no: u64, count: u64) -> Option<OsString> {
    let tail = format!("-{:05}-of-{count:05}.gguf", no.saturating_add(1));
    let stem = path.file_name()?.as_bytes().strip_suffix(tail.as_bytes())?;
    Some(OsStr::from_bytes(stem).to_owned())
}

/// A file's name without the number of its shard: what all shards of a model share.
fn without_shard(name: &OsStr) -> &[u8] {
    let bytes = name.as_bytes();
    let Some(stem) = bytes.len().checked_sub("-00001-of-00003.gguf".len()) else { return bytes };
    let tail = &bytes[stem..];
    let digits = |at: std::ops::Range<usize>| tail[at].iter().all(u8::is_ascii_digit);
    let is_shard = tail[0] == b'-' && digits(1..6) && &tail[6..10] == b"-of-" && digits(10..15);
    if is_shard { &bytes[..stem] } else { bytes }
}

/// The file to open of the one model in a folder: its first shard, where it has several.
fn only_model(folder: &Path) -> Result<PathBuf, GgufError> {
    let io = |source| GgufError::Io { path: folder.to_path_buf(), source };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        if name.as_bytes().to_ascii_lowercase().ends_with(b".gguf") && !folder.join(&name).is_dir() {
            names.push(name);
        }
    }
    // A projector of images lies next to the model that it belongs to.
    let projector = |n: &OsString| n.to_string_lossy().to_lowercase().contains("mmproj");
    if !names.iter().all(projector) {
        names.retain(|n| !projector(n));
    }
    names.sort();
    let mut models = names.clone();
    models.dedup_by(|a, b| without_shard(a) == without_shard(b));
    let bad = |what: String| GgufError::Malformed { path: folder.to_path_buf(), what };
    match &models[..] {
        [] => Err(bad("is a folder without a .gguf file; name the model's file".into())),
        [one] => Ok(folder.join(one)),
        several => {
            let shown = several.iter().take(3).map(|n| n.to_string_lossy()).collect::<Vec<_>>().join(", ");
            let more = if several.len() > 3 { ", …" } else { "" };
            Err(bad(format!("is a folder with {} models ({shown}{more}); name one of them", several.len())))
        }
    }
}

//! One shard's header: a bounded reader over the file's first bytes.
//!
//! Layout (GGUF 2 and 3, little-endian): magic, version u32, tensor count u64, metadata count u64,
//! the key/value pairs, the tensor directory; then padding to `general.alignment` and the data.
//! Source: ggml/docs/gguf.md.

use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::memory::bounded::may_fail;

use super::value::{Array, Metadata, StringArray, Value};
use super::{GgufError, TensorType};

const MAGIC: &[u8; 4] = b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;

/// Stated limits of what a header may hold; real models stay far below each.
mod limit {
    pub const METADATA: u64 = 1 << 16;
    pub const TENSORS: u64 = 1 << 20;
    pub const KEY_BYTES: u64 = 1 << 16;
    pub const NAME_BYTES: u64 = 1 << 10;
    pub const STRING_BYTES: u64 = 1 << 26;
    pub const ARRAY_ELEMS: u64 = 1 << 26;
    pub const ARRAY_DEPTH: u32 = 4;
    pub const DIMS: u32 = 4;
    pub const ALIGNMENT: u64 = 1 << 30;
    /// Of all keys, values and names as they lie in memory. The largest vocabularies take 30 MiB.
    pub const MEMORY: u64 = 256 << 20;
}

/// A tensor as the directory describes it, its offset relative to the data section.
pub(super) struct RawTensor {
    pub name: String,
    pub ty: TensorType,
    pub shape: Vec<u64>,
    pub bytes: u64,
    pub data_offset: u64,
}

/// What one shard's header says.
pub(super) struct Header {
    pub version: u32,
    pub metadata: Metadata,
    pub tensors: Vec<RawTensor>,
    pub alignment: u64,
    /// First byte of the data section.
    pub data_start: u64,
    pub file_len: u64,
}

/// A file to parse a header from, and what the system says of it.
pub(super) fn file(path: &Path) -> Result<(Box<dyn Read>, std::fs::Metadata), GgufError> {
    let io = |source| GgufError::Io { path: path.to_path_buf(), source };
    // A FIFO would wait for a writer.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(io)?;
    let meta = file.metadata().map_err(io)?;
    let other = match meta.file_type() {
        t if t.is_file() => None,
        t if t.is_dir() => Some("is a folder, not a GGUF file"),
        _ => Some("is no regular file; a GGUF file was expected"),
    };
    if let Some(what) = other {
        return Err(GgufError::Malformed { path: path.to_path_buf(), what: what.into() });
    }
    Ok((Box::new(BufReader::with_capacity(1 << 16, file)), meta))
}

/// Parses a header from `input`, which holds `file_len` bytes.
pub(super) fn parse<R: Read>(path: &Path, input: R, file_len: u64) -> Result<Header, GgufError> {
    let mut r = Cursor { path, input, at: 0, len: file_len, memory: 0 };
    if file_len == 0 {
        return Err(r.bad("is empty; a GGUF file was expected"));
    }
    let mut magic = [0u8; 4];
    r.fill(&mut magic, "the magic")?;
    if &magic != MAGIC {
        let mut first = magic.to_vec();
        // What cannot be read is not needed: the first bytes alone say that it is no GGUF file.
        let _ = r.input.take(PEEK_BYTES).read_to_end(&mut first);
        let what = foreign(&first, path);
        return Err(GgufError::Malformed { path: path.to_path_buf(), what });
    }
    let version = r.u32("the version")?;
    match version {
        2 | 3 => {}
        1 => return Err(r.bad("GGUF version 1 is not supported (2 and 3 are); convert the file anew with llama.cpp")),
        v if matches!(v.swap_bytes(), 1..=3) => {
            return Err(r.bad("the file is big-endian; only little-endian GGUF is supported"));
        }
        v => return Err(r.bad(format!("GGUF version {v} is not supported; 2 and 3 are"))),
    }
    let n_tensors = r.count("tensor count", limit::TENSORS, 24)?;
    let n_metadata = r.count("metadata count", limit::METADATA, 13)?;
    let metadata = r.metadata(n_metadata)?;
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(_) => metadata.uint("general.alignment").unwrap_or(0),
    };
    if !alignment.is_power_of_two() || alignment > limit::ALIGNMENT {
        return Err(
            r.bad(format!("general.alignment is {alignment}; a power of two up to {} was expected", limit::ALIGNMENT))
        );
    }
    let tensors = (0..n_tensors).map(|i| r.tensor(i, alignment)).collect::<Result<Vec<_>, _>>()?;
    let data_start = r.at.next_multiple_of(alignment);
    Ok(Header { version, metadata, tensors, alignment, data_start, file_len })
}

/// Bytes after the magic that are looked at to tell what a file is.
const PEEK_BYTES: u64 = 60;

/// What a file is that does not begin as GGUF files do, and how the model comes instead.
fn foreign(first: &[u8], path: &Path) -> String {
    let begins = |with: &[u8]| first.len() >= with.len() && first[..with.len()].eq_ignore_ascii_case(with);
    let text = first.trim_ascii_start();
    let text_begins = |with: &[u8]| text.len() >= with.len() && text[..with.len()].eq_ignore_ascii_case(with);
    let convert = "a GGUF version of the model is needed (llama.cpp's convert_hf_to_gguf.py makes one)";
    if begins(b"version https://git-lfs") {
        "is a Git LFS pointer, not the model: `git lfs pull` in its folder fetches it".into()
    } else if first.iter().all(|&b| b == 0) {
        "begins with zeros: the download was allocated but not finished; fetch it again".into()
    } else if [b"<!do".as_slice(), b"<htm", b"<?xm", b"<hea"].iter().any(|p| text_begins(p)) {
        "is a web page, not a model: fetch the file itself (on Hugging Face the link with /resolve/)".into()
    } else if first.get(8) == Some(&b'{') && first[..8].iter().rev().take(3).all(|&b| b == 0) {
        format!("is a safetensors file, not GGUF; {convert}")
    } else if begins(b"PK") {
        format!(
            "is a ZIP archive, as PyTorch writes (.bin, .pt), or a packed download, not GGUF; unpack it, or {convert}"
        )
    } else if [b"tjgg".as_slice(), b"lmgg", b"fmgg", b"algg"].contains(&&first[..4]) {
        "is a GGML file of before August 2023, not GGUF; get a newer conversion of the model".into()
    } else if begins(b"\x80\x02") || begins(b"\x93NUMPY") {
        format!("holds Python data, not GGUF; {convert}")
    } else if [b"\x1f\x8b".as_slice(), b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"BZh", b"7z\xbc\xaf"]
        .iter()
        .any(|p| begins(p))
    {
        "is a compressed file, not GGUF; unpack it first".into()
    } else if text_begins(b"{") || text_begins(b"[") {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        match name.ends_with(".index.json") {
            true => format!("is the index of safetensors files, not GGUF; {convert}"),
            false => "is JSON (a configuration, or a server's error in place of the download), not a model".into(),
        }
    } else if let Some(line) = text_line(text) {
        format!(
            "is a text, not GGUF: it begins with \"{line}\", perhaps a server's answer in place of the download; fetch the file again"
        )
    } else {
        format!("is not a GGUF file: it begins with \"{}\", expected \"GGUF\"", first[..4].escape_ascii())
    }
}

/// The first line of a file's first bytes, if they are a text; a server's `404: Not Found`.
fn text_line(first: &[u8]) -> Option<&str> {
    // The last character may be cut.
    let text = match std::str::from_utf8(first) {
        Ok(text) => text,
        Err(e) if e.error_len().is_none() => std::str::from_utf8(&first[..e.valid_up_to()]).ok()?,
        Err(_) => return None,
    };
    let is_text = text.chars().all(|c| !c.is_control() || c.is_whitespace());
    let line = text.lines().next().filter(|line| is_text && line.chars().count() >= TEXT_MIN)?;
    Some(line.trim_end())
}

/// Characters from which on a line is taken for a text.
const TEXT_MIN: usize = 8;

/// A reader that knows where it is and never asks for more than the file holds.
struct Cursor<'a, R> {
    path: &'a Path,
    input: R,
    at: u64,
    len: u64,
    /// Bytes that what was read takes in memory.
    memory: u64,
}

impl<R: Read> Cursor<'_, R> {
    fn bad(&self, what: impl Into<String>) -> GgufError {
        GgufError::Malformed { path: self.path.to_path_buf(), what: what.into() }
    }

    fn left(&self) -> u64 {
        self.len.saturating_sub(self.at)
    }

    fn need(&self, bytes: u64, what: &str) -> Result<(), GgufError> {
        if bytes > self.left() {
            return Err(self.bad(format!(
                "is truncated: {what} at byte {} needs {bytes} bytes, but the file ends at {}",
                self.at, self.len
            )));
        }
        Ok(())
    }

    fn fill(&mut self, buf: &mut [u8], what: &str) -> Result<(), GgufError> {
        self.need(buf.len() as u64, what)?;
        self.input.read_exact(buf).map_err(|source| GgufError::Io { path: self.path.to_path_buf(), source })?;
        self.at += buf.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let mut b = [0u8; N];
        self.fill(&mut b, what)?;
        Ok(b)
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        self.bytes(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        self.bytes(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `min_bytes` each.
    fn count(&mut self, what: &str, max: u64, min_bytes: u64) -> Result<usize, GgufError> {
        let at = self.at;
        let n = self.u64(what)?;
        if n > max {
            return Err(self.bad(format!("{what} at byte {at} is {n}, more than the limit of {max}")));
        }
        if n.saturating_mul(min_bytes) > self.left() {
            return Err(self.bad(format!(
                "is truncated: {what} at byte {at} is {n}, which needs at least {} bytes, but {} are left",
                n * min_bytes,
                self.left()
            )));
        }
        usize::try_from(n).map_err(|_| self.bad(format!("{what} at byte {at} is {n}, too many for this machine")))
    }

    /// Counts memory for `n` things of so many bytes each, before it is taken.
    fn keep(&mut self, n: usize, bytes: usize, what: &str) -> Result<(), GgufError> {
        self.memory = self.memory.saturating_add((n as u64).saturating_mul(bytes as u64));
        if self.memory > limit::MEMORY {
            let limit = limit::MEMORY >> 20;
            return Err(self.bad(format!(
                "metadata and names take more than {limit} MiB of memory, which no model's do (at {what}, before byte {})",
                self.at
            )));
        }
        Ok(())
    }

    /// The bytes of a string, appended to `out`.
    fn string_into(&mut self, what: &str, max: u64, out: &mut Vec<u8>) -> Result<(), GgufError> {
        let n = self.count(&format!("length of {what}"), max, 1)?;
        self.keep(n, 1, what)?;
        let start = out.len();
        may_fail(|| out.try_reserve(n)).map_err(|_| self.bad(format!("{what} of {n} bytes does not fit in memory")))?;
        out.resize(start + n, 0);
        let mut slice = std::mem::take(out);
        let result = self.fill(&mut slice[start..], what);
        *out = slice;
        result
    }

    fn string(&mut self, what: &str, max: u64) -> Result<String, GgufError> {
        let mut bytes = Vec::new();
        self.string_into(what, max, &mut bytes)?;
        Ok(String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
    }

    fn metadata(&mut self, n: usize) -> Result<Metadata, GgufError> {
        let mut metadata = Metadata::default();
        for _ in 0..n {
            let at = self.at;
            let key = self.string("a metadata key", limit::KEY_BYTES)?;
            let kind = self.u32(&format!("the type of {key}"))?;
            let value = self.value(kind, &key, 0)?;
            if !metadata.insert(key.clone(), value) {
                return Err(self.bad(format!("metadata key {key} occurs twice, the second time at byte {at}")));
            }
        }
        Ok(metadata)
    }

    fn value(&mut self, kind: u32, key: &str, depth: u32) -> Result<Value, GgufError> {
        Ok(match kind {
            0 => Value::Int(i64::from(self.bytes::<1>(key)?[0])),
            1 => Value::Int(i64::from(i8::from_le_bytes(self.bytes(key)?))),
            2 => Value::Int(i64::from(u16::from_le_bytes(self.bytes(key)?))),
            3 => Value::Int(i64::from(i16::from_le_bytes(self.bytes(key)?))),
            4 => Value::Int(i64::from(self.u32(key)?)),
            5 => Value::Int(i64::from(i32::from_le_bytes(self.bytes(key)?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.bytes(key)?))),
            7 => Value::Bool(self.bytes::<1>(key)?[0] != 0),
            8 => Value::Str(self.string(key, limit::STRING_BYTES)?),
            9 => Value::Array(self.array(key, depth)?),
            10 => {
                let v = self.u64(key)?;
                i64::try_from(v).map_or(Value::BigUint(v), Value::Int)
            }
            11 => Value::Int(i64::from_le_bytes(self.bytes(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes(key)?)),
            other => {
                return Err(
                    self.bad(format!("metadata {key} has the unknown value type {other} (before byte {})", self.at))
                );
            }
        })
    }

    fn array(&mut self, key: &str, depth: u32) -> Result<Array, GgufError> {
        if depth >= limit::ARRAY_DEPTH {
            return Err(self.bad(format!("metadata {key} nests arrays more than {} deep", limit::ARRAY_DEPTH)));
        }
        let kind = self.u32(&format!("the element type of {key}"))?;
        let elem_bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            other => return Err(self.bad(format!("metadata {key} is an array of the unknown value type {other}"))),
        };
        let n = self.count(&format!("length of {key}"), limit::ARRAY_ELEMS, elem_bytes)?;
        match kind {
            6 | 12 => self
                .elements(n, key, |r| match r.value(kind, key, depth)? {
                    Value::Float(v) => Ok(v as f32),
                    _ => Ok(0.0),
                })
                .map(Array::Float),
            7 => self.elements(n, key, |r| Ok(r.bytes::<1>(key)?[0] != 0)).map(Array::Bool),
            8 => self.strings(n, key).map(Array::Str),
            9 => self.elements(n, key, |r| r.array(key, depth + 1)).map(Array::Nested),
            _ => self
                .elements(n, key, |r| match r.value(kind, key, depth)? {
                    Value::Int(v) => Ok(v),
                    _ => Err(r.bad(format!("metadata {key} holds an integer beyond 2^63"))),
                })
                .map(Array::Int),
        }
    }

    fn elements<T>(
        &mut self,
        n: usize,
        key: &str,
        mut read: impl FnMut(&mut Self) -> Result<T, GgufError>,
    ) -> Result<Vec<T>, GgufError> {
        self.keep(n, size_of::<T>(), key)?;
        let mut out = Vec::new();
        // The count was checked against the bytes left, so this is at most a few times the file.
        may_fail(|| out.try_reserve_exact(n))
            .map_err(|_| self.bad(format!("metadata {key} of {n} elements does not fit in memory")))?;
        for _ in 0..n {
            out.push(read(self)?);
        }
        Ok(out)
    }

    fn strings(&mut self, n: usize, key: &str) -> Result<StringArray, GgufError> {
        self.keep(n, size_of::<u64>(), key)?;
        let mut out = StringArray::default();
        for _ in 0..n {
            out.push_with(|bytes| self.string_into(key, limit::STRING_BYTES, bytes))?;
        }
        out.shrink();
        Ok(out)
    }

    fn tensor(&mut self, index: usize, alignment: u64) -> Result<RawTensor, GgufError> {
        let name = self.string(&format!("the name of tensor {index}"), limit::NAME_BYTES)?;
        let n_dims = self.u32(&format!("the dimensions of tensor {name}"))?;
        if n_dims == 0 || n_dims > limit::DIMS {
            return Err(self.bad(format!("tensor {name} has {n_dims} dimensions; 1 to {} were expected", limit::DIMS)));
        }
        let shape =
            (0..n_dims).map(|_| self.u64(&format!("the shape of tensor {name}"))).collect::<Result<Vec<_>, _>>()?;
        let id = self.u32(&format!("the type of tensor {name}"))?;
        let data_offset = self.u64(&format!("the offset of tensor {name}"))?;
        let ty = TensorType::from_id(id)
            .ok_or_else(|| self.bad(format!("tensor {name} has {}", TensorType::unknown(id))))?;
        let bytes = tensor_bytes(ty, &shape)
            .ok_or_else(|| self.bad(format!("tensor {name} of shape {shape:?} and type {ty} has no valid size (rows must be whole blocks of {}, and the size below 2^63)", ty.block_elems())))?;
        if data_offset % alignment != 0 {
            return Err(self.bad(format!(
                "tensor {name} lies at offset {data_offset}, which is no multiple of the alignment {alignment}"
            )));
        }
        self.keep(1, size_of::<RawTensor>() + size_of::<u64>() * shape.len(), &name)?;
        Ok(RawTensor { name, ty, shape, bytes, data_offset })
    }
}

/// Bytes of a tensor; `None` on overflow, a zero dimension or a row that is no whole number of blocks.
fn tensor_bytes(ty: TensorType, shape: &[u64]) -> Option<u64> {
    let cols = usize::try_from(*shape.first()?).ok()?;
    if shape.contains(&0) {
        return None;
    }
    let mut bytes = ty.row_bytes(cols)? as u64;
    for &d in &shape[1..] {
        bytes = bytes.checked_mul(d)?;
    }
    (bytes < 1 << 63).then_some(bytes)
}

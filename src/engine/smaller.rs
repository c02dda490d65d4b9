//! A model's files as requantising makes them, to be staged: the same header with other types, and smaller matrices.
//!
//! What a session gets that requantises this model while loading it, it gets from such a file as well, to the bit.

use std::cell::RefCell;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::error::{CopyError, EngineError};
use crate::backend::quantise::quantise;
use crate::backend::reference;
use crate::gguf::{Gguf, TensorType, retyped};
use crate::model::{Model, ModelError, Requantised, Turn};
use crate::storage::image::{Content, Source};

/// Bytes of the smaller file that are made at once.
const WINDOW: u64 = 8 << 20;

/// A file whose larger matrices get another type.
#[derive(Debug)]
pub struct SmallerFile {
    source: Source,
    ty: TensorType,
    header: Vec<u8>,
    size: u64,
    /// Tensors in the order of their places.
    parts: Vec<Part>,
    threads: usize,
    /// The bytes that were made last, and where they begin.
    window: RefCell<(u64, Vec<u8>)>,
}

#[derive(Debug)]
struct Part {
    name: String,
    /// Places in the file and in the smaller one.
    from: u64,
    to: u64,
    /// Bytes in the smaller one.
    bytes: u64,
    turn: Option<Turn>,
}

/// The files of a model as they become with larger matrices as `ty`, made by `threads` threads.
///
/// # Errors
/// If the model has none, or the type does not fit it; or a file's path cannot be recorded.
pub fn smaller_files(
    gguf: &Gguf,
    sources: Vec<Source>,
    ty: TensorType,
    threads: usize,
) -> Result<Vec<SmallerFile>, EngineError> {
    let model = Model::new(gguf)?;
    let requant = Requantised::new(&model, ty).map_err(ModelError::from)?;
    let mut turns: Vec<Option<Turn>> = vec![None; gguf.tensors.len()];
    for (u, unit) in model.units.iter().enumerate() {
        for (span, turn) in unit.spans.iter().zip(requant.turns(u)) {
            let holds = |t: &crate::gguf::TensorInfo| {
                t.shard == span.shard && (t.offset..t.offset + t.bytes).contains(&span.offset)
            };
            if let (Some(turn), Some(t)) = (turn, gguf.tensors.iter().position(holds)) {
                turns[t] = Some(*turn);
            }
        }
    }
    if turns.iter().all(Option::is_none) {
        return Err(CopyError::NothingLarger(ty).into());
    }
    let file = |(shard, source): (usize, Source)| SmallerFile::new(gguf, shard, source, &turns, ty, threads);
    sources.into_iter().enumerate().map(file).collect()
}

impl SmallerFile {
    fn new(
        gguf: &Gguf,
        shard: usize,
        source: Source,
        turns: &[Option<Turn>],
        ty: TensorType,
        threads: usize,
    ) -> Result<SmallerFile, EngineError> {
        let failed = |e| CopyError::Io { path: source.path().into(), source: e };
        let start = gguf.data_start(shard);
        // Each shard has an alignment of its own.
        let (input, len) = source.input().map_err(failed)?;
        let alignment = Gguf::parse(source.path(), input, len)?.alignment.max(1);
        let mut of: Vec<usize> = (0..gguf.tensors.len()).filter(|t| gguf.tensors[*t].shard == shard).collect();
        of.sort_unstable_by_key(|t| gguf.tensors[*t].offset);
        let (mut parts, mut next) = (Vec::new(), start);
        for t in of {
            let (turn, t) = (turns[t], &gguf.tensors[t]);
            let bytes = turn.map_or(t.bytes, |turn| turn.bytes(t.bytes));
            parts.push(Part { name: t.name.clone(), from: t.offset, to: next, bytes, turn });
            next = (next + bytes).next_multiple_of(alignment);
        }
        let head = source.head(start).map_err(failed)?;
        let new = |name: &str| {
            let part = parts.iter().find(|p| p.name == name)?;
            let ty = part.turn.map_or_else(|| gguf.tensor(name).map(|t| t.ty), |turn| Some(turn.to))?;
            Some((ty, part.to))
        };
        let header = retyped(&head, alignment, ty, new).ok_or_else(|| CopyError::Header(source.path().into()))?;
        Ok(SmallerFile { source, ty, header, size: next, parts, threads, window: RefCell::default() })
    }

    /// Its first bytes, up to the tensors' data.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// Makes the bytes from `at` on: of the part that begins there or has them, as many rows as a window holds.
    fn make(&self, at: u64) -> io::Result<Vec<u8>> {
        let Some(part) = self.parts.iter().rfind(|p| p.to <= at) else {
            return Ok(self.header[at as usize..].to_vec());
        };
        let left = (part.to + part.bytes).saturating_sub(at);
        if left == 0 {
            // Up to the next tensor, or the end.
            let next = self.parts.iter().map(|p| p.to).find(|to| *to > at).unwrap_or(self.size);
            return Ok(vec![0; (next - at) as usize]);
        }
        let Some(turn) = part.turn else {
            let mut bytes = vec![0; left.min(WINDOW) as usize];
            self.source.file().read_exact_at(&mut bytes, part.from + (at - part.to))?;
            return Ok(bytes);
        };
        let bytes_of = |ty: TensorType| ty.row_bytes(turn.cols).unwrap_or(1).max(1);
        let (stored, small) = (bytes_of(turn.from), bytes_of(turn.to));
        // Windows begin and end with rows, so that `at` does.
        let first = (at - part.to) / small as u64;
        let rows = (left / small as u64).min((WINDOW / small as u64).max(1));
        let mut source = vec![0; rows as usize * stored];
        self.source.file().read_exact_at(&mut source, part.from + first * stored as u64)?;
        let mut out = vec![0; rows as usize * small];
        let each = (rows as usize).div_ceil(self.threads.max(1));
        let turned = |source: &[u8], out: &mut [u8]| -> Result<(), String> {
            let mut row = vec![0.0; turn.cols];
            for (source, out) in source.chunks_exact(stored).zip(out.chunks_exact_mut(small)) {
                if !reference::dequantize(turn.from, source, &mut row) {
                    return Err(format!("{} cannot be read", turn.from));
                }
                quantise(turn.to, &row, out).map_err(|e| e.to_string())?;
            }
            Ok(())
        };
        let results: Vec<Result<(), String>> = std::thread::scope(|scope| {
            let shares = source.chunks(each * stored).zip(out.chunks_mut(each * small));
            let threads: Vec<_> = shares.map(|(s, o)| scope.spawn(move || turned(s, o))).collect();
            let ended = |t: std::thread::ScopedJoinHandle<'_, Result<(), String>>| t.join();
            threads
                .into_iter()
                .map(|t| ended(t).unwrap_or_else(|_| Err("a thread ended unexpectedly".into())))
                .collect()
        });
        let failed = results.into_iter().find_map(Result::err);
        match failed {
            None => Ok(out),
            Some(why) => {
                let rows = format!("in one of its rows {first} to {}", first + rows - 1);
                Err(io::Error::other(format!("{} cannot be requantised to {}: {rows} {why}", part.name, turn.to)))
            }
        }
    }
}

impl Content for SmallerFile {
    fn path(&self) -> &Path {
        self.source.path()
    }

    /// The file's own with the type before its ending, so that nobody takes one for the other.
    fn names(&self) -> Result<(String, PathBuf), String> {
        let (name, path) = self.source.names()?;
        let name = smaller_name(&name, self.ty);
        Ok((name.clone(), path.with_file_name(name)))
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn requant(&self) -> Option<String> {
        Some(self.ty.name().into())
    }

    fn read_at(&self, to: &mut [u8], at: u64) -> io::Result<()> {
        let mut window = self.window.borrow_mut();
        let mut done = 0;
        while done < to.len() {
            let from = at + done as u64;
            if from >= self.size {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let within = from.checked_sub(window.0).filter(|i| *i < window.1.len() as u64);
            let Some(i) = within else {
                *window = (from, self.make(from)?);
                continue;
            };
            let bytes = &window.1[i as usize..];
            let n = bytes.len().min(to.len() - done);
            to[done..done + n].copy_from_slice(&bytes[..n]);
            done += n;
        }
        Ok(())
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        self.source.is_unchanged()
    }
}

/// `model.gguf` as `model.q4_k.gguf`; of a shard, its number stays last.
fn smaller_name(name: &str, ty: TensorType) -> String {
    let stem = name.strip_suffix(".gguf").unwrap_or(name);
    // -00001-of-00003
    let number = stem.len().checked_sub(15).filter(|i| stem.is_char_boundary(*i)).map(|i| &stem[i..]);
    let is_number = |n: &&str| {
        let digits = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
        n.strip_prefix('-').and_then(|n| n.split_once("-of-")).is_some_and(|(i, n)| digits(i) && digits(n))
    };
    let number = number.filter(is_number).unwrap_or("");
    format!("{}.{}{number}.gguf", &stem[..stem.len() - number.len()], ty.name().to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_the_type_and_keep_the_shards_number() {
        for (name, new) in [
            ("m.gguf", "m.q4_k.gguf"),
            ("m", "m.q4_k.gguf"),
            ("m-00002-of-00003.gguf", "m.q4_k-00002-of-00003.gguf"),
            ("m-0000x-of-00003.gguf", "m-0000x-of-00003.q4_k.gguf"),
            ("ü-aaaaaaaaaaaaaaé.gguf", "ü-aaaaaaaaaaaaaaé.q4_k.gguf"),
        ] {
            assert_eq!(smaller_name(name, TensorType::Q4_K), new);
        }
    }
}

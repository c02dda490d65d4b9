//! A model's bytes against its record.

use std::path::{Path, PathBuf};

use super::EngineError;
use super::copies::{Place, STRIPED};
use super::source;
use crate::gguf::{Gguf, TensorInfo};
use crate::storage::{self, Corruption, ReaderKind, VerifyError};

/// What comparing a model with its record found.
#[derive(Debug)]
pub struct Verified {
    /// The model's header.
    pub gguf: Gguf,
    /// How it was read.
    pub reader: &'static str,
    /// The type that larger matrices were requantised to when the model was staged.
    pub requant: Option<String>,
    /// Every chunk that differs.
    pub corrupt: Vec<Corruption>,
    /// Files whose length differs from the recorded one: path, length and recorded length.
    pub lengths: Vec<(PathBuf, u64, u64)>,
}

impl Verified {
    /// The chunks that differ and hold bytes of a tensor.
    pub fn corrupt_in(&self, tensor: &TensorInfo) -> impl Iterator<Item = &Corruption> {
        let name = self.gguf.shards[tensor.shard].path.file_name().map(|n| n.to_string_lossy().into_owned());
        let (from, to) = (tensor.offset, tensor.offset + tensor.bytes);
        self.corrupt.iter().filter(move |c| {
            // The file's name, which may hold commas, and behind it of which copies it was read.
            let is =
                |n: &String| c.file.strip_prefix(n.as_str()).is_some_and(|r| r.is_empty() || r.starts_with(STRIPED));
            name.as_ref().is_none_or(is) && c.offset < to && from < c.offset + c.len
        })
    }
}

/// Reads the whole model from `copies` (where it lies if there are none) and compares it with what was
/// recorded. `progress` gets bytes compared and bytes to compare. Of several drives bound to vfio-pci, each is
/// read whole.
///
/// # Errors
/// If there is no record, or something cannot be read.
pub fn verify(
    model: &Path,
    copies: &[PathBuf],
    reader: ReaderKind,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Verified, EngineError> {
    let gguf = source::open_header(model, copies)?;
    let source = source::open_raw(&gguf, &Place { copies, reader, verify: true })?;
    let differs = |(i, r): (usize, &storage::Record)| {
        let shard = &gguf.shards[i];
        (shard.len != r.manifest.size).then(|| (shard.path.clone(), shard.len, r.manifest.size))
    };
    let mut corrupt = Vec::new();
    let requant = source.copies.iter().flat_map(|c| &c.records).find_map(|r| r.manifest.requant.clone());
    let n = source.copies.len() as u64;
    let (mut reader, mut lengths) = ("", Vec::new());
    // Several copies, each with its record, are each read whole; striped, half of each would be.
    for (i, copy) in source.copies.into_iter().enumerate() {
        let name = copy.reader.name();
        reader = if i == 0 || reader == name { name } else { "mixed" };
        lengths.extend(copy.records.iter().enumerate().filter_map(differs));
        if !lengths.is_empty() {
            return Ok(Verified { gguf, reader, requant, corrupt: Vec::new(), lengths });
        }
        let mut all = |done, total| progress(i as u64 * total + done, n * total);
        corrupt.extend(storage::verify(copy.reader, &copy.records, &mut all).map_err(|e| match e {
            VerifyError::Storage(e) => EngineError::Storage(e),
            VerifyError::Memory(e) => EngineError::Arena(e),
        })?);
    }
    Ok(Verified { gguf, reader, requant, corrupt, lengths })
}

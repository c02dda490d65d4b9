//! A model's files: the header of each shard, one tensor directory over all of them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::{GgufError, Metadata, TensorType};

/// One file of a model.
#[derive(Debug, Clone)]
pub struct Shard {
    /// Where it is.
    pub path: PathBuf,
    /// Its length in bytes.
    pub len: u64,
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
    /// Metadata of the first shard.
    pub metadata: Metadata,
    /// All tensors in file order, shard by shard.
    pub tensors: Vec<TensorInfo>,
    /// The files.
    pub shards: Vec<Shard>,
    /// Alignment of tensor data.
    pub alignment: u64,
    by_name: HashMap<String, usize>,
}

impl Gguf {
    /// Reads the header of `path` and of its further shards.
    pub fn open(path: &Path) -> Result<Gguf, GgufError> {
        Err(GgufError::Malformed {
            path: path.to_path_buf(),
            what: "not read".into(),
        })
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }
}

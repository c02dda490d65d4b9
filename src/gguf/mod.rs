//! The GGUF file format: header, metadata, tensor directory, shards, block types.
//!
//! Only the header is ever read here, through bounded buffered reads; weights never are. Every
//! length, count, offset and product is checked against the file and against stated limits before
//! anything is allocated.

mod error;
mod file;
mod forms;
pub(crate) mod grids;
mod header;
mod retype;
mod types;
mod value;

pub use error::GgufError;
pub use file::{Gguf, Shard, Source, TensorInfo};
pub use retype::retyped;
pub use types::TensorType;
pub use value::{Array, Metadata, StringArray, Value};

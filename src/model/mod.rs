//! Architectures: hyper-parameters, tensor names, units, and one forward pass over `Backend`.
//!
//! `HParams` are read from GGUF metadata, `Model` finds and checks every tensor and cuts them into
//! units, `forward` walks the units. Nothing here reads weights or knows where they live.

mod forward;
mod hparams;
mod layout;
mod rope;

pub use forward::{ForwardError, Outputs, WeightSource, forward};
pub use hparams::{Arch, HParams};
pub use layout::{Block, Ffn, HeadSlice, LinearRef, Model, Role, TensorRef, UnitKind, UnitSpec};
pub use rope::{RopeScaling, rope};

/// Why a GGUF file holds no model that nt can run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// An architecture without a forward pass here.
    #[error("architecture {found} is not supported; supported are {supported}")]
    Architecture {
        /// `general.architecture`.
        found: String,
        /// Those that are supported.
        supported: String,
    },
    /// A metadata key is missing or has an unusable value.
    #[error("metadata {key}: {what}")]
    Metadata {
        /// The key.
        key: String,
        /// What was expected and found.
        what: String,
    },
    /// A tensor that the architecture needs is not in the file.
    #[error("tensor {name} is missing; architecture {arch} needs it")]
    MissingTensor {
        /// The tensor.
        name: String,
        /// The architecture.
        arch: &'static str,
    },
    /// A tensor has another shape than the metadata imply.
    #[error("tensor {name} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Shape in the file, columns first.
        found: Vec<u64>,
        /// Shape that the metadata imply.
        expected: Vec<u64>,
    },
    /// A tensor has a type that cannot be used in its place.
    #[error("tensor {name} has type {found}; {expected} expected")]
    Type {
        /// The tensor.
        name: String,
        /// Its type.
        found: crate::gguf::TensorType,
        /// What can be used.
        expected: String,
    },
}

//! Architectures: hyper-parameters, tensor names, units, and one forward pass over `Backend`.
//!
//! `HParams` are read from GGUF metadata, a file of `arch` says what an architecture's blocks are made of, `build` finds
//! and checks every tensor and writes down a `program`: units of bytes, and operations over them. `tape` turns it into
//! the calls of a backend, and `pass` walks those. Nothing here reads weights or knows where they live.

mod arch;
mod build;
mod family;
mod hparams;
mod keys;
mod overrides;
mod pass;
mod program;
mod read;
mod requant;
mod rope;
mod routing;
mod slices;
mod tape;

pub use family::Family;
pub use hparams::{HParams, LatentSizes};
pub use overrides::{Overrides, RopeType};
pub use pass::{
    Batch, ForwardError, NotFinite, Outputs, Scratch, WeightError, WeightSource, first_not_finite, forward,
    takes_nearly_all,
};
pub use program::{
    Block, Columns, Experts, HELD, HeadSlice, Held, LinearRef, Model, NormRef, Role, Span, Stage, TensorRef, UnitKind,
    UnitSpec,
};
pub use read::unused_keys;
pub use requant::{RequantError, Requantised, Turn, Turned};
pub use rope::{RopeScaling, RopeSpec, check_divisors};
pub use routing::{ForcedRouting, Mixture, Routes, RoutingError};
pub use slices::SLICE_PARTS;
pub use tape::Tape;

/// Why a GGUF file holds no model that nt can run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A vector of a type that cannot be made floats of.
    #[error("tensor {tensor} of type {ty} cannot be widened")]
    Unwidened {
        /// The tensor.
        tensor: String,
        /// Its type.
        ty: crate::gguf::TensorType,
    },
    /// An architecture without a forward pass here.
    #[error("architecture {found} is not supported; supported are {supported}")]
    Architecture {
        /// `general.architecture`.
        found: String,
        /// Those that are supported.
        supported: String,
    },
    /// The file holds something that goes with a model.
    #[error("the file is {0}")]
    NoModel(&'static str),
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
    /// The file has tensors that the computation would leave out.
    #[error("tensor {first}{} not part of architecture {arch} as nt computes it{}; without {} the text would be wrong (`nt inspect` lists them)",
        if *more == 0 { " is".to_owned() } else { format!(" and {more} more are") },
        beyond(first, arch, *n_layers),
        if *more == 0 { "it" } else { "them" })]
    UnusedTensors {
        /// The first of them in file order.
        first: String,
        /// How many more there are.
        more: usize,
        /// The architecture.
        arch: &'static str,
        /// Blocks that the metadata name.
        n_layers: usize,
    },
    /// Matrices cannot be requantised as asked.
    #[error(transparent)]
    Requant(#[from] RequantError),
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
    /// A tensor holds numbers that cannot be computed with.
    #[error("tensor {name}: {what}; the file is damaged or was converted wrongly")]
    Values {
        /// The tensor.
        name: String,
        /// Which number, and what was expected.
        what: String,
    },
    /// A tensor has a type that cannot be used in its place.
    #[error("tensor {name} has type {found}, which nt cannot compute; it can {expected}")]
    Type {
        /// The tensor.
        name: String,
        /// Its type.
        found: crate::gguf::TensorType,
        /// What can be used.
        expected: String,
    },
}

/// A hint where a tensor belongs to a block that the metadata do not count.
fn beyond(tensor: &str, arch: &str, n_layers: usize) -> String {
    let block = tensor.strip_prefix("blk.").and_then(|t| t.split('.').next()).and_then(|n| n.parse::<usize>().ok());
    match block.filter(|&b| b >= n_layers) {
        Some(_) => format!(" (metadata {arch}.block_count says {n_layers} blocks)"),
        None => String::new(),
    }
}

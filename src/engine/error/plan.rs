//! Why a plan that was made before is not made again.

use crate::gguf::TensorType;
use crate::plan::format_bytes;

/// Why a plan cannot be made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RepeatError {
    /// The model's structure differs.
    #[error("it was made for a model of another shape")]
    OtherModel,
    /// Another type was asked for.
    #[error("it requantises to {of}, not to {wanted}")]
    OtherType {
        /// The plan's type.
        of: TensorType,
        /// What was asked for.
        wanted: TensorType,
    },
    /// A type was asked for, and the plan has none.
    #[error("it requantises nothing; leave --requant away")]
    NoType,
    /// The cache would have another type.
    #[error("its KV cache is of {of}, not of {wanted}; leave --kv away")]
    OtherCache {
        /// The plan's type.
        of: TensorType,
        /// What was asked for.
        wanted: TensorType,
    },
    /// No GPU computes.
    #[error("it is one for a GPU, and processors compute here")]
    NoGpu,
    /// A GPU computes.
    #[error("it is one for processors, and a GPU computes here (--backend cpu)")]
    Gpu,
    /// VRAM is short.
    #[error("it takes {} of VRAM for weights, and there are {}", format_bytes(*.wanted), format_bytes(*.room))]
    Room {
        /// Bytes that the plan takes.
        wanted: u64,
        /// Bytes there are.
        room: u64,
    },
    /// Work would be divided otherwise.
    #[error(
        "other units would be computed by processors than were (forced routing, another GPU or drive, or a file that was changed)"
    )]
    OtherSites,
    /// Feed-forward parts would be whole.
    #[error(
        "its feed-forward parts are cut between a GPU and processors next to it, and here there is less VRAM or RAM than that takes, or no such processors"
    )]
    Whole,
    /// Something else differs.
    #[error("the plan that is made here differs in {what}")]
    Other {
        /// In what.
        what: &'static str,
    },
}

/// Why `--plan` gives no plan.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The file cannot be read.
    #[error("--plan {given}: {source}")]
    Io {
        /// What was given.
        given: String,
        /// The system's words.
        source: std::io::Error,
    },
    /// The file is not UTF-8.
    #[error("--plan {0}: no text")]
    NoText(String),
    /// The file is something else.
    #[error("--plan {given}: {source}; `nt plan --save FILE` writes such files")]
    Malformed {
        /// What was given.
        given: String,
        /// What is wrong.
        source: RecipeFault,
    },
    /// Neither a file nor an id.
    #[error(
        "--plan {given}: neither a file nor the id of a plan of the last {kept} that ran here; `nt plan --save FILE` writes one"
    )]
    Unknown {
        /// What was given.
        given: String,
        /// Plans that are kept.
        kept: usize,
    },
}

/// What is wrong with a plan's file.
#[derive(Debug, thiserror::Error)]
pub enum RecipeFault {
    /// Not such TOML.
    #[error("{}", .0.message().replace('\n', ", "))]
    Toml(#[from] toml::de::Error),
    /// Names that are none.
    #[error("tiers, sites, buffers, slices or types are no such")]
    Names,
    /// Not one plan.
    #[error("it holds {0} plans in place of one")]
    Count(usize),
}

//! Why a session cannot start or go on.

mod copy;
mod plan;

pub(super) use copy::not_bound;
pub use copy::{CopyError, Differs, NoCopy};
pub use plan::{RecipeError, RecipeFault, RepeatError};

use super::constraint::ConstraintError;
use crate::backend::BackendError;
use crate::gguf::GgufError;
use crate::machine::Shortage;
use crate::memory::ArenaError;
use crate::model::{ForwardError, ModelError};
use crate::plan::{PlanError, format_at_least};
use crate::storage::StorageError;
use crate::storage::bind::DeviceError;
use crate::storage::image::ImageError;
use crate::tokenizer::TokenizerError;

/// Why a session cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The file.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The model in it.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Its tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The limits.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A plan that was to be made again.
    #[error("plan {id} cannot be repeated: {source}")]
    Repeat {
        /// The plan's id.
        id: String,
        /// Why.
        source: RepeatError,
    },
    /// What the machine lacks of what the plan counted on.
    #[error(transparent)]
    Lacking(#[from] LackError),
    /// Memory that the system refuses.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// Where the model is read from.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// The staged drive that it names.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The bound drive that it names.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The backend.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// Reading weights.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// What a session was asked for.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// Sequences and their pages.
    #[error(transparent)]
    State(#[from] crate::state::StateError),
    /// A conversation in a file.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// A pass.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// A pass that panicked.
    #[error("this pass ended by a fault of nt, which is worth a report: {what}")]
    Panicked {
        /// What the panic said.
        what: String,
    },
    /// What a text is held to.
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    /// A pass whose numbers are not all finite.
    #[error("the numbers of this pass are not finite: {what}; {cure}")]
    NotFinite {
        /// Where the computation stops being finite.
        what: String,
        /// What may help.
        cure: String,
    },
}

/// What the machine lacks.
#[derive(Debug, thiserror::Error)]
pub enum LackError {
    /// Memory.
    #[error("{source}; {}", cure(*.fits, *.smaller_ctx))]
    Memory {
        /// What is short of it.
        source: Shortage,
        /// Bytes of RAM for weights that would fit.
        fits: Option<u64>,
        /// Whether a smaller context would take less of it.
        smaller_ctx: bool,
    },
    /// A GPU that waits for processors.
    #[error(
        "--site both: this GPU's driver has no waits for words in memory, so that it cannot wait for processors; --site gpu computes on the GPU alone"
    )]
    Waits,
    /// A GPU.
    #[error("{machine} has no GPU")]
    Gpu {
        /// The machine's name.
        machine: String,
    },
}

fn cure(fits: Option<u64>, smaller_ctx: bool) -> String {
    match fits {
        Some(ram) => format!("--ram {} would fit", format_at_least(ram)),
        None if smaller_ctx => "end what else takes memory, or give a smaller --ctx".into(),
        None => "end what else takes memory".into(),
    }
}

/// A request that a session cannot serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// A token that the model has no row for.
    #[error("token {token} is not in the vocabulary, which ends at {}", n_vocab - 1)]
    NoSuchToken {
        /// The token.
        token: u32,
        /// Tokens there are.
        n_vocab: usize,
    },
    /// More tokens than the KV cache has room for.
    #[error(
        "{tokens} tokens do not fit the context: {position} of its {n_ctx} positions are taken; give a larger --ctx"
    )]
    ContextFull {
        /// Tokens to be evaluated.
        tokens: usize,
        /// Positions taken.
        position: usize,
        /// Positions there are.
        n_ctx: usize,
    },
    /// More tokens than a pass carries.
    #[error(
        "{tokens} tokens of {parts} sequences were given to one pass, which carries {max} of such, of at most {most} sequences"
    )]
    TooManyRows {
        /// Tokens to be evaluated.
        tokens: usize,
        /// Tokens that a pass carries.
        max: usize,
        /// Sequences.
        parts: usize,
        /// Most sequences of a pass.
        most: usize,
    },
    /// Parts of a pass that are none.
    #[error("each sequence is once in a pass, with a token or more, and generated tokens come before prompts")]
    Parts,
    /// A text whose tokens have all been evaluated: nothing says what comes next.
    #[error("no token of the text is left to evaluate, so that nothing says what comes next")]
    NothingLeft,
    /// A conversation with a recurrent state.
    #[error("this architecture has a recurrent state, which files do not keep: its conversations cannot be saved")]
    NotKept,
    /// The sequence that passes go on with cannot end.
    #[error("passes go on with this sequence: it cannot end before another one takes its place")]
    InUse,
    /// More rows of logits than the session was started for.
    #[error("logits of {tokens} tokens were asked for at once, but the session holds {max} rows of them")]
    TooManyOutputs {
        /// Tokens to be evaluated.
        tokens: usize,
        /// Rows there are.
        max: usize,
    },
}

/// Why a conversation could not be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// The file system.
    #[error("the conversation {path} cannot be read or written: {source}")]
    Io {
        /// The file.
        path: String,
        /// The system's words.
        source: std::io::Error,
    },
    /// A file that is there and is something else.
    #[error("{0} is there and is no conversation that nt saved: it is not replaced")]
    InTheWay(String),
    /// Not such a file, or a damaged one.
    #[error("{path} is no conversation that nt saved: {what}")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong.
        what: String,
    },
}

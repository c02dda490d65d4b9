//! A model as far as its header tells: tokenizer and structure, no weights.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::backend::{BackendError, reference};
use crate::gguf::{Gguf, GgufError, TensorInfo};
use crate::memory::ArenaError;
use crate::model::{ForwardError, Model, ModelError, Overrides, check_divisors};
use crate::plan::PlanError;
use crate::storage::StorageError;
use crate::storage::bind::DeviceError;
use crate::storage::image::ImageError;
use crate::tokenizer::{Tokenizer, TokenizerError};

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
    #[error("plan {id} cannot be repeated: {why}")]
    Repeat {
        /// The plan's id.
        id: String,
        /// Why.
        why: String,
    },
    /// Memory that the plan counted on.
    #[error("{0}")]
    Memory(String),
    /// Memory that the system refuses.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// What `--tier-c` names.
    #[error("{0}")]
    Copy(String),
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
    Request(#[from] super::session::RequestError),
    /// Sequences and their pages.
    #[error(transparent)]
    State(#[from] crate::state::StateError),
    /// A conversation in a file.
    #[error(transparent)]
    Saved(#[from] super::saved::SavedError),
    /// A pass.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// What a text is held to.
    #[error(transparent)]
    Constraint(#[from] super::constraint::ConstraintError),
    /// A pass whose numbers are not all finite.
    #[error("the numbers of this pass are not finite: {what}; {cure}")]
    NotFinite {
        /// Where the computation stops being finite.
        what: String,
        /// What may help.
        cure: String,
    },
}

/// A model's header, tokenizer and structure.
#[derive(Debug)]
pub struct Opened {
    /// The header, without the tokenizer's arrays.
    pub gguf: Gguf,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// Tensors and units.
    pub model: Model,
    /// What is amiss, a line each, the tokenizer's warnings apart.
    pub warnings: Vec<String>,
}

impl Opened {
    /// Opens the model at `path`, or the one that was recorded under that path or name.
    pub fn open(path: &Path) -> Result<Opened, EngineError> {
        Opened::open_from(path, &[], &Overrides::default())
    }

    /// As [`Opened::open`], or the one that was staged under that name on one of the drives `copies`; with
    /// `overrides` in place of the file's metadata.
    pub fn open_from(path: &Path, copies: &[PathBuf], overrides: &Overrides) -> Result<Opened, EngineError> {
        let mut gguf = super::source::open_header(path, copies)?;
        let warnings = overrides.apply(&mut gguf.metadata)?;
        Ok(Opened { warnings, ..Opened::from_header(gguf)? })
    }

    /// The block of this model that predicts the token behind the next one, in place of the model.
    ///
    /// # Errors
    /// As [`Model::next`].
    pub fn into_next(self) -> Result<Opened, EngineError> {
        Ok(Opened { model: Model::next(&self.gguf)?, ..self })
    }

    /// The model that a header describes.
    ///
    /// # Errors
    /// What is missing from it, or what nt does not know.
    pub fn from_header(mut gguf: Gguf) -> Result<Opened, EngineError> {
        let model = Model::new(&gguf)?;
        check_rope_divisors(&gguf, &model)?;
        let tokenizer = Tokenizer::from_metadata(&gguf.metadata)?;
        if tokenizer.vocab_size() > model.n_vocab {
            return Err(ModelError::Metadata {
                key: "tokenizer.ggml.tokens".into(),
                what: format!(
                    "has {} tokens, but token_embd.weight only {} rows",
                    tokenizer.vocab_size(),
                    model.n_vocab
                ),
            }
            .into());
        }
        // The tokenizer has its own compact copy; these arrays are tens of MiB.
        for key in ["tokens", "merges", "scores", "token_type"] {
            gguf.metadata.remove(&format!("tokenizer.ggml.{key}"));
        }
        Ok(Opened { gguf, tokenizer, model, warnings: Vec::new() })
    }
}

/// Looks at the divisors of rotary frequencies, so that a plan refuses what a run does. They are a few hundred bytes.
/// Where the file is not there (its place on a drive is recorded), the run looks.
fn check_rope_divisors(gguf: &Gguf, model: &Model) -> Result<(), ModelError> {
    model.divisors.iter().try_for_each(|t| check_divisors_of(gguf, t))
}

fn check_divisors_of(gguf: &Gguf, t: &TensorInfo) -> Result<(), ModelError> {
    let mut bytes = vec![0; usize::try_from(t.bytes).unwrap_or(0)];
    let read =
        gguf.shards.get(t.shard).map(|s| File::open(&s.path).and_then(|f| f.read_exact_at(&mut bytes, t.offset)));
    let mut divisors = vec![0.0; t.shape.iter().product::<u64>() as usize];
    match read {
        Some(Ok(())) if reference::dequantize(t.ty, &bytes, &mut divisors) => check_divisors(&t.name, &divisors),
        _ => Ok(()),
    }
}

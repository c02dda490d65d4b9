//! A model as far as its header tells: tokenizer and structure, no weights.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::EngineError;
use crate::backend::reference;
use crate::gguf::{Gguf, TensorInfo};
use crate::model::{Model, ModelError, Overrides, check_divisors};
use crate::tokenizer::Tokenizer;

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
        let mut warnings = overrides.apply(&mut gguf.metadata)?;
        warnings.extend(super::unwritten::unwritten(&gguf));
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

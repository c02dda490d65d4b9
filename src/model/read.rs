//! From a file's header to a model: its architecture is looked up, and reads the rest.

use super::arch::{ALL, Architecture};
use super::build::Builder;
use super::keys;
use super::{HParams, Model, ModelError};
use crate::gguf::{Gguf, Metadata};

/// What a GGUF file is that goes with a model; `None` for a model.
fn beside_a_model(metadata: &Metadata) -> Option<&'static str> {
    let is = |key: &str| metadata.str(key).unwrap_or_default();
    match (is("general.type"), is("general.architecture")) {
        ("adapter", _) => Some(
            "a LoRA adapter, not a model, and nt applies none; llama.cpp's llama-export-lora merges it into its model",
        ),
        ("mmproj" | "clip-vision", _) | (_, "clip") => Some(
            "the part of a model that sees or hears (mmproj), which nt does not run; name the file of the language model",
        ),
        ("imatrix", _) => Some("an importance matrix, for making quantised files, not a model"),
        (_, "controlvector") => Some("a control vector, not a model, and nt applies none"),
        _ => None,
    }
}

/// The architecture that a file names.
fn architecture(metadata: &Metadata) -> Result<&'static Architecture, ModelError> {
    if let Some(what) = beside_a_model(metadata) {
        return Err(ModelError::NoModel(what));
    }
    let found = metadata.str("general.architecture").ok_or_else(|| ModelError::Metadata {
        key: "general.architecture".into(),
        what: "is missing; is this a language model?".into(),
    })?;
    ALL.iter().find(|a| a.family.name == found).copied().ok_or_else(|| ModelError::Architecture {
        found: found.to_owned(),
        supported: ALL.iter().map(|a| a.family.name).collect::<Vec<_>>().join(", "),
    })
}

/// Keys of the architecture that nothing reads, in file order.
pub fn unused_keys(m: &Metadata) -> Vec<String> {
    let Some(name) = m.str("general.architecture") else { return Vec::new() };
    let follows = ALL.iter().find(|a| a.family.name == name).map_or(&[][..], |a| a.family.follows);
    keys::unused(m, name, follows)
}

impl HParams {
    /// Reads and checks the hyper-parameters.
    ///
    /// # Errors
    /// If the architecture is not known, or a key is missing, out of bounds or not followed.
    pub fn from_metadata(metadata: &Metadata) -> Result<HParams, ModelError> {
        let arch = architecture(metadata)?;
        let (keys, mut h) = HParams::common(metadata, &arch.family)?;
        (arch.settle)(&keys, &mut h)?;
        h.check(&keys)?;
        Ok(h)
    }
}

impl Model {
    /// Finds and checks every tensor of `gguf`.
    ///
    /// # Errors
    /// If a tensor or key is missing, of the wrong shape or of a type without kernels, or if the file has
    /// tensors that the architecture's computation here leaves out.
    pub fn new(gguf: &Gguf) -> Result<Model, ModelError> {
        let model = Model::read(gguf)?;
        let mut left_out = model.unused.iter().filter(|(_, harmless)| harmless.is_none());
        match left_out.next() {
            None => Ok(model),
            Some((first, _)) => Err(ModelError::UnusedTensors {
                first: first.clone(),
                more: left_out.count(),
                arch: model.hparams.arch.name,
                n_layers: model.hparams.n_layers,
            }),
        }
    }

    /// The block of `gguf` that predicts the token behind the next one, as a model of one block: what it reads next to tokens
    /// are final hidden states ([`Model::takes_hidden`]), of the position before each.
    ///
    /// # Errors
    /// As [`Model::new`]; or if there is no such block, or more than one.
    pub fn next(gguf: &Gguf) -> Result<Model, ModelError> {
        let arch = architecture(&gguf.metadata)?;
        let hparams = HParams::from_metadata(&gguf.metadata)?;
        if hparams.n_next != 1 {
            let what = match hparams.n_next {
                0 => "is missing or 0, or is not read: nt knows no block of this model that predicts further tokens"
                    .into(),
                n => format!("is {n}; one block that predicts further tokens is supported"),
            };
            return Err(ModelError::Metadata { key: format!("{}.nextn_predict_layers", arch.family.name), what });
        }
        let mut b = Builder::next(gguf, &hparams)?;
        let (embedding, n_vocab) = b.embedding()?;
        (arch.ropes)(&mut b)?;
        (arch.block)(&mut b, hparams.n_layers)?;
        b.finish(embedding, n_vocab)
    }

    /// As [`Model::new`], with the tensors that would be left out listed in [`Model::unused`].
    ///
    /// # Errors
    /// As [`Model::new`], those tensors apart.
    pub fn read(gguf: &Gguf) -> Result<Model, ModelError> {
        let arch = architecture(&gguf.metadata)?;
        let hparams = HParams::from_metadata(&gguf.metadata)?;
        let mut b = Builder::new(gguf, &hparams);
        let (embedding, n_vocab) = b.embedding()?;
        (arch.ropes)(&mut b)?;
        (0..hparams.n_layers).try_for_each(|i| (arch.block)(&mut b, i))?;
        b.finish(embedding, n_vocab)
    }
}

//! Metadata that the command line gives in place of the file's.

use super::{ModelError, unused_keys};
use crate::gguf::{Array, Metadata, Value};

/// Scaling of rotary frequencies by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeType {
    /// As trained.
    None,
    /// Positions divided by the factor.
    Linear,
    /// YaRN.
    Yarn,
}

/// Metadata in place of the file's.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// Keys and their values, the last of equals counts.
    pub values: Vec<(String, Value)>,
    /// `rope.scaling.type`.
    pub rope_type: Option<RopeType>,
    /// `rope.scaling.factor`: the context is this many times longer than trained.
    pub rope_factor: Option<f32>,
    /// `rope.scaling.original_context_length`.
    pub rope_orig_ctx: Option<usize>,
    /// `rope.freq_base`.
    pub rope_base: Option<f32>,
}

/// Keys of no architecture that are read.
const READ: [&str; 10] = [
    "general.architecture",
    "general.file_type",
    "general.name",
    "general.size_label",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.tokens",
];

/// Whether a key of the tokenizer is one of the special tokens (`…eos_token_id`) or switches (`…add_bos_token`).
fn names_a_token_or_says_whether(key: &str) -> bool {
    let name = key.strip_prefix("tokenizer.ggml.").unwrap_or_default();
    name.ends_with("_token_id") || name.ends_with("_token_ids") || name.starts_with("add_")
}

/// Whether a value may stand for another: of its kind, or an integer for a number.
fn fits(old: &Value, new: &Value) -> bool {
    match old {
        Value::Int(_) | Value::BigUint(_) | Value::Array(Array::Int(_)) => matches!(new, Value::Int(_)),
        Value::Float(_) | Value::Array(Array::Float(_)) => matches!(new, Value::Float(_) | Value::Int(_)),
        Value::Bool(_) | Value::Array(Array::Bool(_)) => matches!(new, Value::Bool(_)),
        Value::Str(_) => matches!(new, Value::Str(_)),
        Value::Array(_) => false,
    }
}

impl Overrides {
    /// Writes them into `m`; returns a line for each key that nothing reads.
    ///
    /// # Errors
    /// Where a value is of another kind than the file's, or scaling is asked for without a factor.
    pub fn apply(&self, m: &mut Metadata) -> Result<Vec<String>, ModelError> {
        for (key, value) in &self.values {
            if let Some(old) = m.get(key).filter(|old| !fits(old, value)) {
                let what = format!("is {old} in the file, which {value} of --override-kv cannot replace");
                return Err(ModelError::Metadata { key: key.clone(), what });
            }
            m.set(key, value.clone());
        }
        self.apply_rope(m)?;
        let arch = m.str("general.architecture").unwrap_or_default().to_owned();
        let unused = unused_keys(m);
        let (own, size) = (format!("{arch}."), format!("{arch}.vocab_size"));
        let idle = self.values.iter().filter_map(|(key, _)| {
            let why = match key.as_str() {
                "general.alignment" => "changes nothing: tensors lie where the file has them",
                k if k == size => "changes nothing: the embedding's rows are the vocabulary",
                k if k.starts_with("general.sampling.") => return None,
                k if READ.contains(&k) || k.starts_with("tokenizer.chat_template") => return None,
                k if k.starts_with(&own) && !unused.iter().any(|u| u == k) => return None,
                k if k.starts_with("tokenizer.ggml.") && names_a_token_or_says_whether(k) => return None,
                _ => "nothing reads that key",
            };
            Some(format!("--override-kv {key}: {why}"))
        });
        Ok(idle.collect())
    }

    fn apply_rope(&self, m: &mut Metadata) -> Result<(), ModelError> {
        let arch = m.str("general.architecture").unwrap_or_default().to_owned();
        let key = |name: &str| format!("{arch}.rope.{name}");
        if let Some(base) = self.rope_base {
            m.set(&key("freq_base"), Value::Float(base.into()));
        }
        if let Some(ty) = self.rope_type {
            let name = match ty {
                RopeType::None => "none",
                RopeType::Linear => "linear",
                RopeType::Yarn => "yarn",
            };
            m.set(&key("scaling.type"), Value::Str(name.into()));
        }
        if let Some(factor) = self.rope_factor {
            m.set(&key("scaling.factor"), Value::Float(factor.into()));
        }
        let (factor, old) = (key("scaling.factor"), key("scale_linear"));
        if matches!(self.rope_type, Some(RopeType::Linear | RopeType::Yarn))
            && m.float(&factor).or(m.float(&old)).is_none()
        {
            let what = "is missing, so --rope-scaling needs --rope-factor".into();
            return Err(ModelError::Metadata { key: factor, what });
        }
        self.check_scaled(m, &key("scaling.type"))?;
        let original = key("scaling.original_context_length");
        // A factor that the user gives stretches what the model was trained on.
        let trained = self.rope_factor.and_then(|_| m.get(&format!("{arch}.context_length")).cloned());
        let given = self.rope_orig_ctx.map(|n| Value::Int(n as i64));
        if let Some(n) = given.or(trained.filter(|_| m.get(&original).is_none())) {
            m.set(&original, n);
        }
        Ok(())
    }

    /// Refuses what changes nothing, because frequencies are not scaled.
    fn check_scaled(&self, m: &Metadata, ty: &str) -> Result<(), ModelError> {
        let given = match (self.rope_factor, self.rope_orig_ctx) {
            (Some(factor), _) => format!("--rope-factor {factor}"),
            (None, Some(n)) => format!("--rope-orig-ctx {n}"),
            (None, None) => return Ok(()),
        };
        let is = match m.str(ty) {
            Some("none") => "none",
            // A factor alone is linear scaling; the positions alone are no scaling.
            None if self.rope_factor.is_none() && self.values.is_empty() => "not set",
            _ => return Ok(()),
        };
        let what =
            format!("is {is}, so {given} would change nothing; --rope-scaling linear or yarn was expected with it");
        Err(ModelError::Metadata { key: ty.to_owned(), what })
    }
}

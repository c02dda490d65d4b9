//! Vocabulary and merges from GGUF metadata, pre-tokenizers, chat templates.
//!
//! Two families: BPE, of bytes (`tokenizer.ggml.model = gpt2`) or of characters (`gemma4`), and SentencePiece-style score
//! merging (`llama`). Ids are those of llama.cpp; what it would guess is an error here.

mod automaton;
mod bpe;
mod builtin;
mod decode;
mod eog;
mod jinja;
mod load;
mod pretokenize;
mod prompt;
mod rewrite;
mod shown;
mod special;
mod spm;
mod stop;
mod template;
#[cfg(test)]
mod tests;
mod vocab;

pub use decode::Decoder;
pub use prompt::Prompt;
pub use template::ChatTemplate;

use crate::gguf::{Metadata, StringArray};
use bpe::Bpe;
use special::{Piece, Specials};
use stop::Stop;
use vocab::{Kind, Vocab};

/// Why a tokenizer or template cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A metadata key is missing or unusable.
    #[error("metadata {key}: {what}")]
    Metadata {
        /// The key.
        key: String,
        /// What was expected and found.
        what: String,
    },
    /// A pre-tokenizer that is not known.
    #[error(
        "pre-tokenizer {found} (tokenizer.ggml.pre) is not known; the nearest that are: {nearest} (--override-kv tokenizer.ggml.pre=str:NAME takes one)"
    )]
    UnknownPre {
        /// Its name.
        found: String,
        /// A few known ones that are called alike.
        nearest: String,
    },
    /// A tokenizer model that is not known.
    #[error("tokenizer model {found} (tokenizer.ggml.model) is not supported; gpt2, llama and gemma4 are")]
    UnknownModel {
        /// Its name.
        found: String,
    },
    /// The chat template cannot be parsed or rendered.
    #[error("the chat template failed: {0}")]
    Template(String),
    /// The chat template exceeds what it may take.
    #[error("the chat template was stopped: {0}; --chat-template names another template")]
    TemplateLimit(String),
    /// Words that were given are missing from the prompt.
    #[error(
        "the chat template drops message {number} (role {role}): its words {words:?} are not in the prompt; --chat-template names another template"
    )]
    DropsMessage {
        /// Its place, from 1.
        number: usize,
        /// Its role.
        role: String,
        /// How it begins.
        words: String,
    },
    /// Some words of a message are missing from the prompt.
    #[error(
        "the chat template leaves out a part of message {number} (role {role}): {lost:?} is not in the prompt as it was given; --chat-template names another template"
    )]
    CutsMessage {
        /// Its place, from 1.
        number: usize,
        /// Its role.
        role: String,
        /// How the part begins that is left out or changed.
        lost: String,
    },
    /// The caller no longer wants the prompt.
    #[error("the rendering of the chat template was stopped")]
    Stopped,
    /// No template has this name.
    #[error(
        "chat template {name:?} is no file, no template of the model ({}), and not built in; built in are {built_in}",
        if in_file.is_empty() { "which has no named ones" } else { in_file }
    )]
    UnknownTemplate {
        /// The name.
        name: String,
        /// Those that the file has.
        in_file: String,
        /// Those that are built in.
        built_in: String,
    },
    /// The thread that renders has too little memory.
    #[error(
        "the chat template cannot be rendered for want of memory: {0}; raise the limits on memory and processes (ulimit -v, ulimit -d, ulimit -u), or free memory"
    )]
    TemplateMemory(String),
}

#[derive(Debug)]
enum Algorithm {
    Bpe(Bpe),
    /// Of characters, with U+2581 for spaces.
    Chars {
        bpe: Bpe,
        /// As below.
        shown: StringArray,
    },
    Spm {
        add_space_prefix: bool,
        /// What tokens stand for, with spaces where the vocabulary has U+2581.
        shown: StringArray,
    },
}

/// Text to ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    vocab: Vocab,
    algorithm: Algorithm,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    add_eos: bool,
    eog: Vec<u32>,
    suppressed: Vec<u32>,
    special: Specials,
    warnings: Vec<String>,
}

impl Tokenizer {
    /// Builds the tokenizer that the metadata describe.
    pub fn from_metadata(metadata: &Metadata) -> Result<Tokenizer, TokenizerError> {
        load::load(metadata)
    }

    /// Ids of a text that is to be continued: BOS as the model asks for it, control tokens read as such, and no EOS
    /// behind it, which would end what is to be continued.
    pub fn encode_prompt(&self, text: &str) -> Vec<u32> {
        self.behind_bos(self.encode(text, false, true))
    }

    /// Ids of a text that is to be measured: BOS as the model asks for it, no EOS behind it, and nothing in it is read as a
    /// control token.
    pub fn encode_text(&self, text: &str) -> Vec<u32> {
        self.behind_bos(self.encode(text, false, false))
    }

    /// BOS as the model asks for it, then `ids`.
    fn behind_bos(&self, mut ids: Vec<u32>) -> Vec<u32> {
        if self.add_bos
            && let Some(bos) = self.bos
        {
            ids.insert(0, bos);
        }
        ids
    }

    /// Ids of a rendered chat template: a BOS that it writes itself is not doubled, and an EOS that it writes at its
    /// end is taken off where the model adds one to texts (as llama.cpp does).
    pub fn encode_rendered(&self, text: &str) -> Vec<u32> {
        self.encode_rendered_until(text, &|| false).unwrap_or_default()
    }

    /// As [`encode_rendered`](Self::encode_rendered), which takes seconds for a text of many MiB; `None` soon after
    /// `stop` says so.
    pub fn encode_rendered_until(&self, text: &str, stop: &dyn Fn() -> bool) -> Option<Vec<u32>> {
        let mut ids = self.behind_bos(self.encode_until(text, false, true, &Stop::new(stop))?);
        if let (Some(bos), [a, b, ..]) = (self.bos, &ids[..])
            && *a == bos
            && *b == bos
        {
            ids.remove(0);
        }
        if self.add_eos && ids.len() > 1 && ids.last().copied() == self.eos {
            ids.pop();
        }
        Some(ids)
    }

    /// Ids of `text`. `add_special` adds BOS and EOS as the model asks for it; `parse_special` reads
    /// control tokens in the text as such (user-defined ones always are).
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<u32> {
        self.encode_until(text, add_special, parse_special, &Stop::new(&|| false)).unwrap_or_default()
    }

    fn encode_until(&self, text: &str, add_special: bool, parse_special: bool, stop: &Stop) -> Option<Vec<u32>> {
        let mut ids = Vec::new();
        if add_special && self.add_bos {
            ids.extend(self.bos);
        }
        let mut after_special = true;
        for piece in self.special.split(text, parse_special, stop)? {
            match piece {
                Piece::Token(id) => {
                    ids.push(id);
                    after_special = true;
                }
                Piece::Text(t) => {
                    match &self.algorithm {
                        Algorithm::Bpe(bpe) => bpe.encode(&self.vocab, t, stop, &mut ids)?,
                        Algorithm::Chars { bpe, .. } => {
                            bpe.encode(&self.vocab, &t.replace(' ', spm::SPACE), stop, &mut ids)?
                        }
                        Algorithm::Spm { add_space_prefix, .. } => {
                            spm::encode(&self.vocab, t, *add_space_prefix && after_special, stop, &mut ids)?
                        }
                    }
                    after_special = false;
                }
            }
        }
        if add_special && self.add_eos {
            ids.extend(self.eos);
        }
        Some(ids)
    }

    /// The bytes that a token stands for; a control token's are its name. Empty for unknown ids.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        match (self.vocab.kind(id), &self.algorithm) {
            (Some(Kind::Byte), _) => load::byte_of(self.vocab.bytes(id)),
            (_, Algorithm::Spm { shown, .. } | Algorithm::Chars { shown, .. }) => {
                shown.get(id as usize).unwrap_or_default()
            }
            (_, Algorithm::Bpe(_)) => self.vocab.bytes(id),
        }
    }

    /// Whether a token is markup that is not shown.
    pub fn is_control(&self, id: u32) -> bool {
        matches!(self.vocab.kind(id), Some(Kind::Control | Kind::Unknown))
    }

    /// Whether a token stands for bytes of a text.
    pub fn is_shown(&self, id: u32) -> bool {
        matches!(self.vocab.kind(id), Some(Kind::Normal | Kind::UserDefined | Kind::Byte))
    }

    /// The text of `ids`, bytes that are no character replaced; control tokens show their names
    /// with `render_special`, nothing without.
    pub fn decode(&self, ids: &[u32], render_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            decode::append(self, id, render_special, &mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    /// Beginning of sequence.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// End of sequence.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether a text begins with BOS.
    pub fn adds_bos(&self) -> bool {
        self.add_bos && self.bos.is_some()
    }

    /// Whether a token ends generation.
    pub fn is_eog(&self, id: u32) -> bool {
        self.eog.binary_search(&id).is_ok()
    }

    /// All tokens that end generation, ascending.
    pub fn eog_ids(&self) -> &[u32] {
        &self.eog
    }

    /// Tokens that no text of the model may hold (`tokenizer.ggml.suppress_tokens`), such as those that stand for images.
    pub fn suppressed_ids(&self) -> &[u32] {
        &self.suppressed
    }

    /// What was missing and had to be assumed.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

//! Prompt in, tokens out: what is asked for, what comes of it, and the text as it grows.

use super::stop::{Piece, StopFilter};
use crate::tokenizer::{Decoder, Tokenizer};

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StopReason {
    /// An end-of-generation token.
    Eos,
    /// As many tokens as asked for, or the context is full.
    Length,
    /// A stop text.
    Stop,
    /// The user.
    Interrupt,
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The whole text that is continued.
    pub text: &'a [u32],
    /// How many of its tokens the session has evaluated already; at least one is left.
    pub cached: usize,
    /// Tokens at most; `usize::MAX` until the context is full.
    pub n: usize,
    /// Texts that end the generation; a token's name ends it at that token.
    pub stops: &'a [String],
    /// Show control tokens by their names.
    pub special: bool,
}

/// What there is to tell of a text as it grows.
#[derive(Clone, Copy, Debug)]
pub enum Grown<'a> {
    /// A token of the text was drawn; its text follows, once it is certain.
    Token {
        /// The token.
        id: u32,
        /// What it was drawn from, a logit for each token of the vocabulary.
        logits: &'a [f32],
        /// Bytes of the pieces before those that it is in.
        at: usize,
    },
    /// A piece of the text that is certain, or the name of a control token within it, shown or not.
    Piece(Piece<'a>),
}

/// What was generated, and how long it took.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Ids, end-of-generation token apart.
    pub tokens: Vec<u32>,
    /// Their text, as far as it was shown.
    pub text: String,
    /// The same without names of control tokens.
    pub plain: String,
    /// Why it ended.
    pub stop: StopReason,
    /// The stop text that ended it, if one did.
    pub stop_text: Option<String>,
    /// Tokens of the prompt that were evaluated now.
    pub prompt_tokens: usize,
    /// From the start of prefill to its logits.
    pub prefill_s: f64,
    /// From the start of prefill to the first token.
    pub first_token_s: Option<f64>,
    /// Passes after the first token.
    pub decode_passes: usize,
    /// Their time.
    pub decode_s: f64,
    /// Whether the context ended before the wished length.
    pub context_full: bool,
}

impl Generation {
    pub(super) fn new(prompt_tokens: usize, room: usize) -> Generation {
        Generation {
            tokens: Vec::with_capacity(room),
            text: String::new(),
            plain: String::new(),
            stop: StopReason::Length,
            stop_text: None,
            prompt_tokens,
            prefill_s: 0.0,
            first_token_s: None,
            decode_passes: 0,
            decode_s: 0.0,
            context_full: false,
        }
    }
}

/// The text of a generation as it grows: characters made whole, stop texts cut off.
pub(super) struct Text<'a> {
    tokenizer: &'a Tokenizer,
    decoder: Decoder<'a>,
    filter: StopFilter,
    special: bool,
    /// Tokens to come in whose text no stop text is looked for.
    free: usize,
    /// Bytes of the pieces so far, held back or not.
    pub(super) added: usize,
    pub(super) shown: String,
    pub(super) plain: String,
}

impl<'a> Text<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, request: &Request) -> Text<'a> {
        let (decoder, filter) = (Decoder::new(tokenizer), StopFilter::new(request.stops));
        Text {
            tokenizer,
            decoder,
            filter,
            special: request.special,
            free: 0,
            added: 0,
            shown: String::new(),
            plain: String::new(),
        }
    }

    /// Looks for no stop text in the first `n` tokens.
    pub(super) fn begin_without_stops(&mut self, n: usize) {
        self.free = n;
    }

    /// Adds a token; `tell` gets the pieces that are certain. Returns whether it completes a stop text.
    pub(super) fn push(&mut self, token: u32, tell: &mut dyn FnMut(Piece)) -> bool {
        if self.tokenizer.is_control(token) {
            let name = String::from_utf8_lossy(self.tokenizer.token_bytes(token));
            self.add(&name, true, tell)
        } else {
            let text = self.decoder.push(token);
            self.add(&text, false, tell)
        }
    }

    /// Ends the text with the token that ended it.
    pub(super) fn end(&mut self, token: u32, tell: &mut dyn FnMut(Piece)) {
        if self.special && self.tokenizer.is_control(token) {
            self.push(token, tell);
        }
    }

    /// Ends the text: what is held back is told, unless it completes a stop text.
    pub(super) fn finish(&mut self, tell: &mut dyn FnMut(Piece)) {
        let rest = self.decoder.finish();
        if !self.add(&rest, false, tell) {
            self.with_filter(tell, |filter, tell| filter.finish(tell));
        }
    }

    /// The stop text that was completed.
    pub(super) fn stop_text(&self) -> Option<String> {
        self.filter.found().map(str::to_owned)
    }

    fn add(&mut self, text: &str, control: bool, tell: &mut dyn FnMut(Piece)) -> bool {
        self.added += text.len();
        let is_free = self.free > 0;
        self.free = self.free.saturating_sub(1);
        self.with_filter(tell, |filter, tell| match is_free {
            true if text.is_empty() => false,
            true => {
                tell(Piece { text, control });
                false
            }
            false => filter.push(Piece { text, control }, tell),
        })
    }

    fn with_filter<T>(
        &mut self,
        tell: &mut dyn FnMut(Piece),
        work: impl FnOnce(&mut StopFilter, &mut dyn FnMut(Piece)) -> T,
    ) -> T {
        let (special, shown, plain) = (self.special, &mut self.shown, &mut self.plain);
        work(&mut self.filter, &mut |piece| {
            if !piece.control {
                plain.push_str(piece.text);
            }
            if !piece.control || special {
                shown.push_str(piece.text);
            }
            tell(piece);
        })
    }
}

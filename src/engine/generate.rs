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
    pub(super) shown: String,
    pub(super) plain: String,
}

impl<'a> Text<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, request: &Request) -> Text<'a> {
        let (decoder, filter) = (Decoder::new(tokenizer), StopFilter::new(request.stops));
        Text { tokenizer, decoder, filter, special: request.special, shown: String::new(), plain: String::new() }
    }

    /// Adds a token. Returns whether it completes a stop text.
    pub(super) fn push(&mut self, token: u32, show: &mut dyn FnMut(&str)) -> bool {
        if self.tokenizer.is_control(token) {
            let name = String::from_utf8_lossy(self.tokenizer.token_bytes(token));
            self.add(&name, true, show)
        } else {
            let text = self.decoder.push(token);
            self.add(&text, false, show)
        }
    }

    /// Ends the text with the token that ended it.
    pub(super) fn end(&mut self, token: u32, show: &mut dyn FnMut(&str)) {
        if self.special && self.tokenizer.is_control(token) {
            self.push(token, show);
        }
    }

    /// Ends the text: what is held back is shown, unless it completes a stop text.
    pub(super) fn finish(&mut self, show: &mut dyn FnMut(&str)) {
        let rest = self.decoder.finish();
        if !self.add(&rest, false, show) {
            self.with_filter(show, |filter, show| filter.finish(show));
        }
    }

    fn add(&mut self, text: &str, control: bool, show: &mut dyn FnMut(&str)) -> bool {
        self.with_filter(show, |filter, show| filter.push(Piece { text, control }, show))
    }

    fn with_filter<T>(
        &mut self,
        show: &mut dyn FnMut(&str),
        work: impl FnOnce(&mut StopFilter, &mut dyn FnMut(Piece)) -> T,
    ) -> T {
        let (special, shown, plain) = (self.special, &mut self.shown, &mut self.plain);
        work(&mut self.filter, &mut |piece| {
            if !piece.control {
                plain.push_str(piece.text);
            }
            if !piece.control || special {
                shown.push_str(piece.text);
                show(piece.text);
            }
        })
    }
}

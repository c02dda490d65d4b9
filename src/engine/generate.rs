//! Prompt in, tokens out: prefill, then one token a pass until something says stop.

use std::time::Instant;

use super::stop::{Piece, StopFilter};
use super::{EngineError, Sampler, Session};
use crate::backend::Class;
use crate::model::{ForwardError, Outputs};
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
    fn new(prompt_tokens: usize, room: usize) -> Generation {
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

/// Continues a text; `show` gets what follows as it becomes certain.
pub fn generate(
    session: &mut Session,
    tokenizer: &Tokenizer,
    sampler: &mut Sampler,
    request: Request,
    interrupted: &dyn Fn() -> bool,
    show: &mut dyn FnMut(&str),
) -> Result<Generation, EngineError> {
    let start = Instant::now();
    let prompt = request.text.get(request.cached..).unwrap_or_default();
    let mut g = Generation::new(prompt.len(), request.n.min(session.n_ctx()));
    // The penalties see the text as it is now, also where an earlier one was cut.
    sampler.begin(request.text);
    if !evaluated(session, prompt, Class::Bulk, interrupted)? {
        g.stop = StopReason::Interrupt;
        return Ok(g);
    }
    g.prefill_s = start.elapsed().as_secs_f64();
    let mut text = Text::new(tokenizer, &request);
    let decode_start = Instant::now();
    while g.tokens.len() < request.n {
        let token = sampler.sample(session.logits()?);
        sampler.accept(token);
        g.first_token_s.get_or_insert_with(|| start.elapsed().as_secs_f64());
        if tokenizer.is_eog(token) {
            text.end(token, show);
            g.stop = StopReason::Eos;
            break;
        }
        g.tokens.push(token);
        if text.push(token, show) {
            g.stop = StopReason::Stop;
            break;
        }
        if interrupted() {
            g.stop = StopReason::Interrupt;
            break;
        }
        if g.tokens.len() == request.n {
            break;
        }
        if session.position() >= session.n_ctx() {
            g.context_full = true;
            break;
        }
        if !evaluated(session, &[token], Class::Exact, interrupted)? {
            g.stop = StopReason::Interrupt;
            break;
        }
        g.decode_passes += 1;
    }
    g.decode_s = decode_start.elapsed().as_secs_f64();
    if g.stop != StopReason::Stop {
        text.finish(show);
    }
    (g.text, g.plain) = (text.shown, text.plain);
    Ok(g)
}

/// Evaluates tokens for the logits of the last; `false` if it was interrupted.
fn evaluated(
    session: &mut Session,
    tokens: &[u32],
    class: Class,
    interrupted: &dyn Fn() -> bool,
) -> Result<bool, EngineError> {
    match session.eval(tokens, class, Outputs::Last, interrupted) {
        Err(EngineError::Forward(ForwardError::Interrupted)) => Ok(false),
        other => other.map(|()| true),
    }
}

/// The text of a generation as it grows: characters made whole, stop texts cut off.
struct Text<'a> {
    tokenizer: &'a Tokenizer,
    decoder: Decoder<'a>,
    filter: StopFilter,
    special: bool,
    shown: String,
    plain: String,
}

impl<'a> Text<'a> {
    fn new(tokenizer: &'a Tokenizer, request: &Request) -> Text<'a> {
        let (decoder, filter) = (Decoder::new(tokenizer), StopFilter::new(request.stops));
        Text { tokenizer, decoder, filter, special: request.special, shown: String::new(), plain: String::new() }
    }

    /// Adds a token. Returns whether it completes a stop text.
    fn push(&mut self, token: u32, show: &mut dyn FnMut(&str)) -> bool {
        if self.tokenizer.is_control(token) {
            let name = String::from_utf8_lossy(self.tokenizer.token_bytes(token));
            self.add(&name, true, show)
        } else {
            let text = self.decoder.push(token);
            self.add(&text, false, show)
        }
    }

    /// Ends the text with the token that ended it.
    fn end(&mut self, token: u32, show: &mut dyn FnMut(&str)) {
        if self.special && self.tokenizer.is_control(token) {
            self.push(token, show);
        }
    }

    /// Ends the text: what is held back is shown, unless it completes a stop text.
    fn finish(&mut self, show: &mut dyn FnMut(&str)) {
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

//! Prompt in, tokens out: prefill, then one token a pass until something says stop.

use std::time::Instant;

use super::{EngineError, Sampler, Session, StopFilter};
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

/// What was generated, and how long it took.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Ids, end-of-generation token apart.
    pub tokens: Vec<u32>,
    /// Their text, as far as it was shown.
    pub text: String,
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

/// Continues `prompt` by up to `n` tokens; `show` gets text as it becomes certain.
#[allow(clippy::too_many_arguments, reason = "a generation has this many inputs")]
pub fn generate(
    session: &mut Session,
    tokenizer: &Tokenizer,
    sampler: &mut Sampler,
    prompt: &[u32],
    n: usize,
    stops: &[String],
    interrupted: &dyn Fn() -> bool,
    show: &mut dyn FnMut(&str),
) -> Result<Generation, EngineError> {
    let start = Instant::now();
    let mut text = String::new();
    let mut g = Generation {
        tokens: Vec::with_capacity(n.min(1 << 20)),
        text: String::new(),
        stop: StopReason::Length,
        prompt_tokens: prompt.len(),
        prefill_s: 0.0,
        first_token_s: None,
        decode_passes: 0,
        decode_s: 0.0,
        context_full: false,
    };
    prompt.iter().for_each(|&t| sampler.accept(t));
    match session.eval(prompt, Outputs::Last, interrupted) {
        Err(EngineError::Forward(ForwardError::Interrupted)) => {
            g.stop = StopReason::Interrupt;
            return Ok(g);
        }
        other => other?,
    }
    g.prefill_s = start.elapsed().as_secs_f64();
    let mut decoder = Decoder::new(tokenizer);
    let mut filter = StopFilter::new(stops);
    let mut show_all = |t: &str| {
        if !t.is_empty() {
            text.push_str(t);
            show(t);
        }
    };
    let decode_start = Instant::now();
    while g.tokens.len() < n {
        let token = sampler.sample(session.logits()?);
        sampler.accept(token);
        g.first_token_s.get_or_insert_with(|| start.elapsed().as_secs_f64());
        if tokenizer.is_eog(token) {
            g.stop = StopReason::Eos;
            break;
        }
        g.tokens.push(token);
        if filter.push(&decoder.push(token), &mut show_all) {
            g.stop = StopReason::Stop;
            break;
        }
        if interrupted() {
            g.stop = StopReason::Interrupt;
            break;
        }
        if g.tokens.len() == n {
            break;
        }
        if session.position() >= session.n_ctx() {
            g.context_full = true;
            break;
        }
        match session.eval(&[token], Outputs::Last, interrupted) {
            Err(EngineError::Forward(ForwardError::Interrupted)) => {
                g.stop = StopReason::Interrupt;
                break;
            }
            other => other?,
        }
        g.decode_passes += 1;
    }
    g.decode_s = decode_start.elapsed().as_secs_f64();
    if g.stop != StopReason::Stop && !filter.push(&decoder.finish(), &mut show_all) {
        filter.finish(&mut show_all);
    }
    g.text = text;
    Ok(g)
}

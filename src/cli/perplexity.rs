//! `nt perplexity`: as llama.cpp computes it, so that the figures compare.
//!
//! The text is cut into chunks of `--ctx` tokens; each chunk starts with BOS where the model wants
//! one, and its second half is scored. No EOS is put behind the text: llama.cpp refuses models that add one.
//! With `--kl` the text is scored by the model as the file has it first, whose logits are kept, then requantised.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::args::{Auto, KvArg};
use super::report::requant_json;
use super::{Failure, ModelArg, Placement, codes, options, outputs, start, text};
use crate::backend::Class;
use crate::engine::{Opened, Options, Session, argmax};
use crate::machine::pressure::Watch;
use crate::model::Outputs;
use crate::plan::format_bytes;

/// Arguments of `nt perplexity`.
#[derive(Debug, Args)]
pub struct PerplexityArgs {
    #[command(flatten)]
    pub(super) model: ModelArg,
    /// The text, UTF-8; - is stdin.
    #[arg(long, short, value_name = "F")]
    file: PathBuf,
    /// Score only this many chunks of `--ctx` tokens, 1 or more; -1 is all of the text.
    #[arg(long, value_name = "N", default_value = "-1", value_parser = super::args::count_or_all)]
    chunks: usize,
    /// With `--requant`: score the text with the model as the file has it too, and say how far the requantised one's
    /// probabilities are from those (the mean Kullback-Leibler divergence per token). Of a long text, as many chunks as
    /// keep 1 GiB of logits.
    #[arg(long)]
    kl: bool,
    /// One JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    placement: Placement,
}

const CTX_DEFAULT: usize = 512;
/// Most bytes of logits that are kept for a comparison.
const KEPT_MAX: usize = 1 << 30;

/// Prints the perplexity with its standard error.
pub fn run(args: &PerplexityArgs) -> Result<(), Failure> {
    if args.chunks == 0 {
        return Err(Failure::usage("--chunks 0 scores nothing; a number from 1, or -1 for all, was expected"));
    }
    let opened = start::open(&args.model, &args.placement)?;
    outputs::check(&opened, &args.placement, &[])?;
    let tokenizer = &opened.tokenizer;
    let text = text::read_text(&args.file)?;
    let mut tokens = tokenizer.encode_text(&text);
    // Until here nothing asks whether to stop, and nothing is half done: a signal ends the process.
    super::interrupt::install()?;
    let n_ctx = match args.placement.ctx(&opened.model.hparams) {
        Auto::Auto => CTX_DEFAULT.min(opened.model.hparams.n_ctx_reach),
        Auto::Given(n) => n,
    };
    if n_ctx < 4 {
        return Err(Failure::usage(format!("--ctx {n_ctx} is too short to measure; at least 4 are needed")));
    }
    if tokens.len() < 2 * n_ctx {
        return Err(Failure::usage(format!(
            "{} has {} tokens; at least {} are needed for --ctx {n_ctx}",
            args.file.display(),
            tokens.len(),
            2 * n_ctx
        )));
    }
    let mut options = options::options(&args.placement, KvArg::F16)?;
    options.n_ctx = n_ctx;
    options.outputs = Session::outputs_at_once(opened.model.n_vocab);
    // Passes with logits of all tokens carry no more than those.
    options.longest_prompt = options.longest_prompt.map(|_| first_scored(n_ctx));
    if let Some(bos) = tokenizer.bos().filter(|_| tokenizer.adds_bos()) {
        tokens.chunks_exact_mut(n_ctx).for_each(|chunk| chunk[0] = bos);
    }
    let watch = start::prepare(&args.placement);
    let mut n_chunks = (tokens.len() / n_ctx).min(args.chunks);
    let mut before = None;
    if args.kl {
        n_chunks = n_chunks.min(kept_chunks(&options, &opened)?);
        let plain = Options { requant: None, repeat: None, ..options.clone() };
        let mut session = start::start(&opened, plain, false, &watch)?;
        let mut kept = Vec::new();
        let text = Text { tokens: &tokens, n_ctx, n_chunks };
        let (scored, ended) = text.score(&mut session, &watch, &mut |row, _| kept.extend_from_slice(row));
        ended?;
        before = Some((scored, kept));
    }
    let mut session = start::start(&opened, options, false, &watch)?;
    let text = Text { tokens: &tokens, n_ctx, n_chunks };
    let mut kl = Divergence::default();
    let (scored, ended) = text.score(&mut session, &watch, &mut |row, i| {
        if let Some((_, kept)) = &before {
            kl.add(&kept[i * row.len()..][..row.len()], row);
        }
    });
    if scored.chunks == 0 {
        return ended;
    }
    let requant = session.requant().cloned();
    let kl = before.as_ref().map(|(scored, _)| (scored.perplexity(), kl.mean(), kl.most, kl.same as f64 / kl.n as f64));
    let (perplexity, error) = scored.perplexity();
    let line = if args.json {
        let mut out = json!({ "perplexity": perplexity, "standard_error": error, "chunks": scored.chunks, "ctx": n_ctx, "scored_tokens": scored.n });
        out["requant"] = requant_json(requant.as_ref(), kl.map(|k| k.1));
        if let Some(((plain, plain_error), _, most, same)) = kl {
            out["before"] = json!({ "perplexity": plain, "standard_error": plain_error });
            out["kl_divergence_max"] = json!(most);
            out["same_top_token"] = json!(same);
        }
        out.to_string()
    } else {
        let mut out =
            format!("perplexity {perplexity:.4} +/- {error:.4} over {} chunks of {n_ctx} tokens", scored.chunks);
        if let Some(requant) = &requant {
            out += &format!("\nrequantised {}", requant.line());
        }
        if let Some(((plain, plain_error), mean, most, same)) = kl {
            out += &format!("\nas the file has it: perplexity {plain:.4} +/- {plain_error:.4}");
            out += &format!(
                "\nKL divergence {mean:.6} per token, {most:.4} at most; the likeliest token is the same for {:.2} %",
                same * 100.0
            );
        }
        out
    };
    super::report::print_line(&line)?;
    ended.and(start::write_timeline(&args.placement, &mut session))
}

/// Chunks whose logits are kept at once.
fn kept_chunks(options: &Options, opened: &Opened) -> Result<usize, Failure> {
    if options.requant.is_none() && options.repeat.is_none() {
        return Err(Failure::usage("--kl compares with a requantised model; give --requant TYPE too"));
    }
    let scored = options.n_ctx - 1 - options.n_ctx / 2;
    let bytes = scored.saturating_mul(opened.model.n_vocab).saturating_mul(4).max(1);
    match KEPT_MAX / bytes {
        0 => Err(Failure::limits(format!(
            "--kl keeps the logits of a chunk, {} with --ctx {}; at most {} are kept: give a smaller --ctx",
            format_bytes(bytes as u64),
            options.n_ctx,
            format_bytes(KEPT_MAX as u64)
        ))),
        n => Ok(n),
    }
}

/// The chunks that are scored.
#[derive(Clone, Copy)]
struct Text<'a> {
    tokens: &'a [u32],
    n_ctx: usize,
    n_chunks: usize,
}

/// Sums over scored tokens of whole chunks.
#[derive(Clone, Copy, Default)]
struct Scored {
    sum: f64,
    squares: f64,
    n: usize,
    chunks: usize,
}

/// The first token of a chunk of so many that is scored: those before give it its context.
fn first_scored(n_ctx: usize) -> usize {
    n_ctx / 2
}

impl Scored {
    /// The perplexity and its standard error.
    fn perplexity(&self) -> (f64, f64) {
        let (mean, n) = (self.sum / self.n as f64, self.n as f64);
        let error = ((self.squares / n - mean * mean).max(0.0) / (n - 1.0).max(1.0)).sqrt() * mean.exp();
        (mean.exp(), error)
    }
}

impl Text<'_> {
    /// Scores the second half of each chunk. `each` gets the logits of every scored token and its number. What ended it before all
    /// were scored comes second.
    fn score(
        &self,
        session: &mut Session,
        watch: &Watch,
        each: &mut dyn FnMut(&[f32], usize),
    ) -> (Scored, Result<(), Failure>) {
        let batch = session.max_batch().min(session.max_outputs());
        let (mut now, mut whole) = (Scored::default(), Scored::default());
        let first_scored = first_scored(self.n_ctx);
        // What one pass holds is not cut.
        let silent = if self.n_ctx > batch { first_scored } else { 0 };
        let n_vocab = session.model().n_vocab;
        for chunk in self.tokens.chunks_exact(self.n_ctx).take(self.n_chunks) {
            session.truncate(0);
            let (before, rest) = chunk.split_at(silent);
            if !before.is_empty()
                && let Err(e) = start::evaluate(session, before, Class::Bulk, Outputs::None, watch)
            {
                return (whole, Err(e));
            }
            for (c, part) in rest.chunks(batch).enumerate() {
                let start = silent + c * batch;
                if let Err(e) = start::evaluate(session, part, Class::Bulk, Outputs::All, watch) {
                    return (whole, Err(e));
                }
                let logits = match session.logits() {
                    Ok(logits) => logits,
                    Err(e) => return (whole, Err(codes::failure(e))),
                };
                for (i, row) in logits.chunks_exact(n_vocab).enumerate() {
                    let at = start + i;
                    if at >= first_scored && at + 1 < self.n_ctx {
                        let nll = log_sum(row) - f64::from(row[chunk[at + 1] as usize]);
                        each(row, now.n);
                        now = Scored { sum: now.sum + nll, squares: now.squares + nll * nll, n: now.n + 1, ..now };
                    }
                }
            }
            now.chunks += 1;
            whole = now;
        }
        (whole, Ok(()))
    }
}

/// How far probabilities are from others.
#[derive(Default)]
struct Divergence {
    sum: f64,
    most: f64,
    same: usize,
    n: usize,
}

impl Divergence {
    /// Adds a token whose logits were `from` and are `to`: `Σ p ln(p / q)`.
    fn add(&mut self, from: &[f32], to: &[f32]) {
        let (p, q) = (log_sum(from), log_sum(to));
        let terms = from.iter().zip(to).map(|(f, t)| {
            let (f, t) = (f64::from(*f) - p, f64::from(*t) - q);
            f.exp() * (f - t)
        });
        // Rounding may leave less than nothing.
        let kl = terms.sum::<f64>().max(0.0);
        self.sum += kl;
        self.most = self.most.max(kl);
        self.same += usize::from(argmax(from.iter().copied()) == argmax(to.iter().copied()));
        self.n += 1;
    }

    fn mean(&self) -> f64 {
        self.sum / self.n.max(1) as f64
    }
}

/// The logarithm of the sum of exponentials.
fn log_sum(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from((l - max).exp())).sum();
    f64::from(max) + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_divergence_is_none_of_equals_and_as_by_hand_of_others() {
        let mut d = Divergence::default();
        d.add(&[1.0, 2.0, 3.0], &[2.0, 3.0, 4.0]);
        assert!(d.mean() < 1e-12 && d.same == 1, "{}", d.mean());
        // Two tokens, 3/4 and 1/4 against halves.
        let mut d = Divergence::default();
        d.add(&[3f32.ln(), 0.0], &[0.0, 0.5e-7]);
        assert!((d.mean() - (0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln())).abs() < 1e-6, "{}", d.mean());
        assert_eq!((d.same, d.n), (0, 1));
    }
}

//! `nt perplexity`: as llama.cpp computes it, so that the figures compare.
//!
//! The text is cut into chunks of `--ctx` tokens; each chunk starts with BOS where the model wants
//! one, and its second half is scored. No EOS is put behind the text: llama.cpp refuses models that add one.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::args::{Auto, KvArg};
use super::{Failure, ModelArg, Placement, outputs, run};
use crate::backend::Class;
use crate::engine::Session;
use crate::model::Outputs;

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
    /// One JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    placement: Placement,
}

const CTX_DEFAULT: usize = 512;

/// Prints the perplexity with its standard error.
pub fn run(args: &PerplexityArgs) -> Result<(), Failure> {
    if args.chunks == 0 {
        return Err(Failure::usage("--chunks 0 scores nothing; a number from 1, or -1 for all, was expected"));
    }
    let opened = run::open(&args.model, &args.placement)?;
    outputs::check(&opened, &args.placement, &[])?;
    let tokenizer = &opened.tokenizer;
    let text = run::read_text(&args.file)?;
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
    let mut options = run::options(&args.placement, KvArg::F16)?;
    options.n_ctx = n_ctx;
    options.outputs = Session::outputs_at_once(opened.model.n_vocab);
    let batch = options.max_batch.min(options.outputs);
    let watch = run::prepare(&args.placement);
    let mut session = run::start(&opened, options, false, &watch)?;
    let n_chunks = (tokens.len() / n_ctx).min(args.chunks);
    let (mut sum, mut squares, mut n) = (0.0f64, 0.0f64, 0usize);
    // Sums of whole chunks, and how many; what ended it before all were scored.
    let (mut whole, mut ended) = ((0.0, 0.0, 0, 0), Ok(()));
    'chunks: for chunk in tokens.chunks_exact_mut(n_ctx).take(n_chunks) {
        if let Some(bos) = tokenizer.bos().filter(|_| tokenizer.adds_bos()) {
            chunk[0] = bos;
        }
        session.truncate(0);
        let first_scored = n_ctx / 2;
        for (c, part) in chunk.chunks(batch).enumerate() {
            let start = c * batch;
            if let Err(e) = run::evaluate(&mut session, part, Class::Bulk, Outputs::All, &watch) {
                ended = Err(e);
                break 'chunks;
            }
            let logits = session.logits().map_err(run::failure)?;
            for (i, row) in logits.chunks_exact(opened.model.n_vocab).enumerate() {
                let at = start + i;
                if at >= first_scored && at + 1 < n_ctx {
                    let nll = -log_softmax(row, chunk[at + 1]);
                    sum += nll;
                    squares += nll * nll;
                    n += 1;
                }
            }
        }
        whole = (sum, squares, n, whole.3 + 1);
    }
    let (sum, squares, n, n_chunks) = whole;
    if n_chunks == 0 {
        return ended;
    }
    let mean = sum / n as f64;
    let error = ((squares / n as f64 - mean * mean).max(0.0) / (n as f64 - 1.0).max(1.0)).sqrt() * mean.exp();
    let line = if args.json {
        json!({ "perplexity": mean.exp(), "standard_error": error, "chunks": n_chunks, "ctx": n_ctx, "scored_tokens": n }).to_string()
    } else {
        format!("perplexity {:.4} +/- {error:.4} over {n_chunks} chunks of {n_ctx} tokens", mean.exp())
    };
    super::report::print_line(&line)?;
    ended.and(run::write_timeline(&args.placement, &mut session))
}

fn log_softmax(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from((l - max).exp())).sum();
    f64::from(logits[token as usize] - max) - sum.ln()
}

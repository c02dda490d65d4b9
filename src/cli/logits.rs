//! `nt logits`: the logits of given tokens as a NumPy file, for comparison with other engines.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Args;

use super::args::KvArg;
use super::{Failure, ModelArg, Placement, codes, npy, options, outputs, start};
use crate::backend::{Class, EXACT_ROWS};
use crate::engine::{EngineError, Opened, Options, Part, Session};
use crate::machine::pressure::Watch;
use crate::model::Outputs;
use crate::state::{PAGE, Pages, SeqId};
use crate::storage::safe;

/// Arguments of `nt logits`.
#[derive(Debug, Args)]
pub struct LogitsArgs {
    #[command(flatten)]
    pub(super) model: ModelArg,
    /// Token ids, comma separated.
    #[arg(long, value_name = "ID[,ID…]", value_delimiter = ',', required = true, value_parser = token)]
    tokens: Vec<u32>,
    /// How many tokens are evaluated at once, comma separated; a part of one token is computed as a generated one. By default
    /// all are a prompt.
    #[arg(long, value_name = "N[,N…]", value_delimiter = ',')]
    parts: Option<Vec<NonZeroUsize>>,
    /// Evaluate so many sequences side by side: the tokens, and turned lists of them, whose logits are not written.
    #[arg(long, value_name = "N", default_value = "1")]
    sequences: NonZeroUsize,
    /// The logits of the block that predicts the token behind the next one (MTP, `nextn`): at each position it reads the token
    /// there and the final hidden state of the position before, and predicts the token behind.
    #[arg(long, conflicts_with_all = ["parts", "sequences"])]
    mtp: bool,
    /// The file: float32, tokens × vocabulary; - is stdout.
    #[arg(short, long, value_name = "OUT.npy")]
    output: PathBuf,
    #[command(flatten)]
    placement: Placement,
}

fn token(text: &str) -> Result<u32, String> {
    text.trim().parse().map_err(|_| format!("{text:?} is no id of a token; a whole number from 0 was expected"))
}

/// The path that stands for stdout.
const STDOUT: &str = "/dev/stdout";

/// Writes the file. The KV cache is F32 unless `--kv` says otherwise.
pub fn run(args: &LogitsArgs) -> Result<(), Failure> {
    super::interrupt::install()?;
    let opened = start::open(&args.model, &args.placement)?;
    let output = if args.output == Path::new("-") { Path::new(STDOUT) } else { &args.output };
    outputs::check(&opened, &args.placement, &[("-o", Some(output))])?;
    let n_vocab = opened.model.n_vocab;
    if let Some(t) = args.tokens.iter().find(|&&t| t as usize >= n_vocab) {
        return Err(Failure::usage(format!("--tokens: {t} is no token of this vocabulary of {n_vocab}")));
    }
    let parts = parts(args)?;
    let mut options = options::options(&args.placement, KvArg::F32)?;
    options.n_ctx = options::context(&args.placement, &opened, args.tokens.len(), args.tokens.len())?;
    options.outputs = Session::outputs_at_once(n_vocab);
    options.longest_prompt = options.longest_prompt.map(|_| args.tokens.len());
    options.prompt_ctx = args.tokens.len();
    options.sequences = args.sequences.get();
    if options.sequences > 1 {
        // Each has as many pages as the tokens take.
        options.n_ctx = Pages::of(options.n_ctx).saturating_mul(PAGE).saturating_mul(options.sequences);
    }
    let watch = start::prepare(&args.placement);
    let (mut session, hidden) = match args.mtp {
        true => {
            let hidden = hidden(&opened, options.clone(), &args.tokens, &watch)?;
            // Counts of blocks per tier are those of the model.
            let next = opened.into_next().map_err(codes::failure)?;
            let options = Options { tiers: None, ..options };
            (start::start(&next, options, false, &watch)?, Some(hidden))
        }
        false => (start::start(&opened, options, false, &watch)?, None),
    };
    let others = turned(&mut session, args)?;
    let batch = session.max_batch().min(session.max_outputs());
    let file = safe::create(output).map_err(|e| outputs::failed(output, &e))?;
    let from = Evaluation { parts: &parts, others: &others, hidden: hidden.as_deref(), batch };
    // A part of the matrix has a header that promises more: it is not left behind.
    let finite =
        write(&from, &mut session, (file, output), n_vocab, &watch).inspect_err(|_| outputs::forget(output))?;
    start::write_timeline(&args.placement, &mut session)?;
    finite.map_err(codes::failure)
}

/// What the block for further tokens reads at each position: the final hidden state of the one before, zeros at the first.
fn hidden(opened: &Opened, options: Options, tokens: &[u32], watch: &Watch) -> Result<Vec<f32>, Failure> {
    let mut session = start::start(opened, options, false, watch)?;
    let batch = session.max_batch();
    let (seq, width) = (session.sequence(), session.n_embd());
    let mut hidden = vec![0.0; width];
    for chunk in tokens.chunks(batch) {
        let rows = session.hidden(seq, chunk, &|| start::to_stop(watch)).map_err(|e| start::stopped(e, watch))?;
        hidden.extend_from_slice(rows);
    }
    hidden.truncate(tokens.len() * width);
    Ok(hidden)
}

/// Further sequences, each with the tokens turned by another number of places.
fn turned(session: &mut Session, args: &LogitsArgs) -> Result<Vec<(SeqId, Vec<u32>)>, Failure> {
    let other = |i: usize| {
        let mut tokens = args.tokens.clone();
        tokens.rotate_left(i % args.tokens.len());
        Ok((session.fork_at(0).map_err(codes::failure)?, tokens))
    };
    (1..args.sequences.get()).map(other).collect()
}

/// What is evaluated.
struct Evaluation<'a> {
    /// The tokens, with their class.
    parts: &'a [(&'a [u32], Class)],
    /// Other sequences.
    others: &'a [(SeqId, Vec<u32>)],
    /// A final hidden state for each token, where the model takes such.
    hidden: Option<&'a [f32]>,
    /// Most tokens at once.
    batch: usize,
}

impl Evaluation<'_> {
    /// Tokens `at..at + chunk.len()` of each sequence.
    fn evaluate(
        &self,
        session: &mut Session,
        (chunk, class, at): (&[u32], Class, usize),
        watch: &Watch,
    ) -> Result<(), Failure> {
        let (seq, width, stop) = (session.sequence(), session.n_embd(), || start::to_stop(watch));
        if let Some(hidden) = self.hidden {
            let hidden = &hidden[at * width..(at + chunk.len()) * width];
            return session.eval_behind(chunk, hidden, Outputs::All, &stop).map_err(|e| start::stopped(e, watch));
        }
        let mut parts = vec![Part { seq, class, tokens: chunk, outputs: Outputs::All }];
        parts.extend(self.others.iter().map(|(seq, tokens)| {
            let tokens = &tokens[at..at + chunk.len()];
            Part { seq: *seq, class, tokens, outputs: Outputs::None }
        }));
        let rows = parts.len() * chunk.len();
        let together = parts.len() <= session.parts_max()
            && rows <= if class == Class::Exact { EXACT_ROWS } else { session.max_batch() };
        // The first one comes last, so that its logits are those of the last pass.
        let each: Vec<&[Part<'_>]> = if together { vec![&parts] } else { parts.chunks(1).rev().collect() };
        each.into_iter().try_for_each(|parts| session.eval_parts(parts, &stop)).map_err(|e| start::stopped(e, watch))
    }
}

/// The tokens as they are evaluated, with their class.
fn parts(args: &LogitsArgs) -> Result<Vec<(&[u32], Class)>, Failure> {
    let Some(parts) = &args.parts else { return Ok(vec![(&args.tokens, Class::Bulk)]) };
    let (sum, all) = (parts.iter().map(|n| n.get()).fold(0, usize::saturating_add), args.tokens.len());
    if sum != all {
        return Err(Failure::usage(format!("--parts: they add up to {sum}, but there are {all} tokens")));
    }
    let mut left = &args.tokens[..];
    let part = |n: &NonZeroUsize| {
        let (part, rest) = left.split_at(n.get());
        left = rest;
        (part, if part.len() == 1 { Class::Exact } else { Class::Bulk })
    };
    Ok(parts.iter().map(part).collect())
}

/// Evaluates the tokens and writes their logits; also returns the first that is not finite, since those are written too.
fn write(
    from: &Evaluation<'_>,
    session: &mut Session,
    (file, output): (File, &Path),
    n_vocab: usize,
    watch: &Watch,
) -> Result<Result<(), EngineError>, Failure> {
    let failed = |e: std::io::Error| outputs::failed(output, &e);
    let mut out = BufWriter::new(file);
    npy::write_header(&mut out, from.parts.iter().map(|p| p.0.len()).sum(), n_vocab).map_err(failed)?;
    // Logits that are not finite are written too: who compares them wants to see which.
    let mut finite = Ok(());
    let mut at = 0;
    let chunks = from.parts.iter().flat_map(|(part, class)| part.chunks(from.batch).map(|chunk| (chunk, *class)));
    for (chunk, class) in chunks {
        from.evaluate(session, (chunk, class, at), watch)?;
        at += chunk.len();
        npy::write_values(&mut out, session.any_logits().map_err(codes::failure)?).map_err(failed)?;
        finite = finite.and_then(|()| session.check_finite());
    }
    out.flush().map_err(failed)?;
    out.get_ref().sync_data().or_else(ignore_unsyncable).map_err(failed)?;
    Ok(finite)
}

/// Pipes and devices cannot be synced; a full disk can say so only here.
fn ignore_unsyncable(e: std::io::Error) -> std::io::Result<()> {
    match e.raw_os_error() {
        Some(libc::EINVAL | libc::EROFS | libc::ENOTSUP) => Ok(()),
        _ => Err(e),
    }
}

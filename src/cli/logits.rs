//! `nt logits`: the logits of given tokens as a NumPy file, for comparison with other engines.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Args;

use super::args::KvArg;
use super::{Failure, ModelArg, Placement, npy, outputs, run};
use crate::backend::Class;
use crate::engine::{EngineError, Session};
use crate::machine::pressure::Watch;
use crate::model::Outputs;
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
    let opened = run::open(&args.model, &args.placement)?;
    let output = if args.output == Path::new("-") { Path::new(STDOUT) } else { &args.output };
    outputs::check(&opened, &args.placement, &[("-o", Some(output))])?;
    let n_vocab = opened.model.n_vocab;
    if let Some(t) = args.tokens.iter().find(|&&t| t as usize >= n_vocab) {
        return Err(Failure::usage(format!("--tokens: {t} is no token of this vocabulary of {n_vocab}")));
    }
    let parts = parts(args)?;
    let mut options = run::options(&args.placement, KvArg::F32)?;
    options.n_ctx = run::context(&args.placement, &opened, args.tokens.len(), args.tokens.len())?;
    options.outputs = Session::outputs_at_once(n_vocab);
    let batch = options.max_batch.min(options.outputs);
    let watch = run::prepare(&args.placement);
    let mut session = run::start(&opened, options, false, &watch)?;
    let file = safe::create(output).map_err(|e| outputs::failed(output, &e))?;
    // A part of the matrix has a header that promises more: it is not left behind.
    let finite = write(&parts, &mut session, (file, output), (batch, n_vocab), &watch)
        .inspect_err(|_| outputs::forget(output))?;
    run::write_timeline(&args.placement, &mut session)?;
    finite.map_err(run::failure)
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
    parts: &[(&[u32], Class)],
    session: &mut Session,
    (file, output): (File, &Path),
    (batch, n_vocab): (usize, usize),
    watch: &Watch,
) -> Result<Result<(), EngineError>, Failure> {
    let failed = |e: std::io::Error| outputs::failed(output, &e);
    let mut out = BufWriter::new(file);
    npy::write_header(&mut out, parts.iter().map(|p| p.0.len()).sum(), n_vocab).map_err(failed)?;
    // Logits that are not finite are written too: who compares them wants to see which.
    let mut finite = Ok(());
    for (chunk, class) in parts.iter().flat_map(|(part, class)| part.chunks(batch).map(|chunk| (chunk, *class))) {
        run::evaluate(session, chunk, class, Outputs::All, watch)?;
        npy::write_values(&mut out, session.any_logits().map_err(run::failure)?).map_err(failed)?;
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

//! `nt run`, and what the commands that load a model share.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;

use super::args::{Auto, BackendArg, KvArg, LayoutArg, ReaderArg};
use super::report::{self, Report};
use super::{Failure, ModelArg, Placement, Sampling, interrupt};
use crate::backend::BackendKind;
use crate::engine::{EngineError, Generation, Opened, Options, Sampler, Session, StopReason, generate};
use crate::gguf::TensorType;
use crate::machine::pressure::{self, Watch};
use crate::model::ForwardError;
use crate::storage::vfio::device::OpenError;
use crate::storage::{ReaderKind, StorageError};
use crate::tokenizer::ChatTemplate;

/// Arguments of `nt run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    model: ModelArg,
    /// The prompt.
    #[arg(short, long, required_unless_present = "prompt_file", conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// Read the prompt from a file; - is stdin.
    #[arg(long, value_name = "F")]
    prompt_file: Option<PathBuf>,
    /// Tokens to generate at most.
    #[arg(short = 'n', long = "n-predict", default_value_t = 256)]
    n: usize,
    /// Apply the model's chat template to the prompt.
    #[arg(long)]
    chat: bool,
    /// System message; implies --chat.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Stop at this text (repeat for more).
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    placement: Placement,
    /// Stdout is one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &RunArgs) -> Result<(), Failure> {
    interrupt::install()?;
    let params = args.sampling.params()?;
    let prompt = match (&args.prompt, &args.prompt_file) {
        (Some(p), _) => p.clone(),
        (None, Some(f)) => read_text(f)?,
        (None, None) => String::new(),
    };
    let opened = open(&args.model, &args.placement)?;
    let tokens = prompt_tokens(&opened, &prompt, args.chat || args.system.is_some(), args.system.as_deref())?;
    let mut options = options(&args.placement, KvArg::F16)?;
    options.n_ctx = context(&args.placement, &opened, tokens.len(), tokens.len().saturating_add(args.n))?;
    pressure::raise_oom_score(Path::new("/"));
    let watch = Watch::start(Path::new("/"));
    let mut session = start(&opened, options, true)?;
    let mut sampler = Sampler::new(params, opened.model.n_vocab);
    let mut written = Ok(());
    let generation = generate(
        &mut session,
        &opened.tokenizer,
        &mut sampler,
        &tokens,
        args.n,
        &args.stop,
        &|| interrupt::interrupted() || watch.tripped(),
        &mut |text| {
            if !args.json && written.is_ok() {
                let mut out = std::io::stdout().lock();
                written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
            }
        },
    )
    .map_err(failure)?;
    written.map_err(|e| Failure::output("stdout", &e))?;
    finish(args, &opened, &mut session, &generation, watch.reason())
}

/// `pressure`: why the watch of memory asked the run to stop, if it did.
fn finish(
    args: &RunArgs,
    opened: &Opened,
    session: &mut Session,
    g: &Generation,
    pressure: Option<String>,
) -> Result<(), Failure> {
    let pressure = pressure.filter(|_| g.stop == StopReason::Interrupt && !interrupt::interrupted());
    let mut report = Report::new(session, opened);
    report.warnings(pressure.as_slice());
    report.generation(g);
    if let Some(path) = &args.placement.timeline {
        session.write_timeline(path).map_err(|e| Failure::output(&path.display().to_string(), &e))?;
    }
    if args.json {
        report::print_line(&report.json(g).to_string())?;
    } else {
        report::print_line("")?;
        report.print();
    }
    if let Some(reason) = pressure {
        return Err(Failure::running(format!(
            "stopped before memory ran out: {reason}; give a smaller --ram, or end what else takes memory"
        )));
    }
    if g.stop == StopReason::Interrupt { Err(Failure::interrupted()) } else { Ok(()) }
}

/// The prompt's tokens, through the chat template if asked.
fn prompt_tokens(opened: &Opened, prompt: &str, chat: bool, system: Option<&str>) -> Result<Vec<u32>, Failure> {
    let tokens = if chat {
        let template = ChatTemplate::from_metadata(&opened.gguf.metadata, &opened.tokenizer).map_err(Failure::usage)?;
        let mut messages = Vec::new();
        messages.extend(system.map(|s| serde_json::json!({ "role": "system", "content": s })));
        messages.push(serde_json::json!({ "role": "user", "content": prompt }));
        let text = template.render(&messages, true).map_err(Failure::usage)?;
        encode_rendered(opened, &text)
    } else {
        opened.tokenizer.encode(prompt, true, true)
    };
    if tokens.is_empty() {
        return Err(Failure::usage("the prompt is empty, and this model adds no BOS token"));
    }
    Ok(tokens)
}

/// Ids of a rendered template: its own special tokens are read as such, and a BOS that it writes
/// itself is not doubled.
pub(super) fn encode_rendered(opened: &Opened, text: &str) -> Vec<u32> {
    let mut ids = opened.tokenizer.encode(text, true, true);
    if let (Some(bos), [a, b, ..]) = (opened.tokenizer.bos(), &ids[..])
        && *a == bos
        && *b == bos
    {
        ids.remove(0);
    }
    ids
}

/// Reads a text file (or stdin as `-`), which must be UTF-8.
pub(super) fn read_text(path: &Path) -> Result<String, Failure> {
    let bytes = if path == Path::new("-") {
        let mut all = Vec::new();
        std::io::Read::read_to_end(&mut std::io::stdin().lock(), &mut all).map(|_| all)
    } else {
        std::fs::read(path)
    };
    let bytes = bytes.map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
    String::from_utf8(bytes).map_err(|e| {
        Failure::usage(format!("{} is not UTF-8: byte {} is invalid", path.display(), e.utf8_error().valid_up_to()))
    })
}

/// Opens a model: header, tokenizer, structure.
pub(super) fn open(model: &ModelArg, placement: &Placement) -> Result<Opened, Failure> {
    let opened = Opened::open_from(model.path(), &named_places(placement)?).map_err(failure)?;
    for w in opened.tokenizer.warnings() {
        tracing::warn!("{w}");
    }
    Ok(opened)
}

/// The session's options from the command line; `n_ctx` and `outputs` are the caller's.
pub(super) fn options(p: &Placement, kv_default: KvArg) -> Result<Options, Failure> {
    Ok(Options {
        backend: match p.backend {
            BackendArg::Auto => BackendKind::Auto,
            BackendArg::Cpu => BackendKind::Cpu,
            BackendArg::Cuda => BackendKind::Cuda,
        },
        vram: p.vram.given(),
        threads: p.threads.map_or_else(crate::machine::n_cpus, usize::from),
        ram: p.ram.given(),
        storage: p.tier_c != "none",
        copies: named_places(p)?,
        reader: reader_kind(p.reader),
        verify: p.verify,
        kv_type: match p.kv.unwrap_or(kv_default) {
            KvArg::F16 => TensorType::F16,
            KvArg::F32 => TensorType::F32,
        },
        n_buffers: p.n_buffers.given(),
        tiers: p.tiers,
        stacked: p.layout == LayoutArg::Stacked,
        n_ctx: 0,
        max_batch: Options::MAX_BATCH,
        outputs: 1,
        timeline: p.timeline.is_some(),
    })
}

/// The reader that `--reader` asks for.
pub(super) fn reader_kind(reader: ReaderArg) -> ReaderKind {
    match reader {
        ReaderArg::Auto => ReaderKind::Auto,
        ReaderArg::IoUring => ReaderKind::IoUring,
        ReaderArg::Pread => ReaderKind::Pread,
        ReaderArg::Vfio => ReaderKind::Vfio,
    }
}

fn named_places(p: &Placement) -> Result<Vec<PathBuf>, Failure> {
    if p.tier_c == "none" { Ok(Vec::new()) } else { places(&p.tier_c) }
}

/// The places that `--tier-c` names, several between commas; none for `auto`.
pub(super) fn places(text: &str) -> Result<Vec<PathBuf>, Failure> {
    if text == "auto" {
        return Ok(Vec::new());
    }
    // A path may have commas of its own.
    let places: Vec<&str> =
        if Path::new(text).exists() { vec![text] } else { text.split(',').map(str::trim).collect() };
    match places.iter().find(|p| p.is_empty() || **p == "none") {
        Some(_) => Err(Failure::usage(format!(
            "--tier-c {text}: none, auto, or drives, files or directories between commas were expected"
        ))),
        None => Ok(places.into_iter().map(PathBuf::from).collect()),
    }
}

/// Positions of the KV cache: `--ctx`, or what is wished up to what the model was trained on.
/// `needed` tokens must fit with one to spare for the first generated one.
pub(super) fn context(p: &Placement, opened: &Opened, needed: usize, wished: usize) -> Result<usize, Failure> {
    let n_ctx = match p.ctx {
        Auto::Given(n) => n,
        Auto::Auto => wished.max(needed).min(opened.model.hparams.n_ctx_train),
    };
    if needed > n_ctx {
        return Err(Failure::limits(format!(
            "the prompt has {needed} tokens, but the context holds {n_ctx} (the model was trained on {}); shorten the prompt or give a larger --ctx",
            opened.model.hparams.n_ctx_train
        )));
    }
    Ok(n_ctx)
}

/// Starts a session, with progress on a terminal and notes on stderr.
pub(super) fn start(opened: &Opened, options: Options, progress: bool) -> Result<Session, Failure> {
    let bar = if progress && std::io::IsTerminal::is_terminal(&std::io::stderr()) {
        indicatif::ProgressBar::new(0).with_style(
            indicatif::ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes} {bytes_per_sec}")
                .unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()),
        )
    } else {
        indicatif::ProgressBar::hidden()
    };
    let session = Session::new(opened, options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })
    .map_err(failure)?;
    bar.finish_and_clear();
    for note in session.notes() {
        tracing::warn!("{note}");
    }
    Ok(session)
}

/// An engine's error with its exit code.
pub(super) fn failure(e: EngineError) -> Failure {
    match e {
        EngineError::Gguf(_) | EngineError::Model(_) | EngineError::Tokenizer(_) | EngineError::Copy(_) => {
            Failure::usage(e)
        }
        EngineError::Plan(_) | EngineError::Memory(_) => Failure::limits(e),
        EngineError::Forward(ForwardError::Interrupted) => Failure::interrupted(),
        EngineError::Forward(ForwardError::Backend(crate::backend::BackendError::UnsupportedType { .. })) => {
            Failure::usage(e)
        }
        EngineError::Backend(crate::backend::BackendError::UnsupportedType { .. }) => Failure::usage(e),
        EngineError::Backend(crate::backend::BackendError::OutOfMemory { .. }) => Failure::limits(e),
        EngineError::Storage(StorageError::Drive(OpenError::WrongDrive { .. })) => Failure::refused(e),
        EngineError::Storage(StorageError::NotBound(_)) => Failure::usage(e),
        EngineError::Forward(_) | EngineError::Backend(_) | EngineError::Storage(_) => Failure::running(e),
    }
}

//! `nt run`, and what the commands that load a model share.

use std::cell::Cell;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::args::{Auto, BackendArg, ExpertCacheArg, KvArg, LayoutArg, ReaderArg, SiteArg};
use super::failure::say;
use super::page::{self, Timings};
use super::report::{self, Report};
use super::template::TemplateOptions;
use super::{Failure, ModelArg, Placement, Sampling, interrupt, outputs};
use crate::backend::cuda::Device;
use crate::backend::{BackendError, BackendKind, Class};
use crate::engine::{
    ConstraintError, EngineError, ExpertSlots, Form, Generation, Grammars, Opened, Options, Reasoning, Recipe, Request,
    RequestError, Sampler, SamplerParams, Session, Sites, Starting, StopReason, choose_buffers, generate, nearest,
    this_machine,
};
use crate::gguf::TensorType;
use crate::machine::ollama::{self, Eviction};
use crate::machine::pressure::{self, Watch};
use crate::model::{ForwardError, Outputs};
use crate::plan::{Machine, format_bytes};
use crate::storage::guard::Host;
use crate::storage::vfio::device::OpenError;
use crate::storage::{ReaderKind, StorageError};
use crate::tokenizer::TokenizerError;

/// Positions of the KV cache where a text goes on until it is full.
const CTX_UNTIL_FULL: usize = 4096;

/// Arguments of `nt run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub(super) model: ModelArg,
    /// The prompt, as text.
    #[arg(
        short,
        long,
        allow_hyphen_values = true,
        required_unless_present = "prompt_file",
        conflicts_with = "prompt_file"
    )]
    prompt: Option<String>,
    /// Read the prompt from a file, without the newline at its end; - is stdin.
    #[arg(short = 'f', long, alias = "file", value_name = "F")]
    prompt_file: Option<PathBuf>,
    /// Tokens to generate at most; fewer where the model ends its text or the context is full. -1 goes on until then
    /// (with `--ctx auto`, 4096 positions, or twice the prompt where that is more).
    #[arg(
        short = 'n',
        alias = "predict",
        long = "n-predict",
        default_value = "256",
        value_parser = super::args::n_predict
    )]
    n: usize,
    /// Apply the model's chat template to the prompt.
    #[arg(long)]
    chat: bool,
    /// System message; implies --chat.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    #[command(flatten)]
    template: TemplateOptions,
    /// Stop where this text comes, which is not printed (repeat for more). The name of a control token, as
    /// `<|im_end|>`, stops at that token.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = super::args::stop_text)]
    stop: Vec<String>,
    /// Show control tokens by their names.
    #[arg(long)]
    special: bool,
    /// Hold the text to a JSON Schema, in a file or, beginning with {, as it is given here. The text is JSON that
    /// conforms to it, or the beginning of such where -n or the context ends it. Keywords that are not followed are
    /// refused by name.
    #[arg(long, alias = "json-schema-file", value_name = "FILE", conflicts_with = "grammar")]
    json_schema: Option<PathBuf>,
    /// Hold the text to a grammar: llguidance's Lark with a rule `start`, or llama.cpp's GBNF with a rule `root`, in a file
    /// or, with ::= in it, as it is given here.
    #[arg(long, alias = "grammar-file", value_name = "FILE")]
    grammar: Option<PathBuf>,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    placement: Placement,
    /// Write a page with figures, tier map, timeline and rates, which any browser opens.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Stdout is one JSON object with text and figures, in place of the text.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &RunArgs) -> Result<(), Failure> {
    args.sampling.params(&SamplerParams::default())?;
    let form = form(args)?;
    let prompt = match (&args.prompt, &args.prompt_file) {
        (Some(p), _) => p.clone(),
        // The newline that ends a file's last line is no part of the prompt, as in llama.cpp.
        (None, Some(f)) => {
            let mut text = read_text(f)?;
            text.truncate(text.strip_suffix('\n').map_or(text.len(), str::len));
            text
        }
        (None, None) => String::new(),
    };
    let opened = open(&args.model, &args.placement)?;
    outputs::check(&opened, &args.placement, &[("--html", args.html.as_deref())])?;
    args.sampling.check(opened.model.n_vocab)?;
    let (mut params, mut warnings) = args.sampling.params_for(&opened.gguf.metadata)?;
    warnings.iter().for_each(|w| tracing::warn!("{w}"));
    let (tokens, reasoning) = prompt_tokens(args, &opened, &prompt, &mut warnings)?;
    if let Some(form) = &form {
        let grammars = Grammars::new(&opened.tokenizer).map_err(|e| failure(e.into()))?;
        params.grammar = Some(grammars.compile(form, reasoning).map_err(|e| failure(e.into()))?);
    }
    // Until here nothing asks whether to stop, and nothing is half done: a signal ends the process.
    interrupt::install()?;
    let mut options = options(&args.placement, KvArg::F16)?;
    options.n_ctx = context(&args.placement, &opened, tokens.len(), needed_context(tokens.len(), args.n))?;
    options.timeline |= args.html.is_some();
    let watch = prepare(&args.placement);
    let mut session = start(&opened, options, true, &watch)?;
    let mut sampler = Sampler::for_model(params, opened.model.n_vocab, &opened.tokenizer);
    let mut out = (!args.json).then(report::Text::stdout);
    let request = Request { text: &tokens, cached: 0, n: args.n, stops: &args.stop, special: args.special };
    // Where nobody takes the text, none is made.
    let lost = Cell::new(false);
    let stop = || to_stop(&watch) || lost.get();
    let generation = generate(&mut session, &opened.tokenizer, &mut sampler, request, &stop, &mut |text| {
        if let Some(out) = &mut out {
            lost.set(!out.piece(text));
        }
    })
    .map_err(failure)?;
    out.map_or(Ok(()), report::Text::end)?;
    finish(args, &opened, &mut session, &generation, watch.reason(), &warnings)
}

/// `pressure`: why the watch of memory asked the run to stop, if it did. `warnings`: what there was to say of the
/// prompt.
fn finish(
    args: &RunArgs,
    opened: &Opened,
    session: &mut Session,
    g: &Generation,
    pressure: Option<String>,
    warnings: &[String],
) -> Result<(), Failure> {
    let pressure = pressure.filter(|_| g.stop == StopReason::Interrupt && !interrupt::interrupted());
    if let Some(shard) = opened.gguf.shards.first() {
        session.recall_ceilings(&shard.path);
    }
    // What is not kept is counted again.
    let _ = session.keep_reuse();
    let mut report = Report::new(session, opened);
    report.warnings(warnings);
    report.warnings(pressure.as_slice());
    report.generation(g);
    report.predicted(session.predicted_on(&this_machine(opened, session.backend_kind())));
    // The result comes first: a file that cannot be written takes nothing from it.
    if args.json {
        report::print_line(&report.json(g).to_string())?;
    } else {
        report.print();
    }
    let files = write_timeline(&args.placement, session).and_then(|()| write_page(args, opened, session, g, &report));
    let stopped = match pressure {
        Some(reason) => Some(short_of_memory(&reason)),
        None => (g.stop == StopReason::Interrupt).then(Failure::interrupted),
    };
    match (stopped, files) {
        (None, files) => files,
        (Some(stopped), files) => {
            // Both are said; the exit code is that of the run.
            files.err().iter().for_each(|e| _ = e.report());
            Err(stopped)
        }
    }
}

/// Writes the page, if one was asked for.
fn write_page(
    args: &RunArgs,
    opened: &Opened,
    session: &mut Session,
    g: &Generation,
    report: &Report,
) -> Result<(), Failure> {
    let Some(path) = &args.html else { return Ok(()) };
    let rate = (g.prefill_s > 0.0).then(|| g.prompt_tokens as f64 / g.prefill_s);
    let timings = Timings {
        prefill: rate.map(|r| (g.prompt_tokens, r)),
        first_token_s: g.first_token_s,
        decode: (g.decode_passes > 0).then(|| g.decode_passes as f64 / g.decode_s),
        peak_rss_bytes: crate::machine::peak_rss_bytes(),
    };
    page::write(path, session, opened, &session.events(), &timings, report)
}

/// Writes the timeline, if one was asked for.
pub(super) fn write_timeline(placement: &Placement, session: &mut Session) -> Result<(), Failure> {
    match &placement.timeline {
        Some(path) => session.write_timeline(path).map_err(|e| outputs::failed(path, &e)),
        None => Ok(()),
    }
}

/// What is done before memory is taken: an Ollama is asked to make room where the user asks for it, and
/// memory is watched from here on; should the kernel have to kill, it takes this process first.
pub(super) fn prepare(p: &Placement) -> Watch {
    if p.evict_ollama {
        evict_ollama();
    }
    pressure::raise_oom_score(Path::new("/"));
    Watch::start(Path::new("/"))
}

/// Says on stderr what came of it. A run goes on either way: the plan takes what is free.
fn evict_ollama() {
    let host = std::env::var("OLLAMA_HOST").ok();
    match ollama::address(host.as_deref()).and_then(ollama::evict) {
        Ok(Eviction::Unloaded(names)) if names.is_empty() => say("Ollama has no model loaded"),
        Ok(Eviction::Unloaded(names)) => say(&format!("Ollama has unloaded {}", names.join(", "))),
        Ok(Eviction::NotThere(at)) => say(&format!("no Ollama answers at {at}; nothing to unload")),
        Ok(Eviction::StillLoaded(names)) => tracing::warn!("Ollama still holds {}", names.join(", ")),
        Err(e) => tracing::warn!("Ollama's models could not be unloaded: {e}"),
    }
}

/// Evaluates tokens of a class; SIGINT and a shortage of memory end it.
pub(super) fn evaluate(
    s: &mut Session,
    tokens: &[u32],
    class: Class,
    outputs: Outputs,
    watch: &Watch,
) -> Result<(), Failure> {
    s.eval(tokens, class, outputs, &|| to_stop(watch)).map_err(|e| stopped(e, watch))
}

/// Whether a signal or a shortage of memory asks the run to stop.
pub(super) fn to_stop(watch: &Watch) -> bool {
    interrupt::interrupted() || watch.tripped()
}

/// An engine's error with its exit code; if the watch of memory has interrupted the run, that of memory.
pub(super) fn stopped(e: EngineError, watch: &Watch) -> Failure {
    match (e, watch.reason()) {
        (EngineError::Forward(ForwardError::Interrupted), Some(why)) if !interrupt::interrupted() => {
            short_of_memory(&why)
        }
        (e, _) => failure(e),
    }
}

/// The failure of a run that its watch of memory has stopped.
pub(super) fn short_of_memory(reason: &str) -> Failure {
    Failure::running(format!(
        "stopped before memory ran out: {reason}; give a smaller --ram, or end what else takes memory"
    ))
}

/// Positions that a run needs for a prompt and `n` tokens behind it.
fn needed_context(prompt: usize, n: usize) -> usize {
    if n == usize::MAX { CTX_UNTIL_FULL.max(prompt.saturating_mul(2)) } else { prompt.saturating_add(n) }
}

/// What the text is held to, if anything.
fn form(args: &RunArgs) -> Result<Option<Form>, Failure> {
    if let Some(path) = &args.json_schema {
        let text = match path.to_str().filter(|text| text.trim_start().starts_with('{')) {
            Some(text) => text.to_owned(),
            None => read_text(path)?,
        };
        let schema = serde_json::from_str(&text)
            .map_err(|e| Failure::usage(format!("--json-schema {}: it is not JSON: {e}", path.display())))?;
        return Ok(Some(Form::Schema(schema)));
    }
    let Some(path) = &args.grammar else { return Ok(None) };
    match path.to_str().filter(|text| text.contains("::=")) {
        Some(text) => Ok(Some(Form::Grammar(text.to_owned()))),
        None => read_text(path).map(|text| Some(Form::Grammar(text))),
    }
}

/// The prompt's tokens, through the chat template if asked, and whether it lets the model reason; `warnings` gets what
/// had to be changed for it.
fn prompt_tokens(
    args: &RunArgs,
    opened: &Opened,
    prompt: &str,
    warnings: &mut Vec<String>,
) -> Result<(Vec<u32>, Reasoning), Failure> {
    let chat = args.chat || args.system.is_some() || args.template.any();
    let mut reasoning = Reasoning::None;
    let tokens = if chat {
        let template = args.template.open(&opened.gguf.metadata, &opened.tokenizer)?;
        let mut messages = Vec::new();
        messages.extend(args.system.iter().map(|s| serde_json::json!({ "role": "system", "content": s })));
        messages.push(serde_json::json!({ "role": "user", "content": prompt }));
        let rendered = template.prompt(&messages, None, true).map_err(template_failure)?;
        rendered.notes.iter().for_each(|note| tracing::warn!("{note}"));
        warnings.extend(template.notes().iter().chain(&rendered.notes).cloned());
        check_size("the prompt with what the template adds", rendered.text.len())?;
        reasoning = Reasoning::of(template.source(), &rendered.text);
        opened.tokenizer.encode_rendered(&rendered.text)
    } else {
        opened.tokenizer.encode_prompt(prompt)
    };
    if tokens.is_empty() {
        return Err(Failure::usage(match prompt.is_empty() {
            true => "the prompt is empty, and this model adds no BOS token",
            false => "the vocabulary has no token for any byte of the prompt, and this model adds no BOS token",
        }));
    }
    Ok((tokens, reasoning))
}

/// A template's error with its exit code.
pub(super) fn template_failure(e: TokenizerError) -> Failure {
    match e {
        TokenizerError::TemplateMemory(_) => Failure::limits(e),
        e => Failure::usage(e),
    }
}

/// Most bytes of a text: more is no prompt, and may be a device that never ends.
const TEXT_MAX: u64 = 256 << 20;

/// Bytes of a text whose tokens are made without a look at the memory that is free.
const TEXT_UNCHECKED: u64 = 1 << 20;
/// Memory that making its tokens takes for each byte of a text, where all of it is one word or every byte a token.
const MEMORY_OF_A_BYTE: u64 = 100;

/// Refuses a text whose tokens take more memory to make than there is; `what` names it.
pub(super) fn check_size(what: impl std::fmt::Display, bytes: usize) -> Result<(), Failure> {
    let bytes = bytes as u64;
    if bytes <= TEXT_UNCHECKED {
        return Ok(());
    }
    let need = bytes.saturating_mul(MEMORY_OF_A_BYTE);
    match crate::machine::memory(Path::new("/")).budget() {
        Some(free) if need > free => Err(Failure::limits(format!(
            "{what}: it has {}, whose tokens may take {} of memory to make, but {} can be taken; shorten it, or free memory",
            format_bytes(bytes),
            format_bytes(need),
            format_bytes(free)
        ))),
        _ => Ok(()),
    }
}

/// Reads a text file (or stdin as `-`), which must be UTF-8, not longer than [`TEXT_MAX`], and no more than the memory
/// that is free can make tokens of.
pub(super) fn read_text(path: &Path) -> Result<String, Failure> {
    let all = |input: &mut dyn Read| {
        let mut bytes = Vec::new();
        input.take(TEXT_MAX + 1).read_to_end(&mut bytes).map(|_| bytes)
    };
    let bytes = match path == Path::new("-") {
        true => all(&mut super::streams::Stdin),
        false => std::fs::File::open(path).and_then(|mut file| all(&mut file)),
    };
    let bytes = bytes.map_err(|e| Failure::usage(format!("the text {} cannot be read: {e}", path.display())))?;
    if bytes.len() as u64 > TEXT_MAX {
        return Err(Failure::usage(format!(
            "{} is longer than {} MiB, the most a text may have",
            path.display(),
            TEXT_MAX >> 20
        )));
    }
    check_size(path.display(), bytes.len())?;
    String::from_utf8(bytes).map_err(|e| {
        Failure::usage(format!("{} is not UTF-8: byte {} is invalid", path.display(), e.utf8_error().valid_up_to()))
    })
}

/// Opens a model: header, tokenizer, structure.
pub(super) fn open(model: &ModelArg, placement: &Placement) -> Result<Opened, Failure> {
    let overrides = placement.overrides.overrides()?;
    let opened = Opened::open_from(model.path(), &named_places(placement)?, &overrides).map_err(failure)?;
    for w in opened.tokenizer.warnings().iter().chain(&opened.warnings) {
        tracing::warn!("{w}");
    }
    Ok(opened)
}

/// The session's options from the command line; `n_ctx` and `outputs` are the caller's.
pub(super) fn options(p: &Placement, kv_default: KvArg) -> Result<Options, Failure> {
    let (backend, sites) = sites(p)?;
    Ok(Options {
        sequences: 1,
        backend,
        sites,
        vram: p.vram.given(),
        threads: p.threads.given().unwrap_or_else(crate::machine::n_cpus),
        ram: p.ram.given(),
        storage: p.tier_c != "none",
        copies: named_places(p)?,
        reader: reader_kind(p.reader),
        verify: p.verify,
        kv_type: match p.kv.unwrap_or(kv_default) {
            KvArg::F16 => TensorType::F16,
            KvArg::F32 => TensorType::F32,
            KvArg::Q8_0 => TensorType::Q8_0,
        },
        caches: true,
        expert_slots: match p.expert_cache {
            ExpertCacheArg::Auto => ExpertSlots::Auto,
            ExpertCacheArg::On => ExpertSlots::On,
            ExpertCacheArg::Off => ExpertSlots::Off,
        },
        routing: None,
        n_buffers: p.n_buffers.given(),
        more_frames: p.n_buffers.given().is_none(),
        tiers: p.tiers,
        stacked: p.layout == LayoutArg::Stacked,
        n_ctx: 0,
        max_batch: usize::from(p.batch),
        outputs: 1,
        requant: p.requant(),
        timeline: p.timeline.is_some(),
        repeat: match &p.plan {
            Some(given) => Some(Arc::new(Recipe::find(given).map_err(Failure::usage)?)),
            None => None,
        },
    })
}

/// What computes.
fn sites(p: &Placement) -> Result<(BackendKind, Sites), Failure> {
    let backend = match (p.site, p.backend) {
        (SiteArg::Gpu | SiteArg::Both, BackendArg::Cpu) => {
            return Err(Failure::usage("--backend cpu leaves no GPU for --site gpu or both; leave one of them away"));
        }
        (SiteArg::Cpu, BackendArg::Cuda) => {
            return Err(Failure::usage("--backend cuda and --site cpu contradict each other; leave one of them away"));
        }
        (SiteArg::Auto, BackendArg::Auto) => BackendKind::Auto,
        (SiteArg::Cpu, _) | (_, BackendArg::Cpu) => BackendKind::Cpu,
        _ => BackendKind::Cuda,
    };
    let sites = match (p.site, p.exact) {
        (SiteArg::Both, true) => {
            return Err(Failure::usage("--exact computes at one site, --site both at two; leave one of them away"));
        }
        (SiteArg::Both, false) => Sites::Both,
        (SiteArg::Auto, false) => Sites::Auto,
        _ => Sites::One,
    };
    Ok((backend, sites))
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

/// The places that the option of tier C names.
pub(super) fn named_places(p: &Placement) -> Result<Vec<PathBuf>, Failure> {
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
/// `needed` tokens must fit; the first generated one takes no place, since it follows from their logits.
pub(super) fn context(p: &Placement, opened: &Opened, needed: usize, wished: usize) -> Result<usize, Failure> {
    let n_ctx = match p.ctx(&opened.model.hparams) {
        Auto::Given(n) => n,
        Auto::Auto => wished.max(needed).min(opened.model.hparams.n_ctx_reach),
    };
    let reach = opened.model.hparams.n_ctx_reach;
    if needed > n_ctx {
        let cure = match needed > reach {
            true => "shorten the prompt, or give a larger --ctx: text gets worse beyond what the model was trained on",
            false => "shorten the prompt or give a larger --ctx",
        };
        return Err(Failure::limits(format!(
            "the prompt has {needed} tokens, but the context holds {n_ctx} (the model was trained on {reach}); {cure}"
        )));
    }
    Ok(n_ctx)
}

/// Starts a session, with progress on a terminal and notes on stderr. A signal or a shortage of memory ends it.
pub(super) fn start(opened: &Opened, options: Options, progress: bool, watch: &Watch) -> Result<Session, Failure> {
    start_until(opened, options, progress, watch, &|| false)
}

/// The same; it ends as by a signal once `stop` says so.
pub(super) fn start_until(
    opened: &Opened,
    options: Options,
    progress: bool,
    watch: &Watch,
    stop: &dyn Fn() -> bool,
) -> Result<Session, Failure> {
    let bar = if progress && std::io::IsTerminal::is_terminal(&std::io::stderr()) {
        indicatif::ProgressBar::new(0).with_style(
            indicatif::ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes} {bytes_per_sec}")
                .unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()),
        )
    } else {
        indicatif::ProgressBar::hidden()
    };
    let open = |options| {
        let mut progress = |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        };
        Session::start(opened, options, &mut Starting { progress: &mut progress, stop: &|| to_stop(watch) || stop() })
    };
    // Held until the session holds it: what is asked of the GPU before then shares one context with it.
    let _gpu = (options.backend != BackendKind::Cpu).then(|| Device::open(0));
    let session = match buffers(opened, &options) {
        None => open(options.clone()),
        // What a forecast counts on may have been taken meanwhile.
        chosen => match open(Options { n_buffers: chosen, ..options.clone() }) {
            Err(EngineError::Plan(_)) => open(options.clone()),
            other => other,
        },
    };
    bar.finish_and_clear();
    let session = session.map_err(|e| match e {
        e @ EngineError::Forward(_) => stopped(e, watch),
        e => refusal(e, opened, || this_machine(opened, options.backend), &options),
    })?;
    for note in session.notes() {
        tracing::warn!("{note}");
    }
    // What is not kept can be had from `nt plan --save`.
    let _ = session.recipe().keep();
    if options.vram.is_some() && session.device().is_none() {
        tracing::warn!("--vram limits nothing here: processors compute, and take what --ram gives");
    }
    // Without a GPU the fallback is a line of the report; where there is one, something is to be mended.
    if let Some(why) = session.fallback().filter(|_| crate::machine::facts::has_nvidia_gpu(&Host::default())) {
        tracing::warn!("{why}; `nt doctor` says what mends it");
    }
    Ok(session)
}

/// The number of buffers by rates that were measured, if it is not given and there are any.
fn buffers(opened: &Opened, options: &Options) -> Option<usize> {
    let measured = crate::machine::probe::cache_file().is_some_and(|f| f.exists());
    if options.n_buffers.is_some() || options.repeat.is_some() || !measured {
        return None;
    }
    choose_buffers(&opened.model, &this_machine(opened, options.backend), options)
}

/// An error with what would fit instead, if it is one of the plan.
pub(super) fn refusal(e: EngineError, opened: &Opened, machine: impl Fn() -> Machine, options: &Options) -> Failure {
    match e {
        EngineError::Plan(_) => match nearest(&opened.model, &machine(), options) {
            Some(other) => Failure::limits(format!("{e}; {other}")),
            None => failure(e),
        },
        e => failure(e),
    }
}

/// An engine's error with its exit code.
pub(super) fn failure(e: EngineError) -> Failure {
    match e {
        EngineError::Gguf(_) | EngineError::Model(_) | EngineError::Tokenizer(_) => Failure::usage(e),
        EngineError::Device(ref why) if why.is_refusal() => Failure::refused(e),
        EngineError::Copy(_) | EngineError::Image(_) | EngineError::Device(_) => Failure::usage(e),
        EngineError::Repeat { .. } => Failure::limits(e),
        EngineError::Plan(_) | EngineError::Memory(_) | EngineError::Arena(_) | EngineError::State(_) => {
            Failure::limits(e)
        }
        EngineError::Request(RequestError::ContextFull { .. }) => Failure::limits(e),
        EngineError::Constraint(
            ConstraintError::AllBanned | ConstraintError::NothingLeft(_) | ConstraintError::Step(_),
        ) => Failure::running(e),
        EngineError::Constraint(_) => Failure::usage(e),
        EngineError::Request(_) | EngineError::Saved(_) => Failure::usage(e),
        EngineError::Forward(ForwardError::Interrupted) => Failure::interrupted(),
        EngineError::Forward(ForwardError::Backend(BackendError::UnsupportedType { .. })) => Failure::usage(e),
        EngineError::Backend(BackendError::UnsupportedType { .. }) => Failure::usage(e),
        EngineError::Backend(BackendError::OutOfMemory { .. } | BackendError::Threads { .. }) => Failure::limits(e),
        EngineError::Storage(StorageError::Threads(_) | StorageError::Drive(OpenError::Map { .. })) => {
            Failure::limits(e)
        }
        EngineError::Storage(StorageError::Drive(OpenError::WrongDrive { .. })) => Failure::refused(e),
        EngineError::Storage(StorageError::NotBound(_)) => Failure::usage(e),
        EngineError::Forward(_) | EngineError::Backend(_) | EngineError::Storage(_) | EngineError::NotFinite { .. } => {
            Failure::running(e)
        }
    }
}

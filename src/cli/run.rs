//! `nt run`.

use std::cell::Cell;
use std::path::PathBuf;

use clap::Args;

use super::args::KvArg;
use super::codes::{failure, template_failure};
use super::options::{context, options};
use super::page::{self, Timings};
use super::report::{self, Report};
use super::start::{open, prepare, short_of_memory, start, to_stop, write_timeline};
use super::template::TemplateOptions;
use super::text::{check_size, read_text};
use super::{Failure, ModelArg, Placement, Sampling, interrupt, outputs};
use crate::engine::{
    Form, Generation, Grammars, Opened, Reasoning, Request, Sampler, SamplerParams, Session, StopReason, generate,
    this_machine,
};

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
    options.longest_prompt = options.longest_prompt.map(|_| tokens.len());
    options.prompt_ctx = tokens.len();
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

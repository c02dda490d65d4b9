//! The commands.

use clap::{ArgAction, Parser, Subcommand};

use super::args::ModelArg;

/// Run language models that are larger than VRAM and larger than RAM.
#[derive(Debug, Parser)]
#[command(name = "nt", version, about, max_term_width = 100)]
pub struct Cli {
    /// More log (repeat for more).
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// No warnings, no progress, no report.
    #[arg(short, long, global = true)]
    pub quiet: bool,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Continue a prompt.
    Run(super::run::RunArgs),
    /// Talk with a model; keeps the history and the KV cache.
    Chat(super::chat::ChatArgs),
    /// Serve a model over HTTP to programs that speak OpenAI's, Anthropic's or Ollama's API.
    Serve(super::serve::ServeArgs),
    /// List the models on this machine: what fits where, how fast, or why one cannot run.
    List(super::list::ListArgs),
    /// Fetch a model from Hugging Face or any other address into the library; goes on where it was cut off.
    Pull(super::pull::PullArgs),
    /// Show hyper-parameters, tensors, types and bytes.
    Inspect(super::inspect::InspectArgs),
    /// Compare every tensor's bytes with the record of `nt device extents` or `nt stage`.
    Verify(super::verify::VerifyArgs),
    /// Print the token ids of a text.
    Tokenize(super::tokenize::TokenizeArgs),
    /// Print the prompt that the model's chat template renders.
    Template(super::template::TemplateArgs),
    /// Write the logits of given tokens as a NumPy file.
    Logits(super::logits::LogitsArgs),
    /// Measure perplexity on a text, as llama.cpp does.
    Perplexity(super::perplexity::PerplexityArgs),
    /// Say where every unit would live, what speed to expect and what binds, without running.
    Plan(super::plan::PlanArgs),
    /// Measure prefill and decode speed.
    Bench(super::bench::BenchArgs),
    /// Check every kernel against its reference on this machine.
    Selftest(super::selftest::SelftestArgs),
    /// Measure storage, memory and the link to the GPU; never writes.
    Probe(super::probe::ProbeArgs),
    /// Write a model to a spare drive, erasing what it held (as root).
    Stage(super::stage::StageArgs),
    /// Drives: which there are, which may be bound and why not, hand one over, give it back.
    Device(super::device::DeviceArgs),
    /// Say what this machine lacks to run fast or safely, and the commands that mend it.
    Doctor(super::doctor::DoctorArgs),
    /// Print a completion script for a shell.
    Completions(super::completions::CompletionsArgs),
}

impl Command {
    /// The model that the command was given, if it takes one.
    pub(super) fn model(&mut self) -> Option<&mut ModelArg> {
        Some(match self {
            Command::Run(a) => &mut a.model,
            Command::Chat(a) => &mut a.model,
            Command::Inspect(a) => &mut a.model,
            Command::Verify(a) => &mut a.model,
            Command::Tokenize(a) => &mut a.model,
            Command::Template(a) => &mut a.model,
            Command::Logits(a) => &mut a.model,
            Command::Perplexity(a) => &mut a.model,
            Command::Plan(a) => &mut a.model,
            Command::Bench(a) => &mut a.model,
            Command::Stage(a) => &mut a.model,
            // It has several.
            Command::Serve(_)
            | Command::List(_)
            | Command::Pull(_)
            | Command::Selftest(_)
            | Command::Probe(_)
            | Command::Device(_)
            | Command::Doctor(_)
            | Command::Completions(_) => return None,
        })
    }
}

/// Lets every option take a number below zero, so that it is answered by what the option expects, and not by
/// "unexpected argument '-1'".
pub(super) fn taking_negatives(command: clap::Command) -> clap::Command {
    let names: Vec<String> = command.get_subcommands().map(|c| c.get_name().to_owned()).collect();
    let command = command.mut_args(|a| match a.get_action().takes_values() {
        true => a.allow_negative_numbers(true),
        false => a,
    });
    names.iter().fold(command, |command, name| command.mut_subcommand(name, taking_negatives))
}

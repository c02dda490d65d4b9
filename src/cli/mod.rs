//! One file per subcommand; parsing, dispatch and exit codes.

mod args;
mod bench;
mod chat;
mod codes;
mod command;
mod completions;
pub mod device;
mod doctor;
mod entry;
mod failure;
mod inspect;
mod interrupt;
mod list;
mod llama;
mod logits;
mod npy;
mod options;
mod outputs;
mod page;
mod perplexity;
mod plan;
mod printable;
mod probe;
mod pull;
mod report;
mod routing;
mod run;
mod selftest;
mod serve;
mod stage;
mod start;
mod streams;
mod template;
mod text;
mod tokenize;
mod verify;

pub use args::{ModelArg, ModelArgs, Placement, Sampling};
pub use command::Cli;
pub use failure::Failure;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};
use command::{Command, taking_negatives};
use nix::sys::resource::{Resource, getrlimit};

/// Stack of the thread that everything starts from.
const STACK_BYTES: usize = 8 << 20;

/// Entry point of the binary. Where the system gives less than the usual stack (`ulimit -s`), a thread has it.
pub fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|a| a == crate::engine::constraint::VET_ARGUMENT) {
        return crate::engine::constraint::vet_main();
    }
    interrupt::ignore_file_size_signal();
    let enough = getrlimit(Resource::RLIMIT_STACK).is_ok_and(|(soft, _)| soft >= STACK_BYTES as u64);
    if enough {
        return command();
    }
    match std::thread::Builder::new().stack_size(STACK_BYTES).spawn(command).map(std::thread::JoinHandle::join) {
        Ok(Ok(code)) => code,
        Ok(Err(panic)) => std::panic::resume_unwind(panic),
        // What stack there is may do.
        Err(_) => command(),
    }
}

/// Parses and runs a command.
fn command() -> ExitCode {
    let parsed = taking_negatives(Cli::command()).try_get_matches().and_then(|m| Cli::from_arg_matches(&m));
    let mut cli = match parsed {
        Ok(cli) => cli,
        Err(e) => match llama::explained(std::env::args_os()) {
            Some(failure) => return failure.report(),
            None => return unparsed(&e),
        },
    };
    init_log(&cli);
    let unknown = match cli.command.model().map(|m| m.look_up().map(|()| m.is_unknown())) {
        Some(Err(failure)) => return failure.report(),
        found => found.is_some_and(|f| f.unwrap_or(false)),
    };
    let result = match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::List(args) => list::run(&args),
        Command::Pull(args) => pull::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Verify(args) => verify::run(&args, cli.verbose > 0),
        Command::Tokenize(args) => tokenize::run(&args),
        Command::Template(args) => template::run(&args),
        Command::Logits(args) => logits::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Perplexity(args) => perplexity::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Selftest(args) => selftest::run(&args),
        Command::Stage(args) => stage::run(&args),
        Command::Device(args) => device::run(args),
        Command::Probe(args) => probe::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions(args) => completions::run(&args, &mut Cli::command()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) if unknown => failure.with_library_hint().with_pull_hint().report(),
        Err(failure) => failure.with_pull_hint().report(),
    }
}

/// Prints help, or what is wrong with the command line. Help that cannot be written is a failure as other results are.
fn unparsed(e: &clap::Error) -> ExitCode {
    match e.print() {
        Err(lost) if !e.use_stderr() => Failure::output("stdout", &lost).report(),
        _ => ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2)),
    }
}

/// Logs go to stderr: warnings by default, more with `-v` or as `RUST_LOG` says, none with `-q`.
fn init_log(cli: &Cli) {
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "info",
        (_, 2) => "debug",
        _ => "trace",
    };
    let asked = std::env::var("RUST_LOG").ok().filter(|f| !f.is_empty() && !cli.quiet);
    let parsed = asked.as_ref().map(tracing_subscriber::EnvFilter::try_new);
    let wrong = parsed.as_ref().and_then(|p| p.as_ref().err().map(ToString::to_string));
    let filter = parsed.and_then(Result::ok).unwrap_or_else(|| format!("nt={level}").into());
    // Texts of files reach the terminal through warnings too.
    let fields = tracing_subscriber::fmt::format::debug_fn(|out, field, value| {
        let text = format!("{value:?}");
        let text = printable::sentence(&text);
        if field.name() == "message" { write!(out, "{text}") } else { write!(out, "{field}={text}") }
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .fmt_fields(tracing_subscriber::field::MakeExt::delimited(fields, " "))
        .with_writer(|| streams::Stderr)
        .with_target(false)
        .without_time()
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()) && colours())
        .init();
    if let Some(why) = wrong {
        tracing::warn!("RUST_LOG is left out: it is no filter ({why})");
    }
}

/// Whether a terminal is to get colours: not one that calls itself dumb, and not where `NO_COLOR` is set.
fn colours() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()) && std::env::var_os("TERM").is_some_and(|t| t != "dumb")
}

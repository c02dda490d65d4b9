//! `nt chat`: a conversation on the terminal; history and KV cache are kept.

use std::io::{BufRead, Write};

use clap::Args;
use serde_json::{Value as Json, json};

use super::args::{Auto, KvArg};
use super::report::Report;
use super::{Failure, ModelArg, Placement, Sampling, interrupt, run};
use crate::engine::{Sampler, StopReason, generate};
use crate::tokenizer::ChatTemplate;

/// Arguments of `nt chat`.
#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub(super) model: ModelArg,
    /// System message (default: what the model's chat template says without one).
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of an answer at most.
    #[arg(short = 'n', long = "n-predict", default_value_t = 1024)]
    n: usize,
    /// Stop an answer where this text comes, which is not printed (repeat for more).
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    placement: Placement,
}

/// Positions of the KV cache where nothing else is said.
const CTX_DEFAULT: usize = 4096;

/// Reads lines from stdin until it ends or `/exit`.
pub fn run(args: &ChatArgs) -> Result<(), Failure> {
    interrupt::install()?;
    let params = args.sampling.params()?;
    let opened = run::open(&args.model, &args.placement)?;
    let template = ChatTemplate::from_metadata(&opened.gguf.metadata, &opened.tokenizer).map_err(Failure::usage)?;
    let mut options = run::options(&args.placement, KvArg::F16)?;
    options.n_ctx = match args.placement.ctx {
        Auto::Given(n) => n,
        Auto::Auto => CTX_DEFAULT.min(opened.model.hparams.n_ctx_train),
    };
    let watch = run::prepare(&args.placement);
    let mut session = run::start(&opened, options, true, &watch)?;
    let mut sampler = Sampler::new(params, opened.model.n_vocab);
    let mut messages: Vec<Json> = args.system.iter().map(|s| json!({ "role": "system", "content": s })).collect();
    // Tokens whose keys and values are in the cache.
    let mut cached: Vec<u32> = Vec::new();
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stdin());
    loop {
        if terminal {
            eprint!("\n> ");
        }
        let Some(line) = read_line()? else { break };
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => break,
            _ => {}
        }
        messages.push(json!({ "role": "user", "content": line.trim_end_matches(['\n', '\r']) }));
        let prompt = run::encode_rendered(&opened, &template.render(&messages, true).map_err(Failure::usage)?);
        if prompt.len() >= session.n_ctx() {
            return Err(Failure::limits(format!(
                "the conversation has {} tokens, but the context holds {}; give a larger --ctx",
                prompt.len(),
                session.n_ctx()
            )));
        }
        // Earlier turns stay cached as far as the rendered text agrees; one token is left to evaluate.
        let agree = cached.iter().zip(&prompt).take_while(|(a, b)| a == b).count().min(prompt.len() - 1);
        session.truncate(agree);
        let mut written = Ok(());
        let g = generate(
            &mut session,
            &opened.tokenizer,
            &mut sampler,
            &prompt[agree..],
            args.n,
            &args.stop,
            &|| interrupt::interrupted() || watch.tripped(),
            &mut |text| {
                let mut out = std::io::stdout().lock();
                if written.is_ok() {
                    written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
                }
            },
        )
        .map_err(run::failure)?;
        written.map_err(|e| Failure::output("stdout", &e))?;
        super::report::print_line("")?;
        cached = prompt;
        cached.extend(&g.tokens);
        cached.truncate(session.position());
        messages.push(json!({ "role": "assistant", "content": g.text }));
        if g.stop == StopReason::Interrupt {
            let reason = watch.reason().filter(|_| !interrupt::interrupted());
            Report::new(&session, &opened).print();
            return Err(reason.map_or_else(Failure::interrupted, |r| run::short_of_memory(&r)));
        }
        if g.context_full {
            tracing::warn!("the context is full; the answer was cut off (give a larger --ctx)");
        }
    }
    Report::new(&session, &opened).print();
    Ok(())
}

/// A line of stdin; `None` at its end.
fn read_line() -> Result<Option<String>, Failure> {
    let mut bytes = Vec::new();
    let n = std::io::stdin()
        .lock()
        .read_until(b'\n', &mut bytes)
        .map_err(|e| Failure::running(format!("reading stdin failed: {e}")))?;
    if n == 0 {
        return Ok(None);
    }
    String::from_utf8(bytes).map(Some).map_err(|_| Failure::usage("stdin is not UTF-8"))
}

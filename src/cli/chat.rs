//! `nt chat`: a conversation on the terminal; history and KV cache are kept.

use std::cell::Cell;

use clap::Args;
use serde_json::{Value as Json, json};

use super::args::{Auto, KvArg};
use super::entry::{Entries, Entry};
use super::failure::say;
use super::report::{self, Report};
use super::template::TemplateOptions;
use super::{Failure, ModelArg, Placement, Sampling, codes, interrupt, options, outputs, start, text};
use crate::engine::{
    EngineError, Generation, Opened, Request, Sampler, SamplerParams, Saved, Session, StopReason, generate,
};
use crate::machine::pressure::Watch;
use crate::plan::format_bytes;
use crate::tokenizer::ChatTemplate;

/// Arguments of `nt chat`.
#[derive(Debug, Args)]
#[command(after_help = COMMANDS)]
pub struct ChatArgs {
    #[command(flatten)]
    pub(super) model: ModelArg,
    /// System message (default: what the model's chat template says without one).
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    #[command(flatten)]
    template: TemplateOptions,
    /// Tokens of an answer at most; -1 until the context is full.
    #[arg(
        short = 'n',
        long = "n-predict",
        default_value = "1024",
        value_parser = super::args::n_predict
    )]
    n: usize,
    /// Stop an answer where this text comes, which is not printed (repeat for more). The name of a control token, as
    /// `<|im_end|>`, stops at that token.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = super::args::stop_text)]
    stop: Vec<String>,
    /// Show control tokens by their names.
    #[arg(long)]
    special: bool,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    placement: Placement,
    /// Stdout is one JSON object with messages, answers and figures at the end, in place of the answers as they come.
    #[arg(long)]
    json: bool,
}

/// What can be typed, for the help.
const COMMANDS: &str = "At the prompt:
  /clear   forget the conversation, but not the system message
  /regen   answer the last message again
  /save F  save the conversation and its cache to the file F, for its owner alone
  /load F  go on with the conversation in F; what the cache cannot take over is computed anew
  /help    show this
  /exit    end (also /quit, Ctrl-D, or Ctrl-C at the prompt)
A message that begins with / has a space before it.
Several lines in one message: end a line with \\ to go on in the next, or put the lines between \"\"\" and \"\"\".
Ctrl-C in an answer ends the answer. Where the context is full, the oldest turns are left out.";

/// What is said where a message was interrupted.
const TAKEN_BACK: &str = "stopped before the first word; the message is taken back";
/// Positions of the KV cache where nothing else is said.
const CTX_DEFAULT: usize = 4096;
/// Of the context, one part in so many is kept free for an answer before old turns are left out.
const ROOM_FOR_ANSWER: usize = 4;

/// Reads messages from stdin until it ends or `/exit`.
pub fn run(args: &ChatArgs) -> Result<(), Failure> {
    args.sampling.params(&SamplerParams::default())?;
    let opened = start::open(&args.model, &args.placement)?;
    outputs::check(&opened, &args.placement, &[])?;
    args.sampling.check(opened.model.n_vocab)?;
    let (params, notes) = args.sampling.params_for(&opened.gguf.metadata)?;
    notes.iter().for_each(|note| tracing::warn!("{note}"));
    let template = args.template.open(&opened.gguf.metadata, &opened.tokenizer)?;
    let mut options = options::options(&args.placement, KvArg::F16)?;
    options.n_ctx = match args.placement.ctx(&opened.model.hparams) {
        Auto::Given(n) => n,
        Auto::Auto => CTX_DEFAULT.min(opened.model.hparams.n_ctx_reach),
    };
    // Until here nothing asks whether to stop, and nothing is half done: a signal ends the process.
    interrupt::install()?;
    let watch = start::prepare(&args.placement);
    let session = start::start(&opened, options, true, &watch)?;
    let mut chat = Chat {
        args,
        opened: &opened,
        template,
        watch,
        session,
        sampler: Sampler::for_model(params, opened.model.n_vocab, &opened.tokenizer),
        messages: args.system.iter().map(|s| json!({ "role": "system", "content": s })).collect(),
        cached: Vec::new(),
        prompt: 0,
        told: Vec::new(),
        answers: 0,
        refused: None,
        answered: Vec::new(),
    };
    let ended = chat.talk();
    chat.finish()?;
    match ended {
        // A script that got no answer at all is told so.
        Ok(()) if chat.answers == 0 => chat.refused.map_or(Ok(()), Err),
        ended => ended,
    }
}

/// A conversation.
struct Chat<'a> {
    args: &'a ChatArgs,
    opened: &'a Opened,
    template: ChatTemplate,
    watch: Watch,
    session: Session,
    sampler: Sampler,
    messages: Vec<Json>,
    /// Tokens whose keys and values are in the cache.
    cached: Vec<u32>,
    /// As many of the first of them were evaluated as a prompt.
    prompt: usize,
    /// What was said and need not be said again.
    told: Vec<String>,
    answers: usize,
    /// How the last message that got no answer was refused.
    refused: Option<Failure>,
    /// The answers as `--json` prints them.
    answered: Vec<Json>,
}

/// Messages as they are to be rendered, and their tokens.
struct Turn {
    messages: Vec<Json>,
    prompt: Vec<u32>,
}

impl Chat<'_> {
    /// The report, and what else was asked for.
    fn finish(&mut self) -> Result<(), Failure> {
        // What is not kept is counted again.
        let _ = self.session.keep_reuse();
        let report = Report::new(&self.session, self.opened);
        if self.args.json {
            let mut all = json!({ "messages": self.messages, "answers": self.answered });
            if let (Json::Object(all), Json::Object(session)) = (&mut all, report.session_json()) {
                all.extend(session);
            }
            report::print_line(&all.to_string())?;
        } else {
            report.print();
        }
        start::write_timeline(&self.args.placement, &mut self.session)
    }

    fn talk(&mut self) -> Result<(), Failure> {
        let mut entries = Entries::stdin()?;
        loop {
            let text = match entries.next()? {
                Entry::End => return Ok(()),
                Entry::Interrupted => {
                    say("");
                    return Err(Failure::interrupted());
                }
                Entry::Unusable(why) => {
                    self.refuse(Failure::usage(format!("the message is left out: {why}")));
                    continue;
                }
                Entry::Text(text) => text,
            };
            match text.trim() {
                "" => {}
                "/exit" | "/quit" => return Ok(()),
                "/help" => say(COMMANDS),
                "/clear" => self.clear(),
                "/regen" => match self.messages.split_last() {
                    Some((last, before)) if last["role"] == "assistant" => self.answer(before.to_vec())?,
                    _ => say("there is no answer yet"),
                },
                command if matches!(command.split_whitespace().next(), Some("/save" | "/load")) => {
                    self.file(command)?
                }
                _ if looks_like_command(&text) => self.refuse(Failure::usage(format!(
                    "{} is no command, and not sent to the model; /help lists the commands, and a space before the / makes it a message",
                    text.trim()
                ))),
                _ => {
                    let mut messages = self.messages.clone();
                    messages.push(json!({ "role": "user", "content": text }));
                    self.answer(messages)?;
                }
            }
        }
    }

    /// `/save F` or `/load F`.
    fn file(&mut self, command: &str) -> Result<(), Failure> {
        let (verb, name) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let name = name.trim();
        if name.is_empty() {
            say(&format!("{verb} FILE; /help shows more"));
            return Ok(());
        }
        let path = std::path::Path::new(name);
        let done = if verb == "/save" { self.save(path) } else { self.load(path) };
        match done {
            Err(why) if start::to_stop(&self.watch) => {
                self.refuse(why);
                self.interrupted()
            }
            Err(why) => {
                self.refuse(why);
                Ok(())
            }
            Ok(what) => {
                say(&what);
                Ok(())
            }
        }
    }

    fn save(&mut self, path: &std::path::Path) -> Result<String, Failure> {
        let bytes = self.session.save(path, &self.messages, &self.cached, self.prompt).map_err(codes::failure)?;
        Ok(format!(
            "saved: {} messages, {} tokens of the cache, {}",
            self.messages.len(),
            self.cached.len(),
            format_bytes(bytes)
        ))
    }

    fn load(&mut self, path: &std::path::Path) -> Result<String, Failure> {
        let saved = Saved::open(path).map_err(|e| codes::failure(e.into()))?;
        let messages = saved.messages().to_vec();
        let (tokens, prompt) = saved.tokens();
        let (tokens, n) = (tokens.to_vec(), messages.len());
        // Whatever comes of it, the cache has what it had no more.
        self.cached.clear();
        let watch = &self.watch;
        let taken = self.session.load(saved, &|| start::to_stop(watch)).map_err(codes::failure)?;
        self.messages = messages;
        self.told.clear();
        Ok(if taken {
            (self.cached, self.prompt) = (tokens, prompt);
            format!("loaded: {n} messages, {} tokens of the cache", self.cached.len())
        } else {
            format!(
                "loaded: {n} messages; their tokens are computed anew, since the cache in the file is damaged, or not what this model computes here, or the context is too short for it"
            )
        })
    }

    /// Says why a message gets no answer. The conversation is as before it.
    fn refuse(&mut self, why: Failure) {
        say(&format!("nt: {}", super::printable::sentence(&why.to_string())));
        self.refused = Some(why.silent());
    }

    fn tell_once(&mut self, what: String) {
        if !self.told.contains(&what) {
            tracing::warn!("{what}");
            self.told.push(what);
        }
    }

    fn clear(&mut self) {
        self.messages.retain(|m| m["role"] == "system");
        self.cached.clear();
        self.session.truncate(0);
        self.told.clear();
        say("the conversation is forgotten");
    }

    /// Answers the last of `messages`, which become the conversation if there is an answer.
    fn answer(&mut self, messages: Vec<Json>) -> Result<(), Failure> {
        let turn = match self.fitting(messages) {
            Ok(turn) => turn,
            Err(_) if start::to_stop(&self.watch) => {
                say(TAKEN_BACK);
                return self.interrupted();
            }
            Err(why) => {
                self.refuse(why);
                return Ok(());
            }
        };
        let g = match self.generate(&turn.prompt)? {
            Ok(g) => g,
            Err(why) => return self.failed(why, turn.prompt),
        };
        if self.args.json {
            self.answered.push(report::generation_json(&g));
        }
        self.cached = turn.prompt;
        self.cached.extend(&g.tokens);
        self.cached.truncate(self.session.position());
        self.prompt = self.prompt.min(self.cached.len());
        if g.stop == StopReason::Interrupt && g.tokens.is_empty() {
            say(TAKEN_BACK);
        } else {
            self.answers += 1;
            self.messages = turn.messages;
            self.messages.push(json!({ "role": "assistant", "content": g.plain }));
        }
        if g.context_full {
            tracing::warn!("the context is full; the answer was cut off (give a larger --ctx)");
        }
        // A signal that came with the answer's last token was meant for the answer too.
        if g.stop == StopReason::Interrupt || interrupt::interrupted() { self.interrupted() } else { Ok(()) }
    }

    /// An answer failed: the conversation goes on as it was before, unless nothing can be computed any more.
    fn failed(&mut self, why: EngineError, prompt: Vec<u32>) -> Result<(), Failure> {
        if self.session.lost().is_some() {
            return Err(codes::failure(why));
        }
        // What was evaluated of the prompt is of use for the next one; of keys and values that are not finite nothing is.
        let of_use = if matches!(why, EngineError::NotFinite { .. }) { 0 } else { prompt.len() };
        let kept = self.session.truncate(of_use);
        self.cached = prompt;
        self.cached.truncate(kept);
        self.prompt = self.prompt.min(kept);
        self.refuse(codes::failure(why));
        Ok(())
    }

    /// What ends with an answer that was interrupted: nothing else for Ctrl-C, all for SIGTERM and want of memory.
    fn interrupted(&self) -> Result<(), Failure> {
        if interrupt::terminated() {
            return Err(Failure::interrupted());
        }
        if let Some(why) = self.watch.reason().filter(|_| !interrupt::interrupted()) {
            return Err(start::short_of_memory(&why));
        }
        interrupt::rearm()
    }

    /// The turn with as much of the history as the context has room for: the oldest turns are left out first. But a
    /// message of more than half the context pushes nothing out that was said last; it is refused.
    fn fitting(&mut self, mut messages: Vec<Json>) -> Result<Turn, Failure> {
        let n_ctx = self.session.n_ctx();
        let room = n_ctx - self.args.n.clamp(1, (n_ctx / ROOM_FOR_ANSWER).max(1)).min(n_ctx);
        let alone: Vec<Json> =
            messages.iter().filter(|m| m["role"] == "system").chain(messages.last()).cloned().collect();
        let alone = self.rendered(&alone)?.1.len();
        if alone >= n_ctx {
            return Err(too_long(alone, "the context", n_ctx.saturating_sub(1)));
        }
        let mut left_out = false;
        loop {
            let (notes, prompt) = self.rendered(&messages)?;
            if prompt.is_empty() {
                return Err(Failure::usage("the message is left out: it has no tokens"));
            }
            let oldest = oldest_turn(&messages).filter(|_| prompt.len() > room);
            if let Some(turn) = oldest {
                if alone > room / 2 && oldest_turn(&messages[turn.end..]).is_none() {
                    let history = prompt.len().saturating_sub(alone);
                    return Err(too_long(alone, "next to the conversation the context", room.saturating_sub(history)));
                }
                messages.drain(turn);
                left_out = true;
                continue;
            }
            if left_out {
                self.tell_once(format!(
                    "the context of {n_ctx} tokens is full: the oldest turns are left out from here on (a larger --ctx holds more, /clear begins anew)"
                ));
            }
            notes.into_iter().for_each(|note| self.tell_once(note));
            return Ok(Turn { messages, prompt });
        }
    }

    /// What there is to say of the prompt of `messages`, and its tokens. Ends soon after a signal or a shortage of
    /// memory.
    fn rendered(&self, messages: &[Json]) -> Result<(Vec<String>, Vec<u32>), Failure> {
        let stop = || start::to_stop(&self.watch);
        let prompt = self.template.prompt_until(messages, None, true, &stop).map_err(codes::template_failure)?;
        text::check_size("the message with what the template adds", prompt.text.len())?;
        let tokens = self.opened.tokenizer.encode_rendered_until(&prompt.text, &stop);
        Ok((prompt.notes, tokens.ok_or_else(Failure::interrupted)?))
    }

    /// Generates an answer, printing it as it comes. The inner error is that of a pass, the outer one that of printing.
    fn generate(&mut self, prompt: &[u32]) -> Result<Result<Generation, EngineError>, Failure> {
        // Earlier turns stay cached as far as the rendered text agrees; one token is left to evaluate.
        let agree = self.cached.iter().zip(prompt).take_while(|(a, b)| a == b).count().min(prompt.len() - 1);
        let agree = self.session.truncate(agree);
        if agree <= self.prompt {
            self.prompt = prompt.len();
        }
        let (args, watch) = (self.args, &self.watch);
        let request = Request { text: prompt, cached: agree, n: args.n, stops: &args.stop, special: args.special };
        let mut out = (!args.json).then(report::Text::stdout);
        let (lost, begun) = (Cell::new(false), Cell::new(false));
        let g = generate(
            &mut self.session,
            &self.opened.tokenizer,
            &mut self.sampler,
            request,
            &|| interrupt::interrupted() || watch.tripped() || lost.get(),
            &mut |text| {
                if let Some(out) = &mut out {
                    begun.set(true);
                    lost.set(!out.piece(text));
                }
            },
        );
        // An error that comes before any word ends no line.
        out.filter(|_| g.is_ok() || begun.get()).map_or(Ok(()), report::Text::end)?;
        Ok(g)
    }
}

/// Whether a message is a command that was mistyped: one line that begins with `/` and a word of letters, and says no more
/// than a command may. A path (`/etc/fstab`) is none.
fn looks_like_command(text: &str) -> bool {
    let Some(rest) = text.strip_prefix('/') else { return false };
    let mut words = rest.split_whitespace();
    let letters = |w: &str| w == "?" || w.chars().all(|c| c.is_ascii_alphabetic());
    !text.contains('\n') && words.next().is_some_and(letters) && words.count() <= 1
}

/// Refuses a message of so many tokens where there is room for fewer.
fn too_long(tokens: usize, place: &str, room: usize) -> Failure {
    Failure::limits(format!(
        "the message is left out: with what the template adds it has {tokens} tokens, but {place} has room for {room}; shorten it, /clear the conversation, or give a larger --ctx"
    ))
}

/// Where the oldest turn lies: a user's message and all before the next one's. `None` if there is only one.
fn oldest_turn(messages: &[Json]) -> Option<std::ops::Range<usize>> {
    let mut users = messages.iter().enumerate().filter(|(_, m)| m["role"] == "user").map(|(i, _)| i);
    Some(users.next()?..users.next()?)
}

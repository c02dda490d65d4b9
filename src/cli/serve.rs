//! `nt serve`: models for programs that speak HTTP.

use std::cell::RefCell;
use std::collections::HashSet;
use std::net::{TcpListener, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Args;

use super::args::{Auto, KvArg};
use super::failure::say;
use super::report::Report;
use super::template::TemplateOptions;
use super::{Failure, ModelArg, ModelArgs, Placement, Sampling, interrupt, options, outputs, start};
use crate::backend::EXACT_ROWS;
use crate::engine::{Opened, Options, SamplerParams, Session};
use crate::machine::pressure::Watch;
use crate::plan::parse_size;
use crate::serve::{
    Access, Keep, Limits, Loaded, Loader, Models, NotLoaded, Over, Pooling, Served, Server, Shelf, unix_s,
};
use crate::tokenizer::Tokenizer;

/// Arguments of `nt serve`.
#[derive(Debug, Args)]
#[command(after_help = EXITS)]
pub struct ServeArgs {
    #[command(flatten)]
    models: ModelArgs,
    /// Address to listen at. Any other than one of this machine alone needs --api-key-file, or --no-key.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen at; 0 takes one that is free. The first line on stderr says which.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// File of API keys, one per line; a request must send one of them.
    #[arg(long, value_name = "F")]
    api_key_file: Option<PathBuf>,
    /// Answer everybody who reaches an address that is not of this machine alone.
    #[arg(long, conflicts_with = "api_key_file")]
    no_key: bool,
    /// Names that requests may call the model by, between commas (or repeat it); the first stands in answers (default: that
    /// of the file). With several models, --alias comes once for each, in their order.
    #[arg(long, value_name = "NAME[,NAME]…")]
    alias: Vec<String>,
    /// How long a model stays in memory behind the last request of it, as 300, 5m or 1h30m; requests to Ollama's paths may
    /// say otherwise (keep_alive). -1 is until another is asked for.
    #[arg(long, value_name = "TIME", default_value = "-1", value_parser = keep)]
    keep_alive: Keep,
    #[command(flatten)]
    template: TemplateOptions,
    /// Requests of a model that are computed at once at most, a token of each in every pass; they share the positions of --ctx. auto is as
    /// many as the backend takes in one pass, up to 4 (2 of an architecture with recurrent states). Where that is 1, as on a GPU, they take turns.
    #[arg(long, value_name = "auto|N", default_value = "auto", value_parser = parallel)]
    parallel: Auto<usize>,
    /// How the hidden states of a text's tokens become its vector (/v1/embeddings, /api/embed): their mean, or the last
    /// one. auto is what the model's metadata says (pooling_type), else the mean.
    #[arg(long, value_name = "auto|mean|last", default_value = "auto", value_parser = pooling)]
    pooling: Auto<Pooling>,
    /// Folder in which prompts are kept when the server ends or loads another model, so that they need not be computed
    /// again; for its owner alone.
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Bytes of that folder's prompts at most; those used longest ago go first.
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = parse_size)]
    cache_size: u64,
    /// Tokens of an answer at most, whatever a request asks for; auto is until the context is full.
    #[arg(long, value_name = "auto|N", default_value = "auto", value_parser = max_tokens)]
    max_tokens: Auto<usize>,
    /// Requests that wait at most; more are told when to come again (429).
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=4096))]
    max_queue: u16,
    /// Connections at once at most; more wait to be accepted.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..=16384))]
    max_connections: u16,
    /// Bytes of a request at most, up to 256 MiB.
    #[arg(long, value_name = "SIZE", default_value = "4MiB", value_parser = body_size)]
    max_body: u64,
    /// Seconds that a request may take, waiting included.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u32).range(1..=604_800))]
    timeout: u32,
    /// Seconds after which a stream that has nothing to say gives a sign of life.
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=3600))]
    ping: u16,
    /// Seconds that the request at hand has to end when the server is asked to stop.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u16).range(0..=3600))]
    grace: u16,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    placement: Placement,
}

/// How it ends, for the help.
const EXITS: &str = "Several models: the first is loaded, and each other one when a request names it (`model`), in place of the one before, \
once that one's requests have ended; while both are asked for, each has its turn. One is in memory at a time, also where more would fit, so \
--ram, --vram and the other placement options hold for each alone. A request that names none means the first.
Sampling options are what a request gets that says nothing of them.
Ctrl-C or SIGTERM ends the server: requests that wait and new ones are refused (503), those at hand have --grace seconds to end. The exit \
code is 0 if they ended, 130 if one was cut off. A second signal ends the process at once. A GPU that answers the process no more (as
behind an Xid) ends it with code 1.";

/// Positions of the KV cache where nothing else is said.
const CTX_DEFAULT: usize = 4096;
/// Requests that are computed at once where nothing else is said.
const PARALLEL_DEFAULT: usize = 4;
/// The same where each has a recurrent state, which may take 100 MB.
const PARALLEL_RECURRENT: usize = 2;
/// Most requests that are computed at once.
const PARALLEL_MAX: usize = 64;
/// Most bytes of a request.
const BODY_MAX: u64 = 256 << 20;
/// Most bytes of a file of keys.
const KEYS_MAX: u64 = 1 << 20;

fn max_tokens(text: &str) -> Result<Auto<usize>, String> {
    match text {
        "auto" | "-1" => Ok(Auto::Auto),
        other => super::args::count(other).map(Auto::Given),
    }
}

fn keep(text: &str) -> Result<Keep, String> {
    Keep::read(text).ok_or_else(|| "a time was expected: seconds, or numbers with units, as 5m or 1h30m".to_owned())
}

fn parallel(text: &str) -> Result<Auto<usize>, String> {
    match text {
        "auto" => Ok(Auto::Auto),
        other => match super::args::count(other)? {
            n if (1..=PARALLEL_MAX).contains(&n) => Ok(Auto::Given(n)),
            _ => Err(format!("auto or a number from 1 to {PARALLEL_MAX} was expected")),
        },
    }
}

fn pooling(text: &str) -> Result<Auto<Pooling>, String> {
    match text {
        "auto" => Ok(Auto::Auto),
        "mean" => Ok(Auto::Given(Pooling::Mean)),
        "last" => Ok(Auto::Given(Pooling::Last)),
        _ => Err("auto, mean or last was expected".into()),
    }
}

/// What the model was made for: `pooling_type` 3 is the last token (llama.cpp's `llama_pooling_type`).
fn own_pooling(opened: &Opened) -> Pooling {
    let key = format!("{}.pooling_type", opened.model.hparams.arch.name);
    match opened.gguf.metadata.uint(&key) {
        Some(3) => Pooling::Last,
        _ => Pooling::Mean,
    }
}

fn body_size(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    if (1..=BODY_MAX).contains(&size) { Ok(size) } else { Err("a size from 1 to 256MiB was expected".into()) }
}

/// Serves until a signal ends it.
pub fn run(args: &ServeArgs) -> Result<(), Failure> {
    args.sampling.params(&SamplerParams::default())?;
    let keys = args.api_key_file.as_deref().map(keys).transpose()?.unwrap_or_default();
    let models: Vec<ModelArg> = args.models.all().collect();
    check_options(args, models.len())?;
    let mut all = Vec::new();
    let mut options = Vec::new();
    for (i, model) in models.into_iter().enumerate() {
        let (served, its) = open(args, model, i)?;
        all.push(served);
        options.push(its);
    }
    set_names(&mut all)?;
    let models = Models::new(all).ok_or_else(|| Failure::usage("a MODEL was expected"))?;
    let listener = listen(args, &keys)?;
    let at = listener.local_addr().map_err(|e| Failure::running(format!("asking for the port failed: {e}")))?;
    // Until here nothing is half done: a signal ends the process.
    interrupt::install()?;
    let access = Access { keys, loopback: at.ip().is_loopback(), name: hostname() };
    let server = Server::start(listener, models, access)
        .map_err(|e| Failure::running(format!("starting to listen at {at} failed: {e}")))?;
    let names: Vec<&str> = server.models().all().iter().map(|served| served.name()).collect();
    let which = if names.len() == 1 { "model" } else { "models" };
    say(&format!("nt: listening at http://{at} ({which} {})", names.join(", ")));
    let result = serve(args, &server, &options);
    server.end();
    result
}

/// Refuses options that say something of one model where there are several.
fn check_options(args: &ServeArgs, models: usize) -> Result<(), Failure> {
    if models == 1 {
        return Ok(());
    }
    if !args.alias.is_empty() && args.alias.len() != models {
        return Err(Failure::usage(format!(
            "--alias comes {} times for {models} models; give it once for each of them, in their order",
            args.alias.len()
        )));
    }
    for (given, option) in
        [(args.placement.timeline.is_some(), "--timeline"), (args.placement.plan.is_some(), "--plan")]
    {
        if given {
            return Err(Failure::usage(format!("{option} is of one model, and {models} are given; serve one with it")));
        }
    }
    Ok(())
}

/// A model that is to be served, and the options of its sessions.
fn open(args: &ServeArgs, mut model: ModelArg, number: usize) -> Result<(Served, Options), Failure> {
    model.look_up()?;
    let unknown = model.is_unknown();
    let opened = start::open(&model, &args.placement).map_err(|e| if unknown { e.with_library_hint() } else { e })?;
    outputs::check(&opened, &args.placement, &[])?;
    args.sampling.check(opened.model.n_vocab)?;
    let (defaults, notes) = args.sampling.params_for(&opened.gguf.metadata)?;
    notes.iter().for_each(|note| tracing::warn!("{note}"));
    let template = args.template.open(&opened.gguf.metadata, &opened.tokenizer)?;
    let tool_use = opened.gguf.metadata.str("tokenizer.chat_template.tool_use").unwrap_or("");
    let template_source = format!("{}{tool_use}", template.source());
    let mut options = options::options(&args.placement, KvArg::F16)?;
    // Prompts are kept for others that begin alike, which may go back anywhere.
    options.recent = false;
    options.n_ctx = match args.placement.ctx(&opened.model.hparams) {
        Auto::Given(n) => n,
        Auto::Auto => CTX_DEFAULT.min(opened.model.hparams.n_ctx_reach),
    };
    let recurrent = opened.model.hparams.recurrent.is_some();
    if recurrent {
        // Each request has a state, so has the empty sequence that all begin from, and one that is being begun.
        options.sequences = args.parallel.given().unwrap_or(PARALLEL_RECURRENT) + 2;
    }
    options.outputs = args.parallel.given().unwrap_or(PARALLEL_DEFAULT).min(2 * EXACT_ROWS);
    let shelf = args.cache_dir.as_deref().map(|dir| {
        Shelf::new(dir, args.cache_size, &opened, options.kv_type)
            .map_err(|e| Failure::usage(format!("--cache-dir {}: it cannot be written to: {e}", dir.display())))
    });
    let shelf = shelf.transpose()?;
    let served = Served {
        names: names(args, number, &opened),
        template,
        template_source,
        defaults,
        seed: args.sampling.seed.given(),
        n_ctx: options.n_ctx,
        token_bytes_max: longest_token(&opened.tokenizer),
        limits: limits(args),
        started_unix_s: unix_s(),
        modified_unix_s: modified_unix_s(&opened),
        grammars: std::sync::OnceLock::new(),
        shelf,
        pooling: args.pooling.given().unwrap_or_else(|| own_pooling(&opened)),
        embeds: std::sync::OnceLock::new(),
        session: std::sync::RwLock::new(None),
        opened,
    };
    Ok((served, options))
}

/// Loads the first model and answers requests.
fn serve(args: &ServeArgs, server: &Server, options: &[Options]) -> Result<(), Failure> {
    let watch = RefCell::new(None);
    let mut loading = Loading { args, models: server.models(), options, watch: &watch, timeline: Ok(()) };
    let first = loading.start(0, &|| false)?;
    let short_of_memory = || watch.borrow().as_ref().is_some_and(Watch::tripped);
    let over = server.serve(first, &mut loading, &interrupt::interrupted, &short_of_memory);
    loading.timeline?;
    match watch.borrow().as_ref().and_then(Watch::reason) {
        Some(why) if !interrupt::interrupted() => Err(start::short_of_memory(&why)),
        _ => match over {
            Over::Ended => Ok(()),
            Over::CutOff => Err(Failure::interrupted()),
            Over::Lost(e) => Err(Failure::running(e)),
        },
    }
}

/// Loads models as the command line says.
struct Loading<'a> {
    args: &'a ServeArgs,
    models: &'a Models,
    options: &'a [Options],
    /// Watches memory while a model is there.
    watch: &'a RefCell<Option<Watch>>,
    /// Whether the timeline of the model that was there could be written.
    timeline: Result<(), Failure>,
}

impl Loading<'_> {
    fn start(&mut self, model: usize, stop: &dyn Fn() -> bool) -> Result<Loaded, Failure> {
        let (opened, options) = (&self.models.all()[model].opened, self.options[model].clone());
        let watch = start::prepare(&self.args.placement);
        let session = start::start_until(opened, options, true, &watch, stop)?;
        let report = Report::new(&session, opened);
        report.print();
        let most = if opened.model.hparams.recurrent.is_some() { PARALLEL_RECURRENT } else { PARALLEL_DEFAULT };
        let slots = self.args.parallel.given().unwrap_or_else(|| session.parts_max().min(most));
        let about = report.session_json();
        *self.watch.borrow_mut() = Some(watch);
        Ok(Loaded { session, slots, about })
    }
}

impl Loader for Loading<'_> {
    fn load(&mut self, model: usize, stop: &dyn Fn() -> bool) -> Result<Loaded, NotLoaded> {
        let is_stopped = || stop() || interrupt::interrupted();
        self.start(model, stop).map_err(|e| match is_stopped() {
            true => NotLoaded::Stopped,
            false => NotLoaded::Failed(e.to_string()),
        })
    }

    fn unload(&mut self, _: usize, mut session: Session) {
        self.timeline = start::write_timeline(&self.args.placement, &mut session);
        drop(session);
        // What was short while it was there may not be without it; but then the server has ended.
        let tripped = self.watch.borrow().as_ref().is_some_and(Watch::tripped);
        if !tripped {
            *self.watch.borrow_mut() = None;
        }
    }
}

fn limits(args: &ServeArgs) -> Limits {
    Limits {
        body: args.max_body,
        connections: usize::from(args.max_connections),
        queue: usize::from(args.max_queue),
        time: Duration::from_secs(args.timeout.into()),
        ping: Duration::from_secs(args.ping.into()),
        tokens: args.max_tokens.given(),
        grace: Duration::from_secs(args.grace.into()),
        keep: args.keep_alive.time(None),
    }
}

/// Listens at the first of the host's addresses that can be had.
fn listen(args: &ServeArgs, keys: &[String]) -> Result<TcpListener, Failure> {
    let at = format!("--host {} --port {}", args.host, args.port);
    let host = args.host.trim_matches(['[', ']']);
    let found = (host, args.port).to_socket_addrs();
    let all: Vec<_> = found.map_err(|e| Failure::usage(format!("{at}: this is no address here: {e}")))?.collect();
    if keys.is_empty() && !args.no_key && all.iter().any(|a| !a.ip().is_loopback()) {
        return Err(Failure::usage(format!(
            "{at}: others than this machine reach that address, so a key is needed: --api-key-file F; or --no-key to answer everybody"
        )));
    }
    TcpListener::bind(&all[..]).map_err(|e| Failure::running(format!("{at}: listening there failed: {e}")))
}

/// The keys in a file: a line each, blank ones and those that begin with # left out.
fn keys(path: &Path) -> Result<Vec<String>, Failure> {
    use std::io::Read as _;
    let wrong = |what: String| Failure::usage(format!("--api-key-file {}: {what}", path.display()));
    let mut text = String::new();
    let read = std::fs::File::open(path).and_then(|f| f.take(KEYS_MAX).read_to_string(&mut text));
    read.map_err(|e| wrong(e.to_string()))?;
    let lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    let keys: Vec<String> = lines.map(str::to_owned).collect();
    if keys.is_empty() {
        return Err(wrong("it has no key; a line with one was expected".into()));
    }
    if keys.iter().any(|key| key.chars().any(|c| !c.is_ascii_graphic())) {
        return Err(wrong(
            "a key has characters that no header may have; printable ASCII without spaces was expected".into(),
        ));
    }
    Ok(keys)
}

/// What a model is called: aliases, the file's name, its own.
fn names(args: &ServeArgs, number: usize, opened: &Opened) -> Vec<String> {
    let several = args.models.all().nth(1).is_some();
    let given = args.alias.iter().enumerate().filter(|(i, _)| !several || *i == number);
    let mut names: Vec<String> = given.flat_map(|(_, all)| all.split(',').map(|n| n.trim().to_owned())).collect();
    let stem = opened.gguf.shards.first().and_then(|s| s.path.file_stem()).map(|s| s.to_string_lossy().into_owned());
    let stem = stem.map(|s| s.split("-00001-of-").next().unwrap_or_default().to_owned());
    // Ollama's files are called after their checksums.
    let (last, stem): (Vec<_>, Vec<_>) = stem.into_iter().partition(|s| s.starts_with("sha256-"));
    let own = opened.gguf.metadata.str("general.name").map(str::to_owned);
    names.extend(stem.into_iter().chain(own).chain(last));
    names.retain(|n| !n.trim().is_empty());
    let mut seen = HashSet::new();
    names.retain(|n| seen.insert(n.clone()));
    if names.is_empty() {
        names.push("model".into());
    }
    names
}

/// Sees to it that a name means one model: each has its first one for itself, and of others that several have, the first
/// model that has it.
fn set_names(all: &mut [Served]) -> Result<(), Failure> {
    let mut taken = HashSet::new();
    for served in all.iter() {
        if !taken.insert(served.name().to_owned()) {
            return Err(Failure::usage(format!(
                "two models would be called {:?}; give each a name of its own: --alias NAME, once for each, in their order",
                served.name()
            )));
        }
    }
    for served in all {
        let first = served.name().to_owned();
        served.names.retain(|name| *name == first || taken.insert(name.clone()));
    }
    Ok(())
}

/// Bytes of the longest token.
fn longest_token(tokenizer: &Tokenizer) -> usize {
    (0..tokenizer.vocab_size() as u32).map(|id| tokenizer.token_bytes(id).len()).max().unwrap_or(1).max(1)
}

/// When the model's file was last changed; 0 where nobody says.
fn modified_unix_s(opened: &Opened) -> u64 {
    let file = opened.gguf.shards.first().and_then(|s| std::fs::metadata(&s.path).ok()?.modified().ok());
    file.and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok()).map_or(0, |d| d.as_secs())
}

/// What this machine is called, if the kernel says.
fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map_or_else(|_| String::new(), |name| name.trim().to_owned())
}

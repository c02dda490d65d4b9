//! Ollama's `/api`: chat and generate, streamed as lines of JSON, and what its clients ask of models.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

use super::error::{ApiError, Form};
use super::fields::{Fields, wrong};
use super::grammar::{self, Wanted};
use super::job::{Finish, Summary, Task};
use super::params;
use super::present::{Keep, Present};
use super::prompt::{self, Conversation, Ending};
use super::served::{Models, Served, rfc3339, unix_s};
use super::split::{Call, Looks};
use super::steps::{Answers, Dialect, Prepared, Step};
use crate::engine::SamplerParams;

/// Options that say where and how the model is computed, which this server was told at its start, and which change no text.
const HARMLESS: [&str; 12] = [
    "num_thread",
    "num_gpu",
    "main_gpu",
    "num_batch",
    "use_mmap",
    "use_mlock",
    "low_vram",
    "numa",
    "num_keep",
    "f16_kv",
    "vocab_only",
    "logits_all",
];

/// What `options` hold.
struct Options {
    params: SamplerParams,
    /// Tokens of an answer at most.
    most: Option<usize>,
    stops: Vec<String>,
    /// Positions of the context.
    n_ctx: Option<usize>,
}

impl Options {
    fn task(self, served: &Served, tokens: Vec<u32>) -> Result<Task, ApiError> {
        let task = prompt::task(served, tokens, self.params, self.most, self.stops)?;
        prompt::within(task, self.n_ctx, "options.num_ctx")
    }
}

/// Reads `options`.
fn options(f: &mut Fields, served: &Served) -> Result<Options, ApiError> {
    let mut o = match f.object("options")? {
        Some(o) => o,
        None => Fields::of(json!({}), "options")?,
    };
    let most = params::max_tokens(&mut o, &["num_predict"])?;
    let stops = params::stops(&mut o, "stop")?;
    let n_ctx = o.whole("num_ctx", 1, i64::MAX)?.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    if let Some(n) = n_ctx.filter(|n| *n > served.n_ctx) {
        let message =
            format!("options.num_ctx: {n} positions were asked for, but this server has {} (--ctx)", served.n_ctx);
        return Err(ApiError::field("options.num_ctx", message));
    }
    o.ignore(&HARMLESS);
    o.only("penalize_newline", &[json!(true)], "the penalty leaves no token out")?;
    let params = params::sampling(&mut o, served)?;
    o.finish()?;
    Ok(Options { params, most, stops, n_ctx })
}

/// What both kinds of requests have.
struct Common {
    stream: bool,
    /// With the reasoning that is asked for.
    conversation: Conversation,
    /// The form of the answer.
    wanted: Wanted,
    /// How long the model is to stay behind the answer.
    keep: Keep,
}

fn common(f: &mut Fields, served: &Served) -> Result<Common, ApiError> {
    let stream = f.flag("stream")?.unwrap_or(true);
    let wanted = grammar::wanted_format(f)?;
    f.only("logprobs", &[json!(false)], "probabilities are told by /v1/chat/completions")?;
    f.only("top_logprobs", &[json!(0)], "probabilities are told by /v1/chat/completions")?;
    f.only("truncate", &[json!(true), json!(false)], "true or false was expected")?;
    f.only("shift", &[json!(true), json!(false)], "true or false was expected")?;
    let keep = keep_alive(f)?;
    let mut conversation = Conversation::default();
    match f.any("think") {
        None => {}
        Some(Json::Bool(on)) if served.template_source.contains("enable_thinking") => {
            conversation.variables.insert("enable_thinking".into(), on.into());
        }
        Some(Json::Bool(false)) if !served.thinks() => {}
        Some(Json::Bool(true)) if served.thinks() => {}
        Some(Json::String(effort)) => conversation.effort = Some(effort),
        Some(_) => {
            let message = "think: this model's chat template has no switch for it";
            return Err(ApiError::unsupported("think", message));
        }
    }
    Ok(Common { stream, conversation, wanted, keep })
}

/// How long the model is to stay: a number of seconds, or a text such as `5m`.
///
/// # Errors
/// For anything else.
pub fn keep_alive(f: &mut Fields) -> Result<Keep, ApiError> {
    let expected = "a number of seconds, or a text such as 5m";
    match f.any("keep_alive") {
        None => Ok(Keep::Server),
        Some(Json::String(text)) => Keep::read(&text).ok_or_else(|| wrong("keep_alive", expected, &Json::String(text))),
        Some(other) => match other.as_f64() {
            Some(seconds) => Ok(Keep::of_seconds(seconds)),
            None => Err(wrong("keep_alive", expected, &other)),
        },
    }
}

/// A message of Ollama's as OpenAI writes it.
fn as_openai(mut message: Json, i: usize) -> Result<Json, ApiError> {
    let place = format!("messages[{i}]");
    if message["images"].as_array().is_some_and(|images| !images.is_empty()) {
        return Err(ApiError::unsupported(&place, format!("{place}.images: this server reads text only")));
    }
    if let Json::Object(fields) = &mut message {
        fields.remove("images");
        if let Some(thinking) = fields.remove("thinking").filter(|t| t.as_str().is_some_and(|t| !t.is_empty())) {
            fields.insert("reasoning_content".into(), thinking);
        }
        if let Some(name) = fields.remove("tool_name") {
            fields.insert("name".into(), name);
        }
        if fields.get("tool_calls").is_some_and(Json::is_null) {
            fields.remove("tool_calls");
        }
    }
    Ok(message)
}

/// Reads a request to `/api/chat`.
///
/// # Errors
/// What is wrong with it.
pub fn chat(served: &Arc<Served>, mut f: Fields, _: &str, stop: &dyn Fn() -> bool) -> Result<Prepared, ApiError> {
    let Common { stream, mut conversation, wanted, keep } = common(&mut f, served)?;
    let mut options = options(&mut f, served)?;
    let list = f.list("messages")?.unwrap_or_default();
    if list.is_empty() {
        return loaded(served, f, options.params, true, stream, keep);
    }
    prompt::check_count(list.len(), "messages", served)?;
    let list = list.into_iter().enumerate().map(|(i, m)| as_openai(m, i)).collect::<Result<Vec<_>, _>>()?;
    conversation.messages = prompt::messages(list, served)?;
    if prompt::may_continue(&conversation.messages) {
        conversation.ending = Ending::Continued;
    }
    let tools = prompt::tools(&mut f, served)?;
    let one_call = tools.one_call;
    (conversation.tools, conversation.choice) = (tools.list, tools.choice);
    f.finish()?;
    let prompt = prompt::rendered(served, &conversation, stop)?;
    grammar::hold(served, &mut options.params, wanted, Some((&conversation, one_call)), &prompt.text)?;
    let looks = prompt::looks(served, &conversation, &prompt.text, one_call);
    let task = options.task(served, prompt.tokens)?;
    Ok(Prepared { keep, ..Prepared::new(task, looks, Ollama::new(served, true), stream) })
}

/// Reads a request to `/api/generate`.
///
/// # Errors
/// What is wrong with it.
pub fn generate(served: &Arc<Served>, mut f: Fields, _: &str, stop: &dyn Fn() -> bool) -> Result<Prepared, ApiError> {
    let Common { stream, mut conversation, wanted, keep } = common(&mut f, served)?;
    let mut options = options(&mut f, served)?;
    let text = f.text("prompt")?.unwrap_or_default();
    let system = f.text("system")?.filter(|s| !s.is_empty());
    let raw = f.flag("raw")?.unwrap_or(false);
    f.only("suffix", &[json!("")], "text is only continued, not filled in")?;
    f.only("template", &[json!("")], "the server's --chat-template is the only one")?;
    f.only("images", &[json!([])], "this server reads text only")?;
    f.only("context", &[json!([])], "what was said before is sent to /api/chat as messages")?;
    if text.is_empty() && system.is_none() && !raw {
        return loaded(served, f, options.params, false, stream, keep);
    }
    f.finish()?;
    served.check_bytes(text.len(), "prompt")?;
    let (tokens, looks) = if raw {
        grammar::hold(served, &mut options.params, wanted, None, "")?;
        (served.opened.tokenizer.encode_prompt(&text), Looks::default())
    } else {
        conversation.messages.extend(system.map(|s| json!({ "role": "system", "content": s })));
        conversation.messages.push(json!({ "role": "user", "content": text }));
        let prompt = prompt::rendered(served, &conversation, stop)?;
        grammar::hold(served, &mut options.params, wanted, Some((&conversation, false)), &prompt.text)?;
        let looks = prompt::looks(served, &conversation, &prompt.text, false);
        (prompt.tokens, looks)
    };
    let task = options.task(served, tokens)?;
    Ok(Prepared { keep, ..Prepared::new(task, looks, Ollama::new(served, false), stream) })
}

/// A request without words asks that the model be loaded, which it is once there is an answer without tokens; or, where
/// it is to stay for no time, that it be given up.
fn loaded(
    served: &Arc<Served>,
    f: Fields,
    params: SamplerParams,
    chat: bool,
    stream: bool,
    keep: Keep,
) -> Result<Prepared, ApiError> {
    f.finish()?;
    let gives_up = keep == Keep::For(Duration::ZERO);
    let task = prompt::task(served, served.opened.tokenizer.encode_prompt(" "), params, Some(0), Vec::new())?;
    let dialect = Ollama { load: Some(if gives_up { "unload" } else { "load" }), ..Ollama::new(served, chat) };
    Ok(Prepared { keep, gives_up, ..Prepared::new(task, Looks::default(), dialect, stream) })
}

/// Ollama's form of answers.
struct Ollama {
    served: Arc<Served>,
    chat: bool,
    /// What is said of a request that asks for no answer.
    load: Option<&'static str>,
    since: Instant,
    finish: Option<Finish>,
}

impl Ollama {
    fn new(served: &Arc<Served>, chat: bool) -> Ollama {
        Ollama { served: served.clone(), chat, load: None, since: Instant::now(), finish: None }
    }

    fn object(&self, text: &str, thought: &str, calls: &[Call], done: bool) -> Json {
        let mut object = json!({ "model": self.served.name(), "created_at": rfc3339(unix_s()) });
        if self.chat {
            let mut message = json!({ "role": "assistant", "content": text });
            if !thought.is_empty() {
                message["thinking"] = thought.into();
            }
            if !calls.is_empty() {
                message["tool_calls"] = calls.iter().map(tool_call).collect();
            }
            object["message"] = message;
        } else {
            object["response"] = text.into();
            if !thought.is_empty() {
                object["thinking"] = thought.into();
            }
        }
        object["done"] = done.into();
        object
    }

    fn add_figures(&self, object: &mut Json, s: &Summary) {
        let ns = |seconds: f64| (seconds * 1e9) as u64;
        let reason = match self.finish {
            _ if self.load.is_some() => self.load.unwrap_or_default(),
            Some(Finish::Length) => "length",
            _ => "stop",
        };
        object["done_reason"] = reason.into();
        object["total_duration"] = ns(self.since.elapsed().as_secs_f64()).into();
        object["load_duration"] = ns(s.load_s).into();
        object["prompt_eval_count"] = s.prompt.into();
        object["prompt_eval_duration"] = ns(s.prompt_s).into();
        object["eval_count"] = s.generated.into();
        object["eval_duration"] = ns(s.decode_s).into();
    }
}

fn tool_call(call: &Call) -> Json {
    // Arguments are an object here, not its text.
    let arguments = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!(call.arguments));
    json!({ "function": { "name": call.name, "arguments": arguments } })
}

impl Dialect for Ollama {
    fn begin(&mut self, _: &mut String) {}

    fn step(&mut self, step: Step, out: &mut String) {
        let line = match step {
            Step::Words { text, .. } => self.object(&text, "", &[], false),
            Step::Thought { text, .. } => self.object("", &text, &[], false),
            Step::Call { call, .. } => self.object("", "", &[call], false),
            Step::Finished { finish, .. } => {
                self.finish = Some(finish);
                return;
            }
            Step::Done(summary) => {
                let mut last = self.object("", "", &[], true);
                self.add_figures(&mut last, &summary);
                last
            }
            Step::Failed(e) => e.json(Form::Ollama),
        };
        out.push_str(&line.to_string());
        out.push('\n');
    }

    fn whole(&mut self, answers: &Answers) -> Json {
        let answer = answers.all.first().cloned().unwrap_or_default();
        self.finish = answer.finish.clone();
        let mut object = self.object(&answer.text, &answer.thought, &answer.calls, true);
        self.add_figures(&mut object, &answers.summary);
        object
    }

    fn ping(&self) -> Option<&'static str> {
        // Clients read every line as JSON.
        None
    }

    fn content_type(&self) -> &'static str {
        "application/x-ndjson"
    }
}

/// `/api/version`. Clients compare numbers of Ollama's, so nt's own stands beside one that has what is here.
pub fn version() -> Json {
    json!({ "version": "0.12.0", "nt": env!("CARGO_PKG_VERSION") })
}

/// When a model is given up that stays, and that time in seconds since 1970.
const NEVER: &str = "9999-12-31T23:59:59Z";
const NEVER_UNIX_S: u64 = 253_402_300_799;

fn details(served: &Served) -> Json {
    let m = &served.opened.gguf.metadata;
    let family = m.str("general.architecture").unwrap_or("");
    json!({
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": m.str("general.size_label").unwrap_or(""),
        "quantization_level": "",
    })
}

fn entry(served: &Served) -> Json {
    json!({
        "name": served.name(),
        "model": served.name(),
        "modified_at": rfc3339(served.modified_unix_s),
        "size": served.opened.gguf.tensor_bytes(),
        "digest": "",
        "details": details(served),
    })
}

/// `/api/tags`.
pub fn tags(models: &Models) -> Json {
    json!({ "models": models.all().iter().map(|served| entry(served)).collect::<Vec<_>>() })
}

/// `/api/ps`: the model that is loaded. Without a time at which it is given up it stays until another is asked for.
pub fn ps(models: &Models, present: &Present) -> Json {
    let Present::Loaded { model, until, .. } = *present else { return json!({ "models": [] }) };
    let served = &models.all()[model];
    let mut entry = entry(served);
    let left = until.map(|until| until.saturating_duration_since(Instant::now()).as_secs());
    let expires = left.and_then(|left| unix_s().checked_add(left)).filter(|unix_s| *unix_s < NEVER_UNIX_S);
    entry["expires_at"] = expires.map_or_else(|| NEVER.to_owned(), rfc3339).into();
    entry["size_vram"] = served.plan()["a"]["bytes"].as_u64().unwrap_or(0).into();
    entry["context_length"] = served.n_ctx.into();
    json!({ "models": [entry] })
}

/// `/api/show`.
///
/// # Errors
/// For another model.
pub fn show(served: &Served, mut f: Fields) -> Result<Json, ApiError> {
    f.ignore(&["verbose", "name"]);
    f.finish()?;
    let h = &served.opened.model.hparams;
    let arch = h.arch.name;
    let mut capabilities = vec!["completion"];
    capabilities.extend(served.family().map(|_| "tools"));
    capabilities.extend(served.thinks().then_some("thinking"));
    Ok(json!({
        "modelfile": "",
        "parameters": "",
        "template": served.template_source,
        "modified_at": rfc3339(served.modified_unix_s),
        "details": details(served),
        "model_info": {
            "general.architecture": arch,
            format!("{arch}.block_count"): h.n_layers,
            format!("{arch}.context_length"): h.n_ctx_train,
            format!("{arch}.embedding_length"): h.n_embd,
            format!("{arch}.attention.head_count"): h.n_heads,
            format!("{arch}.attention.head_count_kv"): h.n_kv_heads,
        },
        "capabilities": capabilities,
    }))
}

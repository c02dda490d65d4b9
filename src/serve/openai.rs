//! `/v1/chat/completions` and `/v1/completions`.

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::error::{ApiError, Form};
use super::fields::{Fields, whole, wrong};
use super::grammar;
use super::job::{Finish, Summary, Task, TokenLogprob};
use super::params::{self, HARMLESS};
use super::prompt::{self, Conversation, Ending};
use super::served::{Served, unix_s};
use super::split::{Call, Looks};
use super::steps::{Answer, Answers, Dialect, Prepared, Step, data};
use crate::engine::SamplerParams;

/// Most answers to a prompt.
const CHOICES_MAX: i64 = 128;
/// Most prompts of a request, and tokens of all of them where the context is no longer: what waits takes memory.
const PROMPTS_MAX: usize = 1024;
const PROMPT_TOKENS_MAX: usize = 256 << 10;
/// Most answers of a request.
const ANSWERS_MAX: usize = 2048;
/// Most tokens of all answers and of their alternatives: what a client may leave in memory by reading slowly.
const ENTRIES_MAX: usize = 2 << 20;
/// The same where probabilities are told, which take more as text.
const PROBABLE_MAX: usize = 256 << 10;
/// Most tokens at each place whose probabilities are told.
pub const TOP_MAX: i64 = 20;

/// What both kinds of requests have.
struct Common {
    stream: bool,
    usage: bool,
    choices: usize,
    max_tokens: Option<usize>,
    stops: Vec<String>,
    reuse: bool,
}

fn common(f: &mut Fields) -> Result<Common, ApiError> {
    let stream = f.flag("stream")?.unwrap_or(false);
    let mut usage = false;
    if let Some(mut options) = f.object("stream_options")? {
        usage = options.flag("include_usage")?.unwrap_or(false);
        options.ignore(&["include_obfuscation", "continuous_usage_stats"]);
        options.finish()?;
    }
    let common = Common {
        stream,
        usage,
        choices: f.whole("n", 1, CHOICES_MAX)?.unwrap_or(1) as usize,
        max_tokens: params::max_tokens(f, &["n_predict", "max_tokens", "max_completion_tokens"])?,
        stops: params::stops(f, "stop")?,
        reuse: f.flag("cache_prompt")?.unwrap_or(true),
    };
    f.ignore(&HARMLESS);
    Ok(common)
}

impl Common {
    fn task(
        self,
        served: &Served,
        params: SamplerParams,
        prompts: Vec<Vec<u32>>,
        logprobs: Option<usize>,
    ) -> Result<Task, ApiError> {
        let mut task = prompt::task_of(served, prompts, params, self.max_tokens, self.stops)?;
        (task.choices, task.logprobs, task.reuse) = (self.choices, logprobs, self.reuse);
        if task.answers() > ANSWERS_MAX {
            let (n, prompts) = (task.choices, task.prompts.len());
            let message =
                format!("n: {n} answers to each of {prompts} prompts are more than the {ANSWERS_MAX} of a request");
            return Err(ApiError::field("n", message));
        }
        check_entries(&task)?;
        Ok(task)
    }
}

/// Refuses a task whose answers, with what is told of their tokens, are more than a client may leave in memory.
///
/// # Errors
/// If they are.
pub fn check_entries(task: &Task) -> Result<(), ApiError> {
    let each = 1 + task.logprobs.unwrap_or(0);
    let entries = task.answers().saturating_mul(task.max_tokens.max(1)).saturating_mul(each);
    let most = if task.logprobs.is_some() { PROBABLE_MAX } else { ENTRIES_MAX };
    if entries <= most {
        return Ok(());
    }
    let message = format!(
        "n: {} answers in all of up to {} tokens, with their probabilities, are more than the {most} that a request may have; lower n, max_tokens or top_logprobs",
        task.answers(),
        task.max_tokens
    );
    Err(ApiError::field("n", message))
}

/// The conversation of a request, and whether only one call counts.
///
/// # Errors
/// For messages and tools that nt cannot give to the model.
pub fn conversation(f: &mut Fields, served: &Served) -> Result<(Conversation, bool), ApiError> {
    let list = f.list("messages")?.unwrap_or_default();
    let messages = prompt::messages(list, served)?;
    let tools = prompt::tools(f, served)?;
    let variables = match f.any("chat_template_kwargs") {
        None => Default::default(),
        Some(Json::Object(map)) => map,
        Some(other) => return Err(wrong("chat_template_kwargs", "an object", &other)),
    };
    let effort = f.text("reasoning_effort")?;
    f.only("modalities", &[json!(["text"])], "this server writes text only")?;
    f.only("audio", &[], "this server writes text only")?;
    f.only("web_search_options", &[], "this server does not search the web")?;
    f.only("verbosity", &[json!("medium")], "the model has no switch for it")?;
    let ending = ending(f, &messages)?;
    f.only(
        "reasoning_format",
        &["auto", "deepseek"].map(Json::from),
        "reasoning is always told apart as reasoning_content",
    )?;
    let (one_call, choice) = (tools.one_call, tools.choice);
    Ok((Conversation { messages, tools: tools.list, variables, effort, choice, ending }, one_call))
}

/// What the prompt ends with: the last message if it is the assistant's, which goes on as at llama-server, unless vLLM's
/// fields say otherwise.
fn ending(f: &mut Fields, messages: &[Json]) -> Result<Ending, ApiError> {
    let goes_on = f.flag("continue_final_message")?;
    let opens = f.flag("add_generation_prompt")?;
    let may = prompt::may_continue(messages);
    match (goes_on, opens) {
        (Some(true), Some(true)) => Err(ApiError::field(
            "continue_final_message",
            "continue_final_message: the last message goes on, so that no other begins; add_generation_prompt must be false",
        )),
        (Some(true), _) if !may => Err(ApiError::field(
            "continue_final_message",
            "continue_final_message: the last message is not words of the assistant's",
        )),
        (Some(true), _) => Ok(Ending::Continued),
        (None, None | Some(false)) if may => Ok(Ending::Continued),
        (_, Some(false)) => Ok(Ending::Closed),
        _ => Ok(Ending::Opened),
    }
}

/// Tokens of reasoning at most, under llama-server's names; below 0 is no bound.
fn budget(f: &mut Fields) -> Result<Option<(&'static str, i64)>, ApiError> {
    let mut found = None;
    for field in ["thinking_budget_tokens", "reasoning_budget_tokens"] {
        found = f.whole(field, -1, i64::MAX)?.map(|tokens| (field, tokens)).or(found);
    }
    Ok(found)
}

/// Reads a request to `/v1/chat/completions`.
///
/// # Errors
/// What is wrong with it.
pub fn chat(served: &Arc<Served>, mut f: Fields, id: &str, stop: &dyn Fn() -> bool) -> Result<Prepared, ApiError> {
    let common = common(&mut f)?;
    let (conversation, one_call) = conversation(&mut f, served)?;
    f.only("echo", &[json!(false)], "the prompt of a conversation is not part of its answer; /v1/completions has it")?;
    f.only("best_of", &[json!(1)], "the best of several answers is not chosen; n returns all of them")?;
    let wanted = f.flag("logprobs")?.unwrap_or(false);
    let top = f.whole("top_logprobs", 0, TOP_MAX)?;
    if top.is_some_and(|n| n > 0) && !wanted {
        return Err(ApiError::field("top_logprobs", "top_logprobs: logprobs must be true with it"));
    }
    let logprobs = wanted.then_some(top.unwrap_or(0) as usize);
    let (stream, usage) = (common.stream, common.usage);
    let wanted = grammar::wanted(&mut f)?;
    let budget = budget(&mut f)?;
    let mut params = params::sampling(&mut f, served)?;
    f.finish()?;
    let prompt = prompt::rendered(served, &conversation, stop)?;
    if let Some((field, tokens)) = budget {
        params.thought = prompt::thought(served, &prompt.text, tokens, field)?;
    }
    grammar::hold(served, &mut params, wanted, Some((&conversation, one_call)), &prompt.text)?;
    let looks = prompt::looks(served, &conversation, &prompt.text, one_call);
    let task = common.task(served, params, vec![prompt.tokens], logprobs)?;
    let dialect = OpenAi::new(served, format!("chatcmpl-{id}"), true, usage, task.answers());
    Ok(Prepared::new(task, looks, dialect, stream))
}

/// Reads a request to `/v1/completions`.
///
/// # Errors
/// What is wrong with it.
pub fn completions(served: &Arc<Served>, mut f: Fields, id: &str) -> Result<Prepared, ApiError> {
    let common = common(&mut f)?;
    let given =
        f.any("prompt").ok_or_else(|| ApiError::field("prompt", "prompt: a text was expected, found nothing"))?;
    let prompts = prompts(given, served)?;
    let logprobs = match f.any("logprobs") {
        None | Some(Json::Bool(false)) => None,
        Some(Json::Bool(true)) => Some(0),
        Some(other) => match whole(&other).filter(|n| (0..=TOP_MAX).contains(n)) {
            Some(n) => Some(n as usize),
            None => return Err(wrong("logprobs", &format!("a whole number from 0 to {TOP_MAX}"), &other)),
        },
    };
    let echo = f.flag("echo")?.unwrap_or(false);
    if echo && logprobs.is_some() {
        return Err(ApiError::unsupported(
            "echo",
            "echo: probabilities of the prompt's tokens are not built; leave logprobs out",
        ));
    }
    f.only("suffix", &[json!("")], "text is only continued, not filled in")?;
    f.only(
        "best_of",
        &[json!(1), json!(common.choices)],
        "the best of several answers is not chosen; n returns all of them",
    )?;
    let (stream, usage) = (common.stream, common.usage);
    let wanted = grammar::wanted(&mut f)?;
    let mut params = params::sampling(&mut f, served)?;
    f.finish()?;
    grammar::hold(served, &mut params, wanted, None, "")?;
    let task = common.task(served, params, prompts, logprobs)?;
    let mut dialect = OpenAi::new(served, format!("cmpl-{id}"), false, usage, task.answers());
    if echo {
        dialect.echo = task.prompts.iter().map(|prompt| served.opened.tokenizer.decode(prompt, false)).collect();
    }
    Ok(Prepared::new(task, Looks::default(), dialect, stream))
}

/// One prompt, as text or as tokens.
///
/// # Errors
/// For what is neither, or too long, and for several.
pub fn one_prompt(given: Json, served: &Served) -> Result<Vec<u32>, ApiError> {
    let mut all = prompts(given, served)?;
    match all.len() {
        1 => Ok(all.swap_remove(0)),
        n => Err(ApiError::unsupported(
            "prompt",
            format!("prompt: {n} prompts were given, but a request has one here; /v1/completions takes several"),
        )),
    }
}

/// The prompts of a request, each as text or as tokens.
///
/// # Errors
/// For what is neither, or too long.
fn prompts(given: Json, served: &Served) -> Result<Vec<Vec<u32>>, ApiError> {
    let expected = "a text, a list of token ids, or a list of those";
    let items = match given {
        Json::Array(items) if !items.is_empty() && !items[0].is_number() => items,
        Json::Array(items) if items.is_empty() => return Err(wrong("prompt", expected, &Json::Array(items))),
        one => vec![one],
    };
    if items.len() > PROMPTS_MAX {
        let message = format!("prompt: at most {PROMPTS_MAX} prompts were expected, found {}", items.len());
        return Err(ApiError::field("prompt", message));
    }
    let mut left = PROMPT_TOKENS_MAX.max(served.n_ctx);
    let mut all = Vec::with_capacity(items.len());
    for item in items {
        let tokens = match item {
            Json::String(text) => {
                served.check_bytes(text.len(), "prompt")?;
                served.opened.tokenizer.encode_prompt(&text)
            }
            Json::Array(ids) => {
                prompt::check_count(ids.len(), "prompt", served)?;
                let id = |v: &Json| params::token_id(v, served).ok_or_else(|| params::not_token("prompt", served, v));
                ids.iter().map(id).collect::<Result<_, _>>()?
            }
            other => return Err(wrong("prompt", expected, &other)),
        };
        left = left.checked_sub(tokens.len()).ok_or_else(|| {
            let message = format!("prompt: all prompts together have more than {PROMPT_TOKENS_MAX} tokens; send fewer");
            ApiError::field("prompt", message)
        })?;
        all.push(tokens);
    }
    Ok(all)
}

/// OpenAI's form of answers.
pub struct OpenAi {
    served: Arc<Served>,
    id: String,
    created: u64,
    chat: bool,
    usage: bool,
    choices: usize,
    /// Each prompt, if they stand before their answers.
    echo: Vec<String>,
    /// Characters so far of each answer, where tokens of completions lie.
    offsets: Vec<usize>,
}

impl OpenAi {
    fn new(served: &Arc<Served>, id: String, chat: bool, usage: bool, choices: usize) -> OpenAi {
        let (served, created) = (served.clone(), unix_s());
        OpenAi { served, id, created, chat, usage, choices, echo: Vec::new(), offsets: vec![0; choices] }
    }

    /// What stands before an answer.
    fn echo(&self, index: usize) -> &str {
        let each = self.choices / self.echo.len().max(1);
        self.echo.get(index / each.max(1)).map_or("", String::as_str)
    }

    fn object(&self, chunk: bool) -> &'static str {
        match (self.chat, chunk) {
            (true, true) => "chat.completion.chunk",
            (true, false) => "chat.completion",
            (false, _) => "text_completion",
        }
    }

    /// An object with these choices.
    fn around(&self, chunk: bool, choices: Vec<Json>) -> Json {
        json!({
            "id": self.id,
            "object": self.object(chunk),
            "created": self.created,
            "model": self.served.name(),
            "system_fingerprint": concat!("nt-", env!("CARGO_PKG_VERSION")),
            "choices": choices,
        })
    }

    fn chunk(&self, index: usize, delta: Json, logprobs: Json, finish: Json, out: &mut String) {
        let choice = match self.chat {
            true => json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish }),
            false => {
                let text = delta["content"].as_str().unwrap_or("");
                json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish })
            }
        };
        let mut chunk = self.around(true, vec![choice]);
        if self.usage {
            chunk["usage"] = Json::Null;
        }
        data(&chunk, out);
    }

    /// Tokens as this kind of answer tells them.
    fn logprobs(&mut self, choice: usize, tokens: &[TokenLogprob]) -> Json {
        let text = |id: u32| String::from_utf8_lossy(self.served.opened.tokenizer.token_bytes(id)).into_owned();
        let bytes = |id: u32| self.served.opened.tokenizer.token_bytes(id).to_vec();
        if self.chat {
            let entry = |id: u32, l: f32| json!({ "token": text(id), "logprob": finite(l), "bytes": bytes(id) });
            let tokens = tokens.iter().map(|t| {
                let mut of = entry(t.id, t.logprob);
                of["top_logprobs"] = t.top.iter().map(|&(id, l)| entry(id, l)).collect();
                of
            });
            return json!({ "content": tokens.collect::<Vec<_>>(), "refusal": null });
        }
        let mut at = self.offsets.get(choice).copied().unwrap_or(0);
        let mut offsets = Vec::with_capacity(tokens.len());
        for t in tokens {
            offsets.push(at);
            at += text(t.id).chars().count();
        }
        let all = json!({
            "tokens": tokens.iter().map(|t| text(t.id)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|t| finite(t.logprob)).collect::<Vec<_>>(),
            "top_logprobs": tokens
                .iter()
                .map(|t| t.top.iter().map(|&(id, l)| (text(id), json!(finite(l)))).collect::<serde_json::Map<_, _>>())
                .collect::<Vec<_>>(),
            "text_offset": offsets,
        });
        if let Some(offset) = self.offsets.get_mut(choice) {
            *offset = at;
        }
        all
    }

    fn whole_choice(&mut self, index: usize, answer: &Answer, wanted: bool) -> Json {
        let logprobs = if wanted { self.logprobs(index, &answer.logprobs) } else { Json::Null };
        let finish = answer.finish.as_ref().map(|f| reason(f, !answer.calls.is_empty()));
        if !self.chat {
            let text = format!("{}{}", self.echo(index), answer.text);
            return json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish });
        }
        json!({ "index": index, "message": message(answer), "logprobs": logprobs, "finish_reason": finish })
    }
}

/// The message of an answer.
pub fn message(answer: &Answer) -> Json {
    let mut message = json!({ "role": "assistant", "content": answer.text });
    if !answer.thought.is_empty() {
        message["reasoning_content"] = answer.thought.as_str().into();
    }
    if !answer.calls.is_empty() {
        if answer.text.is_empty() {
            message["content"] = Json::Null;
        }
        message["tool_calls"] = answer.calls.iter().enumerate().map(|(i, c)| tool_call(i, c)).collect();
    }
    message
}

fn tool_call(number: usize, call: &Call) -> Json {
    json!({
        "id": format!("call_{}", call_id(number, call)),
        "type": "function",
        "function": { "name": call.name, "arguments": call.arguments },
    })
}

/// An id of a call: nine letters and digits, as some templates want.
pub fn call_id(number: usize, call: &Call) -> String {
    use std::hash::{BuildHasher as _, RandomState};
    let hash = RandomState::new().hash_one((number, &call.name, &call.arguments));
    format!("{:09x}", hash & 0xf_ffff_ffff)
}

/// A number that JSON has: a token that is never drawn has the lowest.
pub fn finite(l: f32) -> f32 {
    if l.is_finite() { l } else { -9999.0 }
}

/// Why an answer ended, in OpenAI's words.
fn reason(finish: &Finish, calls: bool) -> &'static str {
    match finish {
        Finish::Length => "length",
        _ if calls => "tool_calls",
        Finish::End | Finish::Stop(_) => "stop",
    }
}

/// Tokens that were used.
pub fn usage(s: &Summary) -> Json {
    json!({
        "prompt_tokens": s.prompt,
        "completion_tokens": s.generated,
        "total_tokens": s.prompt + s.generated,
        "prompt_tokens_details": { "cached_tokens": s.cached },
        "completion_tokens_details": { "reasoning_tokens": s.reasoning },
    })
}

/// How long it took, as llama-server tells it, and where the weights lay.
pub fn timings(s: &Summary, served: &Served) -> Json {
    let computed = s.prompt - s.cached;
    let rate = |n: usize, seconds: f64| (n > 0 && seconds > 0.0).then(|| n as f64 / seconds);
    let each_ms = |n: usize, seconds: f64| (n > 0).then(|| 1e3 * seconds / n as f64);
    json!({
        "cache_n": s.cached,
        "prompt_n": computed,
        "prompt_ms": 1e3 * s.prompt_s,
        "prompt_per_token_ms": each_ms(computed, s.prompt_s),
        "prompt_per_second": rate(computed, s.prompt_s),
        "predicted_n": s.generated,
        "predicted_ms": 1e3 * s.decode_s,
        "predicted_per_token_ms": each_ms(s.generated, s.decode_s),
        "predicted_per_second": rate(s.generated, s.decode_s),
        "queued_ms": 1e3 * s.queued_s,
        "load_ms": 1e3 * s.load_s,
        "tiers": served.plan(),
    })
}

impl Dialect for OpenAi {
    fn begin(&mut self, out: &mut String) {
        for index in 0..self.choices {
            if self.chat {
                self.chunk(index, json!({ "role": "assistant", "content": "" }), Json::Null, Json::Null, out);
            } else if !self.echo.is_empty() {
                self.chunk(index, json!({ "content": self.echo(index) }), Json::Null, Json::Null, out);
            }
        }
    }

    fn step(&mut self, step: Step, out: &mut String) {
        match step {
            Step::Words { choice, text, logprobs } => {
                let logprobs = if logprobs.is_empty() { Json::Null } else { self.logprobs(choice, &logprobs) };
                self.chunk(choice, json!({ "content": text }), logprobs, Json::Null, out);
            }
            Step::Thought { choice, text } => {
                self.chunk(choice, json!({ "reasoning_content": text }), Json::Null, Json::Null, out);
            }
            Step::Call { choice, number, call } => {
                let mut delta = tool_call(number, &call);
                delta["index"] = number.into();
                self.chunk(choice, json!({ "tool_calls": [delta] }), Json::Null, Json::Null, out);
            }
            Step::Finished { choice, finish, calls } => {
                self.chunk(choice, json!({}), Json::Null, reason(&finish, calls).into(), out);
            }
            Step::Done(summary) => {
                if self.usage {
                    let mut last = self.around(true, Vec::new());
                    last["usage"] = usage(&summary);
                    last["timings"] = timings(&summary, &self.served);
                    data(&last, out);
                }
                out.push_str("data: [DONE]\n\n");
            }
            Step::Failed(e) => data(&e.json(Form::OpenAi), out),
        }
    }

    fn whole(&mut self, answers: &Answers) -> Json {
        let wanted = answers.all.iter().any(|a| !a.logprobs.is_empty());
        let choices = answers.all.iter().enumerate().map(|(i, a)| self.whole_choice(i, a, wanted)).collect();
        let mut whole = self.around(false, choices);
        whole["usage"] = usage(&answers.summary);
        whole["timings"] = timings(&answers.summary, &self.served);
        whole
    }

    fn ping(&self) -> Option<&'static str> {
        Some(": ping\n\n")
    }
}

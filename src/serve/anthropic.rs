//! Anthropic's `/v1/messages`.

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::error::{ApiError, Form};
use super::fields::{Fields, wrong};
use super::grammar::{self, Wanted};
use super::job::{Finish, Summary};
use super::openai::call_id;
use super::params;
use super::prompt::{self, Choice, Conversation, Ending, Tools, no_tools};
use super::served::Served;
use super::split::Call;
use super::steps::{Answers, Dialect, Prepared, Step, named};

/// Fields that change no text: who asks, where it is billed and computed, and what may be cached.
const HARMLESS: [&str; 8] = [
    "metadata",
    "service_tier",
    "cache_control",
    "diagnostics",
    "inference_geo",
    "speed",
    "user_profile_id",
    "workspace_id",
];

/// What a request asks for, but for sampling parameters.
struct Asked {
    conversation: Conversation,
    /// Only one call counts.
    one_call: bool,
    /// The form of the answer.
    wanted: Wanted,
    /// Tokens of reasoning at most.
    budget: Option<i64>,
}

/// Reads the conversation of a request.
fn conversation(f: &mut Fields, served: &Served) -> Result<Asked, ApiError> {
    let mut messages = Vec::new();
    if let Some(system) = f.any("system") {
        messages.push(json!({ "role": "system", "content": texts(system, "system")? }));
    }
    let list = f.list("messages")?.unwrap_or_default();
    prompt::check_count(list.len(), "messages", served)?;
    let goes_on = list.last().is_some_and(|m| m["role"] == "assistant");
    for (i, message) in list.into_iter().enumerate() {
        turn(message, i, &mut messages)?;
    }
    let Tools { list: tools, choice, one_call } = tools(f, served)?;
    let mut wanted = grammar::wanted_output(f, "output_format")?;
    if goes_on && !prompt::may_continue(&messages) {
        let message = "messages: the last one is the assistant's and has calls, whose results are to follow";
        return Err(ApiError::field("messages", message));
    }
    let messages = prompt::messages(messages, served)?;
    let ending = if goes_on { Ending::Continued } else { Ending::Opened };
    let mut conversation = Conversation { messages, tools, choice, ending, ..Conversation::default() };
    let mut budget = None;
    if let Some(mut thinking) = f.object("thinking")? {
        let kind = thinking.text("type")?.unwrap_or_default();
        thinking.ignore(&["display"]);
        budget = thinking.whole("budget_tokens", 0, i64::MAX)?;
        thinking.finish()?;
        let on = kind != "disabled";
        if served.template_source.contains("enable_thinking") {
            conversation.variables.insert("enable_thinking".into(), on.into());
        } else if on != served.thinks() {
            let message = "thinking: this model's chat template has no switch for it";
            return Err(ApiError::unsupported("thinking", message));
        }
    }
    if let Some(mut output) = f.object("output_config")? {
        conversation.effort = output.text("effort")?;
        wanted = grammar::wanted_output(&mut output, "format")?.or(wanted);
        output.finish()?;
    }
    Ok(Asked { conversation, one_call, wanted, budget })
}

/// A text, or the texts of blocks.
fn texts(content: Json, place: &str) -> Result<Json, ApiError> {
    let blocks = match content {
        Json::String(_) => return Ok(content),
        Json::Array(blocks) => blocks,
        other => return Err(wrong(place, "a text or a list of blocks", &other)),
    };
    let text = |(i, block): (usize, &Json)| match (block["type"].as_str(), block["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(json!({ "type": "text", "text": text })),
        (kind, _) => {
            let (place, kind) = (format!("{place}[{i}]"), kind.unwrap_or("none").chars().take(40).collect::<String>());
            Err(ApiError::unsupported(
                &place,
                format!("{place}: a block of type {kind:?} was given, but only texts are read there"),
            ))
        }
    };
    Ok(Json::Array(blocks.iter().enumerate().map(text).collect::<Result<_, _>>()?))
}

/// A message of Anthropic's as OpenAI writes it: calls beside the text, results as messages of their own.
fn turn(message: Json, i: usize, out: &mut Vec<Json>) -> Result<(), ApiError> {
    let place = format!("messages[{i}]");
    let mut f = Fields::of(message, &place)?;
    let role = f.text("role")?.unwrap_or_default();
    if !["user", "assistant"].contains(&role.as_str()) {
        return Err(wrong(&format!("{place}.role"), "user or assistant", &json!(role)));
    }
    let place = format!("{place}.content");
    let content = f.any("content").ok_or_else(|| wrong(&place, "a text or a list of blocks", &Json::Null))?;
    f.finish()?;
    let Json::Array(blocks) = content else {
        out.push(json!({ "role": role, "content": content }));
        return Ok(());
    };
    let (mut rest, mut calls, mut thought) = (Vec::new(), Vec::new(), String::new());
    for (j, mut block) in blocks.into_iter().enumerate() {
        let at = format!("{place}[{j}]");
        match (block["type"].as_str(), role.as_str()) {
            (Some("tool_use"), "assistant") => calls.push(json!({
                "id": block["id"],
                "type": "function",
                "function": { "name": block["name"], "arguments": block["input"].to_string() },
            })),
            (Some("thinking"), "assistant") => thought.push_str(block["thinking"].as_str().unwrap_or("")),
            (Some("tool_result"), "user") => {
                let result = match block["content"].take() {
                    Json::Null => json!(""),
                    content => texts(content, &at)?,
                };
                out.push(json!({ "role": "tool", "tool_call_id": block["tool_use_id"], "content": result }));
            }
            _ => rest.push(block),
        }
    }
    if rest.is_empty() && calls.is_empty() {
        return Ok(());
    }
    let content = if rest.is_empty() { Json::Null } else { texts(Json::Array(rest), &place)? };
    let mut message = json!({ "role": role, "content": content });
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    if !thought.is_empty() {
        message["reasoning_content"] = thought.into();
    }
    out.push(message);
    Ok(())
}

/// A tool as OpenAI describes it.
fn as_function(tool: Json, i: usize) -> Result<Json, ApiError> {
    let place = format!("tools[{i}]");
    let mut f = Fields::of(tool, &place)?;
    if f.text("type")?.is_some_and(|t| t != "custom") {
        return Err(ApiError::unsupported(&place, format!("{place}: only tools of the client's own can be called")));
    }
    let name = f.text("name")?.ok_or_else(|| wrong(&f.name("name"), "a text", &Json::Null))?;
    let mut function = json!({ "name": name, "parameters": f.any("input_schema") });
    if let Some(description) = f.text("description")? {
        function["description"] = description.into();
    }
    if f.flag("strict")?.unwrap_or(false) {
        function["strict"] = true.into();
    }
    f.only("input_examples", &[json!([])], "chat templates have no place for examples; describe them in description")?;
    f.only("defer_loading", &[json!(false)], "all tools are told to the model at once")?;
    f.only("allowed_callers", &[json!(["direct"])], "a tool is called by the model alone")?;
    f.ignore(&["cache_control", "eager_input_streaming"]);
    f.finish()?;
    Ok(json!({ "type": "function", "function": function }))
}

/// Tools as OpenAI describes them, and whether only one call counts.
fn tools(f: &mut Fields, served: &Served) -> Result<Tools, ApiError> {
    let list = f.list("tools")?.unwrap_or_default();
    let choice = f.object("tool_choice")?;
    prompt::check_count(list.len(), "tools", served)?;
    let tools = list.into_iter().enumerate().map(|(i, tool)| as_function(tool, i)).collect::<Result<Vec<_>, _>>()?;
    let (mut one_call, mut forced) = (false, Choice::Auto);
    if let Some(mut choice) = choice {
        one_call = choice.flag("disable_parallel_tool_use")?.unwrap_or(false);
        match choice.text("type")?.as_deref() {
            Some("none") => return Ok(Tools::default()),
            None | Some("auto") => {}
            Some("any") => forced = Choice::Required,
            Some("tool") => forced = Choice::Named(choice.text("name")?.unwrap_or_default()),
            Some(other) => {
                return Err(wrong("tool_choice.type", "auto, any, tool or none", &Json::from(other)));
            }
        }
    }
    if !tools.is_empty() && served.family().is_none() {
        return Err(no_tools("tools"));
    }
    let choice = prompt::checked_choice(forced, &tools)?;
    Ok(Tools { list: tools, choice, one_call })
}

/// Reads a request to `/v1/messages`.
///
/// # Errors
/// What is wrong with it.
pub fn messages(served: &Arc<Served>, mut f: Fields, id: &str, stop: &dyn Fn() -> bool) -> Result<Prepared, ApiError> {
    let stream = f.flag("stream")?.unwrap_or(false);
    // Required there, and no number stands for no end.
    let most = f.whole("max_tokens", 1, i64::MAX)?.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    let most =
        most.ok_or_else(|| ApiError::field("max_tokens", "max_tokens: a whole number was expected, found nothing"))?;
    let stops = params::stops(&mut f, "stop_sequences")?;
    let Asked { conversation, one_call, wanted, budget } = conversation(&mut f, served)?;
    f.only(
        "context_management",
        &[json!({}), json!({ "edits": [] })],
        "a conversation is not edited here; send it as it is to be",
    )?;
    f.only("container", &[], "there are no containers here")?;
    f.only("mcp_servers", &[json!([])], "this server asks no other one")?;
    f.ignore(&HARMLESS);
    let mut params = params::sampling(&mut f, served)?;
    f.finish()?;
    let prompt = prompt::rendered(served, &conversation, stop)?;
    if let Some(tokens) = budget {
        params.thought = prompt::thought(served, &prompt.text, tokens, "thinking.budget_tokens")?;
    }
    grammar::hold(served, &mut params, wanted, Some((&conversation, one_call)), &prompt.text)?;
    let looks = prompt::looks(served, &conversation, &prompt.text, one_call);
    let task = prompt::task(served, prompt.tokens, params, Some(most), stops)?;
    let dialect = Anthropic {
        served: served.clone(),
        id: format!("msg_{id}"),
        prompt: task.tokens(),
        open: None,
        blocks: 0,
        finish: None,
    };
    Ok(Prepared::new(task, looks, dialect, stream))
}

/// `/v1/messages/count_tokens`.
///
/// # Errors
/// What is wrong with the request.
pub fn count_tokens(served: &Served, mut f: Fields, stop: &dyn Fn() -> bool) -> Result<Json, ApiError> {
    let conversation = conversation(&mut f, served)?.conversation;
    f.ignore(&HARMLESS);
    f.finish()?;
    Ok(json!({ "input_tokens": prompt::rendered(served, &conversation, stop)?.tokens.len() }))
}

/// A kind of block that deltas are added to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Block {
    Text,
    Thinking,
}

/// Anthropic's form of answers.
struct Anthropic {
    served: Arc<Served>,
    id: String,
    prompt: usize,
    open: Option<Block>,
    blocks: usize,
    finish: Option<(Finish, bool)>,
}

impl Anthropic {
    fn message(&self, content: Vec<Json>, usage: Json) -> Json {
        let (reason, stop) = match &self.finish {
            None => (Json::Null, Json::Null),
            Some((Finish::Length, _)) => ("max_tokens".into(), Json::Null),
            Some((_, true)) => ("tool_use".into(), Json::Null),
            Some((Finish::Stop(text), _)) => ("stop_sequence".into(), text.as_str().into()),
            Some((Finish::End, _)) => ("end_turn".into(), Json::Null),
        };
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.served.name(),
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage,
        })
    }

    fn close(&mut self, out: &mut String) {
        if self.open.take().is_some() {
            self.stop_block(out);
        }
    }

    fn stop_block(&mut self, out: &mut String) {
        named("content_block_stop", &json!({ "type": "content_block_stop", "index": self.blocks }), out);
        self.blocks += 1;
    }

    fn start_block(&self, block: Json, out: &mut String) {
        let start = json!({ "type": "content_block_start", "index": self.blocks, "content_block": block });
        named("content_block_start", &start, out);
    }

    fn delta(&self, delta: Json, out: &mut String) {
        let delta = json!({ "type": "content_block_delta", "index": self.blocks, "delta": delta });
        named("content_block_delta", &delta, out);
    }

    fn text(&mut self, kind: Block, text: &str, out: &mut String) {
        if text.is_empty() {
            return;
        }
        if self.open != Some(kind) {
            self.close(out);
            let block = match kind {
                Block::Text => json!({ "type": "text", "text": "" }),
                Block::Thinking => json!({ "type": "thinking", "thinking": "", "signature": "" }),
            };
            self.start_block(block, out);
            self.open = Some(kind);
        }
        let delta = match kind {
            Block::Text => json!({ "type": "text_delta", "text": text }),
            Block::Thinking => json!({ "type": "thinking_delta", "thinking": text }),
        };
        self.delta(delta, out);
    }
}

fn usage(s: &Summary) -> Json {
    json!({
        "input_tokens": s.prompt - s.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": s.cached,
        "output_tokens": s.generated,
    })
}

fn tool_use(number: usize, call: &Call, input: Json) -> Json {
    json!({ "type": "tool_use", "id": format!("toolu_{}", call_id(number, call)), "name": call.name, "input": input })
}

impl Dialect for Anthropic {
    fn begin(&mut self, out: &mut String) {
        let usage = json!({ "input_tokens": self.prompt, "output_tokens": 0 });
        let message = self.message(Vec::new(), usage);
        named("message_start", &json!({ "type": "message_start", "message": message }), out);
        named("ping", &json!({ "type": "ping" }), out);
    }

    fn step(&mut self, step: Step, out: &mut String) {
        match step {
            Step::Words { text, .. } => self.text(Block::Text, &text, out),
            Step::Thought { text, .. } => self.text(Block::Thinking, &text, out),
            Step::Call { number, call, .. } => {
                self.close(out);
                self.start_block(tool_use(number, &call, json!({})), out);
                self.delta(json!({ "type": "input_json_delta", "partial_json": call.arguments }), out);
                self.stop_block(out);
            }
            Step::Finished { finish, calls, .. } => {
                self.close(out);
                self.finish = Some((finish, calls));
            }
            Step::Done(summary) => {
                let message = self.message(Vec::new(), Json::Null);
                let delta = json!({ "stop_reason": message["stop_reason"], "stop_sequence": message["stop_sequence"] });
                let delta = json!({ "type": "message_delta", "delta": delta, "usage": usage(&summary) });
                named("message_delta", &delta, out);
                named("message_stop", &json!({ "type": "message_stop" }), out);
            }
            Step::Failed(e) => named("error", &e.json(Form::Anthropic), out),
        }
    }

    fn whole(&mut self, answers: &Answers) -> Json {
        let answer = answers.all.first().cloned().unwrap_or_default();
        self.finish = answer.finish.map(|f| (f, !answer.calls.is_empty()));
        let mut content = Vec::new();
        if !answer.thought.is_empty() {
            content.push(json!({ "type": "thinking", "thinking": answer.thought, "signature": "" }));
        }
        if !answer.text.is_empty() {
            content.push(json!({ "type": "text", "text": answer.text }));
        }
        content.extend(answer.calls.iter().enumerate().map(|(i, call)| {
            let input = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
            tool_use(i, call, input)
        }));
        self.message(content, usage(&answers.summary))
    }

    fn ping(&self) -> Option<&'static str> {
        Some("event: ping\ndata: {\"type\":\"ping\"}\n\n")
    }
}

//! Conversations and texts of requests as tokens.

use serde_json::{Map, Value as Json, json};

use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::job::Task;
use super::served::Served;
use super::split::{self, Looks};
use crate::engine::{Marks, Reasoning, SamplerParams, ThoughtBudget};
use crate::tokenizer::{ChatTemplate, TokenizerError};

/// A conversation that is to be answered.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    /// Messages with `role` and `content`.
    pub messages: Vec<Json>,
    /// Tools, as OpenAI describes them.
    pub tools: Vec<Json>,
    /// Variables of the template.
    pub variables: Map<String, Json>,
    /// How much the model is to reason.
    pub effort: Option<String>,
    /// Which tools it must call.
    pub choice: Choice,
    /// What the prompt ends with.
    pub ending: Ending,
}

/// What the prompt of a conversation ends with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ending {
    /// The beginning of the assistant's turn.
    #[default]
    Opened,
    /// The last message, which is the assistant's and goes on.
    Continued,
    /// The last message as it is.
    Closed,
}

/// Whether the last message is words of the assistant, which can go on.
pub fn may_continue(messages: &[Json]) -> bool {
    messages.last().is_some_and(|m| m["role"] == "assistant" && m["tool_calls"].is_null())
}

impl Conversation {
    /// Where the model may reason in the answer to this conversation, of which `prompt` was made.
    pub fn reasoning(&self, served: &Served, prompt: &str) -> Reasoning {
        let reasoning = Reasoning::of(&served.template_source, prompt);
        let (Reasoning::Open(marks) | Reasoning::Possible(marks)) = reasoning else { return reasoning };
        if self.ending != Ending::Continued || matches!(reasoning, Reasoning::Open(_)) {
            return reasoning;
        }
        // Words that go on are no reasoning, unless it was begun in them and has not ended.
        let words = self.messages.last().map_or(String::new(), |m| text(&m["content"]));
        match (words.rfind(marks.open), words.rfind(marks.close)) {
            (Some(open), close) if close.is_none_or(|close| close < open) => Reasoning::Open(marks),
            _ => Reasoning::None,
        }
    }
}

/// The texts of a content, joined.
fn text(content: &Json) -> String {
    match content {
        Json::String(text) => text.clone(),
        Json::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
        _ => String::new(),
    }
}

/// What an answer must call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// A tool or none, as the model chooses.
    #[default]
    Auto,
    /// Any tool.
    Required,
    /// The tool of this name.
    Named(String),
}

/// Tools, which of them an answer must call, and whether only one call counts.
#[derive(Clone, Debug, Default)]
pub struct Tools {
    /// As OpenAI describes them; none where the model may not call any.
    pub list: Vec<Json>,
    /// Which must be called.
    pub choice: Choice,
    /// Only the first call counts.
    pub one_call: bool,
}

/// A choice that must name one of the tools.
///
/// # Errors
/// If it does not.
pub fn checked_choice(choice: Choice, list: &[Json]) -> Result<Choice, ApiError> {
    let wrong = match &choice {
        Choice::Auto => return Ok(choice),
        Choice::Required if list.is_empty() => "there are no tools".to_owned(),
        Choice::Named(name) if !list.iter().any(|t| t["function"]["name"] == name.as_str()) => {
            format!("there is no tool {:?}", shortened(name))
        }
        _ => return Ok(choice),
    };
    Err(ApiError::field("tool_choice", format!("tool_choice: a call is to come, but {wrong}")))
}

/// A conversation as a model sees it.
#[derive(Clone, Debug)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
}

/// Renders a conversation; ends soon after `stop` says so.
///
/// # Errors
/// What the template says, a variable that it does not read, or that there is not one token.
pub fn rendered(served: &Served, c: &Conversation, stop: &dyn Fn() -> bool) -> Result<Rendered, ApiError> {
    let mut template = served.template.clone();
    for (name, value) in &c.variables {
        set(&mut template, name, value.clone(), &format!("chat_template_kwargs.{name}"))?;
    }
    if let Some(effort) = &c.effort {
        set_effort(&mut template, effort)?;
    }
    let tools = (!c.tools.is_empty()).then_some(c.tools.as_slice());
    // SmolLM3's template takes them under another name only.
    let bare = template.clone();
    if !c.tools.is_empty() && ![XML_TOOLS, PYTHON_TOOLS].iter().any(|name| c.variables.contains_key(*name)) {
        set_if_read(&mut template, XML_TOOLS, Json::from(c.tools.clone()), served)?;
    }
    let mut messages = with_written_calls(served, &c.messages);
    if c.ending == Ending::Continued {
        mark_end(&mut messages, served)?;
    }
    let opened = c.ending == Ending::Opened;
    let as_objects = with_arguments(&messages);
    check_values(as_objects.iter().chain(&c.tools).chain(c.variables.values()), served)?;
    let render = |template: &ChatTemplate| match template.prompt_until(&as_objects, tools, opened, stop) {
        // Some templates add arguments to a text, so they must be one.
        Err(TokenizerError::Template(_)) if as_objects != messages => {
            template.prompt_until(&messages, tools, opened, stop)
        }
        other => other,
    };
    let mut prompt = render(&template).map_err(failure)?;
    // Where earlier messages name a tool, its name in the prompt says nothing.
    let said = if c.tools.is_empty() { String::new() } else { Json::from(messages.clone()).to_string() };
    let is_told = |tool: &Json| {
        tool["function"]["name"].as_str().is_none_or(|name| prompt.text.contains(name) && !said.contains(name))
    };
    if !c.tools.iter().all(is_told) {
        let without = bare.prompt_until(&as_objects, None, opened, stop);
        if without.is_ok_and(|without| without.text == prompt.text) {
            let message = "tools: this model's chat template leaves them out, so the model would not know of them";
            return Err(ApiError::unsupported("tools", message));
        }
    }
    prompt.notes.iter().for_each(|note| tracing::info!("{note}"));
    if c.ending == Ending::Continued {
        cut_at_mark(&mut prompt.text)?;
    }
    let tokens = served.opened.tokenizer.encode_rendered_until(&prompt.text, stop);
    let tokens = tokens.ok_or_else(|| failure(TokenizerError::Stopped))?;
    Ok(Rendered { text: prompt.text, tokens })
}

/// Under which names SmolLM3's template takes tools whose calls are objects between tags, or lines of Python.
const XML_TOOLS: &str = "xml_tools";
const PYTHON_TOOLS: &str = "python_tools";

/// Sets a variable if the template's source has its name.
fn set_if_read(template: &mut ChatTemplate, name: &str, value: Json, served: &Served) -> Result<(), ApiError> {
    if !served.template_source.contains(name) {
        return Ok(());
    }
    template.set_variable(name, value).map_err(|e| ApiError::field("tools", e.to_string()))
}

/// Put behind the last message to find where its words end in a prompt, whatever a template puts around them.
const END_MARK: &str = "~nt:goes-on-here~";

/// Marks where the last message ends.
fn mark_end(messages: &mut [Json], served: &Served) -> Result<(), ApiError> {
    if split::in_channels(&served.template_source) {
        let message =
            "messages: this model answers in channels, in which a message of the assistant's is not continued";
        return Err(ApiError::unsupported("messages", message));
    }
    let Some(message) = messages.last_mut().and_then(Json::as_object_mut) else { return Ok(()) };
    let content = match message.remove("content") {
        Some(Json::Array(mut parts)) => {
            if let Some(part) = parts.last_mut() {
                part["text"] = format!("{}{END_MARK}", part["text"].as_str().unwrap_or("")).into();
            }
            Json::Array(parts)
        }
        content => format!("{}{END_MARK}", content.as_ref().and_then(Json::as_str).unwrap_or("")).into(),
    };
    message.insert("content".into(), content);
    Ok(())
}

/// Ends a prompt where the last message does.
fn cut_at_mark(prompt: &mut String) -> Result<(), ApiError> {
    let mut places = prompt.match_indices(END_MARK).map(|(at, _)| at);
    match (places.next(), places.next()) {
        (Some(at), None) => {
            prompt.truncate(at);
            Ok(())
        }
        _ => {
            let message = "messages: this model's chat template does not put the words of the last message into the prompt once and as they are, so they cannot be continued";
            Err(ApiError::unsupported("messages", message))
        }
    }
}

/// Values of JSON per token that a conversation may have, and those that it may have in any case.
const VALUES_OF_A_TOKEN: usize = 4;
const VALUES_MIN: usize = 4096;

/// Refuses conversations of more values than any prompt has room for: each takes a hundred times its bytes while a
/// template is at work.
fn check_values<'a>(all: impl Iterator<Item = &'a Json>, served: &Served) -> Result<(), ApiError> {
    let (n, most) = (all.map(values).sum::<usize>(), VALUES_MIN + VALUES_OF_A_TOKEN * served.n_ctx);
    if n > most {
        let message = format!(
            "messages and tools consist of {n} values, more than {most}, which the {} tokens that the context holds have no room for",
            served.n_ctx
        );
        return Err(ApiError::too_long(message));
    }
    Ok(())
}

/// Values that a value consists of, itself among them.
fn values(json: &Json) -> usize {
    1 + match json {
        Json::Array(items) => items.iter().map(values).sum(),
        Json::Object(fields) => fields.values().map(values).sum(),
        _ => 0,
    }
}

fn failure(e: TokenizerError) -> ApiError {
    match e {
        TokenizerError::Stopped | TokenizerError::TemplateMemory(_) => ApiError::unavailable(e.to_string()),
        e => ApiError::request(e.to_string()),
    }
}

/// Sets a variable that the template reads.
fn set(template: &mut ChatTemplate, name: &str, value: Json, field: &str) -> Result<(), ApiError> {
    let before = template.notes().len();
    template.set_variable(name, value).map_err(|e| ApiError::field(field, e.to_string()))?;
    match template.notes().get(before) {
        None => Ok(()),
        Some(_) => Err(ApiError::unsupported(
            field,
            format!("{field}: this model's chat template reads no variable {name}, so it would change nothing"),
        )),
    }
}

/// `none` is no reasoning, where the template has a switch for it.
fn set_effort(template: &mut ChatTemplate, effort: &str) -> Result<(), ApiError> {
    let field = "reasoning_effort";
    if !["none", "minimal", "low", "medium", "high", "xhigh"].contains(&effort) {
        return Err(wrong(field, "none, minimal, low, medium, high or xhigh", &Json::from(effort)));
    }
    let by_name = set(template, field, Json::from(effort), field);
    match by_name {
        Err(_) if matches!(effort, "none" | "minimal") => {
            set(template, "enable_thinking", Json::Bool(false), field).or(by_name)
        }
        other => other,
    }
}

/// Messages whose calls are in their words, as the model writes them, where the template prints no calls.
fn with_written_calls(served: &Served, messages: &[Json]) -> Vec<Json> {
    let mut messages = messages.to_vec();
    let Some(family) = served.family().filter(|_| !served.template_source.contains("tool_calls")) else {
        return messages;
    };
    for message in messages.iter_mut().filter_map(Json::as_object_mut) {
        let written =
            message.get("tool_calls").and_then(Json::as_array).and_then(|calls| split::written(family, calls));
        let Some(written) = written else { continue };
        let content = match message.remove("content") {
            Some(Json::Array(mut parts)) => {
                parts.push(json!({ "type": "text", "text": written }));
                Json::Array(parts)
            }
            content => format!("{}{written}", content.as_ref().and_then(Json::as_str).unwrap_or("")).into(),
        };
        message.insert("content".into(), content);
        message.remove("tool_calls");
    }
    messages
}

/// Messages whose calls have arguments as objects, which most templates print as JSON.
fn with_arguments(messages: &[Json]) -> Vec<Json> {
    let mut messages = messages.to_vec();
    for call in messages.iter_mut().filter_map(|m| m.get_mut("tool_calls")?.as_array_mut()).flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments")
            && let Some(Ok(object @ Json::Object(_))) = arguments.as_str().map(serde_json::from_str)
        {
            *arguments = object;
        }
    }
    messages
}

/// What a message may have besides role and content.
const MESSAGE_FIELDS: [&str; 8] =
    ["name", "tool_calls", "tool_call_id", "refusal", "reasoning_content", "reasoning", "annotations", "audio"];

/// Refuses lists that no prompt has room for, since each of their items is a token or more: before they are rendered,
/// which takes long for many.
///
/// # Errors
/// If there are more than the context has positions.
pub fn check_count(n: usize, what: &str, served: &Served) -> Result<(), ApiError> {
    if n > served.n_ctx {
        let message = format!(
            "{what}: {n} of them are more than the {} tokens that the context holds; send fewer, or serve with a larger --ctx",
            served.n_ctx
        );
        return Err(ApiError { param: Some(what.to_owned()), ..ApiError::too_long(message) });
    }
    Ok(())
}

/// Checks messages as OpenAI writes them: nothing that the model would not see.
///
/// # Errors
/// For a message that is none, has what nt cannot give to the model, or if there are more than the context holds.
pub fn messages(list: Vec<Json>, served: &Served) -> Result<Vec<Json>, ApiError> {
    if list.is_empty() {
        return Err(ApiError::field("messages", "messages: at least one message was expected"));
    }
    let parts = |m: &Json| m["content"].as_array().map_or(1, |parts| parts.len().max(1));
    served.check_bytes(list.iter().map(|m| text_bytes(&m["content"])).sum(), "messages")?;
    let calls = |m: &Json| m["tool_calls"].as_array().map_or(0, Vec::len);
    check_count(list.iter().map(|m| parts(m) + calls(m)).sum(), "messages", served)?;
    list.into_iter().enumerate().map(|(i, m)| message(m, i, served)).collect()
}

/// Bytes of the texts of a content.
fn text_bytes(content: &Json) -> usize {
    match content {
        Json::String(text) => text.len(),
        Json::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).map(str::len).sum(),
        _ => 0,
    }
}

fn message(message: Json, i: usize, served: &Served) -> Result<Json, ApiError> {
    let place = format!("messages[{i}]");
    let mut f = Fields::of(message.clone(), &place)?;
    let role = f.text("role")?.unwrap_or_default();
    if !["system", "developer", "user", "assistant", "tool"].contains(&role.as_str()) {
        let expected = "system, developer, user, assistant or tool";
        return Err(wrong(&f.name("role"), expected, &message["role"]));
    }
    let (name, content) = (f.name("content"), f.any("content"));
    let calls = f.list("tool_calls")?.filter(|calls| !calls.is_empty());
    if (calls.is_some() || role == "tool") && served.family().is_none() {
        return Err(no_tools(&name));
    }
    for (j, call) in calls.iter().flatten().enumerate() {
        if !call["function"]["name"].is_string() {
            let name = format!("{}[{j}].function.name", f.name("tool_calls"));
            return Err(wrong(&name, "a text", &call["function"]["name"]));
        }
    }
    let content = match content {
        None if role == "assistant" => Json::Null,
        None => return Err(ApiError::field(&name, format!("{name}: a text was expected, found nothing"))),
        Some(content) => plain(content, &name)?,
    };
    f.only("refusal", &[], "a refusal is not part of what a model sees")?;
    f.only("audio", &[], "this server reads text only")?;
    f.ignore(&MESSAGE_FIELDS);
    f.finish()?;
    let Json::Object(mut message) = message else { return Ok(message) };
    for dropped in ["refusal", "annotations", "audio"] {
        message.remove(dropped);
    }
    if calls.is_none() {
        message.remove("tool_calls");
    }
    message.insert("content".into(), content);
    Ok(Json::Object(message))
}

/// A content as a text, or as a list of parts that are texts.
fn plain(content: Json, name: &str) -> Result<Json, ApiError> {
    let parts = match content {
        Json::String(_) => return Ok(content),
        Json::Array(parts) => parts,
        other => return Err(wrong(name, "a text or a list of parts", &other)),
    };
    let part = |(i, part): (usize, Json)| {
        let place = format!("{name}[{i}]");
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text" | "input_text" | "output_text"), Some(text)) => Ok(json!({ "type": "text", "text": text })),
            (Some(other), _) if other != "text" => Err(ApiError::unsupported(
                &place,
                format!("{place}: a part of type {:?} was given, but this server reads text only", shortened(other)),
            )),
            _ => Err(wrong(&place, "a part of type text with a text", &part)),
        }
    };
    let parts = parts.into_iter().enumerate().map(part).collect::<Result<Vec<_>, _>>()?;
    // One part is that text; several stay parts, which a template may join in its way.
    Ok(match &parts[..] {
        [one] => one["text"].clone(),
        _ => Json::Array(parts),
    })
}

fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}

/// The refusal of tools for a model whose calls nt cannot read.
pub fn no_tools(field: &str) -> ApiError {
    ApiError::unsupported(
        field,
        format!(
            "{field}: this model's chat template has no calls of tools in a form that nt reads (those of Hermes, Qwen, Llama 3, Mistral, gpt-oss, GLM, Seed OSS, MiniMax M2, LFM 2, Olmo 3, Hunyuan, Granite and Command R7B)"
        ),
    )
}

/// The tools of a request, as OpenAI writes them, if the model may call them.
///
/// # Errors
/// For a tool that is no function, or a choice of none of them.
pub fn tools(f: &mut Fields, served: &Served) -> Result<Tools, ApiError> {
    let tools = f.list("tools")?.unwrap_or_default();
    check_count(tools.len(), "tools", served)?;
    let choice = f.any("tool_choice");
    let one_call = !f.flag("parallel_tool_calls")?.unwrap_or(true);
    f.only("functions", &[json!([])], "tools replaces it")?;
    f.only("function_call", &[json!("none"), json!("auto")], "tool_choice replaces it")?;
    if tools.len() > TOOLS_MAX {
        let message = format!("tools: at most {TOOLS_MAX} were expected, found {}", tools.len());
        return Err(ApiError::field("tools", message));
    }
    for (i, tool) in tools.iter().enumerate() {
        let place = format!("tools[{i}]");
        if tool["type"].as_str().is_some_and(|t| t != "function") {
            return Err(ApiError::unsupported(&place, format!("{place}: only tools of type function can be called")));
        }
        if !tool["function"]["name"].is_string() {
            return Err(wrong(&format!("{place}.function.name"), "a text", &tool["function"]["name"]));
        }
    }
    let choice = match choice {
        None => Choice::Auto,
        Some(Json::String(word)) => match word.as_str() {
            "auto" => Choice::Auto,
            "none" => return Ok(Tools { one_call, ..Tools::default() }),
            "required" | "any" => Choice::Required,
            _ => return Err(wrong("tool_choice", "auto, none, required or a function", &Json::String(word))),
        },
        // Under `function` in chats, flat in responses.
        Some(object) => match object["function"]["name"].as_str().or(object["name"].as_str()) {
            Some(name) if object["type"] == "function" => Choice::Named(name.to_owned()),
            _ => return Err(wrong("tool_choice", "auto, none, required or a function by its name", &object)),
        },
    };
    if !tools.is_empty() && served.family().is_none() {
        return Err(no_tools("tools"));
    }
    let choice = checked_choice(choice, &tools)?;
    Ok(Tools { list: tools, choice, one_call })
}

/// Most tools of a request: each adds a schema to a grammar.
const TOOLS_MAX: usize = 256;

/// What is to be looked for in the answer to a conversation.
pub fn looks(served: &Served, c: &Conversation, prompt: &str, one_call: bool) -> Looks {
    let tools = c.tools.iter().filter_map(split::Tool::of).collect();
    let reasoning = c.reasoning(served, prompt);
    let thinks = match reasoning {
        // Words that go on: a mark in them is one of their own.
        Reasoning::None if c.ending == Ending::Continued => None,
        _ => Marks::of(&served.template_source),
    };
    Looks {
        thinks,
        within_thought: matches!(reasoning, Reasoning::Open(_)),
        tools: served.family().filter(|_| !c.tools.is_empty()).map(|family| (family, tools)),
        channels: split::in_channels(&served.template_source),
        one_call,
    }
}

/// The budget of a conversation's reasoning, for its prompt; `None` where the prompt leaves no room for any, or `tokens` is no
/// bound.
///
/// # Errors
/// Where the model's reasoning has no end that is one token.
pub fn thought(served: &Served, prompt: &str, tokens: i64, field: &str) -> Result<Option<ThoughtBudget>, ApiError> {
    let Ok(tokens) = usize::try_from(tokens) else { return Ok(None) };
    let (open, marks) = match Reasoning::of(&served.template_source, prompt) {
        Reasoning::Open(marks) => (false, marks),
        Reasoning::Possible(marks) => (true, marks),
        Reasoning::None if served.thinks() => return Ok(None),
        Reasoning::None | Reasoning::Channels { .. } => {
            let message =
                format!("{field}: this model's chat template has no marks of reasoning that it could be ended with");
            return Err(ApiError::unsupported(field, message));
        }
    };
    let token = |mark: &str| match served.opened.tokenizer.encode(mark, false, true)[..] {
        [id] => Ok(id),
        _ => Err(ApiError::unsupported(
            field,
            format!("{field}: this model's mark of reasoning, {mark}, is no token of its own"),
        )),
    };
    let open = if open { Some(token(marks.open)?) } else { None };
    Ok(Some(ThoughtBudget { tokens, open, close: token(marks.close)? }))
}

/// A task of one prompt within a context that its request wants smaller than the server's.
///
/// # Errors
/// If the prompt has no room in it.
pub fn within(mut task: Task, n_ctx: Option<usize>, field: &str) -> Result<Task, ApiError> {
    let Some(n_ctx) = n_ctx else { return Ok(task) };
    let n = task.tokens();
    if n > n_ctx {
        let message = format!("the prompt has {n} tokens, but {field} asks for a context of {n_ctx}");
        return Err(ApiError { param: Some(field.to_owned()), ..ApiError::too_long(message) });
    }
    task.max_tokens = task.max_tokens.min(n_ctx - n + 1);
    Ok(task)
}

/// A task within the limits of the server.
///
/// # Errors
/// If the prompt has no token, or no room.
pub fn task(
    served: &Served,
    prompt: Vec<u32>,
    params: SamplerParams,
    max_tokens: Option<usize>,
    stops: Vec<String>,
) -> Result<Task, ApiError> {
    task_of(served, vec![prompt], params, max_tokens, stops)
}

/// The same of several prompts.
///
/// # Errors
/// If one has no token, or no room.
pub fn task_of(
    served: &Served,
    prompts: Vec<Vec<u32>>,
    params: SamplerParams,
    max_tokens: Option<usize>,
    stops: Vec<String>,
) -> Result<Task, ApiError> {
    prompts.iter().try_for_each(|prompt| check_length(prompt.len(), served))?;
    let shortest = prompts.iter().map(Vec::len).min().unwrap_or(1);
    // The last token that is drawn takes no position.
    let room = served.n_ctx.saturating_sub(shortest) + 1;
    let most = max_tokens.unwrap_or(usize::MAX).min(room).min(served.limits.tokens.unwrap_or(usize::MAX));
    Ok(Task { prompts, params, choices: 1, max_tokens: most, stops, logprobs: None, reuse: true })
}

/// Refuses a prompt of no tokens, or of more than the context holds.
fn check_length(n: usize, served: &Served) -> Result<(), ApiError> {
    let n_ctx = served.n_ctx;
    if n == 0 {
        return Err(ApiError::request("the prompt is empty, and this model adds no BOS token"));
    }
    if n > n_ctx {
        let message = format!(
            "the prompt has {n} tokens, but the context holds {n_ctx}; shorten it, or serve with a larger --ctx"
        );
        return Err(ApiError::too_long(message));
    }
    Ok(())
}

//! OpenAI's `/v1/responses`, text and calls of tools. Nothing is stored: a conversation is sent whole each time.

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::error::{ApiError, Form};
use super::fields::{Fields, wrong};
use super::grammar::{self, Wanted};
use super::job::{Finish, Summary};
use super::openai::{call_id, timings};
use super::params::{self, HARMLESS};
use super::prompt::{self, Conversation};
use super::served::{Served, unix_s};
use super::split::Call;
use super::steps::{Answers, Dialect, Prepared, Step, named};

/// Reads a request to `/v1/responses`.
///
/// # Errors
/// What is wrong with it.
pub fn responses(served: &Arc<Served>, mut f: Fields, id: &str, stop: &dyn Fn() -> bool) -> Result<Prepared, ApiError> {
    let stream = f.flag("stream")?.unwrap_or(false);
    let most = params::max_tokens(&mut f, &["max_output_tokens"])?;
    let (conversation, one_call, wanted, asked) = conversation(&mut f, served)?;
    f.only("previous_response_id", &[], "answers are not stored here; send the whole conversation as input")?;
    f.only("conversation", &[], "conversations are not stored here; send the whole one as input")?;
    f.only("prompt", &[], "prompts are not stored here; send it as input")?;
    f.only("background", &[json!(false)], "an answer is computed while its client waits")?;
    f.only("truncation", &[json!("disabled")], "input that is too long is refused, not cut")?;
    f.only("max_tool_calls", &[], "this server calls no tools by itself")?;
    f.only("top_logprobs", &[json!(0)], "probabilities are told by /v1/chat/completions")?;
    f.ignore(&["include", "stream_options"]);
    let metadata = f.any("metadata").filter(|m| m.is_object() && m.to_string().len() <= METADATA_MAX);
    f.ignore(&HARMLESS);
    let mut params = params::sampling(&mut f, served)?;
    f.finish()?;
    let prompt = prompt::rendered(served, &conversation, stop)?;
    grammar::hold(served, &mut params, wanted, Some((&conversation, one_call)), &prompt.text)?;
    let looks = prompt::looks(served, &conversation, &prompt.text, one_call);
    let (temperature, top_p) = (plain(params.temp), plain(params.top_p));
    let task = prompt::task(served, prompt.tokens, params, most, Vec::new())?;
    let dialect = Responses {
        served: served.clone(),
        id: id.to_owned(),
        created: unix_s(),
        one_call,
        asked,
        most,
        temperature,
        top_p,
        metadata: metadata.unwrap_or_else(|| json!({})),
        sequence: 0,
        open: None,
        output: Vec::new(),
        finish: None,
    };
    Ok(Prepared::new(task, looks, dialect, stream))
}

/// What is asked for: the conversation, whether one call may be made at most, the form of the answer, and what the
/// response says again of it.
fn conversation(f: &mut Fields, served: &Served) -> Result<(Conversation, bool, Wanted, Asked), ApiError> {
    let mut messages = Vec::new();
    let mut asked = Asked { instructions: f.text("instructions")?, ..Asked::default() };
    messages.extend(asked.instructions.iter().map(|text| json!({ "role": "system", "content": text })));
    match f.any("input") {
        Some(Json::String(text)) => messages.push(json!({ "role": "user", "content": text })),
        Some(Json::Array(items)) => {
            prompt::check_count(items.len(), "input", served)?;
            for (i, item) in items.into_iter().enumerate() {
                add(item, i, &mut messages)?;
            }
        }
        other => return Err(wrong("input", "a text or a list of items", &other.unwrap_or_default())),
    }
    // Tools lie flat here.
    let list = f.list("tools")?.unwrap_or_default();
    prompt::check_count(list.len(), "tools", served)?;
    let mut tools = Vec::new();
    for (i, mut tool) in list.into_iter().enumerate() {
        let place = format!("tools[{i}]");
        if tool["type"] != "function" {
            return Err(ApiError::unsupported(&place, format!("{place}: only tools of type function can be called")));
        }
        asked.tools.push(told(&tool));
        if let Json::Object(tool) = &mut tool {
            tool.remove("type");
        }
        tools.push(json!({ "type": "function", "function": tool }));
    }
    asked.choice = f.any("tool_choice").unwrap_or_else(|| "auto".into());
    let mut both = Fields::of(
        json!({
            "tools": tools,
            "tool_choice": asked.choice,
            "parallel_tool_calls": f.any("parallel_tool_calls"),
        }),
        "",
    )?;
    let tools = prompt::tools(&mut both, served)?;
    let mut effort = None;
    if let Some(mut reasoning) = f.object("reasoning")? {
        effort = reasoning.text("effort")?;
        reasoning.ignore(&["summary", "generate_summary"]);
        reasoning.finish()?;
    }
    asked.effort = effort.clone();
    let mut wanted = Wanted::default();
    if let Some(mut text) = f.object("text")? {
        asked.format = text.get("format").cloned();
        wanted = grammar::wanted_text(&mut text)?;
        text.only("verbosity", &[json!("medium")], "the model has no switch for it")?;
        text.finish()?;
    }
    let messages = prompt::messages(messages, served)?;
    let one_call = tools.one_call;
    let conversation =
        Conversation { messages, tools: tools.list, effort, choice: tools.choice, ..Conversation::default() };
    Ok((conversation, one_call, wanted, asked))
}

/// What a response says again of its request.
#[derive(Default)]
struct Asked {
    instructions: Option<String>,
    tools: Vec<Json>,
    choice: Json,
    effort: Option<String>,
    format: Option<Json>,
}

/// A tool as a response tells it: with all fields. What a request says nothing of is strict at OpenAI; here it must be asked for.
fn told(tool: &Json) -> Json {
    let mut told = json!({ "description": null, "parameters": null, "strict": false });
    for (name, value) in tool.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        told[name] = value.clone();
    }
    told
}

/// Adds an item of the input as a message.
fn add(item: Json, i: usize, messages: &mut Vec<Json>) -> Result<(), ApiError> {
    let place = format!("input[{i}]");
    match item["type"].as_str() {
        None | Some("message") => {
            let mut f = Fields::of(item, &place)?;
            let (role, content) = (f.any("role"), f.any("content"));
            f.ignore(&["type", "id", "status"]);
            f.finish()?;
            messages.push(json!({ "role": role, "content": content }));
        }
        Some("function_call") => {
            let call = json!({
                "id": item["call_id"],
                "type": "function",
                "function": { "name": item["name"], "arguments": item["arguments"] },
            });
            match messages.last_mut().filter(|m| m["role"] == "assistant" && m["tool_calls"].is_array()) {
                Some(last) => last["tool_calls"].as_array_mut().into_iter().for_each(|calls| calls.push(call.clone())),
                None => messages.push(json!({ "role": "assistant", "content": null, "tool_calls": [call] })),
            }
        }
        Some("function_call_output") => messages.push(json!({
            "role": "tool",
            "tool_call_id": item["call_id"],
            "content": item["output"],
        })),
        // Templates leave earlier reasoning out.
        Some("reasoning") => {}
        Some(other) => {
            let kind: String = other.chars().take(40).collect();
            return Err(ApiError::unsupported(&place, format!("{place}: items of type {kind:?} are not read here")));
        }
    }
    Ok(())
}

/// Bytes of metadata that a response says again: as OpenAI's, 16 pairs of a name and half a KiB.
const METADATA_MAX: usize = 16 << 10;

/// A number as it was written, without what a float of half the size makes of it.
fn plain(x: f32) -> Json {
    x.to_string().parse::<f64>().map_or(Json::Null, Json::from)
}

/// The item that grows.
enum Open {
    Message(String),
    Reasoning(String),
}

/// The form of `/v1/responses`.
struct Responses {
    served: Arc<Served>,
    id: String,
    created: u64,
    one_call: bool,
    /// What was asked for, which the response says again.
    asked: Asked,
    most: Option<usize>,
    temperature: Json,
    top_p: Json,
    metadata: Json,
    sequence: u64,
    open: Option<Open>,
    output: Vec<Json>,
    finish: Option<Finish>,
}

impl Responses {
    fn event(&mut self, name: &str, mut fields: Json, out: &mut String) {
        fields["type"] = name.into();
        fields["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        named(name, &fields, out);
    }

    fn item_id(&self, kind: &str) -> String {
        format!("{kind}_{}_{}", self.id, self.output.len())
    }

    fn message(&self, text: &str, status: &str) -> Json {
        let content = match status {
            "in_progress" => json!([]),
            _ => json!([{ "type": "output_text", "text": text, "annotations": [], "logprobs": [] }]),
        };
        json!({ "type": "message", "id": self.item_id("msg"), "role": "assistant", "status": status, "content": content })
    }

    fn reasoning(&self, text: &str) -> Json {
        let content = if text.is_empty() { json!([]) } else { json!([{ "type": "reasoning_text", "text": text }]) };
        json!({ "type": "reasoning", "id": self.item_id("rs"), "summary": [], "content": content })
    }

    fn call(&self, call: &Call, arguments: &str, status: &str) -> Json {
        json!({
            "type": "function_call",
            "id": self.item_id("fc"),
            "call_id": format!("call_{}", call_id(self.output.len(), call)),
            "name": call.name,
            "arguments": arguments,
            "status": status,
        })
    }

    /// The state of a message that ends now: `max_tokens` or the context may have cut it.
    fn ended(&self) -> &'static str {
        if self.finish == Some(Finish::Length) { "incomplete" } else { "completed" }
    }

    fn response(&self, status: &str, summary: Option<&Summary>) -> Json {
        let cut = self.finish == Some(Finish::Length);
        json!({
            "id": format!("resp_{}", self.id),
            "object": "response",
            "created_at": self.created,
            "status": if cut && status == "completed" { "incomplete" } else { status },
            "incomplete_details": (cut && summary.is_some()).then(|| json!({ "reason": "max_output_tokens" })),
            "error": null,
            "instructions": self.asked.instructions,
            "model": self.served.name(),
            "output": self.output,
            "parallel_tool_calls": !self.one_call,
            "tool_choice": self.asked.choice,
            "tools": self.asked.tools,
            "text": { "format": self.asked.format.as_ref().unwrap_or(&json!({ "type": "text" })) },
            "reasoning": { "effort": self.asked.effort, "summary": null },
            "truncation": "disabled",
            "background": false,
            "previous_response_id": null,
            "metadata": self.metadata,
            "max_output_tokens": self.most.filter(|most| *most < usize::MAX),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "store": false,
            "usage": summary.map(|s| json!({
                "input_tokens": s.prompt,
                "input_tokens_details": { "cached_tokens": s.cached },
                "output_tokens": s.generated,
                "output_tokens_details": { "reasoning_tokens": s.reasoning },
                "total_tokens": s.prompt + s.generated,
            })),
            "timings": summary.map(|s| timings(s, &self.served)),
        })
    }

    fn added(&mut self, item: &Json, out: &mut String) {
        let index = self.output.len();
        self.event("response.output_item.added", json!({ "output_index": index, "item": item }), out);
    }

    fn done(&mut self, item: Json, out: &mut String) {
        let index = self.output.len();
        self.event("response.output_item.done", json!({ "output_index": index, "item": item }), out);
        self.output.push(item);
    }

    /// Ends the item that grows.
    fn close(&mut self, out: &mut String) {
        let index = self.output.len();
        match self.open.take() {
            None => {}
            Some(Open::Message(text)) => {
                let id = self.item_id("msg");
                let place = json!({ "item_id": id, "output_index": index, "content_index": 0 });
                let mut done = place.clone();
                (done["text"], done["logprobs"]) = (text.as_str().into(), json!([]));
                self.event("response.output_text.done", done, out);
                let item = self.message(&text, self.ended());
                let mut done = place;
                done["part"] = item["content"][0].clone();
                self.event("response.content_part.done", done, out);
                self.done(item, out);
            }
            Some(Open::Reasoning(text)) => {
                let place =
                    json!({ "item_id": self.item_id("rs"), "output_index": index, "content_index": 0, "text": text });
                self.event("response.reasoning_text.done", place, out);
                let item = self.reasoning(&text);
                self.done(item, out);
            }
        }
    }

    fn words(&mut self, text: &str, out: &mut String) {
        if text.is_empty() {
            return;
        }
        let index = self.output.len();
        if !matches!(self.open, Some(Open::Message(_))) {
            self.close(out);
            let item = self.message("", "in_progress");
            self.added(&item, out);
            let part = json!({ "type": "output_text", "text": "", "annotations": [], "logprobs": [] });
            let place =
                json!({ "item_id": item["id"], "output_index": self.output.len(), "content_index": 0, "part": part });
            self.event("response.content_part.added", place, out);
            self.open = Some(Open::Message(String::new()));
        }
        if let Some(Open::Message(all)) = &mut self.open {
            all.push_str(text);
        }
        let index = index.max(self.output.len());
        let delta = json!({
            "item_id": self.item_id("msg"), "output_index": index, "content_index": 0, "delta": text, "logprobs": [],
        });
        self.event("response.output_text.delta", delta, out);
    }

    fn thought(&mut self, text: &str, out: &mut String) {
        if !matches!(self.open, Some(Open::Reasoning(_))) {
            self.close(out);
            let item = self.reasoning("");
            self.added(&item, out);
            self.open = Some(Open::Reasoning(String::new()));
        }
        if let Some(Open::Reasoning(all)) = &mut self.open {
            all.push_str(text);
        }
        let delta = json!({
            "item_id": self.item_id("rs"), "output_index": self.output.len(), "content_index": 0, "delta": text,
        });
        self.event("response.reasoning_text.delta", delta, out);
    }
}

impl Dialect for Responses {
    fn begin(&mut self, out: &mut String) {
        let response = self.response("in_progress", None);
        self.event("response.created", json!({ "response": response }), out);
        self.event("response.in_progress", json!({ "response": response }), out);
    }

    fn step(&mut self, step: Step, out: &mut String) {
        match step {
            Step::Words { text, .. } => self.words(&text, out),
            Step::Thought { text, .. } => self.thought(&text, out),
            Step::Call { call, .. } => {
                self.close(out);
                let item = self.call(&call, "", "in_progress");
                self.added(&item, out);
                let place = json!({ "item_id": item["id"], "output_index": self.output.len() });
                let (mut delta, mut done) = (place.clone(), place);
                delta["delta"] = call.arguments.as_str().into();
                (done["arguments"], done["name"]) = (call.arguments.as_str().into(), call.name.as_str().into());
                self.event("response.function_call_arguments.delta", delta, out);
                self.event("response.function_call_arguments.done", done, out);
                let mut whole = self.call(&call, &call.arguments, "completed");
                whole["call_id"] = item["call_id"].clone();
                self.done(whole, out);
            }
            Step::Finished { finish, .. } => {
                self.finish = Some(finish);
                self.close(out);
            }
            Step::Done(summary) => {
                let response = self.response("completed", Some(&summary));
                let name =
                    if self.finish == Some(Finish::Length) { "response.incomplete" } else { "response.completed" };
                self.event(name, json!({ "response": response }), out);
            }
            Step::Failed(e) => {
                let e = e.json(Form::OpenAi);
                let error = &e["error"];
                let fields = json!({ "code": error["code"], "message": error["message"], "param": error["param"] });
                self.event("error", fields, out);
            }
        }
    }

    fn whole(&mut self, answers: &Answers) -> Json {
        let answer = answers.all.first().cloned().unwrap_or_default();
        self.finish = answer.finish;
        if !answer.thought.is_empty() {
            self.output.push(self.reasoning(&answer.thought));
        }
        if !answer.text.is_empty() {
            // What calls follow was whole before them.
            let status = if answer.calls.is_empty() { self.ended() } else { "completed" };
            self.output.push(self.message(&answer.text, status));
        }
        for call in &answer.calls {
            self.output.push(self.call(call, &call.arguments, "completed"));
        }
        self.response("completed", Some(&answers.summary))
    }

    fn ping(&self) -> Option<&'static str> {
        Some(": ping\n\n")
    }
}

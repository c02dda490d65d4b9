//! Chat templates: Jinja as Hugging Face renders it.
//!
//! A template is a program of the model's file. It runs within limits of steps, memory and time, on a thread of its
//! own ([`bounded`]): the engine counts steps and the sizes of most values, and the thread's limits hold for the rest
//! (comparing, printing and hashing values that hold others many times over).

use std::sync::Arc;
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, merge_maps};
use minijinja::{Environment, Error, ErrorKind, Value, context, escape_formatter};
use serde_json::Value as Json;

use super::prompt::{self, Prompt};
use super::{Tokenizer, TokenizerError, builtin, jinja, rewrite};
use crate::gguf::{self, Metadata};
use crate::memory::bounded::{self, Exceeded, Limits};

/// Steps that every template has; real ones take a few thousand. One also pays for 64 bytes of values.
const STEPS: u64 = 500_000;
/// Steps more for each message, and one more for so many bytes of the conversation.
const STEPS_OF_A_MESSAGE: u64 = 1_000;
const BYTES_OF_A_STEP: u64 = 8;
/// Steps at most.
const STEPS_MAX: u64 = 2_000_000;
/// Stack for each step: a template can nest a list in itself with few steps, and printing, comparing and dropping
/// values recurse into them.
const STACK_OF_A_STEP: u64 = 512;
/// The smallest stack that a template is rendered on.
const STACK_BYTES_MIN: u64 = 16 << 20;
/// Most bytes of a template. Those of models have up to 30 KiB.
const SOURCE_MAX: usize = 256 << 10;
/// Stack for each byte of a template while it is parsed: parsing and compiling recurse into long expressions.
const STACK_OF_A_BYTE: u64 = 2 << 10;
/// Memory that rendering may have allocated at once, and as many times the conversation's bytes more.
const HEAP_BYTES: u64 = 128 << 20;
const HEAP_OF_A_BYTE: u64 = 16;
/// Time of a processor; a second more for so many bytes of the conversation.
const CPU: Duration = Duration::from_secs(1);
const BYTES_OF_A_SECOND: u64 = 1 << 20;
const CPU_OF_A_MESSAGE: Duration = Duration::from_millis(2);
/// Characters of an error that are told; a template can raise one of any length.
const ERROR_CHARS: usize = 600;

/// The metadata key of the template; others for one purpose follow it after a dot.
const KEY: &str = "tokenizer.chat_template";
/// Variables that no caller may set: they are the conversation.
const RESERVED: [&str; 3] = ["messages", "tools", "add_generation_prompt"];

/// Built-in templates and the tokens that mark turns in each, for models without a template.
const MARKS: [(&str, &[&str]); 7] = [
    ("chatml", &["<|im_start|>", "<|im_end|>"]),
    ("gpt-oss", &["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]),
    ("gemma", &["<start_of_turn>", "<end_of_turn>"]),
    ("llama3", &["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    ("llama4", &["<|header_start|>", "<|header_end|>", "<|eot|>"]),
    ("mistral-v7-tekken", &["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]),
    ("command-r", &["<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"]),
];

/// The first built-in template all of whose marks are tokens of the vocabulary; ChatML, as llama.cpp, if none is.
fn fitting(tokenizer: &Tokenizer) -> &'static str {
    let is_token = |mark: &&str| tokenizer.encode(mark, false, true).len() == 1;
    MARKS.iter().find(|(_, marks)| marks.iter().all(is_token)).map_or("chatml", |(name, _)| name)
}

/// A model's chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    /// As it was written.
    source: String,
    renderer: Arc<Renderer>,
    notes: Vec<String>,
}

/// What renders; shared with the threads that do.
#[derive(Clone, Debug)]
struct Renderer {
    environment: Environment<'static>,
    bos: String,
    eos: String,
    /// Values for the template in addition to the conversation.
    variables: serde_json::Map<String, Json>,
    /// The file's own template for conversations with tools: there, or why it cannot be used.
    tool_use: Option<Result<(), String>>,
}

/// A conversation, as threads that render need it.
struct Conversation {
    messages: Vec<Json>,
    tools: Option<Vec<Json>>,
    add_generation_prompt: bool,
}

impl ChatTemplate {
    /// The template in `tokenizer.chat_template`, with tools the one in `tokenizer.chat_template.tool_use`. If there is
    /// none or it is blank, a built-in one whose marks the vocabulary has, or else ChatML, as llama.cpp.
    pub fn from_metadata(metadata: &Metadata, tokenizer: &Tokenizer) -> Result<ChatTemplate, TokenizerError> {
        let source = metadata.str(KEY).filter(|s| !s.trim().is_empty()).or_else(|| named(metadata, "default"));
        let mut template = match source {
            Some(source) => ChatTemplate::for_model(source, tokenizer)?,
            None => {
                let name = fitting(tokenizer);
                let mut chosen = ChatTemplate::from_name(metadata, tokenizer, name)?;
                let used = match name {
                    "chatml" => "ChatML is used".to_owned(),
                    name => format!("{name} is used, whose marks are in its vocabulary"),
                };
                let state = match metadata.get(KEY) {
                    None => "the model has no chat template",
                    Some(gguf::Value::Str(_)) => "the model's chat template is empty",
                    Some(_) => "the model's chat template is no text",
                };
                let others = ChatTemplate::names_in(metadata);
                let others = if others.is_empty() {
                    String::new()
                } else {
                    format!(" (the file also has {})", others.join(", "))
                };
                chosen.notes.push(format!("{state}; {used}{others}; --chat-template names another"));
                chosen
            }
        };
        if let Some(source) = named(metadata, "tool_use") {
            let added = template.add("tool_use", source);
            Arc::make_mut(&mut template.renderer).tool_use = Some(added.map_err(|e| e.to_string()));
        }
        Ok(template)
    }

    /// The template called `name`: one of the file's (`tokenizer.chat_template.NAME`), else a built-in one of
    /// llama.cpp's names.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::UnknownTemplate`] if neither has it.
    pub fn from_name(metadata: &Metadata, tokenizer: &Tokenizer, name: &str) -> Result<ChatTemplate, TokenizerError> {
        match named(metadata, name).map(str::to_owned).or_else(|| builtin::source(name)) {
            Some(source) => ChatTemplate::for_model(&source, tokenizer),
            None => Err(TokenizerError::UnknownTemplate {
                name: name.to_owned(),
                in_file: ChatTemplate::names_in(metadata).join(", "),
                built_in: builtin::names().collect::<Vec<_>>().join(", "),
            }),
        }
    }

    /// A template from its source, for a model's BOS and EOS.
    pub fn for_model(source: &str, tokenizer: &Tokenizer) -> Result<ChatTemplate, TokenizerError> {
        let text = |id: Option<u32>| {
            id.map(|id| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned()).unwrap_or_default()
        };
        ChatTemplate::new(source, text(tokenizer.bos()), text(tokenizer.eos()))
    }

    /// A template from its source and the texts of BOS and EOS.
    pub fn new(source: &str, bos: String, eos: String) -> Result<ChatTemplate, TokenizerError> {
        let mut environment = Environment::new();
        environment.set_syntax(syntax().map_err(|e| failed(&e))?);
        environment.set_unknown_method_callback(jinja::method);
        environment.set_formatter(|out, state, value| {
            jinja::go_on()?;
            escape_formatter(out, state, value)
        });
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: String| strftime(now()?, format));
        environment.add_test("sequence", jinja::is_sequence);
        environment.add_test("iterable", jinja::is_iterable);
        environment.add_filter("tojson", jinja::tojson);
        environment.add_filter("indent", jinja::indent);
        environment.add_filter(rewrite::PLAIN, jinja::plain);
        let renderer = Renderer { environment, bos, eos, variables: serde_json::Map::new(), tool_use: None };
        let mut template = ChatTemplate { source: source.to_owned(), renderer: Arc::new(renderer), notes: Vec::new() };
        template.add("chat", source)?;
        Ok(template)
    }

    /// The template as it was written; of a file with several, the default one.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Parses a template.
    fn add(&mut self, name: &'static str, source: &str) -> Result<(), TokenizerError> {
        if source.len() > SOURCE_MAX {
            let what = format!("it has {} bytes, more than the {SOURCE_MAX} that a template may have", source.len());
            return Err(TokenizerError::Template(what));
        }
        let (mut environment, source) = (self.renderer.environment.clone(), source.to_owned());
        let stack = parsing_stack(source.len());
        let added = bounded::run(&limits(stack, 0, 0), &|| false, move || {
            let source = rewrite::rewritten(&source, syntax().map_err(|e| failed(&e))?);
            environment.add_template_owned(name, source).map_err(|e| failed(&e))?;
            Ok(environment)
        });
        Arc::make_mut(&mut self.renderer).environment = added.map_err(|e| exceeded(e, 0, 0))??;
        Ok(())
    }

    /// The names of the templates that a file has in addition to its default one.
    pub fn names_in(metadata: &Metadata) -> Vec<&str> {
        let names = metadata.iter().filter_map(|(key, _)| key.strip_prefix(KEY)?.strip_prefix('.'));
        names.filter(|name| named(metadata, name).is_some()).collect()
    }

    /// Sets a variable of the template, such as `enable_thinking`. `bos_token` and `eos_token` are the model's
    /// otherwise. A template that does not read it renders as before; [`notes`](Self::notes) says so.
    ///
    /// # Errors
    ///
    /// If the name is one that the conversation itself has.
    pub fn set_variable(&mut self, name: &str, value: Json) -> Result<(), TokenizerError> {
        if RESERVED.contains(&name) {
            let what = format!("{name} is the conversation's own and cannot be set as a variable");
            return Err(TokenizerError::Template(what));
        }
        if !self.reads()?.iter().any(|read| read == name) {
            self.notes.push(format!("the chat template reads no variable {name}; it is set for nothing"));
        }
        Arc::make_mut(&mut self.renderer).variables.insert(name.to_owned(), value);
        Ok(())
    }

    /// The variables that the templates read.
    fn reads(&self) -> Result<Vec<String>, TokenizerError> {
        let renderer = Arc::clone(&self.renderer);
        let read = bounded::run(&limits(parsing_stack(SOURCE_MAX), 0, 0), &|| false, move || {
            let templates = ["chat", "tool_use"].into_iter().filter_map(|t| renderer.environment.get_template(t).ok());
            templates.flat_map(|t| t.undeclared_variables(false)).collect()
        });
        read.map_err(|e| exceeded(e, 0, 0))
    }

    /// What was missing and had to be assumed, a line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Renders as of a time (seconds since 1970), so that the same messages always give the same text.
    pub fn set_time(&mut self, unix_s: libc::time_t) {
        let environment = &mut Arc::make_mut(&mut self.renderer).environment;
        environment.add_function("strftime_now", move |format: String| strftime(unix_s, format));
    }

    /// What the template makes of `messages` (objects with `role` and `content`); with `add_generation_prompt` it
    /// ends with the opening of the assistant's turn. Nothing is checked; [`prompt`](Self::prompt) does.
    pub fn render(&self, messages: &[Json], add_generation_prompt: bool) -> Result<String, TokenizerError> {
        self.render_with_tools(messages, None, add_generation_prompt)
    }

    /// As [`render`](Self::render), with the tools that the model may call (JSON schemas of functions).
    pub fn render_with_tools(
        &self,
        messages: &[Json],
        tools: Option<&[Json]>,
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
        self.bounded(messages, tools, add_generation_prompt, &|| false, |render, messages| render(messages))
    }

    /// The prompt of `messages`, in which no message's words are missing.
    ///
    /// Where the template does not print a content as it is given, the content is given as a list of parts (or as
    /// one text); where it drops or refuses system messages, they are put before the next user's, and a note says so.
    ///
    /// # Errors
    ///
    /// The template's own error, or [`TokenizerError::DropsMessage`] or [`TokenizerError::CutsMessage`] if a message's
    /// words, or some of them, cannot be had in the prompt.
    pub fn prompt(
        &self,
        messages: &[Json],
        tools: Option<&[Json]>,
        add_generation_prompt: bool,
    ) -> Result<Prompt, TokenizerError> {
        self.prompt_until(messages, tools, add_generation_prompt, &|| false)
    }

    /// As [`prompt`](Self::prompt); ends with [`TokenizerError::Stopped`] soon after `stop` says so.
    pub fn prompt_until(
        &self,
        messages: &[Json],
        tools: Option<&[Json]>,
        add_generation_prompt: bool,
        stop: &dyn Fn() -> bool,
    ) -> Result<Prompt, TokenizerError> {
        self.bounded(messages, tools, add_generation_prompt, stop, |render, messages| prompt::checked(messages, render))
    }

    /// Lets `work` render a conversation within limits that follow from its size. Limits of address space count all of
    /// a stack, though only pages that are used take memory; so where one is refused, a smaller one does, with as many
    /// fewer steps.
    fn bounded<T: Send + 'static>(
        &self,
        messages: &[Json],
        tools: Option<&[Json]>,
        add_generation_prompt: bool,
        stop: &dyn Fn() -> bool,
        work: fn(&prompt::Render, &[Json]) -> Result<T, TokenizerError>,
    ) -> Result<T, TokenizerError> {
        let tools = tools.map(<[Json]>::to_vec);
        let conversation = Arc::new(Conversation { messages: messages.to_vec(), tools, add_generation_prompt });
        let count = messages.len() as u64;
        let bytes = messages.iter().chain(conversation.tools.iter().flatten()).map(size).sum::<u64>();
        let wanted = (STEPS + count * STEPS_OF_A_MESSAGE + bytes / BYTES_OF_A_STEP).min(STEPS_MAX);
        let mut steps = wanted;
        loop {
            let (renderer, conversation) = (Arc::clone(&self.renderer), Arc::clone(&conversation));
            let stack = (steps * STACK_OF_A_STEP).max(STACK_BYTES_MIN);
            let result = bounded::run(&limits(stack, count, bytes), stop, move || {
                let mut environment = renderer.environment.clone();
                environment.set_fuel(Some(steps));
                let render = |messages: &[Json]| renderer.render(&environment, &conversation, messages);
                work(&render, &conversation.messages)
            });
            return match result {
                Err(Exceeded::Thread(_)) if stack > STACK_BYTES_MIN => {
                    steps /= 4;
                    continue;
                }
                Err(e) => Err(exceeded(e, count, bytes)),
                Ok(Err(TokenizerError::TemplateLimit(_))) if steps < wanted => {
                    Err(TokenizerError::TemplateMemory("a smaller stack is not enough for this one".into()))
                }
                Ok(result) => result,
            };
        }
    }
}

impl Renderer {
    /// What the template makes of `messages`, with all else as in `conversation`.
    fn render(
        &self,
        environment: &Environment,
        conversation: &Conversation,
        messages: &[Json],
    ) -> Result<String, TokenizerError> {
        let tools = conversation.tools.as_deref();
        let name = match &self.tool_use {
            Some(Ok(())) if tools.is_some_and(|t| !t.is_empty()) => "tool_use",
            Some(Err(e)) if tools.is_some_and(|t| !t.is_empty()) => return Err(TokenizerError::Template(e.clone())),
            _ => "chat",
        };
        let template = environment.get_template(name).map_err(|e| failed(&e))?;
        // Hugging Face passes all of these always, so templates ask whether they are none.
        let defaults = context! { documents => (), bos_token => self.bos.as_str(), eos_token => self.eos.as_str() };
        let conversation = context! {
            messages => Value::from(Serde(messages)),
            tools => Value::from(Serde(tools)),
            add_generation_prompt => conversation.add_generation_prompt,
        };
        // Of equal names the last counts.
        let context = merge_maps([defaults, Value::from(Serde(&self.variables)), conversation]);
        template.render(context).map_err(|e| failed(&e))
    }
}

/// Stack for parsing a template of so many bytes.
fn parsing_stack(bytes: usize) -> u64 {
    (bytes as u64 * STACK_OF_A_BYTE).max(STACK_BYTES_MIN)
}

/// Limits for a conversation of so many messages and bytes.
fn limits(stack: u64, messages: u64, bytes: u64) -> Limits {
    Limits {
        stack_bytes: usize::try_from(stack).unwrap_or(usize::MAX),
        heap_bytes: usize::try_from(HEAP_BYTES + bytes * HEAP_OF_A_BYTE).unwrap_or(usize::MAX),
        cpu: CPU
            + CPU_OF_A_MESSAGE * u32::try_from(messages).unwrap_or(u32::MAX)
            + Duration::from_millis(bytes * 1000 / BYTES_OF_A_SECOND),
    }
}

/// What the template has exceeded, of the limits for a conversation of so many messages and bytes.
fn exceeded(e: Exceeded, messages: u64, bytes: u64) -> TokenizerError {
    let limits = limits(0, messages, bytes);
    match e {
        Exceeded::Heap => {
            TokenizerError::TemplateLimit(format!("it takes more than {} MiB of memory", limits.heap_bytes >> 20))
        }
        Exceeded::Cpu => TokenizerError::TemplateLimit(format!("it takes more than {:.0?}", limits.cpu)),
        Exceeded::Stopped => TokenizerError::Stopped,
        Exceeded::Thread(e) => TokenizerError::TemplateMemory(e.to_string()),
        Exceeded::Panicked(said) => {
            let (said, cut) = shortened(&said);
            TokenizerError::Template(format!("the template engine cannot render it ({said}{cut})"))
        }
    }
}

/// Bytes of the texts of a value, and a few for each value.
fn size(v: &Json) -> u64 {
    const OF_A_VALUE: u64 = 32;
    OF_A_VALUE
        + match v {
            Json::String(s) => s.len() as u64,
            Json::Array(items) => items.iter().map(size).sum(),
            Json::Object(fields) => fields.iter().map(|(key, v)| key.len() as u64 + size(v)).sum(),
            _ => 0,
        }
}

/// A template of the file by its name, if it is not blank.
fn named<'a>(metadata: &'a Metadata, name: &str) -> Option<&'a str> {
    metadata.str(&format!("{KEY}.{name}")).filter(|s| !s.trim().is_empty())
}

/// How templates are written: as Hugging Face sets Jinja up.
fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

/// An error with the line it occurred in and what it came from.
fn failed(e: &Error) -> TokenizerError {
    let mut text = e.to_string();
    let mut out_of_steps = e.kind() == ErrorKind::OutOfFuel;
    let mut source = std::error::Error::source(e);
    while let Some(s) = source {
        text = format!("{text}: {s}");
        out_of_steps |= s.downcast_ref::<Error>().is_some_and(|e| e.kind() == ErrorKind::OutOfFuel);
        source = s.source();
    }
    if out_of_steps {
        return TokenizerError::TemplateLimit(
            "it takes more steps, or makes larger values, than any model's does".into(),
        );
    }
    let (text, cut) = shortened(&text);
    TokenizerError::Template(format!("{text}{cut}"))
}

/// The first [`ERROR_CHARS`] of a text, and the mark of what was left out.
fn shortened(text: &str) -> (&str, &'static str) {
    text.char_indices().nth(ERROR_CHARS).map_or((text, ""), |(at, _)| (&text[..at], "…"))
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Seconds since 1970.
fn now() -> Result<libc::time_t, Error> {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since
        .ok()
        .and_then(|d| d.as_secs().try_into().ok())
        .ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "strftime_now: the clock stands before 1970"))
}

/// A time (seconds since 1970) as local time by a strftime format.
fn strftime(time: libc::time_t, format: String) -> Result<String, Error> {
    let bad = || Error::new(ErrorKind::InvalidOperation, "strftime_now: the format cannot be used");
    let format = std::ffi::CString::new(format).map_err(|_| bad())?;
    // SAFETY: tm is plain data, for which zeroes are valid.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live values of the right types.
    if unsafe { libc::localtime_r(&time, &mut tm) }.is_null() {
        return Err(bad());
    }
    let mut out = vec![0u8; 1024];
    // SAFETY: the buffer has the length that is passed, the format is a C string, tm is initialised.
    let n = unsafe { libc::strftime(out.as_mut_ptr().cast(), out.len(), format.as_ptr(), &tm) };
    out.truncate(n);
    String::from_utf8(out).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: &[Json]) -> Result<String, TokenizerError> {
        ChatTemplate::new(source, "<s>".into(), "</s>".into())?.render(messages, true)
    }

    #[test]
    fn chatml() {
        let m = [json!({"role": "system", "content": "Be brief."}), json!({"role": "user", "content": "Hi"})];
        let expected =
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(render(&builtin::source("chatml").unwrap(), &m).unwrap(), expected);
    }

    #[test]
    fn python_methods_and_exceptions() {
        let m = [json!({"role": "user", "content": "  Hi  "})];
        let t = "{{ bos_token }}{% for m in messages %}\n    {% if m.role.startswith('u') %}\n[{{ m['content'].strip() | upper }}]\n    {% endif %}\n{% endfor %}\n";
        assert_eq!(render(t, &m).unwrap(), "<s>[HI]\n");
        let e = render("{{ raise_exception('roles must alternate') }}", &m).unwrap_err().to_string();
        assert!(e.contains("roles must alternate"), "{e}");
    }

    #[test]
    fn json_is_written_as_python_does() {
        let m = [json!({"role": "tool", "content": {"a": [1, 2.5, "<é>"], "b": null}})];
        assert_eq!(render("{{ messages[0].content | tojson }}", &m).unwrap(), r#"{"a": [1, 2.5, "<é>"], "b": null}"#);
        assert_eq!(
            render("{{ messages[0].content.a | tojson(indent=2) }}", &m).unwrap(),
            "[\n  1,\n  2.5,\n  \"<é>\"\n]"
        );
    }

    #[test]
    fn json_is_ascii_where_asked_for() {
        let m = [json!({"role": "user", "content": "é😀"})];
        let t = "{{ messages[0].content | tojson(ensure_ascii=true) }}";
        assert_eq!(render(t, &m).unwrap(), r#""\u00e9\ud83d\ude00""#);
    }

    #[test]
    fn generation_tags_are_taken_as_plain_blocks() {
        let t = "a {%- generation -%} b {%- endgeneration %} {% if true %}c{% endif %}";
        assert_eq!(render(t, &[]).unwrap(), "ab c");
    }

    #[test]
    fn tags_in_texts_and_comments_are_no_tags() {
        let t = "{{ '{% generation %}' }}{# {% set a.b = #}{% raw %}{% set a.b = 1 %}{% endraw %}";
        assert_eq!(render(t, &[]).unwrap(), "{% generation %}{% set a.b = 1 %}");
    }

    #[test]
    fn a_namespace_takes_all_values_but_those_that_may_hold_it() {
        let set = |value: &str| {
            let t = format!("{{% set x=1 %}}{{% set ns = namespace() %}}{{% set ns.a = {value} %}}{{{{ ns.a }}}}");
            render(&t, &[json!({"role": "user", "content": "Hi"})])
        };
        for (value, shown) in [
            ("1", "1"),
            ("1, 'b'", "(1, 'b')"),
            ("1,", "(1,)"),
            ("2 if x else 3", "2"),
            ("')%}('", ")%}("),
            ("undefined_one", ""),
            ("none", "None"),
            ("[1] + [2]", "[1, 2]"),
            ("{'a': [1, {'b': 2}]}", "{'a': [1, {'b': 2}]}"),
            ("{'a': 1}|items", "[['a', 1]]"),
            ("messages[0:]", "[{'role': 'user', 'content': 'Hi'}]"),
            ("range(3)", "[0, 1, 2]"),
            ("[[range(2)]]", "[[[0, 1]]]"),
        ] {
            let shown = shown.to_owned();
            assert_eq!(set(value).map_err(|e| e.to_string()), Ok(shown), "{value}");
        }
        for value in [
            "ns",
            "[ns]",
            "1, ns",
            "{'a': {'b': [ns]}}",
            "ns|items",
            "[[ns|items]]",
            "[ns]|reverse",
            "[ns] * 3",
            "[1] + [ns]",
            "dict(ns, b=ns)",
            "[ns][0:]",
            "ns) or (1",
            "namespace()",
        ] {
            let t =
                format!("{{% set ns = namespace() %}}{{% set ns.a = {value} %}}{{% set ns.b = 1 %}}{{{{ 'a' ~ ns }}}}");
            match render(&t, &[]) {
                // What is taken is a copy, which ends.
                Ok(text) => assert!(value.contains("items"), "{value}: {text}"),
                Err(e) => assert!(e.to_string().contains("namespace") || value.contains(") or ("), "{value}: {e}"),
            }
        }
        for tag in
            ["ns.a, x = ns, 1", "(ns.a) = ns", "(x, (ns.a, y)) = (1, (ns, 2))", "ns.a | default(ns, true) %}{% endset"]
        {
            let e = render(&format!("{{% set ns = namespace() %}}\n\n{{%- set {tag} -%}}{{{{ 'a' ~ ns }}}}"), &[])
                .unwrap_err();
            assert!(e.to_string().contains("a namespace cannot be stored") && e.to_string().contains("chat:3"), "{e}");
        }
        let block = "{% set ns = namespace() %}{% set ns.a %}{{ ns }}{% endset %}{% set ns.b | upper %}x{% endset %}";
        assert_eq!(render(&format!("{block}{{{{ ns.a }}}}{{{{ ns.b }}}}"), &[]).unwrap(), "{}X");
        let of_a_loop =
            "{% set ns = namespace() %}{% for x in [1, ns] %}{% set ns.a = loop %}{% endfor %}{{ ns == ns }}";
        assert!(render(of_a_loop, &[]).unwrap_err().to_string().contains("a loop cannot be stored"));
    }

    #[test]
    fn a_template_that_panics_the_engine_is_refused() {
        for t in [
            "{{ [1,2][::-9223372036854775808] }}",
            "{% for i in [1,2] %}{{ loop.cycle() }}{% endfor %}",
            "{{ range(5,-9223372036854775808,-9223372036854775808)|list }}",
        ] {
            let e = render(t, &[]).unwrap_err().to_string();
            assert!(e.contains("the template engine cannot render it ("), "{t}: {e}");
        }
    }

    #[test]
    fn a_template_that_never_ends_is_stopped() {
        let t = "{% for a in range(10000) %}{% for b in range(10000) %}x{% endfor %}{% endfor %}";
        assert!(render(t, &[]).is_err());
    }

    #[test]
    fn a_value_that_holds_itself_many_times_is_dropped_and_printed() {
        let nest = |depth: usize| {
            format!(
                "{{% set ns = namespace(x=[]) %}}{{% for a in range({depth}) %}}{{% set ns.x = [ns.x] %}}{{% endfor %}}"
            )
        };
        assert_eq!(render(&nest(90), &[]).unwrap(), "");
        assert_eq!(render(&format!("{}{{{{ ns.x }}}}", nest(90)), &[]).unwrap().len(), 182);
        let e = render(&nest(40_000), &[]).unwrap_err().to_string();
        assert!(e.contains("nested too deeply"), "{e}");
    }

    #[test]
    fn a_template_that_cannot_be_parsed_says_where() {
        let e = render("{% if %}", &[]).unwrap_err().to_string();
        assert!(e.contains("line 1") || e.contains("chat:1"), "{e}");
    }
}

//! Chat templates: Jinja as Hugging Face renders it.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, merge_maps};
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde_json::Value as Json;

use super::prompt::{self, Prompt};
use super::{Tokenizer, TokenizerError, builtin, jinja};
use crate::gguf::Metadata;

/// Steps after which a template is stopped; real ones take a few thousand.
const FUEL: u64 = 2_000_000;

/// Stack of the thread that renders; see [`ChatTemplate::on_deep_stack`].
const STACK_BYTES: usize = 1 << 30;
/// The smallest stack that a template is rendered on.
const STACK_BYTES_MIN: usize = 16 << 20;
/// Most bytes of a template. Those of models have up to 30 KiB, and nesting needs stack for each byte.
const SOURCE_MAX: usize = 256 << 10;

/// The metadata key of the template; others for one purpose follow it after a dot.
const KEY: &str = "tokenizer.chat_template";
/// Variables that no caller may set: they are the conversation.
const RESERVED: [&str; 3] = ["messages", "tools", "add_generation_prompt"];

/// A model's chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
    /// Values for the template beside the conversation.
    variables: serde_json::Map<String, Json>,
    /// The file's own template for conversations with tools: there, or why it cannot be used.
    tool_use: Option<Result<(), String>>,
    notes: Vec<String>,
}

impl ChatTemplate {
    /// The template in `tokenizer.chat_template`, with tools the one in `tokenizer.chat_template.tool_use`; ChatML,
    /// as llama.cpp, if there is none or it is blank.
    pub fn from_metadata(metadata: &Metadata, tokenizer: &Tokenizer) -> Result<ChatTemplate, TokenizerError> {
        let source = metadata.str(KEY).filter(|s| !s.trim().is_empty()).or_else(|| named(metadata, "default"));
        let mut template = match source {
            Some(source) => ChatTemplate::for_model(source, tokenizer)?,
            None => {
                let mut chatml = ChatTemplate::from_name(metadata, tokenizer, "chatml")?;
                let state = if metadata.get(KEY).is_some() {
                    "the model's chat template is empty"
                } else {
                    "the model has no chat template"
                };
                let others = ChatTemplate::names_in(metadata);
                let others = if others.is_empty() {
                    String::new()
                } else {
                    format!(" (the file also has {})", others.join(", "))
                };
                chatml.notes.push(format!("{state}; ChatML is used{others}; --chat-template names another"));
                chatml
            }
        };
        if let Some(source) = named(metadata, "tool_use") {
            let added = template.add("tool_use", source);
            template.tool_use = Some(added.map_err(|e| e.to_string()));
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
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| failed(&e))?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(jinja::method);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: String| strftime(now()?, format));
        environment.add_test("sequence", jinja::is_sequence);
        environment.add_test("iterable", jinja::is_iterable);
        environment.add_filter("tojson", jinja::tojson);
        environment.add_filter("indent", jinja::indent);
        let (variables, notes) = (serde_json::Map::new(), Vec::new());
        let mut template = ChatTemplate { environment, bos, eos, variables, tool_use: None, notes };
        template.add("chat", source)?;
        Ok(template)
    }

    /// Parses a template. Parsing recurses into expressions, so it needs the deep stack too.
    fn add(&mut self, name: &'static str, source: &str) -> Result<(), TokenizerError> {
        if source.len() > SOURCE_MAX {
            let what = format!("it has {} bytes, more than the {SOURCE_MAX} that a template may have", source.len());
            return Err(TokenizerError::Template(what));
        }
        let mut bytes = STACK_BYTES;
        loop {
            let environment = &mut self.environment;
            let added = on_stack(bytes, || {
                environment.add_template_owned(name, without_generation_tags(source)).map_err(|e| failed(&e))
            });
            match added {
                Err(_) if bytes > STACK_BYTES_MIN => bytes /= 4,
                other => return other.map_err(|e| TokenizerError::TemplateMemory(e.to_string()))?,
            }
        }
    }

    /// The names of the templates that a file has besides its default one.
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
        let read = ["chat", "tool_use"].iter().filter_map(|t| self.environment.get_template(t).ok());
        if !read.into_iter().any(|t| t.undeclared_variables(false).contains(name)) {
            self.notes.push(format!("the chat template reads no variable {name}; it is set for nothing"));
        }
        self.variables.insert(name.to_owned(), value);
        Ok(())
    }

    /// What was missing and had to be assumed, a line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Renders as of a time (seconds since 1970), so that the same messages always give the same text.
    pub fn set_time(&mut self, unix_s: libc::time_t) {
        self.environment.add_function("strftime_now", move |format: String| strftime(unix_s, format));
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
        self.on_deep_stack(&|e| self.render_in(e, messages, tools, add_generation_prompt))?
    }

    /// The prompt of `messages`, in which no message's words are missing.
    ///
    /// Where the template does not print a content as it is given, the content is given as a list of parts (or as
    /// one text); where it drops or refuses system messages, they are put before the next user's, and a note says so.
    ///
    /// # Errors
    ///
    /// The template's own error, or [`TokenizerError::DropsMessage`] if a message's words cannot be had in the prompt.
    pub fn prompt(
        &self,
        messages: &[Json],
        tools: Option<&[Json]>,
        add_generation_prompt: bool,
    ) -> Result<Prompt, TokenizerError> {
        self.on_deep_stack(&|e| {
            prompt::checked(messages, &|messages| self.render_in(e, messages, tools, add_generation_prompt))
        })?
    }

    fn render_in(
        &self,
        environment: &Environment,
        messages: &[Json],
        tools: Option<&[Json]>,
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
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
            add_generation_prompt,
        };
        // Of equal names the last counts.
        let context = merge_maps([defaults, Value::from(Serde(&self.variables)), conversation]);
        template.render(context).map_err(|e| {
            let short = e.kind() == ErrorKind::OutOfFuel && environment.fuel() != Some(FUEL);
            if short {
                TokenizerError::TemplateMemory("a smaller stack is not enough for this one".into())
            } else {
                failed(&e)
            }
        })
    }

    /// Runs on a stack that is deep enough for whatever the fuel can build: dropping and printing values
    /// recurse into them, and a template can nest a list in itself with each step. Only pages that are
    /// used are taken from memory; real templates use a few. But limits of address space count the whole, so where
    /// it is refused, a smaller stack does, with as much less fuel.
    fn on_deep_stack<T: Send>(&self, work: &(dyn Fn(&Environment) -> T + Sync)) -> Result<T, TokenizerError> {
        let mut bytes = STACK_BYTES;
        loop {
            match on_stack(bytes, || {
                let mut environment = std::borrow::Cow::Borrowed(&self.environment);
                if bytes < STACK_BYTES {
                    environment.to_mut().set_fuel(Some(FUEL / (STACK_BYTES / bytes) as u64));
                }
                work(&environment)
            }) {
                Err(_) if bytes > STACK_BYTES_MIN => bytes /= 4,
                other => return other.map_err(|e| TokenizerError::TemplateMemory(e.to_string())),
            }
        }
    }
}

/// A template of the file by its name, if it is not blank.
fn named<'a>(metadata: &'a Metadata, name: &str) -> Option<&'a str> {
    metadata.str(&format!("{KEY}.{name}")).filter(|s| !s.trim().is_empty())
}

/// Runs `work` on a thread with a stack of so many bytes. Errors if the thread cannot be had.
fn on_stack<T: Send>(bytes: usize, work: impl FnOnce() -> T + Send) -> std::io::Result<T> {
    std::thread::scope(|s| {
        let thread = std::thread::Builder::new().name("template".into()).stack_size(bytes).spawn_scoped(s, work)?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Hugging Face marks the assistant's words with `{% generation %}` for training; for a prompt the
/// block is one that is always taken.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |e| e + 2);
        let (tag, after) = tag.split_at(end);
        let name = tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']).trim();
        match name {
            "generation" => out.push_str(&tag.replacen(name, "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen(name, "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// An error with the line it occurred in and what it came from.
fn failed(e: &Error) -> TokenizerError {
    let mut text = e.to_string();
    let mut source = std::error::Error::source(e);
    while let Some(s) = source {
        text = format!("{text}: {s}");
        source = s.source();
    }
    TokenizerError::Template(text)
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
    fn a_template_that_never_ends_is_stopped() {
        let t = "{% for a in range(10000) %}{% for b in range(10000) %}x{% endfor %}{% endfor %}";
        assert!(render(t, &[]).is_err());
    }

    #[test]
    fn a_value_that_holds_itself_many_times_is_dropped_and_printed() {
        let nest = "{% set ns = namespace(x=[]) %}{% for a in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}";
        assert_eq!(render(nest, &[]).unwrap(), "");
        assert_eq!(render(&format!("{nest}{{{{ ns.x }}}}"), &[]).unwrap().len(), 200_000);
        assert!(render(&format!("{nest}{{{{ ns.x | tojson }}}}"), &[]).is_err());
    }

    #[test]
    fn a_template_that_cannot_be_parsed_says_where() {
        let e = render("{% if %}", &[]).unwrap_err().to_string();
        assert!(e.contains("line 1") || e.contains("chat:1"), "{e}");
    }
}

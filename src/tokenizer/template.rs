//! Chat templates: Jinja as Hugging Face renders it.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde_json::Value as Json;

use super::{Tokenizer, TokenizerError, jinja};
use crate::gguf::Metadata;

/// What a model without a template gets, as llama.cpp does.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
/// Steps after which a template is stopped; real ones take a few thousand.
const FUEL: u64 = 2_000_000;

/// Stack of the thread that renders; see [`on_deep_stack`].
const STACK_BYTES: usize = 1 << 30;

/// A model's chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// The template in `tokenizer.chat_template`; ChatML if there is none.
    pub fn from_metadata(metadata: &Metadata, tokenizer: &Tokenizer) -> Result<ChatTemplate, TokenizerError> {
        let source = metadata.str("tokenizer.chat_template");
        if source.is_none() {
            tracing::warn!("the model has no chat template; ChatML is used");
        }
        let text = |id: Option<u32>| {
            id.map(|id| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned()).unwrap_or_default()
        };
        ChatTemplate::new(source.unwrap_or(CHATML), text(tokenizer.bos()), text(tokenizer.eos()))
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
        environment.add_template_owned("chat", without_generation_tags(source)).map_err(|e| failed(&e))?;
        Ok(ChatTemplate { environment, bos, eos })
    }

    /// Renders as of a time (seconds since 1970), so that the same messages always give the same text.
    pub fn set_time(&mut self, unix_s: libc::time_t) {
        self.environment.add_function("strftime_now", move |format: String| strftime(unix_s, format));
    }

    /// The prompt of `messages` (objects with `role` and `content`); with `add_generation_prompt` it
    /// ends with the opening of the assistant's turn.
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
        let template = self.environment.get_template("chat").map_err(|e| failed(&e))?;
        let context = context! {
            messages => Value::from(Serde(messages)),
            // Hugging Face passes these always, so templates ask whether they are none.
            tools => Value::from(Serde(tools)),
            documents => (),
            add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        on_deep_stack(|| template.render(context).map_err(|e| failed(&e)))?
    }
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

/// Runs on a stack that is deep enough for whatever the fuel can build: dropping and printing values
/// recurse into them, and a template can nest a list in itself with each step. Only pages that are
/// used are taken from memory; real templates use a few.
fn on_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, TokenizerError> {
    std::thread::scope(|s| {
        let thread = std::thread::Builder::new().name("template".into()).stack_size(STACK_BYTES);
        let thread = thread.spawn_scoped(s, work).map_err(|e| TokenizerError::Template(e.to_string()))?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
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
        assert_eq!(render(CHATML, &m).unwrap(), expected);
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

//! Chat templates: Jinja as Hugging Face renders it.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde_json::Value as Json;

use super::{Tokenizer, TokenizerError};
use crate::gguf::Metadata;

/// What a model without a template gets, as llama.cpp does.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
/// Steps after which a template is stopped; real ones take a few thousand.
const FUEL: u64 = 2_000_000;

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
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_template_owned("chat", without_generation_tags(source)).map_err(|e| failed(&e))?;
        Ok(ChatTemplate { environment, bos, eos })
    }

    /// The prompt of `messages` (objects with `role` and `content`); with `add_generation_prompt` it
    /// ends with the opening of the assistant's turn.
    pub fn render(&self, messages: &[Json], add_generation_prompt: bool) -> Result<String, TokenizerError> {
        let template = self.environment.get_template("chat").map_err(|e| failed(&e))?;
        let context = context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        template.render(context).map_err(|e| failed(&e))
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

/// Local time by a strftime format.
fn strftime_now(format: String) -> Result<String, Error> {
    let bad = || Error::new(ErrorKind::InvalidOperation, "strftime_now: the format cannot be used");
    let format = std::ffi::CString::new(format).map_err(|_| bad())?;
    // SAFETY: a null pointer asks for the return value only.
    let now = unsafe { libc::time(std::ptr::null_mut()) };
    // SAFETY: tm is plain data, for which zeroes are valid.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live values of the right types.
    if unsafe { libc::localtime_r(&now, &mut tm) }.is_null() {
        return Err(bad());
    }
    let mut out = vec![0u8; 1024];
    // SAFETY: the buffer has the length that is passed, the format is a C string, tm is initialised.
    let n = unsafe { libc::strftime(out.as_mut_ptr().cast(), out.len(), format.as_ptr(), &tm) };
    out.truncate(n);
    String::from_utf8(out).map_err(|_| bad())
}

/// JSON as Python's `json.dumps` writes it, with `ensure_ascii` false unless asked for: a space after
/// `,` and `:`, nothing escaped for HTML.
fn tojson(value: &Value, options: minijinja::value::Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let _: Option<bool> = options.get("sort_keys")?;
    let _: Option<Value> = options.get("separators")?;
    options.assert_all_used()?;
    let json = serde_json::to_value(value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    let mut out = String::new();
    write_json(&json, indent, 0, &mut out);
    if ensure_ascii == Some(true) {
        out = escape_non_ascii(&out);
    }
    Ok(Value::from_safe_string(out))
}

/// Characters outside ASCII as `\uXXXX`; they occur within JSON strings only.
fn escape_non_ascii(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            out.extend(c.encode_utf16(&mut [0; 2]).iter().map(|u| format!("\\u{u:04x}")));
        }
    }
    out
}

fn write_json(v: &Json, indent: Option<usize>, depth: usize, out: &mut String) {
    let line = |out: &mut String, depth: usize| {
        if let Some(n) = indent {
            out.push('\n');
            out.push_str(&" ".repeat(n * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match v {
        Json::Array(items) if !items.is_empty() => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { comma } else { "" });
                line(out, depth + 1);
                write_json(item, indent, depth + 1, out);
            }
            line(out, depth);
            out.push(']');
        }
        Json::Object(map) if !map.is_empty() => {
            out.push('{');
            for (i, (k, item)) in map.iter().enumerate() {
                out.push_str(if i > 0 { comma } else { "" });
                line(out, depth + 1);
                out.push_str(&Json::from(k.as_str()).to_string());
                out.push_str(": ");
                write_json(item, indent, depth + 1, out);
            }
            line(out, depth);
            out.push('}');
        }
        plain => out.push_str(&plain.to_string()),
    }
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
    fn a_template_that_cannot_be_parsed_says_where() {
        let e = render("{% if %}", &[]).unwrap_err().to_string();
        assert!(e.contains("line 1") || e.contains("chat:1"), "{e}");
    }
}

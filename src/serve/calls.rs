//! Grammars of calls of tools, as each family of models writes them.

use serde_json::{Value as Json, json};

use super::error::ApiError;
use super::prompt::{Choice, Conversation};
use super::served::Served;
use super::split::Family;
use crate::engine::constraint::{mark, quoted};
use crate::engine::{Form, Reasoning};

/// The name of the words' form.
const WORDS: &str = "words";
/// What names of schemas of arguments begin with.
const ARGUMENTS: &str = "arguments";

/// The field of a request that a part of a form comes from; `None` for its words.
pub fn place(part: &str) -> Option<String> {
    let number = part.strip_prefix(ARGUMENTS)?;
    let number = number.split_once('-').map_or(number, |(tool, _)| tool);
    Some(format!("tools[{number}].function.parameters"))
}

/// The form of an answer that must be calls, or whose calls have strict arguments; `words` is that of an answer in
/// words. `None` where calls are as the model writes them.
///
/// # Errors
/// For strict arguments of which the family's form does not follow a keyword.
pub fn form(served: &Served, c: &Conversation, one_call: bool, words: Option<&Form>) -> Result<Option<Form>, ApiError> {
    let Some(family) = served.family() else { return Ok(None) };
    let strict = |tool: &Json| tool["function"]["strict"] == true;
    let forced = c.choice != Choice::Auto;
    if c.tools.is_empty() || !forced && words.is_none() && !c.tools.iter().any(strict) {
        return Ok(None);
    }
    let mut writer = Writer { served, calls: Vec::new(), parts: Vec::new(), rules: String::new() };
    for (i, tool) in c.tools.iter().enumerate() {
        let name = tool["function"]["name"].as_str().unwrap_or_default();
        if !matches!(&c.choice, Choice::Named(wanted) if wanted != name) {
            if let Some(keyword) = lost(family, &tool["function"]["parameters"]).filter(|_| strict(tool)) {
                let place = format!("tools[{i}].function.parameters");
                let why = "of a text cannot be followed in the form that this model has for calls";
                return Err(ApiError::unsupported(&place, format!("{place}: {keyword} {why}")));
            }
            writer.add(family, i, name, arguments(served, tool, strict(tool)));
        }
    }
    let one = one_call || matches!(c.choice, Choice::Named(_));
    let text = match (forced, words) {
        (true, _) => format!("start: {}\n", writer.calls(family, one)),
        (false, Some(words)) => {
            writer.parts.push((WORDS.to_owned(), words.clone()));
            let header = if family == Family::Harmony { writer.header("final") } else { String::new() };
            format!("start: {header} @{WORDS} | {}\n", writer.calls(family, one))
        }
        (false, None) => writer.free(family, one),
    };
    let lark = format!("{text}{}{}", writer.shared(family), writer.rules);
    Ok(Some(Form::Made { lark, parts: writer.parts }))
}

/// A keyword of a text that GLM's form of calls, which writes texts as they are, would not be held to.
fn lost(family: Family, schema: &Json) -> Option<&'static str> {
    const OF_TEXTS: [&str; 6] = ["pattern", "format", "minLength", "maxLength", "const", "anyOf"];
    let texts = schema["properties"].as_object().into_iter().flatten().map(|p| p.1).filter(|p| p["type"] == "string");
    let found = texts.filter_map(|p| OF_TEXTS.into_iter().find(|k| p.get(*k).is_some())).next();
    found.filter(|_| family == Family::Glm)
}

/// The schema of a tool's arguments. One that is not strict and that nt cannot follow is any object, as a model without
/// a grammar might write it.
fn arguments(served: &Served, tool: &Json, strict: bool) -> Json {
    let any = json!({ "type": "object" });
    let schema = match &tool["function"]["parameters"] {
        Json::Null => return any,
        schema => schema,
    };
    if strict {
        return schema.clone();
    }
    let followed = served.grammars().is_ok_and(|g| g.compile(&Form::Schema(schema.clone()), Reasoning::None).is_ok());
    if followed && schema.is_object() { schema.clone() } else { any }
}

struct Writer<'a> {
    served: &'a Served,
    /// What is one call, an alternative for each tool.
    calls: Vec<String>,
    /// Forms of arguments, by name.
    parts: Vec<(String, Form)>,
    /// Rules that they need.
    rules: String,
}

impl Writer<'_> {
    fn mark(&self, name: &str) -> String {
        mark(&self.served.opened.tokenizer, name)
    }

    /// A header of gpt-oss, behind `<|start|>assistant`.
    fn header(&self, channel: &str) -> String {
        format!("{} {} {}", self.mark("<|channel|>"), quoted(channel), self.mark("<|message|>"))
    }

    /// Adds tool number `i` as the family writes a call of it.
    fn add(&mut self, family: Family, i: usize, name: &str, schema: Json) {
        if family == Family::Glm {
            return self.add_keys(i, name, &schema);
        }
        let part = format!("{ARGUMENTS}{i}");
        let json = |key: &str| format!("{{\"name\": {}, \"{key}\": ", json!(name));
        self.calls.push(match family {
            Family::Llama3 => format!("{} @{part} {}", quoted(&json("parameters")), quoted("}")),
            Family::Hermes => format!("{} @{part} {}", quoted(&format!("\n{}", json("arguments"))), quoted("}\n")),
            Family::Mistral => format!("{} @{part} {}", quoted(&json("arguments")), quoted("}")),
            Family::MistralNamed => format!("{} {} @{part}", quoted(name), self.mark("[ARGS]")),
            Family::Harmony | Family::Glm => {
                let (to, kind) = (quoted(&format!("commentary to=functions.{name} ")), quoted("json"));
                let (channel, constrain, message) =
                    (self.mark("<|channel|>"), self.mark("<|constrain|>"), self.mark("<|message|>"));
                format!("{channel} {to} {constrain} {kind} {message} @{part}")
            }
        });
        self.parts.push((part, Form::Schema(schema)));
    }

    /// GLM's call: each property in its order, those that are not required or not.
    fn add_keys(&mut self, i: usize, name: &str, schema: &Json) {
        let required = |key: &str| schema["required"].as_array().is_some_and(|r| r.iter().any(|k| k == key));
        let mut all = quoted(&format!("{name}\n"));
        for (j, (key, value)) in schema["properties"].as_object().into_iter().flatten().enumerate() {
            let close = "</arg_value>\n";
            let value = match (value["type"] == "string", value["enum"].as_array()) {
                (true, Some(texts)) => {
                    let texts: Vec<String> = texts.iter().filter_map(Json::as_str).map(quoted).collect();
                    format!("({}) {}", texts.join(" | "), quoted(close))
                }
                // A text as it is, up to its end.
                (true, None) => {
                    let rule = format!("text_{}", letters(&[i, j]));
                    self.rules.push_str(&format!("{rule}[suffix={}]: /(?s:.*)/\n", quoted(close)));
                    rule
                }
                (false, _) => {
                    let part = format!("{ARGUMENTS}{i}-{j}");
                    self.parts.push((part.clone(), Form::Schema(with_definitions(value, schema))));
                    format!("@{part} {}", quoted(close))
                }
            };
            let open = quoted(&format!("<arg_key>{key}</arg_key>\n<arg_value>"));
            let optional = if required(key) { "" } else { "?" };
            all.push_str(&format!(" ({open} {value}){optional}"));
        }
        self.calls.push(all);
    }

    /// An answer that consists of calls.
    fn calls(&self, family: Family, one: bool) -> String {
        match family {
            Family::Hermes | Family::Glm if one => "call".into(),
            Family::Hermes | Family::Glm => "call (\"\\n\" call)*".into(),
            Family::Mistral if one => format!("{} \"[\" call \"]\"", self.mark("[TOOL_CALLS]")),
            Family::Mistral => format!("{} \"[\" call (\", \" call)* \"]\"", self.mark("[TOOL_CALLS]")),
            Family::MistralNamed if one => format!("{} call", self.mark("[TOOL_CALLS]")),
            Family::MistralNamed => format!("{open} call ({open} call)*", open = self.mark("[TOOL_CALLS]")),
            Family::Llama3 | Family::Harmony => "call".into(),
        }
    }

    /// An answer in words that may end in calls.
    fn free(&self, family: Family, one: bool) -> String {
        let (open, text) = match family {
            Family::Hermes | Family::Glm => ("<tool_call>", "<tool_call>"),
            Family::Mistral | Family::MistralNamed => ("[TOOL_CALLS]", "\\[TOOL_CALLS\\]"),
            // An answer that begins as a call does is one.
            Family::Llama3 => return "start: call | WORDS?\nWORDS: /[^{<\\s](?s:.*)/\n".into(),
            Family::Harmony => {
                return format!("start: {} WORDS? | call\nWORDS: /(?s:.)+/\n", self.header("final"));
            }
        };
        let mark = self.mark(open);
        let calls = self.calls(family, one);
        if mark.starts_with('<') {
            return format!("start: WORDS? ({calls})?\nWORDS: /(?s:.)+/\n");
        }
        // Words end where the mark comes first, or have none.
        let rest = match family {
            Family::Hermes | Family::Glm => calls.replacen("call", "rest", 1),
            _ => calls.replacen(&mark, "", 1),
        };
        format!("start: WORDS | before {rest}\nbefore[suffix={mark}]: /(?s:.*)/\nWORDS: ~/(?s:.*{text}.*)/\n")
    }

    /// The rules of calls.
    fn shared(&self, family: Family) -> String {
        let each = self.calls.join(" | ");
        match family {
            Family::Hermes | Family::Glm => {
                let (open, close) = (self.mark("<tool_call>"), self.mark("</tool_call>"));
                format!("call: {open} rest\nrest: ({each}) {close}\n")
            }
            _ => format!("call: {each}\n"),
        }
    }
}

/// A property's schema with the definitions that it may refer to.
fn with_definitions(schema: &Json, root: &Json) -> Json {
    let mut schema = schema.clone();
    if let Json::Object(map) = &mut schema {
        for key in ["$defs", "definitions"] {
            if let Some(definitions) = root.get(key) {
                map.entry(key).or_insert_with(|| definitions.clone());
            }
        }
    }
    schema
}

/// Numbers in letters, since names in Lark have no digits.
fn letters(numbers: &[usize]) -> String {
    let digits = numbers.iter().map(usize::to_string).collect::<Vec<_>>().join("_");
    digits.chars().map(|c| c.to_digit(10).map_or(c, |d| char::from(b'a' + d as u8))).collect()
}

//! Grammars of calls of tools, as each family of models writes them.

use serde_json::{Value as Json, json};

use super::error::ApiError;
use super::prompt::{Choice, Conversation};
use super::served::Served;
use super::split::{Family, GEMMA_QUOTE, Tags, Text};
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
    let mut writer = Writer { served, calls: Vec::new(), parts: Vec::new(), rules: String::new(), left: PARTS_MAX };
    for (i, tool) in c.tools.iter().enumerate() {
        let name = tool["function"]["name"].as_str().unwrap_or_default();
        if !matches!(&c.choice, Choice::Named(wanted) if wanted != name) {
            if let Some(keyword) = lost(family, &tool["function"]["parameters"]).filter(|_| strict(tool)) {
                let place = format!("tools[{i}].function.parameters");
                let why = "of a text cannot be followed in the form that this model has for calls";
                return Err(ApiError::unsupported(&place, format!("{place}: {keyword} {why}")));
            }
            writer.add(family, i, name, arguments(served, tool, strict(tool))).map_err(|TooMuch| {
                let place = format!("tools[{i}].function.parameters");
                let message = format!(
                    "{place}: its properties and what they refer to are too much to hold calls to; make it smaller"
                );
                ApiError::unsupported(&place, message)
            })?;
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
    let lark = format!("{text}{}{}", writer.shared(), writer.rules);
    Ok(Some(Form::Made { lark, parts: writer.parts }))
}

/// A keyword of a text that a family that writes texts as they are would not be held to.
fn lost(family: Family, schema: &Json) -> Option<&'static str> {
    const OF_TEXTS: [&str; 5] = ["pattern", "format", "minLength", "maxLength", "const"];
    if !family.writes_texts_bare() {
        return None;
    }
    let texts = schema["properties"].as_object().into_iter().flatten().map(|p| p.1).filter(|p| Text::of(p).is_some());
    texts
        .filter_map(|text| {
            let found = |s: &Json| OF_TEXTS.into_iter().find(|key| s.get(*key).is_some());
            let parts = ["anyOf", "oneOf"].into_iter().filter_map(|key| text[key].as_array()).flatten();
            // Only texts that are a property's own are written out as choices.
            let within = |part: &Json| found(part).or_else(|| part.get("enum").map(|_| "enum"));
            found(text).or_else(|| parts.into_iter().find_map(within))
        })
        .next()
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
    /// Bytes that the schemas of properties may still have.
    left: usize,
}

/// Bytes of the schemas of all properties, each with the definitions that it may refer to.
const PARTS_MAX: usize = 2 << 20;

/// They have more.
struct TooMuch;

impl Writer<'_> {
    fn mark(&self, name: &str) -> String {
        mark(&self.served.opened.tokenizer, name)
    }

    /// A header of gpt-oss, behind `<|start|>assistant`.
    fn header(&self, channel: &str) -> String {
        format!("{} {} {}", self.mark("<|channel|>"), quoted(channel), self.mark("<|message|>"))
    }

    /// Adds tool number `i` as the family writes a call of it.
    fn add(&mut self, family: Family, i: usize, name: &str, schema: Json) -> Result<(), TooMuch> {
        match family {
            Family::Glm => return self.add_keys(i, name, &schema),
            Family::Tagged(tags) => return self.add_tags(tags, i, name, &schema),
            Family::Python | Family::PythonLines | Family::Gemma => return self.add_listed(family, i, name, &schema),
            _ => {}
        }
        let part = format!("{ARGUMENTS}{i}");
        let json = |key: &str| format!("{{\"name\": {}, \"{key}\": ", json!(name));
        self.calls.push(match family {
            Family::Llama3 => format!("{} @{part} {}", quoted(&json("parameters")), quoted("}")),
            Family::Hermes => format!("{} @{part} {}", quoted(&format!("\n{}", json("arguments"))), quoted("}\n")),
            Family::Mistral | Family::Granite | Family::Hunyuan => {
                format!("{} @{part} {}", quoted(&json("arguments")), quoted("}"))
            }
            Family::Cohere => {
                let begin =
                    format!("    {{\"tool_call_id\": \"{i}\", \"tool_name\": {}, \"parameters\": ", json!(name));
                format!("{} @{part} {}", quoted(&begin), quoted("}"))
            }
            Family::MistralNamed => format!("{} {} @{part}", quoted(name), self.mark("[ARGS]")),
            Family::Harmony
            | Family::Glm
            | Family::Tagged(_)
            | Family::Python
            | Family::PythonLines
            | Family::Gemma => {
                let (to, kind) = (quoted(&format!("commentary to=functions.{name} ")), quoted("json"));
                let (channel, constrain, message) =
                    (self.mark("<|channel|>"), self.mark("<|constrain|>"), self.mark("<|message|>"));
                format!("{channel} {to} {constrain} {kind} {message} @{part}")
            }
        });
        self.parts.push((part, Form::Schema(schema)));
        Ok(())
    }

    /// Adds the form of a property.
    fn add_property(&mut self, part: String, schema: &Json, of: &Definitions) -> Result<(), TooMuch> {
        let text = schema.to_string();
        let refers = text.contains("\"$ref\"");
        let bytes = text.len() + if refers { of.bytes } else { 0 };
        self.left = self.left.checked_sub(bytes).ok_or(TooMuch)?;
        let schema = if refers { of.with(schema) } else { schema.clone() };
        self.parts.push((part, Form::Schema(schema)));
        Ok(())
    }

    /// GLM's call.
    fn add_keys(&mut self, i: usize, name: &str, schema: &Json) -> Result<(), TooMuch> {
        let tags = |key: &str| (format!("<arg_key>{key}</arg_key>\n<arg_value>"), "</arg_value>\n");
        let call = format!("{} {}", quoted(&format!("{name}\n")), self.properties(i, schema, tags)?);
        self.calls.push(call);
        Ok(())
    }

    /// A function with its parameters between tags.
    fn add_tags(&mut self, tags: &Tags, i: usize, name: &str, schema: &Json) -> Result<(), TooMuch> {
        let ((open, open_end, close), line) = (tags.parameter, if tags.lines { "\n" } else { "" });
        let end = format!("{line}{close}\n");
        let parameter = |key: &str| (format!("{open}{key}{open_end}{line}"), &end[..]);
        let begin = format!("{}{name}{}\n", tags.function.0, tags.function.1);
        let all = self.properties(i, schema, parameter)?;
        let call = format!("{} {all} {}", quoted(&begin), quoted(&format!("{}\n", tags.function.2)));
        self.calls.push(call);
        Ok(())
    }

    /// Each property in its order, those that are not required or not, between what `tags` says of its name.
    fn properties<'e>(
        &mut self,
        i: usize,
        schema: &Json,
        tags: impl Fn(&str) -> (String, &'e str),
    ) -> Result<String, TooMuch> {
        let required = |key: &str| schema["required"].as_array().is_some_and(|r| r.iter().any(|k| k == key));
        let definitions = Definitions::of(schema);
        let mut all = String::new();
        for (j, (key, value)) in schema["properties"].as_object().into_iter().flatten().enumerate() {
            let (open, close) = tags(key);
            let value = match (Text::of(value), value["enum"].as_array()) {
                (Some(_), Some(texts)) => {
                    let text = |t: &Json| t.as_str().map_or_else(|| quoted(&t.to_string()), quoted);
                    let texts: Vec<String> = texts.iter().map(text).collect();
                    format!("({}) {}", texts.join(" | "), quoted(close))
                }
                // A text as it is, up to its end.
                (Some(_), None) => {
                    let rule = format!("text_{}", letters(&[i, j]));
                    self.rules.push_str(&format!("{rule}[suffix={}]: /(?s:.*)/\n", quoted(close)));
                    rule
                }
                (None, _) => {
                    let part = format!("{ARGUMENTS}{i}-{j}");
                    self.add_property(part.clone(), value, &definitions)?;
                    format!("@{part} {}", quoted(close))
                }
            };
            let optional = if required(key) { "" } else { "?" };
            all.push_str(&format!(" ({} {value}){optional}", quoted(&open)));
        }
        Ok(all)
    }

    /// A call as Python or Gemma 4 writes it, with values as JSON, but texts between Gemma's quotes: each property in its order,
    /// those that are not required or not.
    fn add_listed(&mut self, family: Family, i: usize, name: &str, schema: &Json) -> Result<(), TooMuch> {
        let gemma = family == Family::Gemma;
        let (begin, is, comma, end) =
            if gemma { (format!("call:{name}{{"), ":", ",", "}") } else { (format!("{name}("), "=", ", ", ")") };
        let definitions = Definitions::of(schema);
        let required = |key: &str| schema["required"].as_array().is_some_and(|r| r.iter().any(|k| k == key));
        let properties: Vec<(&String, &Json)> = schema["properties"].as_object().into_iter().flatten().collect();
        // What may come behind property number j - 1: rule `first` where nothing came yet, `more` behind a comma.
        let rule = |kind: &str, j: usize| format!("{kind}_{}", letters(&[i, j]));
        for (j, (key, value)) in properties.iter().enumerate() {
            let quote = quoted(GEMMA_QUOTE);
            let form = match (Text::of(value).filter(|_| gemma), value["enum"].as_array()) {
                (Some(_), Some(texts)) => {
                    let text = |t: &Json| t.as_str().map_or_else(|| quoted(&t.to_string()), quoted);
                    let texts: Vec<String> = texts.iter().map(text).collect();
                    format!("{quote} ({}) {quote}", texts.join(" | "))
                }
                (Some(_), None) => {
                    let text = rule("text", j);
                    self.rules.push_str(&format!("{text}[suffix={quote}]: /(?s:.*)/\n"));
                    format!("{quote} {text}")
                }
                (None, _) => {
                    let part = format!("{ARGUMENTS}{i}-{j}");
                    self.add_property(part.clone(), value, &definitions)?;
                    format!("@{part}")
                }
            };
            let next = (rule("first", j + 1), rule("more", j + 1));
            let this = format!("{} {form} {}", quoted(&format!("{key}{is}")), next.1);
            let (first, more) = match required(key) {
                true => (String::new(), String::new()),
                false => (format!(" | {}", next.0), format!(" | {}", next.1)),
            };
            self.rules.push_str(&format!("{}: {this}{first}\n", rule("first", j)));
            self.rules.push_str(&format!("{}: {} {this}{more}\n", rule("more", j), quoted(comma)));
        }
        let n = properties.len();
        self.rules.push_str(&format!("{}: \"\"\n{}: \"\"\n", rule("first", n), rule("more", n)));
        let call = format!("{} {} {}", quoted(&begin), rule("first", 0), quoted(end));
        self.calls.push(call);
        Ok(())
    }

    /// An answer that consists of calls.
    fn calls(&self, family: Family, one: bool) -> String {
        let open = family.marks().map_or_else(String::new, |(open, _)| self.mark(open));
        let close = family.marks().and_then(|m| m.1).map_or_else(String::new, |close| self.mark(close));
        // Those that stand between one pair of marks, or within one list.
        let list = |begin: &str, between: &str, end: &str| {
            let more = if one { String::new() } else { format!("({} call)*", quoted(between)) };
            format!("{open} {} call {more} {} {close}", quoted(begin), quoted(end))
        };
        match family {
            Family::Mistral | Family::Granite | Family::Hunyuan | Family::Python => list("[", ", ", "]"),
            Family::PythonLines => list("", "\n", ""),
            Family::Cohere => list("[\n", ",\n", "\n]"),
            Family::Tagged(tags) if tags.several => list("\n", "", ""),
            Family::MistralNamed if one => format!("{open} call"),
            Family::MistralNamed => format!("{open} call ({open} call)*"),
            Family::Hermes | Family::Glm | Family::Tagged(_) => {
                let line = if matches!(family, Family::Tagged(_)) { "\"\\n\"" } else { "" };
                let more = if one { String::new() } else { format!("(\"\\n\" {open} {line} call {close})*") };
                format!("{open} {line} call {close} {more}")
            }
            Family::Gemma if one => format!("{open} call {close}"),
            Family::Gemma => format!("{open} call {close} ({open} call {close})*"),
            Family::Llama3 | Family::Harmony => "call".into(),
        }
    }

    /// An answer in words that may end in calls.
    fn free(&self, family: Family, one: bool) -> String {
        let Some((open, _)) = family.marks() else {
            return match family {
                Family::Harmony => format!("start: {} WORDS? | call\nWORDS: /(?s:.)+/\n", self.header("final")),
                // An answer that begins as a call does is one.
                _ => "start: call | WORDS?\nWORDS: /[^{<\\s](?s:.*)/\n".into(),
            };
        };
        let mark = self.mark(open);
        let calls = self.calls(family, one);
        if mark.starts_with('<') {
            return format!("start: WORDS? ({calls})?\nWORDS: /(?s:.)+/\n");
        }
        // Words end where the mark comes first, or have none.
        let rest = calls.replacen(&mark, "", 1);
        let text = escaped(open);
        format!("start: WORDS | before {rest}\nbefore[suffix={mark}]: /(?s:.*)/\nWORDS: ~/(?s:.*{text}.*)/\n")
    }

    /// The rule of a call.
    fn shared(&self) -> String {
        format!("call: {}\n", self.calls.join(" | "))
    }
}

/// A text as an expression that matches it.
fn escaped(text: &str) -> String {
    text.chars().flat_map(|c| "\\.+*?()|[]{}^$/".contains(c).then_some('\\').into_iter().chain([c])).collect()
}

/// The definitions that properties may refer to.
struct Definitions<'a> {
    all: Vec<(&'static str, &'a Json)>,
    bytes: usize,
}

impl<'a> Definitions<'a> {
    fn of(root: &'a Json) -> Definitions<'a> {
        let all: Vec<_> = ["$defs", "definitions"].into_iter().filter_map(|key| Some((key, root.get(key)?))).collect();
        let bytes = all.iter().map(|(_, found)| found.to_string().len()).sum();
        Definitions { all, bytes }
    }

    /// A property's schema with them.
    fn with(&self, schema: &Json) -> Json {
        let mut schema = schema.clone();
        if let Json::Object(map) = &mut schema {
            for (key, found) in &self.all {
                map.entry(*key).or_insert_with(|| (*found).clone());
            }
        }
        schema
    }
}

/// Numbers in letters, since names in Lark have no digits.
fn letters(numbers: &[usize]) -> String {
    let digits = numbers.iter().map(usize::to_string).collect::<Vec<_>>().join("_");
    digits.chars().map(|c| c.to_digit(10).map_or(c, |d| char::from(b'a' + d as u8))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_bare_texts_are_not_held_to_is_named() {
        let schema = |text: Json| json!({ "properties": { "n": { "type": "integer", "format": "x" }, "t": text } });
        for (text, keyword) in [
            (json!({ "type": "string" }), None),
            (json!({ "type": "string", "enum": ["a"] }), None),
            (json!({ "anyOf": [{ "type": "string" }, { "type": "null" }] }), None),
            (json!({ "type": ["string", "null"], "maxLength": 3 }), Some("maxLength")),
            (json!({ "anyOf": [{ "type": "string", "enum": ["a"] }, { "type": "null" }] }), Some("enum")),
            (json!({ "oneOf": [{ "type": "string", "pattern": "a" }] }), Some("pattern")),
        ] {
            assert_eq!(lost(Family::Glm, &schema(text.clone())), keyword, "{text}");
            assert_eq!(lost(Family::Hermes, &schema(text)), None);
        }
    }
}

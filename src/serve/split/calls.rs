//! Calls of tools as each family of models writes them: read from whole texts, and written for templates that print none.

use serde_json::{Map, Value as Json};

use super::family::{ARG_KEY, Tags};
use super::{Call, Family, Tool, gemma, python};

const ARGS: &str = "[ARGS]";
const CALL_ID: &str = "[CALL_ID]";

/// The calls in a text that consists of nothing else, to tools that there are.
pub fn read(family: Family, text: &str, tools: &[Tool]) -> Option<Vec<Call>> {
    match family {
        Family::Hermes => objects(text, "arguments", tools),
        Family::Llama3 => objects(text, "parameters", tools),
        Family::Mistral | Family::MistralNamed => match text.trim_start() {
            list if list.starts_with('[') && !list.starts_with(ARGS) => array(list, "name", tools),
            named => self::named(named, tools).map(|call| vec![call]),
        },
        Family::Granite | Family::Hunyuan => array(text, "name", tools),
        Family::Cohere => array(text, "tool_name", tools),
        Family::Glm => keys(text, tools).map(|call| vec![call]),
        Family::Tagged(tags) => tagged(text, tags, tools),
        Family::Python | Family::PythonLines => python(text, tools),
        Family::Gemma => gemma::call(text, tools).map(|call| vec![call]),
        // Its channels say what a call is.
        Family::Harmony => None,
    }
}

/// Calls as OpenAI has them in a message, as the model writes them; `None` for families whose templates print calls.
pub fn written(family: Family, calls: &[Json]) -> Option<String> {
    let one = |call: &Json| {
        let (name, given) = (&call["function"]["name"], &call["function"]["arguments"]);
        let arguments = match given.as_str() {
            Some(text) => serde_json::from_str(text).unwrap_or_default(),
            None => given.clone(),
        };
        let object = arguments.as_object().cloned().unwrap_or_default();
        match family {
            Family::Python => {
                let each = object.iter().map(|(key, value)| format!("{key}={}", python::written(value)));
                format!("{}({})", name.as_str().unwrap_or_default(), each.collect::<Vec<_>>().join(", "))
            }
            _ => format!("{{\"name\": {name}, \"arguments\": {}}}", Json::Object(object)),
        }
    };
    if family == Family::Hermes {
        // SmolLM3: one between tags each.
        return Some(calls.iter().map(|call| format!("<tool_call>\n{}\n</tool_call>", one(call))).collect());
    }
    let (Family::Python | Family::Granite) = family else { return None };
    let (open, close) = family.marks()?;
    Some(format!("{open}[{}]{}", calls.iter().map(one).collect::<Vec<_>>().join(", "), close.unwrap_or("")))
}

pub(super) fn known<'t>(name: &str, tools: &'t [Tool]) -> Option<&'t Tool> {
    tools.iter().find(|t| t.name == name)
}

/// JSON objects, one after the other.
fn objects(text: &str, key: &str, tools: &[Tool]) -> Option<Vec<Call>> {
    let mut found = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_whitespace() || c == ';');
        if rest.is_empty() {
            return (!found.is_empty()).then_some(found);
        }
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Json>();
        let value = values.next()?.ok()?;
        rest = &rest[values.byte_offset()..];
        found.push(object(&value, "name", key, tools)?);
    }
}

fn object(value: &Json, name: &str, key: &str, tools: &[Tool]) -> Option<Call> {
    let name = value[name].as_str()?;
    known(name, tools)?;
    let given = value.get(key).or_else(|| value.get("arguments")).or_else(|| value.get("parameters"));
    Some(Call { name: name.to_owned(), arguments: arguments(given.unwrap_or(&Json::Null))? })
}

/// The JSON of a call's arguments: those of an object, which some models write as a text; nothing is an empty one.
pub fn arguments(given: &Json) -> Option<String> {
    match given {
        Json::Null => Some("{}".to_owned()),
        Json::String(text) if text.trim().is_empty() => Some("{}".to_owned()),
        Json::String(text) => serde_json::from_str::<Json>(text).ok().filter(Json::is_object).map(|v| v.to_string()),
        Json::Object(_) => Some(given.to_string()),
        _ => None,
    }
}

/// A list of objects, which have their names under this key.
fn array(text: &str, name: &str, tools: &[Tool]) -> Option<Vec<Call>> {
    let Ok(Json::Array(items)) = serde_json::from_str(text) else { return None };
    let found = items.iter().map(|item| object(item, name, "arguments", tools)).collect::<Option<Vec<_>>>()?;
    (!found.is_empty()).then_some(found)
}

/// Mistral's newer form: a name, perhaps an id, and the arguments.
fn named(text: &str, tools: &[Tool]) -> Option<Call> {
    let (head, arguments) = match text.split_once(ARGS) {
        Some(parts) => parts,
        None => text.split_at(text.find('{')?),
    };
    let name = head.split_once(CALL_ID).map_or(head, |(name, _)| name).trim();
    known(name, tools)?;
    Some(Call { name: name.to_owned(), arguments: self::arguments(&Json::from(arguments))? })
}

/// GLM's form: a name, then keys and values between tags.
fn keys(text: &str, tools: &[Tool]) -> Option<Call> {
    let (name, mut rest) = text.split_at(text.find(ARG_KEY).unwrap_or(text.len()));
    let tool = known(name.trim(), tools)?;
    let mut arguments = Map::new();
    loop {
        rest = rest.trim_start();
        if rest.is_empty() {
            return Some(call(tool, arguments));
        }
        let (key, after) = rest.strip_prefix(ARG_KEY)?.split_once("</arg_key>")?;
        let (value, after) = after.trim_start().strip_prefix("<arg_value>")?.split_once("</arg_value>")?;
        let key = key.trim();
        arguments.insert(key.to_owned(), tool.value(key, value));
        rest = after;
    }
}

pub(super) fn call(tool: &Tool, arguments: Map<String, Json>) -> Call {
    Call { name: tool.name.clone(), arguments: Json::Object(arguments).to_string() }
}

/// Functions with parameters between tags.
fn tagged(text: &str, tags: &Tags, tools: &[Tool]) -> Option<Vec<Call>> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (name, after) = rest.strip_prefix(tags.function.0)?.split_once(tags.function.1)?;
        let tool = known(name.trim(), tools)?;
        let mut arguments = Map::new();
        rest = after.trim_start();
        while let Some(after) = rest.strip_prefix(tags.parameter.0) {
            let (key, after) = after.split_once(tags.parameter.1)?;
            let (value, after) = after.split_once(tags.parameter.2)?;
            let key = key.trim();
            let value = if tags.lines { line(value) } else { value };
            arguments.insert(key.to_owned(), tool.value(key, value));
            rest = after.trim_start();
        }
        rest = rest.strip_prefix(tags.function.2)?.trim_start();
        found.push(call(tool, arguments));
    }
    (!found.is_empty()).then_some(found)
}

/// A value without the ends of lines around it.
fn line(value: &str) -> &str {
    let value = value.strip_prefix('\n').unwrap_or(value);
    value.strip_suffix('\n').unwrap_or(value)
}

fn python(text: &str, tools: &[Tool]) -> Option<Vec<Call>> {
    let calls = python::calls(text)?;
    calls.into_iter().map(|(name, arguments)| known(&name, tools).map(|tool| call(tool, arguments))).collect()
}

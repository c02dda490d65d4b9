//! Calls of tools as each family of models writes them, read from whole texts.

use serde_json::{Map, Value as Json};

use super::{ARG_KEY, Call, Family, Tool};

const ARGS: &str = "[ARGS]";
const CALL_ID: &str = "[CALL_ID]";

/// The calls in a text that consists of nothing else, to tools that there are.
pub fn read(family: Family, text: &str, tools: &[Tool]) -> Option<Vec<Call>> {
    match family {
        Family::Hermes => objects(text, "arguments", tools),
        Family::Llama3 => objects(text, "parameters", tools),
        Family::Mistral | Family::MistralNamed => match text.trim_start() {
            list if list.starts_with('[') && !list.starts_with(ARGS) => array(list, tools),
            named => self::named(named, tools).map(|call| vec![call]),
        },
        Family::Glm => keys(text, tools).map(|call| vec![call]),
        // Its channels say what a call is.
        Family::Harmony => None,
    }
}

fn known<'t>(name: &str, tools: &'t [Tool]) -> Option<&'t Tool> {
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
        found.push(object(&value, key, tools)?);
    }
}

fn object(value: &Json, key: &str, tools: &[Tool]) -> Option<Call> {
    let name = value["name"].as_str()?;
    known(name, tools)?;
    let arguments = match value.get(key).or_else(|| value.get("arguments")).or_else(|| value.get("parameters")) {
        None => "{}".to_owned(),
        Some(Json::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    Some(Call { name: name.to_owned(), arguments })
}

/// Mistral's older form: a list of objects.
fn array(text: &str, tools: &[Tool]) -> Option<Vec<Call>> {
    let Ok(Json::Array(items)) = serde_json::from_str(text) else { return None };
    let found = items.iter().map(|item| object(item, "arguments", tools)).collect::<Option<Vec<_>>>()?;
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
    let arguments = match arguments.trim() {
        "" => "{}".to_owned(),
        json => serde_json::from_str::<Json>(json).ok()?.to_string(),
    };
    Some(Call { name: name.to_owned(), arguments })
}

/// GLM's form: a name, then keys and values between tags. A value is JSON, or a text where the tool has one.
fn keys(text: &str, tools: &[Tool]) -> Option<Call> {
    let (name, mut rest) = text.split_at(text.find(ARG_KEY).unwrap_or(text.len()));
    let tool = known(name.trim(), tools)?;
    let mut arguments = Map::new();
    loop {
        rest = rest.trim_start();
        if rest.is_empty() {
            return Some(Call { name: tool.name.clone(), arguments: Json::Object(arguments).to_string() });
        }
        let (key, after) = rest.strip_prefix(ARG_KEY)?.split_once("</arg_key>")?;
        let (value, after) = after.trim_start().strip_prefix("<arg_value>")?.split_once("</arg_value>")?;
        let key = key.trim();
        let as_text = || Json::from(value);
        let value = match tool.texts.iter().any(|t| t == key) {
            true => as_text(),
            false => serde_json::from_str(value.trim()).unwrap_or_else(|_| as_text()),
        };
        arguments.insert(key.to_owned(), value);
        rest = after;
    }
}

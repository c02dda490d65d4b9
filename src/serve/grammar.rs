//! What form an answer is to have: `response_format` and its siblings, and calls that must come.

use serde_json::{Value as Json, json};

use super::calls;
use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::prompt::{Choice, Conversation};
use super::served::Served;
use crate::engine::{ConstraintError, Form, Grammar, Reasoning, SamplerParams};

/// What a request says of the form of its answer, and the field that does.
#[derive(Clone, Debug, Default)]
pub struct Wanted(Option<(String, Form)>);

impl Wanted {
    /// This, or else the other.
    pub fn or(self, other: Wanted) -> Wanted {
        Wanted(self.0.or(other.0))
    }

    fn set(&mut self, field: String, form: Form) -> Result<(), ApiError> {
        if let Some((other, _)) = &self.0 {
            return Err(ApiError::field(&field, format!("{field}: {other} says already what the answer is to be")));
        }
        self.0 = Some((field, form));
        Ok(())
    }
}

/// The form under the names of OpenAI, llama-server and vLLM.
///
/// # Errors
/// For what is no form, and for two of them.
pub fn wanted(f: &mut Fields) -> Result<Wanted, ApiError> {
    let mut wanted = Wanted::default();
    if let Some(format) = f.object("response_format")? {
        let name = f.name("response_format");
        if let Some(form) = response_format(format, &name)? {
            wanted.set(name, form)?;
        }
    }
    for field in ["json_schema", "guided_json"] {
        if let Some(schema) = f.any(field).filter(|v| *v != "") {
            wanted.set(f.name(field), schema_form(schema, &f.name(field))?)?;
        }
    }
    for field in ["grammar", "guided_grammar"] {
        if let Some(text) = f.text(field)?.filter(|t| !t.is_empty()) {
            wanted.set(f.name(field), Form::Grammar(text))?;
        }
    }
    if let Some(text) = f.text("guided_regex")?.filter(|t| !t.is_empty()) {
        wanted.set(f.name("guided_regex"), Form::Regex(text))?;
    }
    if let Some(choices) = f.list("guided_choice")? {
        wanted.set(f.name("guided_choice"), one_of(choices, &f.name("guided_choice"))?)?;
    }
    if let Some(mut outputs) = f.object("structured_outputs")? {
        if let Some(schema) = outputs.any("json") {
            wanted.set(outputs.name("json"), schema_form(schema, &outputs.name("json"))?)?;
        }
        if let Some(text) = outputs.text("regex")? {
            wanted.set(outputs.name("regex"), Form::Regex(text))?;
        }
        if let Some(text) = outputs.text("grammar")? {
            wanted.set(outputs.name("grammar"), Form::Grammar(text))?;
        }
        if let Some(choices) = outputs.list("choice")? {
            wanted.set(outputs.name("choice"), one_of(choices, &outputs.name("choice"))?)?;
        }
        if outputs.flag("json_object")? == Some(true) {
            wanted.set(outputs.name("json_object"), object())?;
        }
        outputs.finish()?;
    }
    Ok(wanted)
}

/// `text.format` of OpenAI's responses, where a schema lies flat.
///
/// # Errors
/// As [`wanted`].
pub fn wanted_text(text: &mut Fields) -> Result<Wanted, ApiError> {
    let name = text.name("format");
    let Some(mut format) = text.object("format")? else { return Ok(Wanted::default()) };
    let form = match format.text("type")?.as_deref() {
        Some("json_schema") => {
            let form = named_schema(&mut format)?;
            format.finish()?;
            Some(form)
        }
        Some(kind) => response_format(Fields::of(json!({ "type": kind }), &name)?, &name)?,
        None => None,
    };
    Ok(Wanted(form.map(|form| (name, form))))
}

/// Ollama's `format`: `json`, or a schema.
///
/// # Errors
/// As [`wanted`].
pub fn wanted_format(f: &mut Fields) -> Result<Wanted, ApiError> {
    let name = f.name("format");
    let form = match f.any("format") {
        None => None,
        Some(Json::String(text)) if text.is_empty() => None,
        Some(Json::String(text)) if text == "json" => Some(object()),
        Some(schema @ Json::Object(_)) => Some(Form::Schema(schema)),
        Some(other) => return Err(wrong(&name, "json or a JSON schema", &other)),
    };
    Ok(Wanted(form.map(|form| (name, form))))
}

/// Anthropic's `output_format`, or the `format` of `output_config`: a schema.
///
/// # Errors
/// As [`wanted`].
pub fn wanted_output(f: &mut Fields, field: &str) -> Result<Wanted, ApiError> {
    let name = f.name(field);
    let Some(mut format) = f.object(field)? else { return Ok(Wanted::default()) };
    let kind = format.any("type").unwrap_or_default();
    if kind != "json_schema" {
        return Err(wrong(&format.name("type"), "json_schema", &kind));
    }
    let form = named_schema(&mut format)?;
    format.finish()?;
    Ok(Wanted(Some((name, form))))
}

fn object() -> Form {
    Form::Schema(json!({ "type": "object" }))
}

/// OpenAI's form; llama-server's has the schema beside the type.
fn response_format(mut format: Fields, name: &str) -> Result<Option<Form>, ApiError> {
    let kind = format.any("type").unwrap_or_default();
    let form = match kind.as_str() {
        Some("text") => None,
        Some("json_object") => Some(match format.any("schema") {
            Some(schema) => schema_form(schema, &format.name("schema"))?,
            None => object(),
        }),
        Some("json_schema") => Some(match format.object("json_schema")? {
            Some(mut inner) => {
                let form = named_schema(&mut inner)?;
                inner.finish()?;
                form
            }
            None => named_schema(&mut format)?,
        }),
        _ => return Err(wrong(&format!("{name}.type"), "text, json_object or json_schema", &kind)),
    };
    format.finish()?;
    Ok(form)
}

/// A schema with its name, which says nothing of the text. Whether it is strict makes no difference: what an answer
/// cannot be held to is refused either way.
fn named_schema(f: &mut Fields) -> Result<Form, ApiError> {
    f.ignore(&["name", "description"]);
    f.flag("strict")?;
    match f.any("schema") {
        Some(schema) => schema_form(schema, &f.name("schema")),
        None => Err(wrong(&f.name("schema"), "a JSON schema", &Json::Null)),
    }
}

fn schema_form(schema: Json, name: &str) -> Result<Form, ApiError> {
    match schema {
        Json::Object(_) | Json::Bool(_) => Ok(Form::Schema(schema)),
        // vLLM takes its text too.
        Json::String(text) => match serde_json::from_str(&text) {
            Ok(schema @ Json::Object(_)) => Ok(Form::Schema(schema)),
            _ => Err(wrong(name, "a JSON schema", &Json::String(text))),
        },
        other => Err(wrong(name, "a JSON schema", &other)),
    }
}

/// One of several texts.
fn one_of(choices: Vec<Json>, name: &str) -> Result<Form, ApiError> {
    let text = |choice: &Json| match choice {
        Json::String(text) if !text.is_empty() => Ok(crate::engine::constraint::quoted(text)),
        other => Err(wrong(name, "a list of texts", other)),
    };
    let all = choices.iter().map(text).collect::<Result<Vec<_>, _>>()?;
    match all.is_empty() {
        true => Err(ApiError::field(name, format!("{name}: at least one text was expected"))),
        false => Ok(Form::Made { lark: format!("start: CHOICE\nCHOICE: {}\n", all.join(" | ")), parts: Vec::new() }),
    }
}

/// Holds answers to what a request wants of them: the form of its words, and calls that must come or have a schema.
/// `prompt` is the conversation as the model sees it; without one a text is continued.
///
/// # Errors
/// For a form that cannot be followed, with the field that has it.
pub fn hold(
    served: &Served,
    params: &mut SamplerParams,
    wanted: Wanted,
    conversation: Option<(&Conversation, bool)>,
    prompt: &str,
) -> Result<(), ApiError> {
    let (field, form) = wanted.0.map_or((None, None), |(field, form)| (Some(field), Some(form)));
    let calls = match conversation {
        Some((c, one_call)) => calls::form(served, c, one_call, form.as_ref())?,
        None => None,
    };
    let conversation = conversation.map(|c| c.0);
    let own_header = calls.is_some();
    let (form, field) = match (calls, form) {
        (Some(form), _) => (form, calls_field(conversation, field)),
        (None, Some(form)) => (form, field.unwrap_or_default()),
        (None, None) => return Ok(()),
    };
    if params.ignore_eos {
        let message = format!("ignore_eos: what {field} says of the answer ends by a token that it forbids");
        return Err(ApiError::field("ignore_eos", message));
    }
    if params.min_tokens > 0 {
        let message = format!("min_tokens: what {field} says of the answer may end before so many tokens");
        return Err(ApiError::field("min_tokens", message));
    }
    let reasoning = match conversation.map(|c| c.reasoning(served, prompt)) {
        // A call's message has another header than an answer's.
        Some(Reasoning::Channels { .. }) => Reasoning::Channels { header: own_header },
        Some(other) => other,
        None => Reasoning::None,
    };
    let compiled = compile(served, &form, reasoning);
    params.grammar = Some(compiled.map_err(|e| at_fault(served, &form, e, &field))?);
    Ok(())
}

fn calls_field(conversation: Option<&Conversation>, field: Option<String>) -> String {
    match conversation.map(|c| &c.choice) {
        Some(Choice::Auto) | None => field.unwrap_or_else(|| "tools".to_owned()),
        Some(_) => "tool_choice".to_owned(),
    }
}

fn compile(served: &Served, form: &Form, reasoning: Reasoning) -> Result<Grammar, ConstraintError> {
    served.grammars()?.compile(form, reasoning)
}

/// The error for a form, by the part that is at fault.
fn at_fault(served: &Served, form: &Form, e: ConstraintError, field: &str) -> ApiError {
    let mut field = field.to_owned();
    let mut why = e;
    if let Form::Made { parts, .. } = form {
        for (name, part) in parts {
            if let Err(e) = compile(served, part, Reasoning::None) {
                field = calls::place(name).unwrap_or(field);
                why = e;
                break;
            }
        }
    }
    let message = format!("{field}: {why}");
    match why {
        ConstraintError::Exhausted { .. } => ApiError::unavailable(message),
        _ => ApiError::unsupported(&field, message),
    }
}

//! `nt template`: what the model's chat template makes of messages.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value as Json;

use super::args::OverrideArgs;
use super::{Failure, ModelArg, codes, report, text};
use crate::gguf::{Gguf, Metadata};
use crate::tokenizer::{ChatTemplate, Tokenizer, TokenizerError};

/// Arguments of `nt template`.
#[derive(Debug, Args)]
pub struct TemplateArgs {
    #[command(flatten)]
    pub(super) model: ModelArg,
    /// JSON: a list of messages with `role` and `content`; - is stdin.
    #[arg(long, value_name = "M.json")]
    messages: PathBuf,
    /// JSON: a list of tools (schemas of functions) that the model may call (default: none). A template that the file has
    /// for them (tool_use) is taken then.
    #[arg(long, value_name = "T.json")]
    tools: Option<PathBuf>,
    /// Leave out the opening of the assistant's turn.
    #[arg(long)]
    no_generation_prompt: bool,
    #[command(flatten)]
    overrides: OverrideArgs,
    #[command(flatten)]
    template: TemplateOptions,
}

/// Which chat template, and what it is told in addition to the conversation.
#[derive(Clone, Debug, Args)]
pub struct TemplateOptions {
    /// Chat template instead of the model's own: one of its others by name (as tool_use), a built-in one (chatml, llama2,
    /// llama3, mistral-v7, gemma, phi3, zephyr, deepseek3, command-r, …; an unknown name lists all), or a file of Jinja.
    #[arg(long, alias = "chat-template-file", value_name = "FILE|NAME")]
    chat_template: Option<String>,
    /// Set a variable of the chat template (repeat for more), as enable_thinking=false or reasoning_effort=low. VALUE is
    /// JSON (or Python's True, False, None), or else a text.
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    template_var: Vec<(String, Json)>,
}

impl TemplateOptions {
    /// Whether any was given.
    pub fn any(&self) -> bool {
        self.chat_template.is_some() || !self.template_var.is_empty()
    }

    /// The template with its variables; says on stderr what had to be assumed.
    pub(super) fn open(&self, metadata: &Metadata, tokenizer: &Tokenizer) -> Result<ChatTemplate, Failure> {
        let template = match self.chat_template.as_deref() {
            None => ChatTemplate::from_metadata(metadata, tokenizer),
            Some("default") => ChatTemplate::from_metadata(metadata, tokenizer),
            Some(given) => match ChatTemplate::from_name(metadata, tokenizer, given) {
                Err(TokenizerError::UnknownTemplate { .. }) if Path::new(given).exists() => {
                    let source = text::read_text(Path::new(given))?;
                    ChatTemplate::for_model(&source, tokenizer)
                }
                other => other,
            },
        };
        let mut template = template.map_err(codes::template_failure)?;
        for (name, value) in &self.template_var {
            template.set_variable(name, value.clone()).map_err(codes::template_failure)?;
        }
        template.notes().iter().for_each(|note| tracing::warn!("{note}"));
        Ok(template)
    }
}

/// `NAME=VALUE`: the value as JSON if it is that, else as a text.
fn variable(text: &str) -> Result<(String, Json), String> {
    let (name, value) = text.split_once('=').ok_or("NAME=VALUE was expected")?;
    let is_name = |n: &str| {
        n.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') && !n.starts_with(|c: char| c.is_ascii_digit())
    };
    if name.is_empty() || !is_name(name) {
        return Err(format!("{name:?} is no name of a variable"));
    }
    let value = match value {
        "True" => Json::Bool(true),
        "False" => Json::Bool(false),
        "None" => Json::Null,
        other => serde_json::from_str(other).unwrap_or_else(|_| Json::from(other)),
    };
    Ok((name.to_owned(), value))
}

/// Prints the rendered prompt.
pub fn run(args: &TemplateArgs) -> Result<(), Failure> {
    let mut gguf = Gguf::open(args.model.path()).map_err(Failure::usage)?;
    args.overrides.apply(&mut gguf.metadata)?;
    let tokenizer = Tokenizer::from_metadata(&gguf.metadata).map_err(Failure::usage)?;
    let template = args.template.open(&gguf.metadata, &tokenizer)?;
    let messages = list(&args.messages, "messages")?;
    let file = args.messages.display();
    if let Some(i) = messages.iter().position(|m| !m["role"].is_string()) {
        return Err(Failure::usage(format!("{file}: message {} is no object with a role", i + 1)));
    }
    if let Some((i, kind)) = messages.iter().enumerate().find_map(|(i, m)| Some((i, other_part(&m["content"])?))) {
        let what = format!("{file}: message {} has a part of type {kind}; nt reads texts only", i + 1);
        return Err(Failure::usage(what));
    }
    let tools = args.tools.as_deref().map(|path| list(path, "tools")).transpose()?;
    let prompt = template.prompt(&messages, tools.as_deref(), !args.no_generation_prompt);
    let prompt = prompt.map_err(codes::template_failure)?;
    prompt.notes.iter().for_each(|note| tracing::warn!("{note}"));
    if tools.is_some_and(|tools| !tools.is_empty()) {
        let without = template.prompt(&messages, None, !args.no_generation_prompt);
        if without.is_ok_and(|without| without.text == prompt.text) {
            tracing::warn!("the chat template leaves out the tools; --chat-template names another template");
        }
    }
    report::print_text(&prompt.text)
}

/// The type of the first part of a content that is an image or a sound.
fn other_part(content: &Json) -> Option<String> {
    let types = content.as_array()?.iter().filter_map(|part| part["type"].as_str());
    let mut others = types.filter(|ty| ["image", "audio", "video"].iter().any(|other| ty.contains(other)));
    others.next().map(str::to_owned)
}

/// The JSON list in a file.
fn list(path: &Path, of: &str) -> Result<Vec<Json>, Failure> {
    let file = path.display();
    match serde_json::from_str(&text::read_text(path)?) {
        Ok(Json::Array(items)) => Ok(items),
        Ok(_) => Err(Failure::usage(format!("{file}: a JSON list of {of} was expected"))),
        Err(e) => Err(Failure::usage(format!("{file} is not JSON: {e}"))),
    }
}

//! `nt template`: what the model's chat template makes of messages.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value as Json;

use super::args::OverrideArgs;
use super::{Failure, ModelArg, report};
use crate::gguf::Gguf;
use crate::tokenizer::{ChatTemplate, Tokenizer};

/// Arguments of `nt template`.
#[derive(Debug, Args)]
pub struct TemplateArgs {
    #[command(flatten)]
    pub(super) model: ModelArg,
    /// JSON: a list of messages with `role` and `content`; - is stdin.
    #[arg(long, value_name = "M.json")]
    messages: PathBuf,
    /// JSON: a list of tools (schemas of functions) that the model may call (default: none).
    #[arg(long, value_name = "T.json")]
    tools: Option<PathBuf>,
    /// Leave out the opening of the assistant's turn.
    #[arg(long)]
    no_generation_prompt: bool,
    #[command(flatten)]
    overrides: OverrideArgs,
}

/// Prints the rendered prompt.
pub fn run(args: &TemplateArgs) -> Result<(), Failure> {
    let mut gguf = Gguf::open(args.model.path()).map_err(Failure::usage)?;
    args.overrides.apply(&mut gguf.metadata)?;
    let tokenizer = Tokenizer::from_metadata(&gguf.metadata).map_err(Failure::usage)?;
    let template = ChatTemplate::from_metadata(&gguf.metadata, &tokenizer).map_err(Failure::usage)?;
    let messages = list(&args.messages, "messages")?;
    let tools = args.tools.as_deref().map(|path| list(path, "tools")).transpose()?;
    let prompt = template.render_with_tools(&messages, tools.as_deref(), !args.no_generation_prompt);
    report::print_text(&prompt.map_err(Failure::usage)?)
}

/// The JSON list in a file.
fn list(path: &Path, of: &str) -> Result<Vec<Json>, Failure> {
    let file = path.display();
    match serde_json::from_str(&super::run::read_text(path)?) {
        Ok(Json::Array(items)) => Ok(items),
        Ok(_) => Err(Failure::usage(format!("{file}: a JSON list of {of} was expected"))),
        Err(e) => Err(Failure::usage(format!("{file} is not JSON: {e}"))),
    }
}

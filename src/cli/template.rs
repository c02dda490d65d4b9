//! `nt template`: what the model's chat template makes of messages.

use std::path::PathBuf;

use clap::Args;
use serde_json::Value as Json;

use super::{Failure, ModelArg, report};
use crate::gguf::Gguf;
use crate::tokenizer::{ChatTemplate, Tokenizer};

/// Arguments of `nt template`.
#[derive(Debug, Args)]
pub struct TemplateArgs {
    #[command(flatten)]
    model: ModelArg,
    /// JSON: a list of messages with `role` and `content`; - is stdin.
    #[arg(long, value_name = "M.json")]
    messages: PathBuf,
    /// Leave out the opening of the assistant's turn.
    #[arg(long)]
    no_generation_prompt: bool,
}

/// Prints the rendered prompt.
pub fn run(args: &TemplateArgs) -> Result<(), Failure> {
    let gguf = Gguf::open(args.model.path()).map_err(Failure::usage)?;
    let tokenizer = Tokenizer::from_metadata(&gguf.metadata).map_err(Failure::usage)?;
    let template = ChatTemplate::from_metadata(&gguf.metadata, &tokenizer).map_err(Failure::usage)?;
    let text = super::run::read_text(&args.messages)?;
    let file = args.messages.display();
    let messages = match serde_json::from_str(&text) {
        Ok(Json::Array(m)) => m,
        Ok(_) => return Err(Failure::usage(format!("{file}: a JSON list of messages was expected"))),
        Err(e) => return Err(Failure::usage(format!("{file} is not JSON: {e}"))),
    };
    report::print_line(&template.render(&messages, !args.no_generation_prompt).map_err(Failure::usage)?)
}

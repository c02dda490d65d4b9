//! `nt tokenize`: text to ids.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::args::OverrideArgs;
use super::{Failure, ModelArg};
use crate::gguf::Gguf;
use crate::tokenizer::Tokenizer;

/// Arguments of `nt tokenize`.
#[derive(Debug, Args)]
pub struct TokenizeArgs {
    #[command(flatten)]
    pub(super) model: ModelArg,
    /// The text.
    #[arg(required_unless_present = "file", conflicts_with = "file")]
    text: Option<String>,
    /// Read the text from a file; - is stdin.
    #[arg(long, value_name = "F")]
    file: Option<PathBuf>,
    /// Add no BOS or EOS, and read special tokens in the text as plain text.
    #[arg(long)]
    no_special: bool,
    /// One JSON object with ids and pieces.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    overrides: OverrideArgs,
}

/// Prints the ids.
pub fn run(args: &TokenizeArgs) -> Result<(), Failure> {
    let mut gguf = Gguf::open(args.model.path()).map_err(Failure::usage)?;
    args.overrides.apply(&mut gguf.metadata)?;
    let tokenizer = Tokenizer::from_metadata(&gguf.metadata).map_err(Failure::usage)?;
    for w in tokenizer.warnings() {
        tracing::warn!("{w}");
    }
    let text = match (&args.text, &args.file) {
        (Some(t), _) => t.clone(),
        (None, Some(f)) => super::text::read_text(f)?,
        (None, None) => String::new(),
    };
    let ids = tokenizer.encode(&text, !args.no_special, !args.no_special);
    let out = if args.json {
        let pieces: Vec<_> =
            ids.iter().map(|&t| String::from_utf8_lossy(tokenizer.token_bytes(t)).into_owned()).collect();
        format!("{}\n", json!({ "ids": ids, "pieces": pieces }))
    } else {
        format!("{}\n", ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" "))
    };
    std::io::Write::write_all(&mut super::streams::Stdout, out.as_bytes()).map_err(|e| Failure::output("stdout", &e))
}

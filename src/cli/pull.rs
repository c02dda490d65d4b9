//! `nt pull`: a model into the library.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use super::report::print_line;
use super::{Failure, interrupt};
use crate::library::{self, Progress, PullError, PullRequest};
use crate::units::format_bytes;

/// Arguments of `nt pull`.
#[derive(Debug, Args)]
#[command(after_help = ENDS)]
pub struct PullArgs {
    /// Address of a GGUF file, or hf:OWNER/NAME:FILE for one of Hugging Face's; any shard stands for all of a model.
    #[arg(value_name = "URL|hf:OWNER/NAME:FILE")]
    reference: String,
    /// Checksum that the file must have (repeat for each shard, in order). Hugging Face's are known without.
    #[arg(long, value_name = "HEX")]
    sha256: Vec<String>,
    /// Branch, tag or commit of the repository.
    #[arg(long, value_name = "NAME", default_value = "main")]
    revision: String,
    /// Folder to put it in (default: the first of $NT_MODELS, else nt/models in $XDG_CACHE_HOME or ~/.cache).
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// How it ends, and what it reads, for the help.
const ENDS: &str = "What is not whole yet lies as FILE.part; the same command goes on from there, also after Ctrl-C (exit code 130). \
HF_TOKEN is sent to Hugging Face alone, HF_ENDPOINT names a mirror, SSL_CERT_FILE other root certificates; HTTPS_PROXY and NO_PROXY are \
followed. `nt list` and `nt run NAME` find the model afterwards.";

/// The first pause after a request that brought nothing.
const PAUSE: Duration = Duration::from_secs(1);

impl From<PullError> for Failure {
    fn from(e: PullError) -> Failure {
        match e {
            PullError::Usage(_) => Failure::usage(e),
            PullError::Room(_) => Failure::limits(e),
            PullError::Failed(_) => Failure::running(e),
            PullError::Stopped { .. } => Failure::stopped(e),
        }
    }
}

/// Fetches, and prints where the model is.
pub fn run(args: &PullArgs) -> Result<(), Failure> {
    let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
    let folder = args.dir.clone().or_else(library::home).ok_or_else(|| {
        Failure::usage("there is no folder to put models in: neither HOME nor NT_MODELS is set; name one with --dir")
    })?;
    let request = PullRequest {
        reference: args.reference.clone(),
        folder,
        revision: args.revision.clone(),
        sha256: args.sha256.clone(),
        endpoint: var("HF_ENDPOINT"),
        token: var("HF_TOKEN"),
        pause: PAUSE,
    };
    interrupt::install()?;
    let (bar, began) = (bar(), Instant::now());
    let mut progress = |p: Progress| {
        bar.set_length(p.bytes.1);
        bar.set_position(p.bytes.0);
        if p.file.1 > 1 {
            bar.set_message(format!("{} of {}", p.file.0, p.file.1));
        }
    };
    let pulled = library::pull(&request, &mut progress, &interrupt::interrupted);
    bar.finish_and_clear();
    let pulled = pulled?;
    if !args.json {
        let bytes: u64 = pulled.files.iter().map(|f| f.bytes).sum();
        let path = pulled.files.first().map_or_else(String::new, |f| f.path.display().to_string());
        let sum = match pulled.files.iter().all(|f| f.compared) {
            true => "sha256 compared",
            false => "nobody said its sha256, so that it was not compared",
        };
        return print_line(&format!("{}  {}  {path} ({sum})", pulled.name, format_bytes(bytes)));
    }
    let files = pulled.files.iter().map(|f| {
        json!({ "path": f.path.display().to_string(), "bytes": f.bytes, "sha256": f.sha256, "sha256_compared": f.compared })
    });
    let object = json!({
        "name": pulled.name,
        "files": files.collect::<Vec<_>>(),
        "bytes": pulled.files.iter().map(|f| f.bytes).sum::<u64>(),
        "fetched_bytes": pulled.fetched,
        "seconds": began.elapsed().as_secs_f64(),
    });
    print_line(&object.to_string())
}

fn bar() -> indicatif::ProgressBar {
    if !std::io::IsTerminal::is_terminal(&std::io::stderr()) {
        return indicatif::ProgressBar::hidden();
    }
    let style = indicatif::ProgressStyle::with_template("{msg} {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    indicatif::ProgressBar::new(0).with_style(style.unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()))
}

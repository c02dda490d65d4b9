//! `nt completions`.

use clap::Args;
use clap_complete::Shell;

use super::Failure;

/// Arguments of `nt completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints the script for a command line.
pub fn run(args: &CompletionsArgs, command: &mut clap::Command) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, command, "nt", &mut script);
    std::io::Write::write_all(&mut super::streams::Stdout, &script).map_err(|e| Failure::output("stdout", &e))
}

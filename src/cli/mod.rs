//! One file per subcommand; parsing, dispatch and exit codes.

pub mod device;

use std::process::ExitCode;

/// Entry point of the binary.
pub fn main() -> ExitCode {
    ExitCode::SUCCESS
}

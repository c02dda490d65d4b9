//! `nt selftest`: every kernel against its reference, on this machine.

use clap::{Args, ValueEnum};

use super::{Failure, report};

/// Arguments of `nt selftest`.
#[derive(Debug, Args)]
pub struct SelftestArgs {
    /// Whose kernels.
    #[arg(long, value_enum, default_value = "cpu")]
    backend: SelftestBackend,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SelftestBackend {
    Cpu,
}

/// Prints a line a kernel; fails if one is out of its bound.
pub fn run(args: &SelftestArgs) -> Result<(), Failure> {
    let mut printed = Ok(());
    let mut line = |l: &str| {
        if printed.is_ok() {
            printed = report::print_line(l);
        }
    };
    let result = match args.backend {
        SelftestBackend::Cpu => crate::backend::cpu::selftest(&mut line),
    };
    printed?;
    result.map_err(Failure::running)
}

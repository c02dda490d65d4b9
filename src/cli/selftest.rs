//! `nt selftest`: every kernel against its reference, on this machine.

use clap::{Args, ValueEnum};

use super::{Failure, report};

/// Arguments of `nt selftest`.
#[derive(Debug, Args)]
pub struct SelftestArgs {
    /// Whose kernels: of processors, on each instruction set there is, or of the GPU.
    #[arg(long, value_enum, default_value = "cpu")]
    backend: SelftestBackend,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SelftestBackend {
    Cpu,
    Cuda,
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
        SelftestBackend::Cuda => cuda(),
    };
    printed?;
    result.map_err(Failure::running)
}

/// The kernels of the first GPU.
fn cuda() -> Result<(), String> {
    use crate::backend::cuda::{Device, selftest};
    let device = Device::open(0).map_err(|e| e.to_string())?;
    let failed = selftest::selftest(&device, &mut std::io::LineWriter::new(super::streams::Stdout))
        .map_err(|e| e.to_string())?;
    if failed > 0 { Err(format!("{failed} kernels are out of their bounds")) } else { Ok(()) }
}

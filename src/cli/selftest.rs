//! `nt selftest`: every kernel against its reference, on this machine.

use clap::{Args, ValueEnum};

use super::{Failure, report};

/// Arguments of `nt selftest`.
#[derive(Debug, Args)]
pub struct SelftestArgs {
    /// Whose kernels: of processors, on each instruction set there is, or of the GPU.
    #[arg(long, value_enum, default_value = "cpu")]
    backend: SelftestBackend,
    /// Of the GPU's checks, the Kth of N parts: several processes share them under tools that make each slow.
    #[arg(long, value_name = "K/N", default_value = "1/1", value_parser = part, hide_default_value = true)]
    part: (usize, usize),
    /// The GPU's checks in small shapes, which still go through every branch of every kernel: for tools that make each
    /// access slow, such as compute-sanitizer's racecheck.
    #[arg(long)]
    small: bool,
}

/// Reads `K/N`, 1 to N of at most 64.
fn part(s: &str) -> Result<(usize, usize), String> {
    let read = |s: &str| s.parse::<usize>().ok();
    let found = s.split_once('/').and_then(|(k, n)| Some((read(k)?, read(n)?)));
    found
        .filter(|(k, n)| (1..=64).contains(n) && (1..=*n).contains(k))
        .ok_or_else(|| format!("{s:?} is no part such as 2/4"))
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
        SelftestBackend::Cpu if args.part != (1, 1) => {
            return Err(Failure::usage("--part is for --backend cuda: the checks of processors take seconds"));
        }
        SelftestBackend::Cpu if args.small => {
            return Err(Failure::usage("--small is for --backend cuda: the checks of processors take seconds"));
        }
        SelftestBackend::Cpu => crate::backend::cpu::selftest(&mut line),
        SelftestBackend::Cuda => cuda(args.part, args.small),
    };
    printed?;
    result.map_err(Failure::running)
}

/// The kernels of the first GPU.
fn cuda(part: (usize, usize), small: bool) -> Result<(), String> {
    use crate::backend::cuda::{Device, selftest};
    let most = if small { selftest::SMALL_MULTIPROCESSORS } else { u32::MAX };
    let device = Device::open_as(0, most).map_err(|e| e.to_string())?;
    let failed = selftest::selftest(&device, part, small, &mut std::io::LineWriter::new(super::streams::Stdout))
        .map_err(|e| e.to_string())?;
    if failed > 0 { Err(format!("{failed} kernels are out of their bounds")) } else { Ok(()) }
}

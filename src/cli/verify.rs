//! `nt verify`: every tensor's bytes against their record.

use clap::Args;

use super::args::ReaderArg;
use super::codes::failure;
use super::options::{places, reader_kind};
use super::{Failure, ModelArg, report};
use crate::engine::{self, Verified};
use crate::plan::format_bytes;

/// Arguments of `nt verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    pub(super) model: ModelArg,
    /// Read it from there: a drive (nvme1n1, a PCI address or a path below /dev), or a directory or
    /// file that holds a copy of the model.
    #[arg(long, value_name = "auto|DEVICE|PATH", default_value = "auto")]
    tier_c: String,
    /// How it is read.
    #[arg(long, value_enum, default_value = "auto")]
    reader: ReaderArg,
}

/// Compares, and prints a line a tensor that differs, or with `verbose` a line a tensor.
pub fn run(args: &VerifyArgs, verbose: bool) -> Result<(), Failure> {
    let bar = if std::io::IsTerminal::is_terminal(&std::io::stderr()) {
        indicatif::ProgressBar::new(0)
    } else {
        indicatif::ProgressBar::hidden()
    };
    let copies = places(&args.tier_c)?;
    let found = engine::verify(args.model.path(), &copies, reader_kind(args.reader), &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let found = found.map_err(failure)?;
    if let Some((path, len, recorded)) = found.lengths.first() {
        let path = path.display();
        return Err(Failure::running(format!(
            "{path} has {len} bytes, but {recorded} were recorded; if that is right, run `nt device extents {path}` again"
        )));
    }
    let differ = lines(&found, verbose)?;
    let bytes: u64 = found.gguf.shards.iter().map(|s| s.len).sum();
    let (tensors, files) = (found.gguf.tensors.len(), found.gguf.shards.len());
    let all =
        format!("{tensors} tensors, {} in {files} file{}", format_bytes(bytes), if files == 1 { "" } else { "s" });
    let all = match &found.requant {
        Some(ty) => format!("{all}, requantised to {ty} when it was staged"),
        None => all,
    };
    let Some(first) = found.corrupt.first() else {
        return report::print_line(&format!("{all}, read through {}: all as recorded", found.reader));
    };
    report::print_line(&format!("{all}, read through {}: {differ} tensors differ", found.reader))?;
    Err(Failure::running(format!("{} chunks differ; the first: {first}", found.corrupt.len())))
}

/// Prints the lines; gives the count of tensors that differ.
fn lines(found: &Verified, verbose: bool) -> Result<usize, Failure> {
    let mut differ = 0;
    for tensor in &found.gguf.tensors {
        let file = &found.gguf.shards[tensor.shard].path;
        let file = file.file_name().map_or_else(|| file.display().to_string(), |n| n.to_string_lossy().into_owned());
        let place = format!("{}: {} bytes at {} of {file}", tensor.name, tensor.bytes, tensor.offset);
        let mut bad = found.corrupt_in(tensor);
        match bad.next() {
            None if verbose => report::print_line(&format!("{place}: as recorded"))?,
            None => {}
            Some(c) => {
                differ += 1;
                let n = 1 + bad.count();
                report::print_line(&format!(
                    "{place}: {n} chunk{} differ, the first at {}: CRC-32C {:08x}, {:08x} was recorded",
                    if n == 1 { "" } else { "s" },
                    c.offset,
                    c.found,
                    c.expected
                ))?;
            }
        }
    }
    Ok(differ)
}

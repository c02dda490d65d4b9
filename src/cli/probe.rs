//! `nt probe`: what the links of this machine carry.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::{Value as Json, json};

use super::report::print_line;
use super::{Failure, interrupt, outputs};
use crate::backend::cuda::Device;
use crate::machine;
use crate::machine::probe::{self, KEPT_BLOCK_MIN, Pages, ProbeError, Rate, Target, link, memory, plot, storage};
use crate::plan::{format_bytes, parse_size};
use crate::storage::guard::Host;

/// Arguments of `nt probe`.
#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// What to measure, one or more of: storage PATH, link, memory. PATH is a file, a directory
    /// (its largest file is read), a block device, or a drive bound to vfio-pci; it is never written.
    /// Storage is told in GB/s, reads per second and latencies (p50 and p99; p99.9 too with --json).
    /// Blocks below 1 MiB are read scattered over it, larger ones in its order, as weights are. Storage and link
    /// together are also measured at once. Without any: link and memory.
    #[arg(value_name = "storage PATH|link|memory")]
    what: Vec<String>,
    /// Bytes of a read in the sweep, comma separated: multiples of 4096 from 4KiB to 16MiB (default:
    /// 4KiB,16KiB,64KiB,128KiB,512KiB,1MiB,2MiB).
    #[arg(long, value_delimiter = ',', value_parser = block_size)]
    block_size: Vec<u64>,
    /// Reads in flight in the sweep, comma separated, 1 to 256 (default: 1,2,4,8,16,32,64).
    #[arg(long, value_delimiter = ',', value_parser = depth)]
    depth: Vec<u16>,
    /// Seconds of the sustained read, whose rate plans count with; 0 skips it. It is at the knee, or for a
    /// memory file system and through the page cache at 1 MiB x 16, as weights are read.
    #[arg(long, default_value_t = 5.0, value_parser = seconds)]
    seconds: f64,
    /// Pages of the buffers that storage is read to: huge ones, in which weights lie, or small ones, in
    /// which other programs read (for comparing with them).
    #[arg(long, value_enum, default_value = "huge")]
    pages: PagesArg,
    /// Draw the storage sweep to this file.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// `--pages`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum PagesArg {
    Huge,
    Small,
}

impl From<PagesArg> for Pages {
    fn from(arg: PagesArg) -> Pages {
        match arg {
            PagesArg::Huge => Pages::Huge,
            PagesArg::Small => Pages::Small,
        }
    }
}

fn depth(text: &str) -> Result<u16, String> {
    super::args::within(text, 1, 256)
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().ok().filter(|s| (0.0..=86_400.0).contains(s));
    seconds.ok_or_else(|| "a number of seconds from 0 to 86400 was expected".into())
}

fn block_size(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        b if (4096..=16 << 20).contains(&b) && b.is_multiple_of(4096) => Ok(b),
        b => Err(format!("{b} bytes: a multiple of 4096 from 4KiB to 16MiB was expected")),
    }
}

/// What the words ask for.
#[derive(Debug, Default, PartialEq)]
struct Wanted {
    storage: Option<PathBuf>,
    link: bool,
    memory: bool,
}

fn wanted(words: &[String]) -> Result<Wanted, String> {
    let mut out = Wanted::default();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "storage" => {
                let path = words.next().ok_or("storage needs a path: nt probe storage PATH")?;
                if out.storage.replace(path.into()).is_some() {
                    return Err("storage is given twice; measure one path at a time".into());
                }
            }
            "link" => out.link = true,
            "memory" => out.memory = true,
            other => return Err(format!("{other:?} is none of storage PATH, link, memory")),
        }
    }
    if out == Wanted::default() {
        (out.link, out.memory) = (true, true);
    }
    Ok(out)
}

/// Runs the probes that were asked for.
pub fn run(args: &ProbeArgs) -> Result<(), Failure> {
    let wanted = wanted(&args.what).map_err(Failure::usage)?;
    if args.plot.is_some() && wanted.storage.is_none() {
        return Err(Failure::usage("--plot draws a storage sweep; add `storage PATH`"));
    }
    if let (Some(file), Some(path)) = (&args.plot, &wanted.storage) {
        outputs::check_one("--plot", file, &[path])?;
    }
    interrupt::install()?;
    let mut rates = Vec::new();
    let mut all = serde_json::Map::new();
    let mut stored = None;
    if let Some(path) = &wanted.storage {
        let report = probe_storage(args, path, &mut rates)?;
        stored = report.knee.filter(|_| report.through == "io_uring").map(|knee| (path.as_path(), knee));
        all.insert("storage".into(), json!(report));
    }
    if wanted.memory {
        all.insert("memory".into(), probe_memory(args, &mut rates)?);
    }
    if wanted.link {
        all.insert("link".into(), probe_link(args, !args.what.is_empty(), stored, wanted.memory, &mut rates)?);
    }
    if let Err(e) = probe::record(&rates) {
        tracing::warn!("the measured rates could not be kept: {e}");
    }
    if args.json { print_line(&Json::Object(all).to_string()) } else { Ok(()) }
}

fn failure(e: ProbeError) -> Failure {
    match e {
        ProbeError::Interrupted => Failure::interrupted(),
        ProbeError::Target { .. } => Failure::usage(e),
        ProbeError::Room { .. } => Failure::limits(e),
        e => Failure::running(e),
    }
}

/// GB/s with as many digits as a measurement is worth.
fn gb(rate: f64) -> String {
    format!("{:.3} GB/s", rate / 1e9)
}

fn probe_storage(args: &ProbeArgs, path: &Path, rates: &mut Vec<Rate>) -> Result<storage::Report, Failure> {
    let or = |given: Vec<u64>, all: &[u64]| if given.is_empty() { all.to_vec() } else { given };
    let depths: Vec<usize> = args.depth.iter().map(|d| usize::from(*d)).collect();
    let options = storage::Options {
        blocks: or(args.block_size.clone(), &storage::BLOCKS),
        depths: if depths.is_empty() { storage::DEPTHS.to_vec() } else { depths },
        sustained_s: args.seconds,
        pages: args.pages.into(),
        memory: machine::memory(Path::new("/")).budget(),
    };
    let small = options.blocks.iter().min().zip(options.depths.iter().min());
    if let (Some((&block, &depth)), Some(most)) = (small, options.memory)
        && !options.has_room(block, depth)
    {
        return Err(Failure::limits(format!(
            "reads of {} with {depth} in flight take {}, but {} can be taken; a smaller --block-size or --depth was expected",
            format_bytes(block),
            format_bytes(block * depth as u64),
            format_bytes(most),
        )));
    }
    let (asked, room) = (options.blocks.len() * options.depths.len(), options.flying());
    let left_out = options.blocks.iter().flat_map(|&b| options.depths.iter().map(move |&d| (b, d)));
    let left_out = left_out.filter(|&(b, d)| !options.has_room(b, d)).count();
    if left_out > 0 {
        let most = format_bytes(room);
        tracing::warn!("{left_out} of {asked} sizes and depths are left out: memory has room for {most} in flight");
    }
    let bar = progress(options.blocks.len() * options.depths.len());
    let stop = &interrupt::interrupted;
    let bound = probe::open_bound(&Host::default(), &path.to_string_lossy(), options.flying()).map_err(failure)?;
    let report = match bound {
        Some(mut drive) => {
            let name = path.display().to_string();
            storage::measure_bound(&name, &mut drive, &options, stop, &mut |_| bar.inc(1)).map_err(failure)?
        }
        None => {
            let target = Target::open(path).map_err(failure)?;
            if let Some(file) = &args.plot {
                outputs::check_one("--plot", file, &[&target.path])?;
            }
            if let Some(note) = target.file.note() {
                tracing::warn!("{note}");
            }
            storage::measure(&target, &options, stop, &mut |_| bar.inc(1)).map_err(failure)?
        }
    };
    bar.finish_and_clear();
    if let Some(k) = report.knee {
        let (rate, block, depth) = match &report.sustained {
            Some(s) => (s.bytes_per_s, s.block_bytes, s.depth),
            None => (k.bytes_per_s, k.block_bytes, k.depth),
        };
        if block >= KEPT_BLOCK_MIN {
            rates.push(Rate::now("storage", &report.drive, rate, Some(block), Some(depth)));
        } else {
            tracing::warn!(
                "the rate of reads of {block} bytes is not kept for plans, since weights are read in blocks of {KEPT_BLOCK_MIN} bytes and more"
            );
        }
    }
    if !args.json {
        print_storage(&report, &options)?;
    }
    if let Some(file) = &args.plot {
        super::outputs::write(file, &plot::svg(&report))?;
    }
    Ok(report)
}

fn progress(cells: usize) -> indicatif::ProgressBar {
    if std::io::IsTerminal::is_terminal(&std::io::stderr()) {
        indicatif::ProgressBar::new(cells as u64)
    } else {
        indicatif::ProgressBar::hidden()
    }
}

fn print_storage(report: &storage::Report, options: &storage::Options) -> Result<(), Failure> {
    let way = match (report.through, report.direct, report.pages) {
        ("vfio", ..) => "vfio, past the kernel",
        ("pread", true, _) => "O_DIRECT, pread",
        ("pread", false, _) => "pread through the page cache",
        (_, false, _) => "io_uring through the page cache",
        (_, true, Some(Pages::Small)) => "O_DIRECT, io_uring, buffers in 4 KiB pages",
        (_, true, _) => "O_DIRECT, io_uring",
    };
    print_line(&format!("storage {} ({}), {way}, GB/s by block size and reads in flight", report.path, report.drive))?;
    let head: Vec<String> = options.depths.iter().map(|d| format!("{d:>7}")).collect();
    print_line(&format!("  {:>8} {}", "", head.join("")))?;
    for block in &options.blocks {
        let row = report.cells.iter().filter(|c| c.block_bytes == *block);
        let row: String = row.map(|c| format!("{:>7.3}", c.bytes_per_s / 1e9)).collect();
        print_line(&format!("  {:>8} {row}", plot::size(*block)))?;
    }
    print_line("  µs per read, half of them and 99 of 100 at most (p50/p99)")?;
    for block in &options.blocks {
        let row = report.cells.iter().filter(|c| c.block_bytes == *block);
        let row: String = row.map(|c| format!(" {:>12}", latencies(&c.latency))).collect();
        print_line(&format!("  {:>8}{row}", plot::size(*block)))?;
    }
    if let (Some(b), Some(k)) = (report.best, report.knee) {
        let (size, iops) = (plot::size(b.block_bytes), b.iops);
        print_line(&format!("  best  {size} x {}: {}, {iops:.0} reads/s", b.depth, gb(b.bytes_per_s)))?;
        print_line(&format!(
            "  knee  {} x {}: {}{} (the fewest bytes in flight within 3 % of the best)",
            plot::size(k.block_bytes),
            k.depth,
            gb(k.bytes_per_s),
            by_threads(report.threads)
        ))?;
    }
    for (name, rate) in [("pread", report.buffered_bytes_per_s), ("mmap", report.mmap_bytes_per_s)] {
        if let Some(rate) = rate {
            print_line(&format!("  {name:<5} one thread, through the page cache: {}", gb(rate)))?;
        }
    }
    let Some(s) = &report.sustained else { return Ok(()) };
    let (low, high) = s.slices.iter().fold((f64::MAX, 0f64), |(l, h), r| (l.min(*r), h.max(*r)));
    let spread = if s.slices.is_empty() { String::new() } else { format!(", slices {} to {}", gb(low), gb(high)) };
    let slower = storage::slowdown(&s.slices).filter(|x| *x > 0.1);
    let slower = slower.map_or_else(String::new, |x| format!("; it slowed down by {:.0} %", x * 100.0));
    let (at, by) = (format!("{} x {}", plot::size(s.block_bytes), s.depth), by_threads(s.threads));
    let rate = format!("{}, {:.0} reads/s, {} µs (p50/p99)", gb(s.bytes_per_s), s.iops, latencies(&s.latency));
    print_line(&format!("  sustained over {:.1} s at {at}{by}: {rate}{spread}{slower}", s.seconds))
}

/// Two percentiles in microseconds; - where so few reads do not tell.
fn latencies(l: &probe::Latency) -> String {
    let us = |ns: Option<u64>| match ns.map(|ns| ns as f64 / 1e3) {
        None => "-".into(),
        Some(us) if us < 100.0 => format!("{us:.1}"),
        Some(us) => format!("{us:.0}"),
    };
    format!("{}/{}", us(l.p50_ns), us(l.p99_ns))
}

/// How many threads read, where it is more than one.
fn by_threads(threads: usize) -> String {
    if threads > 1 { format!(", by {threads} threads") } else { String::new() }
}

fn probe_memory(args: &ProbeArgs, rates: &mut Vec<Rate>) -> Result<Json, Failure> {
    let threads = machine::n_cpus();
    let facts = machine::memory(Path::new("/"));
    let cells = memory::measure(threads, facts.budget(), &interrupt::interrupted).map_err(failure)?;
    if interrupt::interrupted() {
        return Err(Failure::interrupted());
    }
    let identity = machine::memory_identity(Path::new("/"));
    let best = cells.iter().max_by(|a, b| a.bytes_per_s.total_cmp(&b.bytes_per_s));
    rates.extend(best.map(|b| Rate::now("memory", &identity, b.bytes_per_s, None, Some(b.threads))));
    if !args.json {
        print_line(&format!("memory ({identity}), read rate by threads"))?;
        for c in &cells {
            print_line(&format!("  {:>3}  {}", c.threads, gb(c.bytes_per_s)))?;
        }
    }
    Ok(json!({ "identity": identity, "cells": cells }))
}

/// `asked`: without a GPU, a link that was named is an error, and null otherwise.
/// `stored` names what was read for storage, and the knee found there; `with_memory` asks for both at once.
fn probe_link(
    args: &ProbeArgs,
    asked: bool,
    stored: Option<(&Path, storage::Cell)>,
    with_memory: bool,
    rates: &mut Vec<Rate>,
) -> Result<Json, Failure> {
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(e) if asked => return Err(Failure::running(e)),
        Err(e) => {
            if !args.json {
                print_line(&format!("link: not measured ({e})"))?;
            }
            return Ok(Json::Null);
        }
    };
    let mut report = link::measure(&device, &interrupt::interrupted, &mut |_| {}).map_err(failure)?;
    if let Some((path, knee)) = stored {
        let target = Target::open(path).map_err(failure)?;
        let together = link::with_storage(&device, &target, knee, args.pages.into(), &interrupt::interrupted);
        report.with_storage = Some(together.map_err(failure)?);
    }
    let identity = link::identity(&device);
    if with_memory {
        let (counts, budget) = (link::counts(machine::n_cpus()), machine::memory(Path::new("/")).budget());
        let mut measured = link::with_memory(&device, &counts, budget, &interrupt::interrupted).map_err(failure)?;
        rates.extend(link::kept(&measured, &identity));
        report.with_memory = measured.pop();
        report.with_fewer = measured;
    }
    let mut keep = |kind: &str, rate: fn(&link::Cell) -> f64| {
        let best = report.cells.iter().max_by(|a, b| rate(a).total_cmp(&rate(b)));
        rates.extend(best.map(|c| Rate::now(kind, &identity, rate(c), Some(c.bytes as u64), None)));
    };
    keep("h2d", |c| c.h2d_pinned);
    keep("d2h", |c| c.d2h_pinned);
    if !args.json {
        print_link(&report)?;
    }
    Ok(json!(report))
}

fn print_link(report: &link::Report) -> Result<(), Failure> {
    print_line(&format!("link to {} at {}, GB/s by bytes of a copy", report.gpu, report.pci))?;
    print_line(&format!(
        "  {:>8} {:>10} {:>12} {:>10} {:>12}",
        "", "to, pinned", "to, pageable", "from, pin.", "from, page."
    ))?;
    for c in &report.cells {
        let [a, b, d, e] = [c.h2d_pinned, c.h2d_pageable, c.d2h_pinned, c.d2h_pageable].map(|r| r / 1e9);
        print_line(&format!("  {:>8} {a:>10.2} {b:>12.2} {d:>10.2} {e:>12.2}", plot::size(c.bytes as u64)))?;
    }
    let (to, from) = report.both_at_once;
    print_line(&format!("  both ways at once: {} to the GPU, {} from it", gb(to), gb(from)))?;
    for b in report.with_fewer.iter().chain(&report.with_memory) {
        let n = b.threads;
        print_line(&format!("  while {n} threads read memory: {} to the GPU, {} to them", gb(b.h2d), gb(b.memory)))?;
    }
    let Some(t) = report.with_storage else { return Ok(()) };
    let (block, depth) = (plot::size(t.block_bytes), t.depth);
    print_line(&format!(
        "  while storage is read ({block} x {depth}): {} to the GPU, {} from storage",
        gb(t.h2d),
        gb(t.storage)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_say_what_is_measured() {
        let parse = |s: &str| wanted(&s.split_whitespace().map(String::from).collect::<Vec<_>>());
        let storage = |p: &str| Some(PathBuf::from(p));
        assert_eq!(parse(""), Ok(Wanted { storage: None, link: true, memory: true }));
        assert_eq!(parse("memory"), Ok(Wanted { storage: None, link: false, memory: true }));
        assert_eq!(parse("storage /m link memory"), Ok(Wanted { storage: storage("/m"), link: true, memory: true }));
        for bad in ["storage", "disk", "storage a storage b"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}

//! How fast a reader brings a file in: prints GB/s.
//!
//! `read_rate FILE [auto|io_uring|pread] [SECONDS]` reads FILE from its start to its end, over and
//! over, in units of 16 MiB into four slots, as the ring does.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nt::memory::Arena;
use nt::storage::{Extent, FileId, ReadRequest, ReaderKind, open_reader};

const UNIT: u64 = 16 << 20;
const SLOTS: u64 = 4;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let path = args.get(1).context("usage: read_rate FILE [auto|io_uring|pread] [SECONDS]")?;
    let kind = match args.get(2).map_or("auto", String::as_str) {
        "auto" => ReaderKind::Auto,
        "io_uring" => ReaderKind::IoUring,
        "pread" => ReaderKind::Pread,
        other => bail!("{other}: readers are auto, io_uring and pread"),
    };
    let limit = Duration::from_secs_f64(args.get(3).map_or(Ok(5.0), |s| s.parse())?);
    let units = std::fs::metadata(path)?.len() / UNIT;
    if units < SLOTS {
        bail!("{path}: {} MiB are needed to measure a rate", SLOTS * (UNIT >> 20));
    }
    let mut arena = Arena::new(SLOTS * UNIT)?;
    let slots = (0..SLOTS).map(|_| arena.take(UNIT)).collect::<Result<Vec<_>, _>>()?;
    let (mut reader, notes) = open_reader(&[Path::new(path)], kind)?;
    notes.iter().for_each(|n| eprintln!("{n}"));

    let (mut done, mut next, mut bytes) = (Vec::new(), 0, 0);
    let mut free: Vec<u64> = (0..SLOTS).collect();
    let start = Instant::now();
    while start.elapsed() < limit || reader.outstanding() > 0 {
        while start.elapsed() < limit
            && let Some(slot) = free.pop()
        {
            let extents = [Extent { file: FileId(0), offset: next % units * UNIT, len: UNIT, dst_offset: 0 }];
            let to = slots[slot as usize];
            let request = ReadRequest { tag: slot, extents: &extents, dst: to.addr, urgent: false, dst_len: to.len };
            // SAFETY: the slot is taken from `free` and comes back when its read has ended; nobody
            // looks at it, and the reader is dropped before the arena.
            unsafe { reader.submit(&request) }?;
            next += 1;
        }
        reader.poll(&mut done, Some(Duration::from_millis(10)))?;
        for c in done.drain(..) {
            bytes += c.result?;
            free.push(c.tag);
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{}: {:.3} GB/s ({bytes} bytes in {seconds:.2} s)", reader.name(), bytes as f64 / seconds / 1e9);
    Ok(())
}

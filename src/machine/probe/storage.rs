//! Read rates of a drive by block size and reads in flight, what the page cache and mmap make of
//! it, and how the rate holds over time.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::Serialize;

use super::by_reader::{BoundDrive, ByReader};
use super::queue::{Queue, Span};
use super::{Latencies, Latency, Pages, ProbeError, Target, rate};
use crate::storage::{self, FileId, ReaderKind};

/// Block sizes of the sweep, in bytes.
pub const BLOCKS: [u64; 7] = [4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20, 2 << 20];
/// Reads in flight of the sweep.
pub const DEPTHS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
/// What counts as no slower than the best: 3 %.
const KNEE_SHARE: f64 = 0.97;
const CELL_TIME: Duration = Duration::from_millis(300);
const SLICE: Duration = Duration::from_millis(500);
/// Block of the reads through the page cache.
const BUFFERED_BLOCK: u64 = 1 << 20;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Block sizes, in bytes, multiples of 4096.
    pub blocks: Vec<u64>,
    /// Reads in flight.
    pub depths: Vec<usize>,
    /// Seconds of the sustained read; 0 skips it.
    pub sustained_s: f64,
    /// Pages of the buffers.
    pub pages: Pages,
    /// Bytes that buffers may take; cells that need more are left out.
    pub memory: Option<u64>,
}

impl Options {
    /// Whether so many bytes may be in flight.
    pub fn has_room(&self, block_bytes: u64, depth: usize) -> bool {
        self.memory.is_none_or(|most| block_bytes.saturating_mul(depth as u64) <= most)
    }

    /// The most bytes that a cell has in flight, of those that have room.
    pub fn flying(&self) -> u64 {
        let cells = self.blocks.iter().flat_map(|&b| self.depths.iter().map(move |&d| (b, d)));
        cells.filter(|&(b, d)| self.has_room(b, d)).map(|(b, d)| b * d as u64).max().unwrap_or(0)
    }
}

/// One cell of the sweep.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// Bytes of a read.
    pub block_bytes: u64,
    /// Reads in flight.
    pub depth: usize,
    /// Bytes per second.
    pub bytes_per_s: f64,
    /// Reads per second.
    pub iops: f64,
    /// Reads that were made.
    pub reads: u64,
    /// How long a read took, from its submission to its completion.
    pub latency: Latency,
}

/// The outcome.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// What was read.
    pub path: String,
    /// The drive below it.
    pub drive: String,
    /// Bytes of the file or device.
    pub len_bytes: u64,
    /// Whether reads went past the page cache.
    pub direct: bool,
    /// `io_uring`, `pread` or `vfio`.
    pub through: &'static str,
    /// Threads that read at the knee: several where a read is a copy by a processor (memory file systems,
    /// the page cache), or where io_uring is refused.
    pub threads: usize,
    /// Pages of the buffers, where they were chosen.
    pub pages: Option<Pages>,
    /// By block size, then depth.
    pub cells: Vec<Cell>,
    /// The fastest cell.
    pub best: Option<Cell>,
    /// The cell with the fewest bytes in flight within 3 % of the best.
    pub knee: Option<Cell>,
    /// One thread calling pread through the page cache, bytes per second.
    pub buffered_bytes_per_s: Option<f64>,
    /// One thread touching every page of a mapping, bytes per second.
    pub mmap_bytes_per_s: Option<f64>,
    /// For the time asked for: at the knee, or where reads are copies as weights are read, since what a
    /// processor copies depends on the size of the copy and how many others there are.
    pub sustained: Option<Sustained>,
}

/// A long read in slices.
#[derive(Clone, Debug, Serialize)]
pub struct Sustained {
    /// Bytes of a read.
    pub block_bytes: u64,
    /// Reads in flight.
    pub depth: usize,
    /// Threads that read.
    pub threads: usize,
    /// Bytes per second over the whole time.
    pub bytes_per_s: f64,
    /// Reads per second over the whole time.
    pub iops: f64,
    /// How long a read took, from its submission to its completion.
    pub latency: Latency,
    /// Seconds it took.
    pub seconds: f64,
    /// Bytes per second of each slice of about half a second.
    pub slices: Vec<f64>,
}

/// Something that can be read with so many reads of one size in flight.
pub trait Reads {
    /// Whether it has as many bytes, and room for them in flight.
    fn fits(&self, block: u64, depth: usize) -> bool;

    /// Threads that read with `depth` reads in flight.
    fn threads(&self, depth: usize) -> usize;

    /// Bytes of a read, and reads in flight, at which a run's rate is another than the knee's.
    fn as_weights(&self) -> Option<(u64, usize)> {
        None
    }

    /// Reads for `time` in blocks and depth as given; calls `each` about every `slice` with the bytes and
    /// seconds since the last call, and adds how long each read took to `latencies`.
    ///
    /// # Errors
    /// A failed read, io_uring refused, or `stop` said so.
    fn run(
        &mut self,
        cell: (u64, usize),
        time: Duration,
        slice: Duration,
        stop: &dyn Fn() -> bool,
        each: &mut dyn FnMut(Span),
        latencies: &mut Latencies,
    ) -> Result<Span, ProbeError>;
}

/// A file or device through io_uring.
struct ByKernel<'t> {
    target: &'t Target,
    pages: Pages,
    read: u64,
}

impl Reads for ByKernel<'_> {
    fn fits(&self, block: u64, _: usize) -> bool {
        block <= self.target.len
    }

    fn threads(&self, depth: usize) -> usize {
        storage::reading_threads(&self.target.file, depth)
    }

    fn as_weights(&self) -> Option<(u64, usize)> {
        self.target.file.copies.then_some((storage::CHUNK_BYTES, storage::QUEUE_DEPTH))
    }

    fn run(
        &mut self,
        (block, depth): (u64, usize),
        time: Duration,
        slice: Duration,
        stop: &dyn Fn() -> bool,
        each: &mut dyn FnMut(Span),
        latencies: &mut Latencies,
    ) -> Result<Span, ProbeError> {
        let mut queue = Queue::new(self.target, block, depth, self.read, self.pages)?;
        let span = queue.run(time, slice, stop, each, latencies)?;
        self.read = queue.read();
        Ok(span)
    }
}

/// Measures `target`; `say` gets each cell as it is known.
///
/// # Errors
/// A failed read, io_uring refused, or `stop` said so.
pub fn measure(
    target: &Target,
    options: &Options,
    stop: &dyn Fn() -> bool,
    say: &mut dyn FnMut(Cell),
) -> Result<Report, ProbeError> {
    let report = Report {
        path: target.path.display().to_string(),
        drive: target.identity.clone(),
        len_bytes: target.len,
        direct: target.file.is_direct(),
        ..Report::default()
    };
    let report = match refused(target, options)? {
        Some(mut pool) => sweep(&mut pool, Report { through: "pread", ..report }, options, stop, say)?,
        None => {
            let report = Report { through: "io_uring", pages: Some(options.pages), ..report };
            sweep(&mut ByKernel { target, pages: options.pages, read: 0 }, report, options, stop, say)?
        }
    };
    Ok(Report {
        buffered_bytes_per_s: Some(buffered(target, stop)?.rate()),
        mmap_bytes_per_s: mapped(target, stop)?.map(|s| s.rate()),
        ..report
    })
}

/// The reader that a run falls back to where io_uring is refused; `None` where it is not.
fn refused(target: &Target, options: &Options) -> Result<Option<ByReader>, ProbeError> {
    let name = target.path.display().to_string();
    let opened = storage::open_reader(&[&target.path], ReaderKind::Auto);
    let (reader, _) = opened.map_err(|e| ProbeError::Target { path: name.clone(), why: e.to_string() })?;
    if reader.name() == "io_uring" {
        return Ok(None);
    }
    let weights = storage::CHUNK_BYTES * storage::QUEUE_DEPTH as u64;
    let flying = options.flying().max(options.memory.map_or(weights, |most| weights.min(most)));
    let reads = ByReader::new(reader, FileId(0), target.len, name, flying, storage::PREAD_THREADS)?;
    Ok(Some(if target.file.is_direct() { reads } else { reads.in_order() }))
}

/// Measures a drive bound to vfio-pci, which no page cache stands before.
///
/// # Errors
/// A failed read, or `stop` said so.
pub fn measure_bound(
    name: &str,
    drive: &mut BoundDrive,
    options: &Options,
    stop: &dyn Fn() -> bool,
    say: &mut dyn FnMut(Cell),
) -> Result<Report, ProbeError> {
    let report = Report {
        path: name.into(),
        drive: drive.identity.clone(),
        len_bytes: drive.len,
        direct: true,
        through: "vfio",
        ..Report::default()
    };
    sweep(&mut drive.reads, report, options, stop, say)
}

/// Fills in cells, best, knee and the sustained rate.
fn sweep(
    reads: &mut dyn Reads,
    report: Report,
    options: &Options,
    stop: &dyn Fn() -> bool,
    say: &mut dyn FnMut(Cell),
) -> Result<Report, ProbeError> {
    let mut cells = Vec::new();
    for &block_bytes in &options.blocks {
        let fits = |d: &&usize| reads.fits(block_bytes, **d) && options.has_room(block_bytes, **d);
        for &depth in options.depths.iter().filter(fits).collect::<Vec<_>>() {
            let mut latencies = Latencies::default();
            let span = reads.run((block_bytes, depth), CELL_TIME, CELL_TIME, stop, &mut |_| {}, &mut latencies)?;
            let (reads, latency) = (latencies.reads(), latencies.summary());
            let iops = reads as f64 / span.seconds;
            let cell = Cell { block_bytes, depth, bytes_per_s: span.rate(), iops, reads, latency };
            say(cell);
            cells.push(cell);
        }
    }
    let knee = knee(&cells);
    let sustained = match knee {
        Some(k) if options.sustained_s > 0.0 => {
            let weights = reads.as_weights().filter(|&(block, depth)| options.has_room(block, depth));
            let at = weights.unwrap_or((k.block_bytes, k.depth));
            Some(sustain(reads, at, options.sustained_s, stop)?)
        }
        _ => None,
    };
    let threads = knee.map_or(0, |k| reads.threads(k.depth));
    Ok(Report { best: best(&cells), knee, threads, cells, sustained, ..report })
}

fn best(cells: &[Cell]) -> Option<Cell> {
    cells.iter().copied().max_by(|a, b| a.bytes_per_s.total_cmp(&b.bytes_per_s))
}

/// The cell with the fewest bytes in flight, and of those the fewest reads, that is within 3 % of
/// the best.
pub fn knee(cells: &[Cell]) -> Option<Cell> {
    let floor = best(cells)?.bytes_per_s * KNEE_SHARE;
    let good = cells.iter().copied().filter(|c| c.bytes_per_s >= floor);
    good.min_by_key(|c| (c.block_bytes * c.depth as u64, c.depth))
}

fn sustain(
    reads: &mut dyn Reads,
    (block_bytes, depth): (u64, usize),
    seconds: f64,
    stop: &dyn Fn() -> bool,
) -> Result<Sustained, ProbeError> {
    let mut slices = Vec::new();
    let time = Duration::from_secs_f64(seconds);
    let mut latencies = Latencies::default();
    let span = reads.run((block_bytes, depth), time, SLICE, stop, &mut |s| slices.push(s.rate()), &mut latencies)?;
    Ok(Sustained {
        block_bytes,
        depth,
        threads: reads.threads(depth),
        bytes_per_s: span.rate(),
        iops: latencies.reads() as f64 / span.seconds,
        latency: latencies.summary(),
        seconds: span.seconds,
        slices,
    })
}

/// The target opened through the page cache, with nothing of it cached if the kernel agrees.
fn open_buffered(target: &Target) -> Result<std::fs::File, ProbeError> {
    let file = std::fs::File::open(&target.path)
        .map_err(|e| ProbeError::Target { path: target.path.display().to_string(), why: e.to_string() })?;
    forget(&file);
    Ok(file)
}

fn forget(file: &std::fs::File) {
    // A refusal changes nothing.
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

fn buffered(target: &Target, stop: &dyn Fn() -> bool) -> Result<Span, ProbeError> {
    let file = open_buffered(target)?;
    let mut buffer = vec![0u8; BUFFERED_BLOCK as usize];
    let (start, mut bytes) = (Instant::now(), 0);
    while start.elapsed() < CELL_TIME && bytes < target.len && !stop() {
        let n = file.read_at(&mut buffer, bytes).map_err(|e| ProbeError::Read {
            path: target.path.display().to_string(),
            offset: bytes,
            len: BUFFERED_BLOCK,
            why: e.to_string(),
        })?;
        if n == 0 {
            break;
        }
        bytes += n as u64;
    }
    let span = Span { bytes, seconds: start.elapsed().as_secs_f64() };
    forget(&file);
    Ok(span)
}

/// `None` where the target cannot be mapped.
fn mapped(target: &Target, stop: &dyn Fn() -> bool) -> Result<Option<Span>, ProbeError> {
    let file = open_buffered(target)?;
    // SAFETY: mapped for reading only. Should another process truncate the file meanwhile, this one
    // ends with SIGBUS; nothing is written and nothing is taken from the bytes.
    let Ok(map) = (unsafe { memmap2::MmapOptions::new().len(target.len as usize).map(&file) }) else {
        return Ok(None);
    };
    let (start, mut bytes, mut sum) = (Instant::now(), 0u64, 0u8);
    for block in map.chunks(BUFFERED_BLOCK as usize) {
        if start.elapsed() >= CELL_TIME || stop() {
            break;
        }
        sum = block.iter().step_by(4096).fold(sum, |s, b| s.wrapping_add(*b));
        bytes += block.len() as u64;
    }
    std::hint::black_box(sum);
    let seconds = start.elapsed().as_secs_f64();
    drop(map);
    forget(&file);
    Ok(Some(Span { bytes, seconds }))
}

/// Share by which the last quarter of the slices is slower than the first; a hot drive shows here.
pub fn slowdown(slices: &[f64]) -> Option<f64> {
    let n = slices.len() / 4;
    if n == 0 {
        return None;
    }
    let mean = |s: &[f64]| rate(s.iter().sum::<f64>() as u64, s.len() as f64);
    let (first, last) = (mean(&slices[..n]), mean(&slices[slices.len() - n..]));
    (first > 0.0).then(|| 1.0 - last / first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(block_bytes: u64, depth: usize, bytes_per_s: f64) -> Cell {
        let iops = bytes_per_s / block_bytes as f64;
        Cell { block_bytes, depth, bytes_per_s, iops, reads: 1, latency: Latency::default() }
    }

    #[test]
    fn the_knee_has_the_fewest_bytes_in_flight() {
        let cells = [
            cell(4096, 64, 1.0e9),
            cell(1 << 20, 4, 4.95e9),
            cell(1 << 20, 8, 5.0e9),
            cell(2 << 20, 1, 4.0e9),
            cell(512 << 10, 8, 4.9e9),
        ];
        assert_eq!(knee(&cells), Some(cell(1 << 20, 4, 4.95e9)));
        assert_eq!(knee(&[]), None);
    }

    #[test]
    fn a_drive_that_slows_down_is_seen() {
        assert_eq!(slowdown(&[4.0, 4.0, 4.0, 3.0]), Some(0.25));
        assert_eq!(slowdown(&[1.0]), None);
    }

    #[test]
    fn a_file_is_measured_and_left_as_it_was() {
        let mut f = tempfile::NamedTempFile::new().unwrap();
        let data: Vec<u8> = (0..8u32 << 20).map(|i| (i >> 5) as u8).collect();
        std::io::Write::write_all(&mut f, &data).unwrap();
        f.as_file().sync_all().unwrap();
        let target = Target::open(f.path()).unwrap();
        let options = Options {
            blocks: vec![64 << 10, 16 << 20],
            depths: vec![1, 4],
            sustained_s: 0.2,
            pages: Pages::Small,
            memory: None,
        };
        let report = measure(&target, &options, &|| false, &mut |_| {}).unwrap();
        assert_eq!(report.cells.len(), 2, "a block larger than the file is left out");
        for c in &report.cells {
            assert!((c.iops * c.block_bytes as f64 / c.bytes_per_s - 1.0).abs() < 1e-9, "{c:?}");
            assert!(c.latency.p50_ns <= c.latency.max_ns && c.latency.mean_ns > Some(0), "{c:?}");
        }
        assert_eq!(report.sustained.unwrap().block_bytes, 64 << 10);
        assert_eq!(std::fs::read(f.path()).unwrap(), data);
    }

    #[test]
    fn a_memory_file_system_is_read_as_weights_are() {
        let folder = std::path::Path::new("/dev/shm");
        let Ok(f) = tempfile::NamedTempFile::new_in(folder) else {
            return eprintln!("skipped: {} cannot be written to", folder.display());
        };
        f.as_file().set_len(8 << 20).unwrap();
        let target = Target::open(f.path()).unwrap();
        if !target.file.copies {
            return eprintln!("skipped: {} is no memory file system", folder.display());
        }
        let options =
            Options { blocks: vec![64 << 10], depths: vec![2], sustained_s: 0.05, pages: Pages::Small, memory: None };
        let report = measure(&target, &options, &|| false, &mut |_| {}).unwrap();
        assert_eq!(report.threads, 2, "each read in flight has a thread of its own");
        let s = report.sustained.unwrap();
        assert_eq!((s.block_bytes, s.depth), (storage::CHUNK_BYTES, storage::QUEUE_DEPTH));
        assert!(s.threads > 2);
    }

    #[test]
    fn where_io_uring_is_refused_the_pool_of_a_run_reads() {
        let f = tempfile::NamedTempFile::new().unwrap();
        f.as_file().set_len(8 << 20).unwrap();
        let path = f.path().to_owned();
        // The refusal holds for the thread that asks for it.
        std::thread::spawn(move || {
            storage::refuse_io_uring().unwrap();
            let target = Target::open(&path).unwrap();
            let options = Options {
                blocks: vec![64 << 10],
                depths: vec![2, 32],
                sustained_s: 0.05,
                pages: Pages::Small,
                memory: None,
            };
            let report = measure(&target, &options, &|| false, &mut |_| {}).unwrap();
            assert_eq!((report.through, report.cells.len()), ("pread", 2));
            assert!((1..=storage::PREAD_THREADS).contains(&report.threads) && report.sustained.is_some());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn an_interrupt_ends_it() {
        let f = tempfile::NamedTempFile::new().unwrap();
        f.as_file().set_len(8 << 20).unwrap();
        let target = Target::open(f.path()).unwrap();
        let options =
            Options { blocks: vec![64 << 10], depths: vec![4], sustained_s: 0.0, pages: Pages::Huge, memory: None };
        let r = measure(&target, &options, &|| true, &mut |_| {});
        assert!(matches!(r, Err(ProbeError::Interrupted)));
    }
}

//! Rates of the link between this machine's memory and a GPU, by size of a copy.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::queue::Queue;
use super::{Latencies, Pages, ProbeError, Rate, Target, memory, rate, storage};
use crate::backend::cuda::{Device, Stream};
use crate::machine;

/// Sizes of one copy, in bytes.
pub const SIZES: [usize; 6] = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20];
/// What the cache calls the rate of memory while the link is busy, of all threads but one.
pub const MEMORY_BESIDE: &str = "memory beside h2d";
/// What it calls that of the link while they read memory.
pub const LINK_BESIDE: &str = "h2d beside memory";
const TIME: Duration = Duration::from_millis(200);
const TOGETHER_TIME: Duration = Duration::from_secs(2);
/// Copies handed over before the first is waited for.
const BATCH: usize = 16;
/// Pieces of pinned memory that are copied in turn beside reads of memory. All of them take some 10 ms, so that little of a copy is
/// counted beside nothing.
const PARTS: usize = 8;

/// What the cache calls such a rate where fewer threads read.
pub fn by_threads(kind: &str, threads: usize) -> String {
    format!("{kind} by {threads}")
}

/// What the cache keeps of such measurements with the GPU of this identity, of which the last is by all threads but one.
pub fn kept(measured: &[Beside], identity: &str) -> Vec<Rate> {
    let memory = machine::memory_identity(Path::new("/"));
    let of = |(i, b): (usize, &Beside)| {
        let kind = |kind: &str| if i + 1 == measured.len() { kind.into() } else { by_threads(kind, b.threads) };
        [
            Rate::now(&kind(MEMORY_BESIDE), &memory, b.memory, None, Some(b.threads)),
            Rate::now(&kind(LINK_BESIDE), identity, b.h2d, None, Some(b.threads)),
        ]
    };
    measured.iter().enumerate().flat_map(of).collect()
}

/// Counts of threads at which memory and the link are measured together, of so many processors, one of which drives the link: about a
/// quarter, a half and three quarters of them, and all but one, which comes last.
pub fn counts(n_cpus: usize) -> Vec<usize> {
    let most = n_cpus.saturating_sub(1).max(1);
    let mut counts: Vec<usize> = (1..4).map(|k| (n_cpus * k / 4).clamp(1, most)).chain([most]).collect();
    counts.dedup();
    counts
}

/// Rates of copies of one size, bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// Bytes of one copy.
    pub bytes: usize,
    /// Pinned memory to the GPU.
    pub h2d_pinned: f64,
    /// Pageable memory to the GPU.
    pub h2d_pageable: f64,
    /// GPU to pinned memory.
    pub d2h_pinned: f64,
    /// GPU to pageable memory.
    pub d2h_pageable: f64,
}

/// The outcome.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The driver's name of the GPU.
    pub gpu: String,
    /// Its PCI address.
    pub pci: String,
    /// By size.
    pub cells: Vec<Cell>,
    /// Both directions at once at the largest size: to the GPU, from it, bytes per second.
    pub both_at_once: (f64, f64),
    /// Copies to the GPU while storage is read, as in a run of three tiers; null without storage.
    pub with_storage: Option<Together>,
    /// Copies to the GPU while all processors but one read memory, as in a run of two sites; null unless memory is measured too.
    pub with_memory: Option<Beside>,
    /// The same while fewer of them read.
    pub with_fewer: Vec<Beside>,
}

/// Memory and the link at the same time, bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Beside {
    /// Pinned memory to the GPU.
    pub h2d: f64,
    /// Memory to processors.
    pub memory: f64,
    /// Threads that read it.
    pub threads: usize,
}

/// Storage and the link at the same time, bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Together {
    /// Pinned memory to the GPU.
    pub h2d: f64,
    /// Storage to memory.
    pub storage: f64,
    /// Bytes of a read.
    pub block_bytes: u64,
    /// Reads in flight.
    pub depth: usize,
}

/// The GPU as the cache knows it.
pub fn identity(device: &Device) -> String {
    format!("{} {}", device.info.name, device.info.pci_address)
}

#[derive(Clone, Copy)]
enum Way {
    ToGpu,
    FromGpu,
}

/// Measures the link of `device`.
///
/// # Errors
/// The driver's, or `stop` said so.
pub fn measure(device: &Arc<Device>, stop: &dyn Fn() -> bool, say: &mut dyn FnMut(Cell)) -> Result<Report, ProbeError> {
    let largest = SIZES[SIZES.len() - 1];
    let (here, there) = (device.stream()?, device.stream()?);
    let on_gpu = [device.alloc(largest as u64, "the probe")?, device.alloc(largest as u64, "the probe")?];
    let mut pinned =
        [device.alloc_pinned::<u8>(largest, "the probe")?, device.alloc_pinned::<u8>(largest, "the probe")?];
    let mut pageable = vec![1u8; largest];
    let (pinned_a, pinned_b) = (pinned[0].as_mut_slice().as_mut_ptr(), pinned[1].as_mut_slice().as_mut_ptr());
    let pageable = pageable.as_mut_ptr();
    let mut cells = Vec::new();
    for bytes in SIZES {
        if stop() {
            return Err(ProbeError::Interrupted);
        }
        let one = |host: *mut u8, way: Way| {
            // SAFETY: each buffer holds `largest` bytes, outlives `timed`, which waits for every
            // copy, and is used by this stream alone.
            unsafe { timed(&[(&here, host, on_gpu[0].addr(), way)], bytes) }
        };
        let cell = Cell {
            bytes,
            h2d_pinned: one(pinned_a, Way::ToGpu)?,
            h2d_pageable: one(pageable, Way::ToGpu)?,
            d2h_pinned: one(pinned_a, Way::FromGpu)?,
            d2h_pageable: one(pageable, Way::FromGpu)?,
        };
        say(cell);
        cells.push(cell);
    }
    let both = [(&here, pinned_a, on_gpu[0].addr(), Way::ToGpu), (&there, pinned_b, on_gpu[1].addr(), Way::FromGpu)];
    // SAFETY: as above; the two streams have buffers of their own.
    let each = unsafe { timed(&both, largest)? };
    Ok(Report {
        gpu: device.info.name.clone(),
        pci: device.info.pci_address.clone(),
        cells,
        both_at_once: (each, each),
        with_storage: None,
        with_memory: None,
        with_fewer: Vec::new(),
    })
}

/// Copies to the GPU for as long as another thread reads `target` in blocks and depth of `at`.
///
/// # Errors
/// The driver's, a failed read, or `stop` said so.
pub fn with_storage(
    device: &Arc<Device>,
    target: &Target,
    at: storage::Cell,
    pages: Pages,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<Together, ProbeError> {
    let bytes = SIZES[SIZES.len() - 1];
    let (stream, gpu) = (device.stream()?, device.alloc(bytes as u64, "the probe")?);
    let mut host = device.alloc_pinned::<u8>(bytes, "the probe")?;
    let host = host.as_mut_slice().as_mut_ptr();
    let over = AtomicBool::new(false);
    let read = || {
        let result = Queue::new(target, at.block_bytes, at.depth, 0, pages).and_then(|mut queue| {
            queue.run(TOGETHER_TIME, TOGETHER_TIME, stop, &mut |_| {}, &mut Latencies::default())
        });
        over.store(true, Ordering::Relaxed);
        result
    };
    std::thread::scope(|scope| {
        let reads = scope.spawn(read);
        // SAFETY: both buffers hold `bytes` and outlive the call, which waits for every copy.
        let copies = unsafe {
            timed_until(&[(&stream, host, gpu.addr(), Way::ToGpu)], bytes, BATCH, &|_| over.load(Ordering::Relaxed))
        };
        let reads = reads.join().unwrap_or(Err(ProbeError::Interrupted))?;
        Ok(Together { h2d: copies?, storage: reads.rate(), block_bytes: at.block_bytes, depth: at.depth })
    })
}

/// Copies to the GPU from memory beyond any cache for as long as threads read other memory, by each count of them in `counts`.
///
/// # Errors
/// The driver's, or too little memory is free.
pub fn with_memory(
    device: &Arc<Device>,
    counts: &[usize],
    available: Option<u64>,
    stop: &dyn Fn() -> bool,
) -> Result<Vec<Beside>, ProbeError> {
    let bytes = SIZES[SIZES.len() - 1];
    let (stream, gpu) = (device.stream()?, device.alloc(bytes as u64, "the probe")?);
    let parts = available.map_or(PARTS, |a| PARTS.min((a / 8) as usize / bytes)).max(1);
    let words = memory::words(available)?;
    let mut host = device.alloc_pinned::<u8>(parts * bytes, "the probe")?;
    let host = host.as_mut_slice().as_mut_ptr();
    // SAFETY: each part of the pinned memory lies within it; all outlive `beside`, which waits for every copy.
    let copies: Vec<_> =
        (0..parts).map(|i| (&stream, unsafe { host.add(i * bytes) }, gpu.addr(), Way::ToGpu)).collect();
    let beside = |threads: usize| {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reads = scope.spawn(|| {
                let rate = memory::read(&words, threads);
                over.store(true, Ordering::Relaxed);
                rate
            });
            // SAFETY: as above; one stream does its copies in order, so that they may share the GPU's buffer.
            let each = unsafe { timed_until(&copies, bytes, 1, &|_| over.load(Ordering::Relaxed)) };
            let memory = reads.join().map_err(|_| ProbeError::Interrupted)?;
            Ok(Beside { h2d: each? * parts as f64, memory, threads })
        })
    };
    let not_stopped = |threads: &usize| if stop() { Err(ProbeError::Interrupted) } else { Ok(*threads) };
    counts.iter().map(|threads| not_stopped(threads).and_then(beside)).collect()
}

/// Bytes per second of each of `copies`, which run at the same time, in batches.
///
/// # Safety
/// Host and device address of each copy are good for `bytes` and used by nobody else.
unsafe fn timed(copies: &[(&Stream, *mut u8, u64, Way)], bytes: usize) -> Result<f64, ProbeError> {
    // SAFETY: the caller vouches for the ranges.
    unsafe { timed_until(copies, bytes, BATCH, &|time| time >= TIME) }
}

/// As [`timed`], in batches of `each` of every copy, until `over` says so of the time gone by.
///
/// # Safety
/// As for [`timed`].
unsafe fn timed_until(
    copies: &[(&Stream, *mut u8, u64, Way)],
    bytes: usize,
    each: usize,
    over: &dyn Fn(Duration) -> bool,
) -> Result<f64, ProbeError> {
    let batch = || -> Result<(), ProbeError> {
        for _ in 0..each {
            for &(stream, host, gpu, way) in copies {
                match way {
                    // SAFETY: the caller vouches for the ranges; this function waits below.
                    Way::ToGpu => unsafe { stream.upload(host, gpu, bytes)? },
                    // SAFETY: as above.
                    Way::FromGpu => unsafe { stream.download(gpu, host, bytes)? },
                }
            }
        }
        copies.iter().try_for_each(|(stream, ..)| stream.synchronize().map_err(ProbeError::from))
    };
    // The first copies raise the link to its speed; it sleeps when idle.
    let result = batch().and_then(|()| {
        let (start, mut copied) = (Instant::now(), 0u64);
        while !over(start.elapsed()) {
            batch()?;
            copied += (each * bytes) as u64;
        }
        Ok(rate(copied, start.elapsed().as_secs_f64()))
    });
    // After an error copies may still be under way: the buffers must outlive them.
    for (stream, ..) in copies {
        let _ = stream.synchronize();
    }
    result
}

/// Copies for a moment, so that the link runs at the speed it has under load.
///
/// # Errors
/// The driver's.
pub fn wake(device: &Arc<Device>) -> Result<(), ProbeError> {
    let bytes = SIZES[4];
    let (stream, gpu) = (device.stream()?, device.alloc(bytes as u64, "the probe")?);
    let mut host = device.alloc_pinned::<u8>(bytes, "the probe")?;
    let host = host.as_mut_slice().as_mut_ptr();
    // SAFETY: both buffers hold `bytes` and outlive `timed`, which waits for every copy.
    unsafe { timed(&[(&stream, host, gpu.addr(), Way::ToGpu)], bytes) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beside_the_link_is_measured_by_a_few_counts_of_threads() {
        assert_eq!(counts(1), [1]);
        assert_eq!(counts(2), [1]);
        assert_eq!(counts(4), [1, 2, 3]);
        assert_eq!(counts(16), [4, 8, 12, 15]);
    }

    #[test]
    fn rates_are_kept_by_threads_and_that_of_the_most_by_its_old_name() {
        let at = |threads| Beside { h2d: 5e10, memory: 1e10 * threads as f64, threads };
        let rates = kept(&[at(2), at(3)], "gpu");
        let kinds: Vec<&str> = rates.iter().map(|r| &r.kind[..]).collect();
        assert_eq!(kinds, ["memory beside h2d by 2", "h2d beside memory by 2", MEMORY_BESIDE, LINK_BESIDE]);
        assert_eq!((rates[0].bytes_per_s, rates[2].bytes_per_s, &rates[3].identity[..]), (2e10, 3e10, "gpu"));
    }
}

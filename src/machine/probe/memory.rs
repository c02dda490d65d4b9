//! Rate at which threads read memory that lies in no cache.

use std::sync::RwLock;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{ProbeError, rate};

/// Memory that is read; well beyond any cache of an ordinary machine.
const BYTES: usize = 512 << 20;
/// The least: less may lie in a cache, and its rate would not be RAM's.
const BYTES_MIN: usize = 64 << 20;
/// Of what is free, one part in so many is taken.
const PART: u64 = 4;
const TIME: Duration = Duration::from_millis(400);

/// One count of threads.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// Threads that read, each its own part.
    pub threads: usize,
    /// Bytes per second of all of them.
    pub bytes_per_s: f64,
}

/// Rates by threads: all counts up to four, then powers of two, then `threads` itself; fewer where `stop` says so.
///
/// # Errors
/// If a quarter of `available` bytes is less than what surely lies in no cache.
pub fn measure(threads: usize, available: Option<u64>, stop: &dyn Fn() -> bool) -> Result<Vec<Cell>, ProbeError> {
    let threads = threads.max(1);
    let memory = words(available)?;
    let cell = |n: usize| Cell { threads: n, bytes_per_s: read(&memory, n) };
    let counts = (1..=threads).filter(|&n| n <= 4 || n.is_power_of_two() || n == threads);
    Ok(counts.take_while(|_| !stop()).map(cell).collect())
}

/// Bytes per second that `threads` threads read together, of at most a quarter of what is available.
///
/// # Errors
/// As of [`measure`].
pub fn rate_of(threads: usize, available: Option<u64>) -> Result<f64, ProbeError> {
    Ok(read(&words(available)?, threads.max(1)))
}

/// Memory that [`read`] reads: at most a quarter of what is available.
///
/// # Errors
/// As of [`measure`].
pub(super) fn words(available: Option<u64>) -> Result<Vec<u64>, ProbeError> {
    let bytes = available.map_or(BYTES as u64, |a| a / PART).min(BYTES as u64);
    if bytes < BYTES_MIN as u64 {
        return Err(ProbeError::Room { free: available.unwrap_or(0), needed: BYTES_MIN as u64 * PART });
    }
    Ok((0..bytes / 8).collect())
}

/// Bytes per second that `threads` threads, at least one, read of `memory` together.
pub(super) fn read(memory: &[u64], threads: usize) -> f64 {
    let part = memory.len() / threads;
    let reading = |part: &[u64]| {
        let (start, mut bytes) = (Instant::now(), 0u64);
        while start.elapsed() < TIME {
            std::hint::black_box(sum(std::hint::black_box(part)));
            bytes += size_of_val(part) as u64;
        }
        rate(bytes, start.elapsed().as_secs_f64())
    };
    // Held until all threads are there; with fewer than asked for, those that could be had read.
    let gate = RwLock::new(());
    std::thread::scope(|scope| {
        let closed = gate.write();
        let workers: Vec<_> = memory
            .chunks_exact(part.max(1))
            .take(threads)
            .filter_map(|chunk| {
                let work = || {
                    drop(gate.read());
                    reading(chunk)
                };
                std::thread::Builder::new().spawn_scoped(scope, work).ok()
            })
            .collect();
        drop(closed);
        if workers.is_empty() {
            // No thread could be had: a rate of nothing would be taken for the machine's.
            return reading(memory);
        }
        workers.into_iter().filter_map(|w| w.join().ok()).sum()
    })
}

/// Eight sums side by side, which the compiler keeps in vector registers.
fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 8];
    for eight in words.chunks_exact(8) {
        for (lane, word) in lanes.iter_mut().zip(eight) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().fold(0, |a, b| a.wrapping_add(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_count_of_threads_is_measured_once() {
        let cells = measure(2, Some(256 << 20), &|| false).unwrap();
        assert_eq!(cells.iter().map(|c| c.threads).collect::<Vec<_>>(), [1, 2]);
        assert!(cells.iter().all(|c| c.bytes_per_s > 0.0));
        assert!(measure(2, Some(256 << 20), &|| true).unwrap().is_empty());
    }

    #[test]
    fn what_fits_a_cache_is_not_measured() {
        assert!(matches!(rate_of(2, Some(255 << 20)), Err(ProbeError::Room { .. })));
    }
}

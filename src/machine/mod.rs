//! What this machine has: memory, cgroup limits, processors, drives, GPUs.
//!
//! Facts are read below an injectable root, so that tests use fake trees. What cannot be read is
//! `None`, never an error and never a guess.

mod memory;

pub use memory::{Memory, memory};

use std::num::NonZero;

/// Processors this process may run on.
pub fn n_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// Largest resident set of this process so far, in bytes (`VmHWM`).
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    memory::kib_field(&status, "VmHWM:")
}

//! What this machine has: memory, cgroup limits, processors, drives, GPUs.
//!
//! Facts are read below an injectable root, so that tests use fake trees. What cannot be read is
//! `None`, never an error and never a guess.

pub mod doctor;
pub mod facts;
mod memory;
pub mod ollama;
pub mod pressure;
pub mod probe;

pub use memory::{Memory, Shortage, memory};

use std::num::NonZero;

/// Processors this process may run on.
pub fn n_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// Processor and installed memory, by which a measured memory rate is known again.
pub fn memory_identity(root: &std::path::Path) -> String {
    let info = std::fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
    let model = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("unknown processor", |(_, name)| name.trim());
    let gib = memory(root).total.map_or(0, |t| t.div_ceil(1 << 30));
    format!("{model}, {gib} GiB")
}

/// The same with the threads that compute, by which a measured rate of decoding is known again.
pub fn compute_identity(root: &std::path::Path, threads: usize) -> String {
    format!("{}, {threads} threads", memory_identity(root))
}

/// Largest resident set of this process so far, in bytes (`VmHWM`).
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    memory::kib_field(&status, "VmHWM:")
}

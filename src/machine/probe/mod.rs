//! Measures the links of this machine: storage, memory, and the one to a GPU.
//!
//! Reads only: files and devices are opened for reading and never written. Rates are bytes per second
//! over wall time, from the first request to the last completion.

mod by_reader;
mod cache;
mod latency;
pub mod link;
pub mod memory;
pub mod plot;
mod queue;
pub mod storage;
mod target;
mod walk;

pub use by_reader::{BoundDrive, open_bound};
pub use cache::{KEPT_BLOCK_MIN, Rate, file as cache_file, measured, record, today, utc};
pub use latency::{Latencies, Latency};
pub use queue::{Pages, Span};
pub use target::Target;

use crate::units::format_bytes;

/// Why a link could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The path leads to nothing that can be read.
    #[error("{path}: {why}")]
    Target {
        /// As the user named it.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// A read failed.
    #[error("{path}: reading {len} bytes at {offset} failed: {why}")]
    Read {
        /// The file or device.
        path: String,
        /// First byte.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// The system's words.
        why: String,
    },
    /// io_uring is refused.
    #[error("io_uring is not available here ({0}); check `sysctl kernel.io_uring_disabled`")]
    Uring(std::io::Error),
    /// Memory for the buffers is missing.
    #[error(transparent)]
    Memory(#[from] crate::memory::ArenaError),
    /// The GPU's driver refused.
    #[error(transparent)]
    Gpu(#[from] crate::backend::BackendError),
    /// Too little is free.
    #[error("the rate of RAM is read from memory that no cache holds, for which {} must be free, but {} are", format_bytes(*.needed), format_bytes(*.free))]
    Room {
        /// Bytes that are free.
        free: u64,
        /// Bytes that must be.
        needed: u64,
    },
    /// The probe was interrupted.
    #[error("interrupted")]
    Interrupted,
}

/// Bytes per second, 0 for no time.
fn rate(bytes: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { bytes as f64 / seconds } else { 0.0 }
}

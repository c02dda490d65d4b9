//! Who brings what to where, and when: [`Frames`] decides, links carry.
//!
//! `frames` is the machine (pure), `link` what it asks of a way of bytes, `reader` and `upload` are the two ways (storage
//! to RAM, RAM to a device), `threads` drives each by a thread of its own, `feed` is what computation sees of them,
//! `latency` counts how long moves wait for their start.

mod feed;
mod frames;
#[cfg(test)]
mod frames_tests;
mod latency;
mod link;
mod reader;
#[cfg(test)]
mod simulation;
mod threads;
#[cfg(test)]
mod threads_tests;
mod upload;

pub use feed::{Feed, Units};
pub use frames::{CacheCounts, Frames, Hold, Move, Place, Policy, PoolSpec, Rank, Spec, Step};
pub use latency::Latencies;
pub use link::{Carried, Cause, Done, Link, Refusal};
pub use threads::{CacheStats, DeviceConfig, Flow, FlowConfig, LinkStats, Taken, links};
pub use upload::COPIES_MAX;

#[cfg(test)]
thread_local! {
    /// The mutation that this thread's machines have; see [`simulation`].
    static MUTANT: std::cell::Cell<&'static str> = const { std::cell::Cell::new("") };
}

/// Whether a line is to be wrong, so that the simulation shows that it would be seen.
#[cfg(test)]
fn mutant(name: &str) -> bool {
    MUTANT.get() == name
}

#[cfg(not(test))]
const fn mutant(_: &str) -> bool {
    false
}

//! Who brings what to where, and when: [`Frames`] decides, links carry.

mod frames;
#[cfg(test)]
mod simulation;

pub use frames::{Frames, Hold, Move, Place, Policy, PoolSpec, Rank, Spec, Step};

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

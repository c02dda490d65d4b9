//! Units, slots, the N-buffer ring, its state machine and its timeline.
//!
//! `unit` says where a unit's bytes lie in a slot, `ring` is the state machine (pure), `streamer`
//! drives it with a reader on a thread of its own, `trace` keeps what happened when.

mod ring;
mod streamer;
mod trace;
mod unit;

pub use ring::{Acquire, Ring, Step};
pub use streamer::{StreamError, StreamStats, Streamer, StreamerConfig, load};
pub use trace::{Event, EventKind, Trace};
pub use unit::{SpanIn, UnitLayout};

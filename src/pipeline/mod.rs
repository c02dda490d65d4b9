//! Units, slots, the N-buffer ring, its state machine and its timeline.
//!
//! `unit` says where a unit's bytes lie in a slot, `ring` is the state machine (pure), `streamer`
//! drives it with a reader on a thread of its own, `uploads` drives a second one with a copy engine
//! where a device computes from its own memory, `feed` is what computation sees of either, `trace`
//! keeps what happened when.

mod feed;
mod load;
mod ring;
mod signals;
mod streamer;
mod trace;
mod unit;
mod uploads;

pub use feed::{Direct, Feed, FeedStats};
pub use load::{DeviceUnit, Progress, load, load_to_device};
pub use ring::{Acquire, Kept, Ring, Step};
pub use streamer::{Staged, StreamError, StreamStats, Streamer, StreamerConfig};
pub use trace::{Event, EventKind, Trace, write_events};
pub use unit::{SpanIn, UnitLayout};
pub use uploads::{Uploads, UploadsConfig};

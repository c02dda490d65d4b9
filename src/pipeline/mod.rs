//! What is the same for all ways of weights: units' layout in a frame, loading, the timeline, errors.
//!
//! `unit` says where a unit's bytes lie in a frame, `load` brings resident units before streaming starts, `turn` those that are
//! requantised on the way, `trace` keeps what happened when. What streams is brought by the room `flow`.

mod error;
mod load;
mod trace;
mod turn;
mod unit;

pub use error::StreamError;
pub use load::{DeviceUnit, Progress, load, load_to_device};
pub use trace::{Event, EventKind, Trace, write_events};
pub use turn::{Rest, Slots, TurnedSpan, TurnedUnit, Turning, load_turned, staging};
pub use unit::{SpanIn, UnitLayout};

//! Machine facts and limits to homes, buffers and predicted speed; pure functions, no I/O.

mod device;
mod place;
mod size;

pub use place::{BUFFERS_MAX, Home, Limits, Plan, PlanError, Tiers, UnitSize, place};
pub use size::{format_bytes, parse_size};

//! Machine facts and limits to homes, buffers and predicted speed; pure functions, no I/O.

mod assign;
mod beside;
mod costs;
mod device;
mod hits;
mod homes;
mod machine;
mod place;
mod predict;
mod simulate;
mod work;

pub use crate::units::{format_at_least, format_bytes, parse_size};
pub use assign::{SiteRates, assign, best_slice};
pub use beside::Beside;
pub use costs::{Costs, Time};
pub use device::SLOT_ALIGN;
pub use hits::{Replay, hit_rates, replay};
pub use homes::{
    BUFFERS_MAX, BUFFERS_MIN, Cache, Home, Limits, Plan, PlanError, Tiers, TooFewSlots, UnitPart, UnitSize,
};
pub use machine::{CpuSide, Fewer, GpuSide, Machine, PROFILES, RamSide, Rate, SHARE_MAX, Speed, StorageSide};
pub use place::place;
pub use predict::{COPY_TRANSFERS, LinkName, Rates, Roofline, Traffic, roofline};
pub use simulate::{COPY_GAP_S, Caching, Outcome, PassWork, Setup, Shares, SimCache, SimUnit};
pub use work::{Site, UnitWork, cpu_decode_bytes_per_s, pass_s};

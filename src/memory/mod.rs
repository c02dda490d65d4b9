//! The staging arena: one mapping that storage reads into and backends compute or copy from. And [`bounded`]: work on
//! outside data within limits of memory and time.

mod arena;
pub mod bounded;

pub use arena::{Arena, ArenaError, Region};

//! The staging arena: one mapping that storage reads into and backends compute or copy from.

mod arena;

pub use arena::{Arena, ArenaError, Region};

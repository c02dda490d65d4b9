//! `nt` runs large language models that are larger than VRAM and larger than RAM on one machine.
//!
//! A model is a list of *units* of weights. Each has a home tier (VRAM, pinned RAM, NVMe) and is
//! brought through one ring of buffers to where it is computed. See `docs/architecture.md`.

pub mod backend;
pub mod cli;
pub mod engine;
pub mod flow;
pub mod gguf;
pub mod library;
pub mod machine;
pub mod memory;
pub mod model;
pub mod pipeline;
pub mod plan;
pub mod report_page;
pub mod serve;
pub mod state;
pub mod storage;
pub mod tokenizer;
pub mod units;

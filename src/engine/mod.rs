//! A session: prefill, decode, sampling, stop conditions.
//!
//! `Opened` is a model's header, tokenizer and structure; `Session` adds the plan, the arena, the
//! ring and a backend; `generate` turns a prompt into text.

mod ceilings;
mod generate;
mod links;
mod opened;
mod places;
mod sampler;
mod session;
mod source;
mod staged;
mod start;
mod stop;
mod verify;
mod weights;

pub use generate::{Generation, StopReason, generate};
pub use links::Links;
pub use opened::{EngineError, Opened};
pub use sampler::{Sampler, SamplerParams, argmax};
pub use session::{Options, Session};
pub use start::OpenBackend;
pub use stop::StopFilter;
pub use verify::{Verified, verify};

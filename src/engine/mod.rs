//! A session: prefill, decode, sampling, stop conditions.
//!
//! `Opened` is a model's header, tokenizer and structure; `Session` adds the plan, the arena, the
//! ring and a backend; `generate` turns a prompt into text.

mod apart;
mod beside;
mod budget;
mod by_site;
mod ceilings;
pub mod constraint;
mod dry;
mod forecast;
mod generate;
mod generator;
mod here;
mod hits;
mod links;
mod opened;
mod places;
mod predicted;
mod repeat;
mod requant;
mod reuse;
mod sampler;
mod saved;
mod schedule;
mod sensitivity;
mod session;
mod sizes;
mod smaller;
mod source;
mod staged;
mod start;
mod steps;
mod stop;
mod stripes;
mod verify;
mod weights;
mod window;
mod works;

pub use beside::Sites;
pub use budget::ThoughtBudget;
pub use by_site::{LinkWork, SiteWork};
pub use constraint::{ConstraintError, Form, Grammar, Grammars, Marks, Reasoning};
pub use dry::DryParams;
pub use forecast::{Forecast, Prediction, choose_buffers, nearest, refused_by_gpu};
pub use generate::{Generation, Grown, Request, StopReason};
pub use generator::{Ended, Generator, generate};
pub use here::{Here, this_machine};
pub use hits::mixture;
pub use links::{Links, Stalls};
pub use opened::{EngineError, Opened};
pub use predicted::Predicted;
pub use repeat::Recipe;
pub use requant::RequantReport;
pub use reuse::HitCurve;
pub use sampler::{Sampler, SamplerParams, argmax};
pub use saved::{Saved, SavedError};
pub use schedule::JobId;
pub use sensitivity::{Change, sensitivity};
pub use session::{ExpertSlots, Options, Part, RequestError, Session};
pub use smaller::{SmallerFile, smaller_files};
pub use source::open_header;
pub use staged::{StagedDrive, staged_drives};
pub use start::{OpenBackend, Starting, beyond_training, too_few_slots};
pub use stop::{Piece, StopFilter};
pub use verify::{Verified, verify};

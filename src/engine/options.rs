//! What a session is started with.

use std::path::PathBuf;
use std::sync::Arc;

use super::{ExpertSlots, HitCurve, Recipe, Sites, Slices, batch};
use crate::backend::BackendKind;
use crate::gguf::TensorType;
use crate::model::{ForcedRouting, Model};
use crate::plan::Tiers;
use crate::storage::ReaderKind;

/// What a session is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where operations run.
    pub backend: BackendKind,
    /// Bytes to take of a GPU's memory, everything counted; `None` for what is free, less a margin.
    pub vram: Option<u64>,
    /// Which sites compute, where the backend is a device with memory of its own.
    pub sites: Sites,
    /// Threads that compute.
    pub threads: usize,
    /// Bytes that weights may take in RAM; `None` for what the machine can spare.
    pub ram: Option<u64>,
    /// Whether weights may stay on storage.
    pub storage: bool,
    /// Where to read weights from: a drive, or copies of the model (files or directories); none for
    /// where it lies.
    pub copies: Vec<PathBuf>,
    /// How storage is read.
    pub reader: ReaderKind,
    /// Compare each read with what is recorded of the model, not only the first from a bound drive.
    pub verify: bool,
    /// Element type of the KV cache.
    pub kv_type: TensorType,
    /// Sequences that may have tokens at once, where each has a recurrent state or pages of recent positions.
    pub sequences: usize,
    /// Whether layers with windows may keep the last positions of each sequence alone. A sequence goes back a little then, or to
    /// its beginning.
    pub recent: bool,
    /// Whether experts that stay on storage may have caches in RAM.
    pub caches: bool,
    /// Whether a device keeps experts that live in RAM in slots, the last used, in place of some that live in its memory.
    pub expert_slots: ExpertSlots,
    /// Whether feed-forward parts of dense blocks are cut between a device and processors beside it.
    pub slices: Slices,
    /// The experts that tokens choose, in place of their routers' choices; for benchmarks and predictions.
    pub routing: Option<Arc<ForcedRouting>>,
    /// How often slots of experts hit, as earlier runs of the model have counted; `None` to look it up once, for a session or a
    /// forecast.
    pub curve: Option<Arc<HitCurve>>,
    /// Slots of the ring; `None` to choose.
    pub n_buffers: Option<usize>,
    /// Whether a forecast chooses them by rates that are guesses, too, which a session on this machine does not.
    pub buffers_by_guess: bool,
    /// Whether experts may have more frames on a device than that, so that a prompt's are brought while its attention is computed.
    pub more_frames: bool,
    /// Counts of blocks per tier; `None` to choose.
    pub tiers: Option<Tiers>,
    /// Tiers one after the other instead of interleaved, where their counts are given.
    pub stacked: bool,
    /// Positions of the KV cache.
    pub n_ctx: usize,
    /// Of these, the positions of a prompt that is known: no fewer are advised where more do not fit.
    pub prompt_ctx: usize,
    /// Tokens a pass may carry.
    pub max_batch: usize,
    /// Tokens of prompts in a pass while other texts wait for theirs, if that is fewer.
    pub shared_batch: usize,
    /// Where the plan may choose both ([`super::with_batch`]), tokens of the longest prompt to expect, or more; `None` to leave them.
    pub longest_prompt: Option<usize>,
    /// Rows of logits a pass may ask for.
    pub outputs: usize,
    /// The type that larger matrices get while they are loaded; `None` to leave all as the file has them.
    pub requant: Option<TensorType>,
    /// Keep a timeline.
    pub timeline: bool,
    /// The plan to make again, in place of one by the limits above.
    pub repeat: Option<Arc<Recipe>>,
}

impl Options {
    /// Tokens of a pass unless told or chosen: results do not depend on how a prompt is cut.
    pub const BATCH: usize = batch::USUAL;
    /// Most tokens of a pass.
    pub const MAX_BATCH: usize = batch::MOST;

    /// A context of `n_ctx` positions and one row of logits on a backend, all else as the machine and the planner
    /// choose; no timeline.
    pub fn new(backend: BackendKind, n_ctx: usize) -> Options {
        Options {
            backend,
            vram: None,
            sites: Sites::Auto,
            threads: crate::machine::n_cpus(),
            ram: None,
            storage: true,
            copies: Vec::new(),
            reader: ReaderKind::Auto,
            verify: false,
            kv_type: TensorType::F16,
            sequences: 1,
            recent: true,
            caches: true,
            expert_slots: ExpertSlots::Auto,
            slices: Slices::Auto,
            routing: None,
            curve: None,
            n_buffers: None,
            buffers_by_guess: true,
            more_frames: true,
            tiers: None,
            stacked: false,
            n_ctx,
            prompt_ctx: 0,
            max_batch: Options::BATCH,
            shared_batch: Options::BATCH,
            longest_prompt: None,
            outputs: 1,
            requant: None,
            timeline: false,
            repeat: None,
        }
    }
    /// With what earlier runs of this model have counted of its choices.
    pub(super) fn with_curve(self, model: &Model) -> Options {
        let curve = self.curve.clone().or_else(|| HitCurve::known(model).map(Arc::new));
        Options { curve, ..self }
    }
}

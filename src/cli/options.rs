//! The options of a session from those of the command line.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::args::{Auto, BackendArg, ExpertCacheArg, KvArg, LayoutArg, ReaderArg, SiteArg};
use super::{Failure, Placement};
use crate::backend::BackendKind;
use crate::engine::{ExpertSlots, Opened, Options, Recipe, Sites};
use crate::gguf::TensorType;
use crate::storage::ReaderKind;
/// The session's options from the command line; `n_ctx` and `outputs` are the caller's.
pub(super) fn options(p: &Placement, kv_default: KvArg) -> Result<Options, Failure> {
    let (backend, sites) = sites(p)?;
    let batch = p.batch.map_or(Options::BATCH, usize::from);
    let found = p.plan.as_deref().map(Recipe::find).transpose();
    let repeat = found.map_err(Failure::usage)?.map(Arc::new);
    let kv = |arg| match arg {
        KvArg::F16 => TensorType::F16,
        KvArg::F32 => TensorType::F32,
        KvArg::Q8_0 => TensorType::Q8_0,
    };
    // A plan that is made again has a type of its own.
    let kv_default = repeat.as_ref().map_or(kv(kv_default), |recipe| recipe.kv_type());
    Ok(Options {
        sequences: 1,
        recent: !p.swa_full,
        backend,
        sites,
        vram: p.vram.given(),
        threads: p.threads.given().unwrap_or_else(crate::machine::n_cpus),
        ram: p.ram.given(),
        storage: p.tier_c != "none",
        copies: named_places(p)?,
        reader: reader_kind(p.reader),
        verify: p.verify,
        kv_type: p.kv.map_or(kv_default, kv),
        caches: true,
        expert_slots: match p.expert_cache {
            ExpertCacheArg::Auto => ExpertSlots::Auto,
            ExpertCacheArg::On => ExpertSlots::On,
            ExpertCacheArg::Off => ExpertSlots::Off,
        },
        slices: p.ffn_slices,
        routing: None,
        curve: None,
        n_buffers: p.n_buffers.given(),
        buffers_by_guess: true,
        more_frames: p.n_buffers.given().is_none(),
        tiers: p.tiers,
        stacked: p.layout == LayoutArg::Stacked,
        n_ctx: 0,
        prompt_ctx: 0,
        max_batch: batch,
        shared_batch: batch,
        // Commands that know their prompts say how long those are.
        longest_prompt: p.batch.is_none().then_some(usize::MAX),
        outputs: 1,
        requant: p.requant(),
        timeline: p.timeline.is_some(),
        repeat,
    })
}

/// What computes.
fn sites(p: &Placement) -> Result<(BackendKind, Sites), Failure> {
    let backend = match (p.site, p.backend) {
        (SiteArg::Gpu | SiteArg::Both, BackendArg::Cpu) => {
            return Err(Failure::usage("--backend cpu leaves no GPU for --site gpu or both; leave one of them away"));
        }
        (SiteArg::Cpu, BackendArg::Cuda) => {
            return Err(Failure::usage("--backend cuda and --site cpu contradict each other; leave one of them away"));
        }
        (SiteArg::Auto, BackendArg::Auto) => BackendKind::Auto,
        (SiteArg::Cpu, _) | (_, BackendArg::Cpu) => BackendKind::Cpu,
        _ => BackendKind::Cuda,
    };
    let sites = match (p.site, p.exact) {
        (SiteArg::Both, true) => {
            return Err(Failure::usage("--exact computes at one site, --site both at two; leave one of them away"));
        }
        (SiteArg::Both, false) => Sites::Both,
        (SiteArg::Auto, false) => Sites::Auto,
        _ => Sites::One,
    };
    Ok((backend, sites))
}

/// The reader that `--reader` asks for.
pub(super) fn reader_kind(reader: ReaderArg) -> ReaderKind {
    match reader {
        ReaderArg::Auto => ReaderKind::Auto,
        ReaderArg::IoUring => ReaderKind::IoUring,
        ReaderArg::Pread => ReaderKind::Pread,
        ReaderArg::Vfio => ReaderKind::Vfio,
    }
}

/// The places that the option of tier C names.
pub(super) fn named_places(p: &Placement) -> Result<Vec<PathBuf>, Failure> {
    if p.tier_c == "none" { Ok(Vec::new()) } else { places(&p.tier_c) }
}

/// The places that `--tier-c` names, several between commas; none for `auto`.
pub(super) fn places(text: &str) -> Result<Vec<PathBuf>, Failure> {
    if text == "auto" {
        return Ok(Vec::new());
    }
    // A path may have commas of its own.
    let places: Vec<&str> =
        if Path::new(text).exists() { vec![text] } else { text.split(',').map(str::trim).collect() };
    match places.iter().find(|p| p.is_empty() || **p == "none") {
        Some(_) => Err(Failure::usage(format!(
            "--tier-c {text}: none, auto, or drives, files or directories between commas were expected"
        ))),
        None => Ok(places.into_iter().map(PathBuf::from).collect()),
    }
}

/// Positions of the KV cache: `--ctx`, or what is wished up to what the model was trained on.
/// `needed` tokens must fit; the first generated one takes no place, since it follows from their logits.
pub(super) fn context(p: &Placement, opened: &Opened, needed: usize, wished: usize) -> Result<usize, Failure> {
    let n_ctx = match p.ctx(&opened.model.hparams) {
        Auto::Given(n) => n,
        Auto::Auto => wished.max(needed).min(opened.model.hparams.n_ctx_reach),
    };
    let reach = opened.model.hparams.n_ctx_reach;
    if needed > n_ctx {
        let cure = match needed > reach {
            true => "shorten the prompt, or give a larger --ctx: text gets worse beyond what the model was trained on",
            false => "shorten the prompt or give a larger --ctx",
        };
        return Err(Failure::limits(format!(
            "the prompt has {needed} tokens, but the context holds {n_ctx} (the model was trained on {reach}); {cure}"
        )));
    }
    Ok(n_ctx)
}

//! How a model's units lie in memory, and the plan that places them.

use std::path::Path;
use std::sync::Arc;

use super::made::gathered;
use super::requant::turned;
use super::sizes::unit_size;
use super::{ExpertSlots, Options};
use crate::gguf::TensorInfo;
use crate::machine;
use crate::model::{Model, Requantised, UnitSpec};
use crate::pipeline::{SpanIn, TurnedSpan, UnitLayout, staging};
use crate::plan::{Home, Limits, Plan, PlanError, UnitSize, place};
use crate::storage::{Alignment, FileId};

/// Rows of the embedding that are read at once.
const ROWS_AT_ONCE: u64 = 64;

/// Alignment of reads of each file.
pub(super) type Alignments<'a> = &'a dyn Fn(FileId) -> Alignment;

/// What the reader's alignment makes of the model's units.
pub(super) struct Sizes {
    /// As they rest; once homes are known ([`Sizes::at`]), as they are in RAM or in VRAM.
    pub layouts: Arc<[UnitLayout]>,
    /// As they are read from storage.
    stored: Arc<[UnitLayout]>,
    /// By unit, what becomes of the spans of one that is made of what is read; else nothing.
    pub turned: Vec<Vec<TurnedSpan>>,
    /// Regions that those are read to while they are loaded: how many, and the bytes of each.
    pub turning: (usize, u64),
    pub embedding: UnitLayout,
    /// Of the embeddings for each block, where there are such.
    pub per_block: Option<UnitLayout>,
    /// Bytes of the region that rows of the embedding are read to.
    pub rows: u64,
}

impl Sizes {
    /// Bytes of all units.
    pub fn weights(&self) -> u64 {
        self.layouts.iter().map(|l| l.slot_bytes).sum()
    }

    /// Of a model as the file has it, which `threads` threads requantise where that is asked for.
    pub fn new(model: &Model, requant: Option<&Requantised>, threads: usize, alignment: Alignments) -> Sizes {
        // What has columns of a matrix is made of what is read, and lies nowhere but where it rests.
        let mut spans = Vec::with_capacity(model.units.len());
        let mut as_read = |u: &UnitSpec| {
            let (layout, made) = gathered(u).unwrap_or_else(|| (layout(u, alignment), Vec::new()));
            spans.push(made);
            layout
        };
        let stored: Arc<[UnitLayout]> = model.units.iter().map(&mut as_read).collect();
        let mut layouts = Arc::clone(&stored);
        if let Some(requant) = requant {
            let turned = |u: usize| turned(requant, u).unwrap_or_else(|| (stored[u].clone(), Vec::new()));
            let (new, of): (Vec<_>, Vec<_>) = (0..stored.len()).map(turned).unzip();
            (layouts, spans) = (new.into(), of);
        }
        let turning = staging(spans.iter().flatten(), threads, alignment);
        Sizes {
            layouts,
            stored,
            turned: spans,
            turning,
            embedding: tensor_layout(&model.embedding, alignment),
            per_block: model.per_block.as_ref().map(|t| tensor_layout(t, alignment)),
            rows: rows_region_bytes(model, alignment),
        }
    }

    /// With the layouts that units have at their homes.
    pub fn at(mut self, homes: &[Home]) -> Sizes {
        self.layouts = self.layouts_at(homes).into();
        self
    }

    /// Those layouts.
    pub fn layouts_at(&self, homes: &[Home]) -> Vec<UnitLayout> {
        let of = |u: usize| if homes[u] == Home::C { &self.stored[u] } else { &self.layouts[u] };
        (0..homes.len()).map(|u| of(u).clone()).collect()
    }

    /// Bytes of RAM that are taken beside units and slots.
    fn reserved(&self) -> u64 {
        self.rows + self.turning.0 as u64 * self.turning.1
    }
}

fn layout(unit: &UnitSpec, alignment: Alignments) -> UnitLayout {
    let spans: Vec<SpanIn> =
        unit.spans.iter().map(|s| SpanIn { file: FileId(s.shard as u16), offset: s.offset, bytes: s.bytes }).collect();
    UnitLayout::new(&spans, alignment)
}

pub(super) fn tensor_layout(t: &TensorInfo, alignment: Alignments) -> UnitLayout {
    UnitLayout::new(&[SpanIn { file: FileId(t.shard as u16), offset: t.offset, bytes: t.bytes }], alignment)
}

fn rows_region_bytes(model: &Model, alignment: Alignments) -> u64 {
    let tables = [Some(&model.embedding), model.per_block.as_ref()];
    let bytes = tables.into_iter().flatten().map(|t| {
        let (row, align) = (t.bytes / model.n_vocab as u64, u64::from(alignment(FileId(t.shard as u16)).offset));
        (row.next_multiple_of(align) + align).next_multiple_of(4096) * ROWS_AT_ONCE
    });
    bytes.max().unwrap_or(0)
}

/// Whether the embedding has a place of its own in RAM: a tied head there serves its rows too.
pub(super) fn own_embedding(model: &Model, on_device: bool) -> bool {
    !model.tied || on_device
}

/// The plan, for `vram` bytes of device memory if weights are computed there; `workspace` bytes of RAM are the
/// backend's.
pub(super) fn make_plan(
    model: &Model,
    sizes: &Sizes,
    vram: Option<u64>,
    workspace: u64,
    options: &Options,
) -> Result<Plan, PlanError> {
    let size = |((u, l), stored): ((&UnitSpec, &UnitLayout), &UnitLayout)| UnitSize {
        stored_bytes: stored.slot_bytes,
        ..unit_size(u, l.slot_bytes)
    };
    let units: Vec<UnitSize> =
        model.units.iter().zip(sizes.layouts.iter()).zip(sizes.stored.iter()).map(size).collect();
    let own = own_embedding(model, vram.is_some()).then_some(sizes.embedding.slot_bytes);
    let tables = [own, sizes.per_block.as_ref().map(|l| l.slot_bytes)];
    let limits = Limits {
        ram: options.ram.or_else(|| machine::memory(Path::new("/")).budget()).unwrap_or(u64::MAX / 4),
        vram,
        n_buffers: options.n_buffers,
        more_frames: options.more_frames,
        tiers: options.tiers,
        stacked: options.stacked,
        storage: options.storage,
        reserved: sizes.reserved(),
        workspace,
        embedding: tables.into_iter().flatten().reduce(u64::saturating_add),
        cached_choices: if options.caches { model.hparams.n_experts_used } else { 0 },
        slot_choices: if options.expert_slots == ExpertSlots::On { model.hparams.n_experts_used } else { 0 },
    };
    place(&units, &limits)
}

//! Units as the plan sees them.

use crate::model::{Model, UnitKind, UnitSpec};
use crate::plan::{UnitPart, UnitSize};

/// A unit that takes so many bytes in memory.
pub(super) fn unit_size(unit: &UnitSpec, slot_bytes: u64) -> UnitSize {
    let (block, part) = match unit.kind {
        UnitKind::Attention(i) => (Some(i), UnitPart::Attention),
        UnitKind::FeedForward(i) => (Some(i), UnitPart::FeedForward),
        UnitKind::Slice(i) => (Some(i), UnitPart::Slice),
        UnitKind::Shared(i) => (Some(i), UnitPart::Shared),
        UnitKind::Expert { layer, .. } => (Some(layer), UnitPart::Expert),
        UnitKind::Head(_) => (None, UnitPart::Head),
    };
    UnitSize::new(slot_bytes, block, part)
}

/// All units of a model, each with the bytes of its tensors alone.
pub(super) fn unit_sizes(model: &Model) -> Vec<UnitSize> {
    model.units.iter().map(|u| unit_size(u, u.bytes())).collect()
}

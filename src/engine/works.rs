//! What the units of a model ask of a pass, whoever computes it.

use super::sizes::unit_size;
use crate::model::{Model, Tape, UnitKind};
use crate::pipeline::UnitLayout;
use crate::plan::UnitWork;

/// What each unit of the model asks of a pass.
pub(super) fn works(model: &Model, layouts: &[UnitLayout]) -> Vec<UnitWork> {
    let h = &model.hparams;
    let of = |(u, l): (&crate::model::UnitSpec, &UnitLayout)| UnitWork {
        size: unit_size(u, l.slot_bytes),
        bytes: u.bytes(),
        matrices: Vec::new(),
        share: match u.kind {
            UnitKind::Expert { .. } => h.n_experts_used as f64 / h.n_experts as f64,
            _ => 1.0,
        },
        miss: 1.0,
        operations: 0,
    };
    let mut works: Vec<UnitWork> = model.units.iter().zip(layouts).map(of).collect();
    for (_, _, t) in model.matrices() {
        let bytes = t.rows as u64 * t.ty.row_bytes(t.cols).unwrap_or(0) as u64;
        let elements = (t.rows * t.cols) as u64;
        let matrices = &mut works[t.unit].matrices;
        match matrices.iter_mut().find(|m| m.0 == t.ty) {
            Some(m) => (m.1, m.2) = (m.1 + bytes, m.2 + elements),
            None => matrices.push((t.ty, bytes, elements)),
        }
    }
    for (unit, operations) in Tape::new(model).operations(model) {
        works[unit].operations = operations;
    }
    works
}

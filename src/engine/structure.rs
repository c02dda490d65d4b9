//! Ids of what plans follow from.

use sha2::{Digest as _, Sha256};

use crate::model::Model;

/// Digits of an id.
pub(super) const DIGITS: usize = 12;

/// Hexadecimal digits that follow from all parts and their lengths.
pub(super) fn digest(parts: impl IntoIterator<Item = String>) -> String {
    let mut sum = Sha256::new();
    for part in parts {
        sum.update((part.len() as u64).to_le_bytes());
        sum.update(part);
    }
    sum.finalize().iter().take(DIGITS / 2).map(|byte| format!("{byte:02x}")).collect()
}

/// What a plan sees of a model.
pub(super) fn structure(model: &Model) -> String {
    let units = model.units.iter().map(|u| format!("{} {}", u.name, u.bytes()));
    let matrices = model.matrices().into_iter().map(|(_, _, t)| format!("{} {} {} {}", t.unit, t.ty, t.rows, t.cols));
    let arch = format!("{} {}", model.hparams.arch.name, model.hparams.n_experts_used);
    digest([arch].into_iter().chain(units).chain(matrices))
}

/// What a model is whatever its types are, so that requantising changes nothing of it.
pub(super) fn shape(model: &Model) -> String {
    let units = model.units.iter().map(|u| u.name.clone());
    let matrices = model.matrices().into_iter().map(|(_, _, t)| format!("{} {} {}", t.unit, t.rows, t.cols));
    let arch = format!("{} {}", model.hparams.arch.name, model.hparams.n_experts_used);
    digest([arch].into_iter().chain(units).chain(matrices))
}

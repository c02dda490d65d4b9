//! What caches of experts are expected to have.

use std::sync::Arc;

use super::Options;
use super::sizes::unit_sizes;
use crate::model::{ForcedRouting, Mixture, Model, Routes, UnitKind};
use crate::plan::{Cache, Caching, Home, Plan, SimCache, hit_rates};

/// Blocks with routed experts, in their order, and the first unit of each block's experts.
fn routed(model: &Model) -> Vec<(usize, usize)> {
    let mut blocks: Vec<(usize, usize)> = Vec::new();
    for (unit, u) in model.units.iter().enumerate() {
        if let UnitKind::Expert { layer, .. } = u.kind
            && blocks.last().is_none_or(|b| b.0 != layer)
        {
            blocks.push((layer, unit));
        }
    }
    blocks
}

/// The mixture of a model: no layers where it has none.
pub fn mixture(model: &Model) -> Mixture {
    let h = &model.hparams;
    Mixture { layers: routed(model).len(), experts: h.n_experts, used: h.n_experts_used }
}

/// Which of the layers with experts each cache belongs to.
fn numbers(plan: &Plan, blocks: &[(usize, usize)]) -> Vec<usize> {
    plan.caches.iter().map(|c| blocks.iter().position(|b| b.0 == c.block).unwrap_or(0)).collect()
}

/// The share of uses that each cache of a plan will have there.
pub(super) fn hit_rates_of(model: &Model, plan: &Plan, routing: Option<&ForcedRouting>) -> Vec<f64> {
    let blocks = routed(model);
    let first = |block: usize| blocks.iter().find(|b| b.0 == block).map_or(0, |b| b.1);
    let cached = |block: usize, expert: usize| plan.homes[first(block) + expert] == Home::C;
    hit_rates(&plan.caches, &numbers(plan, &blocks), routing, &cached)
}

/// The share of uses that slots of a device are expected to have there, the mean over layers; `None` without slots. Where no routing
/// is given, what is known of the model's choices; where nothing is, as if each expert were as likely.
pub(super) fn slot_hits(model: &Model, plan: &Plan, options: &Options) -> Option<f64> {
    let blocks = routed(model);
    let number = |c: &Cache| blocks.iter().position(|b| b.0 == c.block).unwrap_or(0);
    let numbers: Vec<usize> = plan.device_caches.iter().map(number).collect();
    let rates = match (options.routing.as_deref(), &options.curve) {
        (None, Some(curve)) => plan.device_caches.iter().map(|c| curve.hits(c.slots, c.experts)).collect(),
        (routing, _) => hit_rates(&plan.device_caches, &numbers, routing, &|_, _| true),
    };
    // In steps of a fiftieth, so that a plan does not change with each run that a curve grows by.
    let mean = || rates.iter().sum::<f64>() / rates.len() as f64;
    (!rates.is_empty()).then(|| (mean() * 50.0).round() / 50.0)
}

/// What the simulator is to know of a plan's caches.
pub(super) fn caching(model: &Model, plan: &Plan, routing: Option<&Arc<ForcedRouting>>) -> Caching {
    if plan.caches.is_empty() && routing.is_none() {
        return Caching::default();
    }
    let numbers = numbers(plan, &routed(model));
    let uniform = || ForcedRouting::new(mixture(model), Routes::Uniform, 1).ok().map(Arc::new);
    Caching {
        caches: plan.caches.iter().zip(numbers).map(|(c, number)| SimCache { slots: c.slots, number }).collect(),
        of: plan.cache_of(&unit_sizes(model)),
        routing: routing.cloned().or_else(uniform),
    }
}

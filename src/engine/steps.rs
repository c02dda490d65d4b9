//! The schedule of a flow: which units stream, in the order of a pass.

use crate::flow::Step;
use crate::model::{Model, UnitKind};

fn streams_experts(model: &Model, streamed: &dyn Fn(usize) -> bool) -> bool {
    model.units.iter().enumerate().any(|(i, u)| streamed(i) && matches!(u.kind, UnitKind::Expert { .. }))
}

/// A ring's schedule: streamed units in pass order, a hole where experts are streamed.
pub(super) fn schedule(model: &Model, streamed: &dyn Fn(usize) -> bool) -> Vec<Step> {
    let holes = streams_experts(model, streamed);
    let mut steps = Vec::new();
    for u in model.pass_order() {
        if streamed(u) {
            steps.push(Step::Unit(u));
        }
        let routes = model.units.get(u + 1).is_some_and(|next| matches!(next.kind, UnitKind::Expert { .. }));
        if holes && routes {
            steps.push(Step::Hole);
        }
    }
    steps
}

//! Mistral 3: llama's block with queries scaled by position, and YaRN with a magnitude of its own.

use super::{Architecture, Family, PLAIN, experts_as_wide_as_ff, ropes};
use crate::backend::Router;
use crate::model::RopeScaling;
use crate::model::hparams::limit;

pub(super) const MISTRAL3: Architecture = Architecture {
    ropes,
    family: Family {
        name: "mistral3",
        follows: &["attention.temperature_scale", "rope.scaling.yarn_log_multiplier"],
        ..PLAIN.family
    },
    settle: |keys, h| {
        if h.n_experts > 0 {
            experts_as_wide_as_ff(keys, h)?;
            h.router = Router::softmax(true, 1.0);
        }
        const ORIGINAL: &str = "rope.scaling.original_context_length";
        if let Some(by) = keys.or_none("attention.temperature_scale")? {
            let every = keys.required(ORIGINAL, limit::CTX)?;
            h.by_position = Some((by, every as f32, 0.0));
        }
        if let (RopeScaling::Yarn { factor, .. }, Some(m)) =
            (h.rope_scaling, keys.or_none("rope.scaling.yarn_log_multiplier")?)
        {
            h.rope_magnitude = 1.0 / (1.0 + 0.1 * m * factor.max(1.0).ln());
        }
        Ok(())
    },
    ..PLAIN
};

//! Architectures that differ from llama in one thing.

use super::{Architecture, Family, PLAIN};
use crate::backend::RopeKind;
use crate::model::build::{ATTENTION, Attention, FEED_FORWARD, FeedForward, Reads};

/// SmolLM 3: every fourth block does not rotate.
pub(super) const SMOLLM3: Architecture = Architecture {
    family: Family { name: "smollm3", ..PLAIN.family },
    block: |b, i| {
        b.attention(i, &Attention { rotates: !(i + 1).is_multiple_of(4), ..ATTENTION })?;
        b.feed_forward(i, &FEED_FORWARD)
    },
    ..PLAIN
};

/// Seed OSS: its names.
pub(super) const SEED_OSS: Architecture = Architecture {
    family: Family { name: "seed_oss", rope_kind: RopeKind::Neox, ..PLAIN.family },
    block: |b, i| {
        b.attention(i, &ATTENTION)?;
        b.feed_forward(i, &FeedForward { reads: Reads::Norm("post_attention_norm"), ..FEED_FORWARD })
    },
    ..PLAIN
};

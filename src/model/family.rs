//! What tells architectures apart before any of their blocks is built.

use crate::backend::RopeKind;

/// An architecture's name and what is fixed by it.
#[derive(Debug)]
pub struct Family {
    /// `general.architecture`, which also prefixes the architecture's keys.
    pub name: &'static str,
    /// How rotary embedding pairs elements: fixed by the architecture, not by metadata.
    pub rope_kind: RopeKind,
    /// Keys that it reads in addition to those that all do, or that it follows where others refuse them.
    pub(super) follows: &'static [&'static str],
    /// Key of the norms' epsilon.
    pub(super) norm_eps: &'static str,
    /// Whether every projection has a bias.
    pub(super) biases: bool,
    /// Whether the head must be a tensor of its own.
    pub(super) own_head: bool,
    /// Name of the norm before the head.
    pub(super) output_norm: &'static str,
    /// Whether the head is the embedding, whatever the file has.
    pub(super) tied: bool,
    /// Whether some block attends.
    pub(super) attends: bool,
    /// Whether heads of keys and widths of feed-forward parts may differ between blocks: the common ones are the largest.
    pub(super) varies: bool,
}

/// Llama's.
pub(super) const LLAMA: Family = Family {
    name: "llama",
    rope_kind: RopeKind::Norm,
    follows: &[],
    norm_eps: "attention.layer_norm_rms_epsilon",
    biases: false,
    own_head: false,
    output_norm: "output_norm",
    tied: false,
    attends: true,
    varies: false,
};

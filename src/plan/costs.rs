//! Times of a GPU's one-token pass that do not follow from bytes and rates: kernels that wait for each other, and rows on
//! their way to processors and back.

use serde::{Deserialize, Serialize};

use super::UnitPart;

/// A time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Time {
    /// Microseconds.
    pub us: f64,
    /// Measured on this machine or one like it; else a guess.
    #[serde(default)]
    pub measured: bool,
    /// Where the figure comes from.
    #[serde(default)]
    pub source: String,
}

impl Time {
    /// Seconds.
    pub fn s(&self) -> f64 {
        self.us * 1e-6
    }
}

/// The times. Each that is absent is taken as measured on an H100 (docs/benchmarks.md, `profiles/h100.toml`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Costs {
    /// Least time of a dense block's attention part: queries, keys and values, rotary embedding, attention, its merge, output.
    pub attention: Time,
    /// Least time of a dense feed-forward part: gate and up, down.
    pub feed_forward: Time,
    /// Least time of a slice of the output head.
    pub head: Time,
    /// Least time of what all tokens share of a block with experts: its attention and the router.
    pub shared: Time,
    /// Each operation of a part that has no fused call, in addition.
    pub operation: Time,
    /// Least time of a layer's chosen experts where one call computes all: two kernels.
    pub experts: Time,
    /// Least time of an expert that is computed by itself, where some of the layer are brought or are for processors: three kernels,
    /// called once the router has answered.
    pub expert: Time,
    /// From the end of the GPU's work to the beginning of the processors', and back, while the link carries nothing.
    pub hand_over: Time,
    /// The same while copies fill the link.
    pub hand_over_loaded: Time,
    /// What a layer's chosen experts take processors beside the GPU in addition to their bytes: threads that meet between the products, of
    /// which each begins far from what it read before.
    pub experts_beside: Time,
}

impl Default for Costs {
    fn default() -> Costs {
        let time = |us| Time { us, measured: false, source: "as on an H100".into() };
        Costs {
            attention: time(16.0),
            feed_forward: time(9.0),
            head: time(4.5),
            shared: time(30.0),
            operation: time(1.2),
            experts: time(21.7),
            expert: time(11.3),
            hand_over: time(16.0),
            hand_over_loaded: time(50.0),
            experts_beside: time(24.0),
        }
    }
}

impl Costs {
    /// All of them, named as messages call them.
    pub fn all(&self) -> [(&'static str, &Time); 10] {
        [
            ("attention", &self.attention),
            ("feed_forward", &self.feed_forward),
            ("head", &self.head),
            ("shared", &self.shared),
            ("operation", &self.operation),
            ("experts", &self.experts),
            ("expert", &self.expert),
            ("hand_over", &self.hand_over),
            ("hand_over_loaded", &self.hand_over_loaded),
            ("experts_beside", &self.experts_beside),
        ]
    }

    /// Least seconds of a part that has so many operations without a fused call; none of an expert, of which several are computed
    /// together.
    pub fn least_s(&self, part: UnitPart, operations: usize) -> f64 {
        let time = match part {
            UnitPart::Attention => &self.attention,
            UnitPart::FeedForward | UnitPart::Slice => &self.feed_forward,
            UnitPart::Shared => &self.shared,
            UnitPart::Head => &self.head,
            UnitPart::Expert => return 0.0,
        };
        time.s() + self.operation.s() * operations as f64
    }
}

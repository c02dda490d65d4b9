//! A program as a backend runs it: sequences of operations that it has a fused call for become that call.

use super::program::{LinearRef, Model, NormRef, TensorRef};
use crate::backend::{Act, Activation, Gating, NormKind, Op, RouterParams, Scores};

/// A call of [`crate::backend::Backend`].
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a model has a few hundred, made once")]
pub(super) enum Call {
    Qkv { layer: usize, norm: NormRef, w: [LinearRef; 3], head_norms: Option<[NormRef; 2]> },
    Attend { layer: usize },
    Keep,
    AttnOutput { w: LinearRef },
    FeedForward { norm: NormRef, gate: LinearRef, up: LinearRef, down: LinearRef },
    Slice { norm: NormRef, gate: LinearRef, up: LinearRef, down: LinearRef },
    AddSlice,
    Route { norm: NormRef, router: TensorRef, params: RouterParams },
    Combine,
    OutputNorm { norm: NormRef },
    Head { w: LinearRef, first_row: usize },
    Op(Op<TensorRef>),
}

/// The calls with one unit, and those behind its experts.
#[derive(Clone, Debug)]
pub(super) struct Calls {
    pub with: Vec<Call>,
    pub after: Vec<Call>,
}

/// The calls of a pass, stage by stage.
#[derive(Clone, Debug)]
pub struct Tape {
    pub(super) stages: Vec<Calls>,
}

impl Tape {
    /// The calls of a model's stages.
    pub fn new(model: &Model) -> Tape {
        let calls = |ops: &[Op<TensorRef>]| {
            let (mut left, mut calls) = (ops, Vec::new());
            while let Some((first, rest)) = left.split_first() {
                let (call, taken) = fused(left).unwrap_or((Call::Op(*first), 1));
                calls.push(call);
                left = if taken == 1 { rest } else { &left[taken..] };
            }
            calls
        };
        let of = |s: &super::Stage| Calls {
            with: calls(&s.ops),
            after: s.experts.as_ref().map_or(Vec::new(), |e| calls(&e.after)),
        };
        Tape { stages: model.stages.iter().map(of).collect() }
    }

    /// What a pass does that a backend `can` not; `None` if it can all.
    pub fn lacks(&self, can: impl Fn(&Op<TensorRef>) -> bool) -> Option<&'static str> {
        let calls = self.stages.iter().flat_map(|s| s.with.iter().chain(&s.after));
        let mut lacking = calls.filter_map(|c| match c {
            Call::Op(op) if !can(op) => Some(op.what()),
            _ => None,
        });
        lacking.next()
    }

    /// By unit, how many operations of its stage are no fused call.
    pub fn operations(&self, model: &Model) -> impl Iterator<Item = (usize, usize)> {
        let single = |calls: &Calls| calls.with.iter().chain(&calls.after).filter(|c| matches!(c, Call::Op(_))).count();
        model.stages.iter().zip(&self.stages).map(move |(stage, calls)| (stage.unit, single(calls)))
    }

    /// What a pass does that is no fused call; `None` if all is.
    pub fn beyond(&self, model: &Model) -> Option<&'static str> {
        let calls = self.stages.iter().flat_map(|s| s.with.iter().chain(&s.after));
        let single: Vec<&Op<TensorRef>> = calls
            .filter_map(|c| match c {
                Call::Op(op) => Some(op),
                _ => None,
            })
            .collect();
        // Operations that every block has are there one by one because of what stands among them.
        let ordinary = |op: &Op<TensorRef>| {
            matches!(op, Op::Norm { to: Act::H, .. } | Op::Linear { .. } | Op::Rope { rope: 0, .. } | Op::Store { .. })
        };
        let reason = single.iter().find(|op| !ordinary(op)).or(single.iter().find(|op| matches!(op, Op::Store { .. })));
        let experts = || {
            let all = model.stages.iter().filter_map(|s| s.experts.as_ref());
            let mut others = all.filter_map(|e| match e.how {
                Activation::Silu if e.list.iter().flatten().all(|l| l.bias.is_none()) => None,
                _ => Some("experts with biases or other activations than SwiGLU"),
            });
            others.next()
        };
        reason.or(single.first()).map(|op| op.what()).or_else(experts)
    }
}

/// A norm that fused calls take.
fn plain(norm: &NormRef) -> bool {
    norm.kind == NormKind::Rms && norm.weight.is_some() && norm.bias.is_none()
}

/// The fused call that `ops` begin with, and how many of them it takes.
fn fused(ops: &[Op<TensorRef>]) -> Option<(Call, usize)> {
    match *ops {
        [Op::Keep, ..] => Some((Call::Keep, 1)),
        [Op::Attend { layer, scores: Scores::PLAIN, sinks: None }, ..] => Some((Call::Attend { layer }, 1)),
        [Op::Linear { to: Act::X, from: Act::Attn, w, add: true }, ..] => Some((Call::AttnOutput { w }, 1)),
        [Op::Norm { to: Act::Out, from: Act::Out, norm }, Op::Add { to: Act::X, from: Act::Out }, ..] => {
            Some((Call::Op(Op::AddNormed { norm }), 2))
        }
        [Op::Add { to: Act::X, from: Act::Attn }, ..] => Some((Call::AddSlice, 1)),
        [Op::Combine { to: Act::X, add: true }, ..] => Some((Call::Combine, 1)),
        [Op::Head { w, first_row, scale: 1.0, cap: 0.0 }, ..] => Some((Call::Head { w, first_row }, 1)),
        [Op::Outputs, Op::Norm { to: Act::H, from: Act::X, norm }, ..] if plain(&norm) => {
            Some((Call::OutputNorm { norm }, 2))
        }
        [Op::Norm { to: Act::H, from: Act::X, norm }, ref rest @ ..] if plain(&norm) => {
            qkv(norm, rest).or_else(|| feed_forward(norm, rest)).or_else(|| route(norm, rest))
        }
        _ => None,
    }
}

fn qkv(norm: NormRef, ops: &[Op<TensorRef>]) -> Option<(Call, usize)> {
    let [
        Op::Linear { to: Act::Q, from: Act::H, w: q, add: false },
        Op::Linear { to: Act::K, from: Act::H, w: k, add: false },
        Op::Linear { to: Act::V, from: Act::H, w: v, add: false },
        rest @ ..,
    ] = ops
    else {
        return None;
    };
    let (head_norms, rest, taken) = match rest {
        [Op::HeadNorm { act: Act::Q, norm: q }, Op::HeadNorm { act: Act::K, norm: k }, rest @ ..]
            if plain(q) && plain(k) =>
        {
            (Some([*q, *k]), rest, 6)
        }
        _ => (None, rest, 4),
    };
    match *rest {
        [Op::Rope { act: Act::Q, rope: 0 }, Op::Rope { act: Act::K, rope: 0 }, Op::Store { layer }, ..] => {
            Some((Call::Qkv { layer, norm, w: [*q, *k, *v], head_norms }, taken + 3))
        }
        _ => None,
    }
}

fn feed_forward(norm: NormRef, ops: &[Op<TensorRef>]) -> Option<(Call, usize)> {
    match *ops {
        [
            Op::Linear { to: Act::Hidden, from: Act::H, w: gate, add: false },
            Op::Linear { to: Act::Up, from: Act::H, w: up, add: false },
            Op::Activate { how: Activation::Silu, gated: true, .. },
            Op::Linear { to, from: Act::Hidden, w: down, add },
            ..,
        ] => match (to, add) {
            (Act::X, true) => Some((Call::FeedForward { norm, gate, up, down }, 5)),
            (Act::Attn, false) => Some((Call::Slice { norm, gate, up, down }, 5)),
            _ => None,
        },
        _ => None,
    }
}

fn route(norm: NormRef, ops: &[Op<TensorRef>]) -> Option<(Call, usize)> {
    match *ops {
        [Op::Route { w, choose: None, how }, ..]
            if w.bias.is_none() && how.gating == Gating::Softmax && how.groups == (1, 1) =>
        {
            let params = RouterParams { normalize: how.normalize, scale: how.scale };
            Some((Call::Route { norm, router: w.weight, params }, 2))
        }
        _ => None,
    }
}

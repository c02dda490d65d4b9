//! Feed-forward parts that are cut in two along their hidden state, so that two sites compute each at once: a device the first
//! columns, processors next to it the others.
//!
//! Gate and up are cut by rows, down by columns. The processors' slice comes first and keeps what it will add to X
//! ([`Act::Attn`] is free then); the device's adds to X, and then what was kept. So both read X as it was, and sums have one order
//! whoever computes what.

use std::ops::Range;

use super::program::{Columns, LinearRef, Model, NormRef, Span, Stage, TensorRef, UnitKind, UnitSpec};
use super::tape::{Call, Calls, Tape};
use crate::backend::{Act, Activation, Op};
use crate::gguf::TensorType;

/// A slice has a multiple of so many columns, in whole blocks of its type.
const STEP: usize = 32;

/// Parts of a hidden state that slices are counted in.
pub const SLICE_PARTS: u32 = 256;

/// What a feed-forward part that can be cut consists of.
#[derive(Clone, Copy)]
struct Whole {
    norm: NormRef,
    gate: LinearRef,
    up: LinearRef,
    down: LinearRef,
}

impl Whole {
    /// Of a stage that is one fused call without biases, whose matrices are all of its unit.
    fn of(stage: &Stage, calls: &Calls) -> Option<Whole> {
        let &[Call::FeedForward { norm, gate, up, down }] = &calls.with[..] else { return None };
        let own = |l: &LinearRef| l.bias.is_none() && l.weight.unit == stage.unit;
        [&gate, &up, &down].into_iter().all(own).then_some(Whole { norm, gate, up, down })
    }

    /// Columns of the hidden state that are the device's if processors have `part` of [`SLICE_PARTS`]; `None` if either would have none.
    fn cut(&self, part: u32) -> Option<usize> {
        let step = STEP.max(self.down.weight.ty.block_elems());
        let steps = self.down.weight.cols / step;
        let theirs = (steps as f64 * f64::from(part) / f64::from(SLICE_PARTS)).round() as usize;
        (theirs > 0 && theirs < steps).then(|| (steps - theirs) * step)
    }

    /// Some columns of it as unit number `unit`, in place of the whole, `file`; `keeps`: what they add to X waits.
    fn slice(
        &self,
        file: &UnitSpec,
        (unit, block): (usize, usize),
        columns: Range<usize>,
        keeps: bool,
    ) -> Option<Slice> {
        let bytes = |ty: TensorType, cols: usize| Some(ty.row_bytes(cols)? as u64);
        let mut spans = Vec::new();
        let mut put = |span: Span, t: TensorRef| {
            spans.push(span);
            TensorRef { unit, span: spans.len() - 1, ..t }
        };
        let norm = self.norm.map(&mut |t| if t.unit == self.down.weight.unit { put(file.spans[t.span], t) } else { t });
        let mut rows = |l: &LinearRef| {
            let (t, whole) = (l.weight, file.spans[l.weight.span]);
            let row = bytes(t.ty, t.cols)?;
            let (offset, bytes) = (whole.offset + columns.start as u64 * row, columns.len() as u64 * row);
            let weight = put(Span { offset, bytes, ..whole }, TensorRef { rows: columns.len(), ..t });
            Some(LinearRef { weight, bias: None })
        };
        let (gate, up) = (rows(&self.gate)?, rows(&self.up)?);
        let t = self.down.weight;
        let [row_bytes, before, own] = [t.cols, columns.start, columns.len()].map(|cols| bytes(t.ty, cols));
        let of = Columns { row_bytes: row_bytes?, before: before?, bytes: own? };
        let span = Span { bytes: of.bytes * t.rows as u64, columns: Some(of), ..file.spans[t.span] };
        let down = LinearRef { weight: put(span, TensorRef { cols: columns.len(), ..t }), bias: None };
        let to = if keeps { Act::Attn } else { Act::X };
        let mut ops = vec![
            Op::Norm { to: Act::H, from: Act::X, norm },
            Op::Linear { to: Act::Hidden, from: Act::H, w: gate, add: false },
            Op::Linear { to: Act::Up, from: Act::H, w: up, add: false },
            Op::Activate { how: Activation::Silu, gated: true, width: columns.len() },
            Op::Linear { to, from: Act::Hidden, w: down, add: !keeps },
        ];
        if !keeps {
            ops.push(Op::Add { to: Act::X, from: Act::Attn });
        }
        let name = format!("{}, columns from {}", file.name, columns.start);
        let kind = if keeps { UnitKind::Slice(block) } else { file.kind };
        Some(Slice { unit: UnitSpec { kind, name, spans }, ops })
    }
}

/// A slice of a part.
struct Slice {
    unit: UnitSpec,
    ops: Vec<Op<TensorRef>>,
}

impl Model {
    /// The feed-forward parts that can be cut, by stage; none of a model whose passes have anything but fused calls, or experts.
    fn wholes(&self) -> Vec<Option<Whole>> {
        let tape = Tape::new(self);
        let plain = tape.beyond(self).is_none() && self.hparams.n_experts == 0;
        let stages = self.stages.iter().zip(&tape.stages);
        stages.map(|(stage, calls)| Whole::of(stage, calls).filter(|_| plain)).collect()
    }

    /// The same model with its feed-forward parts cut, of whose hidden states processors next to a device have `part` of
    /// [`SLICE_PARTS`]; `None` if none can be.
    pub fn sliced(&self, part: u32) -> Option<Model> {
        let wholes = self.wholes();
        let mut of_unit: Vec<Option<(Whole, usize)>> = vec![None; self.units.len()];
        for (stage, whole) in self.stages.iter().zip(&wholes) {
            of_unit[stage.unit] = whole.and_then(|w| Some((w, w.cut(part)?)));
        }
        if of_unit.iter().all(Option::is_none) {
            return None;
        }
        let (mut units, mut places) = (Vec::new(), Vec::new());
        let mut slices: Vec<Option<[Slice; 2]>> = Vec::new();
        for (unit, of) in self.units.iter().zip(&of_unit) {
            let cut = match (of, unit.kind) {
                (Some((whole, first)), UnitKind::FeedForward(block)) => {
                    let next = units.len();
                    let theirs = whole.slice(unit, (next, block), *first..whole.down.weight.cols, true);
                    let own = whole.slice(unit, (next + 1, block), 0..*first, false);
                    theirs.zip(own).map(|(theirs, own)| [theirs, own])
                }
                _ => None,
            };
            match &cut {
                Some(both) => units.extend(both.iter().map(|s| s.unit.clone())),
                None => units.push(unit.clone()),
            }
            places.push(units.len() - 1);
            slices.push(cut);
        }
        let moved = |t: TensorRef| TensorRef { unit: places.get(t.unit).copied().unwrap_or(t.unit), ..t };
        let mut stages = Vec::new();
        for stage in &self.stages {
            let (unit, block) = (places[stage.unit], stage.block);
            match slices[stage.unit].take() {
                Some([theirs, own]) => {
                    stages.push(Stage { unit: unit - 1, block, ops: theirs.ops, experts: None });
                    stages.push(Stage { unit, block, ops: own.ops, experts: None });
                }
                None => {
                    let ops = stage.ops.iter().map(|op| op.map(&mut |t| moved(t))).collect();
                    stages.push(Stage { unit, block, ops, experts: None });
                }
            }
        }
        let mut model = Model { units, stages, ..self.clone() };
        for block in &mut model.blocks {
            (block.unit, block.ffn_unit) = (places[block.unit], places[block.ffn_unit]);
        }
        model.head.iter_mut().for_each(|h| h.weight = moved(h.weight));
        Some(model)
    }
}

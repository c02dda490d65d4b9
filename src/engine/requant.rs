//! Requantising on load: how units lie that get a smaller type, and what a report says of it.

use crate::gguf::TensorType;
use crate::model::{Model, Requantised, Turned, UnitSpec};
use crate::pipeline::{SpanIn, TurnedSpan, UnitLayout};
use crate::plan::{Home, format_bytes};
use crate::storage::FileId;

/// Tensors begin at multiples of this in the frame of a requantised unit.
const ALIGN: u64 = 256;
/// A unit's frame is a multiple of this.
const FRAME_ALIGN: u64 = 4096;

/// What requantising did to a session's weights.
#[derive(Clone, Debug)]
pub struct RequantReport {
    /// The type that larger matrices got.
    pub ty: TensorType,
    /// Which types became which: that one, or the next larger where its blocks do not divide a matrix's rows.
    pub turned: Vec<Turned>,
    /// Units on storage that stay as the file has them though they have larger matrices, and their bytes.
    pub left: (usize, u64),
}

impl RequantReport {
    pub(super) fn new(requant: &Requantised, homes: &[Home]) -> RequantReport {
        let (turned, left) = requant.summary(|u| homes[u] == Home::C);
        RequantReport { ty: requant.ty, turned, left }
    }

    /// A line on which types became what.
    pub fn line(&self) -> String {
        let one = |t: &Turned| {
            let (n, before, after) = (t.matrices, format_bytes(t.before), format_bytes(t.after));
            format!("{} to {} ({n} matrices, {before} to {after})", t.from, t.to)
        };
        match &self.turned[..] {
            [] => format!("nothing: no matrix that rests is larger than {}", self.ty),
            turned => turned.iter().map(one).collect::<Vec<_>>().join(", "),
        }
    }

    /// A warning where units stay as the file has them.
    pub fn note(&self) -> Option<String> {
        let (units, bytes) = self.left;
        (units > 0).then(|| {
            format!(
                "--requant {0}: {units} units ({1}) are read from storage and stay as the model file has them; `nt stage --requant {2}` makes a drive with smaller ones",
                self.ty,
                format_bytes(bytes),
                self.ty.name().to_lowercase(),
            )
        })
    }
}

/// The units that rest and those that are read: the model once its homes are known.
pub(super) fn settled(model: &Model, requant: Option<&Requantised>, homes: &[Home]) -> Model {
    requant.map_or_else(|| model.clone(), |r| r.at(|u| homes[u] == Home::C))
}

/// How a unit lies where it rests: its layout, and what becomes of each span; `None` for one that is not changed.
pub(super) fn turned(requant: &Requantised, unit: usize) -> Option<(UnitLayout, Vec<TurnedSpan>)> {
    if !requant.changes(unit) {
        return None;
    }
    let (file, small): (&UnitSpec, &UnitSpec) = (&requant.file().units[unit], &requant.whole().units[unit]);
    let (mut used, mut offsets, mut spans) = (0, Vec::new(), Vec::new());
    for ((f, s), turn) in file.spans.iter().zip(&small.spans).zip(requant.turns(unit)) {
        let span = SpanIn { file: FileId(f.shard as u16), offset: f.offset, bytes: f.bytes };
        spans.push(TurnedSpan { span, to: used, turn: turn.map(|t| (t.from, t.to, t.cols)) });
        offsets.push(used);
        used = (used + s.bytes).next_multiple_of(ALIGN);
    }
    // Nothing is read as the frame has it.
    let layout =
        UnitLayout { extents: Vec::new(), span_offsets: offsets, slot_bytes: used.next_multiple_of(FRAME_ALIGN) };
    Some((layout, spans))
}

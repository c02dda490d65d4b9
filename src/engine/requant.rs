//! Requantising on load: how units lie that get a smaller type, and what a report says of it.

use super::made::made;
use crate::gguf::TensorType;
use crate::model::{Model, Requantised, Turned, UnitSpec};
use crate::pipeline::{SpanIn, TurnedSpan, Turning, UnitLayout};
use crate::plan::{Home, format_bytes};
use crate::storage::FileId;

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
    let parts = file.spans.iter().zip(&small.spans).zip(requant.turns(unit)).map(|((f, s), turn)| {
        let turn = turn.map_or(Turning::None, |t| Turning::Type { from: t.from, to: t.to, cols: t.cols });
        (SpanIn { file: FileId(f.shard as u16), offset: f.offset, bytes: f.bytes }, s.bytes, turn)
    });
    Some(made(parts))
}

//! Units that do not lie in the file as they rest: how they lie in memory, and what they are made of.

use crate::model::{Columns, Span, UnitSpec};
use crate::pipeline::{SpanIn, TurnedSpan, Turning, UnitLayout};
use crate::storage::FileId;

/// Tensors begin at multiples of this in a frame whose unit is made of what is read.
const ALIGN: u64 = 256;
/// A unit's frame is a multiple of this.
const FRAME_ALIGN: u64 = 4096;

/// A frame in which parts of the file lie one after the other: what is read, the bytes that are made of it, and how.
pub(super) fn made(parts: impl Iterator<Item = (SpanIn, u64, Turning)>) -> (UnitLayout, Vec<TurnedSpan>) {
    let (mut used, mut span_offsets, mut spans) = (0, Vec::new(), Vec::new());
    for (span, bytes, turn) in parts {
        spans.push(TurnedSpan { span, to: used, turn });
        span_offsets.push(used);
        used = (used + bytes).next_multiple_of(ALIGN);
    }
    // Nothing is read as the frame has it.
    (UnitLayout { extents: Vec::new(), span_offsets, slot_bytes: used.next_multiple_of(FRAME_ALIGN) }, spans)
}

/// How a unit lies that has some columns of a matrix; `None` for any other.
pub(super) fn gathered(unit: &UnitSpec) -> Option<(UnitLayout, Vec<TurnedSpan>)> {
    unit.spans.iter().any(|s| s.columns.is_some()).then(|| made(unit.spans.iter().map(part)))
}

fn part(s: &Span) -> (SpanIn, u64, Turning) {
    let (of, turn) = match s.columns {
        None => (s.bytes, Turning::None),
        Some(Columns { row_bytes, before, bytes }) => {
            let [row, before, own] = [row_bytes, before, bytes].map(|b| b as usize);
            (s.bytes / bytes.max(1) * row_bytes, Turning::Columns { row, before, bytes: own })
        }
    };
    (SpanIn { file: FileId(s.shard as u16), offset: s.offset, bytes: of }, s.bytes, turn)
}

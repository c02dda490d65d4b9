//! Where the bytes of a unit lie in its slot.
//!
//! Direct reads take the enclosing aligned spans. Spans that touch, or nearly so, become one read;
//! a tensor is used at its offset inside the slot, which keeps its alignment in the file.

use crate::storage::{Alignment, Extent, FileId};

/// Gaps up to this many bytes are read along rather than split a read.
const GAP_MAX: u64 = 64 << 10;
/// Extents begin at multiples of this in a slot: enough for every device.
const SLOT_ALIGN: u64 = 4096;

/// A span of a file that a unit needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanIn {
    /// The file.
    pub file: FileId,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

/// The reads of a unit, and where each of its spans comes to lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitLayout {
    /// What to read, and to where in the slot.
    pub extents: Vec<Extent>,
    /// Offset in the slot of each span's first byte, in the order given.
    pub span_offsets: Vec<u64>,
    /// Bytes of the slot that are used, alignment included.
    pub slot_bytes: u64,
}

impl UnitLayout {
    /// Lays out spans of files whose reads need `alignment`.
    pub fn new(spans: &[SpanIn], alignment: impl Fn(FileId) -> Alignment) -> UnitLayout {
        let mut order: Vec<usize> = (0..spans.len()).collect();
        order.sort_unstable_by_key(|&i| (spans[i].file, spans[i].offset));
        let mut extents: Vec<Extent> = Vec::new();
        let mut span_offsets = vec![0; spans.len()];
        let mut used = 0u64;
        for i in order {
            let s = spans[i];
            let align = u64::from(alignment(s.file).offset);
            let start = s.offset / align * align;
            let end = (s.offset + s.bytes).next_multiple_of(align);
            match extents.last_mut() {
                Some(e) if e.file == s.file && start <= e.offset + e.len + GAP_MAX => {
                    e.len = e.len.max(end - e.offset);
                    used = e.dst_offset + e.len;
                }
                _ => {
                    let dst_offset = used.next_multiple_of(SLOT_ALIGN);
                    extents.push(Extent { file: s.file, offset: start, len: end - start, dst_offset });
                    used = dst_offset + (end - start);
                }
            }
            if let Some(e) = extents.last() {
                span_offsets[i] = e.dst_offset + (s.offset - e.offset);
            }
        }
        UnitLayout { extents, span_offsets, slot_bytes: used.next_multiple_of(SLOT_ALIGN) }
    }

    /// Bytes that are read.
    pub fn read_bytes(&self) -> u64 {
        self.extents.iter().map(|e| e.len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(file: u16, offset: u64, bytes: u64) -> SpanIn {
        SpanIn { file: FileId(file), offset, bytes }
    }

    fn direct(_: FileId) -> Alignment {
        Alignment { memory: 512, offset: 4096 }
    }

    #[test]
    fn neighbours_become_one_read_and_keep_their_offsets() {
        let l = UnitLayout::new(&[span(0, 10_000, 500), span(0, 8_224, 1_000)], direct);
        assert_eq!(l.extents, [Extent { file: FileId(0), offset: 8192, len: 4096, dst_offset: 0 }]);
        assert_eq!(l.span_offsets, [10_000 - 8192, 32]);
        assert_eq!(l.slot_bytes, 4096);
    }

    #[test]
    fn distant_spans_and_other_files_are_read_apart() {
        let l = UnitLayout::new(&[span(0, 0, 100), span(0, 1 << 20, 5000), span(1, 40, 8)], direct);
        assert_eq!(l.extents.len(), 3);
        assert_eq!(l.extents[1], Extent { file: FileId(0), offset: 1 << 20, len: 8192, dst_offset: 4096 });
        assert_eq!(l.extents[2].dst_offset, 12288);
        assert_eq!(l.span_offsets, [0, 4096, 12288 + 40]);
    }

    #[test]
    fn buffered_files_are_read_to_the_byte() {
        let l = UnitLayout::new(&[span(0, 33, 100)], |_| Alignment { memory: 1, offset: 1 });
        assert_eq!(l.extents, [Extent { file: FileId(0), offset: 33, len: 100, dst_offset: 0 }]);
        assert_eq!(l.span_offsets, [0]);
    }
}

//! The link from storage to RAM: a reader, and the frames that it reads to.

use std::sync::Arc;
use std::time::Duration;

use super::frames::Move;
use super::link::{Carried, Cause, Done, Link, Refusal};
use crate::memory::Region;
use crate::pipeline::UnitLayout;
use crate::storage::{Bell, Completion, Extent, ReadRequest, Reader};

/// Tag of a request for rows; units have their frame as tag.
const ROWS: u64 = u64::MAX;
/// Units that are read at once: what more there is waits where it can be overtaken.
const UNITS_MAX: usize = 64;

/// Reads units to frames.
pub(super) struct ReaderLink {
    reader: Box<dyn Reader>,
    layouts: Arc<[UnitLayout]>,
    frames: Vec<Region>,
    rows: Region,
    /// What is read to each frame.
    flying: Vec<Option<Move>>,
    done: Vec<Completion>,
}

impl ReaderLink {
    /// Reads through `reader` to frames and a region for rows.
    ///
    /// # Safety
    /// The regions are used by nothing else: nobody looks at a frame or at the rows between the start of a read to them and
    /// its end.
    pub unsafe fn new(
        reader: Box<dyn Reader>,
        layouts: Arc<[UnitLayout]>,
        frames: Vec<Region>,
        rows: Region,
    ) -> ReaderLink {
        let (flying, done) = (vec![None; frames.len()], Vec::with_capacity(frames.len() + 1));
        ReaderLink { reader, layouts, frames, rows, flying, done }
    }
}

impl Link for ReaderLink {
    fn room(&self) -> usize {
        UNITS_MAX.saturating_sub(self.reader.outstanding())
    }

    fn start(&mut self, m: Move) -> Result<(), Refusal> {
        if self.room() == 0 || self.flying[m.to].is_some() {
            return Err(Refusal::Busy);
        }
        let to = &self.frames[m.to];
        let (extents, urgent) = (&self.layouts[m.unit].extents, m.urgent);
        let request = ReadRequest { tag: m.to as u64, extents, dst: to.addr(), urgent, dst_len: to.len() };
        // SAFETY: the frame is this link's until the move has ended (`new`), and no other read to it is in flight.
        unsafe { self.reader.submit(&request) }.map_err(|e| Refusal::Refused(Cause::Read(e)))?;
        self.flying[m.to] = Some(m);
        Ok(())
    }

    fn start_rows(&mut self, extents: &[Extent]) -> Result<(), Cause> {
        let to = &self.rows;
        let request = ReadRequest { tag: ROWS, extents, dst: to.addr(), urgent: true, dst_len: to.len() };
        // SAFETY: rows are asked for one request at a time, and the region is nobody else's meanwhile (`new`).
        unsafe { self.reader.submit(&request) }.map_err(Cause::Read)
    }

    fn poll(&mut self, out: &mut Vec<Done>, wait: Duration) -> Result<(), Cause> {
        let polled = self.reader.poll(&mut self.done, Some(wait));
        for c in self.done.drain(..) {
            let result = c.result.map_err(Cause::Read);
            if c.tag == ROWS {
                out.push(Done::Rows(result));
            } else if let Some(m) = self.flying.get_mut(c.tag as usize).and_then(Option::take) {
                out.push(Done::Moved(m, result.map(|bytes| Carried { bytes, seconds: None })));
            }
        }
        polled.map_err(Cause::Read)
    }

    fn outstanding(&self) -> usize {
        self.reader.outstanding()
    }

    fn bells(&self, to: &mut Vec<Arc<Bell>>) {
        self.reader.bells(to);
    }
}

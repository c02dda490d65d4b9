//! Wiping what a drive held before an image is written to it. Zeros are written to every place by which somebody
//! could know it, the drive is told that it needs to keep nothing, and every place is read again: whether a
//! drive gives zeros for what was discarded is not believed.
//!
//! Order: copies of superblocks, then the superblocks that tell where those are, then the tables that tell where
//! these are, a flush after each. A wipe that is cut off at any point finds the rest again.

use std::ops::Range;

use super::drive::Target;
use super::{ImageError, Steps, old};
use crate::storage::gpt;

/// Bytes per write, and per read when it is looked at again.
const PIECE: u64 = 1 << 20;
/// Bytes discarded per call: between two calls a signal is obeyed.
const DISCARD: u64 = 16 << 30;
/// Unit of what is wiped.
const ALIGN: u64 = 4096;

/// What is to be wiped, in its order.
#[derive(Debug)]
pub struct Wipe {
    waves: [Vec<Range<u64>>; 3],
}

impl Wipe {
    /// Looks at what lies on the drive; `kernel` are the partitions that the kernel shows.
    pub fn of(drive: &mut dyn Target, kernel: &[Range<u64>]) -> Wipe {
        let (size, block) = (drive.size(), drive.block());
        let ranges = old::ranges(drive, kernel);
        let tables = merged(old::tables(drive), size, block);
        let mut left = old::COPIES_MAX;
        let copies = ranges.iter().flat_map(|r| old::copies(drive, r, &mut left)).collect();
        let places = ranges.iter().flat_map(old::places).collect();
        let copies = merged(copies, size, block);
        let places = without(merged(places, size, block), &tables);
        Wipe { waves: [without(copies, &tables), places, tables] }
    }

    #[cfg(test)]
    pub(super) fn waves(&self) -> &[Vec<Range<u64>>] {
        &self.waves
    }

    /// Bytes that [`Wipe::run`] reports, reading them again included.
    pub fn bytes(&self) -> u64 {
        2 * self.waves.iter().flatten().map(|r| r.end - r.start).sum::<u64>()
    }

    /// Wipes all of it but the first block of the drive.
    ///
    /// # Errors
    /// [`ImageError::NotWiped`] if the drive gives something else than zeros afterwards.
    pub fn run(&self, drive: &mut dyn Target, steps: &mut Steps<'_>) -> Result<(), ImageError> {
        for wave in &self.waves {
            for piece in pieces(wave, PIECE) {
                drive.put(piece.start, &vec![0; (piece.end - piece.start) as usize])?;
                steps.done(piece.end - piece.start)?;
            }
            drive.sync()?;
        }
        let all = gpt::START..drive.size() / ALIGN * ALIGN;
        for piece in pieces(&[all], DISCARD) {
            if !drive.discard(piece)? {
                break;
            }
            steps.done(0)?;
        }
        drive.sync()?;
        let mut again = false;
        for piece in pieces(self.waves.iter().flatten(), PIECE) {
            let len = piece.end - piece.start;
            if drive.get(piece.start, len)?.iter().any(|b| *b != 0) {
                drive.put(piece.start, &vec![0; len as usize])?;
                again = true;
            }
            steps.done(len)?;
        }
        if again {
            drive.sync()?;
            for piece in pieces(self.waves.iter().flatten(), PIECE) {
                if drive.get(piece.start, piece.end - piece.start)?.iter().any(|b| *b != 0) {
                    return Err(ImageError::NotWiped { offset: piece.start });
                }
                steps.done(0)?;
            }
        }
        Ok(())
    }
}

/// The ranges in order, none overlapping, in whole units of [`ALIGN`] where the drive has them, without the first
/// block.
fn merged(mut ranges: Vec<Range<u64>>, size: u64, block: u64) -> Vec<Range<u64>> {
    for r in &mut ranges {
        let end = r.end.checked_next_multiple_of(ALIGN).unwrap_or(u64::MAX);
        *r = (r.start / ALIGN * ALIGN).max(block)..end.min(size);
    }
    ranges.retain(|r| !r.is_empty());
    ranges.sort_by_key(|r| r.start);
    let mut out: Vec<Range<u64>> = Vec::new();
    for r in ranges {
        match out.last_mut() {
            Some(last) if r.start <= last.end => last.end = last.end.max(r.end),
            _ => out.push(r),
        }
    }
    out
}

/// `ranges` less what lies in `others`; both as [`merged`] gives them.
fn without(ranges: Vec<Range<u64>>, others: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut out = Vec::new();
    for r in ranges {
        let mut at = r.start;
        for o in others.iter().filter(|o| o.start < r.end && r.start < o.end) {
            if at < o.start {
                out.push(at..o.start);
            }
            at = at.max(o.end);
        }
        if at < r.end {
            out.push(at..r.end);
        }
    }
    out
}

fn pieces<'a>(ranges: impl IntoIterator<Item = &'a Range<u64>>, bytes: u64) -> impl Iterator<Item = Range<u64>> {
    let cut = move |r: &Range<u64>| {
        let (start, end) = (r.start, r.end);
        (start..end).step_by(bytes as usize).map(move |at| at..(at + bytes).min(end))
    };
    ranges.into_iter().flat_map(cut)
}

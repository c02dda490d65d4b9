//! One model read from several places, each through a reader of its own: drives bound to vfio-pci, or
//! such drives and files of the kernel. Whole copies lie on all of them, and [`STRIPE_BYTES`] of a file's
//! offset are read from each in turn. (Places that the kernel reads need only one reader; see
//! [`super::open_copies`].)
//!
//! A request ends when the last of its pieces has ended, also if one has failed before: until then some
//! drive may write to its memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{
    Alignment, Bell, Completion, Extent, FileId, ReadError, ReadRequest, Reader, STRIPE_BYTES, StorageError, Watched,
};
use crate::memory::Region;

/// One reader is waited for no longer than this before the others are looked at. Drives have many times
/// that in their queues.
const TURN: Duration = Duration::from_micros(100);

struct Copy {
    reader: Box<dyn Reader>,
    /// This copy's part of the request that is being taken; kept for its memory.
    extents: Vec<Extent>,
}

/// A request in progress, by the tag of its pieces.
#[derive(Default)]
struct Open {
    tag: u64,
    /// Copies that have not answered; 0 where nothing is open.
    left: usize,
    bytes: u64,
    error: Option<ReadError>,
}

/// A reader that deals requests over readers of the same files.
pub struct Striped {
    copies: Vec<Copy>,
    /// Bytes of each file.
    lens: Vec<u64>,
    open: Vec<Open>,
    finished: Vec<Completion>,
    answers: Vec<Completion>,
    /// The copy that is waited for next.
    turn: usize,
    bell: Arc<Bell>,
}

impl Striped {
    /// Deals over `readers`, at least one, each of which has files of `lens` bytes in this order.
    pub fn new(readers: Vec<Box<dyn Reader>>, lens: Vec<u64>) -> Striped {
        let copies = readers.into_iter().map(|reader| Copy { reader, extents: Vec::new() }).collect();
        Striped {
            copies,
            lens,
            open: Vec::new(),
            finished: Vec::new(),
            answers: Vec::new(),
            turn: 0,
            bell: Bell::new(|| ()),
        }
    }

    /// Cuts an extent at the stripes and hands the pieces to their copies. A piece ends where the last
    /// aligned unit of its file does: copies differ in what they are aligned to.
    fn deal(&mut self, e: &Extent) {
        let len = self.lens.get(usize::from(e.file.0)).copied().unwrap_or(u64::MAX);
        let n = self.copies.len() as u64;
        let mut at = 0;
        while at < e.len {
            let offset = e.offset + at;
            let piece = (e.len - at).min(STRIPE_BYTES - offset % STRIPE_BYTES);
            let copy = &mut self.copies[(offset / STRIPE_BYTES % n) as usize];
            let align = u64::from(copy.reader.alignment(e.file).offset);
            let end = len.checked_next_multiple_of(align).unwrap_or(u64::MAX);
            let inside = piece.min(end.saturating_sub(offset));
            if inside > 0 {
                copy.extents.push(Extent { file: e.file, offset, len: inside, dst_offset: e.dst_offset + at });
            }
            at += piece;
        }
    }

    fn answered(&mut self, answer: Completion) {
        let Some(open) = self.open.get_mut(answer.tag as usize).filter(|o| o.left > 0) else { return };
        match answer.result {
            Ok(bytes) => open.bytes += bytes,
            Err(e) => _ = open.error.get_or_insert(e),
        }
        open.left -= 1;
        if open.left == 0 {
            let result = open.error.take().map_or(Ok(open.bytes), Err);
            self.finished.push(Completion { tag: open.tag, result });
        }
    }

    /// Takes in what copy `i` has to say.
    fn ask(&mut self, i: usize, wait: Option<Duration>) -> Result<(), ReadError> {
        let mut answers = std::mem::take(&mut self.answers);
        let asked = self.copies[i].reader.poll(&mut answers, wait);
        answers.drain(..).for_each(|answer| self.answered(answer));
        self.answers = answers;
        asked
    }

    /// The next copy, in turn, that has something outstanding.
    fn busy(&mut self) -> Option<usize> {
        let n = self.copies.len();
        let next = (0..n).map(|i| (self.turn + i) % n).find(|&i| self.copies[i].reader.outstanding() > 0)?;
        self.turn = next + 1;
        Some(next)
    }
}

impl Reader for Striped {
    fn name(&self) -> &'static str {
        let first = self.copies.first().map_or("mixed", |c| c.reader.name());
        if self.copies.iter().all(|c| c.reader.name() == first) { first } else { "mixed" }
    }

    fn alignment(&self, file: FileId) -> Alignment {
        let all = self.copies.iter().map(|c| c.reader.alignment(file));
        all.fold(Alignment { memory: 1, offset: 1 }, |a, b| Alignment {
            memory: a.memory.max(b.memory),
            offset: a.offset.max(b.offset),
        })
    }

    fn copies(&self) -> bool {
        self.copies.iter().any(|c| c.reader.copies())
    }

    fn watched(&self, to: &mut Vec<Watched>) {
        self.copies.iter().for_each(|c| c.reader.watched(to));
    }

    /// Its own bell ends the round of turns, those of its readers end the turn of one.
    fn bells(&self, to: &mut Vec<Arc<Bell>>) {
        to.push(Arc::clone(&self.bell));
        self.copies.iter().for_each(|c| c.reader.bells(to));
    }

    fn attach(&mut self, memory: &Region) -> Result<(), StorageError> {
        self.copies.iter_mut().try_for_each(|copy| copy.reader.attach(memory))
    }

    unsafe fn submit(&mut self, request: &ReadRequest<'_>) -> Result<(), ReadError> {
        request.extents.iter().for_each(|e| self.deal(e));
        let slot = self.open.iter().position(|o| o.left == 0).unwrap_or(self.open.len());
        if slot == self.open.len() {
            self.open.push(Open::default());
        }
        // One more than there are copies, so that the request stays open until all have been asked.
        self.open[slot] = Open { tag: request.tag, left: 1, bytes: 0, error: None };
        let mut refused = None;
        for copy in &mut self.copies {
            if !copy.extents.is_empty() && refused.is_none() {
                let piece = ReadRequest { tag: slot as u64, extents: &copy.extents, ..*request };
                // SAFETY: the caller's promise: the memory stays as it is until the request's completion,
                // which comes after those of all its pieces. The pieces do not overlap.
                match unsafe { copy.reader.submit(&piece) } {
                    Ok(()) => self.open[slot].left += 1,
                    // Not returned: other copies may be writing to the request's memory already.
                    Err(e) => refused = Some(e),
                }
            }
            copy.extents.clear();
        }
        self.answered(Completion { tag: slot as u64, result: refused.map_or(Ok(0), Err) });
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>, wait: Option<Duration>) -> Result<(), ReadError> {
        let end = wait.map(|w| Instant::now() + w);
        loop {
            for i in 0..self.copies.len() {
                self.ask(i, None)?;
            }
            let left = end.map_or(Duration::ZERO, |e| e.saturating_duration_since(Instant::now()));
            if !self.bell.heard()
                && self.finished.is_empty()
                && !left.is_zero()
                && let Some(i) = self.busy()
            {
                self.ask(i, Some(left.min(TURN)))?;
            } else {
                out.append(&mut self.finished);
                return Ok(());
            }
        }
    }

    fn outstanding(&self) -> usize {
        self.finished.len() + self.open.iter().filter(|o| o.left > 0).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Arena;
    use crate::storage::{Script, ScriptedReader};

    const SIZE: usize = 5 * STRIPE_BYTES as usize + 777;

    /// Copy `i` of a file: bytes differ by copy only in the high bit, so that it shows who read them.
    fn copy(i: usize) -> Vec<u8> {
        (0..SIZE).map(|at| ((at * 2_654_435_761) >> 9) as u8 & 0x7f | (i as u8) << 7).collect()
    }

    fn striped(scripts: [Script; 2]) -> Striped {
        let reader = |(i, s)| Box::new(ScriptedReader::new(vec![copy(i), copy(i)], s)) as Box<dyn Reader>;
        Striped::new(scripts.into_iter().enumerate().map(reader).collect(), vec![SIZE as u64; 2])
    }

    fn late(seed: u64) -> Script {
        Script { seed, delay_max: 7, ..Script::default() }
    }

    #[test]
    fn each_stripe_comes_from_its_copy() {
        for seed in 0..20 {
            let mut reader = striped([late(seed), late(seed + 100)]);
            let mut arena = Arena::new(16 << 20).unwrap();
            let whole = arena.take(SIZE as u64 + 4096).unwrap();
            let part = arena.take(3 << 20).unwrap();
            let from = STRIPE_BYTES - 4096;
            // The first is longer than the file, as a direct read's last unit is.
            for (tag, to, offset, len) in
                [(7, &whole, 0, SIZE as u64 + 99), (9, &part, from, 2 * STRIPE_BYTES), (8, &part, 0, 0)]
            {
                let extents = [Extent { file: FileId(1), offset, len, dst_offset: 0 }];
                let r = ReadRequest::to(to, tag, &extents);
                // SAFETY: the arena outlives the reads, whose regions are looked at when they have ended.
                unsafe { reader.submit(&r) }.unwrap();
            }
            let mut done = Vec::new();
            while reader.outstanding() > 0 {
                reader.poll(&mut done, Some(Duration::from_millis(10))).unwrap();
            }
            done.sort_by_key(|c| c.tag);
            let bytes: Vec<_> = done.into_iter().map(|c| (c.tag, c.result.unwrap())).collect();
            assert_eq!(bytes, [(7, SIZE as u64), (8, 0), (9, 2 * STRIPE_BYTES)]);
            let copies = [copy(0), copy(1)];
            let expected = |at: usize| copies[at / STRIPE_BYTES as usize % 2][at];
            // SAFETY: all reads have ended.
            let (whole, part) = unsafe {
                let bytes = |r: &crate::memory::Region, len| std::slice::from_raw_parts(r.addr().cast_const(), len);
                (bytes(&whole, SIZE), bytes(&part, 2 << 20))
            };
            assert!(whole.iter().enumerate().all(|(at, b)| *b == expected(at)));
            assert!(part.iter().enumerate().all(|(at, b)| *b == expected(at + from as usize)));
        }
    }

    #[test]
    fn a_copy_that_fails_ends_the_request_after_the_others() {
        for seed in 0..20 {
            let mut reader = striped([late(seed), Script { fail: 1.0, ..Script::default() }]);
            let mut arena = Arena::new(8 << 20).unwrap();
            let to = arena.take(6 << 20).unwrap();
            let extents = [Extent { file: FileId(0), offset: 0, len: 4 << 20, dst_offset: 0 }];
            let r = ReadRequest::to(&to, 3, &extents);
            // SAFETY: the arena outlives the reader's use of it.
            unsafe { reader.submit(&r) }.unwrap();
            let mut done = Vec::new();
            while done.is_empty() {
                reader.poll(&mut done, None).unwrap();
                let writing = reader.copies.iter().any(|c| c.reader.outstanding() > 0);
                assert!(done.is_empty() || !writing, "its memory is still written to");
            }
            assert_eq!((done.len(), done[0].tag, reader.outstanding()), (1, 3, 0));
            assert!(matches!(done[0].result, Err(ReadError::Failed { offset: STRIPE_BYTES, .. })), "{done:?}");
        }
    }

    /// Takes no request.
    struct Refuses;

    impl Reader for Refuses {
        fn name(&self) -> &'static str {
            "refuses"
        }

        fn alignment(&self, _: FileId) -> Alignment {
            Alignment { memory: 4, offset: 4096 }
        }

        fn attach(&mut self, _: &crate::memory::Region) -> Result<(), crate::storage::StorageError> {
            Ok(())
        }

        unsafe fn submit(&mut self, _: &ReadRequest<'_>) -> Result<(), ReadError> {
            let (name, what) = ("drive S2".to_owned(), "not mapped".to_owned());
            Err(ReadError::Failed { name, offset: 0, len: 0, what })
        }

        fn poll(&mut self, _: &mut Vec<Completion>, _: Option<Duration>) -> Result<(), ReadError> {
            Ok(())
        }

        fn outstanding(&self) -> usize {
            0
        }
    }

    #[test]
    fn a_refusal_is_told_when_the_others_have_ended() {
        let first = ScriptedReader::new(vec![copy(0)], late(5));
        let mut reader = Striped::new(vec![Box::new(first), Box::new(Refuses)], vec![SIZE as u64]);
        assert_eq!((reader.name(), reader.alignment(FileId(0)).offset), ("mixed", 4096));
        let mut arena = Arena::new(8 << 20).unwrap();
        let to = arena.take(6 << 20).unwrap();
        let extents = [Extent { file: FileId(0), offset: 0, len: 4 << 20, dst_offset: 0 }];
        let r = ReadRequest::to(&to, 3, &extents);
        // SAFETY: the arena outlives the reader's use of it.
        unsafe { reader.submit(&r) }.unwrap();
        let mut done = Vec::new();
        while done.is_empty() {
            reader.poll(&mut done, Some(Duration::from_millis(1))).unwrap();
        }
        assert_eq!(reader.copies[0].reader.outstanding(), 0);
        assert!(done.remove(0).result.unwrap_err().to_string().contains("drive S2"));
    }
}

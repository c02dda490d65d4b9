//! Units that do not lie in the file as they are to rest: with matrices of another type, or with some columns of a matrix alone.
//!
//! One thread reads pieces of some rows to staging regions; others turn each piece, row by row, into what is wanted of it at
//! its place: in RAM, or in a slot from which the whole unit is copied to the device. No unit is anywhere in its larger size.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::error::StreamError;
use super::load::{POLL, Progress, go_on, named};
use super::unit::SpanIn;
use crate::backend::quantise::{Unfit, quantise};
use crate::backend::{BackendError, CopyEngine, reference};
use crate::gguf::TensorType;
use crate::memory::Region;
use crate::storage::{Alignment, Completion, Extent, FileId, ReadRequest, Reader};

/// Bytes of a piece as the file has them, unless one row has more.
const PIECE_BYTES: u64 = 1 << 20;
/// Staging regions beside one for each thread: reads in flight.
const READS: usize = 4;

/// What becomes of the bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turning {
    /// They stay as they are.
    None,
    /// Rows of so many columns get another type.
    Type {
        /// Their type in the file.
        from: TensorType,
        /// The type that they get.
        to: TensorType,
        /// Columns.
        cols: usize,
    },
    /// Some columns of each row stay.
    Columns {
        /// Bytes of a row in the file.
        row: usize,
        /// Bytes before those that stay.
        before: usize,
        /// Bytes that stay.
        bytes: usize,
    },
}

/// A part of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TurnedSpan {
    /// The bytes in the file.
    pub span: SpanIn,
    /// First byte in the unit's frame.
    pub to: u64,
    /// What becomes of them.
    pub turn: Turning,
}

/// Where a unit comes to rest.
#[derive(Clone, Debug)]
pub enum Rest {
    /// In RAM.
    Ram(Region),
    /// At an address of the device, which has so many bytes for it.
    Device(u64, usize),
}

/// A unit that is made of what is read.
#[derive(Clone, Debug)]
pub struct TurnedUnit<'a> {
    /// Its parts.
    pub spans: &'a [TurnedSpan],
    /// Where it comes to rest.
    pub rest: Rest,
    /// Its name, for errors.
    pub name: &'a str,
}

/// What a device needs: its copy engine, whose slot `i` goes with the region `i`.
pub type Slots<'a> = (&'a dyn CopyEngine, &'a [Region]);

impl TurnedSpan {
    /// Bytes of a row in the file; of bytes that are copied, one.
    fn row_bytes(&self) -> u64 {
        match self.turn {
            Turning::None => 1,
            Turning::Type { from, cols, .. } => from.row_bytes(cols).unwrap_or(0).max(1) as u64,
            Turning::Columns { row, .. } => row.max(1) as u64,
        }
    }

    /// Bytes of what is made of a row.
    fn row_made(&self) -> usize {
        match self.turn {
            Turning::None => 1,
            Turning::Type { to, cols, .. } => to.row_bytes(cols).unwrap_or(0),
            Turning::Columns { bytes, .. } => bytes,
        }
    }

    /// Rows of a piece.
    fn piece_rows(&self) -> u64 {
        (PIECE_BYTES / self.row_bytes()).max(1)
    }

    /// Its pieces: rows before each, and how many it has.
    fn pieces(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let (rows, each) = (self.span.bytes / self.row_bytes(), self.piece_rows());
        (0..rows.div_ceil(each)).map(move |i| (i * each, each.min(rows - i * each)))
    }
}

/// Staging regions for these spans and so many threads: how many, and the bytes of each.
pub fn staging<'a>(
    spans: impl Iterator<Item = &'a TurnedSpan>,
    threads: usize,
    alignment: impl Fn(FileId) -> Alignment,
) -> (usize, u64) {
    let (mut pieces, mut most) = (0usize, 0);
    for s in spans {
        let rows = s.piece_rows().min(s.span.bytes / s.row_bytes());
        // It begins and ends inside of what is read for it.
        most = most.max(rows * s.row_bytes() + 2 * u64::from(alignment(s.span.file).offset));
        pieces = pieces.saturating_add(s.pieces().count());
    }
    (pieces.min(threads + READS), most.next_multiple_of(4096))
}

/// A piece on its way.
#[derive(Clone)]
struct Piece<'a> {
    unit: usize,
    span: &'a TurnedSpan,
    first: u64,
    rows: u64,
    /// Where its first byte lies in its staging region.
    at: u64,
    /// Where its unit is made.
    to: Region,
}

/// A piece that was read, with the number of its staging region and that region.
type Item<'a> = (usize, Region, Piece<'a>);

/// Pieces that were read, for the threads that turn them; none any more once it is closed.
#[derive(Default)]
struct Queue<'a> {
    waiting: Mutex<(VecDeque<Item<'a>>, bool)>,
    changed: Condvar,
}

impl<'a> Queue<'a> {
    fn push(&self, item: Item<'a>) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).0.push_back(item);
        self.changed.notify_one();
    }

    fn pop(&self) -> Option<Item<'a>> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match (waiting.1, waiting.0.pop_front()) {
                (true, _) => return None,
                (false, Some(item)) => return Some(item),
                (false, None) => waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// Closes the queue on every way out, so that its threads end.
struct Closing<'q, 'a>(&'q Queue<'a>);

impl Drop for Closing<'_, '_> {
    fn drop(&mut self) {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.0.changed.notify_all();
    }
}

/// Reads units, turns them by `threads` threads, and leaves them where they are to rest. `staging` are regions as the function of that
/// name says; `device` is there if a unit is to rest on one, with slots as large as the largest of those. `progress` gets bytes of the
/// file that were turned.
///
/// # Safety
/// The regions lie in memory that the reader was told of, and are used by nothing else until it is dropped: after an error or
/// an interruption, reads may still be in flight. Each unit has a place of its own, large enough for its spans.
///
/// # Errors
/// The first read that failed, by the name of its unit; numbers that the type does not hold; those of the device;
/// [`StreamError::Interrupted`] if `progress` broke off.
pub unsafe fn load_turned(
    reader: &mut dyn Reader,
    units: &[TurnedUnit<'_>],
    staging: &[Region],
    device: Option<Slots<'_>>,
    threads: usize,
    progress: Progress<'_>,
) -> Result<(), StreamError> {
    let queue = Queue::default();
    let (done, turned) = channel();
    std::thread::scope(|scope| {
        let _closing = Closing(&queue);
        for i in 0..threads.max(1) {
            let (queue, done) = (&queue, done.clone());
            let spawned = std::thread::Builder::new().name(format!("nt-requant-{i}"));
            let spawned = spawned.spawn_scoped(scope, move || work(queue, &done));
            spawned.map_err(|e| StreamError::Thread(Arc::new(e)))?;
        }
        // SAFETY: the caller's promise.
        unsafe { Loading::new(reader, units, staging, device).run(&queue, &turned, progress) }
    })
}

/// What a thread gives back: the staging region, and what of it failed.
type Turned = (usize, Result<(), Unfit>);

fn work(queue: &Queue<'_>, done: &Sender<Turned>) {
    let mut row = Vec::new();
    while let Some((region, from, piece)) = queue.pop() {
        // SAFETY: the read of the piece has ended, and the region is handed on with what comes of it.
        let result = unsafe { turn(from, &piece, &mut row) };
        if done.send((region, result)).is_err() {
            return;
        }
    }
}

/// Turns a piece from its staging region into its unit.
///
/// # Safety
/// The region holds the piece, the unit's place its rows; nobody else uses these bytes of either.
unsafe fn turn(from: Region, piece: &Piece<'_>, row: &mut Vec<f32>) -> Result<(), Unfit> {
    let s = piece.span;
    let bytes = (piece.rows * s.row_bytes()) as usize;
    // SAFETY: the caller's promise; the reader has filled these bytes.
    let source = unsafe { std::slice::from_raw_parts(from.addr().add(piece.at as usize), bytes) };
    let out_row = s.row_made();
    let (at, len) = (s.to as usize + piece.first as usize * out_row, piece.rows as usize * out_row);
    assert!(at + len <= piece.to.len(), "a unit is larger than its place");
    // SAFETY: within the region (above), and no other piece has these rows.
    let to = unsafe { std::slice::from_raw_parts_mut(piece.to.addr().add(at), len) };
    let rows = source.chunks_exact(s.row_bytes() as usize);
    match s.turn {
        Turning::None => to.copy_from_slice(source),
        Turning::Columns { before, bytes, .. } => {
            rows.zip(to.chunks_exact_mut(bytes)).for_each(|(row, to)| to.copy_from_slice(&row[before..before + bytes]));
        }
        Turning::Type { from, to: ty, cols } => {
            row.resize(cols, 0.0);
            for (source, to) in rows.zip(to.chunks_exact_mut(out_row)) {
                // Types were checked when the structure was built.
                if !reference::dequantize(from, source, row) {
                    return Err(Unfit::Blocks(cols, from));
                }
                quantise(ty, row, to)?;
            }
        }
    }
    Ok(())
}

/// The reading side.
struct Loading<'a, 'r> {
    reader: &'r mut dyn Reader,
    units: &'a [TurnedUnit<'a>],
    staging: &'a [Region],
    device: Option<Slots<'a>>,
    /// Unit, span and piece that come next.
    next: (usize, usize, Box<dyn Iterator<Item = (u64, u64)> + 'a>),
    /// Where the unit that is read now is made; none before its first piece.
    to: Option<Region>,
    /// Pieces by staging region.
    pieces: Vec<Option<Piece<'a>>>,
    free: Vec<usize>,
    /// Slots of the device that no unit is made in.
    slots: Vec<usize>,
    /// By unit: pieces that have not landed, and its slot.
    state: Vec<(usize, Option<usize>)>,
    turning: usize,
}

impl<'a, 'r> Loading<'a, 'r> {
    fn new(
        reader: &'r mut dyn Reader,
        units: &'a [TurnedUnit<'a>],
        staging: &'a [Region],
        device: Option<Slots<'a>>,
    ) -> Self {
        Loading {
            reader,
            units,
            staging,
            device,
            next: (0, 0, Box::new(std::iter::empty())),
            to: None,
            pieces: vec![None; staging.len()],
            free: (0..staging.len()).collect(),
            slots: (0..device.map_or(0, |(_, slots)| slots.len())).collect(),
            state: units.iter().map(|u| (u.spans.iter().map(|s| s.pieces().count()).sum(), None)).collect(),
            turning: 0,
        }
    }

    /// The next piece, if there is one and a place for it; `None` too while its unit waits for a slot.
    fn piece(&mut self) -> Option<Piece<'a>> {
        loop {
            let (unit, span, pieces) = &mut self.next;
            let u = self.units.get(*unit)?;
            if self.to.is_none() {
                self.to = Some(match &u.rest {
                    Rest::Ram(region) => region.clone(),
                    Rest::Device(..) => {
                        let slot = self.slots.pop()?;
                        self.state[*unit].1 = Some(slot);
                        self.device?.1[slot].clone()
                    }
                });
                *span = 0;
                *pieces = Box::new(u.spans.first().into_iter().flat_map(TurnedSpan::pieces));
            }
            if let (Some((first, rows)), Some(to)) = (pieces.next(), self.to.clone()) {
                return Some(Piece { unit: *unit, span: &u.spans[*span], first, rows, at: 0, to });
            }
            *span += 1;
            match u.spans.get(*span) {
                Some(s) => *pieces = Box::new(s.pieces()),
                None => {
                    self.to = None;
                    *unit += 1;
                }
            }
        }
    }

    /// Reads a piece to a free region.
    ///
    /// # Safety
    /// As [`load_turned`].
    unsafe fn read(&mut self, region: usize, mut piece: Piece<'a>) -> Result<(), StreamError> {
        let s = piece.span;
        let align = u64::from(self.reader.alignment(s.span.file).offset);
        let first = s.span.offset + piece.first * s.row_bytes();
        let end = first + piece.rows * s.row_bytes();
        let offset = first / align * align;
        piece.at = first - offset;
        let extents = [Extent { file: s.span.file, offset, len: end.next_multiple_of(align) - offset, dst_offset: 0 }];
        let to = &self.staging[region];
        let request =
            ReadRequest { tag: region as u64, extents: &extents, dst: to.addr(), urgent: false, dst_len: to.len() };
        // SAFETY: the region is free; the rest is the caller's promise.
        unsafe { self.reader.submit(&request) }.map_err(|e| named(self.units[piece.unit].name, e))?;
        self.pieces[region] = Some(piece);
        Ok(())
    }

    /// # Safety
    /// As [`load_turned`].
    unsafe fn run(
        mut self,
        queue: &Queue<'a>,
        turned: &Receiver<Turned>,
        progress: Progress<'_>,
    ) -> Result<(), StreamError> {
        let mut done: Vec<Completion> = Vec::new();
        let mut bytes = 0;
        loop {
            go_on(progress(bytes))?;
            while let Some(region) = self.free.pop() {
                let Some(piece) = self.piece() else {
                    self.free.push(region);
                    break;
                };
                // SAFETY: the region was free; the rest is the caller's promise.
                unsafe { self.read(region, piece) }?;
            }
            if self.free.len() == self.staging.len() {
                return Ok(());
            }
            if self.reader.outstanding() > 0 {
                let wait = if self.turning > 0 { POLL / 8 } else { POLL };
                self.reader.poll(&mut done, Some(wait)).map_err(|e| named("loading", e))?;
            }
            for c in done.drain(..) {
                let region = c.tag as usize;
                let Some(piece) = self.pieces[region].clone() else { continue };
                c.result.map_err(|e| named(self.units[piece.unit].name, e))?;
                queue.push((region, self.staging[region].clone(), piece));
                self.turning += 1;
            }
            let mut wait = self.reader.outstanding() == 0 && self.turning > 0;
            loop {
                let next = match wait {
                    true => turned.recv_timeout(POLL),
                    false => turned.try_recv().map_err(|_| RecvTimeoutError::Timeout),
                };
                let Ok((region, result)) = next else { break };
                wait = false;
                bytes += self.landed(region, result)?;
            }
        }
    }

    /// Takes a piece that was turned off; gives its bytes in the file. The last piece of a unit for the device sends that there.
    fn landed(&mut self, region: usize, result: Result<(), Unfit>) -> Result<u64, StreamError> {
        self.turning -= 1;
        self.free.push(region);
        let Some(piece) = self.pieces[region].take() else { return Ok(0) };
        let unit = &self.units[piece.unit];
        if let Err(why) = result {
            let (rows, name) = (piece.first..piece.first + piece.rows, unit.name);
            let what = format!(
                "{name}: a matrix cannot be requantised: in one of its rows {} to {} {why}",
                rows.start,
                rows.end - 1
            );
            return Err(StreamError::Unfit(what));
        }
        let state = &mut self.state[piece.unit];
        state.0 -= 1;
        if let (0, Some(slot)) = *state
            && let (&Rest::Device(addr, bytes), Some((engine, slots))) = (&unit.rest, self.device)
        {
            state.1 = None;
            let failed = |e: BackendError| StreamError::Device(Arc::new(e));
            // SAFETY: all of the unit was made in the slot, which is not written before the wait has ended; its place on the
            // device is its own.
            unsafe { engine.upload(slot, slots[slot].addr(), addr, bytes) }.map_err(failed)?;
            engine.wait_copied(slot).map_err(failed)?;
            self.slots.push(slot);
        }
        Ok(piece.rows * piece.span.row_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Arena;
    use crate::storage::{Script, ScriptedReader};
    use std::ops::ControlFlow;

    const COLS: usize = 64;
    const ROWS: usize = 9000;

    /// A file of floats, and its spans: some bytes as they are between two matrices.
    fn file() -> (Vec<u8>, Vec<TurnedSpan>) {
        let floats = (0..2 * ROWS * COLS).map(|i| ((i as f32 * 0.37).sin() * 3.0).to_le_bytes());
        let mut bytes: Vec<u8> = floats.flatten().collect();
        bytes.extend([7; 1000]);
        let (matrix, small) = ((ROWS * COLS * 4) as u64, (ROWS * COLS / 32 * 18) as u64);
        let turn = Turning::Type { from: TensorType::F32, to: TensorType::Q4_0, cols: COLS };
        let of = |offset, bytes| SpanIn { file: FileId(0), offset, bytes };
        let spans = vec![
            TurnedSpan { span: of(matrix, matrix), to: 0, turn },
            TurnedSpan { span: of(2 * matrix, 1000), to: small, turn: Turning::None },
            TurnedSpan { span: of(0, matrix), to: small + 1024, turn },
        ];
        (bytes, spans)
    }

    /// What loading three units leaves of the second, whose memory is filled with a mark before.
    fn load(
        bytes: Vec<u8>,
        script: Script,
        threads: usize,
        stop_at: usize,
    ) -> (Result<(), StreamError>, Vec<u8>, usize) {
        let (_, spans) = file();
        let frame = (2 * ROWS * COLS / 32 * 18 + 1024) as u64;
        let (n, most) = staging(spans.iter(), threads, |_| Alignment { memory: 1, offset: 1 });
        let mut arena = Arena::new(3 * frame.next_multiple_of(4096) + n as u64 * most).unwrap();
        let places: Vec<Region> = (0..3).map(|_| arena.take(frame).unwrap()).collect();
        let regions: Vec<Region> = (0..n).map(|_| arena.take(most).unwrap()).collect();
        let mut reader = ScriptedReader::new(vec![bytes], script);
        let names = ["a", "b", "c"];
        let units: Vec<TurnedUnit<'_>> = (places.iter().zip(names))
            .map(|(r, name)| TurnedUnit { spans: &spans, rest: Rest::Ram(r.clone()), name })
            .collect();
        let mut calls = 0;
        let mut progress = |_| {
            calls += 1;
            if calls > stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        // SAFETY: every region is its own, and the arena outlives the reader.
        let result = unsafe { load_turned(&mut reader, &units, &regions, None, threads, &mut progress) };
        drop(reader);
        // SAFETY: all threads have ended.
        let made = unsafe { std::slice::from_raw_parts(places[1].addr(), frame as usize) }.to_vec();
        (result, made, calls)
    }

    #[test]
    fn units_are_made_row_by_row_in_any_order_of_reads() {
        let (bytes, spans) = file();
        let mut want = vec![0; 2 * ROWS * COLS / 32 * 18 + 1024];
        for s in &spans {
            let from = &bytes[s.span.offset as usize..][..s.span.bytes as usize];
            match s.turn {
                Turning::None => want[s.to as usize..][..1000].copy_from_slice(from),
                Turning::Columns { .. } => unreachable!("none of this file"),
                Turning::Type { to: ty, .. } => {
                    let floats: Vec<f32> =
                        from.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                    quantise(ty, &floats, &mut want[s.to as usize..][..ROWS * COLS / 32 * 18]).unwrap();
                }
            }
        }
        for (threads, delay_max) in [(1, 0), (2, 5), (7, 3)] {
            let script = Script { delay_max, seed: threads as u64, ..Script::default() };
            let (result, made, _) = load(bytes.clone(), script, threads, usize::MAX);
            assert!(result.is_ok() && made == want, "{threads} threads: {result:?}");
        }
    }

    #[test]
    fn a_stop_ends_it_at_the_next_look_and_a_failed_read_names_its_unit() {
        let (bytes, _) = file();
        for at in [0, 1, 3] {
            let (result, _, calls) = load(bytes.clone(), Script { delay_max: 3, ..Script::default() }, 2, at);
            assert!(matches!(result, Err(StreamError::Interrupted)) && calls == at + 1, "{at}: {result:?}");
        }
        let (result, ..) = load(bytes.clone(), Script { fail: 1.0, ..Script::default() }, 2, usize::MAX);
        assert!(matches!(&result, Err(StreamError::Unit { unit, .. }) if unit == "a"), "{result:?}");
        let mut broken = bytes;
        broken[4 * 77..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let (result, ..) = load(broken, Script::default(), 2, usize::MAX);
        assert!(matches!(&result, Err(StreamError::Unfit(what)) if what.contains("not finite")), "{result:?}");
    }
}

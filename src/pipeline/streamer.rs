//! Drives the ring: a thread of its own reads units into slots while the caller computes.
//!
//! The caller acquires units in pass order and releases them; it sleeps while its unit is read.
//! Errors of reads surface where the unit is acquired. Rows of the embedding go before units.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::ring::{Acquire, Kept, Ring, Step};
use super::signals::{Farewell, Leaves, Signals};
use super::trace::{Event, EventKind, Trace};
use super::unit::UnitLayout;
use crate::memory::Region;
use crate::storage::{Alignment, Completion, Extent, FileId, ReadError, ReadRequest, Reader};

/// How long the reading thread sleeps before it looks for new wishes while reads are in flight.
pub(super) const POLL: Duration = Duration::from_millis(2);
/// Tag of a request for rows; units have their slot as tag.
const ROWS_TAG: u64 = u64::MAX;

/// Why a unit or a row cannot be delivered.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StreamError {
    /// Reading a unit failed.
    #[error("{unit}: {source}")]
    Unit {
        /// The unit's name.
        unit: String,
        /// What went wrong.
        source: ReadError,
    },
    /// Reading rows of the embedding failed.
    #[error("token_embd.weight: {0}")]
    Rows(ReadError),
    /// The reading thread ended.
    #[error("the reading thread ended unexpectedly")]
    ThreadGone,
    /// The pass was given up.
    #[error("the pass was given up")]
    Interrupted,
    /// The copy engine failed.
    #[error(transparent)]
    Device(Arc<crate::backend::BackendError>),
}

/// What a streamer is made of.
pub struct StreamerConfig {
    /// Reads of each unit.
    pub layouts: Arc<[UnitLayout]>,
    /// Name of each unit, for errors.
    pub names: Arc<[String]>,
    /// Streamed units of a pass, in order.
    pub schedule: Vec<Step>,
    /// Most units that are demanded at once.
    pub demand_max: usize,
    /// The slots.
    pub slots: Vec<Region>,
    /// Which of them are for some units alone.
    pub kept: Kept,
    /// Where rows are read to.
    pub rows: Region,
    /// Events to keep.
    pub trace_events: usize,
}

/// Times and bytes of the link to storage.
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamStats {
    /// Bytes read for units and rows.
    pub bytes: u64,
    /// Time in which a read was in flight.
    pub busy: Duration,
    /// Time the caller waited for units.
    pub stall: Duration,
}

struct Shared {
    ring: Ring,
    interrupted: bool,
    rows: Option<Vec<Extent>>,
    rows_result: Option<Result<u64, ReadError>>,
    /// The first read that failed since the last restart.
    failed: Option<ReadError>,
    /// What made the reading thread end; stays.
    dead: Option<ReadError>,
    /// The reading thread's end, planned or not.
    stop: bool,
    gone: bool,
    stats: StreamStats,
    trace: Trace,
}

impl Shared {
    /// Why nothing is delivered: what a read said, rather than that the thread is gone.
    fn cause(&self, of: impl FnOnce(ReadError) -> StreamError) -> StreamError {
        self.dead.as_ref().or(self.failed.as_ref()).cloned().map_or(StreamError::ThreadGone, of)
    }
}

impl Leaves for Shared {
    fn leave(&mut self) {
        self.gone = true;
    }
}

/// A unit in a slot.
#[derive(Clone, Copy, Debug)]
pub struct Staged {
    /// The slot, to be released.
    pub slot: usize,
    /// Its first byte.
    pub addr: *const u8,
}

/// The ring with its thread. One thread acquires and releases; others may ask for rows.
pub struct Streamer {
    signals: Arc<Signals<Shared>>,
    thread: Option<JoinHandle<()>>,
    slots: Vec<Region>,
    rows: Region,
    names: Arc<[String]>,
    row_extents: Mutex<Vec<Extent>>,
    alignments: Vec<Alignment>,
    /// Ends the reader's waits: there is something to be read.
    wished: Arc<AtomicBool>,
}

impl Streamer {
    /// Starts the reading thread.
    ///
    /// # Safety
    /// The regions of `config` must be used by nothing else, and stay mapped until the streamer is dropped.
    ///
    /// # Errors
    /// If no thread can be had.
    pub unsafe fn start(config: StreamerConfig, reader: Box<dyn Reader>, n_files: usize) -> std::io::Result<Streamer> {
        let mut reader = reader;
        let wished = Arc::new(AtomicBool::new(false));
        reader.end_waits_at(Arc::clone(&wished));
        let alignments = (0..n_files).map(|i| reader.alignment(FileId(i as u16))).collect();
        let ring = Ring::new(config.slots.len(), config.schedule, config.demand_max).keeping(config.kept);
        let shared = Shared {
            ring,
            interrupted: false,
            rows: None,
            rows_result: None,
            failed: None,
            dead: None,
            stop: false,
            gone: false,
            stats: StreamStats::default(),
            trace: Trace::new(config.trace_events),
        };
        let signals = Signals::new(shared);
        let worker = Worker {
            signals: signals.clone(),
            reader,
            layouts: config.layouts,
            slots: config.slots.clone(),
            rows: config.rows,
            started: vec![(0, Instant::now()); config.slots.len()],
            busy_since: None,
            wished: Arc::clone(&wished),
        };
        let thread = std::thread::Builder::new().name("nt-reader".into()).spawn(move || worker.run())?;
        Ok(Streamer {
            signals,
            thread: Some(thread),
            slots: config.slots,
            rows: config.rows,
            names: config.names,
            row_extents: Mutex::new(Vec::new()),
            alignments,
            wished,
        })
    }

    /// Waits for `unit`, the next streamed one of the pass. Its slot's bytes stay until
    /// [`Streamer::release`].
    pub fn acquire(&self, unit: usize) -> Result<Staged, StreamError> {
        match self.take(unit, true)? {
            Some(staged) => Ok(staged),
            None => Err(StreamError::ThreadGone),
        }
    }

    /// As [`Streamer::acquire`], but `None` if the unit's read has not ended.
    pub fn try_acquire(&self, unit: usize) -> Result<Option<Staged>, StreamError> {
        self.take(unit, false)
    }

    fn take(&self, unit: usize, wait: bool) -> Result<Option<Staged>, StreamError> {
        let began = Instant::now();
        let mut shared = self.signals.lock();
        let mut waited = false;
        let slot = loop {
            if shared.interrupted {
                return Err(StreamError::Interrupted);
            }
            match shared.ring.acquire(unit) {
                Acquire::Ready(slot) => break slot,
                Acquire::Failed => return Err(shared.cause(|source| self.unit_error(unit, source))),
                Acquire::Wait if shared.gone => return Err(shared.cause(|source| self.unit_error(unit, source))),
                Acquire::Wait if !wait => return Ok(None),
                Acquire::Wait => {
                    waited = true;
                    self.wish();
                    shared = self.signals.await_news(shared);
                }
            }
        };
        let now = Instant::now();
        if waited {
            shared.stats.stall += now - began;
            shared.trace.add(EventKind::Wait, unit, slot, began, now);
        }
        Ok(Some(Staged { slot, addr: self.slots[slot].addr() }))
    }

    /// Tells the reading thread that there is something to do, whether it sleeps or waits for reads.
    fn wish(&self) {
        self.wished.store(true, Ordering::Relaxed);
        self.signals.wish();
    }

    fn unit_error(&self, unit: usize, source: ReadError) -> StreamError {
        StreamError::Unit { unit: self.names[unit].clone(), source }
    }

    /// Gives a slot back.
    pub fn release(&self, slot: usize) {
        let mut shared = self.signals.lock();
        shared.ring.release(slot);
        drop(shared);
        self.wish();
    }

    /// Addresses of the slots.
    pub fn addresses(&self) -> impl Iterator<Item = u64> {
        self.slots.iter().map(|s| s.addr() as u64)
    }

    /// Announces the streamed units that will be acquired next (see [`Ring::demand`]).
    pub fn demand(&self, units: &[usize]) {
        self.signals.lock().ring.demand(units);
        self.wish();
    }

    /// Makes acquiring fail until [`Streamer::restart`]; wakes who waits.
    pub fn interrupt(&self) {
        self.signals.lock().interrupted = true;
        self.signals.tell();
    }

    /// Gives a pass up; the next one begins with the schedule's first unit. Nothing may use acquired
    /// slots any more.
    pub fn restart(&self) {
        let mut shared = self.signals.lock();
        shared.ring.restart();
        shared.failed = None;
        shared.interrupted = false;
    }

    /// Reads `bytes` bytes of `file` at each of `offsets` into `out`, back to back.
    pub fn read_rows(&self, file: FileId, offsets: &[u64], bytes: usize, out: &mut [u8]) -> Result<(), StreamError> {
        let align = u64::from(self.alignments[usize::from(file.0)].offset);
        // A row touches at most this many aligned bytes.
        let stride = ((bytes as u64).next_multiple_of(align) + align).next_multiple_of(4096);
        let at_once = (self.rows.len() as u64 / stride).max(1) as usize;
        for (offsets, out) in offsets.chunks(at_once).zip(out.chunks_mut(at_once * bytes)) {
            let extents = offsets.iter().enumerate().map(|(i, &o)| {
                let start = o / align * align;
                let end = (o + bytes as u64).next_multiple_of(align);
                Extent { file, offset: start, len: end - start, dst_offset: i as u64 * stride }
            });
            self.request_rows(extents)?;
            for (i, (&o, out)) in offsets.iter().zip(out.chunks_mut(bytes)).enumerate() {
                let at = i as u64 * stride + o % align;
                // SAFETY: the extent was read to `i * stride` of the region, which is large enough
                // for it (checked by the reader); the request is complete, so nobody writes there.
                unsafe {
                    std::ptr::copy_nonoverlapping(self.rows.addr().add(at as usize), out.as_mut_ptr(), out.len())
                };
            }
        }
        Ok(())
    }

    fn request_rows(&self, extents: impl Iterator<Item = Extent>) -> Result<(), StreamError> {
        // The list goes to the reading thread and back, so that no pass allocates.
        let mut list = self.row_extents.lock().unwrap_or_else(PoisonError::into_inner);
        list.clear();
        list.extend(extents);
        let mut shared = self.signals.lock();
        shared.rows = Some(std::mem::take(&mut *list));
        shared.rows_result = None;
        self.wish();
        loop {
            if let Some(result) = shared.rows_result.take() {
                *list = shared.rows.take().unwrap_or_default();
                return result.map(|_| ()).map_err(StreamError::Rows);
            }
            if shared.gone {
                return Err(shared.cause(StreamError::Rows));
            }
            shared = self.signals.await_news(shared);
        }
    }

    /// Totals so far.
    pub fn stats(&self) -> StreamStats {
        self.signals.lock().stats
    }

    /// Adds an event to the trace.
    pub fn trace(&self, kind: EventKind, unit: usize, slot: usize, from: Instant, to: Instant) {
        self.signals.lock().trace.add(kind, unit, slot, from, to);
    }

    /// The trace's events so far.
    pub fn events(&self) -> Vec<Event> {
        self.signals.lock().trace.events().to_vec()
    }

    /// Writes the trace (see [`Trace::write`]).
    pub fn write_trace(&self, out: &mut impl std::io::Write) -> std::io::Result<()> {
        self.signals.lock().trace.write(out, |u| self.names[u].clone())
    }
}

impl Drop for Streamer {
    fn drop(&mut self) {
        self.signals.lock().stop = true;
        self.wish();
        if let Some(t) = self.thread.take() {
            // A panicked thread has ended too, and its reader with it.
            let _ = t.join();
        }
    }
}

/// The reading thread.
struct Worker {
    signals: Arc<Signals<Shared>>,
    reader: Box<dyn Reader>,
    layouts: Arc<[UnitLayout]>,
    slots: Vec<Region>,
    rows: Region,
    /// Unit and start of the read into each slot.
    started: Vec<(usize, Instant)>,
    busy_since: Option<Instant>,
    wished: Arc<AtomicBool>,
}

impl Worker {
    fn run(mut self) {
        let _farewell = Farewell(self.signals.clone());
        let mut done = Vec::with_capacity(self.slots.len() + 1);
        let mut rows: Vec<Extent> = Vec::new();
        loop {
            let signals = self.signals.clone();
            // What is wished from here on is either seen below or ends the wait after that.
            self.wished.store(false, Ordering::Relaxed);
            let mut shared = signals.lock();
            loop {
                if shared.stop {
                    return;
                }
                let wants_rows = shared.rows.as_ref().is_some_and(|r| !r.is_empty()) && shared.rows_result.is_none();
                if wants_rows {
                    rows.clear();
                    rows.append(shared.rows.as_mut().unwrap_or(&mut Vec::new()));
                }
                let mut reads = [(0, 0, false); 8];
                let mut n = 0;
                while n < reads.len()
                    && let Some((unit, slot)) = shared.ring.next_read()
                {
                    reads[n] = (unit, slot, shared.ring.is_demanded(slot));
                    n += 1;
                }
                if wants_rows || n > 0 {
                    drop(shared);
                    if wants_rows {
                        self.submit(ROWS_TAG, &rows, self.rows, true);
                    }
                    for &(unit, slot, urgent) in &reads[..n] {
                        self.started[slot] = (unit, Instant::now());
                        let layouts = self.layouts.clone();
                        self.submit(slot as u64, &layouts[unit].extents, self.slots[slot], urgent);
                    }
                    shared = signals.lock();
                    continue;
                }
                if self.reader.outstanding() > 0 {
                    break;
                }
                shared = signals.await_wish(shared);
            }
            drop(shared);
            if let Err(e) = self.reader.poll(&mut done, Some(POLL)) {
                self.fail_all(&e);
                return;
            }
            self.settle(&mut done);
        }
    }

    fn submit(&mut self, tag: u64, extents: &[Extent], to: Region, urgent: bool) {
        self.busy_since.get_or_insert_with(Instant::now);
        let request = ReadRequest { tag, extents, dst: to.addr(), urgent, dst_len: to.len() };
        // SAFETY: the ring gives a slot to one read at a time and to the caller only when the read
        // has ended; the rows' region is used for one request at a time. Both live in the arena,
        // which is dropped after this thread has been joined.
        if let Err(e) = unsafe { self.reader.submit(&request) } {
            self.settle(&mut vec![Completion { tag, result: Err(e) }]);
        }
    }

    /// Tells the ring and the caller what has ended.
    fn settle(&mut self, done: &mut Vec<Completion>) {
        if done.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut shared = self.signals.lock();
        if let Some(since) = self.busy_since.take() {
            shared.stats.busy += now - since;
        }
        if self.reader.outstanding() > 0 {
            self.busy_since = Some(now);
        }
        for c in done.drain(..) {
            shared.stats.bytes += c.result.as_ref().map_or(0, |b| *b);
            if c.tag == ROWS_TAG {
                shared.rows_result = Some(c.result);
                continue;
            }
            let slot = c.tag as usize;
            let (unit, since) = self.started[slot];
            shared.trace.add(EventKind::Read, unit, slot, since, now);
            shared.ring.read_done(slot, c.result.is_ok());
            if let Err(e) = c.result {
                shared.failed.get_or_insert(e);
            }
        }
        drop(shared);
        self.signals.tell();
    }

    fn fail_all(&self, e: &ReadError) {
        let mut shared = self.signals.lock();
        shared.dead.get_or_insert_with(|| e.clone());
        if shared.rows.is_some() {
            shared.rows_result = Some(Err(e.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Arena;
    use crate::pipeline::SpanIn;
    use crate::storage::{Script, ScriptedReader};

    const UNIT: u64 = 5000;

    /// Streams a file of `n` units of equal size through `slots` slots.
    fn streamer(n: usize, slots: usize, holes: bool, script: Script) -> (Arena, Streamer, Vec<u8>) {
        streamer_on(n, slots, holes, script, |reader| Box::new(reader))
    }

    /// As [`streamer`], through what `wrap` makes of the reader.
    fn streamer_on(
        n: usize,
        slots: usize,
        holes: bool,
        script: Script,
        wrap: impl FnOnce(ScriptedReader) -> Box<dyn Reader>,
    ) -> (Arena, Streamer, Vec<u8>) {
        let data: Vec<u8> = (0..n as u64 * UNIT).map(|i| (i.wrapping_mul(0x9E37_79B9) >> 11) as u8).collect();
        let reader = ScriptedReader::new(vec![data.clone()], script);
        let layouts: Arc<[UnitLayout]> = (0..n as u64)
            .map(|i| {
                UnitLayout::new(&[SpanIn { file: FileId(0), offset: i * UNIT, bytes: UNIT }], |f| reader.alignment(f))
            })
            .collect();
        let mut arena = Arena::new(1 << 20).unwrap();
        let config = StreamerConfig {
            names: (0..n).map(|i| format!("unit {i}")).collect(),
            schedule: (0..n / 2)
                .flat_map(|i| if holes { vec![Step::Unit(i), Step::Hole] } else { vec![Step::Unit(i)] })
                .collect(),
            demand_max: n,
            slots: (0..slots).map(|_| arena.take(layouts[0].slot_bytes).unwrap()).collect(),
            kept: Kept::default(),
            rows: arena.take(64 << 10).unwrap(),
            trace_events: 100,
            layouts,
        };
        // SAFETY: the tests drop the streamer before the arena.
        (arena, unsafe { Streamer::start(config, wrap(reader), 1) }.unwrap(), data)
    }

    fn check(s: &Streamer, unit: usize, data: &[u8]) -> Result<(), StreamError> {
        let Staged { slot, addr: at } = s.acquire(unit)?;
        // SAFETY: the unit is held, so its slot holds `UNIT` bytes that nobody writes.
        let got = unsafe { std::slice::from_raw_parts(at, UNIT as usize) };
        assert_eq!(got, &data[unit * UNIT as usize..][..UNIT as usize]);
        s.release(slot);
        Ok(())
    }

    #[test]
    fn units_and_rows_arrive_whole_under_any_delay() {
        for seed in 0..40 {
            let script = Script { seed, delay_max: 4, ..Script::default() };
            let (_arena, s, data) = streamer(12, 2 + seed as usize % 5, false, script);
            for pass in 0..5u64 {
                let offsets: Vec<u64> = (0..20).map(|i| (i * 977 + pass * 131) % 50_000).collect();
                let mut rows = vec![0; 20 * 300];
                s.read_rows(FileId(0), &offsets, 300, &mut rows).unwrap();
                for (o, row) in offsets.iter().zip(rows.chunks(300)) {
                    assert_eq!(row, &data[*o as usize..][..300]);
                }
                for unit in 0..6 {
                    check(&s, unit, &data).unwrap();
                }
            }
            assert!(s.stats().bytes > 0);
        }
    }

    #[test]
    fn demanded_units_come_before_the_next_block() {
        for seed in 0..40 {
            let script = Script { seed, delay_max: 3, ..Script::default() };
            let (_arena, s, data) = streamer(12, 2 + seed as usize % 4, true, script);
            for _ in 0..4 {
                for unit in 0..6 {
                    check(&s, unit, &data).unwrap();
                    s.demand(&[11 - unit, 6, 11 - unit]);
                    for d in [11 - unit, 6, 11 - unit] {
                        check(&s, d, &data).unwrap();
                    }
                }
            }
        }
    }

    #[test]
    fn a_failed_read_is_named_and_the_next_pass_can_run() {
        let mut failures = 0;
        for seed in 0..60 {
            let script = Script { seed, delay_max: 2, fail: 0.05, truncate: 0.02, ..Script::default() };
            let (_arena, s, data) = streamer(12, 3, false, script);
            for _ in 0..4 {
                let pass = (0..6).try_for_each(|unit| check(&s, unit, &data));
                if let Err(e) = pass {
                    assert!(e.to_string().contains("unit ") && e.to_string().contains("scripted"), "{e}");
                    failures += 1;
                    s.restart();
                }
            }
        }
        assert!(failures > 20);
    }

    #[test]
    fn corruption_reaches_the_slot_where_checksums_can_see_it() {
        let script = Script { seed: 3, corrupt: 1.0, ..Script::default() };
        let (_arena, s, data) = streamer(12, 2, false, script);
        let at = s.acquire(0).unwrap().addr;
        // SAFETY: the unit is held.
        let got = unsafe { std::slice::from_raw_parts(at, UNIT as usize) };
        assert_eq!(got.iter().zip(&data).filter(|(a, b)| a != b).count(), 1);
    }

    /// A reader that dies at its poll number `at`.
    struct Dies {
        inner: ScriptedReader,
        at: usize,
    }

    impl Reader for Dies {
        fn name(&self) -> &'static str {
            "dies"
        }

        fn alignment(&self, file: FileId) -> Alignment {
            self.inner.alignment(file)
        }

        unsafe fn submit(&mut self, request: &ReadRequest<'_>) -> Result<(), ReadError> {
            // SAFETY: the caller's promise.
            unsafe { self.inner.submit(request) }
        }

        fn poll(&mut self, out: &mut Vec<Completion>, wait: Option<Duration>) -> Result<(), ReadError> {
            self.at = self.at.saturating_sub(1);
            if self.at == 0 {
                let (name, what) = ("drive S1".to_owned(), "the controller was reset".to_owned());
                return Err(ReadError::Failed { name, offset: 0, len: 0, what });
            }
            self.inner.poll(out, wait)
        }

        fn outstanding(&self) -> usize {
            self.inner.outstanding()
        }
    }

    /// Guards against the cause of a reader's death that is recorded and never shown: units and rows name it, at
    /// once and in later passes.
    #[test]
    fn what_made_the_reader_end_is_told_and_stays() {
        for at in 1..6 {
            let script = Script { seed: 7, delay_max: 4, ..Script::default() };
            let (_arena, s, data) = streamer_on(12, 3, false, script, |inner| Box::new(Dies { inner, at }));
            for pass in 0..3 {
                // However many passes are whole before that.
                let e = (0..).find_map(|i| check(&s, i % 6, &data).err()).unwrap().to_string();
                assert!(e.contains("unit ") && e.contains("controller was reset"), "pass {pass}: {e}");
                let rows = s.read_rows(FileId(0), &[5], 100, &mut [0; 100]).unwrap_err().to_string();
                assert!(rows.contains("controller was reset"), "{rows}");
                s.restart();
            }
        }
    }

    #[test]
    fn a_streamer_ends_in_the_middle_of_a_pass() {
        let script = Script { seed: 1, delay_max: 50, ..Script::default() };
        let (_arena, s, _) = streamer(12, 3, false, script);
        s.acquire(0).unwrap();
        drop(s);
    }
}

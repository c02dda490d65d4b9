//! Drives [`Frames`]: one thread per link, one lock, and the session's thread that takes units and gives them back.
//!
//! A thread takes moves under the lock, starts them outside of it, and waits in its link for their ends or for its
//! bell. Whoever changes the machine wakes, under the same lock, the sleeping threads that have something to do then.
//! Rows of the embedding go before units, past the machine, since they lie in no frame.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::frames::{CacheCounts, Frames, Hold, Move, Place, Rank, Spec, Step};
use super::latency::Latencies;
use super::link::{Carried, Cause, Done, Link, Refusal};
use super::reader::ReaderLink;
use super::upload::{UploadLink, Uploads};
use crate::backend::CopyEngine;
use crate::memory::Region;
use crate::pipeline::{Event, EventKind, StreamError, Trace, UnitLayout};
use crate::storage::{Alignment, Bell, Extent, FileId, Reader};

/// Longest wait of a link's thread that has no bell, and of one that has.
const POLL: Duration = Duration::from_millis(2);
const POLL_BELL: Duration = Duration::from_millis(20);
/// Moves that a thread takes at once.
const BATCH: usize = 8;

/// The links by number, as in [`links`].
const STORAGE: usize = 0;
const COPIES: usize = 1;

/// From storage to RAM, and from there to a device.
pub fn links() -> Vec<(Place, Place)> {
    vec![(Place::Storage, Place::Host), (Place::Host, Place::Device)]
}

/// What a flow is made of.
pub struct FlowConfig {
    /// What the machine is made for; its links are [`links`].
    pub spec: Spec,
    /// Reads of each unit.
    pub layouts: Arc<[UnitLayout]>,
    /// Name of each unit, for errors.
    pub names: Arc<[String]>,
    /// Frames in RAM.
    pub frames: Vec<Region>,
    /// Where rows are read to.
    pub rows: Region,
    /// Events to keep.
    pub trace_events: usize,
    /// Files of the model.
    pub n_files: usize,
    /// The way to a device, if it has memory of its own.
    pub device: Option<DeviceConfig>,
}

/// The way from RAM to a device.
pub struct DeviceConfig {
    /// Its copy engine, with a slot for each frame.
    pub engine: Arc<dyn CopyEngine>,
    /// Where units lie that rest in RAM.
    pub resting: Vec<Option<Region>>,
    /// Device addresses of frames.
    pub frames: Vec<u64>,
}

/// Times and bytes of a link.
#[derive(Clone, Copy, Debug)]
pub struct LinkStats {
    /// Bytes carried.
    pub bytes: u64,
    /// Time in which something was carried.
    pub busy: Duration,
    /// Whether `busy` was measured for all moves.
    pub timed: bool,
    /// Time in which the next consumer waited: the one that computes, or for storage the copies to a device.
    pub stall: Duration,
    /// From the moment at which a move could start, its thread asleep or waiting, to its start.
    pub starts: Latencies,
}

/// What caches of experts did for single tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheStats {
    /// How often experts were there.
    pub counts: CacheCounts,
    /// Time in which a demanded unit was being read.
    pub missing: Duration,
    /// The same, of each such unit.
    pub missing_all: Duration,
}

impl CacheStats {
    /// Demanded units in flight, the mean over the time in which there were any; `None` if there never were.
    pub fn depth(&self) -> Option<f64> {
        (self.missing > Duration::ZERO).then(|| self.missing_all.as_secs_f64() / self.missing.as_secs_f64())
    }

    /// Adds what was counted at another time.
    pub fn add(&mut self, more: &CacheStats) {
        let (c, m) = (&mut self.counts, &more.counts);
        c.demands += m.demands;
        c.hits += m.hits;
        c.misses += m.misses;
        c.missed += m.missed;
        c.misses_max = c.misses_max.max(m.misses_max);
        self.missing += more.missing;
        self.missing_all += more.missing_all;
    }

    /// What was counted since `before`, an earlier state of this; the most misses of a demand are those of all time.
    pub fn since(&self, before: &CacheStats) -> CacheStats {
        let (c, b) = (self.counts, before.counts);
        CacheStats {
            counts: CacheCounts {
                demands: c.demands - b.demands,
                hits: c.hits - b.hits,
                misses: c.misses - b.misses,
                missed: c.missed - b.missed,
                misses_max: c.misses_max,
            },
            missing: self.missing - before.missing,
            missing_all: self.missing_all - before.missing_all,
        }
    }
}

impl Default for LinkStats {
    fn default() -> LinkStats {
        let (busy, stall) = (Duration::ZERO, Duration::ZERO);
        LinkStats { bytes: 0, busy, timed: true, stall, starts: Latencies::default() }
    }
}

/// What a link's thread is at, as others see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sleep {
    Awake,
    /// In its link, which takes more.
    Waits,
    /// In its link, which takes no more.
    Full,
    /// Nothing is in flight.
    Idle,
    Gone,
}

struct Thread {
    sleep: Sleep,
    /// Its link is gone, which the machine knows.
    dead: bool,
    /// Since when it has had something to do.
    since: Option<Instant>,
    stats: LinkStats,
}

#[derive(Default)]
struct Rows {
    /// What is asked for; kept for its memory.
    extents: Vec<Extent>,
    asked: bool,
    result: Option<Result<u64, Cause>>,
}

struct State {
    frames: Frames<Cause>,
    threads: Vec<Thread>,
    rows: Rows,
    /// No move is started.
    paused: bool,
    stop: bool,
    /// What ended the link to storage.
    dead: Option<Cause>,
    /// Since when copies have nothing to carry because their units are being read.
    starved: Option<Instant>,
    /// Demanded units that are being read, and since when it has been as many.
    missing: (u32, Instant),
    caches: CacheStats,
    trace: Trace,
}

impl State {
    /// Counts a demanded unit whose read has begun (`by` 1) or ended (-1).
    fn missing(&mut self, by: i32) {
        let now = Instant::now();
        let (n, since) = self.missing;
        if n > 0 {
            self.caches.missing += now - since;
            self.caches.missing_all += (now - since) * n;
        }
        self.missing = (n.saturating_add_signed(by), now);
    }

    /// Counts the time in which copies to a device stand still for reads as storage's stall.
    fn note_starvation(&mut self) {
        let idle = self.threads.get(COPIES).is_some_and(|t| t.sleep == Sleep::Idle);
        let starved = idle && self.frames.waits_for_source(COPIES);
        match self.starved {
            None if starved => self.starved = Some(Instant::now()),
            Some(since) if !starved => {
                self.threads[STORAGE].stats.stall += since.elapsed();
                self.starved = None;
            }
            _ => {}
        }
    }
}

/// What wakes a link's thread.
struct Alarm {
    idle: Condvar,
    bells: Vec<Arc<Bell>>,
}

struct Shared {
    state: Mutex<State>,
    /// For the session's thread: something has changed.
    news: Condvar,
    alarms: Vec<Alarm>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock would be a bug of the machine; its state stays the best there is.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a thread's sleep.
    fn rouse(&self, state: &mut State, link: usize) {
        let thread = &mut state.threads[link];
        match thread.sleep {
            Sleep::Awake | Sleep::Gone => return,
            Sleep::Idle => self.alarms[link].idle.notify_one(),
            Sleep::Waits | Sleep::Full => self.alarms[link].bells.iter().for_each(|b| b.ring()),
        }
        thread.sleep = Sleep::Awake;
    }

    /// Wakes who has something to do, after each call that changes the machine.
    fn wake(&self, state: &mut State) {
        let mut asleep = 0;
        for (i, t) in state.threads.iter().enumerate() {
            asleep |= u32::from(matches!(t.sleep, Sleep::Idle | Sleep::Waits)) << i;
        }
        let wakes = if asleep == 0 || state.paused { 0 } else { state.frames.wakes(asleep) };
        for i in (0..state.threads.len()).filter(|i| wakes & 1 << i != 0) {
            state.threads[i].since.get_or_insert_with(Instant::now);
            self.rouse(state, i);
        }
        state.note_starvation();
        if state.frames.take_news() {
            self.news.notify_all();
        }
    }
}

/// A unit in a frame of the place of use.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// The frame.
    pub frame: usize,
    /// Its use, to be given back.
    pub rank: Rank,
}

/// Frames with their links and threads. One thread takes units and gives them back; others may ask for rows.
pub struct Flow {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    names: Arc<[String]>,
    frames: Vec<Region>,
    rows: Region,
    row_extents: Mutex<Vec<Extent>>,
    alignments: Vec<Alignment>,
}

impl Flow {
    /// Starts the threads.
    ///
    /// # Safety
    /// The regions and device frames of `config` hold the largest unit that goes through them, are used by nothing
    /// else, and stay until the flow is dropped; units that rest are never written.
    ///
    /// # Errors
    /// If no thread can be had.
    pub unsafe fn start(config: FlowConfig, reader: Box<dyn Reader>) -> std::io::Result<Flow> {
        let alignments = (0..config.n_files).map(|i| reader.alignment(FileId(i as u16))).collect();
        let unit_bytes = config.layouts.iter().map(|l| l.slot_bytes).collect();
        // SAFETY: the caller's promise; rows and frames are looked at when their reads have ended.
        let storage = unsafe { ReaderLink::new(reader, config.layouts, config.frames.clone(), config.rows.clone()) };
        let mut links: Vec<Box<dyn Link>> = vec![Box::new(storage)];
        if let Some(d) = config.device {
            let units = Uploads { unit_bytes, resting: d.resting, from: config.frames.clone(), to: d.frames };
            // SAFETY: the caller's promise, and the machine's for frames that a move comes from.
            links.push(Box::new(unsafe { UploadLink::new(d.engine, units) }));
        }
        let bells = |link: &dyn Link| {
            let mut bells = Vec::new();
            link.bells(&mut bells);
            Alarm { idle: Condvar::new(), bells }
        };
        let thread = |_| Thread { sleep: Sleep::Awake, dead: false, since: None, stats: LinkStats::default() };
        let shared = Arc::new(Shared {
            alarms: links.iter().map(|l| bells(l.as_ref())).collect(),
            news: Condvar::new(),
            state: Mutex::new(State {
                frames: Frames::new(config.spec),
                threads: (0..links.len()).map(thread).collect(),
                rows: Rows::default(),
                paused: false,
                stop: false,
                dead: None,
                starved: None,
                missing: (0, Instant::now()),
                caches: CacheStats::default(),
                trace: Trace::new(config.trace_events),
            }),
        });
        let mut flow = Flow {
            shared,
            threads: Vec::with_capacity(links.len()),
            names: config.names,
            frames: config.frames,
            rows: config.rows,
            row_extents: Mutex::new(Vec::new()),
            alignments,
        };
        for (number, link) in links.into_iter().enumerate() {
            let worker = Worker::new(Arc::clone(&flow.shared), number, link);
            let name = if number == STORAGE { "nt-reader" } else { "nt-copier" };
            // What was started before ends with `flow`.
            flow.threads.push(std::thread::Builder::new().name(name.into()).spawn(move || worker.run())?);
        }
        Ok(flow)
    }

    /// Waits for `unit`, the next streamed one of the pass. Its frame's bytes stay until [`Flow::release`].
    ///
    /// # Errors
    /// Why it will not come; the pass is then to be given up.
    pub fn acquire(&self, unit: usize) -> Result<Taken, StreamError> {
        let mut state = self.shared.lock();
        let mut since = None;
        loop {
            match state.frames.hold(unit) {
                Hold::Ready(frame, rank) => {
                    if let Some(since) = since {
                        self.waited(&mut state, unit, frame, since);
                    }
                    self.shared.wake(&mut state);
                    return Ok(Taken { frame, rank });
                }
                Hold::Failed(cause) => return Err(self.error(unit, cause)),
                Hold::Wait if state.threads.iter().any(|t| t.sleep == Sleep::Gone && !t.dead) => {
                    return Err(StreamError::ThreadGone);
                }
                Hold::Wait => {
                    since.get_or_insert_with(Instant::now);
                    self.shared.wake(&mut state);
                    state = self.shared.news.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn waited(&self, state: &mut State, unit: usize, frame: usize, since: Instant) {
        let now = Instant::now();
        // The last link on the way is the one whose consumer waited.
        if let Some(last) = state.threads.last_mut() {
            last.stats.stall += now - since;
        }
        state.trace.add(EventKind::Wait, unit, frame, since, now);
    }

    fn error(&self, unit: usize, cause: Cause) -> StreamError {
        match cause {
            Cause::Read(source) => StreamError::Unit { unit: self.names[unit].clone(), source },
            Cause::Device(e) => StreamError::Device(e),
        }
    }

    /// Gives a unit back: its use is over, or called where the device orders what comes after it.
    pub fn release(&self, taken: Taken) {
        let mut state = self.shared.lock();
        state.frames.reached(taken.rank);
        self.shared.wake(&mut state);
    }

    /// Announces the streamed units that will be acquired next, in the order that they get (see [`Frames::demand`]).
    pub fn demand(&self, units: &mut [usize], passing: bool) {
        let mut state = self.shared.lock();
        state.frames.demand(units, passing);
        self.shared.wake(&mut state);
    }

    /// Whether the demanded unit that comes next is there (see [`Frames::is_ready`]).
    pub fn is_ready(&self, unit: usize) -> bool {
        self.shared.lock().frames.is_ready(unit)
    }

    /// What caches did so far.
    pub fn caches(&self) -> CacheStats {
        let state = self.shared.lock();
        CacheStats { counts: state.frames.cache_counts(false), ..state.caches }
    }

    /// Empties caches, between passes.
    pub fn empty_caches(&self) {
        let mut state = self.shared.lock();
        state.frames.empty_caches();
        self.shared.wake(&mut state);
    }

    /// Gives a pass up; the next one begins with the schedule's first unit. Nothing may use acquired frames any more.
    pub fn give_up(&self) {
        let mut state = self.shared.lock();
        state.frames.give_up();
        self.shared.wake(&mut state);
    }

    /// Waits until nothing is in flight and goes on with another schedule, for use in `site` or, where `in_ram` says so, in
    /// RAM. Nothing may use acquired frames any more; what they hold is forgotten, but for caches. Without steps, nothing
    /// is written to a frame from here on.
    pub fn reschedule(&self, site: Place, steps: Vec<Step>, in_ram: Vec<bool>) {
        let mut state = self.shared.lock();
        state.paused = true;
        while state.threads.iter().any(|t| !matches!(t.sleep, Sleep::Idle | Sleep::Gone)) {
            for link in 0..state.threads.len() {
                if state.threads[link].sleep != Sleep::Idle {
                    self.shared.rouse(&mut state, link);
                }
            }
            state = self.shared.news.wait_timeout(state, POLL).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.frames = state.frames.rescheduled(site, steps, in_ram);
        state.paused = false;
        self.shared.wake(&mut state);
    }

    /// Addresses of the frames in RAM.
    pub fn addresses(&self) -> impl Iterator<Item = u64> {
        self.frames.iter().map(|s| s.addr() as u64)
    }

    /// Address of a frame in RAM.
    pub fn address(&self, frame: usize) -> u64 {
        self.frames[frame].addr() as u64
    }

    /// Reads `bytes` bytes of `file` at each of `offsets` into `out`, back to back.
    ///
    /// # Errors
    /// If a read failed.
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
        let mut state = self.shared.lock();
        std::mem::swap(&mut state.rows.extents, &mut *list);
        (state.rows.asked, state.rows.result) = (true, None);
        state.threads[STORAGE].since.get_or_insert_with(Instant::now);
        self.shared.rouse(&mut state, STORAGE);
        loop {
            if let Some(result) = state.rows.result.take() {
                std::mem::swap(&mut state.rows.extents, &mut *list);
                return result.map(|_| ()).map_err(rows_error);
            }
            if state.threads[STORAGE].sleep == Sleep::Gone {
                return Err(state.dead.clone().map_or(StreamError::ThreadGone, rows_error));
            }
            state = self.shared.news.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Totals of the link to storage so far.
    pub fn storage(&self) -> LinkStats {
        self.shared.lock().threads[STORAGE].stats
    }

    /// Totals of the link to a device so far; nothing without one.
    pub fn copies(&self) -> LinkStats {
        self.shared.lock().threads.get(COPIES).map_or_else(LinkStats::default, |t| t.stats)
    }

    /// Adds an event to the trace.
    pub fn trace(&self, kind: EventKind, unit: usize, slot: usize, from: Instant, to: Instant) {
        self.shared.lock().trace.add(kind, unit, slot, from, to);
    }

    /// The trace's events so far.
    pub fn events(&self) -> Vec<Event> {
        self.shared.lock().trace.events().to_vec()
    }

    /// Writes the trace (see [`Trace::write`]).
    ///
    /// # Errors
    /// As the writer.
    pub fn write_trace(&self, out: &mut impl std::io::Write) -> std::io::Result<()> {
        self.shared.lock().trace.write(out, |u| self.names[u].clone())
    }
}

fn rows_error(cause: Cause) -> StreamError {
    match cause {
        Cause::Read(e) => StreamError::Rows(e),
        Cause::Device(e) => StreamError::Device(e),
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stop = true;
        for link in 0..state.threads.len() {
            self.shared.rouse(&mut state, link);
        }
        drop(state);
        // The last first: copies end before the frames that they come from are left to the reader.
        for t in self.threads.drain(..).rev() {
            // A panicked thread has ended too, and its link with it.
            let _ = t.join();
        }
    }
}

/// The thread of a link.
struct Worker {
    shared: Arc<Shared>,
    number: usize,
    link: Box<dyn Link>,
    done: Vec<Done>,
    /// Moves that were taken, and what their start came to.
    taken: Vec<(Move, Result<(), Refusal>)>,
    rows: Vec<Extent>,
    /// When the move into each frame was started.
    started: Vec<Instant>,
    busy_since: Option<Instant>,
}

/// Marks a thread as gone however it ends, so that nobody waits for it.
struct OnExit(Arc<Shared>, usize);

impl Drop for OnExit {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.threads[self.1].sleep = Sleep::Gone;
        self.0.news.notify_all();
    }
}

impl Worker {
    fn new(shared: Arc<Shared>, number: usize, link: Box<dyn Link>) -> Worker {
        let to = links()[number].1;
        let pools = shared.lock().frames.frames_of(to);
        Worker {
            shared,
            number,
            link,
            done: Vec::with_capacity(pools + 1),
            taken: Vec::with_capacity(BATCH),
            rows: Vec::new(),
            started: vec![Instant::now(); pools],
            busy_since: None,
        }
    }

    fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        // Dropped before the link, whose drop may take as long as a read.
        let _on_exit = OnExit(Arc::clone(&shared), self.number);
        let wait = if shared.alarms[self.number].bells.is_empty() { POLL } else { POLL_BELL };
        let mut state = shared.lock();
        loop {
            state.threads[self.number].sleep = Sleep::Awake;
            if state.stop {
                return;
            }
            if self.take(&mut state) {
                let since = state.threads[self.number].since.take();
                drop(state);
                self.start();
                state = shared.lock();
                if let Some(since) = since {
                    state.threads[self.number].stats.starts.add(since.elapsed());
                }
                self.started(&mut state);
                continue;
            }
            state.threads[self.number].since = None;
            if self.link.outstanding() == 0 {
                state = self.idle(&shared, state);
                continue;
            }
            state.threads[self.number].sleep = if self.link.room() > 0 { Sleep::Waits } else { Sleep::Full };
            drop(state);
            let polled = self.link.poll(&mut self.done, wait);
            state = shared.lock();
            self.settle(&mut state);
            if let Err(cause) = polled {
                self.died(&mut state, cause);
                return;
            }
        }
    }

    /// Takes rows and moves; false if there are none.
    fn take(&mut self, state: &mut State) -> bool {
        if state.paused {
            return false;
        }
        self.rows.clear();
        if self.number == STORAGE && std::mem::take(&mut state.rows.asked) {
            self.rows.extend_from_slice(&state.rows.extents);
            state.rows.result = self.rows.is_empty().then_some(Ok(0));
        }
        while self.taken.len() < BATCH.min(self.link.room())
            && let Some(m) = state.frames.next_move(self.number)
        {
            self.taken.push((m, Ok(())));
        }
        !self.taken.is_empty() || !self.rows.is_empty()
    }

    /// Starts what was taken.
    fn start(&mut self) {
        let now = Instant::now();
        self.busy_since.get_or_insert(now);
        if !self.rows.is_empty()
            && let Err(cause) = self.link.start_rows(&self.rows)
        {
            self.done.push(Done::Rows(Err(cause)));
        }
        for (m, result) in &mut self.taken {
            self.started[m.to] = now;
            *result = self.link.start(*m);
        }
    }

    /// Says what became of the starts.
    fn started(&mut self, state: &mut State) {
        for (m, result) in self.taken.drain(..) {
            match result {
                Ok(()) => {
                    state.frames.queued(self.number, m);
                    if self.number == STORAGE && m.urgent {
                        state.missing(1);
                    }
                }
                Err(Refusal::Busy) => state.frames.give_back(self.number, m),
                Err(Refusal::Refused(cause)) => state.frames.moved(self.number, m, Err(cause)),
                Err(Refusal::Dead(cause)) => {
                    state.frames.give_back(self.number, m);
                    state.frames.died(self.number, cause);
                }
            }
        }
        if self.link.outstanding() == 0 {
            self.busy_since = None;
        }
        self.settle(state);
    }

    /// Says what has ended.
    fn settle(&mut self, state: &mut State) {
        if !self.done.is_empty() {
            self.count(state);
        }
        for done in self.done.drain(..) {
            match done {
                Done::Rows(result) => {
                    state.rows.result = Some(result);
                    self.shared.news.notify_all();
                }
                Done::Moved(m, result) => {
                    if self.number == STORAGE && m.urgent {
                        state.missing(-1);
                    }
                    state.frames.moved(self.number, m, result.map(|_| ()));
                }
            }
        }
        self.shared.wake(state);
    }

    fn count(&mut self, state: &mut State) {
        let now = Instant::now();
        let State { threads, trace, .. } = state;
        let stats = &mut threads[self.number].stats;
        let reads = self.number == STORAGE;
        if let Some(since) = self.busy_since.take().filter(|_| reads) {
            stats.busy += now - since;
        }
        if self.link.outstanding() > 0 {
            self.busy_since = Some(now);
        }
        for done in &self.done {
            match done {
                Done::Rows(result) => stats.bytes += result.as_ref().map_or(0, |b| *b),
                Done::Moved(m, result) if reads => {
                    stats.bytes += result.as_ref().map_or(0, |c| c.bytes);
                    trace.add(EventKind::Read, m.unit, m.to, self.started[m.to], now);
                }
                Done::Moved(m, Ok(Carried { bytes, seconds })) => {
                    stats.bytes += bytes;
                    stats.timed &= seconds.is_some();
                    let busy = Duration::from_secs_f64(seconds.unwrap_or(0.0));
                    stats.busy += busy;
                    if seconds.is_some() {
                        let began = now.checked_sub(busy).unwrap_or(now);
                        trace.add(EventKind::Copy, m.unit, m.to, began, now);
                    }
                }
                Done::Moved(_, Err(_)) => {}
            }
        }
    }

    /// Sleeps until it is roused.
    fn idle<'a>(&self, shared: &'a Shared, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.threads[self.number].sleep = Sleep::Idle;
        state.note_starvation();
        if state.paused {
            shared.news.notify_all();
        }
        while state.threads[self.number].sleep == Sleep::Idle {
            state = shared.alarms[self.number].idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    fn died(&mut self, state: &mut State, cause: Cause) {
        if self.number == STORAGE {
            state.rows.result = Some(Err(cause.clone()));
            state.dead = Some(cause.clone());
        }
        state.threads[self.number].dead = true;
        state.frames.died(self.number, cause);
        self.shared.news.notify_all();
    }
}

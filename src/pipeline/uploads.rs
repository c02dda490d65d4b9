//! The second half of the way to a device: brings units from RAM, or from the staging slots that the
//! streamer fills, into device slots.
//!
//! The same state machine as for storage, over device slots: a thread of its own takes the next unit
//! of the pass, waits for its read if it lives on storage, and starts its copy. The computing thread
//! never waits for a copy, only for its start; the device orders the rest by events.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::ring::{Acquire, Kept, Ring, Step};
use super::signals::{Farewell, Leaves, Signals};
use super::streamer::{StreamError, Streamer};
use super::trace::EventKind;
use super::{Feed, FeedStats};
use crate::backend::{BackendError, CopyEngine};
use crate::memory::Region;

/// Copies that are started beyond the one that runs, so that the link never idles between two.
const COPIES_AHEAD: usize = 1;

/// What uploads are made of.
pub struct UploadsConfig {
    /// Bytes of each unit, as they lie in a slot.
    pub unit_bytes: Vec<u64>,
    /// Where units lie that are resident in RAM.
    pub in_ram: Vec<Option<Region>>,
    /// Units that stream to the device, in pass order.
    pub schedule: Vec<Step>,
    /// Most units that are demanded at once.
    pub demand_max: usize,
    /// Whether experts are read from storage, so that the streamer's schedule has holes too.
    pub experts_on_storage: bool,
    /// Device addresses of the slots.
    pub slots: Vec<u64>,
    /// Which of them are for some units alone.
    pub kept: Kept,
}

struct Shared {
    ring: Ring,
    failed: Option<StreamError>,
    restart: bool,
    stop: bool,
    gone: bool,
    stats: FeedStats,
}

impl Leaves for Shared {
    fn leave(&mut self) {
        self.gone = true;
    }
}

/// Device slots and the thread that fills them.
pub struct Uploads {
    signals: Arc<Signals<Shared>>,
    thread: Option<JoinHandle<()>>,
    engine: Arc<dyn CopyEngine>,
    streamer: Arc<Streamer>,
    slots: Vec<u64>,
    on_storage: Vec<bool>,
    /// Streamed units of a demand that live on storage.
    demanded: Vec<usize>,
    experts_on_storage: bool,
    held: Option<usize>,
}

impl Uploads {
    /// Starts the copying thread.
    ///
    /// # Safety
    /// The regions and slots of `config` must hold the units' bytes, be used by nothing else, and stay until the
    /// uploads are dropped.
    ///
    /// # Errors
    /// If no thread can be had.
    pub unsafe fn start(
        config: UploadsConfig,
        engine: Arc<dyn CopyEngine>,
        streamer: Arc<Streamer>,
    ) -> std::io::Result<Uploads> {
        let on_storage: Vec<bool> = config.in_ram.iter().map(Option::is_none).collect();
        // Reads come in the order of the streamer's ring, so units that are read must be taken so.
        let reads = config.schedule.iter().any(|s| matches!(s, Step::Unit(u) if on_storage[*u]));
        let ring = Ring::new(config.slots.len(), config.schedule, config.demand_max).keeping(config.kept);
        let ring = if reads || config.experts_on_storage { ring.in_strict_order() } else { ring };
        let shared =
            Shared { ring, failed: None, restart: false, stop: false, gone: false, stats: FeedStats::default() };
        let signals = Signals::new(shared);
        let worker = Worker {
            signals: Arc::clone(&signals),
            engine: Arc::clone(&engine),
            streamer: Arc::clone(&streamer),
            unit_bytes: config.unit_bytes,
            in_ram: config.in_ram,
            slots: config.slots.clone(),
            flying: VecDeque::with_capacity(COPIES_AHEAD + 2),
        };
        let thread = std::thread::Builder::new().name("nt-copier".into()).spawn(move || worker.run())?;
        Ok(Uploads {
            signals,
            thread: Some(thread),
            engine,
            streamer,
            slots: config.slots,
            on_storage,
            demanded: Vec::with_capacity(config.demand_max),
            experts_on_storage: config.experts_on_storage,
            held: None,
        })
    }
}

fn device(e: BackendError) -> StreamError {
    StreamError::Device(Arc::new(e))
}

impl Feed for Uploads {
    fn acquire(&mut self, unit: usize) -> Result<u64, StreamError> {
        let began = Instant::now();
        let mut shared = self.signals.lock();
        let slot = loop {
            match shared.ring.acquire(unit) {
                Acquire::Ready(slot) => break slot,
                // After a failure nothing more is brought.
                Acquire::Failed | Acquire::Wait if shared.failed.is_some() || shared.gone => {
                    return Err(shared.failed.clone().unwrap_or(StreamError::ThreadGone));
                }
                Acquire::Failed => return Err(StreamError::ThreadGone),
                Acquire::Wait => {
                    self.signals.wish();
                    shared = self.signals.await_news(shared);
                }
            }
        };
        shared.stats.stall += began.elapsed();
        drop(shared);
        self.engine.acquire(slot).map_err(device)?;
        self.held = Some(slot);
        Ok(self.slots[slot])
    }

    fn release(&mut self) -> Result<(), StreamError> {
        if let Some(slot) = self.held.take() {
            self.engine.release(slot).map_err(device)?;
            self.signals.lock().ring.release(slot);
            self.signals.wish();
        }
        Ok(())
    }

    fn demand(&mut self, units: &[usize]) {
        if self.experts_on_storage {
            self.demanded.clear();
            self.demanded.extend(units.iter().copied().filter(|&u| self.on_storage[u]));
            self.streamer.demand(&self.demanded);
        }
        self.signals.lock().ring.demand(units);
        self.signals.wish();
    }

    fn restart(&mut self) {
        self.held = None;
        // What the device has been given must end before its slots are filled anew; if the device is
        // gone, so is what it would have done.
        let _ = self.engine.settle();
        self.streamer.interrupt();
        let mut shared = self.signals.lock();
        shared.restart = true;
        self.signals.wish();
        while shared.restart && !shared.gone {
            shared = self.signals.await_news(shared);
        }
    }

    fn stats(&self) -> FeedStats {
        self.signals.lock().stats
    }
}

impl Drop for Uploads {
    fn drop(&mut self) {
        self.signals.lock().stop = true;
        self.streamer.interrupt();
        self.signals.wish();
        if let Some(t) = self.thread.take() {
            // A panicked thread has ended too.
            let _ = t.join();
        }
    }
}

/// A copy that was started.
struct Flying {
    slot: usize,
    unit: usize,
    staged: Option<usize>,
}

/// The copying thread.
struct Worker {
    signals: Arc<Signals<Shared>>,
    engine: Arc<dyn CopyEngine>,
    streamer: Arc<Streamer>,
    unit_bytes: Vec<u64>,
    in_ram: Vec<Option<Region>>,
    slots: Vec<u64>,
    flying: VecDeque<Flying>,
}

impl Worker {
    fn run(mut self) {
        let _farewell = Farewell(Arc::clone(&self.signals));
        let signals = Arc::clone(&self.signals);
        loop {
            let mut shared = signals.lock();
            if shared.stop {
                drop(shared);
                self.land_all();
                return;
            }
            if shared.restart {
                drop(shared);
                self.start_over();
                continue;
            }
            // After a failure the order of reads is lost until a restart.
            let next = if shared.failed.is_none() { shared.ring.next_read() } else { None };
            match next {
                Some((unit, slot)) => {
                    drop(shared);
                    let result = self.bring(unit, slot);
                    self.report(slot, result);
                }
                None if self.flying.is_empty() => {
                    drop(signals.await_wish(shared));
                }
                None => {
                    drop(shared);
                    self.land_one();
                }
            }
        }
    }

    /// Starts the copy of `unit` into `slot`.
    fn bring(&mut self, unit: usize, slot: usize) -> Result<(), StreamError> {
        let (src, staged) = match self.in_ram[unit] {
            Some(region) => (region.addr().cast_const(), None),
            None => {
                let staged = match self.streamer.try_acquire(unit)? {
                    Some(staged) => staged,
                    None => {
                        // Slots that were copied from are what the reader may be waiting for.
                        self.land_all();
                        self.streamer.acquire(unit)?
                    }
                };
                (staged.addr, Some(staged.slot))
            }
        };
        let bytes = self.unit_bytes[unit] as usize;
        // SAFETY: resident units are never written after loading; a staging slot is released only
        // when its copy has landed. The ring gives a device slot to one unit at a time.
        let started = unsafe { self.engine.upload(slot, src, self.slots[slot], bytes) };
        self.flying.push_back(Flying { slot, unit, staged });
        started.map_err(device)?;
        while self.flying.len() > COPIES_AHEAD + 1 {
            self.land_one();
        }
        Ok(())
    }

    fn report(&mut self, slot: usize, result: Result<(), StreamError>) {
        let mut shared = self.signals.lock();
        shared.ring.read_done(slot, result.is_ok());
        if let Err(e) = result {
            shared.failed.get_or_insert(e);
        }
        self.signals.tell();
    }

    /// Waits for the oldest copy and gives its staging slot back.
    fn land_one(&mut self) {
        let Some(f) = self.flying.pop_front() else { return };
        let landed = self.engine.wait_copied(f.slot);
        if let Some(staged) = f.staged {
            self.streamer.release(staged);
        }
        if let Ok(Some(seconds)) = landed {
            let now = Instant::now();
            let began = now.checked_sub(Duration::from_secs_f64(seconds)).unwrap_or(now);
            self.streamer.trace(EventKind::Copy, f.unit, f.slot, began, now);
        }
        let mut shared = self.signals.lock();
        match landed {
            Ok(seconds) => {
                shared.stats.bytes += self.unit_bytes[f.unit];
                shared.stats.busy += Duration::from_secs_f64(seconds.unwrap_or(0.0));
                shared.stats.timed &= seconds.is_some();
            }
            Err(e) => {
                shared.failed.get_or_insert(device(e));
                self.signals.tell();
            }
        }
    }

    fn land_all(&mut self) {
        while !self.flying.is_empty() {
            self.land_one();
        }
    }

    fn start_over(&mut self) {
        self.land_all();
        self.streamer.restart();
        let mut shared = self.signals.lock();
        shared.ring.restart();
        shared.failed = None;
        shared.restart = false;
        self.signals.tell();
    }
}

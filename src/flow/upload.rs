//! The link from RAM to a device: its copy engine.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::frames::Move;
use super::link::{Carried, Cause, Done, Link, Refusal};
use crate::backend::{BackendError, CopyEngine};
use crate::memory::Region;
use crate::storage::Bell;

/// Copies in flight: the one that runs, and two behind it, so that the link never idles between two.
pub const COPIES_MAX: usize = 3;
/// How often the end of a copy is looked for.
const LOOK: Duration = Duration::from_micros(50);
/// Longest wait for a copy, and for what still computes from its frame: no pass takes nearly as long.
const COPY_MAX: Duration = Duration::from_secs(120);

/// Where units are copied from and to.
pub(super) struct Uploads {
    /// Bytes of each unit, as they lie in a frame.
    pub unit_bytes: Vec<u64>,
    /// Where units lie that rest in RAM.
    pub resting: Vec<Option<Region>>,
    /// Frames in RAM.
    pub from: Vec<Region>,
    /// Device addresses of frames; frame `i` is slot `i` of the engine.
    pub to: Vec<u64>,
}

/// Copies units into device frames.
pub(super) struct UploadLink {
    engine: Arc<dyn CopyEngine>,
    units: Uploads,
    /// Copies in the order in which they were queued, and when.
    flying: VecDeque<(Move, Instant)>,
    /// Where a sleep between two looks is cut short.
    woken: Arc<(Mutex<bool>, Condvar)>,
    bell: Arc<Bell>,
}

impl UploadLink {
    /// Copies by `engine`.
    ///
    /// # Safety
    /// Regions and device frames hold the largest unit that goes through them, are used by nothing else, and stay until
    /// the link is dropped. A unit that rests is never written; a frame that a move comes from is not written while the
    /// move is in flight.
    pub unsafe fn new(engine: Arc<dyn CopyEngine>, units: Uploads) -> UploadLink {
        let woken = Arc::new((Mutex::new(false), Condvar::new()));
        let to_wake = Arc::clone(&woken);
        let bell = Bell::new(move || {
            *to_wake.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
            to_wake.1.notify_one();
        });
        UploadLink { engine, units, flying: VecDeque::with_capacity(COPIES_MAX), woken, bell }
    }

    /// Takes off the copies that have ended, in order; an error if the oldest never will.
    fn land(&mut self, out: &mut Vec<Done>) -> Result<(), Cause> {
        while let Some(&(m, since)) = self.flying.front() {
            let result = match self.engine.try_copied(m.to) {
                Ok(None) if since.elapsed() > COPY_MAX => return Err(hangs(m)),
                Ok(None) => return Ok(()),
                Ok(Some(seconds)) => Ok(Carried { bytes: self.units.unit_bytes[m.unit], seconds }),
                Err(e) => Err(device(e)),
            };
            self.flying.pop_front();
            out.push(Done::Moved(m, result));
        }
        Ok(())
    }

    fn sleep(&self) {
        let (woken, changed) = &*self.woken;
        let guard = woken.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut guard, _) =
            changed.wait_timeout_while(guard, LOOK, |woken| !*woken).unwrap_or_else(PoisonError::into_inner);
        *guard = false;
    }
}

impl Drop for UploadLink {
    /// Both ends of a copy stay until it has ended; one that never does is left behind after a long wait.
    fn drop(&mut self) {
        for (m, _) in self.flying.drain(..) {
            if let Err(e) = self.engine.wait_copied(m.to) {
                tracing::debug!("a copy to slot {} was in flight at the end: {e}", m.to);
            }
        }
    }
}

fn hangs(m: Move) -> Cause {
    let (to, s) = (m.to, COPY_MAX.as_secs());
    let what = format!(
        "a copy to slot {to} has not ended after {s} s; the GPU or its link hangs (`dmesg` has lines with Xid then)"
    );
    device(BackendError::Device { backend: "cuda", what })
}

fn device(e: BackendError) -> Cause {
    Cause::Device(Arc::new(e))
}

impl Link for UploadLink {
    fn room(&self) -> usize {
        COPIES_MAX - self.flying.len()
    }

    fn start(&mut self, m: Move) -> Result<(), Refusal> {
        if self.room() == 0 {
            return Err(Refusal::Busy);
        }
        let from = match m.from {
            Some(frame) => Some(&self.units.from[frame]),
            None => self.units.resting[m.unit].as_ref(),
        };
        let Some(from) = from else { unreachable!("unit {} rests nowhere in RAM", m.unit) };
        let bytes = self.units.unit_bytes[m.unit] as usize;
        // SAFETY: `new`: neither end is written by anyone else while the move is in flight, and both hold the unit.
        let started = unsafe { self.engine.upload(m.to, from.addr(), self.units.to[m.to], bytes) };
        match started {
            Ok(()) => self.flying.push_back((m, Instant::now())),
            Err(e) => {
                // Something of it may have been queued: the source must not be filled anew before that is over.
                let _ = self.engine.wait_copied(m.to);
                return Err(Refusal::Refused(device(e)));
            }
        }
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Done>, wait: Duration) -> Result<(), Cause> {
        let until = Instant::now() + wait;
        let before = out.len();
        loop {
            self.land(out)?;
            let rung = self.bell.heard();
            if rung || out.len() > before || self.flying.is_empty() || Instant::now() >= until {
                return Ok(());
            }
            self.sleep();
        }
    }

    fn outstanding(&self) -> usize {
        self.flying.len()
    }

    fn bells(&self, to: &mut Vec<Arc<Bell>>) {
        to.push(Arc::clone(&self.bell));
    }
}

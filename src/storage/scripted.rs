//! A reader for tests: delays, reorders, fails and corrupts, by a seed.

use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Alignment, Completion, Extent, FileId, ReadError, ReadRequest, Reader, StorageError};
use crate::memory::Region;

/// What goes wrong, as shares of requests (0 to 1).
#[derive(Clone, Copy, Debug, Default)]
pub struct Script {
    /// Seed of all decisions.
    pub seed: u64,
    /// Polls that a request may be late.
    pub delay_max: u32,
    /// Share of requests that fail.
    pub fail: f64,
    /// Share of requests that end early.
    pub truncate: f64,
    /// Share of requests with one wrong byte.
    pub corrupt: f64,
}

struct Pending {
    tag: u64,
    extents: Vec<Extent>,
    dst: *mut u8,
    late: u32,
}

/// Reads from memory, as a script says.
pub struct ScriptedReader {
    files: Vec<Vec<u8>>,
    script: Script,
    rng: ChaCha8Rng,
    pending: Vec<Pending>,
    memory: Vec<Region>,
}

// SAFETY: the addresses are only written during `poll`, under the contract of `Reader::submit`.
unsafe impl Send for ScriptedReader {}

impl ScriptedReader {
    /// A reader over files that are held in memory.
    pub fn new(files: Vec<Vec<u8>>, script: Script) -> ScriptedReader {
        ScriptedReader {
            files,
            script,
            rng: ChaCha8Rng::seed_from_u64(script.seed),
            pending: Vec::new(),
            memory: Vec::new(),
        }
    }

    fn complete(&mut self, p: &Pending) -> Result<u64, ReadError> {
        let name = || "scripted".to_string();
        let mut bytes = 0;
        for e in &p.extents {
            if self.rng.random_bool(self.script.fail) {
                return Err(ReadError::Failed {
                    name: name(),
                    offset: e.offset,
                    len: e.len,
                    what: "the script says so".into(),
                });
            }
            if self.rng.random_bool(self.script.truncate) {
                return Err(ReadError::Truncated { name: name(), offset: e.offset, len: e.len, end: e.offset });
            }
            let file = &self.files[usize::from(e.file.0)];
            let from = e.offset as usize;
            let n = (e.len as usize).min(file.len().saturating_sub(from));
            // SAFETY: `submit`'s contract gives this reader the destination until it completes, and
            // the extent lies within it.
            let to = unsafe { std::slice::from_raw_parts_mut(p.dst.add(e.dst_offset as usize), n) };
            to.copy_from_slice(&file[from..from + n]);
            if n > 0 && self.rng.random_bool(self.script.corrupt) {
                to[self.rng.random_range(0..n)] ^= 1;
            }
            bytes += n as u64;
        }
        Ok(bytes)
    }
}

impl Reader for ScriptedReader {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn alignment(&self, _: FileId) -> Alignment {
        Alignment { memory: 1, offset: 1 }
    }

    fn attach(&mut self, memory: &Region) -> Result<(), StorageError> {
        self.memory.push(memory.clone());
        Ok(())
    }

    unsafe fn submit(&mut self, r: &ReadRequest<'_>) -> Result<(), ReadError> {
        let late = self.rng.random_range(0..=self.script.delay_max);
        self.pending.push(Pending { tag: r.tag, extents: r.extents.to_vec(), dst: r.dst, late });
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>, _: Option<Duration>) -> Result<(), ReadError> {
        let (due, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.pending).into_iter().partition(|p| p.late == 0);
        self.pending = later;
        self.pending.iter_mut().for_each(|p| p.late -= 1);
        for p in due {
            let result = self.complete(&p);
            out.push(Completion { tag: p.tag, result });
        }
        Ok(())
    }

    fn outstanding(&self) -> usize {
        self.pending.len()
    }
}

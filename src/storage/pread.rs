//! Reads through a pool of threads that call pread: what works where io_uring is refused.

use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::split::{Chunk, Requests};
use super::{Alignment, Bell, Completion, DirectFile, FileId, ReadError, ReadRequest, Reader, StorageError, Watched};
use crate::memory::Region;

/// Threads per copy, and so reads in flight.
pub(crate) const THREADS: usize = 8;

/// A chunk that was read, or nothing where the bell was rung.
type Outcome = Option<(Chunk, Result<u64, String>)>;

/// A reader over a pool of threads.
pub struct PreadReader {
    files: Arc<[DirectFile]>,
    requests: Requests,
    jobs: Option<Sender<Chunk>>,
    outcomes: Receiver<Outcome>,
    threads: Vec<JoinHandle<()>>,
    n_flying: usize,
    bell: Arc<Bell>,
    /// What reads go to.
    memory: Vec<Region>,
}

impl PreadReader {
    /// Starts a pool over `files`, which are `copies` times the same files, copy by copy; an error says
    /// that not one thread could be had.
    pub fn new(files: Vec<DirectFile>, copies: usize) -> std::io::Result<PreadReader> {
        let files: Arc<[DirectFile]> = files.into();
        let (jobs, queue) = channel::<Chunk>();
        let queue = Arc::new(Mutex::new(queue));
        let (report, outcomes) = channel();
        let ring = Sender::clone(&report);
        let bell = Bell::new(move || _ = ring.send(None));
        let mut refused = None;
        let threads: Vec<_> = (0..THREADS * copies)
            .filter_map(|i| {
                let (files, queue, report) = (files.clone(), queue.clone(), report.clone());
                std::thread::Builder::new()
                    .name(format!("nt-pread-{i}"))
                    .spawn(move || work(&files, &queue, &report))
                    .map_err(|e| refused = Some(e))
                    .ok()
            })
            .collect();
        if threads.is_empty() {
            return Err(refused.unwrap_or_else(|| std::io::Error::other("no thread could be started")));
        }
        let requests = Requests::over(files.len(), copies);
        Ok(PreadReader { files, requests, jobs: Some(jobs), outcomes, threads, n_flying: 0, bell, memory: Vec::new() })
    }

    fn issue(&mut self) {
        while self.n_flying < 2 * self.threads.len()
            && let Some(chunk) = self.requests.next()
        {
            match self.jobs.as_ref().map(|jobs| jobs.send(chunk)) {
                Some(Ok(())) => self.n_flying += 1,
                // A chunk that nobody takes must not leave its request open.
                _ => {
                    let gone = Err("the reading threads are gone".into());
                    self.requests.chunk_done(chunk, gone, &self.files[chunk.file]);
                }
            }
        }
    }

    fn take(&mut self, outcome: Outcome) {
        let Some((chunk, result)) = outcome else { return };
        self.n_flying -= 1;
        self.requests.chunk_done(chunk, result, &self.files[chunk.file]);
    }
}

fn work(files: &[DirectFile], queue: &Mutex<Receiver<Chunk>>, report: &Sender<Outcome>) {
    loop {
        let job = match queue.lock() {
            Ok(q) => q.recv(),
            Err(_) => return,
        };
        let Ok(chunk) = job else { return };
        let f = &files[chunk.file];
        // SAFETY: the memory is valid and unshared until the completion, by `Reader::submit`'s
        // contract; the kernel writes it before it is read.
        let buffer = unsafe { std::slice::from_raw_parts_mut(chunk.dst, chunk.len as usize) };
        let result = loop {
            match f.file.read_at(buffer, f.start + chunk.offset) {
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                other => break other.map(|n| n as u64).map_err(|e| e.to_string()),
            }
        };
        f.forget(chunk.offset, chunk.len);
        if report.send(Some((chunk, result))).is_err() {
            return;
        }
    }
}

impl Reader for PreadReader {
    fn name(&self) -> &'static str {
        "pread"
    }

    fn alignment(&self, file: FileId) -> Alignment {
        self.requests.alignment(&self.files, file)
    }

    fn copies(&self) -> bool {
        self.files.iter().any(|f| f.copies)
    }

    fn attach(&mut self, memory: &Region) -> Result<(), StorageError> {
        self.memory.push(memory.clone());
        Ok(())
    }

    unsafe fn submit(&mut self, request: &ReadRequest<'_>) -> Result<(), ReadError> {
        self.requests.add(request)?;
        self.issue();
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>, wait: Option<Duration>) -> Result<(), ReadError> {
        while let Ok(outcome) = self.outcomes.try_recv() {
            self.take(outcome);
        }
        self.issue();
        let rung = self.bell.heard();
        if let Some(wait) = wait.filter(|_| !rung && !self.requests.has_done() && self.n_flying > 0) {
            match self.outcomes.recv_timeout(wait) {
                Ok(outcome) => self.take(outcome),
                Err(RecvTimeoutError::Timeout) if !self.threads.iter().all(JoinHandle::is_finished) => {}
                // The bell keeps the channel open.
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(ReadError::Failed {
                        name: "pread".into(),
                        offset: 0,
                        len: 0,
                        what: "its threads are gone".into(),
                    });
                }
            }
            self.issue();
            self.bell.heard();
        }
        self.requests.drain_done(out);
        Ok(())
    }

    fn watched(&self, to: &mut Vec<Watched>) {
        to.extend(self.files.iter().filter_map(|f| f.watched.clone()));
    }

    fn bells(&self, to: &mut Vec<Arc<Bell>>) {
        to.push(Arc::clone(&self.bell));
    }

    fn outstanding(&self) -> usize {
        self.requests.outstanding()
    }
}

impl Drop for PreadReader {
    fn drop(&mut self) {
        // Closing the queue ends the threads, each after the read it is in.
        self.jobs = None;
        for t in self.threads.drain(..) {
            // A thread that panicked has ended, which is what is waited for.
            let _ = t.join();
        }
    }
}

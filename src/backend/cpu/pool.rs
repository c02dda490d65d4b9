//! A persistent thread pool: the caller is thread 0, workers spin briefly for the next job, then
//! park. A job is a number of equal tasks, handed out one by one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long an idle worker spins before it parks.
const SPIN: Duration = Duration::from_micros(50);

/// A task body: `(thread, task)`.
type Body<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// The pool. One job runs at a time.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<(JoinHandle<()>, Thread)>,
}

struct Shared {
    /// Bumped for each job.
    epoch: AtomicU64,
    /// Next task.
    next: AtomicUsize,
    /// Number of tasks.
    tasks: AtomicUsize,
    /// Workers that are not yet done with the job.
    busy: AtomicUsize,
    /// The job's body: two words of a fat pointer.
    body: [AtomicUsize; 2],
    parked: Vec<AtomicBool>,
    panicked: AtomicBool,
    quit: AtomicBool,
}

impl Pool {
    /// A pool of `threads` threads, the caller included.
    pub fn new(threads: usize) -> Result<Pool, std::io::Error> {
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            tasks: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            body: [AtomicUsize::new(0), AtomicUsize::new(0)],
            parked: (0..threads).map(|_| AtomicBool::new(false)).collect(),
            panicked: AtomicBool::new(false),
            quit: AtomicBool::new(false),
        });
        let mut pool = Pool { shared, workers: Vec::new() };
        for i in 1..threads.max(1) {
            let shared = Arc::clone(&pool.shared);
            let handle = std::thread::Builder::new().name(format!("nt-cpu-{i}")).spawn(move || shared.work(i))?;
            let thread = handle.thread().clone();
            pool.workers.push((handle, thread));
        }
        Ok(pool)
    }

    /// Threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `body(thread, task)` for every task of `0..tasks` and returns when all are done.
    pub fn run(&mut self, tasks: usize, body: Body<'_>) {
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|task| body(0, task));
            return;
        }
        let s = &*self.shared;
        // SAFETY: a reference to a trait object is two words; it is turned back only while this
        // call waits for the workers, so the lifetime that is lost here is kept by hand.
        let words: [usize; 2] = unsafe { std::mem::transmute(body) };
        s.body[0].store(words[0], Ordering::Relaxed);
        s.body[1].store(words[1], Ordering::Relaxed);
        s.tasks.store(tasks, Ordering::Relaxed);
        s.next.store(0, Ordering::Relaxed);
        s.busy.store(self.workers.len(), Ordering::Relaxed);
        s.epoch.fetch_add(1, Ordering::SeqCst);
        for (i, (_, thread)) in self.workers.iter().enumerate() {
            if s.parked[i + 1].load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
        // The workers hold the body until they are done, so a panic here must wait for them too.
        let wait = WaitForWorkers(s);
        s.tasks(0, body);
        drop(wait);
        assert!(!s.panicked.load(Ordering::Relaxed), "a worker thread panicked");
    }
}

/// Waits, when dropped, until no worker holds the job.
struct WaitForWorkers<'a>(&'a Shared);

impl Drop for WaitForWorkers<'_> {
    fn drop(&mut self) {
        let mut spins = 0u32;
        while self.0.busy.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins > 20_000 {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (handle, thread) in self.workers.drain(..) {
            thread.unpark();
            // A worker's panic was reported by `run`.
            let _ = handle.join();
        }
    }
}

impl Shared {
    fn tasks(&self, thread: usize, body: Body<'_>) {
        let tasks = self.tasks.load(Ordering::Relaxed);
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return;
            }
            body(thread, task);
        }
    }

    fn work(&self, me: usize) {
        let mut seen = 0;
        loop {
            seen = self.next_job(me, seen);
            if self.quit.load(Ordering::SeqCst) {
                return;
            }
            let words = [self.body[0].load(Ordering::Relaxed), self.body[1].load(Ordering::Relaxed)];
            // SAFETY: `run` stored these words before it bumped the epoch and does not return
            // before this worker has counted itself out of `busy`.
            let body: Body<'_> = unsafe { std::mem::transmute(words) };
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.tasks(me, body)));
            if done.is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.busy.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for the epoch after `seen`.
    fn next_job(&self, me: usize, seen: u64) -> u64 {
        let start = Instant::now();
        loop {
            for _ in 0..100 {
                let epoch = self.epoch.load(Ordering::SeqCst);
                if epoch != seen {
                    return epoch;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() < SPIN {
                continue;
            }
            self.parked[me].store(true, Ordering::SeqCst);
            while self.epoch.load(Ordering::SeqCst) == seen {
                std::thread::park();
            }
            self.parked[me].store(false, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 8] {
            let mut pool = Pool::new(threads).unwrap();
            for tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..50 {
                    pool.run(tasks, &|thread, task| {
                        assert!(thread < threads);
                        counts[task].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 50));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

//! A persistent thread pool: the caller is thread 0, workers spin briefly for the next job, then
//! park. A job is a number of equal tasks, handed out one by one. With more threads than processors nobody
//! spins: whoever waits would keep those from running that it waits for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long an idle worker spins before it parks.
const SPIN: Duration = Duration::from_micros(50);

/// Looks for the workers' end before the caller gives its processor to others.
const SPINS: u32 = 20_000;
/// Times that it does so before it sleeps in between.
const YIELDS: u32 = 1_000;
/// How long it sleeps.
const NAP: Duration = Duration::from_micros(50);

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
    /// The job's body: address of a `Body` on the caller's stack, valid while `busy` is not 0.
    body: AtomicPtr<()>,
    /// Whether there are no more threads than processors, so that waiting threads may spin.
    spins: bool,
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
            body: AtomicPtr::new(std::ptr::null_mut()),
            spins: std::thread::available_parallelism().is_ok_and(|n| threads <= n.get()),
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

    /// Runs `body(thread, task)` for every task of `0..tasks` and returns when all are done.
    pub fn run(&mut self, tasks: usize, body: Body<'_>) {
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|task| body(0, task));
            return;
        }
        let s = &*self.shared;
        // The reference itself lies in this frame, which waits for the workers before it ends.
        s.body.store((&raw const body).cast_mut().cast(), Ordering::Relaxed);
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
        let spins = if self.0.spins { SPINS } else { 0 };
        let mut looks = 0u32;
        while self.0.busy.load(Ordering::Acquire) != 0 {
            looks = looks.saturating_add(1);
            match looks {
                n if n <= spins => std::hint::spin_loop(),
                n if n <= spins + YIELDS => std::thread::yield_now(),
                _ => std::thread::sleep(NAP),
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
            let body = self.body.load(Ordering::Relaxed).cast::<Body<'_>>();
            // SAFETY: `run` stored the address of its `body` before it bumped the epoch, which this worker
            // has seen, and does not return before the worker has counted itself out of `busy`. The
            // reference is only read, and what it refers to is `Sync`.
            let body: Body<'_> = unsafe { *body };
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
            if self.spins && start.elapsed() < SPIN {
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
        // More threads than any test machine has processors, too.
        for threads in [1, 2, 3, 8, 65] {
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

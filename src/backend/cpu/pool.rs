//! A persistent thread pool for the operations of a pass. The caller is thread 0.
//!
//! A job is a number of equal tasks. Each thread owns a contiguous share of them, so that it reads one stream
//! of weights, and takes tasks of other shares when its own is done. A job ends when every task is done, not
//! when every worker has come: a worker that the system keeps off its processor delays nobody. Workers stay
//! awake between the jobs of a pass, yield their processor when the next job is late, and sleep between
//! passes. With more threads than processors nobody spins: a thread that waits would keep those from running
//! for which it waits.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

/// Looks for the next job before a worker begins to yield its processor: 20 to 100 µs.
const SPINS: u32 = 1500;
/// Yields before a worker sleeps: about a millisecond where nobody else wants the processor.
const YIELDS: u32 = 1000;
/// How long the caller sleeps between looks for the end of a job that takes longer than both.
const NAP: Duration = Duration::from_micros(50);

/// A task body: `(thread, task)`.
type Body<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// The pool. One job runs at a time.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    jobs: u64,
}

/// A value with cache lines of its own (prefetchers bring lines in pairs).
#[repr(align(128))]
#[derive(Default)]
struct Line<T>(T);

/// Tasks `next..end` are not taken yet.
#[derive(Default)]
struct Share {
    next: AtomicUsize,
    end: AtomicUsize,
}

struct Shared {
    /// The job that workers may enter; 0 while there is none.
    open: Line<AtomicU64>,
    /// Where the caller keeps the job's body.
    body: AtomicPtr<Body<'static>>,
    /// One for each thread.
    shares: Box<[Line<Share>]>,
    /// The job that each worker is in; 0 while it is in none.
    inside: Box<[Line<AtomicU64>]>,
    /// Each worker's handle while it sleeps or is about to.
    asleep: Box<[Line<AtomicBool>]>,
    sleepers: Line<AtomicUsize>,
    /// Looks before a thread that waits gives up its processor.
    spins: u32,
    /// A worker panicked in the job at hand, with this.
    panicked: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    quit: AtomicBool,
}

fn lines<T: Default>(n: usize) -> Box<[Line<T>]> {
    (0..n).map(|_| Line::default()).collect()
}

impl Pool {
    /// A pool of `threads` threads, the caller included.
    pub fn new(threads: usize) -> Result<Pool, std::io::Error> {
        let n = threads.max(1);
        let shared = Arc::new(Shared {
            open: Line::default(),
            body: AtomicPtr::new(std::ptr::null_mut()),
            shares: lines(n),
            inside: lines(n),
            asleep: lines(n),
            sleepers: Line::default(),
            spins: if std::thread::available_parallelism().is_ok_and(|p| n <= p.get()) { SPINS } else { 0 },
            panicked: AtomicBool::new(false),
            panic: Mutex::new(None),
            quit: AtomicBool::new(false),
        });
        let mut pool = Pool { shared, workers: Vec::new(), jobs: 0 };
        for i in 1..n {
            let shared = Arc::clone(&pool.shared);
            pool.workers.push(std::thread::Builder::new().name(format!("nt-cpu-{i}")).spawn(move || shared.work(i))?);
        }
        Ok(pool)
    }

    /// Threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `body(thread, task)` for every task of `0..tasks` and returns when all are done. A panic of a worker goes on in the
    /// caller; the pool stays as it was for the next job.
    pub fn run(&mut self, tasks: usize, body: Body<'_>) {
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|task| body(0, task));
            return;
        }
        let s = &*self.shared;
        let threads = self.workers.len() + 1;
        for (i, Line(share)) in s.shares.iter().enumerate() {
            share.next.store(tasks * i / threads, Ordering::Relaxed);
            share.end.store(tasks * (i + 1) / threads, Ordering::Relaxed);
        }
        // What the job before left, whose caller panicked itself.
        s.panicked.store(false, Ordering::Relaxed);
        let mut cell = body;
        s.body.store((&raw mut cell).cast(), Ordering::Relaxed);
        self.jobs += 1;
        s.open.0.store(self.jobs, Ordering::SeqCst);
        if s.sleepers.0.load(Ordering::SeqCst) > 0 {
            self.wake();
        }
        // Workers may hold the body until the job is closed, so a panic here must close it too.
        let close = Close(s);
        s.tasks(0, body);
        drop(close);
        if s.panicked.load(Ordering::Relaxed) {
            let panic = s.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
            std::panic::resume_unwind(panic.unwrap_or_else(|| Box::new("a worker thread panicked")));
        }
    }

    fn wake(&self) {
        for (worker, Line(asleep)) in self.workers.iter().zip(&self.shared.asleep[1..]) {
            if asleep.load(Ordering::SeqCst) {
                Thread::unpark(worker.thread());
            }
        }
    }
}

/// Lets nobody into the job any more, when dropped, and waits until nobody is in it.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.open.0.store(0, Ordering::SeqCst);
        let spins = self.0.spins;
        let mut looks = 0u32;
        for Line(inside) in &self.0.inside {
            while inside.load(Ordering::SeqCst) != 0 {
                looks = looks.saturating_add(1);
                match looks {
                    n if n <= spins => std::hint::spin_loop(),
                    n if n <= spins + YIELDS => std::thread::yield_now(),
                    _ => std::thread::sleep(NAP),
                }
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker's panic was reported by `run`.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Takes the tasks of thread `me`, then what is left of the others'.
    fn tasks(&self, me: usize, body: Body<'_>) {
        let n = self.shares.len();
        for i in 0..n {
            let Line(share) = &self.shares[if me + i < n { me + i } else { me + i - n }];
            let end = share.end.load(Ordering::Relaxed);
            while share.next.load(Ordering::Relaxed) < end {
                let task = share.next.fetch_add(1, Ordering::Relaxed);
                if task >= end {
                    break;
                }
                body(me, task);
            }
        }
    }

    fn work(&self, me: usize) {
        let Line(inside) = &self.inside[me];
        let mut seen = 0;
        while let Some(job) = self.next_job(me, seen) {
            seen = job;
            // Either this sees that the job was closed, or the caller sees that somebody is in it: both sides
            // store first and look afterwards, in one total order.
            inside.store(job, Ordering::SeqCst);
            if self.open.0.load(Ordering::SeqCst) == job {
                // SAFETY: the job is open or will not be closed before `inside` is 0 again, so `run` has not
                // returned: the cell on its stack and what the body borrows are alive. It stored the
                // address before it opened the job.
                let body: Body<'_> = unsafe { *self.body.load(Ordering::Relaxed) };
                let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.tasks(me, body)));
                if let Err(panic) = done {
                    *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
                    self.panicked.store(true, Ordering::Relaxed);
                }
            }
            inside.store(0, Ordering::SeqCst);
        }
    }

    /// Waits for a job other than `seen`; `None` when the pool ends.
    fn next_job(&self, me: usize, seen: u64) -> Option<u64> {
        let ready = || {
            let job = self.open.0.load(Ordering::SeqCst);
            (job != 0 && job != seen).then_some(job)
        };
        loop {
            for look in 0..self.spins + YIELDS {
                if let Some(job) = ready() {
                    return Some(job);
                }
                if self.quit.load(Ordering::Relaxed) {
                    return None;
                }
                if look < self.spins { std::hint::spin_loop() } else { std::thread::yield_now() }
            }
            // Announced before the last look, so that a job which that look misses finds a sleeper to wake.
            self.sleepers.0.fetch_add(1, Ordering::SeqCst);
            self.asleep[me].0.store(true, Ordering::SeqCst);
            while ready().is_none() && !self.quit.load(Ordering::SeqCst) {
                std::thread::park();
            }
            self.asleep[me].0.store(false, Ordering::SeqCst);
            self.sleepers.0.fetch_sub(1, Ordering::SeqCst);
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

    #[test]
    fn jobs_find_workers_that_sleep() {
        let mut pool = Pool::new(4).unwrap();
        let count = AtomicUsize::new(0);
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(5));
            pool.run(64, &|_, _| {
                count.fetch_add(1, Ordering::Relaxed);
            });
        }
        assert_eq!(count.load(Ordering::Relaxed), 64 * 20);
    }

    #[test]
    fn a_thread_that_is_kept_in_its_task_leaves_the_rest_to_others() {
        let mut pool = Pool::new(3).unwrap();
        let done = AtomicUsize::new(0);
        pool.run(30, &|_, task| {
            if task == 0 {
                while done.load(Ordering::Relaxed) < 29 {
                    std::thread::yield_now();
                }
            }
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), 30);
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_with_its_words_and_the_pool_goes_on() {
        let mut pool = Pool::new(3).unwrap();
        for task_of_panic in 0..30 {
            let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                pool.run(30, &|_, task| assert!(task != task_of_panic, "on purpose"));
            }));
            assert_eq!(run.unwrap_err().downcast_ref::<&str>(), Some(&"on purpose"));
            let done = AtomicUsize::new(0);
            pool.run(30, &|_, _| _ = done.fetch_add(1, Ordering::Relaxed));
            assert_eq!(done.load(Ordering::Relaxed), 30);
        }
    }
}

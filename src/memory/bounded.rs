//! Work on outside data that may take any amount of memory and time, on a thread of its own and within limits.
//!
//! A thread that exceeds them can be neither ended nor unwound from outside, and an allocator must not unwind. It is
//! asked to end first ([`is_asked_to_end`]), for which it may have an eighth of its memory's limit more, and left behind
//! if it does not: it sleeps in its next allocation until the process ends, and what it held is lost. The work is
//! therefore given what it needs by value and must hold no lock that others wait for; where it takes long, it looks
//! whether it is asked.

use std::alloc::{GlobalAlloc, Layout, System};
use std::any::Any;
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU8, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use nix::time::ClockId;

/// What a piece of work may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of its thread's stack.
    pub stack_bytes: usize,
    /// Bytes that it may have allocated at once. Counted only where [`Metered`] is the process's allocator.
    pub heap_bytes: usize,
    /// Time of a processor.
    pub cpu: Duration,
}

/// Why there is no result.
#[derive(Debug)]
pub enum Exceeded {
    /// It asked for more memory than its limit.
    Heap,
    /// It took longer than its limit.
    Cpu,
    /// The thread cannot be had.
    Thread(std::io::Error),
    /// The work panicked, with what it said.
    Panicked(String),
    /// The caller no longer wants the result.
    Stopped,
}

/// The name of the threads of [`run`].
const THREAD_NAME: &str = "bounded";

/// Sets a panic hook that leaves panics of [`run`]'s threads to their caller and passes all others on. The process's
/// main function calls it, once.
pub fn quiet_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if std::thread::current().name() != Some(THREAD_NAME) {
            before(info);
        }
    }));
}

/// How often a thread's clock and meter are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Where the thread's own clock cannot be read, this many times its limit in real time.
const REAL_TIME_FACTOR: u32 = 10;

/// Time that work has to end once it is asked to.
const GRACE: Duration = Duration::from_secs(2);

/// Runs `work` within `limits`, and until `stop` says so.
///
/// # Errors
///
/// With what was exceeded; the thread then stays behind, unless it panicked or ended when it was asked to.
pub fn run<T: Send + 'static>(
    limits: &Limits,
    stop: &dyn Fn() -> bool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Exceeded> {
    let meter = Arc::new(Meter::new(limits.heap_bytes));
    let (sender, receiver) = mpsc::sync_channel(1);
    let counted = Arc::clone(&meter);
    let thread = std::thread::Builder::new().name(THREAD_NAME.into()).stack_size(limits.stack_bytes);
    let thread = thread.spawn(move || {
        counted.thread.store(nix::unistd::gettid().as_raw(), Ordering::Release);
        let result = {
            let _metered = Metering::begin(&counted);
            work()
        };
        // Nobody may be waiting any more.
        let _ = sender.send(result);
    });
    let thread = thread.map_err(Exceeded::Thread)?;
    let start = Instant::now();
    loop {
        match receiver.recv_timeout(LOOK_EVERY) {
            Ok(_) if meter.over.load(Ordering::Acquire) => return Err(Exceeded::Heap),
            Ok(result) => return thread.join().map(|()| result).map_err(|panic| Exceeded::Panicked(said(&*panic))),
            // Without a result the thread can only have panicked.
            Err(RecvTimeoutError::Disconnected) => {
                let said = thread.join().map_or_else(|panic| said(&*panic), |()| "it ended without a result".into());
                return Err(Exceeded::Panicked(said));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        if meter.over.load(Ordering::Acquire) {
            end(&meter, &receiver);
            return Err(Exceeded::Heap);
        }
        if stop() {
            end(&meter, &receiver);
            return Err(Exceeded::Stopped);
        }
        let late = match meter.cpu_time() {
            Some(taken) => taken > limits.cpu,
            None => start.elapsed() > limits.cpu * REAL_TIME_FACTOR,
        };
        if late {
            end(&meter, &receiver);
            return Err(Exceeded::Cpu);
        }
    }
}

/// Asks a thread to end, and leaves it behind if it does not.
fn end<T>(meter: &Meter, receiver: &mpsc::Receiver<T>) {
    meter.ask();
    let began = Instant::now();
    while meter.state.load(Ordering::Acquire) == ASKED {
        match receiver.recv_timeout(LOOK_EVERY) {
            Err(RecvTimeoutError::Timeout) if began.elapsed() < GRACE => {}
            Err(RecvTimeoutError::Timeout) => meter.state.store(LEFT_BEHIND, Ordering::Release),
            _ => return,
        }
    }
}

/// Whether this thread does the work of [`run`] and nobody wants its result any more.
pub fn is_asked_to_end() -> bool {
    meter().is_some_and(|meter| meter.state.load(Ordering::Acquire) == ASKED)
}

/// The message of a panic.
pub fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no message").to_owned()
}

const RUNNING: u8 = 0;
/// Nobody waits for the thread any more, or it took more memory than it may while it is asked to end: it sleeps.
const LEFT_BEHIND: u8 = 2;
/// Nobody waits for the thread's result, but for its end.
const ASKED: u8 = 3;

/// Counts what one thread allocates.
struct Meter {
    left: AtomicI64,
    /// What may be taken beyond the limit while the thread is asked to end.
    slack: i64,
    /// Whether the limit was exceeded.
    over: AtomicBool,
    state: AtomicU8,
    /// The kernel's number of the thread; 0 before it runs.
    thread: AtomicI32,
}

impl Meter {
    fn new(bytes: usize) -> Meter {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        Meter {
            left: AtomicI64::new(bytes),
            slack: bytes / 8,
            over: AtomicBool::new(false),
            state: AtomicU8::new(RUNNING),
            thread: AtomicI32::new(0),
        }
    }

    /// Asks the thread to end.
    fn ask(&self) {
        let _ = self.state.compare_exchange(RUNNING, ASKED, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Takes `bytes` off what is left. Where there is less, the thread is asked to end; does not return where it was left
    /// behind, or takes more than it may while it is asked.
    fn take(&self, bytes: usize) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        let before = self.left.fetch_sub(bytes, Ordering::Relaxed);
        if before < bytes {
            self.ask();
            self.over.store(true, Ordering::Release);
            if before.saturating_add(self.slack) < bytes {
                self.state.store(LEFT_BEHIND, Ordering::Release);
            }
        }
        while self.state.load(Ordering::Acquire) == LEFT_BEHIND {
            std::thread::sleep(Duration::from_secs(3600));
        }
    }

    fn give(&self, bytes: usize) {
        self.left.fetch_add(i64::try_from(bytes).unwrap_or(i64::MAX), Ordering::Relaxed);
    }

    /// Time of a processor that the thread has taken. Linux makes the clock's number of the thread's
    /// (`CPUCLOCK_PERTHREAD_MASK` and `CPUCLOCK_SCHED` of `posix-timers.h`).
    fn cpu_time(&self) -> Option<Duration> {
        let thread = self.thread.load(Ordering::Acquire);
        let clock = ClockId::from_raw((!thread << 3) | 0b110);
        (thread != 0).then(|| clock.now().ok().map(Duration::from)).flatten()
    }
}

thread_local! {
    /// The meter of this thread, null for most.
    static METER: Cell<*const Meter> = const { Cell::new(std::ptr::null()) };
}

/// While it lives, this thread's allocations are counted.
struct Metering<'a>(std::marker::PhantomData<&'a Meter>);

impl Metering<'_> {
    fn begin(meter: &Meter) -> Metering<'_> {
        METER.set(meter);
        Metering(std::marker::PhantomData)
    }
}

impl Drop for Metering<'_> {
    fn drop(&mut self) {
        METER.set(std::ptr::null());
    }
}

/// This thread's meter.
fn meter() -> Option<&'static Meter> {
    // A thread that ends has no locals any more, and no meter.
    let meter = METER.try_with(Cell::get).unwrap_or(std::ptr::null());
    // SAFETY: null, or what `Metering::begin` was given; its guard borrows that and sets null before the borrow ends.
    // The reference does not outlive the call of the allocator, which happens on the same thread.
    unsafe { meter.as_ref() }
}

thread_local! {
    /// Whether this thread's allocations may fail, since their caller deals with it.
    static MAY_FAIL: Cell<bool> = const { Cell::new(false) };
}

/// Calls `allocate`, whose allocations may fail: with [`Metered`] as its allocator, the process otherwise ends at one
/// that does. For `try_reserve` and its like.
pub fn may_fail<T>(allocate: impl FnOnce() -> T) -> T {
    let before = MAY_FAIL.replace(true);
    let result = allocate();
    MAY_FAIL.set(before);
    result
}

/// The exit code of the contract for what does not fit the limits.
const EXIT_LIMITS: i32 = 4;

/// Ends the process where there is no memory for `bytes`, in one sentence and with exit code 4. Rust's own answer to a
/// failed allocation is SIGABRT and a backtrace. Returns `memory` where it is there, or where its caller can do without.
fn or_end(memory: *mut u8, bytes: usize) -> *mut u8 {
    if memory.is_null() && !MAY_FAIL.try_with(Cell::get).unwrap_or(false) {
        end_for_want_of(bytes);
    }
    memory
}

#[cold]
fn end_for_want_of(bytes: usize) -> ! {
    use std::io::Write as _;
    let mut text = [0; 256];
    let mut rest = &mut text[..];
    // Allocates nothing; what does not fit is cut off.
    let _ = writeln!(
        rest,
        "nt: memory ran out: {bytes} bytes could not be allocated; free memory, or raise the limit on this process's \
         memory (ulimit -v, ulimit -d)"
    );
    let left = rest.len();
    let _ = nix::unistd::write(std::io::stderr(), &text[..text.len() - left]);
    // SAFETY: ends the process at once, without handlers, destructors or a look at any memory, as `abort` does.
    unsafe { libc::_exit(EXIT_LIMITS) }
}

/// The system's allocator. It counts for the threads of [`run`], and ends the process with a sentence where memory runs
/// out ([`may_fail`] has the exception).
pub struct Metered;

// SAFETY: every call is passed on to the system's allocator unchanged; counting allocates nothing and does not unwind, and
// neither does the end of the process.
unsafe impl GlobalAlloc for Metered {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if let Some(meter) = meter() {
            meter.take(layout.size());
        }
        // SAFETY: the caller's contract.
        or_end(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if let Some(meter) = meter() {
            meter.take(layout.size());
        }
        // SAFETY: the caller's contract.
        or_end(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        if let Some(meter) = meter() {
            meter.give(layout.size());
        }
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if let Some(meter) = meter() {
            meter.take(new_size);
            meter.give(layout.size());
        }
        // SAFETY: the caller's contract.
        or_end(unsafe { System.realloc(ptr, layout, new_size) }, new_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { stack_bytes: 1 << 20, heap_bytes: 1 << 20, cpu: Duration::from_millis(50) };

    #[test]
    fn work_within_its_limits_has_a_result() {
        assert_eq!(run(&LIMITS, &|| false, || vec![7; 1000].len()).unwrap(), 1000);
    }

    #[test]
    fn work_that_never_ends_is_left_behind() {
        let end = Arc::new(AtomicU8::new(0));
        let seen = Arc::clone(&end);
        let result = run(&LIMITS, &|| false, move || while seen.load(Ordering::Relaxed) == 0 {});
        end.store(1, Ordering::Relaxed);
        assert!(matches!(result, Err(Exceeded::Cpu)), "{result:?}");
    }

    /// Guards against a thread that stays behind with all that it holds each time that somebody loses patience.
    #[test]
    fn work_that_looks_whether_it_is_asked_to_ends() {
        let kept = Arc::new(());
        let held = Arc::clone(&kept);
        let limits = Limits { cpu: Duration::from_secs(3600), ..LIMITS };
        let result = run(&limits, &|| true, move || {
            let _held = held;
            while !is_asked_to_end() {
                std::hint::black_box(vec![1; 100]);
            }
        });
        assert!(matches!(result, Err(Exceeded::Stopped)), "{result:?}");
        // The thread's last steps.
        while Arc::strong_count(&kept) > 1 {
            std::thread::yield_now();
        }
        assert!(!is_asked_to_end());
    }

    #[test]
    fn work_whose_result_is_not_wanted_any_more_is_left_behind() {
        let end = Arc::new(AtomicU8::new(0));
        let seen = Arc::clone(&end);
        let limits = Limits { cpu: Duration::from_secs(3600), ..LIMITS };
        let result = run(&limits, &|| true, move || while seen.load(Ordering::Relaxed) == 0 {});
        end.store(1, Ordering::Relaxed);
        assert!(matches!(result, Err(Exceeded::Stopped)), "{result:?}");
    }

    #[test]
    fn a_thread_that_cannot_be_had_is_an_error() {
        let limits = Limits { stack_bytes: usize::MAX >> 1, ..LIMITS };
        assert!(matches!(run(&limits, &|| false, || ()), Err(Exceeded::Thread(_))));
    }

    #[test]
    fn a_meter_counts_both_ways() {
        let meter = Meter::new(100);
        meter.take(60);
        meter.give(50);
        meter.take(80);
        assert_eq!((meter.left.into_inner(), meter.state.into_inner()), (10, RUNNING));
    }

    /// Guards against a thread that stays behind for ever, though it would have ended had it been asked.
    #[test]
    fn what_takes_too_much_is_asked_to_end_and_has_room_to() {
        let meter = Meter::new(80);
        meter.take(85);
        meter.take(5);
        let state = meter.state.load(Ordering::Relaxed);
        assert_eq!((state, meter.over.load(Ordering::Relaxed)), (ASKED, true));
        meter.give(90);
        assert_eq!(meter.left.into_inner(), 80);
    }

    #[test]
    fn a_panic_is_an_error() {
        quiet_panics();
        let result = run(&LIMITS, &|| false, || {
            if LIMITS.stack_bytes > 0 {
                panic!("as it {}", "should")
            }
        });
        assert!(matches!(&result, Err(Exceeded::Panicked(said)) if said == "as it should"), "{result:?}");
        let result = run(&LIMITS, &|| false, || {
            if LIMITS.stack_bytes > 0 {
                panic!("as it should")
            }
        });
        assert!(matches!(&result, Err(Exceeded::Panicked(said)) if said == "as it should"), "{result:?}");
    }
}

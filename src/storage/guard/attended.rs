//! Looks that the kernel may make wait for ever: whoever asks for a process's mappings, or compares two threads, waits for
//! locks of that process, which any user can have held by a write to a file whose server does not answer. The look is
//! a thread's: it waits so that the end of this process ends it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::host::Unreadable;

/// How long one step of a look may take. A question to `ask` takes less.
const STEP: Duration = Duration::from_secs(10);
/// The same, after a look that did not end.
const STEP_AGAIN: Duration = Duration::from_secs(2);
/// Whether there was one.
static LOST: AtomicBool = AtomicBool::new(false);

/// Where a look is, and how many steps it has taken.
#[derive(Debug, Default)]
pub struct Beat(Mutex<(u64, String)>);

impl Beat {
    /// The next step is at `path`.
    pub fn at(&self, path: &str) {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        now.0 += 1;
        now.1.clear();
        now.1.push_str(path);
    }

    fn now(&self) -> (u64, String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What `look` finds, which tells each of its steps.
///
/// # Errors
/// That a step takes too long: where it is.
pub fn attended<T: Send + 'static>(
    path: &str,
    look: impl FnOnce(&Beat) -> T + Send + 'static,
) -> Result<T, Unreadable> {
    let step = if LOST.load(Ordering::Relaxed) { STEP_AGAIN } else { STEP };
    within(step, path, look).inspect_err(|_| LOST.store(true, Ordering::Relaxed))
}

fn within<T: Send + 'static>(
    step: Duration,
    path: &str,
    look: impl FnOnce(&Beat) -> T + Send + 'static,
) -> Result<T, Unreadable> {
    let beat = Arc::new(Beat::default());
    let (tell, told) = channel();
    let own = Arc::clone(&beat);
    let thread = std::thread::Builder::new().spawn(move || drop(tell.send(look(&own))));
    thread.map_err(|e| Unreadable::new(path, format!("no thread can be started to look there: {e}")))?;
    let mut before = beat.now();
    loop {
        match told.recv_timeout(step) {
            Ok(found) => return Ok(found),
            Err(RecvTimeoutError::Disconnected) => return Err(Unreadable::new(path, "looking there failed")),
            Err(RecvTimeoutError::Timeout) => {
                let now = beat.now();
                if now.0 == before.0 {
                    let why = format!(
                        "the kernel does not tell within {step:?} what this process holds; does it wait for a file whose server is gone? end it, or that server"
                    );
                    return Err(Unreadable::new(if now.1.is_empty() { path } else { &now.1 }, why));
                }
                before = now;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A look that never ends costs one step, and names its place; one of many steps may take as long as it needs.
    #[test]
    fn a_look_that_never_ends_is_left() {
        let (_keep, never) = channel::<()>();
        let e = within(Duration::from_millis(20), "/proc", move |beat| {
            beat.at("/proc/7/map_files");
            let _ = never.recv();
        });
        let e = e.unwrap_err();
        assert_eq!(e.path.to_str(), Some("/proc/7/map_files"));
        assert!(e.why.contains("does not tell"), "{e}");
        let long = within(Duration::from_secs(60), "/proc", |beat| {
            (0..1000).for_each(|i| beat.at(&format!("/proc/{i}")));
            7
        });
        assert_eq!(long, Ok(7));
    }

    #[test]
    fn a_look_that_panics_is_no_answer() {
        let e = within(Duration::from_secs(60), "/proc", |_| -> u32 { std::panic::resume_unwind(Box::new(())) });
        assert!(e.unwrap_err().why.contains("failed"));
    }
}

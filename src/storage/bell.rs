//! What ends a wait of another thread: for links, whose threads wait for the system and for new work at once.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Ends a wait, now or the next one. Who waits looks at [`Bell::heard`] before and after, and goes back to its caller
/// if that is true.
pub struct Bell {
    rung: AtomicBool,
    /// What a sleeping thread notices; it runs once between two calls of [`Bell::heard`] that are true.
    wake: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Bell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bell").field("rung", &self.rung).finish_non_exhaustive()
    }
}

impl Bell {
    /// A bell that calls `wake` when it is rung.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Arc<Bell> {
        Arc::new(Bell { rung: AtomicBool::new(false), wake: Box::new(wake) })
    }

    /// A bell that adds to an eventfd, and a second descriptor of that. Reads of it sleep unless it is `nonblocking`.
    ///
    /// # Errors
    /// If the system has no descriptors left.
    pub fn with_event(nonblocking: bool) -> io::Result<(Arc<Bell>, File)> {
        let block = if nonblocking { EfdFlags::EFD_NONBLOCK } else { EfdFlags::empty() };
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | block)?;
        let event = File::from(OwnedFd::from(event));
        let second = event.try_clone()?;
        // A full counter is a bell that rings already.
        let bell = Bell::new(move || _ = (&event).write(&1u64.to_ne_bytes()));
        Ok((bell, second))
    }

    /// Ends the wait. What the caller has written before is seen after it.
    pub fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            (self.wake)();
        }
    }

    /// Whether it was rung since it was heard last.
    pub fn heard(&self) -> bool {
        self.rung.load(Ordering::Relaxed) && self.rung.swap(false, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_bell_is_heard_once_and_its_event_is_written_once() {
        let (bell, mut event) = Bell::with_event(true).unwrap();
        let mut count = || {
            let mut n = [0; 8];
            event.read_exact(&mut n).map_or(0, |()| u64::from_ne_bytes(n))
        };
        assert!(!bell.heard());
        for _ in 0..3 {
            bell.ring();
            bell.ring();
            assert_eq!((bell.heard(), bell.heard(), count(), count()), (true, false, 1, 0));
        }
    }
}

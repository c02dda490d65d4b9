//! State that a worker thread and its caller share, and what wakes either.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The state with its two wake-up calls.
pub(super) struct Signals<S> {
    shared: Mutex<S>,
    /// For the worker: there may be something to do.
    wish: Condvar,
    /// For the caller: something was done.
    news: Condvar,
}

impl<S> Signals<S> {
    pub fn new(shared: S) -> Arc<Signals<S>> {
        Arc::new(Signals { shared: Mutex::new(shared), wish: Condvar::new(), news: Condvar::new() })
    }

    pub fn lock(&self) -> MutexGuard<'_, S> {
        // A panic under the lock would be a bug of the ring; its state stays the best there is.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the worker.
    pub fn wish(&self) {
        self.wish.notify_one();
    }

    /// Wakes the caller.
    pub fn tell(&self) {
        self.news.notify_all();
    }

    /// The worker sleeps until it is woken.
    pub fn await_wish<'a>(&self, shared: MutexGuard<'a, S>) -> MutexGuard<'a, S> {
        self.wish.wait(shared).unwrap_or_else(PoisonError::into_inner)
    }

    /// The caller sleeps until it is woken.
    pub fn await_news<'a>(&self, shared: MutexGuard<'a, S>) -> MutexGuard<'a, S> {
        self.news.wait(shared).unwrap_or_else(PoisonError::into_inner)
    }
}

/// State that knows whether its worker is gone.
pub(super) trait Leaves {
    fn leave(&mut self);
}

/// Marks the worker as gone however it ends, so that nobody waits for it.
pub(super) struct Farewell<S: Leaves>(pub Arc<Signals<S>>);

impl<S: Leaves> Drop for Farewell<S> {
    fn drop(&mut self) {
        self.0.lock().leave();
        self.0.tell();
    }
}

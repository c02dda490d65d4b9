//! Asks while tokens are made of a text whether to go on.

use std::cell::Cell;

/// Checks between two questions: each costs little, but more than a step of the work.
const CHECKS: u32 = 4096;

/// What may stop the work.
pub(super) struct Stop<'a> {
    asked: &'a dyn Fn() -> bool,
    checks: Cell<u32>,
}

impl<'a> Stop<'a> {
    pub fn new(asked: &'a dyn Fn() -> bool) -> Stop<'a> {
        Stop { asked, checks: Cell::new(0) }
    }

    /// `None` if the work is to stop. To be called for every few bytes of a text.
    #[inline]
    pub fn check(&self) -> Option<()> {
        let checks = self.checks.get() + 1;
        if checks < CHECKS {
            self.checks.set(checks);
            return Some(());
        }
        self.checks.set(0);
        (!(self.asked)()).then_some(())
    }
}

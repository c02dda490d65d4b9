//! Bytes that requests may hold together, however many clients there are: of bodies that are being read, and of answers
//! that are made of them at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::error::ApiError;

/// Bytes that each request may hold without asking, so that large ones never keep small ones out.
pub const FREE: usize = 64 << 10;

/// Bytes that may be held.
#[derive(Debug)]
pub struct Budget {
    left: AtomicUsize,
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(bytes: usize) -> Arc<Budget> {
        Arc::new(Budget { left: AtomicUsize::new(bytes) })
    }

    /// A claim to nothing yet.
    pub fn claim(self: &Arc<Budget>) -> Claim {
        Claim { budget: self.clone(), held: 0 }
    }
}

/// Bytes that are held, until this is dropped.
#[derive(Debug)]
pub struct Claim {
    budget: Arc<Budget>,
    held: usize,
}

impl Claim {
    /// Holds `bytes` in all.
    ///
    /// # Errors
    /// If others hold too many; it holds what it held.
    pub fn grow(&mut self, bytes: usize) -> Result<(), ApiError> {
        let more = bytes.saturating_sub(FREE).saturating_sub(self.held);
        let taken = self.budget.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(more));
        match taken {
            Ok(_) => {
                self.held += more;
                Ok(())
            }
            Err(_) => Err(ApiError::unavailable(
                "large requests of other clients take all the memory that there is for them; smaller ones are answered, or come again",
            )),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.budget.left.fetch_add(self.held, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_claims_are_bounded_in_sum_and_small_ones_are_not() {
        let budget = Budget::new(100);
        let (mut a, mut b, mut c) = (budget.claim(), budget.claim(), budget.claim());
        a.grow(FREE + 60).unwrap();
        a.grow(FREE + 50).unwrap();
        assert_eq!(b.grow(FREE + 41).unwrap_err().status, 503);
        b.grow(FREE + 40).unwrap();
        c.grow(FREE).unwrap();
        drop(a);
        c.grow(FREE + 60).unwrap();
        assert!(c.grow(FREE + 61).is_err());
        drop((b, c));
        assert_eq!(budget.left.load(Ordering::Relaxed), 100);
    }
}

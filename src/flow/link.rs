//! What carries bytes between two places, driven by a thread of its own.

use std::sync::Arc;
use std::time::Duration;

use super::frames::Move;
use crate::backend::BackendError;
use crate::storage::{Bell, Extent, ReadError};

/// Why something was not carried.
#[derive(Clone, Debug)]
pub enum Cause {
    /// A read failed.
    Read(ReadError),
    /// The copy engine, or the device behind it, failed.
    Device(Arc<BackendError>),
}

/// Why a move was not taken. Nothing of it is in flight, and nothing more will be heard of it.
#[derive(Clone, Debug)]
pub enum Refusal {
    /// As many are in flight as the link takes.
    Busy,
    /// This move fails.
    Refused(Cause),
    /// All do, from here on.
    Dead(Cause),
}

/// What has ended.
#[derive(Clone, Debug)]
pub enum Done {
    /// A move: what was carried, or why it was not.
    Moved(Move, Result<Carried, Cause>),
    /// The rows that were asked for: bytes read, or why they were not.
    Rows(Result<u64, Cause>),
}

/// What a move came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Carried {
    /// Bytes.
    pub bytes: u64,
    /// Seconds on the link, where it can tell.
    pub seconds: Option<f64>,
}

/// A way of bytes.
pub trait Link: Send {
    /// How many moves it takes before it is [`Refusal::Busy`].
    fn room(&self) -> usize;

    /// Takes a move, which is then in flight until [`Link::poll`] says that it has ended.
    ///
    /// # Errors
    /// See [`Refusal`].
    fn start(&mut self, m: Move) -> Result<(), Refusal>;

    /// Takes rows of a file, which go before all moves; links to storage alone are asked for any.
    ///
    /// # Errors
    /// If they cannot be read.
    fn start_rows(&mut self, _extents: &[Extent]) -> Result<(), Cause> {
        Ok(())
    }

    /// Appends what has ended; waits up to `wait` for the first, as long as no bell is rung. Returns at once if nothing
    /// is in flight.
    ///
    /// # Errors
    /// The link is gone: what was in flight may be so until it is dropped.
    fn poll(&mut self, out: &mut Vec<Done>, wait: Duration) -> Result<(), Cause>;

    /// Moves and rows in flight.
    fn outstanding(&self) -> usize;

    /// Adds the bells that end waits in [`Link::poll`]; none where waits must be short.
    fn bells(&self, to: &mut Vec<Arc<Bell>>);
}

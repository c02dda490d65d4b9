//! Why weights cannot be delivered.

use std::sync::Arc;

use crate::storage::ReadError;

/// Why a unit or a row cannot be delivered.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StreamError {
    /// Reading a unit failed.
    #[error("{unit}: {source}")]
    Unit {
        /// The unit's name.
        unit: String,
        /// What went wrong.
        source: ReadError,
    },
    /// Reading rows of the embedding failed.
    #[error("token_embd.weight: {0}")]
    Rows(ReadError),
    /// The thread of a link ended.
    #[error("the reading thread ended unexpectedly")]
    ThreadGone,
    /// Loading was stopped.
    #[error("the pass was given up")]
    Interrupted,
    /// The copy engine failed.
    #[error(transparent)]
    Device(Arc<crate::backend::BackendError>),
}

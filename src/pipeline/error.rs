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
    /// A thread could not be started.
    #[error("a thread that requantises could not be started: {0}")]
    Thread(Arc<std::io::Error>),
    /// Numbers of a unit that its new type does not hold.
    #[error("{0}; `nt verify` shows whether the file is damaged")]
    Unfit(String),
    /// Loading was stopped.
    #[error("the pass was given up")]
    Interrupted,
    /// The copy engine failed.
    #[error(transparent)]
    Device(Arc<crate::backend::BackendError>),
}

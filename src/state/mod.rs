//! What a sequence leaves behind for its next tokens, and where: pages of keys and values. Pure: what must be done to
//! memory is returned as [`StateOp`]s, which a backend carries out.

mod pages;

pub use pages::{PAGE, PageId, Pages, Recent, SeqId, StateError, StateOp};

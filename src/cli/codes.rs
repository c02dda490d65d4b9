//! Errors of the engine with their exit codes.

use super::Failure;
use crate::backend::BackendError;
use crate::engine::{ConstraintError, EngineError, Opened, Options, RequestError, nearest};
use crate::model::ForwardError;
use crate::plan::Machine;
use crate::storage::StorageError;
use crate::storage::vfio::device::OpenError;
use crate::tokenizer::TokenizerError;

/// A template's error with its exit code.
pub(super) fn template_failure(e: TokenizerError) -> Failure {
    match e {
        TokenizerError::TemplateMemory(_) => Failure::limits(e),
        e => Failure::usage(e),
    }
}

/// An error with what would fit instead, if it is one of the plan.
pub(super) fn refusal(e: EngineError, opened: &Opened, machine: impl Fn() -> Machine, options: &Options) -> Failure {
    match e {
        EngineError::Plan(_) => match nearest(&opened.model, &machine(), options) {
            Some(other) => Failure::limits(format!("{e}; {other}")),
            None => failure(e),
        },
        e => failure(e),
    }
}

/// An engine's error with its exit code.
pub(super) fn failure(e: EngineError) -> Failure {
    match e {
        EngineError::Gguf(_) | EngineError::Model(_) | EngineError::Tokenizer(_) => Failure::usage(e),
        EngineError::Device(ref why) if why.is_refusal() => Failure::refused(e),
        EngineError::Copy(_) | EngineError::Image(_) | EngineError::Device(_) => Failure::usage(e),
        EngineError::Repeat { .. } => Failure::limits(e),
        EngineError::Plan(_) | EngineError::Lacking(_) | EngineError::Arena(_) | EngineError::State(_) => {
            Failure::limits(e)
        }
        EngineError::Request(RequestError::ContextFull { .. }) => Failure::limits(e),
        EngineError::Constraint(
            ConstraintError::AllBanned | ConstraintError::NothingLeft(_) | ConstraintError::Step(_),
        ) => Failure::running(e),
        EngineError::Constraint(_) => Failure::usage(e),
        EngineError::Request(_) | EngineError::Saved(_) => Failure::usage(e),
        EngineError::Forward(ForwardError::Interrupted) => Failure::interrupted(),
        EngineError::Forward(ForwardError::Backend(BackendError::UnsupportedType { .. })) => Failure::usage(e),
        EngineError::Backend(BackendError::UnsupportedType { .. }) => Failure::usage(e),
        EngineError::Backend(BackendError::OutOfMemory { .. } | BackendError::Threads { .. }) => Failure::limits(e),
        EngineError::Storage(StorageError::Threads(_) | StorageError::Drive(OpenError::Map { .. })) => {
            Failure::limits(e)
        }
        EngineError::Storage(StorageError::Drive(OpenError::WrongDrive { .. })) => Failure::refused(e),
        EngineError::Storage(StorageError::NotBound(_)) => Failure::usage(e),
        EngineError::Panicked { .. }
        | EngineError::Forward(_)
        | EngineError::Backend(_)
        | EngineError::Storage(_)
        | EngineError::NotFinite { .. } => Failure::running(e),
    }
}

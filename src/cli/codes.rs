//! Errors of the engine with their exit codes.

use super::Failure;
use crate::backend::BackendError;
use crate::engine::{ConstraintError, EngineError, Opened, Options, RequestError, missing_vram, nearest};
use crate::model::ForwardError;
use crate::plan::{Machine, PlanError};
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
    let of_vram = match &e {
        EngineError::Plan(PlanError::DeviceSlotsTooLarge { .. } | PlanError::TiersTooLargeForVram { .. }) => true,
        EngineError::Backend(BackendError::OutOfMemory { backend, .. }) => *backend != "cpu",
        EngineError::Plan(_) => false,
        _ => return failure(e),
    };
    let (model, machine) = (&opened.model, machine());
    let missing = if of_vram { missing_vram(model, &machine, options) } else { None };
    let missing = missing.map(|bytes| format!("{} MiB more of VRAM would do", bytes.div_ceil(1 << 20)));
    let advice: Vec<String> = missing.into_iter().chain(nearest(model, &machine, options)).collect();
    match advice.is_empty() {
        true => failure(e),
        false => Failure::limits(format!("{e}; {}", advice.join("; "))),
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

//! Why a drive was not bound, released or found.

use super::super::guard::{Check, Reason};

/// Why a drive was not bound, released or found.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The guard has reasons against it (exit code 3).
    #[error("{name} is refused:\n{}", lines(.reasons))]
    Refused {
        /// The drive as the user named it.
        name: String,
        /// Every reason.
        reasons: Vec<Reason>,
    },
    /// The name fits several drives (exit code 3).
    #[error("{name} was the name of several drives: {}; name one by its address, as in `nt device release --pci {first}`", .drives.join(" and "), first = .drives.first().and_then(|d| d.split(' ').next()).unwrap_or_default())]
    Ambiguous {
        /// The name.
        name: String,
        /// Address, model and serial of each drive.
        drives: Vec<String>,
    },
    /// No such drive.
    #[error("{0}: there is no NVMe drive of this name; `nt device list` shows them")]
    NotFound(String),
    /// The drive is not bound.
    #[error("{0} is not bound to vfio-pci; bind it with `sudo nt device bind {0}`")]
    NotBound(String),
    /// A signal asked to stop, and what was begun has been undone or finished (exit code 130).
    #[error("interrupted: {0}")]
    Interrupted(String),
    /// A step failed; the drive is back with the kernel unless the sentence says otherwise.
    #[error("{step} failed: {why}")]
    Step {
        /// What was tried.
        step: String,
        /// The system's words.
        why: String,
    },
}

impl DeviceError {
    /// True if a safety rule refused the drive.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Ambiguous { .. })
    }

    pub(super) fn step(step: impl Into<String>, why: impl std::fmt::Display) -> Self {
        Self::Step { step: step.into(), why: why.to_string() }
    }

    /// A step that the system would not take; says what helps where the user was not root.
    pub(super) fn system(step: impl Into<String>, e: &std::io::Error) -> Self {
        let denied = e.kind() == std::io::ErrorKind::PermissionDenied;
        let cure = if denied && !nix::unistd::geteuid().is_root() { "; run it as root" } else { "" };
        Self::step(step, format!("{e}{cure}"))
    }

    /// One reason against a drive.
    pub(super) fn refused(name: &str, check: Check, path: &str, what: String) -> Self {
        Self::Refused { name: name.into(), reasons: vec![Reason::new(check, path, what)] }
    }
}

fn lines(reasons: &[Reason]) -> String {
    reasons.iter().map(|r| format!("  - {r}")).collect::<Vec<_>>().join("\n")
}

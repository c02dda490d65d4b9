//! SIGINT: the first asks the run to stop, the second ends the process; except in commands that change a drive.

use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_: i32) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Installs the handler for SIGINT and SIGTERM. The second signal finds the default action.
pub fn install() -> Result<(), super::Failure> {
    let action =
        SigAction::new(SigHandler::Handler(on_signal), SaFlags::SA_RESTART | SaFlags::SA_RESETHAND, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }
            .map_err(|e| super::Failure::running(format!("installing the handler of {signal} failed: {e}")))?;
    }
    Ok(())
}

/// Installs the handler for SIGINT, SIGTERM and SIGHUP for commands that must undo or finish what they began:
/// no number of signals ends the process. A signal that is ignored stays so.
pub fn install_for_changes() -> Result<(), super::Failure> {
    let action = SigAction::new(SigHandler::Handler(on_signal), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let failed = |e| super::Failure::running(format!("installing the handler of {signal} failed: {e}"));
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        let before = unsafe { sigaction(signal, &action) }.map_err(failed)?;
        if matches!(before.handler(), SigHandler::SigIgn) {
            // SAFETY: what was installed before.
            unsafe { sigaction(signal, &before) }.map_err(failed)?;
        }
    }
    Ok(())
}

/// Whether the run was asked to stop.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

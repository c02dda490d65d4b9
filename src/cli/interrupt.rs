//! SIGINT and SIGTERM: the first asks the run to stop, the second ends the process; except in commands that change a
//! drive.

use std::io::{PipeReader, Read};
use std::os::fd::{AsFd, IntoRawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static TERMINATED: AtomicBool = AtomicBool::new(false);
/// The pipe that a signal writes to; -1 for none.
static WAKE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn on_signal(signal: i32) {
    INTERRUPTED.store(true, Ordering::Relaxed);
    if signal == Signal::SIGTERM as i32 {
        TERMINATED.store(true, Ordering::Relaxed);
    }
    let fd = WAKE.load(Ordering::Relaxed);
    if fd >= 0 {
        // SAFETY: the pipe's end is never closed once it is here, the byte lives on this stack, and write and errno's
        // address are async-signal-safe. errno is put back, so that what was interrupted does not see another's.
        unsafe {
            let errno = libc::__errno_location();
            let saved = *errno;
            libc::write(fd, [0u8].as_ptr().cast(), 1);
            *errno = saved;
        }
    }
}

/// Lets a write beyond the limit of a file's size (`ulimit -f`) fail with a reason rather than end the process.
pub fn ignore_file_size_signal() {
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler is installed. Where it cannot be ignored, the signal ends the process as before.
    let _ = unsafe { sigaction(Signal::SIGXFSZ, &ignore) };
}

/// Installs the handler for SIGINT and SIGTERM. The second signal finds the default action.
pub fn install() -> Result<(), super::Failure> {
    let action =
        SigAction::new(SigHandler::Handler(on_signal), SaFlags::SA_RESTART | SaFlags::SA_RESETHAND, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler stores to atomics and writes to a pipe, which is async-signal-safe.
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
        // SAFETY: the handler stores to atomics and writes to a pipe, which is async-signal-safe.
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

/// Whether it was SIGTERM that asked.
pub fn terminated() -> bool {
    TERMINATED.load(Ordering::Relaxed)
}

/// Forgets a SIGINT that was obeyed, and takes the next one for a first. SIGTERM is not forgotten.
pub fn rearm() -> Result<(), super::Failure> {
    INTERRUPTED.store(terminated(), Ordering::Relaxed);
    install()
}

/// Waits for stdin, and is woken by a signal.
pub struct Waiter {
    pipe: PipeReader,
}

impl Waiter {
    /// A waiter; there is one in a process.
    pub fn new() -> std::io::Result<Waiter> {
        let (pipe, end) = std::io::pipe()?;
        WAKE.store(end.into_raw_fd(), Ordering::Relaxed);
        Ok(Waiter { pipe })
    }

    /// Waits until stdin has bytes or is at its end (`true`), or until a signal asked to stop (`false`).
    pub fn wait(&mut self) -> std::io::Result<bool> {
        loop {
            if interrupted() {
                return Ok(false);
            }
            let stdin = std::io::stdin();
            let mut fds =
                [PollFd::new(stdin.as_fd(), PollFlags::POLLIN), PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
            let [input, woken] = fds.map(|f| f.any().unwrap_or(false));
            if woken {
                // One byte a signal; whether it still counts is said by the flag.
                self.pipe.read_exact(&mut [0])?;
            } else if input {
                return Ok(true);
            }
        }
    }
}

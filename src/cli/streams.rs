//! Stdin, stdout and stderr, also where another program that shares them has made them non-blocking: what has no room or
//! no bytes yet is waited for, and is no failure.

use std::io::{Read, Result, Write};
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Stdin without a buffer.
pub(super) struct Stdin;

/// Stdout without a buffer.
pub(super) struct Stdout;

/// Stderr, which takes all that is written to it, also where it is closed or full: what is said there is no reason to
/// end in the middle of a result.
pub(super) struct Stderr;

impl Read for Stdin {
    fn read(&mut self, bytes: &mut [u8]) -> Result<usize> {
        let stdin = std::io::stdin();
        patiently(stdin.as_fd(), PollFlags::POLLIN, || nix::unistd::read(stdin.as_fd(), bytes))
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let stdout = std::io::stdout();
        patiently(stdout.as_fd(), PollFlags::POLLOUT, || nix::unistd::write(stdout.as_fd(), bytes))
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let (stderr, mut left) = (std::io::stderr(), bytes);
        while !left.is_empty() {
            match patiently(stderr.as_fd(), PollFlags::POLLOUT, || nix::unistd::write(stderr.as_fd(), left)) {
                Ok(n) if n > 0 => left = &left[n..],
                _ => break,
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Does a step again until the stream lets it.
fn patiently(fd: BorrowedFd, ready: PollFlags, mut step: impl FnMut() -> nix::Result<usize>) -> Result<usize> {
    loop {
        match step() {
            Err(Errno::EINTR) => {}
            // A stream that reports an error is tried again, and says which.
            Err(Errno::EAGAIN) => match poll(&mut [PollFd::new(fd, ready)], PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            },
            done => return Ok(done?),
        }
    }
}

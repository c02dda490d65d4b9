//! Texts that a command reads, within limits.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Failure;
use super::interrupt::interrupted;
use crate::plan::format_bytes;

/// Most bytes of a text: more is no prompt, and may be a device that never ends.
const TEXT_MAX: u64 = 256 << 20;

/// Bytes of a text whose tokens are made without a look at the memory that is free.
const TEXT_UNCHECKED: u64 = 1 << 20;
/// Memory that making its tokens takes for each byte of a text, where all of it is one word or every byte a token.
const MEMORY_OF_A_BYTE: u64 = 100;

/// Refuses a text whose tokens take more memory to make than there is; `what` names it.
pub(super) fn check_size(what: impl std::fmt::Display, bytes: usize) -> Result<(), Failure> {
    let bytes = bytes as u64;
    if bytes <= TEXT_UNCHECKED {
        return Ok(());
    }
    let need = bytes.saturating_mul(MEMORY_OF_A_BYTE);
    match crate::machine::memory(Path::new("/")).budget() {
        Some(free) if need > free => Err(Failure::limits(format!(
            "{what}: it has {}, whose tokens may take {} of memory to make, but {} can be taken; shorten it, or free memory",
            format_bytes(bytes),
            format_bytes(need),
            format_bytes(free)
        ))),
        _ => Ok(()),
    }
}

/// Bytes that come when they come, until a signal asks to end: a pipe may wait for ever.
struct Heard<'a, R>(R, BorrowedFd<'a>);

/// How long is waited for bytes before it is asked whether to end.
const LOOK_MS: u8 = 50;

impl<R: Read> Read for Heard<'_, R> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        loop {
            if interrupted() {
                return Err(std::io::Error::other("interrupted"));
            }
            match poll(&mut [PollFd::new(self.1, PollFlags::POLLIN)], PollTimeout::from(LOOK_MS)) {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(e) => return Err(e.into()),
            }
            match self.0.read(bytes) {
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
    }
}

/// Reads a text file (or stdin as `-`), which must be UTF-8, not longer than [`TEXT_MAX`], and no more than the memory
/// that is free can make tokens of.
pub(super) fn read_text(path: &Path) -> Result<String, Failure> {
    let all = |input: &mut dyn Read| {
        let mut bytes = Vec::new();
        input.take(TEXT_MAX + 1).read_to_end(&mut bytes).map(|_| bytes)
    };
    let stdin = std::io::stdin();
    let bytes = match path == Path::new("-") {
        true => all(&mut Heard(super::streams::Stdin, stdin.as_fd())),
        // A pipe that nobody has opened yet is waited for below.
        false => {
            let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
            opened.and_then(|file| all(&mut Heard(&file, file.as_fd())))
        }
    };
    if bytes.is_err() && interrupted() {
        return Err(Failure::interrupted());
    }
    let bytes = bytes.map_err(|e| Failure::usage(format!("the text {} cannot be read: {e}", path.display())))?;
    if bytes.len() as u64 > TEXT_MAX {
        return Err(Failure::usage(format!(
            "{} is longer than {} MiB, the most a text may have",
            path.display(),
            TEXT_MAX >> 20
        )));
    }
    check_size(path.display(), bytes.len())?;
    String::from_utf8(bytes).map_err(|e| {
        Failure::usage(format!("{} is not UTF-8: byte {} is invalid", path.display(), e.utf8_error().valid_up_to()))
    })
}

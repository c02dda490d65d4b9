//! A read or write of a sysfs attribute that may wait in the kernel for ever: a child process does it, so
//! that this one can go on, and end, whatever becomes of it.
//!
//! A thread would not do: a process ends only when each of its threads has, and a thread in an
//! uninterruptible wait does not.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, pipe2};

/// Bytes of an attribute that are read.
const READ_MAX: usize = 4096;

/// Writes `text` to the open attribute.
///
/// # Errors
/// The system's, or [`ErrorKind::TimedOut`]: the kernel is still at it, and may yet do it.
pub fn write(file: &File, text: &str, limit: Duration) -> Result<()> {
    run(file, Some(text.as_bytes()), limit).map(|_| ())
}

/// Reads the open attribute.
///
/// # Errors
/// As [`write`].
pub fn read(file: &File, limit: Duration) -> Result<String> {
    run(file, None, limit).map(|bytes| String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

fn run(file: &File, text: Option<&[u8]>, limit: Duration) -> Result<Vec<u8>> {
    let (answer, tell) = pipe2(OFlag::O_CLOEXEC)?;
    // SAFETY: the child calls nothing but system calls, on values that were made before.
    match unsafe { fork() }? {
        ForkResult::Child => child(file.as_raw_fd(), tell.as_raw_fd(), text),
        ForkResult::Parent { child } => {
            drop(tell);
            let found = listen(&answer, limit)?;
            // It has answered, so it is ending.
            while waitpid(child, None) == Err(nix::errno::Errno::EINTR) {}
            found
        }
    }
}

/// Does the one call and tells its error number, then what was read. It keeps no descriptor of the
/// parent's, so that no lock, claim or pipe stays open with it, and no terminal's signal reaches it.
fn child(file: RawFd, tell: RawFd, text: Option<&[u8]>) -> ! {
    let mut buffer = [0u8; READ_MAX + 4];
    // SAFETY: system calls with integers and with memory of this frame or of `text`, whose lengths are
    // given; `_exit` runs nothing of the parent's.
    unsafe {
        let file = libc::fcntl(file, libc::F_DUPFD, 3);
        let tell = libc::fcntl(tell, libc::F_DUPFD, 3);
        libc::dup2(file, 0);
        libc::dup2(tell, 1);
        if libc::syscall(libc::SYS_close_range, 2u32, u32::MAX, 0u32) != 0 {
            for fd in 2..1024 {
                libc::close(fd);
            }
        }
        libc::setsid();
        let done = match text {
            Some(text) => libc::write(0, text.as_ptr().cast(), text.len()),
            None => libc::read(0, buffer[4..].as_mut_ptr().cast(), READ_MAX),
        };
        let (number, len) = if done < 0 { (*libc::__errno_location(), 0) } else { (0, done as usize) };
        buffer[..4].copy_from_slice(&number.to_ne_bytes());
        let len = if text.is_some() { 4 } else { 4 + len };
        libc::write(1, buffer.as_ptr().cast(), len);
        libc::_exit(0)
    }
}

/// The child's answer. The outer error is that it gave none in time.
fn listen(answer: &OwnedFd, limit: Duration) -> Result<Result<Vec<u8>>> {
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::new(ErrorKind::TimedOut, format!("the kernel did not answer within {limit:?}")));
        }
        let wait = PollTimeout::try_from(left.min(Duration::from_secs(60))).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(answer.as_fd(), PollFlags::POLLIN)], wait) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => break,
            Err(e) => return Err(e.into()),
        }
    }
    let mut bytes = Vec::new();
    File::from(answer.try_clone()?).read_to_end(&mut bytes)?;
    let Some((number, rest)) = bytes.split_first_chunk::<4>() else {
        return Ok(Err(Error::other("the process that asked the kernel was ended")));
    };
    Ok(match i32::from_ne_bytes(*number) {
        0 => Ok(rest.to_vec()),
        number => Err(Error::from_raw_os_error(number)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_is_written_and_read_is_the_same() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"nvme\n").unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        assert_eq!(read(&file, Duration::from_secs(30)).unwrap(), "nvme");
        write(&file, "vfio-pci", Duration::from_secs(30)).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        assert_eq!(read(&file, Duration::from_secs(30)).unwrap(), "nvme\nvfio-pci");
    }

    #[test]
    fn errors_have_their_number() {
        let file = File::open("/proc/self/status").unwrap();
        let e = write(&file, "x", Duration::from_secs(30)).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EBADF));
    }

    /// A call that never returns costs its deadline, not the process, and the child keeps nothing open: the
    /// other end of a pipe sees its end although the child lives on.
    #[test]
    fn a_call_that_never_returns_is_left_behind() {
        let (silent, keep) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (mut other_read, other_write) = std::io::pipe().unwrap();
        let e = read(&File::from(silent), Duration::from_millis(50)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::TimedOut);
        drop(other_write);
        let mut bytes = Vec::new();
        other_read.read_to_end(&mut bytes).unwrap();
        drop(keep); // the child reads the end of its pipe, and ends
    }
}

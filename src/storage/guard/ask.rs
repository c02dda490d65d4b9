//! Asks the kernel what paths lead to, through a child process: a server of NFS or a program behind FUSE that does not
//! answer keeps whoever asks for ever, and a process ends only when each of its threads has. The child is started at the
//! first question and left behind if it gets no answer; it holds no file of its parent's.

use std::ffi::CString;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{ForkResult, fork};

use super::host::{Host, Unreadable};
use super::node::{Node, Number};

/// How long the kernel may take for one packet of questions.
const LIMIT: Duration = Duration::from_secs(5);
/// After so many packets without an answer nothing is asked any more: each costs [`LIMIT`].
const STUCK_MAX: u32 = 3;
/// Bytes of questions in a packet, and most of them.
const PACKET: usize = 48 << 10;
const PATHS: usize = 1024;
/// Bytes of an answer: kind, then major and minor, or the number of an error.
const ANSWER: usize = 12;

/// What one path leads to, or why that cannot be told; nothing where nothing is there.
pub type Answer = std::result::Result<Option<Node>, Unreadable>;

/// The child of this process, and how often one got no answer.
static CHILD: Mutex<(Option<Child>, u32)> = Mutex::new((None, 0));

/// What each of `paths` leads to.
///
/// # Errors
/// That one of them gets no answer, or that there is no child to ask: nothing is known of any then.
pub fn nodes(paths: &[String]) -> std::result::Result<Vec<Answer>, Unreadable> {
    let mut held = CHILD.lock().unwrap_or_else(PoisonError::into_inner);
    let (child, stuck) = &mut *held;
    let mut out = Vec::with_capacity(paths.len());
    for packet in packets(paths) {
        if *stuck >= STUCK_MAX {
            return Err(no_answer(&packet[0], "questions before it were not answered either"));
        }
        if child.is_none() {
            *child = Some(Child::start(LIMIT).map_err(|e| Unreadable::new(&packet[0], format!("asking failed: {e}")))?);
        }
        let Some(asked) = child.as_mut() else { continue };
        match asked.ask(packet, LIMIT) {
            Ok(answers) => out.extend(answers),
            Err(e) => {
                *child = None;
                *stuck += u32::from(e.kind() == ErrorKind::TimedOut);
                return Err(no_answer(&packet[0], &e.to_string()));
            }
        }
    }
    Ok(out)
}

fn no_answer(path: &str, why: &str) -> Unreadable {
    let cure = "is a server of NFS or a program behind FUSE gone? unmount its file system or end those who use it";
    Unreadable::new(path, format!("the kernel does not say what this leads to: {why}; {cure}"))
}

/// The paths in packets of limited size. One that no system call takes is longer than a packet's limit by itself, and
/// goes alone.
fn packets(paths: &[String]) -> Vec<&[String]> {
    let mut out = Vec::new();
    let (mut from, mut bytes) = (0, 0);
    for (i, path) in paths.iter().enumerate() {
        if i > from && (bytes + path.len() + 1 > PACKET || i - from == PATHS) {
            out.push(&paths[from..i]);
            (from, bytes) = (i, 0);
        }
        bytes += path.len() + 1;
    }
    if from < paths.len() {
        out.push(&paths[from..]);
    }
    out
}

/// A process that answers; it ends when this is dropped, or as soon as the kernel lets it.
#[derive(Debug)]
struct Child {
    socket: OwnedFd,
    #[cfg(test)]
    pid: nix::unistd::Pid,
}

impl Child {
    /// Starts one; when this returns, it has nothing of this process's open.
    fn start(limit: Duration) -> Result<Child> {
        let (socket, theirs) = pair()?;
        // SAFETY: the child calls nothing but system calls, on values that were made before.
        match unsafe { fork() }? {
            ForkResult::Child => serve(theirs.as_raw_fd()),
            #[cfg_attr(not(test), expect(unused_variables, reason = "only a test stops it"))]
            ForkResult::Parent { child } => {
                drop(theirs);
                let started = Child {
                    socket,
                    #[cfg(test)]
                    pid: child,
                };
                started.receive(&mut [0; 1], limit)?;
                Ok(started)
            }
        }
    }

    fn ask(&mut self, paths: &[String], limit: Duration) -> Result<Vec<Answer>> {
        let mut question: Vec<u8> = Vec::new();
        for path in paths {
            // Nothing is at a path that the kernel does not take.
            let path = CString::new(path.as_str()).ok().filter(|p| p.as_bytes().len() < libc::PATH_MAX as usize);
            question.extend(path.unwrap_or_default().as_bytes_with_nul());
        }
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the call reads `question`, whose length is given.
        if unsafe { libc::send(self.socket.as_raw_fd(), question.as_ptr().cast(), question.len(), flags) } < 0 {
            return Err(Error::last_os_error());
        }
        let mut answers = vec![0; paths.len() * ANSWER];
        let got = self.receive(&mut answers, limit)?;
        if got != answers.len() {
            return Err(Error::other("the process that asks the kernel was ended"));
        }
        let number = |b: &[u8]| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]);
        let answers = answers.chunks_exact(ANSWER).zip(paths);
        Ok(answers.map(|(a, path)| read(number(a), number(&a[4..]), number(&a[8..]), path)).collect())
    }

    fn receive(&self, to: &mut [u8], limit: Duration) -> Result<usize> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(ErrorKind::TimedOut, format!("no answer within {limit:?}")));
            }
            let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], wait) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => {
                    // SAFETY: the call writes to `to`, whose length is given.
                    let got = unsafe { libc::recv(self.socket.as_raw_fd(), to.as_mut_ptr().cast(), to.len(), 0) };
                    return usize::try_from(got).map_err(|_| Error::last_os_error());
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// Two ends of a socket that keeps packets apart and tells when the other end is closed.
fn pair() -> Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: the call writes two descriptors to `ends`, which are nobody else's.
    unsafe {
        if libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr()) != 0 {
            return Err(Error::last_os_error());
        }
        Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])))
    }
}

/// Kinds of answers.
const NOTHING: u32 = 0;
const BLOCK: u32 = 1;
const CHAR: u32 = 2;
const FILE: u32 = 3;
const FAILED: u32 = 4;

fn read(kind: u32, major: u32, minor: u32, path: &str) -> Answer {
    let number = Number { major, minor };
    match kind {
        NOTHING => Ok(None),
        BLOCK => Ok(Some(Node::Block(number))),
        CHAR => Ok(Some(Node::Char(number))),
        FILE => Ok(Some(Node::File(Some(number)))),
        _ => Err(Host::fail(path, &Error::from_raw_os_error(major as i32))),
    }
}

/// Answers until the parent is gone. Nothing is allocated: the parent's other threads may have held a lock of the
/// allocator's when this process was made.
fn serve(socket: RawFd) -> ! {
    let mut question = [0u8; PACKET + libc::PATH_MAX as usize];
    let mut answers = [0u8; PATHS * ANSWER];
    // SAFETY: system calls with integers and with memory of this frame, whose lengths are given; `_exit` runs nothing
    // of the parent's.
    unsafe {
        let own = libc::fcntl(socket, libc::F_DUPFD, 3);
        libc::dup2(own, 0);
        if libc::syscall(libc::SYS_close_range, 1u32, u32::MAX, 0u32) != 0 {
            for fd in 1..1024 {
                libc::close(fd);
            }
        }
        libc::setsid();
        libc::send(0, answers.as_ptr().cast(), 1, libc::MSG_NOSIGNAL);
        loop {
            let got = libc::recv(0, question.as_mut_ptr().cast(), question.len(), 0);
            if got < 0 && *libc::__errno_location() == libc::EINTR {
                continue;
            }
            if got <= 0 {
                libc::_exit(0);
            }
            let paths = question[..got as usize].split_inclusive(|b| *b == 0);
            let mut len = 0;
            for (path, answer) in paths.zip(answers.chunks_exact_mut(ANSWER)) {
                let (kind, major, minor) = stat(path);
                answer[..4].copy_from_slice(&kind.to_ne_bytes());
                answer[4..8].copy_from_slice(&major.to_ne_bytes());
                answer[8..].copy_from_slice(&minor.to_ne_bytes());
                len += ANSWER;
            }
            if libc::send(0, answers.as_ptr().cast(), len, libc::MSG_NOSIGNAL) < 0 {
                libc::_exit(0);
            }
        }
    }
}

/// Asks without mounting anything on the way to the last name, and without a word to servers where that can be avoided.
/// `path` ends with a zero byte.
fn stat(path: &[u8]) -> (u32, u32, u32) {
    if path.last() != Some(&0) || path.len() == 1 {
        return (NOTHING, 0, 0);
    }
    // SAFETY: all zeros are a valid value of this structure of integers.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_NO_AUTOMOUNT | libc::AT_STATX_DONT_SYNC;
    // SAFETY: `path` ends with a zero byte and `found` may be written; both outlive the call.
    if unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr().cast(), flags, libc::STATX_TYPE, &raw mut found) } != 0 {
        // SAFETY: the address of this thread's own variable.
        let number = unsafe { *libc::__errno_location() };
        let nothing = [libc::ENOENT, libc::ENOTDIR, libc::ELOOP, libc::ENAMETOOLONG, libc::ESRCH];
        return if nothing.contains(&number) { (NOTHING, 0, 0) } else { (FAILED, number as u32, 0) };
    }
    match u32::from(found.stx_mode) & libc::S_IFMT {
        libc::S_IFBLK => (BLOCK, found.stx_rdev_major, found.stx_rdev_minor),
        libc::S_IFCHR => (CHAR, found.stx_rdev_major, found.stx_rdev_minor),
        _ => (FILE, found.stx_dev_major, found.stx_dev_minor),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};

    fn asked(path: &str) -> Answer {
        nodes(&[path.to_owned()]).unwrap().remove(0)
    }

    #[test]
    fn nodes_are_told_by_kind_and_number() {
        assert_eq!(asked("/dev/null"), Ok(Some(Node::Char(Number { major: 1, minor: 3 }))));
        assert_eq!(asked("/no/such/file"), Ok(None));
        assert_eq!(asked("/dev/null/x"), Ok(None));
        assert_eq!(asked(""), Ok(None));
        assert_eq!(asked("a\0b"), Ok(None));
        assert_eq!(asked(&"x/".repeat(4000)), Ok(None));
        let folder = std::fs::metadata("/").unwrap();
        let number = Number { major: libc::major(folder.dev()), minor: libc::minor(folder.dev()) };
        assert_eq!(asked("/"), Ok(Some(Node::File(Some(number)))));
        assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    }

    #[test]
    fn many_paths_are_asked_in_packets() {
        let long = format!("/{}", "x".repeat(4094));
        let paths: Vec<String> =
            (0..5000).map(|i| if i % 97 == 0 { long.clone() } else { ["/dev/null", "/none"][i % 2].into() }).collect();
        assert!(packets(&paths).iter().all(|p| !p.is_empty() && p.len() <= PATHS));
        let answers = nodes(&paths).unwrap();
        assert_eq!(answers.len(), paths.len());
        for (answer, path) in answers.iter().zip(&paths) {
            assert_eq!(answer.as_ref().unwrap().is_some(), path == "/dev/null", "{path}");
        }
    }

    /// One that does not answer costs its deadline and no more, and has nothing of this process's open.
    #[test]
    fn a_question_without_an_answer_is_given_up() {
        let (mut other_read, other_write) = std::io::pipe().unwrap();
        let limit = Duration::from_secs(60);
        let mut child = Child::start(limit).unwrap();
        let path = ["/dev/null".to_owned()];
        assert_eq!(child.ask(&path, limit).unwrap().len(), 1);
        drop(other_write);
        assert_eq!(std::io::Read::read(&mut other_read, &mut [0]).unwrap(), 0, "the child has the pipe open");
        nix::sys::signal::kill(child.pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
        let e = child.ask(&path, Duration::from_millis(20)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::TimedOut);
        nix::sys::signal::kill(child.pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        assert!(child.ask(&path, limit).is_err());
    }
}

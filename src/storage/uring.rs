//! Reads through io_uring: files registered, deep queue, completions reaped in batches.
//!
//! Registered buffers are not used: for reads of 1 MiB they measured no gain, and they are charged
//! against the locked-memory limit, which is 8 MiB for ordinary users.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use io_uring::{IoUring, opcode, types};

use super::split::{Chunk, Requests};
use super::{Alignment, Completion, DirectFile, FileId, QUEUE_DEPTH, ReadError, ReadRequest, Reader};

/// A reader over one io_uring.
pub struct UringReader {
    ring: IoUring,
    files: Vec<DirectFile>,
    requests: Requests,
    /// Chunks in flight, by user data.
    flying: Vec<Option<Chunk>>,
    n_flying: usize,
}

impl UringReader {
    /// Sets a ring up over `files`; an error says that io_uring is refused here.
    pub fn new(files: &[DirectFile]) -> io::Result<UringReader> {
        let depth = QUEUE_DEPTH as u32;
        // The reader is made on one thread and used on another, so SINGLE_ISSUER starts disabled.
        let ring = IoUring::builder()
            .setup_clamp()
            .setup_coop_taskrun()
            .build(depth)
            .or_else(|e| if e.raw_os_error() == Some(libc::EINVAL) { IoUring::new(depth) } else { Err(e) })?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) {
            return Err(io::Error::other("this kernel's io_uring cannot read"));
        }
        let fds: Vec<i32> = files.iter().map(|f| f.file.as_raw_fd()).collect();
        ring.submitter().register_files(&fds)?;
        Ok(UringReader {
            ring,
            files: files.to_vec(),
            requests: Requests::default(),
            flying: vec![None; QUEUE_DEPTH],
            n_flying: 0,
        })
    }

    /// Fills the queue and hands it to the kernel, waiting for `want` completions or `timeout`.
    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> Result<(), ReadError> {
        while self.n_flying < QUEUE_DEPTH
            && let Some(chunk) = self.requests.next()
        {
            self.push(chunk);
        }
        let result = match timeout {
            Some(t) if want > 0 => {
                let ts = types::Timespec::from(t);
                let args = types::SubmitArgs::new().timespec(&ts);
                self.ring.submitter().submit_with_args(want, &args)
            }
            _ => self.ring.submit_and_wait(want),
        };
        match result {
            Ok(_) => Ok(()),
            // Time is up, a signal came, or the kernel is short of memory or has completions to be
            // reaped first: the caller comes again.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
                Ok(())
            }
            Err(e) => Err(ReadError::Failed { name: "io_uring".into(), offset: 0, len: 0, what: e.to_string() }),
        }
    }

    fn push(&mut self, chunk: Chunk) {
        let Some(slot) = self.flying.iter().position(Option::is_none) else {
            self.requests.again(chunk);
            return;
        };
        let entry = opcode::Read::new(types::Fixed(chunk.file as u32), chunk.dst, chunk.len as u32)
            .offset(chunk.offset)
            .build()
            .user_data(slot as u64);
        // SAFETY: the buffer stays valid and unshared until this chunk completes, by the contract of
        // `Reader::submit`; `drop` waits for what is in flight.
        match unsafe { self.ring.submission().push(&entry) } {
            Ok(()) => {
                self.flying[slot] = Some(chunk);
                self.n_flying += 1;
            }
            Err(_) => self.requests.again(chunk),
        }
    }

    /// Takes completions from the kernel.
    fn reap(&mut self) {
        for cqe in self.ring.completion() {
            let Some(chunk) = self.flying.get_mut(cqe.user_data() as usize).and_then(Option::take) else { continue };
            self.n_flying -= 1;
            let file = &self.files[chunk.file];
            match cqe.result() {
                n if n >= 0 => {
                    file.forget(chunk.offset, chunk.len);
                    self.requests.chunk_done(chunk, Ok(n as u64), file);
                }
                e if matches!(-e, libc::EAGAIN | libc::EINTR) => self.requests.again(chunk),
                e => self.requests.chunk_done(chunk, Err(io::Error::from_raw_os_error(-e).to_string()), file),
            }
        }
    }
}

impl Reader for UringReader {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn alignment(&self, file: FileId) -> Alignment {
        self.files[usize::from(file.0)].alignment
    }

    unsafe fn submit(&mut self, request: &ReadRequest<'_>) -> Result<(), ReadError> {
        self.requests.add(request)?;
        self.enter(0, None)
    }

    fn poll(&mut self, out: &mut Vec<Completion>, wait: Option<Duration>) -> Result<(), ReadError> {
        self.reap();
        let idle = self.requests.outstanding() == 0;
        if idle || self.requests.has_done() || wait.is_none() {
            if !idle {
                self.enter(0, None)?;
            }
        } else {
            self.enter(1, wait)?;
            self.reap();
            // The queue is refilled at once, so that it does not run dry while the caller works.
            self.enter(0, None)?;
        }
        self.requests.drain_done(out);
        Ok(())
    }

    fn outstanding(&self) -> usize {
        self.requests.outstanding()
    }
}

impl Drop for UringReader {
    fn drop(&mut self) {
        // Reads in flight write into the arena: they must end before it does.
        while self.n_flying > 0 {
            if self.ring.submit_and_wait(1).is_err_and(|e| e.raw_os_error() != Some(libc::EINTR)) {
                break;
            }
            let done = self.ring.completion().filter(|c| (c.user_data() as usize) < QUEUE_DEPTH).count();
            self.n_flying = self.n_flying.saturating_sub(done);
        }
    }
}

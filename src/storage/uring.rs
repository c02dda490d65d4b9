//! Reads through io_uring: files registered, deep queue, completions reaped in batches.
//!
//! Registered buffers are not used: for reads of 1 MiB they measured no gain, and they are charged
//! against the locked-memory limit, which is 8 MiB for ordinary users.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};

use super::split::{Chunk, Requests};
use super::{
    Alignment, Bell, Completion, DirectFile, FileId, QUEUE_DEPTH, ReadError, ReadRequest, Reader, StorageError, Watched,
};
use crate::memory::Region;

/// How often, a millisecond apart, the end of reads in flight is asked for when the kernel refuses to
/// wait for it.
const DRAIN_TRIES: u32 = 10_000;

/// A ring that is not enabled yet, with the set-up flags that this kernel takes.
///
/// SINGLE_ISSUER and DEFER_TASKRUN are left out: they tie the ring to one thread, and a reader loads
/// resident units on one and streams on another.
fn build(depth: u32) -> io::Result<IoUring> {
    let einval = |e: &io::Error| e.raw_os_error() == Some(libc::EINVAL);
    match IoUring::builder().setup_clamp().setup_coop_taskrun().setup_r_disabled().build(depth) {
        Err(e) if einval(&e) => IoUring::builder().setup_r_disabled().build(depth),
        other => other,
    }
}

/// Lets the ring do nothing but read registered files, then enables it. A kernel that knows no
/// restrictions enables it without.
fn enable(ring: &IoUring) -> io::Result<()> {
    let flags = squeue::Flags::FIXED_FILE | squeue::Flags::ASYNC;
    let mut allowed = [
        Restriction::sqe_op(opcode::Read::CODE),
        Restriction::sqe_flags_allowed(flags.bits()),
        Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
    ];
    if let Err(e) = ring.submitter().register_restrictions(&mut allowed) {
        tracing::debug!("io_uring takes no restrictions here: {e}");
    }
    ring.submitter().register_enable_rings()
}

/// A read of the `(offset, len)` bytes `span` of `file`, which is registered as number `index`, to `dst`;
/// `tag` comes back with its completion.
///
/// A read that is a copy is made by the thread that submits it, one after the other, unless the kernel is
/// told to hand it to its workers.
pub(crate) fn read_entry(
    file: &DirectFile,
    index: u32,
    (offset, len): (u64, u32),
    dst: *mut u8,
    tag: u64,
) -> squeue::Entry {
    let flags = if file.copies { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
    let read = opcode::Read::new(types::Fixed(index), dst, len).offset(file.start + offset);
    read.build().user_data(tag).flags(flags)
}

fn n_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Threads that read `file` with `depth` reads in flight: the kernel's workers where reads are copies, of
/// which more than four a processor only wait, else the one that submits.
pub(crate) fn reading_threads(file: &DirectFile, depth: usize) -> usize {
    if file.copies { depth.clamp(1, 4 * n_cpus()) } else { 1 }
}

/// Lets the kernel start as many workers as [`reading_threads`] says. Left alone, it keeps for each thread the
/// limit that the first ring of that thread had, which may have been a shallow one.
pub(crate) fn allow_workers(ring: &IoUring, file: &DirectFile, depth: usize) {
    if file.copies {
        let mut most = [reading_threads(file, depth) as u32, 0];
        if let Err(e) = ring.submitter().register_iowq_max_workers(&mut most) {
            tracing::debug!("io_uring takes no limit to its workers here: {e}");
        }
    }
}

/// User data of the read that the bell ends.
const BELL: u64 = u64::MAX;
/// Longest wait where the kernel refuses the bell's read.
const WITHOUT_BELL: Duration = Duration::from_millis(2);

/// The reader's bell: an eventfd, a registered file like the others, that a read in the ring waits for.
struct Ringing {
    bell: Arc<Bell>,
    event: File,
    index: u32,
    /// Where the kernel puts the count; the read may be in flight as long as this lives.
    count: Box<u64>,
    /// Whether the read is in flight.
    armed: bool,
    broken: bool,
}

impl Ringing {
    fn entry(&mut self) -> squeue::Entry {
        opcode::Read::new(types::Fixed(self.index), (&raw mut *self.count).cast(), 8).build().user_data(BELL)
    }

    /// The read has ended.
    fn ended(&mut self, result: i32) {
        self.armed = false;
        self.broken |= result < 0 && !passing(Some(-result));
    }
}

/// A reader over one io_uring.
pub struct UringReader {
    ring: IoUring,
    files: Vec<DirectFile>,
    requests: Requests,
    /// Chunks in flight, by user data.
    flying: Vec<Option<Chunk>>,
    n_flying: usize,
    ringing: Ringing,
    /// What the kernel said when a request was submitted: the request was taken all the same.
    broken: Option<ReadError>,
    /// What reads go to, dropped behind the ring.
    memory: Vec<Region>,
}

impl UringReader {
    /// Sets a ring up over `files`, which are `copies` times the same files, copy by copy; an error says
    /// that io_uring is refused here.
    pub fn new(files: &[DirectFile], copies: usize) -> io::Result<UringReader> {
        let depth = QUEUE_DEPTH * copies;
        // One more for the bell.
        let ring = build(depth as u32 + 1)?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) {
            return Err(io::Error::other("this kernel's io_uring cannot read"));
        }
        let (bell, event) = Bell::with_event(false)?;
        let fds: Vec<i32> = files.iter().map(|f| f.file.as_raw_fd()).chain([event.as_raw_fd()]).collect();
        ring.submitter().register_files(&fds)?;
        if let Some(file) = files.iter().find(|f| f.copies) {
            allow_workers(&ring, file, depth);
        }
        enable(&ring)?;
        Ok(UringReader {
            ring,
            files: files.to_vec(),
            requests: Requests::over(files.len(), copies),
            memory: Vec::new(),
            flying: vec![None; depth],
            n_flying: 0,
            ringing: Ringing {
                bell,
                event,
                index: files.len() as u32,
                count: Box::default(),
                armed: false,
                broken: false,
            },
            broken: None,
        })
    }

    /// Fills the queue and hands it to the kernel, waiting for `want` completions or `timeout`.
    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> Result<(), ReadError> {
        while self.n_flying < self.flying.len()
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
            Err(e) if passing(e.raw_os_error()) => Ok(()),
            Err(e) => Err(ReadError::Failed { name: "io_uring".into(), offset: 0, len: 0, what: e.to_string() }),
        }
    }

    /// Waits for completions, or the bell.
    fn wait(&mut self, wait: Duration) -> Result<(), ReadError> {
        if !self.ringing.armed && !self.ringing.broken {
            let entry = self.ringing.entry();
            // SAFETY: the count lives as long as the reader, whose drop ends the read and waits for it.
            self.ringing.armed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        }
        let wait = if self.ringing.armed { wait } else { wait.min(WITHOUT_BELL) };
        self.enter(1, Some(wait))
    }

    fn push(&mut self, chunk: Chunk) {
        let Some(slot) = self.flying.iter().position(Option::is_none) else {
            self.requests.again(chunk);
            return;
        };
        let (file, span) = (&self.files[chunk.file], (chunk.offset, chunk.len as u32));
        let entry = read_entry(file, chunk.file as u32, span, chunk.dst, slot as u64);
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
            if cqe.user_data() == BELL {
                self.ringing.ended(cqe.result());
                continue;
            }
            let Some(chunk) = self.flying.get_mut(cqe.user_data() as usize).and_then(Option::take) else { continue };
            self.n_flying -= 1;
            let file = &self.files[chunk.file];
            match cqe.result() {
                n if n >= 0 => {
                    file.forget(chunk.offset, chunk.len);
                    self.requests.chunk_done(chunk, Ok(n as u64), file);
                }
                e => {
                    let what = match -e {
                        // What a worker of the kernel's is to do, which cannot be started.
                        libc::ECANCELED => {
                            "the kernel could start no thread for it; raise the limit on processes (ulimit -u)".into()
                        }
                        e => io::Error::from_raw_os_error(e).to_string(),
                    };
                    if passing(Some(-e)) {
                        self.requests.put_off(chunk, what, file);
                    } else {
                        self.requests.chunk_done(chunk, Err(what), file);
                    }
                }
            }
        }
    }
}

impl Reader for UringReader {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn alignment(&self, file: FileId) -> Alignment {
        self.requests.alignment(&self.files, file)
    }

    fn copies(&self) -> bool {
        self.files.iter().any(|f| f.copies)
    }

    fn attach(&mut self, memory: &Region) -> Result<(), StorageError> {
        self.memory.push(memory.clone());
        Ok(())
    }

    unsafe fn submit(&mut self, request: &ReadRequest<'_>) -> Result<(), ReadError> {
        self.requests.add(request)?;
        // From here on the request is taken: its chunks are queued, and the kernel may have some. An error is
        // `poll`'s, or the caller would give memory away that is still written to.
        if let Err(e) = self.enter(0, None) {
            self.broken.get_or_insert(e);
        }
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>, wait: Option<Duration>) -> Result<(), ReadError> {
        if let Some(e) = &self.broken {
            return Err(e.clone());
        }
        self.reap();
        let idle = self.requests.outstanding() == 0;
        let rung = self.ringing.bell.heard();
        if let Some(wait) = wait.filter(|_| !idle && !rung && !self.requests.has_done()) {
            self.wait(wait)?;
            self.reap();
            self.ringing.bell.heard();
            // The queue is refilled at once, so that it does not run dry while the caller works.
            self.enter(0, None)?;
        } else if !idle {
            self.enter(0, None)?;
        }
        self.requests.drain_done(out);
        Ok(())
    }

    fn watched(&self, to: &mut Vec<Watched>) {
        to.extend(self.files.iter().filter_map(|f| f.watched.clone()));
    }

    fn bells(&self, to: &mut Vec<Arc<Bell>>) {
        to.push(Arc::clone(&self.ringing.bell));
    }

    fn outstanding(&self) -> usize {
        self.requests.outstanding()
    }
}

/// Whether an error is one of those that pass by themselves.
fn passing(errno: Option<i32>) -> bool {
    matches!(errno, Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ENOMEM))
}

/// Waits until the `n_flying` reads of a ring have ended, whose memory may then be given back.
pub(crate) fn drain(ring: &mut IoUring, mut n_flying: usize) {
    let mut tries = 0;
    while n_flying > 0 {
        let waited = ring.submit_and_wait(1);
        let ended = ring.completion().count();
        n_flying = n_flying.saturating_sub(ended);
        if waited.is_err() && ended == 0 {
            tries += 1;
            if tries == DRAIN_TRIES {
                // To return would let the drive write into memory that is given to others.
                tracing::error!("{n_flying} reads never ended: {waited:?}");
                std::process::abort();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for UringReader {
    fn drop(&mut self) {
        let mut n_flying = self.n_flying;
        if self.ringing.armed {
            use std::io::Write;
            // The bell's read ends with this, and is waited for too; a full counter has ended it already.
            let _ = self.ringing.event.write(&1u64.to_ne_bytes());
            n_flying += 1;
        }
        drain(&mut self.ring, n_flying);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::storage::{ReaderKind, StorageError, open_reader};
    use std::path::Path;

    /// Refuses io_uring_setup with EPERM in the calling thread, as container run-times do.
    pub(crate) fn refuse_io_uring() -> io::Result<()> {
        const LD_NR: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
        const JEQ: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        const RET: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
        let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        let mut filter = [
            op(LD_NR, 0, 0, 0),
            op(JEQ, 0, 1, libc::SYS_io_uring_setup as u32),
            op(RET, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
            op(RET, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        nix::sys::prctl::set_no_new_privs()?;
        // SAFETY: the program and its filter outlive the call, which copies them.
        let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) };
        if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    #[test]
    fn reads_that_are_copies_go_to_as_many_workers_as_are_in_flight() {
        let f = tempfile::NamedTempFile::new().unwrap();
        f.as_file().set_len(1 << 20).unwrap();
        let mut file = DirectFile::open(f.path()).unwrap();
        file.copies = false;
        assert_eq!(reading_threads(&file, 16), 1);
        file.copies = true;
        assert_eq!((reading_threads(&file, 1), reading_threads(&file, 4)), (1, 4));
        assert_eq!(reading_threads(&file, 100_000), 4 * n_cpus());
    }

    #[test]
    fn a_shallow_ring_before_does_not_limit_the_workers() {
        let f = tempfile::NamedTempFile::new().unwrap();
        let mut file = DirectFile::open(f.path()).unwrap();
        file.copies = true;
        // Limits are kept by thread: one of its own sees no other test's.
        std::thread::spawn(move || {
            let most = |depth: u32| -> io::Result<u32> {
                let ring = IoUring::new(depth)?;
                allow_workers(&ring, &file, depth as usize);
                let mut now = [0, 0];
                ring.submitter().register_iowq_max_workers(&mut now)?;
                Ok(now[0])
            };
            // Kernels before 5.15 know no such limit.
            if let (Ok(one), Ok(four)) = (most(1), most(4)) {
                assert_eq!((one, four), (1, 4));
            }
        })
        .join()
        .unwrap();
    }

    /// Guards against a request that is not seen until reads in flight have ended: the bell ends a wait, one that was
    /// rung before it as well, and the reader ends with its bell's read in flight.
    #[test]
    fn the_bell_ends_waits() {
        let f = tempfile::NamedTempFile::new().unwrap();
        f.as_file().set_len(1 << 20).unwrap();
        let Ok(mut reader) = UringReader::new(&[DirectFile::open(f.path()).unwrap()], 1) else { return };
        let mut bells = Vec::new();
        reader.bells(&mut bells);
        let long = Duration::from_secs(600);
        for late in [false, true, false] {
            let bell = Arc::clone(&bells[0]);
            let ringing = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(if late { 30 } else { 0 }));
                bell.ring();
            });
            // Nothing else is in flight that could end it.
            while !bells[0].heard() {
                reader.wait(long).unwrap();
                reader.reap();
            }
            ringing.join().unwrap();
        }
        reader.wait(Duration::from_millis(1)).unwrap();
        assert!(reader.ringing.armed || reader.ringing.broken);
    }

    #[test]
    fn where_io_uring_is_refused_a_pool_reads_and_one_line_says_so() {
        let f = tempfile::NamedTempFile::new().unwrap();
        f.as_file().set_len(1 << 20).unwrap();
        let path = f.path().to_owned();
        // A filter holds for the thread that sets it and those it starts, so no child is needed.
        std::thread::spawn(move || {
            refuse_io_uring().unwrap();
            let files: [&Path; 1] = [&path];
            let (reader, notes) = open_reader(&files, ReaderKind::Auto).unwrap();
            assert_eq!(reader.name(), "pread");
            assert!(matches!(&notes[..], [n] if n.contains("io_uring is not available")), "{notes:?}");
            assert!(matches!(open_reader(&files, ReaderKind::IoUring), Err(StorageError::IoUring(_))));
        })
        .join()
        .unwrap();
    }
}

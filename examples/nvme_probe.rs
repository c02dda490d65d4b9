//! Exercises a drive bound to vfio-pci: compares what VFIO reads with a copy made through the
//! kernel, writes the identify pages, and times reads. Used by `tests/vm`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use nt::memory::{Arena, Region};
use nt::storage::bind::find_bound;
use nt::storage::checksum::CHUNK;
use nt::storage::guard::Host;
use nt::storage::manifest::{Manifest, Span};
use nt::storage::vfio::{Limits, VfioReader};
use nt::storage::{Completion, Extent, FileId, ReadRequest, Reader};
use rand::{RngExt, SeedableRng};

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// nt device
    Device(nt::cli::device::DeviceArgs),
    /// Random reads against a copy
    Compare {
        device: String,
        copy: String,
        #[arg(default_value_t = 10_000)]
        reads: u64,
    },
    /// Write the identify pages to PREFIX.ctrl and PREFIX.ns
    Identify { device: String, prefix: String },
    /// A file by its manifest, against a copy
    File { device: String, manifest: String, copy: String },
    /// Time reads, random ones of each KIB:DEPTH, for so many seconds each
    Bench {
        device: String,
        #[arg(default_values = ["4:1", "4:32", "128:1", "128:32", "1024:1", "1024:32"])]
        cases: Vec<String>,
        #[arg(long, default_value = "1.5")]
        seconds: f64,
    },
    /// Read 8 MiB with this many seconds for each command
    Late { device: String, seconds: u64 },
    /// Take the last step against a drive that would not stop, with reads under way: nothing may be written
    /// to memory afterwards
    Silence { device: String },
    /// Read until killed
    Forever { device: String },
    /// Hold a node in a way that is hard to see, until killed
    Hold {
        #[arg(value_enum)]
        way: Way,
        node: String,
    },
    /// Mount a file system whose program answers nobody there, until killed
    Unanswered { place: String },
    /// Mount a file system whose program answers no write, and have a process wait for one with its memory locked,
    /// until killed
    Faulting { place: String },
    /// Keep the device open until killed, without the descriptors of its group and container: nobody sees in
    /// /proc which drive it has
    Keep { device: String },
}

/// Ways to hold a node without a descriptor in the first thread's table.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Way {
    /// By a mapping alone
    Mapped,
    /// By a message in a socket alone
    Socket,
    /// By a message in a connection that nobody accepts
    Waiting,
    /// By a thread with a table of its own
    Thread,
    /// By a thread whose process's first thread has ended
    Ended,
    /// By an io_uring alone
    Ring,
}

fn hold(way: Way, node: &str) -> Result<(), Box<dyn std::error::Error>> {
    use std::os::fd::AsRawFd;
    let wait = || -> ! {
        println!("held");
        loop {
            std::thread::sleep(Duration::from_secs(1000));
        }
    };
    let file = std::fs::File::open(node)?;
    match way {
        Way::Mapped => {
            // SAFETY: the mapping is never read.
            let _map = unsafe { memmap2::MmapOptions::new().len(4096).map(&file)? };
            drop(file);
            wait()
        }
        Way::Socket => {
            let (from, _to) = std::os::unix::net::UnixStream::pair()?;
            send(&from, file.as_raw_fd())?;
            drop(file);
            wait()
        }
        Way::Waiting => {
            use std::os::unix::net::{UnixListener, UnixStream};
            let path = std::env::temp_dir().join(format!("waiting.{}", std::process::id()));
            let _nobody_accepts = UnixListener::bind(&path)?;
            let from = UnixStream::connect(&path)?;
            send(&from, file.as_raw_fd())?;
            drop((from, file));
            wait()
        }
        Way::Thread | Way::Ended => {
            let path = node.to_owned();
            std::thread::spawn(move || {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES).expect("a table of its own");
                let _file = std::fs::File::open(path).expect("the node");
                wait()
            });
            drop(file);
            std::thread::sleep(Duration::from_millis(300));
            if matches!(way, Way::Ended) {
                // SAFETY: only this thread ends; it holds nothing that the other one uses.
                unsafe { libc::syscall(libc::SYS_exit, 0) };
            }
            wait()
        }
        Way::Ring => {
            let ring = io_uring::IoUring::new(4)?;
            ring.submitter().register_files(&[file.as_raw_fd()])?;
            drop(file);
            wait()
        }
    }
}

/// Mounts a file system whose program holds the file that is given back.
fn mounted(place: &str, options: &str) -> std::io::Result<std::fs::File> {
    use std::os::fd::AsRawFd;
    let device = std::fs::File::options().read(true).write(true).open("/dev/fuse")?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0{options}", device.as_raw_fd());
    let [kind, place, options] = ["fuse", place, options.as_str()].map(std::ffi::CString::new);
    let (kind, place, options) = (kind?, place?, options?);
    // SAFETY: three strings that end with a zero byte and outlive the call.
    if unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(device)
}

/// A question of FUSE's kernel side: what is asked, of which file, and its number.
fn question(device: &mut std::fs::File, buffer: &mut [u8]) -> Result<(u32, u64, [u8; 8]), Box<dyn std::error::Error>> {
    use std::io::Read;
    let len = device.read(buffer)?;
    let head = buffer[..len].get(..24).ok_or("a question of the kernel was expected")?;
    let number = |at: usize| head[at..at + 8].try_into().map(u64::from_le_bytes);
    Ok((number(4)? as u32, number(16)?, head[8..16].try_into()?))
}

fn answer(device: &mut std::fs::File, unique: [u8; 8], error: i32, body: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let mut all = (16 + body.len() as u32).to_le_bytes().to_vec();
    all.extend(error.to_le_bytes());
    all.extend(unique);
    all.extend(body);
    device.write_all(&all)
}

/// FUSE_INIT of version 7.31: version, then limits.
fn version() -> [u8; 64] {
    let mut body = [0; 64];
    body[..4].copy_from_slice(&7u32.to_le_bytes());
    body[4..8].copy_from_slice(&31u32.to_le_bytes());
    body[16..18].copy_from_slice(&12u16.to_le_bytes());
    body[20..24].copy_from_slice(&4096u32.to_le_bytes());
    body
}

/// Mounts a file system that answers its first question, which is the kernel's, and no other.
fn unanswered(place: &str) -> Result<(), Box<dyn std::error::Error>> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut device = mounted(place, ",allow_other")?;
    let (_, _, unique) = question(&mut device, &mut [0; 1 << 17])?;
    answer(&mut device, unique, 0, &version())?;
    // Whoever asks what this descriptor is, asks the program.
    let _open = std::fs::File::options().read(true).custom_flags(libc::O_PATH).open(place)?;
    println!("held");
    loop {
        std::thread::sleep(Duration::from_secs(1000));
    }
}

/// Mounts a file system with one file, which answers everything but writes; a second process has a page of the file
/// mapped, writes to it while the first write is under way, and so waits with its memory locked.
fn faulting(place: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut device = mounted(place, "")?;
    // SAFETY: this process has one thread.
    if let nix::unistd::ForkResult::Child = unsafe { nix::unistd::fork() }? {
        drop(device);
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        return fault(&format!("{place}/f"));
    }
    // `struct fuse_attr` of a file of one page, and of the folder.
    let attributes = |inode: u64, mode: u32| {
        let mut all = [0; 88];
        all[..8].copy_from_slice(&inode.to_le_bytes());
        all[8..16].copy_from_slice(&4096u64.to_le_bytes());
        all[60..64].copy_from_slice(&mode.to_le_bytes());
        all[64..68].copy_from_slice(&1u32.to_le_bytes());
        all
    };
    let (file, folder) = (attributes(2, libc::S_IFREG | 0o666), attributes(1, libc::S_IFDIR | 0o755));
    let mut buffer = vec![0; 1 << 17];
    loop {
        let (asked, inode, unique) = question(&mut device, &mut buffer)?;
        // `enum fuse_opcode` of linux/fuse.h.
        match asked {
            26 => answer(&mut device, unique, 0, &version())?,
            1 => answer(&mut device, unique, 0, &[&2u64.to_le_bytes()[..], &[0; 32], &file].concat())?,
            3 => answer(&mut device, unique, 0, &[&[0; 16][..], if inode == 1 { &folder } else { &file }].concat())?,
            14 => answer(&mut device, unique, 0, &[0; 16])?,
            15 => answer(&mut device, unique, 0, &[0; 4096])?,
            // A write; and what wants no answer: to forget, to interrupt.
            16 | 2 | 36 | 42 => {}
            _ => answer(&mut device, unique, -libc::ENOSYS, &[])?,
        }
    }
}

/// Writes to the first page of a file, again while that is under way, and changes what is mapped meanwhile.
fn fault(path: &str) -> Result<(), Box<dyn std::error::Error>> {
    use std::os::fd::AsRawFd;
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    // SAFETY: the only other one that has this file answers with zeros.
    let map = unsafe { memmap2::MmapOptions::new().len(4096).map_mut(&file)? };
    let page = map.as_ptr() as usize;
    std::mem::forget(map);
    // SAFETY: the page is mapped for writing, and only the last of the three threads takes it away.
    let write = move |value: u8| unsafe { (page as *mut u8).write_volatile(value) };
    // Begun before, since nothing can be mapped any more once the second write waits.
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(1));
        write(2);
    });
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(2));
        // SAFETY: nobody uses the page after that but the thread that waits for it.
        unsafe { libc::munmap(page as *mut libc::c_void, 4096) }
    });
    write(1);
    // SAFETY: a call with numbers and an open descriptor.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 4096, libc::SYNC_FILE_RANGE_WRITE) };
    println!("held {}", std::process::id());
    loop {
        std::thread::sleep(Duration::from_secs(1000));
    }
}

/// Sends a descriptor in a message of one byte.
fn send(socket: &std::os::unix::net::UnixStream, fd: i32) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    let byte = [1u8];
    let mut part = libc::iovec { iov_base: byte.as_ptr().cast_mut().cast(), iov_len: 1 };
    let mut control = [0u64; 4];
    // SAFETY: all zeros are a valid message; its parts outlive the call, and `control` is aligned and long
    // enough for one descriptor.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), libc::CMSG_SPACE(4) as usize);
        let head = libc::CMSG_FIRSTHDR(&raw const message);
        ((*head).cmsg_level, (*head).cmsg_type) = (libc::SOL_SOCKET, libc::SCM_RIGHTS);
        (*head).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(head).cast::<i32>().write_unaligned(fd);
        libc::sendmsg(socket.as_raw_fd(), &raw const message, 0)
    };
    if sent == 1 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

const ARENA: usize = 64 << 20;

struct Open {
    reader: VfioReader,
    file: FileId,
    arena: *mut u8,
    _memory: Region,
    size: u64,
}

fn open(name: &str) -> Result<Open, Box<dyn std::error::Error>> {
    let (drive, namespace) = find_bound(&Host::default(), name)?;
    let memory = Arena::new(ARENA as u64)?.whole();
    let mut reader = VfioReader::open_bound(&drive, &namespace)?;
    reader.attach(&memory)?;
    let file = reader.add_file(name, vec![Span { file_offset: 0, device_offset: 0, len: namespace.size }]);
    Ok(Open { reader, file, arena: memory.addr(), _memory: memory, size: namespace.size })
}

impl Open {
    fn submit(&mut self, tag: u64, offset: u64, len: u64, at: usize) -> Result<(), Box<dyn std::error::Error>> {
        let extents = [Extent { file: self.file, offset, len, dst_offset: 0 }];
        let room = (len as usize).next_multiple_of(4096).min(ARENA - at);
        let request =
            ReadRequest { tag, extents: &extents, dst: self.arena.wrapping_add(at), urgent: false, dst_len: room };
        // SAFETY: each tag has its own part of the arena, read only after its completion.
        unsafe { self.reader.submit(&request)? };
        Ok(())
    }

    fn next(&mut self, out: &mut Vec<Completion>) -> Result<(), Box<dyn std::error::Error>> {
        self.reader.poll(out, Some(Duration::from_secs(60)))?;
        Ok(())
    }

    fn bench(&mut self, bytes: u64, depth: u64, seconds: f64) -> Result<(f64, f64, f64), Box<dyn std::error::Error>> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let (mut done, mut out, mut more) = (0u64, Vec::new(), true);
        let cpu = cpu_seconds();
        let began = Instant::now();
        let mut offset = || rng.random_range(0..self.size / bytes) * bytes;
        let first: Vec<u64> = (0..depth).map(|_| offset()).collect();
        for (tag, offset) in first.into_iter().enumerate() {
            self.submit(tag as u64, offset, bytes, tag * bytes as usize)?;
        }
        while self.reader.outstanding() > 0 {
            self.next(&mut out)?;
            for completion in out.drain(..) {
                completion.result?;
                done += 1;
                // Some clocks cost more to look at than a read.
                more = more && (done % 32 != 0 || began.elapsed().as_secs_f64() < seconds);
                if more {
                    let offset = rng.random_range(0..self.size / bytes) * bytes;
                    self.submit(completion.tag, offset, bytes, (completion.tag * bytes) as usize)?;
                }
            }
        }
        let wall = began.elapsed().as_secs_f64();
        Ok((done as f64 / wall, (done * bytes) as f64 / wall / 1e6, (cpu_seconds() - cpu) / done as f64 * 1e6))
    }
}

fn cpu_seconds() -> f64 {
    let time = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)
        .map(|u| (u.user_time(), u.system_time()));
    time.map_or(0.0, |(u, s)| (u.tv_sec() + s.tv_sec()) as f64 + (u.tv_usec() + s.tv_usec()) as f64 / 1e6)
}

fn compare(name: &str, copy: &str, reads: u64) -> Result<(), Box<dyn std::error::Error>> {
    let truth = std::fs::read(copy)?;
    let mut drive = open(name)?;
    let block = u64::from(drive.reader.alignment(drive.file).offset);
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let (mut done, mut bytes, mut out) = (0, 0u64, Vec::new());
    while done < reads {
        let mut batch = Vec::new();
        for tag in 0..4u64 {
            // Mostly small, some up to 8 MiB; memory at any multiple of 4, so unaligned to pages.
            let most = [8u64 << 10, 64 << 10, 8 << 10, if done % 100 == 0 { 8 << 20 } else { 16 << 10 }][tag as usize];
            let len = rng.random_range(1..=most / block) * block;
            let offset = rng.random_range(0..=(drive.size - len) / block) * block;
            let at = tag as usize * (16 << 20) + 4 * rng.random_range(0..1024usize);
            // SAFETY: inside the arena; nothing is in flight here. A poison shows reads that wrote nothing.
            unsafe { drive.arena.add(at).write_bytes(0xa5, len as usize) };
            drive.submit(tag, offset, len, at)?;
            batch.push((offset as usize, len as usize, at));
        }
        while drive.reader.outstanding() > 0 {
            drive.next(&mut out)?;
        }
        for completion in out.drain(..) {
            let got = completion.result?;
            let (offset, len, at) = batch[completion.tag as usize];
            // SAFETY: the read is complete, and no other is in flight.
            let data = unsafe { std::slice::from_raw_parts(drive.arena.add(at), len) };
            if got != len as u64 || data != &truth[offset..offset + len] {
                return Err(format!("{len} bytes at {offset} differ").into());
            }
            done += 1;
            bytes += got;
        }
    }
    println!("{done} reads, {bytes} bytes, all equal");
    Ok(())
}

fn silence(name: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut drive = open(name)?;
    for tag in 0..32 {
        drive.submit(tag, tag << 18, 1 << 18, (tag as usize) << 18)?;
    }
    // They begin with a poll.
    drive.reader.poll(&mut Vec::new(), None)?;
    let enabled = |drive: &Open| drive.reader.drive().controller.enabled();
    let before = enabled(&drive);
    let silence = drive.reader.silence();
    let after = enabled(&drive);
    let len = 32 << 18;
    // SAFETY: inside the arena, which only the drive could write to: whether it does is the question.
    unsafe { drive.arena.write_bytes(0xa5, len) };
    std::thread::sleep(Duration::from_secs(1));
    // SAFETY: as above.
    let kept = (0..len).all(|at| unsafe { drive.arena.add(at).read_volatile() } == 0xa5);
    let owed = drive.reader.outstanding();
    println!("{owed} reads under way, enabled {before}, then {after}; {silence:?}, memory left alone: {kept}");
    let right = before && !after && silence.reset && silence.bus_master_off && kept && owed == 32;
    if right { Ok(()) } else { Err("it was not silenced".into()) }
}

fn whole_file(name: &str, manifest: &str, copy: &str) -> Result<(), Box<dyn std::error::Error>> {
    let truth = std::fs::read(copy)?;
    let manifest: Manifest = serde_json::from_str(&std::fs::read_to_string(manifest)?)?;
    let mut drive = open(name)?;
    drive.file = drive.reader.add_file(&manifest.file, manifest.spans());
    let (mut offset, mut out) = (0, Vec::new());
    while offset < manifest.size {
        let len = (manifest.size - offset).min(CHUNK as u64);
        drive.submit(0, offset, len, 0)?;
        while drive.reader.outstanding() > 0 {
            drive.next(&mut out)?;
        }
        for completion in out.drain(..) {
            completion.result?;
        }
        // SAFETY: the read is complete, and no other is in flight.
        let data = unsafe { std::slice::from_raw_parts(drive.arena, len as usize) };
        if !manifest.holds((offset / CHUNK as u64) as usize, data) || data != &truth[offset as usize..][..len as usize]
        {
            return Err(format!("{}: the chunk at {offset} differs", manifest.file).into());
        }
        offset += len;
    }
    println!("{} bytes by {} extents, all equal", manifest.size, manifest.extents.len());
    Ok(())
}

fn main() -> ExitCode {
    let result: Result<(), Box<dyn std::error::Error>> = match Args::parse().command {
        Command::Device(args) => {
            return nt::cli::device::run(args).map_or_else(|failure| failure.report(), |()| ExitCode::SUCCESS);
        }
        Command::Compare { device, copy, reads } => compare(&device, &copy, reads),
        Command::Identify { device, prefix } => open(&device).and_then(|drive| {
            let [controller, namespace] = &drive.reader.drive().controller.raw_identify;
            std::fs::write(format!("{prefix}.ctrl"), controller)?;
            std::fs::write(format!("{prefix}.ns"), namespace)?;
            println!("{:?}\n{:?}", drive.reader.drive().controller.info, drive.reader.drive().controller.namespace);
            Ok(())
        }),
        Command::File { device, manifest, copy } => whole_file(&device, &manifest, &copy),
        Command::Bench { device, cases, seconds } => open(&device).and_then(|mut drive| {
            for case in cases {
                let (kib, depth) = case.split_once(':').ok_or("KIB:DEPTH was expected")?;
                let (bytes, depth) = (kib.parse::<u64>()? << 10, depth.parse()?);
                let (rate, mb, us) = drive.bench(bytes, depth, seconds)?;
                println!("bs={bytes} depth={depth}: {rate:.0} reads/s {mb:.1} MB/s {us:.1} us CPU a read");
            }
            Ok(())
        }),
        Command::Late { device, seconds } => open(&device).and_then(|mut drive| {
            let limit = Duration::from_secs(seconds);
            drive.reader.set_limits(Limits { read: limit, abort: limit, ..Limits::default() });
            drive.submit(0, 0, 8 << 20, 0)?;
            let mut out = Vec::new();
            while drive.reader.outstanding() > 0 {
                drive.next(&mut out)?;
            }
            out.into_iter().try_for_each(|completion| completion.result.map(|_| ())).map_err(Into::into)
        }),
        Command::Silence { device } => silence(&device),
        Command::Hold { way, node } => hold(way, &node),
        Command::Unanswered { place } => unanswered(&place),
        Command::Faulting { place } => faulting(&place),
        Command::Keep { device } => open(&device).and_then(|_drive| {
            for entry in std::fs::read_dir("/proc/self/fd")?.flatten() {
                let number = entry.file_name().to_string_lossy().parse::<i32>();
                let node = std::fs::read_link(entry.path()).is_ok_and(|target| target.starts_with("/dev/vfio"));
                if let (true, Ok(number)) = (node, number) {
                    // SAFETY: the reader that owns it is not used or dropped any more: this loop never ends.
                    unsafe { libc::close(number) };
                }
            }
            println!("kept");
            loop {
                std::thread::park();
            }
        }),
        Command::Forever { device } => open(&device).and_then(|mut drive| {
            loop {
                drive.bench(128 << 10, 32, 1.0)?;
            }
        }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

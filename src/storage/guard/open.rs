//! Processes that hold a node of a drive: by descriptors of every thread, mappings, io_uring, and
//! descriptors under way in a socket.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::ask::Answer;
use super::attended::{Beat, attended};
use super::host::{Host, Unreadable};
use super::node::{Node, compare_files, is_one_file};
use super::nodes::Nodes;
use super::sockets::Sockets;
use super::sysfs::Controller;
use super::{Check, Reason};

/// How long all processes may take: any user can have many, with many files.
const SEARCH: Duration = Duration::from_secs(120);
/// What the link of an io_uring's descriptor says.
const RING: &str = "anon_inode:[io_uring]";

/// A search through processes, which any user can make long.
pub struct Search(Instant);

impl Search {
    /// Begins one.
    pub fn begin() -> Search {
        Search(Instant::now() + SEARCH)
    }

    /// That it may go on to `path`.
    ///
    /// # Errors
    /// Once it has taken too long, or a signal has asked to stop.
    pub fn go_on(&self, host: &Host, path: &str) -> Result<(), Unreadable> {
        if host.is_stopped() || Instant::now() > self.0 {
            let why = format!("looking through all processes was ended, by a signal or after {SEARCH:?}");
            return Err(Unreadable::new(path, why));
        }
        Ok(())
    }
}

/// How often a list is read again because something began meanwhile.
const ROUNDS: usize = 100;

/// Looks at each name that `list` tells, and reads the list again until it tells none that was not looked at: what a
/// process has open is its child's by the time that the search comes to it, and the child may come after the list.
///
/// # Errors
/// If new ones keep coming, and those of `list` and `look`.
pub fn each_of(
    path: &str,
    mut list: impl FnMut() -> Result<Vec<String>, Unreadable>,
    mut look: impl FnMut(&str) -> Result<(), Unreadable>,
) -> Result<(), Unreadable> {
    let mut seen: HashSet<String> = HashSet::new();
    for _ in 0..ROUNDS {
        let names = list()?;
        let new: Vec<&String> = names.iter().filter(|n| !seen.contains(*n)).collect();
        if new.is_empty() {
            return Ok(());
        }
        for name in new {
            look(name)?;
        }
        // A number whose process has ended may be given again.
        seen = names.into_iter().collect();
    }
    let newest = list()?.into_iter().filter(|n| !seen.contains(n)).max_by_key(|n| n.parse::<u64>().ok());
    let what = newest.map_or_else(String::new, |n| format!(" (the newest is {n})"));
    let why = format!(
        "processes or threads begin faster than they can be looked at{what}, so what they have open cannot be told; end what starts them and try again"
    );
    Err(Unreadable::new(path, why))
}

/// Every process, each once; see [`each_of`].
///
/// # Errors
/// As [`each_of`].
pub fn each_process(host: &Host, look: impl FnMut(&str) -> Result<(), Unreadable>) -> Result<(), Unreadable> {
    each_of("/proc", || processes(host), look)
}

/// Every thread of a process by its folder, each once; see [`each_of`].
///
/// # Errors
/// As [`each_of`].
pub fn each_thread(host: &Host, pid: &str, look: impl FnMut(&str) -> Result<(), Unreadable>) -> Result<(), Unreadable> {
    each_of(&format!("/proc/{pid}/task"), || threads(host, pid), look)
}

/// One thread that is looked at.
struct Thread<'a> {
    pid: &'a str,
    /// Its folder in `/proc`.
    folder: String,
    /// Told of each step.
    beat: &'a Beat,
}

/// Processes by number, sorted as text.
pub fn processes(host: &Host) -> Result<Vec<String>, Unreadable> {
    let mut names = host.must_list("/proc")?;
    names.retain(|n| n.bytes().all(|b| b.is_ascii_digit()));
    Ok(names)
}

/// Folders of a process's threads, the process's own where it has no list of them.
fn threads(host: &Host, pid: &str) -> Result<Vec<String>, Unreadable> {
    let folder = format!("/proc/{pid}/task");
    let tids = match host.list(&folder) {
        Err(e) if e.is_gone() => Vec::new(),
        tids => tids?,
    };
    if tids.is_empty() {
        return Ok(vec![format!("/proc/{pid}")]);
    }
    Ok(tids.iter().map(|tid| format!("{folder}/{tid}")).collect())
}

/// Everything that processes other than `own_pid` hold of the controller.
pub fn opened(host: &Host, controller: &Controller, own_pid: u32, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let (nodes, host) = (Nodes::of(host, controller)?, host.clone());
    let (reasons, ended) = attended("/proc", move |beat| {
        let mut reasons = Vec::new();
        let ended = search(&host, &nodes, own_pid, beat, &mut reasons);
        (reasons, ended)
    })?;
    out.extend(reasons);
    ended
}

/// The search through all processes.
fn search(host: &Host, nodes: &Nodes, own_pid: u32, beat: &Beat, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let mut sockets = Sockets::of(host)?;
    let search = Search::begin();
    each_process(host, |pid| {
        if pid == own_pid.to_string() {
            return Ok(());
        }
        let (mut tables, mut rings, mut folders) = (Vec::new(), Vec::new(), Vec::new());
        each_thread(host, pid, |folder| {
            search.go_on(host, folder)?;
            beat.at(folder);
            folders.push(folder.to_owned());
            sockets.look_at_network(host, pid, folder)?;
            let tid = folder.rsplit('/').next().unwrap_or(pid);
            if host.is_real() && is_known(&mut tables, tid) {
                return Ok(());
            }
            for fd in descriptors(host, nodes, &Thread { pid, folder: folder.to_owned(), beat }, &mut sockets, out)? {
                let ring = (tid.to_owned(), fd);
                if !(host.is_real() && rings.iter().any(|other| is_one_file(other, &ring))) {
                    rings.push(ring);
                }
            }
            Ok(())
        })?;
        beat.at(&format!("/proc/{pid}/map_files"));
        mapped(host, nodes, pid, &folders, rings.len(), out)
    })?;
    beat.at("/proc");
    sockets.judge(host, out)
}

/// Whether a thread has the table of descriptors of one in `tables`, which is in the kernel's order; if not, it joins
/// them. So few comparisons are needed, however many threads have tables of their own.
fn is_known(tables: &mut Vec<String>, tid: &str) -> bool {
    let mut untold = false;
    let place = tables.binary_search_by(|other| {
        compare_files(other, tid).unwrap_or_else(|| {
            untold = true;
            Ordering::Less
        })
    });
    match place {
        _ if untold => {}
        Ok(_) => return true,
        Err(at) => tables.insert(at, tid.to_owned()),
    }
    false
}

/// A list that is empty where its process has ended meanwhile.
fn list(host: &Host, path: &str) -> Result<Vec<String>, Unreadable> {
    match host.list(path) {
        Err(e) if e.is_gone() => Ok(Vec::new()),
        names => names,
    }
}

/// What the descriptors of one thread hold; those that are an io_uring.
fn descriptors(
    host: &Host,
    nodes: &Nodes,
    thread: &Thread<'_>,
    sockets: &mut Sockets,
    out: &mut Vec<Reason>,
) -> Result<Vec<String>, Unreadable> {
    let folder = format!("{}/fd", thread.folder);
    // Paths of what may be a node, and their links.
    let (mut paths, mut links) = (Vec::new(), Vec::new());
    let mut names = Names::default();
    let mut rings = Vec::new();
    for fd in list(host, &folder)? {
        let path = format!("{folder}/{fd}");
        // No link in a picture: a file that was deleted.
        let link = match host.link(&path) {
            Ok(link) => link.to_string_lossy().into_owned(),
            Err(_) if host.is_real() => continue,
            Err(_) => "/a deleted file".into(),
        };
        if link == RING {
            rings.push(fd);
            continue;
        }
        names.add(&link);
        if link.starts_with("socket:") {
            sockets.look_at(host, thread.pid, &format!("{}/fdinfo/{fd}", thread.folder))?;
        } else {
            // Pipes and the like have no path.
            if link.starts_with('/') {
                paths.push(path);
                links.push(link);
            }
        }
    }
    let answers = asked(host, &format!("process {}", thread.pid), &folder, &paths, out);
    for (answer, link) in answers.into_iter().zip(&links) {
        let found = held(answer)?;
        // A name is asked only where there is no number to ask.
        let by_number = found.and_then(|n| nodes.device(n));
        let by_name = || nodes.spelled(link).filter(|_| found.is_none() && link.starts_with("/dev/"));
        if let Some(name) = by_number.or_else(by_name) {
            let other = if link.ends_with(&format!("/{name}")) { String::new() } else { format!(" as {link}") };
            let what = format!("process {} has /dev/{name} open{other}", thread.pid);
            push(out, Reason::new(Check::Open, &folder, what));
        }
    }
    for fd in &rings {
        registered(host, nodes, thread, fd, &names, out)?;
    }
    Ok(rings)
}

/// What each of a process's `paths` leads to; nothing, and a reason, where one of them gets no answer.
fn asked(host: &Host, whose: &str, folder: &str, paths: &[String], out: &mut Vec<Reason>) -> Vec<Answer> {
    host.nodes(paths).unwrap_or_else(|e| {
        let what = format!("the files of {whose} cannot all be told: {}", e.why);
        push(out, Reason::new(Check::Unreadable, folder, what));
        Vec::new()
    })
}

/// What a descriptor or a mapping leads to.
fn held(answer: Answer) -> Result<Option<Node>, Unreadable> {
    match answer {
        Err(e) if e.is_gone() => Ok(None),
        // The folder with the link could be listed, so it is the file's own system that refuses: FUSE
        // of another user does so even to root, and holds no devices.
        Err(e) if e.errno == Some(libc::EACCES) && nix::unistd::geteuid().is_root() => Ok(None),
        answer => answer,
    }
}

/// Adds a reason that is not there yet: threads repeat each other.
pub fn push(out: &mut Vec<Reason>, reason: Reason) {
    if !out.iter().any(|r| r.check == reason.check && r.what == reason.what) {
        out.push(reason);
    }
}

/// Mappings keep a node open when its descriptor is closed. The threads of a process share them, but
/// one that has ended shows none.
fn mapped(
    host: &Host,
    nodes: &Nodes,
    pid: &str,
    threads: &[String],
    rings: usize,
    out: &mut Vec<Reason>,
) -> Result<(), Unreadable> {
    let mut rings_mapped = 0;
    let tids = threads.iter().filter_map(|folder| folder.rsplit('/').next()).filter(|tid| *tid != pid);
    for tid in std::iter::once(pid).chain(tids) {
        let folder = format!("/proc/{tid}/map_files");
        let ranges = list(host, &folder)?;
        let paths: Vec<String> = ranges.iter().map(|range| format!("{folder}/{range}")).collect();
        if paths.iter().any(|path| host.link(path).is_ok_and(|link| link.as_os_str() == RING)) {
            rings_mapped = rings_mapped.max(number_mapped(host, &format!("/proc/{tid}/maps"))?).max(1);
        }
        for answer in asked(host, &format!("process {pid}"), &folder, &paths, out) {
            if let Some(name) = held(answer)?.and_then(|n| nodes.device(n)) {
                let what = format!("process {pid} has /dev/{name} mapped into its memory");
                push(out, Reason::new(Check::Open, &folder, what));
            }
        }
        if !ranges.is_empty() {
            break;
        }
    }
    if rings_mapped > rings {
        let what = format!("process {pid} has an io_uring without a descriptor, whose files cannot be told; end it");
        push(out, Reason::new(Check::Unreadable, &format!("/proc/{pid}/map_files"), what));
    }
    Ok(())
}

/// How many rings a process has mapped, by its list of mappings: each ring's queue, and its entries, begin at places of
/// their own (`IORING_OFF_SQ_RING`, `IORING_OFF_SQES`). A process can use a ring whose descriptor is closed
/// (`IORING_REGISTER_RING_FDS`).
fn number_mapped(host: &Host, maps: &str) -> Result<usize, Unreadable> {
    let text = match host.read(maps) {
        Err(e) if e.is_gone() => return Ok(0),
        text => text?,
    };
    let starts = text.lines().filter(|l| l.ends_with(RING)).filter_map(|l| l.split_whitespace().nth(2));
    let starts: Vec<u64> = starts.filter_map(|at| u64::from_str_radix(at, 16).ok()).collect();
    Ok([0, 0x1000_0000].map(|place| starts.iter().filter(|at| **at == place).count()).into_iter().max().unwrap_or(0))
}

/// Names by which kernels before 6.10 tell a registered file, and how many descriptors have each.
#[derive(Debug, Default, Clone)]
struct Names(HashMap<String, usize>);

/// Stands for sockets, whose names are those of their protocols.
const SOCKETS: &str = "/sockets";
/// Stands for what has no name of its own there: pipes, and names too long to be kept in the kernel's entry.
const NAMELESS: &str = "";
/// From this many bytes a name is not kept in the kernel's entry (32 or 40 by version).
const NAME_LONG: usize = 32;

impl Names {
    /// Counts a descriptor by what its link says.
    fn add(&mut self, link: &str) {
        let name = match link {
            l if l.starts_with("socket:") => SOCKETS,
            l if l.starts_with("pipe:") => NAMELESS,
            l => {
                let last = l.rsplit('/').next().unwrap_or(l);
                let last = last.strip_suffix(" (deleted)").unwrap_or(last);
                last.strip_prefix("anon_inode:").unwrap_or(last)
            }
        };
        *self.0.entry(name.to_owned()).or_default() += 1;
        if name.len() >= NAME_LONG {
            *self.0.entry(NAMELESS.to_owned()).or_default() += 1;
        }
    }

    /// Takes the descriptor that a registered file's name may be of; false if none is left.
    fn take(&mut self, registered: &str) -> bool {
        let name = if PROTOCOLS.contains(&registered) { SOCKETS } else { registered };
        let left = self.0.get_mut(name).filter(|left| **left > 0);
        left.map(|left| *left -= 1).is_some()
    }
}

/// Names that kernels before 6.10 give sockets.
const PROTOCOLS: [&str; 17] = [
    "AF_VSOCK",
    "ALG",
    "MPTCP",
    "MPTCPv6",
    "NETLINK",
    "PACKET",
    "PING",
    "PINGv6",
    "RAW",
    "RAWv6",
    "SCTP",
    "TCP",
    "TCPv6",
    "UDP",
    "UDPv6",
    "UNIX",
    "UNIX-STREAM",
];

/// How often an io_uring is asked that somebody uses at that moment, and the time between.
const RING_TRIES: u32 = 10;
const RING_PAUSE: Duration = Duration::from_millis(20);

/// What is registered with an io_uring, as the kernel tells it; nothing where its process has ended. While the ring is in
/// use, the kernel leaves the files out, though not their number, and since Linux 6.16 leaves out everything.
///
/// # Errors
/// If it cannot be read; `None` where the files are left out each time.
fn ring_files(host: &Host, path: &str) -> Result<Option<Vec<String>>, Unreadable> {
    // Since 6.13 empty places are left out as well.
    let empty_is_told = is_kernel_since(host, (6, 17))?;
    for _ in 0..RING_TRIES {
        let text = match host.read(path) {
            Err(e) if e.is_gone() => return Ok(Some(Vec::new())),
            text => text?,
        };
        let mut lines = text.lines().skip_while(|l| !l.starts_with("UserFiles:"));
        let number = lines.next().and_then(|l| l.split_once(':')?.1.trim().parse::<u64>().ok());
        let file = |line: &str| {
            let (place, file) = line.split_once(':')?;
            place.trim().parse::<u64>().ok()?;
            Some(file.trim().to_owned())
        };
        let files: Option<Vec<String>> = lines.take_while(|l| !l.starts_with("UserBufs:")).map(file).collect();
        match (number, files) {
            // A name with a line feed.
            (_, None) => return Ok(None),
            (Some(number), Some(files)) if number == 0 || empty_is_told || !files.is_empty() => return Ok(Some(files)),
            _ if host.is_real() => std::thread::sleep(RING_PAUSE),
            _ => break,
        }
    }
    Ok(None)
}

/// Whether the running kernel has this version or a later one.
pub fn is_kernel_since(host: &Host, version: (u32, u32)) -> Result<bool, Unreadable> {
    let release = host.read_if_there("/proc/sys/kernel/osrelease")?.unwrap_or_default();
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().ok());
    let found = parts.next().flatten().zip(parts.next().flatten());
    Ok(found.is_some_and(|found| found >= version))
}

/// Files registered with an io_uring stay open when their descriptors are closed. The kernel tells their paths, or
/// before Linux 6.10 only the last part of their names. A name proves nothing, so each must be that of a descriptor of the
/// same process, which was looked at, and none may be there more often than descriptors are.
fn registered(
    host: &Host,
    nodes: &Nodes,
    thread: &Thread<'_>,
    fd: &str,
    open: &Names,
    out: &mut Vec<Reason>,
) -> Result<(), Unreadable> {
    let (path, pid) = (format!("{}/fdinfo/{fd}", thread.folder), thread.pid);
    thread.beat.at(&path);
    let mut left = open.clone();
    let Some(files) = ring_files(host, &path)? else {
        let what = format!(
            "process {pid} has an io_uring whose registered files the kernel does not tell; end it, or try again"
        );
        push(out, Reason::new(Check::Unreadable, &path, what));
        return Ok(());
    };
    for file in files.iter().map(String::as_str) {
        let (device, told) = if file.starts_with('/') {
            // As the process sees it, and as we do.
            let inside = host.node(&format!("/proc/{pid}/root{file}")).unwrap_or(None);
            let outside = host.node(file)?;
            let device = [inside, outside].into_iter().flatten().find_map(|n| nodes.device(n));
            (device, inside.or(outside).is_some())
        } else {
            // An empty place; or what the kernels since 6.10 say of what is no file.
            let no_file =
                file == "<none>" || ["socket:[", "pipe:[", "anon_inode:["].iter().any(|s| file.starts_with(s));
            (None, no_file || left.take(file))
        };
        match device.or(nodes.spelled(file)) {
            Some(name) => {
                push(out, Reason::new(Check::Open, &path, format!("process {pid} has /dev/{name} in an io_uring")));
            }
            None if !told => {
                let what = format!(
                    "process {pid} has {file:?} in an io_uring and not in as many descriptors, so it cannot be told; end it"
                );
                push(out, Reason::new(Check::Unreadable, &path, what));
            }
            None => {}
        }
    }
    Ok(())
}

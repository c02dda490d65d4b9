//! Processes that hold a node of a drive: by descriptors of every thread, mappings, io_uring, and
//! descriptors under way in a socket.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

use super::ask::Answer;
use super::host::{Host, Unreadable};
use super::node::{Node, compare_files};
use super::nodes::Nodes;
use super::sysfs::Controller;
use super::{Check, Reason};

/// How long descriptors may be under way, in all sockets together, before they count as stuck.
const UNDER_WAY: Duration = Duration::from_millis(500);
/// Time between two looks at them.
const UNDER_WAY_PAUSE: Duration = Duration::from_millis(50);
/// Most sockets that are looked at again.
const UNDER_WAY_MAX: usize = 256;
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

/// One thread that is looked at.
struct Thread<'a> {
    pid: &'a str,
    /// Its folder in `/proc`.
    folder: String,
}

/// A socket with descriptors under way.
struct Socket {
    pid: String,
    /// What the kernel tells of it.
    path: String,
    /// How many, at the last look.
    number: String,
}

/// Sockets with descriptors under way, as far as they are remembered.
#[derive(Default)]
struct Sockets {
    list: Vec<Socket>,
    /// Whether there were more.
    more: bool,
}

/// Processes by number, sorted as text.
pub fn processes(host: &Host) -> Result<Vec<String>, Unreadable> {
    let mut names = host.must_list("/proc")?;
    names.retain(|n| n.bytes().all(|b| b.is_ascii_digit()));
    Ok(names)
}

/// Folders of a process's threads, the process's own where it has no list of them.
pub fn threads(host: &Host, pid: &str) -> Result<Vec<String>, Unreadable> {
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
    let nodes = Nodes::of(host, controller)?;
    let mut sockets = Sockets::default();
    let search = Search::begin();
    for pid in processes(host)?.iter().filter(|p| **p != own_pid.to_string()) {
        let folders = threads(host, pid)?;
        let (mut tables, mut has_ring) = (Vec::new(), false);
        for folder in &folders {
            search.go_on(host, folder)?;
            let tid = folder.rsplit('/').next().unwrap_or(pid);
            if host.is_real() && is_known(&mut tables, tid) {
                continue;
            }
            has_ring |= descriptors(host, &nodes, &Thread { pid, folder: folder.clone() }, &mut sockets, out)?;
        }
        mapped(host, &nodes, pid, &folders, has_ring, out)?;
    }
    under_way(host, sockets, out)
}

/// Whether a thread has the table of descriptors of one in `tables`, which is in the kernel's order; if not, it joins
/// them. So few comparisons are needed, however many threads have tables of their own.
fn is_known<'a>(tables: &mut Vec<&'a str>, tid: &'a str) -> bool {
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
        Err(at) => tables.insert(at, tid),
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

/// What the descriptors of one thread hold; true if one is an io_uring.
fn descriptors(
    host: &Host,
    nodes: &Nodes,
    thread: &Thread<'_>,
    sockets: &mut Sockets,
    out: &mut Vec<Reason>,
) -> Result<bool, Unreadable> {
    let folder = format!("{}/fd", thread.folder);
    // Paths of what may be a node, and their links.
    let (mut paths, mut links) = (Vec::new(), Vec::new());
    // The last parts of the names of what is open, for rings that tell no more.
    let mut names = Vec::new();
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
        } else if link.starts_with("socket:") {
            look_at_socket(host, thread, &fd, sockets)?;
        } else {
            names.extend(link.rsplit('/').next().map(str::to_owned));
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
    Ok(!rings.is_empty())
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
fn push(out: &mut Vec<Reason>, reason: Reason) {
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
    has_ring: bool,
    out: &mut Vec<Reason>,
) -> Result<(), Unreadable> {
    let mut is_ring = false;
    let tids = threads.iter().filter_map(|folder| folder.rsplit('/').next()).filter(|tid| *tid != pid);
    for tid in std::iter::once(pid).chain(tids) {
        let folder = format!("/proc/{tid}/map_files");
        let ranges = list(host, &folder)?;
        let paths: Vec<String> = ranges.iter().map(|range| format!("{folder}/{range}")).collect();
        is_ring |= paths.iter().any(|path| host.link(path).is_ok_and(|link| link.as_os_str() == RING));
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
    if is_ring && !has_ring {
        let what = format!("process {pid} has an io_uring without a descriptor, whose files cannot be told; end it");
        push(out, Reason::new(Check::Unreadable, &format!("/proc/{pid}/map_files"), what));
    }
    Ok(())
}

/// Files registered with an io_uring stay open when their descriptors are closed. The kernel tells
/// their paths, or before Linux 6.10 only the last part: one that is neither the drive's nor that of a
/// descriptor of the same process cannot be told.
fn registered(
    host: &Host,
    nodes: &Nodes,
    thread: &Thread<'_>,
    fd: &str,
    open: &[String],
    out: &mut Vec<Reason>,
) -> Result<(), Unreadable> {
    let path = format!("{}/fdinfo/{fd}", thread.folder);
    let text = match host.read(&path) {
        Err(e) if e.is_gone() => return Ok(()),
        text => text?,
    };
    let lines = text.lines().skip_while(|l| !l.starts_with("UserFiles:")).skip(1);
    for file in lines.take_while(|l| l.starts_with(' ')).filter_map(|l| l.split_once(": ")).map(|(_, f)| f.trim()) {
        let seen = if file.starts_with('/') {
            let inside = format!("/proc/{}/root{file}", thread.pid);
            let node = match host.node(&inside) {
                Ok(Some(node)) => Some(node),
                _ => host.node(file)?,
            };
            node.map(|n| nodes.device(n))
        } else {
            // Sockets, pipes and the like have no name or one in brackets.
            (file.is_empty() || file.starts_with(['[', '<']) || open.iter().any(|o| o == file)).then_some(None)
        };
        let pid = thread.pid;
        match seen.flatten().or(nodes.spelled(file)) {
            Some(name) => {
                push(out, Reason::new(Check::Open, &path, format!("process {pid} has /dev/{name} in an io_uring")));
            }
            None if seen.is_none() && !is_protocol(file) => {
                let what = format!("process {pid} has {file:?} in an io_uring, which cannot be told; end it");
                push(out, Reason::new(Check::Unreadable, &path, what));
            }
            None => {}
        }
    }
    Ok(())
}

/// Names that older kernels give sockets: TCP, UDP, UNIX-STREAM.
fn is_protocol(name: &str) -> bool {
    name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || matches!(b, b'-' | b'v'))
}

/// Remembers a socket if descriptors are under way in it.
fn look_at_socket(host: &Host, thread: &Thread<'_>, fd: &str, sockets: &mut Sockets) -> Result<(), Unreadable> {
    let path = format!("{}/fdinfo/{fd}", thread.folder);
    let Some(number) = number_under_way(host, &path)? else { return Ok(()) };
    if sockets.list.len() == UNDER_WAY_MAX {
        sockets.more = true;
    } else {
        sockets.list.push(Socket { pid: thread.pid.to_owned(), path, number });
    }
    Ok(())
}

/// How many descriptors were sent through a UNIX socket and not yet received (`scm_fds`, since Linux 5.9), unless none.
fn number_under_way(host: &Host, path: &str) -> Result<Option<String>, Unreadable> {
    let text = match host.read(path) {
        Err(e) if e.is_gone() => return Ok(None),
        text => text?,
    };
    let number = text.lines().find_map(|l| l.strip_prefix("scm_fds:")).map(|n| n.trim().to_owned());
    Ok(number.filter(|n| n != "0"))
}

/// Descriptors under way in a socket are in no process's table, and the kernel tells only their number; ones that stay
/// there are a reason.
fn under_way(host: &Host, mut sockets: Sockets, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let end = Instant::now() + UNDER_WAY;
    while host.is_real() && !sockets.list.is_empty() && !sockets.more && !host.is_stopped() && Instant::now() < end {
        std::thread::sleep(UNDER_WAY_PAUSE);
        for mut socket in std::mem::take(&mut sockets.list) {
            if let Some(number) = number_under_way(host, &socket.path)? {
                socket.number = number;
                sockets.list.push(socket);
            }
        }
    }
    if sockets.more {
        let what = format!("descriptors are under way in more than {UNDER_WAY_MAX} sockets, which cannot be told");
        out.push(Reason::new(Check::Unreadable, "/proc", what));
    }
    for Socket { pid, path, number } in sockets.list {
        let what =
            format!("process {pid} has {number} descriptors under way in a socket, which cannot be told; end it");
        push(out, Reason::new(Check::Unreadable, &path, what));
    }
    Ok(())
}

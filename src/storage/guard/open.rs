//! Processes that hold a node of a drive: by descriptors of every thread, mappings, io_uring, and
//! descriptors under way in a socket.

use std::time::Duration;

use super::host::{Host, Unreadable};
use super::node::{Node, share_files};
use super::nodes::Nodes;
use super::sysfs::Controller;
use super::{Check, Reason};

/// Descriptors under way are looked at this often before they count as stuck.
const UNDER_WAY_LOOKS: u32 = 10;
/// What the link of an io_uring's descriptor says.
const RING: &str = "anon_inode:[io_uring]";
/// Time between two looks.
const UNDER_WAY_PAUSE: Duration = Duration::from_millis(50);

/// One thread that is looked at.
struct Thread<'a> {
    pid: &'a str,
    /// Its folder in `/proc`.
    folder: String,
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
    for pid in processes(host)?.iter().filter(|p| **p != own_pid.to_string()) {
        let folders = threads(host, pid)?;
        let (mut looked, mut has_ring): (Vec<&str>, bool) = (Vec::new(), false);
        for folder in &folders {
            let tid = folder.rsplit('/').next().unwrap_or(pid);
            if host.is_real() && looked.iter().any(|other| share_files(other, tid)) {
                continue;
            }
            looked.push(tid);
            has_ring |= descriptors(host, &nodes, &Thread { pid, folder: folder.clone() }, out)?;
        }
        mapped(host, &nodes, pid, &folders, has_ring, out)?;
    }
    Ok(())
}

/// A list that is empty where its process has ended meanwhile.
fn list(host: &Host, path: &str) -> Result<Vec<String>, Unreadable> {
    match host.list(path) {
        Err(e) if e.is_gone() => Ok(Vec::new()),
        names => names,
    }
}

/// What the descriptors of one thread hold; true if one is an io_uring.
fn descriptors(host: &Host, nodes: &Nodes, thread: &Thread<'_>, out: &mut Vec<Reason>) -> Result<bool, Unreadable> {
    let folder = format!("{}/fd", thread.folder);
    let fds = list(host, &folder)?;
    // The last parts of the names of what is open, for rings that tell no more.
    let mut names = Vec::new();
    let mut rings = Vec::new();
    for fd in fds {
        let path = format!("{folder}/{fd}");
        // No link in a picture: a file that was deleted.
        let link = match host.link(&path) {
            Ok(link) => link.to_string_lossy().into_owned(),
            Err(_) if host.is_real() => continue,
            Err(_) => "a deleted file".into(),
        };
        let by_number = held(host, nodes, &path, &link)?;
        // A name is asked only where there is no number to ask.
        let name = match by_number {
            None if link.starts_with("/dev/") && nodes.look(host, &path)?.is_none() => nodes.spelled(&link),
            name => name,
        };
        if let Some(name) = name {
            let other = if link.ends_with(&format!("/{name}")) { String::new() } else { format!(" as {link}") };
            let what = format!("process {} has /dev/{name} open{other}", thread.pid);
            push(out, Reason::new(Check::Open, &folder, what));
        }
        if link == RING {
            rings.push(fd);
        } else if link.starts_with("socket:") {
            under_way(host, thread, &fd, out)?;
        } else if let Some(last) = link.rsplit('/').next() {
            names.push(last.to_owned());
        }
    }
    for fd in &rings {
        registered(host, nodes, thread, fd, &names, out)?;
    }
    Ok(!rings.is_empty())
}

/// The drive's device that a descriptor or a mapping named `link` leads to.
fn held<'a>(host: &Host, nodes: &'a Nodes, path: &str, link: &str) -> Result<Option<&'a str>, Unreadable> {
    // A server that is gone must not keep us; a device's node lies on no such file system.
    if nodes.is_remote(link) {
        return Ok(None);
    }
    match nodes.at(host, path) {
        Err(e) if e.is_gone() => Ok(None),
        // The folder with the link could be listed, so it is the file's own system that refuses: FUSE
        // of another user does so even to root, and holds no devices.
        Err(e) if e.errno == Some(libc::EACCES) && nix::unistd::geteuid().is_root() => Ok(None),
        name => name,
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
        for range in &ranges {
            let path = format!("{folder}/{range}");
            let link = host.link(&path).map(|l| l.to_string_lossy().into_owned()).unwrap_or_default();
            is_ring |= link == RING;
            if let Some(name) = held(host, nodes, &path, &link)? {
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
        let seen = if nodes.is_remote(file) {
            Some(None)
        } else if file.starts_with('/') {
            let inside = format!("/proc/{}/root{file}", thread.pid);
            let node = host.node(&inside).ok().flatten().or(nodes.look(host, file)?);
            node.map(|n| nodes.name(n).filter(|_| !matches!(n, Node::File(_))))
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

/// Descriptors that were sent through a UNIX socket and not yet received are in no process's table.
/// The kernel tells only how many (`scm_fds`, since Linux 5.9); ones that stay there are a reason.
fn under_way(host: &Host, thread: &Thread<'_>, fd: &str, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let path = format!("{}/fdinfo/{fd}", thread.folder);
    for look in 0..UNDER_WAY_LOOKS {
        let text = match host.read(&path) {
            Err(e) if e.is_gone() => return Ok(()),
            text => text?,
        };
        let number = text.lines().find_map(|l| l.strip_prefix("scm_fds:")).map(|n| n.trim().to_owned());
        match number.as_deref() {
            None | Some("0") => return Ok(()),
            Some(n) if look + 1 == UNDER_WAY_LOOKS || !host.is_real() => {
                let what = format!(
                    "process {} has {n} descriptors under way in a socket, which cannot be told; end it",
                    thread.pid
                );
                push(out, Reason::new(Check::Unreadable, &path, what));
                return Ok(());
            }
            Some(_) => std::thread::sleep(UNDER_WAY_PAUSE),
        }
    }
    Ok(())
}

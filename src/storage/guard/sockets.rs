//! Descriptors under way in UNIX sockets: they are in no process's table, and the kernel tells only how many there are.
//! Those of a connection that nobody has accepted yet belong to no descriptor at all until Linux 6.3 counts them with the
//! socket that listens; before, the connections themselves are looked for.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::host::{Host, Unreadable};
use super::open::{is_kernel_since, push};
use super::{Check, Reason};

/// How long descriptors may be under way, in all sockets together, before they count as stuck.
const UNDER_WAY: Duration = Duration::from_millis(500);
/// Time between two looks at them.
const UNDER_WAY_PAUSE: Duration = Duration::from_millis(50);
/// Most sockets that are looked at again.
const UNDER_WAY_MAX: usize = 256;
/// From this version on a listening socket's `scm_fds` has those of connections that wait.
const LISTENERS_ARE_COUNTED: (u32, u32) = (6, 3);

/// One place where something is under way.
struct Place {
    pid: String,
    /// What the kernel tells of it.
    path: String,
    /// How many, at the last look.
    number: String,
}

/// How many are under way at a place; nothing if none are.
type Count = fn(&Host, &str) -> Result<Option<String>, Unreadable>;

/// What is under way, as far as it is remembered.
pub struct Sockets {
    /// Sockets.
    list: Vec<Place>,
    /// Whether there were more.
    more: bool,
    /// Network namespaces with connections that wait.
    waiting: Vec<Place>,
    /// Network namespaces that were looked at; none where that is not needed.
    networks: Option<HashSet<String>>,
}

impl Sockets {
    /// None yet.
    ///
    /// # Errors
    /// If the kernel's version cannot be read.
    pub fn of(host: &Host) -> Result<Sockets, Unreadable> {
        let counted = is_kernel_since(host, LISTENERS_ARE_COUNTED)?;
        let networks = (!counted).then(HashSet::new);
        Ok(Sockets { list: Vec::new(), more: false, waiting: Vec::new(), networks })
    }

    /// Remembers a socket of process `pid` if descriptors are under way in it, by what the kernel tells at `path`.
    ///
    /// # Errors
    /// If that cannot be read.
    pub fn look_at(&mut self, host: &Host, pid: &str, path: &str) -> Result<(), Unreadable> {
        let Some(number) = under_way(host, path)? else { return Ok(()) };
        if self.list.len() == UNDER_WAY_MAX {
            self.more = true;
        } else {
            self.list.push(Place { pid: pid.to_owned(), path: path.to_owned(), number });
        }
        Ok(())
    }

    /// Remembers the network namespace of a thread if connections wait there that nobody has accepted.
    ///
    /// # Errors
    /// If its sockets cannot be read.
    pub fn look_at_network(&mut self, host: &Host, pid: &str, folder: &str) -> Result<(), Unreadable> {
        let Some(networks) = &mut self.networks else { return Ok(()) };
        let namespace = host.link_name(&format!("{folder}/ns/net"));
        if namespace.as_ref().is_some_and(|namespace| networks.contains(namespace)) {
            return Ok(());
        }
        let path = format!("{folder}/net/unix");
        let number = waiting(host, &path)?;
        // Another thread shows what one that has ended meanwhile does not.
        if host.exists(&path) {
            networks.extend(namespace);
        }
        if let Some(number) = number {
            self.waiting.push(Place { pid: pid.to_owned(), path, number });
        }
        Ok(())
    }

    /// A reason for each place where something stays under way.
    ///
    /// # Errors
    /// If one cannot be read again.
    pub fn judge(mut self, host: &Host, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
        let end = Instant::now() + UNDER_WAY;
        let nothing = |s: &Sockets| s.list.is_empty() && s.waiting.is_empty();
        while host.is_real() && !nothing(&self) && !self.more && !host.is_stopped() && Instant::now() < end {
            std::thread::sleep(UNDER_WAY_PAUSE);
            again(host, &mut self.list, under_way)?;
            again(host, &mut self.waiting, waiting)?;
        }
        if self.more {
            let what = format!("descriptors are under way in more than {UNDER_WAY_MAX} sockets, which cannot be told");
            out.push(Reason::new(Check::Unreadable, "/proc", what));
        }
        for Place { pid, path, number } in self.list {
            let what =
                format!("process {pid} has {number} descriptors under way in a socket, which cannot be told; end it");
            push(out, Reason::new(Check::Unreadable, &path, what));
        }
        for Place { path, number, .. } in self.waiting {
            let what = format!(
                "{number} connections to UNIX sockets wait for a program that does not accept them, and what descriptors are under way in them cannot be told; end that program (`ss -xl` shows it by Recv-Q)"
            );
            push(out, Reason::new(Check::Unreadable, &path, what));
        }
        Ok(())
    }
}

/// Looks at each place once more, and keeps those where something is under way still.
fn again(host: &Host, places: &mut Vec<Place>, count: Count) -> Result<(), Unreadable> {
    for mut place in std::mem::take(places) {
        if let Some(number) = count(host, &place.path)? {
            place.number = number;
            places.push(place);
        }
    }
    Ok(())
}

/// How many descriptors were sent through a UNIX socket and not yet received (`scm_fds`, since Linux 5.9), unless none.
fn under_way(host: &Host, path: &str) -> Result<Option<String>, Unreadable> {
    let text = match host.read(path) {
        Err(e) if e.is_gone() => return Ok(None),
        text => text?,
    };
    let number = text.lines().find_map(|l| l.strip_prefix("scm_fds:")).map(|n| n.trim().to_owned());
    Ok(number.filter(|n| n != "0"))
}

/// How many connections wait to be accepted, by a list of UNIX sockets: such a one is connecting (02) and has no inode, since
/// it is no file yet.
fn waiting(host: &Host, path: &str) -> Result<Option<String>, Unreadable> {
    let text = match host.read(path) {
        // The thread has ended, or the kernel has no UNIX sockets.
        Err(e) if e.is_gone() || e.kind == std::io::ErrorKind::InvalidInput => return Ok(None),
        text => text?,
    };
    // "Num: RefCount Protocol Flags Type St Inode Path"
    let is_waiting = |line: &&str| {
        let mut words = line.split_whitespace().skip(5);
        words.next() == Some("02") && words.next() == Some("0")
    };
    let number = text.lines().skip(1).filter(is_waiting).count();
    Ok((number > 0).then(|| number.to_string()))
}

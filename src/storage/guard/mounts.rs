//! What is mounted or swapped to, in every mount namespace that a thread lives in.

use std::path::Path;

use super::host::{Host, Unreadable};
use super::node::Number;
use super::nodes::{Nodes, Target};
use super::open::{Search, each_process, each_thread};
use super::sysfs::Controller;
use super::words::octal;
use super::{Check, Reason};

/// File systems that list the devices they are mounted on in `/sys/fs/KIND/DEVICE`, also where the
/// mount itself is in no tree of mounts any more.
const LISTED: [&str; 7] = ["ext4", "xfs", "f2fs", "nilfs2", "jfs", "erofs", "gfs2"];

/// One line of a mountinfo file.
#[derive(Debug, PartialEq, Eq)]
pub struct Mount<'a> {
    /// Device of the file system, `major:minor`.
    pub number: &'a str,
    /// Where it is mounted.
    pub place: String,
    /// File system.
    pub kind: &'a str,
    /// What was mounted.
    pub source: String,
    /// Options of the mount, then of the file system.
    pub options: String,
}

/// Takes a line apart; escapes are undone.
pub fn parse(line: &str) -> Option<Mount<'_>> {
    let (head, tail) = line.split_once(" - ")?;
    let mut head = head.split(' ').skip(2);
    let mut tail = tail.split(' ');
    let (number, place) = (head.next()?, octal(head.nth(1)?));
    let own = head.next().unwrap_or("");
    let (kind, source) = (tail.next()?, octal(tail.next()?));
    Some(Mount { number, place, kind, source, options: format!("{own},{}", octal(tail.next().unwrap_or(""))) })
}

/// Mounts of any thread on one of the controller's devices.
pub fn mounted(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let nodes = Nodes::of(host, controller)?;
    let mut seen = Vec::new();
    let own = "/proc/self/mountinfo";
    let virtuals = virtual_kinds(host)?;
    let look = Look { host, controller, nodes: &nodes, virtuals: &virtuals };
    look.each("/proc/self", &host.read(own)?, &mut seen, out)?;
    let mut namespaces = std::collections::HashSet::new();
    let search = Search::begin();
    each_process(host, |pid| {
        each_thread(host, pid, |folder| {
            search.go_on(host, folder)?;
            // Threads of one namespace see the same mounts.
            if let Some(namespace) = host.link_name(&format!("{folder}/ns/mnt"))
                && !namespaces.insert(namespace)
            {
                return Ok(());
            }
            match host.read(&format!("{folder}/mountinfo")) {
                Ok(text) => look.each(folder, &text, &mut seen, out),
                // It has ended meanwhile, or has no mounts of its own any more.
                Err(e) if e.is_gone() || e.kind == std::io::ErrorKind::InvalidInput => Ok(()),
                Err(e) => Err(e),
            }
        })
    })?;
    for kind in LISTED {
        let folder = format!("/sys/fs/{kind}");
        for device in host.list(&folder)?.iter().filter(|d| controller.owns(d)) {
            if !seen.iter().any(|(d, _)| d == device) {
                let what = format!("{device} carries a mounted {kind} that no mount namespace in use shows");
                out.push(Reason::new(Check::Mounted, &folder, what));
            }
        }
    }
    Ok(())
}

/// What mounts are looked at for.
struct Look<'a> {
    host: &'a Host,
    controller: &'a Controller,
    nodes: &'a Nodes,
    /// Kinds of file systems that stand on no block device.
    virtuals: &'a [String],
}

impl Look<'_> {
    /// The mounts in one file, of those not `seen` yet as device and place.
    fn each(
        &self,
        folder: &str,
        text: &str,
        seen: &mut Vec<(String, String)>,
        out: &mut Vec<Reason>,
    ) -> Result<(), Unreadable> {
        let path = format!("{folder}/mountinfo");
        for mount in text.lines().filter_map(parse) {
            for (device, how) in self.devices(folder, &mount)? {
                let found = (device.clone(), mount.place.clone());
                if seen.contains(&found) {
                    continue;
                }
                seen.push(found);
                let check = if is_system(&mount.place) { Check::Boot } else { Check::Mounted };
                out.push(Reason::new(check, &path, format!("{device} is {how} at {}", mount.place)));
            }
        }
        Ok(())
    }

    /// The controller's devices that a mount uses, and how: by number, by its source (several in
    /// bcachefs), by an option that names a log or another device of it.
    fn devices(&self, folder: &str, mount: &Mount<'_>) -> Result<Vec<(String, &'static str)>, Unreadable> {
        let mut found = Vec::new();
        if let Some(name) = mount.number.parse::<Number>().ok().and_then(|n| self.nodes.block(n)) {
            found.push((name.to_owned(), "mounted"));
        }
        // Words of whoever mounted it, who may be any user in a namespace of his own. Who serves one from a drive has
        // that open.
        let kind = mount.kind.split('.').next().unwrap_or(mount.kind);
        if self.virtuals.iter().any(|v| v == kind) {
            return Ok(found);
        }
        let options = mount.options.split(',').filter_map(|o| o.split_once('=')).map(|(_, value)| value);
        let named = mount.source.split(':').chain([mount.source.as_str()]).map(|s| (s, "mounted"));
        for (path, how) in named.chain(options.map(|o| (o, "in use by the file system"))) {
            if !path.starts_with('/') {
                continue;
            }
            let inside = self.host.node(&format!("{folder}/root{path}")).ok().flatten();
            let name = match inside.and_then(|n| self.nodes.device(n)) {
                Some(name) => Some(name.to_owned()),
                None => match self.nodes.target(self.host, self.controller, path)? {
                    Target::Ours(name) => Some(name),
                    _ => None,
                },
            };
            found.extend(name.map(|name| (name, how)));
        }
        found.dedup_by(|a, b| a.0 == b.0);
        Ok(found)
    }
}

/// File systems that stand on no block device, by the kernel's word.
fn virtual_kinds(host: &Host) -> Result<Vec<String>, Unreadable> {
    let text = host.read_if_there("/proc/filesystems")?.unwrap_or_default();
    Ok(text.lines().filter_map(|l| l.strip_prefix("nodev")).map(|l| l.trim().to_owned()).collect())
}

fn is_system(place: &str) -> bool {
    matches!(place, "/" | "/boot" | "/boot/efi" | "/efi" | "/usr" | "/var" | "/home")
}

/// Swap on the controller's devices, hibernation to them.
pub fn swap(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let nodes = Nodes::of(host, controller)?;
    let swaps = "/proc/swaps";
    for line in host.read_if_there(swaps)?.unwrap_or_default().lines().skip(1) {
        let mut words = line.split_whitespace();
        let (path, kind) = (octal(words.next().unwrap_or("")), words.next().unwrap_or(""));
        match nodes.target(host, controller, &path)? {
            Target::Ours(name) => out.push(Reason::new(Check::Swap, swaps, format!("{name} is used as swap ({path})"))),
            Target::Gone if kind == "partition" => {
                let what = format!("the swap device {path} is not there any more, so it cannot be told");
                out.push(Reason::new(Check::Unreadable, swaps, what));
            }
            _ => {}
        }
    }
    let resume = "/sys/power/resume";
    let number = host.read_if_there(resume)?.and_then(|n| n.parse().ok());
    if let Some(name) = number.and_then(|n| nodes.block(n)) {
        out.push(Reason::new(Check::Swap, resume, format!("the machine hibernates to {name}")));
    }
    for name in host.must_list("/sys/block")?.iter().filter(|n| n.starts_with("zram")) {
        let path = format!("/sys/block/{name}/backing_dev");
        let Some(backing) = host.read_if_there(&path)?.filter(|b| b.starts_with('/')) else { continue };
        match nodes.target(host, controller, &backing)? {
            Target::Ours(device) => out.push(Reason::new(Check::Swap, &path, format!("{device} backs {name}"))),
            Target::Gone => {
                let what = format!("{backing}, which backs {name}, is not there any more, so it cannot be told");
                out.push(Reason::new(Check::Unreadable, &path, what));
            }
            Target::Other => {}
        }
    }
    Ok(())
}

/// The controller's device that carries the file system on which `path` lies.
pub fn below(host: &Host, controller: &Controller, path: &str) -> Result<Option<String>, Unreadable> {
    let text = host.read("/proc/self/mountinfo")?;
    let over = text.lines().filter_map(parse).filter(|m| Path::new(path).starts_with(&m.place));
    // Of several mounts at one place, the last is the one that is seen.
    let mount = over.max_by_key(|m| m.place.len());
    Ok(mount.and_then(|m| controller.devices().find(|d| d.number == m.number)).map(|d| d.name.clone()))
}

//! The device numbers of one controller's nodes, and what a path means for it.

use std::path::Path;

use super::host::{Host, Unreadable};
use super::mounts;
use super::node::{Node, Number};
use super::sysfs::Controller;
use super::{Check, Reason};

/// Every node that leads to a controller: namespaces, partitions, nodes for commands.
#[derive(Debug, Clone)]
pub struct Nodes {
    list: Vec<(Node, String)>,
    /// Where file systems are mounted that ask a server or a program.
    remote: Vec<String>,
}

/// File systems that ask a server or a program, which may take long to answer.
const REMOTE: [&str; 13] =
    ["9p", "afs", "autofs", "ceph", "cifs", "fuse", "fuseblk", "gfs2", "lustre", "nfs", "nfs4", "smb3", "virtiofs"];

/// Where a path leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// To this device of the controller, or to a file on it.
    Ours(String),
    /// To something else.
    Other,
    /// To nothing that can be seen from here.
    Gone,
}

impl Nodes {
    /// The nodes of `controller` by sysfs.
    pub fn of(host: &Host, controller: &Controller) -> Result<Self, Unreadable> {
        let mut list = Vec::new();
        for device in controller.devices() {
            let path = format!("/sys/class/block/{}/dev", device.name);
            list.push((Node::Block(number(&device.number, &path)?), device.name.clone()));
        }
        let mut commands: Vec<(String, String)> = Vec::new();
        for name in host.list("/sys/class/nvme-generic")? {
            if name.strip_prefix("ng").is_some_and(|rest| controller.owns(&format!("nvme{rest}"))) {
                commands.push((format!("/sys/class/nvme-generic/{name}/dev"), name));
            }
        }
        if let Some(name) = &controller.name {
            commands.push((format!("/sys/class/nvme/{name}/dev"), name.clone()));
        }
        for (path, name) in commands {
            if let Some(text) = host.read_if_there(&path)? {
                list.push((Node::Char(number(&text, &path)?), name));
            }
        }
        let mounts = host.read("/proc/self/mountinfo")?;
        let is_remote = |kind: &str| REMOTE.contains(&kind) || kind.starts_with("fuse.");
        let remote = mounts.lines().filter_map(mounts::parse).filter(|m| is_remote(m.kind) && m.place != "/");
        Ok(Self { list, remote: remote.map(|m| m.place).collect() })
    }

    /// Each node of the controller must have the number that sysfs tells: whatever is read or written by a name
    /// below `/dev` would be another drive's else. Nodes for commands need not be there.
    pub fn are_right(&self, host: &Host, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
        for (expected, name) in &self.list {
            let path = format!("/dev/{name}");
            let fail = |e: &std::io::Error| Reason::new(Check::Unreadable, &path, e.to_string());
            match host.node(&path)? {
                Some(found) => out.extend(expected.must_be(&path, found).err().map(|e| fail(&e))),
                None if matches!(expected, Node::Char(_)) => {}
                None => out.push(Reason::new(Check::Unreadable, &path, "there is no such node".into())),
            }
        }
        Ok(())
    }

    /// What the word `path` of a table leads to; nothing on file systems that ask a server, where no table of this
    /// machine has its devices, and where looking would mount or wait.
    fn look(&self, host: &Host, path: &str) -> Result<Option<Node>, Unreadable> {
        let is_remote = self.remote.iter().any(|place| Path::new(path).starts_with(place));
        if is_remote { Ok(None) } else { host.node(path) }
    }

    /// The device whose node this is; files on it do not count.
    pub fn device(&self, node: Node) -> Option<&str> {
        self.name(node).filter(|_| !matches!(node, Node::File(_)))
    }

    /// The device with this node, or, for a file, the device it lies on.
    pub fn name(&self, node: Node) -> Option<&str> {
        let node = match node {
            Node::File(on) => Node::Block(on?),
            node => node,
        };
        self.list.iter().find(|(n, _)| *n == node).map(|(_, name)| name.as_str())
    }

    /// The block device with this number.
    pub fn block(&self, number: Number) -> Option<&str> {
        self.name(Node::Block(number))
    }

    /// The device whose node the word `path` of a table is; files on it do not count.
    pub fn at(&self, host: &Host, path: &str) -> Result<Option<&str>, Unreadable> {
        Ok(self.look(host, path)?.and_then(|n| self.device(n)))
    }

    /// The name of a node below `/dev`, or alone, that is this controller's by its spelling.
    pub fn spelled(&self, path: &str) -> Option<&str> {
        let name = path.strip_prefix("/dev/").unwrap_or(path).trim_start_matches('/');
        self.list.iter().find(|(_, n)| n == name).map(|(_, name)| name.as_str())
    }

    /// Where `path` leads: by its number, and where nothing is there any more, by its spelling and by
    /// the mount it would lie on.
    pub fn target(&self, host: &Host, controller: &Controller, path: &str) -> Result<Target, Unreadable> {
        // What has the name of a deleted file now is another one.
        let deleted = path.strip_suffix(" (deleted)");
        let ours = |name: &str| Target::Ours(name.to_owned());
        let found = if deleted.is_some() { None } else { host.node(path)? };
        let path = deleted.unwrap_or(path);
        Ok(match found {
            Some(node) if self.name(node).is_some() => ours(self.name(node).unwrap_or_default()),
            Some(Node::Block(_) | Node::Char(_)) => Target::Other,
            _ => match self.spelled(path).map(str::to_owned).or(mounts::below(host, controller, path)?) {
                Some(name) => Target::Ours(name),
                None if found.is_some() => Target::Other,
                None => Target::Gone,
            },
        })
    }
}

/// A device number that sysfs tells.
pub fn number(text: &str, path: &str) -> Result<Number, Unreadable> {
    text.parse().map_err(|()| Unreadable::new(path, format!("a device number was expected, {text:?} was found")))
}

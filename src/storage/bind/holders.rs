//! Processes that have a VFIO group open, by the device number of the node and not by its name.

use std::path::Path;

use super::super::guard::node::Node;
use super::super::guard::{Check, Host, Reason};

/// Each process that has `node` open, as a reason against a release. Processes that cannot be seen are not
/// among them: the kernel's EBUSY tells of those. Nor are those whose files lie with a server that does not answer, for
/// whom nobody waits.
pub(super) fn of(host: &Host, node: &str) -> Vec<Reason> {
    let Ok(Some(wanted @ (Node::Char(_) | Node::Block(_)))) = host.node(node) else { return Vec::new() };
    let mut out = Vec::new();
    for pid in processes(host) {
        // Threads may have tables of their own.
        let tasks = host.list(&format!("/proc/{pid}/task")).unwrap_or_default();
        let mut tables = tasks.iter().map(|t| format!("/proc/{pid}/task/{t}/fd")).chain([format!("/proc/{pid}/fd")]);
        let Some(path) = tables.find_map(|table| open_in(host, &table, wanted)) else { continue };
        out.push(Reason::new(Check::Open, &path, format!("process {pid}{} uses it", name(host, &pid))));
    }
    out
}

/// The descriptor of a table that is of the node. Pipes and the like have no path, and are not asked.
fn open_in(host: &Host, table: &str, wanted: Node) -> Option<String> {
    let all = host.list(table).unwrap_or_default().into_iter().map(|fd| format!("{table}/{fd}"));
    let open: Vec<String> = all.filter(|fd| host.link(fd).is_ok_and(|link| link.is_absolute())).collect();
    let answers = host.nodes(&open).unwrap_or_default();
    open.into_iter().zip(answers).find(|(_, answer)| *answer == Ok(Some(wanted))).map(|(fd, _)| fd)
}

/// Processes that have any VFIO device open, for a sentence on who may be meant.
pub(super) fn of_devices(host: &Host) -> Vec<String> {
    let has = |pid: &String| {
        let table = format!("/proc/{pid}/fd");
        let is = |fd: &String| {
            let target = host.link(&format!("{table}/{fd}"));
            target.is_ok_and(|t| t.as_path() == Path::new("anon_inode:[vfio-device]"))
        };
        host.list(&table).unwrap_or_default().iter().any(is)
    };
    processes(host).filter(has).map(|pid| format!("process {pid}{}", name(host, &pid))).collect()
}

fn processes(host: &Host) -> impl Iterator<Item = String> {
    host.list("/proc").unwrap_or_default().into_iter().filter(|p| p.bytes().all(|b| b.is_ascii_digit()))
}

/// What a process calls itself, in brackets: any bytes that it likes, so none may end the line.
fn name(host: &Host, pid: &str) -> String {
    host.read(&format!("/proc/{pid}/comm")).map_or(String::new(), |name| format!(" ({})", name.escape_debug()))
}

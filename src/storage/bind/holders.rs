//! Processes that have a VFIO group open, by the device number of the node and not by its name.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::super::guard::{Check, Host, Reason};

/// Each process that has `node` open, as a reason against a release. Processes that cannot be seen are not
/// among them: the kernel's EBUSY tells of those.
pub(super) fn of(host: &Host, node: &str) -> Vec<Reason> {
    let Ok(wanted) = host.real(node).metadata() else { return Vec::new() };
    let mut out = Vec::new();
    for pid in host.list("/proc").unwrap_or_default() {
        if !pid.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        // Threads may have tables of their own.
        let tasks = host.list(&format!("/proc/{pid}/task")).unwrap_or_default();
        let tables = tasks.iter().map(|t| format!("/proc/{pid}/task/{t}/fd")).chain([format!("/proc/{pid}/fd")]);
        let open =
            tables.flat_map(|t| host.list(&t).unwrap_or_default().into_iter().map(move |fd| format!("{t}/{fd}")));
        let Some(path) = open.into_iter().find(|fd| has(host, fd, &wanted)) else { continue };
        let name = host.read(&format!("/proc/{pid}/comm")).map_or(String::new(), |n| format!(" ({n})"));
        out.push(Reason::new(Check::Open, &path, format!("process {pid}{name} uses it")));
    }
    out
}

/// Whether a descriptor is of the node; or of a VFIO device, of which it cannot be told which.
fn has(host: &Host, fd: &str, wanted: &Metadata) -> bool {
    host.real(fd).metadata().is_ok_and(|found| same(&found, wanted))
}

fn same(a: &Metadata, b: &Metadata) -> bool {
    let device = |m: &Metadata| m.file_type().is_char_device() || m.file_type().is_block_device();
    if device(a) && device(b) {
        return a.file_type() == b.file_type() && a.rdev() == b.rdev();
    }
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// Processes that have any VFIO device open, for a sentence on who may be meant.
pub(super) fn of_devices(host: &Host) -> Vec<String> {
    let mut out = Vec::new();
    for pid in host.list("/proc").unwrap_or_default().into_iter().filter(|p| p.bytes().all(|b| b.is_ascii_digit())) {
        let table = format!("/proc/{pid}/fd");
        let is = |fd: &String| {
            let target = host.link(&format!("{table}/{fd}"));
            target.is_ok_and(|t| t.as_path() == Path::new("anon_inode:[vfio-device]"))
        };
        if host.list(&table).unwrap_or_default().iter().any(is) {
            let name = host.read(&format!("/proc/{pid}/comm")).unwrap_or_default();
            out.push(format!("process {pid} ({name})"));
        }
    }
    out
}

//! The names that a drive's devices go by: nodes, links below `/dev/disk`, tags as in `/etc/fstab`,
//! and the files that lie on them.

use std::path::Path;

use super::host::{Host, Unreadable};
use super::mounts;
use super::sysfs::Controller;

/// Folders of `/dev/disk` and the tag that their names carry in tables, if any.
const LINKS: [(&str, &str); 6] = [
    ("by-uuid", "UUID"),
    ("by-partuuid", "PARTUUID"),
    ("by-label", "LABEL"),
    ("by-partlabel", "PARTLABEL"),
    ("by-id", "ID"),
    ("by-path", ""),
];

/// A word that means one of a controller's devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// The word as tables have it: a path below `/dev`, or `UUID=…`.
    pub word: String,
    /// The device's kernel name.
    pub device: String,
}

/// Every name of the controller's devices.
pub fn names(host: &Host, controller: &Controller) -> Result<Vec<Name>, Unreadable> {
    let name = |word: String, device: &str| Name { word, device: device.to_owned() };
    let mut found: Vec<Name> = controller.devices().map(|d| name(format!("/dev/{}", d.name), &d.name)).collect();
    for (folder, tag) in LINKS {
        let base = format!("/dev/disk/{folder}");
        for link in host.list(&base)? {
            let Some(device) = host.link_name(&format!("{base}/{link}")).filter(|d| controller.owns(d)) else {
                continue;
            };
            found.push(name(format!("{base}/{link}"), &device));
            if !tag.is_empty() {
                found.push(name(format!("{tag}={link}"), &device));
            }
        }
    }
    Ok(found)
}

/// The device that `path` leads to: itself, through links, or the file system it lies on.
pub fn target(host: &Host, controller: &Controller, path: &str) -> Result<Option<String>, Unreadable> {
    let last = |p: &Path| p.file_name().map(|n| n.to_string_lossy().into_owned());
    let ways = [last(Path::new(path)), host.link_name(path), host.resolve(path).ok().and_then(|p| last(&p))];
    match ways.into_iter().flatten().find(|n| controller.owns(n)) {
        Some(device) => Ok(Some(device)),
        None => mounts::below(host, controller, path),
    }
}

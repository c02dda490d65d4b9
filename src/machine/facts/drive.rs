//! Drives: model, queue limits, link, what is mounted from them.

use serde::Serialize;

use super::pci::{Link, behind_chipset, link};
use super::{number, text};
use crate::storage::guard::Host;

/// A block device that is a drive.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Drive {
    /// Kernel name.
    pub name: String,
    /// Model.
    pub model: Option<String>,
    /// Bytes.
    pub size: Option<u64>,
    /// Whether it turns.
    pub rotational: Option<bool>,
    /// The scheduler in use.
    pub scheduler: Option<String>,
    /// Requests that its queue holds.
    pub queue_requests: Option<u64>,
    /// Bytes of one request at most; longer reads are split.
    pub max_request: Option<u64>,
    /// Bytes of a logical block.
    pub logical_block: Option<u64>,
    /// PCI address of its controller.
    pub pci: Option<String>,
    /// That controller's link.
    pub link: Link,
    /// Whether it hangs on the chipset, whose one link to the processor it shares with the other devices
    /// there; null where that cannot be told from the bus.
    pub behind_chipset: Option<bool>,
    /// File systems mounted from it or its partitions.
    pub mounts: Vec<Mount>,
}

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Mount {
    /// Where.
    pub at: String,
    /// Its kind.
    pub file_system: String,
}

/// Block devices that are drives, by name: no loop, RAM or compressed-RAM devices.
pub(super) fn drives(host: &Host) -> Vec<Drive> {
    let all = host.list("/sys/block").unwrap_or_default().into_iter();
    all.filter(|n| !["loop", "ram", "zram"].iter().any(|k| n.starts_with(k))).map(|n| drive(host, n)).collect()
}

fn drive(host: &Host, name: String) -> Drive {
    let base = format!("/sys/block/{name}");
    let queue = |file: &str| number::<u64>(host, &format!("{base}/queue/{file}"));
    let pci = controller(host, &base);
    Drive {
        model: text(host, &format!("{base}/device/model")),
        size: number::<u64>(host, &format!("{base}/size")).and_then(|s| s.checked_mul(512)),
        rotational: queue("rotational").map(|r| r != 0),
        scheduler: text(host, &format!("{base}/queue/scheduler")).map(|t| chosen(&t).to_owned()),
        queue_requests: queue("nr_requests"),
        max_request: queue("max_sectors_kb").and_then(|k| k.checked_mul(1024)),
        logical_block: queue("logical_block_size"),
        link: pci.as_ref().map_or(Link::default(), |p| link(host, &format!("/sys/bus/pci/devices/{p}"))),
        behind_chipset: pci.as_ref().and_then(|p| behind_chipset(host, p)),
        pci,
        mounts: mounts(host, &name),
        name,
    }
}

/// The word in brackets, or all of it.
fn chosen(text: &str) -> &str {
    let inner = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    inner.map_or(text, |(word, _)| word)
}

/// The nearest PCI function above the device: the last component of its path that is an address.
fn controller(host: &Host, base: &str) -> Option<String> {
    let path = host.resolve(base).ok()?;
    let mut names = path.components().rev().map(|c| c.as_os_str().to_string_lossy().into_owned());
    names.find(|n| is_address(n))
}

/// `0000:02:00.0`.
fn is_address(name: &str) -> bool {
    let hex = |s: &str, n: usize| s.len() == n && s.bytes().all(|b| b.is_ascii_hexdigit());
    let mut parts = name.split([':', '.']);
    [4, 2, 2, 1].iter().all(|&n| parts.next().is_some_and(|p| hex(p, n))) && parts.next().is_none()
}

fn mounts(host: &Host, name: &str) -> Vec<Mount> {
    let base = format!("/sys/block/{name}");
    let own = std::iter::once((name.to_owned(), base.clone())).chain(
        host.list(&base)
            .unwrap_or_default()
            .into_iter()
            .filter(|n| n.starts_with(name))
            .map(|n| (n.clone(), format!("{base}/{n}"))),
    );
    let own: Vec<(String, Option<String>)> =
        own.map(|(n, folder)| (format!("/dev/{n}"), text(host, &format!("{folder}/dev")))).collect();
    let table = host.read("/proc/self/mountinfo").unwrap_or_default();
    let mut found: Vec<Mount> = Vec::new();
    for line in table.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let (left, right): (Vec<_>, Vec<_>) = (left.split(' ').collect(), right.split(' ').collect());
        let (Some(number), Some(at), Some(kind), Some(source)) =
            (left.get(2), left.get(4), right.first(), right.get(1))
        else {
            continue;
        };
        // By number, and by name for file systems (btrfs) whose number is not the device's.
        let here = own.iter().any(|(node, n)| n.as_deref() == Some(number) || node == source);
        let mount = Mount { at: at.replace("\\040", " "), file_system: (*kind).to_owned() };
        if here && !found.contains(&mount) {
            found.push(mount);
        }
    }
    found
}

//! What the machine boots or runs from, whatever the allowlist says of the drive's contents.

use std::ops::Range;

use super::host::{Host, Unreadable};
use super::partitions::{Bytes, Tables};
use super::signatures::Place;
use super::sysfs::{Controller, Namespace};
use super::{Check, Reason, mounts, superblocks};

/// A node as bytes.
struct Device<'a> {
    host: &'a Host,
    path: String,
    size: u64,
}

impl Bytes for Device<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn get(&mut self, at: u64, len: usize) -> Result<Vec<u8>, Unreadable> {
        match i64::try_from(at) {
            Ok(at) if at as u64 <= self.size => self.host.read_at(&self.path, at, len),
            _ => Ok(Vec::new()),
        }
    }
}

/// The node of a namespace, and each partition that a table there describes and the kernel does not show as it is there:
/// one of a table in other blocks than the drive's, of a backup or a moved table, or one that the kernel was told to
/// forget. With each, whether its place is certain.
pub fn unshown<'a>(namespace: &'a Namespace, tables: &Tables) -> Vec<(Place<'a>, bool)> {
    let device = &namespace.whole;
    let shown = |p: &Range<u64>| namespace.partitions.iter().any(|k| k.start == p.start && k.size == p.end - p.start);
    let mut found: Vec<(Place<'_>, bool)> = Vec::new();
    for partition in &tables.partitions {
        let part = partition.start..partition.start.saturating_add(partition.size).min(device.size);
        if part.is_empty() || shown(&part) {
            continue;
        }
        let place = Place { device, part: Some(part) };
        match found.iter_mut().find(|(other, _)| *other == place) {
            Some((_, certain)) => *certain |= partition.certain,
            None => found.push((place, partition.certain)),
        }
    }
    found
}

/// Whether a table of a namespace describes partitions; false where it cannot be read.
pub fn has_partitions(host: &Host, namespace: &Namespace) -> bool {
    tables(host, namespace).is_ok_and(|t| t.partitions.iter().any(|p| p.certain && p.size > 0))
}

/// The partition tables of a namespace.
pub fn tables(host: &Host, namespace: &Namespace) -> Result<Tables, Unreadable> {
    let path = format!("/dev/{}", namespace.whole.name);
    let mut device = Device { host, path, size: namespace.whole.size };
    super::partitions::read(&mut device, namespace.block_size.into())
}

/// Partitions and loaders that a firmware boots from, and partitions that no table explains.
pub fn partitions(host: &Host, namespace: &Namespace, tables: &Tables, out: &mut Vec<Reason>) {
    let name = &namespace.whole.name;
    let path = format!("/dev/{name}");
    let mut boots: Vec<&str> = tables.partitions.iter().filter_map(|p| p.boot.as_deref()).collect();
    boots.sort_unstable();
    boots.dedup();
    out.extend(boots.into_iter().map(|what| Reason::new(Check::Boot, &path, format!("{name} has {what}"))));
    if let Some(loader) = tables.loader {
        out.push(Reason::new(Check::Boot, &path, format!("{name} has the boot loader {loader} in its first sector")));
    }
    if let Some(why) = &tables.too_large {
        let cure = format!("if nothing there is needed, clear them first (`wipefs --all {path}`)");
        out.push(Reason::new(Check::Unreadable, &path, format!("{why}, more than nt reads; {cure}")));
    }
    for partition in &namespace.partitions {
        if !tables.partitions.iter().any(|p| p.start == partition.start) {
            let what = format!(
                "the kernel shows {} from byte {}, which no partition table there that nt can read describes; if the table is gone, have the kernel look again (`blockdev --rereadpt {path}`)",
                partition.name, partition.start
            );
            out.push(Reason::new(Check::Unreadable, &format!("/sys/class/block/{}/start", partition.name), what));
        }
    }
    for kind in super::opinions::boot_types(host, namespace) {
        out.push(Reason::new(Check::Boot, &kind.path, format!("{} is, by udev's word, {}", kind.device, kind.what)));
    }
}

/// A hibernated system that waits on a device: starting it again would write to what it had mounted.
pub fn hibernated(
    host: &Host,
    namespace: &Namespace,
    tables: &Tables,
    out: &mut Vec<Reason>,
) -> Result<(), Unreadable> {
    let shown = namespace.devices().map(|device| Place { device, part: None });
    for place in shown.chain(unshown(namespace, tables).into_iter().map(|(place, _)| place)) {
        if superblocks::hibernated(&place.read(host, 0, 64 << 10)?) {
            let what = format!("a hibernated system waits on {}", place.device.name);
            out.push(Reason::new(Check::Swap, &place.path(), what));
        }
    }
    Ok(())
}

/// The devices below `/`, down to the lowest. A root that cannot be followed is a refusal; one that is
/// no block device (memory, network) is not, and btrfs and ZFS are looked for elsewhere.
pub fn root(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let path = "/proc/self/mountinfo";
    let text = host.read(path)?;
    let fail = |why: String| Unreadable::new(path, why);
    let mount = text.lines().filter_map(mounts::parse).rfind(|m| m.place == "/");
    let mount = mount.ok_or_else(|| fail("no mount at / is listed there".into()))?;
    if mount.number.starts_with("0:") {
        return Ok(());
    }
    let mut open = Vec::new();
    for name in host.list("/sys/class/block")? {
        if host.read_if_there(&format!("/sys/class/block/{name}/dev"))?.as_deref() == Some(mount.number) {
            open.push(name);
        }
    }
    if open.is_empty() {
        return Err(fail(format!("the device {} of / is not among those of /sys/class/block", mount.number)));
    }
    let mut seen = open.clone();
    while let Some(name) = open.pop() {
        if controller.owns(&name) {
            out.push(Reason::new(Check::Boot, path, format!("/ stands on {name}")));
        }
        for lower in host.list(&format!("/sys/class/block/{name}/slaves"))? {
            if !seen.contains(&lower) {
                seen.push(lower.clone());
                open.push(lower);
            }
        }
    }
    Ok(())
}

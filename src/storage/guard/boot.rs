//! What the machine boots or runs from, whatever the allowlist says of the drive's contents.

use super::host::{Host, Unreadable};
use super::partitions::{Bytes, Tables};
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
pub fn hibernated(host: &Host, namespace: &Namespace, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    for device in namespace.devices() {
        let path = format!("/dev/{}", device.name);
        if superblocks::hibernated(&host.read_at(&path, 0, 64 << 10)?) {
            out.push(Reason::new(Check::Swap, &path, format!("a hibernated system waits on {}", device.name)));
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

//! What stands on a block device: device mapper, MD, bcache, loop devices, btrfs, ZFS.

use super::host::{Host, Unreadable};
use super::sysfs::{BlockDevice, Controller};
use super::{Check, Reason, names, signatures};

/// A cache of pools is a few KiB; more than this is not looked through.
const CACHE_MAX: usize = 16 << 20;

/// Holders of `device`, all the way up, each with what it is.
pub fn holders(host: &Host, device: &BlockDevice, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let mut open = vec![device.name.clone()];
    let mut seen = open.clone();
    while let Some(lower) = open.pop() {
        let path = format!("/sys/class/block/{lower}/holders");
        if !host.exists(&path) {
            return Err(Unreadable { path: path.into(), why: "there is no such folder".into() });
        }
        for holder in host.list(&path)? {
            if seen.contains(&holder) {
                continue;
            }
            let kind = kind(host, &holder)?;
            out.push(Reason::new(Check::Stacked, &path, format!("{} carries {holder} ({kind})", device.name)));
            seen.push(holder.clone());
            open.push(holder);
        }
    }
    let slaves = format!("/sys/class/block/{}/slaves", device.name);
    for slave in host.list(&slaves)? {
        out.push(Reason::new(Check::Stacked, &slaves, format!("{} stands on {slave}", device.name)));
    }
    Ok(())
}

fn kind(host: &Host, holder: &str) -> Result<String, Unreadable> {
    let base = format!("/sys/class/block/{holder}");
    if let Some(uuid) = host.read_if_there(&format!("{base}/dm/uuid"))? {
        let name = host.read(&format!("{base}/dm/name"))?;
        let what = match uuid.split('-').next() {
            Some("LVM") => "an LVM volume",
            Some("CRYPT") => "an encrypted volume",
            Some("mpath") => "a multipath device",
            _ => "a device-mapper device",
        };
        return Ok(format!("{what}, {name}"));
    }
    Ok(match holder {
        h if h.starts_with("md") => "an MD array".into(),
        h if h.starts_with("bcache") => "a bcache device".into(),
        _ => "a device on top of it".into(),
    })
}

/// Users that may have no holders entry: btrfs members, MD members of arrays that do not run.
pub fn elsewhere(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    for fsid in host.list("/sys/fs/btrfs")? {
        let path = format!("/sys/fs/btrfs/{fsid}/devices");
        for device in host.list(&path)?.iter().filter(|d| controller.owns(d)) {
            out.push(Reason::new(Check::Mounted, &path, format!("{device} is a member of the mounted btrfs {fsid}")));
        }
    }
    for array in host.list("/sys/block")?.iter().filter(|n| n.starts_with("md")) {
        let path = format!("/sys/block/{array}/md");
        for entry in host.list(&path)? {
            if let Some(device) = entry.strip_prefix("dev-").filter(|d| controller.owns(d)) {
                out.push(Reason::new(Check::Stacked, &path, format!("{device} is a member of the MD array {array}")));
            }
        }
    }
    if let Some(text) = host.read_if_there("/proc/mdstat")? {
        // "md127 : inactive nvme1n1p1[0](S)"
        for line in text.lines() {
            let Some((array, members)) = line.split_once(" : ") else { continue };
            let members = members.split_whitespace().filter_map(|w| w.split('[').next());
            for device in members.filter(|d| controller.owns(d)) {
                let what = format!("{device} is a member of the MD array {array}");
                out.push(Reason::new(Check::Stacked, "/proc/mdstat", what));
            }
        }
    }
    Ok(())
}

/// Loop devices set up over a device, or over a file that lies on one.
pub fn loops(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    for name in host.list("/sys/block")?.iter().filter(|n| n.starts_with("loop")) {
        let path = format!("/sys/block/{name}/loop/backing_file");
        let Some(backing) = host.read_if_there(&path)? else { continue };
        // The kernel appends this where the file's name is gone.
        let backing = backing.strip_suffix(" (deleted)").unwrap_or(&backing);
        if let Some(device) = names::target(host, controller, backing)? {
            out.push(Reason::new(Check::Stacked, &path, format!("{name} is set up over {backing} on {device}")));
        }
    }
    Ok(())
}

/// ZFS: pools that the machine imports at boot, and labels of ZFS while any pool is imported, since
/// the kernel does not tell a pool's members.
pub fn zfs(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let cache = "/etc/zfs/zpool.cache";
    if host.exists(cache) {
        let bytes = host.read_at(cache, 0, CACHE_MAX)?;
        if bytes.len() == CACHE_MAX {
            return Err(Unreadable { path: cache.into(), why: "it is too large to be looked through".into() });
        }
        // XDR strings stand between their lengths and zeros; a length's last byte may look like text.
        let strings: Vec<&[u8]> = bytes.split(|b| !b.is_ascii_graphic()).filter(|s| s.len() > 4).collect();
        let found = names::names(host, controller)?.into_iter().filter(|n| n.word.starts_with("/dev/"));
        let bare = found.flat_map(|n| [n.word.clone(), id(&n.word)].map(|word| (word, n.device.clone())));
        for (word, device) in bare.filter(|(w, _)| !w.is_empty()) {
            if strings.iter().any(|s| s.ends_with(word.as_bytes())) {
                out.push(Reason::new(Check::Configured, cache, format!("{device} is named there as {word}")));
            }
        }
    }
    let kstat = "/proc/spl/kstat/zfs";
    let pools: Vec<String> =
        host.list(kstat)?.into_iter().filter(|p| host.exists(&format!("{kstat}/{p}/state"))).collect();
    if !pools.is_empty() {
        for device in controller.devices() {
            if signatures::found(host, &device.name)?.contains(&"zfs") {
                let what = format!("{} has a label of ZFS, and {} is imported", device.name, pools.join(", "));
                out.push(Reason::new(Check::Stacked, kstat, what));
            }
        }
    }
    Ok(())
}

/// The last part of a link of `by-id` or `by-path`, as ZFS keeps it in `devid` and `phys_path`.
fn id(word: &str) -> String {
    let name = word.strip_prefix("/dev/disk/by-id/").or(word.strip_prefix("/dev/disk/by-path/"));
    name.unwrap_or("").to_owned()
}

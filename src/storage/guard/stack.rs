//! What stands on a block device: device mapper, MD, bcache, loop files, btrfs, ZFS, exports.

use super::host::{Host, Unreadable};
use super::sysfs::{BlockDevice, Controller};
use super::{Check, Reason};

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

/// Users that have no holders entry: btrfs members, loop files, ZFS pools, exported namespaces.
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
    // A pool's members cannot be told from here without trusting names, so any pool with a vdev
    // signature on this drive is caught by the signatures; an export is caught by its path.
    for subsystem in host.list("/sys/kernel/config/nvmet/subsystems")? {
        let base = format!("/sys/kernel/config/nvmet/subsystems/{subsystem}/namespaces");
        for namespace in host.list(&base)? {
            let path = format!("{base}/{namespace}/device_path");
            let exported = host.read_if_there(&path)?.unwrap_or_default();
            if controller.devices().any(|d| exported == format!("/dev/{}", d.name)) {
                out.push(Reason::new(Check::Exported, &path, format!("{exported} is exported over NVMe-oF")));
            }
        }
    }
    Ok(())
}

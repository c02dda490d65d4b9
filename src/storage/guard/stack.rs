//! What stands on a block device: device mapper, MD, bcache, loop devices, btrfs, ZFS.

use super::host::{Host, Unreadable};
use super::nodes::{Nodes, Target};
use super::sysfs::{BlockDevice, Controller};
use super::{Check, Reason, signatures};

/// Holders of `device`, all the way up, each with what it is.
pub fn holders(host: &Host, device: &BlockDevice, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let mut open = vec![device.name.clone()];
    let mut seen = open.clone();
    while let Some(lower) = open.pop() {
        let path = format!("/sys/class/block/{lower}/holders");
        if !host.exists(&path) {
            return Err(Unreadable::new(&path, "there is no such folder"));
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
    for array in host.must_list("/sys/block")?.iter().filter(|n| n.starts_with("md")) {
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
    let nodes = Nodes::of(host, controller)?;
    for name in host.must_list("/sys/block")?.iter().filter(|n| n.starts_with("loop")) {
        let path = format!("/sys/block/{name}/loop/backing_file");
        let Some(backing) = host.read_if_there(&path)? else { continue };
        // The numbers are right even where the file's name is gone or is one of another mount namespace; without them
        // the name proves nothing of other devices.
        let asked = match host.loop_backing(name) {
            // Detached meanwhile, unless it still says that it stands on something.
            Ok(None) if host.exists(&path) => {
                Err(Unreadable::new(&path, "it says so, and the device says no; try again"))
            }
            asked => asked,
        };
        let by_number = match asked {
            Ok(found) => found.and_then(|b| nodes.block(b.device).or(nodes.block(b.on))),
            Err(e) => {
                out.push(e.into());
                None
            }
        };
        let device = match by_number {
            Some(device) => Some(device.to_owned()),
            None => match nodes.target(host, controller, &backing)? {
                Target::Ours(device) => Some(device),
                _ => None,
            },
        };
        if let Some(device) = device {
            out.push(Reason::new(Check::Stacked, &path, format!("{name} is set up over {backing} on {device}")));
        }
    }
    Ok(())
}

/// Members of bcachefs, by the kernel's links to them, and of caches of CD drives and RNBD servers.
pub fn linked(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    for (folder, ends, what) in [
        ("/sys/fs/bcachefs", &["block"][..], "a member of a mounted bcachefs"),
        ("/sys/fs/bcache", &["", "set"][..], "a member of a bcache set"),
        ("/sys/devices/virtual/rnbd-server/ctl/devices", &["block_dev"][..], "exported by an RNBD server"),
    ] {
        for set in host.list(folder)? {
            let base = format!("{folder}/{set}");
            let members = if host.real(&base).is_dir() { host.list(&base)? } else { Vec::new() };
            let links = members.iter().flat_map(|m| ends.iter().map(move |e| format!("{m}/{e}")));
            for link in links.chain(ends.iter().map(|e| (*e).to_owned())) {
                let path = format!("{base}/{link}");
                let target = host.resolve(&path).unwrap_or_default();
                let device = target.components().filter_map(|c| c.as_os_str().to_str()).find(|c| controller.owns(c));
                if let Some(device) = device {
                    out.push(Reason::new(Check::Stacked, &base, format!("{device} is {what}, {set}")));
                    break;
                }
            }
        }
    }
    Ok(())
}

/// Labels of ZFS while any pool is imported, since the kernel does not tell a pool's members.
pub fn zfs(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
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

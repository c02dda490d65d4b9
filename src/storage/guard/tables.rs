//! The tables of a machine that may name a drive: what is mounted, decrypted, assembled, booted,
//! exported or given to guests, now or when the machine starts.

use super::commands;
use super::host::{Host, Unreadable};
use super::words::{Mention, Words};
use super::{Check, Reason};

/// How a file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    /// Lines; `#` begins comments.
    Lines,
    /// A unit of systemd; `#` and `;` begin comments.
    Unit,
    /// XML, JSON or anything else without comments of a line.
    Whole,
    /// A long file of which only the lines with a path below `/dev` matter.
    Nodes,
    /// Lines, of what the file's own name names.
    Named,
    /// Commands of a shell, where nt's own are no reason.
    Commands,
    /// Commands of cron, likewise.
    Cron,
    /// Rules of udev, of which those matter that start something or give a device to a user.
    Rules,
    /// No text.
    Binary,
}

use Style::{Binary, Commands, Cron, Lines, Named, Nodes, Rules, Unit, Whole};

/// What is read: the files that a pattern means (`*` is any part of one name; a folder of a pattern may
/// have one too), how they are written, and what a mention there is.
const TABLES: &[(&str, Style, Check)] = &[
    ("/proc/cmdline", Whole, Check::Boot),
    ("/etc/fstab", Lines, Check::Configured),
    ("/etc/fstab.d/*", Lines, Check::Configured),
    ("/etc/crypttab", Lines, Check::Configured),
    ("/etc/crypttab.initramfs", Lines, Check::Configured),
    ("/etc/veritytab", Lines, Check::Configured),
    ("/etc/integritytab", Lines, Check::Configured),
    ("/etc/initramfs-tools/conf.d/*", Lines, Check::Boot),
    ("/etc/initramfs-tools/initramfs.conf", Lines, Check::Boot),
    ("/etc/initcpio/*", Lines, Check::Boot),
    ("/etc/mkinitcpio.conf", Lines, Check::Boot),
    ("/etc/dracut.conf", Lines, Check::Boot),
    ("/etc/dracut.conf.d/*", Lines, Check::Boot),
    ("/etc/kernel/*", Lines, Check::Boot),
    ("/etc/cmdline.d/*", Lines, Check::Boot),
    ("/usr/lib/kernel/cmdline", Lines, Check::Boot),
    ("/etc/default/grub", Lines, Check::Boot),
    ("/etc/default/grub.d/*", Lines, Check::Boot),
    ("/boot/grub/grub.cfg", Lines, Check::Boot),
    ("/boot/grub/custom.cfg", Lines, Check::Boot),
    ("/boot/grub2/grub.cfg", Lines, Check::Boot),
    ("/boot/grub2/custom.cfg", Lines, Check::Boot),
    ("/boot/grub*/grubenv", Whole, Check::Boot),
    ("/boot/efi/EFI/*/grub.cfg", Lines, Check::Boot),
    ("/efi/EFI/*/grub.cfg", Lines, Check::Boot),
    ("/boot/EFI/*/grub.cfg", Lines, Check::Boot),
    ("/boot/loader/entries/*", Lines, Check::Boot),
    ("/boot/efi/loader/entries/*", Lines, Check::Boot),
    ("/efi/loader/entries/*", Lines, Check::Boot),
    ("/boot/extlinux/*.conf", Lines, Check::Boot),
    ("/boot/syslinux/*.cfg", Lines, Check::Boot),
    ("/boot/refind_linux.conf", Lines, Check::Boot),
    ("/boot/efi/EFI/*/refind.conf", Lines, Check::Boot),
    ("/efi/EFI/*/refind.conf", Lines, Check::Boot),
    ("/boot/EFI/*/refind.conf", Lines, Check::Boot),
    ("/boot/limine.c*", Lines, Check::Boot),
    ("/boot/limine/limine.c*", Lines, Check::Boot),
    ("/boot/efi/EFI/*/limine.c*", Lines, Check::Boot),
    ("/efi/EFI/*/limine.c*", Lines, Check::Boot),
    ("/boot/EFI/*/limine.c*", Lines, Check::Boot),
    ("/etc/lilo.conf", Lines, Check::Boot),
    ("/var/cache/debconf/config.dat", Nodes, Check::Boot),
    ("/etc/mdadm.conf", Lines, Check::Configured),
    ("/etc/mdadm.conf.d/*", Lines, Check::Configured),
    ("/etc/mdadm/mdadm.conf", Lines, Check::Configured),
    ("/etc/mdadm/mdadm.conf.d/*", Lines, Check::Configured),
    ("/etc/lvm/devices/*.devices", Lines, Check::Configured),
    ("/etc/multipath/wwids", Lines, Check::Configured),
    ("/etc/multipath/bindings", Lines, Check::Configured),
    ("/etc/zfs/*.cache", Binary, Check::Configured),
    ("/etc/zfs/zfs-list.cache/*", Lines, Check::Configured),
    ("/etc/zfs/vdev_id.conf", Lines, Check::Configured),
    ("/etc/drbd.conf", Lines, Check::Configured),
    ("/etc/drbd.d/*", Lines, Check::Configured),
    ("/etc/auto.*", Lines, Check::Configured),
    ("/etc/auto.master.d/*", Lines, Check::Configured),
    ("/etc/autofs/*", Lines, Check::Configured),
    ("/etc/target/saveconfig.json", Whole, Check::Exported),
    ("/etc/rtslib-fb-target/saveconfig.json", Whole, Check::Exported),
    ("/etc/nvmet/*.json", Whole, Check::Exported),
    ("/etc/scst.conf", Lines, Check::Exported),
    ("/etc/tgt/*.conf", Lines, Check::Exported),
    ("/etc/tgt/conf.d/*", Lines, Check::Exported),
    ("/etc/iet/ietd.conf", Lines, Check::Exported),
    ("/etc/nbd-server/config", Lines, Check::Exported),
    ("/etc/nbd-server/conf.d/*", Lines, Check::Exported),
    ("/etc/libvirt/*/*.xml", Whole, Check::Configured),
    ("/run/libvirt/*/*.xml", Whole, Check::Configured),
    ("/etc/pve/qemu-server/*.conf", Lines, Check::Configured),
    ("/etc/pve/nodes/*/qemu-server/*.conf", Lines, Check::Configured),
    ("/etc/pve/nodes/*/lxc/*.conf", Lines, Check::Configured),
    ("/etc/pve/storage.cfg", Lines, Check::Configured),
    ("/etc/pve/mapping/*.cfg", Lines, Check::Configured),
    // Drivers that others than the kernel's own are to take a device.
    ("/etc/driverctl.d/*", Named, Check::Configured),
    ("/etc/spdk/*", Whole, Check::Configured),
    ("/etc/security/pam_mount.conf.xml", Whole, Check::Configured),
    ("/var/lib/lxc/*/config", Lines, Check::Configured),
    ("/etc/xen/*.cfg", Lines, Check::Configured),
    ("/etc/xen/auto/*", Lines, Check::Configured),
    ("/etc/systemd/nspawn/*.nspawn", Lines, Check::Configured),
    ("/etc/ceph/osd/*.json", Whole, Check::Configured),
    ("/var/lib/pacemaker/cib/cib.xml", Whole, Check::Configured),
    ("/etc/cluster/cluster.conf", Whole, Check::Configured),
    ("/etc/sysconfig/sbd", Lines, Check::Configured),
    ("/etc/default/sbd", Lines, Check::Configured),
    ("/etc/docker/daemon.json", Whole, Check::Configured),
    ("/etc/containers/storage.conf", Lines, Check::Configured),
    ("/etc/systemd/zram-generator.conf", Lines, Check::Configured),
    ("/etc/systemd/zram-generator.conf.d/*", Lines, Check::Configured),
    // Modules that open a device that their options name, as block2mtd and g_mass_storage do.
    ("/etc/modprobe.d/*", Lines, Check::Configured),
    ("/run/modprobe.d/*", Lines, Check::Configured),
    ("/etc/udev/rules.d/*", Rules, Check::Configured),
    ("/run/udev/rules.d/*", Rules, Check::Configured),
    // Where backups go, which mount the drive when their time comes.
    ("/etc/timeshift/timeshift.json", Whole, Check::Configured),
    ("/etc/timeshift.json", Whole, Check::Configured),
    ("/etc/rear/*.conf", Lines, Check::Configured),
    // What formats a disk when the machine starts, and what writes to one when it crashes.
    ("/etc/cloud/cloud.cfg", Lines, Check::Configured),
    ("/etc/cloud/cloud.cfg.d/*", Lines, Check::Configured),
    ("/etc/kdump.conf", Lines, Check::Configured),
    // Where systems without systemd, and suspend by a program, have their devices.
    ("/etc/uswsusp.conf", Lines, Check::Swap),
    ("/etc/suspend.conf", Lines, Check::Swap),
    ("/etc/conf.d/*", Lines, Check::Configured),
    ("/etc/vdoconf.yml", Lines, Check::Configured),
    // What root has done at a start or at times; nobody else's commands can use a drive.
    ("/etc/rc.local", Commands, Check::Configured),
    ("/etc/rc.d/rc.local", Commands, Check::Configured),
    ("/etc/local.d/*", Commands, Check::Configured),
    ("/etc/crontab", Cron, Check::Configured),
    ("/etc/anacrontab", Cron, Check::Configured),
    ("/etc/cron.d/*", Cron, Check::Configured),
    ("/etc/cron.hourly/*", Commands, Check::Configured),
    ("/etc/cron.daily/*", Commands, Check::Configured),
    ("/etc/cron.weekly/*", Commands, Check::Configured),
    ("/etc/cron.monthly/*", Commands, Check::Configured),
    ("/var/spool/cron/root", Cron, Check::Configured),
    ("/var/spool/cron/crontabs/root", Cron, Check::Configured),
    ("/sys/module/pstore_blk/parameters/blkdev", Whole, Check::Configured),
];
/// Where systemd looks for units, as `systemd-analyze unit-paths` lists it.
const UNITS: [&str; 13] = [
    "/etc/systemd/system.control",
    "/run/systemd/system.control",
    "/run/systemd/transient",
    "/run/systemd/generator.early",
    "/etc/systemd/system",
    "/etc/systemd/system.attached",
    "/run/systemd/system",
    "/run/systemd/system.attached",
    "/run/systemd/generator",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
    "/run/systemd/generator.late",
];

/// Every table that names the drive. A table that cannot be read is a reason of its own, and the others
/// are read all the same.
pub fn named(host: &Host, words: &Words, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    for (pattern, style, check) in TABLES {
        super::note(out, |out| {
            for path in matches(host, pattern)? {
                super::note(out, |out| table(host, words, &path, *style, *check, out));
            }
            Ok(())
        });
    }
    for path in units(host)? {
        super::note(out, |out| {
            specifiers(host, &path, out)?;
            table(host, words, &path, Unit, Check::Configured, out)
        });
    }
    for path in services(host)? {
        super::note(out, |out| service(host, words, &path, out));
    }
    super::note(out, |out| volume_groups(host, words, out));
    ceph(host, words, out)
}

fn table(
    host: &Host,
    words: &Words,
    path: &str,
    style: Style,
    check: Check,
    out: &mut Vec<Reason>,
) -> Result<(), Unreadable> {
    let bytes = match host.bytes(path) {
        // A link to a file that is gone says nothing.
        Err(e) if e.is_gone() => return Ok(()),
        bytes => bytes?,
    };
    let mut mentions = match style {
        Binary => words.in_bytes(host, &bytes)?,
        style => text(host, words, &String::from_utf8_lossy(&bytes), style)?,
    };
    if style == Named {
        let name = path.rsplit('/').next().unwrap_or(path);
        mentions.extend(words.mentions(host, &format!("pci {name}"), &[])?);
    }
    // One mention a device is enough to refuse; more would bury the other reasons.
    let mut devices: Vec<&str> = Vec::new();
    for mention in &mentions {
        if !devices.contains(&mention.device.as_str()) {
            devices.push(&mention.device);
            let what = format!("{} is named there as {}", mention.device, mention.word);
            out.push(Reason::new(check, path, what));
        }
    }
    Ok(())
}

/// Mentions in a text as it stands, and with the lines joined that end with a backslash, in case the
/// table's reader joins them.
fn text(host: &Host, words: &Words, text: &str, style: Style) -> Result<Vec<Mention>, Unreadable> {
    if style == Nodes {
        let lines: Vec<&str> = text.lines().filter(|l| l.contains("/dev/")).collect();
        return words.mentions(host, &lines.join("\n"), &[]);
    }
    if style == Commands {
        return words.mentions(host, &commands::of_script(text), &[]);
    }
    if style == Cron {
        return words.mentions(host, &commands::of_cron(text), &[]);
    }
    if style == Rules {
        return words.mentions(host, &commands::of_rules(text), &[]);
    }
    let comments: &[char] = match style {
        Lines | Named => &['#'],
        Unit => &['#', ';'],
        _ => &[],
    };
    let mut found = words.mentions(host, text, comments)?;
    if text.contains("\\\n") {
        for with in ["", " "] {
            found.extend(words.mentions(host, &text.replace("\\\n", with), comments)?);
        }
    }
    Ok(found)
}

/// Files that a pattern means, in order.
fn matches(host: &Host, pattern: &str) -> Result<Vec<String>, Unreadable> {
    let mut found = vec![String::new()];
    for part in pattern.split('/').skip(1) {
        let mut next = Vec::new();
        for folder in &found {
            let Some((start, end)) = part.split_once('*') else {
                next.push(format!("{folder}/{part}"));
                continue;
            };
            let names = match host.list(folder) {
                // A file, or a link that leads nowhere.
                Err(e) if e.is_gone() || e.kind == std::io::ErrorKind::NotADirectory => Vec::new(),
                names => names?,
            };
            let fits = |n: &&String| n.len() >= start.len() + end.len() && n.starts_with(start) && n.ends_with(end);
            for name in names.iter().filter(fits) {
                if name.contains(char::REPLACEMENT_CHARACTER) {
                    let why = format!("a name there is no UTF-8: {name:?}");
                    return Err(Unreadable::new(folder, why));
                }
                next.push(format!("{folder}/{name}"));
            }
        }
        found = next;
    }
    found.retain(|path| host.exists(path) && !host.real(path).is_dir());
    Ok(found)
}

/// Units that mount or swap with their drop-ins, and all that generators wrote.
fn units(host: &Host) -> Result<Vec<String>, Unreadable> {
    let mut found = Vec::new();
    for folder in UNITS {
        let generated = folder.contains("/generator");
        for name in host.list(folder)? {
            let path = format!("{folder}/{name}");
            let unit = name.trim_end_matches(".d");
            let mounts = [".mount", ".swap"].iter().any(|end| unit.ends_with(end)) || matches!(unit, "mount" | "swap");
            if host.real(&path).is_dir() {
                // `data.mount.d`, `mount.d` for all, `dev-.mount.d` for all whose names begin so.
                if name.ends_with(".d") && (mounts || generated) {
                    let drops = host.list(&path)?.into_iter().filter(|d| d.ends_with(".conf"));
                    found.extend(drops.map(|d| format!("{path}/{d}")));
                }
            } else if mounts || generated {
                found.push(path);
            }
        }
    }
    Ok(found)
}

/// Services with their drop-ins.
fn services(host: &Host) -> Result<Vec<String>, Unreadable> {
    let mut found = Vec::new();
    for folder in UNITS {
        for name in host.list(folder)? {
            let path = format!("{folder}/{name}");
            if name.ends_with(".service") && !host.real(&path).is_dir() {
                found.push(path);
            } else if name.ends_with(".service.d") && host.real(&path).is_dir() {
                let drops = host.list(&path)?.into_iter().filter(|d| d.ends_with(".conf"));
                found.extend(drops.map(|d| format!("{path}/{d}")));
            }
        }
    }
    Ok(found)
}

/// Commands of a service that name a device. nt's own are for drives that may be used so.
fn service(host: &Host, words: &Words, path: &str, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let text = match host.read(path) {
        Err(e) if e.is_gone() => return Ok(()),
        text => text?,
    };
    if let Some(mention) = words.mentions(host, &commands::of_service(&text), &[])?.first() {
        let what = format!("{} is named there as {}", mention.device, mention.word);
        out.push(Reason::new(Check::Configured, path, what));
    }
    Ok(())
}

/// `What=/dev/%m`: what systemd puts in place of a specifier is not known here.
fn specifiers(host: &Host, path: &str, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let text = match host.read(path) {
        Err(e) if e.is_gone() => return Ok(()),
        text => text?,
    };
    // A line that ends with a backslash goes on in the next.
    let text = text.replace("\\\n", " ");
    for line in text.lines().filter(|l| l.trim_start().starts_with("What")) {
        if line.replace("%%", "").contains('%') {
            let what = format!("{:?} there has a specifier, so the device cannot be told", line.trim());
            out.push(Reason::new(Check::Unreadable, path, what));
        }
    }
    Ok(())
}

/// Backups of groups of LVM name their volumes by identifier; the nodes there are only hints.
fn volume_groups(host: &Host, words: &Words, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    for path in matches(host, "/etc/lvm/backup/*")? {
        let text = host.read(&path)?;
        let ids: Vec<&str> = text.lines().filter(|l| l.trim_start().starts_with("id = ")).collect();
        for mention in words.mentions(host, &ids.join("\n"), &[])? {
            let what = format!("{} is a volume of that group, {}", mention.device, mention.word);
            out.push(Reason::new(Check::Configured, &path, what));
        }
    }
    Ok(())
}

/// Stores of Ceph lead to their devices by links.
fn ceph(host: &Host, words: &Words, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    for store in host.list("/var/lib/ceph/osd")? {
        for link in ["block", "block.db", "block.wal", "journal"] {
            let path = format!("/var/lib/ceph/osd/{store}/{link}");
            let Ok(target) = host.link(&path) else { continue };
            let mut found = words.mentions(host, &path, &[])?;
            found.extend(words.mentions(host, &target.to_string_lossy(), &[])?);
            if let Some(mention) = found.first() {
                let what = format!("{} is a store of Ceph", mention.device);
                out.push(Reason::new(Check::Configured, &path, what));
            }
        }
    }
    Ok(())
}

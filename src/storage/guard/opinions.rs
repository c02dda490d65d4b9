//! Second opinions: what udev noted of a device, what links below `/dev/disk` say, what `blkid -p`
//! finds where it is installed. They can only add reasons; where they are missing, nothing is lost.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::host::{Host, Unreadable};
use super::nodes::Nodes;
use super::signatures::Place;
use super::superblocks::{Said, Sort};
use super::sysfs::{Controller, Namespace};
use super::{Check, Reason};

/// Where `blkid` may lie; `PATH` is not asked.
const BLKID: [&str; 4] = ["/usr/sbin/blkid", "/sbin/blkid", "/usr/bin/blkid", "/bin/blkid"];
/// After this long `blkid` has no opinion.
const BLKID_WAIT: Duration = Duration::from_secs(5);
/// Folders of `/dev/disk` and the sort of name their links carry.
const LINKS: [(&str, Sort); 5] = [
    ("by-uuid", Sort::Uuid),
    ("by-partuuid", Sort::PartUuid),
    ("by-label", Sort::Label),
    ("by-partlabel", Sort::PartLabel),
    ("by-id", Sort::Id),
];
/// Keys of udev and of `blkid -o export`, and their sorts.
const KEYS: [(&str, Sort); 12] = [
    ("ID_FS_UUID", Sort::Uuid),
    ("ID_FS_UUID_SUB", Sort::Uuid),
    ("ID_FS_LABEL_ENC", Sort::Label),
    ("ID_PART_ENTRY_UUID", Sort::PartUuid),
    ("ID_PART_ENTRY_NAME", Sort::PartLabel),
    ("ID_PART_TABLE_UUID", Sort::PartUuid),
    ("UUID", Sort::Uuid),
    ("UUID_SUB", Sort::Uuid),
    ("LABEL", Sort::Label),
    ("PART_ENTRY_UUID", Sort::PartUuid),
    ("PART_ENTRY_NAME", Sort::PartLabel),
    ("PTUUID", Sort::PartUuid),
];
/// Kinds of `blkid` and our words for them.
const KINDS: [(&str, &str); 21] = [
    ("crypto_LUKS", "luks"),
    ("LVM2_member", "lvm"),
    ("linux_raid_member", "md"),
    ("vfat", "fat"),
    ("msdos", "fat"),
    ("zfs_member", "zfs"),
    ("BitLocker", "bitlocker"),
    ("ext2", "ext4"),
    ("ext3", "ext4"),
    ("jbd", "ext4"),
    ("swsuspend", "swap"),
    ("isw_raid_member", "firmware raid"),
    ("ddf_raid_member", "firmware raid"),
    ("ceph_bluestore", "ceph"),
    ("VMFS", "vmfs"),
    ("VMFS_volume_member", "vmfs"),
    ("ReFS", "refs"),
    ("hfsplus", "hfs"),
    ("DM_integrity", "integrity"),
    ("DM_verity_hash", "verity"),
    ("oracleasm", "oracle asm"),
];
/// Types of partitions as udev notes them.
const BOOT_TYPES: [(&str, &str); 6] = [
    ("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "an EFI system partition"),
    ("21686148-6449-6e6f-744e-656564454649", "a BIOS boot partition"),
    ("bc13c2ff-59e6-4262-a352-b275fd6f7172", "an extended boot loader partition (XBOOTLDR)"),
    ("9e1a2d38-c612-4316-aa26-8b49521e5a8b", "a PReP boot partition"),
    ("0xef", "an EFI system partition"),
    ("0x41", "a PReP boot partition"),
];

/// A boot partition by udev's word.
#[derive(Debug)]
pub struct BootType {
    /// Its kernel name.
    pub device: String,
    /// Where udev noted it.
    pub path: String,
    /// What it is.
    pub what: &'static str,
}

/// What `blkid` says of one device.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Opinion {
    /// Identifiers.
    pub said: Vec<Said>,
    /// What it holds, in our words.
    pub holds: Option<String>,
}

/// Identifiers by links that lead to the controller, and by udev's notes.
pub fn said(host: &Host, controller: &Controller) -> Vec<(String, Said)> {
    let mut out = Vec::new();
    let Ok(nodes) = Nodes::of(host, controller) else { return out };
    for (folder, sort) in LINKS {
        for link in host.list(&format!("/dev/disk/{folder}")).unwrap_or_default() {
            let path = format!("/dev/disk/{folder}/{link}");
            let by_name = host.link_name(&path).filter(|d| controller.owns(d));
            let device = nodes.at(host, &path).ok().flatten().map(str::to_owned).or(by_name);
            out.extend(device.map(|device| (device, Said { sort, text: super::words::hexadecimal(&link) })));
        }
    }
    for device in controller.devices() {
        for (key, value) in notes(host, &device.number) {
            if let Some((_, sort)) = KEYS.iter().find(|(k, _)| *k == key) {
                out.push((device.name.clone(), Said { sort: *sort, text: super::words::hexadecimal(&value) }));
            }
        }
    }
    out
}

/// Keys and values that udev noted of the block device with this number.
fn notes(host: &Host, number: &str) -> Vec<(String, String)> {
    let text = host.read_if_there(&notes_at(number)).ok().flatten().unwrap_or_default();
    let pairs = text.lines().filter_map(|l| l.strip_prefix("E:")?.split_once('='));
    pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

fn notes_at(number: &str) -> String {
    format!("/run/udev/data/b{number}")
}

/// Partitions that udev knows as ones to boot from.
pub fn boot_types(host: &Host, namespace: &Namespace) -> Vec<BootType> {
    let mut out = Vec::new();
    for device in namespace.devices() {
        for (_, value) in notes(host, &device.number).iter().filter(|(k, _)| k == "ID_PART_ENTRY_TYPE") {
            let known = BOOT_TYPES.iter().find(|(kind, _)| kind.eq_ignore_ascii_case(value));
            out.extend(known.map(|(_, what)| BootType {
                device: device.name.clone(),
                path: notes_at(&device.number),
                what,
            }));
        }
    }
    out
}

/// Hibernated systems that wait on other drives, by udev's word: each may have this drive mounted, and goes on writing to it
/// when it is started again.
pub fn hibernated(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    for name in host.list("/sys/class/block")?.iter().filter(|name| !controller.owns(name)) {
        let Some(number) = host.read_if_there(&format!("/sys/class/block/{name}/dev"))? else { continue };
        let path = notes_at(&number);
        let is =
            |(key, value): &(String, String)| key == "ID_FS_TYPE" && matches!(value.as_str(), "swsuspend" | "suspend");
        if notes(host, &number).iter().any(is) {
            let what = format!(
                "a hibernated system waits on {name} and may have this drive mounted; start it and shut it down first, or give it up (`mkswap /dev/{name}`)"
            );
            out.push(Reason::new(Check::Swap, &path, what));
        }
    }
    Ok(())
}

/// What `blkid -p` finds on a device of this machine, or at a place of it; nothing where it is not installed, fails or
/// takes too long.
pub fn blkid(host: &Host, place: &Place<'_>) -> Opinion {
    let Some(program) = BLKID.iter().find(|p| host.is_real() && host.exists(p)) else { return Opinion::default() };
    let mut command = Command::new(program);
    command.args(["-p", "-o", "export"]).env_clear();
    if let Some(part) = &place.part {
        command.args(["-O", &part.start.to_string(), "-S", &(part.end - part.start).to_string()]);
    }
    command.arg(place.path());
    run(&mut command).map(|text| parse(&text)).unwrap_or_default()
}

fn run(command: &mut Command) -> Option<String> {
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().ok()?;
    let end = Instant::now() + BLKID_WAIT;
    loop {
        match child.try_wait() {
            Ok(Some(_)) => break,
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(2)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
        }
    }
    let mut bytes = Vec::new();
    // It has ended, so a pipe's 64 KiB are all there is.
    child.stdout.take()?.take(64 << 10).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Takes the output of `blkid -o export` apart.
pub fn parse(text: &str) -> Opinion {
    let mut opinion = Opinion::default();
    for (key, value) in text.lines().filter_map(|l| l.split_once('=')) {
        // A backslash stands before unusual characters.
        let value = value.replace('\\', "");
        if let Some((_, sort)) = KEYS.iter().find(|(k, _)| *k == key) {
            opinion.said.push(Said { sort: *sort, text: value });
        } else if key == "TYPE" {
            let ours = KINDS.iter().find(|(kind, _)| *kind == value).map(|(_, word)| (*word).to_owned());
            opinion.holds = Some(ours.unwrap_or(value));
        }
    }
    opinion
}

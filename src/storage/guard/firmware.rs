//! Boot entries that a UEFI firmware keeps (`Boot0003`, and those of drivers and of programs before and after a start that
//! failed): one names a partition by its GUID, of whatever type that is.

use super::host::{Host, Unreadable};
use super::partitions::{Tables, guid, number};
use super::sysfs::Namespace;
use super::{Check, Reason};

/// Beginnings of entries, UEFI 2.10 §3.3.
const ENTRIES: [&str; 4] = ["Boot", "Driver", "SysPrep", "OsRecovery"];
const VARIABLES: &str = "/sys/firmware/efi/efivars";
/// The vendor of the variables that UEFI itself defines.
const GLOBAL: &str = "-8be4df61-93ca-11d2-aa0d-00e098032b8c";
/// Bytes before what a variable holds: its attributes.
const ATTRIBUTES: usize = 4;
/// Bytes of a load option before its description, UEFI 2.10 §3.1.3.
const OPTION: usize = 6;
/// Type and subtype of a path's node that is a partition, and its bytes, §10.3.5.1.
const HARD_DRIVE: [u8; 2] = [4, 1];
const HARD_DRIVE_BYTES: usize = 42;

/// Each boot entry that names a partition of the namespace's tables.
pub fn boots(host: &Host, namespace: &Namespace, tables: &Tables, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    for name in host.list(VARIABLES)? {
        let Some(entry) = name.strip_suffix(GLOBAL).filter(|n| is_entry(n)) else { continue };
        let path = format!("{VARIABLES}/{name}");
        let bytes = match host.bytes(&path) {
            Err(e) if e.is_gone() => continue,
            bytes => bytes?,
        };
        let named = partitions(&bytes);
        if let Some(partition) = tables.partitions.iter().find(|p| named.contains(&p.uuid)) {
            let how = match entry.strip_prefix("Boot") {
                Some(number) => format!("`efibootmgr -B -b {number}`"),
                None => "in the firmware's setup".to_owned(),
            };
            let what = format!(
                "the firmware's boot entry {entry} names the partition {} of {}; if it is stale, remove it ({how})",
                partition.uuid, namespace.whole.name
            );
            out.push(Reason::new(Check::Boot, &path, what));
        }
    }
    Ok(())
}

/// A beginning and four hexadecimal digits.
fn is_entry(name: &str) -> bool {
    let mut numbers = ENTRIES.iter().filter_map(|start| name.strip_prefix(start));
    numbers.any(|n| n.len() == 4 && n.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The partitions that a load option's paths name, as PARTUUIDs.
fn partitions(variable: &[u8]) -> Vec<String> {
    let mut out = Vec::new();
    let Some(option) = variable.get(ATTRIBUTES + OPTION..) else { return out };
    // The description is UTF-16 and ends with a zero; the paths follow, and have the length that is stated before it.
    let Some(end) = option.chunks_exact(2).position(|c| c == [0, 0]) else { return out };
    let stated = number(variable, ATTRIBUTES + 4, 2) as usize;
    let mut paths = &option[2 * end + 2..];
    paths = &paths[..paths.len().min(stated)];
    while let Some(node) = paths.get(..4) {
        let len = number(node, 2, 2) as usize;
        let Some(node) = paths.get(..len).filter(|n| n.len() >= 4) else { break };
        if node.starts_with(&HARD_DRIVE) && node.len() >= HARD_DRIVE_BYTES {
            out.extend(match node[41] {
                1 => Some(format!("{:08x}-{:02x}", number(node, 24, 4), number(node, 4, 4))),
                2 => guid(&node[24..40]),
                _ => None,
            });
        }
        paths = &paths[len..];
    }
    out
}

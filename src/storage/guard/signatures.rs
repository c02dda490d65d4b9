//! What lies on a device, told by its first and last MiB. Bytes that nobody recognises are data of
//! someone, and refuse like a file system does.

use super::host::{Host, Unreadable};

const EDGE: usize = 1 << 20;

/// (name, offset from the start, bytes there).
const AT_START: &[(&str, usize, &[u8])] = &[
    ("luks", 0, b"LUKS\xba\xbe"),
    ("bitlocker", 3, b"-FVE-FS-"),
    ("ntfs", 3, b"NTFS    "),
    ("exfat", 3, b"EXFAT   "),
    ("fat", 54, b"FAT"),
    ("fat", 82, b"FAT32"),
    ("xfs", 0, b"XFSB"),
    ("lvm", 512, b"LABELONE"),
    ("ext4", 0x438, &[0x53, 0xef]),
    ("f2fs", 0x400, &[0x10, 0x20, 0xf5, 0xf2]),
    ("swap", 4086, b"SWAPSPACE2"),
    ("swap", 4086, b"SWAP-SPACE"),
    ("md", 0, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("md", 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("btrfs", 0x10040, b"_BHRfS_M"),
    ("bcache", 0x1018, &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca]),
    ("nt image", 0, crate::storage::image::MAGIC),
    ("gpt", 512, b"EFI PART"),
    ("gpt", 4096, b"EFI PART"),
];

/// Everything recognised on `/dev/NAME`, `unknown data` where there are bytes nobody knows, empty
/// where both ends are zero.
pub fn found(host: &Host, name: &str) -> Result<Vec<&'static str>, Unreadable> {
    let path = format!("/dev/{name}");
    let head = host.read_at(&path, 0, EDGE)?;
    let tail = host.read_at(&path, -(EDGE as i64), EDGE)?;
    if head.is_empty() {
        return Err(Unreadable { path: path.into(), why: "it holds no bytes".into() });
    }
    Ok(recognise(&head, &tail))
}

/// What the first and last bytes of a device say.
pub fn recognise(head: &[u8], tail: &[u8]) -> Vec<&'static str> {
    let mut names: Vec<&'static str> = AT_START
        .iter()
        .filter(|(_, at, magic)| head.get(*at..*at + magic.len()) == Some(*magic))
        .map(|(name, ..)| *name)
        .collect();
    if zfs(head) || zfs(tail) {
        names.push("zfs");
    }
    if md_at_end(tail) {
        names.push("md");
    }
    if tail.len() >= 512 && tail[tail.len() - 512..].starts_with(b"EFI PART") {
        names.push("gpt");
    }
    if names.is_empty() && head.get(510..512) == Some(&[0x55, 0xaa]) {
        names.push("mbr");
    }
    if names.is_empty() && head.iter().chain(tail).any(|b| *b != 0) {
        names.push("unknown data");
    }
    names.sort_unstable();
    names.dedup();
    names
}

/// An uberblock of ZFS: its magic 0x00bab10c in either byte order, at a multiple of 1 KiB.
fn zfs(edge: &[u8]) -> bool {
    let magic = 0x00ba_b10c_u64;
    edge.chunks(1024).any(|c| c.starts_with(&magic.to_le_bytes()) || c.starts_with(&magic.to_be_bytes()))
}

/// An MD superblock at the end: version 0.90 or 1.0, in the last 128 KiB.
fn md_at_end(tail: &[u8]) -> bool {
    let last = &tail[tail.len().saturating_sub(128 << 10)..];
    last.chunks(512).any(|c| c.starts_with(&[0xfc, 0x4e, 0x2b, 0xa9]))
}

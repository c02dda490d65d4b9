//! What lies on a device, told by its first and last MiB. Bytes that nobody recognises are data of
//! someone, and refuse like a file system does.

use super::host::{Host, Unreadable};
use super::superblocks;
use crate::storage::gpt;
use crate::storage::image::{self, mark};

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
    ("lvm", 0, b"LABELONE"),
    ("lvm", 512, b"LABELONE"),
    ("lvm", 1024, b"LABELONE"),
    ("lvm", 1536, b"LABELONE"),
    ("ext4", 0x438, &[0x53, 0xef]),
    ("f2fs", 0x400, &[0x10, 0x20, 0xf5, 0xf2]),
    ("md", 0, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("md", 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("btrfs", 0x10040, b"_BHRfS_M"),
    ("bcache", 0x1018, &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca]),
    ("bcachefs", 0x1018, &[0xc6, 0x85, 0x73, 0xf6, 0x66, 0xce, 0x90, 0xa9]),
    ("iso9660", 0x8001, b"CD001"),
    ("squashfs", 0, b"hsqs"),
    ("erofs", 0x400, &[0xe2, 0xe1, 0xf5, 0xe0]),
    ("reiserfs", 0x10034, b"ReIsEr"),
    ("jfs", 0x8000, b"JFS1"),
    ("stratis", 516, b"!Stra0tis"),
    ("stratis", 4612, b"!Stra0tis"),
    ("ceph", 0, b"bluestore block device"),
    ("apfs", 32, b"NXSB"),
    ("ldm", 0xc00, b"PRIVHEAD"),
    ("nt image", 0, image::MAGIC),
    ("nt staging", 0, mark::MAGIC),
    ("gpt", 512, b"EFI PART"),
    ("gpt", 4096, b"EFI PART"),
];

/// Whether this kind of contents is nt's own and nobody else's: the table of partitions of a staged drive, the image in
/// its one partition, the mark of a drive whose staging was cut off (while it stands in the first block, no table of
/// partitions counts). `whole` tells the drive from a partition of it.
pub fn is_own(kind: &str, whole: bool, head: &[u8], tail: &[u8], size: u64, block: u64) -> bool {
    let marked = || mark::ranges(head).is_some();
    match kind {
        "gpt" => whole && (marked() || gpt::is_ours(head, tail, size, block)),
        "nt image" => !whole,
        "nt staging" => whole && marked(),
        _ => false,
    }
}

/// Everything recognised on `/dev/NAME`, `unknown data` where there are bytes nobody knows, empty
/// where both ends are zero.
pub fn found(host: &Host, name: &str) -> Result<Vec<&'static str>, Unreadable> {
    let (head, tail) = edges(host, name)?;
    Ok(recognise(&head, &tail))
}

/// The first and the last MiB of `/dev/NAME`.
pub fn edges(host: &Host, name: &str) -> Result<(Vec<u8>, Vec<u8>), Unreadable> {
    let path = format!("/dev/{name}");
    let head = host.read_at(&path, 0, EDGE)?;
    let tail = host.read_at(&path, -(EDGE as i64), EDGE)?;
    if head.is_empty() {
        return Err(Unreadable::new(&path, "it holds no bytes"));
    }
    Ok((head, tail))
}

/// What the first and last bytes of a device say.
pub fn recognise(head: &[u8], tail: &[u8]) -> Vec<&'static str> {
    let mut names: Vec<&'static str> = AT_START
        .iter()
        .filter(|(_, at, magic)| head.get(*at..*at + magic.len()) == Some(*magic))
        .map(|(name, ..)| *name)
        .collect();
    if superblocks::is_swap(head) || superblocks::hibernated(head) {
        names.push("swap");
    }
    if zfs(head) || zfs(tail) {
        names.push("zfs");
    }
    if md_at_end(tail) {
        names.push("md");
    }
    let at_end =
        |back: usize, magic: &[u8]| tail.len().checked_sub(back).is_some_and(|at| tail[at..].starts_with(magic));
    if at_end(512, b"EFI PART") || at_end(4096, b"EFI PART") {
        names.push("gpt");
    }
    // RAID of firmware: Intel's and the common format of disks' metadata.
    if at_end(1024, b"Intel Raid ISM Cfg Sig.") || at_end(512, &[0xde, 0x11, 0xde, 0x11]) {
        names.push("firmware raid");
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

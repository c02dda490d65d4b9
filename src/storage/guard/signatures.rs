//! What lies on a device, told by its first and last 4 MiB. Bytes that nobody recognises are data of
//! someone, and refuse like a file system does.

use std::ops::Range;

use super::host::{Host, Unreadable};
use super::superblocks;
use super::sysfs::BlockDevice;
use crate::storage::gpt;
use crate::storage::image::{self, mark};

/// Bytes at each end of a device that are read: VMFS begins at 1 and 2 MiB, and leaves what lies before empty.
const EDGE: usize = 4 << 20;
/// Places between the ends that are read of a drive or partition whose ends are empty, before it is overwritten, and
/// their bytes.
const INSIDE: u64 = 512;
const INSIDE_BYTES: usize = 4096;
/// The word for bytes that nobody recognises.
pub const UNKNOWN: &str = "unknown data";

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
    ("vmfs", 1 << 20, &[0x0d, 0xd0, 0x01, 0xc0]),
    ("vmfs", 2 << 20, &[0x5e, 0xf1, 0xab, 0x2f]),
    ("refs", 0, b"\0\0\0ReFS\0"),
    // With the revision before or after: two bytes alone are found by chance in other superblocks.
    ("nilfs2", 0x400, &[2, 0, 0, 0, 0, 0, 0x34, 0x34]),
    ("hfs", 0x400, b"H+\0\x04"),
    ("hfs", 0x400, b"HX\0\x05"),
    ("udf", 0x8001, b"NSR02"),
    ("udf", 0x8001, b"BEA01"),
    ("ufs", 8192 + 0x55c, &[0x54, 0x19, 0x01, 0x00]),
    ("ufs", 8192 + 0x55c, &[0x19, 0x01, 0x54, 0x19]),
    ("ufs", 65536 + 0x55c, &[0x19, 0x01, 0x54, 0x19]),
    ("gfs2", 0x10000, &[0x01, 0x16, 0x19, 0x70]),
    ("ocfs2", 1024, b"OCFSV2"),
    ("ocfs2", 2048, b"OCFSV2"),
    ("ocfs2", 4096, b"OCFSV2"),
    ("ocfs2", 8192, b"OCFSV2"),
    ("vdo", 0, b"dmvdo001"),
    ("integrity", 0, b"integrt\0"),
    ("verity", 0, b"verity\0\0"),
    ("oracle asm", 32, b"ORCLDISK"),
    ("gpt", 512, b"EFI PART"),
    ("gpt", 1024, b"EFI PART"),
    ("gpt", 2048, b"EFI PART"),
    ("gpt", 4096, b"EFI PART"),
];

/// Whether this kind of contents is nt's own and nobody else's: the table of partitions of a staged drive, the image in
/// its one partition, the mark of a drive whose staging was cut off (while it stands in the first block, no table of
/// partitions counts). `whole` tells the drive from a partition of it.
pub fn is_own(kind: &str, whole: bool, head: &[u8], tail: &[u8], size: u64, block: u64) -> bool {
    let marked = || mark::ranges(head).is_some();
    match kind {
        "gpt" => whole && (marked() || is_our_table(head, tail, size, block)),
        "nt image" => !whole,
        "nt staging" => whole && marked(),
        _ => false,
    }
}

/// Whether the first and last MiB hold nt's own table of partitions and nothing else.
fn is_our_table(head: &[u8], tail: &[u8], size: u64, block: u64) -> bool {
    let edge = gpt::START as usize;
    let last = tail.len().checked_sub(edge).and_then(|at| tail.get(at..));
    head.get(..edge).zip(last).is_some_and(|(first, last)| gpt::is_ours(first, last, size, block))
}

/// What is looked at as one device: a whole node, or the bytes of a partition in it that the kernel does not show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place<'a> {
    /// The node.
    pub device: &'a BlockDevice,
    /// The bytes of it, if not all of them.
    pub part: Option<Range<u64>>,
}

impl Place<'_> {
    /// The node's path.
    pub fn path(&self) -> String {
        format!("/dev/{}", self.device.name)
    }

    /// Its bytes.
    pub fn size(&self) -> u64 {
        self.part.as_ref().map_or(self.device.size, |p| p.end - p.start)
    }

    /// Up to `len` bytes at `at` of it; fewer at its end.
    ///
    /// # Errors
    /// Those of the reading.
    pub fn read(&self, host: &Host, at: u64, len: usize) -> Result<Vec<u8>, Unreadable> {
        let left = usize::try_from(self.size().saturating_sub(at)).unwrap_or(usize::MAX);
        let start = self.part.as_ref().map_or(0, |p| p.start).saturating_add(at);
        match i64::try_from(start) {
            Ok(start) => host.read_at(&self.path(), start, len.min(left)),
            Err(_) => Ok(Vec::new()),
        }
    }

    /// The first and the last 4 MiB.
    ///
    /// # Errors
    /// Those of the reading, or that there are no bytes.
    pub fn edges(&self, host: &Host) -> Result<(Vec<u8>, Vec<u8>), Unreadable> {
        if self.part.is_none() {
            return edges(host, &self.device.name);
        }
        let last = self.size().saturating_sub(EDGE as u64);
        Ok((self.read(host, 0, EDGE)?, self.read(host, last, EDGE)?))
    }

    /// Whether anything but zeros lies at one of [`INSIDE`] places spread over it.
    ///
    /// # Errors
    /// Those of the reading.
    pub fn holds_inside(&self, host: &Host) -> Result<bool, Unreadable> {
        for i in 1..=INSIDE {
            let at = self.size() / (INSIDE + 1) * i / INSIDE_BYTES as u64 * INSIDE_BYTES as u64;
            if !is_zero(&self.read(host, at, INSIDE_BYTES)?) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROS.len()).all(|c| c == &ZEROS[..c.len()])
}

/// Everything recognised on `/dev/NAME`, `unknown data` where there are bytes nobody knows, empty
/// where both ends are zero.
pub fn found(host: &Host, name: &str) -> Result<Vec<&'static str>, Unreadable> {
    let (head, tail) = edges(host, name)?;
    Ok(recognise(&head, &tail))
}

/// The first and the last 4 MiB of `/dev/NAME`.
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
    // Its first bytes alone are anybody's to write: only a whole superblock or mark is nt's.
    if image::is_superblock(head) {
        names.push("nt image");
    }
    if mark::ranges(head).is_some() {
        names.push("nt staging");
    }
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
    if [512, 1024, 2048, 4096].into_iter().any(|block| at_end(block, b"EFI PART")) {
        names.push("gpt");
    }
    // RAID of firmware: Intel's and the common format of disks' metadata.
    if at_end(1024, b"Intel Raid ISM Cfg Sig.") || at_end(512, &[0xde, 0x11, 0xde, 0x11]) {
        names.push("firmware raid");
    }
    if names.is_empty() && head.get(510..512) == Some(&[0x55, 0xaa]) {
        names.push("mbr");
    }
    if names.is_empty() && !(is_zero(head) && is_zero(tail)) {
        names.push(UNKNOWN);
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

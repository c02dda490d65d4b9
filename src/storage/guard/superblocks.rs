//! What a device says of itself: identifiers and labels from the superblocks of file systems, swap,
//! encryption, volume managers and pools. Tables of a machine are searched for them (`words.rs`).
//!
//! Nothing is judged here: a damaged superblock gives what it gives, since a kernel may accept it.

use super::partitions::number;

/// The sort of an identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sort {
    /// Of a file system, encrypted volume, physical volume, array or member.
    Uuid,
    /// Of a file system or encrypted volume.
    Label,
    /// Of a partition.
    PartUuid,
    /// Of a partition.
    PartLabel,
    /// A group of LVM: the first part of the paths of its volumes.
    Group,
    /// Name of an MD array.
    Array,
    /// Name of a pool of ZFS.
    Pool,
    /// Number of a pool or device of ZFS, in decimal.
    PoolNumber,
    /// Of the namespace by the drive itself: serial, EUI, NGUID, WWID.
    Id,
}

/// One identifier.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Said {
    /// Its sort.
    pub sort: Sort,
    /// The identifier.
    pub text: String,
}

/// Reads elsewhere on the device: offset and length; empty where that fails.
pub type Far<'a> = &'a mut dyn FnMut(u64, usize) -> Vec<u8>;

/// Fields at fixed places: magic and its offset, then the offset of a UUID of 16 bytes and of a label
/// with its length (0: none).
const FIXED: &[(&[u8], usize, usize, usize, usize)] = &[
    (&[0x53, 0xef], 0x438, 0x468, 0x478, 16),                // ext2, ext3, ext4
    (&[0x53, 0xef], 0x438, 0x4d0, 0, 0),                     // the journal's own UUID
    (b"XFSB", 0, 32, 108, 12),                               // XFS
    (b"_BHRfS_M", 0x10040, 0x10020, 0x1012b, 256),           // btrfs
    (b"_BHRfS_M", 0x10040, 0x1010b, 0, 0),                   // a device of btrfs
    (b"_BHRfS_M", 0x10040, 0x1023b, 0, 0),                   // UUID of its metadata
    (&[0x10, 0x20, 0xf5, 0xf2], 0x400, 0x46c, 0, 0),         // F2FS
    (b"ReIsEr", 0x10034, 0x10054, 0x10064, 16),              // ReiserFS
    (b"JFS1", 0x8000, 0x8088, 0x8098, 16),                   // JFS
    (&[0x34, 0x34], 0x406, 0x498, 0x4a8, 80),                // NILFS2
    (&[0xc6, 0x85, 0x73, 0xf6], 0x1018, 0x1028, 0x1048, 32), // bcache, bcachefs
    (&[0xc6, 0x85, 0x73, 0xf6], 0x1018, 0x1038, 0, 0),       // its set
    (&[0xe2, 0xe1, 0xf5, 0xe0], 0x400, 0x430, 0x440, 16),    // EROFS
    (b"CD001", 0x8001, 0, 0x8028, 32),                       // ISO 9660
];
/// Sizes of a page, at whose end swap is marked.
const PAGES: [usize; 5] = [4096, 8192, 16384, 32768, 65536];
/// Where second headers of LUKS2 may lie in the first MiB.
const LUKS2_SECOND: [usize; 6] = [0x4000, 0x8000, 0x10000, 0x20000, 0x40000, 0x80000];
/// Bytes of the longest label, F2FS's.
const LABEL_MAX: usize = 1024;
const MD: [u8; 4] = [0xfc, 0x4e, 0x2b, 0xa9];

/// Everything that the first and last bytes of a device say.
pub fn said(head: &[u8], tail: &[u8], far: Far<'_>) -> Vec<Said> {
    let mut out = Vec::new();
    for (magic, at, uuid_at, label_at, label_len) in FIXED {
        if head.get(*at..at + magic.len()) == Some(*magic) {
            if *uuid_at > 0 {
                uuid(head, *uuid_at, &mut out);
            }
            label(head, *label_at, *label_len, &mut out);
        }
    }
    f2fs_label(head, &mut out);
    swap(head, &mut out);
    luks(head, &mut out);
    lvm(head, &mut out);
    md(head, &mut out);
    md(tail, &mut out);
    zfs(head, &mut out);
    zfs(tail, &mut out);
    super::fat::said(head, far, &mut out);
    let mut seen = std::collections::HashSet::new();
    out.retain(|s| !s.text.is_empty() && seen.insert(s.clone()));
    out
}

/// Adds an identifier.
pub fn add(out: &mut Vec<Said>, sort: Sort, text: impl Into<String>) {
    out.push(Said { sort, text: text.into() });
}

/// Bytes as text up to the first zero, without white space at the ends.
pub fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).trim().to_owned()
}

/// UTF-16LE as text up to the first zero, and no more of it than the longest label of a format has.
pub fn utf16(bytes: &[u8]) -> String {
    let bytes = &bytes[..bytes.len().min(LABEL_MAX)];
    let units = bytes.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]]));
    String::from_utf16_lossy(&units.take_while(|u| *u != 0).collect::<Vec<_>>()).trim().to_owned()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A UUID in the order of its bytes.
fn uuid(bytes: &[u8], at: usize, out: &mut Vec<Said>) {
    if let Some(id) = bytes.get(at..at + 16).filter(|id| id.iter().any(|b| *b != 0)) {
        let parts = [&id[..4], &id[4..6], &id[6..8], &id[8..10], &id[10..]];
        add(out, Sort::Uuid, parts.map(hex).join("-"));
    }
}

fn label(bytes: &[u8], at: usize, len: usize, out: &mut Vec<Said>) {
    if let Some(bytes) = bytes.get(at..at + len).filter(|_| len > 0) {
        add(out, Sort::Label, text(bytes));
    }
}

fn f2fs_label(head: &[u8], out: &mut Vec<Said>) {
    if head.get(0x400..0x404) == Some(&[0x10, 0x20, 0xf5, 0xf2]) {
        add(out, Sort::Label, utf16(head.get(0x47c..0x87c).unwrap_or_default()));
    }
}

/// True if a hibernated system waits on this device.
pub fn hibernated(head: &[u8]) -> bool {
    let words: [&[u8]; 4] = [b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001"];
    PAGES.iter().any(|page| head.get(page - 10..*page).is_some_and(|m| words.iter().any(|w| m.starts_with(w))))
}

/// True if a mark of swap stands at the end of a page of any size.
pub fn is_swap(head: &[u8]) -> bool {
    let words: [&[u8]; 2] = [b"SWAPSPACE2", b"SWAP-SPACE"];
    PAGES.iter().any(|page| head.get(page - 10..*page).is_some_and(|m| words.contains(&m)))
}

fn swap(head: &[u8], out: &mut Vec<Said>) {
    if is_swap(head) || hibernated(head) {
        uuid(head, 0x40c, out);
        label(head, 0x41c, 16, out);
    }
}

/// Both headers of LUKS; the second of version 2 has its magic backwards.
fn luks(head: &[u8], out: &mut Vec<Said>) {
    let second = LUKS2_SECOND.iter().filter(|at| head.get(**at..**at + 6) == Some(b"SKUL\xba\xbe"));
    let first = head.starts_with(b"LUKS\xba\xbe").then_some(&0);
    for at in first.into_iter().chain(second) {
        add(out, Sort::Uuid, text(head.get(at + 168..at + 208).unwrap_or_default()));
        if number(head, at + 6, 2) == 0x0200 {
            label(head, at + 24, 48, out);
        }
    }
}

/// The identifier of a physical volume of LVM and the name of its group. The label lies in one of the
/// first four sectors.
fn lvm(head: &[u8], out: &mut Vec<Said>) {
    for at in (0..4).map(|sector| sector * 512) {
        if head.get(at..at + 8) != Some(b"LABELONE") {
            continue;
        }
        let header = at + number(head, at + 20, 4).min(512) as usize;
        add(out, Sort::Uuid, text(head.get(header..header + 32).unwrap_or_default()));
        // `group {\nid = "…"\nseqno = 1`: every copy of the metadata in the first MiB.
        let find =
            |from: usize, word: &[u8]| Some(from + head.get(from..)?.windows(word.len()).position(|w| w == word)?);
        let mut from = 0;
        while let Some(at) = find(from, b" {\nid = \"") {
            from = at + 1;
            let id = head.get(at + 9..at + 47).unwrap_or_default();
            if !head.get(at + 47..).is_some_and(|rest| rest.starts_with(b"\"\nseqno")) {
                continue;
            }
            let is_name = |b: &u8| b.is_ascii_alphanumeric() || b"+_.-".contains(b);
            let name = head[..at].iter().rev().take_while(|b| is_name(b)).take(128).count();
            add(out, Sort::Group, text(&head[at - name..at]));
            add(out, Sort::Uuid, text(id));
        }
    }
}

/// MD superblocks in an edge of the device: version 0.90 and 1.x of either byte order of words.
fn md(edge: &[u8], out: &mut Vec<Said>) {
    for block in edge.chunks(512).filter(|c| c.starts_with(&MD)) {
        let at = |word: usize| block.get(word * 4..word * 4 + 4).unwrap_or_default();
        let swapped = |bytes: &[u8]| bytes.iter().rev().copied().collect::<Vec<u8>>();
        if number(block, 4, 4) == 0 {
            let words = [at(5), at(13), at(14), at(15)];
            add(out, Sort::Uuid, words.map(|w| hex(&swapped(w))).join(":"));
            add(out, Sort::Uuid, words.map(hex).join(":"));
        } else {
            add(out, Sort::Uuid, [at(4), at(5), at(6), at(7)].map(hex).join(":"));
            add(out, Sort::Uuid, hex(block.get(168..184).unwrap_or_default()));
            add(out, Sort::Array, text(block.get(32..64).unwrap_or_default()));
        }
    }
}

/// Names and numbers in the labels of ZFS, lists of XDR: a name, its length before it, then a type, a
/// count and the value.
fn zfs(edge: &[u8], out: &mut Vec<Said>) {
    let big = |at: usize| edge.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize);
    for (name, sort) in [("pool_guid", Sort::PoolNumber), ("guid", Sort::PoolNumber), ("name", Sort::Pool)] {
        let mut key = (name.len() as u32).to_be_bytes().to_vec();
        key.extend(name.as_bytes());
        key.resize(4 + name.len().next_multiple_of(4), 0);
        // Labels begin at multiples of 256 KiB, their lists 16 KiB later.
        for list in (0..edge.len()).step_by(128 << 10).flat_map(|at| [at, at + (16 << 10)]) {
            let Some(area) = edge.get(list..(list + (112 << 10)).min(edge.len())) else { continue };
            // The list's own head: encoding XDR, then byte order.
            if area.first() != Some(&1) {
                continue;
            }
            let places = area.windows(key.len()).enumerate().step_by(4).filter(|(_, w)| *w == key);
            for (at, _) in places.take(64) {
                let value = list + at + key.len();
                match (big(value), sort) {
                    (8, Sort::PoolNumber) => {
                        let bytes = edge.get(value + 8..value + 16).and_then(|b| b.try_into().ok());
                        let id = bytes.map_or(0, u64::from_be_bytes);
                        add(out, sort, if id > 0xffff_ffff { id.to_string() } else { String::new() });
                    }
                    (9, Sort::Pool) => {
                        let len = big(value + 8).min(256);
                        add(out, sort, text(edge.get(value + 12..value + 12 + len).unwrap_or_default()));
                    }
                    _ => {}
                }
            }
        }
    }
}

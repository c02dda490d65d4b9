//! What a drive held before: the ranges of its partitions, by every table that may describe them, and the places in
//! a range where a file system, an array or an encrypted volume leaves something to be known by.
//!
//! Places are known by where a format puts its superblocks, not by what is found there. Those near the ends of a
//! range fall into [`EDGE`].

use std::ops::Range;

use super::super::gpt;
use super::drive::Medium;
use super::mark;

/// Bytes at each end of a range that are wiped. Among them: every place of MD, LVM, ZFS and swap, both headers of
/// LUKS2 (the second one lies at 16 KiB to 4 MiB), the first superblock of btrfs, the sectors that RAID controllers
/// use (up to 1.6 MiB from the end), the backup sector of NTFS, the second superblocks of NILFS2 and F2FS.
pub const EDGE: u64 = 8 << 20;
/// Blocks that a GPT may count in, whatever the drive's are.
const TABLE_BLOCKS: [u64; 4] = [512, 1024, 2048, 4096];
/// Most logical partitions followed in an MBR's chain, and most entries read of a GPT.
const ENTRIES_MAX: u64 = 1024;
/// Bytes wiped at a place of one superblock.
const PLACE: u64 = 4096;
/// Most copies of superblocks that are followed on one drive, by what its superblocks say of themselves.
pub const COPIES_MAX: u64 = 1 << 18;
/// Superblocks far from both ends of their range: btrfs (64 MiB, 256 GiB, 1 PiB), Ceph's labels (1 to 1000 GiB).
const FAR: [u64; 7] = [64 << 20, 256 << 30, 1 << 50, 1 << 30, 10 << 30, 100 << 30, 1000 << 30];

/// Every range that may have been a partition, the whole drive and the partition to come among them; `kernel` are
/// those that the kernel shows. None is empty or reaches beyond the drive.
pub fn ranges(drive: &mut dyn Medium, kernel: &[Range<u64>]) -> Vec<Range<u64>> {
    let size = drive.size();
    let mut all = vec![0..size, gpt::START..size.saturating_sub(gpt::START)];
    all.extend(listed(drive, kernel));
    let inside = |r: Range<u64>| r.start.min(size)..r.end.min(size);
    let mut all: Vec<_> = all.into_iter().map(inside).filter(|r| !r.is_empty()).collect();
    all.sort_by_key(|r| (r.start, r.end));
    all.dedup();
    all
}

/// The partitions of the kernel, of a mark, of MBRs and of GPTs.
fn listed(drive: &mut dyn Medium, kernel: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut all = kernel.to_vec();
    if let Some(head) = sector(drive, 0, mark::BYTES as u64) {
        all.extend(mark::ranges(&head).unwrap_or_default());
    }
    for block in gpt::BLOCKS {
        all.extend(mbr(drive, block).0);
    }
    for block in TABLE_BLOCKS {
        let last = (drive.size() / block).saturating_sub(1);
        let mut headers = vec![1, last];
        headers.extend([1, last].iter().filter_map(|at| Some(number(&header(drive, block, *at)?, 32, 8))));
        headers.sort_unstable();
        headers.dedup();
        for at in headers {
            all.extend(gpt_entries(drive, block, at));
        }
    }
    all
}

/// The ranges that nothing else tells of once the first block is overwritten: those of the kernel and of an MBR, and
/// the allocation groups of an XFS on the whole drive, whose superblock is that block. Those of a GPT follow.
pub fn to_remember(drive: &mut dyn Medium, kernel: &[Range<u64>]) -> Vec<Range<u64>> {
    let size = drive.size();
    let mut all = kernel.to_vec();
    for block in gpt::BLOCKS {
        all.extend(mbr(drive, block).0);
    }
    if let Some(group) = sector(drive, 0, 4096).and_then(|head| xfs_group(&head)) {
        all.extend((1..(size / group + 1).min(mark::RANGES as u64)).map(|g| g * group..((g + 1) * group).min(size)));
    }
    all.extend(listed(drive, &[]));
    let mut seen = std::collections::HashSet::new();
    all.retain(|r| !r.is_empty() && r.start < size && seen.insert(r.clone()));
    all
}

/// Where the tables themselves lie: they are wiped last, since they say what else is to be wiped.
pub fn tables(drive: &mut dyn Medium) -> Vec<Range<u64>> {
    let size = drive.size();
    let mut all = vec![0..64 << 10, size.saturating_sub(64 << 10)..size];
    for block in gpt::BLOCKS {
        all.extend(mbr(drive, block).1);
    }
    for block in TABLE_BLOCKS {
        let last = (size / block).saturating_sub(1);
        for at in [1, last] {
            let Some(h) = header(drive, block, at) else { continue };
            for at in [number(&h, 32, 8), number(&h, 72, 8)] {
                let start = at.saturating_mul(block);
                all.push(start..start.saturating_add(32 << 10));
            }
        }
    }
    all
}

/// Places in `range` that only what lies there tells of: the copies of ext's superblock and XFS's allocation groups.
/// They go before the first superblock, which says where they are. `left` is how many more copies may be followed on the
/// whole drive: what stands on a drive must not make staging it endless.
pub fn copies(drive: &mut dyn Medium, range: &Range<u64>, left: &mut u64) -> Vec<Range<u64>> {
    let len = range.end - range.start;
    let mut all = Vec::new();
    let mut add = |at: u64, bytes: u64| {
        if let Some(start) = range.start.checked_add(at)
            && at < len
        {
            all.push(start..start.saturating_add(bytes).min(range.end));
        }
    };
    let head = sector(drive, range.start, 4096.min(len)).unwrap_or_default();
    let mut follow = |group: u64| {
        let last = (len / group).min(*left);
        *left -= last;
        1..last + 1
    };
    if head.get(0x438..0x43a) == Some(&[0x53, 0xef]) && number(&head, 0x418, 4) <= 6 {
        let block = 1024u64 << number(&head, 0x418, 4);
        let group = block * number(&head, 0x420, 4).max(64);
        follow(group).for_each(|g| add(g * group, PLACE));
    }
    if let Some(group) = xfs_group(&head) {
        follow(group).for_each(|g| add(g * group, 4 * PLACE));
    }
    // Where mke2fs puts them if nobody tells it otherwise: groups of 8 blocks' bits, at 1 and powers of 3, 5 and 7.
    for block in [1024u64, 2048, 4096, 65536] {
        let group = 8 * block * block;
        for g in sparse(len / group + 1) {
            add(g * group, PLACE);
        }
    }
    all
}

/// Places in `range` that are the same for all that could lie there.
pub fn places(range: &Range<u64>) -> Vec<Range<u64>> {
    let mut all = vec![
        range.start..range.end.min(range.start.saturating_add(EDGE)),
        range.end.saturating_sub(EDGE).max(range.start)..range.end,
    ];
    for at in FAR {
        if at < range.end - range.start {
            let start = range.start + at;
            all.push(start..(start + PLACE).min(range.end));
        }
    }
    all
}

/// Bytes of an allocation group of the XFS whose superblock this is.
fn xfs_group(head: &[u8]) -> Option<u64> {
    let be = |at: usize| Some(u64::from(u32::from_be_bytes(*head.get(at..)?.first_chunk()?)));
    let group = be(4)?.checked_mul(be(84)?)?;
    (head.starts_with(b"XFSB") && group >= 1 << 16).then_some(group)
}

/// Groups below `count` with a copy of the superblock: 1 and the powers of 3, 5 and 7.
fn sparse(count: u64) -> Vec<u64> {
    let powers = |base: u64| std::iter::successors(Some(base), move |n| n.checked_mul(base));
    let mut all: Vec<u64> = [3, 5, 7].into_iter().flat_map(|b| powers(b).take_while(|n| *n < count)).collect();
    all.extend((count > 1).then_some(1));
    all
}

fn sector(drive: &mut dyn Medium, at: u64, len: u64) -> Option<Vec<u8>> {
    let inside = at.checked_add(len).is_some_and(|end| end <= drive.size());
    // What cannot be read is of no use to anybody else either; writing to it will say so.
    if inside { drive.get(at, len).ok() } else { None }
}

fn number(bytes: &[u8], at: usize, n: usize) -> u64 {
    bytes.get(at..at + n).unwrap_or_default().iter().rev().fold(0, |v, b| v << 8 | u64::from(*b))
}

/// The header of a GPT in this block, damaged or not.
fn header(drive: &mut dyn Medium, block: u64, at: u64) -> Option<Vec<u8>> {
    sector(drive, at.checked_mul(block)?, 512).filter(|h| h.starts_with(b"EFI PART"))
}

fn gpt_entries(drive: &mut dyn Medium, block: u64, at: u64) -> Vec<Range<u64>> {
    let Some(h) = header(drive, block, at) else { return Vec::new() };
    let (first, count, bytes) = (number(&h, 72, 8), number(&h, 80, 4).min(ENTRIES_MAX), number(&h, 84, 4));
    if !(128..=4096).contains(&bytes) {
        return Vec::new();
    }
    let Some(entries) = first.checked_mul(block).and_then(|at| sector(drive, at, count * bytes)) else {
        return Vec::new();
    };
    let entry = |e: &[u8]| {
        let last = number(e, 40, 8).checked_add(1)?;
        Some(number(e, 32, 8).checked_mul(block)?..last.checked_mul(block)?)
    };
    entries.chunks(bytes as usize).filter(|e| e.iter().take(16).any(|b| *b != 0)).filter_map(entry).collect()
}

/// Primary and logical partitions of an MBR whose numbers count blocks of `block` bytes, and the tables of its chain.
fn mbr(drive: &mut dyn Medium, block: u64) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
    let (mut all, mut tables) = (Vec::new(), Vec::new());
    // (block of the table, block that its own extended entries count from)
    let mut next = vec![(0u64, 0u64)];
    let mut seen = 0;
    while let Some((at, base)) = next.pop() {
        seen += 1;
        let Some(table) = sector(drive, at.saturating_mul(block), 512) else { continue };
        if seen > ENTRIES_MAX || table[510..] != [0x55, 0xaa] {
            continue;
        }
        tables.push(at * block..at * block + 512);
        for entry in table[446..510].chunks(16) {
            let (kind, first, count) = (entry[4], number(entry, 8, 4), number(entry, 12, 4));
            if kind == 0 || count == 0 {
                continue;
            }
            if matches!(kind, 0x05 | 0x0f | 0x85) {
                next.push((base + first, if base == 0 { first } else { base }));
            }
            // A logical partition counts from its own table, an extended one from the first of them.
            let start = first + if matches!(kind, 0x05 | 0x0f | 0x85) { base } else { at };
            all.push(start.saturating_mul(block)..(start + count).saturating_mul(block));
        }
    }
    (all, tables)
}

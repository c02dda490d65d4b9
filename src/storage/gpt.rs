//! A GUID partition table with one partition: what other programs need to see that a drive is in
//! use. UEFI Specification 2.10 §5.3.

use std::ops::Range;

use rand::RngExt;

/// Type of the partition that holds models, as its bytes lie on the drive.
pub const TYPE: [u8; 16] = *b"nt-gguf-weights\x01";
/// Type of an EFI system partition, likewise.
pub const EFI_SYSTEM: [u8; 16] = guid_bytes(0xc12a_7328, 0xf81f, 0x11d2, *b"\xba\x4b\x00\xa0\xc9\x3e\xc9\x3b");
/// Type of a partition that a BIOS boot loader lies in, likewise.
pub const BIOS_BOOT: [u8; 16] = guid_bytes(0x2168_6148, 0x6449, 0x6e6f, *b"\x74\x4e\x65\x65\x64\x45\x46\x49");
/// Bytes of a logical block that drives have.
pub const BLOCKS: [u64; 2] = [512, 4096];
/// The partition begins here, and as many bytes are left at the end of the drive.
pub const START: u64 = 1 << 20;

/// First bytes of a drive that [`find`] looks at.
pub const HEAD: u64 = 2 * 4096 + (ENTRY_BYTES * ENTRIES) as u64;

const ENTRY_BYTES: usize = 128;
const ENTRIES: usize = 128;
const HEADER_BYTES: u32 = 92;

/// Bytes to write at an offset of the drive.
pub type Write = (u64, Vec<u8>);

/// The writes that make a table of one partition on a drive of `size` bytes in blocks of `block`:
/// backup first, the first block of the drive last.
pub fn table(size: u64, block: u64) -> Vec<Write> {
    named(size, block, guid(), guid())
}

/// Whether the first and last MiB of a drive hold a table as [`table`] makes it and nothing else.
pub fn is_ours(head: &[u8], tail: &[u8], size: u64, block: u64) -> bool {
    let id = |at: u64| head.get(at as usize..).and_then(|b| b.first_chunk::<16>().copied());
    let whole = START as usize;
    let (Some(partition), Some(disk)) = (id(2 * block + 16), id(block + 56)) else { return false };
    if size < 3 * START || !BLOCKS.contains(&block) || head.len() != whole || tail.len() != whole {
        return false;
    }
    let (mut first, mut last) = (vec![0; whole], vec![0; whole]);
    for (at, bytes) in named(size, block, disk, partition) {
        let (edge, at) = if at < START { (&mut first, at) } else { (&mut last, at - (size - START)) };
        edge[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
    }
    first == head && last == tail
}

fn named(size: u64, block: u64, disk: [u8; 16], partition: [u8; 16]) -> Vec<Write> {
    let blocks = size / block;
    let entries_blocks = (ENTRY_BYTES * ENTRIES) as u64 / block;
    let (first, last) = (START / block, (size - START) / block - 1);
    let mut entries = vec![0u8; ENTRY_BYTES * ENTRIES];
    entries[..16].copy_from_slice(&TYPE);
    entries[16..32].copy_from_slice(&partition);
    entries[32..40].copy_from_slice(&first.to_le_bytes());
    entries[40..48].copy_from_slice(&last.to_le_bytes());
    for (i, c) in "nt models".encode_utf16().enumerate() {
        entries[56 + 2 * i..58 + 2 * i].copy_from_slice(&c.to_le_bytes());
    }
    let header = |own: u64, other: u64, entries_at: u64| {
        let mut h = vec![0u8; block as usize];
        h[..8].copy_from_slice(b"EFI PART");
        h[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
        h[12..16].copy_from_slice(&HEADER_BYTES.to_le_bytes());
        let numbers = [own, other, 2 + entries_blocks, blocks - entries_blocks - 2];
        for (i, n) in numbers.into_iter().enumerate() {
            h[24 + 8 * i..32 + 8 * i].copy_from_slice(&n.to_le_bytes());
        }
        h[56..72].copy_from_slice(&disk);
        h[72..80].copy_from_slice(&entries_at.to_le_bytes());
        h[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
        h[84..88].copy_from_slice(&(ENTRY_BYTES as u32).to_le_bytes());
        h[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
        let sum = crc32(&h[..HEADER_BYTES as usize]);
        h[16..20].copy_from_slice(&sum.to_le_bytes());
        h
    };
    // The protective MBR: one partition of type 0xEE over everything.
    let mut mbr = vec![0u8; block as usize];
    mbr[446..462].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    let covered = u32::try_from(blocks - 1).unwrap_or(u32::MAX);
    mbr[458..462].copy_from_slice(&covered.to_le_bytes());
    mbr[510..512].copy_from_slice(&[0x55, 0xaa]);
    let backup = blocks - 1 - entries_blocks;
    vec![
        (backup * block, entries.clone()),
        ((blocks - 1) * block, header(blocks - 1, 1, backup)),
        (2 * block, entries.clone()),
        (block, header(1, blocks - 1, 2)),
        (0, mbr),
    ]
}

/// Bytes of our partition, found in the first MiB of a drive with blocks of `block` bytes.
pub fn find(head: &[u8], block: u64) -> Option<Range<u64>> {
    let entry = entries(head, block)?.chunks(ENTRY_BYTES).find(|e| e[..16] == TYPE)?;
    let number = |at: usize| entry[at..at + 8].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
    Some(number(32).checked_mul(block)?..number(40).checked_add(1)?.checked_mul(block)?)
}

/// Types of the partitions in the first MiB of a drive, as their bytes lie there. A damaged table is
/// read too, as firmware may.
pub fn types(head: &[u8], block: u64) -> Vec<[u8; 16]> {
    let number = |at: usize, n: usize| {
        let bytes = head.get(block as usize + at..block as usize + at + n).unwrap_or_default();
        bytes.iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b))
    };
    if number(0, 8) != u64::from_le_bytes(*b"EFI PART") {
        return Vec::new();
    }
    let (first, count, size) = (number(72, 8).saturating_mul(block), number(80, 4), number(84, 4).max(16));
    let entry = |i: u64| head.get(usize::try_from(first.checked_add(i * size)?).ok()?..)?.first_chunk::<16>().copied();
    (0..count.min(4096)).map_while(entry).filter(|t| *t != [0; 16]).collect()
}

/// The entries of a sound table.
fn entries(head: &[u8], block: u64) -> Option<&[u8]> {
    let header = head.get(block as usize..block as usize + HEADER_BYTES as usize)?;
    let mut blank = header.to_vec();
    blank[16..20].fill(0);
    let entries = head.get(2 * block as usize..2 * block as usize + ENTRY_BYTES * ENTRIES)?;
    let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let sound = header.starts_with(b"EFI PART") && u32_at(16) == crc32(&blank) && u32_at(88) == crc32(entries);
    sound.then_some(entries)
}

/// A GUID as it lies on a drive: its first three fields in little-endian order.
const fn guid_bytes(a: u32, b: u16, c: u16, rest: [u8; 8]) -> [u8; 16] {
    let (a, b, c, r) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes(), rest);
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]]
}

/// A random GUID, version 4.
fn guid() -> [u8; 16] {
    let mut bytes = [0u8; 16];
    rand::rng().fill(&mut bytes[..]);
    bytes[7] = bytes[7] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

/// CRC-32 as GPT uses it (ISO 3309).
pub(super) fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |c: u32, b| CRC[usize::from(c as u8 ^ b)] ^ c >> 8)
}

/// The remainder of each byte.
const CRC: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let (mut c, mut bit) = (i as u32, 0);
        while bit < 8 {
            c = if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 };
            bit += 1;
        }
        table[i] = c;
        i += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_partition_is_found_again_and_damage_is_seen() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        for block in [512, 4096] {
            let size = 64u64 << 20;
            let mut drive = vec![0u8; size as usize];
            for (at, bytes) in table(size, block) {
                drive[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
            }
            assert_eq!(find(&drive[..1 << 20], block), Some(START..size - START));
            let ours = |drive: &[u8]| is_ours(&drive[..1 << 20], &drive[drive.len() - (1 << 20)..], size, block);
            assert!(ours(&drive));
            // One bit anywhere in either MiB is somebody else's.
            for at in (0..1usize << 20).step_by(9973).chain([0, 446, 450, 510, block as usize, 3 * block as usize - 1])
            {
                for at in [at, drive.len() - 1 - at] {
                    // Either GUID may be any, in both copies alike: in one copy it may not.
                    drive[at] ^= 1;
                    assert!(!ours(&drive), "byte {at}");
                    drive[at] ^= 1;
                }
            }
            let backup = &drive[(size - block) as usize..];
            assert!(backup.starts_with(b"EFI PART"));
            drive[2 * block as usize + 40] ^= 1;
            assert_eq!(find(&drive[..1 << 20], block), None);
        }
    }
}

//! The first block of a drive that is being staged. It stands from the moment when what was there is given up until
//! the image is whole, and is replaced by the table of partitions in the last write: whatever ends a staging in
//! between, the drive says of itself that it holds nothing, and staging it again needs no other permission.
//!
//! Layout, little-endian: magic, version, number of ranges, then first byte and length of each range that held a
//! partition; CRC-32C of all that at byte 500. The rest is zero, so that nobody takes it for a boot sector.

use std::ops::Range;

use super::super::checksum::crc32c;

/// First bytes of a mark.
pub const MAGIC: &[u8; 8] = b"NTSTAGE1";
const VERSION: u32 = 1;
const SUM_AT: usize = 500;
/// Bytes of a mark.
pub const BYTES: usize = 512;
/// Most ranges that one holds.
pub const RANGES: usize = (SUM_AT - 16) / 16;

/// A mark that remembers the first [`RANGES`] of `ranges`.
pub fn mark(ranges: &[Range<u64>]) -> Vec<u8> {
    let ranges = &ranges[..ranges.len().min(RANGES)];
    let mut out = Vec::with_capacity(BYTES);
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend((ranges.len() as u32).to_le_bytes());
    for range in ranges {
        out.extend(range.start.to_le_bytes());
        out.extend((range.end - range.start).to_le_bytes());
    }
    out.resize(SUM_AT, 0);
    out.extend(crc32c(&out).to_le_bytes());
    out.resize(BYTES, 0);
    out
}

/// The ranges of the mark that a drive with these first bytes has; none where there is no mark.
pub fn ranges(head: &[u8]) -> Option<Vec<Range<u64>>> {
    let head = head.get(..BYTES)?;
    let number = |at: usize, n: usize| head[at..at + n].iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b));
    let count = number(12, 4);
    let sound = head.starts_with(MAGIC)
        && number(8, 4) == u64::from(VERSION)
        && count <= RANGES as u64
        && number(SUM_AT, 4) == u64::from(crc32c(&head[..SUM_AT]));
    let range = |i: usize| {
        let start = number(16 + 16 * i, 8);
        Some(start..start.checked_add(number(24 + 16 * i, 8))?)
    };
    sound.then(|| (0..count as usize).filter_map(range).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_come_back_and_no_changed_byte_does() {
        let all: Vec<_> = (1..100u64).map(|i| i << 20..(i + 3) << 20).collect();
        let mut head = mark(&all);
        assert_eq!(ranges(&head), Some(all[..RANGES].to_vec()));
        assert_eq!(ranges(&mark(&[])), Some(vec![]));
        assert_eq!(&head[504..], [0; 8]);
        for i in 0..504 {
            head[i] ^= 1;
            assert_eq!(ranges(&head), None, "byte {i}");
            head[i] ^= 1;
        }
    }
}

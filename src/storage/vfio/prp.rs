//! Physical region pages. NVMe Base 2.0 §4.1.1. The memory is contiguous in the I/O address space,
//! so entries are arithmetic.

/// Bytes of a memory page (CC.MPS = 0).
pub const PAGE: u64 = 4096;
/// Entries of a list page.
pub const LIST_ENTRIES: usize = 512;
/// Most bytes one command can carry with one list page, whatever the offset of its first byte.
pub const MAX_BYTES: u64 = (LIST_ENTRIES as u64) * PAGE;

/// The two PRP fields of a command for `len` bytes at `iova`; `entry(i, address)` is called for each
/// entry of the list at `list`. `None` if the length is 0 or needs more than one list page, or the
/// address is not a multiple of 4.
pub fn build(iova: u64, len: u64, list: u64, mut entry: impl FnMut(usize, u64)) -> Option<(u64, u64)> {
    if len == 0 || !iova.is_multiple_of(4) {
        return None;
    }
    let first = iova & !(PAGE - 1);
    let pages = (iova % PAGE + len).div_ceil(PAGE);
    match pages {
        1 => Some((iova, 0)),
        2 => Some((iova, first + PAGE)),
        _ if pages as usize - 1 > LIST_ENTRIES => None,
        _ => {
            for i in 1..pages {
                entry(i as usize - 1, first + i * PAGE);
            }
            Some((iova, list))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn covered(iova: u64, len: u64) -> Option<(u64, Vec<u64>)> {
        let mut list = Vec::new();
        let (prp1, prp2) = build(iova, len, 0xabc000, |i, a| {
            assert_eq!(i, list.len());
            list.push(a);
        })?;
        if prp2 != 0 && prp2 != 0xabc000 {
            list.push(prp2);
        }
        Some((prp1, list))
    }

    #[test]
    fn pages_cover_the_bytes_exactly() {
        for offset in [0, 4, 512, 4092] {
            for len in [1, 4, 512, 4095, 4096, 4097, 8192, 8193, 1 << 20, (1 << 20) + 1] {
                let (prp1, rest) = covered(0x10_0000 + offset, len).unwrap();
                assert_eq!(prp1, 0x10_0000 + offset);
                let last = (0x10_0000 + offset + len - 1) / PAGE;
                assert_eq!(rest.len() as u64, last - 0x100);
                for (i, page) in rest.iter().enumerate() {
                    assert_eq!(*page, (0x101 + i as u64) * PAGE);
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(covered(0, MAX_BYTES + PAGE).is_some());
        assert!(covered(0, MAX_BYTES + PAGE + 1).is_none());
        assert!(covered(4, MAX_BYTES + PAGE).is_none());
        assert!(covered(2, 512).is_none());
        assert!(covered(0, 0).is_none());
    }
}

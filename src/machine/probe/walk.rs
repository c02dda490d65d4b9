//! In which order a probe reads a file.

use crate::storage::CHUNK_BYTES;

/// Offsets of reads of one size. Blocks smaller than those that weights are read in are scattered over the file, each
/// read once per round: the kernel makes one read of neighbours that are submitted together, which would count as many.
/// Larger ones follow one another, as weights do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walk {
    len: u64,
    block: u64,
    /// Blocks from one read to the next; 1 in the file's order.
    step: u64,
    /// Reads so far.
    n: u64,
}

impl Walk {
    /// Over `len` bytes in reads of `block`, which is at most `len`; goes on after `from` reads. Without `scatter` all
    /// sizes are read in order, for files that come through the page cache.
    pub(super) fn new(len: u64, block: u64, scatter: bool, from: u64) -> Walk {
        let step = if scatter && block < CHUNK_BYTES { step(len / block) } else { 1 };
        Walk { len, block, step, n: from }
    }

    /// Where the next read begins.
    pub(super) fn next(&mut self) -> u64 {
        let blocks = (self.len / self.block).max(1);
        let i = u128::from(self.n % blocks) * u128::from(self.step) % u128::from(blocks);
        self.n += 1;
        i as u64 * self.block
    }

    /// Reads so far.
    pub(super) fn reads(&self) -> u64 {
        self.n
    }
}

/// A step near the golden section of `n`, with no factor of it: steps of it meet every block once.
fn step(n: u64) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let first = (n as f64 * 0.618) as u64;
    (first.max(1)..).find(|s| gcd(*s, n) == 1).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_blocks_are_scattered_and_each_is_read_once() {
        for blocks in [1, 2, 3, 1000, 1024, 9973] {
            let mut walk = Walk::new(blocks * 4096 + 7, 4096, true, 0);
            let mut seen: Vec<u64> = (0..blocks).map(|_| walk.next()).collect();
            let neighbours = seen.windows(2).filter(|w| w[0].abs_diff(w[1]) == 4096).count();
            assert!(blocks < 1000 || neighbours == 0, "{neighbours} of {blocks}");
            assert_eq!(walk.reads(), blocks);
            seen.sort_unstable();
            assert_eq!(seen, (0..blocks).map(|i| i * 4096).collect::<Vec<_>>());
        }
    }

    #[test]
    fn large_blocks_follow_one_another() {
        let mut walk = Walk::new(3 << 20, 1 << 20, true, 2);
        assert_eq!([walk.next(), walk.next(), walk.next()], [2 << 20, 0, 1 << 20]);
        let mut buffered = Walk::new(3 << 20, 4096, false, 0);
        assert_eq!([buffered.next(), buffered.next()], [0, 4096]);
    }
}

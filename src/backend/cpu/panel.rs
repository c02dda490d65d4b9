//! Products of bulk rows: rows are unpacked and interleaved a block at a time, so that a lane
//! is a row, and a block meets all tokens before the next one is unpacked.
//!
//! A panel holds four bytes of each of 16 rows side by side: 64 bytes that meet four bytes of a
//! token, broadcast. Sums stay in the lanes of their rows; a scale is applied once for 16 elements
//! of 16 rows. On 512-bit registers, 16 elements of 16 rows and one token take 4 multiply-add
//! instructions of 8 bits, a conversion and 3 instructions for scale and min.

use super::kernel::{Activation, Dot, Job, Unpack, dispatch, put};
use super::unpack::{self, PACKET, Packet, SUB, SUBS};

/// Rows of a panel.
pub(super) const ROWS: usize = 16;
/// Most tokens whose sums are held while a panel is multiplied.
const TOKENS: usize = 8;

/// 256 elements of each of [`ROWS`] rows: the packets of the rows, interleaved.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct Panel {
    /// Elements `4k..4k + 4` of row r at `(k * ROWS + r) * 4`.
    pub q: [u8; ROWS * PACKET],
    /// `[group][row]`
    pub scale: [[f32; ROWS]; SUBS],
    /// `[group][row]`
    pub min: [[f32; ROWS]; SUBS],
}

// SAFETY: arrays of plain numbers without padding; all zeroes is a value.
unsafe impl bytemuck::Zeroable for Panel {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Panel {}
const _: () = assert!(size_of::<Panel>() == ROWS * size_of::<Packet>());

/// Rows `from..to` with all tokens of a job.
///
/// # Safety
/// The contract of [`Rows`](super::kernel::Rows); the instruction set must be there.
#[inline(always)]
pub(super) unsafe fn all_rows<D: Dot>(j: &Job, from: usize, to: usize, scratch: &mut [Panel]) {
    let packets = j.cols.div_ceil(PACKET);
    let (block, rest) = scratch.split_at_mut(packets);
    let unpacked = &mut bytemuck::cast_slice_mut::<Panel, Packet>(rest)[..ROWS];
    for first in (from..to).step_by(ROWS) {
        let n = (to - first).min(ROWS);
        for (start, panel) in block.iter_mut().enumerate() {
            // Rows that are not there keep what an earlier block left: nobody looks at their sums.
            dispatch(D::ISA, Unpack { job: j, rows: first..first + n, start, out: &mut unpacked[..n] });
            if let Some(rows) = unpacked.first_chunk() {
                // SAFETY: the caller's, as above.
                unsafe { D::interleave(rows, panel) };
            }
        }
        // SAFETY: the caller's, as above.
        unsafe {
            match (j.fine, unpack::is_wide(j.ty), unpack::is_paired(j.ty)) {
                (false, false, false) => all_tokens::<D, false, false, false>(j, first, n, block),
                (false, false, true) => all_tokens::<D, false, false, true>(j, first, n, block),
                (false, true, false) => all_tokens::<D, true, false, false>(j, first, n, block),
                (false, true, true) => all_tokens::<D, true, false, true>(j, first, n, block),
                (true, false, _) => all_tokens::<D, false, true, false>(j, first, n, block),
                (true, true, _) => all_tokens::<D, true, true, false>(j, first, n, block),
            }
        }
    }
}

/// One block with all tokens, a few at a time.
#[inline(always)]
unsafe fn all_tokens<D: Dot, const WIDE: bool, const FINE: bool, const PAIR: bool>(
    j: &Job,
    row: usize,
    rows: usize,
    block: &[Panel],
) {
    let mut t = 0;
    while t < j.tokens {
        // SAFETY: the caller's, as above.
        unsafe {
            t += match j.tokens - t {
                TOKENS.. if !FINE => tokens::<D, TOKENS, WIDE, FINE, PAIR>(j, row, rows, t, block),
                4.. => tokens::<D, 4, WIDE, FINE, PAIR>(j, row, rows, t, block),
                2.. => tokens::<D, 2, WIDE, FINE, PAIR>(j, row, rows, t, block),
                _ => tokens::<D, 1, WIDE, FINE, PAIR>(j, row, rows, t, block),
            }
        }
    }
}

/// One block with `T` tokens from `first`; returns `T`.
#[inline(always)]
unsafe fn tokens<D: Dot, const T: usize, const WIDE: bool, const FINE: bool, const PAIR: bool>(
    j: &Job,
    row: usize,
    rows: usize,
    first: usize,
    block: &[Panel],
) -> usize {
    let x = std::array::from_fn(|t| j.x.wrapping_add((first + t) * block.len()));
    // SAFETY: the caller's, as above: each token has as many packets as the block.
    unsafe {
        let sums = D::panel::<T, WIDE, FINE, PAIR>(block, x, j.cols / SUB);
        for (t, sums) in sums.iter().enumerate() {
            for (r, sum) in sums[..rows].iter().enumerate() {
                put::<D>(j, row + r, first + t, *sum);
            }
        }
    }
    T
}

/// Portable products, of a panel that holds the packets of its rows one after another; see
/// [`Dot::panel`].
///
/// # Safety
/// Each address of `x` has as many packets as `w`; the instruction set must be there.
#[inline(always)]
pub(super) unsafe fn multiply<D: Dot, const T: usize, const WIDE: bool, const FINE: bool>(
    w: &[Panel],
    x: [*const Activation; T],
    groups: usize,
) -> [[f32; ROWS]; T] {
    let mut out = [[0.0; ROWS]; T];
    for r in 0..ROWS {
        // SAFETY: the caller's, as above.
        unsafe {
            let mut acc = [D::zero(); T];
            for (i, w) in w.iter().enumerate() {
                let packets: &[Packet] = bytemuck::cast_slice(std::slice::from_ref(w));
                let parts = (groups - i * SUBS).min(SUBS).div_ceil(4);
                for (acc, x) in acc.iter_mut().zip(&x) {
                    *acc = D::packet::<WIDE, FINE>(&packets[r], &*x.add(i), parts, *acc);
                }
            }
            for (out, acc) in out.iter_mut().zip(acc) {
                out[r] = D::sum(acc);
            }
        }
    }
    out
}

//! How `kernels/few.cu` cuts a product's rows into pieces. Pure arithmetic.

use super::args::XBLK_BYTES;
use crate::gguf::TensorType;

/// Threads of a block: sixteen warps that compute, one that copies and one that stores.
pub(super) const THREADS: u32 = 576;
/// Most tokens of a launch.
pub(super) const TOKENS: usize = 8;
const WARPS: usize = 16;
/// Rows of a tile; of SwiGLU's, half of them are gate's and half up's.
const ROWS: usize = 16;
/// Shared memory that the kernels declare themselves.
const FIXED_BYTES: usize = 16640;
/// Largest stage, and bytes of stages beyond which copies run slower.
const STAGE_BYTES: usize = 48 << 10;
const RING_BYTES: usize = 108 << 10;
/// Stages below this keep the memory waiting: columns are rather multiplied in several goes.
const LEAST_RING: usize = 48 << 10;
const STAGES_MAX: usize = 8;

/// Numbers that the kernel is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pieces {
    /// Columns of a launch: all, or a part, whose results the next launch is added to.
    pub cols: usize,
    /// Blocks of a row that a stage holds.
    pub piece: usize,
    pub stages: usize,
    /// Bytes between the copies of a stage.
    pub run_pitch: usize,
    /// Bytes of shared memory: stages and activations.
    pub shared: usize,
}

/// Parts into which warps divide a block's columns, as `Lanes` of `kernels/tiles.cuh`.
fn units(ty: TensorType) -> usize {
    match ty {
        TensorType::Q2_K | TensorType::Q3_K => 2,
        TensorType::Q4_K | TensorType::Q5_K | TensorType::Q6_K => 4,
        TensorType::IQ4_XS => 8,
        _ => 1,
    }
}

/// A little more than a multiple of 128 bytes, so that rows lie in different banks.
fn apart(bytes: usize) -> usize {
    bytes.next_multiple_of(128) + 16
}

/// Room for `blocks` blocks from any address; decoders read a word beyond.
fn run_pitch(ty: TensorType, blocks: usize) -> usize {
    apart(blocks * ty.block_bytes() + 15 + 8)
}

/// Number of row tiles of matrices with so many rows.
pub(super) fn tiles(rows: &[usize], swiglu: bool) -> usize {
    if swiglu { rows[0].div_ceil(ROWS / 2) } else { rows.iter().map(|r| r.div_ceil(ROWS)).sum() }
}

/// The pieces for `tokens` rows of activations on a GPU whose blocks may have `shared` bytes; `None` if
/// nothing fits beside them, or if rows of activations are odd numbers of blocks, which copies of 16 bytes
/// do not reach. SwiGLU's sums must be whole, others may be made in parts.
pub(super) fn pieces(ty: TensorType, cols: usize, swiglu: bool, tokens: usize, shared: usize) -> Option<Pieces> {
    let elems = ty.block_elems();
    if !cols.is_multiple_of(64) {
        return None;
    }
    let of = |goes: usize| {
        let blocks = even(ty, (cols / elems).div_ceil(goes));
        let activations = tokens * apart(blocks * elems / 32 * XBLK_BYTES);
        let room = shared.checked_sub(FIXED_BYTES + activations)?;
        let piece = piece(ty, blocks, room)?;
        let run_pitch = run_pitch(ty, piece);
        let stages = (RING_BYTES.min(room) / (ROWS * run_pitch)).clamp(2, STAGES_MAX);
        let ring = stages * ROWS * run_pitch;
        Some(Pieces { cols: blocks * elems, piece, stages, run_pitch, shared: ring + activations })
    };
    let ring = |p: &Pieces| p.stages * ROWS * p.run_pitch;
    let most = if swiglu { 1 } else { (cols / elems).min(8) };
    let enough = |p: &Pieces| ring(p) >= LEAST_RING || p.piece * elems >= p.cols;
    (1..=most).filter_map(of).find(enough).or_else(|| (1..=most).filter_map(of).max_by_key(ring))
}

/// Blocks that hold an even number of blocks of activations.
fn even(ty: TensorType, blocks: usize) -> usize {
    if ty.block_elems() == 32 { blocks.next_multiple_of(2) } else { blocks }
}

/// Blocks a stage: those with which the warps go over a row in the fewest steps, and the largest of these.
fn piece(ty: TensorType, blocks: usize, room: usize) -> Option<usize> {
    let fits = |piece: &usize| 2 * ROWS * run_pitch(ty, *piece) <= room.min(2 * STAGE_BYTES);
    let steps = |piece: usize| {
        let whole = blocks / piece * (piece * units(ty)).div_ceil(WARPS);
        whole + (blocks % piece * units(ty)).div_ceil(WARPS)
    };
    let largest = (1..=blocks).map(|count| even(ty, blocks.div_ceil(count))).find(fits)?;
    (largest.div_ceil(2)..=largest).rev().filter(|p| *p == even(ty, *p)).min_by_key(|p| steps(*p))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::modules::QUANTS;

    const H100: usize = 232_448;
    const RTX_5060_TI: usize = 101_376;

    #[test]
    fn well_known_shapes_keep_all_warps_busy() {
        for (ty, cols, tokens, goes) in [
            (TensorType::Q8_0, 4096, 8, 1),
            (TensorType::Q8_0, 14336, 8, 1),
            (TensorType::Q4_K, 5120, 8, 1),
            (TensorType::Q4_K, 27648, 2, 1),
            (TensorType::Q4_K, 27648, 8, 2),
            (TensorType::Q6_K, 27648, 8, 2),
        ] {
            let p = pieces(ty, cols, false, tokens, H100).unwrap();
            assert_eq!(cols.div_ceil(p.cols), goes, "{ty} {cols}: {p:?}");
            let blocks = p.cols / ty.block_elems();
            let least = (blocks * units(ty)).div_ceil(WARPS);
            let steps = blocks / p.piece * (p.piece * units(ty)).div_ceil(WARPS)
                + (blocks % p.piece * units(ty)).div_ceil(WARPS);
            assert!(steps * 10 <= least * 12, "{ty} {cols}: {steps} steps instead of {least}: {p:?}");
        }
    }

    #[test]
    fn every_type_and_shape_fits_and_rows_lie_in_different_banks() {
        for ty in QUANTS {
            for cols in [256, 512, 576, 1536, 2048, 4096, 5120, 8192, 14336, 27648, 53248] {
                let cols = cols / ty.block_elems() * ty.block_elems();
                for (swiglu, tokens) in [(false, 2), (false, 5), (false, 8), (true, 2), (true, 8)] {
                    for shared in [H100, RTX_5060_TI] {
                        let Some(p) = pieces(ty, cols, swiglu, tokens, shared) else {
                            assert!(
                                swiglu && tokens * cols / 32 * XBLK_BYTES + 40_000 > shared,
                                "{ty} {cols} {tokens}"
                            );
                            continue;
                        };
                        assert!(p.shared + FIXED_BYTES <= shared, "{ty} {cols}: {p:?}");
                        assert!((2..=STAGES_MAX).contains(&p.stages) && p.piece >= 1, "{ty} {cols}: {p:?}");
                        assert!(
                            p.cols.is_multiple_of(64) && (p.piece * ty.block_elems()).is_multiple_of(64),
                            "{ty} {cols}: {p:?}"
                        );
                        assert_eq!(p.run_pitch % 128, 16);
                        // Whole lines of 16 bytes around a piece from any address, or what decoders read of it.
                        let bytes = p.piece * ty.block_bytes();
                        assert!(p.run_pitch >= ((15 + bytes + 15) & !15).max(15 + bytes + 8), "{ty} {cols}: {p:?}");
                        assert!(p.cols == cols || !swiglu, "{ty} {cols}: {p:?}");
                    }
                }
            }
        }
    }
}

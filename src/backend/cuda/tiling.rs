//! How `kernels/bulk.cu` cuts a product's rows into tiles. Pure arithmetic.

use super::modules::grid_bytes;
use crate::gguf::TensorType;

/// Warps of a block that compute.
pub(super) const WARPS: usize = 8;
/// Threads of a block: those, one warp that copies and one that stores.
pub(super) const THREADS: u32 = 320;
/// Shared memory that the kernels declare themselves, and what the driver keeps a block.
const FIXED_BYTES: usize = 1536 + 1024;
/// Largest tile: beyond it copies run no faster, and the last round of tiles takes longer.
const TILE_BYTES: usize = 36 << 10;
/// Bytes of stages a block beyond which copies run slower again (2.8 instead of 2.9 TB/s on an H100).
const RING_BYTES: usize = 54 << 10;
const STAGES_MAX: usize = 8;
/// Blocks that share a multiprocessor, where their shared memory allows.
const BLOCKS: usize = 2;

/// Numbers that the kernel is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tiling {
    /// Warps that share a row.
    pub row_warps: usize,
    /// Steps of a row that a stage holds.
    pub piece: usize,
    pub stages: usize,
    /// Bytes between the copies of a stage.
    pub run_pitch: usize,
    /// Bytes of all stages.
    pub ring: usize,
    pub tiles: usize,
}

/// What is multiplied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product<'a> {
    pub ty: TensorType,
    pub cols: usize,
    /// Rows of each matrix; of SwiGLU's two, one.
    pub rows: &'a [usize],
    pub swiglu: bool,
    /// Bytes of shared memory that the activations take.
    pub activations: usize,
}

/// Parts of a super-block that one lane takes, as `blocks.cuh`: they lie in the same bytes.
fn shared_parts(ty: TensorType) -> usize {
    match ty {
        TensorType::Q2_K | TensorType::Q3_K => 4,
        TensorType::Q4_K | TensorType::Q5_K | TensorType::Q6_K => 2,
        _ => 1,
    }
}

/// Instructions of a warp for a step of two rows: to look weights up in a grid takes more than to cut them from words.
fn step_cycles(ty: TensorType) -> usize {
    if grid_bytes(ty) > 0 { 220 } else { 80 * shared_parts(ty) }
}

/// Weights of a step, in which each lane takes its part once, and their bytes.
fn step(ty: TensorType) -> (usize, usize) {
    let elems = 32 * 32 * shared_parts(ty);
    (elems, elems / ty.block_elems() * ty.block_bytes())
}

/// Room for a copy of `bytes` from any address: it keeps its distance from a line of 128 bytes, and ends
/// on whole 16 bytes; decoders read a word beyond.
fn run_bytes(bytes: usize) -> usize {
    (bytes + 127 + 32).next_multiple_of(128)
}

/// Fewest bytes of stages with which a product of this type runs.
fn least_ring(ty: TensorType) -> usize {
    2 * 2 * run_bytes(step(ty).1)
}

/// The tiling that should take least time on a GPU with so many multiprocessors, whose blocks may have
/// `shared` bytes; `None` if not even single steps of two rows fit beside the activations.
pub(super) fn tiling(p: &Product, multiprocessors: usize, shared: usize) -> Option<Tiling> {
    let fixed = FIXED_BYTES + grid_bytes(p.ty) + p.activations;
    let room_of = |blocks: usize| ((shared + 1024) / blocks).checked_sub(fixed);
    let fits = |room: &usize| *room >= least_ring(p.ty);
    let (room, blocks) = match room_of(BLOCKS).filter(|r| *r >= RING_BYTES / 2 && fits(r)) {
        Some(room) => (room, BLOCKS),
        None => (room_of(1).filter(fits)?, 1),
    };
    let (elems, step_bytes) = step(p.ty);
    let steps = p.cols.div_ceil(elems);
    let row_bytes = p.cols / p.ty.block_elems() * p.ty.block_bytes();
    let slots = |row_warps: usize| WARPS / row_warps;
    let tiles = |row_warps: usize| {
        let rows = slots(row_warps) * if p.swiglu { 1 } else { 2 };
        p.rows.iter().map(|r| r.div_ceil(rows)).sum::<usize>()
    };
    let whole = |row_warps: usize| {
        let (runs, rows) = if p.swiglu { (2, slots(row_warps)) } else { (1, 2 * slots(row_warps)) };
        (runs, run_bytes(rows * row_bytes))
    };
    let best = [8, 4, 2, 1]
        .into_iter()
        .filter(|&w| w == WARPS || w < 2 * steps)
        .filter(|&w| 2 * slots(w) * row_bytes <= TILE_BYTES && 2 * whole(w).0 * whole(w).1 <= room)
        .min_by_key(|&w| {
            // Processor cycles of a tile: its bytes at the memory's rate, or the work of its warps.
            let (bytes, per_warp) = (2 * slots(w) * row_bytes, steps.div_ceil(w) * step_cycles(p.ty) + 150);
            let cycles = (bytes * blocks / 13).max(per_warp * WARPS * blocks / 3);
            tiles(w).div_ceil(blocks * multiprocessors) * (cycles + 200)
        });
    let ring_of = |runs: usize, pitch: usize| {
        let stage = runs * pitch;
        let stages = (RING_BYTES.min(room) / stage).clamp(2, STAGES_MAX);
        (stages, stages * stage)
    };
    if let Some(row_warps) = best {
        let (runs, run_pitch) = whole(row_warps);
        let (stages, ring) = ring_of(runs, run_pitch);
        return Some(Tiling { row_warps, piece: steps, stages, run_pitch, ring, tiles: tiles(row_warps) });
    }
    // Two rows in pieces, each a copy of its own.
    let most = (TILE_BYTES.min(room / 2) / 2).saturating_sub(256) / step_bytes;
    let piece = (if most >= WARPS { most / WARPS * WARPS } else { most }).clamp(1, (steps - 1).max(1));
    let run_pitch = run_bytes(piece * step_bytes);
    let (stages, ring) = ring_of(2, run_pitch);
    Some(Tiling { row_warps: WARPS, piece, stages, run_pitch, ring, tiles: tiles(WARPS) })
}

impl Tiling {
    /// The same rows, warps and pieces, in whose order sums are made, beside `activations` bytes of more tokens and the
    /// type's grid: with fewer stages, or fewer blocks that share a multiprocessor. `None` if not even two stages fit.
    pub fn beside(self, activations: usize, shared: usize) -> Option<Tiling> {
        let stage = self.ring / self.stages;
        let stages = |blocks: usize| {
            let room = ((shared + 1024) / blocks).checked_sub(FIXED_BYTES + activations)?;
            let stages = ((RING_BYTES * BLOCKS / blocks).min(room) / stage).min(STAGES_MAX);
            (stages >= 2).then_some((stages, stages * stage))
        };
        let shared = stages(BLOCKS).filter(|(_, ring)| *ring >= RING_BYTES / 2);
        let (stages, ring) = shared.or_else(|| stages(1))?;
        Some(Tiling { stages, ring, ..self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::modules::QUANTS;

    const H100: (usize, usize) = (132, 232_448);
    const RTX_5060_TI: (usize, usize) = (36, 101_376);

    fn of(ty: TensorType, cols: usize, rows: &[usize], swiglu: bool, tokens: usize, gpu: (usize, usize)) -> Tiling {
        let p = Product { ty, cols, rows, swiglu, activations: cols / 32 * 40 * tokens };
        tiling(&p, gpu.0, gpu.1).unwrap_or_else(|| panic!("{p:?}"))
    }

    #[test]
    fn tiles_of_well_known_shapes_are_large_and_even() {
        for (ty, cols, rows, swiglu) in [
            (TensorType::Q8_0, 4096, &[4096, 1024, 1024][..], false),
            (TensorType::Q8_0, 4096, &[4096], false),
            (TensorType::Q8_0, 4096, &[14336], true),
            (TensorType::Q8_0, 14336, &[4096], false),
            (TensorType::Q4_K, 5120, &[5120], false),
            (TensorType::Q4_K, 5120, &[27648], true),
            (TensorType::Q4_K, 27648, &[5120], false),
            (TensorType::Q6_K, 27648, &[5120], false),
        ] {
            let t = of(ty, cols, rows, swiglu, 1, H100);
            let bytes = 2 * WARPS / t.row_warps * cols / ty.block_elems() * ty.block_bytes();
            assert!((8 << 10..=48 << 10).contains(&bytes), "{ty} {cols} {rows:?}: {t:?}");
            let rounds = t.tiles.div_ceil(264);
            assert!(t.tiles as f64 / (rounds * 264) as f64 > 0.8, "{ty} {cols} {rows:?}: {t:?}");
        }
    }

    #[test]
    fn every_type_and_shape_fits_the_shared_memory_of_small_gpus_too() {
        for ty in QUANTS {
            for cols in [256, 512, 576, 1536, 2048, 4096, 5120, 8192, 14336, 27648, 53248] {
                let cols = cols / ty.block_elems() * ty.block_elems();
                for (swiglu, tokens, gpu) in [
                    (false, 1, H100),
                    (true, 1, H100),
                    (false, 1, RTX_5060_TI),
                    (true, 1, RTX_5060_TI),
                    (false, 4, H100),
                ] {
                    let activations = cols / 32 * 40 * tokens;
                    let p = Product { ty, cols, rows: &[7, 33][..if swiglu { 1 } else { 2 }], swiglu, activations };
                    let Some(t) = tiling(&p, gpu.0, gpu.1) else {
                        assert!(activations + grid_bytes(ty) + least_ring(ty) + FIXED_BYTES > gpu.1, "{p:?}");
                        continue;
                    };
                    let all = t.ring + activations + grid_bytes(ty) + FIXED_BYTES;
                    assert!(all <= gpu.1 + 1024, "{p:?}: {t:?}");
                    assert!(t.stages >= 2 && t.piece >= 1 && WARPS.is_multiple_of(t.row_warps), "{p:?}: {t:?}");
                }
            }
        }
    }

    /// Guards against a self-test of small shapes that leaves out what racecheck is to see: blocks that fill their rings
    /// anew, and rows in pieces.
    #[test]
    fn small_shapes_go_round_the_rings() {
        use crate::backend::cuda::selftest::{SMALL_MULTIPROCESSORS, WIDE, small_shapes};
        let blocks = BLOCKS * SMALL_MULTIPROCESSORS as usize;
        let mut in_pieces = 0;
        for ty in QUANTS {
            let (rows, cols) = small_shapes(ty.block_elems().max(32))[0];
            for gpu in [H100, RTX_5060_TI].map(|(_, shared)| (SMALL_MULTIPROCESSORS as usize, shared)) {
                let t = of(ty, cols, &[rows], false, 1, gpu);
                assert!(t.tiles / blocks > t.stages, "{ty}: {t:?}");
                let t = of(ty, WIDE, &[40], false, 1, gpu);
                let pieces = WIDE.div_ceil(step(ty).0).div_ceil(t.piece);
                in_pieces += usize::from(pieces > 1 && t.tiles * pieces / blocks > t.stages);
            }
        }
        assert!(in_pieces >= 4, "{in_pieces} types in pieces");
    }

    /// Guards against sums that are made in another order where there are more tokens.
    #[test]
    fn more_tokens_keep_the_tiles_of_one() {
        for ty in QUANTS {
            for (cols, rows, swiglu) in [
                (4096, &[4096, 1024, 1024][..], false),
                (14336, &[4096], false),
                (27648, &[5120], false),
                (5120, &[27648], true),
            ] {
                for gpu in [H100, RTX_5060_TI] {
                    let one = of(ty, cols, rows, swiglu, 1, gpu);
                    for tokens in 2..=8 {
                        let activations = cols / 32 * 40 * tokens;
                        let Some(t) = one.beside(activations + grid_bytes(ty), gpu.1) else {
                            assert!(
                                activations + grid_bytes(ty) + 2 * one.ring / one.stages + FIXED_BYTES > gpu.1,
                                "{ty} {cols} {tokens}"
                            );
                            continue;
                        };
                        assert!(t.ring + activations + FIXED_BYTES <= gpu.1 + 1024, "{ty} {cols} {tokens}: {t:?}");
                        assert!(
                            t.stages >= 2 && t.ring / t.stages == one.ring / one.stages,
                            "{ty} {cols} {tokens}: {t:?}"
                        );
                        let order = |t: &Tiling| (t.row_warps, t.piece, t.run_pitch, t.tiles);
                        assert_eq!(order(&t), order(&one));
                    }
                }
            }
        }
    }
}

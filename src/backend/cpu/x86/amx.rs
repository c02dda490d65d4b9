//! Products of bulk rows on AMX: weights and activations are rounded to bfloat16, and tiles of 16 rows of weights meet
//! tiles of 16 tokens.
//!
//! A bfloat16 keeps 8 bits and the range of single precision: rounding costs a product less than activations in bytes do,
//! and no scale is left to apply, so that sums stay in tiles and in single precision. One instruction multiplies
//! 32 columns; 256 columns of up to 64 rows of weights are unpacked to tiles and then meet all tokens. The sums of a row
//! and a token add up in the order of the columns, whatever stands next to them; tokens that are not there are zeros.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::super::kernel::{Activation, Body, Dot, Job, Unpack, dispatch, put_row};
use super::super::panel::{Panel, ROWS};
use super::super::unpack::{PACKET, Packet, SUB, SUBS};
use super::avx512_panel::transpose;

/// Tokens of a tile.
pub(in super::super) const TOKENS: usize = 16;
/// Most panels of a group: as many tiles hold sums.
const PANELS: usize = 4;
/// Most groups of a task: a packet of the activations comes from memory once for all of them.
const GROUPS: usize = 4;
/// Most rows of weights of a group.
const GROUP_ROWS: usize = PANELS * ROWS;
/// Columns that one instruction multiplies.
const BLOCK: usize = 32;
/// Bytes of a tile: 16 rows of 64.
const TILE: usize = 1024;
/// Sums of a tile.
const CELLS: usize = ROWS * TOKENS;
/// Bytes of a packet of 16 rows or tokens.
const PACKET_TILES: usize = PACKET / BLOCK * TILE;

/// Whether the processor has the instructions and the system lets this process use them, which it is asked for once.
pub(in super::super) fn available() -> bool {
    /// The tiles' shapes and data in the extended state. Intel SDM volume 1, 13.1.
    const XTILE: u64 = 3 << 17;
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        if !is_x86_feature_detected!("xsave") || !is_x86_feature_detected!("avx512bf16") {
            return false;
        }
        // Intel SDM volume 2, CPUID leaf 7: bit 22 is AMX-BF16, bit 24 AMX-TILE.
        let has = __cpuid_count(7, 0).edx & (1 << 22 | 1 << 24) == 1 << 22 | 1 << 24;
        // SAFETY: XSAVE is there and the system has enabled it, as detection says.
        has && unsafe { xcr0() } & XTILE == XTILE && permitted()
    })
}

/// Which parts of the extended state the system saves.
#[target_feature(enable = "xsave")]
fn xcr0() -> u64 {
    // SAFETY: XSAVE is there.
    unsafe { _xgetbv(0) }
}

/// Asks the system for tiles, for all threads of this process.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    /// Linux, `arch/x86/include/uapi/asm/prctl.h`.
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XTILE_DATA: libc::c_int = 18;
    // SAFETY: takes numbers only.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Activations that hold the tiles of `tokens` rows of `packets` packets.
pub(in super::super) const fn input_len(tokens: usize, packets: usize) -> usize {
    const _: () = assert!(PACKET_TILES <= TOKENS * size_of::<Activation>());
    tokens.saturating_add(TOKENS).saturating_mul(packets)
}

/// Rows of weights of a task, of `rows` in all: each of `threads` threads has a few, so that they end together.
pub(in super::super) fn task_rows(rows: usize, threads: usize) -> usize {
    const TASKS: usize = 4;
    let most = rows / (TASKS * threads.max(1));
    let whole = if most >= GROUP_ROWS { GROUP_ROWS } else { 2 * ROWS };
    (most / whole * whole).clamp(whole, GROUPS * GROUP_ROWS)
}

/// Panels of scratch that a thread needs for passes of so many tokens and tasks of so many rows of weights.
pub(in super::super) const fn scratch_len(tokens: usize, rows: usize) -> usize {
    let sums = tokens.div_ceil(TOKENS).saturating_mul(rows.div_ceil(ROWS) * TILE);
    sums.saturating_add(size_of::<Room>()).div_ceil(size_of::<Panel>())
}

/// Where the tiles of a packet of 16 tokens lie among those of all: `[packet][tile]`.
#[inline(always)]
fn tiles_of(base: *const Activation, tokens: usize, packet: usize, tile: usize) -> *const u8 {
    base.cast::<u8>().wrapping_add((packet * tokens.div_ceil(TOKENS) + tile) * PACKET_TILES)
}

/// Brings a packet of 16 tokens to tiles: of `(tokens, cols)` floats at `x`.
pub(in super::super) struct Tile {
    pub x: *const f32,
    pub cols: usize,
    pub tokens: usize,
    pub tile: usize,
    pub packet: usize,
    /// As many as [`input_len`] says.
    pub out: *mut Activation,
}

impl Body for Tile {
    #[inline(always)]
    fn run<D: Dot>(self) {
        let mut rounded = Rounded([[0; PACKET]; TOKENS]);
        let n = (self.cols - self.packet * PACKET).min(PACKET);
        let first = self.tile * TOKENS;
        for (t, to) in rounded.0.iter_mut().enumerate().take(self.tokens - first) {
            let mut x = [0.0; PACKET];
            let at = self.x.wrapping_add((first + t) * self.cols + self.packet * PACKET);
            // SAFETY: the row has `cols` floats, of which `n` begin here; who makes the body has AMX.
            unsafe {
                x[..n].copy_from_slice(std::slice::from_raw_parts(at, n));
                round(&x, to);
            }
        }
        let to = tiles_of(self.out, self.tokens, self.packet, self.tile).cast_mut();
        for block in 0..PACKET / BLOCK {
            let from = rounded.0.as_ptr().wrapping_byte_add(64 * block).cast();
            // SAFETY: 16 rows of 64 bytes each; who makes the body vouches for the room, of which this packet of
            // this tile is its alone.
            unsafe { transpose(from, PACKET / 2, to.add(TILE * block).cast()) };
        }
    }
}

/// Bits of bfloat16 numbers.
#[repr(C, align(64))]
struct Rounded([[u16; PACKET]; TOKENS]);

/// Rounds to the nearest bfloat16.
#[target_feature(enable = "avx512f,avx512bf16")]
fn round(x: &[f32; PACKET], to: &mut [u16; PACKET]) {
    let (pairs, _) = x.as_chunks::<BLOCK>();
    let (out, _) = to.as_chunks_mut::<BLOCK>();
    for (x, out) in pairs.iter().zip(out) {
        // SAFETY: 32 floats are read and 64 bytes written.
        unsafe {
            let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(SUB)));
            let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(out.as_mut_ptr().cast(), both);
        }
    }
}

/// What a thread works with; sums follow it.
#[repr(C, align(64))]
struct Room {
    /// A packet of each row in tiles: `[panel][block]`
    weights: [[u8; PACKET_TILES]; PANELS],
    unpacked: [Packet; ROWS],
}

/// Rows `from..to` with all tokens of a job whose activations are in tiles.
///
/// # Safety
/// The contract of [`Rows`](super::super::kernel::Rows), with scratch as [`scratch_len`] says; [`available`] has said yes.
#[inline(always)]
pub(in super::super) unsafe fn all_rows<D: Dot>(j: &Job, from: usize, to: usize, scratch: &mut [Panel]) {
    debug_assert!(scratch.len() >= scratch_len(j.tokens, to - from), "scratch for {} tokens", j.tokens);
    let room = scratch.as_mut_ptr().cast::<Room>();
    let sums = room.wrapping_add(1).cast::<f32>();
    // SAFETY: the scratch has room for this and for the sums behind it, is aligned like it, and holds plain numbers.
    let room = unsafe { &mut *room };
    let tiles = j.tokens.div_ceil(TOKENS);
    // SAFETY: the caller vouches for AMX.
    unsafe { CONFIG.load() };
    let groups = || (from..to).step_by(GROUP_ROWS).map(|first| first..to.min(first + GROUP_ROWS));
    let sums_of = |group: usize| sums.wrapping_add(group * tiles * PANELS * CELLS);
    for packet in 0..j.cols.div_ceil(PACKET) {
        let blocks = (j.cols - packet * PACKET).min(PACKET).div_ceil(BLOCK);
        let x = tiles_of(j.x, j.tokens, packet, 0);
        for (g, rows) in groups().enumerate() {
            for (first, weights) in rows.clone().step_by(ROWS).zip(&mut room.weights) {
                // Rows that are not there keep what an earlier packet left: nobody looks at their sums.
                let n = (rows.end - first).min(ROWS);
                let out = &mut room.unpacked[..n];
                dispatch(D::ISA, Unpack { job: j, rows: first..first + n, start: packet, out });
                ask_for(j, first..first + n, packet + 1);
                // SAFETY: the caller vouches for AMX.
                unsafe { stage(out, weights) };
            }
            let weights = room.weights.as_ptr().cast();
            let work = Work { weights, x, tiles, blocks, first: packet == 0, sums: sums_of(g) };
            // SAFETY: the caller's promises; the addresses are those of whole packets.
            unsafe {
                match rows.len().div_ceil(ROWS) {
                    1 => work.multiply::<1>(),
                    2 => work.multiply::<2>(),
                    3 => work.multiply::<3>(),
                    _ => work.multiply::<PANELS>(),
                }
            }
        }
    }
    for (g, rows) in groups().enumerate() {
        // SAFETY: as above.
        unsafe { hand_over::<D>(j, rows, sums_of(g)) };
    }
    // SAFETY: the caller vouches for AMX. Tiles in use cost the system time when it changes threads.
    unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
}

/// Shapes of the tiles: all are 16 rows of 64 bytes. Intel SDM volume 1, 18.2.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}
const _: () = assert!(size_of::<Config>() == 64);

static CONFIG: Config = {
    let mut c = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let mut i = 0;
    while i < 8 {
        c.row_bytes[i] = 64;
        c.rows[i] = 16;
        i += 1;
    }
    c
};

impl Config {
    /// Makes these the shapes of this thread's tiles, which are then zero.
    ///
    /// # Safety
    /// [`available`] has said yes.
    #[inline(always)]
    unsafe fn load(&self) {
        // SAFETY: the caller's promise; the operand is 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) self, options(nostack, preserves_flags, readonly)) };
    }
}

/// Brings unpacked rows to tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn stage(rows: &[Packet], to: &mut [u8; PACKET_TILES]) {
    for (r, p) in rows.iter().enumerate() {
        for block in 0..PACKET / BLOCK {
            let group = |g: usize| {
                let (scale, min) = (_mm512_set1_ps(p.scale[g]), _mm512_set1_ps(p.min[g]));
                // SAFETY: 16 bytes of the packet.
                let q = unsafe { _mm_loadu_si128(p.q.as_ptr().add(SUB * g).cast()) };
                _mm512_fmsub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(q)), scale, min)
            };
            let both = _mm512_cvtne2ps_pbh(group(2 * block + 1), group(2 * block));
            // SAFETY: a row of a tile has 64 bytes; both types are 64 bytes of plain numbers.
            unsafe {
                _mm512_storeu_si512(
                    to.as_mut_ptr().add(TILE * block + 64 * r).cast(),
                    std::mem::transmute::<__m512bh, __m512i>(both),
                )
            };
        }
    }
}

/// Asks for a packet of some rows.
#[inline(always)]
fn ask_for(j: &Job, rows: std::ops::Range<usize>, packet: usize) {
    let bytes = PACKET / j.ty.block_elems() * j.ty.block_bytes();
    for row in rows {
        let at = j.row(row).wrapping_add(packet * bytes);
        for line in (0..bytes).step_by(64) {
            // SAFETY: a hint, which may name any address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line).cast()) };
        }
    }
}

/// A packet of up to four panels with that of all tiles of tokens.
struct Work {
    /// `[panel][block]`
    weights: *const u8,
    /// `[tile][block]`
    x: *const u8,
    tiles: usize,
    /// Blocks that hold columns.
    blocks: usize,
    /// Whether there are no sums yet.
    first: bool,
    /// `[tile][panel][row][token]`
    sums: *mut f32,
}

impl Work {
    /// `P`: panels. Sums of panel p are in tile p, weights come to tiles 4 and 5 in turn, activations to 6.
    #[inline(always)]
    unsafe fn multiply<const P: usize>(&self) {
        /// An instruction of the address `$at` and rows of 64 bytes.
        macro_rules! tile {
            ($text:literal, $at:expr) => {
                asm!($text, at = in(reg) $at, s = in(reg) 64usize, options(nostack, preserves_flags))
            };
        }
        /// Multiplies the weights of a panel, where there is one.
        macro_rules! panel {
            ($p:literal, $load:literal, $product:literal, $w:expr) => {
                if P > $p {
                    let w = $w.wrapping_add($p * PACKET_TILES);
                    asm!($load, $product, at = in(reg) w, s = in(reg) 64usize, options(nostack, preserves_flags));
                }
            };
        }
        for t in 0..self.tiles {
            let (x, sums) = (self.x.wrapping_add(t * PACKET_TILES), self.sums.wrapping_add(t * P * CELLS));
            // SAFETY: the caller vouches for AMX and for the addresses: every tile is 1024 bytes of a packet or of sums.
            unsafe {
                if self.first {
                    asm!(
                        "tilezero tmm0",
                        "tilezero tmm1",
                        "tilezero tmm2",
                        "tilezero tmm3",
                        options(nostack, preserves_flags, nomem)
                    );
                } else {
                    tile!("tileloadd tmm0, [{at} + {s}]", sums);
                    if P > 1 {
                        tile!("tileloadd tmm1, [{at} + {s} + 1024]", sums);
                    }
                    if P > 2 {
                        tile!("tileloadd tmm2, [{at} + {s} + 2048]", sums);
                    }
                    if P > 3 {
                        tile!("tileloadd tmm3, [{at} + {s} + 3072]", sums);
                    }
                }
                for block in 0..self.blocks {
                    tile!("tileloadd tmm6, [{at} + {s}]", x.wrapping_add(block * TILE));
                    let w = self.weights.wrapping_add(block * TILE);
                    panel!(0, "tileloadd tmm4, [{at} + {s}]", "tdpbf16ps tmm0, tmm4, tmm6", w);
                    panel!(1, "tileloadd tmm5, [{at} + {s}]", "tdpbf16ps tmm1, tmm5, tmm6", w);
                    panel!(2, "tileloadd tmm4, [{at} + {s}]", "tdpbf16ps tmm2, tmm4, tmm6", w);
                    panel!(3, "tileloadd tmm5, [{at} + {s}]", "tdpbf16ps tmm3, tmm5, tmm6", w);
                }
                tile!("tilestored [{at} + {s}], tmm0", sums);
                if P > 1 {
                    tile!("tilestored [{at} + {s} + 1024], tmm1", sums);
                }
                if P > 2 {
                    tile!("tilestored [{at} + {s} + 2048], tmm2", sums);
                }
                if P > 3 {
                    tile!("tilestored [{at} + {s} + 3072], tmm3", sums);
                }
            }
        }
    }
}

/// Words of a tile in another order.
#[repr(C, align(64))]
struct Square([f32; CELLS]);

/// Hands the sums of some rows with all tokens over to the job.
#[inline(always)]
unsafe fn hand_over<D: Dot>(j: &Job, rows: std::ops::Range<usize>, sums: *const f32) {
    let panels = rows.len().div_ceil(ROWS);
    let mut square = Square([0.0; CELLS]);
    for tile in 0..j.tokens.div_ceil(TOKENS) {
        for p in 0..panels {
            let row = rows.start + ROWS * p;
            let n = (rows.end - row).min(ROWS);
            // SAFETY: the caller vouches for AVX-512, for sums of each panel and tile, and for the job's output.
            unsafe {
                transpose(sums.add((tile * panels + p) * CELLS).cast(), TOKENS, square.0.as_mut_ptr().cast());
                let (of_tokens, _) = square.0.as_chunks::<ROWS>();
                for (t, sums) in of_tokens.iter().enumerate().take(j.tokens - tile * TOKENS) {
                    put_row::<D>(j, row, n, tile * TOKENS + t, *sums);
                }
            }
        }
    }
}

const _: () = assert!(SUBS * SUB == PACKET);

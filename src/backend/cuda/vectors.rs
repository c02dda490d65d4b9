//! Products of quantised weights and few tokens: which kernel, how many tokens at once, in which tiles.

use super::args::{GemvArgs, QuantiseArgs, SWIGLU, XBLK_BYTES};
use super::driver::device_error;
use super::modules::{Func, GEMV_BATCHES, Vectors, grid_bytes};
use super::product::{Engine, Inputs, Raw, Rows, Target, quant_index, unsupported};
use super::tiling::{Product, THREADS, WARPS, tiling};
use super::workspace::quant_bytes;
use crate::backend::{BackendError, Weight};
use crate::gguf::TensorType;

type Result<T = ()> = std::result::Result<T, BackendError>;

/// Bytes of a step of 1024 weights, and of the buffer it is staged in, as `kernels/blocks.cuh`.
pub(super) fn step_bytes(ty: TensorType) -> (usize, usize) {
    let step = 1024 / ty.block_elems() * ty.block_bytes();
    (step, (step + 30) / 16 * 16)
}

/// Shared memory of the rings of a block, as `kernels/gemv.cu` lays them out.
fn ring_bytes(ty: TensorType) -> usize {
    let (_, buf) = step_bytes(ty);
    let least = if ty.block_elems() == 32 { 3 } else { 2 };
    let stages = (4500 / (2 * buf)).clamp(least, 5);
    WARPS * stages * 2 * buf
}

/// A launch: kernel, its number in the table of occupancies, threads, bytes of shared memory, and the
/// number of pieces of work that blocks share.
struct Launch {
    f: Func,
    size: usize,
    threads: u32,
    shared: usize,
    work: usize,
}

/// What is multiplied: matrices of one type and one width, by tokens.
struct Call<'a> {
    ty: TensorType,
    kind: usize,
    cols: usize,
    targets: &'a [Target],
    mode: i32,
    input: Inputs,
    rows: Rows,
    hidden_q: u64,
}

impl Call<'_> {
    fn swiglu(&self) -> bool {
        self.mode == SWIGLU
    }

    fn token_bytes(&self) -> usize {
        self.cols / 32 * XBLK_BYTES
    }

    /// Rows of each matrix that is computed as one; SwiGLU's two count once.
    fn matrix_rows(&self) -> ([usize; 3], usize) {
        let rows = [0, 1, 2].map(|i| self.targets.get(i).map_or(0, |t| t.weight.rows));
        (rows, if self.swiglu() { 1 } else { self.targets.len() })
    }

    /// The arguments for `n` tokens after the first `done`.
    fn args(&self, done: usize, n: usize) -> GemvArgs {
        let token_bytes = self.token_bytes();
        let (input, rows, picked) = (self.input, self.rows, self.rows.skip(done));
        let out_rows = self.targets[0].weight.rows;
        let mut a = GemvArgs {
            segments: self.targets.len() as i32,
            cols: self.cols as i32,
            tokens: n as i32,
            mode: self.mode,
            x: if rows.from == 0 { input.q + (done * token_bytes) as u64 } else { input.q },
            raw: if input.raw.x == 0 { 0 } else { input.raw.x + (done * self.cols * 4) as u64 },
            norm: input.raw.norm,
            eps: input.raw.eps,
            in_idx: picked.from,
            out_idx: picked.to,
            hidden_q: match self.hidden_q {
                0 => 0,
                q => q + (done * (out_rows / 32) * XBLK_BYTES) as u64,
            },
            ..GemvArgs::default()
        };
        for (i, t) in self.targets.iter().enumerate() {
            a.w[i] = t.weight.addr;
            a.bias[i] = t.bias;
            a.rows[i] = t.weight.rows as i32;
            a.stride[i] = t.stride as i32;
            a.out[i] = if t.out == 0 || rows.to != 0 { t.out } else { t.out + (done * t.stride * 4) as u64 };
        }
        a
    }
}

impl Engine {
    /// `raw` in the form that products of so many tokens take: as it is where they norm and quantise it themselves,
    /// else quantised to `to` in the same order of operations.
    ///
    /// # Errors
    /// If there is no room for that many rows at `to`.
    pub fn quantised(&self, raw: Raw, cols: usize, tokens: usize, to: u64) -> Result<Inputs> {
        let quantise = match &self.kernels.vectors {
            Vectors::Bulk { quantise, .. } if tokens > 1 => *quantise,
            _ => return Ok(Inputs { raw, ..Inputs::default() }),
        };
        self.ws.rooms.check("quantised input", to, quant_bytes(tokens, cols))?;
        let a = QuantiseArgs { x: raw.x, norm: raw.norm, q: to, eps: raw.eps, cols: cols as i32 };
        // SAFETY: QuantiseArgs is what quantise_rows declares; there are `tokens` rows of `cols` floats at `raw`, and
        // room for them as checked above.
        unsafe { self.launch(quantise, (tokens as u32, 1, 1), 256, 0, &a)? };
        Ok(Inputs { q: to, ..Inputs::default() })
    }

    /// Whether a SwiGLU product leaves its results quantised.
    pub fn quantises_hidden(&self) -> bool {
        matches!(self.kernels.vectors, Vectors::Warps(_))
    }

    /// `out = W · input (+ bias)` for quantised weights, stored, added or as SwiGLU of two (`mode`).
    pub fn vectors(
        &mut self,
        targets: &[Target],
        tokens: usize,
        mode: i32,
        input: Inputs,
        rows: Rows,
        hidden_q: u64,
    ) -> Result {
        let Weight { ty, cols, .. } = targets[0].weight;
        let kind = quant_index(ty).ok_or_else(|| unsupported(ty))?;
        targets.iter().try_for_each(|t| self.check_words(&t.weight))?;
        for t in targets {
            self.check_target(t, tokens, rows)?;
        }
        self.ws.rooms.check("quantised hidden state", hidden_q, quant_bytes(tokens, targets[0].weight.rows))?;
        let call = Call { ty, kind, cols, targets, mode, input, rows, hidden_q };
        let mut done = 0;
        while done < tokens {
            done += match &self.kernels.vectors {
                Vectors::Warps(f) => {
                    let f = f[kind];
                    self.by_warps(&call, f, done, tokens - done)?
                }
                Vectors::Bulk { products, .. } => {
                    let f = products[kind];
                    self.by_bulk(&call, f, done, tokens - done)?
                }
            };
        }
        Ok(())
    }

    fn too_wide(&self, cols: usize) -> BackendError {
        device_error(format!("a row of {cols} columns does not fit the shared memory of {}", self.device.info.name))
    }

    fn run(&mut self, call: &Call, l: &Launch, a: &GemvArgs) -> Result {
        let key = (call.kind, l.size, l.shared as u32);
        let fit = match self.occupancy.get(&key) {
            Some(n) => *n,
            None => {
                let n = self.kernels.occupancy(l.f, l.threads, l.shared as u32)?;
                self.occupancy.insert(key, n);
                n
            }
        };
        let grid = (l.work as u32).min(fit * self.device.info.multiprocessors);
        // SAFETY: GemvArgs is what gemv_* and bulk_* declare; shapes were checked by the loader and the room
        // for results by `vectors`, the activations hold all tokens, and device buffers have room behind them for whole 16-byte lines.
        unsafe { self.launch(l.f, (grid, 1, 1), l.threads, l.shared, a) }
    }

    /// `gemv.cu`; returns how many tokens it took.
    fn by_warps(&mut self, call: &Call, f: [Func; 4], done: usize, left: usize) -> Result<usize> {
        let token_bytes = call.token_bytes();
        let ring = ring_bytes(call.ty);
        let most =
            (self.device.info.shared_bytes as usize).saturating_sub(ring + grid_bytes(call.ty) + 2560) / token_bytes;
        let largest = GEMV_BATCHES.iter().rposition(|b| *b <= most).ok_or_else(|| self.too_wide(call.cols))?;
        let size = (0..=largest).find(|i| GEMV_BATCHES[*i] >= left).unwrap_or(largest);
        let n = left.min(GEMV_BATCHES[size]);
        let (rows, _) = call.matrix_rows();
        let pairs: usize = rows.iter().map(|r| r.div_ceil(2)).sum();
        let work = if call.swiglu() { rows[0].div_ceil(32) } else { pairs.div_ceil(WARPS) };
        let launch = Launch { f: f[size], size, threads: 256, shared: ring + n * token_bytes, work };
        self.run(call, &launch, &call.args(done, n))?;
        Ok(n)
    }

    /// `bulk.cu`; returns how many tokens it took.
    fn by_bulk(&mut self, call: &Call, f: [Func; 4], done: usize, left: usize) -> Result<usize> {
        let (rows, matrices) = call.matrix_rows();
        let (ty, cols, swiglu, activations) = (call.ty, call.cols, call.swiglu(), call.token_bytes());
        let product = Product { ty, cols, rows: &rows[..matrices], swiglu, activations };
        let info = &self.device.info;
        let shared = info.shared_bytes as usize;
        let one = tiling(&product, info.multiprocessors as usize, shared).ok_or_else(|| self.too_wide(cols))?;
        let most = left.min(GEMV_BATCHES[GEMV_BATCHES.len() - 1]);
        let more = (2..=most).rev().find_map(|n| Some((n, one.beside(n * activations + grid_bytes(ty), shared)?)));
        let (n, t) = more.unwrap_or((1, one));
        let size = GEMV_BATCHES.iter().position(|b| *b >= n).unwrap_or(GEMV_BATCHES.len() - 1);
        let mut a = call.args(done, n);
        a.row_warps = t.row_warps as i32;
        a.piece = t.piece as i32;
        a.stages = t.stages as i32;
        a.run_pitch = t.run_pitch as i32;
        let launch = Launch { f: f[size], size, threads: THREADS, shared: t.ring + n * activations, work: t.tiles };
        self.run(call, &launch, &a)?;
        Ok(n)
    }
}

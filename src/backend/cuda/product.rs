//! Matrix products: which kernel, in which pieces, fed with which form of the activations.
//!
//! Exact rows go through the matrix-times-vectors kernels, on quantised activations for quantised
//! weights and on floats for the others. Bulk rows go through tensor cores on weights turned to halves: few rows as the weights
//! come (`thin.cu`), many by way of a scratch buffer, in one order. Which of the two depends on
//! the class of a pass's rows, never on how many there are.

use std::collections::HashMap;
use std::sync::Arc;

use super::args::{DequantArgs, GemmArgs, PlainArgs, PrepArgs, STORE, SWIGLU};
use super::driver::{Device, Stream, device_error};
use super::modules::{Func, Kernels, PLAINS, QUANTS, grid_bytes};
use super::vectors::step_bytes;
use super::workspace::{Workspace, float_bytes, half_bytes, pitch, quant_bytes};
use crate::backend::{Activation, BackendError, Class, Linear, NormKind, NormOf, Weight};
use crate::gguf::TensorType;

type Result<T = ()> = std::result::Result<T, BackendError>;

/// Blocks a multiprocessor of the converting kernels.
const CONVERT_BLOCKS: usize = 4;

/// Most tokens of a product that `thin.cu` makes: with more, turning weights to halves once for all of them is faster.
const THIN_TOKENS: usize = 64;
/// Tokens of a block of its kernels, and rows.
const THIN: [usize; 2] = [16, 64];
pub(super) const THIN_ROWS: usize = 32;

/// Shared memory of a block of `thin.cuh` that keeps so many rows of tokens' chunks.
pub(super) fn thin_bytes(ty: TensorType, rows: usize) -> usize {
    let lines = ((256 / ty.block_elems() * ty.block_bytes() + 30) / 16) | 1;
    let pitch = (256 + 8) * 2;
    4 * THIN_ROWS * lines * 16 + (2 * THIN_ROWS + rows) * pitch
}

/// Which of [`THIN`] takes so many tokens, and its bytes of shared memory; `None` if not even the smaller one fits.
fn thin(ty: TensorType, tokens: usize, shared: usize) -> Option<(usize, usize)> {
    let (bytes, shared) = (|size: usize| thin_bytes(ty, 3 * THIN[size]), shared.saturating_sub(grid_bytes(ty)));
    let size = usize::from(tokens > THIN[0] && bytes(1) <= shared);
    (bytes(size) <= shared).then_some((size, bytes(size)))
}

/// The form in which a product reads its activations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Form {
    Float,
    Quant,
    Half,
}

/// The form for weights of type `ty` and rows of this class.
pub(super) fn form(ty: TensorType, class: Class) -> Form {
    match class {
        Class::Bulk => Form::Half,
        Class::Exact if quant_index(ty).is_some() => Form::Quant,
        Class::Exact => Form::Float,
    }
}

pub(super) fn quant_index(ty: TensorType) -> Option<usize> {
    QUANTS.iter().position(|t| *t == ty)
}

pub(super) fn plain_index(ty: TensorType) -> Option<usize> {
    PLAINS.iter().position(|t| *t == ty)
}

/// Place of a type in the tables of converting kernels.
pub(super) fn any_index(ty: TensorType) -> Option<usize> {
    quant_index(ty).or_else(|| plain_index(ty).map(|i| i + QUANTS.len()))
}

pub(super) fn supported(ty: TensorType) -> bool {
    any_index(ty).is_some()
}

pub(super) fn unsupported(ty: TensorType) -> BackendError {
    let names: Vec<&str> = QUANTS.iter().chain(&PLAINS).map(|t| t.name()).collect();
    BackendError::UnsupportedType { ty, backend: "cuda", supported: names.join(" ") }
}

/// What turns the source rows into activations.
#[derive(Clone, Copy, Debug)]
pub(super) enum Prep {
    /// Nothing.
    Copy,
    /// RMS norm with this weight and epsilon.
    Norm(u64, f32),
    /// SwiGLU with the rows at this address.
    Swiglu(u64),
    /// A norm of any kind.
    Norms(NormOf<u64>),
    /// A norm of any kind, added to what lies there.
    AddNormed(NormOf<u64>),
    /// An activation, of SwiGLU's kind with the rows at this address if it is not 0.
    Activate(Activation, u64),
    /// Row i multiplied by the float of the first address that the number of the second one names.
    Scaled(u64, u64),
}

/// An activation's number in `kernels/ops.cu`, and its limit.
pub(super) fn activation(how: Activation) -> (i32, f32) {
    match how {
        Activation::Silu => (0, 0.0),
        Activation::Gelu => (1, 0.0),
        Activation::ReluSquared => (2, 0.0),
        Activation::ClampedSwiglu { limit } => (3, limit),
    }
}

/// Where the forms of the activations lie; 0 where they are absent.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Inputs {
    pub f: u64,
    pub q: u64,
    pub h: u64,
    /// Number of the first of its rows among the factors of all.
    pub h_row0: usize,
    /// In place of `q`: rows that the product norms and quantises itself.
    pub raw: Raw,
}

/// Rows of floats, and the weight and epsilon of their norm.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Raw {
    pub x: u64,
    pub norm: u64,
    pub eps: f32,
}

/// One matrix of a product and where its results go: row of token t at `out + t * stride` floats.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub weight: Weight,
    /// Address of one float a row, or 0.
    pub bias: u64,
    pub out: u64,
    pub stride: usize,
}

impl Target {
    pub fn new(l: &Linear, out: u64) -> Target {
        Target { weight: l.weight, bias: l.bias.map_or(0, |b| b.addr), out, stride: l.weight.rows }
    }
}

/// Which rows are read and written: device addresses of one number a token, 0 for all in order.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rows {
    pub from: u64,
    pub to: u64,
}

impl Rows {
    /// The same for the tokens after the first `n`.
    pub fn skip(self, n: usize) -> Rows {
        let step = |a: u64| if a == 0 { 0 } else { a + 4 * n as u64 };
        Rows { from: step(self.from), to: step(self.to) }
    }
}

/// Device, kernels and buffers: what operations are made of.
pub(super) struct Engine {
    pub device: Arc<Device>,
    pub stream: Arc<Stream>,
    pub kernels: Kernels,
    pub ws: Workspace,
    pub(super) occupancy: HashMap<(usize, usize, u32), u32>,
    /// Class of the pass's rows.
    pub class: Class,
}

impl Engine {
    pub fn new(device: Arc<Device>, stream: Arc<Stream>, kernels: Kernels, ws: Workspace) -> Engine {
        Engine { device, stream, kernels, ws, occupancy: HashMap::with_capacity(256), class: Class::Bulk }
    }

    /// The form for weights of type `ty` and rows of this pass.
    pub fn form(&self, ty: TensorType) -> Form {
        form(ty, self.class)
    }

    /// Launches a kernel on the compute stream.
    ///
    /// # Safety
    /// As [`Kernels::launch`].
    pub unsafe fn launch<A: Copy>(
        &self,
        f: Func,
        grid: (u32, u32, u32),
        threads: u32,
        shared: usize,
        args: &A,
    ) -> Result {
        // SAFETY: passed on.
        unsafe { self.kernels.launch(&self.stream, f, grid, threads, shared as u32, args) }
    }

    /// Makes sure that a product's results lie within their buffer: `tokens` rows, or at least one where they are
    /// picked.
    pub fn check_target(&self, t: &Target, tokens: usize, rows: Rows) -> Result {
        let steps = if rows.to == 0 { tokens.saturating_sub(1) } else { 0 };
        let bytes = float_bytes(steps, t.stride).saturating_add(float_bytes(1, t.weight.rows));
        self.ws.rooms.check("results of a product", t.out, bytes)
    }

    /// Brings `rows` rows of `n` floats at `x` (picked by `idx` if not 0) into each form that has
    /// an address in `to`.
    ///
    /// # Errors
    /// If a form has no room for that many rows.
    pub fn prepare(&self, prep: Prep, x: u64, idx: u64, n: usize, rows: usize, to: Inputs) -> Result {
        let rooms = &self.ws.rooms;
        rooms.check("input in floats", to.f, float_bytes(rows, n))?;
        rooms.check("quantised input", to.q, quant_bytes(rows, n))?;
        rooms.check("input as halves", to.h, half_bytes(rows, n))?;
        if to.h != 0 {
            rooms.check("factors of the input", self.ws.halves_scale.addr(), float_bytes(to.h_row0 + rows, 1))?;
        }
        let mut a = PrepArgs {
            x,
            idx,
            f: to.f,
            q: to.q,
            h: to.h,
            scale: self.ws.halves_scale.addr() + 4 * to.h_row0 as u64,
            n: n as i32,
            pitch: pitch(n) as i32,
            ..PrepArgs::default()
        };
        let f = match prep {
            Prep::Copy => self.kernels.prep_copy,
            Prep::Norm(w, eps) => {
                a.w = w;
                a.eps = eps;
                self.kernels.prep_norm
            }
            Prep::Swiglu(up) => {
                a.up = up;
                self.kernels.prep_swiglu
            }
            Prep::Norms(norm) | Prep::AddNormed(norm) => {
                a.add = i32::from(matches!(prep, Prep::AddNormed(_)));
                (a.w, a.b, a.eps) = (norm.weight.unwrap_or(0), norm.bias.unwrap_or(0), norm.eps);
                a.layer = i32::from(norm.kind == NormKind::Layer);
                self.kernels.prep_norms
            }
            Prep::Activate(how, up) => {
                (a.how, a.limit) = activation(how);
                a.up = up;
                self.kernels.prep_activate
            }
            Prep::Scaled(by, numbers) => {
                (a.by, a.by_idx) = (by, numbers);
                self.kernels.prep_scaled
            }
        };
        let exact = self.class == Class::Exact;
        // Enough threads for a row; many rows share the machine instead. A norm's order of summation follows from it.
        let threads = if n > 8192 || (exact && n > 1024) { 1024 } else { 256 };
        // Few long rows are divided among blocks, where that can be done.
        let whole = matches!(prep, Prep::Norm(..) | Prep::Norms(_) | Prep::AddNormed(_)) || to.h != 0 || !exact;
        let parts = if whole { 1 } else { n.div_ceil(4 * threads as usize) };
        // SAFETY: PrepArgs is what prep_* declare; all outputs hold `rows` rows of `n`, as checked above.
        unsafe { self.launch(f, (rows as u32, parts as u32, 1), threads, 0, &a) }
    }

    /// The buffers for the forms that weights of these types want.
    pub fn forms(&self, types: &[TensorType]) -> Inputs {
        let mut to = Inputs::default();
        for ty in types {
            match self.form(*ty) {
                Form::Float => to.f = self.ws.norm_f.addr(),
                Form::Quant => to.q = self.ws.input_q.addr(),
                Form::Half => to.h = self.ws.halves.addr(),
            }
        }
        to
    }

    /// `out = W · input (+ bias)`, stored or added (`mode`), for each target; all have as many
    /// columns. Targets of one quantised type that follow each other share a launch.
    pub fn products(&mut self, targets: &[Target], tokens: usize, mode: i32, input: Inputs, rows: Rows) -> Result {
        let mut i = 0;
        while i < targets.len() {
            let ty = targets[i].weight.ty;
            let n = match self.form(ty) {
                Form::Half => {
                    self.gemm(&targets[i], tokens, mode, input.h, rows.to)?;
                    1
                }
                Form::Float => {
                    self.plain(&targets[i], tokens, mode, input.f, rows)?;
                    1
                }
                Form::Quant => {
                    let n = targets[i..].iter().take(3).take_while(|t| t.weight.ty == ty).count();
                    self.vectors(&targets[i..i + n], tokens, mode, input, rows, 0)?;
                    n
                }
            };
            i += n;
        }
        Ok(())
    }

    /// `silu(gate · input) * (up · input)` for `down`'s type; returns where it lies.
    pub fn hidden(
        &mut self,
        gate: &Linear,
        up: &Linear,
        down: TensorType,
        tokens: usize,
        input: Inputs,
        from: u64,
    ) -> Result<Inputs> {
        let ff = gate.weight.rows;
        let rows = Rows { from, to: 0 };
        let (gate_f, up_f) = (self.ws.gate.addr(), self.ws.up.addr());
        let mut out = Inputs::default();
        let targets = [Target::new(gate, gate_f), Target::new(up, up_f)];
        let ty = gate.weight.ty;
        let fused = ty == up.weight.ty && self.form(ty) == Form::Quant;
        match self.form(down) {
            Form::Float => out.f = gate_f,
            // The next product quantises for itself.
            Form::Quant if tokens == 1 && fused && !self.quantises_hidden() => {
                out.raw = Raw { x: gate_f, norm: 0, eps: 0.0 };
            }
            Form::Quant => out.q = self.ws.hidden_q.addr(),
            Form::Half => out.h = self.ws.halves.addr(),
        }
        let direct = out.q != 0 && self.quantises_hidden();
        if fused && (!direct || ff.is_multiple_of(32)) {
            let to = if direct { 0 } else { gate_f };
            let targets = targets.map(|t| Target { out: to, ..t });
            self.vectors(&targets, tokens, SWIGLU, input, rows, if direct { out.q } else { 0 })?;
            if out.q != 0 && !direct {
                self.prepare(Prep::Copy, gate_f, 0, ff, tokens, Inputs { q: out.q, ..Inputs::default() })?;
            }
        } else {
            self.products(&targets, tokens, STORE, input, rows)?;
            self.prepare(Prep::Swiglu(up_f), gate_f, 0, ff, tokens, out)?;
        }
        Ok(out)
    }

    /// As [`Engine::hidden`] with any activation, and without `up` where there is none.
    #[allow(clippy::too_many_arguments, reason = "a product with what becomes of it")]
    pub fn hidden_by(
        &mut self,
        how: Activation,
        gate: &Linear,
        up: Option<&Linear>,
        down: TensorType,
        tokens: usize,
        input: Inputs,
        from: u64,
    ) -> Result<Inputs> {
        if let (Activation::Silu, Some(up)) = (how, up) {
            return self.hidden(gate, up, down, tokens, input, from);
        }
        let (gate_f, up_f) = (self.ws.gate.addr(), self.ws.up.addr());
        let gate_to = Target::new(gate, gate_f);
        let targets = [gate_to, up.map_or(gate_to, |up| Target::new(up, up_f))];
        let targets = &targets[..if up.is_some() { 2 } else { 1 }];
        self.products(targets, tokens, STORE, input, Rows { from, to: 0 })?;
        let mut out = Inputs::default();
        match self.form(down) {
            Form::Float => out.f = gate_f,
            Form::Quant => out.q = self.ws.hidden_q.addr(),
            Form::Half => out.h = self.ws.halves.addr(),
        }
        let up_f = if up.is_some() { up_f } else { 0 };
        self.prepare(Prep::Activate(how, up_f), gate_f, 0, gate.weight.rows, tokens, out)?;
        Ok(out)
    }

    /// The product for weights that are not quantised, in floats.
    pub fn plain(&self, t: &Target, tokens: usize, mode: i32, x: u64, rows: Rows) -> Result {
        let w = t.weight;
        let kind = plain_index(w.ty).ok_or_else(|| unsupported(w.ty))?;
        self.check_target(t, tokens, rows)?;
        let a = PlainArgs {
            w: w.addr,
            bias: t.bias,
            out: t.out,
            x,
            in_idx: rows.from,
            out_idx: rows.to,
            rows: w.rows as i32,
            cols: w.cols as i32,
            stride: t.stride as i32,
            tokens: tokens as i32,
            mode,
            vector: i32::from(w.cols.is_multiple_of(8) && w.addr.is_multiple_of(16)),
        };
        let f = self.kernels.plain[kind][usize::from(tokens > 1)];
        let grid = (w.rows.div_ceil(8) as u32, tokens.div_ceil(8) as u32, 1);
        // SAFETY: PlainArgs is what plain_* declare; shapes were checked by the loader, the room for results above.
        unsafe { self.launch(f, grid, 256, 0, &a) }
    }

    /// Weights to halves (rows padded) or floats (rows back to back).
    pub fn convert(&self, w: &Weight, out: u64, half: bool) -> Result {
        let kind = any_index(w.ty).ok_or_else(|| unsupported(w.ty))?;
        let bytes = if half { half_bytes(w.rows, w.cols) } else { float_bytes(w.rows, w.cols) };
        self.ws.rooms.check("converted weights", out, bytes)?;
        let a = DequantArgs {
            w: w.addr,
            out,
            rows: w.rows as i32,
            cols: w.cols as i32,
            pitch: if half { pitch(w.cols) } else { w.cols } as i32,
        };
        let f = if half { self.kernels.half[kind] } else { self.kernels.float[kind] };
        let (blocks, shared) = if kind < QUANTS.len() {
            let (_, buf) = step_bytes(w.ty);
            let work = (w.rows * w.cols.div_ceil(1024)).div_ceil(8);
            let shared = 8 * (2 * buf + 32 * if half { 80 } else { 144 });
            let fit = self.device.info.multiprocessors as usize * CONVERT_BLOCKS;
            (work.min(fit), shared)
        } else {
            (w.rows, 0)
        };
        // SAFETY: DequantArgs is what half_* and float_* declare; there is room for all rows at `out`, as checked
        // above.
        unsafe { self.launch(f, (blocks as u32, 1, 1), 256, shared, &a) }
    }

    fn gemm(&self, t: &Target, tokens: usize, mode: i32, x: u64, to: u64) -> Result {
        let row_bytes = t.weight.ty.row_bytes(t.weight.cols).ok_or_else(|| unsupported(t.weight.ty))?;
        self.check_target(t, tokens, Rows { from: 0, to })?;
        if let Some(kind) = quant_index(t.weight.ty)
            && tokens <= THIN_TOKENS
            && let Some((size, shared)) = thin(t.weight.ty, tokens, self.device.info.shared_bytes as usize)
        {
            return self.thin(t, self.kernels.thin[kind][size], THIN[size], shared, tokens, mode, x, to);
        }
        let pitch = pitch(t.weight.cols);
        let fit = self.ws.scratch.bytes() as usize / (pitch * 2) / 128 * 128;
        let mut first = 0;
        while first < t.weight.rows {
            let rows = (t.weight.rows - first).min(fit);
            let piece = Weight { addr: t.weight.addr + (first * row_bytes) as u64, rows, ..t.weight };
            self.convert(&piece, self.ws.scratch.addr(), true)?;
            let a = GemmArgs {
                x,
                w: self.ws.scratch.addr(),
                scale: self.ws.halves_scale.addr(),
                bias: if t.bias == 0 { 0 } else { t.bias + 4 * first as u64 },
                out: t.out + 4 * first as u64,
                out_idx: to,
                tokens: tokens as i32,
                rows: rows as i32,
                pitch: pitch as i32,
                stride: t.stride as i32,
                mode,
                cols: t.weight.cols as i32,
            };
            self.launch_gemm(&a)?;
            first += rows;
        }
        Ok(())
    }

    /// `thin.cu` with `each` tokens a block.
    #[allow(clippy::too_many_arguments, reason = "a product with the kernel chosen for it")]
    fn thin(
        &self,
        t: &Target,
        f: Func,
        each: usize,
        shared: usize,
        tokens: usize,
        mode: i32,
        x: u64,
        to: u64,
    ) -> Result {
        let w = t.weight;
        self.check_words(&w)?;
        let a = GemmArgs {
            x,
            w: w.addr,
            scale: self.ws.halves_scale.addr(),
            bias: t.bias,
            out: t.out,
            out_idx: to,
            tokens: tokens as i32,
            rows: w.rows as i32,
            pitch: pitch(w.cols) as i32,
            stride: t.stride as i32,
            mode,
            cols: w.cols as i32,
        };
        let grid = (tokens.div_ceil(each) as u32, w.rows.div_ceil(THIN_ROWS) as u32, 1);
        // SAFETY: GemmArgs is what thin_* declare; rows and tokens beyond the last are clamped by the kernel, `gemm`
        // has checked the room for results, and device buffers have room behind them for whole 16-byte lines.
        unsafe { self.launch(f, grid, 512, shared, &a) }
    }

    /// Kernels copy weights word by word where the file does not keep them on lines of 16 bytes.
    ///
    /// # Errors
    /// If they lie on no word.
    pub fn check_words(&self, w: &Weight) -> Result {
        if w.addr.is_multiple_of(4) {
            return Ok(());
        }
        Err(device_error(format!(
            "a {} tensor lies on address {:#x}, which is no multiple of 4 (a GGUF file with general.alignment below 4?)",
            w.ty, w.addr
        )))
    }

    fn launch_gemm(&self, a: &GemmArgs) -> Result {
        let (tokens, rows) = (a.tokens as u32, a.rows as u32);
        let large = tokens.div_ceil(128) * rows.div_ceil(128);
        // Small tiles where large ones would leave half of the multiprocessors idle.
        let (f, tile, stages) = if large * 2 > self.device.info.multiprocessors {
            (self.kernels.gemm_large, 128, 3)
        } else {
            (self.kernels.gemm_small, 64, 4)
        };
        let shared = 2 * tile as usize * 128 * stages;
        let grid = (tokens.div_ceil(tile), rows.div_ceil(tile), 1);
        // SAFETY: GemmArgs is what gemm_* declare; rows beyond the last are clamped by the kernel, and `gemm` has
        // checked the room for results.
        unsafe { self.launch(f, grid, 256, shared, a) }
    }
}

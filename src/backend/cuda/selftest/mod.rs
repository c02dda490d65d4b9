//! Every kernel against plain scalar arithmetic on random data: what a user runs on a new card.

mod blocks;
mod layer;
mod moe;
mod single;

use std::io::Write;
use std::sync::Arc;

pub use blocks::random_rows;
use blocks::{Rng, values};

use super::args::{ADD, STORE};
use super::driver::{Device, device_error};
use super::modules::{PLAINS, QUANTS};
use super::product::{Form, Inputs, Prep, Rows, Target, form};
use super::{CudaBackend, DeviceBuffer, Dims, Linear, Weight};
use crate::backend::{BackendError, Class, EXACT_ROWS, Rope, RopeKind};
use crate::gguf::TensorType;

const F32: TensorType = TensorType::F32;

type Result<T = ()> = std::result::Result<T, BackendError>;

/// Squared error over squared reference; infinite if a value is not finite.
fn nmse(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "results and reference differ in length");
    let (mut err, mut all) = (0.0, 0.0);
    for (g, w) in got.iter().zip(want) {
        if !g.is_finite() {
            return f64::INFINITY;
        }
        err += (f64::from(*g) - w).powi(2);
        all += w * w;
    }
    err / all.max(1e-300)
}

/// Collects results line by line.
struct Report<'a> {
    out: &'a mut dyn Write,
    failed: usize,
    checks: usize,
    /// Groups of checks that were come to, and which of them are run: those whose number leaves the first when divided by the second.
    groups: usize,
    part: (usize, usize),
    small: bool,
}

impl Report<'_> {
    /// Whether the group of checks that comes next is one of this part.
    fn is_mine(&mut self) -> bool {
        self.groups += 1;
        self.groups % self.part.1 == self.part.0 % self.part.1
    }

    fn check(&mut self, what: &str, error: f64, bound: f64) {
        self.checks += 1;
        let ok = error <= bound;
        if !ok {
            self.failed += 1;
        }
        let word = if ok { "ok" } else { "FAILED" };
        // A report that cannot be written does not change what was found.
        let _ = writeln!(self.out, "{what:<44} NMSE {error:9.2e}  bound {bound:7.0e}  {word}");
    }
}

/// Multiprocessors that [`selftest`] wants in small shapes: see [`Device::open_as`]. One head's blocks of a prompt are fewer,
/// so that its keys are divided.
pub const SMALL_MULTIPROCESSORS: u32 = 3;
/// Columns of rows so wide that tiles hold pieces of two of them, and that activations are quantised in several goes.
pub(super) const WIDE: usize = 28672;

/// Runs the checks of part `(k, n)` on `device`, all of part (1, 1); writes one line each to `out`. Returns the number that failed.
///
/// With `small`, on a device of [`SMALL_MULTIPROCESSORS`], every kernel and every type runs in shapes that are as small as tools
/// want that make each access slow, and still have several tiles in each direction with a rest, blocks with more tiles than
/// their ring has stages, rows in pieces, and keys in several tiles and ranges.
pub fn selftest(device: &Arc<Device>, part: (usize, usize), small: bool, out: &mut dyn Write) -> Result<usize> {
    let mut report = Report { out, failed: 0, checks: 0, groups: 0, part, small };
    let mut backend = CudaBackend::new(device, &product_dims())?;
    let mut wide = CudaBackend::new(device, &wide_dims(small))?;
    for ty in QUANTS.iter().chain(&PLAINS) {
        if !report.is_mine() {
            continue;
        }
        check_type(device, &mut backend, *ty, &mut report)?;
        if !small {
            check_swiglu(device, &mut wide, *ty, (256, WIDE), &[1, 2, 8], &mut report)?;
            continue;
        }
        let m = Matrix::random(device, *ty, 40, WIDE, 7)?;
        for tokens in [1, 2, 8] {
            check_product(&mut wide, &m, Class::Exact, tokens, &mut report)?;
        }
        if *ty == TensorType::Q8_0 {
            check_swiglu(device, &mut wide, *ty, (WIDE, 32), &[1, 8], &mut report)?;
        }
    }
    if report.is_mine() {
        check_room(device, &mut backend, &mut report)?;
    }
    drop(wide);
    layer::check_layers(device, &mut report)?;
    single::check_single(device, &mut report)?;
    moe::check_experts(device, &mut report)?;
    let (checks, failed) = (report.checks, report.failed);
    let _ = writeln!(report.out, "{checks} checks, {failed} failed, {}", device.info.name);
    Ok(failed)
}

/// Sizes of a session for tests.
#[cfg(test)]
pub(super) fn sizes() -> Dims {
    product_dims()
}

fn product_dims() -> Dims {
    Dims {
        n_layers: 1,
        n_blocks: 1,
        expert_bytes: 0,
        n_embd: 4352,
        n_heads: 4,
        n_kv_heads: 1,
        head_dim: 64,
        shapes: Vec::new(),
        n_per_block: 0,
        value_of_latent: 0,
        n_ff: 4352,
        n_experts: 0,
        n_experts_used: 0,
        n_ff_expert: 0,
        n_vocab: 256,
        max_batch: 200,
        max_outputs: 1,
        n_ctx: 64,
        recent: None,
        bfloat: false,
        kv_type: TensorType::F16,
        ropes: vec![Rope { kind: RopeKind::Norm, freqs: vec![1.0; 32], magnitude: 1.0 }],
        n_mix: 0,
        n_attn: 0,
        recurrent: None,
        beyond: None,
        no_kernel: None,
    }
}

/// A matrix on the device at an address that is no multiple of 32 beyond 32 itself, and its values.
struct Matrix {
    _buffer: DeviceBuffer,
    weight: Weight,
    values: Vec<f32>,
}

impl Matrix {
    fn random(device: &Arc<Device>, ty: TensorType, rows: usize, cols: usize, seed: u64) -> Result<Matrix> {
        // Norms and biases (single rows) are about as large as in models.
        let scale = if rows == 1 { 2.0 } else { 2.0 / (cols as f32).sqrt() };
        Matrix::of(device, ty, rows, cols, &random_rows(ty, rows * cols, scale, seed))
    }

    fn of(device: &Arc<Device>, ty: TensorType, rows: usize, cols: usize, bytes: &[u8]) -> Result<Matrix> {
        let buffer = device.alloc(bytes.len() as u64 + 32, "weights")?;
        buffer.write(32, bytes)?;
        Ok(Matrix {
            weight: Weight { addr: buffer.addr() + 32, ty, rows, cols },
            _buffer: buffer,
            values: values(ty, bytes),
        })
    }

    fn linear(&self, bias: Option<&Matrix>) -> Linear {
        Linear { weight: self.weight, bias: bias.map(|b| b.weight) }
    }

    /// `W · x` for each row of x.
    fn times(&self, x: &[f64]) -> Vec<f64> {
        let cols = self.weight.cols;
        x.chunks(cols)
            .flat_map(|x| {
                self.values.chunks(cols).map(move |w| w.iter().zip(x).map(|(a, b)| f64::from(*a) * b).sum::<f64>())
            })
            .collect()
    }
}

/// Activations as the int8 products see them: 32 at a time, to the nearest 127th of the largest.
fn quantised(x: &[f64]) -> Vec<f64> {
    x.chunks(32)
        .flat_map(|b| {
            let big = b.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            let inv = if big > 0.0 { 127.0 / big as f32 } else { 0.0 };
            b.iter().map(move |v| f64::from((*v as f32 * inv).round_ties_even()) * big / 127.0)
        })
        .collect()
}

/// The activations that a product of this type and class works on, and the error it may add.
fn seen_by(ty: TensorType, class: Class, x: &[f64]) -> (Vec<f64>, f64) {
    match form(ty, class) {
        Form::Quant => (quantised(x), 1e-9),
        Form::Float => (x.to_vec(), 1e-10),
        Form::Half => (x.to_vec(), 1e-6),
    }
}

fn check_type(device: &Arc<Device>, b: &mut CudaBackend, ty: TensorType, report: &mut Report) -> Result {
    let unit = ty.block_elems().max(32);
    let all = [(67, unit), (33, 5 * unit), (70, 4352 / unit * unit), (130, 1024 + unit), (21, 2048 + 2 * unit)];
    let (exact, bulk) = if report.small { SMALL_TOKENS } else { TOKENS };
    for (rows, cols) in if report.small { small_shapes(unit) } else { all.to_vec() } {
        let m = Matrix::random(device, ty, rows, cols, 7 + rows as u64)?;
        let e = &b.engine;
        e.convert(&m.weight, e.ws.gate.addr(), false)?;
        let mut got = vec![0.0f32; rows * cols];
        if got.len() as u64 * 4 <= e.ws.gate.bytes() {
            e.ws.gate.read(0, &mut got)?;
            let want: Vec<f64> = m.values.iter().map(|v| f64::from(*v)).collect();
            report.check(&format!("{ty} {rows}x{cols} values"), nmse(&got, &want), 1e-13);
        }
        for &tokens in exact {
            check_product(b, &m, Class::Exact, tokens, report)?;
        }
        for &tokens in bulk {
            check_product(b, &m, Class::Bulk, tokens, report)?;
        }
        check_picked(device, b, &m, report)?;
    }
    if ty.block_elems() == 1 {
        let m = Matrix::random(device, ty, 19, 77, 5)?;
        check_product(b, &m, Class::Exact, 1, report)?;
        check_product(b, &m, Class::Exact, 7, report)?;
        check_product(b, &m, Class::Bulk, 40, report)?;
    }
    let sizes = if report.small { (256, 512) } else { (512, 768) };
    check_swiglu(device, b, ty, sizes, &[1, 5, 19, 70], report)
}

/// Tokens of exact products and of bulk ones: a batch of each size of `bulk.cu`; both sizes of `thin.cu`, and of `gemm.cu`.
type Tokens = (&'static [usize], &'static [usize]);
const TOKENS: Tokens = (&[1, 2, 3, 8], &[1, 11, 33, 150]);
const SMALL_TOKENS: Tokens = (&[1, 2, 3, 8], &[11, 33, 90, 150]);

/// Rows and columns of the products of [`selftest`] with `small`. The first has more tiles than a block's ring has stages.
pub(super) fn small_shapes(unit: usize) -> Vec<(usize, usize)> {
    vec![(1003, unit), (33, 5 * unit), (150, 1024 + unit)]
}

/// More than the workspace was sized for is an error, not a write behind it.
fn check_room(device: &Arc<Device>, b: &mut CudaBackend, report: &mut Report) -> Result {
    let ty = TensorType::Q8_0;
    let m = [1, 2].map(|seed| Matrix::random(device, ty, 28672, 256, seed));
    let [gate, up] = m;
    let (gate, up) = (gate?, up?);
    b.engine.class = Class::Exact;
    let input = inputs(b, ty, 8, 256, &vec![1.0; 8 * 256])?;
    let hidden = b.engine.hidden(&gate.linear(None), &up.linear(None), ty, 8, input, 0);
    let refused = matches!(hidden, Err(BackendError::Overrun { .. }));
    report.check("more columns than the workspace has", f64::from(u8::from(!refused)), 0.0);
    b.synchronize()
}

/// [`product_dims`] for the widest rows, and few of them: of hidden values, or, with `small`, of inputs.
fn wide_dims(small: bool) -> Dims {
    let dims = Dims { n_embd: 256, n_ff: WIDE, max_batch: 8, ..product_dims() };
    if small { Dims { n_embd: WIDE, n_ff: 256, n_heads: WIDE / dims.head_dim, ..dims } } else { dims }
}

fn inputs(b: &CudaBackend, ty: TensorType, tokens: usize, cols: usize, x: &[f32]) -> Result<Inputs> {
    let e = &b.engine;
    e.ws.x.write(0, x)?;
    let to = e.forms(&[ty]);
    e.prepare(Prep::Copy, e.ws.x.addr(), 0, cols, tokens, to)?;
    Ok(to)
}

fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

/// Stores with a bias, then adds the same again; rows alone give the same bits.
fn check_product(b: &mut CudaBackend, m: &Matrix, class: Class, tokens: usize, report: &mut Report) -> Result {
    let Weight { ty, rows, cols, .. } = m.weight;
    b.engine.class = class;
    let mut rng = Rng::new(tokens as u64 + 100);
    let x = rng.floats(tokens * cols, 3.0);
    let bias = rng.floats(rows, 1.0);
    b.engine.ws.up.write(0, &bias)?;
    let target = Target { weight: m.weight, bias: b.engine.ws.up.addr(), out: b.engine.ws.gate.addr(), stride: rows };
    let mut product = |tokens: usize, x: &[f32]| -> Result<Vec<f32>> {
        let input = inputs(b, ty, tokens, cols, x)?;
        b.engine.ws.gate.write(0, &vec![f32::NAN; tokens * rows])?;
        b.engine.products(&[target], tokens, STORE, input, Rows::default())?;
        b.engine.products(&[target], tokens, ADD, input, Rows::default())?;
        let mut got = vec![0.0f32; tokens * rows];
        b.engine.ws.gate.read(0, &mut got)?;
        Ok(got)
    };
    let got = product(tokens, &x)?;
    let mut other = 0;
    for t in [0, tokens / 2, tokens - 1] {
        let alone = product(1, &x[t * cols..(t + 1) * cols])?;
        other += alone.iter().zip(&got[t * rows..]).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    }
    let name = if class == Class::Exact { "exact" } else { "bulk" };
    report.check(&format!("{ty} {rows}x{cols} times {tokens} {name}: alone"), other as f64, 0.0);
    let (x, bound) = seen_by(ty, class, &widen(&x));
    let mut want = m.times(&x);
    for (i, v) in want.iter_mut().enumerate() {
        *v = 2.0 * (*v + f64::from(bias[i % rows]));
    }
    report.check(&format!("{ty} {rows}x{cols} times {tokens} {name}"), nmse(&got, &want), bound);
    Ok(())
}

/// Reads picked rows and writes to picked rows.
fn check_picked(device: &Arc<Device>, b: &mut CudaBackend, m: &Matrix, report: &mut Report) -> Result {
    let Weight { ty, rows, cols, .. } = m.weight;
    let x = Rng::new(9).floats(6 * cols, 1.0);
    let (from, to) = ([4u32, 0, 3], [5u32, 2, 0]);
    let lists = device.alloc(24, "lists")?;
    lists.write(0, &from)?;
    lists.write(12, &to)?;
    b.engine.class = Class::Exact;
    let input = inputs(b, ty, 6, cols, &x)?;
    b.engine.ws.gate.write(0, &vec![0.0f32; 6 * rows])?;
    let target = Target { weight: m.weight, bias: 0, out: b.engine.ws.gate.addr(), stride: rows };
    let picked = Rows { from: lists.addr(), to: lists.addr() + 12 };
    b.engine.products(&[target], 3, STORE, input, picked)?;
    let mut got = vec![0.0f32; 6 * rows];
    b.engine.ws.gate.read(0, &mut got)?;
    let (x, bound) = seen_by(ty, Class::Exact, &widen(&x));
    let y = m.times(&x);
    let mut want = vec![0.0; 6 * rows];
    for (f, t) in from.iter().zip(&to) {
        let (f, t) = (*f as usize * rows, *t as usize * rows);
        want[t..t + rows].copy_from_slice(&y[f..f + rows]);
    }
    report.check(&format!("{ty} {rows}x{cols} picked rows"), nmse(&got, &want), bound);
    Ok(())
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Gate, up, SwiGLU and down, in one type, for `n` inputs and `ff` hidden values.
fn check_swiglu(
    device: &Arc<Device>,
    b: &mut CudaBackend,
    ty: TensorType,
    (n, ff): (usize, usize),
    batches: &[usize],
    report: &mut Report,
) -> Result {
    let gate = Matrix::random(device, ty, ff, n, 21)?;
    let up = Matrix::random(device, ty, ff, n, 22)?;
    let down = Matrix::random(device, ty, n, ff, 23)?;
    for &tokens in batches {
        let x = Rng::new(31).floats(tokens * n, 2.0);
        let class = if tokens > EXACT_ROWS { Class::Bulk } else { Class::Exact };
        b.engine.class = class;
        let input = inputs(b, ty, tokens, n, &x)?;
        let hidden = b.engine.hidden(&gate.linear(None), &up.linear(None), ty, tokens, input, 0)?;
        let target = Target::new(&down.linear(None), b.engine.ws.q.addr());
        if (tokens * n * 4) as u64 > b.engine.ws.q.bytes() {
            return Err(device_error("the test's buffers are too small"));
        }
        b.engine.products(&[target], tokens, STORE, hidden, Rows::default())?;
        let mut got = vec![0.0f32; tokens * n];
        b.engine.ws.q.read(0, &mut got)?;
        let (x, bound) = seen_by(ty, class, &widen(&x));
        let (g, u) = (gate.times(&x), up.times(&x));
        let h: Vec<f64> = g.iter().zip(&u).map(|(g, u)| silu(*g) * u).collect();
        let (h, _) = seen_by(ty, class, &h);
        // A hidden value near the middle of two steps may fall to either side.
        let bound = if bound == 1e-9 { 1e-5 } else { bound };
        report.check(&format!("{ty} SwiGLU and down {n}x{ff}, {tokens}"), nmse(&got, &down.times(&h)), bound);
    }
    Ok(())
}

//! The CPU backend: kernels chosen at run time for AVX-512/VNNI, AVX2 or plain Rust.
//!
//! Weights are computed where they lie, in the arena. Each output element is computed by one thread
//! in an order that follows from the shapes and the class of its row alone, so results do not depend on the number of
//! threads or on the rows next to it: exact rows meet the weights one by one, bulk rows in panels, however many they are.

mod attention;
mod buf;
mod isa;
mod kernel;
mod latent;
mod lens;
mod ops;
mod panel;
mod part;
mod pool;
mod recurrent;
mod selftest;
#[allow(non_camel_case_types, reason = "the types have ggml's names")]
mod unpack;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use isa::Isa;
pub use selftest::selftest;

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use super::{
    Activation as HowActivated, Backend, BackendError, Class, Dims, EXACT_ROWS, Expert, KvShape, Layers, Linear, Norm,
    Op, RopeKind, RouterParams, Run, Scores, Weight, reference,
};
use crate::gguf::TensorType;
use crate::state::{PAGE, PageId, Pages, StateOp};
use attention::{Attend, Cache, TILE, heads_of_task};
use buf::Buf;
use kernel::{Activation, Body, Dot, Job, Paired, Quantise, Rows, Then, dispatch};
use lens::Lens;
use panel::Panel;
use pool::Pool;
use unpack::{PACKET, SUB, SUBS};
#[cfg(target_arch = "x86_64")]
use x86::amx;

/// Rows of weights of a task with exact rows: few, so that threads end together; a whole number of groups that share a
/// scale.
const ROWS_OF_EXACT: usize = 16;
/// Bytes of weights of a task with exact rows, where nothing wants more.
const BYTES_OF_EXACT: usize = 32 << 10;
/// Experts of one token that are computed together.
const EXPERTS_AT_ONCE: usize = 16;
/// Rows of weights of a task with bulk rows: whole panels.
const ROWS_OF_BULK: usize = 2 * panel::ROWS;

/// The backend.
pub struct CpuBackend {
    dims: Dims,
    isa: Isa,
    pool: Pool,
    /// Rows of the pass by class, of which those of outputs are left in the end; and where the pass began with bulk ones.
    parts: [usize; 2],
    first_bulk: usize,
    /// Rows of logits, and the first one of each class.
    outputs: usize,
    first_output: [usize; 2],
    /// Whether what the head reads is quantised, by class.
    head_ready: [bool; 2],
    /// The class at hand.
    class: Class,
    /// Where each row of the pass lies in its sequence, and the rows of each run.
    places: Vec<Place>,
    tiles: Vec<Tile>,
    /// Pages of the sequences, one behind the other.
    tables: Vec<PageId>,
    x: Buf<f32>,
    /// The input of products: normed X, Attn or Hidden.
    input: Buf<f32>,
    quantised: Buf<Activation>,
    /// The input of products of exact rows, and what they make of it: `row` says which is the input.
    rows: [Row; 2],
    row: usize,
    /// Whether the input is the attention's output already, quantised where it was computed.
    attn_ready: bool,
    q: Buf<f32>,
    k: Buf<f32>,
    v: Buf<f32>,
    attn: Buf<f32>,
    hidden: Buf<f32>,
    mix: Buf<f32>,
    gates: Buf<f32>,
    beta: Buf<f32>,
    alpha: Buf<f32>,
    per_block: Buf<f32>,
    /// A row of Mix whose parts change places.
    mix_row: Vec<f32>,
    /// Heads of the layer at hand.
    shape: KvShape,
    /// Recurrent states: `[state][layer]`, the last inputs of convolutions and then the heads' matrices.
    states: Buf<f32>,
    /// Runs of the pass.
    runs: Vec<RunRows>,
    /// Of operations one by one.
    up: Buf<f32>,
    part: Buf<f32>,
    /// The buffer whose rows of the class at hand are quantised as they are.
    ready: Option<super::Act>,
    logits: Buf<f32>,
    /// Keys and values of all layers.
    cache_k: Buf<u8>,
    cache_v: Buf<u8>,
    /// Cosines and sines of the pass: `[token][pair]`.
    cos: Buf<f32>,
    sin: Buf<f32>,
    scratch: Buf<f32>,
    scratch_each: usize,
    panels: Buf<Panel>,
    panels_each: usize,
    /// Most rows of weights of a task whose activations are in tiles.
    task_rows: usize,
    experts: Experts,
    /// What exact rows leave of a layer's queries and keys to those that attend.
    rotation: Option<Rotation>,
    /// One more than the first block of which a key or value was too large for an F16 cache; 0 for none.
    overflow: AtomicUsize,
}

/// Where a row lies: its position, and where its sequence's pages begin in `tables`, and its pages of recent positions.
#[derive(Clone, Copy)]
struct Place {
    position: usize,
    table: usize,
    recent: usize,
}

/// Rows of one run, which count from the first of their class, and the state behind what came before.
#[derive(Clone)]
struct RunRows {
    class: Class,
    rows: std::ops::Range<usize>,
    /// Whether nothing came before.
    first: bool,
    state: u32,
}

/// Rows of one run that a task of attention takes; they count from the first of their class.
#[derive(Clone)]
struct Tile {
    class: Class,
    rows: std::ops::Range<usize>,
}

/// Quantised exact rows, in both orders.
struct Row {
    packets: Buf<Activation>,
    pairs: Buf<Paired>,
}

impl Row {
    fn new(packets: usize, what: &'static str) -> Result<Row, BackendError> {
        Ok(Row { packets: Buf::new(packets, what)?, pairs: Buf::new(packets, what)? })
    }

    fn bytes(&self) -> u64 {
        self.packets.bytes() + self.pairs.bytes()
    }
}

/// Results that are quantised by the thread that computed them: rows of `cols` floats at `x`.
#[derive(Clone, Copy)]
struct Onward {
    x: Shared<f32>,
    tokens: usize,
    cols: usize,
    packets: Shared<Activation>,
    pairs: Shared<Paired>,
    fine: bool,
}

impl Onward {
    /// Quantises elements `from..to` of these rows, which begin and end at multiples of 16 or at the end.
    ///
    /// # Safety
    /// The elements have been computed by this thread, and nobody else quantises them.
    unsafe fn quantise(self, isa: Isa, rows: std::ops::Range<usize>, from: usize, to: usize) {
        // The last elements' packet is filled with zeros.
        let end = if to == self.cols { packets(self.cols) * SUBS } else { to / SUB };
        let (cols, each, fine) = (self.cols, packets(self.cols), self.fine);
        for t in rows {
            let x = self.x.get().wrapping_add(t * cols);
            let out = self.packets.get().wrapping_add(t * each);
            let pairs = self.pairs.get().wrapping_add(t * each);
            dispatch(isa, Quantise { x, cols, from: from / SUB, to: end, out, pairs, fine });
        }
    }
}

/// What routed experts need beside the rest.
struct Experts {
    scores: Buf<f32>,
    /// Ids and weights of the choices: `[token][choice]`.
    ids: Buf<u32>,
    weights: Buf<f32>,
    /// Outputs: `[token][choice][n_embd]`.
    out: Buf<f32>,
    /// Gathered activations and hidden states of one expert's tokens.
    gathered: Buf<f32>,
    hidden: Buf<f32>,
    up: Buf<f32>,
    quantised: Buf<Activation>,
    result: Buf<f32>,
    /// Hidden states of all experts of one token, `[choice]`, or the exact rows of one expert.
    row: Row,
    /// (token, choice) pairs of the expert at hand.
    pairs: Vec<usize>,
    chooser: ops::Chooser,
    /// Whether weights multiply what experts read.
    on_input: bool,
}

/// An address that tasks write disjoint parts of.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);

// SAFETY: who uses the address in several threads gives each a part of its own.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn get(self) -> *mut T {
        self.0
    }
}

/// Scratch of all threads.
#[derive(Clone, Copy)]
struct Scratch {
    floats: Shared<f32>,
    each: usize,
    panels: Shared<Panel>,
    panels_each: usize,
}

impl Scratch {
    /// The part of `thread`.
    ///
    /// # Safety
    /// The thread has one call's part at a time, and the backend outlives it.
    unsafe fn of<'a>(self, thread: usize) -> (&'a mut [f32], &'a mut [Panel]) {
        // SAFETY: the buffers have a part for each thread of the pool.
        unsafe {
            (
                std::slice::from_raw_parts_mut(self.floats.get().add(thread * self.each), self.each),
                std::slice::from_raw_parts_mut(self.panels.get().add(thread * self.panels_each), self.panels_each),
            )
        }
    }
}

/// Rows of a task of exact rows: about [`BYTES_OF_EXACT`] of weights, so that threads end together.
fn rows_of_exact(jobs: &[(Job, usize)]) -> usize {
    let bytes: usize = jobs.iter().map(|(j, _)| j.cols / j.ty.block_elems() * j.ty.block_bytes()).sum();
    (BYTES_OF_EXACT / bytes.max(1)).clamp(2, ROWS_OF_EXACT).next_power_of_two()
}

fn packets(cols: usize) -> usize {
    cols.div_ceil(PACKET)
}

impl CpuBackend {
    /// Allocates every buffer. Pages of the cache take memory when positions are used.
    pub fn new(dims: Dims, threads: usize) -> Result<CpuBackend, BackendError> {
        let isa = Isa::choose(dims.bfloat);
        CpuBackend::with_isa(dims, threads, isa)
    }

    /// Whether a model's bulk rows may be rounded to bfloat16 if its matrices are of this type: those of the others come nearer to the
    /// exact logits by it, but of these two further off than 1.25 times llama.cpp's own distance (tests/fidelity).
    pub fn bfloat_serves(ty: TensorType) -> bool {
        !matches!(ty, TensorType::Q4_0 | TensorType::IQ4_NL)
    }

    /// Bytes that the buffers of such a session take with so many threads, KV cache included; `u64::MAX` if they
    /// exceed the address space.
    pub fn workspace_bytes_of(dims: &Dims, threads: usize) -> u64 {
        Lens::new(dims, threads).bytes()
    }

    /// As [`CpuBackend::new`], with kernels of `isa`, or of the largest set below it that the machine has.
    ///
    /// # Errors
    /// As [`CpuBackend::new`].
    pub fn with_isa(dims: Dims, threads: usize, isa: Isa) -> Result<CpuBackend, BackendError> {
        let isa = isa.min(Isa::detect());
        let l = Lens::new(&dims, threads);
        let experts = Experts {
            scores: Buf::new(l.scores, "router scores")?,
            ids: Buf::new(l.choices, "router choices")?,
            weights: Buf::new(l.choices, "router weights")?,
            out: Buf::new(l.expert_out, "outputs of experts")?,
            gathered: Buf::new(l.expert_in, "inputs of experts")?,
            hidden: Buf::new(l.expert_hidden, "hidden states of experts")?,
            up: Buf::new(l.expert_up, "hidden states of experts")?,
            row: Row::new(l.expert_row, "hidden states of experts")?,
            quantised: Buf::new(l.expert_quantised, "inputs of experts")?,
            result: Buf::new(l.expert_in, "results of experts")?,
            pairs: Vec::with_capacity(l.choices),
            chooser: ops::Chooser::new(dims.n_experts),
            on_input: false,
        };
        Ok(CpuBackend {
            isa,
            parts: [0; 2],
            first_bulk: 0,
            outputs: 0,
            first_output: [0; 2],
            head_ready: [false; 2],
            class: Class::Bulk,
            x: Buf::new(l.x, "activations")?,
            input: Buf::new(l.x, "activations")?,
            quantised: Buf::new(l.quantised, "quantised activations")?,
            rows: [Row::new(l.row, "quantised activations")?, Row::new(l.row, "quantised activations")?],
            row: 0,
            attn_ready: false,
            q: Buf::new(l.q, "queries")?,
            k: Buf::new(l.kv, "keys")?,
            v: Buf::new(l.kv, "values")?,
            attn: Buf::new(l.q, "attention")?,
            hidden: Buf::new(l.hidden, "hidden states")?,
            up: Buf::new(l.up, "hidden states")?,
            mix: Buf::new(l.mix, "activations")?,
            gates: Buf::new(l.gates, "activations")?,
            beta: Buf::new(l.heads, "activations")?,
            alpha: Buf::new(l.heads, "activations")?,
            per_block: Buf::new(l.per_block, "embeddings for each block")?,
            shape: dims.shape(0),
            mix_row: Vec::with_capacity(dims.n_mix),
            states: Buf::new(l.states, "recurrent states")?,
            runs: Vec::with_capacity(dims.max_batch),
            part: Buf::new(l.part, "activations")?,
            ready: None,
            logits: Buf::new(l.logits, "logits")?,
            cache_k: Buf::new(l.cache[0], "KV cache")?,
            cache_v: Buf::new(l.cache[1], "KV cache")?,
            cos: Buf::new(l.rotary, "rotary table")?,
            sin: Buf::new(l.rotary, "rotary table")?,
            scratch: Buf::new(l.scratch, "scratch")?,
            scratch_each: l.scratch_each,
            panels: Buf::new(l.panels, "scratch")?,
            panels_each: l.panels_each,
            task_rows: l.task_rows,
            experts,
            pool: Pool::new(threads).map_err(|source| BackendError::Threads { threads, source })?,
            rotation: None,
            overflow: AtomicUsize::new(0),
            // Behind the cache, which is refused where it is too large.
            places: Vec::with_capacity(dims.max_batch),
            tiles: Vec::with_capacity(dims.max_batch),
            tables: Vec::with_capacity(if dims.recent.is_some() { 2 } else { 1 } * EXACT_ROWS * dims.pages()),
            dims,
        })
    }

    /// Whether matrices of this type can be computed.
    pub fn supports_type(ty: TensorType) -> bool {
        reference::TYPES.contains(&ty)
    }

    /// Rows of the class at hand.
    fn n_tokens(&self) -> usize {
        self.parts[self.class as usize]
    }

    /// The first row of the class at hand among all rows of the pass.
    fn first(&self) -> usize {
        match self.class {
            Class::Exact => 0,
            Class::Bulk => self.first_bulk,
        }
    }

    /// X of the rows at hand. It outlasts operations, as [`CpuBackend::input_here`] does the units of an expert.
    fn x_here(&mut self) -> *mut f32 {
        let at = self.first() * self.dims.n_embd;
        self.x[at..].as_mut_ptr()
    }

    fn input_here(&mut self) -> *mut f32 {
        let at = self.first() * self.dims.n_embd;
        self.input[at..].as_mut_ptr()
    }

    /// The choices of the rows at hand, from the first on.
    fn choices(&self) -> std::ops::Range<usize> {
        let (used, first) = (self.dims.n_experts_used, self.first());
        first * used..(first + self.n_tokens()) * used
    }

    /// A router is a step function: where one decides, a rounding error may change an expert, so
    /// activations keep what rounding left.
    fn fine(&self) -> bool {
        self.dims.n_experts > 0
    }

    /// Whether the input of products is in tiles. What rounding leaves is too much where a router decides.
    fn tiled(&self) -> bool {
        cfg!(target_arch = "x86_64") && self.isa == Isa::Amx && self.class == Class::Bulk && !self.fine()
    }

    /// Rows of weights of a task with bulk rows, of `rows` in all.
    fn rows_of_bulk(&self, rows: usize) -> usize {
        #[cfg(target_arch = "x86_64")]
        if self.tiled() {
            // As many as there is scratch for.
            return amx::task_rows(rows, self.pool.threads()).min(self.task_rows);
        }
        let _ = rows;
        ROWS_OF_BULK
    }

    /// Runs jobs over the same rows: each thread does all jobs for its rows, in order. What they compute of exact rows
    /// may be quantised onward.
    fn jobs(&mut self, jobs: &[(Job, usize)], onward: Option<Onward>) {
        self.groups(1, &|_| (jobs, onward));
    }

    /// Runs `n` groups of jobs at once.
    fn groups<'a>(&mut self, n: usize, group: &(dyn Fn(usize) -> (&'a [(Job, usize)], Option<Onward>) + Sync)) {
        let rows = |jobs: &[(Job, usize)]| jobs.iter().map(|j| j.1).max().unwrap_or(0);
        let (first, onward) = group(0);
        let step = match self.class {
            // What is quantised onward has a scale for each 16 rows.
            Class::Exact if onward.is_some() => ROWS_OF_EXACT,
            Class::Exact => rows_of_exact(first),
            Class::Bulk => self.rows_of_bulk(rows(first)),
        };
        let each = rows(first).div_ceil(step);
        let (scratch, isa) = (self.scratch(), self.isa);
        self.pool.run(n * each, &|thread, task| {
            let (jobs, onward) = group(task / each);
            let first = task % each * step;
            // SAFETY: each thread has its own part of the scratch.
            let (scratch, panels) = unsafe { scratch.of(thread) };
            for (job, rows) in jobs {
                let (from, to) = (first, (first + step).min(*rows));
                if from < to {
                    dispatch(isa, Rows { job, from, to, scratch, panels });
                }
            }
            if let Some(onward) = onward {
                // SAFETY: these rows are this task's, and it has just computed them.
                unsafe { onward.quantise(isa, 0..onward.tokens, first, (first + step).min(onward.cols)) };
            }
        });
    }

    /// Runs jobs that do not need each other over the same rows of activations, one behind the other: as many tasks of
    /// each as its rows need.
    fn stacked(&mut self, jobs: &[(Job, usize)]) {
        let step = match self.class {
            Class::Exact => rows_of_exact(&jobs[..1]),
            Class::Bulk => self.rows_of_bulk(jobs.iter().map(|j| j.1).sum()),
        };
        let (scratch, isa) = (self.scratch(), self.isa);
        let tasks = jobs.iter().map(|(_, rows)| rows.div_ceil(step)).sum();
        self.pool.run(tasks, &|thread, mut task| {
            let mut jobs = jobs.iter();
            let found = jobs.find(|(_, rows)| {
                let all = rows.div_ceil(step);
                let here = task < all;
                task -= if here { 0 } else { all };
                here
            });
            if let Some((job, rows)) = found {
                // SAFETY: each thread has its own part of the scratch.
                let (scratch, panels) = unsafe { scratch.of(thread) };
                dispatch(isa, Rows { job, from: task * step, to: ((task + 1) * step).min(*rows), scratch, panels });
            }
        });
    }

    /// What the threads have of scratch.
    fn scratch(&mut self) -> Scratch {
        Scratch {
            floats: Shared(self.scratch.ptr()),
            each: self.scratch_each,
            panels: Shared(self.panels.ptr()),
            panels_each: self.panels_each,
        }
    }

    /// Norms X to `input` and quantises it.
    fn norm_input(&mut self, norm: &Norm) {
        let (x, out) = (Shared(self.x_here()), Shared(self.input_here()));
        self.prepare(x, out, self.dims.n_embd, self.n_tokens(), Some(*norm));
    }

    /// `to` gets `down · (silu(gate · h) * (up · h))` with `h = norm(X)`, by `then`.
    fn feed_forward(&mut self, norm: &Norm, [gate, up, down]: [&Linear; 3], to: *mut f32, then: Then) {
        self.norm_input(norm);
        let (input, hidden) = (self.input_here(), Shared(self.hidden.ptr()));
        let jobs = [self.job(gate, input, hidden.get(), Then::Silu), self.job(up, input, hidden.get(), Then::Mul)];
        let onward = self.onward(hidden, down.weight.cols);
        self.jobs(&jobs, onward);
        match onward {
            Some(_) => self.row = 1 - self.row,
            None => self.prepare(hidden, hidden, down.weight.cols, self.n_tokens(), None),
        }
        let job = self.job(down, hidden.get(), to, then);
        self.jobs(&[job], None);
    }

    /// What slices of feed-forward parts add to X waits where attention's output lies at other times, of all classes at their rows: it is as
    /// wide, and done with (`Model::sliced`).
    pub(in crate::backend) fn slice_here(&mut self) -> &mut [f32] {
        let (d, first) = (self.dims.n_embd, self.first());
        let rows = first * d..(first + self.n_tokens()) * d;
        &mut self.attn[rows]
    }

    /// Quantises `n` rows of `cols` from `x`; with a norm, normed rows are stored to `out` first.
    fn prepare(&mut self, x: Shared<f32>, out: Shared<f32>, cols: usize, n: usize, norm: Option<Norm>) {
        (self.ready, self.attn_ready) = (None, false);
        let (quantised, pairs) = self.quantised();
        let (quantised, pairs) = (Shared(quantised), Shared(pairs));
        let (isa, fine, tiled) = (self.isa, self.fine(), self.tiled());
        let rows = if tiled && norm.is_none() { 0 } else { n };
        self.pool.run(rows, &|_, t| {
            // SAFETY: task t reads and writes row t only; the buffers have `n` rows of these sizes,
            // and a norm's weight has `cols` floats (checked when the model was opened).
            unsafe {
                let mut x = x.get().add(t * cols);
                if let Some(norm) = norm {
                    let to = out.get().add(t * cols);
                    let out = std::slice::from_raw_parts_mut(to, cols);
                    let from = std::slice::from_raw_parts(x, cols);
                    dispatch(isa, RmsNorm { x: from, weight: norm.weight.addr as *const f32, eps: norm.eps, out });
                    x = to;
                }
                if tiled {
                    return;
                }
                let out = quantised.get().add(t * packets(cols));
                // Null stays null.
                let pairs = if pairs.get().is_null() { pairs.get() } else { pairs.get().add(t * packets(cols)) };
                let to = packets(cols) * SUBS;
                dispatch(isa, Quantise { x, cols, from: 0, to, out, pairs, fine });
            }
        });
        #[cfg(target_arch = "x86_64")]
        if tiled {
            let (x, packets) = (if norm.is_some() { out } else { x }, packets(cols));
            self.pool.run(n.div_ceil(amx::TOKENS) * packets, &|_, task| {
                let (tile, packet, out) = (task / packets, task % packets, quantised.get());
                dispatch(isa, amx::Tile { x: x.get(), cols, tokens: n, tile, packet, out });
            });
        }
    }

    /// Where quantised activations of the pass's class lie, in both orders; bulk rows have but one.
    fn quantised(&mut self) -> (*mut Activation, *mut Paired) {
        let row = &mut self.rows[self.row];
        match self.class {
            Class::Exact => (row.packets.ptr(), row.pairs.ptr()),
            Class::Bulk => (self.quantised.ptr(), std::ptr::null_mut()),
        }
    }

    /// Where exact rows of `cols` columns at `x` go when they are quantised at once: the next input.
    fn onward(&mut self, x: Shared<f32>, cols: usize) -> Option<Onward> {
        if self.class != Class::Exact {
            return None;
        }
        let (fine, tokens) = (self.fine(), self.n_tokens());
        let Row { packets, pairs } = &mut self.rows[1 - self.row];
        Some(Onward { x, tokens, cols, packets: Shared(packets.ptr()), pairs: Shared(pairs.ptr()), fine })
    }

    /// A product of the prepared input.
    fn job(&mut self, l: &Linear, xf: *const f32, out: *mut f32, then: Then) -> (Job, usize) {
        let (x, pairs) = self.quantised();
        let job = Job {
            weights: l.weight.addr as *const u8,
            ty: l.weight.ty,
            cols: l.weight.cols,
            bias: l.bias.map_or(std::ptr::null(), |b| b.addr as *const f32),
            x,
            pairs,
            xf,
            tokens: self.n_tokens(),
            class: self.class,
            fine: self.fine(),
            tiled: self.tiled() && l.weight.ty.block_elems() > 1,
            out,
            stride: l.weight.rows,
            then,
        };
        (job, l.weight.rows)
    }

    /// Puts the quantised activations of an expert's tokens in place of the pass's, or back.
    fn swap_quantised(&mut self) {
        match self.class {
            Class::Exact => std::mem::swap(&mut self.rows[self.row], &mut self.experts.row),
            Class::Bulk => std::mem::swap(&mut self.quantised, &mut self.experts.quantised),
        }
    }

    fn cache(&mut self, layer: usize) -> Cache {
        let d = &self.dims;
        let ([at_k, at_v], shape, places) = (d.cache_before(layer), d.shape(layer), d.places(layer));
        // SAFETY: the buffers hold `n_layers` such parts.
        let (k, v) = unsafe { (self.cache_k.ptr().add(at_k), self.cache_v.ptr().add(at_v)) };
        let (ty, each, head_dim) = (d.kv_type, d.kv_bytes(shape.dim), shape.dim);
        let (table, recent) = (self.tables.as_ptr(), d.layers_of(layer) == Layers::Recent);
        Cache { k, v, ty, each, places, table, recent, head_dim, of_keys: shape.of_keys }
    }

    /// Where the first position of a page lies in the cache, and the bytes of each position, of each head of these layers' keys,
    /// or of their values.
    fn page_rows(&self, layers: Layers, page: PageId, values: bool) -> Vec<(usize, usize)> {
        let d = &self.dims;
        assert!((page as usize) < d.pages_of(layers), "page {page} of {}", d.pages_of(layers));
        let mut rows = Vec::new();
        for layer in d.layers(layers) {
            let (shape, [k, v]) = (d.shape(layer), d.cache_before(layer));
            if values && shape.of_keys > 0 {
                continue;
            }
            let (each, mut at) = (d.kv_bytes(shape.dim), if values { v } else { k });
            for _ in 0..shape.heads {
                rows.push((at + page as usize * PAGE * each, each));
                at += d.places(layer) * each;
            }
        }
        rows
    }

    /// Copies the first `positions` positions from a page of these layers on to the places from another one on.
    fn copy_positions(&mut self, layers: Layers, from: PageId, to: PageId, positions: usize) {
        for values in [false, true] {
            let to = self.page_rows(layers, to, values);
            for ((from, each), (to, _)) in self.page_rows(layers, from, values).into_iter().zip(to) {
                let bytes = positions * each;
                let cache = if values { &mut self.cache_v } else { &mut self.cache_k };
                cache.copy_within(from..from + bytes, to);
            }
        }
    }

    /// Attention of a layer; `sinks` are one score a query head.
    fn attend_by(&mut self, layer: usize, scores: Scores, sinks: Option<Weight>) {
        let sinks = Shared(sinks.map_or(std::ptr::null_mut(), |w| w.addr as *mut f32));
        let (cache, scratch) = (self.cache(layer), self.scratch());
        let d = &self.dims;
        let (q, out) = (Shared(self.q.ptr()), Shared(self.attn.ptr()));
        let (n_kv, dim) = (d.shape(layer).heads, d.shape(layer).value_dim());
        let (n_heads, first) = (d.n_heads, self.first());
        let isa = self.isa;
        // Exact rows go on quantised, where heads of a group are whole groups of a scale.
        let width = n_heads / n_kv * dim;
        let cols = n_heads * dim;
        let group = n_heads / n_kv;
        let each = heads_of_task(group);
        let parts = group.div_ceil(each);
        let onward = if width.is_multiple_of(SUB) && parts == 1 { self.onward(out, cols) } else { None };
        let mut rotation = self.rotation.take();
        assert!(rotation.is_none_or(|r| r.layer == layer), "attention of block {layer} behind the queries of another");
        let (overflow, places) = (&self.overflow, &self.places[first..]);
        if let Some(r) = rotation.take_if(|_| parts > 1) {
            // A head of keys is several tasks', and is to be stored before all of them.
            let n_tokens = self.parts[self.class as usize];
            self.pool.run(n_tokens * n_kv, &|_, task| r.run(isa, task / n_kv, task % n_kv, overflow));
        }
        let exact = self.tiles.partition_point(|t| t.class == Class::Exact);
        let (exact, bulk) = self.tiles.split_at(exact);
        let class = self.class;
        let tiles = if self.class == Class::Exact { exact } else { bulk };
        self.pool.run(tiles.len() * n_kv * parts, &|thread, task| {
            let (task, part) = (task / parts, task % parts);
            let (tile, kv_head) = (&tiles[task / n_kv], task % n_kv);
            let first_head = kv_head * group + part * each;
            // SAFETY: each thread has its own part of the scratch.
            let (scratch, _) = unsafe { scratch.of(thread) };
            let tokens = tile.rows.clone();
            let (q, out) = (q.get().cast_const(), out.get());
            if let Some(r) = &rotation {
                tokens.clone().for_each(|token| r.run(isa, token, kv_head, overflow));
            }
            let place = places[tokens.start];
            let first_pos = place.position;
            // SAFETY: the tables of the run begin there.
            let cache = unsafe { cache.of(place.table, place.recent) };
            let sinks = sinks.get().cast_const();
            let tokens_ = tokens.clone();
            let attend = Attend {
                class,
                cache,
                q,
                out,
                n_heads,
                first_head,
                group: each.min(group - part * each),
                kv_head,
                tokens: tokens_,
                first_pos,
                scores,
                sinks,
                scratch,
            };
            dispatch(isa, attend);
            if let Some(onward) = onward {
                // SAFETY: the heads of this group are this task's, and it has just computed them.
                unsafe { onward.quantise(isa, tokens, kv_head * width, (kv_head + 1) * width) };
            }
        });
        if onward.is_some() {
            self.row = 1 - self.row;
        }
        self.attn_ready = onward.is_some();
        self.ready = None;
    }

    /// What is left to do with queries and keys of a layer before they meet.
    fn rotation(&mut self, layer: usize, q_norm: Option<&Norm>, k_norm: Option<&Norm>) -> Rotation {
        let cache = self.cache(layer);
        let (d, first) = (&self.dims, self.first());
        let pairs = d.rope().freqs.len();
        Rotation {
            layer,
            q: Shared(self.q.ptr()),
            k: Shared(self.k.ptr()),
            v: Shared(self.v.ptr()),
            cache,
            norms: [q_norm.copied(), k_norm.copied()],
            cos: self.cos[first * pairs..].as_ptr(),
            sin: self.sin[first * pairs..].as_ptr(),
            pairs,
            kind: d.rope().kind,
            heads: [d.n_heads, d.shape(layer).heads],
            places: self.places[first..].as_ptr(),
        }
    }
}

/// Norms and rotates queries and keys of a layer, and stores keys and values.
#[derive(Clone, Copy)]
struct Rotation {
    layer: usize,
    q: Shared<f32>,
    k: Shared<f32>,
    v: Shared<f32>,
    cache: Cache,
    /// Of queries and of keys.
    norms: [Option<Norm>; 2],
    /// `[token][pair]`.
    cos: *const f32,
    sin: *const f32,
    pairs: usize,
    kind: RopeKind,
    /// Of queries and of keys.
    heads: [usize; 2],
    /// `[token]`.
    places: *const Place,
}

// SAFETY: addresses only; see `Rotate`.
unsafe impl Send for Rotation {}
// SAFETY: as above.
unsafe impl Sync for Rotation {}

impl Rotation {
    /// Does a key/value head of a token, which nobody else does.
    fn run(&self, isa: Isa, token: usize, kv_head: usize, overflow: &AtomicUsize) {
        let mut over = false;
        dispatch(isa, Rotate { of: self, token, kv_head, over: &mut over });
        if over {
            let _ = overflow.compare_exchange(0, self.layer + 1, Relaxed, Relaxed);
        }
    }
}

/// One key/value head of a token, and the query heads that meet it. Says whether a key or value is too large for the cache.
struct Rotate<'a> {
    of: &'a Rotation,
    token: usize,
    kv_head: usize,
    over: &'a mut bool,
}

impl Body for Rotate<'_> {
    #[inline(always)]
    fn run<D: Dot>(self) {
        let Rotate { of, token: t, kv_head, over } = self;
        let hd = of.cache.head_dim;
        let group = of.heads[0] / of.heads[1];
        // SAFETY: the tables have a row for each token of the pass.
        let (cos, sin) = unsafe {
            (
                std::slice::from_raw_parts(of.cos.add(t * of.pairs), of.pairs),
                std::slice::from_raw_parts(of.sin.add(t * of.pairs), of.pairs),
            )
        };
        for (which, base, heads) in [(0, of.q, kv_head * group..(kv_head + 1) * group), (1, of.k, kv_head..kv_head + 1)]
        {
            for h in heads {
                // SAFETY: these heads of token t belong to this task.
                let x = unsafe { std::slice::from_raw_parts_mut(base.get().add((t * of.heads[which] + h) * hd), hd) };
                if let Some(n) = of.norms[which] {
                    RmsNormInPlace { x, weight: n.weight.addr as *const f32, eps: n.eps }.run::<D>();
                }
                rotate(x, of.kind, cos, sin);
            }
        }
        let stored = if of.cache.of_keys > 0 { 1 } else { 2 };
        for (from, to) in [(of.k, of.cache.k), (of.v, of.cache.v)].into_iter().take(stored) {
            // SAFETY: the position of token t of the head belongs to this task and has a page (checked in `begin`).
            unsafe {
                let place = *of.places.add(t);
                let at = of.cache.of(place.table, place.recent).at(kv_head, place.position);
                let x = std::slice::from_raw_parts(from.get().add((t * of.heads[1] + kv_head) * hd), hd);
                *over |= of.cache.store(to, at, x);
            }
        }
    }
}

/// What a norm multiplies by. Squares too large for their sum give no number, rather than a row of zeros.
#[inline(always)]
fn norm_scale(mean: f32, eps: f32) -> f32 {
    if mean.is_finite() { 1.0 / (mean + eps).sqrt() } else { f32::NAN }
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: *const f32,
    eps: f32,
    out: &'a mut [f32],
}

impl Body for RmsNorm<'_> {
    #[inline(always)]
    fn run<D: Dot>(self) {
        let mean = kernel::dot_f32::<D>(self.x, self.x) / self.x.len() as f32;
        let scale = norm_scale(mean, self.eps);
        for (i, (o, x)) in self.out.iter_mut().zip(self.x).enumerate() {
            // SAFETY: the weight has as many floats as the row, at any alignment.
            *o = x * scale * unsafe { self.weight.add(i).read_unaligned() };
        }
    }
}

struct RmsNormInPlace<'a> {
    x: &'a mut [f32],
    weight: *const f32,
    eps: f32,
}

impl Body for RmsNormInPlace<'_> {
    #[inline(always)]
    fn run<D: Dot>(self) {
        let mean = kernel::dot_f32::<D>(self.x, self.x) / self.x.len() as f32;
        let scale = norm_scale(mean, self.eps);
        for (i, x) in self.x.iter_mut().enumerate() {
            // SAFETY: as in `RmsNorm`.
            *x *= scale * unsafe { self.weight.add(i).read_unaligned() };
        }
    }
}

/// Rotates the pairs of a head.
#[inline(always)]
fn rotate(x: &mut [f32], kind: RopeKind, cos: &[f32], sin: &[f32]) {
    let n = cos.len();
    match kind {
        RopeKind::Norm => {
            for ((p, c), s) in x.chunks_exact_mut(2).zip(cos).zip(sin) {
                (p[0], p[1]) = (p[0] * c - p[1] * s, p[0] * s + p[1] * c);
            }
        }
        RopeKind::Neox => {
            let (a, b) = x.split_at_mut(n);
            for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
            }
        }
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn supports(&self, ty: TensorType) -> bool {
        CpuBackend::supports_type(ty)
    }

    fn runs_max(&self) -> usize {
        self.dims.max_batch
    }

    fn begin(&mut self, runs: &[Run<'_>]) -> Result<(), BackendError> {
        self.parts = Run::check(runs, &self.dims, "cpu")?;
        self.first_bulk = self.parts[0];
        self.class = runs[0].class;
        self.outputs = 0;
        self.head_ready = [false; 2];
        self.attn_ready = false;
        self.rotation = None;
        self.shape = self.dims.shape(0);
        self.places.clear();
        self.tiles.clear();
        self.tables.clear();
        self.runs.clear();
        for r in runs {
            let first = self.places.len() - if r.class == Class::Bulk { self.first_bulk } else { 0 };
            let rows = first..first + r.rows;
            self.runs.push(RunRows { class: r.class, rows, first: r.first_pos == 0, state: r.state });
            let tiles = (first..first + r.rows).step_by(TILE);
            self.tiles.extend(tiles.map(|t| Tile { class: r.class, rows: t..(t + TILE).min(first + r.rows) }));
            let end = r.first_pos + r.rows;
            let table = self.tables.len();
            self.tables.extend_from_slice(r.table);
            let recent = self.tables.len();
            if let Some(of) = self.dims.recent.as_ref() {
                self.tables.extend((0..Pages::of(end)).map(|i| of.each.page(r.state, i)));
            }
            self.places.extend((r.first_pos..end).map(|position| Place { position, table, recent }));
        }
        let mut first = 0;
        for rope in &self.dims.ropes {
            let n = rope.freqs.len();
            for (t, place) in self.places.iter().enumerate() {
                for (i, f) in rope.freqs.iter().enumerate() {
                    let (s, c) = (f64::from(*f) * place.position as f64).sin_cos();
                    self.cos[first + t * n + i] = c as f32 * rope.magnitude;
                    self.sin[first + t * n + i] = s as f32 * rope.magnitude;
                }
            }
            first += self.dims.max_batch.max(1) * n;
        }
        Ok(())
    }

    fn turn_to(&mut self, class: Class) {
        self.class = class;
        self.ready = None;
    }

    fn embed(&mut self, rows: &[u8], ty: TensorType) -> Result<(), BackendError> {
        dequantize_rows(rows, ty, &mut self.x, self.dims.n_embd)
    }

    fn embed_per_block(&mut self, rows: &[u8], ty: TensorType) -> Result<(), BackendError> {
        dequantize_rows(rows, ty, &mut self.per_block, self.dims.n_per_block)
    }

    fn qkv(
        &mut self,
        layer: usize,
        norm: &Norm,
        q: &Linear,
        k: &Linear,
        v: &Linear,
        q_norm: Option<&Norm>,
        k_norm: Option<&Norm>,
    ) -> Result<(), BackendError> {
        self.norm_input(norm);
        let input = self.input_here();
        let (pq, pk, pv) = (self.q.ptr(), self.k.ptr(), self.v.ptr());
        let jobs = [
            self.job(q, input, pq, Then::Store),
            self.job(k, input, pk, Then::Store),
            self.job(v, input, pv, Then::Store),
        ];
        self.stacked(&jobs);
        let rotation = self.rotation(layer, q_norm, k_norm);
        match self.class {
            // Who attends with a head does the rest of its work first.
            Class::Exact => self.rotation = Some(rotation),
            Class::Bulk => {
                let (isa, overflow, n_tokens) = (self.isa, &self.overflow, self.n_tokens());
                self.pool.run(n_tokens, &|_, token| {
                    (0..rotation.heads[1]).for_each(|kv_head| rotation.run(isa, token, kv_head, overflow));
                });
            }
        }
        Ok(())
    }

    fn attend(&mut self, layer: usize) -> Result<(), BackendError> {
        self.attend_by(layer, Scores::PLAIN, None);
        Ok(())
    }

    fn keep(&mut self, rows: &[usize]) -> Result<(), BackendError> {
        let (d, q_dim, first) = (self.dims.n_embd, self.dims.n_heads * self.shape.value_dim(), self.first());
        let given = self.dims.n_per_block;
        for (to, from) in rows.iter().enumerate() {
            self.x.copy_within((first + from) * d..(first + from + 1) * d, (first + to) * d);
            if self.dims.beyond.is_some() {
                // A feed-forward part may read what attention has read.
                self.input.copy_within((first + from) * d..(first + from + 1) * d, (first + to) * d);
            }
            self.per_block.copy_within((first + from) * given..(first + from + 1) * given, (first + to) * given);
            self.attn.copy_within(from * q_dim..(from + 1) * q_dim, to * q_dim);
            if self.attn_ready {
                let (each, row) = (packets(q_dim), &mut self.rows[self.row]);
                row.packets.copy_within(from * each..(from + 1) * each, to * each);
                row.pairs.copy_within(from * each..(from + 1) * each, to * each);
            }
        }
        self.parts[self.class as usize] = rows.len();
        self.ready = None;
        Ok(())
    }

    fn attn_output(&mut self, w: &Linear) -> Result<(), BackendError> {
        let attn = Shared(self.attn.ptr());
        if !self.attn_ready {
            self.prepare(attn, attn, w.weight.cols, self.n_tokens(), None);
        }
        let x = self.x_here();
        let job = self.job(w, attn.get(), x, Then::Add);
        self.jobs(&[job], None);
        Ok(())
    }

    fn ffn(&mut self, norm: &Norm, gate: &Linear, up: &Linear, down: &Linear) -> Result<(), BackendError> {
        let x = self.x_here();
        self.feed_forward(norm, [gate, up, down], x, Then::Add);
        Ok(())
    }

    fn slice(&mut self, norm: &Norm, gate: &Linear, up: &Linear, down: &Linear) -> Result<(), BackendError> {
        let to = self.slice_here().as_mut_ptr();
        self.feed_forward(norm, [gate, up, down], to, Then::Store);
        Ok(())
    }

    fn add_slice(&mut self) -> Result<(), BackendError> {
        let (d, first) = (self.dims.n_embd, self.first());
        let rows = first * d..(first + self.n_tokens()) * d;
        for (x, s) in self.x[rows.clone()].iter_mut().zip(&self.attn[rows]) {
            *x += s;
        }
        self.ready = None;
        Ok(())
    }

    fn route(&mut self, norm: &Norm, router: &Weight, params: &RouterParams) -> Result<&[u32], BackendError> {
        self.norm_input(norm);
        let (input, scores) = (self.input_here(), self.experts.scores.ptr());
        let job = self.job(&Linear { weight: *router, bias: None }, input, scores, Then::Store);
        self.jobs(&[job], None);
        let (n, used) = (self.dims.n_experts, self.dims.n_experts_used);
        let choices = self.choices();
        let e = &mut self.experts;
        for (t, first) in choices.clone().step_by(used).enumerate() {
            let scores = &mut e.scores[t * n..(t + 1) * n];
            let choice = first..first + used;
            choose(scores, &mut e.ids[choice.clone()], &mut e.weights[choice], params);
        }
        Ok(&e.ids[choices])
    }

    fn expert(&mut self, e: &Expert) -> Result<(), BackendError> {
        let used = self.dims.n_experts_used;
        let d = self.dims.n_embd;
        let choices = self.choices();
        let x = &mut self.experts;
        x.pairs.clear();
        x.pairs.extend(choices.filter(|&i| x.ids[i] == e.id));
        let n = x.pairs.len();
        if n == 0 {
            return Ok(());
        }
        for (i, &pair) in x.pairs.iter().enumerate() {
            let from = pair / used * d;
            x.gathered[i * d..(i + 1) * d].copy_from_slice(&self.input[from..from + d]);
            if x.on_input {
                let w = x.weights[pair];
                x.gathered[i * d..(i + 1) * d].iter_mut().for_each(|v| *v *= w);
            }
        }
        let (gathered, hidden, result) = (Shared(x.gathered.ptr()), Shared(x.hidden.ptr()), x.result.ptr());
        // The expert's tokens take the place of the pass's, beside the pass's own activations.
        self.swap_quantised();
        let n_tokens = std::mem::replace(&mut self.parts[self.class as usize], n);
        self.prepare(gathered, gathered, d, n, None);
        self.expert_hidden(e, gathered.get(), n);
        self.prepare(hidden, hidden, e.down.weight.cols, n, None);
        let job = self.job(&e.down, hidden.get(), result, Then::Store);
        self.jobs(&[job], None);
        self.parts[self.class as usize] = n_tokens;
        self.swap_quantised();
        let x = &mut self.experts;
        for (i, &pair) in x.pairs.iter().enumerate() {
            x.out[pair * d..(pair + 1) * d].copy_from_slice(&x.result[i * d..(i + 1) * d]);
        }
        Ok(())
    }

    fn experts(&mut self, list: &[Expert]) -> Result<(), BackendError> {
        let plain = !self.experts.on_input && list.iter().all(|e| e.how == HowActivated::Silu);
        if self.class != Class::Exact || self.n_tokens() != 1 || list.len() < 2 || !plain {
            return list.iter().try_for_each(|e| self.expert(e));
        }
        let (d, n_ff) = (self.dims.n_embd, self.dims.n_ff_expert);
        let (input, fine) = (self.input_here(), self.fine());
        let mut left = list;
        while !left.is_empty() {
            let (hidden, out) = (self.experts.hidden.ptr(), self.experts.out.ptr());
            let (row, pairs) = (self.experts.row.packets.ptr(), self.experts.row.pairs.ptr());
            let first = self.job(&left[0].gate, input, hidden, Then::Silu);
            let mut up = [[first; 2]; EXPERTS_AT_ONCE];
            let mut down = [[first; 1]; EXPERTS_AT_ONCE];
            let mut onward = [None; EXPERTS_AT_ONCE];
            let mut i = 0;
            while let Some((e, rest)) = left.split_first().filter(|_| i < EXPERTS_AT_ONCE) {
                left = rest;
                let chosen = &self.experts.ids[..self.dims.n_experts_used];
                // Experts of the pass's other rows may be among them.
                let Some(choice) = chosen.iter().position(|&id| id == e.id) else { continue };
                // SAFETY: the buffers have room for every choice of a token, and these are some of them.
                let (hidden, row, pairs) =
                    unsafe { (hidden.add(i * n_ff), row.add(i * packets(n_ff)), pairs.add(i * packets(n_ff))) };
                up[i] = [self.job(&e.gate, input, hidden, Then::Silu), self.job(&e.up, input, hidden, Then::Mul)];
                let packets = Shared(row);
                onward[i] =
                    Some(Onward { x: Shared(hidden), tokens: 1, cols: n_ff, packets, pairs: Shared(pairs), fine });
                // SAFETY: there is a result for each choice.
                let out = unsafe { out.add(choice * d) };
                let (job, rows) = self.job(&e.down, hidden, out, Then::Store);
                down[i] = [(Job { x: row, pairs, ..job }, rows)];
                i += 1;
            }
            if i > 0 {
                self.groups(i, &|i| (&up[i], onward[i]));
                self.groups(i, &|i| (&down[i], None));
            }
        }
        Ok(())
    }

    fn combine_experts(&mut self) -> Result<(), BackendError> {
        self.combine(super::Act::X, true);
        Ok(())
    }

    fn output_norm(&mut self, norm: &Norm) -> Result<(), BackendError> {
        self.begin_outputs()?;
        self.norm_input(norm);
        self.head_ready[self.class as usize] = true;
        Ok(())
    }

    fn gives_hidden(&self) -> bool {
        true
    }

    fn hidden(&mut self, norm: Option<&Norm>, out: &mut Vec<f32>) -> Result<(), BackendError> {
        if let Some(norm) = norm {
            self.norm_input(norm);
        }
        let (d, first) = (self.dims.n_embd, self.first());
        out.extend_from_slice(&self.input[first * d..(first + self.n_tokens()) * d]);
        Ok(())
    }

    fn head(&mut self, w: &Linear, first_row: usize) -> Result<(), BackendError> {
        let (input, first) = (self.input_here(), self.first_output[self.class as usize]);
        if !std::mem::replace(&mut self.head_ready[self.class as usize], true) {
            // Its norm was none of `output_norm`.
            self.prepare(Shared(input), Shared(input), self.dims.n_embd, self.n_tokens(), None);
        }
        let out = self.logits[first * self.dims.n_vocab + first_row..].as_mut_ptr();
        let (job, rows) = self.job(w, input, out, Then::Store);
        self.jobs(&[(Job { stride: self.dims.n_vocab, ..job }, rows)], None);
        Ok(())
    }

    fn op(&mut self, op: &Op<Weight>) -> Result<(), BackendError> {
        self.run(op)
    }

    fn choose_instead(&mut self, ids: &[u32]) -> Result<(), BackendError> {
        let choices = self.choices();
        self.experts.ids[choices].copy_from_slice(ids);
        Ok(())
    }

    fn chosen(&mut self) -> &[u32] {
        &self.experts.ids[self.choices()]
    }

    fn finite(&mut self) -> Result<bool, BackendError> {
        let (d, first) = (self.dims.n_embd, self.first());
        Ok(super::all_finite(&self.x[first * d..(first + self.n_tokens()) * d]))
    }

    fn logits(&mut self) -> Result<&[f32], BackendError> {
        Ok(&self.logits[..self.outputs * self.dims.n_vocab])
    }

    fn overflow(&self) -> Option<usize> {
        self.overflow.load(Relaxed).checked_sub(1)
    }

    fn forget_overflow(&mut self) {
        self.overflow.store(0, Relaxed);
    }

    fn apply(&mut self, op: &StateOp) -> Result<(), BackendError> {
        let (from, to, positions) = match *op {
            StateOp::Copy { from, to, positions } => (from, to, positions),
            StateOp::CopyState { from, to } => {
                let each = self.dims.recurrent.map_or(0, |r| r.floats());
                self.states.copy_within(from as usize * each..(from as usize + 1) * each, to as usize * each);
                if let Some(recent) = self.dims.recent.as_ref().map(|r| r.each) {
                    let (from, to) = (recent.page(from, 0), recent.page(to, 0));
                    self.copy_positions(Layers::Recent, from, to, recent.pages * PAGE);
                }
                return Ok(());
            }
        };
        self.copy_positions(Layers::Whole, from, to, positions.min(PAGE));
        Ok(())
    }

    fn page_bytes(&self, layers: Layers) -> usize {
        self.dims.page_bytes(layers)
    }

    fn read_page(&mut self, layers: Layers, page: PageId, to: &mut [u8]) -> Result<(), BackendError> {
        assert_eq!(to.len(), self.page_bytes(layers), "a page's bytes");
        let mut first = 0;
        for values in [false, true] {
            let cache = if values { &self.cache_v } else { &self.cache_k };
            for (at, each) in self.page_rows(layers, page, values) {
                let part = first..first + PAGE * each;
                to[part.clone()].copy_from_slice(&cache[at..at + part.len()]);
                first = part.end;
            }
        }
        Ok(())
    }

    fn write_page(&mut self, layers: Layers, page: PageId, from: &[u8]) -> Result<(), BackendError> {
        assert_eq!(from.len(), self.page_bytes(layers), "a page's bytes");
        let mut first = 0;
        for values in [false, true] {
            for (at, each) in self.page_rows(layers, page, values) {
                let part = first..first + PAGE * each;
                let cache = if values { &mut self.cache_v } else { &mut self.cache_k };
                cache[at..at + part.len()].copy_from_slice(&from[part.clone()]);
                first = part.end;
            }
        }
        Ok(())
    }

    fn workspace_bytes(&self) -> u64 {
        let e = &self.experts;
        let floats = [
            &self.x,
            &self.input,
            &self.q,
            &self.k,
            &self.v,
            &self.attn,
            &self.hidden,
            &self.up,
            &self.mix,
            &self.gates,
            &self.beta,
            &self.alpha,
            &self.per_block,
            &self.states,
            &self.part,
            &self.logits,
            &self.cos,
            &self.sin,
            &self.scratch,
        ];
        let experts = [&e.scores, &e.weights, &e.out, &e.gathered, &e.hidden, &e.up, &e.result];
        floats.into_iter().chain(experts).map(Buf::bytes).sum::<u64>()
            + self.quantised.bytes()
            + self.rows.iter().map(Row::bytes).sum::<u64>()
            + e.row.bytes()
            + self.panels.bytes()
            + e.quantised.bytes()
            + e.ids.bytes()
            + self.cache_k.bytes()
            + self.cache_v.bytes()
    }
}

/// Rows of `width` elements of `ty` as floats.
fn dequantize_rows(rows: &[u8], ty: TensorType, out: &mut [f32], width: usize) -> Result<(), BackendError> {
    let row_bytes = ty.row_bytes(width).unwrap_or(0);
    for (row, x) in rows.chunks_exact(row_bytes).zip(out.chunks_exact_mut(width)) {
        if !reference::dequantize(ty, row, x) {
            let supported = reference::TYPES.map(|t| t.name()).join(", ");
            return Err(BackendError::UnsupportedType { ty, backend: "cpu", supported });
        }
    }
    Ok(())
}

/// Softmax over all experts, then the largest ones; ties go to the lower id. Scores that are no numbers are never
/// chosen by comparison: where nothing else is left, the lowest id that is not chosen yet is taken, as on a GPU.
fn choose(scores: &mut [f32], ids: &mut [u32], weights: &mut [f32], params: &RouterParams) {
    /// In place of a score: its expert is chosen already.
    const CHOSEN: f32 = -2.0;
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|s| *s = (*s - max).exp());
    let total: f32 = scores.iter().sum();
    for (id, weight) in ids.iter_mut().zip(weights.iter_mut()) {
        let mut best = None;
        let mut most = -1.0;
        for (i, &s) in scores.iter().enumerate() {
            if s > most {
                (best, most) = (Some(i), s);
            }
        }
        // Scores that are not numbers are never chosen by comparison: the first ids then, each once, since an
        // expert has room for each token once.
        let first = || scores.iter().position(|s| *s != CHOSEN).unwrap_or(0);
        let (best, p) = best.map_or_else(|| (first(), 0.0), |i| (i, most));
        (*id, *weight) = (best as u32, p / total);
        // Probabilities are not negative: this one is not chosen again.
        scores[best] = CHOSEN;
    }
    let sum: f32 = weights.iter().sum();
    let factor = params.scale / if params.normalize { sum } else { 1.0 };
    weights.iter_mut().for_each(|w| *w *= factor);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards against scores that are no numbers and choose one expert several times over: its tokens would not fit
    /// the buffers of a pass.
    #[test]
    fn a_router_chooses_distinct_experts_whatever_the_scores() {
        let params = RouterParams { normalize: true, scale: 1.0 };
        for scores in [
            [f32::NAN; 5],
            [f32::NAN, 5.0, f32::NAN, f32::NAN, f32::NAN],
            [f32::INFINITY, 1.0, f32::INFINITY, 0.0, 0.0],
            [f32::NEG_INFINITY; 5],
            [1.0, 3.0, 3.0, -1.0, 2.0],
        ] {
            let (mut ids, mut weights) = ([0; 3], [0.0; 3]);
            choose(&mut scores.clone(), &mut ids, &mut weights, &params);
            assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2], "{scores:?}: {ids:?}");
            assert!(ids.iter().all(|i| *i < 5), "{scores:?}: {ids:?}");
        }
        let (mut ids, mut weights) = ([0; 3], [0.0; 3]);
        choose(&mut [1.0, 3.0, 3.0, -1.0, 2.0], &mut ids, &mut weights, &params);
        assert_eq!(ids, [1, 2, 4]);
    }
}

//! The backend for NVIDIA GPUs. Operations are launched on one compute stream and return at once;
//! weights are read where they lie in device memory, in the file's own layout, resident or brought
//! there by [`Transfer`]. The same kernels run in the same order wherever the weights come from,
//! so results do not depend on placement.

mod args;
mod attention;
mod driver;
mod graph;
mod handover;
mod heads;
mod latent;
mod memory;
mod modules;
mod moe;
mod ops;
mod product;
mod recurrent;
pub mod selftest;
mod tiling;
mod transfer;
mod vectors;
mod workspace;

use std::sync::Arc;

/// Bytes per second that `device` reads from its own memory; `None` if they could not be measured.
pub fn memory_rate(device: &Arc<Device>) -> Result<Option<f64>, BackendError> {
    memory::CudaMemory::new(device, &Arc::new(device.stream()?)).memory_rate()
}

pub use driver::{Device, DeviceBuffer, DeviceInfo, Event, PAD_BYTES, PinnedBuffer, Registered, Stream};
pub use transfer::Transfer;

use super::{
    Act, Backend, BackendError, Class, DeviceMemory, Dims, Expert, KvShape, Layers, Linear, Norm, Op, RouterParams,
    Routing, Run, Scores, Weight,
};
use crate::gguf::TensorType;
use crate::state::{PAGE, PageId, StateOp};
use args::{ADD, CombineArgs, RouteArgs, STORE};
use driver::{RowsOf, device_error};
use graph::Recorder;
use handover::Handover;
use modules::Kernels;
use ops::{Heads, Waiting};
use product::{Engine, Form, Inputs, Prep, Raw, Rows, Target};
use workspace::{Workspace, per_block_at};

/// Runs the operations of a forward pass on one GPU.
pub struct CudaBackend {
    /// Before the kernels that it holds launches of, so that it goes first.
    recorder: Recorder,
    engine: Engine,
    dims: Dims,
    tokens: usize,
    /// Heads of the layer at hand.
    shape: KvShape,
    /// Position of the pass's first row.
    first_pos: usize,
    /// A block of attention of prompts takes one range of keys where blocks are few. Only the self-test says no.
    divide_keys: bool,
    /// First row of X and Attn that is still wanted ([`Backend::keep`]).
    row0: usize,
    /// What operations leave to later ones, and the forms in which activations lie.
    waiting: Waiting,
    rows_sent: Event,
    /// The pass's logits are in host memory.
    logits_here: bool,
    /// Start of each expert's tokens in the lists of the last routing, one more than experts.
    expert_starts: Vec<u32>,
    /// The lists are those of the last routing.
    grouped: bool,
    /// Words of the room for experts at hand that are taken, since then.
    few: usize,
    /// By layer, experts whose addresses are in the tables.
    resting: Vec<Option<moe::Resting>>,
    /// Those that processors compute, too.
    shared: Vec<Option<moe::SharedExperts>>,
    /// Pages of the sequence at hand, as they are in the GPU's memory.
    table: Vec<PageId>,
    /// Whose pages of recent positions are there.
    recent_of: u32,
    /// The way to processors and back, where there is one.
    handover: Option<Handover>,
}

impl CudaBackend {
    /// Whether matrices of this type have kernels.
    pub fn supports_type(ty: TensorType) -> bool {
        product::supported(ty)
    }

    /// Bytes of device memory that the buffers of such a session take, weights apart.
    pub fn workspace_bytes_of(dims: &Dims, multiprocessors: usize) -> u64 {
        workspace::bytes_needed(dims, multiprocessors)
    }

    /// Why there are no kernels for such a session; `None` if there are.
    pub fn refuses(dims: &Dims) -> Option<BackendError> {
        if let Some(what) = dims.no_kernel {
            return Some(BackendError::Beyond { backend: "cuda", what });
        }
        let recurrent = dims.recurrent.and_then(|r| recurrent::refuses(&r));
        if let Some(what) = recurrent.or_else(|| heads::refuses(dims)) {
            return Some(BackendError::Beyond { backend: "cuda", what });
        }
        (!heads::CACHES.contains(&dims.kv_type)).then_some(BackendError::Cache { backend: "cuda", ty: dims.kv_type })
    }

    /// Loads the kernels and allocates every buffer of a session with these sizes.
    pub fn new(device: &Arc<Device>, dims: &Dims) -> Result<Self, BackendError> {
        if let Some(why) = CudaBackend::refuses(dims) {
            return Err(why);
        }
        let kernels = Kernels::load(device, dims.all_shapes().map(|s| s.dim))?;
        let ws = Workspace::new(device, dims)?;
        let stream = Arc::new(device.stream()?);
        Ok(CudaBackend {
            engine: Engine::new(Arc::clone(device), stream, kernels, ws),
            dims: dims.clone(),
            tokens: 0,
            shape: dims.shape(0),
            first_pos: 0,
            divide_keys: true,
            row0: 0,
            waiting: Waiting::default(),
            rows_sent: device.event(false)?,
            logits_here: false,
            expert_starts: vec![0; dims.n_experts + 1],
            grouped: false,
            few: 0,
            resting: Vec::new(),
            shared: Vec::new(),
            table: (0..dims.pages() as PageId).collect(),
            recent_of: 0,
            recorder: Recorder::new(),
            handover: Handover::new(device, dims)?,
        })
    }

    /// The stream on which operations run.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.engine.stream
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.engine.device
    }

    /// Waits until all operations called so far are done.
    pub fn synchronize(&self) -> Result<(), BackendError> {
        self.engine.stream.synchronize()
    }

    fn x(&self) -> u64 {
        self.engine.ws.x.addr() + (self.row0 * self.dims.n_embd * 4) as u64
    }

    fn attn(&self) -> u64 {
        self.engine.ws.attn.addr() + (self.row0 * self.heads_width() * 4) as u64
    }

    /// Elements of a row that attention leaves.
    fn heads_width(&self) -> usize {
        self.dims.n_heads * self.shape.value_dim()
    }

    fn norm(&self, norm: &Norm, to: Inputs) -> Result<(), BackendError> {
        let prep = Prep::Norm(norm.weight.addr, norm.eps);
        self.engine.prepare(prep, self.x(), 0, self.dims.n_embd, self.tokens, to)
    }

    /// `norm(X)` in the forms that weights of these types want. Where all want it quantised, the products of one token
    /// do both themselves.
    fn normed(&self, norm: &Norm, types: &[TensorType]) -> Result<Inputs, BackendError> {
        let (input, n) = (self.engine.forms(types), self.dims.n_embd);
        let aligned = n.is_multiple_of(32) && norm.weight.addr.is_multiple_of(16);
        if input.f == 0 && input.h == 0 && aligned {
            let raw = Raw { x: self.x(), norm: norm.weight.addr, eps: norm.eps };
            return self.engine.quantised(raw, n, self.tokens, input.q);
        }
        self.norm(norm, input)?;
        Ok(input)
    }

    /// The first `positions` positions from a page of these layers on in the cache of keys or of values: in all heads of all layers,
    /// or layer by layer where they differ.
    fn page_rows(&self, layers: Layers, values: bool, page: PageId, positions: usize) -> Vec<RowsOf> {
        let d = &self.dims;
        let places = d.pages_of(layers) * PAGE;
        assert!(page as usize * PAGE + positions <= places, "{positions} positions from page {page} on, of {places}");
        let cache = if values { &self.engine.ws.v_cache } else { &self.engine.ws.k_cache };
        let alike = if d.shapes.is_empty() && d.recent.is_none() { d.n_layers } else { 1 };
        let mut all = Vec::with_capacity(d.n_layers / alike.max(1));
        for layer in d.layers(layers).step_by(alike.max(1)) {
            let shape = d.shape(layer);
            if values && shape.of_keys > 0 {
                continue;
            }
            let each = d.kv_bytes(shape.dim);
            let at = d.cache_before(layer)[usize::from(values)] + page as usize * PAGE * each;
            let addr = cache.addr() + at as u64;
            all.push(RowsOf { addr, width: positions * each, pitch: places * each, rows: alike * shape.heads });
        }
        all
    }

    /// Copies the first `positions` positions from a page of these layers on to the places from another one on.
    fn copy_positions(&self, layers: Layers, from: PageId, to: PageId, positions: usize) -> Result<(), BackendError> {
        for values in [false, true] {
            let to = self.page_rows(layers, values, to, positions);
            for (from, to) in self.page_rows(layers, values, from, positions).into_iter().zip(to) {
                // SAFETY: both lie in the cache (`page_rows` asserts it) and have nothing in common: nobody reads the second yet.
                unsafe { self.engine.stream.copy_rows(from, to)? };
            }
        }
        Ok(())
    }

    /// Brings the pages of the sequence at hand to the GPU, as far as they are not there.
    fn send_pages(&mut self, table: &[PageId]) -> Result<(), BackendError> {
        let known = self.table.iter().zip(table).take_while(|(a, b)| a == b).count();
        self.table.truncate(known);
        self.table.extend_from_slice(&table[known..]);
        if known == table.len() {
            return Ok(());
        }
        let at = self.engine.ws.pass.addr() + 4 * (1 + known) as u64;
        let new = &self.table[known..];
        // SAFETY: there is a word for each page of the cache. The source is pageable memory, which the driver has read
        // when the call returns; kernels read the words in stream order.
        let sent = unsafe { self.engine.stream.upload(new.as_ptr().cast(), at, 4 * new.len()) };
        if sent.is_err() {
            self.table.truncate(known);
        }
        sent
    }

    /// Where kernels read the pass's position, and behind it the pages of a layer.
    fn pass_of(&self, layer: usize) -> u64 {
        let pass = self.engine.ws.pass.addr();
        match self.dims.layers_of(layer) {
            Layers::Whole => pass,
            Layers::Recent => pass + 4 * workspace::recent_at(&self.dims) as u64,
        }
    }

    /// Brings the pass's position, and the pages of the sequence's recent positions, to where layers with such read them.
    fn send_recent(&mut self, run: &Run<'_>) -> Result<(), BackendError> {
        let Some(recent) = self.dims.recent.as_ref().map(|r| r.each) else { return Ok(()) };
        let (at, of) = (self.engine.ws.pass.addr() + 4 * workspace::recent_at(&self.dims) as u64, run.state >> 1);
        // SAFETY: the word is the workspace's; kernels read it in stream order.
        unsafe { self.engine.stream.set(at, run.first_pos as u32)? };
        if of == self.recent_of {
            return Ok(());
        }
        let table: Vec<PageId> = (0..self.dims.pages()).map(|i| recent.page(run.state, i)).collect();
        // SAFETY: as in `send_pages`.
        unsafe { self.engine.stream.upload(table.as_ptr().cast(), at + 4, 4 * table.len())? };
        self.recent_of = of;
        Ok(())
    }

    /// Rows of `cols` elements from host memory, as floats to `out`, by way of the room at `at` of raw rows.
    fn send_rows(&mut self, rows: &[u8], ty: TensorType, at: u64, cols: usize, out: u64) -> Result<(), BackendError> {
        let ws = &mut self.engine.ws;
        let host = ws
            .rows_host
            .as_mut_slice()
            .get_mut(at as usize..at as usize + rows.len())
            .ok_or_else(|| device_error(format!("{} bytes of embedding rows exceed the buffer", rows.len())))?;
        host.copy_from_slice(rows);
        let src = host.as_ptr();
        let w = Weight { addr: ws.rows.addr() + at, ty, rows: self.tokens, cols };
        // SAFETY: both buffers hold the rows (checked above for the host's, which is as large as
        // the device's); the event keeps the host's until the copy is done.
        unsafe { self.engine.stream.upload(src, w.addr, rows.len())? };
        self.rows_sent.record(&self.engine.stream)?;
        self.engine.convert(&w, out, false)
    }

    /// Where kernels read which recurrent state the pass begins with.
    fn state_word(&self) -> u64 {
        self.engine.ws.pass.addr() + 4 * (1 + self.dims.pages()) as u64
    }

    /// `to` gets `down · (silu(gate · h) * (up · h))` with `h = norm(X)`: it is stored there, or added.
    fn feed_forward(
        &mut self,
        norm: &Norm,
        [gate, up, down]: [&Linear; 3],
        to: u64,
        mode: i32,
    ) -> Result<(), BackendError> {
        self.waiting.begin_fused();
        let types = [gate.weight.ty, up.weight.ty];
        // A router behind this part reads what it reads.
        let input = match self.dims.beyond.is_some() && self.dims.n_experts > 0 {
            true => self.normed_for_all(norm, &types)?,
            false => self.normed(norm, &types)?,
        };
        let hidden = self.engine.hidden(gate, up, down.weight.ty, self.tokens, input, 0)?;
        self.waiting.made_hidden(&hidden);
        self.engine.products(&[Target::new(down, to)], self.tokens, mode, hidden, Rows::default())
    }

    /// Brings the choices of a router to the host, and groups them.
    fn wait_for_choices(&mut self) -> Result<(), BackendError> {
        let moe = self.engine.ws.moe.as_ref().ok_or_else(no_experts)?;
        let (src, dst) = (moe.ids.addr(), moe.ids_host.as_slice().as_ptr().cast_mut().cast());
        // SAFETY: both hold a number for each choice of a batch; the host's are read only after the wait below.
        unsafe { self.engine.stream.download(src, dst, self.tokens * self.dims.n_experts_used * 4)? };
        self.engine.stream.synchronize()?;
        self.group_by_expert()
    }

    /// More outputs than the session has room for are refused.
    fn check_outputs(&self) -> Result<(), BackendError> {
        let (tokens, max) = (self.tokens, self.dims.max_outputs);
        if tokens > max { Err(BackendError::Outputs { backend: "cuda", tokens, max }) } else { Ok(()) }
    }

    /// Groups the (token, choice) pairs of the last routing by expert, and sends the lists.
    fn group_by_expert(&mut self) -> Result<(), BackendError> {
        self.grouped = true;
        let used = self.dims.n_experts_used;
        let pairs = self.tokens * used;
        let Some(moe) = self.engine.ws.moe.as_mut() else {
            return Err(no_experts());
        };
        let ids = &moe.ids_host.as_slice()[..pairs];
        self.expert_starts.fill(0);
        for id in ids {
            self.expert_starts[*id as usize + 1] += 1;
        }
        for e in 1..self.expert_starts.len() {
            self.expert_starts[e] += self.expert_starts[e - 1];
        }
        let (tokens, numbers) = moe.lists_host.as_mut_slice()[..2 * pairs].split_at_mut(pairs);
        for (pair, id) in ids.iter().enumerate() {
            let at = self.expert_starts[*id as usize] as usize;
            tokens[at] = (pair / used) as u32;
            numbers[at] = pair as u32;
            self.expert_starts[*id as usize] += 1;
        }
        // Each start has moved to the next expert's: move them back.
        self.expert_starts.rotate_right(1);
        self.expert_starts[0] = 0;
        let (from, to) = (moe.lists_host.as_slice().as_ptr() as u64, moe.lists.addr());
        self.few = 0;
        // SAFETY: both hold 2 * pairs words; the host side is written again only after the next
        // routing has waited for the stream.
        unsafe { self.fetch_words(from, to, 2 * pairs) }
    }
}

fn no_experts() -> BackendError {
    device_error("the model has no experts")
}

impl Backend for CudaBackend {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn supports(&self, ty: TensorType) -> bool {
        product::supported(ty)
    }

    fn device(&self) -> Option<Arc<dyn DeviceMemory>> {
        Some(Arc::new(memory::CudaMemory::new(&self.engine.device, &self.engine.stream)))
    }

    fn lost(&self) -> Option<BackendError> {
        if self.hangs() {
            return Some(BackendError::Lost { backend: "cuda", what: "rows for processors have not come".into() });
        }
        // The driver says again what has ended the process's work, in any call.
        let asked = self.engine.device.bind().and_then(|()| self.engine.stream.is_idle());
        asked.err().filter(|e| matches!(e, BackendError::Lost { .. }))
    }

    fn begin(&mut self, runs: &[Run<'_>]) -> Result<(), BackendError> {
        Run::check(runs, &self.dims, "cuda")?;
        let [run] = runs else {
            let what = format!("a pass of {} sequences; on a GPU each has a pass of its own", runs.len());
            return Err(BackendError::Pass { backend: "cuda", what });
        };
        self.engine.device.bind()?;
        self.begin_words()?;
        (self.tokens, self.first_pos, self.engine.class) = (run.rows, run.first_pos, run.class);
        self.logits_here = false;
        self.row0 = 0;
        self.shape = self.dims.shape(0);
        self.waiting = Waiting::default();
        self.send_pages(run.table)?;
        let at = self.engine.ws.pass.addr();
        // SAFETY: the word is the workspace's; kernels read it in stream order.
        unsafe { self.engine.stream.set(at, run.first_pos as u32)? };
        self.send_recent(run)?;
        let Some(recurrent) = self.dims.recurrent else { return Ok(()) };
        if run.state as usize >= 2 * recurrent.sequences {
            let what = format!("recurrent state {} does not exist; there are {}", run.state, 2 * recurrent.sequences);
            return Err(BackendError::Pass { backend: "cuda", what });
        }
        // SAFETY: as above.
        unsafe { self.engine.stream.set(self.state_word(), run.state) }
    }

    fn apply(&mut self, op: &StateOp) -> Result<(), BackendError> {
        self.engine.device.bind()?;
        let (from, to, positions) = match *op {
            StateOp::Copy { from, to, positions } => (from, to, positions),
            StateOp::CopyState { from, to } => {
                if let Some(recent) = self.dims.recent.as_ref().map(|r| r.each) {
                    let (from, to) = (recent.page(from, 0), recent.page(to, 0));
                    self.copy_positions(Layers::Recent, from, to, recent.pages * PAGE)?;
                }
                return self.dims.recurrent.map_or(Ok(()), |_| self.copy_state(from, to));
            }
        };
        self.copy_positions(Layers::Whole, from, to, positions)
    }

    fn page_bytes(&self, layers: Layers) -> usize {
        self.dims.page_bytes(layers)
    }

    fn read_page(&mut self, layers: Layers, page: PageId, to: &mut [u8]) -> Result<(), BackendError> {
        assert_eq!(to.len(), self.page_bytes(layers), "a page's bytes");
        self.engine.device.bind()?;
        let mut left = to;
        for rows in [false, true].into_iter().flat_map(|values| self.page_rows(layers, values, page, PAGE)) {
            let (part, rest) = left.split_at_mut(rows.bytes());
            // SAFETY: the page lies in the cache; the slice has as many bytes, and the stream is waited for below.
            unsafe { self.engine.stream.download_rows(rows, part.as_mut_ptr())? };
            left = rest;
        }
        self.engine.stream.synchronize()
    }

    fn write_page(&mut self, layers: Layers, page: PageId, from: &[u8]) -> Result<(), BackendError> {
        assert_eq!(from.len(), self.page_bytes(layers), "a page's bytes");
        self.engine.device.bind()?;
        let mut left = from;
        for rows in [false, true].into_iter().flat_map(|values| self.page_rows(layers, values, page, PAGE)) {
            let (part, rest) = left.split_at(rows.bytes());
            // SAFETY: as in `read_page`.
            unsafe { self.engine.stream.upload_rows(part.as_ptr(), rows)? };
            left = rest;
        }
        self.engine.stream.synchronize()
    }

    fn begin_stretch(&mut self) -> Result<bool, BackendError> {
        self.recorder.begin(&self.engine.stream)
    }

    fn end_stretch(&mut self, complete: bool) -> Result<bool, BackendError> {
        if self.recorder.records() {
            self.rewind_words();
        }
        self.recorder.end(&self.engine.stream, complete)
    }

    fn embed(&mut self, rows: &[u8], ty: TensorType) -> Result<(), BackendError> {
        self.rows_sent.synchronize()?;
        self.send_rows(rows, ty, 0, self.dims.n_embd, self.engine.ws.x.addr())
    }

    fn embed_per_block(&mut self, rows: &[u8], ty: TensorType) -> Result<(), BackendError> {
        // The host's part of the buffer is free: `embed` has waited for what lay there.
        let (at, to) = (per_block_at(&self.dims), self.engine.ws.acts.per_block.addr());
        self.send_rows(rows, ty, at, self.dims.n_per_block, to)
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
        let types = [q.weight.ty, k.weight.ty, v.weight.ty];
        self.waiting.begin_fused();
        let input = self.normed(norm, &types)?;
        let ws = &self.engine.ws;
        let targets = [Target::new(q, ws.q.addr()), Target::new(k, ws.k.addr()), Target::new(v, ws.v.addr())];
        self.engine.products(&targets, self.tokens, STORE, input, Rows::default())?;
        self.rope_store(Some(layer), &Heads::fused([q_norm, k_norm]))
    }

    fn attend(&mut self, layer: usize) -> Result<(), BackendError> {
        self.waiting.forget_forms();
        self.attend_scores(layer, &Scores::PLAIN, 0)
    }

    fn keep(&mut self, rows: &[usize]) -> Result<(), BackendError> {
        let first = rows.first().copied().unwrap_or(0);
        if !rows.iter().copied().eq(first..first + rows.len()) {
            return Err(device_error("outputs of a pass that do not follow each other"));
        }
        if first != 0 {
            self.waiting.forget_forms();
        }
        self.row0 += first;
        self.waiting.h_row0 += first;
        self.tokens = rows.len();
        Ok(())
    }

    fn attn_output(&mut self, w: &Linear) -> Result<(), BackendError> {
        let types = [w.weight.ty];
        let mut input = self.engine.forms(&types);
        let width = w.weight.cols;
        match self.engine.form(w.weight.ty) {
            Form::Float => input.f = self.attn(),
            Form::Quant if self.waiting.quantised == Some(Act::Attn) => {}
            _ => self.engine.prepare(Prep::Copy, self.attn(), 0, width, self.tokens, input)?,
        }
        let target = Target::new(w, self.x());
        self.waiting.forget_forms();
        self.engine.products(&[target], self.tokens, ADD, input, Rows::default())
    }

    fn ffn(&mut self, norm: &Norm, gate: &Linear, up: &Linear, down: &Linear) -> Result<(), BackendError> {
        let x = self.x();
        self.feed_forward(norm, [gate, up, down], x, ADD)
    }

    fn slice(&mut self, norm: &Norm, gate: &Linear, up: &Linear, down: &Linear) -> Result<(), BackendError> {
        let kept = self.engine.ws.attn.addr();
        self.engine.ws.rooms.check("a slice", kept, (self.tokens * self.dims.n_embd * 4) as u64)?;
        self.feed_forward(norm, [gate, up, down], kept, STORE)?;
        self.waiting.written(Act::Attn);
        Ok(())
    }

    fn add_slice(&mut self) -> Result<(), BackendError> {
        self.add_rows(self.engine.ws.attn.addr())
    }

    fn route(&mut self, norm: &Norm, router: &Weight, params: &RouterParams) -> Result<&[u32], BackendError> {
        let ids = self.engine.ws.moe.as_ref().ok_or_else(no_experts)?.ids.addr();
        self.choose_experts(norm, router, params, ids)?;
        self.wait_for_choices()?;
        Ok(self.chosen())
    }

    fn expert(&mut self, e: &Expert) -> Result<(), BackendError> {
        if !self.grouped {
            self.group_by_expert()?;
        }
        let start = self.expert_starts[e.id as usize] as usize;
        let n = self.expert_starts[e.id as usize + 1] as usize - start;
        if n == 0 {
            return Ok(());
        }
        let ws = &self.engine.ws;
        let moe = ws.moe.as_ref().ok_or_else(no_experts)?;
        let pairs = self.tokens * self.dims.n_experts_used;
        let tokens_of = moe.lists.addr() + 4 * start as u64;
        let numbers_of = moe.lists.addr() + 4 * (pairs + start) as u64;
        let out = moe.out.addr();
        let norm_f = ws.norm_f.addr();
        let types = [e.gate.weight.ty, e.up.weight.ty];
        let (input, from) = if self.waiting.on_input {
            (self.weighed_inputs(&types, tokens_of, numbers_of, n)?, 0)
        } else if self.engine.class == Class::Exact {
            // `route` left every row in both forms: the products pick theirs.
            let q = ws.input_q.addr();
            (Inputs { f: norm_f, q, ..Inputs::default() }, tokens_of)
        } else {
            let to = self.engine.forms(&types);
            self.engine.prepare(Prep::Copy, norm_f, tokens_of, self.dims.n_embd, n, to)?;
            (to, 0)
        };
        self.waiting.forget_forms();
        let hidden = self.engine.hidden_by(e.how, &e.gate, Some(&e.up), e.down.weight.ty, n, input, from)?;
        let target = Target { stride: self.dims.n_embd, ..Target::new(&e.down, out) };
        let rows = Rows { from: 0, to: numbers_of };
        self.engine.products(&[target], n, STORE, hidden, rows)
    }

    fn experts(&mut self, list: &[Expert]) -> Result<(), BackendError> {
        if list.len() > 1 && self.experts_together(list)? {
            return Ok(());
        }
        list.iter().try_for_each(|e| self.expert(e))
    }

    fn combine_experts(&mut self) -> Result<(), BackendError> {
        if self.waiting.on_input {
            return self.sum_experts(Act::X, true);
        }
        self.combine()
    }

    fn hold_experts(&mut self, layer: usize, list: &[Expert]) -> Result<bool, BackendError> {
        self.hold(layer, list)
    }

    fn mixture(&mut self, layer: usize, routing: &Routing) -> Result<(), BackendError> {
        self.mixture_at(layer, routing)
    }

    fn output_norm(&mut self, norm: &Norm) -> Result<(), BackendError> {
        self.check_outputs()?;
        self.waiting.begin_fused();
        // The head's type is not known yet: every form that it may want.
        let to = self.engine.forms(&[TensorType::F32, TensorType::Q8_0]);
        let q = if self.dims.n_embd.is_multiple_of(32) { to.q } else { 0 };
        self.norm(norm, Inputs { q, ..to })
    }

    fn head(&mut self, w: &Linear, first_row: usize) -> Result<(), BackendError> {
        let input = self.engine.forms(&[w.weight.ty]);
        let out = self.engine.ws.logits.addr() + 4 * first_row as u64;
        let target = Target { stride: self.dims.n_vocab, ..Target::new(w, out) };
        self.engine.products(&[target], self.tokens, STORE, input, Rows::default())
    }

    fn op(&mut self, op: &Op<Weight>) -> Result<(), BackendError> {
        self.run(op)
    }

    fn force(&mut self, layer: usize, ids: &[u32]) -> Result<bool, BackendError> {
        self.force_choices(layer, ids)
    }

    fn choose_instead(&mut self, ids: &[u32]) -> Result<(), BackendError> {
        let moe = self.engine.ws.moe.as_mut().ok_or_else(no_experts)?;
        // What was sent of the lists by expert may be on its way still.
        self.engine.stream.synchronize()?;
        moe.ids_host.as_mut_slice()[..ids.len()].copy_from_slice(ids);
        self.grouped = false;
        Ok(())
    }

    fn chosen(&mut self) -> &[u32] {
        let pairs = self.tokens * self.dims.n_experts_used;
        self.engine.ws.moe.as_ref().map_or(&[], |moe| &moe.ids_host.as_slice()[..pairs])
    }

    fn finite(&mut self) -> Result<bool, BackendError> {
        let mut host = vec![0f32; self.tokens * self.dims.n_embd];
        // SAFETY: X holds as many floats from its first wanted row on; the host's are read after the wait.
        unsafe { self.engine.stream.download(self.x(), host.as_mut_ptr().cast(), host.len() * 4)? };
        self.engine.stream.synchronize()?;
        Ok(super::all_finite(&host))
    }

    fn logits(&mut self) -> Result<&[f32], BackendError> {
        let n = self.tokens.min(self.dims.max_outputs) * self.dims.n_vocab;
        let ws = &self.engine.ws;
        if !self.logits_here {
            let dst = ws.logits_host.as_slice().as_ptr().cast_mut().cast();
            // SAFETY: both hold max_outputs * n_vocab floats; the host's are read after the wait.
            unsafe { self.engine.stream.download(ws.logits.addr(), dst, n * 4)? };
            self.engine.stream.synchronize()?;
            self.logits_here = true;
        }
        Ok(&self.engine.ws.logits_host.as_slice()[..n])
    }

    fn gives_hidden(&self) -> bool {
        true
    }

    fn hidden(&mut self, norm: Option<&Norm>, out: &mut Vec<f32>) -> Result<(), BackendError> {
        self.settle()?;
        let from = match norm {
            Some(norm) => {
                self.waiting.begin_fused();
                let f = self.engine.ws.norm_f.addr();
                self.norm(norm, Inputs { f, ..Inputs::default() })?;
                f
            }
            None => self.act(Act::H).0,
        };
        let (first, n) = (out.len(), self.tokens * self.dims.n_embd);
        self.engine.ws.rooms.check("final hidden states", from, 4 * n as u64)?;
        out.resize(first + n, 0.0);
        // SAFETY: there are as many floats, as checked above, and as many at the end of `out`, which lives beyond the wait.
        unsafe { self.engine.stream.download(from, out[first..].as_mut_ptr().cast(), 4 * n)? };
        self.engine.stream.synchronize()
    }

    fn workspace_bytes(&self) -> u64 {
        self.engine.ws.bytes()
    }
}

//! A model that is ready to compute: plan carried out, resident units loaded, ring turning.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::weights::Weights;
use super::{EngineError, Links, Opened, source};
use crate::backend::cpu::CpuBackend;
use crate::backend::{Backend, BackendError, Dims};
use crate::gguf::{TensorInfo, TensorType};
use crate::machine;
use crate::memory::{Arena, Region};
use crate::model::{ForwardError, Model, Outputs, UnitKind, UnitSpec, forward, rope};
use crate::pipeline::{SpanIn, Step, StreamError, Streamer, StreamerConfig, UnitLayout, load};
use crate::plan::{Home, Limits, Plan, PlanError, Tiers, UnitSize, place};
use crate::storage::{Alignment, FileId, Reader, ReaderKind, StorageError};

/// What a session is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Threads that compute.
    pub threads: usize,
    /// Bytes that weights may take in RAM; `None` for what the machine can spare.
    pub ram: Option<u64>,
    /// Whether weights may stay on storage.
    pub storage: bool,
    /// Where to read weights from: a drive, or a copy of the model (file or directory).
    pub copy: Option<PathBuf>,
    /// How storage is read.
    pub reader: ReaderKind,
    /// Compare each read with what is recorded of the model, not only the first from a bound drive.
    pub verify: bool,
    /// Element type of the KV cache.
    pub kv_type: TensorType,
    /// Slots of the ring; `None` to choose.
    pub n_buffers: Option<usize>,
    /// Counts of blocks per tier; `None` to choose.
    pub tiers: Option<Tiers>,
    /// Positions of the KV cache.
    pub n_ctx: usize,
    /// Tokens a pass may carry.
    pub max_batch: usize,
    /// Rows of logits a pass may ask for.
    pub outputs: usize,
    /// Keep a timeline.
    pub timeline: bool,
}

impl Options {
    /// Tokens of a prefill pass. Fixed, since results depend on it in their last bits.
    pub const MAX_BATCH: usize = 512;
}

/// Bytes of logits that a pass may take.
const LOGITS_BYTES_MAX: usize = 32 << 20;
/// Rows of the embedding that are read at once.
const ROWS_AT_ONCE: u64 = 64;
/// Events a timeline keeps.
const TRACE_EVENTS: usize = 1 << 18;
/// Bytes that the storage probe reads at least.
const STORAGE_PROBE_BYTES: u64 = 1 << 30;
/// Bytes that the memory probe reads: more than caches hold.
const MEMORY_PROBE_BYTES: usize = 96 << 20;

/// A running model.
pub struct Session {
    model: Model,
    backend: Box<dyn Backend>,
    weights: Weights,
    plan: Plan,
    options: Options,
    reader_name: Option<&'static str>,
    notes: Vec<String>,
    embedding: Embedding,
    rows: Vec<u8>,
    row_offsets: Vec<u64>,
    position: usize,
    links: Links,
    measuring: bool,
    // The mapping goes last: the streamer reads into it until it is dropped.
    _arena: Arena,
}

/// Where rows of the embedding come from.
#[derive(Clone, Copy)]
struct Embedding {
    file: FileId,
    offset: u64,
    row_bytes: usize,
    resident: Option<(Region, u64)>,
}

impl Session {
    /// Plans, allocates and loads. `progress` gets bytes loaded and bytes to load.
    pub fn new(opened: &Opened, options: Options, progress: &mut dyn FnMut(u64, u64)) -> Result<Session, EngineError> {
        let model = opened.model.clone();
        check_types(&model)?;
        let (reader, mut notes) = source::open(&opened.gguf, &options)?;
        let layouts: Arc<[UnitLayout]> = model.units.iter().map(|u| layout(u, reader.as_ref())).collect();
        let embedding_layout = tensor_layout(&model.embedding, reader.as_ref());
        let rows_bytes = rows_region_bytes(&model, reader.alignment(FileId(model.embedding.shard as u16)));
        let plan = make_plan(&model, &layouts, &embedding_layout, rows_bytes, &options)?;

        let mut arena = Arena::new(plan.ram_bytes).map_err(|e| EngineError::Memory(e.to_string()))?;
        // Bound anew so that an early return drops it before the arena.
        let mut reader = reader;
        // SAFETY: the arena begins at a page; the reader is dropped before it, here or with the streamer.
        unsafe { reader.attach(arena.base(), arena.len() as usize) }?;
        let mut take = |bytes: u64| arena.take(bytes).map_err(|e| EngineError::Memory(e.to_string()));
        let rows_region = take(rows_bytes)?;
        let slots = (0..plan.n_slots).map(|_| take(plan.slot_bytes)).collect::<Result<Vec<_>, _>>()?;
        let mut resident = Vec::with_capacity(layouts.len());
        for (l, home) in layouts.iter().zip(&plan.homes) {
            resident.push(if *home == Home::B { Some(take(l.slot_bytes)?) } else { None });
        }
        let embedding_region = if plan.embedding_resident { Some(take(embedding_layout.slot_bytes)?) } else { None };

        let names: Arc<[String]> = model.units.iter().map(|u| u.name.clone()).collect();
        let mut to_load: Vec<(&UnitLayout, Region, &str)> = layouts
            .iter()
            .zip(&resident)
            .zip(names.iter())
            .filter_map(|((l, r), n)| r.map(|r| (l, r, n.as_str())))
            .collect();
        to_load.extend(embedding_region.map(|r| (&embedding_layout, r, "token_embd.weight")));
        let total: u64 = to_load.iter().map(|(l, ..)| l.read_bytes()).sum();
        load(reader.as_mut(), &to_load, &mut |done| progress(done, total)).map_err(stream_error)?;
        let divisors = model.rope_freqs.as_ref().map(|t| read_f32(reader.as_mut(), t, rows_region)).transpose()?;

        let h = &model.hparams;
        let rope = rope(h.arch.rope_kind(), h.n_rot, h.rope_base, h.rope_scaling, divisors.as_deref());
        let backend = CpuBackend::new(dims(&model, &options, rope), options.threads)?;

        let streams = plan.homes.contains(&Home::C);
        let reader_name = streams.then(|| reader.name());
        let config = StreamerConfig {
            layouts: layouts.clone(),
            names,
            schedule: schedule(&model, &plan.homes),
            demand_max: h.n_experts,
            slots,
            rows: rows_region,
            trace_events: if options.timeline { TRACE_EVENTS } else { 0 },
        };
        let streamer = Streamer::start(config, reader, opened.gguf.shards.len()).map_err(StorageError::IoUring)?;
        let routed: Vec<bool> = model.units.iter().map(|u| matches!(u.kind, UnitKind::Expert { .. })).collect();
        let unit_bytes: Vec<u64> = model.units.iter().map(UnitSpec::bytes).collect();
        let embedding = Embedding {
            file: FileId(model.embedding.shard as u16),
            offset: model.embedding.offset,
            row_bytes: (model.embedding.bytes / model.n_vocab as u64) as usize,
            resident: embedding_region.map(|r| (r, embedding_layout.span_offsets[0])),
        };
        let mut links = Links::default();
        let per_pass = |home: Option<Home>| bytes_per_pass(&model, &plan.homes, home);
        (links.bytes_per_pass, links.nvme_bytes_per_pass) = (per_pass(None), per_pass(Some(Home::C)));
        notes.dedup();
        Ok(Session {
            weights: Weights::new(layouts, resident, &routed, unit_bytes, streamer, options.timeline),
            rows: Vec::with_capacity(options.max_batch * embedding.row_bytes),
            row_offsets: Vec::with_capacity(options.max_batch),
            model,
            backend: Box::new(backend),
            plan,
            options,
            reader_name,
            notes,
            embedding,
            position: 0,
            links,
            measuring: false,
            _arena: arena,
        })
    }

    /// Rows of logits a pass should ask for at once, so that they stay small.
    pub fn outputs_at_once(n_vocab: usize) -> usize {
        (LOGITS_BYTES_MAX / 4 / n_vocab.max(1)).clamp(1, Options::MAX_BATCH)
    }

    /// Evaluates `tokens` after what the cache holds, in passes of at most `max_batch`. With
    /// [`Outputs::All`] there must be no more tokens than rows of logits.
    pub fn eval(&mut self, tokens: &[u32], outputs: Outputs, stop: &dyn Fn() -> bool) -> Result<(), EngineError> {
        let n_passes = tokens.len().div_ceil(self.options.max_batch);
        for (i, chunk) in tokens.chunks(self.options.max_batch).enumerate() {
            let last = i + 1 == n_passes;
            self.pass(chunk, if last { outputs } else { Outputs::None }, stop)?;
        }
        Ok(())
    }

    fn pass(&mut self, tokens: &[u32], outputs: Outputs, stop: &dyn Fn() -> bool) -> Result<(), EngineError> {
        let began = Instant::now();
        let stats = self.weights.streamer.stats();
        let bytes = self.weights.bytes;
        let result = self.fetch_rows(tokens).and_then(|()| {
            forward(
                &self.model,
                self.backend.as_mut(),
                &mut self.weights,
                &self.rows,
                self.position,
                tokens.len(),
                outputs,
                stop,
            )
            .map_err(EngineError::from)
        });
        if let Err(e) = result {
            self.weights.restart();
            return Err(e);
        }
        self.position += tokens.len();
        if self.measuring || !self.options.timeline {
            let after = self.weights.streamer.stats();
            let l = &mut self.links;
            l.passes += 1;
            l.pass_s += began.elapsed().as_secs_f64();
            l.nvme_bytes += after.bytes - stats.bytes;
            l.nvme_busy_s += (after.busy - stats.busy).as_secs_f64();
            l.stall_s += (after.stall - stats.stall).as_secs_f64();
            l.ram_bytes += self.weights.bytes - bytes;
        }
        Ok(())
    }

    /// Brings the embedding rows of `tokens` to `rows`, back to back.
    fn fetch_rows(&mut self, tokens: &[u32]) -> Result<(), EngineError> {
        let e = self.embedding;
        self.rows.resize(tokens.len() * e.row_bytes, 0);
        if let Some((region, at)) = e.resident {
            for (t, row) in tokens.iter().zip(self.rows.chunks_exact_mut(e.row_bytes)) {
                let from = at as usize + *t as usize * e.row_bytes;
                // SAFETY: the region holds the whole embedding from `at` on, the token is below its
                // row count (checked by the caller's tokenizer or command), and nobody writes there.
                unsafe { std::ptr::copy_nonoverlapping(region.addr.add(from), row.as_mut_ptr(), e.row_bytes) };
            }
            return Ok(());
        }
        if self.model.tied
            && let [token] = tokens
            && self.copy_from_head(*token as usize)
        {
            return Ok(());
        }
        self.row_offsets.clear();
        self.row_offsets.extend(tokens.iter().map(|&t| e.offset + u64::from(t) * e.row_bytes as u64));
        self.weights.streamer.read_rows(e.file, &self.row_offsets, e.row_bytes, &mut self.rows).map_err(stream_error)
    }

    /// Copies a row of a tied head from a resident slice; `false` if its slice is streamed.
    fn copy_from_head(&mut self, token: usize) -> bool {
        let slice = self.model.head.iter().rev().find(|s| s.first_row <= token);
        let Some(slice) = slice else { return false };
        let Some(region) = self.weights.resident[slice.weight.unit] else { return false };
        let at = self.weights.layouts[slice.weight.unit].span_offsets[slice.weight.span] as usize;
        let from = at + (token - slice.first_row) * self.embedding.row_bytes;
        // SAFETY: the slice holds rows `first_row..first_row + rows` from `at` on, and the token is one
        // of them; resident units are never written after loading.
        unsafe {
            std::ptr::copy_nonoverlapping(region.addr.add(from), self.rows.as_mut_ptr(), self.embedding.row_bytes)
        };
        true
    }

    /// Logits of the last pass: outputs × vocabulary.
    pub fn logits(&mut self) -> Result<&[f32], EngineError> {
        Ok(self.backend.logits()?)
    }

    /// Tokens in the cache.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Positions the cache holds.
    pub fn n_ctx(&self) -> usize {
        self.options.n_ctx
    }

    /// Forgets all but the first `n` tokens.
    pub fn truncate(&mut self, n: usize) {
        self.position = self.position.min(n);
        self.backend.truncate(self.position);
    }

    /// Home of each unit.
    pub fn homes(&self) -> &[Home] {
        &self.plan.homes
    }

    /// Slots of the ring.
    pub fn n_slots(&self) -> usize {
        self.plan.n_slots
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.options.threads
    }

    /// The backend's name.
    pub fn backend_name(&self) -> &'static str {
        self.backend.name()
    }

    /// The reader's name, if anything streams.
    pub fn reader_name(&self) -> Option<&'static str> {
        self.reader_name
    }

    /// What could not be had, a line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What the links carried.
    pub fn links(&self) -> Links {
        self.links
    }

    /// Starts counting anew, for one-token passes that are compared with the roofline.
    pub fn start_measuring(&mut self) {
        if !self.measuring {
            self.measuring = true;
            let l = self.links;
            self.links = Links {
                bytes_per_pass: l.bytes_per_pass,
                nvme_bytes_per_pass: l.nvme_bytes_per_pass,
                ..Links::default()
            };
        }
    }

    /// Measures what storage and memory can carry: one lap over the streamed units without
    /// computing, and a read of memory by all threads.
    pub fn measure_ceilings(&mut self) -> Result<(), EngineError> {
        self.links.ram_ceiling = Some(memory_rate(self.options.threads));
        if self.plan.n_slots == 0 {
            return Ok(());
        }
        let order: Vec<usize> = self.model.pass_order().filter(|&u| self.plan.homes[u] == Home::C).collect();
        let lap = |s: &mut Session| -> Result<u64, EngineError> {
            let before = s.weights.streamer.stats().bytes;
            for step in schedule(&s.model, &s.plan.homes) {
                match step {
                    Step::Hole => s.weights.streamer.demand(&[]),
                    Step::Unit(u) => {
                        s.weights.streamer.acquire(u).map_err(stream_error)?;
                        s.weights.streamer.release(u);
                    }
                }
            }
            Ok(s.weights.streamer.stats().bytes - before)
        };
        if order.is_empty() {
            return Ok(());
        }
        lap(self)?;
        let began = Instant::now();
        let mut bytes = 0;
        while bytes < STORAGE_PROBE_BYTES && began.elapsed().as_secs() < 5 {
            bytes += lap(self)?;
        }
        self.links.nvme_ceiling = Some(bytes as f64 / began.elapsed().as_secs_f64());
        Ok(())
    }

    /// Writes the timeline.
    pub fn write_timeline(&self, path: &Path) -> std::io::Result<()> {
        let mut out = std::io::BufWriter::new(std::fs::File::create(path)?);
        self.weights.streamer.write_trace(&mut out)?;
        std::io::Write::flush(&mut out)
    }
}

fn stream_error(e: StreamError) -> EngineError {
    EngineError::Forward(ForwardError::Weights(e.to_string()))
}

/// Every tensor type of the model must have a kernel.
fn check_types(model: &Model) -> Result<(), EngineError> {
    let mut types: Vec<TensorType> = vec![model.embedding.ty];
    for b in &model.blocks {
        types.extend([b.q, b.k, b.v, b.output].map(|l| l.weight.ty));
        match &b.ffn {
            crate::model::Ffn::Dense { gate, up, down } => types.extend([gate, up, down].map(|l| l.weight.ty)),
            crate::model::Ffn::Experts { experts, .. } => types.extend(experts.iter().flatten().map(|t| t.ty)),
        }
    }
    types.extend(model.head.iter().map(|s| s.weight.ty));
    match types.into_iter().find(|&ty| !CpuBackend::supports_type(ty)) {
        None => Ok(()),
        Some(ty) => {
            let supported = TensorType::ALL.iter().filter(|&&t| CpuBackend::supports_type(t));
            let supported = supported.map(|t| t.name()).collect::<Vec<_>>().join(", ");
            Err(BackendError::UnsupportedType { ty, backend: "cpu", supported }.into())
        }
    }
}

fn layout(unit: &UnitSpec, reader: &dyn Reader) -> UnitLayout {
    let spans: Vec<SpanIn> =
        unit.spans.iter().map(|s| SpanIn { file: FileId(s.shard as u16), offset: s.offset, bytes: s.bytes }).collect();
    UnitLayout::new(&spans, |f| reader.alignment(f))
}

fn tensor_layout(t: &TensorInfo, reader: &dyn Reader) -> UnitLayout {
    UnitLayout::new(&[SpanIn { file: FileId(t.shard as u16), offset: t.offset, bytes: t.bytes }], |f| {
        reader.alignment(f)
    })
}

fn rows_region_bytes(model: &Model, alignment: Alignment) -> u64 {
    let row = model.embedding.bytes / model.n_vocab as u64;
    let align = u64::from(alignment.offset);
    (row.next_multiple_of(align) + align).next_multiple_of(4096) * ROWS_AT_ONCE
}

fn make_plan(
    model: &Model,
    layouts: &[UnitLayout],
    embedding: &UnitLayout,
    rows_bytes: u64,
    options: &Options,
) -> Result<Plan, PlanError> {
    let sizes: Vec<UnitSize> = model
        .units
        .iter()
        .zip(layouts)
        .map(|(u, l)| {
            let (block, routed) = match u.kind {
                UnitKind::Block(i) => (Some(i), false),
                UnitKind::Expert { layer, .. } => (Some(layer), true),
                UnitKind::Head(_) => (None, false),
            };
            UnitSize { slot_bytes: l.slot_bytes, block, routed }
        })
        .collect();
    let limits = Limits {
        ram: options.ram.or_else(|| machine::memory(Path::new("/")).budget()).unwrap_or(u64::MAX / 4),
        vram: None,
        n_buffers: options.n_buffers,
        tiers: options.tiers,
        storage: options.storage,
        reserved: rows_bytes,
        embedding: (!model.tied).then_some(embedding.slot_bytes),
    };
    place(&sizes, &limits)
}

fn dims(model: &Model, options: &Options, rope: crate::backend::Rope) -> Dims {
    let h = &model.hparams;
    Dims {
        n_layers: h.n_layers,
        n_embd: h.n_embd,
        n_heads: h.n_heads,
        n_kv_heads: h.n_kv_heads,
        head_dim: h.head_dim,
        n_ff: model.n_ff(),
        n_experts: h.n_experts,
        n_experts_used: h.n_experts_used,
        n_ff_expert: h.n_ff_expert,
        n_vocab: model.n_vocab,
        max_batch: options.max_batch.min(options.n_ctx),
        max_outputs: options.outputs.min(options.max_batch),
        n_ctx: options.n_ctx,
        kv_type: options.kv_type,
        rope,
    }
}

/// The ring's schedule: streamed units in pass order, a hole where experts are streamed.
fn schedule(model: &Model, homes: &[Home]) -> Vec<Step> {
    let streamed_experts =
        model.units.iter().zip(homes).any(|(u, h)| *h == Home::C && matches!(u.kind, UnitKind::Expert { .. }));
    let mut steps = Vec::new();
    for u in model.pass_order() {
        if homes[u] == Home::C {
            steps.push(Step::Unit(u));
        }
        if streamed_experts && matches!(model.units[u].kind, UnitKind::Block(_)) {
            steps.push(Step::Hole);
        }
    }
    steps
}

/// Bytes of weights that a one-token pass reads, from one home or all. Experts count by the share
/// that is used.
fn bytes_per_pass(model: &Model, homes: &[Home], home: Option<Home>) -> u64 {
    let h = &model.hparams;
    let bytes =
        model.units.iter().zip(homes).filter(|(_, uh)| home.is_none_or(|w| w == **uh)).map(|(u, _)| match u.kind {
            UnitKind::Expert { .. } => u.bytes() as f64 * h.n_experts_used as f64 / h.n_experts as f64,
            _ => u.bytes() as f64,
        });
    bytes.sum::<f64>() as u64
}

/// Reads a small F32 tensor by way of `region`, which nobody else uses yet.
fn read_f32(reader: &mut dyn Reader, t: &TensorInfo, region: Region) -> Result<Vec<f32>, EngineError> {
    let l = tensor_layout(t, reader);
    load(reader, &[(&l, region, &t.name)], &mut |_| ()).map_err(stream_error)?;
    let at = l.span_offsets[0] as usize;
    let n = t.bytes as usize / 4;
    // SAFETY: the tensor's bytes were read to `at` of the region, whose length the reader has checked,
    // and nobody else uses it.
    let bytes = unsafe { std::slice::from_raw_parts(region.addr.add(at), n * 4) };
    Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// Bytes a second that `threads` threads read from memory together.
fn memory_rate(threads: usize) -> f64 {
    let data = vec![1u64; MEMORY_PROBE_BYTES / 8];
    let mut best = 0.0f64;
    for _ in 0..3 {
        let began = Instant::now();
        std::thread::scope(|s| {
            for part in data.chunks(data.len().div_ceil(threads.max(1))) {
                s.spawn(move || std::hint::black_box(part.iter().fold(0u64, |a, b| a.wrapping_add(*b))));
            }
        });
        best = best.max(MEMORY_PROBE_BYTES as f64 / began.elapsed().as_secs_f64());
    }
    best
}

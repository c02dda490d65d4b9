//! How a session comes to be: plan, memory, loading, the ring.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use super::apart::Apart;
use super::beside::Division;
use super::error::LackError;
use super::hits::{hit_rates_of, slot_hits};
use super::layouts::{Sizes, make_plan, own_embedding, tensor_layout};
use super::repeat::steady;
use super::requant::{RequantReport, settled};
use super::reuse::faster_in_slots;
use super::session::{Embedding, OnDevice, stream_error, unchanged};
use super::sizes::unit_sizes;
use super::slices::{Sliced, not_cut, slices_or_not};
use super::steps::schedule;
use super::weights::Weights;
use super::works::works;
use super::{EngineError, ExpertSlots, Links, Opened, Options, Recipe, Session, Sites, beside, here, source};
use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::CudaBackend;
use crate::backend::{
    self, Act, Backend, BackendError, BackendKind, DeviceMemory, Dims, EXACT_ROWS, MemoryUse, RecentLayers, Recurrent,
    SlotsAt,
};
use crate::flow::{self, DeviceConfig, Feed, Flow, FlowConfig, Place, Policy, PoolSpec, Spec, Units};
use crate::gguf::{TensorInfo, TensorType};
use crate::machine;
use crate::memory::{Arena, ArenaError, Region};
use crate::model::{
    ForwardError, HParams, Model, ModelError, Requantised, Scratch, Tape, UnitKind, UnitSpec, check_divisors,
};
use crate::pipeline::{DeviceUnit, Rest, TurnedUnit, UnitLayout, load, load_to_device, load_turned};
use crate::plan::{Cache, Home, Plan, SLOT_ALIGN, SiteRates, TooFewSlots, format_bytes};
use crate::state::{Pages, Recent};
use crate::storage::{FileId, Reader, StorageError};

/// Events a timeline keeps.
const TRACE_EVENTS: usize = 1 << 18;
/// Most that is left free of a GPU's memory unless `--vram` says otherwise, for other programs' needs;
/// a sixteenth of what there is if that is less.
const VRAM_MARGIN_MAX: u64 = 512 << 20;
/// Steps in which the room for weights shrinks when memory is refused that the plan counted on.
const VRAM_STEPS: u64 = 16;

/// Opens a backend for these dimensions; also returns a one-line note on any fallback.
pub type OpenBackend<'a> = &'a dyn Fn(&Dims) -> Result<(Box<dyn Backend>, Option<String>), BackendError>;

/// What a start tells its caller, and asks it.
pub struct Starting<'a> {
    /// Gets bytes loaded and bytes to load.
    pub progress: &'a mut dyn FnMut(u64, u64),
    /// Whether to stop: asked before each step, and while memory is populated and weights are loaded after every
    /// completion and every 2 ms.
    pub stop: &'a dyn Fn() -> bool,
}

impl Starting<'_> {
    fn go_on(&self) -> Result<(), EngineError> {
        if (self.stop)() { Err(ForwardError::Interrupted.into()) } else { Ok(()) }
    }

    /// Tells how far loading is, and whether it goes on.
    fn loaded(&mut self, bytes: u64, all: u64) -> ControlFlow<()> {
        (self.progress)(bytes, all);
        if (self.stop)() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

impl Session {
    /// Plans, allocates and loads. `progress` gets bytes loaded and bytes to load.
    ///
    /// # Errors
    /// As [`Session::start`].
    pub fn new(opened: &Opened, options: Options, progress: &mut dyn FnMut(u64, u64)) -> Result<Session, EngineError> {
        Session::start(opened, options, &mut Starting { progress, stop: &|| false })
    }

    /// Plans, allocates and loads, as long as it is not to stop.
    ///
    /// # Errors
    /// Whatever keeps the model from being run within the limits; [`ForwardError::Interrupted`] if it was to stop.
    pub fn start(opened: &Opened, options: Options, starting: &mut Starting<'_>) -> Result<Session, EngineError> {
        let (kind, threads) = (options.backend, options.threads);
        let beside = if options.sites == Sites::One { 0 } else { here::threads_beside(threads) };
        Session::start_on(opened, options, &|dims| backend::open(kind, dims, threads, beside), starting)
    }

    /// As [`Session::new`], on the backend that `open_backend` makes.
    ///
    /// # Errors
    /// As [`Session::start`].
    pub fn with_backend(
        opened: &Opened,
        options: Options,
        open_backend: OpenBackend,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Session, EngineError> {
        Session::start_on(opened, options, open_backend, &mut Starting { progress, stop: &|| false })
    }

    fn start_on(
        opened: &Opened,
        options: Options,
        open_backend: OpenBackend,
        starting: &mut Starting<'_>,
    ) -> Result<Session, EngineError> {
        let model = opened.model.clone();
        let options = match &options.repeat {
            Some(recipe) => recipe.applied(&model, &options)?,
            None => options,
        }
        .with_curve(&model);
        model.hparams.check_window(options.n_ctx)?;
        model.hparams.check_cache(options.kv_type)?;
        let (reader, mut notes) = source::open(&opened.gguf, &options)?;
        notes.extend(beyond_training(&model.hparams, options.n_ctx));
        let vectors: Vec<&TensorInfo> = model.divisors.iter().chain(&model.widened).collect();
        let bytes = vectors.iter().map(|t| tensor_layout(t, &|f| reader.alignment(f)).slot_bytes).sum();
        let mut small = Arena::new(bytes)?;
        let mut reader = reader;
        let mut divisors = read_vectors(reader.as_mut(), &vectors, &mut small, starting)?;
        let widened = divisors.split_off(model.divisors.len());
        model.divisors.iter().zip(&divisors).try_for_each(|(t, d)| check_divisors(&t.name, d))?;
        // Before the backend takes memory, of which a rate that is not known yet is measured, once.
        let both = options.sites != Sites::One && options.backend != BackendKind::Cpu;
        let rates = both.then(|| here::site_rates(here::threads_beside(options.threads)));
        let requant = requantised(&model, &options)?;
        let tape = Tape::new(&model);
        let dims = dims(&model, &tape, &options, &divisors);
        let bfloat = dims.bfloat && requant.as_ref().is_none_or(|r| serves_bfloat(r.whole()));
        let dims = Dims { bfloat, ..dims };
        let sizes = Sizes::new(&model, requant.as_ref(), options.threads, &|f| reader.alignment(f));
        starting.go_on()?;
        let (mut backend, fallback) = open_backend(&dims).map_err(|e| unopened(e, &model, &sizes, &dims, &options))?;
        check_types(&model, backend.as_ref())?;
        requant.as_ref().map_or(Ok(()), |r| check_types(r.whole(), backend.as_ref()))?;
        if options.sites == Sites::Both && backend.device().is_some() && backend.computes_in_ram().is_none() {
            return Err(LackError::Waits.into());
        }
        starting.go_on()?;

        let memory = backend.device();
        // Before the plan, which counts what is free.
        let apart = Apart::new(&model, widened, memory.as_deref())?;
        // A device's own memory holds the cache and the workspace, and has its own room.
        let workspace = if memory.is_none() { backend.workspace_bytes() + model.held_bytes() } else { 0 };
        let options = with_ram(options_within_locks(options, reader.as_ref()), &sizes, memory.is_some());
        let asked_slots = options.expert_slots;
        let expert_slots = match &memory {
            Some(memory) => decide_slots(&model, &sizes, memory.memory()?, rates, &options)?,
            None => ExpertSlots::Off,
        };
        let options = Options { expert_slots, ..options };
        let file = model;
        let mut sliced = match &memory {
            Some(memory) => {
                let room = planned_room(weights_room(options.vram, memory.memory()?), &sizes, &options)?;
                let beside = backend.computes_in_ram().is_some();
                let rates = options.repeat.as_ref().and_then(|r| r.rates()).or(rates);
                let with = || slices_or_not(&file, &sizes, room, rates, &options, &|f| reader.alignment(f));
                if beside { with() } else { None }
            }
            None => None,
        };
        let mut planned = None;
        if let (Some(of), Some(memory)) = (&sliced, &memory) {
            // Pieces of rows are on no drive.
            let in_memory = Options { storage: false, ..options.clone() };
            match plan_on_device(&of.model, &of.sizes, memory, &in_memory, &mut notes) {
                Ok(plan) => planned = Some(plan),
                // VRAM that was counted with is not there, and RAM has no room for what it would have held: parts stay whole.
                Err(EngineError::Plan(_)) if options.repeat.is_none() => sliced = None,
                Err(e) => return Err(e),
            }
        }
        let slices = sliced.as_ref().map(|s| s.part);
        let (model, sizes) = match sliced {
            Some(Sliced { model, sizes, .. }) => (model, sizes),
            None => (file.clone(), sizes),
        };
        let (plan, room, mut device) = match &memory {
            None => {
                options.repeat.as_ref().map_or(Ok(None), |r| r.room(None))?;
                (make_plan(&model, &sizes, None, workspace, &options)?, None, None)
            }
            Some(memory) => {
                let on_device = |notes: &mut _| plan_on_device(&model, &sizes, memory, &options, notes);
                let (plan, room, on_device) = planned.take().map_or_else(|| on_device(&mut notes), Ok)?;
                (plan, Some(room), Some(on_device))
            }
        };
        refuse_what_is_not_there(&plan, workspace, reader.as_ref(), &|ram| {
            let vram = memory.is_some().then_some(plan.vram_bytes);
            make_plan(&model, &sizes, vram, workspace, &Options { ram: Some(ram), ..options.clone() }).is_ok()
        })?;
        let (model, sizes) = (settled(&model, requant.as_ref(), &plan.homes), sizes.at(&plan.homes));
        let tape = if requant.is_some() || slices.is_some() { Tape::new(&model) } else { tape };
        if options.timeline {
            // A pass has each unit once.
            backend.trace_work(model.units.len());
        }
        let requanted = requant.as_ref().map(|r| RequantReport::new(r, &plan.homes));
        notes.extend(requanted.as_ref().and_then(RequantReport::note));
        let mut places = Places::take(&plan, &sizes, own_embedding(&model, memory.is_some()))?;
        reader.attach(&places.arena.whole())?;
        if let (Some(memory), Some((resident, slots))) = (&memory, device.take()) {
            if !places.arena.populate(machine::n_cpus(), starting.stop) {
                return Err(ForwardError::Interrupted.into());
            }
            let pinned = memory.pin(&places.arena.whole())?;
            let memory = Arc::clone(memory);
            places.device = Some(OnDevice { memory, resident, slots, _pinned: pinned });
        }
        let names: Arc<[String]> = model.units.iter().map(|u| u.name.clone()).collect();
        let resident = load_resident(&plan, &sizes, &places, (&names, options.threads), reader.as_mut(), starting)?;
        let mut watched = Vec::new();
        reader.watched(&mut watched);
        unchanged(&watched)?;
        let streams = Streams { model: &model, plan: &plan, sizes: &sizes, names, options: &options };
        let reader_name = plan.homes.contains(&Home::C).then(|| reader.name());
        let repeated = options.repeat.as_ref().and_then(|r| r.rates());
        let asked = std::cell::Cell::new(None);
        let site_rates = |threads| {
            let rates = repeated.or(rates).unwrap_or_else(|| here::site_rates(threads)).rounded();
            asked.set(Some(rates));
            rates
        };
        let division = backend
            .computes_in_ram()
            .and_then(|threads| Division::new(&model, &plan, &options, &|| site_rates(threads)));
        let recipe = Recipe::new(&file, &plan, &options, (room, options.ram), asked.get(), division.as_ref(), slices);
        options.repeat.as_ref().map_or(Ok(()), |r| r.check(&recipe))?;
        notes.extend(plan.too_few_slots.map(too_few_slots));
        let brought = plan.homes.iter().zip(&model.units).any(|(home, u)| u.is_expert() && *home != Home::A);
        if asked_slots == ExpertSlots::On && brought && (plan.device_caches.is_empty() || division.is_none()) {
            notes.push("--expert-cache on: there is no GPU, VRAM or RAM has no room, or no processors work next to it (--site gpu, --exact), so that experts live where they fit".into());
        }
        notes.extend(not_cut(options.slices, slices));
        let guesses = division.is_some() && options.sites == Sites::Auto && repeated.is_none();
        notes.extend(guesses.then(here::guessed_sites).flatten());
        let parts = division.as_ref().map(|d| d.parts(&works(&model, &sizes.layouts)));
        let links = links(&model, &plan, parts.as_deref(), places.device.is_some(), &options);
        let links = Links { storage_copies: reader.copies(), ..links };
        let (flow, feed) = streams.start(&places, reader, opened.gguf.shards.len())?;

        let routed: Vec<bool> = model.units.iter().map(|u| matches!(u.kind, UnitKind::Expert { .. })).collect();
        let unit_bytes: Vec<u64> = model.units.iter().map(UnitSpec::bytes).collect();
        let table = |t: &TensorInfo, place: Option<&Region>, layout: &UnitLayout| Embedding {
            file: FileId(t.shard as u16),
            offset: t.offset,
            row_bytes: (t.bytes / model.n_vocab as u64) as usize,
            stored_bytes: (t.bytes / model.n_vocab as u64) as usize,
            resident: place.map(|r| (r.clone(), layout.span_offsets[0])),
            turn: None,
        };
        let embedding = Embedding {
            stored_bytes: (file.embedding.bytes / model.n_vocab as u64) as usize,
            turn: requant.as_ref().and_then(Requantised::embedding),
            ..table(&model.embedding, places.embedding.as_ref(), &sizes.embedding)
        };
        let per_block = model.per_block.as_ref().zip(sizes.per_block.as_ref());
        let per_block = per_block.map(|(t, layout)| table(t, places.per_block.as_ref(), layout));
        let tables = [Some(&embedding), per_block.as_ref()];
        if !plan.homes.contains(&Home::C) && tables.into_iter().flatten().all(|t| t.resident.is_some()) {
            watched.clear();
        }
        notes.dedup();
        // Only a device's timeline has its own clock; the host's sees when operations are called.
        let traced = options.timeline && places.device.is_none();
        let homes = (plan.homes.clone(), &routed[..]);
        let mut weights = Weights::new(sizes.layouts, resident, homes, unit_bytes, feed, flow, traced);
        weights.apart = apart.addresses.clone();
        let slots =
            places.device.as_ref().map_or(Vec::new(), |d| slots_on_device(&plan, &weights.layouts, d.resident.addr));
        weights.beside = division
            .zip(parts)
            .map(|(d, parts)| beside::beside(&model, &plan, &d, parts, &places.in_ram, apart.in_ram.clone(), slots));
        let mut pages = Pages::new(Pages::of(options.n_ctx), 1);
        let recent = dims.recent.as_ref().map(|r| r.each);
        if dims.recurrent.is_some() || recent.is_some() {
            pages = pages.with_states(options.sequences, dims.recurrent.is_some(), recent);
        }
        let seq = pages.open();
        let mut scratch = Scratch::for_model(&model, options.max_batch);
        if let Some(routing) = &options.routing {
            scratch.force(Arc::clone(routing), options.max_batch);
        }
        Ok(Session {
            links,
            weights,
            rows: Vec::with_capacity(options.max_batch * embedding.row_bytes),
            rows_per_block: Vec::with_capacity(options.max_batch * per_block.as_ref().map_or(0, |t| t.row_bytes)),
            per_block,
            stored_rows: Vec::with_capacity(embedding.turn.map_or(0, |_| options.max_batch * embedding.stored_bytes)),
            floats: embedding.turn.map_or(Vec::new(), |t| vec![0.0; t.cols]),
            requant: requanted,
            row_offsets: Vec::with_capacity(options.max_batch),
            last: Vec::with_capacity(options.max_batch),
            last_parts: Vec::with_capacity(EXACT_ROWS),
            wanted: [Vec::with_capacity(EXACT_ROWS), Vec::with_capacity(options.max_batch)],
            wants_hidden: false,
            scratch,
            tape,
            model,
            backend,
            plan,
            recipe,
            options,
            reader_name,
            watched,
            notes,
            fallback,
            embedding,
            pages,
            seq,
            // A pass needs at most one copy of a page.
            ops: Vec::with_capacity(1),
            measuring: false,
            counting: true,
            in_ram: places.in_ram,
            device: places.device,
            arena: places.arena,
            _apart: apart,
        })
    }
}

/// A warning where the context is longer than what the model was trained on.
pub fn beyond_training(h: &HParams, n_ctx: usize) -> Option<String> {
    let reach = h.n_ctx_reach;
    (n_ctx > reach).then(|| {
        format!(
            "the context of {n_ctx} tokens is longer than the {reach} that the model was trained on: text gets worse beyond them (--rope-scaling yarn --rope-factor {} may help)",
            n_ctx.div_ceil(h.n_ctx_train)
        )
    })
}

/// A note that experts on storage have no caches.
pub fn too_few_slots(TooFewSlots { slots, floor }: TooFewSlots) -> String {
    format!(
        "RAM has room for {slots} experts of each layer, and a cache keeps little with fewer than {floor}, three for each that a token chooses: so experts rest in RAM in part; a larger --ram gives caches"
    )
}

/// The error of a backend that could not be opened; where memory for processors was refused, that of the plan
/// if there is none, which says what would fit.
fn unopened(e: BackendError, model: &Model, sizes: &Sizes, dims: &Dims, options: &Options) -> EngineError {
    if let BackendError::OutOfMemory { backend: "cpu", .. } = e
        && let Err(e) = make_plan(model, sizes, None, CpuBackend::workspace_bytes_of(dims, options.threads), options)
    {
        return e.into();
    }
    e.into()
}

/// Whether a reader locks the memory that it reads to, as the VFIO driver does.
fn locks(reader: &dyn Reader) -> bool {
    matches!(reader.name(), "vfio" | "mixed")
}

/// The options, with no more RAM than may be locked where a reader locks it and `--ram` does not say.
fn options_within_locks(options: Options, reader: &dyn Reader) -> Options {
    let memory = machine::memory(Path::new("/"));
    match (options.ram, memory.lock_left.filter(|_| locks(reader))) {
        (None, Some(left)) => Options { ram: Some(memory.budget().map_or(left, |b| b.min(left))), ..options },
        _ => options,
    }
}

/// The options, with the RAM for weights of which some may stay on storage: of a plan for a GPU free RAM is rounded, since sites
/// follow from it.
fn with_ram(options: Options, sizes: &Sizes, on_device: bool) -> Options {
    let budget = || machine::memory(Path::new("/")).budget();
    let two = on_device && options.sites != Sites::One;
    let free = |room| if two { steady(room, sizes.weights()) } else { room };
    Options { ram: options.ram.or_else(|| budget().map(free)), ..options }
}

/// `--ram` may ask for more than there is; the kernel would kill, or the desktop stall. `fits` says whether
/// there is a plan within that much RAM.
fn refuse_what_is_not_there(
    plan: &Plan,
    workspace: u64,
    reader: &dyn Reader,
    fits: &dyn Fn(u64) -> bool,
) -> Result<(), EngineError> {
    let memory = machine::memory(Path::new("/"));
    let lock = memory.lock_refusal(plan.ram_bytes).filter(|_| locks(reader));
    let Some(source) = memory.refusal(plan.ram_bytes.saturating_add(workspace)).or(lock) else { return Ok(()) };
    let fits = memory.safe_budget().filter(|ram| fits(*ram));
    Err(LackError::Memory { source, fits, smaller_ctx: workspace > 0 }.into())
}

/// The model with smaller matrices, where the options ask for one.
pub(super) fn requantised(model: &Model, options: &Options) -> Result<Option<Requantised>, EngineError> {
    let of = options.requant.map(|ty| Requantised::new(model, ty)).transpose();
    of.map_err(|e| ModelError::from(e).into())
}

/// The arena, cut up as planned.
struct Places {
    device: Option<OnDevice>,
    arena: Arena,
    rows: Region,
    turning: Vec<Region>,
    slots: Vec<Region>,
    caches: Vec<Region>,
    in_ram: Vec<Option<Region>>,
    embedding: Option<Region>,
    per_block: Option<Region>,
}

impl Places {
    /// `own_embedding`: whether the embedding has a place of its own.
    fn take(plan: &Plan, sizes: &Sizes, own_embedding: bool) -> Result<Places, EngineError> {
        let mut arena = Arena::new(plan.ram_bytes)?;
        let mut take = |bytes: u64| arena.take(bytes);
        let rows = take(sizes.rows)?;
        let turning = (0..sizes.turning.0).map(|_| take(sizes.turning.1)).collect::<Result<Vec<_>, ArenaError>>()?;
        let slots = plan.slots().map(&mut take).collect::<Result<Vec<_>, _>>()?;
        let mut in_ram = Vec::with_capacity(plan.homes.len());
        for (l, home) in sizes.layouts.iter().zip(&plan.homes) {
            in_ram.push(if *home == Home::B { Some(take(l.slot_bytes)?) } else { None });
        }
        let own = (plan.embedding_resident && own_embedding).then_some(sizes.embedding.slot_bytes);
        let embedding = own.map(&mut take).transpose()?;
        let of_blocks = sizes.per_block.as_ref().filter(|_| plan.embedding_resident).map(|l| l.slot_bytes);
        let per_block = of_blocks.map(&mut take).transpose()?;
        let caches = plan.cache_slots().map(&mut take).collect::<Result<Vec<_>, _>>()?;
        Ok(Places { arena, rows, turning, slots, caches, in_ram, embedding, per_block, device: None })
    }
}

/// Loads tiers A and B and the embedding; returns where resident units lie in the backend's memory. `threads` requantise what is to be.
fn load_resident(
    plan: &Plan,
    sizes: &Sizes,
    places: &Places,
    (names, threads): (&[String], usize),
    reader: &mut dyn Reader,
    starting: &mut Starting<'_>,
) -> Result<Vec<Option<u64>>, EngineError> {
    let mut to_ram: Vec<(&UnitLayout, Region, &str)> = Vec::new();
    let mut to_device: Vec<DeviceUnit> = Vec::new();
    let mut to_turn: Vec<TurnedUnit> = Vec::new();
    let mut resident = vec![None; plan.homes.len()];
    let mut next = places.device.as_ref().map_or(0, |d| d.resident.addr);
    for (u, home) in plan.homes.iter().enumerate() {
        let (layout, name, spans) = (&sizes.layouts[u], names[u].as_str(), &sizes.turned[u][..]);
        match (home, &places.in_ram[u]) {
            (Home::A, _) => {
                match spans.is_empty() {
                    true => to_device.push(DeviceUnit { layout, addr: next, name }),
                    false => {
                        let rest = Rest::Device(next, layout.slot_bytes as usize);
                        to_turn.push(TurnedUnit { spans, rest, name });
                    }
                }
                resident[u] = Some(next);
                next += layout.slot_bytes;
            }
            (Home::B, Some(region)) => {
                match spans.is_empty() {
                    true => to_ram.push((layout, region.clone(), name)),
                    false => to_turn.push(TurnedUnit { spans, rest: Rest::Ram(region.clone()), name }),
                }
                // A device streams from RAM; processors compute there.
                resident[u] = places.device.is_none().then_some(region.addr() as u64);
            }
            _ => {}
        }
    }
    to_ram.extend(places.embedding.iter().map(|r| (&sizes.embedding, r.clone(), "token_embd.weight")));
    to_ram.extend(
        sizes
            .per_block
            .as_ref()
            .zip(places.per_block.as_ref())
            .map(|(l, r)| (l, r.clone(), "per_layer_token_embd.weight")),
    );
    let in_ram = to_ram.iter().map(|(l, ..)| l.read_bytes()).sum::<u64>();
    let on_device = to_device.iter().map(|u| u.layout.read_bytes()).sum::<u64>();
    let turned: u64 = to_turn.iter().flat_map(|u| u.spans).map(|s| s.span.bytes).sum();
    let total = in_ram + on_device + turned;
    // SAFETY: the plan gave each unit a region of its own.
    unsafe { load(reader, &to_ram, &mut |done| starting.loaded(done, total)) }.map_err(stream_error)?;
    // Those behind are for attention parts alone.
    let slots = &places.slots[..plan.n_slots];
    let engine = match &places.device {
        Some(device) if plan.homes.contains(&Home::A) => Some(device.memory.copy_engine(slots.len())?),
        _ => None,
    };
    if let (Some(engine), false) = (&engine, to_device.is_empty()) {
        let mut progress = |done| starting.loaded(in_ram + done, total);
        // SAFETY: nothing streams yet, so the slots are free; units lie one after the other in the allocation.
        unsafe { load_to_device(reader, &to_device, slots, engine.as_ref(), &mut progress) }.map_err(stream_error)?;
    }
    if !to_turn.is_empty() {
        let device = engine.as_deref().map(|engine| (engine, slots));
        let mut progress = |done| starting.loaded(in_ram + on_device + done, total);
        // SAFETY: as above; the regions for turning are nobody else's.
        unsafe { load_turned(reader, &to_turn, &places.turning, device, threads, &mut progress) }
            .map_err(stream_error)?;
    }
    Ok(resident)
}

/// What the flow of streamed units is built from.
struct Streams<'a> {
    model: &'a Model,
    plan: &'a Plan,
    sizes: &'a Sizes,
    names: Arc<[String]>,
    options: &'a Options,
}

impl Streams<'_> {
    fn start(
        self,
        places: &Places,
        reader: Box<dyn Reader>,
        n_files: usize,
    ) -> Result<(Arc<Flow>, Box<dyn Feed>), EngineError> {
        let device = match &places.device {
            None => None,
            Some(d) => {
                let frames = device_slots(self.plan, d.slots.addr);
                let engine = d.memory.copy_engine(frames.len())?;
                Some(DeviceConfig { engine, resting: places.in_ram.clone(), frames })
            }
        };
        let on_device = device.as_ref().map(|d| (Arc::clone(&d.engine), d.frames.clone()));
        let config = FlowConfig {
            spec: spec(self.model, self.plan, device.is_some()),
            layouts: Arc::clone(&self.sizes.layouts),
            names: self.names,
            frames: match self.plan.homes.contains(&Home::C) {
                true => [&places.slots[..], &places.caches].concat(),
                false => Vec::new(),
            },
            rows: places.rows.clone(),
            trace_events: if self.options.timeline { TRACE_EVENTS } else { 0 },
            n_files,
            device,
        };
        // SAFETY: the session drops the flow before the device's memory, from which its frames are; the plan made regions
        // and frames large enough, and nothing else uses them.
        let flow = unsafe { Flow::start(config, reader) };
        let flow = Arc::new(flow.map_err(StorageError::Threads)?);
        let units = match on_device {
            None => Units::in_ram(Arc::clone(&flow)),
            Some((engine, frames)) => Units::on_device(Arc::clone(&flow), engine, frames),
        };
        Ok((flow, Box::new(units)))
    }
}

/// What streams, and through which frames.
fn spec(model: &Model, plan: &Plan, on_device: bool) -> Spec {
    let rests = |home: &Home| match home {
        Home::A => Place::Device,
        Home::B => Place::Host,
        Home::C => Place::Storage,
    };
    let in_ram = if plan.homes.contains(&Home::C) { plan.n_slots } else { 0 };
    let mut pools = PoolSpec::rings(Place::Host, in_ram, model.units.len(), apart(model, plan.attention_slot_bytes));
    pools.extend(caches(model, plan));
    let attention = apart(model, plan.device_attention_slot_bytes);
    pools.extend(PoolSpec::rings(Place::Device, plan.device_slots, model.units.len(), attention));
    let streams = |u: usize| plan.homes[u] == Home::C || on_device && plan.homes[u] == Home::B;
    Spec {
        homes: plan.homes.iter().map(rests).collect(),
        routed: model.units.iter().map(|u| matches!(u.kind, UnitKind::Expert { .. })).collect(),
        site: if on_device { Place::Device } else { Place::Host },
        in_ram: Vec::new(),
        steps: schedule(model, &streams),
        demand_max: model.hparams.n_experts,
        pools,
        links: flow::links(),
    }
}

/// A pool for each cache, in their order.
fn caches(model: &Model, plan: &Plan) -> Vec<PoolSpec> {
    let of = plan.cache_of(&unit_sizes(model));
    let pool = |(i, c): (usize, &Cache)| PoolSpec {
        place: Place::Host,
        frames: c.slots,
        policy: Policy::Cache,
        members: of.iter().map(|cache| *cache == Some(i)).collect(),
    };
    plan.caches.iter().enumerate().map(pool).collect()
}

/// By block, the slots of its experts on a device, which lie behind the units that live there; those begin at `base`.
fn slots_on_device(plan: &Plan, layouts: &[UnitLayout], base: u64) -> Vec<Option<SlotsAt>> {
    let resident = layouts.iter().zip(&plan.homes).filter(|(_, home)| **home == Home::A).map(|(l, _)| l.slot_bytes);
    let mut at = (base + resident.sum::<u64>()).next_multiple_of(SLOT_ALIGN);
    let mut slots = vec![None; plan.device_caches.iter().map(|c| c.block + 1).max().unwrap_or(0)];
    for c in &plan.device_caches {
        // SAFETY: the device's memory for resident units was allocated with these behind them, by the same plan, and stays as long as
        // the session, which has the backend; nothing else lies there.
        slots[c.block] = Some(unsafe { SlotsAt::new(at, c.slots, c.slot_bytes) });
        at += c.bytes();
    }
    slots
}

/// Addresses of the slots on a device, which begin at `base`.
pub(super) fn device_slots(plan: &Plan, base: u64) -> Vec<u64> {
    let next = |at: &mut u64, bytes| Some(std::mem::replace(at, *at + bytes));
    plan.slots_on_device().scan(base, next).collect()
}

/// The units that have slots of their own where buffers have such: attention parts.
pub(super) fn apart(model: &Model, attention_slot_bytes: u64) -> Option<Vec<bool>> {
    let is_attention = |u: &UnitSpec| matches!(u.kind, UnitKind::Attention(_));
    (attention_slot_bytes > 0).then(|| model.units.iter().map(is_attention).collect())
}

/// Every tensor type of the model must have a kernel.
fn check_types(model: &Model, backend: &dyn Backend) -> Result<(), EngineError> {
    let types = model.matrices().into_iter().map(|(_, _, t)| t.ty).chain([model.embedding.ty]);
    match types.into_iter().find(|&ty| !backend.supports(ty)) {
        None => Ok(()),
        Some(ty) => {
            let supported = TensorType::ALL.iter().filter(|&&t| backend.supports(t));
            let supported = supported.map(|t| t.name()).collect::<Vec<_>>().join(", ");
            Err(BackendError::UnsupportedType { ty, backend: backend.name(), supported }.into())
        }
    }
}

/// Whether the device keeps experts in slots, where weights may take `room` bytes there: as is asked for, or where the choices are
/// known to come again so soon that it is faster. Processors must be there that compute beside it, at these rates.
pub(super) fn slots_or_not(
    model: &Model,
    sizes: &Sizes,
    room: u64,
    rates: Option<SiteRates>,
    options: &Options,
) -> ExpertSlots {
    // Slots are for experts that two sites compute.
    if options.sites == Sites::One {
        return ExpertSlots::Off;
    }
    let with = |expert_slots| make_plan(model, sizes, Some(room), 0, &Options { expert_slots, ..options.clone() });
    let auto = || -> Option<bool> {
        let rates = rates.filter(|_| options.routing.is_some() || options.curve.is_some())?;
        let (slots, fixed) = (with(ExpertSlots::On).ok()?, with(ExpertSlots::Off).ok()?);
        let hits = slot_hits(model, &slots, options)?;
        Some(faster_in_slots(model, &fixed, &rates.rounded(), hits))
    };
    match options.expert_slots {
        ExpertSlots::Auto if auto() == Some(true) => ExpertSlots::On,
        ExpertSlots::Auto => ExpertSlots::Off,
        told => told,
    }
}

/// The same of a device whose memory is used like this.
fn decide_slots(
    model: &Model,
    sizes: &Sizes,
    now: MemoryUse,
    rates: Option<SiteRates>,
    options: &Options,
) -> Result<ExpertSlots, EngineError> {
    let room = planned_room(weights_room(options.vram, now), sizes, options)?;
    Ok(slots_or_not(model, sizes, room, rates, options))
}

/// Bytes of a device's memory that weights may take, where `vram` is the limit given.
pub(super) fn weights_room(vram: Option<u64>, now: MemoryUse) -> u64 {
    let all = now.used + now.free;
    let limit = vram.unwrap_or(all - VRAM_MARGIN_MAX.min(all / 16));
    limit.saturating_sub(now.used).min(now.free)
}

/// Bytes of a device's memory that a plan counts with for weights, where there are `room`: rounded down by up to 15 bytes, which no unit
/// is smaller than, so that it may shrink by steps.
pub(super) fn planned_room(room: u64, sizes: &Sizes, options: &Options) -> Result<u64, EngineError> {
    let room = match &options.repeat {
        Some(recipe) => return Ok(recipe.room(Some(room))?.unwrap_or(room)),
        None if options.vram.is_none() && options.sites != Sites::One => steady(room, sizes.weights()),
        None => room,
    };
    Ok(room / VRAM_STEPS * VRAM_STEPS)
}

/// The plan for a device with memory of its own, the room that it counts with, and that memory: resident units and slots. Where
/// memory is refused that should be free, tier A shrinks.
fn plan_on_device(
    model: &Model,
    sizes: &Sizes,
    memory: &Arc<dyn DeviceMemory>,
    options: &Options,
    notes: &mut Vec<String>,
) -> Result<(Plan, u64, (backend::DeviceAlloc, backend::DeviceAlloc)), EngineError> {
    let now = memory.memory()?;
    let all_room = planned_room(weights_room(options.vram, now), sizes, options)?;
    let mut step = 0;
    loop {
        let room = all_room - all_room / VRAM_STEPS * step;
        let plan = make_plan(model, sizes, Some(room), 0, options)?;
        let slots_bytes = plan.slots_on_device().sum::<u64>();
        let resident = memory.alloc(plan.vram_bytes - slots_bytes, "tier A");
        let both = resident.and_then(|r| Ok((r, memory.alloc(slots_bytes, "the ring's slots")?)));
        match both {
            Ok(both) => {
                if step > 0 {
                    notes.push(format!(
                        "VRAM that should have been free was refused; weights got {} of it instead of {}",
                        format_bytes(room),
                        format_bytes(all_room)
                    ));
                }
                return Ok((plan, room, both));
            }
            Err(BackendError::OutOfMemory { .. }) if step < VRAM_STEPS && options.repeat.is_none() => step += 1,
            Err(e) => return Err(e.into()),
        }
    }
}

/// Whether processors may round bulk rows of the model to bfloat16.
fn serves_bfloat(model: &Model) -> bool {
    model.matrices().iter().all(|(.., t)| CpuBackend::bfloat_serves(t.ty))
}

/// Layers that keep recent positions alone: those with windows, where that takes fewer pages than keeping all, and others
/// show that a cache that was saved is this model's.
fn recent_layers(model: &Model, options: &Options) -> Option<RecentLayers> {
    let windows = model.windows();
    let window = windows.iter().flatten().max()?;
    let each = Recent::new(*window, options.max_batch.min(options.n_ctx));
    let fewer = each.pages.saturating_mul(options.sequences) < Pages::of(options.n_ctx);
    let layers = windows.iter().map(Option::is_some).collect();
    (options.recent && fewer && windows.contains(&None)).then_some(RecentLayers {
        layers,
        each,
        sequences: options.sequences,
    })
}

/// The sizes of a session, whose divisors of rotary frequencies have been read; without them, sizes alone are right.
pub(super) fn dims(model: &Model, tape: &Tape, options: &Options, divisors: &[Vec<f32>]) -> Dims {
    let h = &model.hparams;
    Dims {
        n_layers: model.cached.len(),
        n_blocks: h.n_layers,
        expert_bytes: model.largest_expert(),
        n_embd: h.n_embd,
        n_heads: h.n_heads,
        n_kv_heads: h.n_kv_heads,
        head_dim: h.head_dim,
        shapes: if h.shapes.is_empty() { Vec::new() } else { model.cache_shapes().collect() },
        n_per_block: h.n_per_block * h.n_layers,
        value_of_latent: h.latent.map_or(0, |l| l.value),
        n_ff: model.n_ff(),
        n_experts: h.n_experts,
        n_experts_used: h.n_experts_used,
        n_ff_expert: h.n_ff_expert,
        n_vocab: model.n_vocab,
        max_batch: options.max_batch.min(options.n_ctx),
        max_outputs: options.outputs.min(options.max_batch),
        n_ctx: options.n_ctx,
        recent: recent_layers(model, options),
        bfloat: serves_bfloat(model),
        kv_type: options.kv_type,
        ropes: model.ropes.iter().map(|r| r.rope(h.arch.rope_kind, options.n_ctx, divisors)).collect(),
        n_mix: model.width(Act::Mix),
        n_attn: model.width(Act::Gates).max(h.n_heads * h.head_dim),
        recurrent: h.recurrent.map(|r| Recurrent { layers: model.states, sequences: options.sequences, ..r }),
        beyond: tape.beyond(model),
        no_kernel: tape.lacks(CudaBackend::can),
    }
}

/// Bytes that a one-token pass reads, by tier. Experts count by the share that is used, those with a cache by how
/// often it hits; `beside` is, by unit, the part of its uses that processors beside a device compute.
fn links(model: &Model, plan: &Plan, beside: Option<&[f64]>, on_device: bool, options: &Options) -> Links {
    let h = &model.hparams;
    let of_host = |u: usize| beside.map_or(0.0, |parts| parts[u]);
    let used = |u: &UnitSpec| match u.kind {
        UnitKind::Expert { .. } => u.bytes() as f64 * h.n_experts_used as f64 / h.n_experts as f64,
        _ => u.bytes() as f64,
    };
    let bytes = |part: &dyn Fn(usize, Home) -> f64| {
        let of = model.units.iter().zip(&plan.homes).enumerate();
        of.map(|(i, (u, home))| used(u) * part(i, *home)).sum::<f64>() as u64
    };
    let all_of = |yes: bool| if yes { 1.0 } else { 0.0 };
    let cached = plan.cache_of(&unit_sizes(model));
    let rates = hit_rates_of(model, plan, options.routing.as_deref());
    let hits = |u: usize| cached[u].map_or(0.0, |c| rates[c] * used(&model.units[u]));
    let slots = slot_hits(model, plan, options);
    let brought = |u: usize| match slots {
        Some(hits) if matches!(model.units[u].kind, UnitKind::Expert { .. }) => 1.0 - hits,
        _ => 1.0,
    };
    let from_caches = (0..model.units.len()).map(hits).sum::<f64>() as u64;
    Links {
        on_device,
        bytes_per_pass: bytes(&|_, _| 1.0),
        gpu_bytes_per_pass: bytes(&|u, home| all_of(on_device && home != Home::A) * (1.0 - of_host(u)) * brought(u)),
        beside_bytes_per_pass: bytes(&|u, _| of_host(u)),
        nvme_bytes_per_pass: bytes(&|_, home| all_of(home == Home::C)).saturating_sub(from_caches),
        ..Links::default()
    }
}

/// Reads small tensors by way of `arena`, which has room for them, and turns them to floats.
fn read_vectors(
    reader: &mut dyn Reader,
    tensors: &[&TensorInfo],
    arena: &mut Arena,
    starting: &mut Starting<'_>,
) -> Result<Vec<Vec<f32>>, EngineError> {
    if tensors.is_empty() {
        return Ok(Vec::new());
    }
    let mut layouts = Vec::with_capacity(tensors.len());
    for t in tensors {
        let l = tensor_layout(t, &|f| reader.alignment(f));
        let region = arena.take(l.slot_bytes)?;
        layouts.push((l, region));
    }
    reader.attach(&arena.whole())?;
    let units: Vec<_> =
        layouts.iter().zip(tensors).map(|((l, region), t)| (l, region.clone(), t.name.as_str())).collect();
    let stop = starting.stop;
    let mut go_on = |_| if stop() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    // SAFETY: each region is its tensor's.
    unsafe { load(reader, &units, &mut go_on) }.map_err(stream_error)?;
    let floats = |((l, region, _), t): (&(&UnitLayout, Region, &str), &&TensorInfo)| {
        // SAFETY: the tensor's bytes were read to this offset of the region, whose length the reader has
        // checked, and nobody else uses it.
        let bytes =
            unsafe { std::slice::from_raw_parts(region.addr().add(l.span_offsets[0] as usize), t.bytes as usize) };
        let mut out = vec![0.0; t.shape.iter().product::<u64>() as usize];
        match backend::reference::dequantize(t.ty, bytes, &mut out) {
            true => Ok(out),
            false => Err(ModelError::Unwidened { tensor: t.name.clone(), ty: t.ty }.into()),
        }
    };
    units.iter().zip(tensors).map(floats).collect()
}

//! What a model will do on a machine, from its header alone: the plan that a session would make, and the
//! speed that the machine's rates allow.

use std::sync::Arc;

use super::batch::{self, BatchSizes, Weighed};
use super::beside::{Division, as_living};
use super::here::DRIVER_BYTES;
use super::hits::{caching, hit_rates_of, slot_hits};
use super::layouts::{Sizes, make_plan};
use super::repeat::steady;
use super::requant::{RequantReport, settled};
use super::sizes::unit_sizes;
use super::slices::{Sliced, slices_or_not};
use super::start::{dims, planned_room, requantised, slots_or_not, weights_room};
use super::works::works;
use super::{EngineError, ExpertSlots, LackError, Options, Recipe, Sites, Slices};
use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::CudaBackend;
use crate::backend::{BackendError, BackendKind, Dims, MemoryUse};
use crate::machine;
use crate::model::{Model, Requantised, Tape, takes_nearly_all};
use crate::pipeline::{Event, EventKind};
use crate::plan::{
    self, COPY_GAP_S, Cache, Caching, Costs, Home, Machine, Outcome, PassWork, Plan, Rates, Roofline, Setup, Shares,
    SimUnit, Site, SiteRates, Traffic, UnitPart, UnitWork, pass_s, roofline,
};
use crate::storage::Alignment;

/// Numbers of buffers that are tried where none is given.
const BUFFERS_TRIED: std::ops::RangeInclusive<usize> = 2..=6;
/// One-token passes of a timeline.
pub(super) const PASSES_SHOWN: usize = 6;
/// Prefill passes that are simulated one by one.
const PASSES_RUN: usize = 6;
/// How direct reads are aligned on common drives.
pub(super) const DIRECT: Alignment = Alignment { memory: 512, offset: 4096 };

/// A plan and what it will do.
#[derive(Clone, Debug)]
pub struct Forecast {
    /// The plan.
    pub based: Based,
    /// What requantising would do, where it is asked for.
    pub requant: Option<RequantReport>,
    /// Positions of the KV cache.
    pub n_ctx: usize,
    /// Tokens of a pass.
    pub batch: BatchSizes,
    /// Bytes of the KV cache.
    pub kv_bytes: u64,
    /// What passes take.
    pub prediction: Prediction,
}

/// A plan, and what passes over it are predicted from.
#[derive(Clone, Debug)]
pub struct Based {
    /// Where weights are computed.
    pub site: Site,
    /// The plan.
    pub plan: Plan,
    /// The units, in the order of the plan's homes.
    pub units: Vec<UnitWork>,
    /// What processors next to a GPU compute from RAM while tokens are generated; `None` for nothing.
    pub beside: Option<plan::Beside>,
    /// What the plan followed from, by which a session can make it again.
    pub recipe: Recipe,
    /// Parts of each feed-forward part that processors next to a GPU have, of [`crate::model::SLICE_PARTS`], where those are cut.
    pub slices: Option<u32>,
    /// The model with such.
    sliced: Option<Arc<Model>>,
    /// Threads that compute on processors.
    pub threads: usize,
    /// Bytes of VRAM that the backend takes next to weights, KV cache included; 0 without a GPU.
    pub workspace_bytes: u64,
    /// Bytes of RAM that the backend takes next to weights, KV cache included; 0 with a GPU.
    pub ram_workspace_bytes: u64,
    /// Bytes of VRAM that weights may take; `None` without a GPU.
    pub vram_room: Option<u64>,
    /// Bytes of RAM that weights, and without a GPU the KV cache and workspace, may take.
    pub ram_room: u64,
    /// The plan as the simulator sees it: experts that a GPU is expected to find in its slots live there.
    living: Plan,
    /// Caches of experts, as the simulator sees them.
    caching: Caching,
}

/// What passes take.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// Bytes of a one-token pass.
    pub traffic: Traffic,
    /// The roofline of a one-token pass.
    pub decode: Option<Roofline>,
    /// A one-token pass of a settled ring, simulated; `None` where a rate that it needs is not known.
    pub simulated: Option<Shares>,
    /// The rates that both count with.
    pub rates: Rates,
    /// The roofline of a prefill pass over [`Prediction::batch`] tokens; `None` where the speed of products is not
    /// known.
    pub prefill: Option<Roofline>,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens of a prefill pass: what the options allow, or what the prompt has if it is shorter.
    pub batch: usize,
    /// Seconds from a prompt of that many tokens to the first token, simulated from an empty ring.
    pub first_token_s: Option<f64>,
    /// Seconds of loading tiers A and B.
    pub load_s: Option<f64>,
}

impl Forecast {
    /// Plans `model` on `machine` as a session with `options` would, and predicts its speed with a prompt
    /// of `prompt` tokens. Where the number of buffers is not given, it is the smallest whose pass takes
    /// no more than a hundredth longer than with the best; what a plan has by itself where rates are guesses by which
    /// `options` choose none.
    ///
    /// # Errors
    /// Where nothing fits the limits, or a GPU is asked for that is not there.
    pub fn new(model: &Model, machine: &Machine, options: &Options, prompt: usize) -> Result<Forecast, EngineError> {
        let options = &match &options.repeat {
            Some(recipe) => recipe.applied(model, options)?,
            None => options.clone(),
        }
        .with_curve(model);
        let requant = requantised(model, options)?;
        let sizes = Sizes::new(model, requant.as_ref(), options.threads, &|_| DIRECT);
        let subject = Subject::new(model, requant.as_ref(), &sizes, machine);
        let options = &subject.with_batch(options);
        let with = |n_buffers| Forecast::of(&subject, &Options { n_buffers, ..options.clone() }, prompt);
        let first = with(options.n_buffers)?;
        let chosen = options.n_buffers.is_some() || options.repeat.is_some() || first.n_buffers() == 0;
        if chosen || !(options.buffers_by_guess || first.by_measured_rates(machine)) {
            return Ok(first);
        }
        let seconds = |f: &Forecast| f.prediction.simulated.map(|s| s.seconds);
        // Frames of the ring are not worth caches, since how often those hit is a guess; nor a cut that was asked for.
        let told = matches!(options.slices, Slices::Of(_)) && first.based.slices.is_some();
        let keeps = |f: &Forecast| {
            f.based.cached_layers() >= first.based.cached_layers() && (!told || f.based.slices.is_some())
        };
        let all: Vec<Forecast> = BUFFERS_TRIED.filter_map(|n| with(Some(n)).ok().filter(keeps)).collect();
        let best = all.iter().filter_map(seconds).fold(f64::INFINITY, f64::min);
        let near = all.into_iter().find(|f| seconds(f).is_some_and(|s| s <= best * 1.01));
        Ok(near.unwrap_or(first))
    }

    fn of(subject: &Subject<'_>, options: &Options, prompt: usize) -> Result<Forecast, EngineError> {
        let based = subject.based(options)?;
        let prediction = Prediction::new(&based.work(subject.machine), prompt, options.max_batch);
        Ok(Forecast {
            prediction,
            requant: subject.requant.map(|r| RequantReport::new(r, &based.plan.homes)),
            based,
            n_ctx: options.n_ctx,
            batch: BatchSizes { alone: options.max_batch, shared: options.shared_batch.min(options.max_batch) },
            kv_bytes: kv_bytes(subject.file, options),
        })
    }

    /// The model whose units these are, of `file`: it, or the same with its feed-forward parts cut.
    pub fn model<'a>(&'a self, file: &'a Model) -> &'a Model {
        self.based.sliced.as_deref().unwrap_or(file)
    }

    /// Whether the rates of all that is brought or read of VRAM were measured.
    fn by_measured_rates(&self, machine: &Machine) -> bool {
        let storage = machine.storage.as_ref().is_some_and(|s| s.read.measured);
        let link = machine.gpu.as_ref().is_some_and(|g| g.link.measured && g.memory.measured);
        (self.tier(Home::C).0 == 0 || storage) && (self.based.site == Site::Cpu || link)
    }

    /// `options`, from which this was made, with the tokens of a pass that the plan chose.
    pub fn options(&self, options: &Options) -> Options {
        let BatchSizes { alone, shared } = self.batch;
        Options { max_batch: alone, shared_batch: shared, longest_prompt: None, ..options.clone() }
    }

    /// The same plan where each pass begins with an empty ring.
    pub fn without_wrap(mut self, machine: &Machine) -> Forecast {
        let (setup, work) = {
            let work = self.based.work(machine);
            (work.setup(&self.prediction.rates, true), work.decode())
        };
        let p = &mut self.prediction;
        p.simulated = p.simulated.map(|_| Setup { wrap: false, ..setup }.settled(&work));
        self
    }

    /// What would happen when: the prompt's first passes from an empty ring, then some one-token passes.
    pub fn timeline(&self, machine: &Machine) -> Vec<Event> {
        let work = self.based.work(machine);
        let decode = work.decode();
        let batch = self.prediction.batch;
        let prefill = prefill_work(&self.based.units, machine, self.based.site, batch);
        let rates = &self.prediction.rates;
        if self.based.beside.is_none() {
            let passes: Vec<&PassWork> = prefill.iter().chain(std::iter::repeat_n(&decode, PASSES_SHOWN)).collect();
            let tokens = prefill.iter().map(|_| batch).chain(std::iter::repeat(1));
            return with_passes(work.setup(rates, false).run(&passes), tokens);
        }
        // Between a prompt and what is generated the flow begins anew with other units.
        let passes: Vec<&PassWork> = prefill.iter().collect();
        let mut events = with_passes(work.setup(rates, false).run(&passes), std::iter::repeat(batch));
        let end = events.iter().map(|e| e.end_ns).max().unwrap_or(0);
        let generated = work.setup(rates, true).run(&[&decode; PASSES_SHOWN]);
        let shift = |e: Event| Event { start_ns: e.start_ns + end, end_ns: e.end_ns + end, ..e };
        events.extend(with_passes(generated, std::iter::repeat(1)).into_iter().map(shift));
        events
    }

    /// Units that processors next to a GPU compute, all or some of their uses, and their bytes; `None` if there are none.
    pub fn computed_beside(&self) -> Option<(usize, u64)> {
        let of = self.based.units.iter().zip(&self.based.beside.as_ref()?.units).filter(|(_, b)| **b);
        Some((of.clone().count(), of.map(|(u, _)| u.bytes).sum()))
    }

    /// Of the choices that fall on experts in RAM, the part that processors compute, where the link brings the others; the mean over
    /// layers that are divided, `None` if none is.
    pub fn part_of_choices(&self) -> Option<f64> {
        let beside = self.based.beside.as_ref()?;
        let parts = beside.parts(&self.based.units);
        let of = (0..parts.len()).filter(|u| beside.divides(*u) && beside.computes(*u));
        let (n, sum) = of.fold((0, 0.0), |(n, sum), u| (n + 1, sum + parts[u]));
        (n > 0).then(|| sum / f64::from(n))
    }

    /// Slots of the caches of experts, experts that they are for, both of all layers, the caches' number, and the share of uses
    /// that are expected there; `None` without caches.
    pub fn caches(&self) -> Option<(usize, usize, usize, f64)> {
        let caches = &self.based.plan.caches;
        let sum = |of: &dyn Fn(&Cache) -> usize| caches.iter().map(of).sum::<usize>();
        let of = self.based.units.iter().zip(&self.based.caching.of).filter(|(_, c)| c.is_some()).map(|(u, _)| u);
        let (uses, misses) = of.fold((0.0, 0.0), |(n, m), u| (n + u.share, m + u.share * u.miss));
        (!caches.is_empty()).then(|| (sum(&|c| c.slots), sum(&|c| c.experts), caches.len(), 1.0 - misses / uses))
    }

    /// Experts of a layer that a token chooses on storage and that no cache is expected to have; the mean over layers with caches.
    pub fn misses_per_layer(&self) -> f64 {
        let of = self.based.units.iter().zip(&self.based.caching.of).filter(|(_, c)| c.is_some());
        of.map(|(u, _)| u.share * u.miss).sum::<f64>() / self.based.plan.caches.len().max(1) as f64
    }

    /// Units and bytes of a tier.
    pub fn tier(&self, home: Home) -> (usize, u64) {
        let of = self.based.units.iter().zip(&self.based.plan.homes).filter(|(_, h)| **h == home);
        (of.clone().count(), of.map(|(u, _)| u.bytes).sum())
    }

    /// The home of each block: of its feed-forward part, or of its shared part where it has experts.
    pub fn blocks(&self) -> Vec<Home> {
        blocks_of(&self.based.units, &self.based.plan.homes)
    }

    /// The home of each block's attention part.
    pub fn attention(&self) -> Vec<Home> {
        homes_of(&self.based.units, &self.based.plan.homes, &[UnitPart::Attention, UnitPart::Shared])
    }

    /// Slots that computation reads from.
    pub fn n_buffers(&self) -> usize {
        if self.based.site == Site::Gpu { self.based.plan.device_slots } else { self.based.plan.n_slots }
    }
}

/// A plan, and the sizes that it was made for.
pub(super) struct Planned {
    site: Site,
    pub plan: Plan,
    workspace_bytes: u64,
    ram_workspace_bytes: u64,
    vram_room: Option<u64>,
    ram_room: u64,
    /// The model with its feed-forward parts cut, where the plan is of such.
    sliced: Option<Sliced>,
}

/// The plan that a session with `options` would make on `machine`.
pub(super) fn planned(
    model: &Model,
    machine: &Machine,
    options: &Options,
    sizes: &Sizes,
) -> Result<Planned, EngineError> {
    model.hparams.check_window(options.n_ctx)?;
    model.hparams.check_cache(options.kv_type)?;
    let site = site(model, machine, options)?;
    let two = site == Site::Gpu && options.sites != Sites::One;
    let free = |room| if two { steady(room, sizes.weights()) } else { room };
    let ram_room = options.ram.or_else(|| ram_budget(machine).map(free)).unwrap_or(0);
    let storage = options.storage && machine.storage.is_some();
    let options = Options { ram: Some(ram_room), storage, ..options.clone() };
    let (workspace_bytes, ram_workspace_bytes, vram_room) = match site {
        Site::Gpu => {
            let workspace = workspace_bytes(model, machine, &options);
            (workspace, 0, Some(planned_room(vram_room(machine, workspace, options.vram), sizes, &options)?))
        }
        Site::Cpu => {
            options.repeat.as_ref().map_or(Ok(None), |r| r.room(None))?;
            (0, cpu_workspace_bytes(model, &options), None)
        }
    };
    let rates = machine.site_rates(threads(machine, &options));
    let expert_slots = vram_room.map_or(ExpertSlots::Off, |room| slots_or_not(model, sizes, room, rates, &options));
    let options = Options { expert_slots, ..options };
    let rates = options.repeat.as_ref().and_then(|r| r.rates()).or(rates);
    let sliced = vram_room.and_then(|room| slices_or_not(model, sizes, room, rates, &options, &|_| DIRECT));
    let (of, sizes) = sliced.as_ref().map_or((model, sizes), |s| (&s.model, &s.sizes));
    let plan = make_plan(of, sizes, vram_room, ram_workspace_bytes, &options)?;
    Ok(Planned { site, plan, workspace_bytes, ram_workspace_bytes, vram_room, ram_room, sliced })
}

/// Threads that compute: those of the options, but one less than the machine has at most.
fn threads(machine: &Machine, options: &Options) -> usize {
    options.threads.min(machine.cpu.threads.saturating_sub(1).max(1))
}

/// What a forecast is of.
struct Subject<'a> {
    file: &'a Model,
    requant: Option<&'a Requantised>,
    sizes: &'a Sizes,
    /// Of a model that is requantised what units are follows from their homes.
    units: Option<Vec<UnitWork>>,
    machine: &'a Machine,
}

impl Based {
    /// Layers whose experts have caches in RAM or slots in VRAM.
    fn cached_layers(&self) -> usize {
        self.plan.caches.len() + self.plan.device_caches.len()
    }

    fn work<'a>(&'a self, machine: &'a Machine) -> Work<'a> {
        Work {
            units: &self.units,
            plan: &self.living,
            beside: self.beside.as_ref(),
            machine,
            site: self.site,
            threads: self.threads,
            caching: &self.caching,
            more_read: self.sliced.as_ref().map_or(0, |m| m.units.iter().map(|u| u.read_bytes() - u.bytes()).sum()),
        }
    }
}

impl<'a> Subject<'a> {
    fn new(file: &'a Model, requant: Option<&'a Requantised>, sizes: &'a Sizes, machine: &'a Machine) -> Subject<'a> {
        let units = requant.is_none().then(|| works(file, &sizes.layouts));
        Subject { file, requant, sizes, units, machine }
    }

    fn based(&self, options: &Options) -> Result<Based, EngineError> {
        let &Subject { file, requant, sizes, ref units, machine } = self;
        let planned = planned(file, machine, options, sizes)?;
        let Planned { site, plan, workspace_bytes, ram_workspace_bytes, vram_room, ram_room, sliced } = planned;
        let mixed = requant.map(|r| settled(file, Some(r), &plan.homes));
        let model = sliced.as_ref().map(|s| &s.model).or(mixed.as_ref()).unwrap_or(file);
        let mut units = match (units, &sliced) {
            (_, Some(s)) => works(model, &s.sizes.layouts),
            (Some(units), None) => units.clone(),
            (None, None) => works(model, &sizes.layouts_at(&plan.homes)),
        };
        let rates = hit_rates_of(model, &plan, options.routing.as_deref());
        for (u, cache) in units.iter_mut().zip(plan.cache_of(&unit_sizes(model))) {
            u.miss = cache.map_or(1.0, |c| 1.0 - rates[c]);
        }
        let threads = threads(machine, options);
        let rates = machine.site_rates(threads).filter(|_| site == Site::Gpu);
        let repeated = options.repeat.as_ref().and_then(|r| r.rates());
        let asked = std::cell::Cell::new(None);
        let rounded = |rates: SiteRates| {
            let rates = repeated.unwrap_or(rates).rounded();
            asked.set(Some(rates));
            rates
        };
        let division = rates.and_then(|rates| Division::new(model, &plan, options, &|| rounded(rates)));
        let slices = sliced.as_ref().map(|s| s.part);
        let rooms = (vram_room, Some(ram_room));
        let recipe = Recipe::new(file, &plan, options, rooms, asked.get(), division.as_ref(), slices);
        options.repeat.as_ref().map_or(Ok(()), |r| r.check(&recipe))?;
        let (living, division) = as_living(model, &plan, division, slot_hits(model, &plan, options));
        let timed = |d: Division| Some(d.timed(&units, &rates?, &machine.gpu.as_ref()?.costs));
        let beside = division.and_then(timed);
        let caching = caching(model, &plan, options.routing.as_ref());
        Ok(Based {
            site,
            plan,
            units,
            beside,
            recipe,
            slices,
            sliced: sliced.map(|s| Arc::new(s.model)),
            threads,
            workspace_bytes,
            ram_workspace_bytes,
            vram_room,
            ram_room,
            living,
            caching,
        })
    }

    /// The options with the tokens of a pass that the plan chooses, where it may.
    fn with_batch(&self, options: &Options) -> Options {
        let Some(longest) = options.longest_prompt else { return options.clone() };
        let prompt = longest.min(options.n_ctx);
        let of = |max_batch| Options { max_batch, longest_prompt: None, ..options.clone() };
        let sizes = batch::sizes(prompt);
        let weighed: Vec<Weighed> = match sizes.len() {
            1 => Vec::new(),
            _ => sizes.into_iter().map_while(|batch| self.weighed(&of(batch), prompt)).collect(),
        };
        match batch::best(&weighed) {
            Some(BatchSizes { alone, shared }) => Options { shared_batch: shared, ..of(alone) },
            None => of(options.max_batch),
        }
    }

    /// What passes of so many tokens do for a prompt; `None` where they have no room, or a rate is not known.
    fn weighed(&self, options: &Options, prompt: usize) -> Option<Weighed> {
        let (based, batch) = (self.based(options).ok()?, options.max_batch);
        let cut = based.slices.is_some() && matches!(options.slices, Slices::Of(_));
        let work = based.work(self.machine);
        let seconds = |tokens| Some(work.prefill_bound(tokens)?.seconds);
        let pass_s = seconds(batch)?;
        let rest = if prompt.is_multiple_of(batch) { 0.0 } else { seconds(prompt % batch)? };
        Some(Weighed {
            batch,
            prompt_s: ((prompt / batch) as f64 * pass_s + rest) / prompt as f64,
            pass_s,
            decode_s: work.decode_bound().1?.seconds,
            stop_s: work.stop_s(batch)?,
            caches: based.cached_layers() + usize::from(cut),
        })
    }
}

/// The options with the tokens of a pass that the plan for this machine chooses, where [`Options::longest_prompt`] lets it, else as they
/// are.
pub fn with_batch(model: &Model, machine: &Machine, options: &Options) -> Options {
    let repeated = options.repeat.as_ref().and_then(|r| r.applied(model, options).ok());
    let of = repeated.unwrap_or_else(|| options.clone());
    let chosen = match of.longest_prompt.is_some().then(|| requantised(model, &of)) {
        Some(Ok(requant)) => {
            let sizes = Sizes::new(model, requant.as_ref(), of.threads, &|_| DIRECT);
            Subject::new(model, requant.as_ref(), &sizes, machine).with_batch(&of.with_curve(model))
        }
        _ => of,
    };
    let Options { max_batch, shared_batch, longest_prompt, .. } = chosen;
    Options { max_batch, shared_batch, longest_prompt, ..options.clone() }
}

/// What a prediction is made of.
struct Work<'a> {
    units: &'a [UnitWork],
    plan: &'a Plan,
    beside: Option<&'a plan::Beside>,
    machine: &'a Machine,
    site: Site,
    threads: usize,
    caching: &'a Caching,
    /// Bytes that loading reads more than units have.
    more_read: u64,
}

impl Work<'_> {
    fn on_device(&self) -> bool {
        self.site == Site::Gpu
    }

    /// The simulator, of passes of one token or of a prompt.
    fn setup(&self, rates: &Rates, exact: bool) -> Setup {
        let beside = self.beside.filter(|_| exact);
        let plan = super::beside::as_exact(self.plan, beside.map(|b| &b.units[..]));
        let both = beside.and_then(|_| self.machine.site_rates(self.threads));
        // Beside processors that read the same memory the link is slower.
        let rates = Rates { gpu: both.map(|r| r.link).or(rates.gpu), ..*rates };
        let beside = beside.cloned().unwrap_or_default();
        Setup { beside, ..setup(self.units, &plan, &rates, self.on_device(), self.caching.clone()) }
    }

    /// A pass of one token.
    fn decode(&self) -> PassWork {
        let unit_s = decode_seconds(self.units, &self.plan.homes, self.beside, self.machine, self.site);
        PassWork { unit_s, beside_s: pass_s(self.site), experts: experts(self.units, 1), prompt: false, ahead: false }
    }

    /// What a pass of one token moves, and its roofline.
    fn decode_bound(&self) -> (Traffic, Option<Roofline>) {
        let parts = self.beside.map(|b| b.parts(self.units));
        let traffic = Traffic::new(self.units, &self.plan.homes, parts.as_deref(), self.on_device(), 1);
        let one = self.decode();
        let compute = match self.beside {
            Some(beside) => beside.chain_s(self.units, &one.unit_s),
            None => self.units.iter().zip(&one.unit_s).map(|(u, s)| s * u.share).sum(),
        };
        (traffic, roofline(&traffic, &rates(self.machine), Some(compute + pass_s(self.site))))
    }

    /// The roofline of a pass over so many tokens of a prompt; `None` if the speed of products is not known.
    fn prefill_bound(&self, tokens: usize) -> Option<Roofline> {
        let compute: f64 = self.prefill_seconds(tokens)?.sum();
        let traffic = Traffic::new(self.units, &self.plan.homes, None, self.on_device(), tokens);
        roofline(&traffic, &rates(self.machine), Some(compute + pass_s(self.site)))
    }

    /// Seconds of computing each unit in such a pass, by how often it is used.
    fn prefill_seconds(&self, tokens: usize) -> Option<impl Iterator<Item = f64>> {
        let unit_s = prefill_work(self.units, self.machine, self.site, tokens)?.unit_s;
        Some(self.units.iter().zip(unit_s).map(move |(u, s)| s * u.used_by(tokens)))
    }

    /// Seconds of computing in such a pass from a request to stop until it is heard: on processors those of a block; a GPU has been called
    /// ahead, up to where the next units have no frames.
    fn stop_s(&self, tokens: usize) -> Option<f64> {
        let all = self.prefill_seconds(tokens)?;
        if self.on_device() {
            let brought = self.plan.homes.iter().filter(|h| **h != Home::A).count();
            let part = (self.plan.device_slots + 1) as f64 / brought.max(1) as f64;
            return Some(all.sum::<f64>() * part.min(1.0));
        }
        let of_units: Vec<(Option<usize>, f64)> = self.units.iter().map(|u| u.size.block).zip(all).collect();
        let blocks = of_units.chunk_by(|a, b| a.0 == b.0).map(|block| block.iter().map(|u| u.1).sum());
        Some(blocks.fold(0.0, f64::max))
    }
}

impl Prediction {
    fn new(work: &Work<'_>, prompt: usize, max_batch: usize) -> Prediction {
        let &Work { units, plan, machine, site, .. } = work;
        let rates = rates(machine);
        let (traffic, decode) = work.decode_bound();
        let settled = |least: Roofline| work.setup(&rates, true).settled(&work.decode()).at_least(least.seconds);
        let simulated = decode.map(settled);
        let batch = prompt.clamp(1, max_batch);
        let prefill = work.prefill_bound(batch);
        let resident = units.iter().zip(&plan.homes).filter(|(_, h)| **h != Home::C).map(|(u, _)| u.bytes).sum::<u64>();
        let setup = work.setup(&rates, false);
        Prediction {
            traffic,
            decode,
            simulated,
            prefill,
            prompt,
            batch,
            first_token_s: prefill.and_then(|_| first_token(&setup, units, machine, site, prompt, max_batch)),
            load_s: rates.nvme.map(|n| (resident + work.more_read) as f64 / n),
            rates,
        }
    }
}

/// Seconds of each unit in a pass of one token, where the plan's own site computes it.
pub(super) fn decode_seconds(
    units: &[UnitWork],
    homes: &[Home],
    beside: Option<&plan::Beside>,
    machine: &Machine,
    site: Site,
) -> Vec<f64> {
    match machine.gpu.as_ref().filter(|_| site == Site::Gpu) {
        Some(gpu) => {
            let gpu_is = (gpu.memory.bytes_per_s(), gpu.multiprocessors);
            gpu_seconds(units, homes, beside, gpu_is, &gpu.costs)
        }
        None => units.iter().map(|u| u.decode_s(machine, site)).collect(),
    }
}

/// The same of a GPU that reads so many bytes of its memory a second and has so many multiprocessors.
pub(super) fn gpu_seconds(
    units: &[UnitWork],
    homes: &[Home],
    beside: Option<&plan::Beside>,
    (bytes_per_s, multiprocessors): (f64, usize),
    costs: &Costs,
) -> Vec<f64> {
    let mut unit_s: Vec<f64> = units.iter().map(|u| u.on_gpu_s(bytes_per_s, multiprocessors, costs)).collect();
    let used = experts(units, 1).max(1) as f64;
    let mut first = 0;
    for layer in units.chunk_by(|a, b| a.size.routed() && b.size.routed() && a.size.block == b.size.block) {
        let all = first..first + layer.len();
        first = all.end;
        // One call computes the experts of a layer if all of them rest.
        let whole = homes[all.clone()].iter().all(|h| *h == Home::A) || beside.is_some_and(|b| b.divides(all.start));
        let least = if whole { costs.experts.s() / used } else { costs.expert.s() };
        all.filter(|u| units[*u].size.routed()).for_each(|u| unit_s[u] = unit_s[u].max(least));
    }
    unit_s
}

/// The events of simulated passes over so many tokens each, the passes themselves among them.
pub(super) fn with_passes(outcome: Outcome, tokens: impl Iterator<Item = usize>) -> Vec<Event> {
    let Outcome { passes, mut events } = outcome;
    let mut start = 0.0;
    for (pass, tokens) in passes.iter().zip(tokens) {
        let end = start + pass.seconds;
        let ns = |s: f64| (s * 1e9) as u64;
        events.push(Event { kind: EventKind::Pass, unit: tokens, slot: 0, start_ns: ns(start), end_ns: ns(end) });
        start = end;
    }
    events
}

/// What the simulator needs to know.
pub(super) fn setup(units: &[UnitWork], plan: &Plan, rates: &Rates, on_device: bool, caching: Caching) -> Setup {
    Setup {
        units: units.iter().zip(&plan.homes).map(|(u, &home)| SimUnit { size: u.size, home }).collect(),
        on_device,
        staging_slots: if plan.homes.contains(&Home::C) { plan.n_slots } else { 0 },
        staging_attention: plan.attention_slot_bytes > 0,
        device_slots: plan.device_slots,
        device_attention: plan.device_attention_slot_bytes > 0,
        rates: *rates,
        copy_gap_s: COPY_GAP_S,
        wrap: true,
        seed: 1,
        caching,
        beside: plan::Beside::default(),
    }
}

/// Experts of a block that `tokens` tokens use together.
fn experts(units: &[UnitWork], tokens: usize) -> usize {
    let Some(e) = units.iter().find(|u| u.size.routed()) else { return 0 };
    let of_block = units.iter().filter(|u| u.size.routed() && u.size.block == e.size.block).count();
    (of_block as f64 * e.used_by(tokens)).round() as usize
}

/// Whether a prompt of so many tokens has experts brought before they are chosen.
fn takes_nearly_all_experts(units: &[UnitWork], tokens: usize) -> bool {
    let Some(e) = units.iter().find(|u| u.size.routed()) else { return false };
    let of_block = units.iter().filter(|u| u.size.routed() && u.size.block == e.size.block).count();
    takes_nearly_all(tokens * experts(units, 1), of_block)
}

fn prefill_work(units: &[UnitWork], machine: &Machine, site: Site, tokens: usize) -> Option<PassWork> {
    let unit_s = units.iter().map(|u| u.prefill_s(machine, site, tokens)).collect::<Option<_>>()?;
    let experts = experts(units, tokens);
    Some(PassWork {
        unit_s,
        beside_s: pass_s(site),
        experts,
        prompt: true,
        ahead: takes_nearly_all_experts(units, tokens),
    })
}

/// Seconds from the prompt to its last pass's end.
fn first_token(
    setup: &Setup,
    units: &[UnitWork],
    machine: &Machine,
    site: Site,
    prompt: usize,
    max_batch: usize,
) -> Option<f64> {
    let work = |tokens| prefill_work(units, machine, site, tokens);
    let (whole, rest) = (prompt / max_batch, prompt % max_batch);
    let full = if whole > 0 { Some(work(max_batch)?) } else { None };
    let last = if rest > 0 { Some(work(rest)?) } else { None };
    // A long prompt's passes are all alike once the ring has settled.
    let run = whole.min(PASSES_RUN);
    let passes: Vec<&PassWork> = full.iter().cycle().take(run).chain(&last).collect();
    let out = setup.run(&passes).passes;
    let more = (whole - run) as f64 * out.get(run.wrapping_sub(1)).map_or(0.0, |p| p.seconds);
    Some(out.iter().map(|p| p.seconds).sum::<f64>() + more)
}

/// The machine's rates as numbers.
fn rates(machine: &Machine) -> Rates {
    Rates {
        vram: machine.gpu.as_ref().map(|g| g.memory.bytes_per_s()),
        gpu: machine.gpu.as_ref().map(|g| g.link.bytes_per_s()),
        ram: Some(machine.ram.read.bytes_per_s()),
        ram_and_link: machine.ram_and_link(),
        nvme: machine.storage_bytes_per_s(),
        copies: machine.storage.as_ref().is_some_and(|s| s.copies),
    }
}

/// Where a session of the model computes: on a GPU, if there is one that has kernels for all that a pass does.
fn site(model: &Model, machine: &Machine, options: &Options) -> Result<Site, EngineError> {
    match (options.backend, &machine.gpu, refused_by_gpu(model, options)) {
        (BackendKind::Cpu, ..) | (BackendKind::Auto, None, _) | (BackendKind::Auto, _, Some(_)) => Ok(Site::Cpu),
        (_, Some(_), None) => Ok(Site::Gpu),
        (BackendKind::Cuda, Some(_), Some(why)) => Err(why.into()),
        (BackendKind::Cuda, None, _) => Err(LackError::Gpu { machine: machine.name.clone() }.into()),
    }
}

/// Why a GPU does not compute the model; `None` if it does.
pub fn refused_by_gpu(model: &Model, options: &Options) -> Option<BackendError> {
    CudaBackend::refuses(&dims_of(model, options))
}

pub(super) fn ram_budget(machine: &Machine) -> Option<u64> {
    let ram = &machine.ram;
    let available = ram.available.unwrap_or(ram.size / 16 * 15);
    let of_size = machine::Memory { total: Some(ram.size), available: Some(available), ..machine::Memory::default() };
    ram.budget.or_else(|| of_size.budget())
}

/// Bytes of the KV cache, up to the context alone.
fn kv_bytes(model: &Model, options: &Options) -> u64 {
    let dims = dims_of(model, options);
    let positions = |layer| dims.places(layer).min(dims.n_ctx.max(1)) as u64;
    let bytes = |layer| dims.kv_bytes_of(layer).iter().sum::<usize>() as u64;
    (0..dims.n_layers).map(|layer| positions(layer).saturating_mul(bytes(layer))).fold(0, u64::saturating_add)
}

fn workspace_bytes(model: &Model, machine: &Machine, options: &Options) -> u64 {
    let multiprocessors = machine.gpu.as_ref().map_or(0, |g| g.multiprocessors);
    CudaBackend::workspace_bytes_of(&dims_of(model, options), multiprocessors).saturating_add(model.held_bytes())
}

/// Bytes of RAM that processors take next to weights, KV cache included.
fn cpu_workspace_bytes(model: &Model, options: &Options) -> u64 {
    CpuBackend::workspace_bytes_of(&dims_of(model, options), options.threads).saturating_add(model.held_bytes())
}

/// Sizes alone: the rotary frequencies have the right number, and no factors of the file.
fn dims_of(model: &Model, options: &Options) -> Dims {
    dims(model, &Tape::new(model), options, &[])
}

/// Bytes of VRAM for weights, as a session finds them once its backend has its buffers.
fn vram_room(machine: &Machine, workspace: u64, limit: Option<u64>) -> u64 {
    let (vram, taken) = machine.gpu.as_ref().map_or((0, 0), |g| (g.vram, g.vram_taken));
    let used = workspace + DRIVER_BYTES;
    weights_room(limit, MemoryUse { used, free: vram.saturating_sub(taken + used) })
}

/// The home of each block: of its feed-forward part, or of its shared part where it has experts.
pub(super) fn blocks_of(units: &[UnitWork], homes: &[Home]) -> Vec<Home> {
    homes_of(units, homes, &[UnitPart::FeedForward, UnitPart::Shared])
}

/// Homes of the units that are one of `parts`.
fn homes_of(units: &[UnitWork], homes: &[Home], parts: &[UnitPart]) -> Vec<Home> {
    units.iter().zip(homes).filter(|(u, _)| parts.contains(&u.size.part)).map(|(_, h)| *h).collect()
}

impl Forecast {
    /// The largest context up to what the model was trained on with which everything still fits.
    pub fn ctx_max(model: &Model, machine: &Machine, options: &Options) -> Option<usize> {
        let requant = requantised(model, options).ok()?;
        let sizes = Sizes::new(model, requant.as_ref(), options.threads, &|_| DIRECT);
        let of = |n_ctx| Options { n_ctx, slices: Slices::Off, ..options.clone() };
        let fits = |n_ctx| planned(model, machine, &of(n_ctx), &sizes).is_ok();
        let (mut low, mut high) = (0, model.hparams.n_ctx_reach);
        if fits(high) {
            return Some(high);
        }
        while high - low > 1 {
            let mid = low + (high - low) / 2;
            if fits(mid) { low = mid } else { high = mid }
        }
        (low > 0).then_some(low)
    }
}

/// The number of buffers that [`Forecast::new`] chooses, if rates that were measured say so; `None` where
/// one that it needs is a guess or nothing streams.
pub fn choose_buffers(model: &Model, machine: &Machine, options: &Options) -> Option<usize> {
    let f = Forecast::new(model, machine, options, 1).ok()?;
    (f.by_measured_rates(machine) && f.n_buffers() > 0).then(|| f.n_buffers())
}

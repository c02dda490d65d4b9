//! Routed experts that all rest in the GPU's memory, or in RAM beside it: router, choice, experts and their sum, without a wait for the
//! host; and those of bulk rows that are brought, some at a time.
//!
//! A table in device memory has the addresses of each expert's matrices; kernels read it by the ids that the router left
//! there. Sums are made in the order of the kernels that compute one expert at a time, so a row's bits are the same
//! where experts are streamed.

use super::args::{BesideArgs, ExpertsArgs, GroupedArgs, RouterArgs, STORE, SortArgs, XBLK_BYTES};
use super::driver::device_error;
use super::modules::{Vectors, grid_bytes};
use super::product::{Engine, Form, Inputs, Prep, Rows, THIN_ROWS, Target, activation, any_index, form, plain_index};
use super::product::{quant_index, thin_bytes, unsupported};
use super::tiling::{Product, WARPS, tiling};
use super::workspace::{MoeBuffers, NO_SLOT, float_bytes, half_bytes, landing_slot, pitch, tiles_most};
use super::{CombineArgs, CudaBackend, RouteArgs, no_experts};
use crate::backend::{Activation, BackendError, Class, Expert, Norm, RouterParams, Routing, Share, SlotsAt, Weight};
use crate::gguf::TensorType;

type Result<T = ()> = std::result::Result<T, BackendError>;

/// Threads of the kernels of `moe.cu`, and rows and choices that they have room for.
const ROUTER_WARPS: usize = 4;
const DOWN_THREADS: u32 = 512;
const EACH_MAX: usize = 16;
const USED_MAX: usize = 32;
const EXPERTS_MAX: usize = 512;
/// Shared memory that `down_*` declares itself.
const CHOICES_BYTES: usize = (EACH_MAX + 3) * USED_MAX * 4;
/// Blocks of `gate_up_*` that a multiprocessor takes at once.
const GATE_UP_BLOCKS: usize = 3;
/// Most pairs of rows of one of its warps.
const GATE_UP_EACH: usize = 4;
/// Rows of a tile of `grouped_*`, and chunks of them that it keeps.
pub(super) const TILES: [(usize, usize); 3] = [(16, 3), (48, 2), (64, 3)];

/// How exact rows meet one matrix of an expert.
#[derive(Clone, Copy, Debug)]
struct Exact {
    row_warps: usize,
    piece: usize,
    /// Bytes of shared memory of a row; 0 where it is read from memory.
    row_room: usize,
}

/// What chose the experts of exact rows, and where their sum goes.
#[derive(Clone, Copy, Debug)]
struct Sum {
    /// A softmax over all scores, by each block for itself; else the choices lie in the workspace.
    softmax: Option<RouterParams>,
    /// Address of the rows.
    to: u64,
    how: SumHow,
    /// Where some of the experts rest in RAM.
    shared: Option<Launch>,
}

/// What becomes of the outputs of exact rows' experts. The numbers are those of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SumHow {
    /// Their sum is put there.
    Store = 0,
    /// Their sum is added to what lies there.
    Add = 1,
    /// Each has a row of its own, but for those of processors.
    Apart = 2,
}

/// A launch over experts of which some rest in RAM.
#[derive(Clone, Copy, Debug)]
struct Launch {
    share: Share,
    which: Which,
    /// Their slots, and the address of the words that say which is whose.
    slots: Option<(SlotsAt, u64)>,
}

/// Which of a row's experts that are not for processors a launch computes. The numbers are those of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    /// All: those in RAM are read where they are.
    All = 0,
    /// Those in device memory.
    Here = 1,
    /// Those in RAM, which have been brought to the landing or to their slots.
    Brought = 2,
    /// All, those in RAM from their slots, to which the last have been brought.
    Arrived = 3,
}

/// The experts of a block that rest: what they have in common. Their addresses are in the tables.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resting {
    /// What makes hidden states.
    how: Activation,
    /// Type of gate and up.
    up: TensorType,
    /// Type of down.
    down: TensorType,
    exact_up: Exact,
    exact_down: Exact,
}

/// The experts of a block of which some rest in RAM.
#[derive(Clone, Copy, Debug)]
pub(super) struct SharedExperts {
    resting: Resting,
    share: Share,
    /// Where experts in RAM are kept from row to row.
    pub(super) slots: Option<SlotsAt>,
}

impl SharedExperts {
    /// Whether processors have no part: then nothing waits for their answers, and the outputs are added up as they are made.
    pub fn alone(&self) -> bool {
        self.slots.is_some() && self.share == Share(0)
    }

    /// How many of a row's choices are the device's, where all rest in RAM.
    pub fn of_device(&self, choices: usize) -> usize {
        choices - self.share.of(choices)
    }
}

/// Tiles of rows of bulk rows' experts.
struct Tiles {
    /// Addresses of experts, and a list of tiles: the number of an expert among them, the first place in the lists of rows, and rows.
    table: u64,
    list: u64,
    most: usize,
    /// Which of [`TILES`] they are.
    size: usize,
}

/// Addresses of an expert: its matrices, then the bias of each or 0.
const TABLE: usize = 6;
/// In the first address of an expert: it lies in RAM, which processors read.
const IN_RAM: u64 = 1 << 63;

fn addresses_of(e: &Expert) -> [u64; TABLE] {
    let linears = [&e.gate, &e.up, &e.down];
    let (matrices, biases) = (linears.map(|l| l.weight.addr), linears.map(|l| l.bias.map_or(0, |b| b.addr)));
    [matrices[0], matrices[1], matrices[2], biases[0], biases[1], biases[2]]
}

/// Bytes of the addresses of a block's experts.
fn table_bytes(experts: usize) -> u64 {
    (experts * TABLE * 8) as u64
}

impl Engine {
    fn moe(&self) -> Result<&MoeBuffers> {
        self.ws.moe.as_ref().ok_or_else(no_experts)
    }

    /// The order of sums of the kernels for one expert; `None` if they have none for such a matrix.
    fn exact_order(&self, ty: TensorType, rows: &[usize], cols: usize, swiglu: bool) -> Option<Exact> {
        if quant_index(ty).is_none() {
            return Some(Exact { row_warps: 1, piece: 1, row_room: 0 });
        }
        let row_room = (ty.row_bytes(cols)? + 30) / 16 * 16 + 16;
        let (row_warps, piece) = match &self.kernels.vectors {
            Vectors::Warps(_) => (1, cols.div_ceil(1024)),
            Vectors::Bulk { .. } => {
                let product = Product { ty, cols, rows, swiglu, activations: cols / 32 * XBLK_BYTES };
                let info = &self.device.info;
                let t = tiling(&product, info.multiprocessors as usize, info.shared_bytes as usize)?;
                (t.row_warps, t.piece)
            }
        };
        Some(Exact { row_warps, piece, row_room })
    }
}

/// Shared memory of a block of `grouped_*`, by its place in [`TILES`].
pub(super) fn tile_bytes(ty: TensorType, size: usize) -> usize {
    let (rows, chunks) = TILES[size];
    thin_bytes(ty, rows * chunks)
}

/// Whether the kernels of `moe.cu` read this matrix of `rows` × `cols`.
fn readable(w: &Weight, (rows, cols): (usize, usize)) -> bool {
    let align = match quant_index(w.ty) {
        Some(_) if w.ty.block_bytes().is_multiple_of(16) => 4,
        Some(_) => 1,
        None => 16,
    };
    (w.rows, w.cols) == (rows, cols) && w.addr.is_multiple_of(align)
}

impl CudaBackend {
    /// What the experts have in common; `None` if the kernels of `moe.cu` do not compute such ones.
    fn resting_of(&self, list: &[Expert]) -> Option<Resting> {
        let (n, ff) = (self.dims.n_embd, self.dims.n_ff_expert);
        let first = list.first()?;
        let (up, down) = (first.up.weight.ty, first.down.weight.ty);
        let same = |e: &Expert| {
            let linears = [&e.gate, &e.up, &e.down];
            let mut biases = linears.iter().filter_map(|l| l.bias);
            e.how == first.how
                && biases.all(|b| b.ty == TensorType::F32 && b.addr.is_multiple_of(4))
                && (e.gate.weight.ty, e.up.weight.ty, e.down.weight.ty) == (up, up, down)
                && readable(&e.gate.weight, (ff, n))
                && readable(&e.up.weight, (ff, n))
                && readable(&e.down.weight, (n, ff))
        };
        let shared = self.engine.device.info.shared_bytes as usize;
        let fits = any_index(up).is_some()
            && any_index(down).is_some()
            && tile_bytes(up, 0) + grid_bytes(up) <= shared
            && tile_bytes(down, 0) + grid_bytes(down) <= shared
            && n.is_multiple_of(32)
            && ff.is_multiple_of(32);
        let chosen = self.dims.n_experts_used <= USED_MAX && self.dims.n_experts <= EXPERTS_MAX;
        if !fits || !chosen || !list.iter().all(same) {
            return None;
        }
        // Gate and up are one product whose halves meet, or two of one launch: `Engine::hidden_by`.
        let exact_up = match first.how {
            Activation::Silu => self.engine.exact_order(up, &[ff], n, true)?,
            _ => self.engine.exact_order(up, &[ff, ff], n, false)?,
        };
        let exact_down = self.engine.exact_order(down, &[n], ff, false)?;
        let resting = Resting { how: first.how, up, down, exact_up, exact_down };
        (self.up_bytes(&resting, 1) + grid_bytes(up) <= shared
            && self.down_bytes(&resting, 2) + CHOICES_BYTES + grid_bytes(down) <= shared)
            .then_some(resting)
    }

    /// Shared memory of a block of `gate_up_*` whose warps have `each` pairs of rows.
    fn up_bytes(&self, r: &Resting, each: usize) -> usize {
        match r.exact_up.row_room {
            0 => 0,
            room => WARPS * each * 2 * room + self.dims.n_embd / 32 * XBLK_BYTES,
        }
    }

    /// Shared memory of a block of `down_*` of `each` rows, beside [`CHOICES_BYTES`].
    fn down_bytes(&self, r: &Resting, each: usize) -> usize {
        match r.exact_down.row_room {
            0 => 0,
            room => self.dims.n_experts_used * (each * room + self.dims.n_ff_expert / 32 * XBLK_BYTES),
        }
    }

    pub(super) fn hold(&mut self, layer: usize, list: &[Expert]) -> Result<bool> {
        let experts = self.dims.n_experts;
        if layer >= self.dims.n_blocks || list.len() != experts {
            return Ok(false);
        }
        self.resting.resize(self.dims.n_blocks, None);
        self.resting[layer] = self.resting_of(list);
        if self.resting[layer].is_none() {
            return Ok(false);
        }
        self.write_table(layer, list, |_| false)?;
        Ok(true)
    }

    fn write_table(&self, layer: usize, list: &[Expert], in_ram: impl Fn(usize) -> bool) -> Result {
        let mut table = vec![[0u64; TABLE]; list.len()];
        for e in list {
            let row =
                table.get_mut(e.id as usize).ok_or_else(|| device_error(format!("there is no expert {}", e.id)))?;
            *row = addresses_of(e);
            if in_ram(e.id as usize) {
                row[0] |= IN_RAM;
            }
        }
        self.engine.device.bind()?;
        self.engine.moe()?.tables.write(layer as u64 * table_bytes(list.len()), table.as_flattened())
    }

    /// Launches a router: ids of its choices to `ids`, which kernels can write, their weights to the workspace; what experts
    /// read is left there normed.
    pub(super) fn choose_experts(&mut self, norm: &Norm, router: &Weight, params: &RouterParams, ids: u64) -> Result {
        self.begin_experts();
        self.score(norm, router, false)?;
        self.pick(params, ids)
    }

    /// What experts read is what their router's fused call leaves.
    fn begin_experts(&mut self) {
        self.waiting.begin_fused();
        self.waiting.on_input = false;
    }

    /// Experts and weights of all rows, by their scores.
    fn pick(&self, params: &RouterParams, ids: u64) -> Result {
        let moe = self.engine.moe()?;
        let args = RouteArgs {
            scores: moe.scores.addr(),
            ids,
            weights: moe.weights.addr(),
            tokens: self.tokens as i32,
            experts: self.dims.n_experts as i32,
            used: self.dims.n_experts_used as i32,
            normalize: i32::from(params.normalize),
            scale: params.scale,
        };
        let kernel = self.engine.kernels.route_topk;
        // SAFETY: RouteArgs is what route_topk declares; weights have room for the choices of all tokens, and so has the caller's
        // buffer of ids.
        unsafe { self.engine.launch(kernel, (self.tokens as u32, 1, 1), 32, 0, &args) }
    }

    /// Norms the pass's rows and scores the experts; with `halves` bulk rows are there as halves, too.
    fn score(&mut self, norm: &Norm, router: &Weight, halves: bool) -> Result {
        let exact = self.engine.class == Class::Exact;
        if exact && let Some(shared) = self.router_room(norm, router) {
            return self.router(norm, router, shared);
        }
        let quantised = form(router.ty, Class::Exact) != Form::Float;
        let ws = &self.engine.ws;
        let input = Inputs {
            f: ws.norm_f.addr(),
            q: if exact { ws.input_q.addr() } else { 0 },
            h: if !exact && (quantised || halves) { ws.halves.addr() } else { 0 },
            ..Inputs::default()
        };
        let (out, stride) = (self.engine.moe()?.scores.addr(), self.dims.n_experts);
        let target = Target { weight: *router, bias: 0, out, stride };
        self.norm(norm, input)?;
        if quantised {
            return self.engine.products(&[target], self.tokens, STORE, input, Rows::default());
        }
        self.engine.plain(&target, self.tokens, STORE, input.f, Rows::default())
    }

    /// Shared memory of `router_*`; `None` if it does not take such a router.
    fn router_room(&self, norm: &Norm, router: &Weight) -> Option<usize> {
        let n = self.dims.n_embd;
        plain_index(router.ty)?;
        let bytes = 8 * n + ROUTER_WARPS * router.ty.row_bytes(n)?;
        let aligned = n.is_multiple_of(32) && router.addr.is_multiple_of(16) && norm.weight.addr.is_multiple_of(16);
        (aligned && bytes + 1024 <= self.engine.device.info.shared_bytes as usize).then_some(bytes)
    }

    fn router(&self, norm: &Norm, router: &Weight, shared: usize) -> Result {
        let (ws, experts) = (&self.engine.ws, self.dims.n_experts);
        let kind = plain_index(router.ty).ok_or_else(|| unsupported(router.ty))?;
        let a = RouterArgs {
            x: self.x(),
            norm: norm.weight.addr,
            w: router.addr,
            f: ws.norm_f.addr(),
            q: ws.input_q.addr(),
            scores: self.engine.moe()?.scores.addr(),
            n: self.dims.n_embd as i32,
            experts: experts as i32,
            eps: norm.eps,
        };
        let f = self.engine.kernels.experts.router[kind];
        let grid = (experts.div_ceil(ROUTER_WARPS) as u32 + 1, self.tokens as u32, 1);
        // SAFETY: RouterArgs is what router_* declare; the workspace has room for up to EXACT_ROWS tokens, whose number
        // `begin` has checked.
        unsafe { self.engine.launch(f, grid, 32 * ROUTER_WARPS as u32, shared, &a) }
    }

    pub(super) fn mixture_at(&mut self, layer: usize, routing: &Routing) -> Result {
        let held = self.resting.get(layer).copied().flatten();
        let (resting, table) = self.held_at(layer, held)?;
        match (self.engine.class, routing) {
            (Class::Exact, Routing::Softmax { norm, router, params }) => {
                self.begin_experts();
                self.score(norm, router, false)?;
                let sum = Sum { softmax: Some(*params), to: self.x(), how: SumHow::Add, shared: None };
                self.exact(&resting, table, &sum)
            }
            (Class::Exact, Routing::By { sum: (to, add), .. }) => {
                self.choose_by(routing)?;
                self.waiting.written(*to);
                let (x, n) = self.act(*to);
                self.engine.ws.rooms.check("outputs of experts", x, float_bytes(self.tokens, n))?;
                let how = if *add { SumHow::Add } else { SumHow::Store };
                self.exact(&resting, table, &Sum { softmax: None, to: x, how, shared: None })
            }
            (Class::Bulk, _) => {
                match routing {
                    Routing::Softmax { norm, router, params } => {
                        self.begin_experts();
                        self.score(norm, router, true)?;
                        self.pick(params, self.engine.moe()?.ids.addr())?;
                    }
                    Routing::By { .. } => self.choose_by(routing)?,
                }
                self.grouped(&resting, table)?;
                self.sum(routing)
            }
        }
    }

    /// Computes experts of bulk rows that are at hand together, whose rows the host has listed ([`CudaBackend::group_by_expert`]): a
    /// row a choice. False where the kernels for that do not take them.
    pub(super) fn experts_together(&mut self, list: &[Expert]) -> Result<bool> {
        if self.engine.class != Class::Bulk || self.waiting.on_input || list.len() > self.dims.n_experts {
            return Ok(false);
        }
        let Some(r) = self.resting_of(list) else { return Ok(false) };
        if !self.grouped {
            self.group_by_expert()?;
        }
        let used = self.dims.n_experts_used;
        let size = self.tile_size(&r, self.tokens * used);
        let each = TILES[size].0;
        let first = self.few;
        let moe = self.engine.ws.moe.as_mut().ok_or_else(no_experts)?;
        let words = &mut moe.few_host.as_mut_slice()[first..];
        let (mut at, mut most, mut range) = (list.len() * TABLE * 2, 0, (usize::MAX, 0));
        for (i, e) in list.iter().enumerate() {
            let row = &mut words[i * TABLE * 2..][..TABLE * 2];
            for (to, address) in row.chunks_exact_mut(2).zip(addresses_of(e)) {
                to.copy_from_slice(&[address as u32, (address >> 32) as u32]);
            }
            let [start, end] = [0, 1].map(|next| self.expert_starts[e.id as usize + next] as usize);
            for from in (start..end).step_by(each) {
                words[at..at + 3].copy_from_slice(&[i as u32, from as u32, each.min(end - from) as u32]);
                (at, most) = (at + 3, most + 1);
            }
            if start < end {
                range = (range.0.min(start), range.1.max(end));
            }
        }
        if most == 0 {
            return Ok(true);
        }
        let host = moe.few_host.as_slice()[first..].as_ptr() as u64;
        let table = moe.few.addr() + 4 * first as u64;
        let at = at.next_multiple_of(4);
        self.few += at;
        self.engine.ws.rooms.check("experts at hand", table, 4 * at as u64)?;
        // SAFETY: both hold the words, as checked above; the host's are written again only after the next routing has waited for the
        // stream.
        unsafe { self.fetch_words(host, table, at)? };
        let tiles = Tiles { table, list: table + (list.len() * TABLE * 8) as u64, most, size };
        let e = &self.engine;
        let input = Inputs { h: e.ws.halves.addr(), ..Inputs::default() };
        e.prepare(Prep::Copy, e.ws.norm_f.addr(), 0, self.dims.n_embd, self.tokens, input)?;
        self.waiting.forget_forms();
        self.tiles(&r, &tiles, range)?;
        Ok(true)
    }

    /// The outputs of all choices, added up.
    pub(super) fn sum(&mut self, routing: &Routing) -> Result {
        match *routing {
            Routing::Softmax { .. } => self.combine(),
            Routing::By { sum: (to, add), .. } => {
                self.waiting.written(to);
                self.sum_experts(to, add)
            }
        }
    }

    /// The experts of a block that processors next to this device compute, too. Rows are exact ones.
    pub(super) fn hold_shared_at(
        &mut self,
        layer: usize,
        list: &[Expert],
        in_ram: &[bool],
        share: Share,
        slots: Option<SlotsAt>,
    ) -> Result<bool> {
        if layer >= self.dims.n_blocks || list.len() != self.dims.n_experts || in_ram.len() != list.len() {
            return Ok(false);
        }
        self.shared.resize(self.dims.n_blocks, None);
        self.shared[layer] = self.resting_of(list).map(|resting| SharedExperts { resting, share, slots });
        if self.shared[layer].is_none() {
            return Ok(false);
        }
        self.write_table(layer, list, |id| in_ram[id])?;
        self.take_slots_back(layer)?;
        Ok(true)
    }

    /// Says that no expert of a block has a slot.
    pub(super) fn take_slots_back(&self, layer: usize) -> Result {
        let n = self.dims.n_experts;
        self.engine.moe()?.slots.write((layer * n * 4) as u64, &vec![NO_SLOT; n])
    }

    /// Chooses experts; `give` is called behind it. Then those are computed that are not for processors, into a row a choice. With
    /// `landed`, those in RAM come to the landing, and what is called behind it waits for them.
    pub(super) fn mix_at(
        &mut self,
        layer: usize,
        routing: &Routing,
        give: impl FnOnce(&mut CudaBackend) -> Result,
        landed: Option<impl FnOnce(&mut CudaBackend) -> Result>,
    ) -> Result {
        let (of, table) = self.shared_at(layer)?;
        let SharedExperts { resting, share, slots } = of;
        match routing {
            Routing::Softmax { norm, router, params } => {
                self.begin_experts();
                self.score(norm, router, false)?;
                self.pick(params, self.engine.moe()?.ids.addr())?;
            }
            Routing::By { .. } => self.choose_by(routing)?,
        }
        give(self)?;
        let slots = slots.map(|s| Ok::<_, BackendError>((s, self.slots_of(layer)?))).transpose()?;
        if of.alone() {
            let (to, how) = self.sum_at(routing)?;
            let which = if landed.is_some() { Which::Arrived } else { Which::All };
            landed.map_or(Ok(()), |landed| landed(self))?;
            let shared = Some(Launch { share, which, slots });
            return self.exact(&resting, table, &Sum { softmax: None, to, how, shared });
        }
        let to = self.engine.moe()?.out.addr();
        let exact = |gpu: &CudaBackend, which| {
            let shared = Some(Launch { share, which, slots });
            gpu.exact(&resting, table, &Sum { softmax: None, to, how: SumHow::Apart, shared })
        };
        match landed {
            _ if share.0 >= Share::ALL.0 => exact(self, Which::Here),
            None => exact(self, Which::All),
            Some(landed) => {
                exact(self, Which::Here)?;
                landed(self)?;
                exact(self, Which::Brought)
            }
        }
    }

    /// The experts of a block that processors compute, too; the address of their table.
    pub(super) fn shared_at(&self, layer: usize) -> Result<(SharedExperts, u64)> {
        let shared = self.shared.get(layer).copied().flatten();
        let shared = shared.ok_or_else(|| device_error(format!("the experts of block {layer} are not shared")))?;
        Ok((shared, self.held_at(layer, Some(shared.resting))?.1))
    }

    /// The address of the slots of a block's experts.
    pub(super) fn slots_of(&self, layer: usize) -> Result<u64> {
        Ok(self.engine.moe()?.slots.addr() + (layer * self.dims.n_experts * 4) as u64)
    }

    /// The outputs of all choices added up, those of processors from `answers`, which host memory has.
    pub(super) fn sum_beside(&mut self, layer: usize, routing: &Routing, answers: u64) -> Result {
        let (of, table) = self.shared_at(layer)?;
        let (share, (x, how), n) = (of.share, self.sum_at(routing)?, self.dims.n_embd);
        let moe = self.engine.moe()?;
        let a = BesideArgs {
            table,
            ids: moe.ids.addr(),
            weights: moe.weights.addr(),
            out: moe.out.addr(),
            answers,
            x,
            used: self.dims.n_experts_used as i32,
            n: n as i32,
            share: share.0 as i32,
            add: i32::from(how == SumHow::Add),
        };
        let grid = (n.div_ceil(256) as u32, self.tokens as u32, 1);
        // SAFETY: BesideArgs is what combine_beside declares; there is a row of outputs and of answers for each choice, and room for the
        // sums as checked above. `resting_of` has checked that `n` is a multiple of 4 and that there are not too many choices.
        unsafe { self.engine.launch(self.engine.kernels.experts.beside, grid, 64, 0, &a) }
    }

    /// Where the outputs of a routing's experts are added up, which is about to be written.
    fn sum_at(&mut self, routing: &Routing) -> Result<(u64, SumHow)> {
        let (x, add) = match *routing {
            Routing::Softmax { .. } => (self.x(), true),
            Routing::By { sum: (to, add), .. } => {
                self.waiting.written(to);
                (self.act(to).0, add)
            }
        };
        self.engine.ws.rooms.check("outputs of experts", x, float_bytes(self.tokens, self.dims.n_embd))?;
        Ok((x, if add { SumHow::Add } else { SumHow::Store }))
    }

    /// Experts that are held, and the address of their table.
    fn held_at(&self, layer: usize, held: Option<Resting>) -> Result<(Resting, u64)> {
        let held = held.ok_or_else(|| device_error(format!("the experts of block {layer} are not held")))?;
        Ok((held, self.engine.moe()?.tables.addr() + layer as u64 * table_bytes(self.dims.n_experts)))
    }

    /// The arguments of the kernels of exact rows, for matrices that are met like this.
    fn exact_args(&self, r: &Resting, exact: &Exact, table: u64, sum: &Sum, each: usize) -> Result<ExpertsArgs> {
        let (ws, d, moe) = (&self.engine.ws, &self.dims, self.engine.moe()?);
        let chosen = |addr| if sum.softmax.is_none() { addr } else { 0 };
        let (how, limit) = activation(r.how);
        let (which, slots) = sum.shared.map_or((Which::All, None), |s| (s.which, s.slots));
        let (landing, slot) = match slots {
            Some((at, _)) => (at.addr, at.bytes),
            None => (if which == Which::Brought { moe.landing.addr() } else { 0 }, landing_slot(d)),
        };
        Ok(ExpertsArgs {
            table,
            scores: moe.scores.addr(),
            q: ws.input_q.addr(),
            f: ws.norm_f.addr(),
            hidden: ws.gate.addr(),
            x: sum.to,
            ids: chosen(moe.ids.addr()),
            weights: chosen(moe.weights.addr()),
            experts: d.n_experts as i32,
            used: d.n_experts_used as i32,
            n: d.n_embd as i32,
            ff: d.n_ff_expert as i32,
            row_warps: exact.row_warps as i32,
            piece: exact.piece as i32,
            each: each as i32,
            row_room: exact.row_room as i32,
            normalize: i32::from(sum.softmax.is_some_and(|p| p.normalize)),
            scale: sum.softmax.map_or(1.0, |p| p.scale),
            how,
            limit,
            add: sum.how as i32,
            share: sum.shared.map_or(-1, |s| s.share.0 as i32),
            landing,
            slot,
            which: which as i32,
            kept: if slots.is_some() { moe.kept.addr() } else { 0 },
            slots: slots.map_or(0, |(_, slots)| slots),
        })
    }

    fn exact(&self, r: &Resting, table: u64, sum: &Sum) -> Result {
        let (e, n, ff) = (&self.engine, self.dims.n_embd, self.dims.n_ff_expert);
        let (pairs, sms) = (self.tokens * self.dims.n_experts_used, e.device.info.multiprocessors as usize);
        let shared = e.device.info.shared_bytes as usize;
        let kind = |ty| any_index(ty).ok_or_else(|| unsupported(ty));
        e.ws.rooms.check("hidden state of experts", e.ws.gate.addr(), float_bytes(pairs, ff))?;
        // All blocks at once, where that can be.
        let blocks = |each: usize| ff.div_ceil(WARPS * each) * pairs;
        let fits = |each: &usize| self.up_bytes(r, *each) + grid_bytes(r.up) <= shared / GATE_UP_BLOCKS;
        let each = (1..=GATE_UP_EACH).take_while(fits).find(|each| blocks(*each) <= GATE_UP_BLOCKS * sms).unwrap_or(1);
        let f = e.kernels.experts.gate_up[kind(r.up)?];
        let grid = (ff.div_ceil(WARPS * each) as u32, pairs as u32, 1);
        let a = self.exact_args(r, &r.exact_up, table, sum, each)?;
        // SAFETY: ExpertsArgs is what gate_up_* declare; the table has all experts that the scores are of, `hold` has
        // checked shapes and alignment, and there is room for the results as checked above.
        unsafe { e.launch(f, grid, 32 * WARPS as u32, self.up_bytes(r, each), &a)? };
        let wanted = (n * self.tokens).div_ceil(sms).next_multiple_of(2).clamp(2, EACH_MAX);
        let fits = |each: &usize| self.down_bytes(r, *each) + CHOICES_BYTES + grid_bytes(r.down) <= shared;
        let each = (2..=wanted).rev().step_by(2).find(fits).unwrap_or(2);
        let f = e.kernels.experts.down[kind(r.down)?];
        let grid = (n.div_ceil(each) as u32, self.tokens as u32, 1);
        let a = self.exact_args(r, &r.exact_down, table, sum, each)?;
        // SAFETY: as above; there is a row of results for each token. The scores or choices, which the kernel reads before its
        // predecessor has ended, were written by a kernel that the predecessor waited for before it let this one in.
        unsafe { e.launch(f, grid, DOWN_THREADS, self.down_bytes(r, each), &a) }
    }

    /// Which of [`TILES`] holds most experts' rows, if they are about as many as the average: what a tile has is turned to halves for
    /// that tile alone.
    fn tile_size(&self, r: &Resting, pairs: usize) -> usize {
        let shared = self.engine.device.info.shared_bytes as usize;
        let rows = pairs.div_ceil(self.dims.n_experts);
        let wanted = TILES.iter().position(|(each, _)| rows * 4 <= each * 3).unwrap_or(TILES.len() - 1);
        let bytes = |ty, size| tile_bytes(ty, size) + grid_bytes(ty);
        let fits = |size: &usize| bytes(r.up, *size).max(bytes(r.down, *size)) <= shared;
        (0..=wanted).rev().find(fits).unwrap_or(0)
    }

    /// The outputs of the experts of bulk rows, a row a choice.
    fn grouped(&self, r: &Resting, table: u64) -> Result {
        let (e, moe) = (&self.engine, self.engine.moe()?);
        let (experts, used) = (self.dims.n_experts, self.dims.n_experts_used);
        let pairs = self.tokens * used;
        let size = self.tile_size(r, pairs);
        let each = TILES[size].0;
        let most = tiles_most(pairs, experts, each);
        let sort = SortArgs {
            ids: moe.ids.addr(),
            lists: moe.lists.addr(),
            tiles: moe.tiles.addr(),
            pairs: pairs as i32,
            used: used as i32,
            experts: experts as i32,
            each: each as i32,
            most: most as i32,
        };
        e.ws.rooms.check("tiles of experts", moe.tiles.addr(), float_bytes(most, 3))?;
        // SAFETY: SortArgs is what sort_rows declares; the lists have room for all choices, the tiles as checked.
        unsafe { e.launch(e.kernels.experts.sort, (1, 1, 1), 1024, 12 * experts, &sort)? };
        self.tiles(r, &Tiles { table, list: moe.tiles.addr(), most, size }, (0, pairs))
    }

    /// The outputs of the experts of some tiles, whose rows lie at these places of the lists; what lies between them of others' is
    /// prepared in vain. Rows are in the workspace as halves.
    fn tiles(&self, r: &Resting, tiles: &Tiles, (from, end): (usize, usize)) -> Result {
        let (e, ws, moe) = (&self.engine, &self.engine.ws, self.engine.moe()?);
        let (n, ff) = (self.dims.n_embd, self.dims.n_ff_expert);
        let pairs = self.tokens * self.dims.n_experts_used;
        let [gate, up] = [ws.gate.addr(), ws.up.addr()];
        for out in [gate, up] {
            ws.rooms.check("hidden state of experts", out, float_bytes(pairs, ff))?;
        }
        let args = |rows: usize, cols: usize| GroupedArgs {
            table: tiles.table,
            tiles: tiles.list,
            x: ws.halves.addr(),
            scale: ws.halves_scale.addr(),
            rows: rows as i32,
            cols: cols as i32,
            pitch: pitch(cols) as i32,
            stride: rows as i32,
            ..GroupedArgs::default()
        };
        let launch = |ty, matrices: u32, a: &GroupedArgs| -> Result {
            let kind = any_index(ty).ok_or_else(|| unsupported(ty))?;
            let grid = (tiles.most as u32, (a.rows as usize).div_ceil(THIN_ROWS) as u32, matrices);
            // SAFETY: GroupedArgs is what grouped_* declare; tiles name rows and experts that there are, `resting_of` has
            // checked shapes and alignment, and results have room: gate and up as checked, those of down a row a choice.
            unsafe { e.launch(e.kernels.experts.grouped[kind][tiles.size], grid, 512, tile_bytes(ty, tiles.size), a) }
        };
        launch(r.up, 2, &GroupedArgs { from: moe.lists.addr(), out: [gate, up], ..args(ff, n) })?;
        let row = |base: u64| base + float_bytes(from, ff);
        let prep = match r.how {
            Activation::Silu => Prep::Swiglu(row(up)),
            how => Prep::Activate(how, row(up)),
        };
        let hidden = Inputs { h: ws.halves.addr() + half_bytes(from, ff), h_row0: from, ..Inputs::default() };
        e.prepare(prep, row(gate), 0, ff, end - from, hidden)?;
        let to = moe.lists.addr() + 4 * pairs as u64;
        launch(r.down, 1, &GroupedArgs { to, out: [moe.out.addr(), 0], first: 2, ..args(n, ff) })
    }

    /// `X += Σ weight · out` over the choices of each token, in their order.
    pub(super) fn combine(&self) -> Result {
        let moe = self.engine.moe()?;
        let n = self.dims.n_embd;
        let a = CombineArgs {
            x: self.x(),
            out: moe.out.addr(),
            weights: moe.weights.addr(),
            tokens: self.tokens as i32,
            used: self.dims.n_experts_used as i32,
            n: n as i32,
        };
        let f = self.engine.kernels.combine;
        let blocks = (self.tokens * n).div_ceil(256) as u32;
        // SAFETY: CombineArgs is what combine declares.
        unsafe { self.engine.launch(f, (blocks, 1, 1), 256, 0, &a) }
    }
}

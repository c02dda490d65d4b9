//! A device and processors in one pass: the device computes what rests in its memory or is brought there, processors
//! what rests in RAM, where it lies.
//!
//! The device's operations are called ahead. Where a part of the pass is for processors, the device is to hand its rows
//! over and to wait for them in the order of its operations; the part itself is put off until the next one is called, or
//! until something waits for the device. So the device has work queued behind each part, and no thread is needed that
//! would do nothing but wait.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cpu::CpuBackend;
use super::reuse::Reuse;
use super::slots::{Given, Slots, SlotsAt};
use super::{
    Backend, BackendError, Class, DeviceMemory, Dims, Expert, Layers, Linear, Norm, Op, RouterParams, Routing, Run,
    Share, Weight,
};
use crate::gguf::TensorType;
use crate::state::{PageId, StateOp};

/// Most operations that are called behind a part that is put off: a device's queue has an end, behind which calls would
/// wait for an answer that comes after them.
const AHEAD_MAX: usize = 64;

/// Places in host memory through which rows go: one part is computed while the next is handed over.
pub const PLACES: usize = 2;

/// An expert in RAM that is brought to a device.
#[derive(Clone, Copy, Debug)]
pub struct Brought {
    /// As processors read it.
    pub expert: Expert,
    /// The slot that it is to stay in; none where it is there for one use.
    pub given: Option<Given>,
}

/// A device that hands rows to the host and takes them back in the order of its operations. Rows are of class
/// [`Class::Exact`]. None but [`Hands::given`] waits.
pub trait Hands: Backend {
    /// Whether operations may be called behind [`Hands::take`] before there is an answer.
    fn works_ahead(&self) -> bool;

    /// X of the rows at hand goes to `place`.
    fn give(&mut self, place: usize) -> Result<(), BackendError>;

    /// [`Backend::route`], with what the experts read at `place` as by [`Hands::give_routed`].
    fn route_and_give(
        &mut self,
        norm: &Norm,
        router: &Weight,
        params: &RouterParams,
        place: usize,
    ) -> Result<&[u32], BackendError>;

    /// What the experts of the last routing read goes to `place`: `T` × `n_embd`.
    fn give_routed(&mut self, place: usize) -> Result<(), BackendError>;

    /// Waits for what was given last at `place`, and returns it.
    fn given(&mut self, place: usize) -> Result<&[f32], BackendError>;

    /// X of the rows at hand becomes the answer at `place`, for which operations called from here on wait.
    fn take(&mut self, place: usize) -> Result<(), BackendError>;

    /// What is kept for [`Backend::add_slice`] is the answer at `place`, and is added: operations called from here on wait for it.
    fn take_slice(&mut self, place: usize) -> Result<(), BackendError>;

    /// The outputs of experts of these (row, choice) pairs become those of the answer at `place`, which has a row of `n_embd`
    /// for every pair of the routing; operations called from here on wait for it.
    fn take_experts(&mut self, place: usize, pairs: &[u32]) -> Result<(), BackendError>;

    /// Keeps where the experts of block `layer` lie, in RAM those of `in_ram`, of which `share` is for processors and others may be in
    /// `slots`, which are empty. Returns whether [`Hands::mix`] may be called for the block.
    fn hold_shared(
        &mut self,
        _layer: usize,
        _list: &[Expert],
        _in_ram: &[bool],
        _share: Share,
        _slots: Option<SlotsAt>,
    ) -> Result<bool, BackendError> {
        Ok(false)
    }

    /// Chooses experts, gives what they read and the choices to `place`, and computes those that are the device's.
    fn mix(&mut self, layer: usize, routing: &Routing, place: usize) -> Result<(), BackendError>;

    /// Waits for what [`Hands::mix`] gave last at `place`, and returns it: rows, and the choices of each.
    fn given_routed(&mut self, place: usize) -> Result<(&[f32], &[u32]), BackendError>;

    /// Brings the experts in RAM that a single row has chosen, that are not for processors and that have no slot to the device, in the
    /// order of choices. Called for every [`Hands::mix`] of one row once its choices are known. What is in a slot afterwards is read
    /// there by each [`Hands::mix`] that is called later.
    fn fetch(&mut self, _place: usize, _layer: usize, _list: &[Brought]) -> Result<(), BackendError> {
        Ok(())
    }

    /// Takes all slots of a block's experts back, while nothing that was called is on its way.
    fn empty_slots_of(&mut self, _layer: usize) -> Result<(), BackendError> {
        Ok(())
    }

    /// Adds the outputs of all experts of block `layer` up, the processors' from the answer at `place`, for which operations called
    /// from here on wait.
    fn end_mix(&mut self, layer: usize, place: usize, routing: &Routing) -> Result<(), BackendError>;

    /// Whether what is called now is recorded, and none of it runs before [`Backend::end_stretch`].
    fn records(&self) -> bool {
        false
    }

    /// What a recording gives to `place` is about to be waited for: it was given once more, as [`Hands::give`] and [`Hands::mix`] did
    /// when they were recorded.
    fn give_again(&mut self, _place: usize) {}

    /// Answers [`Hands::mix`] with the outputs of these (row, choice) pairs; `rows` has a row for every pair.
    fn answer_experts(&mut self, place: usize, pairs: &[u32], rows: &[f32]);

    /// Answers at `place`: as many floats as will be taken.
    fn answer(&mut self, place: usize, rows: &[f32]);

    /// Whatever waits for an answer goes on with what is there, since the pass has failed.
    fn answer_all(&mut self);
}

/// An operation with a feed-forward part in RAM.
#[derive(Clone, Copy)]
enum Call {
    FeedForward { norm: Norm, gate: Linear, up: Linear, down: Linear },
    Slice { norm: Norm, gate: Linear, up: Linear, down: Linear },
    Op(Op<Weight>),
}

/// A part for processors.
#[derive(Default)]
struct Part {
    place: usize,
    /// The unit of its calls.
    unit: usize,
    calls: Vec<Call>,
    experts: Vec<Expert>,
    /// The units of its experts.
    units: Vec<usize>,
    /// What each row has chosen, where there are experts.
    ids: Vec<u32>,
    /// Rows of experts have come, and so many of the experts are computed.
    begun: bool,
    done: usize,
    answered: bool,
    /// The block whose experts both sites compute.
    layer: Option<usize>,
}

impl Part {
    fn clear(&mut self) {
        self.layer = None;
        self.calls.clear();
        self.experts.clear();
        self.units.clear();
        self.ids.clear();
        (self.begun, self.done) = (false, 0);
        self.answered = false;
    }
}

/// A part that is computed each time a recorded pass is repeated.
enum Repeated {
    Calls { place: usize, unit: usize, calls: Vec<Call> },
    Shared { place: usize, layer: usize },
}

/// How processors next to a device spent their time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beside {
    /// Computing.
    pub computed: Duration,
    /// Waiting for rows of the device.
    pub waited: Duration,
    /// Parts that were computed.
    pub parts: u64,
    /// Choices in RAM for a device that keeps some in slots.
    pub slot_uses: u64,
    /// Those of them that were there.
    pub slot_hits: u64,
}

/// A unit that processors computed, and when.
#[derive(Clone, Copy, Debug)]
pub struct Worked {
    /// The unit.
    pub unit: usize,
    /// When they began, its rows being there.
    pub from: Instant,
    /// When its rows were done.
    pub to: Instant,
}

/// The experts of a block that both sites compute.
struct SharedExperts {
    /// The unit of the first.
    first: usize,
    /// Those in RAM, as processors read them.
    in_ram: Vec<Option<Expert>>,
    /// Which of them the device has, and where.
    slots: Option<(Slots, SlotsAt)>,
}

/// Keeps that these units were computed as one job, which has ended: each is shown with an equal part of its time.
fn add_worked(worked: &mut Vec<Worked>, units: impl ExactSizeIterator<Item = usize>, from: Instant) {
    let room = worked.capacity() - worked.len();
    if room > 0 {
        let each = from.elapsed() / units.len().max(1) as u32;
        let of = |(i, unit): (u32, usize)| Worked { unit, from: from + each * i, to: from + each * (i + 1) };
        worked.extend((0u32..).zip(units).map(of).take(room));
    }
}

/// Where an expert's matrices begin in RAM, on a line: what a copy of it begins with.
pub fn low_of(e: &Expert) -> u64 {
    let [gate, up, down] = [&e.gate, &e.up, &e.down].map(|l| l.weight.addr());
    gate.min(up).min(down) & !127
}

/// The backend. Fields are dropped in this order.
pub struct Both {
    device: Box<dyn Hands>,
    cpu: CpuBackend,
    /// The part that was put off.
    late: Option<Part>,
    /// The one that is being called.
    open: Option<Part>,
    /// A slice that ended: the device takes its answer behind its own ([`Backend::add_slice`]).
    slice: Option<Part>,
    /// Not in use, kept for their lists.
    spare: Vec<Part>,
    turn: usize,
    /// Whether experts in RAM are expected of the next routing.
    expects: bool,
    /// Operations that were called behind the part that was put off.
    ahead: usize,
    /// The device records what is called; what it has recorded has these parts, in this order.
    records: bool,
    recorded: Vec<Arc<Repeated>>,
    /// Choices of the rows at hand.
    chosen: Vec<u32>,
    /// Which (row, choice) pairs are the host's.
    pairs: Vec<u32>,
    /// By block.
    shared: Vec<Option<SharedExperts>>,
    /// What slots hold is not known: experts could not be brought.
    slots_lost: bool,
    share: Share,
    /// Choices of a row, and experts that processors compute for a part.
    used: usize,
    of_host: Vec<Expert>,
    brought: Vec<Brought>,
    beside: Beside,
    /// What was computed when; of no capacity where nobody asks.
    worked: Vec<Worked>,
    reuse: Reuse,
    name: &'static str,
}

impl Both {
    /// `device` with `threads` processors for models with these sizes.
    ///
    /// # Errors
    /// If memory or threads cannot be had.
    pub fn new(device: Box<dyn Hands>, dims: &Dims, threads: usize) -> Result<Both, BackendError> {
        let cpu = CpuBackend::for_parts(dims, threads)?;
        let spare = (0..PLACES + 2).map(|_| Part::default()).collect();
        let choices = dims.n_experts_used * dims.max_batch;
        Ok(Both {
            name: device.name(),
            device,
            cpu,
            late: None,
            open: None,
            slice: None,
            spare,
            turn: 0,
            expects: false,
            ahead: 0,
            records: false,
            recorded: Vec::new(),
            chosen: Vec::with_capacity(choices),
            pairs: Vec::with_capacity(choices),
            shared: Vec::new(),
            slots_lost: false,
            share: Share(0),
            used: dims.n_experts_used,
            of_host: Vec::with_capacity(dims.n_experts),
            brought: Vec::with_capacity(dims.n_experts_used),
            beside: Beside::default(),
            worked: Vec::new(),
            reuse: Reuse::default(),
        })
    }

    fn new_part(&mut self) -> Part {
        let mut part = self.spare.pop().unwrap_or_default();
        part.place = self.turn;
        self.turn = (self.turn + 1) % PLACES;
        part
    }

    /// Computes a part and hands it back.
    fn compute(&mut self, part: &mut Part) -> Result<(), BackendError> {
        if let Some(layer) = part.layer {
            return self.compute_shared(layer, part.place);
        }
        if !part.experts.is_empty() {
            self.compute_experts(part)?;
            self.device.answer(part.place, self.cpu.expert_rows());
            return Ok(());
        }
        self.compute_calls(part.place, part.unit, &part.calls)
    }

    /// Computes the feed-forward part of `unit`.
    fn compute_calls(&mut self, place: usize, unit: usize, calls: &[Call]) -> Result<(), BackendError> {
        let began = Instant::now();
        let rows = self.device.given(place)?;
        let given = Instant::now();
        self.beside.waited += given - began;
        self.beside.parts += 1;
        self.cpu.begin_part(rows);
        for call in calls {
            match call {
                Call::FeedForward { norm, gate, up, down } => self.cpu.ffn(norm, gate, up, down)?,
                Call::Slice { norm, gate, up, down } => self.cpu.slice(norm, gate, up, down)?,
                Call::Op(op) => self.cpu.op(op)?,
            }
        }
        match calls {
            [Call::Slice { .. }] => self.device.answer(place, self.cpu.slice_here()),
            _ => self.device.answer(place, self.cpu.part()),
        }
        self.beside.computed += given.elapsed();
        add_worked(&mut self.worked, std::iter::once(unit), given);
        Ok(())
    }

    /// Computes the parts of the recording that now runs.
    fn compute_recorded(&mut self) -> Result<(), BackendError> {
        for i in 0..self.recorded.len() {
            let part = Arc::clone(&self.recorded[i]);
            let (Repeated::Calls { place, .. } | Repeated::Shared { place, .. }) = *part;
            self.device.give_again(place);
            let computed = match *part {
                Repeated::Calls { unit, ref calls, .. } => self.compute_calls(place, unit, calls),
                Repeated::Shared { layer, .. } => self.compute_shared(layer, place),
            };
            if computed.is_err() {
                self.device.answer_all();
                return computed;
            }
        }
        Ok(())
    }

    /// Keeps a part of the recording.
    fn record(&mut self, mut part: Part) {
        let place = part.place;
        let repeated = match part.layer {
            Some(layer) => Repeated::Shared { place, layer },
            None => Repeated::Calls { place, unit: part.unit, calls: part.calls.clone() },
        };
        self.recorded.push(Arc::new(repeated));
        part.clear();
        self.spare.push(part);
    }

    /// Computes the experts of a block that are the processors'.
    fn compute_shared(&mut self, layer: usize, place: usize) -> Result<(), BackendError> {
        let began = Instant::now();
        let (_, ids) = self.device.given_routed(place)?;
        let given = Instant::now();
        self.beside.waited += given - began;
        let Some(Some(SharedExperts { first, in_ram: experts, slots })) = self.shared.get_mut(layer) else {
            let what = format!("the experts of block {layer} are not shared");
            return Err(BackendError::Pass { backend: self.name, what });
        };
        if self.slots_lost {
            let what = "experts could not be brought to the device in an earlier pass".into();
            return Err(BackendError::Pass { backend: self.name, what });
        }
        let first = *first;
        self.pairs.clear();
        self.of_host.clear();
        self.brought.clear();
        let alone = ids.len() <= self.used;
        self.chosen.clear();
        self.chosen.extend_from_slice(ids);
        for (row, chosen) in ids.chunks(self.used.max(1)).enumerate() {
            let in_ram = || (0..).zip(chosen).filter_map(|(j, id)| Some((j, *experts.get(*id as usize)?.as_ref()?)));
            let n = in_ram().count();
            let of_device = n - self.share.of(n);
            if let Some((slots, _)) = slots.as_mut().filter(|_| of_device > 0) {
                self.beside.slot_uses += of_device as u64;
                self.beside.slot_hits += slots.chosen(in_ram().take(of_device).map(|(_, e)| e.id)) as u64;
            }
            for (_, expert) in in_ram().take(of_device).filter(|_| alone) {
                match slots {
                    Some((slots, _)) if slots.has(expert.id) => {}
                    Some((slots, _)) => self.brought.push(Brought { expert, given: slots.give(expert.id) }),
                    None => self.brought.push(Brought { expert, given: None }),
                }
            }
            for (j, expert) in in_ram().skip(of_device) {
                self.pairs.push((row * self.used) as u32 + j);
                if !self.of_host.iter().any(|e| e.id == expert.id) {
                    self.of_host.push(expert);
                }
            }
        }
        if alone {
            let fetched = self.device.fetch(place, layer, &self.brought);
            self.slots_lost = fetched.is_err();
            fetched?;
        }
        if !self.pairs.is_empty() {
            let (rows, ids) = self.device.given_routed(place)?;
            self.cpu.begin_experts(rows, ids);
            let began = Instant::now();
            self.cpu.experts(&self.of_host)?;
            self.beside.parts += 1;
            add_worked(&mut self.worked, self.of_host.iter().map(|e| first + e.id as usize), began);
        }
        self.device.answer_experts(place, &self.pairs, self.cpu.expert_rows());
        if alone {
            self.reuse.chosen(layer, &self.chosen);
        }
        self.beside.computed += given.elapsed();
        Ok(())
    }

    /// Computes those experts of a part that are not.
    fn compute_experts(&mut self, part: &mut Part) -> Result<(), BackendError> {
        if !part.begun {
            let began = Instant::now();
            let rows = self.device.given(part.place)?;
            self.beside.waited += began.elapsed();
            self.beside.parts += 1;
            self.cpu.begin_experts(rows, &part.ids);
            part.begun = true;
        }
        let began = Instant::now();
        self.cpu.experts(&part.experts[part.done..])?;
        self.beside.computed += began.elapsed();
        add_worked(&mut self.worked, part.units[part.done..].iter().copied(), began);
        part.done = part.experts.len();
        Ok(())
    }

    /// Computes the part that was put off.
    fn catch_up(&mut self) -> Result<(), BackendError> {
        let Some(mut part) = self.late.take() else { return Ok(()) };
        let computed = if part.answered { Ok(()) } else { self.compute(&mut part) };
        part.clear();
        self.spare.push(part);
        if computed.is_err() {
            self.device.answer_all();
        }
        computed
    }

    /// Computes what is known of the part that is being called: experts.
    fn catch_up_with_experts(&mut self) -> Result<(), BackendError> {
        let Some(mut part) = self.open.take_if(|part| !part.experts.is_empty() && !part.answered) else {
            return Ok(());
        };
        part.answered = true;
        let computed = self.compute(&mut part);
        self.open = Some(part);
        computed
    }

    /// Puts a part off whose answer the device takes by `take`; the one before is computed.
    fn put_off(
        &mut self,
        part: Part,
        take: impl FnOnce(&mut dyn Hands, &Part) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        if self.records {
            take(self.device.as_mut(), &part)?;
            self.record(part);
            return Ok(());
        }
        if self.device.works_ahead() {
            take(self.device.as_mut(), &part)?;
            self.catch_up()?;
            (self.late, self.ahead) = (Some(part), 0);
            return Ok(());
        }
        let place = part.place;
        self.late = Some(part);
        self.catch_up()?;
        take(self.device.as_mut(), &Part { place, ..Part::default() })
    }

    /// The outputs of experts in RAM go to the device.
    fn end_experts(&mut self) -> Result<(), BackendError> {
        let Some(mut part) = self.open.take() else { return Ok(()) };
        if part.experts.is_empty() {
            // None of those in RAM was chosen.
            part.clear();
            self.spare.push(part);
            return Ok(());
        }
        let of_host = |id: &u32| part.experts.iter().any(|e| e.id == *id);
        self.pairs.clear();
        self.pairs.extend((0u32..).zip(&part.ids).filter(|(_, id)| of_host(id)).map(|(pair, _)| pair));
        let pairs = std::mem::take(&mut self.pairs);
        let put_off = self.put_off(part, |device, part| device.take_experts(part.place, &pairs));
        self.pairs = pairs;
        put_off
    }

    /// Forgets what was put off, of a pass that has failed.
    fn forget(&mut self) {
        (self.expects, self.records) = (false, false);
        // Also where a part was lost on its way, by a panic.
        self.device.answer_all();
        let left = [self.late.take(), self.open.take(), self.slice.take()];
        self.spare.extend(left.into_iter().flatten().map(|mut part| {
            part.clear();
            part
        }));
    }

    /// The device, for one more operation.
    fn next(&mut self) -> Result<&mut dyn Hands, BackendError> {
        self.ahead += 1;
        if self.ahead > AHEAD_MAX {
            self.ahead = 0;
            self.catch_up()?;
        }
        Ok(self.device.as_mut())
    }

    /// The part that operations belong to, if they are for processors.
    fn in_part(&mut self, call: Call) -> bool {
        match &mut self.open {
            Some(part) if part.ids.is_empty() => {
                part.calls.push(call);
                true
            }
            _ => false,
        }
    }
}

impl Drop for Both {
    fn drop(&mut self) {
        // The device's work must end before its memory is given back.
        self.forget();
    }
}

impl Backend for Both {
    fn name(&self) -> &'static str {
        self.name
    }

    fn supports(&self, ty: TensorType) -> bool {
        self.device.supports(ty)
    }

    fn device(&self) -> Option<Arc<dyn DeviceMemory>> {
        self.device.device()
    }

    fn computes_in_ram(&self) -> Option<usize> {
        Some(self.cpu.threads())
    }

    fn beside(&self) -> Beside {
        self.beside
    }

    fn trace_work(&mut self, capacity: usize) {
        self.worked = Vec::with_capacity(capacity);
    }

    fn worked(&mut self, each: &mut dyn FnMut(Worked)) {
        self.worked.drain(..).for_each(each);
    }

    fn begin_part(&mut self, unit: usize) -> Result<(), BackendError> {
        let mut part = self.new_part();
        part.unit = unit;
        self.device.give(part.place)?;
        self.open = Some(part);
        Ok(())
    }

    fn expect_experts_in_ram(&mut self) {
        self.expects = true;
    }

    fn end_part(&mut self) -> Result<(), BackendError> {
        match self.open.take() {
            Some(part) if matches!(part.calls[..], [Call::Slice { .. }]) => {
                self.slice = Some(part);
                Ok(())
            }
            Some(part) => self.put_off(part, |device, part| device.take(part.place)),
            None => Ok(()),
        }
    }

    fn catch_up(&mut self) -> Result<(), BackendError> {
        Both::catch_up(self)?;
        self.catch_up_with_experts()
    }

    fn abandon(&mut self) {
        self.forget();
    }

    fn lost(&self) -> Option<BackendError> {
        self.device.lost()
    }

    fn begin(&mut self, runs: &[Run<'_>]) -> Result<(), BackendError> {
        Both::catch_up(self)?;
        self.device.begin(runs)
    }

    fn runs_max(&self) -> usize {
        self.device.runs_max()
    }

    fn turn_to(&mut self, class: Class) {
        self.device.turn_to(class);
    }

    fn begin_stretch(&mut self) -> Result<bool, BackendError> {
        if !self.device.works_ahead() {
            // Whoever launches a recording would wait for its end.
            return Ok(false);
        }
        if self.device.begin_stretch()? {
            return self.compute_recorded().map(|()| true);
        }
        self.records = self.device.records();
        self.recorded.clear();
        Ok(false)
    }

    fn end_stretch(&mut self, complete: bool) -> Result<bool, BackendError> {
        if !std::mem::take(&mut self.records) {
            // Nothing was recorded: what was called has run, all but the part that was put off.
            return if complete { self.catch_up().map(|()| true) } else { Ok(true) };
        }
        let runs = self.device.end_stretch(complete)?;
        if runs {
            self.compute_recorded()?;
        }
        Ok(runs)
    }

    fn embed(&mut self, rows: &[u8], ty: TensorType) -> Result<(), BackendError> {
        self.device.embed(rows, ty)
    }

    fn embed_per_block(&mut self, rows: &[u8], ty: TensorType) -> Result<(), BackendError> {
        self.device.embed_per_block(rows, ty)
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
        self.next()?.qkv(layer, norm, q, k, v, q_norm, k_norm)
    }

    fn attend(&mut self, layer: usize) -> Result<(), BackendError> {
        self.next()?.attend(layer)
    }

    fn keep(&mut self, rows: &[usize]) -> Result<(), BackendError> {
        self.next()?.keep(rows)
    }

    fn attn_output(&mut self, w: &Linear) -> Result<(), BackendError> {
        self.next()?.attn_output(w)
    }

    fn ffn(&mut self, norm: &Norm, gate: &Linear, up: &Linear, down: &Linear) -> Result<(), BackendError> {
        if self.in_part(Call::FeedForward { norm: *norm, gate: *gate, up: *up, down: *down }) {
            return Ok(());
        }
        self.next()?.ffn(norm, gate, up, down)
    }

    fn slice(&mut self, norm: &Norm, gate: &Linear, up: &Linear, down: &Linear) -> Result<(), BackendError> {
        if self.in_part(Call::Slice { norm: *norm, gate: *gate, up: *up, down: *down }) {
            return Ok(());
        }
        self.next()?.slice(norm, gate, up, down)
    }

    fn add_slice(&mut self) -> Result<(), BackendError> {
        match self.slice.take() {
            Some(part) => self.put_off(part, |device, part| device.take_slice(part.place)),
            None => self.next()?.add_slice(),
        }
    }

    fn route(&mut self, norm: &Norm, router: &Weight, params: &RouterParams) -> Result<&[u32], BackendError> {
        Both::catch_up(self)?;
        let part = std::mem::take(&mut self.expects).then(|| self.new_part());
        let ids = match &part {
            Some(part) => self.device.route_and_give(norm, router, params, part.place)?,
            None => self.device.route(norm, router, params)?,
        };
        self.chosen.clear();
        self.chosen.extend_from_slice(ids);
        self.open = part.map(|mut part| {
            part.ids.extend_from_slice(&self.chosen);
            part
        });
        Ok(&self.chosen)
    }

    fn expert(&mut self, e: &Expert) -> Result<(), BackendError> {
        self.next()?.expert(e)
    }

    fn experts(&mut self, list: &[Expert]) -> Result<(), BackendError> {
        self.next()?.experts(list)
    }

    fn expert_in_ram(&mut self, unit: usize, expert: &Expert) -> Result<(), BackendError> {
        if self.open.is_none() {
            let mut part = self.new_part();
            part.ids.extend_from_slice(&self.chosen);
            self.device.give_routed(part.place)?;
            self.open = Some(part);
        }
        if let Some(part) = &mut self.open {
            assert!(!part.answered, "experts in RAM come before the others");
            part.experts.push(*expert);
            part.units.push(unit);
        }
        Ok(())
    }

    fn experts_so_far(&mut self) -> Result<(), BackendError> {
        let Some(mut part) = self.open.take() else { return Ok(()) };
        let computed = if part.experts.is_empty() || part.answered { Ok(()) } else { self.compute_experts(&mut part) };
        self.open = Some(part);
        computed
    }

    fn combine_experts(&mut self) -> Result<(), BackendError> {
        self.end_experts()?;
        self.device.combine_experts()?;
        // A router comes next, which waits: what is called before it is done sooner than the device is with its part of it.
        Both::catch_up(self)
    }

    fn hold_experts(&mut self, layer: usize, list: &[Expert]) -> Result<bool, BackendError> {
        self.device.hold_experts(layer, list)
    }

    fn mixture(&mut self, layer: usize, routing: &Routing) -> Result<(), BackendError> {
        self.device.mixture(layer, routing)
    }

    fn share_experts(
        &mut self,
        layer: usize,
        first: usize,
        list: &[Expert],
        of_host: &[Option<Expert>],
        share: Share,
        slots: Option<SlotsAt>,
    ) -> Result<bool, BackendError> {
        let in_ram: Vec<bool> = of_host.iter().map(Option::is_some).collect();
        // Without a queue, the device would look at a slot while another expert comes to it.
        let slots = slots.filter(|s| self.device.works_ahead() && s.slots >= self.used);
        if !self.device.hold_shared(layer, list, &in_ram, share, slots)? {
            return Ok(false);
        }
        self.share = share;
        self.shared.resize_with(self.shared.len().max(layer + 1), || None);
        self.reuse.add_layer(layer, of_host.len());
        let slots = slots.map(|s| (Slots::new(s.slots, of_host.len()), s));
        self.shared[layer] = Some(SharedExperts { first, in_ram: of_host.to_vec(), slots });
        Ok(true)
    }

    fn shared_mixture(&mut self, layer: usize, routing: &Routing) -> Result<(), BackendError> {
        let mut part = self.new_part();
        part.layer = Some(layer);
        self.device.mix(layer, routing, part.place)?;
        self.put_off(part, |device, part| device.end_mix(layer, part.place, routing))
    }

    fn output_norm(&mut self, norm: &Norm) -> Result<(), BackendError> {
        self.next()?.output_norm(norm)
    }

    fn gives_hidden(&self) -> bool {
        self.device.gives_hidden()
    }

    fn hidden(&mut self, norm: Option<&Norm>, out: &mut Vec<f32>) -> Result<(), BackendError> {
        self.catch_up()?;
        self.device.hidden(norm, out)
    }

    fn head(&mut self, w: &Linear, first_row: usize) -> Result<(), BackendError> {
        self.next()?.head(w, first_row)
    }

    fn op(&mut self, op: &Op<Weight>) -> Result<(), BackendError> {
        if self.in_part(Call::Op(*op)) {
            return Ok(());
        }
        match op {
            Op::Route { .. } => {
                self.expects = false;
                Both::catch_up(self)?;
            }
            Op::Combine { .. } => {
                self.end_experts()?;
                self.next()?.op(op)?;
                return Both::catch_up(self);
            }
            _ => {}
        }
        self.next()?.op(op)
    }

    fn choose_instead(&mut self, ids: &[u32]) -> Result<(), BackendError> {
        self.device.choose_instead(ids)?;
        self.chosen.clear();
        self.chosen.extend_from_slice(ids);
        if let Some(part) = self.open.as_mut().filter(|part| !part.ids.is_empty()) {
            part.ids.copy_from_slice(ids);
        }
        Ok(())
    }

    fn in_slots(&self, layer: usize, to: &mut Vec<Option<(u64, u64)>>) {
        let Some(Some(SharedExperts { in_ram, slots: Some((slots, at)), .. })) = self.shared.get(layer) else { return };
        let of = |e: &Option<Expert>| {
            let e = e.as_ref().filter(|_| !self.slots_lost)?;
            Some((at.addr + u64::from(slots.slot(e.id)?) * at.bytes, low_of(e)))
        };
        to.extend(in_ram.iter().map(of));
    }

    fn empty_slots(&mut self) -> Result<(), BackendError> {
        self.catch_up()?;
        for (layer, shared) in self.shared.iter_mut().enumerate() {
            let Some(SharedExperts { slots: Some((slots, _)), .. }) = shared else { continue };
            slots.clear();
            let emptied = self.device.empty_slots_of(layer);
            self.slots_lost |= emptied.is_err();
            emptied?;
        }
        Ok(())
    }

    fn reuse(&self) -> Option<&Reuse> {
        Some(&self.reuse)
    }

    fn force(&mut self, layer: usize, ids: &[u32]) -> Result<bool, BackendError> {
        self.device.force(layer, ids)
    }

    fn chosen(&mut self) -> &[u32] {
        let ids = self.device.chosen();
        self.chosen.clear();
        self.chosen.extend_from_slice(ids);
        &self.chosen
    }

    fn finite(&mut self) -> Result<bool, BackendError> {
        self.catch_up()?;
        self.device.finite()
    }

    fn overflow(&self) -> Option<usize> {
        self.device.overflow()
    }

    fn logits(&mut self) -> Result<&[f32], BackendError> {
        self.catch_up()?;
        self.device.logits()
    }

    fn forget_overflow(&mut self) {
        self.device.forget_overflow();
    }

    fn apply(&mut self, op: &StateOp) -> Result<(), BackendError> {
        self.catch_up()?;
        self.device.apply(op)
    }

    fn page_bytes(&self, layers: Layers) -> usize {
        self.device.page_bytes(layers)
    }

    fn read_page(&mut self, layers: Layers, page: PageId, to: &mut [u8]) -> Result<(), BackendError> {
        self.catch_up()?;
        self.device.read_page(layers, page, to)
    }

    fn write_page(&mut self, layers: Layers, page: PageId, from: &[u8]) -> Result<(), BackendError> {
        self.catch_up()?;
        self.device.write_page(layers, page, from)
    }

    fn workspace_bytes(&self) -> u64 {
        self.device.workspace_bytes()
    }
}

//! The ring to a device with memory of its own, without one: processors compute from a second
//! memory, into which a thread copies late and in order. The same bits for every placement.

mod common;

#[path = "three_tiers/aborts.rs"]
mod aborts;
#[path = "three_tiers/lost.rs"]
mod lost;
#[path = "three_tiers/mixed.rs"]
mod mixed;
#[path = "three_tiers/slices.rs"]
mod slices;

use std::collections::{HashSet, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use common::tiny;
use nt::backend::cpu::CpuBackend;
use nt::backend::{
    Backend, BackendError, BackendKind, Both, Brought, Class, CopyEngine, DeviceAlloc, DeviceMemory, Dims, Expert,
    Hands, Layers, Linear, MemoryUse, Norm, Op, Pinned, RouterParams, Routing, Run, Share, SlotsAt, Weight,
};
use nt::engine::{EngineError, ExpertSlots, Opened, Options, Session, Sites, Slices};
use nt::gguf::TensorType;
use nt::memory::Region;
use nt::model::{ForcedRouting, Outputs, Routes, UnitKind, UnitSpec};
use nt::pipeline::{Event, EventKind};
use nt::plan::{Home, Tiers};
use nt::state::{PageId, StateOp};
use nt::storage::ReaderKind;

/// Bytes of the memory that does not exist.
const TOTAL: u64 = 8 << 20;

#[derive(Default)]
struct Memory {
    used: Arc<Mutex<u64>>,
    /// Bytes that someone else takes after the plan was made.
    taken: u64,
    /// Uploads that fail, counted down; 0 is none.
    fail_at: Arc<Mutex<u64>>,
    /// The same for copies that fail on their way.
    fail_late: Arc<Mutex<u64>>,
    /// Calls of any kind until the device is gone for good; `None` while it stays.
    gone_in: Arc<Mutex<Option<u64>>>,
    /// Passes that were repeated from a recording.
    repeated: Arc<Mutex<u64>>,
    /// Copies that were asked for and have not ended.
    flying: Arc<AtomicU64>,
    /// Parts that processors were given, and at which of them one panics.
    handed: Arc<Mutex<u64>>,
    panics_at: Arc<Mutex<u64>>,
    /// Operations are queued.
    ahead: bool,
    /// Experts in RAM are computed by both sites; and (row, choice) pairs that processors had of those.
    shares: bool,
    shared: Arc<Mutex<usize>>,
    /// Experts that came to a slot.
    slots_filled: Arc<Mutex<u64>>,
}

struct Owned {
    _bytes: Vec<u64>,
    used: Arc<Mutex<u64>>,
    n: u64,
    flying: Arc<AtomicU64>,
}

impl Drop for Owned {
    fn drop(&mut self) {
        let flying = self.flying.load(Ordering::SeqCst);
        assert!(flying == 0 || std::thread::panicking(), "memory is given back with {flying} copies in flight");
        *self.used.lock().unwrap() -= self.n;
    }
}

impl DeviceMemory for Memory {
    fn describe(&self) -> String {
        "a second memory".into()
    }

    fn memory(&self) -> Result<MemoryUse, BackendError> {
        let used = *self.used.lock().unwrap();
        Ok(MemoryUse { used, free: TOTAL - used })
    }

    fn alloc(&self, bytes: u64, what: &'static str) -> Result<DeviceAlloc, BackendError> {
        let mut used = self.used.lock().unwrap();
        if *used + bytes + self.taken > TOTAL {
            return Err(BackendError::OutOfMemory { backend: "second", what, bytes });
        }
        *used += bytes;
        let words = vec![0x7fc0_dead_7fc0_dead_u64; bytes as usize / 8 + 64];
        let addr = (words.as_ptr() as u64).next_multiple_of(256);
        Ok(DeviceAlloc::new(
            addr,
            bytes,
            Owned { _bytes: words, used: self.used.clone(), n: bytes, flying: self.flying.clone() },
        ))
    }

    fn pin(&self, memory: &Region) -> Result<Pinned, BackendError> {
        Ok(Pinned::new(memory, ()))
    }

    fn copy_engine(&self, slots: usize) -> Result<Arc<dyn CopyEngine>, BackendError> {
        let (orders, queue) = channel::<(usize, usize, usize, usize)>();
        let state = Arc::new((Mutex::new(State { copied: vec![true; slots], held: HashSet::new() }), Condvar::new()));
        let shared = state.clone();
        let flying = self.flying.clone();
        std::thread::spawn(move || {
            for (i, (slot, src, dst, n)) in queue.into_iter().enumerate() {
                std::thread::sleep(Duration::from_micros([0, 300, 20, 900][i * 7 % 4]));
                // SAFETY: by the contract of `upload` both ranges stay until the copy is waited for.
                unsafe { std::ptr::copy_nonoverlapping(src as *const u8, dst as *mut u8, n) };
                flying.fetch_sub(1, Ordering::SeqCst);
                shared.0.lock().unwrap().copied[slot] = true;
                shared.1.notify_all();
            }
        });
        Ok(Arc::new(Late {
            orders: Mutex::new(orders),
            state,
            fail_at: self.fail_at.clone(),
            fail_late: self.fail_late.clone(),
            gone_in: self.gone_in.clone(),
            flying: self.flying.clone(),
        }))
    }

    fn memory_rate(&self) -> Result<Option<f64>, BackendError> {
        Ok(Some(10e9))
    }
}

struct State {
    copied: Vec<bool>,
    held: HashSet<usize>,
}

/// Copies on a thread of its own, some time after they were asked for.
struct Late {
    orders: Mutex<Sender<(usize, usize, usize, usize)>>,
    state: Arc<(Mutex<State>, Condvar)>,
    fail_at: Arc<Mutex<u64>>,
    fail_late: Arc<Mutex<u64>>,
    gone_in: Arc<Mutex<Option<u64>>>,
    flying: Arc<AtomicU64>,
}

/// An error for ever once the countdown is over.
fn there(gone_in: &Mutex<Option<u64>>) -> Result<(), BackendError> {
    match gone_in.lock().unwrap().as_mut() {
        Some(0) => Err(BackendError::Lost { backend: "second", what: "the device is gone".into() }),
        Some(n) => {
            *n -= 1;
            Ok(())
        }
        None => Ok(()),
    }
}

/// The same, without counting.
fn there_still(gone_in: &Mutex<Option<u64>>) -> Result<(), BackendError> {
    if *gone_in.lock().unwrap() == Some(0) { there(gone_in) } else { Ok(()) }
}

/// Counts down; an error when it gets to zero.
fn due(countdown: &Mutex<u64>) -> Result<(), BackendError> {
    let mut n = countdown.lock().unwrap();
    let last = *n == 1;
    *n = n.saturating_sub(1);
    if last {
        return Err(BackendError::Device { backend: "second", what: "the copy engine is gone".into() });
    }
    Ok(())
}

impl Late {
    fn wait(&self, slot: usize) {
        let mut state = self.state.0.lock().unwrap();
        while !state.copied[slot] {
            state = self.state.1.wait(state).unwrap();
        }
    }
}

impl CopyEngine for Late {
    unsafe fn upload(&self, slot: usize, src: *const u8, dst: u64, bytes: usize) -> Result<(), BackendError> {
        there(&self.gone_in)?;
        due(&self.fail_at)?;
        let mut state = self.state.0.lock().unwrap();
        assert!(!state.held.contains(&slot), "an upload into slot {slot}, which is computed from");
        state.copied[slot] = false;
        self.flying.fetch_add(1, Ordering::SeqCst);
        self.orders.lock().unwrap().send((slot, src as usize, dst as usize, bytes)).unwrap();
        Ok(())
    }

    fn wait_copied(&self, slot: usize) -> Result<Option<f64>, BackendError> {
        self.wait(slot);
        there(&self.gone_in)?;
        due(&self.fail_late)?;
        Ok(Some(1e-6))
    }

    fn try_copied(&self, slot: usize) -> Result<Option<Option<f64>>, BackendError> {
        let copied = self.state.0.lock().unwrap().copied[slot];
        if copied { self.wait_copied(slot).map(Some) } else { Ok(None) }
    }

    fn acquire(&self, slot: usize) -> Result<(), BackendError> {
        self.wait(slot);
        there(&self.gone_in)?;
        assert!(self.state.0.lock().unwrap().held.insert(slot));
        Ok(())
    }

    fn release(&self, slot: usize) -> Result<(), BackendError> {
        assert!(self.state.0.lock().unwrap().held.remove(&slot));
        there(&self.gone_in)
    }

    fn settle(&self) -> Result<(), BackendError> {
        let n = self.state.0.lock().unwrap().copied.len();
        (0..n).for_each(|slot| self.wait(slot));
        self.state.0.lock().unwrap().held.clear();
        there(&self.gone_in)
    }
}

/// Where an expert begins.
fn low_of(e: &Expert) -> u64 {
    [&e.gate, &e.up, &e.down].map(|l| l.weight.addr()).into_iter().min().unwrap() & !127
}

type Call = Arc<dyn Fn(&mut CpuBackend) -> Result<(), BackendError>>;

/// Processors that compute from the second memory. Operations of a stretch are recorded, not run, and then
/// repeated; the first recording fails.
struct Detached {
    cpu: CpuBackend,
    memory: Arc<Memory>,
    recording: Option<Vec<Queued>>,
    recorded: Option<Vec<Queued>>,
    failed_once: bool,
    given: [Option<Vec<f32>>; 2],
    answers: [Option<Vec<f32>>; 2],
    /// Operations are queued, and run when something waits for them.
    ahead: bool,
    /// Those of the pass at hand: none of a prompt, whose units come through frames that are filled anew.
    queues: bool,
    queue: VecDeque<Queued>,
    /// Experts of blocks that processors compute, too, whether each lies in RAM, and their share; and choices that were given.
    shared: Vec<OfBoth>,
    /// By block and expert, the slot that has it; and what rows are to choose.
    slots: Vec<Vec<Option<u32>>>,
    forced: Vec<Vec<u32>>,
    chosen: [Vec<u32>; 2],
    answered: [Vec<u32>; 2],
    used: usize,
}

/// Experts of a block, whether each lies in RAM, the share of processors and the device's slots.
#[derive(Default)]
struct OfBoth(Vec<Expert>, Vec<bool>, Option<Share>, Option<SlotsAt>);

/// An operation of a device that is called ahead.
#[derive(Clone)]
#[expect(clippy::large_enum_variant, reason = "a queue has a few hundred, in a test")]
enum Queued {
    Call(Call),
    Give(usize),
    Take(usize),
    TakeSlice(usize),
    TakeExperts(usize, Vec<u32>),
    Mix(usize, Routing, usize),
    EndMix(usize),
}

impl Detached {
    fn call(&mut self, f: impl Fn(&mut CpuBackend) -> Result<(), BackendError> + 'static) -> Result<(), BackendError> {
        if self.recording.is_none() && !self.queues {
            return f(&mut self.cpu);
        }
        self.queue(Queued::Call(Arc::new(f)));
        Ok(())
    }

    /// Keeps an operation, for a recording or for later.
    fn queue(&mut self, operation: Queued) {
        match &mut self.recording {
            Some(recording) => recording.push(operation),
            None => self.queue.push_back(operation),
        }
    }

    /// Keeps an operation that others wait for.
    fn hand(&mut self, operation: Queued) -> Result<(), BackendError> {
        self.queue(operation);
        if self.ahead || self.recording.is_some() { Ok(()) } else { self.finish() }
    }

    /// Runs what is queued, up to a wait for an answer that is not there.
    fn advance(&mut self) -> Result<(), BackendError> {
        while let Some(queued) = self.queue.pop_front() {
            match queued {
                Queued::Call(f) => f(&mut self.cpu)?,
                Queued::Give(place) => self.given[place] = Some(self.cpu.rows().to_vec()),
                Queued::Take(place) => match self.answers[place].take() {
                    Some(rows) => self.cpu.set_rows(&rows),
                    None => {
                        self.queue.push_front(Queued::Take(place));
                        return Ok(());
                    }
                },
                Queued::TakeSlice(place) => match self.answers[place].take() {
                    Some(rows) => {
                        let sum: Vec<f32> = self.cpu.rows().iter().zip(&rows).map(|(x, s)| x + s).collect();
                        self.cpu.set_rows(&sum);
                    }
                    None => {
                        self.queue.push_front(Queued::TakeSlice(place));
                        return Ok(());
                    }
                },
                Queued::Mix(layer, routing, place) => self.mix_now(layer, &routing, place)?,
                Queued::EndMix(place) => match self.answers[place].take() {
                    Some(rows) => {
                        self.cpu.set_expert_rows(&self.answered[place], &rows);
                        self.cpu.combine_experts()?;
                        *self.memory.shared.lock().unwrap() += self.answered[place].len();
                    }
                    None => {
                        self.queue.push_front(Queued::EndMix(place));
                        return Ok(());
                    }
                },
                Queued::TakeExperts(place, pairs) => match self.answers[place].take() {
                    Some(rows) => self.cpu.set_expert_rows(&pairs, &rows),
                    None => {
                        self.queue.push_front(Queued::TakeExperts(place, pairs));
                        return Ok(());
                    }
                },
            }
        }
        Ok(())
    }

    fn mix_now(&mut self, layer: usize, routing: &Routing, place: usize) -> Result<(), BackendError> {
        let Routing::Softmax { norm, router, params } = routing else { panic!("a router of another kind") };
        let mut ids = self.cpu.route(norm, router, params)?.to_vec();
        if let Some(forced) = self.forced.get(layer).filter(|f| !f.is_empty()) {
            self.cpu.choose_instead(forced)?;
            ids.copy_from_slice(forced);
        }
        self.given[place] = Some(self.cpu.routed_rows().to_vec());
        let OfBoth(list, in_ram, Some(share), slots) = &self.shared[layer] else {
            panic!("block {layer} is not shared")
        };
        let mut own = Vec::new();
        for row in ids.chunks(self.used) {
            let n = row.iter().filter(|id| in_ram[**id as usize]).count();
            let of_device = n - share.of(n);
            let mut seen = 0;
            for id in row {
                seen += usize::from(in_ram[*id as usize]);
                if !in_ram[*id as usize] || seen <= of_device {
                    own.push(*id);
                }
            }
        }
        let mut own: Vec<Expert> = list.iter().filter(|e| own.contains(&e.id)).copied().collect();
        for e in &mut own {
            if let (Some(at), Some(slot)) = (slots, self.slots[layer][e.id as usize]) {
                // As it was brought there.
                let (low, base) = (low_of(e), at.addr() + u64::from(slot) * at.bytes());
                for linear in [&mut e.gate, &mut e.up, &mut e.down] {
                    let w = linear.weight;
                    // SAFETY: the slot has a copy of what lies there.
                    linear.weight = unsafe { Weight::new(base + (w.addr() - low), w.ty(), w.rows(), w.cols()) };
                }
            }
        }
        self.chosen[place] = ids;
        self.cpu.experts(&own)
    }

    /// Waits for all that was called. A device would wait for ever where this fails.
    fn finish(&mut self) -> Result<(), BackendError> {
        self.advance()?;
        assert!(self.queue.is_empty(), "something waits for the device, which waits for an answer");
        Ok(())
    }

    fn repeat(&mut self) -> Result<bool, BackendError> {
        let Some(recorded) = &self.recorded else {
            return Ok(false);
        };
        self.queue.extend(recorded.iter().cloned());
        self.advance()?;
        Ok(true)
    }
}

impl Backend for Detached {
    fn name(&self) -> &'static str {
        "second"
    }
    fn lost(&self) -> Option<BackendError> {
        there_still(&self.memory.gone_in).err()
    }
    fn supports(&self, ty: TensorType) -> bool {
        self.cpu.supports(ty)
    }
    fn device(&self) -> Option<Arc<dyn DeviceMemory>> {
        Some(self.memory.clone())
    }
    fn runs_max(&self) -> usize {
        self.cpu.runs_max()
    }
    fn begin(&mut self, runs: &[Run<'_>]) -> Result<(), BackendError> {
        self.finish()?;
        self.queues = self.ahead && runs.iter().all(|r| r.class == Class::Exact);
        self.cpu.begin(runs)
    }
    fn turn_to(&mut self, class: Class) {
        // What a stretch repeats has one class.
        self.cpu.turn_to(class);
    }
    fn begin_stretch(&mut self) -> Result<bool, BackendError> {
        there(&self.memory.gone_in)?;
        if self.repeat()? {
            *self.memory.repeated.lock().unwrap() += 1;
            return Ok(true);
        }
        self.recording = Some(Vec::new());
        Ok(false)
    }
    fn end_stretch(&mut self, complete: bool) -> Result<bool, BackendError> {
        let calls = self.recording.take().expect("a stretch was begun");
        if !complete || !std::mem::replace(&mut self.failed_once, true) {
            return Ok(false);
        }
        self.recorded = Some(calls);
        self.repeat()
    }
    fn embed(&mut self, rows: &[u8], ty: TensorType) -> Result<(), BackendError> {
        self.cpu.embed(rows, ty)
    }
    fn embed_per_block(&mut self, rows: &[u8], ty: TensorType) -> Result<(), BackendError> {
        self.cpu.embed_per_block(rows, ty)
    }
    fn op(&mut self, op: &Op<Weight>) -> Result<(), BackendError> {
        there(&self.memory.gone_in)?;
        if let Op::Route { .. } = op {
            self.finish()?;
            return self.cpu.op(op);
        }
        let op = *op;
        self.call(move |cpu| cpu.op(&op))
    }
    fn chosen(&mut self) -> &[u32] {
        self.cpu.chosen()
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
        let (norm, q, k, v) = (*norm, *q, *k, *v);
        let (q_norm, k_norm) = (q_norm.copied(), k_norm.copied());
        self.call(move |cpu| cpu.qkv(layer, &norm, &q, &k, &v, q_norm.as_ref(), k_norm.as_ref()))
    }
    fn attend(&mut self, layer: usize) -> Result<(), BackendError> {
        there(&self.memory.gone_in)?;
        self.call(move |cpu| cpu.attend(layer))
    }
    fn keep(&mut self, rows: &[usize]) -> Result<(), BackendError> {
        let rows = rows.to_vec();
        self.call(move |cpu| cpu.keep(&rows))
    }
    fn attn_output(&mut self, w: &Linear) -> Result<(), BackendError> {
        let w = *w;
        self.call(move |cpu| cpu.attn_output(&w))
    }
    fn ffn(&mut self, norm: &Norm, gate: &Linear, up: &Linear, down: &Linear) -> Result<(), BackendError> {
        there(&self.memory.gone_in)?;
        let (norm, gate, up, down) = (*norm, *gate, *up, *down);
        self.call(move |cpu| cpu.ffn(&norm, &gate, &up, &down))
    }
    fn slice(&mut self, norm: &Norm, gate: &Linear, up: &Linear, down: &Linear) -> Result<(), BackendError> {
        there(&self.memory.gone_in)?;
        let (norm, gate, up, down) = (*norm, *gate, *up, *down);
        self.call(move |cpu| cpu.slice(&norm, &gate, &up, &down))
    }
    fn add_slice(&mut self) -> Result<(), BackendError> {
        self.call(CpuBackend::add_slice)
    }
    fn route(&mut self, norm: &Norm, router: &Weight, params: &RouterParams) -> Result<&[u32], BackendError> {
        self.finish()?;
        self.cpu.route(norm, router, params)
    }
    fn expert(&mut self, e: &Expert) -> Result<(), BackendError> {
        let e = *e;
        self.call(move |cpu| cpu.expert(&e))
    }
    fn choose_instead(&mut self, ids: &[u32]) -> Result<(), BackendError> {
        self.cpu.choose_instead(ids)
    }

    fn force(&mut self, layer: usize, ids: &[u32]) -> Result<bool, BackendError> {
        self.forced.resize_with(self.forced.len().max(layer + 1), Vec::new);
        self.forced[layer] = ids.to_vec();
        Ok(true)
    }
    fn combine_experts(&mut self) -> Result<(), BackendError> {
        self.call(CpuBackend::combine_experts)
    }
    fn output_norm(&mut self, norm: &Norm) -> Result<(), BackendError> {
        let norm = *norm;
        self.call(move |cpu| cpu.output_norm(&norm))
    }
    fn head(&mut self, w: &Linear, first_row: usize) -> Result<(), BackendError> {
        there(&self.memory.gone_in)?;
        let w = *w;
        self.call(move |cpu| cpu.head(&w, first_row))
    }
    fn finite(&mut self) -> Result<bool, BackendError> {
        self.finish()?;
        self.cpu.finite()
    }
    fn logits(&mut self) -> Result<&[f32], BackendError> {
        there(&self.memory.gone_in)?;
        self.finish()?;
        self.cpu.logits()
    }
    fn forget_overflow(&mut self) {
        self.cpu.forget_overflow();
    }
    fn apply(&mut self, op: &StateOp) -> Result<(), BackendError> {
        self.finish()?;
        self.cpu.apply(op)
    }
    fn page_bytes(&self, layers: Layers) -> usize {
        self.cpu.page_bytes(layers)
    }
    fn read_page(&mut self, layers: Layers, page: PageId, to: &mut [u8]) -> Result<(), BackendError> {
        self.cpu.read_page(layers, page, to)
    }
    fn write_page(&mut self, layers: Layers, page: PageId, from: &[u8]) -> Result<(), BackendError> {
        self.cpu.write_page(layers, page, from)
    }
    fn workspace_bytes(&self) -> u64 {
        self.cpu.workspace_bytes()
    }
}

/// Rows on their way to processors and back. Operations run when they are called, so that nothing is called ahead.
impl Hands for Detached {
    fn works_ahead(&self) -> bool {
        self.ahead
    }
    fn give(&mut self, place: usize) -> Result<(), BackendError> {
        there(&self.memory.gone_in)?;
        self.hand(Queued::Give(place))
    }
    fn route_and_give(
        &mut self,
        norm: &Norm,
        router: &Weight,
        params: &RouterParams,
        place: usize,
    ) -> Result<&[u32], BackendError> {
        self.finish()?;
        self.cpu.route(norm, router, params)?;
        self.give_routed(place)?;
        Ok(self.cpu.chosen())
    }
    fn give_routed(&mut self, place: usize) -> Result<(), BackendError> {
        self.finish()?;
        self.given[place] = Some(self.cpu.routed_rows().to_vec());
        Ok(())
    }
    fn given(&mut self, place: usize) -> Result<&[f32], BackendError> {
        there(&self.memory.gone_in)?;
        self.advance()?;
        let handed = {
            let mut handed = self.memory.handed.lock().unwrap();
            *handed += 1;
            *handed
        };
        // No lock is held by who panics.
        let panics_at = *self.memory.panics_at.lock().unwrap();
        assert!(handed != panics_at, "a processor panics");
        Ok(self.given[place].as_ref().expect("rows that were given, before a wait for another answer"))
    }
    fn take(&mut self, place: usize) -> Result<(), BackendError> {
        there(&self.memory.gone_in)?;
        self.hand(Queued::Take(place))
    }
    fn take_slice(&mut self, place: usize) -> Result<(), BackendError> {
        there(&self.memory.gone_in)?;
        self.hand(Queued::TakeSlice(place))
    }
    fn take_experts(&mut self, place: usize, pairs: &[u32]) -> Result<(), BackendError> {
        self.hand(Queued::TakeExperts(place, pairs.to_vec()))
    }
    fn hold_shared(
        &mut self,
        layer: usize,
        list: &[Expert],
        in_ram: &[bool],
        share: Share,
        slots: Option<SlotsAt>,
    ) -> Result<bool, BackendError> {
        self.shared.resize_with(self.shared.len().max(layer + 1), OfBoth::default);
        self.shared[layer] = OfBoth(list.to_vec(), in_ram.to_vec(), Some(share), slots);
        self.slots.resize_with(self.slots.len().max(layer + 1), Vec::new);
        self.slots[layer] = vec![None; list.len()];
        Ok(self.memory.shares)
    }
    fn fetch(&mut self, _place: usize, layer: usize, list: &[Brought]) -> Result<(), BackendError> {
        let at = self.shared[layer].3;
        for Brought { expert, given } in list {
            let (Some(at), Some(given)) = (at, given) else { continue };
            let bytes = |w: &Weight| (w.ty().row_bytes(w.cols()).unwrap() * w.rows()) as u64;
            let end = [&expert.gate, &expert.up, &expert.down].map(|l| l.weight.addr() + bytes(&l.weight));
            let (low, end) = (low_of(expert), end.into_iter().max().unwrap());
            assert!(end - low <= at.bytes() && (given.slot as usize) < at.slots());
            if let Some(before) = given.before {
                assert_eq!(self.slots[layer][before as usize].take(), Some(given.slot));
            }
            assert_eq!(self.slots[layer][expert.id as usize].replace(given.slot), None);
            let to = (at.addr() + u64::from(given.slot) * at.bytes()) as *mut u8;
            // SAFETY: the expert lies in RAM, and the slot, of the second memory, has room for it; none that this row chose is there.
            unsafe { std::ptr::copy_nonoverlapping(low as *const u8, to, (end - low) as usize) };
            *self.memory.slots_filled.lock().unwrap() += 1;
        }
        Ok(())
    }
    fn empty_slots_of(&mut self, layer: usize) -> Result<(), BackendError> {
        there(&self.memory.gone_in)?;
        self.slots[layer].fill(None);
        Ok(())
    }
    fn mix(&mut self, layer: usize, routing: &Routing, place: usize) -> Result<(), BackendError> {
        there(&self.memory.gone_in)?;
        self.hand(Queued::Mix(layer, *routing, place))
    }
    fn given_routed(&mut self, place: usize) -> Result<(&[f32], &[u32]), BackendError> {
        self.given(place)?;
        Ok((self.given[place].as_ref().unwrap(), &self.chosen[place]))
    }
    fn end_mix(&mut self, _layer: usize, place: usize, _routing: &Routing) -> Result<(), BackendError> {
        there(&self.memory.gone_in)?;
        self.hand(Queued::EndMix(place))
    }
    fn records(&self) -> bool {
        self.recording.is_some()
    }
    fn answer_experts(&mut self, place: usize, pairs: &[u32], rows: &[f32]) {
        self.answered[place] = pairs.to_vec();
        self.answers[place] = Some(rows.to_vec());
    }
    fn answer(&mut self, place: usize, rows: &[f32]) {
        self.answers[place] = Some(rows.to_vec());
    }
    fn answer_all(&mut self) {
        // What is left runs out on what is there, and is dropped.
        self.queue.clear();
        (self.given, self.answers) = Default::default();
    }
}

fn options() -> Options {
    Options {
        sequences: 1,
        recent: true,
        backend: BackendKind::Cpu,
        sites: Sites::One,
        vram: None,
        threads: 2,
        ram: Some(64 << 20),
        storage: true,
        copies: Vec::new(),
        reader: ReaderKind::Auto,
        verify: false,
        kv_type: TensorType::F32,
        caches: true,
        expert_slots: ExpertSlots::Off,
        slices: Slices::Off,
        routing: None,
        curve: None,
        n_buffers: None,
        buffers_by_guess: true,
        prompt_ctx: 0,
        more_frames: false,
        tiers: None,
        stacked: false,
        n_ctx: 64,
        max_batch: 16,
        shared_batch: 16,
        longest_prompt: None,
        outputs: 16,
        requant: None,
        timeline: false,
        repeat: None,
    }
}

fn start(opened: &Opened, options: Options, memory: &Arc<Memory>) -> Result<Session, EngineError> {
    let (memory, sites) = (memory.clone(), options.sites);
    let open = move |dims: &Dims| -> Result<(Box<dyn Backend>, Option<String>), BackendError> {
        let detached = Detached {
            cpu: CpuBackend::new(dims.clone(), 2)?,
            memory: memory.clone(),
            recording: None,
            recorded: None,
            failed_once: false,
            given: Default::default(),
            answers: Default::default(),
            ahead: memory.ahead,
            queues: false,
            queue: VecDeque::new(),
            shared: Vec::new(),
            slots: Vec::new(),
            forced: Vec::new(),
            chosen: Default::default(),
            answered: Default::default(),
            used: dims.n_experts_used,
        };
        match sites {
            Sites::One => Ok((Box::new(detached), None)),
            _ => Ok((Box::new(Both::new(Box::new(detached), dims, 2)?), None)),
        }
    };
    Session::with_backend(opened, options, &open, &mut |_, _| ())
}

/// Logits of a prompt and of some tokens after it.
fn logits(session: &mut Session) -> Result<Vec<f32>, EngineError> {
    session.truncate(0);
    let tokens: Vec<u32> = (0..12).map(|i| i * 37 % 258).collect();
    session.eval(&tokens, Class::Bulk, Outputs::All, &|| false)?;
    let mut all = session.logits()?.to_vec();
    for t in [3, 99, 200, 17, 5] {
        session.eval(&[t], Class::Exact, Outputs::Last, &|| false)?;
        all.extend_from_slice(session.logits()?);
    }
    Ok(all)
}

fn placements() -> Vec<Options> {
    let tiers = |a, b, c, n: usize| Options { tiers: Some(Tiers { a, b, c }), n_buffers: Some(n), ..options() };
    let mut all = vec![options()];
    for n in 2..=6 {
        all.extend([tiers(0, 6, 0, n), tiers(0, 0, 6, n), tiers(2, 2, 2, n), tiers(1, 0, 5, n), tiers(3, 3, 0, n)]);
    }
    all.push(Options { stacked: true, ..tiers(2, 2, 2, 3) });
    all.push(Options { vram: Some(1 << 20), ram: Some(1200 << 10), ..options() });
    all.push(Options { vram: Some(700 << 10), ram: Some(64 << 20), ..options() });
    all.push(Options { reader: ReaderKind::Pread, ..tiers(1, 2, 3, 3) });
    all
}

/// The logits are those of processors wherever units live; passes of a `dense` model whose units all stay in
/// the second memory are repeated from a recording, and no others.
fn same_bits(path: &Path, dense: bool) {
    let opened = Opened::open(path).unwrap();
    let want = logits(&mut Session::new(&opened, options(), &mut |_, _| ()).unwrap()).unwrap();
    for o in placements() {
        let memory = Arc::new(Memory::default());
        let what = format!("{:?} {:?} {:?} {:?}", o.tiers, o.n_buffers, o.vram, o.ram);
        let vram = o.vram;
        let stay = dense && o.tiers.is_none() && vram.is_none_or(|v| v >= 1 << 20);
        let mut session = start(&opened, o, &memory).unwrap_or_else(|e| panic!("{what}: {e}"));
        for _ in 0..2 {
            assert!(logits(&mut session).unwrap() == want, "{what}");
        }
        assert!(vram.is_none_or(|v| *memory.used.lock().unwrap() <= v), "{what}");
        drop(session);
        assert_eq!(*memory.used.lock().unwrap(), 0, "{what}");
        // Ten passes of one token: one whose recording failed, one that was recorded.
        assert_eq!(*memory.repeated.lock().unwrap(), if stay { 8 } else { 0 }, "{what}");
    }
}

#[test]
fn dense() {
    let d = tempfile::tempdir().unwrap();
    same_bits(&tiny(6).write(d.path(), "m.gguf"), true);
}

#[test]
fn experts() {
    let d = tempfile::tempdir().unwrap();
    same_bits(&common::tiny_moe(6).write(d.path(), "moe.gguf"), false);
}

/// Requantised units are where the smaller type has room for them, with the bits of processors that requantise the same ones: in
/// the second memory, and in RAM on their way there.
#[test]
fn requantised() {
    let d = tempfile::tempdir().unwrap();
    for (file, routed) in [(tiny(6), false), (common::tiny_moe(6), true)] {
        let opened = Opened::open(&file.write(d.path(), "m.gguf")).unwrap();
        let turned = Options { requant: Some(TensorType::Q4_0), ..options() };
        let want = logits(&mut Session::new(&opened, turned.clone(), &mut |_, _| ()).unwrap()).unwrap();
        let tiers =
            |a, b, n: usize| Options { tiers: Some(Tiers { a, b, c: 0 }), n_buffers: Some(n), ..turned.clone() };
        let tight = |vram: u64| Options { vram: Some(vram << 10), ..turned.clone() };
        let all = [tiers(6, 0, 2), tiers(0, 6, 2), tiers(3, 3, 3), tight(300), tight(100), turned.clone()];
        for (i, o) in all.into_iter().enumerate() {
            let memory = Arc::new(Memory::default());
            let vram = o.vram;
            let mut session = start(&opened, o, &memory).unwrap_or_else(|e| panic!("{i}: {e}"));
            assert!(logits(&mut session).unwrap() == want, "{i} {routed}");
            assert!(vram.is_none_or(|v| *memory.used.lock().unwrap() <= v), "{i}");
            let r = session.requant().unwrap();
            assert!(r.left == (0, 0) && r.turned[0].after < r.turned[0].before / 7, "{i}: {r:?}");
            let carried = session.links().gpu_bytes_per_pass;
            let all: u64 = session.model().units.iter().map(|u| u.bytes()).sum();
            assert!(carried <= all && all < opened.model.units.iter().map(|u| u.bytes()).sum::<u64>() / 5, "{i}");
        }
        // What a third of the blocks are read as stays as it is.
        let stacked = Options { stacked: true, ..turned.clone() };
        let mixed = Options { tiers: Some(Tiers { a: 0, b: 4, c: 2 }), ..stacked.clone() };
        let want = logits(&mut Session::new(&opened, mixed, &mut |_, _| ()).unwrap()).unwrap();
        let mixed = Options { tiers: Some(Tiers { a: 4, b: 0, c: 2 }), ..stacked };
        let memory = Arc::new(Memory::default());
        let mut session = start(&opened, mixed, &memory).unwrap();
        let homes: Vec<bool> = session.homes().iter().map(|h| *h == nt::plan::Home::C).collect();
        assert!(homes.contains(&true) && session.requant().unwrap().left.0 > 0);
        let same = logits(&mut session).unwrap() == want;
        assert!(same, "routed {routed}");
    }
}

/// Experts on storage with caches in RAM, as many slots as the room allows.
fn cached() -> Vec<Options> {
    let with = |vram: u64, ram: u64| Options { vram: Some(vram << 10), ram: Some(ram << 10), ..options() };
    vec![with(1 << 10, 4 << 10), with(1 << 10, 6 << 10), with(2 << 10, 4 << 10), with(1 << 10, 2 << 10)]
}

/// The bits are those of processors, whatever caches hold, cold and warm: with a device that is brought each expert, and with
/// processors beside it that compute those of caches.
#[test]
fn caches_of_experts() {
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&common::many_experts(6).write(d.path(), "m.gguf")).unwrap();
    // Eight tokens at once choose more experts than a cache holds.
    let logits = |session: &mut Session| {
        let mut all = logits(session).unwrap();
        session.eval(&[7, 130, 33, 250, 91, 12, 180, 66], Class::Exact, Outputs::All, &|| false).unwrap();
        all.extend_from_slice(session.logits().unwrap());
        all
    };
    let want = logits(&mut Session::new(&opened, options(), &mut |_, _| ()).unwrap());
    for sites in [Sites::One, Sites::Both] {
        let (mut hits, mut none) = (0, 0);
        for o in cached() {
            let memory = Arc::new(Memory::default());
            let what = format!("{sites:?} {:?} {:?}", o.vram, o.ram);
            let mut session = start(&opened, Options { sites, ..o }, &memory).unwrap_or_else(|e| panic!("{what}: {e}"));
            for _ in 0..4 {
                assert!(logits(&mut session) == want, "{what}");
            }
            let links = session.links();
            match session.caches().is_empty() {
                true => none += 1,
                false => {
                    let c = links.experts.caches.counts;
                    assert!(c.misses > 0, "{what}: {c:?}");
                    assert_eq!(c.hits + c.misses, links.experts.homes[2], "{what}");
                    assert!(*memory.handed.lock().unwrap() > 0 || sites == Sites::One, "{what}");
                    hits += c.hits;
                }
            }
            drop(session);
            assert_eq!(*memory.used.lock().unwrap(), 0, "{what}");
        }
        assert!(hits > 0 && none > 0, "{sites:?}: some have caches, and some no room for them");
    }
}

#[test]
fn computing_alone_is_measured_wherever_units_live() {
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&tiny(6).write(d.path(), "m.gguf")).unwrap();
    for (a, b, c) in [(6, 0, 0), (2, 4, 0)] {
        let memory = Arc::new(Memory::default());
        let o = Options { tiers: Some(Tiers { a, b, c }), ..options() };
        let mut session = start(&opened, o, &memory).unwrap();
        logits(&mut session).unwrap();
        let links = session.links();
        session.measure_ceilings(&|| false).unwrap();
        assert!(session.links().compute_s.is_some_and(|s| s > 0.0), "{a}:{b}:{c}");
        // Its passes are not counted as the run's.
        assert_eq!(session.links().passes, links.passes, "{a}:{b}:{c}");
        drop(session);
        assert_eq!(*memory.used.lock().unwrap(), 0);
    }
}

#[test]
fn a_pass_that_is_given_up_leaves_a_session_that_goes_on() {
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&common::tiny_moe(6).write(d.path(), "m.gguf")).unwrap();
    let memory = Arc::new(Memory::default());
    let o = Options { tiers: Some(Tiers { a: 1, b: 2, c: 3 }), ..options() };
    let mut session = start(&opened, o, &memory).unwrap();
    let want = logits(&mut session).unwrap();
    for after in 0..6 {
        let asked = std::cell::Cell::new(0);
        let stop = || asked.replace(asked.get() + 1) >= after;
        session.truncate(0);
        assert!(session.eval(&[1, 2, 3], Class::Bulk, Outputs::Last, &stop).is_err());
        assert!(logits(&mut session).unwrap() == want, "after {after}");
    }
}

#[test]
fn a_copy_that_fails_is_an_error_and_everything_is_released() {
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&tiny(6).write(d.path(), "m.gguf")).unwrap();
    let memory = Arc::new(Memory::default());
    let o = Options { tiers: Some(Tiers { a: 1, b: 2, c: 3 }), ..options() };
    let mut session = start(&opened, o, &memory).unwrap();
    let want = logits(&mut session).unwrap();
    for countdown in [&memory.fail_at, &memory.fail_late] {
        for n in 1..8 {
            *countdown.lock().unwrap() = n;
            let e = logits(&mut session).unwrap_err().to_string();
            assert!(e.contains("the copy engine is gone") && session.lost().is_none(), "{e}");
            assert!(logits(&mut session).unwrap() == want, "{n}");
        }
    }
    drop(session);
    assert_eq!(*memory.used.lock().unwrap(), 0);
}

#[test]
fn a_device_that_vanishes_ends_every_pass_with_an_error_and_everything_is_released() {
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&tiny(6).write(d.path(), "m.gguf")).unwrap();
    for calls in 0..40 {
        let memory = Arc::new(Memory::default());
        let o = Options { tiers: Some(Tiers { a: 1, b: 2, c: 3 }), ..options() };
        let mut session = start(&opened, o, &memory).unwrap();
        logits(&mut session).unwrap();
        *memory.gone_in.lock().unwrap() = Some(calls);
        let mut first = (0..9).find_map(|_| logits(&mut session).err());
        let e = first.take().unwrap_or_else(|| panic!("nine passes without a device, {calls}")).to_string();
        assert!(e.contains("the device is gone"), "{calls}: {e}");
        assert!(logits(&mut session).is_err(), "{calls}: a pass after the device was gone");
        assert!(session.lost().is_some(), "{calls}");
        drop(session);
        assert_eq!(*memory.used.lock().unwrap(), 0, "{calls}");
    }
}

/// A measured timeline has what processors next to the device compute: each of their units once a token that is generated, within its
/// pass and one after the other.
#[test]
fn a_timeline_shows_what_processors_compute() {
    let d = tempfile::tempdir().unwrap();
    let (dense, routed) = (tiny(6).write(d.path(), "m.gguf"), common::tiny_moe(6).write(d.path(), "e.gguf"));
    for path in [&dense, &routed] {
        let opened = Opened::open(path).unwrap();
        let want = logits(&mut Session::new(&opened, options(), &mut |_, _| ()).unwrap()).unwrap();
        for ahead in [false, true] {
            let memory = Arc::new(Memory { ahead, shares: true, ..Memory::default() });
            let o = Options { vram: Some(700 << 10), sites: Sites::Both, timeline: true, ..options() };
            let mut session = start(&opened, o, &memory).unwrap();
            assert!(logits(&mut session).unwrap() == want);
            let events = session.events();
            let of = |kind| events.iter().filter(move |e| e.kind == kind);
            let theirs = session.beside().unwrap();
            let n = theirs.iter().filter(|t| **t).count();
            // Of experts, those that were chosen.
            let worked: Vec<_> = of(EventKind::Beside).collect();
            assert!(worked.iter().all(|e| theirs[e.unit]) && n > 0, "{path:?}");
            assert!(if path == &dense { worked.len() == 5 * n } else { !worked.is_empty() }, "{} {n}", worked.len());
            assert!(worked.windows(2).all(|w| w[0].end_ns <= w[1].start_ns), "{path:?}");
            let passes: Vec<_> = of(EventKind::Pass).filter(|p| p.unit == 1).collect();
            assert_eq!(passes.len(), 5);
            let within = |e: &Event| passes.iter().any(|p| p.start_ns <= e.start_ns && e.end_ns <= p.end_ns);
            assert!(worked.iter().all(|e| within(e)), "{path:?}");
        }
    }
}

/// What both sites compute of experts is counted at each and on the link, and the chain of sites is a bound.
#[test]
fn divided_experts_are_counted_and_their_chain_binds() {
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&common::tiny_moe(6).write(d.path(), "e.gguf")).unwrap();
    let memory = Arc::new(Memory { ahead: true, shares: true, ..Memory::default() });
    let o = Options { vram: Some(700 << 10), sites: Sites::Both, ..options() };
    let mut session = start(&opened, o, &memory).unwrap();
    let part = session.part_of_choices().expect("experts in RAM are divided");
    session.start_measuring();
    logits(&mut session).unwrap();
    let l = session.links();
    assert_eq!(l.passes, 5);
    // What one pass is expected to take, of five; one was called twice, since its recording failed. Bytes are whole in each layer.
    for (counted, expected) in [(l.beside_bytes, l.beside_bytes_per_pass), (l.gpu_fetched_bytes, l.gpu_bytes_per_pass)]
    {
        assert!(counted.abs_diff(6 * expected) <= 6 * 2 * 6, "{counted} of 6 * {expected}");
    }
    assert_eq!(l.ram_bytes, l.beside_bytes + l.gpu_bytes);
    let of_host = l.beside_bytes as f64 / (l.beside_bytes + l.gpu_fetched_bytes) as f64;
    assert!((of_host - part).abs() < 0.05, "{of_host} {part}");
    session.measure_ceilings(&|| false).unwrap();
    let l = session.links();
    assert!(l.compute_s.is_none() && l.chain_s.is_some_and(|s| s > 6.0 * 30e-6), "{l:?}");
    assert_eq!(l.roofline().map(|r| r.1), Some("chain"), "{l:?}");
    let p = session.predicted().expect("all rates are there");
    assert!(1.0 / p.pass.seconds <= l.roofline().unwrap().0 * 1.05 && p.pass.beside_bytes > 0.0, "{p:?}");
}

/// Guards against memory that is given back while it is copied to ([`Owned`] looks).
#[test]
fn a_session_that_ends_at_once_waits_for_its_copies() {
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&tiny(6).write(d.path(), "m.gguf")).unwrap();
    for pause in 0..20 {
        let memory = Arc::new(Memory::default());
        let o = Options { tiers: Some(Tiers { a: 1, b: 3, c: 2 }), ..options() };
        let session = start(&opened, o, &memory).unwrap();
        std::thread::sleep(Duration::from_micros(50 * pause));
        drop(session);
        assert_eq!(*memory.used.lock().unwrap(), 0);
    }
}

#[test]
fn memory_that_is_refused_shrinks_tier_a() {
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&tiny(6).write(d.path(), "m.gguf")).unwrap();
    let memory = Arc::new(Memory { taken: TOTAL - (700 << 10), ..Memory::default() });
    let mut session = start(&opened, options(), &memory).unwrap();
    assert!(session.notes().iter().any(|n| n.contains("was refused")), "{:?}", session.notes());
    assert!(session.homes().contains(&nt::plan::Home::A) && session.homes().contains(&nt::plan::Home::B));
    let want = logits(&mut Session::new(&opened, options(), &mut |_, _| ()).unwrap()).unwrap();
    assert!(logits(&mut session).unwrap() == want);

    let o = Options { vram: Some(100 << 10), ..options() };
    let e = start(&opened, o, &memory).err().unwrap().to_string();
    assert!(e.contains("VRAM is too small"), "{e}");
}

/// With processors beside the second memory, which compute from RAM what rests there: the bits are theirs, since here both
/// sites have the same kernels, and each part in RAM is computed once a token that is generated.
#[test]
fn two_sites() {
    let d = tempfile::tempdir().unwrap();
    for (path, routed) in
        [(tiny(6).write(d.path(), "m.gguf"), false), (common::tiny_moe(6).write(d.path(), "e.gguf"), true)]
    {
        let opened = Opened::open(&path).unwrap();
        let want = logits(&mut Session::new(&opened, options(), &mut |_, _| ()).unwrap()).unwrap();
        let mut handed = HashSet::new();
        for (o, shares) in placements().into_iter().flat_map(|o| [(o.clone(), false), (o, true)]) {
            let memory = Arc::new(Memory { shares, ..Memory::default() });
            let what = format!("{:?} {:?} {:?} {:?}, shares {shares}", o.tiers, o.n_buffers, o.vram, o.ram);
            let mut session = start(&opened, Options { sites: Sites::Both, ..o }, &memory).unwrap();
            for _ in 0..2 {
                assert!(logits(&mut session).unwrap() == want, "{what}");
            }
            let in_ram = |(home, unit): (&Home, &UnitSpec)| {
                *home == Home::B && matches!(unit.kind, UnitKind::FeedForward(_) | UnitKind::Expert { .. })
            };
            let parts = session.homes().iter().zip(&opened.model.units).filter(|u| in_ram(*u)).count() as u64;
            let n = *memory.handed.lock().unwrap();
            // Ten tokens were generated; of experts in RAM, those that they chose.
            assert!(if routed { (n > 0) == (parts > 0) } else { n == 10 * parts }, "{what}: {n} for {parts}");
            handed.insert(n);
            drop(session);
            assert_eq!(*memory.used.lock().unwrap(), 0, "{what}");
        }
        assert!(handed.len() > 3, "{handed:?}");
    }
}

/// A device keeps the experts that were chosen last in slots: the bits are the same with whatever there is in them, after passes that
/// were given up at any stage, of one row and of several; and a routing that is forced is the one that is computed.
#[test]
fn experts_in_slots() {
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&common::many_experts(6).write(d.path(), "m.gguf")).unwrap();
    let mixture = nt::engine::mixture(&opened.model);
    let routing = |seed| Arc::new(ForcedRouting::new(mixture, Routes::Zipf(1.0), seed).unwrap());
    let of_cpu = |routing: Option<Arc<ForcedRouting>>| {
        logits(&mut Session::new(&opened, Options { routing, ..options() }, &mut |_, _| ()).unwrap()).unwrap()
    };
    let (free, forced) = (of_cpu(None), of_cpu(Some(routing(3))));
    assert!(free != forced);
    let mut kept = 0;
    for vram in [1800, 2600, 3600, 5000].map(|kib| kib << 10) {
        for sites in [Sites::Auto, Sites::Both] {
            let o = Options { vram: Some(vram), sites, expert_slots: ExpertSlots::On, ..options() };
            let memory = Arc::new(Memory { ahead: true, shares: true, ..Memory::default() });
            let mut session = start(&opened, o.clone(), &memory).unwrap();
            let slots = session.device_caches().to_vec();
            kept += usize::from(!slots.is_empty());
            assert!(slots.iter().all(|c| c.slots >= mixture.used && c.slots < mixture.experts));
            for _ in 0..3 {
                assert!(logits(&mut session).unwrap() == free, "{vram} {sites:?}");
            }
            let filled = *memory.slots_filled.lock().unwrap();
            for after in 0..14 {
                let asked = std::cell::Cell::new(0);
                let stop = || asked.replace(asked.get() + 1) >= after;
                session.truncate(3);
                let _ = session.eval(&[7 + after], Class::Exact, Outputs::Last, &stop);
                session.truncate(3);
                let _ = session.eval(&[7, 9, 11 + after], Class::Exact, Outputs::Last, &|| false);
                assert!(logits(&mut session).unwrap() == free, "{vram} {sites:?}, given up after {after}");
            }
            assert_eq!(
                filled > 0,
                !slots.is_empty() && session.part_of_choices().is_none_or(|part| part < 1.0),
                "{vram} {sites:?}"
            );
            let used = |session: &mut Session| {
                let before = session.expert_uses();
                assert!(logits(session).unwrap() == free, "{vram} {sites:?}");
                session.expert_uses().since(&before)
            };
            let warm = used(&mut session);
            session.empty_caches().unwrap();
            let cold = used(&mut session);
            assert_eq!(warm.slot_uses, cold.slot_uses);
            assert_eq!(cold.slot_hits < warm.slot_hits, filled > 0, "{vram} {sites:?}: {warm:?} {cold:?}");
            let beside = session.beside_work();
            assert!(beside.slot_hits <= beside.slot_uses && (beside.slot_hits > 0) == (filled > 0));
            drop(session);
            let mut session = start(&opened, Options { routing: Some(routing(3)), ..o.clone() }, &memory).unwrap();
            assert!(logits(&mut session).unwrap() == forced, "{vram} {sites:?}, forced");
            drop(session);
            // Slots are for experts that both sites compute; where there are none, it is said.
            {
                let session = start(&opened, Options { sites: Sites::One, ..o }, &memory).unwrap();
                let said = session.notes().iter().any(|n| n.contains("--expert-cache on"));
                assert!(session.device_caches().is_empty());
                assert_eq!(
                    said,
                    session.homes().iter().zip(&opened.model.units).any(|(h, u)| *h != Home::A && u.is_expert())
                );
            }
            assert_eq!(*memory.used.lock().unwrap(), 0);
        }
    }
    assert!(kept > 2, "{kept}");
}

/// Guards against a pass that waits for ever for the rest of one that was given up.
#[test]
fn two_sites_go_on_after_a_pass_that_was_given_up_and_end_with_the_device() {
    let d = tempfile::tempdir().unwrap();
    let (dense, routed) = (tiny(6).write(d.path(), "m.gguf"), common::tiny_moe(6).write(d.path(), "e.gguf"));
    for (path, shares) in [(&dense, false), (&routed, false), (&routed, true)] {
        let opened = Opened::open(path).unwrap();
        let o = Options { tiers: Some(Tiers { a: 1, b: 3, c: 2 }), sites: Sites::Both, ..options() };
        let new = || Arc::new(Memory { shares, ..Memory::default() });
        let memory = new();
        let mut session = start(&opened, o.clone(), &memory).unwrap();
        let want = logits(&mut session).unwrap();
        for after in 0..14 {
            let asked = std::cell::Cell::new(0);
            let stop = || asked.replace(asked.get() + 1) >= after;
            session.truncate(0);
            session.eval(&[1, 2, 3], Class::Bulk, Outputs::Last, &|| false).unwrap();
            let stopped = session.eval(&[7], Class::Exact, Outputs::Last, &stop);
            assert_eq!(stopped.is_err(), asked.get() > after, "after {after}");
            assert!(logits(&mut session).unwrap() == want, "after {after}");
        }
        for calls in 0..60 {
            let memory = new();
            let mut session = start(&opened, o.clone(), &memory).unwrap();
            logits(&mut session).unwrap();
            *memory.gone_in.lock().unwrap() = Some(calls);
            let e = (0..9).find_map(|_| logits(&mut session).err()).expect("nine passes without a device").to_string();
            assert!(e.contains("the device is gone"), "{calls}: {e}");
            drop(session);
            assert_eq!(*memory.used.lock().unwrap(), 0, "{calls}");
        }
    }
}

/// Guards against hangs on a device whose operations are called ahead: nothing may wait for it while it waits for an answer,
/// after passes with and without logits, of one row and of several, given up anywhere, or ended by a panic.
#[test]
fn a_device_that_is_called_ahead_is_never_waited_for_in_vain() {
    let d = tempfile::tempdir().unwrap();
    let (dense, routed) = (tiny(6).write(d.path(), "m.gguf"), common::tiny_moe(6).write(d.path(), "e.gguf"));
    for (path, shares) in [(&dense, false), (&routed, false), (&routed, true)] {
        let opened = Opened::open(path).unwrap();
        let cpu = |tokens: &[u32]| {
            let mut session = Session::new(&opened, options(), &mut |_, _| ()).unwrap();
            session.eval(&[1, 2, 3], Class::Bulk, Outputs::None, &|| false).unwrap();
            session.eval(tokens, Class::Exact, Outputs::All, &|| false).unwrap();
            session.logits().unwrap().to_vec()
        };
        let want = logits(&mut Session::new(&opened, options(), &mut |_, _| ()).unwrap()).unwrap();
        // Attention and cache in the second memory, so that no frame is used behind its release.
        let mut stayed = 0;
        let limits: &[u64] = if path == &dense { &[650, 700] } else { &[650, 700, 800, 900] };
        for vram in limits.iter().map(|kib| kib << 10) {
            let o = Options { vram: Some(vram), sites: Sites::Both, ..options() };
            let memory = Arc::new(Memory { ahead: true, shares, ..Memory::default() });
            let mut session = start(&opened, o.clone(), &memory).unwrap();
            assert!(logits(&mut session).unwrap() == want, "{vram}");
            assert!(*memory.handed.lock().unwrap() > 0, "{vram}");
            assert!((*memory.shared.lock().unwrap() > 0) == shares, "{vram}");
            // Where nothing is brought and no answer of a router is waited for, passes of one token are recorded, with what
            // processors compute in them.
            let repeats = || *memory.repeated.lock().unwrap();
            let first = repeats();
            let in_place = |(home, unit): (&Home, &UnitSpec)| match unit.kind {
                UnitKind::FeedForward(_) | UnitKind::Expert { .. } => *home != Home::C,
                _ => *home == Home::A,
            };
            let stays = session.homes().iter().zip(&opened.model.units).all(in_place);
            stayed += u32::from(stays);
            assert_eq!(first > 0, stays && (shares || path == &dense), "{vram}");
            assert!(logits(&mut session).unwrap() == want, "{vram}, repeated");
            assert_eq!(repeats() - first, if first > 0 { 5 } else { 0 }, "{vram}");
            for rows in [1, 2, 3, 8] {
                let tokens: Vec<u32> = (0..rows).map(|i| 7 + i * 31).collect();
                session.truncate(0);
                session.eval(&[1, 2, 3], Class::Bulk, Outputs::None, &|| false).unwrap();
                session.eval(&tokens, Class::Exact, Outputs::None, &|| false).unwrap();
                session.truncate(3);
                session.eval(&tokens, Class::Exact, Outputs::All, &|| false).unwrap();
                assert!(session.logits().unwrap() == cpu(&tokens), "{vram}, {rows} rows");
            }
            for after in 0..14 {
                let asked = std::cell::Cell::new(0);
                let stop = || asked.replace(asked.get() + 1) >= after;
                session.truncate(3);
                let _ = session.eval(&[7], Class::Exact, Outputs::Last, &stop);
                assert!(logits(&mut session).unwrap() == want, "after {after}");
            }
            for part in (1..9).chain([11, 15]) {
                let memory = Arc::new(Memory {
                    ahead: true,
                    shares,
                    panics_at: Arc::new(Mutex::new(part)),
                    ..Memory::default()
                });
                let mut session = start(&opened, o.clone(), &memory).unwrap();
                let e = logits(&mut session).unwrap_err().to_string();
                assert!(e.contains("a processor panics"), "part {part}: {e}");
                assert!(logits(&mut session).unwrap() == want, "part {part}");
                drop(session);
                assert_eq!(*memory.used.lock().unwrap(), 0, "part {part}");
            }
        }
        assert!(stayed > 0, "{path:?}");
    }
}

/// The same id is the same sites, whatever else is free and whatever caches hold; what would give others is refused.
#[test]
fn a_plan_is_made_again_by_its_id() {
    let d = tempfile::tempdir().unwrap();
    let (dense, routed) = (tiny(6).write(d.path(), "m.gguf"), common::tiny_moe(6).write(d.path(), "e.gguf"));
    let many = common::many_experts(6).write(d.path(), "c.gguf");
    let rooms = |vram: u64, ram: u64| Options { vram: Some(vram << 10), ram: Some(ram << 10), ..options() };
    let tiers = Options { tiers: Some(Tiers { a: 1, b: 3, c: 2 }), n_buffers: Some(3), ..options() };
    let (mut divided, mut cached) = (0, 0);
    for (path, o) in [
        (&dense, rooms(700, 64 << 10)),
        (&routed, rooms(700, 64 << 10)),
        (&routed, rooms(800, 1200)),
        (&dense, tiers.clone()),
        (&routed, tiers),
        (&many, rooms(1 << 10, 4 << 10)),
    ] {
        let opened = Opened::open(path).unwrap();
        for sites in [Sites::Auto, Sites::Both] {
            let memory = || Arc::new(Memory { shares: true, ..Memory::default() });
            let first = memory();
            let what = format!("{} {sites:?} {:?} {:?} {:?}", path.display(), o.tiers, o.vram, o.ram);
            let mut session =
                start(&opened, Options { sites, ..o.clone() }, &first).unwrap_or_else(|e| panic!("{what}: {e}"));
            let recipe = session.recipe().clone();
            let of = |s: &Session| {
                (s.recipe().id(), s.beside(), s.part_of_choices(), s.homes().to_vec(), s.caches().to_vec())
            };
            let (want, cold) = (of(&session), logits(&mut session).unwrap());
            let work = |m: &Memory| (*m.handed.lock().unwrap(), *m.shared.lock().unwrap());
            let done = work(&first);
            assert!(logits(&mut session).unwrap() == cold, "{what}: warm");
            // Parts that were handed over, and choices that processors had: as many with caches that are warm.
            assert_eq!(work(&first), (2 * done.0, 2 * done.1), "{what}");
            divided += usize::from(want.2.is_some());
            cached += usize::from(!want.4.is_empty());
            drop(session);

            // All of the second memory is free, and RAM is what it is.
            let again = |ram| Options { sites: Sites::Auto, repeat: Some(Arc::new(recipe.clone())), ram, ..options() };
            for ram in [None, Some(64 << 20)] {
                let second = memory();
                let mut session = start(&opened, again(ram), &second).unwrap_or_else(|e| panic!("{what}: {e}"));
                assert!(of(&session) == want, "{what}");
                assert!(logits(&mut session).unwrap() == cold, "{what}: {ram:?}");
                assert_eq!(work(&second), done, "{what}");
            }
            let refused = |o: Options, opened: &Opened, words: &str| {
                let e = start(opened, o, &memory()).err().unwrap_or_else(|| panic!("{what}: {words}")).to_string();
                assert!(e.contains(&want.0) && e.contains(words), "{what}: {e}");
            };
            refused(Options { vram: Some(560 << 10), ..again(None) }, &opened, "of VRAM");
            let other = Opened::open(if path == &dense { &routed } else { &dense }).unwrap();
            refused(again(None), &other, "another shape");
            // Who looks on changes nothing.
            let second = memory();
            let mut session = start(&opened, Options { timeline: true, ..again(None) }, &second).unwrap();
            assert!(of(&session) == want && logits(&mut session).unwrap() == cold, "{what}: with a timeline");
            assert_eq!(work(&second), done, "{what}: with a timeline");
        }
    }
    assert!(divided > 0 && cached > 0, "{divided} {cached}");
}

//! The simulated world: storage, the copying thread, the device's two streams, and who computes.

use std::collections::VecDeque;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::share::{Demand, speeds};
use super::{Outcome, PassWork, Setup, Shares};
use crate::pipeline::{Acquire, Event, EventKind, Kept, Ring, Step};
use crate::plan::{COPY_TRANSFERS, Home, UnitPart};

/// Copies that are started beyond the one that runs (as in `pipeline::uploads`).
const COPIES_AHEAD: usize = 1;

/// Share of storage's rate that one unit alone reaches where reads are copies by processors that have nothing
/// else to do (H100, /dev/shm: 16.6 GB/s with two buffers, of which one is being copied from, and 21.9 with
/// both being read into).
const COPIED_ALONE: f64 = 0.75;

/// Share of the processors that copies at storage's full rate take: two of them copy at 9.9 GB/s and compute
/// six blocks of an 8B in 43 ms, and do both in 111 ms instead of 121 (docs/benchmarks.md).
const COPY_PROCESSORS: f64 = 0.85;

/// Most of RAM's rate that a drive may take.
const READ_SHARE_MAX: f64 = 0.9;

/// Something that runs, alone of its kind.
#[derive(Clone, Copy, Debug)]
struct Running {
    unit: Option<usize>,
    slot: usize,
    began: f64,
    /// Seconds left at full speed.
    left: f64,
    demand: Demand,
}

/// A copy that was handed to the device.
#[derive(Clone, Copy, Debug)]
struct Copy {
    unit: usize,
    slot: usize,
    staged: Option<usize>,
    /// It waits until so many computes have ended.
    after_computes: u64,
}

/// A compute that was called.
#[derive(Clone, Copy, Debug)]
struct Compute {
    unit: Option<usize>,
    slot: usize,
    seconds: f64,
    /// It waits until so many copies have ended.
    after_copies: u64,
}

/// What the copying thread is at.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Copier {
    Look,
    /// Wants a unit that is read; `landing`: it waits for its copies first.
    Take {
        unit: usize,
        slot: usize,
        landing: bool,
    },
    /// Waits for the oldest copy; then who computes is told of the last one, into `called`.
    Land {
        called: Option<usize>,
    },
}

/// What whoever computes does next.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Do {
    Compute(usize),
    /// Waits for the router, then chooses experts among the units after this one.
    Route(usize),
    /// The logits.
    Beside,
}

pub(super) struct World<'a> {
    setup: &'a Setup,
    now: f64,
    staging: Ring,
    /// The ring in VRAM.
    device: Option<Ring>,
    holes: bool,
    storage_holes: bool,
    rng: ChaCha8Rng,

    reads: VecDeque<(usize, usize)>,
    reading: Option<Running>,

    copier: Copier,
    flying: VecDeque<Copy>,
    copies: VecDeque<Copy>,
    copying: Option<Running>,
    copies_called: u64,
    copies_done: u64,
    /// Copies whose end the copying thread has seen.
    landed: u64,
    /// By device slot: the last copy into it, and the last compute from it, counted from 1.
    slot_copy: Vec<u64>,
    slot_compute: Vec<u64>,

    program: VecDeque<Do>,
    computes: VecDeque<Compute>,
    computing: Option<Running>,
    computes_called: u64,
    computes_done: u64,
    /// A staging slot that processors compute from.
    held: Option<usize>,

    /// Without wrap-around: reads and copies that may still start in this pass.
    reads_left: usize,
    copies_left: usize,
    shares: Shares,
    events: Vec<Event>,
}

impl<'a> World<'a> {
    pub fn new(setup: &'a Setup) -> World<'a> {
        let units = &setup.units;
        let streamed = |i: usize| setup.on_device && units[i].home != Home::A;
        let on_storage = |i: usize| units[i].home == Home::C;
        let experts = |wanted: &dyn Fn(usize) -> bool| (0..units.len()).any(|i| units[i].size.routed() && wanted(i));
        let demand_max = most_experts(setup);
        let (holes, storage_holes) = (experts(&|i| streamed(i) || on_storage(i)), experts(&on_storage));
        let ring = |buffers: usize, attention: bool, steps: Vec<Step>| {
            let units = units.iter().map(|u| attention && u.size.part == UnitPart::Attention).collect();
            let slots = if attention { buffers } else { 0 };
            Ring::new(buffers + slots, steps, demand_max).keeping(Kept { slots, units })
        };
        let staging_steps = schedule(setup, &on_storage, storage_holes);
        let staging = ring(setup.staging_slots, setup.staging_attention, staging_steps);
        let device = setup.on_device.then(|| {
            let steps = schedule(setup, &streamed, holes);
            let reads = steps.iter().any(|s| matches!(s, Step::Unit(u) if on_storage(*u)));
            let ring = ring(setup.device_slots, setup.device_attention, steps);
            if reads || storage_holes { ring.in_strict_order() } else { ring }
        });
        World {
            setup,
            now: 0.0,
            staging,
            device,
            holes,
            storage_holes,
            rng: ChaCha8Rng::seed_from_u64(setup.seed),
            reads: VecDeque::new(),
            reading: None,
            copier: Copier::Look,
            flying: VecDeque::new(),
            copies: VecDeque::new(),
            copying: None,
            copies_called: 0,
            copies_done: 0,
            landed: 0,
            slot_copy: vec![0; 2 * setup.device_slots],
            slot_compute: vec![0; 2 * setup.device_slots],
            program: VecDeque::new(),
            computes: VecDeque::new(),
            computing: None,
            computes_called: 0,
            computes_done: 0,
            held: None,
            reads_left: usize::MAX,
            copies_left: usize::MAX,
            shares: Shares::default(),
            events: Vec::new(),
        }
    }

    pub fn run(mut self, passes: &[&PassWork]) -> Outcome {
        let mut done = Vec::with_capacity(passes.len());
        for pass in passes {
            let began = self.now;
            self.begin(pass);
            loop {
                self.settle(pass);
                if self.program.is_empty() && self.computes_done == self.computes_called {
                    break;
                }
                if !self.advance() {
                    // Nothing runs and nothing can start: a setup without the slots that it needs.
                    break;
                }
            }
            self.shares.seconds = self.now - began;
            done.push(std::mem::take(&mut self.shares));
        }
        Outcome { passes: done, events: self.events }
    }

    fn begin(&mut self, pass: &PassWork) {
        let units = &self.setup.units;
        self.program.clear();
        for (i, _) in units.iter().enumerate().filter(|(_, u)| !u.size.routed()) {
            self.program.push_back(Do::Compute(i));
            if units.get(i + 1).is_some_and(|next| next.size.routed()) {
                self.program.push_back(Do::Route(i));
            }
        }
        self.program.push_back(Do::Beside);
        if !self.setup.wrap {
            let of = |wanted: &dyn Fn(Home) -> bool| {
                let shared = units.iter().filter(|u| !u.size.routed() && wanted(u.home)).count();
                let experts = units.iter().filter(|u| u.size.routed() && wanted(u.home)).count();
                shared + experts.min(pass.experts * units.len())
            };
            self.reads_left = of(&|h| h == Home::C);
            self.copies_left = of(&|h| h != Home::A);
        }
    }

    /// Lets everything happen that takes no time.
    fn settle(&mut self, pass: &PassWork) {
        loop {
            let mut moved = self.read_on();
            // The copying thread is through with its turn before a thread that it wakes has looked.
            while self.copy_on() {
                moved = true;
            }
            moved |= self.compute_on(pass);
            moved |= self.start();
            if !moved {
                return;
            }
        }
    }

    fn read_on(&mut self) -> bool {
        let mut moved = false;
        while self.reads_left > 0
            && let Some((unit, slot)) = self.staging.next_read()
        {
            self.reads.push_back((unit, slot));
            self.reads_left -= 1;
            moved = true;
        }
        moved
    }

    /// The copying thread (`pipeline::uploads`).
    fn copy_on(&mut self) -> bool {
        let Some(ring) = &mut self.device else { return false };
        match self.copier {
            Copier::Look => {
                let next = if self.copies_left > 0 { ring.next_read() } else { None };
                match next {
                    Some((unit, slot)) => {
                        self.copies_left -= 1;
                        if self.setup.units[unit].home == Home::C {
                            self.copier = Copier::Take { unit, slot, landing: false };
                        } else {
                            self.call_copy(unit, slot, None);
                        }
                        true
                    }
                    None if self.flying.is_empty() => false,
                    None => {
                        self.copier = Copier::Land { called: None };
                        true
                    }
                }
            }
            Copier::Take { landing: true, unit, slot } => {
                let moved = self.land();
                if self.flying.is_empty() {
                    self.copier = Copier::Take { landing: false, unit, slot };
                    return true;
                }
                moved
            }
            Copier::Take { unit, slot, .. } => match self.staging.acquire(unit) {
                Acquire::Ready(staged) => {
                    self.call_copy(unit, slot, Some(staged));
                    true
                }
                _ if self.flying.is_empty() => false,
                _ => {
                    self.copier = Copier::Take { unit, slot, landing: true };
                    true
                }
            },
            Copier::Land { called } => {
                let moved = self.land();
                if moved && self.flying.len() <= COPIES_AHEAD + 1 {
                    self.tell(called);
                }
                moved
            }
        }
    }

    fn call_copy(&mut self, unit: usize, slot: usize, staged: Option<usize>) {
        self.copies_called += 1;
        self.slot_copy[slot] = self.copies_called;
        let copy = Copy { unit, slot, staged, after_computes: self.slot_compute[slot] };
        self.copies.push_back(copy);
        self.flying.push_back(copy);
        if self.flying.len() > COPIES_AHEAD + 1 {
            self.copier = Copier::Land { called: Some(slot) };
        } else {
            self.tell(Some(slot));
        }
    }

    /// Tells the compute side that this slot's copy has been queued.
    fn tell(&mut self, called: Option<usize>) {
        if let (Some(ring), Some(slot)) = (&mut self.device, called) {
            ring.read_done(slot, true);
        }
        self.copier = Copier::Look;
    }

    /// Sees the end of the oldest copy, if it has come.
    fn land(&mut self) -> bool {
        if self.landed == self.copies_done {
            return false;
        }
        let Some(copy) = self.flying.pop_front() else { return false };
        self.landed += 1;
        if let Some(staged) = copy.staged {
            self.staging.release(staged);
        }
        true
    }

    /// Who calls computing (`model::forward`).
    fn compute_on(&mut self, pass: &PassWork) -> bool {
        let idle = self.computes_done == self.computes_called;
        if idle && let Some(slot) = self.held.take() {
            self.staging.release(slot);
            return true;
        }
        match self.program.front().copied() {
            None => false,
            Some(Do::Compute(unit)) => {
                let called = self.call_compute(unit, pass.unit_s[unit]);
                if called {
                    self.program.pop_front();
                }
                called
            }
            Some(Do::Route(shared)) if idle => {
                self.program.pop_front();
                self.route(shared, pass.experts);
                true
            }
            Some(Do::Beside) if idle => {
                self.program.pop_front();
                self.push_compute(Compute { unit: None, slot: 0, seconds: pass.beside_s, after_copies: 0 });
                true
            }
            Some(_) => false,
        }
    }

    fn push_compute(&mut self, c: Compute) {
        self.computes_called += 1;
        self.computes.push_back(c);
    }

    fn call_compute(&mut self, unit: usize, seconds: f64) -> bool {
        let resident = Compute { unit: Some(unit), slot: 0, seconds, after_copies: 0 };
        match (self.setup.units[unit].home, &mut self.device) {
            (Home::A, _) => self.push_compute(resident),
            (_, Some(ring)) => {
                let Acquire::Ready(slot) = ring.acquire(unit) else { return false };
                ring.release(slot);
                self.push_compute(Compute { slot, after_copies: self.slot_copy[slot], ..resident });
                self.slot_compute[slot] = self.computes_called;
            }
            // Processors compute before the call returns.
            (_, None) if self.computes_done < self.computes_called => return false,
            (Home::B, None) => self.push_compute(resident),
            (Home::C, None) => {
                let Acquire::Ready(slot) = self.staging.acquire(unit) else { return false };
                self.held = Some(slot);
                self.push_compute(Compute { slot, ..resident });
            }
        }
        true
    }

    /// Chooses experts of the block whose shared part is `shared`; resident ones are computed first.
    fn route(&mut self, shared: usize, experts: usize) {
        let units = &self.setup.units;
        let n = units[shared + 1..].iter().take_while(|u| u.size.routed()).count();
        let mut of: Vec<usize> = (shared + 1..=shared + n).collect();
        for i in 0..experts.min(n) {
            let j = self.rng.random_range(i..n);
            of.swap(i, j);
        }
        of.truncate(experts.min(n));
        let resident = |u: usize| match units[u].home {
            Home::A => true,
            Home::B => self.device.is_none(),
            Home::C => false,
        };
        of.sort_unstable_by_key(|&u| (!resident(u), u));
        let streamed: Vec<usize> = of.iter().copied().filter(|&u| !resident(u)).collect();
        if self.storage_holes {
            let read: Vec<usize> = streamed.iter().copied().filter(|&u| units[u].home == Home::C).collect();
            self.staging.demand(&read);
        }
        if self.holes
            && let Some(ring) = &mut self.device
        {
            ring.demand(&streamed);
        }
        for u in of.into_iter().rev() {
            self.program.push_front(Do::Compute(u));
        }
    }

    /// Starts what may start.
    fn start(&mut self) -> bool {
        let mut moved = false;
        let rates = &self.setup.rates;
        let bytes = |u: usize| self.setup.units[u].size.slot_bytes as f64;
        let running = |unit, slot, left: f64, demand| Some(Running { unit, slot, began: self.now, left, demand });
        if self.reading.is_none()
            && let Some((unit, slot)) = self.reads.pop_front()
        {
            let n = rates.nvme.unwrap_or(f64::INFINITY);
            let demand = if rates.copies { [COPY_TRANSFERS * n, COPY_PROCESSORS] } else { [n, 0.0] };
            self.reading = running(Some(unit), slot, bytes(unit) / n, finite(demand));
            moved = true;
        }
        if self.copying.is_none()
            && self.copies.front().is_some_and(|c| c.after_computes <= self.computes_done)
            && let Some(c) = self.copies.pop_front()
        {
            let g = rates.gpu.unwrap_or(f64::INFINITY);
            let seconds = bytes(c.unit) / g + self.setup.copy_gap_s;
            self.copying = running(Some(c.unit), c.slot, seconds, finite([bytes(c.unit) / seconds, 0.0]));
            moved = true;
        }
        if self.computing.is_none()
            && self.computes.front().is_some_and(|c| c.after_copies <= self.copies_done)
            && let Some(c) = self.computes.pop_front()
        {
            let on_processors = !self.setup.on_device && c.unit.is_some() && c.seconds > 0.0;
            let rate = c.unit.map_or(0.0, |u| bytes(u) / c.seconds);
            let demand = if on_processors { [rate, 1.0] } else { [0.0; 2] };
            self.computing = running(c.unit, c.slot, c.seconds, demand);
            moved = true;
        }
        moved
    }

    /// Lets time pass until something ends; `false` if nothing runs.
    fn advance(&mut self) -> bool {
        let all = [self.reading, self.copying, self.computing];
        let speeds = self.speeds(&all);
        let ends = |i: usize| all[i].map_or(f64::INFINITY, |r| r.left / speeds[i]);
        let step = (0..3).map(ends).fold(f64::INFINITY, f64::min);
        if !step.is_finite() {
            return false;
        }
        self.count(step, &all, &speeds);
        self.now += step;
        for (i, r) in [&mut self.reading, &mut self.copying, &mut self.computing].into_iter().enumerate() {
            if let Some(r) = r {
                r.left = if ends(i) <= step { 0.0 } else { r.left - step * speeds[i] };
            }
        }
        self.end();
        true
    }

    /// How fast the read, the copy and the compute that run go.
    fn speeds(&self, all: &[Option<Running>; 3]) -> [f64; 3] {
        let mut demands = all.map(|r| r.map(|r| r.demand));
        let ram = self.setup.rates.ram.unwrap_or(f64::INFINITY);
        if self.setup.rates.copies {
            let mut speeds = speeds(&demands, [ram, 1.0]);
            if self.setup.on_device && self.reads.is_empty() {
                speeds[0] = speeds[0].min(COPIED_ALONE);
            }
            return speeds;
        }
        // A drive writes to memory at its own pace, far below memory's; others share the rest.
        let read = demands[0].take().map_or(0.0, |d| d[0]);
        let read_speed = if read > 0.0 { (READ_SHARE_MAX * ram / read).min(1.0) } else { 1.0 };
        let mut speeds = speeds(&demands, [ram - read * read_speed, 1.0]);
        speeds[0] = read_speed;
        speeds
    }

    /// Adds `step` seconds to what they were spent on.
    fn count(&mut self, step: f64, all: &[Option<Running>; 3], speeds: &[f64; 3]) {
        let s = &mut self.shares;
        let ram: f64 = all.iter().zip(speeds).map(|(r, v)| r.map_or(0.0, |r| r.demand[0] * v)).sum();
        s.ram_bytes += ram * step;
        for (busy, running) in [&mut s.nvme_busy, &mut s.gpu_busy, &mut s.compute_busy].into_iter().zip(all) {
            if running.is_some() {
                *busy += step;
            }
        }
        match all[2] {
            Some(Running { unit: None, .. }) => {
                s.compute_busy -= step;
                s.wait_pass += step;
            }
            Some(_) => {}
            None => {
                let copied = all[1].is_some_and(|copy| match (self.computes.front(), self.program.front()) {
                    (Some(Compute { unit: Some(u), .. }), _) | (None, Some(Do::Compute(u))) => copy.unit == Some(*u),
                    _ => false,
                });
                *if copied || all[0].is_none() { &mut s.wait_gpu } else { &mut s.wait_nvme } += step;
            }
        }
    }

    /// Tells the rings what has ended.
    fn end(&mut self) {
        let over = |r: &mut Option<Running>| r.take_if(|r| r.left <= 0.0);
        let now = self.now;
        let event = |kind, r: &Running, unit| Event {
            kind,
            unit,
            slot: r.slot,
            start_ns: (r.began * 1e9) as u64,
            end_ns: (now * 1e9) as u64,
        };
        if let Some(r) = over(&mut self.reading) {
            self.staging.read_done(r.slot, true);
            self.events.extend(r.unit.map(|u| event(EventKind::Read, &r, u)));
        }
        if let Some(r) = over(&mut self.copying) {
            self.copies_done += 1;
            self.events.extend(r.unit.map(|u| event(EventKind::Copy, &r, u)));
        }
        if let Some(r) = over(&mut self.computing) {
            self.computes_done += 1;
            self.events.extend(r.unit.map(|u| event(EventKind::Compute, &r, u)));
        }
    }
}

/// A link that takes no time asks for nothing.
fn finite(demand: Demand) -> Demand {
    demand.map(|d| if d.is_finite() { d } else { 0.0 })
}

/// Most experts of a block.
fn most_experts(setup: &Setup) -> usize {
    let runs = setup.units.chunk_by(|a, b| a.size.block == b.size.block);
    runs.map(|r| r.iter().filter(|u| u.size.routed()).count()).max().unwrap_or(0)
}

/// Streamed units in pass order, with a hole before the experts of each block where experts are streamed.
fn schedule(setup: &Setup, streamed: &dyn Fn(usize) -> bool, holes: bool) -> Vec<Step> {
    let mut steps = Vec::new();
    for (i, _) in setup.units.iter().enumerate().filter(|(_, u)| !u.size.routed()) {
        if streamed(i) {
            steps.push(Step::Unit(i));
        }
        if holes && setup.units.get(i + 1).is_some_and(|next| next.size.routed()) {
            steps.push(Step::Hole);
        }
    }
    steps
}

//! The simulated world around [`Frames`]: storage, the device's two streams, and the compute thread.

use std::collections::VecDeque;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::share::{Demand, speeds};
use super::{EXPERT_GAP_S, Outcome, PassWork, Setup, Shares, SimCache};
use crate::flow::{COPIES_MAX, Frames, Hold, Move, Place, Policy, PoolSpec, Rank, Spec, Step, links};
use crate::pipeline::{Event, EventKind};
use crate::plan::hits::held;
use crate::plan::{COPY_TRANSFERS, Home, UnitPart};

/// The links of the machine.
const STORAGE: usize = 0;
const COPIES: usize = 1;

/// Share of storage's rate that one unit alone reaches where reads are copies by processors that have nothing
/// else to do (H100, /dev/shm: 16.6 GB/s with two buffers, of which one is being copied from, and 21.9 with
/// both being read into).
const COPIED_ALONE: f64 = 0.75;

/// Share of the processors that copies at storage's full rate take: two of them copy at 9.9 GB/s and compute
/// six blocks of an 8B in 43 ms, and do both in 111 ms instead of 121 (docs/benchmarks.md).
const COPY_PROCESSORS: f64 = 0.85;

/// Share of their rate that processors beside a device keep while others copy what is read: 40 of 97 GB/s, with 4 and with 8 of 16
/// parts of 8B Q8_0 on /dev/shm of an H200's machine. Their threads meet after each product, so that all wait for those whose
/// processor copies.
const BESIDE_COPIES: f64 = 0.42;

/// Most of RAM's rate that a drive may take.
const READ_SHARE_MAX: f64 = 0.9;

/// Tokens before the first that is simulated, which have filled caches.
const TOKENS_BEFORE: u64 = 512;

/// Something that runs, alone of its kind.
#[derive(Clone, Copy, Debug)]
struct Running {
    unit: Option<usize>,
    slot: usize,
    /// What it carries.
    carries: Option<Move>,
    began: f64,
    /// Seconds left at full speed.
    left: f64,
    demand: Demand,
    /// Bytes of RAM a second, where they are counted and bind nothing.
    counted: f64,
}

/// A copy that was queued on the device.
#[derive(Clone, Copy, Debug)]
struct Copy {
    unit: usize,
    /// What it carries to a frame; none of an expert that was asked for when it was chosen, which lands apart.
    carries: Option<Move>,
    /// It waits until so many computes have ended.
    after_computes: u64,
    /// It waits until so many parts beside the device have ended, hand-overs among them.
    after_beside: u64,
}

/// A compute that was called.
#[derive(Clone, Copy, Debug)]
struct Compute {
    unit: Option<usize>,
    slot: usize,
    seconds: f64,
    /// It waits until so many copies have ended.
    after_copies: u64,
    /// It waits until so many parts beside the device have ended.
    after_beside: u64,
}

/// What processors beside the device do next.
#[derive(Clone, Copy, Debug)]
struct Part {
    /// The unit; none for a hand-over, or what a layer's experts take in addition.
    unit: Option<usize>,
    /// Whether it is the latter.
    experts: bool,
    slot: usize,
    /// Whether the link carries something meanwhile in any case.
    loaded: bool,
    /// It waits until so many computes of the device have ended.
    after_computes: u64,
}

/// What the compute thread does next.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Do {
    Compute(usize),
    /// Brings an expert that was chosen and computes it on the device.
    Fetch(usize),
    /// Hands rows to processors.
    HandOver {
        loaded: bool,
    },
    /// Processors begin with a layer's experts.
    BeginExperts,
    /// Has all experts of the block with this shared part brought, before its router has chosen.
    BringAhead(usize),
    /// Gives an expert back that was brought and not chosen.
    Skip(usize),
    /// Waits for the router, then chooses experts among the units after this one.
    Route(usize),
    /// The logits.
    Beside,
}

pub(super) struct World<'a> {
    setup: &'a Setup,
    now: f64,
    frames: Frames<()>,
    holes: bool,
    rng: ChaCha8Rng,
    /// Tokens so far, and whether the pass at hand is of a prompt.
    token: u64,
    prompt: bool,

    /// Reads that were taken, of which one runs at a time.
    reads: VecDeque<Move>,
    reading: Option<Running>,

    copies: VecDeque<Copy>,
    copying: Option<Running>,
    copies_queued: u64,
    copies_done: u64,
    /// By device frame: the last copy into it, and the last compute from it, counted from 1.
    last_copy: Vec<u64>,
    last_compute: Vec<u64>,

    program: VecDeque<Do>,
    /// Experts that were brought before the router has chosen, in the order in which they come.
    ahead: Vec<usize>,
    computes: VecDeque<Compute>,
    computing: Option<Running>,
    computes_called: u64,
    computes_done: u64,
    parts: VecDeque<Part>,
    beside: Option<Running>,
    parts_called: u64,
    parts_done: u64,
    /// Parts whose answers the device's next compute needs, and the number of the last hand-over of choices.
    joined: u64,
    handed: u64,
    /// The use of a frame that processors compute from.
    held: Option<Rank>,

    /// Without wrap-around: reads and copies that may still start in this pass.
    reads_left: usize,
    copies_left: usize,
    shares: Shares,
    events: Vec<Event>,
}

impl<'a> World<'a> {
    pub fn new(setup: &'a Setup) -> World<'a> {
        let mut frames = Frames::new(spec(setup));
        fill_caches(&mut frames, setup);
        let n = frames.frames_of(Place::Device);
        World {
            setup,
            now: 0.0,
            holes: streams_experts(setup),
            frames,
            rng: ChaCha8Rng::seed_from_u64(setup.seed),
            token: TOKENS_BEFORE,
            prompt: false,
            reads: VecDeque::new(),
            reading: None,
            copies: VecDeque::new(),
            copying: None,
            copies_queued: 0,
            copies_done: 0,
            last_copy: vec![0; n],
            last_compute: vec![0; n],
            program: VecDeque::new(),
            ahead: Vec::new(),
            computes: VecDeque::new(),
            computing: None,
            computes_called: 0,
            computes_done: 0,
            parts: VecDeque::new(),
            beside: None,
            parts_called: 0,
            parts_done: 0,
            joined: 0,
            handed: 0,
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
                if self.program.is_empty() && self.idle() {
                    break;
                }
                if !self.advance() {
                    // Nothing runs and nothing can start: a setup without the frames that it needs.
                    self.frames.give_up();
                    break;
                }
            }
            self.token += u64::from(!pass.prompt);
            self.shares.seconds = self.now - began;
            done.push(std::mem::take(&mut self.shares));
        }
        Outcome { passes: done, events: self.events }
    }

    /// Whether all that was called has ended.
    fn idle(&self) -> bool {
        self.computes_done == self.computes_called && self.parts_done == self.parts_called
    }

    fn begin(&mut self, pass: &PassWork) {
        let units = &self.setup.units;
        self.prompt = pass.prompt;
        self.program.clear();
        self.ahead.clear();
        for (i, _) in units.iter().enumerate().filter(|(_, u)| !u.size.routed()) {
            self.program.push_back(Do::Compute(i));
            if units.get(i + 1).is_some_and(|next| next.size.routed()) {
                if pass.ahead && brings_ahead(self.setup, i) {
                    self.program.push_back(Do::BringAhead(i));
                }
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
            let mut moved = self.take_reads();
            moved |= self.queue_copies();
            moved |= self.compute_on(pass);
            moved |= self.start();
            if !moved {
                return;
            }
        }
    }

    /// The thread of storage.
    fn take_reads(&mut self) -> bool {
        let before = self.reads.len();
        while self.reads_left > 0
            && let Some(m) = self.frames.next_move(STORAGE)
        {
            self.reads.push_back(m);
            self.reads_left -= 1;
        }
        self.reads.len() > before
    }

    /// The thread of copies.
    fn queue_copies(&mut self) -> bool {
        let before = self.copies_queued;
        while self.copies_left > 0
            && (self.copies_queued - self.copies_done) < COPIES_MAX as u64
            && let Some(m) = self.frames.next_move(COPIES)
        {
            self.copies_left -= 1;
            self.copies_queued += 1;
            self.last_copy[m.to] = self.copies_queued;
            let after_computes = self.last_compute[m.to];
            self.copies.push_back(Copy { unit: m.unit, carries: Some(m), after_computes, after_beside: 0 });
            self.frames.queued(COPIES, m);
        }
        self.copies_queued > before
    }

    /// The compute thread (`model::forward`).
    fn compute_on(&mut self, pass: &PassWork) -> bool {
        let idle = self.idle();
        if idle && let Some(rank) = self.held.take() {
            self.frames.reached(rank);
            return true;
        }
        let done = match self.program.front().copied() {
            None => false,
            Some(Do::Compute(unit)) => self.call_compute(unit, pass.unit_s[unit]),
            Some(Do::HandOver { loaded }) => {
                let after_computes = self.computes_called;
                self.push_part(Part { unit: None, experts: false, slot: 0, loaded, after_computes });
                self.handed = self.parts_called;
                true
            }
            Some(Do::BeginExperts) => {
                self.push_part(Part { unit: None, experts: true, slot: 0, loaded: false, after_computes: 0 });
                true
            }
            Some(Do::Fetch(unit)) => {
                self.fetch(unit, pass.unit_s[unit]);
                true
            }
            Some(Do::BringAhead(shared)) => {
                self.ahead = experts_of(self.setup, shared).filter(|&u| streams(self.setup, u)).collect();
                self.frames.demand(&mut self.ahead, self.prompt);
                true
            }
            Some(Do::Skip(unit)) => match self.frames.hold(unit) {
                Hold::Ready(_, rank) => {
                    self.frames.reached(rank);
                    true
                }
                _ => false,
            },
            Some(Do::Route(shared)) if idle => {
                self.program.pop_front();
                self.route(shared, pass);
                return true;
            }
            Some(Do::Beside) if idle => {
                self.push_compute(None, 0, pass.beside_s, 0);
                true
            }
            Some(_) => false,
        };
        if done {
            self.program.pop_front();
        }
        done
    }

    fn push_compute(&mut self, unit: Option<usize>, slot: usize, seconds: f64, after_copies: u64) {
        // Experts are computed while processors compute others, and a part while they compute their slice of it; whatever comes next
        // needs the answers.
        let slice = |u: usize| u > 0 && self.setup.units[u - 1].size.part == UnitPart::Slice;
        if unit.is_none_or(|u| !self.setup.units[u].size.routed() && !slice(u)) {
            self.joined = self.parts_called;
        }
        self.computes_called += 1;
        self.computes.push_back(Compute { unit, slot, seconds, after_copies, after_beside: self.joined });
    }

    fn push_part(&mut self, part: Part) {
        self.parts_called += 1;
        self.parts.push_back(part);
    }

    /// A unit that processors beside the device compute, behind the hand-over of what it reads.
    fn call_part(&mut self, unit: usize, slot: usize) {
        let after_computes = self.computes_called;
        if !self.setup.units[unit].size.routed() {
            self.push_part(Part { unit: None, experts: false, slot: 0, loaded: false, after_computes });
        }
        self.push_part(Part { unit: Some(unit), experts: false, slot, loaded: false, after_computes });
    }

    /// An expert in RAM that was chosen is brought, when its choice has been handed over.
    fn fetch(&mut self, unit: usize, seconds: f64) {
        self.copies_queued += 1;
        self.copies.push_back(Copy { unit, carries: None, after_computes: 0, after_beside: self.handed });
        self.push_compute(Some(unit), 0, seconds, self.copies_queued);
    }

    fn call_compute(&mut self, unit: usize, seconds: f64) -> bool {
        // Processors compute before the call returns.
        if !self.setup.on_device && self.computes_done < self.computes_called {
            return false;
        }
        let of_host = self.setup.beside.computes(unit);
        if !streams(self.setup, unit) {
            if of_host {
                self.call_part(unit, 0)
            } else {
                self.push_compute(Some(unit), 0, seconds, 0)
            }
            return true;
        }
        let Hold::Ready(slot, rank) = self.frames.hold(unit) else { return false };
        if of_host {
            // The frame of a cache stays until the next token's choice.
            self.call_part(unit, slot);
            self.frames.reached(rank);
        } else if self.setup.on_device {
            self.push_compute(Some(unit), slot, seconds, self.last_copy[slot]);
            self.last_compute[slot] = self.computes_called;
            self.frames.reached(rank);
        } else {
            self.push_compute(Some(unit), slot, seconds, 0);
            self.held = Some(rank);
        }
        true
    }

    /// Chooses experts of the block whose shared part is `shared`.
    fn route(&mut self, shared: usize, pass: &PassWork) {
        let (units, experts) = (&self.setup.units, pass.experts);
        let mut of: Vec<usize> = experts_of(self.setup, shared).collect();
        let n = of.len();
        match self.setup.caching.routing.as_ref().filter(|_| !pass.prompt) {
            Some(routing) => {
                let routed = |i: &usize| units[*i].size.routed() && !units[*i - 1].size.routed();
                let number = (1..=shared).filter(routed).count();
                let mut ids = vec![0; experts.min(n)];
                routing.choose(number, self.token, &mut ids);
                of = ids.into_iter().map(|e| shared + 1 + e as usize).collect();
            }
            None => {
                for i in 0..experts.min(n) {
                    let j = self.rng.random_range(i..n);
                    of.swap(i, j);
                }
                of.truncate(experts.min(n));
            }
        }
        match self.ahead.is_empty() {
            true => self.call_experts(shared, of),
            false => self.call_ahead(of),
        }
    }

    /// Puts the experts that were brought ahead in the order in which they are used or given back, behind chosen ones that rest.
    fn call_ahead(&mut self, mut chosen: Vec<usize>) {
        chosen.sort_unstable();
        let ahead = std::mem::take(&mut self.ahead);
        let resting = chosen.iter().copied().filter(|&u| !streams(self.setup, u)).map(Do::Compute);
        let is_chosen = |u: usize| chosen.binary_search(&u).is_ok();
        let brought = ahead.into_iter().map(|u| if is_chosen(u) { Do::Compute(u) } else { Do::Skip(u) });
        let calls: Vec<Do> = resting.chain(brought).collect();
        calls.into_iter().rev().for_each(|call| self.program.push_front(call));
    }

    /// Puts chosen experts in the order in which they are called. `chosen` is in the order of choices.
    fn call_experts(&mut self, shared: usize, chosen: Vec<usize>) {
        let beside = &self.setup.beside;
        let (of_host, mut of): (Vec<usize>, Vec<usize>) = chosen.into_iter().partition(|&u| beside.computes(u));
        let theirs = beside.of_choices(shared + 1, of_host.len());
        let (mut of_host, mut fetched) = (of_host, Vec::new());
        if beside.divides(shared + 1) {
            fetched = of_host.split_off(theirs);
        }
        let here = |of: &mut Vec<usize>, setup: &Setup| {
            of.sort_unstable_by_key(|&u| (streams(setup, u), u));
            of.partition_point(|&u| !streams(setup, u))
        };
        let at = here(&mut of, self.setup);
        let at_host = here(&mut of_host, self.setup);
        if self.holes {
            let mut brought: Vec<usize> = of[at..].iter().chain(&of_host[at_host..]).copied().collect();
            brought.sort_unstable();
            self.frames.demand(&mut brought, self.prompt);
            let order = |u: &usize| brought.iter().position(|b| b == u);
            of[at..].sort_by_key(order);
            of_host[at_host..].sort_by_key(order);
        }
        let handed = !of_host.is_empty() || !fetched.is_empty();
        let hand_over = Do::HandOver { loaded: !fetched.is_empty() };
        let begin = (!of_host.is_empty()).then_some(Do::BeginExperts);
        let of_host = begin.into_iter().chain(of_host.into_iter().map(Do::Compute));
        let of = of.into_iter().map(Do::Compute);
        let mut calls: Vec<Do> = Vec::new();
        if beside.divides(shared + 1) {
            // One call of each site, which work at once.
            calls.extend(handed.then_some(hand_over));
            calls.extend(of_host.chain(of).chain(fetched.into_iter().map(Do::Fetch)));
        } else {
            // The device's are called one by one, before processors begin.
            calls.extend(of.chain(handed.then_some(hand_over)).chain(of_host));
        }
        for call in calls.into_iter().rev() {
            self.program.push_front(call);
        }
    }

    /// Starts what may start.
    fn start(&mut self) -> bool {
        let mut moved = false;
        let rates = &self.setup.rates;
        let bytes = |u: usize| self.setup.units[u].size.slot_bytes as f64;
        let running = |unit, slot, carries, left: f64, demand| {
            Some(Running { unit, slot, carries, began: self.now, left, demand, counted: 0.0 })
        };
        if self.reading.is_none()
            && let Some(m) = self.reads.pop_front()
        {
            let n = rates.nvme.unwrap_or(f64::INFINITY);
            let demand = if rates.copies { [COPY_TRANSFERS * n, COPY_PROCESSORS] } else { [n, 0.0] };
            self.reading = running(Some(m.unit), m.to, Some(m), bytes(m.unit) / n, finite(demand));
            moved = true;
        }
        if self.copying.is_none()
            && self
                .copies
                .front()
                .is_some_and(|c| c.after_computes <= self.computes_done && c.after_beside <= self.parts_done)
            && let Some(Copy { unit, carries, .. }) = self.copies.pop_front()
        {
            let g = rates.gpu.unwrap_or(f64::INFINITY);
            let most = if self.setup.units[unit].size.routed() { EXPERT_GAP_S } else { f64::INFINITY };
            let seconds = bytes(unit) / g + self.setup.copy_gap_s.min(most);
            let demand = finite([bytes(unit) / seconds, 0.0]);
            self.copying = running(Some(unit), carries.map_or(0, |m| m.to), carries, seconds, demand);
            moved = true;
        }
        if self.beside.is_none()
            && self.parts.front().is_some_and(|p| p.after_computes <= self.computes_done)
            && let Some(p) = self.parts.pop_front()
        {
            let beside = &self.setup.beside;
            let loaded = p.loaded || self.copying.is_some();
            let seconds = match p.unit {
                Some(u) => beside.unit_s[u],
                None if p.experts => beside.experts_s,
                None => beside.hand_over_s[usize::from(loaded)],
            };
            // Their rate is the one beside a link at work.
            let counted = p.unit.map_or(0.0, |u| bytes(u) / seconds);
            let r = running(p.unit, p.slot, None, seconds, [0.0; 2]);
            self.beside = r.map(|r| Running { counted, ..r });
            moved = true;
        }
        if self.computing.is_none()
            && self
                .computes
                .front()
                .is_some_and(|c| c.after_copies <= self.copies_done && c.after_beside <= self.parts_done)
            && let Some(c) = self.computes.pop_front()
        {
            let on_processors = !self.setup.on_device && c.unit.is_some() && c.seconds > 0.0;
            let rate = c.unit.map_or(0.0, |u| bytes(u) / c.seconds);
            let demand = if on_processors { [rate, 1.0] } else { [0.0; 2] };
            self.computing = running(c.unit, c.slot, None, c.seconds, demand);
            moved = true;
        }
        moved
    }

    /// Lets time pass until something ends; `false` if nothing runs.
    fn advance(&mut self) -> bool {
        let all = [self.reading, self.copying, self.computing, self.beside];
        let speeds = self.speeds(&all);
        let ends = |i: usize| all[i].map_or(f64::INFINITY, |r| r.left / speeds[i]);
        let step = (0..4).map(ends).fold(f64::INFINITY, f64::min);
        if !step.is_finite() {
            return false;
        }
        self.count(step, &all, &speeds);
        self.now += step;
        let running = [&mut self.reading, &mut self.copying, &mut self.computing, &mut self.beside];
        for (i, r) in running.into_iter().enumerate() {
            if let Some(r) = r {
                r.left = if ends(i) <= step { 0.0 } else { r.left - step * speeds[i] };
            }
        }
        self.end();
        true
    }

    /// How fast the read, the copy and the compute that run go.
    fn speeds(&self, all: &[Option<Running>; 4]) -> [f64; 4] {
        let mut demands = all.map(|r| r.map(|r| r.demand));
        let ram = self.setup.rates.ram.unwrap_or(f64::INFINITY);
        if self.setup.rates.copies {
            let beside = all[3].filter(|r| r.unit.is_some() && all[0].is_some());
            let taken = beside.map_or(0.0, |r| r.counted * BESIDE_COPIES);
            let mut speeds = speeds(&demands, [(ram - taken).max(ram / 4.0), 1.0]);
            if beside.is_some() {
                speeds[3] = BESIDE_COPIES;
            }
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
    fn count(&mut self, step: f64, all: &[Option<Running>; 4], speeds: &[f64; 4]) {
        let s = &mut self.shares;
        let ram: f64 = all.iter().zip(speeds).map(|(r, v)| r.map_or(0.0, |r| (r.demand[0] + r.counted) * v)).sum();
        s.ram_bytes += ram * step;
        s.beside_bytes += all[3].map_or(0.0, |r| r.counted) * step;
        s.gpu_bytes += all[1].map_or(0.0, |r| r.demand[0] * speeds[1]) * step;
        if all[3].is_some_and(|r| r.unit.is_some()) {
            s.beside_busy += step;
        }
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
            None if all[3].is_some() => s.wait_beside += step,
            None => {
                let copied = all[1].is_some_and(|copy| match (self.computes.front(), self.program.front()) {
                    (Some(Compute { unit: Some(u), .. }), _)
                    | (None, Some(Do::Compute(u) | Do::Skip(u) | Do::Fetch(u))) => copy.unit == Some(*u),
                    _ => false,
                });
                *if copied || all[0].is_none() { &mut s.wait_gpu } else { &mut s.wait_nvme } += step;
            }
        }
    }

    /// Tells the machine what has ended.
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
            self.moved(STORAGE, &r);
            self.events.extend(r.unit.map(|u| event(EventKind::Read, &r, u)));
        }
        if let Some(r) = over(&mut self.copying) {
            self.copies_done += 1;
            self.moved(COPIES, &r);
            self.events.extend(r.unit.map(|u| event(EventKind::Copy, &r, u)));
        }
        if let Some(r) = over(&mut self.computing) {
            self.computes_done += 1;
            self.events.extend(r.unit.map(|u| event(EventKind::Compute, &r, u)));
        }
        if let Some(r) = over(&mut self.beside) {
            self.parts_done += 1;
            self.events.extend(r.unit.map(|u| event(EventKind::Beside, &r, u)));
        }
    }

    fn moved(&mut self, link: usize, r: &Running) {
        if let Some(m) = r.carries {
            self.frames.moved(link, m, Ok(()));
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

/// Whether a unit goes through frames where it is computed.
fn streams(setup: &Setup, unit: usize) -> bool {
    match setup.units[unit].home {
        Home::A => false,
        Home::B => setup.on_device,
        Home::C => true,
    }
}

/// The experts behind the shared part of their block.
fn experts_of(setup: &Setup, shared: usize) -> impl Iterator<Item = usize> {
    let n = setup.units[shared + 1..].iter().take_while(|u| u.size.routed()).count();
    shared + 1..shared + 1 + n
}

/// Whether the experts behind a shared part can be brought to a device ahead of their choice: each is there or in RAM
/// (`model::pass`).
fn brings_ahead(setup: &Setup, shared: usize) -> bool {
    let near = |u: usize| setup.units[u].home != Home::C && !setup.beside.computes(u);
    let mut streamed = experts_of(setup, shared).filter(|&u| streams(setup, u));
    setup.on_device && experts_of(setup, shared).all(near) && streamed.next().is_some()
}

fn streams_experts(setup: &Setup) -> bool {
    (0..setup.units.len()).any(|u| setup.units[u].size.routed() && streams(setup, u))
}

/// The machine of a setup, as a session makes it of its plan.
fn spec(setup: &Setup) -> Spec {
    let units = &setup.units;
    let rests = |home| match home {
        Home::A => Place::Device,
        Home::B => Place::Host,
        Home::C => Place::Storage,
    };
    let rings = |place, n, attention: bool| {
        let apart = || units.iter().map(|u| u.size.part == UnitPart::Attention).collect();
        PoolSpec::rings(place, n, units.len(), attention.then(apart))
    };
    let mut pools = rings(Place::Host, setup.staging_slots, setup.staging_attention);
    let cache = |(i, c): (usize, &SimCache)| PoolSpec {
        place: Place::Host,
        frames: c.slots,
        policy: Policy::Cache,
        members: setup.caching.of.iter().map(|of| *of == Some(i)).collect(),
    };
    pools.extend(setup.caching.caches.iter().enumerate().map(cache));
    if setup.on_device {
        pools.extend(rings(Place::Device, setup.device_slots, setup.device_attention));
    }
    Spec {
        homes: units.iter().map(|u| rests(u.home)).collect(),
        routed: units.iter().map(|u| u.size.routed()).collect(),
        site: if setup.on_device { Place::Device } else { Place::Host },
        in_ram: in_ram(setup),
        steps: schedule(setup),
        demand_max: most_experts(setup),
        pools,
        links: links(),
    }
}

/// By unit, whether processors beside a device compute it from a frame in RAM.
fn in_ram(setup: &Setup) -> Vec<bool> {
    let cached = |u: usize| setup.beside.computes(u) && setup.units[u].home == Home::C;
    if setup.beside.units.is_empty() { Vec::new() } else { (0..setup.units.len()).map(cached).collect() }
}

/// Fills caches with what the tokens before would have left there.
fn fill_caches(frames: &mut Frames<()>, setup: &Setup) {
    let Some(routing) = &setup.caching.routing else { return };
    for (i, c) in setup.caching.caches.iter().enumerate() {
        let routed = |u: usize| setup.units[u].size.routed();
        // Where the experts of the cache's layer begin.
        let of_layer = (1..setup.units.len()).filter(|&u| routed(u) && !routed(u - 1)).nth(c.number).unwrap_or(0);
        let cached = |e: usize| setup.caching.of.get(of_layer + e) == Some(&Some(i));
        let held = held(routing, c.number, c.slots, TOKENS_BEFORE, &cached);
        frames.fill(&held.into_iter().map(|e| of_layer + e).collect::<Vec<_>>());
    }
}

/// Streamed units in pass order, with a hole before the experts of each block where experts are streamed.
fn schedule(setup: &Setup) -> Vec<Step> {
    let holes = streams_experts(setup);
    let mut steps = Vec::new();
    for (i, _) in setup.units.iter().enumerate().filter(|(_, u)| !u.size.routed()) {
        if streams(setup, i) {
            steps.push(Step::Unit(i));
        }
        if holes && setup.units.get(i + 1).is_some_and(|next| next.size.routed()) {
            steps.push(Step::Hole);
        }
    }
    steps
}

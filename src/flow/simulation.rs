//! A seeded simulation of the whole way: [`Frames`] with links that delay, refuse, fail and die as a script says, a
//! consumer that computes from host memory or calls a device's streams, guesses at experts, and gives passes up.
//!
//! Asserted: no frame is handed over while it is written, none is written before its last use, the earliest want always
//! gets a frame, nobody sleeps for ever, and every cause that a pass waited for is told once. `NT_FLOW_RUNS` says how
//! many runs (1000 if it does not).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::frames::{Frames, Hold, Move, Place, Policy, PoolSpec, Rank, Spec, Step};

/// Lines that were made wrong on purpose, and what that does; each makes the simulation fail.
const MUTANTS: [(&str, &str); 8] = [
    ("copied-from", "Frame::is_free: a host frame is refilled while a copy reads it"),
    ("last-frame-to-prefetch", "Pool::leaves_one: what is prefetched behind a hole takes the last frame"),
    ("news", "Frames::decided: the consumer is not told that its unit has come"),
    ("brought-while-held", "Frames::waiting: a unit is brought anew into the frame that it is computed from"),
    ("no-stage", "Frames::want_stage: who counted on a move that was given back never gets its stage"),
    ("used-and-silent", "Frames::failed: a copy fails after its unit was handed over, and nothing says so"),
    ("evicts-what-is-wanted", "Frame::is_free: a frame is given away that waits for its use"),
    ("told-again", "Frames::hold, Frames::give_up: a cause stays with its frame and is told again"),
];

/// Units that rest in RAM or on storage; experts follow the dense units.
struct Case {
    spec: Spec,
    experts: Vec<usize>,
    passes: u32,
    fail: f64,
    refuse: f64,
    die: f64,
    give_up: f64,
    hints: bool,
    /// Share of demands that are a prompt's.
    passing: f64,
    /// Other units that are used in RAM, which take turns with those of `spec`.
    turns: Option<Vec<bool>>,
}

/// Caches of some of the experts, for which the rings of RAM stay.
fn caches(rng: &mut ChaCha8Rng, n_dense: usize, n: usize) -> Vec<PoolSpec> {
    let layers = rng.random_range(1..3);
    let all = rng.random_range(0..2) == 0;
    let pool = |layer: usize, frames: usize| PoolSpec {
        place: Place::Host,
        frames,
        policy: Policy::Cache,
        members: (0..n).map(|u| u >= n_dense && u % layers == layer && (all || u % 3 > 0)).collect(),
    };
    (0..layers).map(|layer| pool(layer, rng.random_range(2..6))).collect()
}

fn case(rng: &mut ChaCha8Rng) -> Case {
    let device = rng.random_range(0..3) > 0;
    let (n_dense, n_experts) = (rng.random_range(1..7), [0, 0, 5, 9][rng.random_range(0..4)]);
    let n = n_dense + n_experts;
    let home = |rng: &mut ChaCha8Rng| if device && rng.random_range(0..2) == 0 { Place::Host } else { Place::Storage };
    let homes: Vec<Place> = (0..n).map(|_| home(rng)).collect();
    let mut steps = Vec::new();
    for u in 0..n_dense {
        steps.push(Step::Unit(u));
        if n_experts > 0 && (u == 0 || rng.random_range(0..2) == 0) {
            steps.push(Step::Hole);
        }
    }
    let mut pools = Vec::new();
    let policy = |rng: &mut ChaCha8Rng| if rng.random_range(0..4) == 0 { Policy::Lru } else { Policy::Ring };
    for place in [Place::Host, Place::Device] {
        // Sometimes two sizes of frames, as for attention parts.
        let apart = rng.random_range(0..2) == 0;
        let mut pool = |members: Vec<bool>| {
            let (frames, policy) = (rng.random_range(2..6), policy(rng));
            pools.push(PoolSpec { place, frames, policy, members });
        };
        if apart {
            pool((0..n).map(|u| u % 2 == 0).collect());
            pool((0..n).map(|u| u % 2 == 1).collect());
        } else {
            pool(vec![true; n]);
        }
    }
    let mut in_ram = Vec::new();
    if n_experts > 0 && rng.random_range(0..2) == 0 {
        pools.extend(caches(rng, n_dense, n));
        if device && rng.random_range(0..2) == 0 {
            in_ram = (0..n).map(|u| u >= n_dense && homes[u] == Place::Storage).collect();
        }
    }
    let turns = (rng.random_range(0..3) == 0).then(|| if in_ram.is_empty() { Vec::new() } else { vec![false; n] });
    let links = vec![(Place::Storage, Place::Host), (Place::Host, Place::Device)];
    let site = if device { Place::Device } else { Place::Host };
    let routed = (0..n).map(|u| u >= n_dense).collect();
    let rough = rng.random_range(0..3) == 0;
    Case {
        spec: Spec { homes, routed, site, in_ram, steps, demand_max: 8, pools, links },
        experts: (n_dense..n).collect(),
        passes: rng.random_range(2..9),
        fail: if rough { 0.03 } else { 0.0 },
        refuse: [0.0, 0.2][rng.random_range(0..2)],
        die: if rough && rng.random_range(0..4) == 0 { 0.01 } else { 0.0 },
        give_up: [0.0, 0.03][rng.random_range(0..2)],
        hints: rng.random_range(0..2) == 0,
        passing: [0.0, 0.3][rng.random_range(0..2)],
        turns,
    }
}

/// A frame's memory.
#[derive(Clone, Copy, Default)]
struct Memory {
    unit: Option<usize>,
    /// Number of the failure of what was written.
    bad: Option<u32>,
    written: bool,
    readers: u32,
}

#[derive(Clone, Copy, PartialEq)]
enum Thread {
    /// Awake.
    Look,
    /// Has taken a move and not started it.
    Start(Move),
    /// Waits until something of its own ends, or it is woken.
    Poll { full: bool },
    /// Waits until it is woken.
    Sleep,
}

struct Link {
    thread: Thread,
    flying: Vec<(Move, bool)>,
    ended: Vec<(Move, Result<(), u32>)>,
    most: usize,
}

/// A copy in its stream: it waits until so many computes have ended.
struct Queued {
    m: Move,
    after: u64,
    running: bool,
}

struct Compute {
    frame: usize,
    unit: usize,
    after: u64,
    running: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Consumer {
    Go,
    Waits,
    /// Computes from host frames, up to this use.
    Computes(Rank),
    /// Calls what is to be computed from the device frames that are held, up to this use.
    Calls(Rank),
}

struct World {
    case: Case,
    frames: Frames<u32>,
    rng: ChaCha8Rng,
    memory: [Vec<Memory>; 2],
    links: [Link; 2],
    stream: VecDeque<Queued>,
    copies: u64,
    copies_done: u64,
    computes: VecDeque<Compute>,
    called: u64,
    computes_done: u64,
    /// By device frame: number of the last copy queued to it, and of the last compute called from it.
    last_copy: Vec<u64>,
    /// Device frames that are held: their units, and how many copies must have ended before what is computed from them.
    calls: Vec<(usize, usize, u64)>,
    last_compute: Vec<u64>,
    consumer: Consumer,
    /// Host frames that are computed from, and their units.
    held: Vec<(usize, usize)>,
    todo: VecDeque<usize>,
    step: usize,
    pass: u32,
    /// Failures that happened, by number, and those that were told.
    failures: BTreeMap<u32, Rank>,
    /// Those of them that a change of the schedule has forgotten, with the wants of passes to come: all below this number.
    forgotten: u32,
    told: BTreeSet<u32>,
    deaths: BTreeSet<u32>,
    /// Failed copies that this pass has computed from.
    poison: BTreeSet<u32>,
    ever_given_up: bool,
    /// Failures that were told after the unit had been handed over.
    late: usize,
    handed: BTreeSet<Rank>,
    rescheduled: usize,
    over: bool,
}

impl World {
    fn new(seed: u64) -> World {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let case = case(&mut rng);
        let count = |p: Place| case.spec.pools.iter().filter(|q| q.place == p).map(|q| q.frames).sum::<usize>();
        let counts = [count(Place::Host), count(Place::Device)];
        let mut link =
            || Link { thread: Thread::Look, flying: Vec::new(), ended: Vec::new(), most: rng.random_range(1..5) };
        World {
            frames: Frames::new(case.spec.clone()),
            memory: counts.map(|n| vec![Memory::default(); n]),
            links: [link(), link()],
            stream: VecDeque::new(),
            copies: 0,
            copies_done: 0,
            computes: VecDeque::new(),
            called: 0,
            computes_done: 0,
            last_copy: vec![0; counts[1]],
            calls: Vec::new(),
            last_compute: vec![0; counts[1]],
            consumer: Consumer::Go,
            held: Vec::new(),
            todo: VecDeque::new(),
            step: 0,
            pass: 0,
            failures: BTreeMap::new(),
            forgotten: 0,
            told: BTreeSet::new(),
            deaths: BTreeSet::new(),
            poison: BTreeSet::new(),
            ever_given_up: false,
            late: 0,
            handed: BTreeSet::new(),
            rescheduled: 0,
            over: false,
            rng,
            case,
        }
    }

    fn chance(&mut self, share: f64) -> bool {
        self.rng.random_bool(share)
    }

    fn run(&mut self) {
        for _ in 0..200_000 {
            if self.over {
                return;
            }
            let n = self.rng.random_range(0..6);
            // Whoever's turn it is, the next one that can do something does.
            let moved = (0..6).any(|i| match (n + i) % 6 {
                0 => self.thread(0),
                1 => self.thread(1),
                2 => self.carry(0),
                3 => self.run_copies(),
                4 => self.run_computes(),
                _ => self.consume(),
            });
            self.frames.check();
            assert!(moved, "everybody sleeps: pass {} step {} {:#?}", self.pass, self.step, self.frames);
        }
        panic!("no end: pass {} step {}", self.pass, self.step);
    }

    /// What the threads do after each call: wake who has something to do.
    fn wake(&mut self) {
        let mut asleep = 0;
        for (i, link) in self.links.iter().enumerate() {
            if matches!(link.thread, Thread::Sleep | Thread::Poll { full: false }) {
                asleep |= 1 << i;
            }
        }
        let wakes = self.frames.wakes(asleep);
        for (i, link) in self.links.iter_mut().enumerate() {
            if wakes & 1 << i != 0 {
                link.thread = Thread::Look;
            }
        }
        if self.frames.take_news() && self.consumer == Consumer::Waits {
            self.consumer = Consumer::Go;
        }
    }

    /// A step of a link's thread.
    fn thread(&mut self, l: usize) -> bool {
        match self.links[l].thread {
            Thread::Look => {
                self.links[l].thread = match self.frames.next_move(l) {
                    Some(m) => Thread::Start(m),
                    None if self.links[l].flying.is_empty() && self.links[l].ended.is_empty() => Thread::Sleep,
                    None => Thread::Poll { full: false },
                };
                self.wake();
                true
            }
            Thread::Start(m) => {
                self.start(l, m);
                true
            }
            Thread::Poll { .. } if !self.links[l].ended.is_empty() => {
                for (m, result) in std::mem::take(&mut self.links[l].ended) {
                    self.frames.moved(l, m, result);
                }
                self.links[l].thread = Thread::Look;
                self.wake();
                true
            }
            Thread::Poll { .. } | Thread::Sleep => false,
        }
    }

    fn start(&mut self, l: usize, m: Move) {
        self.links[l].thread = Thread::Look;
        let full = self.links[l].flying.len() + self.links[l].ended.len() >= self.links[l].most;
        if full || !self.links[l].flying.is_empty() && self.chance(self.case.refuse) {
            self.frames.give_back(l, m);
            self.links[l].thread = Thread::Poll { full: true };
        } else if self.chance(self.case.die) {
            let id = self.fail(m);
            self.deaths.insert(id);
            self.frames.died(l, id);
        } else if self.chance(self.case.fail) {
            let id = self.fail(m);
            self.frames.moved(l, m, Err(id));
        } else {
            let fails = self.chance(self.case.fail);
            self.links[l].flying.push((m, fails));
            if l == 0 {
                let to = &mut self.memory[0][m.to];
                assert!(!to.written && to.readers == 0, "a read into frame {}, which is in use", m.to);
                (to.written, to.unit) = (true, None);
            } else {
                let called = self.calls.iter().any(|c| c.0 == m.to);
                assert!(!called, "a copy into frame {}, which work is being called from", m.to);
                self.copies += 1;
                self.last_copy[m.to] = self.copies;
                self.stream.push_back(Queued { m, after: self.last_compute[m.to], running: false });
                self.frames.queued(l, m);
            }
        }
        self.wake();
    }

    fn fail(&mut self, m: Move) -> u32 {
        let id = self.failures.len() as u32;
        self.failures.insert(id, m.rank);
        id
    }

    /// Some read ends.
    fn carry(&mut self, l: usize) -> bool {
        if self.links[l].flying.is_empty() {
            return false;
        }
        let at = self.rng.random_range(0..self.links[l].flying.len());
        let (m, fails) = self.links[l].flying.swap_remove(at);
        let bad = self.end(l, m, fails);
        let unit = (!fails).then_some(m.unit);
        self.memory[0][m.to] = Memory { written: false, unit, bad, ..self.memory[0][m.to] };
        true
    }

    fn end(&mut self, l: usize, m: Move, fails: bool) -> Option<u32> {
        let bad = fails.then(|| self.fail(m));
        self.links[l].ended.push((m, bad.map_or(Ok(()), Err)));
        bad
    }

    /// A step of the device's copies: in the order in which they were queued.
    fn run_copies(&mut self) -> bool {
        let Some(c) = self.stream.front_mut() else { return false };
        let m = c.m;
        if !c.running {
            if c.after > self.computes_done {
                return false;
            }
            c.running = true;
            if let Some(from) = m.from {
                let from = &mut self.memory[0][from];
                assert!(from.unit == Some(m.unit) && !from.written, "a copy of another unit than {m:?}");
                from.readers += 1;
            }
            let to = &mut self.memory[1][m.to];
            assert!(!to.written && to.readers == 0, "a copy into frame {}, which is in use", m.to);
            (to.written, to.unit) = (true, None);
            return true;
        }
        self.stream.pop_front();
        if let Some(from) = m.from {
            let from = &mut self.memory[0][from];
            assert!(from.unit == Some(m.unit) && !from.written, "{m:?} was overwritten while copied");
            from.readers -= 1;
        }
        self.copies_done += 1;
        let at = self.links[1].flying.iter().position(|f| f.0 == m).unwrap();
        let (_, fails) = self.links[1].flying.remove(at);
        // What is computed from a copy that failed is thrown away: the failure is told.
        let bad = self.end(1, m, fails);
        self.memory[1][m.to] = Memory { written: false, unit: Some(m.unit), bad, ..self.memory[1][m.to] };
        true
    }

    fn run_computes(&mut self) -> bool {
        let Some(c) = self.computes.front_mut() else { return false };
        if !c.running && c.after > self.copies_done {
            return false;
        }
        let frame = &mut self.memory[1][c.frame];
        assert!(frame.unit == Some(c.unit) && !frame.written, "frame {} does not hold unit {}", c.frame, c.unit);
        if c.running {
            frame.readers -= 1;
            self.computes.pop_front();
            self.computes_done += 1;
        } else {
            frame.readers += 1;
            c.running = true;
            self.poison.extend(frame.bad);
        }
        true
    }

    /// A step of the session's thread.
    fn consume(&mut self) -> bool {
        match self.consumer {
            Consumer::Waits => return false,
            Consumer::Computes(rank) => {
                // Those of caches may be held together.
                if let Some(&next) = self.todo.front()
                    && self.in_ram(next)
                    && self.frames.is_ready(next)
                    && self.chance(0.7)
                {
                    self.hold(next);
                    return true;
                }
                for (frame, unit) in std::mem::take(&mut self.held) {
                    let memory = &mut self.memory[0][frame];
                    assert!(memory.unit == Some(unit) && !memory.written, "frame {frame} does not hold unit {unit}");
                    memory.readers -= 1;
                }
                self.consumer = Consumer::Go;
                self.frames.reached(rank);
                self.wake();
                return true;
            }
            Consumer::Calls(rank) => {
                if let Some(&next) = self.todo.front()
                    && !self.in_ram(next)
                    && self.frames.is_ready(next)
                    && self.chance(0.7)
                {
                    self.hold(next);
                    return true;
                }
                for (frame, unit, after) in std::mem::take(&mut self.calls) {
                    self.called += 1;
                    self.last_compute[frame] = self.called;
                    self.computes.push_back(Compute { frame, unit, after, running: false });
                }
                self.consumer = Consumer::Go;
                self.frames.reached(rank);
                self.wake();
                return true;
            }
            Consumer::Go => {}
        }
        if self.chance(self.case.give_up) {
            self.give_up();
            return true;
        }
        if self.case.hints && self.rng.random_range(0..4) == 0 {
            let (expert, step) = (self.rng.random_range(0..9), self.rng.random_range(0..self.case.spec.steps.len()));
            if let Some(&unit) = self.case.experts.get(expert) {
                self.frames.hint(unit, step as u32);
                self.wake();
            }
        }
        if let Some(&unit) = self.todo.front() {
            self.hold(unit);
            return true;
        }
        match self.case.spec.steps.get(self.step) {
            None => {
                self.step = 0;
                self.pass_done();
            }
            Some(Step::Unit(u)) => {
                self.todo.push_back(*u);
                self.step += 1;
            }
            Some(Step::Hole) => {
                let n = self.rng.random_range(0..=8.min(self.case.experts.len()));
                let mut of = self.case.experts.clone();
                for i in 0..n {
                    let j = self.rng.random_range(i..of.len());
                    of.swap(i, j);
                }
                of.truncate(n);
                let passing = self.chance(self.case.passing);
                self.frames.demand(&mut of, passing);
                self.wake();
                self.todo.extend(of);
                self.step += 1;
            }
        }
        true
    }

    /// Whether a unit is used in RAM.
    fn in_ram(&self, unit: usize) -> bool {
        self.case.spec.site == Place::Host || self.case.spec.in_ram.get(unit) == Some(&true)
    }

    fn hold(&mut self, unit: usize) {
        match self.frames.hold(unit) {
            Hold::Ready(frame, rank) => {
                let on_its_way = |id: &u32| self.links[1].ended.iter().any(|e| e.1 == Err(*id));
                let silent = self.poison.iter().find(|id| !on_its_way(id));
                assert!(silent.is_none(), "computed from copy {silent:?}, which failed, and nothing was said");
                self.todo.pop_front();
                self.handed.insert(rank);
                if self.in_ram(unit) {
                    let memory = &mut self.memory[0][frame];
                    assert!(memory.unit == Some(unit) && !memory.written, "frame {frame} was handed over too early");
                    memory.readers += 1;
                    self.held.push((frame, unit));
                    self.consumer = Consumer::Computes(rank);
                } else {
                    self.calls.push((frame, unit, self.last_copy[frame]));
                    self.consumer = Consumer::Calls(rank);
                }
                self.wake();
            }
            Hold::Wait => {
                self.consumer = Consumer::Waits;
                self.wake();
            }
            Hold::Failed(id) => {
                assert!(self.failures.contains_key(&id), "a cause that is none");
                if self.deaths.contains(&id) {
                    // Said in every pass from here on.
                    self.over |= self.pass > self.case.passes || self.told.contains(&id);
                } else {
                    assert!(!self.told.contains(&id), "cause {id} was told twice");
                }
                self.told.insert(id);
                self.late += usize::from(self.handed.contains(&self.failures[&id]));
                self.give_up();
            }
        }
    }

    fn give_up(&mut self) {
        // What was called is over before its frames are filled anew.
        while !self.computes.is_empty() {
            assert!(self.run_computes() || self.run_copies(), "the device hangs");
        }
        for (frame, _) in self.held.drain(..) {
            self.memory[0][frame].readers -= 1;
        }
        self.calls.clear();
        self.consumer = Consumer::Go;
        self.frames.give_up();
        self.wake();
        self.poison.clear();
        self.todo.clear();
        self.step = 0;
        self.pass += 1;
        self.ever_given_up = true;
        self.over |= self.pass > self.case.passes + 20;
    }

    fn pass_done(&mut self) {
        // Nothing that failed before a use was passed by. (Failed copies may be seen later.)
        for (id, rank) in self.failures.range(self.forgotten..) {
            let own = rank.nth < 1 << 30 && rank.pass == self.pass && self.case.spec.site == Place::Host;
            let first = self.links[0].ended.iter().all(|e| e.1 != Err(*id));
            let told = self.told.contains(id) || self.deaths.contains(id);
            assert!(!own || self.ever_given_up || !first || told, "cause {id} was never told");
        }
        self.pass += 1;
        self.over |= self.pass >= self.case.passes;
        if self.chance(0.05) {
            self.frames.empty_caches();
            self.wake();
        }
        self.take_turns();
    }

    /// Goes on with other units used in RAM, where nothing is in flight.
    fn take_turns(&mut self) {
        let idle = |l: &Link| l.flying.is_empty() && l.ended.is_empty() && !matches!(l.thread, Thread::Start(_));
        let quiet = self.links.iter().all(idle) && self.stream.is_empty() && self.computes.is_empty();
        let Some(other) = self.case.turns.take_if(|_| quiet) else { return };
        let Spec { site, steps, in_ram, .. } = &mut self.case.spec;
        let before = std::mem::replace(in_ram, other);
        self.frames = self.frames.rescheduled(*site, steps.clone(), in_ram.clone());
        self.forgotten = self.failures.len() as u32;
        self.case.turns = Some(before);
        self.pass += 1;
        self.rescheduled += 1;
        self.wake();
    }
}

fn runs() -> u64 {
    std::env::var("NT_FLOW_RUNS").ok().and_then(|n| n.parse().ok()).unwrap_or(1000)
}

#[test]
fn every_unit_arrives_whole_whatever_links_do() {
    // What happened on the way, so that nobody takes a quiet script for a strict one.
    let (mut told, mut late, mut unused, mut died, mut given_up) = (0, 0, 0, 0, 0);
    let (mut rescheduled, mut hits, mut passed) = (0, 0, 0);
    for seed in 0..runs() {
        let run = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            world.run();
            world
        });
        let Ok(world) = run else { panic!("seed {seed}") };
        told += world.told.len();
        late += world.late;
        unused += world.frames.unused_failures();
        died += world.deaths.len();
        given_up += usize::from(world.ever_given_up);
        rescheduled += world.rescheduled as u64;
        hits += world.frames.cache_counts(false).hits;
        passed += world.frames.cache_counts(true).misses;
    }
    let (n, all) = (runs() as usize, (told, late, unused, died, given_up));
    assert!(told > n / 10 && late > n / 100 && unused > runs() / 50 && died > n / 100 && given_up > n / 4, "{all:?}");
    let all = (rescheduled, hits, passed);
    assert!(rescheduled > runs() / 20 && hits > runs() / 4 && passed > runs() / 10, "{all:?}");
}

/// The simulation sees each of the lines that [`MUTANTS`] names.
#[test]
fn each_mutant_is_seen() {
    for (name, what) in MUTANTS {
        super::MUTANT.set(name);
        let seen = (0..3000).find(|&seed| std::panic::catch_unwind(|| World::new(seed).run()).is_err());
        super::MUTANT.set("");
        assert!(seen.is_some(), "{name}: {what}");
    }
}

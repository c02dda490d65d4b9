//! Which bytes move when: pools of frames, wants in the order of their use, moves over links. Pure: no clock, no
//! thread, no device; the threads of links, the session and the simulator drive it.
//!
//! The schedule of a pass is cyclic: the first units of the next pass follow the last ones of this. Each pool takes
//! its wants from it by itself, as far ahead as it has frames, since only it knows how far that is. A mixture of
//! experts leaves holes in the schedule, which [`Frames::demand`] fills once the router has chosen; a guess at them
//! may come before, by [`Frames::hint`].
//!
//! A want gets its frame in the order of ranks and keeps it until its use has been reached, so that a frame that
//! nobody claims, copies from or writes to is free. Moves over a link start in the order of ranks too, also where the
//! source of the earliest is still on its way: copies to a device queue in a stream, where one that waits for the last
//! use of its frame would hold up an earlier one behind it.
//!
//! Pools of [`Policy::Cache`] keep experts from pass to pass, a pool per layer. An expert that is demanded goes through
//! its layer's cache; one of a prompt, which wants most experts of a layer, only if it is there or a frame is empty, and else
//! through the ring, so that a prompt evicts nothing.

use std::collections::VecDeque;

use super::mutant;

/// A memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Files and drives: tier C.
    Storage,
    /// RAM: tier B.
    Host,
    /// Memory of a device: tier A.
    Device,
}

/// Which free frame of a pool a want gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The next one in turn: carried unit `c` goes to frame `c mod n`, so that a frame's last use is the oldest there is.
    /// One that is claimed by a later want (prefetched behind a hole) is passed over. What was used is brought anew.
    Ring,
    /// One that holds the unit already, else the one whose last use is the oldest.
    Lru,
    /// As [`Policy::Lru`], for routed units alone, which have a ring of the place next to it: what a prompt demands
    /// goes there, unless the cache holds it or has an empty frame.
    Cache,
}

/// One step of the cyclic schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A streamed unit.
    Unit(usize),
    /// Units that are known only when the router has run.
    Hole,
}

/// When a unit is used, over all passes: the order of everything here, and the consumption clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// Passes before this one.
    pub pass: u32,
    /// Step of the schedule.
    pub step: u32,
    /// 0 for a unit of the schedule, else the number of a demanded unit, from 1, or 2³⁰ and more for a hint.
    pub nth: u32,
}

/// `nth` of hints: behind everything that is demanded at their hole.
const HINTS: u32 = 1 << 30;

/// Frames of one size in one place.
#[derive(Clone, Debug)]
pub struct PoolSpec {
    /// Where.
    pub place: Place,
    /// How many. A pool that some unit passes through has at least two.
    pub frames: usize,
    /// Who gets which.
    pub policy: Policy,
    /// By unit, whether it goes to these frames; no two caches of a place have a member in common, and no two others.
    pub members: Vec<bool>,
}

impl PoolSpec {
    /// Rings of `n` frames in `place`: one for all units, or a second one for those that are `apart`.
    pub fn rings(place: Place, n: usize, n_units: usize, apart: Option<Vec<bool>>) -> Vec<PoolSpec> {
        let ring = |members| PoolSpec { place, frames: n, policy: Policy::Ring, members };
        match apart {
            None => vec![ring(vec![true; n_units])],
            Some(apart) => vec![ring(apart.iter().map(|a| !a).collect()), ring(apart)],
        }
    }
}

/// What a machine is made for.
#[derive(Clone, Debug)]
pub struct Spec {
    /// By unit, where it rests; it is there at any time, without a frame (design: pool `Pinned`).
    pub homes: Vec<Place>,
    /// By unit, whether it fills holes rather than being in the schedule.
    pub routed: Vec<bool>,
    /// Where units are used: [`Place::Host`] or [`Place::Device`].
    pub site: Place,
    /// By unit, whether it is used in RAM though `site` is a device; empty for none.
    pub in_ram: Vec<bool>,
    /// Streamed units of a pass in the order of their use.
    pub steps: Vec<Step>,
    /// Most units that are demanded at once.
    pub demand_max: usize,
    /// The pools. Frames of a place are numbered through its pools.
    pub pools: Vec<PoolSpec>,
    /// Links by their ends.
    pub links: Vec<(Place, Place)>,
}

impl Spec {
    /// Where a unit is used.
    fn site_of(&self, unit: usize) -> Place {
        if self.in_ram.get(unit) == Some(&true) { Place::Host } else { self.site }
    }
}

/// How often demanded units that have a cache were in it, since the machine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Demands: layers of passes.
    pub demands: u64,
    /// They were there, or on their way.
    pub hits: u64,
    /// They were brought.
    pub misses: u64,
    /// Demands with a miss.
    pub missed: u64,
    /// Most misses of one demand.
    pub misses_max: u64,
}

impl CacheCounts {
    fn add(&mut self, hits: u64, misses: u64) {
        self.demands += 1;
        self.hits += hits;
        self.misses += misses;
        self.missed += u64::from(misses > 0);
        self.misses_max = self.misses_max.max(misses);
    }
}

/// Bytes of a unit on their way into a frame. Frames are numbered by place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// No two moves have the same.
    pub id: u64,
    /// What.
    pub unit: usize,
    /// From this frame of the link's first place; `None`: from where it rests.
    pub from: Option<usize>,
    /// To this frame of the link's second place.
    pub to: usize,
    /// When it is used.
    pub rank: Rank,
    /// The pass waits for it; prefetched ones may wait.
    pub urgent: bool,
    pool: usize,
}

/// What a consumer may do with the unit that it wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hold<C> {
    /// Compute from this frame, then say [`Frames::reached`] with this rank.
    Ready(usize, Rank),
    /// It is on its way; [`Frames::take_news`] says when to ask again.
    Wait,
    /// It cannot be brought. Said once: a unit that is asked for again is brought anew.
    Failed(C),
}

#[derive(Clone, Debug)]
enum Content<C> {
    /// Nothing of use; claimed, it waits for its move.
    Empty,
    /// Being written. `queued`: the place itself orders what comes after the move, so that the unit may be used already.
    Filling {
        unit: usize,
        id: u64,
        queued: bool,
        used: bool,
    },
    Ready {
        unit: usize,
        used: bool,
    },
    Failed(C),
}

#[derive(Clone, Debug)]
struct Frame<C> {
    content: Content<C>,
    /// Wants that this frame serves.
    claims: u32,
    /// Moves in flight that read it.
    copies: u32,
    /// Its last use.
    last: Option<Rank>,
}

impl<C> Frame<C> {
    /// Whether it may be given to another unit.
    fn is_free(&self) -> bool {
        let copied = self.copies > 0 && !mutant("copied-from");
        (self.claims == 0 || mutant("evicts-what-is-wanted"))
            && !copied
            && !matches!(self.content, Content::Filling { .. })
    }

    /// Whether it holds `unit`, or soon will, for a want that has no frame.
    fn serves(&self, unit: usize, policy: Policy) -> bool {
        match self.content {
            Content::Filling { unit: u, used, .. } | Content::Ready { unit: u, used } => {
                u == unit && (policy != Policy::Ring || self.claims == 0 && !used)
            }
            _ => false,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Want {
    unit: usize,
    rank: Rank,
    frame: Option<usize>,
    /// The consumer has it.
    held: bool,
}

impl Want {
    fn is_hint(&self) -> bool {
        self.rank.nth >= HINTS
    }
}

#[derive(Clone, Debug)]
struct Pool<C> {
    place: Place,
    policy: Policy,
    frames: Vec<Frame<C>>,
    /// Number of its first frame in its place.
    first: usize,
    /// What is to be used, in the order of ranks.
    wants: VecDeque<Want>,
    hints: usize,
    /// Holes among them that are not filled.
    holes: VecDeque<Rank>,
    has_units: bool,
    has_holes: bool,
    /// The step that is taken from the schedule next.
    pass: u32,
    step: u32,
    /// The frame that was given out last.
    turn: usize,
    /// Empty frames that units of a prompt may have, while they are demanded.
    room: usize,
}

impl<C> Pool<C> {
    fn position(&self, rank: Rank) -> Option<usize> {
        self.wants.binary_search_by(|w| w.rank.cmp(&rank)).ok()
    }

    fn add(&mut self, unit: usize, rank: Rank) {
        if let Err(at) = self.wants.binary_search_by(|w| w.rank.cmp(&rank)) {
            self.wants.insert(at, Want { unit, rank, frame: None, held: false });
            self.hints += usize::from(rank.nth >= HINTS);
        }
    }

    /// Forgets a want; its frame keeps what it holds.
    fn forget(&mut self, at: usize) {
        let Some(want) = self.wants.remove(at) else { return };
        self.hints -= usize::from(want.is_hint());
        if let Some(f) = want.frame {
            let frame = &mut self.frames[f];
            frame.claims -= 1;
            if want.held {
                frame.last = Some(want.rank);
                if let Content::Ready { used, .. } | Content::Filling { used, .. } = &mut frame.content {
                    *used = true;
                }
            }
            if frame.claims == 0 && matches!(frame.content, Content::Failed(_)) {
                frame.content = Content::Empty;
            }
        }
    }

    /// Forgets a want whose use is over.
    fn use_up(&mut self, at: usize) {
        self.wants[at].held = true;
        self.forget(at);
    }

    fn forget_all(&mut self, mut which: impl FnMut(&Want) -> bool) {
        for at in (0..self.wants.len()).rev() {
            if which(&self.wants[at]) {
                self.forget(at);
            }
        }
    }

    /// A frame that holds `unit`, or soon will, for a want that has none.
    fn serving(&self, unit: usize) -> Option<usize> {
        let there = (0..self.frames.len()).find(|&f| self.frames[f].serves(unit, self.policy));
        // One that waits for its move has nothing in it yet.
        let wanted = || self.wants.iter().find(|w| w.unit == unit && w.frame.is_some())?.frame;
        there.or_else(|| if self.policy == Policy::Ring { None } else { wanted() })
    }

    /// The free frame whose turn it is.
    fn victim(&self) -> Option<usize> {
        let n = self.frames.len();
        let in_turn = (1..=n).map(|i| (self.turn + i) % n).filter(|&f| self.frames[f].is_free());
        match self.policy {
            Policy::Ring => in_turn.take(1).next(),
            // An empty one has no last use: it comes first.
            Policy::Lru | Policy::Cache => in_turn.min_by_key(|&f| self.age(f)),
        }
    }

    /// The last use of what a frame holds; none comes before any.
    fn age(&self, f: usize) -> Option<Rank> {
        let frame = &self.frames[f];
        frame.last.filter(|_| !matches!(frame.content, Content::Empty))
    }

    /// Whether a frame holds `unit`, or will.
    fn holds(&self, unit: usize) -> bool {
        self.serving(unit).is_some()
    }

    /// Whether a frame with nothing to do holds `unit`: it may be used at once.
    fn has(&self, unit: usize) -> bool {
        self.frames.iter().any(|f| matches!(f.content, Content::Ready { unit: u, .. } if u == unit))
    }

    /// Frames with nothing in them that nobody claims.
    fn empty(&self) -> usize {
        self.frames.iter().filter(|f| f.claims == 0 && matches!(f.content, Content::Empty)).count()
    }

    /// Whether a want is for something behind a hole that is not filled.
    fn is_early(&self, want: &Want) -> bool {
        want.is_hint() || self.holes.front().is_some_and(|hole| *hole < want.rank)
    }

    /// Whether a frame is left for what fills the hole once an early want has one: `serving`, or a free one.
    fn leaves_one(&self, serving: Option<usize>) -> bool {
        let early = |f: usize| self.wants.iter().any(|w| w.frame == Some(f) && self.is_early(w));
        if serving.is_some_and(early) {
            return true;
        }
        let left = if mutant("last-frame-to-prefetch") { 1 } else { 2 };
        let all = 0..self.frames.len();
        let takes_a_free_one = serving.is_none_or(|f| self.frames[f].is_free());
        let free = || all.clone().filter(|&f| self.frames[f].is_free()).count();
        let others = all.clone().filter(|&f| !early(f)).count();
        all.len() > 2 && others >= left && (!takes_a_free_one || free() >= left)
    }

    /// Gives frames to wants, the earliest first. Behind an unfilled hole, one frame is left for what will fill it.
    fn place(&mut self) {
        for at in 0..self.wants.len() {
            let Want { unit, frame, .. } = self.wants[at];
            if frame.is_some() {
                continue;
            }
            let serving = self.serving(unit);
            let early = self.is_early(&self.wants[at]);
            if early && !self.leaves_one(serving) {
                return;
            }
            let Some(f) = serving.or_else(|| self.victim()) else { return };
            if serving.is_none() {
                self.frames[f].content = Content::Empty;
                self.turn = f;
            }
            self.frames[f].claims += 1;
            self.wants[at].frame = Some(f);
        }
    }
}

/// Pools of a place that a unit goes through.
#[derive(Clone, Copy, Debug, Default)]
struct Ways {
    plain: Option<u16>,
    cache: Option<u16>,
}

/// The pools of `place` by unit.
fn ways(spec: &Spec, place: Place) -> Vec<Ways> {
    let find = |unit: usize, cache: bool| {
        let of = |p: &PoolSpec| p.place == place && p.members[unit] && (p.policy == Policy::Cache) == cache;
        spec.pools.iter().position(of).map(|p| p as u16)
    };
    (0..spec.homes.len()).map(|u| Ways { plain: find(u, false), cache: find(u, true) }).collect()
}

/// The machine. `C` is the cause of a failure.
#[derive(Clone, Debug)]
pub struct Frames<C> {
    spec: Spec,
    pools: Vec<Pool<C>>,
    /// By place (RAM, device) and unit, the pool that is no cache, and the one that is.
    through: [Vec<Ways>; 2],
    /// Whether what is demanded is a prompt's.
    passing: bool,
    /// Of single tokens, and of prompts.
    counts: [CacheCounts; 2],
    dead: Vec<Option<C>>,
    /// The step that the consumer comes to next, and its pass.
    pass: u32,
    step: u32,
    /// Demanded units that it has not asked for: number of the first, and of the one behind the last.
    demanded: (u32, u32),
    /// The last use that is over.
    clock: Option<Rank>,
    /// What the consumer waits for, and whether that is decided.
    awaited: Option<Rank>,
    news: bool,
    /// A move that failed after its unit was handed over.
    late: Option<C>,
    /// Uses before this one belong to passes that were given up, or are over.
    given_up: Rank,
    next_id: u64,
    /// Moves with a lower number were begun before a pass was given up last.
    stale: u64,
    unused_failures: u64,
}

impl<C: Clone> Frames<C> {
    /// A machine with empty frames, before the first pass.
    pub fn new(spec: Spec) -> Frames<C> {
        let mut pools: Vec<Pool<C>> = Vec::with_capacity(spec.pools.len());
        for p in &spec.pools {
            let first = pools.iter().filter(|q| q.place == p.place).map(|q| q.frames.len()).sum();
            // What is demanded alone goes through a cache.
            let passes = |u: usize| p.policy != Policy::Cache && p.members[u] && crosses(&spec, u, p.place);
            let frame = || Frame { content: Content::Empty, claims: 0, copies: 0, last: None };
            pools.push(Pool {
                place: p.place,
                policy: p.policy,
                frames: (0..p.frames).map(|_| frame()).collect(),
                first,
                wants: VecDeque::with_capacity(2 * p.frames + 2 * spec.demand_max + 2),
                hints: 0,
                holes: VecDeque::with_capacity(4),
                has_units: spec.steps.iter().any(|s| matches!(s, Step::Unit(u) if passes(*u))),
                has_holes: spec.steps.contains(&Step::Hole)
                    && (0..spec.homes.len()).any(|u| spec.routed[u] && passes(u)),
                pass: 0,
                step: 0,
                turn: p.frames.saturating_sub(1),
                room: 0,
            });
        }
        Frames {
            through: [Place::Host, Place::Device].map(|place| ways(&spec, place)),
            passing: false,
            counts: Default::default(),
            dead: spec.links.iter().map(|_| None).collect(),
            pools,
            pass: 0,
            step: 0,
            demanded: (0, 0),
            clock: None,
            awaited: None,
            news: false,
            late: None,
            given_up: Rank { pass: 0, step: 0, nth: 0 },
            next_id: 0,
            stale: 0,
            unused_failures: 0,
            spec,
        }
    }

    /// The machine with the links that another one has: those that are dead stay so.
    pub fn with_links_of(mut self, other: &Frames<C>) -> Frames<C> {
        self.dead.clone_from(&other.dead);
        // A copy that failed after its unit was handed over is still to be told of.
        self.late.clone_from(&other.late);
        self
    }

    /// The same machine with another schedule and other sites: caches keep what they hold, and all else is forgotten.
    /// Nothing may be in flight.
    pub fn rescheduled(&self, site: Place, steps: Vec<Step>, in_ram: Vec<bool>) -> Frames<C> {
        let mut next = Frames::new(Spec { site, steps, in_ram, ..self.spec.clone() }).with_links_of(self);
        // Later than all uses so far, which caches remember.
        next.pass = self.pass + 1;
        next.given_up = Rank { pass: next.pass, step: 0, nth: 0 };
        (next.counts, next.next_id) = (self.counts, self.next_id);
        for (pool, old) in next.pools.iter_mut().zip(&self.pools) {
            pool.pass = next.pass;
            if pool.policy != Policy::Cache {
                continue;
            }
            for (frame, old) in pool.frames.iter_mut().zip(&old.frames) {
                if matches!(old.content, Content::Ready { .. }) {
                    (frame.content, frame.last) = (old.content.clone(), old.last);
                }
            }
        }
        next
    }

    /// Fills the caches of these units with them, the one that was used longest ago first: a machine that has run before.
    pub fn fill(&mut self, units: &[usize]) {
        for (&unit, nth) in units.iter().zip(0..) {
            let Some(cache) = self.ways(Place::Host, unit).cache else { continue };
            let empty = |f: &&mut Frame<C>| matches!(f.content, Content::Empty) && f.claims == 0;
            if let Some(frame) = self.pools[usize::from(cache)].frames.iter_mut().find(empty) {
                frame.content = Content::Ready { unit, used: true };
                frame.last = Some(Rank { pass: 0, step: 0, nth });
            }
        }
    }

    /// Empties the caches, as before the first pass; what is used or on its way stays.
    pub fn empty_caches(&mut self) {
        let caches = self.pools.iter_mut().filter(|p| p.policy == Policy::Cache);
        for frame in caches.flat_map(|p| &mut p.frames).filter(|f| f.claims == 0) {
            if matches!(frame.content, Content::Ready { .. }) {
                (frame.content, frame.last) = (Content::Empty, None);
            }
        }
    }

    fn ways(&self, place: Place, unit: usize) -> Ways {
        match place {
            Place::Storage => Ways::default(),
            Place::Host => self.through[0][unit],
            Place::Device => self.through[1][unit],
        }
    }

    /// The pool of `place` that `unit` goes through, if it does; where that may be a cache, see [`Frames::pool_for`].
    fn pool_of(&self, place: Place, unit: usize) -> Option<usize> {
        let Ways { plain, cache } = self.ways(place, unit);
        plain.or(cache).filter(|_| crosses(&self.spec, unit, place)).map(usize::from)
    }

    /// The pool of `place` for a demand of `unit`.
    fn pool_for(&self, place: Place, unit: usize) -> Option<usize> {
        let pool = self.pool_of(place, unit)?;
        let cache = self.ways(place, unit).cache.map(usize::from);
        let goes = |c: &usize| !self.passing || self.pools[*c].holds(unit) || self.pools[*c].room > 0;
        Some(cache.filter(goes).unwrap_or(pool))
    }

    /// The pool of `place` that has the want of `unit` with this rank, or would have it.
    fn pool_with(&self, place: Place, unit: usize, rank: Rank) -> Option<usize> {
        let pool = self.pool_of(place, unit)?;
        let cache = self.ways(place, unit).cache.map(usize::from);
        Some(cache.filter(|&c| self.pools[c].position(rank).is_some()).unwrap_or(pool))
    }

    /// Takes steps from the schedule until a pool has one want more than frames.
    fn pull(&mut self, p: usize) {
        let n_steps = self.spec.steps.len() as u32;
        loop {
            let pool = &mut self.pools[p];
            let enough = pool.wants.len() - pool.hints > pool.frames.len() || pool.holes.len() > 1;
            if enough || !(pool.has_units || pool.has_holes) {
                return;
            }
            let rank = Rank { pass: pool.pass, step: pool.step, nth: 0 };
            pool.step += 1;
            if pool.step == n_steps {
                (pool.pass, pool.step) = (pool.pass + 1, 0);
            }
            if self.is_past(rank) {
                continue;
            }
            match self.spec.steps[rank.step as usize] {
                Step::Hole if self.pools[p].has_holes => self.pools[p].holes.push_back(rank),
                Step::Unit(u) if self.pool_of(self.pools[p].place, u) == Some(p) && !self.is_served(u, rank, p) => {
                    self.pools[p].add(u, rank);
                }
                _ => {}
            }
        }
    }

    /// Whether the consumer has come past a step, or has filled it.
    fn is_past(&self, rank: Rank) -> bool {
        let next = Rank { pass: self.pass, step: self.step, nth: 0 };
        rank < next || rank == next && self.demanded.1 > 0
    }

    /// Whether the place of use has, for this use, what pool `p` would be a stage for.
    fn is_served(&self, unit: usize, rank: Rank, p: usize) -> bool {
        let last = self.pool_of(self.spec.site_of(unit), unit).filter(|last| *last != p);
        let Some(last) = last else { return false };
        let pool = &self.pools[last];
        let frame = pool.position(rank).and_then(|at| pool.wants[at].frame);
        frame.is_some_and(|f| !matches!(pool.frames[f].content, Content::Empty | Content::Failed(_)))
    }

    /// Takes wants from the schedule and gives them frames.
    fn refresh(&mut self) {
        for link in (0..self.spec.links.len()).rev() {
            let place = self.spec.links[link].1;
            for p in 0..self.pools.len() {
                if self.pools[p].place == place {
                    self.pull(p);
                    self.pools[p].place();
                }
            }
            self.want_stage(link);
        }
    }

    /// Wants the stage of what `link` is to carry next where none is wanted: the unit was thought to be served, by a
    /// move that failed, or that was begun for another use and given back. Later wants may have all frames by now: then
    /// the last ones lose theirs.
    fn want_stage(&mut self, link: usize) {
        let (from, to) = self.spec.links[link];
        let Some((q, at)) = self.waiting(to) else { return };
        let Want { unit, rank, .. } = self.pools[q].wants[at];
        let Some(p) = self.pool_with(from, unit, rank) else { return };
        if self.pools[p].position(rank).is_some() || rank.nth >= HINTS || mutant("no-stage") {
            return;
        }
        let Some(p) = self.pool_for(from, unit) else { return };
        let pool = &mut self.pools[p];
        // Caches take nothing from the schedule.
        if pool.policy != Policy::Cache && (rank.pass, rank.step) >= (pool.pass, pool.step) {
            return;
        }
        pool.add(unit, rank);
        let Pool { wants, frames, .. } = &mut *pool;
        let mut later = wants.iter_mut().rev().take_while(|w| w.rank > rank);
        while frames.iter().all(|f| f.claims > 0)
            && let Some(last) = later.next()
        {
            if let Some(f) = last.frame.take() {
                frames[f].claims -= 1;
            }
        }
        pool.place();
    }

    /// The earliest want of a link's second place that waits for its move, if its source is there: pool, index, and the
    /// frame of the source.
    fn candidate(&self, link: usize) -> Option<(usize, usize, Option<usize>)> {
        let (from, to) = self.spec.links[link];
        if self.dead[link].is_some() {
            return None;
        }
        let (p, at) = self.waiting(to)?;
        Some((p, at, self.source(from, &self.pools[p].wants[at])?))
    }

    /// The earliest want of a place that waits for its move: pool and index. None does whose frame was handed over,
    /// with a move that failed after that: it is being used.
    fn waiting(&self, place: Place) -> Option<(usize, usize)> {
        let of = |(p, pool): (usize, &Pool<C>)| {
            let empty = |f: usize| matches!(pool.frames[f].content, Content::Empty);
            let held = |f: usize| pool.wants.iter().any(|w| w.held && w.frame == Some(f));
            let waits = |w: &Want| w.frame.is_some_and(|f| empty(f) && (!held(f) || mutant("brought-while-held")));
            pool.wants.iter().position(waits).map(|at| (pool.wants[at].rank, (p, at)))
        };
        let pools = self.pools.iter().enumerate().filter(|(_, pool)| pool.place == place);
        pools.filter_map(of).min_by_key(|found| found.0).map(|found| found.1)
    }

    /// Where a want can be brought from: a frame of `from` (numbered in its place), or where it rests.
    fn source(&self, from: Place, want: &Want) -> Option<Option<usize>> {
        if self.spec.homes[want.unit] == from {
            return Some(None);
        }
        let pool = &self.pools[self.pool_with(from, want.unit, want.rank)?];
        let f = pool.wants[pool.position(want.rank)?].frame?;
        matches!(pool.frames[f].content, Content::Ready { .. }).then_some(Some(pool.first + f))
    }

    /// Whether what `link` is to carry next is on its way to its first place still.
    pub fn waits_for_source(&self, link: usize) -> bool {
        let (from, to) = self.spec.links[link];
        self.waiting(to).is_some_and(|(p, at)| self.source(from, &self.pools[p].wants[at]).is_none())
    }

    /// The next move of `link`: it is taken to be under way until [`Frames::moved`] or [`Frames::give_back`].
    pub fn next_move(&mut self, link: usize) -> Option<Move> {
        self.refresh();
        let (p, at, from) = self.candidate(link)?;
        if let Some(from) = from {
            self.frame_mut(self.spec.links[link].0, from)?.copies += 1;
        }
        let id = self.next_id;
        self.next_id += 1;
        let pool = &mut self.pools[p];
        let Want { unit, rank, frame, .. } = pool.wants[at];
        let f = frame?;
        pool.frames[f].content = Content::Filling { unit, id, queued: false, used: false };
        let urgent = (1..HINTS).contains(&rank.nth);
        Some(Move { id, unit, from, to: pool.first + f, rank, urgent, pool: p })
    }

    fn frame_mut(&mut self, place: Place, number: usize) -> Option<&mut Frame<C>> {
        let of = |p: &&mut Pool<C>| p.place == place && (p.first..p.first + p.frames.len()).contains(&number);
        self.pools.iter_mut().find(of).map(|p| &mut p.frames[number - p.first])
    }

    /// A link has not taken a move: it will be asked again.
    pub fn give_back(&mut self, link: usize, m: Move) {
        self.release_source(link, &m, false);
        let pool = &mut self.pools[m.pool];
        pool.frames[m.to - pool.first].content = Content::Empty;
    }

    /// A link has started a move. Where it goes to a device, which orders moves and work by itself, work that is called
    /// from now on comes after it, and its unit may be handed over.
    pub fn queued(&mut self, link: usize, m: Move) {
        if self.spec.links[link].1 != Place::Device {
            return;
        }
        let pool = &mut self.pools[m.pool];
        if let Content::Filling { id, queued, .. } = &mut pool.frames[m.to - pool.first].content
            && *id == m.id
        {
            *queued = true;
        }
        self.decided(&m, false);
    }

    fn release_source(&mut self, link: usize, m: &Move, carried: bool) {
        let from = self.spec.links[link].0;
        if let Some(frame) = m.from.and_then(|f| self.frame_mut(from, f)) {
            frame.copies -= 1;
            if let Content::Ready { used, .. } = &mut frame.content {
                *used |= carried;
            }
        }
    }

    /// A move of `link` has ended.
    pub fn moved(&mut self, link: usize, m: Move, result: Result<(), C>) {
        let ok = result.is_ok();
        self.release_source(link, &m, ok);
        let from = self.spec.links[link].0;
        if m.from.is_some()
            && ok
            && let Some(p) = self.pool_with(from, m.unit, m.rank)
            && let Some(at) = self.pools[p].position(m.rank)
        {
            // The stage has served.
            self.pools[p].use_up(at);
        }
        let pool = &mut self.pools[m.pool];
        let frame = &mut pool.frames[m.to - pool.first];
        match (result, &frame.content) {
            (Ok(()), &Content::Filling { unit, used, .. }) => frame.content = Content::Ready { unit, used },
            (Ok(()), other) => unreachable!("a move ended in a frame that is {}", name_of(other)),
            (Err(cause), _) => self.failed(m, cause),
        }
        self.decided(&m, !ok);
    }

    /// A failure is told to who has been given the unit already, whoever the move was begun for; else to the want that
    /// it was begun for, if that is still there and no guess, and no pass was given up since; else it is counted. Whoever claims the frame meanwhile is
    /// brought anew.
    fn failed(&mut self, m: Move, cause: C) {
        let at_site = self.pools[m.pool].place == self.spec.site_of(m.unit);
        let given_up = self.given_up;
        let Pool { wants, frames, first, hints, .. } = &mut self.pools[m.pool];
        let f = m.to - *first;
        let last = frames[f].last.filter(|last| *last >= given_up);
        let content = std::mem::replace(&mut frames[f].content, Content::Empty);
        let used = matches!(content, Content::Filling { used: true, .. }) && at_site && last.is_some();
        let here = |w: &Want| w.frame == Some(f);
        if (used || wants.iter().any(|w| here(w) && w.held)) && !mutant("used-and-silent") {
            self.late = Some(cause);
        } else if wants.iter().any(|w| here(w) && w.rank == m.rank && !w.is_hint()) && m.id >= self.stale {
            frames[f].content = Content::Failed(cause);
        } else {
            self.unused_failures += 1;
        }
        wants.retain_mut(|w| {
            let own = w.rank == m.rank;
            if !here(w) || w.held || own && !w.is_hint() {
                return true;
            }
            w.frame = None;
            frames[f].claims -= 1;
            *hints -= usize::from(own);
            !own
        });
    }

    /// Notes that the consumer may ask again.
    fn decided(&mut self, m: &Move, failed: bool) {
        let at_site = self.pools[m.pool].place == self.spec.site_of(m.unit) && !mutant("news");
        if self.awaited.is_some() && (at_site || failed) {
            self.news = true;
        }
    }

    /// A link is gone for good. What it was carrying stays in flight: its frames are never used again.
    pub fn died(&mut self, link: usize, cause: C) {
        self.dead[link].get_or_insert(cause);
        self.news = true;
    }

    /// The consumer wants `unit`, which must be what comes next: a unit of the schedule or a demanded one.
    pub fn hold(&mut self, unit: usize) -> Hold<C> {
        let (next, behind) = self.demanded;
        let rank = Rank { pass: self.pass, step: self.step, nth: next };
        let scheduled = self.spec.steps.get(rank.step as usize);
        if next >= behind && scheduled != Some(&Step::Unit(unit)) {
            unreachable!("unit {unit} was asked for, but {scheduled:?} is next");
        }
        if let Some(cause) = self.late.take() {
            return Hold::Failed(cause);
        }
        let p = self.pool_with(self.spec.site_of(unit), unit, rank);
        let Some(p) = p else { unreachable!("unit {unit} goes through no frame") };
        self.pull(p);
        let pool = &mut self.pools[p];
        pool.place();
        let Some(at) = pool.position(rank) else { unreachable!("unit {unit} was asked for, but not demanded") };
        let want = pool.wants[at];
        assert_eq!(want.unit, unit, "a unit was asked for out of its order");
        let there = want.frame.filter(|&f| {
            matches!(pool.frames[f].content, Content::Ready { .. } | Content::Filling { queued: true, .. })
        });
        if let Some(f) = there {
            pool.wants[at].held = true;
            let number = pool.first + f;
            self.awaited = None;
            self.consumed();
            return Hold::Ready(number, rank);
        }
        if let Some(f) = want.frame
            && let Content::Failed(cause) = &pool.frames[f].content
        {
            let cause = cause.clone();
            if !mutant("told-again") {
                pool.frames[f].content = Content::Empty;
            }
            return Hold::Failed(cause);
        }
        if let Some(cause) = self.cause_upstream(unit, rank) {
            return Hold::Failed(cause);
        }
        self.awaited = Some(rank);
        Hold::Wait
    }

    /// Why a unit that is not there will not come: a link on its way is gone, or an earlier stage has failed.
    fn cause_upstream(&mut self, unit: usize, rank: Rank) -> Option<C> {
        let want = Want { unit, rank, frame: None, held: false };
        let site = self.spec.site_of(unit);
        for (link, &(_, to)) in self.spec.links.iter().enumerate() {
            let there = to != site && self.source(to, &want).is_some();
            if !there && self.dead[link].is_some() && self.pool_of(to, unit).is_some() {
                return self.dead[link].clone();
            }
        }
        let stages = self.pools.iter_mut().filter(|p| p.place != site);
        for pool in stages {
            if let Some(f) = pool.position(rank).and_then(|at| pool.wants[at].frame)
                && let Content::Failed(cause) = &pool.frames[f].content
            {
                let cause = cause.clone();
                pool.frames[f].content = Content::Empty;
                return Some(cause);
            }
        }
        None
    }

    /// The consumer goes on to what comes next.
    fn consumed(&mut self) {
        if self.demanded.0 < self.demanded.1 {
            self.demanded.0 += 1;
        }
        if self.demanded.0 >= self.demanded.1 {
            self.demanded = (0, 0);
            self.step += 1;
            if self.step as usize == self.spec.steps.len() {
                (self.pass, self.step) = (self.pass + 1, 0);
            }
        }
    }

    /// Fills the hole that is next with streamed units, and puts them into the order in which they will be asked for: those
    /// used in RAM before those used on a device, and of each those that a cache has before others. `passing`: they are a
    /// prompt's, which uses most units once and is to evict nothing.
    pub fn demand(&mut self, units: &mut [usize], passing: bool) {
        let at = Rank { pass: self.pass, step: self.step, nth: 0 };
        if self.spec.steps.get(self.step as usize) != Some(&Step::Hole) || self.demanded.1 > 0 {
            unreachable!("units were demanded at {at:?}, where there is no hole");
        }
        self.demanded = (1, 1 + units.len() as u32);
        self.passing = passing;
        self.sort(units);
        for pool in &mut self.pools {
            if pool.hints > 0 {
                pool.forget_all(|w| w.is_hint() && w.rank.pass == at.pass && w.rank.step == at.step);
            }
            // A pool that has not come to this hole will find it filled.
            if pool.holes.front() == Some(&at) {
                pool.holes.pop_front();
            }
        }
        let (mut hits, mut misses) = (0, 0);
        for (&unit, nth) in units.iter().zip(1..) {
            for place in [Place::Host, Place::Device] {
                let Some(p) = self.pool_for(place, unit) else { continue };
                if self.ways(place, unit).cache.is_some() {
                    let pool = &mut self.pools[p];
                    let hit = pool.policy == Policy::Cache && pool.holds(unit);
                    *(if hit { &mut hits } else { &mut misses }) += 1;
                    pool.room = pool.room.saturating_sub(usize::from(!hit));
                }
                self.pools[p].add(unit, Rank { nth, ..at });
            }
        }
        // What is there can be told at once.
        self.pools.iter_mut().filter(|p| p.policy == Policy::Cache && !p.wants.is_empty()).for_each(Pool::place);
        if hits + misses > 0 {
            self.counts[usize::from(passing)].add(hits, misses);
        }
        if units.is_empty() {
            self.consumed();
        }
    }

    /// Puts demanded units into their order, and counts the empty frames of their caches.
    fn sort(&mut self, units: &mut [usize]) {
        for unit in units.iter() {
            for through in &self.through {
                if let Some(c) = through[*unit].cache {
                    let pool = &mut self.pools[usize::from(c)];
                    pool.room = pool.empty();
                }
            }
        }
        let key = |unit: usize| {
            let cache = self.ways(Place::Host, unit).cache;
            let missing = cache.is_none_or(|c| !self.pools[usize::from(c)].has(unit));
            (self.spec.site_of(unit) == Place::Device, missing)
        };
        // By insertion: they are few, the order of equals stays, and nothing is allocated.
        for i in 1..units.len() {
            let at = units[..i].partition_point(|&u| key(u) <= key(units[i]));
            units[at..=i].rotate_right(1);
        }
    }

    /// Guesses that `unit` will be demanded at the hole of this step, in this pass if that is to come and else in the
    /// next. It gets no frame that anything else needs, and is forgotten when the hole is filled; a failure is counted
    /// and no more. False if there is no room for the guess.
    pub fn hint(&mut self, unit: usize, step: u32) -> bool {
        let pass = if step >= self.step { self.pass } else { self.pass + 1 };
        if self.spec.steps.get(step as usize) != Some(&Step::Hole) || (step == self.step && self.demanded.1 > 0) {
            return false;
        }
        let mut taken = false;
        self.passing = false;
        for place in [Place::Host, Place::Device] {
            let Some(p) = self.pool_for(place, unit) else { continue };
            let pool = &mut self.pools[p];
            if pool.hints < pool.frames.len() {
                let same = |w: &&Want| w.is_hint() && (w.rank.pass, w.rank.step) == (pass, step);
                if pool.wants.iter().filter(same).any(|w| w.unit == unit) {
                    continue;
                }
                pool.add(unit, Rank { pass, step, nth: HINTS + unit as u32 });
                taken = true;
            }
        }
        taken
    }

    /// All uses up to `rank` are over, or called where the place orders what comes after them: their frames are free.
    pub fn reached(&mut self, rank: Rank) {
        if self.clock.is_none_or(|c| c < rank) {
            self.clock = Some(rank);
        }
        // With them go stages whose unit came to its use by another way.
        for pool in &mut self.pools {
            while pool.wants.front().is_some_and(|w| w.rank <= rank) {
                pool.use_up(0);
            }
        }
    }

    /// Gives the pass under way up: its wants are forgotten, and the next one begins with the schedule's first unit.
    /// Frames that are ready or being written stay, and serve later wants for their units. Nothing may use a frame that
    /// was handed over any more.
    pub fn give_up(&mut self) {
        let under_way = self.step > 0 || self.demanded.1 > 0;
        let next = if under_way { self.pass + 1 } else { self.pass };
        let begin = Rank { pass: next, step: 0, nth: 0 };
        // The next pass is told of what fails in it: what failed for it before is brought once more.
        self.stale = self.next_id;
        for pool in &mut self.pools {
            pool.forget_all(|w| w.rank < begin);
            for frame in
                pool.frames.iter_mut().filter(|f| matches!(f.content, Content::Failed(_)) && !mutant("told-again"))
            {
                frame.content = Content::Empty;
                self.unused_failures += 1;
            }
            pool.holes.retain(|hole| *hole >= begin);
            if pool.pass < next {
                (pool.pass, pool.step) = (next, 0);
            }
        }
        (self.pass, self.step, self.demanded) = (next, 0, (0, 0));
        (self.awaited, self.news, self.late, self.given_up) = (None, false, None, begin);
    }

    /// Which of the links that sleep have something to carry; bit `i` is link `i`.
    pub fn wakes(&mut self, asleep: u32) -> u32 {
        self.refresh();
        let carries = |link: &usize| asleep & 1 << link != 0 && self.candidate(*link).is_some();
        (0..self.spec.links.len()).filter(carries).fold(0, |wakes, link| wakes | 1 << link)
    }

    /// Whether the consumer, told to wait, should ask again. Said once.
    pub fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// Failures of moves that nothing waited for.
    pub fn unused_failures(&self) -> u64 {
        self.unused_failures
    }

    /// Uses of units that have a cache, of single tokens or of prompts.
    pub fn cache_counts(&self, passing: bool) -> CacheCounts {
        self.counts[usize::from(passing)]
    }

    /// Whether [`Frames::hold`] would hand the unit that is demanded next over at once, from a place whose frames may be held many at
    /// a time: a cache, or a device.
    pub fn is_ready(&self, unit: usize) -> bool {
        let rank = Rank { pass: self.pass, step: self.step, nth: self.demanded.0 };
        let pool = self.pool_with(self.spec.site_of(unit), unit, rank).map(|p| &self.pools[p]);
        let want = pool.and_then(|pool| Some((pool, pool.wants[pool.position(rank)?])));
        want.is_some_and(|(pool, w)| {
            let kept = pool.policy == Policy::Cache || pool.place == Place::Device;
            let has = |f: usize| {
                matches!(pool.frames[f].content, Content::Ready { .. } | Content::Filling { queued: true, .. })
            };
            kept && w.unit == unit && self.late.is_none() && w.frame.is_some_and(has)
        })
    }

    /// Frames of a place, of all pools.
    pub fn frames_of(&self, place: Place) -> usize {
        self.pools.iter().filter(|p| p.place == place).map(|p| p.frames.len()).sum()
    }
}

fn name_of<C>(content: &Content<C>) -> &'static str {
    match content {
        Content::Empty => "empty",
        Content::Filling { .. } => "being written",
        Content::Ready { .. } => "ready",
        Content::Failed(_) => "failed",
    }
}

/// Whether a unit passes through frames of `place` on its way to where it is used.
fn crosses(spec: &Spec, unit: usize, place: Place) -> bool {
    let home = spec.homes[unit];
    match place {
        Place::Storage => false,
        Place::Host => home == Place::Storage,
        Place::Device => spec.site_of(unit) == Place::Device && home != Place::Device,
    }
}

#[cfg(test)]
impl<C> Frames<C> {
    /// What holds between any two calls.
    pub(super) fn check(&self) {
        for pool in &self.pools {
            assert!(pool.wants.iter().is_sorted_by(|a, b| a.rank < b.rank), "wants out of order");
            for (f, frame) in pool.frames.iter().enumerate() {
                let claims = pool.wants.iter().filter(|w| w.frame == Some(f)).count();
                assert_eq!(claims, frame.claims as usize, "claims of frame {f}");
            }
            // The earliest want has a frame, or one is about to be free: nothing that waits for it has them all.
            let first = pool.wants.iter().find(|w| !w.held);
            if let Some(w) = first.filter(|w| w.frame.is_none() && !w.is_hint()) {
                let later = |f: usize| pool.wants.iter().any(|w| w.frame == Some(f) && !w.held);
                let all = (0..pool.frames.len()).all(later);
                assert!(!all, "later wants have all frames, and {:?} none", w.rank);
            }
        }
    }
}

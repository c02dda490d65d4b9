//! A controller in software, with faults on demand and its own clock, and the driver tested on it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::bringup::{Controller, Fault, memory_needed};
use super::io::{Raises, Read, ReadDone};
use super::queue::Dma;
use super::quirks::Quirks;
use super::regs::{self, Registers};

const QUEUES: u64 = 0x20_0000;
const DATA: u64 = 0x4000_0000;
const DATA_LEN: usize = 4 << 20;
const BLOCKS: u64 = 4096;

/// What the model does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Wrong {
    #[default]
    Nothing,
    NeverReady,
    NeverDisabled,
    FatalOnEnable,
    FatalOnRead,
    SilentReads,
    Gone,
    Wanted,
    ForeignCid,
    OldCid,
    Metadata,
    Unhealthy,
    SharedControllers,
    Formatting,
    Sanitizing,
    NoSanitizeLog,
}

/// What the model does with an Abort.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum OnAbort {
    #[default]
    Obeys,
    /// Says that it did, and completes nothing.
    Pretends,
    Refuses,
    Silent,
}

#[derive(Default)]
struct Ring {
    sq: u64,
    cq: u64,
    entries: u32,
    head: u32,
    cq_tail: u32,
    /// How far the driver has taken completions, by its own word.
    cq_head: u32,
    phase: bool,
    interrupt: bool,
}

struct State {
    wrong: Wrong,
    cap: u64,
    registers: [u32; 16],
    rings: [Ring; 3],
    memory: Vec<Dma>,
    rng: ChaCha8Rng,
    /// Commands of the I/O queues, with the queue, not yet answered, in the order of their answers.
    open: Vec<(usize, [u32; 16])>,
    /// Statuses of the next reads.
    statuses: VecDeque<u16>,
    reads: u64,
    /// Next reads whose completion gets lost, and those lost so far.
    lose: usize,
    lost: Vec<(usize, [u32; 16])>,
    on_abort: OnAbort,
    aborts: u64,
    /// Pairs of I/O queues that it has.
    pairs: u16,
    interrupts: u64,
    doorbells: u64,
}

struct Model {
    state: RefCell<State>,
    clock: Cell<u64>,
}

/// What lies at byte `at` of the modelled namespace.
fn content(at: u64) -> u8 {
    (at / 512).wrapping_mul(31).wrapping_add(at * 7) as u8
}

impl Model {
    fn new(seed: u64, wrong: Wrong, memory: Vec<Dma>) -> Rc<Self> {
        let state = State {
            wrong,
            cap: 15 << 24 | 1 << 37 | 63,
            registers: [0; 16],
            rings: Default::default(),
            memory,
            rng: ChaCha8Rng::seed_from_u64(seed),
            open: Vec::new(),
            statuses: VecDeque::new(),
            reads: 0,
            lose: 0,
            lost: Vec::new(),
            on_abort: OnAbort::Obeys,
            aborts: 0,
            pairs: 2,
            interrupts: 0,
            doorbells: 0,
        };
        Rc::new(Self { state: RefCell::new(state), clock: Cell::new(0) })
    }
}

impl State {
    fn at(&self, iova: u64, len: usize) -> Dma {
        let found = self.memory.iter().find(|m| iova >= m.iova && iova + len as u64 <= m.iova + m.len as u64);
        let memory = found.unwrap_or_else(|| panic!("DMA to {iova:#x}, which is not mapped"));
        memory.part((iova - memory.iova) as usize, len)
    }

    fn complete(&mut self, queue: usize, cid: u16, status: u16) {
        self.answer(queue, cid, status, 0);
    }

    fn answer(&mut self, queue: usize, cid: u16, status: u16, result: u32) {
        let ring = &self.rings[queue];
        let entry = self.at(ring.cq + u64::from(ring.cq_tail) * 16, 16);
        entry.write32(0, result);
        entry.write32(8, ring.head);
        entry.write32(12, u32::from(cid) | u32::from(ring.phase) << 16 | u32::from(status) << 17);
        let ring = &mut self.rings[queue];
        ring.cq_tail += 1;
        if ring.cq_tail == ring.entries {
            ring.cq_tail = 0;
            ring.phase = !ring.phase;
        }
        assert_ne!(ring.cq_tail, ring.cq_head, "completion queue {queue} is full");
        self.interrupts += u64::from(ring.interrupt);
    }

    fn fetch(&mut self, queue: usize, tail: u32) -> Vec<[u32; 16]> {
        let mut out = Vec::new();
        while self.rings[queue].head != tail {
            let ring = &self.rings[queue];
            let entry = self.at(ring.sq + u64::from(ring.head) * 64, 64);
            out.push(std::array::from_fn(|i| entry.read32(i * 4)));
            let ring = &mut self.rings[queue];
            ring.head = (ring.head + 1) % ring.entries;
        }
        out
    }

    fn admin(&mut self, e: [u32; 16]) {
        let address = u64::from(e[6]) | u64::from(e[7]) << 32;
        match e[0] & 0xff {
            0x06 => {
                let page = self.at(address, 4096);
                let mut bytes = vec![0u8; 4096];
                if e[10] == 1 {
                    bytes[4..11].copy_from_slice(b"MODEL01");
                    bytes[24..29].copy_from_slice(b"Model");
                    bytes[76] = if self.wrong == Wrong::SharedControllers { 2 } else { 0 };
                    bytes[77] = 5;
                    bytes[328] = u8::from(matches!(self.wrong, Wrong::Sanitizing | Wrong::NoSanitizeLog));
                    bytes[512] = 0x66;
                    bytes[513] = 0x44;
                } else {
                    bytes[..8].copy_from_slice(&BLOCKS.to_le_bytes());
                    bytes[104..128].fill(0xee);
                    bytes[32] = if self.wrong == Wrong::Formatting { 0x80 | 60 } else { 0x80 };
                    bytes[130] = 9;
                    bytes[128] = if self.wrong == Wrong::Metadata { 8 } else { 0 };
                }
                for (i, word) in bytes.as_chunks::<4>().0.iter().enumerate() {
                    page.write32(i * 4, u32::from_le_bytes(*word));
                }
            }
            0x05 | 0x01 => {
                assert!((1..=u32::from(self.pairs)).contains(&(e[10] & 0xffff)), "queue {}", e[10] & 0xffff);
                let ring = &mut self.rings[(e[10] & 0xffff) as usize];
                ring.entries = (e[10] >> 16) + 1;
                if e[0] & 0xff == 0x05 {
                    ring.cq = address;
                    ring.interrupt = e[11] & 2 != 0;
                } else {
                    ring.sq = address
                }
                (ring.head, ring.cq_tail, ring.cq_head, ring.phase) = (0, 0, 0, true);
            }
            0x09 => {
                let n = u32::from(self.pairs - 1);
                return self.answer(0, (e[0] >> 16) as u16, 0, n << 16 | n);
            }
            0x08 => return self.abort(e),
            0x02 if e[10] & 0xff == 0x81 && self.wrong == Wrong::NoSanitizeLog => {
                return self.complete(0, (e[0] >> 16) as u16, 0x109);
            }
            0x02 if e[10] & 0xff == 0x81 => self.at(address, 512).write32(0, 2 << 16),
            0x02 if self.wrong == Wrong::Unhealthy => self.at(address, 512).write32(0, 0x08),
            _ => {}
        }
        self.complete(0, (e[0] >> 16) as u16, 0);
    }

    fn abort(&mut self, e: [u32; 16]) {
        self.aborts += 1;
        let queue = (e[10] & 0xffff) as usize;
        assert!(queue == 1 || queue == 2, "of an I/O queue");
        let (own, cid) = ((e[0] >> 16) as u16, e[10] >> 16);
        match self.on_abort {
            OnAbort::Silent => {}
            OnAbort::Refuses => self.answer(0, own, 0, 1),
            OnAbort::Pretends => self.answer(0, own, 0, 0),
            OnAbort::Obeys => {
                let found = self.lost.iter().position(|(of, lost)| *of == queue && lost[0] >> 16 == cid);
                self.answer(0, own, 0, u32::from(found.is_none()));
                if let Some(i) = found {
                    self.lost.swap_remove(i);
                    self.complete(queue, cid as u16, 7);
                }
            }
        }
    }

    /// The bytes of a read, to the pages that its PRPs name.
    fn transfer(&self, e: &[u32; 16]) {
        let lba = u64::from(e[10]) | u64::from(e[11]) << 32;
        let len = (u64::from(e[12] & 0xffff) + 1) * 512;
        let prp1 = u64::from(e[6]) | u64::from(e[7]) << 32;
        let prp2 = u64::from(e[8]) | u64::from(e[9]) << 32;
        let first = (4096 - prp1 % 4096).min(len);
        let rest = len - first;
        let mut done = 0;
        while done < len {
            let (to, n) = if done == 0 {
                (prp1, first)
            } else {
                let i = (done - first) / 4096;
                let page = if rest <= 4096 {
                    prp2
                } else {
                    let entry = self.at(prp2 + i * 8, 8);
                    u64::from(entry.read32(0)) | u64::from(entry.read32(4)) << 32
                };
                (page, (len - done).min(4096))
            };
            let memory = self.at(to, n as usize);
            for at in (0..n).step_by(4) {
                let word = std::array::from_fn(|i| content(lba * 512 + done + at + i as u64));
                memory.write32(at as usize, u32::from_le_bytes(word));
            }
            done += n;
        }
    }

    /// Answers some of the open reads, in any order.
    fn step(&mut self) {
        if matches!(self.wrong, Wrong::SilentReads | Wrong::FatalOnRead | Wrong::Wanted) {
            return;
        }
        let answers = self.rng.random_range(0..=self.open.len());
        for _ in 0..answers {
            let i = self.rng.random_range(0..self.open.len());
            let (queue, e) = self.open.swap_remove(i);
            if self.lose > 0 {
                self.lose -= 1;
                self.lost.push((queue, e));
                continue;
            }
            let status = self.statuses.pop_front().unwrap_or(0);
            if status == 0 {
                self.transfer(&e);
            }
            self.reads += 1;
            let cid = (e[0] >> 16) as u16;
            let cid = match self.wrong {
                Wrong::ForeignCid => cid ^ 0x0fff,
                Wrong::OldCid => cid ^ 0x1000,
                _ => cid,
            };
            self.complete(queue, cid, status);
        }
    }
}

impl Registers for Rc<Model> {
    fn read32(&self, offset: u32) -> u32 {
        let state = self.state.borrow();
        if state.wrong == Wrong::Gone {
            return regs::GONE;
        }
        match offset {
            0 => state.cap as u32,
            4 => (state.cap >> 32) as u32,
            regs::CSTS => {
                let enabled = state.registers[5] & regs::CC_EN != 0;
                let mut csts = state.registers[7] & !1;
                if (enabled && state.wrong != Wrong::NeverReady) || state.wrong == Wrong::NeverDisabled {
                    csts |= regs::CSTS_RDY;
                }
                if enabled && state.wrong == Wrong::FatalOnEnable
                    || enabled && state.wrong == Wrong::FatalOnRead && !state.open.is_empty()
                {
                    csts |= regs::CSTS_CFS;
                }
                if state.registers[5] & regs::CC_SHN_MASK != 0 {
                    csts |= 2 << 2;
                }
                csts
            }
            _ => state.registers[offset as usize / 4],
        }
    }

    fn write32(&self, offset: u32, value: u32) {
        let mut state = self.state.borrow_mut();
        match offset {
            0x1000 => {
                for e in state.fetch(0, value) {
                    state.admin(e);
                }
            }
            0x1008 | 0x1010 => {
                let queue = (offset as usize - 0x1000) / 8;
                let fresh = state.fetch(queue, value);
                state.open.extend(fresh.into_iter().map(|e| (queue, e)));
                state.doorbells += 1;
            }
            0x1004 | 0x100c | 0x1014 => {
                state.rings[(offset as usize - 0x1004) / 8].cq_head = value;
                state.doorbells += 1;
            }
            regs::CC => {
                state.registers[5] = value;
                if value & 1 == 1 {
                    let base = |i: usize| u64::from(state.registers[i]) | u64::from(state.registers[i + 1]) << 32;
                    let (sq, cq) = (base(10), base(12));
                    let entries = (state.registers[9] & 0xfff) + 1;
                    state.rings[0] = Ring { sq, cq, entries, phase: true, ..Ring::default() };
                } else {
                    state.open.clear();
                    if state.wrong != Wrong::NeverDisabled {
                        state.lost.clear();
                    }
                }
            }
            _ => state.registers[offset as usize / 4] = value,
        }
    }

    fn now(&self) -> Duration {
        Duration::from_millis(self.clock.get())
    }

    fn wanted_back(&self) -> bool {
        self.state.borrow().wrong == Wrong::Wanted
    }

    fn pause(&self) {
        self.clock.set(self.clock.get() + 10);
        self.state.borrow_mut().step();
    }
}

/// Memory that outlives the test's controller.
struct Bench {
    model: Rc<Model>,
    queues: Dma,
    data: Dma,
}

fn leak(len: usize, iova: u64) -> Dma {
    let words: &'static mut [u64] = vec![0; len / 8].leak();
    // SAFETY: leaked, 8-byte aligned memory that nothing else refers to.
    unsafe { Dma::new(words.as_mut_ptr().cast(), iova, len) }
}

fn bench(seed: u64, wrong: Wrong) -> Bench {
    let queues = leak(memory_needed(64), QUEUES);
    let data = leak(DATA_LEN, DATA);
    Bench { model: Model::new(seed, wrong, vec![queues, data]), queues, data }
}

fn start(b: &Bench, entries: u16) -> Result<Controller<Rc<Model>>, Fault> {
    start_with(b, entries, Quirks::default())
}

fn start_with(b: &Bench, entries: u16, quirks: Quirks) -> Result<Controller<Rc<Model>>, Fault> {
    Controller::start(b.model.clone(), b.queues, 1, entries, quirks, true).map_err(|(fault, _)| fault)
}

fn until_done(c: &mut Controller<Rc<Model>>) -> Result<Vec<ReadDone>, Fault> {
    let mut out = Vec::new();
    while c.outstanding() > 0 {
        c.poll(&mut out)?;
        c.pause();
    }
    Ok(out)
}

fn one(c: &mut Controller<Rc<Model>>) -> Result<Vec<ReadDone>, Fault> {
    assert!(c.push(Read { tag: 1, lba: 3, blocks: 1, to: DATA, raises: Raises::Few }).unwrap());
    c.ring();
    until_done(c)
}

#[test]
fn random_reads_return_the_right_bytes_over_many_wraps() {
    for seed in 0..8 {
        let b = bench(seed, Wrong::Nothing);
        let mut c = start(&b, [2, 3, 5, 64][seed as usize % 4]).unwrap();
        assert_eq!(c.info.serial, "MODEL01");
        assert_eq!(c.max_transfer(), 128 << 10);
        let mut rng = ChaCha8Rng::seed_from_u64(seed + 100);
        for _ in 0..200 {
            let mut reads = Vec::new();
            for i in 0..8u64 {
                let blocks = rng.random_range(1..=256u32);
                let lba = rng.random_range(0..=BLOCKS - u64::from(blocks));
                let to = DATA + i * (256 << 10) + 4 * rng.random_range(0..1024u64);
                let read = Read { tag: i, lba, blocks, to, raises: Raises::Few };
                if !c.push(read).unwrap() {
                    break;
                }
                reads.push(read);
            }
            c.ring();
            let done = until_done(&mut c).unwrap();
            assert_eq!(done.len(), reads.len());
            for read in reads {
                for at in [0, 511, u64::from(read.blocks) * 256, u64::from(read.blocks) * 512 - 1] {
                    let byte = (read.to - DATA + at) as usize;
                    let word = b.data.read32(byte & !3).to_le_bytes();
                    assert_eq!(word[byte % 4], content(read.lba * 512 + at), "seed {seed}, {read:?}, byte {at}");
                }
            }
        }
        c.stop().unwrap();
    }
}

#[test]
fn the_ends_of_few_reads_raise_interrupts() {
    for (pairs, each) in [(2, 3), (1, 0)] {
        let b = bench(1, Wrong::Nothing);
        b.model.state.borrow_mut().pairs = pairs;
        let mut c = start(&b, 64).unwrap();
        for few in [true, false, true] {
            let before = b.model.state.borrow().interrupts;
            let n = if few { 3 } else { 40 };
            for tag in 0..n {
                assert!(c.push(Read { tag, lba: tag, blocks: 1, to: DATA + tag * 4096, raises: Raises::Few }).unwrap());
            }
            c.ring();
            assert_eq!(c.will_interrupt(), pairs == 2 && few);
            let mut tags: Vec<u64> = until_done(&mut c).unwrap().iter().map(|done| done.read.tag).collect();
            tags.sort_unstable();
            assert_eq!(tags, Vec::from_iter(0..n));
            assert_eq!(b.model.state.borrow().interrupts - before, each, "only three of many");
        }
        c.stop().unwrap();
    }
}

/// Large requests raise an interrupt each, however many they are, and few small reads next to them do too; more than few
/// small ones have to be looked for.
#[test]
fn a_large_request_raises_one_interrupt() {
    use Raises::{Few, Many, Never};
    for pairs in [2, 1] {
        let b = bench(1, Wrong::Nothing);
        b.model.state.borrow_mut().pairs = pairs;
        let mut c = start(&b, 64).unwrap();
        let push = |c: &mut Controller<Rc<Model>>, n: u64, kinds: &[Raises]| {
            for tag in 0..n {
                for &raises in kinds {
                    assert!(c.push(Read { tag, lba: tag, blocks: 1, to: DATA + tag * 4096, raises }).unwrap());
                }
            }
            c.ring();
        };
        let raised = || b.model.state.borrow().interrupts;
        for (large, small, heard, all) in [(10, 0, true, 10), (10, 3, true, 13), (10, 4, false, 13), (0, 3, true, 3)] {
            let before = raised();
            push(&mut c, large, &[Never, Never, Many]);
            push(&mut c, small, &[Few]);
            assert_eq!(c.will_interrupt(), heard && pairs == 2, "{large} and {small}");
            assert_eq!(until_done(&mut c).unwrap().len() as u64, 3 * large + small);
            assert!(!c.will_interrupt());
            assert_eq!(raised() - before, if pairs == 2 { all } else { 0 }, "{large} and {small}");
        }
        // Nobody waits for an interrupt that does not come.
        push(&mut c, 4, &[Never]);
        assert!(!c.will_interrupt());
        assert_eq!(until_done(&mut c).unwrap().len(), 4);
        // With a read that failed in between, what is tried again counts once.
        b.model.state.borrow_mut().statuses.extend([6, 6, 6]);
        push(&mut c, 5, &[Never, Many]);
        assert_eq!(until_done(&mut c).unwrap().len(), 10);
        assert!(!c.will_interrupt());
        push(&mut c, 4, &[Few]);
        assert!(!c.will_interrupt());
        assert_eq!(until_done(&mut c).unwrap().len(), 4);
        c.stop().unwrap();
    }
}

#[test]
fn doorbells_are_rung_only_when_needed() {
    let b = bench(1, Wrong::Nothing);
    b.model.state.borrow_mut().pairs = 1;
    let mut c = start(&b, 64).unwrap();
    let before = b.model.state.borrow().doorbells;
    for _ in 0..631 {
        one(&mut c).unwrap();
    }
    let rung = b.model.state.borrow().doorbells - before;
    assert_eq!(rung, 631 + 10, "one a read, and one for 63 completions taken");
}

#[test]
fn short_queues_fill_and_empty() {
    let b = bench(1, Wrong::Nothing);
    b.model.state.borrow_mut().cap &= !0xffff;
    b.model.state.borrow_mut().cap |= 1;
    b.model.state.borrow_mut().pairs = 1;
    let mut c = start(&b, 64).unwrap();
    let read = Read { tag: 0, lba: 0, blocks: 1, to: DATA, raises: Raises::Few };
    assert!(c.push(read).unwrap());
    assert!(!c.push(read).unwrap(), "two entries hold one command");
    c.ring();
    assert_eq!(until_done(&mut c).unwrap().len(), 1);
}

#[test]
fn a_controller_that_never_becomes_ready_is_given_up() {
    let b = bench(1, Wrong::NeverReady);
    assert!(matches!(start(&b, 8), Err(Fault::Late { state: "enabling", .. })));
    assert!(b.model.now() < Duration::from_secs(60), "deadlines hold");
}

#[test]
fn a_controller_that_stays_ready_is_given_up() {
    assert!(matches!(start(&bench(1, Wrong::NeverDisabled), 8), Err(Fault::Late { state: "disabling", .. })));
}

#[test]
fn a_fatal_status_is_named() {
    assert!(matches!(start(&bench(1, Wrong::FatalOnEnable), 8), Err(Fault::Fatal { state: "enabling" })));
}

#[test]
fn a_missing_controller_is_named() {
    assert_eq!(start(&bench(1, Wrong::Gone), 8).err(), Some(Fault::Gone));
}

/// Guards against doorbells beyond the mapped registers, whose writes would be dropped until a deadline passes.
#[test]
fn doorbells_that_are_not_mapped_are_refused_at_once() {
    for (shift, fits) in [(0, true), (9, false), (15, false)] {
        let b = bench(1, Wrong::Nothing);
        b.model.state.borrow_mut().cap |= shift << 32;
        match start(&b, 8) {
            Err(Fault::Unsupported(why)) if !fits => assert!(why.contains("doorbells"), "{why}"),
            other => assert!(fits && !matches!(other, Err(Fault::Unsupported(_))), "{shift}"),
        }
    }
}

#[test]
fn metadata_is_refused() {
    assert!(matches!(start(&bench(1, Wrong::Metadata), 8), Err(Fault::Unsupported(_))));
}

#[test]
fn unknown_and_stale_identifiers_stop_the_controller() {
    for wrong in [Wrong::ForeignCid, Wrong::OldCid] {
        let b = bench(1, Wrong::Nothing);
        let mut c = start(&b, 8).unwrap();
        b.model.state.borrow_mut().wrong = wrong;
        assert!(matches!(one(&mut c), Err(Fault::Unknown(_))));
        assert!(c.stopped, "disabled, so that no DMA follows");
        assert!(c.push(Read { tag: 0, lba: 0, blocks: 1, to: DATA, raises: Raises::Few }).is_err());
    }
}

/// Loses the completion of one read; how it ends, and after how many seconds.
fn lose_one(on_abort: OnAbort, lose: usize, wrong: Wrong) -> (Bench, Controller<Rc<Model>>, LostRead) {
    let b = bench(1, Wrong::Nothing);
    let mut c = start(&b, 8).unwrap();
    {
        let mut state = b.model.state.borrow_mut();
        (state.on_abort, state.lose, state.wrong) = (on_abort, lose, wrong);
    }
    let began = b.model.now();
    let result = one(&mut c);
    let seconds = (b.model.now() - began).as_secs();
    (b, c, LostRead { result, seconds })
}

struct LostRead {
    result: Result<Vec<ReadDone>, Fault>,
    seconds: u64,
}

#[test]
fn a_lost_completion_is_aborted_and_read_again() {
    let (b, mut c, lost) = lose_one(OnAbort::Obeys, 1, Wrong::Nothing);
    assert_eq!(lost.result.unwrap()[0].result, Ok(()));
    assert!((30..40).contains(&lost.seconds), "{}", lost.seconds);
    assert_eq!(b.model.state.borrow().aborts, 1);
    assert_eq!(b.data.read32(0), u32::from_le_bytes(std::array::from_fn(|i| content(3 * 512 + i as u64))));
    assert_eq!(one(&mut c).unwrap()[0].result, Ok(()), "the drive stays in use");
    c.stop().unwrap();
}

#[test]
fn an_abort_that_does_not_help_ends_in_a_reset() {
    for (on_abort, words) in [
        (OnAbort::Silent, "the Abort command got no answer"),
        (OnAbort::Refuses, "the drive would not abort it"),
        (OnAbort::Pretends, "it never ended although the drive says it was aborted"),
    ] {
        let (b, c, lost) = lose_one(on_abort, 1, Wrong::Nothing);
        let fault = lost.result.unwrap_err();
        assert_eq!(fault, Fault::Unanswered { block: 3, blocks: 1, seconds: 40, abort: words });
        assert!(lost.seconds < 60, "{on_abort:?}: {} s", lost.seconds);
        let state = b.model.state.borrow();
        assert!(c.stopped && state.lost.is_empty() && state.registers[5] & regs::CC_EN == 0, "left quiet");
    }
}

#[test]
fn a_read_is_aborted_once() {
    let (b, c, lost) = lose_one(OnAbort::Obeys, 2, Wrong::Nothing);
    assert!(matches!(lost.result, Err(Fault::Unanswered { abort: "it had been aborted once before", .. })));
    assert!(lost.seconds < 90);
    assert_eq!(b.model.state.borrow().aborts, 1);
    assert!(c.stopped);
}

#[test]
fn aborts_keep_to_the_drives_limit() {
    let b = bench(3, Wrong::Nothing);
    let mut c = start(&b, 8).unwrap();
    b.model.state.borrow_mut().lose = 5;
    for tag in 0..5 {
        assert!(c.push(Read { tag, lba: tag, blocks: 1, to: DATA + tag * 4096, raises: Raises::Few }).unwrap());
    }
    c.ring();
    let mut out = Vec::new();
    while c.outstanding() > 0 {
        c.poll(&mut out).unwrap();
        assert!(c.admin.outstanding() <= 1, "ACL of the model is 0: one Abort at a time");
        c.pause();
    }
    assert_eq!(out.len(), 5);
    assert!(out.iter().all(|done| done.result.is_ok()));
    assert_eq!(b.model.state.borrow().aborts, 5);
}

#[test]
fn an_answer_that_comes_late_is_no_error() {
    // The Abort is never answered, but its read is: nothing is wrong then, even at shutdown.
    let b = bench(1, Wrong::Nothing);
    let mut c = start(&b, 8).unwrap();
    b.model.state.borrow_mut().wrong = Wrong::SilentReads;
    b.model.state.borrow_mut().on_abort = OnAbort::Silent;
    assert!(c.push(Read { tag: 1, lba: 3, blocks: 1, to: DATA, raises: Raises::Few }).unwrap());
    c.ring();
    let mut out = Vec::new();
    while b.model.state.borrow().aborts == 0 {
        c.poll(&mut out).unwrap();
        c.pause();
    }
    b.model.state.borrow_mut().wrong = Wrong::Nothing;
    let done = until_done(&mut c).unwrap();
    assert_eq!(done[0].result, Ok(()));
    assert_eq!(c.admin.outstanding(), 1);
    c.stop().unwrap();
}

#[test]
fn a_reset_that_never_ends_keeps_the_memory() {
    let (b, mut c, lost) = lose_one(OnAbort::Silent, 1, Wrong::NeverDisabled);
    assert!(matches!(lost.result, Err(Fault::StillRunning(cause)) if matches!(*cause, Fault::Unanswered { .. })));
    assert!(lost.seconds < 120, "{} s", lost.seconds);
    assert!(!c.stopped && c.stop().is_err(), "whoever owns the memory must keep it");
    assert!(!b.model.state.borrow().lost.is_empty());
}

#[test]
fn silence_ends_at_the_deadline() {
    let (_, c, lost) = lose_one(OnAbort::Silent, 0, Wrong::SilentReads);
    assert!(matches!(lost.result, Err(Fault::Unanswered { .. })));
    assert!(lost.seconds < 60);
    assert!(c.stopped);
}

#[test]
fn a_fatal_status_while_reading_is_named() {
    let b = bench(1, Wrong::Nothing);
    let mut c = start(&b, 8).unwrap();
    b.model.state.borrow_mut().wrong = Wrong::FatalOnRead;
    let began = b.model.now();
    assert!(matches!(one(&mut c), Err(Fault::Fatal { state: "reading" })));
    assert!(b.model.now() - began < Duration::from_secs(5), "long before the deadline");
    assert!(c.stopped);
}

#[test]
fn a_drive_that_fails_is_refused() {
    assert!(matches!(start(&bench(1, Wrong::Unhealthy), 8), Err(Fault::Unsupported(_))));
}

#[test]
fn shared_formatting_and_erased_drives_are_refused() {
    let cases =
        [(Wrong::SharedControllers, "CMIC"), (Wrong::Formatting, "60 % remain"), (Wrong::Sanitizing, "sanitize")];
    for (wrong, word) in cases {
        let fault = start(&bench(1, wrong), 8).err().unwrap();
        assert!(fault.to_string().contains(word), "{wrong:?}: {fault}");
    }
    let b = bench(1, Wrong::NoSanitizeLog);
    assert!(start(&b, 8).is_ok(), "a controller that keeps no such log after all");
}

#[test]
fn removal_while_reading_is_named() {
    let b = bench(1, Wrong::Nothing);
    let mut c = start(&b, 8).unwrap();
    assert!(c.push(Read { tag: 1, lba: 3, blocks: 1, to: DATA, raises: Raises::Few }).unwrap());
    c.ring();
    b.model.state.borrow_mut().open.clear();
    b.model.state.borrow_mut().wrong = Wrong::Gone;
    let began = b.model.now();
    assert_eq!(until_done(&mut c), Err(Fault::Gone));
    assert!(b.model.now() - began < Duration::from_secs(1), "at once");
    assert!(c.stopped, "a drive that is gone writes nothing");
    assert_eq!(c.poll(&mut Vec::new()), Err(Fault::Gone));
}

#[test]
fn a_drive_that_is_wanted_back_is_given_back() {
    let b = bench(1, Wrong::Nothing);
    let mut c = start(&b, 8).unwrap();
    b.model.state.borrow_mut().wrong = Wrong::Wanted;
    let began = b.model.now();
    assert_eq!(one(&mut c), Err(Fault::Wanted));
    assert!(b.model.now() - began < Duration::from_secs(1), "soon");
    assert!(c.stopped && b.model.state.borrow().registers[5] & regs::CC_EN == 0, "left quiet");
}

#[test]
fn errors_are_retried_unless_they_are_final() {
    for (status, reads, ok) in [(0x006, 2, true), (0x4006, 1, false), (0x281, 1, false), (0x300, 2, true)] {
        let b = bench(1, Wrong::Nothing);
        let mut c = start(&b, 8).unwrap();
        b.model.state.borrow_mut().statuses.push_back(status);
        let done = one(&mut c).unwrap();
        assert_eq!(done[0].result.is_ok(), ok, "{status:#x}");
        assert_eq!(b.model.state.borrow().reads, reads, "{status:#x}");
    }
}

#[test]
fn quirks_are_followed() {
    let b = bench(1, Wrong::Nothing);
    let c = start(&b, 8).unwrap();
    assert_eq!((c.namespace.nguid, c.namespace.eui64), ([0xee; 16], [0xee; 8]));
    assert_eq!(c.max_transfer_at(100 << 10), 128 << 10);

    let quirks = Quirks { bogus_ids: true, stripes: true, ready_delay: Duration::from_secs(2), ..Quirks::default() };
    let mut c = start_with(&b, 8, quirks).unwrap();
    assert_eq!((c.namespace.nguid, c.namespace.eui64), ([0; 16], [0; 8]));
    assert_eq!(c.max_transfer_at(100 << 10), 28 << 10);
    assert_eq!(c.max_transfer_at(256 << 10), 128 << 10);
    let began = b.model.now();
    c.stop().unwrap();
    assert!(b.model.now() - began >= Duration::from_secs(2));

    let quirks = Quirks { unsupported: Some("its submission entries have 128 bytes"), ..Quirks::default() };
    assert!(matches!(start_with(&b, 8, quirks), Err(Fault::Unsupported(_))));
}

#[test]
fn retries_end() {
    let b = bench(1, Wrong::Nothing);
    let mut c = start(&b, 8).unwrap();
    b.model.state.borrow_mut().statuses.extend([6; 10]);
    assert!(one(&mut c).unwrap()[0].result.is_err());
    assert_eq!(b.model.state.borrow().reads, 4);
}

#[test]
fn reads_outside_the_namespace_are_never_sent() {
    let b = bench(1, Wrong::Nothing);
    let mut c = start(&b, 8).unwrap();
    for (lba, blocks) in [(BLOCKS, 1), (BLOCKS - 1, 2), (u64::MAX, 1), (0, 0), (0, 257)] {
        assert!(c.push(Read { tag: 0, lba, blocks, to: DATA, raises: Raises::Few }).is_err(), "{lba} {blocks}");
    }
    assert_eq!(b.model.state.borrow().reads, 0);
}

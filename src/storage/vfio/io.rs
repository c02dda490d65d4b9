//! Reads on the I/O queue: submission, polled completion, retries, deadlines.

use std::time::Duration;

use super::bringup::{Controller, Fault};
use super::command::Command;
use super::deadline::Abort;
use super::prp;
use super::queue::{Dma, QueuePair};
use super::regs::Registers;
use super::status::Status;

const TRIES: u8 = 4;
/// Small reads whose ends raise interrupts at once: looking for the end of few costs more.
const FEW: usize = 3;

/// A read of whole blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// Handed back when it is done.
    pub tag: u64,
    /// First block.
    pub lba: u64,
    /// Blocks: at most `max_transfer / block size`.
    pub blocks: u32,
    /// Where the bytes go, on the controller's side; a multiple of 4.
    pub to: u64,
    /// Whether its end raises an interrupt.
    pub raises: Raises,
}

/// Whether the end of a read raises an interrupt, if the drive has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Raises {
    /// While few such reads are outstanding: an interrupt each for many costs more than looking for their ends.
    #[default]
    Few,
    /// Among many others too: so many bytes take their time.
    Many,
    /// No: a read of the same request that does was pushed behind it.
    Never,
}

/// A read that the controller has.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) read: Read,
    tries: u8,
    pub(super) end: Duration,
    pub(super) abort: Abort,
}

/// A read that is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadDone {
    /// The read.
    pub read: Read,
    /// How it ended.
    pub result: Result<(), Status>,
}

/// A pair of I/O queues and the reads in it.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) queue: QueuePair,
    /// By slot.
    pub(super) pending: Vec<Option<Pending>>,
    /// A page for each slot.
    lists: Dma,
    /// Completions consumed but not yet acknowledged through the doorbell of the completion queue.
    untold: usize,
    /// The tail that the controller was shown last.
    shown: u16,
    /// Reads in the queue, by [`Raises`].
    count: [usize; 3],
}

impl Lane {
    /// Bytes of memory for queues of `entries`.
    pub(super) fn bytes(entries: u16) -> usize {
        let (sq, cq) = QueuePair::bytes(entries);
        sq + cq + usize::from(entries) * 4096
    }

    /// Empty queues over `memory`, as long as [`Lane::bytes`] says.
    pub(super) fn new(id: u16, entries: u16, memory: Dma) -> Self {
        let (sq, cq) = QueuePair::bytes(entries);
        Self {
            queue: QueuePair::new(id, entries, memory.part(0, sq), memory.part(sq, cq)),
            pending: (0..entries).map(|_| None).collect(),
            lists: memory.part(sq + cq, usize::from(entries) * 4096),
            untold: 0,
            shown: 0,
            count: [0; 3],
        }
    }

    /// True if the controller could run out of completion entries: it counts those as taken that it has
    /// not been told of.
    fn must_tell(&self) -> bool {
        self.queue.outstanding() + self.untold >= self.queue.entries().into()
    }
}

impl<R: Registers> Controller<R> {
    /// Gives a read to the controller; `false` if the queue is full. The controller sees it after
    /// [`Controller::ring`]. Whether its end raises an interrupt, if there are any, says [`Read::raises`].
    pub fn push(&mut self, read: Read) -> Result<bool, Fault> {
        if let Some(fault) = &self.dead {
            return Err(fault.clone());
        }
        let bytes = u64::from(read.blocks) << self.namespace.block_shift;
        let inside = read.lba.checked_add(read.blocks.into()).is_some_and(|end| end <= self.namespace.blocks);
        if !inside || read.blocks == 0 || read.blocks > 1 << 16 || bytes > self.max_transfer() {
            return Err(Fault::Unsupported(format!(
                "a read of {} blocks at {} is outside the drive's limits",
                read.blocks, read.lba
            )));
        }
        let Some((lane, slot)) = self.take_slot(read.raises) else {
            return Ok(false);
        };
        self.write(lane, slot, read, 1, Abort::NotSent)?;
        Ok(true)
    }

    /// Lane and slot for the next read: in the last lane if its end is to raise an interrupt, and there is room.
    fn take_slot(&mut self, raises: Raises) -> Option<(usize, u16)> {
        let last = self.lanes.len() - 1;
        let raise = last > 0
            && match raises {
                Raises::Few => self.polled() == 0 && self.lanes[last].count[Raises::Few as usize] < FEW,
                Raises::Many => true,
                Raises::Never => false,
            };
        let there = if raise { self.lanes[last].queue.take() } else { None };
        there.map(|slot| (last, slot)).or_else(|| Some((0, self.lanes[0].queue.take()?)))
    }

    /// Reads whose ends raise no interrupt and have to be looked for.
    fn polled(&self) -> usize {
        let lane = &self.lanes[0];
        lane.queue.outstanding() - lane.count[Raises::Never as usize]
    }

    fn write(&mut self, lane: usize, slot: u16, read: Read, tries: u8, abort: Abort) -> Result<(), Fault> {
        let end = self.regs.now() + self.limits.read;
        let lane = &mut self.lanes[lane];
        let bytes = u64::from(read.blocks) << self.namespace.block_shift;
        let list = lane.lists.part(usize::from(slot) * 4096, 4096);
        let entry = |i: usize, address: u64| list.write64(i * 8, address);
        let (prp1, prp2) = prp::build(read.to, bytes, list.iova, entry)
            .ok_or_else(|| Fault::Unsupported(format!("{bytes} bytes at {:#x} fit no page list", read.to)))?;
        let blocks = (read.blocks & 0xffff) as u16;
        lane.queue.push(slot, &Command::Read { nsid: self.nsid, lba: read.lba, blocks, prp1, prp2 });
        lane.pending[usize::from(slot)] = Some(Pending { read, tries, end, abort });
        lane.count[read.raises as usize] += 1;
        self.watch.end_by(end);
        Ok(())
    }

    /// Shows the controller everything pushed so far.
    pub fn ring(&mut self) {
        for lane in 0..self.lanes.len() {
            let lane = &mut self.lanes[lane];
            let (id, head, tail) = (lane.queue.id, lane.queue.head(), lane.queue.tail());
            // A register write costs much where registers are emulated, and something everywhere.
            let tell = lane.must_tell();
            if tell {
                lane.untold = 0;
            }
            let shown = std::mem::replace(&mut lane.shown, tail) == tail;
            if tell {
                self.regs.write32(self.doorbell(id, true), head.into());
            }
            if !shown {
                self.regs.write32(self.doorbell(id, false), tail.into());
            }
        }
    }

    /// Reads that the controller has.
    pub fn outstanding(&self) -> usize {
        self.lanes.iter().map(|lane| lane.queue.outstanding()).sum()
    }

    /// True if the interrupt says when the next read has ended that somebody waits for: reads that raise it are outstanding, and none
    /// that has to be looked for. Of a request that raises one, reads may end behind the one that does: the next interrupt finds them,
    /// or a look where none is to come.
    pub fn will_interrupt(&self) -> bool {
        let raise = self.lanes[1..].iter().any(|lane| lane.queue.outstanding() > 0);
        raise && self.polled() == 0
    }

    /// Appends the reads that are done. After a fault the controller has been disabled and is of no
    /// further use; reads outstanding at that moment are lost.
    pub fn poll(&mut self, out: &mut Vec<ReadDone>) -> Result<(), Fault> {
        if let Some(fault) = &self.dead {
            return Err(fault.clone());
        }
        let result = self.collect(out);
        if let Err(fault) = &result {
            self.dead = Some(fault.clone());
            if self.stop().is_err() {
                self.dead = Some(Fault::StillRunning(Box::new(fault.clone())));
            }
        }
        self.dead.clone().map_or(Ok(()), Err)
    }

    fn collect(&mut self, out: &mut Vec<ReadDone>) -> Result<(), Fault> {
        let mut pushed = false;
        for i in 0..self.lanes.len() {
            while let Some(done) = self.lanes[i].queue.pop()? {
                let lane = &mut self.lanes[i];
                lane.untold += 1;
                let Some(pending) = lane.pending[usize::from(done.slot)].take() else {
                    continue;
                };
                lane.count[pending.read.raises as usize] -= 1;
                if done.status.may_retry() && pending.tries < TRIES {
                    let slot = lane.queue.take().unwrap_or(done.slot);
                    self.write(i, slot, pending.read, pending.tries + 1, pending.abort.on_retry())?;
                    pushed = true;
                    continue;
                }
                let result = if done.status.ok() { Ok(()) } else { Err(done.status) };
                out.push(ReadDone { read: pending.read, result });
            }
        }
        if pushed {
            self.ring();
        }
        if self.outstanding() > 0 {
            self.idle()?;
        }
        Ok(())
    }

    /// Time by the clock that deadlines are measured with; it may be milliseconds behind.
    pub fn now(&self) -> Duration {
        self.regs.now()
    }

    /// A pause between two polls.
    pub fn pause(&self) {
        self.regs.pause();
    }
}

//! Reads on the I/O queue: submission, polled completion, retries, deadlines.

use std::time::Duration;

use super::bringup::{Controller, Fault, IO_QUEUE};
use super::command::Command;
use super::deadline::Abort;
use super::prp;
use super::regs::Registers;
use super::status::Status;

const TRIES: u8 = 4;

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

impl<R: Registers> Controller<R> {
    /// Gives a read to the controller; `false` if the queue is full. The controller sees it after
    /// [`Controller::ring`].
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
        let Some(slot) = self.io.take() else {
            return Ok(false);
        };
        self.write(slot, read, 1, Abort::NotSent)?;
        Ok(true)
    }

    fn write(&mut self, slot: u16, read: Read, tries: u8, abort: Abort) -> Result<(), Fault> {
        let bytes = u64::from(read.blocks) << self.namespace.block_shift;
        let list = self.lists.part(usize::from(slot) * 4096, 4096);
        let entry = |i: usize, address: u64| {
            list.write32(i * 8, address as u32);
            list.write32(i * 8 + 4, (address >> 32) as u32);
        };
        let (prp1, prp2) = prp::build(read.to, bytes, list.iova, entry)
            .ok_or_else(|| Fault::Unsupported(format!("{bytes} bytes at {:#x} fit no page list", read.to)))?;
        let blocks = (read.blocks & 0xffff) as u16;
        self.io.push(slot, &Command::Read { nsid: self.nsid, lba: read.lba, blocks, prp1, prp2 });
        let end = self.regs.now() + self.limits.read;
        self.watch.end_by(end);
        self.pending[usize::from(slot)] = Some(Pending { read, tries, end, abort });
        Ok(())
    }

    /// Shows the controller everything pushed so far.
    pub fn ring(&self) {
        self.regs.write32(self.doorbell(IO_QUEUE, false), self.io.tail().into());
    }

    /// Reads that the controller has.
    pub fn outstanding(&self) -> usize {
        self.io.outstanding()
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
        let (mut popped, mut pushed) = (false, false);
        while let Some(done) = self.io.pop()? {
            popped = true;
            let Some(pending) = self.pending[usize::from(done.slot)].take() else {
                continue;
            };
            if done.status.may_retry() && pending.tries < TRIES {
                let slot = self.io.take().unwrap_or(done.slot);
                self.write(slot, pending.read, pending.tries + 1, pending.abort.on_retry())?;
                pushed = true;
                continue;
            }
            let result = if done.status.ok() { Ok(()) } else { Err(done.status) };
            out.push(ReadDone { read: pending.read, result });
        }
        if popped {
            self.regs.write32(self.doorbell(IO_QUEUE, true), self.io.head().into());
        }
        if pushed {
            self.ring();
        }
        if self.io.outstanding() > 0 {
            self.idle()?;
        }
        Ok(())
    }

    /// A pause between two polls.
    pub fn pause(&self) {
        self.regs.pause();
    }
}

//! What becomes of a read that gets no answer, step by step: Abort, then a reset of the controller,
//! then the end of its use. Nothing here sleeps; the steps are taken by polls.
//! A drive that is gone or in fatal state is noticed within `LOOK`, long before any deadline.

use std::time::Duration;

use super::bringup::{Controller, Fault};
use super::command::Command;
use super::regs::{self, Registers};

/// Between two looks at the controller's status while answers are awaited: a register read costs
/// more than many polls of memory.
const LOOK: Duration = Duration::from_millis(100);

/// How long things may take before the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A read, from its submission to its completion.
    pub read: Duration,
    /// From the Abort of a read to that read's completion.
    pub abort: Duration,
    /// An admin command.
    pub admin: Duration,
}

impl Default for Limits {
    /// As patient as Linux is with reads: a drive may spend seconds on one weak block.
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { read: seconds(30), abort: seconds(10), admin: seconds(30) }
    }
}

/// When to look at what.
#[derive(Debug)]
pub(super) struct Watch {
    look: Duration,
    /// No read's deadline is earlier than this.
    end: Duration,
}

impl Default for Watch {
    fn default() -> Self {
        Self { look: Duration::ZERO, end: Duration::MAX }
    }
}

impl Watch {
    /// Notes a deadline.
    pub(super) fn end_by(&mut self, end: Duration) {
        self.end = self.end.min(end);
    }
}

/// How far the Abort of a read has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Abort {
    NotSent,
    /// In this slot of the admin queue.
    Sent(u16),
    Obeyed,
    Refused,
    /// The read was aborted and then sent a second time.
    Before,
}

impl Abort {
    /// The state for the same read when it is sent again.
    pub(super) fn on_retry(self) -> Self {
        if self == Self::NotSent { self } else { Self::Before }
    }

    fn outcome(self) -> &'static str {
        match self {
            Self::NotSent | Self::Sent(_) => "the Abort command got no answer",
            Self::Obeyed => "it never ended although the drive says it was aborted",
            Self::Refused => "the drive would not abort it",
            Self::Before => "it had been aborted once before",
        }
    }
}

impl<R: Registers> Controller<R> {
    /// Reads the status register if it is time to. This is how removal and fatal errors are noticed; that a
    /// removal is asked for, where it is announced, is asked at the same times.
    pub(super) fn look(&mut self, state: &'static str) -> Result<(), Fault> {
        let now = self.regs.now();
        if now < self.watch.look {
            return Ok(());
        }
        self.watch.look = now + LOOK;
        if self.regs.wanted_back() {
            return Err(Fault::Wanted);
        }
        match self.regs.read32(regs::CSTS) {
            regs::GONE => Err(Fault::Gone),
            csts if csts & regs::CSTS_CFS != 0 => Err(Fault::Fatal { state }),
            _ => Ok(()),
        }
    }

    /// For a poll after which reads are outstanding: the next step for those that are late. An error means that the controller must be reset.
    pub(super) fn idle(&mut self) -> Result<(), Fault> {
        self.look("reading")?;
        self.abort_answers()?;
        let now = self.regs.now();
        if now <= self.watch.end {
            return Ok(());
        }
        let mut sent = false;
        self.watch.end = Duration::MAX;
        for lane in 0..self.lanes.len() {
            for slot in 0..self.lanes[lane].pending.len() {
                let end = |c: &Self| c.lanes[lane].pending[slot].as_ref().map(|p| p.end);
                if end(self).is_some_and(|end| end < now) {
                    sent |= self.late(lane, slot as u16, now)?;
                }
                self.watch.end_by(end(self).unwrap_or(Duration::MAX));
            }
        }
        if sent {
            self.regs.write32(self.doorbell(0, false), self.admin.tail().into());
        }
        Ok(())
    }

    /// One late read: its Abort is sent (true), waits for others, or has already failed.
    fn late(&mut self, lane: usize, slot: u16, now: Duration) -> Result<bool, Fault> {
        let lane = &mut self.lanes[lane];
        let (queue, cid) = (lane.queue.id, lane.queue.cid(slot));
        let limits = self.limits;
        let room = self.admin.outstanding() < self.info.aborts.into();
        let Some(pending) = lane.pending[usize::from(slot)].as_mut() else {
            return Ok(false);
        };
        if pending.abort != Abort::NotSent {
            let waited = if pending.abort == Abort::Before { limits.read } else { limits.read + limits.abort };
            return Err(Fault::Unanswered {
                block: pending.read.lba,
                blocks: pending.read.blocks,
                seconds: waited.as_secs(),
                abort: pending.abort.outcome(),
            });
        }
        let Some(admin) = room.then(|| self.admin.take()).flatten() else {
            // Its turn comes when an earlier Abort is answered; if none is, that one ends it all.
            pending.end = now + LOOK;
            return Ok(false);
        };
        self.admin.push(admin, &Command::Abort { queue, cid });
        pending.abort = Abort::Sent(admin);
        pending.end = now + limits.abort;
        Ok(true)
    }

    /// Takes in the answers to Aborts.
    fn abort_answers(&mut self) -> Result<(), Fault> {
        if self.admin.outstanding() == 0 {
            return Ok(());
        }
        while let Some(done) = self.admin.pop()? {
            self.regs.write32(self.doorbell(0, true), self.admin.head().into());
            let asked = |p: &&mut super::io::Pending| p.abort == Abort::Sent(done.slot);
            if let Some(pending) = self.lanes.iter_mut().flat_map(|lane| lane.pending.iter_mut().flatten()).find(asked)
            {
                let obeyed = done.status.ok() && done.result & 1 == 0;
                pending.abort = if obeyed { Abort::Obeyed } else { Abort::Refused };
            }
        }
        Ok(())
    }
}

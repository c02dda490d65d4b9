//! Brings a controller from any state to one with a pair of I/O queues, and back. Each state has a
//! name and a deadline. NVMe Base 2.0 §3.5.1 (initialisation), §3.6.1 (shutdown).

use std::time::Duration;

use super::super::smart::{Health, LOG_BYTES};
use super::command::Command;
use super::deadline::{Limits, Watch};
use super::identify::{self, ControllerInfo, NamespaceInfo};
use super::io::Lane;
use super::prp;
use super::queue::{Dma, QueuePair, UnknownCommand};
use super::quirks::Quirks;
use super::regs::{self, Capabilities, Registers};
use super::status::Status;

/// Why a controller cannot be used (any more).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The registers read as all ones.
    #[error("the drive is gone (its registers read as all ones)")]
    Gone,
    /// It is being taken out, or unbound.
    #[error("the kernel asks for the drive back: it is being taken out or unbound")]
    Wanted,
    /// CSTS.CFS.
    #[error("the controller reports a fatal error (CSTS.CFS) in state {state}")]
    Fatal {
        /// State of the bring-up.
        state: &'static str,
    },
    /// A deadline passed.
    #[error("the controller did not leave state {state} within {seconds} s")]
    Late {
        /// State of the bring-up.
        state: &'static str,
        /// Limit.
        seconds: u64,
    },
    /// A read got no answer, nor did asking for its end help.
    #[error("{blocks} blocks at block {block} were not read within {seconds} s, and {abort}")]
    Unanswered {
        /// First block.
        block: u64,
        /// Blocks.
        blocks: u32,
        /// Time since the read was sent last.
        seconds: u64,
        /// What became of the Abort command.
        abort: &'static str,
    },
    /// The controller could not be switched off after a fault.
    #[error("{0}; it cannot be switched off either, so the memory that it may write to stays locked")]
    StillRunning(Box<Fault>),
    /// A command of the bring-up failed.
    #[error("{state} failed: {status}")]
    Command {
        /// State of the bring-up.
        state: &'static str,
        /// What the controller said.
        status: Status,
    },
    /// A completion that belongs to nothing.
    #[error(transparent)]
    Unknown(#[from] UnknownCommand),
    /// A capability that is needed is missing.
    #[error("the controller cannot be used: {0}")]
    Unsupported(String),
}

/// Entries of the admin queues.
const ADMIN_ENTRIES: u16 = 16;
const PAGE: usize = 4096;
/// Entries of the queues for reads whose ends raise interrupts.
const RAISING_ENTRIES: u16 = 64;
/// Doorbells that lie further apart are not mapped for a second pair of I/O queues.
const MOST_STRIDE: u32 = 256;

/// A controller with its queues.
#[derive(Debug)]
pub struct Controller<R: Registers> {
    pub(super) regs: R,
    pub(super) caps: Capabilities,
    pub(super) admin: QueuePair,
    /// The queues that are polled, and if there are interrupts a second pair that raises them, for few reads.
    pub(super) lanes: Vec<Lane>,
    pub(super) nsid: u32,
    pub(super) dead: Option<Fault>,
    pub(super) stopped: bool,
    pub(super) watch: Watch,
    pub(super) quirks: Quirks,
    /// How long things may take.
    pub limits: Limits,
    scratch: Dma,
    /// What the controller says of itself.
    pub info: ControllerInfo,
    /// What the namespace says of itself.
    pub namespace: NamespaceInfo,
    /// Bytes as they came, for comparison with other tools: controller, namespace.
    pub raw_identify: [Vec<u8>; 2],
    /// The health log of the bring-up.
    pub health: Health,
}

/// Bytes of DMA memory that a controller with `entries` I/O queue entries needs.
pub fn memory_needed(entries: u16) -> usize {
    3 * PAGE + Lane::bytes(entries) + Lane::bytes(RAISING_ENTRIES)
}

impl<R: Registers> Controller<R> {
    /// Brings the controller up. `memory` is page aligned and at least [`memory_needed`] long;
    /// `entries` is the requested queue depth, clamped to CAP.MQES. `interrupts`: MSI-X
    /// vector 0 leads somewhere, so that reads may be waited for by it.
    ///
    /// # Errors
    /// On an error the controller has been disabled again if it answers at all.
    pub fn start(
        regs: R,
        memory: Dma,
        nsid: u32,
        entries: u16,
        quirks: Quirks,
        interrupts: bool,
    ) -> Result<Self, (Fault, R)> {
        if let Some(why) = quirks.unsupported {
            return Err((Fault::Unsupported(why.into()), regs));
        }
        match Self::prepare(&regs, entries) {
            Err(fault) => Err((fault, regs)),
            Ok((caps, entries)) => {
                let mut controller = Self::new(regs, memory, nsid, caps, entries);
                controller.quirks = quirks;
                match controller.run(interrupts) {
                    Ok(()) => Ok(controller),
                    Err(fault) => {
                        let _ = controller.disable();
                        Err((fault, controller.regs))
                    }
                }
            }
        }
    }

    fn prepare(regs: &R, entries: u16) -> Result<(Capabilities, u16), Fault> {
        if regs.read32(regs::CSTS) == regs::GONE {
            return Err(Fault::Gone);
        }
        let caps = Capabilities(regs.read64(regs::CAP));
        let lacks = |what: &str| Err(Fault::Unsupported(what.into()));
        if !caps.has_nvm() {
            return lacks("it has no NVM command set");
        }
        if caps.min_page_shift() > 12 {
            return lacks("its smallest memory page is larger than 4096 bytes");
        }
        if caps.max_entries() < 2 {
            return lacks("its queues have fewer than two entries");
        }
        // The last doorbell of the first pair of I/O queues.
        let stride = caps.doorbell_stride();
        if regs::DOORBELLS + 3 * stride + 4 > regs::MAPPED {
            return lacks(&format!("its doorbells lie {stride} bytes apart; up to 1024 are supported"));
        }
        let most = caps.max_entries().min(super::queue::MAX_ENTRIES) as u16;
        Ok((caps, entries.clamp(2, most)))
    }

    fn new(regs: R, memory: Dma, nsid: u32, caps: Capabilities, entries: u16) -> Self {
        let mut at = 0;
        let mut next = |len: usize| {
            at += len;
            memory.part(at - len, len)
        };
        let admin_entries = ADMIN_ENTRIES.min(caps.max_entries() as u16);
        Self {
            admin: QueuePair::new(0, admin_entries, next(PAGE), next(PAGE)),
            scratch: next(PAGE),
            lanes: [(1, entries), (2, entries.min(RAISING_ENTRIES))]
                .map(|(id, entries)| Lane::new(id, entries, next(Lane::bytes(entries))))
                .into(),
            regs,
            caps,
            nsid,
            dead: None,
            stopped: false,
            watch: Watch::default(),
            quirks: Quirks::default(),
            limits: Limits::default(),
            info: identify::controller(&[0; 4096], 12).expect("4096 bytes"),
            namespace: identify::namespace(&[0; 4096]).expect("4096 bytes"),
            raw_identify: [Vec::new(), Vec::new()],
            health: Health::parse(&[0; LOG_BYTES]).expect("512 bytes"),
        }
    }

    fn run(&mut self, interrupts: bool) -> Result<(), Fault> {
        self.disable()?;
        self.enable()?;
        self.identify()?;
        self.make_queues(interrupts)
    }

    /// Waits until CSTS.RDY is `ready`.
    fn wait_ready(&self, ready: bool, state: &'static str) -> Result<(), Fault> {
        let limit = self.caps.ready_timeout();
        let end = self.regs.now() + limit;
        loop {
            let csts = self.regs.read32(regs::CSTS);
            if csts == regs::GONE {
                return Err(Fault::Gone);
            }
            if csts & regs::CSTS_CFS != 0 && ready {
                return Err(Fault::Fatal { state });
            }
            if (csts & regs::CSTS_RDY != 0) == ready {
                return Ok(());
            }
            if self.regs.now() > end {
                return Err(Fault::Late { state, seconds: limit.as_secs() });
            }
            self.regs.pause();
        }
    }

    /// Disables the controller; afterwards it does no DMA.
    pub(super) fn disable(&mut self) -> Result<(), Fault> {
        let cc = self.regs.read32(regs::CC);
        if cc == regs::GONE {
            return Err(Fault::Gone);
        }
        if cc & regs::CC_EN != 0 {
            // Clearing EN before RDY has followed an earlier EN is undefined; a controller in
            // fatal state never gets there, so its failure here is not the end.
            let _ = self.wait_ready(true, "waiting for an earlier enable");
            self.regs.write32(regs::CC, cc & !(regs::CC_EN | regs::CC_SHN_MASK));
            let end = self.regs.now() + self.quirks.ready_delay;
            while self.regs.now() < end {
                self.regs.pause();
            }
        }
        self.wait_ready(false, "disabling")
    }

    fn enable(&mut self) -> Result<(), Fault> {
        let n = u32::from(self.admin.entries() - 1);
        let (sq, cq) = self.admin.addresses();
        self.regs.write32(regs::AQA, n << 16 | n);
        self.regs.write64(regs::ASQ, sq);
        self.regs.write64(regs::ACQ, cq);
        // Entries of 2^6 and 2^4 bytes, 4096-byte pages, round robin, NVM command set.
        self.regs.write32(regs::CC, 6 << 16 | 4 << 20 | regs::CC_EN);
        self.wait_ready(true, "enabling")
    }

    fn identify(&mut self) -> Result<(), Fault> {
        let to = self.scratch.iova;
        self.admin(&Command::IdentifyController { to }, "identify controller")?;
        let raw = self.scratch.bytes(4096);
        let short = || Fault::Unsupported("identify is short".into());
        self.info = identify::controller(&raw, self.caps.min_page_shift()).ok_or_else(short)?;
        if self.info.entry_shifts.0 > 6 || self.info.entry_shifts.1 > 4 {
            return Err(Fault::Unsupported("its queue entries are larger than 64 and 16 bytes".into()));
        }
        self.raw_identify[0] = raw;
        // Bit 1: the subsystem may have several controllers, so another host may write. §5.17.2.1.
        if self.info.sharing & 2 != 0 {
            return Err(Fault::Unsupported("several controllers may lead to its namespaces (CMIC)".into()));
        }
        self.scratch.clear();
        self.admin(&Command::IdentifyNamespace { nsid: self.nsid, to }, "identify namespace")?;
        let raw = self.scratch.bytes(4096);
        self.namespace = identify::namespace(&raw).ok_or_else(short)?;
        self.raw_identify[1] = raw;
        if self.quirks.bogus_ids {
            (self.namespace.nguid, self.namespace.eui64) = ([0; 16], [0; 8]);
        }
        let refusals = self.namespace.refusals();
        if !refusals.is_empty() {
            return Err(Fault::Unsupported(format!("namespace {}: {}", self.nsid, refusals.join("; "))));
        }
        self.scratch.clear();
        self.admin(&Command::HealthLog { to }, "health log")?;
        self.health = Health::parse(&self.scratch.bytes(LOG_BYTES)).ok_or_else(short)?;
        // Bits 2 and 3: reliability degraded, media read-only. NVMe Base 2.0 §5.16.1.3.
        if self.health.critical_warning & 0x0c != 0 {
            return Err(Fault::Unsupported(format!(
                "its health log reports a failing drive (critical warning {:#04x})",
                self.health.critical_warning
            )));
        }
        self.sanitized()
    }

    /// Refuses a drive that is being erased, or where that failed.
    fn sanitized(&mut self) -> Result<(), Fault> {
        if self.info.sanitize == 0 {
            return Ok(());
        }
        self.scratch.clear();
        let to = self.scratch.iova;
        match self.admin(&Command::SanitizeLog { to }, "sanitize log") {
            // Type 1, code 09h: it keeps no such page after all.
            Err(Fault::Command { status, .. }) if (status.kind(), status.code()) == (1, 0x09) => return Ok(()),
            answer => answer?,
        };
        // SSTAT, bits 2:0 of bytes 3:2.
        let refusal = match self.scratch.read32(0) >> 16 & 7 {
            2 => "a sanitize operation is erasing it",
            3 => "its last sanitize operation failed",
            _ => return Ok(()),
        };
        Err(Fault::Unsupported(refusal.into()))
    }

    fn make_queues(&mut self, interrupts: bool) -> Result<(), Fault> {
        let pairs = if interrupts && self.caps.doorbell_stride() <= MOST_STRIDE { 2 } else { 1 };
        // The answer, in two halves and less one, may be more or less than asked for; one pair is the
        // least there is.
        let granted = self.admin(&Command::QueueCount { pairs }, "number of queues")?;
        let granted = (granted & 0xffff).min(granted >> 16) as usize + 1;
        self.lanes.truncate(granted.min(pairs.into()));
        for i in 0..self.lanes.len() {
            let queue = &self.lanes[i].queue;
            let (id, entries, (sq, cq)) = (queue.id, queue.entries(), queue.addresses());
            let completion = Command::CreateCompletionQueue { id, entries, at: cq, interrupt: i > 0 };
            self.admin(&completion, "create completion queue")?;
            self.admin(&Command::CreateSubmissionQueue { id, entries, at: sq }, "create submission queue")?;
        }
        Ok(())
    }

    fn delete_queues(&mut self) -> Result<(), Fault> {
        for i in 0..self.lanes.len() {
            let id = self.lanes[i].queue.id;
            self.admin(&Command::DeleteSubmissionQueue { id }, "delete submission queue")?;
            self.admin(&Command::DeleteCompletionQueue { id }, "delete completion queue")?;
        }
        Ok(())
    }

    pub(super) fn doorbell(&self, queue: u16, completion: bool) -> u32 {
        regs::DOORBELLS + (2 * u32::from(queue) + u32::from(completion)) * self.caps.doorbell_stride()
    }

    /// One admin command, waited for.
    fn admin(&mut self, command: &Command, state: &'static str) -> Result<u32, Fault> {
        let slot = self.admin.take().ok_or(Fault::Late { state, seconds: 0 })?;
        self.admin.push(slot, command);
        self.regs.write32(self.doorbell(0, false), self.admin.tail().into());
        let limit = self.limits.admin;
        let end = self.regs.now() + limit;
        loop {
            if let Some(done) = self.admin.pop()? {
                self.regs.write32(self.doorbell(0, true), self.admin.head().into());
                if done.slot != slot {
                    // The late answer to an Abort whose read has long ended.
                    continue;
                }
                if !done.status.ok() {
                    return Err(Fault::Command { state, status: done.status });
                }
                return Ok(done.result);
            }
            self.look(state)?;
            if self.regs.now() > end {
                return Err(Fault::Late { state, seconds: limit.as_secs() });
            }
            self.regs.pause();
        }
    }

    /// True if the controller is enabled, by its own registers.
    pub fn enabled(&self) -> bool {
        let csts = self.regs.read32(regs::CSTS);
        csts != regs::GONE && csts & regs::CSTS_RDY != 0
    }

    /// CSTS.SHST says that the shutdown is complete, or the drive is gone.
    fn shut(&self) -> bool {
        let csts = self.regs.read32(regs::CSTS);
        csts == regs::GONE || csts >> 2 & 3 == 2
    }

    /// Shuts the controller down: afterwards it does no DMA, or is gone.
    ///
    /// # Errors
    /// If the controller would not stop. Its memory must then never be unmapped or reused.
    pub fn stop(&mut self) -> Result<(), Fault> {
        if self.stopped {
            return Ok(());
        }
        if self.dead.is_none() && self.outstanding() == 0 {
            let _ = self.delete_queues();
            let cc = self.regs.read32(regs::CC) & !regs::CC_SHN_MASK;
            self.regs.write32(regs::CC, cc | regs::CC_SHN_NORMAL);
            let limit = Duration::from_micros(self.info.shutdown_us.into()).max(Duration::from_secs(10));
            let end = self.regs.now() + limit;
            while !self.shut() && self.regs.now() < end {
                self.regs.pause();
            }
        }
        match self.disable() {
            // A device that is gone does no DMA either.
            Ok(()) | Err(Fault::Gone) => {
                self.stopped = true;
                Ok(())
            }
            Err(fault) => Err(fault),
        }
    }

    /// Most bytes of one read that begins at byte `at` of the namespace, a multiple of the block size.
    pub fn max_transfer_at(&self, at: u64) -> u64 {
        let most = self.max_transfer();
        if self.quirks.stripes { most - at % most } else { most }
    }

    /// Most bytes of one read, a multiple of the block size.
    pub fn max_transfer(&self) -> u64 {
        self.info.max_transfer.unwrap_or(u64::MAX).min(1 << 20).min(prp::MAX_BYTES)
    }
}

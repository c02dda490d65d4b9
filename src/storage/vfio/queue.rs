//! A pair of queues: ring arithmetic, phase, command identifiers with generations. No registers, no
//! clock. NVMe Base 2.0 §3.3.

use std::sync::atomic::{Ordering, fence};

use super::command::Command;
use super::status::Status;

/// A piece of memory that the controller may reach at `iova`.
#[derive(Debug, Clone, Copy)]
pub struct Dma {
    ptr: *mut u8,
    /// Address on the controller's side.
    pub iova: u64,
    /// Bytes.
    pub len: usize,
}

// SAFETY: a Dma is an address; whoever moves it to another thread moves the owner of the memory
// with it, and all accesses go through volatile reads and writes.
unsafe impl Send for Dma {}

impl Dma {
    /// Names memory.
    ///
    /// # Safety
    /// `ptr .. + len` must stay mapped, 4-byte aligned and free of Rust references for as long as
    /// the value or a part of it is used.
    pub unsafe fn new(ptr: *mut u8, iova: u64, len: usize) -> Self {
        Self { ptr, iova, len }
    }

    /// The bytes `at .. at + len`.
    ///
    /// # Panics
    /// If they lie outside: sizes here are ours, never the device's.
    pub fn part(&self, at: usize, len: usize) -> Self {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len));
        Self { ptr: self.ptr.wrapping_add(at), iova: self.iova + at as u64, len }
    }

    /// Where it lies here.
    pub fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Reads the 32-bit word at byte `at`.
    pub fn read32(&self, at: usize) -> u32 {
        assert!(at.is_multiple_of(4) && at + 4 <= self.len);
        // SAFETY: in bounds and aligned by the assertion; the memory is mapped by `new`'s contract.
        unsafe { self.ptr.add(at).cast::<u32>().read_volatile() }
    }

    /// Writes the 32-bit word at byte `at`.
    pub fn write32(&self, at: usize, value: u32) {
        assert!(at.is_multiple_of(4) && at + 4 <= self.len);
        // SAFETY: as in `read32`.
        unsafe { self.ptr.add(at).cast::<u32>().write_volatile(value) }
    }

    /// Writes the 64-bit word at byte `at`.
    pub fn write64(&self, at: usize, value: u64) {
        assert!(at.is_multiple_of(8) && at + 8 <= self.len && self.ptr.addr().is_multiple_of(8));
        // SAFETY: as in `read32`.
        unsafe { self.ptr.add(at).cast::<u64>().write_volatile(value) }
    }

    /// Sets all bytes to zero.
    pub fn clear(&self) {
        for at in (0..self.len).step_by(4) {
            self.write32(at, 0);
        }
    }

    /// A copy of its first `len` bytes.
    pub fn bytes(&self, len: usize) -> Vec<u8> {
        (0..len).step_by(4).flat_map(|at| self.read32(at).to_le_bytes()).collect()
    }
}

/// A completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Slot of the command.
    pub slot: u16,
    /// Command-specific result.
    pub result: u32,
    /// Status.
    pub status: Status,
}

/// The controller answered for a command that is not outstanding: it cannot be trusted any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("queue {queue}: a completion names command {cid:#06x}, which is not outstanding")]
pub struct UnknownCommand {
    /// Queue.
    pub queue: u16,
    /// Command identifier.
    pub cid: u16,
}

const SLOT_BITS: u32 = 12;
const SLOT_MASK: u16 = (1 << SLOT_BITS) - 1;
/// Most entries of a queue: slots have 12 bits.
pub const MAX_ENTRIES: u32 = 1 << SLOT_BITS;

/// A submission queue and its completion queue, of equal size.
#[derive(Debug)]
pub struct QueuePair {
    /// Queue number; 0 is the admin queue.
    pub id: u16,
    entries: u16,
    sq: Dma,
    cq: Dma,
    tail: u16,
    head: u16,
    phase: bool,
    generation: Vec<u8>,
    busy: Vec<bool>,
    outstanding: usize,
    free: Vec<u16>,
}

impl QueuePair {
    /// Bytes of memory for the submission queue and for the completion queue, each page aligned.
    pub fn bytes(entries: u16) -> (usize, usize) {
        let page = |n: usize| n.next_multiple_of(4096);
        (page(usize::from(entries) * 64), page(usize::from(entries) * 16))
    }

    /// Empty queues over zeroed memory. One entry always stays free, so `entries - 1` commands may
    /// be outstanding.
    pub fn new(id: u16, entries: u16, sq: Dma, cq: Dma) -> Self {
        sq.clear();
        cq.clear();
        let slots = entries - 1;
        Self {
            id,
            entries,
            sq,
            cq,
            tail: 0,
            head: 0,
            phase: true,
            generation: vec![0; slots.into()],
            busy: vec![false; slots.into()],
            outstanding: 0,
            free: (0..slots).rev().collect(),
        }
    }

    /// Entries of each queue.
    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// Addresses of both queues.
    pub fn addresses(&self) -> (u64, u64) {
        (self.sq.iova, self.cq.iova)
    }

    /// Takes a slot for a command yet to be built.
    pub fn take(&mut self) -> Option<u16> {
        self.free.pop()
    }

    /// Writes a command for a slot taken before. The controller sees it when the doorbell is rung
    /// with [`QueuePair::tail`].
    pub fn push(&mut self, slot: u16, command: &Command) {
        let s = usize::from(slot);
        self.generation[s] = (self.generation[s] + 1) & 0xf;
        self.busy[s] = true;
        self.outstanding += 1;
        let cid = self.cid(slot);
        for (i, word) in command.encode(cid).into_iter().enumerate() {
            self.sq.write32(usize::from(self.tail) * 64 + i * 4, word);
        }
        self.tail = (self.tail + 1) % self.entries;
        // Before the doorbell's store: on x86 (the only one, see `vfio`) stores to memory are not reordered, so
        // that this only keeps the compiler from doing so.
        fence(Ordering::Release);
    }

    /// Identifier of the command in a slot.
    pub fn cid(&self, slot: u16) -> u16 {
        slot | u16::from(self.generation[usize::from(slot)]) << SLOT_BITS
    }

    /// Value of the submission doorbell.
    pub fn tail(&self) -> u16 {
        self.tail
    }

    /// Value of the completion doorbell.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Commands that wait for a completion.
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// The next completion, if the controller has written one. Its slot is free afterwards.
    pub fn pop(&mut self) -> Result<Option<Done>, UnknownCommand> {
        let at = usize::from(self.head) * 16;
        let last = self.cq.read32(at + 12);
        if (last >> 16 & 1 == 1) != self.phase {
            return Ok(None);
        }
        // The phase was read before the rest of the entry; x86 keeps loads in order.
        fence(Ordering::Acquire);
        let cid = last as u16;
        let slot = cid & SLOT_MASK;
        let s = usize::from(slot);
        let known = self.busy.get(s) == Some(&true) && u16::from(self.generation[s]) == cid >> SLOT_BITS;
        if !known {
            return Err(UnknownCommand { queue: self.id, cid });
        }
        let result = self.cq.read32(at);
        self.head += 1;
        if self.head == self.entries {
            self.head = 0;
            self.phase = !self.phase;
        }
        self.busy[s] = false;
        self.outstanding -= 1;
        self.free.push(slot);
        Ok(Some(Done { slot, result, status: Status((last >> 17) as u16) }))
    }
}

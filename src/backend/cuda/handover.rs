//! Rows that processors compute in the middle of a pass: to host memory and back in the order of the stream, without a wait of
//! the host. A word in host memory says what is there: the GPU writes it behind its rows and waits for the other side's by memory
//! operations of the stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cudarc::driver::sys;

use super::args::{ChoicesArgs, HandArgs};
use super::driver::{Device, PinnedBuffer, Stream, check, device_error};
use super::workspace::{NO_SLOT, landing_slot};
use super::{CudaBackend, no_experts};
use crate::backend::both::{Brought, PLACES, low_of};
use crate::backend::{
    BackendError, Dims, EXACT_ROWS, Expert, Hands, Norm, RouterParams, Routing, Share, SlotsAt, Weight,
};

/// Words between two that are written by different sides: cache lines come in pairs.
const APART: usize = 32;
/// Looks at a word before the clock is looked at.
const SPINS: u32 = 2000;
/// A word for all waits of a pass that has failed: behind every other.
const LET_GO: u32 = 1 << 30;
/// Longest wait for the GPU: no pass takes nearly as long.
const WAIT_MAX: Duration = Duration::from_secs(120);

/// Places in host memory, and how far each side is.
pub(super) struct Handover {
    /// What the GPU gives, and what it is answered.
    given: [PinnedBuffer<f32>; PLACES],
    answers: [PinnedBuffer<f32>; PLACES],
    /// Choices of the rows that were given.
    ids: [PinnedBuffer<u32>; PLACES],
    /// By block, what rows are to choose in place of their routers' choices; and whether they are.
    forced: PinnedBuffer<u32>,
    forces: bool,
    pairs: usize,
    /// For each place: how often something was given, and answered; then how often experts were brought.
    words: PinnedBuffer<u32>,
    /// Brings experts.
    copies: Stream,
    /// The GPU did not come in time: it is not waited for again.
    lost: bool,
    /// Operations may be called behind a wait.
    ahead: bool,
    /// How often each place was used since its words began anew, and how many floats were given last.
    uses: [u32; PLACES],
    floats: [usize; PLACES],
}

impl Handover {
    /// For sessions of these sizes; `None` where the GPU's streams have no memory operations.
    ///
    /// # Errors
    /// If memory cannot be had.
    pub fn new(device: &Arc<Device>, d: &Dims) -> Result<Option<Handover>, BackendError> {
        if !device.waits_for_words()? {
            return Ok(None);
        }
        let (rows, row) = (d.max_batch.min(EXACT_ROWS), d.n_embd);
        let floats = |rows: usize| device.alloc_pinned(rows * row, "rows for processors");
        let pairs = rows * d.n_experts_used;
        Ok(Some(Handover {
            given: [floats(rows)?, floats(rows)?],
            answers: [floats(rows.max(pairs))?, floats(rows.max(pairs))?],
            ids: [device.alloc_pinned(pairs, "choices")?, device.alloc_pinned(pairs, "choices")?],
            forced: device.alloc_pinned((pairs * d.n_blocks).max(1), "forced choices")?,
            forces: false,
            pairs,
            words: device.alloc_pinned(3 * PLACES * APART, "words")?,
            copies: device.stream()?,
            lost: false,
            ahead: launches_ahead(),
            uses: [0; PLACES],
            floats: [0; PLACES],
        }))
    }

    fn word(&self, number: usize) -> (&AtomicU32, u64) {
        assert!(number < 3 * PLACES, "word {number}");
        // SAFETY: within the buffer, which has as many words, each with its distance.
        let at = unsafe { self.words.ptr().add(number * APART) };
        // SAFETY: the word stays as long as the buffer, and is touched as an atomic alone.
        (unsafe { AtomicU32::from_ptr(at) }, at as u64)
    }

    /// The word that says what was given at `place`, and its address.
    fn given_word(&self, place: usize) -> (&AtomicU32, u64) {
        self.word(2 * place)
    }

    /// The word that says which experts were brought.
    fn landed_word(&self, place: usize) -> (&AtomicU32, u64) {
        self.word(2 * PLACES + place)
    }

    /// The word that says what was answered.
    fn answer_word(&self, place: usize) -> (&AtomicU32, u64) {
        self.word(2 * place + 1)
    }

    /// All words become `value`.
    fn set_words(&self, value: u32) {
        for number in 0..3 * PLACES {
            self.word(number).0.store(value, Ordering::Release);
        }
    }
}

fn address<T: bytemuck::Pod>(buffer: &PinnedBuffer<T>) -> u64 {
    buffer.as_slice().as_ptr() as u64
}

/// Whether a launch returns before the kernel has run: not for debuggers that ask the driver for that.
fn launches_ahead() -> bool {
    std::env::var_os("CUDA_LAUNCH_BLOCKING").is_none_or(|v| v == "0")
}

/// Where an expert's matrices begin in RAM, on a line, and the bytes from there to their end.
fn extent(e: &Expert) -> (u64, u64) {
    let (all, low) = ([&e.gate.weight, &e.up.weight, &e.down.weight], low_of(e));
    let bytes = |w: &Weight| w.ty.row_bytes(w.cols).unwrap_or(0) as u64 * w.rows as u64;
    let end = all.iter().map(|w| w.addr + bytes(w)).max().unwrap_or(0);
    (low, end - low)
}

fn none() -> BackendError {
    device_error("this GPU cannot wait for processors")
}

impl CudaBackend {
    /// Whether rows can go to processors and back ([`Hands`]).
    pub fn hands_over(&self) -> bool {
        self.handover.is_some()
    }

    /// Whether it did not come in time for what was handed over.
    pub(super) fn hangs(&self) -> bool {
        self.handover.as_ref().is_some_and(|h| h.lost)
    }

    /// Lets the words of all places begin anew, so that a pass that was recorded finds those it was recorded with.
    pub(super) fn begin_words(&mut self) -> Result<(), BackendError> {
        let Some(h) = self.handover.as_mut().filter(|h| h.lost || h.uses != [0; PLACES]) else { return Ok(()) };
        if h.lost {
            return Err(device_error("the GPU did not come in an earlier pass, and is not asked again"));
        }
        // Whatever may still wait for one of them, or write it.
        for stream in [&self.engine.stream, &h.copies] {
            if !stream.is_idle()? {
                stream.synchronize()?;
            }
        }
        h.set_words(0);
        h.uses = [0; PLACES];
        Ok(())
    }

    /// What was called has been recorded, and is about to run: places are used as often again.
    pub(super) fn rewind_words(&mut self) {
        if let Some(h) = &mut self.handover {
            h.uses = [0; PLACES];
        }
    }

    /// Copies the first rows of `n` floats, or those of them whose bits are in `only`; or adds them to what is there.
    ///
    /// # Safety
    /// Both have the rows until the kernel has run.
    unsafe fn hand_rows(
        &self,
        from: u64,
        to: u64,
        only: Option<[u32; 8]>,
        (n, rows): (usize, usize),
        add: bool,
    ) -> Result<(), BackendError> {
        let (listed, only) = (i32::from(only.is_some()), only.unwrap_or_default());
        let a = HandArgs { from, to, n: n as i32, rows: rows as i32, listed, only, add: i32::from(add) };
        let grid = (n.div_ceil(1024) as u32, rows as u32, 1);
        // SAFETY: HandArgs is what hand_rows declares; the rest is the caller's promise.
        unsafe { self.engine.launch(self.engine.kernels.hand_rows, grid, 256, 0, &a) }
    }

    /// Copies words of pinned host memory to the device, past the copy engine, where they would wait behind weights.
    ///
    /// # Safety
    /// Both have the words, aligned to 16 bytes, until the kernel has run.
    pub(super) unsafe fn fetch_words(&self, from: u64, to: u64, words: usize) -> Result<(), BackendError> {
        // SAFETY: the caller's promise.
        unsafe { self.hand_rows(from, to, None, (words, 1), false) }
    }

    /// Adds as many rows as there are at hand to X, from what is kept of a slice: an answer, or the output of attention.
    pub(super) fn add_rows(&mut self, from: u64) -> Result<(), BackendError> {
        let (x, rows, n) = (self.x(), self.tokens, self.dims.n_embd);
        self.engine.ws.rooms.check("a slice", x, (rows * n * 4) as u64)?;
        self.waiting.forget_forms();
        // SAFETY: an answer has as many rows as were given, which X has, and what is kept was checked where it was made.
        unsafe { self.hand_rows(from, x, None, (n, rows), true) }
    }

    /// Rows at `from` to `place`, and the word that says so.
    fn give_rows(&mut self, place: usize, from: u64) -> Result<(), BackendError> {
        let (rows, n) = (self.tokens, self.dims.n_embd);
        let h = self.handover.as_mut().ok_or_else(none)?;
        if rows * n > h.given[place].as_slice().len() {
            return Err(device_error(format!("{rows} rows are too many for processors")));
        }
        h.floats[place] = rows * n;
        h.uses[place] = h.uses[place].wrapping_add(1);
        let (use_, to, (_, word)) = (h.uses[place], address(&h.given[place]), h.given_word(place));
        // SAFETY: both hold the rows, as checked above; the host reads them when the word says so, and has read the last ones of
        // this place: parts are computed in order, and there is one place more than parts that are put off.
        unsafe {
            self.hand_rows(from, to, None, (n, rows), false)?;
            self.engine.stream.write_word(word, use_)
        }
    }

    /// The word that says that choices are at `place`, of which processors compute none.
    fn give_no_rows(&mut self, place: usize) -> Result<(), BackendError> {
        let floats = self.tokens * self.dims.n_embd;
        let h = self.handover.as_mut().ok_or_else(none)?;
        (h.floats[place], h.uses[place]) = (floats, h.uses[place].wrapping_add(1));
        // SAFETY: a word of the buffer.
        unsafe { self.engine.stream.write_word(h.given_word(place).1, h.uses[place]) }
    }

    /// As [`Backend::force`](crate::backend::Backend::force).
    pub(super) fn force_choices(&mut self, layer: usize, ids: &[u32]) -> Result<bool, BackendError> {
        let n_experts = self.dims.n_experts;
        let Some(h) = self.handover.as_mut() else { return Ok(false) };
        let from = layer * h.pairs;
        let to = h.forced.as_mut_slice().get_mut(from..from + ids.len()).filter(|to| to.len() <= h.pairs);
        let (Some(to), true) = (to, ids.iter().all(|id| (*id as usize) < n_experts)) else {
            return Err(device_error(format!("{} choices for block {layer} are too many", ids.len())));
        };
        to.copy_from_slice(ids);
        h.forces = true;
        Ok(true)
    }

    /// The stream waits for the answer at `place`.
    fn await_answer(&self, place: usize) -> Result<u64, BackendError> {
        let h = self.handover.as_ref().ok_or_else(none)?;
        // SAFETY: a word of the buffer; [`Hands::answer`] or [`Hands::answer_all`] will write it.
        unsafe { self.engine.stream.await_word(h.answer_word(place).1, h.uses[place])? };
        Ok(address(&h.answers[place]))
    }
}

impl Hands for CudaBackend {
    fn works_ahead(&self) -> bool {
        self.handover.as_ref().is_some_and(|h| h.ahead)
    }

    fn give(&mut self, place: usize) -> Result<(), BackendError> {
        let x = self.x();
        self.give_rows(place, x)
    }

    fn route_and_give(
        &mut self,
        norm: &Norm,
        router: &Weight,
        params: &RouterParams,
        place: usize,
    ) -> Result<&[u32], BackendError> {
        let pairs = self.tokens * self.dims.n_experts_used;
        // The router writes its choices where the host reads them.
        let ids = address(&self.engine.ws.moe.as_ref().ok_or_else(no_experts)?.ids_host);
        self.choose_experts(norm, router, params, ids)?;
        self.grouped = false;
        self.give_routed(place)?;
        self.given(place)?;
        let moe = self.engine.ws.moe.as_ref().ok_or_else(no_experts)?;
        Ok(&moe.ids_host.as_slice()[..pairs])
    }

    fn give_routed(&mut self, place: usize) -> Result<(), BackendError> {
        let normed = self.engine.ws.norm_f.addr();
        self.give_rows(place, normed)
    }

    fn given(&mut self, place: usize) -> Result<&[f32], BackendError> {
        let h = self.handover.as_mut().ok_or_else(none)?;
        let (began, mut looks) = (Instant::now(), 0u32);
        while h.given_word(place).0.load(Ordering::Acquire) != h.uses[place] {
            looks += 1;
            if looks % SPINS != 0 {
                std::hint::spin_loop();
                continue;
            }
            // An error of the GPU shows in its stream.
            self.engine.stream.is_idle()?;
            if began.elapsed() > WAIT_MAX {
                h.lost = true;
                let s = WAIT_MAX.as_secs();
                return Err(device_error(format!(
                    "rows for processors have not come in {s} s; the GPU hangs (`dmesg` has lines with Xid then)"
                )));
            }
            std::thread::yield_now();
        }
        Ok(&h.given[place].as_slice()[..h.floats[place]])
    }

    fn take(&mut self, place: usize) -> Result<(), BackendError> {
        let answer = self.await_answer(place)?;
        let (x, rows, n) = (self.x(), self.tokens, self.dims.n_embd);
        self.engine.ws.rooms.check("rows of processors", x, (rows * n * 4) as u64)?;
        self.waiting.forget_forms();
        // SAFETY: an answer has as many rows as were given, which X has.
        unsafe { self.hand_rows(answer, x, None, (n, rows), false) }
    }

    fn take_slice(&mut self, place: usize) -> Result<(), BackendError> {
        let answer = self.await_answer(place)?;
        self.add_rows(answer)
    }

    fn take_experts(&mut self, place: usize, pairs: &[u32]) -> Result<(), BackendError> {
        let (n, all) = (self.dims.n_embd, self.tokens * self.dims.n_experts_used);
        let mut only = [0u32; 8];
        if all > 32 * only.len() || pairs.iter().any(|pair| *pair as usize >= all) {
            return Err(device_error(format!("{all} pairs of experts are too many for processors")));
        }
        for pair in pairs {
            only[*pair as usize / 32] |= 1 << (pair % 32);
        }
        let answer = self.await_answer(place)?;
        let out = self.engine.ws.moe.as_ref().ok_or_else(no_experts)?.out.addr();
        self.engine.ws.rooms.check("experts of processors", out, (all * n * 4) as u64)?;
        // SAFETY: an answer and the outputs have a row for each pair, of which these are some, as checked above.
        unsafe { self.hand_rows(answer, out, Some(only), (n, all), false) }
    }

    fn hold_shared(
        &mut self,
        layer: usize,
        list: &[Expert],
        in_ram: &[bool],
        share: Share,
        slots: Option<SlotsAt>,
    ) -> Result<bool, BackendError> {
        // Experts in RAM are brought in one copy each.
        let slot = slots.map_or(landing_slot(&self.dims), |s| s.bytes);
        if list.iter().zip(in_ram).any(|(e, ram)| *ram && extent(e).1 > slot) {
            return Ok(false);
        }
        self.hold_shared_at(layer, list, in_ram, share, slots)
    }

    fn mix(&mut self, layer: usize, routing: &Routing, place: usize) -> Result<(), BackendError> {
        let (rows, used) = (self.tokens, self.dims.n_experts_used);
        let h = self.handover.as_ref().ok_or_else(none)?;
        if rows * used > h.ids[place].as_slice().len() {
            return Err(device_error(format!("{rows} rows are too many for processors")));
        }
        let to = address(&h.ids[place]);
        let forced = if h.forces { address(&h.forced) + (layer * h.pairs * 4) as u64 } else { 0 };
        let of = self.shared_at(layer)?.0;
        let slots = if of.slots.is_some() { self.slots_of(layer)? } else { 0 };
        // A launch that returns when its kernel has run would wait for experts that the host brings after it.
        let lands = rows == 1 && h.ahead;
        let give = |gpu: &mut CudaBackend| {
            let moe = gpu.engine.ws.moe.as_ref().ok_or_else(no_experts)?;
            let n = rows * used;
            let h = gpu.handover.as_ref().ok_or_else(none)?;
            // Where all that is chosen has a slot, what waits for it goes on without the host.
            let landed = if lands && slots != 0 { h.landed_word(place).1 } else { 0 };
            let a = ChoicesArgs {
                ids: moe.ids.addr(),
                to,
                forced,
                slots,
                kept: moe.kept.addr(),
                landed,
                uses: h.uses[place].wrapping_add(1),
                n: n as i32,
                first: of.of_device(used) as i32,
            };
            if of.alone() {
                // No answer is waited for: the host is to have seen what was given to this place before.
                // SAFETY: a word of the buffer; [`Hands::answer_experts`] or [`Hands::answer_all`] has written it or will.
                unsafe { gpu.engine.stream.await_word(h.answer_word(place).1, h.uses[place])? };
            }
            gpu.engine.ws.rooms.check("choices with slots", a.kept, 4 * n as u64)?;
            // SAFETY: ChoicesArgs is what hand_choices declares; all hold a word for each choice, as checked above and where `forced`
            // is written, and slots one for each expert; the host has read the last choices of this place.
            unsafe { gpu.engine.launch(gpu.engine.kernels.hand_choices, (1, 1, 1), 256, 0, &a)? };
            if of.alone() { gpu.give_no_rows(place) } else { gpu.give_routed(place) }
        };
        let landed = |gpu: &mut CudaBackend| {
            let h = gpu.handover.as_ref().ok_or_else(none)?;
            // SAFETY: a word of the buffer; [`Hands::fetch`] writes it or has it written, or [`Hands::answer_all`].
            unsafe { gpu.engine.stream.await_word(h.landed_word(place).1, h.uses[place]) }
        };
        self.mix_at(layer, routing, give, lands.then_some(landed))
    }

    fn given_routed(&mut self, place: usize) -> Result<(&[f32], &[u32]), BackendError> {
        self.given(place)?;
        let h = self.handover.as_ref().ok_or_else(none)?;
        let floats = h.floats[place];
        let choices = floats / self.dims.n_embd.max(1) * self.dims.n_experts_used;
        Ok((&h.given[place].as_slice()[..floats], &h.ids[place].as_slice()[..choices]))
    }

    fn fetch(&mut self, place: usize, layer: usize, list: &[Brought]) -> Result<(), BackendError> {
        let landing = self.engine.ws.moe.as_ref().ok_or_else(no_experts)?.landing.addr();
        let room = SlotsAt { addr: landing, slots: self.dims.n_experts_used, bytes: landing_slot(&self.dims) };
        let room = self.shared_at(layer)?.0.slots.unwrap_or(room);
        let slots = self.slots_of(layer)?;
        let h = self.handover.as_ref().ok_or_else(none)?;
        if list.is_empty() {
            h.landed_word(place).0.store(h.uses[place], Ordering::Release);
            return Ok(());
        }
        let word_of = |id: u32| slots + u64::from(id) * 4;
        for (i, Brought { expert: e, given }) in list.iter().enumerate() {
            let (low, bytes) = extent(e);
            let at = given.map_or(i, |given| given.slot as usize);
            if bytes > room.bytes || at >= room.slots || e.id as usize >= self.dims.n_experts {
                return Err(device_error(format!("expert {} of {bytes} bytes has no room", e.id)));
            }
            if let Some(before) = given.and_then(|given| given.before) {
                // SAFETY: a word of the slots of this block's experts. The GPU has looked at it before the choices came, and looks
                // again behind the word that it waits for.
                unsafe { h.copies.write_word(word_of(before), NO_SLOT)? };
            }
            // SAFETY: the extent lies in the arena, which outlives this (`share_experts`); the slot has room, and the kernels that
            // read it wait for the word behind this copy, as this waits for the router behind those before.
            unsafe { h.copies.upload(low as *const u8, room.addr + at as u64 * room.bytes, bytes as usize)? };
            if let Some(given) = given {
                // SAFETY: as above.
                unsafe { h.copies.write_word(word_of(e.id), given.slot)? };
            }
        }
        // SAFETY: a word of the buffer.
        unsafe { h.copies.write_word(h.landed_word(place).1, h.uses[place]) }
    }

    fn empty_slots_of(&mut self, layer: usize) -> Result<(), BackendError> {
        let h = self.handover.as_ref().ok_or_else(none)?;
        self.engine.device.bind()?;
        // What looks at them, and what comes to them, ends first.
        self.engine.stream.synchronize()?;
        h.copies.synchronize()?;
        self.take_slots_back(layer)
    }

    fn end_mix(&mut self, layer: usize, place: usize, routing: &Routing) -> Result<(), BackendError> {
        if self.shared_at(layer)?.0.alone() {
            return Ok(());
        }
        let answers = self.await_answer(place)?;
        self.sum_beside(layer, routing, answers)
    }

    fn records(&self) -> bool {
        self.recorder.records()
    }

    fn give_again(&mut self, place: usize) {
        let floats = self.tokens * self.dims.n_embd;
        if let Some(h) = &mut self.handover {
            (h.uses[place], h.floats[place]) = (h.uses[place].wrapping_add(1), floats);
        }
    }

    fn answer_experts(&mut self, place: usize, pairs: &[u32], rows: &[f32]) {
        let n = self.dims.n_embd;
        let Some(h) = &mut self.handover else { return };
        let to = h.answers[place].as_mut_slice();
        for pair in pairs {
            let at = *pair as usize * n;
            to[at..at + n].copy_from_slice(&rows[at..at + n]);
        }
        h.answer_word(place).0.store(h.uses[place], Ordering::Release);
    }

    fn answer(&mut self, place: usize, rows: &[f32]) {
        let Some(h) = &mut self.handover else { return };
        h.answers[place].as_mut_slice()[..rows.len()].copy_from_slice(rows);
        h.answer_word(place).0.store(h.uses[place], Ordering::Release);
    }

    fn answer_all(&mut self) {
        let Some(h) = &mut self.handover else { return };
        if h.lost {
            h.set_words(LET_GO);
            return;
        }
        // A copy that ends later would write its own word over this one; it waits for nothing itself.
        let _ = self.engine.device.bind().and_then(|()| h.copies.synchronize());
        // What is left of the pass runs out on what is there. Its kernels write words, too (`hand_choices`), so that all are let go
        // until it has.
        let began = Instant::now();
        loop {
            h.set_words(LET_GO);
            if !matches!(self.engine.stream.is_idle(), Ok(false)) {
                break;
            }
            if began.elapsed() > WAIT_MAX {
                h.lost = true;
                return;
            }
            std::thread::yield_now();
        }
        h.set_words(0);
        h.uses = [0; PLACES];
    }
}

impl Device {
    /// Whether streams of this GPU can wait for words in memory.
    pub(super) fn waits_for_words(&self) -> Result<bool, BackendError> {
        // Since version 2 of these operations the driver offers them wherever they work.
        let attribute = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS;
        Ok(self.attribute(attribute)? != 0)
    }
}

impl Stream {
    /// Writes a word of host memory behind what was called before, which others see first.
    ///
    /// # Safety
    /// The word is pinned memory that stays until this has run, aligned to 4.
    pub(super) unsafe fn write_word(&self, addr: u64, value: u32) -> Result<(), BackendError> {
        // SAFETY: the caller vouches for the word.
        check(unsafe { sys::cuStreamWriteValue32_v2(self.raw(), addr, value, 0) }, "a word for processors")
    }

    /// What is called from here on waits until the word is `value` or more, in the order of wrapping numbers.
    ///
    /// # Safety
    /// As [`Stream::write_word`]; the word will be written, or nothing behind this ever runs.
    pub(super) unsafe fn await_word(&self, addr: u64, value: u32) -> Result<(), BackendError> {
        // CU_STREAM_WAIT_VALUE_GEQ is 0.
        // SAFETY: the caller vouches for the word.
        check(unsafe { sys::cuStreamWaitValue32_v2(self.raw(), addr, value, 0) }, "a wait for processors")
    }

    /// Whether all its work is done; an error if some of it failed.
    pub(super) fn is_idle(&self) -> Result<bool, BackendError> {
        // SAFETY: the stream is live.
        match unsafe { sys::cuStreamQuery(self.raw()) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            r => check(r, "GPU work failed").map(|()| true),
        }
    }
}

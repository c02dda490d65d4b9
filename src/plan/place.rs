//! Which tier each unit lives in.
//!
//! Units that do not stay resident stream through N buffers: each is a slot as large as the largest streamed
//! unit, and where attention parts stream too, a smaller one for those, so that neither kind waits for the other's
//! slots. What the budget leaves next to them holds resident units, spread over the depth of the model in proportion to
//! bytes, so that every link has work all along a pass.

use super::format_bytes;

/// Where a unit lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Home {
    /// VRAM.
    A,
    /// RAM.
    B,
    /// Storage.
    C,
}

/// What the plan needs to know of a unit, in pass order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UnitSize {
    /// Bytes it takes in memory, alignment included.
    pub slot_bytes: u64,
    /// Bytes it takes in a frame that it is read to from storage: more, where it is requantised only if it rests.
    pub stored_bytes: u64,
    /// The block it belongs to; `None` for slices of the head.
    pub block: Option<usize>,
    /// What it is.
    pub part: UnitPart,
}

/// What a unit is a part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitPart {
    /// The attention part of a dense block.
    Attention,
    /// The feed-forward part of a dense block.
    FeedForward,
    /// Attention part and router of a block with routed experts.
    Shared,
    /// A routed expert: used by some tokens only.
    Expert,
    /// A slice of the output head.
    Head,
}

impl UnitSize {
    /// A unit that takes as many bytes wherever it lives.
    pub fn new(slot_bytes: u64, block: Option<usize>, part: UnitPart) -> UnitSize {
        UnitSize { slot_bytes, stored_bytes: slot_bytes, block, part }
    }

    /// Bytes it takes in a frame, by its home.
    pub(super) fn frame_bytes(&self, home: Home) -> u64 {
        if home == Home::C { self.stored_bytes } else { self.slot_bytes }
    }

    /// Whether only some tokens use it.
    pub fn routed(&self) -> bool {
        self.part == UnitPart::Expert
    }
}

/// Counts of blocks per tier, from `--tiers A:B:C`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiers {
    /// In VRAM.
    pub a: usize,
    /// In RAM.
    pub b: usize,
    /// On storage.
    pub c: usize,
}

impl std::str::FromStr for Tiers {
    type Err = String;

    fn from_str(s: &str) -> Result<Tiers, String> {
        let parts = s.split(':').map(|p| p.trim().parse::<usize>()).collect::<Result<Vec<_>, _>>();
        match parts.as_deref() {
            Ok([a, b, c]) => Ok(Tiers { a: *a, b: *b, c: *c }),
            _ => Err(format!("{s:?} is not A:B:C, three counts of blocks such as 20:30:30")),
        }
    }
}

/// What the plan must keep to.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes that may be taken in RAM: resident units, slots, row buffers and [`Limits::workspace`] together.
    pub ram: u64,
    /// Bytes that weights may take in VRAM, resident units and slots together; `None` where weights
    /// are computed from RAM.
    pub vram: Option<u64>,
    /// Slots; `None` to choose.
    pub n_buffers: Option<usize>,
    /// Whether experts may have more slots on a device than that.
    pub more_frames: bool,
    /// Counts of blocks per tier; `None` to choose.
    pub tiers: Option<Tiers>,
    /// Tiers one after the other instead of interleaved, where their counts are given.
    pub stacked: bool,
    /// Whether tier C may be used.
    pub storage: bool,
    /// Bytes of `ram` that are taken beforehand (row buffers).
    pub reserved: u64,
    /// Bytes of `ram` that the backend takes for itself: KV cache and activations where no GPU holds them,
    /// else 0. They are no part of the plan's bytes.
    pub workspace: u64,
    /// Bytes of the embedding, kept resident if everything else is; `None` if it is the head.
    pub embedding: Option<u64>,
    /// Experts that a token chooses in each layer, where those that stay on storage may have caches in RAM; 0 for no caches.
    pub cached_choices: usize,
    /// Experts that a token chooses in each layer, where all live in RAM and a device keeps some in slots; 0 for those of each layer
    /// that fit to live in VRAM.
    pub slot_choices: usize,
}

/// Buffers when nothing else is said: one computing, one complete, one filling.
pub(super) const BUFFERS_DEFAULT: usize = 3;
/// Fewest buffers that overlap reading and computing.
pub(super) const BUFFERS_MIN: usize = 2;
/// Most slots that may be asked for.
pub const BUFFERS_MAX: usize = 64;

/// Frames that keep a layer's experts from pass to pass: in RAM of those whose home is storage, or in VRAM of those in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cache {
    /// The layer.
    pub block: usize,
    /// Its experts that live there.
    pub experts: usize,
    /// Frames, fewer than experts.
    pub slots: usize,
    /// Bytes of each.
    pub slot_bytes: u64,
}

/// Slots per layer for which there is room, and the fewest of which a cache is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooFewSlots {
    /// Room for so many.
    pub slots: usize,
    /// That were to be so many.
    pub floor: usize,
}

/// Slots of a cache for each expert that a token chooses: below three times as many, what a token brings is gone before it
/// is wanted again.
const SLOTS_PER_CHOICE: usize = 3;

/// Where every unit lives, and the buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Home of each unit, in the order given.
    pub homes: Vec<Home>,
    /// Buffers in RAM (0 if nothing is read to there), each with a slot.
    pub n_slots: usize,
    /// Bytes of each slot.
    pub slot_bytes: u64,
    /// Bytes of the second slot that each buffer has for attention parts; 0 where none is read.
    pub attention_slot_bytes: u64,
    /// Whether the embedding is resident in RAM.
    pub embedding_resident: bool,
    /// Bytes of RAM for weights: resident units, slots, row buffers, embedding.
    pub ram_bytes: u64,
    /// Buffers in VRAM (0 if nothing streams there), each with a slot.
    pub device_slots: usize,
    /// Bytes of each slot.
    pub device_slot_bytes: u64,
    /// Bytes of the second slot that each buffer has for attention parts; 0 where none streams.
    pub device_attention_slot_bytes: u64,
    /// Bytes of VRAM for weights: resident units and slots.
    pub vram_bytes: u64,
    /// Caches in RAM of experts that live on storage, by layer; none where those have none.
    pub caches: Vec<Cache>,
    /// Slots in VRAM of experts that live in RAM, by layer; none where those have none.
    pub device_caches: Vec<Cache>,
    /// Why there are none on storage, where the room for them is too small.
    pub too_few_slots: Option<TooFewSlots>,
}

impl Plan {
    /// Bytes of every frame of the caches, in their order.
    pub fn cache_slots(&self) -> impl Iterator<Item = u64> + '_ {
        self.caches.iter().flat_map(|c| std::iter::repeat_n(c.slot_bytes, c.slots))
    }

    /// Bytes of all caches.
    pub fn cache_bytes(&self) -> u64 {
        self.caches.iter().map(Cache::bytes).sum()
    }

    /// The cache of each of these units that has one.
    pub fn cache_of(&self, units: &[UnitSize]) -> Vec<Option<usize>> {
        let of = |(u, home): (&UnitSize, &Home)| {
            let cached = u.routed() && *home == Home::C;
            self.caches.iter().position(|c| cached && u.block == Some(c.block))
        };
        units.iter().zip(&self.homes).map(of).collect()
    }

    /// Bytes of every slot in RAM: one of each buffer, then those for attention parts.
    pub fn slots(&self) -> impl Iterator<Item = u64> + use<> {
        all_slots(self.n_slots, self.slot_bytes, self.attention_slot_bytes)
    }

    /// The same in VRAM.
    pub fn slots_on_device(&self) -> impl Iterator<Item = u64> + use<> {
        all_slots(self.device_slots, self.device_slot_bytes, self.device_attention_slot_bytes)
    }
}

impl Cache {
    /// Bytes of its frames.
    pub fn bytes(&self) -> u64 {
        self.slots as u64 * self.slot_bytes
    }

    /// Chance that an expert is there if all are as likely to be wanted.
    pub fn uniform_hits(&self) -> f64 {
        self.slots as f64 / self.experts.max(1) as f64
    }
}

/// Caches for the experts at home on storage, in `room` bytes: of each layer the same share, and then slot by slot what is
/// left. An error where a layer would have fewer than [`SLOTS_PER_CHOICE`] slots for each of the choices that fall on those.
pub(super) fn caches(
    units: &[UnitSize],
    homes: &[Home],
    room: u64,
    limits: &Limits,
) -> Result<Vec<Cache>, Option<TooFewSlots>> {
    let blocks = units.iter().filter_map(|u| u.block).max().map_or(0, |b| b + 1);
    // Of each layer: experts, those on storage, and the bytes of its largest.
    let mut layers = vec![(0usize, 0usize, 0u64); blocks];
    for (u, home) in units.iter().zip(homes).filter(|(u, _)| u.routed()) {
        let Some(layer) = u.block.map(|b| &mut layers[b]) else { continue };
        layer.0 += 1;
        if *home == Home::C {
            layer.1 += 1;
            layer.2 = layer.2.max(u.stored_bytes);
        }
    }
    let all: u64 = layers.iter().map(|l| l.1 as u64 * l.2).sum();
    if limits.cached_choices == 0 || limits.tiers.is_some() || all == 0 {
        return Err(None);
    }
    let share = (room as f64 / all as f64).min(1.0);
    let mut caches = Vec::new();
    for (block, &(all, experts, slot_bytes)) in layers.iter().enumerate().filter(|(_, l)| l.1 > 0) {
        let floor = (SLOTS_PER_CHOICE * limits.cached_choices * experts).div_ceil(all);
        let slots = (experts as f64 * share) as usize;
        if slots < floor || slots >= experts {
            return Err(Some(TooFewSlots { slots, floor }).filter(|f| f.slots < f.floor));
        }
        caches.push(Cache { block, experts, slots, slot_bytes });
    }
    let mut left = room.saturating_sub(caches.iter().map(Cache::bytes).sum());
    for c in &mut caches {
        if c.slot_bytes <= left && c.slots + 1 < c.experts {
            left -= c.slot_bytes;
            c.slots += 1;
        }
    }
    Ok(caches)
}

fn all_slots(n: usize, slot: u64, attention: u64) -> impl Iterator<Item = u64> + use<> {
    std::iter::repeat_n(slot, n).chain(std::iter::repeat_n(attention, if attention > 0 { n } else { 0 }))
}

/// The part of a sum that is not weights, as the end of a noun phrase.
fn and_workspace(bytes: &u64) -> String {
    if *bytes == 0 { String::new() } else { format!(" with {} of KV cache and workspace", format_bytes(*bytes)) }
}

/// Why no plan keeps to the limits. Bytes that are needed include the workspace.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The slots alone are larger than the budget.
    #[error(
        "--ram {} is too small: a buffer for the largest unit takes {}, and {n_buffers} of them and {} of row buffers{} need {}",
        format_bytes(*.ram), format_bytes(*.slot_bytes), format_bytes(*.reserved), and_workspace(.workspace),
        format_bytes(*.needed)
    )]
    SlotsTooLarge {
        /// The budget.
        ram: u64,
        /// Bytes of one buffer.
        slot_bytes: u64,
        /// Buffers.
        n_buffers: usize,
        /// Row buffers.
        reserved: u64,
        /// KV cache and activations.
        workspace: u64,
        /// Bytes that would do.
        needed: u64,
    },
    /// Resident blocks that were asked for do not fit.
    #[error("--tiers {a}:{b}:{c}{} needs {} of RAM, but --ram is {}", and_workspace(.workspace), format_bytes(*.needed), format_bytes(*.ram))]
    TiersTooLarge {
        /// Blocks in A.
        a: usize,
        /// Blocks in B.
        b: usize,
        /// Blocks in C.
        c: usize,
        /// KV cache and activations.
        workspace: u64,
        /// Bytes needed.
        needed: u64,
        /// The budget.
        ram: u64,
    },
    /// The slots in VRAM are larger than what is left there.
    #[error(
        "VRAM is too small: {} are left for weights, but {n_buffers} buffers for the largest unit, of {} each, need {}; give a larger --vram or a smaller --ctx",
        format_bytes(*.vram), format_bytes(*.slot_bytes), format_bytes(*.n_buffers as u64 * *.slot_bytes)
    )]
    DeviceSlotsTooLarge {
        /// Bytes left for weights.
        vram: u64,
        /// Bytes of one buffer.
        slot_bytes: u64,
        /// Buffers.
        n_buffers: usize,
    },
    /// Blocks that were asked for in VRAM do not fit.
    #[error(
        "--tiers {a}:{b}:{c} needs {} of VRAM for weights, but {} are left for them; give a larger --vram or a smaller --ctx",
        format_bytes(*.needed), format_bytes(*.vram)
    )]
    TiersTooLargeForVram {
        /// Blocks in A.
        a: usize,
        /// Blocks in B.
        b: usize,
        /// Blocks in C.
        c: usize,
        /// Bytes needed.
        needed: u64,
        /// Bytes left for weights.
        vram: u64,
    },
    /// Counts that do not add up to the model's blocks.
    #[error("--tiers {a}:{b}:{c} names {} blocks, but the model has {blocks}", a + b + c)]
    TiersMiscounted {
        /// Blocks in A.
        a: usize,
        /// Blocks in B.
        b: usize,
        /// Blocks in C.
        c: usize,
        /// Blocks of the model.
        blocks: usize,
    },
    /// Tier A was asked for without a GPU.
    #[error("--tiers asks for {a} blocks in VRAM, but the cpu backend has no tier A")]
    NoVram {
        /// Blocks in A.
        a: usize,
    },
    /// The model is larger than RAM and storage was forbidden.
    #[error("the model{} takes {}, --ram is {}, and --tier-c none forbids to read the rest from storage", and_workspace(.workspace), format_bytes(*.needed), format_bytes(*.ram))]
    NoStorage {
        /// KV cache and activations.
        workspace: u64,
        /// Bytes needed.
        needed: u64,
        /// The budget.
        ram: u64,
    },
}

impl PlanError {
    /// The error of a plan for what `of_backend` bytes of workspace left, in terms of the whole.
    fn counting(mut self, of_backend: u64, given: u64) -> PlanError {
        match &mut self {
            PlanError::SlotsTooLarge { ram, workspace, needed, .. }
            | PlanError::TiersTooLarge { ram, workspace, needed, .. }
            | PlanError::NoStorage { ram, workspace, needed } => {
                (*ram, *workspace, *needed) = (given, of_backend, needed.saturating_add(of_backend));
            }
            _ => {}
        }
        self
    }
}

/// Places the units: homes B and C where weights are computed from RAM, A too where they are computed
/// from VRAM.
///
/// # Errors
/// Where nothing keeps to the limits, with what would.
pub fn place(units: &[UnitSize], limits: &Limits) -> Result<Plan, PlanError> {
    let room = Limits { ram: limits.ram.saturating_sub(limits.workspace), ..*limits };
    let placed = match (limits.vram, limits.tiers) {
        (Some(vram), _) => super::device::place(units, &room, vram),
        (None, Some(tiers)) => place_by_count(units, &room, tiers),
        (None, None) => place_by_room(units, &room),
    };
    placed.map_err(|e| e.counting(limits.workspace, limits.ram))
}

fn place_by_room(units: &[UnitSize], limits: &Limits) -> Result<Plan, PlanError> {
    let needed = units.iter().map(|u| u.slot_bytes).sum::<u64>() + limits.reserved;
    if needed <= limits.ram {
        return Ok(finish(units, vec![Home::B; units.len()], 0, limits, Err(None)));
    }
    if !limits.storage {
        return Err(PlanError::NoStorage { workspace: 0, needed, ram: limits.ram });
    }
    // Attention parts are small: without them, streamed units are alike, and buffers have no slots for them.
    let of = |u: &UnitSize| u.part == UnitPart::Attention;
    let mut homes = vec![Home::C; units.len()];
    let (mut n_slots, mut buffer) = slots(units.iter().filter(|u| !of(u)), limits)?;
    let mut room = limits.ram - limits.reserved - n_slots as u64 * buffer;
    if units.iter().filter(|u| of(u)).map(|u| u.slot_bytes).sum::<u64>() > room {
        (n_slots, buffer) = slots(units.iter(), limits)?;
        room = limits.ram - limits.reserved - n_slots as u64 * buffer;
    }
    let left = spread(units, &mut homes, Home::B, room, of);
    // Every token uses the shared units, and only some experts: shared ones are resident first.
    let left = spread(units, &mut homes, Home::B, left, |u| !of(u) && !u.routed());
    let shared = units.iter().zip(&homes).all(|(u, h)| u.routed() || *h == Home::B);
    let caches = if shared { caches(units, &homes, left, limits) } else { Err(None) };
    if caches.is_err() {
        spread(units, &mut homes, Home::B, left, UnitSize::routed);
    }
    Ok(finish(units, homes, n_slots, limits, caches))
}

fn place_by_count(units: &[UnitSize], limits: &Limits, t: Tiers) -> Result<Plan, PlanError> {
    let blocks = units.iter().filter_map(|u| u.block).max().map_or(0, |b| b + 1);
    let Tiers { a, b, c } = t;
    if a + b + c != blocks {
        return Err(PlanError::TiersMiscounted { a, b, c, blocks });
    }
    if a > 0 {
        return Err(PlanError::NoVram { a });
    }
    if c > 0 && !limits.storage {
        return Err(PlanError::NoStorage {
            workspace: 0,
            needed: units.iter().map(|u| u.slot_bytes).sum(),
            ram: limits.ram,
        });
    }
    // Interleaved, block i is resident if the running count of resident ones steps up there.
    let resident = |i: usize| if limits.stacked { i < b } else { (i + 1) * b / blocks > i * b / blocks };
    let mut homes: Vec<Home> =
        units.iter().map(|u| if u.block.is_some_and(resident) { Home::B } else { Home::C }).collect();
    let bytes_b: u64 = units.iter().zip(&homes).filter(|(_, h)| **h == Home::B).map(|(u, _)| u.slot_bytes).sum();
    let (n_slots, slot_bytes) =
        if c == 0 { (0, 0) } else { slots(units.iter().filter(|u| u.block.is_none_or(|i| !resident(i))), limits)? };
    let needed = bytes_b + n_slots as u64 * slot_bytes + limits.reserved;
    if needed > limits.ram {
        return Err(PlanError::TiersTooLarge { a, b, c, workspace: 0, needed, ram: limits.ram });
    }
    let head: u64 = units.iter().filter(|u| u.block.is_none()).map(|u| u.slot_bytes).sum();
    if head <= limits.ram - needed || c == 0 {
        units.iter().zip(&mut homes).filter(|(u, _)| u.block.is_none()).for_each(|(_, h)| *h = Home::B);
        if head > limits.ram - needed {
            return Err(PlanError::TiersTooLarge { a, b, c, workspace: 0, needed: needed + head, ram: limits.ram });
        }
    } else {
        spread(units, &mut homes, Home::B, limits.ram - needed, |u| u.block.is_none());
    }
    Ok(finish(units, homes, n_slots, limits, Err(None)))
}

/// Bytes of the slots that a buffer has for `streamed` units, each with the bytes that it takes there: one for attention parts
/// (0 where there are none, or nothing else), and one for all others.
pub(super) fn slot_sizes<'a>(streamed: impl Iterator<Item = (&'a UnitSize, u64)>) -> SlotSizes {
    let (mut others, mut attention) = (0, 0);
    for (u, bytes) in streamed {
        let most = if u.part == UnitPart::Attention { &mut attention } else { &mut others };
        *most = bytes.max(*most);
    }
    SlotSizes::new(others, attention)
}

/// Bytes of the slots of one buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SlotSizes {
    /// For all units but attention parts, or for those if nothing else streams.
    pub slot: u64,
    /// For attention parts.
    pub attention: u64,
}

impl SlotSizes {
    pub fn new(others: u64, attention: u64) -> SlotSizes {
        match others {
            0 => SlotSizes { slot: attention, attention: 0 },
            slot => SlotSizes { slot, attention },
        }
    }

    pub fn sum(self) -> u64 {
        self.slot + self.attention
    }
}

/// Number and size of the buffers that hold any of `streamed`.
fn slots<'a>(streamed: impl Iterator<Item = &'a UnitSize>, limits: &Limits) -> Result<(usize, u64), PlanError> {
    let buffer = slot_sizes(streamed.map(|u| (u, u.stored_bytes))).sum();
    let needed = |n: usize| limits.reserved + n as u64 * buffer;
    let n = match limits.n_buffers {
        Some(n) => n,
        None if needed(BUFFERS_DEFAULT) <= limits.ram => BUFFERS_DEFAULT,
        None => BUFFERS_MIN,
    };
    if needed(n) > limits.ram {
        return Err(PlanError::SlotsTooLarge {
            ram: limits.ram,
            slot_bytes: buffer,
            n_buffers: n,
            reserved: limits.reserved,
            workspace: 0,
            needed: needed(limits.n_buffers.unwrap_or(BUFFERS_MIN)),
        });
    }
    Ok((n, buffer))
}

/// Gives units that `wanted` names a home in `to`, spread evenly over their bytes, within `room`.
/// Returns the room left.
pub(super) fn spread(
    units: &[UnitSize],
    homes: &mut [Home],
    to: Home,
    room: u64,
    wanted: impl Fn(&UnitSize) -> bool,
) -> u64 {
    let total: u64 = units.iter().filter(|u| wanted(u)).map(|u| u.slot_bytes).sum();
    let share = if total == 0 { 0.0 } else { (room as f64 / total as f64).min(1.0) };
    let (mut left, mut credit) = (room, 0.0);
    for (u, home) in units.iter().zip(homes).filter(|(u, _)| wanted(u)) {
        credit += u.slot_bytes as f64 * share;
        // Half a unit of tolerance keeps rounding from losing the last one.
        if u.slot_bytes <= left && credit + 0.5 >= u.slot_bytes as f64 {
            *home = to;
            credit -= u.slot_bytes as f64;
            left -= u.slot_bytes;
        }
    }
    left
}

fn finish(
    units: &[UnitSize],
    homes: Vec<Home>,
    n_slots: usize,
    limits: &Limits,
    caches: Result<Vec<Cache>, Option<TooFewSlots>>,
) -> Plan {
    let sum =
        |home: Home| units.iter().zip(&homes).filter(|(_, h)| **h == home).map(|(u, _)| u.slot_bytes).sum::<u64>();
    let streamed = units.iter().zip(&homes).filter(|(_, h)| **h == Home::C);
    let sizes = slot_sizes(streamed.map(|(u, _)| (u, u.stored_bytes)));
    let n_slots = if sizes.slot == 0 { 0 } else { n_slots };
    let (caches, too_few_slots) = caches.map_or_else(|few| (Vec::new(), few), |caches| (caches, None));
    let cached: u64 = caches.iter().map(Cache::bytes).sum();
    let mut ram_bytes = sum(Home::B) + n_slots as u64 * sizes.sum() + limits.reserved + cached;
    let fits = |e: &u64| n_slots == 0 && ram_bytes + e <= limits.ram;
    let embedding = limits.embedding.filter(fits);
    ram_bytes += embedding.unwrap_or(0);
    Plan {
        homes,
        n_slots,
        slot_bytes: sizes.slot,
        attention_slot_bytes: sizes.attention,
        embedding_resident: embedding.is_some(),
        ram_bytes,
        device_slots: 0,
        device_slot_bytes: 0,
        device_attention_slot_bytes: 0,
        vram_bytes: 0,
        caches,
        device_caches: Vec::new(),
        too_few_slots,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Units of so many blocks and slices of the head.
    pub fn model(blocks: usize, block_bytes: u64, slices: usize, slice_bytes: u64) -> Vec<UnitSize> {
        let block = |i| UnitSize::new(block_bytes, Some(i), UnitPart::FeedForward);
        let slice = UnitSize::new(slice_bytes, None, UnitPart::Head);
        (0..blocks).map(block).chain((0..slices).map(|_| slice)).collect()
    }

    /// Blocks of two parts: `attention` and `ffn` bytes each.
    pub fn in_parts(blocks: usize, attention: u64, ffn: u64) -> Vec<UnitSize> {
        let part = |i, slot_bytes, part| UnitSize::new(slot_bytes, Some(i), part);
        let of = |i| [part(i, attention, UnitPart::Attention), part(i, ffn, UnitPart::FeedForward)];
        (0..blocks).flat_map(of).collect()
    }

    fn limits(ram: u64) -> Limits {
        Limits {
            ram,
            vram: None,
            n_buffers: None,
            more_frames: false,
            tiers: None,
            stacked: false,
            storage: true,
            reserved: 0,
            workspace: 0,
            embedding: None,
            cached_choices: 0,
            slot_choices: 0,
        }
    }

    #[test]
    fn a_model_that_fits_is_resident_and_needs_no_slots() {
        let p = place(&model(4, 100, 2, 50), &limits(500)).unwrap();
        assert_eq!((p.n_slots, p.ram_bytes), (0, 500));
        assert!(p.homes.iter().all(|&h| h == Home::B));
    }

    /// Units that are smaller where they rest: as many rest as fit by that size, and slots are as large as what is read.
    #[test]
    fn slots_hold_what_is_read_and_homes_count_what_rests() {
        let units: Vec<UnitSize> =
            model(30, 100, 0, 0).into_iter().map(|u| UnitSize { stored_bytes: 150, ..u }).collect();
        assert_eq!(place(&units, &limits(3000)).unwrap().n_slots, 0);
        let p = place(&units, &limits(2999)).unwrap();
        assert_eq!((p.n_slots, p.slot_bytes), (3, 150));
        assert_eq!(p.homes.iter().filter(|h| **h == Home::B).count(), 25);
        // With VRAM as well, frames there are small where all is in RAM, and large where something is read.
        let vram = |ram| Limits { vram: Some(1000), ..limits(ram) };
        let p = place(&units, &vram(10_000)).unwrap();
        assert_eq!((p.device_slots, p.device_slot_bytes, p.n_slots, p.slot_bytes), (3, 100, 2, 100));
        let p = place(&units, &vram(1500)).unwrap();
        assert_eq!((p.device_slots, p.device_slot_bytes, p.n_slots, p.slot_bytes), (3, 150, 3, 150));
        assert!(p.vram_bytes <= 1000 && p.ram_bytes <= 1500);
    }

    #[test]
    fn resident_units_are_spread_over_the_depth() {
        let p = place(&model(30, 100, 0, 0), &limits(300 + 1000)).unwrap();
        let at: Vec<usize> = (0..30).filter(|&i| p.homes[i] == Home::B).collect();
        assert_eq!(at.len(), 10);
        assert!(at.windows(2).all(|w| w[1] - w[0] == 3), "{at:?}");
        assert_eq!(p.ram_bytes, 1300);
    }

    #[test]
    fn two_slots_where_three_do_not_fit_and_an_error_below() {
        assert_eq!(place(&model(5, 100, 0, 0), &limits(250)).unwrap().n_slots, 2);
        let e = place(&model(5, 100, 0, 0), &limits(150)).unwrap_err();
        assert!(matches!(e, PlanError::SlotsTooLarge { needed: 200, .. }));
        let asked = Limits { n_buffers: Some(4), ..limits(350) };
        assert!(matches!(place(&model(5, 100, 0, 0), &asked), Err(PlanError::SlotsTooLarge { needed: 400, .. })));
    }

    #[test]
    fn tiers_are_obeyed() {
        let t = |b, c| Limits { tiers: Some(Tiers { a: 0, b, c }), ..limits(10_000) };
        let p = place(&model(30, 100, 2, 50), &t(10, 20)).unwrap();
        assert_eq!(p.homes[..30].iter().filter(|&&h| h == Home::C).count(), 20);
        assert!(p.homes[30..].iter().all(|&h| h == Home::B));
        assert!(matches!(place(&model(30, 100, 2, 50), &t(10, 10)), Err(PlanError::TiersMiscounted { .. })));
        let tight = Limits { ram: 500, ..t(10, 20) };
        assert!(matches!(place(&model(30, 100, 2, 50), &tight), Err(PlanError::TiersTooLarge { .. })));
    }

    #[test]
    fn attention_parts_come_first_and_both_parts_follow_tiers_that_are_given() {
        let units = in_parts(10, 20, 80);
        // 200 of attention, three slots of 80 and two feed-forward parts.
        let p = place(&units, &limits(200 + 240 + 160)).unwrap();
        assert_eq!((p.n_slots, p.slot_bytes, p.attention_slot_bytes, p.ram_bytes), (3, 80, 0, 600));
        assert!(p.homes.chunks(2).all(|b| b[0] == Home::B));
        assert_eq!(p.homes.iter().filter(|h| **h == Home::C).count(), 8);
        // Where not all attention parts fit, buffers have slots for them.
        let p = place(&units, &limits(300 + 100)).unwrap();
        assert_eq!((p.n_slots, p.slot_bytes, p.attention_slot_bytes), (3, 80, 20));
        assert_eq!(p.slots().collect::<Vec<_>>(), [80, 80, 80, 20, 20, 20]);
        assert!(p.ram_bytes <= 400);
        let given = Limits { tiers: Some(Tiers { a: 0, b: 4, c: 6 }), ..limits(10_000) };
        let p = place(&units, &given).unwrap();
        assert!(p.homes.chunks(2).all(|b| b[0] == b[1]));
        assert_eq!((p.n_slots, p.ram_bytes), (3, 400 + 3 * 100));
    }

    #[test]
    fn experts_come_after_what_every_token_uses() {
        let mut units = model(4, 100, 1, 50);
        units.extend((0..16).map(|i| UnitSize::new(40, Some(i / 4), UnitPart::Expert)));
        let p = place(&units, &limits(300 + 450 + 100)).unwrap();
        assert!(p.homes[..5].iter().all(|&h| h == Home::B));
        assert!(p.homes[5..].contains(&Home::B) && p.homes[5..].contains(&Home::C));
        assert!(p.ram_bytes <= 850);
    }

    /// 64 experts of which a token chooses 4 in each of 4 blocks, 40 bytes each.
    fn routed() -> Vec<UnitSize> {
        let of = |i| {
            let shared = UnitSize::new(100, Some(i), UnitPart::Shared);
            let expert = UnitSize::new(40, Some(i), UnitPart::Expert);
            std::iter::once(shared).chain(std::iter::repeat_n(expert, 64))
        };
        (0..4).flat_map(of).collect()
    }

    #[test]
    fn experts_on_storage_have_a_cache_in_each_layer() {
        // 400 of shared parts and room for three slots of 100 leave 4 × 20 slots and one more.
        let with = |ram| Limits { cached_choices: 4, ..limits(ram) };
        let p = place(&routed(), &with(400 + 300 + 4 * 20 * 40 + 50)).unwrap();
        assert_eq!(p.caches.iter().map(|c| c.slots).collect::<Vec<_>>(), [21, 20, 20, 20]);
        assert!(p.caches.iter().enumerate().all(|(i, c)| (c.block, c.experts, c.slot_bytes) == (i, 64, 40)));
        assert_eq!((p.ram_bytes, p.cache_bytes(), p.too_few_slots), (400 + 120 + 81 * 40, 81 * 40, None));
        assert!(routed().iter().zip(&p.homes).all(|(u, h)| (*h == Home::C) == u.routed()));
        let of = p.cache_of(&routed());
        assert_eq!((of[0], of[1], of[64], of[66]), (None, Some(0), Some(0), Some(1)));
        assert_eq!(p.cache_slots().sum::<u64>(), p.cache_bytes());
        // All of them fit.
        let p = place(&routed(), &with(400 + 256 * 40)).unwrap();
        assert!(p.caches.is_empty() && p.homes.iter().all(|h| *h == Home::B));
    }

    /// Below three slots for each choice a cache hits little: as many experts are resident.
    #[test]
    fn too_small_a_cache_is_none() {
        let with = |slots: u64| Limits { cached_choices: 4, ..limits(400 + 300 + 4 * slots * 40) };
        let p = place(&routed(), &with(11)).unwrap();
        assert_eq!((p.caches.len(), p.too_few_slots), (0, Some(TooFewSlots { slots: 11, floor: 12 })));
        assert_eq!(p.homes.iter().filter(|h| **h == Home::B).count(), 4 + 44);
        assert_eq!(place(&routed(), &with(12)).unwrap().caches.len(), 4);
        // With counts of blocks that are given, and where nothing is to have a cache.
        let none = Limits { cached_choices: 0, ..with(30) };
        let given = Limits { tiers: Some(Tiers { a: 0, b: 1, c: 3 }), ..with(60) };
        for l in [none, given] {
            let p = place(&routed(), &l).unwrap();
            assert_eq!((p.caches.len(), p.too_few_slots), (0, None));
        }
        // Experts in VRAM take their share of the choices.
        let p = place(&routed(), &Limits { vram: Some(400 + 300 + 128 * 40), ..with(10) }).unwrap();
        assert!(p.caches.iter().all(|c| c.experts == 32 && c.slots >= 6), "{:?}", p.caches);
    }

    #[test]
    fn without_storage_a_large_model_is_refused() {
        let l = Limits { storage: false, ..limits(300) };
        assert_eq!(place(&model(4, 100, 0, 0), &l), Err(PlanError::NoStorage { workspace: 0, needed: 400, ram: 300 }));
    }

    /// Guards against a KV cache that no budget counts.
    #[test]
    fn the_workspace_is_part_of_the_budget_and_of_what_is_needed() {
        let with = |ram, storage| Limits { workspace: 1000, storage, ..limits(ram) };
        let p = place(&model(4, 100, 0, 0), &with(1400, true)).unwrap();
        assert_eq!((p.n_slots, p.ram_bytes), (0, 400));
        assert_eq!(place(&model(4, 100, 0, 0), &with(1399, true)).unwrap().n_slots, 3);
        for ram in [0, 900, 1199] {
            let e = place(&model(4, 100, 0, 0), &with(ram, true)).unwrap_err();
            assert!(matches!(e, PlanError::SlotsTooLarge { needed: 1200, workspace: 1000, .. }), "{e}");
            assert!(e.to_string().contains("KV cache"), "{e}");
        }
        assert!(place(&model(4, 100, 0, 0), &with(1200, true)).is_ok());
        let e = place(&model(4, 100, 0, 0), &with(1399, false)).unwrap_err();
        assert_eq!(e, PlanError::NoStorage { workspace: 1000, needed: 1400, ram: 1399 });
    }

    /// Guards against a layout that processors ignore.
    #[test]
    fn stacked_tiers_lie_one_after_the_other() {
        let l = Limits { tiers: Some(Tiers { a: 0, b: 2, c: 3 }), stacked: true, ..limits(10_000) };
        assert_eq!(place(&model(5, 100, 0, 0), &l).unwrap().homes, [Home::B, Home::B, Home::C, Home::C, Home::C]);
    }
}

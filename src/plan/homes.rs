//! What a placement is made of and what comes of it: units, limits, homes, slots and caches.

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
    /// The columns of it that are for processors next to a device, where it is cut: it lives in RAM.
    Slice,
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
pub const BUFFERS_MIN: usize = 2;
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
        format_bytes(*.vram), format_bytes(*.slot_bytes), format_bytes((*.n_buffers as u64).saturating_mul(*.slot_bytes))
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
    pub(super) fn counting(mut self, of_backend: u64, given: u64) -> PlanError {
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

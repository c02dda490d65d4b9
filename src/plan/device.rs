//! Placement for a backend with memory of its own: homes A, B and C.

use super::homes::{
    BUFFERS_DEFAULT, BUFFERS_MIN, Cache, Home, Limits, Plan, PlanError, SlotSizes, Tiers, TooFewSlots, UnitPart,
    UnitSize, caches, slot_sizes, spread,
};

/// Staging slots that loading tier A takes where nothing streams from storage.
const LOADING_SLOTS: usize = 2;

/// Places the units where `vram` bytes of device memory are for weights: resident ones and slots.
pub(super) fn place(units: &[UnitSize], limits: &Limits, vram: u64) -> Result<Plan, PlanError> {
    // Where nothing is read, no frame need hold what units have on storage; else any may.
    if units.iter().any(|u| u.stored_bytes > u.slot_bytes) {
        let resting: Vec<UnitSize> = units.iter().map(|u| UnitSize { stored_bytes: u.slot_bytes, ..*u }).collect();
        match place_as(&resting, limits, vram) {
            Ok(plan) if !plan.homes.contains(&Home::C) => return Ok(plan),
            _ => {}
        }
    }
    place_as(units, limits, vram)
}

fn place_as(units: &[UnitSize], limits: &Limits, vram: u64) -> Result<Plan, PlanError> {
    let mut homes = vec![Home::C; units.len()];
    let slots = match limits.tiers {
        Some(t) => by_count(units, limits, vram, t, &mut homes)?,
        None => by_room(units, limits, vram, &mut homes)?,
    };
    Ok(finish(units, (limits, vram), homes, slots))
}

/// Numbers of slots that room was left for.
struct Slots {
    device: usize,
    staging: usize,
    caches: Result<Vec<Cache>, Option<TooFewSlots>>,
    on_device: Vec<Cache>,
}

/// Where experts' slots in VRAM begin.
pub const SLOT_ALIGN: u64 = 256;
/// Bytes of experts that are brought ahead of a prompt's router: what a link carries while attention is computed.
const AHEAD_BYTES: u64 = 64 << 20;
/// Most of the device memory for weights that is left to those: one part in so many.
const AHEAD_PART: u64 = 16;

/// Bytes of the slots of experts, where they may have more than others.
fn ahead(limits: &Limits, vram: u64) -> u64 {
    if limits.more_frames { AHEAD_BYTES.min(vram / AHEAD_PART) } else { 0 }
}

/// Number of device slots that hold any unit `streamed`, and the room that they leave.
fn device_slots(
    units: &[UnitSize],
    limits: &Limits,
    vram: u64,
    streamed: impl Fn(&UnitSize) -> bool,
) -> Result<(usize, u64), PlanError> {
    let streamed_units = units.iter().filter(|u| streamed(u));
    let slot_bytes = slot_sizes(streamed_units.map(|u| (u, u.slot_bytes.max(u.stored_bytes)))).sum();
    let needed = |n: usize| (n as u64).saturating_mul(slot_bytes);
    let n = match limits.n_buffers {
        Some(n) => n,
        None if needed(BUFFERS_DEFAULT) <= vram / 2 => BUFFERS_DEFAULT,
        None => BUFFERS_MIN,
    };
    let experts = units.iter().any(|u| streamed(u) && u.routed());
    let ahead = if experts { ahead(limits, vram) } else { 0 };
    match vram.checked_sub(needed(n)) {
        Some(room) => Ok((n, room.min(vram - ahead))),
        None => Err(PlanError::DeviceSlotsTooLarge { vram, slot_bytes, n_buffers: n }),
    }
}

fn by_room(units: &[UnitSize], limits: &Limits, vram: u64, homes: &mut [Home]) -> Result<Slots, PlanError> {
    if units.iter().map(|u| u.slot_bytes).sum::<u64>() <= vram {
        homes.fill(Home::A);
        let (staging, caches) = fill_ram(units, limits, homes)?;
        return Ok(Slots { device: 0, staging, caches, on_device: Vec::new() });
    }
    // The head is read whole on every pass. Attention parts are small, and next to the KV cache here: what streams is
    // alike without them, and buffers have no slots for them.
    let of = |part: UnitPart| move |u: &UnitSize| u.part == part;
    let bytes = |part| units.iter().filter(|u| of(part)(u)).map(|u| u.slot_bytes).sum::<u64>();
    let (mut device, mut room) = device_slots(units, limits, vram, |u| u.part != UnitPart::Attention)?;
    if bytes(UnitPart::Head) + bytes(UnitPart::Attention) > room {
        (device, room) = device_slots(units, limits, vram, |_| true)?;
    }
    let room = spread(units, homes, Home::A, room, of(UnitPart::Head));
    let room = spread(units, homes, Home::A, room, of(UnitPart::Attention));
    // Every token uses the shared units, and only some experts.
    let room = spread(units, homes, Home::A, room, |u| matches!(u.part, UnitPart::FeedForward | UnitPart::Shared));
    let on_device = experts_in_slots(units, homes, room, limits);
    if !on_device.is_empty() {
        let mut all = homes.to_vec();
        let resting = |(u, home): (&UnitSize, &Home)| !u.routed() || *home == Home::B;
        if let Ok((staging, caches)) = fill_ram(units, limits, &mut all)
            && units.iter().zip(&all).all(resting)
        {
            homes.copy_from_slice(&all);
            return Ok(Slots { device, staging, caches, on_device });
        }
    }
    spread(units, homes, Home::A, room, UnitSize::routed);
    let (staging, caches) = fill_ram(units, limits, homes)?;
    Ok(Slots { device, staging, caches, on_device: Vec::new() })
}

/// Slots in `room` bytes of VRAM for experts that live in RAM: of each layer the same share; none where a layer would have fewer
/// than a token chooses, or as many as it has experts.
fn experts_in_slots(units: &[UnitSize], homes: &[Home], room: u64, limits: &Limits) -> Vec<Cache> {
    if limits.slot_choices == 0 || units.iter().zip(homes).any(|(u, home)| !u.routed() && *home != Home::A) {
        return Vec::new();
    }
    let mut slots = Vec::new();
    for layer in units.chunk_by(|a, b| a.block == b.block && a.routed() == b.routed()) {
        if let (true, Some(block)) = (layer[0].routed(), layer[0].block) {
            let slot_bytes = layer.iter().map(|u| u.slot_bytes).max().unwrap_or(0).next_multiple_of(SLOT_ALIGN);
            slots.push(Cache { block, experts: layer.len(), slots: 0, slot_bytes });
        }
    }
    let all: u64 = slots.iter().map(|c| c.experts as u64 * c.slot_bytes).sum();
    let room = room.saturating_sub(SLOT_ALIGN);
    for c in &mut slots {
        c.slots = (c.experts as f64 * room as f64 / all.max(1) as f64) as usize;
    }
    if slots.iter().any(|c| c.slots < limits.slot_choices || c.slots >= c.experts) { Vec::new() } else { slots }
}

/// Number of the staging buffers that `homes` want, and bytes of their slots. What is loaded to VRAM goes through the
/// slots that are not for attention parts alone.
fn staging(units: &[UnitSize], limits: &Limits, homes: &[Home], from_storage: bool) -> (usize, SlotSizes) {
    let (mut others, mut attention) = (0, 0);
    for (u, home) in units.iter().zip(homes) {
        match home {
            Home::C if from_storage && u.part == UnitPart::Attention => attention = u.stored_bytes.max(attention),
            Home::C if from_storage => others = u.stored_bytes.max(others),
            Home::A => others = u.slot_bytes.max(others),
            _ => {}
        }
    }
    let sizes = SlotSizes::new(others, attention);
    let n = match limits.n_buffers {
        _ if sizes.slot == 0 => 0,
        _ if !from_storage => LOADING_SLOTS,
        Some(n) => n,
        None if limits.reserved + BUFFERS_DEFAULT as u64 * sizes.sum() <= limits.ram / 2 => BUFFERS_DEFAULT,
        None => BUFFERS_MIN,
    };
    (n, sizes)
}

/// Staging slots, and caches of what is left on storage.
type InRam = (usize, Result<Vec<Cache>, Option<TooFewSlots>>);

/// Gives what is not in A a home in RAM, as far as it goes, or caches.
fn fill_ram(units: &[UnitSize], limits: &Limits, homes: &mut [Home]) -> Result<InRam, PlanError> {
    let rest: u64 = units.iter().zip(&*homes).filter(|(_, h)| **h == Home::C).map(|(u, _)| u.slot_bytes).sum();
    let (n, slot) = staging(units, limits, homes, false);
    let needed = rest + limits.reserved + n as u64 * slot.sum();
    if needed <= limits.ram {
        homes.iter_mut().filter(|h| **h == Home::C).for_each(|h| *h = Home::B);
        return Ok((n, Err(None)));
    }
    if !limits.storage {
        return Err(PlanError::NoStorage { workspace: 0, needed, ram: limits.ram });
    }
    let (n, slot) = staging(units, limits, homes, true);
    let room = limits.ram.checked_sub(limits.reserved + n as u64 * slot.sum()).ok_or(PlanError::SlotsTooLarge {
        ram: limits.ram,
        slot_bytes: slot.sum(),
        n_buffers: n,
        reserved: limits.reserved,
        workspace: 0,
        needed: limits.reserved + n as u64 * slot.sum(),
    })?;
    let outside: Vec<bool> = homes.iter().map(|h| *h == Home::C).collect();
    let left = spread_where(units, homes, &outside, room, |u| u.part == UnitPart::Attention);
    let left = spread_where(units, homes, &outside, left, |u| u.part != UnitPart::Attention && !u.routed());
    let shared = units.iter().zip(&*homes).all(|(u, h)| u.routed() || *h != Home::C);
    let caches = if shared { caches(units, homes, left, limits) } else { Err(None) };
    if caches.is_err() {
        spread_where(units, homes, &outside, left, UnitSize::routed);
    }
    Ok((n, caches))
}

/// [`spread`] in RAM over those units alone that `outside` marks.
fn spread_where(
    units: &[UnitSize],
    homes: &mut [Home],
    outside: &[bool],
    room: u64,
    wanted: impl Fn(&UnitSize) -> bool,
) -> u64 {
    let at: Vec<usize> = (0..units.len()).filter(|&i| outside[i]).collect();
    let some: Vec<UnitSize> = at.iter().map(|&i| units[i]).collect();
    let mut some_homes: Vec<Home> = at.iter().map(|&i| homes[i]).collect();
    let left = spread(&some, &mut some_homes, Home::B, room, wanted);
    at.iter().zip(some_homes).for_each(|(&i, h)| homes[i] = h);
    left
}

fn by_count(units: &[UnitSize], limits: &Limits, vram: u64, t: Tiers, homes: &mut [Home]) -> Result<Slots, PlanError> {
    let blocks = units.iter().filter_map(|u| u.block).max().map_or(0, |b| b + 1);
    let Tiers { a, b, c } = t;
    if a + b + c != blocks {
        return Err(PlanError::TiersMiscounted { a, b, c, blocks });
    }
    let of_block = deal(t, limits.stacked);
    for (u, home) in units.iter().zip(&mut *homes) {
        if let Some(block) = u.block {
            *home = of_block[block];
        }
    }
    let bytes = |homes: &[Home], home| {
        let of = units.iter().zip(homes).filter(|(u, h)| u.block.is_some() && **h == home);
        of.map(|(u, _)| u.slot_bytes).sum::<u64>()
    };
    let head: u64 = units.iter().filter(|u| u.block.is_none()).map(|u| u.slot_bytes).sum();
    let streams = |u: &UnitSize| u.block.is_some_and(|i| of_block[i] != Home::A);
    let too_large = |needed| PlanError::TiersTooLargeForVram { a, b, c, needed, vram };
    let (mut n, mut room) = device_slots(units, limits, vram, streams)?;
    let in_a = bytes(homes, Home::A);
    room = room.checked_sub(in_a).ok_or_else(|| too_large(in_a + vram - room))?;
    let set_head = |homes: &mut [Home], home| {
        units.iter().zip(homes).filter(|(u, _)| u.block.is_none()).for_each(|(_, h)| *h = home);
    };
    if head <= room {
        set_head(homes, Home::A);
    } else {
        // The head's slices stream too.
        (n, room) = device_slots(units, limits, vram, |u| u.block.is_none() || streams(u))?;
        room = room.checked_sub(in_a).ok_or_else(|| too_large(in_a + vram - room))?;
        spread(units, homes, Home::A, room, |u| u.block.is_none());
        let (slots, slot) = staging(units, limits, homes, true);
        let taken = limits.reserved + slots as u64 * slot.sum() + bytes(homes, Home::B);
        let left: Vec<bool> = units.iter().zip(&*homes).map(|(u, h)| u.block.is_none() && *h == Home::C).collect();
        spread_where(units, homes, &left, limits.ram.saturating_sub(taken), |_| true);
    }
    let from_storage = homes.contains(&Home::C);
    if from_storage && !limits.storage {
        return Err(PlanError::NoStorage {
            workspace: 0,
            needed: units.iter().map(|u| u.slot_bytes).sum(),
            ram: limits.ram,
        });
    }
    let (staging, slot) = staging(units, limits, homes, from_storage);
    let in_b = units.iter().zip(&*homes).filter(|(_, h)| **h == Home::B).map(|(u, _)| u.slot_bytes).sum::<u64>();
    let needed = in_b + staging as u64 * slot.sum() + limits.reserved;
    if needed > limits.ram {
        return Err(PlanError::TiersTooLarge { a, b, c, workspace: 0, needed, ram: limits.ram });
    }
    Ok(Slots { device: n, staging, caches: Err(None), on_device: Vec::new() })
}

/// The home of each block: interleaved over the depth in proportion, or one tier after the other.
fn deal(t: Tiers, stacked: bool) -> Vec<Home> {
    let counts = [(Home::A, t.a), (Home::B, t.b), (Home::C, t.c)];
    if stacked {
        return counts.iter().flat_map(|&(h, n)| std::iter::repeat_n(h, n)).collect();
    }
    let blocks = t.a + t.b + t.c;
    let mut dealt = [0; 3];
    let mut homes = Vec::with_capacity(blocks);
    for i in 1..=blocks {
        // The tier that is furthest behind its share of the first `i` blocks.
        let behind = |k: usize| (i * counts[k].1) as i64 - (dealt[k] * blocks) as i64;
        let k = (0..3).filter(|&k| dealt[k] < counts[k].1).max_by_key(|&k| (behind(k), 2 - k)).unwrap_or(0);
        dealt[k] += 1;
        homes.push(counts[k].0);
    }
    homes
}

fn finish(units: &[UnitSize], (limits, vram): (&Limits, u64), homes: Vec<Home>, slots: Slots) -> Plan {
    let of = |home: Home| units.iter().zip(&homes).filter(move |(_, h)| **h == home).map(|(u, _)| u.slot_bytes);
    let streamed = units.iter().zip(&homes).filter(|(_, h)| **h != Home::A).map(|(u, h)| (u, u.frame_bytes(*h)));
    let on_device = slot_sizes(streamed.clone());
    let device_slots = match streamed.max_by_key(|(_, bytes)| *bytes) {
        _ if on_device.slot == 0 => 0,
        Some((largest, _)) if largest.routed() => slots.device.max((ahead(limits, vram) / on_device.sum()) as usize),
        _ => slots.device,
    };
    // The largest unit that is read may have found a home in RAM since room was left for slots.
    let (_, sizes) = staging(units, limits, &homes, homes.contains(&Home::C));
    let n_slots = slots.staging;
    let (caches, too_few_slots) = slots.caches.map_or_else(|few| (Vec::new(), few), |caches| (caches, None));
    let cached: u64 = caches.iter().map(Cache::bytes).sum();
    let mut ram_bytes = of(Home::B).sum::<u64>() + n_slots as u64 * sizes.sum() + limits.reserved + cached;
    let fits = |e: &u64| !homes.contains(&Home::C) && ram_bytes + e <= limits.ram;
    let embedding = limits.embedding.filter(fits);
    ram_bytes += embedding.unwrap_or(0);
    let kept: u64 = slots.on_device.iter().map(Cache::bytes).sum();
    let resident = of(Home::A).sum::<u64>();
    let resident = if kept > 0 { resident.next_multiple_of(SLOT_ALIGN) + kept } else { resident };
    let vram_bytes = resident + device_slots as u64 * on_device.sum();
    Plan {
        n_slots,
        slot_bytes: sizes.slot,
        attention_slot_bytes: sizes.attention,
        embedding_resident: embedding.is_some(),
        ram_bytes,
        device_slots,
        device_slot_bytes: on_device.slot,
        device_attention_slot_bytes: on_device.attention,
        vram_bytes,
        homes,
        caches,
        device_caches: slots.on_device,
        too_few_slots,
    }
}

#[cfg(test)]
mod tests {
    use super::super::place::{self, place};
    use super::*;

    fn model(blocks: usize, slices: usize) -> Vec<UnitSize> {
        place::tests::model(blocks, 100, slices, 50)
    }

    fn limits(vram: u64, ram: u64) -> Limits {
        Limits { vram: Some(vram), ..place::tests::limits(ram) }
    }

    fn count(p: &Plan, home: Home) -> usize {
        p.homes.iter().filter(|&&h| h == home).count()
    }

    #[test]
    fn a_model_that_fits_vram_has_no_slots_there() {
        let p = place(&model(4, 2), &limits(500, 1000)).unwrap();
        assert_eq!((p.device_slots, p.vram_bytes, p.n_slots, p.ram_bytes), (0, 500, 2, 200));
        assert!(p.homes.iter().all(|&h| h == Home::A));
    }

    #[test]
    fn three_tiers_within_both_budgets() {
        let p = place(&model(30, 2), &limits(1000, 1000)).unwrap();
        // 3 slots of 100 and the head leave 600 for A; 3 staging slots leave 700 for B.
        assert_eq!([Home::A, Home::B, Home::C].map(|h| count(&p, h)), [8, 7, 17]);
        assert!(p.vram_bytes <= 1000 && p.ram_bytes <= 1000);
        assert!(p.homes[30..].iter().all(|&h| h == Home::A));
        let c: Vec<usize> = (0..30).filter(|&i| p.homes[i] == Home::C).collect();
        assert!(c.windows(2).all(|w| w[1] - w[0] <= 4), "{c:?}");
    }

    #[test]
    fn attention_parts_are_in_vram_first() {
        let units = place::tests::in_parts(10, 20, 80);
        // 200 of attention and three slots of 80 leave room for two feed-forward parts.
        let p = place(&units, &limits(600, 10_000)).unwrap();
        assert_eq!((p.device_slots, p.device_slot_bytes, p.device_attention_slot_bytes), (3, 80, 0));
        assert!(p.homes.chunks(2).all(|b| b[0] == Home::A));
        assert_eq!((count(&p, Home::A), p.vram_bytes), (12, 600));
        // Loading goes through slots as large as any part.
        assert_eq!((p.n_slots, p.slot_bytes), (2, 80));
        let tiers = Limits { tiers: Some(Tiers { a: 2, b: 4, c: 4 }), ..limits(10_000, 10_000) };
        let p = place(&units, &tiers).unwrap();
        assert!(p.homes.chunks(2).all(|b| b[0] == b[1]));
        assert_eq!(p.slots_on_device().collect::<Vec<_>>(), [80, 80, 80, 20, 20, 20]);
        assert_eq!((p.vram_bytes, p.slots().sum::<u64>()), (200 + 300, 300));
    }

    #[test]
    fn counts_are_dealt_over_the_depth_or_stacked() {
        let t = Tiers { a: 20, b: 30, c: 30 };
        let l = Limits { tiers: Some(t), ..limits(1 << 20, 1 << 20) };
        let p = place(&model(80, 0), &l).unwrap();
        assert_eq!([Home::A, Home::B, Home::C].map(|h| count(&p, h)), [20, 30, 30]);
        for window in p.homes.windows(8) {
            assert!([Home::A, Home::B, Home::C].iter().all(|h| window.contains(h)), "{window:?}");
        }
        let p = place(&model(80, 0), &Limits { stacked: true, ..l }).unwrap();
        assert!(p.homes[..20].iter().all(|&h| h == Home::A) && p.homes[50..].iter().all(|&h| h == Home::C));
    }

    #[test]
    fn plans_keep_to_both_budgets_whatever_the_units_sizes() {
        for seed in 0u64..400 {
            let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
            let mut random = |n: u64| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state % n
            };
            let n = 4 + random(30) as usize;
            let in_parts = random(2) == 0;
            // Some are smaller where they rest.
            let most = 1 + random(2) * 150;
            let mut part = |i, part| {
                let bytes = 50 + random(200);
                UnitSize { stored_bytes: bytes + random(most), ..UnitSize::new(bytes, Some(i), part) }
            };
            let mut units = Vec::new();
            for i in 0..n {
                units.extend(in_parts.then(|| part(i, UnitPart::Attention)));
                units.push(part(i, UnitPart::FeedForward));
            }
            units.extend((0..3).map(|_| UnitSize::new(20 + random(200), None, UnitPart::Head)));
            let l = Limits { storage: random(4) > 0, ..limits(random(5000), random(5000)) };
            if let Ok(p) = place(&units, &l) {
                assert!(p.ram_bytes <= l.ram && Some(p.vram_bytes) <= l.vram, "seed {seed}: {p:?}");
                for (u, home) in units.iter().zip(&p.homes) {
                    let held = |n: usize, slot: u64, attention: u64| {
                        let is_kept = u.part == UnitPart::Attention && attention > 0;
                        n > 1 && u.frame_bytes(*home) <= if is_kept { attention } else { slot }
                    };
                    let staged = held(p.n_slots, p.slot_bytes, p.attention_slot_bytes);
                    let loaded = p.n_slots > 1 && u.slot_bytes <= p.slot_bytes;
                    let copied = held(p.device_slots, p.device_slot_bytes, p.device_attention_slot_bytes);
                    let held = match home {
                        Home::A => loaded,
                        Home::B => copied,
                        Home::C => staged && copied,
                    };
                    assert!(held, "seed {seed}: {u:?} {home:?} {p:?}");
                }
                assert!(l.storage || !p.homes.contains(&Home::C), "seed {seed}");
            }
        }
    }

    #[test]
    fn a_head_that_fits_nowhere_is_not_read_where_storage_is_forbidden() {
        let t = Tiers { a: 2, b: 2, c: 0 };
        let l = Limits { tiers: Some(t), storage: false, ..limits(500, 400) };
        assert!(matches!(place(&model(4, 4), &l), Err(PlanError::NoStorage { .. })), "{:?}", place(&model(4, 4), &l));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_numbers() {
        let l = limits(150, 10_000);
        assert!(matches!(place(&model(9, 0), &l), Err(PlanError::DeviceSlotsTooLarge { slot_bytes: 100, .. })));
        let t = Limits { tiers: Some(Tiers { a: 9, b: 1, c: 0 }), ..limits(1000, 10_000) };
        assert!(matches!(place(&model(10, 0), &t), Err(PlanError::TiersTooLargeForVram { .. })));
        let t = Limits { tiers: Some(Tiers { a: 1, b: 9, c: 0 }), ..limits(1000, 500) };
        assert!(matches!(place(&model(10, 0), &t), Err(PlanError::TiersTooLarge { .. })));
        let t = Limits { tiers: Some(Tiers { a: 1, b: 1, c: 1 }), ..limits(1000, 500) };
        assert!(matches!(place(&model(10, 0), &t), Err(PlanError::TiersMiscounted { .. })));
        let n = Limits { storage: false, ..limits(500, 500) };
        assert!(matches!(place(&model(30, 0), &n), Err(PlanError::NoStorage { .. })));
    }
}

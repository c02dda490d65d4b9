//! Which tier each unit lives in.
//!
//! Units that do not stay resident stream through N buffers: each is a slot as large as the largest streamed
//! unit, and where attention parts stream too, a smaller one for those, so that neither kind waits for the other's
//! slots. What the budget leaves next to them holds resident units, spread over the depth of the model in proportion to
//! bytes, so that every link has work all along a pass.

use super::device;
use super::homes::{
    BUFFERS_DEFAULT, BUFFERS_MIN, Cache, Home, Limits, Plan, PlanError, Tiers, TooFewSlots, UnitPart, UnitSize, caches,
    slot_sizes, spread,
};

/// Places the units: homes B and C where weights are computed from RAM, A too where they are computed
/// from VRAM.
///
/// # Errors
/// Where nothing keeps to the limits, with what would.
pub fn place(units: &[UnitSize], limits: &Limits) -> Result<Plan, PlanError> {
    let room = Limits { ram: limits.ram.saturating_sub(limits.workspace), ..*limits };
    let placed = match (limits.vram, limits.tiers) {
        (Some(vram), _) => device::place(units, &room, vram),
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

/// Number and size of the buffers that hold any of `streamed`.
fn slots<'a>(streamed: impl Iterator<Item = &'a UnitSize>, limits: &Limits) -> Result<(usize, u64), PlanError> {
    let buffer = slot_sizes(streamed.map(|u| (u, u.stored_bytes))).sum();
    let needed = |n: usize| limits.reserved.saturating_add((n as u64).saturating_mul(buffer));
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

    pub fn limits(ram: u64) -> Limits {
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

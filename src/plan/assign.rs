//! Who computes what rests in RAM beside a device: processors where it lies, or the device, to which a link brings it.

use super::machine::{Fewer, Machine, RamSide, Rate};

/// What the division follows from: rates while both work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SiteRates {
    /// Bytes a second of weights that processors compute.
    pub ram: f64,
    /// Bytes a second of the link to the device.
    pub link: f64,
    /// Bytes a second of weights that the device computes from its own memory.
    pub device: f64,
}

/// Seconds from the end of the device's work to the beginning of the processors', and back, by which work is divided: measured while
/// copies fill the link. A constant, so that a division does not change with each measurement.
const HAND_OVER_S: f64 = 50e-6;
/// The same where the link rests, and a pass is recorded.
const HAND_OVER_IDLE_S: f64 = 16e-6;
/// Share of what plain reads by as many threads bring beside a full link at which one-token products of Q8_0 read weights: 1.02 to 1.07 with 8,
/// 12 and 15 threads on an H200's machine, 0.93 to 0.99 on those of three calls before (16 processors of a Xeon).
const PRODUCTS: f64 = 1.0;
/// Bytes of RAM's rate that a byte of the link takes from processors, where it is not measured: all, as of memory that processors fill
/// alone. Of one server's memory it was seen to take a seventh, of another's all.
const CONTENTION: f64 = 1.0;
/// Share of its rate that a link keeps beside processors that read, where it is not measured, and of that beside products (48 of 51.7, 48.5 of
/// 53, 50.5 of 52.8 GB/s beside 15, 12 and 8 threads, copies of 187 to 251 MiB).
const LINK_BESIDE: f64 = 0.95;
const LINK_BESIDE_PRODUCTS: f64 = 0.94;
/// Share of a device's memory rate at which one-token products read weights.
const PRODUCTS_ON_DEVICE: f64 = 0.67;

impl SiteRates {
    /// Of RAM that `all` threads read, for `threads` of them, and a device with this memory and link.
    pub fn of(
        ram: &RamSide,
        (all, threads): (usize, usize),
        vram: &Rate,
        link: &Rate,
        link_beside: Option<&Rate>,
    ) -> SiteRates {
        let (read, link) = (ram.read.bytes_per_s(), link.bytes_per_s());
        let estimate = (read - CONTENTION * link).max(read / 4.0);
        let beside = ram.beside.as_ref().map_or(estimate, Rate::bytes_per_s);
        let link_beside = link_beside.map_or(link * LINK_BESIDE, Rate::bytes_per_s);
        // What is measured is measured by all but one, which drives the link.
        let most = all.saturating_sub(1).max(1);
        let (beside, link) = match between(&ram.fewer, (most, beside, link_beside), threads) {
            Some(measured) => measured,
            None => (beside * share(threads.min(most) as f64 / most as f64), link_beside),
        };
        SiteRates {
            ram: beside * PRODUCTS,
            link: link * LINK_BESIDE_PRODUCTS,
            device: vram.bytes_per_s() * PRODUCTS_ON_DEVICE,
        }
    }

    /// In steps of a twentieth, so that a plan does not change with each measurement.
    pub fn rounded(self) -> SiteRates {
        let round = |rate: f64| 1.05f64.powf((rate.max(1.0).ln() / 1.05f64.ln()).round());
        SiteRates { ram: round(self.ram), link: round(self.link), device: round(self.device) }
    }

    /// Seconds of a pass of one row in which processors compute `computed` bytes in `parts` parts and the link brings
    /// `carried`; the device has `here` bytes of its own. The sites work in turn, the link beside them.
    pub fn pass_s(&self, computed: u64, parts: usize, carried: u64, here: u64) -> f64 {
        let on_device = (here + carried) as f64 / self.device;
        let chain = computed as f64 / self.ram + on_device + parts as f64 * hand_over_s(carried as f64);
        chain.max(carried as f64 / self.link)
    }
}

/// Of what all threads read, what a part of them does: they read as fast as each can until memory has no more to give. The first of
/// them reads twice its share, as six of 15 on an H100's machine read 0.64 of what all do beside its link (docs/benchmarks.md).
fn share(part: f64) -> f64 {
    1.0 - (1.0 - part).powi(2)
}

/// Rates of RAM and of the link where so many threads read, between those that were measured of fewer threads and of the `most`;
/// `None` where fewer were not measured.
fn between(fewer: &[Fewer], most: (usize, f64, f64), threads: usize) -> Option<(f64, f64)> {
    let mut all: Vec<(usize, f64, f64)> =
        fewer.iter().map(|f| (f.threads, f.read.bytes_per_s(), f.link.bytes_per_s())).collect();
    all.sort_by_key(|m| m.0);
    let first = *all.first()?;
    all.push(most);
    // One thread reads its part of what the first count did.
    let mut below = (0, 0.0, first.2);
    for at in all {
        if threads <= at.0 {
            let part = (threads - below.0) as f64 / (at.0 - below.0).max(1) as f64;
            let mid = |a: f64, b: f64| a + (b - a) * part;
            return Some((mid(below.1, at.1), mid(below.2, at.2)));
        }
        below = at;
    }
    Some((most.1, most.2))
}

/// Seconds of a hand-over where so many bytes are carried.
fn hand_over_s(carried: f64) -> f64 {
    if carried > 0.0 { HAND_OVER_S } else { HAND_OVER_IDLE_S }
}

impl Machine {
    /// The rates by which work is divided between the GPU and `threads` processors; `None` without a GPU.
    pub fn site_rates(&self, threads: usize) -> Option<SiteRates> {
        let gpu = self.gpu.as_ref()?;
        Some(SiteRates::of(&self.ram, (self.cpu.threads, threads), &gpu.memory, &gpu.link, gpu.link_beside.as_ref()))
    }
}

/// Which of the parts of these sizes, in the order of a pass, processors compute, so that a pass of one row is shortest;
/// `carried` bytes are brought in any case, and `here` bytes are in the device's memory. They lie spread over the depth, so that the link
/// has time for the others.
pub fn assign(sizes: &[u64], carried: u64, here: u64, rates: &SiteRates) -> Vec<bool> {
    let n = sizes.len();
    let divided = |k: usize| -> Vec<bool> { (0..n).map(|i| (i + 1) * k / n > i * k / n).collect() };
    let seconds = |k: usize| {
        let computed: u64 = sizes.iter().zip(divided(k)).filter(|(_, computed)| *computed).map(|(s, _)| s).sum();
        let all: u64 = sizes.iter().sum();
        rates.pass_s(computed, k, carried + all - computed, here)
    };
    let best = (0..=n).min_by(|&a, &b| seconds(a).total_cmp(&seconds(b)));
    divided(best.unwrap_or(0))
}

/// Which of `steps` parts of every feed-forward part processors are to have, where all `n` of them are cut alike, so that a pass of one
/// row is shortest, and its seconds; `None` if there is no part to cut. The parts have `all` bytes, for `here` of which there is room in the
/// device's memory; what else is the device's is brought to it. `others` bytes lie there in any case.
pub fn best_slice(others: u64, (all, here): (u64, u64), n: usize, steps: u32, rates: &SiteRates) -> Option<(u32, f64)> {
    let seconds = |part: u32| {
        let computed = all as f64 * f64::from(part) / f64::from(steps);
        let own = all as f64 - computed;
        let carried = (own - here as f64).max(0.0);
        // Both sites work on each part at once, and the link beside them.
        let parts = (own / rates.device).max(computed / rates.ram + n as f64 * hand_over_s(carried));
        (others as f64 / rates.device + parts).max(carried / rates.link)
    };
    let all_of_them = (1..steps).map(|part| (part, seconds(part)));
    all_of_them.filter(|_| n > 0).min_by(|a, b| a.1.total_cmp(&b.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1 << 20;

    #[test]
    fn the_faster_way_takes_more() {
        let sizes = vec![251 * MB; 52];
        let share = |ram: f64, link: f64| {
            let units = assign(&sizes, 0, 6 << 30, &SiteRates { ram, link, device: 2e12 });
            units.iter().filter(|u| **u).count()
        };
        assert_eq!(share(130e9, 1.0), 52);
        assert_eq!(share(1.0, 50e9), 0);
        let both = share(130e9, 50e9);
        assert!((30..52).contains(&both), "{both}");
        assert!(share(60e9, 50e9) < both);
    }

    /// Where a model is a little larger than a desktop's VRAM, cut parts win the time in which sites would work in turn; where the device
    /// is as fast as a server's there is none.
    #[test]
    fn cut_parts_win_what_sites_would_wait_for_each_other() {
        let (others, all, here) = (3u64 << 30, 15u64 << 30, 10u64 << 30);
        let gain = |device: f64| {
            let rates = SiteRates { ram: 45e9, link: 25e9, device };
            let in_ram = vec![(all - here) / 21; 21];
            let divided = assign(&in_ram, 0, others + here, &rates);
            let k = divided.iter().filter(|c| **c).count();
            let computed = k as u64 * in_ram[0];
            let whole = rates.pass_s(computed, k, all - here - computed, others + here);
            let (part, cut) = best_slice(others, (all, here), 64, 256, &rates).unwrap();
            assert!((30..140).contains(&part), "{part}");
            whole / cut
        };
        assert!((1.1..1.4).contains(&gain(300e9)), "{}", gain(300e9));
        assert!(gain(2.5e12) < 1.05, "{}", gain(2.5e12));
        assert_eq!(best_slice(1, (0, 0), 0, 256, &SiteRates { ram: 1.0, link: 1.0, device: 1.0 }), None);
    }

    #[test]
    fn parts_lie_spread() {
        let units = assign(&[100 * MB; 40], 0, 0, &SiteRates { ram: 50e9, link: 50e9, device: 1e12 });
        let k = units.iter().filter(|u| **u).count();
        for half in units.chunks(20) {
            let here = half.iter().filter(|u| **u).count();
            assert!(here.abs_diff(k / 2) <= 1, "{here} of {k}");
        }
    }

    #[test]
    fn what_is_carried_in_any_case_leaves_the_rest_to_processors() {
        let rates = SiteRates { ram: 100e9, link: 50e9, device: 1e12 };
        let count = |carried| assign(&[100 * MB; 20], carried, 0, &rates).iter().filter(|u| **u).count();
        assert!(count(3 << 30) > count(0));
        assert_eq!(count(100 << 30), 20);
    }

    fn ram(fewer: &[(usize, f64, f64)]) -> RamSide {
        let rate = |gb: f64| Rate::measured(gb * 1e9, "a test");
        let fewer = fewer.iter().map(|&(threads, read, link)| Fewer { threads, read: rate(read), link: rate(link) });
        let (read, beside) = (rate(140.0), Some(rate(90.0)));
        RamSide { size: 1 << 37, available: None, budget: None, read, beside, fewer: fewer.collect() }
    }

    #[test]
    fn fewer_threads_have_what_was_measured_of_as_many() {
        let (vram, link, beside) = (Rate::guess(2e12, ""), Rate::guess(55e9, ""), Rate::guess(50e9, ""));
        let of = |ram: &RamSide, threads| SiteRates::of(ram, (16, threads), &vram, &link, Some(&beside));
        let measured = ram(&[(8, 60.0, 53.0), (4, 36.0, 54.0)]);
        for (threads, read, link) in
            [(15, 90.0, 50.0), (16, 90.0, 50.0), (8, 60.0, 53.0), (6, 48.0, 53.5), (2, 18.0, 54.0)]
        {
            let r = of(&measured, threads);
            assert!((r.ram / (read * 1e9 * PRODUCTS) - 1.0).abs() < 1e-9, "{threads}: {r:?}");
            assert!((r.link / (link * 1e9 * LINK_BESIDE_PRODUCTS) - 1.0).abs() < 1e-9, "{threads}: {r:?}");
        }
        // Where that was not measured, each more adds less.
        let by = |threads| of(&ram(&[]), threads).ram;
        assert!(by(1) < by(4) && by(4) > 4.0 / 15.0 * by(15) && by(8) > 8.0 / 15.0 * by(15));
        assert!(by(12) < by(15) && by(15) == by(16) && by(8) - by(4) > by(12) - by(8));
    }

    #[test]
    fn rates_are_rounded() {
        let a = SiteRates { ram: 100e9, link: 50e9, device: 1e12 }.rounded();
        let b = SiteRates { ram: 101e9, link: 50.2e9, device: 1e12 }.rounded();
        assert_eq!(a, b);
        assert!((a.ram / 100e9 - 1.0).abs() < 0.05);
    }
}

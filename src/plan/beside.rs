//! Processors beside a GPU: which part of a plan's units they compute while tokens are generated, and what that takes.

use super::{UnitPart, UnitWork};
use crate::backend::Share;

/// What processors beside a GPU compute, and how long it takes them. Empty lists stand for nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Beside {
    /// By unit, whether they compute it where it rests in RAM or in its frame of a cache; of divided experts, those that rest in RAM.
    pub units: Vec<bool>,
    /// By unit, whether it is one of a layer whose experts in RAM are divided: of a row's choices there processors compute the first
    /// ones, and the link brings the others.
    pub divided: Vec<bool>,
    /// How many choices are theirs in those layers.
    pub share: Option<Share>,
    /// By unit, seconds of computing on processors.
    pub unit_s: Vec<f64>,
    /// Seconds from the end of the GPU's work to the beginning of theirs, and back: with an idle link, and while copies fill it.
    pub hand_over_s: [f64; 2],
    /// Seconds that a layer's experts take them in addition to `unit_s`.
    pub experts_s: f64,
}

impl Beside {
    /// Whether processors compute `unit` if it is used, all of it or in part.
    pub fn computes(&self, unit: usize) -> bool {
        self.units.get(unit) == Some(&true)
    }

    /// Whether `unit` is an expert of a layer that is divided.
    pub fn divides(&self, unit: usize) -> bool {
        self.divided.get(unit) == Some(&true)
    }

    /// How many of so many chosen experts in RAM are theirs, `first` being one of the layer.
    pub fn of_choices(&self, first: usize, in_ram: usize) -> usize {
        match self.share.filter(|_| self.divides(first)) {
            Some(share) => share.of(in_ram),
            None => in_ram,
        }
    }

    /// By unit, the part of its uses that they compute: 0, 1, or between where experts are divided, as expected where each expert
    /// of a layer is as likely.
    pub fn parts(&self, units: &[UnitWork]) -> Vec<f64> {
        let mut parts: Vec<f64> = (0..units.len()).map(|u| if self.computes(u) { 1.0 } else { 0.0 }).collect();
        let mut first = 0;
        for layer in units.chunk_by(|a, b| a.size.block == b.size.block && a.size.routed() == b.size.routed()) {
            let all = first..first + layer.len();
            first = all.end;
            if let Some(share) = self.share.filter(|_| self.divides(all.start)) {
                let in_ram = all.clone().filter(|u| self.computes(*u)).count();
                let used = (layer[0].share * layer.len() as f64).round() as usize;
                let part = expected(share, layer.len(), in_ram, used);
                all.filter(|u| self.computes(*u)).for_each(|u| parts[u] = part);
            }
        }
        parts
    }

    /// Least seconds of the units of a one-token pass where the GPU's take `unit_s`: sites compute in turn, except that processors
    /// compute experts while the GPU computes others of their layer, and their slice of a part while it computes its own.
    pub fn chain_s(&self, units: &[UnitWork], unit_s: &[f64]) -> f64 {
        let parts = self.parts(units);
        let (mut chain, mut first) = (0.0, 0);
        let at_once = |a: &UnitWork, b: &UnitWork| a.size.routed() && b.size.routed() || a.size.part == UnitPart::Slice;
        for run in units.chunk_by(|a, b| at_once(a, b) && a.size.block == b.size.block) {
            let all = first..first + run.len();
            first = all.end;
            let of_host = |u: usize| if self.computes(u) { self.unit_s[u] * parts[u] } else { 0.0 };
            let host: f64 = all.clone().map(|u| units[u].share * of_host(u)).sum();
            let gpu: f64 = all.clone().map(|u| units[u].share * unit_s[u] * (1.0 - parts[u])).sum();
            let in_ram = all.clone().filter(|u| self.computes(*u)).count();
            let used = (run[0].share * run.len() as f64).round() as usize;
            let handed = 1.0 - chances(run.len(), in_ram, used)[0];
            let host = host + if run[0].size.routed() { handed * self.experts_s } else { 0.0 };
            let handed = handed * self.hand_over_s[0];
            // The GPU computes its own columns while a slice is handed over, too.
            chain += if run[0].size.part == UnitPart::Slice { gpu.max(host + handed) } else { host.max(gpu) + handed };
        }
        chain
    }
}

/// The part of a row's choices in RAM that `share` gives to processors, where it chooses `used` of `all` experts of which `in_ram`
/// rest there: the choices that are theirs over those in RAM, of all ways to choose.
fn expected(share: Share, all: usize, in_ram: usize, used: usize) -> f64 {
    let chances = chances(all, in_ram, used);
    let mean = |of: &dyn Fn(usize) -> usize| chances.iter().enumerate().map(|(k, p)| of(k) as f64 * p).sum::<f64>();
    let here = mean(&|k| k);
    if here > 0.0 { mean(&|k| share.of(k)) / here } else { 0.0 }
}

/// By number, the chance that as many of `used` that are chosen of `all` are among `in_ram` of them.
pub(super) fn chances(all: usize, in_ram: usize, used: usize) -> Vec<f64> {
    let mut chances = vec![1.0];
    for chosen in 0..used.min(all) {
        let left = (all - chosen) as f64;
        let mut next = vec![0.0; chances.len() + 1];
        for (k, p) in chances.iter().enumerate() {
            let hit = in_ram.saturating_sub(k) as f64 / left;
            next[k + 1] += p * hit;
            next[k] += p * (1.0 - hit);
        }
        chances = next;
    }
    chances
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_fall_into_ram_as_often_as_experts_lie_there() {
        let c = chances(128, 107, 8);
        assert!((c.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        let mean: f64 = c.iter().enumerate().map(|(k, p)| k as f64 * p).sum();
        assert!((mean - 8.0 * 107.0 / 128.0).abs() < 1e-9, "{mean}");
        assert_eq!(chances(4, 4, 2), [0.0, 0.0, 1.0]);
        assert_eq!(chances(4, 0, 2)[0], 1.0);
    }

    /// Choices are whole, so that what is expected is not the share itself.
    #[test]
    fn the_share_is_rounded_for_each_row() {
        assert_eq!(expected(Share(256), 128, 64, 8), 1.0);
        assert_eq!(expected(Share(0), 128, 64, 8), 0.0);
        // One of one, one of two.
        assert_eq!(expected(Share(128), 4, 4, 1), 1.0);
        assert_eq!(expected(Share(128), 4, 4, 2), 0.5);
        // Half of the rows have one choice in RAM (theirs), a sixth two (one theirs): (4/6 + 1/6) of 1.
        assert!((expected(Share(128), 4, 2, 2) - 5.0 / 6.0).abs() < 1e-12);
    }
}

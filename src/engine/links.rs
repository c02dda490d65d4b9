//! What the links carried, and the roofline they allow.

use super::ExpertUses;
use crate::flow::Latencies;
use crate::plan::{Rates, Traffic, roofline};

/// Bytes, times and rates of a session's links. Rates are bytes per second.
#[derive(Clone, Copy, Debug, Default)]
pub struct Links {
    /// Bytes read from storage while passes ran.
    pub nvme_bytes: u64,
    /// Seconds in which at least one read was in flight, of those.
    pub nvme_busy_s: f64,
    /// Seconds that whoever takes units from storage (computing on processors, copies to a device) waited
    /// for their reads.
    pub storage_wait_s: f64,
    /// Seconds that computing on a device waited for copies to be started.
    pub link_wait_s: f64,
    /// Seconds of passes.
    pub pass_s: f64,
    /// Passes.
    pub passes: u64,
    /// From the moment at which a read could start, its thread asleep or waiting, to its start.
    pub nvme_starts: Latencies,
    /// The same for copies to a device.
    pub gpu_starts: Latencies,
    /// Bytes copied to the device in those passes.
    pub gpu_bytes: u64,
    /// Of those, experts that were asked for once they were chosen; these copies are not timed.
    pub gpu_fetched_bytes: u64,
    /// Seconds in which the link to the device was busy, of those.
    pub gpu_busy_s: f64,
    /// Whether these seconds could be measured.
    pub gpu_timed: bool,
    /// Whether weights are computed from a device's own memory.
    pub on_device: bool,
    /// Seconds in which processors next to a device computed, of those, and in which they waited for its rows.
    pub beside_busy_s: f64,
    /// See [`Links::beside_busy_s`].
    pub beside_wait_s: f64,
    /// Bytes of weights that they computed.
    pub beside_bytes: u64,
    /// Bytes of weights that were read from RAM in those passes, by computing or copying.
    pub ram_bytes: u64,
    /// Bytes of weights a pass reads in all tiers.
    pub bytes_per_pass: u64,
    /// Of those, over the link to the device.
    pub gpu_bytes_per_pass: u64,
    /// Of all, computed by processors next to a device, from RAM.
    pub beside_bytes_per_pass: u64,
    /// Whether reads from storage are copies by processors ([`crate::storage::Reader::copies`]).
    pub storage_copies: bool,
    /// Of all, from storage.
    pub nvme_bytes_per_pass: u64,
    /// Measured ceiling of storage reads.
    pub nvme_ceiling: Option<f64>,
    /// Measured ceiling of copies to the device.
    pub gpu_ceiling: Option<f64>,
    /// Measured ceiling of reads of the device's own memory.
    pub vram_ceiling: Option<f64>,
    /// The device's multiprocessors, which bind some types of weights; 0 before the ceilings are measured.
    pub multiprocessors: usize,
    /// Measured ceiling of memory reads.
    pub ram_ceiling: Option<f64>,
    /// Measured ceiling of memory where processors and the link to the device read it at once, of both together.
    pub ram_and_link_ceiling: Option<f64>,
    /// Measured seconds of a decode pass with transfers disabled.
    pub compute_s: Option<f64>,
    /// Least seconds of one in which two sites compute in turn, by the ceilings and the costs of a GPU's kernels and hand-overs;
    /// counted where that was not measured.
    pub chain_s: Option<f64>,
    /// Experts that single tokens used.
    pub experts: ExpertUses,
    /// Whether only passes of one token were counted.
    pub measured_one_token: bool,
    /// Where the ceilings come from, in words.
    pub ceilings_from: Option<&'static str>,
}

/// Stall time by cause, in seconds of the passes. `None` if not measured or not applicable.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Stalls {
    /// Whoever takes units from storage (computing on processors, copies to a device) waited for reads.
    pub storage_s: Option<f64>,
    /// Computing on a device waited for copies to be started.
    pub link_s: Option<f64>,
    /// The link next to computing stood still with all slots full: it waited for computing.
    pub compute_s: Option<f64>,
}

impl Links {
    /// GB/s of storage over the passes' time.
    pub fn nvme_gb_per_s(&self) -> Option<f64> {
        (self.nvme_bytes > 0 && self.pass_s > 0.0).then(|| self.nvme_bytes as f64 / self.pass_s / 1e9)
    }

    /// Share of the passes' time in which a read was in flight.
    pub fn nvme_busy(&self) -> Option<f64> {
        (self.nvme_bytes > 0 && self.pass_s > 0.0).then(|| (self.nvme_busy_s / self.pass_s).min(1.0))
    }

    /// GB/s of the link to the device over the passes' time.
    pub fn gpu_gb_per_s(&self) -> Option<f64> {
        (self.gpu_bytes > 0 && self.pass_s > 0.0).then(|| self.gpu_bytes as f64 / self.pass_s / 1e9)
    }

    /// Share of the passes' time in which the link to the device was busy.
    pub fn gpu_busy(&self) -> Option<f64> {
        let known = self.gpu_bytes > 0 && self.gpu_timed && self.gpu_fetched_bytes == 0 && self.pass_s > 0.0;
        known.then(|| (self.gpu_busy_s / self.pass_s).min(1.0))
    }

    /// Stall time by cause.
    pub fn stalls(&self) -> Stalls {
        let streams = self.nvme_bytes > 0;
        let full = match (self.gpu_bytes > 0, streams) {
            (true, _) if !self.gpu_timed || self.gpu_fetched_bytes > 0 => None,
            (true, _) => Some(self.pass_s - self.gpu_busy_s - self.storage_wait_s),
            (false, true) if !self.on_device => Some(self.pass_s - self.nvme_busy_s),
            (false, _) => None,
        };
        Stalls {
            storage_s: streams.then_some(self.storage_wait_s),
            link_s: (self.gpu_bytes > self.gpu_fetched_bytes).then_some(self.link_wait_s),
            compute_s: full.map(|s| s.max(0.0)),
        }
    }

    /// GB/s of weights that processors next to a device computed, over the passes' time.
    pub fn beside_gb_per_s(&self) -> Option<f64> {
        (self.beside_bytes > 0 && self.pass_s > 0.0).then(|| self.beside_bytes as f64 / self.pass_s / 1e9)
    }

    /// Shares of the passes' time in which those computed, and in which they waited for the device's rows.
    pub fn beside_busy(&self) -> Option<(f64, f64)> {
        let share = |s: f64| (s / self.pass_s).min(1.0);
        (self.beside_bytes > 0 && self.pass_s > 0.0).then(|| (share(self.beside_busy_s), share(self.beside_wait_s)))
    }

    /// GB/s of weights through memory.
    pub fn ram_gb_per_s(&self) -> Option<f64> {
        (self.pass_s > 0.0).then(|| self.ram_bytes as f64 / self.pass_s / 1e9)
    }

    /// Bytes of a one-token pass.
    pub fn traffic(&self) -> Traffic {
        Traffic {
            all: self.bytes_per_pass as f64,
            over_link: self.gpu_bytes_per_pass as f64,
            from_storage: self.nvme_bytes_per_pass as f64,
            beside: self.beside_bytes_per_pass as f64,
            on_device: self.on_device,
        }
    }

    /// The ceilings that were measured.
    pub fn rates(&self) -> Rates {
        Rates {
            vram: self.vram_ceiling,
            gpu: self.gpu_ceiling,
            ram: self.ram_ceiling,
            ram_and_link: self.ram_and_link_ceiling,
            nvme: self.nvme_ceiling,
            copies: self.storage_copies,
        }
    }

    /// Tokens per second of one-token passes that the measured ceilings and the time of computing allow,
    /// and what binds (see [`crate::plan::roofline`]).
    pub fn roofline(&self) -> Option<(f64, &'static str)> {
        roofline(&self.traffic(), &self.rates(), self.compute_s.or(self.chain_s))
            .map(|r| (1.0 / r.seconds, r.bound_by.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_told_by_its_cause() {
        let l = Links { pass_s: 10.0, nvme_bytes: 1, nvme_busy_s: 7.0, storage_wait_s: 4.0, ..Links::default() };
        assert_eq!(l.stalls(), Stalls { storage_s: Some(4.0), link_s: None, compute_s: Some(3.0) });
        let l = Links { on_device: true, gpu_bytes: 1, gpu_busy_s: 5.0, gpu_timed: true, link_wait_s: 2.0, ..l };
        assert_eq!(l.stalls(), Stalls { storage_s: Some(4.0), link_s: Some(2.0), compute_s: Some(1.0) });
        assert_eq!(Links { gpu_timed: false, ..l }.stalls().compute_s, None);
        assert_eq!(Links::default().stalls(), Stalls::default());
    }

    #[test]
    fn the_slowest_link_binds() {
        let l = Links {
            bytes_per_pass: 10,
            nvme_bytes_per_pass: 4,
            nvme_ceiling: Some(2.0),
            ram_ceiling: Some(14.0),
            ..Links::default()
        };
        assert_eq!(l.roofline(), Some((0.5, "nvme")));
        let l = Links { ram_ceiling: Some(1.0), ..l };
        assert_eq!(l.roofline(), Some((1.0 / 14.0, "ram")));
        // Guards against a roofline that computing can never bind.
        assert_eq!(Links { compute_s: Some(20.0), ..l }.roofline(), Some((0.05, "flops")));
        assert_eq!(Links { nvme_ceiling: None, ..l }.roofline(), None);
        assert_eq!(Links::default().roofline(), None);
        let l = Links {
            on_device: true,
            gpu_bytes_per_pass: 6,
            vram_ceiling: Some(100.0),
            gpu_ceiling: Some(1.5),
            ram_ceiling: Some(14.0),
            ..l
        };
        assert_eq!(l.roofline(), Some((0.25, "gpu")));
        // Two sites work in turn: a chain, counted where it was not measured.
        let l = Links { beside_bytes_per_pass: 2, chain_s: Some(8.0), ..l };
        assert_eq!(l.roofline(), Some((0.125, "chain")));
        assert_eq!(Links { compute_s: Some(5.0), ..l }.roofline(), Some((0.2, "chain")));
    }
}

//! The roofline: the least time of a pass that each link allows.
//!
//! For bytes of a pass in VRAM (A), RAM (B) and on storage (C), and rates of VRAM (v), the link (g), RAM
//! (d) and storage (n): `T = max((A + B + C) / v, (B + C) / g, (B + 2C) / d, C / n, compute)`. Where reads
//! are copies by processors, `2C` is `3.35C` ([`COPY_TRANSFERS`]). Without a GPU there are no v and g.

use super::Home;
use super::work::UnitWork;

/// Times that a byte which processors copy goes through RAM: it is read there and written, and some of the
/// lines that are overwritten are read first. Fitted to seven runs on /dev/shm of an H100's machine
/// (tests/prediction.rs); 3, all lines being read first, would be a roofline that two of them exceed.
pub const COPY_TRANSFERS: f64 = 2.35;

/// What may bind a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkName {
    /// Reads of VRAM.
    Vram,
    /// Copies to the GPU.
    Gpu,
    /// RAM.
    Ram,
    /// Storage.
    Nvme,
    /// Computing.
    Flops,
    /// Sites that compute in turn, with the hand-overs between them.
    Chain,
}

impl LinkName {
    /// As reports call it.
    pub fn name(self) -> &'static str {
        match self {
            LinkName::Vram => "vram",
            LinkName::Gpu => "gpu",
            LinkName::Ram => "ram",
            LinkName::Nvme => "nvme",
            LinkName::Flops => "flops",
            LinkName::Chain => "chain",
        }
    }
}

/// Rates in bytes per second, where they are known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Reads of VRAM.
    pub vram: Option<f64>,
    /// Copies to the GPU.
    pub gpu: Option<f64>,
    /// Reads of RAM.
    pub ram: Option<f64>,
    /// Reads of RAM by processors and the link to the GPU at once, together.
    pub ram_and_link: Option<f64>,
    /// Reads of storage, of all drives together.
    pub nvme: Option<f64>,
    /// Whether those are copies by processors.
    pub copies: bool,
}

/// What a pass moves, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Weights computed: all tiers.
    pub all: f64,
    /// Of those, copied to a GPU.
    pub over_link: f64,
    /// Of all, read from storage.
    pub from_storage: f64,
    /// Of all, computed by processors beside a GPU, from RAM.
    pub beside: f64,
    /// Whether a GPU computes from its own memory.
    pub on_device: bool,
}

impl Traffic {
    /// Of a pass over `tokens` tokens with units at these homes. `beside` is, by unit, the part of its uses that processors beside a
    /// GPU compute.
    pub fn new(units: &[UnitWork], homes: &[Home], beside: Option<&[f64]>, on_device: bool, tokens: usize) -> Traffic {
        let of_host = beside.map_or(0.0, |parts| {
            units.iter().zip(parts).map(|(u, part)| u.bytes as f64 * u.used_by(tokens) * part).sum()
        });
        let bytes = |wanted: &dyn Fn(Home) -> bool| {
            let of = units.iter().zip(homes).filter(|(_, h)| wanted(**h));
            of.map(|(u, _)| u.bytes as f64 * u.used_by(tokens)).sum::<f64>()
        };
        let read = units.iter().zip(homes).filter(|(_, h)| **h == Home::C);
        let missed: f64 = read.map(|(u, _)| u.bytes as f64 * u.used_by(tokens) * u.miss).sum();
        Traffic {
            all: bytes(&|_| true),
            over_link: if on_device { bytes(&|h| h != Home::A) - of_host } else { 0.0 },
            // A sum of nothing is -0.
            from_storage: missed + 0.0,
            beside: of_host,
            on_device,
        }
    }

    /// Bytes through RAM.
    pub fn through_ram(&self, copies: bool) -> f64 {
        let computed = if self.on_device { self.over_link + self.beside } else { self.all };
        computed + if copies { COPY_TRANSFERS } else { 1.0 } * self.from_storage
    }

    /// Bytes a second that RAM gives, to processors and the link together where both take of it.
    pub fn of_ram(&self, rates: &Rates) -> Option<f64> {
        let both = rates.ram_and_link.filter(|_| self.beside > 0.0 && self.over_link > 0.0);
        both.or(rates.ram)
    }

    /// Least seconds of a pass by link, for the rates that are known.
    pub fn bounds(&self, rates: &Rates) -> Vec<(LinkName, f64)> {
        let bound = |name, bytes: f64, rate: Option<f64>| rate.map(|r| (name, bytes / r));
        [
            bound(LinkName::Nvme, self.from_storage, rates.nvme),
            bound(LinkName::Gpu, self.over_link, rates.gpu.filter(|_| self.on_device)),
            bound(LinkName::Vram, self.all - self.beside, rates.vram.filter(|_| self.on_device)),
            bound(LinkName::Ram, self.through_ram(rates.copies), self.of_ram(rates)),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// The roofline's outcome.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Roofline {
    /// Least seconds of a pass.
    pub seconds: f64,
    /// What takes them.
    pub bound_by: LinkName,
}

/// The slowest of the links and of computing (its seconds, where they are known; of sites that work in turn, those of their
/// chain). `None` where the rate of a link that is needed is not known.
pub fn roofline(traffic: &Traffic, rates: &Rates, compute_s: Option<f64>) -> Option<Roofline> {
    let unknown = |bytes: f64, rate: Option<f64>| bytes > 0.0 && rate.is_none();
    if unknown(traffic.from_storage, rates.nvme) || unknown(traffic.over_link, rates.gpu) {
        return None;
    }
    let mut bounds = traffic.bounds(rates);
    let computing = if traffic.beside > 0.0 { LinkName::Chain } else { LinkName::Flops };
    bounds.extend(compute_s.map(|s| (computing, s)));
    let (bound_by, seconds) = bounds.into_iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
    (seconds > 0.0).then_some(Roofline { seconds, bound_by })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRAFFIC: Traffic = Traffic { all: 10.0, over_link: 6.0, from_storage: 2.0, beside: 0.0, on_device: true };
    const RATES: Rates = Rates {
        vram: Some(100.0),
        gpu: Some(3.0),
        ram: Some(40.0),
        ram_and_link: None,
        nvme: Some(2.0),
        copies: false,
    };

    #[test]
    fn a_machine_worked_by_hand() {
        // 10/100 = 0.1, 6/3 = 2, (6 + 2)/40 = 0.2, 2/2 = 1.
        let r = roofline(&TRAFFIC, &RATES, Some(0.5)).unwrap();
        assert_eq!((r.seconds, r.bound_by), (2.0, LinkName::Gpu));
        let r = roofline(&TRAFFIC, &Rates { gpu: Some(60.0), ..RATES }, Some(0.5)).unwrap();
        assert_eq!((r.seconds, r.bound_by), (1.0, LinkName::Nvme));
        let r = roofline(&TRAFFIC, &Rates { gpu: Some(60.0), nvme: Some(20.0), ..RATES }, Some(0.5)).unwrap();
        assert_eq!((r.seconds, r.bound_by), (0.5, LinkName::Flops));
        // Copies by processors: (6 + 2.35 * 2)/40.
        let r = roofline(&TRAFFIC, &Rates { gpu: Some(60.0), nvme: Some(20.0), copies: true, ..RATES }, None).unwrap();
        assert_eq!((r.seconds, r.bound_by), ((6.0 + 2.0 * COPY_TRANSFERS) / 40.0, LinkName::Ram));
    }

    /// What processors beside a GPU compute crosses no link, and RAM gives more to two that ask than to one.
    #[test]
    fn two_sites_share_ram() {
        // 4/3 over the link, (4 + 6)/40 through RAM, (10 - 6)/100 from VRAM.
        let t = Traffic { over_link: 4.0, beside: 6.0, from_storage: 0.0, ..TRAFFIC };
        assert_eq!(t.bounds(&RATES).iter().find(|b| b.0 == LinkName::Ram).unwrap().1, 0.25);
        assert_eq!(t.bounds(&RATES).iter().find(|b| b.0 == LinkName::Vram).unwrap().1, 0.04);
        // Who computes in turn is a chain.
        let r = roofline(&t, &RATES, Some(5.0)).unwrap();
        assert_eq!((r.seconds, r.bound_by), (5.0, LinkName::Chain));
        let both = Rates { ram_and_link: Some(50.0), ..RATES };
        assert_eq!(t.bounds(&both).iter().find(|b| b.0 == LinkName::Ram).unwrap().1, 0.2);
    }

    #[test]
    fn without_a_device_ram_carries_everything() {
        let t = Traffic { on_device: false, over_link: 0.0, ..TRAFFIC };
        assert_eq!(t.through_ram(false), 12.0);
        assert_eq!(t.through_ram(true), 10.0 + 2.0 * COPY_TRANSFERS);
        assert!(t.bounds(&RATES).iter().all(|b| b.0 != LinkName::Vram && b.0 != LinkName::Gpu));
    }

    #[test]
    fn an_unknown_rate_that_is_needed_leaves_no_roofline() {
        assert_eq!(roofline(&TRAFFIC, &Rates { nvme: None, ..RATES }, None), None);
        assert!(roofline(&Traffic { from_storage: 0.0, ..TRAFFIC }, &Rates { nvme: None, ..RATES }, None).is_some());
        assert_eq!(roofline(&Traffic::default(), &Rates::default(), None), None);
    }

    #[test]
    fn no_faster_link_makes_a_pass_slower() {
        let base = roofline(&TRAFFIC, &RATES, None).unwrap().seconds;
        for up in [
            Rates { vram: Some(200.0), ..RATES },
            Rates { gpu: Some(5.0), ..RATES },
            Rates { ram: Some(50.0), ..RATES },
            Rates { nvme: Some(9.0), ..RATES },
        ] {
            assert!(roofline(&TRAFFIC, &up, None).unwrap().seconds <= base);
        }
    }
}

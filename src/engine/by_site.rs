//! What each link carries and each site computes of a forecast's one-token pass.

use super::Forecast;
use crate::plan::{LinkName, Site};

/// A site's part of a pass.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct SiteWork {
    /// Which.
    pub site: Site,
    /// Units that it computes, all or some of their uses.
    pub units: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of weights that it computes for a token.
    pub bytes_per_token: f64,
    /// Share of a simulated pass in which it computes.
    pub busy: Option<f64>,
    /// Share of a simulated pass in which it waits for the other site, hand-overs included.
    pub waits: Option<f64>,
}

/// A link's part of a pass.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct LinkWork {
    /// Which.
    pub link: LinkName,
    /// Bytes that it carries for a token.
    pub bytes_per_token: f64,
    /// Bytes per second that it can carry.
    pub ceiling: Option<f64>,
    /// Share of a simulated pass in which it is busy.
    pub busy: Option<f64>,
}

impl Forecast {
    /// The sites that compute: one, or a GPU and processors beside it.
    pub fn sites(&self) -> Vec<SiteWork> {
        let p = &self.prediction;
        let parts = self.based.beside.as_ref().map(|b| b.parts(&self.based.units));
        let part = |u: usize| parts.as_ref().map_or(0.0, |p| p[u]);
        let of = |wanted: &dyn Fn(f64) -> bool| {
            let of = self.based.units.iter().enumerate().filter(|(i, _)| wanted(part(*i)));
            of.fold((0, 0), |(n, bytes), (_, u)| (n + 1, bytes + u.bytes))
        };
        let share = |s: f64| p.simulated.map(|pass| (s / pass.seconds).min(1.0));
        let (units, bytes) = of(&|part| part < 1.0);
        let own = SiteWork {
            site: self.based.site,
            units,
            bytes,
            bytes_per_token: p.traffic.all - p.traffic.beside,
            busy: p.simulated.and_then(|s| share(s.compute_busy)),
            waits: p.simulated.filter(|_| parts.is_some()).and_then(|s| share(s.wait_beside)),
        };
        let beside = parts.is_some().then(|| {
            let (units, bytes) = of(&|part| part > 0.0);
            let busy = p.simulated.and_then(|s| share(s.beside_busy));
            // What is not computing is waiting: the GPU's rows come when they come.
            let waits = busy.map(|b| 1.0 - b);
            SiteWork { site: Site::Cpu, units, bytes, bytes_per_token: p.traffic.beside, busy, waits }
        });
        [own].into_iter().chain(beside).collect()
    }

    /// The links that carry something for a token.
    pub fn links(&self) -> Vec<LinkWork> {
        let p = &self.prediction;
        let (t, r) = (&p.traffic, &p.rates);
        let link = |link, bytes_per_token: f64, ceiling| LinkWork {
            link,
            bytes_per_token,
            ceiling,
            busy: p.simulated.and_then(|s| s.busy(link, r)),
        };
        let all = [
            link(LinkName::Nvme, t.from_storage, r.nvme),
            link(LinkName::Gpu, t.over_link, r.gpu),
            link(LinkName::Vram, if t.on_device { t.all - t.beside } else { 0.0 }, r.vram),
            link(LinkName::Ram, t.through_ram(r.copies), t.of_ram(r)),
        ];
        all.into_iter().filter(|l| l.bytes_per_token > 0.0).collect()
    }
}

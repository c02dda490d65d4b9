//! What the links carried, and the roofline they allow.

/// Bytes, times and rates of a session's links. Rates are bytes a second.
#[derive(Clone, Copy, Debug, Default)]
pub struct Links {
    /// Bytes read from storage while passes ran.
    pub nvme_bytes: u64,
    /// Seconds in which at least one read was in flight, of those.
    pub nvme_busy_s: f64,
    /// Seconds that the consumer waited for units.
    pub stall_s: f64,
    /// Seconds of passes.
    pub pass_s: f64,
    /// Passes.
    pub passes: u64,
    /// Bytes of weights that compute read from RAM in those passes.
    pub ram_bytes: u64,
    /// Bytes of weights a pass reads in all tiers.
    pub bytes_per_pass: u64,
    /// Of those, from storage.
    pub nvme_bytes_per_pass: u64,
    /// Measured ceiling of storage reads.
    pub nvme_ceiling: Option<f64>,
    /// Measured ceiling of memory reads.
    pub ram_ceiling: Option<f64>,
    /// Measured rate of one-token compute over resident weights, bytes a second.
    pub compute_ceiling: Option<f64>,
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

    /// GB/s of weights through memory.
    pub fn ram_gb_per_s(&self) -> Option<f64> {
        (self.pass_s > 0.0).then(|| self.ram_bytes as f64 / self.pass_s / 1e9)
    }

    /// Tokens a second of one-token passes that the measured ceilings allow, and what binds:
    /// `T = max((B + 2C) / d, C / n)`, with the time of computing where it was measured.
    pub fn roofline(&self) -> Option<(f64, &'static str)> {
        let (all, c) = (self.bytes_per_pass as f64, self.nvme_bytes_per_pass as f64);
        let mut bounds = Vec::new();
        match self.nvme_ceiling {
            Some(n) => bounds.push((c / n, "nvme")),
            None if c > 0.0 => return None,
            None => {}
        }
        bounds.extend(self.ram_ceiling.map(|d| ((all + c) / d, "ram")));
        bounds.extend(self.compute_ceiling.map(|r| (all / r, "flops")));
        let (seconds, name) = bounds.into_iter().max_by(|a, b| a.0.total_cmp(&b.0))?;
        (seconds > 0.0).then(|| (1.0 / seconds, name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(Links { nvme_ceiling: None, ..l }.roofline(), None);
        assert_eq!(Links::default().roofline(), None);
    }
}

//! The health log of a drive: temperature, wear, spare blocks, warnings.

/// Bytes of the health log.
pub const LOG_BYTES: usize = 512;

/// The part of the SMART / Health Information log that is shown. NVMe Base 2.0 §5.16.1.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health {
    /// Critical warnings, one per bit.
    pub critical_warning: u8,
    /// Composite temperature, kelvin; 0 if it is not told.
    pub temperature_k: u16,
    /// Spare blocks that are left, percent.
    pub spare: u8,
    /// Spare below which a warning is due, percent.
    pub spare_threshold: u8,
    /// Part of its life that is used, percent; may pass 100.
    pub used: u8,
}

const WARNINGS: [&str; 6] = [
    "spare below its threshold",
    "temperature out of range",
    "reliability degraded",
    "read-only",
    "backup of its memory failed",
    "persistent memory read-only",
];

impl Health {
    /// Reads the log page. `None` unless there are 512 bytes.
    pub fn parse(log: &[u8]) -> Option<Health> {
        let log = log.get(..LOG_BYTES)?;
        Some(Health {
            critical_warning: log[0],
            temperature_k: u16::from_le_bytes([log[1], log[2]]),
            spare: log[3],
            spare_threshold: log[4],
            used: log[5],
        })
    }

    /// The critical warnings in words.
    pub fn warnings(&self) -> Vec<String> {
        let set = (0..8).filter(|bit| self.critical_warning >> bit & 1 == 1);
        set.map(|bit| WARNINGS.get(bit).map_or_else(|| format!("bit {bit}"), |w| (*w).to_owned())).collect()
    }
}

impl std::fmt::Display for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.temperature_k {
            0 => write!(f, "temperature not told")?,
            kelvin => write!(f, "{} °C", i32::from(kelvin) - 273)?,
        }
        write!(f, ", {} % of its life used, {} % spare", self.used, self.spare)?;
        match self.warnings() {
            none if none.is_empty() => write!(f, ", no critical warning"),
            some => write!(f, ", CRITICAL: {}", some.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_told_in_words() {
        let mut log = [0u8; LOG_BYTES];
        log[..6].copy_from_slice(&[0, 0x37, 0x01, 100, 10, 3]);
        let health = Health::parse(&log).unwrap();
        assert_eq!(health.to_string(), "38 °C, 3 % of its life used, 100 % spare, no critical warning");
        log[0] = 0x83;
        (log[1], log[2]) = (0, 0);
        assert_eq!(
            Health::parse(&log).unwrap().to_string(),
            "temperature not told, 3 % of its life used, 100 % spare, CRITICAL: spare below its threshold, temperature out of range, bit 7"
        );
        assert_eq!(Health::parse(&log[..511]), None);
    }
}

//! Drives that need other treatment than the specification says, by PCI vendor and device. Only what
//! matters to a driver that reads. The facts are those of the public tables of Linux
//! (drivers/nvme/host/pci.c, `nvme_id_table`) and SPDK (lib/nvme/nvme_quirks.c); names as there.

use std::time::Duration;

/// What is different about a drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Quirks {
    /// After disabling, the ready bit is wrong for a while (`DELAY_BEFORE_CHK_RDY`, Linux: 2.3 s).
    pub ready_delay: Duration,
    /// After a reset of the function it needs rest before its first register access
    /// (`DELAY_BEFORE_INIT`, SPDK: 2 s).
    pub rest_after_reset: Duration,
    /// A read that crosses a multiple of the largest transfer is slow (`STRIPE_SIZE`).
    pub stripes: bool,
    /// NGUID and EUI-64 are garbage or the same in every drive (`BOGUS_NID`).
    pub bogus_ids: bool,
    /// Why it cannot be driven at all.
    pub unsupported: Option<&'static str>,
}

const NONE: Quirks = Quirks {
    ready_delay: Duration::ZERO,
    rest_after_reset: Duration::ZERO,
    stripes: false,
    bogus_ids: false,
    unsupported: None,
};
const SLOW_READY: Quirks = Quirks { ready_delay: Duration::from_millis(2300), ..NONE };
const BOGUS: Quirks = Quirks { bogus_ids: true, ..NONE };
const STRIPED: Quirks = Quirks { stripes: true, ..NONE };
const STRIPED_RESTS: Quirks = Quirks { rest_after_reset: Duration::from_secs(2), ..STRIPED };
const LONG_ENTRIES: Quirks = Quirks { unsupported: Some("its submission entries have 128 bytes"), ..NONE };

/// (vendor, device, what is different), sorted.
const TABLE: &[(u16, u16, Quirks)] = &[
    (0x106b, 0x2005, LONG_ENTRIES),  // Apple T2
    (0x126f, 0x2262, BOGUS),         // Silicon Motion
    (0x126f, 0x2263, BOGUS),         // Silicon Motion
    (0x144d, 0xa821, SLOW_READY),    // Samsung PM1725
    (0x144d, 0xa822, SLOW_READY),    // Samsung PM1725a
    (0x1987, 0x5012, BOGUS),         // Phison E12
    (0x1987, 0x5016, BOGUS),         // Phison E16
    (0x1b36, 0x0010, BOGUS),         // QEMU
    (0x1bb1, 0x0100, SLOW_READY),    // Seagate Nytro
    (0x1c58, 0x0003, SLOW_READY),    // HGST
    (0x1c58, 0x0023, SLOW_READY),    // WDC SN200
    (0x1c5f, 0x0540, SLOW_READY),    // Memblaze Pblaze4
    (0x8086, 0x0953, STRIPED_RESTS), // Intel P3500, P3600, P3700
    (0x8086, 0x0a53, STRIPED_RESTS), // Intel P3520
    (0x8086, 0x0a54, STRIPED_RESTS), // Intel P4500, P4600
    (0x8086, 0x0a55, STRIPED),       // Dell Express Flash P4600
    (0x8086, 0x5845, BOGUS),         // QEMU, older
];

impl Quirks {
    /// The entry for a drive; that of an ordinary drive if there is none.
    pub fn of(vendor: u16, device: u16) -> Self {
        let found = TABLE.binary_search_by_key(&(vendor, device), |(v, d, _)| (*v, *d));
        found.map_or(NONE, |i| TABLE[i].2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_says_something() {
        assert!(TABLE.is_sorted_by(|a, b| (a.0, a.1) < (b.0, b.1)));
        assert!(TABLE.iter().all(|(.., quirks)| *quirks != NONE));
    }

    #[test]
    fn drives_are_found_by_both_numbers() {
        assert_eq!(Quirks::of(0x144d, 0xa821).ready_delay, Duration::from_millis(2300));
        assert_eq!(Quirks::of(0x8086, 0x0953).rest_after_reset, Duration::from_secs(2));
        assert!(Quirks::of(0x8086, 0x0a55).stripes && Quirks::of(0x1b36, 0x0010).bogus_ids);
        assert!(Quirks::of(0x106b, 0x2005).unsupported.is_some());
        assert_eq!(Quirks::of(0x144d, 0x0010), Quirks::default(), "the vendor of one, the device of another");
    }
}

//! Speed and width of a PCIe link.

use serde::Serialize;

use super::text;
use crate::storage::guard::Host;

/// What a link runs at.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Speed {
    /// Billion transfers per second and lane: 2.5, 5, 8, 16, 32, 64 for generations 1 to 6.
    pub gt_per_s: f64,
    /// Lanes.
    pub width: u32,
}

impl Speed {
    /// What may cross it, in bytes per second, before packet headers: 8b/10b coding up to generation
    /// 2, 128b/130b from 3 on.
    pub fn bytes_per_s(&self) -> f64 {
        let coding = if self.gt_per_s < 8.0 { 0.8 } else { 128.0 / 130.0 };
        self.gt_per_s * 1e9 * coding / 8.0 * f64::from(self.width)
    }
}

impl std::fmt::Display for Speed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} GT/s x{}", self.gt_per_s, self.width)
    }
}

/// A device's link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Link {
    /// Now; lower while idle where power management slows links.
    pub current: Option<Speed>,
    /// The most that the device can.
    pub max: Option<Speed>,
}

impl Link {
    /// True if both are known and the present one carries less.
    pub fn is_slow(&self) -> bool {
        matches!((self.current, self.max), (Some(c), Some(m)) if c.bytes_per_s() < m.bytes_per_s() * 0.99)
    }
}

/// The link of the function whose sysfs folder is `folder`.
pub(super) fn link(host: &Host, folder: &str) -> Link {
    let speed = |which: &str| {
        let gt = text(host, &format!("{folder}/{which}_link_speed"))?;
        let gt_per_s = gt.split_whitespace().next()?.parse().ok()?;
        let width = text(host, &format!("{folder}/{which}_link_width"))?.parse().ok()?;
        // Functions without a link of their own say 0, 63 or 255.
        (1..=32).contains(&width).then_some(Speed { gt_per_s, width })
    };
    Link { current: speed("current"), max: speed("max") }
}

/// Whether the function at `pci` hangs on the chipset, from the bridges above it. Intel's chipsets have
/// root ports of their own, devices 0x1b to 0x1d of bus 0, and processors have 0x01 and 0x06; AMD's
/// chipsets are switches below a root port of the processor. Elsewhere it is not known.
pub(super) fn behind_chipset(host: &Host, pci: &str) -> Option<bool> {
    const INTEL: &str = "0x8086";
    const AMD_OR_ASMEDIA: [&str; 2] = ["0x1022", "0x1b21"];
    let path = host.resolve(&format!("/sys/bus/pci/devices/{pci}")).ok()?;
    let names: Vec<String> = path.components().map(|c| c.as_os_str().to_string_lossy().into_owned()).collect();
    let root = names.iter().position(|n| n.starts_with("pci") && n.len() == "pci0000:00".len())?;
    let bridges = names.get(root + 1..names.len() - 1)?;
    let vendor = |name: &String| text(host, &format!("/sys/bus/pci/devices/{name}/vendor"));
    let first = bridges.first()?;
    match vendor(first)?.as_str() {
        INTEL if first.starts_with("0000:00:") => match first.get(8..10)? {
            "1b" | "1c" | "1d" => Some(true),
            "01" | "06" => Some(false),
            _ => None,
        },
        "0x1022" => match bridges.get(1) {
            None => Some(false),
            Some(second) => AMD_OR_ASMEDIA.contains(&vendor(second)?.as_str()).then_some(true),
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::tree;
    use super::*;

    /// A drive below `bridges` (address and vendor, the root port first).
    fn found(bridges: &[(&str, &str)]) -> Option<bool> {
        let mut folder = "sys/devices/pci0000:00".to_owned();
        let mut files = Vec::new();
        for (name, vendor) in bridges {
            folder = format!("{folder}/{name}");
            files.push((format!("{folder}/vendor"), format!("{vendor}\n")));
            files.push((format!("sys/bus/pci/devices/{name}"), format!("->/{folder}")));
        }
        files.push((format!("{folder}/0000:05:00.0/class"), "0x010802\n".to_owned()));
        files.push(("sys/bus/pci/devices/0000:05:00.0".into(), format!("->/{folder}/0000:05:00.0")));
        // Links as the kernel has them: relative.
        let files: Vec<(String, String)> =
            files.into_iter().map(|(p, t)| (p, t.replace("->/sys/", "->../../../"))).collect();
        let files: Vec<(&str, &str)> = files.iter().map(|(p, t)| (p.as_str(), t.as_str())).collect();
        let d = tree(&files);
        behind_chipset(&Host::at(d.path()), "0000:05:00.0")
    }

    #[test]
    fn drives_on_the_chipset_are_told_where_the_bus_tells() {
        for (bridges, wanted) in [
            (&[("0000:00:1d.0", "0x8086")][..], Some(true)),
            (&[("0000:00:06.0", "0x8086")], Some(false)),
            (&[("0000:00:03.0", "0x8086")], None),
            (&[("0000:00:02.1", "0x1022")], Some(false)),
            (&[("0000:00:02.1", "0x1022"), ("0000:02:00.2", "0x1022"), ("0000:03:04.0", "0x1022")], Some(true)),
            (&[("0000:00:02.1", "0x1022"), ("0000:02:00.0", "0x1b21")], Some(true)),
            (&[("0000:00:02.1", "0x1022"), ("0000:02:00.0", "0x12d8")], None),
            (&[("0000:00:01.0", "0x1b36")], None),
            (&[], None),
        ] {
            assert_eq!(found(bridges), wanted, "{bridges:?}");
        }
    }
}

//! Speed and width of a PCIe link.

use serde::Serialize;

use super::text;
use crate::storage::guard::Host;

/// What a link runs at.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Speed {
    /// Billion transfers a second and lane: 2.5, 5, 8, 16, 32, 64 for generations 1 to 6.
    pub gt_per_s: f64,
    /// Lanes.
    pub width: u32,
}

impl Speed {
    /// What may cross it, in bytes a second, before packet headers: 8b/10b coding up to generation
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

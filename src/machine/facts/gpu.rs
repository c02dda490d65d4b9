//! GPUs on the PCI bus.

use serde::Serialize;

use super::nvml::GpuUser;
use super::pci::{Link, link};
use super::text;
use crate::storage::guard::Host;

/// A GPU. Name and memory are the driver's words and null without it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gpu {
    /// PCI address.
    pub pci: String,
    /// PCI vendor, `0x10de` is NVIDIA.
    pub vendor: Option<String>,
    /// PCI device number.
    pub device: Option<String>,
    /// Kernel driver that holds it.
    pub driver: Option<String>,
    /// Its link.
    pub link: Link,
    /// Name.
    pub name: Option<String>,
    /// Bytes of memory.
    pub vram_total: Option<u64>,
    /// Of those, free.
    pub vram_free: Option<u64>,
    /// Other processes that hold its memory, the largest first.
    pub users: Option<Vec<GpuUser>>,
}

impl Gpu {
    /// Whether NVIDIA made it.
    pub fn is_nvidia(&self) -> bool {
        self.vendor.as_deref() == Some("0x10de")
    }
}

/// Whether a GPU of NVIDIA is on the PCI bus, driver or not.
pub fn has_nvidia_gpu(host: &Host) -> bool {
    gpus(host).iter().any(Gpu::is_nvidia)
}

/// Display and 3D controllers, by address.
pub(super) fn gpus(host: &Host) -> Vec<Gpu> {
    let base = "/sys/bus/pci/devices";
    let all = host.list(base).unwrap_or_default().into_iter();
    all.filter_map(|pci| {
        let folder = format!("{base}/{pci}");
        let class = text(host, &format!("{folder}/class"))?;
        // 0x0300 VGA, 0x0302 3D controller.
        (class.starts_with("0x0300") || class.starts_with("0x0302")).then(|| Gpu {
            vendor: text(host, &format!("{folder}/vendor")),
            device: text(host, &format!("{folder}/device")),
            driver: host.link_name(&format!("{folder}/driver")),
            link: link(host, &folder),
            name: None,
            vram_total: None,
            vram_free: None,
            users: None,
            pci,
        })
    })
    .collect()
}

//! Processors, memory and the limits of the system.

use serde::Serialize;

use super::{number, text};
use crate::machine::memory::{self, kib_field};
use crate::storage::guard::Host;

/// Processor features that kernels of this program ask for.
const FEATURES: [&str; 9] =
    ["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16"];

/// Processors.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cpu {
    /// Model.
    pub model: Option<String>,
    /// Features of interest that it has.
    pub features: Vec<String>,
    /// Processors that this process may run on.
    pub allowed: Option<usize>,
    /// The same as a list, `0-3,8`.
    pub allowed_list: Option<String>,
}

/// Memory, in bytes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ram {
    /// `MemTotal`.
    pub total: Option<u64>,
    /// `MemAvailable`.
    pub available: Option<u64>,
    /// What the tightest cgroup still allows.
    pub cgroup_left: Option<u64>,
    /// What the limits on address space and data (`ulimit -v`, `-d`) still allow.
    pub address_left: Option<u64>,
    /// Reserved huge pages.
    pub huge_pages: Option<HugePages>,
    /// Whether huge pages are made as needed: `always`, `madvise`, `never`.
    pub transparent_huge_pages: Option<String>,
}

/// Reserved huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HugePages {
    /// Pages.
    pub total: u64,
    /// Of those, free.
    pub free: u64,
    /// Bytes of one.
    pub bytes: u64,
}

/// What the system allows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Limits {
    /// Bytes that may be locked (`u64::MAX`: no limit).
    pub memlock: Option<u64>,
    /// To which the user may raise it.
    pub memlock_hard: Option<u64>,
    /// `kernel.io_uring_disabled`: 0 free, 1 for privileged or a group, 2 for nobody.
    pub io_uring_disabled: Option<u32>,
    /// IOMMU groups; 0 where there is none.
    pub iommu_groups: usize,
    /// Whether swap is on.
    pub swap: Option<bool>,
    /// Whether the kernel reports memory pressure.
    pub pressure: bool,
}

pub(super) fn cpu(host: &Host) -> Cpu {
    let info = host.read("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| info.lines().find_map(|l| Some(l.strip_prefix(name)?.split_once(':')?.1.trim()));
    let flags: Vec<&str> = field("flags").unwrap_or_default().split(' ').collect();
    let status = host.read("/proc/self/status").unwrap_or_default();
    let list = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).map(|l| l.trim().to_owned());
    Cpu {
        model: field("model name").map(ToOwned::to_owned),
        features: FEATURES.iter().filter(|f| flags.contains(f)).map(ToString::to_string).collect(),
        allowed: list.as_deref().and_then(count),
        allowed_list: list,
    }
}

/// How many numbers `0-3,8` holds.
fn count(list: &str) -> Option<usize> {
    let range = |part: &str| -> Option<usize> {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        to.parse::<usize>().ok()?.checked_sub(from.parse().ok()?)?.checked_add(1)
    };
    list.split(',').map(range).sum()
}

pub(super) fn ram(host: &Host) -> Ram {
    let info = host.read("/proc/meminfo").unwrap_or_default();
    let m = memory::memory(&host.real("/"));
    let pages = |name: &str| info.lines().find_map(|l| l.strip_prefix(name)?.trim().parse::<u64>().ok());
    let huge = || {
        Some(HugePages {
            total: pages("HugePages_Total:")?,
            free: pages("HugePages_Free:")?,
            bytes: kib_field(&info, "Hugepagesize:")?,
        })
    };
    let thp = text(host, "/sys/kernel/mm/transparent_hugepage/enabled");
    Ram {
        total: m.total,
        available: m.available,
        cgroup_left: m.cgroup_left,
        address_left: m.address_left,
        huge_pages: huge(),
        transparent_huge_pages: thp.and_then(|t| Some(t.split_once('[')?.1.split_once(']')?.0.to_owned())),
    }
}

pub(super) fn limits(host: &Host) -> Limits {
    let table = host.read("/proc/self/limits").unwrap_or_default();
    let line = table.lines().find_map(|l| l.strip_prefix("Max locked memory"));
    let mut words = line.unwrap_or_default().split_whitespace();
    let mut limit = || match words.next()? {
        "unlimited" => Some(u64::MAX),
        n => n.parse().ok(),
    };
    let swaps = host.read("/proc/swaps").ok();
    Limits {
        memlock: limit(),
        memlock_hard: limit(),
        io_uring_disabled: number(host, "/proc/sys/kernel/io_uring_disabled"),
        iommu_groups: host.list("/sys/kernel/iommu_groups").map_or(0, |g| g.len()),
        swap: swaps.map(|t| t.lines().skip(1).any(|l| !l.trim().is_empty())),
        pressure: host.exists("/proc/pressure/memory"),
    }
}

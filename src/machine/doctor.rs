//! What a machine lacks to run fast or safely: pure functions from facts to findings.

use serde::Serialize;

use super::facts::{Drive, Facts, Gpu, GpuUser};

/// Locked memory below which pinning weights for VFIO fails: a small ring.
const MEMLOCK_WANTED: u64 = 4 << 30;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Weight {
    /// Works, and could be faster or safer.
    Hint,
    /// Costs much speed, or a way to run.
    Warning,
}

/// One thing that is lacking.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// A word for programs.
    pub id: &'static str,
    /// How much it matters.
    pub weight: Weight,
    /// What was found.
    pub found: String,
    /// Why it matters.
    pub why: &'static str,
    /// What mends it.
    pub command: String,
}

/// What the system call says, which no file tells.
#[derive(Clone, Debug, Default)]
pub struct Tried {
    /// Why the GPU could not be opened, if it could not.
    pub gpu: Option<String>,
    /// Why io_uring was refused, if it was.
    pub io_uring: Option<String>,
    /// Drives bound to vfio-pci: PCI address, and whether this user may open the group's node.
    pub bound: Vec<(String, bool)>,
}

/// Everything that is lacking.
pub fn findings(facts: &Facts, tried: &Tried) -> Vec<Finding> {
    let mut out = gpu_driver(facts, tried);
    out.extend(facts.gpus.iter().filter_map(gpu_link));
    out.extend(facts.gpus.iter().flat_map(gpu_users));
    out.extend(limits(facts));
    out.extend(memory(facts));
    out.extend(facts.drives.iter().flat_map(drive));
    out.extend(io_uring(facts, tried));
    out.extend(tried.bound.iter().filter(|(_, open)| !open).map(|(pci, _)| Finding {
        id: "vfio-node",
        weight: Weight::Warning,
        found: format!("the drive {pci} is bound to vfio-pci, but this user may not open it"),
        why: "nt cannot read from it without the right to its node",
        command: "sudo groupadd -f nt && sudo usermod -aG nt $USER, then log in again".into(),
    }));
    out
}

fn gpu_driver(facts: &Facts, tried: &Tried) -> Vec<Finding> {
    let mut out = Vec::new();
    if facts.gpus.is_empty() && tried.gpu.is_some() {
        out.push(Finding {
            id: "no-gpu",
            weight: Weight::Hint,
            found: "no GPU on the PCI bus".into(),
            why: "everything is computed on processors",
            command: "lspci -nn | grep -Ei 'vga|3d' (should a GPU be there)".into(),
        });
    }
    if let (Some(gpu), Some(why)) = (facts.gpus.iter().find(|g| g.is_nvidia()), &tried.gpu) {
        out.push(Finding {
            id: "gpu-driver",
            weight: Weight::Warning,
            found: format!(
                "the GPU at {} (kernel driver {}) cannot be used: {why}",
                gpu.pci,
                gpu.driver.as_deref().unwrap_or("none")
            ),
            why: "without its driver the GPU computes nothing",
            command: "sudo ubuntu-drivers install (other systems: the package nvidia-driver), then restart".into(),
        });
    }
    out
}

fn gpu_link(gpu: &Gpu) -> Option<Finding> {
    let (current, max) = (gpu.link.current?, gpu.link.max?);
    gpu.link.is_slow().then(|| Finding {
        id: "gpu-link",
        weight: if current.width < max.width { Weight::Warning } else { Weight::Hint },
        found: format!("the GPU at {} is linked at {current} of {max}", gpu.pci),
        why: "units of RAM and storage cross this link on every pass; speed alone may be low because the link sleeps, width does not sleep",
        command: format!("nt probe link; sudo lspci -vv -s {} | grep LnkSta; then try the slot next to the processor", gpu.pci),
    })
}

/// Memory of other processes below which they are not worth a line: desktops hold some.
const VRAM_OF_OTHERS_MIN: u64 = 512 << 20;

fn gpu_users(gpu: &Gpu) -> Vec<Finding> {
    let large = gpu.users.iter().flatten().filter(|u| u.vram.is_some_and(|b| b >= VRAM_OF_OTHERS_MIN));
    let finding = |u: &GpuUser| {
        let name = u.name.as_deref().unwrap_or("a process");
        let ollama = name.contains("ollama");
        Finding {
            id: "vram-users",
            weight: Weight::Warning,
            found: format!("{name} ({}) holds {} MiB of the GPU at {}", u.pid, u.vram.unwrap_or(0) >> 20, gpu.pci),
            why: "what others hold, tier A cannot have, and every byte less there crosses the link on each pass",
            command: if ollama {
                "nt run --evict-ollama …".into()
            } else {
                format!("end it, if you can do without: kill {}", u.pid)
            },
        }
    };
    large.map(finding).collect()
}

fn limits(facts: &Facts) -> Vec<Finding> {
    let mut out = Vec::new();
    if let Some(n) = facts.limits.memlock.filter(|n| *n < MEMLOCK_WANTED) {
        out.push(Finding {
            id: "memlock",
            weight: Weight::Warning,
            found: format!("{} MiB of memory may be locked", n >> 20),
            why: "reading a bound drive (VFIO) pins its buffers and is charged against this limit; CUDA's own pinned memory is not",
            command: "echo \"$USER - memlock unlimited\" | sudo tee /etc/security/limits.d/nt.conf, then log in again"
                .into(),
        });
    }
    if facts.limits.iommu_groups == 0 {
        out.push(Finding {
            id: "iommu",
            weight: Weight::Hint,
            found: "no IOMMU is active".into(),
            why: "a drive may be handed to nt (nt device bind) only where an IOMMU confines it",
            command:
                "switch on VT-d or AMD-Vi in the firmware; on Intel add intel_iommu=on to the kernel's command line"
                    .into(),
        });
    }
    out
}

fn memory(facts: &Facts) -> Vec<Finding> {
    let mut out = Vec::new();
    let mut add = |id, weight, found: String, why, command: &str| {
        out.push(Finding { id, weight, found, why, command: command.into() });
    };
    if facts.ram.transparent_huge_pages.as_deref() == Some("never") {
        add(
            "huge-pages",
            Weight::Warning,
            "transparent huge pages are off".into(),
            "a direct read into small pages is many pieces of memory, which some drives take at half their rate",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        );
    }
    if let (Some(left), Some(available)) = (facts.ram.cgroup_left, facts.ram.available)
        && left < available
    {
        add(
            "cgroup",
            Weight::Warning,
            format!("a cgroup leaves {} MiB of the {} MiB that are available", left >> 20, available >> 20),
            "the kernel kills what goes beyond; nt plans within it",
            "systemd-run --user --scope -p MemoryMax=infinity nt …, or raise the container's limit",
        );
    }
    if let (Some(left), Some(available)) = (facts.ram.address_left, facts.ram.available)
        && left < available
    {
        add(
            "address-space",
            Weight::Warning,
            format!("limits on the process leave {} MiB of the {} MiB that are available", left >> 20, available >> 20),
            "memory beyond is refused; nt plans within it",
            "ulimit -v unlimited; ulimit -d unlimited",
        );
    }
    if facts.limits.swap == Some(true) && !facts.limits.pressure {
        add(
            "pressure",
            Weight::Warning,
            "swap is on and the kernel reports no memory pressure".into(),
            "a machine that swaps stalls before memory runs out, and only pressure tells in time",
            "add psi=1 to the kernel's command line, or sudo swapoff -a for the run",
        );
    }
    out
}

fn drive(drive: &Drive) -> Vec<Finding> {
    let mut out = Vec::new();
    if let (Some(current), Some(max), true) = (drive.link.current, drive.link.max, drive.link.is_slow()) {
        out.push(Finding {
            id: "drive-link",
            weight: Weight::Warning,
            found: format!("{} is linked at {current} of {max}", drive.name),
            why: "tier C reads no faster than this link",
            command: format!(
                "sudo lspci -vv -s {} | grep LnkSta; then try the M.2 slot next to the processor",
                drive.pci.as_deref().unwrap_or("")
            ),
        });
    }
    if drive.behind_chipset == Some(true) && drive.name.starts_with("nvme") {
        out.push(Finding {
            id: "drive-chipset",
            weight: Weight::Hint,
            found: format!("{} hangs on the chipset", drive.name),
            why: "all devices there share one link to the processor, and tier C shares it with them",
            command: format!("nt probe storage {}; then try the M.2 slot next to the processor", drive.name),
        });
    }
    if drive.name.starts_with("nvme") && drive.scheduler.as_deref().is_some_and(|s| s != "none") {
        out.push(Finding {
            id: "scheduler",
            weight: Weight::Hint,
            found: format!("{} uses the scheduler {}", drive.name, drive.scheduler.as_deref().unwrap_or("")),
            why: "an NVMe drive orders its own queue; a scheduler costs time for each read",
            command: format!("echo none | sudo tee /sys/block/{}/queue/scheduler", drive.name),
        });
    }
    if drive.rotational == Some(true) && !drive.name.starts_with("vd") {
        out.push(Finding {
            id: "rotational",
            weight: Weight::Hint,
            found: format!("{} turns", drive.name),
            why: "a turning disk reads weights ten to fifty times slower than an NVMe drive",
            command: "cp MODEL to a directory on an NVMe drive, and give --tier-c that directory".into(),
        });
    }
    out
}

fn io_uring(facts: &Facts, tried: &Tried) -> Option<Finding> {
    let why = tried.io_uring.as_ref()?;
    let switch = match facts.limits.io_uring_disabled {
        Some(n) if n > 0 => format!("; kernel.io_uring_disabled is {n}"),
        _ => String::new(),
    };
    Some(Finding {
        id: "io_uring",
        weight: Weight::Warning,
        found: format!("io_uring is refused: {why}{switch}"),
        why: "reads fall back to a pool of threads, which costs processor time",
        command: "sudo sysctl kernel.io_uring_disabled=0 (in a container: --security-opt seccomp=unconfined)".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::facts::tests::tree;
    use super::super::facts::{Link, Speed};
    use super::*;
    use crate::storage::guard::Host;

    fn machine(files: &[(&str, &str)]) -> Facts {
        let d = tree(files);
        Facts::read(&Host::at(d.path()))
    }

    fn ids(facts: &Facts, tried: &Tried) -> Vec<&'static str> {
        findings(facts, tried).iter().map(|f| f.id).collect()
    }

    #[test]
    fn a_good_machine_has_no_findings() {
        let f = machine(&[
            ("sys/kernel/iommu_groups/0/type", "DMA"),
            ("proc/self/limits", "Max locked memory  unlimited unlimited bytes\n"),
        ]);
        assert_eq!(ids(&f, &Tried::default()), Vec::<&str>::new());
    }

    #[test]
    fn each_lack_is_found_with_a_command() {
        let f = machine(&[
            (
                "proc/self/limits",
                "Max address space  1000000000 unlimited bytes\nMax locked memory  8388608 8388608 bytes\n",
            ),
            (
                "proc/meminfo",
                "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\nHugePages_Total: 0\nHugePages_Free: 0\nHugepagesize: 2048 kB\n",
            ),
            ("proc/self/cgroup", "0::/a\n"),
            ("sys/fs/cgroup/a/memory.max", "1048576\n"),
            ("sys/fs/cgroup/a/memory.current", "0\n"),
            ("proc/swaps", "Filename\n/swap file 1 0 -2\n"),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n"),
            ("sys/block/nvme0n1/queue/scheduler", "none [mq-deadline]\n"),
            ("sys/block/sda/queue/rotational", "1\n"),
            ("sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n"),
            ("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n"),
            ("sys/bus/pci/devices/0000:01:00.0/current_link_speed", "16.0 GT/s PCIe\n"),
            ("sys/bus/pci/devices/0000:01:00.0/max_link_speed", "16.0 GT/s PCIe\n"),
            ("sys/bus/pci/devices/0000:01:00.0/current_link_width", "4\n"),
            ("sys/bus/pci/devices/0000:01:00.0/max_link_width", "16\n"),
            ("proc/sys/kernel/io_uring_disabled", "2\n"),
        ]);
        let tried = Tried {
            gpu: Some("no driver".into()),
            io_uring: Some("not permitted".into()),
            bound: vec![("0000:03:00.0".into(), false)],
        };
        let all = ids(&f, &tried);
        for id in [
            "gpu-driver",
            "gpu-link",
            "memlock",
            "iommu",
            "huge-pages",
            "cgroup",
            "address-space",
            "pressure",
            "scheduler",
            "rotational",
            "io_uring",
            "vfio-node",
        ] {
            assert!(all.contains(&id), "{id} is missing of {all:?}");
        }
        assert!(findings(&f, &tried).iter().all(|x| !x.command.is_empty() && !x.found.is_empty()));
    }

    #[test]
    fn others_in_vram_are_named_and_small_ones_left_alone() {
        let mut f =
            machine(&[("sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n"), ("sys/block/nvme0n1/size", "8\n")]);
        let user = |pid, name: &str, vram| GpuUser { pid, name: Some(name.into()), vram };
        f.gpus[0].users =
            Some(vec![user(5, "ollama_runner", Some(6 << 30)), user(6, "Xorg", Some(90 << 20)), user(7, "x", None)]);
        f.drives[0].behind_chipset = Some(true);
        let all = findings(&f, &Tried::default());
        let users: Vec<_> = all.iter().filter(|x| x.id == "vram-users").collect();
        assert_eq!(users.len(), 1);
        assert!(users[0].found.contains("6144 MiB") && users[0].command.contains("--evict-ollama"));
        assert!(all.iter().any(|x| x.id == "drive-chipset"));
    }

    /// A link that power management has slowed is judged by what it can: all its lanes at a low speed are a hint, and
    /// only lanes that are missing are a warning.
    #[test]
    fn a_link_that_sleeps_is_no_warning() {
        let mut f = machine(&[("sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n")]);
        let speed = |gt_per_s, width| Some(Speed { gt_per_s, width });
        let weight = |f: &Facts| findings(f, &Tried::default()).iter().find(|x| x.id == "gpu-link").map(|x| x.weight);
        f.gpus[0].link = Link { current: speed(2.5, 16), max: speed(32.0, 16) };
        assert_eq!(weight(&f), Some(Weight::Hint));
        f.gpus[0].link = Link { current: speed(2.5, 8), max: speed(32.0, 16) };
        assert_eq!(weight(&f), Some(Weight::Warning));
        f.gpus[0].link = Link { current: speed(32.0, 16), max: speed(32.0, 16) };
        assert_eq!(weight(&f), None);
    }

    #[test]
    fn a_drive_on_a_slow_link_is_found() {
        let mut f = machine(&[("sys/block/nvme0n1/size", "8\n")]);
        let speed = |gt_per_s, width| Some(Speed { gt_per_s, width });
        f.drives[0].link = Link { current: speed(8.0, 2), max: speed(16.0, 4) };
        assert!(ids(&f, &Tried::default()).contains(&"drive-link"));
        f.drives[0].link = Link { current: None, max: speed(16.0, 4) };
        assert!(!ids(&f, &Tried::default()).contains(&"drive-link"));
    }
}

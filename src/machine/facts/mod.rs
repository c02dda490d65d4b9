//! What this machine has, as the kernel tells it: processors, memory, GPUs, drives, limits.
//!
//! Read below an injectable root. What cannot be read is `None`, never an error and never a guess:
//! virtual machines and containers lack much of it.

mod drive;
mod gpu;
mod nvml;
mod pci;
mod system;

pub use drive::{Drive, Mount};
pub use gpu::{Gpu, has_nvidia_gpu};
pub use nvml::{GpuUser, ask_nvml};
pub use pci::{Link, Speed};
pub use system::{Cpu, HugePages, Limits, Ram};

use serde::Serialize;

use crate::storage::guard::Host;

/// Everything that is known without measuring.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Facts {
    /// Processors.
    pub cpu: Cpu,
    /// Memory.
    pub ram: Ram,
    /// GPUs on the PCI bus.
    pub gpus: Vec<Gpu>,
    /// Drives.
    pub drives: Vec<Drive>,
    /// What the system allows.
    pub limits: Limits,
}

impl Facts {
    /// Reads them from `host`.
    pub fn read(host: &Host) -> Facts {
        Facts {
            cpu: system::cpu(host),
            ram: system::ram(host),
            gpus: gpu::gpus(host),
            drives: drive::drives(host),
            limits: system::limits(host),
        }
    }
}

/// A number in a file, `None` where there is none.
fn number<T: std::str::FromStr>(host: &Host, path: &str) -> Option<T> {
    host.read(path).ok()?.trim().parse().ok()
}

/// A text in a file, `None` where there is none or it is empty.
fn text(host: &Host, path: &str) -> Option<String> {
    let text = host.read(path).ok()?.trim().to_owned();
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A folder with these files; a text that begins with `->` is a link to what follows.
    pub(crate) fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let d = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let p = d.path().join(path);
            std::fs::create_dir_all(p.parent().unwrap()).unwrap();
            match text.strip_prefix("->") {
                Some(target) => std::os::unix::fs::symlink(target, p).unwrap(),
                None => std::fs::write(p, text).unwrap(),
            }
        }
        d
    }

    #[test]
    fn an_empty_machine_is_all_null() {
        let d = tree(&[]);
        let f = Facts::read(&Host::at(d.path()));
        assert!(f.gpus.is_empty() && f.drives.is_empty());
        assert_eq!((f.ram.total, f.cpu.model, f.limits.memlock), (None, None, None));
    }

    #[test]
    fn a_desktop_is_read() {
        let pci = "sys/devices/pci0000:00";
        let gpu = format!("{pci}/0000:00:01.0/0000:01:00.0");
        let drive = format!("{pci}/0000:00:02.0/0000:02:00.0");
        let block = format!("{drive}/nvme/nvme0/nvme0n1");
        let mut files: Vec<(String, &str)> = vec![
            (
                "proc/meminfo".into(),
                "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\nHugePages_Total: 4\nHugePages_Free: 3\nHugepagesize: 2048 kB\n",
            ),
            ("proc/cpuinfo".into(), "model name\t: Test CPU\nflags\t\t: fpu avx2 avx512f f16c\n"),
            ("proc/self/status".into(), "Cpus_allowed_list:\t0-3,8\n"),
            (
                "proc/self/limits".into(),
                "Limit   Soft Limit  Hard Limit Units\nMax locked memory         8388608              unlimited            bytes\n",
            ),
            ("proc/swaps".into(), "Filename Type Size Used Priority\n/swap file 1024 0 -2\n"),
            ("proc/pressure/memory".into(), "some avg10=0.00\n"),
            ("proc/sys/kernel/io_uring_disabled".into(), "1\n"),
            (
                "proc/self/mountinfo".into(),
                "30 1 259:1 / /data rw - ext4 /dev/nvme0n1p1 rw\n31 1 0:5 / /x rw - tmpfs t rw\n",
            ),
            ("sys/kernel/iommu_groups/0/type".into(), "DMA\n"),
            ("sys/bus/pci/devices/0000:01:00.0".into(), "->../../../devices/pci0000:00/0000:00:01.0/0000:01:00.0"),
            ("sys/bus/pci/devices/0000:02:00.0".into(), "->../../../devices/pci0000:00/0000:00:02.0/0000:02:00.0"),
            ("sys/block/nvme0n1".into(), "->../devices/pci0000:00/0000:00:02.0/0000:02:00.0/nvme/nvme0/nvme0n1"),
        ];
        for (file, value) in [
            ("class", "0x030000\n"),
            ("vendor", "0x10de\n"),
            ("device", "0x2684\n"),
            ("current_link_speed", "2.5 GT/s PCIe\n"),
            ("max_link_speed", "16.0 GT/s PCIe\n"),
            ("current_link_width", "4\n"),
            ("max_link_width", "16\n"),
            ("driver", "->/sys/bus/pci/drivers/nvidia"),
        ] {
            files.push((format!("{gpu}/{file}"), value));
        }
        for (file, value) in [
            ("class", "0x010802\n"),
            ("current_link_speed", "Unknown\n"),
            ("max_link_speed", "16.0 GT/s PCIe\n"),
            ("current_link_width", "63\n"),
            ("max_link_width", "4\n"),
        ] {
            files.push((format!("{drive}/{file}"), value));
        }
        for (file, value) in [
            ("size", "2000\n"),
            ("dev", "259:0\n"),
            ("device/model", "Fast Drive \n"),
            ("queue/rotational", "0\n"),
            ("queue/scheduler", "[none] mq-deadline\n"),
            ("queue/nr_requests", "1023\n"),
            ("queue/max_sectors_kb", "128\n"),
            ("queue/logical_block_size", "512\n"),
            ("nvme0n1p1/partition", "1\n"),
            ("nvme0n1p1/dev", "259:1\n"),
        ] {
            files.push((format!("{block}/{file}"), value));
        }
        let files: Vec<(&str, &str)> = files.iter().map(|(p, t)| (p.as_str(), *t)).collect();
        let d = tree(&files);
        let f = Facts::read(&Host::at(d.path()));

        assert_eq!(
            (f.cpu.model.as_deref(), f.cpu.allowed, f.cpu.features),
            (Some("Test CPU"), Some(5), vec!["avx2".into(), "f16c".into(), "avx512f".into()])
        );
        assert_eq!(f.ram.available, Some(16 << 30));
        assert_eq!(f.ram.huge_pages, Some(HugePages { total: 4, free: 3, bytes: 2 << 20 }));
        let link = &f.gpus[0].link;
        assert_eq!(link.max, Some(Speed { gt_per_s: 16.0, width: 16 }));
        assert_eq!(link.current, Some(Speed { gt_per_s: 2.5, width: 4 }));
        assert_eq!(f.gpus[0].driver.as_deref(), Some("nvidia"));
        let drive = &f.drives[0];
        assert_eq!(
            (drive.name.as_str(), drive.size, drive.model.as_deref()),
            ("nvme0n1", Some(1_024_000), Some("Fast Drive"))
        );
        assert_eq!(
            (drive.scheduler.as_deref(), drive.rotational, drive.max_request),
            (Some("none"), Some(false), Some(128 << 10))
        );
        assert_eq!(drive.pci.as_deref(), Some("0000:02:00.0"));
        assert_eq!((drive.link.current, drive.link.max), (None, Some(Speed { gt_per_s: 16.0, width: 4 })));
        assert_eq!(drive.mounts, [Mount { at: "/data".into(), file_system: "ext4".into() }]);
        assert_eq!((f.limits.memlock, f.limits.memlock_hard), (Some(8 << 20), Some(u64::MAX)));
        assert_eq!(
            (f.limits.io_uring_disabled, f.limits.iommu_groups, f.limits.swap, f.limits.pressure),
            (Some(1), 1, Some(true), true)
        );
    }
}

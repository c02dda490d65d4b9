//! What NVIDIA's management library says of its GPUs: memory, and who uses it. Loaded while running;
//! a machine without it keeps `null`.

use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use serde::Serialize;

use super::{Gpu, text};
use crate::storage::guard::Host;

/// A process that holds memory of a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GpuUser {
    /// Its number.
    pub pid: u32,
    /// Its name; null where it is in another container.
    pub name: Option<String>,
    /// Bytes of the GPU's memory; null where the driver does not say.
    pub vram: Option<u64>,
}

/// Fills in names, memory and other users of the GPUs. Best called before this process uses them.
pub fn ask_nvml(host: &Host, gpus: &mut [Gpu]) {
    let Ok(nvml) = Nvml::init() else { return };
    for i in 0..nvml.device_count().unwrap_or(0) {
        let Ok(device) = nvml.device_by_index(i) else { continue };
        let Ok(pci) = device.pci_info() else { continue };
        let Some(gpu) = gpus.iter_mut().find(|g| same_address(&g.pci, &pci.bus_id)) else { continue };
        gpu.name = device.name().ok();
        if let Ok(memory) = device.memory_info() {
            gpu.vram_total = Some(memory.total);
            gpu.vram_free = Some(memory.free);
        }
        let (compute, graphics) = (device.running_compute_processes(), device.running_graphics_processes());
        if compute.is_ok() || graphics.is_ok() {
            let all = compute.into_iter().chain(graphics).flatten();
            gpu.users = Some(users(host, all, std::process::id()));
        }
    }
}

/// NVML writes the domain with eight digits.
fn same_address(pci: &str, nvml: &str) -> bool {
    let short = nvml.len().checked_sub(pci.len()).and_then(|at| nvml.get(at..));
    short.is_some_and(|s| s.eq_ignore_ascii_case(pci))
}

fn users(host: &Host, all: impl Iterator<Item = ProcessInfo>, own: u32) -> Vec<GpuUser> {
    let mut out: Vec<GpuUser> = Vec::new();
    for p in all.filter(|p| p.pid != own) {
        if out.iter().any(|u| u.pid == p.pid) {
            continue;
        }
        let vram = match p.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        };
        out.push(GpuUser { pid: p.pid, name: text(host, &format!("/proc/{}/comm", p.pid)), vram });
    }
    out.sort_by_key(|u| std::cmp::Reverse(u.vram));
    out
}

#[cfg(test)]
mod tests {
    use super::super::tests::tree;
    use super::*;

    #[test]
    fn addresses_agree_whatever_their_domain_is_written_like() {
        assert!(same_address("0000:0a:00.0", "00000000:0A:00.0"));
        assert!(!same_address("0000:0a:00.0", "00000000:0B:00.0"));
        assert!(!same_address("0000:0a:00.0", "0a:00.0"));
    }

    #[test]
    fn a_process_counts_once_and_this_one_not() {
        let d = tree(&[("proc/7/comm", "ollama\n")]);
        let process = |pid, used_gpu_memory| ProcessInfo {
            pid,
            used_gpu_memory,
            gpu_instance_id: None,
            compute_instance_id: None,
        };
        let all = [
            process(9, UsedGpuMemory::Unavailable),
            process(7, UsedGpuMemory::Used(5)),
            process(7, UsedGpuMemory::Used(5)),
            process(1, UsedGpuMemory::Used(9)),
        ];
        let found = users(&Host::at(d.path()), all.into_iter(), 1);
        let user = |pid, name: Option<&str>, vram| GpuUser { pid, name: name.map(Into::into), vram };
        assert_eq!(found, [user(7, Some("ollama"), Some(5)), user(9, None, None)]);
    }
}

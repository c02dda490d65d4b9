//! `nt doctor`: what this machine lacks to run fast or safely, and the commands that mend it.
//! Looks only; changes nothing.

use std::path::Path;

use clap::Args;
use serde_json::json;

use super::Failure;
use super::report::print_line;
use crate::backend::cuda::Device;
use crate::machine::doctor::{self, Finding, Tried, Weight};
use crate::machine::facts::{Facts, Gpu, ask_nvml};
use crate::machine::probe::link;
use crate::storage::bind;
use crate::storage::guard::Host;

/// Arguments of `nt doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Prints facts and findings. Findings are no failure.
pub fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let host = Host::default();
    let mut facts = Facts::read(&host);
    // Before this process takes memory there itself.
    ask_nvml(&host, &mut facts.gpus);
    let device = Device::open(0);
    // A sleeping link is slow: copies wake it before its speed is read.
    let awake = device.as_ref().is_ok_and(|d| link::wake(d).is_ok());
    refresh_links(&host, &mut facts);
    if let Ok(device) = &device {
        let free = device.mem_info().ok().map(|(free, _)| free);
        for gpu in facts.gpus.iter_mut().filter(|g| g.pci == device.info.pci_address) {
            gpu.name = Some(device.info.name.clone());
            gpu.vram_total = Some(device.info.total_bytes);
            gpu.vram_free = gpu.vram_free.or(free);
        }
    }
    let bound: Vec<_> = bind::bound(&host).into_iter().map(|b| (may_open(&host, &b.group), b)).collect();
    let tried = Tried {
        gpu: device.as_ref().err().map(ToString::to_string),
        io_uring: io_uring::IoUring::new(2).err().map(|e| e.to_string()),
        bound: bound.iter().map(|(open, b)| (b.pci.clone(), *open)).collect(),
    };
    let findings = doctor::findings(&facts, &tried);
    if args.json {
        let bound: Vec<_> = bound.iter().map(|(open, b)| json!({ "drive": b, "may_open": open })).collect();
        let all = json!({ "facts": facts, "link_awake": awake, "bound": bound, "findings": findings });
        return print_line(&all.to_string());
    }
    print_facts(&facts)?;
    for (open, b) in &bound {
        let may = if *open { "may" } else { "may not" };
        print_line(&format!("bound   {} {} {}; this user {may} open it", b.pci, b.model, b.serial))?;
    }
    print_line("")?;
    if findings.is_empty() {
        return print_line("nothing is lacking");
    }
    findings.iter().try_for_each(print_finding)
}

/// Takes the links' speeds anew.
fn refresh_links(host: &Host, facts: &mut Facts) {
    for now in Facts::read(host).gpus {
        if let Some(gpu) = facts.gpus.iter_mut().find(|g| g.pci == now.pci) {
            gpu.link = now.link;
        }
    }
}

/// Whether this user may read and write the node of a VFIO group.
fn may_open(host: &Host, group: &str) -> bool {
    let node = host.real(&format!("/dev/vfio/{group}"));
    nix::unistd::access(Path::new(&node), nix::unistd::AccessFlags::R_OK | nix::unistd::AccessFlags::W_OK).is_ok()
}

fn gib(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "?".into(), |b| format!("{:.1} GiB", b as f64 / (1u64 << 30) as f64))
}

fn print_facts(f: &Facts) -> Result<(), Failure> {
    let (model, n) = (f.cpu.model.as_deref().unwrap_or("?"), f.cpu.allowed.unwrap_or(0));
    let kernels = crate::backend::cpu::Isa::choose(true).name();
    print_line(&format!("cpu     {model}, {n} processors allowed, {}; kernels: {kernels}", f.cpu.features.join(" ")))?;
    let limit = f.ram.cgroup_left.map_or_else(String::new, |l| format!(", a cgroup leaves {}", gib(Some(l))));
    print_line(&format!("ram     {}, {} available{limit}", gib(f.ram.total), gib(f.ram.available)))?;
    for g in &f.gpus {
        print_line(&gpu_line(g))?;
        for u in g.users.iter().flatten() {
            let name = u.name.as_deref().unwrap_or("?");
            print_line(&format!("        {name} ({}) holds {}", u.pid, gib(u.vram)))?;
        }
    }
    for d in &f.drives {
        let link = d.link.current.map_or_else(String::new, |l| format!(", {l}"));
        let chipset = if d.behind_chipset == Some(true) { ", on the chipset" } else { "" };
        let mounts: Vec<_> = d.mounts.iter().map(|m| format!("{} ({})", m.at, m.file_system)).collect();
        print_line(&format!(
            "drive   {} {}, {}{link}{chipset}, scheduler {}, {}",
            d.name,
            d.model.as_deref().unwrap_or("?"),
            gib(d.size),
            d.scheduler.as_deref().unwrap_or("?"),
            if mounts.is_empty() { "not mounted".into() } else { mounts.join(" ") }
        ))?;
    }
    Ok(())
}

fn gpu_line(g: &Gpu) -> String {
    let link = match (g.link.current, g.link.max) {
        (Some(c), Some(m)) => format!("{c} of {m}"),
        _ => "link unknown".into(),
    };
    let name = g.name.as_deref().unwrap_or("?");
    format!("gpu     {} {name}, {} ({} free), {link}", g.pci, gib(g.vram_total), gib(g.vram_free))
}

fn print_finding(f: &Finding) -> Result<(), Failure> {
    let mark = if f.weight == Weight::Warning { "warning" } else { "hint" };
    print_line(&format!("{mark}: {}", f.found))?;
    print_line(&format!("    why: {}", f.why))?;
    print_line(&format!("    do:  {}", f.command))
}

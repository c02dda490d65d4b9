//! This machine as a plan sees it: facts, rates that were measured before, and guesses for the rest.

use std::path::Path;
use std::sync::Arc;

use super::Opened;
use crate::backend::BackendKind;
use crate::backend::cuda::Device;
use crate::machine;
use crate::machine::facts::{Facts, Gpu};
use crate::machine::probe::link::{LINK_BESIDE, MEMORY_BESIDE, by_threads};
use crate::machine::probe::{self, Target};
use crate::plan::{Costs, CpuSide, Fewer, GpuSide, Machine, RamSide, Rate, SiteRates, Speed, StorageSide};
use crate::storage::guard::Host;

/// VRAM that the driver takes for a context and kernels: what an H100 showed in use beside buffers and
/// weights (docs/benchmarks.md); drivers of smaller GPUs take less.
pub(super) const DRIVER_BYTES: u64 = 560 << 20;

/// Threads that compute beside a GPU, where `threads` would by themselves: one processor drives the links.
pub(super) fn threads_beside(threads: usize) -> usize {
    threads.min(machine::n_cpus().saturating_sub(1)).max(1)
}

/// The rates by which work is divided between a GPU and `threads` processors: measured before, or now, once; guessed where that
/// fails.
pub(super) fn site_rates(threads: usize) -> SiteRates {
    let guess = |rate| Rate::guess(rate, "of a common GPU");
    let device = Device::open(0).ok();
    let (vram, link, beside) = match &device {
        Some(device) => {
            measure_beside(device);
            let facts = Facts::read(&Host::default());
            (vram_rate(device), link(device, &facts), link_beside(device))
        }
        None => (guess(VRAM_GUESS), guess(LINK_GUESS), None),
    };
    SiteRates::of(&ram(device.as_ref()), (machine::n_cpus(), threads), &vram, &link, beside.as_ref())
}

/// Measures memory and the link at the same time, by some counts of threads, unless that was done before: two seconds, once. By guesses
/// processors may get a fifth of what they could do. Without a cache it is measured again the next time.
fn measure_beside(device: &Arc<Device>) {
    let root = Path::new("/");
    let counts = probe::link::counts(machine::n_cpus());
    let link = probe::link::identity(device);
    let fewer = counts.split_last().map_or(0, |(_, fewer)| fewer.len());
    let whole = probe::measured(MEMORY_BESIDE, &machine::memory_identity(root)).is_some()
        && probe::measured(LINK_BESIDE, &link).is_some();
    if whole && self::fewer(&link).len() == fewer {
        return;
    }
    let budget = machine::memory(root).budget();
    if budget.is_some_and(|b| b < PROBED_MIN) {
        return;
    }
    if let Ok(measured) = probe::link::with_memory(device, &counts, budget, &|| false) {
        let _ = probe::record(&probe::link::kept(&measured, &link));
    }
}

/// What fewer processors than all but one read beside a link that has this name, as measured before.
fn fewer(link: &str) -> Vec<Fewer> {
    let memory = machine::memory_identity(Path::new("/"));
    let rates = |&threads: &usize| {
        let rate = |kind, identity: &str| cached(&by_threads(kind, threads), "nt probe", identity);
        Some(Fewer { threads, read: rate(MEMORY_BESIDE, &memory)?, link: rate(LINK_BESIDE, link)? })
    };
    let counts = probe::link::counts(machine::n_cpus());
    counts.split_last().map_or(Vec::new(), |(_, fewer)| fewer.iter().filter_map(rates).collect())
}

/// What is to be said where the division between sites counts with guesses.
pub(super) fn guessed_sites() -> Option<String> {
    let identity = machine::memory_identity(Path::new("/"));
    probe::measured(MEMORY_BESIDE, &identity).is_none().then(|| {
        "how much of the work processors do next to the GPU follows from guessed rates; `nt probe memory link` measures them, once".into()
    })
}

/// Free memory below which these are not measured, since that takes up to 1 GiB.
const PROBED_MIN: u64 = 4 << 30;
/// Guessed rate of memory for each thread, up to two channels' worth.
const RAM_A_THREAD: f64 = 10e9;
const RAM_GUESS_MAX: f64 = 40e9;
/// Guessed rates of storage.
const NVME_GUESS: f64 = 3e9;
const DISK_GUESS: f64 = 150e6;
/// What pinned copies commonly reach of a PCIe link, and a guess where the link is not known.
const LINK_SHARE: f64 = 0.8;
const LINK_GUESS: f64 = 12e9;
/// Guessed rate of VRAM.
const VRAM_GUESS: f64 = 400e9;
/// Guessed products in prefill: TFLOPS a thread with and without AVX-512.
const GEMM_A_THREAD: (f64, f64) = (0.19, 0.06);

/// Guessed TFLOPS of a multiprocessor in prefill: on an H100 1.23 are measured, and others are taken to reach as large a share of
/// their data sheets' rates, a fifth.
fn gemm_a_multiprocessor(capability: (u32, u32)) -> f64 {
    match capability {
        (9 | 10, _) => 1.2,
        (8, 0) => 0.6,
        _ => 0.25,
    }
}

/// This machine, with the storage that the model lies on. Its GPU is not opened where `backend` is processors.
pub fn this_machine(opened: &Opened, backend: BackendKind) -> Machine {
    Here::new(backend).with_storage_of(opened)
}

/// This machine, looked at once for many models.
pub struct Here {
    facts: Facts,
    machine: Machine,
}

impl Here {
    /// Reads facts and rates that were measured. The GPU is not opened where `backend` is processors.
    pub fn new(backend: BackendKind) -> Here {
        let facts = Facts::read(&Host::default());
        let device = if backend == BackendKind::Cpu { None } else { Device::open(0).ok() };
        device.iter().for_each(measure_beside);
        let machine = Machine {
            name: "this machine".into(),
            ram: ram(device.as_ref()),
            cpu: cpu(&facts),
            storage: None,
            gpu: device.map(|d| gpu(&d, &facts)),
        };
        Here { facts, machine }
    }

    /// The machine with the storage that the model lies on.
    pub fn with_storage_of(&self, opened: &Opened) -> Machine {
        Machine { storage: Some(storage(opened, &self.facts)), ..self.machine.clone() }
    }
}

/// The last measured rate, with its day and age.
fn cached(kind: &str, by: &str, identity: &str) -> Option<Rate> {
    let r = probe::measured(kind, identity)?;
    let days = r.age_s() / 86_400;
    let age = if days > 0 { format!(", {days} days ago") } else { String::new() };
    Some(Rate::measured(r.bytes_per_s, format!("{by} on {}{age}", r.date)))
}

fn ram(device: Option<&Arc<Device>>) -> RamSide {
    let root = Path::new("/");
    let memory = machine::memory(root);
    let bounds = [memory.cgroup_left, memory.address_left, memory.available];
    let available = bounds.into_iter().flatten().min();
    let read = cached("memory", "nt probe", &machine::memory_identity(root)).unwrap_or_else(|| {
        let guess = (RAM_A_THREAD * machine::n_cpus() as f64).min(RAM_GUESS_MAX);
        Rate::guess(guess, "from the number of processors; `nt probe memory` measures it")
    });
    let beside = cached(MEMORY_BESIDE, "nt probe", &machine::memory_identity(root));
    let fewer = device.map_or(Vec::new(), |d| fewer(&probe::link::identity(d)));
    RamSide { size: memory.total.or(available).unwrap_or(0), available, budget: memory.budget(), read, beside, fewer }
}

fn cpu(facts: &Facts) -> CpuSide {
    let threads = machine::n_cpus();
    let wide = facts.cpu.features.iter().any(|f| f == "avx512_vnni");
    let each = if wide { GEMM_A_THREAD.0 } else { GEMM_A_THREAD.1 };
    let source = "from the number and kind of processors; `nt bench` measures it".into();
    CpuSide {
        threads,
        decode: cached("decode", "nt bench", &machine::compute_identity(Path::new("/"), threads)),
        gemm: Some(Speed { tflops: each * threads as f64, measured: false, source }),
    }
}

fn storage(opened: &Opened, facts: &Facts) -> StorageSide {
    let path = &opened.gguf.shards[0].path;
    let target = Target::open(path).ok();
    let copies = target.as_ref().is_some_and(|t| t.file.copies);
    let identity = target.map(|t| t.identity);
    let measured = identity.as_ref().and_then(|i| cached("storage", "nt probe", i));
    let turns = identity.as_ref().is_some_and(|i| {
        let name = i.split(' ').next().unwrap_or("");
        // Virtual disks call themselves turning, whatever lies below.
        !name.starts_with("vd") && facts.drives.iter().any(|d| d.name == name && d.rotational == Some(true))
    });
    let read = measured.unwrap_or_else(|| {
        let guess = if turns { DISK_GUESS } else { NVME_GUESS };
        Rate::guess(guess, format!("of a common drive; `nt probe storage {}` measures it", path.display()))
    });
    StorageSide { read, drives: 1, copies }
}

/// Measured once: a session leaves no room for it.
fn vram_rate(device: &Arc<Device>) -> Rate {
    let identity = probe::link::identity(device);
    if let Some(rate) = cached("vram", "copies within VRAM", &identity) {
        return rate;
    }
    match crate::backend::cuda::memory_rate(device) {
        Ok(Some(rate)) => {
            // Without a cache it is measured again the next time.
            let _ = probe::record(&[probe::Rate::now("vram", &identity, rate, None, None)]);
            Rate::measured(rate, "copies within VRAM, just now")
        }
        _ => Rate::guess(VRAM_GUESS, "of a common GPU; it could not be measured now"),
    }
}

fn link_beside(device: &Arc<Device>) -> Option<Rate> {
    cached(LINK_BESIDE, "nt probe", &probe::link::identity(device))
}

fn link(device: &Arc<Device>, facts: &Facts) -> Rate {
    let fact: Option<&Gpu> = facts.gpus.iter().find(|g| g.pci.eq_ignore_ascii_case(&device.info.pci_address));
    cached("h2d", "nt probe", &probe::link::identity(device)).unwrap_or_else(|| {
        let (rate, source) = match fact.and_then(|f| f.link.max) {
            Some(speed) => (speed.bytes_per_s() * LINK_SHARE, format!("0.8 of PCIe {speed}")),
            None => (LINK_GUESS, "of a common slot".into()),
        };
        Rate::guess(rate, format!("{source}; `nt probe link` measures it"))
    })
}

fn gpu(device: &Arc<Device>, facts: &Facts) -> GpuSide {
    let i = &device.info;
    let (free, total) = device.mem_info().unwrap_or((i.total_bytes, i.total_bytes));
    let link = link(device, facts);
    let memory = vram_rate(device);
    let tflops = gemm_a_multiprocessor(i.capability) * f64::from(i.multiprocessors);
    let source = "from the number and kind of multiprocessors".into();
    GpuSide {
        name: i.name.clone(),
        vram: total,
        // The context that was opened for this is counted again for the session's.
        vram_taken: total.saturating_sub(free + DRIVER_BYTES),
        multiprocessors: i.multiprocessors as usize,
        memory,
        link,
        link_beside: link_beside(device),
        gemm: Some(Speed { tflops, measured: false, source }),
        costs: Costs::default(),
    }
}

//! Compiles `kernels/*.cu` to cubins (and PTX for GPUs newer than them) where nvcc is found, and
//! embeds them with the sources. Without nvcc only the sources are embedded; they are compiled at
//! first use.
//!
//! nvcc is looked for in `NVCC`, `CUDA_HOME/bin`, `CUDA_PATH/bin` and `PATH`. `NT_CUDA_ARCHS`
//! (for example `90` or `86,120`) limits the targets, to build faster.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

const ARCHS: &[&str] = &["80", "86", "89", "90", "120"];
/// Virtual architecture of the PTX: GPUs that are newer than all cubins compile it when loading.
const PTX_ARCH: &str = "90";
const HEADERS: &[&str] = &[
    "common.cuh",
    "cache.cuh",
    "attn.cuh",
    "states.cuh",
    "grids.cuh",
    "blocks.cuh",
    "gemv.cuh",
    "tiles.cuh",
    "gemm.cuh",
    "plain.cuh",
    "thin.cuh",
];
const UNITS: &[&str] = &[
    "bulk", "gemv", "plain", "dequant", "gemm", "thin", "attn", "wide", "ops", "hand", "acts", "delta", "mixers", "moe",
];

struct Job {
    unit: &'static str,
    arch: String,
    ptx: bool,
    out: PathBuf,
}

fn main() {
    println!("cargo:rerun-if-changed=kernels");
    for var in ["NVCC", "CUDA_HOME", "CUDA_PATH", "NT_CUDA_ARCHS"] {
        println!("cargo:rerun-if-env-changed={var}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let kernels = root.join("kernels");
    write_grids(&out, &kernels);
    let jobs = match find_nvcc() {
        Some(nvcc) => compile_all(&nvcc, &kernels, &out),
        None => {
            println!("cargo:warning=nvcc not found: CUDA kernels will be compiled at first use");
            Vec::new()
        }
    };
    write_table(&out, &kernels, &jobs);
}

fn find_nvcc() -> Option<PathBuf> {
    let mut candidates: Vec<PathBuf> = env::var_os("NVCC").map(PathBuf::from).into_iter().collect();
    for var in ["CUDA_HOME", "CUDA_PATH"] {
        candidates.extend(env::var_os(var).map(|d| Path::new(&d).join("bin/nvcc")));
    }
    if let Some(path) = env::var_os("PATH") {
        candidates.extend(env::split_paths(&path).map(|d| d.join("nvcc")));
    }
    candidates.into_iter().find(|c| c.is_file())
}

fn compile_all(nvcc: &Path, kernels: &Path, out: &Path) -> Vec<Job> {
    let wanted = env::var("NT_CUDA_ARCHS").ok();
    let archs: Vec<String> = match &wanted {
        Some(list) => list.split(',').map(|a| a.trim().to_owned()).collect(),
        None => ARCHS.iter().map(|a| (*a).to_owned()).collect(),
    };
    let mut jobs = Vec::new();
    for unit in UNITS {
        for arch in &archs {
            jobs.push(Job { unit, arch: arch.clone(), ptx: false, out: out.join(format!("{unit}_{arch}.cubin")) });
        }
        if wanted.is_none() {
            jobs.push(Job { unit, arch: PTX_ARCH.to_owned(), ptx: true, out: out.join(format!("{unit}.ptx")) });
        }
    }
    let next = AtomicUsize::new(0);
    let errors = Mutex::new(String::new());
    let workers = thread::available_parallelism().map_or(1, |n| n.get());
    thread::scope(|s| {
        for _ in 0..workers {
            s.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(e) = compile(nvcc, kernels, job) {
                        errors.lock().expect("no worker panics").push_str(&e);
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().expect("no worker panics");
    assert!(errors.is_empty(), "nvcc failed:\n{errors}");
    jobs
}

fn compile(nvcc: &Path, kernels: &Path, job: &Job) -> Result<(), String> {
    let kind = if job.ptx { "compute" } else { "sm" };
    let output = Command::new(nvcc)
        .args(["-std=c++17", "-O3"])
        .arg(format!("-arch={kind}_{}", job.arch))
        .arg(if job.ptx { "-ptx" } else { "-cubin" })
        .arg("-o")
        .arg(&job.out)
        .arg(kernels.join(format!("{}.cu", job.unit)))
        .output()
        .map_err(|e| format!("{}: {e}\n", nvcc.display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{} for {}_{}:\n{}", job.unit, kind, job.arch, String::from_utf8_lossy(&output.stderr)))
}

/// Tables of `kernels/grids.cuh`: name, the values of its codes as bytes, bits of a code.
const GRIDS: &[(&str, &[u8], u32)] = &[
    ("IQ1", &[0, 1, 2], 2),
    ("IQ2_XXS", &[8, 25, 43], 2),
    ("IQ2_XS", &[8, 25, 43], 2),
    ("IQ2_S", &[8, 25, 43], 2),
    ("IQ3_XXS", &[4, 12, 20, 28, 36, 44, 52, 62], 4),
    ("IQ3_S", &[1, 3, 5, 7, 9, 11, 13, 15], 4),
];

/// Writes the Rust tables that `src/gguf/grids.rs` includes: each word of 16 bits becomes one of a byte a code.
fn write_grids(out: &Path, kernels: &Path) {
    let source = fs::read_to_string(kernels.join("grids.cuh")).expect("kernels/grids.cuh is readable");
    let mut text = String::new();
    for (name, values, bits) in GRIDS {
        let table = source.split_once(&format!(" GRID_{name}[")).expect("grids.cuh has every table").1;
        let body = table.split_once('{').and_then(|(_, t)| t.split_once('}')).expect("a table has braces").0;
        let words: Vec<String> = body
            .split(',')
            .filter_map(|word| word.trim().strip_prefix("0x"))
            .map(|word| {
                let word = u32::from_str_radix(word, 16).expect("a word is hexadecimal");
                let code = |i: u32| values[(word >> (bits * i) & ((1 << bits) - 1)) as usize];
                let bytes = (0..16 / bits).rev().map(code);
                bytes.fold(String::from("0x"), |all, byte| all + &format!("{byte:02x}"))
            })
            .collect();
        let ty = if *bits == 2 { "u64" } else { "u32" };
        let n = words.len();
        let _ = writeln!(text, "/// The grid of {name}.\npub static {name}: [{ty}; {n}] = [{}];", words.join(", "));
    }
    fs::write(out.join("grids.rs"), text).expect("OUT_DIR is writable");
}

/// Writes the Rust tables that `src/backend/cuda/modules.rs` includes.
fn write_table(out: &Path, kernels: &Path, jobs: &[Job]) {
    let mut text = String::from("/// Kernels compiled for one architecture: unit, `sm_XX`, image.\n");
    for (name, ptx) in [("CUBINS", false), ("PTX", true)] {
        let _ = writeln!(text, "pub static {name}: &[(&str, u32, &[u8])] = &[");
        for job in jobs.iter().filter(|j| j.ptx == ptx) {
            let _ = writeln!(text, "    ({:?}, {}, include_bytes!({:?})),", job.unit, job.arch, job.out);
        }
        text.push_str("];\n");
    }
    for (name, files, ext) in [("UNITS", UNITS, ".cu"), ("HEADERS", HEADERS, "")] {
        let _ = writeln!(text, "pub static {name}: &[(&str, &str)] = &[");
        for f in files {
            let path = kernels.join(format!("{f}{ext}"));
            let _ = writeln!(text, "    ({f:?}, include_str!({path:?})),");
        }
        text.push_str("];\n");
    }
    fs::write(out.join("kernels.rs"), text).expect("OUT_DIR is writable");
}

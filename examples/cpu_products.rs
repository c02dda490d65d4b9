//! What the products of one token reach on processors: weight bytes per second, from caches and from RAM.
//!
//!   cargo run --release --example cpu_products -- [THREADS [MIB]]
//!
//! Times gate, up and down of a block of width 4096 × 14336 for each type over `MIB` of weights (default 1024, and
//! one small block that stays in the second-level cache), beside a plain sweep that only reads.

use std::hint::black_box;
use std::time::Instant;

use nt::backend::cpu::CpuBackend;
use nt::backend::{Backend, Class, Dims, Linear, Norm, Rope, RopeKind, Run, Weight};
use nt::gguf::TensorType;
use nt::memory::Arena;

fn dims(n_embd: usize, n_ff: usize) -> Dims {
    Dims {
        n_layers: 1,
        n_blocks: 1,
        expert_bytes: 0,
        n_embd,
        n_heads: 1,
        n_kv_heads: 1,
        head_dim: 64,
        shapes: Vec::new(),
        n_per_block: 0,
        value_of_latent: 0,
        n_ff,
        n_experts: 0,
        n_experts_used: 0,
        n_ff_expert: 0,
        n_vocab: 1,
        max_batch: 1,
        max_outputs: 1,
        n_ctx: 1,
        recent: None,
        bfloat: false,
        kv_type: TensorType::F32,
        ropes: vec![Rope { kind: RopeKind::Norm, freqs: vec![1.0; 32], magnitude: 1.0 }],
        n_mix: 0,
        n_attn: 0,
        recurrent: None,
        beyond: None,
        no_kernel: None,
    }
}

/// Bytes per second of reading the arena with `threads` threads, best of five.
fn sweep(base: usize, bytes: usize, threads: usize) -> f64 {
    (0..5).fold(0.0, |best, _| {
        let start = Instant::now();
        std::thread::scope(|s| {
            for i in 0..threads {
                let (from, to) = (bytes / 64 * i / threads * 8, bytes / 64 * (i + 1) / threads * 8);
                s.spawn(move || {
                    let words = base as *const u64;
                    let mut sums = [0u64; 8];
                    for at in (from..to).step_by(8) {
                        for (j, sum) in sums.iter_mut().enumerate() {
                            // SAFETY: words `from..to` lie in the arena, which outlives the scope and is not written.
                            *sum = sum.wrapping_add(unsafe { *words.add(at + j) });
                        }
                    }
                    black_box(sums);
                });
            }
        });
        f64::max(best, bytes as f64 / start.elapsed().as_secs_f64())
    })
}

/// A matrix in the arena.
fn linear(addr: u64, ty: TensorType, rows: usize, cols: usize) -> Linear {
    // SAFETY: callers give an address of the arena with as many bytes behind it; nothing writes there.
    Linear { weight: unsafe { Weight::new(addr, ty, rows, cols) }, bias: None }
}

fn norm(weights: &[f32]) -> Norm {
    // SAFETY: the slice outlives the products.
    let weight = unsafe { Weight::new(weights.as_ptr() as u64, TensorType::F32, 1, weights.len()) };
    Norm { weight, eps: 1.0 }
}

/// Bytes per second of one small matrix times a vector, over and over: it stays in the second-level cache.
fn cached(ty: TensorType, base: u64) -> f64 {
    let (rows, cols) = (256, 4096);
    let mut backend = CpuBackend::new(Dims { n_vocab: rows, ..dims(cols, 256) }, 1).expect("a backend");
    let ones = vec![1.0f32; cols];
    let norm = norm(&ones);
    let row: Vec<u8> = (0..cols).flat_map(|i| ((i % 7) as f32 - 3.0).to_le_bytes()).collect();
    backend.begin(&[Run { class: Class::Exact, first_pos: 0, rows: 1, table: &[0], state: 0 }]).expect("one token");
    backend.embed(&row, TensorType::F32).expect("a row");
    backend.output_norm(&norm).expect("a row");
    let bytes = rows * ty.row_bytes(cols).expect("whole blocks");
    (0..2000).fold(0.0, |best, _| {
        let start = Instant::now();
        backend.head(&linear(base, ty, rows, cols), 0).expect("products");
        f64::max(best, bytes as f64 / start.elapsed().as_secs_f64())
    })
}

/// Bytes per second of the block's products, best of `rounds` over all copies of the block that fit.
fn products(ty: TensorType, base: u64, bytes: usize, n_embd: usize, n_ff: usize, threads: usize, rounds: usize) -> f64 {
    let mut backend = CpuBackend::new(dims(n_embd, n_ff), threads).expect("a backend");
    let matrix = |rows, cols| rows * ty.row_bytes(cols).expect("whole blocks");
    let each = 2 * matrix(n_ff, n_embd) + matrix(n_embd, n_ff);
    let copies = bytes / each;
    assert!(copies > 0, "{ty} needs at least {} MiB", each.div_ceil(1 << 20));
    let ones = vec![1.0f32; n_embd];
    let norm = norm(&ones);
    let linear = |addr, rows, cols| linear(addr, ty, rows, cols);
    let row: Vec<u8> = (0..n_embd).flat_map(|i| ((i % 7) as f32 - 3.0).to_le_bytes()).collect();
    let mut best = 0.0;
    for _ in 0..rounds {
        backend.begin(&[Run { class: Class::Exact, first_pos: 0, rows: 1, table: &[0], state: 0 }]).expect("one token");
        backend.embed(&row, TensorType::F32).expect("a row");
        let start = Instant::now();
        for copy in 0..copies {
            let at = base + (copy * each) as u64;
            let (gate, up) = (linear(at, n_ff, n_embd), linear(at + matrix(n_ff, n_embd) as u64, n_ff, n_embd));
            let down = linear(at + 2 * matrix(n_ff, n_embd) as u64, n_embd, n_ff);
            backend.ffn(&norm, &gate, &up, &down).expect("products");
        }
        best = f64::max(best, (copies * each) as f64 / start.elapsed().as_secs_f64());
    }
    best
}

fn main() {
    let mut args = std::env::args().skip(1).filter_map(|a| a.parse::<usize>().ok());
    let threads = args.next().unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into));
    let bytes = args.next().unwrap_or(1024) << 20;
    let mut arena = Arena::new(bytes as u64).expect("memory");
    let region = arena.take(bytes as u64).expect("memory");
    // Every half-precision field is a number between 0.01 and 2, whatever its place.
    // SAFETY: the region is the arena's, and nothing else uses it.
    let words = unsafe { std::slice::from_raw_parts_mut(region.addr(), bytes) };
    let mut state = 1u32;
    for b in words.iter_mut() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *b = 0x21 + (state >> 27) as u8 % 0x1e;
    }
    let base = region.addr() as usize;
    println!("read-only sweep, {threads} threads: {:.1} GB/s", sweep(base, bytes, threads) / 1e9);
    for ty in [TensorType::Q8_0, TensorType::Q6_K, TensorType::Q5_K, TensorType::Q4_K, TensorType::Q4_0] {
        let small = cached(ty, base as u64);
        let large = products(ty, base as u64, bytes, 4096, 14336, threads, 5);
        println!(
            "{ty:6} one thread from cache {:6.1} GB/s, {threads} threads from RAM {:6.1} GB/s",
            small / 1e9,
            large / 1e9
        );
    }
}

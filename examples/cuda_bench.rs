//! Times decoding and prefill of made-up models of well-known shapes, wholly in VRAM, through the
//! backend's operations; `cuda_bench selftest` checks every kernel first.
//!
//! Usage: cuda_bench [selftest] [8b] [32b] [kernels]

use std::sync::Arc;
use std::time::Instant;

use nt::backend::cuda::{CudaBackend, Device, DeviceBuffer, selftest};
use nt::backend::{Backend, BackendError, Class, Dims, EXACT_ROWS, Linear, Norm, Rope, RopeKind, Run, Weight};
use nt::gguf::TensorType;
use nt::state::{PageId, Pages};

type Result<T = ()> = std::result::Result<T, BackendError>;

struct Shape {
    name: &'static str,
    layers: usize,
    embd: usize,
    heads: usize,
    kv_heads: usize,
    ff: usize,
    vocab: usize,
    mixed: bool,
}

const SHAPES: [Shape; 4] = [
    Shape { name: "8b", layers: 32, embd: 4096, heads: 32, kv_heads: 8, ff: 14336, vocab: 128256, mixed: false },
    Shape { name: "32b", layers: 64, embd: 5120, heads: 40, kv_heads: 8, ff: 27648, vocab: 152064, mixed: true },
    // For the profiler.
    Shape { name: "few8b", layers: 2, embd: 4096, heads: 32, kv_heads: 8, ff: 14336, vocab: 16384, mixed: false },
    Shape { name: "few32b", layers: 8, embd: 5120, heads: 40, kv_heads: 8, ff: 27648, vocab: 16384, mixed: true },
];

struct Layer {
    norm: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    gate: Linear,
    up: Linear,
    down: Linear,
}

struct Model {
    layers: Vec<Layer>,
    norm: Norm,
    head: Weight,
    bytes: u64,
    _buffers: Vec<DeviceBuffer>,
}

struct Maker<'a> {
    device: &'a Arc<Device>,
    buffers: Vec<DeviceBuffer>,
    patterns: Vec<(TensorType, Vec<u8>)>,
    bytes: u64,
}

impl Maker<'_> {
    fn weight(&mut self, ty: TensorType, rows: usize, cols: usize) -> Result<Weight> {
        let bytes = ty.row_bytes(cols).expect("whole blocks") * rows;
        let i = match self.patterns.iter().position(|p| p.0 == ty) {
            Some(i) => i,
            None => {
                let elems = 1 << 22;
                let rows = selftest::random_rows(ty, elems, 0.03, 11);
                self.patterns.push((ty, rows));
                self.patterns.len() - 1
            }
        };
        let buffer = self.device.alloc(bytes as u64, "weights")?;
        let pattern = &self.patterns[i].1;
        for at in (0..bytes).step_by(pattern.len()) {
            let n = pattern.len().min(bytes - at);
            buffer.write(at as u64, &pattern[..n])?;
        }
        let addr = buffer.addr();
        self.buffers.push(buffer);
        self.bytes += bytes as u64;
        // SAFETY: the buffer at `addr` holds the whole matrix and lives as long as the layer.
        Ok(unsafe { Weight::new(addr, ty, rows, cols) })
    }

    fn linear(&mut self, ty: TensorType, rows: usize, cols: usize) -> Result<Linear> {
        Ok(Linear { weight: self.weight(ty, rows, cols)?, bias: None })
    }
}

fn make(device: &Arc<Device>, s: &Shape) -> Result<Model> {
    let mut m = Maker { device, buffers: Vec::new(), patterns: Vec::new(), bytes: 0 };
    let (base, better) =
        if s.mixed { (TensorType::Q4_K, TensorType::Q6_K) } else { (TensorType::Q8_0, TensorType::Q8_0) };
    let norm = Norm { weight: m.weight(TensorType::F32, 1, s.embd)?, eps: 1e-5 };
    let kv = s.kv_heads * 128;
    let mut layers = Vec::new();
    for i in 0..s.layers {
        let more = i < s.layers / 8 || i >= 7 * s.layers / 8 || (i - s.layers / 8) % 3 == 2;
        let lifted = if more { better } else { base };
        layers.push(Layer {
            norm,
            q: m.linear(base, s.heads * 128, s.embd)?,
            k: m.linear(base, kv, s.embd)?,
            v: m.linear(lifted, kv, s.embd)?,
            o: m.linear(base, s.embd, s.heads * 128)?,
            gate: m.linear(base, s.ff, s.embd)?,
            up: m.linear(base, s.ff, s.embd)?,
            down: m.linear(lifted, s.embd, s.ff)?,
        });
    }
    let head = m.weight(better, s.vocab, s.embd)?;
    Ok(Model { layers, norm, head, bytes: m.bytes, _buffers: m.buffers })
}

/// What passes of so many tokens are.
fn class(n: usize) -> Class {
    if n <= EXACT_ROWS { Class::Exact } else { Class::Bulk }
}

/// Begins a pass of one sequence.
fn begin(b: &mut CudaBackend, first_pos: usize, rows: usize, class: Class) -> Result {
    let table: Vec<PageId> = (0..Pages::of(first_pos + rows) as PageId).collect();
    b.begin(&[Run { class, first_pos, rows, table: &table, state: 0 }])
}

fn pass(b: &mut CudaBackend, m: &Model, rows: &[u8], pos: usize, n: usize, class: Class) -> Result<f32> {
    begin(b, pos, n, class)?;
    b.embed(rows, TensorType::Q8_0)?;
    let last = m.layers.len() - 1;
    for (i, l) in m.layers.iter().enumerate() {
        b.qkv(i, &l.norm, &l.q, &l.k, &l.v, None, None)?;
        b.attend(i)?;
        if i == last {
            b.keep(&[n - 1])?;
        }
        b.attn_output(&l.o)?;
        b.ffn(&l.norm, &l.gate, &l.up, &l.down)?;
    }
    b.output_norm(&m.norm)?;
    b.head(&Linear { weight: m.head, bias: None }, 0)?;
    Ok(b.logits()?[0])
}

fn bench(device: &Arc<Device>, s: &Shape) -> Result {
    let start = Instant::now();
    let m = make(device, s)?;
    let dims = Dims {
        n_layers: s.layers,
        n_blocks: s.layers,
        expert_bytes: 0,
        n_embd: s.embd,
        n_heads: s.heads,
        n_kv_heads: s.kv_heads,
        head_dim: 128,
        shapes: Vec::new(),
        n_per_block: 0,
        value_of_latent: 0,
        n_ff: s.ff,
        n_experts: 0,
        n_experts_used: 0,
        n_ff_expert: 0,
        n_vocab: s.vocab,
        max_batch: 512,
        max_outputs: 1,
        n_ctx: 1024,
        recent: None,
        bfloat: false,
        kv_type: TensorType::F16,
        ropes: vec![Rope {
            kind: RopeKind::Norm,
            freqs: (0..64).map(|i| 500000f32.powf(-(i as f32) / 64.0)).collect(),
            magnitude: 1.0,
        }],
        n_mix: 0,
        n_attn: 0,
        recurrent: None,
        beyond: None,
        no_kernel: None,
    };
    let mut b = CudaBackend::new(device, &dims)?;
    if s.name.starts_with("few") {
        let rows = selftest::random_rows(TensorType::Q8_0, 512 * s.embd, 1.0, 5);
        pass(&mut b, &m, &rows[..rows.len() / 512], 200, 1, Class::Exact)?;
        pass(&mut b, &m, &rows[..rows.len() / 64], 200, 8, Class::Exact)?;
        return pass(&mut b, &m, &rows, 0, 512, Class::Bulk).map(|_| ());
    }
    println!(
        "{}: {:.2} GB of weights, workspace {} MiB, made in {:.1} s",
        s.name,
        m.bytes as f64 / 1e9,
        b.workspace_bytes() >> 20,
        start.elapsed().as_secs_f32()
    );
    let rows = selftest::random_rows(TensorType::Q8_0, 512 * s.embd, 1.0, 5);
    let row = rows.len() / 512;
    let mut runs = Vec::new();
    for i in 0..6 {
        let t = Instant::now();
        let x = pass(&mut b, &m, &rows, 0, 512, Class::Bulk)?;
        assert!(x.is_finite(), "prefill gives no number");
        if i > 0 {
            runs.push(t.elapsed().as_secs_f64());
        }
    }
    println!("{}: prefill 512: {:.0} tok/s ({:.2} ms)", s.name, 512.0 / median(&mut runs), 1e3 * median(&mut runs));
    let counts = [1, 2, 4, 8].map(|n| (n, Class::Exact)).into_iter();
    for (n, class) in counts.chain([1, 8, 16, 32, 64, 128].map(|n| (n, Class::Bulk))) {
        let mut runs = Vec::new();
        let passes = if n == 1 && class == Class::Exact { 128 } else { 10 };
        for i in 0..passes + 3 {
            let t = Instant::now();
            pass(&mut b, &m, &rows[..n * row], if passes > 10 { i } else { 128 }, n, class)?;
            if i >= 3 {
                runs.push(t.elapsed().as_secs_f64());
            }
        }
        let s1 = median(&mut runs);
        println!(
            "{}: {n} {class:?}: {:.1} tok/s, {:.3} ms, {:.0} GB/s",
            s.name,
            n as f64 / s1,
            s1 * 1e3,
            m.bytes as f64 / s1 / 1e9
        );
    }
    // How long the host needs to submit one token's work.
    begin(&mut b, 200, 1, Class::Exact)?;
    let t = Instant::now();
    for (i, l) in m.layers.iter().enumerate() {
        b.qkv(i, &l.norm, &l.q, &l.k, &l.v, None, None)?;
        b.attend(i)?;
        b.attn_output(&l.o)?;
        b.ffn(&l.norm, &l.gate, &l.up, &l.down)?;
    }
    println!("{}: submitting a token takes the host {:.3} ms", s.name, t.elapsed().as_secs_f64() * 1e3);
    b.synchronize()?;
    parts(device, &mut b, &m)
}

/// Time of each operation of a middle block, back to back over all layers.
fn parts(device: &Arc<Device>, b: &mut CudaBackend, m: &Model) -> Result {
    for n in [1usize, 8, 512] {
        begin(b, if n == 512 { 0 } else { 500 }, n, class(n))?;
        type Op<'a> = (&'a str, fn(&mut CudaBackend, usize, &Layer) -> Result);
        let ops: [Op; 4] = [
            ("qkv", |b, i, l| b.qkv(i, &l.norm, &l.q, &l.k, &l.v, None, None)),
            ("attend", |b, i, _| b.attend(i)),
            ("attn_output", |b, _, l| b.attn_output(&l.o)),
            ("ffn", |b, _, l| b.ffn(&l.norm, &l.gate, &l.up, &l.down)),
        ];
        let mut line = format!("us a layer, batch {n}:");
        for (name, op) in ops {
            let (e0, e1) = (device.event(true)?, device.event(true)?);
            for round in 0..2 {
                if round == 1 {
                    e0.record(b.stream())?;
                }
                for (i, l) in m.layers.iter().enumerate() {
                    op(b, i, l)?;
                }
            }
            e1.record(b.stream())?;
            e1.synchronize()?;
            line += &format!(" {name} {:.1}", e1.ms_since(&e0)? * 1e3 / m.layers.len() as f32);
        }
        println!("{line}");
    }
    Ok(())
}

fn median(v: &mut [f64]) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

fn run() -> Result {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let device = Device::open(0)?;
    println!("{:?}", device.info);
    println!("memory {:?}", device.mem_info()?);
    if args.iter().any(|a| a == "selftest") {
        let t = Instant::now();
        let failed = selftest::selftest(&device, (1, 1), false, &mut std::io::stdout())?;
        println!("selftest: {failed} failed, {:.1} s", t.elapsed().as_secs_f32());
    }
    for s in &SHAPES {
        if args.iter().any(|a| a == s.name) {
            bench(&device, s)?;
        }
    }
    Ok(())
}

fn main() {
    if let Err(e) = run() {
        eprintln!("{e}");
        std::process::exit(1);
    }
}

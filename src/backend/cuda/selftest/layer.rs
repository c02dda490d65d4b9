//! Whole blocks through the [`Backend`] operations against scalar arithmetic in F64: norms, rotary
//! embedding, the KV cache, attention over several passes, the feed-forward part, experts, head.

use std::sync::Arc;

use super::{F32, Matrix, Report, Result, Rng, nmse, random_rows, silu, values, widen};
use crate::backend::cuda::graph::Recorder;
use crate::backend::cuda::{CudaBackend, Device};
use crate::backend::{
    Activation, Backend, Class, Dims, EXACT_ROWS, Expert, Layers, Norm, Rope, RopeKind, RouterParams, Routing, Run,
};
use crate::gguf::TensorType;
use crate::state::{PAGE, PageId, Pages, StateOp};

struct Case {
    ty: TensorType,
    head_dim: usize,
    heads: usize,
    kv_heads: usize,
    kind: RopeKind,
    kv_type: TensorType,
    head_norms: bool,
    experts: usize,
    /// Tokens of each pass.
    passes: &'static [usize],
}

const CASES: &[Case] = &[
    case(64, 10, 5, RopeKind::Norm, F32, true, 0, &[1, 5, 1, 40, 1]).of(TensorType::Q8_0),
    case(80, 4, 2, RopeKind::Neox, F32, false, 5, &[1, 8, 40, 1]).of(TensorType::Q8_0),
    case(64, 9, 3, RopeKind::Norm, F32, false, 0, &[1, 5, 1, 40, 1]),
    case(80, 4, 4, RopeKind::Neox, TensorType::F16, true, 0, &[70, 1, 8, 1]),
    case(96, 6, 2, RopeKind::Norm, TensorType::F16, false, 0, &[9, 1, 33, 3]),
    case(128, 8, 1, RopeKind::Neox, TensorType::F16, true, 0, &[130, 1, 2, 200, 1]),
    case(256, 4, 2, RopeKind::Norm, F32, false, 0, &[37, 1, 64, 1]),
    case(128, 4, 2, RopeKind::Neox, F32, true, 6, &[3, 1, 45, 1]),
];

#[allow(clippy::too_many_arguments, reason = "a table of cases")]
const fn case(
    head_dim: usize,
    heads: usize,
    kv_heads: usize,
    kind: RopeKind,
    kv_type: TensorType,
    head_norms: bool,
    experts: usize,
    passes: &'static [usize],
) -> Case {
    Case { ty: F32, head_dim, heads, kv_heads, kind, kv_type, head_norms, experts, passes }
}

impl Case {
    const fn of(self, ty: TensorType) -> Case {
        Case { ty, ..self }
    }
}

const N_EMBD: usize = 320;
const N_FF: usize = 416;
const N_VOCAB: usize = 301;
const USED: usize = 2;

pub(super) fn check_layers(device: &Arc<Device>, report: &mut Report) -> Result {
    for c in CASES {
        if report.is_mine() {
            check_case(device, c, report)?;
        }
    }
    Ok(())
}

fn dims(c: &Case) -> Dims {
    Dims {
        n_layers: 2,
        n_blocks: 2,
        expert_bytes: 0,
        n_embd: N_EMBD,
        n_heads: c.heads,
        n_kv_heads: c.kv_heads,
        head_dim: c.head_dim,
        shapes: Vec::new(),
        n_per_block: 0,
        value_of_latent: 0,
        n_ff: N_FF,
        n_experts: c.experts,
        n_experts_used: if c.experts > 0 { USED } else { 0 },
        n_ff_expert: if c.experts > 0 { N_FF } else { 0 },
        n_vocab: N_VOCAB,
        max_batch: 200,
        max_outputs: EXACT_ROWS,
        n_ctx: 500,
        recent: None,
        bfloat: false,
        kv_type: c.kv_type,
        ropes: vec![Rope {
            kind: c.kind,
            freqs: (0..c.head_dim / 2).map(|i| 10000f32.powf(-2.0 * i as f32 / c.head_dim as f32)).collect(),
            magnitude: 1.0,
        }],
        n_mix: 0,
        n_attn: 0,
        recurrent: None,
        beyond: None,
        no_kernel: None,
    }
}

/// One block's matrices.
struct Block {
    q: Matrix,
    k: Matrix,
    v: Matrix,
    q_bias: Matrix,
    o: Matrix,
    norm: Matrix,
    q_norm: Matrix,
    k_norm: Matrix,
    router: Option<Matrix>,
    ffn: Vec<[Matrix; 3]>,
}

impl Block {
    fn random(device: &Arc<Device>, c: &Case, seed: u64) -> Result<Block> {
        let (hd, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let mut n = seed * 100;
        let mut m = |rows, cols| {
            n += 1;
            let ty = if rows == 1 || rows == c.experts { F32 } else { c.ty };
            Matrix::random(device, ty, rows, cols, n)
        };
        let mut ffn = Vec::new();
        for _ in 0..c.experts.max(1) {
            ffn.push([m(N_FF, N_EMBD)?, m(N_FF, N_EMBD)?, m(N_EMBD, N_FF)?]);
        }
        Ok(Block {
            q: m(hd, N_EMBD)?,
            k: m(kv, N_EMBD)?,
            v: m(kv, N_EMBD)?,
            q_bias: m(1, hd)?,
            o: m(N_EMBD, hd)?,
            norm: m(1, N_EMBD)?,
            q_norm: m(1, c.head_dim)?,
            k_norm: m(1, c.head_dim)?,
            router: if c.experts > 0 { Some(m(c.experts, N_EMBD)?) } else { None },
            ffn,
        })
    }
}

const EPS: f32 = 1e-5;

fn norm_of(m: &Matrix) -> Norm {
    Norm { weight: m.weight, eps: EPS }
}

fn rms(x: &[f64], w: &[f32]) -> Vec<f64> {
    x.chunks(w.len())
        .flat_map(|x| {
            let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
            let s = 1.0 / (mean + f64::from(EPS)).sqrt();
            x.iter().zip(w).map(move |(v, w)| v * s * f64::from(*w))
        })
        .collect()
}

fn rotate(x: &mut [f64], d: &Dims, first_pos: usize, heads: usize) {
    let hd = d.head_dim;
    for (i, head) in x.chunks_mut(hd).enumerate() {
        let pos = (first_pos + i / heads) as f32;
        for (p, freq) in d.rope().freqs.iter().enumerate() {
            let (sin, cos) = f64::from(pos * freq).sin_cos();
            let (a, b) = match d.rope().kind {
                RopeKind::Norm => (2 * p, 2 * p + 1),
                RopeKind::Neox => (p, p + hd / 2),
            };
            let (u, v) = (head[a], head[b]);
            head[a] = u * cos - v * sin;
            head[b] = u * sin + v * cos;
        }
    }
}

/// The KV cache of one block: positions × width.
#[derive(Default)]
struct Cache {
    k: Vec<f64>,
    v: Vec<f64>,
}

fn attention(q: &[f64], cache: &Cache, d: &Dims, first_pos: usize) -> Vec<f64> {
    let (hd, kv) = (d.head_dim, d.n_kv_heads * d.head_dim);
    let mut out = vec![0.0; q.len()];
    for (i, (q, o)) in q.chunks(hd).zip(out.chunks_mut(hd)).enumerate() {
        let (t, h) = (i / d.n_heads, i % d.n_heads);
        let at = h / (d.n_heads / d.n_kv_heads) * hd;
        let rows = |c: &'_ [f64], p: usize| c[p * kv + at..p * kv + at + hd].to_vec();
        let scores: Vec<f64> = (0..=first_pos + t)
            .map(|p| {
                let k = rows(&cache.k, p);
                q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>() / (hd as f64).sqrt()
            })
            .collect();
        let big = scores.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - big).exp()).sum();
        for (p, s) in scores.iter().enumerate() {
            let w = (s - big).exp() / sum;
            for (o, v) in o.iter_mut().zip(rows(&cache.v, p)) {
                *o += w * v;
            }
        }
    }
    out
}

fn add(x: &mut [f64], y: &[f64]) {
    for (a, b) in x.iter_mut().zip(y) {
        *a += b;
    }
}

fn feed_forward(m: &[Matrix; 3], h: &[f64]) -> Vec<f64> {
    let (g, u) = (m[0].times(h), m[1].times(h));
    let hidden: Vec<f64> = g.iter().zip(&u).map(|(g, u)| silu(*g) * u).collect();
    m[2].times(&hidden)
}

/// The block in F64; returns the experts of each token.
fn reference(b: &Block, c: &Case, d: &Dims, x: &mut [f64], first_pos: usize, cache: &mut Cache) -> Vec<u32> {
    let h = rms(x, &b.norm.values);
    let mut q = b.q.times(&h);
    for (i, v) in q.iter_mut().enumerate() {
        *v += f64::from(b.q_bias.values[i % b.q_bias.values.len()]);
    }
    let mut k = b.k.times(&h);
    if c.head_norms {
        q = rms(&q, &b.q_norm.values);
        k = rms(&k, &b.k_norm.values);
    }
    rotate(&mut q, d, first_pos, d.n_heads);
    rotate(&mut k, d, first_pos, d.n_kv_heads);
    cache.k.extend(k);
    cache.v.extend(b.v.times(&h));
    let a = attention(&q, cache, d, first_pos);
    add(x, &b.o.times(&a));
    let h = rms(x, &b.norm.values);
    let Some(router) = &b.router else {
        add(x, &feed_forward(&b.ffn[0], &h));
        return Vec::new();
    };
    let mut ids = Vec::new();
    for (t, h) in h.chunks(N_EMBD).enumerate() {
        let scores = router.times(h);
        let mut order: Vec<usize> = (0..c.experts).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        let chosen = &order[..USED];
        let sum: f64 = chosen.iter().map(|e| scores[*e].exp()).sum();
        for e in chosen {
            let y = feed_forward(&b.ffn[*e], h);
            for (x, y) in x[t * N_EMBD..(t + 1) * N_EMBD].iter_mut().zip(y) {
                *x += scores[*e].exp() / sum * y;
            }
            ids.push(*e as u32);
        }
    }
    ids
}

/// The experts of a block.
fn experts(b: &Block) -> Vec<Expert> {
    let of = |(id, m): (usize, &[Matrix; 3])| {
        let [gate, up, down] = m.each_ref().map(|m| m.linear(None));
        Expert { id: id as u32, gate, up, down, how: Activation::Silu }
    };
    b.ffn.iter().enumerate().map(of).collect()
}

/// A block; its experts where they are held (`rest`), or one at a time.
fn run_block(g: &mut CudaBackend, b: &Block, c: &Case, layer: usize, rest: bool) -> Result<Vec<u32>> {
    let (qn, kn) = (norm_of(&b.q_norm), norm_of(&b.k_norm));
    let norms = if c.head_norms { (Some(&qn), Some(&kn)) } else { (None, None) };
    let norm = norm_of(&b.norm);
    let (q, k, v) = (b.q.linear(Some(&b.q_bias)), b.k.linear(None), b.v.linear(None));
    g.qkv(layer, &norm, &q, &k, &v, norms.0, norms.1)?;
    g.attend(layer)?;
    g.attn_output(&b.o.linear(None))?;
    let Some(router) = &b.router else {
        let [gate, up, down] = &b.ffn[0];
        g.ffn(&norm, &gate.linear(None), &up.linear(None), &down.linear(None))?;
        return Ok(Vec::new());
    };
    let params = RouterParams { normalize: true, scale: 1.0 };
    if rest {
        g.mixture(layer, &Routing::Softmax { norm, router: router.weight, params })?;
        return Ok(Vec::new());
    }
    let ids = g.route(&norm, &router.weight, &params)?.to_vec();
    let chosen = |e: &&Expert| ids.contains(&e.id);
    experts(b).iter().filter(chosen).try_for_each(|e| g.expert(e))?;
    g.combine_experts()?;
    Ok(ids)
}

fn check_case(device: &Arc<Device>, c: &Case, report: &mut Report) -> Result {
    let d = dims(c);
    let mut g = CudaBackend::new(device, &d)?;
    let blocks = [Block::random(device, c, 1)?, Block::random(device, c, 2)?];
    let head = Matrix::random(device, F32, N_VOCAB, N_EMBD, 77)?;
    let mut caches = [Cache::default(), Cache::default()];
    let mut rng = Rng::new(3);
    let (mut pos, mut repeated) = (0, 0);
    let table: Vec<PageId> = (0..d.pages() as PageId).collect();
    for (i, n) in c.passes.iter().enumerate() {
        let rows = random_rows(TensorType::Q8_0, n * N_EMBD, 1.5, rng.word());
        let mut x = widen(&values(TensorType::Q8_0, &rows));
        let class = if *n > EXACT_ROWS { Class::Bulk } else { Class::Exact };
        g.begin(&[Run { class, first_pos: pos, rows: *n, table: &table, state: 0 }])?;
        g.embed(&rows, TensorType::Q8_0)?;
        let outputs = (*n).min(3);
        let mut want = Vec::new();
        for (layer, block) in blocks.iter().enumerate() {
            want.push(reference(block, c, &d, &mut x, pos, &mut caches[layer]));
        }
        let mut operations = |g: &mut CudaBackend| -> Result {
            for (layer, (block, want)) in blocks.iter().zip(&want).enumerate() {
                let got = run_block(g, block, c, layer, false)?;
                let wrong = want.iter().zip(&got).filter(|(a, b)| a != b).count();
                if c.experts > 0 && c.ty == F32 {
                    report.check(&format!("experts chosen, {n} tokens"), wrong as f64, 0.0);
                }
            }
            g.keep(&(n - outputs..*n).collect::<Vec<_>>())?;
            g.output_norm(&norm_of(&blocks[0].norm))?;
            g.head(&crate::backend::Linear { weight: head.weight, bias: None }, 0)
        };
        // Passes of one token: the first is recorded, and later ones repeat it.
        if *n > 1 || c.experts > 0 {
            operations(&mut g)?;
        } else if g.begin_stretch()? {
            repeated += 1;
        } else {
            operations(&mut g)?;
            if !g.end_stretch(true)? {
                operations(&mut g)?;
            }
        }
        let got = g.logits()?.to_vec();
        let tail = &x[(n - outputs) * N_EMBD..];
        let want = head.times(&rms(tail, &blocks[0].norm.values));
        let what = format!(
            "blocks {}: head {} x{}/{}, pass {i}: {n} at {pos}{}",
            c.ty,
            c.head_dim,
            c.heads,
            c.kv_heads,
            if c.experts > 0 { ", experts" } else { "" }
        );
        // Halves in the cache, in attention and in the tensor-core products; quantised activations.
        let bound = if c.ty == F32 { 5e-6 } else { 2e-3 };
        report.check(&what, nmse(&got, &want), bound);
        pos += n;
    }
    let single = c.passes.iter().filter(|n| **n == 1).count();
    if c.experts == 0 && single > 1 && Recorder::wanted() {
        report.check("passes of one token not repeated from a recording", (single - 1 - repeated) as f64, 0.0);
    }
    drop(g);
    check_cuts(device, c, &blocks, &head, report)
}

/// Tokens of the sequence that is cut in several ways: prompt and generated ones.
const SEQUENCE: [usize; 2] = [150, 24];
const SMALL_SEQUENCE: [usize; 2] = [70, 6];

/// A row's result depends on no other row of its pass: the same sequence in passes of other sizes gives the same bits.
fn check_cuts(device: &Arc<Device>, c: &Case, blocks: &[Block; 2], head: &Matrix, report: &mut Report) -> Result {
    let d = dims(c);
    let [of_prompt, of_answer] = if report.small { SMALL_SEQUENCE } else { SEQUENCE };
    let all = of_prompt + of_answer;
    let rows = random_rows(TensorType::Q8_0, all * N_EMBD, 1.5, 11);
    let row_bytes = rows.len() / all;
    let mut repeated = 0;
    let mut logits = |prompt: usize, generated: usize, moved: bool, rest: bool| -> Result<Vec<u32>> {
        let mut g = CudaBackend::new(device, &d)?;
        for (layer, block) in blocks.iter().enumerate().filter(|_| rest) {
            let held = g.hold_experts(layer, &experts(block))?;
            assert!(held, "experts of {} that are not held", c.ty);
        }
        let mut out = Vec::new();
        let mut pos = 0;
        let mut table: Vec<PageId> = (0..d.pages() as PageId).collect();
        while pos < all {
            if moved && pos == of_prompt {
                table = move_pages(&mut g, &d, of_prompt)?;
            }
            let (class, n) = match of_prompt.checked_sub(pos) {
                Some(left @ 1..) => (Class::Bulk, left.min(prompt)),
                _ => (Class::Exact, generated.min(all - pos)),
            };
            g.begin(&[Run { class, first_pos: pos, rows: n, table: &table, state: 0 }])?;
            g.embed(&rows[pos * row_bytes..(pos + n) * row_bytes], TensorType::Q8_0)?;
            let last = pos + n >= of_prompt;
            let operations = |g: &mut CudaBackend| -> Result {
                for (layer, block) in blocks.iter().enumerate() {
                    run_block(g, block, c, layer, rest)?;
                }
                if !last {
                    return Ok(());
                }
                // Of the prompt the last row, of the others all.
                if class == Class::Bulk {
                    g.keep(&[n - 1])?;
                }
                g.output_norm(&norm_of(&blocks[0].norm))?;
                g.head(&crate::backend::Linear { weight: head.weight, bias: None }, 0)
            };
            pos += n;
            // With experts that rest nothing waits for the host, so that passes of one token are recorded.
            if !rest || class == Class::Bulk || n > 1 {
                operations(&mut g)?;
            } else if g.begin_stretch()? {
                repeated += 1;
            } else {
                operations(&mut g)?;
                if !g.end_stretch(true)? {
                    operations(&mut g)?;
                }
            }
            if !last {
                continue;
            }
            out.extend(g.logits()?.iter().map(|v| v.to_bits()));
        }
        Ok(out)
    };
    let want = logits(of_prompt, 1, false, false)?;
    let whole = (of_prompt, 1, true);
    let cuts = [(33, 2, false), whole, (1, 8, false), (7, 2, false), (64, 3, false), (33, 5, false), (64, 3, true)];
    let cuts = if report.small { &cuts[..2] } else { &cuts[1..] };
    let resting = cuts.iter().map(|cut| (*cut, true)).filter(|_| c.experts > 0);
    for ((prompt, generated, moved), rest) in cuts.iter().map(|cut| (*cut, false)).chain(resting) {
        let got = logits(prompt, generated, moved, rest)?;
        let other = got.iter().zip(&want).filter(|(a, b)| a != b).count() + got.len().abs_diff(want.len());
        let moved = if moved { " from other pages" } else { "" };
        let rest = if rest { ", experts at rest" } else { "" };
        let what =
            format!("other bits in passes of {prompt}, then {generated}{moved}{rest}: {} head {}", c.ty, c.head_dim);
        report.check(&what, other as f64, 0.0);
    }
    if c.experts > 0 && Recorder::wanted() {
        report.check("passes of experts not repeated from a recording", f64::from(u8::from(repeated == 0)), 0.0);
    }
    Ok(())
}

/// Brings the prompt's pages to other places: whole ones by way of the host, the last one as a fork's copy.
fn move_pages(g: &mut CudaBackend, d: &Dims, prompt: usize) -> Result<Vec<PageId>> {
    let (n, all) = (Pages::of(prompt) as PageId, d.pages() as PageId);
    assert!(all >= 2 * n, "{all} pages");
    let table: Vec<PageId> = (0..n).map(|i| all - 1 - i).collect();
    let mut page = vec![0; g.page_bytes(Layers::Whole)];
    for i in 0..n - 1 {
        g.read_page(Layers::Whole, i, &mut page)?;
        g.write_page(Layers::Whole, table[i as usize], &page)?;
    }
    let positions = prompt % PAGE;
    g.apply(&StateOp::Copy { from: n - 1, to: table[n as usize - 1], positions })?;
    Ok(table)
}

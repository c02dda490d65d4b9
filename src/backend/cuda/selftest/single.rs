//! Operations one by one against those of processors, over several passes, and the bits of rows in passes of other sizes.

use std::sync::Arc;

use super::{F32, Report, Result, Rng, nmse, random_rows, values, widen};
use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::{CudaBackend, Device, DeviceBuffer};
use crate::backend::{
    Act, Activation, Backend, Class, DeltaNet, Dims, EXACT_ROWS, Expert, Gating, KvShape, Latent, Linear, LinearOf,
    Mask, NormKind, NormOf, Op, Recurrent, Rope, RopeKind, Router, Run, Scan, Scores, Weight,
};
use crate::gguf::TensorType;
use crate::state::PageId;

const N_EMBD: usize = 128;
const N_FF: usize = 192;
const N_VOCAB: usize = 101;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const EXPERTS: usize = 8;
const USED: usize = 3;
const N_FF_EXPERT: usize = 64;
/// Rows of each pass. The first ones are all that small shapes want: three tiles of rows, two of keys with a rest, and for
/// generated rows two ranges of keys.
const PASSES: [usize; 7] = [70, 1, 5, 33, 1, 8, 1];
const SMALL_PASSES: usize = 3;

/// A program and its weights, in host memory and on the device. Operations name weights by number.
struct Program {
    name: String,
    ty: TensorType,
    dims: Dims,
    ops: Vec<Op<usize>>,
    /// Gate, up and down of each expert.
    experts: Vec<[LinearOf<usize>; 3]>,
    how: Activation,
    after: Vec<Op<usize>>,
    host: Vec<(Vec<u8>, TensorType, usize, usize)>,
}

impl Program {
    fn new(name: &str, ty: TensorType) -> Program {
        Program {
            name: format!("{name}, {ty}"),
            ty,
            dims: dims(),
            ops: Vec::new(),
            experts: Vec::new(),
            how: Activation::Silu,
            after: Vec::new(),
            host: Vec::new(),
        }
    }

    fn weight(&mut self, ty: TensorType, rows: usize, cols: usize, scale: f32) -> usize {
        let bytes = random_rows(ty, rows * cols, scale, 7 + self.host.len() as u64);
        self.host.push((bytes, ty, rows, cols));
        self.host.len() - 1
    }

    fn matrix(&mut self, rows: usize, cols: usize) -> usize {
        self.weight(self.ty, rows, cols, 2.0 / (cols as f32).sqrt())
    }

    fn vector(&mut self, n: usize) -> usize {
        self.weight(F32, 1, n, 1.5)
    }

    /// Numbers from `from` to 0.
    fn below_zero(&mut self, n: usize, from: f32) -> usize {
        let v = Rng::new(5).floats(n, 0.5).into_iter().map(|v| (v + 0.5) * from);
        self.host.push((v.flat_map(f32::to_le_bytes).collect(), F32, 1, n));
        self.host.len() - 1
    }

    /// One number.
    fn number(&mut self, v: f32) -> usize {
        self.host.push((v.to_le_bytes().to_vec(), F32, 1, 1));
        self.host.len() - 1
    }

    fn linear(&mut self, rows: usize, cols: usize) -> LinearOf<usize> {
        LinearOf { weight: self.matrix(rows, cols), bias: None }
    }

    fn biased(&mut self, rows: usize, cols: usize) -> LinearOf<usize> {
        LinearOf { weight: self.matrix(rows, cols), bias: Some(self.vector(rows)) }
    }

    fn norm(&mut self, kind: NormKind, n: usize, bias: bool) -> NormOf<usize> {
        let weight = Some(self.vector(n));
        NormOf { kind, weight, bias: if bias { Some(self.vector(n)) } else { None }, eps: 1e-5 }
    }

    fn op(&mut self, op: Op<usize>) {
        self.ops.push(op);
    }

    /// A norm of X to H.
    fn normed(&mut self, kind: NormKind) {
        let norm = self.norm(kind, N_EMBD, kind == NormKind::Layer);
        self.op(Op::Norm { to: Act::H, from: Act::X, norm });
    }

    /// Queries, keys and values of `from`.
    fn qkv(&mut self, from: Act) {
        for (to, heads) in [(Act::Q, HEADS), (Act::K, KV_HEADS), (Act::V, KV_HEADS)] {
            let w = self.biased(heads * self.dims.head_dim, N_EMBD);
            self.op(Op::Linear { to, from, w, add: false });
        }
    }
}

fn rope(kind: RopeKind, pairs: usize, magnitude: f32) -> Rope {
    Rope { kind, freqs: (0..pairs).map(|i| 1000f32.powf(-(i as f32) / pairs as f32)).collect(), magnitude }
}

fn dims() -> Dims {
    Dims {
        n_layers: 1,
        n_blocks: 1,
        expert_bytes: 0,
        n_embd: N_EMBD,
        n_heads: HEADS,
        n_kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        shapes: Vec::new(),
        n_per_block: 0,
        value_of_latent: 0,
        n_ff: N_FF,
        n_experts: EXPERTS,
        n_experts_used: USED,
        n_ff_expert: N_FF_EXPERT,
        n_vocab: N_VOCAB,
        max_batch: 200,
        max_outputs: EXACT_ROWS,
        n_ctx: 500,
        recent: None,
        bfloat: false,
        kv_type: F32,
        ropes: vec![rope(RopeKind::Norm, HEAD_DIM / 2, 1.0), rope(RopeKind::Neox, HEAD_DIM / 4, 1.25)],
        n_mix: 3 * N_EMBD,
        n_attn: HEADS * HEAD_DIM,
        recurrent: None,
        beyond: Some("single operations"),
        no_kernel: None,
    }
}

/// Attention with all that may differ, and what comes behind it.
fn attention(ty: TensorType, mask: Mask, cap: f32, sinks: bool) -> Program {
    attention_of(dims(), ty, mask, cap, sinks)
}

/// The same with heads and a cache of other kinds.
fn attention_of(dims: Dims, ty: TensorType, mask: Mask, cap: f32, sinks: bool) -> Program {
    let (head_dim, cache) = (dims.head_dim, dims.kv_type);
    let mut p = Program::new(&format!("attention {mask:?}, cap {cap}, sinks {sinks}, {head_dim}, {cache}"), ty);
    p.dims = dims;
    p.op(Op::Scale { act: Act::X, by: 1.5 });
    p.normed(NormKind::Layer);
    p.qkv(Act::H);
    let whole = p.norm(NormKind::Rms, KV_HEADS * head_dim, false);
    p.op(Op::Norm { to: Act::K, from: Act::K, norm: whole });
    let norm = NormOf { kind: NormKind::Rms, weight: None, bias: None, eps: 1e-5 };
    p.op(Op::Rope { act: Act::Q, rope: 1 });
    p.op(Op::Rope { act: Act::K, rope: 1 });
    p.op(Op::HeadNorm { act: Act::Q, norm });
    p.op(Op::ScaleByPosition { act: Act::Q, by: 0.3, every: 16.0, offset: 1.0 });
    p.op(Op::Store { layer: 0 });
    let sinks = sinks.then(|| p.vector(HEADS));
    // Keys have length `sqrt(head_dim)`, and queries have as well.
    let scores = Scores { scale: Some(3.4 / (head_dim as f32).sqrt()), cap, mask };
    p.op(Op::Attend { layer: 0, scores, sinks });
    let w = p.linear(N_EMBD, HEADS * head_dim);
    p.op(Op::Linear { to: Act::Out, from: Act::Attn, w, add: false });
    let norm = p.norm(NormKind::Rms, N_EMBD, false);
    p.op(Op::Norm { to: Act::Out, from: Act::Out, norm });
    p.op(Op::Scale { act: Act::Out, by: 0.7 });
    p.op(Op::Add { to: Act::X, from: Act::Out });
    p
}

fn feed_forward(ty: TensorType, how: Activation, gated: bool, from: Act) -> Program {
    let mut p = Program::new(&format!("feed-forward {how:?}, gated {gated}, of {from:?}"), ty);
    let table = p.weight(F32, 1, 500 * N_EMBD, 0.5);
    p.op(Op::AddPosition { table });
    if from == Act::H {
        p.normed(NormKind::Rms);
    }
    for to in [Act::Hidden, Act::Up].into_iter().take(if gated { 2 } else { 1 }) {
        let w = p.biased(N_FF, N_EMBD);
        p.op(Op::Linear { to, from, w, add: false });
    }
    p.op(Op::Activate { how, gated, width: N_FF });
    let w = p.biased(N_EMBD, N_FF);
    if from == Act::H {
        p.op(Op::Linear { to: Act::X, from: Act::Hidden, w, add: true });
        return p;
    }
    p.op(Op::Linear { to: Act::Out, from: Act::Hidden, w, add: false });
    let norm = p.norm(NormKind::Rms, N_EMBD, false);
    p.op(Op::AddNormed { norm });
    p
}

/// A router and its experts, behind a feed-forward part with a gate of its own that all rows pass.
fn mixture(ty: TensorType, how: Activation, router: Router, biased: bool) -> Program {
    let mut p = Program::new(&format!("experts {how:?}, {:?}, groups {:?}", router.gating, router.groups), ty);
    p.how = how;
    p.normed(NormKind::Rms);
    for to in [Act::Hidden, Act::Up] {
        let w = p.linear(N_FF, N_EMBD);
        p.op(Op::Linear { to, from: Act::H, w, add: false });
    }
    p.op(Op::Activate { how: Activation::Silu, gated: true, width: N_FF });
    let w = p.linear(N_EMBD, N_FF);
    p.op(Op::Linear { to: Act::Out, from: Act::Hidden, w, add: false });
    let gate = LinearOf { weight: p.weight(F32, 1, N_EMBD, 0.2), bias: None };
    p.op(Op::Linear { to: Act::Beta, from: Act::H, w: gate, add: false });
    p.op(Op::GateOut);
    if router.on_input {
        p.op(Op::Add { to: Act::X, from: Act::Out });
    }
    let weight = p.weight(F32, EXPERTS, N_EMBD, 0.3);
    let w = LinearOf { weight, bias: if biased { Some(p.vector(EXPERTS)) } else { None } };
    let choose = biased.then(|| p.weight(F32, 1, EXPERTS, 0.2));
    p.op(Op::Route { w, choose, how: router });
    for _ in 0..EXPERTS {
        let mut each = |rows, cols| if biased { p.biased(rows, cols) } else { p.linear(rows, cols) };
        let expert = [each(N_FF_EXPERT, N_EMBD), each(N_FF_EXPERT, N_EMBD), each(N_EMBD, N_FF_EXPERT)];
        p.experts.push(expert);
    }
    p.after = match router.on_input {
        true => vec![Op::Combine { to: Act::X, add: true }],
        false => vec![
            Op::Combine { to: Act::Out, add: true },
            Op::Scale { act: Act::Out, by: 0.4 },
            Op::Add { to: Act::X, from: Act::Out },
        ],
    };
    p
}

/// Attention whose queries come with gates.
fn gated(ty: TensorType) -> Program {
    let mut p = Program::new("attention with gates", ty);
    p.normed(NormKind::Rms);
    let w = p.linear(2 * HEADS * HEAD_DIM, N_EMBD);
    p.op(Op::Linear { to: Act::Mix, from: Act::H, w, add: false });
    for to in [Act::K, Act::V] {
        let w = p.linear(KV_HEADS * HEAD_DIM, N_EMBD);
        p.op(Op::Linear { to, from: Act::H, w, add: false });
    }
    p.op(Op::SplitHeads);
    p.op(Op::Store { layer: 0 });
    p.op(Op::Attend { layer: 0, scores: Scores::PLAIN, sinks: None });
    p.op(Op::GateAttn);
    let w = p.linear(N_EMBD, HEADS * HEAD_DIM);
    p.op(Op::Linear { to: Act::X, from: Act::Attn, w, add: true });
    p
}

/// A delta net with `dim` elements a head, in the second of two layers.
fn delta_net(ty: TensorType, dim: usize, tiled: bool) -> Program {
    let mut p = Program::new(&format!("delta net of {dim}, tiled {tiled}"), ty);
    let (n_keys, n_values) = (2, 4);
    let channels = (2 * n_keys + n_values) * dim;
    p.dims.recurrent =
        Some(Recurrent { layers: 2, sequences: 1, taps: 4, channels, n_keys, n_values, dim, state: dim, scans: false });
    (p.dims.n_mix, p.dims.n_attn) = (channels, n_values * dim);
    p.normed(NormKind::Rms);
    let of_heads = if tiled { n_values } else { 2 * n_values };
    for (to, rows) in
        [(Act::Mix, channels), (Act::Gates, n_values * dim), (Act::Beta, of_heads), (Act::Alpha, n_values)]
    {
        if tiled || to != Act::Alpha {
            let w = p.linear(rows, N_EMBD);
            p.op(Op::Linear { to, from: Act::H, w, add: false });
        }
    }
    let w = p.weight(F32, channels, 4, 0.8);
    p.op(Op::Conv { state: 1, w, bias: None });
    let (decay, bias) = (p.below_zero(n_values, -1.5), p.vector(n_values));
    let norm = p.norm(NormKind::Rms, dim, false);
    p.op(Op::DeltaNet(DeltaNet { state: 1, decay, bias, norm, tiled }));
    let w = p.linear(N_EMBD, n_values * dim);
    p.op(Op::Linear { to: Act::X, from: Act::Attn, w, add: true });
    p
}

fn short_conv(ty: TensorType) -> Program {
    let mut p = Program::new("short convolution", ty);
    let sizes = Recurrent {
        layers: 2,
        sequences: 1,
        taps: 3,
        channels: N_EMBD,
        n_keys: 0,
        n_values: 0,
        dim: 0,
        state: 0,
        scans: false,
    };
    p.dims.recurrent = Some(sizes);
    p.normed(NormKind::Rms);
    let w = p.linear(3 * N_EMBD, N_EMBD);
    p.op(Op::Linear { to: Act::Mix, from: Act::H, w, add: false });
    let w = p.weight(F32, N_EMBD, 3, 0.8);
    p.op(Op::ShortConv { state: 1, w });
    let w = p.linear(N_EMBD, N_EMBD);
    p.op(Op::Linear { to: Act::X, from: Act::Attn, w, add: true });
    p
}

/// Blocks with heads of two sizes: normed values, keys that are values, and keys of an earlier block.
fn two_sizes(ty: TensorType) -> Program {
    let mut p = Program::new("heads of two sizes", ty);
    let shapes = [KvShape::new(2, 32), KvShape::new(1, 512)];
    p.dims.n_layers = 2;
    (p.dims.n_kv_heads, p.dims.head_dim, p.dims.shapes) = (2, 512, shapes.to_vec());
    (p.dims.n_attn, p.dims.kv_type) = (HEADS * 512, TensorType::F16);
    p.dims.ropes = vec![rope(RopeKind::Neox, 256, 1.0), rope(RopeKind::Neox, 16, 1.0)];
    let plain = NormOf { kind: NormKind::Rms, weight: None, bias: None, eps: 1e-5 };
    for (layer, shared) in [(0, false), (1, false), (0, true)] {
        let KvShape { heads, dim, .. } = shapes[layer];
        p.normed(NormKind::Rms);
        p.op(Op::Shape(shapes[layer]));
        let w = p.linear(HEADS * dim, N_EMBD);
        p.op(Op::Linear { to: Act::Q, from: Act::H, w, add: false });
        for to in [Act::K, Act::V].into_iter().take(if shared { 0 } else { 2 - layer }) {
            let w = p.linear(heads * dim, N_EMBD);
            p.op(Op::Linear { to, from: Act::H, w, add: false });
        }
        if layer == 1 {
            p.op(Op::Copy { to: Act::V, from: Act::K });
        }
        for act in [Act::Q, Act::K].into_iter().take(if shared { 1 } else { 2 }) {
            let norm = p.norm(NormKind::Rms, dim, false);
            p.op(Op::HeadNorm { act, norm });
        }
        if !shared {
            p.op(Op::HeadNorm { act: Act::V, norm: plain });
        }
        for act in [Act::Q, Act::K].into_iter().take(if shared { 1 } else { 2 }) {
            p.op(Op::Rope { act, rope: 1 - layer });
        }
        if !shared {
            p.op(Op::Store { layer });
        }
        let mask = if layer == 0 { Mask::Window(20) } else { Mask::Full };
        let scores = Scores { scale: Some(4.0 / (dim as f32).sqrt()), cap: 0.0, mask };
        p.op(Op::Attend { layer, scores, sinks: None });
        let w = p.linear(N_EMBD, HEADS * dim);
        p.op(Op::Linear { to: Act::Out, from: Act::Attn, w, add: false });
        let norm = p.norm(NormKind::Rms, N_EMBD, false);
        p.op(Op::AddNormed { norm });
    }
    p
}

/// What a block is given beside X.
fn own_input(ty: TensorType) -> Program {
    let mut p = Program::new("embeddings for each block", ty);
    let (width, all) = (64, 3 * 64);
    (p.dims.n_per_block, p.dims.n_mix) = (all, all);
    let w = p.linear(all, N_EMBD);
    p.op(Op::Linear { to: Act::Mix, from: Act::X, w, add: false });
    p.op(Op::Scale { act: Act::Mix, by: 0.3 });
    let norm = p.norm(NormKind::Rms, width, false);
    p.op(Op::HeadNorm { act: Act::Mix, norm });
    p.op(Op::Scale { act: Act::PerBlock, by: 1.5 });
    p.op(Op::Add { to: Act::PerBlock, from: Act::Mix });
    for part in [2, 0] {
        let w = p.linear(width, N_EMBD);
        p.op(Op::Linear { to: Act::Hidden, from: Act::X, w, add: false });
        p.op(Op::TakePart { part, width });
        p.op(Op::Activate { how: Activation::Gelu, gated: true, width });
        let w = p.linear(N_EMBD, width);
        p.op(Op::Linear { to: Act::Out, from: Act::Hidden, w, add: false });
        let norm = p.norm(NormKind::Rms, N_EMBD, false);
        p.op(Op::Norm { to: Act::Out, from: Act::Out, norm });
        p.op(Op::Add { to: Act::X, from: Act::Out });
        let by = if part == 2 { p.number(0.7) } else { p.vector(N_EMBD) };
        p.op(Op::Multiply { act: Act::X, by });
    }
    p
}

/// Experts beside a dense part: each has a scale of its own, reads X through another norm than the router, and their sum is normed.
fn beside_dense(ty: TensorType) -> Program {
    let mut p = Program::new("experts beside a dense part", ty);
    p.how = Activation::Gelu;
    p.normed(NormKind::Rms);
    for to in [Act::Hidden, Act::Up] {
        let w = p.linear(N_FF, N_EMBD);
        p.op(Op::Linear { to, from: Act::H, w, add: false });
    }
    p.op(Op::Activate { how: Activation::Gelu, gated: true, width: N_FF });
    let w = p.linear(N_EMBD, N_FF);
    p.op(Op::Linear { to: Act::Out, from: Act::Hidden, w, add: false });
    let norm = p.norm(NormKind::Rms, N_EMBD, false);
    p.op(Op::Norm { to: Act::Out, from: Act::Out, norm });
    p.normed(NormKind::Rms);
    p.op(Op::Scale { act: Act::H, by: 0.4 });
    let w = LinearOf { weight: p.weight(F32, EXPERTS, N_EMBD, 0.3), bias: None };
    p.op(Op::Route { w, choose: None, how: Router::softmax(true, 1.0) });
    let by = p.vector(EXPERTS);
    p.op(Op::WeighExperts { by });
    p.normed(NormKind::Rms);
    for _ in 0..EXPERTS {
        let mut each = |rows, cols| p.linear(rows, cols);
        let expert = [each(N_FF_EXPERT, N_EMBD), each(N_FF_EXPERT, N_EMBD), each(N_EMBD, N_FF_EXPERT)];
        p.experts.push(expert);
    }
    let [of_experts, of_both] = [0, 1].map(|_| p.norm(NormKind::Rms, N_EMBD, false));
    let by = p.number(0.7);
    p.after = vec![
        Op::Combine { to: Act::H, add: false },
        Op::Norm { to: Act::H, from: Act::H, norm: of_experts },
        Op::Add { to: Act::Out, from: Act::H },
        Op::Norm { to: Act::Out, from: Act::Out, norm: of_both },
        Op::Add { to: Act::X, from: Act::Out },
        Op::Multiply { act: Act::X, by },
    ];
    p
}

/// Sizes of latent vectors.
#[derive(Clone, Copy, Debug)]
struct OfLatents {
    rank: usize,
    nope: usize,
    rot: usize,
    value: usize,
    absorbed: bool,
}

/// Attention to latent vectors.
fn latent(ty: TensorType, l: OfLatents) -> Program {
    let OfLatents { rank, nope, rot, value, absorbed } = l;
    let mut p = Program::new(&format!("latent vectors of {rank}, {nope} and {rot}, absorbed {absorbed}"), ty);
    let shape = match absorbed {
        true => KvShape { heads: 1, dim: rank + rot, of_keys: rank },
        false => KvShape::new(HEADS, nope + rot),
    };
    (p.dims.n_kv_heads, p.dims.head_dim, p.dims.shapes) = (shape.heads, shape.dim, vec![shape]);
    (p.dims.value_of_latent, p.dims.n_ff) = (value, N_FF.max(rank));
    p.dims.n_mix = HEADS * (nope + rot).max(value);
    p.dims.n_attn = HEADS * shape.dim.max(nope + value);
    p.dims.kv_type = TensorType::F16;
    p.dims.ropes = vec![rope(RopeKind::Norm, rot / 2, 0.8)];
    p.normed(NormKind::Rms);
    for (to, rows) in [(Act::Mix, HEADS * (nope + rot)), (Act::Up, rank), (Act::Hidden, rot)] {
        let w = p.linear(rows, N_EMBD);
        p.op(Op::Linear { to, from: Act::H, w, add: false });
    }
    let norm = p.norm(NormKind::Rms, rank, false);
    p.op(Op::Norm { to: Act::Up, from: Act::Up, norm });
    let (keys, values) = match absorbed {
        true => (Some(p.matrix(HEADS * rank, nope)), Some(p.matrix(HEADS * value, rank))),
        false => {
            let w = p.linear(HEADS * (nope + value), rank);
            p.op(Op::Linear { to: Act::Gates, from: Act::Up, w, add: false });
            (None, None)
        }
    };
    p.op(Op::Latent(Latent { rank, nope, rope: 0, absorbed: keys }));
    p.op(Op::Store { layer: 0 });
    let scores = Scores { scale: Some(0.6 / (nope as f32).sqrt()), ..Scores::PLAIN };
    p.op(Op::Attend { layer: 0, scores, sinks: None });
    p.op(Op::OfLatent { width: value, w: values });
    let w = p.linear(N_EMBD, HEADS * value);
    p.op(Op::Linear { to: Act::X, from: Act::Mix, w, add: true });
    p
}

/// A state space, in the second of two layers.
fn state_space(ty: TensorType, dim: usize, state: usize, groups: usize) -> Program {
    let mut p = Program::new(&format!("state space of {dim} and {state}, {groups} groups"), ty);
    let heads = 4;
    let (inner, channels) = (heads * dim, heads * dim + 2 * groups * state);
    p.dims.recurrent = Some(Recurrent {
        layers: 2,
        sequences: 1,
        taps: 4,
        channels,
        n_keys: groups,
        n_values: heads,
        dim,
        state,
        scans: true,
    });
    (p.dims.n_mix, p.dims.n_attn) = (channels, inner);
    p.normed(NormKind::Rms);
    for (to, rows) in [(Act::Gates, inner), (Act::Mix, channels), (Act::Alpha, heads)] {
        let w = p.linear(rows, N_EMBD);
        p.op(Op::Linear { to, from: Act::H, w, add: false });
    }
    let (w, bias) = (p.weight(F32, channels, 4, 0.8), p.vector(channels));
    p.op(Op::Conv { state: 1, w, bias: Some(bias) });
    let (decay, bias, skip) = (p.below_zero(heads, -1.5), p.vector(heads), p.vector(heads));
    let norm = p.norm(NormKind::Rms, inner, false);
    p.op(Op::Scan(Scan { state: 1, groups, decay, bias, skip, norm }));
    let w = p.linear(N_EMBD, inner);
    p.op(Op::Linear { to: Act::X, from: Act::Attn, w, add: true });
    p
}

/// A delta net whose queries, keys, values and gates come of one projection.
fn packed(ty: TensorType) -> Program {
    let mut p = delta_net(ty, 32, false);
    p.name = format!("delta net of one projection, {ty}");
    let packed = 2 * 2 * 32 + 2 * 4 * 32;
    p.dims.n_mix = packed;
    let w = p.linear(packed, N_EMBD);
    let linear = |op: &Op<usize>| matches!(op, Op::Linear { to: Act::Mix | Act::Gates, .. });
    p.ops.retain(|op| !linear(op));
    // Behind the norm.
    p.ops.insert(1, Op::Linear { to: Act::Mix, from: Act::H, w, add: false });
    p.ops.insert(2, Op::SplitGroups);
    p
}

fn programs(ty: TensorType) -> Vec<Program> {
    let clamped = Activation::ClampedSwiglu { limit: 1.5 };
    let router = |gating| Router { gating, ..Router::softmax(false, 1.0) };
    let grouped = Router { normalize: true, scale: 2.5, groups: (4, 2), ..router(Gating::Sigmoid) };
    vec![
        attention(ty, Mask::Full, 0.0, true),
        attention(ty, Mask::Window(20), 0.0, true),
        attention(ty, Mask::Window(100), 8.0, false),
        attention(ty, Mask::Chunk(48), 0.0, false),
        feed_forward(ty, Activation::Gelu, true, Act::H),
        feed_forward(ty, Activation::Gelu, false, Act::X),
        feed_forward(ty, Activation::ReluSquared, false, Act::H),
        feed_forward(ty, clamped, true, Act::X),
        mixture(ty, clamped, router(Gating::SoftmaxOfChosen), true),
        mixture(ty, Activation::Silu, grouped, true),
        mixture(ty, Activation::Gelu, Router::softmax(true, 0.5), false),
        mixture(ty, Activation::Silu, Router { on_input: true, ..router(Gating::SigmoidOfChosen) }, false),
        gated(ty),
        delta_net(ty, 32, true),
        delta_net(ty, 64, false),
        delta_net(ty, 128, true),
        short_conv(ty),
        two_sizes(ty),
        own_input(ty),
        beside_dense(ty),
        latent(ty, OfLatents { rank: 512, nope: 128, rot: 64, value: 128, absorbed: true }),
        latent(ty, OfLatents { rank: 128, nope: 64, rot: 32, value: 64, absorbed: false }),
        state_space(ty, 64, 128, 1),
        state_space(ty, 40, 16, 2),
        packed(ty),
    ]
}

/// A program's weights where a backend reads them.
struct Bound {
    weights: Vec<Weight>,
    _buffers: Vec<DeviceBuffer>,
}

impl Bound {
    fn on_host(p: &Program) -> Bound {
        let weight = |(bytes, ty, rows, cols): &(Vec<u8>, TensorType, usize, usize)| Weight {
            addr: bytes.as_ptr() as u64,
            ty: *ty,
            rows: *rows,
            cols: *cols,
        };
        Bound { weights: p.host.iter().map(weight).collect(), _buffers: Vec::new() }
    }

    fn on_device(p: &Program, device: &Arc<Device>) -> Result<Bound> {
        let (mut weights, mut buffers) = (Vec::new(), Vec::new());
        for (bytes, ty, rows, cols) in &p.host {
            let buffer = device.alloc(bytes.len() as u64 + 32, "weights")?;
            buffer.write(32, bytes)?;
            weights.push(Weight { addr: buffer.addr() + 32, ty: *ty, rows: *rows, cols: *cols });
            buffers.push(buffer);
        }
        Ok(Bound { weights, _buffers: buffers })
    }

    fn linear(&self, l: &LinearOf<usize>) -> Linear {
        l.map(&mut |i| self.weights[i])
    }

    /// The program over the pass that the backend has begun; returns the experts that were chosen.
    fn run(&self, p: &Program, backend: &mut dyn Backend) -> Result<Vec<u32>> {
        let mut chosen = Vec::new();
        for op in &p.ops {
            backend.op(&op.map(&mut |i| self.weights[i]))?;
            if let Op::Route { .. } = op {
                chosen = backend.chosen().to_vec();
            }
        }
        let mut distinct = chosen.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let experts: Vec<Expert> = distinct
            .iter()
            .map(|&id| {
                let [gate, up, down] = p.experts[id as usize].each_ref().map(|l| self.linear(l));
                Expert { id, gate, up, down, how: p.how }
            })
            .collect();
        if !experts.is_empty() {
            backend.experts(&experts)?;
        }
        for op in &p.after {
            backend.op(&op.map(&mut |i| self.weights[i]))?;
        }
        let norm = NormOf { kind: NormKind::Rms, weight: None, bias: None, eps: 1e-5 };
        backend.op(&Op::Norm { to: Act::H, from: Act::X, norm })?;
        Ok(chosen)
    }
}

/// H of the pass's rows.
fn hidden(g: &CudaBackend, rows: usize) -> Result<Vec<f32>> {
    let mut out = vec![0.0f32; rows * N_EMBD];
    g.engine.ws.norm_f.read(0, &mut out)?;
    Ok(out)
}

fn class_of(rows: usize) -> Class {
    if rows > EXACT_ROWS { Class::Bulk } else { Class::Exact }
}

/// Rows of what each block is given, of so many from position `first` on.
fn given(p: &Program, first: usize, rows: usize) -> Vec<u8> {
    let n = p.dims.n_per_block;
    (first..first + rows).flat_map(|pos| random_rows(F32, n, 1.0, 77 + pos as u64)).collect()
}

/// Begins with the rows of a pass.
fn embed(b: &mut dyn Backend, p: &Program, x: &[u8], first: usize, rows: usize) -> Result {
    b.embed(x, F32)?;
    if p.dims.n_per_block > 0 {
        b.embed_per_block(&given(p, first, rows), F32)?;
    }
    Ok(())
}

/// Backends by their sizes: loading kernels takes longer than the checks do.
struct Backends(Vec<(String, CudaBackend)>);

impl Backends {
    fn of(&mut self, device: &Arc<Device>, dims: &Dims) -> Result<&mut CudaBackend> {
        let key = format!("{dims:?}");
        let at = match self.0.iter().position(|(sizes, _)| *sizes == key) {
            Some(at) => at,
            None => {
                self.0.push((key, CudaBackend::new(device, dims)?));
                self.0.len() - 1
            }
        };
        Ok(&mut self.0[at].1)
    }
}

pub(super) fn check_single(device: &Arc<Device>, report: &mut Report) -> Result {
    let mut backends = Backends(Vec::new());
    let passes = if report.small { &PASSES[..SMALL_PASSES] } else { &PASSES[..] };
    // Inputs in floats and quantised ones; products of every type have been checked.
    let types = [F32, TensorType::Q8_0, TensorType::MXFP4];
    for &ty in if report.small { &types[..2] } else { &types[..] } {
        for p in programs(ty) {
            if !report.is_mine() {
                continue;
            }
            let there = Bound::on_device(&p, device)?;
            let g = backends.of(device, &p.dims)?;
            check_program(g, &there, &p, passes, report)?;
            check_cuts(g, &there, &p, report)?;
        }
        if report.is_mine() {
            check_head(device, ty, backends.of(device, &dims())?, report)?;
        }
    }
    for (head_dim, mask) in [
        (16, Mask::Window(20)),
        (64, Mask::Window(33)),
        (80, Mask::Full),
        (96, Mask::Chunk(48)),
        (128, Mask::Window(100)),
        (256, Mask::Window(70)),
        (512, Mask::Window(70)),
        (512, Mask::Full),
        (112, Mask::Chunk(48)),
    ] {
        if !report.is_mine() {
            continue;
        }
        let wide = Dims { head_dim, kv_type: TensorType::F16, n_attn: HEADS * head_dim, ..dims() };
        let p = attention_of(wide, F32, mask, if head_dim % 80 == 0 { 8.0 } else { 0.0 }, head_dim != 96);
        let there = Bound::on_device(&p, device)?;
        let mut g = CudaBackend::new(device, &p.dims)?;
        check_program(&mut g, &there, &p, passes, report)?;
        check_cuts(&mut g, &there, &p, report)?;
    }
    // Keys and values that are rounded twice, here and there, differ where they lie between two numbers.
    for (head_dim, mask) in [(32, Mask::Window(33)), (128, Mask::Full), (256, Mask::Full), (512, Mask::Chunk(48))] {
        if !report.is_mine() {
            continue;
        }
        let sizes = Dims { head_dim, kv_type: TensorType::Q8_0, n_attn: HEADS * head_dim, ..dims() };
        let p = attention_of(sizes, F32, mask, 0.0, true);
        let there = Bound::on_device(&p, device)?;
        let mut g = CudaBackend::new(device, &p.dims)?;
        check_program(&mut g, &there, &p, passes, report)?;
        check_cuts(&mut g, &there, &p, report)?;
    }
    // Columns that the kernels of experts do not take.
    if report.is_mine() {
        let p = latent(F32, OfLatents { rank: 32, nope: 24, rot: 16, value: 24, absorbed: true });
        let there = Bound::on_device(&p, device)?;
        let mut g = CudaBackend::new(device, &p.dims)?;
        check_program(&mut g, &there, &p, passes, report)?;
        check_cuts(&mut g, &there, &p, report)?;
    }
    // Long enough for ranges of keys of several sizes.
    for (mask, head_dim) in [(Mask::Window(100), HEAD_DIM), (Mask::Chunk(1500), HEAD_DIM), (Mask::Full, 512)] {
        if !report.is_mine() {
            continue;
        }
        let sizes = Dims { head_dim, n_attn: HEADS * head_dim, ..dims() };
        let mut p = attention_of(sizes, F32, mask, 0.0, true);
        (p.dims.n_ctx, p.name) = (if report.small { SMALL_LONG } else { 5000 }, format!("{}, long", p.name));
        let there = Bound::on_device(&p, device)?;
        let prompt = if report.small { 3 } else { 22 };
        let passes: Vec<usize> = std::iter::repeat_n(200, prompt).chain([1, 5, 97, 1, 8]).collect();
        check_program(&mut CudaBackend::new(device, &p.dims)?, &there, &p, &passes, report)?;
    }
    for (head_dim, mask, sinks) in [(64, Mask::Full, false), (128, Mask::Full, true), (128, Mask::Window(900), false)] {
        if !report.is_mine() {
            continue;
        }
        let n_ctx = if report.small { SMALL_LONG } else { 5000 };
        let long = Dims { head_dim, kv_type: TensorType::F16, n_attn: HEADS * head_dim, n_ctx, ..dims() };
        let p = attention_of(long, F32, mask, 0.0, sinks);
        check_divided(&mut CudaBackend::new(device, &p.dims)?, &Bound::on_device(&p, device)?, &p, report)?;
    }
    Ok(())
}

/// Context of the long cases in small shapes: two ranges of a prompt's keys, and a rest.
const SMALL_LONG: usize = 800;

/// A block of attention may have all keys or one range of them: the same bits, in passes of any size.
fn check_divided(g: &mut CudaBackend, there: &Bound, p: &Program, report: &mut Report) -> Result {
    let all = if report.small { 620 } else { 2600 };
    let x = random_rows(F32, all * N_EMBD, 1.5, 12);
    let table: Vec<PageId> = (0..p.dims.pages() as PageId).collect();
    let mut bits = |divided: bool, each: usize| -> Result<Vec<u32>> {
        g.divide_keys = divided;
        let mut out = Vec::new();
        for pos in (0..all).step_by(each) {
            let rows = each.min(all - pos);
            g.begin(&[Run { class: Class::Bulk, first_pos: pos, rows, table: &table, state: 0 }])?;
            g.embed(&x[pos * N_EMBD * 4..(pos + rows) * N_EMBD * 4], F32)?;
            there.run(p, g)?;
            out.extend(hidden(g, rows)?.iter().map(|v| v.to_bits()));
        }
        Ok(out)
    };
    let want = bits(false, 200)?;
    let ways = [(true, 31), (true, 200), (true, 61), (true, 7), (false, 33)];
    for &(divided, each) in if report.small { &ways[..1] } else { &ways[1..] } {
        let other = bits(divided, each)?.iter().zip(&want).filter(|(a, b)| a != b).count();
        let how = if divided { "divided" } else { "whole" };
        report.check(&format!("{}: other bits in passes of {each}, keys {how}", p.name), other as f64, 0.0);
    }
    g.divide_keys = true;
    Ok(())
}

fn check_program(g: &mut CudaBackend, there: &Bound, p: &Program, passes: &[usize], report: &mut Report) -> Result {
    let here = Bound::on_host(p);
    let mut c = CpuBackend::new(p.dims.clone(), 2)?;
    let table: Vec<PageId> = (0..p.dims.pages() as PageId).collect();
    let mut rng = Rng::new(3);
    let mut first_pos = 0;
    for (i, &rows) in passes.iter().enumerate() {
        let x = random_rows(F32, rows * N_EMBD, 1.5, rng.word());
        let runs = [Run { class: class_of(rows), first_pos, rows, table: &table, state: i as u32 & 1 }];
        let mut chosen = Vec::new();
        for (bound, b) in [(&here, &mut c as &mut dyn Backend), (there, &mut *g)] {
            b.begin(&runs)?;
            embed(b, p, &x, first_pos, rows)?;
            chosen.push(bound.run(p, b)?);
        }
        let mut want = Vec::new();
        c.hidden(None, &mut want)?;
        let got = hidden(g, rows)?;
        // Halves in attention, in the cache and in the tensor-core products; quantised activations.
        let bound = match (p.ty, p.dims.kv_type) {
            (F32, TensorType::Q8_0) => 1e-4,
            (F32, _) => 1e-5,
            _ => 2e-3,
        };
        report.check(&format!("{}, pass {i}: {rows} at {first_pos}", p.name), nmse(&got, &widen(&want)), bound);
        if p.ty == F32 {
            let wrong = chosen[0].iter().zip(&chosen[1]).filter(|(a, b)| a != b).count();
            report.check(&format!("{}: experts chosen", p.name), wrong as f64, 0.0);
        }
        first_pos += rows;
    }
    Ok(())
}

fn check_cuts(g: &mut CudaBackend, there: &Bound, p: &Program, report: &mut Report) -> Result {
    // Rows of the sequence that is cut in several ways: prompt and generated ones.
    let (of_prompt, of_answer) = if report.small { (70, 4) } else { (150, 12) };
    let all = of_prompt + of_answer;
    let x = random_rows(F32, all * N_EMBD, 1.5, 11);
    let table: Vec<PageId> = (0..p.dims.pages() as PageId).collect();
    let mut bits = |prompt: usize, generated: usize| -> Result<Vec<u32>> {
        let (mut out, mut pos, mut state) = (Vec::new(), 0, 0);
        while pos < all {
            let (class, rows) = match of_prompt.checked_sub(pos) {
                Some(left @ 1..) => (Class::Bulk, left.min(prompt)),
                _ => (Class::Exact, generated.min(all - pos)),
            };
            g.begin(&[Run { class, first_pos: pos, rows, table: &table, state }])?;
            embed(g, p, &x[pos * N_EMBD * 4..(pos + rows) * N_EMBD * 4], pos, rows)?;
            there.run(p, g)?;
            out.extend(hidden(g, rows)?.iter().map(|v| v.to_bits()));
            (pos, state) = (pos + rows, state ^ 1);
        }
        Ok(out)
    };
    let want = bits(of_prompt, 1)?;
    let cuts = [(33, 3), (1, 8), (7, 2), (64, 3), (33, 5)];
    for &(prompt, generated) in if report.small { &cuts[..1] } else { &cuts[1..] } {
        let other = bits(prompt, generated)?.iter().zip(&want).filter(|(a, b)| a != b).count();
        report.check(&format!("{}: other bits in passes of {prompt}, then {generated}", p.name), other as f64, 0.0);
    }
    Ok(())
}

/// Logits with a scale and a cap, in two slices.
fn check_head(device: &Arc<Device>, ty: TensorType, g: &mut CudaBackend, report: &mut Report) -> Result {
    let mut p = Program::new("head", ty);
    p.normed(NormKind::Layer);
    let first = 40;
    let slices = [first, N_VOCAB - first].map(|rows| p.linear(rows, N_EMBD));
    let there = Bound::on_device(&p, device)?;
    let table: Vec<PageId> = (0..p.dims.pages() as PageId).collect();
    for (rows, outputs) in [(1, 1), (20, 3)] {
        let x = random_rows(F32, rows * N_EMBD, 1.5, 9);
        let run = Run { class: class_of(rows), first_pos: 0, rows, table: &table, state: 0 };
        g.begin(&[run])?;
        g.embed(&x, F32)?;
        g.keep(&(rows - outputs..rows).collect::<Vec<_>>())?;
        g.op(&Op::Outputs)?;
        g.op(&p.ops[0].map(&mut |i| there.weights[i]))?;
        for (first_row, w) in [(0, slices[0]), (first, slices[1])] {
            g.op(&Op::Head { w: there.linear(&w), first_row, scale: 0.5, cap: 2.0 })?;
        }
        let got = g.logits()?.to_vec();
        let h = hidden(g, outputs)?;
        let mut want = Vec::new();
        for h in h.chunks(N_EMBD) {
            for w in slices {
                let (bytes, ty, ..) = &p.host[w.weight];
                let products = values(*ty, bytes);
                let products = products.chunks(N_EMBD).map(|w| w.iter().zip(h).map(|(a, b)| f64::from(a * b)).sum());
                want.extend(products.map(|s: f64| 2.0 * (0.5 * s / 2.0).tanh()));
            }
        }
        report.check(
            &format!("{}, {outputs} of {rows} rows", p.name),
            nmse(&got, &want),
            if ty == F32 { 1e-6 } else { 1e-3 },
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards against a check that fails on a GPU because of the check.
    #[test]
    fn programs_run_on_processors() {
        let mut all: Vec<Program> = [F32, TensorType::Q8_0].into_iter().flat_map(programs).collect();
        let wide = Dims { head_dim: 256, kv_type: TensorType::F16, n_attn: HEADS * 256, ..dims() };
        all.push(attention_of(wide, F32, Mask::Window(70), 0.0, true));
        all.push(latent(F32, OfLatents { rank: 32, nope: 24, rot: 16, value: 24, absorbed: true }));
        for p in all {
            let here = Bound::on_host(&p);
            let mut c = CpuBackend::new(p.dims.clone(), 1).unwrap();
            let table: Vec<PageId> = (0..p.dims.pages() as PageId).collect();
            let (mut first_pos, mut state) = (0, 0);
            for rows in [20, 1, 3] {
                let x = random_rows(F32, rows * N_EMBD, 1.5, rows as u64);
                c.begin(&[Run { class: class_of(rows), first_pos, rows, table: &table, state }]).unwrap();
                embed(&mut c, &p, &x, first_pos, rows).unwrap();
                here.run(&p, &mut c).unwrap();
                let mut h = Vec::new();
                c.hidden(None, &mut h).unwrap();
                let squares: f64 = widen(&h).iter().map(|v| v * v).sum();
                // A norm without weights.
                assert!((squares / (rows * N_EMBD) as f64 - 1.0).abs() < 1e-3, "{}: {squares}", p.name);
                (first_pos, state) = (first_pos + rows, state ^ 1);
            }
        }
    }
}

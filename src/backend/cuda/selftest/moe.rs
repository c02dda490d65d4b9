//! Experts that rest against the same experts one at a time: the bits must be the same, whatever the types, whoever chose
//! which, and however many rows there are.

use std::sync::Arc;

use super::{Matrix, Report, Result, Rng, product_dims};
use crate::backend::cuda::modules::{PLAINS, QUANTS};
use crate::backend::cuda::{CudaBackend, Device};
use crate::backend::{
    Act, Activation, Backend, Class, Dims, EXACT_ROWS, Expert, Gating, Linear, Norm, NormKind, NormOf, Op, Router,
    RouterParams, Routing, Run,
};
use crate::gguf::TensorType;
use crate::state::PageId;

/// Types of gate and up, and of down; inputs and hidden values; experts and choices; and, but for a plain softmax and SwiGLU
/// without biases, how experts are chosen and computed.
struct Case {
    up: TensorType,
    down: TensorType,
    n: usize,
    ff: usize,
    experts: usize,
    used: usize,
    by: Option<By>,
}

/// Another router, with what is added to its chances, and experts with biases; whether their sum is added to X or put to Out.
#[derive(Clone, Copy)]
struct By {
    how: Activation,
    router: Router,
    to: Act,
}

/// Rows of passes. Small shapes have a pass of a batch in part and in full, and of prompts with experts of one and of more tiles.
const ROWS: &[usize] = &[1, 2, 3, 5, 8, 9, 40, 150, 512];
const SMALL_ROWS: &[usize] = &[1, 3, 8, 9, 150];

pub(super) fn check_experts(device: &Arc<Device>, report: &mut Report) -> Result {
    let experts = if report.small { 6 } else { 12 };
    for ty in QUANTS.into_iter().chain(PLAINS) {
        check_case(device, &Case { up: ty, down: ty, n: 512, ff: 256, experts, used: 4, by: None }, report)?;
    }
    // Widths that small shapes have in place of others: as many blocks and lines are left over, and one is as wide.
    let small = report.small;
    let width = |n: usize| match n {
        2048 | 2304 => 768,
        768 | 1280 | 4096 => 256,
        2880 => 96,
        1056 | 1440 => 288,
        _ => n,
    };
    let width = |n: usize| if small { width(n) } else { n };
    let more = [
        (TensorType::Q4_K, TensorType::Q6_K, 2048, 768, 20, 8),
        (TensorType::Q5_K, TensorType::Q8_0, 2304, 1280, 9, 3),
        (TensorType::MXFP4, TensorType::MXFP4, 2880, 2880, 6, 4),
        (TensorType::Q8_0, TensorType::F16, 1056, 1440, 7, 2),
        (TensorType::Q4_K, TensorType::Q4_K, 6144, 4096, 5, 2),
    ];
    for (up, down, n, ff, experts, used) in more {
        let (n, ff) = (width(n), width(ff));
        check_case(device, &Case { up, down, n, ff, experts, used, by: None }, report)?;
    }
    let router = |gating| Router { gating, ..Router::softmax(true, 1.5) };
    let clamped = Activation::ClampedSwiglu { limit: 7.0 };
    let others = [
        (TensorType::MXFP4, 2880, 2880, clamped, router(Gating::SoftmaxOfChosen), Act::X),
        (TensorType::Q4_K, 2048, 768, Activation::Silu, Router { groups: (4, 2), ..router(Gating::Sigmoid) }, Act::X),
        (TensorType::Q8_0, 1056, 1440, Activation::Gelu, Router::softmax(true, 0.5), Act::Out),
        (TensorType::F16, 512, 256, clamped, router(Gating::SigmoidOfChosen), Act::Out),
    ];
    for (ty, n, ff, how, router, to) in others {
        let by = Some(By { how, router, to });
        let (n, ff) = (width(n), width(ff));
        check_case(device, &Case { up: ty, down: ty, n, ff, experts: 12, used: 4, by }, report)?;
    }
    Ok(())
}

fn dims(c: &Case) -> Dims {
    Dims {
        n_layers: 1,
        n_blocks: 2,
        expert_bytes: 0,
        n_embd: c.n,
        n_ff: 0,
        n_experts: c.experts,
        n_experts_used: c.used,
        n_ff_expert: c.ff,
        max_batch: 512,
        n_ctx: 512,
        recent: None,
        bfloat: false,
        beyond: c.by.map(|_| "other routers"),
        ..product_dims()
    }
}

/// A router that sends every row to expert 1, none to expert 2 and the others by chance, for inputs whose mean is positive
/// before they are multiplied by the norm's weights.
fn router(device: &Arc<Device>, c: &Case, norm: &Matrix) -> Result<Matrix> {
    let mut rows = Rng::new(5).floats(c.experts * c.n, 2.0 / (c.n as f32).sqrt());
    for (i, w) in norm.values.iter().enumerate() {
        let along = 12.0 / c.n as f32 * w.signum();
        (rows[c.n + i], rows[2 * c.n + i]) = (along, -along);
    }
    let bytes: Vec<u8> = rows.iter().flat_map(|v| v.to_le_bytes()).collect();
    Matrix::of(device, TensorType::F32, c.experts, c.n, &bytes)
}

fn check_case(device: &Arc<Device>, c: &Case, report: &mut Report) -> Result {
    if !report.is_mine() {
        return Ok(());
    }
    let d = dims(c);
    let mut g = CudaBackend::new(device, &d)?;
    let weight = Matrix::random(device, TensorType::F32, 1, c.n, 3)?;
    let norm = Norm { weight: weight.weight, eps: 1e-5 };
    let router = router(device, c, &weight)?;
    let mut matrices = Vec::new();
    for e in 0..c.experts as u64 {
        matrices.push([
            Matrix::random(device, c.up, c.ff, c.n, 100 + e)?,
            Matrix::random(device, c.up, c.ff, c.n, 200 + e)?,
            Matrix::random(device, c.down, c.n, c.ff, 300 + e)?,
        ]);
    }
    let bias = |n, seed| Matrix::random(device, TensorType::F32, 1, n, seed);
    let biases = [bias(c.ff, 21)?, bias(c.ff, 22)?, bias(c.n, 23)?, bias(c.experts, 24)?];
    let [of_gate, of_up, of_down, choose] = biases.each_ref().map(|m| c.by.map(|_| m.weight));
    let expert = |(id, m): (usize, &[Matrix; 3])| {
        let [gate, up, down] = m.each_ref().map(|m| m.linear(None));
        let how = c.by.map_or(Activation::Silu, |by| by.how);
        let (gate, up) = (Linear { bias: of_gate, ..gate }, Linear { bias: of_up, ..up });
        Expert { id: id as u32, gate, up, down: Linear { bias: of_down, ..down }, how }
    };
    let list: Vec<Expert> = matrices.iter().enumerate().map(expert).collect();
    // The second block's table: the first one's stays as it was allocated.
    let held = g.hold_experts(1, &list)?;
    let name = format!("{}, {} {}x{}, {} of {}", c.up, c.down, c.n, c.ff, c.used, c.experts);
    report.check(&format!("experts held: {name}"), f64::from(u8::from(!held)), 0.0);
    if !held {
        return Ok(());
    }
    let params = RouterParams { normalize: true, scale: 1.5 };
    let table: Vec<PageId> = (0..d.pages() as PageId).collect();
    let x: Vec<f32> = Rng::new(8).floats(512 * c.n, 2.0).iter().map(|v| v + 0.7).collect();
    let mut pass = |rows: usize, held: bool| -> Result<(Vec<u32>, Vec<u32>)> {
        let class = if rows > EXACT_ROWS { Class::Bulk } else { Class::Exact };
        g.begin(&[Run { class, first_pos: 0, rows, table: &table, state: 0 }])?;
        g.engine.ws.x.write(0, &x[..rows * c.n])?;
        let mut ids = Vec::new();
        if let Some(by) = c.by {
            let norm = NormOf { kind: NormKind::Rms, weight: Some(weight.weight), bias: None, eps: 1e-5 };
            g.op(&Op::Norm { to: Act::H, from: Act::X, norm })?;
            let (w, add) = (Linear { weight: router.weight, bias: None }, by.to == Act::X);
            // Experts with scales of their own, which read something else than the router.
            let apart = by.how == Activation::Gelu;
            if apart {
                g.op(&Op::Scale { act: Act::H, by: 0.5 })?;
            }
            if held {
                let (weigh, reads) = (choose.filter(|_| apart), apart.then_some(norm));
                let (how, sum) = (by.router, (by.to, add));
                g.mixture(1, &Routing::By { w, choose, how, weigh, reads, sum })?;
            } else {
                g.op(&Op::Route { w, choose, how: by.router })?;
                ids = g.chosen().to_vec();
                if let Some(by) = choose.filter(|_| apart) {
                    g.op(&Op::WeighExperts { by })?;
                    g.op(&Op::Norm { to: Act::H, from: Act::X, norm })?;
                }
                for e in list.iter().filter(|e| ids.contains(&e.id)) {
                    g.expert(e)?;
                }
                g.op(&Op::Combine { to: by.to, add })?;
            }
        } else if held {
            g.mixture(1, &Routing::Softmax { norm, router: router.weight, params })?;
        } else {
            ids = g.route(&norm, &router.weight, &params)?.to_vec();
            let chosen = |e: &&Expert| ids.contains(&e.id);
            for e in list.iter().filter(chosen) {
                g.expert(e)?;
            }
            g.combine_experts()?;
        }
        let mut got = vec![0.0f32; rows * c.n];
        match c.by {
            Some(By { to: Act::Out, .. }) => g.engine.ws.acts.out.read(0, &mut got)?,
            _ => g.engine.ws.x.read(0, &mut got)?,
        }
        Ok((got.iter().map(|v| v.to_bits()).collect(), ids))
    };
    let mut firsts: [Option<Vec<u32>>; 2] = [None, None];
    for &rows in if report.small { SMALL_ROWS } else { ROWS } {
        let (want, ids) = pass(rows, false)?;
        let (got, _) = pass(rows, true)?;
        let other = want.iter().zip(&got).filter(|(a, b)| a != b).count();
        let still = got.iter().zip(&x).filter(|(a, b)| **a == b.to_bits()).count();
        report.check(&format!("other bits of {rows} rows: {name}"), other as f64, 0.0);
        report.check(&format!("rows left as they were, {rows}: {name}"), still as f64, (rows * c.n / 50) as f64);
        // The first row is the same in every pass of its class.
        let first = &mut firsts[usize::from(rows > EXACT_ROWS)];
        let first = first.get_or_insert_with(|| got[..c.n].to_vec());
        let other = first.iter().zip(&got).filter(|(a, b)| a != b).count();
        report.check(&format!("other bits of a row among {rows}: {name}"), other as f64, 0.0);
        if rows == 512 && c.by.is_none() {
            let of = |id: u32| ids.iter().filter(|i| **i == id).count();
            let wrong = of(1).abs_diff(512) + of(2);
            report.check(&format!("rows of expert 1 and of expert 2: {name}"), wrong as f64, 0.0);
        }
    }
    Ok(())
}

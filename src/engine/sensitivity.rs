//! What would change the speed: the plan made anew for a machine or a model that differs in one thing.

use super::{Forecast, Options};
use crate::gguf::TensorType;
use crate::model::{Model, Role};
use crate::plan::{Home, Machine, Rate};

/// What another machine or model would do.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Change {
    /// What is different.
    pub what: String,
    /// Tokens per second of decode, simulated.
    pub tokens_per_s: f64,
    /// The same as a factor of the plan's own.
    pub factor: f64,
}

const GIB: u64 = 1 << 30;
/// What pinned copies reach on Gen 5 x16 (docs/benchmarks.md).
const GEN5_X16: f64 = 54e9;

/// Tokens per second for each change that makes sense for `base`, the best first.
pub fn sensitivity(model: &Model, machine: &Machine, options: &Options, base: &Forecast) -> Vec<Change> {
    let Some(now) = base.prediction.simulated.map(|s| s.seconds) else { return Vec::new() };
    let seconds = |model: &Model, machine: &Machine, options: &Options| {
        Forecast::new(model, machine, options, 1).ok()?.prediction.simulated.map(|s| s.seconds)
    };
    let mut changes = Vec::new();
    let mut add = |what: String, s: Option<f64>| {
        changes.extend(s.map(|s| Change { what, tokens_per_s: 1.0 / s, factor: now / s }));
    };
    for (what, other) in machines(machine, base) {
        add(what, seconds(model, &other, options));
    }
    for (what, other, given) in rooms(machine, options, base) {
        add(what, seconds(model, &other, &given));
    }
    if options.tiers.is_some() {
        let free = Options { tiers: None, stacked: false, ..options.clone() };
        add("tiers chosen by the plan".into(), seconds(model, machine, &free));
    }
    let smaller = q4_k_m(model);
    let bytes = |m: &Model| m.units.iter().map(|u| u.bytes()).sum::<u64>() as f64;
    // Beside what is requantised that is hardly less.
    if options.requant.is_none() && bytes(&smaller) < bytes(model) * 0.95 {
        add("the model in Q4_K_M".into(), seconds(&smaller, machine, options));
    }
    changes.sort_by(|a, b| b.factor.total_cmp(&a.factor));
    changes
}

/// Machines with one faster link.
fn machines(machine: &Machine, base: &Forecast) -> Vec<(String, Machine)> {
    let mut all = Vec::new();
    let (_, on_storage) = base.tier(Home::C);
    if let Some(s) = machine.storage.as_ref().filter(|_| on_storage > 0) {
        let mut more = machine.clone();
        more.storage.iter_mut().for_each(|s| s.drives += 1);
        let what = if s.drives == 1 { "a second drive".into() } else { format!("{} drives", s.drives + 1) };
        all.push((what, more));
    }
    if machine.gpu.as_ref().is_some_and(|g| g.link.bytes_per_s() < 0.9 * GEN5_X16) && base.based.plan.device_slots > 0 {
        let mut wide = machine.clone();
        let link = Rate::guess(GEN5_X16, "PCIe Gen 5 x16");
        wide.gpu.iter_mut().for_each(|g| g.link = link.clone());
        all.push(("a PCIe Gen 5 x16 slot".into(), wide));
    }
    all
}

/// More memory, where the plan is free to use it.
fn rooms(machine: &Machine, options: &Options, base: &Forecast) -> Vec<(String, Machine, Options)> {
    let mut all = Vec::new();
    if options.tiers.is_some() {
        return all;
    }
    let has = |h| base.tier(h).0 > 0;
    if machine.gpu.is_some() && (has(Home::B) || has(Home::C)) {
        let mut more = machine.clone();
        more.gpu.iter_mut().for_each(|g| g.vram += 4 * GIB);
        let given = Options { vram: options.vram.map(|v| v + 4 * GIB), ..options.clone() };
        all.push(("4 GiB more VRAM".into(), more, given));
    }
    if has(Home::C) {
        let mut more = machine.clone();
        more.ram.size += 16 * GIB;
        more.ram.available = more.ram.available.map(|a| a + 16 * GIB);
        more.ram.budget = None;
        let given = Options { ram: options.ram.map(|r| r + 16 * GIB), ..options.clone() };
        all.push(("16 GiB more RAM".into(), more, given));
    }
    all
}

/// The model as the recipe of Q4_K_M mixes its types: Q6_K for the head and, in the first and last eighth
/// of the blocks and every third between, for values and down; Q4_K for the rest.
fn q4_k_m(model: &Model) -> Model {
    let (n, eighth) = (model.hparams.n_layers, model.hparams.n_layers / 8);
    let more = |i: usize| i < eighth || i >= 7 * n / 8 || (i - eighth) % 3 == 2;
    model.retyped(|role, block| match (role, block) {
        (Role::Head, _) => TensorType::Q6_K,
        (Role::Value | Role::Down, Some(i)) if more(i) => TensorType::Q6_K,
        _ => TensorType::Q4_K,
    })
}

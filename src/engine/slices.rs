//! Feed-forward parts cut between two sites: whether, and where.

use super::layouts::{Alignments, Sizes, make_plan};
use super::sites::Sites;
use super::{Options, Slices};
use crate::model::{Model, SLICE_PARTS, UnitKind, UnitSpec};
use crate::plan::{Home, Plan, SiteRates, assign, best_slice};

/// A pass must take no more than this share of its time for parts to be cut: prompts take a little longer with cut ones, and loading
/// reads what is cut by columns twice.
const WORTH: f64 = 0.95;

/// A warning where parts were to be cut and are not.
pub fn not_cut(asked: Slices, cut: Option<u32>) -> Option<String> {
    let Slices::Of(part) = asked else { return None };
    cut.is_none().then(|| {
        format!(
            "--ffn-slices {:.0}: parts stay whole; they are cut where a GPU and processors next to it compute (no --site gpu or --exact), not all fits in VRAM, all fits in VRAM and RAM together (no --tiers), nothing is requantised, and the model has feed-forward parts without experts, biases or other steps than SwiGLU, of which that part is a block of columns at least",
            f64::from(part) / f64::from(SLICE_PARTS) * 100.0
        )
    })
}

/// A model whose feed-forward parts are cut.
pub(super) struct Sliced {
    /// Parts of each hidden state that processors have, of [`SLICE_PARTS`].
    pub part: u32,
    /// It, with slices in the place of parts.
    pub model: Model,
    /// How its units lie.
    pub sizes: Sizes,
}

/// The model with its feed-forward parts cut, where that is asked for or makes a pass of one token shorter by these rates; `None` where
/// it stays as it is. Weights may take `room` bytes of a device's memory.
pub(super) fn slices_or_not(
    model: &Model,
    sizes: &Sizes,
    room: u64,
    rates: Option<SiteRates>,
    options: &Options,
    alignment: Alignments,
) -> Option<Sliced> {
    // Counts of blocks per tier are of whole parts, and what is requantised is cut nowhere.
    if options.sites == Sites::One || options.tiers.is_some() || options.requant.is_some() {
        return None;
    }
    let part = match options.slices {
        Slices::Off => return None,
        Slices::Of(part) => part,
        Slices::Auto if options.sites == Sites::Both => return None,
        Slices::Auto => {
            let plan = make_plan(model, sizes, Some(room), 0, options).ok()?;
            best(model, &plan, &rates?.rounded())?
        }
    };
    let model = model.sliced(part)?;
    let sizes = Sizes::new(&model, None, options.threads, alignment);
    // Pieces lie in memory: a drive has whole rows.
    let in_memory = Options { storage: false, ..options.clone() };
    let plan = make_plan(&model, &sizes, Some(room), 0, &in_memory).ok()?;
    let theirs = |(u, home): (&UnitSpec, &Home)| !matches!(u.kind, UnitKind::Slice(_)) || *home == Home::B;
    model.units.iter().zip(&plan.homes).all(theirs).then_some(Sliced { part, model, sizes })
}

/// The part of hidden states that processors are to have; `None` where whole parts are as good.
fn best(model: &Model, plan: &Plan, rates: &SiteRates) -> Option<u32> {
    let is_part = |u: usize| matches!(model.units[u].kind, UnitKind::FeedForward(_));
    let all = 0..model.units.len();
    if plan.homes.contains(&Home::C) || all.clone().any(|u| plan.homes[u] != Home::A && !is_part(u)) {
        return None;
    }
    let bytes =
        |wanted: &dyn Fn(usize) -> bool| all.clone().filter(|u| wanted(*u)).map(|u| model.units[u].bytes()).sum();
    let in_ram: Vec<u64> = all.clone().filter(|&u| plan.homes[u] == Home::B).map(|u| model.units[u].bytes()).collect();
    if in_ram.is_empty() {
        return None;
    }
    let (others, parts): (u64, u64) = (bytes(&|u| !is_part(u)), bytes(&is_part));
    let here: u64 = bytes(&|u| is_part(u) && plan.homes[u] == Home::A);
    let divided = assign(&in_ram, 0, others + here, rates);
    let computed: u64 = in_ram.iter().zip(&divided).filter(|(_, c)| **c).map(|(b, _)| b).sum();
    let k = divided.iter().filter(|c| **c).count();
    let carried = in_ram.iter().sum::<u64>() - computed;
    let whole = rates.pass_s(computed, k, carried, others + here);
    let (part, seconds) = best_slice(others, (parts, here), all.filter(|u| is_part(*u)).count(), SLICE_PARTS, rates)?;
    (seconds <= whole * WORTH).then_some(part)
}

//! Which units processors next to a device compute from RAM.

use super::hits::slot_hits;
use super::reuse::share_beside_slots;
use super::sizes::unit_sizes;
use super::steps::schedule;
use super::weights::Beside;
use super::{Options, Sites};
use crate::backend::{Class, Share, SlotsAt};
use crate::flow::Step;
use crate::memory::Region;
use crate::model::{Model, UnitKind};
use crate::plan::{self, Costs, Home, Plan, SiteRates, UnitWork, assign};

/// Whether each unit is one that processors can compute in RAM: a feed-forward part by itself, a slice of one, or an expert.
fn computable(model: &Model) -> Vec<bool> {
    let mut of = vec![false; model.units.len()];
    for stage in &model.stages {
        match model.units[stage.unit].kind {
            UnitKind::FeedForward(_) => of[stage.unit] = stage.takes_x_alone(),
            UnitKind::Slice(_) => of[stage.unit] = true,
            _ => {}
        }
        let Some(experts) = &stage.experts else { continue };
        // What experts are handed is not weighed.
        let here = !model.hparams.router.on_input;
        for [gate, ..] in &experts.list {
            of[gate.weight.unit] = here;
        }
    }
    of
}

/// The units that processors compute; `None` if there are none.
fn choose(model: &Model, plan: &Plan, sites: Sites, rates: &dyn Fn() -> SiteRates) -> Option<Vec<bool>> {
    if sites == Sites::One {
        return None;
    }
    let mut chosen = computable(model);
    let cached = plan.cache_of(&unit_sizes(model));
    for (u, c) in chosen.iter_mut().enumerate() {
        *c &= plan.homes[u] == Home::B || cached[u].is_some();
    }
    if !chosen.contains(&true) {
        return None;
    }
    if sites == Sites::Auto {
        let routed = |u: usize| matches!(model.units[u].kind, UnitKind::Expert { .. });
        let bytes = |u: usize| model.units[u].bytes();
        // Which experts a token wants is not known ahead, so that no link can bring them in time; and slices were cut for processors.
        let slice = |u: usize| matches!(model.units[u].kind, UnitKind::Slice(_));
        let parts: Vec<usize> = (0..chosen.len()).filter(|&u| chosen[u] && !routed(u) && !slice(u)).collect();
        let sizes: Vec<u64> = parts.iter().map(|&u| bytes(u)).collect();
        let carried = |u: &usize| plan.homes[*u] != Home::A && !chosen[*u] && !routed(*u);
        let others: u64 = (0..chosen.len()).filter(carried).map(bytes).sum();
        let here: u64 = (0..chosen.len()).filter(|&u| plan.homes[u] == Home::A && !routed(u)).map(bytes).sum();
        let divided = assign(&sizes, others, here, &rates().rounded());
        for (unit, computed) in parts.into_iter().zip(divided) {
            chosen[unit] = computed;
        }
    }
    chosen.contains(&true).then_some(chosen)
}

/// What the session's weights need to know of them. `in_ram` are the regions of units that rest in RAM.
pub(super) fn beside(
    model: &Model,
    plan: &Plan,
    division: &Division,
    parts: Vec<f64>,
    in_ram: &[Option<Region>],
    apart: Vec<u64>,
    slots: Vec<Option<SlotsAt>>,
) -> Beside {
    let chosen = &division.units[..];
    let steps = |class: Class| {
        let rests = |u: usize| class == Class::Exact && chosen[u] && plan.homes[u] == Home::B;
        let streams = |u: usize| plan.homes[u] != Home::A && !rests(u);
        schedule(model, &streams)
    };
    let address =
        |(region, chosen): (&Option<Region>, &bool)| region.as_ref().filter(|_| *chosen).map(|r| r.addr() as u64);
    let steps = [steps(Class::Exact), steps(Class::Bulk)];
    Beside {
        units: in_ram.iter().zip(chosen).map(address).collect(),
        cached: chosen.iter().zip(&plan.homes).map(|(c, home)| *c && *home == Home::C).collect(),
        apart,
        holes: steps.each_ref().map(|s| s.contains(&Step::Hole)),
        steps,
        // What the flow begins with.
        class: Class::Bulk,
        share: division.share,
        divided: division.divided.clone(),
        parts,
        slots,
        each_pass_bytes: (0..chosen.len())
            .filter(|&u| chosen[u] && !matches!(model.units[u].kind, UnitKind::Expert { .. }))
            .map(|u| model.units[u].bytes())
            .sum(),
    }
}

/// How many of a row's experts in RAM are for processors, so that they end together with a link that brings the others to the
/// device: in steps of a twentieth, as rates are. `None` where they have none. `units` are what they can compute. Where the device
/// keeps experts in slots, the link brings those that are not there, as `hits` expects, and processors have as many whole choices
/// as make the layer shortest.
fn share(model: &Model, units: &[bool], rates: &dyn Fn() -> SiteRates, hits: Option<f64>) -> Option<Share> {
    let routed = |u: &usize| matches!(model.units[*u].kind, UnitKind::Expert { .. });
    if !(0..units.len()).any(|u| units[u] && routed(&u)) {
        return None;
    }
    let rates = rates().rounded();
    if let Some(hits) = hits {
        return Some(share_beside_slots(model, &rates, hits));
    }
    let twentieths = (20.0 * rates.ram / (rates.ram + rates.link)).round();
    Some(Share((twentieths * 256.0 / 20.0).round() as u32))
}

/// What processors next to a device compute of a plan while tokens are generated.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Division {
    /// By unit, whether they compute it in RAM; of divided experts, those that rest there.
    pub units: Vec<bool>,
    /// By unit, whether it is of a layer whose experts in RAM are divided between them and the link.
    pub divided: Vec<bool>,
    /// How many of a row's choices in RAM are theirs in those layers.
    pub share: Option<Share>,
}

impl Division {
    /// The division of a session with these options; `None` where processors have nothing to do. `rates` are asked for where it
    /// follows from them.
    pub fn new(model: &Model, plan: &Plan, options: &Options, rates: &dyn Fn() -> SiteRates) -> Option<Division> {
        let units = choose(model, plan, options.sites, rates)?;
        let hits = || slot_hits(model, plan, options);
        let given = options.repeat.as_ref().and_then(|r| r.slot_share());
        let share = given.or_else(|| share(model, &units, rates, hits()));
        Some(Division::of(model, plan, units, share))
    }

    /// The division where processors compute these units.
    fn of(model: &Model, plan: &Plan, units: Vec<bool>, share: Option<Share>) -> Division {
        let mut divided = vec![false; units.len()];
        for stage in model.stages.iter().filter(|_| share.is_some()) {
            let Some(experts) = &stage.experts else { continue };
            let layer: Vec<usize> = experts.list.iter().map(|l| l[0].weight.unit).collect();
            let in_ram = |u: &usize| plan.homes[*u] == Home::B && units[*u];
            // All of a layer that is divided rest, and some of them in RAM.
            let rest = layer.iter().all(|u| plan.homes[*u] == Home::A || in_ram(u));
            if rest && layer.iter().any(in_ram) {
                layer.iter().for_each(|u| divided[*u] = true);
            }
        }
        Division { units, divided, share }
    }

    /// The division as the simulator sees it.
    pub fn timed(&self, units: &[UnitWork], rates: &SiteRates, costs: &Costs) -> plan::Beside {
        plan::Beside {
            units: self.units.clone(),
            divided: self.divided.clone(),
            share: self.share,
            unit_s: units.iter().map(|u| u.on_processors_s(rates.ram)).collect(),
            hand_over_s: [costs.hand_over.s(), costs.hand_over_loaded.s()],
            experts_s: costs.experts_beside.s(),
        }
    }

    /// By unit, the part of its uses that processors compute.
    pub fn parts(&self, units: &[UnitWork]) -> Vec<f64> {
        let Division { units: of_host, divided, share } = self.clone();
        plan::Beside { units: of_host, divided, share, ..plan::Beside::default() }.parts(units)
    }
}

/// A plan and a division that move as many bytes and give processors as many choices as these do where a device keeps experts in
/// slots, of which it finds `hits`: experts that are found live there.
pub(super) fn as_living(
    model: &Model,
    plan: &Plan,
    division: Option<Division>,
    hits: Option<f64>,
) -> (Plan, Option<Division>) {
    let (mut plan, mut division) = (plan.clone(), division);
    let (Some(hits), Some(d)) = (hits, &mut division) else { return (plan, division) };
    let used = model.hparams.n_experts_used;
    let of_host = d.share.map_or(used, |s| s.of(used)) as f64;
    let in_ram = of_host + (used as f64 - of_host) * (1.0 - hits);
    for stage in &model.stages {
        let Some(experts) = &stage.experts else { continue };
        let n = experts.list.len();
        let rest = (n as f64 * in_ram / used.max(1) as f64).round() as usize;
        for (i, l) in experts.list.iter().enumerate() {
            if (i + 1) * rest / n == i * rest / n {
                let unit = l[0].weight.unit;
                (plan.homes[unit], d.units[unit]) = (Home::A, false);
            }
        }
    }
    d.share = Some(Share((of_host / in_ram.max(1e-9) * 256.0).round().min(256.0) as u32));
    (plan, division)
}

/// The plan as passes of exact rows see it: what processors compute in RAM is brought nowhere.
pub(super) fn as_exact(plan: &Plan, beside: Option<&[bool]>) -> Plan {
    let mut plan = plan.clone();
    for (home, _) in plan.homes.iter_mut().zip(beside.unwrap_or(&[])).filter(|(_, b)| **b) {
        if *home == Home::B {
            *home = Home::A;
        }
    }
    plan
}

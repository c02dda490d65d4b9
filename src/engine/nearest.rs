//! What would fit in place of options that do not: the advice of a refusal.

use super::forecast::{DIRECT, blocks_of, planned, ram_budget};
use super::layouts::Sizes;
use super::start::requantised;
use super::works::works;
use super::{Options, Slices};
use crate::backend::BackendKind;
use crate::model::Model;
use crate::plan::{Home, Machine, Tiers, format_at_least};

/// Of what a machine can spare, what counts for advice: by the time that it is followed, a little less may be free.
const ADVICE_SHARE: u64 = 97;
/// Least context that is recommended.
const CTX_ADVISED_MIN: usize = 128;
/// Fewest tokens of a pass that are recommended.
const BATCH_ADVISED_MIN: usize = 32;
/// Most `--ram` that is recommended, in MiB.
const RAM_ADVISED_MAX: u64 = 1 << 30;

/// What would fit in place of options that do not, as a sentence; `None` if nothing was found.
pub fn nearest(model: &Model, machine: &Machine, options: &Options) -> Option<String> {
    let requant = requantised(model, options).ok()?;
    let sizes = Sizes::new(model, requant.as_ref(), options.threads, &|_| DIRECT);
    let mut tight = machine.clone();
    tight.ram.budget = ram_budget(machine).map(|b| b / 100 * ADVICE_SHARE);
    // Cut or not, as much fits.
    let whole = |o: &Options| Options { slices: Slices::Off, ..o.clone() };
    let plan = |o: &Options| planned(model, &tight, &whole(o), &sizes).ok().map(|p| p.plan);
    let fits = |o: &Options| plan(o).is_some();
    if options.tiers.is_some()
        && let Some(p) = plan(&Options { tiers: None, ..options.clone() })
        && let Some(t) = tiers_near(&blocks_of(&works(model, &sizes.layouts), &p.homes), &|tiers| {
            fits(&Options { tiers: Some(tiers), ..options.clone() })
        })
    {
        return Some(format!("--tiers {}:{}:{} fits", t.a, t.b, t.c));
    }
    if options.n_buffers.is_some_and(|n| n > 2) && fits(&Options { n_buffers: Some(2), ..options.clone() }) {
        return Some("--n-buffers 2 fits".into());
    }
    let least_ctx = CTX_ADVISED_MIN.max(options.prompt_ctx);
    let mut n_ctx = options.n_ctx;
    while n_ctx > least_ctx {
        n_ctx = (n_ctx / 2).max(least_ctx);
        if fits(&Options { n_ctx, ..options.clone() }) {
            return Some(format!("--ctx {n_ctx} fits"));
        }
    }
    let mut max_batch = options.max_batch.min(options.n_ctx);
    while max_batch > BATCH_ADVISED_MIN && options.repeat.is_none() {
        max_batch = (max_batch / 2).max(BATCH_ADVISED_MIN);
        if fits(&Options { max_batch, longest_prompt: None, ..options.clone() }) {
            return Some(format!("--batch {max_batch} fits"));
        }
    }
    if !options.storage && fits(&Options { storage: true, ..options.clone() }) {
        return Some("without --tier-c none it fits, with the rest on storage".into());
    }
    let with_ram = |mib: u64| fits(&Options { ram: Some(mib << 20), ..options.clone() });
    if let Some(mib) = least(options.ram.unwrap_or(0) >> 20, RAM_ADVISED_MAX, with_ram) {
        return Some(format!("--ram {} would fit", format_at_least(mib << 20)));
    }
    fits(&Options { backend: BackendKind::Cpu, ..options.clone() }).then(|| "--backend cpu fits".into())
}

/// Bytes of VRAM that would do in addition to what `options` and the machine leave; `None` where more of it changes nothing.
pub fn missing_vram(model: &Model, machine: &Machine, options: &Options) -> Option<u64> {
    let requant = requantised(model, options).ok()?;
    let sizes = Sizes::new(model, requant.as_ref(), options.threads, &|_| DIRECT);
    let gpu = machine.gpu.as_ref()?;
    let free = gpu.vram.saturating_sub(gpu.vram_taken);
    let have = options.vram.map_or(free, |vram| vram.min(free));
    let with_vram = |mib: u64| {
        let mut more = machine.clone();
        more.gpu.iter_mut().for_each(|g| g.vram = g.vram_taken + (mib << 20));
        let vram = options.vram.map(|_| mib << 20);
        planned(model, &more, &Options { vram, slices: Slices::Off, ..options.clone() }, &sizes).is_ok()
    };
    let needed = least(have >> 20, RAM_ADVISED_MAX, with_vram)? << 20;
    needed.checked_sub(have).filter(|n| *n > 0)
}

/// Counts of blocks near those of `homes` that fit. Where the plan is free, both parts of a block may have other homes,
/// so the counts of one part alone may be too large.
fn tiers_near(homes: &[Home], fits: &dyn Fn(Tiers) -> bool) -> Option<Tiers> {
    let count = |home| homes.iter().filter(|h| **h == home).count();
    let mut t = Tiers { a: count(Home::A), b: count(Home::B), c: count(Home::C) };
    loop {
        if fits(t) {
            return Some(t);
        }
        match &mut t {
            Tiers { b, .. } if *b > 0 => *b -= 1,
            Tiers { a, .. } if *a > 0 => *a -= 1,
            _ => return None,
        }
        t.c += 1;
    }
}

/// The least number above `low`, up to `high`, for which `fits` holds, which holds from there on.
fn least(mut low: u64, high: u64, fits: impl Fn(u64) -> bool) -> Option<u64> {
    let mut top = low.max(1);
    while !fits(top) {
        low = top;
        top = top.checked_mul(2).filter(|n| *n <= high)?;
    }
    while top - low > 1 {
        let mid = low + (top - low) / 2;
        if fits(mid) { top = mid } else { low = mid }
    }
    Some(top)
}

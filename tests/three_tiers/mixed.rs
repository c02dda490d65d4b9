//! Every architecture with sites, tiers, frames, buffers and cuts of the prompt mixed at random by seed: the bits of processors
//! alone, since here all sites have the same kernels, and the same plan id is the same sites again, with caches cold and warm.
//!
//! The architectures of `common` always; with `NT_ARCH_MODELS=DIR` all files there, which
//! `tests/fidelity/arch/synth_arch.py --all DIR` writes: one for each preset. `NT_SEEDS` is how many mixtures of each (6).

use super::*;
use std::path::PathBuf;

use common::families;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tokens of the prompt, and rows of each pass behind it.
const PROMPT: usize = 21;
const GENERATED: [usize; 5] = [1, 1, 3, 1, 1];

/// Logits of a prompt in chunks of `batch`, and of passes behind it.
fn logits_in(session: &mut Session, batch: usize) -> Result<Vec<f32>, EngineError> {
    session.truncate(0);
    let token = |i: usize| (i * 37 % 250) as u32;
    let prompt: Vec<u32> = (0..PROMPT).map(token).collect();
    let mut all = Vec::new();
    for chunk in prompt.chunks(batch) {
        session.eval(chunk, Class::Bulk, Outputs::All, &|| false)?;
        all.extend_from_slice(session.logits()?);
    }
    let mut at = PROMPT;
    for rows in GENERATED {
        let tokens: Vec<u32> = (at..at + rows).map(token).collect();
        session.eval(&tokens, Class::Exact, Outputs::All, &|| false)?;
        all.extend_from_slice(session.logits()?);
        at += rows;
    }
    Ok(all)
}

/// Any placement of a model with so many blocks and bytes.
fn mixture(rng: &mut ChaCha8Rng, layers: usize, bytes: u64) -> Options {
    let mut o = options();
    o.sites = [Sites::One, Sites::Both, Sites::Both, Sites::Auto][rng.random_range(0..4)];
    o.n_buffers = [None, Some(rng.random_range(2..6))][rng.random_range(0..2)];
    o.max_batch = rng.random_range(3..=16);
    o.outputs = o.max_batch;
    o.kv_type = [TensorType::F32, TensorType::F16][rng.random_range(0..2)];
    o.caches = rng.random_range(0..4) > 0;
    o.stacked = rng.random_range(0..4) == 0;
    o.more_frames = rng.random_range(0..2) == 0;
    o.reader = [ReaderKind::Auto, ReaderKind::Pread][rng.random_range(0..2)];
    match rng.random_range(0..3) {
        0 => {
            let a = rng.random_range(0..=layers);
            let b = rng.random_range(0..=layers - a);
            o.tiers = Some(Tiers { a, b, c: layers - a - b });
        }
        n => {
            let part = |rng: &mut ChaCha8Rng| bytes / 100 * rng.random_range(15..110);
            o.vram = Some((300 << 10) + part(rng));
            o.ram = Some(if n == 1 { 64 << 20 } else { (400 << 10) + part(rng) });
        }
    }
    o
}

/// Whether a device may be called ahead of: nothing of a pass of generated tokens comes through frames, which are given back when it
/// is called.
fn stays(session: &Session) -> bool {
    let in_place = |(home, unit): (&Home, &UnitSpec)| match unit.kind {
        UnitKind::FeedForward(_) => *home != Home::C,
        _ => *home == Home::A,
    };
    let beside = session.beside().unwrap_or_default();
    let of_host = |i: usize| beside.get(i) == Some(&true);
    let all = session.homes().iter().zip(&session.model().units);
    all.enumerate().all(|(i, u)| in_place(u) && (*u.0 == Home::A || of_host(i)))
}

/// What came of mixtures.
#[derive(Debug, Default)]
struct Seen {
    refused: usize,
    handed: usize,
    ahead: usize,
    repeated: usize,
    done: usize,
    sliced: usize,
}

/// The same mixture with feed-forward parts cut, where they can be: one cut has one result, near that of whole parts.
fn sliced(opened: &Opened, o: &Options, want: &[f32], seen: &mut Seen, what: &str) {
    let part = 1 + (o.max_batch as u32 * 37 + seen.done as u32 * 53) % 255;
    let run = |o: Options| {
        let mut session = start(opened, o, &Arc::default()).ok()?;
        session.slices()?;
        let batch = session.batch().alone;
        Some(logits_in(&mut session, batch).unwrap_or_else(|e| panic!("{what}, cut: {e}")))
    };
    let bytes: u64 = opened.model.units.iter().map(|u| u.bytes()).sum();
    let o = Options { sites: Sites::Auto, slices: Slices::Of(part), tiers: None, ram: Some(64 << 20), ..o.clone() };
    // Room for the half of it and what frames take, in steps.
    let rooms = (4..12).map(|n| (300 << 10) + bytes * n / 12);
    let Some((vram, got)) =
        rooms.clone().find_map(|vram| Some((vram, run(Options { vram: Some(vram), ..o.clone() })?)))
    else {
        return;
    };
    let square = |v: f64| v * v;
    let errors: f64 = got.iter().zip(want).map(|(a, b)| square(f64::from(a - b))).sum();
    let far = errors / want.iter().map(|v| square(f64::from(*v))).sum::<f64>();
    assert!(far < 1e-8, "{what}, cut at {part}: {far}");
    // Other rooms, buffers and chunks of the prompt.
    for vram in rooms.filter(|v| *v > vram) {
        let other = Options { vram: Some(vram), n_buffers: Some(3), max_batch: 5, outputs: 5, ..o.clone() };
        if let Some(second) = run(other) {
            assert!(second == got, "{what}, cut at {part}: other bits");
            seen.sliced += 1;
        }
    }
}

fn mixed(path: &Path, seeds: u64, seen: &mut Seen) {
    let opened = Opened::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let bytes: u64 = opened.model.units.iter().map(|u| u.bytes()).sum();
    let layers = opened.model.hparams.n_layers;
    let name = path.file_stem().unwrap().to_string_lossy().into_owned();
    let alone = |kv_type| {
        let o = Options { kv_type, ..options() };
        logits_in(&mut Session::new(&opened, o, &mut |_, _| ()).unwrap(), 16).unwrap()
    };
    let want = [TensorType::F32, TensorType::F16].map(|kv| (kv, alone(kv)));
    for seed in 0..seeds {
        let mut rng = ChaCha8Rng::seed_from_u64(seed << 32 | u64::from(name.bytes().map(u32::from).sum::<u32>()));
        let o = mixture(&mut rng, layers, bytes);
        let what = format!(
            "{name}, seed {seed}: {:?} {:?} {:?} {:?}, {:?} buffers, chunks of {}, {:?}, caches {}, stacked {}",
            o.sites, o.tiers, o.vram, o.ram, o.n_buffers, o.max_batch, o.kv_type, o.caches, o.stacked
        );
        let want = &want.iter().find(|w| w.0 == o.kv_type).unwrap().1;
        // The memory of tests divides experts of plain routers alone.
        let shares = name.contains("moe-llama") && rng.random_range(0..2) == 0;
        let run = |o: &Options, ahead: bool| -> Result<_, EngineError> {
            let memory = Arc::new(Memory { ahead, shares, ..Memory::default() });
            let mut session = start(&opened, o.clone(), &memory)?;
            for times in ["cold", "warm"] {
                let got = logits_in(&mut session, o.max_batch).unwrap_or_else(|e| panic!("{what}: {e}"));
                assert!(&got == want, "{what}, ahead {ahead}: other bits, {times}");
            }
            let (recipe, handed, stays) = (session.recipe().clone(), *memory.handed.lock().unwrap(), stays(&session));
            let plan = (recipe.id(), session.beside(), session.part_of_choices(), session.homes().to_vec());
            drop(session);
            assert_eq!(*memory.used.lock().unwrap(), 0, "{what}");
            Ok((recipe, plan, handed, stays))
        };
        let (recipe, plan, handed, stays) = match run(&o, false) {
            Ok(first) => first,
            // It does not fit; that is a sentence, too.
            Err(EngineError::Plan(_)) => {
                seen.refused += 1;
                continue;
            }
            Err(e) => panic!("{what}: {e}"),
        };
        seen.done += 1;
        sliced(&opened, &o, want, seen, &what);
        seen.handed += usize::from(handed > 0);
        if stays && o.sites != Sites::One {
            seen.ahead += 1;
            run(&o, true).unwrap_or_else(|e| panic!("{what}: {e}"));
        }
        if o.sites != Sites::One {
            // Whatever limits are given now: those of the plan count.
            let (max_batch, outputs, kv_type) = (o.max_batch, o.outputs, o.kv_type);
            let repeat = Some(Arc::new(recipe));
            let again = Options { sites: Sites::Auto, repeat, max_batch, outputs, kv_type, ram: None, ..options() };
            let (_, second, parts, _) = run(&again, false).unwrap_or_else(|e| panic!("{what}, again: {e}"));
            assert!(second == plan && parts == handed, "{what}: other sites of the same plan");
            seen.repeated += 1;
        }
    }
}

#[test]
fn every_architecture_has_its_bits_on_any_mixture() {
    let d = tempfile::tempdir().unwrap();
    let mut paths: Vec<PathBuf> = [
        ("llama", tiny(5)),
        ("moe-llama", common::tiny_moe(5)),
        ("many-moe-llama", common::many_experts(4)),
        ("gemma3", families::gemma3(5)),
        ("gpt-oss", families::gpt_oss(4)),
        ("lfm2", families::lfm2(5)),
        ("qwen35", families::qwen35(5)),
    ]
    .into_iter()
    .map(|(name, file)| file.write(d.path(), &format!("{name}.gguf")))
    .collect();
    if let Some(dir) = std::env::var_os("NT_ARCH_MODELS") {
        let files = std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().path());
        paths.extend(files.filter(|p| p.extension().is_some_and(|e| e == "gguf")));
        paths.sort();
    }
    let seeds = std::env::var("NT_SEEDS").map_or(6, |n| n.parse().unwrap());
    let mut seen = Seen::default();
    for path in &paths {
        mixed(path, seeds, &mut seen);
    }
    println!("{} models: {seen:?}", paths.len());
    assert!(
        seen.done > seen.refused && seen.handed > 0 && seen.ahead > 0 && seen.repeated > 0 && seen.sliced > 0,
        "{seen:?}"
    );
}

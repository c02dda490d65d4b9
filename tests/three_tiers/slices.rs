//! Feed-forward parts that are cut between a device and processors next to it.

use super::*;

/// So many KiB of the second memory, with `part` of each feed-forward part for processors.
fn sliced(vram: u64, part: u32) -> Options {
    Options { vram: Some(vram << 10), sites: Sites::Auto, slices: Slices::Of(part), ..options() }
}

/// Normalised mean squared error.
fn nmse(got: &[f32], want: &[f32]) -> f64 {
    let square = |v: f64| v * v;
    let errors: f64 = got.iter().zip(want).map(|(a, b)| square(f64::from(a - b))).sum();
    errors / want.iter().map(|v| square(f64::from(*v))).sum::<f64>()
}

/// Wherever slices rest and whatever is carried, bits are those of the cut; and they are near those of whole parts.
#[test]
fn slices_have_the_bits_of_their_cut_and_are_near_whole_parts() {
    let d = tempfile::tempdir().unwrap();
    let path = common::sized(6, 64, 384).write(d.path(), "m.gguf");
    let opened = Opened::open(&path).unwrap();
    let whole = logits(&mut Session::new(&opened, options(), &mut |_, _| ()).unwrap()).unwrap();
    let mut of_cuts = Vec::new();
    for part in [22, 64, 128, 200, 234] {
        let mut first: Option<Vec<f32>> = None;
        let (mut repeated, mut carried) = (0, 0);
        for ahead in [false, true] {
            for vram in (700..=2700).step_by(225) {
                let buffers = 2 + vram as usize % 2;
                let what = format!("{part} parts, {vram} KiB, {buffers} buffers, ahead {ahead}");
                let memory = Arc::new(Memory { ahead, ..Memory::default() });
                let o = Options { n_buffers: Some(buffers), ..sliced(vram, part) };
                let mut session = match start(&opened, o, &memory) {
                    Ok(session) => session,
                    Err(EngineError::Plan(_)) => continue,
                    Err(e) => panic!("{what}: {e}"),
                };
                if session.slices() != Some(part) {
                    // All fits.
                    continue;
                }
                let copies = session.links().gpu_bytes_per_pass > 0;
                if ahead && copies {
                    // Frames are given back when the second memory's operations are called.
                    continue;
                }
                assert!(session.model().units.iter().any(|u| matches!(u.kind, UnitKind::Slice(_))), "{what}");
                for times in ["cold", "warm"] {
                    let got = logits(&mut session).unwrap_or_else(|e| panic!("{what}: {e}"));
                    let want = first.get_or_insert_with(|| got.clone());
                    assert!(&got == want, "{what}: other bits, {times}");
                }
                assert!(*memory.handed.lock().unwrap() > 0, "{what}: nothing was handed over");
                repeated += *memory.repeated.lock().unwrap();
                carried += usize::from(copies);
                let recipe = Arc::new(session.recipe().clone());
                drop(session);
                // The plan made again has the same cut, whatever is asked for now.
                let again = Options { repeat: Some(recipe.clone()), slices: Slices::Off, ram: None, ..options() };
                let mut second = start(&opened, Options { sites: Sites::Auto, ..again }, &memory).unwrap();
                assert_eq!((second.slices(), second.recipe().id()), (Some(part), recipe.id()), "{what}");
                assert!(Some(&logits(&mut second).unwrap()) == first.as_ref(), "{what}: made again");
            }
        }
        let got = first.unwrap_or_else(|| panic!("{part} parts fit nowhere"));
        let far = nmse(&got, &whole);
        assert!(far < 1e-10, "{part} parts: {far}");
        assert!(
            carried > 0 && (repeated > 0) == (part >= 128),
            "{part} parts: {repeated} recordings, {carried} with copies"
        );
        of_cuts.push(got);
    }
    assert!(of_cuts[1] != of_cuts[2], "another cut adds up in another order");
}

/// What cannot be cut is whole: without processors, with counts of blocks, requantised, or where a drive has to read.
#[test]
fn what_cannot_be_cut_is_whole() {
    let d = tempfile::tempdir().unwrap();
    let path = common::sized(6, 64, 384).write(d.path(), "m.gguf");
    let routed = common::tiny_moe(4).write(d.path(), "moe.gguf");
    let o = sliced(1500, 128);
    let slices = |path: &Path, o: Options| {
        let asked = o.slices != Slices::Off;
        let mut session = start(&Opened::open(path).unwrap(), o, &Arc::default()).unwrap();
        logits(&mut session).unwrap();
        // What was asked for and is not so is said.
        let told = session.notes().iter().any(|n| n.contains("--ffn-slices 50: parts stay whole"));
        assert_eq!(told, asked && session.slices().is_none());
        session.slices()
    };
    assert_eq!(slices(&path, o.clone()), Some(128));
    assert_eq!(slices(&path, Options { sites: Sites::Both, ..o.clone() }), Some(128));
    assert_eq!(slices(&path, Options { sites: Sites::One, ..o.clone() }), None);
    assert_eq!(slices(&path, Options { slices: Slices::Off, ..o.clone() }), None);
    assert_eq!(slices(&path, Options { tiers: Some(Tiers { a: 3, b: 3, c: 0 }), vram: None, ..o.clone() }), None);
    assert_eq!(slices(&path, Options { requant: Some(TensorType::Q8_0), ..o.clone() }), None);
    assert_eq!(slices(&path, Options { ram: Some(1100 << 10), ..o.clone() }), None);
    assert_eq!(slices(&path, Options { vram: None, ..o.clone() }), None, "all fits");
    assert_eq!(slices(&routed, Options { vram: Some(900 << 10), ..o }), None);
}

/// Where VRAM that was counted with is refused and RAM has no room for what it would have held, parts are whole: a drive has no pieces
/// of rows.
#[test]
fn what_is_cut_is_never_read_from_storage() {
    let d = tempfile::tempdir().unwrap();
    let path = common::sized(6, 64, 384).write(d.path(), "m.gguf");
    let opened = Opened::open(&path).unwrap();
    let of = |ram: u64, refused: u64| {
        let taken = if refused > 0 { TOTAL - ((1500 - refused) << 10) } else { 0 };
        let o = Options { ram: Some(ram << 10), ..sliced(1500, 128) };
        let mut session = start(&opened, o, &Arc::new(Memory { taken, ..Memory::default() })).ok()?;
        let from_storage = session.homes().contains(&Home::C);
        Some((session.slices().is_some(), from_storage, logits(&mut session).unwrap()))
    };
    let (cut, whole) = (of(4096, 0).unwrap(), of(1200, 0).unwrap());
    assert!(cut.0 && !cut.1 && !whole.0 && whole.1);
    let mut met = [0; 2];
    for refused in [100, 300, 600] {
        for ram in (2300..=2800).step_by(100) {
            let Some((sliced, from_storage, got)) = of(ram, refused) else { continue };
            assert!(!(sliced && from_storage), "{ram} KiB, {refused} KiB refused");
            let far = nmse(&got, &whole.2);
            assert!(if sliced { got == cut.2 } else { far < 1e-10 }, "{ram} KiB, {refused} KiB refused: {far}");
            met[usize::from(sliced)] += 1;
        }
    }
    assert!(met[0] > 0 && met[1] > 0, "{met:?}");
}

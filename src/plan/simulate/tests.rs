use super::*;
use crate::pipeline::EventKind;
use crate::plan::UnitPart;
use crate::plan::{Traffic, UnitWork, roofline};

fn unit(bytes: u64, home: Home, block: Option<usize>) -> SimUnit {
    let part = if block.is_some() { UnitPart::FeedForward } else { UnitPart::Head };
    SimUnit { size: UnitSize::new(bytes, block, part), home }
}

/// Blocks at these homes, each of 100 bytes.
fn setup(homes: &str, on_device: bool, slots: usize, rates: Rates) -> Setup {
    let home = |c| match c {
        'A' => Home::A,
        'B' => Home::B,
        _ => Home::C,
    };
    Setup {
        units: homes.chars().enumerate().map(|(i, c)| unit(100, home(c), Some(i))).collect(),
        on_device,
        staging_slots: slots,
        staging_attention: false,
        device_slots: slots,
        device_attention: false,
        rates,
        copy_gap_s: 0.0,
        wrap: true,
        seed: 1,
        caching: Caching::default(),
        beside: Beside::default(),
    }
}

fn work(setup: &Setup, each_s: f64) -> PassWork {
    PassWork { unit_s: vec![each_s; setup.units.len()], beside_s: 0.0, experts: 0, prompt: false, ahead: false }
}

const RATES: Rates =
    Rates { vram: None, gpu: Some(100.0), ram: None, ram_and_link: None, nvme: Some(50.0), copies: false };

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-6 * b.abs()
}

#[test]
fn one_binding_link_with_enough_buffers_is_the_roofline() {
    // The link: 12 blocks of 1 s, each computed in 0.1 s.
    let s = setup("BBBBBBBBBBBB", true, 3, RATES);
    let p = s.settled(&work(&s, 0.1));
    assert!(near(p.seconds, 12.0) && near(p.gpu_busy, 12.0), "{p:?}");
    assert_eq!(p.bound_by(&RATES), LinkName::Gpu);
    // Storage: 6 of 2 s beside 6 in RAM, copied in 1 s each.
    let s = setup("BCBCBCBCBCBC", true, 4, Rates { gpu: Some(200.0), ..RATES });
    let p = s.settled(&work(&s, 0.1));
    assert!(near(p.seconds, 12.0), "{p:?}");
    // Computing on processors.
    let s = setup("CCCC", false, 3, RATES);
    let p = s.settled(&work(&s, 5.0));
    assert!(near(p.seconds, 20.0) && p.wait_nvme == 0.0, "{p:?}");
}

#[test]
fn by_hand_two_slots_on_processors() {
    // Reads take 2 s, computing 1 s; slot 0 and 1 in turn: reads never pause.
    let s = setup("CCCC", false, 2, RATES);
    let p = s.settled(&work(&s, 1.0));
    assert!(near(p.seconds, 8.0), "{p:?}");
    assert!(near(p.wait_nvme, 4.0) && near(p.compute_busy, 4.0), "{p:?}");
}

#[test]
fn without_wrap_around_a_pass_begins_with_an_empty_ring() {
    let with = setup("CCCC", false, 2, RATES);
    let without = Setup { wrap: false, ..with.clone() };
    let pass = work(&with, 1.0);
    // Read, then four times compute beside the next read, the last alone.
    assert!(near(without.settled(&pass).seconds, 9.0), "{:?}", without.settled(&pass));
    assert!(with.settled(&pass).seconds < without.settled(&pass).seconds);
}

#[test]
fn stacked_tiers_are_never_faster_than_interleaved_ones() {
    for (a, b, gpu, nvme) in [(4, 8, 100.0, 50.0), (8, 8, 30.0, 90.0), (0, 12, 500.0, 50.0), (6, 6, 60.0, 60.0)] {
        let rates = Rates { gpu: Some(gpu), nvme: Some(nvme), ..RATES };
        let c = 24 - a - b;
        let stacked: String = [("A", a), ("B", b), ("C", c)].iter().map(|(t, n)| t.repeat(*n)).collect();
        let mut dealt = [0; 3];
        let mixed: String = (1..=24usize)
            .map(|i| {
                let want = [a, b, c].map(|n| n * i / 24);
                let t = (0..3)
                    .find(|&t| dealt[t] < want[t])
                    .unwrap_or_else(|| (0..3).find(|&t| dealt[t] < [a, b, c][t]).unwrap());
                dealt[t] += 1;
                ['A', 'B', 'C'][t]
            })
            .collect();
        let pass = |homes: &str| {
            let s = setup(homes, true, 3, rates);
            s.settled(&work(&s, 0.05)).seconds
        };
        assert!(pass(&stacked) >= pass(&mixed) - 1e-9, "{stacked} {} {mixed} {}", pass(&stacked), pass(&mixed));
    }
}

#[test]
fn reads_that_share_ram_slow_each_other() {
    let free = Rates { ram: Some(1e9), ..RATES };
    let s = setup("BCBCBCBC", true, 4, free);
    let short = Setup { rates: Rates { ram: Some(100.0), ..free }, ..s.clone() };
    let (fast, slow) = (s.settled(&work(&s, 0.0)), short.settled(&work(&s, 0.0)));
    // 800 bytes are copied and 400 read: at 100 bytes per second of RAM at least 12 s.
    assert!(near(fast.seconds, 8.0) && slow.seconds >= 12.0 - 1e-6 && slow.seconds < 13.0, "{fast:?} {slow:?}");
    assert!(near(slow.busy(LinkName::Ram, &short.rates).unwrap(), 12.0 / slow.seconds));
}

/// Processors beside a device for these units, each of which takes them so long.
fn beside(setup: Setup, of_host: &[usize], each_s: f64) -> Setup {
    let n = setup.units.len();
    let units = (0..n).map(|u| of_host.contains(&u)).collect();
    let beside = Beside { units, unit_s: vec![each_s; n], hand_over_s: [0.5, 1.0], ..Beside::default() };
    Setup { beside, ..setup }
}

#[test]
fn by_hand_two_sites_compute_in_turn_while_the_link_works_ahead() {
    // Resident, beside, streamed, beside: the copy of 1 s is behind the first part.
    let s = beside(setup("AABA", true, 2, RATES), &[1, 3], 2.0);
    let p = s.settled(&work(&s, 1.0));
    // Two computes of 1 s, two parts of 2 s, one hand-over with an idle link and one behind it; which is loaded depends on when the
    // frame is free.
    assert!(p.seconds >= 2.0 + 4.0 + 1.0 - 1e-9 && p.seconds <= 2.0 + 4.0 + 2.0 + 1e-9, "{p:?}");
    assert!(near(p.beside_busy, 4.0) && near(p.compute_busy, 2.0) && near(p.wait_beside, p.seconds - 2.0), "{p:?}");
    assert!(near(p.beside_bytes, 200.0) && near(p.gpu_bytes, 100.0) && near(p.ram_bytes, 300.0), "{p:?}");
    assert_eq!(p.bound_by(&RATES), LinkName::Chain);
}

/// Reads that are copies by processors take time from those that compute beside the device, and RAM.
#[test]
fn by_hand_copies_by_processors_slow_others_beside_a_device() {
    let rates = Rates { ram: Some(1e9), copies: true, ..RATES };
    let s = beside(setup("AAC", true, 4, rates), &[1], 2.0);
    let p = s.settled(&work(&s, 0.0));
    // A read of 2 s for each pass, but a pass takes longer: the part of 2 s, slowed down while that read runs, and its hand-over.
    let alone = Setup { rates: Rates { copies: false, ..rates }, ..s.clone() }.settled(&work(&s, 0.0));
    assert!((2.5..3.0).contains(&alone.seconds) && near(alone.beside_busy, 2.0), "{alone:?}");
    assert!(p.seconds > 3.0 && p.beside_busy > 2.4 && p.beside_busy <= 2.0 / 0.42 + 1e-9, "{p:?}");
    // Memory that has little left for reads slows those.
    let short = Setup { rates: Rates { ram: Some(100.0), ..rates }, ..s.clone() }.settled(&work(&s, 0.0));
    assert!(short.seconds > p.seconds && short.nvme_busy > p.nvme_busy, "{short:?} {p:?}");
}

/// A layer of four experts that a token all chooses, in RAM: two for processors, two for the link.
#[test]
fn by_hand_divided_experts_are_computed_by_both_sites_at_once() {
    let mut s = setup("AAAAA", true, 0, RATES);
    s.units.iter_mut().for_each(|u| u.size.block = Some(0));
    s.units[1..].iter_mut().for_each(|u| u.size.part = UnitPart::Expert);
    let mut s = beside(s, &[1, 2, 3, 4], 3.0);
    s.beside.divided = vec![false, true, true, true, true];
    let pass = PassWork { experts: 4, ..work(&s, 0.25) };
    // All are the processors': 0.25, a hand-over, 12.
    let p = s.settled(&pass);
    assert!(near(p.seconds, 0.25 + 0.5 + 12.0) && near(p.beside_bytes, 400.0) && p.gpu_bytes == 0.0, "{p:?}");
    // What a layer takes them beyond its bytes.
    let more = Setup { beside: Beside { experts_s: 2.0, ..s.beside.clone() }, ..s.clone() }.settled(&pass);
    assert!(near(more.seconds, p.seconds + 2.0) && near(more.beside_busy, 12.0), "{more:?}");
    s.beside.share = Some(crate::backend::Share(128));
    let p = s.settled(&pass);
    // Copies of 1 s each end before two parts of 3 s do.
    assert!(near(p.seconds, 0.25 + 1.0 + 6.0), "{p:?}");
    assert!(near(p.beside_bytes, 200.0) && near(p.gpu_bytes, 200.0) && near(p.gpu_busy, 2.0), "{p:?}");
    s.beside.share = Some(crate::backend::Share(0));
    let p = s.settled(&pass);
    // Four copies, and the last expert behind the last of them.
    assert!(near(p.seconds, 0.25 + 1.0 + 4.0 + 0.25) && p.beside_bytes == 0.0, "{p:?}");
    // The same without a share, one expert by itself on the device: before processors begin.
    s.beside.units[1] = false;
    (s.beside.divided, s.beside.share) = (Vec::new(), None);
    let p = s.settled(&pass);
    assert!(near(p.seconds, 0.25 + 0.25 + 0.5 + 9.0), "{p:?}");
}

/// A layer of four experts in RAM, all of which a prompt takes: the link need not wait for attention if they are brought ahead.
#[test]
fn by_hand_experts_that_are_brought_ahead_come_while_attention_is_computed() {
    let mut s = setup("ABBBB", true, 2, RATES);
    s.units.iter_mut().for_each(|u| u.size.block = Some(0));
    s.units[1..].iter_mut().for_each(|u| u.size.part = UnitPart::Expert);
    let mut pass = PassWork { experts: 4, prompt: true, ..work(&s, 0.25) };
    pass.unit_s[0] = 3.0;
    // Attention of 3 s, then four copies of 1 s, and the last expert behind the last of them.
    let p = s.settled(&pass);
    assert!(near(p.seconds, 3.0 + 4.0 + 0.25) && near(p.gpu_bytes, 400.0), "{p:?}");
    // Two of them are there when the router has chosen.
    let p = s.settled(&PassWork { ahead: true, ..pass.clone() });
    assert!(near(p.seconds, 3.0 + 2.0 + 0.25 + 0.25) && near(p.gpu_bytes, 400.0), "{p:?}");
    // What nobody chose is brought, too, and given back.
    let p = s.settled(&PassWork { ahead: true, experts: 2, ..pass.clone() });
    // A copy that nobody waits for may end in the next pass.
    assert!((350.0..450.0).contains(&p.gpu_bytes) && near(p.compute_busy, 3.5), "{p:?}");
    // None comes ahead where one has to be read first.
    s.units[4].home = Home::C;
    s.staging_slots = 2;
    assert_eq!(s.settled(&PassWork { ahead: true, ..pass.clone() }), s.settled(&pass));
}

/// Any mix of homes, sizes, slots and rates.
fn random(seed: u64) -> (Setup, PassWork) {
    use rand::{RngExt, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let on_device = rng.random_range(0..2) == 0;
    let experts = [0, 0, 6][rng.random_range(0..3)];
    let mut units = Vec::new();
    let home = |rng: &mut rand_chacha::ChaCha8Rng| match rng.random_range(0..3) {
        0 if on_device => Home::A,
        1 => Home::B,
        _ => Home::C,
    };
    for block in 0..rng.random_range(2..12) {
        // Dense blocks of one part or two.
        if experts == 0 && rng.random_range(0..2) == 0 {
            let mut attention = unit(rng.random_range(10..100), home(&mut rng), Some(block));
            attention.size.part = UnitPart::Attention;
            units.push(attention);
        }
        units.push(unit(rng.random_range(50..200), home(&mut rng), Some(block)));
        for _ in 0..experts {
            let mut e = unit(rng.random_range(10..40), home(&mut rng), Some(block));
            e.size.part = UnitPart::Expert;
            units.push(e);
        }
    }
    units.push(unit(80, home(&mut rng), None));
    let slots = rng.random_range(2..7);
    let mut rate = || Some(f64::from(rng.random_range(20..400u32)));
    let rates = Rates {
        vram: None,
        gpu: rate(),
        ram: rate().map(|r| 3.0 * r),
        ram_and_link: None,
        nvme: rate(),
        copies: seed.is_multiple_of(3),
    };
    let each = f64::from(rng.random_range(1..100u32)) / 100.0;
    let setup = Setup {
        units,
        on_device,
        staging_slots: slots,
        staging_attention: seed.is_multiple_of(2),
        caching: Caching::default(),
        beside: Beside::default(),
        device_slots: slots,
        device_attention: seed.is_multiple_of(2),
        rates,
        copy_gap_s: 0.0,
        wrap: true,
        seed,
    };
    let pass = PassWork {
        unit_s: vec![each; setup.units.len()],
        beside_s: 0.01,
        experts: experts / 2,
        prompt: false,
        ahead: seed.is_multiple_of(4),
    };
    (setup, pass)
}

/// The same, with processors beside the device for what rests in RAM, and half of a layer's experts for the link where all rest.
fn random_beside(seed: u64) -> (Setup, PassWork) {
    let (mut s, pass) = random(seed);
    s.on_device = true;
    let of_host: Vec<usize> = (0..s.units.len()).filter(|&u| s.units[u].home == Home::B).collect();
    let block = |u: usize| (s.units[u].size.block, s.units[u].size.routed());
    let rests = |u: usize| (0..s.units.len()).all(|v| block(u) != block(v) || s.units[v].home != Home::C);
    let divided = (0..s.units.len()).map(|u| s.units[u].size.routed() && rests(u)).collect();
    of_host.iter().for_each(|&u| s.units[u].home = Home::A);
    let mut s = beside(s, &of_host, 0.3);
    (s.beside.divided, s.beside.share) = (divided, Some(crate::backend::Share(128)));
    (s, pass)
}

#[test]
fn every_setup_ends_with_each_unit_computed_once_and_no_link_busy_twice() {
    for seed in 0..600u64 {
        let (setup, pass) = if seed < 300 { random(seed) } else { random_beside(seed - 300) };
        let out = setup.run(&[&pass; 3]);
        assert_eq!(out.passes.len(), 3);
        let of = |kind| out.events.iter().filter(move |e| e.kind == kind);
        let shared = setup.units.iter().filter(|u| !u.size.routed()).count();
        let blocks = setup.units.iter().filter(|u| !u.size.routed() && u.size.block.is_some()).count();
        assert_eq!(
            of(EventKind::Compute).chain(of(EventKind::Beside)).count(),
            3 * (shared + blocks * pass.experts),
            "seed {seed}"
        );
        for kind in [EventKind::Read, EventKind::Copy, EventKind::Compute, EventKind::Beside] {
            let all: Vec<_> = of(kind).collect();
            assert!(all.windows(2).all(|w| w[0].end_ns <= w[1].start_ns + 1), "seed {seed}: {kind:?}");
        }
        for p in &out.passes {
            let waited = p.wait_nvme + p.wait_gpu + p.wait_beside + p.wait_pass;
            assert!(near(p.compute_busy + waited, p.seconds), "seed {seed}: {p:?}");
        }
    }
}

#[test]
fn no_pass_is_faster_than_the_roofline() {
    for seed in 0..300 {
        let (setup, pass) = random(seed);
        if pass.experts > 0 {
            continue;
        }
        let works: Vec<UnitWork> = setup
            .units
            .iter()
            .map(|u| UnitWork {
                size: u.size,
                bytes: u.size.slot_bytes,
                matrices: vec![],
                share: 1.0,
                miss: 1.0,
                operations: 0,
            })
            .collect();
        let homes: Vec<Home> = setup.units.iter().map(|u| u.home).collect();
        let compute = pass.unit_s.iter().sum::<f64>() + pass.beside_s;
        let r = roofline(&Traffic::new(&works, &homes, None, setup.on_device, 1), &setup.rates, Some(compute)).unwrap();
        let s = setup.settled(&pass).seconds;
        // A mean of four passes may begin and end at other points of the ring's turn.
        assert!(s >= r.seconds * 0.97, "seed {seed}: {s} < {r:?}");
    }
}

#[test]
fn a_faster_link_never_makes_a_pass_slower() {
    for seed in 0..300 {
        let (mut setup, pass) = random(seed);
        // Where RAM or processors are shared, what comes sooner may come at a worse moment.
        setup.rates = Rates { ram: None, copies: false, ..setup.rates };
        let base = setup.settled(&pass).seconds;
        let r = setup.rates;
        for rates in [Rates { gpu: r.gpu.map(|x| 2.0 * x), ..r }, Rates { nvme: r.nvme.map(|x| 2.0 * x), ..r }] {
            let faster = Setup { rates, ..setup.clone() }.settled(&pass).seconds;
            // The copying thread looks up only when a copy ends, which may be the worse moment.
            assert!(faster <= base * 1.02, "seed {seed}: {base} -> {faster} with {rates:?}");
        }
    }
}

#[test]
fn the_same_seed_is_the_same_picture() {
    let (setup, pass) = random(7);
    let (a, b) = (setup.run(&[&pass; 2]), setup.run(&[&pass; 2]));
    let ns = |o: &Outcome| o.events.iter().map(|e| (e.unit, e.start_ns, e.end_ns)).collect::<Vec<_>>();
    assert_eq!(ns(&a), ns(&b));
}

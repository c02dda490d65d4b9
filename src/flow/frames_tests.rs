//! What [`Frames`] does step by step; what it does under any order of events is in `simulation`.

use super::frames::{Frames, Hold, Move, Place, Policy, PoolSpec, Rank, Spec, Step};
use super::links;

const STORAGE: usize = 0;
const COPIES: usize = 1;

/// Units 0, 1, … of which those below `scheduled` are in the schedule, one hole behind each of `holes`; all on storage
/// but those that rest in RAM.
fn spec(site: Place, frames: usize, scheduled: usize, holes: &[usize], in_ram: &[usize]) -> Spec {
    let n = scheduled + 10;
    let rests = |u| if in_ram.contains(&u) { Place::Host } else { Place::Storage };
    let mut steps = Vec::new();
    for u in 0..scheduled {
        steps.push(Step::Unit(u));
        steps.extend(holes.contains(&u).then_some(Step::Hole));
    }
    let mut pools = PoolSpec::rings(Place::Host, frames, n, None);
    pools.extend(PoolSpec::rings(Place::Device, frames, n, None));
    Spec {
        homes: (0..n).map(rests).collect(),
        routed: (0..n).map(|u| u >= scheduled).collect(),
        site,
        in_ram: Vec::new(),
        steps,
        demand_max: 8,
        pools,
        links: links(),
    }
}

fn moves(frames: &mut Frames<&'static str>, link: usize) -> Vec<Move> {
    std::iter::from_fn(|| frames.next_move(link)).collect()
}

fn units_and_frames(moves: &[Move]) -> Vec<(usize, usize)> {
    moves.iter().map(|m| (m.unit, m.to)).collect()
}

fn use_up(frames: &mut Frames<&'static str>, unit: usize) -> usize {
    let Hold::Ready(frame, rank) = frames.hold(unit) else { panic!("unit {unit} is not there") };
    frames.reached(rank);
    frame
}

#[test]
fn the_next_pass_is_read_while_this_one_ends() {
    let mut frames = Frames::new(spec(Place::Host, 3, 2, &[], &[]));
    assert_eq!(units_and_frames(&moves(&mut frames, STORAGE)), [(0, 0), (1, 1), (0, 2)]);
}

/// Guards against a move to the frame that was used last, which waits for the newest compute in place of the oldest.
#[test]
fn frames_are_given_out_in_turn() {
    let mut frames = Frames::new(spec(Place::Host, 3, 2, &[], &[]));
    let mut next = |unit| {
        let m = frames.next_move(STORAGE).unwrap();
        frames.moved(STORAGE, m, Ok(()));
        assert_eq!((m.unit, use_up(&mut frames, unit)), (unit, m.to));
        m.to
    };
    assert_eq!([0, 1, 0, 1, 0].map(&mut next), [0, 1, 2, 0, 1]);
}

#[test]
fn behind_a_hole_a_frame_stays_free() {
    let mut frames = Frames::new(spec(Place::Host, 3, 2, &[0, 1], &[]));
    let first = moves(&mut frames, STORAGE);
    assert_eq!(units_and_frames(&first), [(0, 0), (1, 1)]);
    assert!(first.iter().all(|m| !m.urgent));
    frames.moved(STORAGE, first[0], Ok(()));
    assert_eq!(use_up(&mut frames, 0), 0);
    frames.demand(&mut [7, 8, 9], false);
    let demanded = moves(&mut frames, STORAGE);
    assert_eq!(units_and_frames(&demanded), [(7, 2), (8, 0)]);
    assert!(demanded.iter().all(|m| m.urgent));
}

#[test]
fn a_failure_is_told_once_and_the_unit_is_brought_anew() {
    let mut frames = Frames::new(spec(Place::Host, 2, 3, &[], &[]));
    let first = moves(&mut frames, STORAGE);
    assert_eq!(frames.hold(0), Hold::Wait);
    frames.moved(STORAGE, first[0], Err("bad block"));
    assert!(frames.take_news() && !frames.take_news());
    assert_eq!(frames.hold(0), Hold::Failed("bad block"));
    frames.give_up();
    assert_eq!(frames.hold(0), Hold::Wait);
    assert_eq!(units_and_frames(&moves(&mut frames, STORAGE)), [(0, 0)], "frame 1 is being written for unit 1");
    // What the pass that was given up had asked for serves the next one.
    frames.moved(STORAGE, first[1], Ok(()));
    assert!(moves(&mut frames, STORAGE).is_empty());
}

/// A frame in RAM is held while it is copied from, and given out as soon as the copy has ended, used or not.
#[test]
fn a_copy_holds_its_source() {
    let mut frames = Frames::new(spec(Place::Device, 2, 3, &[], &[1]));
    let reads = moves(&mut frames, STORAGE);
    assert_eq!(units_and_frames(&reads), [(0, 0), (2, 1)]);
    assert!(frames.next_move(COPIES).is_none() && frames.waits_for_source(COPIES), "copies keep to the order of use");
    frames.moved(STORAGE, reads[0], Ok(()));
    assert_eq!(frames.wakes(0b11), 0b10);
    let copy = frames.next_move(COPIES).unwrap();
    assert_eq!((copy.unit, copy.from, copy.to), (0, Some(0), 0));
    assert_eq!(frames.hold(0), Hold::Wait);
    frames.queued(COPIES, copy);
    assert_eq!(use_up(&mut frames, 0), 0);
    assert!(frames.next_move(STORAGE).is_none(), "the copy reads frame 0");
    frames.moved(COPIES, copy, Ok(()));
    assert_eq!(units_and_frames(&moves(&mut frames, STORAGE)), [(0, 0)]);
    // From where it rests, without a frame.
    let copy = frames.next_move(COPIES).unwrap();
    assert_eq!((copy.unit, copy.from, copy.to), (1, None, 1));
}

/// A copy that fails when its unit was handed over already is told with the next one.
#[test]
fn a_failure_that_comes_late_is_told() {
    let mut frames = Frames::new(spec(Place::Device, 3, 3, &[], &[0, 1, 2]));
    let copies = moves(&mut frames, COPIES);
    frames.queued(COPIES, copies[0]);
    use_up(&mut frames, 0);
    frames.moved(COPIES, copies[0], Err("the link is down"));
    assert_eq!(frames.hold(1), Hold::Failed("the link is down"));
    frames.give_up();
    frames.moved(COPIES, copies[1], Err("nobody waits for this"));
    assert_eq!((frames.hold(0), frames.unused_failures()), (Hold::Wait, 1));
}

#[test]
fn a_guess_takes_what_nobody_needs_and_its_failure_is_counted() {
    let mut frames = Frames::new(spec(Place::Host, 4, 1, &[0], &[]));
    assert!(frames.hint(5, 1) && frames.hint(6, 1) && !frames.hint(5, 1) && !frames.hint(5, 0));
    let first = frames.next_move(STORAGE).unwrap();
    let guesses = moves(&mut frames, STORAGE);
    assert_eq!(units_and_frames(&guesses), [(5, 1), (6, 2)], "one frame is left");
    frames.moved(STORAGE, guesses[0], Err("bad block"));
    frames.moved(STORAGE, guesses[1], Ok(()));
    frames.moved(STORAGE, first, Ok(()));
    use_up(&mut frames, 0);
    frames.demand(&mut [5, 6], false);
    let again = frames.next_move(STORAGE).unwrap();
    assert_eq!((again.unit, again.urgent, frames.unused_failures()), (5, true, 1));
    frames.moved(STORAGE, again, Ok(()));
    assert_eq!((use_up(&mut frames, 5), use_up(&mut frames, 6)), (again.to, 2), "the guess was right");
}

#[test]
fn a_link_that_is_gone_is_the_cause_for_all_that_need_it() {
    let mut frames = Frames::new(spec(Place::Device, 3, 3, &[], &[1]));
    let reads = moves(&mut frames, STORAGE);
    frames.moved(STORAGE, reads[0], Ok(()));
    frames.died(STORAGE, "the drive is gone");
    let copies = moves(&mut frames, COPIES);
    copies.iter().for_each(|m| frames.queued(COPIES, *m));
    assert_eq!(units_and_frames(&copies), [(0, 0), (1, 1)], "what is in RAM is carried on");
    use_up(&mut frames, 0);
    use_up(&mut frames, 1);
    for _ in 0..2 {
        assert_eq!(frames.hold(2), Hold::Failed("the drive is gone"));
    }
    assert!(frames.next_move(STORAGE).is_none());
}

#[test]
fn the_least_recently_used_frame_is_given_out_and_what_is_there_stays() {
    let mut spec = spec(Place::Host, 3, 1, &[0], &[]);
    spec.pools[0].policy = Policy::Lru;
    let mut frames: Frames<()> = Frames::new(spec);
    let mut pass = |experts: &[usize]| {
        let mut brought = Vec::new();
        let mut bring = |frames: &mut Frames<()>| {
            while let Some(m) = frames.next_move(STORAGE) {
                brought.push(m.unit);
                frames.moved(STORAGE, m, Ok(()));
            }
        };
        for (i, &unit) in [0].iter().chain(experts).enumerate() {
            if i == 1 {
                frames.demand(&mut experts.to_vec(), false);
            }
            bring(&mut frames);
            let Hold::Ready(_, rank) = frames.hold(unit) else { panic!("unit {unit} is not there") };
            frames.reached(rank);
        }
        brought
    };
    assert_eq!(pass(&[5, 6]), [0, 5, 6]);
    assert_eq!(pass(&[5, 6]), Vec::<usize>::new(), "all is there");
    assert_eq!(pass(&[6, 7]), [7]);
    assert_eq!(pass(&[6]), Vec::<usize>::new());
    assert!(Rank { pass: 1, step: 0, nth: 0 } > Rank { pass: 0, step: 9, nth: 9 });
}

/// A cache of three frames for units 2 to 11 next to a ring of two for all.
fn with_cache(site: Place) -> Spec {
    let mut spec = spec(site, 2, 2, &[1], &[]);
    let members = (0..12).map(|u| u >= 2).collect();
    spec.pools.insert(1, PoolSpec { place: Place::Host, frames: 3, policy: Policy::Cache, members });
    spec
}

/// One pass; the units that were read.
fn pass(frames: &mut Frames<()>, experts: &[usize], passing: bool) -> Vec<usize> {
    let mut read = Vec::new();
    let mut hold = |frames: &mut Frames<()>, unit: usize| loop {
        while let Some(m) = frames.next_move(STORAGE) {
            read.push(m.unit);
            frames.moved(STORAGE, m, Ok(()));
        }
        while let Some(m) = frames.next_move(COPIES) {
            frames.queued(COPIES, m);
            frames.moved(COPIES, m, Ok(()));
        }
        if let Hold::Ready(_, rank) = frames.hold(unit) {
            return frames.reached(rank);
        }
    };
    hold(frames, 0);
    hold(frames, 1);
    let mut order = experts.to_vec();
    frames.demand(&mut order, passing);
    order.iter().for_each(|&u| hold(frames, u));
    read.retain(|u| *u >= 2);
    read
}

#[test]
fn a_cache_keeps_what_was_used_last() {
    for site in [Place::Host, Place::Device] {
        let mut frames: Frames<()> = Frames::new(with_cache(site));
        assert_eq!(pass(&mut frames, &[5, 6], false), [5, 6]);
        assert_eq!(pass(&mut frames, &[6, 5, 7], false), [7]);
        // Unit 6 was used first: what is there comes in the order given.
        assert_eq!(pass(&mut frames, &[8], false), [8]);
        assert_eq!(pass(&mut frames, &[5, 7], false), [0; 0]);
        assert_eq!(pass(&mut frames, &[6], false), [6]);
        let c = frames.cache_counts(false);
        assert_eq!((c.demands, c.hits, c.misses, c.missed, c.misses_max), (5, 4, 5, 4, 2));
    }
}

/// What is there comes first, whatever the order given, and all that is missing is asked for at once.
#[test]
fn misses_are_in_flight_together_behind_what_is_there() {
    let mut frames: Frames<()> = Frames::new(with_cache(Place::Host));
    pass(&mut frames, &[5], false);
    use_all(&mut frames, &[0, 1]);
    let mut order = [7, 5, 9];
    frames.demand(&mut order, false);
    assert_eq!(order, [5, 7, 9]);
    assert!(frames.is_ready(5) && !frames.is_ready(7));
    let moves: Vec<Move> = std::iter::from_fn(|| frames.next_move(STORAGE)).collect();
    assert_eq!(moves.iter().filter(|m| m.urgent).map(|m| m.unit).collect::<Vec<_>>(), [7, 9]);
    // Several of a cache may be held; all are given back at once.
    let Hold::Ready(_, first) = frames.hold(5) else { panic!("it is there") };
    assert!(!frames.is_ready(7));
    moves.into_iter().for_each(|m| frames.moved(STORAGE, m, Ok(())));
    assert!(frames.is_ready(7));
    let Hold::Ready(..) = frames.hold(7) else { panic!("it is there") };
    let Hold::Ready(_, last) = frames.hold(9) else { panic!("it is there") };
    assert!(first < last);
    frames.reached(last);
    frames.check();
}

fn use_all(frames: &mut Frames<()>, units: &[usize]) {
    for &unit in units {
        while let Some(m) = frames.next_move(STORAGE) {
            frames.moved(STORAGE, m, Ok(()));
        }
        let Hold::Ready(_, rank) = frames.hold(unit) else { panic!("unit {unit} is not there") };
        frames.reached(rank);
    }
}

/// A prompt fills what is empty, uses what is there, and evicts nothing.
#[test]
fn a_prompt_passes_a_cache_by() {
    let mut frames: Frames<()> = Frames::new(with_cache(Place::Host));
    assert_eq!(pass(&mut frames, &[5, 6], false), [5, 6]);
    let all: Vec<usize> = (2..12).collect();
    assert_eq!(pass(&mut frames, &all, true).len(), 8, "all but those that are there");
    assert_eq!(pass(&mut frames, &[5, 6, 2], false), [0; 0], "one found an empty frame");
    assert_eq!(pass(&mut frames, &all, true).len(), 7);
    assert_eq!(pass(&mut frames, &[5, 6, 2], false), [0; 0]);
    assert_eq!(frames.cache_counts(true).hits, 5);
}

/// Between prompts and what is generated sites change, and caches keep what they hold and when it was used.
#[test]
fn a_cache_outlives_its_schedule() {
    let mut frames: Frames<()> = Frames::new(with_cache(Place::Device));
    pass(&mut frames, &[5, 6], false);
    pass(&mut frames, &[7], false);
    let (steps, in_ram) = (with_cache(Place::Device).steps, (0..12).map(|u| u >= 2).collect());
    frames = frames.rescheduled(Place::Device, steps.clone(), in_ram);
    assert_eq!(pass(&mut frames, &[5, 7], false), [0; 0]);
    frames = frames.rescheduled(Place::Device, steps, Vec::new());
    assert_eq!(pass(&mut frames, &[8], false), [8]);
    assert_eq!(pass(&mut frames, &[5, 7], false), [0; 0], "unit 6 was used longest ago");
}

/// Caches that were emptied bring what they had once more, and what they bring then has its frame as ever.
#[test]
fn an_empty_cache_begins_anew() {
    let mut frames: Frames<()> = Frames::new(with_cache(Place::Host));
    pass(&mut frames, &[5, 6], false);
    pass(&mut frames, &[7], false);
    frames.empty_caches();
    assert_eq!(pass(&mut frames, &[5, 7], false), [5, 7]);
    assert_eq!(pass(&mut frames, &[5, 7], false), [0; 0]);
    let c = frames.cache_counts(false);
    assert_eq!((c.hits, c.misses), (2, 5));
}

//! A flow through RAM with a scripted reader: bytes, causes, and the end of either.

use std::sync::Arc;
use std::time::Duration;

use super::{Flow, FlowConfig, Place, PoolSpec, Spec, Step, links};
use crate::memory::Arena;
use crate::pipeline::{SpanIn, StreamError, UnitLayout};
use crate::storage::{Alignment, Completion, FileId, ReadError, ReadRequest, Reader, Script, ScriptedReader};

/// Bytes of a unit.
const UNIT: u64 = 5000;

/// Streams a file of `n` units of equal size through `slots` slots.
fn streamer(n: usize, slots: usize, holes: bool, script: Script) -> (Arena, Flow, Vec<u8>) {
    streamer_on(n, slots, holes, script, |reader| Box::new(reader))
}

/// As [`streamer`], through what `wrap` makes of the reader.
fn streamer_on(
    n: usize,
    slots: usize,
    holes: bool,
    script: Script,
    wrap: impl FnOnce(ScriptedReader) -> Box<dyn Reader>,
) -> (Arena, Flow, Vec<u8>) {
    let data: Vec<u8> = (0..n as u64 * UNIT).map(|i| (i.wrapping_mul(0x9E37_79B9) >> 11) as u8).collect();
    let reader = ScriptedReader::new(vec![data.clone()], script);
    let layouts: Arc<[UnitLayout]> = (0..n as u64)
        .map(|i| UnitLayout::new(&[SpanIn { file: FileId(0), offset: i * UNIT, bytes: UNIT }], |f| reader.alignment(f)))
        .collect();
    let mut arena = Arena::new(1 << 20).unwrap();
    let steps = (0..n / 2).flat_map(|i| if holes { vec![Step::Unit(i), Step::Hole] } else { vec![Step::Unit(i)] });
    let spec = Spec {
        homes: vec![Place::Storage; n],
        routed: (0..n).map(|u| u >= n / 2 && holes).collect(),
        site: Place::Host,
        in_ram: Vec::new(),
        steps: steps.collect(),
        demand_max: n,
        pools: PoolSpec::rings(Place::Host, slots, n, None),
        links: links(),
    };
    let config = FlowConfig {
        spec,
        names: (0..n).map(|i| format!("unit {i}")).collect(),
        frames: (0..slots).map(|_| arena.take(layouts[0].slot_bytes).unwrap()).collect(),
        rows: arena.take(64 << 10).unwrap(),
        trace_events: 100,
        n_files: 1,
        device: None,
        layouts,
    };
    // SAFETY: the tests drop the flow before the arena.
    (arena, unsafe { Flow::start(config, wrap(reader)) }.unwrap(), data)
}

fn address(s: &Flow, frame: usize) -> *const u8 {
    std::ptr::with_exposed_provenance(s.addresses().nth(frame).unwrap() as usize)
}

fn check(s: &Flow, unit: usize, data: &[u8]) -> Result<(), StreamError> {
    let taken = s.acquire(unit)?;
    let at = address(s, taken.frame);
    // SAFETY: the unit is held, so its slot holds `UNIT` bytes that nobody writes.
    let got = unsafe { std::slice::from_raw_parts(at, UNIT as usize) };
    assert_eq!(got, &data[unit * UNIT as usize..][..UNIT as usize]);
    s.release(taken);
    Ok(())
}

#[test]
fn units_and_rows_arrive_whole_under_any_delay() {
    for seed in 0..40 {
        let script = Script { seed, delay_max: 4, ..Script::default() };
        let (_arena, s, data) = streamer(12, 2 + seed as usize % 5, false, script);
        for pass in 0..5u64 {
            let offsets: Vec<u64> = (0..20).map(|i| (i * 977 + pass * 131) % 50_000).collect();
            let mut rows = vec![0; 20 * 300];
            s.read_rows(FileId(0), &offsets, 300, &mut rows).unwrap();
            for (o, row) in offsets.iter().zip(rows.chunks(300)) {
                assert_eq!(row, &data[*o as usize..][..300]);
            }
            for unit in 0..6 {
                check(&s, unit, &data).unwrap();
            }
        }
        assert!(s.storage().bytes > 0);
    }
}

#[test]
fn demanded_units_come_before_the_next_block() {
    for seed in 0..40 {
        let script = Script { seed, delay_max: 3, ..Script::default() };
        let (_arena, s, data) = streamer(12, 2 + seed as usize % 4, true, script);
        for _ in 0..4 {
            for unit in 0..6 {
                check(&s, unit, &data).unwrap();
                s.demand(&mut [11 - unit, 6, 11 - unit], false);
                for d in [11 - unit, 6, 11 - unit] {
                    check(&s, d, &data).unwrap();
                }
            }
        }
    }
}

#[test]
fn a_failed_read_is_named_and_the_next_pass_can_run() {
    let mut failures = 0;
    for seed in 0..60 {
        let script = Script { seed, delay_max: 2, fail: 0.05, truncate: 0.02, ..Script::default() };
        let (_arena, s, data) = streamer(12, 3, false, script);
        for _ in 0..4 {
            let pass = (0..6).try_for_each(|unit| check(&s, unit, &data));
            if let Err(e) = pass {
                assert!(e.to_string().contains("unit ") && e.to_string().contains("scripted"), "{e}");
                failures += 1;
                s.give_up();
            }
        }
    }
    assert!(failures > 20);
}

#[test]
fn corruption_reaches_the_slot_where_checksums_can_see_it() {
    let script = Script { seed: 3, corrupt: 1.0, ..Script::default() };
    let (_arena, s, data) = streamer(12, 2, false, script);
    let at = address(&s, s.acquire(0).unwrap().frame);
    // SAFETY: the unit is held.
    let got = unsafe { std::slice::from_raw_parts(at, UNIT as usize) };
    assert_eq!(got.iter().zip(&data).filter(|(a, b)| a != b).count(), 1);
}

/// A reader that dies at its poll number `at`.
struct Dies {
    inner: ScriptedReader,
    at: usize,
}

impl Reader for Dies {
    fn name(&self) -> &'static str {
        "dies"
    }

    fn alignment(&self, file: FileId) -> Alignment {
        self.inner.alignment(file)
    }

    fn attach(&mut self, memory: &crate::memory::Region) -> Result<(), crate::storage::StorageError> {
        self.inner.attach(memory)
    }

    unsafe fn submit(&mut self, request: &ReadRequest<'_>) -> Result<(), ReadError> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.submit(request) }
    }

    fn poll(&mut self, out: &mut Vec<Completion>, wait: Option<Duration>) -> Result<(), ReadError> {
        self.at = self.at.saturating_sub(1);
        if self.at == 0 {
            let (name, what) = ("drive S1".to_owned(), "the controller was reset".to_owned());
            return Err(ReadError::Failed { name, offset: 0, len: 0, what });
        }
        self.inner.poll(out, wait)
    }

    fn outstanding(&self) -> usize {
        self.inner.outstanding()
    }
}

/// Guards against the cause of a reader's death that is recorded and never shown: units and rows name it, at
/// once and in later passes.
#[test]
fn what_made_the_reader_end_is_told_and_stays() {
    for at in 1..6 {
        let script = Script { seed: 7, delay_max: 4, ..Script::default() };
        let (_arena, s, data) = streamer_on(12, 3, false, script, |inner| Box::new(Dies { inner, at }));
        for pass in 0..3 {
            // However many passes are whole before that.
            let e = (0..).find_map(|i| check(&s, i % 6, &data).err()).unwrap().to_string();
            assert!(e.contains("unit ") && e.contains("controller was reset"), "pass {pass}: {e}");
            let rows = s.read_rows(FileId(0), &[5], 100, &mut [0; 100]).unwrap_err().to_string();
            assert!(rows.contains("controller was reset"), "{rows}");
            s.give_up();
        }
        // Another schedule does not bring it back.
        s.reschedule(Place::Host, [5, 3].map(Step::Unit).to_vec(), Vec::new());
        let e = (0..2).find_map(|i| check(&s, [5, 3][i], &data).err()).unwrap().to_string();
        assert!(e.contains("unit ") && e.contains("controller was reset"), "{e}");
    }
}

#[test]
fn a_flow_ends_in_the_middle_of_a_pass() {
    let script = Script { seed: 1, delay_max: 50, ..Script::default() };
    let (_arena, s, _) = streamer(12, 3, false, script);
    s.acquire(0).unwrap();
    drop(s);
}

/// Another schedule is gone on with when what was in flight has ended; without steps nothing is written to a frame.
#[test]
fn a_flow_is_rescheduled() {
    for seed in 0..40 {
        let script = Script { seed, delay_max: 4, ..Script::default() };
        let (_arena, s, data) = streamer(12, 2 + seed as usize % 4, false, script);
        (0..seed as usize % 6).for_each(|unit| check(&s, unit, &data).unwrap());
        s.reschedule(Place::Host, Vec::new(), Vec::new());
        let bytes = s.storage().bytes;
        let mut row = [0; 300];
        s.read_rows(FileId(0), &[977], 300, &mut row).unwrap();
        assert_eq!((&row[..], s.storage().bytes), (&data[977..][..300], bytes + 300));
        s.reschedule(Place::Host, [5, 3, 11].map(Step::Unit).to_vec(), Vec::new());
        for unit in [5, 3, 11, 5, 3, 11, 5] {
            check(&s, unit, &data).unwrap();
        }
    }
}

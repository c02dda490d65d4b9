//! From a trace's events to a timeline and to rates over time.

use super::{LinkKind, Rates, Row, Span, SpanKind, Timeline, Unit};
use crate::pipeline::{Event, EventKind};
use crate::plan::Home;

/// Passes a timeline shows at most, and the spans beyond which it shows fewer.
const PASSES_SHOWN: usize = 3;
const SPANS_MAX: usize = 6000;
/// Parts that rates over time are counted in.
const BINS: usize = 240;

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// Start and end of each pass of one token.
fn one_token_passes(events: &[Event]) -> Vec<(u64, u64)> {
    let passes = events.iter().filter(|e| e.kind == EventKind::Pass && e.unit == 1);
    passes.map(|e| (e.start_ns, e.end_ns)).collect()
}

/// A few passes from the middle of the one-token passes, when the ring has long been turning. Copies
/// and computes are drawn in the slots that their units were brought to. `None` without such passes.
pub fn measured(events: &[Event], units: &[Unit], on_device: bool) -> Option<Timeline> {
    let passes = one_token_passes(events);
    let spans = spans(events, units, on_device);
    let mut n = PASSES_SHOWN.min(passes.len());
    loop {
        let first = (passes.len() - n) / 2;
        let shown = passes.get(first..first + n).filter(|p| !p.is_empty())?;
        let (start_s, end_s) = (seconds(shown[0].0), seconds(shown[n - 1].1));
        let spans: Vec<Span> = spans.iter().copied().filter(|s| s.end_s > start_s && s.start_s < end_s).collect();
        if spans.len() > SPANS_MAX && n > 1 {
            n -= 1;
            continue;
        }
        let mut boundaries_s: Vec<f64> = shown.iter().map(|p| seconds(p.0)).collect();
        boundaries_s.push(end_s);
        return Some(Timeline {
            title: "Measured".into(),
            about: format!("{n} of {} passes of one token, from the middle.", passes.len()),
            start_s,
            end_s,
            boundaries_s,
            spans,
        });
    }
}

fn spans(events: &[Event], units: &[Unit], on_device: bool) -> Vec<Span> {
    // The slot that each unit was brought to last: events are noted when they end, so a unit's
    // computing comes after what brought it.
    let mut brought: Vec<Option<Row>> = vec![None; units.len()];
    let mut out = Vec::with_capacity(events.len());
    for e in events {
        let Some(unit) = units.get(e.unit).filter(|_| e.kind != EventKind::Pass) else { continue };
        let resident = match unit.home {
            Home::A => true,
            Home::B => !on_device,
            Home::C => false,
        };
        let (kind, row) = match e.kind {
            EventKind::Read => (SpanKind::Read, Row::RamSlot(e.slot)),
            EventKind::Copy => (SpanKind::Copy, Row::VramSlot(e.slot)),
            EventKind::Wait => (SpanKind::Wait, Row::Waiting),
            EventKind::Beside => (SpanKind::Beside, Row::Processors),
            EventKind::Compute if resident => (SpanKind::Compute, Row::Resident),
            EventKind::Compute => (SpanKind::Compute, brought[e.unit].unwrap_or(Row::Resident)),
            EventKind::Pass => continue,
        };
        if matches!(kind, SpanKind::Read | SpanKind::Copy) {
            brought[e.unit] = Some(row);
        }
        out.push(Span { kind, row, unit: e.unit, start_s: seconds(e.start_ns), end_s: seconds(e.end_ns) });
    }
    out
}

/// Rates of storage, of the link to a device and of RAM that processors beside it compute from, from the first one-token pass to the
/// last, from the spans of reads, copies and parts; each span's bytes are spread evenly over it. `ceiling` gives GB/s.
pub fn rates(events: &[Event], units: &[Unit], ceiling: impl Fn(LinkKind) -> Option<f64>) -> Vec<Rates> {
    let passes = one_token_passes(events);
    let (Some(first), Some(last)) = (passes.first(), passes.last()) else { return Vec::new() };
    let (from, to) = (seconds(first.0), seconds(last.1));
    let links = [
        (EventKind::Read, LinkKind::Storage, "Storage to RAM"),
        (EventKind::Copy, LinkKind::Gpu, "RAM to VRAM"),
        (EventKind::Beside, LinkKind::Ram, "RAM, computed by processors next to the GPU"),
    ];
    let of = |(event, kind, name): (EventKind, LinkKind, &str)| {
        let mut bytes = vec![0.0; BINS];
        let width = (to - from) / BINS as f64;
        let mut any = false;
        for e in events.iter().filter(|e| e.kind == event) {
            let Some(unit) = units.get(e.unit) else { continue };
            any |= spread(&mut bytes, from, width, e, unit.bytes as f64);
        }
        any.then(|| Rates {
            kind,
            name: name.into(),
            start_s: from,
            end_s: to,
            gb_per_s: bytes.iter().map(|b| b / width / 1e9).collect(),
            ceiling_gb_per_s: ceiling(kind),
        })
    };
    if to > from { links.into_iter().filter_map(of).collect() } else { Vec::new() }
}

/// Adds an event's bytes to the parts of time that it covers; false if it covers none.
fn spread(bins: &mut [f64], from: f64, width: f64, e: &Event, bytes: f64) -> bool {
    let (start, end) = (seconds(e.start_ns), seconds(e.end_ns).max(seconds(e.start_ns) + 1e-9));
    let at = |t: f64| ((t - from) / width).clamp(0.0, bins.len() as f64);
    let (a, b) = (at(start), at(end));
    let per_bin = bytes * width / (end - start);
    for (i, bin) in bins.iter_mut().enumerate().take(b.ceil() as usize).skip(a as usize) {
        *bin += per_bin * (b.min(i as f64 + 1.0) - a.max(i as f64)).max(0.0);
    }
    b > a
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(name: &str, home: Home) -> Unit {
        Unit { name: name.into(), home, bytes: 1_000_000_000, block: Some(0) }
    }

    fn event(kind: EventKind, unit: usize, slot: usize, start_s: u64, end_s: u64) -> Event {
        Event { kind, unit, slot, start_ns: start_s * 1_000_000_000, end_ns: end_s * 1_000_000_000 }
    }

    #[test]
    fn computes_are_drawn_in_the_slot_of_their_read() {
        let units = [unit("a", Home::B), unit("b", Home::C)];
        let events = [
            event(EventKind::Read, 1, 2, 0, 2),
            event(EventKind::Compute, 0, 0, 1, 2),
            event(EventKind::Wait, 1, 2, 2, 3),
            event(EventKind::Compute, 1, 0, 3, 4),
            event(EventKind::Pass, 1, 0, 1, 4),
            event(EventKind::Pass, 7, 0, 5, 9),
        ];
        let t = measured(&events, &units, false).unwrap();
        assert_eq!((t.start_s, t.end_s), (1.0, 4.0));
        assert_eq!(t.boundaries_s, [1.0, 4.0]);
        let rows: Vec<_> = t.spans.iter().map(|s| (s.kind, s.row)).collect();
        assert_eq!(
            rows,
            [
                (SpanKind::Read, Row::RamSlot(2)),
                (SpanKind::Compute, Row::Resident),
                (SpanKind::Wait, Row::Waiting),
                (SpanKind::Compute, Row::RamSlot(2)),
            ]
        );
        assert!(measured(&events[..4], &units, false).is_none(), "no pass of one token");
    }

    #[test]
    fn what_processors_beside_a_gpu_compute_has_a_row_and_a_rate() {
        let units = [unit("a", Home::A), unit("b", Home::B)];
        let events = [
            event(EventKind::Compute, 0, 0, 0, 1),
            event(EventKind::Beside, 1, 0, 1, 3),
            event(EventKind::Pass, 1, 0, 0, 4),
        ];
        let t = measured(&events, &units, true).unwrap();
        let rows: Vec<_> = t.spans.iter().map(|s| (s.kind, s.row)).collect();
        assert_eq!(rows, [(SpanKind::Compute, Row::Resident), (SpanKind::Beside, Row::Processors)]);
        let r = rates(&events, &units, |_| None);
        assert_eq!((r.len(), r[0].kind), (1, LinkKind::Ram));
    }

    #[test]
    fn rates_add_up_to_the_bytes() {
        let units = [unit("a", Home::C)];
        let events = [
            event(EventKind::Read, 0, 0, 0, 4),
            event(EventKind::Read, 0, 1, 2, 4),
            event(EventKind::Pass, 1, 0, 2, 6),
        ];
        let r = rates(&events, &units, |_| Some(3.0));
        assert_eq!((r.len(), r[0].kind, r[0].ceiling_gb_per_s), (1, LinkKind::Storage, Some(3.0)));
        let gb = r[0].gb_per_s.iter().sum::<f64>() * 4.0 / r[0].gb_per_s.len() as f64;
        assert!((gb - 1.5).abs() < 1e-6, "half of the first read and all of the second: {gb}");
        assert!(rates(&events[..2], &units, |_| None).is_empty());
    }
}

//! What happened when: reads and computes by unit and slot, for ui.perfetto.dev.

use std::io::Write;
use std::time::Instant;

/// What an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A unit was read into a slot.
    Read,
    /// A unit was copied from a slot to the device.
    Copy,
    /// A unit was computed.
    Compute,
    /// A unit was computed by processors next to a device.
    Beside,
    /// The consumer waited for a unit.
    Wait,
    /// A pass, from embedding to the call of its last operation; the number of its tokens stands in place
    /// of a unit.
    Pass,
}

/// An event.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// What it is.
    pub kind: EventKind,
    /// The unit.
    pub unit: usize,
    /// Its slot; 0 for resident units.
    pub slot: usize,
    /// Nanoseconds since the trace began.
    pub start_ns: u64,
    /// Nanoseconds since the trace began.
    pub end_ns: u64,
}

/// Events in a buffer that never grows; later ones are dropped when it is full.
#[derive(Debug)]
pub struct Trace {
    start: Instant,
    events: Vec<Event>,
}

impl Trace {
    /// Room for `capacity` events; 0 keeps none.
    pub fn new(capacity: usize) -> Trace {
        Trace { start: Instant::now(), events: Vec::with_capacity(capacity) }
    }

    /// Adds an event if there is room.
    pub fn add(&mut self, kind: EventKind, unit: usize, slot: usize, from: Instant, to: Instant) {
        if self.events.len() < self.events.capacity() {
            let ns = |t: Instant| t.saturating_duration_since(self.start).as_nanos() as u64;
            self.events.push(Event { kind, unit, slot, start_ns: ns(from), end_ns: ns(to) });
        }
    }

    /// The events so far.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// Writes the events (see [`write_events`]).
    pub fn write(&self, out: &mut impl Write, name: impl Fn(usize) -> String) -> std::io::Result<()> {
        write_events(&self.events, out, name)
    }
}

/// Writes Chrome's trace event format: one track a slot for reads, one each for computes, those of processors next to a device,
/// waits, copies and passes. `name` names a unit.
pub fn write_events(events: &[Event], out: &mut impl Write, name: impl Fn(usize) -> String) -> std::io::Result<()> {
    writeln!(out, "{{\"traceEvents\":[")?;
    for (i, e) in events.iter().enumerate() {
        let (what, track) = match e.kind {
            EventKind::Compute => ("compute", 0),
            EventKind::Wait => ("wait", 1),
            EventKind::Copy => ("copy", 2),
            EventKind::Pass => ("pass", 3),
            EventKind::Beside => ("compute beside", 4),
            EventKind::Read => ("read", 5 + e.slot),
        };
        let of = if e.kind == EventKind::Pass { format!("of {} tokens", e.unit) } else { name(e.unit) };
        let event = serde_json::json!({
            "name": format!("{what} {of}"), "cat": what, "ph": "X", "pid": 1, "tid": track,
            "ts": e.start_ns as f64 / 1e3, "dur": (e.end_ns - e.start_ns) as f64 / 1e3,
        });
        writeln!(out, "{event}{}", if i + 1 < events.len() { "," } else { "" })?;
    }
    writeln!(out, "]}}")
}

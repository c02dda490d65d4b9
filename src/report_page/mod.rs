//! One page about a run or a prediction: figures, tier map, timeline, rates, links, stalls.
//!
//! [`Page`] is plain data that a benchmark fills from its session and a planner from its simulator;
//! [`Page::html`] makes one self-contained file of it, which asks for nothing over a network and is
//! readable without scripts (these only zoom). [`measured`] turns a trace's events into a [`Timeline`].

mod figures;
mod html;
mod markup;
mod trace;

pub use trace::{measured, rates};

use crate::plan::Home;

/// Everything a page shows. What is not known stays `None` or empty and is left out or shown as a dash.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// Heading, for example the model's name.
    pub title: String,
    /// What was run or predicted: name and value, in order (model, machine, device, command, day).
    pub facts: Vec<(String, String)>,
    /// Tokens per second of decoding, measured.
    pub achieved_tokens_per_s: Option<f64>,
    /// Tokens per second that are predicted, and the link that binds.
    pub predicted: Option<Predicted>,
    /// More figures for the top: name, value with its unit.
    pub figures: Vec<(String, String)>,
    /// Every unit, in pass order; spans name them by index.
    pub units: Vec<Unit>,
    /// Every link.
    pub links: Vec<Link>,
    /// Every site that computes.
    pub sites: Vec<Site>,
    /// Where time went that nothing was computed in.
    pub stalls: Vec<Stall>,
    /// Timelines, for example measured and simulated.
    pub timelines: Vec<Timeline>,
    /// Rates over time, a curve a link.
    pub rates: Vec<Rates>,
    /// One-line notes on fallbacks.
    pub notes: Vec<String>,
}

/// A prediction.
#[derive(Clone, Debug)]
pub struct Predicted {
    /// Tokens per second of decoding.
    pub tokens_per_s: f64,
    /// The link that binds.
    pub bound_by: String,
    /// Where the figure comes from, for example "roofline of measured ceilings".
    pub source: String,
}

/// A unit of weights.
#[derive(Clone, Debug)]
pub struct Unit {
    /// For example `blk.3`.
    pub name: String,
    /// Where it lives.
    pub home: Home,
    /// Its bytes.
    pub bytes: u64,
    /// Its block; `None` for slices of the output head.
    pub block: Option<usize>,
}

/// Which link a curve, a row or a span belongs to; it decides the colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// Storage to RAM.
    Storage,
    /// RAM to VRAM.
    Gpu,
    /// Reads of RAM by processors.
    Ram,
    /// Reads of VRAM by the GPU.
    Vram,
}

/// What a link carried.
#[derive(Clone, Debug)]
pub struct Link {
    /// Which.
    pub kind: LinkKind,
    /// Its name for people.
    pub name: String,
    /// Bytes carried in the passes that are reported.
    pub bytes: Option<u64>,
    /// GB/s over the passes' time.
    pub gb_per_s: Option<f64>,
    /// GB/s that it can carry.
    pub ceiling_gb_per_s: Option<f64>,
    /// Share of the passes' time in which it was busy, 0 to 1.
    pub busy: Option<f64>,
}

/// What a site computes.
#[derive(Clone, Debug)]
pub struct Site {
    /// Its name for people.
    pub name: String,
    /// Units that it computes, all or some of their uses.
    pub units: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of weights that it computes for a token.
    pub bytes_per_token: Option<f64>,
    /// Share of the passes' time in which it computed, 0 to 1.
    pub busy: Option<f64>,
    /// Share of the passes' time in which it waited for the other site, 0 to 1.
    pub waits: Option<f64>,
}

/// Time lost to one cause.
#[derive(Clone, Debug)]
pub struct Stall {
    /// For example "computing waited for storage".
    pub cause: String,
    /// Seconds; `None` where not measured.
    pub seconds: Option<f64>,
    /// Share of the passes' time, 0 to 1.
    pub share: Option<f64>,
}

/// What a span is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// A unit is read from storage into a slot in RAM.
    Read,
    /// A unit is copied to a slot in VRAM.
    Copy,
    /// A unit is computed.
    Compute,
    /// A unit is computed by processors next to a device.
    Beside,
    /// Computing waits for a unit.
    Wait,
}

/// The row of a timeline that a span is drawn in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Row {
    /// Units at home where they are computed.
    Resident,
    /// Units that processors next to a device compute.
    Processors,
    /// A slot in VRAM.
    VramSlot(usize),
    /// A slot in RAM.
    RamSlot(usize),
    /// Computing waits.
    Waiting,
}

/// Something that took time.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// What.
    pub kind: SpanKind,
    /// Where it is drawn.
    pub row: Row,
    /// Index into [`Page::units`].
    pub unit: usize,
    /// Seconds on the timeline's clock.
    pub start_s: f64,
    /// Seconds on the timeline's clock, not before `start_s`.
    pub end_s: f64,
}

/// A few passes, span by span.
#[derive(Clone, Debug)]
pub struct Timeline {
    /// Heading, for example "measured" or "simulated".
    pub title: String,
    /// What is seen, in a sentence.
    pub about: String,
    /// First second shown.
    pub start_s: f64,
    /// Last second shown.
    pub end_s: f64,
    /// Token boundaries: where each pass begins and where the last ends.
    pub boundaries_s: Vec<f64>,
    /// The spans that touch what is shown.
    pub spans: Vec<Span>,
}

/// A link's rate over time.
#[derive(Clone, Debug)]
pub struct Rates {
    /// Which link.
    pub kind: LinkKind,
    /// Its name for people.
    pub name: String,
    /// First second.
    pub start_s: f64,
    /// Last second.
    pub end_s: f64,
    /// GB/s in equal parts of that time.
    pub gb_per_s: Vec<f64>,
    /// GB/s that it can carry.
    pub ceiling_gb_per_s: Option<f64>,
}

//! The page of `--html` with made-up data: a model of 80 blocks over three tiers, whose reads, copies and
//! computes follow each other as through a ring. For looking at the page without such a machine:
//!
//!     cargo run --example report_page page.html

use nt::plan::Home;
use nt::report_page::{Link, LinkKind, Page, Predicted, Rates, Row, Site, Span, SpanKind, Stall, Timeline, Unit};

const BLOCK: u64 = 510 << 20;
const RAM_SLOTS: usize = 4;
const VRAM_SLOTS: usize = 3;
const PASSES: usize = 3;
/// Bytes a second of storage, the link and VRAM.
const RATES: [f64; 3] = [7.0e9, 25.0e9, 900.0e9];

fn units() -> Vec<Unit> {
    // 22 blocks in VRAM, 34 in RAM, 24 on storage, dealt in proportion over the depth.
    let home = |i: usize| match (i * 37 + 11) % 80 {
        0..22 => Home::A,
        22..56 => Home::B,
        _ => Home::C,
    };
    let block = |i| Unit { name: format!("blk.{i}"), home: home(i), bytes: BLOCK, block: Some(i) };
    let head = |i| Unit { name: format!("head {i}"), home: Home::A, bytes: 130 << 20, block: None };
    (0..80).map(block).chain((0..6).map(head)).collect()
}

/// Each resource takes the next unit as soon as it and a slot are free.
fn timeline(units: &[Unit]) -> Timeline {
    let (mut storage, mut link, mut gpu) = (0.0f64, 0.0f64, 0.0f64);
    let (mut ram_free, mut vram_free) = ([0.0f64; RAM_SLOTS], [0.0f64; VRAM_SLOTS]);
    let (mut n_reads, mut n_copies) = (0, 0);
    let mut spans = Vec::new();
    let mut boundaries_s = vec![0.0];
    for _ in 0..PASSES {
        for (unit, u) in units.iter().enumerate() {
            let bytes = u.bytes as f64;
            let mut there = 0.0f64;
            let mut add = |kind, row, start_s, end_s| spans.push(Span { kind, row, unit, start_s, end_s });
            let ram = n_reads % RAM_SLOTS;
            if u.home == Home::C {
                n_reads += 1;
                let from = storage.max(ram_free[ram]);
                (storage, there) = (from + bytes / RATES[0], from + bytes / RATES[0]);
                add(SpanKind::Read, Row::RamSlot(ram), from, storage);
            }
            let vram = n_copies % VRAM_SLOTS;
            if u.home != Home::A {
                n_copies += 1;
                let from = link.max(vram_free[vram]).max(there);
                (link, there) = (from + bytes / RATES[1], from + bytes / RATES[1]);
                add(SpanKind::Copy, Row::VramSlot(vram), from, link);
                if u.home == Home::C {
                    ram_free[ram] = link;
                }
            }
            if there > gpu {
                add(SpanKind::Wait, Row::Waiting, gpu, there);
            }
            let from = gpu.max(there);
            gpu = from + bytes / RATES[2];
            let row = if u.home == Home::A { Row::Resident } else { Row::VramSlot(vram) };
            add(SpanKind::Compute, row, from, gpu);
            if u.home != Home::A {
                vram_free[vram] = gpu;
            }
        }
        boundaries_s.push(gpu);
    }
    let (start_s, end_s) = (boundaries_s[1], gpu);
    let about = "Two passes of one token, made up.".into();
    let boundaries_s = boundaries_s[1..].to_vec();
    Timeline { title: "Simulated".into(), about, start_s, end_s, boundaries_s, spans }
}

fn main() -> std::io::Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "page.html".into());
    let units = units();
    let timeline = timeline(&units);
    let pass_s = (timeline.end_s - timeline.start_s) / (PASSES - 1) as f64;
    let bytes = |wanted: fn(Home) -> bool| units.iter().filter(|u| wanted(u.home)).map(|u| u.bytes).sum::<u64>();
    let link = |kind, name: &str, bytes: u64, rate: f64| Link {
        kind,
        name: name.into(),
        bytes: Some(bytes),
        gb_per_s: Some(bytes as f64 / pass_s / 1e9),
        ceiling_gb_per_s: Some(rate / 1e9),
        busy: Some(bytes as f64 / rate / pass_s),
    };
    let wave = |i: usize| 6.6 + 0.35 * (i as f64 / 9.0).sin() - if i > 170 { 1.4 } else { 0.0 };
    let waited: f64 = timeline.spans.iter().filter(|s| s.kind == SpanKind::Wait).map(|s| s.end_s - s.start_s).sum();
    let page = Page {
        title: "llama-3-70b-Q4_K_M.gguf".into(),
        facts: [("model", "llama, 80 blocks, 40.6 GiB"), ("machine", "made up"), ("buffers", "4 in RAM, 3 in VRAM")]
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .to_vec(),
        achieved_tokens_per_s: Some(1.0 / pass_s),
        predicted: Some(Predicted {
            tokens_per_s: RATES[0] / bytes(|h| h == Home::C) as f64,
            bound_by: "nvme".into(),
            source: "made up".into(),
        }),
        figures: vec![("first token after".into(), "3.20 s".into()), ("VRAM in use".into(), "14.8 GiB".into())],
        links: vec![
            link(LinkKind::Storage, "storage to RAM", bytes(|h| h == Home::C), RATES[0]),
            link(LinkKind::Gpu, "RAM to VRAM", bytes(|h| h != Home::A), RATES[1]),
            link(LinkKind::Vram, "VRAM, read by the GPU", bytes(|_| true), RATES[2]),
        ],
        sites: vec![Site {
            name: "GPU".into(),
            units: units.len(),
            bytes: bytes(|_| true),
            bytes_per_token: Some(bytes(|_| true) as f64),
            busy: None,
            waits: None,
        }],
        stalls: vec![Stall {
            cause: "computing waited for the link".into(),
            seconds: Some(waited),
            share: Some(waited / (pass_s * PASSES as f64)),
        }],
        rates: vec![Rates {
            kind: LinkKind::Storage,
            name: "storage to RAM".into(),
            start_s: 0.0,
            end_s: 60.0,
            gb_per_s: (0..240).map(wave).collect(),
            ceiling_gb_per_s: Some(RATES[0] / 1e9),
        }],
        timelines: vec![timeline],
        units,
        notes: vec!["All figures of this page are made up.".into()],
    };
    std::fs::write(path, page.html())
}

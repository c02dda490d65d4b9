//! The page's drawings, as SVG.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::markup::{escape, figure};
use super::{LinkKind, Rates, Row, SpanKind, Timeline, Unit};
use crate::plan::{Home, format_bytes};

/// Height of a row of a timeline, in CSS pixels; the style sheet says the same.
const ROW_PX: usize = 18;

/// Class of a home's colour.
pub fn home_class(home: Home) -> &'static str {
    match home {
        Home::A => "vram",
        Home::B => "ram",
        Home::C => "storage",
    }
}

/// A home's name for people.
pub fn home_name(home: Home) -> &'static str {
    match home {
        Home::A => "VRAM",
        Home::B => "RAM",
        Home::C => "storage",
    }
}

fn kind_class(kind: SpanKind) -> &'static str {
    match kind {
        SpanKind::Read => "storage",
        SpanKind::Copy => "gpu",
        SpanKind::Compute => "compute",
        SpanKind::Beside => "beside",
        SpanKind::Wait => "wait",
    }
}

fn kind_name(kind: SpanKind) -> &'static str {
    match kind {
        SpanKind::Read => "read",
        SpanKind::Copy => "copy",
        SpanKind::Compute | SpanKind::Beside => "compute",
        SpanKind::Wait => "wait for",
    }
}

/// Class of a link's colour.
pub fn link_class(kind: LinkKind) -> &'static str {
    match kind {
        LinkKind::Storage => "storage",
        LinkKind::Gpu => "gpu",
        LinkKind::Ram => "ram",
        LinkKind::Vram => "vram",
    }
}

/// All units: a column a block (and one for each slice of the head), as wide as its bytes, cut up by
/// the bytes of its units, coloured by home.
pub fn tier_map(units: &[Unit]) -> String {
    let mut columns: Vec<(Option<usize>, Vec<&Unit>)> = Vec::new();
    for unit in units {
        match columns.iter_mut().find(|(block, _)| unit.block.is_some() && *block == unit.block) {
            Some((_, column)) => column.push(unit),
            None => columns.push((unit.block, vec![unit])),
        }
    }
    let total = units.iter().map(|u| u.bytes as f64).sum::<f64>().max(1.0);
    let mut out = String::from(
        r#"<svg class="map" viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="Homes of all units, in pass order">"#,
    );
    let mut x = 0.0;
    for (_, column) in &columns {
        let bytes = column.iter().map(|u| u.bytes as f64).sum::<f64>();
        let width = bytes / total * 1000.0;
        let mut y = 0.0;
        for u in column {
            let height = u.bytes as f64 / bytes.max(1.0) * 100.0;
            let (class, home) = (home_class(u.home), home_name(u.home));
            let name = escape(&u.name);
            let size = format_bytes(u.bytes);
            let _ = write!(
                out,
                r#"<rect class="{class}" x="{x:.3}" y="{y:.2}" width="{width:.3}" height="{height:.2}"><title>{name}: {home}, {size}</title></rect>"#
            );
            y += height;
        }
        x += width;
    }
    out.push_str("</svg>");
    out
}

fn row_name(row: Row) -> String {
    match row {
        Row::Resident => "resident".into(),
        Row::Processors => "processors".into(),
        Row::VramSlot(i) => format!("VRAM slot {i}"),
        Row::RamSlot(i) => format!("RAM slot {i}"),
        Row::Waiting => "waiting".into(),
    }
}

/// A timeline with its rows, axis and controls. Inside, a unit of length is a microsecond.
pub fn timeline(t: &Timeline, units: &[Unit]) -> String {
    let shown = || t.spans.iter().filter(|s| s.end_s > t.start_s && s.start_s < t.end_s);
    let mut rows: BTreeMap<Row, usize> = shown().map(|s| (s.row, 0)).collect();
    for (i, at) in rows.values_mut().enumerate() {
        *at = i;
    }
    let us = |s: f64| (s.clamp(t.start_s, t.end_s) - t.start_s) * 1e6;
    let (width, height) = (us(t.end_s).max(1.0), rows.len().max(1) * ROW_PX);
    let mut out = String::from(r#"<div class="timeline"><div class="rows">"#);
    for row in rows.keys() {
        let _ = write!(out, "<span>{}</span>", row_name(*row));
    }
    let _ = write!(
        out,
        r#"</div><div class="plot"><svg viewBox="0 0 {width:.1} {height}" data-width="{width:.1}" preserveAspectRatio="none" style="height:{height}px" role="img" aria-label="Timeline: {}">"#,
        escape(&t.title)
    );
    for s in shown() {
        let (x, end, y) = (us(s.start_s), us(s.end_s), rows[&s.row] * ROW_PX + 2);
        let name = units.get(s.unit).map_or("", |u| u.name.as_str());
        let class = kind_class(s.kind);
        let _ = write!(
            out,
            r#"<rect class="{class}" x="{x:.1}" y="{y}" width="{:.1}" height="{}"><title>{} {} ({}), {} ms, from {} ms</title></rect>"#,
            (end - x).max(0.1),
            ROW_PX - 4,
            kind_name(s.kind),
            escape(name),
            row_name(s.row),
            figure((s.end_s - s.start_s) * 1e3),
            figure((s.start_s - t.start_s) * 1e3)
        );
    }
    for b in &t.boundaries_s {
        let x = us(*b);
        let _ = write!(out, r#"<line class="boundary" x1="{x:.1}" x2="{x:.1}" y1="0" y2="{height}"/>"#);
    }
    out.push_str(r#"</svg><div class="axis">"#);
    for (share, label) in ticks(width / 1e3, 5) {
        let _ = write!(out, r#"<span style="left:{:.2}%">{label}</span>"#, share * 100.0);
    }
    out.push_str(r#"</div></div></div><p class="detail" aria-live="polite"></p>"#);
    out
}

/// About `n` round values from 0 to `max`: share of the length, and label.
fn ticks(max: f64, n: usize) -> Vec<(f64, String)> {
    if max.is_nan() || max <= 0.0 {
        return Vec::new();
    }
    let rough = max / n as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough).unwrap_or(rough);
    // A label at the very end would be cut off.
    let values = (0..=n).map(|i| i as f64 * step).filter(|v| *v <= max * 0.97);
    values.map(|v| (v / max, figure(v))).collect()
}

/// The next half of a power of ten: 7.3 becomes 7.5, and 0 becomes 1.
fn round_up(v: f64) -> f64 {
    let power = 10f64.powf(v.log10().floor());
    if v > 0.0 && v.is_finite() { (v / power * 2.0).ceil() / 2.0 * power } else { 1.0 }
}

/// A link's rate over time, with its ceiling.
pub fn rate_curve(r: &Rates) -> String {
    let top = round_up(r.gb_per_s.iter().copied().chain(r.ceiling_gb_per_s).fold(0.0, f64::max) * 1.05);
    let n = r.gb_per_s.len().max(1);
    let (mut line, mut area) = (String::new(), String::from("M0 100"));
    for (i, v) in r.gb_per_s.iter().enumerate() {
        let (x, y) = ((i as f64 + 0.5) / n as f64 * 1000.0, 100.0 - v / top * 100.0);
        let _ = write!(line, "{}{x:.1} {y:.2}", if i == 0 { "M" } else { "L" });
        let _ = write!(area, "L{x:.1} {y:.2}");
    }
    area.push_str("L1000 100Z");
    let class = link_class(r.kind);
    let mut out = format!(
        r#"<div class="curve"><div class="scale"><span>{}</span><span>0</span></div><div class="plot"><svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="Rate of {} over time"><path class="area {class}" d="{area}"/><path class="line {class}" d="{line}"/>"#,
        figure(top),
        escape(&r.name)
    );
    if let Some(c) = r.ceiling_gb_per_s {
        let y = 100.0 - c / top * 100.0;
        let _ = write!(out, r#"<line class="ceiling" x1="0" x2="1000" y1="{y:.2}" y2="{y:.2}"/>"#);
    }
    out.push_str(r#"</svg><div class="axis">"#);
    for (share, label) in ticks(r.end_s - r.start_s, 5) {
        let _ = write!(out, r#"<span style="left:{:.2}%">{label}</span>"#, share * 100.0);
    }
    out.push_str("</div></div></div>");
    out
}

#[cfg(test)]
mod tests {
    use super::super::Span;
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let labels = |max| ticks(max, 5).into_iter().map(|t| t.1).collect::<Vec<_>>();
        assert_eq!(labels(10.0), ["0", "2", "4", "6", "8"]);
        assert_eq!(labels(0.37), ["0", "0.1", "0.2", "0.3"]);
        assert!(labels(f64::NAN).is_empty() && labels(0.0).is_empty());
    }

    #[test]
    fn only_what_touches_the_shown_time_is_drawn() {
        let span = |row, start_s, end_s| Span { kind: SpanKind::Read, row: Row::RamSlot(row), unit: 0, start_s, end_s };
        let t = Timeline {
            title: "t".into(),
            about: String::new(),
            start_s: 1.0,
            end_s: 2.0,
            boundaries_s: vec![1.0, 2.0],
            spans: vec![span(0, 0.0, 1.0), span(1, 0.5, 1.5), span(2, 2.0, 3.0)],
        };
        let svg = timeline(&t, &[]);
        assert_eq!(svg.matches("<rect").count(), 1);
        assert!(svg.contains("RAM slot 1") && svg.contains(r#"x="0.0" y="2" width="500000.0""#), "{svg}");
    }

    #[test]
    fn experts_share_the_column_of_their_block() {
        let unit = |block, bytes| Unit { name: "u".into(), home: Home::B, bytes, block };
        let svg = tier_map(&[unit(Some(0), 50), unit(Some(0), 50), unit(None, 100)]);
        assert_eq!(svg.matches(r#"x="0.000""#).count(), 2);
        assert_eq!(svg.matches(r#"x="500.000" y="0.00" width="500.000" height="100.00""#).count(), 1);
    }
}

//! A self-contained SVG: read rate over reads in flight, a line a block size, both axes logarithmic.

use std::fmt::Write;

use super::storage::Report;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 520.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 130.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 60.0;
/// Colours that stay apart for most kinds of colour blindness.
const COLOURS: [&str; 8] = ["#4477aa", "#ee6677", "#228833", "#aa8800", "#66ccee", "#aa3377", "#555555", "#cc6611"];

/// Position on a logarithmic axis from `from` to `to` at pixels `start` to `end`.
fn at(value: f64, (from, to): (f64, f64), (start, end): (f64, f64)) -> f64 {
    let share = (value.max(from).ln() - from.ln()) / (to.ln() - from.ln());
    start + share * (end - start)
}

struct Axes {
    depths: (f64, f64),
    rates: (f64, f64),
}

impl Axes {
    fn of(report: &Report) -> Axes {
        let depths = report.cells.iter().map(|c| c.depth as f64);
        let rates = report.cells.iter().map(|c| c.bytes_per_s).filter(|r| *r > 0.0);
        let (low, high) = rates.fold((f64::MAX, 0.0f64), |(l, h), r| (l.min(r), h.max(r)));
        let (low, high) = if low > high { (1e6, 1e9) } else { (low * 0.8, high * 1.25) };
        let last = depths.clone().fold(1.0, f64::max);
        let first = depths.fold(last, f64::min);
        Axes { depths: (first, last.max(first * 2.0)), rates: (low, high) }
    }

    fn x(&self, depth: f64) -> f64 {
        at(depth, self.depths, (LEFT, WIDTH - RIGHT))
    }

    fn y(&self, rate: f64) -> f64 {
        at(rate, self.rates, (HEIGHT - BOTTOM, TOP))
    }
}

/// The picture of a storage report.
pub fn svg(report: &Report) -> String {
    let axes = Axes::of(report);
    let mut out = String::new();
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>"
    );
    text(&mut out, (WIDTH / 2.0, 24.0), "middle", "black", &format!("Read rate of {}", report.path));
    text(&mut out, (WIDTH / 2.0, 44.0), "middle", "#555", &subtitle(report));
    grid(&mut out, &axes, report);
    lines(&mut out, &axes, report);
    if let Some(k) = report.knee {
        let (x, y) = (axes.x(k.depth as f64), axes.y(k.bytes_per_s));
        let _ = writeln!(
            out,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"9\" fill=\"none\" stroke=\"black\" stroke-width=\"2\"/>"
        );
    }
    text(&mut out, ((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 16.0), "middle", "black", "reads in flight");
    let _ = writeln!(
        out,
        "<text transform=\"translate(20 {:.1}) rotate(-90)\" text-anchor=\"middle\">GB/s</text>\n</svg>",
        (TOP + HEIGHT - BOTTOM) / 2.0
    );
    out
}

fn subtitle(report: &Report) -> String {
    let way = if report.direct { "O_DIRECT" } else { "through the page cache" };
    match report.knee {
        Some(k) => format!(
            "{}, {way}; knee (circled): {} x {} at {:.2} GB/s",
            report.drive,
            size(k.block_bytes),
            k.depth,
            k.bytes_per_s / 1e9
        ),
        None => format!("{}, {way}", report.drive),
    }
}

fn grid(out: &mut String, axes: &Axes, report: &Report) {
    let (left, right, top, bottom) = (LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM);
    let mut depths: Vec<usize> = report.cells.iter().map(|c| c.depth).collect();
    depths.sort_unstable();
    depths.dedup();
    for depth in depths {
        let x = axes.x(depth as f64);
        line(out, (x, top), (x, bottom), "#ddd");
        text(out, (x, bottom + 18.0), "middle", "black", &depth.to_string());
    }
    let decades = (axes.rates.0.log10().floor() as i32)..=(axes.rates.1.log10().ceil() as i32);
    for rate in decades.flat_map(|d| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(d))) {
        if rate >= axes.rates.0 && rate <= axes.rates.1 {
            let y = axes.y(rate);
            line(out, (left, y), (right, y), "#ddd");
            text(out, (left - 8.0, y + 4.0), "end", "black", &format!("{}", (rate / 1e6).round() / 1e3));
        }
    }
    line(out, (left, bottom), (right, bottom), "black");
    line(out, (left, top), (left, bottom), "black");
}

/// A line a block size. The names stand in a column in the order of the lines' ends, moved apart
/// where they would overlap.
fn lines(out: &mut String, axes: &Axes, report: &Report) {
    let mut blocks: Vec<u64> = report.cells.iter().map(|c| c.block_bytes).collect();
    blocks.sort_unstable();
    blocks.dedup();
    let mut names = Vec::new();
    for (block, colour) in blocks.iter().zip(COLOURS.iter().cycle()) {
        let mut points = String::new();
        let mut end = (LEFT, TOP);
        for cell in report.cells.iter().filter(|c| c.block_bytes == *block) {
            end = (axes.x(cell.depth as f64), axes.y(cell.bytes_per_s));
            let _ = write!(points, "{:.1},{:.1} ", end.0, end.1);
            let _ = writeln!(out, "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>", end.0, end.1);
        }
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            points.trim_end()
        );
        names.push((end.1, size(*block), *colour));
    }
    names.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut below = f64::MIN;
    for (y, name, colour) in names {
        let y = y.max(below + 16.0);
        below = y;
        text(out, (WIDTH - RIGHT + 14.0, y + 4.0), "start", colour, &name);
    }
}

fn line(out: &mut String, a: (f64, f64), b: (f64, f64), colour: &str) {
    let _ = writeln!(
        out,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\"/>",
        a.0, a.1, b.0, b.1
    );
}

fn text(out: &mut String, (x, y): (f64, f64), anchor: &str, colour: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{words}</text>");
}

/// `128 KiB`, `2 MiB`.
pub fn size(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 20) { format!("{} MiB", bytes >> 20) } else { format!("{} KiB", bytes >> 10) }
}

#[cfg(test)]
mod tests {
    use super::super::Latency;
    use super::super::storage::Cell;
    use super::*;

    #[test]
    fn a_faster_cell_stands_higher_and_names_are_escaped() {
        let latency = Latency::default();
        let cell = |depth, bytes_per_s| Cell { block_bytes: 4096, depth, bytes_per_s, iops: 1.0, reads: 1, latency };
        let report = Report {
            path: "/data/<a>&b".into(),
            drive: "d".into(),
            len_bytes: 1,
            direct: true,
            cells: vec![cell(1, 1e8), cell(64, 5e9)],
            knee: Some(cell(64, 5e9)),
            ..Report::default()
        };
        let axes = Axes::of(&report);
        assert!(axes.y(5e9) < axes.y(1e8) && axes.x(64.0) > axes.x(1.0));
        let svg = svg(&report);
        assert!(svg.contains("/data/&lt;a&gt;&amp;b") && svg.contains("4 KiB") && !svg.contains("NaN"));
    }

    #[test]
    fn a_report_without_cells_is_still_a_picture() {
        let report = Report { path: "p".into(), drive: "d".into(), len_bytes: 1, direct: false, ..Report::default() };
        assert!(!svg(&report).contains("NaN"));
    }
}

//! The page as HTML. All text that comes from outside goes through [`escape`].

use std::fmt::Write;

use super::figures::{home_class, home_name, link_class, rate_curve, tier_map, timeline};
use super::markup::{escape, figure};
use super::{Page, SpanKind};
use crate::plan::{Home, SHARE_MAX, format_bytes};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

impl Page {
    /// The whole file.
    pub fn html(&self) -> String {
        let title = escape(&self.title);
        let mut out = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\
             <title>{title}</title><style>{STYLE}</style></head><body><main><h1>{title}</h1>"
        );
        for part in [self.facts(), self.headline(), self.map(), self.passes(), self.curves(), self.link_table()] {
            out.push_str(&part);
        }
        out.push_str(&self.site_table());
        out.push_str(&self.stall_table());
        out.push_str(&self.remarks());
        let _ = writeln!(out, "</main><script>{SCRIPT}</script></body></html>");
        out
    }

    fn facts(&self) -> String {
        let mut out = String::from("<dl class=\"facts\">");
        for (name, value) in &self.facts {
            let _ = write!(out, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value));
        }
        out + "</dl>"
    }

    fn headline(&self) -> String {
        let mut out = String::from("<section class=\"figures\">");
        let mut add = |class: &str, name: &str, value: &str, note: &str| {
            let note = if note.is_empty() { String::new() } else { format!("<small>{}</small>", escape(note)) };
            let _ =
                write!(out, "<div class=\"{class}\"><span>{}</span><b>{}</b>{note}</div>", escape(name), escape(value));
        };
        let rate = |r: f64| format!("{} tok/s", figure(r));
        if let Some(a) = self.achieved_tokens_per_s {
            let share = self.predicted.as_ref().filter(|p| p.tokens_per_s > 0.0);
            let note = share.map_or(String::new(), |p| match a / p.tokens_per_s {
                share if share <= SHARE_MAX => format!("{:.0} % of predicted", share * 100.0),
                _ => "faster than what the prediction counts with".into(),
            });
            add("main", "decode, achieved", &rate(a), &note);
        }
        if let Some(p) = &self.predicted {
            let class = if self.achieved_tokens_per_s.is_some() { "" } else { "main" };
            let note = format!("bound by {}; {}", p.bound_by, p.source);
            add(class, "decode, predicted", &rate(p.tokens_per_s), &note);
        }
        for (name, value) in &self.figures {
            add("", name, value, "");
        }
        out + "</section>"
    }

    fn map(&self) -> String {
        if self.units.is_empty() {
            return String::new();
        }
        let total = self.units.iter().map(|u| u.bytes).sum::<u64>().max(1);
        let mut legend = String::new();
        for home in [Home::A, Home::B, Home::C] {
            let of = self.units.iter().filter(|u| u.home == home);
            let (n, bytes) = of.fold((0, 0), |(n, b), u| (n + 1, b + u.bytes));
            if n > 0 {
                let _ = write!(
                    legend,
                    "<span><i class=\"{}\"></i>{}: {n} unit{}, {} ({:.0} %)</span>",
                    home_class(home),
                    home_name(home),
                    if n == 1 { "" } else { "s" },
                    format_bytes(bytes),
                    bytes as f64 / total as f64 * 100.0
                );
            }
        }
        let mut rows = String::new();
        for u in &self.units {
            let block = u.block.map_or("head".into(), |b| b.to_string());
            let _ = write!(
                rows,
                "<tr><td>{}</td><td>{block}</td><td>{}</td><td>{}</td></tr>",
                escape(&u.name),
                home_name(u.home),
                format_bytes(u.bytes)
            );
        }
        format!(
            "<section><h2>Where every unit lives</h2><p class=\"legend\">{legend}</p>{}\
             <p class=\"note\">In pass order from left to right, the output head last; areas are bytes.</p>\
             <details><summary>All {} units as a table</summary><div class=\"scroll\"><table><thead><tr><th>unit</th>\
             <th>block</th><th>home</th><th>size</th></tr></thead><tbody>{rows}</tbody></table></div></details></section>",
            tier_map(&self.units),
            self.units.len()
        )
    }

    fn passes(&self) -> String {
        let mut out = String::new();
        for t in &self.timelines {
            let mut legend = String::new();
            for (kind, class, name) in [
                (SpanKind::Read, "storage", "read from storage"),
                (SpanKind::Copy, "gpu", "copy to VRAM"),
                (SpanKind::Compute, "compute", "compute"),
                (SpanKind::Beside, "beside", "compute, processors next to the GPU"),
                (SpanKind::Wait, "wait", "computing waits"),
            ] {
                if t.spans.iter().any(|s| s.kind == kind) {
                    let _ = write!(legend, "<span><i class=\"{class}\"></i>{name}</span>");
                }
            }
            let _ = write!(
                out,
                "<section><h2>Timeline: {}</h2><p class=\"legend\">{legend}<span><i class=\"boundary\"></i>token boundary</span></p>\
                 <div class=\"zoom\" hidden><button data-zoom=\"2\" aria-label=\"zoom in\">+</button>\
                 <button data-zoom=\"0.5\" aria-label=\"zoom out\">&minus;</button><button data-zoom=\"0\">all</button></div>{}\
                 <p class=\"note\">{} Milliseconds; a row a slot.<span class=\"scripted\" hidden> Drag to move, Ctrl and wheel to zoom, point at a bar for its unit.</span></p></section>",
                escape(&t.title),
                timeline(t, &self.units),
                escape(&t.about)
            );
        }
        out
    }

    fn curves(&self) -> String {
        if self.rates.is_empty() {
            return String::new();
        }
        let mut out = String::from("<section><h2>Rates over time</h2>");
        for r in &self.rates {
            let ceiling = r
                .ceiling_gb_per_s
                .map_or(String::new(), |c| format!("; dashed: what it can carry, {} GB/s", figure(c)));
            let _ = write!(
                out,
                "<p class=\"legend\"><span><i class=\"{}\"></i>{}, GB/s over seconds{ceiling}</span></p>{}",
                link_class(r.kind),
                escape(&r.name),
                rate_curve(r)
            );
        }
        out + "</section>"
    }

    fn link_table(&self) -> String {
        if self.links.is_empty() {
            return String::new();
        }
        let mut rows = String::new();
        for l in &self.links {
            let number = |v: Option<f64>| v.map_or("–".into(), figure);
            let of_ceiling = l.gb_per_s.zip(l.ceiling_gb_per_s.filter(|c| *c > 0.0));
            let _ = write!(
                rows,
                "<tr><td><i class=\"{}\"></i>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
                link_class(l.kind),
                escape(&l.name),
                l.bytes.map_or("–".into(), format_bytes),
                number(l.gb_per_s),
                number(l.ceiling_gb_per_s),
                percent(of_ceiling.map(|(r, c)| r / c)),
                percent(l.busy)
            );
        }
        format!(
            "<section><h2>Links</h2><div class=\"scroll\"><table><thead><tr><th>link</th><th>carried</th><th>GB/s</th>\
             <th>can carry</th><th>of that</th><th>busy</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
        )
    }

    fn site_table(&self) -> String {
        if self.sites.is_empty() {
            return String::new();
        }
        let mut rows = String::new();
        for s in &self.sites {
            let _ = write!(
                rows,
                "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
                escape(&s.name),
                s.units,
                format_bytes(s.bytes),
                s.bytes_per_token.map_or("–".into(), |b| format_bytes(b as u64)),
                percent(s.busy),
                percent(s.waits)
            );
        }
        format!(
            "<section><h2>Sites</h2><div class=\"scroll\"><table><thead><tr><th>site</th><th>units</th><th>bytes</th>\
             <th>per token</th><th>busy</th><th>waits for the other</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
        )
    }

    fn stall_table(&self) -> String {
        if self.stalls.is_empty() {
            return String::new();
        }
        let mut rows = String::new();
        for s in &self.stalls {
            let seconds = s.seconds.map_or("–".into(), |v| format!("{} s", figure(v)));
            let bar = s.share.map_or(String::new(), |v| {
                format!("<span class=\"bar\"><span style=\"width:{:.1}%\"></span></span>", v.clamp(0.0, 1.0) * 100.0)
            });
            let _ = write!(
                rows,
                "<tr><td>{}</td><td>{seconds}</td><td>{}</td><td class=\"wide\">{bar}</td></tr>",
                escape(&s.cause),
                percent(s.share)
            );
        }
        format!(
            "<section><h2>What waited for what</h2><div class=\"scroll\"><table><thead><tr><th>who waited</th><th>time</th>\
             <th>of the passes</th><th class=\"wide\"></th></tr></thead><tbody>{rows}</tbody></table></div></section>"
        )
    }

    fn remarks(&self) -> String {
        if self.notes.is_empty() {
            return String::new();
        }
        let lines: String = self.notes.iter().map(|n| format!("<li>{}</li>", escape(n))).collect();
        format!("<section><h2>Notes</h2><ul>{lines}</ul></section>")
    }
}

fn percent(share: Option<f64>) -> String {
    share.map_or("–".into(), |s| format!("{:.0} %", s * 100.0))
}

#[cfg(test)]
mod tests {
    use super::super::{Link, LinkKind, Predicted, Rates, Row, Site, Span, Stall, Timeline, Unit};
    use super::*;

    fn page() -> Page {
        let evil = "</script><script>alert('&')</script>\u{0}";
        Page {
            title: evil.into(),
            facts: vec![("model".into(), evil.into())],
            achieved_tokens_per_s: Some(0.9),
            predicted: Some(Predicted { tokens_per_s: 1.0, bound_by: evil.into(), source: evil.into() }),
            figures: vec![("first token".into(), evil.into())],
            units: vec![Unit { name: evil.into(), home: Home::C, bytes: 5 << 20, block: Some(0) }],
            links: vec![Link {
                kind: LinkKind::Storage,
                name: evil.into(),
                bytes: None,
                gb_per_s: Some(1.0),
                ceiling_gb_per_s: Some(2.0),
                busy: None,
            }],
            sites: vec![Site {
                name: evil.into(),
                units: 3,
                bytes: 5 << 20,
                bytes_per_token: Some(7.0 * 1024.0),
                busy: Some(0.42),
                waits: None,
            }],
            stalls: vec![Stall { cause: evil.into(), seconds: None, share: Some(0.25) }],
            timelines: vec![Timeline {
                title: evil.into(),
                about: evil.into(),
                start_s: 0.0,
                end_s: 1.0,
                boundaries_s: vec![0.0, 1.0],
                spans: vec![Span { kind: SpanKind::Read, row: Row::RamSlot(0), unit: 0, start_s: 0.1, end_s: 0.4 }],
            }],
            rates: vec![Rates {
                kind: LinkKind::Storage,
                name: evil.into(),
                start_s: 0.0,
                end_s: 1.0,
                gb_per_s: vec![1.0, 2.0],
                ceiling_gb_per_s: Some(2.0),
            }],
            notes: vec![evil.into()],
        }
    }

    #[test]
    fn text_from_outside_stays_text_and_nothing_is_fetched() {
        let html = page().html();
        assert_eq!(html.matches("<script>").count(), 1, "only the page's own script");
        assert!(!html.contains("alert('"));
        for word in ["http://", "https://", "src=", "@import", "url("] {
            assert!(!html.contains(word), "{word}");
        }
    }

    #[test]
    fn it_says_what_was_measured_and_what_was_not() {
        let html = page().html();
        for text in ["0.9 tok/s", "90 % of predicted", "50 %", "25 %", "42 %", "7.00 KiB", "read ", "–"] {
            assert!(html.contains(text), "{text}");
        }
    }

    #[test]
    fn an_empty_page_is_a_page() {
        let html = Page::default().html();
        assert!(html.starts_with("<!doctype html>") && html.ends_with("</html>\n"));
    }
}

//! How often durations lay within bounds, as Prometheus counts them.

/// Bounds of the time to a first token, in seconds: vLLM's.
const FIRST_TOKEN_S: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
/// Bounds of the time per token behind the first, in seconds: vLLM's.
const TOKEN_S: [f64; 19] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];

/// Durations, counted.
#[derive(Clone, Copy, Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    /// Durations up to each bound and above the one before it; one more for those above all.
    counts: [u64; FIRST_TOKEN_S.len() + 1],
    /// Seconds of all.
    sum_s: f64,
}

impl Histogram {
    /// Of times to a first token.
    pub const FIRST_TOKEN: Histogram = Histogram::new(&FIRST_TOKEN_S);
    /// Of times per token.
    pub const TOKEN: Histogram = Histogram::new(&TOKEN_S);

    const fn new(bounds: &'static [f64]) -> Histogram {
        Histogram { bounds, counts: [0; FIRST_TOKEN_S.len() + 1], sum_s: 0.0 }
    }

    /// Counts a duration.
    pub fn add(&mut self, seconds: f64) {
        let at = self.bounds.iter().position(|bound| seconds <= *bound).unwrap_or(self.bounds.len());
        self.counts[at] += 1;
        self.sum_s += seconds;
    }

    /// Several in Prometheus' text form, each with its labels, which have no brackets.
    pub fn write<'h>(name: &str, help: &str, all: impl Iterator<Item = (&'h String, &'h Histogram)>, out: &mut String) {
        out.push_str(&format!("# HELP {name} {help}\n# TYPE {name} histogram\n"));
        for (labels, histogram) in all {
            let mut sum = 0;
            for (i, count) in histogram.counts[..=histogram.bounds.len()].iter().enumerate() {
                sum += count;
                let bound = histogram.bounds.get(i).map_or("+Inf".to_owned(), f64::to_string);
                out.push_str(&format!("{name}_bucket{{{labels},le=\"{bound}\"}} {sum}\n"));
            }
            let total_s = histogram.sum_s;
            out.push_str(&format!("{name}_sum{{{labels}}} {total_s}\n{name}_count{{{labels}}} {sum}\n"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_of_all_up_to_a_bound() {
        let mut h = Histogram::TOKEN;
        for s in [0.005, 0.01, 0.02, 100.0] {
            h.add(s);
        }
        let mut out = String::new();
        Histogram::write("x", "Seconds.", [(&"m=\"y\"".to_owned(), &h)].into_iter(), &mut out);
        assert!(out.starts_with("# HELP x Seconds.\n# TYPE x histogram\nx_bucket{m=\"y\",le=\"0.01\"} 2\n"), "{out}");
        assert!(out.contains("x_bucket{m=\"y\",le=\"0.025\"} 3\n") && out.contains("le=\"80\"} 3\n"), "{out}");
        assert!(
            out.ends_with("x_bucket{m=\"y\",le=\"+Inf\"} 4\nx_sum{m=\"y\"} 100.035\nx_count{m=\"y\"} 4\n"),
            "{out}"
        );
    }
}

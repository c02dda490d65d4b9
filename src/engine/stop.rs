//! Stop texts: found across token borders, and never shown, not even in part.

/// Holds text back while it may be the beginning of a stop text.
#[derive(Debug, Default)]
pub struct StopFilter {
    stops: Vec<String>,
    held: String,
}

impl StopFilter {
    /// A filter for these texts; empty ones are ignored.
    pub fn new(stops: &[String]) -> StopFilter {
        StopFilter { stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Adds text; passes on what is certain to be shown. Returns whether a stop text was found.
    pub fn push(&mut self, text: &str, show: &mut dyn FnMut(&str)) -> bool {
        if self.stops.is_empty() {
            show(text);
            return false;
        }
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            show(&self.held[..at]);
            self.held.clear();
            return true;
        }
        let safe = self.held.len() - self.longest_beginning();
        show(&self.held[..safe]);
        self.held.drain(..safe);
        false
    }

    /// Ends the text: what was held back is shown.
    pub fn finish(&mut self, show: &mut dyn FnMut(&str)) {
        show(&self.held);
        self.held.clear();
    }

    /// Length of the longest end of the held text with which a stop text begins.
    fn longest_beginning(&self) -> usize {
        let ends = self.held.char_indices().map(|(i, _)| &self.held[i..]);
        ends.filter(|end| self.stops.iter().any(|s| s.starts_with(*end))).map(str::len).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut f = StopFilter::new(&stops.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        let mut out = String::new();
        for p in pieces {
            if f.push(p, &mut |t| out.push_str(t)) {
                return (out, true);
            }
        }
        f.finish(&mut |t| out.push_str(t));
        (out, false)
    }

    #[test]
    fn a_stop_text_across_pieces_is_cut_off() {
        assert_eq!(run(&["END"], &["one E", "N", "D two"]), ("one ".into(), true));
        assert_eq!(run(&["\n\n", "Ü!"], &["a\n", "b Ü", "!"]), ("a\nb ".into(), true));
    }

    #[test]
    fn a_beginning_that_comes_to_nothing_is_shown() {
        assert_eq!(run(&["END"], &["E", "N", "E", "N"]), ("ENEN".into(), false));
        assert_eq!(run(&[], &["x"]), ("x".into(), false));
    }
}

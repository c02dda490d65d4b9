//! Stop texts: found across token borders, and never shown, not even in part.
//!
//! Control tokens show no text, but a stop text may name them: it is looked for in what is shown, and in the same
//! with the names of hidden tokens in their places, where it holds each of them whole or not at all.

/// A piece of the text: what it is, and whether it is the name of a control token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The text or name.
    pub text: &'a str,
    /// Whether it is the name of a token that shows no text.
    pub control: bool,
}

/// Holds text back while it may be the beginning of a stop text.
#[derive(Debug, Default)]
pub struct StopFilter {
    stops: Vec<String>,
    /// What is held back, names of control tokens included.
    held: String,
    /// Where these names lie in it, ascending.
    names: Vec<std::ops::Range<usize>>,
    /// The stop text that was found.
    found: Option<usize>,
}

impl StopFilter {
    /// A filter for these texts; empty ones are ignored.
    pub fn new(stops: &[String]) -> StopFilter {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        StopFilter { stops, ..StopFilter::default() }
    }

    /// Adds a piece; passes on what is certain to be shown. Returns whether a stop text was found.
    pub fn push(&mut self, piece: Piece, show: &mut dyn FnMut(Piece)) -> bool {
        if piece.text.is_empty() {
            return false;
        }
        if self.stops.is_empty() {
            show(piece);
            return false;
        }
        if piece.control {
            self.names.push(self.held.len()..self.held.len() + piece.text.len());
        }
        self.held.push_str(piece.text);
        let found = self.find();
        let safe = found.map_or_else(|| self.first_beginning(), |f| f.0);
        self.release(safe, show);
        if let Some((_, stop)) = found {
            self.found = Some(stop);
            self.held.clear();
            self.names.clear();
        }
        found.is_some()
    }

    /// The stop text that was found.
    pub fn found(&self) -> Option<&str> {
        self.found.map(|i| self.stops[i].as_str())
    }

    /// Ends the text: what was held back is shown.
    pub fn finish(&mut self, show: &mut dyn FnMut(Piece)) {
        self.release(self.held.len(), show);
    }

    /// Where the first stop text begins, and which it is: the longest of those that begin there.
    fn find(&self) -> Option<(usize, usize)> {
        let first = |found: &(usize, usize)| (found.0, std::cmp::Reverse(self.stops[found.1].len()));
        let in_all = self.stops.iter().enumerate().filter_map(|(i, s)| {
            let mut ends = self.held.match_indices(s.as_str()).map(|(at, s)| (at, at + s.len()));
            ends.find(|&(from, to)| !self.cuts_a_name(from) && !self.cuts_a_name(to)).map(|(from, _)| (from, i))
        });
        if self.names.is_empty() {
            return in_all.min_by_key(first);
        }
        let shown = self.shown();
        let in_shown = self.stops.iter().enumerate().filter_map(|(i, s)| Some((self.of_shown(shown.find(s)?), i)));
        in_all.chain(in_shown).min_by_key(first)
    }

    /// Where the longest end begins that may become a stop text; the length of all if there is none.
    fn first_beginning(&self) -> usize {
        let begins = |text: &str, at: usize| self.stops.iter().any(|s| s.starts_with(&text[at..]));
        let in_all = self.held.char_indices().map(|(at, _)| at);
        let in_all = in_all.filter(|&at| !self.cuts_a_name(at)).find(|&at| begins(&self.held, at));
        if self.names.is_empty() {
            return in_all.unwrap_or(self.held.len());
        }
        let shown = self.shown();
        let in_shown =
            shown.char_indices().map(|(at, _)| at).find(|&at| begins(&shown, at)).map(|at| self.of_shown(at));
        in_all.into_iter().chain(in_shown).min().unwrap_or(self.held.len())
    }

    fn cuts_a_name(&self, at: usize) -> bool {
        self.names.iter().any(|name| name.start < at && at < name.end)
    }

    /// The held text without names.
    fn shown(&self) -> String {
        let (mut out, mut at) = (String::with_capacity(self.held.len()), 0);
        for name in &self.names {
            out.push_str(&self.held[at..name.start]);
            at = name.end;
        }
        out.push_str(&self.held[at..]);
        out
    }

    /// The place in the held text of a place in [`shown`](Self::shown): behind the names that lie there.
    fn of_shown(&self, mut at: usize) -> usize {
        for name in &self.names {
            if name.start > at {
                break;
            }
            at += name.len();
        }
        at
    }

    /// Shows the first `n` bytes of what is held; a name is shown whole.
    fn release(&mut self, n: usize, show: &mut dyn FnMut(Piece)) {
        let mut at = 0;
        for name in self.names.iter().take_while(|name| name.start < n) {
            if at < name.start {
                show(Piece { text: &self.held[at..name.start], control: false });
            }
            show(Piece { text: &self.held[name.clone()], control: true });
            at = name.end;
        }
        if at < n {
            show(Piece { text: &self.held[at..n], control: false });
        }
        let n = n.max(at);
        self.held.drain(..n);
        self.names.retain_mut(|name| {
            let stays = name.start >= n;
            if stays {
                *name = name.start - n..name.end - n;
            }
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces in angle brackets are names of control tokens.
    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut f = StopFilter::new(&stops.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        let mut out = String::new();
        let mut show = |p: Piece| {
            if !p.control {
                out.push_str(p.text);
            }
        };
        let found = pieces.iter().any(|p| f.push(Piece { text: p, control: p.starts_with('<') }, &mut show));
        if !found {
            f.finish(&mut show);
        }
        (out, found)
    }

    #[test]
    fn a_stop_text_across_pieces_is_cut_off() {
        assert_eq!(run(&["END"], &["one E", "N", "D two"]), ("one ".into(), true));
        assert_eq!(run(&["\n\n", "Ü!"], &["a\n", "b Ü", "!"]), ("a\nb ".into(), true));
    }

    #[test]
    fn the_stop_text_that_was_found_is_known() {
        let stops = ["b", "ab", "abc", "x"].map(String::from);
        let mut f = StopFilter::new(&stops);
        assert!(!f.push(Piece { text: "za", control: false }, &mut |_| ()) && f.found().is_none());
        assert!(f.push(Piece { text: "bcb", control: false }, &mut |_| ()));
        assert_eq!(f.found(), Some("abc"));
    }

    #[test]
    fn a_beginning_that_comes_to_nothing_is_shown() {
        assert_eq!(run(&["END"], &["E", "N", "E", "N"]), ("ENEN".into(), false));
        assert_eq!(run(&[], &["x"]), ("x".into(), false));
        assert_eq!(run(&["<a>b"], &["x", "<a>", "c"]), ("xc".into(), false));
    }

    #[test]
    fn a_control_token_stops_where_it_is_named() {
        assert_eq!(run(&["<user>"], &["one", "<user>", "two"]), ("one".into(), true));
        assert_eq!(run(&["one<user>"], &["none", "<user>", "two"]), ("n".into(), true));
        assert_eq!(run(&["<end>\n<user>"], &["a", "<end>", "\n", "<user>"]), ("a".into(), true));
        assert_eq!(run(&["\n\n"], &["a\n", "<x>", "\nb"]), ("a".into(), true));
    }

    #[test]
    fn a_part_of_a_hidden_name_stops_nothing() {
        assert_eq!(run(&["user", "<", ">t"], &["one", "<user>", "two"]), ("onetwo".into(), false));
        assert_eq!(run(&["nee"], &["one", "<x>", "e"]), ("o".into(), true));
    }
}

//! What files say, made safe for a terminal.

use std::borrow::Cow;

/// Whether a character may act on a terminal: C0 controls but newline and tab, DEL, C1 controls.
fn acts(c: char) -> bool {
    c.is_control() && !matches!(c, '\n' | '\t')
}

/// `text` with control characters as `\u001b`, which JSON reads as the character itself.
pub(super) fn printable(text: &str) -> Cow<'_, str> {
    use std::fmt::Write;
    if !text.contains(acts) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match acts(c) {
            // Writing to a string cannot fail.
            true => drop(write!(out, "\\u{:04x}", u32::from(c))),
            false => out.push(c),
        }
    }
    Cow::Owned(out)
}

/// Characters of a sentence that are printed from each end, where a file's texts make it longer than both.
const SENTENCE_ENDS: (usize, usize) = (2000, 1000);

/// A sentence as [`printable`], without its middle where it is of a length that nobody reads.
pub(super) fn sentence(text: &str) -> Cow<'_, str> {
    let (head, tail) = SENTENCE_ENDS;
    let count = text.chars().count();
    if count <= head + tail {
        return printable(text);
    }
    let at = |n: usize| text.char_indices().nth(n).map_or(text.len(), |(at, _)| at);
    let (head, tail) = (&text[..at(head)], &text[at(count - tail)..]);
    Cow::Owned(printable(&format!("{head} … {tail}")).into_owned())
}

/// A text that comes in pieces, as a terminal may show it: as [`printable`], and lines may end with CR LF.
#[derive(Debug, Default)]
pub(super) struct Shown {
    /// The last piece ended with a CR, which is shown once it is known what follows.
    cr: bool,
}

impl Shown {
    /// What is to be printed for the next piece.
    pub fn piece<'a>(&mut self, text: &'a str) -> Cow<'a, str> {
        if !self.cr && !text.contains(acts) {
            return Cow::Borrowed(text);
        }
        let before = if std::mem::take(&mut self.cr) { "\r" } else { "" };
        let text = format!("{before}{text}");
        let text = match text.strip_suffix('\r') {
            Some(rest) => {
                self.cr = true;
                rest
            }
            None => &text,
        };
        Cow::Owned(printable(&text.replace("\r\n", "\n")).into_owned())
    }

    /// What is still to be printed at the end.
    pub fn rest(&mut self) -> &'static str {
        if std::mem::take(&mut self.cr) { "\\u000d" } else { "" }
    }
}

#[cfg(test)]
mod tests {
    use super::{Shown, printable, sentence};

    #[test]
    fn pieces_are_shown_as_the_whole() {
        let mut shown = Shown::default();
        let pieces = ["a", "\r", "\nb\r\nc", "\x1b[2J", "\r", "d\r"];
        let all: String = pieces.iter().map(|p| shown.piece(p).into_owned()).collect();
        assert_eq!(all + shown.rest(), "a\nb\nc\\u001b[2J\\u000dd\\u000d");
    }

    #[test]
    fn a_sentence_of_any_length_is_cut_in_its_middle() {
        let long = format!("begin {} end", "é\x1b".repeat(5000));
        let cut = sentence(&long);
        assert!(cut.starts_with("begin ") && cut.ends_with(" end") && cut.contains(" … "), "{cut}");
        assert_eq!(sentence("short"), "short");
    }

    #[test]
    fn control_characters_are_shown_and_json_keeps_its_meaning() {
        assert_eq!(printable("a\tb\nc é 日"), "a\tb\nc é 日");
        assert_eq!(printable("\x1b]0;x\x07 \r \x7f \u{9b}"), "\\u001b]0;x\\u0007 \\u000d \\u007f \\u009b");
        let json = serde_json::json!({ "k": "\u{9b}\x7f\x1b" }).to_string();
        let read: serde_json::Value = serde_json::from_str(&printable(&json)).unwrap();
        assert_eq!(read["k"], "\u{9b}\x7f\x1b");
    }
}

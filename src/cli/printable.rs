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

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn control_characters_are_shown_and_json_keeps_its_meaning() {
        assert_eq!(printable("a\tb\nc é 日"), "a\tb\nc é 日");
        assert_eq!(printable("\x1b]0;x\x07 \r \x7f \u{9b}"), "\\u001b]0;x\\u0007 \\u000d \\u007f \\u009b");
        let json = serde_json::json!({ "k": "\u{9b}\x7f\x1b" }).to_string();
        let read: serde_json::Value = serde_json::from_str(&printable(&json)).unwrap();
        assert_eq!(read["k"], "\u{9b}\x7f\x1b");
    }
}

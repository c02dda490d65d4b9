//! Tokens to text as they come, never splitting a character.

use super::Tokenizer;
use super::vocab::Kind;

/// Collects bytes until they are whole characters.
#[derive(Debug)]
pub struct Decoder<'a> {
    tokenizer: &'a Tokenizer,
    pending: Vec<u8>,
}

impl<'a> Decoder<'a> {
    /// A decoder at the beginning of a text.
    pub fn new(tokenizer: &'a Tokenizer) -> Decoder<'a> {
        Decoder { tokenizer, pending: Vec::new() }
    }

    /// Adds a token; returns the characters that are complete. Control tokens show nothing.
    pub fn push(&mut self, id: u32) -> String {
        append(self.tokenizer, id, false, &mut self.pending);
        let keep = incomplete_tail(&self.pending);
        let whole: Vec<u8> = self.pending.drain(..self.pending.len() - keep).collect();
        String::from_utf8_lossy(&whole).into_owned()
    }

    /// Ends the text; bytes that never became a character are U+FFFD.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// Appends what a token shows: control and unknown tokens only with `render_special`, unused ones
/// never.
pub(super) fn append(tokenizer: &Tokenizer, id: u32, render_special: bool, out: &mut Vec<u8>) {
    let bytes = tokenizer.token_bytes(id);
    match tokenizer.vocab.kind(id) {
        Some(Kind::Control | Kind::Unknown) if render_special => out.extend_from_slice(bytes),
        Some(Kind::Normal | Kind::UserDefined | Kind::Byte) => out.extend_from_slice(bytes),
        Some(Kind::Control | Kind::Unknown | Kind::Unused) | None => {}
    }
}

/// Bytes at the end that may be the beginning of a character.
fn incomplete_tail(bytes: &[u8]) -> usize {
    for back in 1..=bytes.len().min(3) {
        let b = bytes[bytes.len() - back];
        let needed = match b {
            0x00..=0x7f => 1,
            0xc0..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf7 => 4,
            // A continuation byte: its first byte is further back.
            0x80..=0xbf => continue,
            // No byte of UTF-8.
            _ => return 0,
        };
        return if needed > back { back } else { 0 };
    }
    0
}

#[cfg(test)]
mod tests {
    use super::incomplete_tail;

    #[test]
    fn a_tail_is_held_back_until_its_character_is_whole() {
        let e = "€".as_bytes();
        assert_eq!(incomplete_tail(&e[..1]), 1);
        assert_eq!(incomplete_tail(&e[..2]), 2);
        assert_eq!(incomplete_tail(e), 0);
        assert_eq!(incomplete_tail(&"😀".as_bytes()[..3]), 3);
        assert_eq!(incomplete_tail(b"abc"), 0);
        assert_eq!(incomplete_tail(&[0x80, 0x80, 0x80, 0x80]), 0);
    }
}

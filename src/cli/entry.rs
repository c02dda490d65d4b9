//! What is typed at the prompt of `nt chat`: lines, and messages of several lines.

use std::io::Write as _;
use std::os::fd::AsFd;

use super::Failure;
use super::interrupt::Waiter;
use super::streams::Stderr;

/// Bytes of a message at most; no context holds more.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Opens and closes a message of several lines.
const FENCE: &str = "\"\"\"";

/// What was typed.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry {
    /// A message or command, without the newline at its end.
    Text(String),
    /// A message that cannot be used, and why.
    Unusable(String),
    /// A signal came while nothing, or only a part of a message, was typed.
    Interrupted,
    /// Stdin is at its end.
    End,
}

/// A line of bytes, or what came in place of it.
enum Line {
    Bytes(Vec<u8>),
    TooLong,
    Interrupted,
    End,
}

/// Where bytes come from.
trait Source {
    /// Adds bytes to `buffer`; `None` for a signal, `Some(0)` at the end.
    fn more(&mut self, buffer: &mut Vec<u8>) -> std::io::Result<Option<usize>>;
    /// Asks for the next line on a terminal.
    fn ask(&mut self, prompt: &str);
}

/// Reads messages from stdin.
pub struct Entries {
    source: Box<dyn Source>,
    buffer: Vec<u8>,
    /// Bytes of the buffer that were given out.
    used: usize,
}

impl Entries {
    /// Messages of this process's stdin; prompts for them on stderr where it is a terminal.
    pub fn stdin() -> Result<Entries, Failure> {
        let waiter = Waiter::new().map_err(|e| Failure::running(format!("making a pipe failed: {e}")))?;
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stdin());
        Ok(Entries { source: Box::new(Stdin { waiter, terminal }), buffer: Vec::new(), used: 0 })
    }

    /// The next message: a line; lines that end with a backslash and the one behind them; or the lines between `"""`
    /// and `"""`.
    pub fn next(&mut self) -> Result<Entry, Failure> {
        let mut text: Vec<u8> = Vec::new();
        let mut fenced = false;
        let mut too_long = false;
        self.source.ask("\n> ");
        for lines in 0.. {
            let failed = |e| Failure::running(format!("reading stdin failed: {e}"));
            let mut line = match self.line().map_err(failed)? {
                Line::Interrupted => return Ok(Entry::Interrupted),
                Line::End if lines == 0 => return Ok(Entry::End),
                Line::End => break,
                Line::TooLong => {
                    too_long = true;
                    Vec::new()
                }
                Line::Bytes(bytes) => bytes,
            };
            if lines > 0 {
                text.push(b'\n');
            } else if let Some(rest) = line.trim_ascii_start().strip_prefix(FENCE.as_bytes()) {
                (fenced, line) = (true, rest.to_vec());
            }
            let more = match fenced {
                true => match line.trim_ascii_end().strip_suffix(FENCE.as_bytes()) {
                    Some(rest) => {
                        line = rest.to_vec();
                        false
                    }
                    None => true,
                },
                false => line.pop_if(|b| *b == b'\\').is_some(),
            };
            too_long |= text.len() + line.len() > MESSAGE_BYTES_MAX;
            if !too_long {
                text.extend(line);
            }
            if !more {
                break;
            }
            self.source.ask("… ");
        }
        if too_long {
            return Ok(Entry::Unusable(format!("it is longer than {} MiB", MESSAGE_BYTES_MAX >> 20)));
        }
        Ok(match String::from_utf8(text) {
            // The lines of the fences themselves are no part of it.
            Ok(text) if fenced => {
                let text = text.strip_prefix('\n').unwrap_or(&text);
                Entry::Text(text.strip_suffix('\n').unwrap_or(text).to_owned())
            }
            Ok(text) => Entry::Text(text),
            Err(e) => Entry::Unusable(format!("it is not UTF-8 (byte {} is invalid)", e.utf8_error().valid_up_to())),
        })
    }

    /// The next line without its end.
    fn line(&mut self) -> std::io::Result<Line> {
        let (mut searched, mut too_long) = (self.used, false);
        loop {
            if let Some(at) = self.buffer[searched..].iter().position(|&b| b == b'\n') {
                let end = searched + at;
                let mut line = self.buffer[std::mem::replace(&mut self.used, end + 1)..end].to_vec();
                line.pop_if(|b| *b == b'\r');
                return Ok(if too_long { Line::TooLong } else { Line::Bytes(line) });
            }
            // Once for many short lines, not for each of them.
            self.buffer.drain(..std::mem::take(&mut self.used));
            if self.buffer.len() > MESSAGE_BYTES_MAX {
                too_long = true;
                self.buffer.clear();
            }
            searched = self.buffer.len();
            match self.source.more(&mut self.buffer)? {
                None => return Ok(Line::Interrupted),
                Some(0) if too_long => {
                    // The rest of the line is no message of its own.
                    self.buffer.clear();
                    return Ok(Line::TooLong);
                }
                Some(0) if self.buffer.is_empty() => return Ok(Line::End),
                Some(0) => return Ok(Line::Bytes(std::mem::take(&mut self.buffer))),
                Some(_) => {}
            }
        }
    }
}

struct Stdin {
    waiter: Waiter,
    terminal: bool,
}

impl Source for Stdin {
    fn more(&mut self, buffer: &mut Vec<u8>) -> std::io::Result<Option<usize>> {
        let mut bytes = [0; 1 << 16];
        loop {
            if !self.waiter.wait()? {
                return Ok(None);
            }
            match nix::unistd::read(std::io::stdin().as_fd(), &mut bytes) {
                Ok(n) => {
                    buffer.extend_from_slice(&bytes[..n]);
                    return Ok(Some(n));
                }
                Err(nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn ask(&mut self, prompt: &str) {
        if self.terminal {
            let _ = write!(Stderr, "{prompt}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes in pieces; an empty piece is a signal.
    struct Pieces(std::vec::IntoIter<Vec<u8>>);

    impl Source for Pieces {
        fn more(&mut self, buffer: &mut Vec<u8>) -> std::io::Result<Option<usize>> {
            let Some(piece) = self.0.next() else { return Ok(Some(0)) };
            buffer.extend_from_slice(&piece);
            Ok(if piece.is_empty() { None } else { Some(piece.len()) })
        }

        fn ask(&mut self, _: &str) {}
    }

    fn entries(pieces: &[&[u8]]) -> Vec<Entry> {
        let pieces: Vec<Vec<u8>> = pieces.iter().map(|p| p.to_vec()).collect();
        let mut e = Entries { source: Box::new(Pieces(pieces.into_iter())), buffer: Vec::new(), used: 0 };
        let mut all = Vec::new();
        loop {
            match e.next().unwrap() {
                Entry::End => return all,
                other => all.push(other),
            }
        }
    }

    fn text(t: &str) -> Entry {
        Entry::Text(t.into())
    }

    #[test]
    fn lines_are_messages_however_they_arrive() {
        assert_eq!(entries(&[b"one\ntw", b"o\r\n", b"\nend"]), [text("one"), text("two"), text(""), text("end")]);
    }

    #[test]
    fn a_message_may_have_several_lines() {
        assert_eq!(entries(&[b"a\\\nb\\\nc\nd\n"]), [text("a\nb\nc"), text("d")]);
        let fenced = "\"\"\"\na\\\n\n  b\n\"\"\"\n\"\"\"c\nd\"\"\"\n\"\"\"e\"\"\"\n";
        assert_eq!(entries(&[fenced.as_bytes()]), [text("a\\\n\n  b"), text("c\nd"), text("e")]);
        assert_eq!(entries(&[b"\"\"\"\nno end"]), [text("no end")]);
        assert_eq!(entries(&[b"no end\\"]), [text("no end")]);
    }

    #[test]
    fn a_message_that_cannot_be_used_is_one_message() {
        let all = entries(&[b"a\\\n\xff\nnext\n"]);
        assert!(matches!(&all[0], Entry::Unusable(why) if why.contains("byte 2")), "{all:?}");
        assert_eq!(all[1], text("next"));
        let long = vec![b'x'; MESSAGE_BYTES_MAX / 2 + 1];
        let all = entries(&[&long, &long, b"tail\nnext\n"]);
        assert!(matches!(&all[0], Entry::Unusable(why) if why.contains("16 MiB")), "{:?}", all.len());
        assert_eq!(all[1..], [text("next")]);
        // Stdin ends in the line.
        let all = entries(&[&long, &long, b"tail"]);
        assert!(matches!(&all[..], [Entry::Unusable(_)]), "{}", all.len());
    }

    #[test]
    fn a_signal_ends_what_was_begun() {
        assert_eq!(entries(&[b"a\\\n", b"", b"b\n"]), [Entry::Interrupted, text("b")]);
    }
}

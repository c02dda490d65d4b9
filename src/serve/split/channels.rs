//! Answers in channels, as gpt-oss writes them (OpenAI's "harmony" format): messages with a header each.
//!
//! `<|channel|>analysis<|message|>…<|end|>` is reasoning, `<|channel|>commentary to=functions.NAME … <|message|>…` a call,
//! and what else there is, words for the user. The prompt ends with `<|start|>assistant`, so an answer begins within a
//! header.

use super::calls::arguments;
use super::{Call, Part, Tool, overlap};

const MESSAGE: &str = "<|message|>";
const CHANNEL: &str = "<|channel|>";
const START: &str = "<|start|>";
/// What ends a message: its own mark, or the next header where that is missing.
const ENDS: [&str; 5] = ["<|end|>", START, CHANNEL, "<|call|>", "<|return|>"];
/// Marks that may be control tokens.
pub const MARKS: [&str; 7] = [MESSAGE, CHANNEL, START, "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"];

/// Whether a chat template writes channels.
pub fn of(template: &str) -> bool {
    template.contains(CHANNEL) && template.contains(MESSAGE)
}

#[derive(Debug)]
enum Within {
    Header,
    Words,
    Thought,
    /// A call of a tool, and its arguments so far.
    Call(String, String),
    /// The rest is left out.
    Nothing,
}

/// Tells the messages of an answer apart as it grows.
#[derive(Debug)]
pub struct Channels {
    tools: Vec<Tool>,
    one_call: bool,
    within: Within,
    held: String,
    calls: usize,
}

impl Channels {
    /// At the beginning of an answer.
    pub fn new(tools: Vec<Tool>, one_call: bool) -> Channels {
        Channels { tools, one_call, within: Within::Header, held: String::new(), calls: 0 }
    }

    /// How many calls there were.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Adds text.
    pub fn push(&mut self, text: &str, parts: &mut Vec<Part>) {
        self.held.push_str(text);
        while self.advance(parts) {}
    }

    /// Ends the answer.
    pub fn finish(&mut self, parts: &mut Vec<Part>) {
        let rest = std::mem::take(&mut self.held);
        if matches!(self.within, Within::Header) {
            // A header without a message says nothing; what is none is words.
            if !rest.is_empty() && !rest.contains(CHANNEL) && !rest.contains(START) {
                parts.push(Part::Words(rest));
            }
            return;
        }
        self.add(&rest, parts);
        self.end(parts);
    }

    /// Takes what is certain; `false` if more must come first.
    fn advance(&mut self, parts: &mut Vec<Part>) -> bool {
        match self.within {
            Within::Header => return self.header(),
            Within::Nothing => {
                self.held.clear();
                return false;
            }
            _ => {}
        }
        let found = ENDS.iter().filter_map(|m| self.held.find(m).map(|at| (at, *m))).min();
        let open = ENDS.iter().map(|m| overlap(&self.held, m)).max().unwrap_or(0);
        let certain = found.map_or(self.held.len() - open, |(at, _)| at);
        let text: String = self.held.drain(..certain).collect();
        self.add(&text, parts);
        let Some((_, mark)) = found else { return false };
        self.end(parts);
        // The next header begins with these.
        if mark != CHANNEL && mark != START {
            self.held.drain(..mark.len());
        }
        if !matches!(self.within, Within::Nothing) {
            self.within = Within::Header;
        }
        true
    }

    fn header(&mut self) -> bool {
        let begun = self.held.trim_start();
        let may_be = |mark: &str| begun.starts_with(mark) || mark.starts_with(begun);
        if !begun.is_empty() && ![CHANNEL, START, "to="].iter().any(|m| may_be(m)) {
            self.within = Within::Words;
            return true;
        }
        let Some(at) = self.held.find(MESSAGE) else { return false };
        let header: String = self.held.drain(..at + MESSAGE.len()).collect();
        self.within = self.message(&header[..at]);
        true
    }

    /// What a message with this header is.
    fn message(&self, header: &str) -> Within {
        let word = |text: &str| text.split(|c: char| c.is_whitespace() || c == '<').next().unwrap_or("").to_owned();
        if let Some((_, to)) = header.split_once("to=") {
            let to = word(to);
            let name = to.strip_prefix("functions.").unwrap_or(&to);
            if self.tools.iter().any(|t| t.name == name) {
                return Within::Call(name.to_owned(), String::new());
            }
        }
        match header.rsplit_once(CHANNEL).map(|(_, channel)| word(channel)).as_deref() {
            Some("analysis") => Within::Thought,
            _ => Within::Words,
        }
    }

    fn add(&mut self, text: &str, parts: &mut Vec<Part>) {
        if text.is_empty() {
            return;
        }
        match &mut self.within {
            Within::Words => parts.push(Part::Words(text.to_owned())),
            Within::Thought => parts.push(Part::Thought(text.to_owned())),
            Within::Call(_, arguments) => arguments.push_str(text),
            Within::Header | Within::Nothing => {}
        }
    }

    /// Ends a message.
    fn end(&mut self, parts: &mut Vec<Part>) {
        let Within::Call(name, text) = &mut self.within else { return };
        let (name, text) = (std::mem::take(name), std::mem::take(text));
        self.within = Within::Header;
        match arguments(&text.as_str().into()) {
            Some(arguments) => {
                self.calls += 1;
                parts.push(Part::Call(Call { name, arguments }));
                if self.one_call {
                    self.within = Within::Nothing;
                }
            }
            // What is no object of JSON is no call.
            None => parts.push(Part::Words(text)),
        }
    }
}

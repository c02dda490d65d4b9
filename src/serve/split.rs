//! What the text of an answer consists of: reasoning, words for the user, calls of tools.

mod calls;
mod channels;
mod family;
mod gemma;
mod python;
mod tool;

use super::job::Bit;
use crate::engine::Marks;
pub use calls::written;
use channels::Channels;
pub use channels::of as in_channels;
use family::PYTHON_TAG;
pub use family::{Family, GEMMA_QUOTE, Tags};
pub use tool::{Text, Tool};

/// A call of a tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The tool.
    pub name: String,
    /// The JSON of its arguments.
    pub arguments: String,
}

/// What is looked for in an answer.
#[derive(Clone, Debug, Default)]
pub struct Looks {
    /// Reasoning, and what it stands between.
    pub thinks: Option<Marks>,
    /// Whether the answer begins within it.
    pub within_thought: bool,
    /// Messages in channels.
    pub channels: bool,
    /// Calls, and the tools there are.
    pub tools: Option<(Family, Vec<Tool>)>,
    /// Only the first call counts; what follows it is left out.
    pub one_call: bool,
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Words for the user.
    Words(String),
    /// Reasoning.
    Thought(String),
    /// A call.
    Call(Call),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Nothing but white space came yet.
    Start,
    Thought,
    Words,
    /// Within a call.
    Call,
    /// The rest is left out.
    Over,
}

/// Tells the parts of an answer apart as it grows.
#[derive(Debug)]
pub struct Splitter {
    looks: Looks,
    mode: Mode,
    held: String,
    /// White space between words and calls, which belongs to words if more of them come.
    space: String,
    /// White space at the beginning of what comes next belongs to neither: it stands behind a mark of reasoning.
    trims: bool,
    /// Reasoning has ended.
    thought_over: bool,
    calls: usize,
    /// In place of all else.
    channels: Option<Channels>,
}

impl Splitter {
    /// A splitter at the beginning of an answer.
    pub fn new(looks: &Looks) -> Splitter {
        let mode = if looks.within_thought { Mode::Thought } else { Mode::Start };
        let trims = looks.within_thought;
        let tools = || looks.tools.as_ref().map_or_else(Vec::new, |t| t.1.clone());
        let channels = looks.channels.then(|| Channels::new(tools(), looks.one_call));
        Splitter {
            looks: looks.clone(),
            mode,
            held: String::new(),
            space: String::new(),
            trims,
            thought_over: false,
            calls: 0,
            channels,
        }
    }

    /// Whether reasoning is at hand.
    pub fn thinks(&self) -> bool {
        self.mode == Mode::Thought
    }

    /// How many calls there were.
    pub fn calls(&self) -> usize {
        self.channels.as_ref().map_or(self.calls, Channels::calls)
    }

    /// Adds text.
    pub fn push(&mut self, bits: &[Bit], parts: &mut Vec<Part>) {
        if let Some(channels) = &mut self.channels {
            let shown = |b: &&Bit| !b.control || channels::MARKS.contains(&b.text.as_str());
            bits.iter().filter(shown).for_each(|b| channels.push(&b.text, parts));
            return;
        }
        if self.looks.thinks.is_none() && self.looks.tools.is_none() {
            // Nothing is looked for.
            let text: String = bits.iter().filter(|b| !b.control).map(|b| b.text.as_str()).collect();
            if !text.is_empty() {
                parts.push(Part::Words(text));
            }
            return;
        }
        for bit in bits {
            if !bit.control || is_mark(&bit.text) {
                self.held.push_str(&bit.text);
            }
        }
        while self.advance(parts) {}
    }

    /// Ends the answer.
    pub fn finish(&mut self, parts: &mut Vec<Part>) {
        if let Some(channels) = &mut self.channels {
            return channels.finish(parts);
        }
        let rest = std::mem::take(&mut self.held);
        match self.mode {
            Mode::Thought => self.thought(&rest, parts),
            Mode::Call => self.ended_call(&rest, true, parts),
            Mode::Start | Mode::Words => self.words(&rest, parts),
            Mode::Over => {}
        }
        if self.calls == 0 && !self.space.is_empty() {
            parts.push(Part::Words(std::mem::take(&mut self.space)));
        }
    }

    /// Takes what is certain from what is held; `false` if more must come first.
    fn advance(&mut self, parts: &mut Vec<Part>) -> bool {
        let family = self.looks.tools.as_ref().map(|t| t.0);
        match self.mode {
            Mode::Over => {
                self.held.clear();
                false
            }
            Mode::Start => {
                let text = self.held.trim_start();
                if text.is_empty() {
                    return false;
                }
                if let Some(marks) = self.looks.thinks.filter(|_| !self.thought_over) {
                    if let Some(rest) = text.strip_prefix(marks.open) {
                        self.held = rest.to_owned();
                        self.mode = Mode::Thought;
                        self.trims = true;
                        return true;
                    }
                    if marks.open.starts_with(text) {
                        return false;
                    }
                }
                if family == Some(Family::Llama3) {
                    if let Some(rest) = text.strip_prefix(PYTHON_TAG) {
                        self.held = rest.to_owned();
                        self.mode = Mode::Call;
                        return true;
                    }
                    if PYTHON_TAG.starts_with(text) {
                        return false;
                    }
                    if text.starts_with('{') {
                        self.mode = Mode::Call;
                        return true;
                    }
                }
                self.mode = Mode::Words;
                true
            }
            Mode::Thought => {
                let close = self.looks.thinks.map_or("", |marks| marks.close);
                let found = self.held.find(close);
                let certain = found.unwrap_or(self.held.len() - overlap(&self.held, close));
                let text: String = self.held.drain(..certain).collect();
                self.thought(&text, parts);
                if found.is_some() {
                    self.held.drain(..close.len());
                    self.mode = Mode::Start;
                    (self.thought_over, self.trims) = (true, true);
                }
                found.is_some()
            }
            Mode::Words => {
                let mark = family.and_then(Family::marks).map(|m| m.0);
                let found = mark.and_then(|mark| self.held.find(mark));
                let open = mark.map_or(0, |mark| overlap(&self.held, mark));
                let certain = found.unwrap_or(self.held.len() - open);
                let text: String = self.held.drain(..certain).collect();
                self.words(&text, parts);
                if found.is_some() {
                    self.held.drain(..mark.map_or(0, str::len));
                    self.mode = Mode::Call;
                }
                found.is_some()
            }
            Mode::Call => {
                let Some((open, close)) = family.and_then(Family::marks) else { return false };
                // Without a mark of its own, a call ends where the next one begins.
                let mark = close.unwrap_or(open);
                let Some(at) = self.held.find(mark) else { return false };
                let call: String = self.held.drain(..at).collect();
                self.held.drain(..mark.len());
                self.mode = if close.is_some() { Mode::Words } else { Mode::Call };
                self.ended_call(&call, false, parts);
                if self.looks.one_call && self.calls > 0 {
                    self.mode = Mode::Over;
                }
                true
            }
        }
    }

    /// A text without the white space that it is not to begin with.
    fn trimmed<'t>(&mut self, text: &'t str) -> &'t str {
        let text = if self.trims { text.trim_start() } else { text };
        self.trims &= text.is_empty();
        text
    }

    fn thought(&mut self, text: &str, parts: &mut Vec<Part>) {
        let text = self.trimmed(text);
        if !text.is_empty() {
            parts.push(Part::Thought(text.to_owned()));
        }
    }

    fn words(&mut self, text: &str, parts: &mut Vec<Part>) {
        let text = self.trimmed(text);
        self.space.push_str(text);
        // Before a call, white space belongs to nothing.
        let end = if self.looks.tools.is_some() { self.space.trim_end().len() } else { self.space.len() };
        if end > 0 {
            let rest = self.space.split_off(end);
            parts.push(Part::Words(std::mem::replace(&mut self.space, rest)));
        }
    }

    /// What was written as a call; text if it is none. `cut`: it has no end.
    fn ended_call(&mut self, text: &str, cut: bool, parts: &mut Vec<Part>) {
        let Some((family, tools)) = self.looks.tools.clone() else { return };
        match calls::read(family, text, &tools) {
            Some(found) => {
                let most = if self.looks.one_call { 1 } else { usize::MAX };
                let found: Vec<Call> = found.into_iter().take(most).collect();
                self.calls += found.len();
                self.space.clear();
                parts.extend(found.into_iter().map(Part::Call));
            }
            None => match family.marks() {
                Some((open, close)) => {
                    let end = close.filter(|_| !cut).unwrap_or("");
                    self.words(&format!("{open}{text}{end}"), parts);
                }
                None => self.words(text, parts),
            },
        }
    }
}

/// Whether a control token is one that is looked for.
fn is_mark(text: &str) -> bool {
    family::MARKS.contains(&text) || Marks::ALL.iter().any(|marks| [marks.open, marks.close].contains(&text))
}

/// Bytes at the end of `text` that may be the beginning of `marker`.
fn overlap(text: &str, marker: &str) -> usize {
    (1..marker.len()).rev().find(|&n| text.ends_with(&marker[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests;

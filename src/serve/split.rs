//! What the text of an answer consists of: reasoning, words for the user, calls of tools.

use serde_json::Value as Json;

use super::job::Bit;

/// How a family of models writes calls of tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once or more often: Hermes, Qwen.
    Hermes,
    /// The whole answer is `{"name": …, "parameters": {…}}`, also behind `<|python_tag|>`: Llama 3.
    Llama3,
}

const CALL: &str = "<tool_call>";
const CALL_END: &str = "</tool_call>";
const PYTHON: &str = "<|python_tag|>";
const THINK: &str = "<think>";
const THINK_END: &str = "</think>";

impl Family {
    /// The family whose calls a chat template writes.
    pub fn of(template: &str) -> Option<Family> {
        if !template.contains("tools") {
            None
        } else if template.contains(CALL) {
            Some(Family::Hermes)
        } else if template.contains(PYTHON) || template.contains("ipython") && template.contains("\"parameters\"") {
            Some(Family::Llama3)
        } else {
            None
        }
    }
}

/// Whether a chat template knows reasoning between `<think>` and `</think>`.
pub fn thinks(template: &str) -> bool {
    template.contains(THINK_END)
}

/// Whether a prompt ends within reasoning.
pub fn within_thought(prompt: &str) -> bool {
    prompt.trim_end().ends_with(THINK)
}

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
    /// Reasoning.
    pub thinks: bool,
    /// Whether the answer begins within it.
    pub within_thought: bool,
    /// Calls, and the names of the tools there are.
    pub tools: Option<(Family, Vec<String>)>,
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
}

impl Splitter {
    /// A splitter at the beginning of an answer.
    pub fn new(looks: &Looks) -> Splitter {
        let mode = if looks.within_thought { Mode::Thought } else { Mode::Start };
        let trims = looks.within_thought;
        Splitter {
            looks: looks.clone(),
            mode,
            held: String::new(),
            space: String::new(),
            trims,
            thought_over: false,
            calls: 0,
        }
    }

    /// Whether reasoning is at hand.
    pub fn thinks(&self) -> bool {
        self.mode == Mode::Thought
    }

    /// How many calls there were.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Adds text.
    pub fn push(&mut self, bits: &[Bit], parts: &mut Vec<Part>) {
        if !self.looks.thinks && self.looks.tools.is_none() {
            // Nothing is looked for.
            let text: String = bits.iter().filter(|b| !b.control).map(|b| b.text.as_str()).collect();
            if !text.is_empty() {
                parts.push(Part::Words(text));
            }
            return;
        }
        for bit in bits {
            // Markers may be control tokens, which show nothing.
            if !bit.control || [CALL, CALL_END, PYTHON, THINK, THINK_END].contains(&bit.text.as_str()) {
                self.held.push_str(&bit.text);
            }
        }
        while self.advance(parts) {}
    }

    /// Ends the answer.
    pub fn finish(&mut self, parts: &mut Vec<Part>) {
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
                if self.looks.thinks && !self.thought_over {
                    if let Some(rest) = text.strip_prefix(THINK) {
                        self.held = rest.to_owned();
                        self.mode = Mode::Thought;
                        self.trims = true;
                        return true;
                    }
                    if THINK.starts_with(text) {
                        return false;
                    }
                }
                if family == Some(Family::Llama3) {
                    if let Some(rest) = text.strip_prefix(PYTHON) {
                        self.held = rest.to_owned();
                        self.mode = Mode::Call;
                        return true;
                    }
                    if PYTHON.starts_with(text) {
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
                let found = self.held.find(THINK_END);
                let certain = found.unwrap_or(self.held.len() - overlap(&self.held, THINK_END));
                let text: String = self.held.drain(..certain).collect();
                self.thought(&text, parts);
                if found.is_some() {
                    self.held.drain(..THINK_END.len());
                    self.mode = Mode::Start;
                    (self.thought_over, self.trims) = (true, true);
                }
                found.is_some()
            }
            Mode::Words => {
                let found = (family == Some(Family::Hermes)).then(|| self.held.find(CALL)).flatten();
                let open = if family == Some(Family::Hermes) { overlap(&self.held, CALL) } else { 0 };
                let certain = found.unwrap_or(self.held.len() - open);
                let text: String = self.held.drain(..certain).collect();
                self.words(&text, parts);
                if found.is_some() {
                    self.held.drain(..CALL.len());
                    self.mode = Mode::Call;
                }
                found.is_some()
            }
            Mode::Call => {
                if family != Some(Family::Hermes) {
                    return false;
                }
                let Some(at) = self.held.find(CALL_END) else { return false };
                let call: String = self.held.drain(..at).collect();
                self.held.drain(..CALL_END.len());
                self.mode = Mode::Words;
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
        let Some((family, names)) = self.looks.tools.clone() else { return };
        let key = if family == Family::Hermes { "arguments" } else { "parameters" };
        match calls(text, key, &names) {
            Some(found) => {
                let most = if self.looks.one_call { 1 } else { usize::MAX };
                let found: Vec<Call> = found.into_iter().take(most).collect();
                self.calls += found.len();
                self.space.clear();
                parts.extend(found.into_iter().map(Part::Call));
            }
            None if family == Family::Hermes => {
                let end = if cut { "" } else { CALL_END };
                self.words(&format!("{CALL}{text}{end}"), parts);
            }
            None => self.words(text, parts),
        }
    }
}

/// Bytes at the end of `text` that may be the beginning of `marker`.
fn overlap(text: &str, marker: &str) -> usize {
    (1..marker.len()).rev().find(|&n| text.ends_with(&marker[..n])).unwrap_or(0)
}

/// The calls in a text that consists of nothing else, to tools that there are.
fn calls(text: &str, key: &str, names: &[String]) -> Option<Vec<Call>> {
    let mut found = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_whitespace() || c == ';');
        if rest.is_empty() {
            return (!found.is_empty()).then_some(found);
        }
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Json>();
        let value = values.next()?.ok()?;
        rest = &rest[values.byte_offset()..];
        let name = value["name"].as_str().filter(|name| names.iter().any(|n| n == name))?.to_owned();
        let arguments = match value.get(key).or_else(|| value.get("arguments")).or_else(|| value.get("parameters")) {
            None => "{}".to_owned(),
            Some(Json::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        };
        found.push(Call { name, arguments });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same parts, however the text is cut.
    fn parts(looks: &Looks, text: &str) -> Vec<Part> {
        let cut = |n: usize| {
            let mut s = Splitter::new(looks);
            let mut parts = Vec::new();
            let chars: Vec<char> = text.chars().collect();
            for piece in chars.chunks(n) {
                s.push(&[Bit { text: piece.iter().collect(), control: false }], &mut parts);
            }
            s.finish(&mut parts);
            let mut joined: Vec<Part> = Vec::new();
            for p in parts {
                match (joined.last_mut(), p) {
                    (Some(Part::Words(a)), Part::Words(b)) | (Some(Part::Thought(a)), Part::Thought(b)) => {
                        a.push_str(&b)
                    }
                    (_, p) => joined.push(p),
                }
            }
            joined
        };
        let whole = cut(usize::MAX);
        for n in 1..20 {
            assert_eq!(cut(n), whole, "{text:?} in pieces of {n}");
        }
        whole
    }

    fn words(t: &str) -> Part {
        Part::Words(t.into())
    }

    fn call(name: &str, arguments: &str) -> Part {
        Part::Call(Call { name: name.into(), arguments: arguments.into() })
    }

    fn tools(family: Family) -> Looks {
        Looks { tools: Some((family, vec!["f".into(), "g".into()])), ..Looks::default() }
    }

    #[test]
    fn reasoning_is_told_apart() {
        let looks = Looks { thinks: true, ..Looks::default() };
        let thought = |t: &str| Part::Thought(t.into());
        assert_eq!(parts(&looks, "<think>\nhm\n</think>\n\nyes\n"), [thought("hm\n"), words("yes\n")]);
        assert_eq!(parts(&looks, " yes </think>"), [words(" yes </think>")]);
        assert_eq!(parts(&looks, "<thin"), [words("<thin")]);
        assert_eq!(parts(&looks, "<think>no end"), [thought("no end")]);
        let within = Looks { within_thought: true, ..looks };
        assert_eq!(parts(&within, "hm</think>yes"), [thought("hm"), words("yes")]);
    }

    #[test]
    fn calls_of_hermes_are_found() {
        let looks = tools(Family::Hermes);
        let text = "I look.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"b\": 1, \"a\": [2]}}\n</tool_call>\n<tool_call>{\"name\": \"g\"}</tool_call>";
        assert_eq!(parts(&looks, text), [words("I look."), call("f", r#"{"b":1,"a":[2]}"#), call("g", "{}")]);
        let one = Looks { one_call: true, ..tools(Family::Hermes) };
        assert_eq!(parts(&one, text), [words("I look."), call("f", r#"{"b":1,"a":[2]}"#)]);
        for none in ["<tool_call>{\"name\": \"h\"}</tool_call>", "<tool_call>{nonsense", "a <tool_ca", "plain \n"] {
            assert_eq!(parts(&looks, none), [words(none)]);
        }
        let thinking = Looks { thinks: true, ..looks };
        let text = format!("<think>hm</think>\n\n{}", "<tool_call>{\"name\": \"f\"}</tool_call>");
        assert_eq!(parts(&thinking, &text), [Part::Thought("hm".into()), call("f", "{}")]);
    }

    #[test]
    fn calls_of_llama_are_found() {
        let looks = tools(Family::Llama3);
        assert_eq!(parts(&looks, r#"{"name": "f", "parameters": {"x": "y"}}"#), [call("f", r#"{"x":"y"}"#)]);
        let two = r#"<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}"#;
        assert_eq!(parts(&looks, two), [call("f", "{}"), call("g", "{}")]);
        for none in [r#"{"name": "h", "parameters": {}}"#, "{\"a\"", "Hello {\"name\": \"f\"}"] {
            assert_eq!(parts(&looks, none), [words(none)]);
        }
    }

    #[test]
    fn without_anything_to_look_for_the_text_is_the_text() {
        let looks = Looks::default();
        assert_eq!(parts(&looks, " <think>\n{</think> \n"), [words(" <think>\n{</think> \n")]);
        let mut out = Vec::new();
        Splitter::new(&looks).push(&[Bit { text: "<|im_end|>".into(), control: true }], &mut out);
        assert_eq!(out, []);
    }

    #[test]
    fn families_are_known_by_their_templates() {
        assert_eq!(Family::of("{% if tools %}<tool_call>{% endif %}"), Some(Family::Hermes));
        assert_eq!(Family::of("{% if tools %}<|python_tag|>{% endif %}"), Some(Family::Llama3));
        assert_eq!(Family::of("{% for m in messages %}{% endfor %}"), None);
    }
}

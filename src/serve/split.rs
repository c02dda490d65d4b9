//! What the text of an answer consists of: reasoning, words for the user, calls of tools.

mod calls;
mod channels;

use super::job::Bit;
use channels::Channels;
pub use channels::of as in_channels;

/// How a family of models writes calls of tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once or more often: Hermes, Qwen.
    Hermes,
    /// The whole answer is `{"name": …, "parameters": {…}}`, also behind `<|python_tag|>`: Llama 3.
    Llama3,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}]`: Mistral's older models.
    Mistral,
    /// `[TOOL_CALLS]NAME[ARGS]{…}`, once or more often: Mistral's newer models.
    MistralNamed,
    /// A message to `functions.NAME` in a channel: gpt-oss.
    Harmony,
    /// `<tool_call>NAME`, then `<arg_key>…</arg_key><arg_value>…</arg_value>` for each argument, `</tool_call>`: GLM.
    Glm,
}

const CALL: &str = "<tool_call>";
const CALL_END: &str = "</tool_call>";
const MISTRAL: &str = "[TOOL_CALLS]";
const ARG_KEY: &str = "<arg_key>";
const PYTHON: &str = "<|python_tag|>";
const THINK: &str = "<think>";
const THINK_END: &str = "</think>";

impl Family {
    /// The family whose calls a chat template writes.
    pub fn of(template: &str) -> Option<Family> {
        if !template.contains("tools") {
            None
        } else if in_channels(template) {
            Some(Family::Harmony)
        } else if template.contains(ARG_KEY) {
            Some(Family::Glm)
        } else if template.contains(MISTRAL) {
            Some(if template.contains("[ARGS]") { Family::MistralNamed } else { Family::Mistral })
        } else if template.contains("<function=") {
            // Calls as XML, of which nt reads none.
            None
        } else if template.contains(CALL) {
            Some(Family::Hermes)
        } else if template.contains(PYTHON) || template.contains("ipython") && template.contains("\"parameters\"") {
            Some(Family::Llama3)
        } else {
            None
        }
    }

    /// What a call among words begins with, and what it ends with, if anything does.
    fn marks(self) -> Option<(&'static str, Option<&'static str>)> {
        match self {
            Family::Hermes | Family::Glm => Some((CALL, Some(CALL_END))),
            Family::Mistral | Family::MistralNamed => Some((MISTRAL, None)),
            Family::Llama3 | Family::Harmony => None,
        }
    }
}

/// Marks that may be control tokens, which show nothing.
const MARKS: [&str; 8] = [CALL, CALL_END, PYTHON, THINK, THINK_END, MISTRAL, "[ARGS]", "[CALL_ID]"];

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

/// A tool that may be called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// Names of arguments that are texts.
    pub texts: Vec<String>,
}

impl Tool {
    /// A tool as OpenAI describes it.
    pub fn of(tool: &serde_json::Value) -> Option<Tool> {
        let function = &tool["function"];
        let properties = function["parameters"]["properties"].as_object();
        let texts = properties.into_iter().flatten().filter(|(_, schema)| schema["type"] == "string");
        Some(Tool { name: function["name"].as_str()?.to_owned(), texts: texts.map(|(key, _)| key.clone()).collect() })
    }
}

/// What is looked for in an answer.
#[derive(Clone, Debug, Default)]
pub struct Looks {
    /// Reasoning.
    pub thinks: bool,
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
        if !self.looks.thinks && self.looks.tools.is_none() {
            // Nothing is looked for.
            let text: String = bits.iter().filter(|b| !b.control).map(|b| b.text.as_str()).collect();
            if !text.is_empty() {
                parts.push(Part::Words(text));
            }
            return;
        }
        for bit in bits {
            if !bit.control || MARKS.contains(&bit.text.as_str()) {
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

/// Bytes at the end of `text` that may be the beginning of `marker`.
fn overlap(text: &str, marker: &str) -> usize {
    (1..marker.len()).rev().find(|&n| text.ends_with(&marker[..n])).unwrap_or(0)
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
            joined(parts)
        };
        let whole = cut(usize::MAX);
        for n in 1..20 {
            assert_eq!(cut(n), whole, "{text:?} in pieces of {n}");
        }
        // And in two, at each place.
        for (at, _) in text.char_indices() {
            let mut s = Splitter::new(looks);
            let mut parts = Vec::new();
            for piece in [&text[..at], &text[at..]] {
                s.push(&[Bit { text: piece.into(), control: false }], &mut parts);
            }
            s.finish(&mut parts);
            assert_eq!(joined(parts), whole, "{text:?} cut at {at}");
        }
        whole
    }

    fn joined(parts: Vec<Part>) -> Vec<Part> {
        let mut joined: Vec<Part> = Vec::new();
        for p in parts {
            match (joined.last_mut(), p) {
                (Some(Part::Words(a)), Part::Words(b)) | (Some(Part::Thought(a)), Part::Thought(b)) => a.push_str(&b),
                (_, p) => joined.push(p),
            }
        }
        joined
    }

    fn words(t: &str) -> Part {
        Part::Words(t.into())
    }

    fn call(name: &str, arguments: &str) -> Part {
        Part::Call(Call { name: name.into(), arguments: arguments.into() })
    }

    fn tools(family: Family) -> Looks {
        let tool = |name: &str| Tool { name: name.into(), texts: vec!["zip".into()] };
        let channels = family == Family::Harmony;
        Looks { channels, tools: Some((family, vec![tool("f"), tool("g")])), ..Looks::default() }
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
    fn calls_of_mistral_are_found_in_both_forms() {
        for family in [Family::Mistral, Family::MistralNamed] {
            let looks = tools(family);
            let old = r#"[TOOL_CALLS][{"name": "f", "arguments": {"x": [1, "]"]}, "id": "abc123XYZ"}, {"name": "g", "arguments": {}}]"#;
            assert_eq!(parts(&looks, old), [call("f", r#"{"x":[1,"]"]}"#), call("g", "{}")]);
            let new = r#"I look. [TOOL_CALLS]f[ARGS]{"x": "[TOOL"}[TOOL_CALLS]g[CALL_ID]abc123XYZ[ARGS]{}"#;
            assert_eq!(parts(&looks, new), [words("I look."), call("f", r#"{"x":"[TOOL"}"#), call("g", "{}")]);
            assert_eq!(parts(&looks, "[TOOL_CALLS]f{\"x\": 1}"), [call("f", r#"{"x":1}"#)]);
            let one = Looks { one_call: true, ..looks.clone() };
            assert_eq!(parts(&one, new), [words("I look."), call("f", r#"{"x":"[TOOL"}"#)]);
            for none in [
                "[TOOL_CALLS]h[ARGS]{}",
                "[TOOL_CALLS]f[ARGS]{\"x\"",
                "[TOOL_CALLS][{\"name\"",
                "a [TOOL_CALL",
                "[1, 2]",
            ] {
                assert_eq!(parts(&looks, none), [words(none)]);
            }
        }
        // The marks may be control tokens.
        let mut s = Splitter::new(&tools(Family::MistralNamed));
        let mut found = Vec::new();
        for (text, control) in
            [("[TOOL_CALLS]", true), ("f", false), ("[ARGS]", true), ("{\"x\": 1}", false), ("</s>", true)]
        {
            s.push(&[Bit { text: text.into(), control }], &mut found);
        }
        s.finish(&mut found);
        assert_eq!(found, [call("f", r#"{"x":1}"#)]);
    }

    #[test]
    fn channels_of_gpt_oss_are_told_apart() {
        let looks = tools(Family::Harmony);
        let thought = |t: &str| Part::Thought(t.into());
        let answer = "<|channel|>analysis<|message|>Hm <|en.<|end|><|start|>assistant<|channel|>final<|message|>Hello.";
        assert_eq!(parts(&looks, answer), [thought("Hm <|en."), words("Hello.")]);
        let calls = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"x\": 1}<|call|>";
        assert_eq!(parts(&looks, calls), [thought("Hm"), call("f", r#"{"x":1}"#)]);
        // The recipient may stand before the channel, and the call's own end is the token that ends the answer.
        let before = " to=functions.g<|channel|>commentary json<|message|>{}";
        assert_eq!(parts(&looks, before), [call("g", "{}")]);
        let preamble = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.f<|message|>{}<|call|><|start|>assistant to=functions.g<|channel|>commentary<|message|>{}";
        assert_eq!(parts(&looks, preamble), [words("I look."), call("f", "{}"), call("g", "{}")]);
        let one = Looks { one_call: true, ..looks.clone() };
        assert_eq!(parts(&one, preamble), [words("I look."), call("f", "{}")]);
        // What is no call to a tool that there is, is words; what has no header, too.
        assert_eq!(parts(&looks, "<|channel|>commentary to=functions.h<|message|>{}"), [words("{}")]);
        assert_eq!(parts(&looks, "<|channel|>commentary to=functions.f<|message|>{nonsense"), [words("{nonsense")]);
        assert_eq!(parts(&looks, "plain"), [words("plain")]);
        assert_eq!(parts(&looks, "<|channel|>analysis<|message|>cut"), [thought("cut")]);
        assert_eq!(parts(&looks, "<|channel|>anal"), []);
        let no_tools = Looks { channels: true, ..Looks::default() };
        assert_eq!(parts(&no_tools, answer), [thought("Hm <|en."), words("Hello.")]);
    }

    #[test]
    fn calls_of_glm_are_found() {
        let looks = Looks { thinks: true, ..tools(Family::Glm) };
        let text = "<think>hm</think>\nI look.\n<tool_call>f\n<arg_key>zip</arg_key>\n<arg_value>01234</arg_value>\n<arg_key>n</arg_key>\n<arg_value>[1, {\"a\": 2}]</arg_value>\n<arg_key>s</arg_key>\n<arg_value>a <b> text\n</arg_value>\n</tool_call>\n<tool_call>g</tool_call>";
        let thought = Part::Thought("hm".into());
        let arguments = r#"{"zip":"01234","n":[1,{"a":2}],"s":"a <b> text\n"}"#;
        assert_eq!(parts(&looks, text), [thought, words("I look."), call("f", arguments), call("g", "{}")]);
        for none in
            ["<tool_call>h</tool_call>", "<tool_call>f<arg_key>x</arg_key></tool_call>", "<tool_call>f\n<arg_key>x"]
        {
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
        assert_eq!(Family::of("{% if tools %}[TOOL_CALLS]{% endif %}"), Some(Family::Mistral));
        assert_eq!(Family::of("{% if tools %}[TOOL_CALLS]f[ARGS]{% endif %}"), Some(Family::MistralNamed));
        assert_eq!(Family::of("{% if tools %}<tool_call>f<arg_key>{% endif %}"), Some(Family::Glm));
        assert_eq!(Family::of("{% if tools %}<|channel|>x<|message|>{% endif %}"), Some(Family::Harmony));
        assert_eq!(Family::of("{% if tools %}<tool_call><function=f>{% endif %}"), None);
        assert_eq!(Family::of("{% for m in messages %}{% endfor %}"), None);
    }
}

//! What may stand before a text's form: reasoning, and the marks around it.

use super::lark::quoted;
use crate::tokenizer::Tokenizer;

/// What a model's reasoning stands between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// What opens it.
    pub open: &'static str,
    /// What ends it.
    pub close: &'static str,
}

impl Marks {
    /// Those that are known.
    pub const ALL: [Marks; 5] = [
        Marks { open: "<think>", close: "</think>" },
        // Mistral.
        Marks { open: "[THINK]", close: "[/THINK]" },
        // Seed OSS.
        Marks { open: "<seed:think>", close: "</seed:think>" },
        // Command R7B.
        Marks { open: "<|START_THINKING|>", close: "<|END_THINKING|>" },
        // Gemma 4.
        Marks { open: "<|channel>thought", close: "<channel|>" },
    ];

    /// Those that a chat template knows.
    pub fn of(template: &str) -> Option<Marks> {
        Marks::ALL.into_iter().find(|marks| template.contains(marks.close))
    }

    /// Whether a prompt ends within reasoning.
    pub fn opened_by(self, prompt: &str) -> bool {
        prompt.trim_end().ends_with(self.open)
    }
}

/// Where in a text its form begins, since a model may reason before it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reasoning {
    /// At once.
    None,
    /// Behind the mark that ends reasoning: the prompt opens it.
    Open(Marks),
    /// Behind that mark where the text begins with reasoning, else at once.
    Possible(Marks),
    /// In a message of gpt-oss, perhaps behind one on its `analysis` channel.
    Channels {
        /// Whether the form itself has the message's header.
        header: bool,
    },
}

impl Reasoning {
    /// What a chat template's source and the prompt that it made say of it.
    pub fn of(template: &str, prompt: &str) -> Reasoning {
        if template.contains(CHANNEL) && template.contains(MESSAGE) {
            return Reasoning::Channels { header: false };
        }
        match Marks::of(template) {
            None => Reasoning::None,
            Some(marks) if marks.opened_by(prompt) => Reasoning::Open(marks),
            // An empty thought stands there where reasoning is switched off.
            Some(marks) if prompt.trim_end().ends_with(marks.close) => Reasoning::None,
            Some(marks) => Reasoning::Possible(marks),
        }
    }

    /// All but `None`.
    pub(super) fn kinds() -> impl Iterator<Item = Reasoning> {
        let channels = [false, true].map(|header| Reasoning::Channels { header });
        Marks::ALL.into_iter().flat_map(|marks| [Reasoning::Open(marks), Reasoning::Possible(marks)]).chain(channels)
    }
}

const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";

/// A piece of what stands there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// A text.
    Text(String),
    /// A control token.
    Token(u32),
}

impl Piece {
    fn text(text: &str) -> Piece {
        Piece::Text(text.to_owned())
    }

    /// A mark of a model: the token of that name where the tokenizer has it as a control token, else its text.
    pub(super) fn mark(tokenizer: &Tokenizer, name: &str) -> Piece {
        match tokenizer.encode(name, false, true)[..] {
            [id] if tokenizer.is_control(id) && !tokenizer.is_eog(id) => Piece::Token(id),
            _ => Piece::text(name),
        }
    }

    /// It in Lark.
    pub(super) fn lark(&self) -> String {
        match self {
            Piece::Text(text) => quoted(text),
            Piece::Token(id) => format!("<[{id}]>"),
        }
    }
}

/// What stands before a form: a thought with its marks, or something else.
#[derive(Clone, Debug)]
pub(super) struct Before {
    /// What opens a thought; the prompt does where there is nothing.
    pub open: Vec<Piece>,
    /// What ends it.
    pub close: Piece,
    /// What stands between it and the form.
    pub then: Vec<Piece>,
    /// What stands there without a thought; `None` where one must come.
    pub direct: Option<Vec<Piece>>,
    /// Whether white space may follow a thought.
    pub space: bool,
}

impl Before {
    /// What stands before a form in texts of this tokenizer.
    pub(super) fn new(tokenizer: &Tokenizer, reasoning: Reasoning) -> Option<Before> {
        let mark = |name: &str| Piece::mark(tokenizer, name);
        let channel = |name: &str| vec![mark(CHANNEL), Piece::text(name), mark(MESSAGE)];
        let think = |open, marks: Marks, direct| {
            let close = mark(marks.close);
            Before { open, close, then: vec![], direct, space: true }
        };
        match reasoning {
            Reasoning::None => None,
            Reasoning::Open(marks) => Some(think(vec![], marks, None)),
            Reasoning::Possible(marks) => Some(think(vec![mark(marks.open)], marks, Some(vec![]))),
            Reasoning::Channels { header } => {
                let last = if header { vec![] } else { channel("final") };
                let between = [mark("<|start|>"), Piece::text("assistant")].into_iter().chain(last.clone());
                Some(Before {
                    open: channel("analysis"),
                    close: mark("<|end|>"),
                    then: between.collect(),
                    direct: Some(last),
                    space: false,
                })
            }
        }
    }

    /// It in Lark, followed by the grammar of this name.
    pub(super) fn lark(&self, body: &str) -> String {
        let all = |pieces: &[Piece]| pieces.iter().map(Piece::lark).collect::<Vec<_>>().join(" ");
        let close = self.close.lark();
        // A mark that is a control token is in no text; one that is text ends the thought where it comes first.
        let thought = match self.close {
            Piece::Token(_) => format!("thought: THOUGHT {close}\nTHOUGHT: /(?s:.*)/"),
            Piece::Text(_) => format!("thought[suffix={close}]: /(?s:.*)/"),
        };
        let space = if self.space { "SPACE" } else { "" };
        let behind = format!("{} thought {space} {}", all(&self.open), all(&self.then));
        let start = match &self.direct {
            None => behind,
            Some(direct) if direct.is_empty() => format!("({behind})?"),
            Some(direct) => format!("({behind} | {})", all(direct)),
        };
        let space = if self.space { "SPACE: /[ \\n]{0,4}/\n" } else { "" };
        format!("start: {start} @{body}\n{thought}\n{space}")
    }
}

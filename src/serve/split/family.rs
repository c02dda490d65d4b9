//! How families of models write calls of tools, and how a chat template shows which family it is.

use super::channels;

/// How a family of models writes calls of tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once or more often: Hermes, Qwen 2.5 and 3, Granite 4.
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
    /// Functions and parameters in tags: Qwen 3 Coder and 3.5, Seed OSS, MiniMax M2.
    Tagged(&'static Tags),
    /// `<|tool_call_start|>[NAME(key="value", …), …]<|tool_call_end|>`, as Python calls functions: LFM 2.
    Python,
    /// `<function_calls>NAME(key="value", …)</function_calls>`, each on its line: Olmo 3.
    PythonLines,
    /// `<|tool_call|>[{"name": …, "arguments": {…}}, …]`: Granite 3.
    Granite,
    /// `<tool_calls>[{"name": …, "arguments": {…}}, …]</tool_calls>`: Hunyuan.
    Hunyuan,
    /// `<|START_ACTION|>[{"tool_call_id": …, "tool_name": …, "parameters": {…}}, …]<|END_ACTION|>`: Command R7B.
    Cohere,
    /// `<|tool_call>call:NAME{key:<|"|>value<|"|>, …}<tool_call|>`, once or more often: Gemma 4.
    Gemma,
}

/// The tags of a family that writes calls as functions with parameters.
#[derive(Debug, PartialEq, Eq)]
pub struct Tags {
    /// What a call, or several where `several`, stands between.
    pub call: (&'static str, &'static str),
    /// What a function's name stands between, and the function's end.
    pub function: (&'static str, &'static str, &'static str),
    /// What a parameter's name stands between, and the end of its value.
    pub parameter: (&'static str, &'static str, &'static str),
    /// Whether a line of its own is what a value is written on.
    pub lines: bool,
    /// Whether several functions stand between the tags of one call.
    pub several: bool,
}

/// Qwen 3 Coder, Qwen 3.5.
pub const QWEN: Tags = Tags {
    call: (CALL, CALL_END),
    function: ("<function=", ">", "</function>"),
    parameter: ("<parameter=", ">", "</parameter>"),
    lines: true,
    several: false,
};
/// Seed OSS.
pub const SEED: Tags = Tags { call: ("<seed:tool_call>", "</seed:tool_call>"), lines: false, ..QWEN };
/// MiniMax M2.
pub const MINIMAX: Tags = Tags {
    call: ("<minimax:tool_call>", "</minimax:tool_call>"),
    function: ("<invoke name=\"", "\">", "</invoke>"),
    parameter: ("<parameter name=\"", "\">", "</parameter>"),
    lines: false,
    several: true,
};

const CALL: &str = "<tool_call>";
const CALL_END: &str = "</tool_call>";
const MISTRAL: &str = "[TOOL_CALLS]";
pub const ARG_KEY: &str = "<arg_key>";
pub const PYTHON_TAG: &str = "<|python_tag|>";
const PYTHON: (&str, &str) = ("<|tool_call_start|>", "<|tool_call_end|>");
const LINES: (&str, &str) = ("<function_calls>", "</function_calls>");
const GRANITE: &str = "<|tool_call|>";
const HUNYUAN: (&str, &str) = ("<tool_calls>", "</tool_calls>");
const COHERE: (&str, &str) = ("<|START_ACTION|>", "<|END_ACTION|>");
const GEMMA: (&str, &str) = ("<|tool_call>", "<tool_call|>");
/// What Gemma 4 writes for a quote.
pub const GEMMA_QUOTE: &str = "<|\"|>";

/// Marks of calls that may be control tokens, which show nothing.
pub const MARKS: [&str; 22] = [
    CALL,
    CALL_END,
    PYTHON_TAG,
    MISTRAL,
    "[ARGS]",
    "[CALL_ID]",
    SEED.call.0,
    SEED.call.1,
    MINIMAX.call.0,
    MINIMAX.call.1,
    PYTHON.0,
    PYTHON.1,
    LINES.0,
    LINES.1,
    GRANITE,
    HUNYUAN.0,
    HUNYUAN.1,
    COHERE.0,
    COHERE.1,
    GEMMA.0,
    GEMMA.1,
    GEMMA_QUOTE,
];

impl Family {
    /// The family whose calls a chat template writes.
    pub fn of(template: &str) -> Option<Family> {
        let has = |text: &str| template.contains(text);
        if !has("tools") {
            None
        } else if channels::of(template) {
            Some(Family::Harmony)
        } else if has(ARG_KEY) {
            Some(Family::Glm)
        } else if has(MISTRAL) {
            Some(if has("[ARGS]") { Family::MistralNamed } else { Family::Mistral })
        } else if has(SEED.call.0) {
            Some(Family::Tagged(&SEED))
        } else if has(MINIMAX.call.0) {
            Some(Family::Tagged(&MINIMAX))
        } else if has(QWEN.function.0) {
            (has(CALL) && has(QWEN.parameter.0)).then_some(Family::Tagged(&QWEN))
        } else if has(COHERE.0) {
            Some(Family::Cohere)
        } else if has(GEMMA.0) && has(GEMMA_QUOTE) {
            Some(Family::Gemma)
        } else if has(PYTHON.0) || has("<|tool_list_start|>") || has("List of tools: [") {
            Some(Family::Python)
        } else if has(LINES.0) {
            Some(Family::PythonLines)
        } else if has(GRANITE) {
            Some(Family::Granite)
        } else if has(HUNYUAN.0) {
            Some(Family::Hunyuan)
        } else if has(CALL) {
            Some(Family::Hermes)
        } else if has(PYTHON_TAG) || has("ipython") && has("\"parameters\"") {
            Some(Family::Llama3)
        } else {
            None
        }
    }

    /// What a call among words begins with, and what it ends with, if anything does.
    pub fn marks(self) -> Option<(&'static str, Option<&'static str>)> {
        match self {
            Family::Hermes | Family::Glm => Some((CALL, Some(CALL_END))),
            Family::Mistral | Family::MistralNamed => Some((MISTRAL, None)),
            Family::Tagged(tags) => Some((tags.call.0, Some(tags.call.1))),
            Family::Python => Some((PYTHON.0, Some(PYTHON.1))),
            Family::PythonLines => Some((LINES.0, Some(LINES.1))),
            Family::Granite => Some((GRANITE, None)),
            Family::Hunyuan => Some((HUNYUAN.0, Some(HUNYUAN.1))),
            Family::Cohere => Some((COHERE.0, Some(COHERE.1))),
            Family::Gemma => Some((GEMMA.0, Some(GEMMA.1))),
            Family::Llama3 | Family::Harmony => None,
        }
    }

    /// Whether texts of arguments are written as they are, without quotes.
    pub fn writes_texts_bare(self) -> bool {
        matches!(self, Family::Glm | Family::Tagged(_) | Family::Gemma)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_known_by_their_templates() {
        for (template, family) in [
            ("<tool_call>", Some(Family::Hermes)),
            ("<|python_tag|>", Some(Family::Llama3)),
            ("[TOOL_CALLS]", Some(Family::Mistral)),
            ("[TOOL_CALLS]f[ARGS]", Some(Family::MistralNamed)),
            ("<tool_call>f<arg_key>", Some(Family::Glm)),
            ("<|channel|>x<|message|>", Some(Family::Harmony)),
            ("<tool_call><function=f><parameter=x>", Some(Family::Tagged(&QWEN))),
            ("<function=f>{}</function>", None),
            ("<seed:tool_call><function=f>", Some(Family::Tagged(&SEED))),
            ("<minimax:tool_call><invoke name=", Some(Family::Tagged(&MINIMAX))),
            ("List of tools: <|tool_list_start|>[", Some(Family::Python)),
            ("<function_calls>", Some(Family::PythonLines)),
            ("<|tool_call|>", Some(Family::Granite)),
            ("<tool_calls>", Some(Family::Hunyuan)),
            ("<|START_ACTION|>", Some(Family::Cohere)),
            ("<|tool_call>call:f{x:<|\"|>", Some(Family::Gemma)),
            ("", None),
        ] {
            assert_eq!(Family::of(&format!("{{% if tools %}}{template}{{% endif %}}")), family, "{template}");
        }
        assert_eq!(Family::of("{% for m in messages %}<tool_call>{% endfor %}"), None);
    }
}

//! How much of a message's words a prompt holds.
//!
//! Templates trim white space, print JSON, and leave the reasoning out of earlier answers; some take their own switches
//! (`/no_think`) out of what is said. That is as the model was trained. One that cuts a message short, or puts other
//! words in the place of some, asks the model something else than the user did.

/// What a prompt holds of a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Shown {
    /// All of it, as it is or as JSON; the ends of lines and of the text may be trimmed.
    Whole,
    /// All of it, with other white space inside.
    OtherSpace,
    /// All of it, in other case.
    OtherCase,
    /// All but these switches or control tokens.
    Without(Vec<String>),
    /// Not all; where the part begins that is missing or is another.
    Cut(String),
}

/// Characters of a text that are quoted.
pub(super) const QUOTED: usize = 60;

/// What `prompt` holds of `words`; of an assistant's, those behind its reasoning count.
pub(super) fn shown(words: &str, role: &str, prompt: &str) -> Shown {
    let words = words.trim();
    if prompt.contains(words) {
        return Shown::Whole;
    }
    let answer = if role == "assistant" { without_reasoning(words) } else { words };
    let squeezed = squeeze(prompt);
    let [plain, json @ ..] = forms(answer);
    if json.iter().filter(|form| **form != plain).any(|form| squeezed.contains(form))
        || trimmed(prompt).contains(&trimmed(answer))
    {
        return Shown::Whole;
    }
    if squeezed.contains(&plain) {
        return Shown::OtherSpace;
    }
    let lower = squeezed.to_lowercase();
    if forms(answer).iter().any(|form| lower.contains(&form.to_lowercase())) {
        return Shown::OtherCase;
    }
    let (kept, taken) = without_markup(answer);
    if !taken.is_empty() && without_markup(prompt).0.contains(&kept) {
        let (missing, others): (Vec<_>, Vec<_>) = taken.into_iter().partition(|t| !prompt.contains(t.as_str()));
        return Shown::Without(if missing.is_empty() { others } else { missing });
    }
    let (kept, taken) = without_switches(answer);
    if !taken.is_empty() && without_switches(prompt).0.contains(&kept) {
        return Shown::Without(taken);
    }
    Shown::Cut(rest(&squeeze(answer), &squeezed))
}

/// A text with single spaces for all white space.
fn squeeze(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(word);
    }
    out
}

/// A text without white space at the ends of its lines.
fn trimmed(text: &str) -> String {
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// How a text is printed: as it is, as JSON (also in ASCII alone), and as Python prints texts.
fn forms(text: &str) -> [String; 4] {
    let json = serde_json::to_string(text).unwrap_or_default();
    let json = json.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or_default();
    let ascii = json.chars().fold(String::with_capacity(json.len()), |mut out, c| {
        match c.is_ascii() {
            true => out.push(c),
            false => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}"))),
        }
        out
    });
    let python = json.replace("\\\"", "\"");
    [squeeze(text), squeeze(json), squeeze(&ascii), squeeze(&python)]
}

/// What closes the reasoning that comes before an answer.
const REASONING_ENDS: [&str; 9] = [
    "</think>",
    "</thinking>",
    "</thought>",
    "</reasoning>",
    "</reflection>",
    "</seed:think>",
    "[/THINK]",
    "<|message|>",
    "<channel|>",
];
/// What opens it; without its end all that follows is reasoning.
const REASONING_BEGINS: [&str; 5] = ["<think>", "<thinking>", "<seed:think>", "[THINK]", "<|channel>"];

/// An answer without the reasoning before it.
fn without_reasoning(answer: &str) -> &str {
    let end = REASONING_ENDS.iter().filter_map(|end| answer.rfind(end).map(|at| at + end.len())).max();
    match end {
        Some(end) => answer[end..].trim(),
        None if REASONING_BEGINS.iter().any(|begin| answer.starts_with(begin)) => "",
        None => answer,
    }
}

/// Switches that templates replace wherever they occur, also in `</think>`.
const SWITCHES: [&str; 3] = ["/no_think", "/nothink", "/think"];

/// A text with single spaces and without [`SWITCHES`], and which of them it has.
fn without_switches(text: &str) -> (String, Vec<String>) {
    let found = SWITCHES.iter().filter(|s| text.contains(**s));
    let kept = SWITCHES.iter().fold(text.to_owned(), |text, switch| text.replace(switch, ""));
    (squeeze(&kept), found.map(|s| (*s).to_owned()).collect())
}

/// Bytes of a control token or switch at most.
const MARKUP_MAX: usize = 40;

/// A text with single spaces and without what is written like a switch (`/no_think`) or a control token
/// (`<|im_end|>`, `[INST]`); and what that was.
fn without_markup(text: &str) -> (String, Vec<String>) {
    let (mut kept, mut taken) = (String::with_capacity(text.len()), Vec::new());
    let mut rest = text;
    let mut after_space = true;
    while let Some(c) = rest.chars().next() {
        match markup(rest, after_space) {
            Some(len) => {
                taken.push(rest[..len].to_owned());
                kept.push(' ');
                rest = &rest[len..];
                after_space = false;
            }
            None => {
                kept.push(c);
                after_space = c.is_whitespace();
                rest = &rest[c.len_utf8()..];
            }
        }
    }
    (squeeze(&kept), taken)
}

/// Bytes of the switch or control token that `text` begins with.
fn markup(text: &str, after_space: bool) -> Option<usize> {
    let name = |t: &str| t.bytes().take(MARKUP_MAX).take_while(|b| b.is_ascii_alphanumeric() || *b == b'_').count();
    let close = match text.as_bytes()[0] {
        b'/' if after_space => {
            let len = 1 + name(&text[1..]);
            let ends = text[len..].chars().next().is_none_or(char::is_whitespace);
            return (len > 1 && ends).then_some(len);
        }
        b'<' => b'>',
        b'[' => b']',
        _ => return None,
    };
    let len = text.bytes().take(MARKUP_MAX).position(|b| b == close)? + 1;
    let inner = text[1..len - 1].strip_prefix('/').unwrap_or(&text[1..len - 1]);
    // `[i]` and `<int>` are what people write in code.
    let is_token = match close {
        b']' => inner.len() > 2 && inner.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'),
        _ => inner.len() > 2 && inner.starts_with('|') && inner.ends_with('|') || ANGLED.contains(&inner),
    };
    (is_token && !inner.contains(char::is_whitespace)).then_some(len)
}

/// Control tokens in plain angle brackets.
const ANGLED: [&str; 12] = [
    "s",
    "bos",
    "eos",
    "pad",
    "unk",
    "think",
    "thinking",
    "start_of_turn",
    "end_of_turn",
    "tool_call",
    "tool_response",
    "answer",
];

/// Bytes that a quotation goes back to the beginning of a word at most; some scripts have no spaces.
const BACK_MAX: usize = 20;

/// The part of `words` that is not in `prompt`: the word in which the longest beginning ends that is, and what follows.
fn rest(words: &str, prompt: &str) -> String {
    let boundary = |at: usize| (0..=at).rev().find(|&at| words.is_char_boundary(at)).unwrap_or(0);
    let (mut from, mut beyond) = (0, words.len());
    loop {
        let middle = boundary((from + beyond) / 2);
        if middle == from {
            break;
        }
        *(if prompt.contains(&words[..middle]) { &mut from } else { &mut beyond }) = middle;
    }
    let word = words[..from].rfind(' ').map_or(0, |space| space + 1);
    let from = if from - word > BACK_MAX || words[from..].starts_with(' ') { from } else { word };
    words[from..].trim_start().chars().take(QUOTED).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(words: &str, prompt: &str) -> Shown {
        shown(words, "user", prompt)
    }

    #[test]
    fn trimmed_ends_and_json_change_nothing() {
        for (words, prompt) in [
            ("  a  b\n", "<user>a  b<end>"),
            ("a  \n\n  b\r\nc", "<user>a\n\n  b\nc<end>"),
            ("a \"b\"\nc", r#"{"text": "a \"b\"\nc"}"#),
            ("é \u{1f600}", r#"{"text": "\u00e9 \ud83d\ude00"}"#),
            ("say \"b\"\nc", r#"{'text': 'say "b"\nc'}"#),
            ("a/b <c d> [1]", "<user>a/b <c d> [1]"),
        ] {
            assert_eq!(of(words, prompt), Shown::Whole, "{words}");
        }
    }

    /// Guards against code and tables that lose their lines without a word.
    #[test]
    fn other_white_space_inside_is_told() {
        for (words, prompt) in [("a\n\n  b", "<user>a b<end>"), ("if x:\n    y", "<user>if x:\ny"), ("a  b", "a b")] {
            assert_eq!(of(words, prompt), Shown::OtherSpace, "{words}");
        }
    }

    #[test]
    fn reasoning_is_left_out_of_answers_alone() {
        let words = "<think>so</think>\n\nyes";
        assert_eq!(shown(words, "assistant", "<assistant>yes"), Shown::Whole);
        assert_eq!(shown("<think>so", "assistant", "<assistant>"), Shown::Whole);
        assert!(matches!(shown("yes", "assistant", "<assistant>no"), Shown::Cut(_)));
        assert!(matches!(of(words, "<user>yes"), Shown::Without(_) | Shown::Cut(_)));
    }

    #[test]
    fn switches_and_control_tokens_are_named() {
        let taken = |all: &[&str]| Shown::Without(all.iter().map(|s| (*s).to_owned()).collect());
        assert_eq!(of("be brief /no_think", "<system>be brief<end>"), taken(&["/no_think"]));
        assert_eq!(of("/think a <|x|>b [/INST]", "<user>a b<end>"), taken(&["/think", "<|x|>", "[/INST]"]));
        assert_eq!(of("a</think>b", "<user>a<>b"), taken(&["/think"]));
        assert!(matches!(of("a / b", "a b"), Shown::Cut(_)));
        assert!(matches!(of("see /usr/bin for it", "see for it"), Shown::Cut(_)));
        assert!(matches!(of("x[0] = 1", "x = 1"), Shown::Cut(_)));
        assert!(matches!(of("x[i] = 1", "x = 1"), Shown::Cut(_)));
        assert!(matches!(of("vector<int> v", "vector v"), Shown::Cut(_)));
    }

    #[test]
    fn what_is_cut_or_replaced_is_quoted() {
        let words = "one two three four";
        for (prompt, lost) in [
            ("<user>one two<end>", "three four"),
            ("<user>one two four<end>", "three four"),
            ("<user>one 2 three four<end>", "two three four"),
            ("<user>three four<end>", "one two three four"),
        ] {
            assert_eq!(of(words, prompt), Shown::Cut(lost.into()), "{prompt}");
        }
        assert_eq!(of("One", "<user>ONE"), Shown::OtherCase);
    }
}

//! A rendered prompt that holds every message's words.
//!
//! Templates differ in what they take: some read a content as a list of parts and print nothing of a text, some know
//! no system message. Each message's words are replaced by a mark, and what does not come back was dropped; words of
//! which only a part is in the prompt were cut ([`shown`]). Then the same messages are given in another form.

use serde_json::{Value as Json, json};

use super::TokenizerError;
use super::shown::{QUOTED, Shown, shown};
use crate::memory::bounded;

/// A prompt in which no message's words are missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// The rendered text.
    pub text: String,
    /// What was changed so that it holds every message, a line each.
    pub notes: Vec<String>,
}

/// Renders messages.
pub(super) type Render<'a> = dyn Fn(&[Json]) -> Result<String, TokenizerError> + 'a;

/// Renders `messages` in the first form in which no words are missing.
pub(super) fn checked(messages: &[Json], render: &Render) -> Result<Prompt, TokenizerError> {
    let given = Attempt::new(messages.to_vec(), render);
    if given.is_clean() {
        return given.into_prompt(None);
    }
    let parts = given.changed(&as_parts, render);
    let text = given.changed(&as_text, render);
    let renamed = given.changed(&developer_as_system, render);
    let mut others: Vec<Attempt> = [parts, text, renamed].into_iter().flatten().collect();
    if let Some(at) = others.iter().position(Attempt::is_clean) {
        return others.swap_remove(at).into_prompt(None);
    }
    for attempt in std::iter::once(&given).chain(&others) {
        let Some(merged) = merge_systems(attempt) else { continue };
        let merged = Attempt::new(merged, render);
        if merged.is_clean() {
            let verb = match &given.text {
                Ok(_) if given.missing.iter().any(|&i| is_system(&messages[i])) => "drops",
                Ok(_) => "cuts",
                Err(_) => "refuses",
            };
            let note = format!("the chat template {verb} the system message; it is put before the user's");
            return merged.into_prompt(Some(note));
        }
    }
    let name = |i: usize| (i + 1, role(&messages[i]).to_owned());
    if let Some(&i) = given.missing.first() {
        let (number, role) = name(i);
        let words = words(&messages[i]).concat().trim().chars().take(QUOTED).collect();
        return Err(TokenizerError::DropsMessage { number, role, words });
    }
    if let Some((i, lost)) = given.cut.first() {
        let (number, role) = name(*i);
        return Err(TokenizerError::CutsMessage { number, role, lost: lost.clone() });
    }
    // Printed as data, quotes and all, and nothing better is to be had.
    given.into_prompt(None)
}

/// Messages in one form, and what came of them.
struct Attempt {
    messages: Vec<Json>,
    text: Result<String, TokenizerError>,
    /// Messages whose words are not in the text.
    missing: Vec<usize>,
    /// Messages whose parts are printed as data (`[{'type': 'text', …`).
    as_data: Vec<usize>,
    /// Messages of which a part is not in the text, with how that begins.
    cut: Vec<(usize, String)>,
    /// What the template changes that is no reason to refuse it.
    notes: Vec<String>,
}

impl Attempt {
    fn new(messages: Vec<Json>, render: &Render) -> Attempt {
        let text = render(&messages);
        let (mut missing, mut as_data, mut cut, mut notes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        if let Ok(text) = &text {
            let salt = salt(&messages);
            let marked: Vec<Json> =
                messages.iter().enumerate().map(|(i, m)| with_words(m, |_| mark(salt, i))).collect();
            let probe = render(&marked).ok();
            let markup = probe.as_deref().map(|probe| without_marks(probe, salt)).unwrap_or_default();
            for (i, m) in messages.iter().enumerate().filter(|(_, m)| must_show(m)) {
                // Each message is looked for in all of the text.
                if bounded::is_asked_to_end() {
                    return Attempt { messages, text: Err(TokenizerError::Stopped), missing, as_data, cut, notes };
                }
                let found = match &probe {
                    Some(probe) => find_mark(probe, &mark(salt, i)),
                    // What the template says of a mark it may not say of the words themselves.
                    None => text.find(words(m).concat().trim()),
                };
                match (found, &probe) {
                    (Some(at), Some(probe)) if m["content"].is_array() && role(m) != "tool" => {
                        let before = probe[..at].trim_end_matches(['"', '\'', ' ']);
                        if before.ends_with("text':") || before.ends_with("text\":") {
                            as_data.push(i);
                            continue;
                        }
                    }
                    (None, _) if !changes_text(&messages, i, text, render) => {
                        missing.push(i);
                        continue;
                    }
                    _ => {}
                }
                for part in words(m) {
                    let hidden = is_hidden(&messages, m, part, text, &markup);
                    let shown = match hidden {
                        true => shown(part, role(m), &text.replace(part.trim(), " ")),
                        false => shown(part, role(m), text),
                    };
                    match changed(role(m), shown) {
                        Changed::No => {}
                        Changed::Told(note) => notes.push(note),
                        Changed::Cut(lost) => cut.push((i, lost)),
                    }
                }
            }
        }
        notes.dedup();
        Attempt { messages, text, missing, as_data, cut, notes }
    }

    fn is_clean(&self) -> bool {
        self.text.is_ok() && self.missing.is_empty() && self.as_data.is_empty() && self.cut.is_empty()
    }

    /// The prompt, with one note more.
    fn into_prompt(self, note: Option<String>) -> Result<Prompt, TokenizerError> {
        let notes = note.into_iter().chain(self.notes).collect();
        self.text.map(|text| Prompt { text, notes })
    }

    /// Whether another form may help this message: all are suspected where the template gave an error.
    fn suspects(&self, i: usize) -> bool {
        let is_cut = || self.cut.iter().any(|(n, _)| *n == i);
        self.text.is_err() || self.missing.contains(&i) || self.as_data.contains(&i) || is_cut()
    }

    /// The same messages, the suspected ones in another form; `None` if that changes nothing, or the template ran out
    /// of its steps.
    fn changed(&self, form: &dyn Fn(&Json) -> Option<Json>, render: &Render) -> Option<Attempt> {
        if matches!(&self.text, Err(e) if is_hopeless(e)) {
            return None;
        }
        let mut any = false;
        let messages = self.messages.iter().enumerate().map(|(i, m)| {
            let other = if self.suspects(i) { form(m) } else { None };
            any |= other.is_some();
            other.unwrap_or_else(|| m.clone())
        });
        let messages: Vec<Json> = messages.collect();
        any.then(|| Attempt::new(messages, render))
    }
}

/// Bytes of words that chance may find in the markup.
const SHORT: usize = 32;

/// Whether `text` has a message's words because other messages of its role say the same, or the markup does, so that
/// one that is cut seems to be there. `markup` is the text without any words.
fn is_hidden(messages: &[Json], m: &Json, of_m: &str, text: &str, markup: &str) -> bool {
    let of_m = of_m.trim();
    let of_role = messages.iter().filter(|other| role(other) == role(m));
    let said = of_role.flat_map(words).filter(|w| w.trim() == of_m).count();
    if of_m.is_empty() || said < 2 && of_m.len() > SHORT {
        return false;
    }
    (1..said + markup.matches(of_m).count()).contains(&text.matches(of_m).count())
}

/// Switches and control tokens that a note names.
const NAMED: usize = 3;

/// What is to be done about the words of a message.
enum Changed {
    No,
    /// They are told of.
    Told(String),
    /// The message is asked for in another form, and refused if none helps.
    Cut(String),
}

/// What is to be done about the words of a message of `role` that are shown so. What was answered before may be
/// shortened; what is asked may not.
fn changed(role: &str, shown: Shown) -> Changed {
    match shown {
        Shown::Whole => Changed::No,
        Shown::OtherSpace if matches!(role, "assistant" | "tool") => Changed::No,
        Shown::OtherSpace => Changed::Told(format!(
            "the chat template changes white space inside a message (role {role}): lines and indentation may be lost"
        )),
        Shown::OtherCase => Changed::Told(format!("the chat template changes the case of words (role {role})")),
        Shown::Without(all) => {
            let all: Vec<String> = all.iter().take(NAMED).map(|name| format!("{name:?}")).collect();
            Changed::Told(format!("the chat template leaves {} out of a message (role {role})", all.join(", ")))
        }
        Shown::Cut(_) if matches!(role, "assistant" | "tool") => {
            Changed::Told(format!("the chat template leaves out or changes a part of a message (role {role})"))
        }
        Shown::Cut(lost) => Changed::Cut(lost),
    }
}

/// Whether no form of the messages can help.
fn is_hopeless(e: &TokenizerError) -> bool {
    !matches!(e, TokenizerError::Template(_))
}

/// Whether other words of message `i` give another text.
fn changes_text(messages: &[Json], i: usize, text: &str, render: &Render) -> bool {
    let mut other = messages.to_vec();
    // As many letters, since a template that runs over a text as over a list prints something for each.
    other[i] = with_words(&messages[i], |words| words.chars().map(another).collect());
    // A template that refuses the other words has read them.
    render(&other).map_or(true, |other| other != text)
}

/// Another letter in the place of one; white space stays.
fn another(c: char) -> char {
    match c {
        c if c.is_whitespace() => c,
        'x' => 'y',
        _ => 'x',
    }
}

fn role(m: &Json) -> &str {
    m["role"].as_str().unwrap_or("none")
}

fn is_system(m: &Json) -> bool {
    matches!(role(m), "system" | "developer")
}

/// The texts of a message: its content, or the parts that are text.
fn words(m: &Json) -> Vec<&str> {
    match &m["content"] {
        Json::String(s) => vec![s],
        Json::Array(parts) => parts.iter().filter(|p| p["type"] == "text").filter_map(|p| p["text"].as_str()).collect(),
        _ => Vec::new(),
    }
}

/// Whether a prompt without this message's words is wrong. Templates print the calls in place of words next to them.
fn must_show(m: &Json) -> bool {
    words(m).iter().any(|t| !t.trim().is_empty()) && m.get("tool_calls").is_none_or(Json::is_null)
}

/// A text that neither templates nor messages have, one for each message; case does not matter in it.
fn mark(salt: usize, i: usize) -> String {
    format!("NT{salt}Q{i}Q{salt}TN")
}

/// The salt of marks that no message has.
fn salt(messages: &[Json]) -> usize {
    let said = |salt: usize| messages.iter().flat_map(words).any(|w| w.contains(&format!("NT{salt}Q")));
    (7..).find(|salt| !said(*salt)).unwrap_or_default()
}

fn find_mark(text: &str, mark: &str) -> Option<usize> {
    text.find(mark).or_else(|| text.to_ascii_uppercase().find(mark)).or_else(|| text.find(&mark.to_lowercase()))
}

/// A text with spaces for the marks in it.
fn without_marks(text: &str, salt: usize) -> String {
    let (begin, end) = (format!("nt{salt}q"), format!("q{salt}tn"));
    let lower = text.to_ascii_lowercase();
    let (mut out, mut at) = (String::with_capacity(text.len()), 0);
    while let Some(found) = lower[at..].find(&begin) {
        let digits = at + found + begin.len();
        let len = lower[digits..].bytes().take_while(u8::is_ascii_digit).count();
        let whole = lower[digits + len..].starts_with(&end);
        let (kept, next) = if whole { (at + found, digits + len + end.len()) } else { (digits, digits) };
        out.push_str(&text[at..kept]);
        out.push(' ');
        at = next;
    }
    out.push_str(&text[at..]);
    out
}

/// The message with other texts in the places of its own.
fn with_words(m: &Json, other: impl Fn(&str) -> String) -> Json {
    let mut m = m.clone();
    match m.get_mut("content") {
        Some(Json::String(s)) => *s = other(s),
        Some(Json::Array(parts)) => {
            for part in parts.iter_mut().filter(|p| p["type"] == "text") {
                if let Some(Json::String(s)) = part.get_mut("text") {
                    *s = other(s);
                }
            }
        }
        _ => {}
    }
    m
}

fn with_content(m: &Json, content: Json) -> Json {
    let mut m = m.clone();
    m["content"] = content;
    m
}

/// A content that is a text, as a list of one part.
fn as_parts(m: &Json) -> Option<Json> {
    let text = m["content"].as_str()?;
    Some(with_content(m, json!([{ "type": "text", "text": text }])))
}

/// A content that is a list of texts, as one text; lines part them, as in llama.cpp.
fn as_text(m: &Json) -> Option<Json> {
    let parts = m["content"].as_array()?;
    let texts = words(m);
    (texts.len() == parts.len()).then(|| with_content(m, json!(texts.join("\n"))))
}

/// A developer's message as the system's, which older templates know.
fn developer_as_system(m: &Json) -> Option<Json> {
    (role(m) == "developer").then(|| {
        let mut m = m.clone();
        m["role"] = json!("system");
        m
    })
}

/// The suspected system messages put before the next user's message, or the last one's if none follows; `None` if
/// there are none, or no user's.
fn merge_systems(attempt: &Attempt) -> Option<Vec<Json>> {
    let (mut out, mut waiting) = (Vec::new(), Vec::new());
    for (i, m) in attempt.messages.iter().enumerate() {
        if is_system(m) && attempt.suspects(i) {
            waiting.extend(words(m));
        } else if role(m) == "user" && !waiting.is_empty() {
            out.push(prefixed(m, &std::mem::take(&mut waiting).join("\n")));
        } else {
            out.push(m.clone());
        }
    }
    if !waiting.is_empty() {
        let last = out.iter_mut().rev().find(|m| role(m) == "user")?;
        *last = prefixed(last, &waiting.join("\n"));
    }
    (out.len() < attempt.messages.len()).then_some(out)
}

/// A message with a text before its own.
fn prefixed(m: &Json, text: &str) -> Json {
    match &m["content"] {
        Json::Array(parts) => {
            let first = json!({ "type": "text", "text": format!("{text}\n") });
            with_content(m, Json::Array([&[first], &parts[..]].concat()))
        }
        own => with_content(m, json!(format!("{text}\n{}", own.as_str().unwrap_or_default()))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::ChatTemplate;
    use super::*;

    fn prompt(source: &str, messages: &[Json]) -> Result<Prompt, TokenizerError> {
        ChatTemplate::new(source, String::new(), String::new())?.prompt(messages, None, true)
    }

    fn text(source: &str, messages: &[Json]) -> String {
        prompt(source, messages).unwrap().text
    }

    const EACH: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";
    const PARTS: &str = "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}";

    #[test]
    fn a_text_is_given_as_parts_where_the_template_reads_parts() {
        let m = [json!({"role": "user", "content": "hello"})];
        assert_eq!(text(PARTS, &m), "<user>hello");
        assert_eq!(text("{{ messages[0].content[0].text }}", &m), "hello");
        assert_eq!(
            text(
                "{{ messages[0]['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}",
                &m
            ),
            "hello"
        );
    }

    #[test]
    fn a_template_that_prints_brackets_for_each_letter_prints_no_words() {
        let m = [json!({"role": "user", "content": "hello"})];
        assert_eq!(text("{% for c in messages[0].content %}[{{ c.text }}]{% endfor %}", &m), "[hello]");
    }

    #[test]
    fn a_text_that_chance_finds_in_the_markup_is_not_taken_for_printed() {
        let m = [json!({"role": "user", "content": "user"})];
        assert_eq!(text(PARTS, &m), "<user>user");
    }

    #[test]
    fn parts_are_given_as_a_text_where_the_template_reads_texts() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let m = [json!({"role": "user", "content": parts})];
        assert_eq!(text(EACH, &m), "<user>a\nb");
        assert_eq!(text("{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}", &m), "<a\nb>");
    }

    #[test]
    fn words_that_a_template_changes_are_there() {
        let m = [
            json!({"role": "user", "content": " a \"b\" "}),
            json!({"role": "assistant", "content": "<think>x</think>y"}),
        ];
        let t = "{% for m in messages %}{{ m.content.split('</think>')[-1] | trim | upper | tojson }}{% endfor %}";
        assert_eq!(text(t, &m), "\"A \\\"B\\\"\"\"Y\"");
    }

    #[test]
    fn a_message_that_is_cut_or_changed_is_refused_or_told_of() {
        let m = [json!({"role": "user", "content": "Ask one thing, not another"})];
        for expression in [
            "m.content[:12]",
            "m.content[:5] ~ m.content[15:]",
            "m.content | replace('not', 'and')",
            "m.content | reverse",
            "m.content.split(',')[0]",
            "m.content.split() | sort | join(' ')",
            "m.content.lstrip('Ask ')",
            "m.content | replace(' ', '')",
            "m.content | title | replace('One', 'Two')",
        ] {
            let e =
                prompt(&format!("{{% for m in messages %}}[{{{{ {expression} }}}}]{{% endfor %}}"), &m).unwrap_err();
            assert!(matches!(e, TokenizerError::CutsMessage { number: 1, .. }), "{expression}: {e}");
        }
        for (expression, told) in [
            ("m.content | upper", Some("changes the case of words (role user)")),
            ("m.content | trim", None),
            ("m.content.split() | join(' ')", None),
            ("m.content | tojson", None),
        ] {
            let p = prompt(&format!("{{% for m in messages %}}[{{{{ {expression} }}}}]{{% endfor %}}"), &m).unwrap();
            assert_eq!(p.notes.first().map(|n| n.contains(told.unwrap_or("?"))), told.map(|_| true), "{:?}", p.notes);
        }
        let switched = [json!({"role": "user", "content": "hi /no_think"})];
        let p = prompt("{{ messages[0].content.replace('/no_think', '').rstrip() }}", &switched).unwrap();
        assert!(p.text == "hi" && p.notes[0].contains("\"/no_think\""), "{:?}", p.notes);
    }

    #[test]
    fn a_message_that_is_cut_is_not_hidden_by_another_that_says_the_same() {
        let m = [
            json!({"role": "user", "content": "go on, please"}),
            json!({"role": "assistant", "content": "no"}),
            json!({"role": "user", "content": "go on, please"}),
        ];
        let t = |last: &str| {
            format!("{{% for m in messages %}}<{{{{ m.content{last} if loop.last else m.content }}}}>{{% endfor %}}")
        };
        assert_eq!(text(&t(""), &m), "<go on, please><no><go on, please>");
        let e = prompt(&t("[:9]"), &m).unwrap_err().to_string();
        assert!(e.contains("leaves out a part") && e.contains("please"), "{e}");
        let marks = [json!({"role": "user", "content": "NT7Q0Q7TN NT8Q"})];
        assert_eq!(text("{{ messages[0].content }}", &marks), "NT7Q0Q7TN NT8Q");
        for word in ["7", "Q", "0", "tn", "NT", " "] {
            let m = [json!({"role": "user", "content": word}), json!({"role": "user", "content": word})];
            assert_eq!(text("{% for m in messages %}[{{ m.content }}]{% endfor %}", &m), format!("[{word}][{word}]"));
        }
        let short = [json!({"role": "user", "content": "no"})];
        let e = prompt("What you know: {{ messages[0].content[:1] }}", &short).unwrap_err().to_string();
        assert!(e.contains("leaves out a part"), "{e}");
        assert_eq!(text("What you know: {{ messages[0].content }}", &short), "What you know: no");
    }

    #[test]
    fn answers_may_lose_their_reasoning_and_more() {
        let m = [
            json!({"role": "assistant", "content": "<think>long</think>\n\nyes, so it is"}),
            json!({"role": "user", "content": "why?"}),
        ];
        let t = |cut: &str| {
            format!("{{% for m in messages %}}{{{{ m.content.split('</think>')[-1]{cut} | trim }}}}{{% endfor %}}")
        };
        assert_eq!(prompt(&t(""), &m).unwrap(), Prompt { text: "yes, so it iswhy?".into(), notes: vec![] });
        assert!(prompt(&t("[:12]"), &m).unwrap().notes[0].contains("(role assistant)"));
    }

    #[test]
    fn a_system_message_that_is_cut_goes_before_the_users() {
        let m = [json!({"role": "system", "content": "Be brief."}), json!({"role": "user", "content": "hi"})];
        let cuts =
            "{% for m in messages %}<{{ m.role }}>{{ m.content[:7] if m.role == 'system' else m.content }}{% endfor %}";
        let p = prompt(cuts, &m).unwrap();
        assert_eq!((p.text.as_str(), p.notes[0].contains("cuts the system message")), ("<user>Be brief.\nhi", true));
    }

    #[test]
    fn a_message_that_is_dropped_either_way_is_an_error() {
        let m = [json!({"role": "user", "content": "one"}), json!({"role": "user", "content": "two"})];
        let e = prompt("{{ messages[-1].content }}", &m).unwrap_err().to_string();
        assert!(e.contains("drops message 1 (role user)") && e.contains("\"one\""), "{e}");
        let calls = [json!({"role": "assistant", "content": "so", "tool_calls": []})];
        assert_eq!(text("", &calls), "");
    }

    #[test]
    fn a_system_message_that_is_dropped_or_refused_goes_before_the_next_users() {
        let m = [json!({"role": "system", "content": "Be brief."}), json!({"role": "user", "content": "hi"})];
        let drops = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}";
        let refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}";
        for (source, verb) in [
            (drops.to_owned(), "drops"),
            (format!("{refuses}{EACH}"), "refuses"),
            (format!("{refuses}{PARTS}"), "refuses"),
        ] {
            let p = prompt(&source, &m).unwrap();
            assert_eq!(p.text.replace("Be brief.\n", ""), "<user>hi", "{source}");
            assert!(p.text.contains("<user>Be brief."), "{source}");
            assert!(p.notes[0].contains(verb), "{:?}", p.notes);
        }
        let only = [json!({"role": "system", "content": "Be brief."})];
        assert!(prompt(drops, &only).unwrap_err().to_string().contains("role system"));
    }

    #[test]
    fn a_developers_message_is_the_systems_where_the_template_knows_no_developer() {
        let m = [json!({"role": "developer", "content": "Be brief."}), json!({"role": "user", "content": "hi"})];
        let t = "{% for m in messages if m.role in ['system', 'user'] %}<{{ m.role }}>{{ m.content }}{% endfor %}";
        assert_eq!(text(t, &m), "<system>Be brief.<user>hi");
    }

    #[test]
    fn a_templates_own_error_is_what_is_told() {
        let m = [json!({"role": "user", "content": "hi"})];
        let e = prompt("{{ raise_exception('roles must alternate') }}", &m).unwrap_err().to_string();
        assert!(e.contains("roles must alternate"), "{e}");
    }
}

//! Chat templates render as Python's Jinja renders them: `fixtures/make_templates.py`; the built-in ones as llama.cpp
//! does: `fixtures/make_builtin_templates.sh`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use nt::gguf::{self, Metadata, Value};
use nt::tokenizer::{ChatTemplate, Tokenizer, TokenizerError};
use serde_json::{Value as Json, json};

#[allow(dead_code, reason = "each test binary uses a part")]
#[path = "common/vocab.rs"]
mod vocab;

#[derive(serde::Deserialize)]
struct Case {
    messages: Vec<Json>,
    tools: Option<Vec<Json>>,
    add_generation_prompt: Option<bool>,
}

#[derive(serde::Deserialize)]
struct Values {
    messages: Vec<Json>,
}

#[derive(serde::Deserialize)]
struct Fixture {
    time: i64,
    cases: BTreeMap<String, Case>,
    /// By template, then by case; `None` where Jinja raised an error.
    expected: BTreeMap<String, BTreeMap<String, Option<String>>>,
    values: Values,
    /// Small templates, each with what it renders.
    snippets: BTreeMap<String, String>,
}

/// The folder of templates and the fixture; `NT_TEMPLATES=FOLDER,JSON` names others.
fn sources() -> (PathBuf, PathBuf) {
    if let Ok(given) = std::env::var("NT_TEMPLATES") {
        let (folder, json) = given.split_once(',').expect("NT_TEMPLATES=FOLDER,JSON");
        return (folder.into(), json.into());
    }
    let fixtures = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures"));
    (fixtures.join("templates"), fixtures.join("templates.json"))
}

#[test]
fn chat_templates() {
    let (folder, json) = sources();
    let fixture: Fixture = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    let mut wrong = Vec::new();
    for (source, expected) in &fixture.snippets {
        let template = ChatTemplate::new(source, String::new(), String::new());
        match template.and_then(|t| t.render(&fixture.values.messages, true)) {
            Ok(got) if got == *expected => {}
            got => wrong.push(difference(source, got.as_deref(), Some(expected))),
        }
    }
    for (name, expected) in &fixture.expected {
        let source = std::fs::read_to_string(folder.join(name)).unwrap();
        let mut template = ChatTemplate::new(&source, "<s>".into(), "</s>".into()).unwrap();
        template.set_time(fixture.time);
        for (case, expected) in expected {
            let c = &fixture.cases[case];
            let prompt = c.add_generation_prompt.unwrap_or(true);
            match (template.render_with_tools(&c.messages, c.tools.as_deref(), prompt), expected) {
                (Ok(got), Some(expected)) if got == *expected => {}
                (Err(_), None) => {}
                (got, expected) => {
                    wrong.push(difference(&format!("{name} {case}"), got.as_deref(), expected.as_deref()))
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// Where two renderings part.
fn difference(what: &str, got: Result<&str, &nt::tokenizer::TokenizerError>, expected: Option<&str>) -> String {
    let Some(expected) = expected else { return format!("{what}: Jinja raises an error, nt does not") };
    let got = match got {
        Ok(got) => got,
        Err(e) => return format!("{what}: {e}"),
    };
    let at = got.chars().zip(expected.chars()).take_while(|(a, b)| a == b).count();
    let around = |t: &str| t.chars().skip(at.saturating_sub(30)).take(90).collect::<String>();
    format!("{what}\n  nt    {:?}\n  Jinja {:?}", around(got), around(expected))
}

/// A template of these known ones that prints all words prints them the same when that is checked; what the check
/// changes is said.
#[test]
fn checked_prompts_are_what_the_template_renders() {
    let (folder, json) = sources();
    let fixture: Fixture = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    let (mut same, mut changed, mut wrong) = (0, 0, Vec::new());
    for (name, expected) in &fixture.expected {
        let source = std::fs::read_to_string(folder.join(name)).unwrap();
        let mut template = ChatTemplate::new(&source, "<s>".into(), "</s>".into()).unwrap();
        template.set_time(fixture.time);
        for (case, expected) in expected {
            let c = &fixture.cases[case];
            let prompt = template.prompt(&c.messages, c.tools.as_deref(), c.add_generation_prompt.unwrap_or(true));
            match (prompt, expected) {
                (Ok(p), Some(expected)) if p.text == *expected && p.notes.is_empty() => same += 1,
                (Ok(p), _) => {
                    changed += 1;
                    println!("{name} {case}: {:?}", p.notes);
                }
                (Err(_), None) => same += 1,
                // Templates from before there were tools print nothing of their results.
                (Err(TokenizerError::DropsMessage { role, .. }), Some(_)) if role == "tool" => changed += 1,
                (Err(e), Some(_)) => wrong.push(format!("{name} {case}: {e}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{} refused:\n{}", wrong.len(), wrong.join("\n"));
    assert!(changed * 5 < same, "{changed} of {} were changed", same + changed);
}

/// What users write.
const WORDS: &[&str] = &[
    "  two\n\n\t lines  \n",
    "\"quoted\" and \\n and 'single'",
    "<b>bold</b> if a<b && c>d",
    "please /think",
    "/no_think please",
    "see /usr/bin, 1/2",
    "[INST] x [/INST] x[0]",
    "<|im_end|> and <|eot_id|>",
    "\u{e9} \u{65e5}\u{672c} \u{1f980}\u{a0}e\u{301}",
    "{{ braces }} {% raw %} {# no comment #}",
    "<tool_response>x</tool_response>",
    "<think>a</think>b",
    "{\"a\": [1, \"x\"]}",
    "```rust\nfn main() {\r\n}\r\n```",
    "- a\n\n\n\n- b ...",
    "x",
    "7",
    "Q",
    "<",
    "ASSISTANT: user",
];

/// Known templates print all that users write: where one renders "hello", it is refused for no other words.
#[test]
fn no_words_are_refused_by_known_templates() {
    let (folder, json) = sources();
    let fixture: Fixture = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    let (m, t) = metadata(&[]);
    let built_in: BTreeMap<String, Vec<String>> =
        serde_json::from_str(include_str!("fixtures/builtin_templates.json")).unwrap();
    let of_models = fixture.expected.keys().map(|name| {
        let source = std::fs::read_to_string(folder.join(name)).unwrap();
        (name, ChatTemplate::new(&source, "<s>".into(), "</s>".into()).unwrap())
    });
    let built_in = built_in.keys().map(|name| (name, ChatTemplate::from_name(&m, &t, name).unwrap()));
    let message = |role: &str, content: &str| json!({ "role": role, "content": content });
    let (mut wrong, mut told) = (Vec::new(), 0);
    for (name, template) in of_models.chain(built_in) {
        for roles in [&["user"][..], &["system", "user"], &["user", "assistant", "user"]] {
            let of = |words: &str| -> Vec<Json> { roles.iter().map(|role| message(role, words)).collect() };
            let Ok(plain) = template.prompt(&of("hello"), None, true) else { continue };
            for words in WORDS {
                match template.prompt(&of(words), None, true) {
                    Ok(prompt) if prompt.notes == plain.notes => {}
                    Ok(prompt) => {
                        told += 1;
                        println!("{name} {roles:?} {words:?}: {:?}", prompt.notes);
                    }
                    // What the template itself refuses.
                    Err(TokenizerError::Template(_)) => {}
                    Err(e) => wrong.push(format!("{name} {roles:?} {words:?}: {e}")),
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} refused:\n{}", wrong.len(), wrong.join("\n"));
    assert!(told < 20, "{told} prompts have a warning");
}

/// The vocabulary of the tests with chat templates by key.
fn metadata(templates: &[(&str, &str)]) -> (Metadata, Tokenizer) {
    let mut m = vocab::byte_level("", "gpt-2");
    for (key, source) in templates {
        m.insert(format!("tokenizer.chat_template{key}"), Value::Str((*source).into()));
    }
    let tokenizer = Tokenizer::from_metadata(&m).unwrap();
    (m, tokenizer)
}

#[test]
fn built_in_templates_render_as_llama_cpps() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/builtin_templates.json");
    let expected: BTreeMap<String, Vec<String>> =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let message = |role: &str, content: &str| json!({ "role": role, "content": content });
    let conversations = [
        vec![message("user", "Hello")],
        vec![
            message("system", "You are brief."),
            message("user", " Hi "),
            message("assistant", " Yes?\n"),
            message("user", "Two\nlines "),
        ],
        ["One", "1", "Two", "2", "Three"]
            .iter()
            .enumerate()
            .map(|(i, c)| message(if i % 2 == 0 { "user" } else { "assistant" }, c))
            .collect(),
    ];
    let (m, t) = metadata(&[]);
    let mut wrong = Vec::new();
    for (name, expected) in &expected {
        let template = ChatTemplate::from_name(&m, &t, name).unwrap();
        let cases = conversations.iter().flat_map(|c| [(c, true), (c, false)]);
        for ((messages, opening), expected) in cases.zip(expected) {
            let got = template.render(messages, opening);
            if got.as_deref().ok() != Some(expected) {
                wrong.push(difference(name, got.as_deref(), Some(expected)));
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    let e = ChatTemplate::from_name(&m, &t, "nonesuch").unwrap_err();
    let TokenizerError::UnknownTemplate { built_in, .. } = e else { panic!("{e}") };
    assert_eq!(built_in, expected.keys().cloned().collect::<Vec<_>>().join(", "));
}

#[test]
fn a_template_for_tools_is_taken_where_tools_are_given() {
    let (m, t) = metadata(&[("", "plain {{ messages[0].content }}"), (".tool_use", "tools {{ messages[0].content }}")]);
    let template = ChatTemplate::from_metadata(&m, &t).unwrap();
    let (messages, tools) = ([json!({"role": "user", "content": "hi"})], [json!({"name": "f"})]);
    let text = |tools: Option<&[Json]>| template.prompt(&messages, tools, true).unwrap().text;
    assert_eq!(
        (text(None), text(Some(&[])), text(Some(&tools))),
        ("plain hi".into(), "plain hi".into(), "tools hi".into())
    );
    // By its name it is taken without tools too.
    let by_name = ChatTemplate::from_name(&m, &t, "tool_use").unwrap();
    assert_eq!(by_name.prompt(&messages, None, true).unwrap().text, "tools hi");
    // One that cannot be parsed is no fault of a conversation without tools.
    let (m, t) = metadata(&[("", "plain {{ messages[0].content }}"), (".tool_use", "{% if %}")]);
    let template = ChatTemplate::from_metadata(&m, &t).unwrap();
    assert_eq!(template.prompt(&messages, None, true).unwrap().text, "plain hi");
    assert!(template.prompt(&messages, Some(&tools), true).is_err());
}

#[test]
fn variables_reach_the_template_and_those_it_does_not_read_are_told() {
    let (m, t) = metadata(&[(
        "",
        "{{ bos_token }}{{ enable_thinking }}|{{ effort | default('high') }}|{{ messages[0].content }}",
    )]);
    let mut template = ChatTemplate::from_metadata(&m, &t).unwrap();
    template.set_variable("enable_thinking", json!(false)).unwrap();
    template.set_variable("effort", json!("low")).unwrap();
    assert!(template.notes().is_empty(), "{:?}", template.notes());
    template.set_variable("nonesuch", json!(1)).unwrap();
    assert!(template.notes()[0].contains("nonesuch"));
    template.set_variable("bos_token", json!("B")).unwrap();
    let messages = [json!({"role": "user", "content": "hi"})];
    let text = template.render(&messages, true).unwrap();
    assert_eq!(text.to_lowercase(), "bfalse|low|hi");
    assert!(template.set_variable("messages", json!([])).unwrap_err().to_string().contains("messages"));
}

//! Chat templates render as Python's Jinja renders them: `fixtures/make_templates.py`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use nt::tokenizer::ChatTemplate;
use serde_json::Value as Json;

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

//! `nt run --json-schema` and `--grammar`, from outside.

mod common;

use common::{fails, nt, tiny};
use serde_json::{Value as Json, json};

struct Model(tempfile::TempDir);

impl Model {
    fn new() -> Model {
        let dir = tempfile::tempdir().unwrap();
        tiny(2).write(dir.path(), "m.gguf");
        Model(dir)
    }

    fn args<'a>(&self, more: &[&'a str]) -> Vec<std::borrow::Cow<'a, str>> {
        let model = self.0.path().join("m.gguf").display().to_string();
        let mut fixed = vec!["-p", "hi", "--backend", "cpu", "--threads", "1", "--temp", "1", "--top-k", "0"];
        fixed.extend((!more.contains(&"-n")).then_some(["-n", "150"]).into_iter().flatten());
        let fixed = fixed.into_iter().map(std::borrow::Cow::Borrowed);
        ["run".into(), model.into()].into_iter().chain(fixed).chain(more.iter().map(|m| (*m).into())).collect()
    }

    fn text(&self, more: &[&str]) -> String {
        let args: Vec<String> = self.args(more).into_iter().map(Into::into).collect();
        let out = nt(&args);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        // A run ends its text's last line.
        String::from_utf8(out.stdout).unwrap().trim_end_matches('\n').to_owned()
    }

    fn fails(&self, more: &[&str], code: i32, words: &[&str]) {
        let args: Vec<String> = self.args(more).into_iter().map(Into::into).collect();
        fails(&args, code, words);
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }
}

#[test]
fn a_text_conforms_to_its_schema() {
    let m = Model::new();
    let schema = json!({
        "type": "object",
        "properties": {
            "id": { "type": "integer", "minimum": 1, "maximum": 9 },
            "tags": { "type": "array", "items": { "enum": ["a", "b"] }, "minItems": 1, "maxItems": 3 },
            "when": { "type": "string", "format": "date" },
        },
        "required": ["id", "tags", "when"],
        "additionalProperties": false,
    });
    let file = m.file("s.json", &schema.to_string());
    for seed in ["1", "2", "3"] {
        let text = m.text(&["--json-schema", &file, "-s", seed]);
        let value: Json = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
        assert!((1..=9).contains(&value["id"].as_i64().unwrap()), "{text}");
        assert!((1..=3).contains(&value["tags"].as_array().unwrap().len()), "{text}");
        assert_eq!(value["when"].as_str().unwrap().len(), 10, "{text}");
    }
    // The schema itself in place of a file, as llama.cpp takes it.
    assert!(["true", "false"].contains(&&m.text(&["--json-schema", "{\"type\": \"boolean\"}"])[..]));
}

#[test]
fn a_text_is_one_of_its_grammar() {
    let m = Model::new();
    let gbnf = m.file("g.gbnf", "root ::= \"(\" root \")\" | [0-9]\n");
    for seed in ["1", "2", "3"] {
        let text = m.text(&["--grammar", &gbnf, "-s", seed, "-n", "200"]);
        let depth = text.matches('(').count();
        assert!(text.len() == 2 * depth + 1 || text.len() == 200, "{text}");
    }
    let given = m.text(&["--grammar", "root ::= [xyz]"]);
    assert!(["x", "y", "z"].contains(&&given[..]), "{given}");
    let lark = m.file("g.lark", "start: WORD (\" \" WORD){2}\nWORD: /[a-c]{1,3}/\n");
    assert_eq!(m.text(&["--grammar", &lark]).split(' ').count(), 3);
}

/// The same seed draws the same where no form is asked for as it did before there were any.
#[test]
fn the_same_seed_draws_the_same() {
    let m = Model::new();
    let any = m.file("any.lark", "start: /(?s:.)*/\n");
    let free = m.text(&["-s", "5", "-n", "40"]);
    assert_eq!(free, m.text(&["-s", "5", "-n", "40"]));
    let held = m.text(&["-s", "5", "-n", "40", "--grammar", &any]);
    assert_eq!(held, m.text(&["-s", "5", "-n", "40", "--grammar", &any]));
}

#[test]
fn what_cannot_be_followed_is_refused_with_2() {
    let m = Model::new();
    let not = m.file("not.json", "{\"not\": {\"type\": \"string\"}}");
    m.fails(&["--json-schema", &not], 2, &["JSON schema cannot be followed", "not"]);
    m.fails(&["--json-schema", &m.file("b.json", "{\"type\":")], 2, &["b.json", "not JSON"]);
    m.fails(&["--json-schema", "/nowhere/s.json"], 2, &["/nowhere/s.json"]);
    m.fails(&["--json-schema", &m.file("r.json", "{\"$ref\": \"/etc/passwd\"}")], 2, &["$ref", "nothing else is read"]);
    m.fails(&["--grammar", &m.file("x.gbnf", "root ::= y\n")], 2, &["grammar cannot be followed", "\"y\""]);
    m.fails(&["--grammar", &m.file("x.lark", "begin: \"a\"\n")], 2, &["start"]);
    m.fails(&["--grammar", &not, "--json-schema", &not], 2, &["--json-schema"]);
}

#[test]
fn banning_all_that_may_come_ends_with_1() {
    let m = Model::new();
    let lark = m.file("a.lark", "start: \"a\"\n");
    let ban: Vec<String> = (60..100).flat_map(|i| ["-l".to_owned(), format!("{i}:-inf")]).collect();
    let more: Vec<&str> = ["--grammar", &lark].into_iter().chain(ban.iter().map(String::as_str)).collect();
    m.fails(&more, 1, &["no token is left"]);
}

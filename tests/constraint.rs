//! Forms held to, on a tokenizer of bytes with a few longer tokens.

use nt::engine::constraint::Constraint;
use nt::engine::{ConstraintError, Form, Grammar, Grammars, Marks, Reasoning, Sampler, SamplerParams};
use nt::gguf;
use nt::tokenizer::Tokenizer;
use serde_json::{Value as Json, json};
use vocab::{byte_level, spm};

#[path = "common/vocab.rs"]
mod vocab;

fn tokenizer() -> Tokenizer {
    Tokenizer::from_metadata(&byte_level("", "gpt-2")).unwrap()
}

fn compile(form: &Form) -> Result<Grammar, ConstraintError> {
    Grammars::new(&tokenizer()).unwrap().compile(form, Reasoning::None)
}

/// Whether a text is one of the form: every byte may come, and the end may.
fn takes(grammar: &Grammar, text: &str) -> bool {
    let mut c = grammar.begin();
    let step = |c: &mut Constraint, id: u32| {
        let may = c.allowed().is_ok_and(|a| a.has(id));
        c.accept(id);
        may
    };
    text.bytes().all(|b| step(&mut c, u32::from(b))) && c.allowed().is_ok_and(|a| a.has(260))
}

fn schema(schema: Json) -> Form {
    Form::Schema(schema)
}

fn grammar(text: &str) -> Form {
    Form::Grammar(text.into())
}

/// Texts drawn from noise, at a temperature that lets all tokens come; those that ended, and those that were cut.
fn drawn(form: &Form, n: u64) -> (Vec<String>, Vec<String>) {
    let t = tokenizer();
    let compiled = compile(form).unwrap();
    let (mut whole, mut cut) = (Vec::new(), Vec::new());
    for seed in 0..n {
        let params = SamplerParams {
            seed,
            temp: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            grammar: Some(compiled.clone()),
            ..Default::default()
        };
        let mut sampler = Sampler::for_model(params, t.vocab_size() + 3, &t);
        sampler.begin(&[1, 2, 3]);
        let mut rng = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut ids = Vec::new();
        let mut ended = false;
        while ids.len() < 200 && !ended {
            let logits: Vec<f32> = (0..t.vocab_size() + 3)
                .map(|_| {
                    rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (rng >> 40) as f32 / (1u64 << 24) as f32 * 8.0
                })
                .collect();
            let id = sampler.sample(&logits).unwrap();
            sampler.accept(id);
            ended = t.is_eog(id);
            ids.extend((!ended).then_some(id));
        }
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| t.token_bytes(id)).copied().collect();
        if ended {
            whole.push(String::from_utf8(bytes).unwrap())
        } else {
            cut.push(String::from_utf8_lossy(&bytes).into_owned())
        }
    }
    (whole, cut)
}

#[test]
fn whatever_a_model_wants_the_text_is_json_of_the_schema() {
    let form = schema(json!({
        "type": "object",
        "properties": { "a": { "type": "integer", "minimum": 3, "maximum": 40 }, "b": { "enum": ["x", null, 2] } },
        "required": ["a", "b"],
        "additionalProperties": false,
    }));
    let (whole, cut) = drawn(&form, 40);
    assert!(whole.len() >= 38, "{cut:?}");
    for text in whole {
        let value: Json = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
        assert!((3..=40).contains(&value["a"].as_i64().unwrap()), "{text}");
        assert!([json!("x"), Json::Null, json!(2)].contains(&value["b"]), "{text}");
    }
    // Any JSON at all, strings with every character among it.
    let (whole, _) = drawn(&schema(json!({ "type": ["string", "array", "object"] })), 40);
    assert!(!whole.is_empty());
    for text in whole {
        // JSON bounds no exponent, serde does.
        if let Err(e) = serde_json::from_str::<Json>(&text) {
            assert!(e.to_string().starts_with("number out of range"), "{text:?}: {e}");
        }
    }
}

#[test]
fn white_space_is_between_parts_and_bounded() {
    let any = compile(&schema(json!({}))).unwrap();
    for json in ["{\"a\": [1, 2.5e3, -0]}", "[]", "null", "\"\\n\\\"\u{e9}\"", "{\n  \"a\": {\n    \"b\": true\n  }\n}"]
    {
        assert!(takes(&any, json), "{json}");
    }
    for not in [
        "",
        " 1",
        "[1,]",
        "{\"a\":1,}",
        "'a'",
        "[1]   ",
        "[\n\n\n1]",
        "\"\t\"",
        "01",
        "\"\\ud800\"",
        "nul",
        "\"\\u0061\"",
    ] {
        assert!(!takes(&any, not), "{not}");
    }
}

#[test]
fn keywords_that_are_not_followed_are_named() {
    for (schema, words) in [
        (json!({ "not": {} }), "not"),
        (json!({ "type": "array", "uniqueItems": true }), "uniqueItems"),
        (json!({ "if": {}, "then": {} }), "if, then"),
        (json!({ "type": "array", "contains": {} }), "contains"),
        (json!({ "dependentRequired": { "a": ["b"] } }), "dependentRequired"),
        (json!({ "propertyNames": { "maxLength": 3 } }), "propertyNames"),
        (json!({ "unevaluatedProperties": false }), "unevaluatedProperties"),
        (json!({ "oneOf": [{ "type": "integer" }, { "minimum": 2 }] }), "oneOf"),
        (json!({ "type": "string", "format": "json-pointer" }), "json-pointer"),
        (json!({ "type": "string", "pattern": "(?=a)b" }), "look-around"),
        (json!({ "$ref": "http://example.com/schema" }), "http://example.com/schema"),
        (json!({ "$ref": "file:///etc/passwd" }), "nothing else is read"),
        (json!({ "$ref": "#name", "$defs": { "a": { "$anchor": "name" } } }), "anchor"),
        (json!({ "$ref": "#/$defs/none" }), "none"),
        (json!({ "$ref": "#/$defs/a~1b" }), "a~1b"),
        (json!({ "$defs": { "a": { "$id": "http://x", "$ref": "#/b" } } }), "$defs/a/$id"),
        (json!({ "$dynamicRef": "#a" }), "$dynamicRef"),
        (json!({ "x-guidance": { "lenient": true }, "not": {} }), "x-guidance"),
        (json!({ "minProperties": 2 }), "minProperties"),
        (json!({ "const": "a\u{0}" }), "U+0000"),
        (json!({ "enum": [9_007_199_254_740_993_u64] }), "9007199254740993"),
        (json!({ "multipleOf": 1_000_003 }), "multipleOf"),
        (json!({ "allOf": [{ "multipleOf": 9973 }, { "multipleOf": 0.001 }] }), "multipleOf"),
        (json!({ "allOf": [{ "multipleOf": 997 }, { "multipleOf": 991 }] }), "multipleOf"),
        (json!(false), "nothing conforms"),
        (json!({ "type": "string", "minLength": 3, "maxLength": 2 }), "nothing conforms"),
        (json!({ "type": "thing" }), "thing"),
        (json!({ "maxItems": "\u{e9}".repeat(120) }), "wrong type"),
        (json!([1]), "an object"),
    ] {
        let e = compile(&Form::Schema(schema.clone())).unwrap_err().to_string();
        assert!(e.contains(words) && !e.contains('\n') && e.len() < 500, "{schema}: {e}");
    }
}

#[test]
fn what_says_nothing_of_a_text_is_left_out() {
    for schema in [
        json!({ "type": "integer", "format": "int32", "title": "n", "default": 3, "$comment": "x", "deprecated": true }),
        json!({ "type": "array", "items": { "type": "integer" }, "uniqueItems": false }),
        json!({ "$id": "http://x", "$ref": "#/$defs/a", "$defs": { "a": { "type": "integer" } } }),
        json!({ "type": "string", "maxLength": 2.0, "minLength": 1e0 }),
        json!({ "anyOf": [{ "multipleOf": 0.25 }, { "multipleOf": 100 }] }),
        json!(true),
    ] {
        compile(&Form::Schema(schema.clone())).unwrap_or_else(|e| panic!("{schema}: {e}"));
    }
}

/// Names that an object may have besides those of `properties` are other names, also where they are written with
/// escapes.
#[test]
fn a_name_cannot_be_written_in_two_ways() {
    let g = compile(&schema(json!({ "properties": { "a": { "type": "integer" } }, "required": ["a"] }))).unwrap();
    assert!(takes(&g, r#"{"a":1,"b":"x"}"#));
    assert!(!takes(&g, r#"{"a":1,"\u0061":"x"}"#));
    assert!(!takes(&g, r#"{"a":1,"a":"x"}"#));
}

#[test]
fn recursion_and_references_are_followed() {
    let tree = json!({
        "$ref": "#/$defs/node",
        "$defs": { "node": {
            "type": "object",
            "properties": { "v": { "type": "integer" }, "next": { "$ref": "#/$defs/node" } },
            "required": ["v"],
            "additionalProperties": false,
        } },
    });
    let g = compile(&schema(tree)).unwrap();
    assert!(takes(&g, r#"{"v":1,"next":{"v":2,"next":{"v":3}}}"#));
    assert!(!takes(&g, r#"{"v":1,"next":{"w":2}}"#));
}

#[test]
fn grammars_of_llama_cpp_are_read() {
    let arithmetic = "# as in llama.cpp\nroot  ::= (expr \"=\" ws term \"\\n\")+\nexpr  ::= term ([-+*/] term)*\nterm  ::= ident | num | \"(\" ws expr \")\" ws\nident ::= [a-z] [a-z0-9_]* ws\nnum   ::= [0-9]+ ws\nws    ::= [ \\t\\n]*\n";
    let g = compile(&grammar(arithmetic)).unwrap();
    for yes in ["a=1\n", "a +(b*2) = c1\n", "((x)) = 4\nb=2\n"] {
        assert!(takes(&g, yes), "{yes:?}");
    }
    for no in ["a=1", "a+=1\n", "=1\n", "A=1\n", ""] {
        assert!(!takes(&g, no), "{no:?}");
    }
    let regular = compile(&grammar("root ::= \"yes\" | \"no\" | [^a-z\\]]{2,3} | .? \"\\x41\\u00e9\" ")).unwrap();
    for yes in ["yes", "no", "12", "1\n3", "A\u{e9}", "xA\u{e9}"] {
        assert!(takes(&regular, yes), "{yes:?}");
    }
    for no in ["ye", "1", "1234", "a1", "1]", "yesno", ""] {
        assert!(!takes(&regular, no), "{no:?}");
    }
    // A text that ends in what it repeats: characters count, not the longest lexeme.
    let overlapping = compile(&grammar("root ::= [a-z]* \"b\" tail\ntail ::= \"c\" | \"cc\"")).unwrap();
    assert!(takes(&overlapping, "abbc") && takes(&overlapping, "bcc") && !takes(&overlapping, "abd"));
    let empty = compile(&grammar("root ::= \"a\" root \"b\" |\n")).unwrap();
    assert!(takes(&empty, "") && takes(&empty, "aabb") && !takes(&empty, "aab"));
    let utf8 = compile(&grammar(r"root ::= [\u0080-\u07ff] [^\u0800-\U0010ffff] [\U0001F600-\U0001F64F]")).unwrap();
    assert!(
        takes(&utf8, "\u{e9}a\u{1f601}") && !takes(&utf8, "aa\u{1f601}") && !takes(&utf8, "\u{e9}\u{20ac}\u{1f601}")
    );
    assert!(!takes(&utf8, "\u{e9}a\u{1f680}"));
    let nested = compile(&grammar(&format!("root ::= {}\"a\"{}", "(".repeat(90), ")*".repeat(90)))).unwrap();
    assert!(takes(&nested, "aaa") && takes(&nested, "") && !takes(&nested, "b"));
}

#[test]
fn what_is_not_understood_in_a_grammar_is_named() {
    for (text, words) in [
        ("root ::= x", "\"x\""),
        (
            "root ::= \"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"{2000}",
            "elements",
        ),
        ("a ::= \"x\"", "root"),
        ("root ::= \"x", "line 1: a text is not closed"),
        ("root ::= [a", "not closed"),
        ("root ::= (\"a\"", ") was expected"),
        ("root ::= \"a\"\nroot ::= \"b\"", "line 2"),
        ("root ::= \"\\q\"", "escape"),
        ("root ::= [z-a]", "range"),
        ("root ::= \"a\"{3,2}", "repetition"),
        ("root ::= \"a\"{99999}", "2000"),
        ("root ::= * \"a\"", "nothing to repeat"),
        ("root ::= <[5]>", "<[5]>"),
        ("root ::= !<a> \"b\"", "must not come"),
        ("root ::= a \"x\"\na ::= b\nb ::= \"\" a \"y\" | \"z\"", "left recursion"),
        ("root ::= \"a\" $", "'$'"),
        ("root ::= %", "'%'"),
        ("", "empty"),
        ("start: x", "x"),
        ("start: \"a\" |", "start"),
        ("begin: \"a\"", "start"),
        ("start[temperature=0.5]: /a+/", "temperature"),
        ("start: <|nothing|>", "no control tokens"),
        ("%import file.json\nstart: \"a\"", "file.json"),
    ] {
        match compile(&grammar(text)) {
            Err(e) => {
                let e = e.to_string();
                assert!(e.contains(words) && !e.contains('\n') && e.len() < 500, "{text}: {e}");
            }
            // An empty alternative is no mistake in Lark.
            Ok(g) => assert!(text.ends_with('|') && takes(&g, ""), "{text}"),
        }
    }
    for wrong in ["", "a\\", "(", "(?=a)"] {
        assert!(compile(&Form::Regex(wrong.into())).is_err(), "{wrong:?}");
    }
}

#[test]
fn expressions_match_the_whole_text() {
    let g = compile(&Form::Regex("(yes|no)/[0-9]{2}".into())).unwrap();
    assert!(takes(&g, "yes/12") && !takes(&g, "yes/123") && !takes(&g, "xyes/12"));
    let lark = compile(&grammar("start: \"a\" B+\nB: /[0-9]/")).unwrap();
    assert!(takes(&lark, "a12") && !takes(&lark, "a"));
}

#[test]
fn control_tokens_come_only_where_a_grammar_names_them() {
    let t = Tokenizer::from_metadata(&spm()).unwrap();
    let g = Grammars::new(&t).unwrap().compile(&grammar("start: /(?s:.)*/"), Reasoning::None).unwrap();
    let allowed = g.begin().allowed().unwrap();
    for id in 0..t.vocab_size() as u32 {
        let text = std::str::from_utf8(t.token_bytes(id));
        assert!(!t.is_control(id) || !allowed.has(id) || t.is_eog(id), "{id}");
        assert!(!t.is_shown(id) || text.is_err() || allowed.has(id), "{id} {text:?}");
    }
    assert!(!allowed.has(u32::MAX) && !allowed.has(t.vocab_size() as u32));
}

const THINK: Marks = Marks { open: "<think>", close: "</think>" };

#[test]
fn the_form_begins_behind_the_reasoning() {
    let t = tokenizer();
    let compile = |r| Grammars::new(&t).unwrap().compile(&schema(json!({ "type": "integer" })), r).unwrap();
    let open = compile(Reasoning::Open(THINK));
    for yes in ["hm</think>5", "</think>\n\n12", "a <b> </thin </think>\n7"] {
        assert!(takes(&open, yes), "{yes:?}");
    }
    for no in ["5", "hm", "hm</think>", "hm</think>x", "</think>5</think>"] {
        assert!(!takes(&open, no), "{no:?}");
    }
    let possible = compile(Reasoning::Possible(THINK));
    let in_gbnf = |r| Grammars::new(&t).unwrap().compile(&grammar("root ::= [1-9] [0-9]*"), r).unwrap();
    for possible in [possible, in_gbnf(Reasoning::Possible(THINK))] {
        assert!(takes(&possible, "<think>hm</think>\n\n5") && takes(&possible, "5") && !takes(&possible, "<think>5"));
        assert!(!takes(&possible, "x</think>5"));
    }
    let open = in_gbnf(Reasoning::Open(THINK));
    assert!(takes(&open, "a <<//think></thin<</think>\n7") && !takes(&open, "7") && !takes(&open, "</think>7</think>"));
}

#[test]
fn reasoning_is_known_by_the_prompt() {
    let template = "{{ '<think>' }} </think>";
    assert_eq!(Reasoning::of("plain", "a"), Reasoning::None);
    assert_eq!(Reasoning::of(template, "user\n<think>\n"), Reasoning::Open(THINK));
    assert_eq!(Reasoning::of(template, "<think>\n\n</think>\n\n"), Reasoning::None);
    assert_eq!(Reasoning::of(template, "<|im_start|>assistant\n"), Reasoning::Possible(THINK));
    let mistral = Marks { open: "[THINK]", close: "[/THINK]" };
    assert_eq!(Reasoning::of("[THINK]x[/THINK]", "[/INST]"), Reasoning::Possible(mistral));
}

/// A bias cannot bring a token back that the grammar forbids; one that bans all that it allows ends the text with a
/// sentence.
#[test]
fn biases_do_not_break_a_form() {
    let t = tokenizer();
    let g = compile(&Form::Regex("a[bc]".into())).unwrap();
    let params = |logit_bias| SamplerParams { temp: 0.0, logit_bias, grammar: Some(g.clone()), ..Default::default() };
    let logits = vec![0.0; t.vocab_size()];
    let mut s = Sampler::for_model(params(vec![(u32::from(b'z'), 1e6)]), logits.len(), &t);
    s.begin(&[]);
    assert_eq!(s.sample(&logits).unwrap(), u32::from(b'a'));
    let mut s = Sampler::for_model(params(vec![(u32::from(b'a'), f32::NEG_INFINITY)]), logits.len(), &t);
    s.begin(&[]);
    assert!(matches!(s.sample(&logits), Err(ConstraintError::NothingLeft(_))));
    let mut s = Sampler::for_model(SamplerParams { ignore_eos: true, ..params(vec![]) }, logits.len(), &t);
    s.begin(&[]);
    for _ in 0..2 {
        let id = s.sample(&logits).unwrap();
        s.accept(id);
    }
    let e = s.sample(&logits).unwrap_err().to_string();
    assert!(e.contains("ignore_eos"), "{e}");
    // A new text begins anew.
    s.begin(&[]);
    assert_eq!(s.sample(&logits).unwrap(), u32::from(b'a'));
}

/// A number in letters.
fn letters(n: usize) -> String {
    n.to_string().bytes().map(|b| char::from(b - b'0' + b'a')).collect()
}

/// What would take all memory, time or stack is refused, or held to as far as it goes.
#[test]
fn hostile_forms_harm_nothing() {
    let chain = |n: usize| {
        let defs: serde_json::Map<String, Json> =
            (0..n).map(|i| (format!("d{i}"), json!({ "$ref": format!("#/$defs/d{}", i + 1) }))).collect();
        let mut all = json!({ "$ref": "#/$defs/d0", "$defs": defs });
        all["$defs"][format!("d{n}")] = json!({ "type": "null" });
        all
    };
    let patterns: serde_json::Map<String, Json> = (0..300).map(|i| (format!("^{i}"), json!({}))).collect();
    let rules: String = (0..1500).map(|i| format!("r{}: r{}\n", letters(i), letters(i + 1))).collect();
    let deep = "(".repeat(20_000);
    let forms = [
        schema(chain(2000)),
        schema(chain(20_000)),
        schema(json!({ "patternProperties": patterns })),
        schema(json!({ "$ref": "#" })),
        schema(json!({ "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } }, "$ref": "#/$defs/a" })),
        schema(json!({ "allOf": [{ "$ref": "#" }, { "$ref": "#" }] })),
        schema(json!({ "type": "string", "minLength": 4_000_000_000_u64 })),
        schema(json!({ "type": "string", "maxLength": 1e30 })),
        schema(json!({ "type": "array", "minItems": 1_000_000_000_u64, "items": { "type": "null" } })),
        schema(json!({ "type": "array", "maxItems": 1_000_000_000_u64 })),
        schema(json!({ "type": "string", "pattern": "((((a{99}){99}){99}){99}){99}" })),
        schema(json!({ "type": "string", "pattern": "^(a|a)*(a|b)*[ab]{500}c$" })),
        schema(json!({ "type": "string", "pattern": "\u{e9}".repeat(300) + "(" })),
        schema(json!({ "type": "\u{e9}".repeat(100) })),
        schema(json!({ "type": "string", "pattern": ("(a".repeat(3000) + &")".repeat(3000)) })),
        schema(json!({ "type": "number", "multipleOf": 1e-300 })),
        schema(json!({ "type": "integer", "minimum": -1e300, "maximum": 1e300 })),
        schema(json!({ "properties": { "a": 5 } })),
        grammar(&format!("start: ra\n{rules}")),
        grammar(&format!("start: {deep}")),
        grammar(&format!("root ::= {deep}")),
        grammar("start: start start | \"a\""),
        grammar("root ::= root root | root | \"a\" |"),
        grammar("root ::= (((\"a\"{2000}){2000}){2000})"),
        grammar("root ::= (a | b)*\na ::= [a-c]{0,500}\nb ::= [b-d]{0,500}"),
        grammar("root ::= \"a\" root \"b\" | \"a\" root \"c\" | \"a\" root | \"a\""),
        grammar(
            &[
                "root ::= a\n",
                "a ::= b b b b\n",
                "b ::= c c c c\n",
                "c ::= d d d d\n",
                "d ::= e e e e\n",
                "e ::= \"x\" | \"xx\"\n",
            ]
            .concat(),
        ),
        Form::Regex("(".repeat(30_000)),
        Form::Regex("(a*)*".repeat(500)),
        Form::Regex("a".repeat(70_000)),
    ];
    for form in forms {
        let shown: String = format!("{form:?}").chars().take(80).collect();
        let Ok(g) = compile(&form) else { continue };
        let mut c = g.begin();
        for _ in 0..20 {
            match c.allowed() {
                Ok(allowed) => {
                    let Some(id) = (0..256).rev().find(|&id| allowed.has(id)) else { break };
                    c.accept(id);
                }
                Err(e) => {
                    assert!(matches!(e, ConstraintError::Step(_)), "{shown}: {e}");
                    break;
                }
            }
        }
    }
}

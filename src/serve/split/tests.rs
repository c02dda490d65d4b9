//! Answers in pieces of every size have the same parts.

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
    let tool = |name: &str| Tool { name: name.into(), texts: vec![("zip".into(), Text { or_null: false })] };
    let channels = family == Family::Harmony;
    Looks { channels, tools: Some((family, vec![tool("f"), tool("g")])), ..Looks::default() }
}

#[test]
fn reasoning_is_told_apart() {
    let looks = Looks { thinks: Some(Marks::ALL[0]), ..Looks::default() };
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
    for none in [
        "<tool_call>{\"name\": \"h\"}</tool_call>",
        "<tool_call>{nonsense",
        "<tool_call>{\"name\": \"f\", \"arguments\": [1]}</tool_call>",
        "<tool_call>{\"name\": \"f\", \"arguments\": \"x\"}</tool_call>",
        "a <tool_ca",
        "plain \n",
    ] {
        assert_eq!(parts(&looks, none), [words(none)]);
    }
    let thinking = Looks { thinks: Some(Marks::ALL[0]), ..looks };
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
        for none in
            ["[TOOL_CALLS]h[ARGS]{}", "[TOOL_CALLS]f[ARGS]{\"x\"", "[TOOL_CALLS][{\"name\"", "a [TOOL_CALL", "[1, 2]"]
        {
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
    let looks = Looks { thinks: Some(Marks::ALL[0]), ..tools(Family::Glm) };
    let text = "<think>hm</think>\nI look.\n<tool_call>f\n<arg_key>zip</arg_key>\n<arg_value>01234</arg_value>\n<arg_key>n</arg_key>\n<arg_value>[1, {\"a\": 2}]</arg_value>\n<arg_key>s</arg_key>\n<arg_value>a <b> text\n</arg_value>\n</tool_call>\n<tool_call>g</tool_call>";
    let thought = Part::Thought("hm".into());
    let arguments = r#"{"zip":"01234","n":[1,{"a":2}],"s":"a <b> text\n"}"#;
    assert_eq!(parts(&looks, text), [thought, words("I look."), call("f", arguments), call("g", "{}")]);
    for none in ["<tool_call>h</tool_call>", "<tool_call>f<arg_key>x</arg_key></tool_call>", "<tool_call>f\n<arg_key>x"]
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

/// Mistral, Seed OSS and Command R7B have marks of their own.
#[test]
fn reasoning_is_told_apart_by_the_marks_of_each_family() {
    for marks in Marks::ALL {
        let looks = Looks { thinks: Some(marks), ..Looks::default() };
        let text = format!("{}hm [/THIN{}\nyes", marks.open, marks.close);
        assert_eq!(parts(&looks, &text), [Part::Thought("hm [/THIN".into()), words("yes")]);
        // As control tokens.
        let mut s = Splitter::new(&looks);
        let mut found = Vec::new();
        for (text, control) in [(marks.open, true), ("hm", false), (marks.close, true), ("yes", false), ("</s>", true)]
        {
            s.push(&[Bit { text: text.into(), control }], &mut found);
        }
        s.finish(&mut found);
        assert_eq!(found, [Part::Thought("hm".into()), words("yes")]);
    }
    let looks = Looks { thinks: Some(Marks::ALL[1]), ..tools(Family::MistralNamed) };
    let text = "[THINK]I call.[/THINK][TOOL_CALLS]f[ARGS]{\"x\": 1}";
    assert_eq!(parts(&looks, text), [Part::Thought("I call.".into()), call("f", r#"{"x":1}"#)]);
    assert_eq!(parts(&looks, "[THIN"), [words("[THIN")]);
}

#[test]
fn calls_in_tags_are_found() {
    let qwen = "I look.\n\n<tool_call>\n<function=f>\n<parameter=zip>\n01234\n</parameter>\n<parameter=s>\na <b>\n\n</parameter>\n<parameter=n>\n[1, {\"a\": True}]\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>";
    let seed = "I look.\n<seed:tool_call>\n<function=f>\n<parameter=zip>01234</parameter>\n<parameter=s>a <b>\n</parameter>\n<parameter=n>[1, {'a': True}]</parameter>\n</function>\n</seed:tool_call>\n<seed:tool_call>\n<function=g>\n</function>\n</seed:tool_call>";
    let minimax = "I look.\n<minimax:tool_call>\n<invoke name=\"f\">\n<parameter name=\"zip\">01234</parameter>\n<parameter name=\"s\">a <b>\n</parameter>\n<parameter name=\"n\">[1, {\"a\": true}]</parameter>\n</invoke>\n<invoke name=\"g\">\n</invoke>\n</minimax:tool_call>";
    for (tags, text) in [(&family::QWEN, qwen), (&family::SEED, seed), (&family::MINIMAX, minimax)] {
        let looks = tools(Family::Tagged(tags));
        let arguments = r#"{"zip":"01234","s":"a <b>\n","n":[1,{"a":true}]}"#;
        assert_eq!(parts(&looks, text), [words("I look."), call("f", arguments), call("g", "{}")]);
        let one = Looks { one_call: true, ..looks.clone() };
        assert_eq!(parts(&one, text), [words("I look."), call("f", arguments)]);
        let (open, close) = tags.call;
        for inner in [
            "<function=h></function>",
            "<invoke name=\"h\"></invoke>",
            "f",
            "",
            "<function=f>",
            "<function=f><parameter=x>1</function>",
        ] {
            let none = format!("{open}{inner}{close}");
            assert_eq!(parts(&looks, &none), [words(&none)]);
            let cut = format!("{open}{inner}");
            assert_eq!(parts(&looks, &cut), [words(&cut)]);
        }
        // One that was cut behind its last argument says all.
        let cut = text.rsplit_once(close).unwrap().0;
        assert_eq!(parts(&looks, cut).len(), 3, "{cut}");
    }
}

#[test]
fn calls_of_lfm_granite_and_command_are_found() {
    let lfm = "<|tool_call_start|>[f(x='y', zip=\"1\"), g()]<|tool_call_end|>I look.";
    let granite = "<|tool_call|>[{\"name\": \"f\", \"arguments\": {\"x\": \"y\", \"zip\": \"1\"}}, {\"name\": \"g\", \"arguments\": {}}]";
    let cohere = "<|START_THINKING|>hm<|END_THINKING|><|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"f\", \"parameters\": {\"x\": \"y\", \"zip\": \"1\"}},\n    {\"tool_call_id\": \"1\", \"tool_name\": \"g\", \"parameters\": {}}\n]<|END_ACTION|>";
    let calls = [call("f", r#"{"x":"y","zip":"1"}"#), call("g", "{}")];
    let [f, g] = calls.clone();
    assert_eq!(parts(&tools(Family::Python), lfm), [f.clone(), g.clone(), words("I look.")]);
    assert_eq!(parts(&tools(Family::Granite), granite), calls);
    let hunyuan = granite.replace("<|tool_call|>", "<tool_calls>") + "</tool_calls>";
    assert_eq!(parts(&tools(Family::Hunyuan), &hunyuan), calls);
    let olmo = "<function_calls>f(x='y', zip=\"1\")\ng()</function_calls>";
    assert_eq!(parts(&tools(Family::PythonLines), olmo), calls);
    let thinking = Looks { thinks: Some(Marks::ALL[3]), ..tools(Family::Cohere) };
    assert_eq!(parts(&thinking, cohere), [Part::Thought("hm".into()), f, g]);
    for (family, none) in [
        (Family::Python, "<|tool_call_start|>[h()]<|tool_call_end|>"),
        (Family::Python, "<|tool_call_start|>[f(x="),
        (Family::Granite, "<|tool_call|>[{\"name\": \"h\"}]"),
        (Family::Granite, "<|tool_call|>[]"),
        (Family::Cohere, "<|START_ACTION|>[{\"name\": \"f\"}]<|END_ACTION|>"),
        (Family::Gemma, "<|tool_call>call:f{x:a}<tool_call|>"),
    ] {
        assert_eq!(parts(&tools(family), none), [words(none)]);
    }
}

/// Calls as chat templates themselves write them, in the words of Jinja: `tests/fixtures/templates.json`.
#[test]
fn calls_that_templates_write_are_read() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/");
    let read = |name: &str| std::fs::read_to_string(format!("{folder}{name}")).unwrap();
    let fixture: serde_json::Value = serde_json::from_str(&read("templates.json")).unwrap();
    let tool = Tool::of(&fixture["cases"]["tools"]["tools"][0]).unwrap();
    let mut read_of = Vec::new();
    for (name, cases) in fixture["expected"].as_object().unwrap() {
        let source = read(&format!("templates/{name}"));
        let Some(family) = Family::of(&source) else { continue };
        let Some(whole) = cases["calls"].as_str().filter(|_| source.contains("tool_calls")) else { continue };
        // Before the question come the tools, perhaps with an example of a call.
        let mut answer = whole.rsplit_once("Weather?").unwrap().1;
        if family == Family::Harmony {
            answer = answer.split_once("<|start|>assistant").unwrap().1;
        }
        if family == Family::Llama3 {
            answer = answer.split_once("assistant<|end_header_id|>").unwrap().1.trim_start();
        }
        let called = answer.find("weather").unwrap();
        let end = ["<|im_end|>", "<|eot_id|>", "</s>", "[TOOL_RESULTS]", "<|start_of_role|>"].iter();
        let end = end.filter_map(|mark| Some(called + answer[called..].find(mark)?)).min().unwrap_or(answer.len());
        let looks = Looks { thinks: Marks::of(&source), channels: family == Family::Harmony, ..Looks::default() };
        let found = parts(&Looks { tools: Some((family, vec![tool.clone()])), ..looks }, &answer[..end]);
        let calls: Vec<&Call> =
            found.iter().filter_map(|p| if let Part::Call(call) = p { Some(call) } else { None }).collect();
        let [call] = calls[..] else { panic!("{name}: {found:?} in {answer:?}") };
        let arguments: serde_json::Value = serde_json::from_str(&call.arguments).unwrap();
        let expected = serde_json::json!({ "city": "Zürich", "days": 2, "f": 0.5, "b": true, "z": null });
        assert_eq!((&call.name[..], &arguments), ("weather", &expected), "{name}");
        read_of.push(name);
    }
    assert!(read_of.len() >= 12, "{read_of:?}");
}

/// Answers of every family with pieces cut out, doubled and strewn in: nothing panics or hangs, and what is no call stays
/// in the text.
#[test]
fn damaged_answers_are_read_too() {
    use rand::{RngExt, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let families = [
        Family::Hermes,
        Family::Llama3,
        Family::Mistral,
        Family::MistralNamed,
        Family::Harmony,
        Family::Glm,
        Family::Tagged(&family::QWEN),
        Family::Tagged(&family::SEED),
        Family::Tagged(&family::MINIMAX),
        Family::Python,
        Family::PythonLines,
        Family::Granite,
        Family::Hunyuan,
        Family::Cohere,
        Family::Gemma,
    ];
    let marks = family::MARKS.iter().chain(&channels::MARKS).copied();
    let marks = marks.chain(Marks::ALL.iter().flat_map(|m| [m.open, m.close]));
    let pieces: Vec<&str> = marks
        .chain([
            "f",
            "g(x='",
            "')]",
            "{\"name\": \"f\", \"arguments\": {",
            "}}",
            "[",
            "]",
            "\\u12",
            "é",
            "\n",
            " to=functions.f ",
        ])
        .chain([
            "<function=f>",
            "</function>",
            "<parameter=x>",
            "</parameter>",
            "<invoke name=\"f\">",
            "</invoke>",
            "[ARGS]{",
        ])
        .chain(["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "1", ": ", ", ", "\"", "'"])
        .collect();
    for round in 0..20_000 {
        let text: String = (0..rng.random_range(0..14)).map(|_| pieces[rng.random_range(0..pieces.len())]).collect();
        let family = families[round % families.len()];
        let thinks = (round % 3 == 0).then(|| Marks::ALL[rng.random_range(0..4usize)]);
        let looks = Looks { thinks, within_thought: thinks.is_some() && round % 2 == 0, ..tools(family) };
        let all = |chunk: usize| {
            let mut s = Splitter::new(&looks);
            let mut found = Vec::new();
            for piece in text.chars().collect::<Vec<_>>().chunks(chunk) {
                s.push(&[Bit { text: piece.iter().collect(), control: false }], &mut found);
            }
            s.finish(&mut found);
            joined(found)
        };
        let whole = all(usize::MAX);
        assert_eq!(all(1), whole, "{family:?} {text:?}");
        for part in &whole {
            if let Part::Call(call) = part {
                let arguments: serde_json::Value = serde_json::from_str(&call.arguments).unwrap();
                assert!(["f", "g"].contains(&&call.name[..]) && arguments.is_object(), "{text:?}: {call:?}");
            }
        }
    }
}

//! Answers that are held to a form: schemas, grammars, calls that must come. The model's weights are noise, so that
//! nothing but the form makes an answer what it is.

use serde_json::{Value as Json, json};

use super::common::{File, V};
use super::http::Server;
use super::same_text::model;

fn serve(file: &File) -> (tempfile::TempDir, Server) {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&file.write(dir.path(), "tiny.gguf"), &["--temp", "1", "--top-k", "0"]);
    (dir, server)
}

fn chat(more: Json) -> Json {
    let mut request = json!({ "messages": [{ "role": "user", "content": "hi" }], "seed": 1, "max_tokens": 120 });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request
}

fn person() -> Json {
    json!({
        "type": "object",
        "properties": { "name": { "type": "string", "maxLength": 8 }, "age": { "type": "integer", "minimum": 0, "maximum": 150 } },
        "required": ["name", "age"],
        "additionalProperties": false,
    })
}

fn is_person(text: &str) {
    let value: Json = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
    assert!(value["name"].as_str().unwrap().chars().count() <= 8, "{text}");
    assert!((0..=150).contains(&value["age"].as_i64().unwrap()), "{text}");
    assert_eq!(value.as_object().unwrap().len(), 2, "{text}");
}

#[test]
fn every_dialect_has_its_name_for_a_schema() {
    let (_dir, server) = serve(&model());
    let format =
        json!({ "type": "json_schema", "json_schema": { "name": "person", "strict": true, "schema": person() } });
    for seed in 0..8 {
        let answer = server
            .ok("/v1/chat/completions", &chat(json!({ "response_format": format, "seed": seed, "temperature": 1.5 })));
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        is_person(answer["choices"][0]["message"]["content"].as_str().unwrap());
    }
    // llama-server's and vLLM's.
    for more in [
        json!({ "response_format": { "type": "json_object", "schema": person() } }),
        json!({ "json_schema": person() }),
        json!({ "guided_json": person().to_string() }),
        json!({ "structured_outputs": { "json": person() } }),
    ] {
        is_person(server.ok("/v1/chat/completions", &chat(more))["choices"][0]["message"]["content"].as_str().unwrap());
    }
    let completion = json!({ "prompt": "x", "json_schema": person(), "max_tokens": 120, "seed": 3 });
    is_person(server.ok("/v1/completions", &completion)["choices"][0]["text"].as_str().unwrap());
    let flat = json!({ "type": "json_schema", "name": "p", "schema": person(), "strict": true });
    let response = json!({ "input": "hi", "text": { "format": flat }, "max_output_tokens": 120, "seed": 4 });
    is_person(server.ok("/v1/responses", &response)["output"][0]["content"][0]["text"].as_str().unwrap());
    let message = json!({ "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 120,
        "output_format": { "type": "json_schema", "schema": person() } });
    is_person(server.ok("/v1/messages", &message)["content"][0]["text"].as_str().unwrap());
    let ollama = json!({ "messages": [{ "role": "user", "content": "hi" }], "format": person(), "stream": false,
        "options": { "num_predict": 120, "seed": 5 } });
    is_person(server.ok("/api/chat", &ollama)["message"]["content"].as_str().unwrap());
    let generate =
        json!({ "prompt": "hi", "format": person(), "stream": false, "raw": true, "options": { "num_predict": 120 } });
    is_person(server.ok("/api/generate", &generate)["response"].as_str().unwrap());
}

#[test]
fn json_without_a_schema_is_an_object() {
    let (_dir, server) = serve(&model());
    let mut whole = 0;
    for seed in 0..10 {
        let more = json!({ "response_format": { "type": "json_object" }, "seed": seed, "max_tokens": 200 });
        let answer = server.ok("/v1/chat/completions", &chat(more));
        let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
        assert!(text.starts_with('{'), "{text:?}");
        if answer["choices"][0]["finish_reason"] == "stop" {
            whole += 1;
            let value = serde_json::from_str::<Json>(text).map_err(|e| e.to_string());
            assert!(
                value.as_ref().is_ok_and(Json::is_object) || value.is_err_and(|e| e.contains("out of range")),
                "{text:?}"
            );
        }
    }
    assert!(whole > 0);
}

#[test]
fn grammars_hold_too() {
    let (_dir, server) = serve(&model());
    let answer = |more: Json| {
        server.ok("/v1/chat/completions", &chat(more))["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    for seed in 0..5 {
        let gbnf = answer(json!({ "grammar": "root ::= \"yes\" | \"no\" | [0-9]{2,3}", "seed": seed }));
        assert!(
            gbnf == "yes" || gbnf == "no" || gbnf.bytes().all(|b| b.is_ascii_digit()) && (2..=3).contains(&gbnf.len()),
            "{gbnf:?}"
        );
        let lark = answer(json!({ "grammar": "start: \"a\" B{2} \"c\"\nB: /[xyz]/", "seed": seed }));
        assert!(lark.len() == 4 && lark.starts_with('a') && lark.ends_with('c'), "{lark:?}");
        assert!(
            ["red", "green \"x\""]
                .contains(&&answer(json!({ "guided_choice": ["red", "green \"x\""], "seed": seed }))[..])
        );
        let regex = answer(json!({ "guided_regex": "[ab]/[0-9]", "seed": seed }));
        assert!(regex.len() == 3 && regex.as_bytes()[1] == b'/', "{regex:?}");
    }
}

/// An answer that is cut is the beginning of one that conforms, and says so.
#[test]
fn what_is_cut_is_a_beginning_and_says_so() {
    let (_dir, server) = serve(&model());
    let format = json!({ "type": "json_schema", "json_schema": { "schema": person() } });
    let whole = server.ok("/v1/chat/completions", &chat(json!({ "response_format": format })));
    let whole = whole["choices"][0]["message"]["content"].as_str().unwrap();
    for most in [1, 5, 9] {
        let answer = server.ok("/v1/chat/completions", &chat(json!({ "response_format": format, "max_tokens": most })));
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
        let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
        assert!(whole.starts_with(text), "{text:?} {whole:?}");
    }
}

/// A form goes with all other parameters, and changes nothing of a text that has none.
#[test]
fn a_form_goes_with_other_parameters() {
    let (_dir, server) = serve(&model());
    let free = server.ok("/v1/chat/completions", &chat(json!({ "max_tokens": 20 })));
    let all = json!({ "json_schema": person(), "n": 3, "logprobs": true, "top_logprobs": 2, "presence_penalty": 0.5,
        "repeat_penalty": 1.2, "logit_bias": { "33": 100 }, "stop": ["~~~"], "min_p": 0.01, "dry_multiplier": 0.8, "xtc_probability": 0.3 });
    let answer = server.ok("/v1/chat/completions", &chat(all.clone()));
    let texts: Vec<&str> =
        answer["choices"].as_array().unwrap().iter().map(|c| c["message"]["content"].as_str().unwrap()).collect();
    assert_eq!(texts.len(), 3);
    for (i, text) in texts.iter().enumerate() {
        if answer["choices"][i]["finish_reason"] == "stop" {
            is_person(text);
        }
    }
    assert!(answer["choices"][0]["logprobs"]["content"][0]["logprob"].is_number());
    // Choice number i is that of the seed and i more.
    let mut second = all;
    (second["n"], second["seed"]) = (json!(1), json!(2));
    assert_eq!(server.ok("/v1/chat/completions", &chat(second))["choices"][0]["message"]["content"], texts[1]);
    // A stop text ends it as any other.
    let stopped = server.ok("/v1/chat/completions", &chat(json!({ "json_schema": person(), "stop": ["\"age\""] })));
    assert!(!stopped["choices"][0]["message"]["content"].as_str().unwrap().contains("\"age\""));
    let again = server.ok("/v1/chat/completions", &chat(json!({ "max_tokens": 20 })));
    assert_eq!(again["choices"][0]["message"], free["choices"][0]["message"]);
}

#[test]
fn banning_all_that_may_come_is_a_sentence() {
    let (_dir, server) = serve(&model());
    let request = chat(json!({ "guided_regex": "a+b", "logit_bias": { "97": false, "98": false } }));
    let reply = server.post("/v1/chat/completions", &request);
    assert_eq!(reply.status, 400, "{}", reply.body);
    assert!(reply.json()["error"]["message"].as_str().unwrap().contains("no token is left"), "{}", reply.body);
    server.ok("/v1/chat/completions", &chat(json!({ "max_tokens": 2 })));
}

fn with_template(template: &str) -> File {
    let mut file = model();
    file.set("tokenizer.chat_template", V::Str(template.into()));
    file
}

const MESSAGES: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";

fn weather(strict: bool) -> Json {
    json!([
        { "type": "function", "function": { "name": "weather", "strict": strict, "parameters": {
            "type": "object", "properties": { "city": { "type": "string", "maxLength": 5 }, "days": { "enum": [1, 2, 3] } },
            "required": ["city", "days"], "additionalProperties": false } } },
        { "type": "function", "function": { "name": "stop", "parameters": { "type": "object", "properties": {}, "additionalProperties": false } } },
    ])
}

fn is_call(call: &Json, name: Option<&str>) {
    let function = &call["function"];
    let arguments: Json = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
    match function["name"].as_str().unwrap() {
        "weather" => {
            assert!(arguments["city"].is_string() && (1..=3).contains(&arguments["days"].as_i64().unwrap()), "{call}")
        }
        "stop" => assert_eq!(arguments, json!({})),
        other => panic!("{other}"),
    }
    assert!(name.is_none_or(|n| function["name"] == n), "{call}");
}

/// Tools of which noise writes calls that end: no free texts, which would end with a mark only.
fn tools(family: &str) -> Json {
    let mut tools = weather(false);
    if ["glm", "qwen in tags", "seed", "minimax"].contains(&family) {
        tools[0]["function"]["parameters"]["properties"]["city"] =
            json!({ "type": "string", "enum": ["Rome", "Oslo"] });
    }
    tools
}

/// Lets gpt-oss begin with `commentary`, and not with an `analysis`, which is a free text.
fn bias(family: &str) -> Json {
    if family == "gpt-oss" { json!({ b'c'.to_string(): 30 }) } else { json!({}) }
}

#[test]
fn calls_can_be_forced_in_each_familys_form() {
    for (family, template) in [
        ("hermes", format!("{{% if tools %}}<tool_call>{{% endif %}}{MESSAGES}")),
        ("llama", format!("{{% if tools %}}<|python_tag|>{{% endif %}}{MESSAGES}")),
        ("mistral", format!("{{% if tools %}}[TOOL_CALLS]{{% endif %}}{MESSAGES}")),
        ("newer mistral", format!("{{% if tools %}}[TOOL_CALLS]f[ARGS]{{% endif %}}{MESSAGES}")),
        ("glm", format!("{{% if tools %}}<tool_call>f<arg_key>{{% endif %}}{MESSAGES}")),
        ("qwen in tags", format!("{{% if tools %}}<tool_call><function=f><parameter=x>{{% endif %}}{MESSAGES}")),
        ("seed", format!("{{% if tools %}}<seed:tool_call>{{% endif %}}{MESSAGES}")),
        ("minimax", format!("{{% if tools %}}<minimax:tool_call>{{% endif %}}{MESSAGES}")),
        ("lfm", format!("{{% if tools %}}<|tool_list_start|>{{% endif %}}{MESSAGES}")),
        ("olmo", format!("{{% if tools %}}<function_calls>{{% endif %}}{MESSAGES}")),
        ("hunyuan", format!("{{% if tools %}}<tool_calls>{{% endif %}}{MESSAGES}")),
        ("granite", format!("{{% if tools %}}<|tool_call|>{{% endif %}}{MESSAGES}")),
        ("command", format!("{{% if tools %}}<|START_ACTION|>{{% endif %}}{MESSAGES}")),
        (
            "gpt-oss",
            format!("{{% if tools %}}t{{% endif %}}{MESSAGES}<|start|>assistant{{# <|channel|><|message|> #}}"),
        ),
    ] {
        let (_dir, server) = serve(&with_template(&template));
        let named = json!({ "type": "function", "function": { "name": "weather" } });
        for (choice, name) in [(json!("required"), None), (named, Some("weather"))] {
            for seed in 0..3 {
                let more = json!({ "tools": tools(family), "tool_choice": choice, "seed": seed, "parallel_tool_calls": false, "max_tokens": 220,
                    "logit_bias": bias(family) });
                let answer = server.ok("/v1/chat/completions", &chat(more.clone()));
                let message = &answer["choices"][0]["message"];
                assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls", "{family}: {answer}");
                let calls = message["tool_calls"].as_array().unwrap();
                assert_eq!(calls.len(), 1);
                is_call(&calls[0], name);
            }
        }
        // A streamed call is the same one, and comes with the reason of its end.
        let more = json!({ "tools": tools(family), "tool_choice": "required", "seed": 1, "parallel_tool_calls": false,
            "max_tokens": 220, "logit_bias": bias(family) });
        let whole = server.ok("/v1/chat/completions", &chat(more.clone()));
        let mut streamed = chat(more);
        streamed["stream"] = true.into();
        let (events, _) = server.post("/v1/chat/completions", &streamed).events();
        let delta = events.iter().find_map(|e| e["choices"][0]["delta"]["tool_calls"].as_array()).unwrap();
        let function = &whole["choices"][0]["message"]["tool_calls"][0]["function"];
        assert_eq!((&delta[0]["function"], &delta[0]["index"]), (function, &json!(0)), "{family}");
        assert!(events.iter().any(|e| e["choices"][0]["finish_reason"] == "tool_calls"));
        assert!(events.iter().all(|e| e["choices"][0]["delta"]["content"].as_str().unwrap_or("").is_empty()));
        if family == "gpt-oss" {
            continue;
        }
        let parameters = tools(family)[0]["function"]["parameters"].clone();
        let flat = json!([{ "type": "function", "name": "weather", "parameters": parameters }]);
        let response = json!({ "input": "hi", "tools": flat, "tool_choice": { "type": "function", "name": "weather" }, "max_output_tokens": 200 });
        assert_eq!(server.ok("/v1/responses", &response)["output"][0]["name"], "weather");
        let tools = json!([{ "name": "weather", "input_schema": parameters }]);
        let message = json!({ "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 200, "tools": tools, "seed": 1,
            "tool_choice": { "type": "any", "disable_parallel_tool_use": true } });
        let answer = server.ok("/v1/messages", &message);
        assert_eq!(
            (&answer["content"][0]["type"], &answer["stop_reason"]),
            (&json!("tool_use"), &json!("tool_use")),
            "{answer}"
        );
    }
}

#[test]
fn a_choice_must_name_a_tool_and_strict_schemas_be_followed() {
    let (_dir, server) = serve(&with_template(&format!("{{% if tools %}}<tool_call>{{% endif %}}{MESSAGES}")));
    let other = json!({ "type": "function", "function": { "name": "other" } });
    let mut strict = weather(true);
    strict[1]["function"]["strict"] = true.into();
    strict[1]["function"]["parameters"] = json!({ "type": "object", "not": {} });
    for (more, param) in [
        (json!({ "tools": weather(false), "tool_choice": other }), "tool_choice"),
        (json!({ "tools": weather(false), "tool_choice": "sometimes" }), "tool_choice"),
        (json!({ "tool_choice": "required" }), "tool_choice"),
        (json!({ "tools": strict }), "tools[1].function.parameters"),
    ] {
        let reply = server.post("/v1/chat/completions", &chat(more.clone()));
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(param)), "{more}: {}", reply.body);
    }
    // Without strict, what is not followed is any object.
    strict[1]["function"]["strict"] = false.into();
    let name = json!({ "type": "function", "function": { "name": "stop" } });
    let more = json!({ "tools": strict, "tool_choice": name, "max_tokens": 60 });
    server.ok("/v1/chat/completions", &chat(more));
    // Strict tools leave words alone; a call among them has its schema.
    for seed in 0..5 {
        let answer =
            server.ok("/v1/chat/completions", &chat(json!({ "tools": weather(true), "seed": seed, "max_tokens": 30 })));
        for call in answer["choices"][0]["message"]["tool_calls"].as_array().into_iter().flatten() {
            is_call(call, None);
        }
    }
    // Either a call or an answer of the form.
    let more = json!({ "tools": weather(false), "json_schema": person(), "max_tokens": 200 });
    let answer = server.ok("/v1/chat/completions", &chat(more));
    let message = &answer["choices"][0]["message"];
    match message["tool_calls"].as_array() {
        Some(calls) => calls.iter().for_each(|c| is_call(c, None)),
        None => is_person(message["content"].as_str().unwrap()),
    }
}

/// A model that reasons does so freely, and its answer has the form.
#[test]
fn the_form_begins_behind_reasoning() {
    let open = format!("{MESSAGES}<assistant><think>\n{{# </think> #}}");
    let (_dir, server) = serve(&with_template(&open));
    let mut ended = 0;
    for seed in 0..3 {
        // The mark of its end is made likely, since noise does not know it.
        let bias: serde_json::Map<String, Json> = "</think>".bytes().map(|b| (b.to_string(), json!(3))).collect();
        let more =
            json!({ "json_schema": { "enum": ["x", "y"] }, "seed": seed, "max_tokens": 200, "logit_bias": bias });
        let answer = server.ok("/v1/chat/completions", &chat(more));
        let message = &answer["choices"][0]["message"];
        assert!(message["reasoning_content"].as_str().is_some_and(|t| !t.is_empty()), "{answer}");
        if answer["choices"][0]["finish_reason"] == "stop" {
            ended += 1;
            assert!(["\"x\"", "\"y\""].contains(&message["content"].as_str().unwrap()), "{answer}");
        } else {
            assert_eq!(message["content"], "", "{answer}");
        }
    }
    // Most are cut before their reasoning ends, which is as it should be.
    assert!(ended <= 3);
}

/// Guards against forms whose memory is lost, after so many of which no more were taken until nt was started again:
/// another process compiles them first.
#[test]
fn forms_are_tried_in_another_process() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_with(&model().write(dir.path(), "tiny.gguf"), &[], &[("NT_VET_FORMS", "1")]);
    let fine = [person(), json!({ "grammar": "root ::= \"yes\" | \"no\"" })];
    let ask = |form: &Json| match form.get("grammar") {
        Some(_) => form.clone(),
        None => json!({ "json_schema": form }),
    };
    let texts = || fine.iter().map(|f| server.ok("/v1/chat/completions", &chat(ask(f)))["choices"].clone());
    let before: Vec<Json> = texts().collect();
    let rss = server.rss();
    let reply = server.post("/v1/chat/completions", &chat(json!({ "grammar": "root ::= root \"a\"" })));
    assert!(reply.status == 400 && reply.body.contains("grammar"), "{}", reply.body);
    assert_eq!(texts().collect::<Vec<_>>(), before);
    assert!(server.rss() < rss + (64 << 20), "memory stays behind");
}

/// What would take all time or memory is refused with a sentence, and others are served meanwhile and after.
#[test]
fn hostile_forms_stop_nobody() {
    let (_dir, server) = serve(&model());
    let defs: serde_json::Map<String, Json> =
        (0..20_000).map(|i| (format!("d{i}"), json!({ "$ref": format!("#/$defs/d{}", i + 1) }))).collect();
    for form in [
        json!({ "json_schema": { "$ref": "#/$defs/d0", "$defs": defs } }),
        json!({ "json_schema": { "enum": (0..60_000).collect::<Vec<_>>() } }),
        json!({ "json_schema": { "$ref": "file:///etc/passwd" } }),
        json!({ "json_schema": { "type": "string", "pattern": format!("{}(", "\u{e9}".repeat(200)) } }),
        json!({ "grammar": format!("start: {}", "(".repeat(60_000)) }),
        json!({ "grammar": format!("root ::= {}", "(".repeat(60_000)) }),
        json!({ "grammar": "root ::= root \"a\"" }),
        json!({ "grammar": "x".repeat(70_000) }),
        json!({ "guided_regex": "(".repeat(60_000) }),
    ] {
        let reply = server.post("/v1/chat/completions", &chat(form.clone()));
        let shown: String = form.to_string().chars().take(100).collect();
        // Some only look hostile.
        assert!(matches!(reply.status, 200 | 400), "{shown}: {}", reply.body);
        if reply.status == 400 {
            let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
            assert!(message.len() < 700 && !message.contains('\n'), "{shown}: {message}");
        }
    }
    server.ok("/v1/chat/completions", &chat(json!({ "max_tokens": 2 })));
}

/// Guards against a tool of many properties that each had a copy of all its definitions.
#[test]
fn properties_that_refer_to_much_are_refused_before_they_take_memory() {
    let template = format!("{{% if tools %}}<tool_call><function=f><parameter=x>{{% endif %}}{MESSAGES}");
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&with_template(&template).write(dir.path(), "tiny.gguf"), &["--ctx", "4096"]);
    let tool = |properties: usize, definitions: usize| {
        let each = (0..properties).map(|i| (format!("p{i}"), json!({ "$ref": "#/$defs/a" })));
        let definitions = (0..definitions).map(|i| (format!("d{i}"), json!({ "enum": [i] })));
        let definitions: serde_json::Map<String, Json> =
            definitions.chain([("a".to_owned(), json!({ "type": "integer", "minimum": 7, "maximum": 9 }))]).collect();
        json!([{ "type": "function", "function": { "name": "f", "parameters": { "type": "object", "$defs": definitions,
            "properties": each.collect::<serde_json::Map<String, Json>>(), "required": ["p0"] } } }])
    };
    let before = server.rss();
    let reply =
        server.post("/v1/chat/completions", &chat(json!({ "tools": tool(2000, 2900), "tool_choice": "required" })));
    let error = &reply.json()["error"];
    assert_eq!((reply.status, &error["param"]), (400, &json!("tools[0].function.parameters")), "{error}");
    assert!(server.rss() < before + (400 << 20), "{} MiB", server.rss() >> 20);
    // A few are followed.
    let more =
        json!({ "tools": tool(1, 3), "tool_choice": "required", "parallel_tool_calls": false, "max_tokens": 120 });
    let answer = server.ok("/v1/chat/completions", &chat(more));
    let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
    let arguments: Json = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!((7..=9).contains(&arguments["p0"].as_i64().unwrap()), "{answer}");
}

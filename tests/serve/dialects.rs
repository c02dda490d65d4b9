//! Anthropic's, Ollama's and the Responses API: their forms, and the same text as OpenAI's from the same seed.

use serde_json::{Value as Json, json};

use super::common::V;
use super::http::Server;
use super::same_text::model;

fn served() -> (tempfile::TempDir, Server) {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "tiny.gguf");
    let server = Server::start(&path, &[]);
    (dir, server)
}

/// What OpenAI's chat says.
fn text(server: &Server, most: u64) -> String {
    let request = json!({ "messages": [{ "role": "system", "content": "Be brief." }, { "role": "user", "content": "hi" }],
        "seed": 5, "max_tokens": most, "temperature": 0.9 });
    server.ok("/v1/chat/completions", &request)["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

/// The named events of a stream.
fn named(body: &str) -> Vec<(String, Json)> {
    let event = |e: &str| {
        let (name, data) = e.strip_prefix("event: ")?.split_once("\ndata: ")?;
        Some((name.to_owned(), serde_json::from_str(data).unwrap()))
    };
    body.split("\n\n").filter_map(event).collect()
}

#[test]
fn messages_of_anthropic() {
    let (_dir, server) = served();
    let mut request = json!({ "model": "tiny", "system": [{ "type": "text", "text": "Be brief." }], "max_tokens": 8,
        "messages": [{ "role": "user", "content": [{ "type": "text", "text": "hi" }] }], "seed": 5, "temperature": 0.9 });
    let expected = text(&server, 8);
    let whole = server.ok("/v1/messages", &request);
    assert_eq!((whole["type"].as_str(), whole["content"][0]["text"].as_str()), (Some("message"), Some(&expected[..])));
    assert!(matches!(whole["stop_reason"].as_str(), Some("max_tokens" | "end_turn")), "{whole}");
    let counted = json!({ "messages": request["messages"], "system": request["system"] });
    let n = server.ok("/v1/messages/count_tokens", &counted)["input_tokens"].as_u64().unwrap();
    let usage = &whole["usage"];
    assert_eq!(usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap(), n);
    request["stream"] = true.into();
    let events = named(&server.post("/v1/messages", &request).body);
    let names: Vec<&str> = events.iter().map(|e| &e.0[..]).filter(|n| *n != "content_block_delta").collect();
    assert_eq!(
        names,
        ["message_start", "ping", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    );
    assert!(events.iter().all(|(name, e)| e["type"] == **name));
    let streamed: String = events.iter().filter_map(|e| e.1["delta"]["text"].as_str()).collect();
    assert_eq!(streamed, expected);
    assert_eq!(events[events.len() - 2].1["delta"]["stop_reason"], whole["stop_reason"]);
    request["stream"] = false.into();
    request["stop_sequences"] = json!([expected.chars().skip(2).take(2).collect::<String>()]);
    let stopped = server.ok("/v1/messages", &request);
    assert_eq!(
        (&stopped["stop_reason"], &stopped["stop_sequence"]),
        (&json!("stop_sequence"), &request["stop_sequences"][0])
    );
    for (field, value) in [
        ("max_tokens", Json::Null),
        ("max_tokens", json!(-1)),
        ("tools", json!([{ "name": "f", "input_schema": {} }])),
        (
            "messages",
            json!([{ "role": "user", "content": "a" },
                { "role": "assistant", "content": [{ "type": "tool_use", "id": "c", "name": "f", "input": {} }] }]),
        ),
        ("thinking", json!({ "type": "enabled", "budget_tokens": 1024 })),
    ] {
        let mut request = request.clone();
        request[field] = value;
        let reply = server.post("/v1/messages", &request);
        assert_eq!(
            (reply.status, reply.json()["error"]["type"].as_str()),
            (400, Some("invalid_request_error")),
            "{field}"
        );
        assert!(reply.json()["error"]["message"].as_str().unwrap().contains(field), "{}", reply.body);
    }
}

#[test]
fn chat_and_generate_of_ollama() {
    let (_dir, server) = served();
    let expected = text(&server, 8);
    let options = json!({ "seed": 5, "temperature": 0.9, "num_predict": 8, "num_ctx": 128, "num_thread": 3 });
    let system = json!({ "role": "system", "content": "Be brief." });
    let chat = json!({ "model": "tiny:latest", "messages": [system, { "role": "user", "content": "hi" }], "options": options });
    let reply = server.post("/api/chat", &chat);
    assert!(reply.head.contains("application/x-ndjson"), "{}", reply.head);
    let lines: Vec<Json> = reply.body.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let streamed: String = lines.iter().filter_map(|l| l["message"]["content"].as_str()).collect();
    assert_eq!(streamed, expected);
    let last = lines.last().unwrap();
    assert!(last["done"] == true && lines[..lines.len() - 1].iter().all(|l| l["done"] == false));
    for figure in
        ["total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"]
    {
        assert!(last[figure].is_u64(), "{figure}: {last}");
    }
    let generate =
        json!({ "prompt": "hi", "system": "Be brief.", "options": options, "stream": false, "keep_alive": "5m" });
    assert_eq!(server.ok("/api/generate", &generate)["response"], expected);
    assert_eq!(server.get("/api/tags").json()["models"][0]["name"], "tiny");
    assert_eq!(server.get("/api/ps").json()["models"][0]["model"], "tiny");
    assert!(server.get("/api/version").json()["version"].is_string());
    assert_eq!(server.ok("/api/show", &json!({ "model": "tiny" }))["details"]["family"], "llama");
    // A context that is smaller than the server's ends the answer, as a full one does.
    let n = last["prompt_eval_count"].as_u64().unwrap();
    let small = json!({ "messages": chat["messages"], "stream": false,
        "options": { "seed": 5, "temperature": 0.9, "num_ctx": n + 2 } });
    let cut = server.ok("/api/chat", &small);
    assert_eq!((&cut["eval_count"], &cut["done_reason"]), (&json!(3), &json!("length")), "{cut}");
    assert!(expected.starts_with(cut["message"]["content"].as_str().unwrap().trim_end_matches('\u{fffd}')));
    let load = server.ok("/api/generate", &json!({ "model": "tiny", "keep_alive": "5m", "stream": false }));
    assert_eq!((&load["done_reason"], &load["response"]), (&json!("load"), &json!("")));
    // The model cannot be given up, and a client that asks for it is told.
    for nothing in [json!(0), json!("0s")] {
        let reply = server.post("/api/chat", &json!({ "model": "tiny", "messages": [], "keep_alive": nothing }));
        assert!(reply.status == 200 && reply.json()["done_reason"] == "unload", "{}", reply.body);
    }
    for path in ["/api/pull", "/api/delete"] {
        let reply = server.post(path, &json!({ "model": "x" }));
        assert!(reply.status == 501 && reply.json()["error"].is_string(), "{path}: {}", reply.body);
    }
    for (field, value, named) in [
        ("format", json!("xml"), "format"),
        ("format", json!({ "not": {} }), "not"),
        ("options", json!({ "mirostat": 1 }), "options.mirostat"),
        ("options", json!({ "num_ctx": 1_000_000 }), "num_ctx"),
        ("options", json!({ "num_ctx": 9 }), "num_ctx"),
        ("think", json!(true), "think"),
        ("model", json!("llama3"), "llama3"),
    ] {
        let mut request = chat.clone();
        request[field] = value;
        let reply = server.post("/api/chat", &request);
        assert!(
            matches!(reply.status, 400 | 404) && reply.json()["error"].as_str().unwrap().contains(named),
            "{}",
            reply.body
        );
    }
}

#[test]
fn responses_of_openai() {
    let (_dir, server) = served();
    let expected = text(&server, 8);
    let mut request = json!({ "model": "tiny", "instructions": "Be brief.", "input": "hi", "max_output_tokens": 8, "seed": 5,
        "temperature": 0.9, "store": false });
    let whole = server.ok("/v1/responses", &request);
    assert_eq!(whole["output"][0]["content"][0]["text"], expected);
    assert_eq!(whole["usage"]["output_tokens"], 8);
    assert_eq!(
        (&whole["status"], &whole["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    assert_eq!(whole["output"][0]["status"], "incomplete", "a message that is cut says so itself");
    assert_eq!(
        (&whole["instructions"], &whole["tools"], &whole["tool_choice"], &whole["text"]["format"]["type"]),
        (&json!("Be brief."), &json!([]), &json!("auto"), &json!("text")),
    );
    let plain = server.ok("/v1/responses", &json!({ "input": "hi", "max_output_tokens": 1 }));
    assert!(plain["instructions"].is_null(), "{plain}");
    request["metadata"] = json!({ "a": "b" });
    request["input"] = json!([{ "role": "user", "content": [{ "type": "input_text", "text": "hi" }] }]);
    request["stream"] = true.into();
    let events = named(&server.post("/v1/responses", &request).body);
    let numbers: Vec<u64> = events.iter().map(|e| e.1["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
    let names: Vec<&str> = events.iter().map(|e| &e.0[..]).filter(|n| !n.ends_with(".delta")).collect();
    assert_eq!(
        names,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
    );
    let streamed: String =
        events.iter().filter(|e| e.0 == "response.output_text.delta").filter_map(|e| e.1["delta"].as_str()).collect();
    assert_eq!(streamed, expected);
    let last = &events.last().unwrap().1["response"];
    assert_eq!(last["output"][0]["content"][0]["text"], expected);
    assert_eq!(last["output"], json!([events[events.len() - 2].1["item"]]));
    assert_eq!(last["output"][0]["status"], "incomplete");
    let said = (&last["metadata"]["a"], &last["temperature"], &last["max_output_tokens"]);
    assert_eq!(said, (&json!("b"), &json!(0.9), &json!(8)));
    let mut refused = request.clone();
    refused["previous_response_id"] = "resp_1".into();
    assert_eq!(server.post("/v1/responses", &refused).json()["error"]["param"], "previous_response_id");
    request["text"] = json!({ "format": { "type": "json_schema" } });
    assert_eq!(server.post("/v1/responses", &request).json()["error"]["param"], "text.format.schema");
}

/// Calls of tools reach the template, and what it is told of them comes back to it.
#[test]
fn tools_are_given_to_a_template_that_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = model();
    let template = "{% if tools %}[{{ tools[0].function.name }}|<tool_call>]{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}";
    file.set("tokenizer.chat_template", V::Str(template.into()));
    let server = Server::start(&file.write(dir.path(), "m.gguf"), &[]);
    let tool = json!({ "type": "function", "function": { "name": "f", "parameters": { "type": "object" } } });
    let call = json!({ "id": "c1", "type": "function", "function": { "name": "f", "arguments": "{\"x\": 1}" } });
    let messages = json!([{ "role": "user", "content": "hi" }, { "role": "assistant", "content": null, "tool_calls": [call] },
        { "role": "tool", "tool_call_id": "c1", "content": "5" }]);
    let prompt = server.ok("/apply-template", &json!({ "messages": messages, "tools": [tool] }))["prompt"].clone();
    let prompt = prompt.as_str().unwrap();
    assert!(
        prompt.starts_with("[f|<tool_call>]<user>hi<assistant>") && prompt.ends_with("{\"x\": 1}<tool>5"),
        "{prompt}"
    );
    let request = json!({ "messages": messages, "tools": [tool], "max_tokens": 3, "parallel_tool_calls": false });
    assert_eq!(server.post("/v1/chat/completions", &request).status, 200);
    // A response says again what was asked for, its tools with all fields.
    let flat = json!({ "type": "function", "name": "f", "parameters": { "type": "object" } });
    let whole = json!({ "type": "function", "name": "f", "parameters": { "type": "object" }, "description": null, "strict": false });
    for choice in [json!("auto"), json!("none")] {
        let mut request = json!({ "input": "hi", "instructions": "Go.", "tools": [flat], "tool_choice": choice, "max_output_tokens": 2 });
        let said = server.ok("/v1/responses", &request);
        assert_eq!(
            (&said["tools"], &said["tool_choice"], &said["instructions"]),
            (&json!([whole]), &choice, &json!("Go."))
        );
        request["stream"] = true.into();
        for (name, event) in named(&server.post("/v1/responses", &request).body) {
            let told = &event["response"];
            assert!(
                told.is_null() || told["tools"] == json!([whole]) && told["instructions"] == "Go.",
                "{name}: {event}"
            );
        }
    }
    let blocks = json!([{ "role": "user", "content": "hi" },
        { "role": "assistant", "content": [{ "type": "tool_use", "id": "c1", "name": "f", "input": { "x": 1 } }] },
        { "role": "user", "content": [{ "type": "tool_result", "tool_use_id": "c1", "content": "5" }] }]);
    let mut tools =
        json!([{ "name": "f", "input_schema": { "type": "object" }, "cache_control": { "type": "ephemeral" } }]);
    for (field, value) in [("input_examples", json!([{ "x": 1 }])), ("colour", json!("red"))] {
        let mut tools = tools.clone();
        tools[0][field] = value;
        let reply = server.post("/v1/messages/count_tokens", &json!({ "messages": blocks, "tools": tools }));
        let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(reply.status == 400 && message.starts_with(&format!("tools[0].{field}")), "{message}");
    }
    tools[0]["strict"] = false.into();
    let counted = server.ok("/v1/messages/count_tokens", &json!({ "messages": blocks, "tools": tools }));
    let tokens = server.ok("/tokenize", &json!({ "content": prompt, "add_special": true }));
    assert_eq!(counted["input_tokens"].as_u64().unwrap(), tokens["tokens"].as_array().unwrap().len() as u64);
}

/// Tools that a template leaves out would be unknown to the model. Calls of earlier messages that it leaves out stand in
/// their words, as the model writes them.
#[test]
fn what_a_template_leaves_out_is_refused_or_written() {
    let serve = |template: &str| {
        let dir = tempfile::tempdir().unwrap();
        let mut file = model();
        file.set("tokenizer.chat_template", V::Str(template.into()));
        let server = Server::start(&file.write(dir.path(), "m.gguf"), &[]);
        (dir, server)
    };
    let tool = json!({ "type": "function", "function": { "name": "f", "parameters": { "type": "object" } } });
    let user = json!({ "role": "user", "content": "hi" });
    let (_dir, server) = serve(
        "{% if own_tools %}{{ own_tools }}<tool_call>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
    );
    let reply = server.post("/v1/chat/completions", &json!({ "messages": [user], "tools": [tool], "max_tokens": 2 }));
    assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!("tools")), "{}", reply.body);
    let arguments = "{\"x\": \"y\", \"n\": [1, null]}";
    let call = json!({ "id": "c1", "type": "function", "function": { "name": "f", "arguments": arguments } });
    let messages = json!([user, { "role": "assistant", "content": "So: ", "tool_calls": [call, call] },
        { "role": "tool", "tool_call_id": "c1", "content": "5" }]);
    let list = "{\"name\": \"f\", \"arguments\": {\"x\":\"y\",\"n\":[1,null]}}";
    for (mark, written) in [
        (
            "<|tool_list_start|>",
            "<|tool_call_start|>[f(x=\"y\", n=[1, None]), f(x=\"y\", n=[1, None])]<|tool_call_end|>".to_owned(),
        ),
        ("<|tool_call|>", format!("<|tool_call|>[{list}, {list}]")),
    ] {
        let template = format!(
            "{{% if tools %}}{{{{ tools }}}}{mark}{{% endif %}}{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}{{% endfor %}}"
        );
        let (_dir, server) = serve(&template);
        let prompt = server.ok("/apply-template", &json!({ "messages": messages, "tools": [tool] }))["prompt"].clone();
        let prompt = prompt.as_str().unwrap();
        assert!(prompt.ends_with(&format!("<user>hi<assistant>So: {written}<tool>5")), "{prompt}");
    }
}

/// llama-server's own form of a text that is continued.
#[test]
fn completion_of_llama_server() {
    let (_dir, server) = served();
    let ask = json!({ "prompt": "hi", "n_predict": 8, "seed": 5, "temperature": 0.9 });
    let expected = server.ok("/v1/completions", &ask)["choices"][0]["text"].clone();
    let whole = server.ok("/completion", &ask);
    assert_eq!((&whole["content"], &whole["stop"], &whole["stop_type"]), (&expected, &json!(true), &json!("limit")));
    assert_eq!((&whole["tokens_predicted"], &whole["tokens"]), (&json!(8), &json!([])), "{whole}");
    assert!(whole["timings"]["predicted_n"] == 8 && whole["generation_settings"]["top_k"] == 40, "{whole}");
    assert!(whole.get("completion_probabilities").is_none());
    let mut more = ask.clone();
    (more["n_probs"], more["return_tokens"], more["stream"]) = (json!(2), json!(true), json!(true));
    let reply = server.post("/completion", &more);
    let (events, done) = reply.events();
    assert!(!done && reply.head.contains("text/event-stream"), "{}", reply.body);
    let (last, pieces) = events.split_last().unwrap();
    let text: String = pieces.iter().map(|e| e["content"].as_str().unwrap()).collect();
    assert_eq!((json!(text), &last["stop"], &last["content"]), (expected, &json!(true), &json!("")));
    let tokens = pieces.iter().flat_map(|e| e["tokens"].as_array().unwrap());
    let told: Vec<&Json> = pieces.iter().flat_map(|e| e["completion_probabilities"].as_array().unwrap()).collect();
    assert!(told.iter().all(|t| t["top_logprobs"].as_array().unwrap().len() == 2 && t["logprob"].is_number()));
    assert!(tokens.eq(told.iter().map(|t| &t["id"])) && told.len() == 8, "{told:?}");
    let stop = expected_stop(&text);
    let stopped = server
        .ok("/completion", &json!({ "prompt": "hi", "n_predict": 8, "seed": 5, "temperature": 0.9, "stop": [stop] }));
    assert_eq!((&stopped["stop_type"], &stopped["stopping_word"]), (&json!("word"), &json!(stop)), "{stopped}");
    for (field, value) in
        [("n_probs", json!(99)), ("response_fields", json!(["content"])), ("n_cmpl", json!(2)), ("colour", json!(1))]
    {
        let mut refused = ask.clone();
        refused[field] = value;
        let reply = server.post("/completion", &refused);
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(field)), "{}", reply.body);
    }
}

/// A character of a text that is whole.
fn expected_stop(text: &str) -> String {
    text.chars().find(|c| *c != '\u{fffd}').unwrap().to_string()
}

/// What routers scrape: times to a first token and per token, of requests that ended.
#[test]
fn times_are_counted() {
    let (_dir, server) = served();
    for n in [1, 4] {
        server.ok("/v1/completions", &json!({ "prompt": "hi", "max_tokens": n, "ignore_eos": true }));
    }
    server.until("nt:requests_done_total", |n| n == 2.0);
    let text = server.get("/metrics").body;
    for line in [
        "vllm:time_to_first_token_seconds_count{model_name=\"tiny\"} 2",
        "vllm:time_to_first_token_seconds_bucket{model_name=\"tiny\",le=\"+Inf\"} 2",
        // The answer of one token has none behind its first.
        "vllm:time_per_output_token_seconds_count{model_name=\"tiny\"} 1",
        "vllm:gpu_cache_usage_perc{model_name=\"tiny\"} 0",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} in {text}");
    }
}

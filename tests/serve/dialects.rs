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
        ("tools", json!([{ "name": "f", "input_schema": {} }])),
        ("messages", json!([{ "role": "user", "content": "a" }, { "role": "assistant", "content": "b" }])),
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
    let load = server.ok("/api/generate", &json!({ "model": "tiny", "keep_alive": 0, "stream": false }));
    assert_eq!((&load["done_reason"], &load["response"]), (&json!("load"), &json!("")));
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
    assert_eq!(events.last().unwrap().1["response"]["output"][0]["content"][0]["text"], expected);
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

//! Answers in the forms that OpenAI's clients read.

use serde_json::{Value as Json, json};

use super::http::{Reply, Server};
use super::same_text::model;

fn server() -> (tempfile::TempDir, Server) {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "tiny-model.gguf");
    let server = Server::start(&path, &["--alias", "tiny", "--alias", "gpt-tiny"]);
    (dir, server)
}

fn chat(more: Json) -> Json {
    let mut request = json!({ "messages": [{ "role": "user", "content": "hi" }], "seed": 1, "max_tokens": 6 });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request
}

#[test]
fn a_chat_streams_role_first_then_text_then_its_end() {
    let (_dir, server) = server();
    let whole = server.ok("/v1/chat/completions", &chat(json!({})));
    assert_eq!((whole["object"].as_str(), whole["model"].as_str()), (Some("chat.completion"), Some("tiny")));
    let message = &whole["choices"][0]["message"];
    assert_eq!(message["role"], "assistant");
    let usage = &whole["usage"];
    assert_eq!(
        usage["total_tokens"].as_u64().unwrap(),
        usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap()
    );
    assert!(whole["timings"]["prompt_n"].is_u64() && whole["timings"]["tiers"]["b"]["units"].is_u64(), "{whole}");
    let request = chat(json!({ "stream": true, "stream_options": { "include_usage": true } }));
    let reply = server.post("/v1/chat/completions", &request);
    assert!(reply.head.contains("content-type: text/event-stream"), "{}", reply.head);
    let (events, done) = reply.events();
    assert!(done && events.iter().all(|e| e["object"] == "chat.completion.chunk"));
    assert_eq!(events[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    let n = events.len();
    assert_eq!(events[n - 2]["choices"][0]["delta"], json!({}));
    assert_eq!(events[n - 2]["choices"][0]["finish_reason"], whole["choices"][0]["finish_reason"]);
    assert_eq!(events[n - 1]["choices"], json!([]));
    assert_eq!(events[n - 1]["usage"]["completion_tokens"], usage["completion_tokens"]);
    assert!(events[..n - 1].iter().all(|e| e["usage"].is_null()));
    let text: String = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(message["content"], text);
}

#[test]
fn probabilities_are_told_of_each_token() {
    let (_dir, server) = server();
    let answer =
        server.ok("/v1/chat/completions", &chat(json!({ "logprobs": true, "top_logprobs": 3, "temperature": 0 })));
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len() as u64, answer["usage"]["completion_tokens"].as_u64().unwrap());
    for t in tokens {
        let top = t["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // The likeliest is drawn, and probabilities fall.
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&t["token"], &t["logprob"]));
        let l: Vec<f64> = top.iter().map(|t| t["logprob"].as_f64().unwrap()).collect();
        assert!(l.is_sorted_by(|a, b| a >= b) && l[0] <= 0.0, "{l:?}");
    }
    let request = chat(json!({ "logprobs": true, "temperature": 0, "stream": true }));
    let streamed = server.post("/v1/chat/completions", &request).events().0;
    let n: usize =
        streamed.iter().filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array()).map(Vec::len).sum();
    assert_eq!(n, tokens.len());
    let text = json!({ "prompt": "hi", "max_tokens": 4, "logprobs": 2, "temperature": 0 });
    let answer = server.ok("/v1/completions", &text);
    let l = &answer["choices"][0]["logprobs"];
    assert_eq!(l["tokens"].as_array().unwrap().len(), l["text_offset"].as_array().unwrap().len());
    assert_eq!(l["top_logprobs"][0].as_object().unwrap().len(), 2);
}

#[test]
fn a_stop_text_ends_an_answer_and_is_not_shown() {
    let (_dir, server) = server();
    let request =
        json!({ "prompt": "hello", "max_tokens": 40, "temperature": 0, "logit_bias": { "65": 50, "257": -100 } });
    let free = server.ok("/v1/completions", &request);
    assert_eq!(free["choices"][0]["text"], "A".repeat(40), "a bias of 50 wins");
    // A text stands for each of its tokens, as at llama-server.
    let text = json!({ "prompt": "hello", "max_tokens": 9, "temperature": 0, "logit_bias": [["A", 50], [257, false]],
        "dry_multiplier": 0.1, "dry_sequence_breakers": [] });
    assert_eq!(server.ok("/v1/completions", &text)["choices"][0]["text"], "A".repeat(9));
    let mut request =
        json!({ "prompt": "hello", "max_tokens": 40, "seed": 9, "temperature": 1.5, "logit_bias": { "257": -100 } });
    let free = server.ok("/v1/completions", &request);
    let text = free["choices"][0]["text"].as_str().unwrap().to_owned();
    let stop: String = text.chars().skip(6).take(3).collect();
    let at = text.find(&stop).unwrap();
    request["stop"] = json!([stop, "never there"]);
    for stream in [false, true] {
        request["stream"] = stream.into();
        let reply = server.post("/v1/completions", &request);
        let (found, finish) = match stream {
            false => {
                (reply.json()["choices"][0]["text"].as_str().unwrap().to_owned(), reply.json()["choices"][0].clone())
            }
            true => {
                let events = reply.events().0;
                let text = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
                (text, events.last().unwrap()["choices"][0].clone())
            }
        };
        assert_eq!(found, text[..at], "stop {:?}", request["stop"]);
        assert_eq!(finish["finish_reason"], "stop");
    }
}

/// A parameter that would change the text and is not built, and a value of the wrong type or range, are named.
#[test]
fn what_is_not_understood_is_refused_by_name() {
    let (_dir, server) = server();
    for (more, param) in [
        (json!({ "temperature": "hot" }), "temperature"),
        (json!({ "temperature": 101 }), "temperature"),
        (json!({ "top_p": 2 }), "top_p"),
        (json!({ "max_tokens": 1.5 }), "max_tokens"),
        (json!({ "max_tokens": "7" }), "max_tokens"),
        (json!({ "n": 0 }), "n"),
        (json!({ "seed": "x" }), "seed"),
        (json!({ "stop": [1] }), "stop"),
        (json!({ "stop": "" }), "stop"),
        (json!({ "stream": "yes" }), "stream"),
        (json!({ "stream_options": { "x": 1 } }), "stream_options.x"),
        (json!({ "logit_bias": { "999": 1 } }), "logit_bias"),
        (json!({ "logit_bias": [["a", "x"]] }), "logit_bias"),
        (json!({ "logit_bias": { "5": "x" } }), "logit_bias.5"),
        (json!({ "top_logprobs": 3 }), "top_logprobs"),
        (json!({ "response_format": { "type": "xml" } }), "response_format.type"),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x" } } }),
            "response_format.json_schema.schema",
        ),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": { "not": {} } } } }),
            "response_format",
        ),
        (json!({ "json_schema": { "type": "array", "uniqueItems": true } }), "json_schema"),
        (json!({ "json_schema": {}, "response_format": { "type": "json_object" } }), "json_schema"),
        (json!({ "response_format": { "type": "json_object" }, "ignore_eos": true }), "ignore_eos"),
        (json!({ "grammar": "root ::= x" }), "grammar"),
        (json!({ "grammar": "start: (" }), "grammar"),
        (json!({ "guided_regex": "(" }), "guided_regex"),
        (json!({ "guided_choice": [] }), "guided_choice"),
        (json!({ "structured_outputs": { "xml": true } }), "structured_outputs.xml"),
        (json!({ "tools": [{ "type": "function", "function": { "name": "f" } }] }), "tools"),
        (json!({ "tool_choice": "required" }), "tool_choice"),
        (json!({ "functions": [{ "name": "f" }] }), "functions"),
        (json!({ "reasoning_effort": "high" }), "reasoning_effort"),
        (json!({ "chat_template_kwargs": { "enable_thinking": false } }), "chat_template_kwargs.enable_thinking"),
        (json!({ "mirostat": 2 }), "mirostat"),
        (json!({ "min_tokens": -1 }), "min_tokens"),
        (json!({ "min_tokens": 3, "response_format": { "type": "json_object" } }), "min_tokens"),
        (json!({ "stop_token_ids": [999] }), "stop_token_ids"),
        (json!({ "stop_token_ids": 2 }), "stop_token_ids"),
        (json!({ "stop_token_ids": vec![2; 65] }), "stop_token_ids"),
        (json!({ "continue_final_message": true }), "continue_final_message"),
        (json!({ "add_generation_prompt": "no" }), "add_generation_prompt"),
        (json!({ "n_probs": 3 }), "n_probs"),
        (json!({ "echo": true }), "echo"),
        (json!({ "best_of": 2 }), "best_of"),
        (json!({ "modalities": ["audio"] }), "modalities"),
        (json!({ "temprature": 0.5 }), "temprature"),
        (json!({ "messages": [] }), "messages"),
        (json!({ "messages": ["hi"] }), "messages[0]"),
        (json!({ "messages": [{ "role": "king", "content": "hi" }] }), "messages[0].role"),
        (json!({ "messages": [{ "role": "user" }] }), "messages[0].content"),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "x" } }] }] }),
            "messages[0].content[0]",
        ),
        (json!({ "messages": [{ "role": "tool", "content": "5" }] }), "messages[0].content"),
    ] {
        let reply = server.post("/v1/chat/completions", &chat(more.clone()));
        let error = &reply.json()["error"];
        assert_eq!((reply.status, error["param"].as_str()), (400, Some(param)), "{more}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(error["message"].as_str().unwrap().contains(param.split(['.', '[']).next().unwrap()), "{error}");
    }
    // What changes no text may hold anything; neutral values ask for nothing.
    let harmless = json!({ "user": "me", "metadata": { "a": 1 }, "store": true, "mirostat": 0, "response_format": { "type": "text" },
        "tools": [], "tool_choice": "none", "parallel_tool_calls": true, "logit_bias": null, "stop": null, "n": 1, "min_tokens": 0,
        "stop_token_ids": [], "skip_special_tokens": true, "include_stop_str_in_output": false, "echo": false, "best_of": 1 });
    server.ok("/v1/chat/completions", &chat(harmless));
}

#[test]
fn the_model_goes_by_its_names_and_no_other() {
    let (_dir, server) = server();
    let list = server.get("/v1/models").json();
    assert_eq!((list["data"][0]["id"].as_str(), list["object"].as_str()), (Some("tiny"), Some("list")));
    for name in ["tiny", "gpt-tiny", "tiny-model", "tiny:latest"] {
        server.ok("/v1/chat/completions", &chat(json!({ "model": name })));
        assert_eq!(server.get(&format!("/v1/models/{name}")).status, 200);
    }
    let reply = server.post("/v1/chat/completions", &chat(json!({ "model": "gpt-5" })));
    assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (404, Some("model_not_found")));
    let reply = server.get("/v1/nothing");
    assert_eq!((reply.status, reply.json()["error"]["type"].as_str()), (404, Some("invalid_request_error")));
    assert_eq!(server.get("/v1/chat/completions").status, 405);
}

#[test]
fn the_tokenizer_and_the_template_answer_too() {
    let (_dir, server) = server();
    let ids = server.ok("/tokenize", &json!({ "content": "hi", "add_special": true }))["tokens"].clone();
    assert_eq!(ids.as_array().unwrap().len(), 3);
    assert_eq!(server.ok("/detokenize", &json!({ "tokens": ids }))["content"], "<|bos|>hi");
    let pieces = server.ok("/tokenize", &json!({ "content": "é", "with_pieces": true }));
    assert_eq!(pieces["tokens"][0]["piece"], json!([0xc3]));
    let prompt = server.ok("/apply-template", &json!({ "messages": [{ "role": "user", "content": "hi" }] }));
    assert_eq!(prompt["prompt"], "<user>hi<assistant>");
    assert_eq!(server.post("/detokenize", &json!({ "tokens": [-1] })).status, 400);
    assert_eq!(server.get("/props").json()["total_slots"], 4);
    assert_eq!(server.get("/slots").json().as_array().unwrap().len(), 4);
    assert_eq!(server.get("/slots").json()[0]["is_processing"], false);
    let echo = json!({ "prompt": [104, 105], "echo": true, "max_tokens": 0 });
    let reply: Reply = server.post("/v1/completions", &echo);
    assert_eq!(reply.status, 200, "{}", reply.body);
}

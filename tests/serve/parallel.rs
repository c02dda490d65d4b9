//! Several requests in one pass: who gets in, what is told of them, and what one that fails leaves the others.

use serde_json::{Value as Json, json};

use super::common::{T, V, tiny};
use super::http::{Reply, Server};
use super::same_text::{alone, model};

fn begin(server: &Server, request: &Json) -> std::net::TcpStream {
    server.send("POST", "/v1/completions", "", request.to_string().as_bytes())
}

/// Requests that have room are computed next to each other, and those that have none wait.
#[test]
fn as_many_are_computed_as_there_are_slots_and_pages() {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let server = Server::start(&path, &["--parallel", "3", "--ctx", "512"]);
    assert_eq!(server.get("/props").json()["total_slots"], 3);
    assert_eq!(server.metric("nt:slots"), 3.0);
    // A page each, again and again.
    let small = json!({ "prompt": "x", "max_tokens": 60, "n": 128, "ignore_eos": true, "stream": true, "logprobs": 5 });
    let running: Vec<_> = (0..3).map(|_| begin(&server, &small)).collect();
    server.until("llamacpp:requests_processing", |n| n == 3.0);
    let slots = server.get("/slots").json();
    assert!(slots.as_array().unwrap().iter().all(|s| s["is_processing"] == true), "{slots}");
    let fourth = begin(&server, &small);
    server.until("llamacpp:requests_deferred", |n| n == 1.0);
    drop(running);
    server.until("llamacpp:requests_processing", |n| n == 1.0);
    drop(fourth);
    server.until("llamacpp:requests_processing", |n| n == 0.0);
    // All pages: nothing runs next to it.
    let large = json!({ "prompt": "x", "max_tokens": 500, "n": 20, "ignore_eos": true, "stream": true });
    let running = begin(&server, &large);
    server.until("llamacpp:requests_processing", |n| n == 1.0);
    let waits = begin(&server, &small);
    server.until("llamacpp:requests_deferred", |n| n == 1.0);
    drop((running, waits));
    server.until("llamacpp:requests_processing", |n| n == 0.0);
}

/// Answers of one request that are computed next to each other, and to others, are those of their seeds.
#[test]
fn answers_next_to_each_other_are_those_of_their_seeds() {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let prompt = "Tell me of the sea, of ships that sail on it, and of the people on board of them. Begin with a storm";
    let expected: Vec<Json> = (0..8).map(|i| alone(&path, prompt, 70 + i, 20)["text"].clone()).collect();
    for (parallel, ctx) in [("1", "256"), ("4", "256"), ("6", "1024")] {
        let server = Server::start(&path, &["--parallel", parallel, "--ctx", ctx]);
        std::thread::scope(|scope| {
            for from in [0, 2, 4] {
                let (server, expected) = (&server, &expected);
                scope.spawn(move || {
                    let request =
                        json!({ "prompt": prompt, "seed": 70 + from, "max_tokens": 20, "temperature": 1.2, "n": 4 });
                    let answer = server.ok("/v1/completions", &request);
                    for i in 0..4 {
                        assert_eq!(answer["choices"][i]["text"], expected[from + i], "{from}, answer {i}");
                    }
                    assert_eq!(answer["usage"]["completion_tokens"], 80);
                });
            }
        });
        // Another one that begins alike takes the prompt from the cache.
        let again = server.ok("/v1/completions", &json!({ "prompt": format!("{prompt}."), "max_tokens": 1 }));
        assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 64, "{again}");
    }
}

/// Guards against numbers that are not finite reaching others: the request with the token whose embedding is none fails
/// alone, says what is wrong, and nothing of it is kept.
#[test]
fn a_request_whose_numbers_are_not_finite_fails_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = tiny(2);
    let embedding: &mut T = file.tensor("token_embd.weight");
    let row = embedding.shape[0] as usize * 4;
    embedding.data[7 * row..8 * row].chunks_exact_mut(4).for_each(|x| x.copy_from_slice(&f32::NAN.to_le_bytes()));
    let path = file.write(dir.path(), "m.gguf");
    let server = Server::start(&path, &["--ctx", "1024"]);
    let request = |prompt: Vec<u32>| json!({ "prompt": prompt, "seed": 3, "max_tokens": 12, "logit_bias": { "7": false }, "ignore_eos": true });
    let good = request((0..90).map(|i| 20 + i).collect());
    let expected = server.ok("/v1/completions", &good)["choices"][0]["text"].clone();
    std::thread::scope(|scope| {
        for client in 0..6 {
            let (server, good, expected) = (&server, &good, &expected);
            scope.spawn(move || {
                for _ in 0..4 {
                    if client % 2 == 0 {
                        assert_eq!(server.ok("/v1/completions", good)["choices"][0]["text"], *expected);
                        continue;
                    }
                    let bad = request((0..90).map(|i| if i == 80 { 7 } else { 20 + i }).collect());
                    let reply = server.post("/v1/completions", &bad);
                    let error = reply.json()["error"].clone();
                    assert_eq!((reply.status, error["type"].as_str()), (500, Some("server_error")), "{}", reply.body);
                    assert!(error["message"].as_str().unwrap().contains("token_embd"), "{error}");
                }
            });
        }
    });
    assert_eq!(server.metric("nt:requests_failed_total"), 12.0);
    let mut streamed = request(vec![20, 7, 30]);
    streamed["stream"] = true.into();
    let reply: Reply = server.post("/v1/completions", &streamed);
    assert!(reply.events().0.last().unwrap()["error"]["message"].as_str().unwrap().contains("token_embd"));
    assert_eq!(server.ok("/v1/completions", &good)["choices"][0]["text"], expected);
}

/// Reasoning is counted where the template opens it, in every dialect that tells it.
#[test]
fn tokens_of_reasoning_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = model();
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<think>{# </think> #}";
    file.set("tokenizer.chat_template", V::Str(template.into()));
    let server = Server::start(&file.write(dir.path(), "m.gguf"), &[]);
    let more = json!({ "seed": 5, "logit_bias": { "257": false, "60": false } });
    let mut request = json!({ "input": "hi", "max_output_tokens": 8 });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let answer = server.ok("/v1/responses", &request);
    assert_eq!(answer["output"][0]["type"], "reasoning", "{answer}");
    let told = answer["usage"]["output_tokens_details"]["reasoning_tokens"].as_u64().unwrap();
    // What is no whole character at the end belongs to no piece.
    assert!((5..=8).contains(&told), "{answer}");
    let mut request = json!({ "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 8 });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let answer = server.ok("/v1/chat/completions", &request);
    assert_eq!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"], told);
}

/// A budget of reasoning, under the names of llama-server and Anthropic: behind so many tokens the mark comes that ends it,
/// and what follows is the answer. The marks of two families, as tokens of their own.
#[test]
fn reasoning_ends_where_its_budget_does() {
    for (open, close) in [("<think>", "</think>"), ("[THINK]", "[/THINK]")] {
        let dir = tempfile::tempdir().unwrap();
        let mut file = model();
        // In the places of two bytes that no text has.
        let meta = file.meta.iter_mut();
        for (key, value) in meta {
            match (&key[..], value) {
                ("tokenizer.ggml.tokens", V::Strs(tokens)) => (tokens[254], tokens[255]) = (open.into(), close.into()),
                ("tokenizer.ggml.token_type", V::I32s(kinds)) => (kinds[254], kinds[255]) = (3, 3),
                _ => {}
            }
        }
        let template = format!(
            "{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}{{% endfor %}}{open}{{# {close} #}}"
        );
        file.set("tokenizer.chat_template", V::Str(template));
        let server = Server::start(&file.write(dir.path(), "m.gguf"), &[]);
        // Noise neither ends its reasoning nor the text by itself.
        let more = json!({ "messages": [{ "role": "user", "content": "hi" }], "seed": 5, "max_tokens": 12,
            "logit_bias": { "257": false, "255": false, "254": false } });
        let with = |field: &str, value: Json| {
            let mut request = more.clone();
            request[field] = value;
            request
        };
        for budget in [0, 3] {
            for field in ["thinking_budget_tokens", "reasoning_budget_tokens"] {
                let answer = server.ok("/v1/chat/completions", &with(field, json!(budget)));
                let message = &answer["choices"][0]["message"];
                assert!(!message["content"].as_str().unwrap().is_empty(), "{answer}");
                assert_eq!(message["reasoning_content"].is_null(), budget == 0, "{answer}");
                // Those of the mark count too.
                assert_eq!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"], budget + 1, "{answer}");
            }
            let thinking = json!({ "type": "enabled", "budget_tokens": budget });
            let message = server.ok("/v1/messages", &with("thinking", thinking));
            let kinds: Vec<&str> =
                message["content"].as_array().unwrap().iter().map(|b| b["type"].as_str().unwrap()).collect();
            assert_eq!(kinds, if budget == 0 { vec!["text"] } else { vec!["thinking", "text"] }, "{message}");
        }
        let none = server.ok("/v1/chat/completions", &with("thinking_budget_tokens", json!(-1)));
        assert_eq!(none["choices"][0]["message"]["content"], "", "{none}");
        // With a form of the answer too.
        let mut form = with("thinking_budget_tokens", json!(2));
        form["logit_bias"] = json!({ "255": false, "254": false });
        form["guided_choice"] = json!(["yes"]);
        let answer = server.ok("/v1/chat/completions", &form);
        assert_eq!(answer["choices"][0]["message"]["content"], "yes", "{answer}");
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&model().write(dir.path(), "m.gguf"), &[]);
    let request = json!({ "messages": [{ "role": "user", "content": "hi" }], "thinking_budget_tokens": 3 });
    let reply = server.post("/v1/chat/completions", &request);
    assert_eq!(
        (reply.status, &reply.json()["error"]["param"]),
        (400, &json!("thinking_budget_tokens")),
        "{}",
        reply.body
    );
}

//! Clients that take more than their share: of memory, of time, of connections.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value as Json, json};

use super::common::V;
use super::http::{Reply, Server};
use super::same_text::model;

const MIB: u64 = 1 << 20;

pub fn served(more: &[&str]) -> (tempfile::TempDir, Server) {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let server = Server::start(&path, more);
    (dir, server)
}

pub fn short() -> Json {
    json!({ "prompt": "x", "max_tokens": 3, "seed": 1, "ignore_eos": true })
}

fn long() -> Json {
    json!({ "prompt": "x", "max_tokens": 240, "n": 128, "ignore_eos": true, "stream": true, "seed": 1 })
}

fn begin(server: &Server, request: &Json) -> std::net::TcpStream {
    server.send("POST", "/v1/completions", "", request.to_string().as_bytes())
}

/// A request whose `param` exceeds the context is refused.
fn refused_as_too_long(server: &Server, path: &str, body: &Json, param: &str) {
    let reply = server.post(path, body);
    let error = &reply.json()["error"];
    assert_eq!(
        (reply.status, error["code"].as_str(), error["param"].as_str()),
        (400, Some("context_length_exceeded"), Some(param)),
        "{path}: {error}"
    );
}

/// Guards against bodies of clients that have gone, which wait to be parsed without a bound.
#[test]
fn bodies_of_clients_that_went_away_are_bounded_in_sum() {
    let (_dir, server) = served(&[]);
    server.ok("/v1/completions", &short());
    let before = server.rss();
    let body = format!("{{\"prompt\":[{}1]}}", "1,".repeat(2 * (1 << 20) - 32));
    let mut most = 0;
    for _ in 0..60 {
        drop(server.send("POST", "/v1/completions", "", body.as_bytes()));
        most = most.max(server.rss());
    }
    server.ok("/v1/completions", &short());
    assert!(most - before < 700 * MIB, "{} MiB more", (most - before) / MIB);
}

/// Guards against a job that outlives its time because nobody reads what it says.
#[test]
fn a_reader_that_takes_nothing_does_not_outlast_the_time_of_a_request() {
    let (_dir, server) = served(&["--timeout", "1"]);
    let mut request = long();
    request["logprobs"] = 5.into();
    let slow = begin(&server, &request);
    server.until("llamacpp:requests_processing", |n| n == 1.0);
    server.until("llamacpp:requests_processing", |n| n == 0.0);
    assert_eq!(server.metric("nt:requests_done_total"), 0.0);
    assert!(Reply::read(slow).body.contains("--timeout"));
}

/// Guards against lists that take minutes to render: they are refused by their length.
#[test]
fn more_items_than_the_context_has_tokens_are_refused_unread() {
    let (_dir, server) = served(&[]);
    let many = |item: Json| Json::Array(vec![item; 40_000]);
    let message = json!({ "role": "user", "content": "a" });
    let parts = json!([{ "role": "user", "content": many(json!({ "type": "text", "text": "a" })) }]);
    for (path, body, param) in [
        ("/v1/chat/completions", json!({ "messages": many(message.clone()) }), "messages"),
        ("/v1/chat/completions", json!({ "messages": parts }), "messages"),
        ("/apply-template", json!({ "messages": many(message.clone()) }), "messages"),
        ("/v1/responses", json!({ "input": many(message.clone()) }), "input"),
    ] {
        refused_as_too_long(&server, path, &body, param);
    }
    for path in ["/v1/messages", "/v1/messages/count_tokens", "/api/chat"] {
        let reply = server.post(path, &json!({ "messages": many(message.clone()), "max_tokens": 5 }));
        assert!(reply.status == 400 && reply.body.contains("messages: 40000"), "{path}: {}", reply.body);
    }
    server.ok("/v1/completions", &short());
}

/// Guards against answers that are a hundred times their request: pieces of tokens are written as they are sent.
#[test]
fn pieces_of_many_tokens_take_little_memory() {
    let (_dir, server) = served(&[]);
    server.ok("/v1/completions", &short());
    let before = server.rss();
    let n = 4_000_000;
    let request = json!({ "content": "a".repeat(n), "with_pieces": true });
    let body = request.to_string();
    let slow: Vec<_> = (0..3).map(|_| server.send("POST", "/tokenize", "", body.as_bytes())).collect();
    let mut streams = slow.into_iter();
    let reply = Reply::read(streams.next().unwrap());
    let more = server.rss().saturating_sub(before);
    assert!(more < 400 * MIB, "{} MiB more", more / MIB);
    let tokens = reply.json();
    let tokens = tokens["tokens"].as_array().unwrap();
    assert!(tokens.len() == n && tokens[n - 1]["piece"] == "a", "{}", tokens.len());
    let ids = server.ok("/tokenize", &json!({ "content": "ab" }));
    assert_eq!(ids, json!({ "tokens": [ids["tokens"][0], ids["tokens"][1]] }));
    assert_eq!(server.ok("/tokenize", &json!({ "content": "" })), json!({ "tokens": [] }));
    let many = json!({ "tokens": vec![1; 200_000] });
    assert_eq!(server.post("/detokenize", &many).json()["error"]["param"], "tokens");
}

/// Guards against a client whose end is not seen behind a byte that it sent too much.
#[test]
fn a_byte_behind_a_request_does_not_hide_that_its_client_is_gone() {
    let (_dir, server) = served(&[]);
    let mut request = long();
    request["stream"] = false.into();
    let mut stream = begin(&server, &request);
    server.until("llamacpp:requests_processing", |n| n == 1.0);
    stream.write_all(b"G").unwrap();
    drop(stream);
    server.until("nt:requests_cancelled_total", |n| n == 1.0);
    server.ok("/v1/completions", &short());
}

/// Guards against connections that do nothing and keep others out: whoever rests for longest gives way, and whoever
/// waits for an answer does not.
#[test]
fn connections_that_rest_give_way_to_new_ones() {
    let (_dir, server) = served(&["--max-connections", "8"]);
    let running = begin(&server, &long());
    server.until("llamacpp:requests_processing", |n| n == 1.0);
    let mut idle: Vec<_> = (0..40).map(|_| server.connect()).collect();
    idle.iter_mut().for_each(|s| {
        // Half a head.
        let _ = s.write_all(b"POST /v1/completions HTTP/1.1\r\nHost:");
    });
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.metric("llamacpp:requests_processing"), 1.0, "the one at work stays");
    // The first of them was ended.
    let mut some = [0; 16];
    assert!(matches!(idle[0].read(&mut some), Ok(0) | Err(_)));
    drop(running);
    server.ok("/v1/completions", &short());
}

/// What clients and what is between them and the server see of its end: 503, until it is over.
#[test]
fn a_server_that_ends_says_so_to_new_clients() {
    let (_dir, mut server) = served(&["--grace", "60"]);
    let mut request = long();
    request["n"] = 128.into();
    let running = begin(&server, &request);
    server.until("llamacpp:requests_processing", |n| n == 1.0);
    server.signal(Signal::SIGTERM);
    let began = Instant::now();
    while server.get("/health").status == 200 {
        assert!(began.elapsed() < Duration::from_secs(60), "it does not close");
    }
    let reply = server.post("/v1/completions", &short());
    assert_eq!((reply.status, reply.head.contains("retry-after")), (503, true), "{}", reply.body);
    assert_eq!(server.get("/health").status, 503);
    drop(running);
    assert!(server.ended().success());
}

/// Bounds that keep one request from taking the worker's time from all.
#[test]
fn what_is_searched_at_each_token_is_bounded() {
    let (_dir, server) = served(&[]);
    for (field, value) in [
        ("stop", json!(["a".repeat(2000)])),
        ("stop", json!(vec!["a"; 65])),
        ("logit_bias", json!(vec![json!([5, 1]); 300])),
        ("logit_bias", json!([["a".repeat(3000), 1]])),
        ("dry_sequence_breakers", json!(vec!["a"; 17])),
        ("n", json!(129)),
    ] {
        let mut request = short();
        request[field] = value;
        let reply = server.post("/v1/completions", &request);
        assert_eq!((reply.status, reply.json()["error"]["param"].as_str()), (400, Some(field)), "{}", reply.body);
    }
    let mut request = short();
    request["logprobs"] = 20.into();
    request["n"] = 128.into();
    request["max_tokens"] = 240.into();
    assert_eq!(server.post("/v1/completions", &request).json()["error"]["param"], "n");
}

/// Guards against threads that stay behind, with all that they hold, for clients that go away while their conversation
/// is rendered.
#[test]
fn nothing_stays_behind_for_conversations_that_nobody_waits_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let server = Server::start(&path, &["--ctx", "16384"]);
    let message = json!({ "role": "user", "content": "ab" });
    let body = json!({ "messages": vec![message; 8000], "max_tokens": 1 }).to_string();
    server.ok("/v1/completions", &short());
    let before = server.threads();
    for _ in 0..6 {
        let stream = server.send("POST", "/v1/chat/completions", "", body.as_bytes());
        std::thread::sleep(Duration::from_millis(100));
        drop(stream);
    }
    let began = Instant::now();
    // Threads that read requests wait for the next ones.
    while server.threads() > before + 4 {
        assert!(began.elapsed() < Duration::from_secs(60), "{} threads, {before} at first", server.threads());
        std::thread::sleep(Duration::from_millis(20));
    }
    server.ok("/v1/completions", &short());
}

/// Text that no context has room for is refused by its bytes, before it is read any further.
#[test]
fn more_bytes_than_the_context_holds_are_refused_unread() {
    let (_dir, server) = served(&[]);
    let long = "a".repeat(3_000_000);
    let messages = json!([{ "role": "user", "content": [{ "type": "text", "text": long }] }]);
    for (path, body, param) in [
        ("/v1/chat/completions", json!({ "messages": messages }), "messages"),
        ("/v1/responses", json!({ "input": long }), "messages"),
        ("/v1/completions", json!({ "prompt": long }), "prompt"),
        ("/v1/completions", json!({ "prompt": vec![1; 1_000_000] }), "prompt"),
        ("/v1/embeddings", json!({ "input": ["a", long] }), "input"),
    ] {
        refused_as_too_long(&server, path, &body, param);
    }
    assert_eq!(server.post("/api/generate", &json!({ "prompt": long, "raw": true })).status, 400);
    assert_eq!(server.post("/v1/messages", &json!({ "messages": messages, "max_tokens": 5 })).status, 400);
}

/// Guards against renderings that take more memory than they may, and then keep it: lists of nothing, in tools and in what
/// was called before.
#[test]
fn values_without_number_are_refused_before_a_template_sees_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = model();
    let template = "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}";
    file.set("tokenizer.chat_template", V::Str(template.into()));
    let server = Server::start(&file.write(dir.path(), "m.gguf"), &["--ctx", "4096"]);
    server.ok("/v1/completions", &short());
    let (before, threads) = (server.rss(), server.threads());
    let many = json!({ "a": vec![json!({}); 900_000] });
    let tool = json!({ "type": "function", "function": { "name": "f", "parameters": many } });
    let call = json!({ "id": "1", "type": "function", "function": { "name": "f", "arguments": many.to_string() } });
    let hi = json!({ "role": "user", "content": "hi" });
    for _ in 0..3 {
        for request in [
            json!({ "messages": [hi], "tools": [tool] }),
            json!({ "messages": [hi, { "role": "assistant", "content": null, "tool_calls": [call] }, hi] }),
        ] {
            let reply = server.post("/v1/chat/completions", &request);
            assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (400, Some("context_length_exceeded")));
        }
    }
    assert!(server.threads() <= threads + 4, "threads stay behind");
    assert!(server.rss() - before < 700 * MIB, "{} MiB more", (server.rss() - before) / MIB);
}

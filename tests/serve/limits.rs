//! What clients may take: bytes, time, places in the queue; and what is left when they go or misbehave.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value as Json, json};

use super::common::fails;
use super::http::{Reply, Server};
use super::same_text::model;

fn served(more: &[&str]) -> (tempfile::TempDir, Server) {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let server = Server::start(&path, more);
    (dir, server)
}

/// A request that takes many passes.
fn long() -> Json {
    json!({ "prompt": "x", "max_tokens": 240, "n": 128, "ignore_eos": true, "stream": true, "seed": 1 })
}

fn short() -> Json {
    json!({ "prompt": "x", "max_tokens": 3, "seed": 1, "ignore_eos": true })
}

fn begin(server: &Server, request: &Json) -> std::net::TcpStream {
    server.send("POST", "/v1/completions", "", request.to_string().as_bytes())
}

/// Whoever goes away, waiting or served, streaming or not, gives its place up at once.
#[test]
fn a_client_that_goes_away_is_not_computed_for() {
    let (_dir, server) = served(&[]);
    for stream in [true, false] {
        let mut request = long();
        request["stream"] = stream.into();
        let cancelled = server.metric("nt:requests_cancelled_total");
        let first = begin(&server, &request);
        server.until("llamacpp:requests_processing", |n| n == 1.0);
        let second = begin(&server, &request);
        server.until("llamacpp:requests_deferred", |n| n == 1.0);
        drop(second);
        server.until("llamacpp:requests_deferred", |n| n == 0.0);
        drop(first);
        server.until("llamacpp:requests_processing", |n| n == 0.0);
        server.until("nt:requests_cancelled_total", |n| n == cancelled + 2.0);
        server.ok("/v1/completions", &short());
    }
}

/// A client that takes nothing keeps nobody else waiting, and its text, which is bounded, is all that it costs.
#[test]
fn a_slow_reader_keeps_nobody_waiting() {
    let (_dir, server) = served(&[]);
    let mut request = long();
    request["n"] = 16.into();
    request["logprobs"] = 20.into();
    let slow: Vec<_> = (0..4).map(|_| begin(&server, &request)).collect();
    server.ok("/v1/completions", &short());
    server.until("nt:requests_done_total", |n| n >= 5.0);
    // It may still have all of it.
    for stream in slow {
        let (events, done) = Reply::read(stream).events();
        assert!(done && events.iter().filter(|e| !e["choices"][0]["finish_reason"].is_null()).count() == 16);
    }
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let (_dir, server) = served(&["--max-queue", "2"]);
    server.ok("/v1/completions", &short());
    let running = begin(&server, &long());
    server.until("llamacpp:requests_processing", |n| n == 1.0);
    let waiting = [begin(&server, &long()), begin(&server, &long())];
    server.until("llamacpp:requests_deferred", |n| n == 2.0);
    let reply = server.post("/v1/completions", &short());
    assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (429, Some("rate_limit_exceeded")));
    let after: u64 = reply.head.split("retry-after: ").nth(1).unwrap().lines().next().unwrap().parse().unwrap();
    assert!((1..600).contains(&after), "{}", reply.head);
    assert_eq!(server.get("/slots").json()[0]["is_processing"], true);
    drop(waiting);
    drop(running);
    server.ok("/v1/completions", &short());
}

/// Signs of life while a stream waits, which clients skip.
#[test]
fn a_stream_that_waits_gives_signs_of_life() {
    let (_dir, server) = served(&["--ping", "1"]);
    let running = begin(&server, &long());
    server.until("llamacpp:requests_processing", |n| n == 1.0);
    let mut request = short();
    request["stream"] = true.into();
    let mut waiting = begin(&server, &request);
    let mut heard = Vec::new();
    while !String::from_utf8_lossy(&heard).contains("\r\n: ping\n\n") {
        let mut some = [0; 256];
        let n = waiting.read(&mut some).unwrap();
        assert!(n > 0, "it ended: {}", String::from_utf8_lossy(&heard));
        heard.extend(&some[..n]);
    }
    drop(running);
    waiting.read_to_end(&mut heard).unwrap();
    assert!(Reply::parse(&heard).body.ends_with("data: [DONE]\n\n"));
}

#[test]
fn a_request_that_takes_too_long_is_stopped_and_says_so() {
    let (_dir, server) = served(&["--timeout", "1"]);
    let mut request = long();
    let reply = server.post("/v1/completions", &request);
    assert!(reply.body.contains("--timeout") && !reply.body.contains("[DONE]"), "{}", reply.body);
    request["stream"] = false.into();
    assert_eq!(server.post("/v1/completions", &request).status, 504);
    server.ok("/v1/completions", &short());
}

#[test]
fn a_body_that_is_too_large_is_refused_before_it_is_read() {
    let (_dir, server) = served(&["--max-body", "10kB"]);
    let body = json!({ "prompt": "x".repeat(20_000) }).to_string();
    assert_eq!(Reply::read(server.send("POST", "/v1/completions", "", body.as_bytes())).status, 413);
    // Without a length, too.
    let mut stream = server.connect();
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n",
        server.at
    )
    .unwrap();
    let _ = write!(stream, "{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    assert_eq!(Reply::read(stream).status, 413);
    // A head without an end.
    let mut stream = server.connect();
    let _ =
        stream.write_all(format!("GET /health HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(200_000)).as_bytes());
    assert_eq!(Reply::read(stream).status, 431);
    server.ok("/v1/completions", &short());
}

/// Bodies of bytes, cut, nested, repeated and of wrong types, from a seed, 10,000 to all paths that read any: each is
/// answered, and none is waited for.
#[test]
fn any_body_is_answered() {
    let (_dir, server) = served(&["--max-tokens", "4"]);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let server = &server;
            scope.spawn(move || mutations(server, seed, 2500));
        }
    });
    server.until("llamacpp:requests_processing", |n| n == 0.0);
    server.until("llamacpp:requests_deferred", |n| n == 0.0);
    server.ok("/v1/completions", &short());
}

/// Requests that are whole, of each kind.
fn whole_bodies() -> Vec<(&'static str, Json)> {
    let messages = json!([{ "role": "user", "content": "hi" }]);
    let tool = json!({ "type": "function", "function": { "name": "f", "parameters": {} } });
    vec![
        (
            "/v1/chat/completions",
            json!({ "messages": messages, "max_tokens": 2, "temperature": 0.5, "stop": ["a"], "n": 1, "stream": false,
                "logit_bias": { "5": 1 }, "thinking_budget_tokens": -1, "tools": [], "seed": 3, "stream_options": { "include_usage": true } }),
        ),
        (
            "/v1/completions",
            json!({ "prompt": "x", "max_tokens": 3, "logprobs": 2, "stop": "y", "echo": false, "top_k": 5 }),
        ),
        (
            "/v1/completions",
            json!({ "prompt": [1, 2], "max_tokens": 3, "dry_multiplier": 1, "dry_sequence_breakers": ["a"] }),
        ),
        (
            "/completion",
            json!({ "prompt": "x", "n_predict": 3, "n_probs": 2, "return_tokens": true, "stop": ["y"], "response_fields": [] }),
        ),
        ("/tokenize", json!({ "content": "hi", "with_pieces": true, "add_special": false })),
        ("/detokenize", json!({ "tokens": [1, 2] })),
        ("/apply-template", json!({ "messages": [{ "role": "user", "content": [{ "type": "text", "text": "a" }] }] })),
        (
            "/v1/messages",
            json!({ "system": "s", "messages": messages, "max_tokens": 2, "stop_sequences": ["a"], "tools": [{ "name": "f" }],
                "tool_choice": { "type": "none" } }),
        ),
        ("/v1/messages/count_tokens", json!({ "messages": messages, "thinking": { "type": "disabled" } })),
        (
            "/v1/responses",
            json!({ "input": messages, "instructions": "i", "max_output_tokens": 2, "metadata": { "a": "b" }, "reasoning": { "effort": null },
                "tools": [], "text": { "format": { "type": "text" } } }),
        ),
        (
            "/api/chat",
            json!({ "messages": messages, "options": { "num_predict": 2, "num_ctx": 50, "stop": ["a"] }, "tools": [tool], "keep_alive": "0s" }),
        ),
        (
            "/api/generate",
            json!({ "prompt": "hi", "system": "s", "options": { "seed": 1 }, "raw": false, "stream": true }),
        ),
        ("/v1/embeddings", json!({ "input": ["a", "b"], "encoding_format": "float" })),
        ("/api/embed", json!({ "input": ["a", "b"], "truncate": true, "options": { "num_ctx": 5 } })),
    ]
}

fn mutations(server: &Server, seed: u64, n: usize) {
    let values = [
        "null",
        "-1",
        "1e999",
        "1e308",
        "[]",
        "{}",
        "\"\"",
        "true",
        "18446744073709551616",
        "\"\\ud800\"",
        "[[[]]]",
        "0.5",
    ];
    let bodies = whole_bodies();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut below = |n: usize| rng.random_range(0..n.max(1));
    let mut client = server.client();
    for _ in 0..n {
        let (path, body) = &bodies[below(bodies.len())];
        let mut body = body.to_string().into_bytes();
        for _ in 0..1 + below(3) {
            let at = below(body.len());
            match below(6) {
                0 => body.truncate(at),
                1 => body.insert(at.min(body.len()), below(256) as u8),
                2 => {
                    // A value in place of another.
                    let from = body[at.min(body.len())..].iter().position(|b| *b == b':').map(|p| at + p + 1);
                    if let Some(from) = from {
                        let to =
                            body[from..].iter().position(|b| matches!(b, b',' | b'}')).map_or(body.len(), |p| from + p);
                        body.splice(from..to, values[below(values.len())].bytes());
                    }
                }
                3 => {
                    let piece = body[at.min(body.len())..].to_vec();
                    body.extend(piece);
                }
                4 => {
                    // Another bit.
                    if let Some(byte) = body.get_mut(at) {
                        *byte ^= 1 << below(8);
                    }
                }
                _ => body.splice(at.min(body.len())..at.min(body.len()), "[".repeat(below(300)).bytes()).for_each(drop),
            }
        }
        let reply = client.post(path, &body);
        let shown = String::from_utf8_lossy(&body);
        assert!(matches!(reply.status, 200 | 400 | 404), "{path} {}: {shown}", reply.status);
        let error = |json: Json| json["error"]["message"].is_string() || json["error"].is_string();
        assert!(reply.status == 200 || error(reply.json()), "{path} {shown}: {}", reply.body);
    }
}

/// Heads that are none, bodies that never come, connections that end anywhere.
#[test]
fn rude_connections_harm_nobody() {
    let (_dir, server) = served(&["--max-connections", "64"]);
    let request = short().to_string();
    let whole = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n\r\n{request}",
        server.at,
        request.len()
    );
    let mut open = Vec::new();
    for i in 0..120 {
        let mut stream = server.connect();
        let part = &whole.as_bytes()[..whole.len() * i / 120];
        stream.write_all(if i % 7 == 0 { b"\x16\x03\x01\x00 \r\n\r\n" } else { part }).unwrap();
        if i % 3 == 0 && open.len() < 30 {
            open.push(stream);
        }
    }
    server.ok("/v1/completions", &short());
}

#[test]
fn a_key_is_asked_for_where_there_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let keys = dir.path().join("keys");
    std::fs::write(&keys, "# mine\nsecret-1\n\nsecret-2\n").unwrap();
    let file = keys.to_str().unwrap();
    let server = Server::start(&path, &["--api-key-file", file]);
    let body = short().to_string();
    let ask = |headers: &str| Reply::read(server.send("POST", "/v1/completions", headers, body.as_bytes()));
    for (headers, status) in [
        ("", 401),
        ("Authorization: Bearer secret\r\n", 401),
        ("Authorization: Bearer secret-2\r\n", 200),
        ("x-api-key: secret-1\r\n", 200),
    ] {
        let reply = ask(headers);
        assert_eq!(reply.status, status, "{headers}: {}", reply.body);
    }
    assert_eq!(server.get("/health").status, 200);
    for path in ["/v1/models", "/metrics", "/props", "/slots", "/nothing"] {
        assert_eq!(server.get(path).status, 401, "{path}");
    }
    let model = path.to_str().unwrap();
    fails(&["serve", model, "--host", "0.0.0.0", "--port", "0"], 2, &["--api-key-file", "--no-key"]);
    std::fs::write(&keys, "# none\n").unwrap();
    fails(&["serve", model, "--api-key-file", file], 2, &["no key"]);
    fails(&["serve", model, "--api-key-file", "/nonexistent"], 2, &["/nonexistent"]);
}

#[test]
fn pages_of_other_sites_are_refused() {
    let (_dir, server) = served(&[]);
    let body = short().to_string();
    let reply =
        Reply::read(server.send("POST", "/v1/completions", "Origin: https://evil.example\r\n", body.as_bytes()));
    assert_eq!(reply.status, 403);
    assert!(!reply.head.contains("access-control"), "{}", reply.head);
    assert_eq!(
        Reply::read(server.send("OPTIONS", "/v1/completions", "Origin: https://evil.example\r\n", b"")).status,
        403
    );
}

/// The exit codes of the contract, and what clients see of an end.
#[test]
fn a_server_that_is_asked_to_stop_finishes_what_it_began() {
    let (_dir, mut server) = served(&[]);
    server.signal(Signal::SIGTERM);
    assert_eq!(server.ended().code(), Some(0), "nothing was cut off");

    let (_dir, mut server) = served(&["--grace", "50"]);
    let mut request = long();
    request["n"] = 8.into();
    let running = begin(&server, &request);
    server.until("llamacpp:requests_processing", |n| n == 1.0);
    let waiting = begin(&server, &short());
    server.until("llamacpp:requests_deferred", |n| n == 1.0);
    server.signal(Signal::SIGINT);
    assert_eq!(Reply::read(waiting).status, 503);
    assert!(Reply::read(running).events().1, "the one at hand ends");
    assert_eq!(server.ended().code(), Some(0));

    let (_dir, mut server) = served(&["--grace", "0"]);
    let running = begin(&server, &long());
    server.until("llamacpp:requests_processing", |n| n == 1.0);
    let began = Instant::now();
    server.signal(Signal::SIGTERM);
    let reply = Reply::read(running);
    assert!(
        reply.body.contains("the server stopped") && !reply.events().1,
        "{}",
        &reply.body[reply.body.len() - 300..]
    );
    assert_eq!(server.ended().code(), Some(130), "it was cut off");
    assert!(began.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_port_that_is_taken_is_named() {
    let (_dir, server) = served(&[]);
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    fails(&["serve", path.to_str().unwrap(), "--port", &server.at.port().to_string()], 1, &["--port"]);
    fails(&["serve", path.to_str().unwrap(), "--host", "256.1.1.1"], 2, &["256.1.1.1"]);
}

/// Requests of different prompts, one after the other: what the first hundreds took is all that it takes.
#[test]
fn many_requests_take_no_more_memory() {
    let (_dir, server) = served(&[]);
    let round = |from: u32, n: u32| {
        for i in from..from + n {
            let messages = json!([{ "role": "user", "content": format!("{} number {i}", i * 7919) }]);
            server.ok("/v1/chat/completions", &json!({ "messages": messages, "max_tokens": 8 + i % 24, "seed": i }));
        }
        server.rss()
    };
    let warm = round(0, 300);
    let end = round(300, 900);
    assert!(end < warm + (16 << 20), "{warm} bytes after 300 requests, {end} after 1200");
}

//! Several models behind one server: which one answers, how they take turns in memory, and what is left when one of them
//! cannot be loaded.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value as Json, json};

use super::common::{V, fails};
use super::http::{Reply, Server};
use super::same_text::{alone, model};

/// Two models of the same shape with other weights, so that they write other texts.
fn two(dir: &Path) -> [PathBuf; 2] {
    let a = model().write(dir, "a.gguf");
    let mut other = model();
    other.tensor("token_embd.weight").data.iter_mut().skip(1).step_by(4).for_each(|b| *b ^= 0x80);
    [a, other.write(dir, "b.gguf")]
}

fn served(more: &[&str]) -> (tempfile::TempDir, [PathBuf; 2], Server) {
    let dir = tempfile::tempdir().unwrap();
    let both = two(dir.path());
    let server = Server::start_all(&[&both[0], &both[1]], more);
    (dir, both, server)
}

fn body(model: &str, seed: u64, n: usize) -> Json {
    json!({ "model": model, "prompt": "hello", "seed": seed, "max_tokens": n, "temperature": 1.2 })
}

fn state(server: &Server, model: &str) -> String {
    server.get(&format!("/v1/models/{model}")).json()["status"]["value"].as_str().unwrap().to_owned()
}

#[test]
fn a_request_names_the_model_that_answers() {
    let (_dir, [a, b], server) = served(&[]);
    let names = |list: &Json, key: &str| -> Vec<String> {
        list.as_array().unwrap().iter().map(|m| m[key].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&server.get("/v1/models").json()["data"], "id"), ["a", "b"]);
    assert_eq!(names(&server.get("/api/tags").json()["models"], "name"), ["a", "b"]);
    assert_eq!(names(&server.get("/props").json()["models"], "id"), ["a", "b"]);
    assert_eq!(server.get("/machine").json()["models"], json!(["a", "b"]));
    assert_eq!((state(&server, "a"), state(&server, "b")), ("loaded".into(), "unloaded".into()));
    let texts = [alone(&a, "hello", 3, 12)["text"].clone(), alone(&b, "hello", 3, 12)["text"].clone()];
    assert_ne!(texts[0], texts[1]);
    // No name is the first model, whichever is in memory.
    for (name, i) in [("a", 0), ("b", 1), ("", 0), ("b:latest", 1), ("a", 0)] {
        let answer = server.ok("/v1/completions", &body(name, 3, 12));
        assert_eq!(
            (&answer["choices"][0]["text"], answer["model"].as_str()),
            (&texts[i], Some(["a", "b"][i])),
            "{name}"
        );
    }
    let mut unnamed = body("a", 3, 12);
    unnamed.as_object_mut().unwrap().remove("model");
    server.ok("/v1/completions", &body("b", 3, 12));
    assert_eq!(state(&server, "b"), "loaded");
    assert_eq!(names(&server.get("/api/ps").json()["models"], "name"), ["b"]);
    assert_eq!(server.ok("/v1/completions", &unnamed)["choices"][0]["text"], texts[0]);
    let shown = server.ok("/api/show", &json!({ "name": "b" }));
    assert!(shown["model_info"]["general.architecture"].is_string(), "{shown}");
    // Each dialect refuses a name that it does not know in its own form.
    let unknown = |path: &str, mut request: Json| {
        request["model"] = "c".into();
        let reply = server.post(path, &request);
        assert_eq!(reply.status, 404, "{path}: {}", reply.body);
        reply.json()
    };
    let said = r#"this server has no model "c"; it serves "a", "b" (--alias gives more names)"#;
    let chat = json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 1 });
    let e = unknown("/v1/chat/completions", chat.clone());
    assert_eq!((e["error"]["code"].as_str(), e["error"]["message"].as_str()), (Some("model_not_found"), Some(said)));
    let e = unknown("/v1/messages", chat.clone());
    assert_eq!((e["type"].as_str(), e["error"]["type"].as_str()), (Some("error"), Some("not_found_error")));
    assert_eq!(unknown("/api/chat", chat)["error"], said);
    assert_eq!(unknown("/api/show", json!({}))["error"], said);
    assert_eq!(unknown("/tokenize", json!({ "content": "x" }))["error"]["message"], said);
    assert_eq!(unknown("/v1/embeddings", json!({ "input": "x" }))["error"]["message"], said);
    assert_eq!(server.get("/v1/models/c").status, 404);
    // Names are no paths.
    let path = a.to_str().unwrap();
    for name in [path, "../a", "a.gguf", "./a", "/etc/passwd"] {
        assert_eq!(server.post("/v1/completions", &body(name, 1, 1)).status, 404, "{name}");
    }
    assert_eq!(server.get(&format!("/v1/models/{path}")).status, 404);
    let reply = server.post("/v1/completions", &json!({ "model": ["a"], "prompt": "x" }));
    assert_eq!((reply.status, reply.json()["error"]["param"].as_str()), (400, Some("model")));
}

#[test]
fn names_are_given_once_for_each_model() {
    let (_dir, [a, b], server) = served(&["--alias", "small,mini", "--alias", "large"]);
    let ids = server.get("/v1/models").json();
    assert_eq!((&ids["data"][0]["id"], &ids["data"][1]["id"]), (&json!("small"), &json!("large")));
    for (name, id) in [("mini", "small"), ("a", "small"), ("large", "large"), ("b", "large")] {
        assert_eq!(server.ok("/v1/completions", &body(name, 1, 1))["model"], id, "{name}");
    }
    let [a, b] = [&a, &b].map(|p| p.to_str().unwrap());
    fails(&["serve", a, b, "--alias", "x"], 2, &["--alias comes 1 times for 2 models"]);
    fails(&["serve", a, b, "--alias", "x", "--alias", "x"], 2, &["two models would be called \"x\"", "--alias NAME"]);
    fails(&["serve", a, a], 2, &["two models would be called \"a\""]);
    fails(&["serve", a, b, "--timeline", "/dev/null"], 2, &["--timeline is of one model, and 2 are given"]);
    fails(&["serve", a, "/nowhere/c.gguf"], 2, &["/nowhere/c.gguf", "No such file"]);
}

/// 32 clients that ask for both, in a mixed order, some of whom go away: each text is that of `nt run` alone.
#[test]
fn texts_are_the_same_whichever_models_are_asked_for() {
    let (_dir, both, server) = served(&["--ctx", "512"]);
    let expected: Vec<[Json; 2]> =
        (0..4).map(|seed| [0, 1].map(|i| alone(&both[i], "hello", seed, 10)["text"].clone())).collect();
    std::thread::scope(|scope| {
        for client in 0..32usize {
            let (server, expected) = (&server, &expected);
            scope.spawn(move || {
                for turn in 0..3 {
                    let (seed, i) = ((client + turn) % 4, (client / 3 + turn) % 2);
                    let mut request = body(["a", "b"][i], seed as u64, 10);
                    if (client + turn) % 5 == 0 {
                        request["max_tokens"] = 200.into();
                        request["stream"] = true.into();
                        let mut stream = server.send("POST", "/v1/completions", "", request.to_string().as_bytes());
                        if turn % 2 == 0 {
                            let _ = stream.read(&mut [0; 16]);
                        }
                        continue;
                    }
                    let answer = server.ok("/v1/completions", &request);
                    assert_eq!(answer["choices"][0]["text"], expected[seed][i], "{request}");
                }
            });
        }
    });
    server.until("llamacpp:requests_processing", |n| n == 0.0);
    assert_eq!((server.metric("nt:requests_failed_total"), server.metric("nt:requests_refused_total")), (0.0, 0.0));
}

/// A client whose requests for one model never end keeps nobody from the other for more than a turn.
#[test]
fn a_model_that_is_asked_for_all_the_time_gives_way() {
    let (_dir, _, server) = served(&["--parallel", "2"]);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    assert_eq!(server.ok("/v1/completions", &body("a", 1, 20))["model"], "a");
                }
            });
        }
        server.until("llamacpp:requests_deferred", |n| n >= 3.0);
        for _ in 0..2 {
            assert_eq!(server.ok("/v1/completions", &body("b", 1, 2))["model"], "b");
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

/// Guards against a server that ends, or forgets the model that works, because another one does not.
#[test]
fn a_model_that_cannot_be_loaded_is_its_requests_error() {
    let (_dir, [_, b], server) = served(&[]);
    std::fs::remove_file(&b).unwrap();
    for path in ["/v1/completions", "/api/generate"] {
        let mut request = body("b", 1, 2);
        if path == "/api/generate" {
            request = json!({ "model": "b", "prompt": "x", "stream": false });
        }
        let reply = server.post(path, &request);
        assert_eq!(reply.status, 503, "{}", reply.body);
        assert!(reply.body.contains("could not be loaded") && reply.body.contains("b.gguf"), "{}", reply.body);
        // Behind the first attempt nobody else's model is given up for another one.
        assert!(reply.head.contains("retry-after: "), "{}", reply.head);
    }
    assert_eq!(state(&server, "b"), "unloaded");
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.ok("/v1/completions", &body("a", 1, 2))["model"], "a");
    assert_eq!(server.post("/v1/completions", &body("b", 1, 2)).status, 503);
    assert_eq!(state(&server, "a"), "loaded");
    // A stream is refused before it begins.
    let request = json!({ "model": "b", "prompt": "x", "stream": true });
    assert_eq!(server.post("/v1/completions", &request).status, 503);
}

/// Whoever closes the connection while another model is awaited gives its place up, and the server ends at once when it
/// is asked to, whatever waits.
#[test]
fn clients_that_go_away_are_not_loaded_for() {
    let (_dir, _, mut server) = served(&["--parallel", "1"]);
    let mut long = body("a", 1, 240);
    (long["n"], long["ignore_eos"], long["stream"]) = (128.into(), true.into(), true.into());
    let running = server.send("POST", "/v1/completions", "", long.to_string().as_bytes());
    server.until("llamacpp:requests_processing", |n| n == 1.0);
    let other = server.send("POST", "/v1/completions", "", body("b", 1, 2).to_string().as_bytes());
    server.until("vllm:num_requests_waiting{model_name=\"b\"}", |n| n == 1.0);
    drop(other);
    server.until("llamacpp:requests_deferred", |n| n == 0.0);
    assert_eq!(state(&server, "b"), "unloaded");
    let waits = server.send("POST", "/v1/completions", "", body("b", 1, 2).to_string().as_bytes());
    server.until("llamacpp:requests_deferred", |n| n == 1.0);
    server.signal(Signal::SIGTERM);
    assert_eq!(Reply::read(waits).status, 503);
    drop(running);
    assert_eq!(server.ended().code(), Some(0));
}

#[test]
fn a_model_is_given_up_when_a_request_says_so() {
    let (_dir, [a, _], server) = served(&[]);
    let loaded = || server.get("/api/ps").json()["models"].as_array().unwrap().len();
    assert_eq!(loaded(), 1);
    assert!(server.get("/api/ps").json()["models"][0]["expires_at"].as_str().unwrap().starts_with("9999"));
    for (path, key) in [("/api/generate", "response"), ("/api/chat", "message")] {
        let answer = server.ok(path, &json!({ "model": "a", "keep_alive": 0 }));
        assert_eq!((&answer["done_reason"], &answer["done"]), (&json!("unload"), &json!(true)), "{answer}");
        assert!(answer[key].is_string() || answer[key].is_object(), "{answer}");
        server.until("nt:model_loaded{model_name=\"a\"}", |n| n == 0.0);
        assert_eq!((loaded(), server.get("/health").status), (0, 200));
        assert_eq!(server.get("/machine").json()["phase"], "unloaded");
        assert_eq!(server.get("/slots").json(), json!([]));
        // One that is not there stays so.
        server.ok(path, &json!({ "model": "b", "keep_alive": "0s" }));
        assert_eq!(loaded(), 0);
        // The next request loads it, and says how long that took.
        let answer = server.ok(path, &json!({ "model": "a", "stream": false }));
        assert_eq!(answer["done_reason"], "load");
        assert!(answer["load_duration"].as_u64().unwrap() > 0, "{answer}");
        assert_eq!(loaded(), 1);
    }
    // Behind an answer.
    let request = json!({ "model": "a", "prompt": "hello", "raw": true, "stream": false, "keep_alive": "10ms",
        "options": { "seed": 3, "num_predict": 12, "temperature": 1.2 } });
    let answer = server.ok("/api/generate", &request);
    assert_eq!(answer["response"], alone(&a, "hello", 3, 12)["text"]);
    server.until("nt:model_loaded{model_name=\"a\"}", |n| n == 0.0);
    let answer = server.ok("/v1/completions", &body("a", 3, 12));
    assert!(answer["timings"]["load_ms"].as_f64().unwrap() > 0.0, "{answer}");
    assert_eq!(answer["choices"][0]["text"], alone(&a, "hello", 3, 12)["text"]);
    let again = server.ok("/v1/completions", &body("a", 3, 12));
    assert_eq!(again["timings"]["load_ms"], 0.0);
    // A vector's request, too.
    server.ok("/api/embed", &json!({ "model": "a", "input": "x", "keep_alive": 0 }));
    server.until("nt:model_loaded{model_name=\"a\"}", |n| n == 0.0);
    for wrong in [json!("5 minutes"), json!([]), json!(true)] {
        let reply = server.post("/api/generate", &json!({ "model": "a", "prompt": "x", "keep_alive": wrong }));
        assert_eq!(reply.status, 400, "{wrong}");
        assert!(reply.body.contains("keep_alive: a number of seconds"), "{}", reply.body);
    }
}

#[test]
fn a_model_is_given_up_after_the_servers_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let server = Server::start(&path, &["--keep-alive", "100ms"]);
    server.until("nt:model_loaded", |n| n == 0.0);
    server.ok("/v1/completions", &json!({ "prompt": "x", "max_tokens": 2 }));
    // A request may say that it stays.
    server.ok("/api/generate", &json!({ "model": "m", "keep_alive": -1, "stream": false }));
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(server.metric("nt:model_loaded"), 1.0);
    fails(&["serve", path.to_str().unwrap(), "--keep-alive", "soon"], 2, &["a time was expected"]);
}

/// Models that take turns leave nothing behind.
#[test]
fn memory_does_not_grow_with_turns() {
    let (_dir, _, server) = served(&[]);
    let turns = |n: usize| {
        for i in 0..n {
            server.ok("/v1/completions", &body(["b", "a"][i % 2], 1, 2));
        }
    };
    turns(10);
    let (rss, threads, files) = (server.rss(), server.threads(), server.open_files());
    turns(60);
    assert!(server.rss() < rss + (8 << 20), "{} and {rss} bytes", server.rss());
    assert!(server.threads() <= threads + 2 && server.open_files() <= files + 4);
}

/// What is cached is one model's, and comes back with it where there is a folder for it.
#[test]
fn kept_prompts_are_of_one_model() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = two(dir.path());
    let folder = dir.path().join("cache");
    let prompt = "once upon a time there was a machine ".repeat(3);
    let asked = |server: &Server, model: &str| {
        let request = json!({ "model": model, "prompt": prompt, "max_tokens": 8, "seed": 3, "temperature": 1.2 });
        let answer = server.ok("/v1/completions", &request);
        (
            answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap(),
            answer["choices"][0]["text"].clone(),
        )
    };
    let server = Server::start_all(&[&a, &b], &[]);
    let (first, second) = (asked(&server, "a"), asked(&server, "b"));
    assert_eq!((first.0, second.0), (0, 0));
    assert_eq!(asked(&server, "a"), (0, first.1.clone()));
    assert!(asked(&server, "a").0 > 64);
    drop(server);
    let server = Server::start_all(&[&a, &b], &["--cache-dir", folder.to_str().unwrap()]);
    for turn in 0..3 {
        for (name, text) in [("a", &first.1), ("b", &second.1)] {
            let (cached, again) = asked(&server, name);
            assert!(again == *text && (cached > 64) == (turn > 0), "{name}, turn {turn}: {cached} {again}");
        }
    }
}

#[test]
fn each_model_has_a_context_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let [a, _] = two(dir.path());
    let mut short = model();
    short.set("llama.context_length", V::U32(64));
    let short = short.write(dir.path(), "short.gguf");
    let server = Server::start_all(&[&a, &short], &[]);
    let n_ctx = |name: &str| server.get(&format!("/v1/models/{name}")).json()["meta"]["n_ctx"].as_u64().unwrap();
    assert!(n_ctx("a") > 64 && n_ctx("short") == 64);
    let request = |name: &str| json!({ "model": name, "prompt": "x".repeat(100), "max_tokens": 1 });
    server.ok("/v1/completions", &request("a"));
    // Refused without loading it.
    let reply = server.post("/v1/completions", &request("short"));
    assert_eq!((reply.status, state(&server, "a").as_str()), (400, "loaded"), "{}", reply.body);
}

/// A model that is overwritten where it streams from: its requests fail with a sentence, those of others are answered, and
/// it is not loaded again with a header that is another file's.
#[test]
fn a_model_that_is_overwritten_is_not_answered_with() {
    use std::os::unix::fs::FileExt;
    let (_dir, [a, _], server) = served(&["--tiers", "0:1:1"]);
    server.ok("/v1/completions", &body("a", 1, 4));
    let file = std::fs::File::options().write(true).open(&a).unwrap();
    file.write_all_at(&[0x3c; 64], file.metadata().unwrap().len() - 64).unwrap();
    for turn in 0..2 {
        for _ in 0..2 {
            let reply = server.post("/v1/completions", &body("a", 1, 4));
            assert!(reply.status >= 500 && reply.body.contains("has been written to since"), "{}", reply.body);
        }
        server.ok("/v1/completions", &body("b", turn, 4));
    }
}

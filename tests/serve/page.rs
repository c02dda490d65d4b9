//! The page at `/`, and that what it reads is there.

use serde_json::{Value as Json, json};

use super::http::{Reply, Server};
use super::same_text::model;

fn served(more: &[&str]) -> (tempfile::TempDir, Server) {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let server = Server::start(&path, more);
    (dir, server)
}

fn page(server: &Server) -> Reply {
    Reply::read(server.send("GET", "/", "Accept: text/html,application/xhtml+xml;q=0.9\r\n", b""))
}

#[test]
fn the_page_is_for_browsers_and_nothing_may_run_or_be_loaded_in_it_but_its_own() {
    let (_dir, server) = served(&[]);
    let reply = page(&server);
    assert_eq!(reply.status, 200);
    for header in [
        "content-type: text/html; charset=utf-8",
        "content-security-policy: default-src 'none'; script-src 'sha256-",
        "connect-src 'self'",
        "frame-ancestors 'none'",
        "x-content-type-options: nosniff",
        "x-frame-options: deny",
        "referrer-policy: no-referrer",
    ] {
        assert!(reply.head.contains(header), "{header}: {}", reply.head);
    }
    assert!(reply.body.starts_with("<!doctype html>") && reply.body.trim_end().ends_with("</html>"));
    assert!(!reply.body.contains("http://") && !reply.body.contains("https://"));
    // Clients of Ollama find what they look for.
    let plain = server.get("/");
    assert_eq!((plain.status, plain.body.as_str()), (200, "Ollama is running (nt serve)\n"));
    // No page of another site can have an answer as a script or a picture.
    let head = server.get("/machine").head;
    assert!(
        head.contains("x-content-type-options: nosniff") && head.contains("cross-origin-resource-policy: same-origin")
    );
}

#[test]
fn what_the_page_reads_is_there() {
    let (_dir, server) = served(&[]);
    let before = server.get("/machine").json();
    server.ok("/v1/completions", &json!({ "prompt": "x", "max_tokens": 5, "ignore_eos": true, "seed": 1 }));
    let now = server.get("/machine").json();
    for (field, is) in [
        ("/model", Json::is_string as fn(&Json) -> bool),
        ("/version", Json::is_string),
        ("/phase", Json::is_string),
        ("/time_s", Json::is_f64),
        ("/n_ctx", Json::is_u64),
        ("/backend", Json::is_string),
        ("/plan/a/units", Json::is_u64),
        ("/plan/b/bytes", Json::is_u64),
        ("/plan/c/bytes", Json::is_u64),
        ("/roofline", Json::is_object),
        ("/links/nvme/bytes", Json::is_u64),
        ("/links/nvme/used", Json::is_boolean),
        ("/links/ram/bytes", Json::is_u64),
        ("/links/gpu/used", Json::is_boolean),
        ("/passes/count", Json::is_u64),
        ("/queue/slots", Json::is_u64),
        ("/queue/waiting", Json::is_u64),
        ("/queue/most", Json::is_u64),
        ("/queue/running", Json::is_array),
        ("/totals/done", Json::is_u64),
        ("/totals/failed", Json::is_u64),
        ("/totals/refused", Json::is_u64),
        ("/totals/cancelled", Json::is_u64),
        ("/totals/prompt_tokens", Json::is_u64),
        ("/totals/cached_tokens", Json::is_u64),
        ("/totals/generated", Json::is_u64),
    ] {
        assert!(now.pointer(field).is_some_and(is), "{field}: {now}");
    }
    let of = |m: &Json, field: &str| m.pointer(field).and_then(Json::as_u64).unwrap();
    assert_eq!(of(&now, "/totals/generated") - of(&before, "/totals/generated"), 5);
    assert!(of(&now, "/passes/count") > of(&before, "/passes/count"));
    assert!(of(&now, "/links/ram/bytes") > of(&before, "/links/ram/bytes"));
    // A request at hand is seen.
    let busy = json!({ "prompt": "x", "max_tokens": 240, "n": 64, "ignore_eos": true, "stream": true, "seed": 1 });
    let stream = server.send("POST", "/v1/completions", "", busy.to_string().as_bytes());
    server.until("llamacpp:requests_processing", |n| n == 1.0);
    let running = server.get("/machine").json()["queue"]["running"][0].clone();
    for field in ["slot", "prompt", "evaluated", "generated", "most"] {
        assert!(running[field].is_u64(), "{field}: {running}");
    }
    drop(stream);
    // What the chat reads of a stream.
    let chat = json!({
        "messages": [{ "role": "user", "content": "x" }], "stream": true, "stream_options": { "include_usage": true },
        "max_tokens": 3, "temperature": 0.5, "seed": 1,
    });
    let (events, done) = server.post("/v1/chat/completions", &chat).events();
    assert!(done && events[0].pointer("/choices/0/delta").is_some());
    let last = events.last().unwrap();
    assert!(
        last["usage"]["completion_tokens"].is_u64() && last["usage"]["prompt_tokens_details"]["cached_tokens"].is_u64()
    );
    assert!(last["timings"]["predicted_per_second"].is_number(), "{last}");
}

#[test]
fn the_page_is_free_and_what_it_shows_needs_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let keys = dir.path().join("keys");
    std::fs::write(&keys, "secret\n").unwrap();
    let server = Server::start(&path, &["--api-key-file", keys.to_str().unwrap()]);
    assert_eq!(page(&server).status, 200);
    assert_eq!(server.get("/machine").status, 401);
    let with = Reply::read(server.send("GET", "/machine", "Authorization: Bearer secret\r\n", b""));
    assert_eq!(with.status, 200);
    // A page of another site gets neither.
    for path in ["/", "/machine"] {
        let headers = "Origin: http://evil.example\r\nAuthorization: Bearer secret\r\nAccept: text/html\r\n";
        assert_eq!(Reply::read(server.send("GET", path, headers, b"")).status, 403, "{path}");
    }
}

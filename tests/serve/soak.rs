//! Thousands of requests of 32 clients at once, well-behaved and not: `scripts/soak-serve.sh`.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value as Json, json};

use super::http::{Reply, Server};
use super::same_text::model;

const CLIENTS: usize = 32;
/// Memory may grow by this behind the first fifth of the requests.
const GROWTH: u64 = 48 << 20;

/// What came of the requests.
#[derive(Default)]
struct Seen {
    /// Of each request that was answered whole, its text.
    texts: Mutex<HashMap<String, String>>,
    answered: AtomicUsize,
    refused: AtomicUsize,
    malformed: AtomicUsize,
}

/// A request and where it goes. There are few of a kind, so that texts are seen again.
fn request(rng: &mut ChaCha8Rng) -> (&'static str, Json) {
    let words = ["once upon a time", "the sea", "a machine that reads", "hello", "why is the sky blue and the sun red"];
    let text = words[rng.random_range(0..words.len())].repeat(1 + rng.random_range(0..3));
    let (seed, n) = (rng.random_range(0..3u64), 8 * rng.random_range(1..=8u64));
    let messages = json!([{ "role": "user", "content": text }]);
    let stream = rng.random_range(0..2) == 0;
    match rng.random_range(0..7) {
        0 => ("/v1/messages", json!({ "messages": messages, "seed": seed, "max_tokens": n, "stream": stream })),
        1 => {
            let options = json!({ "seed": seed, "num_predict": n });
            ("/api/chat", json!({ "messages": messages, "options": options, "stream": stream }))
        }
        5 => {
            ("/completion", json!({ "prompt": text, "seed": seed, "n_predict": n, "stream": stream, "n_probs": n % 3 }))
        }
        2 => ("/v1/embeddings", json!({ "input": [text, "x"] })),
        3 => ("/v1/responses", json!({ "input": text, "seed": seed, "max_output_tokens": n, "stream": stream })),
        4 => {
            let top = rng.random_range(0..4);
            let request = json!({ "messages": messages, "seed": seed, "max_tokens": n, "stream": stream,
                "logprobs": top > 0, "top_logprobs": top, "n": 1 + rng.random_range(0..3) });
            ("/v1/chat/completions", request)
        }
        _ => ("/v1/completions", json!({ "prompt": text, "seed": seed, "max_tokens": n, "stream": stream })),
    }
}

/// The words of an answer, whatever its form.
fn words(reply: &Reply) -> String {
    let each = |json: &Json, out: &mut String| {
        for at in [
            "/content",
            "/choices/0/text",
            "/choices/0/message/content",
            "/choices/0/delta/content",
            "/content/0/text",
            "/delta/text",
            "/message/content",
            "/output/0/content/0/text",
        ] {
            out.push_str(json.pointer(at).and_then(Json::as_str).unwrap_or(""));
        }
        if json["type"] == "response.output_text.delta" {
            out.push_str(json["delta"].as_str().unwrap_or(""));
        }
        if let Some(vector) = json.pointer("/data/0/embedding") {
            out.push_str(&vector.to_string());
        }
        // Of several answers that are streamed, the order is not the same each time.
        if json.pointer("/choices/0/index").is_some_and(|i| *i != 0) {
            out.clear();
        }
    };
    let mut out = String::new();
    for line in reply.body.lines() {
        let line = line.strip_prefix("data: ").unwrap_or(line);
        if let Ok(json) = serde_json::from_str::<Json>(line) {
            let mut more = String::new();
            each(&json, &mut more);
            out.push_str(&more);
        }
    }
    out
}

/// A request that is read to its end: its text is that of the time before.
fn whole(server: &Server, rng: &mut ChaCha8Rng, seen: &Seen) {
    let (path, body) = request(rng);
    loop {
        let reply = server.post(path, &body);
        if reply.status == 429 {
            seen.refused.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(rng.random_range(5..100)));
            continue;
        }
        assert_eq!(reply.status, 200, "{path} {body}: {}", reply.body);
        assert!(!reply.body.contains("\"error\":{"), "{path} {body}: {}", reply.body);
        let text = words(&reply);
        let mut key = body.clone();
        // Streamed or not, it is the same.
        key.as_object_mut().unwrap().remove("stream");
        let mut texts = seen.texts.lock().unwrap();
        let first = texts.entry(format!("{path} {key}")).or_insert_with(|| text.clone());
        assert_eq!(*first, text, "{path} {body}");
        seen.answered.fetch_add(1, Ordering::Relaxed);
        return;
    }
}

/// A client that goes away, having read nothing or a bit, at once or slowly.
fn leaves(server: &Server, rng: &mut ChaCha8Rng, slow: bool) {
    let (path, mut body) = request(rng);
    body["stream"] = true.into();
    if path == "/v1/embeddings" {
        body.as_object_mut().unwrap().remove("stream");
    }
    let mut stream = server.send("POST", path, "", body.to_string().as_bytes());
    let mut some = vec![0; rng.random_range(1..64)];
    for _ in 0..rng.random_range(0..if slow { 40 } else { 3 }) {
        if !matches!(stream.read(&mut some), Ok(1..)) {
            return;
        }
        if slow {
            std::thread::sleep(Duration::from_millis(rng.random_range(1..30)));
        }
    }
}

/// A client process that is killed.
fn killed(server: &Server, rng: &mut ChaCha8Rng) {
    let (path, body) = request(rng);
    let body = body.to_string();
    let script = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{}; printf 'POST {path} HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: {}\\r\\n\\r\\n' >&3; printf '%s' '{body}' >&3; exec cat <&3",
        server.at.port(),
        body.len()
    );
    let child = Command::new("bash").args(["-c", &script]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut child = child.unwrap();
    std::thread::sleep(Duration::from_millis(rng.random_range(0..60)));
    // SIGKILL.
    child.kill().unwrap();
    child.wait().unwrap();
}

/// What is no request: it gets a 4xx.
fn malformed(server: &Server, rng: &mut ChaCha8Rng, seen: &Seen) {
    let (path, body) = request(rng);
    let mut body = body.to_string().into_bytes();
    match rng.random_range(0..4) {
        0 => body.truncate(body.len() / 2),
        1 => body = (0..rng.random_range(0..500)).map(|_| rng.random_range(0..=255u8)).collect(),
        2 => body = b"{\"prompt\": 5, \"messages\": {}, \"input\": null, \"max_tokens\": []}".to_vec(),
        _ => {
            // A head that says more than there is.
            let mut stream = server.connect();
            let _ = write!(stream, "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n{{");
            return;
        }
    }
    let reply = Reply::read(server.send("POST", path, "", &body));
    assert!((400..500).contains(&reply.status), "{path} {}: {}", String::from_utf8_lossy(&body), reply.body);
    seen.malformed.fetch_add(1, Ordering::Relaxed);
}

fn client(server: &Server, next: &AtomicUsize, all: usize, seen: &Seen, rss: &Mutex<Vec<u64>>) {
    loop {
        let i = next.fetch_add(1, Ordering::Relaxed);
        if i >= all {
            return;
        }
        let mut rng = ChaCha8Rng::seed_from_u64(i as u64);
        match rng.random_range(0..20) {
            0..2 => leaves(server, &mut rng, false),
            2 => leaves(server, &mut rng, true),
            3 => killed(server, &mut rng),
            4..6 => malformed(server, &mut rng, seen),
            _ => whole(server, &mut rng, seen),
        }
        if i.is_multiple_of((all / 50).max(1)) {
            rss.lock().unwrap().push(server.rss());
        }
    }
}

#[test]
#[ignore = "takes minutes: scripts/soak-serve.sh runs it"]
fn many_requests_of_many_clients() {
    let all: usize = std::env::var("NT_SOAK_REQUESTS").map_or(10_000, |n| n.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let path = match std::env::var_os("NT_SOAK_MODEL") {
        Some(path) => path.into(),
        None => model().write(dir.path(), "m.gguf"),
    };
    let server = Server::start(&path, &["--ctx", "1024", "--max-queue", "24", "--max-connections", "48"]);
    let ask = json!({ "prompt": "hello", "seed": 1, "max_tokens": 16 });
    let before = server.ok("/v1/completions", &ask)["choices"][0]["text"].clone();
    let files = server.open_files();
    let (seen, next, rss) = (Seen::default(), AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| client(&server, &next, all, &seen, &rss));
        }
    });
    server.until("llamacpp:requests_processing", |n| n == 0.0);
    server.until("llamacpp:requests_deferred", |n| n == 0.0);
    assert_eq!(server.ok("/v1/completions", &ask)["choices"][0]["text"], before);
    let rss = rss.into_inner().unwrap();
    let (warm, most) = (rss[..rss.len() / 5].iter().max().unwrap(), rss.iter().max().unwrap());
    let mib = |n: u64| n >> 20;
    println!(
        "{all} requests: {} answered whole, {} different, {} malformed, {} told to come again; {} done, {} cancelled, {} passes with {:.2} texts each; {} MiB after a fifth, {} at most, {} at the end",
        seen.answered.load(Ordering::Relaxed),
        seen.texts.lock().unwrap().len(),
        seen.malformed.load(Ordering::Relaxed),
        seen.refused.load(Ordering::Relaxed),
        server.metric("nt:requests_done_total"),
        server.metric("nt:requests_cancelled_total"),
        server.metric("llamacpp:n_decode_total"),
        server.metric("llamacpp:n_busy_slots_per_decode"),
        mib(*warm),
        mib(*most),
        mib(server.rss()),
    );
    assert!(most - warm < GROWTH, "memory grows: {rss:?}");
    assert_eq!(server.metric("nt:requests_failed_total"), 0.0);
    // Connections of clients that are gone are gone.
    let began = std::time::Instant::now();
    while server.open_files() > files + 2 {
        assert!(began.elapsed() < Duration::from_secs(60), "{} files are open, {files} at first", server.open_files());
        std::thread::sleep(Duration::from_millis(100));
    }
}

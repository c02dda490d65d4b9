//! The text of a request is that of `nt run` alone with the same seed, whatever else is queued, cached or cancelled.

use serde_json::{Value as Json, json};

use super::common::{File, V, nt, tiny};
use super::http::{Reply, Server, backend};

/// A template whose prompts begin alike.
const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

pub fn model() -> File {
    let mut f = tiny(2);
    f.set("tokenizer.chat_template", V::Str(TEMPLATE.into()));
    f
}

/// The text of `nt run` alone.
pub fn alone(model: &std::path::Path, prompt: &str, seed: u64, n: usize) -> Json {
    let (seed, n) = (seed.to_string(), n.to_string());
    let args = ["run", model.to_str().unwrap(), "--backend", &backend(), "--threads", "1", "--json", "-p", prompt];
    let out = nt(&[&args[..], &["-n", &n, "--seed", &seed, "--temp", "1.2"]].concat());
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

fn body(prompt: &str, seed: u64, n: usize) -> Json {
    json!({ "prompt": prompt, "seed": seed, "max_tokens": n, "temperature": 1.2 })
}

/// 32 clients at once in a mixed order: prompts that share beginnings, streams and whole answers, and others that go
/// away in the middle.
#[test]
fn of_many_clients_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let stem = "Once upon a time there was a machine that read the same words over and over, and each time it ";
    let prompts: Vec<String> = (0..8).map(|i| format!("{}{i}", &stem[..20 + 9 * i])).collect();
    let expected: Vec<Json> = prompts.iter().enumerate().map(|(i, p)| alone(&path, p, i as u64, 8 + 3 * i)).collect();
    for (parallel, ctx) in [("1", "256"), ("4", "256"), ("4", "1024"), ("12", "1024")] {
        let server = Server::start(&path, &["--ctx", ctx, "--parallel", parallel]);
        clients(&server, &prompts, &expected);
    }
}

/// 32 of them: some stream, some read whole answers, some go away.
fn clients(server: &Server, prompts: &[String], expected: &[Json]) {
    std::thread::scope(|scope| {
        for client in 0..32usize {
            scope.spawn(move || {
                for turn in 0..4 {
                    let i = (client * 5 + turn * 3) % prompts.len();
                    let mut body = body(&prompts[i], i as u64, 8 + 3 * i);
                    match (client + turn) % 4 {
                        // It goes away, having read nothing, or a bit.
                        0 => {
                            body["stream"] = true.into();
                            body["max_tokens"] = 200.into();
                            let mut stream = server.send("POST", "/v1/completions", "", body.to_string().as_bytes());
                            if turn % 2 == 0 {
                                let _ = std::io::Read::read(&mut stream, &mut [0; 16]);
                            }
                        }
                        1 => {
                            body["stream"] = true.into();
                            let reply = server.post("/v1/completions", &body);
                            let (events, done) = reply.events();
                            assert!(done, "{}", reply.body);
                            let text: String = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
                            assert_eq!(text, expected[i]["text"].as_str().unwrap(), "prompt {i}");
                        }
                        _ => {
                            let answer = server.ok("/v1/completions", &body);
                            assert_eq!(answer["choices"][0]["text"], expected[i]["text"], "prompt {i}");
                            assert_eq!(answer["usage"]["completion_tokens"], expected[i]["generated_tokens"]);
                            assert_eq!(answer["usage"]["prompt_tokens"], expected[i]["prompt_tokens"]);
                        }
                    }
                }
            });
        }
    });
    assert!(server.metric("nt:prompt_tokens_cached_total") > 0.0, "nothing was taken from the cache");
    server.until("llamacpp:requests_processing", |n| n == 0.0);
}

/// The next turn of a conversation: what the model said before is a prompt then, and is computed as one.
#[test]
fn of_a_conversation_that_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let server = Server::start(&path, &["--ctx", "256"]);
    let mut messages = vec![json!({ "role": "user", "content": "hello there, machine" })];
    let mut rendered = String::from("<user>hello there, machine<assistant>");
    let mut before = 0;
    for turn in 0..3u64 {
        let request = json!({ "messages": messages, "seed": turn, "max_tokens": 12, "temperature": 1.2 });
        let answer = server.ok("/v1/chat/completions", &request);
        let expected = alone(&path, &rendered, turn, 12);
        let said = answer["choices"][0]["message"]["content"].as_str().unwrap();
        assert_eq!(said, expected["text"].as_str().unwrap(), "turn {turn}");
        assert_eq!(answer["usage"]["prompt_tokens"], expected["prompt_tokens"]);
        let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        // The whole prompt of the turn before, and nothing of its answer.
        assert!(cached <= before && (turn == 0 || cached > 0), "turn {turn}: {cached} of {before}");
        before = answer["usage"]["prompt_tokens"].as_u64().unwrap();
        messages.push(json!({ "role": "assistant", "content": said }));
        messages.push(json!({ "role": "user", "content": "and?" }));
        rendered = format!("{rendered}{said}<user>and?<assistant>");
    }
}

/// The cache never stands in the way: prompts that fill the context push out what is kept, to the last position.
#[test]
fn where_the_context_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let server = Server::start(&path, &["--ctx", "200"]);
    for (round, n) in [150, 199, 100, 180, 150, 5].into_iter().enumerate() {
        let prompt: String = (0..n - 1).map(|i| char::from(b'a' + ((i * (round % 2 + 1)) % 23) as u8)).collect();
        let (n, seed) = (n.to_string(), "3");
        let args = ["run", path.to_str().unwrap(), "--backend", &backend(), "--json", "--temp", "1.2", "--ctx", "200"];
        let out = nt(&[&args[..], &["-p", &prompt, "-n", "-1", "--seed", seed]].concat());
        let expected: Json = serde_json::from_slice(&out.stdout).unwrap();
        let answer = server.ok("/v1/completions", &json!({ "prompt": prompt, "seed": 3, "temperature": 1.2 }));
        assert_eq!(answer["choices"][0]["text"], expected["text"], "{n} tokens");
    }
    let long = "x".repeat(200);
    let reply = server.post("/v1/completions", &json!({ "prompt": long }));
    assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (400, Some("context_length_exceeded")));
}

/// Each of several answers is that of its own seed.
#[test]
fn of_several_answers_to_one_request() {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let server = Server::start(&path, &[]);
    let mut request = body("Tell me", 40, 10);
    request["n"] = 3.into();
    let answer = server.ok("/v1/completions", &request);
    for i in 0..3 {
        assert_eq!(answer["choices"][i]["text"], alone(&path, "Tell me", 40 + i as u64, 10)["text"], "answer {i}");
    }
    request["stream"] = true.into();
    let reply: Reply = server.post("/v1/completions", &request);
    for i in 0..3 {
        let of_it = |e: &&Json| e["choices"][0]["index"] == i;
        let text: String =
            reply.events().0.iter().filter(of_it).filter_map(|e| e["choices"][0]["text"].as_str()).collect();
        assert_eq!(answer["choices"][i]["text"], text);
    }
}

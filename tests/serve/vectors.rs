//! Vectors of texts: the final hidden states, pooled, in the forms of OpenAI and Ollama.

use nt::backend::{BackendKind, Class};
use nt::engine::{Opened, Options, Session};
use nt::model::Outputs;
use serde_json::{Value as Json, json};

use super::common::tiny;
use super::http::Server;
use super::same_text::model;

fn numbers(v: &Json) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The head makes the logits of these states, however the text was cut.
#[test]
fn hidden_states_are_what_the_head_is_given() {
    let d = tempfile::tempdir().unwrap();
    let mut file = tiny(3);
    let opened = Opened::open(&file.write(d.path(), "m.gguf")).unwrap();
    let tied = file.tensors.iter().find(|t| t.name == "output.weight").map_or("token_embd.weight", |_| "output.weight");
    let tied = tied.to_owned();
    let head = file.tensor(&tied);
    let head: Vec<f32> = head.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let options = Options { threads: 2, ram: Some(64 << 20), max_batch: 32, ..Options::new(BackendKind::Cpu, 256) };
    let mut s = Session::new(&opened, options, &mut |_, _| ()).unwrap();
    let tokens: Vec<u32> = (0..30).map(|i| 20 + i * 7 % 200).collect();
    s.eval(&tokens, Class::Bulk, Outputs::Last, &|| false).unwrap();
    let logits = s.logits().unwrap().to_vec();
    let whole = s.fork_at(0).unwrap();
    let states = s.hidden(whole, &tokens, &|| false).unwrap().to_vec();
    let width = s.n_embd();
    assert_eq!(states.len(), tokens.len() * width);
    let last = &states[states.len() - width..];
    for (row, logit) in head.chunks_exact(width).zip(&logits) {
        let made: f32 = row.iter().zip(last).map(|(w, x)| w * x).sum();
        assert!((made - logit).abs() < 0.05 * (1.0 + logit.abs()), "{made} for {logit}");
    }
    let (cut, mut pieces) = (s.fork_at(0).unwrap(), Vec::new());
    for piece in tokens.chunks(7) {
        pieces.extend_from_slice(s.hidden(cut, piece, &|| false).unwrap());
    }
    assert!(pieces.iter().map(|x| x.to_bits()).eq(states.iter().map(|x| x.to_bits())), "bits depend on how it is cut");
    // The next pass of the session gives logits again.
    s.truncate(0);
    s.eval(&tokens, Class::Bulk, Outputs::Last, &|| false).unwrap();
    assert_eq!(s.logits().unwrap(), logits);
}

#[test]
fn vectors_in_the_forms_of_openai() {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "tiny.gguf");
    let server = Server::start(&path, &["--batch", "16"]);
    let text = "a text that is longer than one pass of sixteen tokens";
    let one = server.ok("/v1/embeddings", &json!({ "model": "tiny", "input": text, "user": "me" }));
    let n = text.len() as u64 + 1;
    assert_eq!((&one["object"], &one["data"][0]["object"]), (&json!("list"), &json!("embedding")));
    assert_eq!(one["usage"], json!({ "prompt_tokens": n, "total_tokens": n }));
    let vector = numbers(&one["data"][0]["embedding"]);
    assert!((vector.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5 && vector.len() == 64);
    // Several at once, as words and as tokens: each is what it is alone.
    let ids = server.ok("/tokenize", &json!({ "content": text, "add_special": true }))["tokens"].clone();
    let several = server.ok("/v1/embeddings", &json!({ "input": ["another", text, "x"] }));
    assert_eq!(several["data"][1]["embedding"], one["data"][0]["embedding"]);
    assert_eq!(several["data"][2]["index"], 2);
    let as_ids = server.ok("/v1/embeddings", &json!({ "input": ids }));
    assert_eq!(as_ids["data"][0]["embedding"], one["data"][0]["embedding"]);
    let lists = server.ok("/v1/embeddings", &json!({ "input": [ids, [256, 120]] }));
    assert_eq!(lists["data"][0]["embedding"], one["data"][0]["embedding"]);
    assert_eq!(lists["data"][1]["embedding"], several["data"][2]["embedding"]);
    let encoded = server.ok("/v1/embeddings", &json!({ "input": text, "encoding_format": "base64" }));
    let encoded = encoded["data"][0]["embedding"].as_str().unwrap();
    assert!(encoded.len() == (64 * 4usize).div_ceil(3) * 4 && encoded.ends_with('='), "{encoded}");
    for (more, param) in [
        (json!({}), "input"),
        (json!({ "input": [] }), "input"),
        (json!({ "input": [1.5] }), "input"),
        (json!({ "input": [999] }), "input"),
        (json!({ "input": [[1], {}] }), "input"),
        (json!({ "input": vec!["x"; 2049] }), "input"),
        (json!({ "input": "x".repeat(300) }), "input"),
        (json!({ "input": "x", "dimensions": 8 }), "dimensions"),
        (json!({ "input": "x", "encoding_format": "f16" }), "encoding_format"),
        (json!({ "input": "x", "colour": 8 }), "colour"),
    ] {
        let reply = server.post("/v1/embeddings", &more);
        let error = &reply.json()["error"];
        assert_eq!((reply.status, error["param"].as_str()), (400, Some(param)), "{error}");
    }
    // The last token's state, of another server.
    let last = Server::start(&path, &["--pooling", "last"]);
    // What the file says, where the command line does not.
    let mut file = super::same_text::model();
    file.set("llama.pooling_type", super::common::V::U32(3));
    let own = Server::start(&file.write(path.parent().unwrap(), "own.gguf"), &[]);
    let other = numbers(&last.ok("/v1/embeddings", &json!({ "input": text }))["data"][0]["embedding"]);
    assert!(cosine(&vector, &other) < 0.999, "poolings differ");
    assert_eq!(numbers(&own.ok("/v1/embeddings", &json!({ "input": text }))["data"][0]["embedding"]), other);
}

#[test]
fn vectors_in_the_forms_of_ollama() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&model().write(dir.path(), "tiny.gguf"), &["--ctx", "64"]);
    let expected = server.ok("/v1/embeddings", &json!({ "input": ["ab", "cd"] }));
    let answer = server.ok("/api/embed", &json!({ "model": "tiny:latest", "input": ["ab", "cd"], "keep_alive": "5m" }));
    for i in 0..2 {
        assert_eq!(answer["embeddings"][i], expected["data"][i]["embedding"]);
    }
    assert_eq!(answer["prompt_eval_count"], 6);
    let one = server.ok("/api/embeddings", &json!({ "model": "tiny", "prompt": "ab" }));
    assert_eq!(one["embedding"], answer["embeddings"][0]);
    // A text that is too long is cut, unless that is not wanted.
    let long = "ab".repeat(50);
    let cut = server.ok("/api/embed", &json!({ "input": long }));
    assert_eq!(cut["prompt_eval_count"], 64);
    let cut = server.ok("/api/embed", &json!({ "input": "abcd", "options": { "num_ctx": 3 } }));
    assert_eq!(cut["embeddings"][0], answer["embeddings"][0]);
    let reply = server.post("/api/embed", &json!({ "input": long, "truncate": false }));
    assert!(reply.status == 400 && reply.json()["error"].as_str().unwrap().contains("64"), "{}", reply.body);
}

/// Vectors and answers that are computed next to each other are those of each alone, and clients that go leave nothing.
#[test]
fn vectors_next_to_answers() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&model().write(dir.path(), "m.gguf"), &["--ctx", "512", "--batch", "16"]);
    let texts: Vec<String> = (0..20).map(|i| format!("text number {i} of several")).collect();
    let request = json!({ "input": texts });
    let expected = server.ok("/v1/embeddings", &request);
    let ask = json!({ "prompt": "once upon a time", "seed": 4, "max_tokens": 40, "temperature": 1.1 });
    let answer = server.ok("/v1/completions", &ask)["choices"][0]["text"].clone();
    std::thread::scope(|scope| {
        for client in 0..9 {
            let (server, request, expected, ask, answer) = (&server, &request, &expected, &ask, &answer);
            scope.spawn(move || {
                for _ in 0..4 {
                    match client % 3 {
                        0 => assert_eq!(server.ok("/v1/embeddings", request)["data"], expected["data"]),
                        1 => assert_eq!(server.ok("/v1/completions", ask)["choices"][0]["text"], *answer),
                        _ => drop(server.send("POST", "/v1/embeddings", "", request.to_string().as_bytes())),
                    }
                }
            });
        }
    });
    server.until("llamacpp:requests_processing", |n| n == 0.0);
    assert_eq!(server.metric("nt:requests_failed_total"), 0.0);
}

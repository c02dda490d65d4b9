//! Architectures with recurrent states: requests have one each, and go back to nothing.

use serde_json::{Value as Json, json};

use super::common::{File, T, V, tiny};
use super::http::Server;
use super::same_text::alone;

/// LFM 2 with a short convolution in its first block and attention in its second.
fn model() -> File {
    let mut f = tiny(2);
    f.meta.iter_mut().for_each(|(key, _)| *key = key.replace("llama.", "lfm2."));
    f.set("general.architecture", V::Str("lfm2".into()));
    f.set("lfm2.attention.head_count_kv", V::I32s(vec![0, 2]));
    f.set("lfm2.shortconv.l_cache", V::U32(3));
    f.tensor("output_norm.weight").name = "token_embd_norm.weight".into();
    let part = |f: &mut File, from: &str, n: usize| f.tensor(from).data[..n * 4].to_vec();
    let (d, query) = (64, f.tensor("blk.0.attn_q.weight").data.clone());
    let taps = part(&mut f, "token_embd.weight", 3 * d);
    let norm = part(&mut f, "blk.0.attn_norm.weight", 16);
    f.tensors.retain(|t| !["q", "k", "v", "output"].iter().any(|n| t.name == format!("blk.0.attn_{n}.weight")));
    let mut add = |name: &str, shape: &[u64], data: Vec<u8>| {
        f.tensors.push(T { name: format!("blk.{name}.weight"), shape: shape.to_vec(), ty: 0, data });
    };
    add("0.shortconv.in_proj", &[64, 192], query.repeat(3));
    add("0.shortconv.conv", &[3, 64], taps);
    add("0.shortconv.out_proj", &[64, 64], query);
    add("1.attn_q_norm", &[16], norm.clone());
    add("1.attn_k_norm", &[16], norm);
    f
}

/// Users of Qwen 3.5 and LFM 2 could not serve them.
#[test]
fn requests_have_the_text_that_they_have_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let stem = "once upon a time there was a machine that read the same words again and again, ";
    let prompts: Vec<String> = ["", "and", "and it", "or not"].iter().map(|end| format!("{stem}{end}")).collect();
    let texts: Vec<Json> =
        prompts.iter().enumerate().map(|(i, p)| alone(&path, p, i as u64, 24)["text"].clone()).collect();
    for more in [&["--parallel", "3"][..], &["--cache-dir", dir.path().join("c").to_str().unwrap()]] {
        let server = Server::start(&path, more);
        let ask = |i: usize, n: usize| {
            let body = json!({ "prompt": prompts[i], "seed": i, "max_tokens": 24, "temperature": 1.2, "n": n });
            server.ok("/v1/completions", &body)
        };
        std::thread::scope(|s| {
            let all: Vec<_> = (0..16).map(|k| s.spawn(move || (k % 4, ask(k % 4, 1)))).collect();
            for one in all {
                let (i, answer) = one.join().unwrap();
                assert_eq!(answer["choices"][0]["text"], texts[i], "{i}");
                assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
            }
        });
        // Several answers, each of which computes the prompt for itself.
        let several = ask(0, 3);
        assert_eq!(several["choices"][0]["text"], texts[0]);
        assert_eq!(several["choices"][2]["text"], alone(&path, &prompts[0], 2, 24)["text"]);
        // Vectors, and clients that go.
        let vectors = json!({ "input": ["one", "two", "three"] });
        assert_eq!(server.ok("/v1/embeddings", &vectors)["data"].as_array().unwrap().len(), 3);
        let endless = json!({ "prompt": "x", "max_tokens": 200, "n": 64, "ignore_eos": true, "stream": true });
        for _ in 0..6 {
            let gone = server.send("POST", "/v1/completions", "", endless.to_string().as_bytes());
            server.until("llamacpp:requests_processing", |n| n >= 1.0);
            drop(gone);
            server.until("llamacpp:requests_processing", |n| n == 0.0);
        }
        assert_eq!(ask(1, 1)["choices"][0]["text"], texts[1]);
    }
}

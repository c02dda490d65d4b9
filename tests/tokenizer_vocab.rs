//! Ids equal to llama.cpp's for its own test vocabularies (`ggml-vocab-*.gguf` with `.inp`, `.out`).

use std::path::PathBuf;

use nt::gguf::Gguf;
use nt::tokenizer::Tokenizer;

fn folder() -> PathBuf {
    std::env::var_os("NT_VOCAB_DIR")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/vocab")), PathBuf::from)
}

fn check(name: &str) {
    let path = folder().join(name);
    if !path.exists() {
        eprintln!("skipped: {} is not here; set NT_VOCAB_DIR to a folder that has it", path.display());
        return;
    }
    let read = |end: &str| std::fs::read_to_string(format!("{}{end}", path.display())).unwrap();
    let (inputs, outputs) = (read(".inp"), read(".out"));
    let texts: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
    let lines: Vec<&str> = outputs.lines().collect();
    let gguf = Gguf::open(&path).unwrap();
    let tokenizer = Tokenizer::from_metadata(&gguf.metadata).unwrap();
    let mut compared = 0;
    for (text, line) in texts.iter().zip(&lines) {
        let expected: Vec<u32> = line.split_whitespace().map(|t| t.parse().unwrap()).collect();
        assert_eq!(tokenizer.encode(text, false, false), expected, "{name}: {text:?}");
        compared += 1;
    }
    assert!(compared > 40, "{name}: {compared} texts");
}

#[test]
fn gpt_2() {
    check("ggml-vocab-gpt-2.gguf");
}

#[test]
fn llama_bpe() {
    check("ggml-vocab-llama-bpe.gguf");
}

#[test]
fn llama_spm() {
    check("ggml-vocab-llama-spm.gguf");
}

#[test]
fn gemma_4() {
    check("ggml-vocab-gemma-4.gguf");
}

#[derive(serde::Deserialize)]
struct Golden {
    texts: Vec<String>,
    ids: std::collections::BTreeMap<String, Vec<Vec<u32>>>,
}

/// Every pre-tokenizer, over one vocabulary: `fixtures/make_pretokenizers.py`.
#[test]
fn pre_tokenizers() {
    let path = folder().join("ggml-vocab-llama-bpe.gguf");
    if !path.exists() {
        eprintln!("skipped: {} is not here; set NT_VOCAB_DIR to a folder that has it", path.display());
        return;
    }
    let golden: Golden = serde_json::from_str(include_str!("fixtures/pretokenizers.json")).unwrap();
    let mut metadata = Gguf::open(&path).unwrap().metadata;
    let mut wrong = Vec::new();
    for (pre, ids) in &golden.ids {
        metadata.remove("tokenizer.ggml.pre");
        metadata.insert("tokenizer.ggml.pre".into(), nt::gguf::Value::Str(pre.clone()));
        let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
        for (text, expected) in golden.texts.iter().zip(ids) {
            let got = tokenizer.encode(text, false, false);
            if got != *expected {
                let show = |ids: &[u32]| {
                    ids.iter()
                        .map(|&t| String::from_utf8_lossy(tokenizer.token_bytes(t)).into_owned())
                        .collect::<Vec<_>>()
                };
                wrong.push(format!("{pre} {text:?}\n  {:?}\n  {:?}", show(&got), show(expected)));
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ (ours, then llama.cpp's):\n{}", wrong.len(), wrong.join("\n"));
}

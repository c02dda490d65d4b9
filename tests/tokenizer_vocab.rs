//! Ids equal to llama.cpp's for its own test vocabularies (`ggml-vocab-*.gguf` with `.inp`, `.out`).

use std::path::PathBuf;

use nt::gguf::Gguf;
use nt::tokenizer::Tokenizer;

fn folder() -> PathBuf {
    std::env::var_os("NT_VOCAB_DIR").map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/vocab")), PathBuf::from)
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

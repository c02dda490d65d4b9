//! Files as other converters write them, and what a file says of itself beside its weights.

use std::path::Path;
use std::process::Output;

use nt::gguf::{Array, Gguf, Value};

use crate::common::families::{add, as_architecture, gemma3, gpt_oss, lfm2, qwen35, tensors_called, wave};
use crate::common::{File, V, fails, nt, tiny, tiny_moe};

const TOKENS: &str = "104,101,108,108,111,3,7,9";

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn works(args: &[&str]) -> Output {
    let out = nt(args);
    assert_eq!(out.status.code(), Some(0), "{args:?}\n{}", stderr(&out));
    out
}

/// The bytes of the logits of [`TOKENS`].
fn logits(f: &File) -> Vec<u8> {
    let d = dir();
    let (model, out) = (f.write(d.path(), "m.gguf"), d.path().join("o.npy"));
    works(&["logits", model.to_str().unwrap(), "--tokens", TOKENS, "-o", out.to_str().unwrap(), "--backend", "cpu"]);
    std::fs::read(out).unwrap()
}

/// Two files that say the same in different ways have the same logits, bit for bit.
fn same(a: &File, b: &File) {
    assert!(logits(a) == logits(b), "other logits");
}

fn without(f: &mut File, key: &str) {
    f.meta.retain(|(k, _)| k != key);
}

fn called(f: &mut File, from: &str, to: &str) {
    f.meta.iter_mut().for_each(|(k, _)| *k = k.replacen(from, to, 1));
}

/// A part for images, as Ollama's files have it in the same file.
fn with_vision(f: &mut File) {
    for name in ["v.blk.0.attn_q.weight", "mm.mm_input_projection.weight"] {
        add(f, name, &[8], wave(8, 0.0, 1.0));
    }
}

/// Gemma 3 of Ollama's library could not run: it has a part for images, and leaves out what Ollama knows of the model.
/// Bases of rotary frequencies under their other names would have been left out in silence.
#[test]
fn gemma_3_of_ollamas_converter() {
    let plain = gemma3(2);
    let mut other = plain.clone();
    called(&mut other, "gemma3.rope.freq_base_swa", "gemma3.rope.local.freq_base");
    called(&mut other, "gemma3.rope.freq_base", "gemma3.rope.global.freq_base");
    without(&mut other, "gemma3.attention.layer_norm_rms_epsilon");
    with_vision(&mut other);
    same(&other, &plain);
    // The bases are other ones than those that are taken where the file has none.
    let mut stretched = plain.clone();
    stretched.set("gemma3.rope.freq_base", V::F32(10_000.0));
    assert!(logits(&stretched) != logits(&plain));

    // Nor does a file of a larger one have its scaling, and it names a token without a row.
    let mut long = plain.clone();
    long.set("gemma3.context_length", V::U32(131_072));
    let mut scaled = long.clone();
    scaled.set("gemma3.rope.scaling.type", V::Str("linear".into()));
    scaled.set("gemma3.rope.scaling.factor", V::F32(8.0));
    without(&mut long, "gemma3.rope.freq_base");
    without(&mut long, "gemma3.rope.freq_base_swa");
    without(&mut long, "gemma3.attention.layer_norm_rms_epsilon");
    for (key, v) in &mut long.meta {
        match (key.as_str(), v) {
            ("tokenizer.ggml.tokens", V::Strs(v)) => v.push("<image_soft_token>".into()),
            ("tokenizer.ggml.token_type", V::I32s(v)) => v.push(4),
            _ => {}
        }
    }
    same(&long, &scaled);
}

/// gpt-oss of Ollama's library has a name and names of tensors of its own.
#[test]
fn gpt_oss_of_ollamas_converter() {
    let plain = gpt_oss(2);
    let mut other = plain.clone();
    as_architecture(&mut other, "gpt-oss", "gptoss");
    without(&mut other, "gptoss.expert_feed_forward_length");
    without(&mut other, "gptoss.rope.scaling.type");
    other.set("tokenizer.ggml.pre", V::Str("default".into()));
    tensors_called(&mut other, ".attn_output.", ".attn_out.");
    tensors_called(&mut other, ".attn_sinks.weight", ".attn_sinks");
    tensors_called(&mut other, ".post_attention_norm.", ".ffn_norm.");
    same(&other, &plain);

    // Rows of gate and up in turn are another layout: refused, not computed as if they were one after the other.
    tensors_called(&mut other, ".ffn_up_exps.", ".ffn_gate_up_exps.");
    let d = dir();
    fails(&["run", other.write(d.path(), "m.gguf").to_str().unwrap(), "-p", "x"], 2, &["gptoss"]);
}

/// Mistral 3 of Ollama's library says under other names how queries are scaled and frequencies stretched; that was left
/// out in silence.
#[test]
fn mistral_3_of_ollamas_converter() {
    let mut plain = tiny(2);
    as_architecture(&mut plain, "llama", "mistral3");
    plain.set("mistral3.rope.scaling.type", V::Str("yarn".into()));
    plain.set("mistral3.rope.scaling.factor", V::F32(16.0));
    plain.set("mistral3.rope.scaling.original_context_length", V::U32(6));
    plain.set("mistral3.rope.freq_base", V::F32(10.0));
    let own = [
        ("rope.scaling.yarn_beta_fast", "rope.scaling.beta_fast", 0.5),
        ("rope.scaling.yarn_beta_slow", "rope.scaling.beta_slow", 0.1),
        ("rope.scaling.yarn_log_multiplier", "rope.scaling.mscale_all_dim", 0.5),
        ("attention.temperature_scale", "rope.scaling_beta", 0.1),
    ];
    let mut other = plain.clone();
    for (name, others, v) in own {
        let before = logits(&plain);
        plain.set(&format!("mistral3.{name}"), V::F32(v));
        assert!(logits(&plain) != before, "{name} changes nothing, so this shows nothing");
        other.set(&format!("mistral3.{others}"), V::F32(v));
    }
    with_vision(&mut other);
    same(&other, &plain);
}

fn header(f: &File) -> Gguf {
    let bytes = f.bytes();
    Gguf::parse(Path::new("m.gguf"), &bytes[..], bytes.len() as u64).unwrap()
}

/// Names and values that Qwen 3.5, Olmo 3 and LFM 2 of Ollama's library have in its own way.
#[test]
fn headers_of_ollamas_converter() {
    let mut f = tiny(4);
    as_architecture(&mut f, "llama", "qwen35");
    f.set("qwen35.attention.head_count_kv", V::I32s(vec![0, 0, 0, 2]));
    add(&mut f, "blk.0.ssm_dt", &[4], wave(4, 0.0, 1.0));
    let g = header(&f);
    assert_eq!(g.metadata.get("qwen35.attention.head_count_kv"), Some(&Value::Int(2)));
    assert!(g.tensor("blk.0.ssm_dt.bias").is_some() && g.tensor("blk.0.ssm_dt").is_none());
    // Other places of attention than the interval says are not guessed.
    f.set("qwen35.attention.head_count_kv", V::I32s(vec![0, 2, 0, 2]));
    let unlike = header(&f);
    assert!(matches!(unlike.metadata.get("qwen35.attention.head_count_kv"), Some(Value::Array(Array::Int(_)))));

    let mut f = tiny(1);
    as_architecture(&mut f, "llama", "olmo3");
    let g = header(&f);
    assert_eq!(g.metadata.str("general.architecture"), Some("olmo2"));
    assert_eq!(g.metadata.uint("olmo2.block_count"), Some(1));

    let mut f = tiny(1);
    as_architecture(&mut f, "llama", "lfm2");
    f.set("lfm2.feed_forward_length", V::U32(12_288));
    let g = header(&f);
    assert!(g.tensor("token_embd_norm.weight").is_some() && g.tensor("output_norm.weight").is_none());
    assert_eq!(g.metadata.uint("lfm2.feed_forward_length"), Some(96));
    assert_eq!(g.metadata.str("tokenizer.ggml.pre"), Some("lfm2"));
    // `nt inspect` says what was read otherwise than written.
    let d = dir();
    let shown = works(&["inspect", f.write(d.path(), "m.gguf").to_str().unwrap()]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("tensor output_norm.weight is token_embd_norm.weight"), "{shown}");
}

/// Qwen 3.5 and LFM 2 in both forms.
#[test]
fn recurrent_models_of_ollamas_converter() {
    let plain = qwen35(4);
    let mut other = plain.clone();
    other.set("qwen35.attention.head_count_kv", V::I32s(vec![0, 2, 0, 2]));
    other.set("qwen35.ssm.v_head_reordered", V::Bool(true));
    tensors_called(&mut other, ".ssm_dt.bias", ".ssm_dt");
    add(&mut other, "mtp.fc.weight", &[8], wave(8, 0.0, 1.0));
    with_vision(&mut other);
    same(&other, &plain);
    // Another order of the heads of values is not computed.
    let d = dir();
    other.set("qwen35.ssm.v_head_reordered", V::Bool(false));
    fails(&["run", other.write(d.path(), "m.gguf").to_str().unwrap(), "-p", "x"], 2, &["ssm.v_head_reordered"]);

    let plain = lfm2(4);
    let mut other = plain.clone();
    tensors_called(&mut other, "token_embd_norm.", "output_norm.");
    other.set("lfm2.feed_forward_length", V::U32(12_288));
    let mut named = plain.clone();
    named.set("tokenizer.ggml.pre", V::Str("lfm2".into()));
    same(&other, &named);
}

/// A file of llama.cpp's own is read as it is written.
#[test]
fn headers_of_llama_cpp_are_left_alone() {
    for f in [tiny(2), tiny_moe(2), gemma3(2), gpt_oss(2), lfm2(2), qwen35(2)] {
        assert_eq!(header(&f).translated, Vec::<String>::new());
    }
}

/// Heads of another size in blocks with windows, and another order of heads, were left out in silence.
#[test]
fn sizes_of_blocks_with_windows() {
    let d = dir();
    for (key, v, neutral) in [
        ("attention.key_length_swa", V::U32(8), V::U32(16)),
        ("attention.value_length_swa", V::U32(8), V::U32(16)),
        ("rope.dimension_count_swa", V::U32(8), V::U32(16)),
    ] {
        let mut f = gemma3(2);
        f.set(&format!("gemma3.{key}"), v);
        fails(&["run", f.write(d.path(), "m.gguf").to_str().unwrap(), "-p", "x"], 2, &[key, "--override-kv"]);
        f.set(&format!("gemma3.{key}"), neutral);
        same(&f, &gemma3(2));
    }
}

fn sampled(f: &File, more: &[&str]) -> String {
    let d = dir();
    let m = f.write(d.path(), "m.gguf");
    let args =
        ["-q", "run", m.to_str().unwrap(), "-p", "hello", "-n", "12", "--seed", "7", "--json", "--backend", "cpu"];
    let out = works(&[&args[..], more].concat());
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    json["tokens"].to_string()
}

/// A file's advice for drawing (`general.sampling.*`, which llama.cpp follows) was ignored.
#[test]
fn sampling_that_a_file_advises() {
    let mut f = tiny(1);
    let (plain, greedy) = (sampled(&f, &[]), sampled(&f, &["--temp", "0"]));
    assert_ne!(plain, greedy, "this shows nothing");
    f.set("general.sampling.temp", V::F32(0.0));
    assert_eq!(sampled(&f, &[]), greedy);
    // What the command line says counts more.
    assert_eq!(sampled(&f, &["--temp", "0.8"]), plain);
    without(&mut f, "general.sampling.temp");
    f.set("general.sampling.top_k", V::U32(1));
    assert_eq!(sampled(&f, &[]), greedy);
    // What cannot be followed is said.
    f.set("general.sampling.top_p", V::F32(7.0));
    f.set("general.sampling.mirostat", V::U32(2));
    let d = dir();
    let out = works(&["run", f.write(d.path(), "m.gguf").to_str().unwrap(), "-p", "hello", "-n", "1"]);
    let err = stderr(&out);
    assert!(err.contains("general.sampling.top_p is 7") && err.contains("general.sampling.mirostat is 2"), "{err}");
}

/// Tokens that the file bans (`tokenizer.ggml.suppress_tokens`, which llama.cpp follows) were drawn.
#[test]
fn tokens_that_a_file_bans() {
    let mut f = tiny(1);
    let greedy: Vec<i32> = serde_json::from_str(&sampled(&f, &["--temp", "0"])).unwrap();
    // An id beyond the vocabulary is none, as in llama.cpp.
    f.set("tokenizer.ggml.suppress_tokens", V::I32s(vec![greedy[0], 99_999]));
    let without: Vec<i32> = serde_json::from_str(&sampled(&f, &["--temp", "0"])).unwrap();
    assert!(!without.contains(&greedy[0]), "{greedy:?} {without:?}");
    // With none left, token 0 was drawn for ever.
    f.set("tokenizer.ggml.suppress_tokens", V::I32s((0..258).collect()));
    let d = dir();
    let m = f.write(d.path(), "m.gguf");
    fails(&["run", m.to_str().unwrap(), "-p", "x", "-n", "2", "--temp", "0"], 1, &["all are banned"]);
}

/// A model without a template got ChatML even where its vocabulary has no token of it, but those of another template.
#[test]
fn a_template_that_fits_the_vocabulary() {
    let d = dir();
    let file = d.path().join("messages.json");
    std::fs::write(&file, r#"[{"role":"user","content":"hello"}]"#).unwrap();
    let prompt = |marks: &[&str]| {
        let mut f = tiny(1);
        let n = f.meta.iter().position(|(k, _)| k == "tokenizer.ggml.tokens").unwrap();
        // In place of tokens that are control tokens or of no text here, so that the embedding has a row for each.
        let V::Strs(tokens) = &mut f.meta[n].1 else { panic!() };
        for (i, mark) in marks.iter().enumerate() {
            tokens[i] = (*mark).into();
        }
        let V::I32s(kinds) = &mut f.meta.iter_mut().find(|(k, _)| k == "tokenizer.ggml.token_type").unwrap().1 else {
            panic!()
        };
        kinds[..marks.len()].fill(3);
        let m = f.write(d.path(), "m.gguf");
        let out = works(&["template", m.to_str().unwrap(), "--messages", file.to_str().unwrap()]);
        (String::from_utf8_lossy(&out.stdout).into_owned(), stderr(&out))
    };
    let (gemma, said) = prompt(&["<start_of_turn>", "<end_of_turn>"]);
    assert!(gemma.starts_with("<start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model"), "{gemma}");
    assert!(said.contains("gemma is used") && said.contains("--chat-template"), "{said}");
    let (llama, _) = prompt(&["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]);
    assert!(llama.starts_with("<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"), "{llama}");
    let (chatml, said) = prompt(&["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]);
    assert!(chatml.starts_with("<|im_start|>user\nhello<|im_end|>"), "{chatml}");
    assert!(said.contains("ChatML is used"), "{said}");
    // None of them.
    assert!(prompt(&[]).0.starts_with("<|im_start|>user\nhello"));
}

/// A prompt of which no byte has a token was said to be empty.
#[test]
fn a_prompt_without_tokens_is_not_called_empty() {
    let mut f = tiny(1);
    f.set("tokenizer.ggml.tokens", V::Strs(vec!["a".into(); 258]));
    f.set("tokenizer.ggml.add_bos_token", V::Bool(false));
    let d = dir();
    let m = f.write(d.path(), "m.gguf");
    fails(&["run", m.to_str().unwrap(), "-p", "hello"], 2, &["no token for any byte of the prompt"]);
}

/// Files in types that ggml has removed were refused with a list of all others, and types of later days by their number.
#[test]
fn types_of_other_days() {
    for (id, bytes, words) in [
        (31, 18, &["Q4_0_4_4", "take the model in Q4_0"][..]),
        (4, 18, &["Q4_2"]),
        (40, 36, &["NVFP4", "cannot"]),
        (42, 18, &["Q2_0", "cannot"]),
        (77, 18, &["unknown type 77"]),
    ] {
        let mut f = tiny(1);
        let t = f.tensor("blk.0.attn_q.weight");
        (t.ty, t.data) = (id, vec![0; 64 * bytes]);
        let d = dir();
        let m = f.write(d.path(), "m.gguf");
        fails(&["run", m.to_str().unwrap(), "-p", "x"], 2, words);
        fails(&["plan", m.to_str().unwrap()], 2, words);
    }
}

//! Model files: right logits, or a refusal in one sentence.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::common::families::{as_architecture, gemma3, gpt_oss, qwen35};
use crate::common::{File, T, V, bin, case, fails, nt, sized, tiny, tiny_moe};

const TOKENS: &str = "104,101,108,108,111,3,7,9";

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs the binary and expects it to succeed.
fn works<S: AsRef<OsStr> + std::fmt::Debug>(args: &[S]) -> Output {
    let out = nt(args);
    assert_eq!(out.status.code(), Some(0), "{args:?}\n{}", text(&out.stderr));
    out
}

/// The floats of a NumPy file.
fn npy(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    let header = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    bytes[10 + header..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// The logits of [`TOKENS`], with more arguments.
fn logits(model: &Path, more: &[&str]) -> Vec<f32> {
    let d = dir();
    let out = d.path().join("o.npy");
    let mut args = vec!["logits", model.to_str().unwrap(), "--tokens", TOKENS, "-o", out.to_str().unwrap()];
    args.extend(["--backend", "cpu"]);
    args.extend(more);
    works(&args);
    npy(&out)
}

/// Normalised mean squared error.
fn nmse(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        found.iter().zip(expected).map(|(&a, &b)| f(f64::from(a), f64::from(b))).sum()
    };
    sum(&|a, b| (a - b) * (a - b)) / sum(&|_, b| b * b)
}

/// The logits of two files that say the same in different ways.
fn same(a: &File, b: &File, limit: f64) {
    let d = dir();
    let (a, b) = (a.write(d.path(), "a.gguf"), b.write(d.path(), "b.gguf"));
    let error = nmse(&logits(&a, &[]), &logits(&b, &[]));
    assert!(error <= limit, "NMSE {error}");
}

/// A vector or matrix of F32 in another type, and the same file with the values that this type holds, in F32.
fn narrowed(file: &File, names: &[&str], ty: u32) -> (File, File) {
    let (mut narrow, mut wide) = (file.clone(), file.clone());
    for name in names {
        let data = narrow.tensor(name).data.clone();
        let values = data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        let (mut small, mut large) = (Vec::new(), Vec::new());
        for v in values {
            let bits = match ty {
                1 => half::f16::from_f32(v).to_bits(),
                _ => half::bf16::from_f32(v).to_bits(),
            };
            let back = match ty {
                1 => half::f16::from_bits(bits).to_f32(),
                _ => half::bf16::from_bits(bits).to_f32(),
            };
            small.extend(bits.to_le_bytes());
            large.extend(back.to_le_bytes());
        }
        let t = narrow.tensor(name);
        (t.ty, t.data) = (ty, small);
        wide.tensor(name).data = large;
    }
    (narrow, wide)
}

fn floats(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

fn add(f: &mut File, name: &str, shape: &[u64], data: Vec<u8>) {
    f.tensors.push(T { name: name.into(), shape: shape.to_vec(), ty: 0, data });
}

/// Values that look random and are the same every time.
fn wave(n: usize, size: f32) -> Vec<u8> {
    floats((0..n).map(|i| ((i * 37 % 101) as f32 / 101.0 - 0.5) * size))
}

/// Runs every command that computes, plans or opens the structure, and expects a refusal.
fn refused_by_all(model: &Path, words: &[&str]) {
    let (m, d) = (model.to_str().unwrap(), dir());
    let long = d.path().join("t.txt");
    std::fs::write(&long, "hello world ".repeat(40)).unwrap();
    fails(&["run", m, "-p", "x"], 2, words);
    fails(&["chat", m], 2, words);
    fails(&["logits", m, "--tokens", "1,2", "-o", "/dev/null"], 2, words);
    fails(&["perplexity", m, "--ctx", "16", "-f", long.to_str().unwrap()], 2, words);
    fails(&["bench", m, "-p", "2", "-n", "2", "-r", "1"], 2, words);
    fails(&["plan", m], 2, words);
    let inspected = text(&works(&["inspect", m]).stdout);
    assert!(inspected.contains("cannot be run"), "{inspected}");
    let json: serde_json::Value = serde_json::from_slice(&works(&["inspect", m, "--json"]).stdout).unwrap();
    assert!(words.iter().all(|w| json["unsupported"].as_str().unwrap().contains(w)), "{}", json["unsupported"]);
}

fn refused_file(f: &File, words: &[&str]) {
    let d = dir();
    refused_by_all(&f.write(d.path(), "m.gguf"), words);
}

/// Biases that every such model has, and that were not there, were taken for none; values for blocks that are not there, and a section of
/// heads that rotates by another position than a text's, for nothing.
#[test]
fn what_an_architecture_says_must_be_whole() {
    for name in ["attn_v", "attn_output", "ffn_gate_inp"] {
        let mut f = gpt_oss(2);
        let bias = format!("blk.1.{name}.bias");
        f.tensors.retain(|t| t.name != bias);
        refused_file(&f, &[&bias, "missing"]);
    }
    let mut f = gemma3(2);
    f.set("gemma3.attention.sliding_window_pattern", V::I32s(vec![1, 0, 1]));
    refused_file(&f, &["sliding_window_pattern"]);
    let mut f = qwen35(2);
    f.set("qwen35.rope.dimension_sections", V::I32s(vec![3, 3, 1, 1]));
    refused_file(&f, &["dimension_sections"]);
}

/// Caps and factors below zero, and such that nothing or only infinities are left of what they multiply, were computed with; so were
/// heads of delta nets for which processors have no room.
#[test]
fn numbers_of_all_architectures_are_within_bounds() {
    let window: &[(&str, V)] = &[("attention.sliding_window", V::U32(4))];
    let of_gemma4: &[(&str, V)] = &[
        window[0].clone(),
        ("attention.sliding_window_pattern", V::I32s(vec![1, 0])),
        ("attention.key_length_swa", V::U32(16)),
        ("rope.dimension_count_swa", V::U32(16)),
        ("embedding_length_per_layer_input", V::U32(0)),
    ];
    let yarn: &[(&str, V)] = &[
        ("rope.scaling.type", V::Str("yarn".into())),
        ("rope.scaling.factor", V::F32(4.0)),
        ("rope.scaling.original_context_length", V::U32(64)),
    ];
    for (arch, needs, key) in [
        ("gemma2", window, "attn_logit_softcapping"),
        ("gemma2", window, "final_logit_softcapping"),
        ("gemma3", window, "final_logit_softcapping"),
        ("gemma4", of_gemma4, "final_logit_softcapping"),
        ("granite", &[], "attention.scale"),
        ("granite", &[], "embedding_scale"),
        ("granite", &[], "residual_scale"),
        ("granite", &[], "logit_scale"),
        ("cohere2", window, "logit_scale"),
        ("phi3", &[], "rope.scaling.attn_factor"),
        ("mistral3", yarn, "attention.temperature_scale"),
        ("mistral3", yarn, "rope.scaling.yarn_log_multiplier"),
        ("llama", &[], "expert_weights_scale"),
    ] {
        let d = dir();
        let mut f = tiny(2);
        as_architecture(&mut f, "llama", arch);
        needs.iter().for_each(|(name, v)| f.set(&format!("{arch}.{name}"), v.clone()));
        if arch == "cohere2" {
            f.set("cohere2.attention.layer_norm_epsilon", V::F32(1e-5));
        }
        let key = format!("{arch}.{key}");
        for bad in [-30.0, 1e-30, 1e30, f32::NAN, f32::INFINITY] {
            f.set(&key, V::F32(bad));
            let m = f.write(d.path(), "m.gguf");
            fails(&["plan", m.to_str().unwrap(), "--backend", "cpu"], 2, &[&key, "expected"]);
        }
    }
    for (key, bad) in [("state_size", 1025), ("conv_kernel", 65)] {
        let mut f = qwen35(2);
        f.set(&format!("qwen35.ssm.{key}"), V::U32(bad));
        refused_file(&f, &[key, "expected"]);
    }
}

/// Norms of Q and K in a llama file were left out, and the text was wrong.
#[test]
fn norms_that_the_architecture_does_not_have() {
    let path = case("qk-norms-in-llama.gguf");
    refused_by_all(&path, &["blk.0.attn_q_norm.weight", "3 more", "inspect"]);
    let shown = text(&works(&["inspect", path.to_str().unwrap()]).stdout);
    assert!(shown.contains("tensors that are not used") && shown.contains("blk.1.attn_k_norm.weight"), "{shown}");
}

/// Blocks beyond the count were left out.
#[test]
fn more_blocks_than_the_metadata_count() {
    refused_by_all(&case("more-blocks-than-block-count.gguf"), &["blk.2.attn_norm.weight", "block_count says 2"]);
}

/// A shared expert, a selection bias and biases of experts were left out.
#[test]
fn tensors_of_other_mixtures_of_experts() {
    let with = |name: &str, shape: &[u64], n: usize| {
        let mut f = tiny_moe(2);
        add(&mut f, name, shape, wave(n, 1.0));
        refused_file(&f, &[name]);
    };
    with("blk.1.ffn_gate_shexp.weight", &[64, 96], 64 * 96);
    with("blk.0.exp_probs_b.bias", &[4], 4);
    with("blk.1.ffn_down_exps.bias", &[64, 4], 256);
}

/// Scales of tensors, biases of norms and attention sinks were left out; tables and heads that take no part are
/// known by name, and do not keep a file from running.
#[test]
fn other_tensors_that_change_the_result_and_some_that_do_not() {
    let with = |name: &str, n: usize| {
        let mut f = tiny(2);
        add(&mut f, name, &[n as u64], wave(n, 1.0));
        f
    };
    for (name, n) in [("blk.0.attn_q.scale", 1), ("blk.1.attn_norm.bias", 64), ("blk.0.attn_sinks.weight", 4)] {
        refused_file(&with(name, n), &[name]);
    }
    let d = dir();
    let plain = logits(&tiny(2).write(d.path(), "plain.gguf"), &[]);
    for (name, n) in [("blk.0.attn_rot_embd.weight", 8), ("blk.0.attn_q.input_scale", 1), ("cls.output.weight", 64)] {
        let path = with(name, n).write(d.path(), "m.gguf");
        assert_eq!(logits(&path, &[]), plain, "{name}");
        let shown = text(&works(&["inspect", path.to_str().unwrap()]).stdout);
        assert!(shown.contains(name) && !shown.contains("cannot be run"), "{shown}");
    }
}

/// Keys that change the computation were left out in silence.
#[test]
fn keys_that_nothing_follows() {
    let with = |key: &str, v: V| {
        let mut f = tiny(1);
        f.set(&format!("llama.{key}"), v);
        f
    };
    for (key, v) in [
        ("attention.scale", V::F32(0.5)),
        ("logit_scale", V::F32(8.0)),
        ("residual_scale", V::F32(0.22)),
        ("embedding_scale", V::F32(12.0)),
        ("attn_logit_softcapping", V::F32(50.0)),
        ("final_logit_softcapping", V::F32(30.0)),
        ("attention.causal", V::Bool(false)),
        ("expert_shared_count", V::U32(1)),
        ("nextn_predict_layers", V::U32(1)),
        ("expert_gating_func", V::U32(2)),
        ("leading_dense_block_count", V::U32(1)),
        ("pooling_type", V::U32(2)),
    ] {
        refused_file(&with(key, v), &[&format!("llama.{key}"), "--override-kv"]);
    }
    // Values that change nothing are no reason to refuse.
    let d = dir();
    let plain = logits(&tiny(1).write(d.path(), "plain.gguf"), &[]);
    for (key, v) in [
        ("attention.scale", V::F32(0.25)),
        ("logit_scale", V::F32(1.0)),
        ("attention.causal", V::Bool(true)),
        ("expert_group_count", V::U32(1)),
        ("attention.sliding_window", V::U32(0)),
    ] {
        assert_eq!(logits(&with(key, v).write(d.path(), "m.gguf"), &[]), plain, "{key}");
    }
    let path = with("something.new", V::U32(1)).write(d.path(), "m.gguf");
    let shown = text(&works(&["inspect", path.to_str().unwrap()]).stdout);
    assert!(shown.contains("keys that are not used") && shown.contains("llama.something.new"), "{shown}");
}

/// A window of attention was ignored: with a context that is longer, tokens saw more than in the training.
#[test]
fn a_window_that_is_shorter_than_the_context() {
    let mut f = tiny(1);
    f.set("llama.attention.sliding_window", V::U32(6));
    let d = dir();
    let path = f.write(d.path(), "m.gguf");
    let p = path.to_str().unwrap();
    let words = ["llama.attention.sliding_window", "is 6", "--ctx 6"];
    fails(&["run", p, "-p", "hello", "-n", "8"], 2, &words);
    fails(&["plan", p], 2, &words);
    works(&["run", p, "-p", "hell", "-n", "1", "--ctx", "6"]);
    works(&["run", p, "-p", "hello", "-n", "8", "--override-kv", "llama.attention.sliding_window=int:0"]);
}

/// The bias of the head was left out: logits had an NMSE of 0.95.
#[test]
fn a_bias_of_the_head() {
    let found = logits(&case("output-bias-qwen2.gguf"), &[]);
    let error = nmse(&found, &npy(&case("output-bias-qwen2.expected.npy")));
    assert!(error < 1e-5, "NMSE {error}");
}

/// A head's bias counts row by row where the head is cut into slices, tied or not, and in any type.
#[test]
fn a_bias_of_a_head_in_slices() {
    let plain = tiny(2);
    let mut biased = plain.clone();
    add(&mut biased, "output.bias", &[258], wave(258, 4.0));
    let d = dir();
    let base = logits(&plain.write(d.path(), "plain.gguf"), &[]);
    let path = biased.write(d.path(), "biased.gguf");
    let moved = logits(&path, &[]);
    let bias = wave(258, 4.0);
    for (i, b) in bias.chunks_exact(4).enumerate() {
        let b = f32::from_le_bytes(b.try_into().unwrap());
        assert!((moved[i] - base[i] - b).abs() < 1e-4, "row {i}");
    }
    let units: serde_json::Value =
        serde_json::from_slice(&works(&["inspect", path.to_str().unwrap(), "--json"]).stdout).unwrap();
    let slices = units["units"].as_array().unwrap().iter().filter(|u| u["name"].as_str().unwrap().contains("rows"));
    assert!(slices.count() > 0);
    // Streamed and resident alike.
    assert_eq!(logits(&path, &["--tiers", "0:0:2"]), moved);
    let (narrow, wide) = narrowed(&biased, &["output.bias"], 1);
    same(&narrow, &wide, 0.0);
    let mut tied = biased.clone();
    tied.tensors.retain(|t| t.name != "output.weight");
    let mut bare = tied.clone();
    bare.tensors.retain(|t| t.name != "output.bias");
    let (a, b) = (tied.write(d.path(), "t.gguf"), bare.write(d.path(), "u.gguf"));
    assert!(nmse(&logits(&a, &[]), &logits(&b, &[])) > 1e-3);
}

/// Mixtral files of early 2024 have their routers in F16.
#[test]
fn a_router_in_f16() {
    let error = nmse(&logits(&case("router-f16-mixtral.gguf"), &[]), &npy(&case("router-f16-mixtral.expected.npy")));
    assert!(error < 1e-5, "NMSE {error}");
}

/// Routers in BF16 were refused.
#[test]
fn a_router_in_bf16() {
    let (narrow, wide) = narrowed(&tiny_moe(2), &["blk.0.ffn_gate_inp.weight", "blk.1.ffn_gate_inp.weight"], 30);
    same(&narrow, &wide, 1e-9);
}

/// Norms, biases and rotary divisors that are not F32 were refused.
#[test]
fn vectors_in_half_precision() {
    let mut f = tiny(2);
    add(&mut f, "blk.1.attn_q.bias", &[64], wave(64, 1.0));
    add(&mut f, "blk.0.ffn_down.bias", &[64], wave(64, 1.0));
    add(&mut f, "rope_freqs.weight", &[8], floats((0..8).map(|i| 1.0 + i as f32 / 3.0)));
    let names = [
        "blk.0.attn_norm.weight",
        "blk.1.ffn_norm.weight",
        "output_norm.weight",
        "blk.1.attn_q.bias",
        "blk.0.ffn_down.bias",
        "rope_freqs.weight",
    ];
    for ty in [1, 30] {
        let (narrow, wide) = narrowed(&f, &names, ty);
        same(&narrow, &wide, 0.0);
    }
}

/// The same for a type of blocks: Q8_0 with the scale 1 holds whole numbers as they are.
#[test]
fn a_norm_in_q8_0() {
    let mut wide = tiny(1);
    wide.tensor("blk.0.ffn_norm.weight").data = floats((0..64).map(|i| (i % 5) as f32));
    let mut narrow = wide.clone();
    let t = narrow.tensor("blk.0.ffn_norm.weight");
    t.ty = 8;
    t.data = (0..2u8)
        .flat_map(|block| {
            let mut bytes = half::f16::ONE.to_bits().to_le_bytes().to_vec();
            bytes.extend((0..32u8).map(|i| (block * 32 + i) % 5));
            bytes
        })
        .collect();
    same(&narrow, &wide, 0.0);
}

/// Mixtral files of before April 2024 have each expert's matrices in tensors of their own.
#[test]
fn experts_in_a_tensor_each() {
    let found = logits(&case("experts-one-tensor-each.gguf"), &[]);
    let error = nmse(&found, &npy(&case("router-f16-mixtral.expected.npy")));
    assert!(error < 1e-5, "NMSE {error}");
}

/// The experts of `f` taken apart into a tensor each.
fn apart(mut f: File, layers: usize) -> File {
    for i in 0..layers {
        for what in ["gate", "up", "down"] {
            let name = format!("blk.{i}.ffn_{what}_exps.weight");
            let t = f.tensor(&name).clone();
            f.tensors.retain(|t| t.name != name);
            for (e, data) in t.data.chunks_exact(t.data.len() / 4).enumerate() {
                add(&mut f, &format!("blk.{i}.ffn_{what}.{e}.weight"), &t.shape[..2], data.to_vec());
            }
        }
    }
    f
}

/// The same bits as in one tensor; where an expert is missing, a sentence names it.
#[test]
fn experts_apart_compute_as_together() {
    let f = apart(tiny_moe(2), 2);
    same(&f, &tiny_moe(2), 0.0);
    let mut lacks = f.clone();
    lacks.tensors.retain(|t| t.name != "blk.1.ffn_up.3.weight");
    refused_file(&lacks, &["blk.1.ffn_up.3.weight", "missing"]);
}

/// Gate and up of each expert in one tensor, gate first.
#[test]
fn gate_and_up_of_experts_in_one_tensor() {
    let mut f = tiny_moe(2);
    for i in 0..2 {
        let [gate, up] = ["gate", "up"].map(|w| f.tensor(&format!("blk.{i}.ffn_{w}_exps.weight")).clone());
        let one = gate.data.len() / 4;
        let pairs = gate.data.chunks_exact(one).zip(up.data.chunks_exact(one));
        let data = pairs.flat_map(|(g, u)| [g, u].concat()).collect();
        f.tensors.retain(|t| t.name != gate.name && t.name != up.name);
        add(&mut f, &format!("blk.{i}.ffn_gate_up_exps.weight"), &[64, 192, 4], data);
    }
    same(&f, &tiny_moe(2), 0.0);
}

/// [`tiny`] with biases, and its Q, K and V in one tensor each block; the biases too if `biases`.
fn fused(biases: bool) -> (File, File) {
    let mut plain = tiny(2);
    for i in 0..2 {
        for (what, n) in [("q", 64), ("k", 32), ("v", 32)] {
            add(&mut plain, &format!("blk.{i}.attn_{what}.bias"), &[n], wave(n as usize, 2.0));
        }
    }
    let mut one = plain.clone();
    for i in 0..2 {
        for (end, shape) in [("weight", &[64, 128][..]), ("bias", &[128][..])] {
            if end == "bias" && !biases {
                continue;
            }
            let names = ["q", "k", "v"].map(|w| format!("blk.{i}.attn_{w}.{end}"));
            let data = names.iter().flat_map(|n| one.tensor(n).data.clone()).collect();
            one.tensors.retain(|t| !names.contains(&t.name));
            add(&mut one, &format!("blk.{i}.attn_qkv.{end}"), shape, data);
        }
    }
    (one, plain)
}

/// Q, K and V in one tensor: the file was refused, since `attn_q` is missing.
#[test]
fn q_k_and_v_in_one_tensor() {
    for biases in [true, false] {
        let (one, plain) = fused(biases);
        same(&one, &plain, 0.0);
    }
}

/// The same with a bias in F16, and streamed.
#[test]
fn q_k_and_v_in_one_tensor_with_a_narrow_bias() {
    let (one, _) = fused(true);
    let (narrow, wide) = narrowed(&one, &["blk.0.attn_qkv.bias", "blk.1.attn_qkv.bias"], 1);
    same(&narrow, &wide, 0.0);
    let d = dir();
    let path = narrow.write(d.path(), "m.gguf");
    assert_eq!(logits(&path, &["--tiers", "0:0:2"]), logits(&path, &[]));
}

/// Commands that need logits to be numbers, each with its exit code and the block.
fn not_finite(model: &Path, words: &[&str]) {
    let (m, d) = (model.to_str().unwrap(), dir());
    let long = d.path().join("t.txt");
    std::fs::write(&long, "hello world ".repeat(40)).unwrap();
    let npy_file = d.path().join("o.npy");
    for temp in ["0", "1"] {
        let out = nt(&["run", m, "-p", "hello", "-n", "4", "--temp", temp, "--backend", "cpu"]);
        assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
        assert!(out.stdout.iter().all(u8::is_ascii_whitespace), "{:?}", text(&out.stdout));
    }
    fails(&["run", m, "-p", "hello", "-n", "4"], 1, words);
    fails(&["bench", m, "-p", "4", "-n", "4", "-r", "1"], 1, words);
    fails(&["perplexity", m, "--ctx", "16", "-f", long.to_str().unwrap()], 1, words);
    fails(&["logits", m, "--tokens", TOKENS, "-o", npy_file.to_str().unwrap()], 1, words);
    assert!(npy(&npy_file).len() > 8, "the logits are written all the same");
    let mut chat = Command::new(bin());
    chat.args(["chat", m, "--backend", "cpu"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut chat = chat.spawn().unwrap();
    std::io::Write::write_all(chat.stdin.as_mut().unwrap(), b"hello\n").unwrap();
    let out = chat.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
}

/// One NaN in a matrix: token 0 was printed for ever.
#[test]
fn a_weight_that_is_no_number() {
    not_finite(&case("nan-weight.gguf"), &["blk.1 ", "not finite", "nt verify"]);
}

/// Infinities, and places before and behind the blocks.
#[test]
fn numbers_that_are_not_finite_elsewhere() {
    let with = |name: &str, v: f32| {
        let mut f = tiny(2);
        f.tensor(name).data[..4].copy_from_slice(&v.to_le_bytes());
        f
    };
    let d = dir();
    let path = with("blk.0.attn_output.weight", f32::INFINITY).write(d.path(), "m.gguf");
    not_finite(&path, &["blk.0 ", "not finite"]);
    let path = with("output.weight", f32::NAN).write(d.path(), "m.gguf");
    not_finite(&path, &["head", "not finite"]);
    let mut f = tiny(1);
    let row = f.tensor("token_embd.weight");
    // Every token's row: which ones a prompt has is the vocabulary's business.
    row.data.chunks_exact_mut(256).for_each(|row| row[..4].copy_from_slice(&f32::NAN.to_le_bytes()));
    let path = f.write(d.path(), "m.gguf");
    fails(&["run", path.to_str().unwrap(), "-p", "hello"], 1, &["token_embd.weight"]);
}

/// Guards against squares that are too large for their sum, which made a norm's result a row of zeros and the logits
/// zeros with it, and against values that are no numbers and quantise to zero.
#[test]
fn a_norm_whose_sum_of_squares_overflows_gives_no_zeros() {
    let d = tempfile::tempdir().unwrap();
    let mut f = tiny_moe(2);
    for t in f.tensors.iter_mut().filter(|t| t.name.contains("ffn_down_exps")) {
        let large = |v: &[u8]| (f32::from_le_bytes([v[0], v[1], v[2], v[3]]) * -1e36).to_le_bytes();
        t.data = t.data.chunks(4).flat_map(large).collect();
    }
    not_finite(&f.write(d.path(), "m.gguf"), &["not finite"]);
}

/// Keys that the computation divides by or takes a root or logarithm of: 0, numbers below it and such as overflow
/// passed `plan`, and were refused by `run` or computed with.
#[test]
fn numbers_that_nothing_can_be_divided_by() {
    let (d, mut bad) = (dir(), Vec::new());
    for v in [0.0, -1.0, 1.0, 1e-40, f32::NAN, f32::INFINITY] {
        bad.push(("rope.freq_base", v));
    }
    for v in [0.0, -1e-5, 2.0, f32::NAN] {
        bad.push(("attention.layer_norm_rms_epsilon", v));
    }
    for key in ["rope.scaling.factor", "rope.scale_linear"] {
        bad.extend([-2.0, 1e-30, 1e30, f32::NAN].map(|v| (key, v)));
    }
    for key in ["rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.attn_factor"] {
        bad.extend([0.0, -1.0, 1e-30, f32::NAN].map(|v| (key, v)));
    }
    bad.push(("rope.scaling.yarn_ext_factor", 1e30));
    for (i, (key, v)) in bad.into_iter().enumerate() {
        let mut f = tiny(1);
        if key.contains("rope.scaling.") {
            f.set("llama.rope.scaling.type", V::Str("yarn".into()));
        }
        f.set(&format!("llama.{key}"), V::F32(v));
        let path = f.write(d.path(), &format!("{i}.gguf"));
        let m = path.to_str().unwrap();
        fails(&["plan", m], 2, &[key, "expected"]);
        fails(&["run", m, "-p", "x", "-n", "1", "--backend", "cpu"], 2, &[key, "expected"]);
    }
    let mut f = tiny(1);
    f.set("llama.rope.freq_base", V::F32(0.0));
    refused_file(&f, &["rope.freq_base", "a number above 1 was expected, found 0"]);
}

/// The same for the divisors that a tensor holds, which only a run reads otherwise.
#[test]
fn rotary_divisors_that_nothing_can_be_divided_by() {
    for bad in [0.0, -8.0, f32::NAN, f32::INFINITY] {
        let mut f = tiny(1);
        add(&mut f, "rope_freqs.weight", &[8], floats([1.0, 1.0, bad, 1.0, 1.0, 1.0, 8.0, 8.0]));
        refused_file(&f, &["rope_freqs.weight", "number 2 is"]);
    }
    let mut f = tiny(1);
    add(&mut f, "rope_freqs.weight", &[8], floats([1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 8.0, 8.0]));
    let d = dir();
    works(&["plan", f.write(d.path(), "m.gguf").to_str().unwrap()]);
}

/// Scaling that the command line asks for, and that nothing applies.
#[test]
fn scaling_without_a_kind_of_scaling() {
    let d = dir();
    let path = tiny(1).write(d.path(), "m.gguf");
    let m = path.to_str().unwrap();
    for more in [["--rope-factor", "2"], ["--rope-orig-ctx", "100"], ["--rope-freq-scale", "0.5"]] {
        fails(
            &[&["plan", m, "--rope-scaling", "none"], &more[..]].concat(),
            2,
            &["rope.scaling.type", "--rope-scaling"],
        );
    }
    let mut f = tiny(1);
    f.set("llama.rope.scaling.type", V::Str("none".into()));
    let path = f.write(d.path(), "none.gguf");
    fails(&["plan", path.to_str().unwrap(), "--rope-factor", "2"], 2, &["rope.scaling.type", "--rope-factor 2"]);
}

/// A small stack (`ulimit -s`) overflowed while options were parsed: abort, not a sentence.
#[test]
fn a_small_stack() {
    let d = dir();
    let path = tiny(1).write(d.path(), "m.gguf");
    let m = path.to_str().unwrap();
    for args in
        [&["--help"][..], &["inspect", m], &["plan", m], &["run", m, "-p", "hello", "-n", "2", "--backend", "cpu"]]
    {
        let mut sh = Command::new("sh");
        sh.args(["-c", "ulimit -s 32 && exec \"$0\" \"$@\""]).arg(bin()).args(args);
        let out = sh.output().unwrap();
        assert_eq!(out.status.code(), Some(0), "{args:?}\n{}", text(&out.stderr));
    }
}

/// Keys and values beyond what F16 holds, which F32 computes.
#[test]
fn caches_that_overflow() {
    let d = dir();
    let mut f = tiny(2);
    let v = f.tensor("blk.1.attn_v.weight");
    let large: Vec<f32> = v.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()) * 1e6).collect();
    v.data = floats(large);
    let path = f.write(d.path(), "large.gguf");
    let p = path.to_str().unwrap();
    fails(&["run", p, "-p", "hello", "-n", "2"], 1, &["blk.1 ", "--kv f32"]);
    works(&["run", p, "-p", "hello", "-n", "2", "--kv", "f32"]);
    // A key of minus infinity is overlooked, so that the logits stay finite, and wrong.
    let mut f = tiny(2);
    let (mut k, mut q) = (vec![0f32; 32], vec![0f32; 64]);
    (k[0], q[0]) = (-1e6, 1e-3);
    add(&mut f, "blk.1.attn_k.bias", &[32], floats(k));
    add(&mut f, "blk.1.attn_q.bias", &[64], floats(q));
    let path = f.write(d.path(), "key.gguf");
    let p = path.to_str().unwrap();
    fails(&["run", p, "-p", "hello", "-n", "2"], 1, &["blk.1 ", "--kv f32"]);
    works(&["run", p, "-p", "hello", "-n", "2", "--kv", "f32"]);
}

/// A cache of Q8_0: heads that are no whole blocks are refused, and so is what a scale in half precision does not hold.
#[test]
fn caches_of_bytes() {
    let d = dir();
    let path = tiny(2).write(d.path(), "narrow.gguf");
    let p = path.to_str().unwrap();
    for command in ["run", "plan"] {
        let more: &[&str] = if command == "run" { &["-p", "hello", "-n", "2"] } else { &[] };
        let args = [&[command, p, "--kv", "q8_0", "--backend", "cpu"], more].concat();
        fails(&args, 2, &["heads of 16", "blocks of 32", "--kv f16"]);
    }
    let mut f = crate::common::sized(2, 128, 96);
    let path = f.write(d.path(), "wide.gguf");
    works(&["run", path.to_str().unwrap(), "-p", "hello", "-n", "2", "--kv", "q8_0"]);
    let v = f.tensor("blk.1.attn_v.weight");
    let large: Vec<f32> = v.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()) * 1e9).collect();
    v.data = floats(large);
    let path = f.write(d.path(), "large.gguf");
    fails(&["run", path.to_str().unwrap(), "-p", "hello", "-n", "2", "--kv", "q8_0"], 1, &["blk.1 ", "Q8_0 holds"]);
}

/// Activations so near zero that the inverse of their scale is infinite: their sum overflowed.
#[test]
fn activations_near_zero() {
    let mut f = tiny(1);
    f.tensor("token_embd.weight").data = floats([1e-45; 64 * 258]);
    for name in ["attn_q", "ffn_down", "attn_output"] {
        // Only matrices of blocks quantise what they are multiplied with: Q8_0, all zeros.
        let t = f.tensor(&format!("blk.0.{name}.weight"));
        t.ty = 8;
        t.data = vec![0; t.shape.iter().product::<u64>() as usize / 32 * 34];
    }
    let d = dir();
    let path = f.write(d.path(), "m.gguf");
    works(&["run", path.to_str().unwrap(), "-p", "hello", "-n", "2", "--backend", "cpu"]);
}

/// A router whose scores are no numbers chose one expert twice, which ended in a panic where the batch was full.
#[test]
fn a_router_that_is_no_number() {
    let mut f = tiny_moe(2);
    f.tensor("blk.1.ffn_gate_inp.weight").data = floats([f32::NAN; 256]);
    let d = dir();
    let path = f.write(d.path(), "m.gguf");
    fails(&["run", path.to_str().unwrap(), "-p", "abc", "-n", "1", "--ctx", "4"], 1, &["blk.1 ", "not finite"]);
}

/// An id beyond the vocabulary stopped everything.
#[test]
fn an_end_of_text_beyond_the_vocabulary() {
    let path = case("eos-id-beyond-vocabulary.gguf");
    let p = path.to_str().unwrap();
    let out = works(&["run", p, "-p", "hello", "-n", "2", "--backend", "cpu"]);
    let err = text(&out.stderr);
    assert!(err.contains("tokenizer.ggml.eos_token_id is 32000") && err.contains("270 tokens"), "{err}");
    assert!(err.contains("token 11 is used instead") && !err.contains("Int("), "{err}");
    works(&["tokenize", p, "hello"]);
    let d = dir();
    let messages = d.path().join("m.json");
    std::fs::write(&messages, r#"[{"role":"user","content":"hi"}]"#).unwrap();
    works(&["template", p, "--messages", messages.to_str().unwrap()]);
}

/// The same for the other ids, and for values that are no ids.
#[test]
fn other_ids_beyond_the_vocabulary() {
    let d = dir();
    for (key, v, shown) in [
        ("bos_token_id", V::U32(9999), "is 9999"),
        ("eot_token_id", V::U32(258), "is 258"),
        ("eom_token_id", V::U64(u64::MAX), "is 18446744073709551615"),
        ("fim_pre_token_id", V::U32(70_000), "is 70000"),
        ("eos_token_id", V::Str("</s>".into()), "is \"</s>\""),
    ] {
        let mut f = tiny(1);
        let key = format!("tokenizer.ggml.{key}");
        f.set(&key, v);
        let path = f.write(d.path(), "m.gguf");
        let err = text(&works(&["tokenize", path.to_str().unwrap(), "hello"]).stderr);
        assert!(err.contains(&format!("{key} {shown}")) && err.contains("258 tokens"), "{err}");
        works(&["run", path.to_str().unwrap(), "-p", "hello", "-n", "2", "--backend", "cpu"]);
    }
}

/// A plan was made for a file that cannot be run.
#[test]
fn a_type_without_kernels() {
    refused_by_all(&case("type-tq2-0.gguf"), &["blk.0.ffn_up.weight", "TQ2_0", "Q4_K"]);
}

/// The same for the embedding and for a norm in such a type.
#[test]
fn other_places_of_types_without_kernels() {
    let mut f = tiny(1);
    f.set("llama.embedding_length", V::U32(256));
    f.tensors.retain(|t| t.name == "token_embd.weight");
    let t = f.tensor("token_embd.weight");
    (t.shape, t.ty, t.data) = (vec![256, 258], 35, vec![0; 258 * 66]);
    refused_file(&f, &["token_embd.weight", "TQ2_0"]);
    let mut f = tiny(1);
    let t = f.tensor("blk.0.attn_norm.weight");
    (t.ty, t.data) = (24, vec![0; 64]);
    refused_file(&f, &["blk.0.attn_norm.weight", "I8"]);
}

/// What `git clone` leaves without git-lfs.
#[test]
fn a_git_lfs_pointer() {
    let path = case("git-lfs-pointer.gguf");
    for command in [&["run", "-p", "x"][..], &["inspect"], &["plan"], &["tokenize", "x"]] {
        let mut args = vec![command[0], path.to_str().unwrap()];
        args.extend(&command[1..]);
        if command[0] == "tokenize" {
            args = vec!["tokenize", path.to_str().unwrap(), "x"];
        }
        fails(&args, 2, &["Git LFS pointer", "git lfs pull"]);
    }
}

/// Pages, other formats and unfinished downloads are known by their first bytes.
#[test]
fn files_that_are_no_model() {
    let d = dir();
    let path = d.path().join("m.gguf");
    let safetensors = [&1200u64.to_le_bytes()[..], br#"{"__metadata__":{}}"#].concat();
    for (bytes, word) in [
        (&b"<!DOCTYPE html><html>"[..], "web page"),
        (b"\n <html><head>", "web page"),
        (&safetensors, "safetensors"),
        (b"PK\x03\x04rest of an archive", "PyTorch"),
        (b"tjgg\x03\0\0\0\0\0\0\0", "before August 2023"),
        (b"lmgg\x03\0\0\0\0\0\0\0", "before August 2023"),
        (&[0; 4096], "zeros"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "compressed"),
        (br#"{"error": "Repository not found"}"#, "JSON"),
        (b"404: Not Found", "\"404: Not Found\", perhaps a server's answer"),
        (b"Entry not found\n", "\"Entry not found\""),
        ("Nicht gefunden – überhaupt nicht, auch wenn man länger danach sucht".as_bytes(), "Nicht gefunden"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        fails(&["inspect", path.to_str().unwrap()], 2, &["m.gguf", word]);
    }
    std::fs::write(&path, b"\x00\x01\xfeQ and so on").unwrap();
    fails(&["inspect", path.to_str().unwrap()], 2, &["begins with \"\\x00\\x01\\xfeQ\""]);
}

/// GGUF files that go with a model were refused for the first key that a model would have.
#[test]
fn files_that_go_with_a_model() {
    for (key, kind, words) in [
        ("general.type", "adapter", ["LoRA adapter", "llama-export-lora"]),
        ("general.type", "mmproj", ["mmproj", "language model"]),
        ("general.architecture", "clip", ["mmproj", "language model"]),
        ("general.type", "imatrix", ["importance matrix", "not a model"]),
        ("general.architecture", "controlvector", ["control vector", "not a model"]),
    ] {
        let mut f = tiny(1);
        f.set(key, V::Str(kind.into()));
        refused_file(&f, &words);
    }
}

/// What nt says of a file on stderr when it is run and planned.
fn told(path: &Path) -> String {
    let m = path.to_str().unwrap();
    let outs = [works(&["run", m, "-p", "x", "-n", "1", "--backend", "cpu"]), works(&["plan", m])];
    outs.map(|out| text(&out.stderr)).join("\n--\n")
}

/// A download that has its full length and not yet its bytes ran, and its text was wrong without a word.
#[test]
fn a_download_with_holes() {
    let (d, f) = (dir(), sized(2, 256, 512));
    let bytes = f.bytes();
    let whole = f.write(d.path(), "whole.gguf");
    assert!(!told(&whole).contains("has not ended"), "{}", told(&whole));
    let path = d.path().join("holes.gguf");
    let (from, to) = (bytes.len() / 2 / 4096 * 4096, bytes.len() / 2 / 4096 * 4096 + 16 * 4096);
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    file.write_all_at(&bytes[..from], 0).unwrap();
    file.write_all_at(&bytes[to..], to as u64).unwrap();
    drop(file);
    let told = told(&path);
    assert_eq!(told.matches("KiB of its weights were never written (the first of them in ").count(), 2, "{told}");
}

/// The same where the rest of the file was filled with zeros, or the middle.
#[test]
fn a_download_filled_with_zeros() {
    let (d, f) = (dir(), sized(2, 256, 512));
    let bytes = f.bytes();
    for (name, zeros) in [("end", bytes.len() - 300_000..bytes.len()), ("middle", bytes.len() / 3..bytes.len() / 3 * 2)]
    {
        let mut bytes = bytes.clone();
        bytes[zeros].fill(0);
        let path = d.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let told = told(&path);
        assert_eq!(told.matches("its weights are zeros at byte ").count(), 2, "{told}");
    }
}

/// No byte of the output is a control character but newline and tab.
fn no_control(out: &Output) {
    for (stream, bytes) in [("stdout", &out.stdout), ("stderr", &out.stderr)] {
        let shown = text(bytes);
        assert!(!shown.contains(|c: char| c.is_control() && c != '\n' && c != '\t'), "{stream}: {shown:?}");
    }
}

/// A metadata key with escape sequences was printed as it is.
#[test]
fn control_characters_in_a_key() {
    let out = works(&["inspect", case("escape-in-key.gguf").to_str().unwrap()]);
    no_control(&out);
    assert!(text(&out.stdout).contains("\\u001b]0;owned\\u0007"), "{}", text(&out.stdout));
}

/// The same in errors and warnings: names of tensors, architecture, pre-tokenizer, values.
#[test]
fn control_characters_in_errors_and_warnings() {
    const BAD: &str = "x\u{1b}[31m\u{7}\u{9b}2J\u{7f}";
    let d = dir();
    let with = |change: &dyn Fn(&mut File)| {
        let mut f = tiny(1);
        change(&mut f);
        f.write(d.path(), "m.gguf")
    };
    let set = |key: &'static str| with(&|f: &mut File| f.set(key, V::Str(BAD.into())));
    for key in ["general.architecture", "tokenizer.ggml.pre", "tokenizer.ggml.model", "llama.rope.scaling.type"] {
        let out = nt(&["run", set(key).to_str().unwrap(), "-p", "x"]);
        assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
        no_control(&out);
        no_control(&works(&["inspect", "--tensors", set(key).to_str().unwrap()]));
    }
    let path = with(&|f| add(f, &format!("blk.0.{BAD}.weight"), &[1], floats([1.0])));
    let out = nt(&["run", path.to_str().unwrap(), "-p", "x"]);
    assert_eq!(out.status.code(), Some(2));
    no_control(&out);
    no_control(&works(&["inspect", "--tensors", path.to_str().unwrap()]));
    // A warning.
    let path = with(&|f| f.set("tokenizer.ggml.eos_token_id", V::Str(BAD.into())));
    let out = works(&["run", path.to_str().unwrap(), "-p", "hello", "-n", "1"]);
    assert!(text(&out.stderr).contains("eos_token_id"));
    no_control(&Output { stdout: Vec::new(), ..out });
}

/// `whole` cut into `n` shards in `folder`; the path of each.
fn shards(whole: &File, folder: &Path, stem: &OsStr, n: usize) -> Vec<PathBuf> {
    let each = whole.tensors.len().div_ceil(n);
    let write = |(no, tensors): (usize, &[T])| {
        let mut f = File { tensors: tensors.to_vec(), ..whole.clone() };
        if no > 0 {
            f.meta.clear();
        }
        f.set("split.no", V::U32(no as u32));
        f.set("split.count", V::U32(n as u32));
        f.set("split.tensors.count", V::U32(whole.tensors.len() as u32));
        let mut name = stem.to_owned();
        name.push(format!("-{:05}-of-{n:05}.gguf", no + 1));
        let path = folder.join(name);
        std::fs::write(&path, f.bytes()).unwrap();
        path
    };
    whole.tensors.chunks(each).enumerate().map(write).collect()
}

fn says(model: &OsStr) -> Vec<u8> {
    let [run, p, n, t, k] = ["run", "-p", "-n", "--temp", "--backend"].map(OsStr::new);
    let [hello, eight, zero, cpu] = ["hello", "8", "0", "cpu"].map(OsStr::new);
    works(&[run, model, p, hello, n, eight, t, zero, k, cpu]).stdout
}

/// A folder whose name is no UTF-8, and file names that are none.
#[test]
fn shards_in_a_folder_of_bytes() {
    let d = dir();
    let folder = d.path().join(OsStr::from_bytes(b"caf\xe9 \xff"));
    std::fs::create_dir(&folder).unwrap();
    let expected = says(tiny(2).write(d.path(), "single.gguf").as_os_str());
    let paths = shards(&tiny(2), &folder, OsStr::new("m"), 3);
    assert_eq!(says(paths[0].as_os_str()), expected);
    let paths = shards(&tiny(2), &folder, OsStr::from_bytes(b"n\xff"), 3);
    assert_eq!(says(paths[0].as_os_str()), expected);
}

/// Any shard stands for the model.
#[test]
fn any_shard() {
    let d = dir();
    let paths = shards(&tiny(2), d.path(), OsStr::new("m"), 3);
    let first = says(paths[0].as_os_str());
    assert_eq!(says(paths[1].as_os_str()), first);
    assert_eq!(says(paths[2].as_os_str()), first);
    std::fs::remove_file(&paths[0]).unwrap();
    fails(&["run", paths[2].to_str().unwrap(), "-p", "x"], 2, &["m-00001-of-00003.gguf"]);
}

/// A folder stands for the one model in it; a projector next to it is none.
#[test]
fn a_folder_as_the_model() {
    let d = dir();
    let p = d.path().to_str().unwrap();
    fails(&["run", p, "-p", "x"], 2, &["folder without"]);
    let paths = shards(&tiny(2), d.path(), OsStr::new("m"), 2);
    std::fs::write(d.path().join("mmproj-m.gguf"), b"GGUF").unwrap();
    assert_eq!(says(d.path().as_os_str()), says(paths[0].as_os_str()));
    tiny(1).write(d.path(), "other.gguf");
    fails(&["run", p, "-p", "x"], 2, &["2 models", "other.gguf"]);
}

/// A context that is larger than what the model was trained on, without a word.
#[test]
fn a_context_beyond_the_training() {
    let path = case("chat-plain.gguf");
    let p = path.to_str().unwrap();
    let out = works(&["run", p, "-p", "hello", "-n", "2", "--ctx", "100000", "--backend", "cpu"]);
    let err = text(&out.stderr);
    assert!(err.contains("WARN") && err.contains("100000") && err.contains("512"), "{err}");
    assert!(err.contains("\ncontext   100000 tokens, 512 of them trained"), "{err}");
    let out = works(&["run", p, "-p", "hello", "-n", "2", "--ctx", "1000", "--json", "--backend", "cpu"]);
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(json["warnings"].to_string().contains("trained on"), "{}", json["warnings"]);
    let err = text(&works(&["plan", p, "--ctx", "1000"]).stderr);
    assert!(err.contains("trained on"), "{err}");
}

/// The advice to give a larger `--ctx` says what that costs; scaling that covers the context needs no warning.
#[test]
fn advice_on_contexts() {
    let path = case("chat-plain.gguf");
    let p = path.to_str().unwrap();
    let long = "hello ".repeat(600);
    fails(&["run", p, "-p", &long, "-n", "2"], 4, &["trained on 512", "worse"]);
    let scaled = ["--rope-scaling", "linear", "--rope-factor", "4"];
    let mut args = vec!["run", p, "-p", "hello", "-n", "2", "--ctx", "2000", "--backend", "cpu"];
    args.extend(scaled);
    let err = text(&works(&args).stderr);
    assert!(!err.contains("trained"), "{err}");
}

/// Metadata from the command line counts as if the file said so.
#[test]
fn metadata_from_the_command_line() {
    let d = dir();
    let plain = tiny(2).write(d.path(), "m.gguf");
    let mut f = tiny(2);
    f.set("llama.rope.freq_base", V::F32(500.0));
    f.set("llama.attention.layer_norm_rms_epsilon", V::F32(0.01));
    let said = logits(&f.write(d.path(), "said.gguf"), &[]);
    let given = [
        "--override-kv",
        "llama.rope.freq_base=float:500",
        "--override-kv",
        "llama.attention.layer_norm_rms_epsilon=float:0.01",
    ];
    assert_eq!(logits(&plain, &given), said);
    assert_ne!(logits(&plain, &[]), said);
    let p = plain.to_str().unwrap();
    let ids = |more: &[&str]| text(&works(&[&["tokenize", p, "hello"][..], more].concat()).stdout);
    assert_eq!(ids(&["--override-kv", "tokenizer.ggml.add_bos_token=bool:false"]), ids(&["--no-special"]));
    let shown = works(&["inspect", p, "--override-kv", "general.name=str:other"]);
    assert!(text(&shown.stdout).contains("general.name = \"other\""));
    for bad in ["llama.block_count", "llama.block_count=2", "a=int:x", "a=u32:1", "=int:1"] {
        fails(&["run", p, "-p", "x", "--override-kv", bad], 2, &["--override-kv", bad]);
    }
    fails(&["run", p, "-p", "x", "--override-kv", "llama.block_count=str:two"], 2, &["llama.block_count", "is 2"]);
    let err = text(&works(&["run", p, "-p", "x", "-n", "1", "--override-kv", "llama.blok_count=int:1"]).stderr);
    assert!(err.contains("llama.blok_count: nothing reads"), "{err}");
}

/// Rotary scaling from the command line counts as if the file said so.
#[test]
fn rotary_scaling_from_the_command_line() {
    let d = dir();
    let plain = tiny(2).write(d.path(), "m.gguf");
    let with = |set: &[(&str, V)]| {
        let mut f = tiny(2);
        set.iter().for_each(|(k, v)| f.set(&format!("llama.rope.{k}"), v.clone()));
        logits(&f.write(d.path(), "said.gguf"), &[])
    };
    let yarn = V::Str("yarn".into());
    let said = with(&[
        ("scaling.type", yarn),
        ("scaling.factor", V::F32(4.0)),
        ("scaling.original_context_length", V::U32(64)),
    ]);
    let given = logits(&plain, &["--rope-scaling", "yarn", "--rope-factor", "4", "--rope-orig-ctx", "64"]);
    assert_eq!(given, said);
    let linear = with(&[("scaling.type", V::Str("linear".into())), ("scaling.factor", V::F32(2.0))]);
    assert_eq!(logits(&plain, &["--rope-scaling", "linear", "--rope-factor", "2"]), linear);
    assert_eq!(logits(&plain, &["--rope-freq-scale", "0.5"]), linear);
    assert_eq!(logits(&plain, &["--rope-freq-base", "500"]), with(&[("freq_base", V::F32(500.0))]));
    assert_ne!(given, linear);
    let p = plain.to_str().unwrap();
    fails(&["run", p, "-p", "x", "--rope-scaling", "yarn"], 2, &["rope.scaling.factor", "--rope-factor"]);
}

/// The ids of a text, special tokens aside.
fn ids(path: &Path, of: &str) -> String {
    text(&works(&["tokenize", path.to_str().unwrap(), of, "--no-special"]).stdout)
}

/// A byte-level vocabulary with few merges shows where words end: the newline after punctuation is a word of its
/// own with seed-coder, and `hello` merges only within a word.
#[test]
fn the_pre_tokenizer_of_seed_coder() {
    let path = case("pre-seed-coder.gguf");
    works(&["run", path.to_str().unwrap(), "-p", "hello", "-n", "2", "--backend", "cpu"]);
    let pieces = works(&["tokenize", path.to_str().unwrap(), "hello world!", "--no-special", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&pieces.stdout).unwrap();
    assert_eq!(json["pieces"].to_string(), r#"["hello"," world","!"]"#);
}

/// Every other name that llama.cpp gives to models of these architectures opens; where it cuts is checked against
/// llama.cpp beside the code.
#[test]
fn pre_tokenizers_of_other_models() {
    let d = dir();
    let mut seen = Vec::new();
    for name in "bailingmoe2 exaone-moe ufakzeka viking poro-chat superbpe minicpm5 jais-2 laguna youtu".split(' ') {
        let mut f = tiny(1);
        f.set("tokenizer.ggml.pre", V::Str(name.into()));
        f.set("tokenizer.ggml.merges", V::Strs(["1 2", "12 3", "123 4", "! Ċ"].map(String::from).to_vec()));
        let path = f.write(d.path(), "m.gguf");
        seen.push((name, ids(&path, "1234 a!\n")));
    }
    // Merged texts are no tokens here, so all give the same bytes.
    assert!(seen.iter().all(|(_, ids)| ids == &seen[0].1), "{seen:?}");
}

/// The message about an unknown name listed sixty others.
#[test]
fn an_unknown_pre_tokenizer_fits_a_line() {
    let d = dir();
    let mut f = tiny(1);
    f.set("tokenizer.ggml.pre", V::Str("lama-bpe".into()));
    let path = f.write(d.path(), "m.gguf");
    let p = path.to_str().unwrap();
    fails(&["tokenize", p, "x"], 2, &["lama-bpe", "llama-bpe", "--override-kv"]);
    let out = nt(&["tokenize", p, "x"]);
    assert!(text(&out.stderr).trim().len() < 200 && text(&out.stderr).trim().lines().count() == 1);
    works(&["tokenize", p, "x", "--override-kv", "tokenizer.ggml.pre=str:llama-bpe"]);
}

/// A FIFO in place of a model waited for a writer, and SIGTERM did not end it.
#[test]
fn a_fifo_is_no_model() {
    let d = dir();
    let path = d.path().join("m.gguf");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let mut child = Command::new(bin())
        .args([OsStr::new("run"), path.as_os_str(), OsStr::new("-p"), OsStr::new("x")])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A build that waits is let go by a writer that comes and goes.
    std::thread::sleep(std::time::Duration::from_secs(1));
    let waited = child.try_wait().unwrap().is_none();
    if waited {
        child.kill().unwrap();
    }
    let out = child.wait_with_output().unwrap();
    assert!(!waited, "it waits for a writer");
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("no regular file"), "{}", text(&out.stderr));
}

/// Texts without an end filled the memory until the kernel killed the process.
#[test]
fn a_device_without_an_end_is_no_text() {
    let model = case("chat-plain.gguf");
    let model = model.to_str().unwrap();
    fails(&["run", model, "--prompt-file", "/dev/zero"], 2, &["/dev/zero", "256 MiB"]);
    fails(&["plan", model, "--machine", "/dev/zero"], 2, &["/dev/zero", "256 MiB"]);
}

/// A factor of attention that only YaRN's code multiplied in was left out without a word.
#[test]
fn attn_factor_without_yarn() {
    let d = dir();
    let mut file = tiny(1);
    file.set("llama.rope.scaling.attn_factor", V::F32(2.0));
    let path = file.write(d.path(), "m.gguf");
    fails(&["run", path.to_str().unwrap(), "-p", "x", "-n", "1"], 2, &["attn_factor", "yarn"]);
}

/// A context that is too short was said to be a text that is too short.
#[test]
fn a_context_too_short_to_measure() {
    let d = dir();
    let words = d.path().join("words.txt");
    std::fs::write(&words, "hello ".repeat(100)).unwrap();
    let model = case("chat-plain.gguf");
    let args = ["perplexity", model.to_str().unwrap(), "--file", words.to_str().unwrap(), "--ctx", "2"];
    fails(&args, 2, &["--ctx 2 is too short"]);
}

/// A key of the tokenizer whose value was of another type counted as absent: other tokens, without a word. llama.cpp
/// refuses them.
#[test]
fn a_tokenizer_key_of_another_type_is_refused() {
    let d = dir();
    for (key, value, words) in [
        ("add_bos_token", V::U32(1), "true or false was expected, found 1"),
        ("add_bos_token", V::Str("false".into()), "found \"false\""),
        ("add_eos_token", V::F32(1.5), "true or false was expected, found 1.5"),
        ("pre", V::U32(7), "a name was expected, found 7"),
        ("token_type", V::Strs(vec!["a".into()]), "an array of integers was expected, found an array of 1"),
        ("token_type", V::U32(3), "an array of integers was expected, found 3"),
    ] {
        let mut f = tiny(1);
        let key = format!("tokenizer.ggml.{key}");
        f.set(&key, value);
        let m = f.write(d.path(), "m.gguf");
        fails(&["run", m.to_str().unwrap(), "-p", "x", "-n", "1", "--backend", "cpu"], 2, &[&key, words]);
        fails(&["tokenize", m.to_str().unwrap(), "x"], 2, &[&key, words]);
    }
}

/// A count that was a float was refused as "an integer was expected, found 2".
#[test]
fn a_float_in_place_of_a_count_is_called_one() {
    let d = dir();
    let mut f = tiny(2);
    f.set("llama.block_count", V::F32(2.0));
    let m = f.write(d.path(), "m.gguf");
    fails(&["plan", m.to_str().unwrap()], 2, &["llama.block_count", "an integer", "found the float 2"]);
}

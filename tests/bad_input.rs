//! Every malformed file and wrong use ends in one clear sentence and its exit code.

mod common;

use common::{File, T, V, fails, nt, tiny};
use std::path::Path;

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// `nt run` on a file that must be refused.
fn refused(file: &File, words: &[&str]) {
    let d = dir();
    let path = file.write(d.path(), "m.gguf");
    fails(&["run", path.to_str().unwrap(), "-p", "x", "-n", "1"], 2, words);
}

fn run(path: &Path, more: &[&str], code: i32, words: &[&str]) {
    let mut args = vec!["run", path.to_str().unwrap(), "-p", "hello", "-n", "4", "--temp", "0"];
    args.extend(more);
    fails(&args, code, words);
}

#[test]
fn the_tiny_model_itself_runs() {
    let d = dir();
    let path = tiny(2).write(d.path(), "m.gguf");
    let out = nt(&["run", path.to_str().unwrap(), "-p", "hello", "-n", "4", "--temp", "0", "--json"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(json["prompt_tokens"], 6);
}

#[test]
fn files_that_are_no_model() {
    let d = dir();
    let empty = d.path().join("empty.gguf");
    std::fs::write(&empty, b"").unwrap();
    run(&empty, &[], 2, &["empty.gguf", "empty"]);
    let text = d.path().join("text.gguf");
    std::fs::write(&text, b"This is no model").unwrap();
    run(&text, &[], 2, &["text.gguf", "This", "GGUF"]);
    run(&d.path().join("absent.gguf"), &[], 2, &["absent.gguf", "No such file"]);
    run(d.path(), &[], 2, &["folder with 2 models"]);
}

#[test]
fn versions_and_byte_order() {
    refused(&File { version: 1, ..tiny(1) }, &["version 1"]);
    refused(&File { version: 9, ..tiny(1) }, &["version 9", "2 and 3"]);
    refused(&File { version: 3u32.swap_bytes(), ..tiny(1) }, &["big-endian"]);
}

#[test]
fn truncation_at_every_section() {
    let d = dir();
    let bytes = tiny(1).bytes();
    let header = bytes.len() - tiny(1).tensors.iter().map(|t| t.data.len().next_multiple_of(32)).sum::<usize>();
    // Every length up to the end of the header, then some in the data.
    let cuts = (1..header).step_by(37).chain([header, header + 1, bytes.len() - 40_000, bytes.len() - 33]);
    for cut in cuts {
        let path = d.path().join("cut.gguf");
        std::fs::write(&path, &bytes[..cut]).unwrap();
        fails(&["inspect", path.to_str().unwrap()], 2, &["cut.gguf", if cut < 4 { "" } else { "truncated" }]);
    }
}

#[test]
fn lengths_near_the_limits() {
    let d = dir();
    let bytes = tiny(1).bytes();
    for at in [8, 16, 24] {
        for n in [u64::MAX, u64::MAX - 7, 1 << 63, 1 << 40] {
            let mut bent = bytes.clone();
            bent[at..at + 8].copy_from_slice(&n.to_le_bytes());
            let path = d.path().join("bent.gguf");
            std::fs::write(&path, &bent).unwrap();
            fails(&["inspect", path.to_str().unwrap()], 2, &["bent.gguf"]);
        }
    }
    let mut f = tiny(1);
    f.tensor("output.weight").shape = vec![1 << 62, 1 << 62];
    refused(&f, &["output.weight"]);
    let mut f = tiny(1);
    f.tensor("output.weight").shape = vec![64, 0];
    refused(&f, &["output.weight"]);
}

#[test]
fn tensors_out_of_place() {
    let mut f = tiny(1);
    f.offsets = vec![(2, 1 << 40)];
    refused(&f, &["blk.0.attn_q.weight", "beyond the end"]);
    f.offsets = vec![(2, u64::MAX - 31)];
    refused(&f, &["blk.0.attn_q.weight", "beyond the end"]);
    f.offsets = vec![(3, 0)];
    refused(&f, &["overlap", "token_embd.weight", "blk.0.attn_k.weight"]);
    f.offsets = vec![(2, 7)];
    refused(&f, &["blk.0.attn_q.weight", "alignment"]);
}

#[test]
fn tensors_that_do_not_fit_the_architecture() {
    let mut f = tiny(2);
    f.tensors.retain(|t| t.name != "blk.1.ffn_up.weight");
    refused(&f, &["blk.1.ffn_up.weight", "missing"]);
    let mut f = tiny(1);
    f.tensor("blk.0.attn_k.weight").shape = vec![32, 64];
    refused(&f, &["blk.0.attn_k.weight", "[32, 64]", "[64, 32]"]);
    let mut f = tiny(1);
    f.tensor("blk.0.attn_norm.weight").ty = 77;
    refused(&f, &["blk.0.attn_norm.weight", "unknown type 77"]);
    let mut f = tiny(1);
    let t = f.tensor("blk.0.ffn_norm.weight");
    (t.ty, t.data) = (28, vec![0; 512]);
    refused(&f, &["blk.0.ffn_norm.weight", "F64", "F32"]);
    let mut f = tiny(1);
    f.tensors.push(T { name: "output_norm.weight".into(), shape: vec![64], ty: 0, data: vec![0; 256] });
    refused(&f, &["output_norm.weight", "twice"]);
}

#[test]
fn metadata_that_cannot_be_used() {
    let bend = |key: &str, v: V, words: &[&str]| {
        let mut f = tiny(1);
        f.set(key, v);
        refused(&f, words);
    };
    bend("general.architecture", V::Str("mamba".into()), &["mamba", "llama", "qwen3moe"]);
    bend("llama.attention.head_count", V::U32(0), &["llama.attention.head_count", "found"]);
    bend("llama.attention.head_count_kv", V::U32(3), &["head_count_kv", "does not divide"]);
    bend("llama.block_count", V::Str("many".into()), &["llama.block_count"]);
    bend("llama.block_count", V::U64(u64::MAX), &["llama.block_count"]);
    bend("general.alignment", V::U32(24), &["general.alignment", "24"]);
    bend("llama.rope.scaling.type", V::Str("magic".into()), &["magic", "yarn"]);
    bend("tokenizer.ggml.pre", V::Str("unheard-of".into()), &["unheard-of"]);
    bend("tokenizer.ggml.model", V::Str("rwkv".into()), &["rwkv"]);
    let mut f = tiny(1);
    f.meta.push(f.meta[1].clone());
    refused(&f, &["llama.block_count", "twice"]);
}

#[test]
fn shards() {
    let d = dir();
    let whole = tiny(2);
    let part = |no: usize, tensors: &[T]| {
        let mut f = File { tensors: tensors.to_vec(), ..whole.clone() };
        if no > 0 {
            f.meta.clear();
        }
        f.set("split.no", V::U32(no as u32));
        f.set("split.count", V::U32(2));
        f.set("split.tensors.count", V::I32s(vec![]));
        f.meta.retain(|(k, _)| k != "split.tensors.count");
        f.set("split.tensors.count", V::U32(whole.tensors.len() as u32));
        f.write(d.path(), &format!("m-{:05}-of-00002.gguf", no + 1))
    };
    let (a, b) = whole.tensors.split_at(8);
    let first = part(0, a);
    run(&first, &[], 2, &["m-00002-of-00002.gguf", "No such file"]);
    let second = part(1, b);
    let single = whole.write(d.path(), "single.gguf");
    let text = |p: &Path| nt(&["run", p.to_str().unwrap(), "-p", "hello", "-n", "8", "--temp", "0"]).stdout;
    assert_eq!(text(&first), text(&single), "sharded and single files give the same text");
    assert_eq!(text(&second), text(&single), "any shard stands for the model");
    part(1, &b[..b.len() - 1]);
    run(&first, &[], 2, &["split.tensors.count"]);
}

#[test]
fn limits_that_cannot_be_kept() {
    let d = dir();
    let path = tiny(4).write(d.path(), "m.gguf");
    run(&path, &["--ram", "64KiB"], 4, &["--ram", "largest unit"]);
    run(&path, &["--ram", "600KiB", "--tier-c", "none"], 4, &["--tier-c none"]);
    run(&path, &["--tiers", "0:1:1"], 4, &["2 blocks", "has 4"]);
    run(&path, &["--ctx", "3"], 4, &["prompt has 6 tokens", "--ctx"]);
    run(&path, &["--ram", "many"], 2, &["--ram"]);
    run(&path, &["--n-buffers", "1"], 2, &["--n-buffers"]);
    run(&path, &["--temp", "-1"], 2, &["--temp"]);
    run(&path, &["--tier-c", "/nonexistent"], 2, &["/nonexistent"]);
}

#[test]
fn texts_that_are_not_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let d = dir();
    let path = tiny(1).write(d.path(), "m.gguf");
    let bad = d.path().join("bad.txt");
    std::fs::write(&bad, b"abc\xff").unwrap();
    fails(&["run", path.to_str().unwrap(), "--prompt-file", bad.to_str().unwrap()], 2, &["bad.txt", "UTF-8", "byte 3"]);
    fails(&["tokenize", path.to_str().unwrap(), "--file", bad.to_str().unwrap()], 2, &["UTF-8"]);
    let raw = std::ffi::OsStr::from_bytes(b"abc\xff");
    fails(&["run".as_ref(), path.as_os_str(), "-p".as_ref(), raw], 2, &["UTF-8"]);
    fails(&["template", path.to_str().unwrap(), "--messages", bad.to_str().unwrap()], 2, &["UTF-8"]);
}

#[test]
fn outputs_that_cannot_be_written() {
    let d = dir();
    let path = tiny(1).write(d.path(), "m.gguf");
    let p = path.to_str().unwrap();
    fails(&["logits", p, "--tokens", "1,2", "-o", "/dev/full"], 1, &["/dev/full", "No space left"]);
    // Found before anything is computed, so that it is wrong usage.
    fails(
        &["logits", p, "--tokens", "1,2", "-o", "/nonexistent/x.npy"],
        2,
        &["/nonexistent/x.npy", "there is no folder"],
    );
    fails(&["logits", p, "--tokens", "1,99999", "-o", "/dev/null"], 2, &["99999", "258"]);
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_nt"))
        .args(["run", p, "-p", "x", "-n", "4"])
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("No space left"));
}

#[test]
fn a_file_that_shrinks_while_running() {
    let d = dir();
    let path = tiny(40).write(d.path(), "m.gguf");
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_nt"))
        .args(["bench", path.to_str().unwrap(), "--tiers", "0:4:36", "-p", "0", "-n", "200", "-r", "1000"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(700));
    let len = std::fs::metadata(&path).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len / 3).unwrap();
    let code = child.wait().unwrap().code();
    let mut err = String::new();
    std::io::Read::read_to_string(child.stderr.as_mut().unwrap(), &mut err).unwrap();
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("m.gguf") && err.contains("truncated"), "{err}");
}

#[test]
fn sigint_keeps_text_and_report() {
    let d = dir();
    let path = tiny(2).write(d.path(), "m.gguf");
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_nt"))
        .args([
            "run",
            path.to_str().unwrap(),
            "-p",
            "hello",
            "-n",
            "1000000",
            "--ctx",
            "1000000",
            "--seed",
            "1",
            "--json",
        ])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(900));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), nix::sys::signal::Signal::SIGINT).unwrap();
    let out = child.wait_with_output().unwrap();
    if out.status.code() == Some(0) {
        // The model may have ended by itself, with its end-of-generation token.
        return;
    }
    assert_eq!(out.status.code(), Some(130), "{}", String::from_utf8_lossy(&out.stderr));
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(json["stop"], "interrupt");
    assert!(json["generated_tokens"].as_u64().unwrap() > 0);
}

/// What contradicts itself is refused; what does not is taken, with the site in the report.
#[test]
fn sites_that_contradict_the_backend() {
    let d = dir();
    let path = tiny(2).write(d.path(), "m.gguf");
    for (args, words) in [
        (&["--site", "gpu", "--backend", "cpu"][..], "--backend cpu leaves no GPU"),
        (&["--site", "both", "--backend", "cpu"], "--backend cpu leaves no GPU"),
        (&["--site", "cpu", "--backend", "cuda"], "contradict each other"),
        (&["--site", "both", "--exact"], "--exact computes at one site"),
        (&["--site", "here"], "possible values: auto, gpu, cpu, both"),
    ] {
        run(&path, args, 2, &[words]);
    }
    for args in [&["--site", "cpu"][..], &["--site", "cpu", "--exact"], &["--site", "auto", "--backend", "cpu"]] {
        let all = [&["run", path.to_str().unwrap(), "-p", "hello", "-n", "4", "--json"], args].concat();
        let out = nt(&all);
        let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!((&json["site"], &json["sites"][0]["site"]), (&"cpu".into(), &"cpu".into()), "{args:?}");
    }
}

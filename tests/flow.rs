//! What a user sees of the way of weights: buffers, the order of tiers, reading on over the end of a pass, and what a
//! failed read ends with. (Ollama is asked to make room in tests/report.rs; links that sleep and users of VRAM are in
//! src/machine/doctor.rs, since sysfs and NVML are not at hand here.)

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{bin, record, tiny, tiny_moe};
use serde_json::Value as Json;

fn run(args: &[&str], env: &[(&str, &str)]) -> Output {
    Command::new(bin()).args(args).envs(env.iter().copied()).output().unwrap()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn json(args: &[&str], env: &[(&str, &str)]) -> Json {
    let out = run(args, env);
    assert!(out.status.success(), "{args:?}: {}", stderr(&out));
    serde_json::from_slice(&out.stdout).unwrap()
}

fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn buffers_are_as_many_as_are_asked_for() {
    let d = tempfile::tempdir().unwrap();
    let m = tiny(6).write(d.path(), "m.gguf");
    let args = ["run", arg(&m), "-p", "x", "-n", "2", "--backend", "cpu", "--tiers", "0:0:6", "--json"];
    let n = |more: &[&str], env: &[(&str, &str)]| json(&[&args[..], more].concat(), env)["n_buffers"].clone();
    assert_eq!(n(&["--n-buffers", "5"], &[]), 5);
    assert_eq!(n(&[], &[("NT_PIPELINE_DEPTH", "4")]), 4);
    assert_eq!(n(&["--n-buffers", "2"], &[("NT_PIPELINE_DEPTH", "4")]), 2);
    assert_eq!(n(&[], &[]), 3, "the default");
    let plan = ["plan", arg(&m), "--backend", "cpu", "--tiers", "0:0:6", "--json"];
    assert_eq!(json(&plan, &[("NT_PIPELINE_DEPTH", "6")])["n_buffers"], 6);
    for wrong in ["1", "65", "x"] {
        for (more, env) in [(&["--n-buffers", wrong][..], &[][..]), (&[], &[("NT_PIPELINE_DEPTH", wrong)])] {
            let out = run(&[&args[..], more].concat(), env);
            assert!(out.status.code() == Some(2) && stderr(&out).contains("--n-buffers"), "{}", stderr(&out));
        }
    }
}

/// From the moment at which a read could start to its start: a benchmark says how long that took.
#[test]
fn how_long_reads_wait_for_their_start_is_told() {
    let d = tempfile::tempdir().unwrap();
    let m = tiny(6).write(d.path(), "m.gguf");
    let args = ["bench", arg(&m), "--backend", "cpu", "--tiers", "0:0:6", "-p", "0", "-n", "20", "-r", "1", "--json"];
    let start = &json(&args, &[])["links"]["nvme"]["start_us"];
    assert!(start["n"].as_u64().unwrap() > 0 && start["p50"].as_f64() <= start["p99"].as_f64(), "{start}");
}

#[test]
fn tiers_are_interleaved_or_stacked() {
    let d = tempfile::tempdir().unwrap();
    for file in [tiny(6), tiny_moe(6)] {
        let m = file.write(d.path(), "m.gguf");
        let blocks = |more: &[&str]| {
            let args = ["plan", arg(&m), "--backend", "cpu", "--tiers", "0:3:3", "--json"];
            json(&[&args[..], more].concat(), &[])["plan"]["blocks"].as_str().unwrap().to_owned()
        };
        let spread = blocks(&[]);
        assert_eq!(blocks(&["--layout", "interleaved"]), spread);
        assert_eq!(blocks(&["--layout", "stacked"]), "BBBCCC");
        assert!(!spread.contains("BBB") && !spread.contains("CCC"), "{spread}");
    }
}

/// Reads and the end of passes as (start, end) in microseconds.
fn timeline(path: &Path, cat: &str, name: &str) -> Vec<(f64, f64)> {
    let all: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let of = all["traceEvents"].as_array().unwrap().iter();
    let of = of.filter(|e| e["cat"] == cat && e["name"].as_str().unwrap().contains(name));
    let number = |v: &Json| v.as_f64().unwrap();
    of.map(|e| (number(&e["ts"]), number(&e["ts"]) + number(&e["dur"]))).collect()
}

/// While a pass ends, the first units of the next are read: for each pass but the last, that read has begun before
/// the pass is over.
#[test]
fn the_next_pass_is_read_while_this_one_ends() {
    let d = tempfile::tempdir().unwrap();
    let (m, t) = (tiny(6).write(d.path(), "m.gguf"), d.path().join("t.json"));
    for n in ["2", "3", "6"] {
        let args = ["run", arg(&m), "-p", "hello", "-n", "20", "--seed", "1", "--ignore-eos", "--backend", "cpu"];
        let more = ["--tiers", "0:0:6", "--n-buffers", n, "--timeline", arg(&t)];
        let out = run(&[&args[..], &more].concat(), &[]);
        assert!(out.status.success(), "{}", stderr(&out));
        let (passes, first) = (timeline(&t, "pass", ""), timeline(&t, "read", "blk.0 attention"));
        assert!(passes.len() >= 20, "{} passes", passes.len());
        let early = passes.iter().filter(|p| first.iter().any(|r| r.0 > p.0 && r.0 < p.1)).count();
        assert!(early >= passes.len() / 4, "{n} buffers: {early} of {} passes", passes.len());
    }
}

/// Bytes that are not those recorded end a run with 1, whenever they are read: while loading, in the ring, as a
/// demanded expert, and as a row of the embedding. The tensor is named.
#[test]
fn bytes_that_are_wrong_end_with_1() {
    let d = tempfile::tempdir().unwrap();
    let (dense, data) = (tiny(6).write(d.path(), "dense.gguf"), d.path().join("data"));
    let experts = tiny_moe(6).write(d.path(), "experts.gguf");
    [&dense, &experts].iter().for_each(|m| record(m, &data));
    let end = |m: &PathBuf| std::fs::metadata(m).unwrap().len() as usize - 1;
    // The head is last; the embedding is first, some KiB behind the header.
    for (model, at, tensor, tiers) in [
        (&dense, end(&dense), "output.weight", "0:6:0"),
        (&dense, end(&dense), "output.weight", "0:0:6"),
        (&dense, end(&dense) / 2, "blk.", "0:0:6"),
        (&experts, end(&experts) / 2, "_exps.weight", "0:0:6"),
        (&dense, 12 << 10, "token_embd.weight", "0:0:6"),
    ] {
        let right = std::fs::read(model).unwrap();
        let mut bytes = right.clone();
        // All of the tensor's part of some chunks, so that every token and every choice meets it.
        let len = if tensor == "token_embd.weight" { 48 << 10 } else { 32 << 10 };
        let from = at.saturating_sub(len / 2).max(12 << 10);
        bytes.iter_mut().skip(from).take(len).for_each(|b| *b ^= 1);
        std::fs::write(model, &bytes).unwrap();
        for reader in ["auto", "pread"] {
            let args = ["run", arg(model), "-p", "hello", "-n", "3", "--backend", "cpu", "--ctx", "64", "--verify"];
            let more = ["--tiers", tiers, "--ram", "1GiB", "--reader", reader];
            let out = run(&[&args[..], &more].concat(), &[("XDG_DATA_HOME", arg(&data))]);
            let err = stderr(&out);
            assert_eq!(out.status.code(), Some(1), "{tensor} {tiers} {reader}: {err}");
            assert!(err.contains(tensor) && err.contains("was recorded"), "{tensor} {tiers} {reader}: {err}");
            assert_eq!(err.matches("was recorded").count(), 1, "told once: {err}");
        }
        std::fs::write(model, &right).unwrap();
    }
}

/// What cannot be opened is the user's to mend: 2. What cannot be had of the machine is 4.
#[test]
fn reads_that_cannot_begin_end_with_2_or_4() {
    let d = tempfile::tempdir().unwrap();
    let m = tiny(2).write(d.path(), "m.gguf");
    let none = d.path().join("none");
    std::fs::create_dir(&none).unwrap();
    let short = d.path().join("short.gguf");
    let bytes = std::fs::read(&m).unwrap();
    std::fs::write(&short, &bytes[..bytes.len() - 5000]).unwrap();
    let base = ["-p", "x", "-n", "1", "--backend", "cpu"];
    for (model, more, code, words) in [
        (&m, &["--reader", "vfio"][..], 2, "--reader vfio"),
        (&m, &["--tier-c", arg(&none)], 2, "none"),
        (&short, &[], 2, "short.gguf"),
        (&d.path().join("absent.gguf"), &[], 2, "absent.gguf"),
        (&m, &["--tiers", "0:0:2", "--ram", "4096"], 4, "--ram"),
    ] {
        let out = run(&[&["run", arg(model)], &base[..], more].concat(), &[]);
        assert_eq!(out.status.code(), Some(code), "{more:?}: {}", stderr(&out));
        assert!(stderr(&out).contains(words), "{more:?}: {}", stderr(&out));
    }
}

/// A file that shrinks while it is read ends with 1 and is named, by either reader. (Loaded units stay.)
#[test]
fn a_file_that_shrinks_ends_with_1() {
    let d = tempfile::tempdir().unwrap();
    for (name, reader) in [("a.gguf", "auto"), ("b.gguf", "pread")] {
        let m = tiny_moe(20).write(d.path(), name);
        let args = ["bench", arg(&m), "--backend", "cpu", "--tiers", "0:2:18", "-p", "0", "-n", "100", "-r", "1000"];
        let mut child = Command::new(bin())
            .args(args)
            .args(["-o", "jsonl", "--reader", reader])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It reads when it has said what it measures, or has had time to.
        std::thread::sleep(std::time::Duration::from_millis(500));
        let len = std::fs::metadata(&m).unwrap().len();
        std::fs::OpenOptions::new().write(true).open(&m).unwrap().set_len(len / 3).unwrap();
        let status = child.wait().unwrap();
        let mut err = String::new();
        std::io::Read::read_to_string(child.stderr.as_mut().unwrap(), &mut err).unwrap();
        assert_eq!(status.code(), Some(1), "{reader}: {err}");
        assert!(err.contains(name) && err.contains("truncated") && err.lines().count() <= 3, "{reader}: {err}");
    }
}

//! What a run reports: JSON, the page, and what is asked of others beforehand.

mod common;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;

use common::{nt, tiny, tiny_moe};
use serde_json::Value as Json;

fn json(args: &[&str]) -> Json {
    let out = nt(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn a_benchmark_tells_predicted_and_achieved_and_who_waited() {
    let d = tempfile::tempdir().unwrap();
    let (model, page) = (tiny(6).write(d.path(), "m.gguf"), d.path().join("page.html"));
    let (model, page) = (model.to_str().unwrap(), page.to_str().unwrap());
    let placement = ["--backend", "cpu", "--tiers", "0:2:4", "--html", page, "--json"];
    let mut args = vec!["bench", model, "-p", "8", "-n", "6", "-r", "2"];
    args.extend(placement);
    let all = json(&args);
    assert!(all["roofline"]["achieved"].as_f64().unwrap() > 0.0);
    assert!(all["first_token_s"].as_f64().unwrap() > 0.0);
    // There are no caches of experts that could be empty.
    let tests = all["tests"].as_array().unwrap();
    assert!(tests.len() == 2 && tests.iter().all(|t| t["caches"].is_null() && t["experts"].is_null()), "{tests:?}");
    let stall = &all["stall"];
    assert!(stall["storage_s"].is_f64() && stall["compute_s"].is_f64() && stall["link_s"].is_null(), "{stall}");
    assert!(stall["storage_s"].as_f64().unwrap() <= stall["passes_s"].as_f64().unwrap());
    let bytes = all["links"]["nvme"]["bytes"].as_u64().unwrap();
    let read_a_pass = all["plan"]["c"]["bytes"].as_u64().unwrap();
    // Twelve passes, less what the ring's slots (three of four units) may hold when a round begins.
    assert!(bytes >= 10 * read_a_pass, "two rounds of six passes of {read_a_pass} bytes read {bytes}");

    let html = std::fs::read_to_string(page).unwrap();
    for text in ["m.gguf", "Timeline: Measured", "resident", "RAM slot 0", "Rates over time", "3 of 18 passes"] {
        assert!(html.contains(text), "{text}");
    }
    assert!(html.matches("<rect class=\"compute\"").count() >= 18, "six blocks in each of three passes");
}

#[test]
fn a_run_writes_its_page_too_whatever_is_streamed() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny_moe(3).write(d.path(), "moe.gguf");
    for tiers in ["0:3:0", "0:0:3"] {
        let page = d.path().join("page.html");
        let args = ["run", model.to_str().unwrap(), "-p", "hello", "-n", "4", "--temp", "0", "--backend", "cpu"];
        let more = ["--tiers", tiers, "--html", page.to_str().unwrap(), "--json"];
        let all = json(&[&args[..], &more[..]].concat());
        assert_eq!(all["stall"]["storage_s"].is_null(), tiers == "0:3:0");
        assert!(std::fs::read_to_string(&page).unwrap().contains("expert"), "{tiers}");
    }
}

#[test]
fn a_page_that_cannot_be_written_is_named() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    let args = ["run", model.to_str().unwrap(), "-p", "x", "-n", "1", "--html", "/nonexistent/page.html"];
    // Found before anything is computed, so that it is wrong usage.
    common::fails(&args, 2, &["/nonexistent/page.html", "there is no folder"]);
}

/// Answers as Ollama does, one model loaded until it is asked to go.
fn ollama() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut loaded = r#"{"models":[{"name":"big:70b","size_vram":1}]}"#;
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 2048];
            let n = stream.read(&mut request).unwrap();
            let request = String::from_utf8_lossy(&request[..n]).into_owned();
            if request.starts_with("POST /api/generate") {
                loaded = r#"{"models":[]}"#;
            }
            write!(stream, "HTTP/1.0 200 OK\r\n\r\n{loaded}").unwrap();
        }
    });
    at
}

#[test]
fn an_ollama_is_asked_to_make_room() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    let at = ollama().to_string();
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    for (host, words) in [
        (at.as_str(), "Ollama has unloaded big:70b"),
        (at.as_str(), "no model loaded"),
        (gone.as_str(), "no Ollama answers"),
        ("10.1.2.3", "only an Ollama of this machine"),
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_nt"))
            .args(["run", model.to_str().unwrap(), "-p", "x", "-n", "1", "--evict-ollama"])
            .env("OLLAMA_HOST", host)
            .output()
            .unwrap();
        let err = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && err.contains(words), "{words}: {err}");
    }
}

#[test]
fn a_benchmark_writes_llama_benchs_rows() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    let model = model.to_str().unwrap();
    let run = |more: &[&str]| {
        let args = ["bench", model, "--backend", "cpu", "-p", "0,4-8*2", "-n", "2,3", "-d", "0,16", "-r", "2"];
        let out = nt(&[&args[..], more].concat());
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let rows: Vec<Json> = run(&["-o", "jsonl"]).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let tests: Vec<_> = rows.iter().map(|r| (&r["n_depth"], &r["n_prompt"], &r["n_gen"])).collect();
    let wanted = [(0, 4, 0), (0, 8, 0), (0, 0, 2), (0, 0, 3), (16, 4, 0), (16, 8, 0), (16, 0, 2), (16, 0, 3)];
    assert_eq!(tests.len(), wanted.len());
    assert!(tests.iter().zip(wanted).all(|(t, w)| *t.0 == w.0 && *t.1 == w.1 && *t.2 == w.2), "{tests:?}");
    for r in &rows {
        assert_eq!(r["samples_ns"].as_array().unwrap().len(), 2);
        assert!(r["avg_ts"].as_f64().unwrap() > 0.0 && r["model_filename"] == model, "{r}");
    }
    let table = run(&["-o", "md"]);
    assert_eq!(table.lines().count(), 2 + wanted.len());
    assert!(table.contains("| pp4 |") || table.contains(" pp4 |"), "{table}");
    assert!(table.contains("tg3 @ d16 |") && table.contains(" ± "), "{table}");
    assert_eq!(run(&["-o", "csv"]).lines().count(), 1 + wanted.len());
    let all: Json = serde_json::from_str(&run(&["--json"])).unwrap();
    assert_eq!((&all["prefill"]["tokens"], &all["decode"]["tokens"]), (&4.into(), &2.into()));
    assert_eq!(all["tests"].as_array().unwrap().len(), wanted.len());
}

/// On a machine without a GPU the fallback is a line of the report, not a warning at each start.
#[test]
fn processors_without_a_gpu_are_no_warning() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    let args = ["run", model.to_str().unwrap(), "-p", "a", "-n", "1"];
    let out = nt(&args);
    let err = String::from_utf8_lossy(&out.stderr).into_owned();
    let all = json(&[&args[..], &["--json"]].concat());
    if all["fallback"].is_null() || err.contains("nt doctor") {
        return eprintln!("skipped: this machine has a GPU");
    }
    assert!(err.contains("\nbackend   computing on processors: ") && !err.contains("WARN"), "{err}");
    assert!(
        all["fallback"].as_str().unwrap().starts_with("computing on processors")
            && all["warnings"] == serde_json::json!([])
    );
}

/// Experts by where they lay, of a routing that is forced: the caches hit as `nt plan` says.
#[test]
fn a_forced_routing_hits_as_predicted() {
    let d = tempfile::tempdir().unwrap();
    let model = common::many_experts(4).write(d.path(), "m.gguf");
    let bench = |routing: &[&str]| {
        let args = ["bench", model.to_str().unwrap(), "--backend", "cpu", "--threads", "1", "--ram", "5MiB"];
        let more = ["-p", "0", "-n", "100", "-r", "2", "-b", "16", "--json"];
        let out = nt(&[&args[..], &more, routing].concat());
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap()
    };
    let uniform = bench(&["--routing", "uniform"]);
    let e = &uniform["experts"];
    let (c, hit) = (&e["caches"], e["caches"]["hit_rate"].as_f64().unwrap());
    let slots = c["slots"].as_f64().unwrap() / c["experts"].as_f64().unwrap();
    assert!((hit - slots).abs() < 0.06, "{e}");
    assert_eq!(e["uses"], 2 * 100 * 4 * 2, "two of each layer for each token that counts: {e}");
    let shares: f64 = ["vram", "ram", "cache", "storage"].iter().map(|w| e[w].as_f64().unwrap()).sum();
    assert!((shares - 1.0).abs() < 1e-9 && e["storage"].as_f64().unwrap() > 0.1, "{e}");
    assert!(c["in_flight"].as_f64().unwrap() >= 1.0 && c["misses_max"] == 2, "{e}");
    assert_eq!(bench(&["--routing", "uniform"])["experts"]["caches"]["hits"], c["hits"], "the same again");
    let zipf = bench(&["--routing", "zipf:1.5"]);
    assert!(zipf["experts"]["caches"]["hit_rate"].as_f64().unwrap() > hit + 0.05, "{}", zipf["experts"]);
    assert!(zipf["routing"].as_str().unwrap().contains("Zipf") && bench(&[])["routing"].is_null());
}

/// Where experts have caches, a benchmark tells what its first tokens take from empty ones, and of both what the caches had; links
/// and experts of the whole report are those of warm caches alone.
#[test]
fn empty_caches_stand_beside_warm_ones() {
    let d = tempfile::tempdir().unwrap();
    let model = common::many_experts(4).write(d.path(), "m.gguf");
    let bench = |more: &[&str]| {
        let args =
            ["bench", model.to_str().unwrap(), "--backend", "cpu", "--threads", "1", "--ram", "5MiB", "-b", "16"];
        let out = nt(&[&args[..], &["-r", "2", "--routing", "uniform"], more].concat());
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let all: Json = serde_json::from_str(&bench(&["-p", "16", "-n", "100,20", "--parallel", "1,2", "--json"])).unwrap();
    assert_eq!(all["interrupted"], false);
    let tests = all["tests"].as_array().unwrap();
    let names: Vec<&str> = tests.iter().map(|t| t["test"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        ["pp16", "tg100", "tg64 cold", "tg100 x2", "tg64 x2 cold", "tg20", "tg20 cold", "tg20 x2", "tg20 x2 cold"]
    );
    assert!(tests[0]["caches"].is_null() && tests[0]["experts"].is_null(), "{}", tests[0]);
    for pair in tests[1..].chunks(2) {
        let (warm, cold) = (&pair[0], &pair[1]);
        assert_eq!((&warm["caches"], &cold["caches"]), (&"warm".into(), &"cold".into()));
        assert_eq!((warm["runs"].as_array().unwrap().len(), cold["runs"].as_array().unwrap().len()), (2, 1));
        let rate = |t: &Json| t["experts"]["cache_hit_rate"].as_f64().unwrap();
        assert!(rate(cold) < rate(warm) && rate(cold) > 0.0, "{warm} {cold}");
        assert!(warm["experts"]["slot_hit_rate"].is_null());
        let uses = 4 * 2 * cold["n_gen"].as_u64().unwrap() * cold["n_parallel"].as_u64().unwrap();
        assert!(cold["experts"]["uses"].as_u64().unwrap() <= uses, "{cold}");
    }
    // Two tests of one text each, both of two repetitions.
    assert_eq!(all["experts"]["uses"], 2 * 120 * 4 * 2, "{}", all["experts"]);
    let text = bench(&["-p", "0", "-n", "70"]);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].contains("70 tokens") && lines[0].contains("over 2 runs); caches in RAM hit "), "{text}");
    assert!(
        lines[1].contains("64 tokens") && lines[1].contains("(from empty caches, once); caches in RAM hit "),
        "{text}"
    );
    let table = bench(&["-p", "0", "-n", "70", "-o", "md"]);
    for word in ["experts", " cached |", "| routing", "| uniform", "tg70 |", "tg64 cold |", " RAM "] {
        assert!(table.contains(word), "{word}: {table}");
    }
}

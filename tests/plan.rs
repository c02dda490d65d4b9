//! `nt plan` as scripts rely on it: no weights are read, every machine has an answer or a refusal with what
//! would fit.

mod common;
#[path = "common/shapes.rs"]
mod shapes;
#[path = "common/skeleton.rs"]
mod skeleton;

use common::{fails, nt, tiny, tiny_moe};
use serde_json::Value;
use skeleton::{LLAMA3_70B, QWEN2_32B, skeleton};

fn plan(args: &[&str]) -> Value {
    let out = nt(&[&["plan"], args, &["--json"]].concat());
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

fn speed(v: &Value) -> f64 {
    v["simulated"]["tokens_per_s"].as_f64().unwrap()
}

#[test]
fn a_70b_without_its_weights_is_planned_on_every_profile() {
    let d = tempfile::tempdir().unwrap();
    let m = skeleton(d.path(), "70b.gguf", LLAMA3_70B, "Q6_K");
    let m = m.to_str().unwrap();
    for profile in ["rtx-5060-ti", "rtx-3090-gen3x8", "rtx-4080-64gb", "rtx-4090", "h100", "laptop-8gb", "cpu-only"] {
        let v = plan(&[m, "--machine", profile]);
        assert_eq!(v["plan"]["blocks"].as_str().unwrap().len(), 80, "{profile}");
        assert!(speed(&v) <= v["roofline"]["decode"]["tokens_per_s"].as_f64().unwrap() * 1.01, "{profile}: {v}");
        let memory = |key: &str| v["memory"][key].as_u64();
        assert!(memory("ram_weights_bytes") <= memory("ram_room_bytes"), "{profile}");
        assert!(memory("vram_weights_bytes") <= memory("vram_room_bytes").or(Some(0)), "{profile}");
        let busy = &v["simulated"]["busy"];
        for link in ["nvme", "gpu", "ram", "flops"] {
            assert!(busy[link].is_null() || (0.0..=1.0).contains(&busy[link].as_f64().unwrap()), "{busy}");
        }
        let text = nt(&["plan", m, "--machine", profile]);
        let text = String::from_utf8(text.stdout).unwrap();
        assert!(["blocks ", "decode ", "busy ", "ram "].iter().all(|w| text.contains(w)), "{text}");
    }
}

#[test]
fn the_predecessors_cases_are_predicted() {
    let d = tempfile::tempdir().unwrap();
    let m = skeleton(d.path(), "70b.gguf", LLAMA3_70B, "Q6_K");
    let case = |m: &str, args: &[&str]| speed(&plan(&[&[m, "--machine"], args].concat()));
    let theirs = ["--layout", "stacked", "--n-buffers", "2", "--no-wrap", "--exact"];
    let m = m.to_str().unwrap();
    let tiers = ["rtx-3090-gen3x8", "--tiers", "20:30:30"];
    let stacked = case(m, &[&tiers[..], &theirs].concat());
    assert!((0.1..0.12).contains(&stacked), "{stacked}, 0.11 measured");
    assert!(case(m, &tiers) >= 0.15);
    let all = case(m, &[&["rtx-3090-gen3x8", "--tiers", "26:54:0"][..], &theirs].concat());
    assert!((0.16..0.2).contains(&all), "{all}, 0.18 measured");
    let m = skeleton(d.path(), "32b.gguf", QWEN2_32B, "Q4_K_M");
    let link = ["rtx-5060-ti", "--tiers", "19:45:0", "--link", "25.2"];
    let s = case(m.to_str().unwrap(), &[&link[..], &theirs].concat());
    assert!((1.5..1.95).contains(&s), "{s}, 1.7 measured");
}

/// Processors beside a GPU compute what rests in RAM; which and how fast follows from the machine alone.
#[test]
fn two_sites_are_planned_where_a_model_rests_in_ram() {
    let d = tempfile::tempdir().unwrap();
    let m = skeleton(d.path(), "32b.gguf", QWEN2_32B, "Q4_K_M");
    let m = m.to_str().unwrap();
    for (machine, least) in [("h100", 1.6), ("rtx-5060-ti", 1.1), ("rtx-3090-gen3x8", 1.5)] {
        let args = [m, "--machine", machine, "--vram", "8GB", "--ram", "16GiB", "--tier-c", "none"];
        let (both, again) = (plan(&args), plan(&args));
        assert_eq!(both, again);
        let one = plan(&[&args[..], &["--exact"]].concat());
        assert_eq!((both["site"].as_str(), one["site"].as_str()), (Some("both"), Some("gpu")), "{machine}");
        assert!(one["beside"].is_null() && both["beside"]["units"].as_u64() > Some(0), "{both}");
        let factor = speed(&both) / speed(&one);
        assert!(factor > least, "{machine}: {factor}");
        let all = plan(&[&args[..], &["--site", "both"]].concat());
        assert!(all["beside"]["bytes"].as_u64() >= both["beside"]["bytes"].as_u64(), "{machine}");
    }
    let fits = plan(&[m, "--machine", "h100"]);
    assert!(fits["site"] == "gpu" && fits["beside"].is_null(), "{fits}");
}

/// A model a little larger than a desktop's VRAM is planned with its feed-forward parts cut; a server's processors would wait.
#[test]
fn parts_are_cut_where_sites_would_work_in_turn() {
    let d = tempfile::tempdir().unwrap();
    let m = skeleton(d.path(), "32b.gguf", QWEN2_32B, "Q4_K_M");
    let m = m.to_str().unwrap();
    let on = |machine: &str, more: &[&str]| plan(&[&[m, "--machine", machine], more].concat());
    let (cut, whole) = (on("rtx-5060-ti", &[]), on("rtx-5060-ti", &["--ffn-slices", "off"]));
    let part = cut["beside"]["part_of_each"].as_f64().unwrap();
    assert!((0.05..0.5).contains(&part) && whole["beside"]["part_of_each"].is_null(), "{part}");
    assert!(speed(&cut) > 1.15 * speed(&whole), "{} {}", speed(&cut), speed(&whole));
    // Sites, links and the chain count slices where they are computed.
    let of_site = |name: &str| cut["sites"].as_array().unwrap().iter().find(|s| s["site"] == name).unwrap().clone();
    let (gpu, cpu) = (of_site("gpu"), of_site("cpu"));
    let bytes = |site: &Value| site["bytes_per_token"].as_f64().unwrap();
    assert!(cpu["bytes"].as_f64() == Some(bytes(&cpu)) && bytes(&gpu) > 4.0 * bytes(&cpu), "{gpu} {cpu}");
    assert!(speed(&cut) <= cut["roofline"]["decode"]["tokens_per_s"].as_f64().unwrap() * 1.001, "{cut}");
    // Columns of down are read in whole rows, for both sites.
    let load = |v: &Value| v["first_token"]["load_s"].as_f64().unwrap();
    assert!(load(&cut) > 1.15 * load(&whole) && load(&cut) < 1.6 * load(&whole), "{} {}", load(&cut), load(&whole));
    // Told to, any machine cuts; a plan's file has it, and is the same again.
    let told = on("h100", &["--vram", "8GB", "--ffn-slices", "40"]);
    assert_eq!(told["beside"]["part_of_each"].as_f64(), Some(102.0 / 256.0));
    let auto = on("h100", &["--vram", "8GB"]);
    assert!(auto["beside"]["part_of_each"].is_null() && speed(&auto) > speed(&told), "{}", speed(&told));
    assert_ne!(auto["plan_id"], told["plan_id"]);
    for wrong in ["0", "100", "half", "-3", "1e1"] {
        let output = nt(&["plan", m, "--machine", "h100", &format!("--ffn-slices={wrong}")]);
        assert_eq!(output.status.code(), Some(2), "{wrong}");
    }
}

/// Experts that both sites compute are counted at both: bytes per link and per site.
#[test]
fn divided_experts_are_counted_by_site_and_link() {
    let dir = tempfile::tempdir().unwrap();
    let path = shapes::shaped(dir.path(), "qwen3-30b-a3b-Q4_K_M");
    let path = path.to_str().unwrap();
    let with = |more: &[&str]| plan(&[&[path, "--machine", "h100", "--vram", "4GiB", "--ctx", "1024"], more].concat());
    let bytes = |v: &Value, list: &str, key: &str, name: &str| {
        let of = v[list].as_array().unwrap().iter().find(|e| e[key] == name);
        of.map_or(0.0, |e| e["bytes_per_token"].as_f64().unwrap())
    };
    let both = with(&[]);
    let one = with(&["--exact"]);
    let part = both["beside"]["part_of_choices"].as_f64().unwrap();
    assert!((0.5..0.8).contains(&part), "{both}");
    let (gpu, cpu) = (bytes(&both, "sites", "site", "gpu"), bytes(&both, "sites", "site", "cpu"));
    let all = bytes(&one, "sites", "site", "gpu");
    assert!((gpu + cpu - all).abs() < 1.0, "a token's weights are computed once: {gpu} {cpu} {all}");
    let (link, all_by_link) = (bytes(&both, "links", "link", "gpu"), bytes(&one, "links", "link", "gpu"));
    assert!((link + cpu - all_by_link).abs() < 1e-3 * all_by_link, "{link} {cpu} {all_by_link}");
    assert!((cpu / (link + cpu) - part).abs() < 1e-3, "{both}");
    assert_eq!(bytes(&both, "links", "link", "ram"), link + cpu);
    assert_eq!(both["roofline"]["decode"]["bound_by"], "chain");
    assert!(both["simulated"]["busy"]["gpu"].as_f64() > Some(0.2), "{both}");
    // So are those whose ids are forced.
    assert_eq!(with(&["--routing", "uniform"])["beside"]["part_of_choices"], both["beside"]["part_of_choices"]);
    let shown = nt(&["plan", path, "--machine", "h100", "--vram", "4GiB", "--ctx", "1024"]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("% of what a token chooses of") && shown.contains("bound by chain"), "{shown}");

    let (timeline, html) = (dir.path().join("t.json"), dir.path().join("p.html"));
    with(&["--timeline", timeline.to_str().unwrap(), "--html", html.to_str().unwrap()]);
    let events: Value = serde_json::from_str(&std::fs::read_to_string(timeline).unwrap()).unwrap();
    let count = |cat: &str| events["traceEvents"].as_array().unwrap().iter().filter(|e| e["cat"] == cat).count();
    // Six tokens of 48 layers, each with experts at both sites.
    assert!(
        count("compute beside") > 6 * 48 && count("copy") > 6 * 48,
        "{} {}",
        count("compute beside"),
        count("copy")
    );
    let html = std::fs::read_to_string(html).unwrap();
    assert!(html.contains("<h2>Sites</h2>") && html.contains("processors next to the GPU"));
}

#[test]
fn more_of_anything_is_listed_with_what_it_brings() {
    let d = tempfile::tempdir().unwrap();
    let m = skeleton(d.path(), "70b.gguf", LLAMA3_70B, "Q6_K");
    let v = plan(&[m.to_str().unwrap(), "--machine", "laptop-8gb"]);
    let changes = v["changes"].as_array().unwrap();
    let factor = |what: &str| {
        let c = changes.iter().find(|c| c["what"].as_str().unwrap().contains(what));
        c.unwrap_or_else(|| panic!("no {what} in {v}"))["factor"].as_f64().unwrap()
    };
    assert!(factor("second drive") > 1.5 && factor("Q4_K_M") > 1.3 && factor("VRAM") > 1.0 && factor("RAM") > 1.0);
    let factors: Vec<f64> = changes.iter().map(|c| c["factor"].as_f64().unwrap()).collect();
    assert!(factors.is_sorted_by(|a, b| a >= b));
}

#[test]
fn what_does_not_fit_exits_with_4_and_names_what_would() {
    let d = tempfile::tempdir().unwrap();
    let m = skeleton(d.path(), "70b.gguf", LLAMA3_70B, "Q6_K");
    let m = m.to_str().unwrap();
    fails(&["plan", m, "--machine", "laptop-8gb", "--tiers", "79:1:0"], 4, &["79:1:0", "GiB", "fits"]);
    fails(&["plan", m, "--machine", "cpu-only", "--tier-c", "none"], 4, &["--tier-c none", "fits"]);
    fails(&["plan", m, "--machine", "cpu-only", "--ram", "1GiB"], 4, &["--ram", "would fit"]);
    let small = tiny(4).write(d.path(), "tiny.gguf");
    fails(&["run", small.to_str().unwrap(), "-p", "x", "--backend", "cpu", "--ram", "4096"], 4, &["would fit"]);
}

#[test]
fn machines_are_read_from_files_and_refused_by_name() {
    let d = tempfile::tempdir().unwrap();
    let m = tiny(6).write(d.path(), "tiny.gguf");
    let m = m.to_str().unwrap();
    fails(&["plan", m, "--machine", "no-such"], 2, &["no-such", "rtx-4090"]);
    let file = d.path().join("m.toml");
    let text = "name = 'mine'\n[ram]\nsize = '1GiB'\nread = { gb_per_s = 10.0 }\n[cpu]\nthreads = 2\n";
    std::fs::write(&file, text).unwrap();
    let v = plan(&[m, "--machine", file.to_str().unwrap()]);
    assert_eq!((v["machine"]["name"].as_str(), v["site"].as_str()), (Some("mine"), Some("cpu")));
    // Nothing is known of products, so nothing is said of prefill.
    assert!(v["roofline"]["prefill"].is_null() && v["first_token"]["seconds"].is_null());
    std::fs::write(&file, text.replace("10.0", "0.0")).unwrap();
    fails(&["plan", m, "--machine", file.to_str().unwrap()], 2, &["m.toml", "no rate"]);
    fails(&["plan", m, "--machine", file.to_str().unwrap(), "--backend", "cuda"], 2, &["no rate"]);
    // This machine, whatever it has.
    assert!(plan(&[m, "--backend", "cpu"])["plan"]["blocks"].is_string());
}

#[test]
fn the_predicted_timeline_has_the_form_of_the_measured_one() {
    let d = tempfile::tempdir().unwrap();
    for (name, file) in [("dense", tiny(6)), ("experts", tiny_moe(6))] {
        let m = file.write(d.path(), name);
        let out = d.path().join("t.json");
        let args = ["--machine", "cpu-only", "--tiers", "0:2:4", "--timeline"];
        plan(&[&[m.to_str().unwrap()], &args[..], &[out.to_str().unwrap()]].concat());
        let v: Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
        let events = v["traceEvents"].as_array().unwrap();
        let of = |cat: &str| events.iter().filter(|e| e["cat"] == cat).count();
        assert!(of("read") > 0 && of("compute") > 0, "{name}: {v}");
        assert!(events.iter().all(|e| e["ph"] == "X" && e["dur"].as_f64() >= Some(0.0)));
    }
}

#[test]
fn a_benchmark_says_what_the_simulator_expected() {
    let d = tempfile::tempdir().unwrap();
    let m = tiny(6).write(d.path(), "m.gguf");
    let args = ["--backend", "cpu", "--tiers", "0:3:3", "-p", "0", "-n", "4", "-r", "1", "--json"];
    let out = nt(&[&["bench", m.to_str().unwrap()], &args[..]].concat());
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let v: Value = serde_json::from_slice(&out.stdout).unwrap();
    let p = &v["prediction"];
    assert!(p["tokens_per_s"].as_f64() > Some(0.0) && p["achieved"].as_f64() > Some(0.0), "{v}");
}

/// Caches of experts, how often they hit and what is left to read, for experts that are all as likely, by Zipf's law and by
/// a trace.
#[test]
fn caches_of_experts_are_predicted() {
    let d = tempfile::tempdir().unwrap();
    let m = common::many_experts(4).write(d.path(), "m.gguf");
    let trace = d.path().join("t.jsonl");
    let token = |t: usize| format!("[{}]\n", vec![format!("[{},{}]", t % 4, 4 + t % 3); 4].join(","));
    std::fs::write(&trace, (0..12).map(token).collect::<String>()).unwrap();
    let plan = |more: &[&str]| {
        let args = ["plan", m.to_str().unwrap(), "--backend", "cpu", "--ctx", "64", "--json", "--machine", "cpu-only"];
        let out = nt(&[&args[..], &["-b", "16"], more].concat());
        assert!(out.status.success(), "{more:?}: {}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap()
    };
    let ram = ["--ram", "5MiB"];
    let by = |routing: &str| plan(&[&ram[..], &["--routing", routing]].concat());
    let trace = format!("trace:{}", trace.display());
    let all = [plan(&ram), by("uniform"), by("zipf:1.2"), by(&trace)];
    let slots = all[0]["caches"]["slots"].as_f64().unwrap();
    let rates: Vec<f64> = all.iter().map(|p| p["caches"]["hit_rate"].as_f64().unwrap()).collect();
    assert!((rates[0] - slots / 64.0).abs() < 1e-9 && (rates[1] - rates[0]).abs() < 0.05, "{rates:?}");
    // A trace of seven experts a layer fits.
    assert!(rates[2] > rates[0] + 0.05 && rates[3] == 1.0, "{rates:?}");
    let bytes: Vec<f64> = all.iter().map(|p| p["storage_bytes_per_token"].as_f64().unwrap()).collect();
    assert!(bytes[0] > bytes[2] && bytes[2] > bytes[3] && bytes[3] == 0.0, "{bytes:?}");
    let speed = |p: &serde_json::Value| p["simulated"]["tokens_per_s"].as_f64().unwrap();
    assert!(speed(&all[3]) > speed(&all[0]), "{} {}", speed(&all[3]), speed(&all[0]));
    assert!(plan(&["--ram", "3MiB"])["caches"].is_null());
    for (wrong, word) in
        [("zipf:x", "zipf:S"), ("often", "uniform"), ("trace:", "trace:FILE"), ("trace:/none", "/none")]
    {
        let args = ["plan", m.to_str().unwrap(), "--backend", "cpu", "--routing", wrong];
        fails(&args, 2, &[word]);
    }
    // A trace of another model, and one with a fault below its header: the line is the file's.
    let trace = d.path().join("trace.jsonl");
    let routing = format!("trace:{}", trace.display());
    let token = "[[0,1],[0,1],[0,1],[0,1]]";
    for (text, words) in [
        (
            format!("{{\"layers\": 48, \"experts\": 16}}\n{token}\n"),
            &["line 1", "\"layers\": 48", "the model has 4"][..],
        ),
        (format!("{{\"layers\": 4}}\n{token}\n\n[[0,1],[0,1],[0,1],[0,16]]\n"), &["line 4", "expert 16"]),
    ] {
        std::fs::write(&trace, text).unwrap();
        fails(&["plan", m.to_str().unwrap(), "--backend", "cpu", "--routing", &routing], 2, words);
    }
    let dense = tiny(2).write(d.path(), "dense.gguf");
    fails(&["plan", dense.to_str().unwrap(), "--backend", "cpu", "--routing", "uniform"], 2, &["no routed experts"]);
}

/// A plan has an id, and is made again by it or from a file; what does not fit is refused in a sentence.
#[test]
fn a_plan_is_saved_and_repeated() {
    let d = tempfile::tempdir().unwrap();
    let path = shapes::shaped(d.path(), "qwen3-30b-a3b-Q4_K_M");
    let (path, small) = (path.to_str().unwrap(), tiny_moe(6).write(d.path(), "tiny.gguf"));
    let file = d.path().join("plan.toml");
    let (file, cache) = (file.to_str().unwrap(), d.path().join("cache"));
    std::fs::create_dir(&cache).unwrap();
    let with = |args: &[&str]| {
        let out = std::process::Command::new(common::bin()).args(args).env("XDG_CACHE_HOME", &cache).output().unwrap();
        (out.status.code(), out.stdout, String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let json = |args: &[&str]| -> Value {
        let (code, out, err) = with(&[args, &["--json"]].concat());
        assert_eq!(code, Some(0), "{args:?}: {err}");
        serde_json::from_slice(&out).unwrap()
    };
    let h100 = ["plan", path, "--machine", "h100", "--ctx", "1024"];
    let saved = json(&[&h100[..], &["--vram", "4GiB", "--save", file]].concat());
    let id = saved["plan_id"].as_str().unwrap();
    assert_eq!(id.len(), 12);
    // Another context takes another workspace, and another link rate would divide otherwise.
    let other = ["--ctx", "2048", "--link", "20"];
    let machine = ["plan", path, "--machine", "h100"];
    assert_ne!(json(&[&machine[..], &other, &["--vram", "4GiB"]].concat())["plan_id"], id);
    for given in [file, id] {
        let again = json(&[&machine[..], &other, &["--plan", given]].concat());
        for key in ["plan_id", "plan", "beside", "site"] {
            assert_eq!(again[key], saved[key], "{given}: {key}");
        }
    }
    let refused = |args: &[&str], code, words: &[&str]| {
        let (got, _, err) = with(args);
        assert_eq!(got, Some(code), "{args:?}: {err}");
        assert!(words.iter().all(|w| err.contains(w)) && err.trim().lines().count() < 6, "{args:?}: {err}");
    };
    let small = small.to_str().unwrap();
    refused(&["plan", small, "--machine", "h100", "--plan", file], 4, &[id, "another shape"]);
    refused(&["plan", path, "--machine", "cpu-only", "--plan", file], 4, &[id, "for a GPU"]);
    refused(&["plan", path, "--machine", "h100", "--plan", "0123456789ab"], 2, &["0123456789ab", "--save"]);
    refused(&["plan", path, "--machine", "h100", "--plan", path], 2, &["--plan"]);
    refused(&["plan", path, "--machine", "h100", "--plan", file, "--vram", "8GiB"], 2, &["--vram"]);
    let eight = json(&["plan", path, "--machine", "h100", "--ctx", "1024", "--vram", "60GiB", "--tiers", "20:28:0"]);
    refused(&["plan", path, "--machine", "laptop-8gb", "--plan", eight["plan_id"].as_str().unwrap()], 4, &["of VRAM"]);
    let text = std::fs::read_to_string(file).unwrap();
    let edited = d.path().join("edited.toml");
    let rate = text.split("rates = [").nth(1).and_then(|t| t.split(',').next()).unwrap();
    std::fs::write(&edited, text.replace(rate.trim(), "7")).unwrap();
    refused(&[&machine[..], &["--plan", edited.to_str().unwrap()]].concat(), 4, &["other units"]);
    std::fs::write(&edited, text.replace("vram", "varm")).unwrap();
    refused(&[&machine[..], &["--plan", edited.to_str().unwrap()]].concat(), 2, &["edited.toml", "varm"]);

    // A run has one too.
    let run = ["run", small, "-p", "x", "-n", "4", "--temp", "0", "--backend", "cpu"];
    let first = json(&run);
    let again = json(&[&run[..], &["--plan", first["plan_id"].as_str().unwrap()]].concat());
    assert_eq!((&first["plan_id"], &first["tokens"]), (&again["plan_id"], &again["tokens"]));
    refused(&["run", small, "-p", "x", "--backend", "cpu", "--plan", file], 4, &[id, "another shape"]);
    let id = first["plan_id"].as_str().unwrap();
    refused(&[&run[..], &["--plan", id, "--ram", "1GiB"]].concat(), 2, &["--ram"]);

    // Bits follow from the type of the cache, so that it is part of a plan, and comes with it.
    let wide = json(&[&run[..], &["--kv", "f32"]].concat());
    let wide_id = wide["plan_id"].as_str().unwrap();
    assert_ne!(wide_id, id);
    let again = json(&[&run[..], &["--plan", wide_id]].concat());
    assert_eq!((&wide["plan_id"], &wide["tokens"]), (&again["plan_id"], &again["tokens"]));
    refused(&[&run[..], &["--plan", id, "--kv", "f32"]].concat(), 4, &[id, "F16", "F32", "--kv"]);
    refused(&[&run[..], &["--plan", wide_id, "--kv", "f16"]].concat(), 4, &[wide_id, "--kv"]);
    let logits = ["logits", small, "--tokens", "1,2", "--backend", "cpu", "-o", "/dev/null", "--plan"];
    assert_eq!(with(&[&logits[..], &[id]].concat()).0, Some(0));

    // What would become another plan is not made in its place: weights of this one may lie on storage, of that one not.
    let streams = json(&[&run[..], &["--tiers", "0:2:4"]].concat());
    let id = streams["plan_id"].as_str().unwrap();
    assert_eq!(json(&[&run[..], &["--plan", id]].concat())["plan_id"], id);
    refused(&[&run[..], &["--plan", id, "--tier-c", "none"]].concat(), 4, &[]);
    let all = json(&["plan", path, "--machine", "h100", "--ctx", "1024", "--site", "gpu", "--save", file]);
    let id = all["plan_id"].as_str().unwrap();
    assert_eq!(all["plan"]["b"]["units"], 0);
    refused(&["plan", path, "--machine", "rtx-5060-ti", "--plan", file], 4, &[id, "differs in the room"]);
}

/// Guards against a plan of this machine that chooses buffers by guesses, which a run does not; and against a run that takes others once
/// rates were measured.
#[test]
fn a_plan_of_this_machine_is_that_of_a_run() {
    let d = tempfile::tempdir().unwrap();
    let m = common::sized(4, 128, 1024).write(d.path(), "m.gguf").display().to_string();
    let with = |args: &[&str]| -> Value {
        let common = ["--backend", "cpu", "--tiers", "0:2:2", "--ram", "64MiB", "--ctx", "64", "--json"];
        let args = [&[args[0], &m[..]], &args[1..], &common].concat();
        let out =
            std::process::Command::new(common::bin()).args(&args).env("XDG_CACHE_HOME", d.path()).output().unwrap();
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    };
    let same = || {
        let (planned, run) = (with(&["plan"]), with(&["run", "-p", "x", "-n", "2"]));
        for key in ["plan_id", "n_buffers"] {
            assert_eq!(planned[key], run[key], "{key}");
        }
    };
    same();
    let mut probe = std::process::Command::new(common::bin());
    probe.args(["probe", "storage", &m, "--seconds", "0.1", "--json"]).env("XDG_CACHE_HOME", d.path());
    let probed = probe.output().unwrap();
    assert!(probed.status.success(), "{}", String::from_utf8_lossy(&probed.stderr));
    same();
}

/// A plan of a GPU with so many bytes of VRAM.
fn with_vram(model: &str, bytes: u64, more: &[&str]) -> std::process::Output {
    let vram = bytes.to_string();
    let args =
        ["plan", model, "--machine", "rtx-4090", "--backend", "cuda", "--ctx", "64", "--batch", "16", "--vram", &vram];
    nt(&[&args[..], more].concat())
}

/// Bytes of VRAM that would do, by what the refusal of 300 MiB says.
fn enough_vram(model: &str) -> u64 {
    let refused = with_vram(model, 300 << 20, &[]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(4), "{said}");
    let missing = said.split("; ").find_map(|part| part.strip_suffix(" more of VRAM would do"));
    (300 << 20) + nt::plan::parse_size(&missing.unwrap_or_else(|| panic!("{said}")).replace(' ', "")).unwrap()
}

/// A refusal for want of VRAM says how much is missing.
#[test]
fn what_vram_lacks_is_told_in_bytes() {
    let d = tempfile::tempdir().unwrap();
    let m = tiny(6).write(d.path(), "m.gguf").display().to_string();
    assert!(with_vram(&m, enough_vram(&m), &[]).status.success());
}

/// Guards against a prediction that exceeds its own bound or falls where VRAM grows, by which experts few simulated passes happen to
/// choose. Buffers are chosen to a hundredth, and what is simulated spreads still.
#[test]
fn predictions_keep_below_their_bounds_and_do_not_fall_with_more_vram() {
    let d = tempfile::tempdir().unwrap();
    let m = common::many_experts(6).write(d.path(), "m.gguf").display().to_string();
    let enough = enough_vram(&m);
    let mut best: f64 = 0.0;
    for vram in (0..20).map(|i| enough + (i << 19)) {
        let v: Value = serde_json::from_slice(&with_vram(&m, vram, &["--json"]).stdout).unwrap();
        let most = v["roofline"]["decode"]["tokens_per_s"].as_f64().unwrap();
        assert!(speed(&v) <= most * (1.0 + 1e-9), "{vram}: {} of {most}", speed(&v));
        assert!(speed(&v) > best * 0.95, "{vram}: {} behind {best}", speed(&v));
        best = best.max(speed(&v));
    }
}

/// Guards against prompts of 512 tokens at a time where each pass carries the same experts, and against a workspace for longer
/// ones that nobody counted or that generated tokens pay for.
#[test]
fn a_pass_has_as_many_tokens_of_a_prompt_as_the_plan_finds_best() {
    let d = tempfile::tempdir().unwrap();
    let m = shapes::shaped(d.path(), "qwen3-30b-a3b-Q4_K_M").display().to_string();
    let of = |more: &[&str]| plan(&[&[&m[..], "--machine", "h100"], more].concat());
    let alone = |v: &Value| v["batch"]["alone"].as_u64().unwrap();
    let first = |v: &Value| v["first_token"]["seconds"].as_f64().unwrap();
    let tight = ["--vram", "4GiB", "-p", "4096"];
    let (chosen, told) = (of(&tight), of(&[&tight[..], &["-b", "512"]].concat()));
    assert!(alone(&told) == 512 && alone(&chosen) >= 2048, "{chosen:#}");
    assert!(first(&chosen) < first(&told) / 3.0, "{} {}", first(&chosen), first(&told));
    assert!(speed(&chosen) > speed(&told) * 0.9, "{} {}", speed(&chosen), speed(&told));
    let bytes = |key: &str| chosen["memory"][key].as_u64().unwrap();
    assert!(bytes("vram_weights_bytes") + bytes("vram_session_bytes") <= 4 << 30);
    assert!(bytes("vram_session_bytes") > told["memory"]["vram_session_bytes"].as_u64().unwrap());
    // Without a link in the way a pass is longer the more it has: others wait for short ones.
    let resident = of(&["-p", "4096"]);
    assert!(alone(&resident) >= 2048 && resident["batch"]["shared"].as_u64() < Some(alone(&resident)), "{resident:#}");
    // No prompt is longer than the context; computing alone binds processors.
    assert_eq!(alone(&of(&["--vram", "4GiB", "--ctx", "512"])), 512);
    assert_eq!(alone(&of(&["--backend", "cpu"])), 512);
    let text = nt(&["plan", &m, "--machine", "h100", "--vram", "4GiB"]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains(&format!("{} tokens per pass", alone(&chosen))), "{text}");
    // A plan that is made again has its passes.
    let file = d.path().join("p.toml").display().to_string();
    let saved = of(&["--vram", "4GiB", "--save", &file]);
    let again = of(&["--plan", &file]);
    assert_eq!((&saved["plan_id"], &saved["batch"]["alone"]), (&again["plan_id"], &again["batch"]["alone"]));
}

/// Guards against a plan that counts all positions of layers whose windows hide all but the last ones, or too few.
#[test]
fn layers_with_windows_take_room_for_recent_positions() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = common::families::gemma3(6);
    file.set("gemma3.context_length", common::V::U32(8192));
    let model = file.write(dir.path(), "m.gguf").display().to_string();
    let kv_bytes = |more: &[&str]| {
        let args = ["plan", &model, "--backend", "cpu", "--ctx", "8192", "--batch", "64", "--json"];
        let run = nt(&[&args[..], more].concat());
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let plan: Value = serde_json::from_slice(&run.stdout).unwrap();
        plan.pointer("/memory/kv_bytes").and_then(Value::as_u64).unwrap_or_else(|| panic!("{plan:#}"))
    };
    // Three layers of six keep all; the others three pages: a window of 4 and a pass of 64 in two, and one more.
    let (whole, recent) = (kv_bytes(&["--swa-full"]), kv_bytes(&[]));
    assert_eq!(recent, whole / 2 + whole / 2 * 3 * 64 / 8192);
}

/// Guards against a prompt's workspace that takes the room of the caches of experts: where passes of 512 tokens leave room for
/// them, those that the plan chooses do.
#[test]
fn a_batch_that_is_chosen_leaves_experts_their_caches() {
    let d = tempfile::tempdir().unwrap();
    let path = shapes::shaped(d.path(), "qwen3-30b-a3b-Q4_K_M/8");
    let plan = |ram: u64, more: &[&str]| {
        let ram = format!("{ram}MiB");
        let args = ["plan", path.to_str().unwrap(), "--machine", "cpu-only", "--backend", "cpu", "--json"];
        let out = nt(&[&args[..], &["--ctx", "8192", "-p", "8000", "--drive", "1", "--ram", &ram], more].concat());
        assert!(out.status.success(), "{ram}: {}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap()
    };
    let mut larger = 0;
    for ram in [1200, 1760] {
        let (usual, chosen) = (plan(ram, &["-b", "512"]), plan(ram, &[]));
        larger += usize::from(chosen["batch"]["alone"].as_u64().unwrap() > 512);
        assert!(usual["caches"].is_null() || chosen["caches"].is_object(), "{ram} MiB: {} per pass", chosen["batch"]);
    }
    assert!(larger > 0);
}

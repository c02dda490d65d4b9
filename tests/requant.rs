//! Requantising on load: the bits of a file that was requantised before, wherever units live; what it wins, and what is refused.

mod common;
#[allow(dead_code, reason = "each test binary uses a part")]
#[path = "common/skeleton.rs"]
mod skeleton;

use std::path::Path;
use std::process::Command;

use common::{File, V, bin, fails, nt, sized, tiny, tiny_moe};
use nt::backend::{quantise, reference};
use nt::gguf::{Gguf, TensorType};
use nt::storage::image::{Content as _, Drive, Identity, Staging, Steps};

/// The file with the matrices that `turns` names as `ty`, made by this test.
fn as_type(file: &File, ty: TensorType, turns: impl Fn(&str) -> bool) -> File {
    let mut out = file.clone();
    for t in out.tensors.iter_mut().filter(|t| t.shape.len() > 1 && !t.name.contains("_inp.") && turns(&t.name)) {
        let from = TensorType::from_id(t.ty).unwrap();
        let n = t.shape.iter().product::<u64>() as usize;
        let mut floats = vec![0.0; n];
        assert!(reference::dequantize(from, &t.data, &mut floats));
        let ty = match (ty, t.shape[0] % 256) {
            (_, 0) => ty,
            (TensorType::Q4_K, _) => TensorType::Q5_0,
            (TensorType::Q6_K, _) => TensorType::Q8_0,
            (ty, _) => ty,
        };
        t.data = vec![0; ty.row_bytes(n).unwrap()];
        t.ty = ty.id();
        quantise::quantise(ty, &floats, &mut t.data).unwrap();
    }
    out
}

/// All matrices but an embedding that is not the head.
fn whole(file: &File, ty: TensorType) -> File {
    let tied = !file.tensors.iter().any(|t| t.name == "output.weight");
    as_type(file, ty, |name| tied || name != "token_embd.weight")
}

fn logits(model: &Path, dir: &Path, more: &[&str]) -> Vec<u8> {
    let out = dir.join("out.npy");
    let tokens = (0..40).map(|i| (i * 37 % 258).to_string()).collect::<Vec<_>>().join(",");
    let mut run = Command::new(bin());
    let run = run.arg("logits").arg(model).args(["--tokens", &tokens, "-o"]).arg(&out).args(more).output().unwrap();
    assert!(run.status.success(), "{more:?}: {}", String::from_utf8_lossy(&run.stderr));
    std::fs::read(out).unwrap()
}

/// Whatever its type in the file was, with one thread or several, and wherever the requantised file's units live.
#[test]
fn the_bits_of_a_file_that_was_requantised_before() {
    let d = tempfile::tempdir().unwrap();
    let tied = |mut f: File| {
        f.tensors.retain(|t| t.name != "output.weight");
        f
    };
    let wide = sized(2, 256, 512);
    let cases = [
        (tiny(6), TensorType::Q4_0),
        (tiny_moe(6), TensorType::Q8_0),
        (tied(tiny(6)), TensorType::Q5_0),
        (tiny(6), TensorType::MXFP4),
        (as_type(&tiny(6), TensorType::Q8_0, |_| true), TensorType::IQ4_NL),
        (wide.clone(), TensorType::Q6_K),
        (as_type(&wide, TensorType::Q6_K, |_| true), TensorType::Q4_K),
        (tied(as_type(&wide, TensorType::Q6_K, |_| true)), TensorType::Q4_K),
        (as_type(&wide, TensorType::Q8_0, |n| n.contains("ffn")), TensorType::Q5_K),
        // Rows of 320 become the type in its place, those of 512 do not.
        (sized(2, 320, 512), TensorType::Q4_K),
        (sized(2, 320, 512), TensorType::Q6_K),
    ];
    for (i, (file, ty)) in cases.into_iter().enumerate() {
        let model = file.write(d.path(), "m.gguf");
        let small = whole(&file, ty).write(d.path(), "small.gguf");
        let name = ty.name().to_lowercase();
        let turned = logits(&model, d.path(), &["--requant", &name, "--threads", "2"]);
        assert!(turned != logits(&model, d.path(), &[]), "{i} {ty}: something changes");
        assert!(turned == logits(&small, d.path(), &[]), "{i} {ty}");
        assert!(turned == logits(&model, d.path(), &["--requant", &name, "--threads", "1"]), "{i} {ty}: one thread");
        let layers = file.tensors.iter().filter(|t| t.name.ends_with("attn_norm.weight")).count();
        let tiers = format!("0:0:{layers}");
        assert!(turned == logits(&small, d.path(), &["--tiers", &tiers]), "{i} {ty}: streamed");
        if ty == TensorType::Q4_K {
            assert!(turned == logits(&model, d.path(), &["--requant-q4k"]), "{i}: the old name");
        }
    }
}

/// What is read from the model file stays as it is there, and the report says so.
#[test]
fn units_on_storage_stay_as_the_file_has_them() {
    let d = tempfile::tempdir().unwrap();
    for file in [tiny(6), tiny_moe(6)] {
        let model = file.write(d.path(), "m.gguf");
        // Of three blocks of six, those with odd numbers rest, and the head.
        let rests = |name: &str| match name.strip_prefix("blk.") {
            Some(rest) => rest[..1].parse::<usize>().unwrap() % 2 == 1,
            None => name == "output.weight",
        };
        let small = as_type(&file, TensorType::Q8_0, rests).write(d.path(), "small.gguf");
        let turned = logits(&model, d.path(), &["--requant", "q8_0", "--tiers", "0:3:3"]);
        assert!(turned == logits(&small, d.path(), &["--threads", "2"]));
    }
    let model = tiny(6).write(d.path(), "m.gguf");
    let args =
        ["run", model.to_str().unwrap(), "-p", "x", "-n", "2", "--requant", "q8_0", "--tiers", "0:3:3", "--json"];
    let run = nt(&args);
    let json: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    let err = String::from_utf8_lossy(&run.stderr);
    assert!(err.contains("6 units (") && err.contains("nt stage --requant q8_0"), "{err}");
    let r = &json["requant"];
    assert_eq!((&r["type"], &r["left"]["units"]), (&"Q8_0".into(), &6.into()), "{r}");
    let turned = &r["turned"][0];
    // Seven matrices of each of three blocks, and the head's slices.
    assert!(turned["from"] == "F32" && turned["matrices"].as_u64() > Some(21), "{r}");
    let (before, after) = (turned["bytes_before"].as_u64().unwrap(), turned["bytes_after"].as_u64().unwrap());
    assert_eq!(after, before / 128 * 34, "{r}");
    assert!(r["kl_divergence"].is_null());
    // What rests takes the smaller type's room, so that all of it rests where only a part of the file would.
    let on_storage = |ram: &str, more: &[&str]| {
        let run = nt(&[&["run", model.to_str().unwrap(), "-p", "x", "-n", "2", "--ram", ram, "--json"], more].concat());
        let json = serde_json::from_slice::<serde_json::Value>(&run.stdout).ok()?;
        json["plan"]["c"]["units"].as_u64()
    };
    let rams = ["700KiB", "800KiB", "900KiB", "1000KiB", "1100KiB", "1200KiB"];
    let found = rams.map(|ram| (on_storage(ram, &[]), on_storage(ram, &["--requant", "q8_0"])));
    assert!(found.iter().any(|(plain, turned)| plain.is_none_or(|n| n > 0) && *turned == Some(0)), "{found:?}");
    assert!(found.iter().all(|(plain, turned)| plain.is_none() || turned <= plain), "{found:?}");
}

/// A staged drive holds the requantised model under a name of its own, which verifies and has the same bits.
#[test]
fn a_staged_model_is_the_one_that_is_requantised_on_load() {
    let d = tempfile::tempdir().unwrap();
    let mut file = tiny_moe(4);
    file.set("general.file_type", V::U32(0));
    let model = file.write(d.path(), "m.gguf");
    let (gguf, sources) = nt::storage::source::model(&model).unwrap();
    let files = nt::engine::smaller_files(&gguf, sources, TensorType::Q4_0, 3).unwrap();
    let image = d.path().join("drive.img");
    let node = std::fs::File::options().read(true).write(true).create_new(true).open(&image).unwrap();
    let size = 32 << 20;
    node.set_len(size).unwrap();
    let mut drive = Drive { file: &node, size, block: 512 };
    let identity = Identity { serial: "S".into(), model: "M".into(), namespace: 1 };
    let staging = Staging::plan(&mut drive, &files, &identity, &[]).unwrap();
    let manifests = staging.write(&mut drive, &mut Steps::new(&mut |_, _| (), &|| false)).unwrap();
    assert_eq!((manifests[0].file.as_str(), manifests[0].requant.as_deref()), ("m.q4_0.gguf", Some("Q4_0")));
    // The same tensors as the file that this test makes, under a header that differs in types and places alone.
    let at = manifests[0].extents[0].1 as usize;
    let bytes = std::fs::read(&image).unwrap()[at..at + manifests[0].size as usize].to_vec();
    let staged = Gguf::parse(Path::new("s"), &bytes[..], bytes.len() as u64).unwrap();
    let want = whole(&file, TensorType::Q4_0);
    assert_eq!(staged.metadata.uint("general.file_type"), Some(2));
    assert_eq!(staged.tensors.len(), want.tensors.len());
    for (t, w) in staged.tensors.iter().zip(&want.tensors) {
        assert_eq!((&t.name, t.ty.id(), &t.shape), (&w.name, w.ty, &w.shape));
        assert!(bytes[t.offset as usize..][..t.bytes as usize] == w.data, "{}", t.name);
    }
    assert_eq!(files[0].header(), &bytes[..staged.data_start(0) as usize]);
    let turned = logits(&model, d.path(), &["--requant", "q4_0"]);
    std::fs::remove_file(&model).unwrap();
    let image = image.to_str().unwrap();
    let away = d.path().join("none");
    let logits = |more: &[&str]| {
        let out = d.path().join("out.npy");
        let tokens = (0..40).map(|i| (i * 37 % 258).to_string()).collect::<Vec<_>>().join(",");
        let mut run = Command::new(bin());
        run.env("XDG_DATA_HOME", &away).args(["logits", "m.q4_0", "--tier-c", image, "--tokens", &tokens, "-o"]);
        let run = run.arg(&out).args(more).output().unwrap();
        assert!(run.status.success(), "{more:?}: {}", String::from_utf8_lossy(&run.stderr));
        std::fs::read(out).unwrap()
    };
    for more in [vec![], vec!["--tiers", "0:0:4", "--verify"], vec!["--tiers", "0:2:2"], vec!["--requant", "q4_0"]] {
        assert!(logits(&more) == turned, "{more:?}");
    }
    let run = Command::new(bin()).env("XDG_DATA_HOME", &away).args(["verify", "m.q4_0", "--tier-c", image]).output();
    let run = run.unwrap();
    let out = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success() && out.contains("requantised to Q4_0") && out.contains("all as recorded"), "{out}");
}

/// Each shard becomes a file of its own, whose name keeps its number.
#[test]
fn shards_become_shards() {
    let d = tempfile::tempdir().unwrap();
    let file = tiny(2);
    let (first, second) = file.tensors.split_at(7);
    let shard = |no: u32, tensors: &[common::T]| {
        let mut meta = if no == 0 { file.meta.clone() } else { Vec::new() };
        meta.extend([("split.no".into(), V::U32(no)), ("split.count".into(), V::U32(2))]);
        let f = File { meta, tensors: tensors.to_vec(), ..file.clone() };
        f.write(d.path(), &format!("m-0000{}-of-00002.gguf", no + 1))
    };
    let model = shard(0, first);
    shard(1, second);
    let (gguf, sources) = nt::storage::source::model(&model).unwrap();
    let small = d.path().join("small");
    std::fs::create_dir(&small).unwrap();
    for f in nt::engine::smaller_files(&gguf, sources, TensorType::Q5_1, 2).unwrap() {
        // In pieces that are no whole rows.
        let mut bytes = vec![0; f.size() as usize];
        for (i, piece) in bytes.chunks_mut(1000).enumerate() {
            f.read_at(piece, 1000 * i as u64).unwrap();
        }
        std::fs::write(small.join(f.names().unwrap().0), bytes).unwrap();
    }
    let turned = logits(&model, d.path(), &["--requant", "q5_1"]);
    assert!(turned == logits(&small.join("m.q5_1-00001-of-00002.gguf"), d.path(), &[]));
    let one = whole(&file, TensorType::Q5_1).write(d.path(), "one.gguf");
    assert!(turned == logits(&one, d.path(), &[]));
}

#[test]
fn a_plan_shows_what_it_wins() {
    let d = tempfile::tempdir().unwrap();
    let ten = skeleton::Shape { layers: 10, ..skeleton::LLAMA3_70B };
    let model = skeleton::skeleton(d.path(), "m.gguf", ten, "Q6_K");
    let plan = |more: &[&str]| {
        let args =
            ["plan", model.to_str().unwrap(), "--machine", "h100", "--tiers", "0:10:0", "--site", "gpu", "--json"];
        let run = nt(&[&args, more].concat());
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        serde_json::from_slice::<serde_json::Value>(&run.stdout).unwrap()
    };
    let r = &plan(&["--requant", "q4_k"])["requant"];
    let of =
        |when: &str| (r[when]["bytes_per_token"]["link"].as_f64().unwrap(), r[when]["tokens_per_s"].as_f64().unwrap());
    let ((before, slow), (after, fast)) = (of("before"), of("after"));
    let share = after / before;
    assert!((share - 144.0 / 210.0).abs() < 0.001 && fast > 1.3 * slow, "{r}");
    assert_eq!(r["turned"][0]["from"], "Q6_K");
    assert!(plan(&[])["requant"].is_null());
    // A plan that is made again requantises to the same type, and to no other.
    let saved = d.path().join("plan.toml");
    plan(&["--requant", "q4_k", "--save", saved.to_str().unwrap()]);
    let again = ["plan", model.to_str().unwrap(), "--machine", "h100", "--plan", saved.to_str().unwrap()];
    let run = nt(&[&again[..], &["--json"]].concat());
    let json: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(json["requant"]["type"], "Q4_K", "{}", String::from_utf8_lossy(&run.stderr));
    fails(&[&again[..], &["--requant", "q5_k"]].concat(), 4, &["it requantises to Q4_K, not to Q5_K"]);
    let text = nt(&["plan", model.to_str().unwrap(), "--machine", "cpu-only", "--requant", "q5_k"]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("requant   Q6_K to Q5_K") && text.contains("a token before"), "{text}");
}

#[test]
fn what_cannot_be_is_refused_in_a_sentence() {
    let d = tempfile::tempdir().unwrap();
    let small = whole(&tiny(2), TensorType::Q4_0).write(d.path(), "small.gguf");
    let plain = tiny(2).write(d.path(), "m.gguf");
    let run = |model: &Path, ty: &str, code: i32, words: &[&str]| {
        fails(&["run", model.to_str().unwrap(), "-p", "x", "-n", "1", "--requant", ty], code, words);
        fails(&["plan", model.to_str().unwrap(), "--requant", ty], code, words);
    };
    run(&small, "q8_0", 2, &["--requant Q8_0 would make matrices larger", "Q4_0"]);
    run(&plain, "q9_x", 2, &["--requant", "one of q8_0"]);
    run(&plain, "q2_k", 2, &["--requant", "one of q8_0"]);
    // Rows of 64, which the blocks of Q5_0 in its place divide.
    let run_ = nt(&["run", plain.to_str().unwrap(), "-p", "x", "-n", "1", "--requant", "q4_k"]);
    assert!(run_.status.success() && String::from_utf8_lossy(&run_.stderr).contains("F32 to Q5_0"));
    fails(&["run", plain.to_str().unwrap(), "-p", "x", "--requant", "q8_0", "--requant-q4k"], 2, &["--requant"]);
    // A type that all matrices have already changes nothing.
    let run = nt(&["run", small.to_str().unwrap(), "-p", "x", "-n", "1", "--requant", "q4_0"]);
    assert!(run.status.success() && String::from_utf8_lossy(&run.stderr).contains("requant   nothing"));

    let mut broken = tiny(2);
    let t = broken.tensor("blk.1.ffn_up.weight");
    t.data[64 * 4 * 5..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let broken = broken.write(d.path(), "nan.gguf");
    let words = ["blk.1 feed-forward: a matrix cannot be requantised", "not finite", "nt verify"];
    fails(&["run", broken.to_str().unwrap(), "-p", "x", "-n", "1", "--requant", "q4_0"], 1, &words);
    let mut huge = tiny(2);
    huge.tensor("blk.0.attn_q.weight").data[..4].copy_from_slice(&1e30f32.to_le_bytes());
    let huge = huge.write(d.path(), "huge.gguf");
    let words = ["blk.0 attention", "larger than Q4_0 holds"];
    fails(&["run", huge.to_str().unwrap(), "-p", "x", "-n", "1", "--requant", "q4_0"], 1, &words);
    let (gguf, sources) = nt::storage::source::model(&small).unwrap();
    let none = nt::engine::smaller_files(&gguf, sources, TensorType::Q4_0, 1).unwrap_err().to_string();
    assert!(none.contains("no matrix of the model is larger"), "{none}");
}

#[test]
fn perplexity_compares_with_the_file() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    let text = d.path().join("text");
    std::fs::write(&text, "A short text is long enough for a model as small as this one.\n".repeat(8)).unwrap();
    let (model, text) = (model.to_str().unwrap(), text.to_str().unwrap());
    let measure = |more: &[&str]| {
        let run = nt(&[&["perplexity", model, "--file", text, "--ctx", "64", "--json"], more].concat());
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        serde_json::from_slice::<serde_json::Value>(&run.stdout).unwrap()
    };
    let plain = measure(&[]);
    let by = |ty: &str| measure(&["--requant", ty, "--kl"]);
    let (eight, four) = (by("q8_0"), by("q4_0"));
    let kl = |json: &serde_json::Value| json["requant"]["kl_divergence"].as_f64().unwrap();
    assert!(0.0 < kl(&eight) && kl(&eight) < kl(&four) / 10.0 && kl(&four) < 1.0, "{eight} {four}");
    assert_eq!(four["before"]["perplexity"], plain["perplexity"]);
    assert_eq!(measure(&["--requant", "q4_0"])["perplexity"], four["perplexity"]);
    assert!(plain["requant"].is_null() && plain.get("before").is_none());
    fails(&["perplexity", model, "--file", text, "--ctx", "64", "--kl"], 2, &["--kl", "--requant TYPE"]);
}

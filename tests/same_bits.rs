//! The same logits, to the bit, wherever units live and however they are read.

mod common;

#[path = "same_bits/recent.rs"]
mod recent;
#[path = "same_bits/rows.rs"]
mod rows;
#[path = "same_bits/sequences.rs"]
mod sequences;

use common::{nt, tiny};
use std::path::Path;

fn logits(model: &Path, dir: &Path, more: &[&str]) -> Vec<u8> {
    let out = dir.join("out.npy");
    let tokens: Vec<String> = (0..40).map(|i| (i * 37 % 258).to_string()).collect();
    let mut args = vec!["logits".into(), model.display().to_string(), "--tokens".into(), tokens.join(",")];
    args.extend(["-o".into(), out.display().to_string()]);
    args.extend(more.iter().map(|s| s.to_string()));
    let run = nt(&args);
    assert!(run.status.success(), "{more:?}: {}", String::from_utf8_lossy(&run.stderr));
    std::fs::read(out).unwrap()
}

fn placements() -> Vec<Vec<&'static str>> {
    vec![
        vec!["--tiers", "0:0:6"],
        vec!["--tiers", "0:3:3"],
        vec!["--tiers", "0:5:1", "--threads", "1"],
        vec!["--ram", "1400KiB", "--n-buffers", "2"],
        vec!["--ram", "1400KiB", "--n-buffers", "2", "--threads", "2", "--reader", "pread"],
        vec!["--tiers", "0:0:6", "--n-buffers", "3", "--reader", "pread"],
        vec!["--tiers", "0:2:4", "--n-buffers", "4", "--threads", "2"],
        vec!["--tiers", "0:0:6", "--n-buffers", "5"],
        vec!["--tiers", "0:0:6", "--n-buffers", "6", "--threads", "3"],
        // More than there are units.
        vec!["--tiers", "0:0:6", "--n-buffers", "64"],
    ]
}

/// Guards against a prompt whose logits depend on the passes that it was cut into, on any instruction set.
#[test]
fn a_prompt_cut_into_passes() {
    let d = tempfile::tempdir().unwrap();
    let models = [tiny(3).write(d.path(), "m.gguf"), common::tiny_moe(3).write(d.path(), "moe.gguf")];
    let by = |isa: &str, kv: &str, model: &Path, more: &[&str]| {
        let out = d.path().join("cut.npy");
        let tokens = (0..90).map(|i| (i * 37 % 258).to_string()).collect::<Vec<_>>().join(",");
        let mut command = std::process::Command::new(common::bin());
        command.env("NT_CPU", isa).arg("logits").arg(model).args(["--tokens", &tokens, "--kv", kv, "-o"]);
        let run = command.arg(&out).args(more).output().unwrap();
        assert!(run.status.success(), "{more:?}: {}", String::from_utf8_lossy(&run.stderr));
        std::fs::read(&out).unwrap()
    };
    for model in &models {
        for isa in ["scalar", "avx2", "avx512", "amx"] {
            let whole = by(isa, "f16", model, &[]);
            for batch in ["1", "7", "64", "89"] {
                assert!(by(isa, "f16", model, &["--batch", batch]) == whole, "{isa}, {batch}");
            }
            assert!(by(isa, "f16", model, &["-b", "7", "--tiers", "0:1:2"]) == whole, "{isa}, streamed");
        }
    }
    // Heads of 32, a block of the cache.
    let model = common::sized(3, 128, 96).write(d.path(), "wide.gguf");
    for isa in ["scalar", "avx2", "avx512", "amx"] {
        let whole = by(isa, "q8_0", &model, &[]);
        assert!(whole != by(isa, "f16", &model, &[]), "{isa}: the cache is of bytes");
        for batch in ["1", "7", "64"] {
            assert!(by(isa, "q8_0", &model, &["--batch", batch, "--tiers", "0:1:2"]) == whole, "{isa}, {batch}");
        }
    }
    // The text that follows is that of the whole prompt too.
    let text = |batch: &str| {
        let prompt = "The same text, whatever the passes that it was cut into.";
        let model = models[0].to_str().unwrap();
        let run = nt(&["-q", "run", model, "-p", prompt, "-n", "12", "--temp", "0", "--batch", batch]);
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        run.stdout
    };
    let whole = text("512");
    assert!(["1", "8", "20"].iter().all(|batch| text(batch) == whole));
    for wrong in ["0", "4097", "x"] {
        common::fails(&["run", models[0].to_str().unwrap(), "-p", "x", "--batch", wrong], 2, &["--batch"]);
    }
}

#[test]
fn dense() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(6).write(d.path(), "m.gguf");
    let resident = logits(&model, d.path(), &["--threads", "2"]);
    for p in placements() {
        assert!(logits(&model, d.path(), &p) == resident, "{p:?}");
    }
}

/// A cache of bytes, of heads of 32 elements.
#[test]
fn dense_with_a_cache_of_bytes() {
    let d = tempfile::tempdir().unwrap();
    let model = common::sized(6, 128, 96).write(d.path(), "m.gguf");
    let kv = ["--kv", "q8_0"];
    let resident = logits(&model, d.path(), &[&["--threads", "2"], &kv[..]].concat());
    assert!(resident != logits(&model, d.path(), &["--threads", "2"]));
    for p in placements() {
        // Its units are larger.
        let p: Vec<&str> = p.into_iter().map(|a| if a == "1400KiB" { "2400KiB" } else { a }).collect();
        assert!(logits(&model, d.path(), &[&p[..], &kv].concat()) == resident, "{p:?}");
    }
}

#[test]
fn experts() {
    let d = tempfile::tempdir().unwrap();
    let model = common::tiny_moe(6).write(d.path(), "moe.gguf");
    let resident = logits(&model, d.path(), &["--threads", "1"]);
    for p in placements() {
        assert!(logits(&model, d.path(), &p) == resident, "{p:?}");
    }
}

/// Guards against bits that depend on what a cache of experts holds: cold, warm, and behind prompts that pass by it.
#[test]
fn cached_experts() {
    use nt::backend::{BackendKind, Class};
    use nt::engine::{Opened, Options, Session};
    use nt::model::Outputs;
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&common::many_experts(6).write(d.path(), "m.gguf")).unwrap();
    let start = |ram: u64, caches: bool, threads: usize| {
        let options = Options {
            threads,
            ram: Some(ram << 10),
            caches,
            outputs: 8,
            max_batch: 16,
            ..Options::new(BackendKind::Cpu, 200)
        };
        Session::new(&opened, options, &mut |_, _| ()).unwrap()
    };
    let logits = |session: &mut Session| {
        session.truncate(0);
        let mut all = Vec::new();
        let mut eval = |tokens: &[u32], class: Class| {
            session.eval(tokens, class, Outputs::All, &|| false).unwrap();
            all.extend_from_slice(session.logits().unwrap());
        };
        let tokens: Vec<u32> = (0..200).map(|i| i * 37 % 258).collect();
        eval(&tokens[..8], Class::Bulk);
        (8..40).for_each(|i| eval(&tokens[i..=i], Class::Exact));
        eval(&tokens[40..48], Class::Bulk);
        eval(&tokens[48..56], Class::Exact);
        all
    };
    let want = logits(&mut start(64 << 10, true, 2));
    for (ram, caches, threads) in [(5200, true, 1), (6500, true, 2), (8000, true, 2), (6500, false, 2)] {
        let mut session = start(ram, caches, threads);
        assert_eq!(session.caches().is_empty(), !caches, "{ram} KiB");
        for round in 0..3 {
            assert!(logits(&mut session) == want, "{ram} KiB, caches {caches}, round {round}");
        }
        let c = session.links().experts.caches.counts;
        assert_eq!((caches, caches), (c.hits > 0, c.misses > 0), "{c:?}");
        // One token, again, and from empty caches, which have nothing of it.
        let used = |session: &mut Session| {
            let before = session.expert_uses();
            session.truncate(0);
            session.eval(&[7], Class::Exact, Outputs::Last, &|| false).unwrap();
            let used = session.expert_uses().since(&before);
            (used.homes[2], used.caches.counts.misses)
        };
        used(&mut session);
        assert_eq!(used(&mut session).1, 0);
        session.empty_caches().unwrap();
        let (of_storage, misses) = used(&mut session);
        assert!(of_storage > 0 && misses == if caches { of_storage } else { 0 }, "{of_storage} {misses}");
        session.empty_caches().unwrap();
        assert!(logits(&mut session) == want, "{ram} KiB, caches {caches}");
        assert!(session.links().experts.homes[2] > 0);
    }
}

/// A read of an expert that fails in the middle of a pass ends that pass with one error that names it; the next one, once the file
/// is whole again, has the bits that it would have had.
#[test]
fn a_failed_read_of_an_expert_ends_one_pass() {
    use nt::backend::{BackendKind, Class};
    use nt::engine::{Opened, Options, Session};
    use nt::model::Outputs;
    let d = tempfile::tempdir().unwrap();
    let path = common::many_experts(6).write(d.path(), "m.gguf");
    let whole = std::fs::read(&path).unwrap();
    let opened = Opened::open(&path).unwrap();
    let options = Options { threads: 2, ram: Some(5500 << 10), max_batch: 16, ..Options::new(BackendKind::Cpu, 200) };
    let mut session = Session::new(&opened, options, &mut |_, _| ()).unwrap();
    assert!(!session.caches().is_empty());
    let eval = |session: &mut Session, n: u32| {
        session.truncate(0);
        (0..n).try_for_each(|i| session.eval(&[i * 37 % 258], Class::Exact, Outputs::Last, &|| false))
    };
    eval(&mut session, 30).unwrap();
    let want = session.logits().unwrap().to_vec();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    for round in 0..3 {
        let written = file.metadata().unwrap().modified().unwrap();
        file.set_len(whole.len() as u64 / 3).unwrap();
        let e = eval(&mut session, 60).unwrap_err().to_string();
        assert!(e.contains(" expert ") && e.contains("m.gguf"), "{e}");
        std::os::unix::fs::FileExt::write_all_at(&file, &whole, 0).unwrap();
        file.set_modified(written).unwrap();
        eval(&mut session, 30).unwrap();
        assert!(session.logits().unwrap() == want, "round {round}");
    }
}

#[test]
fn striped_over_copies() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(20).write(d.path(), "m.gguf");
    let resident = logits(&model, d.path(), &["--threads", "2"]);
    let (a, b) = (d.path().join("a"), d.path().join("b"));
    for folder in [&a, &b] {
        std::fs::create_dir(folder).unwrap();
        std::fs::copy(&model, folder.join("m.gguf")).unwrap();
    }
    let both = format!("{},{}", a.display(), b.display());
    let three = format!("auto,{},{}", b.display(), a.join("m.gguf").display());
    for places in [&both, &three] {
        for reader in ["auto", "pread"] {
            let more = ["--tiers", "0:0:20", "--tier-c", places, "--reader", reader];
            assert!(logits(&model, d.path(), &more) == resident, "{more:?}");
        }
    }
    // Both copies are read: a byte that only the second holds is in the second stripe.
    let mut bytes = std::fs::read(&model).unwrap();
    assert!(bytes.len() > (1 << 20) + 8192, "the model has two stripes");
    bytes[(1 << 20) + 4096..][..4096].fill(0x3c);
    std::fs::write(b.join("m.gguf"), &bytes).unwrap();
    assert!(logits(&model, d.path(), &["--tiers", "0:0:20", "--tier-c", &both]) != resident);
    let other = format!("{},{}", b.display(), a.display());
    assert!(logits(&model, d.path(), &["--tiers", "0:0:20", "--tier-c", &other]) == resident);

    let run = nt(&["run", model.to_str().unwrap(), "-p", "x", "-n", "2", "--tier-c", &both, "--tiers", "0:0:20"]);
    let text = String::from_utf8_lossy(&run.stderr).into_owned();
    let named = |folder: &Path| text.contains(&format!("{}/m.gguf", folder.display()));
    assert!(text.contains("striped over") && named(&a) && named(&b), "{text}");
}

#[test]
fn places_that_cannot_be_striped() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(1).write(d.path(), "m.gguf");
    let (m, short, other) = (model.display().to_string(), d.path().join("short"), d.path().join("other"));
    let mut bytes = std::fs::read(&model).unwrap();
    std::fs::write(&short, &bytes[..bytes.len() - 64]).unwrap();
    let copy = d.path().join("copy");
    std::fs::write(&copy, &bytes).unwrap();
    bytes[30] ^= 1;
    std::fs::write(&other, &bytes).unwrap();
    for (places, more, words) in [
        (format!("{m},{}", short.display()), "auto", vec!["short", "no copy", "bytes"]),
        (format!("{m},{}", other.display()), "auto", vec!["other", "header", "no copy"]),
        (format!("{m},{m}"), "auto", vec!["same file"]),
        (format!("auto,{m}"), "auto", vec!["same file"]),
        (format!("{m},{}/absent", d.path().display()), "auto", vec!["absent", "no such"]),
        (format!("{m},"), "auto", vec!["commas"]),
        (format!("none,{m}"), "auto", vec!["commas"]),
        (format!("{m},{}", copy.display()), "vfio", vec!["striped", "copy"]),
    ] {
        let args = ["run", &m, "-p", "x", "-n", "1", "--tier-c", &places, "--reader", more];
        common::fails(&args, 2, &words);
    }
}

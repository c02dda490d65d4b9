//! The same logits, to the bit, wherever units live and however they are read.

mod common;

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
        vec!["--ram", "900KiB", "--n-buffers", "2"],
        vec!["--ram", "900KiB", "--n-buffers", "2", "--threads", "2", "--reader", "pread"],
        vec!["--tiers", "0:0:6", "--n-buffers", "3", "--reader", "pread"],
        vec!["--tiers", "0:2:4", "--n-buffers", "4", "--threads", "2"],
        vec!["--tiers", "0:0:6", "--n-buffers", "5"],
        vec!["--tiers", "0:0:6", "--n-buffers", "6", "--threads", "3"],
    ]
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

#[test]
fn experts() {
    let d = tempfile::tempdir().unwrap();
    let model = common::tiny_moe(6).write(d.path(), "moe.gguf");
    let resident = logits(&model, d.path(), &["--threads", "1"]);
    for p in placements() {
        assert!(logits(&model, d.path(), &p) == resident, "{p:?}");
    }
}

//! The same logits, to the bit, wherever units live and however they are read.

mod common;

use common::{V, nt, tiny};
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

/// The tiny model with four experts a block, two used.
#[test]
fn experts() {
    let d = tempfile::tempdir().unwrap();
    let mut f = tiny(6);
    f.set("llama.expert_count", V::U32(4));
    f.set("llama.expert_used_count", V::U32(2));
    for i in 0..6 {
        for what in ["gate", "up", "down"] {
            let t = f.tensor(&format!("blk.{i}.ffn_{what}.weight"));
            t.name = format!("blk.{i}.ffn_{what}_exps.weight");
            t.shape.push(4);
            let one = t.data.clone();
            for e in 1..4u8 {
                // Other experts are the first with other signs here and there.
                t.data.extend(one.chunks(4).enumerate().flat_map(|(j, v)| {
                    let flip = if j % (2 + e as usize) == 0 { 0x80 } else { 0 };
                    [v[0], v[1], v[2], v[3] ^ flip]
                }));
            }
        }
        let norm = f.tensor(&format!("blk.{i}.attn_q.weight")).clone();
        let data = norm.data[..64 * 4 * 4].to_vec();
        f.tensors.push(common::T { name: format!("blk.{i}.ffn_gate_inp.weight"), shape: vec![64, 4], ty: 0, data });
    }
    let model = f.write(d.path(), "moe.gguf");
    let resident = logits(&model, d.path(), &["--threads", "1"]);
    for p in placements() {
        assert!(logits(&model, d.path(), &p) == resident, "{p:?}");
    }
}

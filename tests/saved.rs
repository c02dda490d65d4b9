//! Conversations in files: whatever became of a file, it is refused, or what it gives is what was saved.

mod common;

use std::path::Path;

use nt::backend::{BackendKind, Class};
use nt::engine::{Opened, Options, Saved, Session, Starting};
use nt::gguf::TensorType;
use nt::model::Outputs;
use nt::storage::checksum::crc32c;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value as Json, json};

fn session(opened: &Opened, kv_type: TensorType) -> Session {
    let options =
        Options { threads: 1, ram: Some(1 << 30), max_batch: 64, kv_type, ..Options::new(BackendKind::Cpu, 256) };
    let starting = &mut Starting { progress: &mut |_, _| (), stop: &|| false };
    Session::start(opened, options, starting).unwrap()
}

fn next(s: &mut Session) -> Vec<u32> {
    s.eval(&[42], Class::Exact, Outputs::Last, &|| false).unwrap();
    s.logits().unwrap().iter().map(|l| l.to_bits()).collect()
}

fn tokens() -> Vec<u32> {
    (0..150).map(|i| i * 37 % 258).collect()
}

fn messages() -> Vec<Json> {
    vec![json!({"role": "user", "content": "a question"}), json!({"role": "assistant", "content": "an answer"})]
}

/// A model, the file of a conversation, and the logits behind it.
fn saved(dir: &Path, kv_type: TensorType) -> (Opened, Vec<u8>, Vec<u32>) {
    let opened = Opened::open(&common::sized(2, 128, 96).write(dir, "m.gguf")).unwrap();
    let mut s = session(&opened, kv_type);
    s.eval(&tokens()[..140], Class::Bulk, Outputs::Last, &|| false).unwrap();
    for t in &tokens()[140..] {
        s.eval(&[*t], Class::Exact, Outputs::Last, &|| false).unwrap();
    }
    let path = dir.join("conversation");
    s.save(&path, &messages(), &tokens(), 140).unwrap();
    let want = next(&mut s);
    (opened, std::fs::read(path).unwrap(), want)
}

fn described(file: &[u8]) -> usize {
    u64::from_le_bytes(file[16..24].try_into().unwrap()) as usize
}

fn bent(file: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut out = file.to_vec();
    // Half of the changes hit the description and what is before it.
    let head = 24 + described(file);
    for _ in 0..rng.random_range(1..4) {
        let most = if rng.random() { head.min(out.len()) } else { out.len() };
        let at = rng.random_range(0..most.max(1));
        match rng.random_range(0..6) {
            0 => out.truncate(at),
            1 => out[at..].rotate_left(1.min(file.len() - at)),
            2 => {
                let other = rng.random_range(0..file.len());
                let n = rng.random_range(1..200).min(file.len() - other).min(out.len() - at);
                out[at..at + n].copy_from_slice(&file[other..other + n]);
            }
            3 => out.extend_from_slice(&file[..rng.random_range(1..100)]),
            4 => out[at] = b"0123456789[]{},:\"\xff"[rng.random_range(0..18)],
            _ => out[at] ^= 1 << rng.random_range(0..8),
        }
        if out.is_empty() {
            break;
        }
    }
    out
}

/// What was asked of a session that loaded this, if it took the pages over.
fn loaded(s: &mut Session, file: &Path) -> Option<Vec<u32>> {
    let saved = Saved::open(file).ok()?;
    assert_eq!(saved.messages(), messages());
    assert_eq!(saved.tokens(), (&tokens()[..], 140));
    let taken = s.load(saved, &|| false).unwrap();
    assert!(taken || s.position() == 0);
    taken.then(|| next(s))
}

/// Guards against a changed letter, token or page that is taken for what was saved.
#[test]
fn a_bent_file_is_refused_or_gives_what_was_saved() {
    let rounds = std::env::var("NT_MUTATIONS").map_or(600, |n| n.parse().unwrap());
    for (seed, kv_type) in [(1, TensorType::F16), (2, TensorType::Q8_0)] {
        let d = tempfile::tempdir().unwrap();
        let (opened, file, want) = saved(d.path(), kv_type);
        let (mut rng, mut s) = (ChaCha8Rng::seed_from_u64(seed), session(&opened, kv_type));
        let path = d.path().join("bent");
        std::fs::write(&path, &file).unwrap();
        assert_eq!(loaded(&mut s, &path).as_ref(), Some(&want));
        let mut refused = 0;
        for round in 0..rounds {
            let bytes = bent(&file, &mut rng);
            std::fs::write(&path, &bytes).unwrap();
            match loaded(&mut s, &path) {
                None => refused += 1,
                Some(got) => assert!(bytes == file && got == want, "{kv_type}, round {round}"),
            }
        }
        assert!(refused > rounds * 9 / 10, "{refused} of {rounds}");
    }
}

/// Guards against a file that was made by hand, with its sums: each number and each list in its description is another one.
#[test]
fn a_forged_description_is_no_panic() {
    let d = tempfile::tempdir().unwrap();
    let (opened, file, _) = saved(d.path(), TensorType::F16);
    let mut s = session(&opened, TensorType::F16);
    let path = d.path().join("forged");
    let head = 24 + described(&file);
    let own: Json = serde_json::from_slice(&file[24..head]).unwrap();
    let recent = |window: u64, pages: u64, bytes: u64, written: u64| json!({"window": window, "pages": pages, "page_bytes": bytes, "written": written});
    let big = u64::MAX;
    let values = [
        json!(0),
        json!(1),
        json!(63),
        json!(64),
        json!(65),
        json!(1u64 << 32),
        json!(big),
        json!(-1),
        json!(1e300),
        json!(null),
        json!("q8_0"),
        json!([]),
        json!([1, null, {"role": 5}]),
        json!([4_000_000_000u32]),
        json!([{"role": "user"}]),
        json!(vec![7; 257]),
        recent(0, 0, 0, 0),
        recent(big, big, big, big),
        recent(64, 1, 0, big),
    ];
    let keys = ["version", "messages", "tokens", "prompt", "page", "page_bytes", "kv", "recent"];
    let (mut opens, mut taken) = (0, 0);
    for (key, value) in keys.iter().flat_map(|k| values.iter().map(move |v| (k, v))) {
        let mut description = own.clone();
        description[*key] = value.clone();
        let text = serde_json::to_vec(&description).unwrap();
        // With the pages as they are, with none, and with as many zeros as there could be.
        for pages in [&file[head..file.len() - 4], &[], &[0; 8 * 1028][..]] {
            let mut forged = file[..16].to_vec();
            forged.extend((text.len() as u64).to_le_bytes());
            forged.extend(&text);
            forged.extend(pages);
            forged.extend(crc32c(&text).to_le_bytes());
            std::fs::write(&path, &forged).unwrap();
            let Ok(saved) = Saved::open(&path) else { continue };
            opens += 1;
            taken += usize::from(s.load(saved, &|| false).unwrap());
        }
    }
    assert!(opens > 5 && taken > 0, "{opens}, {taken}");
}

/// Guards against a wait for whoever writes to a pipe.
#[test]
fn pipes_and_folders_are_refused_at_once() {
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&common::tiny(2).write(d.path(), "m.gguf")).unwrap();
    let pipe = d.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for path in [&pipe, d.path()] {
        let e = Saved::open(path).unwrap_err().to_string();
        assert!(e.contains("not a regular file"), "{e}");
        let e = session(&opened, TensorType::F16).save(path, &[], &[], 0).unwrap_err().to_string();
        assert!(e.contains("it is not replaced"), "{e}");
    }
}

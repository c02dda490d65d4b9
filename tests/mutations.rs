//! Bent inputs, from a seed: headers, texts and templates are refused or used, never a panic.
//!
//! The checks and the inputs are those of the fuzz targets (`fuzz/`); this runs a few seconds of it. `NT_MUTATIONS` sets
//! another number of inputs and takes the time that it takes.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::{File, V};
use nt::model::Model;
use nt::{gguf, tokenizer};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[path = "common/checks.rs"]
mod checks;
mod common;
#[path = "common/vocab.rs"]
mod vocab;

/// Each test stops here on a slow machine; elsewhere it is done before.
const TIME_MAX: Duration = Duration::from_secs(15);

/// The numbers of `rounds` rounds, or of as many as are asked for; the former end early where time is up.
fn numbered(rounds: usize) -> impl Iterator<Item = usize> {
    let given = std::env::var("NT_MUTATIONS").ok().map(|n| n.parse().expect("a number"));
    let start = Instant::now();
    (0..given.unwrap_or(rounds)).take_while(move |_| given.is_some() || start.elapsed() < TIME_MAX)
}

/// What stands in headers, texts and templates where something goes wrong.
const PARTS: &[&[u8]] = &[
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x00\x00\x00\x00\x00\x00\x00\x80",
    b"\x00\x00\x00\x40\x00\x00\x00\x00",
    b"\x09\x00\x00\x00",
    b"\x08\x00\x00\x00",
    "\u{a0}\u{3000}".as_bytes(),
    "e\u{301}🦀👩\u{200d}👩".as_bytes(),
    "▁<0x41></s>".as_bytes(),
    b"<|im_end|><x>",
    b"\0\r\n\t\x0b\x7f",
    b"{% for x in messages %}",
    b"{% endfor %}",
    b"{{ ",
    b" }}",
    b"{%- if ",
    b" | tojson(indent=99999999)",
    b"[messages] * 9999999",
    b".split('",
    b"(((((((([[[[[[[[",
];

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus")).join(target);
    let mut paths: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    // The seed gives the same inputs only in the same order.
    paths.sort();
    assert!(paths.len() >= 5, "{}", folder.display());
    paths.iter().map(|p| std::fs::read(p).unwrap()).collect()
}

/// Bends an input in one place: bytes flipped, put in, taken out, repeated, cut off.
fn bend(rng: &mut ChaCha8Rng, data: &mut Vec<u8>) {
    let at = rng.random_range(0..=data.len());
    let end = rng.random_range(at..=data.len().min(at + 32));
    match rng.random_range(0..7) {
        0 => data.truncate(at),
        1 => drop(data.drain(at..end)),
        2 => {
            let again = data[at..end].to_vec();
            data.splice(at..at, again);
        }
        3 => {
            let part = PARTS[rng.random_range(0..PARTS.len())];
            data.splice(at..at, part.iter().copied());
        }
        4 => {
            // Over what is there, as a length that changes.
            let part = PARTS[rng.random_range(0..PARTS.len())];
            let end = data.len().min(at + part.len());
            data.splice(at..end, part.iter().copied());
        }
        5 => data[at..end].iter_mut().for_each(|b| *b = rng.next_u32() as u8),
        _ => data[at..end].iter_mut().take(1).for_each(|b| *b ^= 1 << rng.random_range(0..8)),
    }
}

/// Checks the corpus, then `rounds` bent inputs.
fn run(target: &str, seed: u64, rounds: usize, check: fn(&[u8])) {
    let inputs = corpus(target);
    inputs.iter().for_each(|data| check(data));
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for round in numbered(rounds) {
        let mut data = inputs[rng.random_range(0..inputs.len())].clone();
        for _ in 0..rng.random_range(1..=4) {
            bend(&mut rng, &mut data);
        }
        if let Err(panic) = std::panic::catch_unwind(|| check(&data)) {
            eprintln!("round {round} of {target}: {:?}", data.escape_ascii().to_string());
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn headers() {
    run("gguf", 1, 10_000, checks::gguf);
}

#[test]
fn texts() {
    run("tokenizer", 2, 20_000, checks::tokenizer);
}

#[test]
fn templates() {
    run("template", 3, 10_000, checks::template);
}

/// Text and control characters of every plane, over every vocabulary.
#[test]
fn any_characters() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for which in 0..13u8 {
        for _ in 0..200 {
            let n = rng.random_range(0..40);
            let text: String = (0..n)
                .filter_map(|_| {
                    let bits = rng.random_range(5..=21);
                    char::from_u32(rng.next_u32() >> (32 - bits))
                })
                .collect();
            checks::tokenizer(&[&[0, which], text.as_bytes()].concat());
        }
    }
}

/// Texts that stand in keys, names and vocabularies where something goes wrong.
const TEXTS: &[&str] = &[
    "",
    " ",
    "a",
    "Ġ",
    "▁",
    "<0x41>",
    "<|im_end|>",
    "</s>",
    "\u{1b}[31m",
    "blk.9999999999999999999.attn_q.weight",
    "é\0",
];

/// Numbers at the edges.
const EDGES: &[u64] = &[0, 1, 2, 3, 255, 256, 257, 65_535, 1 << 31, (1 << 32) - 1, 1 << 62, u64::MAX - 7, u64::MAX];

fn edge(rng: &mut ChaCha8Rng) -> u64 {
    EDGES[rng.random_range(0..EDGES.len())]
}

fn odd_text(rng: &mut ChaCha8Rng) -> String {
    TEXTS[rng.random_range(0..TEXTS.len())].to_owned()
}

fn odd_value(rng: &mut ChaCha8Rng) -> V {
    match rng.random_range(0..7) {
        0 => V::U32(edge(rng) as u32),
        1 => V::U64(edge(rng)),
        2 => V::F32(f32::from_bits(rng.next_u32())),
        3 => V::Bool(rng.random()),
        4 => V::Str(odd_text(rng)),
        5 => V::Strs((0..rng.random_range(0..4)).map(|_| odd_text(rng)).collect()),
        _ => V::I32s((0..rng.random_range(0..4)).map(|_| edge(rng) as i32).collect()),
    }
}

/// Bends one entry of a list: taken out, doubled, changed, or all from there on gone.
fn bend_list<T: Clone>(rng: &mut ChaCha8Rng, list: &mut Vec<T>, other: impl FnOnce(&mut ChaCha8Rng) -> T) {
    if list.is_empty() {
        return list.push(other(rng));
    }
    let at = rng.random_range(0..list.len());
    match rng.random_range(0..4) {
        0 => drop(list.remove(at)),
        1 => list.insert(at, list[at].clone()),
        2 => list[at] = other(rng),
        _ => list.truncate(at),
    }
}

fn bend_metadata(rng: &mut ChaCha8Rng, f: &mut File, prefix: &str) {
    let own: Vec<usize> = (0..f.meta.len()).filter(|&i| f.meta[i].0.starts_with(prefix)).collect();
    let Some(&at) = own.get(rng.random_range(0..own.len().max(1))) else { return };
    match (&mut f.meta[at].1, rng.random_range(0..4)) {
        (V::Strs(list), 0..=2) => bend_list(rng, list, odd_text),
        (V::I32s(list), 0..=2) => bend_list(rng, list, |rng| rng.random_range(-1..9)),
        (value, 0..=2) => *value = odd_value(rng),
        _ => drop(f.meta.remove(at)),
    }
}

fn bend_tensors(rng: &mut ChaCha8Rng, f: &mut File) {
    if f.tensors.is_empty() {
        return;
    }
    let (at, other) = (rng.random_range(0..f.tensors.len()), rng.random_range(0..f.tensors.len()));
    let name = f.tensors[other].name.replace("attn_q", "attn_qkv").replace("_exps", "").replace("gate", "gate_up");
    match rng.random_range(0..6) {
        0 => drop(f.tensors.remove(at)),
        1 => f.tensors[at].ty = rng.random_range(0..41),
        2 => f.tensors[at].name = if rng.random() { name } else { odd_text(rng) },
        3 => bend_list(rng, &mut f.tensors[at].shape, edge),
        4 => f.offsets.push((at, edge(rng))),
        _ => f.tensors.swap(at, other),
    }
}

/// Bends a model's header 10,000 times and shows the bytes to `check`.
fn bend_models(seed: u64, bases: &[File], bend: fn(&mut ChaCha8Rng, &mut File), check: fn(&[u8])) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for round in numbered(10_000) {
        let mut f = bases[round % bases.len()].clone();
        for _ in 0..rng.random_range(1..=3) {
            bend(&mut rng, &mut f);
        }
        let bytes = f.bytes();
        if let Err(panic) = std::panic::catch_unwind(|| check(&bytes)) {
            let names: Vec<_> = f.tensors.iter().map(|t| (&t.name, &t.shape, t.ty)).collect();
            eprintln!("round {round}: {names:?}");
            std::panic::resume_unwind(panic);
        }
    }
}

/// A structure is refused, or every byte that it names lies in the file.
fn structure(data: &[u8]) {
    let Ok(gguf) = gguf::Gguf::parse(std::path::Path::new("x.gguf"), data, data.len() as u64) else { return };
    let Ok(model) = Model::read(&gguf) else { return };
    for u in &model.units {
        assert!(u.spans.iter().all(|s| s.offset + s.bytes <= data.len() as u64), "{}", u.name);
    }
    for h in &model.held {
        assert!((h.first as u64) < model.widened[h.tensor].shape[0]);
    }
    assert_eq!(Model::new(&gguf).is_ok(), model.unused.iter().all(|(_, harmless)| harmless.is_some()));
}

#[test]
fn structures() {
    let bend = |rng: &mut ChaCha8Rng, f: &mut File| match rng.random_range(0..3) {
        0 => bend_metadata(rng, f, "llama."),
        _ => bend_tensors(rng, f),
    };
    bend_models(5, &[common::tiny(1), common::tiny_moe(1)], bend, structure);
}

#[test]
fn vocabularies() {
    let mut byte_level = common::tiny(1);
    byte_level.tensors.clear();
    byte_level.set("tokenizer.ggml.merges", V::Strs(["h e", "l l", "he ll", "Ġ a"].map(String::from).to_vec()));
    let mut spm = byte_level.clone();
    spm.set("tokenizer.ggml.model", V::Str("llama".into()));
    spm.set("tokenizer.ggml.scores", V::I32s((0..258).map(|i| -i).collect()));
    for (key, id) in [("eot", 3), ("fim_pre", 4), ("eom", 5)] {
        byte_level.set(&format!("tokenizer.ggml.{key}_token_id"), V::U32(id));
    }
    let bend = |rng: &mut ChaCha8Rng, f: &mut File| bend_metadata(rng, f, "tokenizer.");
    bend_models(6, &[byte_level, spm], bend, checks::gguf);
}

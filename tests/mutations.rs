//! Bent inputs, from a seed: headers, texts and templates are refused or used, never a panic.
//!
//! The checks and the inputs are those of the fuzz targets (`fuzz/`); this runs a few seconds of it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nt::{gguf, tokenizer};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[path = "common/checks.rs"]
mod checks;
#[path = "common/vocab.rs"]
mod vocab;

/// Each test stops here on a slow machine; elsewhere it is done before.
const TIME_MAX: Duration = Duration::from_secs(5);

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
    let start = Instant::now();
    for round in 0..rounds {
        let mut data = inputs[rng.random_range(0..inputs.len())].clone();
        for _ in 0..rng.random_range(1..=4) {
            bend(&mut rng, &mut data);
        }
        if let Err(panic) = std::panic::catch_unwind(|| check(&data)) {
            eprintln!("round {round} of {target}: {:?}", data.escape_ascii().to_string());
            std::panic::resume_unwind(panic);
        }
        if start.elapsed() > TIME_MAX {
            break;
        }
    }
}

#[test]
fn headers() {
    run("gguf", 1, 4000, checks::gguf);
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

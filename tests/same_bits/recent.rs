//! Layers with windows that keep the last positions of each sequence alone give the bits of a cache that keeps all:
//! however a prompt is cut, behind passes that were given up, going back, forked, and from a file.

use nt::backend::Class;
use nt::engine::{Opened, Options, Saved, Session, Starting};
use nt::gguf::TensorType;
use nt::model::Outputs;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::common::{File, families};
use super::rows::bits;

/// Positions of a context, far more than windows and passes need.
const CTX: usize = 1024;

fn session(opened: &Opened, recent: bool, max_batch: usize) -> Session {
    let options = Options {
        threads: 2,
        ram: Some(1 << 30),
        max_batch,
        outputs: 8,
        recent,
        sequences: 3,
        ..Options::new(nt::backend::BackendKind::Cpu, CTX)
    };
    let starting = &mut Starting { progress: &mut |_, _| (), stop: &|| false };
    Session::start(opened, options, starting).unwrap()
}

/// Windows of `window` positions, of a model that was trained on as many as the context has.
fn opened(dir: &tempfile::TempDir, mut file: File, arch: &str, window: u32) -> Opened {
    file.set(&format!("{arch}.attention.sliding_window"), super::common::V::U32(window));
    file.set(&format!("{arch}.context_length"), super::common::V::U32(CTX as u32));
    Opened::open(&file.write(dir.path(), &format!("{arch}.gguf"))).unwrap()
}

fn models(dir: &tempfile::TempDir) -> [(&'static str, Opened); 2] {
    [
        ("gemma3", opened(dir, families::gemma3(6), "gemma3", 70)),
        ("gpt-oss", opened(dir, families::gpt_oss(4), "gpt-oss", 33)),
    ]
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| i * 37 % 258).collect()
}

fn eval(s: &mut Session, tokens: &[u32], class: Class) -> Vec<u32> {
    s.eval(tokens, class, Outputs::Last, &|| false).unwrap();
    bits(s)
}

/// Logits of a prompt's last token, and of tokens that are generated behind it.
fn followed(s: &mut Session, prompt: &[u32]) -> Vec<u32> {
    let mut all = eval(s, prompt, Class::Bulk);
    for t in [3, 99, 200, 17] {
        all.extend(eval(s, &[t], Class::Exact));
    }
    all
}

/// Guards against a cache of recent positions that is too short for a pass, and against tables of the wrong layers.
#[test]
fn the_same_bits_with_fewer_pages() {
    let dir = tempfile::tempdir().unwrap();
    for (name, opened) in models(&dir) {
        for n in [1, 60, 130, 700] {
            let whole = followed(&mut session(&opened, false, 64), &tokens(n));
            for batch in [1, 7, 64, 150] {
                let mut s = session(&opened, true, batch);
                assert!(followed(&mut s, &tokens(n)) == whole, "{name}, {n} tokens in passes of {batch}");
                assert!(s.keeps_recent(), "{name}, passes of {batch}");
            }
        }
    }
}

/// A conversation that goes on, back, and to its beginning, with passes that are given up, by seed: what it says is what
/// one that starts anew with its tokens says.
#[test]
fn going_back_and_passes_that_were_given_up() {
    let dir = tempfile::tempdir().unwrap();
    for (name, opened) in models(&dir) {
        let (mut s, mut anew) = (session(&opened, true, 48), session(&opened, false, 64));
        for seed in 0..12 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut text: Vec<u32> = Vec::new();
            s.truncate(0);
            let mut far = 0;
            for _ in 0..12 {
                match rng.random_range(0..6) {
                    0 if !text.is_empty() => {
                        let n = text.len() - rng.random_range(0..text.len().min(160));
                        let kept = s.truncate(n);
                        assert!(kept == n || kept == 0, "{name}: {kept} of {n}");
                        far += usize::from(kept == 0 && n > 0);
                        text.truncate(kept);
                    }
                    1 => {
                        let more: Vec<u32> = (0..rng.random_range(1..90)).map(|_| rng.random_range(0..258)).collect();
                        let (asked, after) = (std::cell::Cell::new(0), rng.random_range(1..30));
                        let stop = || {
                            asked.set(asked.get() + 1);
                            asked.get() > after
                        };
                        if s.eval(&more, Class::Bulk, Outputs::None, &stop).is_ok() {
                            text.extend(more);
                        } else {
                            // Whole passes of it are kept.
                            let done = s.position() - text.len();
                            text.extend(&more[..done]);
                        }
                    }
                    _ => {
                        let n =
                            if rng.random_range(0..3) == 0 { rng.random_range(1..200) } else { rng.random_range(1..8) };
                        let n = n.min(CTX - 8 - text.len());
                        let more: Vec<u32> = (0..n).map(|_| rng.random_range(0..258)).collect();
                        s.eval(&more, Class::Bulk, Outputs::None, &|| false).unwrap();
                        text.extend(more);
                    }
                }
            }
            assert!(seed > 8 || far < 12);
            let got = eval(&mut s, &[5], Class::Exact);
            anew.truncate(0);
            if !text.is_empty() {
                anew.eval(&text, Class::Bulk, Outputs::None, &|| false).unwrap();
            }
            assert!(got == eval(&mut anew, &[5], Class::Exact), "{name}, seed {seed}, {} tokens", text.len());
        }
    }
}

/// Guards against forks that share pages of recent positions, and against more sequences than there are such pages of.
#[test]
fn forks_have_recent_positions_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    for (name, opened) in models(&dir) {
        let all = tokens(500);
        let mut s = session(&opened, true, 64);
        s.eval(&all[..300], Class::Bulk, Outputs::None, &|| false).unwrap();
        let (one, two) = (s.sequence(), s.fork_at(300).unwrap());
        assert!(s.fork_at(20).is_err(), "{name}: those are gone");
        let first = followed(&mut s, &all[300..420]);
        s.switch(two).unwrap();
        let second = followed(&mut s, &all[380..500]);
        s.switch(one).unwrap();
        let third = eval(&mut s, &[1], Class::Exact);
        let mut whole = session(&opened, false, 64);
        assert!(followed(&mut whole, &all[..420]) == first, "{name}");
        assert!(eval(&mut whole, &[1], Class::Exact) == third, "{name}");
        whole.truncate(0);
        assert!(followed(&mut whole, &[&all[..300], &all[380..500]].concat()) == second, "{name}");
        let three = s.fork_at(s.position()).unwrap();
        let e = s.fork_at(s.position()).unwrap_err().to_string();
        assert!(e.contains("3 sequences"), "{e}");
        s.close(three).unwrap();
    }
}

/// Guards against a conversation from a file that lacks what windows show, or believes to have more.
#[test]
fn a_conversation_is_saved_with_its_recent_positions() {
    let dir = tempfile::tempdir().unwrap();
    for (name, opened) in models(&dir) {
        let (prompt, path) = (tokens(333), dir.path().join("conversation"));
        let mut s = session(&opened, true, 64);
        followed(&mut s, &prompt);
        let all: Vec<u32> = prompt.iter().copied().chain([3, 99, 200, 17]).collect();
        s.save(&path, &[], &all, prompt.len()).unwrap();
        let want = eval(&mut s, &[42], Class::Exact);
        let mut other = session(&opened, true, 64);
        assert!(other.load(Saved::open(&path).unwrap(), &|| false).unwrap(), "{name}");
        assert!(eval(&mut other, &[42], Class::Exact) == want, "{name}");
        assert_eq!(other.truncate(20), 0, "{name}: those are gone");
        // Pages for other passes, and a cache that keeps all, are not these.
        for mut other in [session(&opened, true, 200), session(&opened, false, 64)] {
            assert!(!other.load(Saved::open(&path).unwrap(), &|| false).unwrap(), "{name}");
            assert_eq!(other.position(), 0);
        }
        let mut bent = std::fs::read(&path).unwrap();
        let at = bent.len() - 400;
        bent[at] ^= 1;
        std::fs::write(&path, bent).unwrap();
        assert!(!session(&opened, true, 64).load(Saved::open(&path).unwrap(), &|| false).unwrap(), "{name}: damaged");
    }
}

/// Guards against windows of models without a layer that keeps all, and against types of the cache.
#[test]
fn every_type_of_cache_and_no_layer_that_keeps_all() {
    let dir = tempfile::tempdir().unwrap();
    let file = families::gemma3(4);
    let opened_ = opened(&dir, file, "gemma3", 40);
    for kv_type in [TensorType::F32, TensorType::F16] {
        let with = |recent| {
            let options = Options {
                threads: 1,
                ram: Some(1 << 30),
                max_batch: 32,
                kv_type,
                recent,
                ..Options::new(nt::backend::BackendKind::Cpu, CTX)
            };
            let starting = &mut Starting { progress: &mut |_, _| (), stop: &|| false };
            followed(&mut Session::start(&opened_, options, starting).unwrap(), &tokens(400))
        };
        assert!(with(true) == with(false), "{kv_type}");
    }
    let mut all = families::gemma3(4);
    all.set("gemma3.attention.sliding_window_pattern", super::common::V::U32(1));
    if let Ok(opened) = Opened::open(&all.write(dir.path(), "all.gguf")) {
        let s = session(&opened, true, 32);
        assert_eq!(
            s.keeps_recent(),
            opened.model.windows().contains(&None) && opened.model.windows().iter().any(Option::is_some)
        );
    }
}

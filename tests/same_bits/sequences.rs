//! A row's result depends on no other sequence of its pass: sequences that are evaluated together, prompts beside
//! generated tokens, in passes cut by a seed, have the bits of each alone.

use nt::backend::Class;
use nt::engine::{Opened, Options, Part, Session, Starting};
use nt::gguf::TensorType;
use nt::model::Outputs;
use nt::plan::Tiers;
use nt::state::SeqId;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::rows::{bits, model};

const N_VOCAB: u64 = 258;
const MAX_BATCH: usize = 48;

/// A prompt, what is generated behind it, and the logits of its last token and of each generated one.
struct Text {
    prompt: Vec<u32>,
    generated: Vec<u32>,
    want: Vec<Vec<u32>>,
    seq: Option<SeqId>,
    done: usize,
    got: Vec<Vec<u32>>,
}

fn session(opened: &Opened, kv_type: TensorType, tiers: Tiers) -> Session {
    let options = Options {
        threads: 2,
        ram: Some(1 << 30),
        max_batch: MAX_BATCH,
        outputs: MAX_BATCH,
        tiers: Some(tiers),
        kv_type,
        ..Options::new(nt::backend::BackendKind::Cpu, 1024)
    };
    let starting = &mut Starting { progress: &mut |_, _| (), stop: &|| false };
    Session::start(opened, options, starting).unwrap()
}

fn alone(opened: &Opened, kv: TensorType, text: &mut Text) {
    let mut s = session(opened, kv, Tiers { a: 0, b: 3, c: 0 });
    s.eval(&text.prompt, Class::Bulk, Outputs::Last, &|| false).unwrap();
    text.want.push(bits(&mut s));
    for t in &text.generated {
        s.eval(&[*t], Class::Exact, Outputs::Last, &|| false).unwrap();
        text.want.push(bits(&mut s));
    }
}

/// One pass with tokens of some of the texts.
fn pass(s: &mut Session, texts: &mut [Text], rng: &mut ChaCha8Rng) {
    let (mut parts, mut room, mut exact) = (Vec::new(), MAX_BATCH, 8);
    for class in [Class::Exact, Class::Bulk] {
        for (i, text) in texts.iter().enumerate() {
            let prompt = text.prompt.len();
            let (of, left, most) = match class {
                Class::Exact if text.done >= prompt => {
                    (&text.generated[text.done - prompt..], text.generated.len() + prompt - text.done, exact)
                }
                Class::Bulk if text.done < prompt => (&text.prompt[text.done..], prompt - text.done, 40),
                _ => continue,
            };
            let n = (1 + rng.random_range(0..most.max(1))).min(left).min(room).min(most);
            if n == 0 || rng.random_range(0..3) == 0 {
                continue;
            }
            room -= n;
            exact -= if class == Class::Exact { n } else { 0 };
            let outputs = match class {
                Class::Exact => Outputs::All,
                Class::Bulk if n == left => Outputs::Last,
                Class::Bulk => Outputs::None,
            };
            parts.push((i, Part { seq: text.seq.unwrap(), class, tokens: &of[..n], outputs }));
        }
    }
    if parts.is_empty() {
        return;
    }
    // A pass that is given up leaves every sequence as it was.
    let list: Vec<Part> = parts.iter().map(|p| p.1).collect();
    if rng.random_range(0..4) == 0 {
        let asked = std::cell::Cell::new(0);
        let stop = || asked.replace(asked.get() + 1) >= 1;
        assert!(s.eval_parts(&list, &stop).is_err());
    }
    s.eval_parts(&list, &|| false).unwrap();
    let evaluated: Vec<(usize, usize, Outputs)> = parts.iter().map(|(i, p)| (*i, p.tokens.len(), p.outputs)).collect();
    let wanted = |o: &(usize, usize, Outputs)| match o.2 {
        Outputs::None => 0,
        Outputs::Last => 1,
        Outputs::All => o.1,
    };
    let rows: usize = evaluated.iter().map(wanted).sum();
    let logits = if rows > 0 { bits(s) } else { Vec::new() };
    let mut logits = logits.chunks_exact(N_VOCAB as usize);
    for e in &evaluated {
        texts[e.0].done += e.1;
        texts[e.0].got.extend(logits.by_ref().take(wanted(e)).map(<[u32]>::to_vec));
    }
    assert!(logits.next().is_none(), "more logits than were asked for");
}

fn check(ty: TensorType, kv: TensorType, experts: bool, seed: u64) {
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&model(3, ty, experts).write(d.path(), "m.gguf")).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut texts: Vec<Text> = (0..5)
        .map(|_| {
            let mut some = |n: usize| (0..n).map(|_| rng.random_range(0..N_VOCAB as usize) as u32).collect::<Vec<_>>();
            let (prompt, generated) = (some(100), some(9));
            Text { prompt, generated, want: Vec::new(), seq: None, done: 0, got: Vec::new() }
        })
        .collect();
    for (i, text) in texts.iter_mut().enumerate() {
        text.prompt.truncate([1, 30, 64, 70, 100][i]);
    }
    // Two that share their beginning, in the middle of a page.
    let beginning = texts[3].prompt[..20].to_vec();
    texts[4].prompt[..20].copy_from_slice(&beginning);
    texts.iter_mut().for_each(|t| alone(&opened, kv, t));
    for tiers in [Tiers { a: 0, b: 3, c: 0 }, Tiers { a: 0, b: 1, c: 2 }] {
        let mut s = session(&opened, kv, tiers);
        s.eval(&beginning, Class::Bulk, Outputs::None, &|| false).unwrap();
        for (i, text) in texts.iter_mut().enumerate() {
            let begun = if i >= 3 { beginning.len() } else { 0 };
            (text.seq, text.done) = (Some(s.fork_at(begun).unwrap()), begun);
            text.got.clear();
        }
        while texts.iter().any(|t| t.done < t.prompt.len() + t.generated.len()) {
            pass(&mut s, &mut texts, &mut rng);
        }
        for (i, text) in texts.iter().enumerate() {
            assert!(text.got == text.want, "{ty}, cache {kv}, experts {experts}, {tiers:?}: text {i}");
            s.close(text.seq.unwrap()).unwrap();
        }
    }
}

/// Guards against sequences that read each other's pages, positions or logits.
#[test]
fn sequences_together_have_the_bits_of_each_alone() {
    for (i, ty) in [TensorType::Q4_K, TensorType::Q8_0, TensorType::F16].into_iter().enumerate() {
        check(ty, TensorType::F16, false, i as u64 + 1);
        check(ty, TensorType::F16, true, i as u64 + 11);
    }
    check(TensorType::Q4_K, TensorType::Q8_0, false, 21);
    check(TensorType::Q4_K, TensorType::Q8_0, true, 31);
}

/// What cannot be one pass is refused in a sentence, and nothing has changed.
#[test]
fn parts_that_are_no_pass() {
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&model(3, TensorType::Q8_0, false).write(d.path(), "m.gguf")).unwrap();
    let mut s = session(&opened, TensorType::F16, Tiers { a: 0, b: 3, c: 0 });
    let (a, b) = (s.sequence(), s.fork_at(0).unwrap());
    let part = |seq, class, tokens: &'static [u32]| Part { seq, class, tokens, outputs: Outputs::All };
    let (exact, bulk) = (Class::Exact, Class::Bulk);
    for (parts, words) in [
        (vec![], "each sequence is once in a pass"),
        (vec![part(a, exact, &[])], "each sequence is once in a pass"),
        (vec![part(a, exact, &[1]), part(a, bulk, &[1])], "each sequence is once in a pass"),
        (vec![part(a, bulk, &[1]), part(b, exact, &[1])], "each sequence is once in a pass"),
        (vec![part(a, exact, &[1, 2, 3, 4, 5]), part(b, exact, &[1, 2, 3, 4])], "carries 8"),
        (vec![part(a, bulk, &[1; 30]), part(b, bulk, &[1; 30])], "carries 48"),
        (vec![part(a, bulk, &[300])], "not in the vocabulary"),
    ] {
        let e = s.eval_parts(&parts, &|| false).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
        assert_eq!(s.position(), 0);
    }
    s.close(b).unwrap();
    let e = s.eval_parts(&[part(b, exact, &[1])], &|| false).unwrap_err().to_string();
    assert!(e.contains("has ended"), "{e}");
    s.eval_parts(&[part(a, exact, &[1])], &|| false).unwrap();
}

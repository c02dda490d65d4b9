//! Texts that are continued at once are those that each gives alone, whatever waits, ends or fails beside them.

mod common;

use nt::backend::BackendKind;
use nt::engine::{
    Ended, Generator, Grown, JobId, Opened, Options, Request, Sampler, SamplerParams, Session, StopReason, generate,
};
use std::collections::HashMap;

struct Asked {
    prompt: Vec<u32>,
    n: usize,
    stops: Vec<String>,
    params: SamplerParams,
}

impl Asked {
    fn request(&self, cached: usize) -> Request<'_> {
        Request { text: &self.prompt, cached, n: self.n, stops: &self.stops, special: false }
    }
}

fn session(opened: &Opened, n_ctx: usize, outputs: usize) -> Session {
    let options =
        Options { threads: 2, ram: Some(64 << 20), max_batch: 32, outputs, ..Options::new(BackendKind::Cpu, n_ctx) };
    Session::new(opened, options, &mut |_, _| ()).unwrap()
}

fn sampler(opened: &Opened, asked: &Asked) -> Sampler {
    Sampler::for_model(asked.params.clone(), opened.model.n_vocab, &opened.tokenizer)
}

fn asked(opened: &Opened, i: u64) -> Asked {
    let prompt = (0..1 + i * 13 % 70).map(|j| 3 + (i * 31 + j * 7) as u32 % 250).collect();
    let temp = if i.is_multiple_of(3) { 0.0 } else { 1.2 };
    let repeat_penalty = if i.is_multiple_of(4) { 1.3 } else { 1.0 };
    let params =
        SamplerParams { temp, seed: i, repeat_penalty, ignore_eos: i.is_multiple_of(2), ..SamplerParams::default() };
    let stop = String::from_utf8_lossy(opened.tokenizer.token_bytes(40 + i as u32)).into_owned();
    let stops = if i.is_multiple_of(5) && !stop.is_empty() { vec![stop] } else { Vec::new() };
    Asked { prompt, n: [0, 1, 17, 30][i as usize % 4], stops, params }
}

/// All at once: the pages of the cache hold a few of them at a time, some are cancelled, and a pass has one or many.
#[test]
fn texts_at_once_are_those_of_each_alone() {
    let d = tempfile::tempdir().unwrap();
    for file in [common::tiny(3), common::tiny_moe(2)] {
        let opened = Opened::open(&file.write(d.path(), "m.gguf")).unwrap();
        let all: Vec<Asked> = (0..24).map(|i| asked(&opened, i)).collect();
        let alone: Vec<(Vec<u32>, String, StopReason)> = all
            .iter()
            .map(|a| {
                let mut s = session(&opened, 256, 1);
                let sampler = &mut sampler(&opened, a);
                let g = generate(&mut s, &opened.tokenizer, sampler, a.request(0), &|| false, &mut |_| ()).unwrap();
                (g.tokens, g.text, g.stop)
            })
            .collect();
        // With one row of logits, each pass is of one text.
        for outputs in [1, 16] {
            let mut s = session(&opened, 256, outputs);
            let mut generator = Generator::new(&s, &opened.tokenizer);
            let mut of: HashMap<JobId, usize> = HashMap::new();
            let mut shown: HashMap<JobId, String> = HashMap::new();
            let (mut next, mut steps, mut over) = (0, 0, 0);
            let mut ended: Vec<Ended<Sampler>> = Vec::new();
            while over < all.len() {
                while next < all.len() && (next < 8 || steps > 3 * next) {
                    let seq = s.fork_at(0).unwrap();
                    let job = generator.add(&s, seq, sampler(&opened, &all[next]), all[next].request(0)).unwrap();
                    of.insert(job, next);
                    next += 1;
                }
                let show = &mut |job, grown: Grown<'_>| {
                    if let Grown::Piece(piece) = grown
                        && !piece.control
                    {
                        shown.entry(job).or_default().push_str(piece.text);
                    }
                };
                generator.step(&mut s, &|_| false, show, &mut ended).unwrap();
                steps += 1;
                for e in ended.drain(..) {
                    let (i, g) = (of[&e.job], e.result.unwrap());
                    s.close(e.seq).unwrap();
                    over += 1;
                    let (tokens, text, stop) = &alone[i];
                    assert_eq!(shown.remove(&e.job).unwrap_or_default(), g.text, "text {i}");
                    if i % 7 == 6 {
                        assert!(tokens.starts_with(&g.tokens), "text {i}, cancelled");
                    } else {
                        assert!(g.tokens == *tokens && g.text == *text && g.stop == *stop, "text {i}: {g:?}");
                    }
                }
                // One of them is given up in its middle.
                let cancelled = of.iter().filter(|(_, i)| **i % 7 == 6 && steps > 9 + **i).map(|(job, _)| *job);
                cancelled.collect::<Vec<_>>().into_iter().for_each(|job| generator.cancel(job));
            }
            assert_eq!((generator.counts(), s.free_pages()), ((0, 0), 4), "pages are given back");
        }
    }
}

/// Guards against one text's error that ends the others: only those with the token whose embedding is no number fail.
#[test]
fn a_text_that_is_not_finite_fails_alone() {
    let d = tempfile::tempdir().unwrap();
    let mut file = common::tiny(2);
    let embedding = file.tensor("token_embd.weight");
    let (row, bytes) = (embedding.shape[0] as usize * 4, embedding.data.len());
    assert_eq!(bytes % row, 0, "rows of F32");
    embedding.data[7 * row..8 * row].chunks_exact_mut(4).for_each(|x| x.copy_from_slice(&f32::NAN.to_le_bytes()));
    let opened = Opened::open(&file.write(d.path(), "m.gguf")).unwrap();
    let mut s = session(&opened, 512, 16);
    let mut generator = Generator::new(&s, &opened.tokenizer);
    let params =
        SamplerParams { logit_bias: vec![(7, f32::NEG_INFINITY)], ignore_eos: true, ..SamplerParams::default() };
    for i in 0..6u32 {
        let prompt = if i % 3 == 1 { vec![20, 7, 30 + i] } else { vec![20, 30 + i] };
        let a = Asked { prompt, n: 5, stops: Vec::new(), params: params.clone() };
        let seq = s.fork_at(0).unwrap();
        generator.add(&s, seq, sampler(&opened, &a), a.request(0)).unwrap();
    }
    let mut ended = Vec::new();
    while generator.step(&mut s, &|_| false, &mut |_, _| (), &mut ended).unwrap() {}
    assert_eq!(ended.len(), 6);
    for e in ended {
        match e.result {
            Err(why) => assert!(e.job.0 % 3 == 1 && why.to_string().contains("token_embd"), "{why}"),
            Ok(g) => assert!(e.job.0 % 3 != 1 && g.tokens.len() == 5, "{g:?}"),
        }
    }
}

/// `nt bench --parallel`: rates of texts that are generated at once.
#[test]
fn texts_at_once_are_measured() {
    let d = tempfile::tempdir().unwrap();
    let model = common::tiny(3).write(d.path(), "m.gguf");
    let model = model.to_str().unwrap();
    let args = ["bench", model, "-p", "0", "-n", "4", "-d", "0,70", "-r", "1", "--parallel", "1,3,8", "-o", "jsonl"];
    let run = common::nt(&[&args[..], &["--backend", "cpu"]].concat());
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let rows: Vec<serde_json::Value> =
        String::from_utf8(run.stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let of: Vec<(u64, u64)> =
        rows.iter().map(|r| (r["n_depth"].as_u64().unwrap(), r["n_parallel"].as_u64().unwrap())).collect();
    assert_eq!(of, [(0, 1), (0, 3), (0, 8), (70, 1), (70, 3), (70, 8)]);
    for wrong in ["0", "9", "x"] {
        common::fails(&["bench", model, "-p", "0", "-n", "4", "--parallel", wrong], 2, &["--parallel"]);
    }
}

/// Guards against a text that goes on with an infinite key, which no logits show: it fails, in whatever pass its prompt
/// was, and texts that come after it are right.
#[test]
fn a_text_with_keys_beyond_f16_fails_and_later_ones_do_not() {
    let d = tempfile::tempdir().unwrap();
    let mut file = common::tiny(2);
    let set = |t: &mut common::T, value: &dyn Fn(usize, usize) -> Option<f32>| {
        let cols = t.shape[0] as usize;
        for (i, x) in t.data.chunks_exact_mut(4).enumerate() {
            if let Some(v) = value(i / cols, i % cols) {
                x.copy_from_slice(&v.to_le_bytes());
            }
        }
    };
    // Token 7 alone has a first element, which keys are far too large for.
    set(file.tensor("token_embd.weight"), &|row, col| match (row, col) {
        (7, _) => Some(if col == 0 { 1.0 } else { 0.0 }),
        (_, 0) => Some(0.0),
        _ => None,
    });
    set(file.tensor("blk.0.attn_k.weight"), &|_, col| (col == 0).then_some(1e6));
    let opened = Opened::open(&file.write(d.path(), "m.gguf")).unwrap();
    let mut s = session(&opened, 1024, 16);
    let mut generator = Generator::new(&s, &opened.tokenizer);
    let params =
        SamplerParams { logit_bias: vec![(7, f32::NEG_INFINITY)], ignore_eos: true, ..SamplerParams::default() };
    // The first part of its prompt, which has the token, is a pass without logits.
    let long: Vec<u32> = [7].into_iter().chain((0..99).map(|i| 20 + i)).collect();
    let add = |s: &mut Session, generator: &mut Generator<'_, Sampler>, prompt: Vec<u32>| {
        let a = Asked { prompt, n: 4, stops: Vec::new(), params: params.clone() };
        let seq = s.fork_at(0).unwrap();
        generator.add(s, seq, sampler(&opened, &a), a.request(0)).unwrap()
    };
    let bad = add(&mut s, &mut generator, long);
    let mut ended = Vec::new();
    while generator.step(&mut s, &|_| false, &mut |_, _| (), &mut ended).unwrap() {}
    let later = add(&mut s, &mut generator, vec![20, 30]);
    while generator.step(&mut s, &|_| false, &mut |_, _| (), &mut ended).unwrap() {}
    assert_eq!((ended[0].job, ended[1].job, ended.len()), (bad, later, 2));
    let why = ended[0].result.as_ref().unwrap_err().to_string();
    assert!(why.contains("F16"), "{why}");
    assert_eq!(ended[1].result.as_ref().unwrap().tokens.len(), 4);
}

/// Guards against passes larger than a context that is no multiple of a page, which would be planned again for ever.
#[test]
fn texts_that_fill_a_small_context_together() {
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&common::tiny(2).write(d.path(), "m.gguf")).unwrap();
    let options = Options { threads: 2, ram: Some(64 << 20), outputs: 8, ..Options::new(BackendKind::Cpu, 100) };
    let mut s = Session::new(&opened, options, &mut |_, _| ()).unwrap();
    let mut generator = Generator::new(&s, &opened.tokenizer);
    for i in 0..2 {
        let params = SamplerParams { ignore_eos: true, ..SamplerParams::default() };
        let a = Asked { prompt: (0..60).map(|t| 20 + i + t).collect(), n: 4, stops: Vec::new(), params };
        let seq = s.fork_at(0).unwrap();
        generator.add(&s, seq, sampler(&opened, &a), a.request(0)).unwrap();
    }
    let mut ended = Vec::new();
    while generator.step(&mut s, &|_| false, &mut |_, _| (), &mut ended).unwrap() {}
    assert!(ended.len() == 2 && ended.iter().all(|e| e.result.as_ref().unwrap().tokens.len() == 4));
}

/// Guards against one text that stops the others: a token that is none, a sequence that is another's or has ended; and
/// against a text that waits for pages which it no longer needs.
#[test]
fn what_is_wrong_with_a_text_is_said_when_it_is_added() {
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&common::tiny(2).write(d.path(), "m.gguf")).unwrap();
    let mut s = session(&opened, 256, 8);
    let mut generator = Generator::new(&s, &opened.tokenizer);
    let add = |s: &Session, generator: &mut Generator<'_, Sampler>, seq, prompt: &[u32], cached, n| {
        let params = SamplerParams { ignore_eos: true, ..SamplerParams::default() };
        let a = Asked { prompt: prompt.to_vec(), n, stops: Vec::new(), params };
        generator.add(s, seq, sampler(&opened, &a), a.request(cached)).map_err(|e| e.to_string())
    };
    let tokens: Vec<u32> = (0..120).map(|i| i % 200 + 20).collect();
    s.eval(&tokens[..100], nt::backend::Class::Bulk, nt::model::Outputs::None, &|| false).unwrap();
    let kept = s.sequence();
    let (a, b) = (s.fork_at(0).unwrap(), s.fork_at(100).unwrap());
    assert!(add(&s, &mut generator, a, &[20, 9999], 0, 2).unwrap_err().contains("vocabulary"));
    assert!(add(&s, &mut generator, a, &[], 0, 2).unwrap_err().contains("no token"));
    // Both of the kept sequence's pages are read here, and the last is copied: one page more than are free.
    let whole = add(&s, &mut generator, b, &tokens, 100, usize::MAX).unwrap();
    assert!(add(&s, &mut generator, b, &tokens, 100, 2).unwrap_err().contains("once in a pass"));
    let mut ended = Vec::new();
    assert!(!generator.step(&mut s, &|_| false, &mut |_, _| (), &mut ended).unwrap());
    assert_eq!(generator.lacks(&s), 1);
    s.switch(a).unwrap();
    s.close(kept).unwrap();
    assert_eq!(generator.lacks(&s), 0);
    while generator.step(&mut s, &|_| false, &mut |_, _| (), &mut ended).unwrap() {}
    assert!(ended[0].job == whole && ended[0].result.as_ref().unwrap().context_full);
    // A sequence that ends under its text.
    let c = s.fork_at(0).unwrap();
    add(&s, &mut generator, c, &[20], 0, 2).unwrap();
    s.close(c).unwrap();
    ended.clear();
    while generator.step(&mut s, &|_| false, &mut |_, _| (), &mut ended).unwrap() {}
    assert!(ended[0].result.as_ref().unwrap_err().to_string().contains("has ended"));
}

/// Guards against a pass that is given up for one text that nobody waits for any more, while others are computed in it.
#[test]
fn a_text_that_is_interrupted_ends_alone() {
    let d = tempfile::tempdir().unwrap();
    let opened = Opened::open(&common::tiny(2).write(d.path(), "m.gguf")).unwrap();
    let mut s = session(&opened, 512, 8);
    let mut generator = Generator::new(&s, &opened.tokenizer);
    let asked = |i: u32| {
        let params = SamplerParams { ignore_eos: true, ..SamplerParams::default() };
        Asked { prompt: (0..40 + i).map(|t| 20 + t).collect(), n: 12, stops: Vec::new(), params }
    };
    let mut jobs = Vec::new();
    for i in 0..3 {
        let (seq, a) = (s.fork_at(0).unwrap(), asked(i));
        assert!(generator.room(&s) > 0);
        jobs.push(generator.add_now(&s, seq, sampler(&opened, &a), a.request(0)).unwrap());
    }
    let (mut ended, mut steps) = (Vec::new(), 0);
    loop {
        // One in its prompt, one in its text.
        let gone = |job| (job == jobs[0]) || (job == jobs[1] && steps > 6);
        if !generator.step(&mut s, &gone, &mut |_, _| (), &mut ended).unwrap() {
            break;
        }
        steps += 1;
    }
    for e in &ended {
        let g = e.result.as_ref().unwrap();
        let expected = if e.job == jobs[2] { StopReason::Length } else { StopReason::Interrupt };
        assert_eq!(g.stop, expected);
        assert_eq!(g.tokens.len() == 12, e.job == jobs[2], "{g:?}");
    }
    assert_eq!(ended.len(), 3);
    // All at once, in the middle of a pass: it is given up.
    let (seq, a) = (s.fork_at(0).unwrap(), asked(9));
    let last = generator.add(&s, seq, sampler(&opened, &a), a.request(0)).unwrap();
    let asked_for = std::cell::Cell::new(0);
    let late = |_| {
        asked_for.set(asked_for.get() + 1);
        asked_for.get() > 2
    };
    ended.clear();
    assert!(generator.step(&mut s, &late, &mut |_, _| (), &mut ended).unwrap());
    assert!(ended[0].job == last && s.length(ended[0].seq).unwrap() == 0);
}

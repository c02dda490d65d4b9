//! Sampling against llama.cpp's definitions (`src/llama-sampling.cpp`), written down here a second time: in double
//! precision, without sorting tricks, one function a filter.

use nt::engine::{DryParams, Sampler, SamplerParams};
use nt::gguf;
use nt::tokenizer::Tokenizer;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[allow(dead_code, reason = "each test binary uses a part")]
#[path = "common/vocab.rs"]
mod vocab;

const N: usize = 262;

/// All filters off.
fn neutral() -> SamplerParams {
    SamplerParams { temp: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..SamplerParams::default() }
}

/// Logits of which a few stand out, from a seed.
fn logits(seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..N).map(|_| (0..4).map(|_| rng.random::<f32>() - 0.5).sum::<f32>() * 7.0).collect()
}

fn history(seed: u64, n: usize, of: u32) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0xabc);
    (0..n).map(|_| rng.random_range(0..of)).collect()
}

type Candidates = Vec<(u32, f64)>;

fn sorted(mut c: Candidates) -> Candidates {
    c.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    c
}

fn probabilities(c: &Candidates) -> Vec<f64> {
    let max = c.iter().map(|x| x.1).fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = c.iter().map(|x| (x.1 - max).exp()).sum();
    c.iter().map(|x| (x.1 - max).exp() / total).collect()
}

fn penalties(c: &mut Candidates, last: &[u32], p: &SamplerParams) {
    let last = &last[last.len() - p.repeat_last_n.min(last.len())..];
    for (id, l) in c {
        let count = last.iter().filter(|t| *t == id).count() as f64;
        if count > 0.0 {
            let r = f64::from(p.repeat_penalty);
            *l = if *l <= 0.0 { *l * r } else { *l / r };
            *l -= count * f64::from(p.frequency_penalty) + f64::from(p.presence_penalty);
        }
    }
}

/// For each token the longest end of the text that stands before it somewhere in the text, by trying all.
fn dry(c: &mut Candidates, last: &[u32], p: &DryParams, breakers: &[&[u32]]) {
    let last = &last[last.len() - p.last_n.min(last.len())..];
    let n = last.len();
    let after_breaker = |b: &&[u32]| (b.len()..=n).rev().find(|&end| last[..end].ends_with(b)).map(|end| n - end);
    let limit = breakers.iter().filter_map(after_breaker).min().unwrap_or(n);
    if n <= p.allowed_length || limit < p.allowed_length {
        return;
    }
    for (id, l) in c {
        if breakers.contains(&&[*id][..]) {
            continue;
        }
        let before = (1..n).filter(|&j| last[j] == *id);
        let lengths = before.map(|j| (0..=j.min(limit)).rev().find(|&k| last[j - k..j] == last[n - k..]).unwrap_or(0));
        let longest = lengths.max().unwrap_or(0);
        if longest >= p.allowed_length && longest > 0 {
            *l -= f64::from(p.multiplier) * f64::from(p.base).powi((longest - p.allowed_length) as i32);
        }
    }
}

fn top_n_sigma(c: Candidates, n: f64) -> Candidates {
    let mean = c.iter().map(|x| x.1).sum::<f64>() / c.len() as f64;
    let sigma = (c.iter().map(|x| (x.1 - mean).powi(2)).sum::<f64>() / c.len() as f64).sqrt();
    let max = c.iter().map(|x| x.1).fold(f64::NEG_INFINITY, f64::max);
    c.into_iter().filter(|x| x.1 >= max - n * sigma).collect()
}

fn typical(c: Candidates, p: f64) -> Candidates {
    let probabilities = probabilities(&c);
    let entropy: f64 = probabilities.iter().map(|p| -p * p.ln()).sum();
    let mut order: Vec<usize> = (0..c.len()).collect();
    order.sort_by(|&a, &b| {
        (-probabilities[a].ln() - entropy).abs().total_cmp(&(-probabilities[b].ln() - entropy).abs())
    });
    let (mut mass, mut kept) = (0.0, Vec::new());
    for i in order {
        kept.push(c[i]);
        mass += probabilities[i];
        if mass > p {
            break;
        }
    }
    kept
}

fn top_p(c: Candidates, p: f64) -> Candidates {
    let c = sorted(c);
    let mut mass = 0.0;
    let n = probabilities(&c)
        .iter()
        .take_while(|x| {
            let more = mass < p;
            mass += **x;
            more
        })
        .count();
    c[..n.max(1)].to_vec()
}

fn min_p(c: Candidates, p: f64) -> Candidates {
    let probabilities = probabilities(&c);
    let max = probabilities.iter().copied().fold(0.0, f64::max);
    c.into_iter().zip(probabilities).filter(|(_, x)| *x >= p * max).map(|x| x.0).collect()
}

fn xtc(c: Candidates, threshold: f64) -> Candidates {
    let c = sorted(c);
    let above = probabilities(&c).iter().filter(|p| **p >= threshold).count();
    c[above.saturating_sub(1)..].to_vec()
}

/// llama.cpp's default chain.
fn expected(logits: &[f32], last: &[u32], p: &SamplerParams, breakers: &[&[u32]]) -> Candidates {
    let mut c: Candidates = (0..).zip(logits.iter().map(|&l| f64::from(l))).collect();
    for (id, bias) in &p.logit_bias {
        c[*id as usize].1 += f64::from(*bias);
    }
    c.retain(|x| x.1 > f64::NEG_INFINITY);
    penalties(&mut c, last, p);
    if p.dry.multiplier != 0.0 {
        dry(&mut c, last, &p.dry, breakers);
    }
    if p.top_n_sigma > 0.0 {
        c = top_n_sigma(c, f64::from(p.top_n_sigma));
    }
    if p.top_k > 0 {
        c = sorted(c);
        c.truncate(p.top_k);
    }
    if p.typical < 1.0 {
        c = typical(c, f64::from(p.typical));
    }
    if p.top_p < 1.0 {
        c = top_p(c, f64::from(p.top_p));
    }
    if p.min_p > 0.0 {
        c = min_p(c, f64::from(p.min_p));
    }
    if p.xtc_probability >= 1.0 {
        c = xtc(c, f64::from(p.xtc_threshold));
    }
    c.iter_mut().for_each(|x| x.1 /= f64::from(p.temp));
    let c = sorted(c);
    let probabilities = probabilities(&c);
    c.iter().zip(probabilities).map(|(x, p)| (x.0, p)).collect()
}

/// Compares the distribution over texts from 20 seeds.
fn check(p: &SamplerParams, tokenizer: Option<&Tokenizer>, breakers: &[&[u32]], of: u32) {
    for seed in 0..20 {
        let (logits, last) = (logits(seed), history(seed, 90, of));
        let mut sampler = match tokenizer {
            Some(t) => Sampler::for_model(p.clone(), N, t),
            None => Sampler::new(p.clone(), N),
        };
        // What was told before the beginning is forgotten.
        (0..70).for_each(|i| sampler.accept(i));
        sampler.begin(&last[..60]);
        last[60..].iter().for_each(|&t| sampler.accept(t));
        let got: Candidates = sampler
            .distribution(&logits)
            .unwrap()
            .iter()
            .map(|x| (x.0, f64::from(x.1)))
            .filter(|x| x.1 > 0.0)
            .collect();
        let expected = expected(&logits, &last, p, breakers);
        let ids = |c: &Candidates| {
            let mut ids: Vec<u32> = c.iter().map(|x| x.0).collect();
            ids.sort();
            ids
        };
        assert_eq!(ids(&got), ids(&expected), "{p:?} seed {seed}");
        for (id, probability) in &expected {
            let other = got.iter().find(|x| x.0 == *id).unwrap().1;
            assert!(
                (probability - other).abs() < 1e-5 + 1e-3 * probability,
                "{p:?} seed {seed}: {id} has {other}, not {probability}"
            );
        }
    }
}

#[test]
fn filters_keep_what_llama_cpp_keeps() {
    check(&SamplerParams::default(), None, &[], N as u32);
    for p in [
        SamplerParams { top_k: 5, ..neutral() },
        SamplerParams { top_p: 0.7, ..neutral() },
        SamplerParams { top_p: 0.0, ..neutral() },
        SamplerParams { min_p: 0.2, ..neutral() },
        SamplerParams { typical: 0.4, ..neutral() },
        SamplerParams { typical: 0.9, top_p: 0.8, temp: 1.7, ..neutral() },
        SamplerParams { top_n_sigma: 1.5, ..neutral() },
        SamplerParams { xtc_probability: 1.0, xtc_threshold: 0.05, ..neutral() },
        SamplerParams { xtc_probability: 1.0, xtc_threshold: 0.6, ..neutral() },
        SamplerParams { logit_bias: vec![(3, 5.0), (7, f32::NEG_INFINITY), (3, -1.0)], ..neutral() },
        neutral(),
    ] {
        check(&p, None, &[], N as u32);
    }
}

#[test]
fn penalties_are_llama_cpps() {
    for p in [
        SamplerParams { repeat_penalty: 1.3, ..neutral() },
        SamplerParams { presence_penalty: 0.8, ..neutral() },
        SamplerParams { frequency_penalty: 0.3, repeat_last_n: 12, ..neutral() },
        SamplerParams { frequency_penalty: -0.3, repeat_penalty: 0.9, repeat_last_n: usize::MAX, ..neutral() },
        SamplerParams { presence_penalty: 2.0, repeat_last_n: 0, ..neutral() },
    ] {
        check(&p, None, &[], 40);
    }
}

#[test]
fn dry_penalises_what_llama_cpps_does() {
    let tokenizer = Tokenizer::from_metadata(&vocab::byte_level("", "gpt-2")).unwrap();
    let dry = |allowed_length, last_n, breakers: &[&str]| SamplerParams {
        dry: DryParams {
            multiplier: 0.8,
            base: 1.5,
            allowed_length,
            last_n,
            breakers: breakers.iter().map(ToString::to_string).collect(),
        },
        ..neutral()
    };
    // Few tokens, so that much is repeated.
    for of in [2, 3, 5] {
        check(&dry(2, 64, &[]), None, &[], of);
        check(&dry(1, usize::MAX, &[]), None, &[], of);
        check(&dry(4, 30, &[]), None, &[], of);
    }
    // The first tokens of this vocabulary are the bytes: 1 and the pair of 2 and 3 break.
    check(&dry(1, 64, &["\u{1}"]), Some(&tokenizer), &[&[1]], 9);
    check(&dry(1, 64, &["\u{2}\u{3}"]), Some(&tokenizer), &[&[2, 3]], 5);
    check(&dry(2, 64, &["\u{1}", "\u{2}\u{3}"]), Some(&tokenizer), &[&[1], &[2, 3]], 6);
}

#[test]
fn all_together_keep_llama_cpps_order() {
    let tokenizer = Tokenizer::from_metadata(&vocab::byte_level("", "gpt-2")).unwrap();
    let p = SamplerParams {
        temp: 1.3,
        top_k: 60,
        top_p: 0.97,
        min_p: 0.02,
        typical: 0.95,
        top_n_sigma: 3.0,
        xtc_probability: 1.0,
        xtc_threshold: 0.1,
        repeat_penalty: 1.1,
        presence_penalty: 0.1,
        frequency_penalty: 0.05,
        logit_bias: vec![(9, 2.0)],
        dry: DryParams { multiplier: 0.5, allowed_length: 1, breakers: vec!["\u{1}".into()], ..DryParams::default() },
        ..neutral()
    };
    check(&p, Some(&tokenizer), &[&[1]], 6);
}

#[test]
fn xtc_is_applied_as_often_as_asked() {
    let p = SamplerParams { xtc_probability: 0.25, xtc_threshold: 0.1, seed: 3, ..neutral() };
    let mut sampler = Sampler::new(p, 3);
    let logits = [0.6f32, 0.3, 0.1].map(f32::ln);
    // Without XTC 0 is drawn with 0.6; with it, of the two above the threshold only 1 is left.
    let drawn = (0..4000).filter(|_| sampler.sample(&logits).unwrap() == 0).count() as f32 / 4000.0;
    assert!((drawn - 0.75 * 0.6).abs() < 0.03, "{drawn}");
}

#[test]
fn what_ends_a_text_is_never_drawn_where_it_is_ignored() {
    let tokenizer = Tokenizer::from_metadata(&vocab::byte_level("", "gpt-2")).unwrap();
    let end = tokenizer.eog_ids()[0];
    for temp in [0.0, 1.0] {
        let p = SamplerParams { ignore_eos: true, ..SamplerParams { temp, ..neutral() } };
        let mut sampler = Sampler::for_model(p, N, &tokenizer);
        let mut logits = vec![0.0; N];
        logits[end as usize] = 50.0;
        assert!((0..200).all(|_| sampler.sample(&logits).unwrap() != end));
    }
}

/// Whatever the logits and parameters, the token is one of the vocabulary, and none that is banned or no number.
#[test]
fn bent_logits_and_parameters() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, f32::MIN_POSITIVE, -0.0, 1e30];
    for round in 0..10_000 {
        let n = rng.random_range(1..30usize);
        let mut logits: Vec<f32> = (0..n).map(|_| rng.random::<f32>() * 20.0 - 10.0).collect();
        for _ in 0..rng.random_range(0..4) {
            logits[rng.random_range(0..n)] = odd[rng.random_range(0..odd.len())];
        }
        let mut pick = |values: &[f32]| values[rng.random_range(0..values.len())];
        let p = SamplerParams {
            temp: pick(&[0.0, 1e-6, 0.8, 100.0]),
            top_k: pick(&[0.0, 1.0, 7.0, 1e9]) as usize,
            top_p: pick(&[0.0, 0.5, 1.0]),
            min_p: pick(&[0.0, 0.1, 1.0]),
            typical: pick(&[0.0, 0.5, 1.0]),
            top_n_sigma: pick(&[-1.0, 0.0, 1.0]),
            xtc_probability: pick(&[0.0, 1.0]),
            xtc_threshold: pick(&[0.0, 0.1, 0.5]),
            repeat_penalty: pick(&[1.0, f32::MIN_POSITIVE, 1e6]),
            presence_penalty: pick(&[0.0, 1e6, -1e6]),
            frequency_penalty: pick(&[0.0, 1e6, -1e6]),
            repeat_last_n: pick(&[0.0, 3.0, 1e18]) as usize,
            ends: Vec::new(),
            min_tokens: pick(&[0.0, 2.0]) as usize,
            dry: DryParams {
                multiplier: pick(&[0.0, 1e6]),
                base: pick(&[1.0, 1e6]),
                allowed_length: 0,
                ..DryParams::default()
            },
            logit_bias: vec![(pick(&[0.0, 5.0, 1e9]) as u32, pick(&[f32::INFINITY, f32::NEG_INFINITY, 3.0]))],
            ignore_eos: false,
            seed: round,
            grammar: None,
            thought: None,
        };
        let mut sampler = Sampler::new(p.clone(), n);
        let any = logits.iter().any(|l| l.is_finite());
        for _ in 0..6 {
            let Ok(token) = sampler.sample(&logits) else {
                // Nothing that is left could be drawn.
                let ban = p.logit_bias[0].1 == f32::NEG_INFINITY;
                let banned = |i: usize| ban && p.logit_bias[0].0 as usize == i;
                let left = logits.iter().enumerate().any(|(i, l)| l.is_finite() && !banned(i));
                assert!(!left, "round {round}: {logits:?} {p:?}");
                break;
            };
            assert!((token as usize) < n, "round {round}: {token} of {n}");
            let banned = p.logit_bias[0] == (token, f32::NEG_INFINITY);
            // Certain by the user's word, whatever the model says.
            let forced = p.logit_bias[0] == (token, f32::INFINITY);
            let unlucky =
                !forced && (logits[token as usize].is_nan() || logits[token as usize] == f32::NEG_INFINITY || banned);
            assert!(
                !unlucky || !any || n == 1 || p.logit_bias[0].1 == f32::NEG_INFINITY,
                "round {round}: {token} {logits:?} {p:?}"
            );
            sampler.accept(token);
        }
    }
}

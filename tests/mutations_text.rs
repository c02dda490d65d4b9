//! Bent templates and conversations, from a seed: a prompt holds the words or is refused, never a panic, never for ever.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nt::tokenizer::ChatTemplate;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value as Json, json};

/// Inputs of each test; a slow machine stops earlier. `NT_MUTATIONS` sets another number and takes the time that it
/// takes.
const ROUNDS: usize = 10_000;
const TIME_MAX: Duration = Duration::from_secs(5);

/// What stands in templates where something goes wrong.
const PARTS: &[&str] = &[
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ ",
    " }}",
    "{%- if ",
    "messages[1:]",
    ".content",
    " | tojson(indent=3)",
    " | length",
    " * 99999",
    "| reverse | list",
    "{% set messages = messages + messages %}",
    "{% macro x(a) %}{{ x(a) }}{% endmacro %}{{ x(1) }}",
    "{{ raise_exception('no') }}",
    "['text']",
    "é🦀\u{2028}",
    "{% generation %}",
    "\0",
];

fn rounds(mut one: impl FnMut(&mut ChaCha8Rng, usize), seed: u64) {
    let given = std::env::var("NT_MUTATIONS").ok().map(|n| n.parse().expect("a number"));
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let start = Instant::now();
    for round in 0..given.unwrap_or(ROUNDS) {
        one(&mut rng, round);
        if given.is_none() && start.elapsed() > TIME_MAX {
            break;
        }
    }
}

fn sources() -> Vec<String> {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/templates"));
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    // The seed gives the same inputs only in the same order.
    paths.sort();
    let mut all: Vec<String> = paths.iter().map(|p| std::fs::read_to_string(p).unwrap()).collect();
    all.push("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}".into());
    all.push(
        "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}".into(),
    );
    all
}

fn conversation() -> Vec<Json> {
    let call = json!({"id": "abcdef123", "type": "function", "function": {"name": "f", "arguments": {"x": [1, 0.5, null, true]}}});
    vec![
        json!({"role": "system", "content": " Be brief.\n"}),
        json!({"role": "user", "content": [{"type": "text", "text": "dé<jà>"}]}),
        json!({"role": "assistant", "content": "a,b", "tool_calls": [call]}),
        json!({"role": "tool", "tool_call_id": "abcdef123", "name": "f", "content": "{}"}),
        json!({"role": "assistant", "content": "<think>\nso\n</think>\nyes"}),
        json!({"role": "user", "content": "and then?"}),
    ]
}

/// Bends a text in one place, between characters.
fn bend(rng: &mut ChaCha8Rng, text: &mut String) {
    let mut place = |from: usize, to: usize| {
        let at = rng.random_range(from..=to);
        (0..=at).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
    };
    let at = place(0, text.len());
    let end = place(at, text.len().min(at + 40)).max(at);
    match rng.random_range(0..5) {
        0 => text.truncate(at),
        1 => drop(text.drain(at..end)),
        2 => {
            let again = text[at..end].to_owned();
            text.insert_str(at, &again);
        }
        3 => text.replace_range(at..end, PARTS[rng.random_range(0..PARTS.len())]),
        _ => text.insert_str(at, PARTS[rng.random_range(0..PARTS.len())]),
    }
}

#[test]
fn templates() {
    let (sources, messages) = (sources(), conversation());
    rounds(
        |rng, round| {
            let mut source = sources[rng.random_range(0..sources.len())].clone();
            (0..rng.random_range(1..=3)).for_each(|_| bend(rng, &mut source));
            let Ok(template) = ChatTemplate::new(&source, "<s>".into(), "</s>".into()) else { return };
            let (from, to) = [(0, 2), (1, 2), (0, 6), (5, 6)][round % 4];
            let _ = template.prompt(&messages[from..to], (round % 5 == 0).then_some(&messages[..1]), round % 2 == 0);
        },
        11,
    );
}

/// A value from nowhere.
fn odd(rng: &mut ChaCha8Rng) -> Json {
    let texts =
        ["", " ", "user", "system", "tool", "{{ x }}", "NaN", "</think>", "<|im_end|>", "🦀\u{301}\0", "NT7Q0Q7TN"];
    match rng.random_range(0..9) {
        0 => Json::Null,
        1 => json!(rng.random::<bool>()),
        2 => json!(rng.random::<i64>()),
        3 => json!(f64::MAX),
        4 => json!([{ "type": "text", "text": texts[rng.random_range(0..texts.len())] }, { "type": "image" }]),
        5 => json!([]),
        6 => json!({ "type": "text", "text": 3 }),
        7 => (0..rng.random_range(1..60)).fold(json!("deep"), |inner, _| json!([inner])),
        _ => json!(texts[rng.random_range(0..texts.len())]),
    }
}

/// Bends a value in one place.
fn bend_json(rng: &mut ChaCha8Rng, v: &mut Json) {
    match v {
        Json::Array(items) if !items.is_empty() && rng.random_range(0..8) > 0 => {
            let i = rng.random_range(0..items.len());
            match rng.random_range(0..6) {
                0 => drop(items.remove(i)),
                1 => items.insert(i, items[i].clone()),
                2 => items.swap(i, 0),
                _ => bend_json(rng, &mut items[i]),
            }
        }
        Json::Object(fields) if !fields.is_empty() && rng.random_range(0..8) > 0 => {
            let key = fields.keys().nth(rng.random_range(0..fields.len())).unwrap().clone();
            match rng.random_range(0..6) {
                0 => drop(fields.remove(&key)),
                _ => bend_json(rng, &mut fields[&key]),
            }
        }
        other => *other = odd(rng),
    }
}

#[test]
fn conversations() {
    let templates: Vec<ChatTemplate> =
        sources().iter().map(|s| ChatTemplate::new(s, "<s>".into(), "</s>".into()).unwrap()).collect();
    let plain = ChatTemplate::new(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        String::new(),
        String::new(),
    )
    .unwrap();
    rounds(
        |rng, round| {
            let mut all = Json::Array(conversation());
            (0..rng.random_range(1..=6)).for_each(|_| bend_json(rng, &mut all));
            let Json::Array(messages) = all else { return };
            let _ = templates[round % templates.len()].prompt(&messages, None, true);
            // Where each content is printed as it is, each text is there.
            let prompt = plain.prompt(&messages, None, true).unwrap_or_else(|e| panic!("{e}: {messages:?}"));
            for words in messages.iter().filter_map(|m| m["content"].as_str()) {
                assert!(prompt.text.contains(words), "{words:?} is not in {:?}", prompt.text);
            }
        },
        12,
    );
}

//! Round trips, merges and special tokens over the small vocabularies.

use super::{Decoder, Tokenizer};
use crate::gguf;
use rand::{RngExt, SeedableRng};
use vocab::{byte_level, spm};

#[path = "../../tests/common/vocab.rs"]
mod vocab;

fn decode(t: &Tokenizer, ids: &[u32]) -> String {
    let mut decoder = Decoder::new(t);
    let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
    text.push_str(&decoder.finish());
    text
}

#[test]
fn any_text_survives_a_round_trip() {
    const PARTS: &[&str] =
        &["hell", "he", " a", "  ", "\n", "é", "日本", "🦀", "e\u{301}", "<x>", "'s", "123", "\0", "<"];
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    for pre in ["llama-bpe", "qwen2", "gpt-2", "deepseek-v3", "tekken", "default"] {
        let t = Tokenizer::from_metadata(&byte_level("", pre)).unwrap();
        for _ in 0..200 {
            let n = rng.random_range(0..20);
            let text: String = (0..n).map(|_| PARTS[rng.random_range(0..PARTS.len())]).collect();
            let ids = t.encode(&text, false, false);
            assert_eq!(decode(&t, &ids), text, "{pre} {ids:?}");
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| t.token_bytes(id)).copied().collect();
            assert_eq!(bytes, text.as_bytes(), "{pre}");
        }
    }
}

#[test]
fn merges_and_special_tokens() {
    let t = Tokenizer::from_metadata(&byte_level("", "gpt-2")).unwrap();
    assert_eq!(t.encode("hell a", false, false), [258, 259]);
    assert_eq!(t.encode("a<x><|im_end|>", false, true), [97, 261, 260]);
    assert_eq!(t.encode("<x><|im_end|>", false, false)[0], 261);
    assert!(!t.encode("<|im_end|>", false, false).contains(&260));
    assert!(t.is_control(260) && t.is_eog(260) && !t.is_control(261) && !t.is_eog(261));
    assert_eq!(t.token_bytes(260), b"<|im_end|>");
    assert_eq!(decode(&t, &[258, 260, 261]), "hell<x>");
    assert_eq!((t.vocab_size(), t.token_bytes(9999)), (262, &b""[..]));
}

/// Gemma 4's: `<bos>`, 256 bytes, then `▁`, `a`, `b`, `▁a`, `ab`, one line feed and two, and a control token.
fn of_chars() -> gguf::Metadata {
    use gguf::{Array, Metadata, StringArray, Value};
    let strings = |items: &[String]| {
        let mut out = StringArray::default();
        items.iter().for_each(|item| out.push(item.as_bytes()));
        Value::Array(Array::Str(out))
    };
    let mut tokens = vec!["<bos>".to_owned()];
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    tokens.extend(["▁", "a", "b", "▁a", "ab", "\n", "\n\n", "<turn|>"].map(String::from));
    let mut types = vec![3];
    types.extend([6; 256]);
    types.extend([1; 7]);
    types.push(3);
    let mut m = Metadata::default();
    m.insert("tokenizer.ggml.model".into(), Value::Str("gemma4".into()));
    m.insert("tokenizer.ggml.tokens".into(), strings(&tokens));
    m.insert("tokenizer.ggml.token_type".into(), Value::Array(Array::Int(types)));
    m.insert("tokenizer.ggml.merges".into(), strings(&["a b", "▁ a"].map(String::from)));
    m.insert("tokenizer.ggml.bos_token_id".into(), Value::Int(0));
    m.insert("tokenizer.ggml.add_bos_token".into(), Value::Bool(false));
    m
}

#[test]
fn characters_merge_within_lines_where_the_vocabulary_is_written_in_them() {
    let t = Tokenizer::from_metadata(&of_chars()).unwrap();
    let [space, a, b, space_a, ab, line, lines, turn] = [257, 258, 259, 260, 261, 262, 263, 264];
    for (text, ids) in [
        ("ab a", &[ab, space_a][..]),
        ("a\n\nb", &[a, lines, b]),
        // No token is three line feeds, and these do not merge.
        ("a\n\n\n b", &[a, line, line, line, space, b]),
        ("bé▁", &[b, 1 + 0xc3, 1 + 0xa9, space]),
        ("a<turn|>", &[a, turn]),
    ] {
        assert_eq!(t.encode(text, false, true), ids, "{text:?}");
        assert_eq!(decode(&t, ids), text.replace('▁', " ").replace("<turn|>", ""), "{text:?}");
    }
    assert_eq!(t.encode_prompt("a"), [0, a], "BOS is forced");
    assert!(t.is_eog(turn) && t.warnings().iter().any(|w| w.contains("add_bos_token")), "{:?}", t.warnings());
}

#[test]
fn phi_3_swallows_white_space_after_special_tokens() {
    let t = Tokenizer::from_metadata(&byte_level("Phi-3 mini", "gpt-2")).unwrap();
    assert_eq!(t.encode("a<x> \n<x>  b", false, false), [97, 261, 261, 98]);
}

#[test]
fn characters_come_whole() {
    let t = Tokenizer::from_metadata(&byte_level("", "gpt-2")).unwrap();
    let mut decoder = Decoder::new(&t);
    let shown: Vec<String> = [0xf0, 0x9f, 260, 0xa6, 0x80, 0xe2].map(|id| decoder.push(id)).into();
    assert_eq!(shown, ["", "", "", "", "🦀", ""]);
    assert_eq!(decoder.finish(), "\u{fffd}");
}

#[test]
fn an_unknown_pre_tokenizer_stops_and_an_absent_one_warns() {
    let e = Tokenizer::from_metadata(&byte_level("", "qwen22")).unwrap_err().to_string();
    assert!(e.contains("qwen22") && e.contains("qwen2,"), "{e}");
    assert_eq!(Tokenizer::from_metadata(&byte_level("", "")).unwrap().warnings().len(), 1);
}

#[test]
fn sentencepiece_spaces_bytes_and_defaults() {
    let t = Tokenizer::from_metadata(&spm()).unwrap();
    assert_eq!((t.bos(), t.eos(), t.adds_bos(), t.eog_ids()), (Some(1), Some(2), true, &[2][..]));
    // "▁a" has a better score than "ab", so it merges first; then "▁ab" is the only way on.
    assert_eq!(t.encode("ab", true, false), [1, 264]);
    assert_eq!(t.encode("b", false, false), [259, 261]);
    assert_eq!(t.encode("é", false, false), [259, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(t.token_bytes(264), b" ab");
    assert_eq!(t.token_bytes(3 + 0xc3), [0xc3]);
    assert_eq!(decode(&t, &[1, 264, 3 + 0xc3, 3 + 0xa9]), " abé");
}

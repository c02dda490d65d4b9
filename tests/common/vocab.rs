//! A byte-level and a SentencePiece vocabulary small enough to see through.

use super::gguf::{Array, Metadata, StringArray, Value};

fn strings<'a>(items: impl IntoIterator<Item = &'a str>) -> Value {
    let mut out = StringArray::default();
    for item in items {
        out.push(item.as_bytes());
    }
    Value::Array(Array::Str(out))
}

/// The printable stand-in of each byte.
fn stand_ins() -> Vec<String> {
    let mut spare = 256;
    (0..=255u32)
        .map(|b| {
            let printable = (33..127).contains(&b) || (161..173).contains(&b) || b >= 174;
            let c = if printable { b } else { spare };
            spare += u32::from(!printable);
            char::from_u32(c).unwrap().to_string()
        })
        .collect()
}

/// 256 bytes, then `he`, `ll`, `hell`, `Ġa`, a control and a user-defined token.
pub fn byte_level(name: &str, pre: &str) -> Metadata {
    let mut tokens = stand_ins();
    tokens.extend(["he", "ll", "hell", "Ġa", "<|im_end|>", "<x>"].map(String::from));
    let mut types = vec![1; tokens.len()];
    (types[260], types[261]) = (3, 4);
    let mut m = Metadata::default();
    m.insert("general.name".into(), Value::Str(name.into()));
    m.insert("tokenizer.ggml.model".into(), Value::Str("gpt2".into()));
    m.insert("tokenizer.ggml.pre".into(), Value::Str(pre.into()));
    m.insert("tokenizer.ggml.tokens".into(), strings(tokens.iter().map(String::as_str)));
    m.insert("tokenizer.ggml.token_type".into(), Value::Array(Array::Int(types)));
    // The last merge repeats the first: its later rank does not count.
    m.insert("tokenizer.ggml.merges".into(), strings(["h e", "l l", "he ll", "Ġ a", "h e"]));
    m
}

/// `<unk>`, `<s>`, `</s>`, 256 bytes, then `▁`, `a`, `b`, `▁a`, `ab`, `▁ab`.
pub fn spm() -> Metadata {
    let bytes: Vec<String> = (0..256).map(|b| format!("<0x{b:02X}>")).collect();
    let mut tokens = vec!["<unk>", "<s>", "</s>"];
    tokens.extend(bytes.iter().map(String::as_str));
    tokens.extend(["▁", "a", "b", "▁a", "ab", "▁ab"]);
    let mut types = vec![2, 3, 3];
    types.extend([6; 256]);
    types.extend([1; 6]);
    let mut scores = vec![0.0; 259];
    scores.extend([-5.0, -5.0, -5.0, -1.0, -2.0, -3.0]);
    let mut m = Metadata::default();
    m.insert("tokenizer.ggml.model".into(), Value::Str("llama".into()));
    m.insert("tokenizer.ggml.tokens".into(), strings(tokens));
    m.insert("tokenizer.ggml.token_type".into(), Value::Array(Array::Int(types)));
    m.insert("tokenizer.ggml.scores".into(), Value::Array(Array::Float(scores)));
    m
}

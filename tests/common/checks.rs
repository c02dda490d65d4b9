//! What must hold for any bytes; the fuzz targets and the seeded mutations call the same checks.

use std::path::Path;
use std::sync::LazyLock;

use super::gguf::Gguf;
use super::tokenizer::{ChatTemplate, Decoder, Tokenizer};
use super::vocab;
use serde_json::{Value as Json, json};

/// Pre-tokenizers that differ in their expressions.
const PRES: &[&str] = &[
    "llama-bpe",
    "qwen2",
    "qwen35",
    "gpt-2",
    "smollm",
    "falcon",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "tekken",
    "gpt-4o",
    "default",
];

/// One tokenizer for each of [`PRES`], then SentencePiece.
static TOKENIZERS: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
    let all = PRES.iter().map(|pre| vocab::byte_level("", pre)).chain([vocab::spm()]);
    all.map(|m| Tokenizer::from_metadata(&m).unwrap()).collect()
});

/// A header is refused, or all that it says is true of its bytes; so is the tokenizer in it.
pub fn gguf(data: &[u8]) {
    let Ok(gguf) = Gguf::parse(Path::new("x.gguf"), data, data.len() as u64) else { return };
    for t in &gguf.tensors {
        assert!(t.bytes > 0 && t.offset + t.bytes <= data.len() as u64, "{t:?}");
        assert_eq!(gguf.tensor(&t.name).unwrap().offset, t.offset);
    }
    let Ok(tokenizer) = Tokenizer::from_metadata(&gguf.metadata) else { return };
    let ids = tokenizer.encode("Hello, <s> wörld\n", true, true);
    assert!(ids.iter().chain(tokenizer.eog_ids()).all(|&id| (id as usize) < tokenizer.vocab_size()));
    tokenizer.decode(&ids, true);
    if let Ok(template) = ChatTemplate::from_metadata(&gguf.metadata, &tokenizer) {
        let _ = template.render(&[json!({"role": "user", "content": "Hi"})], true);
    }
}

/// The first byte holds flags, the second chooses a vocabulary, the rest is text: its ids stand for
/// the text, and show the same one at a time.
pub fn tokenizer(data: &[u8]) {
    let [flags, which, text @ ..] = data else { return };
    let text = String::from_utf8_lossy(text);
    let (add, parse) = (flags & 1 != 0, flags & 2 != 0);
    let which = usize::from(*which) % TOKENIZERS.len();
    let (t, is_spm) = (&TOKENIZERS[which], which == PRES.len());
    let ids = t.encode(&text, add, parse);
    assert!(ids.iter().all(|&id| (id as usize) < t.vocab_size()));
    let mut decoder = Decoder::new(t);
    let mut streamed: String = ids.iter().map(|&id| decoder.push(id)).collect();
    streamed.push_str(&decoder.finish());
    assert_eq!(streamed, t.decode(&ids, false));
    if !add && !is_spm {
        assert_eq!(t.decode(&ids, true), text, "{}", PRES[which]);
    }
    if !add && !parse && is_spm && !text.is_empty() {
        assert_eq!(t.decode(&ids, true), format!(" {text}").replace('\u{2581}', " "));
    }
}

/// A template renders or is refused, in bounded time.
pub fn template(data: &[u8]) {
    static CHAT: LazyLock<Vec<Json>> = LazyLock::new(|| {
        let call = json!({"type": "function", "function": {"name": "f", "arguments": {"x": [1, 0.5, null, true]}}});
        vec![
            json!({"role": "system", "content": " Be brief.\n"}),
            json!({"role": "user", "content": [{"type": "text", "text": "dé<jà>"}]}),
            json!({"role": "assistant", "content": "a,b", "tool_calls": [call]}),
            json!({"role": "tool", "content": "{}"}),
        ]
    });
    let source = String::from_utf8_lossy(data);
    let Ok(template) = ChatTemplate::new(&source, "<s>".into(), "</s>".into()) else { return };
    let _ = template.render(&CHAT, true);
    let _ = template.render_with_tools(&CHAT[..2], Some(&CHAT[2..3]), false);
}

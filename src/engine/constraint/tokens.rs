//! What tokens stand for, as llguidance looks them up.

use std::sync::Arc;
use std::time::Duration;

use llguidance::ParserFactory;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

use crate::memory::bounded::{self, Exceeded, Limits};
use crate::tokenizer::Tokenizer;

/// Longest token that a grammar may use, in bytes: a trie of llguidance is 1024 deep at most.
const TOKEN_MAX: usize = 1000;
/// Most tokens: a node of the trie has 24 bits for one.
const TOKENS_MAX: usize = (1 << 24) - 2;

/// A factory for the tokens of a tokenizer.
pub(super) fn factory(tokenizer: &Tokenizer) -> Result<ParserFactory, String> {
    let n = tokenizer.vocab_size().min(TOKENS_MAX + 1);
    factory_of((0..n as u32).map(|id| word(tokenizer, id)).collect(), tokenizer.eog_ids().to_vec())
}

/// A factory for tokens of these bytes, of which `eog` end a text.
pub(super) fn factory_of(words: Vec<Vec<u8>>, eog: Vec<u32>) -> Result<ParserFactory, String> {
    let n = words.len();
    if n == 0 || n > TOKENS_MAX {
        return Err(format!("the tokenizer has {n} tokens, but 1 to {TOKENS_MAX} were expected"));
    }
    // The trie walks itself recursively, as deep as its longest token.
    let limits = Limits { stack_bytes: 16 << 20, heap_bytes: 2 << 30, cpu: Duration::from_secs(120) };
    let made = bounded::run(&limits, &|| false, move || {
        let first = eog.first().copied().unwrap_or(u32::MAX);
        let trie = TokTrie::from(&TokRxInfo::new(n as u32, first), &words);
        let trie = if eog.is_empty() { trie } else { trie.with_eos_tokens(&eog) };
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        ParserFactory::new(&env, InferenceCapabilities::default(), &SlicedBiasComputer::general_slices())
            .map_err(|e| e.to_string())
    });
    match made {
        Ok(made) => made,
        Err(Exceeded::Panicked(said)) => Err(format!("its tokens cannot be put into a trie ({said})")),
        Err(Exceeded::Thread(e)) => Err(format!("no thread can be had to look at its tokens ({e})")),
        Err(Exceeded::Heap | Exceeded::Cpu | Exceeded::Stopped) => {
            Err("looking at its tokens takes too much memory or time".into())
        }
    }
}

/// The bytes of a token; those of a control token behind a mark; none for what a text cannot have.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    const MARK: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
    let bytes = tokenizer.token_bytes(id);
    let usable = !bytes.is_empty() && bytes.len() <= TOKEN_MAX;
    if !usable || tokenizer.is_eog(id) || !tokenizer.is_shown(id) && !tokenizer.is_control(id) {
        return Vec::new();
    }
    match tokenizer.is_control(id) {
        true => [&[MARK], bytes].concat(),
        // No character begins with this byte.
        false if bytes[0] == MARK => Vec::new(),
        false => bytes.to_vec(),
    }
}

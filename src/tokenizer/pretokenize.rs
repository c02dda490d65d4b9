//! Pre-tokenizers: regular expressions that cut a text into words before BPE.
//!
//! The expressions are those of the models' own tokenizers as llama.cpp adapts them; several are
//! applied one after the other, each to the pieces that the one before left. What no expression
//! matches is a piece of its own. Names that llama.cpp treats alike share an entry.

use fancy_regex::Regex;

use super::TokenizerError;

/// Flags and expressions of a family.
pub(super) struct Family {
    names: &'static [&'static str],
    regexes: &'static [&'static str],
    /// A word that is a token is taken whole, whatever the merges say.
    pub ignore_merges: bool,
    /// BOS is added unless the metadata say otherwise.
    pub add_bos: bool,
    /// There is no BOS unless the metadata name one.
    pub no_bos: bool,
}

const PLAIN: Family = Family { names: &[], regexes: &[], ignore_merges: false, add_bos: false, no_bos: false };

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
macro_rules! contractions { () => { "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])" }; }
const LLAMA3: &str = concat!(contractions!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+");
const QWEN2: &str = concat!(contractions!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+");
const QWEN35: &str = concat!(contractions!(), r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+");
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
/// Letters that are not lower-case (not upper-case) ASCII: how llama.cpp tells cases apart here.
macro_rules! upper { () => { r"[\p{L}&&[^a-z]]" }; }
macro_rules! lower { () => { r"[\p{L}&&[^A-Z]]" }; }
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?", upper!(), "*", lower!(), r"+|[^\r\n\p{L}\p{N}]?", upper!(), "+", lower!(),
    r"*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?", upper!(), "*", lower!(), "+", contractions!(), r"?|[^\r\n\p{L}\p{N}]?", upper!(), "+", lower!(), "*", contractions!(),
    r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Cased letters of the scripts that DeepSeek LLM's tokenizer lists.
const DEEPSEEK_LETTERS: &str = "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
const CJK: &str = "[一-龥\u{800}-一가-\u{d7ff}]+";

/// What llama.cpp falls back to where a file names no pre-tokenizer.
const DEFAULT: Family = Family {
    names: &["default"],
    regexes: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    ..PLAIN
};

const FAMILIES: &[Family] = &[
    Family {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"],
        regexes: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    Family { names: &["dbrx", "smaug-bpe"], regexes: &[LLAMA3], ..PLAIN },
    Family {
        names: &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"],
        regexes: &[QWEN2],
        ..PLAIN
    },
    Family { names: &["qwen35"], regexes: &[QWEN35], ..PLAIN },
    Family {
        names: &["gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "modern-bert", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling"],
        regexes: &[GPT2],
        ..PLAIN
    },
    Family {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        regexes: &[r"\p{N}", GPT2],
        ..PLAIN
    },
    Family { names: &["falcon"], regexes: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"], ..PLAIN },
    Family {
        names: &["deepseek-llm"],
        regexes: &["[\r\n]", DEEPSEEK_LETTERS, "\\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", CJK, r"\p{N}+"],
        ..PLAIN
    },
    Family { names: &["deepseek-coder"], regexes: &["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"], ..PLAIN },
    Family { names: &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], regexes: &[r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3], ..PLAIN },
    Family { names: &["tekken"], regexes: &[TEKKEN], ignore_merges: true, add_bos: true, ..PLAIN },
    Family { names: &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], regexes: &[GPT4O], ..PLAIN },
    Family { names: &["chatglm-bpe"], regexes: &[LLAMA3], no_bos: true, ..PLAIN },
    Family { names: &["glm4", "glm5"], regexes: &[LLAMA3], no_bos: true, ignore_merges: true, ..PLAIN },
    DEFAULT,
];

/// The family called `name`; without a name, the default one.
pub(super) fn family(name: Option<&str>) -> Result<&'static Family, TokenizerError> {
    let name = name.unwrap_or("default");
    FAMILIES.iter().find(|f| f.names.contains(&name)).ok_or_else(|| TokenizerError::UnknownPre {
        found: name.to_owned(),
        known: FAMILIES.iter().flat_map(|f| f.names).copied().collect::<Vec<_>>().join(", "),
    })
}

/// Compiled expressions.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    regexes: Vec<Regex>,
}

impl PreTokenizer {
    pub fn new(family: &Family) -> Result<PreTokenizer, TokenizerError> {
        let compile = |r: &&str| Regex::new(r).map_err(|e| TokenizerError::Metadata { key: "tokenizer.ggml.pre".into(), what: e.to_string() });
        Ok(PreTokenizer { regexes: family.regexes.iter().map(compile).collect::<Result<_, _>>()? })
    }

    /// The words of a text, in order; together they are the text.
    pub fn split<'a>(&self, text: &'a str) -> Vec<&'a str> {
        let mut pieces = vec![text];
        for regex in &self.regexes {
            let mut next = Vec::with_capacity(pieces.len() * 2);
            for piece in pieces {
                let mut at = 0;
                // An expression that gives up (too much backtracking) leaves the rest as it is.
                for m in regex.find_iter(piece).map_while(Result::ok).filter(|m| m.end() > m.start()) {
                    if m.start() > at {
                        next.push(&piece[at..m.start()]);
                    }
                    next.push(m.as_str());
                    at = m.end();
                }
                if at < piece.len() {
                    next.push(&piece[at..]);
                }
            }
            pieces = next;
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_compiles_and_loses_nothing() {
        let text = "Hello  World's 12345 déjà-vu\r\n\n  日本語 \t 🦀 €3.50 don't  ";
        for f in FAMILIES {
            let words = PreTokenizer::new(f).unwrap().split(text);
            assert_eq!(words.concat(), text, "{:?}", f.names);
            assert!(words.len() > 8, "{:?} {words:?}", f.names);
        }
    }

    #[test]
    fn an_unknown_name_is_an_error_that_names_it() {
        let e = family(Some("xyz")).err().unwrap().to_string();
        assert!(e.contains("xyz") && e.contains("llama-bpe"), "{e}");
    }
}

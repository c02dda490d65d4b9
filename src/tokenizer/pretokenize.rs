//! Pre-tokenizers: regular expressions that cut a text into words before BPE.
//!
//! The expressions are those of the models' own tokenizers as llama.cpp adapts them; several are
//! applied one after the other, each to the pieces that the one before left. What no expression
//! matches is a piece of its own. Names that llama.cpp treats alike share an entry.

use fancy_regex::{Regex, RegexBuilder};

use super::TokenizerError;
use super::stop::Stop;

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
    /// ASCII digits are cut in threes from the right, after the expressions.
    thirds: bool,
}

const PLAIN: Family =
    Family { names: &[], regexes: &[], ignore_merges: false, add_bos: false, no_bos: false, thirds: false };

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
macro_rules! contractions {
    () => {
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    };
}
const LLAMA3: &str = concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str =
    concat!(contractions!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+");
const QWEN35: &str = concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const HAN_KANA: &str = "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";
/// Letters that are not lower-case (not upper-case) ASCII: how llama.cpp tells cases apart here.
macro_rules! upper {
    () => {
        r"[\p{L}&&[^a-z]]"
    };
}
macro_rules! lower {
    () => {
        r"[\p{L}&&[^A-Z]]"
    };
}
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?",
    upper!(),
    "*",
    lower!(),
    r"+|[^\r\n\p{L}\p{N}]?",
    upper!(),
    "+",
    lower!(),
    r"*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?",
    upper!(),
    "*",
    lower!(),
    "+",
    contractions!(),
    r"?|[^\r\n\p{L}\p{N}]?",
    upper!(),
    "+",
    lower!(),
    "*",
    contractions!(),
    r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Cased letters of the scripts that DeepSeek LLM's tokenizer lists.
const DEEPSEEK_LETTERS: &str = "\\s?[A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\u{1c4}-\u{293}\u{295}-\u{2af}\u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}\u{3a3}-\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-\u{13f5}\u{13f8}-\u{13fd}\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-\u{1f57}\u{1f59}\u{1f5b}\u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}\u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\u{1ff2}-\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\u{2124}\u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}\u{2145}-\u{2149}\u{214e}\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\u{2cf2}\u{2cf3}\u{a640}-\u{a66d}\u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}\u{a78b}-\u{a78e}\u{ab70}-\u{abbf}\u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}\u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}\u{1e900}-\u{1e943}]+";
/// The ranges hold white space (U+1680, U+2003, U+3000 and others), which llama.cpp leaves out.
const CJK: &str = r"[[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]&&\S]+";

const MINICPM5: &str =
    concat!(contractions!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+");
const SEED_CODER: &str =
    concat!(contractions!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+");
/// QWEN2 without contractions.
const UFAKZEKA: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// LLAMA3 with runs of white space cut to powers of two.
const JAIS2: &str = concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
    r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s"
);
const BAILING: &str = r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const EXAONE_MOE: &str = concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
);
const SPARK: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"##;
/// llama.cpp does not tell cases apart here.
const YOUTU: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    contractions!(),
    r"?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const YOUTU_SCRIPTS: &str = "[\u{ac00}-\u{d7a3}\u{3131}-\u{318e}]+|[\u{ff01}\u{2026}\u{201c}\u{201d}\u{2018}\u{2019}\u{2014}\u{ff1a}\u{ff1b}\u{ff0c}\u{3001}-\u{303f}\u{fe30}-\u{fe4f}]+|[\u{3105}-\u{312f}]+|[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";
/// Letters and marks that are not lower-case (not upper-case) ASCII.
macro_rules! upper_mark {
    () => {
        r"[[\p{L}\p{M}]&&[^a-z]]"
    };
}
macro_rules! lower_mark {
    () => {
        r"[[\p{L}\p{M}]&&[^A-Z]]"
    };
}
const GRANITE: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?",
    upper_mark!(),
    "*",
    lower_mark!(),
    "+",
    contractions!(),
    r"?|[^\r\n\p{L}\p{N}]?",
    upper_mark!(),
    "+",
    lower_mark!(),
    "*",
    contractions!(),
    r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Everything up to punctuation; the parenthesis and the bar in the class are llama.cpp's.
const BLOOM: &str = " ?[^(\\s|.,!?\u{2026}\u{3002}\u{ff0c}\u{3001}\u{964}\u{6d4}\u{60c})]+";

/// Gemma 4's: text is cut at line feeds alone.
pub(super) const LINES: Family = Family { names: &["gemma4"], regexes: &[r"[^\n]+|\n+"], add_bos: true, ..PLAIN };

/// What llama.cpp falls back to where a file names no pre-tokenizer.
const DEFAULT: Family =
    Family { names: &["default"], regexes: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], ..PLAIN };

const FAMILIES: &[Family] = &[
    Family {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        regexes: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    Family { names: &["dbrx", "smaug-bpe"], regexes: &[LLAMA3], ..PLAIN },
    Family {
        names: &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        regexes: &[QWEN2],
        ..PLAIN
    },
    Family { names: &["qwen35"], regexes: &[QWEN35], ..PLAIN },
    Family {
        names: &[
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "gigachat",
            "jina-v2-es",
            "jina-v2-de",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "jina-v1-en",
            "jina-v2-code",
            "roberta-bpe",
            "exaone4",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
        ],
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
        regexes: &[
            "[\r\n]",
            DEEPSEEK_LETTERS,
            // U+3000 is white space, and so not among U+3000 to U+3002 here.
            r"\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3001}-\u{3002}]+",
            r"\s+$",
            CJK,
            r"\p{N}+",
        ],
        ..PLAIN
    },
    Family { names: &["deepseek-coder"], regexes: &["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"], ..PLAIN },
    Family {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        regexes: &[r"\p{N}{1,3}", HAN_KANA, DEEPSEEK3],
        ..PLAIN
    },
    Family { names: &["tekken"], regexes: &[TEKKEN], ignore_merges: true, add_bos: true, ..PLAIN },
    Family { names: &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], regexes: &[GPT4O], ..PLAIN },
    Family { names: &["chatglm-bpe"], regexes: &[LLAMA3], no_bos: true, ..PLAIN },
    Family { names: &["glm4", "glm5"], regexes: &[LLAMA3], no_bos: true, ignore_merges: true, ..PLAIN },
    Family { names: &["minicpm5"], regexes: &[r"\p{N}{1,3}", MINICPM5], ignore_merges: true, ..PLAIN },
    Family { names: &["jais-2"], regexes: &[JAIS2], ..PLAIN },
    Family { names: &["seed-coder"], regexes: &[SEED_CODER], ..PLAIN },
    Family { names: &["ufakzeka"], regexes: &[UFAKZEKA], ..PLAIN },
    Family { names: &["laguna"], regexes: &[r"[^\n]+|\n+", QWEN2], ..PLAIN },
    Family { names: &["bailingmoe", "bailingmoe2", "llada-moe"], regexes: &[BAILING], ..PLAIN },
    Family { names: &["exaone-moe"], regexes: &[EXAONE_MOE], ..PLAIN },
    Family { names: &["spark2_5"], regexes: &[r"\p{N}{1,3}", HAN_KANA, SPARK, r"\p{N}"], ..PLAIN },
    Family { names: &["youtu"], regexes: &[YOUTU_SCRIPTS, YOUTU], ignore_merges: true, ..PLAIN },
    Family { names: &["granite-embed-multi-97m"], regexes: &[GRANITE], ignore_merges: true, ..PLAIN },
    Family { names: &["poro-chat", "bloom", "gpt3-finnish"], regexes: &[BLOOM], ..PLAIN },
    Family { names: &["viking"], regexes: &[BLOOM, r"\p{N}"], ..PLAIN },
    // llama.cpp cuts in threes by the expression (?=(\d{3})+(?!\d)), whose time grows with the square of a run.
    Family { names: &["superbpe"], regexes: &[r"\p{N}+"], thirds: true, ..PLAIN },
    Family {
        names: &["chameleon"],
        regexes: &["<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z", "[\t\n]|    |  ", r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", GPT2],
        add_bos: true,
        ..PLAIN
    },
    DEFAULT,
];

/// Names of unknown pre-tokenizers are answered with this many known ones.
const NEAREST: usize = 3;

/// The family called `name`; without a name, the default one.
pub(super) fn family(name: Option<&str>) -> Result<&'static Family, TokenizerError> {
    let name = name.unwrap_or("default");
    FAMILIES.iter().find(|f| f.names.contains(&name)).ok_or_else(|| {
        let mut known: Vec<&str> = FAMILIES.iter().flat_map(|f| f.names).copied().collect();
        known.sort_by_cached_key(|k| distance(k, name));
        TokenizerError::UnknownPre { found: shorten(name), nearest: known[..NEAREST].join(", ") }
    })
}

/// A name that fits a line.
fn shorten(name: &str) -> String {
    match name.char_indices().nth(40) {
        Some((at, _)) => format!("{}…", &name[..at]),
        None => name.to_owned(),
    }
}

/// Characters to put in, take out or change to turn one name into the other.
fn distance(a: &str, b: &str) -> usize {
    // Names are short; who writes a long one gets no better answer for the rest of it.
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Compiled expressions.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    regexes: Vec<Regex>,
    thirds: bool,
}

impl PreTokenizer {
    pub fn new(family: &Family) -> Result<PreTokenizer, TokenizerError> {
        // Every expression ends in linear time on every text, so none may give up: the rest of a text would be
        // one piece, and other tokens in silence.
        let compile = |r: &&str| {
            RegexBuilder::new(r)
                .backtrack_limit(usize::MAX)
                .build()
                .map_err(|e| TokenizerError::Metadata { key: "tokenizer.ggml.pre".into(), what: e.to_string() })
        };
        let regexes = family.regexes.iter().map(compile).collect::<Result<_, _>>()?;
        Ok(PreTokenizer { regexes, thirds: family.thirds })
    }

    /// The words of a text, in order; together they are the text. `None` if `stop` says so.
    pub fn split<'a>(&self, text: &'a str, stop: &Stop) -> Option<Vec<&'a str>> {
        let mut pieces = shorter_runs(text);
        for regex in &self.regexes {
            let mut next = Vec::with_capacity(pieces.len() * 2);
            for piece in pieces {
                let mut at = 0;
                for m in regex.find_iter(piece).map_while(Result::ok).filter(|m| m.end() > m.start()) {
                    stop.check()?;
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
        Some(if self.thirds { pieces.into_iter().flat_map(in_thirds).collect() } else { pieces })
    }
}

/// Characters of white space that an expression can go over at once: it keeps a state for each.
const RUN_MAX: usize = 500_000;

/// The text, cut where white space goes on for longer than an expression can follow.
fn shorter_runs(text: &str) -> Vec<&str> {
    let (mut pieces, mut from, mut run) = (Vec::new(), 0, 0);
    for (at, c) in text.char_indices() {
        run = if c.is_whitespace() { run + 1 } else { 0 };
        if run > RUN_MAX {
            pieces.push(&text[from..at]);
            (from, run) = (at, 1);
        }
    }
    pieces.push(&text[from..]);
    pieces
}

/// A piece, cut wherever the ASCII digits that follow without a gap are a multiple of three.
fn in_thirds(piece: &str) -> Vec<&str> {
    let bytes = piece.as_bytes();
    let mut cuts = vec![piece.len()];
    let mut digits = 0;
    for at in (0..bytes.len()).rev() {
        digits = if bytes[at].is_ascii_digit() { digits + 1 } else { 0 };
        if digits > 0 && digits % 3 == 0 && at > 0 {
            cuts.push(at);
        }
    }
    let mut from = 0;
    cuts.into_iter().rev().map(|to| &piece[std::mem::replace(&mut from, to)..to]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split<'a>(pre: &PreTokenizer, text: &'a str) -> Vec<&'a str> {
        pre.split(text, &Stop::new(&|| false)).unwrap()
    }

    #[test]
    fn every_family_compiles_and_loses_nothing() {
        let text = "Hello  World's 12345 déjà-vu\r\n\n  日本語 \t 🦀 €3.50 don't  ";
        for f in FAMILIES {
            let words = split(&PreTokenizer::new(f).unwrap(), text);
            assert_eq!(words.concat(), text, "{:?}", f.names);
            assert!(words.len() > 2, "{:?} {words:?}", f.names);
        }
    }

    #[test]
    fn an_unknown_name_is_an_error_that_names_it_and_fits_a_line() {
        let e = family(Some("llama-bp")).err().unwrap().to_string();
        assert!(e.contains("llama-bp") && e.contains("llama-bpe") && e.len() < 200, "{e}");
        let e = family(Some(&"x".repeat(1 << 16))).err().unwrap().to_string();
        assert!(e.len() < 300, "{e}");
    }

    #[derive(serde::Deserialize)]
    struct Splits {
        texts: Vec<String>,
        bytes: std::collections::BTreeMap<String, Vec<Vec<usize>>>,
    }

    /// Where llama.cpp cuts: `tests/fixtures/make_splits.py`.
    #[test]
    fn every_family_cuts_where_llama_cpp_does() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/splits.json");
        let golden: Splits = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let mut wrong = Vec::new();
        for (name, all) in &golden.bytes {
            let pre = PreTokenizer::new(family(Some(name)).unwrap()).unwrap();
            for (text, expected) in golden.texts.iter().zip(all) {
                let found: Vec<usize> = split(&pre, text).iter().map(|w| w.len()).collect();
                if found != *expected {
                    wrong.push(format!("{name}: {text:?}\n  {found:?}\n  {expected:?}"));
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        let covered = |f: &&Family| f.names.iter().any(|n| golden.bytes.contains_key(*n));
        let rest: Vec<_> = FAMILIES.iter().filter(|f| !covered(f)).map(|f| f.names).collect();
        assert!(rest.iter().all(|names| names.iter().all(|n| ["chatglm-bpe"].contains(n))), "{rest:?}");
    }

    #[test]
    fn a_long_run_of_white_space_is_no_reason_to_give_up() {
        let text = format!("a b{}c 1", " ".repeat(1_200_000));
        for f in FAMILIES.iter().filter(|f| !f.thirds) {
            let words = split(&PreTokenizer::new(f).unwrap(), &text);
            assert_eq!(words.concat().len(), text.len());
            assert_eq!(words.last().unwrap().trim_start(), "1", "{:?}", f.names);
        }
    }
}

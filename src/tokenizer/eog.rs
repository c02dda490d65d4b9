//! Which tokens end generation, and which are markup whatever a file calls them.
//!
//! Files are often wrong about both, so llama.cpp goes by ids and by texts; so does this.

use std::collections::HashMap;

use super::vocab::{Kind, special_id};
use crate::gguf::{Metadata, StringArray};

/// Texts that end generation wherever they are tokens. Source: llama.cpp's `llama-vocab.cpp`.
const ENDS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// Channel markup of gpt-oss: shown, and found in any text.
const CHANNELS: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

/// A special token that is known by its id in the metadata or else by one of its texts.
struct Role {
    keys: &'static [&'static str],
    texts: &'static [&'static str],
    ends: bool,
}

/// Parts of fill-in-the-middle prompts, the current key first, then the deprecated one.
const FILL_IN: &[Role] = &[
    Role {
        keys: &["fim_pre_token_id", "prefix_token_id"],
        texts: &[
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<｜fim▁begin｜>",
            "<PRE>",
            "▁<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ],
        ends: false,
    },
    Role {
        keys: &["fim_suf_token_id", "suffix_token_id"],
        texts: &[
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<｜fim▁hole｜>",
            "<SUF>",
            "▁<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ],
        ends: false,
    },
    Role {
        keys: &["fim_mid_token_id", "middle_token_id"],
        texts: &[
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<｜fim▁end｜>",
            "<MID>",
            "▁<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ],
        ends: false,
    },
    Role {
        keys: &["fim_pad_token_id"],
        texts: &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
        ends: true,
    },
    Role {
        keys: &["fim_rep_token_id"],
        texts: &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
        ends: true,
    },
    Role { keys: &["fim_sep_token_id"], texts: &["<|file_sep|>"], ends: true },
];

/// Token ids of the texts above, as far as the vocabulary has them; the last of equals.
fn known_texts(tokens: &StringArray) -> HashMap<&[u8], u32> {
    let extra = ["<|plamo:eos|>"];
    let wanted = ENDS.iter().chain(CHANNELS).chain(FILL_IN.iter().flat_map(|r| r.texts)).chain(&extra);
    let wanted: std::collections::HashSet<&[u8]> = wanted.map(|t| t.as_bytes()).collect();
    // Every text above begins with one of these bytes; most tokens are turned away here.
    let may_be = |t: &[u8]| matches!(t.first(), Some(b'<' | b'[' | b'_' | 0xe2));
    (0u32..).zip(tokens.iter()).filter(|(_, t)| may_be(t) && wanted.contains(t)).map(|(id, t)| (t, id)).collect()
}

/// The ids that end generation, ascending; corrects `kinds` on the way.
pub(super) fn collect(
    m: &Metadata,
    tokens: &StringArray,
    eos: Option<u32>,
    kinds: &mut [Kind],
    warnings: &mut Vec<String>,
) -> Vec<u32> {
    let known = known_texts(tokens);
    let find = |text: &str| known.get(text.as_bytes()).copied();
    let mut ids: Vec<u32> = eos.into_iter().collect();
    for role in FILL_IN {
        let mut id = None;
        for key in role.keys {
            id = id.or(special_id(m, key, tokens.len(), None, warnings));
        }
        if id.is_none() {
            id = role.texts.iter().find_map(|t| find(t));
            id.into_iter().for_each(|id| kinds[id as usize] = Kind::Control);
        }
        ids.extend(id.filter(|_| role.ends));
    }
    for key in ["eot_token_id", "eom_token_id"] {
        ids.extend(special_id(m, key, tokens.len(), None, warnings));
    }
    for id in ENDS.iter().filter_map(|t| find(t)) {
        ids.push(id);
        kinds[id as usize] = Kind::Control;
    }
    for id in CHANNELS.iter().filter_map(|t| find(t)) {
        kinds[id as usize] = Kind::UserDefined;
    }
    let mut demote = |text: &str, kind: Kind, ids: &mut Vec<u32>| {
        if let Some(id) = find(text) {
            ids.retain(|&i| i != id);
            kinds[id as usize] = kind;
        }
    };
    let has = |text: &str| find(text).is_some();
    // Models that speak in channels end a message with <|end|>, not the turn.
    if (has("<|call|>") || has("<|calls|>")) && (has("<|return|>") || has("<|flush|>")) {
        demote("<|end|>", Kind::UserDefined, &mut ids);
    }
    // Gemma 4 and PLaMo have an ordinary token of this text.
    if has("<|tool_response>") || find("<|plamo:eos|>").is_some_and(|id| ids.contains(&id)) {
        demote("</s>", Kind::Normal, &mut ids);
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

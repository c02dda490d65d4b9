//! Tokens back to back, with an index from bytes to id.

use std::hash::{BuildHasher, RandomState};

use crate::gguf::{Metadata, Value};

/// What a token is (`tokenizer.ggml.token_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// All tokens. The bytes are what a token stands for.
#[derive(Debug, Default)]
pub(super) struct Vocab {
    bytes: Vec<u8>,
    ends: Vec<u32>,
    kinds: Vec<Kind>,
    pub scores: Vec<f32>,
    index: Index,
    /// Token of each single byte, if there is one.
    pub byte_tokens: Vec<Option<u32>>,
}

impl Vocab {
    pub fn push(&mut self, bytes: &[u8], kind: Kind) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len() as u32);
        self.kinds.push(kind);
    }

    /// Builds the index of the tokens that are `wanted`; of equal ones the last is found, as in llama.cpp.
    pub fn build_index(&mut self, wanted: impl Fn(u32) -> bool) {
        let mut index = Index::with_capacity(self.len());
        for id in (0..self.len() as u32).filter(|&id| wanted(id)) {
            index.insert(self.bytes(id), id, |other| self.bytes(other));
        }
        self.index = index;
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn bytes(&self, id: u32) -> &[u8] {
        let i = id as usize;
        let Some(&end) = self.ends.get(i) else { return &[] };
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.bytes[start as usize..end as usize]
    }

    pub fn kind(&self, id: u32) -> Option<Kind> {
        self.kinds.get(id as usize).copied()
    }

    pub fn find(&self, bytes: &[u8]) -> Option<u32> {
        self.index.find(bytes, |id| self.bytes(id))
    }

    pub fn shrink(&mut self) {
        self.bytes.shrink_to_fit();
        self.ends.shrink_to_fit();
        self.kinds.shrink_to_fit();
    }
}

/// An open-addressing table of ids; the keys stay where they are.
#[derive(Debug, Default)]
pub(super) struct Index {
    slots: Vec<u32>,
    /// Keyed at random, so that no file can hold tokens that all fall into one place.
    hashes: RandomState,
}

const EMPTY: u32 = u32::MAX;

impl Index {
    pub fn with_capacity(n: usize) -> Index {
        Index { slots: vec![EMPTY; (2 * n + 1).next_power_of_two()], hashes: RandomState::new() }
    }

    fn hash(&self, bytes: &[u8]) -> usize {
        self.hashes.hash_one(bytes) as usize
    }

    pub fn insert<'a>(&mut self, key: &[u8], id: u32, bytes: impl Fn(u32) -> &'a [u8]) {
        let mask = self.slots.len() - 1;
        let mut at = self.hash(key) & mask;
        while self.slots[at] != EMPTY && bytes(self.slots[at]) != key {
            at = (at + 1) & mask;
        }
        self.slots[at] = id;
    }

    pub fn find<'a>(&self, key: &[u8], bytes: impl Fn(u32) -> &'a [u8]) -> Option<u32> {
        if self.slots.is_empty() {
            return None;
        }
        let mask = self.slots.len() - 1;
        let mut at = self.hash(key) & mask;
        loop {
            match self.slots[at] {
                EMPTY => return None,
                id if bytes(id) == key => return Some(id),
                _ => at = (at + 1) & mask,
            }
        }
    }
}

/// A special token's id from metadata; `default` if it is absent, and, with a warning, if the vocabulary has no
/// such token (as where merging models has lost added tokens), which is what llama.cpp does.
pub(super) fn special_id(
    m: &Metadata,
    key: &str,
    n: usize,
    default: Option<u32>,
    warnings: &mut Vec<String>,
) -> Option<u32> {
    let key = format!("tokenizer.ggml.{key}");
    match m.get(&key) {
        // -1 (also as an unsigned number) says that there is none.
        None | Some(Value::Int(-1 | 0xffff_ffff)) => default,
        Some(v) => match m.u32(&key) {
            Some(id) if (id as usize) < n => Some(id),
            _ => {
                let instead = match default {
                    Some(id) => format!("token {id} is used instead"),
                    None => "it is ignored".to_owned(),
                };
                warnings.push(format!("metadata {key} is {v}, but there are {n} tokens; {instead}"));
                default
            }
        },
    }
}

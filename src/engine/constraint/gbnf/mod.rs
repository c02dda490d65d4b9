//! llama.cpp's grammars (GBNF), followed character by character.
//!
//! A text so far is a set of stacks: each holds what is still to come, if the text is read in one of the ways it can
//! be. Sets and what a byte makes of them are kept, so that a walk over all tokens meets each pair once. llguidance
//! divides texts into lexemes that are as long as they can be, which GBNF does not; so it is not used here.
//!
//! `parse` reads the grammar, `program` makes elements of it.

mod parse;
mod program;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use llguidance::toktrie::{Recognizer, SimpleVob, TokTrie};

pub use parse::is_gbnf;
use parse::{Atom, Body, Item, Rule, any};
use program::{Element, Program};

use super::before::{Before, Piece};

/// Most states that are kept; beyond it they are made anew, so many at most for one token.
const STATES_KEPT: usize = 4096;
const STATES_MAX: usize = 16_384;
/// Most stacks of a state, and steps to find them.
const STACKS_MAX: usize = 2000;
const STEPS_MAX: usize = 100_000;
/// Most nodes of all stacks.
const NODES_MAX: usize = 1 << 20;

/// No state: nothing continues.
const DEAD: u32 = u32::MAX;
/// Not computed yet.
const UNKNOWN: u32 = u32::MAX - 1;
/// The bottom of a stack. In a set: the text may end.
const BOTTOM: u32 = u32::MAX;

/// A grammar that is read.
#[derive(Debug)]
pub struct Gbnf(Program);

impl Gbnf {
    /// Reads a grammar whose text may stand behind something else.
    ///
    /// # Errors
    /// What is not understood or not followed.
    pub fn new(text: &str, trie: &TokTrie, before: Option<&Before>) -> Result<Gbnf, String> {
        let mut rules = parse::rules(text)?;
        if let Some(before) = before {
            put_behind(&mut rules, before);
        }
        let token = |name: &str| {
            let number = name.strip_prefix("<[").and_then(|n| n.strip_suffix("]>")).and_then(|n| n.parse::<u32>().ok());
            let id = number.or_else(|| trie.get_special_token(name))?;
            ((id as usize) < trie.vocab_size() && trie.is_special_token(id)).then(|| trie.token(id).to_vec())
        };
        Program::new(&rules, &token).map(Gbnf)
    }
}

/// Puts the root behind a thought, which ends at its first mark.
fn put_behind(rules: &mut Vec<Rule>, before: &Before) {
    // No names that a grammar can have.
    const ROOT: &str = "nt root";
    const THOUGHT: &str = "nt thought";
    let name = |n: &str| Item::once(Atom::Name(n.to_owned()));
    let item = |piece: &Piece| match piece {
        Piece::Text(text) => Item::once(Atom::Text(text.clone())),
        Piece::Token(id) => Item::once(Atom::Token(format!("<[{id}]>"))),
    };
    for rule in rules.iter_mut().filter(|r| r.name == "root") {
        rule.name = ROOT.to_owned();
    }
    rename(rules, "root", ROOT);
    match &before.close {
        Piece::Token(_) => rules.push(Rule {
            name: format!("{THOUGHT}0"),
            body: Body(vec![vec![Item { atom: any(), times: (0, None) }, item(&before.close)]]),
        }),
        // A rule for each length of the mark's beginning that was read (Knuth, Morris and Pratt).
        Piece::Text(mark) => {
            let mark: Vec<char> = mark.chars().collect();
            for at in 0..mark.len() {
                rules.push(Rule { name: format!("{THOUGHT}{at}"), body: behind(&mark, at, THOUGHT) });
            }
        }
    }
    let space = Item { atom: Atom::Class(vec![(' ', ' '), ('\n', '\n')], false), times: (0, Some(4)) };
    let thought = [name(&format!("{THOUGHT}0"))].into_iter().chain(before.space.then_some(space));
    let thought = before.open.iter().map(item).chain(thought).chain(before.then.iter().map(item));
    let mut all = vec![thought.chain([name(ROOT)]).collect::<Vec<_>>()];
    if let Some(direct) = &before.direct {
        all.push(direct.iter().map(item).chain([name(ROOT)]).collect());
    }
    rules.push(Rule { name: "root".to_owned(), body: Body(all) });
}

/// What may follow within a thought of which the last characters are the first `at` of the mark.
fn behind(mark: &[char], at: usize, prefix: &str) -> Body {
    let to = |n: usize| Item::once(Atom::Name(format!("{prefix}{n}")));
    let one = |c: char| Item::once(Atom::Class(vec![(c, c)], false));
    // The longest beginning of the mark that the text ends with, if this character follows.
    let falls_to = |c: char| {
        let read: Vec<char> = mark[..at].iter().copied().chain([c]).collect();
        (0..=at).rev().find(|&n| read.ends_with(&mark[..n])).unwrap_or(0)
    };
    let mut all = Vec::new();
    let mut named: Vec<char> = Vec::new();
    for &c in mark {
        if named.contains(&c) {
            continue;
        }
        let next = if c == mark[at] { at + 1 } else { falls_to(c) };
        if next > 0 {
            named.push(c);
            all.push(if next == mark.len() { vec![one(c)] } else { vec![one(c), to(next)] });
        }
    }
    let others = Item::once(Atom::Class(named.iter().map(|&c| (c, c)).collect(), true));
    all.push(vec![others, to(0)]);
    Body(all)
}

fn rename(rules: &mut [Rule], from: &str, to: &str) {
    fn body(b: &mut Body, from: &str, to: &str) {
        for item in b.0.iter_mut().flatten() {
            match &mut item.atom {
                Atom::Name(name) if name == from => *name = to.to_owned(),
                Atom::Group(inner) => body(inner, from, to),
                _ => {}
            }
        }
    }
    rules.iter_mut().for_each(|r| body(&mut r.body, from, to));
}

/// A character of which some bytes were read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Partial {
    /// What they give so far.
    value: u32,
    /// Bytes that are to come.
    left: u8,
    /// Bytes of the whole character.
    len: u8,
}

impl Partial {
    /// The characters that it may become: the first and the last.
    fn range(self) -> (u32, u32) {
        let bits = 6 * u32::from(self.left);
        let least = [0, 0, 0x80, 0x800, 0x1_0000][usize::from(self.len)];
        ((self.value << bits).max(least), (((self.value + 1) << bits) - 1).min(0x10_ffff))
    }

    /// What a first byte begins.
    fn begin(byte: u8) -> Option<Partial> {
        let of = |value: u8, len: u8| Some(Partial { value: u32::from(value), left: len - 1, len });
        match byte {
            0x00..=0x7f => of(byte, 1),
            0xc2..=0xdf => of(byte & 0x1f, 2),
            0xe0..=0xef => of(byte & 0x0f, 3),
            0xf0..=0xf4 => of(byte & 0x07, 4),
            _ => None,
        }
    }

    fn next(self, byte: u8) -> Option<Partial> {
        (byte & 0xc0 == 0x80).then_some(Partial {
            value: self.value << 6 | u32::from(byte & 0x3f),
            left: self.left - 1,
            len: self.len,
        })
    }
}

/// Where a text stands: its stacks, and the character that has begun.
type State = (u32, Partial);

/// A text that is held to a grammar.
#[derive(Clone)]
pub struct Matcher {
    gbnf: Arc<Gbnf>,
    /// Stacks' tops: an element, and what lies below.
    nodes: Vec<(u32, u32)>,
    node_ids: HashMap<(u32, u32), u32>,
    /// Sets of tops, sorted.
    sets: Vec<Box<[u32]>>,
    set_ids: HashMap<Box<[u32]>, u32>,
    states: Vec<State>,
    state_ids: HashMap<State, u32>,
    /// What each byte makes of each state.
    steps: Vec<[u32; 256]>,
    /// The text so far, and beyond it the bytes of a token that is looked at.
    path: Vec<u32>,
    /// A limit that was exceeded.
    over: Option<&'static str>,
}

impl Matcher {
    /// A text that begins.
    ///
    /// # Errors
    /// If what may come first exceeds a limit.
    pub fn new(gbnf: Arc<Gbnf>) -> Result<Matcher, String> {
        let mut matcher = Matcher {
            gbnf,
            nodes: Vec::new(),
            node_ids: HashMap::new(),
            sets: Vec::new(),
            set_ids: HashMap::new(),
            states: Vec::new(),
            state_ids: HashMap::new(),
            steps: Vec::new(),
            path: Vec::new(),
            over: None,
        };
        let starts: Vec<(u32, u32)> = matcher.gbnf.0.rules[0].iter().map(|&at| (at, BOTTOM)).collect();
        let set = matcher.closed(starts);
        let state = matcher.state((set, Partial::default()));
        matcher.path.push(state);
        matcher.checked().map(|()| matcher)
    }

    /// The tokens that may come next, those that end a text apart.
    ///
    /// # Errors
    /// If finding out exceeds a limit.
    pub fn allowed(&mut self, trie: &TokTrie) -> Result<SimpleVob, String> {
        if self.states.len() > STATES_KEPT {
            self.forget();
        }
        let mut mask = trie.alloc_token_set();
        trie.add_bias(self, &mut mask, &[]);
        self.checked().map(|()| mask)
    }

    /// Goes on with bytes.
    ///
    /// # Errors
    /// If they may not come, or finding out exceeds a limit.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), String> {
        let all = bytes.iter().all(|&b| self.try_push_byte(b));
        self.collapse();
        self.checked()?;
        if all { Ok(()) } else { Err("a token came that may not come".to_owned()) }
    }

    /// Whether the text may end here.
    pub fn is_accepting(&self) -> bool {
        self.top().is_some_and(|(set, partial)| partial.left == 0 && self.sets[set as usize].contains(&BOTTOM))
    }

    fn top(&self) -> Option<State> {
        self.path.last().and_then(|&s| self.states.get(s as usize)).copied()
    }

    fn checked(&self) -> Result<(), String> {
        self.over.map_or(Ok(()), |what| Err(format!("the grammar is too complex here: {what}")))
    }

    /// Keeps nothing but the state of the text.
    fn forget(&mut self) {
        let Some((set, partial)) = self.top() else { return };
        let tops: Vec<u32> = self.sets[set as usize].to_vec();
        let old = std::mem::take(&mut self.nodes);
        self.node_ids.clear();
        self.sets.clear();
        self.set_ids.clear();
        self.states.clear();
        self.state_ids.clear();
        self.steps.clear();
        let tops = tops.into_iter().map(|top| if top == BOTTOM { BOTTOM } else { self.copied(&old, top) });
        let tops: Vec<u32> = tops.collect();
        let set = self.set(tops);
        let state = self.state((set, partial));
        self.path = vec![state];
    }

    /// A stack of other nodes.
    fn copied(&mut self, old: &[(u32, u32)], top: u32) -> u32 {
        let mut elements = Vec::new();
        let mut at = top;
        while at != BOTTOM {
            let (element, below) = old[at as usize];
            elements.push(element);
            at = below;
        }
        elements.into_iter().rev().fold(BOTTOM, |below, element| self.node(element, below))
    }

    fn node(&mut self, element: u32, below: u32) -> u32 {
        if self.nodes.len() >= NODES_MAX {
            self.over = Some("its stacks take too much memory");
        }
        let n = self.nodes.len() as u32;
        let id = *self.node_ids.entry((element, below)).or_insert(n);
        if id == n {
            self.nodes.push((element, below));
        }
        id
    }

    fn set(&mut self, mut tops: Vec<u32>) -> u32 {
        tops.sort_unstable();
        tops.dedup();
        let tops: Box<[u32]> = tops.into();
        let n = self.sets.len() as u32;
        let id = *self.set_ids.entry(tops.clone()).or_insert(n);
        if id == n {
            self.sets.push(tops);
        }
        id
    }

    fn state(&mut self, state: State) -> u32 {
        if self.states.len() >= STATES_MAX {
            self.over = Some("a token can be read in too many ways");
            return DEAD;
        }
        let n = self.states.len() as u32;
        let id = *self.state_ids.entry(state).or_insert(n);
        if id == n {
            self.states.push(state);
            self.steps.push([UNKNOWN; 256]);
        }
        id
    }

    /// The set of stacks whose tops are characters, from stacks whose tops are any elements.
    fn closed(&mut self, mut open: Vec<(u32, u32)>) -> u32 {
        let gbnf = self.gbnf.clone();
        let program = &gbnf.0;
        let mut seen = HashSet::new();
        let mut tops = Vec::new();
        while let Some((at, below)) = open.pop() {
            if !seen.insert((at, below)) {
                continue;
            }
            if seen.len() > STEPS_MAX || tops.len() > STACKS_MAX {
                self.over = Some("it can be read in too many ways at once");
                break;
            }
            match program.code[at as usize] {
                Element::Class(_) | Element::Byte(_) => tops.push(self.node(at, below)),
                Element::End if below == BOTTOM => tops.push(BOTTOM),
                Element::End => open.push(self.nodes[below as usize]),
                Element::Rule(rule) => {
                    // What is last in an alternative leaves nothing to come back to.
                    let then = match program.code[at as usize + 1] {
                        Element::End => below,
                        _ => self.node(at + 1, below),
                    };
                    open.extend(program.rules[rule as usize].iter().map(|&start| (start, then)));
                }
            }
        }
        self.set(tops)
    }

    /// The state behind a byte.
    fn step(&mut self, (set, partial): State, byte: u8) -> u32 {
        let gbnf = self.gbnf.clone();
        let program = &gbnf.0;
        let next = if partial.left > 0 { partial.next(byte) } else { Partial::begin(byte) };
        let tops = self.sets[set as usize].clone();
        let tops = tops.iter().filter(|t| **t != BOTTOM).map(|&t| self.nodes[t as usize]);
        let mut behind = Vec::new();
        let mut begun = false;
        for (at, below) in tops {
            match (program.code[at as usize], next) {
                (Element::Byte(b), _) if partial.left == 0 && b == byte => behind.push((at + 1, below)),
                (Element::Class(class), Some(next)) if next.left == 0 => {
                    let (low, high) = next.range();
                    behind.extend((low == high && program.has(class, low)).then_some((at + 1, below)));
                }
                (Element::Class(class), Some(next)) => {
                    let (low, high) = next.range();
                    begun |= low <= high && program.meets(class, low, high);
                }
                _ => {}
            }
        }
        match next.filter(|_| begun) {
            Some(next) => self.state((set, next)),
            None if behind.is_empty() => DEAD,
            None => {
                let set = self.closed(behind);
                self.state((set, Partial::default()))
            }
        }
    }
}

impl Recognizer for Matcher {
    fn pop_bytes(&mut self, num: usize) {
        self.path.truncate(self.path.len() - num);
    }

    fn collapse(&mut self) {
        self.path.drain(..self.path.len() - 1);
    }

    fn trie_finished(&mut self) {
        self.path.truncate(1);
    }

    fn try_push_byte(&mut self, byte: u8) -> bool {
        let Some(&from) = self.path.last() else { return false };
        let Some(&known) = self.steps.get(from as usize).map(|s| &s[usize::from(byte)]) else { return false };
        let to = match known {
            UNKNOWN if self.over.is_some() => DEAD,
            UNKNOWN => {
                let to = self.step(self.states[from as usize], byte);
                self.steps[from as usize][usize::from(byte)] = to;
                to
            }
            known => known,
        };
        if to != DEAD {
            self.path.push(to);
        }
        to != DEAD
    }
}

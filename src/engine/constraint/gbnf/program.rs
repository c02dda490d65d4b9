//! A grammar as a program of elements, one behind the other.

use std::collections::HashMap;

use super::parse::{Atom, Body, Item, Rule};

/// Most elements: a repetition by numbers is as many copies.
const ELEMENTS_MAX: usize = 200_000;
/// First and last of the surrogates, which are no characters.
const SURROGATES: (u32, u32) = (0xd800, 0xdfff);

/// One element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// A character of a class.
    Class(u32),
    /// A byte as it is, of a token that stands for no text.
    Byte(u8),
    /// A rule.
    Rule(u32),
    /// The end of an alternative.
    End,
}

/// Rules whose first is the root.
#[derive(Debug, Default)]
pub struct Program {
    pub code: Vec<Element>,
    /// Where the alternatives of each rule begin.
    pub rules: Vec<Vec<u32>>,
    /// Ranges of characters, ascending.
    pub classes: Vec<Vec<(u32, u32)>>,
}

impl Program {
    /// Compiles rules; `token` gives the bytes of a token that is named.
    ///
    /// # Errors
    /// For a rule that is not there, one that begins with itself, a token that is not there, or too many elements.
    pub fn new(rules: &[Rule], token: &dyn Fn(&str) -> Option<Vec<u8>>) -> Result<Program, String> {
        let mut index = HashMap::new();
        let root = rules.iter().position(|r| r.name == "root").ok_or("a rule named root was expected")?;
        // The root comes first.
        let order = std::iter::once(root).chain((0..rules.len()).filter(|&i| i != root));
        let order: Vec<usize> = order.collect();
        for (at, &i) in order.iter().enumerate() {
            index.insert(rules[i].name.as_str(), at as u32);
        }
        let mut maker = Maker { program: Program::default(), index, token, known: HashMap::new() };
        maker.program.rules.resize(rules.len(), Vec::new());
        for (at, &i) in order.iter().enumerate() {
            maker.rule(at, &rules[i].body).map_err(|e| format!("rule {:?}: {e}", rules[i].name))?;
        }
        let program = maker.program;
        if let Some(rule) = program.left_recursion() {
            let name = order.get(rule).map_or("root", |&i| rules[i].name.as_str());
            return Err(format!("the rule {name:?} begins with itself (left recursion), which is not followed"));
        }
        Ok(program)
    }

    /// Whether a character is of a class.
    pub fn has(&self, class: u32, c: u32) -> bool {
        self.meets(class, c, c)
    }

    /// Whether any of the characters from `low` to `high` is of a class.
    pub fn meets(&self, class: u32, low: u32, high: u32) -> bool {
        let ranges = &self.classes[class as usize];
        let at = ranges.partition_point(|r| r.1 < low);
        ranges.get(at).is_some_and(|r| r.0 <= high)
    }

    /// A rule of which stacks would grow without a character: it comes first in itself, and not last.
    fn left_recursion(&self) -> Option<usize> {
        let nullable = self.nullable();
        let mut first: Vec<Vec<(usize, bool)>> = vec![Vec::new(); self.rules.len()];
        for (i, starts) in self.rules.iter().enumerate() {
            for &start in starts {
                let mut at = start as usize;
                while let Element::Rule(r) = self.code[at] {
                    first[i].push((r as usize, self.code[at + 1] != Element::End));
                    if !nullable[r as usize] {
                        break;
                    }
                    at += 1;
                }
            }
        }
        let parts = components(&first);
        (0..self.rules.len()).find(|&i| first[i].iter().any(|&(r, grows)| grows && parts[r] == parts[i]))
    }

    /// Which rules may be empty.
    fn nullable(&self) -> Vec<bool> {
        let mut used_by: Vec<Vec<usize>> = vec![Vec::new(); self.rules.len()];
        for (i, starts) in self.rules.iter().enumerate() {
            for &start in starts {
                let body = self.code[start as usize..].iter().take_while(|e| **e != Element::End);
                body.for_each(|e| {
                    if let Element::Rule(r) = e {
                        used_by[*r as usize].push(i);
                    }
                });
            }
        }
        let mut nullable = vec![false; self.rules.len()];
        let mut open: Vec<usize> = (0..self.rules.len()).collect();
        while let Some(i) = open.pop() {
            let empty = |&start: &u32| {
                let mut body = self.code[start as usize..].iter().take_while(|e| **e != Element::End);
                body.all(|e| matches!(e, Element::Rule(r) if nullable[*r as usize]))
            };
            if !nullable[i] && self.rules[i].iter().any(empty) {
                nullable[i] = true;
                open.extend(&used_by[i]);
            }
        }
        nullable
    }
}

/// The strongly connected part that each node is in (Tarjan's algorithm, without recursion); a node that does not lead
/// back to itself is a part of its own.
fn components(edges: &[Vec<(usize, bool)>]) -> Vec<usize> {
    const NONE: usize = usize::MAX;
    let n = edges.len();
    let (mut order, mut low, mut part) = (vec![NONE; n], vec![0; n], vec![NONE; n]);
    let (mut next, mut parts, mut open) = (0, 0, Vec::new());
    for root in 0..n {
        let mut path = if order[root] == NONE { vec![(root, 0)] } else { Vec::new() };
        while let Some((node, at)) = path.pop() {
            if at == 0 {
                (order[node], low[node]) = (next, next);
                next += 1;
                open.push(node);
            }
            match edges[node].get(at) {
                Some(&(to, _)) => {
                    path.push((node, at + 1));
                    if order[to] == NONE {
                        path.push((to, 0));
                    } else if part[to] == NONE {
                        low[node] = low[node].min(order[to]);
                    }
                }
                None => {
                    if low[node] == order[node] {
                        while let Some(member) = open.pop() {
                            part[member] = parts;
                            if member == node {
                                break;
                            }
                        }
                        parts += 1;
                    }
                    if let Some(&(parent, _)) = path.last() {
                        low[parent] = low[parent].min(low[node]);
                    }
                }
            }
        }
    }
    part
}

struct Maker<'a> {
    program: Program,
    index: HashMap<&'a str, u32>,
    token: &'a dyn Fn(&str) -> Option<Vec<u8>>,
    known: HashMap<Vec<(u32, u32)>, u32>,
}

impl Maker<'_> {
    fn rule(&mut self, rule: usize, body: &Body) -> Result<(), String> {
        for seq in &body.0 {
            let mut elements = Vec::new();
            for item in seq {
                self.item(item, &mut elements)?;
            }
            self.alternative(rule, &elements)?;
        }
        Ok(())
    }

    fn alternative(&mut self, rule: usize, elements: &[Element]) -> Result<(), String> {
        let start = self.program.code.len();
        if start + elements.len() > ELEMENTS_MAX {
            return Err(format!("with its repetitions the grammar has more than {ELEMENTS_MAX} elements"));
        }
        self.program.code.extend(elements);
        self.program.code.push(Element::End);
        self.program.rules[rule].push(start as u32);
        Ok(())
    }

    fn added(&mut self) -> usize {
        self.program.rules.push(Vec::new());
        self.program.rules.len() - 1
    }

    fn item(&mut self, item: &Item, out: &mut Vec<Element>) -> Result<(), String> {
        let one = self.atom(&item.atom)?;
        let (least, most) = item.times;
        if one.len().saturating_mul(most.unwrap_or(1).max(least) as usize) > ELEMENTS_MAX {
            return Err(format!("with its repetitions it has more than {ELEMENTS_MAX} elements"));
        }
        (0..least).for_each(|_| out.extend(&one));
        match most {
            // Again, or not.
            None => {
                let rule = self.added();
                self.alternative(rule, &[&one[..], &[Element::Rule(rule as u32)]].concat())?;
                self.alternative(rule, &[])?;
                out.push(Element::Rule(rule as u32));
            }
            // Each may be followed by the rest of them.
            Some(most) => {
                let mut rest: Option<usize> = None;
                for _ in least..most {
                    let rule = self.added();
                    let then: Vec<Element> = rest.map(|r| Element::Rule(r as u32)).into_iter().collect();
                    self.alternative(rule, &[&one[..], &then].concat())?;
                    self.alternative(rule, &[])?;
                    rest = Some(rule);
                }
                out.extend(rest.map(|r| Element::Rule(r as u32)));
            }
        }
        Ok(())
    }

    fn atom(&mut self, atom: &Atom) -> Result<Vec<Element>, String> {
        Ok(match atom {
            Atom::Text(text) => text.chars().map(|c| self.class(&[(c, c)], false)).collect(),
            Atom::Class(ranges, negated) => vec![self.class(ranges, *negated)],
            Atom::Name(name) => match self.index.get(name.as_str()) {
                Some(&rule) => vec![Element::Rule(rule)],
                None => return Err(format!("it names the rule {name:?}, which is not there")),
            },
            Atom::Token(name) => match (self.token)(name) {
                Some(bytes) => bytes.into_iter().map(Element::Byte).collect(),
                None => return Err(format!("the vocabulary has no control token {name}")),
            },
            Atom::Group(body) => {
                let rule = self.added();
                self.rule(rule, body)?;
                vec![Element::Rule(rule as u32)]
            }
        })
    }

    fn class(&mut self, ranges: &[(char, char)], negated: bool) -> Element {
        let mut all: Vec<(u32, u32)> = ranges.iter().map(|r| (u32::from(r.0), u32::from(r.1))).collect();
        all.sort_unstable();
        let mut merged: Vec<(u32, u32)> = Vec::new();
        for r in all {
            match merged.last_mut() {
                Some(last) if r.0 <= last.1.saturating_add(1) => last.1 = last.1.max(r.1),
                _ => merged.push(r),
            }
        }
        if negated {
            let mut others = Vec::new();
            let mut from = 0;
            for r in merged.iter().copied().chain([(0x11_0000, 0)]) {
                if from < r.0 {
                    others.push((from, r.0 - 1));
                }
                from = r.1 + 1;
            }
            merged = others;
        }
        // What is left of a range without the surrogates.
        let parts = merged.into_iter().flat_map(|(from, to)| {
            [(from, to.min(SURROGATES.0 - 1)), (from.max(SURROGATES.1 + 1), to)].into_iter().filter(|r| r.0 <= r.1)
        });
        let ranges: Vec<(u32, u32)> = parts.collect();
        let n = self.program.classes.len() as u32;
        let class = *self.known.entry(ranges.clone()).or_insert(n);
        if class == n {
            self.program.classes.push(ranges);
        }
        Element::Class(class)
    }
}

//! llama.cpp's grammars as they are written.
//!
//! Source: llama.cpp, `grammars/README.md` and `src/llama-grammar.cpp`.

/// Most rules.
const RULES_MAX: usize = 4096;
/// Deepest nesting of groups.
const DEPTH_MAX: usize = 100;
/// Most times that something is repeated by a number, as in llama.cpp.
const REPEAT_MAX: u32 = 2000;

/// Whether a text defines rules as GBNF does.
pub fn is_gbnf(text: &str) -> bool {
    text.lines().any(|line| {
        let line = line.trim_start();
        let name = line.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || "-_".contains(c));
        name.len() < line.len() && name.trim_start().starts_with("::=")
    })
}

/// The rules of a grammar.
///
/// # Errors
/// What is not understood, with its line.
pub fn rules(text: &str) -> Result<Vec<Rule>, String> {
    Parser::new(text).rules()
}

/// Alternatives, each a sequence.
#[derive(Clone, Debug)]
pub struct Body(pub Vec<Vec<Item>>);

/// What is repeated, and how often.
#[derive(Clone, Debug)]
pub struct Item {
    pub atom: Atom,
    /// Least and most times; `None` without end.
    pub times: (u32, Option<u32>),
}

/// What an item consists of.
#[derive(Clone, Debug)]
pub enum Atom {
    Text(String),
    /// Ranges of characters, and whether all others are meant.
    Class(Vec<(char, char)>, bool),
    Name(String),
    Group(Body),
    /// A token by its name or number.
    Token(String),
}

/// A rule.
#[derive(Clone, Debug)]
pub struct Rule {
    pub name: String,
    pub body: Body,
}

impl Item {
    /// An atom, once.
    pub fn once(atom: Atom) -> Item {
        Item { atom, times: (1, Some(1)) }
    }
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
    depth: usize,
}

impl<'t> Parser<'t> {
    fn new(text: &'t str) -> Parser<'t> {
        Parser { text, at: 0, depth: 0 }
    }

    fn rules(mut self) -> Result<Vec<Rule>, String> {
        let mut rules: Vec<Rule> = Vec::new();
        let mut known = std::collections::HashSet::new();
        loop {
            self.space(true);
            if self.rest().is_empty() {
                return Ok(rules);
            }
            let name = self.name()?;
            self.space(false);
            if !self.eat("::=") {
                return Err(self.wrong(&format!("::= was expected behind {name:?}")));
            }
            self.space(true);
            let body = self.body(false)?;
            if !known.insert(name.clone()) {
                return Err(self.wrong(&format!("the rule {name:?} is there twice")));
            }
            if rules.len() == RULES_MAX {
                return Err(self.wrong(&format!("it has more than the {RULES_MAX} rules that one may have")));
            }
            rules.push(Rule { name, body });
        }
    }

    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn eat(&mut self, text: &str) -> bool {
        let found = self.rest().starts_with(text);
        self.at += if found { text.len() } else { 0 };
        found
    }

    /// White space and comments.
    fn space(&mut self, lines: bool) {
        while let Some(c) = self.peek() {
            match c {
                ' ' | '\t' => self.at += 1,
                '\r' | '\n' if lines => self.at += 1,
                '#' => self.at += self.rest().find(['\r', '\n']).unwrap_or(self.rest().len()),
                _ => return,
            }
        }
    }

    fn wrong(&self, what: &str) -> String {
        let line = self.text[..self.at].matches('\n').count() + 1;
        format!("line {line}: {what}")
    }

    fn name(&mut self) -> Result<String, String> {
        let rest = self.rest();
        let n = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_').unwrap_or(rest.len());
        if n == 0 {
            let found = self.peek().map_or("the end".to_owned(), |c| format!("{c:?}"));
            return Err(self.wrong(&format!("the name of a rule was expected, found {found}")));
        }
        self.at += n;
        Ok(rest[..n].to_owned())
    }

    /// Alternatives, to the end of the line, or of the group if it is `nested`.
    fn body(&mut self, nested: bool) -> Result<Body, String> {
        let mut all = vec![self.alternative(nested)?];
        while self.eat("|") {
            self.space(true);
            all.push(self.alternative(nested)?);
        }
        Ok(Body(all))
    }

    fn alternative(&mut self, nested: bool) -> Result<Vec<Item>, String> {
        let mut items: Vec<Item> = Vec::new();
        while let Some(c) = self.peek() {
            match c {
                '"' => {
                    self.at += 1;
                    let text = self.text()?;
                    items.push(Item::once(Atom::Text(text)));
                }
                '[' => {
                    self.at += 1;
                    let atom = self.class()?;
                    items.push(Item::once(atom));
                }
                '.' => {
                    self.at += 1;
                    items.push(Item::once(any()));
                }
                '(' => {
                    self.at += 1;
                    let body = self.group()?;
                    items.push(Item::once(Atom::Group(body)));
                }
                '*' | '+' | '?' | '{' => self.times(&mut items)?,
                '<' => items.push(Item::once(self.token()?)),
                '!' => return Err(self.wrong("tokens that must not come are not read; name those that may")),
                c if c.is_ascii_alphanumeric() || c == '-' || c == '_' => {
                    items.push(Item::once(Atom::Name(self.name()?)));
                }
                '|' | ')' | '\r' | '\n' => break,
                c => return Err(self.wrong(&format!("{c:?} is not understood here"))),
            }
            self.space(nested);
        }
        Ok(items)
    }

    fn token(&mut self) -> Result<Atom, String> {
        let rest = self.rest();
        let n = rest.find('>').ok_or_else(|| self.wrong("a token as <[5]> or <|name|> was expected"))?;
        self.at += n + 1;
        Ok(Atom::Token(rest[..=n].to_owned()))
    }

    fn group(&mut self) -> Result<Body, String> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(self.wrong(&format!("groups are nested deeper than {DEPTH_MAX}")));
        }
        self.space(true);
        let body = self.body(true)?;
        if !self.eat(")") {
            return Err(self.wrong("a group is not closed: ) was expected"));
        }
        self.depth -= 1;
        Ok(body)
    }

    /// Repeats the last item.
    fn times(&mut self, items: &mut Vec<Item>) -> Result<(), String> {
        let times = match self.next() {
            Some('*') => (0, None),
            Some('+') => (1, None),
            Some('?') => (0, Some(1)),
            _ => {
                let least = self.number()?;
                let most = match self.eat(",") {
                    false => Some(least),
                    true if self.rest().trim_start().starts_with('}') => None,
                    true => Some(self.number()?),
                };
                self.space(true);
                if !self.eat("}") || most.is_some_and(|most| most < least) {
                    return Err(self.wrong("a repetition as {2}, {2,} or {2,5} was expected"));
                }
                (least, most)
            }
        };
        let Some(item) = items.pop() else { return Err(self.wrong("there is nothing to repeat")) };
        // What is repeated already is repeated as a group.
        let atom = match item.times {
            (1, Some(1)) => item.atom,
            _ => Atom::Group(Body(vec![vec![item]])),
        };
        items.push(Item { atom, times });
        Ok(())
    }

    fn number(&mut self) -> Result<u32, String> {
        self.space(true);
        let rest = self.rest();
        let n = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let number = rest[..n].parse().ok().filter(|n| *n <= REPEAT_MAX);
        self.at += n;
        number.ok_or_else(|| self.wrong(&format!("a number up to {REPEAT_MAX} was expected")))
    }

    fn text(&mut self) -> Result<String, String> {
        let mut out = String::new();
        loop {
            match self.next() {
                None => return Err(self.wrong("a text is not closed: \" was expected")),
                Some('"') => return Ok(out),
                Some('\\') => out.push(self.escape()?),
                Some(c) => out.push(c),
            }
        }
    }

    fn class(&mut self) -> Result<Atom, String> {
        let negated = self.eat("^");
        let mut ranges = Vec::new();
        loop {
            let from = match self.next() {
                None => return Err(self.wrong("a class is not closed: ] was expected")),
                Some(']') => break,
                Some('\\') => self.escape()?,
                Some(c) => c,
            };
            let mut to = from;
            if self.rest().starts_with('-') && !self.rest().starts_with("-]") {
                self.at += 1;
                to = match self.next() {
                    None => return Err(self.wrong("a class is not closed: ] was expected")),
                    Some('\\') => self.escape()?,
                    Some(c) => c,
                };
            }
            if to < from {
                return Err(self.wrong(&format!("the range {from:?} to {to:?} is empty")));
            }
            ranges.push((from, to));
        }
        match ranges.is_empty() {
            true if negated => Ok(any()),
            true => Err(self.wrong("a class is empty")),
            false => Ok(Atom::Class(ranges, negated)),
        }
    }

    /// The character behind a backslash.
    fn escape(&mut self) -> Result<char, String> {
        let digits = match self.next() {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some(c @ ('\\' | '"' | '[' | ']')) => return Ok(c),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            other => {
                let found = other.map_or("the end".to_owned(), |c| format!("{c:?}"));
                return Err(self.wrong(&format!(
                    "an escape (\\n \\r \\t \\\\ \\\" \\[ \\] \\x \\u \\U) was expected, found {found}"
                )));
            }
        };
        let hex = self.rest().get(..digits).and_then(|hex| u32::from_str_radix(hex, 16).ok());
        self.at += if hex.is_some() { digits } else { 0 };
        let found = hex.and_then(char::from_u32);
        found.ok_or_else(|| self.wrong(&format!("{digits} hexadecimal digits of a character were expected")))
    }
}

/// Any character.
pub fn any() -> Atom {
    Atom::Class(vec![('\0', char::MAX)], false)
}

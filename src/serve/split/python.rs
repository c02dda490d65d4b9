//! Calls and values as Python writes them, as JSON.

use serde_json::{Map, Number, Value as Json};

/// Values within each other that are read: more than any call has, and few enough for the stack.
const DEPTH_MAX: usize = 64;

/// A value that is all of a text.
pub fn value(text: &str) -> Option<Json> {
    let mut reader = Reader { rest: text };
    let value = reader.value(0)?;
    reader.at_end().then_some(value)
}

/// A list of calls that is all of a text, `[f(key="value"), …]`, or calls on a line each: their names and arguments.
pub fn calls(text: &str) -> Option<Vec<(String, Map<String, Json>)>> {
    let mut reader = Reader { rest: text };
    let mut found = Vec::new();
    let in_list = reader.takes("[");
    loop {
        found.push(reader.call()?);
        let more = reader.takes(",") || reader.takes(";") || !in_list;
        if !more || reader.at_end() || reader.rest.trim_start().starts_with(']') {
            break;
        }
    }
    (reader.takes("]") == in_list && reader.at_end()).then_some(found)
}

/// A value as Python writes it.
pub fn written(value: &Json) -> String {
    match value {
        Json::Null => "None".into(),
        Json::Bool(true) => "True".into(),
        Json::Bool(false) => "False".into(),
        Json::Array(items) => format!("[{}]", items.iter().map(written).collect::<Vec<_>>().join(", ")),
        Json::Object(fields) => {
            let each = fields.iter().map(|(key, value)| format!("{}: {}", Json::from(key.as_str()), written(value)));
            format!("{{{}}}", each.collect::<Vec<_>>().join(", "))
        }
        // A text in JSON is one in Python.
        Json::String(_) | Json::Number(_) => value.to_string(),
    }
}

struct Reader<'t> {
    rest: &'t str,
}

impl<'t> Reader<'t> {
    fn at_end(&self) -> bool {
        self.rest.trim().is_empty()
    }

    /// Whether this comes next, behind white space; it is passed then.
    fn takes(&mut self, mark: &str) -> bool {
        match self.rest.trim_start().strip_prefix(mark) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// What comes next as long as it consists of these.
    fn run(&mut self, of: impl Fn(char) -> bool) -> &'t str {
        let begun = self.rest.trim_start();
        let (run, rest) = begun.split_at(begun.find(|c| !of(c)).unwrap_or(begun.len()));
        self.rest = rest;
        run
    }

    fn call(&mut self) -> Option<(String, Map<String, Json>)> {
        let name = self.run(|c| c != '(').trim_end().to_owned();
        if name.is_empty() || !self.takes("(") {
            return None;
        }
        let mut arguments = Map::new();
        while !self.takes(")") {
            let key = self.run(|c| !c.is_whitespace() && !"=(),'\"[]{}".contains(c)).to_owned();
            if key.is_empty() || !self.takes("=") {
                return None;
            }
            arguments.insert(key, self.value(0)?);
            if !self.takes(",") && !self.rest.trim_start().starts_with(')') {
                return None;
            }
        }
        Some((name, arguments))
    }

    fn value(&mut self, depth: usize) -> Option<Json> {
        if depth > DEPTH_MAX {
            return None;
        }
        match self.rest.trim_start().chars().next()? {
            '\'' | '"' => self.text().map(Json::from),
            '[' => self.items("[", "]", depth).map(Json::from),
            '(' => self.items("(", ")", depth).map(Json::from),
            '{' => self.dict(depth),
            c if c.is_ascii_digit() || matches!(c, '-' | '+' | '.') => self.number(),
            _ => match self.run(|c| c.is_ascii_alphabetic()) {
                "True" | "true" => Some(true.into()),
                "False" | "false" => Some(false.into()),
                "None" | "null" => Some(Json::Null),
                _ => None,
            },
        }
    }

    fn items(&mut self, open: &str, close: &str, depth: usize) -> Option<Vec<Json>> {
        let mut items = Vec::new();
        self.takes(open);
        while !self.takes(close) {
            items.push(self.value(depth + 1)?);
            if !self.takes(",") && !self.rest.trim_start().starts_with(close) {
                return None;
            }
        }
        Some(items)
    }

    fn dict(&mut self, depth: usize) -> Option<Json> {
        let mut map = Map::new();
        self.takes("{");
        while !self.takes("}") {
            let key = match self.value(depth + 1)? {
                Json::String(key) => key,
                key @ (Json::Number(_) | Json::Bool(_)) => key.to_string(),
                _ => return None,
            };
            if !self.takes(":") {
                return None;
            }
            map.insert(key, self.value(depth + 1)?);
            if !self.takes(",") && !self.rest.trim_start().starts_with('}') {
                return None;
            }
        }
        Some(map.into())
    }

    fn number(&mut self) -> Option<Json> {
        let written = self.run(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.' | '_'));
        let plain = written.replace('_', "");
        if let Ok(whole) = plain.parse::<i64>() {
            return Some(whole.into());
        }
        plain.parse().ok().and_then(Number::from_f64).map(Json::Number)
    }

    /// A text in quotes of either kind, also three of them, with Python's escapes.
    fn text(&mut self) -> Option<String> {
        let begun = self.rest.trim_start();
        let quote = begun.get(..3).filter(|q| matches!(*q, "'''" | "\"\"\"")).or_else(|| begun.get(..1))?;
        let mut rest = &begun[quote.len()..];
        let mut text = String::new();
        loop {
            if let Some(after) = rest.strip_prefix(quote) {
                self.rest = after;
                return Some(text);
            }
            let mut chars = rest.chars();
            match chars.next()? {
                '\\' => {
                    let escape = chars.next()?;
                    rest = chars.as_str();
                    match escape {
                        'n' => text.push('\n'),
                        't' => text.push('\t'),
                        'r' => text.push('\r'),
                        'b' => text.push('\u{8}'),
                        'f' => text.push('\u{c}'),
                        '0' => text.push('\0'),
                        '\n' => {}
                        'x' => text.push(char::from_u32(hex(&mut rest, 2)?)?),
                        'u' => text.push(unicode(&mut rest)?),
                        'U' => text.push(char::from_u32(hex(&mut rest, 8)?)?),
                        '\\' | '\'' | '"' | '/' => text.push(escape),
                        // As Python does.
                        other => text.extend(['\\', other]),
                    }
                }
                c => {
                    text.push(c);
                    rest = chars.as_str();
                }
            }
        }
    }
}

fn hex(rest: &mut &str, digits: usize) -> Option<u32> {
    let written = rest.get(..digits).filter(|w| w.bytes().all(|b| b.is_ascii_hexdigit()))?;
    *rest = &rest[digits..];
    u32::from_str_radix(written, 16).ok()
}

/// A character of four digits, or of two times four as JSON writes those beyond.
fn unicode(rest: &mut &str) -> Option<char> {
    let first = hex(rest, 4)?;
    if !(0xd800..0xdc00).contains(&first) {
        return char::from_u32(first);
    }
    *rest = rest.strip_prefix("\\u")?;
    let second = hex(rest, 4)?;
    let low = (0xdc00..0xe000).contains(&second).then(|| second - 0xdc00)?;
    char::from_u32(0x10000 + ((first - 0xd800) << 10) + low)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn one(text: &str) -> Option<Json> {
        let calls = calls(text)?;
        assert_eq!(calls.len(), 1, "{text}");
        Some(json!({ calls[0].0.clone(): calls[0].1 }))
    }

    #[test]
    fn calls_are_read() {
        assert_eq!(one("[f()]"), Some(json!({ "f": {} })));
        assert_eq!(one(" f ( a = 1 , ) "), Some(json!({ "f": { "a": 1 } })));
        let all = r#"[get.it-now(a='it\'s', b="x\n\u00e9\ud83d\ude00", c=[1, -2.5e3, True,], d={'k': None, 1: (2,)}, e=false, f=1_000)]"#;
        let arguments = json!({ "a": "it's", "b": "x\né😀", "c": [1, -2500.0, true], "d": { "k": null, "1": [2] }, "e": false, "f": 1000 });
        assert_eq!(one(all), Some(json!({ "get.it-now": arguments })));
        assert_eq!(calls("[f(a=\"]\"), g(b=')')]").unwrap().len(), 2);
        assert_eq!(calls("\nf(a=1)\ng()\n").unwrap().len(), 2);
        // No name in Python, but one of a tool's argument.
        assert_eq!(one("[f(max-days=1)]"), Some(json!({ "f": { "max-days": 1 } })));
        assert_eq!(one("[f(a='''two\nlines' ''')]"), Some(json!({ "f": { "a": "two\nlines' " } })));
    }

    #[test]
    fn what_is_written_is_read() {
        let all = json!({ "a": ["it's \"x\"\n", null, true], "b": { "c": -1.5 } });
        assert_eq!(written(&all), r#"{"a": ["it's \"x\"\n", None, True], "b": {"c": -1.5}}"#);
        assert_eq!(value(&written(&all)), Some(all));
    }

    #[test]
    fn what_is_none_is_none() {
        for text in [
            "",
            "[]",
            "f",
            "[f(",
            "[f()",
            "f())",
            "[f(a)]",
            "[f(a=)]",
            "[f(a='x)]",
            "[f(a=x)]",
            "[f(a=1 b=2)]",
            "[f(1)]",
            "[f(a=[1)]",
            "[f(a={1})]",
            "[f(a={[]: 1})]",
            "[f(a='\\x4')]",
            "[f(a='\\ud800')]",
            "[f(a=1e)]",
            "hello [f()]",
            "[f(a=nan)]",
            "[f('a'=1)]",
            "[f(a=é)]",
        ] {
            assert_eq!(calls(text), None, "{text}");
        }
        assert_eq!(value(&"[".repeat(100_000)), None);
        assert_eq!(value(&format!("{}1{}", "[".repeat(60), "]".repeat(60))).map(|v| v.is_array()), Some(true));
        assert_eq!(value("1 2"), None);
        assert_eq!(value("'a' b"), None);
    }
}

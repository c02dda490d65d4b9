//! Gemma 4's calls: `call:NAME{key:value,…}` with keys as they are and texts between `<|"|>`, in lists and objects as well.

use serde_json::{Map, Value as Json};

use super::family::GEMMA_QUOTE;
use super::{Call, Tool, calls};

/// The call in a text that consists of nothing else, to a tool that there is.
pub fn call(text: &str, tools: &[Tool]) -> Option<Call> {
    let (name, rest) = text.trim().strip_prefix("call:")?.split_once('{')?;
    let tool = calls::known(name.trim(), tools)?;
    let mut reader = Reader { rest, depth: 0 };
    let arguments = reader.object()?;
    reader.rest.trim().is_empty().then(|| calls::call(tool, arguments))
}

/// Objects and lists within each other at most.
const DEPTH_MAX: usize = 64;

struct Reader<'t> {
    rest: &'t str,
    depth: usize,
}

impl<'t> Reader<'t> {
    /// Whether `mark` comes next, which is taken then.
    fn takes(&mut self, mark: &str) -> bool {
        let rest = self.rest.trim_start().strip_prefix(mark);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    /// What comes up to one of these characters, which stays.
    fn up_to(&mut self, ends: &[char]) -> Option<&'t str> {
        let (found, rest) = self.rest.split_at(self.rest.find(ends)?);
        self.rest = rest;
        Some(found.trim())
    }

    /// A text between quotes of either kind.
    fn text(&mut self) -> Option<String> {
        if self.takes(GEMMA_QUOTE) {
            let (text, rest) = self.rest.split_once(GEMMA_QUOTE)?;
            self.rest = rest;
            return Some(text.to_owned());
        }
        let mut values = serde_json::Deserializer::from_str(self.rest).into_iter::<String>();
        let text = values.next()?.ok()?;
        self.rest = &self.rest[values.byte_offset()..];
        Some(text)
    }

    fn is_text(&self) -> bool {
        let rest = self.rest.trim_start();
        rest.starts_with(GEMMA_QUOTE) || rest.starts_with('"')
    }

    /// Keys and values behind a brace, up to the one that ends them.
    fn object(&mut self) -> Option<Map<String, Json>> {
        let mut found = Map::new();
        if self.takes("}") {
            return Some(found);
        }
        loop {
            let key = if self.is_text() { self.text()? } else { self.up_to(&[':', ',', '}'])?.to_owned() };
            if key.is_empty() || !self.takes(":") {
                return None;
            }
            found.insert(key, self.value()?);
            if self.takes("}") {
                return Some(found);
            }
            if !self.takes(",") {
                return None;
            }
        }
    }

    fn list(&mut self) -> Option<Vec<Json>> {
        let mut found = Vec::new();
        if self.takes("]") {
            return Some(found);
        }
        loop {
            found.push(self.value()?);
            if self.takes("]") {
                return Some(found);
            }
            if !self.takes(",") {
                return None;
            }
        }
    }

    fn value(&mut self) -> Option<Json> {
        if self.depth == DEPTH_MAX {
            return None;
        }
        self.depth += 1;
        let value = if self.is_text() {
            Json::from(self.text()?)
        } else if self.takes("{") {
            Json::Object(self.object()?)
        } else if self.takes("[") {
            Json::Array(self.list()?)
        } else {
            let word = self.up_to(&[',', '}', ']'])?;
            // Numbers, true, false and null; and null as Jinja writes it.
            if word == "None" { Json::Null } else { serde_json::from_str(word).ok()? }
        };
        self.depth -= 1;
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_read_as_the_template_writes_them() {
        let tools = [Tool { name: "f".into(), ..Tool::default() }];
        let read = |text: &str| call(text, &tools).map(|c| c.arguments);
        for (text, arguments) in [
            ("call:f{}", "{}"),
            ("call:f{x:<|\"|>a, \"b\"}\n<|\"|>,y:-1.5}", r#"{"x":"a, \"b\"}\n","y":-1.5}"#),
            ("call:f{ x : [1, <|\"|>a<|\"|>, {k:true}], y:{} }", r#"{"x":[1,"a",{"k":true}],"y":{}}"#),
            ("call:f{x:None,y:{<|\"|>k k<|\"|>:\"v\\n\"}}", r#"{"x":null,"y":{"k k":"v\n"}}"#),
        ] {
            assert_eq!(read(text).as_deref(), Some(arguments), "{text}");
        }
        let deep = format!("call:f{{x:{}}}", "[".repeat(100_000));
        for text in [
            "call:g{}",
            "call:f",
            "call:f{x}",
            "call:f{x:}",
            "call:f{x:a}",
            "call:f{x:1",
            "call:f{x:1} y",
            "f{}",
            &deep,
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }
}

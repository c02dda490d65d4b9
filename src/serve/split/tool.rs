//! Tools that may be called, and values that models write without quotes.

use serde_json::Value as Json;

use super::python;

/// A tool that may be called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// Its arguments that are texts.
    pub texts: Vec<(String, Text)>,
}

/// An argument that is a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text {
    /// Whether it may also be null.
    pub or_null: bool,
}

impl Text {
    /// What a schema says of it; `None` where it is no text, or may be something else than one.
    pub fn of(schema: &Json) -> Option<Text> {
        const NOTHING: &[Json] = &[];
        let kinds = match &schema["type"] {
            kind @ Json::String(_) => std::slice::from_ref(kind),
            Json::Array(kinds) => kinds,
            _ => {
                // As pydantic writes what may be missing.
                let any = schema["anyOf"].as_array().or(schema["oneOf"].as_array()).map_or(NOTHING, Vec::as_slice);
                let null = any.iter().filter(|s| s["type"] == "null").count();
                let text = any.iter().filter(|s| s["type"] == "string").count();
                return (text > 0 && text + null == any.len()).then_some(Text { or_null: null > 0 });
            }
        };
        let (mut text, mut null) = (false, false);
        for kind in kinds {
            match kind.as_str() {
                Some("string") => text = true,
                Some("null") => null = true,
                _ => return None,
            }
        }
        text.then_some(Text { or_null: null })
    }
}

impl Tool {
    /// A tool as OpenAI describes it.
    pub fn of(tool: &Json) -> Option<Tool> {
        let function = &tool["function"];
        let properties = function["parameters"]["properties"].as_object();
        let texts = properties.into_iter().flatten().filter_map(|(key, s)| Some((key.clone(), Text::of(s)?)));
        Some(Tool { name: function["name"].as_str()?.to_owned(), texts: texts.collect() })
    }

    /// The value of an argument that was written without quotes: a text where the tool has one, else JSON or what Python
    /// writes for it, or a text where it is neither.
    pub fn value(&self, key: &str, written: &str) -> Json {
        match self.texts.iter().find(|(name, _)| name == key) {
            Some((_, text)) if !(text.or_null && matches!(written.trim(), "null" | "None")) => Json::from(written),
            _ => {
                let json = serde_json::from_str(written.trim()).ok();
                json.or_else(|| python::value(written)).unwrap_or_else(|| Json::from(written))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn texts_are_told_from_their_schemas() {
        let text = |schema: Json| Text::of(&schema).map(|t| t.or_null);
        assert_eq!(text(json!({ "type": "string" })), Some(false));
        assert_eq!(text(json!({ "type": ["string", "null"] })), Some(true));
        assert_eq!(text(json!({ "anyOf": [{ "type": "string" }, { "type": "null" }] })), Some(true));
        for other in [
            json!({ "type": "integer" }),
            json!({ "type": ["string", "integer"] }),
            json!({ "anyOf": [{ "type": "string" }, { "type": "number" }] }),
            json!({ "anyOf": [{ "type": "null" }] }),
            json!({ "type": "null" }),
            json!({}),
            json!(true),
        ] {
            assert_eq!(text(other.clone()), None, "{other}");
        }
    }

    #[test]
    fn values_are_what_the_tool_expects() {
        let texts = vec![("zip".to_owned(), Text { or_null: false }), ("note".to_owned(), Text { or_null: true })];
        let tool = Tool { name: "f".into(), texts };
        assert_eq!(tool.value("zip", "01234"), "01234");
        assert_eq!(tool.value("zip", "null"), "null");
        assert_eq!(tool.value("note", "null"), Json::Null);
        assert_eq!(tool.value("note", "12"), "12");
        assert_eq!(tool.value("n", " 12\n"), 12);
        assert_eq!(tool.value("n", "True"), true);
        assert_eq!(tool.value("n", "{'a': [1, None]}"), json!({ "a": [1, null] }));
        assert_eq!(tool.value("n", "some text\n"), "some text\n");
    }
}

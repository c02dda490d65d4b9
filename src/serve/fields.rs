//! Reading the fields of a request: each is taken once, by type and range, and what is left over is refused by name.

use serde_json::{Map, Value as Json};

use super::error::ApiError;

/// Characters of a value that an error shows.
const SHOWN: usize = 60;

/// The fields of a JSON object that are yet to be read.
#[derive(Debug)]
pub struct Fields {
    left: Map<String, Json>,
    /// The object's place in the request, with a dot behind it; empty for the request itself.
    place: String,
}

impl Fields {
    /// The fields of a body.
    ///
    /// # Errors
    /// If it is not the JSON of an object.
    pub fn parse(body: &[u8]) -> Result<Fields, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Json::Object(left)) => Ok(Fields { left, place: String::new() }),
            Ok(other) => Err(ApiError::request(format!("the body is {}; a JSON object was expected", kind(&other)))),
            Err(e) => Err(ApiError::request(format!("the body is not JSON: {e}"))),
        }
    }

    /// The fields of a value at `place`.
    ///
    /// # Errors
    /// If it is no object.
    pub fn of(value: Json, place: &str) -> Result<Fields, ApiError> {
        match value {
            Json::Object(left) => Ok(Fields { left, place: format!("{place}.") }),
            other => Err(wrong(place, "an object", &other)),
        }
    }

    /// The full name of a field.
    pub fn name(&self, field: &str) -> String {
        format!("{}{field}", self.place)
    }

    /// Whether a field is there.
    pub fn has(&self, field: &str) -> bool {
        self.left.get(field).is_some_and(|v| !v.is_null())
    }

    /// A field of any type, which is still to be asked for; `null` is one that is not there.
    pub fn get(&self, field: &str) -> Option<&Json> {
        self.left.get(field).filter(|v| !v.is_null())
    }

    /// A field of any type; `null` is one that is not there.
    pub fn any(&mut self, field: &str) -> Option<Json> {
        self.left.remove(field).filter(|v| !v.is_null())
    }

    /// A text.
    pub fn text(&mut self, field: &str) -> Result<Option<String>, ApiError> {
        match self.any(field) {
            None => Ok(None),
            Some(Json::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.name(field), "a text", &other)),
        }
    }

    /// `true` or `false`.
    pub fn flag(&mut self, field: &str) -> Result<Option<bool>, ApiError> {
        match self.any(field) {
            None => Ok(None),
            Some(Json::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(wrong(&self.name(field), "true or false", &other)),
        }
    }

    /// A number from `from` to `to`.
    pub fn number(&mut self, field: &str, from: f64, to: f64) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.any(field) else { return Ok(None) };
        match value.as_f64().filter(|v| (from..=to).contains(v)) {
            Some(number) => Ok(Some(number)),
            None => Err(wrong(&self.name(field), &format!("a number from {from} to {to}"), &value)),
        }
    }

    /// A whole number from `from` to `to`.
    pub fn whole(&mut self, field: &str, from: i64, to: i64) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.any(field) else { return Ok(None) };
        match whole(&value).filter(|v| (from..=to).contains(v)) {
            Some(number) => Ok(Some(number)),
            None => Err(wrong(&self.name(field), &format!("a whole number from {from} to {to}"), &value)),
        }
    }

    /// A list.
    pub fn list(&mut self, field: &str) -> Result<Option<Vec<Json>>, ApiError> {
        match self.any(field) {
            None => Ok(None),
            Some(Json::Array(items)) => Ok(Some(items)),
            Some(other) => Err(wrong(&self.name(field), "a list", &other)),
        }
    }

    /// An object.
    pub fn object(&mut self, field: &str) -> Result<Option<Fields>, ApiError> {
        let name = self.name(field);
        self.any(field).map(|value| Fields::of(value, &name)).transpose()
    }

    /// A text, or a list of texts.
    pub fn texts(&mut self, field: &str) -> Result<Vec<String>, ApiError> {
        let name = self.name(field);
        let expected = "a text or a list of texts";
        match self.any(field) {
            None => Ok(Vec::new()),
            Some(Json::String(text)) => Ok(vec![text]),
            Some(Json::Array(items)) => {
                let text = |item: Json| match item {
                    Json::String(text) => Ok(text),
                    other => Err(wrong(&name, expected, &other)),
                };
                items.into_iter().map(text).collect()
            }
            Some(other) => Err(wrong(&name, expected, &other)),
        }
    }

    /// Leaves fields out that change no text, whatever they hold.
    pub fn ignore(&mut self, fields: &[&str]) {
        fields.iter().for_each(|field| {
            self.left.remove(*field);
        });
    }

    /// Takes a field that nt does not do, if its value is one that asks for nothing.
    ///
    /// # Errors
    /// For any other value, with `why`.
    pub fn only(&mut self, field: &str, nothing: &[Json], why: &str) -> Result<(), ApiError> {
        match self.any(field) {
            None => Ok(()),
            Some(value) if nothing.iter().any(|n| same(n, &value)) => Ok(()),
            Some(_) => Err(ApiError::unsupported(&self.name(field), format!("{}: {why}", self.name(field)))),
        }
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// If there is a field that nobody asked for, since it may be meant to change the text.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.left.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((field, _)) => {
                let name = self.name(&field.chars().take(SHOWN).collect::<String>());
                let message = format!(
                    "{name} is not a parameter that nt knows here; it could change the answer, so the request is refused"
                );
                Err(ApiError::unsupported(&name, message))
            }
        }
    }
}

/// Whether two values are the same; numbers by value.
fn same(a: &Json, b: &Json) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// A whole number, also where it is written with a fraction of zero.
pub fn whole(value: &Json) -> Option<i64> {
    let exact = |v: f64| (v.fract() == 0.0 && v.abs() < 9.0e15).then_some(v as i64);
    value.as_i64().or_else(|| value.as_f64().and_then(exact))
}

/// The error for a value of the wrong type or range.
pub fn wrong(name: &str, expected: &str, found: &Json) -> ApiError {
    let found = match found {
        Json::Object(_) | Json::Array(_) => kind(found).to_owned(),
        other => other.to_string().chars().take(SHOWN).collect(),
    };
    ApiError::field(name, format!("{name}: {expected} was expected, found {found}"))
}

/// The type of a value, in words.
fn kind(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "true or false",
        Json::Number(_) => "a number",
        Json::String(_) => "a text",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Fields {
        Fields::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn each_field_is_read_by_type_and_range() {
        let mut f = fields(r#"{"a": "x", "b": true, "c": 0.5, "d": 3.0, "e": ["x"], "g": null}"#);
        assert_eq!(f.text("a"), Ok(Some("x".into())));
        assert_eq!(f.flag("b"), Ok(Some(true)));
        assert_eq!(f.number("c", 0.0, 1.0), Ok(Some(0.5)));
        assert_eq!(f.whole("d", 0, 5), Ok(Some(3)));
        assert_eq!(f.texts("e"), Ok(vec!["x".to_owned()]));
        f.finish().unwrap();
    }

    #[test]
    fn a_wrong_one_is_named() {
        for (text, words) in [
            (r#"{"a": 5}"#, "a: a text was expected, found 5"),
            (r#"{"a": {"b": 1}}"#, "a: a text was expected, found an object"),
        ] {
            assert_eq!(fields(text).text("a").unwrap_err().message, words);
        }
        let e = fields(r#"{"t": 3}"#).number("t", 0.0, 2.0).unwrap_err();
        assert_eq!((e.status, e.param.as_deref()), (400, Some("t")));
        assert!(fields(r#"{"t": 1.5}"#).whole("t", 0, 2).is_err());
        assert!(fields(r#"{"t": 1e300}"#).whole("t", 0, i64::MAX).is_err());
    }

    #[test]
    fn what_is_left_over_is_refused_by_name() {
        let mut f = fields(r#"{"o": {"p": 1}, "q": null}"#);
        let e = f.object("o").unwrap().unwrap().finish().unwrap_err();
        assert_eq!((e.param.as_deref(), e.code), (Some("o.p"), Some("unsupported_parameter")));
        f.finish().unwrap();
    }

    #[test]
    fn a_body_that_is_no_object_is_refused() {
        for body in ["", "[]", "{", "\"x\"", "nul", "{\"a\": 1} x"] {
            assert!(Fields::parse(body.as_bytes()).is_err(), "{body}");
        }
        assert!(Fields::parse(&[0xff, 0xfe]).is_err());
        assert!(Fields::parse("[".repeat(100_000).as_bytes()).is_err());
    }
}

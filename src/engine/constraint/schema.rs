//! A JSON Schema before llguidance compiles it.
//!
//! llguidance refuses keywords that it does not follow. Refused here is what it follows otherwise than the standard says,
//! so that a text would not conform: references that depend on `$id`, numbers that a double does not hold, names that
//! may occur twice where they are counted. What says nothing of a text is taken out.

use std::collections::HashSet;

use serde_json::{Map, Value as Json, json};

use super::SCHEMA_MAX;

/// Most subschemas of a schema.
const SUBSCHEMAS_MAX: usize = 5_000;
/// Largest `multipleOf`, in its last digit's unit: each remainder is a state.
const MULTIPLE_MAX: u64 = 10_000;
/// Most entries of `oneOf` and of `patternProperties`: each is compared with each.
const COMPARED_MAX: usize = 200;
/// Formats of OpenAPI that say nothing of the characters of a string, or belong to numbers.
const WITHOUT_FORM: [&str; 7] = ["password", "binary", "byte", "int32", "int64", "float", "double"];
/// White space between parts of JSON: a space, or a new line or two with an indentation, so that a text cannot
/// consist of it.
const SPACE: &str = r"( |\n{1,2}[ \t]{0,20})";
/// What may stand behind a backslash. Other characters than these have one form only, so that names of objects can be
/// told apart.
const ESCAPES: &str = r#"nrbtf\""#;

/// Keywords that are counts.
const COUNTS: [&str; 6] = ["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"];

const ONE: [&str; 12] = [
    "additionalProperties",
    "additionalItems",
    "items",
    "not",
    "contains",
    "propertyNames",
    "if",
    "then",
    "else",
    "unevaluatedItems",
    "unevaluatedProperties",
    "contentSchema",
];
const LISTS: [&str; 5] = ["allOf", "anyOf", "oneOf", "prefixItems", "items"];
const MAPS: [&str; 6] = ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"];

/// The schema as llguidance is to read it, and how many subschemas it has.
///
/// # Errors
/// What in it is not followed.
pub(super) fn prepared(schema: &Json) -> Result<(Json, usize), String> {
    let mut root = match schema {
        Json::Bool(true) => json!({}),
        Json::Bool(false) => return Err("nothing conforms to it (schema is false)".into()),
        Json::Object(_) => schema.clone(),
        _ => return Err("an object, true or false was expected".into()),
    };
    let bytes = root.to_string().len();
    if bytes > SCHEMA_MAX {
        return Err(format!("it has {bytes} bytes, more than the {SCHEMA_MAX} that one may have"));
    }
    let mut walk = Walk::default();
    walk.schema(&mut root, "")?;
    // Places that a reference names need not be schemas by their keyword.
    let mut seen = HashSet::new();
    while let Some(place) = walk.references.pop() {
        if seen.insert(place.clone())
            && let Some(target) = root.pointer_mut(&place)
        {
            walk.schema(target, &place)?;
        }
    }
    // Where schemas are combined, a number may have to be a multiple of all of them.
    if walk.combines && walk.multiples.len() > 1 && common(&walk.multiples).is_none() {
        return Err(format!("multipleOf: the least common multiple of all is more than {MULTIPLE_MAX}"));
    }
    if let (Some(place), false) = (walk.inner_id, seen.is_empty()) {
        return Err(format!("{place}: references would be relative to it, which is not followed"));
    }
    if let Json::Object(root) = &mut root {
        // An empty schema is anything, which may be a bare number; llguidance wants an object to put its options in.
        root.insert("x-guidance".into(), json!({ "whitespace_pattern": SPACE, "json_allowed_escapes": ESCAPES }));
    }
    Ok((root, walk.subschemas))
}

#[derive(Default)]
struct Walk {
    subschemas: usize,
    /// Places that references name, as pointers.
    references: Vec<String>,
    /// The place of an `$id` that is not the whole schema's.
    inner_id: Option<String>,
    /// The digits of each `multipleOf`.
    multiples: Vec<(u64, u32)>,
    /// Whether schemas are combined.
    combines: bool,
}

impl Walk {
    fn schema(&mut self, schema: &mut Json, place: &str) -> Result<(), String> {
        self.subschemas += 1;
        if self.subschemas > SUBSCHEMAS_MAX {
            return Err(format!("it has more than the {SUBSCHEMAS_MAX} subschemas that one may have"));
        }
        let Json::Object(map) = schema else { return Ok(()) };
        self.keywords(map, place)?;
        for (key, value) in map.iter_mut() {
            let place = format!("{place}/{key}");
            match value {
                Json::Object(entries) if MAPS.contains(&key.as_str()) => {
                    for (name, entry) in entries {
                        self.schema(entry, &format!("{place}/{name}"))?;
                    }
                }
                Json::Array(entries) if LISTS.contains(&key.as_str()) => {
                    for (i, entry) in entries.iter_mut().enumerate() {
                        self.schema(entry, &format!("{place}/{i}"))?;
                    }
                }
                value if ONE.contains(&key.as_str()) => self.schema(value, &place)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// What an object of keywords says itself.
    fn keywords(&mut self, map: &mut Map<String, Json>, place: &str) -> Result<(), String> {
        let at = |key: &str| if place.is_empty() { key.to_owned() } else { format!("{place}/{key}") };
        if map.contains_key("x-guidance") {
            return Err(format!("{}: options of llguidance are not taken", at("x-guidance")));
        }
        if map.get("uniqueItems") == Some(&Json::Bool(false)) {
            map.remove("uniqueItems");
        }
        if map.get("format").and_then(Json::as_str).is_some_and(|f| WITHOUT_FORM.contains(&f)) {
            map.remove("format");
        }
        // A whole number may be written as 2.0.
        for key in COUNTS {
            if let Some(count) =
                map.get(key).and_then(Json::as_f64).filter(|n| n.fract() == 0.0 && (0.0..9e15).contains(n))
            {
                map.insert(key.to_owned(), (count as u64).into());
            }
        }
        if !place.is_empty() && map.get("$id").is_some_and(Json::is_string) {
            self.inner_id = Some(at("$id"));
        }
        if let Some(reference) = map.get("$ref") {
            self.references.push(pointer(reference).map_err(|e| format!("{}: {e}", at("$ref")))?);
        }
        for key in ["oneOf", "patternProperties"] {
            let n = map.get(key).map_or(0, |v| v.as_array().map_or(0, Vec::len) + v.as_object().map_or(0, Map::len));
            if n > COMPARED_MAX {
                return Err(format!("{}: it has {n} entries, more than the {COMPARED_MAX} it may have", at(key)));
            }
        }
        if let Some(multiple) = map.get("multipleOf") {
            self.multiples.push(digits(multiple).map_err(|e| format!("{}: {e}", at("multipleOf")))?);
        }
        self.combines |= ["allOf", "anyOf", "oneOf", "$ref"].iter().any(|k| map.contains_key(*k));
        for key in ["const", "enum"] {
            map.get(key).map_or(Ok(()), constant).map_err(|e| format!("{}: {e}", at(key)))?;
        }
        names_counted(map).map_err(|e| format!("{}: {e}", at("minProperties")))
    }
}

/// The place that a reference names, as a pointer.
fn pointer(reference: &Json) -> Result<String, String> {
    let text = reference.as_str().ok_or("a text was expected")?;
    let shown: String = text.chars().take(100).collect();
    match text.strip_prefix('#') {
        None => Err(format!("{shown:?} is not in this schema, and nothing else is read")),
        Some("") => Ok(String::new()),
        Some(place) if !place.starts_with('/') => {
            Err(format!("{shown:?} is an anchor; only # and places as #/$defs/NAME are followed"))
        }
        Some(place) if place == "/" || place.contains(['~', '%']) || place.contains("//") => {
            Err(format!("{shown:?} has characters that are not followed in references"))
        }
        Some(place) => Ok(place.to_owned()),
    }
}

/// Refuses constants that a text cannot be held to exactly.
fn constant(value: &Json) -> Result<(), String> {
    match value {
        Json::Number(n) => {
            // A double holds whole numbers up to 2^53, and fractions as JSON writes them again.
            let exact = match (n.as_u64(), n.as_i64()) {
                (Some(n), _) => n <= 1 << 53,
                (_, Some(n)) => n.unsigned_abs() <= 1 << 53,
                _ => n.as_f64().is_some_and(f64::is_finite),
            };
            if exact { Ok(()) } else { Err(format!("{n} is beyond what a double holds")) }
        }
        Json::String(text) => {
            match text.chars().find(|c| (c.is_control() && *c < '\u{80}') && !"\n\r\t\u{8}\u{c}".contains(*c)) {
                Some(c) => Err(format!("the control character U+{:04X} is not written in texts", u32::from(c))),
                None => Ok(()),
            }
        }
        Json::Array(items) => items.iter().try_for_each(constant),
        Json::Object(fields) => fields.values().try_for_each(constant),
        Json::Null | Json::Bool(_) => Ok(()),
    }
}

/// The digits of a number as a whole one, and how many of them stand behind the point.
fn digits(number: &Json) -> Result<(u64, u32), String> {
    let text = number.to_string();
    let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((&text, "0"));
    let behind = mantissa.split_once('.').map_or(0, |(_, fraction)| fraction.trim_end_matches('0').len()) as i64;
    let all = mantissa.split_once('.').map_or(mantissa.to_owned(), |(w, f)| format!("{w}{}", f.trim_end_matches('0')));
    let behind = behind - exponent.parse::<i64>().unwrap_or(i64::from(i32::MAX));
    let value = all.trim_start_matches('-').parse::<u64>().ok();
    let value = value.and_then(|n| n.checked_mul(10u64.checked_pow(u32::try_from(-behind.min(0)).ok()?)?));
    match (value.filter(|n| *n <= MULTIPLE_MAX), u32::try_from(behind.max(0))) {
        (Some(value), Ok(behind)) => Ok((value, behind)),
        _ => Err(format!("{text} has too many digits; up to {MULTIPLE_MAX} are followed")),
    }
}

/// The least common multiple of numbers as [`digits`] gives them, in the unit of the last digit of any, if it is not too
/// large.
fn common(multiples: &[(u64, u32)]) -> Option<u64> {
    let most = multiples.iter().map(|m| m.1).max().unwrap_or(0);
    multiples.iter().try_fold(1, |all, &(n, behind)| lcm(all, n.checked_mul(10u64.checked_pow(most - behind)?)?))
}

/// The least common multiple, if it is not too large.
fn lcm(a: u64, b: u64) -> Option<u64> {
    let (mut x, mut y) = (a.max(1), b.max(1));
    while y > 0 {
        (x, y) = (y, x % y);
    }
    (a.max(1) / x).checked_mul(b.max(1)).filter(|n| *n <= MULTIPLE_MAX)
}

/// Refuses a least number of names where a name that the schema does not give could be written twice.
fn names_counted(map: &Map<String, Json>) -> Result<(), String> {
    let Some(least) = map.get("minProperties").and_then(Json::as_u64) else { return Ok(()) };
    let required = map.get("required").and_then(Json::as_array).map_or(0, Vec::len) as u64;
    let closed = map.get("additionalProperties") == Some(&Json::Bool(false)) && !map.contains_key("patternProperties");
    if closed || least <= required + 1 {
        return Ok(());
    }
    Err(format!("{least} is more than the {required} required names and one, and that others differ is not followed"))
}

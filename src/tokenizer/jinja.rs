//! Filters, tests and methods of chat templates as Python's Jinja has them, where minijinja lacks
//! them or differs.
//!
//! The engine charges steps for what its own filters read and make, and for the value that one of these returns.
//! These charge for what they read, and refuse before they make what the steps that are left cannot pay for.

use minijinja::value::{DynObject, Kwargs, ObjectRepr, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;
use serde_json::Value as Json;

use crate::memory::bounded;

/// Nesting that `tojson` writes, more than any message has.
const DEPTH_MAX: usize = 100;
/// Widest indentation; real ones are 2, 4 or 8.
const INDENT_MAX: usize = 256;

/// Bytes that a step of the engine pays for.
const BYTES_OF_A_STEP: u64 = 64;
/// Bytes of a list for each of its elements.
const BYTES_OF_AN_ELEMENT: usize = 32;

/// Charges for reading so many bytes.
fn charge(state: &State, bytes: usize) -> Result<(), Error> {
    go_on()?;
    state.consume_fuel(bytes as u64 / BYTES_OF_A_STEP)
}

/// Ends a rendering that nobody waits for any more, so that its thread ends and its memory comes back.
pub(super) fn go_on() -> Result<(), Error> {
    match bounded::is_asked_to_end() {
        true => Err(Error::new(ErrorKind::InvalidOperation, "it was asked to end")),
        false => Ok(()),
    }
}

/// Refuses to make a value of so many bytes that the steps left cannot pay for.
fn ensure(state: &State, bytes: usize) -> Result<(), Error> {
    match state.fuel_levels() {
        Some((_, left)) if bytes as u64 / BYTES_OF_A_STEP >= left => state.consume_fuel(u64::MAX),
        _ => Ok(()),
    }
}

/// JSON as Python's `json.dumps` writes it, with `ensure_ascii` false unless asked for: a space after
/// `,` and `:`, nothing escaped for HTML.
pub(super) fn tojson(state: &State, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Value> = options.get("separators")?;
    let layout = Layout::new(indent, separators.as_ref(), options.get::<Option<bool>>("sort_keys")?.unwrap_or(false))?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut out = String::new();
    layout.write(state, value, 0, &mut out)?;
    if ensure_ascii == Some(true) {
        // A character of two bytes takes six, one of four bytes twelve.
        ensure(state, out.len().saturating_mul(3))?;
        out = escape_non_ascii(&out);
    }
    Ok(Value::from_safe_string(out))
}

/// Characters outside ASCII as JSON escapes; they occur within JSON strings only.
fn escape_non_ascii(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            out.extend(c.encode_utf16(&mut [0; 2]).iter().map(|u| format!("\\u{u:04x}")));
        }
    }
    out
}

/// What an object of the engine means for a namespace that is to hold it.
enum Object {
    /// It holds no values.
    Leaf,
    /// It holds values that stay what they are.
    Holds,
    /// It makes its values when asked, from what may change.
    Makes,
    /// It changes.
    Changes(&'static str),
}

impl Object {
    fn of(object: &DynObject) -> Object {
        let name = object.type_name();
        let is = |suffix: &str| name.starts_with("minijinja::") && name.ends_with(suffix);
        if is("::Namespace") {
            Object::Changes("namespace")
        } else if is("::Loop") {
            Object::Changes("loop")
        } else if is("::Macro") || object.repr() == ObjectRepr::Plain {
            Object::Leaf
        } else if is("::Tuple") || name.starts_with("alloc::vec::Vec<") || name.starts_with("indexmap::map::IndexMap<")
        {
            Object::Holds
        } else {
            Object::Makes
        }
    }
}

/// The value, as a namespace may hold it: namespaces and loops, the only ones that change, are refused, also in what
/// it holds; where it has values that are made when asked, they are made now. So no value can come to hold itself,
/// which printing, comparing, hashing and dropping it would not survive.
pub(super) fn plain(value: Value) -> Result<Value, Error> {
    let mut makes = false;
    let mut left = vec![(value.clone(), 0)];
    while let Some((v, depth)) = left.pop() {
        let Some(object) = v.as_object() else { continue };
        match Object::of(object) {
            Object::Leaf => continue,
            Object::Holds => {}
            Object::Makes => makes = true,
            Object::Changes(what) => {
                let what = format!("a {what} cannot be stored in a namespace");
                return Err(Error::new(ErrorKind::InvalidOperation, what));
            }
        }
        if depth > DEPTH_MAX {
            let what = "a value that is nested too deeply cannot be stored in a namespace";
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
        let is_map = v.kind() == ValueKind::Map;
        for item in v.try_iter()? {
            if is_map {
                left.push((v.get_item(&item)?, depth + 1));
            }
            left.push((item, depth + 1));
        }
    }
    if makes { made(&value) } else { Ok(value) }
}

/// A copy of a value that is nested no deeper than [`DEPTH_MAX`], with everything in it made.
fn made(v: &Value) -> Result<Value, Error> {
    let Some(object) = v.as_object() else { return Ok(v.clone()) };
    if matches!(Object::of(object), Object::Leaf) {
        return Ok(v.clone());
    }
    let items = v.try_iter()?;
    if v.kind() == ValueKind::Map {
        let pairs = items.map(|key| Ok((key.clone(), made(&v.get_item(&key)?)?)));
        Ok(Value::from_pairs(pairs.collect::<Result<Vec<_>, Error>>()?))
    } else {
        Ok(Value::from(items.map(|item| made(&item)).collect::<Result<Vec<_>, Error>>()?))
    }
}

/// How `tojson` lays out what it writes.
struct Layout {
    indent: Option<usize>,
    comma: String,
    colon: String,
    sort_keys: bool,
}

impl Layout {
    fn new(indent: Option<usize>, separators: Option<&Value>, sort_keys: bool) -> Result<Layout, Error> {
        checked_width(indent.unwrap_or(0))?;
        let (mut comma, mut colon) = (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
        if let Some(pair) = separators.filter(|p| !p.is_none() && !p.is_undefined()) {
            let of = |i: usize| -> Result<String, Error> {
                pair.get_item_by_index(i)?.as_str().map(str::to_owned).ok_or_else(|| {
                    Error::new(ErrorKind::InvalidOperation, "tojson: separators must be a pair of strings")
                })
            };
            (comma, colon) = (of(0)?, of(1)?);
        }
        Ok(Layout { indent, comma, colon, sort_keys })
    }

    fn line(&self, depth: usize, out: &mut String) {
        if let Some(n) = self.indent {
            out.push('\n');
            out.push_str(&" ".repeat(n * depth));
        }
    }

    fn write(&self, state: &State, v: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        state.consume_fuel(1)?;
        ensure(state, out.len())?;
        if depth > DEPTH_MAX {
            return Err(Error::new(ErrorKind::BadSerialization, "tojson: the value is nested too deeply"));
        }
        match v.kind() {
            ValueKind::Undefined | ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if v.is_true() { "true" } else { "false" }),
            ValueKind::Number if v.is_integer() => out.push_str(&v.to_string()),
            ValueKind::Number => out.push_str(&python_float(f64::try_from(v.clone())?)),
            ValueKind::String => {
                let text = v.as_str().unwrap_or_default();
                ensure(state, out.len().saturating_add(text.len()))?;
                out.push_str(&Json::from(text).to_string());
            }
            ValueKind::Seq | ValueKind::Iterable => self.list(state, v, depth, out)?,
            ValueKind::Map => self.map(state, v, depth, out)?,
            other => {
                return Err(Error::new(ErrorKind::BadSerialization, format!("tojson: a {other} cannot be written")));
            }
        }
        Ok(())
    }

    fn list(&self, state: &State, v: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        out.push('[');
        let mut empty = true;
        for item in v.try_iter()? {
            out.push_str(if empty { "" } else { &self.comma });
            empty = false;
            self.line(depth + 1, out);
            self.write(state, &item, depth + 1, out)?;
        }
        if !empty {
            self.line(depth, out);
        }
        out.push(']');
        Ok(())
    }

    fn map(&self, state: &State, v: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        let mut keys: Vec<Value> = v.try_iter()?.collect();
        if self.sort_keys {
            keys.sort();
        }
        out.push('{');
        for (i, key) in keys.iter().enumerate() {
            out.push_str(if i > 0 { &self.comma } else { "" });
            self.line(depth + 1, out);
            let mut name = String::new();
            // A key that is no string is written as the string of its JSON.
            self.write(state, key, depth + 1, &mut name)?;
            out.push_str(&if key.kind() == ValueKind::String { name } else { Json::from(name).to_string() });
            out.push_str(&self.colon);
            self.write(state, &v.get_item(key)?, depth + 1, out)?;
        }
        if !keys.is_empty() {
            self.line(depth, out);
        }
        out.push('}');
        Ok(())
    }
}

/// A float as Python writes it: `1.0`, `1e-05`, `1e+16`.
fn python_float(x: f64) -> String {
    if x.is_nan() {
        return "NaN".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let text = format!("{x:?}");
    let Some((digits, exponent)) = text.split_once('e') else { return text };
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
    format!("{digits}e{sign}{exponent:0>2}")
}

/// Python's methods of strings, lists and dictionaries.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(s) = value.as_str() {
        charge(state, s.len())?;
        return text_method(state, s, name, args)
            .unwrap_or_else(|| pycompat::unknown_method_callback(state, value, name, args));
    }
    match (value.kind(), name) {
        (ValueKind::Seq, "index") => {
            let (wanted,): (Value,) = from_args(args)?;
            for (i, item) in value.try_iter()?.enumerate() {
                state.consume_fuel(1)?;
                if item == wanted {
                    return Ok(Value::from(i));
                }
            }
            Err(Error::new(ErrorKind::InvalidOperation, "index: no such element"))
        }
        (ValueKind::Seq, "count") => {
            state.consume_fuel(value.len().unwrap_or(0) as u64)?;
            pycompat::unknown_method_callback(state, value, name, args)
        }
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// The methods of strings that differ from those of `pycompat`; `None` after a check of what its own will make.
fn text_method(state: &State, s: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let first = args.first().and_then(Value::as_str);
    let checked = match name {
        "rsplit" => return Some(rsplit(state, s, args)),
        "join" => return Some(join(state, s, args)),
        "removeprefix" => return Some(from_args(args).map(|(p,): (&str,)| s.strip_prefix(p).unwrap_or(s).into())),
        "removesuffix" => return Some(from_args(args).map(|(p,): (&str,)| s.strip_suffix(p).unwrap_or(s).into())),
        "replace" => {
            let by = args.get(1).and_then(Value::as_str).map_or(0, str::len);
            let times = first.map_or(0, |old| s.matches(old).count());
            ensure(state, s.len().saturating_add(times.saturating_mul(by)))
        }
        "split" => ensure(state, parts(s, first).saturating_mul(BYTES_OF_AN_ELEMENT)),
        "splitlines" => ensure(state, parts(s, Some("\n")).saturating_mul(BYTES_OF_AN_ELEMENT)),
        "startswith" | "endswith" => state.consume_fuel(args.first().and_then(Value::len).unwrap_or(0) as u64),
        "format" => ensure(state, widths(s)),
        _ => Ok(()),
    };
    checked.err().map(Err)
}

/// Parts of a text between separators, or white space.
fn parts(s: &str, separator: Option<&str>) -> usize {
    match separator {
        Some(separator) => s.matches(separator).count() + 1,
        None => s.split_whitespace().count(),
    }
}

/// All numbers in a text together: no more characters than its widths and precisions ask for.
fn widths(format: &str) -> usize {
    let numbers = format.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty());
    numbers.map(|n| n.parse().unwrap_or(usize::MAX)).fold(format.len(), usize::saturating_add)
}

/// `str.join(list)`.
fn join(state: &State, separator: &str, args: &[Value]) -> Result<Value, Error> {
    use std::fmt::Write as _;
    let (values,): (&Value,) = from_args(args)?;
    let mut out = Payable { state, text: String::new() };
    for (i, value) in values.try_iter()?.enumerate() {
        state.consume_fuel(1)?;
        let between = if i > 0 { separator } else { "" };
        write!(out, "{between}{value}").map_err(|_| Error::from(ErrorKind::OutOfFuel))?;
    }
    Ok(Value::from(out.text))
}

/// A text as long as the steps left can pay for it.
struct Payable<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    text: String,
}

impl std::fmt::Write for Payable<'_, '_, '_> {
    fn write_str(&mut self, s: &str) -> std::fmt::Result {
        ensure(self.state, self.text.len().saturating_add(s.len())).map_err(|_| std::fmt::Error)?;
        self.text.push_str(s);
        Ok(())
    }
}

/// `str.rsplit(sep, maxsplit)`; white space parts the words where there is no separator.
fn rsplit(state: &State, s: &str, args: &[Value]) -> Result<Value, Error> {
    let (sep, limit): (Option<&str>, Option<i64>) = from_args(args)?;
    ensure(state, parts(s, sep).saturating_mul(BYTES_OF_AN_ELEMENT))?;
    let limit = limit.and_then(|n| usize::try_from(n).ok()).map_or(usize::MAX, |n| n.saturating_add(1));
    let mut parts: Vec<&str> = match sep {
        Some("") => return Err(Error::new(ErrorKind::InvalidOperation, "rsplit: the separator is empty")),
        Some(sep) => s.rsplitn(limit, sep).collect(),
        None => rsplit_words(s, limit),
    };
    parts.reverse();
    Ok(parts.into_iter().map(Value::from).collect())
}

/// At most `limit` parts, the last word first; the last part holds what is left.
fn rsplit_words(s: &str, limit: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = s.trim_end();
    while !rest.is_empty() {
        let cut = if parts.len() + 1 < limit { rest.rfind(char::is_whitespace) } else { None };
        let start = cut.map_or(0, |at| at + rest[at..].chars().next().map_or(0, char::len_utf8));
        parts.push(&rest[start..]);
        rest = rest[..start].trim_end();
    }
    parts
}

/// Jinja's test `sequence`: whatever has a length and elements, so texts and dictionaries too.
pub(super) fn is_sequence(v: &Value) -> bool {
    matches!(v.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined)
}

/// Jinja's test `iterable`, for which none is not.
pub(super) fn is_iterable(v: &Value) -> bool {
    !v.is_none() && v.try_iter().is_ok()
}

fn checked_width(width: usize) -> Result<usize, Error> {
    if width > INDENT_MAX {
        let what = format!("an indentation of {width} is more than the limit of {INDENT_MAX}");
        return Err(Error::new(ErrorKind::InvalidOperation, what));
    }
    Ok(width)
}

/// Jinja's `indent(width=4, first=false, blank=false)`; `width` may be the text to indent with.
///
/// Unlike minijinja's it keeps a newline at the end.
pub(super) fn indent(state: &State, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let args = args.into_values();
    let (text, width, first, blank, options): (&str, Option<Value>, Option<bool>, Option<bool>, Kwargs) =
        from_args(&args)?;
    let width = match width {
        None => options.get::<Option<Value>>("width")?,
        given => given,
    };
    let by = match &width {
        None => " ".repeat(4),
        Some(w) => match w.as_str() {
            Some(s) => s.to_owned(),
            None => " ".repeat(checked_width(usize::try_from(w.clone())?)?),
        },
    };
    checked_width(by.len())?;
    let flag = |given: Option<bool>, name: &str| -> Result<bool, Error> {
        Ok(given.or(options.get::<Option<bool>>(name)?).unwrap_or(false))
    };
    let (first, blank) = (flag(first, "first")?, flag(blank, "blank")?);
    options.assert_all_used()?;
    let breaks = text.chars().filter(|&c| is_break(c)).count() + 1;
    ensure(state, text.len().saturating_add(breaks.saturating_mul(by.len() + BYTES_OF_AN_ELEMENT)))?;
    let mut out = String::with_capacity(text.len());
    for (i, line) in lines(text).into_iter().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        if if i == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&by);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// Whether Python's `splitlines` ends a line at it.
fn is_break(c: char) -> bool {
    matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

/// The lines of a text and a newline, as Python's `splitlines` sees them; at least one.
fn lines(text: &str) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_break) {
        lines.push(&rest[..at]);
        let after = &rest[at..];
        let skip = if after.starts_with("\r\n") { 2 } else { after.chars().next().map_or(1, char::len_utf8) };
        rest = &after[skip..];
    }
    // What follows the last break ends with the added newline; a lone \r before it is one break with it.
    if !(rest.is_empty() && text.ends_with('\r')) {
        lines.push(rest);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_does() {
        let cases = [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e-5, "1e-05"),
            (1e16, "1e+16"),
            (1.5e-300, "1.5e-300"),
            (1e15, "1000000000000000.0"),
            (-0.0, "-0.0"),
            (0.0001, "0.0001"),
        ];
        for (x, text) in cases {
            assert_eq!(python_float(x), text);
        }
    }

    #[test]
    fn lines_are_those_of_splitlines_with_a_newline_added() {
        for (text, expected) in [
            ("", &[""][..]),
            ("a", &["a"]),
            ("a\n", &["a", ""]),
            ("a\r", &["a"]),
            ("a\r\nb\u{2028}c\x0b", &["a", "b", "c", ""]),
            ("\n\n", &["", "", ""]),
        ] {
            assert_eq!(lines(text), expected, "{text:?}");
        }
    }
}

//! Metadata values. Arrays of strings are kept as one buffer with offsets, so that 250,000 of them
//! cost two allocations.

use std::collections::HashMap;

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any integer type of the format.
    Int(i64),
    /// An unsigned 64-bit value that does not fit `Int`.
    BigUint(u64),
    /// `f32` or `f64`.
    Float(f64),
    /// `bool`.
    Bool(bool),
    /// A string; invalid UTF-8 is replaced.
    Str(String),
    /// An array.
    Array(Array),
}

/// A metadata array.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Any integer type of the format.
    Int(Vec<i64>),
    /// `f32` or `f64`.
    Float(Vec<f32>),
    /// `bool`.
    Bool(Vec<bool>),
    /// Strings.
    Str(StringArray),
    /// Arrays of arrays.
    Nested(Vec<Array>),
}

impl std::fmt::Display for Value {
    /// As a person writes it; of an array, the kind and the length.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Value::Int(v) => v.fmt(f),
            Value::BigUint(v) => v.fmt(f),
            Value::Float(v) => v.fmt(f),
            Value::Bool(v) => v.fmt(f),
            Value::Str(s) => write!(f, "\"{s}\""),
            Value::Array(a) => write!(f, "an array of {}", a.len()),
        }
    }
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Array::Int(v) => v.len(),
            Array::Float(v) => v.len(),
            Array::Bool(v) => v.len(),
            Array::Str(v) => v.len(),
            Array::Nested(v) => v.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Strings of bytes, stored back to back.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StringArray {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl StringArray {
    /// Appends one string.
    pub fn push(&mut self, s: &[u8]) {
        self.bytes.extend_from_slice(s);
        self.ends.push(self.bytes.len());
    }

    /// Appends one string that `write` appends to the buffer it is given.
    pub(super) fn push_with<E>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<(), E> {
        write(&mut self.bytes)?;
        self.ends.push(self.bytes.len());
        Ok(())
    }

    /// Gives spare capacity back.
    pub(super) fn shrink(&mut self) {
        self.bytes.shrink_to_fit();
        self.ends.shrink_to_fit();
    }

    /// Number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no string.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The bytes of string `i`, as stored (not necessarily UTF-8).
    pub fn get(&self, i: usize) -> Option<&[u8]> {
        let end = *self.ends.get(i)?;
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        Some(&self.bytes[start..end])
    }

    /// All strings in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).map(|i| self.get(i).unwrap_or_default())
    }
}

/// All metadata of a model, by key.
#[derive(Debug, Clone, Default)]
pub struct Metadata {
    values: HashMap<String, Value>,
    order: Vec<String>,
}

impl Metadata {
    /// Adds a value; `false` if the key is there already.
    pub fn insert(&mut self, key: String, value: Value) -> bool {
        if self.values.contains_key(&key) {
            return false;
        }
        self.order.push(key.clone());
        self.values.insert(key, value);
        true
    }

    /// Adds a value, or replaces the one under that key.
    pub fn set(&mut self, key: &str, value: Value) {
        if self.values.insert(key.to_owned(), value).is_none() {
            self.order.push(key.to_owned());
        }
    }

    /// Gives keys other names, unless there is such a key; their places in the order stay.
    pub(super) fn rename(&mut self, to: impl Fn(&str) -> Option<String>) {
        for key in &mut self.order {
            let Some(new) = to(key).filter(|new| !self.values.contains_key(new)) else { continue };
            if let Some(value) = self.values.remove(key) {
                self.values.insert(new.clone(), value);
                *key = new;
            }
        }
    }

    /// Keys and values in the file's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.order.iter().map(|k| (k.as_str(), &self.values[k]))
    }

    /// The value under `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// Removes and returns a value, for arrays that are large and read once.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let value = self.values.remove(key)?;
        self.order.retain(|k| k != key);
        Some(value)
    }

    /// A string.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::Str(s) => Some(s),
            _ => None,
        }
    }

    /// A non-negative integer.
    pub fn uint(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Value::Int(v) => u64::try_from(*v).ok(),
            Value::BigUint(v) => Some(*v),
            _ => None,
        }
    }

    /// A non-negative integer that fits 32 bits, such as a token id.
    pub fn u32(&self, key: &str) -> Option<u32> {
        self.uint(key).and_then(|v| u32::try_from(v).ok())
    }

    /// A float (or an integer read as one).
    pub fn float(&self, key: &str) -> Option<f32> {
        match self.get(key)? {
            Value::Float(v) => Some(*v as f32),
            Value::Int(v) => Some(*v as f32),
            _ => None,
        }
    }

    /// A bool.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(v) => Some(*v),
            _ => None,
        }
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Option<&StringArray> {
        match self.get(key)? {
            Value::Array(Array::Str(v)) => Some(v),
            _ => None,
        }
    }

    /// An array of integers.
    pub fn ints(&self, key: &str) -> Option<&[i64]> {
        match self.get(key)? {
            Value::Array(Array::Int(v)) => Some(v),
            _ => None,
        }
    }

    /// An array of floats.
    pub fn floats(&self, key: &str) -> Option<&[f32]> {
        match self.get(key)? {
            Value::Array(Array::Float(v)) => Some(v),
            _ => None,
        }
    }
}

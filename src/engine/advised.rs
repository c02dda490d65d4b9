//! What a file advises for drawing tokens: `general.sampling.*`, which stands where the command line says nothing.
//!
//! Source: llama.cpp's `common/common.cpp`, which does the same; converters write there what
//! `generation_config.json` holds.

use super::sampler::SamplerParams;
use crate::gguf::{Metadata, Value};

const PREFIX: &str = "general.sampling.";
/// llama.cpp's order of filters, by its names.
const SEQUENCE: &str = "penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature";

/// A number within bounds, and where it goes.
type Number = (&'static str, f32, f32, fn(&mut SamplerParams, f32));

const NUMBERS: [Number; 6] = [
    ("temp", -100.0, 100.0, |p, v| p.temp = v.max(0.0)),
    ("top_p", 0.0, 1.0, |p, v| p.top_p = v),
    ("min_p", 0.0, 1.0, |p, v| p.min_p = v),
    ("xtc_probability", 0.0, 1.0, |p, v| p.xtc_probability = v),
    ("xtc_threshold", 0.0, 1.0, |p, v| p.xtc_threshold = v),
    ("penalty_repeat", f32::MIN_POSITIVE, 1e6, |p, v| p.repeat_penalty = v),
];

impl SamplerParams {
    /// The defaults for a file, and a line on each of its values that is not followed.
    pub fn advised(m: &Metadata) -> (SamplerParams, Vec<String>) {
        let (mut p, mut notes) = (SamplerParams::default(), Vec::new());
        let mut note = |name: &str, v: &Value, why: &str| notes.push(format!("metadata {PREFIX}{name} is {v}: {why}"));
        for (name, from, to, set) in NUMBERS {
            let key = format!("{PREFIX}{name}");
            let Some(found) = m.get(&key) else { continue };
            match m.float(&key).filter(|v| (from..=to).contains(v)) {
                Some(v) => set(&mut p, v),
                None => note(name, found, &format!("a number from {from} to {to} was expected, so it is not followed")),
            }
        }
        if let Some(found) = m.get(&format!("{PREFIX}top_k")) {
            match found {
                Value::Int(k) => p.top_k = usize::try_from(*k).unwrap_or(0),
                _ => note("top_k", found, "a whole number was expected, so it is not followed"),
            }
        }
        if let Some(found) = m.get(&format!("{PREFIX}penalty_last_n")) {
            match found {
                Value::Int(n) if *n >= -1 => p.repeat_last_n = usize::try_from(*n).unwrap_or(usize::MAX),
                _ => note("penalty_last_n", found, "a whole number from -1 was expected, so it is not followed"),
            }
        }
        if let Some(found) = m.get(&format!("{PREFIX}mirostat"))
            && !matches!(found, Value::Int(0))
        {
            note("mirostat", found, "Mirostat is not built; the other filters draw");
        }
        if let Some(found) = m.get(&format!("{PREFIX}sequence"))
            && !is_in_order(found)
        {
            note("sequence", found, &format!("filters work in llama.cpp's default order, {SEQUENCE}"));
        }
        (p, notes)
    }
}

/// Whether a sequence of filters is part of the default one, in its order.
fn is_in_order(sequence: &Value) -> bool {
    let Value::Str(sequence) = sequence else { return false };
    let mut order = SEQUENCE.split(';');
    sequence.split(';').filter(|s| !s.is_empty()).all(|name| order.any(|of| of == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[(&str, Value)]) -> (SamplerParams, Vec<String>) {
        let mut m = Metadata::default();
        values.iter().for_each(|(k, v)| m.set(&format!("{PREFIX}{k}"), v.clone()));
        SamplerParams::advised(&m)
    }

    #[test]
    fn a_file_without_advice_leaves_the_defaults() {
        assert_eq!(of(&[]), (SamplerParams::default(), Vec::new()));
    }

    #[test]
    fn advice_is_followed_within_bounds() {
        let (p, notes) =
            of(&[("temp", Value::Float(0.6)), ("top_k", Value::Int(20)), ("penalty_last_n", Value::Int(-1))]);
        assert_eq!((p.temp, p.top_k, p.repeat_last_n, notes.len()), (0.6, 20, usize::MAX, 0));
        let (p, notes) =
            of(&[("top_p", Value::Float(3.0)), ("temp", Value::Str("hot".into())), ("mirostat", Value::Int(2))]);
        assert_eq!(p, SamplerParams::default());
        assert_eq!(notes.len(), 3, "{notes:?}");
    }

    #[test]
    fn a_part_of_the_order_of_filters_is_none_of_its_own() {
        for sequence in ["top_k;top_p;temperature", SEQUENCE, ""] {
            assert!(is_in_order(&Value::Str(sequence.into())), "{sequence}");
        }
        for sequence in ["temperature;top_k", "mirostat"] {
            assert!(!is_in_order(&Value::Str(sequence.into())), "{sequence}");
        }
    }
}

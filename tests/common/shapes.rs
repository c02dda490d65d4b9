//! Models whose shapes lie in tests/data/shapes (tests/fidelity/shapes.py): headers in front of a hole.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::{File, T, V, tiny};

/// Bytes of a tensor.
fn bytes(shape: &[u64], ty: u32) -> u64 {
    let n: u64 = shape.iter().product();
    match ty {
        0 => n * 4,
        1 => n * 2,
        8 => n / 32 * 34,
        12 => n / 256 * 144,
        14 => n / 256 * 210,
        39 => n / 32 * 17,
        other => panic!("type {other}"),
    }
}

fn value(v: &Value) -> V {
    match v[0].as_str().unwrap() {
        "uint32" => V::U32(v[1].as_u64().unwrap() as u32),
        "float32" => V::F32(v[1].as_f64().unwrap() as f32),
        "bool" => V::Bool(v[1].as_bool().unwrap()),
        "string" => V::Str(v[1].as_str().unwrap().into()),
        "array" => V::I32s(v[2].as_array().unwrap().iter().map(|i| i.as_i64().unwrap() as i32).collect()),
        other => panic!("{other}"),
    }
}

/// Writes the header of the model called `name` to `dir`; of `NAME/N` its first blocks.
pub fn shaped(dir: &Path, name: &str) -> PathBuf {
    let (name, layers) = match name.split_once('/') {
        Some((name, n)) => (name, n.parse().unwrap()),
        None => (name, u64::MAX),
    };
    let text = std::fs::read_to_string(format!("tests/data/shapes/{name}.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let mut meta: Vec<(String, V)> =
        json["keys"].as_object().unwrap().iter().map(|(k, v)| (k.clone(), value(v))).collect();
    for (_, v) in meta.iter_mut().filter(|(k, _)| k.ends_with(".block_count")) {
        let V::U32(n) = v else { panic!("a count of blocks") };
        *n = layers.min(u64::from(*n)) as u32;
    }
    meta.extend(tiny(1).meta.into_iter().filter(|(k, _)| k.starts_with("tokenizer.")));
    let mut file = File { magic: *b"GGUF", version: 3, meta, tensors: vec![], offsets: vec![] };
    let mut at = 0u64;
    let mut add = |prefix: String, t: &Value| {
        let shape: Vec<u64> = t[1].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
        let ty = t[2].as_u64().unwrap() as u32;
        file.offsets.push((file.tensors.len(), at));
        at += bytes(&shape, ty).next_multiple_of(32);
        file.tensors.push(T { name: prefix + t[0].as_str().unwrap(), shape, ty, data: vec![] });
    };
    json["tensors"].as_array().unwrap().iter().for_each(|t| add(String::new(), t));
    for alike in json["alike"].as_array().unwrap() {
        for block in alike["blocks"].as_array().unwrap().iter().filter(|b| b.as_u64().unwrap() < layers) {
            alike["tensors"].as_array().unwrap().iter().for_each(|t| add(format!("blk.{block}."), t));
        }
    }
    let path = file.write(dir, &format!("{name}.gguf"));
    let f = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    f.set_len(f.metadata().unwrap().len() + at).unwrap();
    path
}

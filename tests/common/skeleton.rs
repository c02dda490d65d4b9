//! Models with the true shapes of known ones and no weights: headers in front of a hole.

use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use crate::common::{File, T, V, tiny};

/// Sizes of a model.
#[derive(Clone, Copy)]
pub struct Shape {
    pub arch: &'static str,
    pub layers: u64,
    pub width: u64,
    pub ffn: u64,
    pub heads: u64,
    pub kv_heads: u64,
    pub vocab: u64,
    pub biases: bool,
    pub freqs: bool,
}

pub const LLAMA3_8B: Shape = Shape {
    arch: "llama",
    layers: 32,
    width: 4096,
    ffn: 14336,
    heads: 32,
    kv_heads: 8,
    vocab: 128_256,
    biases: false,
    freqs: true,
};
pub const LLAMA3_70B: Shape = Shape { layers: 80, width: 8192, ffn: 28672, heads: 64, ..LLAMA3_8B };
pub const QWEN2_32B: Shape = Shape {
    arch: "qwen2",
    layers: 64,
    width: 5120,
    ffn: 27648,
    heads: 40,
    kv_heads: 8,
    vocab: 152_064,
    biases: true,
    freqs: false,
};

const F32: u32 = 0;
const Q8_0: u32 = 8;
const Q4_K: u32 = 12;
const Q6_K: u32 = 14;

/// Bytes of a tensor.
fn bytes(shape: &[u64], ty: u32) -> u64 {
    let n: u64 = shape.iter().product();
    match ty {
        Q8_0 => n / 32 * 34,
        Q4_K => n / 256 * 144,
        Q6_K => n / 256 * 210,
        _ => n * 4,
    }
}

/// Writes the header of a model whose matrices have the types of `mix`: Q8_0, Q6_K or Q4_K_M.
pub fn skeleton(dir: &Path, name: &str, s: Shape, mix: &str) -> PathBuf {
    let meta = |key: &str, v: u64| (format!("{}.{key}", s.arch), V::U32(v as u32));
    let tokenizer = tiny(1).meta.into_iter().filter(|(k, _)| k.starts_with("tokenizer."));
    let mut file = File {
        magic: *b"GGUF",
        version: 3,
        meta: vec![("general.architecture".into(), V::Str(s.arch.into()))],
        tensors: vec![],
        offsets: vec![],
    };
    file.meta.extend([
        meta("block_count", s.layers),
        meta("context_length", 8192),
        meta("embedding_length", s.width),
        meta("feed_forward_length", s.ffn),
        meta("attention.head_count", s.heads),
        meta("attention.head_count_kv", s.kv_heads),
        (format!("{}.attention.layer_norm_rms_epsilon", s.arch), V::F32(1e-5)),
    ]);
    file.meta.extend(tokenizer);
    let mut at = 0u64;
    let mut add = |name: String, shape: &[u64], ty: u32| {
        file.offsets.push((file.tensors.len(), at));
        file.tensors.push(T { name, shape: shape.to_vec(), ty, data: vec![] });
        at += bytes(shape, ty).next_multiple_of(32);
    };
    let plain = match mix {
        "Q8_0" => Q8_0,
        "Q6_K" => Q6_K,
        _ => Q4_K,
    };
    let q4_k_m = mix == "Q4_K_M";
    let kv = s.width / s.heads * s.kv_heads;
    add("token_embd.weight".into(), &[s.width, s.vocab], plain);
    if s.freqs {
        add("rope_freqs.weight".into(), &[s.width / s.heads / 2], F32);
    }
    for i in 0..s.layers {
        let eighth = s.layers / 8;
        let more = i < eighth || i >= 7 * s.layers / 8 || (i - eighth) % 3 == 2;
        let larger = if q4_k_m && more { Q6_K } else { plain };
        let mut w = |name: &str, shape: &[u64], ty| add(format!("blk.{i}.{name}"), shape, ty);
        w("attn_norm.weight", &[s.width], F32);
        w("attn_q.weight", &[s.width, s.width], plain);
        w("attn_k.weight", &[s.width, kv], plain);
        w("attn_v.weight", &[s.width, kv], larger);
        w("attn_output.weight", &[s.width, s.width], plain);
        if s.biases {
            w("attn_q.bias", &[s.width], F32);
            w("attn_k.bias", &[kv], F32);
            w("attn_v.bias", &[kv], F32);
        }
        w("ffn_norm.weight", &[s.width], F32);
        w("ffn_gate.weight", &[s.width, s.ffn], plain);
        w("ffn_up.weight", &[s.width, s.ffn], plain);
        w("ffn_down.weight", &[s.ffn, s.width], larger);
    }
    add("output_norm.weight".into(), &[s.width], F32);
    add("output.weight".into(), &[s.width, s.vocab], if q4_k_m { Q6_K } else { plain });
    let path = file.write(dir, name);
    let mut f = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let header = f.metadata().unwrap().len();
    f.set_len(header + at).unwrap();
    // Factors of the rotary embedding are divided by: ones, where all else is zeros.
    for (i, offset) in file.offsets.iter().filter(|(i, _)| file.tensors[*i].name == "rope_freqs.weight") {
        f.seek(SeekFrom::Start(header + offset)).unwrap();
        let ones = 1f32.to_le_bytes().repeat(file.tensors[*i].shape[0] as usize);
        f.write_all(&ones).unwrap();
    }
    path
}

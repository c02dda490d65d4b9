//! A small GGUF writer and a tiny model, so that black-box tests need no download.
#![allow(dead_code, reason = "each test binary uses a part")]

pub mod families;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Metadata values that the tests write.
#[derive(Clone)]
pub enum V {
    U32(u32),
    U64(u64),
    F32(f32),
    Bool(bool),
    Str(String),
    Strs(Vec<String>),
    I32s(Vec<i32>),
}

/// A tensor: name, shape (columns first), type id, data.
#[derive(Clone)]
pub struct T {
    pub name: String,
    pub shape: Vec<u64>,
    pub ty: u32,
    pub data: Vec<u8>,
}

/// What a GGUF file holds; every field may be bent by a test.
#[derive(Clone)]
pub struct File {
    pub magic: [u8; 4],
    pub version: u32,
    pub meta: Vec<(String, V)>,
    pub tensors: Vec<T>,
    /// Overrides of single fields: (tensor, offset).
    pub offsets: Vec<(usize, u64)>,
}

fn put_str(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

impl File {
    /// The file's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.meta.len() as u64).to_le_bytes());
        for (k, v) in &self.meta {
            put_str(&mut out, k);
            let id = |out: &mut Vec<u8>, id: u32| out.extend(id.to_le_bytes());
            match v {
                V::U32(x) => (id(&mut out, 4), out.extend(x.to_le_bytes())).1,
                V::U64(x) => (id(&mut out, 10), out.extend(x.to_le_bytes())).1,
                V::F32(x) => (id(&mut out, 6), out.extend(x.to_le_bytes())).1,
                V::Bool(x) => (id(&mut out, 7), out.push(u8::from(*x))).1,
                V::Str(x) => (id(&mut out, 8), put_str(&mut out, x)).1,
                V::Strs(x) => {
                    id(&mut out, 9);
                    id(&mut out, 8);
                    out.extend((x.len() as u64).to_le_bytes());
                    x.iter().for_each(|s| put_str(&mut out, s));
                }
                V::I32s(x) => {
                    id(&mut out, 9);
                    id(&mut out, 5);
                    out.extend((x.len() as u64).to_le_bytes());
                    x.iter().for_each(|i| out.extend(i.to_le_bytes()));
                }
            }
        }
        let mut at = 0u64;
        for (i, t) in self.tensors.iter().enumerate() {
            put_str(&mut out, &t.name);
            out.extend((t.shape.len() as u32).to_le_bytes());
            t.shape.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(t.ty.to_le_bytes());
            let offset = self.offsets.iter().find(|o| o.0 == i).map_or(at, |o| o.1);
            out.extend(offset.to_le_bytes());
            at += (t.data.len() as u64).next_multiple_of(32);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        for t in &self.tensors {
            out.extend(&t.data);
            out.resize(out.len().next_multiple_of(32), 0);
        }
        out
    }

    /// Writes the file to `dir`.
    pub fn write(&self, dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }

    /// Replaces a metadata value.
    pub fn set(&mut self, key: &str, v: V) {
        match self.meta.iter_mut().find(|(k, _)| k == key) {
            Some(entry) => entry.1 = v,
            None => self.meta.push((key.into(), v)),
        }
    }

    /// The tensor called `name`.
    pub fn tensor(&mut self, name: &str) -> &mut T {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap()
    }
}

/// The printable stand-ins of byte-level BPE.
fn alphabet() -> Vec<String> {
    let keep = |b: u32| (33..127).contains(&b) || (161..173).contains(&b) || (174..256).contains(&b);
    let mut spare = 256;
    (0..256u32)
        .map(|b| {
            let c = if keep(b) {
                b
            } else {
                spare += 1;
                spare - 1
            };
            char::from_u32(c).unwrap().to_string()
        })
        .collect()
}

/// A llama model of `layers` blocks with pseudo-random F32 weights.
pub fn tiny(layers: u64) -> File {
    sized(layers, 64, 96)
}

/// [`tiny`] with `d` columns and feed-forward parts `f` wide.
pub fn sized(layers: u64, d: u64, f: u64) -> File {
    let vocab = 258u64;
    let mut tokens = alphabet();
    tokens.extend(["<|bos|>".to_string(), "<|eos|>".to_string()]);
    let mut kinds = vec![1; 256];
    kinds.extend([3, 3]);
    let meta = vec![
        ("general.architecture".into(), V::Str("llama".into())),
        ("llama.block_count".into(), V::U32(layers as u32)),
        ("llama.context_length".into(), V::U32(256)),
        ("llama.embedding_length".into(), V::U32(d as u32)),
        ("llama.feed_forward_length".into(), V::U32(f as u32)),
        ("llama.attention.head_count".into(), V::U32(4)),
        ("llama.attention.head_count_kv".into(), V::U32(2)),
        ("llama.attention.layer_norm_rms_epsilon".into(), V::F32(1e-5)),
        ("tokenizer.ggml.model".into(), V::Str("gpt2".into())),
        ("tokenizer.ggml.pre".into(), V::Str("gpt-2".into())),
        ("tokenizer.ggml.tokens".into(), V::Strs(tokens)),
        ("tokenizer.ggml.token_type".into(), V::I32s(kinds)),
        ("tokenizer.ggml.merges".into(), V::Strs(vec![])),
        ("tokenizer.ggml.bos_token_id".into(), V::U32(256)),
        ("tokenizer.ggml.eos_token_id".into(), V::U32(257)),
        ("tokenizer.ggml.add_bos_token".into(), V::Bool(true)),
    ];
    let mut state = 1u64;
    let mut tensor = |name: String, shape: &[u64], scale: f32| {
        let n: u64 = shape.iter().product();
        let data = (0..n).flat_map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let unit = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            (if scale == 0.0 { 1.0 + unit * 0.1 } else { unit * scale }).to_le_bytes()
        });
        T { name, shape: shape.to_vec(), ty: 0, data: data.collect() }
    };
    let mut tensors = vec![tensor("token_embd.weight".into(), &[d, vocab], 1.0)];
    for i in 0..layers {
        let mut add = |name: &str, shape: &[u64]| {
            let scale = if shape.len() == 1 { 0.0 } else { 0.4 };
            tensors.push(tensor(format!("blk.{i}.{name}.weight"), shape, scale));
        };
        add("attn_norm", &[d]);
        add("attn_q", &[d, d]);
        add("attn_k", &[d, d / 2]);
        add("attn_v", &[d, d / 2]);
        add("attn_output", &[d, d]);
        add("ffn_norm", &[d]);
        add("ffn_gate", &[d, f]);
        add("ffn_up", &[d, f]);
        add("ffn_down", &[f, d]);
    }
    tensors.push(tensor("output_norm.weight".into(), &[d], 0.0));
    tensors.push(tensor("output.weight".into(), &[d, vocab], 0.4));
    File { magic: *b"GGUF", version: 3, meta, tensors, offsets: vec![] }
}

/// [`tiny`] with four experts a block, of which two are used.
pub fn tiny_moe(layers: u64) -> File {
    with_experts(layers, 4)
}

/// [`tiny`] with 16 experts a block, of which two are used: enough for caches of them.
pub fn many_experts(layers: u64) -> File {
    with_experts(layers, 16)
}

fn with_experts(layers: u64, n: u64) -> File {
    let mut f = tiny(layers);
    f.set("llama.expert_count", V::U32(n as u32));
    f.set("llama.expert_used_count", V::U32(2));
    for i in 0..layers {
        for what in ["gate", "up", "down"] {
            let t = f.tensor(&format!("blk.{i}.ffn_{what}.weight"));
            t.name = format!("blk.{i}.ffn_{what}_exps.weight");
            t.shape.push(n);
            let one = t.data.clone();
            for e in 1..n {
                // Other experts are the first with other signs here and there.
                t.data.extend(one.chunks(4).enumerate().flat_map(|(j, v)| {
                    let flip = if (j as u64).is_multiple_of(2 + e) { 0x80 } else { 0 };
                    [v[0], v[1], v[2], v[3] ^ flip]
                }));
            }
        }
        let norm = f.tensor(&format!("blk.{i}.attn_q.weight")).clone();
        let data = norm.data[..64 * 4 * n as usize].to_vec();
        f.tensors.push(T { name: format!("blk.{i}.ffn_gate_inp.weight"), shape: vec![64, n], ty: 0, data });
    }
    f
}

/// The binary under test: `$NT_BIN` where it is set, so that a test can be shown to fail on an earlier build.
pub fn bin() -> std::ffi::OsString {
    std::env::var_os("NT_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_nt").into())
}

/// Runs the binary.
pub fn nt<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Output {
    Command::new(bin()).args(args).output().unwrap()
}

/// A committed input of `tests/fixtures/cases`, made by `make_cases.py` there.
pub fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cases").join(name)
}

/// Runs the binary and expects an exit code and a sentence on stderr that holds all of `words`.
pub fn fails<S: AsRef<std::ffi::OsStr> + std::fmt::Debug>(args: &[S], code: i32, words: &[&str]) {
    let out = nt(args);
    let err = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}\n{err}");
    for w in words {
        assert!(err.contains(w), "{args:?}: {w:?} is not in {err:?}");
    }
    assert!(!err.contains("panicked") && !err.contains("RUST_BACKTRACE"), "{err}");
}

/// Records the model as it is now, as if it lay on a drive; `data` is the folder of records (`$XDG_DATA_HOME`).
pub fn record(model: &Path, data: &Path) {
    use nt::storage::checksum::sums;
    use nt::storage::library::{Library, Recorded};
    use nt::storage::manifest::Manifest;
    let bytes = std::fs::read(model).unwrap();
    let size = bytes.len() as u64;
    let manifest = Manifest {
        file: model.file_name().unwrap().to_string_lossy().into_owned(),
        path: model.into(),
        size,
        serial: "S1".into(),
        model: "Model".into(),
        namespace: 1,
        extents: vec![(0, 1 << 20, size.next_multiple_of(4096))],
        crc32c: sums(&bytes[..]).unwrap(),
        requant: None,
    };
    Library::at(vec![data.join("nt")]).save(&Recorded { manifest, header: bytes[..4096].to_vec() }).unwrap();
}

//! Headers as Ollama's own converter writes them, put into the form of llama.cpp's, which is what all other rooms read.
//!
//! Only what is certain is translated: names of keys and tensors, and values that such files leave out because Ollama
//! has them in its code. What is still missing then is refused like that of any other file.
//!
//! Source: `llama/compat/llama-ollama-compat.cpp` of Ollama, which does the same for llama.cpp.

use super::value::{Array, Metadata, Value};
use super::{Gguf, StringArray};

/// Ids of Llama 3's vocabulary that no other one has at these places.
const LLAMA_3: [(usize, &[u8]); 2] = [(128_006, b"<|start_header_id|>"), (128_009, b"<|eot_id|>")];
/// The context from which Gemma 3 was stretched eightfold.
const GEMMA_3_STRETCHED: u64 = 131_072;

impl Gguf {
    /// Puts the header into llama.cpp's form; what was done is added to [`Gguf::translated`].
    pub(super) fn translate(&mut self) {
        let Some(arch) = self.metadata.str("general.architecture").map(str::to_owned) else { return };
        match arch.as_str() {
            "gemma3" => self.gemma3(),
            "gptoss" => self.gptoss(),
            "olmo3" => self.prefix("olmo3", "olmo2"),
            "mistral3" => self.mistral3(),
            "lfm2" => self.lfm2(),
            "qwen35" | "qwen35moe" | "qwen3next" => self.qwen(&arch),
            "llama" => self.llama3(),
            _ => {}
        }
        if let Some(arch) = self.metadata.str("general.architecture").map(str::to_owned) {
            // YaRN's rotations.
            self.key(&format!("{arch}.rope.scaling.beta_fast"), &format!("{arch}.rope.scaling.yarn_beta_fast"));
            self.key(&format!("{arch}.rope.scaling.beta_slow"), &format!("{arch}.rope.scaling.yarn_beta_slow"));
            self.key(
                &format!("{arch}.rope.scaling.extrapolation_factor"),
                &format!("{arch}.rope.scaling.yarn_ext_factor"),
            );
        }
    }

    fn gemma3(&mut self) {
        let m = &self.metadata;
        let marks = ["mm.tokens_per_image", "rope.global.freq_base", "rope.local.freq_base"];
        let own = marks.iter().any(|k| m.get(&format!("gemma3.{k}")).is_some())
            || m.get("gemma3.attention.layer_norm_rms_epsilon").is_none()
            || self.tensors.iter().any(|t| t.name.starts_with("v.") || t.name.starts_with("mm."));
        if !own || self.tensor("dense.0.weight").is_some() {
            return;
        }
        self.key("gemma3.rope.global.freq_base", "gemma3.rope.freq_base");
        self.key("gemma3.rope.local.freq_base", "gemma3.rope.freq_base_swa");
        self.missing("gemma3.attention.layer_norm_rms_epsilon", Value::Float(1e-6));
        self.missing("gemma3.rope.freq_base", Value::Float(1e6));
        self.missing("gemma3.rope.freq_base_swa", Value::Float(1e4));
        let scaled =
            ["type", "factor"].iter().any(|k| self.metadata.get(&format!("gemma3.rope.scaling.{k}")).is_some());
        if !scaled && self.metadata.uint("gemma3.context_length").is_some_and(|n| n >= GEMMA_3_STRETCHED) {
            self.missing("gemma3.rope.scaling.type", Value::Str("linear".into()));
            self.missing("gemma3.rope.scaling.factor", Value::Float(8.0));
        }
        self.cut_vocabulary();
    }

    /// Takes the tokens off that have no row in the embedding: those that stand for parts of images.
    fn cut_vocabulary(&mut self) {
        let Some(rows) = self.tensor("token_embd.weight").and_then(|t| t.shape.get(1)) else { return };
        let Ok(rows) = usize::try_from(*rows) else { return };
        let Some(found) = self.metadata.strings("tokenizer.ggml.tokens").map(StringArray::len) else { return };
        if found <= rows {
            return;
        }
        for key in ["tokens", "scores", "token_type"] {
            self.metadata.cut(&format!("tokenizer.ggml.{key}"), rows);
        }
        self.translated.push(format!("{} tokens without a row in the embedding are left out", found - rows));
    }

    fn gptoss(&mut self) {
        // Such a tensor has the rows of gate and up in turn, which nothing here computes.
        if self.tensors.iter().any(|t| t.name.contains(".ffn_gate_up_exps")) {
            return;
        }
        self.prefix("gptoss", "gpt-oss");
        let width = self.tensor("blk.0.ffn_gate_exps.weight").and_then(|t| t.shape.get(1).copied());
        if let Some(width) = width.and_then(|w| i64::try_from(w).ok()) {
            self.missing("gpt-oss.expert_feed_forward_length", Value::Int(width));
        }
        self.missing("gpt-oss.rope.scaling.type", Value::Str("yarn".into()));
        self.pre_tokenizer("gpt-4o", |_| true);
        self.tensors_called(".attn_out.", ".attn_output.");
        self.tensors_called(".ffn_norm.", ".post_attention_norm.");
        self.rename(|name| name.ends_with(".attn_sinks").then(|| format!("{name}.weight")));
    }

    fn mistral3(&mut self) {
        self.key("mistral3.rope.scaling.mscale_all_dim", "mistral3.rope.scaling.yarn_log_multiplier");
        self.key("mistral3.rope.scaling_beta", "mistral3.attention.temperature_scale");
        let own = self.tensors.iter().any(|t| t.name.starts_with("v.") || t.name.starts_with("mm."));
        if own {
            self.pre_tokenizer("tekken", |found| matches!(found, "" | "default"));
        }
    }

    fn lfm2(&mut self) {
        if self.tensor("token_embd_norm.weight").is_some() || self.tensor("output_norm.weight").is_none() {
            return;
        }
        self.rename(|name| (name == "output_norm.weight").then(|| "token_embd_norm.weight".into()));
        self.pre_tokenizer("lfm2", |_| true);
        const FF: &str = "lfm2.feed_forward_length";
        let rows = self.tensor("blk.0.ffn_gate.weight").and_then(|t| t.shape.get(1).copied());
        if let Some(rows) = rows.filter(|&r| self.metadata.uint(FF) != Some(r)).and_then(|r| i64::try_from(r).ok()) {
            self.metadata.set(FF, Value::Int(rows));
            self.translated.push(format!("{FF} is {rows}, the rows of blk.0.ffn_gate.weight"));
        }
    }

    fn qwen(&mut self, arch: &str) {
        self.rename(|name| name.ends_with(".ssm_dt").then(|| format!("{name}.bias")));
        // 0 for blocks with a recurrence, whose places follow from the interval.
        let key = format!("{arch}.attention.head_count_kv");
        let interval = self.metadata.uint(&format!("{arch}.full_attention_interval")).unwrap_or(4) as usize;
        let Some(counts) = self.metadata.ints(&key) else { return };
        let max = counts.iter().copied().max().unwrap_or(0);
        let expected = |i: usize| if interval > 0 && (i + 1).is_multiple_of(interval) { max } else { 0 };
        if max > 0 && counts.contains(&0) && counts.iter().enumerate().all(|(i, &n)| n == expected(i)) {
            self.metadata.set(&key, Value::Int(max));
            self.translated.push(format!("{key} is {max}, in blocks with attention"));
        }
    }

    /// Files of Llama 3's first days name no pre-tokenizer.
    fn llama3(&mut self) {
        let Some(tokens) = self.metadata.strings("tokenizer.ggml.tokens") else { return };
        if LLAMA_3.iter().all(|(id, text)| tokens.get(*id) == Some(text)) {
            self.pre_tokenizer("llama-bpe", |found| matches!(found, "" | "default"));
        }
    }

    /// Names the pre-tokenizer where `wrong` holds for what the file names; a file that names none has "".
    fn pre_tokenizer(&mut self, name: &str, wrong: impl Fn(&str) -> bool) {
        const KEY: &str = "tokenizer.ggml.pre";
        let found = self.metadata.str(KEY).unwrap_or_default();
        if self.metadata.str("tokenizer.ggml.model") == Some("gpt2") && found != name && wrong(found) {
            self.metadata.set(KEY, Value::Str(name.into()));
            self.translated.push(format!("{KEY} is {name}"));
        }
    }

    /// An architecture under another name, with its keys.
    fn prefix(&mut self, from: &str, to: &str) {
        self.metadata.set("general.architecture", Value::Str(to.into()));
        let (old, new) = (format!("{from}."), format!("{to}."));
        self.metadata.rename(|key| key.strip_prefix(&old).map(|rest| format!("{new}{rest}")));
        self.translated.push(format!("architecture {from} is {to}"));
    }

    /// A key under another name, unless the file has that one, too.
    fn key(&mut self, from: &str, to: &str) {
        if self.metadata.get(from).is_some() && self.metadata.get(to).is_none() {
            self.metadata.rename(|key| (key == from).then(|| to.to_owned()));
            self.translated.push(format!("{from} is {to}"));
        }
    }

    /// A value that the file leaves out.
    fn missing(&mut self, key: &str, value: Value) {
        let said = format!("{key} is {value}");
        if self.metadata.insert(key.to_owned(), value) {
            self.translated.push(said);
        }
    }

    fn tensors_called(&mut self, from: &str, to: &str) {
        self.rename(|name| name.contains(from).then(|| name.replacen(from, to, 1)));
    }

    /// Tensors under other names, unless the file has those, too.
    fn rename(&mut self, to: impl Fn(&str) -> Option<String>) {
        let mut renamed = (0, String::new());
        for i in 0..self.tensors.len() {
            let Some(new) = to(&self.tensors[i].name).filter(|new| self.tensor(new).is_none()) else { continue };
            let old = std::mem::replace(&mut self.tensors[i].name, new.clone());
            if renamed.0 == 0 {
                renamed.1 = format!("tensor {old} is {new}");
            }
            renamed.0 += 1;
            self.by_name.remove(&old);
            self.by_name.insert(new, i);
        }
        match renamed {
            (0, _) => {}
            (1, said) => self.translated.push(said),
            (n, said) => self.translated.push(format!("{said}, and {} more of the kind", n - 1)),
        }
    }
}

impl Metadata {
    /// Cuts an array to its first `n` elements.
    fn cut(&mut self, key: &str, n: usize) {
        let cut = match self.get(key) {
            Some(Value::Array(Array::Int(v))) => Array::Int(v.iter().take(n).copied().collect()),
            Some(Value::Array(Array::Float(v))) => Array::Float(v.iter().take(n).copied().collect()),
            Some(Value::Array(Array::Str(v))) => {
                let mut cut = StringArray::default();
                v.iter().take(n).for_each(|s| cut.push(s));
                cut.shrink();
                Array::Str(cut)
            }
            _ => return,
        };
        self.set(key, Value::Array(cut));
    }
}

//! Tiny models of newer architectures, in llama.cpp's form.

use super::{File, T, V, tiny, tiny_moe};

/// Values that look random and are the same every time, around `at`.
pub fn wave(n: u64, at: f32, size: f32) -> Vec<u8> {
    (0..n).flat_map(|i| (at + ((i * 37 % 101) as f32 / 101.0 - 0.5) * size).to_le_bytes()).collect()
}

/// Adds a tensor of F32.
pub fn add(f: &mut File, name: &str, shape: &[u64], data: Vec<u8>) {
    f.tensors.push(T { name: name.into(), shape: shape.to_vec(), ty: 0, data });
}

/// Gives keys that begin with the architecture's name another beginning.
pub fn as_architecture(f: &mut File, from: &str, to: &str) {
    f.set("general.architecture", V::Str(to.into()));
    let prefix = format!("{from}.");
    for (key, _) in &mut f.meta {
        if let Some(rest) = key.strip_prefix(&prefix) {
            *key = format!("{to}.{rest}");
        }
    }
}

/// Replaces the first `from` in the names of tensors.
pub fn tensors_called(f: &mut File, from: &str, to: &str) {
    f.tensors.iter_mut().for_each(|t| t.name = t.name.replacen(from, to, 1));
}

fn norms_of_heads(f: &mut File, i: u64) {
    for name in ["attn_q_norm", "attn_k_norm"] {
        add(f, &format!("blk.{i}.{name}.weight"), &[16], wave(16, 1.0, 0.5));
    }
}

/// Gemma 3: windows in every second block, norms behind each part.
pub fn gemma3(layers: u64) -> File {
    let mut f = tiny(layers);
    as_architecture(&mut f, "llama", "gemma3");
    for i in 0..layers {
        norms_of_heads(&mut f, i);
        for name in ["post_attention_norm", "post_ffw_norm"] {
            add(&mut f, &format!("blk.{i}.{name}.weight"), &[64], wave(64, 1.0, 0.5));
        }
    }
    f.set("gemma3.attention.layer_norm_rms_epsilon", V::F32(1e-6));
    f.set("gemma3.attention.sliding_window", V::U32(4));
    f.set("gemma3.attention.sliding_window_pattern", V::U32(2));
    f.set("gemma3.rope.freq_base", V::F32(1e6));
    f.set("gemma3.rope.freq_base_swa", V::F32(10_000.0));
    f
}

/// gpt-oss: experts, windows, sinks, and biases everywhere.
pub fn gpt_oss(layers: u64) -> File {
    let mut f = tiny_moe(layers);
    as_architecture(&mut f, "llama", "gpt-oss");
    f.set("gpt-oss.attention.sliding_window", V::U32(4));
    f.set("gpt-oss.expert_feed_forward_length", V::U32(96));
    f.set("gpt-oss.rope.freq_base", V::F32(150_000.0));
    f.set("gpt-oss.rope.scaling.type", V::Str("yarn".into()));
    f.set("gpt-oss.rope.scaling.factor", V::F32(32.0));
    f.set("gpt-oss.rope.scaling.original_context_length", V::U32(64));
    f.set("tokenizer.ggml.pre", V::Str("gpt-4o".into()));
    tensors_called(&mut f, ".ffn_norm.", ".post_attention_norm.");
    for i in 0..layers {
        let biases = [("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", 64), ("ffn_gate_inp", 4)];
        for (name, n) in biases {
            add(&mut f, &format!("blk.{i}.{name}.bias"), &[n], wave(n, 0.0, 0.3));
        }
        for (name, n) in [("ffn_gate_exps", 96), ("ffn_up_exps", 96), ("ffn_down_exps", 64)] {
            add(&mut f, &format!("blk.{i}.{name}.bias"), &[n, 4], wave(4 * n, 0.0, 0.3));
        }
        add(&mut f, &format!("blk.{i}.attn_sinks.weight"), &[4], wave(4, 0.0, 1.0));
    }
    f
}

/// LFM 2: short convolutions, and attention in every second block.
pub fn lfm2(layers: u64) -> File {
    let mut f = tiny(layers);
    as_architecture(&mut f, "llama", "lfm2");
    f.set("lfm2.shortconv.l_cache", V::U32(3));
    let heads = (0..layers).map(|i| if i % 2 == 1 { 2 } else { 0 });
    f.set("lfm2.attention.head_count_kv", V::I32s(heads.collect()));
    tensors_called(&mut f, "output_norm.", "token_embd_norm.");
    for i in 0..layers {
        if i % 2 == 1 {
            norms_of_heads(&mut f, i);
            continue;
        }
        f.tensors.retain(|t| !["q", "k", "v", "output"].iter().any(|x| t.name == format!("blk.{i}.attn_{x}.weight")));
        for (name, shape) in [("in_proj", [64, 192]), ("conv", [3, 64]), ("out_proj", [64, 64])] {
            add(&mut f, &format!("blk.{i}.shortconv.{name}.weight"), &shape, wave(shape[0] * shape[1], 0.0, 0.5));
        }
    }
    f
}

/// Qwen 3.5: delta nets, and attention with gates in every second block.
pub fn qwen35(layers: u64) -> File {
    let mut f = tiny(layers);
    as_architecture(&mut f, "llama", "qwen35");
    for (key, n) in
        [("conv_kernel", 4), ("state_size", 16), ("group_count", 2), ("time_step_rank", 4), ("inner_size", 64)]
    {
        f.set(&format!("qwen35.ssm.{key}"), V::U32(n));
    }
    f.set("qwen35.full_attention_interval", V::U32(2));
    tensors_called(&mut f, ".ffn_norm.", ".post_attention_norm.");
    for i in 0..layers {
        if i % 2 == 1 {
            norms_of_heads(&mut f, i);
            let q = f.tensor(&format!("blk.{i}.attn_q.weight"));
            let again = q.data.clone();
            q.shape = vec![64, 128];
            q.data.extend(again);
            continue;
        }
        f.tensors.retain(|t| !["q", "k", "v", "output"].iter().any(|x| t.name == format!("blk.{i}.attn_{x}.weight")));
        let matrices = [("attn_qkv", 128), ("attn_gate", 64), ("ssm_beta", 4), ("ssm_alpha", 4), ("ssm_out", 64)];
        for (name, rows) in matrices {
            add(&mut f, &format!("blk.{i}.{name}.weight"), &[64, rows], wave(64 * rows, 0.0, 0.5));
        }
        add(&mut f, &format!("blk.{i}.ssm_conv1d.weight"), &[4, 128], wave(4 * 128, 0.0, 0.5));
        add(&mut f, &format!("blk.{i}.ssm_a"), &[4], wave(4, -1.0, 0.5));
        add(&mut f, &format!("blk.{i}.ssm_dt.bias"), &[4], wave(4, 0.0, 0.5));
        add(&mut f, &format!("blk.{i}.ssm_norm.weight"), &[16], wave(16, 1.0, 0.5));
    }
    f
}

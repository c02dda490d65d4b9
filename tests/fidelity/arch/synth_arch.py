#!/usr/bin/env python3
"""Write a tiny GGUF of any architecture that `nt` knows, with seeded random weights.

Every kind of layer of the architecture is there at least once (windowed and full attention,
recurrent and attention, dense lead and MoE, with and without RoPE), windows are shorter than a
test prompt, and YaRN, temperature and softcap parameters bite within a hundred tokens. The model
holds no knowledge; its logits have a standard deviation of a few units.

    pip install gguf==0.19.0 numpy
    synth_arch.py --list                       # presets, with their architecture and default shape
    synth_arch.py gpt-oss out.gguf --seed 3
    synth_arch.py gpt-oss out.gguf --type MXFP4            # experts MXFP4, other matrices F16
    synth_arch.py gpt-oss out.gguf --type MXFP4/Q8_0       # experts MXFP4, other matrices Q8_0
    synth_arch.py qwen35 out.gguf --shape '{"D": 160, "n_k": 3, "n_v": 6, "mtp": 1}'

Types: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, MXFP4, TQ1_0 and TQ2_0 are quantized from the
F32 weights by gguf-py. K-quants, IQ4_NL and IQ4_XS, which gguf-py only reads, are random blocks of
the right spread, as in synth_gguf.py. For those quantized from real values, write F32 and run the
peer's llama-quantize. A matrix whose rows do not divide into blocks falls back to Q8_0, else F16.
Norms, biases, routers, sinks, convolution kernels and decay vectors stay F32.

Random numbers come from integer sums of a counter-based generator, so the same seed gives the same
file on every machine and numpy version.
"""
import argparse
import json
import os
import sys
import zlib

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as T
from gguf import quants

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from synth_gguf import F16_FIELDS, byte_level_alphabet

# Defaults that every preset starts from. D width, F ffn, H heads, K kv heads, hd head size, V vocabulary.
BASE = dict(L=4, D=128, F=192, H=4, K=2, hd=32, V=512, ctx=16384, base=1e4, eps=1e-3, out_std=3.0, pre="llama-bpe", tied=False)


class Model:
    """Collects keys and tensors; each tensor's numbers depend only on the seed and its name."""

    def __init__(self, arch, p, seed):
        self.arch, self.p, self.seed = arch, p, seed
        self.keys, self.tensors = [], []

    def key(self, name, value):
        if value is not None:
            self.keys.append((f"{self.arch}.{name}", value))

    def normal(self, name, n):
        """n numbers of mean 0 and deviation 1, sums of four uniform 16-bit integers."""
        bits = np.random.Philox(key=[self.seed, zlib.crc32(name.encode())]).random_raw(n)
        s = sum((bits >> np.uint64(16 * k)) & np.uint64(0xFFFF) for k in range(4)).astype(np.float64)
        return ((s - 131070.0) / (65536.0 * (4 / 12) ** 0.5)).astype(np.float32)

    def uniform(self, name, n, lo, hi):
        bits = np.random.Philox(key=[self.seed, zlib.crc32(name.encode())]).random_raw(n)
        return (lo + (hi - lo) * (bits >> np.uint64(40)).astype(np.float64) / 2**24).astype(np.float32)

    def put(self, name, data):
        """An F32 tensor that is never quantized."""
        self.tensors.append((name, np.ascontiguousarray(data, np.float32), "fixed"))

    def w(self, name, *shape, gain=1.0, sigma=None, kind="matrix"):
        """A weight matrix of numpy shape (…, rows, columns); products with unit input have deviation `gain`."""
        x = self.normal(name, int(np.prod(shape))).reshape(shape) * np.float32(sigma if sigma else gain / shape[-1] ** 0.5)
        self.tensors.append((name + ".weight", x, kind))

    def router(self, name, *shape, gain=1.5):
        self.put(name + ".weight", self.normal(name, int(np.prod(shape))).reshape(shape) * np.float32(gain / shape[-1] ** 0.5))

    def norm(self, name, n, mean=1.0, bias=False):
        self.put(name + ".weight", mean * (1 + 0.2 * self.normal(name, int(np.prod(n))).reshape(n)))
        if bias:
            self.bias(name, n, 0.2)

    def bias(self, name, n, sigma=0.25):
        self.put(name + ".bias", sigma * self.normal(name + ".bias", int(np.prod(n))).reshape(n))

    # Blocks of tensors that several architectures share.

    def common(self, rms=True, kv=True, **over):
        p = self.p
        self.key("context_length", p["ctx"])
        self.key("embedding_length", p["D"])
        self.key("block_count", p["L"] + p.get("mtp", 0))
        self.key("feed_forward_length", over.get("ff", p["F"]))
        self.key("attention.head_count", over.get("heads", p["H"]))
        self.key("attention.head_count_kv", over.get("kv_heads", p["K"]))
        if kv:
            self.key("attention.key_length", over.get("key_length", p["hd"]))
            self.key("attention.value_length", over.get("value_length", p["hd"]))
        self.key("rope.dimension_count", p.get("rot", p["hd"]))
        self.key("rope.freq_base", float(p["base"]))
        self.key("attention.layer_norm_rms_epsilon" if rms else "attention.layer_norm_epsilon", float(p["eps"]))
        self.key("vocab_size", p["V"])
        if p.get("mtp"):
            self.key("nextn_predict_layers", p["mtp"])
        if p.get("scaling"):
            kind, factor, original = p["scaling"]
            self.key("rope.scaling.type", kind)
            self.key("rope.scaling.factor", float(factor))
            self.key("rope.scaling.original_context_length", original)

    def ends(self, embed_std=1.0, norm="output_norm", bias=False, head_scale=1.0):
        """Embedding, final norm, head. `head_scale` multiplies the logits later on."""
        p = self.p
        out = p["out_std"] / head_scale / p["D"] ** 0.5
        self.w("token_embd", p["V"], p["D"], sigma=out if p["tied"] else embed_std)
        self.norm(norm, p["D"], bias=bias)
        if not p["tied"]:
            self.w("output", p["V"], p["D"], sigma=out)

    def attn(self, i, fused=False, bias=False, obias=False, qk=None, K=None, hd=None, q_rows=None, gain=1.5, v=True, kv=True, H=None):
        """Projections; qk is the shape ('head' or 'all') of the q and k norms."""
        p, b = self.p, f"blk.{i}."
        H, K, hd = H or p["H"], p["K"] if K is None else K, hd or p["hd"]
        parts = [("q", q_rows or H * hd), ("k", K * hd), ("v", K * hd)]
        if fused:
            rows = sum(n for _, n in parts)
            self.w(b + "attn_qkv", rows, p["D"], gain=gain)
            if bias:
                self.bias(b + "attn_qkv", rows)
        else:
            for c, n in parts:
                if (c == "v" and not v) or (c != "q" and not kv):
                    continue
                self.w(b + f"attn_{c}", n, p["D"], gain=1.0 if c == "v" else gain)
                if bias:
                    self.bias(b + f"attn_{c}", n)
        self.w(b + "attn_output", p["D"], H * hd)
        if obias:
            self.bias(b + "attn_output", p["D"])
        if qk:
            self.norm(b + "attn_q_norm", hd if qk == "head" else H * hd, mean=p.get("qk_mean", 1.4))
            if kv:
                self.norm(b + "attn_k_norm", hd if qk == "head" else K * hd, mean=p.get("qk_mean", 1.4))

    def dense(self, i, F=None, fused=False, gated=True, bias=False, tag="", D=None):
        p, b, F, D = self.p, f"blk.{i}.", F or self.p["F"], D or self.p["D"]
        if gated and not fused:
            self.w(b + "ffn_gate" + tag, F, D, gain=1.5)
        self.w(b + "ffn_up" + tag, 2 * F if fused else F, D, gain=1.5)
        self.w(b + "ffn_down" + tag, D, F, gain=1.5)
        if bias:
            self.bias(b + "ffn_up", F), self.bias(b + "ffn_down", D)

    def moe(self, i, EF=None, bias=False, merged=False, gate=True, probs=False, router_bias=False, D=None):
        p, b, E, EF = self.p, f"blk.{i}.", self.p["E"], EF or self.p["EF"]
        D = D or p["D"]
        self.router(b + "ffn_gate_inp", E, p["D"])
        if router_bias:
            self.bias(b + "ffn_gate_inp", E)
        if probs:
            self.bias(b + "exp_probs_b", E, 0.2)
        parts = [("gate_up", 2 * EF)] if merged else [("gate", EF)] * gate + [("up", EF)]
        for c, rows in parts:
            self.w(b + f"ffn_{c}_exps", E, rows, D, gain=1.5, kind="expert")
            if bias:
                self.bias(b + f"ffn_{c}_exps", (E, rows))
        self.w(b + "ffn_down_exps", E, D, EF, gain=1.5, kind="expert")
        if bias:
            self.bias(b + "ffn_down_exps", (E, D))

    def moe_keys(self, gating=None, norm=None, scale=None, shared=None, shared_ff=None, groups=None, lead=None, ff=True):
        p = self.p
        self.key("expert_count", p["E"])
        self.key("expert_used_count", p["used"])
        if ff:
            self.key("expert_feed_forward_length", p["EF"])
        for name, value in (("expert_gating_func", gating), ("expert_weights_norm", norm), ("expert_weights_scale", scale),
                            ("expert_shared_count", shared), ("expert_shared_feed_forward_length", shared_ff),
                            ("leading_dense_block_count", lead)):
            self.key(name, value)
        if groups:
            self.key("expert_group_count", groups[0])
            self.key("expert_group_used_count", groups[1])

    def nextn(self, i, head_norm=True):
        b, D = f"blk.{i}.nextn.", self.p["D"]
        self.w(b + "eh_proj", D, 2 * D)
        self.norm(b + "enorm", D), self.norm(b + "hnorm", D)
        if head_norm:
            self.norm(b + "shared_head_norm", D)

    def decay(self, i, n, two_d=False):
        """`ssm_a` and `ssm_dt.bias` so that the decay per token runs from e^-0.0005 to e^-1.6."""
        b = f"blk.{i}."
        a = -np.exp(self.uniform(b + "ssm_a", n, np.log(0.5), np.log(16.0)).astype(np.float64))
        dt = np.exp(self.uniform(b + "ssm_dt", n, np.log(1e-3), np.log(0.1)).astype(np.float64))
        self.put(b + "ssm_a", a.reshape(n, 1) if two_d else a)
        self.put(b + "ssm_dt.bias", dt + np.log(-np.expm1(-dt)))


# Architectures whose query projection must be square.
SQUARE = {"phi3", "olmo2", "cohere2", "lfm2", "lfm2moe", "bailingmoe2", "exaone4", "starcoder2", "falcon", "gptneox", "gpt2"}

PRESETS = {}


def preset(name, arch=None, **shape):
    """Registers a builder under `name`; the shape overrides BASE. May be stacked."""
    def register(build):
        PRESETS[name] = (arch or name, BASE | shape, build)
        return build
    return register


# One builder per architecture. What each tensor means: facts/architectures.md.

@preset("gpt-oss", H=8, K=2, hd=32, E=8, used=4, EF=96, window=24, scaling=["yarn", 8.0, 512], base=15e4)
def gpt_oss(m, p):
    m.common()
    m.moe_keys()
    m.key("attention.sliding_window", p["window"])
    m.ends()
    for i in range(p["L"]):
        b = f"blk.{i}."
        m.norm(b + "attn_norm", p["D"])
        m.attn(i, bias=True, obias=True)
        m.put(b + "attn_sinks.weight", m.normal(b + "attn_sinks", p["H"]) * 1.5)
        m.norm(b + "post_attention_norm", p["D"])
        m.moe(i, bias=True, router_bias=True)


def delta_net(m, i, p, next_form=None):
    """One gated delta net mixer; next_form is None (qwen35), 'split' or 'packed' (qwen3next)."""
    b, D, d, nk, nv = f"blk.{i}.", p["D"], p["d"], p["n_k"], p["n_v"]
    conv = 2 * nk * d + nv * d
    if next_form == "packed":
        m.w(b + "ssm_in", conv + nv * d, D, gain=1.2)
    else:
        m.w(b + "attn_qkv", conv, D, gain=1.2)
        m.w(b + "attn_gate", nv * d, D, gain=1.2)
    if next_form:
        m.w(b + "ssm_ba", 2 * nv, D)
    else:
        m.w(b + "ssm_beta", nv, D)
        m.w(b + "ssm_alpha", nv, D)
    m.put(b + "ssm_conv1d.weight", m.normal(b + "ssm_conv1d", conv * p["conv"]).reshape(conv, p["conv"]) * 0.6)
    m.decay(i, nv)
    m.norm(b + "ssm_norm", d)
    m.w(b + "ssm_out", D, nv * d)


def qwen35_family(m, p, next_form=None, moe=True):
    m.common()
    if moe:
        m.moe_keys(shared_ff=p["SF"])
    if not next_form:
        m.key("rope.dimension_sections", p["sections"])
    for name, value in (("conv_kernel", p["conv"]), ("state_size", p["d"]), ("group_count", p["n_k"]),
                        ("time_step_rank", p["n_v"]), ("inner_size", p["n_v"] * p["d"])):
        m.key("ssm." + name, value)
    if p.get("recurrent"):
        m.key("attention.recurrent_layers", [bool(x) for x in p["recurrent"] + [0] * p.get("mtp", 0)])
    elif p["interval"]:
        m.key("full_attention_interval", p["interval"])
    m.ends()
    for i in range(p["L"] + p.get("mtp", 0)):
        b, main = f"blk.{i}.", i < p["L"]
        m.norm(b + "attn_norm", p["D"])
        m.norm(b + "post_attention_norm", p["D"])
        recurrent = main and (p["recurrent"][i] if p.get("recurrent") else (i + 1) % (p["interval"] or 4) != 0)
        if recurrent:
            delta_net(m, i, p, next_form)
        else:
            m.attn(i, qk="head", q_rows=2 * p["H"] * p["hd"])
        if moe:
            m.moe(i, merged=p.get("merged", False))
            m.router(b + "ffn_gate_inp_shexp", p["D"])
            m.dense(i, p["SF"], tag="_shexp")
        else:
            m.dense(i)
        if not main:
            m.nextn(i)


@preset("qwen35moe", hd=64, rot=16, sections=[3, 3, 2, 0], base=5e4, E=8, used=3, EF=64, SF=64, conv=4, d=32, n_k=2, n_v=4, interval=4)
@preset("qwen35moe-merged", "qwen35moe", hd=64, rot=16, sections=[3, 3, 2, 0], base=5e4, E=8, used=3, EF=64, SF=64, conv=4, d=32, n_k=2, n_v=4, interval=4, merged=True, mtp=1)
def qwen35moe(m, p):
    qwen35_family(m, p)


@preset("qwen35", hd=64, rot=16, sections=[3, 3, 2, 0], base=5e4, conv=4, d=32, n_k=2, n_v=6, interval=4)
def qwen35(m, p):
    qwen35_family(m, p, moe=False)


@preset("qwen3next", hd=64, rot=16, base=5e4, E=12, used=4, EF=64, SF=64, conv=4, d=32, n_k=2, n_v=6, interval=4)
@preset("qwen3next-packed", "qwen3next", hd=64, rot=16, base=5e4, E=12, used=4, EF=64, SF=64, conv=4, d=32, n_k=2, n_v=6, interval=4, packed=True)
def qwen3next(m, p):
    qwen35_family(m, p, next_form="packed" if p.get("packed") else "split")


@preset("gemma4", L=7, hd=64, hd_swa=32, K=1, K_full=1, pattern=[1, 1, 0, 1, 1, 0, 1], shared=4, window=20, ple=24, base=1e6, base_swa=1e4,
        tied=True, cap=10.0, wide=1.5, out_scale=True, v_full=True)
@preset("gemma4-31b", "gemma4", L=4, hd=64, hd_swa=32, K=2, K_full=1, pattern=[1, 1, 1, 0], shared=0, window=20, ple=0, base=1e6, base_swa=1e4,
        tied=True, cap=10.0, wide=1, out_scale=True, v_full=False)
@preset("gemma4-moe", "gemma4", L=4, hd=64, hd_swa=32, K=2, K_full=1, pattern=[1, 1, 1, 0], shared=0, window=20, ple=0, base=1e6, base_swa=1e4,
        tied=True, cap=10.0, wide=1, out_scale=True, v_full=False, E=8, used=3, EF=64, merged=True)
def gemma4(m, p):
    L, D = p["L"], p["D"]
    swa = [bool(x) for x in p["pattern"]][:L]
    first_shared = L - p["shared"]
    kv = [p["K"] if s else p["K_full"] for s in swa]
    ff = [int(p["F"] * p["wide"]) if i >= first_shared else p["F"] for i in range(L)]
    m.common(kv_heads=kv, ff=ff if len(set(ff)) > 1 else p["F"])
    m.key("attention.key_length_swa", p["hd_swa"])
    m.key("attention.value_length_swa", p["hd_swa"])
    m.key("rope.dimension_count_swa", p["hd_swa"])
    m.key("rope.freq_base_swa", float(p["base_swa"]))
    m.key("attention.sliding_window", p["window"])
    m.key("attention.sliding_window_pattern", swa)
    m.key("attention.shared_kv_layers", p["shared"])
    m.key("embedding_length_per_layer_input", p["ple"])
    m.key("final_logit_softcapping", float(p["cap"]))
    if "E" in p:
        m.moe_keys()
    m.ends()
    if p["ple"]:
        m.w("per_layer_token_embd", p["V"], p["ple"] * L, sigma=1 / p["ple"] ** 0.5)
        m.w("per_layer_model_proj", p["ple"] * L, D, sigma=1.0)
        m.norm("per_layer_proj_norm", p["ple"])
    m.put("rope_freqs.weight", [1.0] * (p["hd"] // 8) + [1e30] * (p["hd"] // 2 - p["hd"] // 8))
    for i in range(L):
        b, hd = f"blk.{i}.", p["hd_swa"] if swa[i] else p["hd"]
        p["qk_mean"] = 1.3 / hd ** 0.25
        m.norm(b + "attn_norm", D)
        m.attn(i, qk="head", hd=hd, K=kv[i], v=swa[i] or p["v_full"], kv=i < first_shared)
        m.norm(b + "post_attention_norm", D)
        m.norm(b + "ffn_norm", D)
        m.dense(i, ff[i])
        m.norm(b + "post_ffw_norm", D)
        if "E" in p:
            m.moe(i, merged=p["merged"])
            m.put(b + "ffn_gate_inp.scale", D ** 0.5 * (1 + 0.2 * m.normal(b + "ffn_gate_inp.scale", D)))
            m.put(b + "ffn_down_exps.scale", 1 + 0.3 * m.normal(b + "ffn_down_exps.scale", p["E"]))
            for n in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"):
                m.norm(b + n, D)
        if p["ple"]:
            m.w(b + "inp_gate", p["ple"], D, gain=1.5)
            m.w(b + "proj", D, p["ple"])
            m.norm(b + "post_norm", D)
        if p["out_scale"]:
            m.put(b + "layer_output_scale.weight", m.uniform(b + "layer_output_scale", 1, 0.6, 1.1))


@preset("glm4moe", rot=16, qk=False, bias=True, lead=1, E=8, used=3, EF=64, shared=1, norm=True, scale=1.0, gating=2, base=1e6)
def glm4moe(m, p):
    m.common()
    m.moe_keys(gating=p["gating"], norm=p["norm"], scale=float(p["scale"]), shared=p["shared"], lead=p["lead"])
    m.ends()
    for i in range(p["L"] + p.get("mtp", 0)):
        b = f"blk.{i}."
        m.norm(b + "attn_norm", p["D"])
        m.attn(i, bias=p["bias"], qk="head" if p["qk"] else None)
        m.norm(b + "post_attention_norm", p["D"])
        if i < p["lead"]:
            m.dense(i)
        else:
            m.moe(i, probs=True)
            m.dense(i, p["EF"] * p["shared"], tag="_shexp")
        if i >= p["L"]:
            m.nextn(i)


@preset("glm4", rot=16, bias=False)
def glm4(m, p):
    m.common()
    m.ends()
    for i in range(p["L"]):
        b = f"blk.{i}."
        for n in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            m.norm(b + n, p["D"])
        m.attn(i, bias=p["bias"])
        m.dense(i, fused=True)


MLA = dict(kv_rank=64, nope=32, rope=16, vhd=24, lead=1, E=8, used=3, EF=48, shared=1)


@preset("deepseek2", **MLA, q_rank=48, absorbed=True, gating=2, norm=True, scale=2.5, groups=[4, 2], probs=True, scaling=["yarn", 8.0, 1024], log_mul=0.1)
@preset("deepseek2-lite", "deepseek2", **(MLA | dict(lead=1, EF=24, kv_rank=32, nope=24)), L=27, D=64, F=96, q_rank=None, absorbed=True, gating=None, norm=None, scale=1.0, groups=None, probs=False, scaling=["yarn", 8.0, 1024], log_mul=0.0707)
@preset("deepseek2-kvb", "deepseek2", **MLA, q_rank=48, absorbed=False, gating=1, norm=False, scale=16.0, groups=None, probs=False, scaling=["yarn", 8.0, 1024], log_mul=0.1)
def deepseek2(m, p):
    """q_rank None leaves the key out, which the peer accepts for 26 and 27 blocks only; 0 writes a zero."""
    D, H, qk = p["D"], p["H"], p["nope"] + p["rope"]
    p["rot"] = p["rope"]
    m.common(kv_heads=1 if p["absorbed"] else H, key_length=p["kv_rank"] + p["rope"] if p["absorbed"] else qk,
             value_length=p["kv_rank"] if p["absorbed"] else p["vhd"])
    if p["absorbed"]:
        m.key("attention.key_length_mla", qk)
        m.key("attention.value_length_mla", p["vhd"])
    m.key("attention.q_lora_rank", p["q_rank"])
    m.key("attention.kv_lora_rank", p["kv_rank"])
    m.moe_keys(gating=p["gating"], norm=p["norm"], scale=float(p["scale"]), shared=p["shared"], groups=p["groups"], lead=p["lead"])
    if p.get("scaling"):
        m.key("rope.scaling.yarn_log_multiplier", float(p["log_mul"]))
    if p.get("temperature"):
        m.key("attention.temperature_scale", float(p["temperature"][0]))
        m.key("attention.temperature_length", p["temperature"][1])
    m.ends()
    for i in range(p["L"] + p.get("mtp", 0)):
        b = f"blk.{i}."
        m.norm(b + "attn_norm", D)
        if p["q_rank"]:
            m.w(b + "attn_q_a", p["q_rank"], D)
            m.norm(b + "attn_q_a_norm", p["q_rank"])
            m.w(b + "attn_q_b", H * qk, p["q_rank"], gain=1.3)
        else:
            m.w(b + "attn_q", H * qk, D, gain=1.3)
        m.w(b + "attn_kv_a_mqa", p["kv_rank"] + p["rope"], D, gain=1.3)
        m.norm(b + "attn_kv_a_norm", p["kv_rank"])
        if p["absorbed"]:
            m.w(b + "attn_k_b", H, p["kv_rank"], p["nope"], sigma=1.3 / p["kv_rank"] ** 0.5)
            m.w(b + "attn_v_b", H, p["vhd"], p["kv_rank"])
        else:
            m.w(b + "attn_kv_b", H * (p["nope"] + p["vhd"]), p["kv_rank"], gain=1.3)
        m.w(b + "attn_output", D, H * p["vhd"])
        m.norm(b + "ffn_norm", D)
        if i < p["lead"]:
            m.dense(i)
        else:
            m.moe(i, probs=p["probs"], merged=p.get("merged", False))
            m.dense(i, p["EF"] * p["shared"], tag="_shexp")
        if i >= p["L"]:
            m.nextn(i)


@preset("gemma3", L=7, window=20, pattern=None, base=2e4, base_swa=None, scaling=["linear", 8.0, 4096], tied=True)
@preset("gemma2", L=4, window=20, pattern=None, base=1e4, base_swa=None, tied=True, caps=[15.0, 8.0])
def gemma(m, p):
    m.common()
    m.key("attention.sliding_window", p["window"])
    m.key("attention.sliding_window_pattern", p["pattern"])
    if p["base_swa"]:
        m.key("rope.freq_base_swa", float(p["base_swa"]))
    if p.get("caps"):
        m.key("attn_logit_softcapping", float(p["caps"][0]))
        m.key("final_logit_softcapping", float(p["caps"][1]))
    m.ends()
    for i in range(p["L"]):
        b = f"blk.{i}."
        for n in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            m.norm(b + n, p["D"])
        m.attn(i, qk="head" if m.arch == "gemma3" else None, gain=2.0)
        m.dense(i)


@preset("mistral3", scaling=["yarn", 8.0, 40], log_mul=0.9, betas=[2.0, 0.25], temperature=0.3, base=1e5)
def mistral3(m, p):
    m.common()
    if "E" in p:
        m.moe_keys(ff=False)
    m.key("attention.temperature_scale", float(p["temperature"]))
    if p.get("scaling"):
        m.key("rope.scaling.yarn_log_multiplier", float(p["log_mul"]))
        m.key("rope.scaling.yarn_beta_fast", float(p["betas"][0]))
        m.key("rope.scaling.yarn_beta_slow", float(p["betas"][1]))
    m.ends()
    for i in range(p["L"]):
        b = f"blk.{i}."
        m.norm(b + "attn_norm", p["D"])
        m.attn(i)
        m.norm(b + "ffn_norm", p["D"])
        m.moe(i, EF=p["F"]) if "E" in p else m.dense(i)


@preset("minimax-m2", rot=16, E=8, used=3, EF=64, F=64, gating=2, base=5e6)
def minimax_m2(m, p):
    m.common(ff=p["EF"])
    m.moe_keys(gating=p["gating"])
    m.ends()
    for i in range(p["L"]):
        b = f"blk.{i}."
        m.norm(b + "attn_norm", p["D"])
        m.attn(i, qk="all")
        m.norm(b + "ffn_norm", p["D"])
        m.moe(i, probs=True)


@preset("llama4", D=64, H=2, K=1, hd=32, F=96, E=4, used=1, EF=64, step=2, freqs=True, base=5e5)
def llama4(m, p):
    """The peer fixes the chunk and the temperature step at 8192 whatever the window key says, 0 excepted."""
    m.common()
    m.moe_keys()
    m.key("interleave_moe_layer_step", p["step"])
    if "window" in p:
        m.key("attention.sliding_window", p["window"])
    m.ends()
    if p["freqs"]:
        m.put("rope_freqs.weight", np.geomspace(1, 8, p["hd"] // 2))
    for i in range(p["L"]):
        b = f"blk.{i}."
        m.norm(b + "attn_norm", p["D"])
        m.attn(i)
        m.norm(b + "ffn_norm", p["D"])
        if p["step"] and (i + 1) % p["step"] == 0:
            m.moe(i)
            m.dense(i, p["EF"], tag="_shexp")
        else:
            m.dense(i)


@preset("phi3", rot=24, scaling=None, long=True, attn_factor=1.19, original=64, window=32)
def phi3(m, p):
    m.common()
    m.key("rope.scaling.original_context_length", p["original"])
    m.key("rope.scaling.attn_factor", float(p["attn_factor"]))
    m.key("attention.sliding_window", p["window"])
    m.ends()
    if p["long"]:
        n = p["rot"] // 2
        m.put("rope_factors_long.weight", np.geomspace(1.1, 24, n))
        m.put("rope_factors_short.weight", np.geomspace(1.0, 2.5, n))
    for i in range(p["L"]):
        b = f"blk.{i}."
        m.norm(b + "attn_norm", p["D"])
        m.attn(i, fused=True)
        m.norm(b + "ffn_norm", p["D"])
        m.dense(i, fused=True)


GRANITE = dict(emb=6.0, res=0.6, att=0.25, logit=4.0)


@preset("granite", **GRANITE, rope=True)
@preset("granitemoe", **GRANITE, rope=True, E=8, used=3, EF=64, SF=96)
def granite(m, p):
    m.common(ff=p.get("EF", p["F"]))
    m.key("embedding_scale", float(p["emb"]))
    m.key("residual_scale", float(p["res"]))
    m.key("attention.scale", float(p["att"]))
    m.key("logit_scale", float(p["logit"]))
    if not p["rope"]:
        m.key("rope.scaling.finetuned", False)
    if "E" in p:
        m.moe_keys(shared_ff=p["SF"], ff=False)
    m.ends(embed_std=1 / p["emb"], head_scale=1 / p["logit"])
    for i in range(p["L"]):
        b = f"blk.{i}."
        m.norm(b + "attn_norm", p["D"])
        m.attn(i)
        m.norm(b + "ffn_norm", p["D"])
        if "E" in p:
            m.moe(i)
            if p["SF"]:
                m.dense(i, p["SF"], tag="_shexp")
        else:
            m.dense(i)


@preset("seed_oss", base=1e7)
def seed_oss(m, p):
    m.common()
    m.ends()
    for i in range(p["L"]):
        m.norm(f"blk.{i}.attn_norm", p["D"])
        m.attn(i, bias=True)
        m.norm(f"blk.{i}.post_attention_norm", p["D"])
        m.dense(i)


@preset("ernie4_5-moe", lead=1, step=1, E=8, used=3, EF=64, SF=128, base=5e5, probs=True)
def ernie(m, p):
    m.common()
    m.moe_keys(shared_ff=p["SF"], lead=p["lead"])
    m.key("interleave_moe_layer_step", p["step"])
    m.ends()
    for i in range(p["L"]):
        m.norm(f"blk.{i}.attn_norm", p["D"])
        m.attn(i)
        m.norm(f"blk.{i}.ffn_norm", p["D"])
        if i >= p["lead"]:
            m.moe(i, probs=p["probs"])
            if p["SF"]:
                m.dense(i, p["SF"], tag="_shexp")
        else:
            m.dense(i)


@preset("hunyuan-moe", E=8, used=3, EF=64, F=64, SF=96)
def hunyuan(m, p):
    m.common(ff=p["EF"])
    m.moe_keys(shared_ff=p["SF"])
    m.ends()
    for i in range(p["L"]):
        m.norm(f"blk.{i}.attn_norm", p["D"])
        m.attn(i, qk="head")
        m.norm(f"blk.{i}.ffn_norm", p["D"])
        m.moe(i)
        m.dense(i, p["SF"], tag="_shexp")


@preset("bailingmoe2", rot=16, lead=1, E=8, used=3, EF=64, shared=1, groups=[4, 2], gating=2, norm=True, scale=2.5, base=6e5)
def bailing(m, p):
    m.common()
    m.moe_keys(gating=p["gating"], norm=p["norm"], scale=float(p["scale"]), shared=p["shared"], groups=p["groups"], lead=p["lead"])
    m.ends()
    for i in range(p["L"]):
        m.norm(f"blk.{i}.attn_norm", p["D"])
        m.attn(i, fused=True, qk="head")
        m.norm(f"blk.{i}.ffn_norm", p["D"])
        if i >= p["lead"]:
            m.moe(i, probs=True)
            m.dense(i, p["EF"] * p["shared"], tag="_shexp")
        else:
            m.dense(i)


@preset("dots1", K=4, lead=1, E=8, used=3, EF=64, shared=2, gating=2, norm=True, scale=2.5)
def dots1(m, p):
    m.common()
    m.moe_keys(gating=p["gating"], norm=p["norm"], scale=float(p["scale"]), shared=p["shared"], lead=p["lead"])
    m.ends()
    for i in range(p["L"]):
        m.norm(f"blk.{i}.attn_norm", p["D"])
        m.attn(i, qk="head")
        m.norm(f"blk.{i}.ffn_norm", p["D"])
        if i >= p["lead"]:
            m.moe(i, probs=True)
            m.dense(i, p["EF"] * p["shared"], tag="_shexp")
        else:
            m.dense(i)


@preset("olmo2", base=5e5)
@preset("olmo3", "olmo2", base=5e5, window=20, L=5, scaling=["yarn", 8.0, 512], attn_factor=1.2)
def olmo2(m, p):
    m.common()
    if "window" in p:
        m.key("attention.sliding_window", p["window"])
        m.key("attention.sliding_window_pattern", p.get("pattern"))
    if "attn_factor" in p:
        m.key("rope.scaling.attn_factor", float(p["attn_factor"]))
    m.ends()
    for i in range(p["L"]):
        b = f"blk.{i}."
        m.attn(i, qk="all")
        m.norm(b + "post_attention_norm", p["D"])
        m.dense(i)
        m.norm(b + "post_ffw_norm", p["D"])


@preset("cohere2", L=5, window=20, logit=0.25, tied=True)
def cohere2(m, p):
    m.common(rms=False)
    m.key("attention.sliding_window", p["window"])
    m.key("attention.sliding_window_pattern", p.get("pattern"))
    m.key("logit_scale", float(p["logit"]))
    m.ends(head_scale=p["logit"])
    for i in range(p["L"]):
        m.norm(f"blk.{i}.attn_norm", p["D"])
        m.attn(i)
        m.dense(i)


@preset("smollm3", L=5, tied=True, base=5e6)
def smollm3(m, p):
    m.common()
    m.ends()
    for i in range(p["L"]):
        m.norm(f"blk.{i}.attn_norm", p["D"])
        m.attn(i)
        m.norm(f"blk.{i}.ffn_norm", p["D"])
        m.dense(i)


@preset("lfm2", L=5, kinds=[0, 0, 1, 0, 1], cache=3, tied=True, base=2e4)
@preset("lfm2moe", L=5, kinds=[0, 0, 1, 0, 1], cache=3, tied=True, base=2e4, lead=2, E=8, used=3, EF=64)
def lfm2(m, p):
    """kinds: 1 attention, 0 short convolution."""
    m.common(kv_heads=[p["K"] if k else 0 for k in p["kinds"]])
    m.key("shortconv.l_cache", p["cache"])
    if "window" in p:
        m.key("attention.sliding_window", p["window"])
    if "E" in p:
        m.moe_keys(gating=2, lead=p["lead"])
    m.ends(norm="token_embd_norm")
    for i in range(p["L"]):
        b, D = f"blk.{i}.", p["D"]
        m.norm(b + "attn_norm", D)
        if p["kinds"][i]:
            m.attn(i, qk="head")
        else:
            m.w(b + "shortconv.in_proj", 3 * D, D, gain=1.2)
            m.put(b + "shortconv.conv.weight", m.normal(b + "conv", D * p["cache"]).reshape(D, p["cache"]) * 0.6)
            m.w(b + "shortconv.out_proj", D, D)
        m.norm(b + "ffn_norm", D)
        if i >= p.get("lead", p["L"]):
            m.moe(i, probs=True)
        else:
            m.dense(i)


@preset("exaone4", base=1e6, freqs=True, tied=True)
@preset("exaone4-swa", "exaone4", L=64, D=48, H=3, K=1, hd=16, F=64, window=20, base=1e6, freqs=True)
def exaone4(m, p):
    """Windows exist in the peer for 64 blocks only."""
    m.common()
    if "window" in p:
        m.key("attention.sliding_window", p["window"])
        m.key("attention.sliding_window_pattern", p.get("pattern"))
    m.ends()
    if p["freqs"]:
        m.put("rope_freqs.weight", np.geomspace(1, 8, p["hd"] // 2))
    for i in range(p["L"]):
        b = f"blk.{i}."
        m.attn(i, qk="head")
        m.norm(b + "post_attention_norm", p["D"])
        m.dense(i)
        m.norm(b + "post_ffw_norm", p["D"])


@preset("starcoder2", base=1e5)
def starcoder2(m, p):
    m.common(rms=False)
    m.ends(bias=True)
    for i in range(p["L"]):
        m.norm(f"blk.{i}.attn_norm", p["D"], bias=True)
        m.attn(i, bias=True, obias=True)
        m.norm(f"blk.{i}.ffn_norm", p["D"], bias=True)
        m.dense(i, gated=False, bias=True)


@preset("falcon", K=1, two_norms=False)
def falcon(m, p):
    m.common(rms=False, kv=False)
    m.ends(bias=True)
    for i in range(p["L"]):
        m.norm(f"blk.{i}.attn_norm", p["D"], bias=True)
        if p["two_norms"]:
            m.norm(f"blk.{i}.attn_norm_2", p["D"], bias=True)
        m.attn(i, fused=True)
        m.dense(i, gated=False)


@preset("gptneox", K=4, rot=8, parallel=True)
def gptneox(m, p):
    m.common(rms=False, kv=False)
    m.key("use_parallel_residual", p["parallel"])
    m.ends(bias=True)
    for i in range(p["L"]):
        m.norm(f"blk.{i}.attn_norm", p["D"], bias=True)
        m.attn(i, fused=True, bias=True, obias=True)
        m.norm(f"blk.{i}.ffn_norm", p["D"], bias=True)
        m.dense(i, gated=False, bias=True)


@preset("gpt2", K=4, ctx=512, tied=True)
def gpt2(m, p):
    m.common(rms=False, kv=False)
    m.ends(bias=True)
    m.put("position_embd.weight", 0.3 * m.normal("position_embd", p["ctx"] * p["D"]).reshape(p["ctx"], p["D"]))
    for i in range(p["L"]):
        m.norm(f"blk.{i}.attn_norm", p["D"], bias=True)
        m.attn(i, fused=True, bias=True, obias=True)
        m.norm(f"blk.{i}.ffn_norm", p["D"], bias=True)
        m.dense(i, gated=False, bias=True)


def mamba2_mixer(m, i, p):
    b, inner, n, groups, heads = f"blk.{i}.", p["inner"], p["state"], p["groups"], p["heads"]
    conv = inner + 2 * groups * n
    m.w(b + "ssm_in", inner + conv + heads, p["D"], gain=1.2)
    m.put(b + "ssm_conv1d.weight", m.normal(b + "ssm_conv1d", conv * p["conv"]).reshape(conv, p["conv"]) * 0.6)
    m.bias(b + "ssm_conv1d", conv)
    m.decay(i, heads, two_d=True)
    m.put(b + "ssm_d", 1 + 0.2 * m.normal(b + "ssm_d", heads).reshape(heads, 1))
    m.norm(b + "ssm_norm", (groups, inner // groups))
    m.w(b + "ssm_out", p["D"], inner)


def mamba2_keys(m, p):
    for name, value in (("conv_kernel", p["conv"]), ("inner_size", p["inner"]), ("state_size", p["state"]),
                        ("time_step_rank", p["heads"]), ("group_count", p["groups"])):
        m.key("ssm." + name, value)


SSM = dict(conv=4, inner=256, state=32, heads=8, groups=2)


@preset("mamba2", **SSM, tied=True)
def mamba2(m, p):
    m.key("context_length", p["ctx"])
    m.key("embedding_length", p["D"])
    m.key("block_count", p["L"])
    m.key("feed_forward_length", 0)
    m.key("attention.head_count", 0)
    m.key("attention.layer_norm_rms_epsilon", float(p["eps"]))
    m.key("vocab_size", p["V"])
    mamba2_keys(m, p)
    m.ends()
    for i in range(p["L"]):
        m.norm(f"blk.{i}.attn_norm", p["D"])
        mamba2_mixer(m, i, p)


@preset("nemotron_h", **SSM, L=6, kinds="mfmafm", bias=False)
def nemotron_h(m, p):
    """kinds: m Mamba-2, a attention, f feed-forward (squared ReLU, no gate)."""
    kinds = p["kinds"]
    m.common(ff=[p["F"] if k == "f" else 0 for k in kinds], kv_heads=[p["K"] if k == "a" else 0 for k in kinds],
             heads=[p["H"] if k == "a" else 0 for k in kinds] if p.get("head_array") else p["H"])
    m.key("attention.layer_norm_epsilon", float(p["eps"]))
    mamba2_keys(m, p)
    m.ends()
    for i, k in enumerate(kinds):
        m.norm(f"blk.{i}.attn_norm", p["D"])
        if k == "m":
            mamba2_mixer(m, i, p)
        elif k == "a":
            m.attn(i)
        else:
            m.dense(i, gated=False, bias=p["bias"])


def tokenizer(w, p):
    """A byte-level BPE of 256 bytes, invented words and two specials, as in synth_gguf.py."""
    tokens = byte_level_alphabet()
    tokens += [f"Ġw{i}" for i in range(p["V"] - 258)] + ["<|bos|>", "<|eos|>"]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(p["pre"])
    w.add_token_list(tokens)
    w.add_token_types([1] * (p["V"] - 2) + [3, 3])
    w.add_token_merges(["Ġ w"])
    w.add_bos_token_id(p["V"] - 2)
    w.add_eos_token_id(p["V"] - 1)
    w.add_add_bos_token(False)


def random_blocks(m, name, shape, qtype, sigma):
    """Blocks of random bytes whose scale fields give a deviation of `sigma`."""
    block, size = GGML_QUANT_SIZES[qtype]
    n = int(np.prod(shape)) // block
    raw = np.random.Philox(key=[m.seed, zlib.crc32(name.encode())]).random_raw((n * size + 7) // 8).view(np.uint8)[:n * size].reshape(n, size).copy()
    for offset, scale in F16_FIELDS[qtype]:
        raw[:, offset:offset + 2] = np.frombuffer(np.float16(scale * sigma).tobytes(), np.uint8)
    return raw.reshape(*shape[:-1], -1)


def encode(m, name, x, kind, types):
    """The bytes and type of one tensor."""
    if kind == "fixed":
        return x, T.F32
    qtype = T[types[0] if kind == "expert" else types[1]]
    if qtype not in (T.F32, T.F16, T.BF16) and x.shape[-1] % GGML_QUANT_SIZES[qtype][0]:
        qtype = T.Q8_0 if x.shape[-1] % 32 == 0 else T.F16
    if qtype == T.F32:
        return x, qtype
    if qtype == T.F16:
        return x.astype(np.float16), qtype
    if qtype in F16_FIELDS and qtype not in (T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1):
        return random_blocks(m, name, x.shape, qtype, float(x.std())), qtype
    return quants.quantize(x, qtype), qtype


def write(name, out, seed=1, shape={}, types="F32", jitter=0.0):
    """Writes one model; `jitter` is relative noise on the embedding, to find prompts near a router's tie."""
    arch, default, build = PRESETS[name]
    unknown = set(shape) - set(default) - {"mtp", "E", "used", "EF", "SF", "window", "pattern", "recurrent", "merged", "temperature", "scaling", "head_array", "attn_factor", "rot"}
    if unknown:
        raise SystemExit(f"{name} has no shape field {', '.join(sorted(unknown))}")
    p = json.loads(json.dumps(default | shape))
    if arch not in ("deepseek2", "mamba2") and (p["H"] % p["K"] or p["hd"] % 2 or arch in SQUARE and p["H"] * p["hd"] != p["D"]):
        raise SystemExit(f"{name}: H {p['H']} must be a multiple of K {p['K']}, hd {p['hd']} even{', H·hd = D' if arch in SQUARE else ''}")
    for t in types.split("/"):
        if t not in T.__members__:
            raise SystemExit(f"{t} is no tensor type; mixes such as Q4_K_M are the peer's llama-quantize's affair")
    m = Model(arch, p, seed)
    build(m, p)
    expert, _, rest = types.partition("/")
    w = GGUFWriter(out, arch)
    w.add_name("synthetic")  # the peer looks for "phi-3" and the like in the name
    for key, value in m.keys:
        if isinstance(value, bool):
            w.add_bool(key, value)
        elif isinstance(value, int):
            w.add_uint32(key, value)
        elif isinstance(value, float):
            w.add_float32(key, value)
        elif isinstance(value, str):
            w.add_string(key, value)
        else:
            w.add_array(key, value)
    tokenizer(w, p)
    for tensor, x, kind in m.tensors:
        if jitter and tensor == "token_embd.weight":
            x = x * (1 + jitter * m.normal("jitter", x.size).reshape(x.shape))
        data, qtype = encode(m, tensor, x, kind, (expert, rest or ("F16" if expert == "MXFP4" else expert)))
        w.add_tensor(tensor, data, raw_dtype=qtype)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("arch", nargs="?", choices=PRESETS, metavar="ARCH")
    a.add_argument("out", nargs="?")
    a.add_argument("--seed", type=int, default=1)
    a.add_argument("--shape", type=json.loads, default={}, help="JSON that overrides the preset's fields")
    a.add_argument("--type", default="F32", help="type of all matrices, or EXPERTS/REST")
    a.add_argument("--jitter", type=float, default=0.0, help="relative noise on the embedding")
    a.add_argument("--list", action="store_true")
    a.add_argument("--all", metavar="DIR", help="write a model of each preset to DIR")
    args = a.parse_args()
    if args.all:
        os.makedirs(args.all, exist_ok=True)
        for name in PRESETS:
            write(name, os.path.join(args.all, f"{name}.gguf"), args.seed, args.shape, args.type, args.jitter)
        return 0
    if args.list or not args.out:
        for name, (arch, shape, _) in PRESETS.items():
            print(f"{name:18} {arch:14} {json.dumps({k: v for k, v in shape.items() if BASE.get(k, ...) != v})}")
        return 0 if args.list else 2
    write(args.arch, args.out, args.seed, args.shape, args.type, args.jitter)
    return 0


if __name__ == "__main__":
    sys.exit(main())

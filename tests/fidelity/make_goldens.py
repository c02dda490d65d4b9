#!/usr/bin/env python3
"""Makes goldens.json: what llama.cpp computes for every case of cases.py.

For each case it holds the peer's own error (NMSE of its quantised run against its run on the same
weights dequantised to F32) and the last token's exact logits, which check nt's own F32 run.

    pip install gguf==0.19.0 numpy jinja2 diskcache typing_extensions
    # llama-cpp-python==0.3.36 built from its source package
    LLAMA_CPP_LIB_PATH=.../build/bin PYTHONPATH=.../llama_cpp_python-0.3.36 tests/fidelity/make_goldens.py [MIX…]
"""
import base64
import json
import os
import subprocess
import sys
import tempfile

import llama_cpp.llama_cpp as L
import numpy as np

import cases as C
from to_f32 import to_f32

HERE = os.path.dirname(os.path.abspath(__file__))


def logits(path, tokens, kv=0):
    """All logits of one pass on the CPU, with a cache of type `kv` (`enum ggml_type`: F32). Caches of other types are read by
    flash attention, as values of Q8_0 can be by nothing else."""
    mp = L.llama_model_default_params()
    mp.n_gpu_layers = 0
    mp.use_extra_bufts = False  # no repacking, which rounds in another way
    model = L.llama_model_load_from_file(path.encode(), mp)
    assert model, path
    cp = L.llama_context_default_params()
    cp.n_ctx = cp.n_batch = cp.n_ubatch = 1024
    cp.n_threads = cp.n_threads_batch = 2
    cp.type_k = cp.type_v = kv
    cp.flash_attn_type = int(kv != 0)
    ctx = L.llama_init_from_model(model, cp)
    n_vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
    batch = L.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, t in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = t, i, 1, 0, 1
    assert L.llama_decode(ctx, batch) == 0
    rows = [np.ctypeslib.as_array(L.llama_get_logits_ith(ctx, i), shape=(n_vocab,)).copy() for i in range(len(tokens))]
    L.llama_batch_free(batch)
    L.llama_free(ctx)
    L.llama_model_free(model)
    return np.stack(rows).astype(np.float64)


def nmse(a, b):
    return float(((a - b) ** 2).sum() / (b**2).sum())


def main():
    goldens, only = {}, sys.argv[1:]
    if only:  # keep the others
        with open(f"{HERE}/goldens.json") as f:
            goldens = json.load(f)
    with tempfile.TemporaryDirectory() as d:
        for preset, mix, seed, n, shape in C.cases():
            if only and mix not in only:
                continue
            path, exact_path = f"{d}/m.gguf", f"{d}/f.gguf"
            synth = [sys.executable, f"{HERE}/synth_gguf.py", preset, mix, path, "--seed", str(seed), "--shape", json.dumps(shape)]
            subprocess.run(synth, check=True)
            to_f32(path, exact_path)
            tokens = C.tokens(seed, n)
            exact, peer = logits(exact_path, tokens), logits(path, tokens)
            last = base64.b64encode(exact[-1].astype("<f4").tobytes()).decode()
            goldens[C.name(preset, mix, seed)] = {"peer_nmse": nmse(peer, exact), "last": last}
            print(f"{preset:14} {mix:8} seed {seed}: peer nmse {nmse(peer, exact):.2e}", flush=True)
    with open(f"{HERE}/goldens.json", "w") as f:
        json.dump(goldens, f, indent=0)


if __name__ == "__main__":
    main()

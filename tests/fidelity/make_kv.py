#!/usr/bin/env python3
"""Makes goldens_kv.json: how far llama.cpp's logits with a cache of Q8_0 lie from its own with one of F16, for the cases of
check_kv.py. Set up as make_goldens.py.

    LLAMA_CPP_LIB_PATH=.../build/bin PYTHONPATH=.../llama_cpp_python-0.3.36 tests/fidelity/make_kv.py
"""
import json
import tempfile

import cases as C
from check_kv import CASES, HERE, distance, synth
from make_goldens import logits

# `enum ggml_type`.
F16, Q8_0 = 1, 8


def main():
    goldens = {}
    with tempfile.TemporaryDirectory() as d:
        path = f"{d}/m.gguf"
        for case in CASES:
            synth(case, path)
            tokens = C.tokens(case[2], case[3])
            plain, rounded = (logits(path, tokens, kv) for kv in (F16, Q8_0))
            name = C.name(*case[:3])
            goldens[name] = {"peer_nmse": distance(case, rounded, plain)}
            print(f"{name:24} {goldens[name]['peer_nmse']:.3e}", flush=True)
    with open(f"{HERE}/goldens_kv.json", "w") as f:
        json.dump(goldens, f, indent=0)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Compares `nt --kv q8_0` with llama.cpp's `-ctk q8_0 -ctv q8_0`, on processors.

Weights are F32, so that the cache alone rounds. Each program's logits are held against its own with an F16 cache; nt's may
lie 1.25 times as far apart as llama.cpp's do (goldens_kv.json, by make_kv.py), and at least a hundredth as far, or the
option did nothing. Of models with a router the median row counts: one that flips near a tie changes a whole row. The first
half of the tokens is a prompt, the others are evaluated one by one.

    pip install gguf==0.19.0 numpy
    tests/fidelity/check_kv.py target/release/nt
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

import cases as C
from check import HERE, PEER_FACTOR, logits, nmse

# Nothing was rounded if it is less.
LEAST = 0.01

CASES = [(preset, "F32", 500 + i, 64, {}) for i, preset in enumerate(C.PRESETS)] + [
    ("llama-tiny", "F32", 510, 400, {"D": 320, "H": 5, "K": 1}),
    ("llama3-tiny", "F32", 511, 256, {"H": 16, "K": 16, "L": 2}),
    ("qwen3-tiny", "F32", 512, 130, {"D": 160, "F": 352, "H": 3, "K": 3, "hd": 96}),
    ("qwen3moe-tiny", "F32", 513, 150, {"E": 5, "used": 3, "EF": 96}),
]


def synth(case, path):
    preset, mix, seed, _, shape = case
    cmd = [sys.executable, f"{HERE}/synth_gguf.py", preset, mix, path, "--seed", str(seed), "--shape", json.dumps(shape)]
    subprocess.run(cmd, check=True)


def distance(case, a, b):
    """NMSE of logits `a` against `b`, or of the median row."""
    if "moe" not in case[0]:
        return nmse(a, b)
    return float(np.median(((a - b) ** 2).sum(1) / (b**2).sum(1)))


def check(nt, case, golden):
    with tempfile.TemporaryDirectory() as d:
        path, out = f"{d}/m.gguf", f"{d}/o.npy"
        synth(case, path)
        tokens = C.tokens(case[2], case[3])
        parts = ",".join([str(len(tokens) // 2)] + ["1"] * (len(tokens) - len(tokens) // 2))

        def run(kv):
            return logits(nt, path, tokens, out, ["--backend", "cpu", "--kv", kv, "--parts", parts])

        plain, ours = run("f16"), run("q8_0")
        ours, peer = distance(case, ours, plain), golden["peer_nmse"]
        ok = LEAST * peer <= ours <= PEER_FACTOR * peer
        line = f"{C.name(*case[:3]):24} nt {ours:.2e}  llama.cpp {peer:.2e}  ratio {ours / peer:.2f}"
        return ok, f"{'ok  ' if ok else 'FAIL'} {line}"


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("nt")
    args = a.parse_args()
    with open(f"{HERE}/goldens_kv.json") as f:
        goldens = json.load(f)
    failed = 0
    for case in CASES:
        ok, line = check(args.nt, case, goldens[C.name(*case[:3])])
        failed += not ok
        print(line, flush=True)
    print(f"{len(CASES) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

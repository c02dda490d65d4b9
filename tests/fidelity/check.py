#!/usr/bin/env python3
"""Compares nt's logits with llama.cpp's over every case of cases.py.

The exact logits are nt's own on the weights dequantised to F32, after they have been checked against
llama.cpp's (goldens.json). The quantised run may lie 1.25 times as far from them as llama.cpp's does.

    pip install gguf==0.19.0 numpy
    tests/fidelity/check.py target/release/nt [--only SUBSTRING] [--extra "--backend cuda"] [--jobs N]
"""
import argparse
import base64
import concurrent.futures
import json
import os
import shlex
import subprocess
import sys
import tempfile

import numpy as np

import cases as C
from to_f32 import to_f32

HERE = os.path.dirname(os.path.abspath(__file__))
EXACT_NMSE_MAX = 1e-9
PEER_FACTOR = 1.25
# On a GPU, of a model with a router: one that flips near a tie changes a whole row (IQ1_M, 2.3 times; all others stay below 0.1).
ROUTED_FACTOR_CUDA = 4.0
# Where nothing is quantised the peer's error is rounding alone, and so is ours.
UNQUANTISED_NMSE_MAX = {"F32": 1e-9, "F16": 1e-6, "BF16": 1e-5}
# Tensor cores multiply halves.
UNQUANTISED_NMSE_MAX_CUDA = {"F32": 1e-5, "F16": 1e-5, "BF16": 1e-5}


def nmse(a, b):
    return float(((a - b) ** 2).sum() / (b**2).sum())


def logits(nt, path, tokens, out, extra):
    cmd = [nt, "-q", "logits", path, "--tokens", ",".join(map(str, tokens)), "-o", out, *extra]
    subprocess.run(cmd, check=True)
    return np.load(out).astype(np.float64)


def check(nt, case, golden, extra):
    preset, mix, seed, n, shape = case
    with tempfile.TemporaryDirectory() as d:
        path, exact_path, out = f"{d}/m.gguf", f"{d}/f.gguf", f"{d}/o.npy"
        synth = [sys.executable, f"{HERE}/synth_gguf.py", preset, mix, path, "--seed", str(seed), "--shape", json.dumps(shape)]
        subprocess.run(synth, check=True)
        to_f32(path, exact_path)
        tokens = C.tokens(seed, n)
        exact = logits(nt, exact_path, tokens, out, ["--backend", "cpu"])
        ours = logits(nt, path, tokens, out, extra)
        last = np.frombuffer(base64.b64decode(golden["last"]), "<f4").astype(np.float64)
        exact_nmse, ours_nmse, peer = nmse(exact[-1], last), nmse(ours, exact), golden["peer_nmse"]
        unquantised = UNQUANTISED_NMSE_MAX_CUDA if "cuda" in extra else UNQUANTISED_NMSE_MAX
        routed = "moe" in preset or "E" in shape
        factor = ROUTED_FACTOR_CUDA if routed and "cuda" in extra else PEER_FACTOR
        bound = max(factor * peer, unquantised.get(mix, 0.0))
        ok = exact_nmse < EXACT_NMSE_MAX and ours_nmse <= bound and bool(np.isfinite(ours).all())
        line = f"{C.name(preset, mix, seed):28} exact {exact_nmse:.1e}  nt {ours_nmse:.2e}  llama.cpp {peer:.2e}  ratio {ours_nmse / max(peer, 1e-30):.2f}"
        return ok, f"{'ok  ' if ok else 'FAIL'} {line}"


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("nt")
    a.add_argument("--only", default="")
    a.add_argument("--extra", default="", help="options of the quantised run")
    a.add_argument("--jobs", type=int, default=2)
    args = a.parse_args()
    with open(f"{HERE}/goldens.json") as f:
        goldens = json.load(f)
    todo = [c for c in C.cases() if args.only in C.name(*c[:3])]
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(check, args.nt, c, goldens[C.name(*c[:3])], shlex.split(args.extra)) for c in todo]
        for run in runs:
            ok, line = run.result()
            failed += not ok
            print(line, flush=True)
    print(f"{len(todo) - failed} passed, {failed} failed")
    return 1 if failed or not todo else 0


if __name__ == "__main__":
    sys.exit(main())

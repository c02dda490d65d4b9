#!/usr/bin/env python3
"""Compares nt's logits with llama.cpp's over a tiny model of every architecture, and its own over placements.

For each case of arch/goldens.npz: the prompt in one pass, in chunks of 7 with all weights on storage and two buffers
(the same bits), and in parts whose last tokens are generated ones, all against llama.cpp's logits at three positions.
Architectures that nt does not compute must be refused by name, and so must files without a tensor that the architecture
has.

    pip install gguf==0.19.0 numpy
    tests/fidelity/check_arch.py target/release/nt [--only NAME] [--extra "--backend cpu"] [--jobs N]
"""
import argparse
import concurrent.futures
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
NMSE_MAX = 1e-9
# llama.cpp looks GELU up in a table of halves.
NMSE_MAX_GELU = 2e-6
GELU = ("gemma", "starcoder2", "falcon", "gptneox", "gpt2")
# For a quantised type, so many times llama.cpp's own distance from the exact logits.
PEER_FACTOR = 4
REFUSED = ("qwen3next-packed", "gemma4", "deepseek2", "mamba2", "nemotron_h")


# Tensors that an architecture cannot do without, though others can.
NEEDED = [
    ("gptneox", "blk.0.ffn_norm.bias"),
    ("gptneox", "blk.0.ffn_up.bias"),
    ("gpt2", "blk.0.attn_qkv.bias"),
    ("falcon", "output_norm.bias"),
    ("gpt-oss", "output.weight"),
    ("qwen35-mtp", "blk.4.nextn.eh_proj.weight"),
]


def nmse(a, b):
    return float(((a.astype(np.float64) - b) ** 2).sum() / (b.astype(np.float64) ** 2).sum())


def check(nt, goldens, case, extra):
    name = case["name"]
    golden = {key: goldens[f"{name}.{key}"] for key in ("tokens", "positions", "exact", "in_parts")}
    tokens = ",".join(map(str, golden["tokens"]))
    with tempfile.TemporaryDirectory() as d:
        model = f"{d}/m.gguf"
        synth = [sys.executable, f"{HERE}/arch/synth_arch.py", case["preset"], model, "--seed", str(case["seed"])]
        subprocess.run([*synth, "--shape", json.dumps(case["shape"]), "--type", case["type"]], check=True)
        with open(model, "rb") as f:
            if hashlib.sha256(f.read()).hexdigest() != case["sha256"]:
                return False, f"FAIL {name:18} the model has other bytes than llama.cpp had"

        def logits(*options):
            command = [nt, "-q", "logits", model, "--tokens", tokens, "-o", f"{d}/o.npy", *options, *extra]
            done = subprocess.run(command, capture_output=True, text=True)
            return (np.load(f"{d}/o.npy"), "") if done.returncode == 0 else (None, done.stderr.strip())

        whole, error = logits()
        if name.startswith(REFUSED):
            ok = whole is None and ("is not supported" in error or "is missing" in error)
            return ok, f"{'ok  ' if ok else 'FAIL'} {name:18} {error or 'is computed, but counted as refused'}"[:160]
        if whole is None:
            return False, f"FAIL {name:18} {error}"
        shown = subprocess.run([nt, "inspect", model, "--json"], check=True, capture_output=True, text=True)
        blocks = json.loads(shown.stdout)["hparams"]["n_layers"]
        streamed, error = logits("--tiers", f"0:0:{blocks}", "--n-buffers", "2", "--batch", "7")
        if streamed is None or not np.array_equal(whole, streamed):
            return False, f"FAIL {name:18} streamed in chunks of 7: {error or 'other bits than in one pass'}"
        parts, error = logits("--parts", ",".join(map(str, case["parts"])))
        if parts is None:
            return False, f"FAIL {name:18} in parts: {error}"
    limit = NMSE_MAX_GELU if name.startswith(GELU) else NMSE_MAX
    limit += PEER_FACTOR * case["peer_nmse"]
    exact, decoded = nmse(whole[golden["positions"]], golden["exact"]), nmse(parts[-1:], golden["in_parts"])
    ok = exact < limit and decoded < limit and bool(np.isfinite(whole).all())
    return ok, f"{'ok  ' if ok else 'FAIL'} {name:18} prompt {exact:.1e}  generated {decoded:.1e}  limit {limit:.0e}"


def check_needed(nt, case, tensor):
    """A model whose tensor has another name."""
    with tempfile.TemporaryDirectory() as d:
        model = f"{d}/m.gguf"
        synth = [sys.executable, f"{HERE}/arch/synth_arch.py", case["preset"], model, "--seed", str(case["seed"])]
        subprocess.run([*synth, "--shape", json.dumps(case["shape"]), "--type", case["type"]], check=True)
        with open(model, "rb") as f:
            data = f.read()
        name = len(tensor).to_bytes(8, "little") + tensor.encode()
        other = name[:-1] + b"_"
        with open(model, "wb") as f:
            f.write(data.replace(name, other, 1))
        done = subprocess.run([nt, "-q", "logits", model, "--tokens", "1", "-o", f"{d}/o.npy"], capture_output=True, text=True)
    error = done.stderr.strip()
    ok = name in data and done.returncode == 2 and tensor in error
    return ok, f"{'ok  ' if ok else 'FAIL'} {case['name']:18} without {tensor}: {error or 'is computed'}"[:200]


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("nt")
    a.add_argument("--only", default="")
    a.add_argument("--extra", default="--backend cpu", help="options of every run")
    a.add_argument("--jobs", type=int, default=2)
    args = a.parse_args()
    goldens = np.load(f"{HERE}/arch/goldens.npz")
    todo = [c for c in json.loads(str(goldens["cases"])) if args.only in c["name"]]
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(check, args.nt, goldens, c, shlex.split(args.extra)) for c in todo]
        runs += [pool.submit(check_needed, args.nt, c, t) for c in todo for name, t in NEEDED if name == c["name"]]
        for run in runs:
            ok, line = run.result()
            failed += not ok
            print(line, flush=True)
    print(f"{len(runs) - failed} passed, {failed} failed")
    return 1 if failed or not todo else 0


if __name__ == "__main__":
    sys.exit(main())

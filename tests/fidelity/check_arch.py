#!/usr/bin/env python3
"""Compares nt's logits with llama.cpp's over a tiny model of every architecture, and its own over placements.

For each case of arch/goldens.npz: the prompt in one pass, in chunks of 7 with all weights on storage and two buffers
(the same bits), and in parts whose last tokens are generated ones, all against llama.cpp's logits at three positions.
Architectures that nt does not compute must be refused by name, and so must files without a tensor that the architecture
has. On a GPU (`--backend cuda`) every position is compared with processors', too, of the same model and of one in Q8_0.

    pip install gguf==0.19.0 numpy
    tests/fidelity/check_arch.py target/release/nt [--only NAME] [--backend cpu|cuda] [--extra "-t 4"] [--jobs N]
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
# Tensor cores multiply halves; and no position may be so many times worse than the median.
NMSE_MAX_CUDA = 1e-5
OUTLIER_MAX = 10
# With weights in Q8_0 both sides round activations, each in its own way.
NMSE_MAX_CUDA_Q8 = 1e-3
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


class Runs:
    """Logits of a case's model written with some type."""

    def __init__(self, nt, case, kind, tokens, folder, extra):
        self.nt, self.model, self.out, self.tokens, self.extra = nt, f"{folder}/{kind}.gguf", f"{folder}/o.npy", tokens, extra
        synth = [sys.executable, f"{HERE}/arch/synth_arch.py", case["preset"], self.model, "--seed", str(case["seed"])]
        subprocess.run([*synth, "--shape", json.dumps(case["shape"]), "--type", kind], check=True)

    def logits(self, *options):
        """They, or none and the error."""
        command = [self.nt, "-q", "logits", self.model, "--tokens", self.tokens, "-o", self.out, *self.extra, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        return (np.load(self.out), "") if done.returncode == 0 else (None, done.stderr.strip())

    def blocks(self):
        shown = subprocess.run([self.nt, "inspect", self.model, "--json"], check=True, capture_output=True, text=True)
        return json.loads(shown.stdout)["hparams"]["n_layers"]

    def placed(self, whole, *more):
        """What is wrong with the bits of other placements; nothing if they are those of `whole`."""
        n = self.blocks()
        for tiers in (f"0:0:{n}", *more):
            got, error = self.logits("--tiers", tiers, "--n-buffers", "2", "--batch", "7")
            if got is None or not np.array_equal(whole, got):
                return f"--tiers {tiers} in chunks of 7: {error or 'other bits than in one pass'}"
        return ""


def check(nt, goldens, case, backend, extra):
    extra = ["--backend", backend, *extra]
    name = case["name"]
    golden = {key: goldens[f"{name}.{key}"] for key in ("tokens", "positions", "exact", "in_parts")}
    tokens = ",".join(map(str, golden["tokens"]))
    with tempfile.TemporaryDirectory() as d:
        runs = Runs(nt, case, case["type"], tokens, d, extra)
        with open(runs.model, "rb") as f:
            if hashlib.sha256(f.read()).hexdigest() != case["sha256"]:
                return False, f"FAIL {name:18} the model has other bytes than llama.cpp had"
        whole, error = runs.logits()
        if name.startswith(REFUSED):
            ok = whole is None and ("is not supported" in error or "is missing" in error)
            return ok, f"{'ok  ' if ok else 'FAIL'} {name:18} {error or 'is computed, but counted as refused'}"[:160]
        if whole is None:
            return False, f"FAIL {name:18} {error}"
        wrong = runs.placed(whole, *["1:1:" + str(runs.blocks() - 2)] * (backend == "cuda"))
        if wrong:
            return False, f"FAIL {name:18} {wrong}"
        parts, error = runs.logits("--parts", ",".join(map(str, case["parts"])))
        if parts is None:
            return False, f"FAIL {name:18} in parts: {error}"
        beside, shown = check_beside(runs, case, whole, parts, d, extra) if backend == "cuda" else (True, "")
    limit = NMSE_MAX_GELU if name.startswith(GELU) else NMSE_MAX
    limit = max(limit, NMSE_MAX_CUDA if backend == "cuda" else 0) + PEER_FACTOR * case["peer_nmse"]
    exact, decoded = nmse(whole[golden["positions"]], golden["exact"]), nmse(parts[-1:], golden["in_parts"])
    ok = exact < limit and decoded < limit and bool(np.isfinite(whole).all()) and beside
    line = f"{name:18} prompt {exact:.1e}  generated {decoded:.1e}  limit {limit:.0e}{shown}"
    return ok, f"{'ok  ' if ok else 'FAIL'} {line}"


def check_beside(runs, case, whole, parts, d, extra):
    """A GPU's logits beside those of processors: of all positions, and of the model in Q8_0."""
    on_cpu = ("--backend", "cpu")
    in_parts = ("--parts", ",".join(map(str, case["parts"])))
    by_cpu = Runs(runs.nt, case, case["type"], runs.tokens, d, on_cpu)
    limit = NMSE_MAX_CUDA + PEER_FACTOR * case["peer_nmse"]
    ok, shown = True, ""
    for what, ours, theirs in (("all", whole, by_cpu.logits()[0]), ("in parts", parts, by_cpu.logits(*in_parts)[0])):
        each = [nmse(a, b) for a, b in zip(ours, theirs)]
        outlier = max(each) / max(np.median(each), 1e-12)
        ok &= nmse(ours, theirs) < limit and (outlier <= OUTLIER_MAX or what != "all")
        shown += f"  {what} {nmse(ours, theirs):.1e} (worst {outlier:.1f} medians, at {int(np.argmax(each))})"
    quantised = Runs(runs.nt, case, "Q8_0", runs.tokens, d, extra)
    ours, error = quantised.logits(*in_parts)
    if ours is None:
        return False, shown + f"  Q8_0: {error}"
    theirs, _ = Runs(runs.nt, case, "Q8_0", runs.tokens, d, on_cpu).logits(*in_parts)
    each = [nmse(a, b) for a, b in zip(ours, theirs)]
    ok &= float(np.median(each)) < NMSE_MAX_CUDA_Q8
    shown += f"  Q8_0 {np.median(each):.1e}, last {each[-1]:.1e}"
    whole, error = quantised.logits()
    wrong = error if whole is None else quantised.placed(whole)
    return ok and not wrong, shown + (f"  Q8_0 {wrong}" if wrong else "")


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
    a.add_argument("--backend", default="cpu", choices=("cpu", "cuda"))
    a.add_argument("--extra", default="", help="options of every run")
    a.add_argument("--jobs", type=int, default=2)
    args = a.parse_args()
    goldens = np.load(f"{HERE}/arch/goldens.npz")
    todo = [c for c in json.loads(str(goldens["cases"])) if args.only in c["name"]]
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(check, args.nt, goldens, c, args.backend, shlex.split(args.extra)) for c in todo]
        runs += [pool.submit(check_needed, args.nt, c, t) for c in todo for name, t in NEEDED if name == c["name"]]
        for run in runs:
            ok, line = run.result()
            failed += not ok
            print(line, flush=True)
    print(f"{len(runs) - failed} passed, {failed} failed")
    return 1 if failed or not todo else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Compares nt's logits with llama.cpp's over a tiny model of every architecture, and its own over placements.

For each case of arch/goldens.npz: the prompt in one pass, in chunks of 7 with all weights on storage and two buffers
(the same bits), and in parts whose last tokens are generated ones, alone and as one of three sequences (the same bits), all
against llama.cpp's logits at three positions; and those of the block that predicts further tokens, where there is one.
Files without a tensor that the architecture has must be refused by name. The model in Q8_0 is compared with itself in F32.
On a GPU (`--backend cuda`) every position is compared with processors', too.

    pip install gguf==0.19.0 numpy
    tests/fidelity/check_arch.py target/release/nt [--only NAME] [--backend cpu|cuda] [--extra "-t 4"] [--jobs N]
"""
import argparse
import concurrent.futures
import functools
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
# On a GPU so many times that, and so many positions more that may lie further off: latent vectors are rounded to halves and
# multiplied once more. docs/architectures.md says what exact arithmetic with nothing but rounded operands gives: as much.
EASED_CUDA = {"deepseek2-kvb": (2, 0), "deepseek2-lite": (1, 3), "gemma4": (1, 1)}
# The same of further tokens: X is nothing there but what one block of latent attention and experts makes, and routers flip.
EASED_FURTHER_CUDA = {"deepseek2-mtp": (6, 15)}
# With weights in Q8_0, beside those in F32: what rounding weights and activations adds, of half of the positions.
NMSE_MAX_Q8 = 1e-2
# The same where rounded weights choose other experts.
NMSE_MAX_Q8_ROUTED = 1e-1
# Tokens of `parts` that are generated ones.
GENERATED = 4
GELU = ("gemma", "starcoder2", "falcon", "gptneox", "gpt2")
# For a quantised type, so many times llama.cpp's own distance from the exact logits.
PEER_FACTOR = 4
# Longer prompts are computed alone.
SEQUENCES_TOKENS_MAX = 1000
# Tensors that an architecture cannot do without, though others can.
NEEDED = [
    ("gptneox", "blk.0.ffn_norm.bias"),
    ("gptneox", "blk.0.ffn_up.bias"),
    ("gpt2", "blk.0.attn_qkv.bias"),
    ("falcon", "output_norm.bias"),
    ("gpt-oss", "output.weight"),
    ("gpt-oss", "blk.0.attn_q.bias"),
    ("gpt-oss", "blk.1.ffn_gate_inp.bias"),
    ("qwen3next-packed", "blk.0.ssm_ba.weight"),
    ("deepseek2", "blk.0.attn_v_b.weight"),
    ("deepseek2-kvb", "blk.0.attn_kv_b.weight"),
    ("deepseek2-mtp", "blk.4.nextn.eh_proj.weight"),
    ("mamba2", "blk.0.ssm_conv1d.bias"),
    ("nemotron_h", "blk.0.ssm_norm.weight"),
    ("gemma4", "rope_freqs.weight"),
    ("gemma4", "per_layer_token_embd.weight"),
    ("gemma4", "blk.0.inp_gate.weight"),
    ("gemma4-31b", "blk.3.attn_k.weight"),
    ("gemma4-moe", "blk.0.ffn_gate_inp.scale"),
    ("gemma4-moe", "blk.3.post_ffw_norm_2.weight"),
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

    @functools.cache
    def hparams(self):
        shown = subprocess.run([self.nt, "inspect", self.model, "--json"], check=True, capture_output=True, text=True)
        return json.loads(shown.stdout)["hparams"]

    def depth(self):
        """How much more rounding may add up than in a few blocks."""
        return max(1, self.hparams()["n_layers"] / 8)

    def placed(self, whole, *more):
        """What is wrong with the bits of other placements; nothing if they are those of `whole`."""
        n = self.hparams()["n_layers"]
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
        if whole is None:
            return False, f"FAIL {name:18} {error}"
        wrong = runs.placed(whole, *["1:1:" + str(runs.hparams()["n_layers"] - 2)] * (backend == "cuda"))
        if wrong:
            return False, f"FAIL {name:18} {wrong}"
        parts, error = runs.logits("--parts", ",".join(map(str, case["parts"])))
        if parts is None:
            return False, f"FAIL {name:18} in parts: {error}"
        if len(golden["tokens"]) <= SEQUENCES_TOKENS_MAX:
            beside, error = runs.logits("--parts", ",".join(map(str, case["parts"])), "--sequences", "3")
            if beside is None or not np.array_equal(parts, beside):
                return False, f"FAIL {name:18} as one of three sequences: {error or 'other bits than alone'}"
        further = goldens.get(f"{name}.mtp")
        if further is not None:
            rows, error = runs.logits("--mtp")
            if rows is None:
                return False, f"FAIL {name:18} further tokens: {error}"
            off = nmse(rows[golden["positions"]], further)
            # An expert that rounding chooses may be another one on a GPU: all positions tell.
            fine, told = (off < NMSE_MAX, "") if backend == "cpu" else check_beside(runs, case, rows, d, "--mtp")
            if not fine:
                return False, f"FAIL {name:18} further tokens: {off:.1e}{told}"
            further = f"  further {off:.1e}{told}"
        depth = runs.depth()
        checks = [check_quantised(runs, case, whole, parts, d)] if case["type"] == "F32" else []
        checks += [check_beside(runs, case, whole, d), check_both(runs, case, parts, d)] if backend == "cuda" else []
    limit = NMSE_MAX_GELU if name.startswith(GELU) else NMSE_MAX
    if backend == "cuda":
        # Of a generated token there is one position, and it may be one of the worse.
        limit = NMSE_MAX_CUDA * depth * EASED_CUDA.get(name, (1, 0))[0]
    peer = PEER_FACTOR * case["peer_nmse"]
    exact, decoded = nmse(whole[golden["positions"]], golden["exact"]), nmse(parts[-1:], golden["in_parts"])
    ok = exact < limit + peer and decoded < limit * (2 if backend == "cuda" else 1) + peer
    ok &= bool(np.isfinite(whole).all()) and all(fine for fine, _ in checks)
    shown = "".join(text for _, text in checks)
    line = f"{name:18} prompt {exact:.1e}  generated {decoded:.1e}  limit {limit + peer:.0e}{further or ''}{shown}"
    return ok, f"{'ok  ' if ok else 'FAIL'} {line}"


def check_beside(runs, case, whole, d, *options):
    """A GPU's logits beside those of processors, position by position."""
    theirs, _ = Runs(runs.nt, case, case["type"], runs.tokens, d, ("--backend", "cpu")).logits(*options)
    each = np.array([nmse(a, b) for a, b in zip(whole, theirs)])
    # Where two experts are nearly as good, a rounding may choose the other one.
    allowed = 1 + len(each) // 50 if runs.hparams()["n_experts"] else 0
    times, more = (EASED_FURTHER_CUDA if options else EASED_CUDA).get(case["name"], (1, 0))
    allowed += more
    middle = float(np.median(each))
    beyond = np.flatnonzero(each > OUTLIER_MAX * middle)
    ok = len(beyond) <= allowed and middle < NMSE_MAX_CUDA * times * runs.depth() + PEER_FACTOR * case["peer_nmse"]
    more = f", {len(beyond)} beyond {OUTLIER_MAX} times that ({', '.join(map(str, beyond[:5]))})" if len(beyond) else ""
    return ok, f"  all {middle:.1e}{more}"


def check_both(runs, case, parts, d):
    """A GPU with processors that compute what rests in RAM, of generated tokens."""
    both = Runs(runs.nt, case, case["type"], runs.tokens, d, ("--site", "both"))
    n = runs.hparams()["n_layers"]
    got, error = both.logits("--tiers", f"0:{n}:0", "--parts", ",".join(map(str, case["parts"])))
    if got is None:
        return False, f"  two sites: {error}"
    same = np.array_equal(got[:-GENERATED], parts[:-GENERATED])
    middle = float(np.median([nmse(a, b) for a, b in zip(got[-GENERATED:], parts[-GENERATED:])]))
    ok = same and middle < NMSE_MAX_CUDA * runs.depth() + PEER_FACTOR * case["peer_nmse"]
    return ok, f"  two sites {middle:.1e}" + ("" if same else ", prompt OTHER BITS")


def check_quantised(runs, case, whole, parts, d):
    """The same model in Q8_0 beside itself in F32."""
    quantised = Runs(runs.nt, case, "Q8_0", runs.tokens, d, runs.extra)
    got, error = quantised.logits()
    if got is None:
        return False, f"  Q8_0: {error}"
    wrong = quantised.placed(got) if "cuda" in runs.extra else ""
    in_parts, _ = quantised.logits("--parts", ",".join(map(str, case["parts"])))
    exact = in_parts is not None and np.array([nmse(a, b) for a, b in zip(in_parts[-GENERATED:], parts[-GENERATED:])])
    middles = [float(np.median([nmse(a, b) for a, b in zip(got, whole)])), float(np.median(exact))]
    shown = f"  Q8_0 {middles[0]:.1e}, {middles[1]:.1e}"
    limit = NMSE_MAX_Q8_ROUTED if runs.hparams()["n_experts"] else NMSE_MAX_Q8
    return max(middles) < limit and not wrong, shown + (f" {wrong}" if wrong else "")


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
    with np.load(f"{HERE}/arch/goldens.npz") as npz:
        goldens = dict(npz)
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

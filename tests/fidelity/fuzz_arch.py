#!/usr/bin/env python3
"""Changes one size or key at a time of a tiny model of each architecture, and runs it: every run must end with logits or a
sentence, never with a panic, an abort or a signal.

Sizes are those of arch/synth_arch.py, whose tensors follow them; keys are replaced by --override-kv, while tensors stay.

    pip install gguf==0.19.0 numpy
    tests/fidelity/fuzz_arch.py target/release/nt [--only NAME] [--keys | --sizes] [--jobs N] [--backend cpu|cuda]
"""
import argparse
import concurrent.futures
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "arch"))

from gguf import GGUFReader, GGUFValueType as V  # noqa: E402
from synth_arch import PRESETS, write  # noqa: E402

# Sizes that are odd, one, no multiple of a block, at a limit or beyond it; products stay below what a machine holds.
SIZES = [0, 1, 2, 3, 5, 7, 31, 33, 64, 65, 127, 257, 1023, 1024, 1025, 2048]
LARGEST = {"L": 7, "V": 1025, "E": 257}
INTS = [-1, 0, 1, 2, 3, 7, 63, 65, 1024, 1025, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1]
FLOATS = ["-1", "0", "-0.0", "1e-45", "1e-30", "1e-7", "0.5", "1", "1000", "1e7", "1e30", "3.4e38", "1e39", "inf", "nan"]
SECONDS = 120


def run(nt, backend, path, more):
    args = [nt, "logits", path, "--tokens", "1,2,3,4,5", "--backend", backend, "-o", "/dev/null", "--threads", "1", *more]
    if backend == "cpu":
        args += ["--ram", "2GiB"]
    try:
        out = subprocess.run(args, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "no end", args, "", False
    said = out.stderr.strip()
    ended = out.returncode in (0, 1, 2, 4) and "panicked" not in said and "fault of nt" not in said
    if ended and (out.returncode == 0 or said):
        return None, args, said, out.returncode == 0
    return f"exit {out.returncode}", args, said, False


def sizes(name, folder):
    """Files of one size changed each."""
    _, default, _ = PRESETS[name]
    for field, now in default.items():
        if type(now) is not int:
            continue
        for n in SIZES:
            if n == now or n > LARGEST.get(field, 1 << 20):
                continue
            path = os.path.join(folder, f"{name}-{field}-{n}.gguf")
            try:
                write(name, path, 1, {field: n})
            except (Exception, SystemExit):
                # The builder has no such model.
                continue
            yield f"{name} {field}={n}", path, []
            if field in ("hd", "d", "rope", "nope", "vhd", "kv_rank"):
                yield f"{name} {field}={n} q8_0", path, ["--kv", "q8_0"]


def keys(name, folder):
    """One file, with one key replaced each."""
    path = os.path.join(folder, f"{name}.gguf")
    write(name, path, 1, {})
    for key, field in GGUFReader(path).fields.items():
        kind = field.types[0]
        if key.startswith(("GGUF.", "general.", "tokenizer.")):
            continue
        if kind == V.FLOAT32:
            values = [f"float:{v}" for v in FLOATS]
        elif kind == V.BOOL:
            values = ["bool:true", "bool:false", "int:2"]
        elif kind == V.STRING:
            values = ["str:none", "str:linear", "str:yarn", "str:"]
        else:
            values = [f"int:{v}" for v in INTS] + ["float:1.5", "bool:true"]
        for v in values:
            yield f"{name} {key}={v}", path, ["--override-kv", f"{key}={v}"]


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("nt")
    a.add_argument("--only", help="presets that contain this")
    a.add_argument("--keys", action="store_true", help="keys alone")
    a.add_argument("--sizes", action="store_true", help="sizes alone")
    a.add_argument("--jobs", type=int, default=os.cpu_count())
    a.add_argument("--backend", default="cpu")
    a.add_argument("-v", action="store_true", help="show what each run says")
    a = a.parse_args()
    kinds = [of for of, asked, other in ((sizes, a.sizes, a.keys), (keys, a.keys, a.sizes)) if asked or not other]
    bad = n = computed = 0
    for name in [p for p in PRESETS if not a.only or a.only in p]:
        for of in kinds:
            with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
                tasks = [(what, pool.submit(run, a.nt, a.backend, path, more)) for what, path, more in of(name, folder)]
                for what, task in tasks:
                    fault, args, said, has_logits = task.result()
                    n += 1
                    computed += has_logits
                    if a.v:
                        print(f"{what}: {fault or 'fine'}: {said[:300]}", flush=True)
                    if fault:
                        bad += 1
                        print(f"{what}: {fault}\n  {' '.join(args)}\n  {said[:600]}", flush=True)
    print(f"{n} runs, {computed} of them computed, {bad} ended otherwise than with logits or a sentence")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Write a GGUF of true size of an architecture that synth_arch.py knows, with random weights.

Names, keys and shapes come from synth_arch.py's builders, quantised bytes from synth_gguf.py's pool, so a file of 12 GB
takes a minute. It serves measurements of speed and memory: what it generates is noise.

    pip install gguf==0.19.0 numpy
    synth_large.py gpt-oss-20b MXFP4 out.gguf            # experts MXFP4, the rest Q8_0
    synth_large.py gemma3-27b Q4_K_M out.gguf --layers 20
    synth_large.py --list
"""
import argparse
import json
import pathlib
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as T

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from synth_arch import PRESETS as BUILDERS, Model, tokenizer
from synth_gguf import Source, tensor_type

QWEN35 = dict(hd=256, rot=64, sections=[11, 11, 10, 0], base=1e7, conv=4, d=128, n_k=16, interval=4, V=248320, eps=1e-6, pre="qwen35")

# The builder in synth_arch.py, and the published model's shape.
PRESETS = {
    "gpt-oss-20b":      ("gpt-oss", dict(L=24, D=2880, F=2880, H=64, K=8, hd=64, V=201088, E=32, used=4, EF=2880, window=128, scaling=["yarn", 32.0, 4096], eps=1e-5, pre="gpt-4o")),
    "gpt-oss-120b":     ("gpt-oss", dict(L=36, D=2880, F=2880, H=64, K=8, hd=64, V=201088, E=128, used=4, EF=2880, window=128, scaling=["yarn", 32.0, 4096], eps=1e-5, pre="gpt-4o")),
    "qwen3.5-27b":      ("qwen35", dict(QWEN35, L=64, D=5120, F=17408, H=24, K=4, n_v=48)),
    "qwen3.5-35b-a3b":  ("qwen35moe", dict(QWEN35, L=40, D=2048, F=512, H=16, K=2, n_v=32, E=256, used=8, EF=512, SF=512)),
    "gemma3-27b":       ("gemma3", dict(L=62, D=5376, F=21504, H=32, K=16, hd=128, V=262144, window=1024, base=1e6, eps=1e-6)),
    "glm4.5-air":       ("glm4moe", dict(L=46, D=4096, F=10944, H=96, K=8, hd=128, rot=64, V=151552, E=128, used=8, EF=1408, shared=1, lead=1, eps=1e-5, pre="glm4")),
}


class Large(Model):
    """Remembers shapes where Model makes numbers."""

    def w(self, name, *shape, gain=1.0, sigma=None, kind="matrix"):
        self.tensors.append((name + ".weight", shape, kind, float(sigma if sigma else gain / shape[-1] ** 0.5)))

    def put(self, name, data):
        self.tensors.append((name, np.ascontiguousarray(data, np.float32), "fixed", None))


def encoding(mix, name, shape, kind, layers, tied):
    """The type of one matrix: MXFP4 is a type of experts, an embedding that is the head has the head's, and what a row does
    not divide into falls back as llama-quantize's does."""
    if kind == "fixed":
        return T.F32
    layer = int(name.split(".")[1]) if name.startswith("blk.") else None
    if mix == "MXFP4":
        return T.MXFP4 if kind == "expert" else T.Q8_0
    qtype = tensor_type(mix, "output.weight" if tied and name == "token_embd.weight" else name, layer, layers)
    if shape[-1] % GGML_QUANT_SIZES[qtype][0]:
        return T.Q8_0 if shape[-1] % 32 == 0 else T.F16
    return qtype


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("preset", nargs="?", choices=PRESETS)
    a.add_argument("mix", nargs="?", help="MXFP4, or what synth_gguf.py takes")
    a.add_argument("out", nargs="?")
    a.add_argument("--seed", type=int, default=1)
    a.add_argument("--layers", type=int, help="write fewer blocks than the preset has")
    a.add_argument("--shape", type=json.loads, default={}, help="JSON that overrides the preset's fields")
    a.add_argument("--list", action="store_true")
    args = a.parse_args()
    if args.list or not args.out:
        for name, (_, shape) in PRESETS.items():
            print(f"{name:16} {json.dumps(shape)}")
        return 0 if args.list else 2
    builder, shape = PRESETS[args.preset]
    arch, default, build = BUILDERS[builder]
    p = default | shape | args.shape
    if args.layers:
        p["L"] = args.layers
    m = Large(arch, p, args.seed)
    build(m, p)
    w = GGUFWriter(args.out, arch)
    w.add_name(f"synthetic {args.preset} {args.mix}")
    for key, value in m.keys:
        kind = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, str: w.add_string}
        kind.get(type(value), w.add_array)(key, value)
    tokenizer(w, p)
    types = [encoding(args.mix, name, data, kind, p["L"], p["tied"]) for name, data, kind, _ in m.tensors]
    for (name, data, kind, _), qtype in zip(m.tensors, types):
        if kind == "fixed":
            w.add_tensor_info(name, data.shape, np.dtype(np.float32), data.nbytes)
        elif qtype in (T.F32, T.F16):
            dtype = np.dtype(np.float32 if qtype == T.F32 else np.float16)
            w.add_tensor_info(name, data, dtype, int(np.prod(data)) * dtype.itemsize)
        else:
            block, size = GGML_QUANT_SIZES[qtype]
            rows = (*data[:-1], data[-1] // block * size)
            w.add_tensor_info(name, rows, np.dtype(np.uint8), int(np.prod(rows)), raw_dtype=qtype)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    source = Source(args.seed)
    for (name, data, kind, sigma), qtype in zip(m.tensors, types):
        w.write_tensor_data(data if kind == "fixed" else source.matrix(data, qtype, sigma))
    w.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

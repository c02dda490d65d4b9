#!/usr/bin/env python3
"""Write the header of a model with the true shapes of a known one, and no weights.

`nt plan` reads nothing else. The file has its full length, but its data is a hole: a 70B takes a few
MiB on a disk.

    header.py llama3-70b Q6_K /tmp/70b.gguf
"""
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as T

from synth_gguf import PRESETS, metadata, plan


def main():
    if len(sys.argv) != 4 or sys.argv[1] not in PRESETS:
        print(f"usage: header.py PRESET MIX OUT\npresets: {' '.join(PRESETS)}", file=sys.stderr)
        return 2
    preset, mix, out = sys.argv[1:]
    p = PRESETS[preset]
    w = GGUFWriter(out, p["arch"])
    w.add_name(f"synthetic {preset} {mix}")
    metadata(w, p, 8192)
    data_bytes, divisors = 0, None
    for name, shape, qtype in plan(p, mix):
        qtype = qtype or T.F32
        block, size = GGML_QUANT_SIZES[qtype]
        if name == "rope_freqs.weight":
            divisors = data_bytes, np.ones(shape, np.float32)
        rows = (*shape[:-1], shape[-1] // block * size)
        w.add_tensor_info(name, rows, np.dtype(np.uint8), int(np.prod(rows)), raw_dtype=qtype)
        data_bytes += -(-int(np.prod(rows)) // 32) * 32
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    w.close()
    with open(out, "r+b") as f:
        header = f.seek(0, 2)
        data = -(-header // 32) * 32
        f.truncate(data + data_bytes)
        if divisors:
            # Zeros are no divisors: these are looked at.
            f.seek(data + divisors[0])
            f.write(divisors[1].tobytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())

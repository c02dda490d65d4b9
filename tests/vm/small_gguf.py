"""Writes a GGUF file that can be staged and verified, and no more: tensors of noise, as many MiB as asked for.

    small_gguf.py OUT MIB
"""

import random
import struct
import sys

out, mib = sys.argv[1], int(sys.argv[2])
ALIGN = 32


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


tensors = [(f"blk.{i}.ffn_up.weight", (1 << 20) // 4) for i in range(mib)]
header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1)
header += text("general.architecture") + struct.pack("<I", 8) + text("llama")
offset = 0
for name, count in tensors:
    header += text(name) + struct.pack("<IQIQ", 1, count, 0, offset)
    offset += 4 * count
header += bytes(-len(header) % ALIGN)
noise = random.Random(1)
with open(out, "wb") as file:
    file.write(header)
    for _, count in tensors:
        file.write(noise.randbytes(4 * count))

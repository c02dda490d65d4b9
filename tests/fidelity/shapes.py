#!/usr/bin/env python3
"""Print the shape of a GGUF file as the JSON that tests/common/shapes.rs reads: its keys without the tokenizer's, and its tensors,
those of blocks that are alike once.

    header.py qwen3-30b-a3b Q4_K_M /tmp/m.gguf && shapes.py /tmp/m.gguf > tests/data/shapes/qwen3-30b-a3b-Q4_K_M.json
"""
import json
import re
import sys

from gguf import GGUFReader


def main():
    reader = GGUFReader(sys.argv[1])
    keys = {}
    for field in reader.fields.values():
        if field.name.startswith(("GGUF.", "tokenizer.", "general.")) and field.name != "general.architecture":
            continue
        keys[field.name] = [t.name.lower() for t in field.types] + [field.contents()]
    plain, blocks = [], {}
    for t in reader.tensors:
        shape = [int(n) for n in t.shape]
        found = re.match(r"blk\.(\d+)\.(.*)", t.name)
        if found:
            blocks.setdefault(int(found[1]), []).append([found[2], shape, int(t.tensor_type)])
        else:
            plain.append([t.name, shape, int(t.tensor_type)])
    alike = []
    for i, tensors in sorted(blocks.items()):
        same = next((a for a in alike if a["tensors"] == tensors), None)
        if same:
            same["blocks"].append(i)
        else:
            alike.append({"blocks": [i], "tensors": tensors})
    out = ["{", f'  "keys": {json.dumps(keys)},', f'  "tensors": {json.dumps(plain)},', '  "alike": [']
    out.append(",\n".join("    " + json.dumps(a) for a in alike))
    print("\n".join([*out, "  ]", "}"]))


if __name__ == "__main__":
    main()

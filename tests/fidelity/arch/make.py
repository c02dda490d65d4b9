#!/usr/bin/env python3
"""Makes goldens.npz of files that hold llama.cpp's logits of the models of synth_arch.py.

    make.py FOLDER      # has cases.txt (NAME PRESET TYPE SEED N_TOKENS [SHAPE]) and for each case NAME.npz with tokens,
                        # positions, exact and in_parts [positions, vocabulary], parts, peer_nmse, sha256 of the model;
                        # and mtp [positions, vocabulary], where a block predicts further tokens

Three positions of each case are kept, the last among them.
"""
import json
import os
import sys

import numpy as np

folder = sys.argv[1]
kept = {}
cases = []
for line in open(f"{folder}/cases.txt"):
    words = line.split()
    if not words or words[0].startswith("#"):
        continue
    name, preset, kind, seed, n = words[:5]
    golden = np.load(f"{folder}/{name}.npz")
    at = sorted({0, len(golden["positions"]) // 2, len(golden["positions"]) - 1})
    case = {"name": name, "preset": preset, "type": kind, "seed": int(seed), "shape": json.loads(words[5]) if len(words) > 5 else {}}
    case["peer_nmse"] = float(golden["peer_nmse"])
    case["sha256"] = str(golden["sha256"])
    case["parts"] = golden["parts"].tolist()
    cases.append(case)
    kept[f"{name}.tokens"] = golden["tokens"].astype(np.uint16)
    kept[f"{name}.positions"] = golden["positions"][at]
    kept[f"{name}.exact"] = golden["exact"][at]
    if "mtp" in golden:
        kept[f"{name}.mtp"] = golden["mtp"][at]
    kept[f"{name}.in_parts"] = golden["in_parts"][-1:]
np.savez_compressed(os.path.join(os.path.dirname(__file__), "goldens.npz"), cases=json.dumps(cases), **kept)

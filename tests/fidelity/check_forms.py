#!/usr/bin/env python3
"""Compare files as Ollama's converter writes them with files as llama.cpp's does: the same weights must give the same bits.

    check_forms.py NT

Each model is made by arch/synth_arch.py in llama.cpp's form, and written again with Ollama's names of keys and tensors,
without the values that Ollama leaves out, and with parts of images beside it. Source of the differences:
`llama/compat/llama-ollama-compat.cpp` of Ollama.
"""
import os
import re
import struct
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
U32, F32, BOOL, STR, ARRAY = 4, 6, 7, 8, 9
TOKENS = "104,101,108,108,111,3,7,9,44,45,46,200,201,17,18,19,20,21,22,23,24,25"


class File:
    """A header, each value as (type, bytes), and the bytes of each tensor."""

    def __init__(self, path):
        data = open(path, "rb").read()
        self.at, self.data = 8, data
        n_tensors, n_keys = self.take("<QQ", 16)
        self.keys = {}
        for _ in range(n_keys):
            key = self.text().decode()
            ty = self.take("<I", 4)[0]
            start = self.at
            self.skip(ty)
            self.keys[key] = (ty, data[start : self.at])
        infos = []
        for _ in range(n_tensors):
            name = self.text().decode()
            dims = self.take("<I", 4)[0]
            shape = self.take(f"<{dims}Q", 8 * dims)
            infos.append((name, shape, *self.take("<IQ", 12)))
        start = -(-self.at // 32) * 32
        ends = sorted(offset for *_, offset in infos) + [len(data) - start]
        self.tensors = [
            [name, shape, ty, data[start + offset : start + min(e for e in ends if e > offset)]] for name, shape, ty, offset in infos
        ]

    def take(self, form, n):
        self.at += n
        return struct.unpack(form, self.data[self.at - n : self.at])

    def text(self):
        n = self.take("<Q", 8)[0]
        self.at += n
        return self.data[self.at - n : self.at]

    def skip(self, ty):
        if ty == STR:
            self.text()
        elif ty == ARRAY:
            of, n = self.take("<IQ", 12)
            for _ in range(n):
                self.skip(of)
        else:
            self.at += SIZES[ty]

    def rename(self, pattern, to):
        self.keys = {re.sub(pattern, to, k): v for k, v in self.keys.items()}

    def tensor(self, pattern, to):
        for t in self.tensors:
            t[0] = re.sub(pattern, to, t[0])

    def drop(self, *keys):
        for key in keys:
            self.keys.pop(key, None)

    def text_of(self, key, value):
        self.keys[key] = (STR, struct.pack("<Q", len(value)) + value.encode())

    def numbers(self, key, values):
        self.keys[key] = (ARRAY, struct.pack("<IQ", U32, len(values)) + struct.pack(f"<{len(values)}I", *values))

    def parts_of_images(self):
        for name in ("v.blk.0.attn_q.weight", "mm.0.bias", "v.patch_embd.weight"):
            self.tensors.append([name, (8,), 0, struct.pack("<8f", *range(8))])

    def write(self, path):
        def text(value):
            return struct.pack("<Q", len(value)) + value.encode()

        out = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.keys))]
        out += [text(k) + struct.pack("<I", ty) + v for k, (ty, v) in self.keys.items()]
        at, body = 0, []
        for name, shape, ty, data in self.tensors:
            out.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, ty, at))
            body.append(data + b"\0" * (-len(data) % 32))
            at += len(body[-1])
        head = b"".join(out)
        open(path, "wb").write(head + b"\0" * (-len(head) % 32) + b"".join(body))


def gemma3(f):
    f.rename(r"^gemma3\.rope\.freq_base_swa$", "gemma3.rope.local.freq_base")
    f.rename(r"^gemma3\.rope\.freq_base$", "gemma3.rope.global.freq_base")
    f.parts_of_images()


def gptoss(f):
    f.text_of("general.architecture", "gptoss")
    f.rename(r"^gpt-oss\.", "gptoss.")
    f.drop("gptoss.expert_feed_forward_length", "gptoss.rope.scaling.type")
    f.tensor(r"\.attn_output\.", ".attn_out.")
    f.tensor(r"\.attn_sinks\.weight$", ".attn_sinks")
    f.tensor(r"\.post_attention_norm\.", ".ffn_norm.")


def mistral3(f):
    f.rename(r"rope\.scaling\.yarn_beta_(fast|slow)$", r"rope.scaling.beta_\1")
    f.rename(r"rope\.scaling\.yarn_log_multiplier$", "rope.scaling.mscale_all_dim")
    f.rename(r"attention\.temperature_scale$", "rope.scaling_beta")
    f.parts_of_images()


def olmo3(f):
    f.text_of("general.architecture", "olmo3")
    f.rename(r"^olmo2\.", "olmo3.")


def lfm2(f):
    f.tensor(r"^token_embd_norm\.", "output_norm.")
    f.keys["lfm2.feed_forward_length"] = (U32, struct.pack("<I", 12288))


def qwen(f):
    arch = next(k for k in f.keys if k.endswith(".block_count")).split(".")[0]
    blocks = struct.unpack("<I", f.keys[f"{arch}.block_count"][1])[0]
    heads = struct.unpack("<I", f.keys[f"{arch}.attention.head_count_kv"][1])[0]
    every = struct.unpack("<I", f.keys.get(f"{arch}.full_attention_interval", (U32, b"\4\0\0\0"))[1])[0]
    f.numbers(f"{arch}.attention.head_count_kv", [heads if (i + 1) % every == 0 else 0 for i in range(blocks)])
    f.tensor(r"\.ssm_dt\.bias$", ".ssm_dt")
    if arch != "qwen3next":
        f.keys[f"{arch}.ssm.v_head_reordered"] = (BOOL, b"\1")
    f.tensors.append(["mtp.fc.weight", (8,), 0, struct.pack("<8f", *range(8))])
    f.parts_of_images()


CASES = [("gemma3", gemma3), ("gpt-oss", gptoss), ("mistral3", mistral3), ("olmo3", olmo3), ("lfm2", lfm2)]
CASES += [("qwen35", qwen), ("qwen35moe", qwen), ("qwen3next", qwen)]


def logits(nt, model, out):
    done = subprocess.run([nt, "logits", model, "--tokens", TOKENS, "-o", out, "--backend", "cpu"], capture_output=True, text=True)
    return open(out, "rb").read() if done.returncode == 0 else done.stderr.strip()


def main():
    nt, failed = sys.argv[1], 0
    with tempfile.TemporaryDirectory() as work:
        for preset, change in CASES:
            plain, other = os.path.join(work, "plain.gguf"), os.path.join(work, "other.gguf")
            subprocess.run([sys.executable, os.path.join(HERE, "arch", "synth_arch.py"), preset, plain], check=True, stdout=subprocess.DEVNULL)
            file = File(plain)
            change(file)
            file.write(other)
            expected, found = logits(nt, plain, plain + ".npy"), logits(nt, other, other + ".npy")
            ok = isinstance(expected, bytes) and expected == found
            failed |= not ok
            said = next((r for r in (expected, found) if isinstance(r, str)), "other bits")
            print(f"ok    {preset}" if ok else f"FAIL  {preset}: {said}")
    sys.exit(failed)


main()

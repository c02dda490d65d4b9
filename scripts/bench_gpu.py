#!/usr/bin/env python3
"""Runs nt and llama.cpp in turn on a GPU and writes the table and plot of docs/benchmarks.md.

    scripts/bench_gpu.py --nt target/release/nt --peer llama-bench --models /dev/shm/bench \
        --disk /var/tmp/bench --out out [--only resident,link,…]

Models are made where they are missing (tests/fidelity/synth_gguf.py; needs numpy and gguf). `--models`
should be a memory file system with room for them; `--disk` gets a copy of one for reads from a disk.
Groups: resident, link, tierc, buffers, large. Every figure is the median of its runs.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
SYNTH = f"{HERE}/../tests/fidelity/synth_gguf.py"
M8, M32, M70 = ("llama3-8b", "Q8_0"), ("qwen2.5-32b", "Q4_K_M"), ("llama3-70b", "Q4_K_M")


class Bench:
    def __init__(self, args):
        self.a = args
        self.rows = []
        self.began = time.time()

    def say(self, text):
        print(f"[{time.time() - self.began:4.0f} s] {text}", file=sys.stderr, flush=True)

    def model(self, which, folder=None):
        preset, mix = which
        path = f"{self.a.models}/{preset}-{mix}.gguf"
        if not os.path.exists(path):
            self.say(f"making {path}")
            os.makedirs(self.a.models, exist_ok=True)
            subprocess.run([sys.executable, SYNTH, preset, mix, path + ".part"], check=True)
            os.rename(path + ".part", path)
        if folder is None:
            return path
        copy = f"{folder}/{os.path.basename(path)}"
        if not os.path.exists(copy):
            self.say(f"copying to {copy}")
            os.makedirs(folder, exist_ok=True)
            shutil.copyfile(path, copy)
            fd = os.open(copy, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        return copy

    def nt(self, model, extra, prompt, gen, runs):
        cmd = [self.a.nt, "bench", model, "-p", str(prompt), "-n", str(gen), "-r", str(runs), "--json", *extra.split()]
        done = subprocess.run(cmd, capture_output=True, text=True)
        if done.returncode:
            self.say(f"nt failed: {' '.join(cmd)}\n{done.stderr.strip()}")
            return None
        return json.loads(done.stdout)

    def peer(self, model, extra, prompt, gen, runs):
        if not self.a.peer:
            return {}
        cmd = [self.a.peer, "-m", model, "-p", str(prompt), "-n", str(gen), "-r", str(runs), "-o", "json", *extra.split()]
        done = subprocess.run(cmd, capture_output=True, text=True)
        if done.returncode:
            self.say(f"the peer failed: {' '.join(cmd)}\n{done.stderr.strip()[-400:]}")
            return {}
        return {"prefill" if r["n_prompt"] else "decode": statistics.median(r["samples_ts"]) for r in json.loads(done.stdout)}

    def row(self, group, what, which, extra, prompt=0, gen=0, runs=2, peer=None, goals=None):
        if self.a.only and group not in self.a.only:
            return
        model = self.model(which)
        nt = self.nt(model, f"--backend cuda {extra}", prompt, gen, runs)
        theirs = self.peer(model, peer, prompt, gen, runs) if peer else {}
        if nt is None:
            return
        row = {"group": group, "what": what, "model": " ".join(which), "args": extra, "goals": goals or {}, "peer_args": peer, "peer": theirs}
        row |= {k: nt[k] for k in ("prefill", "decode", "plan", "links", "roofline", "vram_bytes", "peak_rss_bytes", "n_buffers", "reader", "device")}
        self.rows.append(row)
        figures = {k: nt[k]["tokens_per_s"] for k in ("prefill", "decode")}
        self.say(f"{what}: {figures} peer {theirs} roofline {nt['roofline']}")
        with open(f"{self.a.out}/rows.json", "w") as f:
            json.dump(self.rows, f, indent=1)

    def run(self):
        os.makedirs(self.a.out, exist_ok=True)
        all_gpu = "-ngl 99 -fa 1"
        self.row("resident", "8B, all in VRAM", M8, "", 512, 128, 3, all_gpu, {"decode": 1.1, "prefill": 0.8})
        self.row("resident", "32B, all in VRAM", M32, "", 512, 128, 3, all_gpu, {"decode": 1.05, "prefill": 0.8})
        self.row("link", "8B, all blocks in RAM", M8, "--tiers 0:32:0", 512, 16, 2, "-ngl 0 -fa 1", {"link": 0.97})
        self.row("link", "32B, 19 blocks in VRAM, 45 in RAM", M32, "--tiers 19:45:0", 512, 8, 2, "-ngl 19 -fa 1", {"roofline": 0.95, "prefill": 6})
        places = [("/dev/shm", ""), ("disk", None), ("loop device", self.a.loop)]
        for name, place in places:
            if self.a.only and "tierc" not in self.a.only or name == "loop device" and not place:
                continue
            if place is None:
                place = self.model(M8, self.a.disk)
            tier_c = f"--tier-c {place}" if place else ""
            gen, runs = {"disk": (4, 1), "loop device": (6, 1)}.get(name, (12, 2))
            for layout in ("interleaved", "stacked"):
                self.row("tierc", f"8B, 8:12:12, tier C on {name}, {layout}", M8, f"--tiers 8:12:12 --layout {layout} {tier_c}", 0, gen, runs, None, {"roofline": 0.9} if layout == "interleaved" else {})
        self.row("large", "70B, --vram 12GiB --ram 12GiB", M70, "--vram 12GiB --ram 12GiB", 0, 4, 1)
        for n in (2, 3, 4, 6):
            self.row("buffers", f"8B, all blocks in RAM, {n} buffers", M8, f"--tiers 0:32:0 --n-buffers {n}", 0, 8, 1)
            self.row("buffers", f"32B, 19:45:0, {n} buffers", M32, f"--tiers 19:45:0 --n-buffers {n}", 0, 4, 1)
            self.row("buffers", f"8B, 8:12:12 on /dev/shm, {n} buffers", M8, f"--tiers 8:12:12 --n-buffers {n}", 0, 8, 1)
        self.table()
        self.plot()

    def table(self):
        lines = ["| Work | nt | llama.cpp | goal | |", "| --- | --- | --- | --- | --- |"]
        for r in self.rows:
            for phase in ("prefill", "decode"):
                ours = r[phase]["tokens_per_s"]
                if ours is None:
                    continue
                theirs = r["peer"].get(phase)
                cells, met = [], []
                if phase in r["goals"] and theirs:
                    cells.append(f"{r['goals'][phase]} times")
                    met.append((ours / theirs, r["goals"][phase]))
                if phase == "decode" and "link" in r["goals"]:
                    gpu = r["links"]["gpu"]
                    cells.append(f"{r['goals']['link']} of {gpu['ceiling_gb_per_s']:.1f} GB/s")
                    met.append((gpu["gb_per_s"] / gpu["ceiling_gb_per_s"], r["goals"]["link"]))
                if phase == "decode" and "roofline" in r["goals"]:
                    cells.append(f"{r['goals']['roofline']} of the roofline ({r['roofline']['predicted_tokens_per_s']:.2f}, {r['roofline']['bound_by']})")
                    met.append((r["roofline"]["achieved"], r["goals"]["roofline"]))
                verdict = ", ".join(f"{v:.2f}" + ("" if v >= g else ", **missed**") for v, g in met)
                if not met and phase == "decode" and r["roofline"]["achieved"]:
                    verdict = f"{r['roofline']['achieved']:.2f} of the roofline ({r['roofline']['bound_by']})"
                lines.append(f"| {r['what']}, {phase} {r[phase]['tokens']} | {ours:.2f} | {f'{theirs:.2f}' if theirs else ''} | {'; '.join(cells)} | {verdict} |")
        with open(f"{self.a.out}/table.md", "w") as f:
            f.write("\n".join(lines) + "\n")
        print("\n".join(lines))

    def plot(self):
        """Share of the roofline by row, as an SVG that needs nothing else."""
        rows = [r for r in self.rows if r["roofline"]["achieved"] and r["decode"]["tokens_per_s"]]
        height, left, width = 22, 330, 460
        colours = {"gpu": "#3b6ea5", "vram": "#5aa469", "nvme": "#c9803f", "ram": "#8a6bb1"}
        out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 190}" height="{height * len(rows) + 50}" font-family="sans-serif" font-size="12">', '<rect width="100%" height="100%" fill="white"/>', '<text x="10" y="18" font-weight="bold">Decode: share of the roofline, by the link that binds</text>']
        for i, r in enumerate(rows):
            y, share, bound = 30 + i * height, r["roofline"]["achieved"], r["roofline"]["bound_by"]
            out.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{r["what"]}</text>')
            out.append(f'<rect x="{left}" y="{y + 2}" width="{width * min(share, 1.05):.0f}" height="{height - 6}" fill="{colours.get(bound, "#777")}"/>')
            out.append(f'<text x="{left + width * min(share, 1.05) + 6:.0f}" y="{y + 14}">{share:.2f} of {bound}, {r["decode"]["tokens_per_s"]:.2f} tokens/s</text>')
        bottom = 30 + height * len(rows)
        out.append(f'<line x1="{left + width}" y1="26" x2="{left + width}" y2="{bottom}" stroke="#444" stroke-dasharray="4 3"/>')
        out.append(f'<text x="{left + width}" y="{bottom + 14}" text-anchor="middle">1.00</text></svg>')
        with open(f"{self.a.out}/roofline.svg", "w") as f:
            f.write("\n".join(out) + "\n")


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--nt", default="target/release/nt")
    a.add_argument("--peer", help="llama-bench; left out, only nt runs")
    a.add_argument("--models", default="/dev/shm/nt-bench")
    a.add_argument("--disk", default="/var/tmp/nt-bench")
    a.add_argument("--loop", help="a loop device over a copy of the 8B model")
    a.add_argument("--out", default="bench-gpu")
    a.add_argument("--only", type=lambda s: s.split(","))
    Bench(a.parse_args()).run()


if __name__ == "__main__":
    main()

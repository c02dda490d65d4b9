#!/usr/bin/env bash
# Checks nt on this machine's GPU: kernels, fidelity, every architecture, the same bits for every placement and cut of a prompt, and compute-sanitizer's
# four tools over the kernels' self-test and over passes of every placement.
#
#   scripts/check-gpu.sh [NT] [MODEL]     NT: the binary (target/release/nt)
#                                         MODEL: a real model for text and perplexity (SmolLM2)
#   scripts/check-gpu.sh sanitizers [NT]  compute-sanitizer alone, some twelve minutes. $OUT keeps its logs, $SELFTEST_MAX_S (240)
#                                         limits the self-test under each tool, $PASSES_MAX_S (150) the passes.
#                                         Under racecheck, which is slowest, the self-test is that of small shapes
#                                         (`nt selftest --small`): hazards do not depend on how large they are
# Needs python3 with numpy and gguf. compute-sanitizer comes from PATH or /usr/local/cuda*; without it that part
# is left out, and the script says so.
set -euo pipefail
cd "$(dirname "$0")/.."
only=
if [ "${1:-}" = sanitizers ]; then only=sanitizers; shift; fi
nt=${1:-target/release/nt}
model=${2:-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

sanitizer=$(command -v compute-sanitizer || true)
for at in /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer; do
  [ -n "$sanitizer" ] || [ ! -x "$at" ] || sanitizer=$at
done

# sanitize SECONDS TOOL LOG COMMAND…: runs COMMAND under TOOL. Tools run side by side: most of their time is spent
# on processors.
sanitize() {
  local limit=$1 tool=$2 log=$3
  shift 3
  echo "@@ $*" >> "$log"
  local code=0
  timeout -k 5 "$limit" "$sanitizer" --tool "$tool" --error-exitcode 0 --print-limit 100000 "$@" >> "$log" 2>&1 || code=$?
  echo "@@ code $code" >> "$log"
}

# passes TOOL DIR NAME: passes over many, few and one token of a model, in every kind of placement.
passes() {
  local tool=$1 dir=$2 name=$3 until=$((SECONDS + ${PASSES_MAX_S:-150})) tiers tokens log
  log=$dir/$tool.passes-$name
  for tiers in 3:0:0 0:3:0 0:0:3 1:1:1; do
    for tokens in 40 5 1; do
      [ $SECONDS -lt $until ] || { echo "@@ cut" >> "$log"; return; }
      sanitize 60 "$tool" "$log" "$nt" -q logits "$work/$name.gguf" --tokens "$(seq -s, 1 7 $((7 * tokens)))" \
        -o "$work/$tool-$name.npy" --backend cuda --tiers "$tiers"
    done
    # Tools that let a launch return when its kernel has run would wait for an answer that comes after it.
    CUDA_LAUNCH_BLOCKING=1 sanitize 60 "$tool" "$log" "$nt" -q run "$work/$name.gguf" -p "one two" -n 3 --temp 0 \
      --site both --tiers "$tiers"
    # Some passes of one token after each other: recorded, and repeated from the recording.
    sanitize 60 "$tool" "$log" "$nt" -q run "$work/$name.gguf" -p "one two" -n 4 --temp 0 --backend cuda --exact --tiers "$tiers"
  done
}

# Counts what the tools found, and the self-test's checks; hazards by kernel. Each of racecheck's records names the kernel
# of both accesses. Those of bulk_* alone meet at mbarriers, which racecheck does not follow (kernels/bulk.cu says which
# barrier orders which accesses): hazards there are counted, and are no failure; a hazard in any other kernel is one. No
# other kernel may rely on mbarriers, so a record that names none, or another name, fails. racecheck is slow: it goes as far
# as its time allows, and what was cut off is called so in place of ok, with the checks that it came to.
count_findings() {
  python3 - "$1" << 'PY'
import pathlib, re, sys
bad, checks = 0, {}
for log in sorted(pathlib.Path(sys.argv[1]).glob("*.*")):
    tool, part = log.name.split(".", 1)
    text = log.read_text(errors="replace")
    runs = text.count("@@ code ")
    failed = len(re.findall(r"@@ code (?!0\b)", text))
    cut = text.count("@@ cut") + text.count("@@ code 124") + text.count("@@ code 137")
    errors = sum(int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", text))
    known = {}
    hazards = {}
    for kernel, n in re.findall(r"Race reported between \w+ access at (?:0x[0-9a-f]+ in )?(\w+).*?\[(\d+) hazards?\]", text, re.S):
        to = known if kernel.startswith("bulk_") else hazards
        to[kernel] = to.get(kernel, 0) + int(n)
    if tool == "racecheck":
        # A record that could not be read must not pass.
        shown = sum(int(n) for n in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text))
        records = len(re.findall(r"Race reported between", text))
        errors += sum(hazards.values()) + (shown if shown and not records else 0)
    summaries = len(re.findall(r"(?:ERROR|RACECHECK) SUMMARY", text))
    ran = re.findall(r"  bound +\S+  (ok|FAILED)$", text, re.M)
    checks[tool] = checks.get(tool, 0) + len(ran)
    errors += ran.count("FAILED")
    if part.startswith("selftest") and not cut and not re.search(r"^\d+ checks, \d+ failed", text, re.M):
        # It ended before its last line.
        failed += 1
    if tool == "racecheck":
        failed -= text.count("@@ code 124") + text.count("@@ code 137")
        ok = errors == 0 and failed == 0 and runs > 0
    else:
        ok = errors == 0 and failed == 0 and cut == 0 and summaries >= runs > 0
    bad += not ok
    more = "".join(f", {n} in {k}" for k, n in hazards.items())
    more += "".join(f", {n} in {k} ordered by mbarriers" for k, n in known.items())
    more += f", {failed} runs failed" * (failed > 0) + ", cut off by its time" * (cut > 0)
    print(f"{('cut  ' if cut else 'ok   ') if ok else 'FAIL '} {tool:<10} {part:<14} {runs:>3} runs, {errors} errors{more}")
for tool, n in checks.items():
    print(f"      {tool:<10} {n} checks of the self-test")
sys.exit(bad > 0)
PY
}

sanitizers() {
  echo "== compute-sanitizer"
  if [ -z "$sanitizer" ]; then
    echo "      compute-sanitizer is neither in PATH nor below /usr/local/cuda*; memory and races are NOT checked"
    [ -z "$only" ] || failed=1
    return
  fi
  local dir=${OUT:-$work}/sanitizers tool part name parts=12
  rm -rf "$dir"
  mkdir -p "$dir"
  "$sanitizer" --version | tail -1
  python3 tests/fidelity/synth_gguf.py qwen2-tiny Q4_K_M "$work/dense.gguf" --seed 5 > /dev/null
  python3 tests/fidelity/synth_gguf.py qwen3moe-tiny Q8_0 "$work/experts.gguf" --seed 5 > /dev/null
  # One tool after the other: racecheck is so slow that the others beside it would not end.
  for tool in memcheck initcheck synccheck racecheck; do
    local small=()
    [ $tool != racecheck ] || small=(--small)
    for part in $(seq "$parts"); do
      sanitize "${SELFTEST_MAX_S:-240}" "$tool" "$dir/$tool.selftest-$part" \
        "$nt" selftest --backend cuda "${small[@]}" --part "$part/$parts" &
    done
    wait
  done
  for tool in memcheck racecheck initcheck synccheck; do
    for name in dense experts; do passes "$tool" "$dir" "$name" & done
  done
  wait
  count_findings "$dir" || failed=1
}

if [ -n "$only" ]; then
  sanitizers
  [ $failed = 0 ] && echo "all passed"
  exit $failed
fi

check() { if "$@"; then echo "ok    $*"; else echo "FAIL  $*"; failed=1; fi; }

echo "== kernels"
"$nt" selftest --backend cuda > "$work/selftest" || { failed=1; grep -v '^ok' "$work/selftest" | head -20; }
tail -1 "$work/selftest"

echo "== fidelity against llama.cpp's golden results"
python3 tests/fidelity/check.py "$nt" --extra "--backend cuda" --jobs 6 > "$work/fidelity" || failed=1
grep -v '^ok' "$work/fidelity"

echo "== every architecture against llama.cpp's golden results and processors"
python3 tests/fidelity/check_arch.py "$nt" --backend cuda --jobs 6 > "$work/arch" || failed=1
grep -v '^ok' "$work/arch"

echo "== the same bits for every placement"
tokens=$(seq -s, 1 7 400)
for preset in "qwen2-tiny Q4_K_M" "qwen3moe-tiny Q8_0"; do
  read -r name mix <<< "$preset"
  python3 tests/fidelity/synth_gguf.py "$name" "$mix" "$work/m.gguf" --seed 5 > /dev/null
  "$nt" -q logits "$work/m.gguf" --tokens "$tokens" -o "$work/want.npy" --backend cuda
  for placement in "0:3:0" "0:0:3" "1:1:1" "1:2:0" "2:0:1" "1:1:1 --layout stacked" "0:1:2 --reader pread"; do
    for n in 2 3 4 6; do
      # shellcheck disable=SC2086 # a placement is several words
      "$nt" -q logits "$work/m.gguf" --tokens "$tokens" -o "$work/got.npy" --backend cuda --tiers $placement --n-buffers $n
      cmp -s "$work/want.npy" "$work/got.npy" || { echo "FAIL  $name $mix --tiers $placement --n-buffers $n"; failed=1; }
    done
  done
  for n in 1 7 64 200 512; do
    "$nt" -q logits "$work/m.gguf" --tokens "$tokens" -o "$work/got.npy" --backend cuda --batch $n
    cmp -s "$work/want.npy" "$work/got.npy" || { echo "FAIL  $name $mix --batch $n"; failed=1; }
  done
  echo "done  $name $mix"
done

echo "== layers with windows: the same bits where they keep recent positions alone"
tokens=$(seq 1 3000 | awk '{ printf "%s%d", (NR > 1 ? "," : ""), $1 * 7 % 250 }')
parts=2960$(printf ',1%.0s' $(seq 40))
for arch in gemma3 gpt-oss gemma4; do
  python3 tests/fidelity/arch/synth_arch.py "$arch" "$work/m.gguf" > /dev/null
  logits() { "$nt" -q logits "$work/m.gguf" --tokens "$tokens" --parts "$parts" --backend cuda --exact "$@"; }
  logits -o "$work/want.npy" --swa-full
  for n in 1 64 200 512; do
    logits -o "$work/got.npy" --batch $n
    cmp -s "$work/want.npy" "$work/got.npy" || { echo "FAIL  $arch --batch $n"; failed=1; }
  done
  logits -o "$work/got.npy" --sequences 3
  cmp -s "$work/want.npy" "$work/got.npy" || { echo "FAIL  $arch --sequences 3"; failed=1; }
  echo "done  $arch"
done

echo "== two sites: generated tokens near those of the GPU alone, the same bits whenever the sites are the same"
parts=200$(printf ',1%.0s' $(seq 20))
tokens=$(seq 1 220 | awk '{ printf "%s%d", (NR > 1 ? "," : ""), $1 * 7 % 500 }')
for preset in "qwen2-tiny F16" "qwen2-tiny Q4_K_M" "qwen3moe-tiny F16" "qwen3moe-tiny Q8_0"; do
  read -r name mix <<< "$preset"
  python3 tests/fidelity/synth_gguf.py "$name" "$mix" "$work/m.gguf" --seed 5 > /dev/null
  logits() { "$nt" -q logits "$work/m.gguf" --tokens "$tokens" --parts "$parts" "$@"; }
  logits -o "$work/want.npy" --backend cuda --exact
  for placement in "0:3:0" "1:2:0" "1:1:1"; do
    rm -f "$work/first.npy"
    for n in 2 3 4 4; do
      logits -o "$work/got.npy" --site both --tiers $placement --n-buffers $n --threads $((n + 1))
      [ -f "$work/first.npy" ] || cp "$work/got.npy" "$work/first.npy"
      cmp -s "$work/first.npy" "$work/got.npy" || { echo "FAIL  $name $mix --tiers $placement --n-buffers $n: other bits"; failed=1; }
    done
    python3 - "$work/want.npy" "$work/got.npy" "$name $mix $placement" "$mix" << 'PY' || failed=1
import sys
import numpy as np
a, b = (np.load(f).astype(np.float64) for f in sys.argv[1:3])
whole = (a[:200] == b[:200]).all()
rows = ((a[200:] - b[200:]) ** 2).sum(1) / (a[200:] ** 2).sum(1)
# Activations are rounded differently where weights are quantised; a router may then choose another expert.
limit = 1e-5 if sys.argv[4] == "F16" else 2e-3
ok = whole and np.median(rows) <= limit
print(f"{'ok  ' if ok else 'FAIL'}  {sys.argv[3]}: prompt {'the same bits' if whole else 'OTHER BITS'}, generated NMSE {np.median(rows):.1e}, at most {rows.max():.1e}")
sys.exit(not ok)
PY
  done
done

echo "== feed-forward parts cut between two sites: near whole ones, the same bits with any room, buffers and threads, recorded or not"
parts=40$(printf ',1%.0s' $(seq 24))$(printf ',3%.0s' $(seq 4))
tokens=$(seq 1 76 | awk '{ printf "%s%d", (NR > 1 ? "," : ""), $1 * 7919 % 7900 }')
for preset in "F16 3 2100MB 1950MB" "Q4_K_M 8 1750MB 1400MB" "Q8_0 5 1800MB 1500MB"; do
  read -r mix layers large small <<< "$preset"
  python3 tests/fidelity/synth_gguf.py llama3-8b "$mix" "$work/m.gguf" --layers "$layers" --shape '{"V":8000}' > /dev/null
  logits() { "$nt" -q logits "$work/m.gguf" --tokens "$tokens" --parts "$parts" --backend cuda "$@"; }
  logits --site gpu -o "$work/want.npy"
  for percent in 20 60; do
    rm -f "$work/first.npy"
    for more in "$large" "$small" "$large --threads 3" "$small --n-buffers 2"; do
      # shellcheck disable=SC2086 # several options
      logits --ffn-slices $percent --vram $more -o "$work/got.npy"
      [ -f "$work/first.npy" ] || cp "$work/got.npy" "$work/first.npy"
      cmp -s "$work/first.npy" "$work/got.npy" || { echo "FAIL  $mix, $percent % for processors, --vram $more: other bits"; failed=1; }
    done
    NT_NO_CUDA_GRAPHS=1 logits --ffn-slices $percent --vram $large -o "$work/got.npy"
    check cmp "$work/first.npy" "$work/got.npy"
    told=$("$nt" run "$work/m.gguf" -p "one two" -n 8 --temp 0 --backend cuda --vram "$large" --ffn-slices $percent 2>&1 | grep -E '^sites' || true)
    check grep -q "$percent % of each feed-forward part" <<< "$told"
    python3 - "$work/want.npy" "$work/first.npy" "$mix, $percent % for processors" "$mix" << 'PY' || failed=1
import sys
import numpy as np
a, b = (np.load(f).astype(np.float64) for f in sys.argv[1:3])
rows = ((a - b) ** 2).sum(1) / (a ** 2).sum(1)
limit = 1e-5 if sys.argv[4] == "F16" else 2e-3
ok = 0 < np.median(rows) <= limit
print(f"{'ok  ' if ok else 'FAIL'}  {sys.argv[3]}: NMSE of the prompt {np.median(rows[:40]):.1e}, generated {np.median(rows[40:]):.1e}, at most {rows.max():.1e}")
sys.exit(not ok)
PY
  done
done
rm "$work/m.gguf"

echo "== experts in slots: the same bits cold and warm, read from RAM by kernels, and as the GPU's where it computes all"
python3 tests/fidelity/synth_gguf.py qwen3-30b-a3b Q4_K_M "$work/m.gguf" --layers 8 > /dev/null
tokens=$(seq 1 80 | awk '{ printf "%s%d", (NR > 1 ? "," : ""), $1 * 7919 % 150000 }')
parts=20$(printf ',1%.0s' $(seq 30))$(printf ',3%.0s' $(seq 5))$(printf ',1%.0s' $(seq 15))
for vram in 3000MB 3940MB; do
  logits() { "$nt" -q logits "$work/m.gguf" --tokens "$tokens" --parts "$parts" --backend cuda --vram $vram "$@"; }
  logits --site gpu -o "$work/want.npy"
  logits --expert-cache on -o "$work/first.npy"
  logits --expert-cache on -o "$work/again.npy"
  CUDA_LAUNCH_BLOCKING=1 logits --expert-cache on -o "$work/in-ram.npy"
  told=$("$nt" run "$work/m.gguf" -p "one two" -n 40 --temp 0 --backend cuda --vram $vram --expert-cache on 2>&1 | grep -E '^(sites|slots)' || true)
  check grep -q '^slots' <<< "$told"
  check cmp "$work/first.npy" "$work/again.npy"
  check cmp "$work/first.npy" "$work/in-ram.npy"
  if grep -q 'compute 0 %' <<< "$told"; then check cmp "$work/first.npy" "$work/want.npy"; fi
done
rm "$work/m.gguf"

if [ -n "$model" ]; then
  echo "== a real model"
  text=$("$nt" -q run "$model" -p "The capital of France is" -n 24 --temp 0 --backend cuda)
  echo "      $text"
  check test "${text#" Paris"}" != "$text"
  streamed=$("$nt" -q run "$model" -p "The capital of France is" -n 24 --temp 0 --backend cuda --exact --tiers 5:10:15)
  check test "$text" = "$streamed"
  for backend in cpu cuda; do
    "$nt" perplexity "$model" --file tests/data/declaration.txt --backend $backend --json > "$work/$backend"
    echo "      $backend $(cat "$work/$backend")"
  done
  check python3 -c "
import json
a, b = (json.load(open('$work/' + n))['perplexity'] for n in ('cpu', 'cuda'))
print(f'      {(b / a - 1) * 100:+.3f} %'); raise SystemExit(abs(b / a - 1) > 0.005)"
fi
sanitizers
[ $failed = 0 ] && echo "all passed"
exit $failed

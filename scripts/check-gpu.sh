#!/usr/bin/env bash
# Checks nt on this machine's GPU: kernels, fidelity, the same bits for every placement.
#
#   scripts/check-gpu.sh [NT] [MODEL]     NT: the binary (target/release/nt)
#                                         MODEL: a real model for text and perplexity (SmolLM2)
# Needs python3 with numpy and gguf.
set -euo pipefail
cd "$(dirname "$0")/.."
nt=${1:-target/release/nt}
model=${2:-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
check() { if "$@"; then echo "ok    $*"; else echo "FAIL  $*"; failed=1; fi; }

echo "== kernels"
"$nt" selftest --backend cuda > "$work/selftest" || { failed=1; grep -v '^ok' "$work/selftest" | head -20; }
tail -1 "$work/selftest"

echo "== fidelity against llama.cpp's golden results"
python3 tests/fidelity/check.py "$nt" --extra "--backend cuda" --jobs 6 > "$work/fidelity" || failed=1
grep -v '^ok' "$work/fidelity"

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
  echo "done  $name $mix"
done

if [ -n "$model" ]; then
  echo "== a real model"
  text=$("$nt" -q run "$model" -p "The capital of France is" -n 24 --temp 0 --backend cuda)
  echo "      $text"
  check test "${text#" Paris"}" != "$text"
  streamed=$("$nt" -q run "$model" -p "The capital of France is" -n 24 --temp 0 --backend cuda --tiers 5:10:15)
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
[ $failed = 0 ] && echo "all passed"
exit $failed

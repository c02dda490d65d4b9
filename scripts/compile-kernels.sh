#!/usr/bin/env bash
# Compiles every CUDA kernel for GPUs of three generations, as a build where nvcc is installed would, and
# keeps nothing. nvcc comes from PyPI's packages, into .cache/venv; no GPU is needed.
#
#   scripts/compile-kernels.sh [ARCH…]     (80 90 120)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

need_pip nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
nvcc=$(python3 -c 'import importlib.metadata as m; print(m.distribution("nvidia-cuda-nvcc").locate_file("nvidia/cu13/bin/nvcc"))')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ $# != 0 ] || set -- 80 90 120
for arch; do
  for unit in kernels/*.cu; do echo "$arch $unit $work/$(basename "$unit").$arch"; done
done > "$work/jobs"
xargs -P "$(nproc)" -L 1 bash -c '"$0" -arch="sm_$1" -std=c++17 -cubin -o "$3" "$2"' "$nvcc" < "$work/jobs" ||
  die "a kernel does not compile"
say "$(wc -l < "$work/jobs") units of kernels compiled"

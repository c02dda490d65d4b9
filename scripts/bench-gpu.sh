#!/usr/bin/env bash
# Benchmarks nt beside llama.cpp on this machine's GPU and writes a table and a plot.
#
#   scripts/bench-gpu.sh [OUT] [bench_gpu.py's options]     OUT: bench-gpu
#
# Uses target/release/nt (or $NT), built if it is missing. llama-bench comes from $LLAMA_BENCH, PATH, or
# is built from llama.cpp's sources in $LLAMA_SRC, else from those that PyPI's llama-cpp-python 0.3.36
# carries (cmake, ninja and nvcc are needed for that). Needs about 75 GB below $MODELS (/dev/shm/nt-bench),
# 9 GB below $DISK, python3 with numpy and gguf.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench-gpu}
[ $# = 0 ] || shift
# A folder of the user's own: what lies below /tmp under a known name may be anybody's, and would be run.
work=${XDG_CACHE_HOME:-$HOME/.cache}/nt/peer-cuda
mkdir -p -m 700 "$work"
[ -O "$work" ] || { echo "$work belongs to somebody else" >&2; exit 1; }

nt=${NT:-target/release/nt}
[ -x "$nt" ] || cargo build --locked --release

peer=${LLAMA_BENCH:-$(command -v llama-bench || true)}
[ -n "$peer" ] || peer=$work/build/bin/llama-bench
if [ ! -x "$peer" ]; then
  mkdir -p "$work"
  src=${LLAMA_SRC:-}
  if [ -z "$src" ]; then
    pip download -q --no-deps --no-binary :all: --no-build-isolation -d "$work" llama-cpp-python==0.3.36
    tar xzf "$work"/llama_cpp_python-*.tar.gz -C "$work"
    src=$(echo "$work"/llama_cpp_python-*/vendor/llama.cpp)
  fi
  cmake -S "$src" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native \
    -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF > "$work/cmake.log"
  ninja -C "$work/build" llama-bench > "$work/ninja.log"
fi
nvidia-smi --query-gpu=name,driver_version,pcie.link.gen.max,pcie.link.width.max --format=csv,noheader
python3 scripts/bench_gpu.py --nt "$nt" --peer "$peer" --models "${MODELS:-/dev/shm/nt-bench}" \
  --disk "${DISK:-/var/tmp/nt-bench}" --out "$out" "$@"

#!/usr/bin/env bash
# Soaks `nt serve`: requests of 8 to 64 tokens from 32 clients of all dialects, of which some go away, are killed, read
# slowly or send what is no request. Texts must be the same each time, memory must not grow, and at the end nothing may
# be left. It takes minutes, so no test runs it.
#
#     scripts/soak-serve.sh [REQUESTS [MODEL.gguf|smollm2]]      10000 of a tiny synthetic model, unless said otherwise
#
# A real model is served by a release build ($NT_BIN, or target/release/nt), and clients wait for an hour.
set -euo pipefail
cd "$(dirname "$0")/.."

export NT_SOAK_REQUESTS=${1:-10000}
model=${2:-}
if [ "$model" = smollm2 ]; then
    . scripts/common.sh
    need_smollm2
    model=$smollm2
fi
if [ -n "$model" ]; then
    NT_SOAK_MODEL=$(realpath "$model")
    if [ -z "${NT_BIN:-}" ]; then
        cargo build --release --locked
        NT_BIN=target/release/nt
    fi
    NT_BIN=$(realpath "$NT_BIN")
    export NT_SOAK_MODEL NT_BIN
fi
exec cargo test --locked --test serve -- --ignored --exact --nocapture soak::many_requests_of_many_clients

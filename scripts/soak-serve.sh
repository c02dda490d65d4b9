#!/usr/bin/env bash
# Soaks `nt serve`: requests of 8 to 64 tokens from 32 clients of all dialects, of which some go away, are killed, read
# slowly or send what is no request. Texts must be the same each time, memory must not grow, and at the end nothing may
# be left. It takes minutes, so no test runs it.
#
#     scripts/soak-serve.sh [REQUESTS [MODEL.gguf]]      10000 of a tiny synthetic model, unless said otherwise
set -euo pipefail
cd "$(dirname "$0")/.."

export NT_SOAK_REQUESTS=${1:-10000}
if [ -n "${2:-}" ]; then
    NT_SOAK_MODEL=$(realpath "$2")
    export NT_SOAK_MODEL
fi
exec cargo test --locked --test serve -- --ignored --exact --nocapture soak::many_requests_of_many_clients

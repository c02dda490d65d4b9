#!/usr/bin/env bash
# Builds nt, fetches a small real model, and lets it write text while most of its layers are read
# from disk on every token. Installs missing Debian packages when run as root; see common.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

need_cargo
say "building nt (cargo build --release)"
cargo build --release --locked
need_smollm2
say "the model takes 92 MiB; it gets 40 MiB of RAM, and 20 of its 30 blocks stream from disk"
exec target/release/nt run "$smollm2" -p "The capital of France is" -n 48 --temp 0 --ram 40MiB --tiers 0:10:20 "$@"

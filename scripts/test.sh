#!/usr/bin/env bash
# Passes every test: format, lints, docs, unit and black-box tests, fidelity against llama.cpp's
# golden results. Installs missing Debian packages when run as root; see common.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

export CARGO_INCREMENTAL=0 # one build: what serves the next one only takes room
need_room 4
need_cargo
need_pip gguf==0.19.0 numpy==2.4.6
need_smollm2

say "format and lints"
cargo fmt --check
cargo clippy --locked --all-targets -- -D warnings
say "docs"
RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --quiet
say "tests"
export XDG_CACHE_HOME=$PWD/target/cache # rates that were measured here under load would divide work
[ -d "${NT_VOCAB_DIR:-../shared/vocab}" ] || say "no vocabularies in ../shared/vocab or \$NT_VOCAB_DIR: tests/tokenizer_vocab.rs compares its own fixtures only"
cargo test --locked
cargo build --locked --release
say "CUDA kernels"
# Before and since Hopper, whose own build is that of scripts/check-gpu.sh.
scripts/compile-kernels.sh 80 120
say "a real model, most of it on disk"
text=$(target/release/nt -q run "$smollm2" -p "The capital of France is" -n 8 --temp 0 --ram 40MiB --tiers 0:10:20)
[ "${text#" Paris"}" != "$text" ] || die "SmolLM2 did not continue with \" Paris\" but with: $text"
say "drives, in a virtual machine"
status=0
NT_VM_MODEL=$smollm2 tests/vm/run.sh || status=$?
[ "$status" = 0 ] || [ "$status" = 77 ] || die "the checks in the virtual machine failed"
say "fidelity against llama.cpp"
python3 tests/fidelity/check.py target/release/nt
python3 tests/fidelity/check_kv.py target/release/nt
say "every architecture against llama.cpp"
python3 tests/fidelity/check_arch.py target/release/nt
say "files of Ollama's converter"
python3 tests/fidelity/check_forms.py target/release/nt

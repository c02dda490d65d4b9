#!/usr/bin/env bash
# Asks `nt serve` for JSON of 200 schemas of JSON-Schema-Test-Suite, which the source package of the Python package
# `jsonschema` has, and validates the answers with that package. It needs a model (the one of scripts/quickstart.sh
# unless another is given) and, for a first run, PyPI; so no test runs it.
#
#     scripts/check-schemas.sh [MODEL.gguf] [--count N] [--seed S] [--tokens N]
set -euo pipefail
cd "$(dirname "$0")/.."

model=.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
case ${1:-} in '' | --*) ;; *) model=$1 && shift ;; esac
nt=${NT_BIN:-target/debug/nt}
venv=${SCHEMAS_VENV:-.cache/schemas}

[ -e "$nt" ] || cargo build --locked
if ! [ -e "$venv/suite" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" -q install jsonschema
    "$venv/bin/pip" -q download --no-deps --no-binary :all: --dest "$venv" jsonschema
    mkdir "$venv/source"
    tar -xzf "$venv"/jsonschema-*.tar.gz -C "$venv/source" --strip-components 1
    ln -s source/json/tests/draft2020-12 "$venv/suite"
fi
"$venv/bin/pip" list 2>/dev/null | grep -E '^jsonschema '

log=$(mktemp)
"$nt" serve "$model" --port 0 --backend cpu --top-k 0 --min-p 0 2>"$log" &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server 2>/dev/null || true; rm -f "$log"' EXIT
base=
for _ in $(seq 600); do
    base=$(sed -n 's/.*listening at \(http:[^ ]*\).*/\1/p' "$log")
    [ -n "$base" ] && "$venv/bin/python" -c "import urllib.request as u; u.urlopen('$base/health')" 2>/dev/null && break
    kill -0 $server 2>/dev/null || { cat "$log" >&2; exit 1; }
    sleep 0.1
done
"$venv/bin/python" tests/clients/schemas.py "$base" "$venv/suite" "$@"

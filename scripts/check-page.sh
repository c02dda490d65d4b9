#!/usr/bin/env bash
# Looks at the page of `nt serve` in Chromium: chat, stop, keys, markup of models, light and dark, narrow and wide, while most
# of the model streams from storage. Screenshots go to the folder given (default .cache/page). It needs Chromium (Debian:
# apt-get install chromium), a model that talks (the one of scripts/quickstart.sh unless another is given) and, for a first
# run, PyPI; so no test runs it.
#
#     scripts/check-page.sh [MODEL.gguf [FOLDER]]
set -euo pipefail
cd "$(dirname "$0")/.."

model=${1:-.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf}
out=${2:-.cache/page}
nt=${NT_BIN:-target/debug/nt}
venv=${PAGE_VENV:-.cache/page-venv}
browser=${CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)}

[ -n "$browser" ] || { echo "Chromium is missing (Debian: apt-get install chromium)" >&2; exit 1; }
[ -e "$nt" ] || cargo build --locked
if ! [ -e "$venv/bin/python" ]; then
    python3 -m venv "$venv"
fi
"$venv/bin/python" -c 'import playwright' 2>/dev/null || "$venv/bin/pip" -q install playwright
mkdir -p "$out"

log=$(mktemp)
keys=$(mktemp)
servers=
trap 'kill $servers 2>/dev/null || true; wait 2>/dev/null || true; rm -f "$log" "$keys"' EXIT

# serve MORE…: starts a server and waits until it answers; sets base.
serve() {
    : >"$log"
    "$nt" serve "$model" --port 0 --backend cpu "$@" 2>"$log" &
    servers="$servers $!"
    base=
    for _ in $(seq 600); do
        base=$(sed -n 's/.*listening at \(http:[^ ]*\).*/\1/p' "$log")
        [ -n "$base" ] && "$venv/bin/python" -c "import urllib.request as u; u.urlopen('$base/health')" 2>/dev/null && return
        kill -0 $! 2>/dev/null || break
        sleep 0.1
    done
    cat "$log" >&2
    exit 1
}

serve --tiers 0:10:20 --ram 60MiB --ctx 512
open=$base
echo secret-1 >"$keys"
serve --api-key-file "$keys"
"$venv/bin/python" scripts/check_page.py "$browser" "$open" "$base" "$out"

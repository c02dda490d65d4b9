#!/usr/bin/env bash
# Asks `nt serve` with the Python packages `openai`, `anthropic` and `ollama` as they are published. It needs a model
# that talks (the one of scripts/quickstart.sh unless another is given) and, for a first run, PyPI; so no test runs it.
#
#     scripts/check-clients.sh [MODEL.gguf]
set -euo pipefail
cd "$(dirname "$0")/.."

model=${1:-.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf}
nt=${NT_BIN:-target/debug/nt}
venv=${CLIENTS_VENV:-.cache/clients}

[ -e "$nt" ] || cargo build --locked
if ! [ -e "$venv/bin/python" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" -q install openai anthropic ollama
fi
"$venv/bin/pip" list 2>/dev/null | grep -E '^(openai|anthropic|ollama) '

log=$(mktemp)
server=
trap 'kill $server 2>/dev/null || true; wait $server 2>/dev/null || true; rm -f "$log"' EXIT

# serve MORE…: starts a server and waits until it answers; sets base.
serve() {
    "$nt" serve "$model" --port 0 --backend cpu "$@" 2>"$log" &
    server=$!
    base=
    for _ in $(seq 600); do
        base=$(sed -n 's/.*listening at \(http:[^ ]*\).*/\1/p' "$log")
        [ -n "$base" ] && "$venv/bin/python" -c "import urllib.request as u; u.urlopen('$base/health')" 2>/dev/null && return
        kill -0 $server 2>/dev/null || break
        sleep 0.1
    done
    cat "$log" >&2
    exit 1
}

# end: asks it to end, and expects that it does.
end() {
    kill -TERM $server
    wait $server
    echo "== the server ended with 0"
}

serve
for client in openai anthropic ollama; do
    echo "== $client"
    "$venv/bin/python" "tests/clients/${client}_client.py" "$base"
done
end
# Two models, the same file under two names.
second=$(mktemp -d)
trap 'kill $server 2>/dev/null || true; wait $server 2>/dev/null || true; rm -rf "$log" "$second"' EXIT
ln -s "$(realpath "$model")" "$second/second.gguf"
echo "== two models"
serve "$second/second.gguf"
"$venv/bin/python" tests/clients/models_client.py "$base"
end
# Calls as JSON, and as functions in tags.
tools() {
    echo "== tools, with the template ${1##*/}"
    serve --chat-template "$1"
    "$venv/bin/python" tests/clients/tools_client.py "$base" ${2:-}
    end
}
tools tests/clients/hermes.jinja
tools tests/fixtures/templates/Qwen3-Coder.jinja bare

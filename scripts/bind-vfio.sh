#!/bin/sh
# Hands a spare NVMe drive to nt: scripts/bind-vfio.sh nvme1n1 [--dry-run]
# Every check, the modules, the order of the steps and the way back are in `nt device bind`.
set -eu
[ $# -ge 1 ] || { echo "usage: $0 DEVICE [--dry-run]" >&2; exit 2; }
nt=${NT:-$(command -v nt || echo "$(dirname "$0")/../target/release/nt")}
exec "$nt" device bind "$@"

#!/bin/sh
# Gives a drive back to the kernel: scripts/release-vfio.sh nvme1n1 | --pci ADDRESS [--dry-run]
set -eu
[ $# -ge 1 ] || { echo "usage: $0 DEVICE | --pci ADDRESS [--dry-run]" >&2; exit 2; }
nt=${NT:-$(command -v nt || echo "$(dirname "$0")/../target/release/nt")}
exec "$nt" device release "$@"

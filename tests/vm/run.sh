#!/usr/bin/env bash
# Boots a virtual machine with a boot drive and several NVMe drives behind root ports, and runs
# tests/vm/guest.sh inside it. Nothing of the host is bound, mounted or written: the guest's drives
# are files under target/vm. Works without KVM (TCG).
#
#   tests/vm/run.sh [--no-build] [--keep] [only…]      names of guest checks to run, default all
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/vm
work=${NT_VM_DIR:-target/vm}
mkdir -p "$work"
build=1
only=()
for arg in "$@"; do
  case $arg in
    --no-build) build=0 ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) only+=("$arg") ;;
  esac
done

# shellcheck source=tests/vm/image.sh
. "$here/image.sh"
need_tools
fetch_kernel
if [ "$build" = 1 ]; then
  cargo build --quiet --bin nt --example nvme_probe
fi
make_root
make_initramfs
make_drives

status=0
boot iommu "${only[*]:-all}" || status=1
boot noiommu "no_iommu" || status=1
exit $status

#!/usr/bin/env bash
# Boots a virtual machine with a boot drive and several NVMe drives behind root ports, and runs
# tests/vm/guest.sh inside it. Nothing of the host is bound, mounted or written: the guest's drives
# are files under target/vm. Works without KVM (TCG). Exits with 77 where QEMU cannot be had.
#
#   tests/vm/run.sh [--no-build] [--keep] [only…]      `model` or `bench` for these alone, default all
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

# shellcheck source=scripts/common.sh
. scripts/common.sh
# shellcheck source=tests/vm/image.sh
. "$here/image.sh"
need_tools
need python3 python3
fetch_kernel
if [ "$build" = 1 ]; then
  cargo build --quiet --bin nt --example nvme_probe
fi
model=${NT_VM_MODEL:-}
if [ -z "$model" ]; then
  need_smollm2
  model=$smollm2
fi
make_root
make_initramfs
make_drives

status=0
# These drives must come out as they went in: the guest's root is mounted read-only, and the model's
# drive is read by block only.
untouched=("$work/boot.img" "$work/model.img")
sums=$(sha256sum "${untouched[@]}")
boot iommu "${only[*]:-all}" || status=1
[ ${#only[@]} != 0 ] || boot noiommu "no_iommu" || status=1
if [ "$sums" = "$(sha256sum "${untouched[@]}")" ]; then
  echo "PASS the boot drive and the model's drive are unchanged"
else
  echo "FAIL the boot drive or the model's drive has changed"
  status=1
fi
exit $status

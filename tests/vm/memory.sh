#!/usr/bin/env bash
# A machine with 2 GiB of memory and a model of 4 GiB: boots a virtual machine and runs
# tests/vm/small.sh inside it. Nothing of the host is bound or mounted; the drives are files under
# target/vm and need 9 GiB there, which are deleted afterwards. Takes five minutes under TCG and, where
# KVM works, less with NT_VM_ACCEL=kvm; scripts/test.sh does not run it. Exits with 77 where QEMU cannot be had.
#
#   tests/vm/memory.sh [--no-build]
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/vm
work=${NT_VM_DIR:-target/vm}
mkdir -p "$work"

# shellcheck source=scripts/common.sh
. scripts/common.sh
# shellcheck source=tests/vm/image.sh
. "$here/image.sh"
need_tools
need_pip gguf==0.19.0 numpy==2.4.6
fetch_kernel
# Optimised: emulated processors compute slowly enough.
[ "${1:-}" = --no-build ] || cargo build --quiet --release --bin nt
NT_VM_PROFILE=release make_root
install -m 755 "$here/small.sh" "$work/root/root/"
make_initramfs

images=("$work/boot.img" "$work/big.img")
trap 'rm -rf "${images[@]}" "$work/big"' EXIT
make_boot_drive
rm -rf "$work/big"
mkdir "$work/big"
python3 tests/fidelity/synth_gguf.py llama-tiny Q4_0 "$work/big/big.gguf" --layers 36 \
  --shape '{"D": 4096, "F": 14336, "H": 32, "K": 8}' >/dev/null
truncate -s 4600M "$work/big.img"
mke2fs -q -F -t ext4 -m 0 -d "$work/big" -E lazy_itable_init=1 "$work/big.img" >/dev/null 2>&1
rm -rf "$work/big"

log=$work/memory.log
started=$SECONDS
: >"$log"
timeout "${NT_VM_TIMEOUT:-900}" qemu-system-x86_64 -machine "q35,accel=${NT_VM_ACCEL:-tcg}" -cpu max,-arch-capabilities -smp 2 -m 2048 \
  -nodefaults -display none -serial "file:$log" -no-reboot -kernel "$vmlinuz" -initrd "$work/initramfs.gz" \
  -drive "if=none,id=boot,file=$work/boot.img,format=raw,cache=unsafe" -device nvme,serial=BOOT0001,drive=boot \
  -drive "if=none,id=big,file=$work/big.img,format=raw,cache=unsafe" -device nvme,serial=BIG00001,drive=big \
  -append "console=ttyS0 quiet panic=-1 nt.checks=memory" 2>"$work/qemu.log" || true
grep -a -E '^(PASS|FAIL|SKIP|INFO|DONE) ' "$log" | tr -d '\r' || true
echo "vm memory: $((SECONDS - started)) s, log in $log"
if grep -aq '^FAIL ' "$log" || ! grep -aq '^DONE ' "$log"; then
  echo "vm memory: FAILED" >&2
  exit 1
fi

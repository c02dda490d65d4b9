#!/usr/bin/env bash
# Boots virtual machines with NVMe drives behind root ports and runs suites of checks inside them. Nothing of
# the host is bound, mounted or written: the guests' drives are files under target/vm. Works without KVM
# (TCG). Exits with 77 where QEMU cannot be had.
#
#   tests/vm/run.sh [--no-build] [--keep] [--list] [SUITE…]
#
#   --no-build   take nt and nvme_probe as they were built last
#   --keep       leave the images of the drives in target/vm
#   --list       name the suites and what each needs
#   SUITE…       these alone, in this order; default `all`: every suite that is not marked `long`
#
# A suite is a file tests/vm/suites/NAME.sh, run by busybox's sh as root in the guest after the lines of
# tests/vm/checks.sh. It prints PASS, FAIL, SKIP and INFO lines; a FAIL, a timeout and a drive left on vfio-pci
# fail it. Its first comment lines declare what it needs (`# word: value`, each word at most once but `drive`):
#
#   # about: one line
#   # long                        run only when named
#   # drives: exp model           drives of tests/vm/drives.sh by name
#   # drive: NAME KIND[:MIB] […]  a drive of the suite's own; kinds and properties are in tests/vm/drives.sh
#   # unchanged: exp              drives whose bytes must be the same afterwards, compared by the host
#   # programs: mdadm mkfs.xfs:xfsprogs    programs of the guest, COMMAND[:PACKAGE]; fetched, not installed here
#   # modules: xfs btrfs          kernel modules of the guest
#   # files: PATH…                files of this repository, below /root/files in the guest
#   # timeout: 900                seconds after which it is given up (default 900)
#   # guest: own                  a boot of its own; else suites of one machine share a guest, one after another.
#                                 Implied by the next five
#   # machine: noiommu            without an IOMMU
#   # memory: 2048                MiB of the guest, default 1024
#   # append: WORD…               words for the kernel's command line
#   # release                     with the release build of nt
#   # icount: N                   one processor, without KVM or an IOMMU, whose clock advances 2^N ns per instruction
#
# In a shared guest the drives of all its suites are there: a suite that changes or unplugs a drive uses
# names of its own. Between suites /tmp, /etc/nt, /var/lib/nt and the mounts below /mnt are cleared.
#
# A suite talks to the host by lines on stdout: `HOST unplug NAME`, `HOST plug NAME` (a drive declared
# `absent`), `HOST wakeup` (wakes the guest once it sleeps). `again STEP` in a suite cuts the power and boots the
# same drives once more; the suite then runs with $step set to STEP.
#
# Guests run two at a time, each with a folder of its own below target/vm: NT_VM_JOBS replaces the two.
# NT_VM_DIR replaces target/vm, NT_VM_MODEL the model, NT_VM_TIMEOUT the seconds of a guest, NT_VM_ACCEL the
# accelerator, NT_VM_APPEND the words `iommu=pt` of the kernel's command line, NT_VM_SEED the seed of suites
# that take one, NT_VM_STEP the step at which a suite begins (see stage_kills_all).
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/vm
store=${NT_VM_DIR:-target/vm}
mkdir -p "$store"
build=1
keep=0
chosen=()

# shellcheck source=scripts/common.sh
. scripts/common.sh
# shellcheck source=tests/vm/image.sh
. "$here/image.sh"
# shellcheck source=tests/vm/drives.sh
. "$here/drives.sh"

for arg in "$@"; do
  case $arg in
    --no-build) build=0 ;;
    --keep) keep=1 ;;
    --list) list_suites; exit 0 ;;
    -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) die "$0: no such option: $arg" ;;
    *) chosen+=("$arg") ;;
  esac
done
[ ${#chosen[@]} != 0 ] || chosen=(all)
select_suites "${chosen[@]}"

need_tools
need python3 python3
fetch_kernel
if [ "$build" = 1 ]; then
  for profile in $(profiles); do build_nt "$profile"; done
fi
model=${NT_VM_MODEL:-}
if [ -z "$model" ]; then
  need_smollm2
  model=$smollm2
fi

# Fetched here, so that no two guests unpack one package at a time.
for suite in ${guests[*]}; do
  for program in $(declared "$suite" programs); do need_program "$program" || true; done
done
for program in "${base_programs[@]}"; do need_program "$program" || true; done

# guest_in_turn "SUITE…": runs that guest in a folder of its own, prints what it said once it has ended, and leaves
# its status there.
# QEMU 7.2 itself has been seen to end by a segmentation fault when a drive is unplugged, as often as not on some
# machines; what the guest then was about says nothing of nt. Any other failure counts at once.
guest_in_turn() {
  local attempt crashed status=1
  work=$store/${1%% *}
  mkdir -p "$work"
  rm -f "$work/status" "$work/qemu.pid"
  for attempt in 1 2 3 4 5; do
    crashed=0
    run_guest "$1" && { status=0; break; }
    [ "$crashed" = 1 ] && [ "$attempt" != 5 ] || break
    echo "INFO the emulator crashed; once more, from fresh drives"
  done >"$work/said" 2>&1
  [ "$keep" = 1 ] || rm -rf "$work"/*.img "$work/model" "$work/root"
  flock "$store" cat "$work/said"
  echo "$status" >"$work/status"
}

# A guest in the background does not hear Ctrl-C; without its emulator it comes to its end.
end_guests() {
  local guest
  for guest in "${guests[@]}"; do kill "$(cat "$store/${guest%% *}/qemu.pid" 2>/dev/null)" 2>/dev/null || true; done
  wait
}
trap end_guests EXIT
trap 'exit 130' INT TERM
turns=${NT_VM_JOBS:-2}
for guest in "${guests[@]}"; do
  while [ "$(jobs -rp | wc -l)" -ge "$turns" ]; do wait -n || true; done
  guest_in_turn "$guest" &
done
wait
status=0
for guest in "${guests[@]}"; do
  [ "$(cat "$store/${guest%% *}/status" 2>/dev/null)" = 0 ] || { echo "tests/vm: the guest of $guest failed" >&2; status=1; }
done
exit $status

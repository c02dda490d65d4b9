#!/bin/sh
# Writes what ZFS is known by to a device or file, with nothing but dd: four labels, each with the packed list of a
# pool's name and GUID and uberblocks behind it. Not a pool that could be imported.
#
#   zfs.sh DEVICE BYTES
set -eu
device=$1
end=$(($2 / 262144 * 262144))
label=$(mktemp)

be32() { for word in "$@"; do printf "\\$(printf %03o $((word >> 24 & 255)))\\$(printf %03o $((word >> 16 & 255)))\\$(printf %03o $((word >> 8 & 255)))\\$(printf %03o $((word & 255)))"; done; }
padded() { printf %s "$1"; head -c $(((4 - ${#1} % 4) % 4)) /dev/zero; }
# number NAME VALUE: a pair of type uint64
number() { be32 $(((${#1} + 3) / 4 * 4 + 28)) 32 ${#1}; padded "$1"; be32 8 1 0 $2; }

{
  # XDR, little-endian host, version 0, unique names (sys/nvpair.h)
  printf '\001\001\000\000'; be32 0 1
  number pool_guid 123456789
  be32 32 32 4; printf name; be32 9 1 4; printf tank
  be32 0 0
} >"$label"
for at in 0 262144 $((end - 524288)) $((end - 262144)); do
  dd if="$label" of="$device" bs=1024 seek=$((at / 1024 + 16)) conv=notrunc 2>/dev/null
  slot=0
  while [ $slot -lt 16 ]; do
    # magic, version 5000, transaction, sum of GUIDs, time, as a little-endian machine writes them
    printf '\014\261\272\000\000\000\000\000\210\023\000\000\000\000\000\000\'"$(printf %03o $((slot + 1)))"'\000\000\000\000\000\000\000' |
      dd of="$device" bs=1024 seek=$((at / 1024 + 128 + slot)) conv=notrunc 2>/dev/null
    slot=$((slot + 1))
  done
done
rm "$label"
sync

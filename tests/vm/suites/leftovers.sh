# about: a release where /run has no room or may only be read, a drive unbound by hand, damaged records, partitions that the kernel does not show
# drive: left random:16 serial=LEFT0001
# drive: usb blank:64 serial=USB00001
# unchanged: left
# programs: mkfs.ext4:e2fsprogs
# timeout: 600
allow
dev=$(drive LEFT0001)n1
at=$(address ${dev%n1})
base=/sys/bus/pci/devices/$at
whole() {
  { echo "driver $(basename "$(readlink $base/driver)"), driver_override $(cat $base/driver_override)"; ls -A /run/nt; } >>/tmp/out
  [ "$(basename "$(readlink $base/driver)")" = nvme ] && [ "$(cat $base/driver_override)" = "(null)" ] && pass "$1" || fail "$1"
}

works "bind" $nt bind $dev
mount --bind /run/nt /run/nt && mount -o remount,bind,ro /run/nt
works "release while /run may only be read" $nt release $dev
grep -q "could not be moved forward" /tmp/out && pass "and it says so" || fail "and it says so"
whole "the kernel has it"
umount /run/nt
$nt list >/tmp/out 2>&1; grep -q "$at has a stale record" /tmp/out && pass "the record is known as stale" || fail "the record is known as stale"
works "and the next bind goes on" $nt bind $dev
works "release" $nt release $dev

mount -t tmpfs -o size=16k tmpfs /run/nt
works "bind, with little room" $nt bind $dev
dd if=/dev/zero of=/run/nt/full bs=1k 2>/dev/null
works "release while /run is full" $nt release $dev
whole "the kernel has it"
rm -f /run/nt/full; umount /run/nt

works "bind" $nt bind $dev
works "release with ulimit -f 0" sh -c "ulimit -f 0; exec $nt release $dev >/dev/null 2>&1"
whole "the kernel has it"

works "bind" $nt bind $dev
echo $at >/sys/bus/pci/drivers/vfio-pci/unbind
works "release after it was unbound by hand" $nt release $dev
whole "the kernel has it"

works "bind" $nt bind $dev
: >/run/nt/$at.toml
$nt list >/tmp/out 2>&1; grep -q "$at has a record of nt's that is damaged" /tmp/out && pass "list tells of an empty record" || fail "list tells of an empty record"
$nt release $dev >/tmp/out 2>&1; grep -q "nt device release --pci $at" /tmp/out && pass "release by name tells what helps" || fail "release by name tells what helps"
works "release by address" $nt release --pci $at
whole "the kernel has it"

mkdir -p /dev/disk/by-path; ln -s ../../$dev /dev/disk/by-path/pci-$at-nvme-1
works "bind by a link" $nt bind /dev/disk/by-path/pci-$at-nvme-1
rm -r /dev/disk
works "release by the link that is gone" $nt release /dev/disk/by-path/pci-$at-nvme-1
whole "the kernel has it"

# A table in blocks of 4096 on a drive of 512, with ext4 in its one partition.
usb=$(drive USB00001)n1
nt probe storage /dev/$usb --block-size 4KiB --depth 1 --seconds 0 --plot /dev/$dev >/tmp/out 2>&1; code=$?
[ $code = 2 ] && grep -q "block device" /tmp/out && pass "a plot is not drawn over a drive" || fail "a plot is not drawn over a drive"
put() { dd of=/dev/$usb bs=1 seek=$1 conv=notrunc 2>/dev/null; }
printf 'EFI PART' | put 4096
printf '\002' | put $((4096 + 72))
printf '\200\0\0\0\200' | put $((4096 + 80))
printf 'somebodys data!!partition number' | put 8192
printf '\0\001\0\0\0\0\0\0\0\040' | put $((8192 + 32))
mkfs.ext4 -q -F -U 1f2e3d4c-3031-3233-3435-363738396162 -E offset=1048576 /dev/$usb 16M >/tmp/out 2>&1 || fail "mkfs.ext4"
sync; blockdev --rereadpt /dev/$usb 2>/dev/null; sleep 1
[ ! -e /dev/${usb}p1 ] && pass "the kernel shows no partition" || fail "the kernel shows no partition"
accept USB00001 gpt
refused "the ext4 in it needs consent" "holds ext4, in a partition from byte 1048576 on" $nt check $usb
accept USB00001 gpt ext4 "unknown data"
works "with it, the drive may be read" $nt check $usb
mkdir -p /run/systemd/system
printf '[Mount]\nWhat=/dev/disk/by-uuid/1f2e3d4c-3031-3233-3435-363738396162\nWhere=/srv\n' >/run/systemd/system/srv.mount
refused "a unit that names its UUID refuses" "configured:" $nt check $usb
rm /run/systemd/system/srv.mount

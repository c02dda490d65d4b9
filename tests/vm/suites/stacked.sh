# about: drives that the kernel uses in a way of its own, each with every consent given: swap, zram, device mapper, MD, bcache, loop, LIO, lazy mounts, hibernation, several paths
# long
# drives: source
# drive: used blank:64 serial=USED0001
# drive: many blank:64 serial=MANY0001 ports ns=shared=on
# drive: calm random:16 serial=CALM0001
# unchanged: calm many source
# guest: own
# programs: mdadm dmsetup make-bcache:bcache-tools wipefs:util-linux unshare:util-linux
# modules: zram bcache dm-mod dm-multipath dm-round-robin linear loop target_core_mod target_core_iblock target_core_file configfs
# timeout: 1200
. /root/staging.sh
d=USED0001 n=$(drive USED0001)n1
allow
holder
every="gpt mbr ext4 swap md lvm luks bcache fat"
accept $d $every "unknown data"
give $d $every "unknown data"
number() { tr : ' ' </sys/class/block/$1/dev; }
sectors=$(cat /sys/block/$n/size)
mkdir -p /mnt/used /mnt/deep
# used NAME WORD: neither bound nor erased while it is used so, whatever the list consents to
used() {
  sum=$(sha256sum </dev/$n)
  refused "$1: not bound" "$2" $nt bind $n
  refused "$1: not erased" "$2" stage
  [ "$sum" = "$(sha256sum </dev/$n)" ] && pass "$1: no byte is changed" || fail "$1: no byte is changed"
  [ "$(basename $(readlink /sys/class/nvme/${n%n1}/device/driver))" = nvme ] || fail "$1: the kernel has it"
}
empty() { wipefs -aqf /dev/$n; dd if=/dev/zero of=/dev/$n bs=1M count=64 conv=notrunc,fsync 2>/dev/null; mdadm --zero-superblock /dev/$n 2>/dev/null; }
mknod /tmp/other b $(number $n)

mke2fs -q -F -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 /dev/$n
unshare -m sh -c "mount -t ext4 -o ro /dev/$n /mnt/used; sleep 1000" & one=$!
sleep 2
used "mounted in another namespace" "mounted"
kill $one $(pidof sleep); wait $one 2>/dev/null; sleep 1
mount -t ext4 -o ro /tmp/other /mnt/used
(cd /mnt/used; exec sleep 1000) & one=$!
sleep 1; umount -l /mnt/used
used "mounted by another node and given up while a process stands in it" "ext4 that no mount namespace"
kill $one; wait $one 2>/dev/null; sleep 1
mount -t ext4 /dev/$n /mnt/used
dd if=/dev/zero of=/mnt/used/swap bs=1M count=8 2>/dev/null; chmod 600 /mnt/used/swap; mkswap /mnt/used/swap >/dev/null
swapon /mnt/used/swap; umount -l /mnt/used; sync; sleep 7 # what the file system still has to write
used "a swap file on it, its mount given up" "ext4 that no mount namespace\|swap"
mount -t ext4 /dev/$n /mnt/used # the same file system, where its swap file has a path again
swapoff /mnt/used/swap; umount /mnt/used

empty; mkswap /dev/$n >/dev/null; swapon /tmp/other
used "swap by another node" "swap"
swapoff /tmp/other
works "free after swap" $nt check $n
if modprobe zram && echo /tmp/other >/sys/block/zram0/backing_dev 2>/tmp/out; then
  used "zram writes to it by another node" "zram0"
  echo 1 >/sys/block/zram0/reset
else echo "SKIP zram"; fi
echo $(number $n | tr ' ' :) >/sys/power/resume 2>/dev/null
if [ "$(cat /sys/power/resume)" = "$(number $n | tr ' ' :)" ]; then used "the machine hibernates to it" "hibernates"; else echo "SKIP hibernation: $(cat /sys/power/resume)"; fi
echo $(number $(drive CALM0001)n1 | tr ' ' :) >/sys/power/resume 2>/dev/null
empty
works "free before device mapper" $nt check $n

echo "0 $sectors linear /tmp/other 0" | dmsetup create --noudevsync a
used "a linear device over another node" "carries dm-"
echo "0 2048 linear $(cat /sys/block/dm-0/dev) 0" | dmsetup create --noudevsync b
used "two devices, one over the other" "carries dm-"
dmsetup remove --noudevsync b; dmsetup remove --noudevsync a
modprobe loop max_loop=8; losetup /dev/loop0 /tmp/other
echo "0 2048 linear /dev/loop0 0" | dmsetup create --noudevsync c
used "a linear device over a loop device over another node" "loop0 is set up over"
dmsetup remove --noudevsync c; losetup -d /dev/loop0
echo "0 $sectors multipath 0 0 1 1 round-robin 0 1 1 /tmp/other 1000" | dmsetup create --noudevsync p >/tmp/out 2>&1 &&
  { used "a multipath device" "carries dm-"; dmsetup remove --noudevsync p; } || echo "SKIP multipath device"

if mdadm --build /dev/md9 --force --level=linear --raid-devices=1 /dev/$n >/tmp/out 2>&1; then
  used "an array without a superblock" "md9"
  mdadm --stop /dev/md9 >/dev/null 2>&1
else echo "SKIP MD"; fi
empty
if make-bcache -B /dev/$n >/tmp/out 2>&1 && modprobe bcache; then
  echo /tmp/other >/sys/fs/bcache/register 2>/dev/null || echo /dev/$n >/sys/fs/bcache/register
  sleep 1
  used "bcache" "bcache"
  echo 1 >/sys/block/bcache0/bcache/stop 2>/dev/null; sleep 2
else sed 's/^/INFO /' /tmp/out; echo "SKIP bcache"; fi
empty

if modprobe target_core_mod && { [ -d /sys/kernel/config/target ] || mount -t configfs none /sys/kernel/config; }; then
  modprobe target_core_file; t=/sys/kernel/config/target/core
  mkdir -p $t/fileio_0/f
  echo "fd_dev_name=/tmp/other,fd_dev_size=67108864" >$t/fileio_0/f/control 2>/tmp/out && echo 1 >$t/fileio_0/f/enable 2>>/tmp/out &&
    used "LIO's file, which is another node" "LIO" || { sed 's/^/INFO /' /tmp/out; echo "SKIP LIO fileio"; }
  rmdir $t/fileio_0/f $t/fileio_0
  modprobe target_core_iblock; mkdir -p $t/iblock_0/i
  echo "udev_path=/tmp/other" >$t/iblock_0/i/control 2>/tmp/out && echo 1 >$t/iblock_0/i/enable 2>>/tmp/out &&
    used "LIO's block device" "LIO" || { sed 's/^/INFO /' /tmp/out; echo "SKIP LIO iblock"; }
  rmdir $t/iblock_0/i $t/iblock_0
else echo "SKIP LIO"; fi

# Several paths by its own word, with the kernel's multipath as it is.
m=$(drive MANY0001); node=$(ls -d /sys/class/nvme/$m/nvme*n1 | sed 's,.*/,,; s,c[0-9]*n,n,')
refused "a drive that says it may have several paths" "shared" $nt check $node
rm /tmp/other
works "free again" $nt check $n
works "and staged" stage
works "the model is whole" nt verify tiny --tier-c $n

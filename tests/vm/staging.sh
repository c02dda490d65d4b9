# What the suites that stage share. Sourced by them. $d is the drive's serial, $n its node's name.
# busybox's own would be taken first.
blkid() { /usr/bin/blkid "$@"; }
mke2fs() { /usr/bin/mke2fs "$@"; }
holder() { mkdir -p /mnt/source; mount -t ext4 -o ro /dev/$(drive SOURCE01)n1 /mnt/source; }
stage() { nt stage /mnt/source/tiny.gguf --tier-c $n --erase --serial $d "$@"; }
# may: the list's entry of the drive lets whatever lies there now be erased, by the line that the refusal names
may() {
  accept $d; give $d
  stage >/tmp/check 2>&1 && return 1
  line=$(sed -n 's/.*needs the line \(erase = \[[^]]*\]\).*/\1/p' /tmp/check | head -n 1)
  sed "/\"$d\"/,/^erase/s/^erase = .*/$line/" $list >/tmp/list; cp /tmp/list $list
}
# parts NUMBER: waits until the kernel shows so many partitions of the drive
parts() {
  for try in 1 2 3 4 5 6 7 8 9 10; do
    [ "$(ls -d /sys/block/$n/${n}p* 2>/dev/null | wc -l)" = "$1" ] && return 0
    sleep 0.2
  done
  return 1
}
# ours: what other programs find on the drive is nt's table of partitions, and in the partition nothing
ours() {
  parts 1 && [ "$(cat /sys/block/$n/${n}p1/start)" = 2048 ] || echo "the kernel shows: $(ls -d /sys/block/$n/${n}p*)"
  blkid -p -o export /dev/$n >/tmp/blkid 2>&1
  grep -q '^PTTYPE=gpt' /tmp/blkid && ! grep -vE '^(DEVNAME=|PTTYPE=gpt|PTUUID=|$)' /tmp/blkid || cat /tmp/blkid
  blkid -p -o export /dev/${n}p1 >/tmp/blkid 2>&1
  grep -q '^PART_ENTRY_NAME=nt.*models' /tmp/blkid && ! grep -vE '^(DEVNAME=|PART_ENTRY_|$)' /tmp/blkid || cat /tmp/blkid
  wipefs -n /dev/$n >/tmp/wipefs 2>&1
  [ "$(awk 'NR > 1 {print $3}' /tmp/wipefs | sort | tr '\n' ' ')" = "PMBR gpt gpt " ] || cat /tmp/wipefs
  wipefs -n /dev/${n}p1 2>&1
  for node in $n ${n}p1; do
    mdadm --examine /dev/$node 2>&1 | grep -E 'Magic : [^a]|Array|Raid Level'
    cryptsetup isLuks /dev/$node && echo "cryptsetup knows $node"
    lvm pvs --noheadings /dev/$node 2>/dev/null | grep .
  done
}

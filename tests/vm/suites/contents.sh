# about: drives that held ext4, XFS, btrfs, MD, LVM, LUKS, NTFS, a hybrid GPT, ZFS: staged, nobody finds anything of it
# drives: source
# drive: old blank:400 serial=OLD00001
# programs: mdadm mkfs.xfs:xfsprogs xfs_repair:xfsprogs mkfs.btrfs:btrfs-progs btrfs:btrfs-progs mkntfs:ntfs-3g ntfs-3g.probe:ntfs-3g lvm:lvm2 cryptsetup:cryptsetup-bin sgdisk:gdisk wipefs:util-linux e2fsck:e2fsprogs
# modules: xfs btrfs raid1 dm-mod dm-crypt xts algif_skcipher
# files: tests/vm/zfs.sh
# timeout: 1200
. /root/staging.sh
d=OLD00001 n=$(drive OLD00001)n1
export MDADM_NO_UDEV=1 LVM_SUPPRESS_FD_WARNINGS=1
mkdir -p /run/lock/lvm /tmp/lvm
cat >/tmp/lvm/lvm.conf <<'LVM'
activation { udev_sync = 0 udev_rules = 0 verify_udev_operations = 0 }
backup { backup = 0 archive = 0 }
devices { use_devicesfile = 0 }
LVM
export LVM_SYSTEM_DIR=/tmp/lvm

# Each makes its old contents and leaves nothing that holds the drive.
empty() {
  for node in ${n}p1 ${n}p2 $n; do [ ! -b /dev/$node ] || wipefs -aqf /dev/$node; done
  blockdev --rereadpt /dev/$n
  parts 0
} >/dev/null 2>&1
one_partition() { sgdisk -n 1:2048:+300M -n 2:0:+40M "$@" /dev/$n && parts 2; }
filled() { mount "$@" /mnt/old && head -c 3000000 /dev/urandom >/mnt/old/file && umount /mnt/old; }
make_ext4() { mke2fs -q -F -t ext4 -b 1024 /dev/$n && filled -t ext4 /dev/$n; }
make_ext4_in_partition() { one_partition && mke2fs -q -F -t ext4 /dev/${n}p1 && filled -t ext4 /dev/${n}p1; }
make_xfs() { mkfs.xfs -q -f /dev/$n && filled -t xfs /dev/$n; }
make_btrfs() { mkfs.btrfs -q -f /dev/$n && filled -t btrfs /dev/$n; }
make_btrfs_in_partition() { one_partition && mkfs.btrfs -q -f /dev/${n}p1 && filled -t btrfs /dev/${n}p1; }
array() {
  mdadm --create /dev/md9 --run --force --assume-clean --metadata=$1 --level=1 --raid-devices=2 /dev/$n missing &&
    mke2fs -q -F -t ext4 /dev/md9 && mdadm --stop /dev/md9
}
make_md_0_90() { array 0.90; }
make_md_1_2() { array 1.2; }
make_lvm() {
  lvm pvcreate -q -ff -y --metadatacopies 2 /dev/$n && lvm vgcreate -q oldgroup /dev/$n &&
    lvm lvcreate -q -y -Wn -Zn -l 20 -n volume oldgroup && lvm vgchange -q -an oldgroup
}
make_luks2() { printf secret | cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 /dev/$n -; }
make_ntfs() { one_partition && mkntfs -q -Q -F /dev/${n}p1; }
make_hybrid_gpt() { one_partition -t 1:0700 --hybrid=1:2 && mke2fs -q -F -t ext4 /dev/${n}p2; }
make_zfs() { sh /root/files/zfs.sh /dev/$n $(($(cat /sys/block/$n/size) * 512)); }

# What the owner of the old contents would type, and what runs by itself.
tried() {
  for node in $n ${n}p1 ${n}p2; do
    [ -b /dev/$node ] || continue
    for system in ext4 xfs btrfs; do
      mount -t $system /dev/$node /mnt/old && { echo "$node was mounted as $system"; umount /mnt/old; }
    done
    e2fsck -fy -b 32768 -B 4096 /dev/$node
    e2fsck -fy -b 8193 -B 1024 /dev/$node
    xfs_repair -n /dev/$node | grep -i 'found candidate'
    ntfs-3g.probe --readwrite /dev/$node && echo "$node was mounted as ntfs"
    btrfs rescue super-recover -y /dev/$node
    cryptsetup repair -q /dev/$node </dev/null
    mdadm --assemble --run /dev/md9 /dev/$node && { echo "$node was assembled"; mdadm --stop /dev/md9; }
  done >/tmp/tried 2>&1
  lvm vgchange -q -ay >>/tmp/tried 2>&1
  lvm vgs --noheadings 2>/dev/null | grep . && echo "LVM knows a group"
  grep -E 'was (mounted|assembled)|^Found candidate' /tmp/tried
}

allow
holder
mkdir -p /mnt/old
for kind in ext4 ext4_in_partition xfs btrfs btrfs_in_partition md_0_90 md_1_2 lvm luks2 ntfs hybrid_gpt zfs; do
  empty
  make_$kind >/tmp/out 2>&1 || { fail "$kind: made"; continue; }
  accept $d; give $d
  refused "$kind: not staged unless the list gives it away" "needs the line erase = " stage
  # A list that was written for binding the drive is no word on what may be lost.
  accept $d gpt mbr ext4 xfs btrfs md lvm luks ntfs zfs swap "unknown data"
  refused "$kind: nor if it lets nt read it" "lets nt read (holds) and not erase" stage
  may || fail "$kind: staged by a list that gives nothing away"
  works "$kind: staged over" stage
  ours >/tmp/out 2>&1; [ -s /tmp/out ] && fail "$kind: nothing of it is found" || pass "$kind: nothing of it is found"
  tried >/tmp/out 2>&1; [ -s /tmp/out ] && fail "$kind: nothing of it can be used" || pass "$kind: nothing of it can be used"
  works "$kind: the model is whole afterwards" nt verify tiny --tier-c $n
  accept $d; give $d # nothing at all
  works "$kind: staged again without a word of the list" stage
  works "$kind: the drive may be bound without accepting anything" $nt check $n
done
works "bind" $nt bind $n
works "the model is whole through VFIO" nt verify tiny --tier-c $n
works "release" $nt release $n

# about: nodes below /dev that are not what their names say, exports by relative paths, a cluster's heartbeat, two ports
# drives: source
# drive: targ ext4:64 serial=TARG0001
# drive: vict ext4:64 serial=VICT0001
# drive: expo blank:64 serial=EXPO0001
# drive: beat blank:64 serial=BEAT0001
# drive: dual blank:64 serial=DUAL0001 ports ns=shared=on
# drive: late random:64 serial=LATE0001 absent
# unchanged: targ vict expo late
# guest: own
# append: nvme_core.multipath=N
# programs: unshare:util-linux udevadm:udev
# modules: nvmet configfs ocfs2_nodemanager
# timeout: 900
. /root/staging.sh
d=TARG0001 n=$(drive TARG0001)n1 v=$(drive VICT0001)n1 e=$(drive EXPO0001)n1 b=$(drive BEAT0001)n1
allow
accept TARG0001 ext4
accept EXPO0001
accept BEAT0001
accept DUAL0001
holder

# With the kernel's multipath off each drive is asked whether it has several ports.
works "check of a clean drive, which says that it has one port" $nt check $n
refused "check of a drive with two ports" CMIC $nt check $(drive DUAL0001)n1
asuser "$nt check $n" >/tmp/out 2>&1
grep -q CMIC /tmp/out && pass "who may not ask it is told so" || fail "who may not ask it is told so"

# Another mount namespace, where a file is mounted over a table.
echo "/dev/$n /srv ext4 defaults 0 0" >/etc/fstab
refused "a bind mount over fstab" "mount namespace" unshare -m sh -c "mount --bind /dev/null /etc/fstab; $nt check $n"
rm /etc/fstab

# The node is another drive's, which nothing allows to erase, or a file.
number() { tr : ' ' </sys/class/block/$1/dev; }
rm /dev/$n; mknod /dev/$n b $(number $v)
refused "check of a drive whose node is another's" "by sysfs" $nt check $n
refused "stage through a node of another drive" "by sysfs" stage
refused "bind" "by sysfs" $nt bind $n
nt verify tiny --tier-c $n >/tmp/out 2>&1; code=$?
[ $code != 0 ] && grep -q "by sysfs" /tmp/out && pass "a model is not looked for on another drive's node" || { echo "exit $code" >>/tmp/out; fail "a model is not looked for on another drive's node"; }
rm /dev/$n; truncate -s 64M /dev/$n
refused "stage into a file in place of the node" "by sysfs" stage
refused "bind of a drive whose node is a file" "by sysfs" $nt bind $n
rm /dev/$n; mknod /dev/$n b $(number $n)
works "check once the node is right" $nt check $n

# A file that somebody left before the drive was plugged in.
i=$(ls /sys/class/nvme | sed 's/nvme//' | sort -n | tail -n 1); l=nvme$((i + 1))n1
dd if=/dev/zero of=/dev/$l bs=1M count=64 2>/dev/null
echo "HOST plug late"; for k in $(seq 40); do [ -n "$(drive LATE0001)" ] && break; sleep 1; done; sleep 3
l=$(drive LATE0001)n1
if [ -b /dev/$l ]; then echo "SKIP the kernel made its node over the file"; else
  $nt list 2>/dev/null | sed -n '/LATE0001/,$p' | sed -n '/\[\[drive\]\]/,/^    holds/p' | sed 's/^    //' | head -n 8 >>$list
  refused "stage of a drive whose node is a file of dd" "by sysfs" nt stage /mnt/source/tiny.gguf --tier-c $l --erase --serial LATE0001
fi

# The node of the drive's VFIO group has the number that sysfs tells; udev, which asks for the rule while bind runs, takes
# back nothing.
daemon=$(ls /usr/bin/udevadm 2>/dev/null)
if [ -n "$daemon" ] && ln -sf $daemon /tmp/systemd-udevd && /tmp/systemd-udevd --version >/tmp/out 2>&1; then
  mkdir -p /run/udev/rules.d
  cp /root/udev/70-nt-vfio.rules /run/udev/rules.d/
  /tmp/systemd-udevd --daemon >/tmp/out 2>&1 && echo "INFO udev runs" || daemon=
fi
g=$(basename $(readlink /sys/class/nvme/${e%n1}/device/iommu_group))
works "bind of a drive whose nodes are right" $nt bind $e
[ -z "$daemon" ] || udevadm settle
[ "$(stat -c %G:%a /dev/vfio/$g)" = nt:660 ] && pass "the group's node is handed over" || { stat /dev/vfio/$g >/tmp/out; fail "the group's node is handed over"; }
works "release" $nt release $e; sleep 1
[ -z "$daemon" ] || { udevadm settle; kill $(pidof systemd-udevd) 2>/dev/null; rm -rf /run/udev; }
e=$(drive EXPO0001)n1

# NVMe-oF by a path that does not begin with a slash.
modprobe nvmet; mount -t configfs none /sys/kernel/config
s=/sys/kernel/config/nvmet/subsystems/s; mkdir $s $s/namespaces/1
echo -n dev/$e >$s/namespaces/1/device_path; (cd /; echo 1 >$s/namespaces/1/enable)
[ "$(cat $s/namespaces/1/enable)" = 1 ] && pass "the kernel exports it by a relative path" || fail "the kernel exports it by a relative path"
refused "check of a drive exported by a relative path" exported $nt check $e
echo 0 >$s/namespaces/1/enable; rmdir $s/namespaces/1 $s

# OCFS2's heartbeat, which claims nothing and has no process.
works "check before the heartbeat" $nt check $b
modprobe ocfs2_nodemanager; ip link set lo up
c=/sys/kernel/config/cluster/c1; mkdir -p $c; mkdir $c/node/n1
echo 7777 >$c/node/n1/ipv4_port; echo 127.0.0.1 >$c/node/n1/ipv4_address; echo 0 >$c/node/n1/num; echo 1 >$c/node/n1/local
r=$c/heartbeat/0123456789ABCDEF0123456789ABCDEF; mkdir $r
echo 512 >$r/block_bytes; echo 20480 >$r/start_block; echo 1 >$r/blocks
exec 7<>/dev/$b; (echo 7 >$r/dev) 2>/tmp/out; exec 7>&-
grep -q $b $r/dev && pass "the heartbeat runs" || fail "the heartbeat runs"
refused "check of a drive with a heartbeat" heartbeat $nt check $b
umount -l /sys/kernel/config
refused "the same while configfs is not mounted" ocfs2_nodemanager $nt check $b

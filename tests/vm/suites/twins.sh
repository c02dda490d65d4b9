# about: two drives of one serial number, of which the kernel shows one: stage and bind take it by its address alone
# drives: source
# drive: pair blank:64 serial=PAIR0001
# drive: hidden random:64 serial=PAIR0001 absent
# drive: calm random:16 serial=CALM0001
# unchanged: hidden calm source
# guest: own
# programs: mdadm cryptsetup:cryptsetup-bin lvm:lvm2 wipefs:util-linux sgdisk:gdisk
# modules: dm-mod
. /root/staging.sh
d=PAIR0001 n=$(drive PAIR0001)n1 at=$(address $(drive PAIR0001)) calm=$(drive CALM0001)
allow
holder
functions() { cat /sys/bus/pci/devices/*/class | grep -c 0x010802; }
plugged() { before=$(functions); echo "HOST $1 hidden"; for i in $(seq 60); do [ $(functions) = $before ] || break; sleep 1; done; sleep 3; }

# Alone, the address is no more than a second proof.
refused "stage with the address of another drive" "says $(address $calm)" stage --pci $(address $calm)
refused "stage with what is no address" "says nvme0" stage --pci nvme0
works "stage with its address" stage --pci $at
refused "stage by the name of a partition" "it is a partition" nt stage /mnt/source/tiny.gguf --tier-c ${n}p1 --erase --serial $d
cp /dev/$n /tmp/staged

plugged plug
other=
for p in /sys/bus/pci/devices/*; do
  [ "$(cat $p/class)" = 0x010802 ] && [ ! -e $p/driver ] && other=$(basename $p)
done
[ -n "$other" ] && pass "the kernel rejects the second ($other)" || { dmesg | tail -5 >/tmp/out; fail "the kernel rejects the second"; }
refused "stage by the serial alone" "add --pci $at" stage
refused "stage with the address of the twin" "says $other" stage --pci $other
refused "bind by the serial alone" "add --pci $at" $nt bind $n
refused "bind of the twin" "no driver holds it" $nt bind $other
refused "bind with the address of the twin" "says $other" $nt bind $n --pci $other
refused "check by the serial alone" "add --pci $at" $nt check $n
works "check with the address" $nt check $n --pci $at
cp $list /tmp/kept
sed "/\"$d\"/,/holds/{s/x/x/}; s/pci = \"$at\"/pci = \"$other\"/" /tmp/kept >/tmp/list; cp /tmp/list $list
refused "the entry has another address" "the address decides" stage --pci $at
refused "bind, the entry has another address" "the address decides" $nt bind $n --pci $at
cp /tmp/kept $list
refused "another drive, while the twin has no driver" "no driver holds the NVMe drive at $other" $nt bind ${calm}n1
cmp /dev/$n /tmp/staged >/tmp/out 2>&1 && pass "nothing was written" || fail "nothing was written"
works "stage by the address" stage --pci $at
works "the model is whole" nt verify tiny --tier-c $n
works "bind by the address" $nt bind $n --pci ${at#0000:}
works "the model is whole through VFIO" nt verify tiny --tier-c $n
[ ! -e /sys/bus/pci/devices/$other/driver ] && pass "the twin has no driver still" || fail "the twin has no driver still"
works "release by the address" $nt release --pci $at

# The twin with vfio-pci, as for a guest: nobody can read its serial, so the address in an entry must be right.
echo vfio-pci >/sys/bus/pci/devices/$other/driver_override
echo $other >/sys/bus/pci/drivers_probe
[ "$(basename $(readlink /sys/bus/pci/devices/$other/driver))" = vfio-pci ] && pass "the twin is with vfio-pci" || fail "the twin is with vfio-pci"
n=$(drive PAIR0001)n1
works "check, the entry's address being right" $nt check $n
sed "s/pci = \"$at\"/pci = \"0000:77:00.0\"/" /tmp/kept >/tmp/list; cp /tmp/list $list
refused "check, the entry's address being another" "the address decides then" $nt check $n
refused "stage, the entry's address being another" "the address decides then" stage
cp /tmp/kept $list
echo >/sys/bus/pci/devices/$other/driver_override
echo $other >/sys/bus/pci/drivers/vfio-pci/unbind
plugged unplug
works "alone again" $nt check $n

# about: what a member of the group nt and anybody else try against root's bind, release, stage and records
# drive: att random:16 serial=ATT00001
# drive: guest random:16 serial=GUEST001
# drive: third random:16 serial=THIRD001
# drive: fmt ext4:32 serial=FMT00001
# drive: pipe blank:32 serial=PIPE0001
# unchanged: att guest third
# files: tests/fixtures/cases/chat-plain.gguf
# programs: flock:util-linux
# modules: fuse
# timeout: 600
allow
as() { who=$1; shift; su $who -s /bin/sh -c "$*"; }
# denied NAME WHO COMMAND: the command fails as that user, within 20 s
denied() {
  name=$1 who=$2; shift 2
  timeout 20 su $who -s /bin/sh -c "$*" >/tmp/out 2>&1; code=$?
  if [ $code != 0 ] && [ $code != 143 ] && [ $code != 124 ]; then pass "$name"; else echo "exit $code" >>/tmp/out; fail "$name"; fi
}
# soon NAME CODE COMMAND…: ends by itself, with that code
soon() {
  name=$1 wanted=$2; shift 2
  timeout 60 "$@" >/tmp/out 2>&1; code=$?
  if [ $code = $wanted ]; then pass "$name"; else echo "exit $code, wanted $wanted" >>/tmp/out; fail "$name"; fi
}
dev=$(drive ATT00001)n1 at=$(address $(drive ATT00001)) third=$(address $(drive THIRD001)) # by address: the kernel gives names again
group=$(basename $(readlink /sys/bus/pci/devices/$at/iommu_group))
works "bind" $nt bind $dev
works "a member opens the drive" as user nvme_probe identify $dev /tmp/id.att

# Anybody: the folder of records and locks.
for who in stranger user; do
  denied "$who opens the lock" $who "true </run/nt/$at.lock"
  denied "$who writes the lock" $who "true >>/run/nt/$at.lock"
  denied "$who makes a record" $who "echo x >/run/nt/0000:99:00.0.toml"
  denied "$who removes the record" $who "rm -f /run/nt/$at.toml"
  denied "$who renames the record" $who "mv /run/nt/$at.toml /run/nt/x.toml"
  denied "$who writes the record" $who "echo 'state = \"bound\"' >>/run/nt/$at.toml"
  denied "$who renames the folder" $who "mv /run/nt /run/nt2"
  denied "$who makes a lock first" $who "mkdir /run/nt/0000:01:00.0.lock"
  denied "$who unbinds" $who "echo $at >/sys/bus/pci/drivers/vfio-pci/unbind"
  denied "$who releases" $who "$nt release $dev"
  denied "$who binds" $who "$nt bind $third"
done
denied "a stranger opens the drive" stranger "nvme_probe identify $dev /tmp/id.stranger"
denied "a stranger opens the node" stranger "true <>/dev/vfio/$group"
# What a stranger may open, he may lock with flock: nothing of that is a lock of ours.
su stranger -s /bin/sh -c "exec flock /run/nt/$at.toml sleep 60" & one=$!
su stranger -s /bin/sh -c "exec flock /run/nt sleep 60" & two=$!
sleep 0.5
works "a stranger's flocks hold up nothing: bind" $nt bind $third
works "a stranger's flocks hold up nothing: release" $nt release $third
kill $one $two; wait $one $two 2>/dev/null

# A process that has a file of a server that never answers: who looks for the drive's users asks for it.
modprobe fuse; mkdir -p /mnt/hang; : >/tmp/held
nvme_probe unanswered /mnt/hang >/tmp/held 2>&1 & server=$!
for try in 1 2 3 4 5 6 7 8 9 10; do grep -q held /tmp/held && break; sleep 1; done
soon "release's dry run ends all the same" 0 $nt release $at --dry-run
kill -9 $server; wait $server 2>/dev/null; umount /mnt/hang
# Another group's node in the place of the drive's: nobody opens it.
mv /dev/vfio/$group /dev/vfio/kept; mknod /dev/vfio/$group c $(tr : ' ' </sys/class/vfio/$group/dev | awk '{print $1, $2 + 7}')
$nt list >/tmp/out 2>/dev/null; grep -A2 "bound to vfio-pci" /tmp/out | grep -q "by sysfs" && pass "list opens no other group's node" || fail "list opens no other group's node"
rm /dev/vfio/$group; mv /dev/vfio/kept /dev/vfio/$group
works "nothing was changed by that" as user "nvme_probe identify $at /tmp/id.att"

# A drive that root gave to a guest through vfio-pci, while nt has one bound.
guest=$(address $(drive GUEST001))
guests=$(basename $(readlink /sys/bus/pci/devices/$guest/iommu_group))
echo vfio-pci >/sys/bus/pci/devices/$guest/driver_override
echo $guest >/sys/bus/pci/drivers/nvme/unbind
echo $guest >/sys/bus/pci/drivers_probe
/root/udev/nt-vfio-group $group && pass "the rule gives the group of nt's drive" || fail "the rule gives the group of nt's drive"
/root/udev/nt-vfio-group $guests && fail "and no other" || pass "and no other"
denied "a member opens the guest's drive" user "true <>/dev/vfio/$guests"
refused "bind does not take the guest's drive" "driver" $nt bind $guest
works "release gives it back, if it is named" $nt release --pci $guest

# A member keeps the device and closes the group: root's release says so at once, changes nothing, and holds up nobody.
as user "exec nvme_probe keep $at" >/tmp/kept 2>&1 & keeper=$!
for try in 1 2 3 4 5 6 7 8 9 10; do grep -q kept /tmp/kept && break; sleep 1; done
began=$(cut -d. -f1 /proc/uptime)
grep -q kept /tmp/kept && pass "a member keeps the device alone" || { cp /tmp/kept /tmp/out; fail "a member keeps the device alone"; }
refused "release of a drive whose device is kept open" "EBUSY" $nt release $at
sed 's/^/INFO /' /tmp/out
[ $(($(cut -d. -f1 /proc/uptime) - began)) -lt 30 ] && pass "and it took less than 30 s" || fail "and it took less than 30 s"
grep -q 'state = "bound"' /run/nt/$at.toml && pass "nothing was changed" || fail "nothing was changed"
works "another drive is bound meanwhile" $nt bind $third
works "and released" $nt release $third
kill -9 $(pidof nvme_probe); wait $keeper 2>/dev/null
works "release once the member has ended" $nt release $at
[ "$(basename "$(readlink /sys/bus/pci/devices/$at/driver)")" = nvme ] && pass "the kernel has it" || fail "the kernel has it"

# Records: what older versions let members do, and root's own places.
mkdir -p /mnt/fmt; mount -t ext4 /dev/$(drive FMT00001)n1 /mnt/fmt
cp /root/files/chat-plain.gguf /mnt/fmt/m.gguf; sync
chgrp 990 /var/lib/nt; chmod 2775 /var/lib/nt
mkdir -p /run/target; echo theirs >/run/victim
as user "ln -s /run/target /var/lib/nt/FMT00001; mkdir /var/lib/nt/system2"
works "root records although a link lies in the old place" $nt extents /mnt/fmt/m.gguf
[ -z "$(ls -A /run/target)" ] && pass "nothing went through the link" || fail "nothing went through the link"
[ "$(stat -c %a:%U:%G /var/lib/nt/system)" = 755:root:root ] && pass "the place is root's alone" || { stat /var/lib/nt/system >/tmp/out; fail "the place is root's alone"; }
denied "a member writes there" user "echo x >/var/lib/nt/system/x"
denied "a member writes in the old place" user "echo x >/var/lib/nt/x"
denied "a member renames it" user "mv /var/lib/nt/system /var/lib/nt/system3"
chmod 2775 /var/lib/nt
as user "rm -f /var/lib/nt/FMT00001; mv /var/lib/nt/system /var/lib/nt/s2 && mkdir /var/lib/nt/system"
soon "a folder planted in root's place is refused" 1 $nt extents /mnt/fmt/m.gguf
grep -q "belongs to user 1000" /tmp/out && pass "and named" || fail "and named"
rm -rf /var/lib/nt/*
as user "rm -f /tmp/x; true"
chmod 2775 /var/lib/nt
as user "mkdir -p /var/lib/nt/A /var/lib/nt/B /var/lib/nt/C; mkfifo /var/lib/nt/A/m.gguf.json; ln -s /dev/zero /var/lib/nt/B/m.gguf.json; truncate -s 1099511627776 /var/lib/nt/C/m.gguf.json"
for who in root stranger user; do
  timeout 60 su $who -s /bin/sh -c "nt -q run m -p x -n 1" >/tmp/out 2>&1; code=$?
  [ $code = 2 ] && pass "a FIFO, zeros and a TB as records: $who's run ends" || fail "a FIFO, zeros and a TB as records: $who's run ends (exit $code)"
done
# Root with another's home, as sudo may have it.
mkdir -p /tmp/home/.local/share/nt/A; chown -R user /tmp/home
as user "mkfifo /tmp/home/.local/share/nt/A/m.gguf.json"
HOME=/tmp/home timeout 60 nt -q run m -p x -n 1 >/tmp/out 2>&1; [ $? = 2 ] && ! grep -q home /tmp/out && pass "root reads no record of a home that is not root's" || fail "root reads no record of a home that is not root's"
rm -rf /var/lib/nt/*; chgrp 0 /var/lib/nt; chmod 755 /var/lib/nt

# A record at a name of the user's choice, where somebody has laid a link.
as user "ln -s /run/victim /tmp/out.json; ln -s /run/nothing /tmp/out2.json; mkfifo /tmp/out3.json"
works "extents -o over a link" $nt extents /mnt/fmt/m.gguf -o /tmp/out.json
works "extents -o over a dangling link" $nt extents /mnt/fmt/m.gguf -o /tmp/out2.json
soon "extents -o over a FIFO" 1 $nt extents /mnt/fmt/m.gguf -o /tmp/out3.json
[ "$(cat /run/victim)" = theirs ] && [ ! -e /run/nothing ] && pass "what the links name is as it was" || fail "what the links name is as it was"
soon "extents of a FIFO" 1 sh -c "mkfifo /tmp/pipe.gguf; $nt extents /tmp/pipe.gguf"

# Root writes a file in a member's folder, where he has laid a link to a file, or to a drive.
mkdir -p /tmp/his; chown user /tmp/his
for to in /run/victim /dev/$(drive THIRD001)n1; do
  as user "ln -sfn $to /tmp/his/plan.toml"
  soon "a plan is not saved by his link to $to" 2 nt plan /mnt/fmt/m.gguf --save /tmp/his/plan.toml
done
[ "$(cat /run/victim)" = theirs ] && pass "what it names is as it was" || fail "what it names is as it was"

# A drive's own table names a path, which is a FIFO on this machine; then a device.
mkdir -p /tmp/from; cp /root/files/chat-plain.gguf /tmp/from/p.gguf
spare=$(drive PIPE0001)n1
works "stage a small model" nt stage /tmp/from/p.gguf --tier-c $spare --erase --serial PIPE0001
rm -rf /var/lib/nt/* /tmp/from/p.gguf
for kind in "mkfifo /tmp/from/p.gguf" "ln -s /dev/zero /tmp/from/p.gguf" "ln -s /dev/tty /tmp/from/p.gguf"; do
  rm -f /tmp/from/p.gguf; $kind
  timeout 60 nt -q run p --tier-c /dev/$spare -p x -n 1 --backend cpu >/tmp/out 2>&1; code=$?
  [ $code != 124 ] && [ $code != 143 ] && [ $code != 137 ] && pass "a table that names what '${kind%% /*}' made: the run ends with $code" || fail "a table that names what '${kind%% /*}' made (exit $code)"
done
umount /mnt/fmt

# about: holders under other names, boot partitions in other places, twins, tables, the claim of check
# drive: held blank:64 serial=HELD0001
# drive: esp blank:64 serial=ESP00001
# drive: twin blank:32 serial=HELD0001 absent
# unchanged: held
# guest: own
# programs: unshare:util-linux nsenter:util-linux
# modules: nvmet loop fuse
held=$(drive HELD0001)n1 esp=$(drive ESP00001)n1
allow
accept ESP00001 mbr "unknown data"
number() { tr : ' ' </sys/class/block/$1/dev; }

# A clean drive passes, is claimed for a moment and is free again at once.
works "check of a clean drive" $nt check $held
grep -q "claimed and let go after [0-9]* µs" /tmp/out && pass "check says that it claimed" || fail "check says that it claimed"
# The shortest of five: the processors of the emulation have other things to do.
time=99999
for try in 1 2 3 4 5; do
  took=$(sed -n 's/.*let go after \([0-9]*\) µs.*/\1/p' /tmp/out)
  [ "${took:-99999}" -lt $time ] && time=$took
  [ $time -lt 10000 ] && break
  $nt check $held >/tmp/out 2>&1
done
[ $time -lt 10000 ] && pass "the claim was short ($time µs)" || fail "the claim was short ($time µs)"
works "dry run of a clean drive" $nt bind $held --dry-run
asuser "$nt check $held" >/tmp/out 2>&1
grep -q "not claimed: run as root" /tmp/out && pass "a plain user's check" || fail "a plain user's check"

# Nodes of other names, and none any more.
mknod /tmp/other b $(number $held)
sleep 1000 </tmp/other & holder=$!
refused "open through another node" "open as /tmp/other" $nt check $held
rm /tmp/other
refused "open through a node that was deleted" "open as /tmp/other (deleted)" $nt check $held
kill $holder; wait $holder 2>/dev/null
mkdir -p /tmp/jail/dev; mknod /tmp/jail/dev/ng c $(tr : ' ' </sys/class/nvme-generic/ng${held#nvme}/dev)
sleep 1000 </tmp/jail/dev/ng & holder=$!
refused "open for commands through another node" "open as /tmp/jail/dev/ng" $nt check $held
kill $holder; wait $holder 2>/dev/null
for way in mapped socket waiting thread ended ring; do
  mknod /tmp/other b $(number $held)
  : >/tmp/held # what the last one said is no word of this one, which may begin late
  nvme_probe hold $way /tmp/other >/tmp/held 2>&1 & holder=$!
  for i in 1 2 3 4 5 6 7 8 9 10; do grep -q held /tmp/held && break; sleep 1; done
  rm -f /tmp/other
  case $way in
    mapped) refused "held by a mapping alone" "mapped into its memory" $nt check $held ;;
    socket) refused "held by a socket alone" "under way in a socket" $nt check $held ;;
    waiting) refused "held by a connection that nobody accepts" "wait for a program that does not accept them" $nt check $held ;;
    thread) refused "held by a thread with a table of its own" "open as /tmp/other" $nt check $held ;;
    ended) refused "held by a thread whose first one ended" "open as /tmp/other" $nt check $held ;;
    ring) refused "held by an io_uring alone" "in an io_uring" $nt check $held ;;
  esac
  kill -9 $holder; wait $holder 2>/dev/null
done
mknod /tmp/other b $(number $held)
modprobe loop max_loop=8
losetup /dev/loop5 /tmp/other; rm /tmp/other
refused "loop over a node that was deleted" "loop5 is set up over" $nt check $held
mv /dev/loop5 /tmp/moved
refused "loop whose node is gone" "what loop5 stands on cannot be asked" $nt check $held
mkfifo /dev/loop5
refused "loop with a FIFO in the place of its node" "what loop5 stands on cannot be asked" timeout 60 $nt check $held
rm /dev/loop5; mv /tmp/moved /dev/loop5
losetup -d /dev/loop5
# A holder that forks and ends, again and again.
mknod /tmp/other b $(number $held)
echo '[ -e /tmp/stop ] || sh /tmp/hop & sleep 0.01' >/tmp/hop
sh /tmp/hop 3</tmp/other &
for i in 1 2 3; do
  refused "open in a process that forks and ends ($i)" "open as /tmp/other\\|begin faster" $nt check $held
done
touch /tmp/stop; sleep 2; rm /tmp/other
echo 0 >/sys/block/$held/queue/iostats
refused "writes are not counted" "echo 1 > /sys/block/$held/queue/iostats" $nt check $held
echo 1 >/sys/block/$held/queue/iostats
works "nobody holds it any more" $nt check $held

# What cannot be seen.
if command -v unshare >/dev/null; then
  refused "another PID namespace" "pid namespace of its own" unshare -p -f --mount-proc $nt check $held
  refused "another time namespace" "time namespace of its own" /usr/bin/unshare -T -f $nt check $held
  refused "another PID namespace with the machine's proc" "pid namespace of its own" unshare -p -f $nt check $held
fi
if modprobe nvmet 2>/dev/null; then
  refused "nvmet without configfs" "nvmet is loaded" $nt check $held
  if mount -t configfs none /sys/kernel/config; then
    base=/sys/kernel/config/nvmet/subsystems/s
    mkdir $base $base/namespaces/1; mknod /tmp/other b $(number $held)
    echo -n /tmp/other >$base/namespaces/1/device_path; echo 1 >$base/namespaces/1/enable
    refused "nvmet export of another node" "exported over NVMe-oF" $nt check $held
    rm /tmp/other
    refused "nvmet export of a node that was deleted" "leads nowhere now" $nt check $held
    touch /tmp/other
    refused "nvmet export of a node that gave way to a file" "may have led elsewhere" $nt check $held
    rm /tmp/other; mknod /tmp/other b $(number $esp)
    refused "nvmet export of a node that gave way to another" "may have led elsewhere" $nt check $held
    echo 0 >$base/namespaces/1/enable; rmdir $base/namespaces/1 $base
    mkdir $base $base/namespaces/1
    echo -n /dev/$esp >$base/namespaces/1/device_path; echo 1 >$base/namespaces/1/enable
    works "nvmet export of another drive" $nt check $held
    rm /tmp/other
    echo 0 >$base/namespaces/1/enable; rmdir $base/namespaces/1 $base
    mkdir $base $base/namespaces/1; ln -s /dev/$held /tmp/link
    echo -n /tmp/link >$base/namespaces/1/device_path; echo 1 >$base/namespaces/1/enable
    ln -sfn /dev/$esp /tmp/link
    refused "nvmet export by a link that leads to another drive now" "may have led elsewhere" $nt check $held
    rm /tmp/link
    echo 0 >$base/namespaces/1/enable; rmdir $base/namespaces/1 $base; umount /sys/kernel/config
  fi
  rmmod nvmet
fi
# A kernel with nvmet built in shows no module of it; this one has it as a module, so the list says otherwise.
builtin=/lib/modules/$(uname -r)/modules.builtin
{ cat $builtin; echo kernel/drivers/nvme/target/nvmet.ko; } >/tmp/builtin
refused "nvmet built in, without configfs" "nvmet is built into the kernel" unshare -m sh -c "mount --bind /tmp/builtin $builtin; $nt check $held"
works "and not built in" $nt check $held

# A file system whose program never answers: who asks for a path there waits for ever.
ends() { # ends NAME CODE WORD COMMAND…: within a minute, with that code and word
  name=$1 wanted=$2 word=$3; shift 3
  timeout 60 "$@" >/tmp/out 2>&1; code=$?
  [ $code = $wanted ] && grep -q "$word" /tmp/out && pass "$name" || { echo "exit $code, wanted $wanted and: $word" >>/tmp/out; fail "$name"; }
}
modprobe fuse; mkdir -p /mnt/hang
: >/tmp/held
nvme_probe unanswered /mnt/hang >/tmp/held 2>&1 & server=$!
for i in 1 2 3 4 5 6 7 8 9 10; do grep -q held /tmp/held && break; sleep 1; done
if grep -q held /tmp/held; then
  ln -s /mnt/hang /tmp/into
  mkdir -p /run/systemd/system
  printf '[Mount]\nWhat=/tmp/into/x\nWhere=/srv\n' >/run/systemd/system/srv.mount
  ends "a table that leads to a server that never answers" 0 "may be bound" $nt check $held
  rm -r /run/systemd
  unshare -m sh -c "mount -t tmpfs /tmp/into/x /tmp/jail; sleep 1000" & holder=$!
  sleep 1
  ends "a mount in another namespace whose source leads there" 0 "may be bound" $nt check $held
  kill $holder $(pidof sleep); wait $holder 2>/dev/null
  if modprobe nvmet && mount -t configfs none /sys/kernel/config; then
    base=/sys/kernel/config/nvmet/subsystems/s
    mkdir $base $base/namespaces/1; echo -n /tmp/into/x >$base/namespaces/1/device_path
    ends "an export that leads there is refused" 3 "the kernel does not say what this leads to" $nt check $held
    ends "and root's bind ends too" 3 "the kernel does not say what this leads to" $nt bind $held
    rmdir $base/namespaces/1 $base; umount /sys/kernel/config; rmmod nvmet
  fi
  # A process that waits there holds up nobody.
  (cat /mnt/hang/x 2>/dev/null) & waiter=$!
  sleep 1
  ends "a process that waits there" 0 "may be bound" $nt check $held
  kill -9 $server; wait $server $waiter 2>/dev/null
  umount /mnt/hang
else
  cp /tmp/held /tmp/out; fail "a server of FUSE"
fi
works "after that" $nt check $held

# A process that waits for a write with its memory locked, as any user's can: who asks for its mappings waits for ever.
mkdir -p /mnt/fault
: >/tmp/held
nvme_probe faulting /mnt/fault >/tmp/held 2>&1 & server=$!
for i in $(seq 40); do grep -q held /tmp/held && break; sleep 1; done
waiter=$(sed -n 's/^held //p' /tmp/held)
sleep 5; timeout 2 cat /proc/$waiter/maps >/tmp/out 2>&1; code=$?
[ -n "$waiter" ] && [ -d /proc/$waiter ] && [ $code != 0 ] && pass "a process whose memory is locked" || { cat /tmp/held >>/tmp/out; fail "a process whose memory is locked"; }
ends "check ends all the same" 3 "does not tell within" $nt check $held
grep -q "/proc/$waiter/" /tmp/out && pass "and names the process" || fail "and names the process"
ends "and so does root's bind" 3 "does not tell within" $nt bind $held
kill -9 $server; wait $server 2>/dev/null
unmount /mnt/fault
works "once it has ended" $nt check $held

refused "another /etc" "a mount namespace of its own" unshare -m sh -c "mount -t tmpfs none /etc; $nt check $held"
refused "and says how to get out of it" "nsenter --target 1 --mount" unshare -m $nt check $held
works "which helps" unshare -m sh -c "mount -t tmpfs none /etc; exec /usr/bin/nsenter --target 1 --mount $nt check $held"
in_chroot() {
  mount --bind / /mnt && mount --rbind /proc /mnt/proc && mount --rbind /sys /mnt/sys && mount --rbind /dev /mnt/dev &&
    mount --rbind /etc/nt /mnt/etc/nt && mount -t tmpfs none /mnt/run && chroot /mnt "$@"
  ended=$?
  for mounted in $(awk '$2 ~ "^/mnt(/|$)" {print $2}' /proc/mounts | sort -r); do umount -l $mounted; done
  return $ended
}
refused "a chroot" "in a chroot" in_chroot $nt check $held

# A partition to boot from in an MBR, which the entry accepts.
printf '\000\000\000\000\357\000\000\000\000\010\000\000\000\020\000\000' | dd of=/dev/$esp bs=1 seek=446 conv=notrunc 2>/dev/null
printf '\125\252' | dd of=/dev/$esp bs=1 seek=510 conv=notrunc,fsync 2>/dev/null
refused "MBR type EF" "MBR type EF" $nt bind $esp

# A second drive of one serial, which the kernel rejects; then one that comes while the first is bound.
functions() { cat /sys/bus/pci/devices/*/class | grep -c 0x010802; }
plugged() { before=$(functions); echo "HOST $1 twin"; for i in $(seq 60); do [ $(functions) = $before ] || break; sleep 1; done; sleep 3; }
plugged plug
refused "a twin that the kernel rejected" "twin:" $nt check $held
plugged unplug
works "the twin is gone" $nt check $held
works "bind" $nt bind $held
plugged plug
for c in /sys/class/nvme/nvme*; do case $(cat $c/serial) in HELD0001*) twin=$(basename $c)n1 ;; esac; done
if [ -b /dev/$twin ]; then
  refused "the twin of a bound drive" "which nt has taken" $nt check $twin
else
  fail "the twin did not appear"
fi
plugged unplug
works "release" $nt release ${held%n1}

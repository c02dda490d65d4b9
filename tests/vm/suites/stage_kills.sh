# about: nt stage ended by SIGKILL, SIGINT, SIGTERM at changes drawn from the seed: the drive is staged again as it is; what stage finds before it writes
# drives: source
# drive: killed blank:64 serial=KILLED01 discard
# drive: kept random:32 serial=KEPT0001
# drive: tight random:8 serial=TIGHT001
# unchanged: kept source tight
# programs: mdadm cryptsetup:cryptsetup-bin lvm:lvm2 wipefs:util-linux sgdisk:gdisk
# modules: dm-mod
. /root/stage_kills.sh
prepare
# ended NAME CODE WORD COMMAND…
ended() {
  name=$1 wanted=$2 word=$3; shift 3
  "$@" >/tmp/out 2>&1; code=$?
  [ $code = $wanted ] && grep -q "$word" /tmp/out && pass "$name" || { echo "exit $code, wanted $wanted and: $word" >>/tmp/out; fail "$name"; }
}
tight=$(drive TIGHT001)n1
give TIGHT001 "unknown data"
ended "a model larger than the drive" 4 "nothing was written" nt stage /mnt/source/tiny.gguf --tier-c $tight --erase --serial TIGHT001
odd=$(printf '/tmp/odd\377.gguf'); cp /mnt/source/tiny.gguf "$odd"
ended "a path that is not UTF-8" 2 "not UTF-8" nt stage "$odd" --tier-c $n --erase --serial $d
ended "a path that is not UTF-8, extents" 1 "not UTF-8" $nt extents "$odd"
rm "$odd"
give $d
# The drive is empty: nothing has to be allowed.
mount -t tmpfs -o ro tmpfs /var/lib/nt
node=$(stat -c %i /dev/$n)
(for i in $(seq 600); do grep -q "FLOCK.*:$node " /proc/locks && { echo locked >/tmp/locked; break; }; sleep 0.1; done) & watcher=$!
ended "a record that cannot be written" 1 "the model is staged: drive $d holds it" stage
kill $watcher 2>/dev/null; wait $watcher 2>/dev/null
grep -q locked /tmp/locked 2>/dev/null && pass "udev is told to leave the drive alone" || { cp /proc/locks /tmp/out; fail "udev is told to leave the drive alone"; }
umount /var/lib/nt
works "and the drive is whole" nt verify tiny --tier-c $n

# Nobody reads stdout: the drive is staged, and stderr says so.
{ stage 2>/tmp/out; echo $? >/tmp/code; } | true
[ "$(cat /tmp/code)" = 1 ] && grep -q "^staged; " /tmp/out && grep -q "the model is staged and recorded" /tmp/out && pass "stdout is closed" || fail "stdout is closed"
{ stage >/dev/full; } 2>/tmp/out; code=$?
[ $code = 1 ] && grep -q "the model is staged and recorded.*No space left" /tmp/out && pass "stdout is full" || fail "stdout is full"
works "and the drive is whole again" nt verify tiny --tier-c $n

# Without stdin, stdout and stderr the first files that are opened would be those, and messages go to a drive.
stage <&- >&- 2>&-; code=$?
[ $code = 0 ] && pass "all three closed" || { echo "exit $code" >/tmp/out; fail "all three closed"; }
works "no message was written to the drive" nt verify tiny --tier-c $n
blockdev --setro /dev/$n
refused "write protected" "blockdev --setrw /dev/$n" stage
works "which is no obstacle to reading" $nt check $n
blockdev --setrw /dev/$n

# Somebody who writes and is gone again, over and over: the drive is not touched while he does.
dd if=/dev/$n of=/tmp/before bs=1M count=8 2>/dev/null
(while :; do echo mine | dd of=/dev/$n bs=512 seek=120000 count=1 conv=notrunc 2>/dev/null; done) & writer=$!
for try in 1 2 3 4 5; do refused "a short-lived writer, try $try" "open:" stage; done
kill $writer; wait $writer 2>/dev/null
dd if=/dev/$n bs=1M count=8 2>/dev/null | cmp - /tmp/before >/tmp/out 2>&1 && pass "nothing was written" || fail "nothing was written"
works "staged once he has ended" stage
# The first change is the last moment at which nothing is written yet; the others are spread over all there are.
killed 1 SIGTERM
killed 2 SIGKILL
for signal in SIGINT SIGKILL SIGTERM SIGKILL; do
  next 70
  killed $((3 + drawn)) $signal
done

# about: bind and release ended by SIGKILL, SIGINT, SIGTERM and SIGHUP at each of their changes, from a seed
# drive: kill random:16 serial=KILL0001
# drive: calm random:16 serial=CALM0001
# unchanged: kill calm
# timeout: 600
#
# 20 kills; the suite `kills-long` makes 300. The debug build of nt raises the signal that NT_TEST_KILL_AT names before its n-th
# change. After each, one `release` by address puts the drive back, and another drive's bind is not held up.
kills=${kills:-20}
rng=${seed:-1}
draw() { rng=$(((rng * 1103515245 + 12345) % 2147483648)); drawn=$((rng / 65536 % $1)); }

allow
dev=$(drive KILL0001)n1
at=$(address ${dev%n1})
base=/sys/bus/pci/devices/$at
driver() { basename "$(readlink $base/driver 2>/dev/null)"; }
# whole WHAT: the drive is the kernel's and nothing of ours is left
whole() {
  if [ "$(driver)" = nvme ] && [ "$(cat $base/driver_override)" = "(null)" ] && [ ! -e /run/nt/$at.toml ] && ! ls -A /run/nt | grep -q part; then return 0; fi
  { echo "$1: driver $(driver), driver_override $(cat $base/driver_override), $(ls -A /run/nt | tr '\n' ' ')"; cat /tmp/step; } >>/tmp/out
  return 1
}
before=$(sha256sum </dev/$dev)

bad=0 begun=0 done=0 undone=0
: >/tmp/out
i=0
while [ $i -lt $kills ]; do
  i=$((i + 1))
  name=$dev
  draw 4; case $drawn in 0) signal=SIGINT ;; 1) signal=SIGTERM ;; *) signal=SIGKILL ;; esac
  draw 10; [ $drawn != 0 ] || signal=SIGHUP
  draw 3
  if [ $drawn != 0 ]; then
    draw 8; n=$((drawn + 1)); what="bind, $signal before change $n"
    NT_TEST_KILL_AT=$n:$signal $nt bind $dev >/tmp/step 2>&1; code=$?
  else
    draw 5; n=$((drawn + 1)); what="release, $signal before change $n"
    $nt bind $dev >/tmp/step 2>&1 || { echo "$what: bind failed" >>/tmp/out; bad=$((bad + 1)); }
    NT_TEST_KILL_AT=$n:$signal $nt release $dev >/tmp/step 2>&1; code=$?
  fi
  # A signal that can be caught undoes or finishes, and ends with 130; SIGKILL leaves something or nothing.
  if [ $signal != SIGKILL ]; then
    [ $code = 130 ] && whole "$what" && undone=$((undone + 1)) || { echo "$what: exit $code" >>/tmp/out; bad=$((bad + 1)); }
  else
    [ $code = 137 ] || { echo "$what: exit $code" >>/tmp/out; bad=$((bad + 1)); }
    if [ -e /run/nt/$at.toml ]; then
      begun=$((begun + 1))
      $nt bind $at >/tmp/step 2>&1; code=$?
      [ $code = 3 ] && grep -q "nt device release --pci $at" /tmp/step || { echo "$what: the next bind: exit $code" >>/tmp/out; cat /tmp/step >>/tmp/out; bad=$((bad + 1)); }
    fi
    draw 3
    case $drawn in 0) set -- $dev ;; 1) set -- $at ;; *) set -- --pci $at ;; esac
    $nt release "$@" >/tmp/step 2>&1; code=$?
    [ $code = 0 ] || grep -q "is not bound" /tmp/step || { echo "$what: release $*: exit $code" >>/tmp/out; cat /tmp/step >>/tmp/out; bad=$((bad + 1)); }
    whole "$what" || bad=$((bad + 1))
  fi
  new=$(drive KILL0001)n1
  [ "$new" = "$dev" ] || { echo "$what: $dev came back as $new" >>/tmp/out; dev=$new; }
  [ -b /dev/$dev ] || { echo "$what: no /dev/$dev" >>/tmp/out; bad=$((bad + 1)); }
done
echo "INFO $kills kills from seed ${seed:-1}: $begun left something, $undone undid or finished it themselves"
[ $bad = 0 ] && pass "$kills kills of bind and release: release recovers each" || fail "$kills kills of bind and release: $bad faults"
[ "$before" = "$(sha256sum </dev/$dev)" ] && pass "not a byte changed" || fail "not a byte changed"

# Killed from outside while the kernel is at work: whatever moment that is.
bad=0
: >/tmp/out
for t in 0.05 0.15 0.25 0.4 0.6; do
  $nt bind $dev >/tmp/step 2>&1 & victim=$!
  sleep $t
  kill -9 $victim 2>/dev/null
  wait $victim 2>/dev/null
  sleep 0.3
  $nt release --pci $at >/tmp/step 2>&1 || grep -q "is not bound" /tmp/step || { cat /tmp/step >>/tmp/out; bad=1; }
  whole "killed after $t s" || bad=1
done
[ $bad = 0 ] && pass "killed at moments of no plan" || fail "killed at moments of no plan"

# Half done, and somebody else's drive works as always; list names it with the command.
NT_TEST_KILL_AT=5:SIGKILL $nt bind $dev >/tmp/step 2>&1
$nt list >/tmp/out 2>/dev/null
grep -q "a bind has" /tmp/out && grep -q "nt device release --pci $at" /tmp/out && pass "list says what was begun" || fail "list says what was begun"
other=$(drive CALM0001)n1
works "another drive is bound meanwhile" $nt bind $other
works "and given back" $nt release $other
works "release without a record" sh -c "rm /run/nt/$at.toml; $nt release --pci $at"
whole "without a record" && pass "the kernel has it again" || fail "the kernel has it again"

# A module is missing: found out before anything is changed.
rmmod vfio_iommu_type1 2>/dev/null
if [ ! -e /sys/module/vfio_iommu_type1 ]; then
  works "a missing module is loaded" $nt bind $dev
  [ -e /sys/module/vfio_iommu_type1 ] && pass "vfio_iommu_type1 is there" || fail "vfio_iommu_type1 is there"
  works "release" $nt release $dev
  rmmod vfio_iommu_type1
  mkdir -p /tmp/none; mount --bind /tmp/none /lib/modules
  $nt bind $dev >/tmp/out 2>&1; code=$?
  umount /lib/modules
  [ $code = 1 ] && grep -q "vfio_iommu_type1" /tmp/out && whole "no module" && pass "a module that does not exist is named" || fail "a module that does not exist is named (exit $code)"
  modprobe vfio_iommu_type1
  chmod 666 /dev/vfio/vfio
else
  echo "SKIP missing modules: vfio_iommu_type1 cannot be unloaded"
fi

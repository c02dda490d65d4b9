# about: suspend to RAM with a bound drive, idle and in a run
# long
# drives: model
# timeout: 1800
# guest: own
. /root/models.sh
oracle
allow
accept MODEL001 ext4
dev=$(drive MODEL001)n1 at=$(address $(drive MODEL001))
# asleep: suspends; the host wakes the machine
asleep() {
  grep -q mem /sys/power/state || { echo "SKIP suspend: this kernel cannot"; return 1; }
  echo "HOST wakeup"
  echo mem >/sys/power/state 2>/tmp/out && pass "$1: slept and woke" || fail "$1: slept and woke"
}
works "bind" $nt bind $dev
asleep "only bound"
[ "$(basename "$(readlink /sys/bus/pci/devices/$at/driver)")" = vfio-pci ] && pass "still bound" || fail "still bound"
works "logits after it" logits slept smol --tier-c $dev $tiers
bits ram slept
asuser "exec timeout 1300 nt -q run smol --tier-c $dev $tiers -p Hello -n 12 --ctx 64 -t 1" >/tmp/during 2>&1 & first=$!
for try in $(seq 60); do [ -s /tmp/during ] && break; sleep 1; done
kill -0 $first 2>/dev/null && pass "a run is under way" || fail "a run is under way"
asleep "in a run"
wait $first; code=$?
tail -c 300 /tmp/during | sed 's/^/INFO /'
case $code in
  0) pass "the run went on" ;;
  1) [ "$(grep -c '^nt: ' /tmp/during)" = 1 ] && pass "the run ended in one sentence" || fail "the run ended in one sentence" ;;
  *) fail "the run ended with $code" ;;
esac
works "release after it" $nt release $dev
[ -b /dev/$(drive MODEL001)n1 ] && pass "the kernel has it" || fail "the kernel has it"

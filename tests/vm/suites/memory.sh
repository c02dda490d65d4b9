# about: a model of 4 GiB on a machine with 2 GiB: it runs, too much is refused, a shortage ends it before the kernel kills
# long
# release
# memory: 2048
# timeout: 780
# drives: big
kib() { sed -n "s/^$1: *\([0-9]*\) kB/\1/p" /proc/meminfo; }
killed() { dmesg | grep -Ei 'out of memory|oom-kill|killed process'; }
mkdir -p /mnt/model
mount -t ext4 -o ro /dev/$(drive BIG00001)n1 /mnt/model
model=/mnt/model/big.gguf
echo "INFO $(($(kib MemTotal) >> 10)) MiB of memory, $(($(kib MemAvailable) >> 10)) available, model of $(($(stat -c %s $model) >> 20)) MiB"
field() { sed -n "s/.*\"$1\":\([0-9.]*\).*/\1/p" /tmp/run.json; }

# The embedding's rows and the header may be cached; weights may not.
cat $model >/dev/null & sleep 1; kill $! 2>/dev/null; echo 3 >/proc/sys/vm/drop_caches
before=$(kib Cached) began=$(cut -d. -f1 /proc/uptime)
asuser "nt -q run $model -p w1 -n 2 --temp 0 --ctx 16 -t 2 --json" >/tmp/run.json 2>/tmp/out; code=$?
after=$(kib Cached)
echo "INFO 2 tokens in $(($(cut -d. -f1 /proc/uptime) - began)) s; the page cache grew by $(((after - before) >> 10)) MiB; peak of memory $(($(field peak_rss_bytes) >> 20)) MiB"
cat /tmp/run.json >>/tmp/out
[ $code = 0 ] && pass "a model of twice the memory runs" || fail "a model of twice the memory runs"
grep -q '"c":{"units":[1-9]' /tmp/run.json && pass "from tier C" || fail "from tier C"
[ $((after - before)) -lt 51200 ] && pass "page cache growth below 50 MiB" || fail "page cache growth below 50 MiB"

asuser "nt -q run $model -p w1 -n 2 --ctx 16 --ram 8GiB" >/tmp/out 2>&1; code=$?
sed 's/^/INFO /' /tmp/out
[ $code = 4 ] && grep -q -e "--ram [0-9]*MiB would fit" /tmp/out && pass "--ram 8GiB is refused" || fail "--ram 8GiB is refused"

# The hog: files in memory, 16 MiB at a time, down to 120 MiB at most.
mkdir -p /run/hog
mount -t tmpfs -o size=2g tmpfs /run/hog
asuser "exec nt -q run $model -p w1 -n 200 --ctx 256 -t 2" >/tmp/out 2>&1 & runner=$!
sleep 5
pid=$(pidof nt)
[ "$(cat /proc/$pid/oom_score_adj)" = 500 ] && pass "the kernel would take nt first" || fail "the kernel would take nt first"
n=0
while kill -0 $pid 2>/dev/null && [ $n -lt 120 ]; do
  [ $(kib MemAvailable) -gt 122880 ] && dd if=/dev/zero of=/run/hog/$n bs=1M count=16 2>/dev/null
  n=$((n + 1))
  sleep 0.2
done
wait $runner; code=$?
echo "INFO with $(du -sm /run/hog | cut -f1) MiB taken by others: exit $code, $(tail -1 /tmp/out)"
[ $code = 1 ] && grep -q "stopped before memory ran out" /tmp/out && pass "a shortage ends the run with its reason" || fail "a shortage ends the run with its reason"
rm -r /run/hog/*
killed >/tmp/out && fail "the kernel killed nobody" || pass "the kernel killed nobody"

# What the suites share. Sourced before each.
nt="nt device"
list=/etc/nt/drives.toml

drive() { for c in /sys/class/nvme/nvme*; do case $(cat "$c/serial") in "$1"*) basename "$c" ;; esac; done; }
pass() { echo "PASS $1"; }
fail() { echo "FAIL $1"; sed 's/^/     /' /tmp/out; }
# refused NAME WORD COMMAND…: exit code 3, and WORD in what it says
refused() {
  name=$1 word=$2; shift 2
  "$@" >/tmp/out 2>&1; code=$?
  if [ $code = 3 ] && grep -q "$word" /tmp/out; then pass "$name"; else echo "exit $code, wanted 3 and: $word" >>/tmp/out; fail "$name"; fi
}
# unmount FOLDER: the kernel gives up the files of io_uring a moment after the process has ended
unmount() { for _ in $(seq 50); do umount "$1" 2>/dev/null && return; sleep 0.2; done; umount "$1"; }
works() { name=$1; shift; if "$@" >/tmp/out 2>&1; then pass "$name"; else echo "exit $?" >>/tmp/out; fail "$name"; fi; }
# allow: an entry for every drive, as `nt device list` prints them, contents accepted
allow() {
  rm -f $list # drives that a list describes are printed without lines
  $nt list 2>/dev/null | sed -n '/\[\[drive\]\]/,/^    holds/p' | sed 's/^    //; s/holds = \[\]/holds = ["unknown data"]/' >/tmp/list
  cp /tmp/list $list; chmod 644 $list
}

# again STEP: cuts the power; the suite is run once more after the boot, with $step set to STEP
again() { sync; echo "AGAIN $suite $1"; sleep 1; echo b >/proc/sysrq-trigger; sleep 60; }
# accept SERIAL WORD…: the list's entry of that drive lets nt read these contents
accept() {
  serial=$1; shift
  sed "/\"$serial\"/,/holds/s/holds = .*/holds = [$(printf '"%s", ' "$@" | sed 's/, $//')]/" $list >/tmp/list; cp /tmp/list $list
}
# give SERIAL WORD…: and lets it erase these
give() {
  serial=$1; shift
  words=$(printf "\"%s\", " "$@" | sed "s/, $//")
  [ $# != 0 ] || words=
  awk -v s="\"$serial\"" -v line="erase = [$words]" 'drop && /^erase/ {drop = 0; next} {drop = 0} index($0, s) {on = 1}
    {print} on && /^holds/ {print line; on = 0; drop = 1}' $list >/tmp/list
  cp /tmp/list $list
}
address() { basename "$(readlink -f /sys/class/nvme/$1/device)"; }

asuser() { su user -s /bin/sh -c "$*"; }
ulimit -l 400000

# Throughput, and processor time a read as fio counts it (fields 88 and 89 of its terse form, in percent).
# bench_kernel [FIO OPTION…]
bench_kernel() {
  for case in 4k:1 4k:32 128k:1 128k:32 1M:1 1M:32; do
    fio --name=k --filename=/dev/$dev --readonly --rw=randread --direct=1 --ioengine=io_uring --time_based --runtime=1.5 \
      --bs=${case%:*} --iodepth=${case#*:} "$@" --output-format=terse --terse-version=3 2>/dev/null |
      awk -F';' -v c=$case '{printf "INFO fio io_uring %s: %d reads/s %.1f us CPU a read\n", c, $8, ($88 + $89) * 10000 / ($8 + 0.001)}'
  done
}
bench_vfio() { asuser nvme_probe bench $dev 2>&1 | sed 's/^/INFO vfio /'; }

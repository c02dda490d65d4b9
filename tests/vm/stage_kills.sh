# Kills of a stage. Sourced by the suites stage_kills and stage_kills_all.
. /root/staging.sh
d=KILLED01
number=$seed
# next LIMIT: a number below it into $drawn, from the seed
next() { number=$(((number * 1103515245 + 12345) & 0x7fffffff)); drawn=$((number / 65536 % $1)); }

prepare() { prepare_again; }
# After a boot the list is gone; it lets what the drive held before the kill be erased, and nothing else.
prepare_again() {
  n=$(drive $d)n1
  allow
  accept $d
  give $d gpt ext4 "unknown data"
  holder
}

# What lies on the drive before: an ext4 in a partition, unknown bytes in the second and at the end.
before() {
  dd if=/dev/zero of=/dev/$n bs=1M count=10 conv=notrunc 2>/dev/null
  dd if=/dev/zero of=/dev/$n bs=1M seek=63 count=1 conv=notrunc,fsync 2>/dev/null
  head -c 22000000 /dev/urandom | dd of=/dev/$n bs=1M seek=40 conv=notrunc,fsync 2>/dev/null
  blockdev --rereadpt /dev/$n
  sgdisk -n 1:2048:+30M -n 2:0:+20M /dev/$n && parts 2 && mke2fs -q -F -t ext4 /dev/${n}p1
}

# The mark of a staging that was cut off stands in the first block.
is_marked() { [ "$(dd if=/dev/$n bs=8 count=1 2>/dev/null | tr -d '\000')" = NTSTAGE1 ]; }
# is_as_before: nothing was written: there is no mark, which goes first, and the ext4 of before
is_as_before() { ! is_marked && [ "$(dd if=/dev/$n bs=2 skip=524828 count=1 2>/dev/null | od -An -tx1)" = " 53 ef" ]; }
# Sectors that the kernel has written to the drive. Whoever opens it to look would have a stage refuse it.
written() { awk '{print $7}' /sys/block/$n/stat; }

# recovered NAME: the same command stages the drive, with nothing done to it or to the list
recovered() {
  give $d # what the kill left is nobody's but nt's
  nt verify tiny --tier-c $n >/tmp/out 2>&1 && fail "$1: no image is left"
  works "$1: staged again" stage
  ours >/tmp/out 2>&1; [ -s /tmp/out ] && fail "$1: what others find is ours"
  nt verify tiny --tier-c $n >/tmp/out 2>&1 || fail "$1: the model is whole"
}

# killed_only CHANGE SIGNAL
killed_only() {
  before >/tmp/out 2>&1 || fail "prepared for a kill"
  give $d gpt ext4 "unknown data"
  NT_TEST_KILL_AT=$1:$2 nt stage /mnt/source/tiny.gguf --tier-c $n --erase --serial $d >/tmp/killed 2>&1
}

# killed CHANGE SIGNAL: stages, is killed there, and stages again; $ended is the exit code of the first
killed() {
  name="$2 before change $1"
  killed_only $1 $2; ended=$?
  cp /tmp/killed /tmp/out
  [ $ended = 0 ] && { pass "$name: there was nothing left to do"; return; }
  case $2:$ended:$1 in
    SIGKILL:137:*) ;;
    SIG???*:130:1 | SIG???*:130:*)
      grep -q "stage it again with: nt stage /mnt/source/tiny.gguf --tier-c $n --erase --serial $d" /tmp/killed || fail "$name: names the command"
      ;;
    *) echo "exit $ended" >>/tmp/out; fail "$name: ends with 130" ;;
  esac
  # Change 1 is the first write: before it the drive is as it was, and what it holds still needs consent.
  if [ $2:$1 = SIGKILL:1 ]; then
    is_as_before && pass "$name: nothing is written" || fail "$name: nothing is written"
    give $d
    still="$name: what was there still counts"
    refused "$still" "contents: it holds ext4" stage
    give $d gpt ext4 "unknown data"
    works "$still: the partitions are shown again" parts 2
    works "$still: staged with consent" stage
    return
  fi
  recovered "$name"
}

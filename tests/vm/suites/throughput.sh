# about: one drive, fio on the kernel's driver and nt through VFIO: bytes per second, and processor time per byte
# long
# guest: own
# release
# timeout: 900
# drive: fast random:256
. /root/probes.sh
dev=$(drive FAST0001)n1
fast=$dev
echo "INFO clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
# Ticks of 10 ms that this shell's children have used, as user and in the kernel.
ticks() { awk '{print $16 + $17}' /proc/$$/stat; }
# by_fio NAME MODE KIB DEPTH; prints bytes per second and nanoseconds of processor time per KiB.
by_fio() {
  fio --name=f --filename=/dev/$fast --readonly --rw=$1 --direct=1 --ioengine=io_uring --time_based --ramp_time=0.5 --runtime=3 --bs=$2k \
    --iodepth=$3 --gtod_reduce=1 --output-format=terse --terse-version=3 2>/dev/null |
    awk -F';' '{printf "%d %d\n", $7 * 1024, ($88 + $89) * 1e7 / ($7 + 0.001)}'
}
# by_nt KIB DEPTH; the same. What a run uses besides reading is that of a shorter one.
by_nt() {
  spent=
  for seconds in 1 4; do
    began=$(ticks)
    nt probe storage $dev --block-size $1KiB --depth $2 --seconds $seconds --json >/tmp/nt.json 2>/tmp/out || return
    spent="$spent $(($(ticks) - began))"
  done
  echo "$(value bytes_per_s) $spent" | awk '{printf "%d %d\n", $1, ($3 - $2) * 1e7 / ($1 / 1024 * 3)}'
}
blocks="128 256 512 1024"
depths="1 4 16 32"
for kib in $blocks; do
  for depth in $depths; do echo "$kib $depth $(by_fio randread $kib $depth)" >>/tmp/random.fio; done
done
for kib in $blocks; do echo "$kib 32 $(by_fio read $kib 32)" >>/tmp/sequential.fio; done
allow
works "bind" nt device bind $dev
for kib in $blocks; do
  for depth in $depths; do echo "$kib $depth $(by_nt $kib $depth)" >>/tmp/random.nt; done
done
for depth in 2 4 8; do echo "4096 $depth $(by_nt 4096 $depth)" >>/tmp/units.nt; done
works "release" nt device release $dev
for name in random.fio sequential.fio random.nt units.nt; do
  sed "s/^/INFO $name: KiB, depth, bytes per second, ns of processor time per KiB: /" /tmp/$name
done
# best FILE KIB: the line of that block size, or of any, with the most bytes per second
best() { awk -v kib="$2" '(kib == "" || $1 == kib) && $3 > most {most = $3; line = $0} END {print line}' $1; }
for kib in $blocks; do
  echo "$(best /tmp/random.nt $kib) $(best /tmp/random.fio $kib)" |
    awk '{printf "INFO %d KiB random: %.2f of fio, %.2f of its processor time per byte\n", $1, $3 / $7, $4 / $8}'
done
echo "$(best /tmp/units.nt) $(best /tmp/sequential.fio)" |
  awk '{printf "INFO units of 4 MiB: %.2f of sequential fio, %.2f of its processor time per byte\n", $3 / $7, $4 / $8}'

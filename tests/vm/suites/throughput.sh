# about: drives of one kind, fio on the kernel's driver and nt through VFIO in turn: bytes per second, and processor time per byte
# long
# guest: own
# timeout: 1500
# drive: kernel random:256
# drive: bound random:256
kernel=$(drive KERNEL0001)n1 bound=$(drive BOUND0001)n1
echo "INFO clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
# by_fio MODE KIB DEPTH: bytes per second, and nanoseconds of processor time per KiB
by_fio() {
  fio --name=f --filename=/dev/$kernel --readonly --rw=$1 --direct=1 --ioengine=io_uring --time_based --ramp_time=0.5 --runtime=2 --bs=$2k \
    --iodepth=$3 --gtod_reduce=1 --output-format=terse --terse-version=3 2>/dev/null |
    awk -F';' '{printf "%.0f %.0f\n", $7 * 1024, ($88 + $89) * 1e7 / ($7 + 0.001)}'
}
# by_nt KIB DEPTH: the same
by_nt() {
  asuser nvme_probe bench --seconds 2 $bound $1:$2 2>/tmp/out |
    awk -v kib=$1 '{printf "%.0f %.0f\n", $5 * 1e6, $7 * 1000 / kib}'
}
allow
works "bind" nt device bind $bound
for turn in 1 2 3; do
  for kib in 128 256 512 1024; do
    for depth in 4 16 32; do
      echo "$kib $depth $(by_fio randread $kib $depth)" >>/tmp/random.fio
      echo "$kib $depth $(by_nt $kib $depth)" >>/tmp/random.nt
    done
  done
  for depth in 2 4 8; do
    echo "4096 $depth $(by_fio read $((2048 / depth)) 32)" >>/tmp/sequential.fio
    echo "4096 $depth $(by_nt 4096 $depth)" >>/tmp/units.nt
  done
done
works "release" nt device release $bound
for name in random.fio random.nt sequential.fio units.nt; do
  sed "s/^/INFO $name: KiB, depth, bytes per second, ns of processor time per KiB: /" /tmp/$name
done
# best FILE KIB: of that block size, the medians over the turns at the depth with the most bytes per second
best() {
  for depth in 2 4 8 16 32; do
    for field in 3 4; do grep "^$2 $depth " $1 | cut -d' ' -f$field | sort -n | sed -n 2p; done | tr '\n' ' '
    echo
  done | sort -n | tail -n 1
}
for kib in 128 256 512 1024; do
  echo "$kib $(best /tmp/random.nt $kib) $(best /tmp/random.fio $kib)" |
    awk '{printf "INFO %d KiB random: %.2f of fio, %.2f of its processor time per byte\n", $1, $2 / $4, $3 / $5}'
done
echo "$(best /tmp/units.nt 4096) $(best /tmp/sequential.fio 4096)" |
  awk '{printf "INFO units of 4 MiB: %.2f of sequential fio, %.2f of its processor time per byte\n", $1 / $3, $2 / $4}'

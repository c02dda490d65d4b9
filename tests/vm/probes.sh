# What the suites that compare nt's probe with fio share. Sourced by them.

# value NAME: that number of nt's sustained read, in /tmp/nt.json
value() { sed -n "s/.*\"sustained\":.*\"$1\":\([0-9.]*\).*/\1/p" /tmp/nt.json; }
# of_fio NAME: bw_bytes, iops, or a percentile of its latencies, in /tmp/fio.json
of_fio() {
  awk -v name="\"$1\"" '/"read" : / {on = 1} /"write" : / {on = 0} /"lat_ns" : / {lat = on} /"clat_ns" : / {lat = 0}
    on && $1 == name && (lat || name !~ /^"[0-9]/) && !done {gsub(",", "", $3); print $3; done = 1}' /tmp/fio.json
}
# near NAME A B PERCENT: A is within so many percent of B
near() {
  if awk -v a="$2" -v b="$3" -v p="$4" 'BEGIN {d = b > 0 ? a / b - 1 : 1; exit !(d <= p / 100 && -d <= p / 100)}'; then
    pass "$1: $2 beside $3"
  else
    fail "$1: $2 beside $3, more than $4 % apart"
  fi
}
# beside NAME DEVICE KIB DEPTH [RATE]: both read it for some seconds, and agree with each other, with the bytes per second
# that the drive is limited to, and with depth x block / latency
beside() {
  nt probe storage $2 --block-size $3KiB --depth $4 --seconds 6 --json >/tmp/nt.json 2>/tmp/out
  # fio's main process stands still while its job reads, so that on one processor neither of its threads, which wake some
  # 110 and 5 times per second, is counted as the drive's latency. It must have started the job before; where fio is read
  # from a drive for the first time, that takes more than a second.
  fio --name=f --filename=$2 --readonly --rw=randread --direct=1 --ioengine=io_uring --time_based --ramp_time=1 --runtime=6 --bs=$3k \
    --iodepth=$4 --eta=never --disk_util=0 --lat_percentiles=1 --clat_percentiles=0 --percentile_list=50:99:99.9 --output-format=json >/tmp/fio.json 2>>/tmp/out &
  fio=$!
  for _ in $(seq 100); do
    [ "$(ps | grep -c '[f]io --name=f ')" -lt 2 ] || break
    sleep 0.1
  done
  sleep 0.5
  kill -STOP $fio
  sleep 7
  kill -CONT $fio
  wait $fio
  [ -z "$5" ] || near "$1, bytes per second against the limit" "$(value bytes_per_s)" $5 3
  near "$1, bytes per second against depth x block / mean latency" "$(value bytes_per_s)" $(($4 * $3 * 1024000000 / $(value mean_ns)))000 3
  near "$1, bytes per second against fio" "$(value bytes_per_s)" "$(of_fio bw_bytes)" 3
  near "$1, reads per second against fio" "$(value iops)" "$(of_fio iops)" 3
  near "$1, p50 against fio" "$(value p50_ns)" "$(of_fio 50.000000)" 5
  near "$1, p99 against fio" "$(value p99_ns)" "$(of_fio 99.000000)" 5
  near "$1, p99.9 against fio" "$(value p99_9_ns)" "$(of_fio 99.900000)" 5
}
